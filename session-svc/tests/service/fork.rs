//! What is promised of forks.

use std::{
    collections::{BTreeSet, HashSet},
    time::Duration,
};

use proto::session::v1::{
    CreateSessionRequest, ForkSessionRequest, ForkSessionResponse, Network, PortAccess, Resources,
    SessionState,
};
use service_kit::errors::{Failure, Reason};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::{
    node::STOP_NANOS,
    world::{Replica, World, assert_refused, base, eventually, labels, red},
};

fn ids(forked: &ForkSessionResponse) -> BTreeSet<String> {
    let ids = forked.sessions.iter().map(|child| child.session_id.clone());
    ids.collect()
}

type Task = tokio::task::JoinHandle<Result<ForkSessionResponse, Status>>;

fn forking(replica: &Replica, id: &str, count: u32, request_id: &str) -> Task {
    let mut client = replica.sessions();
    let request = ForkSessionRequest {
        session_id: id.into(),
        count,
        request_id: request_id.into(),
        timeout: None,
    };
    tokio::spawn(async move { Ok(client.fork_session(red(request)).await?.into_inner()) })
}

#[tokio::test]
async fn children_are_sessions_of_their_own_like_their_parent() {
    let world = World::new().await;
    let replica = world.replica();
    let node = world.node(&replica, 20).await;
    let request = CreateSessionRequest {
        metadata: labels([("a", "1")]),
        wake_on_request: true,
        network: Some(Network {
            port_access: PortAccess::Token.into(),
            internet_access: Some(false),
            ..Network::default()
        }),
        ..base()
    };
    let parent = replica.create(request).await.unwrap();
    let forked = replica.fork(&parent.session_id, 3, "").await.unwrap();
    assert_eq!(forked.sessions.len(), 3);
    assert!(forked.failed.is_empty());
    assert_eq!(forked.parent_stop_time.unwrap().nanos, STOP_NANOS);
    let tag = node.registered().await;
    let mut tokens = HashSet::from([parent.access_token.clone()]);
    for child in &forked.sessions {
        assert_eq!(child.state(), SessionState::Running);
        assert_eq!(child.parent_session_id, parent.session_id);
        assert!(child.session_id.starts_with(&tag));
        assert_eq!(child.node_id, parent.node_id);
        assert_eq!(child.template_version, parent.template_version);
        assert_eq!(child.network, parent.network);
        assert_eq!(child.metadata, parent.metadata);
        assert!(child.wake_on_request && child.start_time.is_some());
        assert!(tokens.insert(child.access_token.clone()));
        assert_eq!(&replica.get(&child.session_id).await.unwrap(), child);
        let kinds: Vec<String> = replica
            .events(&child.session_id)
            .await
            .into_iter()
            .map(|(kind, _)| kind)
            .collect();
        assert_eq!(kinds, ["CREATED", "STARTING", "RUNNING"]);
    }
    let (kind, _) = replica.events(&parent.session_id).await.pop().unwrap();
    assert_eq!(kind, "FORKED");
    let now = replica.get(&parent.session_id).await.unwrap();
    assert_eq!(now.state(), SessionState::Running);
    assert_eq!(node.inside().hosted.len(), 4);
    // None given is one. And a paused parent has children that run.
    replica.pause(&parent.session_id).await.unwrap();
    let one = replica.fork(&parent.session_id, 0, "").await.unwrap();
    assert_eq!(one.sessions.len(), 1);
    let now = replica.get(&parent.session_id).await.unwrap();
    assert_eq!(now.state(), SessionState::Paused);
    // The parent's end is not theirs.
    replica.stop_session(&parent.session_id).await.unwrap();
    let child = replica.get(&one.sessions[0].session_id).await.unwrap();
    assert_eq!(child.state(), SessionState::Running);
    let late = replica.fork(&parent.session_id, 1, "").await;
    assert_refused(late, Code::NotFound, "SESSION_STOPPED");
}

