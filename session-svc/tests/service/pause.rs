//! What is promised of pause, resume, wake and drain.

use std::time::Duration;

use futures::future::join_all;
use proto::{
    node::v1::{
        NodeRegistryServiceDrainNodeRequest, NodeRegistryServiceDrainNodeResponse, NodeState,
    },
    session::v1::{
        CreateSessionRequest, ExtendSessionRequest, OnTimeout, ResumeSessionRequest, Session,
        SessionState,
    },
};
use service_kit::{
    errors::{Failure, Reason},
    ids::{HomeTag, SessionId},
};
use tonic::{Code, Status};

use crate::{
    node::{FakeNode, STORED},
    registry::listed,
    world::{
        PAUSED_RETENTION, Replica, World, assert_refused, base, burying, eventually, named, red,
    },
};

/// How far a deadline may be from where it should be: a test takes its time.
const ABOUT: i64 = 20;

fn seconds(seconds: i64) -> prost_types::Duration {
    prost_types::Duration { seconds, nanos: 0 }
}

/// Seconds from now to a session's deadline.
#[track_caller]
fn assert_left(session: &Session, expected: i64) {
    let now = std::time::SystemTime::now();
    let now = now.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let left = session.deadline.unwrap().seconds - i64::try_from(now).unwrap();
    assert!(
        (expected - ABOUT..=expected + 1).contains(&left),
        "{left} s are left, not {expected}"
    );
}

fn disk_full() -> Status {
    Failure::new(
        Code::ResourceExhausted,
        Reason::new("DISK_FULL"),
        "the disk is full; the session goes on",
    )
    .into()
}

fn living(timeout: i64) -> CreateSessionRequest {
    CreateSessionRequest {
        timeout: Some(seconds(timeout)),
        ..base()
    }
}

type Task = tokio::task::JoinHandle<Result<Session, Status>>;

fn pausing(replica: &Replica, id: &str) -> Task {
    let (mut client, session_id) = (replica.sessions(), id.to_owned());
    tokio::spawn(async move {
        let request = proto::session::v1::PauseSessionRequest { session_id };
        let answer = client.pause_session(red(request)).await?;
        Ok(answer.into_inner().session.unwrap())
    })
}

fn resuming(replica: &Replica, id: &str) -> Task {
    let (mut client, session_id) = (replica.sessions(), id.to_owned());
    tokio::spawn(async move {
        let request = ResumeSessionRequest {
            session_id,
            timeout: None,
        };
        let answer = client.resume_session(red(request)).await?;
        Ok(answer.into_inner().session.unwrap())
    })
}

#[tokio::test]
async fn a_session_pauses_and_goes_on() {
    let world = World::new().await;
    let replica = world.replica();
    let node = world.node(&replica, 4).await;
    let session = replica.create(living(600)).await.unwrap();
    let id = &session.session_id;
    let paused = replica.pause(id).await.unwrap();
    assert_eq!(paused.state(), SessionState::Paused);
    assert_eq!(paused.stored_bytes, STORED);
    assert!(node.is_paused(id));
    assert_left(&paused, PAUSED_RETENTION.as_secs() as i64);
    assert_eq!(replica.get(id).await.unwrap(), paused);
    let resumed = replica.resume(id).await.unwrap();
    assert_eq!(resumed.state(), SessionState::Running);
    assert_eq!((resumed.stored_bytes, &resumed.node_id), (0, &node.id));
    assert_eq!(resumed.access_token, session.access_token);
    assert_eq!(resumed.start_time, session.start_time);
    assert_left(&resumed, 600);
    assert!(!node.is_paused(id));
    // Resuming what runs is a success that changes nothing.
    assert_eq!(replica.resume(id).await.unwrap(), resumed);
    let kinds: Vec<String> = replica
        .events(id)
        .await
        .into_iter()
        .map(|(kind, _)| kind)
        .collect();
    assert_eq!(
        kinds,
        [
            "CREATED", "STARTING", "RUNNING", "PAUSING", "PAUSED", "RESUMING", "RESUMED"
        ]
    );
}

