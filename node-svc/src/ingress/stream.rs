//! gRPC from a client to envd, bodies and trailers untouched.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use axum::BoxError;
use axum::body::Body;
use bytes::Bytes;
use guest_link::body::Whole;
use http::{HeaderMap, HeaderName, Request, Response, Uri, header};
use http_body::Frame;
use service_kit::{
    errors::{Failure, Reason},
    telemetry,
};
use tokio_util::sync::WaitForCancellationFutureOwned;
use tonic::Code;

use super::{
    answer::Refusal,
    target::{PORT_HEADER, SESSION_HEADER},
    token,
};
use crate::{
    guest::Answer,
    hosted::{Over, Reach, Session},
};

/// What a client may call in a guest.
const ALLOWED: [&str; 3] = [
    "/sandmesh.envd.v1.",
    "/grpc.reflection.",
    "/grpc.health.v1.",
];
/// What only the node calls.
const NODE_ONLY: [&str; 5] = [
    "/sandmesh.envd.v1.SystemService/Configure",
    "/sandmesh.envd.v1.SystemService/ExportLayer",
    "/sandmesh.envd.v1.SystemService/PrepareSnapshot",
    "/sandmesh.envd.v1.SystemService/Shutdown",
    "/sandmesh.envd.v1.SystemService/StreamSpans",
];

pub(super) async fn carry(
    session: &Session,
    reach: &Arc<Reach>,
    mut request: Request<Body>,
) -> Result<Response<Body>, Refusal> {
    token::check_stream(session, request.headers())?;
    let path = request.uri().path().to_owned();
    check_path(&path)?;
    let headers = request.headers_mut();
    for name in [
        header::AUTHORIZATION.as_str(),
        SESSION_HEADER,
        PORT_HEADER,
        token::TOKEN_HEADER,
        "host",
    ] {
        headers.remove(name);
    }
    headers.remove(header::COOKIE);
    pass(reach, request, path, true).await
}

/// Sends a request on to envd, under an address there; both bodies are passed on as they come.
pub(super) async fn pass(
    reach: &Arc<Reach>,
    mut request: Request<Body>,
    address: String,
    is_grpc: bool,
) -> Result<Response<Body>, Refusal> {
    if reach.is_silent() {
        let message = "the daemon of this session has not answered for a while; its processes and ports may still work";
        let failure = Failure::unavailable(Reason::new("GUEST_SILENT"), message);
        return Err(Refusal::new(failure, 503));
    }
    telemetry::inject_trace_context(request.headers_mut());
    *request.uri_mut() = Uri::builder()
        .scheme("http")
        .authority("guest")
        .path_and_query(address)
        .build()
        .map_err(|error| {
            Refusal::new(
                Failure::new(
                    Code::InvalidArgument,
                    Reason::INVALID_ARGUMENT,
                    error.to_string(),
                ),
                400,
            )
        })?;
    // Of HTTP/1.1, hyper tells by itself.
    let may_break_off = request.version() == http::Version::HTTP_2;
    *request.version_mut() = http::Version::HTTP_2;
    let send = reach.guest.send(request.map(|body| {
        if may_break_off {
            tonic::body::Body::new(Whole::new(body))
        } else {
            tonic::body::Body::new(body)
        }
    }));
    tokio::select! {
        answer = send => match answer {
            Ok(response) => Ok(response.map(|body| Body::new(Carried::new(body, Arc::clone(reach), is_grpc)))),
            Err(_) if reach.over.is_cancelled() => Err(over(reach)),
            Err(error) => {
                tracing::warn!(%error, "a guest did not answer");
                Err(Refusal::new(Failure::unavailable(Reason::SERVICE_UNAVAILABLE, "envd of this session does not answer"), 503))
            }
        },
        () = reach.over.cancelled() => Err(over(reach)),
    }
}

