//! The guest as a whole: what it uses, and what was said.

use std::{fs, io::Write as _, time::Duration};

use futures::{StreamExt as _, stream};
use proto::envd::v1::{
    PrepareSnapshotRequest, StreamLogsRequest, StreamLogsResponse, StreamMetricsRequest,
    StreamMetricsResponse,
};
use tokio::time::Instant;
use tonic::{Code, Status, Streaming};
use tonic_types::StatusExt as _;

use crate::world::{World, argv, configuration, field, sh, soon, why};

fn every(interval: Duration) -> StreamMetricsRequest {
    StreamMetricsRequest {
        interval: Some(interval.try_into().unwrap()),
    }
}

async fn measured(world: &World, interval: Duration) -> Streaming<StreamMetricsResponse> {
    let answer = soon(world.system().stream_metrics(every(interval))).await;
    answer.unwrap().into_inner()
}

/// As it is now: the first answer does not wait for the interval.
async fn used(world: &World) -> StreamMetricsResponse {
    let mut measured = measured(world, Duration::from_hours(1)).await;
    soon(measured.message()).await.unwrap().unwrap()
}

fn cpu(used: &StreamMetricsResponse) -> Duration {
    used.cpu_time.unwrap().try_into().unwrap()
}

#[tokio::test]
async fn use_is_told_at_once_and_then_once_per_interval() {
    let world = World::new().await;
    let interval = Duration::from_millis(150);
    let mut measured = measured(&world, interval).await;
    let mut last = soon(measured.message()).await.unwrap().unwrap();
    let began = Instant::now();
    for _ in 0..4 {
        let next = soon(measured.message()).await.unwrap().unwrap();
        assert!(cpu(&next) >= cpu(&last));
        last = next;
    }
    // The first may have been underway for a while.
    assert!(began.elapsed() >= interval * 3, "{:?}", began.elapsed());
}

#[tokio::test]
async fn what_processes_do_shows() {
    let world = World::new().await;
    let before = used(&world).await;
    assert!(before.cpus > 0 && before.memory_total_bytes > before.memory_used_bytes);
    assert!(before.disk_total_bytes > before.disk_used_bytes);
    let kernel_tells = fs::read_to_string("/proc/pressure/memory").is_ok();
    assert_eq!(before.memory_pressure.is_some(), kernel_tells);
    let mut started = Vec::new();
    for _ in 0..5 {
        started.push(world.start(argv(&["sleep", "1000"])).await);
    }
    // Of its own PID namespace, where nobody else is.
    assert_eq!(used(&world).await.processes, before.processes + 5);
    let busy = "t=$(cut -d. -f1 /proc/uptime); while [ $(($(cut -d. -f1 /proc/uptime) - t)) -lt 1 ]; do :; done";
    world.run(sh(busy)).await;
    assert!(cpu(&used(&world).await) > cpu(&before));
}

#[tokio::test]
async fn an_interval_that_is_none_is_refused() {
    let world = World::new().await;
    for (seconds, nanos) in [
        (0, 0),
        (0, 99_999_999),
        (-1, 0),
        (3600, 1),
        (i64::MAX, 999_999_999),
    ] {
        let interval = Some(prost_types::Duration { seconds, nanos });
        let request = StreamMetricsRequest { interval };
        let status = soon(world.system().stream_metrics(request)).await;
        assert_eq!(field(&status.unwrap_err()), "interval");
    }
    let shortest = Duration::from_millis(100);
    drop(measured(&world, shortest).await);
}

#[tokio::test]
async fn use_and_logs_wait_for_a_guest_that_is_restored() {
    let world = World::new().await;
    let interval = Duration::from_millis(100);
    let mut measured = measured(&world, interval).await;
    prepare(&world).await;
    let resuming = (Code::Unavailable, "SESSION_RESUMING".to_owned());
    let refused = soon(world.system().stream_metrics(every(interval))).await;
    assert_eq!(why(&refused.unwrap_err()), resuming);
    assert_eq!(why(&logs(&world, 0, None).await.err().unwrap()), resuming);
    // What was there before goes on after it.
    while tokio::time::timeout(interval * 5, measured.message())
        .await
        .is_ok()
    {}
    configure(&world).await;
    soon(measured.message()).await.unwrap().unwrap();
}

async fn prepare(world: &World) {
    let prepare = PrepareSnapshotRequest::default();
    soon(world.system().prepare_snapshot(prepare))
        .await
        .unwrap();
}

async fn configure(world: &World) {
    soon(world.system().configure(configuration()))
        .await
        .unwrap();
}

async fn logs(
    world: &World,
    after_sequence: u64,
    follow: Option<bool>,
) -> Result<Streaming<StreamLogsResponse>, Status> {
    let request = StreamLogsRequest {
        after_sequence,
        follow,
    };
    let answer = soon(world.system().stream_logs(request)).await?;
    Ok(answer.into_inner())
}

