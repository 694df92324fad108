//! HTTP as any client speaks it, to Envoy by name: the connection goes to the edge whatever the host says.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(30);

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
        (
            self.status.as_u16(),
            self.json()["reason"]
                .as_str()
                .unwrap_or_default()
                .to_owned(),
        )
    }
}

/// Gets a path of a host by way of the edge.
pub async fn get(edge: &str, host: &str, path: &str, headers: &[(&str, &str)]) -> Answer {
    let client = Client::builder(TokioExecutor::new())
        .set_host(false)
        .build_http();
    let mut request = Request::get(format!("http://{edge}{path}")).header("host", host);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let answer = client.request(request.body(Full::<Bytes>::default()).unwrap());
    let answer = tokio::time::timeout(LIMIT, answer)
        .await
        .expect("an answer in time")
        .expect("an answer");
    let (parts, body) = answer.into_parts();
    let body = tokio::time::timeout(LIMIT, body.collect())
        .await
        .expect("a body in time")
        .expect("a body")
        .to_bytes();
    Answer {
        status: parts.status,
        headers: parts.headers,
        body,
    }
}

/// Gets again until the port is open.
pub async fn get_when_open(edge: &str, host: &str, path: &str) -> Answer {
    for _ in 0..300 {
        let answer = get(edge, host, path, &[]).await;
        if answer.status != StatusCode::BAD_GATEWAY {
            return answer;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("{host} stayed closed");
}
