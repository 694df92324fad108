//! What has to happen though nobody asks: deadlines, starts and stops whose replica died, dead nodes, old rows.
//!
//! Every replica does all of it; compare-and-set on the rows decides who is first, so no leader is needed.

use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::{
    errors::SessionError,
    lifecycle::State,
    session::{EndReason, Micros, Session},
    sessions::Sessions,
    store::{Store, StoreError},
};

const EVERY: Duration = Duration::from_millis(500);
const PURGE_EVERY: Duration = Duration::from_mins(1);
const BATCH: i64 = 64;
const LEASE: Duration = Duration::from_mins(3);

/// Brings the database and reality together.
#[derive(Debug)]
pub struct Reconciler {
    /// The rows.
    pub store: Store,
    /// Starts and stops.
    pub sessions: Sessions,
    /// Without a heartbeat for so long a node is dead.
    pub node_dead_after: Duration,
    /// Ended sessions are kept for so long.
    pub retention: Duration,
}

impl Reconciler {
    /// Runs until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut ticks = tokio::time::interval(EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // Heartbeats come through this database: only after it has been there for a while does silence mean anything.
        let mut database_since: Option<Instant> = None;
        let mut purge_due = Instant::now();
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                _ = ticks.tick() => {}
            }
            let listening_for = database_since.map_or(Duration::ZERO, |since| since.elapsed());
            match self.once(listening_for, Instant::now() >= purge_due).await {
                Ok(()) => {
                    database_since.get_or_insert_with(Instant::now);
                    if Instant::now() >= purge_due {
                        purge_due = Instant::now() + PURGE_EVERY;
                    }
                }
                Err(error) => {
                    database_since = None;
                    tracing::warn!(%error, "reconciling is not possible right now");
                }
            }
        }
    }

    async fn once(&self, listening_for: Duration, purge: bool) -> Result<(), StoreError> {
        let now = Micros::now();
        let expired = self.store.expired(now, BATCH).await?;
        let expire = expired.into_iter().map(|session| {
            let end = EndReason::new("DEADLINE_EXPIRED", "its time to live was over");
            self.sessions.stop(session, end, "deadline")
        });
        for outcome in futures::future::join_all(expire).await {
            note(outcome);
        }
        let abandoned = self.store.abandoned(now, BATCH).await?;
        for outcome in
            futures::future::join_all(abandoned.into_iter().map(|session| self.adopt(session)))
                .await
        {
            note(outcome);
        }
        if listening_for > self.node_dead_after {
            let buried = self
                .store
                .bury_nodes(now.minus(self.node_dead_after))
                .await?;
            for node in &buried {
                tracing::error!(node_id = %node, "node declared dead");
            }
        }
        for node in self.store.dead_nodes_with_sessions().await? {
            for session in self.store.living(Some(&node), "", 1000).await? {
                let end = EndReason::new("NODE_DEAD", "its node sent no heartbeat for too long");
                note(self.sessions.lose(session, end, "reconciler").await);
            }
        }
        if purge {
            self.store.purge(now.minus(self.retention), 1000).await?;
        }
        Ok(())
    }

    async fn adopt(&self, session: Session) -> Result<Session, SessionError> {
        if !self
            .store
            .take_lease(&session, Micros::now().plus(LEASE))
            .await?
        {
            return Ok(session);
        }
        tracing::info!(session_id = session.id.short(), state = ?session.state, "taking over what another replica began");
        match session.state {
            State::Pending | State::Starting => self.sessions.start(session, vec![]).await,
            State::Stopping => self.sessions.finish_stop(session).await,
            _ => Ok(session),
        }
    }
}

fn note(outcome: Result<Session, SessionError>) {
    if let Err(error) = outcome {
        tracing::warn!(%error, "a session could not be reconciled; it is tried again");
    }
}
