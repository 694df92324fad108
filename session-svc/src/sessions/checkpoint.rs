//! Checkpoints: kept states of a session, and going back to them.
//!
//! A checkpoint is a row first, with a lease; one whose lease is over before it is kept is removed from its node and forgotten
//! ([`Sessions::discard`]), so that nothing is left of what nobody was told of. A rollback is a move to Resuming, and is
//! recovered like a resume.

use proto::node::v1::{DeleteSnapshotRequest, RollbackSessionRequest, SnapshotSessionRequest};
use service_kit::{
    ids::{CheckpointId, SessionId},
    mesh::Caller,
};

use super::{
    Happening, SessionError, Sessions, UPDATE_TRIES,
    node_call::{Answer, reason, within},
    pause::{left, reached, refused},
};
use crate::{
    lifecycle::State,
    session::{Checkpoint, CheckpointState, Micros, Rollback, Session, micros},
    store::NewEvent,
};

/// How many checkpoints a session may have.
const MOST: i64 = 100;

impl Sessions {
    /// Keeps a session as it is now; the same request ID gives the same checkpoint.
    pub async fn create_checkpoint(
        &self,
        caller: &Caller,
        session: Session,
        name: String,
        request_id: Option<String>,
    ) -> Result<Checkpoint, SessionError> {
        for _ in 0..UPDATE_TRIES {
            if let Some(request) = &request_id
                && let Some(earlier) = self.made_before(caller, &session.id, request).await?
            {
                return Ok(earlier);
            }
            let session = self.at_rest(session.clone()).await?;
            if !matches!(session.state, State::Running | State::Paused) {
                return Err(wrong_state(&session));
            }
            if self.store.count_checkpoints(&session.id).await? >= MOST {
                return Err(SessionError::TooManyCheckpoints {
                    id: session.id,
                    most: MOST,
                });
            }
            let now = Micros::now();
            let checkpoint = Checkpoint {
                id: CheckpointId::random(),
                session: session.id.clone(),
                team: caller.team.clone(),
                request_id: request_id.clone(),
                name: name.clone(),
                state: CheckpointState::Making,
                create_time: now,
                stored_bytes: 0,
                stop_time: 0,
                lease_until: Some(now.plus(self.limits.lease)),
            };
            if self.store.insert_checkpoint(&checkpoint).await? {
                let sessions = self.clone();
                let actor = format!("team:{}", caller.team);
                return self
                    .owned(async move { sessions.make(session, checkpoint, &actor).await })
                    .await;
            }
            // Somebody else was faster with the same request ID.
        }
        Err(SessionError::Contended(session.id))
    }

    /// The checkpoint of an earlier request with this ID, once it is kept; `None` if there is none, or nothing came of it.
    async fn made_before(
        &self,
        caller: &Caller,
        session: &SessionId,
        request: &str,
    ) -> Result<Option<Checkpoint>, SessionError> {
        let mut listener = self.changes.listen();
        let waiting = async {
            loop {
                let found = self.store.checkpoint_by_request(&caller.team, request);
                let Some(found) = found.await? else {
                    return Ok(None);
                };
                if found.session != *session {
                    return Err(SessionError::Invalid {
                        field: "request_id",
                        description: format!(
                            "was used for a checkpoint of session {}",
                            found.session
                        ),
                    });
                }
                match found.state {
                    CheckpointState::Kept => return Ok(Some(found)),
                    CheckpointState::Making | CheckpointState::Removing => listener.heard().await,
                }
            }
        };
        let limit = self.limits.store + self.limits.lease;
        let waited = tokio::time::timeout(limit, waiting).await;
        waited.unwrap_or_else(|_| Err(SessionError::StillStarting(session.clone())))
    }

