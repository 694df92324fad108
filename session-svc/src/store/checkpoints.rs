//! The rows of checkpoints.

use service_kit::ids::{CheckpointId, SessionId, TeamId};
use sqlx::{FromRow, postgres::PgArguments};

use super::{NewEvent, Store, StoreError, bounded, row::bytes};
use crate::session::{Checkpoint, CheckpointState, Micros, Session};

#[derive(FromRow)]
struct Columns {
    checkpoint_id: String,
    session_id: String,
    team: String,
    request_id: Option<String>,
    name: String,
    state: i16,
    create_time: i64,
    stored_bytes: i64,
    stop_time: i64,
    lease_until: Option<i64>,
}

impl TryFrom<Columns> for Checkpoint {
    type Error = StoreError;

    fn try_from(row: Columns) -> Result<Self, StoreError> {
        let malformed = || StoreError::Malformed(row.checkpoint_id.clone());
        Ok(Self {
            id: CheckpointId::parse(&row.checkpoint_id).map_err(|_| malformed())?,
            session: SessionId::parse(&row.session_id).map_err(|_| malformed())?,
            team: TeamId::parse(&row.team).map_err(|_| malformed())?,
            request_id: row.request_id,
            name: row.name,
            state: match row.state {
                0 => CheckpointState::Making,
                1 => CheckpointState::Kept,
                2 => CheckpointState::Removing,
                _ => return Err(StoreError::Malformed(row.checkpoint_id)),
            },
            create_time: Micros(row.create_time),
            stored_bytes: row.stored_bytes.unsigned_abs(),
            stop_time: row.stop_time,
            lease_until: row.lease_until.map(Micros),
        })
    }
}

type RowQuery<'q> = sqlx::query::QueryAs<'q, sqlx::Postgres, Columns, PgArguments>;

/// Selects whole checkpoints by a condition of our own making: it holds no outside text.
fn select<'q>(condition: &str) -> RowQuery<'q> {
    sqlx::query_as(sqlx::AssertSqlSafe(format!(
        "select checkpoint_id, session_id, team, request_id, name, state, create_time, stored_bytes, stop_time, lease_until \
         from checkpoints where {condition}"
    )))
}

impl Store {
    async fn checkpoints(&self, query: RowQuery<'_>) -> Result<Vec<Checkpoint>, StoreError> {
        bounded(async {
            let rows = query.fetch_all(&self.pool).await?;
            rows.into_iter().map(Checkpoint::try_from).collect()
        })
        .await
    }

    /// Stores a checkpoint to be made; `false` if its team has used the request ID before.
    pub async fn insert_checkpoint(&self, checkpoint: &Checkpoint) -> Result<bool, StoreError> {
        let query = sqlx::query(
            "insert into checkpoints (checkpoint_id, session_id, team, request_id, name, state, create_time, lease_until) \
             values ($1, $2, $3, $4, $5, $6, $7, $8) \
             on conflict (team, request_id) where request_id is not null do nothing",
        )
        .bind(checkpoint.id.to_string())
        .bind(checkpoint.session.to_string())
        .bind(checkpoint.team.to_string())
        .bind(checkpoint.request_id.clone())
        .bind(checkpoint.name.clone())
        .bind(checkpoint.state as i16)
        .bind(checkpoint.create_time.0)
        .bind(checkpoint.lease_until.map(|time| time.0));
        bounded(async { Ok(query.execute(&self.pool).await?.rows_affected() > 0) }).await
    }

    /// One checkpoint of a session, however far it is.
    pub async fn checkpoint(
        &self,
        session: &SessionId,
        id: &CheckpointId,
    ) -> Result<Option<Checkpoint>, StoreError> {
        let query = select("session_id = $1 and checkpoint_id = $2");
        let query = query.bind(session.to_string()).bind(id.to_string());
        Ok(self.checkpoints(query).await?.pop())
    }

    /// The checkpoint a team made with this request ID.
    pub async fn checkpoint_by_request(
        &self,
        team: &TeamId,
        request_id: &str,
    ) -> Result<Option<Checkpoint>, StoreError> {
        let query = select("team = $1 and request_id = $2");
        let query = query.bind(team.to_string()).bind(request_id.to_owned());
        Ok(self.checkpoints(query).await?.pop())
    }

