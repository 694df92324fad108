//! Processes under fire: not a byte is lost or seen twice, and every end says what it was.
//!
//! Longer runs, by hand: `SANDMESH_E2E_TORTURE_MIB=1024 SANDMESH_E2E_CUTS=200 SANDMESH_E2E_PAUSES=10 SANDMESH_E2E_KILLS=10
//! SANDMESH_E2E_CRASHES=5` and `SANDMESH_E2E_PROCESSES=1000`.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::time::{Duration, Instant};

use e2e::{Mesh, guest, how_many, http, small};
use proto::envd::v1::{Backpressure, ProcessServiceListRequest, ResourceLimits, WriteHeader};
use proto::session::v1::{ListSessionEventsRequest, Resources, Session};
use sdk::{Command, Event, Exit, NewSession, Process, Sandbox};
use sha2::{Digest as _, Sha256};

const PATIENCE: Duration = Duration::from_mins(2);

/// Writes so many MiB of noise to both streams and then, to a file, what they were.
const NOISE: &str = "
import hashlib, os, sys
hashes = [hashlib.sha256(), hashlib.sha256()]
for n in range(int(sys.argv[1])):
    for at in (0, 1):
        piece = os.urandom(1 << 20)
        hashes[at].update(piece)
        with os.fdopen(os.dup(at + 1), 'wb') as stream:
            stream.write(piece)
open('/tmp/hashes', 'w').write(' '.join(h.hexdigest() for h in hashes))
";

/// Takes memory until less than a tenth is left to all, and then waits.
const NEARLY_ALL: &str = "
user = '/sys/fs/cgroup/user/memory.'
most = int(open(user + 'max').read())
def left():
    stat = {key: int(size) for key, size in map(str.split, open(user + 'stat'))}
    files = stat['inactive_file'] + stat['active_file'] + stat['slab_reclaimable']
    return most - int(open(user + 'current').read()) + files
taken = []
while left() > most * 8 // 100:
    taken.append(bytearray(1 << 20))
import sys
sys.stdin.read()
";

async fn larger(mesh: &Mesh, memory_bytes: u64) -> Session {
    let resources = small().resources.map(|resources| Resources {
        memory_bytes,
        ..resources
    });
    let session = NewSession {
        resources,
        ..small()
    };
    mesh.client().create(session).await.unwrap()
}

