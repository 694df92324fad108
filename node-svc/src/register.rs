//! This node in the registry: registers with all it hosts, then says it lives. The registry may be away for as long as it
//! likes; sandboxes do not care.

use std::{sync::Arc, time::Duration};

use proto::node::v1::{
    HeartbeatRequest, Node, RegisterNodeRequest,
    node_registry_service_client::NodeRegistryServiceClient,
};
use service_kit::{ids::SessionId, mesh::MeshChannel};
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Request, Status};

use crate::hosted::{Hosted, Lookup};

const RETRY: Duration = Duration::from_millis(500);
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
const DEFAULT_INTERVAL: Duration = Duration::from_secs(1);

/// Keeps this node registered.
#[derive(Debug)]
pub struct Registrar {
    /// The registry.
    pub registry: NodeRegistryServiceClient<MeshChannel>,
    /// What this node says of itself.
    pub node: Node,
    /// What it hosts.
    pub hosted: Arc<Hosted>,
    /// Joined at shutdown.
    pub tasks: TaskTracker,
    /// Hears the home tag once it is known.
    pub registered: watch::Sender<Option<String>>,
}

impl Registrar {
    /// Registers and sends heartbeats until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) {
        tokio::select! {
            () = shutdown.cancelled() => {}
            never = self.keep() => match never {},
        }
    }

    async fn keep(&self) -> std::convert::Infallible {
        loop {
            match self.register().await {
                Ok(interval) => {
                    let error = self.beat(interval).await;
                    tracing::info!(%error, "registering again");
                }
                Err(error) => {
                    tracing::warn!(%error, "this node cannot be registered right now");
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    async fn register(&self) -> Result<Duration, Status> {
        let node = Node {
            used: Some(self.hosted.used()),
            ..self.node.clone()
        };
        let mut request = Request::new(RegisterNodeRequest {
            node: Some(node),
            sessions: self.hosted.listing(),
        });
        request.set_timeout(CALL_TIMEOUT);
        let answer = self
            .registry
            .clone()
            .register_node(request)
            .await?
            .into_inner();
        self.end(&answer.stop_session_ids);
        tracing::info!(home_tag = answer.home_tag, "registered");
        self.registered.send_replace(Some(answer.home_tag));
        let interval = answer
            .heartbeat_interval
            .and_then(|interval| Duration::try_from(interval).ok());
        Ok(interval
            .filter(|interval| !interval.is_zero())
            .unwrap_or(DEFAULT_INTERVAL))
    }

    /// Sends heartbeats until the registry wants a registration; lost ones are only skipped.
    async fn beat(&self, interval: Duration) -> &'static str {
        let mut ticks = tokio::time::interval(interval);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let mut request = Request::new(HeartbeatRequest {
                node_id: self.node.node_id.clone(),
                incarnation: self.node.incarnation.clone(),
                used: Some(self.hosted.used()),
                draining: self.hosted.draining(),
                ended: self.hosted.unreported(),
                notices: self.hosted.notices(),
            });
            request.set_timeout(CALL_TIMEOUT);
            match self.registry.clone().heartbeat(request).await {
                Ok(answer) => {
                    let answer = answer.into_inner();
                    if answer.register {
                        return "the registry does not know this node any more";
                    }
                    self.hosted.acknowledged(&answer.acknowledged_session_ids);
                    let noted = usize::try_from(answer.acknowledged_notices);
                    self.hosted.noted(noted.unwrap_or(usize::MAX));
                    self.end(&answer.stop_session_ids);
                }
                Err(status) => tracing::debug!(%status, "a heartbeat was not heard"),
            }
        }
    }

    fn end(&self, ids: &[String]) {
        for id in ids.iter().filter_map(|id| SessionId::parse(id).ok()) {
            if let Lookup::Here(session) = self.hosted.lookup(&id) {
                tracing::warn!(
                    session_id = id.short(),
                    "the control plane does not count on this session any more"
                );
                session.stop.cancel();
            }
        }
    }
}
