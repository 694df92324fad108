//! From nothing to a command and a web page inside a microVM, through Envoy; and nothing left at the end.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{collections::BTreeSet, time::Duration};

use bytes::Bytes;
use e2e::{Mesh, guest, http, leaks, wait_for};
use futures::{SinkExt as _, StreamExt as _};
use proto::envd::v1::WriteHeader;
use sdk::{Command, Event};
use tokio_tungstenite::tungstenite::{Message, client::IntoClientRequest as _};
use tonic::transport::Endpoint;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

#[tokio::test(flavor = "multi_thread")]
async fn commands_files_and_ports_work_and_nothing_is_left() {
    let mut mesh = Mesh::start(&[]);
    let session = mesh.session().await;
    let sandbox = mesh.client().sandbox(&session).unwrap();

    // Routable and configured the moment create returns.
    let info = sandbox.info().await.unwrap();
    assert_eq!(info.session_id, session.session_id);
    assert!(info.hostname.starts_with("sandbox-"));

    // Bytes are bytes, streams are apart, exit codes and signals are told.
    let output = sandbox
        .run(["sh", "-c", r"printf '\000\377out'; printf err >&2; exit 7"])
        .await
        .unwrap();
    assert_eq!(
        (output.stdout.as_slice(), output.stderr.as_slice()),
        (&b"\x00\xffout"[..], &b"err"[..])
    );
    assert_eq!(output.exit.code(), 7);
    let killed = sandbox.run(["sh", "-c", "kill -9 $$"]).await.unwrap();
    assert_eq!(killed.exit.code(), 137);

    // A login's environment, and errors with reasons instead of mystery codes.
    let env = sandbox
        .run(["sh", "-c", "echo $HOME $USER $LANG; pwd"])
        .await
        .unwrap();
    assert_eq!(env.stdout, b"/home/user user C.UTF-8\n/home/user\n");
    let missing = sandbox.run(["no-such-program"]).await.unwrap_err();
    assert_eq!(missing.reason().as_deref(), Some("PROGRAM_NOT_FOUND"));
    let nobody = sandbox
        .start(Command {
            user: "nobody-here".into(),
            ..Command::new(["true"])
        })
        .await
        .unwrap_err();
    assert_eq!(nobody.reason().as_deref(), Some("USER_UNKNOWN"));

    // All output arrives, 20 MB of it, and stdin is acknowledged by offset: sending twice is harmless.
    let big = sandbox
        .run(["head", "-c", "20000000", "/dev/zero"])
        .await
        .unwrap();
    assert_eq!(big.stdout.len(), 20_000_000);
    let mut cat = sandbox
        .start(Command {
            stdin: true,
            ..Command::new(["cat"])
        })
        .await
        .unwrap();
    let remote = cat.remote();
    assert_eq!(
        remote
            .send_input(0, Bytes::from_static(b"hello "))
            .await
            .unwrap(),
        6
    );
    assert_eq!(
        remote
            .send_input(0, Bytes::from_static(b"hello world"))
            .await
            .unwrap(),
        11
    );
    remote.close_input().await.unwrap();
    let mut echoed = Vec::new();
    while let Some(event) = cat.next().await.unwrap() {
        if let Event::Stdout(bytes) = event {
            echoed.extend_from_slice(&bytes);
        }
    }
    assert_eq!(echoed, b"hello world");

    // A deadline ends a process; a client that leaves does not.
    let late = Command {
        deadline: Some(Duration::from_millis(300)),
        ..Command::new(["sleep", "60"])
    };
    let late = sandbox.start(late).await.unwrap().output().await.unwrap();
    assert!(late.exit.0.deadline_exceeded);

    // Files: any bytes, as a user, and only what that user may.
    let data: Vec<u8> = (0..3_000_000_u32).flat_map(u32::to_le_bytes).collect();
    let header = WriteHeader {
        path: "deep/er/file".into(),
        make_parents: true,
        ..WriteHeader::default()
    };
    let entry = sandbox
        .write_from(header, &mut data.as_slice(), |_| {})
        .await
        .unwrap();
    assert_eq!((entry.size_bytes, entry.uid), (data.len() as u64, 1000));
    let mut back = Vec::new();
    sandbox
        .read_to("~/deep/er/file", &mut back, |_| {})
        .await
        .unwrap();
    assert_eq!(back, data);
    assert_eq!(sandbox.list("deep").await.unwrap().len(), 1);
    let denied = sandbox
        .read_to("/etc/shadow", &mut Vec::new(), |_| {})
        .await
        .unwrap_err();
    assert_eq!(denied.reason().as_deref(), Some("PATH_PERMISSION_DENIED"));

    // Ports: on every address and on the loopback alone.
    guest::upload(&sandbox, env!("CARGO_BIN_EXE_guest-server")).await;
    guest::serve(&sandbox, "0.0.0.0:8000").await;
    guest::serve(&sandbox, "127.0.0.1:8001").await;
    let name = |port: u16| session.host.replace("{port}", &port.to_string());
    for port in [8000, 8001] {
        let page = http::get_when_open(mesh.edge(), &name(port), "/").await;
        assert_eq!(page.status, 200);
        assert_eq!(page.body.as_ref(), b"<h1>in a microVM</h1>");
        let events = http::get(mesh.edge(), &name(port), "/events", &[]).await;
        assert_eq!(events.body.as_ref(), b"data: 0\n\ndata: 1\n\ndata: 2\n\n");
        web_socket_echoes(mesh.edge(), &name(port)).await;
        assert_eq!(grpc_health(mesh.endpoint(), &name(port)).await, 1);
    }
    // One that is not open yet is waited for, if the client says so; without that it is refused at once.
    let wait = |time| [("x-session-wait", time)];
    let (late, minute) = (name(8012), wait("1m"));
    let (waited, _server) = tokio::join!(
        http::get(mesh.edge(), &late, "/", &minute),
        guest::serve(&sandbox, "127.0.0.1:8012"),
    );
    assert_eq!(waited.status, 200);
    let closed = http::get(mesh.edge(), &name(82), "/", &wait("50ms")).await;
    assert_eq!(closed.refusal(), (502, "PORT_CLOSED".into()));
    let wrong = http::get(mesh.edge(), &name(8012), "/", &wait("an hour")).await;
    assert_eq!(wrong.refusal(), (400, "INVALID_ARGUMENT".into()));
    let listeners = sandbox.ports().await.unwrap();
    assert!(listeners.iter().any(|found| {
        (found.port, found.address.as_str()) == (8001, "127.0.0.1")
            && found.command == "guest-server"
    }));
    let upper = http::get(mesh.edge(), &name(8000).to_uppercase(), "/", &[]).await;
    assert_eq!(upper.status, 200, "host names keep no case");
    let by_header = [
        ("x-session-id", session.session_id.as_str()),
        ("x-session-port", "8000"),
    ];
    let by_header = http::get(mesh.edge(), "anything", "/", &by_header).await;
    assert_eq!(by_header.status, 200, "headers name a port as well");

    // What strangers say under our own names does not arrive; all else does.
    let spoofed = [
        ("x-sandmesh-team", "evil"),
        ("x-sandmesh-hop", "1"),
        ("x-sandmesh-authority", "evil"),
        ("x-sandmesh-mesh", "evil"),
        ("x-mine", "kept"),
        ("under_score", "kept"),
    ];
    let seen = http::get(mesh.edge(), &name(8000), "/headers", &spoofed).await;
    let seen = String::from_utf8_lossy(&seen.body).to_lowercase();
    let host = format!("host: {}", name(8000));
    assert!(
        seen.contains(&host),
        "the name is whole, its port too: {seen}"
    );
    assert!(
        seen.contains("x-mine: kept") && seen.contains("under_score: kept"),
        "{seen}"
    );
    assert!(
        !seen.contains("evil") && !seen.contains("x-sandmesh"),
        "{seen}"
    );

    // A response that ends with its connection, from a server that knows nothing of lengths.
    let old = r"
import socket
server = socket.create_server(('127.0.0.1', 8002))
while True:
    client, _ = server.accept()
    client.recv(65536)
    client.sendall(b'HTTP/1.1 200 OK\r\n\r\nbye')
    client.close()
";
    let old = Command::new(["python3", "-c", old]);
    sandbox.start(old).await.unwrap();
    let answer = http::get_when_open(mesh.edge(), &name(8002), "/").await;
    assert_eq!(answer.body.as_ref(), b"bye");

    // The command line: raw bytes through a pipe, the command's own exit code, addresses.
    let exec = mesh.run(&[
        "exec",
        &session.session_id,
        "--",
        "sh",
        "-c",
        "printf '\\377'; exit 3",
    ]);
    assert_eq!(
        (exec.stdout.as_slice(), exec.status.code()),
        (&b"\xff"[..], Some(3))
    );
    let url = mesh.run(&["url", &session.session_id, "8000"]);
    assert_eq!(
        String::from_utf8_lossy(&url.stdout).trim(),
        format!("http://{}/", name(8000))
    );

    // After the stop nothing of the sandbox is left, and everybody is told so.
    mesh.client().stop(&session.session_id).await.unwrap();
    let ended = http::get(mesh.edge(), &name(8000), "/", &[]).await;
    assert_eq!(ended.refusal(), (404, "SESSION_STOPPED".to_owned()));
    let ended = sandbox.info().await.unwrap_err();
    assert_eq!(ended.reason().as_deref(), Some("SESSION_STOPPED"));
    let node_state = mesh.state().join("node");
    assert_eq!(std::fs::read_dir(node_state.join("s")).unwrap().count(), 0);

    let block =
        leaks::block_of(&node_state.to_string_lossy()).expect("the node has a block of slots");
    let state = mesh.state().to_string_lossy().into_owned();
    assert!(!leaks::of_block(block).is_empty());
    mesh.down();
    assert_eq!(leaks::of_state(&state), BTreeSet::new());
    assert_eq!(leaks::of_block(block), BTreeSet::new());
}

