//! What holds while Postgres, Redis or a replica is away, and after.

use std::{
    cell::Cell,
    collections::BTreeSet,
    time::{Duration, Instant},
};

use futures::future::join_all;
use proto::session::v1::{
    CreateSessionRequest, CreateSessionResponse, ListSessionsRequest, SessionState,
};
use tonic::{Code, Response, Status};
use tonic_types::StatusExt as _;

use crate::{
    node::FakeNode,
    watcher::Watcher,
    world::{Replica, World, assert_refused, base, eventually, named, red},
};

/// What a caller may have to wait for the answer that there is none; on a slow machine.
const SOON: Duration = Duration::from_secs(5);

async fn soon<T>(answer: impl Future<Output = T>) -> T {
    let answer = tokio::time::timeout(SOON, answer).await;
    answer.expect("the caller waits too long")
}

#[track_caller]
fn assert_database_unavailable<T: std::fmt::Debug>(answer: Result<T, Status>) {
    let status = assert_refused(answer, Code::Unavailable, "DATABASE_UNAVAILABLE");
    assert!(status.get_error_details().retry_info().is_some());
}

/// A session that ends by itself once deadlines are looked at again.
fn short() -> CreateSessionRequest {
    CreateSessionRequest {
        timeout: Some(prost_types::Duration {
            seconds: 1,
            nanos: 0,
        }),
        ..base()
    }
}

type Create = tokio::task::JoinHandle<Result<Response<CreateSessionResponse>, Status>>;

/// A create that its node has heard of and does not answer yet, and the session's ID.
async fn held_create(
    replica: &Replica,
    node: &FakeNode,
    request: CreateSessionRequest,
) -> (Create, String) {
    node.hold_starts();
    let mut client = replica.sessions();
    let create = tokio::spawn(async move { client.create_session(red(request)).await });
    let id = eventually(async || node.inside().starts.first().cloned());
    (create, id.await.unwrap())
}

#[tokio::test]
async fn without_postgres_calls_fail_soon_and_nothing_is_lost() {
    const DEAD_AFTER: Duration = Duration::from_secs(4);
    const LOOKED: Duration = Duration::from_millis(700);
    let mut world = World::new().await;
    let replica = world.replica_with(|config| config.node_dead_after = DEAD_AFTER);
    let mut node = world.node(&replica, 50).await;
    let id = replica.create(base()).await.unwrap().session_id;
    let expires = replica.create(short()).await.unwrap().session_id;
    world.postgres.stop().unwrap();
    let away_since = Instant::now();
    let creates = join_all((0..8).map(|_| soon(replica.create(base())))).await;
    creates.into_iter().for_each(assert_database_unavailable);
    assert_database_unavailable(soon(replica.create(named("later"))).await);
    assert_database_unavailable(soon(replica.get(&id)).await);
    assert_database_unavailable(soon(replica.stop_session(&id)).await);

    // For longer than a node may be silent no heartbeat can be noted, nor at once after that.
    tokio::time::sleep((DEAD_AFTER + LOOKED).saturating_sub(away_since.elapsed())).await;
    node.fall_silent();
    world.postgres.start_again().unwrap();
    replica.until(&expires, SessionState::Stopped).await;
    // Dead nodes are looked for as often as deadlines.
    tokio::time::sleep(LOOKED).await;
    node.beat();
    node.registered().await;
    let session = replica.get(&id).await.unwrap();
    assert_eq!(session.state(), SessionState::Running);
    replica.create(named("later")).await.unwrap();
    replica.stop_session(&id).await.unwrap();
}

#[tokio::test]
async fn a_watch_says_that_postgres_is_away_and_goes_on_after() {
    let mut world = World::new().await;
    let replica = world.replica();
    let _node = world.node(&replica, 9).await;
    let mut watcher = Watcher::start(&replica).await;
    let id = replica.create(base()).await.unwrap().session_id;
    watcher.until(&id, "RUNNING").await;
    world.postgres.stop().unwrap();
    assert_database_unavailable(watcher.next().await);
    let refused = Watcher::resume_from(&replica, &watcher.revision).await;
    assert_database_unavailable(refused.map(|_| ()));
    world.postgres.start_again().unwrap();
    let stopped = eventually(async || replica.stop_session(&id).await.ok());
    stopped.await.expect("stops do not work again");
    watcher.resume(&replica).await;
    watcher.until(&id, "STOPPED").await;
    assert_eq!(watcher.seen(&id).len(), 5);
}

