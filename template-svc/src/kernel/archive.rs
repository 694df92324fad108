//! Modules as guests have them: a cpio archive in the form "newc" that the kernel unpacks into its first root
//! (Documentation/driver-api/early-userspace/buffer-format.rst of Linux). A node puts envd behind it, so nothing else may be in it.

use std::io::{self, Read as _, Write as _};

use cpio::newc::{self, ModeFileType};

use super::{KernelError, LARGEST_MODULES, MOST_MODULES, bounded, elf::check_module};

const FOLDER: &str = "modules";
const KIND: u32 = 0o170_000;
const LONGEST_NAME: usize = 100;

fn file_name(number: usize, name: &str) -> String {
    format!("{FOLDER}/{number:02}-{name}.ko")
}

/// Whether the kernel, and whoever shows it, has no trouble with it.
fn is_name(name: &str) -> bool {
    let is_good = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    (1..=LONGEST_NAME).contains(&name.len()) && name.chars().all(is_good)
}

fn malformed(error: io::Error) -> KernelError {
    KernelError::Archive(error.to_string())
}

/// Packs modules, in load order, by their names; the same ones are the same archive.
pub(super) fn write(modules: &[(String, Vec<u8>)]) -> Result<Vec<u8>, KernelError> {
    if modules.len() > MOST_MODULES {
        return Err(KernelError::TooManyModules);
    }
    let folder = newc::Builder::new(FOLDER).ino(1).mode(0o755);
    let folder = folder.set_mode_file_type(ModeFileType::Directory);
    let mut archive = folder.write(Vec::new(), 0).finish().map_err(malformed)?;
    for (number, (name, bytes)) in modules.iter().enumerate() {
        if !is_name(name) {
            return Err(KernelError::Archive(format!("{name:?} is no name")));
        }
        let size = u32::try_from(bytes.len()).map_err(io::Error::other);
        let inode = u32::try_from(number + 2).map_err(io::Error::other);
        let entry = newc::Builder::new(&file_name(number, name))
            .ino(inode.map_err(malformed)?)
            .mode(0o644)
            .set_mode_file_type(ModeFileType::Regular);
        let mut entry = entry.write(archive, size.map_err(malformed)?);
        entry.write_all(bytes).map_err(malformed)?;
        archive = entry.finish().map_err(malformed)?;
    }
    let archive = newc::trailer(archive).map_err(malformed)?;
    if archive.len() as u64 > LARGEST_MODULES {
        return Err(KernelError::TooLarge {
            what: "the archive of modules".into(),
            most: LARGEST_MODULES,
        });
    }
    Ok(archive)
}

/// Looks at an archive that somebody says is of modules for the kernel of that release.
pub fn check(archive: &[u8], release: &str) -> Result<(), KernelError> {
    // What follows it, as a node has it, must begin on a border of four bytes.
    if !archive.len().is_multiple_of(4) {
        return Err(KernelError::Archive("it is cut short".into()));
    }
    let (mut rest, mut number) = (archive, None);
    loop {
        let mut entry = newc::Reader::new(rest).map_err(malformed)?;
        let head = entry.entry().clone();
        if head.is_trailer() {
            let left = entry.finish().map_err(malformed)?;
            return match (number, left) {
                (Some(_), []) => Ok(()),
                (None, _) => Err(KernelError::Archive("it is empty".into())),
                (_, [..]) => Err(KernelError::Archive("something follows its end".into())),
            };
        }
        let name = head.name();
        let refuse = |why: &str| {
            let name: String = name.chars().take(LONGEST_NAME).collect();
            KernelError::Archive(format!("entry {name:?}: {why}"))
        };
        if head.checksum().is_some() {
            return Err(refuse("it is of another form than newc"));
        }
        let Some(count) = number else {
            let is_folder = head.mode() & KIND == u32::from(ModeFileType::Directory);
            if name != FOLDER || !is_folder || head.file_size() > 0 {
                return Err(refuse("the first must be the folder \"modules\""));
            }
            number = Some(0);
            rest = entry.finish().map_err(malformed)?;
            continue;
        };
        if count >= MOST_MODULES {
            return Err(KernelError::TooManyModules);
        }
        let module = name
            .strip_prefix(&format!("{FOLDER}/{count:02}-"))
            .and_then(|name| name.strip_suffix(".ko"))
            .filter(|name| is_name(name));
        let module = module.ok_or_else(|| refuse("it must be modules/NN-name.ko, in order"))?;
        // Of more links than one the kernel makes one file.
        if head.mode() & KIND != u32::from(ModeFileType::Regular) || head.nlink() > 1 {
            return Err(refuse("it must be a file"));
        }
        let bytes = bounded(entry.by_ref(), name, LARGEST_MODULES)?;
        if bytes.len() as u64 != u64::from(head.file_size()) {
            return Err(KernelError::Archive("it is cut short".into()));
        }
        check_module(&bytes, release).map_err(|why| KernelError::Module {
            name: module.to_owned(),
            why,
        })?;
        number = Some(count + 1);
        rest = entry.finish().map_err(malformed)?;
    }
}
