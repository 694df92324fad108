//! Puts session-svc together: bind, migrate, serve, reconcile, drain.

use std::time::Duration;

use proto::{
    node::v1::node_registry_service_server::NodeRegistryServiceServer,
    session::v1::session_service_server::SessionServiceServer,
};
use service_kit::{
    address::Address,
    mesh::{self, MeshToken, TokenError},
    serve::{Bound, Grpc, ServeError},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::service::Routes;

use crate::{
    api::{Registry, SessionApi},
    audit::Audit,
    catalog::Catalog,
    changes::Changes,
    config::Config,
    nodes::Nodes,
    reconcile::Reconciler,
    session::HostPattern,
    sessions::{Limits, Sessions},
    store::{Store, StoreError},
    watch::Watches,
};

const MIGRATION_RETRY: Duration = Duration::from_millis(500);

/// How long serving waits for the first migration.
const MIGRATION_FIRST: Duration = Duration::from_secs(2);

/// session-svc cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// The listener.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// The mesh token.
    #[error("--mesh-token-file: {0}")]
    Token(#[from] TokenError),
    /// The database address.
    #[error("--database-url: {0}")]
    Database(#[source] StoreError),
    /// The Redis address.
    #[error("--redis-url: {0}")]
    Redis(#[from] redis::RedisError),
    /// The schema belongs to a newer version, or a migration is wrong.
    #[error(transparent)]
    Migration(StoreError),
}

/// A bound session-svc.
#[derive(Debug)]
pub struct App {
    bound: Bound,
    token: MeshToken,
    store: Store,
    redis: redis::Client,
    config: Config,
    shutdown: CancellationToken,
}

impl App {
    /// Reads secrets and binds; nothing is served yet.
    pub async fn build(config: Config, shutdown: CancellationToken) -> Result<Self, AppError> {
        let token = MeshToken::load(&config.mesh_token_file)?;
        let hosts = HostPattern::new(&config.domain, config.edge_port);
        let store = Store::new(&config.database_url, config.database_connections, hosts)
            .map_err(AppError::Database)?;
        let redis = redis::Client::open(config.redis_url.as_str())?;
        let bound = Bound::bind(&config.listen).await?;
        Ok(Self {
            bound,
            token,
            store,
            redis,
            config,
            shutdown,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> &Address {
        self.bound.address()
    }

    /// Serves until shutdown, then lets what was begun end.
    pub async fn run(self) -> Result<(), AppError> {
        let Self {
            bound,
            token,
            store,
            redis,
            config,
            shutdown,
        } = self;
        let tasks = TaskTracker::new();
        let changes = Changes::new(&config.redis_prefix);
        let hosts = HostPattern::new(&config.domain, config.edge_port);
        let nodes = Nodes::new(store.clone(), token.clone(), config.heartbeat_interval);
        let limits = Limits {
            start: config.start_timeout,
            stop: config.stop_timeout,
            store: config.store_timeout,
            paused_retention: config.paused_retention,
            lease: config.lease,
            max_memory: config.max_memory,
            max_disk: config.max_disk,
        };
        let sessions = Sessions::new(
            store.clone(),
            nodes.clone(),
            mesh::connect(&config.template_addresses, &token),
            token.clone(),
            changes.clone(),
            hosts.clone(),
            limits,
            tasks.clone(),
        );
        let watches = Watches {
            store: store.clone(),
            changes: changes.clone(),
            hosts,
            tasks: tasks.clone(),
            heartbeat: config.watch_heartbeat,
            shutdown: shutdown.clone(),
        };
        let audit = Audit {
            store: store.clone(),
            nodes: nodes.clone(),
            sessions: sessions.clone(),
        };
        let registry = Registry {
            store: store.clone(),
            nodes,
            sessions: sessions.clone(),
            audit: audit.clone(),
            tasks: tasks.clone(),
            shutdown: shutdown.clone(),
            heartbeat_interval: config.heartbeat_interval,
        };
        let reconciler = Reconciler {
            store: store.clone(),
            sessions: sessions.clone(),
            audit,
            node_dead_after: config.node_dead_after,
            audit_interval: config.audit_interval,
            lease: config.lease,
            retention: config.retention,
        };
        let catalog = Catalog::new(
            store.clone(),
            changes.clone(),
            redis.clone(),
            &config.redis_prefix,
        );
        let background = TaskTracker::new();
        let (migrated, fate) = tokio::sync::oneshot::channel();
        let stop = shutdown.clone();
        let work = async move {
            let outcome = migrate(&store).await;
            let ready = outcome.is_ok();
            // Nobody waits for it once serving has ended.
            let _ = migrated.send(outcome);
            if ready {
                tokio::join!(
                    changes.run(redis, stop.clone()),
                    catalog.run(stop.clone()),
                    reconciler.run(stop)
                );
            }
        };
        let ends = shutdown.clone();
        let work = Box::pin(work);
        background.spawn(async move { ends.run_until_cancelled(work).await });
        // With the database there, the first call finds it migrated; without it, calls are told so rather than kept waiting.
        let mut fate = Some(fate);
        if let Some(first) = &mut fate
            && let Ok(known) = tokio::time::timeout(MIGRATION_FIRST, first).await
        {
            if let Ok(Err(error)) = known {
                return Err(error);
            }
            fate = None;
        }

        let routes = Routes::new(SessionServiceServer::new(SessionApi { sessions, watches }))
            .add_service(NodeRegistryServiceServer::new(registry));
        let serving = Grpc::new("session-svc")
            .mesh_only(token)
            .reflect(&[
                "sandmesh.session.v1.SessionService",
                "sandmesh.node.v1.NodeRegistryService",
            ])
            .serve(bound, routes, shutdown.clone());
        tokio::pin!(serving);
        let served = tokio::select! {
            served = &mut serving => served.map_err(AppError::from),
            Err(error) = failed_migration(fate) => Err(error),
        };
        // Serving may have failed by itself; the rest must end all the same.
        shutdown.cancel();
        background.close();
        tasks.close();
        background.wait().await;
        if tokio::time::timeout(service_kit::serve::DRAIN_DEADLINE, tasks.wait())
            .await
            .is_err()
        {
            tracing::warn!("starts or stops are left to their leases");
        }
        served
    }
}

/// Answers only if a migration went wrong for good.
async fn failed_migration(
    fate: Option<tokio::sync::oneshot::Receiver<Result<(), AppError>>>,
) -> Result<std::convert::Infallible, AppError> {
    if let Some(fate) = fate
        && let Ok(Err(error)) = fate.await
    {
        return Err(error);
    }
    // It is done, or serving is about to end.
    std::future::pending().await
}

async fn migrate(store: &Store) -> Result<(), AppError> {
    loop {
        match store.migrate().await {
            Ok(()) => return Ok(()),
            // The database comes and goes; a migration that does not fit stays wrong.
            Err(
                error @ StoreError::Migration(
                    sqlx::migrate::MigrateError::VersionMismatch(_)
                    | sqlx::migrate::MigrateError::VersionMissing(_)
                    | sqlx::migrate::MigrateError::Dirty(_),
                ),
            ) => return Err(AppError::Migration(error)),
            Err(error) => tracing::warn!(%error, "waiting for the database"),
        }
        tokio::time::sleep(MIGRATION_RETRY).await;
    }
}
