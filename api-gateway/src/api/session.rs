//! `sandmesh.session.v1.SessionService`, passed on to session-svc.

use std::{pin::Pin, time::Duration};

use futures::{Stream, TryStreamExt as _};
use proto::session::v1::{
    CreateCheckpointRequest, CreateCheckpointResponse, CreateSessionRequest, CreateSessionResponse,
    DeleteCheckpointRequest, DeleteCheckpointResponse, ExtendSessionRequest, ExtendSessionResponse,
    ForkSessionRequest, ForkSessionResponse, GetSessionMetricsRequest, GetSessionMetricsResponse,
    GetSessionRequest, GetSessionResponse, ListCheckpointsRequest, ListCheckpointsResponse,
    ListSessionEventsRequest, ListSessionEventsResponse, ListSessionsRequest, ListSessionsResponse,
    PauseSessionRequest, PauseSessionResponse, ResumeSessionRequest, ResumeSessionResponse,
    RollbackSessionRequest, RollbackSessionResponse, StopSessionRequest, StopSessionResponse,
    StreamSessionLogsRequest, StreamSessionLogsResponse, UpdateSessionRequest,
    UpdateSessionResponse, WatchSessionsRequest, WatchSessionsResponse,
    session_service_client::SessionServiceClient, session_service_server::SessionService,
};
use service_kit::{mesh::MeshChannel, readiness};
use tonic::{Request, Response, Status};

use crate::{
    door::{Door, Limit, outward},
    validate,
};

/// Emulated guests take their time.
const CREATE_LIMIT: Duration = Duration::from_secs(150);

