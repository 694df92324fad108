//! `sandmesh.node.v1.NodeRegistryService`.

use std::time::Duration;

use proto::node::v1::{
    HeartbeatRequest, HeartbeatResponse, ListNodesRequest, ListNodesResponse,
    NodeRegistryServiceDrainNodeRequest, NodeRegistryServiceDrainNodeResponse, RegisterNodeRequest,
    RegisterNodeResponse, WakeSessionRequest, WakeSessionResponse,
    node_registry_service_server::NodeRegistryService,
};
use service_kit::{errors::Failure, ids::NodeId};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Request, Response, Status};

use super::fields;
use crate::{
    audit::Audit,
    nodes::Nodes,
    session::Micros,
    sessions::Sessions,
    store::{Registration, Store},
};

/// After a registration; longer than what a listing says nothing about.
const AUDIT_AGAIN: Duration = Duration::from_secs(4);

/// Serves the registry.
#[derive(Debug)]
pub struct Registry {
    /// The rows.
    pub store: Store,
    /// The nodes.
    pub nodes: Nodes,
    /// The sessions on them.
    pub sessions: Sessions,
    /// What nodes really host.
    pub audit: Audit,
    /// Joined at shutdown.
    pub tasks: TaskTracker,
    /// Ends what waits.
    pub shutdown: CancellationToken,
    /// How often nodes are asked to send heartbeats.
    pub heartbeat_interval: Duration,
}

fn node_id(text: &str) -> Result<NodeId, Status> {
    NodeId::parse(text)
        .map_err(|error| Failure::field_invalid("node_id", error.to_string()).into_status())
}

fn store_error(error: crate::store::StoreError) -> Status {
    Failure::from(error).into_status()
}

#[tonic::async_trait]
impl NodeRegistryService for Registry {
    async fn register_node(
        &self,
        request: Request<RegisterNodeRequest>,
    ) -> Result<Response<RegisterNodeResponse>, Status> {
        let RegisterNodeRequest { node, sessions } = request.into_inner();
        let description =
            node.ok_or_else(|| Failure::field_invalid("node", "is required").into_status())?;
        let id = node_id(&description.node_id)?;
        let listed_at = Micros::now();
        let started = description.start_time.map(Micros::from);
        let tag = self
            .nodes
            .register(&Registration {
                node_id: id.clone(),
                description,
            })
            .await
            .map_err(store_error)?;
        let audit = &self.audit;
        audit.compare(&id, &sessions, listed_at, started).await?;
        let stop_session_ids = audit.unwanted(&id, &sessions).await.map_err(store_error)?;
        // Its listing says nothing about sessions that were started around now: ask once more when that is over.
        let (again, node) = (self.audit.clone(), id.clone());
        let shutdown = self.shutdown.clone();
        let known = self.store.node(&id).await.map_err(store_error)?;
        let is_drained = known.is_some_and(|known| known.drain);
        self.tasks.spawn(async move {
            // It has forgotten with its restart that it is to take no new sessions. None is sent there anyway.
            if is_drained && let Err(error) = again.sessions.tell_to_drain(&node, true).await {
                tracing::warn!(node_id = %node, %error, "a node that is to be drained was not told so");
            }
            let later = tokio::time::sleep(AUDIT_AGAIN);
            if shutdown.run_until_cancelled(later).await.is_none() {
                return;
            }
            if let Err(error) = again.ask(&node).await {
                tracing::warn!(node_id = %node, %error, "a node could not be audited after it registered");
            }
        });
        tracing::info!(node_id = %id, home_tag = %tag, sessions = sessions.len(), "node registered");
        Ok(Response::new(RegisterNodeResponse {
            home_tag: tag.to_string(),
            heartbeat_interval: prost_types::Duration::try_from(self.heartbeat_interval).ok(),
            stop_session_ids,
        }))
    }

    async fn heartbeat(
        &self,
        request: Request<HeartbeatRequest>,
    ) -> Result<Response<HeartbeatResponse>, Status> {
        let request = request.into_inner();
        let id = node_id(&request.node_id)?;
        let known = self
            .store
            .heartbeat(
                &id,
                &request.incarnation,
                request.used,
                request.draining,
                Micros::now(),
            )
            .await
            .map_err(store_error)?;
        if !known {
            return Ok(Response::new(HeartbeatResponse {
                register: true,
                ..HeartbeatResponse::default()
            }));
        }
        // Before the ends: what has ended gets no events any more.
        let mut acknowledged_notices = 0;
        for notice in &request.notices {
            self.sessions.notice(&id, notice).await?;
            acknowledged_notices += 1;
        }
        let mut acknowledged_session_ids = Vec::new();
        for ended in &request.ended {
            self.audit.note_end(&id, ended).await?;
            acknowledged_session_ids.push(ended.session_id.clone());
        }
        Ok(Response::new(HeartbeatResponse {
            register: false,
            acknowledged_session_ids,
            stop_session_ids: vec![],
            acknowledged_notices,
        }))
    }

    async fn list_nodes(
        &self,
        request: Request<ListNodesRequest>,
    ) -> Result<Response<ListNodesResponse>, Status> {
        let request = request.into_inner();
        let limit = match request.page_size {
            0 => 1000,
            size => i64::from(size.min(1000)),
        };
        let nodes = self
            .nodes
            .list(request.include_dead, &request.page_token, limit)
            .await
            .map_err(store_error)?;
        let full = i64::try_from(nodes.len()).is_ok_and(|count| count == limit);
        let next_page_token = nodes
            .last()
            .filter(|_| full)
            .map(|node| node.node_id.clone())
            .unwrap_or_default();
        Ok(Response::new(ListNodesResponse {
            nodes,
            next_page_token,
        }))
    }

    async fn wake_session(
        &self,
        request: Request<WakeSessionRequest>,
    ) -> Result<Response<WakeSessionResponse>, Status> {
        let request = request.into_inner();
        let id = fields::session_id(&request.session_id)?;
        let node = node_id(&request.node_id)?;
        self.sessions.wake(&id, &node).await?;
        Ok(Response::new(WakeSessionResponse {}))
    }

    async fn drain_node(
        &self,
        request: Request<NodeRegistryServiceDrainNodeRequest>,
    ) -> Result<Response<NodeRegistryServiceDrainNodeResponse>, Status> {
        let request = request.into_inner();
        let node = node_id(&request.node_id)?;
        if request.pause && !request.draining {
            return Err(
                Failure::field_invalid("pause", "makes sense only with draining").into_status(),
            );
        }
        let drained = self
            .sessions
            .drain(node, request.draining, request.pause)
            .await?;
        Ok(Response::new(NodeRegistryServiceDrainNodeResponse {
            paused: drained.paused,
            running: drained.running,
        }))
    }
}
