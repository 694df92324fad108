//! The catalog in Redis: session ID to node and state, for calls that reach a node which does not host the session.
//!
//! Fed by the change feed, in order, by every replica: writes compare versions, so that it does not matter who is first. Redis
//! may lose all of it at any time: the `ready` key goes with it, nodes then say so instead of guessing, and the catalog is
//! rebuilt from Postgres.
//!
//! Keys, with the configured prefix: `{prefix}:session:<id>` holds JSON `{"nodeId", "state", "version"}`;
//! `{prefix}:nodes` maps node IDs to JSON `{"internalAddress", "dead"}`; `{prefix}:ready` exists while the catalog is whole.

use std::time::Duration;

use redis::{AsyncCommands as _, Script, aio::ConnectionManager};
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use crate::{
    changes::Changes,
    store::{Revision, Store, StoreError},
};

const BATCH: i64 = 500;
const RETRY: Duration = Duration::from_millis(500);
/// How long an ended session can be told from an unknown one.
const TOMBSTONE: Duration = Duration::from_hours(1);
/// How often the nodes' addresses are written anew.
const NODES_EVERY: Duration = Duration::from_secs(1);

/// Sets an entry unless a newer one is there. KEYS[1] key; ARGV: version, JSON, expiry in ms or 0.
const SET_IF_NEWER: &str = r"
local old = redis.call('GET', KEYS[1])
if old and tonumber(cjson.decode(old).version) >= tonumber(ARGV[1]) then return 0 end
if tonumber(ARGV[3]) > 0 then redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3]) else redis.call('SET', KEYS[1], ARGV[2]) end
return 1";

/// Writes the catalog.
#[derive(Debug)]
pub struct Catalog {
    store: Store,
    changes: Changes,
    client: redis::Client,
    prefix: String,
    script: Script,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct SessionEntry<'a> {
    node_id: &'a str,
    state: i32,
    version: u64,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct NodeEntry<'a> {
    internal_address: &'a str,
    dead: bool,
}

#[derive(Debug, thiserror::Error)]
enum CatalogError {
    #[error("{0}")]
    Store(#[from] StoreError),
    #[error("redis: {0}")]
    Redis(#[from] redis::RedisError),
    #[error("entry: {0}")]
    Entry(#[from] serde_json::Error),
}

impl Catalog {
    /// Reads from the store, writes to Redis under the prefix.
    pub fn new(store: Store, changes: Changes, client: redis::Client, prefix: &str) -> Self {
        Self {
            store,
            changes,
            client,
            prefix: prefix.to_owned(),
            script: Script::new(SET_IF_NEWER),
        }
    }

    /// Keeps the catalog until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) {
        let keep = async {
            loop {
                if let Err(error) = self.follow().await {
                    tracing::warn!(%error, "the catalog cannot be kept right now");
                }
                tokio::time::sleep(RETRY).await;
            }
        };
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = keep => {}
        }
    }

    /// Rebuilds, then follows the feed until something fails.
    async fn follow(&self) -> Result<(), CatalogError> {
        let mut redis = self.client.get_connection_manager().await?;
        // The head is taken first: what changes during the rebuild is applied again after it.
        let mut revision = self.store.head().await?;
        self.rebuild(&mut redis).await?;
        let mut listener = self.changes.listen();
        let mut nodes_due = tokio::time::Instant::now();
        loop {
            if tokio::time::Instant::now() >= nodes_due {
                self.write_nodes(&mut redis).await?;
                let ready: bool = redis.exists(self.ready_key()).await?;
                if !ready {
                    tracing::info!("the catalog is gone from redis; rebuilding it");
                    return Ok(());
                }
                nodes_due = tokio::time::Instant::now() + NODES_EVERY;
            }
            let (next, full) = self.apply_changes(&mut redis, revision).await?;
            revision = next;
            if !full {
                listener.heard().await;
            }
        }
    }

    async fn rebuild(&self, redis: &mut ConnectionManager) -> Result<(), CatalogError> {
        let mut after = String::new();
        let mut count = 0_u64;
        loop {
            let page = self.store.known(&after, BATCH).await?;
            let Some(last) = page.last() else { break };
            after = last.id.to_string();
            for session in &page {
                let version = session.version.unsigned_abs();
                let state = session.state;
                self.put(
                    redis,
                    session.id.as_str(),
                    session.node_id.as_str(),
                    state.wire() as i32,
                    version,
                    state.is_final(),
                )
                .await?;
                count += 1;
            }
        }
        self.write_nodes(redis).await?;
        redis.set::<_, _, ()>(self.ready_key(), "1").await?;
        tracing::info!(sessions = count, "catalog rebuilt");
        Ok(())
    }

    async fn apply_changes(
        &self,
        redis: &mut ConnectionManager,
        mut revision: Revision,
    ) -> Result<(Revision, bool), CatalogError> {
        let changes = self.store.changes_after(revision, BATCH).await?;
        let full = i64::try_from(changes.len()).is_ok_and(|count| count == BATCH);
        for change in &changes {
            let session = &change.session;
            let ended = crate::lifecycle::State::from_wire(session.state)
                .is_some_and(crate::lifecycle::State::is_final);
            self.put(
                redis,
                &session.session_id,
                &session.node_id,
                session.state,
                session.version,
                ended,
            )
            .await?;
            revision = change.revision;
        }
        Ok((revision, full))
    }

    async fn put(
        &self,
        redis: &mut ConnectionManager,
        id: &str,
        node_id: &str,
        state: i32,
        version: u64,
        ended: bool,
    ) -> Result<(), CatalogError> {
        let entry = serde_json::to_string(&SessionEntry {
            node_id,
            state,
            version,
        })?;
        let expiry = if ended {
            TOMBSTONE.as_millis() as u64
        } else {
            0
        };
        let _: i64 = self
            .script
            .key(format!("{}:session:{id}", self.prefix))
            .arg(version)
            .arg(entry)
            .arg(expiry)
            .invoke_async(redis)
            .await?;
        Ok(())
    }

    async fn write_nodes(&self, redis: &mut ConnectionManager) -> Result<(), CatalogError> {
        let nodes = self.store.nodes(true, "", 10_000).await?;
        let mut fields = Vec::with_capacity(nodes.len());
        for node in &nodes {
            let entry = NodeEntry {
                internal_address: &node.description.internal_address,
                dead: node.dead,
            };
            fields.push((node.node_id.as_str(), serde_json::to_string(&entry)?));
        }
        if !fields.is_empty() {
            redis
                .hset_multiple::<_, _, _, ()>(format!("{}:nodes", self.prefix), &fields)
                .await?;
        }
        Ok(())
    }

    fn ready_key(&self) -> String {
        format!("{}:ready", self.prefix)
    }
}
