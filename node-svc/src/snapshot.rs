//! Snapshots of templates on this node: a guest that booted, waits at its gate and belongs to nobody yet; a start command is ready in it. Every session of the same
//! template and size is restored from one of them, and maps its memory privately, so that what is not written is there once.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs::{self, File},
    io,
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use prost::Message as _;
use proto::{
    node::v1::MakeTemplateSnapshotRequest, session::v1::Resources, template::v1::Template,
};
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

/// Where a snapshot comes from: an encoded [`Origin`].
const ORIGIN: &str = "origin.pb";
/// Of a template and its environment, encoded.
const LARGEST_ORIGIN: u64 = 4 << 20;

/// What a snapshot is of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotOf {
    /// All of it.
    pub key: String,
    /// The same for each envd: one of another envd may serve until there is one of this.
    pub lineage: String,
    /// Names the envd in it.
    pub envd: String,
}

/// One that is whole.
#[derive(Debug, Clone)]
pub struct TemplateSnapshot {
    /// What it is of.
    pub key: String,
    /// Its files.
    pub folder: PathBuf,
    /// Names the envd in it.
    pub envd: String,
}

/// How to make a snapshot anew when there is another envd.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Origin {
    /// As in [`SnapshotOf`].
    #[prost(string, tag = "1")]
    lineage: String,
    #[prost(string, tag = "2")]
    envd: String,
    /// Of what, and for sessions of which size.
    #[prost(message, optional, tag = "3")]
    request: Option<MakeTemplateSnapshotRequest>,
}

impl Origin {
    /// Of a snapshot that is made for this request.
    pub fn new(of: &SnapshotOf, template: &Template, resources: Resources) -> Self {
        Self {
            lineage: of.lineage.clone(),
            envd: of.envd.clone(),
            request: Some(MakeTemplateSnapshotRequest {
                template: Some(template.clone()),
                resources: Some(resources),
            }),
        }
    }

    /// Notes it beside what is made in this folder. Blocking.
    pub fn write(&self, folder: &Path) -> io::Result<()> {
        fs::write(folder.join(ORIGIN), self.encode_to_vec())
    }

    /// Of a snapshot; none of one that an older node-svc has made. Blocking.
    fn read(folder: &Path) -> Option<Self> {
        let path = folder.join(ORIGIN);
        let size = fs::metadata(&path).ok()?.len();
        let bytes = fs::read(path).ok().filter(|_| size <= LARGEST_ORIGIN)?;
        Self::decode(bytes.as_slice()).ok()
    }
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
        if !template.kernel_arguments.is_empty() {
            let rest = format!("\nkernel arguments {:?}\n", template.kernel_arguments);
            hasher.update(rest.as_bytes());
        }
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

    /// Whether a snapshot is here, whole or damaged.
    pub fn is_here(&self, key: &str) -> bool {
        self.folder.join(key).exists()
    }

