//! What the SDK makes of streams that break, and of connections to ports, against a guest that does as it is told.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use proto::{
    envd::v1::{
        ConfigureRequest, ConfigureResponse, ExportLayerRequest, ExportLayerResponse,
        ForwardRequest, ForwardResponse, GetInfoRequest, GetInfoResponse, Listener,
        PortServiceListRequest, PortServiceListResponse, PortServiceWatchRequest,
        PortServiceWatchResponse, PrepareSnapshotRequest, PrepareSnapshotResponse, ShutdownRequest,
        ShutdownResponse, StreamLogsRequest, StreamLogsResponse, StreamMetricsRequest,
        StreamMetricsResponse, StreamSpansRequest, StreamSpansResponse, WaitForPortRequest,
        WaitForPortResponse,
        port_service_server::{PortService, PortServiceServer},
        system_service_server::{SystemService, SystemServiceServer},
    },
    session::v1::Session,
};
use sdk::{Client, Error, Sandbox};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::mpsc,
};
use tokio_stream::{
    Stream,
    wrappers::{ReceiverStream, TcpListenerStream},
};
use tonic::{Code, Request, Response, Status, Streaming, transport::Server};

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;
type Script<T> = Mutex<VecDeque<Result<Vec<T>, Status>>>;

const LIMIT: Duration = Duration::from_mins(1);

async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, what)
        .await
        .expect("this should have come long ago")
}

/// Answers by a script: what each call gets before it breaks.
#[derive(Default)]
struct Guest {
    listeners: Script<PortServiceWatchResponse>,
    logs: Script<StreamLogsResponse>,
    asked: Mutex<Vec<StreamLogsRequest>>,
}

fn scripted<T: Send + 'static>(script: &Script<T>) -> Result<Response<Answers<T>>, Status> {
    let Some(part) = script.lock().unwrap().pop_front() else {
        let nothing = tokio_stream::pending();
        return Ok(Response::new(Box::pin(nothing)));
    };
    let cut = Err(Status::unavailable("the connection is gone"));
    let part = part?.into_iter().map(Ok).chain([cut]);
    Ok(Response::new(Box::pin(tokio_stream::iter(
        part.collect::<Vec<_>>(),
    ))))
}

#[tonic::async_trait]
impl PortService for Guest {
    type WatchStream = Answers<PortServiceWatchResponse>;
    type ForwardStream = Answers<ForwardResponse>;

    async fn list(
        &self,
        _: Request<PortServiceListRequest>,
    ) -> Result<Response<PortServiceListResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn watch(
        &self,
        _: Request<PortServiceWatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        scripted(&self.listeners)
    }

    async fn wait_for_port(
        &self,
        _: Request<WaitForPortRequest>,
    ) -> Result<Response<WaitForPortResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn forward(
        &self,
        request: Request<Streaming<ForwardRequest>>,
    ) -> Result<Response<Self::ForwardStream>, Status> {
        let mut requests = request.into_inner();
        let port = requests.message().await?.unwrap().port;
        let (to_client, answers) = mpsc::channel(4);
        let data = |bytes: &'static [u8]| {
            Ok(ForwardResponse {
                data: Bytes::from_static(bytes),
            })
        };
        to_client.send(data(b"")).await.unwrap();
        match port {
            ECHO => {
                tokio::spawn(async move {
                    while let Ok(Some(ForwardRequest { data, .. })) = requests.message().await {
                        if to_client.send(Ok(ForwardResponse { data })).await.is_err() {
                            return;
                        }
                    }
                    let _ = to_client.send(data(b" and that is all")).await;
                });
            }
            SAYS_AND_CLOSES => to_client.send(data(b"hello")).await.unwrap(),
            BREAKS_OFF => {
                to_client.send(data(b"hel")).await.unwrap();
                let broken = Status::aborted("the server is gone");
                to_client.send(Err(broken)).await.unwrap();
            }
            port => {
                let closed = format!("nobody listens on port {port}");
                return Err(Status::unavailable(closed));
            }
        }
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }
}

const ECHO: u32 = 7;
const CLOSED: u32 = 8;
const BREAKS_OFF: u32 = 9;
const SAYS_AND_CLOSES: u32 = 13;

