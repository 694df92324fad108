//! `sandmesh.session.v1.SessionService`.

use std::{collections::BTreeMap, pin::Pin, time::Duration};

use futures::{Stream, StreamExt as _};
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
    session_service_server::SessionService,
};
use service_kit::{
    errors::{Failure, reason_of},
    mesh::Caller,
    readiness,
};
use tonic::{Request, Response, Status};

use super::{
    fields::{
        checkpoint_id, decode_page_token, encode_page_token, network, on_timeout, page_size,
        session_id, timeout,
    },
    limits,
};
use crate::{
    errors::SessionError,
    lifecycle::State,
    session::{Checkpoint, EndReason, Session, wire_duration},
    sessions::{NewFork, NewSession, Sessions, set_time_to_live},
    store::Filter,
    watch::Watches,
};

const DEFAULT_TIMEOUT: Duration = Duration::from_mins(5);
const MOST_CHILDREN: u32 = 100;
/// A checkpoint's name.
const LONGEST_NAME: usize = 63;

/// Serves sessions.
#[derive(Debug)]
pub struct SessionApi {
    /// The sessions.
    pub sessions: Sessions,
    /// Watches and histories of them.
    pub watches: Watches,
}

/// Who did it, in events.
fn actor(caller: &Caller) -> String {
    format!("team:{}", caller.team)
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl SessionService for SessionApi {
    async fn create_session(
        &self,
        request: Request<CreateSessionRequest>,
    ) -> Result<Response<CreateSessionResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        limits::template(&request.template)?;
        limits::metadata(&request.metadata)?;
        limits::env(&request.env)?;
        limits::request_id(&request.request_id)?;
        let new = NewSession {
            timeout: timeout(request.timeout, Some(DEFAULT_TIMEOUT))?,
            resources: request.resources.unwrap_or_default(),
            network: network(request.network.clone())?,
            on_timeout: on_timeout(request.on_timeout()),
            template: request.template,
            metadata: request.metadata.into_iter().collect(),
            env: request.env.into_iter().collect(),
            wake_on_request: request.wake_on_request,
            request_id: Some(request.request_id).filter(|id| !id.is_empty()),
        };
        let ready = request.wait_for_port;
        if let Some(ready) = &ready {
            readiness::check(ready).map_err(|(field, rule)| Failure::field_invalid(field, rule))?;
        }
        let session = Box::pin(self.sessions.create(&caller, new)).await?;
        if let Some(ready) = ready {
            self.sessions.wait_for_port(&session, ready).await?;
        }
        Ok(Response::new(CreateSessionResponse {
            session: Some(self.sessions.for_owner(&session)),
        }))
    }

    async fn get_session(
        &self,
        request: Request<GetSessionRequest>,
    ) -> Result<Response<GetSessionResponse>, Status> {
        let caller = Caller::of(&request)?;
        let id = session_id(&request.get_ref().session_id)?;
        let session = self.sessions.get(&caller, &id).await?;
        Ok(Response::new(GetSessionResponse {
            session: Some(self.sessions.for_owner(&session)),
        }))
    }

    async fn list_sessions(
        &self,
        request: Request<ListSessionsRequest>,
    ) -> Result<Response<ListSessionsResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let states = request.states.iter().map(|number| {
            State::from_wire(*number)
                .ok_or_else(|| Failure::field_invalid("states", "holds a number that is no state"))
        });
        limits::metadata(&request.metadata)?;
        let filter = Filter {
            team: caller.team,
            states: states.collect::<Result<_, _>>()?,
            metadata: request.metadata.into_iter().collect(),
            template: Some(request.template).filter(|name| !name.is_empty()),
            after: decode_page_token(&request.page_token)?,
            limit: page_size(request.page_size),
        };
        let sessions = self.sessions.list(&filter).await?;
        let full = i64::try_from(sessions.len()).is_ok_and(|count| count == filter.limit);
        let next_page_token = sessions
            .last()
            .filter(|_| full)
            .map(|session| encode_page_token(session.create_time.0, session.id.as_str()))
            .unwrap_or_default();
        let sessions = sessions
            .iter()
            .map(|session| self.sessions.for_listing(session))
            .collect();
        Ok(Response::new(ListSessionsResponse {
            sessions,
            next_page_token,
        }))
    }

    type WatchSessionsStream = Answers<WatchSessionsResponse>;

    async fn watch_sessions(
        &self,
        request: Request<WatchSessionsRequest>,
    ) -> Result<Response<Self::WatchSessionsStream>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let only = Some(request.session_id)
            .filter(|id| !id.is_empty())
            .map(|id| session_id(&id))
            .transpose()?;
        let after = Some(request.revision).filter(|text| !text.is_empty());
        let stream = self.watches.open(&caller, only, after.as_deref()).await?;
        Ok(Response::new(Box::pin(stream)))
    }

    async fn update_session(
        &self,
        request: Request<UpdateSessionRequest>,
    ) -> Result<Response<UpdateSessionResponse>, Status> {
        const FIELDS: [&str; 8] = [
            "metadata",
            "on_timeout",
            "wake_on_request",
            "network.port_access",
            "network.internet_access",
            "network.egress",
            "network.egress_bytes_per_second",
            "network.ingress_bytes_per_second",
        ];
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let id = session_id(&request.session_id)?;
        let paths = request.update_mask.clone().unwrap_or_default().paths;
        if paths.is_empty() || paths.iter().any(|path| !FIELDS.contains(&path.as_str())) {
            return Err(Failure::field_invalid(
                "update_mask",
                format!("must name some of {}", FIELDS.join(", ")),
            )
            .into());
        }
        limits::metadata(&request.metadata)?;
        let asked = |field: &str| paths.iter().any(|path| path == field);
        let on_timeout = on_timeout(request.on_timeout());
        let network = network(request.network)?;
        let metadata: BTreeMap<String, String> = request.metadata.into_iter().collect();
        // What its node must hear of.
        let is_pushed = paths
            .iter()
            .any(|path| path.starts_with("network.") || path == "wake_on_request");
        let session = self
            .sessions
            .edit(&caller, &id, "UPDATED", |session, now| {
                if asked("metadata") {
                    session.metadata.clone_from(&metadata);
                }
                if asked("on_timeout") {
                    session.on_timeout = on_timeout;
                }
                if asked("wake_on_request") {
                    session.wake_on_request = request.wake_on_request;
                }
                if asked("network.port_access") {
                    session.network.port_access = network.port_access;
                }
                if asked("network.internet_access") {
                    session.network.internet_access = network.internet_access;
                }
                if asked("network.egress") {
                    session.network.egress.clone_from(&network.egress);
                }
                if asked("network.egress_bytes_per_second") {
                    session.network.egress_rate = network.egress_rate;
                }
                if asked("network.ingress_bytes_per_second") {
                    session.network.ingress_rate = network.ingress_rate;
                }
                if is_pushed {
                    session.push_due = Some(self.sessions.push_due(now));
                }
            })
            .await?;
        if is_pushed {
            self.sessions.push(session.clone()).await?;
        }
        Ok(Response::new(UpdateSessionResponse {
            session: Some(self.sessions.for_owner(&session)),
        }))
    }

    async fn extend_session(
        &self,
        request: Request<ExtendSessionRequest>,
    ) -> Result<Response<ExtendSessionResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let id = session_id(&request.session_id)?;
        let timeout = timeout(request.timeout, None)?;
        let session = self
            .sessions
            .edit(&caller, &id, "EXTENDED", |session, now| {
                let timeout = i64::try_from(timeout.as_micros()).unwrap_or(i64::MAX);
                set_time_to_live(session, now, timeout, self.sessions.paused_retention());
            })
            .await?;
        Ok(Response::new(ExtendSessionResponse {
            session: Some(self.sessions.for_owner(&session)),
        }))
    }

    async fn pause_session(
        &self,
        request: Request<PauseSessionRequest>,
    ) -> Result<Response<PauseSessionResponse>, Status> {
        let caller = Caller::of(&request)?;
        let id = session_id(&request.get_ref().session_id)?;
        let session = self.sessions.get(&caller, &id).await?;
        let session = self.sessions.pause(session, None, &actor(&caller)).await?;
        Ok(Response::new(PauseSessionResponse {
            session: Some(self.sessions.for_owner(&session)),
        }))
    }

    async fn resume_session(
        &self,
        request: Request<ResumeSessionRequest>,
    ) -> Result<Response<ResumeSessionResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let id = session_id(&request.session_id)?;
        let timeout = match request.timeout {
            None => None,
            asked => Some(timeout(asked, None)?),
        };
        let session = self.sessions.get(&caller, &id).await?;
        let session = self
            .sessions
            .resume(session, timeout, None, &actor(&caller))
            .await?;
        Ok(Response::new(ResumeSessionResponse {
            session: Some(self.sessions.for_owner(&session)),
        }))
    }

    async fn fork_session(
        &self,
        request: Request<ForkSessionRequest>,
    ) -> Result<Response<ForkSessionResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let id = session_id(&request.session_id)?;
        limits::request_id(&request.request_id)?;
        if request.count > MOST_CHILDREN {
            let description = format!("must be at most {MOST_CHILDREN}");
            return Err(Failure::field_invalid("count", description).into());
        }
        let new = NewFork {
            count: request.count.max(1),
            timeout: timeout(request.timeout, Some(DEFAULT_TIMEOUT))?,
            request_id: Some(request.request_id).filter(|id| !id.is_empty()),
        };
        let parent = self.sessions.get(&caller, &id).await?;
        let forked = Box::pin(self.sessions.fork(&caller, parent, new)).await?;
        let shown = |children: &[Session]| {
            let shown = children.iter().map(|child| self.sessions.for_owner(child));
            shown.collect()
        };
        Ok(Response::new(ForkSessionResponse {
            sessions: shown(&forked.running),
            parent_stop_time: Some(wire_duration(forked.parent_stop_time)),
            failed: shown(&forked.failed),
        }))
    }

    async fn create_checkpoint(
        &self,
        request: Request<CreateCheckpointRequest>,
    ) -> Result<Response<CreateCheckpointResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let id = session_id(&request.session_id)?;
        limits::request_id(&request.request_id)?;
        if request.name.len() > LONGEST_NAME || request.name.chars().any(char::is_control) {
            let description =
                format!("must be at most {LONGEST_NAME} bytes without control characters");
            return Err(Failure::field_invalid("name", description).into());
        }
        let request_id = Some(request.request_id).filter(|id| !id.is_empty());
        let session = self.sessions.get(&caller, &id).await?;
        let made = self
            .sessions
            .create_checkpoint(&caller, session, request.name, request_id);
        let made = Box::pin(made).await?;
        Ok(Response::new(CreateCheckpointResponse {
            checkpoint: Some(made.wire()),
            stop_time: Some(wire_duration(made.stop_time)),
        }))
    }

    async fn list_checkpoints(
        &self,
        request: Request<ListCheckpointsRequest>,
    ) -> Result<Response<ListCheckpointsResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let id = session_id(&request.session_id)?;
        let session = self.sessions.get(&caller, &id).await?;
        let after = decode_page_token(&request.page_token)?;
        let limit = page_size(request.page_size);
        let listed = self
            .sessions
            .list_checkpoints(&session, after, limit)
            .await?;
        let full = i64::try_from(listed.len()).is_ok_and(|count| count == limit);
        let next_page_token = listed
            .last()
            .filter(|_| full)
            .map(|last| encode_page_token(last.create_time.0, last.id.as_str()))
            .unwrap_or_default();
        Ok(Response::new(ListCheckpointsResponse {
            checkpoints: listed.iter().map(Checkpoint::wire).collect(),
            next_page_token,
        }))
    }

    async fn rollback_session(
        &self,
        request: Request<RollbackSessionRequest>,
    ) -> Result<Response<RollbackSessionResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let id = session_id(&request.session_id)?;
        let to = checkpoint_id(&request.checkpoint_id)?;
        let session = self.sessions.get(&caller, &id).await?;
        let session = self.sessions.rollback(session, to, &actor(&caller)).await?;
        Ok(Response::new(RollbackSessionResponse {
            session: Some(self.sessions.for_owner(&session)),
        }))
    }

    async fn delete_checkpoint(
        &self,
        request: Request<DeleteCheckpointRequest>,
    ) -> Result<Response<DeleteCheckpointResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let id = session_id(&request.session_id)?;
        let checkpoint = checkpoint_id(&request.checkpoint_id)?;
        let session = self.sessions.get(&caller, &id).await?;
        self.sessions
            .delete_checkpoint(session, checkpoint, &actor(&caller))
            .await?;
        Ok(Response::new(DeleteCheckpointResponse {}))
    }

    async fn stop_session(
        &self,
        request: Request<StopSessionRequest>,
    ) -> Result<Response<StopSessionResponse>, Status> {
        let caller = Caller::of(&request)?;
        let id = session_id(&request.get_ref().session_id)?;
        let session = self.sessions.get(&caller, &id).await?;
        let end = EndReason::new("STOP_REQUESTED", "it was asked to stop");
        let session = self.sessions.stop(session, end, &actor(&caller)).await?;
        Ok(Response::new(StopSessionResponse {
            session: Some(self.sessions.for_listing(&session)),
        }))
    }

    async fn list_session_events(
        &self,
        request: Request<ListSessionEventsRequest>,
    ) -> Result<Response<ListSessionEventsResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let id = session_id(&request.session_id)?;
        self.sessions.get(&caller, &id).await?;
        let after = decode_page_token(&request.page_token)?.map_or(0, |(number, _)| number);
        let limit = page_size(request.page_size);
        let events = self.watches.history(&caller, &id, after, limit).await?;
        let full = i64::try_from(events.len()).is_ok_and(|count| count == limit);
        let next_page_token = events
            .last()
            .filter(|_| full)
            .map(|event| encode_page_token(i64::try_from(event.sequence).unwrap_or(i64::MAX), ""))
            .unwrap_or_default();
        Ok(Response::new(ListSessionEventsResponse {
            events,
            next_page_token,
        }))
    }

    type StreamSessionLogsStream = Answers<StreamSessionLogsResponse>;

    async fn stream_session_logs(
        &self,
        request: Request<StreamSessionLogsRequest>,
    ) -> Result<Response<Self::StreamSessionLogsStream>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let id = session_id(&request.session_id)?;
        let session = self.sessions.get(&caller, &id).await?;
        let messages = self.sessions.logs(&session, request).await?;
        let answers = messages.map(move |answer| match answer {
            Ok(answer) => Ok(answer.message.unwrap_or_default()),
            // The node's own words, or that it is gone.
            Err(status) if reason_of(&status).is_some() => Err(status),
            Err(_) => Err(SessionError::NodeUnreachable { id: id.clone() }.into()),
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn get_session_metrics(
        &self,
        request: Request<GetSessionMetricsRequest>,
    ) -> Result<Response<GetSessionMetricsResponse>, Status> {
        let caller = Caller::of(&request)?;
        let id = session_id(&request.get_ref().session_id)?;
        let session = self.sessions.get(&caller, &id).await?;
        Ok(Response::new(self.sessions.metrics(&session).await?))
    }
}
