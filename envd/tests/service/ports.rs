//! Ports: who listens, and connections to them.

use std::{pin::pin, time::Duration};

use bytes::Bytes;
use futures::stream;
use proto::envd::v1::{
    ForwardRequest, ForwardResponse, Listener, PortServiceListRequest, PortServiceWatchRequest,
    PortServiceWatchResponse, PrepareSnapshotRequest, StartRequest, StdinMode, WaitForPortRequest,
    WaitForPortResponse,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::mpsc,
    time::Instant,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};
use tonic_types::StatusExt as _;

use crate::world::{OPEN_FILES, World, argv, configuration, field, noise, soon, why};

async fn listeners(world: &World) -> Vec<Listener> {
    let answer = soon(world.ports().list(PortServiceListRequest {})).await;
    answer.unwrap().into_inner().listeners
}

fn part(port: u32, data: &[u8]) -> ForwardRequest {
    ForwardRequest {
        port,
        data: Bytes::copy_from_slice(data),
    }
}

/// A connection through envd.
struct Forward {
    to_port: mpsc::Sender<ForwardRequest>,
    answers: Streaming<ForwardResponse>,
}

impl Forward {
    async fn open(world: &World, first: ForwardRequest) -> Result<Self, Status> {
        let (to_port, requests) = mpsc::channel(4);
        to_port.send(first).await.unwrap();
        let answers = soon(world.ports().forward(ReceiverStream::new(requests))).await?;
        let mut answers = answers.into_inner();
        let stands = soon(answers.message()).await?.unwrap();
        assert!(stands.data.is_empty(), "the first answer holds no data");
        Ok(Self { to_port, answers })
    }

    async fn send(&self, data: &[u8]) {
        soon(self.to_port.send(part(0, data))).await.unwrap();
    }

    async fn read(&mut self, count: usize) -> Vec<u8> {
        let mut read = Vec::new();
        while read.len() < count {
            let answer = soon(self.answers.message()).await.unwrap();
            read.extend_from_slice(&answer.expect("more bytes").data);
        }
        read
    }
}

async fn listen() -> (TcpListener, u32) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port.into())
}

async fn pair(world: &World) -> (Forward, TcpStream) {
    let (listener, port) = listen().await;
    let forward = Forward::open(world, part(port, b"")).await.unwrap();
    let (socket, _) = soon(listener.accept()).await.unwrap();
    (forward, socket)
}

#[tokio::test]
async fn listeners_show_with_address_port_and_process_while_they_listen() {
    let world = World::new().await;
    let script = "use IO::Socket::INET; $| = 1; \
        my @s = map { IO::Socket::INET->new(Listen => 1, LocalAddr => $_, LocalPort => 0) } ('127.0.0.1', '0.0.0.0'); \
        print join(' ', map { $_->sockport } @s), \"\\n\"; <STDIN>; close $s[0]; print \"closed\\n\"; <STDIN>";
    let mut perl = world
        .start(StartRequest {
            stdin: StdinMode::Pipe.into(),
            ..argv(&["perl", "-e", script])
        })
        .await;
    while !perl.seen().stdout.ends_with(b"\n") {
        assert!(perl.step().await.unwrap(), "{:?}", perl.seen());
    }
    let text = String::from_utf8(perl.seen().stdout.clone()).unwrap();
    let ports: Vec<u32> = text
        .split_whitespace()
        .map(|port| port.parse().unwrap())
        .collect();
    let found = listeners(&world).await;
    for (port, address) in ports.iter().zip(["127.0.0.1", "0.0.0.0"]) {
        let expected = Listener {
            address: address.into(),
            port: *port,
            pid: perl.started.pid,
            command: "perl".into(),
        };
        assert!(found.contains(&expected), "{expected:?} in {found:?}");
    }
    assert!(found.is_sorted_by_key(|listener| listener.port));

    let input = proto::envd::v1::SendInputRequest {
        process_id: perl.id().into(),
        data: Bytes::from_static(b"\n"),
        offset: None,
    };
    soon(world.processes().send_input(input)).await.unwrap();
    perl.read(text.len() + 7).await;
    let now: Vec<u32> = listeners(&world)
        .await
        .iter()
        .map(|listener| listener.port)
        .collect();
    assert!(
        !now.contains(&ports[0]) && now.contains(&ports[1]),
        "{ports:?} {now:?}"
    );
}

