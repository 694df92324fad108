//! The rows of sessions.

use std::collections::BTreeMap;

use prost::Message as _;
use service_kit::ids::{NodeId, SessionId, TeamId};
use sqlx::{postgres::PgArguments, types::Json};

use super::{
    NewEvent, Query, Store, StoreError, bounded,
    events::Columns,
    row::{self, COLUMN_COUNT, SessionRow},
    state_number,
};
use crate::{
    lifecycle::State,
    session::{Micros, Session},
};

/// Which sessions a listing shows.
#[derive(Debug, Clone)]
pub struct Filter {
    /// Owner.
    pub team: TeamId,
    /// Only these; empty: all that are not final.
    pub states: Vec<State>,
    /// Only with all of these labels.
    pub metadata: BTreeMap<String, String>,
    /// Only of this template.
    pub template: Option<String>,
    /// After this one, in the order of the listing.
    pub after: Option<(i64, String)>,
    /// How many.
    pub limit: i64,
}

type RowQuery<'q> = sqlx::query::QueryAs<'q, sqlx::Postgres, SessionRow, PgArguments>;

/// Selects whole sessions by a condition of our own making: it holds no outside text.
fn select<'q>(condition: &str) -> RowQuery<'q> {
    sqlx::query_as(sqlx::AssertSqlSafe(format!(
        "select {} from sessions where {condition}",
        row::COLUMNS
    )))
}

impl Store {
    async fn one(&self, query: RowQuery<'_>) -> Result<Option<Session>, StoreError> {
        bounded(async {
            let row = query.fetch_optional(&self.pool).await?;
            row.map(Session::try_from).transpose()
        })
        .await
    }

    async fn many(&self, query: RowQuery<'_>) -> Result<Vec<Session>, StoreError> {
        bounded(async {
            let rows = query.fetch_all(&self.pool).await?;
            rows.into_iter().map(Session::try_from).collect()
        })
        .await
    }

    /// Stores a new session with its first events; `false` if its team has used the request ID before.
    pub async fn insert(&self, session: &Session, events: &[NewEvent]) -> Result<bool, StoreError> {
        let query = self.insert_query(session, events);
        bounded(async { Ok(query.execute(&self.pool).await?.rows_affected() > 0) }).await
    }

