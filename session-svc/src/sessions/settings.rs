//! Telling the node of a session what changed about it.
//!
//! A change is in the row first, marked as due (`push_due`); the mark goes only once the node has taken exactly what the row says.
//! Until then every replica that finds it over time tells the node again, so a rule that its owner was told of is enforced whoever
//! dies.

use std::time::Duration;

use proto::{
    node::v1::{
        GetSessionMetricsRequest, StreamSessionLogsRequest, StreamSessionLogsResponse,
        UpdateSessionRequest, WaitForPortRequest,
    },
    session::v1 as wire,
};

use service_kit::readiness;
use tonic::{Request, Streaming};

use super::{
    SessionError, Sessions, UPDATE_TRIES,
    node_call::{Answer, within},
};
use crate::{
    lifecycle::State,
    session::{Micros, Session},
};

const METRICS_LIMIT: Duration = Duration::from_secs(5);
const LOGS_LIMIT: Duration = Duration::from_secs(10);
/// For the node to say how a wait ended, beyond the wait itself.
const WAIT_ANSWER: Duration = Duration::from_secs(10);

impl Sessions {
    /// When a change of settings is due to be told by another replica, if this one does not.
    pub fn push_due(&self, now: Micros) -> Micros {
        now.plus(self.limits.stop + self.limits.lease)
    }

    /// Tells the node of a session its network settings and whether a call wakes it, as the row says when it is done.
    pub async fn push(&self, mut session: Session) -> Result<(), SessionError> {
        let limit = self.limits.stop;
        for _ in 0..UPDATE_TRIES {
            if session.state.is_final() || session.state == State::Stopping {
                return Ok(());
            }
            let request = UpdateSessionRequest {
                session_id: session.id.to_string(),
                network: Some(session.network.wire()),
                wake_on_request: Some(session.wake_on_request),
            };
            let asked = self.ask(&session, limit, |mut node| async move {
                node.update_session(within(limit, request)).await
            });
            match asked.await? {
                Answer::Done(_) => {}
                Answer::Refused(status) => {
                    return Err(SessionError::Refused {
                        id: session.id,
                        status,
                    });
                }
                Answer::Unclear => return Err(SessionError::NodeUnreachable { id: session.id }),
            }
            // What was told last must be what the row says, however two changes at once overtook each other on their way.
            let newest = self.newest(session.id.clone()).await?;
            let is_told = newest.network == session.network
                && newest.wake_on_request == session.wake_on_request;
            if is_told && (newest.push_due.is_none() || self.store.set_push(&newest, None).await?) {
                return Ok(());
            }
            session = newest;
        }
        Err(SessionError::Contended(session.id))
    }

    /// Waits until somebody listens on a port of a running session; it runs on if nobody does.
    pub async fn wait_for_port(
        &self,
        session: &Session,
        ready: wire::PortReadiness,
    ) -> Result<(), SessionError> {
        let limit = readiness::check(&ready).map_err(|(field, rule)| SessionError::Invalid {
            field,
            description: rule.into(),
        })?;
        let limit = limit + WAIT_ANSWER;
        let request = WaitForPortRequest {
            session_id: session.id.to_string(),
            ready: Some(ready),
        };
        let asked = self.ask(session, limit, |mut node| async move {
            node.wait_for_port(within(limit, request)).await
        });
        match asked.await? {
            Answer::Done(_) => Ok(()),
            Answer::Refused(status) => Err(SessionError::Refused {
                id: session.id.clone(),
                status,
            }),
            Answer::Unclear => Err(SessionError::NodeUnreachable {
                id: session.id.clone(),
            }),
        }
    }

    /// What is kept of a session's logs on its node.
    pub async fn logs(
        &self,
        session: &Session,
        request: wire::StreamSessionLogsRequest,
    ) -> Result<Streaming<StreamSessionLogsResponse>, SessionError> {
        let request = StreamSessionLogsRequest {
            request: Some(request),
        };
        // The limit is for the answer to begin: a stream that is followed has no end of its own.
        let asked = self.ask(session, LOGS_LIMIT, |mut node| async move {
            node.stream_session_logs(Request::new(request)).await
        });
        let id = session.id.clone();
        match asked.await? {
            Answer::Done(messages) => Ok(messages),
            Answer::Refused(status) => Err(SessionError::Refused { id, status }),
            Answer::Unclear => Err(SessionError::NodeUnreachable { id }),
        }
    }

    /// What a session uses now.
    pub async fn metrics(
        &self,
        session: &Session,
    ) -> Result<wire::GetSessionMetricsResponse, SessionError> {
        match session.state {
            State::Paused => Ok(wire::GetSessionMetricsResponse {
                time: Some(Micros::now().wire()),
                cpu_time: Some(prost_types::Duration::default()),
                disk_bytes: session.stored_bytes,
                ..wire::GetSessionMetricsResponse::default()
            }),
            State::Running | State::Pausing | State::Resuming => {
                let request = GetSessionMetricsRequest {
                    session_id: session.id.to_string(),
                };
                let asked = self.ask(session, METRICS_LIMIT, |mut node| async move {
                    node.get_session_metrics(within(METRICS_LIMIT, request))
                        .await
                });
                match asked.await? {
                    Answer::Done(answer) => Ok(answer.metrics.unwrap_or_default()),
                    Answer::Refused(status) => Err(SessionError::Refused {
                        id: session.id.clone(),
                        status,
                    }),
                    Answer::Unclear => Err(SessionError::NodeUnreachable {
                        id: session.id.clone(),
                    }),
                }
            }
            state => Err(SessionError::WrongState {
                id: session.id.clone(),
                state,
            }),
        }
    }
}
