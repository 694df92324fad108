//! What is promised of nodes: who is there, who takes sessions, and what becomes of the sessions of those that go.

use std::time::Duration;

use proto::{
    node::v1::{HeartbeatRequest, ListNodesRequest, Node, NodeState},
    session::v1::{
        CreateSessionRequest, GetSessionRequest, Resources, SessionState,
        session_service_client::SessionServiceClient,
    },
};
use redis::AsyncCommands as _;
use serde_json::{Value, json};
use service_kit::{
    ids::{HomeTag, SessionId},
    mesh::{self, MeshToken},
};
use tonic::{Code, Request, transport::Endpoint};

use crate::{
    node::FakeNode,
    world::{
        NODE_DEAD_AFTER, Replica, World, assert_refused, base, burying, eventually, named, red,
    },
};

const NEVER: Duration = Duration::from_hours(1);

pub(crate) async fn listed(replica: &Replica, node: &FakeNode, include_dead: bool) -> Option<Node> {
    let request = ListNodesRequest {
        include_dead,
        ..ListNodesRequest::default()
    };
    let answer = replica.registry().list_nodes(request).await.unwrap();
    let mut nodes = answer.into_inner().nodes.into_iter();
    nodes.find(|listed| listed.node_id == node.id)
}

async fn until_node(replica: &Replica, node: &FakeNode, state: NodeState) -> Node {
    let there = async || {
        let listed = listed(replica, node, true).await;
        listed.filter(|listed| listed.state() == state)
    };
    eventually(there)
        .await
        .unwrap_or_else(|| panic!("{} is not {state:?}", node.id))
}

/// Makes a session old enough for a listing without it to mean something.
async fn age(world: &World, id: &str) {
    let sql = "update sandmesh_session.sessions set start_time = start_time - 60000000 where session_id = $1";
    world.sql(sql, id).await;
}

#[tokio::test]
async fn a_node_has_one_home_tag_for_good() {
    let world = World::new().await;
    let replicas = [world.replica(), world.replica()];
    let mut node = world.node(&replicas[0], 1).await;
    let other = world.node(&replicas[1], 1).await;
    let tag = node.registered().await;
    assert!(HomeTag::parse(&tag).is_ok(), "{tag}");
    assert_ne!(tag, other.registered().await);
    let before = until_node(&replicas[1], &node, NodeState::Ready).await;
    assert_eq!(before.home_tag, tag);
    node.restart_empty().await;
    assert_eq!(node.registered().await, tag);
    let after = until_node(&replicas[1], &node, NodeState::Ready).await;
    assert_eq!(after.home_tag, tag);
    assert_ne!(after.incarnation, before.incarnation);
}

#[tokio::test]
async fn a_silent_node_keeps_its_sessions_and_takes_no_new_ones() {
    let world = World::new().await;
    let replica = world.replica();
    let mut silent = world.node(&replica, 9).await;
    let old = replica.create(base()).await.unwrap();
    assert_eq!(old.node_id, silent.id);
    silent.fall_silent();
    let other = world.node(&replica, 9).await;
    until_node(&replica, &silent, NodeState::Silent).await;
    for _ in 0..6 {
        assert_eq!(replica.create(base()).await.unwrap().node_id, other.id);
    }
    let old = replica.get(&old.session_id).await.unwrap();
    assert_eq!(old.state(), SessionState::Running);
    assert!(silent.inside().stops.is_empty());
    // Heard of again, it takes them again.
    silent.beat();
    until_node(&replica, &silent, NodeState::Ready).await;
    let taken = eventually(async || {
        let session = replica.create(base()).await.ok()?;
        (session.node_id == silent.id).then_some(())
    });
    taken.await.unwrap();
}