/// However a deployment ends, `down` leaves nothing of it.
#[tokio::test(flavor = "multi_thread")]
async fn down_cleans_up_after_a_deployment_that_was_killed() {
    let mut mesh = Mesh::start(&[]);
    let session = mesh.session().await;
    assert!(
        mesh.client()
            .sandbox(&session)
            .unwrap()
            .info()
            .await
            .is_ok()
    );
    let state = mesh.state().to_string_lossy().into_owned();
    let node_state = mesh.state().join("node");
    let block = leaks::block_of(&node_state.to_string_lossy()).expect("a block of slots");
    mesh.kill("node");
    wait_for("children go with it", Duration::from_secs(20), || {
        let left = leaks::of_state(&state);
        !left
            .iter()
            .any(|found| found.contains("envoy") || found.contains("postgres"))
    });
    let left = leaks::of_state(&state);
    assert!(
        left.iter().any(|found| found.contains("qemu")),
        "a VMM outlives its node: {left:?}"
    );
    assert!(!leaks::of_block(block).is_empty());
    mesh.down();
    assert_eq!(leaks::of_state(&state), BTreeSet::new());
    assert_eq!(leaks::of_block(block), BTreeSet::new());
}

async fn web_socket_echoes(edge: &str, host: &str) {
    let mut request = format!("ws://{edge}/ws").into_client_request().unwrap();
    request.headers_mut().insert("host", host.parse().unwrap());
    let (mut socket, _) = tokio_tungstenite::connect_async(request).await.unwrap();
    for text in ["one", "two"] {
        socket.send(Message::text(text)).await.unwrap();
        assert_eq!(socket.next().await.unwrap().unwrap(), Message::text(text));
    }
}

/// A unary gRPC call to a server in the sandbox, found by authority: its `grpc.health.v1` status.
async fn grpc_health(endpoint: &str, host: &str) -> i32 {
    let channel = Endpoint::from_shared(endpoint.to_owned())
        .unwrap()
        .origin(format!("http://{host}").parse().unwrap())
        .connect()
        .await
        .unwrap();
    let mut health = HealthClient::new(channel);
    let answer = health.check(HealthCheckRequest::default()).await.unwrap();
    answer.into_inner().status
}
