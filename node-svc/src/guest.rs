//! envd of one guest, as node-svc calls it: an HTTP/2 connection over the link, and the configure call that makes the guest a
//! session's. Everything that comes from it is untrusted.

use std::{
    collections::BTreeMap,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use data_encoding::{BASE64, BASE64_NOPAD};
use http::{HeaderMap, HeaderValue, Request, Response, Uri};
use http_body::Frame;
use http_body_util::{BodyExt as _, combinators::MapFrame};
use hyper::{
    body::Incoming,
    client::conn::http2::{Builder, SendRequest},
};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use proto::envd::v1::{
    ConfigureRequest, GuestInfo, GuestNetwork, PrepareSnapshotRequest,
    port_service_client::PortServiceClient, process_service_client::ProcessServiceClient,
    system_service_client::SystemServiceClient,
};
use service_kit::{ids::SessionId, telemetry};
use tokio_util::sync::CancellationToken;
use tonic::{Status, body::Body};
use tower::Service;

use crate::{slot, vmm::LinkStream};

const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 8 << 20;
const FRAME: u32 = 64 << 10;
/// A guest's headers are small; what it may make us hold is this.
const HEADER_LIST: u32 = 32 << 10;
const CONFIGURE_TIMEOUT: Duration = Duration::from_secs(20);
const PREPARE_TIMEOUT: Duration = Duration::from_secs(20);
/// Of a process: envd sends output in pieces of 64 KiB.
const LARGEST_EVENT: usize = 256 << 10;
const ENTROPY: usize = 64;
const DETAILS: &str = "grpc-status-details-bin";

/// Calls one guest. Cheap to clone.
#[derive(Debug, Clone)]
pub struct GuestClient {
    sender: SendRequest<Body>,
    closed: CancellationToken,
}

/// What becomes of the connections a guest had to the outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Connections {
    /// They go on.
    Keep,
    /// They end: the network place they went through is gone, or another guest's.
    Reset,
}

/// What a guest is told to become.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Its session.
    pub session_id: SessionId,
    /// Environment of its processes.
    pub env: BTreeMap<String, String>,
    /// User of processes that name none; empty if envd is to choose.
    pub default_user: String,
    /// Its name servers.
    pub nameservers: Vec<String>,
    /// Its template, as "name@version"; empty for nobody's.
    pub template: String,
    /// 16 bytes for /etc/machine-id.
    pub machine_id: Vec<u8>,
}

impl GuestClient {
    /// Speaks HTTP/2 over the link until it ends or `stop` is cancelled.
    pub async fn open(
        link: Box<dyn LinkStream>,
        stop: CancellationToken,
    ) -> Result<Self, hyper::Error> {
        let mut builder = Builder::new(TokioExecutor::new());
        builder
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(FRAME)
            .max_header_list_size(HEADER_LIST)
            .max_concurrent_reset_streams(1024);
        let (sender, connection) = builder.handshake(TokioIo::new(link)).await?;
        let closed = CancellationToken::new();
        let close = closed.clone().drop_guard();
        tokio::spawn(async move {
            let _close = close;
            tokio::select! {
                () = stop.cancelled() => {}
                ended = connection => if let Err(error) = ended {
                    tracing::debug!(%error, "the connection to a guest ended");
                },
            }
        });
        Ok(Self { sender, closed })
    }

    /// Waits until the connection is of no use any more.
    pub async fn closed(&self) {
        self.closed.cancelled().await;
    }

    /// Makes the guest ready to be stored: its processes frozen, its disk written, its gate closed until it is configured again.
    /// One that is nobody's yet is given the network that whoever is restored from it will have. Returns how many bytes of its memory
    /// nobody in it uses, as far as it tells the truth.
    pub async fn prepare_snapshot(&self, nameservers: &[String]) -> Result<u64, Status> {
        let mut request = tonic::Request::new(PrepareSnapshotRequest {
            network: Some(network(nameservers)),
        });
        request.set_timeout(PREPARE_TIMEOUT);
        match tokio::time::timeout(PREPARE_TIMEOUT, self.system().prepare_snapshot(request)).await {
            Ok(answer) => answer.map(|answer| answer.into_inner().free_memory_bytes),
            Err(_) => Err(Status::deadline_exceeded(
                "the guest did not get ready to be stored in time",
            )),
        }
    }

