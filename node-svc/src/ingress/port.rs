//! HTTP from anyone to a port of a guest.
//!
//! The node dials the guest's address; when nobody listens there, it asks envd for a connection to the guest's loopback, so that
//! a server bound to 127.0.0.1 is reached like any other. Requests go on as HTTP/1.1 with keep-alive, upgrades included; gRPC goes
//! on as HTTP/2 (prior knowledge), since it needs trailers both ways. Nothing is buffered: both bodies stream.

use std::{
    collections::HashMap,
    io,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use axum::body::Body;
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri, Version, header};
use hyper::ext::Protocol;
use hyper_util::{
    client::legacy::{
        Client,
        connect::{Connected, Connection},
    },
    rt::{TokioExecutor, TokioIo},
};
use proto::session::v1::PortReadiness;
use service_kit::{
    config::parse_duration,
    errors::{Failure, Reason},
    ids::SessionId,
    readiness::LONGEST_WAIT,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_util::{sync::WaitForCancellationFutureOwned, task::TaskTracker};
use tonic::Code;

use super::{
    answer::Refusal,
    target::{PORT_HEADER, SESSION_HEADER, WAIT_HEADER},
    token::{self, PortCheck},
};
use crate::{
    hosted::{Hosted, Lookup, Phase, Reach, Session},
    ready,
};

mod tunnel;

#[cfg(test)]
pub(super) use tunnel::open as open_tunnel;

const DIAL_TIMEOUT: Duration = Duration::from_secs(1);
const POOL_IDLE: Duration = Duration::from_secs(30);
const POOL_PER_PORT: usize = 64;
/// Remembered ways to ports; forgotten all at once when there are more.
const WAYS: usize = 10_000;
/// How long a port is taken for one of the loopback only; a server may have begun to listen between two looks.
const WAY_KNOWN: Duration = Duration::from_secs(10);

/// Carries requests to ports.
#[derive(Debug)]
pub(super) struct Ports {
    http1: Client<Dialer, Body>,
    http2: Client<Dialer, Body>,
    tasks: TaskTracker,
}

impl Ports {
    pub(super) fn new(hosted: Arc<Hosted>, tasks: TaskTracker) -> Self {
        let dialer = Dialer {
            hosted,
            loopback: Arc::default(),
        };
        let mut builder = Client::builder(TokioExecutor::new());
        builder
            .pool_idle_timeout(POOL_IDLE)
            .pool_max_idle_per_host(POOL_PER_PORT)
            .set_host(false);
        let http1 = builder
            .http1_preserve_header_case(true)
            .build(dialer.clone());
        let http2 = builder.http2_only(true).build(dialer);
        Self {
            http1,
            http2,
            tasks,
        }
    }

    pub(super) async fn carry(
        &self,
        session: &Session,
        reach: &Reach,
        port: u16,
        mut request: Request<Body>,
    ) -> Result<Response<Body>, Refusal> {
        if session.port_access() == proto::session::v1::PortAccess::Token {
            match token::check_port(session, &request)? {
                PortCheck::Pass => {}
                PortCheck::SetCookie(response) => return Ok(response),
            }
        }
        if let Some(patience) = request.headers_mut().remove(WAIT_HEADER) {
            await_server(reach, port, &patience).await?;
        }
        token::strip(request.headers_mut());
        request.headers_mut().remove(SESSION_HEADER);
        request.headers_mut().remove(PORT_HEADER);
        let grpc = request
            .headers()
            .get(header::CONTENT_TYPE)
            .is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"));
        let upgrade = take_upgrade(&mut request);
        if request.version() == Version::HTTP_2 && request.headers().get(header::HOST).is_none() {
            // HTTP/1.1 has the name in a header.
            let host = request
                .uri()
                .authority()
                .and_then(|name| HeaderValue::from_str(name.as_str()).ok());
            if let Some(host) = host.filter(|_| !grpc) {
                request.headers_mut().insert(header::HOST, host);
            }
        }
        let path = request.uri().path_and_query().cloned();
        let uri = Uri::builder()
            .scheme("http")
            .authority(format!("{}:{port}", session.id));
        *request.uri_mut() = uri
            .path_and_query(path.map_or_else(|| "/".to_owned(), |path| path.to_string()))
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
        let client = if grpc && upgrade.is_none() {
            request.headers_mut().remove(header::HOST);
            *request.version_mut() = Version::HTTP_2;
            &self.http2
        } else {
            *request.version_mut() = Version::HTTP_11;
            &self.http1
        };
        let answer = tokio::select! {
            answer = client.request(request) => answer.map_err(|error| refused(&error, port))?,
            () = reach.over.cancelled() => {
                return Err(Refusal::new(Failure::new(Code::NotFound, Reason::SESSION_STOPPED, "the session was stopped"), 404));
            }
        };
        let answer = answer.map(Body::new);
        Ok(match upgrade {
            Some(upgrade) if answer.status() == StatusCode::SWITCHING_PROTOCOLS => {
                self.join(upgrade, answer, reach)
            }
            _ => answer,
        })
    }

    /// Joins both sides of an upgraded connection until one ends, or the session does.
    fn join(&self, upgrade: Upgrade, mut answer: Response<Body>, reach: &Reach) -> Response<Body> {
        let guest = hyper::upgrade::on(&mut answer);
        let over = reach.over.clone();
        self.tasks.spawn(async move {
            let both = async {
                let (client, guest) = futures::future::try_join(upgrade.client, guest)
                    .await
                    .map_err(io::Error::other)?;
                tokio::io::copy_bidirectional(&mut TokioIo::new(client), &mut TokioIo::new(guest))
                    .await
            };
            tokio::select! {
                ended = both => if let Err(error) = ended {
                    tracing::debug!(%error, "an upgraded connection ended");
                },
                () = over.cancelled() => {}
            }
        });
        if upgrade.extended_connect {
            // RFC 8441: over HTTP/2 an accepted upgrade is a 200, and the words of HTTP/1.1's handshake stay behind.
            *answer.status_mut() = StatusCode::OK;
            for name in [
                header::CONNECTION,
                header::UPGRADE,
                header::SEC_WEBSOCKET_ACCEPT,
            ] {
                answer.headers_mut().remove(name);
            }
        }
        answer
    }
}

/// Waits, as long as the client said, until somebody listens.
async fn await_server(reach: &Reach, port: u16, patience: &HeaderValue) -> Result<(), Refusal> {
    let timeout = patience
        .to_str()
        .ok()
        .and_then(|text| parse_duration(text).ok())
        .filter(|time| !time.is_zero() && *time <= LONGEST_WAIT)
        .and_then(|time| prost_types::Duration::try_from(time).ok())
        .ok_or_else(|| {
            let rule = "must be a time such as 500ms or 30s, at most 10m";
            Refusal::new(Failure::field_invalid(WAIT_HEADER, rule), 400)
        })?;
    let ready = PortReadiness {
        port: port.into(),
        http_path: String::new(),
        timeout: Some(timeout),
    };
    match ready::wait_for_port(reach, &ready).await {
        Ok(()) => Ok(()),
        Err(failure) if *failure.reason() == Reason::PORT_CLOSED => {
            Err(DialError::Closed.refusal(port))
        }
        Err(failure) => Err(Refusal::new(failure, 503)),
    }
}

/// A client that wants to leave HTTP.
struct Upgrade {
    client: hyper::upgrade::OnUpgrade,
    extended_connect: bool,
}

/// Takes the client's side of an upgrade; an extended CONNECT becomes HTTP/1.1's handshake, which every server knows.
fn take_upgrade(request: &mut Request<Body>) -> Option<Upgrade> {
    if request.method() == Method::CONNECT {
        let protocol = request.extensions().get::<Protocol>()?.as_str().to_owned();
        let client = hyper::upgrade::on(&mut *request);
        *request.method_mut() = Method::GET;
        *request.body_mut() = Body::empty();
        let headers = request.headers_mut();
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(header::UPGRADE, HeaderValue::from_str(&protocol).ok()?);
        if protocol.eq_ignore_ascii_case("websocket")
            && !headers.contains_key(header::SEC_WEBSOCKET_KEY)
        {
            // 16 random bytes (RFC 6455, 4.1), in base64.
            let key = data_encoding::BASE64.encode(&rand::random::<[u8; 16]>());
            headers.insert(header::SEC_WEBSOCKET_KEY, HeaderValue::from_str(&key).ok()?);
        }
        return Some(Upgrade {
            client,
            extended_connect: true,
        });
    }
    request
        .headers()
        .contains_key(header::UPGRADE)
        .then(|| Upgrade {
            client: hyper::upgrade::on(request),
            extended_connect: false,
        })
}

fn refused(error: &hyper_util::client::legacy::Error, port: u16) -> Refusal {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(current) = cause {
        if let Some(closed) = current.downcast_ref::<DialError>() {
            return closed.refusal(port);
        }
        cause = current.source();
    }
    tracing::debug!(%error, "a guest's server broke off");
    let failure = Failure::unavailable(
        Reason::new("PORT_BROKE_OFF"),
        format!("the server on port {port} broke the connection off"),
    );
    Refusal::new(failure, 502)
}

/// A connection to a guest's port cannot be had.
#[derive(Debug, Clone, Copy, thiserror::Error)]
enum DialError {
    #[error("nobody listens")]
    Closed,
    #[error("the session is over")]
    Over,
    #[error("the guest does not answer")]
    Silent,
}

impl DialError {
    fn refusal(self, port: u16) -> Refusal {
        match self {
            Self::Closed => {
                let message = format!("nobody listens on port {port} of this session");
                Refusal::new(
                    Failure::unavailable(Reason::PORT_CLOSED, message).with("port", port),
                    502,
                )
            }
            Self::Over => Refusal::new(
                Failure::new(
                    Code::NotFound,
                    Reason::SESSION_STOPPED,
                    "the session was stopped",
                ),
                404,
            ),
            Self::Silent => Refusal::new(
                Failure::unavailable(Reason::SERVICE_UNAVAILABLE, "the guest does not answer"),
                504,
            ),
        }
    }
}

/// When ports were last found on the loopback.
type Ways = HashMap<(SessionId, u16), Instant>;

/// Connects to `<session id>:<port>`.
#[derive(Debug, Clone)]
struct Dialer {
    hosted: Arc<Hosted>,
    /// Ports found on the guest's loopback only, so that the next dial goes there at once.
    loopback: Arc<Mutex<Ways>>,
}

impl Dialer {
    async fn dial(self, uri: Uri) -> Result<GuestStream, DialError> {
        let id = uri
            .host()
            .and_then(|host| SessionId::parse(host).ok())
            .ok_or(DialError::Over)?;
        let port = uri.port_u16().ok_or(DialError::Closed)?;
        let Lookup::Here(session) = self.hosted.lookup(&id) else {
            return Err(DialError::Over);
        };
        let phase = session.phase().borrow().clone();
        let Phase::Running(reach) = phase else {
            return Err(DialError::Over);
        };
        let key = (id, port);
        let known_loopback = self
            .ways()
            .get(&key)
            .is_some_and(|found| found.elapsed() < WAY_KNOWN);
        if let (Some(address), false) = (reach.address, known_loopback) {
            match tokio::time::timeout(DIAL_TIMEOUT, TcpStream::connect((address, port))).await {
                Ok(Ok(stream)) => {
                    // A stream without it is only slower.
                    let _ = stream.set_nodelay(true);
                    return Ok(GuestStream::new(stream, &reach));
                }
                // Refused, unreachable or silent there: the loopback may still have it.
                Ok(Err(error)) => tracing::debug!(%error, port, "not on the guest's address"),
                Err(_) => tracing::debug!(port, "no answer from the guest's address"),
            }
        }
        match tunnel::open(&reach.guest, port).await {
            Ok(stream) => {
                let mut ways = self.ways();
                if ways.len() >= WAYS {
                    ways.clear();
                }
                ways.insert(key, Instant::now());
                Ok(GuestStream::new(stream, &reach))
            }
            Err(status) => {
                self.ways().remove(&key);
                let closed = service_kit::errors::reason_of(&status)
                    .is_some_and(|reason| reason == Reason::PORT_CLOSED.as_str());
                if closed {
                    Err(DialError::Closed)
                } else {
                    tracing::warn!(%status, port, "envd did not open a port");
                    Err(DialError::Silent)
                }
            }
        }
    }

    fn ways(&self) -> std::sync::MutexGuard<'_, Ways> {
        self.loopback.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl tower::Service<Uri> for Dialer {
    type Response = TokioIo<GuestStream>;
    type Error = DialError;
    type Future = Pin<Box<dyn Future<Output = Result<TokioIo<GuestStream>, DialError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), DialError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let dialer = self.clone();
        Box::pin(async move { dialer.dial(uri).await.map(TokioIo::new) })
    }
}

trait Bytes: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Bytes for S {}

/// A connection to a guest's port, by either way. It ends with the way to the guest: after a pause another guest may have the address.
struct GuestStream {
    bytes: Box<dyn Bytes>,
    over: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl GuestStream {
    fn new(bytes: impl Bytes + 'static, reach: &Reach) -> Self {
        Self {
            bytes: Box::new(bytes),
            over: Box::pin(reach.over.clone().cancelled_owned()),
        }
    }

    fn ended(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.over.as_mut().poll(cx) {
            Poll::Ready(()) => Err(io::ErrorKind::ConnectionAborted.into()),
            Poll::Pending => Ok(()),
        }
    }
}

impl Connection for GuestStream {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

impl AsyncRead for GuestStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut tokio::io::ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.ended(cx)?;
        Pin::new(&mut self.bytes).poll_read(cx, buffer)
    }
}

impl AsyncWrite for GuestStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.ended(cx)?;
        Pin::new(&mut self.bytes).poll_write(cx, bytes)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.bytes).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.bytes).poll_shutdown(cx)
    }
}
