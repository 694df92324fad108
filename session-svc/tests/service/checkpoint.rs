//! What is promised of checkpoints and rollbacks.

use std::time::Duration;

use proto::session::v1::{
    Checkpoint, CreateCheckpointRequest, DeleteCheckpointRequest, ListCheckpointsRequest,
    SessionState,
};
use service_kit::{
    errors::{Failure, Reason},
    ids::CheckpointId,
};
use tonic::{Code, Status};

use crate::{
    node::{STOP_NANOS, STORED},
    world::{Replica, World, assert_refused, base, eventually, red},
};

async fn delete(replica: &Replica, id: &str, checkpoint: &str) -> Result<(), Status> {
    let request = DeleteCheckpointRequest {
        session_id: id.into(),
        checkpoint_id: checkpoint.into(),
    };
    let answer = replica.sessions().delete_checkpoint(red(request)).await;
    answer.map(drop)
}

fn checkpointing(
    replica: &Replica,
    id: &str,
    request_id: &str,
) -> tokio::task::JoinHandle<Result<Checkpoint, Status>> {
    let mut client = replica.sessions();
    let request = CreateCheckpointRequest {
        session_id: id.into(),
        name: String::new(),
        request_id: request_id.into(),
    };
    tokio::spawn(async move {
        let answer = client.create_checkpoint(red(request)).await?;
        Ok(answer.into_inner().checkpoint.unwrap())
    })
}

#[tokio::test]
async fn a_session_is_kept_and_put_back() {
    let world = World::new().await;
    let replica = world.replica();
    let node = world.node(&replica, 4).await;
    let id = replica.create(base()).await.unwrap().session_id;
    let request = CreateCheckpointRequest {
        session_id: id.clone(),
        name: "first".into(),
        request_id: String::new(),
    };
    let made = replica.sessions().create_checkpoint(red(request)).await;
    let made = made.unwrap().into_inner();
    assert_eq!(made.stop_time.unwrap().nanos, STOP_NANOS);
    let first = made.checkpoint.unwrap();
    assert!(CheckpointId::parse(&first.checkpoint_id).is_ok());
    assert_eq!((&*first.name, first.stored_bytes), ("first", STORED));
    assert_eq!(first.session_id, id);
    let second = replica.checkpoint(&id, "").await.unwrap();
    assert_eq!(
        replica.checkpoints(&id).await,
        [first.clone(), second.clone()]
    );
    let running = replica.rollback(&id, &first.checkpoint_id).await.unwrap();
    assert_eq!(running.state(), SessionState::Running);
    // Of a paused one, which can be kept, too.
    replica.pause(&id).await.unwrap();
    let third = replica.checkpoint(&id, "").await.unwrap();
    let paused = replica.get(&id).await.unwrap();
    assert_eq!(paused.state(), SessionState::Paused);
    let running = replica.rollback(&id, &second.checkpoint_id).await.unwrap();
    assert_eq!(
        (running.state(), running.stored_bytes),
        (SessionState::Running, 0)
    );
    assert!(!node.is_paused(&id));
    delete(&replica, &id, &second.checkpoint_id).await.unwrap();
    assert_eq!(replica.checkpoints(&id).await, [first, third]);
    assert_eq!(node.inside().checkpoints.len(), 2);
    let kinds: Vec<String> = replica
        .events(&id)
        .await
        .into_iter()
        .map(|(kind, _)| kind)
        .collect();
    assert_eq!(
        kinds,
        [
            "CREATED",
            "STARTING",
            "RUNNING",
            "CHECKPOINT_CREATED",
            "CHECKPOINT_CREATED",
            "RESUMING",
            "ROLLED_BACK",
            "PAUSING",
            "PAUSED",
            "CHECKPOINT_CREATED",
            "RESUMING",
            "ROLLED_BACK",
            "CHECKPOINT_DELETED",
        ]
    );
    // They end with their session.
    replica.stop_session(&id).await.unwrap();
    assert!(replica.checkpoints(&id).await.is_empty());
    let late = replica.checkpoint(&id, "").await;
    assert_refused(late, Code::NotFound, "SESSION_STOPPED");
}

