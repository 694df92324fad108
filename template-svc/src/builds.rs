//! Runs builds, some at once: takes one, makes its root, packs, publishes. A replica that dies leaves its build to the next.

use std::{
    borrow::Cow,
    fs::Permissions,
    os::unix::fs::PermissionsExt as _,
    panic::AssertUnwindSafe,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use blobs::{BlobError, Blobs, Cut, Moved};
use futures::{FutureExt as _, future};
use proto::template::v1::{Artifact, BuildSource, BuildState, Template, build_source::Source};
use service_kit::ids::TeamId;
use tempfile::TempDir;
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;

use crate::{
    artifact::{ArtifactDigest, Artifacts},
    context::ContextError,
    image::ImageError,
    layer::{LayerError, Limits},
    quota::{Quota, QuotaError},
    registry::{Registries, RegistryError},
    rootfs::RootfsError,
    secrets::Sealer,
    sessions::{End, Sessions},
    store::{Store, StoreError, StoredBuild},
    uploads::Uploads,
};

mod copy;
mod lost;
mod make;
mod secret;
mod start;
mod steps;

use make::Making;
use start::start_command;

const LEASE: Duration = Duration::from_secs(30);
const RENEW_EVERY: Duration = Duration::from_secs(5);
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// A build is taken again when its builder has died; not for ever, since it may be what builders die of.
const MOST_ATTEMPTS: u32 = 5;

/// Lines of a log that wait to be stored.
const LINES: usize = 16;

const MIB: u64 = 1 << 20;
/// Files, folders and links of a template; as many as a large distribution has with everything installed.
const MOST_ENTRIES: u64 = 4_000_000;
const DEFAULT_MEMORY: u64 = 512 * MIB;
const DEFAULT_DISK: u64 = 4096 * MIB;

/// A guest kernel: the deployment's own, with which every template is built that asks for no other, or an imported one.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// Of an imported one.
    pub name: String,
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
            name: String::new(),
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
    /// What was uploaded to build from.
    pub uploads: Uploads,
    /// How much of a team is kept.
    pub quota: Quota,
    /// From where nodes fetch what templates are made of.
    pub blobs: Blobs,
    /// Where it unpacks.
    pub work: PathBuf,
    /// The kernel.
    pub kernel: Kernel,
    /// Opens the credentials of builds.
    pub sealer: Sealer,
    /// Where images come from.
    pub registries: Registries,
    /// Where sessions are.
    pub sessions: Sessions,
    /// Largest root filesystem after unpacking.
    pub max_rootfs: u64,
    /// Builds at once.
    pub at_once: u32,
    /// Builds of one team at once.
    pub most_of_team: u32,
    /// Word of a new build.
    pub wake: Arc<Notify>,
}

#[derive(Debug, thiserror::Error)]
enum BuildError {
    #[error("{0}")]
    Store(#[from] StoreError),
    #[error("{message}")]
    Failed {
        reason: Cow<'static, str>,
        message: String,
    },
    /// Its session did not answer, or is gone: whether it is lost is to be found out.
    #[error("{end}")]
    Sandbox {
        end: End,
        /// Whether that was said, by its node.
        is_gone: bool,
    },
    #[error("cancelled")]
    Cancelled,
    /// Another builder has it by now.
    #[error("taken by another builder")]
    Lost,
}

fn failed(reason: impl Into<Cow<'static, str>>, message: impl Into<String>) -> BuildError {
    BuildError::Failed {
        reason: reason.into(),
        message: message.into(),
    }
}

impl From<ImageError> for BuildError {
    fn from(error: ImageError) -> Self {
        failed(error.reason(), error.to_string())
    }
}

impl From<BlobError> for BuildError {
    fn from(error: BlobError) -> Self {
        let reason = match &error {
            full if full.is_full() => "STORE_FULL",
            BlobError::Disk(_) => "BUILD_FAILED",
            _ => "STORE_FAILED",
        };
        failed(reason, error.to_string())
    }
}

impl From<ContextError> for BuildError {
    fn from(error: ContextError) -> Self {
        failed(error.reason(), error.to_string())
    }
}

impl From<QuotaError> for BuildError {
    fn from(error: QuotaError) -> Self {
        match error {
            QuotaError::Store(error) => Self::Store(error),
            full @ QuotaError::Full { .. } => failed(QuotaError::FULL, full.to_string()),
        }
    }
}

impl From<RegistryError> for BuildError {
    fn from(error: RegistryError) -> Self {
        failed(error.reason(), error.to_string())
    }
}

impl From<LayerError> for BuildError {
    fn from(error: LayerError) -> Self {
        RootfsError::from(error).into()
    }
}

impl From<RootfsError> for BuildError {
    fn from(error: RootfsError) -> Self {
        failed(error.reason(), error.to_string())
    }
}

fn io_failed(error: std::io::Error) -> BuildError {
    let full = error.kind() == std::io::ErrorKind::StorageFull;
    let reason = if full { "DISK_FULL" } else { "BUILD_FAILED" };
    failed(reason, error.to_string())
}

fn is_running(state: BuildState) -> bool {
    matches!(state, BuildState::Running | BuildState::Snapshotting)
}

fn team_of(stored: &StoredBuild) -> Result<TeamId, BuildError> {
    TeamId::parse(&stored.team).map_err(|error| failed("BUILD_FAILED", error.to_string()))
}

/// Removes what builds have left behind that do not run any more, because whoever ran them was killed.
pub async fn sweep(work: &Path, store: &Store) -> Result<(), SweepError> {
    for entry in std::fs::read_dir(work)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let id = name.split_once('.').map_or(&*name, |(id, _)| id);
        let state = store.build(id).await?.map(|stored| stored.build.state());
        if state.is_some_and(is_running) {
            continue;
        }
        let id = id.to_owned();
        let removed = tokio::task::spawn_blocking(move || std::fs::remove_dir_all(path)).await;
        match removed.map_err(std::io::Error::other).flatten() {
            Ok(()) => tracing::info!(build_id = id, "what a build left behind is removed"),
            // Its own thread may be at it still. Others are not held up.
            Err(error) => {
                tracing::warn!(build_id = id, %error, "what a build left behind is not removed");
            }
        }
    }
    Ok(())
}

