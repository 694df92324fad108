//! Ports of the sandbox: who listens, waiting for one, and connections from here to one.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use proto::envd::v1::{
    ForwardRequest, Listener, PortServiceListRequest, PortServiceWatchRequest,
    PortServiceWatchResponse, WaitForPortRequest, WaitForPortResponse,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::mpsc,
    task::JoinSet,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use crate::{Error, Sandbox, resumed::Resumed};

const CHUNK: usize = 64 << 10;
const IN_FLIGHT: usize = 4;
/// After a connection could not be taken, as when there are no descriptors left.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

impl Sandbox {
    /// Who listens on which port.
    pub async fn ports(&self) -> Result<Vec<Listener>, Error> {
        Ok(self
            .port_service()
            .list(PortServiceListRequest {})
            .await?
            .into_inner()
            .listeners)
    }

    /// Who listens, and then each change.
    pub fn watch_ports(&self) -> PortWatch {
        PortWatch {
            sandbox: self.clone(),
            stream: Resumed::default(),
            told: None,
        }
    }

    /// Waits until somebody listens on a port, and if a path is given, until a GET of it is answered with 2xx or 3xx. By default for 30 s, then
    /// the error's reason is `PORT_CLOSED`.
    pub async fn wait_for_port(
        &self,
        port: u16,
        http_path: Option<&str>,
        timeout: Option<Duration>,
    ) -> Result<WaitForPortResponse, Error> {
        let request = WaitForPortRequest {
            port: port.into(),
            timeout: timeout.and_then(|timeout| prost_types::Duration::try_from(timeout).ok()),
            http_path: http_path.unwrap_or_default().into(),
        };
        let answer = self.port_service().wait_for_port(request).await?;
        Ok(answer.into_inner())
    }

    /// Carries one connection to a port of the sandbox, until both sides have said all they will. A connection that breaks there is broken off
    /// here, too, and not ended as if that had been all.
    pub async fn forward(&self, port: u16, socket: TcpStream) -> Result<(), Error> {
        // A connection without it is only slower.
        let _ = socket.set_nodelay(true);
        let (to_port, requests) = mpsc::channel(IN_FLIGHT);
        let first = ForwardRequest {
            port: port.into(),
            data: Bytes::new(),
        };
        // The channel is new, so there is room.
        let _ = to_port.try_send(first);
        let mut ports = self.port_service();
        let answers = match ports.forward(ReceiverStream::new(requests)).await {
            Ok(answers) => answers.into_inner(),
            Err(status) => {
                break_off(&socket);
                return Err(status.into());
            }
        };
        let (mut read, mut write) = socket.into_split();
        let carried = tokio::try_join!(inward(&mut read, to_port), outward(answers, &mut write));
        if carried.is_err()
            && let Ok(socket) = read.reunite(write)
        {
            break_off(&socket);
        }
        carried.map(|((), ())| ())
    }

    /// Carries every connection to a local listener to a port of the sandbox, for as long as it is polled. `failed` hears of those that fail.
    pub async fn forward_all(
        &self,
        port: u16,
        listener: TcpListener,
        failed: impl Fn(SocketAddr, Error) + Send + Sync + 'static,
    ) {
        let failed = Arc::new(failed);
        let mut connections = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                Some(_) = connections.join_next() => continue,
            };
            match accepted {
                Ok((socket, peer)) => {
                    let (sandbox, failed) = (self.clone(), Arc::clone(&failed));
                    connections.spawn(async move {
                        if let Err(error) = sandbox.forward(port, socket).await {
                            failed(peer, error);
                        }
                    });
                }
                Err(error) => {
                    let here = ([0, 0, 0, 0], 0).into();
                    failed(listener.local_addr().unwrap_or(here), error.into());
                    tokio::time::sleep(ACCEPT_AGAIN).await;
                }
            }
        }
    }
}

/// When it is dropped, the other side gets a reset.
fn break_off(socket: &TcpStream) {
    // Without it, it is only less clear.
    let _ = socket.set_zero_linger();
}

/// Until the local side has said all, or nobody takes more.
async fn inward(from: &mut OwnedReadHalf, to: mpsc::Sender<ForwardRequest>) -> Result<(), Error> {
    loop {
        let mut chunk = BytesMut::with_capacity(CHUNK);
        let read = tokio::select! {
            read = from.read_buf(&mut chunk) => read?,
            () = to.closed() => return Ok(()),
        };
        if read == 0 {
            return Ok(());
        }
        let part = ForwardRequest {
            port: 0,
            data: chunk.freeze(),
        };
        if to.send(part).await.is_err() {
            return Ok(());
        }
    }
}

/// Until the port has said all.
async fn outward(
    mut from: Streaming<proto::envd::v1::ForwardResponse>,
    to: &mut OwnedWriteHalf,
) -> Result<(), Error> {
    while let Some(part) = from.message().await? {
        to.write_all(&part.data).await?;
    }
    // One that has gone already needs no end.
    let _ = to.shutdown().await;
    Ok(())
}

/// Listeners and their changes; taken up again when the connection breaks.
pub struct PortWatch {
    sandbox: Sandbox,
    stream: Resumed<PortServiceWatchResponse>,
    /// What the caller was told last, if anything.
    told: Option<Vec<Listener>>,
}

impl std::fmt::Debug for PortWatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PortWatch").finish_non_exhaustive()
    }
}

impl PortWatch {
    /// All listeners as opened at first, then what has changed since the last time. It ends by an error only.
    pub async fn next(&mut self) -> Result<PortServiceWatchResponse, Error> {
        loop {
            let sandbox = &self.sandbox;
            let open = async || {
                let mut ports = sandbox.port_service();
                ports.watch(PortServiceWatchRequest {}).await
            };
            let (mut changes, is_whole) = self
                .stream
                .next(open)
                .await?
                .ok_or(Error::Incomplete("the rest of the changes"))?;
            let Some(told) = &mut self.told else {
                self.told = Some(changes.opened.clone());
                return Ok(changes);
            };
            if is_whole {
                // What was told over the connection before is not told again.
                changes.closed = without(told, &changes.opened);
                changes.opened = without(&changes.opened, told);
            }
            *told = without(told, &changes.closed);
            told.extend(changes.opened.iter().cloned());
            if !changes.opened.is_empty() || !changes.closed.is_empty() {
                return Ok(changes);
            }
        }
    }
}

/// Some without others; one that is there twice goes once for each.
fn without(some: &[Listener], others: &[Listener]) -> Vec<Listener> {
    let mut others = others.to_vec();
    let mut left = some.to_vec();
    left.retain(|one| {
        let same = others.iter().position(|other| other == one);
        same.map(|index| others.swap_remove(index)).is_none()
    });
    left
}