#[tokio::test]
async fn a_closed_port_is_told_from_a_bad_one() {
    let world = World::new().await;
    let (listener, port) = listen().await;
    drop(listener);
    let status = Forward::open(&world, part(port, b"")).await.err().unwrap();
    assert_eq!(why(&status), (Code::Unavailable, "PORT_CLOSED".into()));
    assert!(status.message().contains(&port.to_string()));
    for port in [0, 65536, u32::MAX] {
        let status = Forward::open(&world, part(port, b"")).await.err().unwrap();
        assert_eq!(field(&status), "port");
    }
    let nothing = stream::empty::<ForwardRequest>();
    let status = soon(world.ports().forward(nothing)).await.unwrap_err();
    assert_eq!(field(&status), "port");
}

#[tokio::test]
async fn any_bytes_pass_both_ways_whole_and_in_order() {
    let world = World::new().await;
    let (mut forward, socket) = pair(&world).await;
    let echo = tokio::spawn(async move {
        let (mut from, mut to) = socket.into_split();
        tokio::io::copy(&mut from, &mut to).await.unwrap()
    });
    let sent = noise(3 << 20);
    let to_port = forward.to_port.clone();
    let chunks = sent.clone();
    let writer = tokio::spawn(async move {
        for chunk in chunks.chunks(50_001) {
            to_port.send(part(0, chunk)).await.unwrap();
        }
    });
    assert!(forward.read(sent.len()).await == sent);
    writer.await.unwrap();
    drop(forward);
    assert_eq!(soon(echo).await.unwrap(), sent.len() as u64);
}

#[tokio::test]
async fn bytes_sent_with_the_port_are_not_lost() {
    let world = World::new().await;
    let (listener, port) = listen().await;
    let forward = Forward::open(&world, part(port, b"early")).await.unwrap();
    forward.send(b" late").await;
    let (mut socket, _) = soon(listener.accept()).await.unwrap();
    let mut read = [0; 10];
    soon(socket.read_exact(&mut read)).await.unwrap();
    assert_eq!(&read, b"early late");
}

#[tokio::test]
async fn a_client_that_has_said_all_still_gets_the_answer() {
    let world = World::new().await;
    let (forward, mut socket) = pair(&world).await;
    forward.send(b"question").await;
    let Forward {
        to_port,
        mut answers,
    } = forward;
    drop(to_port);
    let mut asked = Vec::new();
    soon(socket.read_to_end(&mut asked)).await.unwrap();
    socket.write_all(b"answer").await.unwrap();
    drop(socket);
    let answer = soon(answers.message()).await.unwrap().unwrap();
    assert_eq!(
        (asked.as_slice(), &answer.data[..]),
        (&b"question"[..], &b"answer"[..])
    );
    assert!(soon(answers.message()).await.unwrap().is_none());
}

#[tokio::test]
async fn a_server_that_closes_ends_the_stream_while_the_client_is_still_open() {
    let world = World::new().await;
    let (mut forward, mut socket) = pair(&world).await;
    socket
        .write_all(b"HTTP/1.0 200 OK\r\n\r\nall")
        .await
        .unwrap();
    drop(socket);
    assert_eq!(forward.read(22).await, b"HTTP/1.0 200 OK\r\n\r\nall");
    assert!(soon(forward.answers.message()).await.unwrap().is_none());
    drop(forward.to_port);
}

