//! What watches and the catalog are promised: every change, in order, once; and nothing that is not so.

use std::time::Duration;

use futures::future::join_all;
use proto::session::v1::{
    CreateSessionRequest, ListSessionEventsRequest, Session, SessionEvent, SessionState,
};
use redis::AsyncCommands as _;
use serde_json::{Value, json};
use tonic::Code;
use tonic_types::StatusExt as _;

use crate::{
    watcher::Watcher,
    world::{Replica, World, assert_refused, base, by, entry_of, eventually, labels, named, red},
};

const WHOLE_LIFE: [&str; 5] = ["CREATED", "STARTING", "RUNNING", "STOPPING", "STOPPED"];

fn numbered(kinds: &[&str]) -> Vec<(u64, String)> {
    (1..).zip(kinds.iter().map(|kind| (*kind).into())).collect()
}

async fn history(replica: &Replica, id: &str) -> Vec<SessionEvent> {
    let request = ListSessionEventsRequest {
        session_id: id.into(),
        ..ListSessionEventsRequest::default()
    };
    let answer = replica.sessions().list_session_events(red(request)).await;
    answer.unwrap().into_inner().events
}

/// A session as watches show it: without its secret.
async fn as_watched(replica: &Replica, id: &str) -> Session {
    Session {
        access_token: String::new(),
        ..replica.get(id).await.unwrap()
    }
}

#[tokio::test]
async fn a_watch_shows_what_is_there_then_every_change_in_order() {
    let world = World::new().await;
    let replica = world.replica();
    let _node = world.node(&replica, 9).await;
    let ended = replica.create(base()).await.unwrap().session_id;
    replica.stop_session(&ended).await.unwrap();
    let old = replica.create(base()).await.unwrap();
    let mut watcher = Watcher::start(&replica).await;
    let there: Vec<_> = watcher.snapshot.clone().into_iter().collect();
    assert_eq!(there, [(old.session_id.clone(), old.version)]);

    let new = replica.create(base()).await.unwrap().session_id;
    replica.stop_session(&old.session_id).await.unwrap();
    watcher.until(&old.session_id, "STOPPED").await;
    let last = watcher.changes.last().unwrap().session.clone();
    assert_eq!(last, Some(as_watched(&replica, &old.session_id).await));
    let mut expected = numbered(&WHOLE_LIFE[..3]);
    expected.extend(numbered(&WHOLE_LIFE).split_off(3));
    assert_eq!(watcher.seen(""), expected);
    assert_eq!(watcher.seen(&new), numbered(&WHOLE_LIFE[..3]));
}

#[tokio::test]
async fn a_watch_of_one_session_shows_no_other() {
    let world = World::new().await;
    let replica = world.replica();
    let _node = world.node(&replica, 9).await;
    let one = replica.create(base()).await.unwrap().session_id;
    replica.create(base()).await.unwrap();
    let mut watcher = Watcher::start_as("red", &replica, &one).await;
    assert_eq!(watcher.snapshot.keys().collect::<Vec<_>>(), [&one]);
    replica.create(base()).await.unwrap();
    replica.stop_session(&one).await.unwrap();
    watcher.until(&one, "STOPPED").await;
    assert_eq!(watcher.seen(""), numbered(&WHOLE_LIFE).split_off(3));
}

#[tokio::test]
async fn another_teams_changes_are_never_seen() {
    let world = World::new().await;
    let replica = world.replica();
    let _node = world.node(&replica, 9).await;
    replica.create(base()).await.unwrap();
    let mut blue = Watcher::start_as("blue", &replica, "").await;
    assert!(blue.snapshot.is_empty());
    let foreign = replica.create(base()).await.unwrap().session_id;
    replica.stop_session(&foreign).await.unwrap();
    // The feed is in order: with this seen, red's changes before it were passed over.
    let own = replica.sessions().create_session(by("blue", base())).await;
    let own = own.unwrap().into_inner().session.unwrap().session_id;
    blue.until(&own, "RUNNING").await;
    assert_eq!(blue.seen(""), numbered(&WHOLE_LIFE[..3]));
    assert_eq!(blue.seen(&own), blue.seen(""));
}

