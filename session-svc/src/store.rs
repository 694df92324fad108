//! All SQL of session-svc. Every transition of a session is one statement with its event, compare-and-set on the version.

use std::{collections::BTreeMap, time::Duration};

use prost::Message as _;
use proto::session::v1 as wire;
use service_kit::ids::{NodeId, SessionId, TeamId};
use sqlx::{
    FromRow, PgPool, Row as _,
    postgres::{PgConnectOptions, PgPoolOptions, PgRow},
    types::Json,
};

use crate::{
    lifecycle::State,
    session::{EndReason, HostPattern, Micros, Session},
};

mod events;
mod nodes;
pub use events::{Event, NewEvent, Revision};
pub use nodes::{NodeRow, Registration};

const SCHEMA: &str = "sandmesh_session";
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(1);

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

const SESSION_COLUMNS: &str = "session_id, team, request_id, state, node_id, template, template_version, template_spec, \
     vcpus, memory_bytes, disk_bytes, port_access, internet_access, metadata, env, on_timeout, wake_on_request, \
     create_time, start_time, timeout, deadline, end_time, end_reason, end_message, lease_until, version";

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

impl Store {
    /// Connects lazily: a database that is away is an error of the statement, not of the start.
    pub fn new(url: &str, connections: u32, hosts: HostPattern) -> Result<Self, StoreError> {
        let options: PgConnectOptions = url.parse()?;
        let pool = PgPoolOptions::new()
            .max_connections(connections)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .connect_lazy_with(
                options
                    .options([("search_path", SCHEMA)])
                    .application_name("session-svc"),
            );
        Ok(Self { pool, hosts })
    }

    /// Makes the schema and brings it up to date; safe when several replicas do so at once.
    pub async fn migrate(&self) -> Result<(), StoreError> {
        let mut connection = self.pool.acquire().await?;
        // `if not exists` alone races in Postgres; sqlx's own lock covers only what comes after.
        sqlx::query("select pg_advisory_lock(hashtext($1))")
            .bind(SCHEMA)
            .execute(&mut *connection)
            .await?;
        let made = sqlx::query("create schema if not exists sandmesh_session")
            .execute(&mut *connection)
            .await;
        sqlx::query("select pg_advisory_unlock(hashtext($1))")
            .bind(SCHEMA)
            .execute(&mut *connection)
            .await?;
        made?;
        MIGRATIONS.run(&mut *connection).await?;
        Ok(())
    }

    /// Whether Postgres answers.
    pub async fn ping(&self) -> Result<(), StoreError> {
        sqlx::query("select 1").execute(&self.pool).await?;
        Ok(())
    }

    /// Stores a new session with its first events; `false` if its team has used the request ID before.
    pub async fn insert(&self, session: &Session, events: &[NewEvent]) -> Result<bool, StoreError> {
        let sql = format!(
            "with made as (insert into sessions ({SESSION_COLUMNS}) values \
             ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21, $22, $23, $24, $25, $26) \
             on conflict (team, request_id) where request_id is not null do nothing returning session_id) \
             insert into session_events (session_id, team, number, type, state, time, reason, message, actor, session) \
             select made.session_id, $2, e.* from made, \
             unnest($27::bigint[], $28::text[], $29::smallint[], $30::bigint[], $31::text[], $32::text[], $33::text[], $34::bytea[]) as e"
        );
        let columns = events::Columns::of(session, events, &self.hosts);
        let done = columns
            .bind(bind_session(sqlx::query(sqlx::AssertSqlSafe(sql)), session))
            .execute(&self.pool)
            .await?;
        Ok(done.rows_affected() > 0)
    }

