//! What can go wrong with sessions, and how it is said.

use std::time::Duration;

use service_kit::{
    errors::{Failure, Reason, reason_of},
    ids::{CheckpointId, NodeId, SessionId},
};
use tonic::{Code, Status};

use crate::{lifecycle::State, placement::Free, session::EndReason, store::StoreError};

/// A request about a session cannot be done.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// No such session, or another team's.
    #[error("no session {0}")]
    Unknown(SessionId),
    /// It is in a state that does not allow the request.
    #[error("session {id} is {state:?}")]
    WrongState {
        /// Which.
        id: SessionId,
        /// Its state.
        state: State,
    },
    /// It ended while it was being started.
    #[error("session {id} did not start: {}", end.message)]
    DidNotStart {
        /// Which.
        id: SessionId,
        /// Why.
        end: EndReason,
    },
    /// No node has room.
    #[error("no node has room")]
    NoCapacity {
        /// The most any node has left.
        most: Free,
    },
    /// The template cannot be used.
    #[error("template: {0}")]
    Template(Status),
    /// The node does not answer.
    #[error("the node of session {id} does not answer")]
    NodeUnreachable {
        /// Which.
        id: SessionId,
    },
    /// Another request with the same ID is still being worked on.
    #[error("the first request with this request_id is still being worked on")]
    StillStarting(SessionId),
    /// A pause, resume or rollback of it is still under way.
    #[error("session {id} is still {state:?}")]
    StillBusy {
        /// Which.
        id: SessionId,
        /// Its state.
        state: State,
    },
    /// A pause, resume or rollback did not succeed, whoever had asked for it.
    #[error("session {id} is {state:?} again: `sandmesh session events` says why")]
    CameToNothing {
        /// Which.
        id: SessionId,
        /// Its state.
        state: State,
    },
    /// Its node did not do what it was asked, and says why.
    #[error("the node of session {id}: {}", status.message())]
    Refused {
        /// Which.
        id: SessionId,
        /// What the node said.
        status: Status,
    },
    /// It is paused, and a call must not wake it.
    #[error("session {0} is paused; resume it first, or let calls wake it (wake_on_request)")]
    NotToBeWoken(SessionId),
    /// No such checkpoint of this session.
    #[error("no checkpoint {id} of session {session}")]
    CheckpointUnknown {
        /// Which.
        id: CheckpointId,
        /// Of which session.
        session: SessionId,
    },
    /// It has as many checkpoints as it may have.
    #[error("session {id} has {most} checkpoints, the most it may have; delete one first")]
    TooManyCheckpoints {
        /// Which.
        id: SessionId,
        /// How many.
        most: i64,
    },
    /// Its node has no room for its children.
    #[error("the node of session {id} has no room for {count} children")]
    NoRoomForChildren {
        /// The parent.
        id: SessionId,
        /// How many were asked for.
        count: u32,
        /// What the node has left.
        free: Free,
    },
    /// No such node, or a dead one.
    #[error("no node {0} that lives")]
    NodeUnknown(NodeId),
    /// The node was not told, or did not answer.
    #[error("node {0} does not answer")]
    NodeSilent(NodeId),
    /// A field makes no sense.
    #[error("{field}: {description}")]
    Invalid {
        /// Which.
        field: &'static str,
        /// What it must be.
        description: String,
    },
    /// The database.
    #[error("{0}")]
    Store(#[from] StoreError),
    /// Others kept changing the session.
    #[error("session {0} changes too fast")]
    Contended(SessionId),
    /// The service is stopping.
    #[error("shutting down")]
    ShuttingDown,
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Database(
                cause @ (sqlx::Error::Io(_)
                | sqlx::Error::PoolTimedOut
                | sqlx::Error::PoolClosed
                | sqlx::Error::WorkerCrashed
                | sqlx::Error::Tls(_)
                | sqlx::Error::Protocol(_)),
            ) => {
                tracing::warn!(error = %cause, "database unavailable");
                unavailable()
            }
            StoreError::TimedOut => {
                tracing::warn!("the database did not answer in time");
                unavailable()
            }
            // Classes 08 (connection), 53 (resources) and 57 (operator intervention) pass by themselves.
            StoreError::Database(sqlx::Error::Database(cause))
                if cause.code().is_some_and(|code| {
                    ["08", "53", "57"]
                        .iter()
                        .any(|class| code.starts_with(class))
                        || NOT_MIGRATED_YET.contains(&&*code)
                }) =>
            {
                tracing::warn!(error = %cause, "database unavailable");
                unavailable()
            }
            other => {
                tracing::error!(error = %other, "database statement failed");
                Self::new(
                    Code::Internal,
                    Reason::INTERNAL,
                    "something went wrong inside; quote the request ID",
                )
            }
        }
    }
}

const NODE_REFUSED: Reason = Reason::new("NODE_REFUSED");
const NODE_UNKNOWN: Reason = Reason::new("NODE_UNKNOWN");
const CHECKPOINT_UNKNOWN: Reason = Reason::new("CHECKPOINT_UNKNOWN");
const TOO_MANY_CHECKPOINTS: Reason = Reason::new("TOO_MANY_CHECKPOINTS");

