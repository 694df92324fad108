//! What runs goes on, whatever else dies or is away.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    time::{Duration, Instant},
};

use e2e::{Mesh, guest, http, small};
use futures::{SinkExt as _, StreamExt as _};
use nix::sys::signal::Signal;
use proto::{
    envd::v1::{StartRequest, process_event::Event},
    session::v1::{Session, SessionState},
};
use sdk::Sandbox;
use tokio::sync::watch;
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream,
    tungstenite::{Message, client::IntoClientRequest as _},
};
use tonic::Code;

/// How long each kind of outage lasts: half of the 30 s that must do no harm.
const OUTAGE: Duration = Duration::from_secs(15);
/// How soon a create must have failed while it cannot work.
const FAST: Duration = Duration::from_secs(5);
const RECOVERY: Duration = Duration::from_secs(30);
const TICK: Duration = Duration::from_secs(5);

/// A process, a WebSocket and a web server in one sandbox, all in use.
struct InUse {
    host: String,
    edge: String,
    ticks: watch::Receiver<u64>,
    socket: WebSocketStream<MaybeTlsStream<tokio::net::TcpStream>>,
}

impl InUse {
    async fn start(mesh: &Mesh, session: &Session, sandbox: &Sandbox) -> Self {
        let (edge, host) = (
            mesh.edge().to_owned(),
            session.host.replace("{port}", "8000"),
        );
        guest::upload(sandbox, env!("CARGO_BIN_EXE_guest-server")).await;
        guest::serve(sandbox, "0.0.0.0:8000").await;
        http::get_when_open(&edge, &host, "/").await;
        let mut request = format!("ws://{edge}/ws").into_client_request().unwrap();
        request.headers_mut().insert("host", host.parse().unwrap());
        let (socket, _) = tokio_tungstenite::connect_async(request).await.unwrap();
        Self {
            host,
            edge,
            ticks: count(sandbox).await,
            socket,
        }
    }

    /// The same stream and the same socket still carry, and so does a new request.
    async fn still_works(&mut self, when: &str) {
        let now = *self.ticks.borrow();
        let next = tokio::time::timeout(TICK, self.ticks.wait_for(|tick| *tick > now)).await;
        next.unwrap_or_else(|_| panic!("{when}: the stream stands still"))
            .expect("the stream was not cut");
        self.socket.send(Message::text(when)).await.unwrap();
        let echo = tokio::time::timeout(TICK, self.socket.next()).await;
        assert_eq!(
            echo.expect("an echo").unwrap().unwrap(),
            Message::text(when)
        );
        let page = http::get(&self.edge, &self.host, "/", &[]).await;
        assert_eq!(page.status, 200, "{when}");
    }
}

/// Counts in the sandbox, over one stream that is never taken up again: a cut ends it.
async fn count(sandbox: &Sandbox) -> watch::Receiver<u64> {
    let request = StartRequest {
        shell_command: "n=1; while true; do echo $n; n=$((n+1)); sleep 0.2; done".into(),
        ..StartRequest::default()
    };
    let mut stream = sandbox
        .processes()
        .start(request)
        .await
        .unwrap()
        .into_inner();
    let (tell, ticks) = watch::channel(0);
    tokio::spawn(async move {
        let (mut line, mut last) = (Vec::new(), 0);
        while let Ok(Some(answer)) = stream.message().await {
            let Some(Event::Output(output)) = answer.event.and_then(|event| event.event) else {
                continue;
            };
            for byte in output.data {
                if byte != b'\n' {
                    line.push(byte);
                    continue;
                }
                let number: u64 = String::from_utf8_lossy(&line).parse().unwrap();
                assert_eq!(number, last + 1, "a line is missing or came twice");
                last = number;
                line.clear();
            }
            tell.send_replace(last);
        }
    });
    ticks
}

/// A create fails soon, as unavailable, and says when to try again.
async fn create_fails_fast(mesh: &Mesh, when: &str) {
    let began = Instant::now();
    let refused = mesh.client().create(small()).await.expect_err(when);
    assert!(
        began.elapsed() < FAST,
        "{when}: it took {:?}",
        began.elapsed()
    );
    assert_eq!(refused.code(), Some(Code::Unavailable), "{when}: {refused}");
    assert!(refused.retry_after().is_some(), "{when}: {refused}");
}

async fn create_works_again(mesh: &Mesh, when: &str) -> Session {
    let end = Instant::now() + RECOVERY;
    loop {
        match mesh.client().create(small()).await {
            Ok(session) => return session,
            Err(error) => assert!(Instant::now() < end, "{when}: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_runs_goes_on_whatever_else_dies_or_is_away() {
    let mesh = Mesh::start(&["--separate", "--node-dead-after", "10s"]);
    let session = mesh.session().await;
    let sandbox = mesh.client().sandbox(&session).unwrap();
    let mut running = InUse::start(&mesh, &session, &sandbox).await;

    for part in ["gateway", "session", "template", "envoy-control"] {
        mesh.crash(part);
        running
            .still_works(&format!("after {part} was killed"))
            .await;
        let known = mesh.client().get(&session.session_id).await;
        assert_eq!(
            known.unwrap().state(),
            SessionState::Running,
            "after {part} was killed"
        );
    }

    // Frozen, both stores hang: worse than being gone, since nobody is told.
    mesh.signal_tree("postgres", Signal::SIGSTOP);
    mesh.signal_tree("redis", Signal::SIGSTOP);
    let end = Instant::now() + OUTAGE;
    while Instant::now() < end {
        running.still_works("while both stores hang").await;
        create_fails_fast(&mesh, "while both stores hang").await;
    }
    mesh.signal_tree("redis", Signal::SIGCONT);
    mesh.signal_tree("postgres", Signal::SIGCONT);
    let after = create_works_again(&mesh, "after both stores hung").await;
    mesh.client().stop(&after.session_id).await.unwrap();

    // Gone: Postgres cannot start, Redis comes back empty.
    let data = mesh.state().join("postgres");
    fs::set_permissions(&data, fs::Permissions::from_mode(0o000)).unwrap();
    mesh.signal_tree("postgres", Signal::SIGKILL);
    mesh.kill("redis");
    let end = Instant::now() + OUTAGE;
    while Instant::now() < end {
        running.still_works("while Postgres is gone").await;
        create_fails_fast(&mesh, "while Postgres is gone").await;
    }
    fs::set_permissions(&data, fs::Permissions::from_mode(0o700)).unwrap();
    let after = create_works_again(&mesh, "after Postgres was gone").await;
    assert!(mesh.client().sandbox(&after).unwrap().info().await.is_ok());

    // Nobody was taken for dead meanwhile, although no heartbeat could be heard.
    let known = mesh.client().get(&session.session_id).await.unwrap();
    assert_eq!(known.state(), SessionState::Running);
    running.still_works("at the end").await;
}
