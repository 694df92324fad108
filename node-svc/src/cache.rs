//! What a node keeps of templates, within one bound: files (`artifacts/`) and snapshots (`t/`). What was used longest ago goes first.
//!
//! ```text
//!  make_room --> is fetched or made, hidden --> gets its name, added --> is pinned, used, ... --> hidden again --> removed
//! ```
//! Nothing goes while somebody holds a [`Pin`] of it, and a start holds some until its guest is restored. Sessions that run or sleep hold none: they have
//! names of their own for what they need of it. What is fetched or made counts with the [`Room`] it was given. What has its own name is whole at any
//! moment, because what goes is renamed first; what an earlier node-svc renamed and did not remove goes when the next one begins.

use std::{
    collections::HashMap,
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::{stored, work};

/// Begins names of what is being removed.
const REMOVING: &str = ".removing-";
/// The disk hears of a use no more often than this: so exactly does the next node-svc know what was used last.
const NOTED: Duration = Duration::from_mins(1);
const WARN_AGAIN: Duration = Duration::from_mins(1);

/// Something that is kept.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Item {
    /// A file that templates are made of, by its digest.
    Artifact(String),
    /// A template's snapshot, by its key.
    Snapshot(String),
}

impl Item {
    fn kind(&self) -> &'static str {
        match self {
            Self::Artifact(_) => "artifact",
            Self::Snapshot(_) => "snapshot",
        }
    }

    fn name(&self) -> &str {
        let (Self::Artifact(name) | Self::Snapshot(name)) = self;
        name
    }
}

/// What this node keeps, and how much it is.
#[derive(Debug)]
pub struct Cache {
    artifacts: PathBuf,
    snapshots: PathBuf,
    bound: u64,
    ledger: Mutex<Ledger>,
    /// Something may go now.
    too_much: Notify,
}

#[derive(Debug, Default)]
struct Ledger {
    kept: HashMap<Item, Kept>,
    /// The sum of all that is kept.
    bytes: u64,
    /// The sum of all [`Room`]s.
    expected: u64,
    /// Also of what is not there yet.
    pins: HashMap<Item, usize>,
    warned: Option<Instant>,
}

#[derive(Debug)]
struct Kept {
    /// As blocks: memory is full of holes.
    bytes: u64,
    used: SystemTime,
    /// What the disk knows of that.
    noted: SystemTime,
}

/// Something that goes, under its hidden name.
struct Evicted {
    item: Item,
    bytes: u64,
    hidden: PathBuf,
}

/// Keeps something where it is, or will be, until it is dropped.
#[derive(Debug, Clone)]
#[must_use]
pub struct Pin {
    _held: Arc<Held>,
}

#[derive(Debug)]
struct Held {
    cache: Arc<Cache>,
    item: Item,
}

/// Counts for what is not there yet; to be dropped before that is [`Cache::added`], or it counts twice.
#[derive(Debug)]
#[must_use]
pub struct Room {
    cache: Arc<Cache>,
    bytes: u64,
}

impl Cache {
    /// Counts what is in both folders, and removes what is half removed. Blocking.
    pub fn open(artifacts: PathBuf, snapshots: PathBuf, bound: u64) -> io::Result<Self> {
        let mut ledger = Ledger::default();
        ledger.count(&artifacts, Item::Artifact)?;
        ledger.count(&snapshots, Item::Snapshot)?;
        ledger.tell();
        tracing::info!(
            bytes = ledger.bytes,
            bound,
            "what is kept of templates was counted"
        );
        let cache = Self {
            artifacts,
            snapshots,
            bound,
            ledger: Mutex::new(ledger),
            too_much: Notify::new(),
        };
        cache.look(&cache.ledger());
        Ok(cache)
    }

