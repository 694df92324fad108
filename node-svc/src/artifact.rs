//! Files of templates on this node: fetched by digest, checked, kept as long as there is room.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use blobs::{BlobError, Blobs, Moved};
use proto::template::v1::{
    Artifact, FetchArtifactRequest, artifact_service_client::ArtifactServiceClient,
};
use service_kit::mesh::MeshChannel;
use tonic::Request;

use crate::cache::{Cache, Item, Pin};

const FETCH_TIMEOUT: Duration = Duration::from_mins(2);
/// Begins names of what is being fetched.
const INCOMING: &str = ".incoming-";

/// An artifact cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ArtifactError {
    /// The template names none, or names it badly.
    #[error("the template's {0} is missing or malformed")]
    Malformed(&'static str),
    /// template-svc refused or is away.
    #[error("artifact {digest} cannot be fetched: {status}")]
    Fetch {
        /// Which.
        digest: String,
        /// Why.
        status: tonic::Status,
    },
    /// What came is not what was asked for.
    #[error("artifact {0} arrived damaged")]
    Damaged(String),
    /// The node's disk.
    #[error("artifacts on disk: {0}")]
    Disk(#[from] io::Error),
}

/// The artifacts of this node.
#[derive(Debug, Clone)]
pub struct Artifacts {
    folder: PathBuf,
    cache: Arc<Cache>,
    blobs: Option<Blobs>,
    source: ArtifactServiceClient<MeshChannel>,
    fetching: Arc<Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>>,
}

impl Artifacts {
    /// Keeps files in the folder, which is the cache's; fetches them from the object store, if there is one, or else from template-svc. What an earlier node-svc was
    /// fetching is removed. Blocking.
    pub fn open(
        folder: PathBuf,
        cache: Arc<Cache>,
        blobs: Option<Blobs>,
        source: MeshChannel,
    ) -> io::Result<Self> {
        for entry in fs::read_dir(&folder)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(INCOMING) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(Self {
            folder,
            cache,
            blobs,
            source: ArtifactServiceClient::new(source),
            fetching: Arc::default(),
        })
    }

    /// Where an artifact is on this node, at least until the pin is dropped; fetches it if need be. Many callers cause one fetch.
    pub async fn get(
        &self,
        what: &'static str,
        artifact: Option<&Artifact>,
    ) -> Result<(PathBuf, Pin), ArtifactError> {
        let artifact = artifact.ok_or(ArtifactError::Malformed(what))?;
        let digest = &artifact.digest;
        if digest.len() != 64 || !digest.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(ArtifactError::Malformed(what));
        }
        let path = self.folder.join(digest);
        let pin = self.cache.pin(Item::Artifact(digest.clone()));
        if path.exists() {
            return Ok((path, pin));
        }
        let lock = {
            let mut fetching = self.fetching.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(fetching.entry(digest.clone()).or_default())
        };
        // Held across the fetch: the others wait for this one's file.
        let _turn = lock.lock().await;
        if !path.exists() {
            self.fetch(artifact, &path).await?;
        }
        self.fetching
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(digest);
        Ok((path, pin))
    }

    async fn fetch(&self, artifact: &Artifact, path: &Path) -> Result<(), ArtifactError> {
        let room = self.cache.make_room(artifact.size_bytes).await;
        let begin = || {
            let mut file = tempfile::Builder::new();
            file.prefix(INCOMING).tempfile_in(&self.folder)
        };
        let mut file = begin()?;
        if !self.fetch_blob(artifact, file.as_file()).await? {
            // Another one: the first may be written to still.
            file = begin()?;
            self.ask_for(artifact, file.as_file_mut()).await?;
        }
        // Readable for a VMM of any user; nobody writes to it again.
        fs::set_permissions(
            file.path(),
            std::os::unix::fs::PermissionsExt::from_mode(0o444),
        )?;
        file.persist(path).map_err(|error| error.error)?;
        drop(room);
        Ok(self.cache.added(&Item::Artifact(artifact.digest.clone()))?)
    }

    /// From the object store; whether it was there.
    async fn fetch_blob(&self, artifact: &Artifact, to: &File) -> Result<bool, ArtifactError> {
        let Artifact { digest, size_bytes } = artifact;
        let Some(blobs) = &self.blobs else {
            return Ok(false);
        };
        match blobs.get(digest, *size_bytes, to.try_clone()?).await {
            Ok(Moved {
                bytes, moved_bytes, ..
            }) => {
                tracing::info!(
                    digest,
                    bytes,
                    moved_bytes,
                    "artifact fetched from the store"
                );
                Ok(true)
            }
            Err(BlobError::Disk(error)) => Err(error.into()),
            // Templates of builds that are under way are not there yet.
            Err(BlobError::Missing(_)) => Ok(false),
            Err(error) => {
                tracing::warn!(digest, %error, "the store does not have an artifact, so template-svc is asked");
                Ok(false)
            }
        }
    }

    async fn ask_for(&self, artifact: &Artifact, file: &mut File) -> Result<(), ArtifactError> {
        let digest = artifact.digest.clone();
        let failed = |status| ArtifactError::Fetch {
            digest: digest.clone(),
            status,
        };
        let mut request = Request::new(FetchArtifactRequest {
            digest: digest.clone(),
            offset: 0,
        });
        request.set_timeout(FETCH_TIMEOUT);
        let mut stream = self
            .source
            .clone()
            .fetch_artifact(request)
            .await
            .map_err(failed)?
            .into_inner();
        let mut hasher = blake3::Hasher::new();
        let mut size = 0_u64;
        while let Some(part) = stream.message().await.map_err(failed)? {
            size += part.data.len() as u64;
            if size > artifact.size_bytes {
                return Err(ArtifactError::Damaged(digest));
            }
            hasher.update(&part.data);
            file.write_all(&part.data)?;
        }
        if hasher.finalize().to_hex().as_str() != digest {
            return Err(ArtifactError::Damaged(digest));
        }
        file.sync_all()?;
        tracing::info!(digest, bytes = size, "artifact fetched");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use blobs::Cut;
    use service_kit::mesh::{self, MeshToken};
    use tempfile::TempDir;
    use tokio_util::sync::CancellationToken;

    use super::*;

    const SIZE: u64 = 64 << 10;

    /// Artifacts of one size in a store, on a node that has room for two of them.
    struct World {
        root: TempDir,
        cache: Arc<Cache>,
        artifacts: Artifacts,
        stored: Vec<Artifact>,
    }

    impl World {
        async fn new(count: u8) -> Self {
            let root = tempfile::tempdir().unwrap();
            let at = |name: &str| root.path().join(name);
            let blobs = Blobs::open(&blobs::Address::of_folder(&at("store")).unwrap()).unwrap();
            let mut stored = Vec::new();
            for number in 1..=count {
                let file = at("file");
                fs::write(&file, vec![number; SIZE as usize]).unwrap();
                let (digest, _) = blobs.put(&file, Cut::Content).await.unwrap();
                stored.push(Artifact {
                    digest,
                    size_bytes: SIZE,
                });
            }
            let cache = Cache::open(at("artifacts"), at("t"), 2 * SIZE).unwrap();
            let cache = Arc::new(cache);
            fs::write(at("artifacts").join(".incoming-1"), "of before").unwrap();
            // Nobody is there.
            let source = mesh::connect(&["127.0.0.1:9".parse().unwrap()], &MeshToken::random());
            let of_node = Arc::clone(&cache);
            Self {
                artifacts: Artifacts::open(at("artifacts"), of_node, Some(blobs), source).unwrap(),
                cache,
                stored,
                root,
            }
        }

        async fn get(&self, number: usize) -> (PathBuf, Pin) {
            let got = self.artifacts.get("root", self.stored.get(number)).await;
            got.unwrap()
        }

        fn count(&self) -> usize {
            let folder = self.root.path().join("artifacts");
            fs::read_dir(folder).unwrap().count()
        }
    }

    #[tokio::test]
    async fn what_is_in_use_stays_and_what_went_is_fetched_again() {
        let world = World::new(3).await;
        assert_eq!(world.count(), 0, "what was half fetched is gone");
        let (first, pin) = world.get(0).await;
        let second = world.get(1).await.0;
        let third = world.get(2).await.0;
        assert!(first.exists() && !second.exists() && third.exists());
        // Another name of it outlives it.
        let other = world.root.path().join("other");
        fs::hard_link(&third, &other).unwrap();
        let (again, _again) = world.get(1).await;
        assert!(again.exists() && first.exists() && !third.exists());
        assert_eq!(fs::read(&other).unwrap(), vec![3; SIZE as usize]);
        // All are in use: there is more than should be, until one is not.
        let (_, third) = world.get(2).await;
        assert_eq!(world.count(), 3);
        let shutdown = CancellationToken::new();
        let keep = tokio::spawn(Arc::clone(&world.cache).keep_small(shutdown.clone()));
        drop(pin);
        let look = async {
            while first.exists() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), look)
            .await
            .unwrap();
        drop(third);
        shutdown.cancel();
        keep.await.unwrap();
        assert_eq!(world.count(), 2);
    }
}
