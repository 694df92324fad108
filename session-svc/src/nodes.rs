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
use tokio::sync::RwLock;

use crate::{
    placement::{Candidate, Free},
    session::Micros,
    store::{NodeRow, Registration, Store, StoreError},
};

/// How many missed heartbeats make a node silent.
const MISSED: u32 = 3;
/// How old the view of the nodes may be when a session is placed.
const VIEW_AGE: Duration = Duration::from_millis(500);
const PAGE: i64 = 10_000;

/// The candidates, and when they were read.
type View = (tokio::time::Instant, Arc<[Candidate]>);

/// Knows the nodes.
#[derive(Debug, Clone)]
pub struct Nodes {
    store: Store,
    token: MeshToken,
    silent_after: Duration,
    view: Arc<RwLock<Option<View>>>,
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

    /// Nodes that take sessions, as of half a second ago at most.
    pub async fn candidates(&self) -> Result<Arc<[Candidate]>, StoreError> {
        if let Some((read, view)) = &*self.view.read().await
            && read.elapsed() < VIEW_AGE
        {
            return Ok(Arc::clone(view));
        }
        // One reader asks the database, the others wait for its answer: that is the point of holding the lock.
        let mut slot = self.view.write().await;
        if let Some((read, view)) = &*slot
            && read.elapsed() < VIEW_AGE
        {
            return Ok(Arc::clone(view));
        }
        let now = Micros::now();
        let rows = self.store.nodes(false, "", PAGE).await?;
        let ready = rows
            .iter()
            .filter(|row| self.state_of(row, now) == wire::NodeState::Ready);
        let view: Arc<[Candidate]> = ready.map(candidate).collect();
        *slot = Some((tokio::time::Instant::now(), Arc::clone(&view)));
        Ok(view)
    }

    /// Looks anew at the next placement: a node came or went.
    pub async fn forget_view(&self) {
        *self.view.write().await = None;
    }

    /// Where a node is called.
    pub async fn internal_address(&self, node: &NodeId) -> Result<Option<String>, StoreError> {
        if let Some(known) = self
            .candidates()
            .await?
            .iter()
            .find(|known| known.node_id == *node)
        {
            return Ok(Some(known.internal_address.clone()));
        }
        let rows = self.store.nodes(true, "", PAGE).await?;
        Ok(rows
            .into_iter()
            .find(|row| row.node_id == *node)
            .map(|row| row.description.internal_address))
    }

    /// A client for the node at an address; `None` if it is not an address.
    pub fn client(&self, address: &str) -> Option<NodeServiceClient<MeshChannel>> {
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
