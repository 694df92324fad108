//! A guest that answers whatever it likes, to every call this node makes: nothing of it makes the node panic, wait for ever or pass on more than came.
//!
//! What is answered is mutated from the files in `corpus/guest` (bytes of real answers, and some that were made up to be wrong). `PROPTEST_CASES=100000` runs
//! it for longer; what it finds is kept in `proptest-regressions`.

use std::{
    convert::Infallible,
    fs,
    path::Path,
    sync::{Arc, LazyLock},
    time::{Duration, SystemTime},
};

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt as _, Limited, StreamBody};
use hyper_util::rt::{TokioExecutor, TokioIo};
use proptest::prelude::*;
use proto::{envd::v1::StreamSpansRequest, session::v1::PortReadiness};
use service_kit::ids::{HomeTag, SessionId};
use tokio::io::AsyncReadExt as _;
use tokio_util::sync::CancellationToken;

use super::{files, port, stream, token::tests::session};
use crate::{
    guest::{Connections, GuestClient, Identity},
    hosted::Reach,
    ready, spans,
};

/// More than any answer here has.
const MOST: usize = 1 << 20;
/// Longer than anything a guest may make the node wait for; the clock is not the wall's.
const LIMIT: Duration = Duration::from_mins(5);

const NAMES: [&str; 9] = [
    "content-length",
    "content-range",
    "content-type",
    "etag",
    "grpc-encoding",
    "grpc-message",
    "grpc-status",
    "grpc-status-details-bin",
    "set-cookie",
];

static CORPUS: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus/guest");
    let mut paths: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    let read = |path| fs::read(path).unwrap();
    paths.iter().map(read).collect()
});

#[derive(Debug, Clone)]
struct Answer {
    status: u16,
    headers: Vec<(usize, Vec<u8>)>,
    body: Vec<Vec<u8>>,
    trailers: Option<Vec<(usize, Vec<u8>)>>,
    /// Whether the stream breaks off instead of ending.
    breaks: bool,
}

fn lines(lines: &[(usize, Vec<u8>)]) -> HeaderMap {
    let mut map = HeaderMap::new();
    for (name, value) in lines {
        if let Ok(value) = HeaderValue::from_bytes(value) {
            map.append(HeaderName::from_static(NAMES[*name]), value);
        }
    }
    map
}

impl Answer {
    fn respond(
        &self,
    ) -> Response<impl http_body::Body<Data = Bytes, Error = std::io::Error> + use<>> {
        let data = self
            .body
            .iter()
            .cloned()
            .map(|bytes| Ok(Frame::data(Bytes::from(bytes))));
        let trailers = self
            .trailers
            .iter()
            .map(|trailers| Ok(Frame::trailers(lines(trailers))));
        let end = self.breaks.then(|| Err(std::io::ErrorKind::Other.into()));
        let frames: Vec<_> = data.chain(trailers).chain(end).collect();
        let mut response = Response::new(StreamBody::new(futures::stream::iter(frames)));
        *response.status_mut() = http::StatusCode::from_u16(self.status).unwrap();
        *response.headers_mut() = lines(&self.headers);
        response
    }
}

fn header_lines() -> impl Strategy<Value = Vec<(usize, Vec<u8>)>> {
    let value = prop_oneof![
        Just(b"0".to_vec()),
        Just(b"application/grpc".to_vec()),
        Just(b"gzip".to_vec()),
        "[0-9]{1,20}".prop_map(String::into_bytes),
        "[A-Za-z0-9+/]{0,80}={0,2}".prop_map(String::into_bytes),
        prop::collection::vec(any::<u8>(), 0..40),
    ];
    prop::collection::vec((0..NAMES.len(), value), 0..5)
}