    /// Stores a changed session with its event if nobody changed it since it was read; `session.version` is the new version.
    pub async fn update(&self, session: &Session, event: &NewEvent) -> Result<bool, StoreError> {
        let query = sqlx::query(
            "with changed as (update sessions set state = $3, port_access = $4, internet_access = $5, metadata = $6, \
             on_timeout = $7, wake_on_request = $8, start_time = $9, deadline = $10, end_time = $11, end_reason = $12, \
             end_message = $13, lease_until = $14, version = $15 \
             where session_id = $1 and version = $15 - 1 returning session_id) \
             insert into session_events (session_id, team, number, type, state, time, reason, message, actor, session) \
             select changed.session_id, $2, e.* from changed, \
             unnest($16::bigint[], $17::text[], $18::smallint[], $19::bigint[], $20::text[], $21::text[], $22::text[], $23::bytea[]) as e",
        )
        .bind(session.id.to_string())
        .bind(session.team.to_string())
        .bind(state_number(session.state))
        .bind(session.port_access as i16)
        .bind(session.internet_access)
        .bind(Json(session.metadata.clone()))
        .bind(session.on_timeout as i16)
        .bind(session.wake_on_request)
        .bind(session.start_time.map(|time| time.0))
        .bind(session.deadline.0)
        .bind(session.end_time.map(|time| time.0))
        .bind(session.end_reason.as_ref().map(|end| end.reason.clone()))
        .bind(session.end_reason.as_ref().map(|end| end.message.clone()))
        .bind(session.lease_until.map(|time| time.0))
        .bind(session.version);
        let columns = events::Columns::of(session, std::slice::from_ref(event), &self.hosts);
        let done = columns.bind(query).execute(&self.pool).await?;
        Ok(done.rows_affected() > 0)
    }

    /// Gives a session that has not started anywhere another ID and node, in one transaction with its history.
    pub async fn move_before_start(
        &self,
        old: &SessionId,
        session: &Session,
        event: &NewEvent,
    ) -> Result<bool, StoreError> {
        let mut transaction = self.pool.begin().await?;
        let moved = sqlx::query(
            "update sessions set session_id = $2, node_id = $3, version = $4 \
             where session_id = $1 and version = $4 - 1 and state = $5",
        )
        .bind(old.as_str())
        .bind(session.id.as_str())
        .bind(session.node_id.as_str())
        .bind(session.version)
        .bind(state_number(State::Starting))
        .execute(&mut *transaction)
        .await?;
        if moved.rows_affected() == 0 {
            return Ok(false);
        }
        sqlx::query("update session_events set session_id = $2 where session_id = $1")
            .bind(old.as_str())
            .bind(session.id.as_str())
            .execute(&mut *transaction)
            .await?;
        events::insert_one(&mut transaction, session, event, &self.hosts).await?;
        transaction.commit().await?;
        Ok(true)
    }

    /// One session, whoever owns it.
    pub async fn get(&self, id: &SessionId) -> Result<Option<Session>, StoreError> {
        self.one("where session_id = $1", id.as_str(), "").await
    }

    /// The session a team made with this request ID.
    pub async fn by_request(
        &self,
        team: &TeamId,
        request_id: &str,
    ) -> Result<Option<Session>, StoreError> {
        self.one(
            "where team = $1 and request_id = $2",
            team.as_str(),
            request_id,
        )
        .await
    }

    async fn one(
        &self,
        condition: &str,
        first: &str,
        second: &str,
    ) -> Result<Option<Session>, StoreError> {
        // Both conditions use $2 or ignore it.
        let sql = format!("select {SESSION_COLUMNS} from sessions {condition} and $2::text = $2");
        let row = sqlx::query_as::<_, SessionRow>(sqlx::AssertSqlSafe(sql))
            .bind(first)
            .bind(second)
            .fetch_optional(&self.pool)
            .await?;
        row.map(Session::try_from).transpose()
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
        let sql = format!(
            "select {SESSION_COLUMNS} from sessions where team = $1 and state = any($2) and metadata @> $3 \
             and ($4::text is null or template = $4) and (create_time, session_id) < ($5, $6) \
             order by create_time desc, session_id desc limit $7"
        );
        let rows = sqlx::query_as::<_, SessionRow>(sqlx::AssertSqlSafe(sql))
            .bind(filter.team.as_str())
            .bind(states)
            .bind(Json(&filter.metadata))
            .bind(&filter.template)
            .bind(time)
            .bind(id)
            .bind(filter.limit)
            .fetch_all(&self.pool)
            .await?;
        rows.into_iter().map(Session::try_from).collect()
    }

