//! A session as session-svc holds it, and as the wire shows it.

use std::collections::BTreeMap;

use proto::session::v1 as wire;
use service_kit::{
    ids::{CheckpointId, NodeId, SessionId, TeamId},
    mesh::MeshToken,
};
use sha2::{Digest as _, Sha256};

use crate::lifecycle::State;

/// Microseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Micros(pub i64);

impl Micros {
    /// The time now.
    pub fn now() -> Self {
        Self(jiff::Timestamp::now().as_microsecond())
    }

    /// Later by so much.
    #[must_use]
    pub fn plus(self, duration: std::time::Duration) -> Self {
        Self(
            self.0
                .saturating_add(i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)),
        )
    }

    /// Earlier by so much.
    #[must_use]
    pub fn minus(self, duration: std::time::Duration) -> Self {
        Self(
            self.0
                .saturating_sub(i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)),
        )
    }

    /// As on the wire.
    pub fn wire(self) -> prost_types::Timestamp {
        let nanos = i32::try_from(self.0.rem_euclid(1_000_000)).unwrap_or_default() * 1000;
        prost_types::Timestamp {
            seconds: self.0.div_euclid(1_000_000),
            nanos,
        }
    }
}

impl From<prost_types::Timestamp> for Micros {
    fn from(time: prost_types::Timestamp) -> Self {
        let seconds = time.seconds.saturating_mul(1_000_000);
        Self(seconds.saturating_add(i64::from(time.nanos / 1000)))
    }
}

/// Why a session ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndReason {
    /// Stable word.
    pub reason: String,
    /// One sentence for people.
    pub message: String,
}

impl EndReason {
    /// A reason.
    pub fn new(reason: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
            message: message.into(),
        }
    }
}

/// One session.
#[derive(Debug, Clone, PartialEq)]
pub struct Session {
    /// Which.
    pub id: SessionId,
    /// Owner.
    pub team: TeamId,
    /// The client's own ID for the request that made it.
    pub request_id: Option<String>,
    /// Where it is in its life.
    pub state: State,
    /// Its node.
    pub node_id: NodeId,
    /// Template name.
    pub template: String,
    /// `name@version`.
    pub template_version: String,
    /// The template version in full.
    pub template_spec: proto::template::v1::Template,
    /// Size, all fields set.
    pub resources: wire::Resources,
    /// How it meets the network.
    pub network: Network,
    /// The client's labels.
    pub metadata: BTreeMap<String, String>,
    /// Environment of its processes.
    pub env: BTreeMap<String, String>,
    /// At the deadline.
    pub on_timeout: wire::OnTimeout,
    /// Whether a call wakes it.
    pub wake_on_request: bool,
    /// When it was accepted.
    pub create_time: Micros,
    /// When it first ran.
    pub start_time: Option<Micros>,
    /// Time to live as asked, in microseconds; counted from the moment it runs.
    pub timeout: i64,
    /// When it expires.
    pub deadline: Micros,
    /// When it ended.
    pub end_time: Option<Micros>,
    /// Why it ended.
    pub end_reason: Option<EndReason>,
    /// Until when the replica that moves it on has it.
    pub lease_until: Option<Micros>,
    /// Grows with every change.
    pub version: i64,
    /// The session it was forked from.
    pub parent: Option<SessionId>,
    /// While Paused: bytes on its node's disk.
    pub stored_bytes: u64,
    /// What is left of its time to live, in microseconds; set while it does not count down, from Pausing until it runs again.
    pub time_left: Option<i64>,
    /// The version with which it entered its state: answers to what was begun in an earlier one change nothing any more.
    pub state_version: i64,
    /// When it entered its state.
    pub state_time: Micros,
    /// Why it is Resuming, if it is not a resume.
    pub rollback: Option<Rollback>,
    /// Set while its node is not known to have heard of its settings; then any replica may tell it.
    pub push_due: Option<Micros>,
    /// Number of the last message of its log that became an event.
    pub noted: i64,
}

/// How a session meets the network.
#[derive(Debug, Clone, PartialEq)]
pub struct Network {
    /// Who may reach its ports.
    pub port_access: wire::PortAccess,
    /// Whether it reaches the outside where `egress` says nothing.
    pub internet_access: bool,
    /// Where to it may open connections; every entry makes sense.
    pub egress: wire::Egress,
    /// Bytes per second to the outside; 0 is the node's limit.
    pub egress_rate: u64,
    /// Bytes per second from the outside; 0 is the node's limit.
    pub ingress_rate: u64,
}

impl Default for Network {
    fn default() -> Self {
        Self {
            port_access: wire::PortAccess::Public,
            internet_access: true,
            egress: wire::Egress::default(),
            egress_rate: 0,
            ingress_rate: 0,
        }
    }
}

impl Network {
    /// As on the wire, all fields set.
    pub fn wire(&self) -> wire::Network {
        wire::Network {
            port_access: self.port_access.into(),
            internet_access: Some(self.internet_access),
            egress: Some(self.egress.clone()),
            egress_bytes_per_second: self.egress_rate,
            ingress_bytes_per_second: self.ingress_rate,
        }
    }
}

