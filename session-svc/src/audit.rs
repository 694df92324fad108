//! What a node hosts against what it should host.
//!
//! Two things can part: a node may have lost a session that is Running here (it restarted), and may host one that is over here
//! (it was declared dead and came back, or a start it never answered succeeded). Both are found by comparing its listing with
//! the rows; a registration brings a listing, and every so often each node is asked for one.

use std::{collections::HashSet, time::Duration};

use proto::node::v1::{HostedSession, ListSessionsRequest};
use service_kit::ids::{NodeId, SessionId};
use tonic::Request;

use crate::{
    errors::SessionError,
    lifecycle::State,
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
        self.lose_missing(node, &listing, asked_at, started).await?;
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

    /// Rows of this node that a listing of it does not have become Lost.
    pub async fn lose_missing(
        &self,
        node: &NodeId,
        listing: &[HostedSession],
        listed_at: Micros,
        node_started: Option<Micros>,
    ) -> Result<(), SessionError> {
        let hosted: HashSet<&str> = listing
            .iter()
            .map(|session| session.session_id.as_str())
            .collect();
        let mut after = String::new();
        loop {
            let page = self.store.living(node, &after, PAGE).await?;
            let Some(last) = page.last() else {
                return Ok(());
            };
            after = last.id.to_string();
            for session in page {
                if must_be_listed(&session, listed_at) && !hosted.contains(session.id.as_str()) {
                    let actor = format!("node:{node}");
                    let end = why_missing(&session, node_started);
                    self.sessions.lose(session, end, &actor).await?;
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
        let is_living = |hosted: &&HostedSession| {
            State::from_wire(hosted.state).is_none_or(|state| !state.is_final())
        };
        let ids = listing.iter().filter(is_living);
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
