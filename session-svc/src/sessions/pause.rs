//! From Running to Paused and back.
//!
//! The intent is a row first (Pausing, Resuming), then a call to the node. A node that refuses leaves the session as it was; one
//! that does not answer is asked again, by whichever replica has the lease, until it does, or says in a listing what became of it
//! (`audit.rs`). The time to live does not count down meanwhile.

use std::time::Duration;

use proto::node::v1::{PauseSessionRequest, ResumeSessionRequest};
use service_kit::ids::{NodeId, SessionId};

use super::{
    Happening, SessionError, Sessions,
    node_call::{Answer, reason, within},
};
use crate::{
    lifecycle::State,
    session::{EndReason, Micros, Session},
    store::NewEvent,
};

/// Less than this left of a time to live is nothing: the shortest that can be asked for.
const NOTHING_LEFT: i64 = 1_000_000;
/// A session whose pause at its deadline failed goes on for so long, in microseconds, until it is tried again.
const PAUSE_AGAIN: i64 = 30_000_000;

/// What is left of a session's time to live.
pub(super) fn left(session: &Session, now: Micros) -> i64 {
    session
        .time_left
        .unwrap_or_else(|| session.deadline.0.saturating_sub(now.0).max(0))
}

/// It runs: its time to live counts down again. `instead` if nothing is left of it.
pub(super) fn counts_down(session: &mut Session, now: Micros, instead: i64) {
    let left = left(session, now);
    let left = if left < NOTHING_LEFT { instead } else { left };
    session.deadline = Micros(now.0.saturating_add(left));
    session.time_left = None;
    session.stored_bytes = 0;
    session.rollback = None;
    session.lease_until = None;
}

/// It is stored, for as long as what is stored is kept.
pub(super) fn rests(session: &mut Session, now: Micros, stored_bytes: u64, retention: Duration) {
    session.time_left = Some(left(session, now));
    session.deadline = now.plus(retention);
    session.stored_bytes = stored_bytes;
    session.rollback = None;
    session.lease_until = None;
}

impl Sessions {
    /// Pauses a session. A pause that is under way is joined, a resume that is, waited for.
    pub async fn pause(
        &self,
        session: Session,
        why: Option<EndReason>,
        actor: &str,
    ) -> Result<Session, SessionError> {
        self.pause_if(session, None, why, actor).await
    }

    /// As [`Self::pause`]; with `entered`, only while it is in the state that it entered with that version.
    pub(super) async fn pause_if(
        &self,
        session: Session,
        entered: Option<i64>,
        why: Option<EndReason>,
        actor: &str,
    ) -> Result<Session, SessionError> {
        let sessions = self.clone();
        let mut event = NewEvent::new("PAUSING", actor);
        if let Some(why) = why {
            event = event.because(why.reason, why.message);
        }
        self.owned(async move {
            let session = sessions
                .wait_until(session, |state| state != State::Resuming)
                .await?;
            let lease = sessions.limits.lease;
            let (session, ours) = sessions
                .change_if(
                    session,
                    entered,
                    Happening::PauseAsked,
                    event,
                    |session, now| {
                        session.time_left = Some(left(session, now));
                        session.lease_until = Some(now.plus(lease));
                    },
                )
                .await?;
            if ours {
                sessions.finish_pause(session).await
            } else {
                let session = sessions
                    .wait_until(session, |state| state != State::Pausing)
                    .await?;
                reached(session, State::Paused)
            }
        })
        .await
    }

    /// The second half of a pause; also how an abandoned one is repeated.
    pub(super) async fn finish_pause(&self, session: Session) -> Result<Session, SessionError> {
        let limit = self.limits.store;
        let request = PauseSessionRequest {
            session_id: session.id.to_string(),
        };
        let asked = self.ask(&session, limit, |mut node| async move {
            node.pause_session(within(limit, request)).await
        });
        match self.holding(&session, asked).await? {
            Answer::Done(done) => {
                let stored = self.stored(session, done.stored_bytes, None).await?;
                reached(stored, State::Paused)
            }
            Answer::Refused(status) => {
                let why = reason(&status, "PAUSE_FAILED");
                let session = self
                    .goes_on(session, "RUNNING", PAUSE_AGAIN, Some(why))
                    .await?;
                refused(session, State::Running, status)
            }
            Answer::Unclear => Err(SessionError::NodeUnreachable { id: session.id }),
        }
    }

