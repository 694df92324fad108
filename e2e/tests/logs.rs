//! Logs of a session by its ID: complete whoever dies, and still there when the session has ended.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::time::Duration;

use e2e::Mesh;
use proto::session::v1::StreamSessionLogsResponse;
use sdk::{Client, Command};

const PATIENCE: Duration = Duration::from_mins(2);
const LINES: usize = 150;

/// All of a log, which ends.
async fn read(client: &Client, session: &str, follow: bool) -> Vec<StreamSessionLogsResponse> {
    let mut logs = client.logs(session, 0, follow);
    let mut all = Vec::new();
    while let Some(message) = logs.next().await.unwrap() {
        all.push(message);
    }
    all
}

fn said(log: &[StreamSessionLogsResponse], source: &str) -> Vec<String> {
    let of_source = log.iter().filter(|message| message.source == source);
    of_source
        .map(|message| String::from_utf8_lossy(&message.data).into_owned())
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn logs_are_complete_whoever_dies_and_outlive_their_session() {
    let mesh = Mesh::start(&["--separate"]);
    let client = mesh.client();
    let session = mesh.session().await;
    let id = session.session_id.clone();
    let sandbox = client.sandbox(&session).unwrap();
    let follower = {
        let (client, id) = (client.clone(), id.clone());
        tokio::spawn(async move { read(&client, &id, true).await })
    };
    let script = format!(
        "i=0; while [ $i -lt {LINES} ]; do i=$((i+1)); echo line $i; sleep 0.1; done; printf 'no end' >&2"
    );
    let counter = Command {
        process_id: Some("counter".into()),
        log_output: true,
        ..Command::new(["sh", "-c", &script])
    };
    let counter = sandbox.start(counter).await.unwrap();
    let unlogged = sandbox.run(["echo", "nobody's business"]).await.unwrap();
    assert_eq!(unlogged.exit.code(), 0);
    for part in ["node", "session", "gateway", "envoy"] {
        mesh.crash(part);
    }
    client.pause(&id).await.unwrap();
    client.resume(&id, None).await.unwrap();
    let counted = tokio::time::timeout(PATIENCE, counter.output());
    assert_eq!(counted.await.unwrap().unwrap().exit.code(), 0);
    let mut shout = Command::new(["sh", "-c", "echo goodbye > /dev/kmsg"]);
    shout.user = "root".into();
    sandbox.start(shout).await.unwrap().output().await.unwrap();
    // What is followed tells when it is kept.
    let mut tail = client.logs(&id, 0, true);
    loop {
        let message = tokio::time::timeout(PATIENCE, tail.next()).await.unwrap();
        if message.unwrap().expect("it goes on").data == b"goodbye" {
            break;
        }
    }
    client.stop(&id).await.unwrap();

    let followed = tokio::time::timeout(PATIENCE, follower)
        .await
        .unwrap()
        .unwrap();
    let kept = read(client, &id, false).await;
    assert_eq!(followed, kept);
    assert!(kept.iter().all(|message| message.dropped == 0));
    assert!(
        kept.iter()
            .map(|message| message.sequence)
            .eq(1..=kept.len() as u64)
    );
    let mut expected: Vec<_> = (1..=LINES).map(|n| format!("line {n}")).collect();
    expected.push("no end".into());
    assert_eq!(said(&kept, "process:counter"), expected);
    assert_eq!(said(&kept, "user"), ["goodbye"]);
    let kernel = said(&kept, "kernel");
    assert!(kernel.iter().any(|line| line.starts_with("Linux version")));
    assert!(
        kept.iter()
            .all(|message| !message.data.starts_with(b"nobody"))
    );
    let shown = mesh.run(&["logs", &id]);
    let shown = String::from_utf8(shown.stdout).unwrap();
    assert_eq!(shown.lines().count(), kept.len());
    assert!(shown.contains("process:counter line 150"));
}