#[tokio::test]
async fn time_to_live_stands_still_while_paused() {
    let world = World::new().await;
    let replica = world.replica();
    let _node = world.node(&replica, 4).await;
    let id = replica.create(living(3600)).await.unwrap().session_id;
    let sql = "update sandmesh_session.sessions set deadline = deadline - 1000000000 where session_id = $1";
    world.sql(sql, &id).await;
    replica.pause(&id).await.unwrap();
    assert_left(&replica.resume(&id).await.unwrap(), 2600);
    // Extended while paused: it counts from the resume, and what is stored is kept as long as before.
    replica.pause(&id).await.unwrap();
    let extend = ExtendSessionRequest {
        session_id: id.clone(),
        timeout: Some(seconds(7200)),
    };
    let extended = replica.sessions().extend_session(red(extend)).await;
    let extended = extended.unwrap().into_inner().session.unwrap();
    assert_left(&extended, PAUSED_RETENTION.as_secs() as i64);
    assert_left(&replica.resume(&id).await.unwrap(), 7200);
    // A resume may give a new one, and does so for what runs, too.
    replica.pause(&id).await.unwrap();
    for timeout in [60, 120] {
        let request = ResumeSessionRequest {
            session_id: id.clone(),
            timeout: Some(seconds(timeout)),
        };
        let resumed = replica.sessions().resume_session(red(request)).await;
        assert_left(&resumed.unwrap().into_inner().session.unwrap(), timeout);
    }
    let wrong = ResumeSessionRequest {
        session_id: id,
        timeout: Some(seconds(0)),
    };
    let wrong = replica.sessions().resume_session(red(wrong)).await;
    assert_refused(wrong, Code::InvalidArgument, "INVALID_ARGUMENT");
}

#[tokio::test]
async fn what_cannot_be_paused_or_resumed_is_said_to_be_what_it_is() {
    let world = World::new().await;
    let replica = world.replica();
    let node = world.node(&replica, 4).await;
    let id = replica.create(base()).await.unwrap().session_id;
    replica.pause(&id).await.unwrap();
    let again = replica.pause(&id).await;
    assert_refused(again, Code::FailedPrecondition, "SESSION_PAUSED");
    assert_eq!(node.count("pause"), 1);
    replica.stop_session(&id).await.unwrap();
    assert_refused(replica.pause(&id).await, Code::NotFound, "SESSION_STOPPED");
    assert_refused(replica.resume(&id).await, Code::NotFound, "SESSION_STOPPED");
    let never = SessionId::random(&HomeTag::random()).to_string();
    assert_refused(
        replica.pause(&never).await,
        Code::NotFound,
        "SESSION_UNKNOWN",
    );
    assert_refused(
        replica.resume(&never).await,
        Code::NotFound,
        "SESSION_UNKNOWN",
    );
    assert!(node.inside().hosted.is_empty() && node.inside().paused.is_empty());
}

#[tokio::test]
async fn many_pauses_at_once_are_one_and_so_are_many_resumes() {
    let world = World::new().await;
    let replicas = [world.replica(), world.replica()];
    let node = world.node(&replicas[0], 4).await;
    let id = replicas[0].create(base()).await.unwrap().session_id;
    node.hold("pause");
    let pauses: Vec<Task> = (0..10).map(|n| pausing(&replicas[n % 2], &id)).collect();
    node.called("pause", 1).await;
    let state = replicas[1].get(&id).await.unwrap().state();
    assert_eq!(state, SessionState::Pausing);
    node.open();
    for pause in join_all(pauses).await {
        // Those that come too late to join it are told that it is paused.
        match pause.unwrap() {
            Ok(session) => assert_eq!(session.state(), SessionState::Paused),
            late => drop(assert_refused(
                late,
                Code::FailedPrecondition,
                "SESSION_PAUSED",
            )),
        }
    }
    assert_eq!(node.count("pause"), 1);

    node.hold("resume");
    let resumes: Vec<Task> = (0..10).map(|n| resuming(&replicas[n % 2], &id)).collect();
    node.called("resume", 1).await;
    node.open();
    for resume in join_all(resumes).await {
        assert_eq!(resume.unwrap().unwrap().state(), SessionState::Running);
    }
    assert_eq!(node.count("resume"), 1);

    // A resume that comes during a pause waits for it, and a pause during a resume.
    node.hold("pause");
    let pause = pausing(&replicas[0], &id);
    node.called("pause", 2).await;
    let resume = resuming(&replicas[1], &id);
    node.hold("resume");
    node.release("pause");
    assert_eq!(pause.await.unwrap().unwrap().state(), SessionState::Paused);
    node.called("resume", 2).await;
    let pause = pausing(&replicas[0], &id);
    node.open();
    resume.await.unwrap().unwrap();
    assert_eq!(pause.await.unwrap().unwrap().state(), SessionState::Paused);
}