#[tokio::test]
async fn a_client_that_vanishes_closes_the_connection() {
    let mut world = World::new().await;
    let (forward, mut socket) = pair(&world).await;
    drop(forward);
    // An end or a reset, as the kernel likes.
    assert!(matches!(
        soon(socket.read(&mut [0; 1])).await,
        Ok(0) | Err(_)
    ));
    let (_forward, mut socket) = pair(&world).await;
    world.disconnect().await;
    assert!(matches!(
        soon(socket.read(&mut [0; 1])).await,
        Ok(0) | Err(_)
    ));
}

#[tokio::test]
async fn a_client_that_vanishes_leaves_no_connection_to_a_server_that_does_not_read() {
    let mut world = World::new().await;
    let before = world.printed(OPEN_FILES).await;
    // What was printed is kept.
    let before: u32 = before.trim().parse::<u32>().unwrap() + 1;
    let (forward, _socket) = pair(&world).await;
    let megabyte = vec![0; 1 << 20];
    let stuck = async {
        for _ in 0..64 {
            forward.send(&megabyte).await;
        }
    };
    let stuck = tokio::time::timeout(Duration::from_millis(500), stuck).await;
    assert!(stuck.is_err());
    world.reconnect().await;
    world
        .until_so(&format!("[ $({OPEN_FILES}) -le {before} ]"))
        .await;
}

#[tokio::test]
async fn a_server_that_does_not_read_holds_its_client_back_and_nobody_else() {
    let world = World::new().await;
    let (forward, _socket) = pair(&world).await;
    // What is underway is bounded by windows and socket buffers, not by what the client has.
    let held_back = async {
        let megabyte = vec![0; 1 << 20];
        let mut sent = 0;
        let send = || forward.to_port.send(part(0, &megabyte));
        while tokio::time::timeout(Duration::from_secs(1), send())
            .await
            .is_ok()
        {
            sent += 1;
            assert!(sent < 64, "nobody holds it back");
        }
    };
    let (mut other, mut socket) = pair(&world).await;
    let others = async {
        for _ in 0..100 {
            other.send(b"ping").await;
            soon(socket.read_exact(&mut [0; 4])).await.unwrap();
            soon(socket.write_all(b"pong")).await.unwrap();
            assert_eq!(other.read(4).await, b"pong");
        }
    };
    tokio::join!(held_back, others);
}

#[tokio::test]
async fn a_server_on_ipv6_loopback_alone_is_reached_too() {
    let world = World::new().await;
    let Ok(listener) = TcpListener::bind("[::1]:0").await else {
        return; // A machine without IPv6.
    };
    let port = listener.local_addr().unwrap().port().into();
    assert!(
        listeners(&world)
            .await
            .iter()
            .any(|l| l.port == port && l.address == "::1")
    );
    let forward = Forward::open(&world, part(port, b"six")).await.unwrap();
    let (mut socket, _) = soon(listener.accept()).await.unwrap();
    let mut read = [0; 3];
    soon(socket.read_exact(&mut read)).await.unwrap();
    assert_eq!(&read, b"six");
    drop(forward);
}

/// What is told of listeners. Other tests listen as well, so each asks for its own port.
struct Watch(Streaming<PortServiceWatchResponse>);

impl Watch {
    /// With what is told first.
    async fn open(world: &World) -> (Self, PortServiceWatchResponse) {
        let answers = soon(world.ports().watch(PortServiceWatchRequest {})).await;
        let mut watch = Self(answers.unwrap().into_inner());
        let first = watch.next().await;
        assert!(first.closed.is_empty());
        (watch, first)
    }

    async fn next(&mut self) -> PortServiceWatchResponse {
        soon(self.0.message()).await.unwrap().unwrap()
    }

    async fn opened(&mut self, port: u32) -> Listener {
        loop {
            let changes = self.next().await;
            assert!(!changes.closed.iter().any(|closed| closed.port == port));
            if let Some(opened) = on(port, changes.opened) {
                return opened;
            }
        }
    }

    async fn closed(&mut self, port: u32) -> Listener {
        loop {
            let changes = self.next().await;
            assert!(!changes.opened.iter().any(|opened| opened.port == port));
            if let Some(closed) = on(port, changes.closed) {
                return closed;
            }
        }
    }
}

