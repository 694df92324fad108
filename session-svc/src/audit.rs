//! What a node hosts against what it should host.
//!
//! Three things can part: a node may have lost a session that is Running here (it restarted), may host one that is over here
//! (it was declared dead and came back, or a start it never answered succeeded), and may hold one paused that runs here, or the
//! other way round (it restarted in the middle of a pause or resume). All are found by comparing its listing with the rows; a
//! registration brings a listing, and every so often each node is asked for one.
//!
//! | row | the node lists it as | becomes | if |
//! | --- | --- | --- | --- |
//! | Pending, Starting, Stopping | anything, or not at all | as it is: a replica is at work, or soon the reconciler | |
//! | Running, Pausing, Paused, Resuming | not at all | Lost | old enough |
//! | Running | Paused | Paused | settled |
//! | Pausing | Paused | Paused | settled |
//! | Pausing | Running | Running | orphaned |
//! | Paused | Running | Running | settled |
//! | Resuming | Running | Running | settled; a rollback only if orphaned, since before it was done the session may have run too |
//! | Resuming | Paused | Paused | orphaned |
//! | any of these | Starting, Pausing, Resuming, Stopping | as it is: the next listing says what came of it | |
//! | living | final: it ended by itself, which no heartbeat has brought yet | Failed or Lost, with the node's reason | |
//! | final, unknown, or another node's | living | the node is told to end it | |
//!
//! *Settled*: the row has been in its state since well before the listing was made. *Orphaned*: or since before this start of the
//! node, so that the call which was to change it died with the process it was made to. Until then a call is under way, or will be
//! repeated by whoever takes its lease over.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use proto::node::v1::{HostedSession, ListSessionsRequest};
use service_kit::ids::{NodeId, SessionId};
use tonic::Request;

use crate::{
    errors::SessionError,
    lifecycle::{Happening, State},
    nodes::Nodes,
    session::{EndReason, Micros, Session},
    sessions::Sessions,
    store::{Store, StoreError},
};

const CALL_LIMIT: Duration = Duration::from_secs(3);
const PAGE: i64 = 500;
/// A listing says nothing about sessions that started around the time it was made; replicas' clocks differ a little.
const AROUND: Duration = Duration::from_secs(3);

/// Compares and mends.
#[derive(Debug, Clone)]
pub struct Audit {
    /// The rows.
    pub store: Store,
    /// The nodes.
    pub nodes: Nodes,
    /// The sessions on them.
    pub sessions: Sessions,
}

fn is_final(hosted: &HostedSession) -> bool {
    State::from_wire(hosted.state).is_some_and(State::is_final)
}

/// Why a session that should be on a node is not there: what its end says. Pure.
///
/// Whoever notices first says it, so it must not matter who that is: a registration, or an audit that asks a node which has
/// restarted and not registered yet.
fn why_missing(session: &Session, node_started: Option<Micros>) -> EndReason {
    let is_older = |started: Micros| session.start_time.is_none_or(|ran| ran < started);
    if node_started.is_some_and(is_older) {
        EndReason::new("NODE_RESTARTED", "its node restarted without it")
    } else {
        EndReason::new("SESSION_MISSING", "its node does not host it any more")
    }
}

/// Whether a row says that its node must host it, by a listing made at a time. Pure.
fn must_be_listed(session: &Session, listed_at: Micros) -> bool {
    match session.state {
        State::Running | State::Pausing | State::Paused | State::Resuming => session
            .start_time
            .is_none_or(|started| started < listed_at.minus(AROUND)),
        // Starts and stops have a replica at work on them, or soon the reconciler; what is over is nowhere.
        State::Pending
        | State::Starting
        | State::Stopping
        | State::Stopped
        | State::Failed
        | State::Lost => false,
    }
}

/// What a row becomes by what its node lists it as, at a time; the table above. Pure.
fn found(
    session: &Session,
    listed: State,
    listed_at: Micros,
    node_started: Option<Micros>,
) -> Option<Happening> {
    let is_orphaned = node_started.is_some_and(|started| session.state_time < started);
    let is_settled = is_orphaned || session.state_time < listed_at.minus(AROUND);
    let (happening, is_true) = match (session.state, listed) {
        (State::Running | State::Pausing, State::Paused) => (Happening::Stored, is_settled),
        (State::Resuming, State::Paused) => (Happening::Stored, is_orphaned),
        (State::Pausing, State::Running) => (Happening::Runs, is_orphaned),
        (State::Resuming, State::Running) if session.rollback.is_some() => {
            (Happening::Runs, is_orphaned)
        }
        (State::Paused | State::Resuming, State::Running) => (Happening::Runs, is_settled),
        _ => return None,
    };
    is_true.then_some(happening)
}