#[tokio::test]
async fn a_pause_that_its_node_refuses_leaves_the_session_running() {
    let world = World::new().await;
    let replica = world.replica();
    let node = world.node(&replica, 4).await;
    let id = replica.create(living(600)).await.unwrap().session_id;
    node.inside().refuse_method.insert("pause", disk_full());
    let refused = replica.pause(&id).await;
    assert_refused(refused, Code::ResourceExhausted, "DISK_FULL");
    let session = replica.get(&id).await.unwrap();
    assert_eq!(session.state(), SessionState::Running);
    assert_left(&session, 600);
    let (kind, reason) = replica.events(&id).await.pop().unwrap();
    assert_eq!((&*kind, &*reason), ("RUNNING", "DISK_FULL"));
    // A refusal without a reason is one all the same.
    let broken = Status::internal("qemu said no");
    node.inside().refuse_method.insert("pause", broken);
    assert_refused(replica.pause(&id).await, Code::Aborted, "NODE_REFUSED");
    node.inside().refuse_method.clear();
    replica.pause(&id).await.unwrap();
}

#[tokio::test]
async fn a_resume_that_its_node_refuses_leaves_what_is_stored() {
    let world = World::new().await;
    let replica = world.replica();
    let node = world.node(&replica, 4).await;
    let id = replica.create(living(600)).await.unwrap().session_id;
    replica.pause(&id).await.unwrap();
    let full = Failure::new(Code::ResourceExhausted, Reason::NODE_FULL, "full");
    node.inside().refuse_method.insert("resume", full.into());
    assert_refused(
        replica.resume(&id).await,
        Code::ResourceExhausted,
        "NODE_FULL",
    );
    let session = replica.get(&id).await.unwrap();
    assert_eq!(session.state(), SessionState::Paused);
    assert_eq!(session.stored_bytes, STORED);
    assert_left(&session, PAUSED_RETENTION.as_secs() as i64);
    let (kind, reason) = replica.events(&id).await.pop().unwrap();
    assert_eq!((&*kind, &*reason), ("PAUSED", "NODE_FULL"));
    node.inside().refuse_method.clear();
    assert_left(&replica.resume(&id).await.unwrap(), 600);
}

#[tokio::test]
async fn a_pause_or_resume_that_its_node_does_not_answer_is_repeated() {
    let world = World::new().await;
    let replica = world.replica_with(|config| {
        config.store_timeout = Duration::from_millis(500);
        config.lease = Duration::from_secs(1);
    });
    let node = world.node(&replica, 4).await;
    let id = replica.create(base()).await.unwrap().session_id;
    node.hold("pause");
    assert_refused(
        replica.pause(&id).await,
        Code::Unavailable,
        "NODE_UNREACHABLE",
    );
    let session = replica.get(&id).await.unwrap();
    assert_eq!(session.state(), SessionState::Pausing);
    node.called("pause", 2).await;
    node.open();
    replica.until(&id, SessionState::Paused).await;
    node.hold("resume");
    assert_refused(
        replica.resume(&id).await,
        Code::Unavailable,
        "NODE_UNREACHABLE",
    );
    node.open();
    replica.until(&id, SessionState::Running).await;
    assert!(!node.is_paused(&id));
}

