//! From this node to the one that has the session: once, over the internal listeners.

use axum::body::Body;
use http::{HeaderValue, Request, Response, StatusCode, Uri, Version, header};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioIo},
};
use service_kit::{
    errors::Failure,
    mesh::{MeshToken, TOKEN_HEADER},
    telemetry,
};
use tokio_util::task::TaskTracker;

use super::{
    AUTHORITY_HEADER, HOP_HEADER, node_unreachable,
    target::{PORT_HEADER, SESSION_HEADER, Target, What},
};

/// The other nodes.
#[derive(Debug)]
pub(super) struct Peers {
    http1: Client<HttpConnector, Body>,
    http2: Client<HttpConnector, Body>,
    token: HeaderValue,
    tasks: TaskTracker,
}

impl Peers {
    pub(super) fn new(token: &MeshToken, tasks: TaskTracker) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(std::time::Duration::from_secs(1)));
        let mut builder = Client::builder(TokioExecutor::new());
        let http1 = builder.build(connector.clone());
        let http2 = builder.http2_only(true).build(connector);
        let mut token =
            HeaderValue::from_str(token.header()).unwrap_or(HeaderValue::from_static(""));
        token.set_sensitive(true);
        Self {
            http1,
            http2,
            token,
            tasks,
        }
    }

    /// Sends a request on. Upgrades go as HTTP/1.1, everything else as HTTP/2.
    pub(super) async fn carry(
        &self,
        address: &str,
        target: &Target,
        mut request: Request<Body>,
        authority: Option<String>,
    ) -> Result<Response<Body>, Failure> {
        let unreachable = |error: &dyn std::fmt::Display| {
            tracing::warn!(%error, address, "another node does not answer");
            node_unreachable()
        };
        let path = request
            .uri()
            .path_and_query()
            .map_or_else(|| "/".to_owned(), ToString::to_string);
        let uri = Uri::builder()
            .scheme("http")
            .authority(address)
            .path_and_query(path)
            .build();
        *request.uri_mut() = uri.map_err(|error| unreachable(&error))?;
        let headers = request.headers_mut();
        headers.remove(header::HOST);
        headers.insert(HOP_HEADER, HeaderValue::from_static("1"));
        headers.insert(TOKEN_HEADER, self.token.clone());
        if let Ok(id) = HeaderValue::from_str(target.session.as_str()) {
            headers.insert(SESSION_HEADER, id);
        }
        if let What::Port(port) = target.what {
            headers.insert(PORT_HEADER, HeaderValue::from(port));
        }
        if let Some(authority) = authority.and_then(|name| HeaderValue::from_str(&name).ok()) {
            headers.insert(AUTHORITY_HEADER, authority);
        }
        telemetry::inject_trace_context(headers);
        let upgrade = headers
            .contains_key(header::UPGRADE)
            .then(|| hyper::upgrade::on(&mut request));
        let client = if upgrade.is_some() {
            *request.version_mut() = Version::HTTP_11;
            &self.http1
        } else {
            *request.version_mut() = Version::HTTP_2;
            &self.http2
        };
        let mut answer = client
            .request(request)
            .await
            .map_err(|error| unreachable(&error))?
            .map(Body::new);
        if let Some(client) = upgrade
            && answer.status() == StatusCode::SWITCHING_PROTOCOLS
        {
            let there = hyper::upgrade::on(&mut answer);
            self.tasks.spawn(async move {
                match futures::future::try_join(client, there).await {
                    Ok((client, there)) => {
                        let copied = tokio::io::copy_bidirectional(
                            &mut TokioIo::new(client),
                            &mut TokioIo::new(there),
                        )
                        .await;
                        if let Err(error) = copied {
                            tracing::debug!(%error, "a forwarded connection ended");
                        }
                    }
                    Err(error) => tracing::debug!(%error, "an upgrade was not completed"),
                }
            });
        }
        Ok(answer)
    }
}