#[tokio::test]
async fn what_is_no_checkpoint_is_said_to_be_unknown() {
    let world = World::new().await;
    let replica = world.replica();
    let _node = world.node(&replica, 4).await;
    let id = replica.create(base()).await.unwrap().session_id;
    let other = replica.create(base()).await.unwrap().session_id;
    let kept = replica.checkpoint(&id, "").await.unwrap().checkpoint_id;
    let never = CheckpointId::random().to_string();
    for (session, checkpoint) in [(&id, &never), (&other, &kept)] {
        let rolled = replica.rollback(session, checkpoint).await;
        assert_refused(rolled, Code::NotFound, "CHECKPOINT_UNKNOWN");
        let deleted = delete(&replica, session, checkpoint).await;
        assert_refused(deleted, Code::NotFound, "CHECKPOINT_UNKNOWN");
    }
    delete(&replica, &id, &kept).await.unwrap();
    let twice = delete(&replica, &id, &kept).await;
    assert_refused(twice, Code::NotFound, "CHECKPOINT_UNKNOWN");
    let malformed = replica.rollback(&id, "Nonsense").await;
    assert_refused(malformed, Code::InvalidArgument, "INVALID_ARGUMENT");
    let long = CreateCheckpointRequest {
        session_id: id.clone(),
        name: "x".repeat(64),
        request_id: String::new(),
    };
    let long = replica.sessions().create_checkpoint(red(long)).await;
    assert_refused(long, Code::InvalidArgument, "INVALID_ARGUMENT");
    let session = replica.get(&id).await.unwrap();
    assert_eq!(session.state(), SessionState::Running);
}

#[tokio::test]
async fn checkpoints_are_paged_and_limited() {
    let world = World::new().await;
    let replica = world.replica();
    let _node = world.node(&replica, 4).await;
    let id = replica.create(base()).await.unwrap().session_id;
    let mut made = Vec::new();
    for _ in 0..100 {
        made.push(replica.checkpoint(&id, "").await.unwrap());
    }
    let full = replica.checkpoint(&id, "").await;
    assert_refused(full, Code::ResourceExhausted, "TOO_MANY_CHECKPOINTS");
    let mut seen = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = ListCheckpointsRequest {
            session_id: id.clone(),
            page_size: 30,
            page_token,
        };
        let page = replica.sessions().list_checkpoints(red(request)).await;
        let page = page.unwrap().into_inner();
        assert!(page.checkpoints.len() <= 30);
        seen.extend(page.checkpoints);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!(seen, made);
}

#[tokio::test]
async fn one_request_id_is_one_checkpoint() {
    let world = World::new().await;
    let replicas = [world.replica(), world.replica()];
    let node = world.node(&replicas[0], 4).await;
    let id = replicas[0].create(base()).await.unwrap().session_id;
    node.hold("snapshot");
    let tasks: Vec<_> = (0..8)
        .map(|n| checkpointing(&replicas[n % 2], &id, "once"))
        .collect();
    node.called("snapshot", 1).await;
    node.open();
    for task in tasks {
        let made = task.await.unwrap().unwrap();
        assert_eq!(replicas[0].checkpoints(&id).await, [made]);
    }
    assert_eq!(node.count("snapshot"), 1);
    let other = replicas[0].create(base()).await.unwrap().session_id;
    let wrong = replicas[0].checkpoint(&other, "once").await;
    assert_refused(wrong, Code::InvalidArgument, "INVALID_ARGUMENT");
}

#[tokio::test]
async fn a_checkpoint_that_is_refused_is_none_and_the_session_goes_on() {
    let world = World::new().await;
    let replica = world.replica();
    let node = world.node(&replica, 4).await;
    let id = replica.create(base()).await.unwrap().session_id;
    let full = Failure::new(Code::ResourceExhausted, Reason::new("DISK_FULL"), "full");
    node.inside().refuse_method.insert("snapshot", full.into());
    let refused = replica.checkpoint(&id, "again").await;
    assert_refused(refused, Code::ResourceExhausted, "DISK_FULL");
    assert!(replica.checkpoints(&id).await.is_empty());
    let session = replica.get(&id).await.unwrap();
    assert_eq!(session.state(), SessionState::Running);
    node.inside().refuse_method.clear();
    replica.checkpoint(&id, "again").await.unwrap();
}