#[tokio::test]
async fn a_stop_during_a_pause_or_resume_leaves_nothing() {
    let world = World::new().await;
    let replica = world.replica();
    let node = world.node(&replica, 4).await;
    for resume in [false, true] {
        let id = replica.create(base()).await.unwrap().session_id;
        let held = if resume {
            replica.pause(&id).await.unwrap();
            node.hold("resume");
            resuming(&replica, &id)
        } else {
            node.hold("pause");
            pausing(&replica, &id)
        };
        node.called(if resume { "resume" } else { "pause" }, 1)
            .await;
        let stopped = replica.stop_session(&id).await.unwrap();
        assert_eq!(stopped.state(), SessionState::Stopped);
        assert_eq!(stopped.end_reason.unwrap().reason, "STOP_REQUESTED");
        node.open();
        assert_refused(held.await.unwrap(), Code::NotFound, "SESSION_STOPPED");
        assert!(node.inside().hosted.is_empty());
        let last = replica.get(&id).await.unwrap();
        assert_eq!(last.state(), SessionState::Stopped);
    }
    // And of what is paused.
    let id = replica.create(base()).await.unwrap().session_id;
    replica.pause(&id).await.unwrap();
    let stopped = replica.stop_session(&id).await.unwrap();
    assert_eq!(stopped.state(), SessionState::Stopped);
    assert_eq!(stopped.stored_bytes, 0);
    assert!(node.inside().hosted.is_empty());
}

#[tokio::test]
async fn a_pause_or_resume_whose_replica_died_is_finished_by_another() {
    let world = World::new().await;
    let [first, second, lives] = [world.replica(), world.replica(), world.replica()];
    let node = world.node(&lives, 4).await;
    let id = lives.create(base()).await.unwrap().session_id;
    node.hold("pause");
    let pause = pausing(&first, &id);
    node.called("pause", 1).await;
    first.kill();
    pause.await.unwrap().unwrap_err();
    node.open();
    let paused = lives.until(&id, SessionState::Paused).await;
    assert_eq!(paused.stored_bytes, STORED);
    node.hold("resume");
    let resume = resuming(&second, &id);
    node.called("resume", 1).await;
    second.kill();
    resume.await.unwrap().unwrap_err();
    node.open();
    lives.until(&id, SessionState::Running).await;
    assert!(!node.is_paused(&id));
}

#[tokio::test]
async fn a_pause_or_resume_whose_answer_was_lost_is_noted_by_asking_again() {
    let world = World::new().await;
    let replica = world.replica();
    let node = world.node(&replica, 4).await;
    let id = replica.create(living(600)).await.unwrap().session_id;
    // The node has done it, and whoever had asked is gone.
    node.inside().paused.insert(id.clone());
    let sql = "update sandmesh_session.sessions set state = 4, state_version = version, lease_until = 1, time_left = 600000000 \
               where session_id = $1";
    world.sql(sql, &id).await;
    let paused = replica.until(&id, SessionState::Paused).await;
    assert_eq!(paused.stored_bytes, STORED);
    node.inside().paused.clear();
    let sql = "update sandmesh_session.sessions set state = 6, state_version = version, lease_until = 1 where session_id = $1";
    world.sql(sql, &id).await;
    assert_left(&replica.until(&id, SessionState::Running).await, 600);
}

#[tokio::test]
async fn what_is_paused_waits_for_a_node_that_was_declared_dead() {
    let world = World::new().await;
    let replica = world.replica_with(burying);
    let mut node = world.node(&replica, 4).await;
    let paused = replica.create(base()).await.unwrap().session_id;
    let runs = replica.create(base()).await.unwrap().session_id;
    let stopped = replica.create(base()).await.unwrap().session_id;
    replica.pause(&paused).await.unwrap();
    replica.pause(&stopped).await.unwrap();
    node.die();
    replica.until(&runs, SessionState::Lost).await;
    let session = replica.get(&paused).await.unwrap();
    assert_eq!(session.state(), SessionState::Paused);
    // One that is not wanted any more does not wait.
    let silent = replica.stop_session(&stopped).await;
    assert_refused(silent, Code::Unavailable, "NODE_UNREACHABLE");
    let lost = replica.until(&stopped, SessionState::Lost).await;
    assert_eq!(lost.end_reason.unwrap().reason, "STOP_REQUESTED");
    node.restart().await;
    node.registered().await;
    let told = eventually(async || (node.inside().hosted.len() == 1).then_some(()));
    told.await.expect("it hosts what is lost");
    let resumed = replica.resume(&paused).await.unwrap();
    assert_eq!(resumed.state(), SessionState::Running);
}

