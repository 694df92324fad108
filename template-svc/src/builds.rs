//! Runs builds: takes one at a time, unpacks, packs, publishes. A replica that dies leaves its build to the next.

use std::{path::PathBuf, time::Duration};

use proto::template::v1::{Artifact, BuildState, Template, build_source::Source};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::{
    artifact::{ArtifactDigest, Artifacts},
    rootfs::{self, RootfsError},
    store::{Store, StoreError, StoredBuild},
};

const LEASE: Duration = Duration::from_secs(30);
const RENEW_EVERY: Duration = Duration::from_secs(5);
const LOOK_EVERY: Duration = Duration::from_secs(2);

const MIB: u64 = 1 << 20;
const DEFAULT_MEMORY: u64 = 512 * MIB;
const DEFAULT_DISK: u64 = 4096 * MIB;

/// The guest kernel every template is built with.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// The ELF.
    pub kernel: Artifact,
    /// Its modules.
    pub modules: Artifact,
    /// Package and version.
    pub version: String,
}

impl Kernel {
    /// Takes the files of a kernel folder into the artifacts.
    pub fn ingest(folder: &std::path::Path, artifacts: &Artifacts) -> std::io::Result<Self> {
        Ok(Self {
            kernel: artifacts.ingest(&folder.join("vmlinux"))?,
            modules: artifacts.ingest(&folder.join("modules.cpio"))?,
            version: std::fs::read_to_string(folder.join("version"))?
                .trim()
                .to_owned(),
        })
    }
}

/// Runs builds.
#[derive(Debug)]
pub struct Builder {
    /// The rows.
    pub store: Store,
    /// Finished files.
    pub artifacts: Artifacts,
    /// Uploaded sources.
    pub uploads: Artifacts,
    /// Where it unpacks.
    pub work: PathBuf,
    /// The kernel.
    pub kernel: Kernel,
    /// Largest root filesystem after unpacking.
    pub max_rootfs: u64,
    /// Word of a new build.
    pub wake: std::sync::Arc<Notify>,
}

#[derive(Debug, thiserror::Error)]
enum BuildError {
    #[error("{0}")]
    Store(#[from] StoreError),
    #[error("{message}")]
    Failed {
        reason: &'static str,
        message: String,
    },
    #[error("cancelled")]
    Cancelled,
}

impl From<RootfsError> for BuildError {
    fn from(error: RootfsError) -> Self {
        Self::Failed {
            reason: error.reason(),
            message: error.to_string(),
        }
    }
}

fn io_failed(error: std::io::Error) -> BuildError {
    let full = error.kind() == std::io::ErrorKind::StorageFull;
    BuildError::Failed {
        reason: if full { "DISK_FULL" } else { "BUILD_FAILED" },
        message: error.to_string(),
    }
}

impl Builder {
    /// Runs until `shutdown`; a build in progress is left to its lease.
    pub async fn run(self, shutdown: CancellationToken) {
        let work = async {
            loop {
                match self.store.take_build(LEASE).await {
                    Ok(Some(build)) => self.one(build).await,
                    Ok(None) => {
                        // Word or time: both are reasons to look.
                        let _ = tokio::time::timeout(LOOK_EVERY, self.wake.notified()).await;
                    }
                    Err(error) => {
                        tracing::warn!(%error, "builds cannot be looked for right now");
                        tokio::time::sleep(LOOK_EVERY).await;
                    }
                }
            }
        };
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = work => {}
        }
    }

    async fn one(&self, stored: StoredBuild) {
        let id = stored.build.build_id.clone();
        tracing::info!(build_id = id, name = stored.build.name, "build begins");
        let outcome = tokio::select! {
            outcome = self.build(&stored) => outcome,
            outcome = self.keep(&id) => outcome,
        };
        let ended = match outcome {
            Ok(()) => return,
            Err(BuildError::Cancelled) => self.store.log(&id, "cancelled").await,
            Err(BuildError::Failed { reason, message }) => {
                tracing::warn!(build_id = id, reason, message, "build failed");
                match self.store.log(&id, &format!("failed: {message}")).await {
                    Ok(()) => self
                        .store
                        .end_build(&id, BuildState::Failed, reason, &message)
                        .await
                        .map(drop),
                    Err(error) => Err(error),
                }
            }
            Err(BuildError::Store(error)) => Err(error),
        };
        if let Err(error) = ended {
            tracing::warn!(build_id = id, %error, "the build is left to its lease");
        }
    }

