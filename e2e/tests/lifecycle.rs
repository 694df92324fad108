//! A session that is stored and continued, copied, put back, and taken over: what it was stays, whoever dies.
//!
//! Longer runs, by hand: `SANDMESH_E2E_PAUSES`, `SANDMESH_E2E_KILLS` and `SANDMESH_E2E_COMMANDS` say how often and how many.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{FileExt as _, MetadataExt as _},
    time::{Duration, Instant, SystemTime},
};

use e2e::{Mesh, guest, how_many, http, small, wait_for};
use nix::sys::signal::{Signal, kill};
use proto::session::v1::{PortReadiness, Resources, Session, SessionState};
use sdk::{Command, NewFork, NewSession, Sandbox};
use tonic::Code;

/// How soon a VMM that died or hangs must be noticed, and the session told to have failed.
const NOTICED: Duration = Duration::from_secs(10);

async fn output(sandbox: &Sandbox, script: &str) -> String {
    let output = sandbox.run(["sh", "-c", script]).await.unwrap();
    assert_eq!(
        output.exit.code(),
        0,
        "{script}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// What a sandbox is, apart from what it draws anew each time.
async fn identity(sandbox: &Sandbox) -> (String, String) {
    let machine = output(sandbox, "cat /etc/machine-id").await;
    (machine, output(sandbox, "hostname").await)
}

async fn random(sandbox: &Sandbox) -> String {
    output(
        sandbox,
        "head -c 32 /dev/urandom | od -An -vtx1 | tr -d ' \\n'",
    )
    .await
}

/// Starts a program that counts in its memory and says so when asked by a file.
async fn counter(sandbox: &Sandbox) {
    let script = "import time\nn = 0\nwhile True:\n    n += 1\n    open('/tmp/n', 'w').write(str(n))\n    time.sleep(0.05)\n";
    output(
        sandbox,
        &format!("cat > /tmp/count.py <<'X'\n{script}X\nsetsid python3 /tmp/count.py >/dev/null 2>&1 </dev/null & echo"),
    )
    .await;
}

async fn count(sandbox: &Sandbox) -> u64 {
    loop {
        // The file is empty for a moment at each write.
        if let Ok(count) = output(sandbox, "cat /tmp/n 2>/dev/null || true")
            .await
            .parse()
        {
            return count;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_paused_and_resumed_as_it_was() {
    let mesh = Mesh::start(&["--separate"]);
    let session = mesh
        .client()
        .create(NewSession {
            resources: small().resources.map(|resources| Resources {
                memory_bytes: 256 << 20,
                ..resources
            }),
            ..small()
        })
        .await
        .unwrap();
    let id = &session.session_id;
    let client = mesh.client();
    let sandbox = client.sandbox(&session).unwrap();
    is_nobody(&mesh, &session);
    output(&sandbox, "echo kept > ~/file").await;
    counter(&sandbox).await;
    let before = identity(&sandbox).await;
    let mut last = 0;
    let mut drawn = BTreeSet::new();
    for round in 0..how_many("SANDMESH_E2E_PAUSES", 5) {
        let paused = client.pause(id).await.unwrap();
        assert_eq!(paused.state(), SessionState::Paused);
        assert!(
            (1..64 << 20).contains(&paused.stored_bytes),
            "{} bytes are stored",
            paused.stored_bytes
        );
        assert!(
            !mesh.session_folder(&session).join("vmm").exists(),
            "nothing of it runs"
        );
        if round == 0 {
            refused_while_paused(&mesh, &session, &sandbox).await;
            damaged_state_is_not_loaded(&mesh, &session).await;
        }
        let resumed = client.resume(id, None).await.unwrap();
        assert_eq!(resumed.state(), SessionState::Running);
        assert_eq!(output(&sandbox, "cat ~/file").await, "kept");
        assert_eq!(identity(&sandbox).await, before, "round {round}");
        let now = count(&sandbox).await;
        assert!(
            now > last,
            "the counter is the same process, and goes on: {now} after {last} in round {round}"
        );
        last = now;
        let clock: u64 = output(&sandbox, "date +%s").await.parse().unwrap();
        let host = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs();
        assert!(clock.abs_diff(host) <= 2, "{clock} is not {host}");
        assert!(drawn.insert(random(&sandbox).await));
    }
    assert_eq!(output(&sandbox, "pgrep -c -f '[c]ount.py'").await, "1");
    let metrics = client.metrics(id).await.unwrap();
    assert!(metrics.memory_private_bytes > 0 && metrics.cpu_time.is_some());
    // What a program has freed is not stored, and is there for the next one.
    let program = "python3 -c 'import os; os.urandom(64 << 20)'";
    output(&sandbox, program).await;
    let paused = client.pause(id).await.unwrap();
    println!("{} MiB are stored", paused.stored_bytes >> 20);
    assert!(paused.stored_bytes < 40 << 20, "{}", paused.stored_bytes);
    client.resume(id, None).await.unwrap();
    output(&sandbox, program).await;
    client.stop(id).await.unwrap();
}

/// Its VMM is a user of its own, without any privilege.
fn is_nobody(mesh: &Mesh, session: &Session) {
    let process = procfs::process::Process::new(mesh.vmm(session).as_raw()).unwrap();
    let status = process.status().unwrap();
    assert!(status.ruid >= 1_900_000_000, "{}", status.ruid);
    assert_eq!([status.ruid, status.ruid], [status.euid, status.suid]);
    assert_eq!(status.rgid, status.ruid);
    assert!(status.groups.is_empty());
    assert_eq!((status.capeff, status.capprm), (0, 0));
    let metadata = fs::metadata(mesh.session_folder(session)).unwrap();
    assert_eq!(metadata.uid(), 0, "its folder is not its own");
}

async fn refused_while_paused(mesh: &Mesh, session: &Session, sandbox: &Sandbox) {
    let again = mesh.client().pause(&session.session_id).await.unwrap_err();
    assert_eq!(again.code(), Some(Code::FailedPrecondition), "{again}");
    let call = sandbox.run(["true"]).await.unwrap_err();
    assert_eq!(call.code(), Some(Code::FailedPrecondition), "{call}");
    let host = session.host.replace("{port}", "8000");
    let page = http::get(mesh.edge(), &host, "/", &[]).await;
    assert_eq!(page.refusal(), (409, "SESSION_PAUSED".into()));
}

/// Whatever of it is changed or cut is told, and the session stays paused with all that is left.
async fn damaged_state_is_not_loaded(mesh: &Mesh, session: &Session) {
    let paused = mesh.session_folder(session).join("paused");
    for name in ["memory.diff", "devices"] {
        let path = paused.join(name);
        let file = fs::File::options()
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        let mut byte = [0];
        let at = file.metadata().unwrap().len() / 2;
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[!byte[0]], at).unwrap();
        let refused = mesh
            .client()
            .resume(&session.session_id, None)
            .await
            .unwrap_err();
        assert!(refused.to_string().contains("damaged"), "{name}: {refused}");
        file.write_all_at(&byte, at).unwrap();
        let known = mesh.client().get(&session.session_id).await.unwrap();
        assert_eq!(known.state(), SessionState::Paused);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_wake_a_paused_session_once() {
    let mesh = Mesh::start(&[]);
    let session = mesh
        .client()
        .create(NewSession {
            wake_on_request: true,
            ..small()
        })
        .await
        .unwrap();
    let client = mesh.client();
    let sandbox = client.sandbox(&session).unwrap();
    guest::upload(&sandbox, env!("CARGO_BIN_EXE_guest-server")).await;
    guest::serve(&sandbox, "0.0.0.0:8000").await;
    let host = session.host.replace("{port}", "8000");
    http::get_when_open(mesh.edge(), &host, "/").await;
    client.pause(&session.session_id).await.unwrap();
    let began = Instant::now();
    let pages = (0..10).map(|_| http::get(mesh.edge(), &host, "/", &[]));
    let pages = futures::future::join_all(pages).await;
    assert!(pages.iter().all(|page| page.status == 200), "{pages:?}");
    println!("ten requests woke it in {:?}", began.elapsed());
    client.pause(&session.session_id).await.unwrap();
    assert_eq!(output(&sandbox, "echo awake").await, "awake");
    let events = mesh.run(&["session", "events", &session.session_id, "-o", "json"]);
    let events = String::from_utf8_lossy(&events.stdout).into_owned();
    assert_eq!(events.matches("\"RESUMED\"").count(), 2, "{events}");
}

#[tokio::test(flavor = "multi_thread")]
async fn children_have_all_of_it_but_who_it_is() {
    let mesh = Mesh::start(&[]);
    let session = mesh.session().await;
    let client = mesh.client();
    let parent = client.sandbox(&session).unwrap();
    output(&parent, "echo kept > ~/file").await;
    counter(&parent).await;
    let at_fork = count(&parent).await;
    let forked = client
        .fork(&session.session_id, NewFork::of(3))
        .await
        .unwrap();
    let stood = Duration::try_from(forked.parent_stop_time.unwrap()).unwrap();
    println!("the parent stood still for {stood:?}");
    assert_eq!(forked.sessions.len(), 3);
    let (mut identities, mut drawn) = (BTreeSet::new(), BTreeSet::new());
    identities.insert(identity(&parent).await);
    drawn.insert(random(&parent).await);
    for child in &forked.sessions {
        assert_eq!(child.parent_session_id, session.session_id);
        let sandbox = client.sandbox(child).unwrap();
        // The very first thing it draws.
        assert!(drawn.insert(random(&sandbox).await));
        assert!(identities.insert(identity(&sandbox).await));
        assert_eq!(output(&sandbox, "cat ~/file").await, "kept");
        assert!(count(&sandbox).await >= at_fork, "its processes go on");
        output(&sandbox, &format!("echo {} > ~/file", child.session_id)).await;
    }
    assert_eq!(output(&parent, "cat ~/file").await, "kept");

    // A child is a session like any other: it pauses, and has what it had from its parent and what it did itself.
    let child = &forked.sessions[0];
    let sandbox = client.sandbox(child).unwrap();
    let before = count(&sandbox).await;
    client.pause(&child.session_id).await.unwrap();
    // So does a paused one fork.
    let grandchildren = client
        .fork(&child.session_id, NewFork::of(1))
        .await
        .unwrap()
        .sessions;
    client.resume(&child.session_id, None).await.unwrap();
    for of_it in [&sandbox, &client.sandbox(&grandchildren[0]).unwrap()] {
        assert_eq!(output(of_it, "cat ~/file").await, child.session_id);
        assert!(count(of_it).await >= before);
    }
    let refused = client.fork(&session.session_id, NewFork::of(101)).await;
    assert_eq!(refused.unwrap_err().code(), Some(Code::InvalidArgument));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_goes_back_to_a_checkpoint() {
    let mesh = Mesh::start(&[]);
    let session = mesh.session().await;
    let id = &session.session_id;
    let client = mesh.client();
    let sandbox = client.sandbox(&session).unwrap();
    output(&sandbox, "echo first > ~/file").await;
    counter(&sandbox).await;
    let at_checkpoint = count(&sandbox).await;
    let kept = client.create_checkpoint(id, "first").await.unwrap();
    output(&sandbox, "echo second > ~/file; touch ~/new").await;
    while count(&sandbox).await < at_checkpoint + 100 {}
    let mut under_way = sandbox
        .start(Command::new(["sh", "-c", "echo on; exec sleep 60"]))
        .await
        .unwrap();
    under_way.next().await.unwrap();
    let (rolled, cut) = tokio::join!(client.rollback(id, &kept.checkpoint_id), async {
        loop {
            match under_way.next().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("it ended well"),
                Err(error) => return error,
            }
        }
    });
    assert_eq!(rolled.unwrap().state(), SessionState::Running);
    assert_eq!(cut.code(), Some(Code::Aborted), "{cut}");
    assert_eq!(
        cut.reason().as_deref(),
        Some("SESSION_ROLLED_BACK"),
        "{cut}"
    );
    assert_eq!(
        output(&sandbox, "cat ~/file; ls ~/new 2>&1 | wc -l").await,
        "first\n1"
    );
    let now = count(&sandbox).await;
    assert!(
        (at_checkpoint..at_checkpoint + 80).contains(&now),
        "{now} follows {at_checkpoint}"
    );
    client
        .delete_checkpoint(id, &kept.checkpoint_id)
        .await
        .unwrap();
    let gone = client.rollback(id, &kept.checkpoint_id).await.unwrap_err();
    assert_eq!(gone.code(), Some(Code::NotFound), "{gone}");
}

/// Commands print while node-svc is killed again and again: not a byte is missing, and every session runs.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_killed_takes_its_sessions_over() {
    let mesh = Mesh::start(&["--separate"]);
    let client = mesh.client();
    let sessions = futures::future::join_all((0..2).map(|_| mesh.session())).await;
    let each = how_many("SANDMESH_E2E_COMMANDS", 4) / 2;
    let mut commands = Vec::new();
    for session in &sessions {
        let sandbox = client.sandbox(session).unwrap();
        for _ in 0..each {
            let script = "import os, time\nn = 0\nwhile not os.path.exists('/tmp/over'):\n    n += 1\n    print(n, flush=True)\n    time.sleep(0.03)";
            let process = sandbox
                .start(Command::new(["python3", "-c", script]))
                .await
                .unwrap();
            commands.push(tokio::spawn(process.output()));
        }
    }
    for _ in 0..how_many("SANDMESH_E2E_KILLS", 3) {
        mesh.crash("node");
        for session in &sessions {
            let sandbox = client.sandbox(session).unwrap();
            assert_eq!(output(&sandbox, "echo here").await, "here");
        }
    }
    for session in &sessions {
        output(&client.sandbox(session).unwrap(), "touch /tmp/over").await;
    }
    for command in commands {
        let output = command.await.unwrap().unwrap();
        assert_eq!(output.exit.code(), 0);
        let said = String::from_utf8(output.stdout).unwrap();
        let lines = said.lines().count();
        assert!(lines > 20, "{lines} lines");
        let wanted = (1..=lines).map(|n| n.to_string());
        assert!(said.lines().eq(wanted), "{said}");
    }
    for session in &sessions {
        let known = client.get(&session.session_id).await.unwrap();
        assert_eq!(known.state(), SessionState::Running);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vmm_that_dies_or_hangs_is_noticed() {
    let mesh = Mesh::start(&[]);
    let client = mesh.client();
    let [killed, stopped, panicked] = [
        mesh.session().await,
        mesh.session().await,
        mesh.session().await,
    ];
    mesh.kill_vmm(&killed);
    kill(mesh.vmm(&stopped), Signal::SIGSTOP).unwrap();
    let sandbox = client.sandbox(&panicked).unwrap();
    // The call does not come back.
    let mut crash = Command::new(["sh", "-c", "echo c > /proc/sysrq-trigger"]);
    crash.user = "root".into();
    let _ = tokio::time::timeout(Duration::from_secs(1), sandbox.start(crash)).await;
    for (session, reason) in [
        (&killed, "VMM_EXITED"),
        (&stopped, "VMM_HUNG"),
        (&panicked, "GUEST_PANIC"),
    ] {
        let began = Instant::now();
        loop {
            let known = client.get(&session.session_id).await.unwrap();
            if known.state() == SessionState::Failed {
                assert_eq!(known.end_reason.unwrap().reason, reason);
                break;
            }
            assert!(began.elapsed() < NOTICED, "{reason}: {:?}", known.state());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(
            !mesh
                .state()
                .join("node/s")
                .join(&session.session_id)
                .exists()
        );
    }
    // Its last words are its owner's to read.
    let mut logs = client.logs(&panicked.session_id, 0, true);
    let mut said = String::new();
    while let Some(message) = logs.next().await.unwrap() {
        let text = String::from_utf8_lossy(&message.data);
        said = format!("{said}{}: {text}\n", message.source);
    }
    assert!(
        said.contains("console: ") && said.contains("Kernel panic"),
        "{said}"
    );
    let end = "node: the session ended: GUEST_PANIC: the guest's kernel panicked\n";
    assert!(said.ends_with(end), "{said}");
}

/// A guest that waited is a session like any other, and nobody's twin.
#[tokio::test(flavor = "multi_thread")]
async fn guests_wait_for_their_sessions() {
    let mesh = Mesh::start_warm(&["--separate"], 1);
    let client = mesh.client();
    let waiting = mesh.state().join("node/w");
    let (mut machines, mut drawn) = (BTreeSet::new(), BTreeSet::new());
    for _ in 0..3 {
        let before: BTreeSet<_> = fs::read_dir(&waiting)
            .into_iter()
            .flatten()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        let session = mesh.session().await;
        let sandbox = client.sandbox(&session).unwrap();
        assert!(drawn.insert(random(&sandbox).await));
        let (machine, hostname) = identity(&sandbox).await;
        assert!(machines.insert(machine));
        assert!(hostname.ends_with(&session.session_id[..8]), "{hostname}");
        // It is a session's now: it pauses, and is taken over from where it lies.
        client.pause(&session.session_id).await.unwrap();
        client.resume(&session.session_id, None).await.unwrap();
        assert_eq!(output(&sandbox, "echo here").await, "here");
        let end = Instant::now() + Duration::from_mins(1);
        let is_new = || {
            let entries = fs::read_dir(&waiting).into_iter().flatten();
            entries
                .flatten()
                .any(|entry| !before.contains(&entry.file_name()))
        };
        while !(is_new()
            && mesh
                .metrics("node")
                .await
                .contains("sandmesh_node_warm_idle 1"))
        {
            assert!(Instant::now() < end, "no guest waits");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    let metrics = mesh.metrics("node").await;
    assert!(
        metrics.contains("sandmesh_node_warm_total{outcome=\"hit\"} 2"),
        "{metrics}"
    );
}

/// Session and envd of all a node hosts; `*` marks those that are outdated.
fn envds(mesh: &Mesh) -> std::collections::BTreeMap<String, String> {
    let nodes = mesh.run(&["node", "list", "-o", "json"]).stdout;
    let nodes: serde_json::Value = serde_json::from_slice(&nodes).unwrap();
    let node = nodes["nodes"][0]["nodeId"].as_str().unwrap();
    let listed = mesh.run(&["node", "sessions", node]);
    assert!(listed.status.success(), "{listed:?}");
    let listed = String::from_utf8(listed.stdout).unwrap();
    let rows = listed.lines().skip(1).map(|line| {
        let mut columns = line.split_whitespace();
        let session = columns.next().unwrap().to_owned();
        (session, columns.next_back().unwrap().to_owned())
    });
    rows.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_envd_reaches_what_starts_and_what_has_another_is_told() {
    let mesh = Mesh::start(&["--separate"]);
    let client = mesh.client();
    let [runs, sleeps] = [mesh.session().await, mesh.session().await];
    client.pause(&sleeps.session_id).await.unwrap();
    let before = envds(&mesh);
    assert_eq!(before[&runs.session_id], before[&sleeps.session_id]);
    assert!(!before[&runs.session_id].contains('*'));
    mesh.change_envd();
    mesh.crash("node");
    let new = mesh.session().await;
    client.resume(&sleeps.session_id, None).await.unwrap();
    let after = envds(&mesh);
    let old = format!("{}*", before[&runs.session_id]);
    assert_eq!(after[&runs.session_id], old);
    assert_eq!(after[&sleeps.session_id], old);
    // It does not wait for a boot, unless that was there first.
    let is_old = after[&new.session_id] == old;
    assert!(is_old || !after[&new.session_id].contains('*'));
    let renewed = "a template's snapshot has this envd now";
    wait_for(renewed, Duration::from_mins(2), || {
        let log = fs::read_to_string(mesh.state().join("logs/node.log"));
        log.unwrap().contains(renewed)
    });
    let newest = mesh.session().await;
    let after = envds(&mesh);
    assert_ne!(after[&newest.session_id], before[&runs.session_id]);
    assert!(!after[&newest.session_id].contains('*'));
    for session in [&runs, &sleeps, &new, &newest] {
        let sandbox = client.sandbox(session).unwrap();
        assert_eq!(output(&sandbox, "echo here").await, "here");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_create_waits_for_a_good_answer_at_a_port() {
    let mesh = Mesh::start(&[]);
    let client = mesh.client();
    let new = NewSession {
        request_id: "with-a-port".into(),
        wait_for_port: Some(PortReadiness {
            port: 8000,
            http_path: "/".into(),
            timeout: Duration::from_secs(10).try_into().ok(),
        }),
        ..small()
    };
    // Nothing listens in a new one, and it stays for whoever wants to see why.
    let early = client.create(new.clone()).await.unwrap_err();
    assert_eq!(early.code(), Some(Code::DeadlineExceeded), "{early}");
    assert_eq!(early.reason().as_deref(), Some("PORT_CLOSED"));
    let id = early.fact("sessionId").unwrap();
    let session = client.get(&id).await.unwrap();
    assert_eq!(session.state(), SessionState::Running);
    let sandbox = client.sandbox(&session).unwrap();
    guest::upload(&sandbox, env!("CARGO_BIN_EXE_guest-server")).await;
    // The same request is the same session, and waits again.
    let serve = guest::serve(&sandbox, "127.0.0.1:8000");
    let (ready, _server) = tokio::join!(client.create(new), serve);
    let ready = ready.unwrap();
    assert_eq!(ready.session_id, id);
    let host = ready.host.replace("{port}", "8000");
    assert_eq!(http::get(mesh.edge(), &host, "/", &[]).await.status, 200);
}
