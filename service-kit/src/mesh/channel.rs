//! The client side of calls between services.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use http::{HeaderValue, Uri};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpStream, UnixStream};
use tonic::{
    body::Body,
    transport::{Channel, Endpoint},
};
use tower::Service;

use super::{MeshToken, TOKEN_HEADER};
use crate::{address::Address, request_id, telemetry};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(3);
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 8 << 20;

/// A gRPC channel to a service with one or more replicas.
///
/// Calls take turns over one connection per replica. A connection that breaks is made anew to the first replica, counted from
/// its own, that accepts: so a dead replica costs the calls in flight, not every second call after.
#[derive(Debug, Clone)]
pub struct MeshChannel {
    connections: Arc<[Channel]>,
    turn: Arc<AtomicUsize>,
    token: HeaderValue,
}

/// Connects at the first call, not now. `replicas` must not be empty.
pub fn connect(replicas: &[Address], token: &MeshToken) -> MeshChannel {
    let connections = (0..replicas.len()).map(|first| {
        let mut order = replicas.to_vec();
        order.rotate_left(first);
        failover(order.into())
    });
    let mut token = HeaderValue::from_str(token.header()).unwrap_or(HeaderValue::from_static(""));
    token.set_sensitive(true);
    MeshChannel {
        connections: connections.collect(),
        turn: Arc::default(),
        token,
    }
}

fn failover(order: Arc<[Address]>) -> Channel {
    Endpoint::from_static("http://sandmesh.internal")
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
            first_that_accepts(Arc::clone(&order))
        }))
}

/// A connected socket of either family.
trait Socket: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin {}
impl<S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin> Socket for S {}

async fn first_that_accepts(order: Arc<[Address]>) -> io::Result<TokioIo<Box<dyn Socket>>> {
    let mut last = io::Error::new(io::ErrorKind::NotConnected, "no address is configured");
    for address in order.iter() {
        match tokio::time::timeout(CONNECT_TIMEOUT, dial(address)).await {
            Ok(Ok(socket)) => return Ok(TokioIo::new(socket)),
            Ok(Err(error)) => last = error,
            Err(_) => last = io::ErrorKind::TimedOut.into(),
        }
    }
    Err(last)
}

async fn dial(address: &Address) -> io::Result<Box<dyn Socket>> {
    match address {
        Address::Tcp(address) => {
            let socket = TcpStream::connect(address).await?;
            socket.set_nodelay(true)?;
            Ok(Box::new(socket))
        }
        Address::Unix(path) => Ok(Box::new(UnixStream::connect(path).await?)),
    }
}

impl Service<http::Request<Body>> for MeshChannel {
    type Response = http::Response<Body>;
    type Error = tonic::transport::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        // Which connection is known only in `call`, which waits for that one.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        request
            .headers_mut()
            .insert(TOKEN_HEADER, self.token.clone());
        if let Some(id) = request_id::current().and_then(|id| HeaderValue::from_str(&id).ok()) {
            request
                .headers_mut()
                .entry(request_id::HEADER)
                .or_insert(id);
        }
        telemetry::inject_trace_context(request.headers_mut());
        let turn = self.turn.fetch_add(1, Ordering::Relaxed) % self.connections.len();
        let mut channel = self.connections[turn].clone();
        Box::pin(async move {
            std::future::poll_fn(|cx| channel.poll_ready(cx)).await?;
            channel.call(request).await
        })
    }
}
