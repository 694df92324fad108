//! Snapshots of templates on this node: a guest that booted, waits at its gate and belongs to nobody yet; a start command is ready in it. Every session of the same
//! template and size is restored from one of them, and maps its memory privately, so that what is not written is there once.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs::{self, File},
    io,
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use prost::Message as _;
use proto::{session::v1::Resources, template::v1::Template};
use rustix::fs::{FallocateFlags, fallocate};

use crate::{
    stored::{self, Maker, StoredError},
    vmm::{MEMORY, memory::PAGE},
};

/// BLAKE3 of the memory, and when it was made and of what: all in hexadecimal and words.
const MEMORY_HASH: &str = "memory.blake3";
const BUFFER: usize = 1 << 20;
/// Begins names of snapshots that are being made.
const MAKING: &str = ".making-";

/// One that is whole.
#[derive(Debug, Clone)]
pub struct TemplateSnapshot {
    /// What it is of.
    pub key: String,
    /// Its files.
    pub folder: PathBuf,
}

/// The snapshots of this node.
#[derive(Debug)]
pub struct TemplateSnapshots {
    folder: PathBuf,
    turns: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    /// Those whose memory was read and is what was written.
    verified: Arc<Mutex<HashSet<String>>>,
}

impl TemplateSnapshots {
    /// Keeps them in the folder; what an earlier node-svc was making there is removed, its VMMs must have ended. Blocking.
    pub fn open(folder: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&folder)?;
        for entry in fs::read_dir(&folder)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(MAKING) {
                fs::remove_dir_all(entry.path())?;
            }
        }
        Ok(Self {
            folder,
            turns: Mutex::default(),
            verified: Arc::default(),
        })
    }

    /// Names what a snapshot is of: files whose names are their digests, a size, what made it, and what runs in it.
    pub fn key(
        files: &[&PathBuf],
        resources: Resources,
        maker: &Maker,
        template: &Template,
    ) -> String {
        let mut hasher = blake3::Hasher::new();
        for file in files {
            let name = file.file_name().unwrap_or_default();
            hasher.update(name.as_encoded_bytes());
            hasher.update(b"\n");
        }
        let rest = format!(
            "{} {} {}\n{maker}",
            resources.vcpus, resources.memory_bytes, resources.disk_bytes
        );
        hasher.update(rest.as_bytes());
        if let Some(start) = &template.start {
            // What it begins with.
            let env: BTreeMap<_, _> = template.env.iter().collect();
            // And whose: what a program makes up at its start, such as a password, is its team's.
            let rest = format!(
                "\n{:?} {env:?} {:?}\n",
                template.team, template.default_user
            );
            hasher.update(rest.as_bytes());
            hasher.update(&start.encode_to_vec());
        }
        hasher
            .finalize()
            .to_hex()
            .get(..32)
            .unwrap_or_default()
            .to_owned()
    }

    /// Held while a snapshot is looked for and made, so that it is made once.
    pub fn turn(&self, key: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(turns.entry(key.to_owned()).or_default())
    }

    /// A snapshot that is here and whole; a damaged one is removed. The first look reads all of its memory.
    pub async fn find(&self, key: &str, maker: &Maker) -> Result<Option<PathBuf>, StoredError> {
        let folder = self.folder.join(key);
        let verified = Arc::clone(&self.verified);
        let (key, maker) = (key.to_owned(), maker.clone());
        let look = move || {
            let is_known = |verified: &Mutex<HashSet<String>>| {
                let verified = verified.lock().unwrap_or_else(PoisonError::into_inner);
                verified.contains(&key)
            };
            if is_known(&verified) {
                return Ok(Some(folder));
            }
            if !folder.exists() {
                return Ok(None);
            }
            match stored::check(&folder, &maker).and_then(|()| check_memory(&folder)) {
                Ok(()) => {
                    let mut verified = verified.lock().unwrap_or_else(PoisonError::into_inner);
                    verified.insert(key);
                    Ok(Some(folder))
                }
                Err(error) => {
                    tracing::error!(%error, folder = %folder.display(), "a template's snapshot is made anew");
                    stored::remove(&folder)?;
                    Ok(None)
                }
            }
        };
        crate::work::blocking(look)
            .await
            .map_err(io::Error::other)?
    }

    /// Where one is made.
    pub fn making(&self, key: &str) -> PathBuf {
        self.folder.join(format!("{MAKING}{key}"))
    }

    /// An empty folder for a snapshot that is to be made. Whoever tried before has ended.
    pub fn begin(&self, key: &str) -> io::Result<PathBuf> {
        let folder = self.making(key);
        stored::remove(&folder)?;
        fs::create_dir(&folder)?;
        Ok(folder)
    }

    /// What was made is whole: everybody may have it.
    pub async fn publish(&self, key: &str, maker: &Maker) -> Result<PathBuf, StoredError> {
        let (making, folder) = (self.making(key), self.folder.join(key));
        let (maker, to) = (maker.clone(), folder.clone());
        let publish = move || {
            let file = File::options()
                .read(true)
                .write(true)
                .open(making.join(MEMORY))?;
            let hash = dig_and_hash(&file)?;
            fs::write(making.join(MEMORY_HASH), hash)?;
            for leftover in fs::read_dir(&making)? {
                let leftover = leftover?;
                // Of the VMM that made it: its room, its log.
                if leftover.file_type()?.is_dir() {
                    fs::remove_dir_all(leftover.path())?;
                } else if leftover.file_name() == "qemu.log" {
                    fs::remove_file(leftover.path())?;
                }
            }
            stored::publish(&making, &to, &maker)
        };
        crate::work::blocking(publish)
            .await
            .map_err(io::Error::other)??;
        self.verified
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(key.to_owned());
        Ok(folder)
    }
}