    /// Renews the lease for as long as the build runs; returns when it was cancelled.
    async fn keep(&self, id: &str) -> Result<(), BuildError> {
        loop {
            tokio::time::sleep(RENEW_EVERY).await;
            match self.store.renew_build(id, LEASE).await {
                Ok(true) => {}
                Ok(false) => return Err(BuildError::Cancelled),
                Err(error) => tracing::warn!(build_id = id, %error, "lease not renewed"),
            }
        }
    }

    async fn build(&self, stored: &StoredBuild) -> Result<(), BuildError> {
        let id = &stored.build.build_id;
        let source = stored
            .request
            .source
            .clone()
            .and_then(|source| source.source);
        let Some(Source::RootfsTarball(digest)) = source else {
            return Err(BuildError::Failed {
                reason: "NOT_YET_AVAILABLE",
                message: "only tarballs can be built".into(),
            });
        };
        let tarball = ArtifactDigest::parse(&digest)
            .and_then(|digest| self.uploads.find(&digest))
            .ok_or_else(|| BuildError::Failed {
                reason: "SOURCE_UNKNOWN",
                message: format!("no uploaded source {digest}; upload it again"),
            })?;
        let work = tempfile::Builder::new()
            .prefix("build-")
            .tempdir_in(&self.work)
            .map_err(io_failed)?;
        let (root, image) = (work.path().join("root"), work.path().join("rootfs.erofs"));
        self.store.log(id, "unpacking the root filesystem").await?;
        let limit = self.max_rootfs;
        let entries = blocking({
            let root = root.clone();
            move || {
                std::fs::create_dir(&root).map_err(RootfsError::Unpack)?;
                rootfs::unpack(&tarball, &root, limit)
            }
        })
        .await?;
        self.store
            .log(id, &format!("{entries} entries; packing the image"))
            .await?;
        let artifacts = self.artifacts.clone();
        let rootfs = blocking(move || {
            rootfs::pack(&root, &image)?;
            let artifact = artifacts
                .ingest(&image)
                .map_err(|error| RootfsError::Pack(error.to_string()))?;
            // The folder may hold a million files; removing it belongs on this thread too.
            drop(work);
            Ok(artifact)
        })
        .await?;
        self.store
            .log(id, &format!("image of {} bytes", rootfs.size_bytes))
            .await?;
        let request = &stored.request;
        let or = |asked: u64, default: u64| if asked == 0 { default } else { asked };
        let spec = Template {
            rootfs: Some(rootfs),
            kernel: Some(self.kernel.kernel.clone()),
            modules: Some(self.kernel.modules.clone()),
            kernel_version: self.kernel.version.clone(),
            envd_version: env!("CARGO_PKG_VERSION").to_owned(),
            default_vcpus: request.default_vcpus.max(1),
            default_memory_bytes: or(request.default_memory_bytes, DEFAULT_MEMORY),
            default_disk_bytes: or(request.default_disk_bytes, DEFAULT_DISK),
            ..Template::default()
        };
        match self.store.publish(stored, &spec).await? {
            Some(version) => {
                self.store
                    .log(id, &format!("published {}@{version}", stored.build.name))
                    .await?;
                tracing::info!(
                    build_id = id,
                    name = stored.build.name,
                    version,
                    "build succeeded"
                );
                Ok(())
            }
            None => Err(BuildError::Cancelled),
        }
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, RootfsError> + Send + 'static,
) -> Result<T, BuildError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => Ok(result?),
        Err(error) => Err(BuildError::Failed {
            reason: "BUILD_FAILED",
            message: error.to_string(),
        }),
    }
}