    /// Sessions that are not final: those of one node, or all, `limit` at most, after an ID.
    pub async fn living(
        &self,
        node: Option<&NodeId>,
        after: &str,
        limit: i64,
    ) -> Result<Vec<Session>, StoreError> {
        let condition = "state < 8 and ($1::text is null or node_id = $1) and session_id > $2 order by session_id limit $3";
        let sql = format!("select {SESSION_COLUMNS} from sessions where {condition}");
        let rows = sqlx::query_as::<_, SessionRow>(sqlx::AssertSqlSafe(sql))
            .bind(node.map(NodeId::as_str))
            .bind(after)
            .bind(limit)
            .fetch_all(&self.pool)
            .await?;
        rows.into_iter().map(Session::try_from).collect()
    }

    /// Every session that may still be asked about, for a rebuild of the catalog.
    pub async fn known(&self, after: &str, limit: i64) -> Result<Vec<Session>, StoreError> {
        let sql = format!(
            "select {SESSION_COLUMNS} from sessions where session_id > $1 order by session_id limit $2"
        );
        let rows = sqlx::query_as::<_, SessionRow>(sqlx::AssertSqlSafe(sql))
            .bind(after)
            .bind(limit)
            .fetch_all(&self.pool)
            .await?;
        rows.into_iter().map(Session::try_from).collect()
    }

    /// Running sessions whose deadline has passed.
    pub async fn expired(&self, now: Micros, limit: i64) -> Result<Vec<Session>, StoreError> {
        self.due(
            "state = 3 and deadline <= $1 order by deadline limit $2",
            now,
            limit,
        )
        .await
    }

    /// Sessions whose move to another state was begun and not finished by a replica that had its time.
    pub async fn abandoned(&self, now: Micros, limit: i64) -> Result<Vec<Session>, StoreError> {
        self.due(
            "state < 8 and lease_until <= $1 order by lease_until limit $2",
            now,
            limit,
        )
        .await
    }

    async fn due(
        &self,
        condition: &str,
        now: Micros,
        limit: i64,
    ) -> Result<Vec<Session>, StoreError> {
        let sql = format!("select {SESSION_COLUMNS} from sessions where {condition}");
        let rows = sqlx::query_as::<_, SessionRow>(sqlx::AssertSqlSafe(sql))
            .bind(now.0)
            .bind(limit)
            .fetch_all(&self.pool)
            .await?;
        rows.into_iter().map(Session::try_from).collect()
    }

    /// Takes over an abandoned session; `false` if another replica was faster.
    pub async fn take_lease(&self, session: &Session, until: Micros) -> Result<bool, StoreError> {
        let done = sqlx::query(
            "update sessions set lease_until = $3 where session_id = $1 and lease_until = $2",
        )
        .bind(session.id.as_str())
        .bind(session.lease_until.map(|time| time.0))
        .bind(until.0)
        .execute(&self.pool)
        .await?;
        Ok(done.rows_affected() > 0)
    }

    /// Forgets sessions that ended before a time, with their events.
    pub async fn purge(&self, before: Micros, limit: i64) -> Result<u64, StoreError> {
        let done = sqlx::query(
            "with gone as (delete from sessions where session_id in \
             (select session_id from sessions where state >= 8 and end_time < $1 limit $2) returning session_id) \
             delete from session_events using gone where session_events.session_id = gone.session_id",
        )
        .bind(before.0)
        .bind(limit)
        .execute(&self.pool)
        .await?;
        Ok(done.rows_affected())
    }
}

type Query<'q> = sqlx::query::Query<'q, sqlx::Postgres, sqlx::postgres::PgArguments>;

