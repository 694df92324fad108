//! Around a snapshot: what stands still, who is let in again, and as whose guest.

use std::{fs, time::Duration};

use proto::envd::v1::{
    GetInfoRequest, PrepareSnapshotRequest, ProcessServiceListRequest, SendInputRequest,
    StartRequest, StdinMode,
};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::world::{SESSION, World, argv, configuration, field, sh, soon, until, why};

const OTHER: &str = "bbbbbccccccccccccccccccccc";

pub(crate) async fn prepare(world: &World) -> Result<u64, Status> {
    let answer = soon(
        world
            .system()
            .prepare_snapshot(PrepareSnapshotRequest::default()),
    )
    .await?;
    Ok(answer.into_inner().free_memory_bytes)
}

/// Configures it as this session's.
pub(crate) async fn configure(world: &World, session: &str) -> Result<(), Status> {
    let mut request = configuration();
    request.session_id = session.into();
    request.env = [("WHOSE".to_owned(), session.to_owned())].into();
    soon(world.system().configure(request)).await.map(drop)
}

async fn freezable() -> World {
    let world = World::freezable().await;
    configure(&world, SESSION).await.unwrap();
    world
}

pub(crate) async fn whose(world: &World) -> String {
    let answer = soon(world.system().get_info(GetInfoRequest {})).await;
    answer.unwrap().into_inner().info.unwrap().session_id
}

fn is_frozen(world: &World) -> bool {
    let events = fs::read_to_string(world.cgroup("user/cgroup.events")).unwrap();
    events.lines().any(|line| line == "frozen 1")
}

/// Writes a line per round and never ends.
fn counter() -> StartRequest {
    sh("n=0; while :; do n=$((n+1)); echo $n; done")
}

#[tokio::test]
async fn processes_stand_still_from_preparation_to_configure_and_lose_nothing() {
    let world = freezable().await;
    let mut counting = world.start(counter()).await;
    counting.read(10_000).await;
    assert!(prepare(&world).await.unwrap() > 0);
    assert!(is_frozen(&world));
    // What was written before is still read; then nothing comes.
    while tokio::time::timeout(Duration::from_millis(300), counting.step())
        .await
        .is_ok()
    {}
    let before = counting.seen().stdout.len();
    configure(&world, SESSION).await.unwrap();
    let text = counting.read(before + 10_000).await.to_vec();
    let text = String::from_utf8(text).unwrap();
    let (whole, _) = text.rsplit_once('\n').unwrap();
    for (line, number) in whole.lines().zip(1_u64..) {
        assert_eq!(line.parse(), Ok(number));
    }
}

#[tokio::test]
async fn every_process_is_born_into_the_cgroup_and_its_children_with_it() {
    let world = freezable().await;
    let user = world.cgroup("user");
    let (root, user) = (user.parent().unwrap().file_name(), user.file_name());
    let expected = [root, user].map(|part| part.unwrap().to_str().unwrap());
    let mut own = Vec::new();
    for script in [
        "cat /proc/self/cgroup",
        "sh -c 'sh -c \"cat /proc/self/cgroup\"'",
    ] {
        let printed = world.printed(script).await;
        let line = printed
            .lines()
            .find(|line| line.starts_with("0::"))
            .unwrap();
        let (above, name) = line.rsplit_once('/').unwrap();
        assert!(above.ends_with(&expected.join("/")), "{line}");
        own.push(name.to_owned());
    }
    assert_ne!(own[0], own[1], "each has one of its own");
    until(|| {
        fs::read_dir(world.cgroup("user"))
            .unwrap()
            .all(|entry| !entry.unwrap().path().is_dir())
    })
    .await;
}

#[tokio::test]
async fn cgroups_that_users_made_and_processes_that_left_are_frozen_too() {
    let world = freezable().await;
    let root = world.cgroup("");
    let root = root.display();
    let container = format!(
        "mkdir {root}/container && echo $$ >{root}/container/cgroup.procs && echo in && exec sleep 1000"
    );
    let mut contained = world.start(sh(&container)).await;
    contained.read(3).await;
    let escape = format!("echo $$ >{root}/cgroup.procs && echo out && exec sleep 1000");
    let mut escaped = world.start(sh(&escape)).await;
    escaped.read(4).await;
    prepare(&world).await.unwrap();
    assert_eq!(
        fs::read_to_string(world.cgroup("cgroup.procs")).unwrap(),
        ""
    );
    let events = fs::read_to_string(world.cgroup("container/cgroup.events")).unwrap();
    assert!(events.contains("populated 1\nfrozen 1"), "{events}");
    configure(&world, SESSION).await.unwrap();
    until(|| {
        let events = fs::read_to_string(world.cgroup("container/cgroup.events")).unwrap();
        events.contains("frozen 0")
    })
    .await;
}

