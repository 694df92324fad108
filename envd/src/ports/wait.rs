//! Waiting until a port is there, and if asked, until its server answers a GET well.

use std::{net::IpAddr, time::Duration};

use http::{StatusCode, header, uri::PathAndQuery};
use hyper_util::rt::TokioIo;
use proto::envd::v1::Listener;
use tokio::net::TcpStream;
use tonic::body::Body;

use super::Ports;

/// Between two questions to a server that is not ready.
const ASK_AGAIN: Duration = Duration::from_millis(100);
/// A server that takes longer is asked again: it may have begun to listen before it could serve.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// What a server's headers may make us hold.
const LARGEST_HEADERS: usize = 64 << 10;

/// Why the wait was in vain.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unready {
    #[error("nobody listens on port {port} after {waited:?}")]
    Closed { port: u16, waited: Duration },
    #[error("port {port} is open, but is not ready after {waited:?}: GET {path} {answer}")]
    Http {
        port: u16,
        waited: Duration,
        path: PathAndQuery,
        answer: String,
    },
    #[error("who listens cannot be seen: {0}")]
    Blind(String),
}

/// Who is ready, and the status of the answer if one was wanted.
#[derive(Debug)]
pub(crate) struct Ready {
    pub(crate) listener: Listener,
    pub(crate) status: Option<StatusCode>,
}

impl Ports {
    /// Waits, as long as the gate is open for `patience`.
    pub(crate) async fn wait(
        &self,
        port: u16,
        path: Option<&PathAndQuery>,
        patience: Duration,
    ) -> Result<Ready, Unready> {
        let mut state = self.watch().await.map_err(Unready::Blind)?;
        let mut last_answer = None;
        let ready = async {
            loop {
                let listeners: Vec<Listener> = {
                    let all = state.borrow_and_update();
                    let here = |one: &&Listener| one.port == u32::from(port);
                    all.values().filter(here).cloned().collect()
                };
                let nobody = listeners.is_empty();
                if nobody {
                    last_answer = None;
                }
                for listener in listeners {
                    let Some(path) = path else {
                        let status = None;
                        return Ok(Ready { listener, status });
                    };
                    let asking = get(&listener, port, path);
                    let answer = match tokio::time::timeout(ANSWER_LIMIT, asking).await {
                        Ok(Ok(status)) if status.is_success() || status.is_redirection() => {
                            let status = Some(status);
                            return Ok(Ready { listener, status });
                        }
                        Ok(Ok(status)) => format!("was answered with {status}"),
                        Ok(Err(error)) => format!("failed: {error}"),
                        Err(_) => format!("was not answered in {ANSWER_LIMIT:?}"),
                    };
                    last_answer = Some(answer);
                }
                tokio::select! {
                    changed = state.changed() => if let Err(error) = changed {
                        return Err(Unready::Blind(error.to_string()));
                    },
                    () = self.guest.gate.sleep(ASK_AGAIN), if !nobody => {}
                }
            }
        };
        let answered = tokio::select! {
            biased;
            answered = ready => Some(answered),
            () = self.guest.gate.sleep(patience) => None,
        };
        answered.unwrap_or_else(|| {
            Err(match (path, last_answer) {
                (Some(path), Some(answer)) => Unready::Http {
                    port,
                    waited: patience,
                    path: path.clone(),
                    answer,
                },
                _ => Unready::Closed {
                    port,
                    waited: patience,
                },
            })
        })
    }
}