async fn output(sandbox: &Sandbox, script: &str) -> String {
    let output = sandbox.run(["sh", "-c", script]).await.unwrap();
    assert_eq!(output.exit.code(), 0, "{script}: {output:?}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// What has come of two streams.
#[derive(Default)]
struct Received {
    hashes: [Sha256; 2],
    bytes: [u64; 2],
}

impl Received {
    fn take(&mut self, stream: usize, bytes: &[u8]) {
        self.hashes[stream].update(bytes);
        self.bytes[stream] += bytes.len() as u64;
    }

    fn all(&self) -> u64 {
        self.bytes.iter().sum()
    }
}

/// Takes it up again where it stopped, for as long as a part that was killed may need.
async fn again(sandbox: &Sandbox, received: &Received) -> Process {
    let end = Instant::now() + PATIENCE;
    loop {
        let [stdout, stderr] = received.bytes;
        match sandbox.attach("noise", stdout, stderr).await {
            Ok(process) => return process,
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Root in the guest may kill its daemon; so may a bug. Returns when another one answers.
async fn crash_envd(sandbox: &Sandbox) {
    let restarts = async || {
        let info = tokio::time::timeout(PATIENCE, async {
            loop {
                if let Ok(info) = sandbox.info().await {
                    return info;
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        });
        info.await.unwrap().envd_restarts
    };
    let before = restarts().await;
    let script = "for pid in $(cat /proc/1/task/1/children); do
        [ $(cat /proc/$pid/comm) != envd ] || kill -9 $pid; done";
    let kill = Command {
        user: "root".into(),
        ..Command::new(["sh", "-c", script])
    };
    // Its answer may not come.
    let _ = sandbox.start(kill).await;
    let end = Instant::now() + PATIENCE;
    while restarts().await == before {
        assert!(Instant::now() < end, "it was not started again");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_byte_is_lost_or_doubled_whatever_is_cut() {
    let size = how_many("SANDMESH_E2E_TORTURE_MIB", 24);
    let cuts = how_many("SANDMESH_E2E_CUTS", 12);
    let (pauses, kills, crashes) = (
        how_many("SANDMESH_E2E_PAUSES", 1),
        how_many("SANDMESH_E2E_KILLS", 1),
        how_many("SANDMESH_E2E_CRASHES", 2),
    );
    let mesh = Mesh::start(&["--separate"]);
    let client = mesh.client();
    let session = larger(&mesh, 256 << 20).await;
    let sandbox = client.sandbox(&session).unwrap();
    let mut process = sandbox
        .start(Command {
            process_id: Some("noise".into()),
            backpressure: Backpressure::Always,
            ..Command::new(["python3", "-c", NOISE, &size.to_string()])
        })
        .await
        .unwrap();
    let total = 2 * (size << 20);
    let mut received = Received::default();
    let mut exit = None;
    let (mut cut, mut paused, mut killed, mut crashed) = (0, 0, 0, 0);
    while exit.is_none() {
        match process.next().await {
            Ok(Some(Event::Stdout(bytes))) => received.take(0, &bytes),
            Ok(Some(Event::Stderr(bytes))) => received.take(1, &bytes),
            Ok(Some(Event::Started { .. })) => {}
            Ok(Some(Event::Exited(ended))) => exit = Some(ended),
            Ok(None) => panic!("no exit"),
            Err(error) => {
                println!("at {}: {error}", received.all());
                process = again(&sandbox, &received).await;
            }
        }
        // Each happens as often as asked, spread over all of it.
        let due = |times: u64, done: u64| {
            done < times && received.all() * (times + 1) >= total * (done + 1)
        };
        if due(cuts, cut) {
            cut += 1;
            drop(process);
            process = again(&sandbox, &received).await;
        }
        if due(pauses, paused) {
            paused += 1;
            client.pause(&session.session_id).await.unwrap();
            client.resume(&session.session_id, None).await.unwrap();
        }
        if due(kills, killed) {
            killed += 1;
            mesh.crash(if killed % 2 == 1 { "node" } else { "envoy" });
        }
        if due(crashes, crashed) {
            crashed += 1;
            crash_envd(&sandbox).await;
        }
    }
    assert_eq!(
        (cut, paused, killed, crashed),
        (cuts, pauses, kills, crashes)
    );
    let exit = exit.unwrap();
    assert_eq!(exit.code(), 0);
    assert_eq!(received.all(), total);
    assert_eq!([exit.0.stdout_bytes, exit.0.stderr_bytes], received.bytes);
    let hashes = received.hashes.map(|hash| hex::encode(hash.finalize()));
    assert_eq!(hashes.join(" "), output(&sandbox, "cat /tmp/hashes").await);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_processes_at_once_are_each_complete() {
    let count = how_many("SANDMESH_E2E_PROCESSES", 100);
    let mesh = Mesh::start(&[]);
    let session = larger(&mesh, 1 << 30).await;
    let sandbox = mesh.client().sandbox(&session).unwrap();
    // Of keeper and daemon, and of the files in memory that keep output.
    let memory = "daemon=$(cut -d' ' -f1 /proc/1/task/1/children)
        awk '/VmRSS|^Shmem:/ { sum += $2 } END { print sum }' \
            /proc/1/status /proc/$daemon/status /proc/meminfo";
    let before = output(&sandbox, memory).await;
    let began = Instant::now();
    let script = "i=0; while [ $i -lt 100 ]; do i=$((i+1)); echo \"$0 $i\"; done";
    let runs = (0..count).map(|number| {
        let sandbox = sandbox.clone();
        tokio::spawn(async move {
            let name = format!("p{number}");
            let output = sandbox.run(["sh", "-c", script, &name]).await.unwrap();
            assert_eq!(output.exit.code(), 0);
            let said = String::from_utf8(output.stdout).unwrap();
            let wanted = (1..=100).map(|line| format!("{name} {line}"));
            assert!(said.lines().eq(wanted), "{said}");
        })
    });
    for run in runs.collect::<Vec<_>>() {
        run.await.unwrap();
    }
    println!(
        "{count} processes in {:?}; envd's memory {before} KiB before, {} after",
        began.elapsed(),
        output(&sandbox, memory).await
    );
    let zombies = "ps -eo stat= | grep -c '^Z' || true";
    assert_eq!(output(&sandbox, zombies).await, "0");
    let left = "ls -d /sys/fs/cgroup/user/*/ 2>/dev/null | wc -l";
    // The one that counts is in one.
    assert_eq!(output(&sandbox, left).await, "1");
}

/// Python that takes so many MiB.
fn takes(mib: u32) -> [String; 3] {
    [
        "python3".into(),
        "-c".into(),
        format!("b = bytearray({mib} << 20); print(len(b))"),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn every_end_says_what_it_was() {
    let mesh = Mesh::start(&[]);
    let session = mesh.session().await;
    let sandbox = mesh.client().sandbox(&session).unwrap();
    let limited = |limits: ResourceLimits, argv: [String; 3]| Command {
        limits: Some(limits),
        ..Command::new(argv)
    };
    let run = async |command: Command| {
        sandbox
            .start(command)
            .await
            .unwrap()
            .output()
            .await
            .unwrap()
    };
    let memory = ResourceLimits {
        memory_bytes: 32 << 20,
        ..ResourceLimits::default()
    };

    // More than it may have, and all else goes on.
    let killed = run(limited(memory, takes(60))).await;
    assert_eq!((killed.exit.code(), killed.exit.0.oom_killed), (137, true));
    let victims = |exit: &Exit| -> Vec<String> {
        let victims = exit.0.oom_victims.iter();
        victims.map(|victim| victim.command.clone()).collect()
    };
    assert_eq!(victims(&killed.exit), ["python3"]);
    let event = event(&mesh, &session, "OOM_KILLED").await;
    assert!(event.contains("killed python3 (PID "), "{event}");
    let parent = [
        "sh".into(),
        "-c".into(),
        format!("{}; exit 5", "python3 -c 'b = bytearray(60 << 20)'"),
    ];
    let survived = run(limited(memory, parent)).await;
    assert_eq!((survived.exit.code(), survived.exit.0.oom_kills), (5, 1));
    assert_eq!(victims(&survived.exit), ["python3"]);
    let fits = run(limited(memory, takes(8))).await;
    assert_eq!((fits.exit.code(), fits.exit.0.oom_killed), (0, false));
    assert!(fits.exit.0.peak_memory_bytes > 8 << 20 && fits.exit.0.peak_memory_bytes <= 32 << 20);

    // Nearly all of it: that is told before there is none.
    let full = Command {
        stdin: true,
        ..Command::new(["python3", "-c", NEARLY_ALL])
    };
    let full = sandbox.start(full).await.unwrap();
    let told = self::event(&mesh, &session, "MEMORY_PRESSURE").await;
    assert!(told.contains("MiB of memory are left"), "{told}");
    full.remote().close_input().await.unwrap();
    full.output().await.unwrap();

    // More than the guest has, bit by bit, so that nothing is refused at once.
    let all = "b = []\nwhile True: b.append(bytearray(1 << 20))";
    let killed = run(Command::new(["python3", "-c", all])).await;
    assert_eq!((killed.exit.code(), killed.exit.0.oom_killed), (137, true));

    // What is uploaded into memory stops where the guest would have none left.
    let header = WriteHeader {
        path: "/dev/shm/large".into(),
        ..WriteHeader::default()
    };
    let mut large = tokio::io::AsyncReadExt::take(tokio::io::repeat(1), 100 << 20);
    let refused = sandbox.write_from(header, &mut large, |_| {}).await;
    assert_eq!(refused.unwrap_err().reason().as_deref(), Some("DISK_FULL"));
    assert_eq!(output(&sandbox, "ls -A /dev/shm; echo here").await, "here");

    // A process that starts more and more of itself.
    let bomb = [
        "sh".into(),
        "-c".into(),
        "bomb() { bomb | bomb & }; bomb; sleep 2; echo survived".into(),
    ];
    let pids = ResourceLimits {
        pids: 30,
        ..ResourceLimits::default()
    };
    let bombed = Command {
        process_id: Some("bomb".into()),
        deadline: Some(Duration::from_secs(20)),
        ..limited(pids, bomb)
    };
    run(bombed).await;
    // What is left of it is found and ended.
    let _ = sandbox
        .process("bomb")
        .signal_to(9, proto::envd::v1::SignalTarget::All)
        .await;
    assert_eq!(output(&sandbox, "echo here").await, "here");

    // A full disk is the program's to hear of.
    let full = run(Command::new([
        "sh",
        "-c",
        "head -c 2G /dev/zero > ~/big; echo $?",
    ]))
    .await;
    assert_eq!(full.stdout, b"1\n");
    assert!(String::from_utf8_lossy(&full.stderr).contains("No space left on device"));
    assert_eq!(output(&sandbox, "rm ~/big; echo here").await, "here");

    // What it started and left, and how much all of it took.
    let left = run(Command::new([
        "sh",
        "-c",
        "(setsid sleep 1000 >/dev/null 2>&1 &)",
    ]))
    .await;
    assert!(left.exit.0.left_running);
    let busy = run(Command::new([
        "sh",
        "-c",
        "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done",
    ]))
    .await;
    assert!(busy.exit.0.cpu_time.unwrap().nanos > 0);
}

/// The message of a session's event of a type, once there is one.
async fn event(mesh: &Mesh, session: &Session, kind: &str) -> String {
    let end = Instant::now() + PATIENCE;
    loop {
        let request = ListSessionEventsRequest {
            session_id: session.session_id.clone(),
            page_size: 1000,
            ..ListSessionEventsRequest::default()
        };
        let mut sessions = mesh.client().sessions();
        let events = sessions.list_session_events(request).await.unwrap();
        let events = events.into_inner().events;
        if let Some(event) = events.into_iter().find(|event| event.r#type == kind) {
            return event.message;
        }
        assert!(Instant::now() < end, "no event {kind}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_stands_still_is_told_of_and_comes_back() {
    let mesh = Mesh::start(&[]);
    let session = mesh.session().await;
    let sandbox = mesh.client().sandbox(&session).unwrap();
    guest::upload(&sandbox, env!("CARGO_BIN_EXE_guest-server")).await;
    let _server = guest::serve(&sandbox, "0.0.0.0:8000").await;
    // Root in the guest may do that to it; a bug could.
    let still = "cd /sys/fs/cgroup && mkdir still
        cut -d' ' -f1 /proc/1/task/1/children > still/cgroup.procs
        (sleep 90; echo 0 > still/cgroup.freeze) &
        sleep 1; echo 1 > still/cgroup.freeze; wait";
    let stills = Command {
        user: "root".into(),
        ..Command::new(["sh", "-c", still])
    };
    let _stills = sandbox.start(stills).await.unwrap();
    let list = async || {
        let mut processes = sandbox.processes();
        let call = processes.list(ProcessServiceListRequest::default());
        tokio::time::timeout(Duration::from_secs(5), call).await
    };
    let reason = |status: &tonic::Status| service_kit::errors::reason_of(status);
    let end = Instant::now() + 2 * PATIENCE;
    loop {
        match list().await {
            Ok(Err(status)) if reason(&status).as_deref() == Some("GUEST_SILENT") => break,
            // It is not yet known, or this very call waits.
            _ => assert!(Instant::now() < end, "nobody noticed"),
        }
    }
    // What needs no daemon goes on.
    let host = session.host.replace("{port}", "8000");
    let page = http::get(mesh.edge(), &host, "/", &[]).await;
    assert_eq!(page.status, 200);
    while !matches!(list().await, Ok(Ok(_))) {
        assert!(Instant::now() < end, "it did not come back");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    assert_eq!(output(&sandbox, "echo here").await, "here");
    for kind in ["GUEST_SILENT", "GUEST_ANSWERS"] {
        event(&mesh, &session, kind).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_dies_is_started_again_and_what_runs_goes_on() {
    let mesh = Mesh::start(&[]);
    let session = mesh.session().await;
    let sandbox = mesh.client().sandbox(&session).unwrap();
    guest::upload(&sandbox, env!("CARGO_BIN_EXE_guest-server")).await;
    let _server = guest::serve(&sandbox, "0.0.0.0:8000").await;
    let named = |id: &str, script: &str| Command {
        process_id: Some(id.into()),
        ..Command::new(["sh", "-c", script])
    };
    let finished = sandbox.start(named("finished", "echo done; exit 5")).await;
    let finished = finished.unwrap().output().await.unwrap();
    assert_eq!(finished.exit.code(), 5);
    let script = "echo before; until [ -e /tmp/go ]; do sleep 0.1; done; echo after; exit 3";
    let mut runs = sandbox.start(named("runs", script)).await.unwrap();
    while !matches!(runs.next().await.unwrap(), Some(Event::Stdout(_))) {}
    crash_envd(&sandbox).await;
    // Whoever reads is not told of it, and a server whose port is open is no worse for it.
    assert_eq!(
        output(&sandbox, "touch /tmp/go; echo $HOME").await,
        "/home/user"
    );
    let rest = runs.output().await.unwrap();
    assert_eq!((rest.exit.code(), rest.stdout), (3, b"after\n".to_vec()));
    let host = session.host.replace("{port}", "8000");
    let page = http::get(mesh.edge(), &host, "/", &[]).await;
    assert_eq!(page.status, 200);
    let again = sandbox.attach("finished", 0, 0).await.unwrap();
    let again = again.output().await.unwrap();
    assert_eq!((again.exit.code(), again.stdout), (5, b"done\n".to_vec()));
    let told = event(&mesh, &session, "ENVD_RESTARTED").await;
    assert!(told.contains("processes go on"), "{told}");

    // The next one is as good for a snapshot as the one before.
    let client = mesh.client();
    client.pause(&session.session_id).await.unwrap();
    client.resume(&session.session_id, None).await.unwrap();
    let mut processes = sandbox.processes();
    let listed = processes.list(ProcessServiceListRequest::default());
    let listed = listed.await.unwrap().into_inner().processes;
    assert_eq!(listed.len(), 1, "the server: {listed:?}");
    crash_envd(&sandbox).await;
    assert_eq!(
        output(&sandbox, "cat /tmp/go; echo still here").await,
        "still here"
    );
}
