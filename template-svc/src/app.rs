//! Puts template-svc together: bind, migrate, take the kernel in, serve and build.

use std::{io, os::unix::fs::PermissionsExt as _, path::PathBuf, sync::Arc, time::Duration};

use blobs::{BlobError, Blobs};
use proto::template::v1::{
    Artifact, artifact_service_server::ArtifactServiceServer,
    kernel_service_server::KernelServiceServer, template_service_server::TemplateServiceServer,
};
use service_kit::{
    address::Address,
    mesh::{MeshToken, TokenError},
    serve::{Bound, Grpc, ServeError},
};
use tokio::sync::Notify;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::service::Routes;

use crate::{
    api::{ArtifactApi, KernelApi, TemplateApi},
    artifact::Artifacts,
    builds::{self, Builder, Kernel},
    collect::{Collected, collect},
    config::Config,
    kernel::Importer,
    quota::{IN_USE, Quota},
    registry::{Patience, Registries},
    secrets::Sealer,
    sessions::Sessions,
    store::{Store, StoreError},
    uploads::Uploads,
};

const MIGRATION_RETRY: Duration = Duration::from_millis(500);
const UPLOADS_KEPT: Duration = Duration::from_hours(24);
const SWEEP_EVERY: Duration = Duration::from_mins(10);
const COLLECT_EVERY: Duration = Duration::from_hours(1);