#[tokio::test]
async fn a_dead_nodes_sessions_are_lost_and_it_is_listed_only_if_asked_for() {
    let world = World::new().await;
    let replica = world.replica_with(burying);
    let mut node = world.node(&replica, 4).await;
    let id = replica.create(base()).await.unwrap().session_id;
    node.die();
    let lost = replica.until(&id, SessionState::Lost).await;
    assert_eq!(lost.end_reason.unwrap().reason, "NODE_DEAD");
    let dead = listed(&replica, &node, true).await.unwrap();
    assert_eq!(dead.state(), NodeState::Dead);
    assert_eq!(listed(&replica, &node, false).await, None);
    // Not before it was silent for so long.
    let time = |time: Option<prost_types::Timestamp>| {
        let time = time.unwrap();
        Duration::new(time.seconds as u64, time.nanos as u32)
    };
    assert!(time(lost.end_time) >= time(dead.last_heartbeat) + NODE_DEAD_AFTER);
    let refused = replica.create(base()).await;
    assert_refused(refused, Code::ResourceExhausted, "NO_CAPACITY");
    let mut redis = world.redis().await;
    let told = eventually(async || {
        let text: Option<String> = redis.hget("test:nodes", &node.id).await.unwrap();
        let entry: Value = serde_json::from_str(&text?).unwrap();
        (entry["dead"] == json!(true)).then_some(())
    });
    told.await.expect("nodes are not told that it is dead");
}

#[tokio::test]
async fn a_node_back_from_the_dead_is_told_to_end_what_was_lost() {
    let world = World::new().await;
    let replica = world.replica_with(burying);
    let mut node = world.node(&replica, 4).await;
    let tag = node.registered().await;
    let id = replica.create(base()).await.unwrap().session_id;
    node.fall_silent();
    replica.until(&id, SessionState::Lost).await;
    node.beat();
    assert_eq!(node.registered().await, tag);
    assert!(node.inside().hosted.is_empty());
    assert!(node.inside().stops.contains(&id));
    until_node(&replica, &node, NodeState::Ready).await;
    let lost = replica.get(&id).await.unwrap();
    assert_eq!(lost.state(), SessionState::Lost);
    let new = replica.create(base()).await.unwrap();
    assert_eq!(new.node_id, node.id);
}

#[tokio::test]
async fn sessions_of_a_node_that_restarted_without_them_are_lost() {
    let world = World::new().await;
    let replica = world.replica_with(|config| config.audit_interval = NEVER);
    let mut node = world.node(&replica, 4).await;
    let old = replica.create(base()).await.unwrap().session_id;
    age(&world, &old).await;
    // So young that the listing may have been made before it ran: looked at again a little later.
    let young = replica.create(base()).await.unwrap().session_id;
    node.restart_empty().await;
    for id in [&old, &young] {
        let lost = replica.until(id, SessionState::Lost).await;
        assert_eq!(lost.end_reason.unwrap().reason, "NODE_RESTARTED");
    }
}

#[tokio::test]
async fn a_session_its_node_has_forgotten_is_lost() {
    let world = World::new().await;
    let replica = world.replica();
    let node = world.node(&replica, 4).await;
    let forgotten = replica.create(base()).await.unwrap().session_id;
    let hosted = replica.create(base()).await.unwrap().session_id;
    for id in [&forgotten, &hosted] {
        age(&world, id).await;
    }
    // Older than what was aged: the node did not restart in between.
    node.inside().started = Some(prost_types::Timestamp::default());
    node.inside().hosted.remove(&forgotten);
    let lost = replica.until(&forgotten, SessionState::Lost).await;
    assert_eq!(lost.end_reason.unwrap().reason, "SESSION_MISSING");
    let hosted = replica.get(&hosted).await.unwrap();
    assert_eq!(hosted.state(), SessionState::Running);
}

#[tokio::test]
async fn a_node_is_told_to_end_what_it_should_not_host() {
    let world = World::new().await;
    let replica = world.replica();
    let node = world.node(&replica, 4).await;
    let wanted = replica.create(base()).await.unwrap().session_id;
    let stray = SessionId::random(&HomeTag::random()).to_string();
    node.inside()
        .hosted
        .insert(stray.clone(), Resources::default());
    let told = eventually(async || node.inside().stops.contains(&stray).then_some(()));
    told.await.expect("nobody ends it");
    assert!(node.inside().hosted.keys().eq([&wanted]));
}