    /// The bound where nobody says another: half of the file system that the folder is on.
    pub fn usual_bound(folder: &Path) -> io::Result<u64> {
        let system = rustix::fs::statvfs(folder)?;
        Ok(system.f_blocks.saturating_mul(system.f_frsize) / 2)
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn folder(&self, item: &Item) -> &Path {
        match item {
            Item::Artifact(_) => &self.artifacts,
            Item::Snapshot(_) => &self.snapshots,
        }
    }

    fn path(&self, item: &Item) -> PathBuf {
        self.folder(item).join(item.name())
    }

    /// Whoever is about to use something pins it before looking whether it is there.
    pub fn pin(self: &Arc<Self>, item: Item) -> Pin {
        let now = SystemTime::now();
        let mut ledger = self.ledger();
        *ledger.pins.entry(item.clone()).or_default() += 1;
        let kept = ledger.kept.get_mut(&item);
        let is_to_note = kept.is_some_and(|kept| {
            kept.used = now;
            // A clock that was put back counts as a long time.
            let is_late = now
                .duration_since(kept.noted)
                .map_or(true, |since| since >= NOTED);
            if is_late {
                kept.noted = now;
            }
            is_late
        });
        drop(ledger);
        if is_to_note && let Err(error) = note(&self.path(&item), now) {
            tracing::warn!(%error, ?item, "the next node-svc will not know when this was used");
        }
        Pin {
            _held: Arc::new(Held {
                cache: Arc::clone(self),
                item,
            }),
        }
    }

    /// Removes what has to go before so many more bytes are there. Where nothing may go they are had all the same: a start matters more than the bound.
    pub async fn make_room(self: &Arc<Self>, bytes: u64) -> Room {
        let room = Room {
            cache: Arc::clone(self),
            bytes,
        };
        let fits = {
            let mut ledger = self.ledger();
            ledger.expected += bytes;
            ledger.fits(self.bound)
        };
        if !fits {
            self.shrink().await;
            self.warn_if_above();
        }
        room
    }

    /// Counts what is there under a name, if anything: to be called when that has changed.
    pub fn added(&self, item: &Item) -> io::Result<()> {
        let mut ledger = self.ledger();
        let bytes = match bytes(&self.path(item)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                ledger.forget(item);
                return Ok(());
            }
            counted => counted?,
        };
        let now = SystemTime::now();
        let before = ledger.forget(item);
        let kept = Kept {
            bytes,
            used: now,
            noted: before.map_or(now, |before| before.noted),
        };
        ledger.put(item.clone(), kept);
        self.look(&ledger);
        Ok(())
    }

    /// Removes what is too much as soon as it may go, until shutdown.
    pub async fn keep_small(self: Arc<Self>, shutdown: CancellationToken) {
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = self.too_much.notified() => self.shrink().await,
            }
        }
    }

    fn look(&self, ledger: &Ledger) {
        if !ledger.fits(self.bound) {
            self.too_much.notify_one();
        }
    }

    async fn shrink(self: &Arc<Self>) {
        let cache = Arc::clone(self);
        if let Err(error) = work::blocking(move || cache.shrink_now()).await {
            tracing::error!(%error, "removing what was used longest ago broke off");
        }
    }

    /// Removes what was used longest ago until the rest fits, or none of it may go. Blocking.
    fn shrink_now(&self) {
        let evicted = self.evict();
        for folder in [&self.artifacts, &self.snapshots] {
            let is_in = |evicted: &Evicted| evicted.hidden.parent() == Some(folder);
            if !evicted.iter().any(is_in) {
                continue;
            }
            // A host that crashes finds all of it under its own name, or what is left under the hidden one.
            if let Err(error) = File::open(folder).and_then(|folder| folder.sync_all()) {
                tracing::error!(%error, "what goes is left for the next node-svc to remove");
                return;
            }
        }
        for Evicted {
            item,
            bytes,
            hidden,
        } in evicted
        {
            tracing::info!(kind = item.kind(), name = item.name(), bytes, "evicted");
            metrics::counter!("sandmesh_node_cache_evictions_total", "kind" => item.kind())
                .increment(1);
            if let Err(error) = remove(&hidden) {
                tracing::error!(%error, path = %hidden.display(), "what was evicted is left behind");
            }
        }
    }

    /// Takes names from what is to go. Whoever pins something meanwhile waits, and finds it or does not.
    fn evict(&self) -> Vec<Evicted> {
        let mut ledger = self.ledger();
        let mut may_go: Vec<(SystemTime, Item)> = ledger
            .kept
            .iter()
            .filter(|(item, _)| !ledger.pins.contains_key(item))
            .map(|(item, kept)| (kept.used, item.clone()))
            .collect();
        may_go.sort();
        let mut evicted = Vec::new();
        for (_, item) in may_go {
            if ledger.fits(self.bound) {
                break;
            }
            let hidden = format!("{REMOVING}{}", uuid::Uuid::new_v4().simple());
            let hidden = self.folder(&item).join(hidden);
            match fs::rename(self.path(&item), &hidden) {
                Ok(()) => {
                    let bytes = ledger.forget(&item).map_or(0, |kept| kept.bytes);
                    evicted.push(Evicted {
                        item,
                        bytes,
                        hidden,
                    });
                }
                // It was damaged, and is made anew.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    ledger.forget(&item);
                }
                Err(error) => tracing::error!(%error, ?item, "this cannot be evicted"),
            }
        }
        evicted
    }

    fn warn_if_above(&self) {
        let mut ledger = self.ledger();
        let is_told = |at: Instant| at.elapsed() < WARN_AGAIN;
        if ledger.fits(self.bound) || ledger.warned.is_some_and(is_told) {
            return;
        }
        ledger.warned = Some(Instant::now());
        let (bytes, expected, bound) = (ledger.bytes, ledger.expected, self.bound);
        drop(ledger);
        tracing::warn!(
            bytes,
            expected,
            bound,
            "more of templates is in use at once than --cache allows"
        );
    }
}

