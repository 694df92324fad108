//! How a request is refused: JSON for programs, a short page for browsers, a status for gRPC. One place for all of them.

use std::borrow::Cow;

use axum::body::Body;
use http::{HeaderValue, Request, Response, StatusCode, header};
use serde::Serialize;
use service_kit::{errors::Failure, request_id};

use super::target::{Target, What};

/// Who asks, and so in which form it wants to be refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asker {
    /// A gRPC client.
    Grpc,
    /// A person with a browser.
    Browser,
    /// Anything else.
    Program,
}

impl Asker {
    /// By content type and Accept.
    pub fn of<B>(request: &Request<B>) -> Self {
        let text = |name| {
            request
                .headers()
                .get(name)
                .and_then(|value: &HeaderValue| value.to_str().ok())
                .unwrap_or_default()
        };
        if text(header::CONTENT_TYPE).starts_with("application/grpc") {
            Self::Grpc
        } else if text(header::ACCEPT).contains("text/html") {
            Self::Browser
        } else {
            Self::Program
        }
    }
}

/// A no.
#[derive(Debug)]
pub struct Refusal {
    failure: Failure,
    http: u16,
    session: Option<String>,
    port: Option<u16>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Answer<'a> {
    reason: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    session_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    port: Option<u16>,
    message: &'a str,
    request_id: &'a str,
}

impl Refusal {
    /// With the HTTP status for those who do not speak gRPC.
    pub fn new(failure: Failure, http: u16) -> Self {
        Self {
            failure,
            http,
            session: None,
            port: None,
        }
    }

    /// Names what it is about.
    #[must_use]
    pub fn about(mut self, target: &Target) -> Self {
        self.session = Some(target.session.to_string());
        self.failure = self.failure.with("sessionId", &target.session);
        if let What::Port(port) = target.what {
            self.port = Some(port);
            self.failure = self.failure.with("port", port);
        }
        self
    }

    /// Its stable word, for logs and metrics.
    pub fn label(&self) -> &'static str {
        // Reasons here are all constants, so this is a bounded set of labels.
        self.failure.reason().word()
    }

    /// The answer.
    pub fn into_response(self, asker: Asker, id: &str) -> Response<Body> {
        let retry = self.failure.retry();
        let mut response = match asker {
            Asker::Grpc => self.failure.into_status().into_http::<Body>(),
            Asker::Program => {
                let body = self.json(id);
                plain(self.http, "application/json", body)
            }
            Asker::Browser => {
                let body = self.page(id);
                plain(self.http, "text/html; charset=utf-8", body)
            }
        };
        let headers = response.headers_mut();
        if self.http == 405 {
            // Only files refuse a method.
            headers.insert(header::ALLOW, HeaderValue::from_static("GET, HEAD, PUT"));
        }
        if let Ok(value) = HeaderValue::from_str(id) {
            headers.insert(request_id::HEADER, value);
        }
        if let Some(wait) = retry {
            headers.insert(
                header::RETRY_AFTER,
                HeaderValue::from(wait.as_secs().max(1)),
            );
        }
        response
    }

    fn json(&self, id: &str) -> String {
        let answer = Answer {
            reason: self.failure.reason().as_str(),
            session_id: self.session.as_deref(),
            port: self.port,
            message: self.failure.message(),
            request_id: id,
        };
        serde_json::to_string(&answer).unwrap_or_default()
    }

    fn page(&self, id: &str) -> String {
        format!(
            "<!doctype html><meta charset=utf-8><title>{0}</title><style>body{{font:16px system-ui;margin:4em auto;max-width:40em}}\
             code{{background:#eee;padding:.1em .3em}}</style><h1>{1}</h1><p><code>{0}</code></p><p>Request <code>{2}</code></p>",
            self.failure.reason(),
            escape(self.failure.message()),
            escape(id),
        )
    }
}

fn plain(status: u16, content_type: &'static str, body: String) -> Response<Body> {
    let mut response = Response::new(Body::from(body));
    *response.status_mut() =
        StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

fn escape(text: &str) -> Cow<'_, str> {
    if text.contains(['<', '>', '&', '"']) {
        Cow::Owned(
            text.replace('&', "&amp;")
                .replace('<', "&lt;")
                .replace('>', "&gt;")
                .replace('"', "&quot;"),
        )
    } else {
        Cow::Borrowed(text)
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;
    use service_kit::{errors::Reason, ids::SessionId};
    use tonic::{Code, Status};

    use super::*;

    fn refusal() -> Refusal {
        let target = Target {
            session: SessionId::parse("abcde0123456789abcdefghij").unwrap(),
            what: What::Port(81),
        };
        Refusal::new(
            Failure::unavailable(Reason::PORT_CLOSED, "nobody listens on port 81 <b>"),
            502,
        )
        .about(&target)
    }

    async fn text(response: Response<Body>) -> String {
        String::from_utf8(
            response
                .into_body()
                .collect()
                .await
                .unwrap()
                .to_bytes()
                .to_vec(),
        )
        .unwrap()
    }

    #[tokio::test]
    async fn programs_get_json_browsers_a_page() {
        let response = refusal().into_response(Asker::Program, "r1");
        assert_eq!(
            (
                response.status().as_u16(),
                &response.headers()["retry-after"]
            ),
            (502, &HeaderValue::from(1))
        );
        insta::assert_snapshot!(text(response).await, @r#"{"reason":"PORT_CLOSED","sessionId":"abcde0123456789abcdefghij","port":81,"message":"nobody listens on port 81 <b>","requestId":"r1"}"#);
        let page = text(refusal().into_response(Asker::Browser, "r1")).await;
        assert!(
            page.contains("PORT_CLOSED") && page.contains("&lt;b&gt;") && !page.contains("<b>")
        );
    }

    #[test]
    fn grpc_gets_a_status_with_details() {
        let response = refusal().into_response(Asker::Grpc, "r1");
        let status = Status::from_header_map(response.headers()).unwrap();
        assert_eq!(
            (response.status().as_u16(), status.code()),
            (200, Code::Unavailable)
        );
        assert_eq!(
            service_kit::errors::reason_of(&status).as_deref(),
            Some("PORT_CLOSED")
        );
    }
}