impl Audit {
    /// Asks a node what it hosts, and mends what differs.
    pub async fn ask(&self, node: &NodeId) -> Result<(), SessionError> {
        let asked_at = Micros::now();
        let Some(mut client) = self.nodes.reach(node).await? else {
            return Ok(());
        };
        let mut request = Request::new(ListSessionsRequest {});
        request.set_timeout(CALL_LIMIT);
        let answer = match tokio::time::timeout(CALL_LIMIT, client.list_sessions(request)).await {
            Ok(Ok(answer)) => answer.into_inner(),
            Ok(Err(status)) => {
                tracing::debug!(node_id = %node, %status, "a node does not say what it hosts");
                return Ok(());
            }
            Err(_) => return Ok(()),
        };
        let (listing, started) = (answer.sessions, answer.start_time.map(Micros::from));
        self.compare(node, &listing, asked_at, started).await?;
        for session_id in self.unwanted(node, &listing).await? {
            tracing::warn!(session_id = session_id.get(..8), node_id = %node, "a node hosts a session that is over");
            let mut request = Request::new(proto::node::v1::StopSessionRequest { session_id });
            request.set_timeout(CALL_LIMIT);
            if let Err(status) = client.stop_session(request).await {
                tracing::warn!(node_id = %node, %status, "it could not be stopped; the next audit tries again");
            }
        }
        Ok(())
    }

    /// Notes an end that a node knows of, with its reason.
    pub async fn note_end(&self, node: &NodeId, ended: &HostedSession) -> Result<(), SessionError> {
        let Ok(id) = SessionId::parse(&ended.session_id) else {
            return Ok(());
        };
        let Some(session) = self.store.get(&id).await? else {
            return Ok(());
        };
        if session.node_id != *node || session.state.is_final() || session.state == State::Stopping
        {
            return Ok(());
        }
        let end = ended.end_reason.clone().unwrap_or_default();
        let end = EndReason::new(end.reason, end.message);
        if State::from_wire(ended.state) == Some(State::Lost) {
            let actor = format!("node:{node}");
            self.sessions.lose(session, end, &actor).await?;
        } else {
            self.sessions.fail(session, end).await?;
        }
        Ok(())
    }

    /// Rows of this node become what a listing of it says; those it does not have become Lost.
    pub async fn compare(
        &self,
        node: &NodeId,
        listing: &[HostedSession],
        listed_at: Micros,
        node_started: Option<Micros>,
    ) -> Result<(), SessionError> {
        // What ended by itself has a better reason than not being there.
        for ended in listing.iter().filter(|hosted| is_final(hosted)) {
            self.note_end(node, ended).await?;
        }
        let hosted: HashMap<&str, &HostedSession> = listing
            .iter()
            .map(|session| (session.session_id.as_str(), session))
            .collect();
        let mut after = String::new();
        loop {
            let page = self.store.living(node, &after, PAGE).await?;
            let Some(last) = page.last() else {
                return Ok(());
            };
            after = last.id.to_string();
            for session in page {
                let Some(listed) = hosted.get(session.id.as_str()) else {
                    if must_be_listed(&session, listed_at) {
                        let actor = format!("node:{node}");
                        let end = why_missing(&session, node_started);
                        self.sessions.lose(session, end, &actor).await?;
                    }
                    continue;
                };
                let state = State::from_wire(listed.state);
                let happening =
                    state.and_then(|state| found(&session, state, listed_at, node_started));
                if let Some(happening) = happening {
                    tracing::warn!(session_id = session.id.short(), node_id = %node, state = ?session.state, ?state, "a session is not what it should be");
                    let found = self.sessions.found(session, happening, listed.stored_bytes);
                    found.await?;
                }
            }
        }
    }

