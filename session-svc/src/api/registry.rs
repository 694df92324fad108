//! `sandmesh.node.v1.NodeRegistryService`.

use std::{collections::HashSet, time::Duration};

use proto::node::v1::{
    HeartbeatRequest, HeartbeatResponse, HostedSession, ListNodesRequest, ListNodesResponse,
    RegisterNodeRequest, RegisterNodeResponse, node_registry_service_server::NodeRegistryService,
};
use service_kit::{
    errors::Failure,
    ids::{NodeId, SessionId},
};
use tonic::{Request, Response, Status};

use crate::{
    errors::SessionError,
    lifecycle::State,
    nodes::Nodes,
    session::{EndReason, Micros, Session},
    sessions::Sessions,
    store::{Registration, Store},
};

/// Serves the registry.
#[derive(Debug)]
pub struct Registry {
    /// The rows.
    pub store: Store,
    /// The nodes.
    pub nodes: Nodes,
    /// The sessions on them.
    pub sessions: Sessions,
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

impl Registry {
    /// Rows of this node that it does not host any more become Lost; a start that another replica is at is left to its lease.
    async fn reconcile(&self, node: &NodeId, hosted: &HashSet<String>) -> Result<(), Status> {
        let now = Micros::now();
        for session in self
            .store
            .living(Some(node), "", 10_000)
            .await
            .map_err(store_error)?
        {
            let being_moved = session.lease_until.is_some_and(|until| until > now);
            if hosted.contains(session.id.as_str()) || being_moved {
                continue;
            }
            let end = EndReason::new("NODE_RESTARTED", "its node restarted without it");
            self.sessions
                .lose(session, end, &format!("node:{node}"))
                .await?;
        }
        Ok(())
    }

    /// Sessions the node hosts and should not: they are final here, or another node's.
    async fn unwanted(
        &self,
        node: &NodeId,
        hosted: &[HostedSession],
    ) -> Result<Vec<String>, Status> {
        let mut unwanted = Vec::new();
        for hosted in hosted {
            let Ok(id) = SessionId::parse(&hosted.session_id) else {
                continue;
            };
            let known = self.store.get(&id).await.map_err(store_error)?;
            if known.is_none_or(|session| session.state.is_final() || session.node_id != *node) {
                unwanted.push(hosted.session_id.clone());
            }
        }
        Ok(unwanted)
    }

    async fn note_end(&self, node: &NodeId, hosted: &HostedSession) -> Result<bool, SessionError> {
        let Ok(id) = SessionId::parse(&hosted.session_id) else {
            return Ok(true);
        };
        let Some(session) = self.store.get(&id).await? else {
            return Ok(true);
        };
        if session.node_id != *node || session.state.is_final() || session.state == State::Stopping
        {
            return Ok(true);
        }
        let end = hosted.end_reason.clone().unwrap_or_default();
        let _: Session = self
            .sessions
            .fail(session, EndReason::new(end.reason, end.message))
            .await?;
        Ok(true)
    }
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
        let tag = self
            .nodes
            .register(&Registration {
                node_id: id.clone(),
                description,
            })
            .await
            .map_err(store_error)?;
        let hosted: HashSet<String> = sessions
            .iter()
            .map(|hosted| hosted.session_id.clone())
            .collect();
        self.reconcile(&id, &hosted).await?;
        let stop_session_ids = self.unwanted(&id, &sessions).await?;
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
        let mut acknowledged_session_ids = Vec::new();
        for ended in &request.ended {
            if self.note_end(&id, ended).await? {
                acknowledged_session_ids.push(ended.session_id.clone());
            }
        }
        Ok(Response::new(HeartbeatResponse {
            register: false,
            acknowledged_session_ids,
            stop_session_ids: vec![],
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
}
