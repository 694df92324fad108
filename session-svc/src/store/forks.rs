//! What was answered to forks with a request ID, so that the same request again is the same fork.

use service_kit::ids::{SessionId, TeamId};

use super::{NewEvent, Store, StoreError, bounded};
use crate::session::{Micros, Session};

/// A fork that can be asked for again.
#[derive(Debug, Clone)]
pub struct Fork {
    /// Owner.
    pub team: TeamId,
    /// The client's own ID for it.
    pub request_id: String,
    /// Whose children.
    pub parent: SessionId,
    /// Their IDs.
    pub children: Vec<String>,
    /// How long the parent stood still, in microseconds; `None` until the node has answered.
    pub parent_stop_time: Option<i64>,
}

impl Store {
    /// Stores children with their first events, and the fork they are of, in one transaction; `false` if its team has used the
    /// request ID before.
    pub async fn insert_children(
        &self,
        children: &[Session],
        begin: &[NewEvent],
        fork: Option<&Fork>,
    ) -> Result<bool, StoreError> {
        let mut transaction =
            bounded(async { Ok::<_, StoreError>(self.pool.begin().await?) }).await?;
        if let Some(fork) = fork {
            let query = sqlx::query(
                "insert into forks (team, request_id, parent_session_id, children, create_time) \
                 values ($1, $2, $3, $4, $5) on conflict do nothing",
            )
            .bind(fork.team.as_str())
            .bind(&fork.request_id)
            .bind(fork.parent.as_str())
            .bind(&fork.children)
            .bind(Micros::now().0);
            let stored = bounded(async { Ok(query.execute(&mut *transaction).await?) }).await?;
            if stored.rows_affected() == 0 {
                return Ok(false);
            }
        }
        // One statement each: a hundred at once take longer than one may.
        for child in children {
            let query = self.insert_query(child, begin);
            bounded(async { Ok(query.execute(&mut *transaction).await?) }).await?;
        }
        bounded(async { Ok(transaction.commit().await?) }).await?;
        Ok(true)
    }

    /// The fork a team made with this request ID.
    pub async fn fork_by_request(
        &self,
        team: &TeamId,
        request_id: &str,
    ) -> Result<Option<Fork>, StoreError> {
        bounded(async {
            let row: Option<(String, Vec<String>, Option<i64>)> = sqlx::query_as(
                "select parent_session_id, children, parent_stop_time from forks where team = $1 and request_id = $2",
            )
            .bind(team.as_str())
            .bind(request_id)
            .fetch_optional(&self.pool)
            .await?;
            let Some((parent, children, parent_stop_time)) = row else {
                return Ok(None);
            };
            Ok(Some(Fork {
                team: team.clone(),
                request_id: request_id.to_owned(),
                parent: SessionId::parse(&parent).map_err(|_| StoreError::Malformed(parent))?,
                children,
                parent_stop_time,
            }))
        })
        .await
    }

    /// Notes what the node said.
    pub async fn fork_answered(&self, fork: &Fork, stop_time: i64) -> Result<(), StoreError> {
        bounded(async {
            sqlx::query(
                "update forks set parent_stop_time = $4 where team = $1 and request_id = $2 and children = $3",
            )
            .bind(fork.team.as_str())
            .bind(&fork.request_id)
            .bind(&fork.children)
            .bind(stop_time)
            .execute(&self.pool)
            .await?;
            Ok(())
        })
        .await
    }

    /// Lets the request ID be used again: nothing came of this fork.
    pub async fn forget_fork(&self, fork: &Fork) -> Result<(), StoreError> {
        bounded(async {
            sqlx::query("delete from forks where team = $1 and request_id = $2 and children = $3")
                .bind(fork.team.as_str())
                .bind(&fork.request_id)
                .bind(&fork.children)
                .execute(&self.pool)
                .await?;
            Ok(())
        })
        .await
    }

    /// Forgets forks before a time whose children are all forgotten.
    pub async fn purge_forks(&self, before: Micros) -> Result<(), StoreError> {
        bounded(async {
            sqlx::query(
                "delete from forks where create_time < $1 and not exists \
                 (select 1 from sessions where session_id = any(children))",
            )
            .bind(before.0)
            .execute(&self.pool)
            .await?;
            Ok(())
        })
        .await
    }
}
