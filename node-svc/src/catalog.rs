//! The catalog as a node reads it: where a session is that is not here. See session-svc's `catalog.rs` for the keys.

use std::time::Duration;

use redis::{AsyncCommands as _, aio::ConnectionManager};
use serde::Deserialize;
use service_kit::ids::{NodeId, SessionId};
use tokio::sync::OnceCell;

const TIMEOUT: Duration = Duration::from_millis(500);

/// Reads the catalog.
#[derive(Debug)]
pub struct Catalog {
    client: redis::Client,
    connection: OnceCell<ConnectionManager>,
    prefix: String,
}

/// What the catalog says of a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// Nothing: there is none.
    Unknown,
    /// It is, or was, on this node, in this state (number of `SessionState`).
    On {
        /// The node.
        node: NodeId,
        /// Where its internal listener is; none if the node is not known or dead.
        internal_address: Option<String>,
        /// State.
        state: i32,
    },
}

/// The catalog cannot be asked, or is not whole.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// Redis is away or slow.
    #[error("redis: {0}")]
    Redis(#[from] redis::RedisError),
    /// No answer in time.
    #[error("redis did not answer in time")]
    Timeout,
    /// It is being rebuilt.
    #[error("the catalog is being rebuilt")]
    NotReady,
    /// An entry does not parse.
    #[error("entry: {0}")]
    Entry(#[from] serde_json::Error),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct SessionEntry {
    node_id: String,
    state: i32,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct NodeEntry {
    internal_address: String,
    dead: bool,
}

impl Catalog {
    /// Connects at the first question.
    pub fn new(client: redis::Client, prefix: &str) -> Self {
        Self {
            client,
            connection: OnceCell::new(),
            prefix: prefix.to_owned(),
        }
    }

    /// Where a session is.
    pub async fn find(&self, id: &SessionId) -> Result<Place, CatalogError> {
        tokio::time::timeout(TIMEOUT, self.ask(id))
            .await
            .map_err(|_| CatalogError::Timeout)?
    }

    async fn ask(&self, id: &SessionId) -> Result<Place, CatalogError> {
        let manager = self
            .connection
            .get_or_try_init(|| self.client.get_connection_manager())
            .await?;
        let mut redis = manager.clone();
        let prefix = &self.prefix;
        // In one round trip, and the marker last: an entry missing while the marker is there is missing for good.
        let (entry, ready): (Option<String>, bool) = redis::pipe()
            .get(format!("{prefix}:session:{id}"))
            .exists(format!("{prefix}:ready"))
            .query_async(&mut redis)
            .await?;
        let Some(entry) = entry else {
            return if ready {
                Ok(Place::Unknown)
            } else {
                Err(CatalogError::NotReady)
            };
        };
        let entry: SessionEntry = serde_json::from_str(&entry)?;
        let Ok(node) = NodeId::parse(&entry.node_id) else {
            return Ok(Place::Unknown);
        };
        let known: Option<String> = redis.hget(format!("{prefix}:nodes"), node.as_str()).await?;
        let known = known
            .map(|text| serde_json::from_str::<NodeEntry>(&text))
            .transpose()?;
        let internal_address = known
            .filter(|known| !known.dead)
            .map(|known| known.internal_address);
        Ok(Place::On {
            node,
            internal_address,
            state: entry.state,
        })
    }
}
