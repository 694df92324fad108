//! Trace spans of envd, which has no way to a collector: taken over the link and passed on in envd's name.
//!
//! What a guest says is not believed further than it must be: names are those of methods that exist, times are in order and of
//! this day, and there are only so many spans a second. A span can only join a trace whose ID the guest was told.

use std::{
    convert::Infallible,
    time::{Duration, SystemTime},
};

use opentelemetry::{
    Context, KeyValue,
    trace::{
        Span as _, SpanBuilder, SpanContext, SpanId, SpanKind, TraceContextExt as _, TraceFlags,
        TraceId, TraceState, Tracer as _,
    },
};
use opentelemetry_sdk::trace::SdkTracer;
use proto::envd::v1::{StreamSpansRequest, StreamSpansResponse};
use service_kit::{ids::SessionId, telemetry};
use tokio::time::Instant;

use crate::guest::GuestClient;

/// Spans of one guest that are passed on within [`WINDOW`].
const AT_MOST: u32 = 200;
const WINDOW: Duration = Duration::from_secs(1);
const TRY_AGAIN: Duration = Duration::from_secs(5);
/// The longest call a span is believed for.
const LONGEST: Duration = Duration::from_hours(24);

/// Passes a guest's spans on for as long as it is polled; does nothing where nothing is traced.
pub(crate) async fn pass_on(guest: &GuestClient, session: &SessionId) -> Infallible {
    let Some(tracer) = telemetry::tracer_of("envd") else {
        return std::future::pending().await;
    };
    let mut budget = Budget::new(Instant::now());
    loop {
        if let Ok(answer) = guest.system().stream_spans(StreamSpansRequest {}).await {
            let mut spans = answer.into_inner();
            while let Ok(Some(span)) = spans.message().await {
                if !budget.take(Instant::now()) || !pass(&tracer, session, span) {
                    metrics::counter!("sandmesh_node_guest_spans_dropped_total").increment(1);
                }
            }
        }
        tokio::time::sleep(TRY_AGAIN).await;
    }
}

/// So many in a window of time, and no more.
struct Budget {
    since: Instant,
    left: u32,
}

impl Budget {
    fn new(now: Instant) -> Self {
        Self {
            since: now,
            left: AT_MOST,
        }
    }

    fn take(&mut self, now: Instant) -> bool {
        if now.duration_since(self.since) >= WINDOW {
            *self = Self::new(now);
        }
        let taken = self.left > 0;
        self.left = self.left.saturating_sub(1);
        taken
    }
}

/// `false` if the span makes no sense.
fn pass(tracer: &SdkTracer, session: &SessionId, span: StreamSpansResponse) -> bool {
    let Some((parent, builder, end)) = read(session, &span, SystemTime::now()) else {
        return false;
    };
    let parent = Context::new().with_remote_span_context(parent);
    tracer
        .build_with_context(builder, &parent)
        .end_with_timestamp(end);
    true
}

pub(crate) fn read(
    session: &SessionId,
    span: &StreamSpansResponse,
    now: SystemTime,
) -> Option<(SpanContext, SpanBuilder, SystemTime)> {
    let parent = SpanContext::new(
        TraceId::from_bytes(span.trace_id.as_slice().try_into().ok()?),
        SpanId::from_bytes(span.parent_span_id.as_slice().try_into().ok()?),
        TraceFlags::SAMPLED,
        true,
        TraceState::default(),
    );
    let name = telemetry::method_label(&format!("/{}", span.name));
    let start = SystemTime::try_from(span.start_time?).ok()?;
    let end = SystemTime::try_from(span.end_time?).ok()?;
    let near = |time: SystemTime| {
        let apart = now
            .duration_since(time)
            .unwrap_or_else(|ahead| ahead.duration());
        apart <= LONGEST
    };
    if !parent.is_valid() || end < start || !near(start) || !near(end) {
        return None;
    }
    let builder = SpanBuilder {
        name: name.into(),
        span_kind: Some(SpanKind::Server),
        start_time: Some(start),
        attributes: Some(vec![
            KeyValue::new("session_id", session.short().to_owned()),
            KeyValue::new("rpc.grpc.status_code", i64::from(span.status_code.min(16))),
        ]),
        ..SpanBuilder::default()
    };
    Some((parent, builder, end))
}

#[cfg(test)]
mod tests {
    use service_kit::ids::HomeTag;

    use super::*;

    fn span(name: &str, start: SystemTime, end: SystemTime) -> StreamSpansResponse {
        StreamSpansResponse {
            trace_id: vec![7; 16],
            parent_span_id: vec![8; 8],
            name: name.into(),
            start_time: Some(start.into()),
            end_time: Some(end.into()),
            status_code: 0,
        }
    }

    #[test]
    fn a_guest_is_believed_only_what_makes_sense() {
        let session = SessionId::random(&HomeTag::random());
        let now = SystemTime::now();
        let second = Duration::from_secs(1);
        let start = "sandmesh.envd.v1.ProcessService/Start";
        let read = |span: &StreamSpansResponse| {
            read(&session, span, now).map(|(_, builder, _)| builder.name.into_owned())
        };
        assert_eq!(
            read(&span(start, now - second, now)).as_deref(),
            Some(start)
        );
        let unheard_of = span(&"x".repeat(1 << 20), now - second, now);
        assert_eq!(read(&unheard_of).as_deref(), Some("other"));
        assert_eq!(read(&span(start, now, now - second)), None);
        assert_eq!(read(&span(start, now - LONGEST * 2, now)), None);
        assert_eq!(read(&span(start, now, now + LONGEST * 2)), None);
        for (trace_id, parent_span_id) in [
            (vec![], vec![8; 8]),
            (vec![0; 16], vec![8; 8]),
            (vec![7; 17], vec![8; 8]),
            (vec![7; 16], vec![0; 8]),
            (vec![7; 16], vec![8; 7]),
        ] {
            let wrong = StreamSpansResponse {
                trace_id,
                parent_span_id,
                ..span(start, now - second, now)
            };
            assert_eq!(read(&wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn a_guest_passes_so_many_spans_a_second_and_no_more() {
        let now = Instant::now();
        let mut budget = Budget::new(now);
        let taken = |budget: &mut Budget, now| (0..1000).filter(|_| budget.take(now)).count();
        assert_eq!(taken(&mut budget, now), AT_MOST as usize);
        assert_eq!(taken(&mut budget, now + WINDOW), AT_MOST as usize);
    }
}
