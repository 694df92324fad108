//! What the link promises, each promise under attack.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::{io, time::Duration};

use bytes::{Bytes, BytesMut};
use guest_link::{
    Epoch,
    frame::{self, Decoder, Frame, Kind},
    guest::{self, Channel, Listener},
    host::{self, ConnectError},
};
use http_body_util::{BodyExt as _, Full, combinators::BoxBody};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream},
    sync::mpsc,
    time::Instant,
};

/// A channel whose hosts a test makes; with `lingering`, a host's going is not told, as over a snapshot.
struct TestChannel {
    hosts: mpsc::UnboundedReceiver<DuplexStream>,
    next: Option<DuplexStream>,
}

struct Hosts(mpsc::UnboundedSender<DuplexStream>);

impl Hosts {
    fn connect(&self) -> DuplexStream {
        let (ours, guests) = tokio::io::duplex(64 * 1024);
        self.0.send(guests).unwrap();
        ours
    }
}

fn channel() -> (Hosts, TestChannel) {
    let (sender, hosts) = mpsc::unbounded_channel();
    (Hosts(sender), TestChannel { hosts, next: None })
}

impl Channel for TestChannel {
    type Stream = DuplexStream;

    fn connected(&mut self) -> io::Result<Option<DuplexStream>> {
        Ok(self.next.take())
    }

