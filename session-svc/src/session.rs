//! A session as session-svc holds it, and as the wire shows it.

use std::collections::BTreeMap;

use proto::session::v1 as wire;
use service_kit::{
    ids::{NodeId, SessionId, TeamId},
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
    /// Who may reach its ports.
    pub port_access: wire::PortAccess,
    /// Whether it reaches the outside.
    pub internet_access: bool,
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
            network: Some(self.network()),
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
            parent_session_id: String::new(),
            stored_bytes: 0,
        }
    }

    /// Its network settings, all fields set.
    pub fn network(&self) -> wire::Network {
        wire::Network {
            port_access: self.port_access.into(),
            internet_access: Some(self.internet_access),
            ..wire::Network::default()
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