/// A session on its way back to a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rollback {
    /// To which.
    pub to: CheckpointId,
    /// Where it is again if that fails: Running or Paused.
    pub from: State,
}

/// A kept state of a session.
#[derive(Debug, Clone, PartialEq)]
pub struct Checkpoint {
    /// Which.
    pub id: CheckpointId,
    /// Of which session.
    pub session: SessionId,
    /// Its owner.
    pub team: TeamId,
    /// The client's own ID for the request that made it.
    pub request_id: Option<String>,
    /// The client's name for it.
    pub name: String,
    /// How far it is.
    pub state: CheckpointState,
    /// When it was asked for.
    pub create_time: Micros,
    /// Bytes on its node's disk.
    pub stored_bytes: u64,
    /// How long the session stood still for it, in microseconds.
    pub stop_time: i64,
    /// Until when the replica that makes or removes it has it; after that it is removed by any other.
    pub lease_until: Option<Micros>,
}

/// How far a checkpoint is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CheckpointState {
    /// Its node is asked to make it.
    Making = 0,
    /// It can be gone back to.
    Kept = 1,
    /// Its node is asked to remove it.
    Removing = 2,
}

impl Checkpoint {
    /// As on the wire.
    pub fn wire(&self) -> wire::Checkpoint {
        wire::Checkpoint {
            checkpoint_id: self.id.to_string(),
            session_id: self.session.to_string(),
            name: self.name.clone(),
            create_time: Some(self.create_time.wire()),
            stored_bytes: self.stored_bytes,
        }
    }
}

/// Microseconds as a duration on the wire.
pub fn wire_duration(micros: i64) -> prost_types::Duration {
    prost_types::Duration {
        seconds: micros / 1_000_000,
        nanos: i32::try_from(micros % 1_000_000).unwrap_or_default() * 1000,
    }
}

/// A duration from the wire in microseconds; negative ones are none.
pub fn micros(duration: Option<prost_types::Duration>) -> i64 {
    duration
        .and_then(|duration| std::time::Duration::try_from(duration).ok())
        .map_or(0, |duration| {
            i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
        })
}

/// How hosts of sandboxes are written.
#[derive(Debug, Clone)]
pub struct HostPattern {
    suffix: String,
}

impl HostPattern {
    /// For a domain and the port users reach the edge on.
    pub fn new(domain: &str, edge_port: u16) -> Self {
        let suffix = if matches!(edge_port, 80 | 443) {
            domain.to_owned()
        } else {
            format!("{domain}:{edge_port}")
        };
        Self { suffix }
    }
}

/// The secret of a session's streams and protected ports: derived, so that it is stored nowhere.
pub fn access_token(token: &MeshToken, id: &SessionId) -> String {
    format!(
        "sst_{}",
        hex::encode(token.derive(b"session-token", id.as_str().as_bytes()))
    )
}

/// What the node compares.
pub fn access_token_sha256(token: &MeshToken, id: &SessionId) -> Vec<u8> {
    Sha256::digest(access_token(token, id)).to_vec()
}

impl Session {
    /// As on the wire; `access_token` is left out, since most readers must not have it.
    pub fn wire(&self, hosts: &HostPattern) -> wire::Session {
        wire::Session {
            session_id: self.id.to_string(),
            state: self.state.wire().into(),
            node_id: self.node_id.to_string(),
            template: self.template.clone(),
            template_version: self.template_version.clone(),
            resources: Some(self.resources),
            network: Some(self.network.wire()),
            metadata: self.metadata.clone().into_iter().collect(),
            on_timeout: self.on_timeout.into(),
            wake_on_request: self.wake_on_request,
            create_time: Some(self.create_time.wire()),
            start_time: self.start_time.map(Micros::wire),
            deadline: Some(self.deadline.wire()),
            end_time: self.end_time.map(Micros::wire),
            end_reason: self.end_reason.clone().map(|end| wire::EndReason {
                reason: end.reason,
                message: end.message,
            }),
            access_token: String::new(),
            host: format!("{{port}}-{}.{}", self.id, hosts.suffix),
            version: self.version.unsigned_abs(),
            parent_session_id: self
                .parent
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default(),
            stored_bytes: self.stored_bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_survive_the_wire() {
        let time = Micros(1_700_000_000_123_456);
        assert_eq!(
            time.wire(),
            prost_types::Timestamp {
                seconds: 1_700_000_000,
                nanos: 123_456_000
            }
        );
        assert_eq!(
            Micros(-1).wire(),
            prost_types::Timestamp {
                seconds: -1,
                nanos: 999_999_000
            }
        );
    }

    #[test]
    fn a_token_belongs_to_one_session_and_one_deployment() {
        let id = SessionId::random(&service_kit::ids::HomeTag::random());
        let other = SessionId::random(&id.home_tag());
        let token = MeshToken::from_bytes([7; 32]);
        assert_eq!(
            access_token(&token, &id),
            access_token(&MeshToken::from_bytes([7; 32]), &id)
        );
        assert_ne!(access_token(&token, &id), access_token(&token, &other));
        assert_ne!(
            access_token(&token, &id),
            access_token(&MeshToken::from_bytes([8; 32]), &id)
        );
    }
}