    async fn wait(&mut self) -> io::Result<()> {
        match self.hosts.recv().await {
            Some(host) => self.next = Some(host),
            None => std::future::pending().await,
        }
        Ok(())
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

/// Sends back what it gets, one link at a time.
async fn echo(mut listener: Listener) {
    loop {
        let link = listener.accept().await;
        tokio::spawn(async move {
            let (mut from, mut to) = tokio::io::split(link);
            let _ = tokio::io::copy(&mut from, &mut to).await;
            let _ = to.shutdown().await;
        });
    }
}

async fn next_frame(stream: &mut DuplexStream, decoder: &mut Decoder) -> Frame {
    loop {
        if let Some(frame) = decoder.next_frame() {
            return frame;
        }
        assert!(
            stream.read_buf(decoder.space()).await.unwrap() > 0,
            "channel ended"
        );
    }
}

fn hello(epoch: Epoch) -> BytesMut {
    let mut out = BytesMut::new();
    frame::put_control(&mut out, Kind::Hello, epoch, 0);
    out
}

fn data(epoch: Epoch, sequence: u32, bytes: &[u8]) -> BytesMut {
    let mut out = BytesMut::new();
    frame::put_data(&mut out, epoch, sequence, &[io::IoSlice::new(bytes)]);
    out
}

#[tokio::test]
async fn bytes_go_both_ways_and_each_direction_ends_alone() {
    let (hosts, channel) = channel();
    tokio::spawn(echo(Listener::new(channel)));
    let mut link = host::connect(hosts.connect(), soon()).await.unwrap();
    link.write_all(b"there and back").await.unwrap();
    link.shutdown().await.unwrap();
    let mut back = Vec::new();
    link.read_to_end(&mut back).await.unwrap();
    assert_eq!(back, b"there and back");
}

#[tokio::test]
async fn a_silent_guest_is_given_up_at_the_deadline() {
    let (ours, _guest) = tokio::io::duplex(1024);
    let deadline = Instant::now() + Duration::from_millis(60);
    let error = host::connect(ours, deadline).await.unwrap_err();
    assert!(matches!(error, ConnectError::NoAnswer { greetings, .. } if greetings > 0));
    assert!(Instant::now() < deadline + Duration::from_millis(500));
}

#[tokio::test]
async fn a_guest_that_comes_late_answers_at_once() {
    let (ours, guest) = tokio::io::duplex(256 * 1024);
    let connecting = tokio::spawn(host::connect(ours, soon()));
    tokio::time::sleep(Duration::from_millis(100)).await;
    let (sender, hosts) = mpsc::unbounded_channel();
    sender.send(guest).unwrap();
    let mut listener = Listener::new(TestChannel { hosts, next: None });
    let accepted = listener.accept().await;
    let link = connecting.await.unwrap().unwrap();
    assert_eq!(link.epoch(), accepted.epoch());
}

#[tokio::test]
async fn a_vanished_vmm_is_told_apart_from_silence() {
    let (ours, guest) = tokio::io::duplex(1024);
    drop(guest);
    let error = host::connect(ours, soon()).await.unwrap_err();
    assert!(matches!(
        error,
        ConnectError::Closed | ConnectError::Channel(_)
    ));
}

#[tokio::test]
async fn garbage_before_the_greeting_and_the_answer_is_skipped() {
    let (hosts, channel) = channel();
    tokio::spawn(echo(Listener::new(channel)));
    let mut raw = hosts.connect();
    raw.write_all(&[0x89; 5000]).await.unwrap();
    raw.write_all(b"SeaBIOS (version 1.16)\r\n").await.unwrap();
    let mut link = host::connect(raw, soon()).await.unwrap();
    link.write_all(b"ok").await.unwrap();
    let mut two = [0; 2];
    link.read_exact(&mut two).await.unwrap();
    assert_eq!(&two, b"ok");
}

#[tokio::test]
async fn a_half_frame_of_a_dead_host_swallows_no_greeting() {
    // The guest does not notice the change of hosts, as when a snapshot taken in the middle of a frame is restored.
    let (hosts, channel) = channel();
    let mut listener = Listener::new(channel);
    let mut raw = hosts.connect();
    let old = Epoch::random();
    raw.write_all(&hello(old)).await.unwrap();
    let mut old_link = listener.accept().await;
    raw.write_all(&data(old, 0, b"whole")).await.unwrap();
    let half = data(old, 1, &vec![7; 60_000]);
    raw.write_all(&half[..40_000]).await.unwrap();

    let connecting = tokio::spawn(host::connect(raw, soon()));
    let link = listener.accept().await;
    assert_eq!(link.epoch(), connecting.await.unwrap().unwrap().epoch());
    let mut got = Vec::new();
    old_link.read_to_end(&mut got).await.unwrap();
    assert_eq!(got, b"whole", "padding is never delivered as data");
}

#[tokio::test]
async fn frames_of_another_epoch_are_dropped_on_both_sides() {
    let (hosts, channel) = channel();
    let mut listener = Listener::new(channel);
    let mut raw = hosts.connect();
    let mut decoder = Decoder::new();
    let (old, new) = (Epoch::random(), Epoch::random());
    raw.write_all(&hello(old)).await.unwrap();
    raw.write_all(&hello(new)).await.unwrap();
    raw.write_all(&data(old, 0, b"stale")).await.unwrap();
    raw.write_all(&data(new, 0, b"fresh")).await.unwrap();
    let mut link = loop {
        let link = listener.accept().await;
        if link.epoch() == new {
            break link;
        }
    };
    let mut five = [0; 5];
    link.read_exact(&mut five).await.unwrap();
    assert_eq!(&five, b"fresh");
    while next_frame(&mut raw, &mut decoder).await.epoch != new {}

    // The host's side.
    let (ours, mut guest) = tokio::io::duplex(64 * 1024);
    let connecting = tokio::spawn(host::connect(ours, soon()));
    let epoch = next_frame(&mut guest, &mut Decoder::new()).await.epoch;
    guest.write_all(&data(old, 0, b"stale")).await.unwrap();
    let mut ack = BytesMut::new();
    frame::put_control(&mut ack, Kind::HelloAck, old, 0);
    frame::put_control(&mut ack, Kind::HelloAck, epoch, 0);
    guest.write_all(&ack).await.unwrap();
    guest.write_all(&data(old, 0, b"stale")).await.unwrap();
    guest.write_all(&data(epoch, 0, b"fresh")).await.unwrap();
    let mut link = connecting.await.unwrap().unwrap();
    link.read_exact(&mut five).await.unwrap();
    assert_eq!(&five, b"fresh");
}

#[tokio::test]
async fn repeated_greetings_are_answered_and_pollute_nothing() {
    let (hosts, channel) = channel();
    let mut listener = Listener::new(channel);
    let mut raw = hosts.connect();
    let mut decoder = Decoder::new();
    let epoch = Epoch::random();
    for _ in 0..3 {
        raw.write_all(&hello(epoch)).await.unwrap();
    }
    let mut link = listener.accept().await;
    for _ in 0..3 {
        assert_eq!(
            next_frame(&mut raw, &mut decoder).await.kind,
            Kind::HelloAck
        );
    }
    raw.write_all(&data(epoch, 0, b"a")).await.unwrap();
    raw.write_all(&hello(epoch)).await.unwrap();
    raw.write_all(&data(epoch, 1, b"b")).await.unwrap();
    let mut two = [0; 2];
    link.read_exact(&mut two).await.unwrap();
    assert_eq!(&two, b"ab");
}

#[tokio::test]
async fn an_epoch_that_is_over_is_not_begun_again() {
    let (hosts, channel) = channel();
    let mut listener = Listener::new(channel);
    let mut raw = hosts.connect();
    let mut decoder = Decoder::new();
    let epoch = Epoch::random();
    raw.write_all(&hello(epoch)).await.unwrap();
    drop(listener.accept().await);
    assert_eq!(
        next_frame(&mut raw, &mut decoder).await.kind,
        Kind::HelloAck
    );
    assert_eq!(next_frame(&mut raw, &mut decoder).await.kind, Kind::End);
    raw.write_all(&data(epoch, 0, b"for nobody")).await.unwrap();
    assert_eq!(next_frame(&mut raw, &mut decoder).await.kind, Kind::Reset);
    raw.write_all(&hello(epoch)).await.unwrap();
    assert_eq!(next_frame(&mut raw, &mut decoder).await.kind, Kind::Reset);
}

#[tokio::test]
async fn a_lost_frame_resets_the_epoch_instead_of_passing_as_whole() {
    let (hosts, channel) = channel();
    let mut listener = Listener::new(channel);
    let mut raw = hosts.connect();
    let epoch = Epoch::random();
    raw.write_all(&hello(epoch)).await.unwrap();
    let mut link = listener.accept().await;
    raw.write_all(&data(epoch, 0, b"first")).await.unwrap();
    raw.write_all(&data(epoch, 2, b"third")).await.unwrap();
    let mut got = Vec::new();
    link.read_to_end(&mut got).await.unwrap();
    assert_eq!(got, b"first");
    let mut decoder = Decoder::new();
    while next_frame(&mut raw, &mut decoder).await.kind != Kind::Reset {}
}

#[tokio::test]
async fn a_hang_up_ends_the_link_and_the_next_host_gets_its_own() {
    let (hosts, channel) = channel();
    let mut listener = Listener::new(channel);
    let mut raw = hosts.connect();
    raw.write_all(&hello(Epoch::random())).await.unwrap();
    let mut link = listener.accept().await;
    drop(raw);
    assert_eq!(link.read(&mut [0; 9]).await.unwrap(), 0);
    assert!(link.write_all(&[0; 9]).await.is_err());
    let connecting = tokio::spawn(host::connect(hosts.connect(), soon()));
    let next = listener.accept().await;
    assert_eq!(next.epoch(), connecting.await.unwrap().unwrap().epoch());
}

#[tokio::test]
async fn hosts_that_leave_in_the_middle_of_a_transfer_are_replaced() {
    let (hosts, channel) = channel();
    tokio::spawn(echo(Listener::new(channel)));
    for round in 0..50_u8 {
        let link = host::connect(hosts.connect(), soon()).await.unwrap();
        let (mut from, mut to) = tokio::io::split(link);
        let sender = tokio::spawn(async move {
            let _ = to.write_all(&vec![round; 700_000]).await;
        });
        let mut got = vec![0; 300_000 + usize::from(round) * 1111];
        from.read_exact(&mut got).await.unwrap();
        assert!(got.iter().all(|byte| *byte == round));
        sender.abort();
        // Both halves go, and with them the connection, wherever its frames are.
        let _ = sender.await;
    }
}

#[tokio::test]
async fn a_new_epoch_in_the_middle_of_a_transfer_gets_none_of_it() {
    // One raw connection, many epochs, nobody tells the guest that the hosts changed.
    let (hosts, channel) = channel();
    tokio::spawn(echo(Listener::new(channel)));
    let mut raw = hosts.connect();
    for round in 0..20_u8 {
        let mut link = host::connect(&mut raw, soon()).await.unwrap();
        link.write_all(&vec![round; 150_000]).await.unwrap();
        link.flush().await.unwrap();
        let mut got = vec![0; 90_000];
        link.read_exact(&mut got).await.unwrap();
        assert!(got.iter().all(|byte| *byte == round), "round {round}");
    }
}

#[tokio::test]
async fn a_writer_nobody_reads_waits() {
    let (hosts, channel) = channel();
    let mut listener = Listener::new(channel);
    let connecting = tokio::spawn(host::connect(hosts.connect(), soon()));
    let _unread = listener.accept().await;
    let mut link = connecting.await.unwrap().unwrap();
    let mut written = 0;
    let full = async {
        loop {
            written += link.write(&vec![0; 32 * 1024]).await.unwrap();
        }
    };
    assert!(
        tokio::time::timeout(Duration::from_millis(300), full)
            .await
            .is_err()
    );
    assert!(
        written <= 2 * guest::BUFFER,
        "{written} bytes were taken for nobody"
    );
}

#[tokio::test]
async fn throughput_is_not_the_frames_matter() {
    const TOTAL: usize = 256 << 20;
    let (hosts, channel) = channel();
    let mut listener = Listener::new(channel);
    let connecting = tokio::spawn(host::connect(hosts.connect(), soon()));
    let mut guest = listener.accept().await;
    let mut link = connecting.await.unwrap().unwrap();
    let started = Instant::now();
    let sender = tokio::spawn(async move {
        let chunk = vec![0x89; 64 * 1024];
        for _ in 0..TOTAL / chunk.len() {
            guest.write_all(&chunk).await.unwrap();
        }
        guest
    });
    let (mut got, mut buffer) = (0, vec![0; 128 * 1024]);
    while got < TOTAL {
        got += link.read(&mut buffer).await.unwrap();
    }
    sender.await.unwrap();
    let rate = TOTAL as f64 / started.elapsed().as_secs_f64() / 1e6;
    println!("{rate:.0} MB/s");
    assert!(rate > 20.0, "{rate} MB/s, even unoptimised");
}

#[tokio::test]
async fn http2_runs_over_it() {
    let (hosts, channel) = channel();
    let mut listener = Listener::new(channel);
    tokio::spawn(async move {
        loop {
            let link = listener.accept().await;
            let service = hyper::service::service_fn(
                async |request: http::Request<hyper::body::Incoming>| {
                    let body: BoxBody<Bytes, hyper::Error> = if request.uri().path() == "/echo" {
                        request.into_body().boxed()
                    } else {
                        Full::new(Bytes::from_static(b"pong"))
                            .map_err(|never| match never {})
                            .boxed()
                    };
                    Ok::<_, hyper::Error>(http::Response::new(body))
                },
            );
            tokio::spawn(
                hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                    .serve_connection(TokioIo::new(link), service),
            );
        }
    });
    for _ in 0..10 {
        let link = host::connect(hosts.connect(), soon()).await.unwrap();
        let (mut client, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(link))
                .await
                .unwrap();
        let connection = tokio::spawn(connection);
        for path in ["/ping", "/echo"] {
            let body = Full::new(Bytes::from(vec![5; 3_000_000]));
            let request = http::Request::post(format!("http://guest{path}"))
                .body(body)
                .unwrap();
            let response = client.send_request(request).await.unwrap();
            let body = response.into_body().collect().await.unwrap().to_bytes();
            assert_eq!(body.len(), if path == "/echo" { 3_000_000 } else { 4 });
        }
        // In the middle of another transfer.
        connection.abort();
    }
}

/// A guest as a snapshot catches it: an old epoch's link, whose host sent a frame up to `cut_in` and took in all `taken` bytes of what the
/// guest wrote until nobody read any more. The guest is told nothing when it is restored.
struct Restored {
    raw: DuplexStream,
    listener: Listener,
    old: guest::Link,
}

impl Restored {
    async fn new(cut_in: usize, taken: usize) -> Self {
        let (hosts, channel) = channel();
        let mut listener = Listener::new(channel);
        let mut raw = hosts.connect();
        let epoch = Epoch::random();
        raw.write_all(&hello(epoch)).await.unwrap();
        let mut old = listener.accept().await;
        let frame = data(epoch, 0, &vec![0x89; 60_000]);
        raw.write_all(&frame[..cut_in.min(frame.len())])
            .await
            .unwrap();
        // Until the writer is stuck, which takes as long as it takes for every buffer on the way to be full.
        let full = async { while old.write(&[0x5a; 10_000]).await.is_ok() {} };
        assert!(
            tokio::time::timeout(Duration::from_millis(50), full)
                .await
                .is_err()
        );
        let mut gone = vec![0; taken];
        raw.read_exact(&mut gone).await.unwrap();
        Self { raw, listener, old }
    }
}

#[tokio::test]
async fn a_restored_guest_answers_its_new_host_whatever_it_was_in_the_middle_of() {
    let noise = |seed: usize, count: usize| -> Vec<u8> {
        (0..count)
            .map(|at| ((at * 7919 + seed * 104_729) >> 3) as u8)
            .collect()
    };
    for round in 0..24_usize {
        let (cut_in, taken) = (round * 2_711, 1 + round * 2_503);
        let Restored {
            mut raw,
            mut listener,
            mut old,
        } = Restored::new(cut_in, taken).await;
        let mut garbage = noise(round, round * 900);
        // Half a frame of some third epoch as well.
        garbage.extend(&data(Epoch::random(), 3, &noise(round, 50_000))[..round * 2_000]);
        raw.write_all(&garbage).await.unwrap();
        let (host, guest) = tokio::join!(host::connect(raw, soon()), listener.accept());
        let (mut host, mut guest) = (host.unwrap(), guest);
        assert_eq!(host.epoch(), guest.epoch(), "round {round}");
        // Read to its end, which comes without a byte of ours; its writer is let go.
        let mut left = Vec::new();
        old.read_to_end(&mut left).await.unwrap();
        assert!(left.len() <= 60_000 && left.iter().all(|byte| *byte == 0x89));
        assert!(old.write_all(&[0; 9]).await.is_err());
        let (there, back) = (noise(round, 200_000), noise(round + 1, 200_000));
        // Both ways at once, so that neither works only because the other is still.
        let (mut from_host, mut from_guest) = (vec![0; there.len()], vec![0; back.len()]);
        let (mut host_in, mut host_out) = tokio::io::split(&mut host);
        let (mut guest_in, mut guest_out) = tokio::io::split(&mut guest);
        let done = async {
            tokio::try_join!(
                async {
                    host_out.write_all(&there).await?;
                    host_out.flush().await
                },
                guest_out.write_all(&back),
                async { guest_in.read_exact(&mut from_host).await.map(drop) },
                async { host_in.read_exact(&mut from_guest).await.map(drop) },
            )
        };
        tokio::time::timeout(Duration::from_secs(10), done)
            .await
            .expect("bytes move")
            .unwrap();
        assert!(from_host == there && from_guest == back, "round {round}");
    }
}

#[tokio::test]
async fn two_guests_of_one_snapshot_are_two_epochs() {
    let mut epochs = Vec::new();
    for _ in 0..2 {
        let Restored {
            raw, mut listener, ..
        } = Restored::new(31_000, 17_000).await;
        let (host, guest) = tokio::join!(host::connect(raw, soon()), listener.accept());
        assert_eq!(host.unwrap().epoch(), guest.epoch());
        epochs.push(guest.epoch());
    }
    assert_ne!(epochs[0], epochs[1]);
}

/// A host whose greeting was answered, and the hands of a guest that then does what it likes.
async fn hostile() -> (host::Link<DuplexStream>, DuplexStream, Epoch) {
    let (ours, mut guest) = tokio::io::duplex(64 * 1024);
    let connecting = tokio::spawn(host::connect(ours, soon()));
    let epoch = next_frame(&mut guest, &mut Decoder::new()).await.epoch;
    let mut ack = BytesMut::new();
    frame::put_control(&mut ack, Kind::HelloAck, epoch, 0);
    guest.write_all(&ack).await.unwrap();
    (connecting.await.unwrap().unwrap(), guest, epoch)
}

/// Bit by bit, as RFC 3720 defines it.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc: u32, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0x82F6_3B78 * (crc & 1))
        })
    })
}