#[tokio::test]
async fn a_hundred_children_are_one_fork() {
    let world = World::new().await;
    let replica = world.replica();
    let mut node = world.node(&replica, 101).await;
    let request = CreateSessionRequest {
        resources: Some(Resources {
            disk_bytes: 1 << 20,
            ..Resources::default()
        }),
        ..base()
    };
    let id = replica.create(request).await.unwrap().session_id;
    // The fake node has 64 CPUs and none in use.
    let refused = replica.fork(&id, 100, "").await;
    assert_refused(refused, Code::ResourceExhausted, "NO_CAPACITY");
    node.inside().vcpus = 100;
    node.beat();
    node.registered().await;
    let forked = eventually(async || replica.fork(&id, 100, "all").await.ok());
    assert_eq!(forked.await.unwrap().sessions.len(), 100);
    assert_eq!((node.count("fork"), node.inside().hosted.len()), (1, 101));
}

#[tokio::test]
async fn one_request_id_is_one_fork_whichever_replica_hears_it() {
    let world = World::new().await;
    let replicas = [world.replica(), world.replica()];
    let node = world.node(&replicas[0], 20).await;
    let id = replicas[0].create(base()).await.unwrap().session_id;
    node.hold("fork");
    let forks: Vec<Task> = (0..8)
        .map(|n| forking(&replicas[n % 2], &id, 2, "once"))
        .collect();
    node.called("fork", 1).await;
    node.open();
    let mut children = BTreeSet::new();
    for fork in forks {
        let forked = fork.await.unwrap().unwrap();
        assert_eq!(forked.sessions.len(), 2);
        assert!(
            forked
                .sessions
                .iter()
                .all(|child| !child.access_token.is_empty())
        );
        children.extend(ids(&forked));
    }
    assert_eq!(children.len(), 2);
    assert_eq!(node.count("fork"), 1);
    let again = replicas[1].fork(&id, 2, "once").await.unwrap();
    assert_eq!(ids(&again), children);
    assert_eq!(again.parent_stop_time.unwrap().nanos, STOP_NANOS);
    let other = replicas[0].create(base()).await.unwrap().session_id;
    let wrong = replicas[0].fork(&other, 2, "once").await;
    let status = assert_refused(wrong, Code::InvalidArgument, "INVALID_ARGUMENT");
    let field = &status.get_details_bad_request().unwrap().field_violations[0].field;
    assert_eq!(field, "request_id");
}

#[tokio::test]
async fn children_that_do_not_start_are_told_apart() {
    let world = World::new().await;
    let replica = world.replica();
    let node = world.node(&replica, 20).await;
    let id = replica.create(base()).await.unwrap().session_id;
    node.inside().fail_children = 2;
    let forked = replica.fork(&id, 5, "some").await.unwrap();
    assert_eq!((forked.sessions.len(), forked.failed.len()), (3, 2));
    for child in &forked.failed {
        assert_eq!(child.state(), SessionState::Failed);
        assert_eq!(
            child.end_reason.as_ref().unwrap().reason,
            "CONFIGURE_FAILED"
        );
    }
    let again = replica.fork(&id, 5, "some").await.unwrap();
    assert_eq!((again.sessions.len(), again.failed.len()), (3, 2));
    // None at all is an error, and does not use up its request ID.
    let none = replica.fork(&id, 2, "none").await;
    assert_refused(none, Code::Aborted, "SESSION_FAILED");
    node.inside().fail_children = 0;
    assert_eq!(
        replica.fork(&id, 2, "none").await.unwrap().sessions.len(),
        2
    );
}