fn on(port: u32, listeners: Vec<Listener>) -> Option<Listener> {
    let mut found = listeners
        .into_iter()
        .filter(|listener| listener.port == port);
    let one = found.next();
    assert!(found.next().is_none(), "told twice");
    one
}

#[tokio::test]
async fn listeners_are_told_as_they_open_and_close_in_less_than_200_ms() {
    let world = World::new().await;
    let (mut watch, _) = Watch::open(&world).await;
    let (mut open, mut close) = (Vec::new(), Vec::new());
    for address in ["127.0.0.1", "::1", "0.0.0.0", "::"].repeat(3) {
        let listener = TcpListener::bind((address, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port().into();
        let began = Instant::now();
        let told = watch.opened(port).await;
        open.push(began.elapsed());
        assert_eq!((told.address.as_str(), told.port), (address, port));
        // One that is told of already is what new watchers begin with.
        let (_, first) = Watch::open(&world).await;
        assert_eq!(on(port, first.opened), Some(told.clone()));
        drop(listener);
        let began = Instant::now();
        assert_eq!(watch.closed(port).await, told);
        close.push(began.elapsed());
    }
    // A machine that is busy otherwise is late at times, but not mostly.
    for mut times in [open, close] {
        times.sort();
        let median = times[times.len() / 2];
        assert!(median < Duration::from_millis(200), "{times:?}");
    }
}

#[tokio::test]
async fn a_watched_listener_has_its_process_and_goes_with_it() {
    let world = World::new().await;
    let (mut watch, _) = Watch::open(&world).await;
    let script = "use IO::Socket::INET; $| = 1; \
        my $s = IO::Socket::INET->new(Listen => 1, LocalAddr => '127.0.0.1', LocalPort => 0); \
        print $s->sockport, \"\\n\"; sleep 1000";
    let mut perl = world.start(argv(&["perl", "-e", script])).await;
    while !perl.seen().stdout.ends_with(b"\n") {
        assert!(perl.step().await.unwrap(), "{:?}", perl.seen());
    }
    let port = str::from_utf8(&perl.seen().stdout).unwrap().trim().parse();
    let port = port.unwrap();
    let told = watch.opened(port).await;
    assert_eq!(
        (told.pid, told.command.as_str()),
        (perl.started.pid, "perl")
    );
    let kill = proto::envd::v1::SignalRequest {
        process_id: perl.id().into(),
        signal: 9,
        target: 0,
    };
    soon(world.processes().signal(kill)).await.unwrap();
    assert_eq!(watch.closed(port).await, told);
}

#[tokio::test]
async fn a_watch_goes_on_over_a_snapshot_and_over_another_watchers_end() {
    let mut world = World::new().await;
    let (mut watch, _) = Watch::open(&world).await;
    let (other, _) = Watch::open(&world).await;
    drop(other);
    let (listener, before) = listen().await;
    watch.opened(before).await;
    let prepare = PrepareSnapshotRequest::default();
    soon(world.system().prepare_snapshot(prepare))
        .await
        .unwrap();
    drop(listener);
    let (_listener, after) = listen().await;
    soon(world.system().configure(configuration()))
        .await
        .unwrap();
    let changes = loop {
        let changes = watch.next().await;
        if changes.closed.iter().any(|closed| closed.port == before) {
            break changes;
        }
    };
    assert!(on(after, changes.opened).is_some());
    world.reconnect().await;
    let (_, first) = Watch::open(&world).await;
    assert!(on(after, first.opened).is_some());
}

async fn wait(
    world: &World,
    port: u32,
    http_path: &str,
    timeout: Option<Duration>,
) -> Result<WaitForPortResponse, Status> {
    let request = WaitForPortRequest {
        port,
        http_path: http_path.into(),
        timeout: timeout.map(|timeout| timeout.try_into().unwrap()),
    };
    let answer = soon(world.ports().wait_for_port(request)).await?;
    Ok(answer.into_inner())
}

#[tokio::test]
async fn a_port_that_is_there_is_not_waited_for_and_one_that_comes_is() {
    let world = World::new().await;
    for address in ["127.0.0.1", "::1", "0.0.0.0", "::"] {
        let any = std::net::SocketAddr::new(address.parse().unwrap(), 0);
        let socket = if any.is_ipv4() {
            TcpSocket::new_v4()
        } else {
            TcpSocket::new_v6()
        };
        let socket = socket.unwrap();
        socket.bind(any).unwrap();
        let port = socket.local_addr().unwrap().port().into();
        let mut waiting = pin!(wait(&world, port, "", None));
        let early = tokio::time::timeout(Duration::from_millis(300), &mut waiting).await;
        assert!(early.is_err(), "{early:?}");
        let _listener = socket.listen(1).unwrap();
        let told = waiting.await.unwrap();
        let listener = told.listener.unwrap();
        assert_eq!(
            (listener.address.as_str(), listener.port, told.http_status),
            (address, port, 0)
        );
        let again = wait(&world, port, "", Some(Duration::from_millis(1))).await;
        assert_eq!(again.unwrap().listener, Some(listener));
    }
}

#[tokio::test]
async fn a_wait_in_vain_names_the_port_and_what_was_answered() {
    let world = World::new().await;
    let patience = Duration::from_millis(300);
    let unopened = TcpSocket::new_v4().unwrap();
    unopened.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let unopened = unopened.local_addr().unwrap().port().into();
    let (listener, open) = listen().await;
    let served = tokio::spawn(async move {
        'next: loop {
            let (mut socket, _) = listener.accept().await.unwrap();
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                match socket.read_u8().await {
                    Ok(byte) => head.push(byte),
                    // Whoever asked had no more time.
                    Err(_) => continue 'next,
                }
            }
            let answer = if head.starts_with(b"GET /good ") {
                "HTTP/1.1 204 No Content\r\n\r\n"
            } else {
                "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n"
            };
            // As above.
            let _ = socket.write_all(answer.as_bytes()).await;
        }
    });
    for (port, path, words) in [
        (unopened, "", "nobody listens"),
        (unopened, "/good", "nobody listens"),
        (open, "/bad", "GET /bad was answered with 503"),
    ] {
        let began = Instant::now();
        let status = wait(&world, port, path, Some(patience)).await.unwrap_err();
        assert!(began.elapsed() >= patience);
        assert_eq!(why(&status), (Code::DeadlineExceeded, "PORT_CLOSED".into()));
        assert!(status.message().contains(words), "{status:?}");
        let facts = status.get_details_error_info().unwrap().metadata;
        assert_eq!(facts["port"], port.to_string());
    }
    let ready = wait(&world, open, "/good", None).await.unwrap();
    assert_eq!(ready.http_status, 204);
    served.abort();
}

#[tokio::test]
async fn a_bad_wait_is_refused_and_its_field_named() {
    let world = World::new().await;
    let long = format!("/{}", "x".repeat(2048));
    for (named, port, path) in [
        ("port", 0, ""),
        ("port", 65536, ""),
        ("http_path", 80, "health"),
        ("http_path", 80, "http://elsewhere/"),
        ("http_path", 80, "/a b"),
        ("http_path", 80, "/a\r\nx: y"),
        ("http_path", 80, &long),
    ] {
        let status = wait(&world, port, path, None).await.unwrap_err();
        assert_eq!(field(&status), named, "{port} {path}");
    }
    for (seconds, nanos) in [(0, 0), (-1, 0), (600, 1), (i64::MAX, 0)] {
        let request = WaitForPortRequest {
            port: 80,
            timeout: Some(prost_types::Duration { seconds, nanos }),
            ..WaitForPortRequest::default()
        };
        let status = soon(world.ports().wait_for_port(request)).await;
        assert_eq!(field(&status.unwrap_err()), "timeout");
    }
}
