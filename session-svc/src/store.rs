//! All SQL of session-svc. Every transition of a session is one statement with its event, compare-and-set on the version.
//!
//! No statement is waited for longer than [`STATEMENT_LIMIT`], so a database that is away or hangs is an error soon, not a pile
//! of calls. [`sessions`] holds the rows, [`events`] the history and change feed, [`nodes`] the registry, [`checkpoints`] and
//! [`forks`] what their names say.

use std::time::Duration;

use service_kit::database;
use sqlx::PgPool;

use crate::{lifecycle::State, session::HostPattern};

mod checkpoints;
mod events;
mod forks;
mod nodes;
mod row;
mod sessions;
pub use events::{Event, NewEvent, Revision, Span};
pub use forks::Fork;
pub use nodes::{NodeRow, Registration};
pub use sessions::Filter;

const SCHEMA: &str = "sandmesh_session";
/// How long a statement may take, waiting for a connection included.
const STATEMENT_LIMIT: Duration = Duration::from_millis(1900);

static MIGRATIONS: sqlx::migrate::Migrator = sqlx::migrate!();

/// A statement failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Postgres cannot be reached or refused.
    #[error("database: {0}")]
    Database(#[from] sqlx::Error),
    /// Postgres did not answer in time.
    #[error("database: no answer within {STATEMENT_LIMIT:?}")]
    TimedOut,
    /// The schema could not be brought up to date.
    #[error("database migration: {0}")]
    Migration(#[from] sqlx::migrate::MigrateError),
    /// A stored row does not parse: a newer version wrote it, or it was changed by hand.
    #[error("stored row of {0} does not parse")]
    Malformed(String),
}

/// The tables of session-svc.
#[derive(Debug, Clone)]
pub struct Store {
    pool: PgPool,
    hosts: HostPattern,
}

type Query<'q> = sqlx::query::Query<'q, sqlx::Postgres, sqlx::postgres::PgArguments>;

/// Waits for a statement for as long as it may take.
async fn bounded<T>(
    work: impl Future<Output = Result<T, StoreError>> + Send,
) -> Result<T, StoreError> {
    tokio::time::timeout(STATEMENT_LIMIT, work)
        .await
        .unwrap_or(Err(StoreError::TimedOut))
}

fn state_number(state: State) -> i16 {
    state.wire() as i16
}

impl Store {
    /// Connects lazily: a database that is away is an error of the statement, not of the start.
    pub fn new(url: &str, connections: u32, hosts: HostPattern) -> Result<Self, StoreError> {
        let pool = database::connect(url, "session-svc", SCHEMA, connections)?;
        Ok(Self { pool, hosts })
    }

    /// Makes the schema and brings it up to date; safe when several replicas do so at once.
    pub async fn migrate(&self) -> Result<(), StoreError> {
        database::migrate(&self.pool, SCHEMA, &MIGRATIONS).await
    }

    /// Whether Postgres answers.
    pub async fn ping(&self) -> Result<(), StoreError> {
        bounded(async {
            sqlx::query("select 1").execute(&self.pool).await?;
            Ok(())
        })
        .await
    }
}
