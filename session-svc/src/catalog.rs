//! The catalog in Redis: session ID to node and state, for calls that reach a node which does not host the session.
//!
//! Fed by the change feed, in order, by every replica: writes compare versions, so that it does not matter who is first. Redis
//! may lose all of it at any time: the `ready` key goes with it, nodes then say so instead of guessing, and the catalog is
//! rebuilt from Postgres. `ready` is only set if nothing was lost while it was being rebuilt, which a key written before shows;
//! and a Redis that restarted (its `run_id` is another) is rebuilt even if it kept something, since that may be old.
//!
//! Keys, with the configured prefix: `{prefix}:session:<id>` holds JSON `{"nodeId", "state", "version"}`;
//! `{prefix}:nodes` maps node IDs to JSON `{"internalAddress", "dead"}`; `{prefix}:ready` exists while the catalog is whole;
//! `{prefix}:building:<nonce>` exists while a replica rebuilds it.

use std::time::Duration;

use redis::{
    AsyncCommands as _, Script,
    aio::{ConnectionManager, ConnectionManagerConfig},
};
use serde::Serialize;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{
    changes::Changes,
    lifecycle::State,
    session::Micros,
    store::{Store, StoreError},
};

const BATCH: i64 = 500;
/// How far behind the feed the catalog may be.
const LINGER: Duration = Duration::from_millis(20);
const RETRY: Duration = Duration::from_millis(500);
/// How long an ended session can be told from an unknown one.
const TOMBSTONE: Duration = Duration::from_hours(1);
/// How often the nodes' addresses are written anew.
const NODES_EVERY: Duration = Duration::from_secs(1);

/// How long a rebuild may take, after which its key goes by itself.
const LONGEST_REBUILD_MS: u64 = 600_000;
/// Redis answers within this or is away.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

/// Sets an entry unless a newer one is there. KEYS[1] key; ARGV: version, JSON, expiry in ms or 0.
const SET_IF_NEWER: &str = r"
local old = redis.call('GET', KEYS[1])
if old and tonumber(cjson.decode(old).version) >= tonumber(ARGV[1]) then return 0 end
if tonumber(ARGV[3]) > 0 then redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3]) else redis.call('SET', KEYS[1], ARGV[2]) end
return 1";

/// Says the catalog is whole, unless it was emptied since the rebuild began. KEYS: the rebuild's key, the ready key.
const SET_READY: &str = r"
if redis.call('DEL', KEYS[1]) == 0 then return 0 end
redis.call('SET', KEYS[2], '1')
return 1";

/// Writes the catalog.
#[derive(Debug)]
pub struct Catalog {
    store: Store,
    changes: Changes,
    client: redis::Client,
    prefix: String,
    set_if_newer: Script,
    set_ready: Script,
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

/// What is known of a session.
struct Entry<'a> {
    id: &'a str,
    node_id: &'a str,
    state: i32,
    version: u64,
}

impl<'a> Entry<'a> {
    fn of(session: &'a proto::session::v1::Session) -> Self {
        Self {
            id: &session.session_id,
            node_id: &session.node_id,
            state: session.state,
            version: session.version,
        }
    }
}

/// Which start of Redis this is.
async fn run_id(redis: &mut ConnectionManager) -> Result<Option<String>, redis::RedisError> {
    let info: String = redis::cmd("INFO").arg("server").query_async(redis).await?;
    let id = info.lines().find_map(|line| line.strip_prefix("run_id:"));
    Ok(id.map(|id| id.trim().to_owned()))
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
            set_if_newer: Script::new(SET_IF_NEWER),
            set_ready: Script::new(SET_READY),
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
        let settings = ConnectionManagerConfig::new()
            .set_number_of_retries(1)
            .set_connection_timeout(Some(ANSWER_LIMIT))
            .set_response_timeout(Some(ANSWER_LIMIT));
        let manager = self.client.get_connection_manager_with_config(settings);
        let mut redis = manager.await?;
        let run = run_id(&mut redis).await?;
        // The head is taken first: what changes during the rebuild is applied again after it.
        let mut revision = self.store.head().await?;
        if !self.rebuild(&mut redis).await? {
            tracing::info!("the catalog was emptied while it was rebuilt; starting over");
            return Ok(());
        }
        let mut listener = self.changes.listen();
        let mut nodes_due = Instant::now();
        loop {
            if Instant::now() >= nodes_due {
                self.write_nodes(&mut redis).await?;
                let ready: bool = redis.exists(self.ready_key()).await?;
                if !ready || run_id(&mut redis).await? != run {
                    tracing::info!("redis lost the catalog or was restarted; rebuilding it");
                    redis.del::<_, ()>(self.ready_key()).await?;
                    return Ok(());
                }
                nodes_due = Instant::now() + NODES_EVERY;
            }
            let changes = self.store.changes_after(revision, BATCH).await?;
            let full = i64::try_from(changes.len()).is_ok_and(|count| count == BATCH);
            if let Some(last) = changes.last() {
                let entries = changes.iter().map(|change| Entry::of(&change.session));
                self.put(&mut redis, entries).await?;
                revision = last.revision;
            }
            if !full {
                listener.heard().await;
                // Those that follow at once are written together: the catalog is asked only about what its home node cannot answer.
                tokio::time::sleep(LINGER).await;
            }
        }
    }

    /// Writes everything anew; `false` if Redis was emptied meanwhile.
    async fn rebuild(&self, redis: &mut ConnectionManager) -> Result<bool, CatalogError> {
        let building = format!("{}:building:{:016x}", self.prefix, rand::random::<u64>());
        redis
            .pset_ex::<_, _, ()>(&building, "1", LONGEST_REBUILD_MS)
            .await?;
        let mut after = String::new();
        let mut count = 0;
        loop {
            let ended_after = Micros::now().minus(TOMBSTONE);
            let page = self.store.known(ended_after, &after, BATCH).await?;
            let Some(last) = page.last() else { break };
            after = last.id.to_string();
            count += page.len();
            let entries = page.iter().map(|session| Entry {
                id: session.id.as_str(),
                node_id: session.node_id.as_str(),
                state: session.state.wire() as i32,
                version: session.version.unsigned_abs(),
            });
            self.put(redis, entries).await?;
        }
        self.write_nodes(redis).await?;
        let set: bool = self
            .set_ready
            .key(building)
            .key(self.ready_key())
            .invoke_async(redis)
            .await?;
        if set {
            tracing::info!(sessions = count, "catalog rebuilt");
        }
        Ok(set)
    }

    /// Writes entries in one round trip.
    async fn put<'a>(
        &self,
        redis: &mut ConnectionManager,
        entries: impl Iterator<Item = Entry<'a>>,
    ) -> Result<(), CatalogError> {
        let mut pipe = redis::pipe();
        // The server may have forgotten the script since.
        pipe.load_script(&self.set_if_newer).ignore();
        for entry in entries {
            let ended = State::from_wire(entry.state).is_some_and(State::is_final);
            let expiry = if ended { TOMBSTONE.as_millis() } else { 0 };
            let text = serde_json::to_string(&SessionEntry {
                node_id: entry.node_id,
                state: entry.state,
                version: entry.version,
            })?;
            let mut call = self
                .set_if_newer
                .key(format!("{}:session:{}", self.prefix, entry.id));
            call.arg(entry.version).arg(text).arg(expiry as u64);
            pipe.invoke_script(&call).ignore();
        }
        pipe.query_async::<()>(redis).await?;
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
