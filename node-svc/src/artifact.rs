//! Files of templates on this node: fetched by digest once, checked, kept.

use std::{
    collections::HashMap,
    fs,
    io::{self, Write as _},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

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
    source: ArtifactServiceClient<MeshChannel>,
    fetching: Arc<Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>>,
}

impl Artifacts {
    /// Keeps files in the folder.
    pub fn open(folder: PathBuf, source: MeshChannel) -> io::Result<Self> {
        fs::create_dir_all(&folder)?;
        Ok(Self {
            folder,
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

    async fn fetch(&self, artifact: &Artifact, path: &PathBuf) -> Result<(), ArtifactError> {
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
        let mut file = tempfile::Builder::new()
            .prefix(".incoming-")
            .tempfile_in(&self.folder)?;
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
        file.as_file().sync_all()?;
        // Readable for a VMM of any user; nobody writes to it again.
        fs::set_permissions(
            file.path(),
            std::os::unix::fs::PermissionsExt::from_mode(0o444),
        )?;
        file.persist(path).map_err(|error| error.error)?;
        tracing::info!(digest, bytes = size, "artifact fetched");
        Ok(())
    }
}