    /// Sessions a node hosts and should not: they are over here, never were, or are another node's.
    pub async fn unwanted(
        &self,
        node: &NodeId,
        listing: &[HostedSession],
    ) -> Result<Vec<String>, StoreError> {
        let ids = listing.iter().filter(|hosted| !is_final(hosted));
        let ids: Vec<String> = ids
            .filter(|hosted| SessionId::parse(&hosted.session_id).is_ok())
            .map(|hosted| hosted.session_id.clone())
            .collect();
        if ids.is_empty() {
            return Ok(ids);
        }
        let known = self.store.get_all(ids.clone()).await?;
        let wanted: HashSet<&str> = known
            .iter()
            .filter(|session| !session.state.is_final() && session.node_id == *node)
            .map(|session| session.id.as_str())
            .collect();
        Ok(ids
            .into_iter()
            .filter(|id| !wanted.contains(id.as_str()))
            .collect())
    }
}

#[cfg(test)]
mod tests {
    use proto::session::v1::{OnTimeout, Resources};
    use service_kit::ids::{CheckpointId, HomeTag, TeamId};

    use super::*;
    use crate::session::{Network, Rollback};

    const SECOND: i64 = 1_000_000;
    const LISTED: Micros = Micros(1_000 * SECOND);

    fn row(state: State, state_time: Micros) -> Session {
        Session {
            id: SessionId::random(&HomeTag::random()),
            team: TeamId::parse("red").unwrap(),
            request_id: None,
            state,
            node_id: NodeId::parse("n").unwrap(),
            template: "base".into(),
            template_version: "base@1".into(),
            template_spec: proto::template::v1::Template::default(),
            resources: Resources::default(),
            network: Network::default(),
            metadata: std::collections::BTreeMap::new(),
            env: std::collections::BTreeMap::new(),
            on_timeout: OnTimeout::Stop,
            wake_on_request: false,
            create_time: Micros(0),
            start_time: Some(Micros(SECOND)),
            timeout: 0,
            deadline: Micros(0),
            end_time: None,
            end_reason: None,
            lease_until: None,
            version: 9,
            parent: None,
            stored_bytes: 0,
            time_left: None,
            state_version: 9,
            state_time,
            rollback: None,
            push_due: None,
            noted: 0,
        }
    }

    /// Every pair of states: what is made of it when the row is old, when the node has restarted since, and when it is young.
    #[test]
    fn the_table() {
        let old = Micros(LISTED.0 - 60 * SECOND);
        let young = Micros(LISTED.0 - SECOND);
        let before = Some(Micros(old.0 - SECOND));
        let after = Some(Micros(young.0 + SECOND / 2));
        for state in State::ALL {
            for listed in State::ALL {
                let (settled, orphaned) = match (state, listed) {
                    (State::Running | State::Pausing, State::Paused) => {
                        (Some(Happening::Stored), Some(Happening::Stored))
                    }
                    (State::Paused | State::Resuming, State::Running) => {
                        (Some(Happening::Runs), Some(Happening::Runs))
                    }
                    (State::Pausing, State::Running) => (None, Some(Happening::Runs)),
                    (State::Resuming, State::Paused) => (None, Some(Happening::Stored)),
                    _ => (None, None),
                };
                let pair = format!("{state:?}, listed as {listed:?}");
                let found = |since, started| found(&row(state, since), listed, LISTED, started);
                assert_eq!(found(old, before), settled, "{pair}");
                assert_eq!(found(old, None), settled, "{pair}");
                assert_eq!(found(young, after), orphaned, "{pair}");
                // A call may be under way that the listing is older than.
                assert_eq!(found(young, before), None, "{pair}");
            }
        }
    }

    #[test]
    fn a_session_that_runs_says_nothing_about_its_rollback() {
        let old = Micros(LISTED.0 - 60 * SECOND);
        let mut session = row(State::Resuming, old);
        session.rollback = Some(Rollback {
            to: CheckpointId::random(),
            from: State::Running,
        });
        let found = |started| found(&session, State::Running, LISTED, started);
        assert_eq!(found(None), None);
        assert_eq!(found(Some(Micros(old.0 + 1))), Some(Happening::Runs));
    }

    #[test]
    fn what_comes_of_a_listing_is_a_move_that_may_be_made() {
        let old = Micros(LISTED.0 - 60 * SECOND);
        for state in State::ALL {
            for listed in State::ALL {
                let after = Some(Micros(old.0 + 1));
                if let Some(happening) = found(&row(state, old), listed, LISTED, after) {
                    let step = crate::lifecycle::decide(state, happening);
                    assert_eq!(step, Ok(crate::lifecycle::Step::Move(listed)));
                }
            }
        }
    }
}
