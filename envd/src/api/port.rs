//! `sandmesh.envd.v1.PortService`.

use bytes::{Bytes, BytesMut};
use proto::envd::v1::{
    ForwardRequest, ForwardResponse, PortServiceListRequest, PortServiceListResponse,
    PortServiceWatchRequest, PortServiceWatchResponse, port_service_server::PortService,
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
    errors::{invalid, not_yet, refuse},
    ports,
};

const CHUNK: usize = 64 << 10;
const IN_FLIGHT: usize = 8;

pub(crate) struct Api;

#[tonic::async_trait]
impl PortService for Api {
    async fn list(
        &self,
        _: Request<PortServiceListRequest>,
    ) -> Result<Response<PortServiceListResponse>, Status> {
        let listeners = tokio::task::spawn_blocking(ports::listeners)
            .await
            .map_err(|_| refuse(Code::Internal, "INTERNAL", "listing ended early"))?;
        Ok(Response::new(PortServiceListResponse { listeners }))
    }

    type WatchStream = Answers<PortServiceWatchResponse>;

    async fn watch(
        &self,
        _: Request<PortServiceWatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        Err(not_yet("PortService.Watch"))
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
        let port = u16::try_from(first.port).ok().filter(|port| *port > 0);
        let port = port.ok_or_else(|| invalid("port", "must be from 1 to 65535"))?;
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

/// Servers on the loopback are as reachable as any other.
async fn dial(port: u16) -> Result<TcpStream, Status> {
    for host in ["127.0.0.1", "::1"] {
        if let Ok(socket) = TcpStream::connect((host, port)).await {
            // A stream without it is only slower.
            let _ = socket.set_nodelay(true);
            return Ok(socket);
        }
    }
    Err(refuse(
        Code::Unavailable,
        "PORT_CLOSED",
        format!("nobody listens on port {port}"),
    ))
}

fn broken(error: &std::io::Error) -> Status {
    refuse(Code::Aborted, "PORT_BROKE_OFF", error.to_string())
}
