//! A call to the node of a session, and what its answer means.

use std::time::Duration;

use proto::node::v1::node_service_client::NodeServiceClient;
use service_kit::{errors::reason_of, mesh::MeshChannel};
use tonic::{Code, Request, Response, Status};

use super::{SessionError, Sessions};
use crate::session::{EndReason, Session};

/// What a node made of a call.
pub(super) enum Answer<T> {
    /// It has done it.
    Done(T),
    /// It has not, and says why.
    Refused(Status),
    /// It did not answer, or lost the connection: it may have done it or not, and is asked again.
    Unclear,
}

/// A message that has so long to be answered.
pub(super) fn within<T>(limit: Duration, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(limit);
    request
}

/// Why a node refused, as an event says it.
pub(super) fn reason(status: &Status, or: &str) -> EndReason {
    EndReason::new(
        reason_of(status).unwrap_or_else(|| or.to_owned()),
        status.message(),
    )
}

/// Whether no node has said that: the connection broke, which HTTP/2 tells in as many ways as there are to die.
pub(super) fn is_broken(status: &Status) -> bool {
    std::error::Error::source(status).is_some()
}

/// What an answer of the node means. Pure.
fn sort<T>(answer: Result<Response<T>, Status>) -> Answer<T> {
    let status = match answer {
        Ok(done) => return Answer::Done(done.into_inner()),
        Err(status) => status,
    };
    match status.code() {
        Code::Unavailable | Code::Unknown => Answer::Unclear,
        // A node that has given up says what it gave up; without a reason it is only that the time was over.
        Code::DeadlineExceeded | Code::Cancelled if reason_of(&status).is_none() => Answer::Unclear,
        _ if is_broken(&status) => Answer::Unclear,
        _ => Answer::Refused(status),
    }
}

impl Sessions {
    /// Calls the node of a session, and waits no longer than `limit`.
    pub(super) async fn ask<T, F>(
        &self,
        session: &Session,
        limit: Duration,
        call: impl FnOnce(NodeServiceClient<MeshChannel>) -> F + Send,
    ) -> Result<Answer<T>, SessionError>
    where
        F: Future<Output = Result<Response<T>, Status>> + Send,
    {
        let Some(node) = self.nodes.reach(&session.node_id).await? else {
            return Ok(Answer::Unclear);
        };
        let answer = tokio::time::timeout(limit, call(node)).await;
        let answer = answer.unwrap_or_else(|_| Err(Status::unavailable("no answer in time")));
        if let Err(status) = &answer {
            tracing::warn!(session_id = session.id.short(), node_id = %session.node_id, %status, "a node did not do what it was asked");
        }
        Ok(sort(answer))
    }
}

#[cfg(test)]
mod tests {
    use service_kit::errors::{Failure, Reason};

    use super::*;

    #[test]
    fn only_a_node_that_says_so_has_refused() {
        let is_unclear = |status: Status| matches!(sort::<()>(Err(status)), Answer::Unclear);
        for code in [
            Code::Unavailable,
            Code::Unknown,
            Code::DeadlineExceeded,
            Code::Cancelled,
        ] {
            assert!(is_unclear(Status::new(code, "")), "{code:?}");
        }
        for code in [
            Code::ResourceExhausted,
            Code::FailedPrecondition,
            Code::Internal,
            Code::Aborted,
            Code::NotFound,
        ] {
            assert!(!is_unclear(Status::new(code, "")), "{code:?}");
        }
        let mut broken = Status::internal("h2 protocol error");
        broken.set_source(std::sync::Arc::new(std::io::Error::other("http2 error")));
        assert!(is_unclear(broken));
        let gave_up = Failure::new(
            Code::DeadlineExceeded,
            Reason::new("PAUSE_TIMEOUT"),
            "the guest did not stop",
        );
        assert!(!is_unclear(gave_up.into()));
        assert!(matches!(sort(Ok(Response::new(()))), Answer::Done(())));
    }
}
