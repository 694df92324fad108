//! The daemon is killed, and another takes its place: what it had to do with goes on, and nothing is lost or done twice.

use std::{fs, time::Duration};

use futures::future::join_all;
use proto::envd::v1::{
    GetInfoRequest, ResizeRequest, SignalTarget, StartRequest, StreamLogsRequest,
    StreamLogsResponse, TerminalSize,
};
use tonic::Code;

use crate::{
    processes::{KILL, from, named, piped},
    snapshots::{configure, prepare, whose},
    world::{Events, SESSION, World, configuration, noise, sh, soon, until, why},
};

/// Waits until something was written, as the daemon has taken it.
async fn seen(events: &mut Events, wanted: &str) {
    while !String::from_utf8_lossy(&events.seen().stdout).contains(wanted) {
        assert!(events.step().await.unwrap(), "{wanted:?} does not come");
    }
}

#[tokio::test]
async fn what_runs_goes_on_with_all_it_has_written_and_how_it_ends_is_known() {
    let mut world = World::freezable().await;
    configure(&world, SESSION).await.unwrap();
    let gate = world.text("open/gate");
    let script = format!(
        "echo before; echo mistake >&2; until [ -e {gate} ]; do sleep 0.01; done; echo after; exit 7"
    );
    let request = named("long", sh(&script));
    let mut events = world.start(request.clone()).await;
    seen(&mut events, "before").await;
    let pid = events.started.pid;
    for _ in 0..3 {
        world.crash().await;
        // Asked for again it is the one there is.
        let mut again = world.start(request.clone()).await;
        assert_eq!(again.started.pid, pid);
        assert_eq!(again.started.start_time, events.started.start_time);
        seen(&mut again, "before").await;
    }
    let other = world
        .try_start(named("long", sh("true")))
        .await
        .err()
        .unwrap();
    assert_eq!(why(&other), (Code::AlreadyExists, "PROCESS_EXISTS".into()));
    let listed = world.list(false).await;
    assert_eq!(listed.len(), 1);
    assert_eq!(
        (listed[0].process_id.as_str(), listed[0].pid),
        ("long", pid)
    );
    fs::write(&gate, "").unwrap();
    let finished = world.attach(from("long", 0)).await.unwrap().finish().await;
    assert_eq!(finished.stdout, b"before\nafter\n");
    assert_eq!(finished.stderr, b"mistake\n");
    assert_eq!(finished.code(), Some(7));
    assert!(!finished.exited().left_running);

    // And when it has ended, so it stays.
    let before = world.wait("long").await.unwrap();
    world.crash().await;
    assert_eq!(world.wait("long").await.unwrap(), before);
    let finished = world.start(request).await.finish().await;
    assert_eq!(finished.stdout, b"before\nafter\n");
    assert_eq!(finished.exited(), before);
    assert_eq!(world.list(true).await.len(), 1);
}

#[tokio::test]
async fn a_process_that_ends_while_there_is_no_daemon_is_not_forgotten() {
    let mut world = World::new().await;
    for round in 0..5 {
        let gate = world.text(&format!("open/{round}"));
        let ids: Vec<String> = (0..20).map(|number| format!("{round}-{number}")).collect();
        for (number, id) in ids.iter().enumerate() {
            let script = format!(
                "until [ -e {gate} ]; do sleep 0.001; done; echo {number}; [ {number} != 3 ] || kill -9 $$; exit {number}"
            );
            world.start(named(id, sh(&script))).await;
        }
        // They end while it dies, and while the next one begins.
        fs::write(&gate, "").unwrap();
        world.crash().await;
        for (number, id) in ids.iter().enumerate() {
            let finished = world.attach(from(id, 0)).await.unwrap().finish().await;
            assert_eq!(finished.stdout, format!("{number}\n").as_bytes());
            if number == 3 {
                assert_eq!(finished.signal(), Some(KILL));
            } else {
                assert_eq!(finished.code(), Some(number as i32));
            }
        }
    }
    assert_eq!(world.list(false).await, []);
    world
        .until_so("! grep -qs '^State:.Z' /proc/[0-9]*/status")
        .await;
}

