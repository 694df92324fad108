//! What guests need of a kernel, and where its modules are that have it: the folder `lib/modules/RELEASE` that `make modules_install` and
//! depmod(8) leave.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io::{self, Read},
    path::{Component, Path, PathBuf},
};

use flate2::read::GzDecoder;

use super::{
    KernelError, LARGEST_MODULES, MOST_MODULES, archive, bounded, elf::check_module, xz, zstd,
};

/// Of a list; modules.alias of a distribution has 2 MiB.
const LARGEST_LIST: u64 = 32 << 20;
/// Dependencies of dependencies; those of what guests need are four deep.
const DEEPEST: usize = 32;

/// What a guest needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    /// The module that has it, if it is not built in.
    pub module: &'static str,
    /// The option of the kernel's configuration.
    pub option: &'static str,
    /// What for.
    pub what: &'static str,
    /// Whether there is no guest without it; others are loaded if they are modules.
    pub is_must: bool,
}

const fn need(module: &'static str, option: &'static str, what: &'static str) -> Need {
    Need {
        module,
        option,
        what,
        is_must: true,
    }
}

const fn wish(module: &'static str, option: &'static str, what: &'static str) -> Need {
    Need {
        is_must: false,
        ..need(module, option, what)
    }
}

/// In load order, as in `deploy/guest-kernel`, which has some more. Newer kernels do not list what is always built in.
pub const NEEDS: [Need; 14] = [
    need("virtio_mmio", "CONFIG_VIRTIO_MMIO", "all devices"),
    wish(
        "virtio_pci",
        "CONFIG_VIRTIO_PCI",
        "devices of other machines",
    ),
    need("virtio_blk", "CONFIG_VIRTIO_BLK", "disks"),
    need("virtio_net", "CONFIG_VIRTIO_NET", "the network"),
    need(
        "virtio_console",
        "CONFIG_VIRTIO_CONSOLE",
        "the guest link on QEMU",
    ),
    need("virtio_rng", "CONFIG_HW_RANDOM_VIRTIO", "entropy"),
    need(
        "virtio_balloon",
        "CONFIG_VIRTIO_BALLOON",
        "giving memory back",
    ),
    need("erofs", "CONFIG_EROFS_FS", "the root of templates"),
    need("ext4", "CONFIG_EXT4_FS", "writable disks"),
    need("overlay", "CONFIG_OVERLAY_FS", "a disk upon the root"),
    wish("unix", "CONFIG_UNIX", "sockets of programs"),
    wish("af_packet", "CONFIG_PACKET", "looking at the network"),
    need("tcp_diag", "CONFIG_INET_TCP_DIAG", "knowing who listens"),
    need(
        "vmw_vsock_virtio_transport",
        "CONFIG_VIRTIO_VSOCKETS",
        "the guest link on Firecracker",
    ),
];

/// The modules of a kernel.
#[derive(Debug)]
pub struct Tree {
    folder: PathBuf,
    release: String,
    /// By name: its file, and what it depends on, the nearest first.
    modules: HashMap<String, (PathBuf, Vec<String>)>,
    builtin: HashSet<String>,
    /// What is to be there before a module, if it is at all: modules, or other names for them.
    wished: HashMap<String, Vec<String>>,
    /// Other names.
    aliases: HashMap<String, Vec<String>>,
}

/// To the kernel both signs are one.
fn same(name: &str) -> String {
    name.replace('-', "_")
}

fn name_of(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let name = name.split_once(".ko").map_or(&*name, |(name, _)| name);
    same(name)
}

impl Tree {
    /// Reads the lists of the kernel of that release; `given` is its folder, or the one in which `lib/modules` is.
    pub fn read(given: &Path, release: &str) -> Result<Self, KernelError> {
        let below = given.join("lib/modules").join(release);
        let folder = if below.is_dir() {
            below
        } else {
            let folder = given.canonicalize();
            folder.map_err(|cause| KernelError::Read {
                path: given.to_owned(),
                cause,
            })?
        };
        if folder.file_name().is_none_or(|name| name != release) {
            return Err(KernelError::Folder {
                folder: given.to_owned(),
                release: release.to_owned(),
            });
        }
        let list = |name: &str| -> Result<Option<String>, KernelError> {
            let path = folder.join(name);
            let bytes = match File::open(&path) {
                Ok(file) => bounded(file, name, LARGEST_LIST)?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(cause) => return Err(KernelError::Read { path, cause }),
            };
            Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
        };
        let missing = |name: &str| KernelError::NoDependencies {
            path: folder.join(name),
            release: release.to_owned(),
        };
        let dependencies = list("modules.dep")?.ok_or_else(|| missing("modules.dep"))?;
        let builtin = list("modules.builtin")?.ok_or_else(|| missing("modules.builtin"))?;
        let wished = list("modules.softdep")?.unwrap_or_default();
        let aliases = list("modules.alias")?.unwrap_or_default();
        Ok(Self {
            modules: dependencies.lines().filter_map(dependency).collect(),
            builtin: builtin
                .lines()
                .map(|line| name_of(Path::new(line)))
                .collect(),
            wished: by_name(wished.lines().filter_map(wish_of)),
            aliases: by_name(aliases.lines().filter_map(alias)),
            folder,
            release: release.to_owned(),
        })
    }

