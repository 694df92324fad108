//! Streams of a process: every byte once, in order, to whoever reads or writes, and whatever becomes of them.

use std::time::Duration;

use futures::future::join_all;
use proto::envd::v1::{
    AttachRequest, Backpressure, OutputKept, SignalTarget, StartRequest, TerminalSize,
    process_event::Event,
};
use tonic::Code;

use crate::{
    processes::{KILL, from, named, piped},
    world::{Events, World, argv, code, field, noise, sh, soon, why},
};

/// Output kept per stream, at least; and what one read may add to it.
const RING: usize = 1 << 20;
const READ: usize = 64 << 10;

/// Waits for those that read it.
fn waiting(request: StartRequest) -> StartRequest {
    StartRequest {
        backpressure: Backpressure::WhileAttached.into(),
        ..request
    }
}

/// What `seq` prints.
fn counted(to: u32) -> Vec<u8> {
    let mut lines = Vec::new();
    for number in 1..=to {
        lines.extend_from_slice(number.to_string().as_bytes());
        lines.push(b'\n');
    }
    lines
}

// Bytes

#[tokio::test]
async fn bytes_are_bytes() {
    let world = World::new().await;
    let finished = world.run(sh(r"printf 'a\000\377\r\n\303'")).await;
    assert_eq!(finished.stdout, b"a\0\xff\r\n\xc3");
    let mut cat = world.start(piped("cat", argv(&["cat"]))).await;
    let all: Vec<u8> = (0..=255).collect();
    world.send("cat", &all, None).await.unwrap();
    assert_eq!(cat.read(256).await, all);
    world.close("cat").await;
    assert_eq!(cat.finish().await.stdout, all);
}

#[tokio::test]
async fn stdout_and_stderr_are_apart() {
    let world = World::new().await;
    let finished = world
        .run(sh("printf out; printf mistake >&2; printf more"))
        .await;
    assert_eq!(
        (finished.stdout.as_slice(), finished.stderr.as_slice()),
        (&b"outmore"[..], &b"mistake"[..])
    );
    let exited = finished.exited();
    assert_eq!((exited.stdout_bytes, exited.stderr_bytes), (7, 7));
}

/// Line by line, as programs write that want to be followed. Each on its own would take its reader longer than the program.
#[tokio::test]
async fn small_writes_that_follow_each_other_come_together() {
    const LINES: usize = 20_000;
    let world = World::new().await;
    let script = format!("i=0; while [ $i -lt {LINES} ]; do echo $i; i=$((i+1)); done");
    for terminal in [
        None,
        Some(TerminalSize {
            rows: 30,
            cols: 100,
        }),
    ] {
        let mut events = world
            .start(StartRequest {
                terminal,
                ..sh(&script)
            })
            .await;
        let mut messages = 0;
        while events.step().await.unwrap() {
            messages += 1;
        }
        let seen = &events.seen().stdout;
        let lines = String::from_utf8_lossy(seen).lines().count();
        assert_eq!(lines, LINES);
        assert!(messages < LINES / 4, "{messages} messages");
    }
}

// Output and its readers

#[tokio::test]
async fn attaching_at_an_offset_gives_exactly_the_rest() {
    let world = World::new().await;
    let all = world
        .run(named("seq", sh("seq 1 50000; printf mistake >&2")))
        .await;
    let size = all.stdout.len();
    assert_eq!(all.exited().stdout_bytes as usize, size);
    for offset in [0, 1, 65_535, 65_536, 100_001, size - 1, size] {
        let rest = world
            .attach(from("seq", offset))
            .await
            .unwrap()
            .finish()
            .await;
        assert!(
            rest.stdout == all.stdout[offset..] && rest.stderr == b"mistake",
            "from {offset}"
        );
        assert_eq!(rest.exited(), all.exited());
    }
    let errors = AttachRequest {
        stderr_offset: 3,
        ..from("seq", size)
    };
    assert_eq!(
        world.attach(errors).await.unwrap().finish().await.stderr,
        b"take"
    );
    let status = world.attach(from("seq", size + 1)).await.err().unwrap();
    assert_eq!(why(&status), (Code::OutOfRange, "OUTPUT_GONE".into()));
    let status = world.attach(from("no-such", 0)).await.err().unwrap();
    assert_eq!(why(&status), (Code::NotFound, "PROCESS_UNKNOWN".into()));
}

