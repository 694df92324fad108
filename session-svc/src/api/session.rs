//! `sandmesh.session.v1.SessionService`.

use std::{collections::BTreeMap, pin::Pin, time::Duration};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use futures::Stream;
use proto::session::v1::{
    self as wire, CreateSessionRequest, CreateSessionResponse, ExtendSessionRequest,
    ExtendSessionResponse, ForkSessionRequest, ForkSessionResponse, GetSessionMetricsRequest,
    GetSessionMetricsResponse, GetSessionRequest, GetSessionResponse, ListSessionEventsRequest,
    ListSessionEventsResponse, ListSessionsRequest, ListSessionsResponse, PauseSessionRequest,
    PauseSessionResponse, ResumeSessionRequest, ResumeSessionResponse, StopSessionRequest,
    StopSessionResponse, StreamSessionLogsRequest, StreamSessionLogsResponse, UpdateSessionRequest,
    UpdateSessionResponse, WatchSessionsRequest, WatchSessionsResponse,
    session_service_server::SessionService,
};
use service_kit::{
    errors::{Failure, Reason},
    ids::SessionId,
    mesh::Caller,
};
use tonic::{Code, Request, Response, Status};

use super::limits;
use crate::{
    lifecycle::State,
    session::EndReason,
    sessions::{NewSession, Sessions},
    store::Filter,
    watch::Watches,
};

const DEFAULT_TIMEOUT: Duration = Duration::from_mins(5);
const LONGEST_TIMEOUT: Duration = Duration::from_hours(24);
const DEFAULT_PAGE: u32 = 100;
const LARGEST_PAGE: u32 = 1000;