impl Ledger {
    fn count(&mut self, folder: &Path, item: fn(String) -> Item) -> io::Result<()> {
        fs::create_dir_all(folder)?;
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with(REMOVING) {
                remove(&path)?;
            } else if !name.starts_with('.') {
                let used = fs::metadata(&path)?.modified()?;
                let kept = Kept {
                    bytes: bytes(&path)?,
                    used,
                    noted: used,
                };
                self.put(item(name.into_owned()), kept);
            }
        }
        Ok(())
    }

    fn fits(&self, bound: u64) -> bool {
        self.bytes.saturating_add(self.expected) <= bound
    }

    /// Of something that is not in it.
    fn put(&mut self, item: Item, kept: Kept) {
        self.bytes += kept.bytes;
        self.kept.insert(item, kept);
        self.tell();
    }

    fn forget(&mut self, item: &Item) -> Option<Kept> {
        let kept = self.kept.remove(item)?;
        self.bytes -= kept.bytes;
        self.tell();
        Some(kept)
    }

    fn tell(&self) {
        metrics::gauge!("sandmesh_node_cache_bytes").set(self.bytes as f64);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut ledger = self.cache.ledger();
        if let Some(count) = ledger.pins.get_mut(&self.item) {
            *count -= 1;
            if *count == 0 {
                ledger.pins.remove(&self.item);
            }
        }
        self.cache.look(&ledger);
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.cache.ledger().expected -= self.bytes;
    }
}

/// What a file, or a folder of files, takes on the disk.
fn bytes(path: &Path) -> io::Result<u64> {
    let metadata = fs::symlink_metadata(path)?;
    if metadata.is_dir() {
        stored::bytes(path)
    } else {
        Ok(metadata.blocks() * 512)
    }
}

