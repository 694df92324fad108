//! What is promised of settings that reach the node, and of metrics that come from it.

use std::time::Duration;

use proto::{
    node::v1::SessionNotice,
    session::v1::{
        CreateSessionRequest, Egress, GetSessionMetricsRequest, GetSessionMetricsResponse, Network,
        PortAccess, Session, SessionState, StreamSessionLogsRequest, UpdateSessionRequest,
    },
};
use service_kit::errors::{Failure, Reason};
use tokio_stream::StreamExt as _;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::{
    node::{FakeNode, STORED},
    world::{Replica, World, assert_refused, base, by, eventually, red},
};

fn update(id: &str, paths: &[&str], network: Network) -> UpdateSessionRequest {
    UpdateSessionRequest {
        session_id: id.into(),
        update_mask: Some(prost_types::FieldMask {
            paths: paths.iter().map(ToString::to_string).collect(),
        }),
        wake_on_request: true,
        network: Some(network),
        ..UpdateSessionRequest::default()
    }
}

async fn updated(replica: &Replica, request: UpdateSessionRequest) -> Result<Session, Status> {
    let answer = replica.sessions().update_session(red(request)).await?;
    Ok(answer.into_inner().session.unwrap())
}

fn denying(name: &str) -> Network {
    Network {
        egress: Some(Egress {
            allow: vec![],
            deny: vec![name.into()],
        }),
        ..Network::default()
    }
}

/// What the node was told is denied.
fn denied(node: &FakeNode, id: &str) -> Option<Vec<String>> {
    let inside = node.inside();
    let (network, _) = inside.settings.get(id)?;
    Some(network.egress.clone()?.deny)
}

#[tokio::test]
async fn a_create_and_updates_of_the_network_reach_the_node() {
    let world = World::new().await;
    let replica = world.replica();
    let node = world.node(&replica, 4).await;
    let asked = Network {
        internet_access: Some(false),
        egress: Some(Egress {
            allow: vec!["*.Example.com".into(), "203.0.113.0/24".into()],
            deny: vec!["203.0.113.7".into()],
        }),
        egress_bytes_per_second: 1 << 20,
        ..Network::default()
    };
    let request = CreateSessionRequest {
        network: Some(asked),
        ..base()
    };
    let session = replica.create(request).await.unwrap();
    let id = &session.session_id;
    let network = session.network.unwrap();
    assert_eq!(
        network.egress.as_ref().unwrap().allow,
        ["*.example.com", "203.0.113.0/24"]
    );
    assert_eq!(network.egress_bytes_per_second, 1 << 20);
    let change = Network {
        port_access: PortAccess::Token.into(),
        internet_access: Some(true),
        ingress_bytes_per_second: 4096,
        ..denying("example.org")
    };
    // Only what is named changes.
    let request = update(
        id,
        &["network.egress", "network.ingress_bytes_per_second"],
        change,
    );
    let session = updated(&replica, request.clone()).await.unwrap();
    let expected = Network {
        egress: denying("example.org").egress,
        ingress_bytes_per_second: 4096,
        ..network
    };
    assert_eq!(session.network, Some(expected.clone()));
    assert_eq!(node.inside().settings[id], (expected, false));
    let all = [
        "network.port_access",
        "network.internet_access",
        "network.egress_bytes_per_second",
        "wake_on_request",
    ];
    let session = updated(&replica, update(id, &all, request.network.unwrap()))
        .await
        .unwrap();
    let network = session.network.unwrap();
    assert_eq!(network.port_access(), PortAccess::Token);
    assert_eq!(
        (network.internet_access, network.egress_bytes_per_second),
        (Some(true), 0)
    );
    assert!(session.wake_on_request);
    assert_eq!(node.inside().settings[id], (network, true));
    // A paused one is told, too.
    replica.pause(id).await.unwrap();
    updated(
        &replica,
        update(id, &["network.egress"], denying("a.example")),
    )
    .await
    .unwrap();
    assert_eq!(denied(&node, id).unwrap(), ["a.example"]);
    // What the node need not know, it is not told.
    let told = node.count("update");
    updated(&replica, update(id, &["metadata"], Network::default()))
        .await
        .unwrap();
    assert_eq!(node.count("update"), told);
    let wrong = updated(&replica, update(id, &["network.egress"], denying("a b"))).await;
    let status = assert_refused(wrong, Code::InvalidArgument, "INVALID_ARGUMENT");
    let field = &status.get_details_bad_request().unwrap().field_violations[0].field;
    assert_eq!(field, "network.egress.deny");
}