#[tokio::test]
async fn a_session_that_breaks_by_itself_fails_with_its_reason() {
    let world = World::new().await;
    let replica = world.replica();
    let mut node = world.node(&replica, 4).await;
    let breaks = replica.create(base()).await.unwrap().session_id;
    node.break_session(&breaks, "VMM_EXITED");
    let failed = replica.until(&breaks, SessionState::Failed).await;
    assert_eq!(failed.end_reason.unwrap().reason, "VMM_EXITED");
    let heard = eventually(async || node.inside().ended.is_empty().then_some(()));
    heard.await.expect("the node is not acknowledged");

    // Broken while nobody heard it: the reason comes with the registration, and is better than that it is not there.
    let unheard = replica.create(base()).await.unwrap().session_id;
    node.fall_silent();
    node.break_session(&unheard, "GUEST_PANICKED");
    node.beat();
    let failed = replica.until(&unheard, SessionState::Failed).await;
    assert_eq!(failed.end_reason.unwrap().reason, "GUEST_PANICKED");
    let heard = eventually(async || node.inside().ended.is_empty().then_some(()));
    heard.await.expect("the node is not acknowledged");
}

#[tokio::test]
async fn an_audit_between_an_end_and_its_heartbeat_has_the_reason() {
    let world = World::new().await;
    let replica = world.replica();
    let node = world.node(&replica, 4).await;
    let id = replica.create(base()).await.unwrap().session_id;
    age(&world, &id).await;
    node.inside().is_late = true;
    node.break_session(&id, "VMM_EXITED");
    let failed = replica.until(&id, SessionState::Failed).await;
    assert_eq!(failed.end_reason.unwrap().reason, "VMM_EXITED");
    assert_eq!(node.inside().ended.len(), 1);
    node.inside().is_late = false;
    let heard = eventually(async || node.inside().ended.is_empty().then_some(()));
    heard.await.expect("the node is not acknowledged");
}

#[tokio::test]
async fn a_start_that_broke_on_its_node_does_not_use_up_its_request_id() {
    let world = World::new().await;
    let replica = world.replica();
    let node = world.node(&replica, 4).await;
    node.hold_starts();
    let mut client = replica.sessions();
    let create = tokio::spawn(async move { client.create_session(red(named("again"))).await });
    let id = eventually(async || node.inside().starts.first().cloned());
    let id = id.await.unwrap();
    // The heartbeat says so before the answer to the start does.
    node.break_session(&id, "VMM_EXITED");
    replica.until(&id, SessionState::Failed).await;
    node.open();
    assert_refused(create.await.unwrap(), Code::NotFound, "SESSION_FAILED");
    let session = replica.create(named("again")).await.unwrap();
    assert_eq!(session.state(), SessionState::Running);
    assert_ne!(session.session_id, id);
    assert!(node.inside().hosted.keys().eq([&session.session_id]));
}

#[tokio::test]
async fn a_start_whose_node_died_does_not_use_up_its_request_id() {
    let world = World::new().await;
    let replica = world.replica_with(burying);
    let mut dies = world.node(&replica, 4).await;
    dies.hold_starts();
    let mut client = replica.sessions();
    let create = tokio::spawn(async move { client.create_session(red(named("again"))).await });
    let id = eventually(async || dies.inside().starts.first().cloned());
    let id = id.await.unwrap();
    // It takes calls still, and does nothing about them.
    dies.fall_silent();
    replica.until(&id, SessionState::Lost).await;
    let other = world.node(&replica, 4).await;
    let session = replica.create(named("again")).await.unwrap();
    assert_eq!(session.node_id, other.id);
    // Should it start after all, the client is not given a session that is lost, and the node ends it.
    dies.open();
    create.await.unwrap().unwrap_err();
    dies.beat();
    let ended = eventually(async || dies.inside().hosted.is_empty().then_some(()));
    ended.await.expect("it still hosts what is lost");
}

