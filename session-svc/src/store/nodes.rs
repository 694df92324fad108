//! The node registry's rows.

use prost::Message as _;
use proto::node::v1 as wire;
use service_kit::ids::{HomeTag, NodeId};
use sqlx::{FromRow, postgres::PgArguments};

use super::{Store, StoreError, bounded};
use crate::session::Micros;

/// How many tags are tried until a free one is found; with 60 million tags two tries are rare.
const TAG_TRIES: usize = 16;

/// A node as it described itself.
#[derive(Debug, Clone)]
pub struct Registration {
    /// Which.
    pub node_id: NodeId,
    /// The description, with `home_tag` still empty.
    pub description: wire::Node,
}

/// A known node.
#[derive(Debug, Clone)]
pub struct NodeRow {
    /// Which.
    pub node_id: NodeId,
    /// What its session IDs begin with.
    pub home_tag: HomeTag,
    /// Its current start.
    pub incarnation: String,
    /// Whether it takes no new sessions: it says so, or an operator wants so.
    pub draining: bool,
    /// Whether an operator wants it to take none.
    pub drain: bool,
    /// Whether it was declared dead.
    pub dead: bool,
    /// When it was last heard of.
    pub last_heartbeat: Micros,
    /// What it said of itself last.
    pub description: wire::Node,
}

#[derive(FromRow)]
struct Columns {
    node_id: String,
    home_tag: String,
    incarnation: String,
    draining: bool,
    drain: bool,
    dead: bool,
    last_heartbeat: i64,
    description: Vec<u8>,
    used: Vec<u8>,
}

impl TryFrom<Columns> for NodeRow {
    type Error = StoreError;

    fn try_from(row: Columns) -> Result<Self, StoreError> {
        let malformed = || StoreError::Malformed(row.node_id.clone());
        let mut description = wire::Node::decode(&*row.description).map_err(|_| malformed())?;
        description.used = Some(wire::Capacity::decode(&*row.used).map_err(|_| malformed())?);
        Ok(Self {
            description,
            node_id: NodeId::parse(&row.node_id).map_err(|_| malformed())?,
            home_tag: HomeTag::parse(&row.home_tag).map_err(|_| malformed())?,
            incarnation: row.incarnation,
            draining: row.draining || row.drain,
            drain: row.drain,
            dead: row.dead,
            last_heartbeat: Micros(row.last_heartbeat),
        })
    }
}

type IdQuery<'q> = sqlx::query::QueryAs<'q, sqlx::Postgres, (String,), PgArguments>;

const COLUMNS: &str =
    "node_id, home_tag, incarnation, draining, drain, dead, last_heartbeat, description, used";

impl Store {
    /// Makes a node known, or known again; its home tag stays the same for good.
    pub async fn register_node(
        &self,
        node: &Registration,
        now: Micros,
    ) -> Result<HomeTag, StoreError> {
        for _ in 0..TAG_TRIES {
            let query = sqlx::query_as(
                "insert into nodes (node_id, home_tag, incarnation, ingress_address, internal_address, last_heartbeat, description, used) \
                 values ($1, $2, $3, $4, $5, $6, $7, $8) \
                 on conflict (node_id) do update set incarnation = $3, ingress_address = $4, internal_address = $5, \
                 last_heartbeat = $6, description = $7, used = $8, dead = false, draining = false returning home_tag",
            )
            .bind(node.node_id.as_str())
            .bind(HomeTag::random().to_string())
            .bind(&node.description.incarnation)
            .bind(&node.description.ingress_address)
            .bind(&node.description.internal_address)
            .bind(now.0)
            .bind(node.description.encode_to_vec())
            .bind(node.description.used.unwrap_or_default().encode_to_vec())
;
            let row: Option<(String,)> = bounded(async {
                query
                    .fetch_optional(&self.pool)
                    .await
                    .or_else(|error| match &error {
                        // The tag is another node's.
                        sqlx::Error::Database(database) if database.is_unique_violation() => {
                            Ok(None)
                        }
                        _ => Err(error.into()),
                    })
            })
            .await?;
            if let Some((tag,)) = row {
                return HomeTag::parse(&tag)
                    .map_err(|_| StoreError::Malformed(node.node_id.to_string()));
            }
        }
        Err(StoreError::Malformed(
            "home tags: all that were tried are taken".into(),
        ))
    }