/// Sessions, for clients.
#[derive(Debug)]
pub struct SessionApi {
    /// The door.
    pub door: Door,
    /// session-svc.
    pub sessions: SessionServiceClient<MeshChannel>,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl SessionService for SessionApi {
    async fn create_session(
        &self,
        request: Request<CreateSessionRequest>,
    ) -> Result<Response<CreateSessionResponse>, Status> {
        let ready = request.get_ref().wait_for_port.as_ref();
        // What is wrong with it is said once the caller is known.
        let wait = ready
            .and_then(|ready| readiness::check(ready).ok())
            .unwrap_or_default();
        let request = self
            .door
            .enter(request, Limit::AtMost(CREATE_LIMIT + wait))
            .await?;
        validate::create_session(request.get_ref())?;
        self.sessions
            .clone()
            .create_session(request)
            .await
            .map_err(outward)
    }

    async fn get_session(
        &self,
        request: Request<GetSessionRequest>,
    ) -> Result<Response<GetSessionResponse>, Status> {
        let request = self.door.enter(request, Limit::Usual).await?;
        self.sessions
            .clone()
            .get_session(request)
            .await
            .map_err(outward)
    }

    async fn list_sessions(
        &self,
        request: Request<ListSessionsRequest>,
    ) -> Result<Response<ListSessionsResponse>, Status> {
        let request = self.door.enter(request, Limit::Usual).await?;
        self.sessions
            .clone()
            .list_sessions(request)
            .await
            .map_err(outward)
    }

    async fn update_session(
        &self,
        request: Request<UpdateSessionRequest>,
    ) -> Result<Response<UpdateSessionResponse>, Status> {
        let request = self.door.enter(request, Limit::Usual).await?;
        validate::update_session(request.get_ref())?;
        self.sessions
            .clone()
            .update_session(request)
            .await
            .map_err(outward)
    }

    async fn extend_session(
        &self,
        request: Request<ExtendSessionRequest>,
    ) -> Result<Response<ExtendSessionResponse>, Status> {
        let request = self.door.enter(request, Limit::Usual).await?;
        self.sessions
            .clone()
            .extend_session(request)
            .await
            .map_err(outward)
    }

    async fn pause_session(
        &self,
        request: Request<PauseSessionRequest>,
    ) -> Result<Response<PauseSessionResponse>, Status> {
        let request = self
            .door
            .enter(request, Limit::AtMost(CREATE_LIMIT))
            .await?;
        self.sessions
            .clone()
            .pause_session(request)
            .await
            .map_err(outward)
    }

    async fn resume_session(
        &self,
        request: Request<ResumeSessionRequest>,
    ) -> Result<Response<ResumeSessionResponse>, Status> {
        let request = self
            .door
            .enter(request, Limit::AtMost(CREATE_LIMIT))
            .await?;
        validate::resume_session(request.get_ref())?;
        self.sessions
            .clone()
            .resume_session(request)
            .await
            .map_err(outward)
    }

    async fn fork_session(
        &self,
        request: Request<ForkSessionRequest>,
    ) -> Result<Response<ForkSessionResponse>, Status> {
        let request = self
            .door
            .enter(request, Limit::AtMost(CREATE_LIMIT))
            .await?;
        validate::fork_session(request.get_ref())?;
        self.sessions
            .clone()
            .fork_session(request)
            .await
            .map_err(outward)
    }

    async fn create_checkpoint(
        &self,
        request: Request<CreateCheckpointRequest>,
    ) -> Result<Response<CreateCheckpointResponse>, Status> {
        let request = self
            .door
            .enter(request, Limit::AtMost(CREATE_LIMIT))
            .await?;
        validate::create_checkpoint(request.get_ref())?;
        self.sessions
            .clone()
            .create_checkpoint(request)
            .await
            .map_err(outward)
    }

    async fn list_checkpoints(
        &self,
        request: Request<ListCheckpointsRequest>,
    ) -> Result<Response<ListCheckpointsResponse>, Status> {
        let request = self.door.enter(request, Limit::Usual).await?;
        self.sessions
            .clone()
            .list_checkpoints(request)
            .await
            .map_err(outward)
    }

    async fn rollback_session(
        &self,
        request: Request<RollbackSessionRequest>,
    ) -> Result<Response<RollbackSessionResponse>, Status> {
        let request = self
            .door
            .enter(request, Limit::AtMost(CREATE_LIMIT))
            .await?;
        validate::rollback_session(request.get_ref())?;
        self.sessions
            .clone()
            .rollback_session(request)
            .await
            .map_err(outward)
    }

    async fn delete_checkpoint(
        &self,
        request: Request<DeleteCheckpointRequest>,
    ) -> Result<Response<DeleteCheckpointResponse>, Status> {
        let request = self.door.enter(request, Limit::Usual).await?;
        validate::delete_checkpoint(request.get_ref())?;
        self.sessions
            .clone()
            .delete_checkpoint(request)
            .await
            .map_err(outward)
    }

    async fn stop_session(
        &self,
        request: Request<StopSessionRequest>,
    ) -> Result<Response<StopSessionResponse>, Status> {
        let request = self.door.enter(request, Limit::Usual).await?;
        self.sessions
            .clone()
            .stop_session(request)
            .await
            .map_err(outward)
    }

    async fn list_session_events(
        &self,
        request: Request<ListSessionEventsRequest>,
    ) -> Result<Response<ListSessionEventsResponse>, Status> {
        let request = self.door.enter(request, Limit::Usual).await?;
        self.sessions
            .clone()
            .list_session_events(request)
            .await
            .map_err(outward)
    }

    async fn get_session_metrics(
        &self,
        request: Request<GetSessionMetricsRequest>,
    ) -> Result<Response<GetSessionMetricsResponse>, Status> {
        let request = self.door.enter(request, Limit::Usual).await?;
        self.sessions
            .clone()
            .get_session_metrics(request)
            .await
            .map_err(outward)
    }

    type WatchSessionsStream = Answers<WatchSessionsResponse>;

    async fn watch_sessions(
        &self,
        request: Request<WatchSessionsRequest>,
    ) -> Result<Response<Self::WatchSessionsStream>, Status> {
        let request = self.door.enter(request, Limit::None).await?;
        let answer = self
            .sessions
            .clone()
            .watch_sessions(request)
            .await
            .map_err(outward)?;
        Ok(answer.map(|stream| Box::pin(stream.map_err(outward)) as _))
    }

    type StreamSessionLogsStream = Answers<StreamSessionLogsResponse>;

    async fn stream_session_logs(
        &self,
        request: Request<StreamSessionLogsRequest>,
    ) -> Result<Response<Self::StreamSessionLogsStream>, Status> {
        let request = self.door.enter(request, Limit::None).await?;
        let answer = self
            .sessions
            .clone()
            .stream_session_logs(request)
            .await
            .map_err(outward)?;
        Ok(answer.map(|stream| Box::pin(stream.map_err(outward)) as _))
    }
}
