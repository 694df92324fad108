//! The node's door for streams and ports: whatever Envoy, or another node, sends for a session.
//!
//! [`target`] reads from a request which session and what of it is meant. [`Ingress::answer`] finds the session: here, or in the
//! catalog and then on another node, once. [`stream`] carries gRPC to envd, [`files`] plain HTTP for a file, [`port`] HTTP to a port of the
//! guest, and [`answer`] says no in the caller's own tongue.

use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use axum::body::Body;
use http::{HeaderName, Request, Response};
use hyper::body::Incoming;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use proto::session::v1::{PortAccess, SessionState};
use service_kit::{
    errors::{Failure, Reason},
    ids::NodeId,
    mesh::{KEY_HEADER, MeshToken, OPERATOR_HEADER, TEAM_HEADER, TOKEN_HEADER},
    request_id, telemetry,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::Code;
use tracing::Instrument as _;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

use crate::{
    catalog::{Catalog, Place},
    hosted::{Ended, Hosted, Lookup, Phase, Session},
};

pub mod answer;
mod files;
mod forward;
#[cfg(test)]
mod hostile;
mod port;
mod stream;
pub mod target;
mod token;
mod wake;

use answer::Asker;
use forward::Peers;
use port::Ports;
use target::{Target, What};
pub use wake::Waker;

/// Set on what one node sends to another; such a request is never sent on again.
pub const HOP_HEADER: HeaderName = HeaderName::from_static("x-sandmesh-hop");
/// The authority the client used, when a node sends a request on.
const AUTHORITY_HEADER: HeaderName = HeaderName::from_static("x-sandmesh-authority");

const MAX_CONNECTIONS: usize = 20_000;
const MAX_STREAMS: u32 = 100_000;
/// After an accept that failed.
const ACCEPT_AGAIN: Duration = Duration::from_millis(20);
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
const HEADER_LIST: u32 = 128 << 10;
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;
/// How long a request waits for a session that is starting.
const START_WAIT: Duration = Duration::from_secs(30);

/// Whom a listener trusts to set internal headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum From {
    /// Envoy, which passes on what strangers say.
    Edge,
    /// Another node, which has shown the mesh token.
    Peer,
}

/// Answers for the sessions of this node.
#[derive(Debug)]
pub struct Ingress {
    node: NodeId,
    hosted: Arc<Hosted>,
    catalog: Catalog,
    waker: Waker,
    ports: Ports,
    peers: Peers,
    domain: String,
}

impl Ingress {
    /// Puts the parts together.
    pub fn new(
        node: NodeId,
        hosted: Arc<Hosted>,
        catalog: Catalog,
        waker: Waker,
        token: &MeshToken,
        domain: &str,
        tasks: TaskTracker,
    ) -> Self {
        let ports = Ports::new(Arc::clone(&hosted), tasks.clone());
        let peers = Peers::new(token, tasks);
        Self {
            node,
            hosted,
            catalog,
            waker,
            ports,
            peers,
            domain: domain.to_ascii_lowercase(),
        }
    }

    /// Answers one request.
    pub async fn answer(self: Arc<Self>, mut request: Request<Body>, from: From) -> Response<Body> {
        let id = request_id::from_headers(request.headers());
        let asker = Asker::of(&request);
        let authority = authority(&request, from);
        clean(&mut request);
        if from == From::Peer
            && let Some(told) = authority.as_deref().and_then(|name| name.parse().ok())
        {
            // Not the other node's name for this one, but the name the client used.
            request.headers_mut().insert(http::header::HOST, told);
        }
        let target = target::read(&request, authority.as_deref(), &self.domain);
        let kind = match &target {
            Ok(Target {
                what: What::Stream, ..
            }) => "stream",
            Ok(Target {
                what: What::Files, ..
            }) => "files",
            Ok(Target {
                what: What::Port(_),
                ..
            }) => "port",
            Err(_) => "malformed",
        };
        let session = target
            .as_ref()
            .map(|target| target.session.short().to_owned())
            .unwrap_or_default();
        let span = tracing::info_span!("ingress", otel.name = %format!("ingress {kind}"), otel.kind = "server", request_id = %id, session_id = %session);
        // Without a collector there is no context to keep.
        let _ = span.set_parent(telemetry::extract_trace_context(request.headers()));
        let outcome = request_id::scope(id.clone(), self.carry(request, target, authority, from))
            .instrument(span)
            .await;
        let outcome_label = match &outcome {
            Ok(_) => "carried",
            Err(refusal) => refusal.label(),
        };
        metrics::counter!("sandmesh_node_ingress_requests_total", "kind" => kind, "outcome" => outcome_label).increment(1);
        match outcome {
            Ok(response) => response,
            Err(refusal) => {
                tracing::info!(
                    request_id = id,
                    session_id = session,
                    kind,
                    reason = refusal.label(),
                    "request refused"
                );
                refusal.into_response(asker, &id)
            }
        }
    }