/// Asks once, over a connection of its own.
async fn get(
    listener: &Listener,
    port: u16,
    path: &PathAndQuery,
) -> Result<StatusCode, Box<dyn std::error::Error + Send + Sync>> {
    let address = match listener.address.parse()? {
        IpAddr::V4(any) if any.is_unspecified() => IpAddr::from([127, 0, 0, 1]),
        IpAddr::V6(any) if any.is_unspecified() => "::1".parse()?,
        one => one,
    };
    let socket = TcpStream::connect((address, port)).await?;
    let (mut sender, connection) = hyper::client::conn::http1::Builder::new()
        .max_buf_size(LARGEST_HEADERS)
        .handshake(TokioIo::new(socket))
        .await?;
    let request = http::Request::get(path.as_str())
        .header(header::HOST, format!("localhost:{port}"))
        .header(header::USER_AGENT, "sandmesh-envd")
        .header(header::CONNECTION, "close")
        .body(Body::empty())?;
    let mut answer = std::pin::pin!(sender.send_request(request));
    let answer = tokio::select! {
        answer = &mut answer => answer?,
        // The answer may have been the last of it.
        _ended = connection => answer.await?,
    };
    Ok(answer.status())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    use super::*;
    use crate::{identity::Guest, network::tests::in_own_network};

    const LONG: Duration = Duration::from_mins(1);
    const SHORT: Duration = Duration::from_millis(300);

    fn ports() -> Ports {
        let guest = Arc::new(Guest::for_tests());
        guest.gate.open();
        Ports::new(guest)
    }

    /// Gives each connection the next of these answers, and hands back the head of each request.
    async fn serve(listener: &TcpListener, answers: &[&str]) -> Vec<String> {
        let mut heads = Vec::new();
        for answer in answers {
            let (mut socket, _) = listener.accept().await.unwrap();
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(socket.read_u8().await.unwrap());
            }
            heads.push(String::from_utf8(head).unwrap());
            socket.write_all(answer.as_bytes()).await.unwrap();
        }
        heads
    }

    #[test]
    fn a_server_is_ready_when_it_answers_well_and_not_before() {
        in_own_network(async |_| {
            for address in ["127.0.0.1", "::"] {
                let listener = TcpListener::bind((address, 0)).await.unwrap();
                let port = listener.local_addr().unwrap().port();
                let path = PathAndQuery::from_static("/health?deep=1");
                let answers = [
                    "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n",
                    "",
                    "no http at all\r\n\r\n",
                    "HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 404 Not Found\r\n\r\n",
                    "HTTP/1.0 302 Found\r\nlocation: /\r\n\r\n",
                ];
                let ports = ports();
                let (heads, ready) = tokio::join!(
                    serve(&listener, &answers),
                    ports.wait(port, Some(&path), LONG)
                );
                assert_eq!(ready.unwrap().status, Some(StatusCode::FOUND));
                assert_eq!(heads.len(), answers.len());
                for head in heads {
                    assert!(
                        head.starts_with("GET /health?deep=1 HTTP/1.1\r\n"),
                        "{head}"
                    );
                    assert!(
                        head.contains(&format!("host: localhost:{port}\r\n")),
                        "{head}"
                    );
                }
            }
        });
    }

    #[test]
    fn what_was_last_answered_is_told_when_time_is_up() {
        in_own_network(async |_| {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let path = PathAndQuery::from_static("/");
            let bad = ["HTTP/1.1 500 Oh no\r\n\r\n"; 100];
            let ports = ports();
            let unready = tokio::select! {
                _ = serve(&listener, &bad) => unreachable!(),
                unready = ports.wait(port, Some(&path), SHORT) => unready.unwrap_err(),
            };
            let text = unready.to_string();
            assert!(text.contains("GET / was answered with 500"), "{text}");
            drop(listener);
            let unready = ports.wait(port, Some(&path), SHORT).await.unwrap_err();
            assert!(matches!(unready, Unready::Closed { .. }), "{unready}");
        });
    }

    #[test]
    fn time_of_a_closed_gate_does_not_count() {
        in_own_network(async |_| {
            let ports = ports();
            ports.guest.gate.close();
            let mut wait = std::pin::pin!(ports.wait(9, None, SHORT));
            let waited = tokio::time::timeout(SHORT * 3, &mut wait).await;
            assert!(waited.is_err());
            ports.guest.gate.open();
            assert!(wait.await.is_err());
        });
    }
}
