//! Emptying a node.

use futures::{StreamExt as _, stream};
use proto::node::v1::DrainNodeRequest;
use service_kit::ids::NodeId;

use super::{SessionError, Sessions, node_call::within};
use crate::{
    lifecycle::State,
    session::{EndReason, Session},
};

/// How many sessions of a node are paused at once: each writes its memory to the same disk.
const PAUSES_AT_ONCE: usize = 4;
const PAGE: i64 = 500;

/// What became of a node's sessions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drained {
    /// Paused by this drain.
    pub paused: u32,
    /// Still there and not paused.
    pub running: u32,
}

impl Sessions {
    /// Makes a node take no new sessions, or take them again; with `pause`, pauses what runs there.
    ///
    /// What an operator wants is noted first, so that no session goes there even if the node cannot be told now; taking sessions
    /// again begins with the node. A node that restarts is told again when it registers.
    pub async fn drain(
        &self,
        node: NodeId,
        draining: bool,
        pause: bool,
    ) -> Result<Drained, SessionError> {
        let sessions = self.clone();
        self.owned(async move {
            if !draining {
                sessions.tell_to_drain(&node, false).await?;
            }
            if !sessions.store.set_drain(&node, draining).await? {
                return Err(SessionError::NodeUnknown(node));
            }
            sessions.nodes.forget_view().await;
            if draining {
                sessions.tell_to_drain(&node, true).await?;
            }
            let paused = if draining && pause {
                sessions.pause_all(&node).await?
            } else {
                0
            };
            let running = sessions.on(&node).await?;
            let running = running.iter().filter(|session| is_active(session)).count();
            Ok(Drained {
                paused,
                running: u32::try_from(running).unwrap_or(u32::MAX),
            })
        })
        .await
    }

    /// Tells a node whether to take new sessions.
    pub async fn tell_to_drain(&self, id: &NodeId, draining: bool) -> Result<(), SessionError> {
        let limit = self.limits.stop;
        let Some(mut node) = self.nodes.reach(id).await? else {
            return Err(SessionError::NodeUnknown(id.clone()));
        };
        let told = node.drain_node(within(limit, DrainNodeRequest { draining }));
        match tokio::time::timeout(limit, told).await {
            Ok(Ok(_)) => Ok(()),
            failed => {
                tracing::warn!(node_id = %id, ?failed, "a node was not told whether to take sessions");
                Err(SessionError::NodeSilent(id.clone()))
            }
        }
    }

    async fn pause_all(&self, node: &NodeId) -> Result<u32, SessionError> {
        let running = self.on(node).await?;
        let running = running
            .into_iter()
            .filter(|session| session.state == State::Running);
        let why = || Some(EndReason::new("NODE_DRAINED", "its node is being emptied"));
        let paused = stream::iter(running)
            .map(|session| async move {
                let id = session.id.clone();
                let paused = self.pause(session, why(), "operator").await;
                if let Err(error) = &paused {
                    tracing::warn!(session_id = id.short(), %error, "a session of a node that is emptied goes on");
                }
                paused.is_ok()
            })
            .buffer_unordered(PAUSES_AT_ONCE)
            .filter(|paused| std::future::ready(*paused))
            .count()
            .await;
        Ok(u32::try_from(paused).unwrap_or(u32::MAX))
    }

    /// The sessions of a node that are not over.
    async fn on(&self, node: &NodeId) -> Result<Vec<Session>, SessionError> {
        let mut all: Vec<Session> = Vec::new();
        loop {
            let after = all.last().map(|last| last.id.to_string());
            let page = self
                .store
                .living(node, &after.unwrap_or_default(), PAGE)
                .await?;
            if page.is_empty() {
                return Ok(all);
            }
            all.extend(page);
        }
    }
}

fn is_active(session: &Session) -> bool {
    !matches!(session.state, State::Paused | State::Stopping)
}
