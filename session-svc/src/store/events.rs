//! Events: the history of each session and, read in order, the change feed of all.

use std::str::FromStr;

use prost::Message as _;
use proto::session::v1 as wire;
use service_kit::ids::{SessionId, TeamId};
use sqlx::{FromRow, Postgres, Transaction};

use super::{Query, Store, StoreError, bounded, state_number};
use crate::session::{HostPattern, Micros, Session};

/// An event about to be stored; its number and state follow from the session.
#[derive(Debug, Clone)]
pub struct NewEvent {
    /// Stable word.
    pub kind: &'static str,
    /// Stable word for why, or empty.
    pub reason: String,
    /// One sentence for people, or empty.
    pub message: String,
    /// Who.
    pub actor: String,
}

impl NewEvent {
    /// An event without a reason.
    pub fn new(kind: &'static str, actor: impl Into<String>) -> Self {
        Self {
            kind,
            reason: String::new(),
            message: String::new(),
            actor: actor.into(),
        }
    }

    /// With a reason.
    #[must_use]
    pub fn because(mut self, reason: impl Into<String>, message: impl Into<String>) -> Self {
        self.reason = reason.into();
        self.message = message.into();
        self
    }
}

/// A place in the change feed: everything up to and including it has been seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Revision {
    xid: i64,
    seq: i64,
}

/// Text that is not a revision.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a revision this service gave out")]
pub struct MalformedRevision;

impl std::fmt::Display for Revision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:x}.{:x}", self.xid, self.seq)
    }
}

impl FromStr for Revision {
    type Err = MalformedRevision;

    fn from_str(text: &str) -> Result<Self, MalformedRevision> {
        let (xid, seq) = text.split_once('.').ok_or(MalformedRevision)?;
        let parse = |part| {
            i64::from_str_radix(part, 16)
                .ok()
                .filter(|number| *number >= 0)
                .ok_or(MalformedRevision)
        };
        Ok(Self {
            xid: parse(xid)?,
            seq: parse(seq)?,
        })
    }
}

/// A stored event.
#[derive(Debug, Clone)]
pub struct Event {
    /// Its place in the feed.
    pub revision: Revision,
    /// Owner of the session.
    pub team: String,
    /// What happened.
    pub event: wire::SessionEvent,
    /// The session after it, without its access token.
    pub session: wire::Session,
}

/// Events as columns, the way they are bound to `unnest`.
pub(super) struct Columns {
    number: Vec<i64>,
    kind: Vec<String>,
    state: Vec<i16>,
    time: Vec<i64>,
    reason: Vec<String>,
    message: Vec<String>,
    actor: Vec<String>,
    session: Vec<Vec<u8>>,
}

impl Columns {
    /// The last event has the session's version as its number, those before count down.
    pub(super) fn of(session: &Session, events: &[NewEvent], hosts: &HostPattern) -> Self {
        let now = Micros::now().0;
        let last = session.version;
        let count = i64::try_from(events.len()).unwrap_or_default();
        let snapshot = session.wire(hosts).encode_to_vec();
        Self {
            number: (last - count + 1..=last).collect(),
            kind: events.iter().map(|event| event.kind.to_owned()).collect(),
            state: events.iter().map(|_| state_number(session.state)).collect(),
            time: vec![now; events.len()],
            reason: events.iter().map(|event| event.reason.clone()).collect(),
            message: events.iter().map(|event| event.message.clone()).collect(),
            actor: events.iter().map(|event| event.actor.clone()).collect(),
            session: vec![snapshot; events.len()],
        }
    }

    pub(super) fn bind(self, query: Query<'_>) -> Query<'_> {
        query
            .bind(self.number)
            .bind(self.kind)
            .bind(self.state)
            .bind(self.time)
            .bind(self.reason)
            .bind(self.message)
            .bind(self.actor)
            .bind(self.session)
    }

    /// Adds the events within a transaction.
    pub(super) async fn insert(
        self,
        session: &Session,
        transaction: &mut Transaction<'_, Postgres>,
    ) -> Result<(), StoreError> {
        let query = sqlx::query(
            "insert into session_events (session_id, team, number, type, state, time, reason, message, actor, session) \
             select $1, $2, e.* from \
             unnest($3::bigint[], $4::text[], $5::smallint[], $6::bigint[], $7::text[], $8::text[], $9::text[], $10::bytea[]) as e",
        )
        .bind(session.id.to_string())
        .bind(session.team.to_string());
        self.bind(query).execute(&mut **transaction).await?;
        Ok(())
    }
}

#[derive(FromRow)]
struct EventRow {
    xid: i64,
    seq: i64,
    session_id: String,
    team: String,
    number: i64,
    r#type: String,
    state: i16,
    time: i64,
    reason: String,
    message: String,
    actor: String,
    session: Vec<u8>,
}

impl TryFrom<EventRow> for Event {
    type Error = StoreError;