#[tokio::test]
async fn a_watch_goes_on_from_any_revision_at_any_replica() {
    let world = World::new().await;
    let replicas = [world.replica(), world.replica()];
    let _node = world.node(&replicas[0], 9).await;
    let mut watcher = Watcher::start(&replicas[0]).await;
    let mut revisions = vec![watcher.revision.clone()];
    let first = replicas[0].create(base()).await.unwrap().session_id;
    let second = replicas[1].create(base()).await.unwrap().session_id;
    replicas[1].stop_session(&first).await.unwrap();
    replicas[0].stop_session(&second).await.unwrap();
    watcher.until(&second, "STOPPED").await;
    let changes = &watcher.changes;
    assert_eq!(changes.len(), 2 * WHOLE_LIFE.len());
    revisions.extend(changes.iter().map(|change| change.revision.clone()));
    let last = replicas[0].create(named("last")).await.unwrap().session_id;

    let resumed = revisions.iter().enumerate().map(async |(seen, revision)| {
        let resumed = Watcher::resume_from(&replicas[seen % 2], revision).await;
        let mut resumed = resumed.unwrap();
        resumed.until(&last, "RUNNING").await;
        let (again, end) = resumed.changes.split_at(changes.len() - seen);
        assert_eq!(again, &changes[seen..], "after {seen} changes");
        assert_eq!(end.len(), 3, "after {seen} changes: {end:?}");
    });
    join_all(resumed).await;
}

#[tokio::test]
async fn a_watch_outlives_the_replica_it_was_on() {
    let world = World::new().await;
    let [first, second] = [world.replica(), world.replica()];
    let _node = world.node(&second, 9).await;
    let mut watcher = Watcher::start(&first).await;
    let before = second.create(base()).await.unwrap().session_id;
    watcher.until(&before, "STARTING").await;
    first.kill();
    while watcher.next().await.is_ok() {}
    second.stop_session(&before).await.unwrap();
    let after = second.create(base()).await.unwrap().session_id;
    watcher.resume(&second).await;
    watcher.until(&after, "RUNNING").await;
    assert_eq!(watcher.seen(&before), numbered(&WHOLE_LIFE));
    assert_eq!(watcher.seen(&after), numbered(&WHOLE_LIFE[..3]));
}

#[tokio::test]
async fn a_watch_is_told_that_its_replica_stops_and_goes_on_at_another() {
    let world = World::new().await;
    let [first, second] = [world.replica(), world.replica()];
    let _node = world.node(&second, 9).await;
    let mut watcher = Watcher::start(&first).await;
    let before = second.create(base()).await.unwrap().session_id;
    watcher.until(&before, "RUNNING").await;
    first.stop().await;
    let word = watcher.next().await;
    assert_refused(word, Code::Unavailable, "SERVICE_UNAVAILABLE");
    second.stop_session(&before).await.unwrap();
    watcher.resume(&second).await;
    watcher.until(&before, "STOPPED").await;
    assert_eq!(watcher.seen(""), numbered(&WHOLE_LIFE));
}

#[tokio::test]
async fn watches_of_a_busy_team_miss_nothing_and_repeat_nothing() {
    const SESSIONS: usize = 30;
    let world = World::new().await;
    let replicas = [world.replica(), world.replica()];
    let _node = world.node(&replicas[0], 100).await;
    let mut watchers = Vec::new();
    for replica in [0, 1, 0] {
        watchers.push(Watcher::start(&replicas[replica]).await);
    }
    // Changes from two replicas at once; every other session is stopped as soon as it runs.
    let writing = async {
        let lives = (0..SESSIONS).map(async |n| {
            let session = replicas[n % 2].create(base()).await.unwrap();
            if n % 4 < 2 {
                let elsewhere = &replicas[(n + 1) % 2];
                elsewhere.stop_session(&session.session_id).await.unwrap();
            }
            session.session_id
        });
        let ids = join_all(lives).await;
        let last = CreateSessionRequest {
            metadata: labels([("last", "yes")]),
            ..base()
        };
        replicas[0].create(last).await.unwrap();
        ids
    };
    // The last watcher never stays long in one place.
    let reading = watchers.into_iter().zip([usize::MAX, usize::MAX, 7]);
    let reading = reading.map(async |(mut watcher, stay)| {
        loop {
            let change = watcher.next().await.unwrap();
            let is_last = change.session.unwrap().metadata.contains_key("last");
            if is_last && change.event.unwrap().r#type == "RUNNING" {
                return watcher;
            }
            let seen = watcher.changes.len();
            if seen.is_multiple_of(stay) {
                watcher.resume(&replicas[seen % 2]).await;
            }
        }
    });
    let (ids, watchers) = tokio::join!(writing, join_all(reading));
    for id in &ids {
        let history = history(&replicas[0], id).await;
        for watcher in &watchers {
            let events = watcher
                .changes
                .iter()
                .filter_map(|change| change.event.clone());
            let seen: Vec<_> = events.filter(|event| event.session_id == *id).collect();
            assert_eq!(seen, history);
        }
    }
    let stopped = (0..SESSIONS).filter(|n| n % 4 < 2).count();
    for watcher in &watchers {
        assert_eq!(watcher.changes.len(), 3 * (SESSIONS + 1) + 2 * stopped);
        assert_eq!(watcher.changes, watchers[0].changes);
    }
}

