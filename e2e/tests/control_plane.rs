//! The control plane with simulated guests: bad input, idempotence, deadlines, and parts that are killed.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{collections::HashSet, time::Duration};

use e2e::{Mesh, small, wait_for};
use proto::session::v1::{ListSessionEventsRequest, Session, SessionState, WatchSessionsRequest};
use sdk::{Client, NewSession};
use tonic::Code;

fn reason(result: Result<Session, sdk::Error>) -> String {
    result
        .expect_err("it must be refused")
        .reason()
        .expect("a reason")
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_input_is_refused_with_words_and_loses_nothing() {
    let mesh = Mesh::start(&["--vmm", "fake", "--max-sessions", "3"]);
    let client = mesh.client();
    let with = |edit: &dyn Fn(&mut NewSession)| {
        let mut new = small();
        edit(&mut new);
        new
    };

    let stranger = Client::connect(mesh.endpoint(), "nonsense").unwrap();
    assert_eq!(reason(stranger.create(small()).await), "API_KEY_INVALID");
    let unknown = client
        .create(with(&|new| new.template = "bsae".into()))
        .await
        .unwrap_err();
    assert_eq!(
        (unknown.code(), unknown.reason().as_deref()),
        (Some(Code::NotFound), Some("TEMPLATE_UNKNOWN"))
    );
    assert_eq!(unknown.fact("closest").as_deref(), Some("base"));
    for seconds in [0, 365 * 24 * 3600] {
        let refused = client
            .create(with(&|new| {
                new.timeout = Some(Duration::from_secs(seconds));
            }))
            .await;
        assert_eq!(reason(refused), "INVALID_ARGUMENT");
    }
    let labels = client
        .create(with(&|new| {
            drop(new.metadata.insert("k".into(), "v".repeat(1 << 20)));
        }))
        .await;
    assert_eq!(reason(labels), "INVALID_ARGUMENT");
    assert_eq!(reason(client.get("short").await), "SESSION_ID_MALFORMED");
    assert_eq!(
        reason(client.get("aaaaabbbbbbbbbbbbbbbbbbbb").await),
        "SESSION_UNKNOWN"
    );

    // Another team's session looks unknown; a revoked key is refused.
    let created = mesh.run(&["key", "create", "--team", "other"]);
    let secret = String::from_utf8(created.stdout).unwrap().trim().to_owned();
    let other = Client::connect(mesh.endpoint(), &secret).unwrap();
    let mine = client.create(small()).await.unwrap();
    assert_eq!(reason(other.get(&mine.session_id).await), "SESSION_UNKNOWN");
    assert_eq!(
        reason(other.stop(&mine.session_id).await),
        "SESSION_UNKNOWN"
    );
    let key_id = secret.rsplit_once('_').unwrap().0;
    assert!(mesh.run(&["key", "revoke", key_id]).status.success());
    tokio::time::sleep(Duration::from_millis(1100)).await; // keys are believed for a second
    assert_eq!(reason(other.get(&mine.session_id).await), "API_KEY_INVALID");

    // A full deployment says what is free, and takes sessions again once there is room.
    let second = client.create(small()).await.unwrap();
    client.create(small()).await.unwrap();
    let full = client.create(small()).await.unwrap_err();
    assert_eq!(
        (full.code(), full.reason().as_deref()),
        (Some(Code::ResourceExhausted), Some("NO_CAPACITY"))
    );
    assert_eq!(full.fact("freeSessions").as_deref(), Some("0"));
    client.stop(&second.session_id).await.unwrap();
    let mut again = client.create(small()).await;
    for _ in 0..50 {
        if again.is_ok() {
            break;
        }
        // The registry hears of the room with the next heartbeat.
        tokio::time::sleep(Duration::from_millis(100)).await;
        again = client.create(small()).await;
    }
    again.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn one_request_id_is_one_session_whoever_is_killed() {
    let mesh = Mesh::start(&["--vmm", "fake", "--separate", "--session-replicas", "2"]);
    let client = mesh.client();
    let named = |id: &str| NewSession {
        request_id: id.into(),
        ..small()
    };

    let twenty = futures::future::join_all((0..20).map(|_| client.create(named("same")))).await;
    let ids: HashSet<String> = twenty
        .into_iter()
        .map(|session| session.unwrap().session_id)
        .collect();
    assert_eq!(ids.len(), 1);
    let id = ids.into_iter().next().unwrap();

    // A watch from the beginning sees what comes, in order.
    let mut watch = client
        .sessions()
        .watch_sessions(WatchSessionsRequest::default())
        .await
        .unwrap()
        .into_inner();
    let first = client.create(small()).await.unwrap();
    let seen = async {
        loop {
            let change = watch.message().await.unwrap().expect("the watch goes on");
            if let Some(session) = change.session
                && session.session_id == first.session_id
                && session.state() == SessionState::Running
            {
                break change.revision;
            }
        }
    };
    let revision = tokio::time::timeout(Duration::from_secs(10), seen)
        .await
        .expect("the change is seen");
    assert!(!revision.is_empty());

    // Every part of the control plane may be killed; the next call works, or a retry of it.
    for part in [
        "gateway",
        "session",
        "session-2",
        "template",
        "envoy-control",
        "redis",
        "postgres",
    ] {
        mesh.crash(part);
        let mut worked = false;
        for _ in 0..100 {
            if client.create(named(&format!("after-{part}"))).await.is_ok()
                && client.get(&id).await.is_ok()
            {
                worked = true;
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        assert!(worked, "after {part} was killed:\n{}", mesh.log());
    }

    // A deadline is kept over restarts of those who keep it.
    let short = NewSession {
        timeout: Some(Duration::from_secs(2)),
        ..small()
    };
    let short = client.create(short).await.unwrap();
    mesh.crash("session");
    mesh.crash("session-2");
    let end = std::time::Instant::now() + Duration::from_secs(20);
    let stopped = loop {
        let session = client.get(&short.session_id).await;
        match session {
            Ok(session) if session.state() == SessionState::Stopped => break session,
            _ => assert!(
                std::time::Instant::now() < end,
                "the deadline passed in vain"
            ),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    assert_eq!(stopped.end_reason.unwrap().reason, "DEADLINE_EXPIRED");
    let request = ListSessionEventsRequest {
        session_id: short.session_id,
        ..Default::default()
    };
    let events = client
        .sessions()
        .list_session_events(request)
        .await
        .unwrap()
        .into_inner()
        .events;
    let kinds: Vec<&str> = events.iter().map(|event| event.r#type.as_str()).collect();
    assert_eq!(
        kinds,
        ["CREATED", "STARTING", "RUNNING", "STOPPING", "STOPPED"]
    );
    wait_for("all parts are healthy", Duration::from_secs(20), || {
        mesh.parts().iter().all(|part| part.healthy)
    });
}