#[tokio::test]
async fn a_checkpoint_that_nobody_was_told_of_leaves_nothing() {
    let world = World::new().await;
    let hasty = world.replica_with(|config| config.store_timeout = Duration::from_millis(300));
    let [dies, lives] = [world.replica(), world.replica()];
    let node = world.node(&lives, 4).await;
    let id = lives.create(base()).await.unwrap().session_id;
    // The node does not answer, or the replica dies.
    node.hold("snapshot");
    let silent = hasty.checkpoint(&id, "silent").await;
    assert_refused(silent, Code::Unavailable, "NODE_UNREACHABLE");
    let dead = checkpointing(&dies, &id, "dead");
    node.called("snapshot", 2).await;
    dies.kill();
    dead.await.unwrap().unwrap_err();
    node.open();
    node.called("delete", 2).await;
    let gone = eventually(async || node.inside().checkpoints.is_empty().then_some(()));
    gone.await.expect("files of nobody are left");
    assert!(lives.checkpoints(&id).await.is_empty());
    // The same requests are new ones then.
    for request in ["silent", "dead"] {
        lives.checkpoint(&id, request).await.unwrap();
    }
    assert_eq!(lives.checkpoints(&id).await.len(), 2);
}

#[tokio::test]
async fn a_removal_whose_replica_died_is_finished_by_another() {
    let world = World::new().await;
    let [dies, lives] = [world.replica(), world.replica()];
    let node = world.node(&lives, 4).await;
    let id = lives.create(base()).await.unwrap().session_id;
    let kept = lives.checkpoint(&id, "").await.unwrap().checkpoint_id;
    node.hold("delete");
    let removal = {
        let (mut client, session_id) = (dies.sessions(), id.clone());
        let request = DeleteCheckpointRequest {
            session_id,
            checkpoint_id: kept,
        };
        tokio::spawn(async move { client.delete_checkpoint(red(request)).await })
    };
    node.called("delete", 1).await;
    dies.kill();
    removal.await.unwrap().unwrap_err();
    assert!(lives.checkpoints(&id).await.is_empty());
    node.open();
    let gone = eventually(async || {
        let (kind, _) = lives.events(&id).await.pop()?;
        (kind == "CHECKPOINT_DELETED").then_some(())
    });
    gone.await.expect("nobody removed it");
    assert!(node.inside().checkpoints.is_empty());
}

#[tokio::test]
async fn a_rollback_that_is_refused_leaves_the_session_as_it_was() {
    let world = World::new().await;
    let replica = world.replica();
    let node = world.node(&replica, 4).await;
    let id = replica.create(base()).await.unwrap().session_id;
    let kept = replica.checkpoint(&id, "").await.unwrap().checkpoint_id;
    let damaged = Failure::new(
        Code::DataLoss,
        Reason::new("SNAPSHOT_DAMAGED"),
        "flipped bits",
    );
    node.inside()
        .refuse_method
        .insert("rollback", damaged.into());
    let refused = replica.rollback(&id, &kept).await;
    assert_refused(refused, Code::DataLoss, "SNAPSHOT_DAMAGED");
    let session = replica.get(&id).await.unwrap();
    assert_eq!(session.state(), SessionState::Running);
    replica.pause(&id).await.unwrap();
    let refused = replica.rollback(&id, &kept).await;
    assert_refused(refused, Code::DataLoss, "SNAPSHOT_DAMAGED");
    let session = replica.get(&id).await.unwrap();
    assert_eq!(session.state(), SessionState::Paused);
    assert_eq!(session.stored_bytes, STORED);
    let (kind, reason) = replica.events(&id).await.pop().unwrap();
    assert_eq!((&*kind, &*reason), ("PAUSED", "SNAPSHOT_DAMAGED"));
}

#[tokio::test]
async fn a_rollback_whose_replica_died_is_finished_by_another() {
    let world = World::new().await;
    let [dies, lives] = [world.replica(), world.replica()];
    let node = world.node(&lives, 4).await;
    let id = lives.create(base()).await.unwrap().session_id;
    let kept = lives.checkpoint(&id, "").await.unwrap().checkpoint_id;
    node.hold("rollback");
    let rollback = {
        let (mut client, session_id) = (dies.sessions(), id.clone());
        let request = proto::session::v1::RollbackSessionRequest {
            session_id,
            checkpoint_id: kept,
        };
        tokio::spawn(async move { client.rollback_session(red(request)).await })
    };
    node.called("rollback", 1).await;
    dies.kill();
    rollback.await.unwrap().unwrap_err();
    let session = lives.get(&id).await.unwrap();
    assert_eq!(session.state(), SessionState::Resuming);
    node.open();
    lives.until(&id, SessionState::Running).await;
    let (kind, _) = lives.events(&id).await.pop().unwrap();
    assert_eq!(kind, "ROLLED_BACK");
    assert!(node.count("rollback") >= 2);
}