    /// A snapshot that is here and whole; a damaged one is removed. The first look reads all of its memory. Whoever looks has pinned it.
    pub async fn find(&self, key: &str, maker: &Maker) -> Result<Option<PathBuf>, StoredError> {
        let folder = self.folder.join(key);
        let verified = Arc::clone(&self.verified);
        let (key, maker) = (key.to_owned(), maker.clone());
        let look = move || {
            let is_known = |verified: &Mutex<HashSet<String>>| {
                let verified = verified.lock().unwrap_or_else(PoisonError::into_inner);
                verified.contains(&key)
            };
            if !folder.exists() {
                // It went because there was no room for it.
                let mut verified = verified.lock().unwrap_or_else(PoisonError::into_inner);
                verified.remove(&key);
                return Ok(None);
            }
            if is_known(&verified) {
                return Ok(Some(folder));
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

    /// Those of the same lineage with another envd, the newest first, whole or damaged.
    pub async fn others(&self, of: &SnapshotOf) -> Vec<TemplateSnapshot> {
        let (all, wanted) = (self.folder.clone(), of.clone());
        let look = move || {
            let mut found = Vec::new();
            for (key, folder) in whole(&all)? {
                // One that goes meanwhile is none.
                let made = fs::metadata(folder.join(ORIGIN)).and_then(|it| it.modified());
                let origin = Origin::read(&folder).filter(|it| it.lineage == wanted.lineage);
                if let (Some(Origin { envd, .. }), Ok(made)) = (origin, made)
                    && key != wanted.key
                {
                    found.push((made, TemplateSnapshot { key, folder, envd }));
                }
            }
            found.sort_by_key(|(made, _)| std::cmp::Reverse(*made));
            Ok::<_, io::Error>(found.into_iter().map(|(_, snapshot)| snapshot).collect())
        };
        let looked = crate::work::blocking(look).await.map_err(io::Error::other);
        looked.and_then(|looked| looked).unwrap_or_else(|error| {
            tracing::error!(%error, "snapshots with an earlier envd are not found");
            Vec::new()
        })
    }

    /// What was made with another envd than this, or by another VMM or CPU, used since then, and not made anew yet: how to do so. Blocking.
    pub fn outdated(
        &self,
        envd: &str,
        maker: &Maker,
        since: SystemTime,
    ) -> io::Result<Vec<MakeTemplateSnapshotRequest>> {
        let mut outdated = Vec::new();
        let mut renewed = HashSet::new();
        for (_, folder) in whole(&self.folder)? {
            // One that goes meanwhile is none.
            let used = fs::metadata(&folder).and_then(|it| it.modified());
            let (Some(origin), Ok(used)) = (Origin::read(&folder), used) else {
                continue;
            };
            if origin.envd == envd && stored::is_made_by(&folder, maker) {
                renewed.insert(origin.lineage);
            } else if used >= since {
                outdated.push(origin);
            }
        }
        outdated.retain(|origin| !renewed.contains(&origin.lineage));
        Ok(outdated
            .into_iter()
            .filter_map(|origin| origin.request)
            .collect())
    }

    /// Removes one. Sessions that were restored from it have their own names for what they need of it.
    pub async fn discard(&self, key: &str) -> io::Result<()> {
        self.verified
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(key);
        let folder = self.folder.join(key);
        crate::work::blocking(move || stored::remove(&folder))
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

/// The snapshots of a folder that are no longer being made, by their keys. Blocking.
fn whole(folder: &Path) -> io::Result<Vec<(String, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().into_string().unwrap_or_default();
        if !name.is_empty() && !name.starts_with('.') {
            found.push((name, entry.path()));
        }
    }
    Ok(found)
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
        // What its kernel is told counts.
        let told = key_of(&Template {
            kernel_arguments: "quiet".into(),
            ..Template::default()
        });
        assert_ne!(key, told);
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
        // One that went is not known any more, and another in its place is looked at.
        let elsewhere = root.path().join("elsewhere");
        fs::rename(&made, &elsewhere).unwrap();
        assert!(snapshots.find(&key, &maker()).await.unwrap().is_none());
        assert!(snapshots.verified.lock().unwrap().is_empty());
        fs::rename(&elsewhere, &made).unwrap();
        assert!(snapshots.find(&key, &maker()).await.unwrap().is_some());

        let later = TemplateSnapshots::open(root.path().join("t")).unwrap();
        assert!(later.find(&key, &maker()).await.unwrap().is_some());
        let file = File::options().write(true).open(made.join(MEMORY)).unwrap();
        file.write_all_at(b"!", 5 << 10).unwrap();
        let later = TemplateSnapshots::open(root.path().join("t")).unwrap();
        assert!(later.find(&key, &maker()).await.unwrap().is_none());
        assert!(!made.exists());
    }

    #[tokio::test]
    async fn one_with_another_envd_is_found_by_its_lineage() {
        let root = tempfile::tempdir().unwrap();
        let snapshots = TemplateSnapshots::open(root.path().to_owned()).unwrap();
        let of = |key: &str, envd: &str| SnapshotOf {
            key: key.into(),
            lineage: "l".into(),
            envd: envd.into(),
        };
        let template = Template {
            name: "t".into(),
            ..Template::default()
        };
        for (key, envd) in [("1", "a"), ("2", "b")] {
            let folder = snapshots.begin(key).unwrap();
            fs::write(folder.join(MEMORY), "memory").unwrap();
            fs::write(folder.join(crate::vmm::DEVICES), "devices").unwrap();
            let origin = Origin::new(&of(key, envd), &template, Resources::default());
            origin.write(&folder).unwrap();
            snapshots.publish(key, &maker()).await.unwrap();
        }
        let newest = fs::File::open(root.path().join("2").join(ORIGIN)).unwrap();
        let later = SystemTime::now() + std::time::Duration::from_secs(1);
        newest.set_modified(later).unwrap();
        let found = snapshots.others(&of("3", "c")).await;
        let keys = |found: &[TemplateSnapshot]| {
            let keys = found.iter().map(|it| format!("{} {}", it.key, it.envd));
            keys.collect::<Vec<_>>()
        };
        assert_eq!(keys(&found), ["2 b", "1 a"]);
        assert_eq!(keys(&snapshots.others(&of("2", "b")).await), ["1 a"]);
        let stranger = SnapshotOf {
            lineage: "m".into(),
            ..of("3", "c")
        };
        assert!(snapshots.others(&stranger).await.is_empty());
        let long_ago = SystemTime::UNIX_EPOCH;
        // There is one with that envd.
        let outdated_for = |envd: &str, since| snapshots.outdated(envd, &maker(), since).unwrap();
        assert!(outdated_for("b", long_ago).is_empty());
        let outdated = outdated_for("c", long_ago);
        assert_eq!(outdated.len(), 2);
        assert_eq!(outdated[0].template.as_ref().unwrap().name, "t");
        let tomorrow = SystemTime::now() + std::time::Duration::from_hours(24);
        assert!(outdated_for("c", tomorrow).is_empty());
        // After an update of the VMM all are another's.
        let update = Maker {
            vmm: "another version".into(),
            ..maker()
        };
        let outdated = snapshots.outdated("b", &update, long_ago);
        assert_eq!(outdated.unwrap().len(), 2);
        snapshots.discard("2").await.unwrap();
        assert!(!snapshots.is_here("2"));
        assert!(snapshots.find("2", &maker()).await.unwrap().is_none());
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