#[tokio::test]
async fn nothing_passes_the_closed_gate_and_callers_are_told_to_come_back() {
    let world = freezable().await;
    let cat = StartRequest {
        stdin: StdinMode::Pipe.into(),
        ..argv(&["cat"])
    };
    let cat = world.start(cat).await;
    prepare(&world).await.unwrap();
    let refused = |status: Option<Status>| {
        let status = status.expect("a closed gate");
        assert_eq!(why(&status), (Code::Unavailable, "SESSION_RESUMING".into()));
        let retry = status.get_details_retry_info();
        assert!(retry.and_then(|retry| retry.retry_delay).is_some());
    };
    let path = world.text("open/written");
    refused(world.try_start(sh(&format!("touch {path}"))).await.err());
    let list = ProcessServiceListRequest::default();
    refused(soon(world.processes().list(list)).await.err());
    let input = SendInputRequest {
        process_id: cat.id().into(),
        data: "late".into(),
        ..Default::default()
    };
    refused(soon(world.processes().send_input(input)).await.err());
    assert_eq!(whose(&world).await, SESSION);
    configure(&world, SESSION).await.unwrap();
    assert_eq!(world.printed("echo hi").await, "hi\n");
    assert!(!world.path("open/written").exists());
}

#[tokio::test]
async fn a_copy_becomes_another_sessions_with_its_processes() {
    let world = freezable().await;
    let mut counting = world.start(counter()).await;
    counting.read(1000).await;
    let refusal = configure(&world, OTHER).await.unwrap_err();
    assert_eq!(
        why(&refusal),
        (Code::FailedPrecondition, "ALREADY_CONFIGURED".into())
    );
    prepare(&world).await.unwrap();
    configure(&world, OTHER).await.unwrap();
    assert_eq!(whose(&world).await, OTHER);
    assert_eq!(world.printed("echo $WHOSE").await, format!("{OTHER}\n"));
    let seen = counting.seen().stdout.len();
    counting.read(seen + 100_000).await;
    let refusal = configure(&world, SESSION).await.unwrap_err();
    assert_eq!(
        why(&refusal),
        (Code::FailedPrecondition, "ALREADY_CONFIGURED".into())
    );
}

#[tokio::test]
async fn a_configure_that_fails_leaves_the_gate_closed_and_processes_frozen() {
    let world = freezable().await;
    let mut counting = world.start(counter()).await;
    counting.read(1000).await;
    prepare(&world).await.unwrap();
    let mut bad = configuration();
    bad.entropy.clear();
    let refusal = soon(world.system().configure(bad)).await.unwrap_err();
    assert_eq!(field(&refusal), "entropy");
    assert!(is_frozen(&world));
    let refusal = world.try_start(sh("true")).await.err().unwrap();
    assert_eq!(refusal.code(), Code::Unavailable);
    configure(&world, SESSION).await.unwrap();
    assert_eq!(world.printed("echo hi").await, "hi\n");
}

#[tokio::test]
async fn a_configure_that_cannot_thaw_says_so_and_opens_nothing() {
    let world = freezable().await;
    prepare(&world).await.unwrap();
    fs::remove_dir(world.cgroup("user")).unwrap();
    let refusal = configure(&world, SESSION).await.unwrap_err();
    assert_eq!(why(&refusal), (Code::Internal, "CONFIGURE_FAILED".into()));
    assert!(refusal.message().starts_with("thaw: "), "{refusal}");
    let refusal = world.try_start(sh("true")).await.err().unwrap();
    assert_eq!(refusal.code(), Code::Unavailable);
    fs::create_dir(world.cgroup("user")).unwrap();
    configure(&world, SESSION).await.unwrap();
    assert_eq!(world.printed("echo hi").await, "hi\n");
}

#[tokio::test]
async fn a_preparation_that_fails_leaves_the_guest_running() {
    let world = freezable().await;
    let mut escaped = counter();
    let root = world.cgroup("cgroup.procs");
    escaped.shell_command = format!("echo $$ >{}; {}", root.display(), escaped.shell_command);
    let mut counting = world.start(escaped).await;
    counting.read(1000).await;
    // Beside a threaded cgroup `user` takes no process in, so the escaped one cannot be put back (cgroup-v2.rst, "Threads").
    fs::create_dir(world.cgroup("threads")).unwrap();
    fs::write(world.cgroup("threads/cgroup.type"), "threaded").unwrap();
    let refusal = prepare(&world).await.unwrap_err();
    assert_eq!(why(&refusal), (Code::Internal, "PREPARE_FAILED".into()));
    assert!(refusal.message().starts_with("freeze: "), "{refusal}");
    let seen = counting.seen().stdout.len();
    counting.read(seen + 100_000).await;
    fs::remove_dir(world.cgroup("threads")).unwrap();
    assert_eq!(world.printed("echo hi").await, "hi\n");
    prepare(&world).await.unwrap();
    assert!(is_frozen(&world));
}