/// Serves sessions.
#[derive(Debug)]
pub struct SessionApi {
    /// The sessions.
    pub sessions: Sessions,
    /// Watches and histories of them.
    pub watches: Watches,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn session_id(text: &str) -> Result<SessionId, Status> {
    SessionId::parse(text).map_err(|error| {
        Failure::new(
            Code::InvalidArgument,
            Reason::SESSION_ID_MALFORMED,
            error.to_string(),
        )
        .field("session_id", error.to_string())
        .into_status()
    })
}

fn timeout(
    asked: Option<prost_types::Duration>,
    default: Option<Duration>,
) -> Result<Duration, Status> {
    let wrong = || Failure::field_invalid("timeout", "must be from 1 s to 24 h").into_status();
    let asked = match asked {
        Some(asked) => Duration::try_from(asked).map_err(|_| wrong())?,
        None => default.ok_or_else(wrong)?,
    };
    if (Duration::from_secs(1)..=LONGEST_TIMEOUT).contains(&asked) {
        Ok(asked)
    } else {
        Err(wrong())
    }
}

fn page_size(asked: u32) -> i64 {
    i64::from(if asked == 0 {
        DEFAULT_PAGE
    } else {
        asked.min(LARGEST_PAGE)
    })
}

fn port_access(network: Option<&wire::Network>) -> wire::PortAccess {
    match network.map(wire::Network::port_access) {
        Some(wire::PortAccess::Token) => wire::PortAccess::Token,
        _ => wire::PortAccess::Public,
    }
}

/// What nobody enforces yet is refused rather than ignored: its owner would count on it.
fn network_is_enforced(network: Option<&wire::Network>) -> Result<(), Status> {
    let Some(network) = network else {
        return Ok(());
    };
    for (field, is_asked) in [
        ("network.egress", network.egress.is_some()),
        (
            "network.egress_bytes_per_second",
            network.egress_bytes_per_second > 0,
        ),
        (
            "network.ingress_bytes_per_second",
            network.ingress_bytes_per_second > 0,
        ),
    ] {
        if is_asked {
            return Err(Failure::not_yet(field)
                .field(field, "leave it out; internet_access closes all of it")
                .into_status());
        }
    }
    Ok(())
}

fn on_timeout(asked: wire::OnTimeout) -> Result<wire::OnTimeout, Status> {
    match asked {
        wire::OnTimeout::Pause => Err(Failure::not_yet("on_timeout PAUSE")
            .field("on_timeout", "use STOP")
            .into_status()),
        _ => Ok(wire::OnTimeout::Stop),
    }
}

fn encode_page_token(time: i64, id: &str) -> String {
    URL_SAFE_NO_PAD.encode(format!("{time}/{id}"))
}

fn decode_page_token(token: &str) -> Result<Option<(i64, String)>, Status> {
    if token.is_empty() {
        return Ok(None);
    }
    let parse = || {
        let text = String::from_utf8(URL_SAFE_NO_PAD.decode(token).ok()?).ok()?;
        let (time, id) = text.split_once('/')?;
        Some((time.parse().ok()?, id.to_owned()))
    };
    parse().map(Some).ok_or_else(|| {
        Failure::field_invalid("page_token", "is not one this service gave out").into_status()
    })
}

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
        network_is_enforced(request.network.as_ref())?;
        let new = NewSession {
            timeout: timeout(request.timeout, Some(DEFAULT_TIMEOUT))?,
            resources: request.resources.unwrap_or_default(),
            port_access: port_access(request.network.as_ref()),
            internet_access: request
                .network
                .as_ref()
                .and_then(|network| network.internet_access)
                .unwrap_or(true),
            on_timeout: on_timeout(request.on_timeout())?,
            template: request.template,
            metadata: request.metadata.into_iter().collect(),
            env: request.env.into_iter().collect(),
            wake_on_request: request.wake_on_request,
            request_id: Some(request.request_id).filter(|id| !id.is_empty()),
        };
        let session = Box::pin(self.sessions.create(&caller, new)).await?;
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
        const FIELDS: [&str; 4] = [
            "metadata",
            "on_timeout",
            "wake_on_request",
            "network.port_access",
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
        let on_timeout = if asked("on_timeout") {
            on_timeout(request.on_timeout())?
        } else {
            wire::OnTimeout::Stop
        };
        let access = port_access(request.network.as_ref());
        let metadata: BTreeMap<String, String> = request.metadata.into_iter().collect();
        let session = self
            .sessions
            .edit(&caller, &id, "UPDATED", |session, _| {
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
                    session.port_access = access;
                }
            })
            .await?;
        if asked("network.port_access") {
            self.sessions.push_network(&session).await?;
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
                session.deadline = now.plus(timeout);
                session.timeout = i64::try_from(timeout.as_micros()).unwrap_or(i64::MAX);
            })
            .await?;
        Ok(Response::new(ExtendSessionResponse {
            session: Some(self.sessions.for_owner(&session)),
        }))
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

    async fn create_checkpoint(
        &self,
        _: Request<wire::CreateCheckpointRequest>,
    ) -> Result<Response<wire::CreateCheckpointResponse>, Status> {
        Err(Failure::not_yet("CreateCheckpoint").into())
    }

    async fn list_checkpoints(
        &self,
        _: Request<wire::ListCheckpointsRequest>,
    ) -> Result<Response<wire::ListCheckpointsResponse>, Status> {
        Err(Failure::not_yet("ListCheckpoints").into())
    }

    async fn rollback_session(
        &self,
        _: Request<wire::RollbackSessionRequest>,
    ) -> Result<Response<wire::RollbackSessionResponse>, Status> {
        Err(Failure::not_yet("RollbackSession").into())
    }

    async fn delete_checkpoint(
        &self,
        _: Request<wire::DeleteCheckpointRequest>,
    ) -> Result<Response<wire::DeleteCheckpointResponse>, Status> {
        Err(Failure::not_yet("DeleteCheckpoint").into())
    }

    async fn stop_session(
        &self,
        request: Request<StopSessionRequest>,
    ) -> Result<Response<StopSessionResponse>, Status> {
        let caller = Caller::of(&request)?;
        let id = session_id(&request.get_ref().session_id)?;
        let session = self.sessions.get(&caller, &id).await?;
        let end = EndReason::new("STOP_REQUESTED", "it was asked to stop");
        let session = self
            .sessions
            .stop(session, end, &format!("team:{}", caller.team))
            .await?;
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
        _: Request<StreamSessionLogsRequest>,
    ) -> Result<Response<Self::StreamSessionLogsStream>, Status> {
        Err(Failure::not_yet("StreamSessionLogs").into())
    }

    async fn get_session_metrics(
        &self,
        _: Request<GetSessionMetricsRequest>,
    ) -> Result<Response<GetSessionMetricsResponse>, Status> {
        Err(Failure::not_yet("GetSessionMetrics").into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_that_nobody_enforces_are_refused() {
        let open = wire::Network::default();
        assert!(network_is_enforced(None).is_ok() && network_is_enforced(Some(&open)).is_ok());
        let ruled = wire::Network {
            egress: Some(wire::Egress::default()),
            ..open.clone()
        };
        let slowed = wire::Network {
            egress_bytes_per_second: 1 << 20,
            ..open
        };
        for network in [ruled, slowed] {
            let refused = network_is_enforced(Some(&network)).unwrap_err();
            assert_eq!(refused.code(), Code::Unimplemented);
        }
    }
}
