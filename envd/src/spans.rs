//! Trace spans of the calls envd answers. A guest has no way to a collector, so the node takes them over the link
//! (`SystemService.StreamSpans`) and passes them on.
//!
//! Only calls whose `traceparent` says that they are sampled leave a span. The newest are kept until the node takes them, so that
//! even the call that made this guest a session's is seen.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::{Instant, SystemTime},
};

use http::{HeaderMap, Request, Response};
use http_body::Frame;
use pin_project_lite::pin_project;
use proto::envd::v1::StreamSpansResponse;
use tokio::sync::Notify;
use tonic::{Code, Status, body::Body};
use tower::{Layer, Service};

const KEPT: usize = 256;

/// Finished spans that nobody has taken. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Spans(Arc<Finished>);

#[derive(Debug, Default)]
struct Finished {
    spans: Mutex<VecDeque<StreamSpansResponse>>,
    more: Notify,
}

impl Spans {
    fn queue(&self) -> MutexGuard<'_, VecDeque<StreamSpansResponse>> {
        self.0.spans.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, span: StreamSpansResponse) {
        {
            let mut queue = self.queue();
            if queue.len() >= KEPT {
                queue.pop_front();
            }
            queue.push_back(span);
        }
        self.0.more.notify_one();
    }

    /// The next one, when there is one. Cancel-safe.
    pub(crate) async fn take(&self) -> StreamSpansResponse {
        loop {
            let more = self.0.more.notified();
            if let Some(span) = self.queue().pop_front() {
                return span;
            }
            more.await;
        }
    }

    fn open(&self, request: &Request<Body>) -> Option<Open> {
        let (trace_id, parent_span_id) = sampled_parent(request.headers())?;
        Some(Open {
            spans: self.clone(),
            trace_id,
            parent_span_id,
            name: name_of(request.uri().path()).to_owned(),
            started: Instant::now(),
            code: None,
        })
    }
}

/// Trace and span of the caller, from `traceparent` (W3C Trace Context, 3.2), if it wants this call traced.
fn sampled_parent(headers: &HeaderMap) -> Option<(u128, u64)> {
    let text = headers.get("traceparent")?.to_str().ok()?;
    let mut fields = text.split('-');
    let (version, trace, span, flags) = (
        fields.next()?,
        fields.next()?,
        fields.next()?,
        fields.next()?,
    );
    if version.len() != 2 || trace.len() != 32 || span.len() != 16 || flags.len() != 2 {
        return None;
    }
    let trace = u128::from_str_radix(trace, 16).ok().filter(|id| *id != 0)?;
    let span = u64::from_str_radix(span, 16).ok().filter(|id| *id != 0)?;
    let sampled = u8::from_str_radix(flags, 16).ok()? & 1 == 1;
    sampled.then_some((trace, span))
}

/// A call until its end; sent when dropped, so that a caller that vanished leaves its span too.
struct Open {
    spans: Spans,
    trace_id: u128,
    parent_span_id: u64,
    name: String,
    started: Instant,
    code: Option<Code>,
}

impl Drop for Open {
    fn drop(&mut self) {
        // The clock may have been set meanwhile: only how long it took is sure.
        let end = SystemTime::now();
        let start = end - self.started.elapsed();
        let span = StreamSpansResponse {
            trace_id: self.trace_id.to_be_bytes().to_vec(),
            parent_span_id: self.parent_span_id.to_be_bytes().to_vec(),
            name: std::mem::take(&mut self.name),
            start_time: Some(start.into()),
            end_time: Some(end.into()),
            status_code: self.code.unwrap_or(Code::Cancelled) as u32,
        };
        self.spans.put(span);
    }
}

/// Puts [`Traced`] around a server.
#[derive(Debug, Clone)]
pub(crate) struct Trace(pub(crate) Spans);

impl<S> Layer<S> for Trace {
    type Service = Traced<S>;

    fn layer(&self, inner: S) -> Traced<S> {
        Traced {
            inner,
            spans: self.0.clone(),
        }
    }
}

/// Leaves a span of every sampled call.
#[derive(Debug, Clone)]
pub(crate) struct Traced<S> {
    inner: S,
    spans: Spans,
}

impl<S> Service<Request<Body>> for Traced<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let open = self.spans.open(&request);
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await?;
            Ok(match open {
                None => answer,
                Some(mut open) => {
                    // A refusal has its status in the headers and no body.
                    open.code = code_in(answer.headers());
                    answer.map(|body| Body::new(Observed { body, open }))
                }
            })
        })
    }
}

/// What a call is named by. Paths of files are not for traces.
fn name_of(path: &str) -> &str {
    let path = path.trim_start_matches('/');
    match path.split_once('/') {
        Some(("files", _)) => "files",
        _ => path,
    }
}

fn code_in(headers: &HeaderMap) -> Option<Code> {
    headers
        .get("grpc-status")
        .map(|value| Code::from_bytes(value.as_bytes()))
}

pin_project! {
    struct Observed {
        #[pin]
        body: Body,
        open: Open,
    }
}

impl http_body::Body for Observed {
    type Data = bytes::Bytes;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<bytes::Bytes>, Status>>> {
        let this = self.project();
        let frame = this.body.poll_frame(cx);
        if let Poll::Ready(Some(Ok(frame))) = &frame
            && let Some(code) = frame.trailers_ref().and_then(code_in)
        {
            this.open.code = Some(code);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sampled_and_well_formed_parents_count() {
        let parent = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("traceparent", text.parse().unwrap());
            sampled_parent(&headers)
        };
        let trace = "0af7651916cd43dd8448eb211c80319c";
        let span = "b7ad6b7169203331";
        assert_eq!(
            parent(&format!("00-{trace}-{span}-01")),
            Some((
                0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c,
                0xb7ad_6b71_6920_3331
            ))
        );
        for text in [
            "",
            "00",
            &format!("00-{trace}-{span}-00"),
            &format!("00-{}-{span}-01", "0".repeat(32)),
            &format!("00-{trace}-{}-01", "0".repeat(16)),
            &format!("00-{span}-{trace}-01"),
            &format!("00-{trace}-{span}"),
            &format!("00-{trace}-zzzzzzzzzzzzzzzz-01"),
        ] {
            assert_eq!(parent(text), None, "{text}");
        }
    }

    #[tokio::test]
    async fn a_span_is_kept_when_its_call_ends_however_it_ends() {
        let spans = Spans::default();
        let request = Request::builder()
            .uri("/sandmesh.envd.v1.ProcessService/Start")
            .header(
                "traceparent",
                "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            )
            .body(Body::empty())
            .unwrap();
        drop(spans.open(&request));
        let span = spans.take().await;
        assert_eq!(span.name, "sandmesh.envd.v1.ProcessService/Start");
        assert_eq!(span.trace_id[..2], [0x0a, 0xf7]);
        assert_eq!(span.status_code, Code::Cancelled as u32);
        for _ in 0..2 * KEPT {
            drop(spans.open(&request));
        }
        assert_eq!(spans.queue().len(), KEPT);
    }
}
