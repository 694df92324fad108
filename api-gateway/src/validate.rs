//! What a request must look like before it goes on. Pure; every limit of the proto comments is here, and every wrong field is named.

use std::collections::HashMap;

use proto::session::v1::{
    CreateCheckpointRequest, CreateSessionRequest, DeleteCheckpointRequest, Egress,
    ForkSessionRequest, Network, ResumeSessionRequest, RollbackSessionRequest,
    UpdateSessionRequest,
};
use service_kit::{
    egress::{Entry, LEAST_RATE, MOST_ENTRIES},
    errors::{Failure, Reason},
    ids::CheckpointId,
    readiness,
};
use tonic::{Code, Status};

const METADATA_ENTRIES: usize = 64;
const METADATA_KEY: usize = 63;
const METADATA_VALUE: usize = 1024;
const METADATA_BYTES: usize = 16 << 10;
const ENV_ENTRIES: usize = 256;
const ENV_BYTES: usize = 64 << 10;
const REQUEST_ID: usize = 128;
const CHILDREN: u32 = 100;
const CHECKPOINT_NAME: usize = 63;
const SHORTEST_SECONDS: i64 = 1;
const LONGEST_SECONDS: i64 = 24 * 60 * 60;

/// Wrong fields, collected so that a client learns of all of them at once.
#[derive(Debug, Default)]
struct Wrong(Vec<(String, String)>);

impl Wrong {
    fn unless(&mut self, fits: bool, field: impl Into<String>, description: impl Into<String>) {
        if !fits {
            self.0.push((field.into(), description.into()));
        }
    }

    fn done(self) -> Result<(), Status> {
        let Some((field, description)) = self.0.first() else {
            return Ok(());
        };
        let message = format!("{field}: {description}");
        let failure = Failure::new(Code::InvalidArgument, Reason::INVALID_ARGUMENT, message);
        Err(self
            .0
            .into_iter()
            .fold(failure, |failure, (field, text)| failure.field(field, text))
            .into())
    }
}

/// Checks a create.
pub fn create_session(request: &CreateSessionRequest) -> Result<(), Status> {
    let mut wrong = Wrong::default();
    wrong.unless(!request.template.is_empty(), "template", "is required");
    wrong.unless(
        request.template.len() <= 140,
        "template",
        "must be at most 140 bytes",
    );
    timeout(&mut wrong, request.timeout.as_ref());
    metadata(&mut wrong, &request.metadata);
    env(&mut wrong, &request.env);
    network(&mut wrong, request.network.as_ref());
    request_id(&mut wrong, &request.request_id);
    if let Some(Err((field, rule))) = request.wait_for_port.as_ref().map(readiness::check) {
        wrong.unless(false, field, rule);
    }
    wrong.done()
}

/// Checks an update; which fields it may name session-svc says.
pub fn update_session(request: &UpdateSessionRequest) -> Result<(), Status> {
    let mut wrong = Wrong::default();
    metadata(&mut wrong, &request.metadata);
    network(&mut wrong, request.network.as_ref());
    wrong.done()
}

/// Checks a resume.
pub fn resume_session(request: &ResumeSessionRequest) -> Result<(), Status> {
    let mut wrong = Wrong::default();
    timeout(&mut wrong, request.timeout.as_ref());
    wrong.done()
}

/// Checks a fork.
pub fn fork_session(request: &ForkSessionRequest) -> Result<(), Status> {
    let mut wrong = Wrong::default();
    wrong.unless(request.count <= CHILDREN, "count", "must be at most 100");
    timeout(&mut wrong, request.timeout.as_ref());
    request_id(&mut wrong, &request.request_id);
    wrong.done()
}

/// Checks a checkpoint to be made.
pub fn create_checkpoint(request: &CreateCheckpointRequest) -> Result<(), Status> {
    let mut wrong = Wrong::default();
    wrong.unless(
        request.name.len() <= CHECKPOINT_NAME && !request.name.chars().any(char::is_control),
        "name",
        "must be at most 63 bytes without control characters",
    );
    request_id(&mut wrong, &request.request_id);
    wrong.done()
}

/// Checks a rollback.
pub fn rollback_session(request: &RollbackSessionRequest) -> Result<(), Status> {
    checkpoint_id(&request.checkpoint_id)
}