    async fn make(
        &self,
        session: Session,
        mut checkpoint: Checkpoint,
        actor: &str,
    ) -> Result<Checkpoint, SessionError> {
        let limit = self.limits.store;
        let request = SnapshotSessionRequest {
            session_id: session.id.to_string(),
            checkpoint_id: checkpoint.id.to_string(),
        };
        let asked = self.ask(&session, limit, |mut node| async move {
            node.snapshot_session(within(limit, request)).await
        });
        match self.holding_checkpoint(&checkpoint, asked).await? {
            Answer::Done(done) => {
                checkpoint.state = CheckpointState::Kept;
                checkpoint.stored_bytes = done.stored_bytes;
                checkpoint.stop_time = micros(done.stop_time);
                checkpoint.lease_until = None;
                self.keep(session, checkpoint, actor).await
            }
            Answer::Refused(status) => {
                self.store.forget_checkpoint(&checkpoint.id, None).await?;
                self.changes.tell();
                let session = self.newest(session.id).await?;
                match session.state {
                    State::Stopping | State::Stopped | State::Failed | State::Lost => {
                        Err(wrong_state(&session))
                    }
                    _ => Err(SessionError::Refused {
                        id: session.id,
                        status,
                    }),
                }
            }
            Answer::Unclear => {
                let until = Micros::now().plus(self.limits.lease);
                self.store.give_up_checkpoint(&checkpoint.id, until).await?;
                self.changes.tell();
                Err(SessionError::NodeUnreachable { id: session.id })
            }
        }
    }

    async fn keep(
        &self,
        mut session: Session,
        checkpoint: Checkpoint,
        actor: &str,
    ) -> Result<Checkpoint, SessionError> {
        let event = NewEvent::new("CHECKPOINT_CREATED", actor).because("", checkpoint.id.as_str());
        for _ in 0..UPDATE_TRIES {
            session = self.newest(session.id).await?;
            if session.state.is_final() || session.state == State::Stopping {
                // It goes with the session.
                self.store.forget_checkpoint(&checkpoint.id, None).await?;
                return Err(wrong_state(&session));
            }
            session.version += 1;
            let kept = self.store.keep_checkpoint(&session, &event, &checkpoint);
            if kept.await? {
                self.changes.tell();
                return Ok(checkpoint);
            }
        }
        let until = Micros::now().plus(self.limits.lease);
        self.store.give_up_checkpoint(&checkpoint.id, until).await?;
        Err(SessionError::Contended(session.id))
    }

    /// A page of a session's checkpoints, oldest first. They end with their session.
    pub async fn list_checkpoints(
        &self,
        session: &Session,
        after: Option<(i64, String)>,
        limit: i64,
    ) -> Result<Vec<Checkpoint>, SessionError> {
        if session.state.is_final() {
            return Ok(Vec::new());
        }
        let listed = self.store.list_checkpoints(&session.id, after, limit);
        Ok(listed.await?)
    }

    /// Removes a checkpoint, and its files from its node.
    pub async fn delete_checkpoint(
        &self,
        session: Session,
        id: CheckpointId,
        actor: &str,
    ) -> Result<(), SessionError> {
        let session = self.at_rest(session).await?;
        if session.state.is_final() || session.state == State::Stopping {
            return Err(wrong_state(&session));
        }
        let found = self.store.checkpoint(&session.id, &id).await?;
        let Some(mut checkpoint) = found.filter(|found| found.state != CheckpointState::Making)
        else {
            return Err(SessionError::CheckpointUnknown {
                id,
                session: session.id,
            });
        };
        let until = Micros::now().plus(self.limits.lease);
        self.store.give_up_checkpoint(&id, until).await?;
        checkpoint.state = CheckpointState::Removing;
        checkpoint.lease_until = Some(until);
        let (sessions, actor) = (self.clone(), actor.to_owned());
        self.owned(async move { sessions.remove(session, checkpoint, &actor).await })
            .await
    }

    /// Removes what nobody makes or removes any more; `checkpoint` must carry a lease of ours.
    pub async fn discard(&self, checkpoint: Checkpoint) -> Result<(), SessionError> {
        let session = self.newest(checkpoint.session.clone()).await?;
        if session.state.is_final() {
            // Its node has removed all of it.
            self.store.forget_checkpoint(&checkpoint.id, None).await?;
            return Ok(());
        }
        let sessions = self.clone();
        self.owned(async move { sessions.remove(session, checkpoint, "reconciler").await })
            .await
    }