    /// Makes the guest the session's: entropy, clock, names, network, environment. Fails closed.
    pub async fn configure(
        &self,
        identity: &Identity,
        connections: Connections,
    ) -> Result<GuestInfo, Status> {
        let now = jiff::Timestamp::now();
        let entropy: [u8; ENTROPY] = rand::random();
        let mut request = tonic::Request::new(ConfigureRequest {
            session_id: identity.session_id.to_string(),
            hostname: format!("sandbox-{}", identity.session_id.short()),
            entropy: entropy.to_vec(),
            time: Some(prost_types::Timestamp {
                seconds: now.as_second(),
                nanos: now.subsec_nanosecond(),
            }),
            network: Some(network(&identity.nameservers)),
            env: identity.env.clone().into_iter().collect(),
            machine_id: identity.machine_id.clone(),
            default_user: identity.default_user.clone(),
            reset_connections: connections == Connections::Reset,
            template: identity.template.clone(),
        });
        request.set_timeout(CONFIGURE_TIMEOUT);
        match tokio::time::timeout(CONFIGURE_TIMEOUT, self.system().configure(request)).await {
            Ok(answer) => Ok(answer?.into_inner().info.unwrap_or_default()),
            Err(_) => Err(Status::deadline_exceeded(
                "the guest did not configure itself in time",
            )),
        }
    }

    /// envd itself.
    pub fn system(&self) -> SystemServiceClient<Self> {
        SystemServiceClient::with_origin(self.clone(), origin())
    }

    /// envd's processes.
    pub fn processes(&self) -> ProcessServiceClient<Self> {
        ProcessServiceClient::with_origin(self.clone(), origin())
            .max_decoding_message_size(LARGEST_EVENT)
    }

    /// envd's ports.
    pub fn ports(&self) -> PortServiceClient<Self> {
        PortServiceClient::with_origin(self.clone(), origin())
    }

    /// Sends any request to envd.
    pub async fn send(&self, request: Request<Body>) -> Result<Response<Answer>, hyper::Error> {
        let answer = self.sender.clone().send_request(request).await?;
        Ok(disarm(answer))
    }
}

/// What a guest answers, as it may be passed on.
pub type Answer = MapFrame<Incoming, fn(Frame<Bytes>) -> Frame<Bytes>>;

fn disarm(answer: Response<Incoming>) -> Response<Answer> {
    let (mut head, body) = answer.into_parts();
    disarm_headers(&mut head.headers);
    Response::from_parts(head, body.map_frame(disarm_frame))
}

fn disarm_frame(frame: Frame<Bytes>) -> Frame<Bytes> {
    match frame.into_trailers() {
        Ok(mut trailers) => {
            disarm_headers(&mut trailers);
            Frame::trailers(trailers)
        }
        Err(frame) => frame,
    }
}

/// Leaves out what tonic clients, this node and those further on, would panic at (0.14, status.rs, `from_header_map`): details that are no
/// base64.
fn disarm_headers(headers: &mut HeaderMap) {
    let is_sound = |value: &HeaderValue| {
        let text = value.as_bytes();
        BASE64.decode(text).is_ok() || BASE64_NOPAD.decode(text).is_ok()
    };
    if !headers.get_all(DETAILS).iter().all(is_sound) {
        headers.remove(DETAILS);
    }
}

/// The same in every slot.
fn network(nameservers: &[String]) -> GuestNetwork {
    GuestNetwork {
        address: slot::GUEST_ADDRESS.into(),
        gateway: slot::GATEWAY.into(),
        nameservers: nameservers.to_vec(),
    }
}

/// The authority of every call to a guest; it has only one server.
pub fn origin() -> Uri {
    Uri::from_static("http://guest")
}

impl Service<Request<Body>> for GuestClient {
    type Response = Response<Body>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, hyper::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), hyper::Error>> {
        self.sender.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        telemetry::inject_trace_context(request.headers_mut());
        let answer = self.sender.send_request(request);
        Box::pin(async move { Ok(disarm(answer.await?).map(Body::new)) })
    }
}