    /// Resumes a session, with a new time to live if one is given. A resume that is under way is joined, a pause that is, waited
    /// for; what runs already is left alone but for its time to live.
    pub async fn resume(
        &self,
        session: Session,
        timeout: Option<Duration>,
        why: Option<EndReason>,
        actor: &str,
    ) -> Result<Session, SessionError> {
        let sessions = self.clone();
        let mut event = NewEvent::new("RESUMING", actor);
        if let Some(why) = why {
            event = event.because(why.reason, why.message);
        }
        let extended = NewEvent::new("EXTENDED", actor);
        let timeout = timeout.map(|timeout| i64::try_from(timeout.as_micros()).unwrap_or(i64::MAX));
        self.owned(async move {
            let session = sessions
                .wait_until(session, |state| state != State::Pausing)
                .await?;
            let lease = sessions.limits.lease;
            let (session, ours) = sessions
                .change_if(
                    session,
                    None,
                    Happening::ResumeAsked,
                    event,
                    |session, now| {
                        if let Some(timeout) = timeout {
                            session.timeout = timeout;
                            session.time_left = Some(timeout);
                        }
                        session.lease_until = Some(now.plus(lease));
                    },
                )
                .await?;
            if ours {
                return sessions.finish_resume(session).await;
            }
            let session = sessions
                .wait_until(session, |state| state != State::Resuming)
                .await?;
            let session = reached(session, State::Running)?;
            match timeout {
                Some(timeout) => sessions.extend(session, timeout, &extended).await,
                None => Ok(session),
            }
        })
        .await
    }

    /// The second half of a resume or rollback; also how an abandoned one is repeated.
    pub(super) async fn finish_resume(&self, session: Session) -> Result<Session, SessionError> {
        if let Some(back) = session.rollback.clone() {
            return self.finish_rollback(session, back).await;
        }
        let limit = self.limits.store;
        let request = ResumeSessionRequest {
            session_id: session.id.to_string(),
        };
        let asked = self.ask(&session, limit, |mut node| async move {
            node.resume_session(within(limit, request)).await
        });
        match self.holding(&session, asked).await? {
            Answer::Done(_) => {
                let whole = session.timeout;
                let session = self.goes_on(session, "RESUMED", whole, None).await?;
                reached(session, State::Running)
            }
            Answer::Refused(status) => {
                let why = reason(&status, "RESUME_FAILED");
                let stored_bytes = session.stored_bytes;
                let session = self.stored(session, stored_bytes, Some(why)).await?;
                refused(session, State::Paused, status)
            }
            Answer::Unclear => Err(SessionError::NodeUnreachable { id: session.id }),
        }
    }

    /// Resumes a session because a call reached it, if it may be woken so; once, however many ask.
    pub async fn wake(&self, id: &SessionId, node: &NodeId) -> Result<Session, SessionError> {
        let session = self.newest(id.clone()).await?;
        if session.node_id != *node {
            return Err(SessionError::Unknown(id.clone()));
        }
        let is_stored = matches!(session.state, State::Pausing | State::Paused);
        if is_stored && !session.wake_on_request {
            return Err(SessionError::NotToBeWoken(id.clone()));
        }
        let why = EndReason::new("CALLED", "a call reached it");
        self.resume(session, None, Some(why), &format!("node:{node}"))
            .await
    }

