//! Ports: who listens, and connections to them.

use std::time::Duration;

use bytes::Bytes;
use futures::stream;
use proto::envd::v1::{
    ForwardRequest, ForwardResponse, Listener, PortServiceListRequest, StartRequest, StdinMode,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use crate::world::{World, argv, field, noise, soon, why};

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
    let files = "ls /proc/1/fd | wc -l";
    let before = world.printed(files).await;
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
        .until_so(&format!("[ $({files}) -le {} ]", before.trim()))
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
