//! Logs, traces and metrics of a process, and the admin listener that shows health and metrics.
//!
//! Logs are `tracing` events on stderr, JSON or for people. Traces go to an OTLP collector when one is set; context travels as
//! W3C `traceparent`. Metrics are Prometheus text on `/metrics`.

use std::{
    collections::HashMap,
    io,
    sync::{LazyLock, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use axum::{Router, routing::get};
use http::{HeaderMap, HeaderName, HeaderValue};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use opentelemetry::{
    Context, global,
    propagation::{Extractor, Injector},
    trace::TracerProvider as _,
};
use opentelemetry_otlp::WithExportConfig as _;
use opentelemetry_sdk::{
    Resource,
    propagation::TraceContextPropagator,
    trace::{SdkTracer, SdkTracerProvider},
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_subscriber::{
    EnvFilter, Layer as _, layer::SubscriberExt as _, util::SubscriberInitExt as _,
};

mod grpc;
pub use grpc::{method_label, observe_grpc};

const METRICS_UPKEEP: Duration = Duration::from_secs(5);
const SECONDS_BUCKETS: [f64; 14] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0,
];

/// How logs are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// One JSON object a line.
    Json,
    /// For people.
    Pretty,
}

/// Settings of logs, traces and metrics, the same for every process.
#[derive(Debug, Clone, clap::Args)]
pub struct TelemetryConfig {
    /// How logs are written to stderr.
    #[arg(
        long,
        env = "SANDMESH_LOG_FORMAT",
        value_enum,
        default_value = "pretty"
    )]
    pub log_format: LogFormat,
    /// Which logs: levels per module, such as `info,session_svc=debug`.
    #[arg(long, env = "SANDMESH_LOG", default_value = "info")]
    pub log: String,
    /// OTLP collector (gRPC) for traces, such as `http://127.0.0.1:4317`; none: no traces.
    #[arg(long, env = "SANDMESH_OTLP_ENDPOINT")]
    pub otlp_endpoint: Option<String>,
    /// Address (host:port) for /healthz and /metrics; none: not served.
    #[arg(long, env = "SANDMESH_ADMIN_ADDRESS")]
    pub admin_address: Option<String>,
}