#[tokio::test]
async fn attaching_from_now_gives_what_is_written_from_now_on() {
    let world = World::new().await;
    let mut cat = world.start(piped("cat", argv(&["cat"]))).await;
    world.send("cat", b"before", None).await.unwrap();
    cat.read(6).await;
    let now = AttachRequest {
        from_now: true,
        ..from("cat", 99)
    };
    let late = world.attach(now).await.unwrap();
    world.send("cat", b"after", None).await.unwrap();
    world.close("cat").await;
    assert_eq!(late.finish().await.stdout, b"after");
    assert_eq!(cat.finish().await.stdout, b"beforeafter");
}

#[tokio::test]
async fn a_lost_offset_is_refused_with_the_earliest_there_is() {
    let world = World::new().await;
    let size = 3 << 20;
    let request = StartRequest {
        output_kept: Some(OutputKept {
            file_bytes: Some(0),
            ..OutputKept::default()
        }),
        ..sh(&format!("yes 0123456789abcdef | head -c {size}"))
    };
    let all = world.run(waiting(named("much", request))).await;
    let status = world.attach(from("much", 0)).await.err().unwrap();
    assert_eq!(why(&status), (Code::OutOfRange, "OUTPUT_GONE".into()));
    let mut words = status.message().split(|c: char| !c.is_ascii_digit());
    let earliest: usize = words
        .rfind(|word| !word.is_empty())
        .unwrap()
        .parse()
        .unwrap();
    assert!(
        (size - RING - 2 * READ..=size - RING).contains(&earliest),
        "{}",
        status.message()
    );
    let rest = world
        .attach(from("much", earliest))
        .await
        .unwrap()
        .finish()
        .await;
    assert!(rest.stdout == all.stdout[earliest..]);
    assert!(world.attach(from("much", earliest - 1)).await.is_err());
}

#[tokio::test]
async fn a_client_that_lost_its_connection_gets_every_byte_once() {
    let mut world = World::new().await;
    let script = "i=0; while [ $i -lt 150000 ]; do seq $((i+1)) $((i+1500)); i=$((i+1500)); done";
    // Less than what is kept, so that it does not matter who is faster.
    let expected = counted(150_000);
    assert!(expected.len() < RING);
    let mut reader = world.start(named("count", sh(script))).await;
    let mut read = Vec::new();
    for part in 1..=8 {
        reader.read(expected.len() / 30).await;
        read.extend_from_slice(&reader.seen().stdout);
        drop(reader);
        if part % 2 == 0 {
            world.reconnect().await;
        }
        reader = world.attach(from("count", read.len())).await.unwrap();
    }
    read.extend(reader.finish().await.stdout);
    assert!(read == expected);
}

#[tokio::test]
async fn every_attached_reader_gets_all_bytes() {
    let world = World::new().await;
    let start = world.start(piped("seq", sh("read go; seq 1 60000"))).await;
    let mut readers = vec![start];
    for _ in 0..30 {
        readers.push(world.attach(from("seq", 0)).await.unwrap());
    }
    world.send("seq", b"\n", None).await.unwrap();
    let expected = counted(60_000);
    for finished in join_all(readers.into_iter().map(Events::finish)).await {
        assert!(finished.stdout == expected);
        assert_eq!(finished.code(), Some(0));
    }
}

#[tokio::test]
async fn a_slow_first_reader_loses_nothing_of_fifty_megabytes() {
    let world = World::new().await;
    let size = 50_000_000;
    // Writes of all sizes, so that what is read from the pipe is of all sizes too.
    let script = format!(
        "my $n = {size}; my $line = \"0123456789abcdef\\n\" x 4000; my $at = 0; \
         while ($n > 0) {{ my $c = 1 + int rand 20000; $c = $n if $c > $n; \
         syswrite STDOUT, substr($line, $at % 17, $c); $at += $c; $n -= $c }}"
    );
    let mut reader = world
        .start(waiting(named("much", argv(&["perl", "-e", &script]))))
        .await;
    let id = reader.id().to_owned();
    // It fills whatever is between it and us, and then waits.
    let mut steps = 0;
    while reader.seen().stdout.len() < size {
        if steps % 100 == 0 && steps < 1000 {
            tokio::time::sleep(Duration::from_millis(50)).await;
            if steps == 0 {
                assert_eq!(
                    world.list(false).await[0].process_id,
                    id,
                    "it waits for its reader"
                );
            }
        }
        assert!(reader.step().await.unwrap());
        steps += 1;
    }
    let finished = reader.finish().await;
    let line = b"0123456789abcdef\n".repeat(1001);
    let pieces = finished.stdout.chunks(17_000);
    assert!(
        pieces
            .into_iter()
            .all(|piece| line[..piece.len()] == *piece)
    );
    assert_eq!((finished.code(), finished.stdout.len()), (Some(0), size));
    assert!(!finished.exited().output_held_open);
}

