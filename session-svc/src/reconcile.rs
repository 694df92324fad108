//! What has to happen though nobody asks: deadlines, moves whose replica died, settings that nodes did not hear of, dead nodes,
//! audits, old rows.
//!
//! Every replica does all of it; leases and compare-and-set on the rows decide who is first, so no leader is needed. Each concern
//! has a loop of its own and waits for no node, so that one that hangs holds up nothing else.

use std::time::Duration;

use futures::{StreamExt as _, stream};
use tokio::{
    task::JoinSet,
    time::{Instant, MissedTickBehavior},
};
use tokio_util::sync::CancellationToken;

use crate::{
    audit::Audit,
    errors::SessionError,
    session::{EndReason, Micros},
    sessions::Sessions,
    store::{Store, StoreError},
};

const EVERY: Duration = Duration::from_millis(500);
const PURGE_EVERY: Duration = Duration::from_secs(30);
const PURGE_BATCH: i64 = 500;
const BATCH: i64 = 64;
/// Stops and starts a replica works on at once on nobody's behalf.
const AT_ONCE: usize = 512;
const AUDITS_AT_ONCE: usize = 8;

/// Brings the database and reality together.
#[derive(Debug)]
pub struct Reconciler {
    /// The rows.
    pub store: Store,
    /// Starts and stops.
    pub sessions: Sessions,
    /// What nodes really host.
    pub audit: Audit,
    /// Without a heartbeat for so long a node is dead.
    pub node_dead_after: Duration,
    /// How often each node is asked what it hosts.
    pub audit_interval: Duration,
    /// Ended sessions are kept for so long.
    pub retention: Duration,
    /// How long a lease is.
    pub lease: Duration,
}

