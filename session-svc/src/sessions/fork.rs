//! Children of a session, on its node.
//!
//! All children are rows (Starting) before the node is asked, in one transaction. They start together or are given up: a child
//! whose replica died is stopped and fails like a start that nobody can ask for again (`stop.rs`), since the moment it was taken at
//! is over; a request ID is free again once none of its children ever ran.

use std::{collections::HashMap, time::Duration};

use futures::{StreamExt as _, stream};
use proto::node::v1::{ForkChild, ForkSessionRequest};
use service_kit::{
    ids::{NodeId, SessionId},
    mesh::Caller,
};

use super::{
    FIRST_VERSION, Need, SessionError, Sessions, beginning,
    node_call::{Answer, reason, within},
};
use crate::{
    lifecycle::State,
    session::{EndReason, Micros, Network, Session, access_token_sha256, micros},
    store::{Fork, NewEvent},
};

/// How many children's ends and beginnings are noted at once.
const AT_ONCE: usize = 8;
/// How often a fork is tried anew when another with its request ID was faster, or came to nothing.
const TRIES: usize = 3;

/// What to make.
#[derive(Debug, Clone)]
pub struct NewFork {
    /// How many children.
    pub count: u32,
    /// Time to live of each.
    pub timeout: Duration,
    /// The client's own ID for the request.
    pub request_id: Option<String>,
}

/// What became of it.
#[derive(Debug)]
pub struct Forked {
    /// Children that run, or ran.
    pub running: Vec<Session>,
    /// Children that did not start.
    pub failed: Vec<Session>,
    /// How long the parent stood still, in microseconds.
    pub parent_stop_time: i64,
}

impl Sessions {
    /// Makes children of a session and returns them Running; the same request ID gives the same children.
    pub async fn fork(
        &self,
        caller: &Caller,
        parent: Session,
        new: NewFork,
    ) -> Result<Forked, SessionError> {
        for _ in 0..TRIES {
            if let Some(request) = &new.request_id
                && let Some(earlier) = self.forked_before(caller, &parent.id, request).await?
            {
                return Ok(earlier);
            }
            let parent = self.at_rest(parent.clone()).await?;
            let children = self.children(&parent, &new).await?;
            let fork = new.request_id.clone().map(|request_id| Fork {
                team: caller.team.clone(),
                request_id,
                parent: parent.id.clone(),
                children: children.iter().map(|child| child.id.to_string()).collect(),
                parent_stop_time: None,
            });
            let Some(first) = children.first() else {
                break;
            };
            let begin = beginning(first);
            let stored = self.store.insert_children(&children, &begin, fork.as_ref());
            if stored.await? {
                self.changes.tell();
                let sessions = self.clone();
                let actor = format!("team:{}", caller.team);
                let work = async move { sessions.start_all(parent, children, fork, &actor).await };
                return self.owned(work).await;
            }
        }
        Err(SessionError::Contended(parent.id))
    }

    /// What came of an earlier request with this ID; `None` if there is none, or no child of it ever ran.
    async fn forked_before(
        &self,
        caller: &Caller,
        parent: &SessionId,
        request: &str,
    ) -> Result<Option<Forked>, SessionError> {
        let earlier = self.store.fork_by_request(&caller.team, request).await?;
        let Some(earlier) = earlier else {
            return Ok(None);
        };
        if earlier.parent != *parent {
            return Err(SessionError::Invalid {
                field: "request_id",
                description: format!("was used for a fork of session {}", earlier.parent),
            });
        }
        let mut listener = self.changes.listen();
        let waiting = async {
            loop {
                let children = self.store.get_all(earlier.children.clone()).await?;
                if children.iter().all(|child| child.state != State::Starting) {
                    return Ok::<_, SessionError>(children);
                }
                listener.heard().await;
            }
        };
        let waited = tokio::time::timeout(self.limits.store + self.limits.lease, waiting).await;
        let Ok(children) = waited else {
            return Err(SessionError::StillStarting(parent.clone()));
        };
        let (running, failed): (Vec<_>, Vec<_>) = children?
            .into_iter()
            .partition(|child| child.start_time.is_some());
        if running.is_empty() {
            self.store.forget_fork(&earlier).await?;
            return Ok(None);
        }
        // The time may have been noted since.
        let now = self.store.fork_by_request(&caller.team, request).await?;
        let parent_stop_time = now.and_then(|fork| fork.parent_stop_time);
        Ok(Some(Forked {
            running,
            failed,
            parent_stop_time: parent_stop_time.unwrap_or_default(),
        }))
    }

    /// The rows of the children to be, which their node is likely to have room for.
    async fn children(
        &self,
        parent: &Session,
        new: &NewFork,
    ) -> Result<Vec<Session>, SessionError> {
        if !matches!(parent.state, State::Running | State::Paused) {
            return Err(SessionError::WrongState {
                id: parent.id.clone(),
                state: parent.state,
            });
        }
        let node = self.store.node(&parent.node_id).await?;
        let node = node
            .filter(|node| !node.dead)
            .ok_or_else(|| SessionError::NodeUnreachable {
                id: parent.id.clone(),
            })?;
        self.reserve(&parent.node_id, parent, new.count).await?;
        let now = Micros::now();
        let child = |_| Session {
            id: SessionId::random(&node.home_tag),
            team: parent.team.clone(),
            request_id: None,
            state: State::Starting,
            node_id: parent.node_id.clone(),
            template: parent.template.clone(),
            template_version: parent.template_version.clone(),
            template_spec: parent.template_spec.clone(),
            resources: parent.resources,
            network: Network::clone(&parent.network),
            metadata: parent.metadata.clone(),
            env: parent.env.clone(),
            on_timeout: parent.on_timeout,
            wake_on_request: parent.wake_on_request,
            create_time: now,
            start_time: None,
            timeout: i64::try_from(new.timeout.as_micros()).unwrap_or(i64::MAX),
            deadline: now.plus(new.timeout),
            end_time: None,
            end_reason: None,
            lease_until: Some(now.plus(self.limits.lease)),
            version: FIRST_VERSION,
            parent: Some(parent.id.clone()),
            stored_bytes: 0,
            time_left: None,
            state_version: FIRST_VERSION,
            state_time: now,
            rollback: None,
            // A change of the parent's settings that is on its way may have reached it after the children were taken.
            push_due: parent.push_due,
            noted: 0,
        };
        Ok((0..new.count).map(child).collect())
    }