#[tokio::test]
async fn a_reader_that_vanishes_neither_ends_nor_blocks_its_process() {
    let mut world = World::new().await;
    let script = "head -c 20000000 /dev/zero; echo $? > end";
    // At once; when the process already waits for it; with the whole connection.
    drop(world.start(waiting(named("a", sh(script)))).await);
    let mut stuck = world.start(waiting(named("b", sh(script)))).await;
    stuck.read(1).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    drop(stuck);
    let mut cut = world.start(waiting(named("c", sh(script)))).await;
    cut.read(1).await;
    world.reconnect().await;
    for id in ["a", "b", "c"] {
        let exited = world.wait(id).await.unwrap();
        assert_eq!(
            (code(&exited), exited.stdout_bytes),
            (Some(0), 20_000_000),
            "{id}"
        );
    }
    assert_eq!(world.printed("cat end").await, "0\n");
}

#[tokio::test]
async fn readers_that_are_slow_hold_nobody_up_and_are_told_what_they_lost() {
    let world = World::new().await;
    let request = StartRequest {
        output_kept: Some(OutputKept {
            file_bytes: Some(0),
            ..OutputKept::default()
        }),
        ..sh("read go; head -c 40000000 /dev/zero")
    };
    let first = world.start(piped("much", request)).await;
    let second = world.attach(from("much", 0)).await.unwrap();
    world.send("much", b"\n", None).await.unwrap();
    assert_eq!(world.wait("much").await.unwrap().stdout_bytes, 40_000_000);
    for mut reader in [first, second] {
        let lost = loop {
            match reader.step().await {
                Ok(true) => {}
                Ok(false) => panic!("it cannot have got all"),
                Err(status) => break status,
            }
        };
        assert_eq!(why(&lost), (Code::OutOfRange, "OUTPUT_GONE".into()));
    }
}

#[tokio::test]
async fn what_nobody_reads_meanwhile_is_kept_beyond_memory() {
    let world = World::new().await;
    let script = "my $line = join('', map { chr(65 + $_ % 57) } 0..11_999); for my $n (1..2_000) { syswrite STDOUT, substr($line, $n, 9_000) . $n }";
    drop(
        world
            .start(named("much", argv(&["perl", "-e", script])))
            .await,
    );
    let exited = world.wait("much").await.unwrap();
    assert!(exited.stdout_bytes > 18_000_000);
    let kept = world.attach(from("much", 0)).await.unwrap().finish().await;
    let line: Vec<u8> = (0..12_000_u32).map(|n| (65 + n % 57) as u8).collect();
    let mut wanted = Vec::new();
    for n in 1..=2_000 {
        wanted.extend_from_slice(&line[n..n + 9_000]);
        wanted.extend_from_slice(n.to_string().as_bytes());
    }
    assert!(kept.stdout == wanted);
}

#[tokio::test]
async fn a_process_that_was_asked_to_waits_for_its_reader_to_come_back() {
    let mut world = World::new().await;
    let size = 100_000_000;
    let request = StartRequest {
        backpressure: Backpressure::Always.into(),
        output_kept: Some(OutputKept {
            memory_bytes: None,
            // Less than all of it, and more than what is on its way.
            file_bytes: Some(32 << 20),
        }),
        ..argv(&["head", "-c", &size.to_string(), "/dev/zero"])
    };
    let mut reader = world.start(named("much", request)).await;
    let mut seen = 0;
    for round in 0..8 {
        reader.read(1 + round * 1_000_000).await;
        seen += reader.seen().stdout.len();
        world.reconnect().await;
        assert!(
            world
                .list(false)
                .await
                .iter()
                .any(|it| it.process_id == "much"),
            "it waits, though nobody is there"
        );
        reader = world.attach(from("much", seen)).await.unwrap();
    }
    let finished = reader.finish().await;
    assert_eq!(seen + finished.stdout.len(), size);
    assert_eq!(finished.exited().stdout_bytes, size as u64);
}