    pub(super) fn insert_query(&self, session: &Session, events: &[NewEvent]) -> Query<'static> {
        let placeholders = |range: std::ops::RangeInclusive<usize>| {
            range
                .map(|n| format!("${n}"))
                .collect::<Vec<_>>()
                .join(", ")
        };
        let event = COLUMN_COUNT + 1;
        let types = [
            "bigint", "text", "smallint", "bigint", "text", "text", "text", "bytea",
        ];
        let events_columns: Vec<String> = (event..)
            .zip(types)
            .map(|(n, kind)| format!("${n}::{kind}[]"))
            .collect();
        let sql = format!(
            "with made as (insert into sessions ({}) values ({}) \
             on conflict (team, request_id) where request_id is not null do nothing returning session_id) \
             insert into session_events (session_id, team, number, type, state, time, reason, message, actor, session) \
             select made.session_id, $2, e.* from made, unnest({}) as e",
            row::COLUMNS,
            placeholders(1..=COLUMN_COUNT),
            events_columns.join(", ")
        );
        let query = row::bind(sqlx::query(sqlx::AssertSqlSafe(sql)), session);
        Columns::of(session, events, &self.hosts).bind(query)
    }

    /// Stores a changed session with its event if nobody changed it since it was read; `session.version` is the new version.
    pub async fn update(&self, session: &Session, event: &NewEvent) -> Result<bool, StoreError> {
        let query = self.update_query(session, event);
        bounded(async { Ok(query.execute(&self.pool).await?.rows_affected() > 0) }).await
    }

    /// A lease is written only with a move to another state: whoever has it renews it without a new version.
    pub(super) fn update_query(&self, session: &Session, event: &NewEvent) -> Query<'static> {
        let query = sqlx::query(
            "with changed as (update sessions set state = $3, port_access = $4, internet_access = $5, metadata = $6, \
             on_timeout = $7, wake_on_request = $8, start_time = $9, deadline = $10, end_time = $11, end_reason = $12, \
             end_message = $13, lease_until = case when state = $3 then lease_until else $14 end, version = $15, \
             request_id = $16, timeout = $17, stored_bytes = $18, egress = $19, egress_rate = $20, ingress_rate = $21, \
             time_left = $22, state_version = $23, state_time = $24, rollback_to = $25, rollback_from = $26, push_due = $27, \
             noted = $28 \
             where session_id = $1 and version = $15 - 1 returning session_id) \
             insert into session_events (session_id, team, number, type, state, time, reason, message, actor, session) \
             select changed.session_id, $2, e.* from changed, \
             unnest($29::bigint[], $30::text[], $31::smallint[], $32::bigint[], $33::text[], $34::text[], $35::text[], $36::bytea[]) as e",
        )
        .bind(session.id.to_string())
        .bind(session.team.to_string())
        .bind(state_number(session.state))
        .bind(session.network.port_access as i16)
        .bind(session.network.internet_access)
        .bind(Json(session.metadata.clone()))
        .bind(session.on_timeout as i16)
        .bind(session.wake_on_request)
        .bind(session.start_time.map(|time| time.0))
        .bind(session.deadline.0)
        .bind(session.end_time.map(|time| time.0))
        .bind(session.end_reason.as_ref().map(|end| end.reason.clone()))
        .bind(session.end_reason.as_ref().map(|end| end.message.clone()))
        .bind(session.lease_until.map(|time| time.0))
        .bind(session.version)
        .bind(session.request_id.clone())
        .bind(session.timeout)
        .bind(row::bytes(session.stored_bytes))
        .bind(session.network.egress.encode_to_vec())
        .bind(row::bytes(session.network.egress_rate))
        .bind(row::bytes(session.network.ingress_rate))
        .bind(session.time_left)
        .bind(session.state_version)
        .bind(session.state_time.0)
        .bind(row::rollback_to(session))
        .bind(row::rollback_from(session))
        .bind(session.push_due.map(|time| time.0))
        .bind(session.noted);
        Columns::of(session, std::slice::from_ref(event), &self.hosts).bind(query)
    }

    /// Gives a session that has not started anywhere another ID and node, in one transaction with the end of its old ID.
    ///
    /// Nothing in the feed is rewritten: readers see the old ID end (`ended`) and the new one begin.
    pub async fn move_before_start(
        &self,
        old: (&Session, &NewEvent),
        new: (&Session, &[NewEvent]),
    ) -> Result<bool, StoreError> {
        let (ended, end) = old;
        let (session, begin) = new;
        bounded(async {
            let mut transaction = self.pool.begin().await?;
            let moved = sqlx::query(
                "update sessions set session_id = $2, node_id = $3, version = $4, lease_until = $5, \
                 former_ids = array_append(former_ids, session_id) \
                 where session_id = $1 and version = $6 and state = $7",
            )
            .bind(ended.id.as_str())
            .bind(session.id.as_str())
            .bind(session.node_id.as_str())
            .bind(session.version)
            .bind(session.lease_until.map(|time| time.0))
            .bind(ended.version - 1)
            .bind(state_number(State::Starting))
            .execute(&mut *transaction)
            .await?;
            if moved.rows_affected() == 0 {
                return Ok(false);
            }
            let events = [(ended, std::slice::from_ref(end)), (session, begin)];
            for (session, events) in events {
                Columns::of(session, events, &self.hosts)
                    .insert(session, &mut transaction)
                    .await?;
            }
            transaction.commit().await?;
            Ok(true)
        })
        .await
    }

    /// One session, whoever owns it.
    pub async fn get(&self, id: &SessionId) -> Result<Option<Session>, StoreError> {
        self.one(select("session_id = $1").bind(id.to_string()))
            .await
    }

    /// Those of the given IDs that are known.
    pub async fn get_all(&self, ids: Vec<String>) -> Result<Vec<Session>, StoreError> {
        self.many(select("session_id = any($1)").bind(ids)).await
    }

    /// The session a team made with this request ID.
    pub async fn by_request(
        &self,
        team: &TeamId,
        request_id: &str,
    ) -> Result<Option<Session>, StoreError> {
        let query = select("team = $1 and request_id = $2");
        self.one(query.bind(team.to_string()).bind(request_id.to_owned()))
            .await
    }

    /// A page of a team's sessions, newest first.
    pub async fn list(&self, filter: &Filter) -> Result<Vec<Session>, StoreError> {
        let states: Vec<i16> = if filter.states.is_empty() {
            State::ALL
                .into_iter()
                .filter(|state| !state.is_final())
                .map(state_number)
                .collect()
        } else {
            filter.states.iter().copied().map(state_number).collect()
        };
        let (time, id) = filter.after.clone().unwrap_or((i64::MAX, String::new()));
        let query = select(
            "team = $1 and state = any($2) and metadata @> $3 \
             and ($4::text is null or template = $4) and (create_time, session_id) < ($5, $6) \
             order by create_time desc, session_id desc limit $7",
        )
        .bind(filter.team.to_string())
        .bind(states)
        .bind(Json(filter.metadata.clone()))
        .bind(filter.template.clone())
        .bind(time)
        .bind(id)
        .bind(filter.limit);
        self.many(query).await
    }

    /// Sessions of one node that are not final, by ID after one.
    pub async fn living(
        &self,
        node: &NodeId,
        after: &str,
        limit: i64,
    ) -> Result<Vec<Session>, StoreError> {
        let query =
            select("state < 8 and node_id = $1 and session_id > $2 order by session_id limit $3");
        self.many(
            query
                .bind(node.to_string())
                .bind(after.to_owned())
                .bind(limit),
        )
        .await
    }

    /// Sessions of one node that are neither final nor Paused: those that end with it. What is paused is on its disk still.
    pub async fn active(&self, node: &NodeId, limit: i64) -> Result<Vec<Session>, StoreError> {
        let query =
            select("state < 8 and state <> 5 and node_id = $1 order by session_id limit $2");
        self.many(query.bind(node.to_string()).bind(limit)).await
    }

    /// Sessions that are not final or ended after a time, by ID after one: what the catalog holds.
    pub async fn known(
        &self,
        ended_after: Micros,
        after: &str,
        limit: i64,
    ) -> Result<Vec<Session>, StoreError> {
        let query =
            select("(state < 8 or end_time > $1) and session_id > $2 order by session_id limit $3");
        self.many(query.bind(ended_after.0).bind(after.to_owned()).bind(limit))
            .await
    }

    /// Running and paused sessions whose deadline has passed.
    pub async fn expired(&self, now: Micros, limit: i64) -> Result<Vec<Session>, StoreError> {
        let query = select("state in (3, 5) and deadline <= $1 order by deadline limit $2");
        self.many(query.bind(now.0).bind(limit)).await
    }

    /// Sessions whose move to another state was begun by a replica that does not renew its lease any more.
    pub async fn abandoned(&self, now: Micros, limit: i64) -> Result<Vec<Session>, StoreError> {
        let query = select("state < 8 and lease_until <= $1 order by lease_until limit $2");
        self.many(query.bind(now.0).bind(limit)).await
    }

    /// Takes a lease over, or renews it; `false` if it is not as it was read any more.
    pub async fn take_lease(&self, session: &Session, until: Micros) -> Result<bool, StoreError> {
        let query = sqlx::query(
            "update sessions set lease_until = $3 where session_id = $1 and lease_until = $2",
        )
        .bind(session.id.as_str())
        .bind(session.lease_until.map(|time| time.0))
        .bind(until.0);
        bounded(async { Ok(query.execute(&self.pool).await?.rows_affected() > 0) }).await
    }

    /// Renews the leases of sessions that are being started together; those that are not as they were read are left alone.
    pub async fn renew_starts(
        &self,
        ids: Vec<String>,
        old: Micros,
        until: Micros,
    ) -> Result<(), StoreError> {
        let query = sqlx::query(
            "update sessions set lease_until = $3 where session_id = any($1) and lease_until = $2 and state = $4",
        )
        .bind(ids)
        .bind(old.0)
        .bind(until.0)
        .bind(state_number(State::Starting));
        bounded(async {
            query.execute(&self.pool).await?;
            Ok(())
        })
        .await
    }

    /// Sessions whose settings their node may not have heard of.
    pub async fn unpushed(&self, now: Micros, limit: i64) -> Result<Vec<Session>, StoreError> {
        let query = select("state < 7 and push_due <= $1 order by push_due limit $2");
        self.many(query.bind(now.0).bind(limit)).await
    }

    /// Takes over telling a node of settings (`until`), or notes that it knows them (`None`); `false` if they changed since, or
    /// another replica took it over.
    pub async fn set_push(
        &self,
        session: &Session,
        until: Option<Micros>,
    ) -> Result<bool, StoreError> {
        let query = sqlx::query(
            "update sessions set push_due = $3 where session_id = $1 and push_due = $2",
        )
        .bind(session.id.to_string())
        .bind(session.push_due.map(|time| time.0))
        .bind(until.map(|time| time.0));
        bounded(async { Ok(query.execute(&self.pool).await?.rows_affected() > 0) }).await
    }

    /// Forgets sessions that ended before a time, with their events; the feed is whole only after those.
    pub async fn purge(&self, before: Micros, limit: i64) -> Result<u64, StoreError> {
        bounded(async {
            let (gone,): (i64,) = sqlx::query_as(
                "with gone as (delete from sessions where session_id in \
                 (select session_id from sessions where state >= 8 and end_time < $1 limit $2 for update skip locked) \
                 returning session_id, former_ids), \
                 ids as (select session_id from gone union all select unnest(former_ids) from gone), \
                 removed as (delete from session_events using ids where session_events.session_id = ids.session_id \
                 returning xid::text::bigint as xid, seq), \
                 newest as (select xid, seq from removed order by xid desc, seq desc limit 1), \
                 raised as (update feed set floor_xid = newest.xid, floor_seq = newest.seq from newest \
                 where (floor_xid, floor_seq) < (newest.xid, newest.seq)) \
                 select count(*) from gone",
            )
            .bind(before.0)
            .bind(limit)
            .fetch_one(&self.pool)
            .await?;
            Ok(gone.unsigned_abs())
        })
        .await
    }
}