#[tonic::async_trait]
impl SystemService for Guest {
    type ExportLayerStream = Answers<ExportLayerResponse>;
    type StreamMetricsStream = Answers<StreamMetricsResponse>;
    type StreamLogsStream = Answers<StreamLogsResponse>;
    type StreamSpansStream = Answers<StreamSpansResponse>;

    async fn configure(
        &self,
        _: Request<ConfigureRequest>,
    ) -> Result<Response<ConfigureResponse>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn prepare_snapshot(
        &self,
        _: Request<PrepareSnapshotRequest>,
    ) -> Result<Response<PrepareSnapshotResponse>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn export_layer(
        &self,
        _: Request<ExportLayerRequest>,
    ) -> Result<Response<Self::ExportLayerStream>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn get_info(
        &self,
        _: Request<GetInfoRequest>,
    ) -> Result<Response<GetInfoResponse>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn stream_metrics(
        &self,
        _: Request<StreamMetricsRequest>,
    ) -> Result<Response<Self::StreamMetricsStream>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn stream_logs(
        &self,
        request: Request<StreamLogsRequest>,
    ) -> Result<Response<Self::StreamLogsStream>, Status> {
        self.asked.lock().unwrap().push(request.into_inner());
        scripted(&self.logs)
    }
    async fn stream_spans(
        &self,
        _: Request<StreamSpansRequest>,
    ) -> Result<Response<Self::StreamSpansStream>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn shutdown(
        &self,
        _: Request<ShutdownRequest>,
    ) -> Result<Response<ShutdownResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}

/// Serves it for as long as the test runs.
async fn sandbox(guest: &Arc<Guest>) -> Sandbox {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let served = Server::builder()
        .add_service(PortServiceServer::from_arc(Arc::clone(guest)))
        .add_service(SystemServiceServer::from_arc(Arc::clone(guest)))
        .serve_with_incoming(TcpListenerStream::new(listener));
    tokio::spawn(served);
    let session = Session::default();
    let client = Client::connect(&endpoint, "").unwrap();
    client.sandbox(&session).unwrap()
}

fn listener(port: u32) -> Listener {
    Listener {
        port,
        ..Listener::default()
    }
}

fn change(opened: &[u32], closed: &[u32]) -> PortServiceWatchResponse {
    PortServiceWatchResponse {
        opened: opened.iter().copied().map(listener).collect(),
        closed: closed.iter().copied().map(listener).collect(),
    }
}

#[tokio::test]
async fn a_watch_that_breaks_tells_only_what_has_changed_meanwhile() {
    let guest = Arc::new(Guest {
        listeners: Mutex::new(VecDeque::from([
            Ok(vec![change(&[1, 2], &[]), change(&[3], &[1])]),
            Ok(vec![]),
            Err(Status::unavailable("not yet")),
            Ok(vec![change(&[2, 3], &[])]),
            Ok(vec![change(&[3, 4, 5, 5], &[]), change(&[], &[5])]),
            Err(Status::not_found("stopped")),
        ])),
        ..Guest::default()
    });
    let mut watch = sandbox(&guest).await.watch_ports();
    for expected in [
        change(&[1, 2], &[]),
        change(&[3], &[1]),
        change(&[4, 5, 5], &[2]),
        change(&[], &[5]),
    ] {
        assert_eq!(soon(watch.next()).await.unwrap(), expected);
    }
    let over = soon(watch.next()).await.unwrap_err();
    assert_eq!(over.code(), Some(Code::NotFound));
}

#[tokio::test]
async fn a_first_answer_without_listeners_is_told_and_later_ones_are_not() {
    let guest = Arc::new(Guest {
        listeners: Mutex::new(VecDeque::from([
            Ok(vec![change(&[], &[])]),
            Ok(vec![change(&[], &[])]),
            Ok(vec![change(&[1], &[])]),
        ])),
        ..Guest::default()
    });
    let mut watch = sandbox(&guest).await.watch_ports();
    for expected in [change(&[], &[]), change(&[1], &[])] {
        assert_eq!(soon(watch.next()).await.unwrap(), expected);
    }
}

