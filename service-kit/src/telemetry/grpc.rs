//! What is observed of every gRPC call a server answers: a span, one log line, rate, errors and duration.

use std::{
    collections::HashSet,
    pin::Pin,
    sync::LazyLock,
    task::{Context, Poll},
    time::Instant,
};

use axum::{
    body::Body,
    extract::{Request, State},
    middleware::Next,
    response::Response,
};
use http::{HeaderMap, HeaderValue};
use http_body::Frame;
use pin_project_lite::pin_project;
use prost::Message as _;
use tonic::Code;
use tracing::{Instrument as _, Span, field::Empty};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

use crate::{mesh, request_id};

/// What parts of a deployment ask each other all the time; not worth a line or a span.
const POLLS: [&str; 3] = ["Health/Check", "/Heartbeat", "/ListNodes"];

fn is_poll(method: &str) -> bool {
    POLLS.iter().any(|poll| method.ends_with(poll))
}

/// Methods that exist: only these become a label, whatever a client puts in the path.
static METHODS: LazyLock<HashSet<String>> = LazyLock::new(|| {
    let all = prost_types::FileDescriptorSet::decode(proto::DESCRIPTORS).unwrap_or_default();
    let ours = all.file.iter().flat_map(|file| {
        file.service.iter().flat_map(|service| {
            service
                .method
                .iter()
                .map(|method| format!("/{}.{}/{}", file.package(), service.name(), method.name()))
        })
    });
    ours.chain(["/grpc.health.v1.Health/Check".to_owned()])
        .collect()
});

/// A method's path as a label: its name if it exists, else `other`.
pub fn method_label(path: &str) -> &'static str {
    METHODS
        .get(path)
        .map_or("other", |known| known.trim_start_matches('/'))
}

/// Middleware: continues the caller's trace, keeps the request ID, and records how the call ended.
pub async fn observe_grpc(
    State(service): State<&'static str>,
    request: Request,
    next: Next,
) -> Response {
    let id = request_id::from_headers(request.headers());
    let method = method_label(request.uri().path());
    let span = if is_poll(method) {
        Span::none()
    } else {
        tracing::info_span!(
            "grpc",
            otel.name = method,
            otel.kind = "server",
            service,
            request_id = %id,
            team = Empty,
            session_id = Empty,
            code = Empty,
        )
    };
    if let Some(team) = request
        .headers()
        .get(mesh::TEAM_HEADER)
        .and_then(|team| team.to_str().ok())
    {
        span.record("team", team);
    }
    // A span without a collector has no context to set; nothing is lost.
    let _ = span.set_parent(super::extract_trace_context(request.headers()));
    let call = Call {
        service,
        method,
        started: Instant::now(),
        span: span.clone(),
        code: None,
    };

    let response = request_id::scope(id.clone(), next.run(request))
        .instrument(span)
        .await;
    let (mut parts, body) = response.into_parts();
    if let Ok(id) = HeaderValue::from_str(&id) {
        parts.headers.insert(request_id::HEADER, id);
    }
    let mut call = call;
    // A refusal has its status in the headers and no body.
    call.code = code_in(&parts.headers);
    if call.code.is_none() && !parts.status.is_success() {
        call.code = Some(Code::Unknown);
    }
    Response::from_parts(parts, Body::new(Observed { body, call }))
}

fn code_in(headers: &HeaderMap) -> Option<Code> {
    headers
        .get("grpc-status")
        .map(|value| Code::from_bytes(value.as_bytes()))
}

/// A call until its end; recorded when dropped, so that a client that vanished counts as `Cancelled`.
struct Call {
    service: &'static str,
    method: &'static str,
    started: Instant,
    span: Span,
    code: Option<Code>,
}

impl Drop for Call {
    fn drop(&mut self) {
        let code = self.code.unwrap_or(Code::Cancelled);
        let seconds = self.started.elapsed().as_secs_f64();
        let name = format!("{code:?}");
        metrics::counter!("sandmesh_grpc_requests_total", "service" => self.service, "method" => self.method, "code" => name.clone())
            .increment(1);
        metrics::histogram!("sandmesh_grpc_request_seconds", "service" => self.service, "method" => self.method)
            .record(seconds);
        self.span.record("code", name.as_str());
        let milliseconds = seconds * 1000.0;
        let _entered = self.span.enter();
        match code {
            Code::Internal | Code::Unknown | Code::DataLoss => {
                tracing::error!(
                    method = self.method,
                    code = name,
                    milliseconds,
                    "call failed"
                );
            }
            _ if is_poll(self.method) => {
                tracing::debug!(method = self.method, code = name, milliseconds, "call");
            }
            _ => tracing::info!(method = self.method, code = name, milliseconds, "call"),
        }
    }
}

pin_project! {
    struct Observed {
        #[pin]
        body: Body,
        call: Call,
    }
}

impl http_body::Body for Observed {
    type Data = bytes::Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let this = self.project();
        let frame = this.body.poll_frame(cx);
        if let Poll::Ready(Some(Ok(frame))) = &frame
            && let Some(code) = frame.trailers_ref().and_then(code_in)
        {
            this.call.code = Some(code);
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}