#[tokio::test]
async fn output_says_when_it_was_written() {
    let world = World::new().await;
    let before = prost_types::Timestamp::from(std::time::SystemTime::now());
    world.run(named("early", sh("echo early"))).await;
    let after = prost_types::Timestamp::from(std::time::SystemTime::now());
    let mut stream = world
        .processes()
        .attach(from("early", 0))
        .await
        .unwrap()
        .into_inner();
    loop {
        let event = soon(stream.message())
            .await
            .unwrap()
            .unwrap()
            .event
            .unwrap()
            .event;
        if let Some(Event::Output(output)) = event {
            let time = output.time.unwrap();
            let key = |time: &prost_types::Timestamp| (time.seconds, time.nanos);
            assert!(key(&before) <= key(&time) && key(&time) <= key(&after));
            break;
        }
    }
}

// Input

#[tokio::test]
async fn input_with_an_offset_is_taken_once() {
    let world = World::new().await;
    let cat = world.start(piped("cat", argv(&["cat"]))).await;
    for (data, offset, next) in [
        (&b"hello "[..], Some(0), 6),
        (b"hello ", Some(0), 6),
        (b"lo world", Some(3), 11),
        (b"", None, 11),
        (b"!", None, 12),
        (b"o wor", Some(4), 12),
    ] {
        assert_eq!(world.send("cat", data, offset).await.unwrap(), next);
    }
    for offset in [13, u64::MAX] {
        let status = world.send("cat", b"?", Some(offset)).await.unwrap_err();
        assert_eq!(why(&status), (Code::OutOfRange, "INPUT_GAP".into()));
    }
    world.close("cat").await;
    world.close("cat").await;
    assert_eq!(cat.finish().await.stdout, b"hello world!");
    // What was received once may be sent again even now; more may not.
    assert_eq!(world.send("cat", b"world", Some(6)).await.unwrap(), 12);
    let status = world.send("cat", b"more", None).await.unwrap_err();
    assert_eq!(
        why(&status),
        (Code::FailedPrecondition, "INPUT_CLOSED".into())
    );
}

#[tokio::test]
async fn input_is_answered_when_all_of_it_is_in_the_pipe() {
    let world = World::new().await;
    let data = noise(RING);
    let mut cat = world.start(piped("cat", sh("read go; cat"))).await;
    world.send("cat", b"\n", None).await.unwrap();
    for _ in 0..3 {
        world.send("cat", &data, None).await.unwrap();
    }
    cat.read(3 * RING).await;
    world.close("cat").await;
    assert!(cat.finish().await.stdout == data.repeat(3));
    let status = world
        .send("cat", &vec![0; RING + 1], None)
        .await
        .unwrap_err();
    assert_eq!(field(&status), "data");
}

#[tokio::test]
async fn input_for_a_process_that_does_not_read_ends_with_it() {
    let world = World::new().await;
    world.start(piped("deaf", argv(&["sleep", "600"]))).await;
    let data = noise(RING);
    let (sent, ()) = tokio::join!(world.send("deaf", &data, None), async {
        // A pipe holds less than that, so the call waits by the time others are answered.
        while world.list(false).await.is_empty() {}
        world
            .signal("deaf", KILL, SignalTarget::Process)
            .await
            .unwrap();
    });
    assert_eq!(
        why(&sent.unwrap_err()),
        (Code::FailedPrecondition, "INPUT_CLOSED".into())
    );
}

#[tokio::test]
async fn input_that_nobody_takes_is_refused() {
    let world = World::new().await;
    let ended = world.start(piped("ended", argv(&["true"]))).await;
    ended.finish().await;
    world.start(named("null", argv(&["sleep", "600"]))).await;
    for id in ["ended", "null"] {
        let status = world.send(id, b"hello", None).await.unwrap_err();
        assert_eq!(
            why(&status),
            (Code::FailedPrecondition, "INPUT_CLOSED".into()),
            "{id}"
        );
    }
    let status = world.send("no-such", b"hello", None).await.unwrap_err();
    assert_eq!(why(&status), (Code::NotFound, "PROCESS_UNKNOWN".into()));
    // Without a pipe there is nothing to read, rather than a wait.
    assert_eq!(world.run(argv(&["cat"])).await.stdout, b"");
}
