//! The node registry: who is there, what they have left, and the channels to call them by.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use proto::node::v1::{self as wire, node_service_client::NodeServiceClient};
use service_kit::{
    address::Address,
    ids::{HomeTag, NodeId},
    mesh::{self, MeshChannel, MeshToken},
};
use tokio::{sync::Mutex as AsyncMutex, time::Instant};

use crate::{
    placement::{Candidate, Free, Need, choose, most_free},
    session::Micros,
    store::{NodeRow, Registration, Store, StoreError},
};

/// How many missed heartbeats make a node silent.
const MISSED: u32 = 3;
/// How old the view of the nodes may be when a session is placed.
const VIEW_AGE: Duration = Duration::from_millis(500);
const PAGE: i64 = 10_000;

/// The nodes that take sessions, as they were read, less what was placed on them since.
#[derive(Debug)]
struct View {
    read: Instant,
    candidates: Vec<Candidate>,
}

/// Where a session may go.
#[derive(Debug)]
pub enum Placed {
    /// To this node.
    On(Candidate),
    /// Nowhere; the most that any node has left.
    Nowhere(Free),
}

/// Knows the nodes.
#[derive(Debug, Clone)]
pub struct Nodes {
    store: Store,
    token: MeshToken,
    silent_after: Duration,
    view: Arc<AsyncMutex<Option<View>>>,
    channels: Arc<Mutex<HashMap<String, MeshChannel>>>,
}

impl Nodes {
    /// Reads the registry's rows; a node is silent after three heartbeat intervals.
    pub fn new(store: Store, token: MeshToken, heartbeat_interval: Duration) -> Self {
        Self {
            store,
            token,
            silent_after: heartbeat_interval * MISSED,
            view: Arc::default(),
            channels: Arc::default(),
        }
    }

    /// Picks a node for a session and counts it there until the next look at the registry.
    pub async fn place(&self, need: Need, tried: &[NodeId]) -> Result<Placed, StoreError> {
        let mut slot = self.view.lock().await;
        let fresh = slot
            .as_ref()
            .is_some_and(|view| view.read.elapsed() < VIEW_AGE);
        for look_again in [!fresh, true] {
            if look_again {
                // One reader asks the database, the others wait for its answer: that is the point of holding the lock.
                *slot = Some(self.look().await?);
            }
            let Some(view) = slot.as_mut() else { continue };
            let picks = (rand::random(), rand::random());
            let chosen =
                choose(&view.candidates, need, tried, picks).map(|node| node.node_id.clone());
            let mut candidates = view.candidates.iter_mut();
            if let Some(node) = candidates.find(|node| Some(&node.node_id) == chosen.as_ref()) {
                node.take(need);
                return Ok(Placed::On(node.clone()));
            }
            if look_again {
                return Ok(Placed::Nowhere(most_free(&view.candidates)));
            }
        }
        Ok(Placed::Nowhere(Free::default()))
    }

    /// Counts sessions on a node until the next look at the registry, if it seems to have room for them; what it has left if not,
    /// which is nothing if it takes none.
    pub async fn reserve(
        &self,
        node: &NodeId,
        need: Need,
        count: u32,
    ) -> Result<Result<(), Free>, StoreError> {
        let mut slot = self.view.lock().await;
        let fresh = slot
            .as_ref()
            .is_some_and(|view| view.read.elapsed() < VIEW_AGE);
        let mut free = Free::default();
        for look_again in [!fresh, true] {
            if look_again {
                *slot = Some(self.look().await?);
            }
            let mut candidates = slot.iter_mut().flat_map(|view| &mut view.candidates);
            let found = candidates.find(|candidate| candidate.node_id == *node);
            free = Free::default();
            if let Some(candidate) = found {
                if candidate.take_all(need, count) {
                    return Ok(Ok(()));
                }
                free = candidate.free;
            }
            if look_again {
                break;
            }
        }
        Ok(Err(free))
    }

    /// A node said that it is full: so it is, until its next heartbeat says otherwise. Answers the most that any node has left.
    pub async fn is_full(&self, node: &NodeId) -> Free {
        let mut slot = self.view.lock().await;
        let Some(view) = slot.as_mut() else {
            return Free::default();
        };
        for candidate in &mut view.candidates {
            if candidate.node_id == *node {
                candidate.free = Free::default();
            }
        }
        most_free(&view.candidates)
    }