fn bind_session<'q>(query: Query<'q>, session: &Session) -> Query<'q> {
    query
        .bind(session.id.to_string())
        .bind(session.team.to_string())
        .bind(session.request_id.clone())
        .bind(state_number(session.state))
        .bind(session.node_id.to_string())
        .bind(session.template.clone())
        .bind(session.template_version.clone())
        .bind(session.template_spec.encode_to_vec())
        .bind(i32::try_from(session.resources.vcpus).unwrap_or(i32::MAX))
        .bind(i64::try_from(session.resources.memory_bytes).unwrap_or(i64::MAX))
        .bind(i64::try_from(session.resources.disk_bytes).unwrap_or(i64::MAX))
        .bind(session.port_access as i16)
        .bind(session.internet_access)
        .bind(Json(session.metadata.clone()))
        .bind(Json(session.env.clone()))
        .bind(session.on_timeout as i16)
        .bind(session.wake_on_request)
        .bind(session.create_time.0)
        .bind(session.start_time.map(|time| time.0))
        .bind(session.timeout)
        .bind(session.deadline.0)
        .bind(session.end_time.map(|time| time.0))
        .bind(session.end_reason.as_ref().map(|end| end.reason.clone()))
        .bind(session.end_reason.as_ref().map(|end| end.message.clone()))
        .bind(session.lease_until.map(|time| time.0))
        .bind(session.version)
}

fn state_number(state: State) -> i16 {
    state.wire() as i16
}

struct SessionRow(Result<Session, StoreError>);

impl<'r> FromRow<'r, PgRow> for SessionRow {
    fn from_row(row: &'r PgRow) -> Result<Self, sqlx::Error> {
        let id: String = row.try_get("session_id")?;
        let malformed = || StoreError::Malformed(id.clone());
        let time = |name| {
            row.try_get::<Option<i64>, _>(name)
                .map(|time| time.map(Micros))
        };
        let end_reason: Option<String> = row.try_get("end_reason")?;
        let end_message: Option<String> = row.try_get("end_message")?;
        let (team, node): (String, String) = (row.try_get("team")?, row.try_get("node_id")?);
        let (state, access, on_timeout): (i16, i16, i16) = (
            row.try_get("state")?,
            row.try_get("port_access")?,
            row.try_get("on_timeout")?,
        );
        let spec: Vec<u8> = row.try_get("template_spec")?;
        let resources = wire::Resources {
            vcpus: row.try_get::<i32, _>("vcpus")?.unsigned_abs(),
            memory_bytes: row.try_get::<i64, _>("memory_bytes")?.unsigned_abs(),
            disk_bytes: row.try_get::<i64, _>("disk_bytes")?.unsigned_abs(),
        };
        let metadata: Json<BTreeMap<String, String>> = row.try_get("metadata")?;
        let env: Json<BTreeMap<String, String>> = row.try_get("env")?;
        let parse = || {
            Some((
                SessionId::parse(&id).ok()?,
                TeamId::parse(&team).ok()?,
                NodeId::parse(&node).ok()?,
                State::from_wire(state.into())?,
                wire::PortAccess::try_from(i32::from(access)).ok()?,
                wire::OnTimeout::try_from(i32::from(on_timeout)).ok()?,
                proto::template::v1::Template::decode(&*spec).ok()?,
            ))
        };
        let Some((id, team, node_id, state, port_access, on_timeout, template_spec)) = parse()
        else {
            return Ok(Self(Err(malformed())));
        };
        Ok(Self(Ok(Session {
            id,
            team,
            node_id,
            state,
            port_access,
            on_timeout,
            template_spec,
            resources,
            request_id: row.try_get("request_id")?,
            template: row.try_get("template")?,
            template_version: row.try_get("template_version")?,
            internet_access: row.try_get("internet_access")?,
            metadata: metadata.0,
            env: env.0,
            wake_on_request: row.try_get("wake_on_request")?,
            create_time: Micros(row.try_get("create_time")?),
            start_time: time("start_time")?,
            timeout: row.try_get("timeout")?,
            deadline: Micros(row.try_get("deadline")?),
            end_time: time("end_time")?,
            end_reason: end_reason.map(|reason| EndReason {
                reason,
                message: end_message.unwrap_or_default(),
            }),
            lease_until: time("lease_until")?,
            version: row.try_get("version")?,
        })))
    }
}

impl TryFrom<SessionRow> for Session {
    type Error = StoreError;

    fn try_from(row: SessionRow) -> Result<Self, StoreError> {
        row.0
    }
}