#[tokio::test]
async fn a_heartbeat_of_an_unknown_start_is_answered_with_register() {
    let world = World::new().await;
    let replica = world.replica();
    let node = world.node(&replica, 4).await;
    let known = listed(&replica, &node, false).await.unwrap();
    let register = async |node_id: &str, incarnation: &str| {
        let request = HeartbeatRequest {
            node_id: node_id.into(),
            incarnation: incarnation.into(),
            ..HeartbeatRequest::default()
        };
        let answer = replica.registry().heartbeat(request).await.unwrap();
        answer.into_inner().register
    };
    assert!(register("never-seen", "1").await);
    assert!(register(&node.id, "an-earlier-one").await);
    assert!(!register(&node.id, &known.incarnation).await);
    let nonsense = HeartbeatRequest::default();
    let refused = replica.registry().heartbeat(nonsense).await;
    assert_refused(refused, Code::InvalidArgument, "INVALID_ARGUMENT");
}

#[tokio::test]
async fn calls_without_the_mesh_token_are_refused() {
    let world = World::new().await;
    let replica = world.replica();
    let get = || GetSessionRequest {
        session_id: "a".repeat(25),
    };
    let endpoint = Endpoint::from_shared(format!("http://{}", replica.address)).unwrap();
    let without = endpoint.connect().await.unwrap();
    let refused = SessionServiceClient::new(without)
        .get_session(red(get()))
        .await;
    assert_refused(refused, Code::Unauthenticated, "CREDENTIALS_MISSING");
    let wrong = mesh::connect(std::slice::from_ref(&replica.address), &MeshToken::random());
    let refused = SessionServiceClient::new(wrong)
        .get_session(red(get()))
        .await;
    assert_refused(refused, Code::Unauthenticated, "CREDENTIALS_MISSING");
    // With the token, but on nobody's behalf.
    let refused = replica.sessions().get_session(Request::new(get())).await;
    assert_refused(refused, Code::Unauthenticated, "CREDENTIALS_MISSING");
    let known = replica.get(&get().session_id).await;
    assert_refused(known, Code::NotFound, "SESSION_UNKNOWN");
}

#[tokio::test]
async fn a_session_goes_where_there_is_room_for_it() {
    let world = World::new().await;
    let replica = world.replica();
    let small = world.node(&replica, 1).await;
    let large = world.node(&replica, 4).await;
    let sized = |memory_bytes| CreateSessionRequest {
        resources: Some(Resources {
            memory_bytes,
            ..Resources::default()
        }),
        ..base()
    };
    // Only the large one can hold it.
    let session = replica.create(sized(256 << 20)).await.unwrap();
    assert_eq!(session.node_id, large.id);
    // Three more of the usual size fill both.
    for _ in 0..3 {
        replica.create(base()).await.unwrap();
    }
    assert_eq!(small.inside().hosted.len(), 1);
    assert_eq!(large.inside().hosted.len(), 3);
    let refused = replica.create(base()).await;
    assert_refused(refused, Code::ResourceExhausted, "NO_CAPACITY");
    // Room that is given back is used again.
    replica.stop_session(&session.session_id).await.unwrap();
    let placed = eventually(async || replica.create(base()).await.ok());
    assert_eq!(placed.await.unwrap().node_id, large.id);
}

#[tokio::test]
async fn a_draining_node_keeps_its_sessions_and_takes_no_new_ones() {
    let world = World::new().await;
    let replica = world.replica();
    let drains = world.node(&replica, 9).await;
    let old = replica.create(base()).await.unwrap();
    assert_eq!(old.node_id, drains.id);
    drains.inside().draining = true;
    until_node(&replica, &drains, NodeState::Draining).await;
    let other = world.node(&replica, 9).await;
    for _ in 0..6 {
        assert_eq!(replica.create(base()).await.unwrap().node_id, other.id);
    }
    let old = replica.get(&old.session_id).await.unwrap();
    assert_eq!(old.state(), SessionState::Running);
    replica.stop_session(&old.session_id).await.unwrap();
    assert!(drains.inside().hosted.is_empty());
    drains.inside().draining = false;
    until_node(&replica, &drains, NodeState::Ready).await;
    let taken = eventually(async || {
        let session = replica.create(base()).await.ok()?;
        (session.node_id == drains.id).then_some(())
    });
    taken.await.unwrap();
}
