//! `sandmesh.node.v1.NodeService`: conversion and nothing else.

use std::{pin::Pin, sync::Arc};

use futures::Stream;
use proto::{
    node::v1::{
        DeleteSnapshotRequest, DeleteSnapshotResponse, DrainNodeRequest, DrainNodeResponse,
        ForkSessionRequest, ForkSessionResponse, GetSessionMetricsRequest,
        GetSessionMetricsResponse, ListSessionsRequest, ListSessionsResponse, PauseSessionRequest,
        PauseSessionResponse, ResumeSessionRequest, ResumeSessionResponse, RollbackSessionRequest,
        RollbackSessionResponse, SnapshotSessionRequest, SnapshotSessionResponse,
        StartSessionRequest, StartSessionResponse, StopSessionRequest, StopSessionResponse,
        UpdateSessionRequest, UpdateSessionResponse, WatchSessionsRequest, WatchSessionsResponse,
        node_service_server::NodeService,
    },
    session::v1::{Network, PortAccess},
};
use service_kit::{
    errors::{Failure, Reason},
    ids::SessionId,
};
use tokio_util::task::TaskTracker;
use tonic::{Code, Request, Response, Status};

use crate::{
    driver::{Plan, Workshop},
    hosted::{Admitted, Hosted, Lookup, Phase, Session},
};

/// Serves this node.
#[derive(Debug)]
pub struct NodeApi {
    /// The sessions.
    pub hosted: Arc<Hosted>,
    /// What drivers work with.
    pub workshop: Arc<Workshop>,
    /// The drivers.
    pub drivers: TaskTracker,
    /// When this node-svc began.
    pub start_time: prost_types::Timestamp,
}

fn session_id(text: &str) -> Result<SessionId, Status> {
    SessionId::parse(text)
        .map_err(|error| Failure::field_invalid("session_id", error.to_string()).into_status())
}

fn required(field: &'static str) -> impl Fn() -> Status {
    move || Failure::field_invalid(field, "is required").into_status()
}

fn port_access(network: &Network) -> PortAccess {
    match network.port_access() {
        PortAccess::Token => PortAccess::Token,
        _ => PortAccess::Public,
    }
}

impl NodeApi {
    async fn stop(&self, id: &SessionId) {
        if let Lookup::Here(session) = self.hosted.lookup(id) {
            session.stop.cancel();
            session.ended().await;
        }
    }
}

#[tonic::async_trait]
impl NodeService for NodeApi {
    async fn start_session(
        &self,
        request: Request<StartSessionRequest>,
    ) -> Result<Response<StartSessionResponse>, Status> {
        let request = request.into_inner();
        let id = session_id(&request.session_id)?;
        let template = request.template.clone().ok_or_else(required("template"))?;
        let resources = request.resources.ok_or_else(required("resources"))?;
        let network = request.network.clone().ok_or_else(required("network"))?;
        if request.access_token_sha256.len() != 32 {
            return Err(Failure::field_invalid("access_token_sha256", "must be 32 bytes").into());
        }
        let session = Session::new(
            id.clone(),
            request.access_token_sha256.clone(),
            resources,
            port_access(&network),
        );
        let admitted = self.hosted.admit(session).map_err(|full| {
            Failure::new(Code::ResourceExhausted, Reason::NODE_FULL, full.to_string())
                .with("freeSessions", full.free_sessions)
                .with("freeMemoryBytes", full.free_memory)
                .into_status()
        })?;
        let mut steps = Vec::new();
        let session = match admitted {
            Admitted::Here(session) => session,
            Admitted::New(session) => {
                let plan = Plan {
                    request,
                    template,
                    internet: network.internet_access.unwrap_or(true),
                    span: tracing::Span::current(),
                };
                let (tell, told) = tokio::sync::oneshot::channel();
                self.drivers.spawn(Arc::clone(&self.workshop).drive(
                    Arc::clone(&session),
                    plan,
                    tell,
                ));
                // An error means that it did not start; the phase says why.
                steps = told.await.unwrap_or_default();
                session
            }
        };
        let mut phase = session.phase();
        let settled = phase
            .wait_for(|phase| !matches!(phase, Phase::Starting | Phase::Stopping))
            .await;
        match settled.as_deref() {
            Ok(Phase::Running(_)) => Ok(Response::new(StartSessionResponse { steps })),
            Ok(Phase::Ended(ended)) => {
                let reason = Reason::new(start_reason(&ended.reason));
                Err(Failure::new(Code::Aborted, reason, ended.message.clone())
                    .with("sessionId", &id)
                    .into())
            }
            _ => Err(Failure::new(
                Code::Internal,
                Reason::INTERNAL,
                "the session's driver ended",
            )
            .into()),
        }
    }