#[tokio::test]
async fn whatever_is_asked_at_once_the_row_ends_as_the_node_does() {
    let world = World::new().await;
    let replicas = [world.replica(), world.replica()];
    let node = world.node(&replicas[0], 20).await;
    for round in 0..5 {
        let id = replicas[0].create(base()).await.unwrap().session_id;
        let mut tasks: Vec<Task> = Vec::new();
        for n in 0..6 {
            tasks.push(pausing(&replicas[n % 2], &id));
            tasks.push(resuming(&replicas[(n + 1) % 2], &id));
        }
        let stop = round % 2 == 1;
        if stop {
            replicas[1].stop_session(&id).await.unwrap();
        }
        for answer in join_all(tasks).await {
            if let Err(status) = answer.unwrap() {
                let expected = [Code::Aborted, Code::FailedPrecondition, Code::NotFound];
                assert!(expected.contains(&status.code()), "{status:?}");
            }
        }
        let state = replicas[0].get(&id).await.unwrap().state();
        if stop {
            assert_eq!(state, SessionState::Stopped);
            assert!(!node.inside().hosted.contains_key(&id));
        } else {
            let paused = node.is_paused(&id);
            let expected = if paused {
                SessionState::Paused
            } else {
                SessionState::Running
            };
            assert_eq!(state, expected);
        }
    }
}

#[tokio::test]
async fn at_its_deadline_a_session_is_paused_if_so_asked() {
    let world = World::new().await;
    let replica = world.replica();
    let node = world.node(&replica, 4).await;
    let request = CreateSessionRequest {
        on_timeout: OnTimeout::Pause.into(),
        ..living(1)
    };
    let session = replica.create(request).await.unwrap();
    assert_eq!(session.on_timeout(), OnTimeout::Pause);
    let id = session.session_id;
    replica.until(&id, SessionState::Paused).await;
    assert!(node.is_paused(&id));
    let events = replica.events(&id).await;
    assert!(events.contains(&("PAUSING".into(), "DEADLINE_EXPIRED".into())));
    // Nothing was left of its time to live, so it has all of it again.
    let request = ResumeSessionRequest {
        session_id: id.clone(),
        timeout: Some(seconds(600)),
    };
    replica
        .sessions()
        .resume_session(red(request))
        .await
        .unwrap();
    let sql = "update sandmesh_session.sessions set deadline = 1 where session_id = $1";
    world.sql(sql, &id).await;
    replica.until(&id, SessionState::Paused).await;
    assert_left(&replica.resume(&id).await.unwrap(), 600);
    // Refused, it goes on, and is tried again a little later.
    node.inside().refuse_method.insert("pause", disk_full());
    world.sql(sql, &id).await;
    let refused = eventually(async || {
        let last = replica.events(&id).await.pop()?;
        (last == ("RUNNING".into(), "DISK_FULL".into())).then_some(())
    });
    refused.await.expect("nobody tried to pause it");
    assert_left(&replica.get(&id).await.unwrap(), 30);
    node.inside().refuse_method.clear();
    world.sql(sql, &id).await;
    replica.until(&id, SessionState::Paused).await;
    // What is stored is not kept for ever.
    world.sql(sql, &id).await;
    let ended = replica.until(&id, SessionState::Stopped).await;
    assert_eq!(ended.end_reason.unwrap().reason, "RETENTION_EXPIRED");
    assert!(node.inside().hosted.is_empty());
}