/// A message of the corpus with some of its bytes changed, left out or doubled; with its gRPC prefix, or without.
fn message() -> impl Strategy<Value = Vec<u8>> {
    let edit = (any::<u16>(), 0..4_u8, any::<u8>());
    let edits = prop::collection::vec(edit, 0..6);
    (any::<prop::sample::Index>(), edits, any::<bool>()).prop_map(|(seed, edits, is_framed)| {
        let mut bytes = CORPUS[seed.index(CORPUS.len())].clone();
        for (at, what, byte) in edits {
            if bytes.is_empty() {
                break;
            }
            let at = usize::from(at) % bytes.len();
            match what {
                0 => bytes[at] = byte,
                1 => bytes.insert(at, byte),
                2 => bytes.truncate(at),
                _ => bytes.extend_from_within(at..),
            }
        }
        if !is_framed {
            return bytes;
        }
        let mut framed = vec![0];
        framed.extend((bytes.len() as u32).to_be_bytes());
        framed.extend(bytes);
        framed
    })
}

fn answer() -> impl Strategy<Value = Answer> {
    (
        prop_oneof![8 => Just(200), 2 => 200..600_u16],
        header_lines(),
        prop::collection::vec(message(), 0..4),
        prop::option::of(header_lines()),
        prop::bool::weighted(0.2),
    )
        .prop_map(|(status, headers, body, trailers, breaks)| Answer {
            status,
            headers,
            body,
            trailers,
            breaks,
        })
}

async fn guest(answer: Answer) -> GuestClient {
    let (node, guest) = tokio::io::duplex(64 << 10);
    let answers = hyper::service::service_fn(move |_| {
        let answer = answer.respond();
        async move { Ok::<_, Infallible>(answer) }
    });
    let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    tokio::spawn(server.serve_connection(TokioIo::new(guest), answers));
    let client = GuestClient::open(Box::new(node), CancellationToken::new()).await;
    client.unwrap()
}

/// At most so many bytes of a body that a client would get.
async fn drained<B>(body: B)
where
    B: http_body::Body<Data = Bytes>,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    // An answer that broke off is one of the things that may come.
    let _ = Limited::new(body, MOST).collect().await;
}

async fn all_calls(answer: Answer) {
    let guest = guest(answer).await;
    let reach = Arc::new(Reach::new(guest.clone(), None, CancellationToken::new()));
    let session = session();
    let identity = Identity {
        session_id: SessionId::random(&HomeTag::random()),
        env: [].into(),
        default_user: String::new(),
        nameservers: Vec::new(),
        template: "t@1".into(),
        machine_id: vec![1; 16],
    };
    // What comes of each does not matter, only that something does.
    let _ = guest.configure(&identity, Connections::Keep).await;
    let _ = guest.prepare_snapshot(&[]).await;
    let ready = PortReadiness {
        port: 80,
        ..PortReadiness::default()
    };
    let _ = ready::wait_for_port(&reach, &ready).await;
    if let Ok(answer) = guest.system().stream_spans(StreamSpansRequest {}).await {
        let mut answers = answer.into_inner();
        while let Ok(Some(span)) = answers.message().await {
            let _ = spans::read(&session.id, &span, SystemTime::now());
        }
    }
    if let Ok(mut tunnel) = port::open_tunnel(&guest, 80).await {
        let mut bytes = BytesMut::with_capacity(MOST);
        while matches!(tunnel.read_buf(&mut bytes).await, Ok(1..)) && bytes.len() < MOST {}
    }
    for (method, path) in [
        ("GET", "/files/x"),
        ("HEAD", "/files/x"),
        ("PUT", "/files/x"),
    ] {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("x-sandmesh-token", "sst_right")
            .body(Body::from("bytes"))
            .unwrap();
        match files::carry(&session, &reach, request).await {
            Ok(answer) => {
                assert!(!answer.headers().contains_key("set-cookie"));
                drained(answer.into_body()).await;
            }
            Err(refusal) => drop(refusal.into_response(super::Asker::Program, "r")),
        }
    }
    let request = Request::post("/").body(Body::from("bytes")).unwrap();
    let path = "/sandmesh.envd.v1.ProcessService/List".to_owned();
    if let Ok(answer) = stream::pass(&reach, request, path, true).await {
        drained(answer.into_body()).await;
    }
}

proptest! {
    #[test]
    fn whatever_a_guest_answers_the_node_goes_on(answer in answer()) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .start_paused(true)
            .build()
            .unwrap();
        runtime
            .block_on(async { tokio::time::timeout(LIMIT, all_calls(answer)).await })
            .expect("every call ends");
    }
}