    /// What guests need of them, as an archive.
    pub fn pack(&self) -> Result<Vec<u8>, KernelError> {
        let mut modules = Vec::new();
        let mut left = LARGEST_MODULES;
        for (name, path) in self.order()? {
            let bytes = self.module(name, path, left)?;
            left -= bytes.len() as u64;
            check_module(&bytes, &self.release).map_err(|why| KernelError::Module {
                name: name.to_owned(),
                why,
            })?;
            modules.push((name.to_owned(), bytes));
        }
        archive::write(&modules)
    }

    /// What is needed and all it depends on, each after what it depends on.
    fn order(&self) -> Result<Vec<(&str, &Path)>, KernelError> {
        let is_missing = |need: &Need| {
            need.is_must
                && !self.builtin.contains(need.module)
                && !self.modules.contains_key(need.module)
        };
        let missing: Vec<Need> = NEEDS.into_iter().filter(is_missing).collect();
        if !missing.is_empty() {
            return Err(KernelError::Missing(missing));
        }
        let (mut order, mut seen) = (Vec::new(), HashSet::new());
        for need in NEEDS {
            self.visit(need.module, 0, &mut seen, &mut order)?;
        }
        Ok(order)
    }

    fn visit<'a>(
        &'a self,
        name: &str,
        depth: usize,
        seen: &mut HashSet<&'a str>,
        order: &mut Vec<(&'a str, &'a Path)>,
    ) -> Result<(), KernelError> {
        let Some((name, (path, needs))) = self.modules.get_key_value(name) else {
            return Ok(());
        };
        if self.builtin.contains(name) || !seen.insert(name) {
            return Ok(());
        }
        if depth > DEEPEST {
            return Err(KernelError::Module {
                name: name.clone(),
                why: format!("its dependencies are more than {DEEPEST} deep"),
            });
        }
        for wished in self.wished.get(name).into_iter().flatten() {
            self.visit(wished, depth + 1, seen, order)?;
            for other in self.aliases.get(wished).into_iter().flatten() {
                self.visit(other, depth + 1, seen, order)?;
            }
        }
        for other in needs.iter().rev() {
            self.visit(other, depth + 1, seen, order)?;
        }
        order.push((name.as_str(), path.as_path()));
        if order.len() > MOST_MODULES {
            return Err(KernelError::TooManyModules);
        }
        Ok(())
    }

    fn module(&self, name: &str, path: &Path, most: u64) -> Result<Vec<u8>, KernelError> {
        let wrong = |why: &str| KernelError::Module {
            name: name.to_owned(),
            why: why.to_owned(),
        };
        let is_below = path
            .components()
            .all(|it| matches!(it, Component::Normal(_)));
        if !is_below {
            return Err(wrong("modules.dep says that it is elsewhere"));
        }
        let path = self.folder.join(path);
        let file = File::open(&path).map_err(|cause| KernelError::Read {
            path: path.clone(),
            cause,
        })?;
        let bytes = bounded(file, name, LARGEST_MODULES)?;
        let broken = |cause| KernelError::Unpack {
            what: format!("module {name}"),
            cause,
        };
        let extension = path.extension().and_then(|it| it.to_str());
        let unpacked: Box<dyn Read + '_> = match extension {
            Some("ko") => Box::new(bytes.as_slice()),
            Some("xz") => Box::new(xz(&bytes).map_err(broken)?),
            Some("zst") => Box::new(zstd(&bytes).map_err(broken)?),
            Some("gz") => Box::new(GzDecoder::new(bytes.as_slice())),
            _ => return Err(wrong("it is packed in a way that is not known")),
        };
        bounded(unpacked, name, most)
    }
}

/// `kernel/fs/erofs/erofs.ko: kernel/lib/libcrc32c.ko`
fn dependency(line: &str) -> Option<(String, (PathBuf, Vec<String>))> {
    let (path, needs) = line.split_once(':')?;
    let path = PathBuf::from(path);
    let needs = needs.split_whitespace().map(|it| name_of(Path::new(it)));
    Some((name_of(&path), (path, needs.collect())))
}

/// `softdep libcrc32c pre: crc32c post: other`
fn wish_of(line: &str) -> Option<(String, Vec<String>)> {
    let mut words = line.strip_prefix("softdep ")?.split_whitespace();
    let name = same(words.next()?);
    let before = words.skip_while(|word| *word != "pre:").skip(1);
    let before = before.take_while(|word| *word != "post:");
    Some((name, before.map(same).collect()))
}

/// `alias crc32c crc32c_generic`
fn alias(line: &str) -> Option<(String, Vec<String>)> {
    let mut words = line.strip_prefix("alias ")?.split_whitespace();
    Some((same(words.next()?), vec![same(words.next()?)]))
}

fn by_name(pairs: impl Iterator<Item = (String, Vec<String>)>) -> HashMap<String, Vec<String>> {
    let mut found: HashMap<String, Vec<String>> = HashMap::new();
    for (name, more) in pairs {
        found.entry(name).or_default().extend(more);
    }
    found
}