    /// Notes a heartbeat; `false` if this start of the node is not known, or it was declared dead.
    pub async fn heartbeat(
        &self,
        node: &NodeId,
        incarnation: &str,
        used: Option<wire::Capacity>,
        draining: bool,
        now: Micros,
    ) -> Result<bool, StoreError> {
        bounded(async {
            let done = sqlx::query(
                "update nodes set last_heartbeat = $3, draining = $4, used = coalesce($5, used) \
                 where node_id = $1 and incarnation = $2 and not dead",
            )
            .bind(node.as_str())
            .bind(incarnation)
            .bind(now.0)
            .bind(draining)
            .bind(used.map(|used| used.encode_to_vec()))
            .execute(&self.pool)
            .await?;
            Ok(done.rows_affected() > 0)
        })
        .await
    }

    /// Notes what an operator wants of a node; `false` if it is not known.
    pub async fn set_drain(&self, node: &NodeId, drain: bool) -> Result<bool, StoreError> {
        bounded(async {
            let done = sqlx::query(
                "update nodes set drain = $2, draining = draining and $2 where node_id = $1",
            )
            .bind(node.as_str())
            .bind(drain)
            .execute(&self.pool)
            .await?;
            Ok(done.rows_affected() > 0)
        })
        .await
    }

    /// One node, dead or not.
    pub async fn node(&self, node: &NodeId) -> Result<Option<NodeRow>, StoreError> {
        let sql = format!("select {COLUMNS} from nodes where node_id = $1");
        bounded(async {
            let row = sqlx::query_as::<_, Columns>(sqlx::AssertSqlSafe(sql))
                .bind(node.as_str())
                .fetch_optional(&self.pool)
                .await?;
            row.map(NodeRow::try_from).transpose()
        })
        .await
    }

    /// Known nodes by ID, after one.
    pub async fn nodes(
        &self,
        include_dead: bool,
        after: &str,
        limit: i64,
    ) -> Result<Vec<NodeRow>, StoreError> {
        let sql = format!(
            "select {COLUMNS} from nodes where (not dead or $1) and node_id > $2 order by node_id limit $3"
        );
        bounded(async {
            let rows = sqlx::query_as::<_, Columns>(sqlx::AssertSqlSafe(sql))
                .bind(include_dead)
                .bind(after)
                .bind(limit)
                .fetch_all(&self.pool)
                .await?;
            rows.into_iter().map(NodeRow::try_from).collect()
        })
        .await
    }

    /// Declares nodes dead that were not heard of since a time.
    pub async fn bury_nodes(&self, silent_since: Micros) -> Result<Vec<NodeId>, StoreError> {
        let query = sqlx::query_as(
            "update nodes set dead = true where not dead and last_heartbeat < $1 returning node_id",
        );
        self.node_ids(query.bind(silent_since.0)).await
    }

    /// Dead nodes that still have sessions which run on them, or so it says: a replica died between the two steps.
    pub async fn dead_nodes_with_sessions(&self) -> Result<Vec<NodeId>, StoreError> {
        let query = sqlx::query_as(
            "select node_id from nodes where dead and exists \
             (select 1 from sessions where sessions.node_id = nodes.node_id and state < 8 and state <> 5)",
        );
        self.node_ids(query).await
    }

    async fn node_ids(&self, query: IdQuery<'_>) -> Result<Vec<NodeId>, StoreError> {
        bounded(async {
            let rows = query.fetch_all(&self.pool).await?;
            rows.into_iter()
                .map(|(id,)| NodeId::parse(&id).map_err(|_| StoreError::Malformed(id)))
                .collect()
        })
        .await
    }
}