/// Refuses what a client may not call in a guest.
fn check_path(path: &str) -> Result<(), Refusal> {
    if NODE_ONLY.contains(&path) {
        let failure = Failure::new(
            Code::PermissionDenied,
            Reason::NOT_ALLOWED,
            format!("only the node may call {path}"),
        );
        return Err(Refusal::new(failure, 403));
    }
    if !ALLOWED.iter().any(|prefix| path.starts_with(prefix)) {
        let message = format!(
            "{path} is not served inside a sandbox; calls of the control plane carry no {SESSION_HEADER}"
        );
        return Err(Refusal::new(
            Failure::new(Code::Unimplemented, Reason::new("METHOD_UNKNOWN"), message),
            404,
        ));
    }
    Ok(())
}

fn over(reach: &Reach) -> Refusal {
    let (failure, http) = over_failure(reach.why());
    Refusal::new(failure, http)
}

/// Why a call cannot go on whose session left it.
fn over_failure(why: Over) -> (Failure, u16) {
    match why {
        Over::Ended => (
            Failure::new(
                Code::NotFound,
                Reason::SESSION_STOPPED,
                "the session was stopped",
            ),
            404,
        ),
        Over::Paused => (
            Failure::new(
                Code::Aborted,
                Reason::SESSION_PAUSED,
                "the session was paused during the call; its processes go on when it is resumed",
            ),
            409,
        ),
        Over::RolledBack => (
            Failure::new(
                Code::Aborted,
                Reason::new("SESSION_ROLLED_BACK"),
                "the session went back to a checkpoint during the call",
            ),
            409,
        ),
    }
}

/// An answer on its way: when its session leaves it, it ends with the reason instead of with nothing.
struct Carried {
    body: Whole<Answer>,
    reach: Arc<Reach>,
    over: Pin<Box<WaitForCancellationFutureOwned>>,
    is_done: bool,
    /// Whether the reason has a place at the end; otherwise the answer breaks off.
    is_grpc: bool,
}

impl Carried {
    fn new(body: Answer, reach: Arc<Reach>, is_grpc: bool) -> Self {
        Self {
            body: Whole::new(body),
            is_grpc,
            over: Box::pin(reach.over.clone().cancelled_owned()),
            reach,
            is_done: false,
        }
    }

    fn last(&mut self) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        self.is_done = true;
        let (failure, _) = over_failure(self.reach.why());
        if !self.is_grpc {
            return Poll::Ready(Some(Err(failure.message().into())));
        }
        let headers = failure
            .into_status()
            .into_http::<Body>()
            .into_parts()
            .0
            .headers;
        let mut trailers = HeaderMap::new();
        for name in ["grpc-status", "grpc-message", "grpc-status-details-bin"] {
            if let Some(value) = headers.get(name) {
                trailers.insert(HeaderName::from_static(name), value.clone());
            }
        }
        Poll::Ready(Some(Ok(Frame::trailers(trailers))))
    }
}

impl http_body::Body for Carried {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if self.is_done {
            return Poll::Ready(None);
        }
        match Pin::new(&mut self.body).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                self.is_done = frame.is_trailers();
                return Poll::Ready(Some(Ok(frame)));
            }
            // The connection was cut under it.
            Poll::Ready(None | Some(Err(_))) if self.reach.over.is_cancelled() => {
                return self.last();
            }
            ready @ Poll::Ready(_) => return ready,
            Poll::Pending => {}
        }
        match self.over.as_mut().poll(cx) {
            Poll::Ready(()) => self.last(),
            Poll::Pending => Poll::Pending,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.is_done || self.body.is_end_stream()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_may_call_all_of_a_guest_but_what_the_node_alone_may() {
        let pool = proto::ENVD_DESCRIPTORS;
        let files = <prost_types::FileDescriptorSet as prost::Message>::decode(pool).unwrap();
        let mut refused = Vec::new();
        for file in &files.file {
            for service in &file.service {
                for method in &service.method {
                    let (package, service) = (file.package(), service.name());
                    let path = format!("/{package}.{service}/{}", method.name());
                    if check_path(&path).is_err() {
                        refused.push(path);
                    }
                }
            }
        }
        refused.sort();
        assert_eq!(refused, NODE_ONLY);
        assert!(check_path("/sandmesh.session.v1.SessionService/GetSession").is_err());
    }
}
