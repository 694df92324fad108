//! Waiting until somebody listens in a guest.

use std::time::Duration;

use proto::{envd::v1::WaitForPortRequest, session::v1::PortReadiness};
use service_kit::{
    errors::{Failure, Reason, reason_of},
    readiness,
};
use tonic::{Code, Status};

use crate::hosted::Reach;

/// For the guest's own answer, beyond the time it was given.
const ANSWER: Duration = Duration::from_secs(5);
/// What a guest says of a server, as far as it is passed on.
const LONGEST_MESSAGE: usize = 500;

/// Waits for a port, and if asked for a good answer there.
pub(crate) async fn wait_for_port(reach: &Reach, ready: &PortReadiness) -> Result<(), Failure> {
    let limit =
        readiness::check(ready).map_err(|(field, rule)| Failure::field_invalid(field, rule))?;
    let request = WaitForPortRequest {
        port: ready.port,
        timeout: prost_types::Duration::try_from(limit).ok(),
        http_path: ready.http_path.clone(),
    };
    let mut ports = reach.guest.ports();
    let answer = tokio::select! {
        answer = tokio::time::timeout(limit + ANSWER, ports.wait_for_port(request)) => answer,
        () = reach.over.cancelled() => {
            let message = "the session stopped running during the wait";
            return Err(Failure::new(Code::Aborted, Reason::WRONG_STATE, message));
        }
    };
    match answer {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(status)) => Err(failure(&status, ready.port)),
        Err(_) => Err(silent()),
    }
}

fn failure(status: &Status, port: u32) -> Failure {
    let message: String = status.message().chars().take(LONGEST_MESSAGE).collect();
    match reason_of(status) {
        Some(reason) if reason == Reason::PORT_CLOSED.as_str() => {
            Failure::new(Code::DeadlineExceeded, Reason::PORT_CLOSED, message).with("port", port)
        }
        _ if status.code() == Code::InvalidArgument => {
            Failure::new(Code::InvalidArgument, Reason::INVALID_ARGUMENT, message)
        }
        _ => silent(),
    }
}

fn silent() -> Failure {
    Failure::unavailable(
        Reason::SERVICE_UNAVAILABLE,
        "envd of this session does not answer",
    )
}