/// Telemetry cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The log filter is wrong.
    #[error("--log: {0}")]
    Filter(#[from] tracing_subscriber::filter::ParseError),
    /// The collector's address is wrong.
    #[error("--otlp-endpoint: {0}")]
    Otlp(#[from] opentelemetry_otlp::ExporterBuildError),
    /// A second set-up in one process.
    #[error("telemetry is set up already: {0}")]
    Twice(#[from] tracing_subscriber::util::TryInitError),
    /// Metrics cannot be recorded.
    #[error("metrics: {0}")]
    Metrics(#[from] metrics_exporter_prometheus::BuildError),
    /// The admin listener cannot be bound.
    #[error("--admin-address {address}: {source}")]
    Admin {
        /// Which address.
        address: String,
        /// Why.
        source: io::Error,
    },
}

/// The collector of this process, once telemetry is set up with one.
static COLLECTOR: OnceLock<String> = OnceLock::new();
/// Providers of [`tracer_of`], by the service they speak for.
static OTHERS: LazyLock<Mutex<HashMap<&'static str, SdkTracerProvider>>> =
    LazyLock::new(Mutex::default);

/// Keeps telemetry going; [`TelemetryGuard::shutdown`] sends what is buffered.
#[derive(Debug)]
pub struct TelemetryGuard {
    provider: Option<SdkTracerProvider>,
    /// Renders the metrics of this process.
    pub metrics: PrometheusHandle,
}

/// Sets up logs, traces and metrics for this process. Once, inside a tokio runtime.
pub fn init(
    service: &'static str,
    config: &TelemetryConfig,
) -> Result<TelemetryGuard, TelemetryError> {
    global::set_text_map_propagator(TraceContextPropagator::new());
    let provider = config
        .otlp_endpoint
        .as_deref()
        .map(|endpoint| tracer_provider(service, endpoint))
        .transpose()?;
    if let Some(endpoint) = &config.otlp_endpoint {
        // Set once: a second set-up is refused below.
        let _ = COLLECTOR.set(endpoint.clone());
    }
    let traces = provider.as_ref().map(|provider| {
        let only_ours =
            EnvFilter::new("info,h2=off,hyper=off,tonic=off,tower=off,opentelemetry=off");
        tracing_opentelemetry::layer()
            .with_tracer(provider.tracer(service))
            .with_filter(only_ours)
    });
    let filter = EnvFilter::try_new(&config.log)?;
    let lines = tracing_subscriber::fmt::layer().with_writer(io::stderr);
    let lines = match config.log_format {
        LogFormat::Json => lines.json().flatten_event(true).with_filter(filter).boxed(),
        LogFormat::Pretty => lines.with_filter(filter).boxed(),
    };
    tracing_subscriber::registry()
        .with(traces)
        .with(lines)
        .try_init()?;
    let metrics = PrometheusBuilder::new()
        .set_buckets(&SECONDS_BUCKETS)?
        .install_recorder()?;
    Ok(TelemetryGuard { provider, metrics })
}

fn tracer_provider(
    service: &'static str,
    endpoint: &str,
) -> Result<SdkTracerProvider, TelemetryError> {
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_tonic()
        .with_endpoint(endpoint)
        .build()?;
    Ok(SdkTracerProvider::builder()
        .with_batch_exporter(exporter)
        .with_resource(Resource::builder().with_service_name(service).build())
        .build())
}

/// A tracer that speaks for a service which cannot reach the collector itself; `None` where nothing is traced. Call it within the
/// runtime.
pub fn tracer_of(service: &'static str) -> Option<SdkTracer> {
    let endpoint = COLLECTOR.get()?;
    let mut others = OTHERS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(provider) = others.get(service) {
        return Some(provider.tracer(service));
    }
    match tracer_provider(service, endpoint) {
        Ok(provider) => {
            let tracer = provider.tracer(service);
            others.insert(service, provider);
            Some(tracer)
        }
        Err(error) => {
            tracing::warn!(%error, service, "its spans cannot be passed on");
            None
        }
    }
}

impl TelemetryGuard {
    /// Sends what is buffered. Blocks for a bounded time (the exporter's own timeout).
    pub fn shutdown(self) {
        let mut others = OTHERS.lock().unwrap_or_else(PoisonError::into_inner);
        for provider in self
            .provider
            .into_iter()
            .chain(others.drain().map(|(_, other)| other))
        {
            if let Err(error) = provider.shutdown() {
                tracing::warn!(%error, "the last traces were not sent");
            }
        }
    }
}

/// Binds the admin listener, if one is configured, and serves `/healthz`, `/metrics` and the routes given until `shutdown`.
pub async fn serve_admin(
    config: &TelemetryConfig,
    metrics: PrometheusHandle,
    more: Router,
    shutdown: CancellationToken,
) -> Result<(), TelemetryError> {
    let Some(address) = &config.admin_address else {
        return Ok(());
    };
    let failed = |source| TelemetryError::Admin {
        address: address.clone(),
        source,
    };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    serve_admin_on(listener, metrics, more, shutdown)
        .await
        .map_err(failed)
}

/// As [`serve_admin`], on a listener that is bound already.
pub async fn serve_admin_on(
    listener: TcpListener,
    metrics: PrometheusHandle,
    more: Router,
    shutdown: CancellationToken,
) -> io::Result<()> {
    let upkeep = metrics.clone();
    let router = more.route("/healthz", get(async || "ok\n")).route(
        "/metrics",
        get(move || std::future::ready(metrics.render())),
    );
    let mut ticks = tokio::time::interval(METRICS_UPKEEP);
    let serving = axum::serve(listener, router).with_graceful_shutdown(shutdown.cancelled_owned());
    let serving = serving.into_future();
    tokio::pin!(serving);
    loop {
        tokio::select! {
            result = &mut serving => return result,
            _ = ticks.tick() => upkeep.run_upkeep(),
        }
    }
}

struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }
    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(HeaderName::as_str).collect()
    }
}

struct HeadersMut<'a>(&'a mut HeaderMap);

impl Injector for HeadersMut<'_> {
    fn set(&mut self, key: &str, value: String) {
        if let (Ok(name), Ok(value)) = (HeaderName::try_from(key), HeaderValue::try_from(value)) {
            self.0.insert(name, value);
        }
    }
}

/// The trace a request belongs to, from its `traceparent`.
pub fn extract_trace_context(headers: &HeaderMap) -> Context {
    global::get_text_map_propagator(|propagator| propagator.extract(&Headers(headers)))
}

/// Passes the current span's trace on in `traceparent`, if there is one.
pub fn inject_trace_context(headers: &mut HeaderMap) {
    let context = tracing::Span::current().context();
    global::get_text_map_propagator(|propagator| {
        propagator.inject_context(&context, &mut HeadersMut(headers));
    });
}