impl Reconciler {
    /// Runs until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) {
        let loops = async {
            tokio::join!(
                self.deadlines(),
                self.abandoned(),
                self.abandoned_checkpoints(),
                self.unpushed(),
                self.dead_nodes(),
                self.audits(),
                self.purges()
            )
        };
        tokio::select! {
            () = shutdown.cancelled() => {}
            _ = loops => {}
        }
    }

    async fn deadlines(&self) {
        let mut stops = JoinSet::new();
        let mut ticks = ticks(EVERY);
        loop {
            ticks.tick().await;
            collect(&mut stops);
            let Some(room) = room(&stops) else { continue };
            match self.store.expired(Micros::now(), room).await {
                Ok(expired) => {
                    for session in expired {
                        let sessions = self.sessions.clone();
                        stops.spawn(async move { sessions.expire(session).await });
                    }
                }
                Err(error) => tracing::warn!(%error, "deadlines cannot be looked at right now"),
            }
        }
    }

    async fn abandoned(&self) {
        let mut work = JoinSet::new();
        let mut ticks = ticks(EVERY);
        loop {
            ticks.tick().await;
            collect(&mut work);
            let Some(room) = room(&work) else { continue };
            let found = match self.store.abandoned(Micros::now(), room).await {
                Ok(found) => found,
                Err(error) => {
                    tracing::warn!(%error, "leases cannot be looked at right now");
                    continue;
                }
            };
            for mut session in found {
                let until = Micros::now().plus(self.lease);
                match self.store.take_lease(&session, until).await {
                    Ok(true) => {
                        session.lease_until = Some(until);
                        tracing::info!(session_id = session.id.short(), state = ?session.state, "taking over what another replica began");
                        let sessions = self.sessions.clone();
                        work.spawn(async move { sessions.take_over(session).await });
                    }
                    // Another replica was faster.
                    Ok(false) => {}
                    Err(error) => tracing::warn!(%error, "a lease cannot be taken over right now"),
                }
            }
        }
    }

    /// Checkpoints whose replica died while it made or removed them are removed.
    async fn abandoned_checkpoints(&self) {
        let mut work = JoinSet::new();
        let mut ticks = ticks(EVERY);
        loop {
            ticks.tick().await;
            collect(&mut work);
            let Some(room) = room(&work) else { continue };
            let found = match self.store.abandoned_checkpoints(Micros::now(), room).await {
                Ok(found) => found,
                Err(error) => {
                    tracing::warn!(%error, "leases of checkpoints cannot be looked at right now");
                    continue;
                }
            };
            for mut checkpoint in found {
                let until = Micros::now().plus(self.lease);
                match self.store.take_checkpoint(&checkpoint, until).await {
                    Ok(true) => {
                        checkpoint.lease_until = Some(until);
                        let sessions = self.sessions.clone();
                        work.spawn(async move { sessions.discard(checkpoint).await });
                    }
                    // Another replica was faster.
                    Ok(false) => {}
                    Err(error) => {
                        tracing::warn!(%error, "a checkpoint cannot be taken over right now");
                    }
                }
            }
        }
    }

    /// Nodes that did not hear of a session's new settings are told again.
    async fn unpushed(&self) {
        let mut work = JoinSet::new();
        let mut ticks = ticks(EVERY);
        loop {
            ticks.tick().await;
            collect(&mut work);
            let Some(room) = room(&work) else { continue };
            let found = match self.store.unpushed(Micros::now(), room).await {
                Ok(found) => found,
                Err(error) => {
                    tracing::warn!(%error, "settings to be told cannot be looked at right now");
                    continue;
                }
            };
            for mut session in found {
                let until = self.sessions.push_due(Micros::now());
                match self.store.set_push(&session, Some(until)).await {
                    Ok(true) => {
                        session.push_due = Some(until);
                        let sessions = self.sessions.clone();
                        work.spawn(async move { sessions.push(session).await });
                    }
                    // Another replica was faster.
                    Ok(false) => {}
                    Err(error) => tracing::warn!(%error, "settings cannot be told right now"),
                }
            }
        }
    }

    async fn dead_nodes(&self) {
        // Heartbeats come through this database: only after it has been there for a while does silence mean anything.
        let mut database_since: Option<Instant> = None;
        let mut ticks = ticks(EVERY);
        loop {
            ticks.tick().await;
            let listening_for = database_since.map_or(Duration::ZERO, |since| since.elapsed());
            match self.bury(listening_for).await {
                Ok(()) => {
                    database_since.get_or_insert_with(Instant::now);
                }
                Err(error) => {
                    database_since = None;
                    tracing::warn!(%error, "dead nodes cannot be told right now");
                }
            }
        }
    }

    async fn bury(&self, listening_for: Duration) -> Result<(), StoreError> {
        if listening_for > self.node_dead_after {
            let silent_since = Micros::now().minus(self.node_dead_after);
            for node in self.store.bury_nodes(silent_since).await? {
                tracing::error!(node_id = %node, "node declared dead");
            }
        }
        for node in self.store.dead_nodes_with_sessions().await? {
            for session in self.store.active(&node, BATCH).await? {
                let end = EndReason::new("NODE_DEAD", "its node sent no heartbeat for too long");
                note(self.sessions.lose(session, end, "reconciler").await);
            }
        }
        Ok(())
    }

    async fn audits(&self) {
        let mut ticks = ticks(self.audit_interval);
        loop {
            ticks.tick().await;
            match self.audit.nodes.heard_of().await {
                Ok(nodes) => {
                    stream::iter(nodes)
                        .for_each_concurrent(AUDITS_AT_ONCE, |node| async move {
                            if let Err(error) = self.audit.ask(&node).await {
                                tracing::warn!(node_id = %node, %error, "a node could not be audited");
                            }
                        })
                        .await;
                }
                Err(error) => tracing::warn!(%error, "nodes cannot be audited right now"),
            }
        }
    }

    async fn purges(&self) {
        let mut ticks = ticks(PURGE_EVERY.min(self.retention));
        loop {
            ticks.tick().await;
            // In small steps, until nothing is left to forget.
            loop {
                let before = Micros::now().minus(self.retention);
                if let Err(error) = self.store.purge_forks(before).await {
                    tracing::warn!(%error, "old forks cannot be forgotten right now");
                }
                match self.store.purge(before, PURGE_BATCH).await {
                    Ok(0) => break,
                    Ok(sessions) => tracing::debug!(sessions, "old sessions were forgotten"),
                    Err(error) => {
                        tracing::warn!(%error, "old sessions cannot be forgotten right now");
                        break;
                    }
                }
            }
        }
    }
}

type Work<T> = JoinSet<Result<T, SessionError>>;

fn ticks(every: Duration) -> tokio::time::Interval {
    let mut ticks = tokio::time::interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

fn room<T: 'static>(work: &Work<T>) -> Option<i64> {
    let room = AT_ONCE.saturating_sub(work.len());
    i64::try_from(room)
        .ok()
        .map(|room| room.min(BATCH))
        .filter(|room| *room > 0)
}

fn collect<T: 'static>(work: &mut Work<T>) {
    while let Some(done) = work.try_join_next() {
        match done {
            Ok(outcome) => note(outcome),
            Err(error) => tracing::error!(%error, "a reconciling task broke"),
        }
    }
}

fn note<T>(outcome: Result<T, SessionError>) {
    if let Err(error) = outcome {
        tracing::warn!(%error, "a session could not be reconciled; it is tried again");
    }
}