    async fn pause_session(
        &self,
        _: Request<PauseSessionRequest>,
    ) -> Result<Response<PauseSessionResponse>, Status> {
        Err(Failure::not_yet("PauseSession").into())
    }

    async fn resume_session(
        &self,
        _: Request<ResumeSessionRequest>,
    ) -> Result<Response<ResumeSessionResponse>, Status> {
        Err(Failure::not_yet("ResumeSession").into())
    }

    async fn fork_session(
        &self,
        _: Request<ForkSessionRequest>,
    ) -> Result<Response<ForkSessionResponse>, Status> {
        Err(Failure::not_yet("ForkSession").into())
    }

    async fn snapshot_session(
        &self,
        _: Request<SnapshotSessionRequest>,
    ) -> Result<Response<SnapshotSessionResponse>, Status> {
        Err(Failure::not_yet("SnapshotSession").into())
    }

    async fn rollback_session(
        &self,
        _: Request<RollbackSessionRequest>,
    ) -> Result<Response<RollbackSessionResponse>, Status> {
        Err(Failure::not_yet("RollbackSession").into())
    }

    async fn delete_snapshot(
        &self,
        _: Request<DeleteSnapshotRequest>,
    ) -> Result<Response<DeleteSnapshotResponse>, Status> {
        Err(Failure::not_yet("DeleteSnapshot").into())
    }

    async fn get_session_metrics(
        &self,
        _: Request<GetSessionMetricsRequest>,
    ) -> Result<Response<GetSessionMetricsResponse>, Status> {
        Err(Failure::not_yet("GetSessionMetrics").into())
    }

    async fn update_session(
        &self,
        request: Request<UpdateSessionRequest>,
    ) -> Result<Response<UpdateSessionResponse>, Status> {
        let request = request.into_inner();
        let id = session_id(&request.session_id)?;
        let network = request.network.ok_or_else(required("network"))?;
        let Lookup::Here(session) = self.hosted.lookup(&id) else {
            return Err(
                Failure::new(Code::NotFound, Reason::SESSION_UNKNOWN, "not on this node")
                    .with("sessionId", &id)
                    .into(),
            );
        };
        session.set_port_access(port_access(&network));
        Ok(Response::new(UpdateSessionResponse {}))
    }

    async fn stop_session(
        &self,
        request: Request<StopSessionRequest>,
    ) -> Result<Response<StopSessionResponse>, Status> {
        let id = session_id(&request.get_ref().session_id)?;
        self.stop(&id).await;
        Ok(Response::new(StopSessionResponse {}))
    }

    async fn list_sessions(
        &self,
        _: Request<ListSessionsRequest>,
    ) -> Result<Response<ListSessionsResponse>, Status> {
        Ok(Response::new(ListSessionsResponse {
            sessions: self.hosted.listing(),
            start_time: Some(self.start_time),
        }))
    }

    type WatchSessionsStream =
        Pin<Box<dyn Stream<Item = Result<WatchSessionsResponse, Status>> + Send>>;

    async fn watch_sessions(
        &self,
        _: Request<WatchSessionsRequest>,
    ) -> Result<Response<Self::WatchSessionsStream>, Status> {
        Err(Failure::not_yet("NodeService.WatchSessions").into())
    }

    async fn drain_node(
        &self,
        request: Request<DrainNodeRequest>,
    ) -> Result<Response<DrainNodeResponse>, Status> {
        self.hosted.set_draining(request.get_ref().draining);
        Ok(Response::new(DrainNodeResponse {}))
    }
}

/// The words a start can end with; they are the only ones a caller will see as a reason.
fn start_reason(reason: &str) -> &'static str {
    const KNOWN: [&str; 9] = [
        "ARTIFACT_UNAVAILABLE",
        "NETWORK_SLOT_FAILED",
        "NODE_DISK_FULL",
        "DISK_FAILED",
        "VMM_FAILED",
        "NODE_DISK_FAILED",
        "CONFIGURE_FAILED",
        "START_TIMEOUT",
        "STOP_REQUESTED",
    ];
    KNOWN
        .into_iter()
        .find(|known| *known == reason)
        .unwrap_or("START_FAILED")
}