    /// A page of a session's kept checkpoints, oldest first.
    pub async fn list_checkpoints(
        &self,
        session: &SessionId,
        after: Option<(i64, String)>,
        limit: i64,
    ) -> Result<Vec<Checkpoint>, StoreError> {
        let (time, id) = after.unwrap_or((i64::MIN, String::new()));
        let query = select(
            "session_id = $1 and state = 1 and (create_time, checkpoint_id) > ($2, $3) \
             order by create_time, checkpoint_id limit $4",
        );
        let query = query.bind(session.to_string()).bind(time).bind(id);
        self.checkpoints(query.bind(limit)).await
    }

    /// How many checkpoints of a session take room.
    pub async fn count_checkpoints(&self, session: &SessionId) -> Result<i64, StoreError> {
        bounded(async {
            let (count,): (i64,) =
                sqlx::query_as("select count(*) from checkpoints where session_id = $1")
                    .bind(session.as_str())
                    .fetch_one(&self.pool)
                    .await?;
            Ok(count)
        })
        .await
    }

    /// Notes that a checkpoint was made, in one transaction with the session's event of it (`session.version` is the new
    /// version); `false` if the session changed since it was read, or the checkpoint was given up.
    pub async fn keep_checkpoint(
        &self,
        session: &Session,
        event: &NewEvent,
        made: &Checkpoint,
    ) -> Result<bool, StoreError> {
        bounded(async {
            let mut transaction = self.pool.begin().await?;
            let noted = self.update_query(session, event);
            let noted = noted.execute(&mut *transaction).await?.rows_affected() > 0;
            let kept = sqlx::query(
                "update checkpoints set state = 1, lease_until = null, stored_bytes = $2, stop_time = $3 \
                 where checkpoint_id = $1 and state = 0",
            )
            .bind(made.id.as_str())
            .bind(bytes(made.stored_bytes))
            .bind(made.stop_time)
            .execute(&mut *transaction)
            .await?;
            if !noted || kept.rows_affected() == 0 {
                return Ok(false);
            }
            transaction.commit().await?;
            Ok(true)
        })
        .await
    }

    /// From here on it is being removed, whoever does it; its request ID may be used again.
    pub async fn give_up_checkpoint(
        &self,
        id: &CheckpointId,
        lease_until: Micros,
    ) -> Result<(), StoreError> {
        bounded(async {
            sqlx::query(
                "update checkpoints set state = case when state = 1 then 2 else state end, lease_until = $2, request_id = null where checkpoint_id = $1",
            )
            .bind(id.as_str())
            .bind(lease_until.0)
            .execute(&self.pool)
            .await?;
            Ok(())
        })
        .await
    }

    /// Takes the lease of a checkpoint over, or renews it; `false` if it is not as it was read any more.
    pub async fn take_checkpoint(
        &self,
        checkpoint: &Checkpoint,
        until: Micros,
    ) -> Result<bool, StoreError> {
        let query = sqlx::query(
            "update checkpoints set lease_until = $3 where checkpoint_id = $1 and lease_until = $2",
        )
        .bind(checkpoint.id.to_string())
        .bind(checkpoint.lease_until.map(|time| time.0))
        .bind(until.0);
        bounded(async { Ok(query.execute(&self.pool).await?.rows_affected() > 0) }).await
    }

    /// Checkpoints that nobody makes or removes any more.
    pub async fn abandoned_checkpoints(
        &self,
        now: Micros,
        limit: i64,
    ) -> Result<Vec<Checkpoint>, StoreError> {
        let query = select("lease_until <= $1 order by lease_until limit $2");
        self.checkpoints(query.bind(now.0).bind(limit)).await
    }

    /// Forgets a checkpoint, in one transaction with the session's event of it if there is one; `false` if the session changed
    /// since it was read.
    pub async fn forget_checkpoint(
        &self,
        id: &CheckpointId,
        event: Option<(&Session, &NewEvent)>,
    ) -> Result<bool, StoreError> {
        bounded(async {
            let mut transaction = self.pool.begin().await?;
            let gone = sqlx::query("delete from checkpoints where checkpoint_id = $1")
                .bind(id.as_str())
                .execute(&mut *transaction)
                .await?
                .rows_affected();
            // What another replica has forgotten needs no second event.
            if let Some((session, event)) = event.filter(|_| gone > 0) {
                let noted = self.update_query(session, event);
                if noted.execute(&mut *transaction).await?.rows_affected() == 0 {
                    return Ok(false);
                }
            }
            transaction.commit().await?;
            Ok(true)
        })
        .await
    }
}