    async fn look(&self) -> Result<View, StoreError> {
        let (now, read) = (Micros::now(), Instant::now());
        let rows = self.store.nodes(false, "", PAGE).await?;
        let ready = rows
            .iter()
            .filter(|row| self.state_of(row, now) == wire::NodeState::Ready);
        Ok(View {
            read,
            candidates: ready.map(candidate).collect(),
        })
    }

    /// Looks anew at the next placement: a node came or went.
    pub async fn forget_view(&self) {
        *self.view.lock().await = None;
    }

    /// A client for a node; `None` if it is not known, or dead.
    pub async fn reach(
        &self,
        node: &NodeId,
    ) -> Result<Option<NodeServiceClient<MeshChannel>>, StoreError> {
        let known = self.view.lock().await.as_ref().and_then(|view| {
            let mut candidates = view.candidates.iter();
            candidates
                .find(|known| known.node_id == *node)
                .filter(|_| view.read.elapsed() < VIEW_AGE)
                .map(|known| known.internal_address.clone())
        });
        let address = if known.is_some() {
            known
        } else {
            let row = self.store.node(node).await?.filter(|row| !row.dead);
            row.map(|row| row.description.internal_address)
        };
        Ok(address.and_then(|address| self.client(&address)))
    }

    /// Nodes that are heard of, for an audit of what they host.
    pub async fn heard_of(&self) -> Result<Vec<NodeId>, StoreError> {
        let now = Micros::now();
        let rows = self.store.nodes(false, "", PAGE).await?;
        let heard = rows.into_iter().filter(|row| {
            matches!(
                self.state_of(row, now),
                wire::NodeState::Ready | wire::NodeState::Draining
            )
        });
        Ok(heard.map(|row| row.node_id).collect())
    }

    /// A client for the node at an address; `None` if it is not an address.
    fn client(&self, address: &str) -> Option<NodeServiceClient<MeshChannel>> {
        let parsed: Address = address.parse().ok()?;
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        let channel = channels
            .entry(address.to_owned())
            .or_insert_with(|| mesh::connect(std::slice::from_ref(&parsed), &self.token));
        Some(NodeServiceClient::new(channel.clone()))
    }

    /// Makes a node known; answers its home tag.
    pub async fn register(&self, node: &Registration) -> Result<HomeTag, StoreError> {
        let tag = self.store.register_node(node, Micros::now()).await?;
        self.forget_view().await;
        Ok(tag)
    }

    /// A page of nodes as the wire shows them.
    pub async fn list(
        &self,
        include_dead: bool,
        after: &str,
        limit: i64,
    ) -> Result<Vec<wire::Node>, StoreError> {
        let now = Micros::now();
        let rows = self.store.nodes(include_dead, after, limit).await?;
        Ok(rows.into_iter().map(|row| self.wire(row, now)).collect())
    }

    fn wire(&self, row: NodeRow, now: Micros) -> wire::Node {
        let state = self.state_of(&row, now).into();
        wire::Node {
            home_tag: row.home_tag.to_string(),
            state,
            last_heartbeat: Some(row.last_heartbeat.wire()),
            incarnation: row.incarnation,
            ..row.description
        }
    }

    fn state_of(&self, row: &NodeRow, now: Micros) -> wire::NodeState {
        if row.dead {
            wire::NodeState::Dead
        } else if row.last_heartbeat < now.minus(self.silent_after) {
            wire::NodeState::Silent
        } else if row.draining {
            wire::NodeState::Draining
        } else {
            wire::NodeState::Ready
        }
    }
}

fn candidate(row: &NodeRow) -> Candidate {
    let total = row.description.total.unwrap_or_default();
    let used = row.description.used.unwrap_or_default();
    Candidate {
        node_id: row.node_id.clone(),
        home_tag: row.home_tag.clone(),
        internal_address: row.description.internal_address.clone(),
        free: Free {
            sessions: total.sessions.saturating_sub(used.sessions),
            memory_bytes: total.memory_bytes.saturating_sub(used.memory_bytes),
            vcpus: total.vcpus.saturating_sub(used.vcpus),
            disk_bytes: total.disk_bytes.saturating_sub(used.disk_bytes),
        },
    }
}