    async fn carry(
        &self,
        request: Request<Body>,
        target: Result<Target, answer::Refusal>,
        authority: Option<String>,
        from: From,
    ) -> Result<Response<Body>, answer::Refusal> {
        let target = target?;
        match self.hosted.lookup(&target.session) {
            Lookup::Here(session) => self
                .carry_here(&session, request, &target)
                .await
                .map_err(|refusal| refusal.about(&target)),
            // A session that moved on lives elsewhere; one that ended here has ended.
            Lookup::Was(ended) => Err(ended_here(&target, &ended)),
            // The other node had it from the catalog that it is here.
            Lookup::Unknown if from == From::Peer => Err(lost(&target)),
            Lookup::Unknown => self.carry_elsewhere(request, &target, authority).await,
        }
    }

    async fn carry_here(
        &self,
        session: &Arc<Session>,
        request: Request<Body>,
        target: &Target,
    ) -> Result<Response<Body>, answer::Refusal> {
        let mut phase = session.settled(START_WAIT).await;
        if matches!(phase, Phase::Paused) && session.settings().wake_on_request {
            // Whoever may not call it may not wake it either.
            may_call(session, &request, target)?;
            phase = self
                .waker
                .wake(session)
                .await
                .map_err(|failure| refuse(target, failure, 503))?;
        }
        match phase {
            Phase::Running(reach) => match target.what {
                What::Stream => stream::carry(session, &reach, request).await,
                What::Files => files::carry(session, &reach, request).await,
                What::Port(port) => self.ports.carry(session, &reach, port, request).await,
            },
            Phase::Starting => Err(refuse(
                target,
                Failure::unavailable(Reason::SESSION_STARTING, "the session is still starting"),
                503,
            )),
            Phase::Paused => Err(refuse(target, paused_failure(), 409)),
            Phase::Adopting | Phase::Held | Phase::Pausing | Phase::Resuming => Err(refuse(
                target,
                Failure::unavailable(
                    Reason::SESSION_STARTING,
                    "the session is being stored or continued, and took too long",
                ),
                503,
            )),
            Phase::Stopping => Err(refuse(target, stopped_failure(), 404)),
            Phase::Ended(ended) => Err(ended_here(target, &ended)),
        }
    }

    async fn carry_elsewhere(
        &self,
        request: Request<Body>,
        target: &Target,
        authority: Option<String>,
    ) -> Result<Response<Body>, answer::Refusal> {
        let place = self.catalog.find(&target.session).await.map_err(|error| {
            tracing::warn!(%error, "the catalog cannot be asked");
            let failure = Failure::unavailable(
                Reason::CATALOG_UNAVAILABLE,
                "this session is not on this node, and where it is cannot be found out right now",
            );
            refuse(target, failure, 503)
        })?;
        let Place::On {
            node,
            internal_address,
            state,
        } = place
        else {
            return Err(unknown(target));
        };
        match SessionState::try_from(state).unwrap_or_default() {
            SessionState::Stopped | SessionState::Stopping => {
                Err(refuse(target, stopped_failure(), 404))
            }
            SessionState::Failed => Err(refuse(
                target,
                Failure::new(
                    Code::NotFound,
                    Reason::SESSION_FAILED,
                    "the session ended by an error",
                ),
                404,
            )),
            SessionState::Lost => Err(lost(target)),
            SessionState::Paused | SessionState::Pausing => {
                Err(refuse(target, paused_failure(), 409))
            }
            // It was here before this node restarted; the registry is about to note that.
            _ if node == self.node => Err(lost(target)),
            _ => match internal_address {
                Some(address) => self
                    .peers
                    .carry(&address, target, request, authority)
                    .await
                    .map_err(|failure| refuse(target, failure, 503)),
                None => Err(refuse(target, node_unreachable(), 503)),
            },
        }
    }
}