#[tokio::test]
async fn a_preparation_that_cannot_be_undone_leaves_the_guest_closed() {
    let world = freezable().await;
    fs::remove_dir(world.cgroup("user")).unwrap();
    fs::remove_dir(world.cgroup("")).unwrap();
    let refusal = prepare(&world).await.unwrap_err();
    assert_eq!(why(&refusal), (Code::Internal, "PREPARE_FAILED".into()));
    assert!(
        refusal.message().contains("freeze: ") && refusal.message().contains("thaw"),
        "{refusal}"
    );
    let refusal = world.try_start(sh("true")).await.err().unwrap();
    assert_eq!(refusal.code(), Code::Unavailable);
    fs::create_dir(world.cgroup("")).unwrap();
    fs::create_dir(world.cgroup("user")).unwrap();
    configure(&world, SESSION).await.unwrap();
    assert_eq!(world.printed("echo hi").await, "hi\n");
}

#[tokio::test]
async fn preparing_again_changes_nothing() {
    let world = freezable().await;
    let _asleep = world.start(sh("sleep 1000")).await;
    for _ in 0..3 {
        prepare(&world).await.unwrap();
        assert!(is_frozen(&world));
    }
    configure(&world, SESSION).await.unwrap();
    assert!(!is_frozen(&world));
    assert_eq!(world.printed("echo hi").await, "hi\n");
}

#[tokio::test]
async fn a_templates_guest_is_prepared_before_it_is_anybodys() {
    let world = World::freezable().await;
    for _ in 0..2 {
        prepare(&world).await.unwrap();
        assert!(is_frozen(&world));
        let events = fs::read_to_string(world.cgroup("user/cgroup.events")).unwrap();
        assert!(
            events.contains("populated 0"),
            "warming leaves nothing: {events}"
        );
    }
    let refusal = world.try_start(sh("true")).await.err().unwrap();
    assert_eq!(
        why(&refusal),
        (Code::FailedPrecondition, "GUEST_NOT_CONFIGURED".into())
    );
    configure(&world, OTHER).await.unwrap();
    assert_eq!(whose(&world).await, OTHER);
    let first = world.start(sh("echo hi")).await;
    assert_eq!(first.id(), "p1", "warming is no process of the session's");
    assert_eq!(first.finish().await.stdout, b"hi\n");
}

#[tokio::test]
async fn starts_that_race_with_a_preparation_run_or_are_refused() {
    let world = freezable().await;
    for round in 0..10 {
        let starts = (0..20).map(|number| {
            let mut request = sh("echo hi");
            request.process_id = format!("p-{round}-{number}");
            let mut processes = world.processes();
            async move {
                match soon(processes.start(request)).await {
                    Ok(answer) => Some(answer.into_inner()),
                    Err(status) => {
                        assert_eq!(status.code(), Code::Unavailable, "{status}");
                        None
                    }
                }
            }
        });
        let (started, prepared) = tokio::join!(futures::future::join_all(starts), prepare(&world));
        prepared.unwrap();
        assert!(is_frozen(&world));
        configure(&world, SESSION).await.unwrap();
        for mut events in started.into_iter().flatten() {
            let mut last = None;
            while let Some(event) = soon(events.message()).await.unwrap() {
                last = event.event.unwrap().event;
            }
            assert!(
                matches!(last, Some(proto::envd::v1::process_event::Event::Exited(_))),
                "{last:?}"
            );
        }
    }
}

#[tokio::test]
async fn a_deadline_counts_no_frozen_time() {
    let world = freezable().await;
    let deadline = Duration::from_secs(1);
    let mut request = sh("echo; while :; do sleep 0.01; done");
    request.deadline = prost_types::Duration::try_from(deadline).ok();
    let mut events = world.start(request).await;
    events.read(1).await;
    prepare(&world).await.unwrap();
    // Longer than the deadline: it has to pass, there is no event to wait for.
    tokio::time::sleep(deadline * 2).await;
    configure(&world, SESSION).await.unwrap();
    let soon_after = tokio::time::timeout(deadline / 4, events.step()).await;
    assert!(soon_after.is_err(), "it ended at once: {soon_after:?}");
    let exited = events.finish().await.exited();
    assert!(exited.deadline_exceeded);
}

#[tokio::test]
async fn a_guest_without_cgroups_keeps_its_gate_all_the_same() {
    let world = World::new().await;
    prepare(&world).await.unwrap();
    let refusal = world.try_start(sh("true")).await.err().unwrap();
    assert_eq!(refusal.code(), Code::Unavailable);
    configure(&world, OTHER).await.unwrap();
    assert_eq!(whose(&world).await, OTHER);
}