    /// The node says that a session is stored.
    async fn stored(
        &self,
        session: Session,
        stored_bytes: u64,
        why: Option<EndReason>,
    ) -> Result<Session, SessionError> {
        let mut event = NewEvent::new("PAUSED", format!("node:{}", session.node_id));
        if let Some(why) = why {
            event = event.because(why.reason, why.message);
        }
        let retention = self.limits.paused_retention;
        self.answer(session, Happening::Stored, event, |session, now| {
            rests(session, now, stored_bytes, retention);
        })
        .await
    }

    /// The node says that a session runs.
    pub(super) async fn goes_on(
        &self,
        session: Session,
        kind: &'static str,
        instead: i64,
        why: Option<EndReason>,
    ) -> Result<Session, SessionError> {
        let mut event = NewEvent::new(kind, format!("node:{}", session.node_id));
        if let Some(why) = why {
            event = event.because(why.reason, why.message);
        }
        self.answer(session, Happening::Runs, event, |session, now| {
            counts_down(session, now, instead);
        })
        .await
    }

    /// A rollback that a paused session was asked for, and its node refused.
    pub(super) async fn stays_stored(
        &self,
        session: Session,
        why: EndReason,
    ) -> Result<Session, SessionError> {
        let stored_bytes = session.stored_bytes;
        self.stored(session, stored_bytes, Some(why)).await
    }

    /// Takes what a listing of the node says for the truth, unless the session has left the state it was read in.
    pub async fn found(
        &self,
        session: Session,
        happening: Happening,
        stored_bytes: u64,
    ) -> Result<Session, SessionError> {
        let why = EndReason::new("FOUND", "its node says so");
        if happening == Happening::Stored {
            let stored_bytes = stored_bytes.max(session.stored_bytes);
            self.stored(session, stored_bytes, Some(why)).await
        } else {
            let whole = session.timeout;
            self.goes_on(session, "RUNNING", whole, Some(why)).await
        }
    }

    async fn extend(
        &self,
        mut session: Session,
        timeout: i64,
        event: &NewEvent,
    ) -> Result<Session, SessionError> {
        for _ in 0..super::UPDATE_TRIES {
            let mut changed = Session {
                version: session.version + 1,
                ..session
            };
            set_time_to_live(
                &mut changed,
                Micros::now(),
                timeout,
                self.limits.paused_retention,
            );
            if self.store.update(&changed, event).await? {
                self.changes.tell();
                return Ok(changed);
            }
            session = self.newest(changed.id).await?;
            if session.state.is_final() || session.state == State::Stopping {
                return Err(wrong_state(session));
            }
        }
        Err(SessionError::Contended(session.id))
    }

    /// How long what is stored of a paused session is kept.
    pub fn paused_retention(&self) -> Duration {
        self.limits.paused_retention
    }
}

/// Gives a session a new time to live. It counts from now, or, while it is paused, from when it runs again.
pub fn set_time_to_live(session: &mut Session, now: Micros, timeout: i64, retention: Duration) {
    session.timeout = timeout;
    match session.state {
        State::Paused => {
            session.time_left = Some(timeout);
            session.deadline = now.plus(retention);
        }
        State::Pausing | State::Resuming => session.time_left = Some(timeout),
        _ => session.deadline = Micros(now.0.saturating_add(timeout)),
    }
}

fn wrong_state(session: Session) -> SessionError {
    SessionError::WrongState {
        id: session.id,
        state: session.state,
    }
}

/// The session, if what was asked for came about, whoever did it.
pub(super) fn reached(session: Session, wanted: State) -> Result<Session, SessionError> {
    match session.state {
        state if state == wanted => Ok(session),
        State::Running | State::Paused => Err(SessionError::CameToNothing {
            id: session.id,
            state: session.state,
        }),
        _ => Err(wrong_state(session)),
    }
}

/// Why it did not come about: its node refused, unless somebody ended the session meanwhile.
pub(super) fn refused(
    session: Session,
    back: State,
    status: tonic::Status,
) -> Result<Session, SessionError> {
    if session.state == back {
        Err(SessionError::Refused {
            id: session.id,
            status,
        })
    } else {
        Err(wrong_state(session))
    }
}
