//! Serving gRPC: bind first, so that port 0 works and addresses are known; then serve until told to stop, and drain.

use std::{io, os::unix::fs::FileTypeExt as _, time::Duration};

use axum::{Router, middleware};
use prost::Message as _;
use prost_types::FileDescriptorSet;
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::{
    service::Routes,
    transport::server::{Server, TcpIncoming},
};

use crate::{
    address::Address,
    mesh::{self, MeshToken},
    telemetry,
};

/// How long calls in flight have to end after shutdown was asked for.
pub const DRAIN_DEADLINE: Duration = Duration::from_secs(10);
const MAX_STREAMS: u32 = 100_000;
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 8 << 20;
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
const MAX_HEADER_LIST: u32 = 64 << 10;

/// A listener that nobody serves yet.
#[derive(Debug)]
pub struct Bound {
    listener: Listener,
    address: Address,
}

#[derive(Debug)]
enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// Binding or serving failed.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address cannot be bound.
    #[error("cannot listen on {address}: {source}")]
    Bind {
        /// Which.
        address: Address,
        /// Why.
        source: io::Error,
    },
    /// Serving ended by itself.
    #[error("serving on {address} failed: {source}")]
    Serve {
        /// Where.
        address: Address,
        /// Why.
        source: tonic::transport::Error,
    },
    /// The descriptors for reflection do not fit together: a build error.
    #[error("reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

impl Bound {
    /// Binds; a unix socket whose server is gone is replaced.
    pub async fn bind(address: &Address) -> Result<Self, ServeError> {
        let bind = async {
            Ok(match address {
                Address::Tcp(text) => {
                    let listener = TcpListener::bind(text).await?;
                    let address = Address::Tcp(listener.local_addr()?.to_string());
                    Self {
                        listener: Listener::Tcp(listener),
                        address,
                    }
                }
                Address::Unix(path) => {
                    let stale = path
                        .metadata()
                        .is_ok_and(|metadata| metadata.file_type().is_socket())
                        && UnixStream::connect(path).await.is_err();
                    if stale {
                        std::fs::remove_file(path)?;
                    }
                    Self {
                        listener: Listener::Unix(UnixListener::bind(path)?),
                        address: address.clone(),
                    }
                }
            })
        };
        bind.await.map_err(|source| ServeError::Bind {
            address: address.clone(),
            source,
        })
    }

    /// Where it listens, with the real port.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// The TCP listener, for servers that are not gRPC. `Err` gives a unix listener back.
    pub fn into_tcp(self) -> Result<TcpListener, Self> {
        match self.listener {
            Listener::Tcp(listener) => Ok(listener),
            Listener::Unix(_) => Err(self),
        }
    }
}

/// A gRPC server being put together.
#[derive(Debug)]
#[must_use]
pub struct Grpc {
    service: &'static str,
    token: Option<MeshToken>,
    reflected: Vec<&'static str>,
}

impl Grpc {
    /// `service` is its name in logs and metrics.
    pub fn new(service: &'static str) -> Self {
        Self {
            service,
            token: None,
            reflected: Vec::new(),
        }
    }

    /// Lets only holders of the mesh token in.
    pub fn mesh_only(mut self, token: MeshToken) -> Self {
        self.token = Some(token);
        self
    }

    /// Services that reflection shows, such as `sandmesh.session.v1.SessionService`.
    pub fn reflect(mut self, services: &[&'static str]) -> Self {
        self.reflected = services.to_vec();
        self
    }

    /// The routes with health, reflection, telemetry and the token check around them.
    pub async fn router(&self, routes: Routes) -> Result<Router, ServeError> {
        let (reporter, health) = tonic_health::server::health_reporter();
        reporter
            .set_service_status("", tonic_health::ServingStatus::Serving)
            .await;
        let reflection = || {
            tonic_reflection::server::Builder::configure()
                .register_file_descriptor_set(self.descriptors())
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        };
        let mut router = routes
            .add_service(health)
            .add_service(reflection().build_v1()?)
            // Tools of some years ago, packaged grpcurl among them, know only this one.
            .add_service(reflection().build_v1alpha()?)
            .prepare()
            .into_axum_router();
        if let Some(token) = &self.token {
            router = router.layer(middleware::from_fn_with_state(
                token.clone(),
                mesh::require_token,
            ));
        }
        Ok(router.layer(middleware::from_fn_with_state(
            self.service,
            telemetry::observe_grpc,
        )))
    }

    /// Serves until `shutdown`, then lets calls in flight end within [`DRAIN_DEADLINE`].
    pub async fn serve(
        self,
        bound: Bound,
        routes: Routes,
        shutdown: CancellationToken,
    ) -> Result<(), ServeError> {
        let router = self.router(routes).await?;
        serve_router(bound, router, shutdown).await
    }

    fn descriptors(&self) -> FileDescriptorSet {
        let all = FileDescriptorSet::decode(proto::DESCRIPTORS).unwrap_or_default();
        // Imports must stay resolvable, so types of other packages remain; only services are hidden.
        let file = all.file.into_iter().map(|mut file| {
            let package = file.package().to_owned();
            file.service.retain(|service| {
                let name = format!("{package}.{}", service.name());
                self.reflected.contains(&name.as_str())
            });
            file
        });
        FileDescriptorSet {
            file: file.collect(),
        }
    }
}

/// Serves a router over HTTP/2 and HTTP/1.1 until `shutdown`, then drains.
pub async fn serve_router(
    bound: Bound,
    router: Router,
    shutdown: CancellationToken,
) -> Result<(), ServeError> {
    let Bound { listener, address } = bound;
    let server = Server::builder()
        .accept_http1(true)
        .max_concurrent_streams(MAX_STREAMS)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .http2_max_header_list_size(MAX_HEADER_LIST)
        .add_routes(Routes::from(router));
    let stop = shutdown.clone().cancelled_owned();
    let serving = async {
        match listener {
            Listener::Tcp(listener) => {
                server
                    .serve_with_incoming_shutdown(
                        TcpIncoming::from(listener).with_nodelay(Some(true)),
                        stop,
                    )
                    .await
            }
            Listener::Unix(listener) => {
                server
                    .serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop)
                    .await
            }
        }
    };
    let drained = async {
        shutdown.cancelled().await;
        tokio::time::sleep(DRAIN_DEADLINE).await;
    };
    let result = tokio::select! {
        result = serving => result,
        () = drained => {
            tracing::warn!(%address, "calls in flight were cut at the drain deadline");
            Ok(())
        }
    };
    if let Address::Unix(path) = &address {
        // Gone already is as good.
        let _ = std::fs::remove_file(path);
    }
    result.map_err(|source| ServeError::Serve { address, source })
}