fn check_memory(folder: &Path) -> Result<(), StoredError> {
    let wanted = fs::read_to_string(folder.join(MEMORY_HASH))?;
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(folder.join(MEMORY))?)?;
    if hasher.finalize().to_hex().as_str() == wanted {
        Ok(())
    } else {
        Err(StoredError::Damaged("its memory is changed".into()))
    }
}

/// Makes holes of pages that are all zero, and hashes all of it.
fn dig_and_hash(file: &File) -> io::Result<String> {
    let size = file.metadata()?.size();
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; BUFFER];
    let page = usize::try_from(PAGE).map_err(io::Error::other)?;
    let mut at = 0;
    while at < size {
        let length = usize::try_from(size - at).unwrap_or(BUFFER).min(BUFFER);
        let part = buffer.get_mut(..length).unwrap_or_default();
        file.read_exact_at(part, at)?;
        hasher.update(part);
        let mut hole: Option<u64> = None;
        for (page, bytes) in (at..).step_by(page).zip(part.chunks(page)) {
            let is_zero = bytes.iter().all(|byte| *byte == 0);
            match (is_zero, hole) {
                (true, None) => hole = Some(page),
                (false, Some(start)) => {
                    dig(file, start, page)?;
                    hole = None;
                }
                _ => {}
            }
        }
        at += length as u64;
        if let Some(start) = hole {
            dig(file, start, at)?;
        }
    }
    Ok(hasher.finalize().to_hex().to_string())
}

fn dig(file: &File, start: u64, end: u64) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match fallocate(file, flags, start, end - start) {
        // Holes save room; a file system without them works all the same.
        Err(rustix::io::Errno::OPNOTSUPP) => Ok(()),
        done => Ok(done?),
    }
}

#[cfg(test)]
mod tests {
    use proto::template::v1::StartCommand;

    use super::*;

    fn maker() -> Maker {
        Maker {
            vmm: "v".into(),
            cpu: "c".into(),
        }
    }

    #[tokio::test]
    async fn a_snapshot_is_whole_sparse_and_made_anew_when_damaged() {
        let root = tempfile::tempdir().unwrap();
        let snapshots = TemplateSnapshots::open(root.path().join("t")).unwrap();
        let key_of = |template: &Template| {
            let files = [&PathBuf::from("/a/kernel")];
            TemplateSnapshots::key(&files, Resources::default(), &maker(), template)
        };
        let mut template = Template {
            env: [("A".to_owned(), "1".to_owned())].into(),
            ..Template::default()
        };
        let key = key_of(&template);
        assert_eq!(key, key_of(&Template::default()));
        // What runs in it counts, and what that runs in.
        template.start = Some(StartCommand::default());
        let started = key_of(&template);
        template.team = "other".into();
        let others = key_of(&template);
        template.env.clear();
        assert!(started != key && others != started && key_of(&template) != others);
        assert!(snapshots.find(&key, &maker()).await.unwrap().is_none());
        let folder = snapshots.begin(&key).unwrap();
        let mut memory = vec![0; 3 << 20];
        memory[1 << 20] = 1;
        fs::write(folder.join(MEMORY), &memory).unwrap();
        fs::write(folder.join(crate::vmm::DEVICES), "devices").unwrap();
        let made = snapshots.publish(&key, &maker()).await.unwrap();
        assert_eq!(fs::read(made.join(MEMORY)).unwrap(), memory);
        assert!(fs::metadata(made.join(MEMORY)).unwrap().blocks() * 512 <= 64 << 10);

        let later = TemplateSnapshots::open(root.path().join("t")).unwrap();
        assert!(later.find(&key, &maker()).await.unwrap().is_some());
        let file = File::options().write(true).open(made.join(MEMORY)).unwrap();
        file.write_all_at(b"!", 5 << 10).unwrap();
        let later = TemplateSnapshots::open(root.path().join("t")).unwrap();
        assert!(later.find(&key, &maker()).await.unwrap().is_none());
        assert!(!made.exists());
    }

    #[test]
    fn what_is_unfinished_goes() {
        let root = tempfile::tempdir().unwrap();
        let snapshots = TemplateSnapshots::open(root.path().to_owned()).unwrap();
        let folder = snapshots.begin("k").unwrap();
        fs::write(folder.join(MEMORY), "x").unwrap();
        TemplateSnapshots::open(root.path().to_owned()).unwrap();
        assert!(!folder.exists());
    }
}