    async fn remove(
        &self,
        mut session: Session,
        checkpoint: Checkpoint,
        actor: &str,
    ) -> Result<(), SessionError> {
        let limit = self.limits.stop;
        let request = DeleteSnapshotRequest {
            session_id: session.id.to_string(),
            checkpoint_id: checkpoint.id.to_string(),
        };
        let asked = self.ask(&session, limit, |mut node| async move {
            node.delete_snapshot(within(limit, request)).await
        });
        match self.holding_checkpoint(&checkpoint, asked).await? {
            Answer::Done(_) => {}
            Answer::Refused(status) => {
                return Err(SessionError::Refused {
                    id: session.id,
                    status,
                });
            }
            Answer::Unclear => return Err(SessionError::NodeUnreachable { id: session.id }),
        }
        let event = NewEvent::new("CHECKPOINT_DELETED", actor).because("", checkpoint.id.as_str());
        for _ in 0..UPDATE_TRIES {
            session = self.newest(session.id).await?;
            session.version += 1;
            // Of what was never kept nobody knows, and nothing happens to what has ended.
            let is_event = checkpoint.state != CheckpointState::Making && !session.state.is_final();
            let event = is_event.then_some((&session, &event));
            if self.store.forget_checkpoint(&checkpoint.id, event).await? {
                self.changes.tell();
                return Ok(());
            }
        }
        Err(SessionError::Contended(session.id))
    }

    /// Puts a session back to one of its checkpoints; it runs then.
    pub async fn rollback(
        &self,
        session: Session,
        to: CheckpointId,
        actor: &str,
    ) -> Result<Session, SessionError> {
        let session = self.at_rest(session).await?;
        let found = self.store.checkpoint(&session.id, &to).await?;
        if found.is_none_or(|found| found.state != CheckpointState::Kept) {
            return Err(SessionError::CheckpointUnknown {
                id: to,
                session: session.id,
            });
        }
        let (sessions, lease) = (self.clone(), self.limits.lease);
        let event = NewEvent::new("RESUMING", actor).because("ROLLBACK", to.as_str());
        self.owned(async move {
            let asked = Happening::RollbackAsked;
            let (session, _) = sessions
                .change_if(session, None, asked, event, |session, now| {
                    // Its time to live stands still only while it is paused.
                    let from = if session.time_left.is_some() {
                        State::Paused
                    } else {
                        State::Running
                    };
                    session.time_left = Some(left(session, now));
                    session.lease_until = Some(now.plus(lease));
                    session.rollback = Some(Rollback { to, from });
                })
                .await?;
            sessions.finish_resume(session).await
        })
        .await
    }

    /// The second half of a rollback.
    pub(super) async fn finish_rollback(
        &self,
        session: Session,
        back: Rollback,
    ) -> Result<Session, SessionError> {
        let limit = self.limits.store;
        let request = RollbackSessionRequest {
            session_id: session.id.to_string(),
            checkpoint_id: back.to.to_string(),
        };
        let asked = self.ask(&session, limit, |mut node| async move {
            node.rollback_session(within(limit, request)).await
        });
        let whole = session.timeout;
        match self.holding(&session, asked).await? {
            Answer::Done(_) => {
                let session = self.goes_on(session, "ROLLED_BACK", whole, None).await?;
                reached(session, State::Running)
            }
            Answer::Refused(status) => {
                let why = reason(&status, "ROLLBACK_FAILED");
                let session = if back.from == State::Paused {
                    self.stays_stored(session, why).await?
                } else {
                    self.goes_on(session, "RUNNING", whole, Some(why)).await?
                };
                refused(session, back.from, status)
            }
            Answer::Unclear => Err(SessionError::NodeUnreachable { id: session.id }),
        }
    }

    /// Works on a checkpoint while holding its lease.
    async fn holding_checkpoint<T>(
        &self,
        checkpoint: &Checkpoint,
        work: impl Future<Output = T> + Send,
    ) -> T {
        tokio::select! {
            done = work => done,
            never = self.renew_checkpoint(checkpoint.clone()) => match never {},
        }
    }

    async fn renew_checkpoint(&self, mut checkpoint: Checkpoint) -> std::convert::Infallible {
        let every = self.limits.lease / 3;
        loop {
            tokio::time::sleep(every).await;
            let until = Micros::now().plus(self.limits.lease);
            match self.store.take_checkpoint(&checkpoint, until).await {
                Ok(true) => checkpoint.lease_until = Some(until),
                // Taken over, or gone.
                Ok(false) => std::future::pending().await,
                Err(error) => {
                    tracing::warn!(session_id = checkpoint.session.short(), %error, "a lease could not be renewed");
                }
            }
        }
    }
}

fn wrong_state(session: &Session) -> SessionError {
    SessionError::WrongState {
        id: session.id.clone(),
        state: session.state,
    }
}