#[tokio::test]
async fn a_fork_that_is_refused_leaves_nothing() {
    let world = World::new().await;
    let replica = world.replica();
    let node = world.node(&replica, 4).await;
    let id = replica.create(base()).await.unwrap().session_id;
    let many = replica.fork(&id, 101, "").await;
    let status = assert_refused(many, Code::InvalidArgument, "INVALID_ARGUMENT");
    let field = &status.get_details_bad_request().unwrap().field_violations[0].field;
    assert_eq!(field, "count");
    // More than the node has room for: it is not even asked. A heartbeat from before the create may just have been read.
    let large = replica.fork(&id, 5, "").await;
    let status = assert_refused(large, Code::ResourceExhausted, "NO_CAPACITY");
    let free = &status.get_details_error_info().unwrap().metadata["freeSessions"];
    assert!(matches!(free.as_str(), "3" | "4"), "{free}");
    assert_eq!(node.count("fork"), 0);
    let full = Failure::new(Code::ResourceExhausted, Reason::NODE_FULL, "full");
    node.inside().refuse_method.insert("fork", full.into());
    assert_refused(
        replica.fork(&id, 2, "again").await,
        Code::ResourceExhausted,
        "NODE_FULL",
    );
    node.inside().refuse_method.clear();
    assert!(node.inside().hosted.keys().eq([&id]));
    let parent = replica.get(&id).await.unwrap();
    assert_eq!(parent.state(), SessionState::Running);
    // The room that was kept for them is there again once the node was heard.
    let forked = eventually(async || replica.fork(&id, 2, "again").await.ok());
    assert_eq!(forked.await.unwrap().sessions.len(), 2);
}

#[tokio::test]
async fn a_fork_that_its_node_does_not_answer_leaves_nothing() {
    let world = World::new().await;
    let replica = world.replica_with(|config| config.store_timeout = Duration::from_millis(500));
    let node = world.node(&replica, 20).await;
    let id = replica.create(base()).await.unwrap().session_id;
    node.hold("fork");
    let silent = replica.fork(&id, 2, "silent").await;
    assert_refused(silent, Code::Unavailable, "NODE_UNREACHABLE");
    // It makes them all the same, and is told to end them.
    node.open();
    let ended = eventually(async || {
        let inside = node.inside();
        (inside.stops.len() >= 2 && inside.hosted.keys().eq([&id])).then_some(())
    });
    ended.await.expect("children of nobody are left");
    assert_eq!(
        replica.fork(&id, 2, "silent").await.unwrap().sessions.len(),
        2
    );
}

#[tokio::test]
async fn children_whose_replica_died_are_given_up_and_the_same_request_makes_new_ones() {
    let world = World::new().await;
    let [dies, lives] = [world.replica(), world.replica()];
    let node = world.node(&lives, 20).await;
    let id = lives.create(base()).await.unwrap().session_id;
    node.hold("fork");
    let fork = forking(&dies, &id, 3, "once");
    node.called("fork", 1).await;
    dies.kill();
    fork.await.unwrap().unwrap_err();
    node.open();
    let forked = lives.fork(&id, 3, "once").await.unwrap();
    assert_eq!(forked.sessions.len(), 3);
    let hosted: BTreeSet<String> = node.inside().hosted.keys().cloned().collect();
    let mut expected = ids(&forked);
    expected.insert(id.clone());
    assert_eq!(hosted, expected);
    let parent = lives.get(&id).await.unwrap();
    assert_eq!(parent.state(), SessionState::Running);
}

#[tokio::test]
async fn a_child_that_is_stopped_before_it_runs_is_gone() {
    let world = World::new().await;
    let replica = world.replica();
    let node = world.node(&replica, 20).await;
    let id = replica.create(base()).await.unwrap().session_id;
    node.hold("fork");
    let fork = forking(&replica, &id, 2, "");
    node.called("fork", 1).await;
    let request = proto::session::v1::ListSessionsRequest {
        states: vec![SessionState::Starting.into()],
        ..Default::default()
    };
    let starting = replica.sessions().list_sessions(red(request)).await;
    let starting = starting.unwrap().into_inner().sessions;
    assert_eq!(starting.len(), 2);
    replica.stop_session(&starting[0].session_id).await.unwrap();
    node.open();
    let forked = fork.await.unwrap().unwrap();
    assert_eq!(
        ids(&forked),
        BTreeSet::from([starting[1].session_id.clone()])
    );
    assert!(!node.inside().hosted.contains_key(&starting[0].session_id));
}
