//! Puts the control plane together: reads the registry, serves Envoys.

use std::time::Duration;

use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_server::AggregatedDiscoveryServiceServer;
use proto::node::v1::{
    ListNodesRequest, Node, node_registry_service_client::NodeRegistryServiceClient,
};
use service_kit::{
    address::Address,
    mesh::{self, MeshChannel, MeshToken, TokenError},
    serve::{Bound, Grpc, ServeError},
};
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Request, Status, service::Routes};

use crate::{
    config::Config,
    nodes,
    xds::{Connected, Discovery, Snapshot},
};

const CALL_TIMEOUT: Duration = Duration::from_secs(3);

/// The control plane cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// The listener.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// The mesh token.
    #[error("--mesh-token-file: {0}")]
    Token(#[from] TokenError),
}

/// A bound control plane.
#[derive(Debug)]
pub struct App {
    bound: Bound,
    token: MeshToken,
    config: Config,
    connected: Connected,
    shutdown: CancellationToken,
}

impl App {
    /// Binds; nothing is served yet.
    pub async fn build(config: Config, shutdown: CancellationToken) -> Result<Self, AppError> {
        let token = MeshToken::load(&config.mesh_token_file)?;
        let bound = Bound::bind(&config.listen).await?;
        Ok(Self {
            bound,
            token,
            config,
            connected: Connected::default(),
            shutdown,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> &Address {
        self.bound.address()
    }

    /// What connected Envoys have taken.
    pub fn connected(&self) -> Connected {
        self.connected.clone()
    }

    /// Serves until shutdown.
    pub async fn run(self) -> Result<(), AppError> {
        let Self {
            bound,
            token,
            config,
            connected,
            shutdown,
        } = self;
        let (publish, snapshots) = watch::channel(None);
        let registry =
            NodeRegistryServiceClient::new(mesh::connect(&config.session_addresses, &token));
        let tasks = TaskTracker::new();
        let refresh = config.refresh;
        let stop = shutdown.clone();
        tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                never = follow(registry, refresh, publish) => match never {},
            }
        });
        let discovery = Discovery {
            snapshots,
            connected,
            tasks: tasks.clone(),
            shutdown: shutdown.clone(),
        };
        let routes = Routes::new(AggregatedDiscoveryServiceServer::new(discovery));
        let served = Grpc::new("envoy-control")
            .mesh_only(token)
            .serve(bound, routes, shutdown.clone())
            .await;
        shutdown.cancel();
        tasks.close();
        tasks.wait().await;
        Ok(served?)
    }
}

/// Publishes a snapshot whenever the nodes changed. While the registry is away the last one stands.
async fn follow(
    registry: NodeRegistryServiceClient<MeshChannel>,
    refresh: Duration,
    publish: watch::Sender<Option<Snapshot>>,
) -> std::convert::Infallible {
    // Versions must grow over restarts, or an Envoy would take a new one for one it has.
    let mut version = u64::try_from(jiff::Timestamp::now().as_microsecond()).unwrap_or_default();
    let mut away = false;
    loop {
        match list(&registry).await {
            Ok(nodes) => {
                away = false;
                let endpoints = nodes::endpoints(&nodes);
                let changed = publish
                    .borrow()
                    .as_ref()
                    .is_none_or(|last| last.endpoints != endpoints);
                if changed {
                    version += 1;
                    tracing::info!(version, nodes = nodes.len(), "nodes changed");
                    metrics::gauge!("sandmesh_envoy_nodes").set(nodes.len() as f64);
                    publish.send_replace(Some(Snapshot { version, endpoints }));
                }
            }
            Err(status) if !away => {
                away = true;
                tracing::warn!(%status, "the registry is away; the last nodes stand");
            }
            Err(_) => {}
        }
        tokio::time::sleep(refresh).await;
    }
}

async fn list(registry: &NodeRegistryServiceClient<MeshChannel>) -> Result<Vec<Node>, Status> {
    let mut nodes = Vec::new();
    let mut page_token = String::new();
    loop {
        let mut request = Request::new(ListNodesRequest {
            include_dead: false,
            page_size: 1000,
            page_token,
        });
        request.set_timeout(CALL_TIMEOUT);
        let answer = registry.clone().list_nodes(request).await?.into_inner();
        nodes.extend(answer.nodes);
        page_token = answer.next_page_token;
        if page_token.is_empty() {
            return Ok(nodes);
        }
    }
}