#[tokio::test]
async fn a_rule_that_its_node_was_not_told_of_is_told_again() {
    let world = World::new().await;
    let quick = |config: &mut session_svc::Config| {
        config.stop_timeout = Duration::from_millis(500);
        config.lease = Duration::from_millis(500);
    };
    let [dies, lives] = [world.replica_with(quick), world.replica_with(quick)];
    let node = world.node(&lives, 4).await;
    let id = lives.create(base()).await.unwrap().session_id;
    // It does not answer, ...
    node.hold("update");
    let request = update(&id, &["network.egress"], denying("silent.example"));
    let silent = updated(&lives, request).await;
    assert_refused(silent, Code::Unavailable, "NODE_UNREACHABLE");
    node.open();
    let told = async |name: &str| {
        let told = eventually(async || (denied(&node, &id)? == [name]).then_some(()));
        told.await
            .unwrap_or_else(|| panic!("{name} is not told again"));
    };
    told("silent.example").await;
    // ... refuses, ...
    let busy = Failure::new(Code::Internal, Reason::INTERNAL, "nft said no");
    node.inside().refuse_method.insert("update", busy.into());
    let request = update(&id, &["network.egress"], denying("refused.example"));
    updated(&lives, request).await.unwrap_err();
    node.inside().refuse_method.clear();
    told("refused.example").await;
    // ... or whoever was to tell it dies.
    node.hold("update");
    let before = node.count("update");
    let request = update(&id, &["network.egress"], denying("dead.example"));
    let task = {
        let mut client = dies.sessions();
        tokio::spawn(async move { client.update_session(red(request)).await })
    };
    node.called("update", before + 1).await;
    dies.kill();
    task.await.unwrap().unwrap_err();
    node.open();
    told("dead.example").await;
    // Once it knows, it is left alone.
    let database = sqlx::PgPool::connect(&world.postgres.url()).await.unwrap();
    let done = eventually(async || {
        let sql = "select count(*) from sandmesh_session.sessions where push_due is not null";
        let (due,): (i64,) = sqlx::query_as(sql).fetch_one(&database).await.unwrap();
        (due == 0).then_some(())
    });
    done.await.expect("it is told for ever");
}

#[tokio::test]
async fn of_many_updates_at_once_the_node_has_the_one_of_the_row() {
    let world = World::new().await;
    let replicas = [world.replica(), world.replica()];
    let node = world.node(&replicas[0], 4).await;
    let id = replicas[0].create(base()).await.unwrap().session_id;
    let tasks: Vec<_> = (0..12)
        .map(|n| {
            let mut client = replicas[n % 2].sessions();
            let network = denying(&format!("n{n}.example"));
            let request = update(&id, &["network.egress"], network);
            tokio::spawn(async move { client.update_session(red(request)).await })
        })
        .collect();
    for task in tasks {
        // So many at once may be too many; what is stored is told all the same.
        if let Err(status) = task.await.unwrap() {
            assert_eq!(status.code(), Code::Aborted, "{status:?}");
        }
    }
    let same = eventually(async || {
        let row = replicas[0].get(&id).await.unwrap().network?.egress?.deny;
        (denied(&node, &id)? == row).then_some(())
    });
    same.await
        .expect("the node enforces what nobody wants any more");
}

async fn metrics(replica: &Replica, id: &str) -> Result<GetSessionMetricsResponse, Status> {
    let request = GetSessionMetricsRequest {
        session_id: id.into(),
    };
    let answer = replica.sessions().get_session_metrics(red(request)).await?;
    Ok(answer.into_inner())
}

#[tokio::test]
async fn metrics_are_the_nodes_and_of_a_paused_session_only_disk() {
    let world = World::new().await;
    let replica = world.replica();
    let mut node = world.node(&replica, 4).await;
    let id = replica.create(base()).await.unwrap().session_id;
    let used = metrics(&replica, &id).await.unwrap();
    assert_eq!(
        (used.memory_bytes, used.disk_bytes, used.host_threads),
        (128 << 20, 3, 4)
    );
    replica.pause(&id).await.unwrap();
    let used = metrics(&replica, &id).await.unwrap();
    assert_eq!(
        (used.memory_bytes, used.disk_bytes, used.host_threads),
        (0, STORED, 0)
    );
    assert!(used.time.is_some());
    assert_eq!(node.count("metrics"), 1);
    replica.resume(&id).await.unwrap();
    node.die();
    assert_refused(
        metrics(&replica, &id).await,
        Code::Unavailable,
        "NODE_UNREACHABLE",
    );
    node.serve().await;
    replica.stop_session(&id).await.unwrap();
    assert_refused(
        metrics(&replica, &id).await,
        Code::NotFound,
        "SESSION_STOPPED",
    );
}

