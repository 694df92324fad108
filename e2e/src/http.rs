//! HTTP as any client speaks it, to Envoy by name: the connection goes to the edge whatever the host says.

use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::stream;
use http::{HeaderMap, Request, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::BoxBody};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use serde_json::Value;
use tokio::{sync::watch, time::timeout};

const LIMIT: Duration = Duration::from_mins(2);
const FIRST_WAIT: Duration = Duration::from_millis(50);
const LONGEST_WAIT: Duration = Duration::from_secs(2);

/// A request's body: whole, or streamed.
pub type Body = BoxBody<Bytes, std::io::Error>;

/// An answer, whole.
#[derive(Debug)]
pub struct Answer {
    /// Its status.
    pub status: StatusCode,
    /// Its headers.
    pub headers: HeaderMap,
    /// Its body.
    pub body: Bytes,
}

impl Answer {
    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("not JSON: {:?}", self.body))
    }

    /// Status and reason of a refusal.
    pub fn refusal(&self) -> (u16, String) {
        let reason = self.json()["reason"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        (self.status.as_u16(), reason)
    }
}

/// A body that is there already.
pub fn whole(bytes: Bytes) -> Body {
    Full::new(bytes).map_err(|never| match never {}).boxed()
}

/// Gets a path of a host by way of the edge.
pub async fn get(edge: &str, host: &str, path: &str, headers: &[(&str, &str)]) -> Answer {
    let request = Request::get(format!("http://{edge}{path}"));
    send(edge, request, host, headers, Body::default(), LIMIT).await
}

/// Puts a body to a path of a host by way of the edge.
pub async fn put(
    edge: &str,
    host: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: Body,
) -> Answer {
    let request = Request::put(format!("http://{edge}{path}"));
    send(edge, request, host, headers, body, LIMIT).await
}

/// Posts a body to a path of a host by way of the edge.
pub async fn post(
    edge: &str,
    host: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: Body,
) -> Answer {
    let request = Request::post(format!("http://{edge}{path}"));
    send(edge, request, host, headers, body, LIMIT).await
}

/// Posts a body of so many times the same bytes. It may take as long as it needs while it goes on.
pub async fn post_many(edge: &str, host: &str, path: &str, part: Bytes, count: u64) -> Answer {
    let (progress, mut seen) = watch::channel(0_u64);
    let parts = stream::iter((0..count).map(move |number| {
        progress.send_replace(number);
        Ok(Frame::data(part.clone()))
    }));
    let request = Request::post(format!("http://{edge}{path}"));
    let body = StreamBody::new(parts).boxed();
    let answer = send(edge, request, host, &[], body, Duration::MAX);
    let stalled = async {
        loop {
            match timeout(LIMIT, seen.changed()).await {
                Ok(Ok(())) => {}
                // All was sent: its answer is waited for as any is.
                Ok(Err(_)) => break tokio::time::sleep(LIMIT).await,
                Err(_) => break,
            }
        }
        *seen.borrow()
    };
    tokio::select! {
        answer = answer => answer,
        number = stalled => panic!("POST {path} of {host} at {edge} stands still after {number} of {count} parts"),
    }
}

async fn send(
    edge: &str,
    mut request: http::request::Builder,
    host: &str,
    headers: &[(&str, &str)],
    body: Body,
    limit: Duration,
) -> Answer {
    let client = Client::builder(TokioExecutor::new())
        .set_host(false)
        .build_http();
    request = request.header("host", host);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(body).unwrap();
    let what = format!(
        "{} {} of {host} at {edge}",
        request.method(),
        request.uri().path()
    );
    let exchange = async {
        let answer = client
            .request(request)
            .await
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        let (parts, body) = answer.into_parts();
        let body = body
            .collect()
            .await
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        Answer {
            status: parts.status,
            headers: parts.headers,
            body: body.to_bytes(),
        }
    };
    let answer = timeout(limit, exchange).await;
    answer.unwrap_or_else(|_| panic!("{what}: no whole answer in {limit:?}"))
}

/// Gets again until the port is open, less and less often: an emulated guest has better things to do.
pub async fn get_when_open(edge: &str, host: &str, path: &str) -> Answer {
    let end = Instant::now() + LIMIT;
    let mut wait = FIRST_WAIT;
    loop {
        let answer = get(edge, host, path, &[]).await;
        if answer.status != StatusCode::BAD_GATEWAY {
            return answer;
        }
        assert!(Instant::now() < end, "{host} stayed closed");
        tokio::time::sleep(wait).await;
        wait = (wait * 3 / 2).min(LONGEST_WAIT);
    }
}