fn in_words(free: Free) -> String {
    format!(
        "{} sessions, {} bytes of memory, {} vCPUs, {} bytes of disk",
        free.sessions, free.memory_bytes, free.vcpus, free.disk_bytes
    )
}

fn no_room(message: String, free: Free) -> Failure {
    Failure::new(Code::ResourceExhausted, Reason::NO_CAPACITY, message)
        .with("freeSessions", free.sessions)
        .with("freeMemoryBytes", free.memory_bytes)
        .with("freeVcpus", free.vcpus)
        .with("freeDiskBytes", free.disk_bytes)
        .retry_after(Duration::from_secs(5))
}

/// Undefined table and schema: this replica, or another, has not migrated the database yet.
const NOT_MIGRATED_YET: [&str; 2] = ["42P01", "3F000"];

fn unavailable() -> Failure {
    Failure::unavailable(
        Reason::DATABASE_UNAVAILABLE,
        "the database cannot be reached right now; try again",
    )
}

impl From<SessionError> for Failure {
    fn from(error: SessionError) -> Self {
        let message = error.to_string();
        match error {
            SessionError::Unknown(id) => {
                Self::new(Code::NotFound, Reason::SESSION_UNKNOWN, message).with("sessionId", id)
            }
            SessionError::WrongState { id, state } => {
                let reason = match state {
                    State::Stopped | State::Stopping => Reason::SESSION_STOPPED,
                    State::Failed => Reason::SESSION_FAILED,
                    State::Lost => Reason::SESSION_LOST,
                    State::Paused => Reason::SESSION_PAUSED,
                    _ => Reason::WRONG_STATE,
                };
                let code = if state.is_final() {
                    Code::NotFound
                } else {
                    Code::FailedPrecondition
                };
                Self::new(code, reason, message)
                    .with("sessionId", id)
                    .with("state", format!("{state:?}"))
            }
            SessionError::DidNotStart { id, end } => {
                Self::new(Code::Aborted, Reason::SESSION_FAILED, message)
                    .with("sessionId", id)
                    .with("cause", end.reason)
            }
            SessionError::NoCapacity { most } => no_room(
                format!(
                    "no node has room; the most any node has free: {}",
                    in_words(most)
                ),
                most,
            ),
            SessionError::NoRoomForChildren { id, free, .. } => {
                no_room(format!("{message}; it has free: {}", in_words(free)), free)
                    .with("sessionId", id)
            }
            SessionError::StillBusy { id, state } => {
                Self::unavailable(Reason::WRONG_STATE, message)
                    .with("sessionId", id)
                    .with("state", format!("{state:?}"))
            }
            SessionError::CameToNothing { id, state } => {
                Self::new(Code::Aborted, Reason::WRONG_STATE, message)
                    .with("sessionId", id)
                    .with("state", format!("{state:?}"))
                    .retry_after(Duration::from_secs(1))
            }
            // What the node said without a reason; with one it is the answer as it is.
            SessionError::Refused { id, .. } => {
                Self::new(Code::Aborted, NODE_REFUSED, message).with("sessionId", id)
            }
            SessionError::NotToBeWoken(id) => {
                Self::new(Code::FailedPrecondition, Reason::SESSION_PAUSED, message)
                    .with("sessionId", id)
            }
            SessionError::CheckpointUnknown { id, session } => {
                Self::new(Code::NotFound, CHECKPOINT_UNKNOWN, message)
                    .with("sessionId", session)
                    .with("checkpointId", id)
            }
            SessionError::TooManyCheckpoints { id, .. } => {
                Self::new(Code::ResourceExhausted, TOO_MANY_CHECKPOINTS, message)
                    .with("sessionId", id)
            }
            SessionError::NodeUnknown(node) => {
                Self::new(Code::NotFound, NODE_UNKNOWN, message).with("nodeId", node)
            }
            SessionError::NodeSilent(node) => {
                Self::unavailable(Reason::NODE_UNREACHABLE, message).with("nodeId", node)
            }
            SessionError::NodeUnreachable { id } => {
                Self::unavailable(Reason::NODE_UNREACHABLE, message).with("sessionId", id)
            }
            SessionError::StillStarting(id) => {
                Self::unavailable(Reason::SESSION_STARTING, message).with("sessionId", id)
            }
            SessionError::Invalid { field, description } => Self::field_invalid(field, description),
            SessionError::Store(error) => error.into(),
            SessionError::Contended(id) => Self::new(Code::Aborted, Reason::WRONG_STATE, message)
                .with("sessionId", id)
                .retry_after(Duration::from_millis(100)),
            // No answer of its own: it could not be reached.
            SessionError::Template(_) | SessionError::ShuttingDown => {
                Self::unavailable(Reason::SERVICE_UNAVAILABLE, message)
            }
        }
    }
}

impl From<SessionError> for Status {
    fn from(error: SessionError) -> Self {
        match error {
            // template-svc has said it well: TEMPLATE_UNKNOWN with the closest names. So has the node: what failed, and why.
            SessionError::Template(status) | SessionError::Refused { status, .. }
                if reason_of(&status).is_some() =>
            {
                status
            }
            other => Failure::from(other).into_status(),
        }
    }
}