#[tokio::test]
async fn a_change_that_is_committed_late_is_not_passed_over() {
    let world = World::new().await;
    let replica = world.replica();
    let _node = world.node(&replica, 9).await;
    let mut watcher = Watcher::start(&replica).await;
    let early = replica.create(base()).await.unwrap().session_id;
    watcher.until(&early, "RUNNING").await;
    // A replica that takes its time between its change and the end of its transaction.
    let database = sqlx::PgPool::connect(&world.postgres.url()).await.unwrap();
    let mut slow = database.begin().await.unwrap();
    let change = "insert into sandmesh_session.session_events \
         (session_id, team, number, type, state, time, reason, message, actor, session) \
         select session_id, team, 4, 'UPDATED', state, time, reason, message, actor, session \
         from sandmesh_session.session_events where session_id = $1 and number = 3";
    let change = sqlx::query(change).bind(&early).execute(&mut *slow).await;
    assert_eq!(change.unwrap().rows_affected(), 1);
    let late = replica.create(base()).await.unwrap().session_id;
    // With the second one the watch has looked at the feed since.
    watcher.heartbeat().await;
    watcher.heartbeat().await;
    slow.commit().await.unwrap();
    watcher.until(&late, "RUNNING").await;
    let mut expected = numbered(&["CREATED", "STARTING", "RUNNING", "UPDATED"]);
    assert_eq!(watcher.seen(&early), expected);
    expected.extend(numbered(&WHOLE_LIFE[..3]));
    assert_eq!(watcher.seen(""), expected);
}

#[tokio::test]
async fn a_revision_nobody_gave_out_is_refused() {
    let world = World::new().await;
    let replica = world.replica();
    for nonsense in ["nonsense", "1", "1.", ".1", "1.2.3", "-1.0", "x.1", " 1.1"] {
        let refused = Watcher::resume_from(&replica, nonsense).await.map(|_| ());
        let status = assert_refused(refused, Code::InvalidArgument, "INVALID_ARGUMENT");
        let details = status.get_error_details();
        let wrong = &details.bad_request().unwrap().field_violations[0];
        assert_eq!(wrong.field, "revision");
    }
    // One that another database gave out, or this one before it was set back.
    let refused = Watcher::resume_from(&replica, "ffffffffff.1").await;
    assert_refused(refused.map(|_| ()), Code::OutOfRange, "REVISION_TOO_OLD");
}

#[tokio::test]
async fn a_revision_is_too_old_once_a_change_after_it_is_forgotten() {
    let world = World::new().await;
    let replica = world.replica_with(|config| config.retention = Duration::from_millis(500));
    let _node = world.node(&replica, 9).await;
    let mut watcher = Watcher::start(&replica).await;
    let old = watcher.revision.clone();
    let lives = replica.create(base()).await.unwrap().session_id;
    let id = replica.create(base()).await.unwrap().session_id;
    replica.stop_session(&id).await.unwrap();
    watcher.until(&id, "STOPPED").await;
    let forgotten = eventually(async || replica.get(&id).await.err()).await;
    assert_refused(
        Err::<(), _>(forgotten.unwrap()),
        Code::NotFound,
        "SESSION_UNKNOWN",
    );
    let refused = Watcher::resume_from(&replica, &old).await.map(|_| ());
    assert_refused(refused, Code::OutOfRange, "REVISION_TOO_OLD");
    // Whoever saw it all misses nothing, and what lives is not forgotten.
    watcher.resume(&replica).await;
    replica.stop_session(&lives).await.unwrap();
    watcher.until(&lives, "STOPPED").await;
    assert_eq!(watcher.seen(&lives), numbered(&WHOLE_LIFE));
}

#[tokio::test]
async fn a_heartbeat_carries_the_place_to_go_on_from() {
    let world = World::new().await;
    let replicas = [world.replica(), world.replica()];
    let _node = world.node(&replicas[0], 9).await;
    let mut watcher = Watcher::start(&replicas[0]).await;
    let id = replicas[0].create(base()).await.unwrap().session_id;
    watcher.until(&id, "RUNNING").await;
    watcher.heartbeat().await;
    let mut resumed = Watcher::resume_from(&replicas[1], &watcher.revision)
        .await
        .unwrap();
    // Nothing happened: the first answer is a heartbeat as well.
    resumed.heartbeat().await;
    replicas[0].stop_session(&id).await.unwrap();
    resumed.until(&id, "STOPPED").await;
    assert_eq!(resumed.seen(""), numbered(&WHOLE_LIFE).split_off(3));
}