#[tokio::test]
async fn no_byte_is_lost_or_counted_twice_however_often_it_is_killed() {
    const SIZE: usize = 24 << 20;
    let mut world = World::new().await;
    let bytes = noise(SIZE);
    fs::write(world.path("open/noise"), &bytes).unwrap();
    let file = world.text("open/noise");
    // In pieces of odd sizes, to both at once.
    let script =
        format!("dd if={file} bs=3001 status=none & dd if={file} bs=70001 status=none >&2; wait");
    let request = named("noise", sh(&script));
    let mut events = world.start(request.clone()).await;
    let mut crashes = 0;
    let finished = loop {
        let mut taken = 0;
        let broken = loop {
            match events.step().await {
                Ok(true) => taken += 1,
                Ok(false) => break false,
                Err(_) => break true,
            }
            if taken == 7 && crashes < 4 {
                crashes += 1;
                world.crash().await;
            }
        };
        if !broken {
            break events.finish().await;
        }
        events = world.attach(from("noise", 0)).await.unwrap();
    };
    assert_eq!(crashes, 4);
    assert!(finished.stdout == bytes && finished.stderr == bytes);
    assert_eq!(finished.exited().stdout_bytes, SIZE as u64);
    assert_eq!(finished.exited().stderr_bytes, SIZE as u64);
}

#[tokio::test]
async fn input_goes_on_where_it_was_and_its_end_arrives() {
    let mut world = World::new().await;
    let file = world.text("open/file");
    world
        .start(piped("cat", sh(&format!("cat > {file}; echo done"))))
        .await;
    let bytes = noise(3 << 20);
    let mut sent = 0;
    for piece in bytes.chunks(700_001) {
        sent = world.send("cat", piece, Some(sent)).await.unwrap();
        world.crash().await;
        // Sent again, as by one who has not heard the answer.
        let again = sent - piece.len() as u64;
        assert_eq!(world.send("cat", piece, Some(again)).await.unwrap(), sent);
    }
    world.close("cat").await;
    let finished = world.attach(from("cat", 0)).await.unwrap().finish().await;
    assert_eq!(finished.stdout, b"done\n");
    assert!(fs::read(&file).unwrap() == bytes);
}

#[tokio::test]
async fn a_terminal_stays_open_and_is_typed_into() {
    let mut world = World::new().await;
    let size = TerminalSize { rows: 30, cols: 90 };
    let request = StartRequest {
        terminal: Some(size),
        ..named(
            "sh",
            sh("echo ready; while read -r line; do echo \"<$line> $(stty size)\"; done; exit 3"),
        )
    };
    let mut events = world.start(request).await;
    seen(&mut events, "ready").await;
    let size = TerminalSize { rows: 31, cols: 91 };
    let resized = ResizeRequest {
        process_id: "sh".into(),
        size: Some(size),
    };
    soon(world.processes().resize(resized)).await.unwrap();
    let mut sent = 0;
    for round in 0..3 {
        world.crash().await;
        let line = format!("line {round}\n");
        sent = world.send("sh", line.as_bytes(), Some(sent)).await.unwrap();
        let mut events = world.attach(from("sh", 0)).await.unwrap();
        seen(&mut events, &format!("<line {round}> 31 91")).await;
        let said = String::from_utf8(events.seen().stdout.clone()).unwrap();
        assert_eq!(said.matches("ready").count(), 1);
        assert_eq!(said.matches("> 31 91").count(), round + 1);
    }
    assert_eq!(world.list(false).await[0].terminal, Some(size));
    world.close("sh").await;
    let finished = world.attach(from("sh", 0)).await.unwrap().finish().await;
    assert_eq!(finished.code(), Some(3));
}

#[tokio::test]
async fn signals_deadlines_and_what_a_process_has_started_are_as_before() {
    let mut world = World::freezable().await;
    configure(&world, SESSION).await.unwrap();
    let late = StartRequest {
        deadline: Some(prost_types::Duration {
            seconds: 1,
            nanos: 0,
        }),
        ..named("late", sh("exec sleep 1000"))
    };
    world.start(late).await;
    world.start(named("one", sh("exec sleep 1000"))).await;
    let script = "setsid sleep 1000 & setsid sleep 1001 & echo started; sleep 1002";
    let mut many = world.start(named("many", sh(script))).await;
    seen(&mut many, "started").await;
    world.crash().await;
    world
        .signal("one", 15, SignalTarget::Process)
        .await
        .unwrap();
    let one = world.wait("one").await.unwrap();
    assert_eq!(
        one.status,
        Some(proto::envd::v1::process_exited::Status::Signal(15))
    );
    world.signal("many", KILL, SignalTarget::All).await.unwrap();
    let many = world.wait("many").await.unwrap();
    assert!(!many.left_running || world.signal("many", KILL, SignalTarget::All).await.is_err());
    let late = world.wait("late").await.unwrap();
    assert!(late.deadline_exceeded);
    // Their cgroups are gone, and so is whoever was in them.
    let user = world.cgroup("user");
    until(|| {
        let entries = fs::read_dir(&user).unwrap();
        entries.flatten().all(|entry| !entry.path().is_dir())
    })
    .await;
}

