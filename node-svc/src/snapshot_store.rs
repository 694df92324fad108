//! Snapshots of templates in the object store: what one node has booted, others with the same VMM, CPU and envd restore without booting it.
//!
//! A snapshot is a bundle of the store (`blobs`): memory, devices and disk, under the digest of the root it is of and its key. A node puts one there when no guest starts,
//! and only such as others are likely to want: of the template's own size, or used more than once.

use std::{
    collections::HashMap,
    fs::File,
    io,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use blobs::{Before, BlobError, Blobs, BundleName, Cut, Moved, Part};
use futures::future::BoxFuture;
use prost::Message as _;
use proto::{
    session::v1::Resources,
    template::v1::{StoredSnapshot, Template},
};
use service_kit::templates;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    stored::{Maker, SCRATCH},
    vmm::{DEVICES, MEMORY},
    work,
};

/// Memory and disk are cut at fixed places: their pages and blocks do not move.
const PIECE: usize = 256 << 10;
/// Of a whole snapshot; one that does not come in time is booted.
const FETCH_LIMIT: Duration = Duration::from_secs(30);
/// Of the question whether it is there, with all that is tried again.
const ASK_LIMIT: Duration = Duration::from_secs(3);
/// A store that did not answer is not asked again for so long: starts do not wait for it.
const AWAY: Duration = Duration::from_mins(1);
/// Of putting one there; for longer its first chunks might not stay.
const KEEP_LIMIT: Duration = Duration::from_hours(12);
/// To be raised when the devices of guests change, so that no snapshot with others is fetched.
const LAYOUT: u32 = 1;
const KEY: usize = 32;
/// Of memory and disk: what is more stays on its node.
const LARGEST: u64 = 32 << 30;
/// Of what a VMM says of its devices.
const MOST_DEVICES: u64 = 64 << 20;
/// Between two looks whether it is there still, and noted to be of use.
const LOOK_AGAIN: Duration = Duration::from_hours(24);
/// After a failure.
const TRY_AGAIN: Duration = Duration::from_hours(1);
/// Uses of so many snapshots are counted.
const MOST_KNOWN: usize = 10_000;