fn message(sequence: u64) -> StreamLogsResponse {
    StreamLogsResponse {
        sequence,
        ..StreamLogsResponse::default()
    }
}

#[tokio::test]
async fn logs_that_break_are_taken_up_after_the_last_message() {
    let guest = Arc::new(Guest {
        logs: Mutex::new(VecDeque::from([
            Ok(vec![message(5), message(6)]),
            Ok(vec![]),
            Ok(vec![message(7)]),
            Err(Status::out_of_range("gone back")),
        ])),
        ..Guest::default()
    });
    let mut logs = sandbox(&guest).await.logs(4, true);
    for sequence in 5..=7 {
        let told = soon(logs.next()).await.unwrap().unwrap();
        assert_eq!(told.sequence, sequence);
    }
    let over = soon(logs.next()).await.unwrap_err();
    assert_eq!(over.code(), Some(Code::OutOfRange));
    let asked = guest.asked.lock().unwrap();
    let after: Vec<u64> = asked.iter().map(|asked| asked.after_sequence).collect();
    assert_eq!(after, [4, 6, 6, 7]);
    assert!(asked.iter().all(|asked| asked.follow == Some(true)));
}

/// A forwarded port, and what was said of connections that failed.
async fn forwarded(
    guest: &Arc<Guest>,
    port: u32,
) -> (std::net::SocketAddr, mpsc::UnboundedReceiver<Error>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let sandbox = sandbox(guest).await;
    let (failed, failures) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        let port = port.try_into().unwrap();
        let failed = move |_, error| failed.send(error).unwrap();
        sandbox.forward_all(port, listener, failed).await;
    });
    (address, failures)
}

#[tokio::test]
async fn what_is_sent_before_the_end_is_answered_after_it_on_many_connections_at_once() {
    let guest = Arc::default();
    let (address, mut failures) = forwarded(&guest, ECHO).await;
    let connections = (0..50).map(|number| async move {
        let mut socket = TcpStream::connect(address).await.unwrap();
        let sent = vec![number; 300_000];
        let (mut read, mut write) = socket.split();
        let send = async {
            write.write_all(&sent).await.unwrap();
            write.shutdown().await.unwrap();
        };
        let mut answered = Vec::new();
        let ((), answer) = tokio::join!(send, read.read_to_end(&mut answered));
        answer.unwrap();
        assert!(answered.strip_suffix(b" and that is all") == Some(sent.as_slice()));
    });
    let mut connections: tokio::task::JoinSet<()> = connections.collect();
    while let Some(done) = soon(connections.join_next()).await {
        done.unwrap();
    }
    assert!(failures.try_recv().is_err());
}

#[tokio::test]
async fn a_port_that_has_said_all_ends_the_connection_and_one_that_broke_breaks_it() {
    let guest = Arc::default();
    let (address, mut failures) = forwarded(&guest, SAYS_AND_CLOSES).await;
    let mut socket = TcpStream::connect(address).await.unwrap();
    let mut answered = Vec::new();
    soon(socket.read_to_end(&mut answered)).await.unwrap();
    assert_eq!(answered, b"hello");
    assert!(failures.try_recv().is_err());

    let (address, mut failures) = forwarded(&guest, BREAKS_OFF).await;
    let mut socket = TcpStream::connect(address).await.unwrap();
    let read = soon(socket.read_to_end(&mut Vec::new())).await;
    assert_eq!(
        read.unwrap_err().kind(),
        std::io::ErrorKind::ConnectionReset
    );
    let failed = soon(failures.recv()).await.unwrap();
    assert_eq!(failed.code(), Some(Code::Aborted));
}

#[tokio::test]
async fn a_closed_port_is_told_for_each_connection_and_the_next_is_still_taken() {
    let guest = Arc::default();
    let (address, mut failures) = forwarded(&guest, CLOSED).await;
    for _ in 0..3 {
        let mut socket = TcpStream::connect(address).await.unwrap();
        let read = soon(socket.read(&mut [0])).await;
        assert!(read.is_err(), "{read:?}");
        let failed = soon(failures.recv()).await.unwrap();
        assert!(failed.to_string().contains("port 8"), "{failed}");
    }
}
