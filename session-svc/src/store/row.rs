//! A session as a row.

use std::collections::BTreeMap;

use prost::Message as _;
use proto::session::v1 as wire;
use service_kit::ids::{CheckpointId, NodeId, SessionId, TeamId};
use sqlx::{FromRow, Row as _, postgres::PgRow, types::Json};

use super::{Query, StoreError, state_number};
use crate::{
    lifecycle::State,
    session::{EndReason, Micros, Network, Rollback, Session},
};

/// The columns, in the order [`bind`] binds them.
pub(super) const COLUMNS: &str = "session_id, team, request_id, state, node_id, template, template_version, template_spec, \
     vcpus, memory_bytes, disk_bytes, port_access, internet_access, metadata, env, on_timeout, wake_on_request, \
     create_time, start_time, timeout, deadline, end_time, end_reason, end_message, lease_until, version, \
     parent_session_id, stored_bytes, egress, egress_rate, ingress_rate, time_left, state_version, state_time, \
     rollback_to, rollback_from, push_due, noted";

/// How many columns there are.
pub(super) const COLUMN_COUNT: usize = 38;

/// Binds all columns as $1 to $38.
pub(super) fn bind<'q>(query: Query<'q>, session: &Session) -> Query<'q> {
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
        .bind(session.network.port_access as i16)
        .bind(session.network.internet_access)
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
        .bind(session.parent.as_ref().map(ToString::to_string))
        .bind(bytes(session.stored_bytes))
        .bind(session.network.egress.encode_to_vec())
        .bind(bytes(session.network.egress_rate))
        .bind(bytes(session.network.ingress_rate))
        .bind(session.time_left)
        .bind(session.state_version)
        .bind(session.state_time.0)
        .bind(rollback_to(session))
        .bind(rollback_from(session))
        .bind(session.push_due.map(|time| time.0))
        .bind(session.noted)
}

/// A count of bytes as a column.
pub(super) fn bytes(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

pub(super) fn rollback_to(session: &Session) -> Option<String> {
    session.rollback.as_ref().map(|back| back.to.to_string())
}

pub(super) fn rollback_from(session: &Session) -> Option<i16> {
    session
        .rollback
        .as_ref()
        .map(|back| state_number(back.from))
}

/// A row that may not parse.
pub(super) struct SessionRow(Result<Session, StoreError>);

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
        let egress: Vec<u8> = row.try_get("egress")?;
        let parent: Option<String> = row.try_get("parent_session_id")?;
        let (back_to, back_from): (Option<String>, Option<i16>) =
            (row.try_get("rollback_to")?, row.try_get("rollback_from")?);
        let parent = || match &parent {
            Some(parent) => SessionId::parse(parent).ok().map(Some),
            None => Some(None),
        };
        let rollback = || match (&back_to, back_from) {
            (Some(to), Some(from)) => Some(Some(Rollback {
                to: CheckpointId::parse(to).ok()?,
                from: State::from_wire(from.into())?,
            })),
            _ => Some(None),
        };
        let parse = || {
            Some((
                SessionId::parse(&id).ok()?,
                TeamId::parse(&team).ok()?,
                NodeId::parse(&node).ok()?,
                State::from_wire(state.into())?,
                wire::PortAccess::try_from(i32::from(access)).ok()?,
                wire::OnTimeout::try_from(i32::from(on_timeout)).ok()?,
                proto::template::v1::Template::decode(&*spec).ok()?,
                wire::Egress::decode(&*egress).ok()?,
                parent()?,
                rollback()?,
            ))
        };
        let Some((
            id,
            team,
            node_id,
            state,
            port_access,
            on_timeout,
            template_spec,
            egress,
            parent,
            rollback,
        )) = parse()
        else {
            return Ok(Self(Err(malformed())));
        };
        Ok(Self(Ok(Session {
            id,
            team,
            node_id,
            state,
            on_timeout,
            template_spec,
            resources,
            parent,
            rollback,
            network: Network {
                port_access,
                internet_access: row.try_get("internet_access")?,
                egress,
                egress_rate: row.try_get::<i64, _>("egress_rate")?.unsigned_abs(),
                ingress_rate: row.try_get::<i64, _>("ingress_rate")?.unsigned_abs(),
            },
            request_id: row.try_get("request_id")?,
            template: row.try_get("template")?,
            template_version: row.try_get("template_version")?,
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
            stored_bytes: row.try_get::<i64, _>("stored_bytes")?.unsigned_abs(),
            time_left: row.try_get("time_left")?,
            state_version: row.try_get("state_version")?,
            state_time: Micros(row.try_get("state_time")?),
            push_due: time("push_due")?,
            noted: row.try_get("noted")?,
        })))
    }
}

impl TryFrom<SessionRow> for Session {
    type Error = StoreError;

    fn try_from(row: SessionRow) -> Result<Self, StoreError> {
        row.0
    }
}