fn notice(session: &str, sequence: u64, kind: &str) -> SessionNotice {
    SessionNotice {
        session_id: session.into(),
        sequence,
        r#type: kind.into(),
        message: format!("message {sequence}"),
    }
}

#[tokio::test]
async fn what_a_node_notices_becomes_an_event_once() {
    let world = World::new().await;
    let replica = world.replica();
    let node = world.node(&replica, 4).await;
    let id = replica.create(base()).await.unwrap().session_id;
    let other = replica.create(base()).await.unwrap().session_id;
    let before = replica.events(&id).await.len();
    {
        let mut inside = node.inside();
        // Heard, but not that it was heard: it is said again.
        inside.is_deaf = true;
        inside.notices = vec![
            notice(&id, 7, "OOM_KILLED"),
            notice(&id, 9, "GUEST_SILENT"),
            notice(&id, 11, "NO_SUCH_WORD"),
            notice("nonsense", 1, "OOM_KILLED"),
            notice(
                &format!("{}00000000000000000000", &id[..5]),
                1,
                "OOM_KILLED",
            ),
            notice(&other, 3, "GUEST_ANSWERS"),
        ];
    }
    let told = eventually(async || node.inside().notices.is_empty().then_some(()));
    told.await.expect("notices are not taken");
    // A new start of the node says all it remembers again.
    node.inside().notices = vec![notice(&id, 7, "OOM_KILLED"), notice(&id, 12, "OOM_KILLED")];
    let told = eventually(async || node.inside().notices.is_empty().then_some(()));
    told.await.expect("notices are not taken");
    let types = |events: &[(String, String)]| -> Vec<String> {
        events.iter().map(|(kind, _)| kind.clone()).collect()
    };
    assert_eq!(
        types(&replica.events(&id).await[before..]),
        ["OOM_KILLED", "GUEST_SILENT", "OOM_KILLED"]
    );
    assert_eq!(
        types(&replica.events(&other).await[before..]),
        ["GUEST_ANSWERS"]
    );
    // One that ends in the same heartbeat was killed before it ended.
    node.inside().notices = vec![notice(&id, 20, "OOM_KILLED")];
    node.break_session(&id, "GUEST_PANIC");
    replica.until(&id, SessionState::Failed).await;
    let events = types(&replica.events(&id).await);
    assert_eq!(events[events.len() - 2..], ["OOM_KILLED", "FAILED"]);
}

#[tokio::test]
async fn logs_are_the_nodes_and_only_their_owners() {
    let world = World::new().await;
    let replica = world.replica();
    let mut node = world.node(&replica, 4).await;
    let id = replica.create(base()).await.unwrap().session_id;
    let request = |after_sequence, follow| StreamSessionLogsRequest {
        session_id: id.clone(),
        after_sequence,
        follow,
    };
    let read = async |request| {
        let mut client = replica.sessions();
        let answers = client.stream_session_logs(request).await?.into_inner();
        let answers: Vec<_> = answers.collect().await;
        let answers: Result<Vec<_>, Status> = answers.into_iter().collect();
        answers.map(|all| all.iter().map(|one| one.sequence).collect::<Vec<_>>())
    };
    assert_eq!(read(red(request(0, false))).await.unwrap(), [1, 2, 3]);
    assert_eq!(read(red(request(2, false))).await.unwrap(), [3]);
    let stranger = read(by("blue", request(0, false))).await;
    assert_refused(stranger, Code::NotFound, "SESSION_UNKNOWN");
    let gone = Failure::new(Code::NotFound, Reason::new("LOGS_GONE"), "none are kept");
    node.inside().refuse_method.insert("logs", gone.into());
    let refused = read(red(request(0, false))).await;
    assert_refused(refused, Code::NotFound, "LOGS_GONE");
    node.inside().refuse_method.clear();
    let mut client = replica.sessions();
    let followed = client.stream_session_logs(red(request(0, true))).await;
    let mut followed = followed.unwrap().into_inner();
    for sequence in 1..=3 {
        assert_eq!(followed.next().await.unwrap().unwrap().sequence, sequence);
    }
    node.die();
    let cut = followed.next().await.unwrap().map(drop);
    assert_refused(cut, Code::Unavailable, "NODE_UNREACHABLE");
}
