//! Files in an object store, cut into chunks that are named by what they hold: what two files have in common is there once.
//!
//! ```text
//!   chunks/ab/ab12...   a chunk, packed by zstd; its name is the BLAKE3 of what it unpacks to
//!   files/cd/cd34...    of which chunks a file is; its name is the BLAKE3 of the file
//!   snapshots/...       files that belong together, see [`BundleName`]
//! ```
//! A file is there once its list is, which comes last. Chunks are cut where the content says so (FastCDC), so that what is inserted moves the cuts
//! around it only; or at fixed places, for memory, whose pages do not move. What is all zero is listed and not stored.
//!
//! A store is not believed: every chunk is checked when it arrives, and so is the whole file. What fails for a moment is tried again.

mod bundle;
mod cut;
mod sweep;

use std::{
    fmt,
    fs::File,
    io,
    os::unix::fs::FileExt as _,
    path::Path,
    str::FromStr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use backon::{ExponentialBuilder, Retryable as _};
use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, future::BoxFuture, stream};
use object_store::{
    ObjectStore, ObjectStoreExt as _, PutPayload, local::LocalFileSystem, path::Path as Key,
    prefix::PrefixStore,
};
use prost::Message as _;
use tokio::sync::mpsc;
use url::Url;

pub use bundle::{Bundle, BundleName, Part, UNUSED};
pub use cut::Cut;
pub use sweep::Swept;

/// The largest chunk.
const LARGEST: usize = 2 << 20;
/// Bytes of a list: a file of some 100 GiB. Unpacked it takes ten times as much memory at most.
const LARGEST_LIST: u64 = 16 << 20;
/// Of a small file, whatever it is cut into.
const SMALL_LIST: u64 = 64 << 10;
/// Bytes of a file for each of its list, at least.
const PER_BYTE_OF_LIST: u64 = 128;
/// For a call to the store, with all that is tried again.
const LIMIT: Duration = Duration::from_secs(30);
/// Chunks on their way at once, and as many that wait: with what they are packed to 50 MiB.
const AT_ONCE: usize = 8;
const LEVEL: i32 = 3;
/// Of what fails for a moment.
const TRIES: usize = 5;
const FIRST_WAIT: Duration = Duration::from_millis(100);
/// What is not asked for anew is removed no sooner. Whoever finds a chunk there that is half as old writes it again.
pub const GRACE: Duration = Duration::from_hours(48);

