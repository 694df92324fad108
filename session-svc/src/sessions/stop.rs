//! From whatever it is to its end.

use std::time::Duration;

use proto::{node::v1::StopSessionRequest, session::v1::OnTimeout};
use tonic::Request;

use super::{Happening, SessionError, Sessions};
use crate::{
    lifecycle::State,
    session::{EndReason, Micros, Session},
    store::NewEvent,
};

impl Sessions {
    /// Ends a session; returns when nothing of it is left on its node. Stopping twice is stopping once.
    pub async fn stop(
        &self,
        session: Session,
        end: EndReason,
        actor: &str,
    ) -> Result<Session, SessionError> {
        self.stop_if(session, None, end, actor).await
    }

    /// As [`Self::stop`]; with `entered`, only while it is in the state that it entered with that version.
    async fn stop_if(
        &self,
        session: Session,
        entered: Option<i64>,
        end: EndReason,
        actor: &str,
    ) -> Result<Session, SessionError> {
        let sessions = self.clone();
        let actor = actor.to_owned();
        self.owned(async move {
            let stopping = sessions.begin_stop(session, entered, end, &actor).await?;
            if stopping.state != State::Stopping {
                return Ok(stopping);
            }
            let limit = sessions.limits.stop;
            sessions.finish_stop(stopping, limit).await
        })
        .await
    }

    /// The first half of a stop: from here on it is being taken down, whoever does it.
    async fn begin_stop(
        &self,
        session: Session,
        entered: Option<i64>,
        end: EndReason,
        actor: &str,
    ) -> Result<Session, SessionError> {
        let lease = self.limits.lease;
        let event = NewEvent::new("STOPPING", actor).because(&*end.reason, &*end.message);
        let stopped = self.change_if(
            session,
            entered,
            Happening::StopAsked,
            event,
            |session, now| {
                session.lease_until = Some(now.plus(lease));
                session.end_reason = Some(end);
            },
        );
        Ok(stopped.await?.0)
    }

    /// Ends or pauses a session whose deadline has passed; one that was paused or resumed since it was read is left alone.
    pub async fn expire(&self, session: Session) -> Result<Session, SessionError> {
        let entered = Some(session.state_version);
        let over = EndReason::new("DEADLINE_EXPIRED", "its time to live was over");
        match (session.state, session.on_timeout) {
            (State::Paused, _) => {
                let end = EndReason::new("RETENTION_EXPIRED", "it was paused for too long");
                self.stop_if(session, entered, end, "deadline").await
            }
            (_, OnTimeout::Pause) => {
                self.pause_if(session, entered, Some(over), "deadline")
                    .await
            }
            _ => self.stop_if(session, entered, over, "deadline").await,
        }
    }

    /// The second half of a stop; also how an abandoned one is repeated.
    pub(super) async fn finish_stop(
        &self,
        stopping: Session,
        limit: Duration,
    ) -> Result<Session, SessionError> {
        self.holding(&stopping, self.tell_to_stop(&stopping, limit))
            .await?;
        let event = NewEvent::new("STOPPED", format!("node:{}", stopping.node_id));
        self.change(stopping, Happening::StopDone, event, |session, now| {
            session.end_time = Some(now);
            session.lease_until = None;
            session.stored_bytes = 0;
        })
        .await
    }

    pub(super) async fn tell_to_stop(
        &self,
        session: &Session,
        limit: Duration,
    ) -> Result<(), SessionError> {
        let unreachable = || SessionError::NodeUnreachable {
            id: session.id.clone(),
        };
        let node = self.nodes.reach(&session.node_id).await?;
        let mut node = node.ok_or_else(unreachable)?;
        let mut request = Request::new(StopSessionRequest {
            session_id: session.id.to_string(),
        });
        request.set_timeout(limit);
        match tokio::time::timeout(limit, node.stop_session(request)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(status)) => {
                tracing::warn!(session_id = session.id.short(), %status, "a node did not stop a session");
                Err(unreachable())
            }
            Err(_) => Err(unreachable()),
        }
    }

    /// Goes on with what a replica that is gone began; `session` must carry a lease of ours.
    pub async fn take_over(&self, session: Session) -> Result<Session, SessionError> {
        let sessions = self.clone();
        self.owned(async move {
            match session.state {
                // Its client cannot have learned its ID, and cannot ask for it again. So it is with the children of a fork, too:
                // the moment they were taken at is over, and the same request again is a new fork once none of them ran.
                State::Starting if session.request_id.is_none() => {
                    let end = EndReason::new(
                        "START_ABANDONED",
                        "its start was cut short, and nobody can ask for it again",
                    );
                    let told = sessions.tell_to_stop(&session, sessions.limits.stop);
                    sessions.holding(&session, told).await?;
                    sessions.fail(session, end).await
                }
                State::Pending | State::Starting => Box::pin(sessions.start(session)).await,
                State::Stopping => {
                    let limit = sessions.limits.stop;
                    sessions.finish_stop(session, limit).await
                }
                State::Pausing => sessions.finish_pause(session).await,
                State::Resuming => sessions.finish_resume(session).await,
                State::Running | State::Paused | State::Stopped | State::Failed | State::Lost => {
                    Ok(session)
                }
            }
        })
        .await
    }

    /// Notes that a session broke.
    pub async fn fail(&self, session: Session, end: EndReason) -> Result<Session, SessionError> {
        let event = NewEvent::new("FAILED", format!("node:{}", session.node_id))
            .because(&*end.reason, &*end.message);
        self.change(session, Happening::Broke, event, |session, now| {
            ended(session, now, end);
        })
        .await
    }

    /// Notes that a session's node is gone.
    pub async fn lose(
        &self,
        session: Session,
        end: EndReason,
        actor: &str,
    ) -> Result<Session, SessionError> {
        let event = NewEvent::new("LOST", actor).because(&*end.reason, &*end.message);
        self.change(session, Happening::NodeGone, event, |session, now| {
            ended(session, now, end);
        })
        .await
    }
}

fn ended(session: &mut Session, now: Micros, end: EndReason) {
    session.end_time = Some(now);
    session.end_reason.get_or_insert(end);
    session.lease_until = None;
    session.stored_bytes = 0;
    if session.start_time.is_none() {
        // A create that failed, whoever noticed, does not use its request ID up: another try with it is a new one.
        session.request_id = None;
    }
}
