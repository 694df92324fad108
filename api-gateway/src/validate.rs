//! What a request must look like before it goes on. Pure; every limit of the proto comments is here, and every wrong field is named.

use std::collections::HashMap;

use proto::session::v1::CreateSessionRequest;
use service_kit::errors::{Failure, Reason};
use tonic::{Code, Status};

const METADATA_ENTRIES: usize = 64;
const METADATA_KEY: usize = 63;
const METADATA_VALUE: usize = 1024;
const METADATA_BYTES: usize = 16 << 10;
const ENV_ENTRIES: usize = 256;
const ENV_BYTES: usize = 64 << 10;
const REQUEST_ID: usize = 128;
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
    let id = &request.request_id;
    wrong.unless(
        id.len() <= REQUEST_ID && id.bytes().all(|b| b.is_ascii_graphic()),
        "request_id",
        "must be at most 128 printable ASCII characters without spaces",
    );
    wrong.done()
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

/// Checks labels alone, for an update.
pub fn labels(labels: &HashMap<String, String>) -> Result<(), Status> {
    let mut wrong = Wrong::default();
    metadata(&mut wrong, labels);
    wrong.done()
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
        match create_session(request) {
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
            request_id: "has space".into(),
            ..CreateSessionRequest::default()
        };
        let mut named = fields(&request);
        named.dedup();
        assert_eq!(
            named,
            ["template", "timeout", "metadata", "env", "request_id"]
        );
    }
}
