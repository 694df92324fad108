//! All SQL of api-gateway.

use service_kit::database;
use sqlx::{FromRow, PgPool};

const SCHEMA: &str = "sandmesh_gateway";

static MIGRATIONS: sqlx::migrate::Migrator = sqlx::migrate!();

/// A statement failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Postgres cannot be reached or refused.
    #[error("database: {0}")]
    Database(#[from] sqlx::Error),
    /// The schema could not be brought up to date.
    #[error("database migration: {0}")]
    Migration(#[from] sqlx::migrate::MigrateError),
}

/// The tables of api-gateway.
#[derive(Debug, Clone)]
pub struct Store {
    pool: PgPool,
}

/// A stored key.
#[derive(Debug, Clone, FromRow)]
pub struct KeyRow {
    /// Public part.
    pub key_id: String,
    /// Owner.
    pub team: String,
    /// Hash of the whole.
    pub secret_sha256: Vec<u8>,
    /// The operator's note.
    pub description: String,
    /// Whether it may do what only operators may.
    pub operator: bool,
    /// When it was made.
    pub create_time: i64,
    /// When it was revoked.
    pub revoke_time: Option<i64>,
}

fn now() -> i64 {
    jiff::Timestamp::now().as_microsecond()
}

impl Store {
    /// Connects lazily.
    pub fn new(url: &str, connections: u32) -> Result<Self, StoreError> {
        let pool = database::connect(url, "api-gateway", SCHEMA, connections)?;
        Ok(Self { pool })
    }

    /// Makes the schema and brings it up to date; safe when several replicas do so at once.
    pub async fn migrate(&self) -> Result<(), StoreError> {
        database::migrate(&self.pool, SCHEMA, &MIGRATIONS).await
    }

    /// One key.
    pub async fn key(&self, key_id: &str) -> Result<Option<KeyRow>, StoreError> {
        Ok(sqlx::query_as("select * from api_keys where key_id = $1")
            .bind(key_id)
            .fetch_optional(&self.pool)
            .await?)
    }

    /// Stores a key; makes its team if there is none.
    pub async fn insert(
        &self,
        key_id: &str,
        team: &str,
        secret_sha256: &[u8],
        description: &str,
    ) -> Result<KeyRow, StoreError> {
        let mut transaction = self.pool.begin().await?;
        sqlx::query("insert into teams (team, create_time) values ($1, $2) on conflict do nothing")
            .bind(team)
            .bind(now())
            .execute(&mut *transaction)
            .await?;
        let row = sqlx::query_as(
            "insert into api_keys (key_id, team, secret_sha256, description, create_time) values ($1, $2, $3, $4, $5) returning *",
        )
        .bind(key_id)
        .bind(team)
        .bind(secret_sha256)
        .bind(description)
        .bind(now())
        .fetch_one(&mut *transaction)
        .await?;
        transaction.commit().await?;
        Ok(row)
    }

    /// A page of keys, newest first, before a time.
    pub async fn list(
        &self,
        team: Option<&str>,
        before: i64,
        limit: i64,
    ) -> Result<Vec<KeyRow>, StoreError> {
        Ok(sqlx::query_as(
            "select * from api_keys where ($1::text is null or team = $1) and create_time < $2 \
             order by create_time desc, key_id desc limit $3",
        )
        .bind(team)
        .bind(before)
        .bind(limit)
        .fetch_all(&self.pool)
        .await?)
    }

    /// Revokes a key; the first time counts.
    pub async fn revoke(&self, key_id: &str) -> Result<Option<KeyRow>, StoreError> {
        Ok(sqlx::query_as(
            "update api_keys set revoke_time = coalesce(revoke_time, $2) where key_id = $1 returning *",
        )
        .bind(key_id)
        .bind(now())
        .fetch_optional(&self.pool)
        .await?)
    }
}