/// Serves one of the node's listeners until `shutdown`; connections are tasks of `tasks` and drain.
pub async fn serve<H, F>(
    listener: TcpListener,
    tasks: TaskTracker,
    shutdown: CancellationToken,
    handle: H,
) where
    H: Fn(Request<Body>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Response<Body>> + Send + 'static,
{
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let (socket, peer): (_, SocketAddr) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, or a client gone before it was accepted: both pass.
                tracing::warn!(%error, "accept failed");
                tokio::time::sleep(ACCEPT_AGAIN).await;
                continue;
            }
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            metrics::counter!("sandmesh_node_ingress_connections_refused_total").increment(1);
            continue;
        };
        if let Err(error) = socket.set_nodelay(true) {
            tracing::debug!(%error, %peer, "no TCP_NODELAY");
        }
        let (handle, stop) = (handle.clone(), shutdown.clone());
        tasks.spawn(async move {
            let _place = place;
            connection(socket, stop, handle).await;
        });
    }
}

/// Serves one connection, of HTTP/1.1 or HTTP/2, upgrades included.
async fn connection<H, F>(socket: TcpStream, stop: CancellationToken, handle: H)
where
    H: Fn(Request<Body>) -> F + Send + Sync + 'static,
    F: Future<Output = Response<Body>> + Send + 'static,
{
    let service = hyper::service::service_fn(move |request: Request<Incoming>| {
        let answer = handle(request.map(Body::new));
        async move { Ok::<_, Infallible>(answer.await) }
    });
    let mut server = auto::Builder::new(TokioExecutor::new());
    server
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .half_close(true)
        .preserve_header_case(true)
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(HEADER_LIST)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .enable_connect_protocol();
    let connection = server.serve_connection_with_upgrades(TokioIo::new(socket), service);
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection to this node ended");
    }
}

fn node_unreachable() -> Failure {
    Failure::unavailable(
        Reason::NODE_UNREACHABLE,
        "the node that hosts this session does not answer",
    )
}

fn lost(target: &Target) -> answer::Refusal {
    let failure = Failure::new(
        Code::NotFound,
        Reason::SESSION_LOST,
        "the session was lost with its node",
    );
    refuse(target, failure, 410)
}

fn may_call(
    session: &Session,
    request: &Request<Body>,
    target: &Target,
) -> Result<(), answer::Refusal> {
    match target.what {
        What::Stream => token::check_stream(session, request.headers()),
        What::Files => files::check(session, request).map(drop),
        What::Port(_) if session.port_access() == PortAccess::Token => {
            token::check_port(session, request).map(drop)
        }
        What::Port(_) => Ok(()),
    }
}

fn paused_failure() -> Failure {
    Failure::new(
        Code::FailedPrecondition,
        Reason::SESSION_PAUSED,
        "the session is paused; resume it, or let calls wake it with wake_on_request",
    )
}

fn stopped_failure() -> Failure {
    Failure::new(
        Code::NotFound,
        Reason::SESSION_STOPPED,
        "the session was stopped",
    )
}

fn unknown(target: &Target) -> answer::Refusal {
    refuse(
        target,
        Failure::new(
            Code::NotFound,
            Reason::SESSION_UNKNOWN,
            "there is no such session",
        ),
        404,
    )
}

fn ended_here(target: &Target, ended: &Ended) -> answer::Refusal {
    let failure = match ended.state {
        SessionState::Failed => Failure::new(
            Code::NotFound,
            Reason::SESSION_FAILED,
            format!("the session ended: {}", ended.message),
        ),
        SessionState::Lost => return lost(target),
        _ => stopped_failure(),
    };
    refuse(target, failure, 404)
}

fn refuse(target: &Target, failure: Failure, http: u16) -> answer::Refusal {
    answer::Refusal::new(failure, http).about(target)
}

/// The authority the client used: of HTTP/2 in the URI, of HTTP/1.1 in Host; from a peer, what that node was told.
fn authority(request: &Request<Body>, from: From) -> Option<String> {
    let header = |name: &HeaderName| {
        request
            .headers()
            .get(name)
            .and_then(|value| value.to_str().ok())
            .map(str::to_owned)
    };
    if from == From::Peer
        && let Some(told) = header(&AUTHORITY_HEADER)
    {
        return Some(told);
    }
    request
        .uri()
        .authority()
        .map(ToString::to_string)
        .or_else(|| header(&http::header::HOST))
}

/// Headers that only Sandmesh's own parts may set mean nothing from here on.
fn clean(request: &mut Request<Body>) {
    let headers = request.headers_mut();
    for name in [TOKEN_HEADER, TEAM_HEADER, KEY_HEADER, OPERATOR_HEADER] {
        headers.remove(name);
    }
    headers.remove(HOP_HEADER);
    headers.remove(AUTHORITY_HEADER);
}