/// Checks the removal of a checkpoint.
pub fn delete_checkpoint(request: &DeleteCheckpointRequest) -> Result<(), Status> {
    checkpoint_id(&request.checkpoint_id)
}

fn checkpoint_id(id: &str) -> Result<(), Status> {
    let mut wrong = Wrong::default();
    if let Err(error) = CheckpointId::parse(id) {
        wrong.unless(false, "checkpoint_id", error.to_string());
    }
    wrong.done()
}

fn request_id(wrong: &mut Wrong, id: &str) {
    wrong.unless(
        id.len() <= REQUEST_ID && id.bytes().all(|b| b.is_ascii_graphic()),
        "request_id",
        "must be at most 128 printable ASCII characters without spaces",
    );
}

fn network(wrong: &mut Wrong, network: Option<&Network>) {
    let Some(network) = network else { return };
    for (field, rate) in [
        (
            "network.egress_bytes_per_second",
            network.egress_bytes_per_second,
        ),
        (
            "network.ingress_bytes_per_second",
            network.ingress_bytes_per_second,
        ),
    ] {
        let description = format!("must be 0, for the node's limit, or at least {LEAST_RATE}");
        wrong.unless(rate == 0 || rate >= LEAST_RATE, field, description);
    }
    let Some(Egress { allow, deny }) = &network.egress else {
        return;
    };
    for (field, entries) in [
        ("network.egress.allow", allow),
        ("network.egress.deny", deny),
    ] {
        let description = format!("may have at most {MOST_ENTRIES} entries");
        wrong.unless(entries.len() <= MOST_ENTRIES, field, description);
        let nonsense = entries.iter().find_map(|entry| Entry::parse(entry).err());
        if let Some(nonsense) = nonsense {
            wrong.unless(false, field, nonsense.to_string());
        }
    }
}

/// Checks an optional time to live.
fn timeout(wrong: &mut Wrong, timeout: Option<&prost_types::Duration>) {
    let fits = timeout.is_none_or(|timeout| {
        let after = timeout.nanos > 0;
        timeout.nanos >= 0
            && timeout.seconds >= SHORTEST_SECONDS
            && (timeout.seconds < LONGEST_SECONDS || (timeout.seconds == LONGEST_SECONDS && !after))
    });
    wrong.unless(fits, "timeout", "must be from 1 s to 24 h");
}

fn metadata(wrong: &mut Wrong, metadata: &HashMap<String, String>) {
    wrong.unless(
        metadata.len() <= METADATA_ENTRIES,
        "metadata",
        "must have at most 64 entries",
    );
    let bytes: usize = metadata
        .iter()
        .map(|(key, value)| key.len() + value.len())
        .sum();
    wrong.unless(
        bytes <= METADATA_BYTES,
        "metadata",
        format!("must be at most 16 KiB in all; it is {bytes} bytes"),
    );
    let keys = metadata
        .keys()
        .all(|key| (1..=METADATA_KEY).contains(&key.len()));
    wrong.unless(keys, "metadata", "each key must be 1-63 bytes");
    let values = metadata.values().all(|value| value.len() <= METADATA_VALUE);
    wrong.unless(values, "metadata", "each value must be at most 1024 bytes");
    let clean = metadata
        .iter()
        .all(|(key, value)| !key.contains('\0') && !value.contains('\0'));
    wrong.unless(clean, "metadata", "must not hold NUL");
}

fn env(wrong: &mut Wrong, env: &HashMap<String, String>) {
    wrong.unless(
        env.len() <= ENV_ENTRIES,
        "env",
        "must have at most 256 variables",
    );
    let bytes: usize = env
        .iter()
        .map(|(name, value)| name.len() + value.len())
        .sum();
    wrong.unless(bytes <= ENV_BYTES, "env", "must be at most 64 KiB in all");
    let names = env.iter().all(|(name, value)| {
        !name.is_empty() && !name.contains(['=', '\0']) && !value.contains('\0')
    });
    wrong.unless(
        names,
        "env",
        "names must not be empty or hold =, and nothing may hold NUL",
    );
}

#[cfg(test)]
mod tests {
    use tonic_types::StatusExt as _;

    use super::*;

    fn fields(request: &CreateSessionRequest) -> Vec<String> {
        named(create_session(request))
    }

    fn named(checked: Result<(), Status>) -> Vec<String> {
        match checked {
            Ok(()) => vec![],
            Err(status) => status
                .get_details_bad_request()
                .unwrap()
                .field_violations
                .into_iter()
                .map(|wrong| wrong.field)
                .collect(),
        }
    }

