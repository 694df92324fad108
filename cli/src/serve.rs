//! `sandmesh serve NAME`: one service, alone in its process.

use std::ffi::OsString;

use anyhow::bail;
use axum::Router;
use clap::Args;
use service_kit::{
    config,
    telemetry::{self, TelemetryConfig},
};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Names of services, as `serve` takes them.
pub(crate) const SERVICES: [&str; 5] = ["gateway", "session", "template", "node", "envoy"];

/// Runs a service until SIGTERM or SIGINT, then drains.
pub(crate) async fn run(service: &str, arguments: Vec<OsString>) -> anyhow::Result<()> {
    let argv =
        std::iter::once(OsString::from(format!("sandmesh serve {service}"))).chain(arguments);
    match service {
        "gateway" => alone::<api_gateway::Config>("api-gateway", argv).await,
        "session" => alone::<session_svc::Config>("session-svc", argv).await,
        "template" => alone::<template_svc::Config>("template-svc", argv).await,
        "node" => alone::<node_svc::Config>("node-svc", argv).await,
        "envoy" => alone::<envoy_control::Config>("envoy-control", argv).await,
        other => bail!("no service {other}: one of {}", SERVICES.join(", ")),
    }
}

/// Something that can be run from its settings.
pub(crate) trait Service: Args + Send + 'static {
    /// Builds and runs it until `shutdown`.
    fn run(self, shutdown: CancellationToken) -> impl Future<Output = anyhow::Result<()>> + Send;
}

macro_rules! service {
    ($krate:ident) => {
        impl Service for $krate::Config {
            async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
                Ok($krate::App::build(self, shutdown).await?.run().await?)
            }
        }
    };
}

service!(api_gateway);
service!(session_svc);
service!(template_svc);
service!(node_svc);
service!(envoy_control);

async fn alone<T: Service>(
    name: &'static str,
    argv: impl Iterator<Item = OsString>,
) -> anyhow::Result<()> {
    let (settings, telemetry_config) =
        config::load::<T>(name, argv).unwrap_or_else(|error| error.exit());
    let shutdown = CancellationToken::new();
    let guard = telemetry::init(name, &telemetry_config)?;
    tokio::spawn(on_signal(shutdown.clone()));
    let admin = admin(&telemetry_config, &guard, shutdown.clone());
    let outcome = settings.run(shutdown.clone()).await;
    shutdown.cancel();
    admin.await?;
    tokio::task::spawn_blocking(move || guard.shutdown()).await?;
    outcome
}

/// Serves health and metrics of this process, if an address for it is set.
pub(crate) fn admin(
    config: &TelemetryConfig,
    guard: &telemetry::TelemetryGuard,
    shutdown: CancellationToken,
) -> tokio::task::JoinHandle<()> {
    let (config, metrics) = (config.clone(), guard.metrics.clone());
    tokio::spawn(async move {
        if let Err(error) =
            telemetry::serve_admin(&config, metrics, Router::new(), shutdown.clone()).await
        {
            tracing::error!(%error, "no admin listener");
            shutdown.cancel();
        }
    })
}

/// Asks for shutdown at the first SIGTERM or SIGINT.
pub(crate) async fn on_signal(shutdown: CancellationToken) {
    let (Ok(mut terminate), Ok(mut interrupt)) = (
        signal(SignalKind::terminate()),
        signal(SignalKind::interrupt()),
    ) else {
        tracing::error!("signals cannot be heard");
        return;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        () = shutdown.cancelled() => {}
    }
    shutdown.cancel();
}
