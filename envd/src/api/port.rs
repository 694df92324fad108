//! `sandmesh.envd.v1.PortService`.

use std::{sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use futures::{StreamExt as _, stream};
use http::uri::PathAndQuery;
use proto::envd::v1::{
    ForwardRequest, ForwardResponse, PortServiceListRequest, PortServiceListResponse,
    PortServiceWatchRequest, PortServiceWatchResponse, WaitForPortRequest, WaitForPortResponse,
    port_service_server::PortService,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status, Streaming};

use super::Answers;
use crate::{
    errors::{invalid, refuse, refuse_with},
    ports::{self, Listeners, Ports, wait::Unready},
};

const CHUNK: usize = 64 << 10;
const IN_FLIGHT: usize = 8;
const WAIT: Duration = Duration::from_secs(30);
const LONGEST_WAIT: Duration = Duration::from_mins(10);
const LONGEST_PATH: usize = 2048;

pub(crate) struct Api {
    pub(crate) ports: Ports,
}

#[tonic::async_trait]
impl PortService for Api {
    async fn list(
        &self,
        _: Request<PortServiceListRequest>,
    ) -> Result<Response<PortServiceListResponse>, Status> {
        let listeners = ports::look(&Listeners::new()).await.map_err(blind)?;
        let listeners = listeners.into_values().collect();
        Ok(Response::new(PortServiceListResponse { listeners }))
    }

    type WatchStream = Answers<PortServiceWatchResponse>;

    async fn watch(
        &self,
        _: Request<PortServiceWatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let mut state = self.ports.watch().await.map_err(blind)?;
        let now = Arc::clone(&state.borrow_and_update());
        let first = ports::difference(&Listeners::new(), &now).unwrap_or_default();
        let changes = stream::try_unfold((state, now), |(mut state, mut told)| async move {
            loop {
                state
                    .changed()
                    .await
                    .map_err(|_| blind("the kernel does not answer any more"))?;
                let now = Arc::clone(&state.borrow_and_update());
                let changes = ports::difference(&told, &now);
                told = now;
                if let Some(changes) = changes {
                    return Ok(Some((changes, (state, told))));
                }
            }
        });
        let first = stream::iter([Ok(first)]);
        Ok(Response::new(Box::pin(first.chain(changes))))
    }

    async fn wait_for_port(
        &self,
        request: Request<WaitForPortRequest>,
    ) -> Result<Response<WaitForPortResponse>, Status> {
        let request = request.into_inner();
        let port = parse_port(request.port)?;
        let path = parse_path(&request.http_path)?;
        let patience = parse_wait(request.timeout)?;
        let ready = self.ports.wait(port, path.as_ref(), patience).await;
        let ready = ready.map_err(|unready| match unready {
            Unready::Blind(error) => blind(error),
            Unready::Closed { .. } | Unready::Http { .. } => refuse_with(
                Code::DeadlineExceeded,
                "PORT_CLOSED",
                unready.to_string(),
                &[("port", port.to_string())],
            ),
        })?;
        Ok(Response::new(WaitForPortResponse {
            listener: Some(ready.listener),
            http_status: ready.status.map_or(0, |status| status.as_u16().into()),
        }))
    }

    type ForwardStream = Answers<ForwardResponse>;

    async fn forward(
        &self,
        request: Request<Streaming<ForwardRequest>>,
    ) -> Result<Response<Self::ForwardStream>, Status> {
        let mut requests = request.into_inner();
        let first = requests
            .message()
            .await?
            .ok_or_else(|| invalid("port", "is required"))?;
        let port = parse_port(first.port)?;
        let mut socket = dial(port).await?;
        if !first.data.is_empty() {
            socket
                .write_all(&first.data)
                .await
                .map_err(|error| broken(&error))?;
        }
        let (mut from_port, mut to_port) = socket.into_split();
        let (to_client, answers) = mpsc::channel(IN_FLIGHT);
        // The first answer says that the connection stands. The channel is new, so there is room.
        let _ = to_client.try_send(Ok(ForwardResponse { data: Bytes::new() }));
        tokio::spawn(async move {
            let inward = async {
                while let Ok(Some(part)) = requests.message().await {
                    if to_port.write_all(&part.data).await.is_err() {
                        return;
                    }
                }
                // The client has said all it will; the server may still answer.
                let _ = to_port.shutdown().await;
            };
            let client_gone = CancellationToken::new();
            let gone = client_gone.clone();
            // Owns the only sender, so that the answers end when the server has said all it will.
            let outward = async move {
                loop {
                    let mut chunk = BytesMut::with_capacity(CHUNK);
                    let read = tokio::select! {
                        read = from_port.read_buf(&mut chunk) => read,
                        () = to_client.closed() => return gone.cancel(),
                    };
                    let part = match read {
                        Ok(0) => return,
                        Ok(_) => Ok(ForwardResponse {
                            data: chunk.freeze(),
                        }),
                        Err(error) => Err(broken(&error)),
                    };
                    let over = part.is_err();
                    if to_client.send(part).await.is_err() {
                        return gone.cancel();
                    }
                    if over {
                        return;
                    }
                }
            };
            tokio::select! {
                ((), ()) = async { tokio::join!(inward, outward) } => {}
                // Also when the server takes nothing of what the client left behind.
                () = client_gone.cancelled() => {}
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }
}

fn parse_port(port: u32) -> Result<u16, Status> {
    let port = u16::try_from(port).ok().filter(|port| *port > 0);
    port.ok_or_else(|| invalid("port", "must be from 1 to 65535"))
}

fn parse_path(path: &str) -> Result<Option<PathAndQuery>, Status> {
    if path.is_empty() {
        return Ok(None);
    }
    if path.len() > LONGEST_PATH {
        return Err(invalid("http_path", "must be at most 2048 bytes"));
    }
    let parsed: Option<PathAndQuery> = path.parse().ok();
    parsed
        .filter(|_| path.starts_with('/'))
        .map(Some)
        .ok_or_else(|| invalid("http_path", "must be a path that begins with /"))
}

fn parse_wait(timeout: Option<prost_types::Duration>) -> Result<Duration, Status> {
    let timeout = timeout.map_or(Ok(WAIT), Duration::try_from);
    timeout
        .ok()
        .filter(|timeout| !timeout.is_zero() && *timeout <= LONGEST_WAIT)
        .ok_or_else(|| invalid("timeout", "must be more than 0 and at most 10 minutes"))
}

fn blind(error: impl std::fmt::Display) -> Status {
    let message = format!("who listens cannot be seen: {error}");
    refuse(Code::Internal, "LISTENERS_UNKNOWN", message)
}

/// Servers on the loopback are as reachable as any other.
async fn dial(port: u16) -> Result<TcpStream, Status> {
    for host in ["127.0.0.1", "::1"] {
        if let Ok(socket) = TcpStream::connect((host, port)).await {
            // A stream without it is only slower.
            let _ = socket.set_nodelay(true);
            return Ok(socket);
        }
    }
    Err(refuse_with(
        Code::Unavailable,
        "PORT_CLOSED",
        format!("nobody listens on port {port}"),
        &[("port", port.to_string())],
    ))
}

fn broken(error: &std::io::Error) -> Status {
    refuse(Code::Aborted, "PORT_BROKE_OFF", error.to_string())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;
    use crate::{identity::Guest, network::tests::in_own_network};

    fn listen() -> (TcpListener, u32) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port().into();
        (listener, port)
    }

    #[test]
    fn a_watcher_that_is_slow_gets_the_difference_and_no_queue() {
        in_own_network(async |_| {
            let guest = Arc::new(Guest::for_tests());
            guest.gate.open();
            let ports = Ports::new(guest);
            let (stays, _) = listen();
            let (goes, gone) = listen();
            let mut quick = ports.watch().await.unwrap();
            let api = Api { ports };
            let watch = api.watch(Request::new(PortServiceWatchRequest {})).await;
            let mut slow = watch.unwrap().into_inner();
            assert_eq!(slow.next().await.unwrap().unwrap().opened.len(), 2);
            // All of this somebody else is told.
            for _ in 0..3 {
                let brief = listen();
                quick.changed().await.unwrap();
                drop(brief);
                quick.changed().await.unwrap();
            }
            drop(goes);
            quick.changed().await.unwrap();
            let (_comes, come) = listen();
            quick.changed().await.unwrap();
            let changes = slow.next().await.unwrap().unwrap();
            let ports = |some: &[proto::envd::v1::Listener]| -> Vec<u32> {
                some.iter().map(|one| one.port).collect()
            };
            assert_eq!(ports(&changes.opened), [come]);
            assert_eq!(ports(&changes.closed), [gone]);
            assert!(futures::poll!(slow.next()).is_pending());
            drop(stays);
        });
    }
}
