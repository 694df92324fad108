//! One way from a domain error to an answer: a gRPC status with `google.rpc` details.
//!
//! Every error a client can see says what was wrong, which ID, and what to do. [`Reason`] is the stable word programs match
//! on; the message is for people and may change.

use std::{collections::HashMap, fmt, time::Duration};

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt as _};

/// Domain of every `google.rpc.ErrorInfo` of Sandmesh.
pub const DOMAIN: &str = "sandmesh.dev";

/// A stable word for what went wrong, in `UPPER_SNAKE_CASE`.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Reason(&'static str);

impl Reason {
    /// For a reason that only one service knows.
    pub const fn new(word: &'static str) -> Self {
        Self(word)
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        self.0
    }

    /// As text that lives for good, for metric labels.
    pub fn word(&self) -> &'static str {
        self.0
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl fmt::Debug for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident;)*) => {
        impl Reason {
            $($(#[$doc])* pub const $name: Self = Self::new(stringify!($name));)*
        }
    };
}

reasons! {
    /// A session ID, or a host that should hold one, is not well-formed.
    SESSION_ID_MALFORMED;
    /// No such session, or not the caller's.
    SESSION_UNKNOWN;
    /// The session was stopped.
    SESSION_STOPPED;
    /// The session ended by an error.
    SESSION_FAILED;
    /// The session's node was lost.
    SESSION_LOST;
    /// The session is paused and must not be woken by this call.
    SESSION_PAUSED;
    /// The session is still starting.
    SESSION_STARTING;
    /// Nobody listens on that port of the sandbox.
    PORT_CLOSED;
    /// Not a port number from 1 to 65535.
    PORT_INVALID;
    /// The node that hosts the session does not answer.
    NODE_UNREACHABLE;
    /// The node has no room.
    NODE_FULL;
    /// The node's disk is full.
    NODE_DISK_FULL;
    /// No node has room.
    NO_CAPACITY;
    /// The catalog cannot be asked right now.
    CATALOG_UNAVAILABLE;
    /// The database cannot be asked right now.
    DATABASE_UNAVAILABLE;
    /// A part of the control plane does not answer.
    SERVICE_UNAVAILABLE;
    /// No such template, or not visible to the caller.
    TEMPLATE_UNKNOWN;
    /// No such build.
    BUILD_UNKNOWN;
    /// A field of the request is wrong; see `BadRequest`.
    INVALID_ARGUMENT;
    /// No credentials were given.
    CREDENTIALS_MISSING;
    /// The API key is unknown or revoked.
    API_KEY_INVALID;
    /// The session's access token is wrong.
    ACCESS_TOKEN_INVALID;
    /// The caller may not do this.
    NOT_ALLOWED;
    /// Planned, not built yet.
    NOT_YET_AVAILABLE;
    /// A revision or offset is older than what is kept.
    REVISION_TOO_OLD;
    /// The session is not in a state that allows this.
    WRONG_STATE;
    /// Something went wrong inside; the request ID finds it in the logs.
    INTERNAL;
}

/// An answer that says no, being put together.
#[derive(Debug, Clone)]
#[must_use]
pub struct Failure {
    code: Code,
    reason: Reason,
    message: String,
    metadata: HashMap<String, String>,
    fields: Vec<FieldViolation>,
    retry_after: Option<Duration>,
}

impl Failure {
    /// What kind, which stable word, and one sentence for people that says what to do.
    pub fn new(code: Code, reason: Reason, message: impl Into<String>) -> Self {
        Self {
            code,
            reason,
            message: message.into(),
            metadata: HashMap::new(),
            fields: Vec::new(),
            retry_after: None,
        }
    }

    /// `INVALID_ARGUMENT` for one field.
    pub fn field_invalid(field: impl Into<String>, description: impl Into<String>) -> Self {
        let (field, description) = (field.into(), description.into());
        Self::new(
            Code::InvalidArgument,
            Reason::INVALID_ARGUMENT,
            format!("{field}: {description}"),
        )
        .field(field, description)
    }

    /// `UNIMPLEMENTED` for what a later version brings.
    pub fn not_yet(what: &str) -> Self {
        Self::new(
            Code::Unimplemented,
            Reason::NOT_YET_AVAILABLE,
            format!("{what} is not available in this version"),
        )
    }

    /// `UNAVAILABLE`, worth another try after a second.
    pub fn unavailable(reason: Reason, message: impl Into<String>) -> Self {
        Self::new(Code::Unavailable, reason, message).retry_after(Duration::from_secs(1))
    }

    /// Adds a fact, such as `sessionId`, to the `ErrorInfo`.
    pub fn with(mut self, key: impl Into<String>, value: impl fmt::Display) -> Self {
        self.metadata.insert(key.into(), value.to_string());
        self
    }

    /// Names a wrong field.
    pub fn field(mut self, field: impl Into<String>, description: impl Into<String>) -> Self {
        self.fields.push(FieldViolation::new(field, description));
        self
    }

    /// Says when another try makes sense.
    pub fn retry_after(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }

    /// The stable word.
    pub fn reason(&self) -> &Reason {
        &self.reason
    }

    /// The gRPC code.
    pub fn code(&self) -> Code {
        self.code
    }

    /// The sentence.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// When another try makes sense.
    pub fn retry(&self) -> Option<Duration> {
        self.retry_after
    }

    /// The answer.
    pub fn into_status(self) -> Status {
        let mut details =
            ErrorDetails::with_error_info(self.reason.as_str(), DOMAIN, self.metadata);
        if !self.fields.is_empty() {
            details.set_bad_request(self.fields);
        }
        if let Some(wait) = self.retry_after {
            details.set_retry_info(Some(wait));
        }
        if let Some(id) = crate::request_id::current() {
            details.set_request_info(id, "");
        }
        Status::with_error_details(self.code, self.message, details)
    }
}

impl From<Failure> for Status {
    fn from(failure: Failure) -> Self {
        failure.into_status()
    }
}

/// The stable word in a status, if it carries one.
pub fn reason_of(status: &Status) -> Option<String> {
    status.get_details_error_info().map(|info| info.reason)
}

/// Whether another try of an idempotent call makes sense.
pub fn is_transient(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::Aborted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_keeps_reason_facts_fields_and_retry() {
        let status = Failure::field_invalid("timeout", "must be at most 24 h")
            .with("sessionId", "abc")
            .retry_after(Duration::from_secs(2))
            .into_status();
        let details = status.get_error_details();
        assert_eq!(reason_of(&status).as_deref(), Some("INVALID_ARGUMENT"));
        assert_eq!(details.error_info().unwrap().metadata["sessionId"], "abc");
        assert_eq!(
            details.bad_request().unwrap().field_violations[0].field,
            "timeout"
        );
        assert_eq!(
            details.retry_info().unwrap().retry_delay,
            Some(Duration::from_secs(2))
        );
    }
}