#[tokio::test]
async fn a_length_of_four_gibibytes_ends_the_link_at_once() {
    let (mut link, mut guest, epoch) = hostile().await;
    guest.write_all(&data(epoch, 0, b"fine")).await.unwrap();
    let mut frame = data(epoch, 1, b"").to_vec();
    frame[20..24].copy_from_slice(&u32::MAX.to_le_bytes());
    let checksum = crc32c(&frame[..24]);
    frame[24..28].copy_from_slice(&checksum.to_le_bytes());
    guest.write_all(&frame).await.unwrap();
    let mut four = [0; 4];
    link.read_exact(&mut four).await.unwrap();
    let error = link.read(&mut four).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    assert!(error.to_string().contains("no frame"), "{error}");
}

#[tokio::test]
async fn a_flood_ends_the_link_whatever_it_is_made_of() {
    let ack = |epoch| {
        let mut out = BytesMut::new();
        frame::put_control(&mut out, Kind::HelloAck, epoch, 0);
        out
    };
    for (piece, why) in [
        (
            Vec::from(data(Epoch::random(), 0, &vec![1; 60_000])),
            "another epoch",
        ),
        (vec![0x89; 60_000], "no frame"),
        (vec![0; 60_000], "no frame"),
        (vec![], "another epoch"),
    ] {
        let (mut link, mut guest, epoch) = hostile().await;
        let piece = if piece.is_empty() {
            ack(epoch).to_vec()
        } else {
            piece
        };
        let flood = tokio::spawn(async move {
            let mut sent = 0;
            while guest.write_all(&piece).await.is_ok() {
                sent += piece.len() as u64;
            }
            sent
        });
        let error = link.read(&mut [0; 9]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert!(error.to_string().contains(why), "{error}");
        drop(link);
        let sent = flood.await.unwrap();
        assert!(
            sent < host::MOST_USELESS + (1 << 18),
            "{sent} bytes were taken"
        );
    }
}

#[tokio::test]
async fn a_guest_that_floods_instead_of_answering_is_given_up_before_the_deadline() {
    let (ours, mut guest) = tokio::io::duplex(256 * 1024);
    let flood = tokio::spawn(async move {
        let piece = data(Epoch::random(), 0, &vec![1; 60_000]);
        while guest.write_all(&piece).await.is_ok() {}
    });
    let error = host::connect(ours, Instant::now() + Duration::from_mins(5))
        .await
        .unwrap_err();
    let ConnectError::Flooded { bytes, .. } = error else {
        panic!("{error}");
    };
    assert!((host::MOST_BEFORE_ANSWER..host::MOST_BEFORE_ANSWER + (1 << 20)).contains(&bytes));
    flood.await.unwrap();
}

/// A snapshot may leave a guest with a connection whose end it is never told.
#[tokio::test]
async fn the_newest_connection_counts() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("v.sock");
    let listener = tokio::net::UnixListener::bind(&path).unwrap();
    let channel = guest::vsock::VsockChannel::new(listener);
    let echoing = tokio::spawn(echo(Listener::new(channel)));
    let connect = async || {
        let stream = tokio::net::UnixStream::connect(&path).await.unwrap();
        host::connect(stream, soon()).await.unwrap()
    };
    let mut before = connect().await;
    before.write_all(b"one").await.unwrap();
    let mut answer = [0; 3];
    before.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"one");
    // It stays open here, and a newer one is served all the same.
    let mut after = connect().await;
    after.write_all(b"two").await.unwrap();
    after.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"two");
    assert!(before.read_exact(&mut answer).await.is_err());
    drop(after);
    let mut again = connect().await;
    again.write_all(b"end").await.unwrap();
    again.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"end");
    echoing.abort();
}