#[tokio::test]
async fn twenty_calls_that_wake_a_session_are_one_resume() {
    let world = World::new().await;
    let replicas = [world.replica(), world.replica()];
    let node = world.node(&replicas[0], 4).await;
    let request = CreateSessionRequest {
        wake_on_request: true,
        ..living(600)
    };
    let id = replicas[0].create(request).await.unwrap().session_id;
    // Woken while it is being paused, it is resumed after.
    node.hold("pause");
    let pause = pausing(&replicas[0], &id);
    node.called("pause", 1).await;
    let early = replicas[1].wake(&id, &node);
    let open = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        node.open();
    };
    let (early, ()) = tokio::join!(early, open);
    early.unwrap();
    let _ = pause.await.unwrap();
    assert_eq!(node.count("resume"), 1);

    replicas[0].pause(&id).await.unwrap();
    node.hold("resume");
    let wakes = join_all((0..20).map(|n| replicas[n % 2].wake(&id, &node)));
    let open = async {
        node.called("resume", 2).await;
        node.open();
    };
    let (wakes, ()) = tokio::join!(wakes, open);
    for wake in wakes {
        wake.unwrap();
    }
    assert_eq!(node.count("resume"), 2);
    let session = replicas[0].get(&id).await.unwrap();
    assert_eq!(session.state(), SessionState::Running);
    assert_left(&session, 600);
    // What runs is awake.
    replicas[0].wake(&id, &node).await.unwrap();
    let events = replicas[0].events(&id).await;
    assert!(events.contains(&("RESUMING".into(), "CALLED".into())));
}

#[tokio::test]
async fn only_its_node_wakes_a_session_and_only_if_it_may() {
    let world = World::new().await;
    let replica = world.replica();
    let node = world.node(&replica, 4).await;
    let id = replica.create(base()).await.unwrap().session_id;
    replica.pause(&id).await.unwrap();
    let asleep = replica.wake(&id, &node).await;
    assert_refused(asleep, Code::FailedPrecondition, "SESSION_PAUSED");
    let other = world.node(&replica, 1).await;
    assert_refused(
        replica.wake(&id, &other).await,
        Code::NotFound,
        "SESSION_UNKNOWN",
    );
    replica.stop_session(&id).await.unwrap();
    assert_refused(
        replica.wake(&id, &node).await,
        Code::NotFound,
        "SESSION_STOPPED",
    );
    assert_eq!(node.count("resume"), 0);
}

async fn drain(
    replica: &Replica,
    node: &str,
    draining: bool,
    pause: bool,
) -> Result<NodeRegistryServiceDrainNodeResponse, Status> {
    let request = NodeRegistryServiceDrainNodeRequest {
        node_id: node.to_owned(),
        draining,
        pause,
    };
    let answer = replica.registry().drain_node(request).await?;
    Ok(answer.into_inner())
}

#[tokio::test]
async fn a_drained_node_takes_nothing_and_its_sessions_are_paused_if_so_asked() {
    let world = World::new().await;
    let replica = world.replica();
    let mut node = world.node(&replica, 20).await;
    let creates = join_all((0..7).map(|n| replica.create(named(&format!("drain-{n}"))))).await;
    let ids: Vec<String> = creates
        .into_iter()
        .map(|made| made.unwrap().session_id)
        .collect();
    let drained = drain(&replica, &node.id, true, false).await.unwrap();
    assert_eq!((drained.paused, drained.running), (0, 7));
    assert!(node.inside().draining);
    assert_refused(
        replica.create(base()).await,
        Code::ResourceExhausted,
        "NO_CAPACITY",
    );
    let forked = replica.fork(&ids[0], 1, "").await;
    assert_refused(forked, Code::ResourceExhausted, "NO_CAPACITY");
    let drained = drain(&replica, &node.id, true, true).await.unwrap();
    assert_eq!((drained.paused, drained.running), (7, 0));
    assert_eq!(node.inside().paused.len(), 7);
    // It stays so over a restart of the node, which is told again.
    node.inside().draining = false;
    node.restart().await;
    let told = eventually(async || node.inside().draining.then_some(()));
    told.await.expect("the node was not told");
    let state = listed(&replica, &node, false).await.unwrap().state();
    assert_eq!(state, NodeState::Draining);
    // What is there may go on.
    replica.resume(&ids[0]).await.unwrap();

    let undone = drain(&replica, &node.id, false, false).await.unwrap();
    assert_eq!((undone.paused, undone.running), (0, 1));
    assert!(!node.inside().draining);
    replica.create(base()).await.unwrap();
    assert_refused(
        drain(&replica, "nobody", true, false).await,
        Code::NotFound,
        "NODE_UNKNOWN",
    );
    let nonsense = drain(&replica, &node.id, false, true).await;
    assert_refused(nonsense, Code::InvalidArgument, "INVALID_ARGUMENT");
}