/// Why a file cannot be stored, or fetched.
#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    /// The store's address is none.
    #[error("the object store {url}: {why}")]
    Address {
        /// As it was given, without credentials.
        url: String,
        /// What is wrong with it.
        why: String,
    },
    /// It is not there.
    #[error("the object store has no file {0}")]
    Missing(String),
    /// What is there is not what its name says.
    #[error("{0} of the object store is damaged")]
    Damaged(String),
    /// The store fails, again and again.
    #[error("the object store fails: {0}")]
    Store(#[from] object_store::Error),
    /// The disk of this host.
    #[error("{0}")]
    Disk(#[from] io::Error),
}

impl BlobError {
    /// Whether a disk is full, here or in the store.
    pub fn is_full(&self) -> bool {
        let is_full = |error: &io::Error| {
            matches!(
                error.kind(),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
            )
        };
        let mut error: &dyn std::error::Error = self;
        loop {
            if error.downcast_ref().is_some_and(is_full) {
                return true;
            }
            match error.source() {
                Some(source) => error = source,
                None => return false,
            }
        }
    }
}

/// Of which chunks a file is.
#[derive(Clone, PartialEq, prost::Message)]
struct List {
    #[prost(uint64, tag = "1")]
    size: u64,
    #[prost(message, repeated, tag = "2")]
    chunks: Vec<Chunk>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Chunk {
    /// BLAKE3, 32 bytes; none if all of it is zero.
    #[prost(bytes = "bytes", tag = "1")]
    digest: Bytes,
    #[prost(uint32, tag = "2")]
    length: u32,
}

impl List {
    /// Whether it says what lists can say.
    fn is_sound(&self) -> bool {
        let is_sound = |chunk: &Chunk| {
            (chunk.digest.is_empty() || chunk.hash().is_some())
                && (1..=LARGEST).contains(&(chunk.length as usize))
        };
        let lengths = self.chunks.iter().map(|chunk| u64::from(chunk.length));
        lengths.sum::<u64>() == self.size && self.chunks.iter().all(is_sound)
    }
}

impl Chunk {
    fn hash(&self) -> Option<blake3::Hash> {
        blake3::Hash::from_slice(&self.digest).ok()
    }
}

/// Is awaited before something is done.
pub type Before<'a> = dyn Fn() -> BoxFuture<'static, ()> + Send + Sync + 'a;

/// What has become of a file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Moved {
    /// Its size.
    pub bytes: u64,
    /// Its chunks that are not all zero.
    pub chunks: u64,
    /// Of these, chunks that were sent or fetched: the others were there.
    pub moved_chunks: u64,
    /// What was sent or fetched, packed.
    pub moved_bytes: u64,
}

impl std::ops::AddAssign for Moved {
    fn add_assign(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.chunks += other.chunks;
        self.moved_chunks += other.moved_chunks;
        self.moved_bytes += other.moved_bytes;
    }
}

/// Where an object store is: `/folder`, `file:///folder`, `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address(Url);

impl Address {
    /// A folder of this host.
    pub fn of_folder(folder: &Path) -> Result<Self, String> {
        let url = Url::from_directory_path(folder);
        url.map(Self)
            .map_err(|()| "must be an absolute path".into())
    }
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.starts_with('/') {
            return Self::of_folder(Path::new(text));
        }
        let url: Url = text.parse().map_err(|error| format!("{error}"))?;
        match url.scheme() {
            "file" | "s3" | "s3a" | "gs" | "az" | "azure" | "abfs" | "abfss" => Ok(Self(url)),
            other => Err(format!("{other}: is no store: file, s3, gs and az are")),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An object store. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Blobs {
    store: Arc<dyn ObjectStore>,
}

impl Blobs {
    /// By its address. Credentials and such come from the environment, under the names that each of them has (`AWS_ACCESS_KEY_ID`,
    /// `GOOGLE_SERVICE_ACCOUNT`, `AZURE_STORAGE_ACCOUNT_NAME`). A folder is made.
    pub fn open(address: &Address) -> Result<Self, BlobError> {
        let Address(url) = address;
        let failed = |why: String| {
            let mut url = url.clone();
            // Somebody may have put them there.
            let _ = url.set_password(None);
            BlobError::Address {
                url: url.to_string(),
                why,
            }
        };
        if url.scheme() == "file" {
            let folder = url
                .to_file_path()
                .map_err(|()| failed("no folder of this host".into()))?;
            std::fs::create_dir_all(&folder)?;
            let store = LocalFileSystem::new_with_prefix(folder);
            let store = store.map_err(|error| failed(error.to_string()))?;
            return Ok(Self::of(Arc::new(store.with_fsync(true))));
        }
        // Another part of the program may have done so before.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let variables = std::env::vars_os().filter_map(|(name, value)| {
            let name = name.into_string().ok()?.to_ascii_lowercase();
            Some((name, value.into_string().ok()?))
        });
        let (store, prefix) = object_store::parse_url_opts(url, variables)
            .map_err(|error| failed(error.to_string()))?;
        Ok(Self::of(Arc::new(PrefixStore::new(store, prefix))))
    }

    /// Of a store that is there.
    pub fn of(store: Arc<dyn ObjectStore>) -> Self {
        Self { store }
    }

    /// Whether a file is there, all of it.
    pub async fn has(&self, digest: &str) -> Result<bool, BlobError> {
        let key = key("files", digest);
        match self.again(|| self.store.head(&key)).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Stores a file under its digest, in hexadecimal; what is there already is not sent.
    pub async fn put(&self, path: &Path, cut: Cut) -> Result<(String, Moved), BlobError> {
        let (digest, list, moved) = self
            .put_chunks(File::open(path)?, cut, AT_ONCE, &|| {
                Box::pin(std::future::ready(()))
            })
            .await?;
        let payload = PutPayload::from(list.encode_to_vec());
        let key = key("files", &digest);
        self.again(|| self.store.put(&key, payload.clone())).await?;
        Ok((digest, moved))
    }

    /// Stores the chunks of a file, so many at once, and each after `before`; its digest and its list.
    async fn put_chunks(
        &self,
        file: File,
        cut: Cut,
        at_once: usize,
        before: &Before<'_>,
    ) -> Result<(String, List, Moved), BlobError> {
        let (to, pieces) = mpsc::channel(at_once);
        let cutting = tokio::task::spawn_blocking(move || cut::run(file, cut, &to));
        let pieces = stream::unfold(pieces, |mut pieces| async {
            pieces.recv().await.map(|piece| (piece, pieces))
        });
        let mut moved = Moved::default();
        let mut list = List::default();
        // In their order, however they arrive.
        let mut sent = Box::pin(
            pieces
                .map(|piece| async move {
                    before().await;
                    self.send(piece).await
                })
                .buffered(at_once),
        );
        while let Some((chunk, size)) = sent.try_next().await? {
            list.size += u64::from(chunk.length);
            moved.chunks += u64::from(!chunk.digest.is_empty());
            if let Some(size) = size {
                moved.moved_chunks += 1;
                moved.moved_bytes += size;
            }
            list.chunks.push(chunk);
        }
        drop(sent);
        let digest = cutting.await.map_err(io::Error::other)??;
        moved.bytes = list.size;
        Ok((digest.to_hex().to_string(), list, moved))
    }

    /// A chunk, and how much of it was sent if it was not there.
    async fn send(&self, piece: cut::Piece) -> Result<(Chunk, Option<u64>), BlobError> {
        let cut::Piece { hash, data, length } = piece;
        let Some(hash) = hash else {
            let digest = Bytes::new();
            return Ok((Chunk { digest, length }, None));
        };
        let digest = Bytes::copy_from_slice(hash.as_bytes());
        let chunk = Chunk { digest, length };
        let key = key("chunks", hash.to_hex().as_str());
        match self.again(|| self.store.head(&key)).await {
            Ok(found) if !is_old(found.last_modified.into()) => return Ok((chunk, None)),
            // It may be removed before this file's list is there.
            Ok(_) | Err(object_store::Error::NotFound { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        let packed = tokio::task::spawn_blocking(move || zstd::bulk::compress(&data, LEVEL));
        let packed = Bytes::from(packed.await.map_err(io::Error::other)??);
        let size = packed.len() as u64;
        let payload = PutPayload::from(packed);
        self.again(|| self.store.put(&key, payload.clone())).await?;
        Ok((chunk, Some(size)))
    }

    /// Fetches a file of that size into an empty one, open for both ways, which is whole and on the disk when this returns. After an error it may be written to for a moment
    /// more.
    pub async fn get(&self, digest: &str, size: u64, to: File) -> Result<Moved, BlobError> {
        let most = SMALL_LIST + size / PER_BYTE_OF_LIST;
        let list = self.list(digest, most.min(LARGEST_LIST)).await?;
        if list.size != size {
            return Err(BlobError::Damaged(format!("the list of file {digest}")));
        }
        self.fill(list, digest, to).await
    }

    /// Fetches the chunks of a list that is sound, and checks the whole.
    async fn fill(&self, list: List, digest: &str, to: File) -> Result<Moved, BlobError> {
        to.set_len(list.size)?;
        let to = Arc::new(to);
        let mut at = 0;
        let places = list.chunks.into_iter().map(|chunk| {
            let start = at;
            at += u64::from(chunk.length);
            (start, chunk)
        });
        let wanted = places.filter(|(_, chunk)| !chunk.digest.is_empty());
        let mut moved = Moved {
            bytes: list.size,
            ..Moved::default()
        };
        let mut fetched = Box::pin(
            stream::iter(wanted)
                .map(|(start, chunk)| self.fetch(chunk, start, &to))
                .buffer_unordered(AT_ONCE),
        );
        while let Some(size) = fetched.try_next().await? {
            moved.chunks += 1;
            moved.moved_chunks += 1;
            moved.moved_bytes += size;
        }
        drop(fetched);
        let check = move || {
            let mut hasher = blake3::Hasher::new();
            let mut whole = &*to;
            io::Seek::rewind(&mut whole)?;
            hasher.update_reader(whole)?;
            to.sync_all()?;
            Ok::<_, io::Error>(hasher.finalize())
        };
        let hash = tokio::task::spawn_blocking(check).await;
        let hash = hash.map_err(io::Error::other)??;
        if hash.to_hex().as_str() != digest {
            return Err(BlobError::Damaged(format!("file {digest}")));
        }
        Ok(moved)
    }

    async fn list(&self, digest: &str, most: u64) -> Result<List, BlobError> {
        let key = key("files", digest);
        let missing = || BlobError::Missing(digest.to_owned());
        let damaged = || BlobError::Damaged(format!("the list of file {digest}"));
        let bytes = match self.again(|| self.whole(&key, most)).await {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Err(damaged()),
            Err(object_store::Error::NotFound { .. }) => return Err(missing()),
            Err(error) => return Err(error.into()),
        };
        let list = List::decode(bytes).map_err(|_| damaged())?;
        if list.is_sound() {
            Ok(list)
        } else {
            Err(damaged())
        }
    }

    /// An object of at most so many bytes; none if it is larger.
    async fn whole(&self, key: &Key, most: u64) -> object_store::Result<Option<Bytes>> {
        let found = self.store.get(key).await?;
        if found.meta.size > most {
            return Ok(None);
        }
        found.bytes().await.map(Some)
    }

    /// Fetches a chunk to its place; how much came.
    async fn fetch(&self, chunk: Chunk, start: u64, to: &Arc<File>) -> Result<u64, BlobError> {
        let name = chunk.hash().map(|hash| hash.to_hex().to_string());
        let name = name.unwrap_or_default();
        let damaged = || BlobError::Damaged(format!("chunk {name}"));
        let key = key("chunks", &name);
        let most = zstd::zstd_safe::compress_bound(LARGEST) as u64;
        let packed = match self.again(|| self.whole(&key, most)).await {
            Ok(packed) => packed.ok_or_else(damaged)?,
            Err(object_store::Error::NotFound { .. }) => {
                return Err(BlobError::Missing(format!("chunk {name}")));
            }
            Err(error) => return Err(error.into()),
        };
        let size = packed.len() as u64;
        let to = Arc::clone(to);
        let place = move || {
            let length = chunk.length as usize;
            let data = zstd::bulk::decompress(&packed, length);
            let data = data.ok().filter(|data| data.len() == length);
            let data = data.filter(|data| Some(blake3::hash(data)) == chunk.hash());
            let Some(data) = data else {
                return Ok(false);
            };
            to.write_all_at(&data, start)?;
            Ok::<_, io::Error>(true)
        };
        let placed = tokio::task::spawn_blocking(place).await;
        if placed.map_err(io::Error::other)?? {
            Ok(size)
        } else {
            Err(damaged())
        }
    }

    /// Does it until it succeeds, some times.
    async fn again<T, F>(&self, work: impl FnMut() -> F) -> object_store::Result<T>
    where
        F: Future<Output = object_store::Result<T>>,
    {
        let backoff = ExponentialBuilder::default()
            .with_min_delay(FIRST_WAIT)
            .with_jitter()
            .with_max_times(TRIES);
        let passes = |error: &object_store::Error| {
            use object_store::Error as E;
            !matches!(
                error,
                E::NotFound { .. }
                    | E::InvalidPath { .. }
                    | E::NotSupported { .. }
                    | E::NotImplemented { .. }
                    | E::PermissionDenied { .. }
                    | E::Unauthenticated { .. }
                    | E::UnknownConfigurationKey { .. }
            )
        };
        let tried = tokio::time::timeout(LIMIT, work.retry(backoff).when(passes)).await;
        tried.unwrap_or_else(|_| {
            let late = io::Error::new(io::ErrorKind::TimedOut, "it has not answered in time");
            Err(object_store::Error::Generic {
                store: "store",
                source: Box::new(late),
            })
        })
    }
}

fn key(kind: &str, digest: &str) -> Key {
    Key::from_iter([kind, digest.get(..2).unwrap_or_default(), digest])
}

fn is_old(time: SystemTime) -> bool {
    // A clock that goes wrong makes it old: it is written again, which does no harm.
    !time.elapsed().is_ok_and(|age| age <= GRACE / 2)
}

#[cfg(test)]
mod tests;