    async fn reserve(
        &self,
        node: &NodeId,
        parent: &Session,
        count: u32,
    ) -> Result<(), SessionError> {
        let need = Need::of(&parent.resources);
        let reserved = self.nodes.reserve(node, need, count).await?;
        reserved.map_err(|free| SessionError::NoRoomForChildren {
            id: parent.id.clone(),
            count,
            free,
        })
    }

    async fn start_all(
        &self,
        parent: Session,
        children: Vec<Session>,
        fork: Option<Fork>,
        actor: &str,
    ) -> Result<Forked, SessionError> {
        let limit = self.limits.store;
        let request = ForkSessionRequest {
            session_id: parent.id.to_string(),
            children: children
                .iter()
                .map(|child| ForkChild {
                    session_id: child.id.to_string(),
                    access_token_sha256: access_token_sha256(&self.token, &child.id),
                })
                .collect(),
        };
        let asked = self.ask(&parent, limit, |mut node| async move {
            node.fork_session(within(limit, request)).await
        });
        let answer = self.holding_all(&children, asked).await?;
        let done = match answer {
            Answer::Done(done) => done,
            Answer::Refused(status) => {
                let end = reason(&status, "FORK_FAILED");
                self.each(children, |child| self.fail(child, end.clone()))
                    .await;
                self.forget(fork).await?;
                return Err(SessionError::Refused {
                    id: parent.id,
                    status,
                });
            }
            Answer::Unclear => {
                // Some may run: they are Stopping until the node has heard of it.
                let end = EndReason::new("NODE_UNREACHABLE", "its node did not answer the fork");
                self.each(children, |child| self.give_up(child, end.clone(), false))
                    .await;
                self.forget(fork).await?;
                return Err(SessionError::NodeUnreachable { id: parent.id });
            }
        };
        let parent_stop_time = micros(done.parent_stop_time);
        let ends: HashMap<String, EndReason> = done
            .failed
            .into_iter()
            .map(|failed| {
                let end = failed.end_reason.unwrap_or_default();
                (failed.session_id, EndReason::new(end.reason, end.message))
            })
            .collect();
        let noted = self.each(children.clone(), |child| async {
            match ends.get(child.id.as_str()) {
                Some(end) => self.fail(child, end.clone()).await,
                None => self.runs(child).await,
            }
        });
        let outcomes = self.holding_all(&children, noted).await;
        let (mut running, mut failed) = (Vec::new(), Vec::new());
        for child in outcomes {
            if child.start_time.is_some() {
                running.push(child);
            } else {
                failed.push(child);
            }
        }
        if running.is_empty() {
            self.forget(fork).await?;
            let first = failed
                .into_iter()
                .find_map(|child| Some((child.id, child.end_reason?)));
            return Err(match first {
                Some((id, end)) => SessionError::DidNotStart { id, end },
                None => SessionError::NodeUnreachable { id: parent.id },
            });
        }
        if let Some(fork) = fork {
            self.store.fork_answered(&fork, parent_stop_time).await?;
        }
        let event =
            NewEvent::new("FORKED", actor).because("", format!("{} children", running.len()));
        self.note(&parent.id, &event).await?;
        Ok(Forked {
            running,
            failed,
            parent_stop_time,
        })
    }

    /// Notes something of each child; those of which it could be noted. The others are left to their leases.
    async fn each<F>(
        &self,
        children: Vec<Session>,
        work: impl Fn(Session) -> F + Send,
    ) -> Vec<Session>
    where
        F: Future<Output = Result<Session, SessionError>> + Send,
    {
        let noted = stream::iter(children.into_iter().map(work)).buffered(AT_ONCE);
        noted
            .filter_map(|noted| async {
                noted
                    .inspect_err(|error| tracing::debug!(%error, "a child of a fork is not noted"))
                    .ok()
            })
            .collect()
            .await
    }

    async fn forget(&self, fork: Option<Fork>) -> Result<(), SessionError> {
        if let Some(fork) = fork {
            self.store.forget_fork(&fork).await?;
        }
        Ok(())
    }

    /// Works on children while holding the leases of all of them.
    async fn holding_all<T>(
        &self,
        children: &[Session],
        work: impl Future<Output = T> + Send,
    ) -> T {
        tokio::select! {
            done = work => done,
            never = self.renew_all(children) => match never {},
        }
    }

    async fn renew_all(&self, children: &[Session]) -> std::convert::Infallible {
        let ids: Vec<String> = children.iter().map(|child| child.id.to_string()).collect();
        let mut held = children.iter().find_map(|child| child.lease_until);
        let every = self.limits.lease / 3;
        loop {
            tokio::time::sleep(every).await;
            let Some(old) = held else {
                std::future::pending().await
            };
            let until = Micros::now().plus(self.limits.lease);
            match self.store.renew_starts(ids.clone(), old, until).await {
                Ok(()) => held = Some(until),
                Err(error) => tracing::warn!(%error, "leases could not be renewed"),
            }
        }
    }
}