#[tokio::test]
async fn the_catalog_says_where_a_session_is_and_how_it_ended() {
    let world = World::new().await;
    let replica = world.replica();
    let node = world.node(&replica, 9).await;
    let session = replica.create(base()).await.unwrap();
    let id = &session.session_id;
    let becomes = async |session: &Session| {
        let expected = Some(entry_of(session));
        let there = async || (world.catalog_entry(id).await == expected).then_some(());
        eventually(there).await.expect("the catalog lags behind");
    };
    becomes(&session).await;
    assert_eq!(session.state(), SessionState::Running);
    world
        .catalog_is_whole_again(std::slice::from_ref(&session))
        .await;
    let mut redis = world.redis().await;
    let address = eventually(async || {
        let text: Option<String> = redis.hget("test:nodes", &node.id).await.unwrap();
        text.map(|text| serde_json::from_str::<Value>(&text).unwrap())
    });
    let expected = json!({ "internalAddress": node.address.to_string(), "dead": false });
    assert_eq!(address.await, Some(expected));

    let stopped = replica.stop_session(id).await.unwrap();
    becomes(&stopped).await;
    assert_eq!(stopped.state(), SessionState::Stopped);
    let left: i64 = redis.pttl(format!("test:session:{id}")).await.unwrap();
    assert!(left > 0, "what has ended is not kept for good: {left}");
}

/// Some that run, one that has ended, and the catalog says so.
async fn settled(world: &World, replica: &Replica) -> Vec<Session> {
    let mut sessions = Vec::new();
    for _ in 0..5 {
        sessions.push(replica.create(base()).await.unwrap());
    }
    let last = sessions.last_mut().unwrap();
    *last = replica.stop_session(&last.session_id).await.unwrap();
    eventually(async || {
        for session in &sessions {
            if world.catalog_entry(&session.session_id).await != Some(entry_of(session)) {
                return None;
            }
        }
        Some(())
    })
    .await
    .expect("the catalog lags behind");
    sessions
}

#[tokio::test]
async fn an_emptied_catalog_does_not_say_it_is_whole_until_it_is_rebuilt() {
    let world = World::new().await;
    let replicas = [world.replica(), world.replica()];
    let _node = world.node(&replicas[0], 9).await;
    let sessions = settled(&world, &replicas[0]).await;
    world.catalog_is_whole_again(&sessions).await;
    // Nobody can read the sessions now, so a rebuild that has begun cannot come to its end.
    let database = sqlx::PgPool::connect(&world.postgres.url()).await.unwrap();
    let mut lock = database.begin().await.unwrap();
    sqlx::query("lock table sandmesh_session.sessions in access exclusive mode")
        .execute(&mut *lock)
        .await
        .unwrap();
    let mut redis = world.redis().await;
    redis.flushall::<()>().await.unwrap();
    let building = eventually(async || {
        let building: Vec<String> = redis.keys("test:building:*").await.unwrap();
        let ready: bool = redis.exists("test:ready").await.unwrap();
        assert!(!ready);
        (!building.is_empty()).then_some(())
    });
    building.await.expect("nobody rebuilds the catalog");
    lock.rollback().await.unwrap();
    world.catalog_is_whole_again(&sessions).await;
}

#[tokio::test]
async fn the_catalog_is_rebuilt_after_redis_restarted_whatever_redis_kept() {
    let mut world = World::new().await;
    let replicas = [world.replica(), world.replica()];
    let _node = world.node(&replicas[0], 9).await;
    let sessions = settled(&world, &replicas[0]).await;
    world.redis.restart().unwrap();
    world.catalog_is_whole_again(&sessions).await;

    // As if it had saved itself long ago.
    world.redis.restart().unwrap();
    let old = &sessions[0];
    let kept = json!({ "nodeId": "elsewhere", "state": 2, "version": 1 }).to_string();
    let key = format!("test:session:{}", old.session_id);
    let mut pipe = redis::pipe();
    pipe.atomic().set("test:ready", "1").set_nx(key, kept);
    pipe.exec_async(&mut world.redis().await).await.unwrap();
    let right = eventually(async || {
        let entry = world.catalog_entry(&old.session_id).await;
        (entry == Some(entry_of(old))).then_some(())
    });
    right.await.expect("the catalog is still what redis kept");
    world.catalog_is_whole_again(&sessions).await;
}
