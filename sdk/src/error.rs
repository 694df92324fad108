//! What can go wrong, with the server's stable word in reach.

use std::time::Duration;

use service_kit::errors::reason_of;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

/// A call failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The server said no, or did not answer.
    #[error("{}", describe(.0))]
    Status(Box<Status>),
    /// The endpoint is not an address.
    #[error("endpoint: {0}")]
    Endpoint(String),
    /// A file was changed while it was read, and the connection broke: what came before is of another version.
    #[error("the file changed while it was read")]
    Changed,
    /// What the server sent makes no sense.
    #[error("the server's answer lacks {0}")]
    Incomplete(&'static str),
    /// Reading or writing local data failed.
    #[error("{0}")]
    Io(#[from] std::io::Error),
}

impl From<Status> for Error {
    fn from(status: Status) -> Self {
        Self::Status(Box::new(status))
    }
}

impl Error {
    /// The stable word, such as `SESSION_UNKNOWN`.
    pub fn reason(&self) -> Option<String> {
        match self {
            Self::Status(status) => reason_of(status),
            _ => None,
        }
    }

    /// The gRPC code.
    pub fn code(&self) -> Option<Code> {
        match self {
            Self::Status(status) => Some(status.code()),
            _ => None,
        }
    }

    /// A fact of the `ErrorInfo`, such as `sessionId`.
    pub fn fact(&self, key: &str) -> Option<String> {
        match self {
            Self::Status(status) => status.get_details_error_info()?.metadata.remove(key),
            _ => None,
        }
    }

    /// When another try makes sense, if the server said so.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Status(status) => status.get_details_retry_info()?.retry_delay,
            _ => None,
        }
    }

    /// Whether the connection broke rather than the server having said no.
    pub fn is_interruption(&self) -> bool {
        match self {
            Self::Status(status) => match status.code() {
                Code::Unavailable => true,
                // What a broken connection looks like to a client; a server gives a reason.
                Code::Unknown | Code::Cancelled | Code::Internal => reason_of(status).is_none(),
                _ => false,
            },
            _ => false,
        }
    }
}

fn describe(status: &Status) -> String {
    let message = if status.message().is_empty() {
        format!("{:?}", status.code())
    } else {
        status.message().to_owned()
    };
    match reason_of(status) {
        Some(reason) => format!("{message} ({reason})"),
        None => message,
    }
}