#[tokio::test]
async fn a_session_that_cannot_be_paused_is_counted_by_a_drain() {
    let world = World::new().await;
    let replica = world.replica();
    let node = world.node(&replica, 4).await;
    replica.create(base()).await.unwrap();
    node.inside().refuse_method.insert("pause", disk_full());
    let drained = drain(&replica, &node.id, true, true).await.unwrap();
    assert_eq!((drained.paused, drained.running), (0, 1));
}

#[tokio::test]
async fn a_paused_session_takes_no_room_on_its_node() {
    let world = World::new().await;
    let replica = world.replica();
    let node = world.node(&replica, 1).await;
    let id = replica.create(base()).await.unwrap().session_id;
    replica.pause(&id).await.unwrap();
    let other = eventually(async || replica.create(base()).await.ok());
    assert_eq!(other.await.unwrap().node_id, node.id);
}

/// A session, and its node that died in the middle of a pause, or resume, of it.
async fn cut_short(replica: &Replica, node: &mut FakeNode, resume: bool) -> String {
    let id = replica.create(base()).await.unwrap().session_id;
    let method = if resume { "resume" } else { "pause" };
    if resume {
        replica.pause(&id).await.unwrap();
    }
    node.hold(method);
    let before = node.count(method);
    let task = if resume {
        resuming(replica, &id)
    } else {
        pausing(replica, &id)
    };
    node.called(method, before + 1).await;
    node.die();
    assert_refused(task.await.unwrap(), Code::Unavailable, "NODE_UNREACHABLE");
    node.open();
    id
}

#[tokio::test]
async fn a_node_that_restarts_in_the_middle_says_what_came_of_it() {
    let world = World::new().await;
    // Nobody repeats the call before the node is heard.
    let replica = world.replica_with(|config| config.lease = Duration::from_mins(5));
    let mut node = world.node(&replica, 20).await;
    for (resume, ends_paused) in [(false, false), (false, true), (true, false), (true, true)] {
        let id = cut_short(&replica, &mut node, resume).await;
        if ends_paused {
            node.inside().paused.insert(id.clone());
        } else {
            node.inside().paused.remove(&id);
        }
        node.restart().await;
        node.registered().await;
        let expected = if ends_paused {
            SessionState::Paused
        } else {
            SessionState::Running
        };
        let session = replica.until(&id, expected).await;
        assert_eq!(session.stored_bytes, if ends_paused { STORED } else { 0 });
        // And what it is can be changed again.
        if ends_paused {
            replica.resume(&id).await.unwrap();
        } else {
            replica.pause(&id).await.unwrap();
        }
    }
}

#[tokio::test]
async fn an_audit_takes_the_nodes_word_for_what_is_paused() {
    let world = World::new().await;
    let replica = world.replica();
    let node = world.node(&replica, 4).await;
    let id = replica.create(base()).await.unwrap().session_id;
    let age = "update sandmesh_session.sessions set state_time = state_time - 60000000 where session_id = $1";
    node.inside().paused.insert(id.clone());
    world.sql(age, &id).await;
    let paused = replica.until(&id, SessionState::Paused).await;
    assert_eq!(paused.stored_bytes, STORED);
    node.inside().paused.remove(&id);
    world.sql(age, &id).await;
    replica.until(&id, SessionState::Running).await;
    assert_eq!((node.count("pause"), node.count("resume")), (0, 0));
}