/// All there is after a message.
async fn there(world: &World, after: u64) -> Vec<StreamLogsResponse> {
    let mut messages = logs(world, after, Some(false)).await.unwrap();
    let mut all = Vec::new();
    while let Some(message) = soon(messages.message()).await.unwrap() {
        all.push(message);
    }
    all
}

/// Envd says something: twice per round.
async fn talk(world: &World, rounds: usize) {
    stream::iter(0..rounds)
        .for_each(|_| async {
            prepare(world).await;
            configure(world).await;
        })
        .await;
}

fn of_envd(messages: &[StreamLogsResponse]) -> Vec<&StreamLogsResponse> {
    let of_envd = messages.iter().filter(|message| message.source == "envd");
    of_envd.collect()
}

#[tokio::test]
async fn logs_are_taken_up_after_a_message_without_loss_or_repeat() {
    let mut world = World::new().await;
    talk(&world, 3).await;
    let all = there(&world, 0).await;
    assert_eq!(of_envd(&all).len(), 7, "opened, then closed and opened");
    assert!(all.is_sorted_by(|a, b| a.sequence + b.dropped + 1 == b.sequence));
    for message in &all {
        // Whatever this machine's kernel has to say meanwhile.
        let rest = there(&world, message.sequence).await;
        assert!(rest.starts_with(after(&all, message)));
    }

    // Followed, over a connection that breaks.
    let mut seen: Vec<StreamLogsResponse> = Vec::new();
    for _ in 0..3 {
        let last = seen.last().map_or(0, |message| message.sequence);
        let mut messages = logs(&world, last, None).await.unwrap();
        talk(&world, 2).await;
        let until = there(&world, 0).await.last().unwrap().sequence;
        // Half of it, and what else has come by then is lost on the way.
        while seen.last().is_none_or(|seen| seen.sequence < until - 2) {
            seen.push(soon(messages.message()).await.unwrap().unwrap());
        }
        world.reconnect().await;
    }
    let last = seen.last().map_or(0, |message| message.sequence);
    seen.extend(there(&world, last).await);
    assert!(there(&world, 0).await.starts_with(&seen));
    assert_eq!(of_envd(&seen).len(), 7 + 3 * 4);
}

fn after<'a>(
    all: &'a [StreamLogsResponse],
    message: &StreamLogsResponse,
) -> &'a [StreamLogsResponse] {
    let index = all.partition_point(|one| one.sequence <= message.sequence);
    &all[index..]
}

#[tokio::test]
async fn a_message_is_told_as_it_is_said() {
    let world = World::new().await;
    let last = there(&world, 0).await.last().unwrap().sequence;
    let mut messages = logs(&world, last, None).await.unwrap();
    talk(&world, 1).await;
    let mut said = Vec::new();
    while of_envd(&said).len() < 2 {
        said.push(soon(messages.message()).await.unwrap().unwrap());
    }
    let said: Vec<_> = of_envd(&said)
        .iter()
        .map(|message| String::from_utf8(message.data.clone()).unwrap())
        .collect();
    assert_eq!(
        said,
        ["the gate is closed for a snapshot", "the gate is open"]
    );
}

#[tokio::test]
async fn what_the_kernels_log_has_is_told_and_nobody_passes_for_the_kernel() {
    let world = World::new().await;
    let Ok(mut kmsg) = fs::OpenOptions::new().write(true).open("/dev/kmsg") else {
        return; // A machine that keeps its kernel's log from us.
    };
    let mut messages = logs(&world, 0, None).await.unwrap();
    let text = format!("sandmesh test {} \\ \t.", std::process::id());
    // Without the newline the kernel waits for the rest.
    let line = format!("<3>{text}\n");
    kmsg.write_all(line.as_bytes()).unwrap();
    let mut kernels = 0;
    let message = loop {
        let message = soon(messages.message()).await.unwrap().unwrap();
        kernels += usize::from(message.source == "kernel");
        if message.data == text.as_bytes() {
            break message;
        }
    };
    assert_eq!((message.source.as_str(), message.severity), ("user", 3));
    assert!(kernels > 0, "the boot's");
}

#[tokio::test]
async fn a_message_that_has_not_been_is_refused_and_the_last_one_named() {
    let world = World::new().await;
    let last = there(&world, 0).await.last().unwrap().sequence;
    let asked = last + 1_000_000;
    let status = logs(&world, asked, None).await.err().unwrap();
    assert_eq!(
        why(&status),
        (Code::OutOfRange, "LOG_SEQUENCE_UNKNOWN".into())
    );
    let facts = status.get_details_error_info().unwrap().metadata;
    let told: u64 = facts["lastSequence"].parse().unwrap();
    assert!((last..asked).contains(&told));
}
