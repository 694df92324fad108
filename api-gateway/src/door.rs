//! What every call passes: who calls, with which deadline it goes on, and what comes back.

use std::time::Duration;

use service_kit::{
    errors::{Failure, Reason},
    mesh::Caller,
};
use tonic::{Code, Request, Status, metadata::MetadataMap};

use crate::keys::{ApiKey, KeyError, Keys};

const DEFAULT_TIMEOUT: Duration = Duration::from_mins(1);

/// The public door.
#[derive(Debug, Clone)]
pub struct Door {
    keys: Keys,
}

/// How long a call may take when the client does not say.
#[derive(Debug, Clone, Copy)]
pub enum Limit {
    /// A minute.
    Usual,
    /// This long.
    AtMost(Duration),
    /// As long as it likes: streams.
    None,
}

impl Door {
    /// Checks keys with these.
    pub fn new(keys: Keys) -> Self {
        Self { keys }
    }

    /// Lets a call in: the same message, with the caller and a deadline, and nothing else of what the client sent along.
    pub async fn enter<T>(&self, request: Request<T>, limit: Limit) -> Result<Request<T>, Status> {
        let caller = self.caller(request.metadata()).await?;
        tracing::Span::current().record("team", caller.team.as_str());
        let asked = client_timeout(request.metadata());
        let mut inside = Request::new(request.into_inner());
        caller.apply(inside.metadata_mut());
        let timeout = match (limit, asked) {
            (Limit::None, asked) => asked,
            (Limit::Usual, asked) => {
                Some(asked.map_or(DEFAULT_TIMEOUT, |asked| asked.min(DEFAULT_TIMEOUT)))
            }
            (Limit::AtMost(most), asked) => Some(asked.map_or(most, |asked| asked.min(most))),
        };
        if let Some(timeout) = timeout {
            inside.set_timeout(timeout);
        }
        Ok(inside)
    }

    async fn caller(&self, metadata: &MetadataMap) -> Result<Caller, Status> {
        let value = metadata
            .get("authorization")
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default();
        let Some(text) = value.strip_prefix("Bearer ") else {
            return Err(Failure::new(
                Code::Unauthenticated,
                Reason::CREDENTIALS_MISSING,
                "send an API key as metadata authorization: Bearer <key>; `sandmesh key create` makes one",
            )
            .into());
        };
        let key = ApiKey::parse(text).ok_or_else(invalid)?;
        self.keys.check(&key).await.map_err(|error| match error {
            KeyError::Invalid => invalid(),
            KeyError::Store(error) => {
                tracing::warn!(%error, "keys cannot be looked up");
                Failure::unavailable(
                    Reason::DATABASE_UNAVAILABLE,
                    "API keys cannot be checked right now; try again",
                )
                .into()
            }
        })
    }
}

fn invalid() -> Status {
    Failure::new(
        Code::Unauthenticated,
        Reason::API_KEY_INVALID,
        "the API key is unknown or was revoked",
    )
    .into()
}

/// `grpc-timeout` (gRPC over HTTP/2, "Timeout"): up to 8 digits and a unit.
fn client_timeout(metadata: &MetadataMap) -> Option<Duration> {
    let text = metadata.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let number: u64 = digits.parse().ok().filter(|_| digits.len() <= 8)?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

/// What a service behind the gateway said, as a client may hear it: its own words where they were meant for clients. Our services give
/// a reason with whatever they say: without one it is the connection to them that broke, which HTTP/2 tells in as many ways as there are
/// to die, before an answer and within it.
pub fn outward(status: Status) -> Status {
    let is_told = service_kit::errors::reason_of(&status).is_some();
    match status.code() {
        Code::Unavailable | Code::Internal | Code::Unknown | Code::Cancelled if !is_told => {
            tracing::warn!(%status, "a service does not answer");
            Failure::unavailable(
                Reason::SERVICE_UNAVAILABLE,
                "a part of the control plane does not answer; try again",
            )
            .into()
        }
        Code::Internal | Code::Unknown | Code::DataLoss | Code::Unauthenticated => {
            tracing::error!(%status, "a service failed");
            Failure::new(
                Code::Internal,
                Reason::INTERNAL,
                "something went wrong inside; quote the request ID",
            )
            .into()
        }
        _ => status,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_that_is_cut_may_be_asked_for_again() {
        for cut in [
            Status::unknown("h2 protocol error: error reading a body from connection"),
            Status::unknown("transport error"),
            Status::cancelled("operation was canceled"),
        ] {
            let cut = outward(cut);
            assert_eq!(cut.code(), Code::Unavailable);
            assert!(cut.message().starts_with("a part of the control plane"));
        }
        let failed = Failure::new(Code::Internal, Reason::INTERNAL, "secret");
        let failed = outward(failed.into());
        assert_eq!(failed.code(), Code::Internal);
        assert!(!failed.message().contains("secret"));
        let late = outward(Status::deadline_exceeded("too late"));
        assert_eq!(late.code(), Code::DeadlineExceeded);
    }

    #[test]
    fn deadlines_parse_as_grpc_writes_them() {
        let parsed = |text: &str| {
            let mut metadata = MetadataMap::new();
            metadata.insert("grpc-timeout", text.parse().unwrap());
            client_timeout(&metadata)
        };
        assert_eq!(parsed("250m"), Some(Duration::from_millis(250)));
        assert_eq!(parsed("2H"), Some(Duration::from_hours(2)));
        for text in ["", "S", "1", "123456789S", "1x", "-1S"] {
            assert_eq!(parsed(text), None, "{text}");
        }
    }

    #[test]
    fn nothing_internal_leaks() {
        let leak = Status::internal("panicked at src/secret.rs");
        assert!(!outward(leak).message().contains("secret"));
        let meant: Status =
            Failure::new(Code::NotFound, Reason::SESSION_UNKNOWN, "no session x").into();
        assert_eq!(outward(meant).message(), "no session x");
    }
}
