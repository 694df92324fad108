//! A TCP connection inside the guest, as bytes: `PortService.Forward` behind `AsyncRead` and `AsyncWrite`.

use std::time::Duration;

use bytes::Bytes;
use futures::{SinkExt as _, StreamExt as _};
use proto::envd::v1::ForwardRequest;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::io::{CopyToBytes, SinkWriter, StreamReader};
use tokio_util::sync::PollSender;
use tonic::{Request, Status};

use crate::guest::GuestClient;

const OPEN_TIMEOUT: Duration = Duration::from_secs(5);
const IN_FLIGHT: usize = 16;

/// Opens a connection to a port of the guest's loopback.
pub(in crate::ingress) async fn open(
    guest: &GuestClient,
    port: u16,
) -> Result<impl AsyncRead + AsyncWrite + Send + Unpin + use<>, Status> {
    let (to_guest, requests) = tokio::sync::mpsc::channel(IN_FLIGHT);
    let first = ForwardRequest {
        port: port.into(),
        data: Bytes::new(),
    };
    // The channel is empty and open.
    let _ = to_guest.try_send(first);
    let opened = async {
        let mut answers = guest
            .ports()
            .forward(Request::new(ReceiverStream::new(requests)))
            .await?
            .into_inner();
        // The first answer says that the connection stands.
        answers
            .message()
            .await?
            .ok_or_else(|| Status::unavailable("the guest closed the connection"))?;
        Ok::<_, Status>(answers)
    };
    let answers = tokio::time::timeout(OPEN_TIMEOUT, opened)
        .await
        .map_err(|_| Status::deadline_exceeded("the guest did not connect in time"))??;
    let read =
        StreamReader::new(Box::pin(answers.map(|answer| {
            answer.map(|part| part.data).map_err(std::io::Error::other)
        })));
    // A guest that stops reading makes this sink wait, and so the client.
    let sink = PollSender::new(to_guest)
        .sink_map_err(std::io::Error::other)
        .with(|data: Bytes| {
            std::future::ready(Ok::<_, std::io::Error>(ForwardRequest { port: 0, data }))
        });
    let write = SinkWriter::new(CopyToBytes::new(Box::pin(sink)));
    Ok(tokio::io::join(read, write))
}
