//! Files of templates on this node: fetched by digest once, checked, kept.

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

const FETCH_TIMEOUT: Duration = Duration::from_mins(2);

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
    blobs: Option<Blobs>,
    source: ArtifactServiceClient<MeshChannel>,
    fetching: Arc<Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>>,
}

impl Artifacts {
    /// Keeps files in the folder; fetches them from the object store, if there is one, or else from template-svc.
    pub fn open(folder: PathBuf, blobs: Option<Blobs>, source: MeshChannel) -> io::Result<Self> {
        fs::create_dir_all(&folder)?;
        Ok(Self {
            folder,
            blobs,
            source: ArtifactServiceClient::new(source),
            fetching: Arc::default(),
        })
    }

    /// Where an artifact is on this node; fetches it if need be. Many callers cause one fetch.
    pub async fn get(
        &self,
        what: &'static str,
        artifact: Option<&Artifact>,
    ) -> Result<PathBuf, ArtifactError> {
        let artifact = artifact.ok_or(ArtifactError::Malformed(what))?;
        let digest = &artifact.digest;
        if digest.len() != 64 || !digest.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(ArtifactError::Malformed(what));
        }
        let path = self.folder.join(digest);
        if path.exists() {
            return Ok(path);
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
        Ok(path)
    }

    async fn fetch(&self, artifact: &Artifact, path: &Path) -> Result<(), ArtifactError> {
        let begin = || {
            let mut file = tempfile::Builder::new();
            file.prefix(".incoming-").tempfile_in(&self.folder)
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
        Ok(())
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
