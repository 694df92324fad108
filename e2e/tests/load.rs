//! Much at once: a gibibyte through a port, clients that vanish, twenty sandboxes.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    collections::BTreeSet,
    fs,
    time::{Duration, Instant},
};

use bytes::Bytes;
use e2e::{Mesh, guest, http, leaks, wait_for};
use proto::envd::v1::{ProcessServiceListRequest, StartRequest};
use sdk::Command;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

const GIBIBYTE: u64 = 1 << 30;
/// What a process on the path may grow by while a gibibyte passes.
const GROWTH: u64 = 64 << 20;
const VANISHING: usize = 30;

fn status(pid: i32, field: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(field))
        .unwrap();
    let kib: u64 = line
        .trim_start_matches(':')
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .unwrap();
    kib << 10
}

/// Makes the largest resident size count from now (proc_pid_clear_refs(5)).
fn forget_peak(pid: i32) -> u64 {
    fs::write(format!("/proc/{pid}/clear_refs"), "5").unwrap();
    status(pid, "VmRSS")
}

fn descriptors(pid: i32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gibibyte_passes_in_constant_memory_and_vanished_clients_leave_nothing() {
    let mesh = Mesh::start(&["--separate"]);
    let session = mesh.session().await;
    let sandbox = mesh.client().sandbox(&session).unwrap();
    guest::upload(&sandbox, env!("CARGO_BIN_EXE_guest-server")).await;
    guest::serve(&sandbox, "0.0.0.0:8000").await;
    let name = session.host.replace("{port}", "8000");
    http::get_when_open(mesh.edge(), &name, "/").await;
    let path: Vec<(String, i32)> = ["envoy", "node"]
        .map(|part| (part.to_owned(), mesh.part(part).pid))
        .into();

    let before: Vec<u64> = path.iter().map(|(_, pid)| forget_peak(*pid)).collect();
    let part = Bytes::from(vec![7; 256 << 10]);
    let count = GIBIBYTE / part.len() as u64;
    let answer = http::post_many(mesh.edge(), &name, "/count", part, count).await;
    assert_eq!(
        (answer.status.as_u16(), answer.body.as_ref()),
        (200, GIBIBYTE.to_string().as_bytes())
    );
    for ((part, pid), before) in path.iter().zip(before) {
        let peak = status(*pid, "VmHWM");
        println!(
            "{part}: {} MiB before, {} MiB at most",
            before >> 20,
            peak >> 20
        );
        assert!(
            peak < before + GROWTH,
            "{part} grew from {before} to {peak} bytes"
        );
    }

    // Clients that vanish in the middle of a download, an upload, and a stream.
    let before: Vec<usize> = path.iter().map(|(_, pid)| descriptors(*pid)).collect();
    for _ in 0..VANISHING {
        let mut socket = tokio::net::TcpStream::connect(mesh.edge()).await.unwrap();
        let get = format!("GET /zeroes/{GIBIBYTE} HTTP/1.1\r\nhost: {name}\r\n\r\n");
        socket.write_all(get.as_bytes()).await.unwrap();
        socket.read_exact(&mut [0; 1000]).await.unwrap();
        let mut socket = tokio::net::TcpStream::connect(mesh.edge()).await.unwrap();
        let post =
            format!("POST /count HTTP/1.1\r\nhost: {name}\r\ncontent-length: {GIBIBYTE}\r\n\r\n");
        socket.write_all(post.as_bytes()).await.unwrap();
        socket.write_all(&[7; 1000]).await.unwrap();
    }
    let endless = StartRequest {
        argv: vec!["yes".into()],
        process_id: "endless".into(),
        ..Default::default()
    };
    let mut stream = sandbox
        .processes()
        .start(endless)
        .await
        .unwrap()
        .into_inner();
    stream.message().await.unwrap().expect("it runs");
    drop(stream);
    for ((part, pid), before) in path.iter().zip(before) {
        wait_for(
            &format!("{part} closes what nobody reads"),
            Duration::from_secs(20),
            || descriptors(*pid) <= before + 4,
        );
    }
    // The process goes on without its client, and is found again by its ID.
    let mut processes = sandbox.processes();
    let running = processes.list(ProcessServiceListRequest::default()).await;
    let running = running.unwrap().into_inner().processes;
    assert!(
        running
            .iter()
            .any(|process| process.process_id == "endless" && process.exited.is_none())
    );
    assert_eq!(http::get(mesh.edge(), &name, "/", &[]).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_sandboxes_at_once_each_with_its_own_files() {
    let mut mesh = Mesh::start(&[]);
    let began = Instant::now();
    let sessions = futures::future::join_all((0..20).map(|_| mesh.session())).await;
    println!("20 sessions run after {:?}", began.elapsed());
    let ids: BTreeSet<&str> = sessions
        .iter()
        .map(|session| session.session_id.as_str())
        .collect();
    assert_eq!(ids.len(), 20);
    let node_state = mesh.state().join("node");
    assert_eq!(fs::read_dir(node_state.join("s")).unwrap().count(), 20);

    let checks = sessions.iter().map(|session| async {
        let sandbox = mesh.client().sandbox(session).unwrap();
        let id = &session.session_id;
        let script = format!(
            "test ! -e mine && mkdir site && echo {id} | tee mine > site/index.html; cat mine"
        );
        let written = sandbox.run(["sh", "-c", &script]).await.unwrap();
        assert_eq!(String::from_utf8_lossy(&written.stdout).trim(), id);
        let server = Command {
            cwd: "site".into(),
            ..Command::new(["python3", "-m", "http.server", "8000"])
        };
        sandbox.start(server).await.unwrap();
        let name = session.host.replace("{port}", "8000");
        let page = http::get_when_open(mesh.edge(), &name, "/").await;
        assert_eq!(
            String::from_utf8_lossy(&page.body).trim(),
            id,
            "each serves its own file"
        );
    });
    futures::future::join_all(checks).await;
    println!("all 20 answered exec and HTTP after {:?}", began.elapsed());

    let stops = sessions
        .iter()
        .map(|session| mesh.client().stop(&session.session_id));
    for stopped in futures::future::join_all(stops).await {
        stopped.unwrap();
    }
    println!("all 20 stopped after {:?}", began.elapsed());
    assert_eq!(
        fs::read_dir(node_state.join("s")).unwrap().count(),
        0,
        "no folder is left"
    );
    let state = mesh.state().to_string_lossy().into_owned();
    let qemus = leaks::of_state(&state)
        .into_iter()
        .filter(|found| found.contains("qemu"));
    assert_eq!(qemus.count(), 0, "no VMM is left");
    let block =
        leaks::block_of(&node_state.to_string_lossy()).expect("the node has a block of slots");
    mesh.down();
    assert_eq!(leaks::of_state(&state), BTreeSet::new());
    assert_eq!(leaks::of_block(block), BTreeSet::new());
}