#[tokio::test]
async fn whose_guest_it_is_stays_and_so_does_a_closed_gate() {
    let mut request = configuration();
    request.env.insert("KEPT".into(), "yes".into());
    let mut world = World::freezable().await;
    soon(world.system().configure(request)).await.unwrap();
    world.crash().await;
    assert_eq!(whose(&world).await, SESSION);
    let info = soon(world.system().get_info(GetInfoRequest {})).await;
    assert_eq!(info.unwrap().into_inner().info.unwrap().envd_restarts, 1);
    assert_eq!(world.printed("echo $KEPT").await, "yes\n");
    world.start(named("asleep", sh("exec sleep 1000"))).await;
    prepare(&world).await.unwrap();
    world.crash().await;
    let refusal = world.try_start(sh("true")).await.err().unwrap();
    assert_eq!(why(&refusal).1, "SESSION_RESUMING");
    configure(&world, SESSION).await.unwrap();
    world
        .signal("asleep", 15, SignalTarget::Process)
        .await
        .unwrap();
    world.wait("asleep").await.unwrap();

    let mut nobodys = World::closed().await;
    nobodys.crash().await;
    let refusal = nobodys.try_start(sh("true")).await.err().unwrap();
    assert_eq!(why(&refusal).1, "GUEST_NOT_CONFIGURED");
}

async fn logs(world: &World) -> Vec<StreamLogsResponse> {
    let request = StreamLogsRequest {
        after_sequence: 0,
        follow: Some(false),
    };
    let answer = soon(world.system().stream_logs(request)).await.unwrap();
    let mut answer = answer.into_inner();
    let mut all = Vec::new();
    while let Some(message) = soon(answer.message()).await.unwrap() {
        all.push(message);
    }
    all
}

#[tokio::test]
async fn the_log_goes_on_with_its_numbers_and_says_what_is_lost() {
    let mut world = World::new().await;
    let before = logs(&world).await;
    let last = before.last().unwrap();
    let was_kernel = |message: &&StreamLogsResponse| message.source == "kernel";
    world.crash().await;
    let after = logs(&world).await;
    let first = &after[0];
    assert_eq!(first.dropped, first.sequence - 1);
    assert!(first.sequence > last.sequence);
    let text = String::from_utf8_lossy(&first.data);
    assert!(text.contains("the daemon died"), "{text}");
    // What the kernel had said is not said again.
    let kernel = before.iter().rfind(was_kernel);
    assert!(
        after
            .iter()
            .filter(was_kernel)
            .all(|message| Some(&message.data) != kernel.map(|kernel| &kernel.data))
    );
}

#[tokio::test]
async fn what_was_asked_for_many_times_over_has_run_once() {
    let mut world = World::new().await;
    let log = world.text("open/log");
    for round in 0..6 {
        let starts = (0..20).map(|number| {
            let id = format!("{round}-{number}");
            let request = named(&id, sh(&format!("echo {id} >> {log}")));
            let mut processes = world.processes();
            async move {
                // The answer may not come.
                let _ = processes.start(request).await;
            }
        });
        let starts = tokio::spawn(join_all(starts.collect::<Vec<_>>()));
        tokio::time::sleep(Duration::from_millis(3 * round)).await;
        world.crash().await;
        starts.await.unwrap();
        for number in 0..20 {
            let id = format!("{round}-{number}");
            let request = named(&id, sh(&format!("echo {id} >> {log}")));
            let finished = world.run(request).await;
            // The one that was just being started was ended.
            assert!(
                finished.code() == Some(0) || finished.signal() == Some(KILL),
                "{finished:?}"
            );
        }
    }
    let lines = fs::read_to_string(&log).unwrap();
    let mut lines: Vec<&str> = lines.lines().collect();
    let count = lines.len();
    lines.sort_unstable();
    lines.dedup();
    assert_eq!(lines.len(), count, "one ran twice");
    assert!(count >= 6 * 19, "{count}");
}

#[tokio::test]
async fn a_daemon_that_dies_again_and_again_takes_the_guest_with_it() {
    let mut world = World::new().await;
    world.crash_for_good().await;
}