/// What builds left behind stays for now.
#[derive(Debug, thiserror::Error)]
pub enum SweepError {
    /// The rows.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The disk.
    #[error(transparent)]
    Disk(#[from] std::io::Error),
}

impl Builder {
    /// Runs until `shutdown`; a build in progress is left to its lease.
    pub async fn run(self, shutdown: CancellationToken) {
        let work = || async {
            loop {
                match self.store.take_build(LEASE, self.most_of_team).await {
                    Ok(Some(build)) => {
                        let id = build.build.build_id.clone();
                        // One that is a bug's victim must not end all to come; it is left to its lease.
                        let done = AssertUnwindSafe(self.one(build)).catch_unwind().await;
                        if done.is_err() {
                            tracing::error!(build_id = id, "the builder panicked");
                        }
                    }
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
            _ = future::join_all((0..self.at_once).map(|_| work())) => {}
        }
    }

    async fn one(&self, stored: StoredBuild) {
        let has_ended = self.to_its_end(&stored).await;
        // Of earlier builders, which were killed, and of sessions that were lost.
        let is_of_steps =
            |source: BuildSource| matches!(source.source, Some(Source::Dockerfile(_)));
        let has_sessions = stored.request.source.clone().is_some_and(is_of_steps);
        if has_ended
            && (stored.attempts > 1 || has_sessions)
            && let Err(error) = self.tidy(&stored).await
        {
            let id = &stored.build.build_id;
            tracing::warn!(build_id = id, %error, "what a build left is removed later");
        }
    }

    /// Of a build that does not run any more.
    async fn tidy(&self, stored: &StoredBuild) -> Result<(), BuildError> {
        let team = team_of(stored)?;
        self.stop_leftovers(&team, &stored.build.build_id).await?;
        let swept = sweep(&self.work, &self.store).await;
        swept.map_err(|error| failed("BUILD_FAILED", error.to_string()))
    }

    /// Whether it has come there; if not, another builder takes it.
    async fn to_its_end(&self, stored: &StoredBuild) -> bool {
        let id = stored.build.build_id.clone();
        tracing::info!(build_id = id, name = stored.build.name, "build begins");
        let build = async {
            if stored.attempts > MOST_ATTEMPTS {
                let message = format!("{MOST_ATTEMPTS} builders ended before it did");
                return Err(failed("BUILDER_DIED", message));
            }
            self.build(stored).await
        };
        let outcome = tokio::select! {
            outcome = build => outcome,
            outcome = self.keep(&id, stored.attempts) => outcome,
        };
        let ended = match outcome {
            Ok(()) => return true,
            Err(BuildError::Cancelled) => self.store.log(&id, "cancelled").await,
            Err(BuildError::Lost) => {
                tracing::warn!(build_id = id, "another builder has the build");
                return false;
            }
            Err(
                BuildError::Failed { reason, message }
                | BuildError::Sandbox {
                    end: End { reason, message },
                    ..
                },
            ) => {
                tracing::warn!(build_id = id, %reason, message, "build failed");
                match self.store.log(&id, &format!("failed: {message}")).await {
                    Ok(()) => self
                        .store
                        .end_build(
                            &id,
                            Some(stored.attempts),
                            BuildState::Failed,
                            &reason,
                            &message,
                        )
                        .await
                        .map(drop),
                    Err(error) => Err(error),
                }
            }
            Err(BuildError::Store(error)) => Err(error),
        };
        if let Err(error) = &ended {
            tracing::warn!(build_id = id, %error, "the build is left to its lease");
        }
        ended.is_ok()
    }

    /// Does what blocks, and logs what is said meanwhile.
    async fn logged<T: Send + 'static>(
        &self,
        id: &str,
        work: impl FnOnce(&mpsc::Sender<String>) -> Result<T, BuildError> + Send + 'static,
    ) -> Result<T, BuildError> {
        let (lines, mut said) = mpsc::channel(LINES);
        let work = blocking(move || work(&lines));
        // Owns the receiver: whoever still speaks when this has failed is not held up.
        let log = async move {
            while let Some(line) = said.recv().await {
                self.store.log(id, &line).await?;
            }
            Ok(())
        };
        // What failed comes after what was said before it.
        let (done, logged) = tokio::join!(work, log);
        let done = done?;
        logged.map(|()| done).map_err(BuildError::Store)
    }

    /// Renews the lease for as long as the build runs; returns when it was cancelled, or is another's.
    async fn keep(&self, id: &str, attempt: u32) -> Result<(), BuildError> {
        let mut renewed = Instant::now();
        loop {
            tokio::time::sleep(RENEW_EVERY).await;
            match self.store.renew_build(id, attempt, LEASE).await {
                Ok(true) => renewed = Instant::now(),
                Ok(false) => {
                    let state = self
                        .store
                        .build(id)
                        .await?
                        .map(|stored| stored.build.state());
                    return Err(match state {
                        Some(state) if is_running(state) => BuildError::Lost,
                        _ => BuildError::Cancelled,
                    });
                }
                Err(error) if renewed.elapsed() < LEASE => {
                    tracing::warn!(build_id = id, %error, "lease not renewed");
                }
                // By now another one may have it.
                Err(_) => return Err(BuildError::Lost),
            }
        }
    }

    /// What a build's template has whatever it is made of.
    fn spec(&self, stored: &StoredBuild) -> Template {
        let request = &stored.request;
        // In whole MiB, as sessions have it.
        let or = |asked: u64, default: u64| {
            let asked = if asked == 0 { default } else { asked };
            asked.div_ceil(MIB).saturating_mul(MIB)
        };
        Template {
            kernel: Some(self.kernel.kernel.clone()),
            modules: Some(self.kernel.modules.clone()),
            kernel_version: self.kernel.version.clone(),
            envd_version: env!("CARGO_PKG_VERSION").to_owned(),
            default_vcpus: request.default_vcpus.max(1),
            default_memory_bytes: or(request.default_memory_bytes, DEFAULT_MEMORY),
            default_disk_bytes: or(request.default_disk_bytes, DEFAULT_DISK),
            ..Template::default()
        }
    }

    /// The kernel its sessions are to have; it stays for as long as the build may last.
    async fn kernel_of(&self, stored: &StoredBuild) -> Result<Kernel, BuildError> {
        let name = &stored.request.kernel;
        if name.is_empty() {
            return Ok(self.kernel.clone());
        }
        let gone = || failed("KERNEL_UNKNOWN", format!("the kernel {name} was deleted"));
        let found = self.store.kernel(name).await?.ok_or_else(gone)?;
        let part = |artifact: Option<Artifact>| {
            let artifact = artifact.unwrap_or_default();
            if self.is_kept(&artifact) {
                return Ok(artifact);
            }
            let message = format!("a file of the kernel {name} is gone; import it again");
            Err(failed("ARTIFACT_MISSING", message))
        };
        Ok(Kernel {
            kernel: part(found.kernel)?,
            modules: part(found.modules)?,
            name: found.name,
            version: found.version,
        })
    }

    /// Stores what a node needs to start the template.
    async fn hand_out(&self, id: &str, spec: &Template) -> Result<(), BuildError> {
        let mut moved = Moved::default();
        let since = Instant::now();
        for artifact in [&spec.rootfs, &spec.kernel, &spec.modules] {
            let digest = artifact.as_ref().map_or("", |artifact| &artifact.digest);
            // Also what is there is looked at, part by part: it may be old, or not whole.
            let path = ArtifactDigest::parse(digest);
            let path = path.and_then(|digest| self.artifacts.find(&digest));
            let missing = || failed("ARTIFACT_MISSING", format!("the artifact {digest} is gone"));
            let (stored, one) = self
                .blobs
                .put(&path.ok_or_else(missing)?, Cut::Content)
                .await?;
            if stored != digest {
                let message = format!("the artifact {digest} is damaged: it is {stored}");
                return Err(failed("ARTIFACT_DAMAGED", message));
            }
            moved.bytes += one.bytes;
            moved.moved_bytes += one.moved_bytes;
        }
        if moved.bytes > 0 {
            let Moved {
                bytes, moved_bytes, ..
            } = moved;
            let took = since.elapsed().as_secs_f64();
            let line =
                format!("stored in {took:.2} s: of {bytes} bytes {moved_bytes} were new, packed");
            self.store.log(id, &line).await?;
        }
        Ok(())
    }

    async fn build(&self, stored: &StoredBuild) -> Result<(), BuildError> {
        let id = &stored.build.build_id;
        let source = stored.request.source.as_ref();
        let source = source.and_then(|source| source.source.clone());
        // There was room when it was asked for.
        self.quota.has_room(&stored.template_team).await?;
        let kernel = self.kernel_of(stored).await?;
        // Whoever still works in it when the build is given up has it, too, and removes it last.
        let work = tempfile::Builder::new()
            .prefix(&format!("{id}."))
            // Programs and devices of images are nobody's of this host.
            .permissions(Permissions::from_mode(0o700))
            .tempdir_in(&self.work);
        let work = Work::new(work.map_err(io_failed)?);
        let limits = Limits {
            bytes: self.max_rootfs,
            entries: MOST_ENTRIES,
        };
        // The thread ends soon after this future, which a cancelled build drops.
        let cancel = CancellationToken::new();
        let _cancelled = cancel.clone().drop_guard();
        let making = Making::new(work, limits, self.artifacts.clone(), cancel)?;
        let made = self.make(stored, source, making.clone()).await?;
        let rootfs = if let Some(packed) = made.packed {
            let line = format!("image of {} bytes", packed.size_bytes);
            self.store.log(id, &line).await?;
            packed
        } else {
            self.store.log(id, "packing the root filesystem").await?;
            let since = Instant::now();
            // What is removed with it may be a million files, which is of that thread, too.
            let packed = blocking(move || making.pack()).await?;
            let (bytes, took) = (packed.size_bytes, since.elapsed().as_secs_f64());
            let line = format!("packed in {took:.2} s: image of {bytes} bytes");
            self.store.log(id, &line).await?;
            packed
        };
        let start = match &stored.request.start {
            Some(start) => Some(start_command(start, &made.defaults)?),
            None => None,
        };
        if start.is_none() && !made.defaults.argv().is_empty() {
            let line = "its ENTRYPOINT and CMD are not started, since that was not asked for";
            self.store.log(id, line).await?;
        }
        let spec = Template {
            rootfs: Some(rootfs),
            env: made.defaults.env.into_iter().collect(),
            default_user: made.defaults.user,
            source_image: made.source_image,
            layers: made.layers,
            start,
            // The session its steps ran in had the deployment's.
            kernel: Some(kernel.kernel),
            modules: Some(kernel.modules),
            kernel_version: kernel.version,
            kernel_name: kernel.name,
            kernel_arguments: stored.request.kernel_arguments.clone(),
            ..self.spec(stored)
        };
        let team = &stored.template_team;
        self.quota.make_room(team, spec.clone()).await?;
        self.hand_out(id, &spec).await?;
        if spec.start.is_some() {
            self.snapshot(stored, &spec).await?;
        }
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

/// The folder of a build, which goes with the last that has it; removing it may take long, and is done by a thread of its own.
#[derive(Debug, Clone)]
struct Work(Option<Arc<TempDir>>);

impl Work {
    fn new(folder: TempDir) -> Self {
        Self(Some(Arc::new(folder)))
    }

    fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        let folder = self.0.as_ref().map(|folder| folder.path().join(name));
        folder.unwrap_or_default()
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        let Some(folder) = self.0.take().and_then(Arc::into_inner) else {
            return;
        };
        let remove = move || {
            if let Err(error) = folder.close() {
                tracing::warn!(%error, "what a build left behind is removed later");
            }
        };
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(remove)),
            Err(_) => remove(),
        }
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, BuildError> + Send + 'static,
) -> Result<T, BuildError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(failed("BUILD_FAILED", error.to_string())),
    }
}