/// Its own time is nobody else's: it says when it was used.
fn note(path: &Path, now: SystemTime) -> io::Result<()> {
    match File::open(path).and_then(|file| file.set_modified(now)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn remove(path: &Path) -> io::Result<()> {
    if fs::symlink_metadata(path)?.is_dir() {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);
    const BLOCK: u64 = 4096;

    /// A cache of so many blocks.
    struct World {
        root: TempDir,
        cache: Arc<Cache>,
    }

    fn open(root: &Path, blocks: u64) -> Arc<Cache> {
        let cache = Cache::open(root.join("artifacts"), root.join("t"), blocks * BLOCK);
        Arc::new(cache.unwrap())
    }

    fn artifact(name: &str) -> Item {
        Item::Artifact(name.into())
    }

    fn snapshot(name: &str) -> Item {
        Item::Snapshot(name.into())
    }

    impl World {
        fn new(blocks: u64) -> Self {
            let root = tempfile::tempdir().unwrap();
            let cache = open(root.path(), blocks);
            Self { root, cache }
        }

        /// Makes something of so many blocks: a snapshot of as many files.
        async fn make(&self, item: Item, blocks: u64) -> Item {
            let room = self.cache.make_room(blocks * BLOCK).await;
            put(&self.cache, &item, blocks);
            drop(room);
            self.cache.added(&item).unwrap();
            item
        }

        fn names(&self) -> Vec<String> {
            let folders = ["artifacts", "t"].map(|name| self.root.path().join(name));
            let mut names: Vec<String> = folders
                .iter()
                .flat_map(|folder| fs::read_dir(folder).unwrap())
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        }

        /// What the ledger says, which is what is there.
        fn blocks(&self) -> u64 {
            let counted = self.cache.ledger().bytes;
            assert_eq!(open(self.root.path(), 0).ledger().bytes, counted);
            counted / BLOCK
        }
    }

    fn put(cache: &Cache, item: &Item, blocks: u64) {
        let path = cache.path(item);
        let write = |path: &Path, blocks: u64| {
            let file = File::create(path).unwrap();
            let bytes = vec![1; (blocks * BLOCK) as usize];
            std::os::unix::fs::FileExt::write_all_at(&file, &bytes, 0).unwrap();
            file.sync_all().unwrap();
        };
        match item {
            Item::Artifact(_) => write(&path, blocks),
            Item::Snapshot(_) => {
                fs::create_dir(&path).unwrap();
                (0..blocks).for_each(|number| write(&path.join(number.to_string()), 1));
            }
        }
    }

    #[tokio::test]
    async fn what_was_used_longest_ago_goes_first_also_after_a_restart() {
        let mut world = World::new(10);
        let a = world.make(artifact("a"), 3).await;
        let b = world.make(snapshot("b"), 3).await;
        world.make(artifact("c"), 3).await;
        let long_ago = SystemTime::now() - 3 * NOTED;
        for (item, minutes) in [(&a, 0), (&b, 1), (&artifact("c"), 2)] {
            let path = world.cache.path(item);
            note(&path, long_ago + minutes * NOTED / 2).unwrap();
        }
        // The next one knows what this one noted.
        world.cache = open(world.root.path(), 10);
        drop(world.cache.pin(a));
        world.cache = open(world.root.path(), 10);
        world.make(snapshot("d"), 3).await;
        assert_eq!(world.names(), ["a", "c", "d"]);
        world.make(artifact("e"), 6).await;
        assert_eq!(world.names(), ["d", "e"]);
        assert_eq!(world.blocks(), 9);
        drop(world.cache.pin(snapshot("d")));
        world.make(artifact("f"), 1).await;
        world.make(artifact("g"), 1).await;
        assert_eq!(world.names(), ["d", "f", "g"]);
    }

    #[tokio::test]
    async fn what_is_pinned_stays_and_goes_when_nobody_needs_it() {
        let world = World::new(4);
        let pin = world.cache.pin(snapshot("a"));
        world.make(snapshot("a"), 3).await;
        let second = pin.clone();
        world.make(artifact("b"), 3).await;
        assert_eq!(world.names(), ["a", "b"], "it is there, above the bound");
        assert!(world.cache.ledger().warned.is_some());
        let shutdown = CancellationToken::new();
        let keep = tokio::spawn(Arc::clone(&world.cache).keep_small(shutdown.clone()));
        drop(pin);
        // Of the two, the one that may go.
        wait(|| world.names() == ["a"]).await;
        let c = world.cache.pin(artifact("c"));
        world.make(artifact("c"), 3).await;
        assert_eq!(world.names(), ["a", "c"]);
        drop(second);
        wait(|| world.names() == ["c"]).await;
        assert_eq!(world.blocks(), 3);
        drop(c);
        shutdown.cancel();
        keep.await.unwrap();
        assert!(world.cache.ledger().pins.is_empty());
        assert_eq!(world.cache.ledger().expected, 0);
    }

    async fn wait(mut done: impl FnMut() -> bool) {
        let look = async {
            while !done() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(LIMIT, look).await.unwrap();
    }

    #[tokio::test]
    async fn what_is_half_removed_goes_and_what_is_half_there_is_not_counted() {
        let mut world = World::new(10);
        world.make(artifact("a"), 1).await;
        put(&world.cache, &snapshot(".removing-1"), 2);
        put(&world.cache, &artifact(".removing-2"), 2);
        put(&world.cache, &snapshot(".making-b"), 2);
        put(&world.cache, &artifact(".incoming-c"), 2);
        world.cache = open(world.root.path(), 10);
        assert_eq!(world.names(), [".incoming-c", ".making-b", "a"]);
        assert_eq!(world.cache.ledger().bytes, BLOCK);
        // One that somebody else removed is counted no more, and is nobody's room.
        fs::remove_file(world.cache.path(&artifact("a"))).unwrap();
        world.cache.added(&artifact("a")).unwrap();
        assert_eq!(world.cache.ledger().bytes, 0);
        world.make(artifact("d"), 5).await;
        fs::remove_file(world.cache.path(&artifact("d"))).unwrap();
        world.make(artifact("e"), 6).await;
        assert_eq!(world.blocks(), 6);
    }

    #[tokio::test]
    async fn a_smaller_bound_holds_from_the_next_start_on() {
        let mut world = World::new(10);
        for name in ["a", "b", "c"] {
            world.make(artifact(name), 3).await;
        }
        world.cache = open(world.root.path(), 5);
        let shutdown = CancellationToken::new();
        let keep = tokio::spawn(Arc::clone(&world.cache).keep_small(shutdown.clone()));
        wait(|| world.names() == ["c"]).await;
        shutdown.cancel();
        keep.await.unwrap();
    }

    /// Many that make room, make, use and drop at once: what is pinned and there stays until it is not, and in the end all fits.
    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn many_at_once_lose_nothing_they_use() {
        let world = Arc::new(World::new(12));
        let mut tasks = tokio::task::JoinSet::new();
        let turns: Arc<[tokio::sync::Mutex<()>; 10]> = Arc::default();
        for task in 0..8_usize {
            let (world, turns) = (Arc::clone(&world), Arc::clone(&turns));
            tasks.spawn(async move {
                for round in 0..40_usize {
                    let number = (task * 7 + round * 3) % 10;
                    let item = match number % 2 {
                        0 => artifact(&number.to_string()),
                        _ => snapshot(&number.to_string()),
                    };
                    let _pin = world.cache.pin(item.clone());
                    let path = world.cache.path(&item);
                    // As those that fetch and make do, once for all.
                    let turn = turns[number].lock().await;
                    if !path.exists() {
                        world.make(item.clone(), 1 + number as u64 % 3).await;
                    }
                    drop(turn);
                    for _ in 0..3 {
                        tokio::task::yield_now().await;
                        assert_eq!(bytes(&path).unwrap() / BLOCK, 1 + number as u64 % 3);
                    }
                }
            });
        }
        while let Some(done) = tasks.join_next().await {
            done.unwrap();
        }
        world.cache.shrink().await;
        assert!((1..=12).contains(&world.blocks()), "{}", world.blocks());
        let ledger = world.cache.ledger();
        assert!(ledger.pins.is_empty());
        assert_eq!(ledger.expected, 0);
    }

    #[tokio::test]
    async fn rooms_are_counted_before_anything_is_in_them() {
        let world = World::new(10);
        world.make(artifact("a"), 4).await;
        world.make(artifact("b"), 4).await;
        let first = world.cache.make_room(2 * BLOCK).await;
        assert_eq!(world.names(), ["a", "b"]);
        let second = world.cache.make_room(2 * BLOCK).await;
        assert_eq!(world.names(), ["b"], "both have their room");
        drop((first, second));
        world.make(artifact("c"), 6).await;
        assert_eq!(world.names(), ["b", "c"]);
    }

    #[test]
    fn the_usual_bound_is_half_of_the_disk() {
        let root = tempfile::tempdir().unwrap();
        let bound = Cache::usual_bound(root.path()).unwrap();
        let system = rustix::fs::statvfs(root.path()).unwrap();
        assert!(bound > 0 && bound < system.f_blocks * system.f_frsize);
    }
}