    fn try_from(row: EventRow) -> Result<Self, StoreError> {
        let session = wire::Session::decode(&*row.session)
            .map_err(|_| StoreError::Malformed(row.session_id.clone()))?;
        Ok(Self {
            revision: Revision {
                xid: row.xid,
                seq: row.seq,
            },
            team: row.team,
            event: wire::SessionEvent {
                sequence: row.number.unsigned_abs(),
                session_id: row.session_id,
                r#type: row.r#type,
                state: row.state.into(),
                time: Some(Micros(row.time).wire()),
                reason: row.reason,
                message: row.message,
                actor: row.actor,
            },
            session,
        })
    }
}

const EVENT_COLUMNS: &str = "xid::text::bigint as xid, seq, session_id, team, number, type, state, time, reason, message, actor, session";

/// The part of the feed that is whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Everything after this is kept.
    pub floor: Revision,
    /// Nothing this database gave out is after this.
    pub ceiling: Revision,
}

impl Span {
    /// Whether a reader that has seen everything up to `revision` can go on from there.
    pub fn holds(&self, revision: Revision) -> bool {
        (self.floor..=self.ceiling).contains(&revision)
    }
}

impl Store {
    /// Where the feed stands now: what is committed from here on comes after it.
    pub async fn head(&self) -> Result<Revision, StoreError> {
        bounded(async {
            let (xid,): (i64,) =
                sqlx::query_as("select pg_snapshot_xmin(pg_current_snapshot())::text::bigint - 1")
                    .fetch_one(&self.pool)
                    .await?;
            // Everything of earlier transactions is before it, whatever their sequence numbers.
            Ok(Revision { xid, seq: i64::MAX })
        })
        .await
    }

    /// The next changes of all teams, in the order of the feed.
    ///
    /// Only transactions older than every one still running are read: sequence numbers are taken before commit, so a reader
    /// that went by them alone would pass over rows that are committed late.
    pub async fn changes_after(
        &self,
        revision: Revision,
        limit: i64,
    ) -> Result<Vec<Event>, StoreError> {
        let sql = format!(
            "select {EVENT_COLUMNS} from session_events where (xid, seq) > ($1::text::xid8, $2) \
             and xid < pg_snapshot_xmin(pg_current_snapshot()) order by session_events.xid, seq limit $3"
        );
        bounded(async {
            let rows = sqlx::query_as::<_, EventRow>(sqlx::AssertSqlSafe(sql))
                .bind(revision.xid.to_string())
                .bind(revision.seq)
                .bind(limit)
                .fetch_all(&self.pool)
                .await?;
            rows.into_iter().map(Event::try_from).collect()
        })
        .await
    }

    /// From where to where the feed can be read.
    pub async fn span(&self) -> Result<Span, StoreError> {
        bounded(async {
            let (xid, seq, ceiling): (i64, i64, i64) = sqlx::query_as(
                "select floor_xid, floor_seq, pg_snapshot_xmax(pg_current_snapshot())::text::bigint from feed",
            )
            .fetch_one(&self.pool)
            .await?;
            Ok(Span {
                floor: Revision { xid, seq },
                ceiling: Revision {
                    xid: ceiling,
                    seq: i64::MAX,
                },
            })
        })
        .await
    }

    /// A page of one session's history, oldest first.
    pub async fn history(
        &self,
        team: &TeamId,
        id: &SessionId,
        after: i64,
        limit: i64,
    ) -> Result<Vec<wire::SessionEvent>, StoreError> {
        let sql = format!(
            "select {EVENT_COLUMNS} from session_events where session_id = $1 and team = $2 and number > $3 \
             order by number limit $4"
        );
        bounded(async {
            let rows = sqlx::query_as::<_, EventRow>(sqlx::AssertSqlSafe(sql))
                .bind(id.as_str())
                .bind(team.as_str())
                .bind(after)
                .bind(limit)
                .fetch_all(&self.pool)
                .await?;
            rows.into_iter()
                .map(|row| Event::try_from(row).map(|event| event.event))
                .collect()
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn revisions_survive_text_and_keep_their_order() {
        let early = Revision {
            xid: 700,
            seq: i64::MAX,
        };
        let late = Revision { xid: 701, seq: 1 };
        assert!(early < late);
        for revision in [early, late] {
            assert_eq!(revision.to_string().parse(), Ok(revision));
        }
        for text in ["", "1", "1.", "x.1", "-1.0", "1.2.3"] {
            assert!(text.parse::<Revision>().is_err(), "{text}");
        }
    }
}