    fn base() -> CreateSessionRequest {
        CreateSessionRequest {
            template: "base".into(),
            ..CreateSessionRequest::default()
        }
    }

    fn seconds(seconds: i64) -> prost_types::Duration {
        prost_types::Duration { seconds, nanos: 0 }
    }

    #[test]
    fn timeouts_have_bounds() {
        for (timeout, fits) in [
            (None, true),
            (Some(seconds(1)), true),
            (Some(seconds(86400)), true),
            (Some(seconds(0)), false),
            (Some(seconds(-5)), false),
            (Some(seconds(31_536_000)), false),
        ] {
            assert_eq!(
                fields(&CreateSessionRequest { timeout, ..base() }).is_empty(),
                fits,
                "{timeout:?}"
            );
        }
    }

    #[test]
    fn every_wrong_field_is_named() {
        let request = CreateSessionRequest {
            timeout: Some(seconds(0)),
            metadata: [("k".to_owned(), "v".repeat(1 << 20))].into(),
            env: [("A=B".to_owned(), String::new())].into(),
            network: Some(Network {
                egress: Some(Egress {
                    allow: vec!["10.0.0.1/8".into()],
                    deny: vec!["example.com".into(); 65],
                }),
                egress_bytes_per_second: 1,
                ingress_bytes_per_second: 1023,
                ..Network::default()
            }),
            request_id: "has space".into(),
            ..CreateSessionRequest::default()
        };
        let mut named = fields(&request);
        named.dedup();
        assert_eq!(
            named,
            [
                "template",
                "timeout",
                "metadata",
                "env",
                "network.egress_bytes_per_second",
                "network.ingress_bytes_per_second",
                "network.egress.allow",
                "network.egress.deny",
                "request_id"
            ]
        );
    }

    #[test]
    fn forks_resumes_and_checkpoints_have_limits() {
        let fork = |count| {
            named(fork_session(&ForkSessionRequest {
                count,
                ..ForkSessionRequest::default()
            }))
        };
        assert!([0, 1, 100].map(fork).iter().all(Vec::is_empty));
        assert_eq!(fork(101), ["count"]);
        let wrong = ForkSessionRequest {
            timeout: Some(seconds(0)),
            request_id: "has space".into(),
            ..ForkSessionRequest::default()
        };
        assert_eq!(named(fork_session(&wrong)), ["timeout", "request_id"]);
        let resume = |timeout| {
            named(resume_session(&ResumeSessionRequest {
                timeout,
                ..ResumeSessionRequest::default()
            }))
        };
        assert!(resume(None).is_empty() && resume(Some(seconds(1))).is_empty());
        assert_eq!(resume(Some(seconds(86_401))), ["timeout"]);
        let checkpoint = |name: &str| {
            named(create_checkpoint(&CreateCheckpointRequest {
                name: name.into(),
                ..CreateCheckpointRequest::default()
            }))
        };
        assert!(checkpoint("").is_empty() && checkpoint(&"x".repeat(63)).is_empty());
        assert_eq!(checkpoint(&"x".repeat(64)), ["name"]);
        assert_eq!(checkpoint("a\nb"), ["name"]);
        let back = |id: &str| {
            named(rollback_session(&RollbackSessionRequest {
                checkpoint_id: id.into(),
                ..RollbackSessionRequest::default()
            }))
        };
        assert!(back(&"a1".repeat(10)).is_empty());
        for id in ["", "a", "A1A1A1A1A1A1A1A1A1A1"] {
            assert_eq!(back(id), ["checkpoint_id"], "{id}");
        }
    }

    #[test]
    fn updates_are_checked_like_creates() {
        let update = |network| {
            named(update_session(&UpdateSessionRequest {
                network: Some(network),
                ..UpdateSessionRequest::default()
            }))
        };
        let allowing = |entry: &str| Network {
            egress: Some(Egress {
                allow: vec![entry.into()],
                deny: vec![],
            }),
            ..Network::default()
        };
        for entry in [
            "203.0.113.0/24",
            "203.0.113.7",
            "example.com",
            "*.example.com",
        ] {
            assert!(update(allowing(entry)).is_empty(), "{entry}");
        }
        assert_eq!(update(allowing("*")), ["network.egress.allow"]);
    }
}
