//! What is promised of settings that reach the node, and of metrics that come from it.

use std::time::Duration;

use proto::session::v1::{
    CreateSessionRequest, Egress, GetSessionMetricsRequest, GetSessionMetricsResponse, Network,
    PortAccess, Session, UpdateSessionRequest,
};
use service_kit::errors::{Failure, Reason};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::{
    node::{FakeNode, STORED},
    world::{Replica, World, assert_refused, base, eventually, red},
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