#[tokio::test]
async fn a_crash_of_postgres_neither_loses_nor_doubles_a_session() {
    const CLIENTS: usize = 6;
    const EACH: usize = 8;
    let mut world = World::new().await;
    let replica = world.replica();
    let node = world.node(&replica, 100).await;
    let failed = Cell::new(0);
    // Each asks until it is answered, with the same request ID.
    let clients = join_all((0..CLIENTS).map(async |client| {
        let mut ids = Vec::new();
        for n in 0..EACH {
            let request = named(&format!("{client}-{n}"));
            let answered = eventually(async || {
                let answer = replica.create(request.clone()).await;
                failed.set(failed.get() + usize::from(answer.is_err()));
                answer.ok()
            });
            let session = answered.await.expect("creates do not work again");
            assert_eq!(session.state(), SessionState::Running);
            ids.push(session.session_id);
        }
        ids
    }));
    let crash = async {
        let busy = async || (node.inside().hosted.len() >= CLIENTS).then_some(());
        eventually(busy).await.unwrap();
        world.postgres.kill().unwrap();
        let noticed = async || (failed.get() >= CLIENTS).then_some(());
        eventually(noticed).await.expect("nobody noticed the crash");
        world.postgres.start_again().unwrap();
    };
    let (ids, ()) = tokio::join!(clients, crash);
    let ids: BTreeSet<String> = ids.into_iter().flatten().collect();
    assert_eq!(ids.len(), CLIENTS * EACH);
    let request = ListSessionsRequest {
        page_size: 1000,
        ..ListSessionsRequest::default()
    };
    let listed = replica
        .sessions()
        .list_sessions(red(request))
        .await
        .unwrap();
    let listed = listed.into_inner().sessions.into_iter();
    let listed: BTreeSet<String> = listed.map(|session| session.session_id).collect();
    assert_eq!(listed, ids);
    let hosted: BTreeSet<String> = node.inside().hosted.keys().cloned().collect();
    assert_eq!(hosted, ids);
}

#[tokio::test]
async fn a_replica_that_starts_without_postgres_works_once_it_is_there() {
    let mut world = World::new().await;
    world.postgres.stop().unwrap();
    let replica = world.replica();
    assert_database_unavailable(replica.create(base()).await);
    world.postgres.start_again().unwrap();
    let _node = world.node(&replica, 4).await;
    let session = replica.create(base()).await.unwrap();
    assert_eq!(session.state(), SessionState::Running);
}

#[tokio::test]
async fn without_redis_sessions_and_watches_go_on_and_the_catalog_comes_back() {
    let mut world = World::new().await;
    let replicas = [world.replica(), world.replica()];
    let _node = world.node(&replicas[0], 9).await;
    let old = replicas[0].create(base()).await.unwrap();
    let mut watcher = Watcher::start(&replicas[1]).await;
    world.redis.stop().unwrap();

    let ended = replicas[0].create(base()).await.unwrap();
    let ended = replicas[1].stop_session(&ended.session_id).await.unwrap();
    // Without word from the other replica its changes are found all the same.
    watcher.until(&ended.session_id, "STOPPED").await;
    assert_eq!(replicas[1].get(&old.session_id).await.unwrap(), old);
    let late = world.replica();
    let new = late.create(base()).await.unwrap();
    watcher.until(&new.session_id, "RUNNING").await;
    let fresh = Watcher::start(&late).await;
    assert!(
        fresh
            .snapshot
            .keys()
            .eq(BTreeSet::from([&old.session_id, &new.session_id]))
    );

    world.redis.start_again().unwrap();
    world.catalog_is_whole_again(&[old, ended, new]).await;
}

#[tokio::test]
async fn a_start_whose_replica_died_is_finished_by_another() {
    let world = World::new().await;
    let [dies, lives] = [world.replica(), world.replica()];
    let node = world.node(&lives, 4).await;
    let (create, id) = held_create(&dies, &node, named("once")).await;
    dies.kill();
    create.await.unwrap().unwrap_err();
    node.open();
    let session = lives.create(named("once")).await.unwrap();
    assert_eq!(session.session_id, id);
    assert_eq!(session.state(), SessionState::Running);
    let inside = node.inside();
    assert!(inside.hosted.keys().eq([&id]));
    assert!(inside.starts.iter().all(|start| *start == id));
}

#[tokio::test]
async fn a_start_whose_replica_died_is_given_up_if_nobody_can_ask_for_it() {
    let world = World::new().await;
    let [dies, lives] = [world.replica(), world.replica()];
    let node = world.node(&lives, 4).await;
    let (create, id) = held_create(&dies, &node, base()).await;
    dies.kill();
    create.await.unwrap().unwrap_err();
    node.open();
    let failed = lives.until(&id, SessionState::Failed).await;
    assert_eq!(failed.end_reason.unwrap().reason, "START_ABANDONED");
    let inside = node.inside();
    assert!(inside.stops.contains(&id));
    assert!(inside.hosted.is_empty());
}

#[tokio::test]
async fn a_stop_whose_replica_died_is_finished_by_another() {
    let world = World::new().await;
    let [dies, lives] = [world.replica(), world.replica()];
    let node = world.node(&lives, 4).await;
    let id = lives.create(base()).await.unwrap().session_id;
    node.hold_stops();
    let stop = {
        let (mut client, session_id) = (dies.sessions(), id.clone());
        let request = proto::session::v1::StopSessionRequest { session_id };
        tokio::spawn(async move { client.stop_session(red(request)).await })
    };
    let heard = eventually(async || node.inside().stops.contains(&id).then_some(()));
    heard.await.unwrap();
    dies.kill();
    stop.await.unwrap().unwrap_err();
    assert!(node.inside().hosted.contains_key(&id));
    node.open();
    let stopped = lives.until(&id, SessionState::Stopped).await;
    assert_eq!(stopped.end_reason.unwrap().reason, "STOP_REQUESTED");
    assert!(node.inside().hosted.is_empty());
}