/// template-svc cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// The listener.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// The mesh token.
    #[error("--mesh-token-file: {0}")]
    Token(#[from] TokenError),
    /// The database.
    #[error("--database-url: {0}")]
    Database(#[from] StoreError),
    /// The object store.
    #[error("--store: {0}")]
    Blobs(#[from] BlobError),
    /// A folder.
    #[error("{setting} {path}: {source}")]
    Folder {
        /// The setting.
        setting: &'static str,
        /// Its value.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A bound template-svc.
#[derive(Debug)]
pub struct App {
    bound: Bound,
    token: MeshToken,
    store: Store,
    artifacts: Artifacts,
    uploads: Uploads,
    blobs: Blobs,
    work: PathBuf,
    kernel: Kernel,
    registries: Registries,
    config: Config,
    shutdown: CancellationToken,
}

impl App {
    /// Takes the kernel in and binds; nothing is served yet.
    pub async fn build(config: Config, shutdown: CancellationToken) -> Result<Self, AppError> {
        let token = MeshToken::load(&config.mesh_token_file)?;
        let state = |source| AppError::Folder {
            setting: "--state",
            path: config.state.clone(),
            source,
        };
        let artifacts = Artifacts::open(config.state.join("artifacts")).map_err(state)?;
        let uploads = config.state.join("uploads");
        let uploads = Uploads::open(uploads, config.max_upload, config.uploads_per_team);
        let uploads = uploads.map_err(state)?;
        let address = match &config.store {
            Some(address) => address.clone(),
            None => std::path::absolute(config.state.join("store"))
                .and_then(|folder| blobs::Address::of_folder(&folder).map_err(io::Error::other))
                .map_err(state)?,
        };
        let blobs = Blobs::open(&address)?;
        let work = config.state.join("work");
        std::fs::create_dir_all(&work).map_err(state)?;
        std::fs::set_permissions(&work, std::fs::Permissions::from_mode(0o700)).map_err(state)?;
        let kernel =
            Kernel::ingest(&config.kernel_dir, &artifacts).map_err(|source| AppError::Folder {
                setting: "--kernel-dir",
                path: config.kernel_dir.clone(),
                source,
            })?;
        let registries = Registries::new(&config.trusted_registries, Patience::default());
        let store = Store::new(&config.database_url, config.database_connections)?;
        let bound = Bound::bind(&config.listen).await?;
        Ok(Self {
            bound,
            token,
            store,
            artifacts,
            uploads,
            blobs,
            work,
            kernel,
            registries,
            config,
            shutdown,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> &Address {
        self.bound.address()
    }

    /// Serves until shutdown.
    pub async fn run(self) -> Result<(), AppError> {
        let Self {
            bound,
            token,
            store,
            artifacts,
            uploads,
            blobs,
            work,
            kernel,
            registries,
            config,
            shutdown,
        } = self;
        let sealer = Sealer::new(token.clone());
        let sessions = Sessions::new(&config.session_addresses, &token);
        loop {
            let migrated = tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                migrated = store.migrate() => migrated,
            };
            match migrated {
                Ok(()) => break,
                Err(error) => tracing::warn!(%error, "waiting for the database"),
            }
            tokio::time::sleep(MIGRATION_RETRY).await;
        }
        let wake = Arc::new(Notify::new());
        let quota = Quota::new(store.clone(), config.storage_per_team, IN_USE);
        let own = [kernel.kernel.clone(), kernel.modules.clone()];
        let builder = Builder {
            store: store.clone(),
            artifacts: artifacts.clone(),
            uploads: uploads.clone(),
            quota: quota.clone(),
            blobs: blobs.clone(),
            work: work.clone(),
            kernel,
            sealer: sealer.clone(),
            registries,
            sessions,
            max_rootfs: config.max_rootfs,
            at_once: config.builds,
            most_of_team: config.builds_per_team,
            wake: Arc::clone(&wake),
        };
        let background = TaskTracker::new();
        background.spawn(builder.run(shutdown.clone()));
        background.spawn(sweep(
            uploads.clone(),
            artifacts.clone(),
            work,
            store.clone(),
            shutdown.clone(),
        ));
        background.spawn(collect_often(
            store.clone(),
            artifacts.clone(),
            blobs.clone(),
            own,
            shutdown.clone(),
        ));
        let importer = Importer {
            uploads: uploads.clone(),
            artifacts: artifacts.clone(),
        };
        let kernels = KernelServiceServer::new(KernelApi::new(store.clone(), importer));
        let templates = TemplateServiceServer::new(TemplateApi::new(
            store, blobs, sealer, uploads, quota, wake,
        ))
        .max_decoding_message_size(8 << 20);
        let routes = Routes::new(templates)
            .add_service(kernels)
            .add_service(ArtifactServiceServer::new(ArtifactApi { artifacts }));
        let served = Grpc::new("template-svc")
            .mesh_only(token)
            .reflect(&[
                "sandmesh.template.v1.TemplateService",
                "sandmesh.template.v1.KernelService",
                "sandmesh.template.v1.ArtifactService",
            ])
            .serve(bound, routes, shutdown.clone())
            .await;
        shutdown.cancel();
        background.close();
        background.wait().await;
        Ok(served?)
    }
}

/// Removes what nobody needs any more, for the first time some time after the start.
async fn collect_often(
    store: Store,
    artifacts: Artifacts,
    blobs: Blobs,
    own: [Artifact; 2],
    shutdown: CancellationToken,
) {
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(COLLECT_EVERY) => {}
        }
        let collected = tokio::select! {
            () = shutdown.cancelled() => return,
            collected = collect(&store, &artifacts, &blobs, &own) => collected,
        };
        match collected {
            Ok(collected) if collected == Collected::default() => {}
            Ok(Collected {
                forgotten,
                artifacts,
                blobs,
            }) => {
                tracing::info!(forgotten, artifacts, ?blobs, "what nobody needs is removed");
            }
            Err(error) => tracing::warn!(%error, "what nobody needs is not removed"),
        }
    }
}

async fn sweep(
    uploads: Uploads,
    artifacts: Artifacts,
    work: PathBuf,
    store: Store,
    shutdown: CancellationToken,
) {
    let mut ticks = tokio::time::interval(SWEEP_EVERY);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = ticks.tick() => {}
        }
        if let Err(error) = builds::sweep(&work, &store).await {
            tracing::warn!(%error, "what builds left behind is not removed");
        }
        let (uploads, artifacts) = (uploads.clone(), artifacts.clone());
        let swept = move || {
            artifacts.sweep_unfinished(UPLOADS_KEPT)?;
            uploads.sweep(UPLOADS_KEPT)
        };
        match tokio::task::spawn_blocking(swept).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "old uploads are not removed"),
            Err(error) => tracing::warn!(%error, "old uploads are not removed"),
        }
    }
}
