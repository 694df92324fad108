//! gRPC from a client to envd, bodies and trailers untouched.

use axum::body::Body;
use http::{Request, Response, Uri, header};
use service_kit::{
    errors::{Failure, Reason},
    telemetry,
};
use tonic::Code;

use super::{
    answer::Refusal,
    target::{PORT_HEADER, SESSION_HEADER},
    token,
};
use crate::hosted::{Reach, Session};

/// What a client may call in a guest.
const ALLOWED: [&str; 3] = [
    "/sandmesh.envd.v1.",
    "/grpc.reflection.",
    "/grpc.health.v1.",
];
/// What only the node calls.
const NODE_ONLY: [&str; 4] = [
    "/sandmesh.envd.v1.SystemService/Configure",
    "/sandmesh.envd.v1.SystemService/PrepareSnapshot",
    "/sandmesh.envd.v1.SystemService/Shutdown",
    "/sandmesh.envd.v1.SystemService/StreamSpans",
];

pub(super) async fn carry(
    session: &Session,
    reach: &Reach,
    mut request: Request<Body>,
) -> Result<Response<Body>, Refusal> {
    token::check_stream(session, request.headers())?;
    let path = request.uri().path().to_owned();
    if NODE_ONLY.contains(&path.as_str()) {
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
    telemetry::inject_trace_context(headers);
    *request.uri_mut() = Uri::builder()
        .scheme("http")
        .authority("guest")
        .path_and_query(path)
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
    *request.version_mut() = http::Version::HTTP_2;
    let send = reach.guest.send(request.map(tonic::body::Body::new));
    tokio::select! {
        answer = send => answer.map(|response| response.map(Body::new)).map_err(|error| {
            tracing::warn!(%error, "a guest did not answer");
            Refusal::new(Failure::unavailable(Reason::SERVICE_UNAVAILABLE, "envd of this session does not answer"), 503)
        }),
        () = reach.over.cancelled() => {
            Err(Refusal::new(Failure::new(Code::NotFound, Reason::SESSION_STOPPED, "the session was stopped"), 404))
        }
    }
}