/// A snapshot did not come from the store.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The store, or what is there.
    #[error("{0}")]
    Blobs(#[from] BlobError),
    /// A file of it is missing, or of another size than this snapshot has.
    #[error("{0} is not what this snapshot has")]
    Other(&'static str),
    /// The node's disk.
    #[error("{0}")]
    Disk(#[from] io::Error),
    /// It takes too long.
    #[error("it did not come in time")]
    Late,
}

/// What is stored.
#[derive(Debug, Clone)]
pub struct StoredAs {
    name: BundleName,
    of: String,
    team: String,
    envd: String,
    resources: Resources,
    is_usual: bool,
}

impl StoredAs {
    /// The snapshot of that key on a host; none if no node but this one will want it, as of what builds use between them, or what is too large.
    pub fn new(
        host: &str,
        key: &str,
        template: &Template,
        resources: Resources,
        envd: &str,
    ) -> Option<Self> {
        let rootfs = template.rootfs.as_ref()?;
        let is_too_large = resources.memory_bytes.saturating_add(resources.disk_bytes) > LARGEST;
        if is_too_large || templates::is_hidden(&template.name) {
            return None;
        }
        // What a guest saw of its CPU it goes on with: the key says less of that than restoring elsewhere takes.
        let key = blake3::hash(format!("{key}\n{host}\n{LAYOUT}").as_bytes()).to_hex();
        let team = match &template.start {
            Some(_) => template.team.clone(),
            None => String::new(),
        };
        Some(Self {
            name: BundleName::new(&rootfs.digest, key.get(..KEY)?)?,
            of: templates::snapshot_of(template),
            team,
            envd: envd.to_owned(),
            resources,
            is_usual: resources.vcpus == template.default_vcpus
                && resources.memory_bytes == template.default_memory_bytes
                && resources.disk_bytes == template.default_disk_bytes,
        })
    }

    fn about(&self, maker: &Maker, parts: &[Part]) -> StoredSnapshot {
        StoredSnapshot {
            of: self.of.clone(),
            team: self.team.clone(),
            vmm: maker.vmm.clone(),
            cpu: maker.cpu.clone(),
            envd: self.envd.clone(),
            vcpus: self.resources.vcpus,
            memory_bytes: self.resources.memory_bytes,
            disk_bytes: self.resources.disk_bytes,
            create_time: Some(SystemTime::now().into()),
            use_time: None,
            size_bytes: parts.iter().map(Part::bytes).sum(),
            stored_bytes: parts.iter().map(|part| part.new_bytes).sum(),
        }
    }
}

/// What is known of one.
#[derive(Debug)]
struct Known {
    uses: u64,
    /// When it is looked at next.
    due: Instant,
    /// It was here and could not be loaded.
    is_bad: bool,
}

impl Known {
    fn new() -> Self {
        Self {
            uses: 0,
            due: Instant::now(),
            is_bad: false,
        }
    }
}

/// Puts snapshots into the store, and fetches them.
#[derive(Debug)]
pub struct SnapshotStore {
    blobs: Blobs,
    /// Says which hosts can load what this one has stored.
    host: String,
    known: Mutex<HashMap<BundleName, Known>>,
    away_until: Mutex<Option<Instant>>,
    /// One at a time: guests that run have the CPUs.
    turn: tokio::sync::Mutex<()>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl SnapshotStore {
    /// Of that object store, on a host that says what its CPU is.
    pub fn new(blobs: Blobs, host: String) -> Self {
        Self {
            blobs,
            host,
            known: Mutex::default(),
            away_until: Mutex::default(),
            turn: tokio::sync::Mutex::default(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        }
    }

    /// What its CPU is.
    pub fn host(&self) -> &str {
        &self.host
    }

    fn away_until(&self) -> MutexGuard<'_, Option<Instant>> {
        self.away_until
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn known(&self) -> MutexGuard<'_, HashMap<BundleName, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a use of a snapshot that is on this node; whether it is time to see to it that it is in the store. Then it is the caller's to do so.
    fn is_due(&self, stored: &StoredAs) -> bool {
        let now = Instant::now();
        let mut known = self.known();
        if known.len() >= MOST_KNOWN && !known.contains_key(&stored.name) {
            known.retain(|_, known| known.due > now);
            if known.len() >= MOST_KNOWN {
                return false;
            }
        }
        let known = known.entry(stored.name.clone()).or_insert_with(Known::new);
        known.uses += 1;
        let is_due =
            known.due <= Instant::now() && (stored.is_usual || known.uses > 1) && !known.is_bad;
        if is_due {
            known.due = now + LOOK_AGAIN;
        }
        is_due
    }

    /// Sees to it, some time, that a snapshot of this node that is used is in the store, and stays there. `quiet` is awaited before anything that takes CPU.
    pub fn used(
        self: &Arc<Self>,
        stored: StoredAs,
        folder: PathBuf,
        maker: Maker,
        quiet: impl Fn() -> BoxFuture<'static, ()> + Send + Sync + 'static,
    ) {
        if self.stop.is_cancelled() || !self.is_due(&stored) {
            return;
        }
        let store = Arc::clone(self);
        self.tasks.spawn(async move {
            let keep = store.keep(&stored, &folder, &maker, &quiet);
            let kept = tokio::select! {
                kept = tokio::time::timeout(KEEP_LIMIT, keep) => kept,
                () = store.stop.cancelled() => return,
            };
            let kept = kept.unwrap_or(Err(FetchError::Late));
            if let Err(error) = kept {
                tracing::warn!(snapshot = %stored.name, %error, "a snapshot is not in the store; it is tried again later");
                if let Some(known) = store.known().get_mut(&stored.name) {
                    known.due = Instant::now() + TRY_AGAIN;
                }
            }
        });
    }

    async fn keep(
        &self,
        stored: &StoredAs,
        folder: &Path,
        maker: &Maker,
        quiet: &Before<'_>,
    ) -> Result<(), FetchError> {
        let name = &stored.name;
        let is_there = match self.blobs.use_bundle(name).await {
            // It is put there anew.
            Err(BlobError::Damaged(_)) => false,
            found => found?,
        };
        if is_there {
            return Ok(());
        }
        let _turn = self.turn.lock().await;
        // Open at once: the snapshot may go meanwhile.
        let folder = folder.to_owned();
        let files = work::blocking(move || {
            [MEMORY, DEVICES, SCRATCH]
                .into_iter()
                .map(|name| Ok((name, File::open(folder.join(name))?)))
                .collect::<io::Result<Vec<_>>>()
        });
        let mut parts = Vec::new();
        let mut sum = Moved::default();
        for (part, file) in files.await.map_err(io::Error::other)?? {
            let put = self.blobs.put_part(part, file, Cut::Every(PIECE), quiet);
            let (part, moved) = put.await?;
            parts.push(part);
            sum += moved;
        }
        // No other node would have it.
        parts_of(&parts, stored.resources)?;
        let about = stored.about(maker, &parts).encode_to_vec();
        self.blobs.put_bundle(name, about, parts).await?;
        metrics::counter!("sandmesh_node_snapshots_stored_total").increment(1);
        tracing::info!(
            snapshot = %name,
            bytes = sum.bytes,
            moved_bytes = sum.moved_bytes,
            "a template's snapshot is in the store"
        );
        Ok(())
    }

    /// Fetches a snapshot into an empty folder; whether it is in the store. What is left in the folder after an error is of no use.
    pub async fn fetch(
        self: &Arc<Self>,
        stored: &StoredAs,
        folder: &Path,
    ) -> Result<bool, FetchError> {
        let is_bad = |known: &Known| known.is_bad;
        let now = Instant::now();
        if self.known().get(&stored.name).is_some_and(is_bad)
            || self.away_until().is_some_and(|until| now < until)
        {
            return Ok(false);
        }
        let fetched = tokio::time::timeout(FETCH_LIMIT, self.fetch_now(stored, folder));
        let fetched = fetched.await.unwrap_or(Err(FetchError::Late));
        match &fetched {
            Err(
                FetchError::Blobs(BlobError::Damaged(_) | BlobError::Missing(_))
                | FetchError::Other(_),
            ) => {
                // What is booted in its place is put there.
                self.remove(stored);
            }
            Err(FetchError::Blobs(BlobError::Store(_)) | FetchError::Late) => {
                *self.away_until() = Some(Instant::now() + AWAY);
            }
            _ => {}
        }
        fetched
    }

    /// Notes that one was here, whole, and could not be loaded: this node makes its own, and nobody is to have this one.
    pub fn distrust(self: &Arc<Self>, stored: &StoredAs) {
        let name = stored.name.clone();
        let mut known = self.known();
        known.entry(name).or_insert_with(Known::new).is_bad = true;
        drop(known);
        self.remove(stored);
    }

    /// Starts do not wait for it.
    fn remove(self: &Arc<Self>, stored: &StoredAs) {
        let (store, stored) = (Arc::clone(self), stored.clone());
        self.tasks.spawn(async move {
            if let Err(error) = store.blobs.remove_bundle(&stored.name).await {
                tracing::warn!(snapshot = %stored.name, %error, "a snapshot that is of no use stays in the store");
            }
            if let Some(known) = store.known().get_mut(&stored.name) {
                known.due = Instant::now();
            }
        });
    }

    async fn fetch_now(&self, stored: &StoredAs, folder: &Path) -> Result<bool, FetchError> {
        let asked = tokio::time::timeout(ASK_LIMIT, self.blobs.bundle(&stored.name)).await;
        let Some(bundle) = asked.map_err(|_| FetchError::Late)?? else {
            return Ok(false);
        };
        let mut sum = Moved::default();
        for (name, part) in parts_of(&bundle.parts, stored.resources)? {
            let path = folder.join(name);
            let file = work::blocking(move || {
                File::options()
                    .read(true)
                    .write(true)
                    .create_new(true)
                    .open(path)
            });
            let file = file.await.map_err(io::Error::other)??;
            sum += self.blobs.get_part(part, file).await?;
        }
        metrics::counter!("sandmesh_node_snapshots_fetched_total").increment(1);
        tracing::info!(
            snapshot = %stored.name,
            bytes = sum.bytes,
            moved_bytes = sum.moved_bytes,
            "a template's snapshot is fetched from the store"
        );
        Ok(true)
    }

    /// Gives up what is being stored, and waits until nothing of it runs.
    pub async fn stop(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

/// The files that a snapshot of that size has, by their names.
fn parts_of(
    parts: &[Part],
    resources: Resources,
) -> Result<[(&'static str, &Part); 3], FetchError> {
    let Resources {
        memory_bytes,
        disk_bytes,
        ..
    } = resources;
    let of = |name: &'static str, sizes: RangeInclusive<u64>| {
        let part = parts.iter().find(|part| part.name == name);
        let part = part.filter(|part| sizes.contains(&part.bytes()));
        part.map(|part| (name, part)).ok_or(FetchError::Other(name))
    };
    Ok([
        of(DEVICES, 1..=MOST_DEVICES)?,
        of(SCRATCH, disk_bytes..=disk_bytes)?,
        of(MEMORY, memory_bytes..=memory_bytes)?,
    ])
}

#[cfg(test)]
mod tests {
    use std::fs;

    use object_store::memory::InMemory;
    use proto::template::v1::Artifact;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn template() -> Template {
        Template {
            name: "t".into(),
            rootfs: Some(Artifact {
                digest: "ab".repeat(32),
                size_bytes: 1,
            }),
            default_vcpus: 1,
            default_memory_bytes: MIB,
            default_disk_bytes: 2 * MIB,
            ..Template::default()
        }
    }

    fn size(vcpus: u32) -> Resources {
        Resources {
            vcpus,
            memory_bytes: MIB,
            disk_bytes: 2 * MIB,
        }
    }

    fn maker() -> Maker {
        Maker {
            vmm: "v".into(),
            cpu: "c".into(),
        }
    }

    fn usual() -> StoredAs {
        StoredAs::new("h", "0a", &template(), size(1), "e").unwrap()
    }

    fn snapshot(folder: &Path, memory: &[u8]) {
        fs::create_dir_all(folder).unwrap();
        fs::write(folder.join(MEMORY), memory).unwrap();
        fs::write(folder.join(DEVICES), "devices").unwrap();
        let disk = File::create(folder.join(SCRATCH)).unwrap();
        disk.set_len(2 * MIB).unwrap();
    }

    async fn stored(store: &Arc<SnapshotStore>, folder: &Path) {
        store.used(usual(), folder.to_owned(), maker(), || Box::pin(async {}));
        settled(store).await;
    }

    async fn settled(store: &SnapshotStore) {
        store.tasks.close();
        store.tasks.wait().await;
        store.tasks.reopen();
    }

    #[tokio::test]
    async fn what_a_node_has_booted_another_one_fetches() {
        let root = tempfile::tempdir().unwrap();
        let blobs = Blobs::of(Arc::new(InMemory::new()));
        let store = Arc::new(SnapshotStore::new(blobs.clone(), "h".into()));
        let made = root.path().join("made");
        let mut memory = vec![0; MIB as usize];
        memory[12345] = 1;
        snapshot(&made, &memory);
        let fetched = root.path().join("fetched");
        fs::create_dir(&fetched).unwrap();
        assert!(!store.fetch(&usual(), &fetched).await.unwrap());
        stored(&store, &made).await;
        assert!(store.fetch(&usual(), &fetched).await.unwrap());
        assert_eq!(fs::read(fetched.join(MEMORY)).unwrap(), memory);
        assert_eq!(fs::read(fetched.join(DEVICES)).unwrap(), b"devices");
        assert_eq!(fs::metadata(fetched.join(SCRATCH)).unwrap().len(), 2 * MIB);
        let listed = blobs.bundles(&"ab".repeat(32)).await.unwrap();
        let about = StoredSnapshot::decode(&*listed[0].about).unwrap();
        assert_eq!((about.vmm.as_str(), about.size_bytes), ("v", 3 * MIB + 7));
        assert_eq!(about.of, templates::snapshot_of(&template()));
    }

    #[tokio::test]
    async fn one_of_another_size_is_neither_stored_nor_fetched() {
        let root = tempfile::tempdir().unwrap();
        let blobs = Blobs::of(Arc::new(InMemory::new()));
        let store = Arc::new(SnapshotStore::new(blobs.clone(), "h".into()));
        let made = root.path().join("made");
        snapshot(&made, b"short");
        stored(&store, &made).await;
        let fetched = root.path().join("fetched");
        fs::create_dir(&fetched).unwrap();
        assert!(!store.fetch(&usual(), &fetched).await.unwrap());
        // Somebody else has put it there.
        let file = File::open(made.join(MEMORY)).unwrap();
        let put = blobs.put_part(MEMORY, file, Cut::Every(PIECE), &|| Box::pin(async {}));
        let (part, _) = put.await.unwrap();
        let name = usual().name;
        let put = blobs.put_bundle(&name, Vec::new(), vec![part]);
        put.await.unwrap();
        let refused = store.fetch(&usual(), &fetched).await;
        assert!(matches!(refused, Err(FetchError::Other(DEVICES))));
        settled(&store).await;
        // It is gone, and so the next use stores it.
        assert!(!store.fetch(&usual(), &fetched).await.unwrap());
        snapshot(&made, &vec![1; MIB as usize]);
        stored(&store, &made).await;
        assert!(store.fetch(&usual(), &fetched).await.unwrap());
    }

    #[tokio::test]
    async fn one_that_cannot_be_loaded_is_not_fetched_again() {
        let root = tempfile::tempdir().unwrap();
        let blobs = Blobs::of(Arc::new(InMemory::new()));
        let store = Arc::new(SnapshotStore::new(blobs.clone(), "h".into()));
        let made = root.path().join("made");
        snapshot(&made, &vec![1; MIB as usize]);
        stored(&store, &made).await;
        store.distrust(&usual());
        settled(&store).await;
        assert!(blobs.bundles(&"ab".repeat(32)).await.unwrap().is_empty());
        stored(&store, &made).await;
        assert!(!store.fetch(&usual(), root.path()).await.unwrap());
        // Another CPU has its own.
        let other = StoredAs::new("i", "0a", &template(), size(1), "e").unwrap();
        assert_ne!(other.name, usual().name);
    }

    #[test]
    fn only_what_others_may_want_is_stored_and_not_again_and_again() {
        let store = SnapshotStore::new(Blobs::of(Arc::new(InMemory::new())), "h".into());
        assert!(store.is_due(&usual()));
        assert!(!store.is_due(&usual()));
        // One of another size when it is used again.
        let larger = StoredAs::new("h", "0b", &template(), size(2), "e").unwrap();
        assert!(!store.is_due(&larger));
        assert!(store.is_due(&larger));
        let mut hidden = template();
        hidden.name = templates::hidden(&"0".repeat(64));
        assert!(StoredAs::new("h", "0a", &hidden, size(1), "e").is_none());
        let huge = Resources {
            memory_bytes: LARGEST,
            ..size(1)
        };
        assert!(StoredAs::new("h", "0a", &template(), huge, "e").is_none());
    }
}
