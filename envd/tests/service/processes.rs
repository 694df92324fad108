//! Processes: started once, with their user's surroundings, their end told last.

use std::{collections::BTreeMap, fs, os::unix::fs::PermissionsExt as _, time::Duration};

use bytes::Bytes;
use futures::{StreamExt as _, future::join_all, stream};
use proto::envd::v1::{
    AttachRequest, CloseInputRequest, OutputKept, ProcessInfo, ProcessServiceListRequest,
    ResourceLimits, SendInputRequest, SignalRequest, SignalTarget, StartRequest, StdinMode,
    TerminalSize,
};
use tonic::{Code, Status};

use crate::world::{
    ADA, Events, NOBODY, OPEN_FILES, TEAM, World, argv, code, configuration, field, sh, soon,
    until, why,
};

const TERM: i32 = 15;
pub(crate) const KILL: i32 = 9;

pub(crate) fn named(id: &str, request: StartRequest) -> StartRequest {
    StartRequest {
        process_id: id.into(),
        ..request
    }
}

pub(crate) fn piped(id: &str, request: StartRequest) -> StartRequest {
    StartRequest {
        stdin: StdinMode::Pipe.into(),
        ..named(id, request)
    }
}

pub(crate) fn as_user(user: &str, request: StartRequest) -> StartRequest {
    StartRequest {
        user: user.into(),
        cwd: "/".into(),
        ..request
    }
}

pub(crate) fn from(id: &str, stdout_offset: usize) -> AttachRequest {
    AttachRequest {
        process_id: id.into(),
        stdout_offset: stdout_offset as u64,
        ..AttachRequest::default()
    }
}

impl World {
    pub(crate) async fn send(
        &self,
        id: &str,
        data: &[u8],
        offset: Option<u64>,
    ) -> Result<u64, Status> {
        let request = SendInputRequest {
            process_id: id.into(),
            data: Bytes::copy_from_slice(data),
            offset,
        };
        let answer = soon(self.processes().send_input(request)).await?;
        Ok(answer.into_inner().next_offset)
    }

    pub(crate) async fn close(&self, id: &str) {
        let process_id = id.to_owned();
        let closed = soon(
            self.processes()
                .close_input(CloseInputRequest { process_id }),
        )
        .await;
        closed.unwrap();
    }

    pub(crate) async fn signal(
        &self,
        id: &str,
        signal: i32,
        target: SignalTarget,
    ) -> Result<(), Status> {
        let request = SignalRequest {
            process_id: id.into(),
            signal,
            target: target.into(),
        };
        soon(self.processes().signal(request)).await.map(drop)
    }

    pub(crate) async fn list(&self, include_finished: bool) -> Vec<ProcessInfo> {
        let request = ProcessServiceListRequest {
            include_finished,
            ..Default::default()
        };
        let answer = soon(self.processes().list(request)).await.unwrap();
        answer.into_inner().processes
    }

    /// Waits until a command in the guest succeeds.
    pub(crate) async fn until_so(&self, condition: &str) {
        self.printed(&format!("until {condition}; do sleep 0.01; done"))
            .await;
    }
}

// Ends

#[tokio::test]
async fn the_exit_says_code_or_signal() {
    let world = World::new().await;
    for expected in [0, 1, 42, 255] {
        let finished = world.run(sh(&format!("exit {expected}"))).await;
        assert_eq!((finished.code(), finished.signal()), (Some(expected), None));
    }
    for signal in [1, 6, KILL, TERM] {
        let finished = world.run(sh(&format!("kill -{signal} $$"))).await;
        assert_eq!((finished.code(), finished.signal()), (None, Some(signal)));
    }
    let exited = world
        .run(sh("i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done"))
        .await
        .exited();
    let [cpu, wall] =
        [exited.cpu_time, exited.wall_time].map(|time| Duration::try_from(time.unwrap()).unwrap());
    assert!(cpu > Duration::ZERO && wall > Duration::ZERO, "{exited:?}");
    assert!(exited.peak_memory_bytes > 100_000 && exited.end_time.is_some());
    assert!(!exited.deadline_exceeded && !exited.output_held_open && !exited.oom_killed);
}

#[tokio::test]
async fn the_exit_comes_after_the_last_byte() {
    let world = World::new().await;
    for end in ["exit 3", "kill -9 $$"] {
        for _ in 0..20 {
            let script = format!("head -c 300000 /dev/zero; head -c 70000 /dev/zero >&2; {end}");
            let finished = world.run(sh(&script)).await;
            assert_eq!(
                (finished.stdout.len(), finished.stderr.len()),
                (300_000, 70_000)
            );
            assert_eq!(
                (
                    finished.exited().stdout_bytes,
                    finished.exited().stderr_bytes
                ),
                (300_000, 70_000)
            );
            assert!(!finished.exited().output_held_open);
        }
    }
}

#[tokio::test]
async fn a_grandchild_that_keeps_the_output_open_delays_the_exit_a_moment_only() {
    let world = World::new().await;
    let began = std::time::Instant::now();
    let finished = world.run(sh("sleep 600 & echo done; exit 3")).await;
    assert_eq!(
        (finished.code(), finished.stdout.as_slice()),
        (Some(3), &b"done\n"[..])
    );
    assert!(finished.exited().output_held_open);
    assert!(
        began.elapsed() < Duration::from_secs(30),
        "{:?}",
        began.elapsed()
    );
    // It goes on: the exit of its parent is no reason to kill it.
    world.printed("grep -qx sleep /proc/[0-9]*/comm").await;
}

#[tokio::test]
async fn a_grandchild_that_never_stops_writing_does_not_keep_the_exit_back() {
    let world = World::new().await;
    // Much at once, though not more than is kept for a slow reader, or little by little.
    for writer in [
        "while :; do head -c 300000 /dev/zero; sleep 0.02; done",
        "while :; do echo y; sleep 0.1; done",
    ] {
        let finished = world.run(sh(&format!("{{ {writer}; }} & exit 3"))).await;
        assert_eq!(finished.code(), Some(3));
        assert!(finished.exited().output_held_open);
    }
}

#[tokio::test]
async fn a_deadline_ends_a_process_and_kill_follows_for_one_that_ignores_it() {
    let world = World::new().await;
    // Long enough for a shell to get going on a busy machine.
    let limited = |seconds: i64, script: &str| StartRequest {
        deadline: Some(prost_types::Duration { seconds, nanos: 0 }),
        ..sh(script)
    };
    let deaf = "trap '' TERM; printf b; while :; do sleep 0.1; done";
    let (polite, deaf, quick) = tokio::join!(
        world.run(limited(2, "printf a; sleep 600")),
        world.run(limited(2, deaf)),
        world.run(limited(50, "printf c")),
    );
    assert_eq!(
        (polite.signal(), polite.stdout.as_slice()),
        (Some(TERM), &b"a"[..])
    );
    assert_eq!(
        (deaf.signal(), deaf.stdout.as_slice()),
        (Some(KILL), &b"b"[..])
    );
    assert_eq!(
        (quick.code(), quick.stdout.as_slice()),
        (Some(0), &b"c"[..])
    );
    assert!(polite.exited().deadline_exceeded && deaf.exited().deadline_exceeded);
    assert!(!quick.exited().deadline_exceeded);
}

#[tokio::test]
async fn a_signal_is_for_the_process_or_for_its_group() {
    let world = World::new().await;
    for (target, survives) in [(SignalTarget::Process, true), (SignalTarget::Group, false)] {
        // The child says so itself, once it has no trap of the leader's any more.
        let child = "sh -c 'echo $$; exec sleep 600 > /dev/null 2>&1'";
        let script = format!("trap 'exit 9' TERM; {child} & wait");
        let mut leader = world.start(sh(&script)).await;
        while !leader.seen().stdout.ends_with(b"\n") {
            leader.step().await.unwrap();
        }
        let child = String::from_utf8(leader.seen().stdout.clone()).unwrap();
        let id = leader.id().to_owned();
        world.signal(&id, TERM, target).await.unwrap();
        assert_eq!(leader.finish().await.code(), Some(9));
        if survives {
            world.printed(&format!("kill -0 {child}")).await;
        } else {
            world.until_so(&format!("! kill -0 {}", child.trim())).await;
        }
        let status = world.signal(&id, TERM, target).await.unwrap_err();
        assert_eq!(
            why(&status),
            (Code::FailedPrecondition, "PROCESS_ENDED".into())
        );
    }
    world.start(named("there", sh("sleep 600"))).await;
    for signal in [-1, 0, 65, i32::MAX] {
        let status = world
            .signal("there", signal, SignalTarget::Process)
            .await
            .unwrap_err();
        assert_eq!(field(&status), "signal");
    }
}

/// A process that has left its parent's group and session, and says its PID.
const DAEMON: &str =
    "setsid sh -c 'echo $$; exec sleep 600 >/dev/null 2>&1 </dev/null' & wait $!; exit 3";

async fn daemon(leader: &mut Events) -> String {
    while !leader.seen().stdout.ends_with(b"\n") {
        leader.step().await.unwrap();
    }
    String::from_utf8(leader.seen().stdout.clone())
        .unwrap()
        .trim()
        .to_owned()
}

#[tokio::test]
async fn what_a_process_started_is_found_wherever_it_went() {
    let world = World::freezable().await;
    soon(world.system().configure(configuration()))
        .await
        .unwrap();
    // It outlives its parent, which is said, and is signalled though its parent has ended.
    let script = DAEMON
        .replace("wait $!; ", "until [ -s pid ]; do sleep 0.01; done; ")
        .replace("echo $$;", "echo $$ | tee pid;");
    let mut leader = world.start(named("leader", sh(&script))).await;
    let pid = daemon(&mut leader).await;
    let finished = leader.finish().await;
    assert_eq!(
        (finished.code(), finished.exited().left_running),
        (Some(3), true)
    );
    world.printed(&format!("kill -0 {pid}")).await;
    world
        .signal("leader", TERM, SignalTarget::All)
        .await
        .unwrap();
    world.until_so(&format!("! kill -0 {pid}")).await;
    until(|| {
        !world
            .cgroup("user")
            .read_dir()
            .unwrap()
            .any(|it| it.unwrap().path().is_dir())
    })
    .await;
    let status = world
        .signal("leader", TERM, SignalTarget::All)
        .await
        .unwrap_err();
    assert_eq!(
        why(&status),
        (Code::FailedPrecondition, "PROCESS_ENDED".into())
    );
    // A deadline finds it too.
    let limited = StartRequest {
        deadline: Some(prost_types::Duration {
            seconds: 2,
            nanos: 0,
        }),
        ..sh(DAEMON)
    };
    let mut leader = world.start(named("late", limited)).await;
    let pid = daemon(&mut leader).await;
    assert!(leader.finish().await.exited().deadline_exceeded);
    world.until_so(&format!("! kill -0 {pid}")).await;
    // Also what does not heed the first signal, and outlives its parent, which does.
    let limited = StartRequest {
        deadline: Some(prost_types::Duration {
            seconds: 2,
            nanos: 0,
        }),
        ..sh(&DAEMON
            .replace("sh -c 'echo", "sh -c 'trap \"\" TERM; echo")
            .replace("exec sleep 600", "while :; do sleep 0.1; done"))
    };
    let mut leader = world.start(named("deaf", limited)).await;
    let pid = daemon(&mut leader).await;
    assert!(leader.finish().await.exited().left_running);
    world.until_so(&format!("! kill -0 {pid}")).await;
}

#[tokio::test]
async fn limits_that_cannot_be_set_are_refused_not_forgotten() {
    let world = World::new().await;
    let request = StartRequest {
        limits: Some(ResourceLimits {
            pids: 5,
            ..ResourceLimits::default()
        }),
        ..argv(&["true"])
    };
    let status = world.try_start(request).await.err().unwrap();
    assert_eq!(
        why(&status),
        (Code::FailedPrecondition, "LIMITS_UNAVAILABLE".into())
    );
    assert_eq!(world.list(true).await, []);
}

// Refusals

/// As images have them whose makers gave their programs no name.
#[tokio::test]
async fn a_user_may_be_a_number_without_a_name() {
    let world = World::new().await;
    let script = "id -u; id -g; id -G; echo $HOME $USER";
    let finished = world.run(as_user("54321", sh(script))).await;
    assert_eq!(
        String::from_utf8_lossy(&finished.stdout),
        "54321\n54321\n54321\n/ 54321\n"
    );
}

#[tokio::test]
async fn what_cannot_start_says_why_and_leaves_nothing() {
    let world = World::new().await;
    let script = world.path("open/script");
    fs::write(&script, "#!/no/such/interpreter\n").unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    let script = script.to_str().unwrap().to_owned();
    let in_folder = |cwd: &str| StartRequest {
        cwd: cwd.into(),
        ..argv(&["true"])
    };
    let secret = world.text("root");
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o700)).unwrap();
    let shut_out = StartRequest {
        cwd: secret,
        ..as_user("nobody", argv(&["true"]))
    };
    for (request, code, reason) in [
        (
            argv(&["no-such-program"]),
            Code::NotFound,
            "PROGRAM_NOT_FOUND",
        ),
        (
            argv(&["/no/such/program"]),
            Code::NotFound,
            "PROGRAM_NOT_FOUND",
        ),
        (argv(&[&script]), Code::NotFound, "PROGRAM_NOT_FOUND"),
        (
            argv(&["/etc/passwd"]),
            Code::PermissionDenied,
            "PROGRAM_NOT_EXECUTABLE",
        ),
        (
            argv(&["/etc"]),
            Code::PermissionDenied,
            "PROGRAM_NOT_EXECUTABLE",
        ),
        (
            in_folder("/no/such/folder"),
            Code::NotFound,
            "CWD_NOT_FOUND",
        ),
        (in_folder("/etc/passwd"), Code::NotFound, "CWD_NOT_FOUND"),
        (in_folder("~no-such-user"), Code::NotFound, "USER_UNKNOWN"),
        (shut_out, Code::PermissionDenied, "CWD_PERMISSION_DENIED"),
        (
            as_user("no-such-user", argv(&["true"])),
            Code::NotFound,
            "USER_UNKNOWN",
        ),
        (
            as_user("4294967295", argv(&["true"])),
            Code::NotFound,
            "USER_UNKNOWN",
        ),
    ] {
        let status = world.try_start(request.clone()).await.err().unwrap();
        assert_eq!(
            why(&status),
            (code, reason.into()),
            "{request:?}: {status:?}"
        );
    }
    assert_eq!(world.list(true).await, []);
}

#[tokio::test]
async fn a_request_that_makes_no_sense_names_its_field() {
    let world = World::new().await;
    let with_env = |name: &str, value: &str| StartRequest {
        env: [(name.to_owned(), value.to_owned())].into(),
        ..argv(&["true"])
    };
    let both = StartRequest {
        argv: vec!["true".into()],
        ..sh("true")
    };
    let sized = |rows, cols| StartRequest {
        terminal: Some(TerminalSize { rows, cols }),
        ..argv(&["true"])
    };
    let limited = |memory_bytes, pids| StartRequest {
        limits: Some(ResourceLimits {
            memory_bytes,
            pids,
            cpu_millis: 0,
        }),
        ..argv(&["true"])
    };
    let kept = |memory_bytes, file_bytes| StartRequest {
        output_kept: Some(OutputKept {
            memory_bytes,
            file_bytes,
        }),
        ..argv(&["true"])
    };
    let deadline = StartRequest {
        deadline: Some(prost_types::Duration {
            seconds: -1,
            nanos: 0,
        }),
        ..argv(&["true"])
    };
    let cwd = StartRequest {
        cwd: "/\0".into(),
        ..argv(&["true"])
    };
    for (request, expected) in [
        (StartRequest::default(), "argv"),
        (both, "argv"),
        (argv(&[""]), "argv"),
        (argv(&["true", "a\0b"]), "argv"),
        (sh("true\0"), "argv"),
        (with_env("A=B", ""), "env"),
        (with_env("", ""), "env"),
        (with_env("A", "\0"), "env"),
        (cwd, "cwd"),
        (deadline, "deadline"),
        (sized(0, 80), "terminal.rows"),
        (sized(24, 4097), "terminal.cols"),
        (limited(1, 0), "limits.memory_bytes"),
        (kept(Some(1), None), "output_kept.memory_bytes"),
        (kept(None, Some(u64::MAX)), "output_kept.file_bytes"),
        (
            StartRequest {
                backpressure: 77,
                ..argv(&["true"])
            },
            "backpressure",
        ),
        (named("a/b", argv(&["true"])), "process_id"),
        (named(&"a".repeat(129), argv(&["true"])), "process_id"),
    ] {
        let status = world.try_start(request.clone()).await.err().unwrap();
        assert_eq!(field(&status), expected, "{request:?}");
    }
    assert_eq!(world.list(true).await, []);
}

#[tokio::test]
async fn a_refusal_of_something_long_still_arrives() {
    let world = World::new().await;
    let long = "ä".repeat(400_000);
    for request in [argv(&[&long]), as_user(&long, argv(&["true"]))] {
        let status = world.try_start(request).await.err().unwrap();
        assert_eq!(status.code(), Code::NotFound, "{status:?}");
        why(&status);
    }
    // And the connection is as good as before.
    assert_eq!(world.printed("echo hi").await, "hi\n");
}

// Surroundings

#[tokio::test]
async fn the_environment_is_the_logins_then_the_sessions_then_the_requests() {
    let mut session = configuration();
    session.env = [("A", "session"), ("B", "session"), ("LANG", "C")]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into();
    let world = World::configured(session).await;
    let env = async |user: &str| {
        let request = StartRequest {
            env: [("B".to_owned(), "a = \"b\"".to_owned())].into(),
            ..as_user(user, argv(&["env"]))
        };
        let text = String::from_utf8(world.run(request).await.stdout).unwrap();
        let lines = text.lines().map(|line| line.split_once('=').unwrap());
        lines
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect::<BTreeMap<_, _>>()
    };
    let expected = |user: &str, home: &str, shell: &str, path: &str| {
        [
            ("A", "session"),
            ("B", "a = \"b\""),
            ("HOME", home),
            ("LANG", "C"),
            ("LOGNAME", user),
            ("PATH", path),
            ("PWD", "/"),
            ("SHELL", shell),
            ("USER", user),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into()
    };
    // Nothing of envd's own, such as what the tests were started with, is in it.
    let roots = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    assert_eq!(
        env("root").await,
        expected("root", &world.text("root"), "/bin/sh", roots)
    );
    let users = "/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games";
    assert_eq!(
        env("nobody").await,
        expected("nobody", "/nonexistent", "/usr/sbin/nologin", users)
    );
}

#[tokio::test]
async fn a_folder_is_named_as_in_a_shell() {
    let world = World::new().await;
    fs::create_dir(world.path("root/sub")).unwrap();
    let (home, sub, ada) = (
        world.text("root"),
        world.text("root/sub"),
        world.text("ada"),
    );
    for (cwd, expected) in [
        ("", home.as_str()),
        ("~", &home),
        ("~/", &home),
        ("~/sub", &sub),
        ("~//sub", &sub),
        ("sub", &sub),
        ("sub/../sub", &sub),
        ("~ada", &ada),
        ("~ada/", &ada),
        ("/", "/"),
    ] {
        let request = StartRequest {
            cwd: cwd.into(),
            ..argv(&["sh", "-c", "pwd -P"])
        };
        let finished = world.run(request).await;
        assert_eq!(
            String::from_utf8(finished.stdout).unwrap().trim_end(),
            expected,
            "{cwd}"
        );
    }
    let logical = StartRequest {
        cwd: "~ada".into(),
        ..sh("printf %s \"$PWD\"")
    };
    assert_eq!(world.run(logical).await.stdout, ada.as_bytes());
}

#[tokio::test]
async fn a_program_is_found_as_in_a_shell() {
    let world = World::new().await;
    let tools = world.path("root/tools");
    fs::create_dir(&tools).unwrap();
    for (name, mode) in [("tool", 0o755), ("plain", 0o644)] {
        fs::write(tools.join(name), "echo $0: $1\n").unwrap();
        fs::set_permissions(tools.join(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    let path = |path: &str, words: &[&str]| StartRequest {
        env: [("PATH".to_owned(), path.to_owned())].into(),
        ..argv(words)
    };
    // Without a #! line too; absolute, relative to the working directory, by PATH.
    let absolute = world.text("root/tools/tool");
    for request in [
        argv(&[&absolute, "hi"]),
        argv(&["tools/tool", "hi"]),
        path("/no/such:tools:/bin", &["tool", "hi"]),
    ] {
        let finished = world.run(request.clone()).await;
        let text = String::from_utf8(finished.stdout).unwrap();
        assert!(text.ends_with("tool: hi\n"), "{request:?}: {text}");
    }
    let status = world
        .try_start(path("tools", &["plain"]))
        .await
        .err()
        .unwrap();
    assert_eq!(
        why(&status),
        (Code::PermissionDenied, "PROGRAM_NOT_EXECUTABLE".into())
    );
}

#[tokio::test]
async fn a_process_has_its_users_rights_and_no_more() {
    let world = World::new().await;
    let ids = async |user: &str| {
        let finished = world
            .run(as_user(user, argv(&["sh", "-c", "id -u; id -g; id -G"])))
            .await;
        String::from_utf8(finished.stdout).unwrap()
    };
    assert_eq!(ids("root").await, "0\n0\n0\n");
    assert_eq!(ids("").await, "0\n0\n0\n");
    assert_eq!(
        ids("nobody").await,
        format!("{NOBODY}\n{NOBODY}\n{NOBODY}\n")
    );
    assert_eq!(ids("65534").await, ids("nobody").await);
    assert_eq!(ids("ada").await, format!("{ADA}\n{ADA}\n{ADA} {TEAM}\n"));
    let read = world
        .run(as_user("nobody", argv(&["cat", "/etc/shadow"])))
        .await;
    assert_eq!((read.code(), read.stdout.len()), (Some(1), 0));
    let capabilities = as_user("nobody", argv(&["grep", "^CapEff", "/proc/self/status"]));
    assert_eq!(
        world.run(capabilities).await.stdout,
        b"CapEff:\t0000000000000000\n"
    );
}

#[tokio::test]
async fn a_process_inherits_neither_files_nor_blocked_signals() {
    let world = World::new().await;
    world.start(piped("other", argv(&["cat"]))).await;
    // The fourth is the folder ls reads.
    assert_eq!(world.printed("ls /proc/self/fd").await, "0\n1\n2\n3\n");
    let finished = world
        .run(argv(&["grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status"]))
        .await;
    let text = String::from_utf8(finished.stdout).unwrap();
    let masks: Vec<u64> = text
        .lines()
        .map(|line| u64::from_str_radix(line.split_whitespace().last().unwrap(), 16).unwrap())
        .collect();
    let pipe = 1 << 12;
    assert_eq!((masks[0], masks[1] & pipe), (0, 0), "{text}");
    // A session and a group of its own.
    assert_eq!(
        world
            .printed("set -- $(cat /proc/$$/stat); [ $$ = $5 ] && [ $$ = $6 ] && echo yes")
            .await,
        "yes\n"
    );
}

// Started once

#[tokio::test]
async fn starting_twice_is_starting_once() {
    let world = World::new().await;
    let request = piped("once", sh("echo started >> log; echo hello; cat"));
    let starts = join_all((0..20).map(|_| world.start(request.clone()))).await;
    let pids: Vec<u32> = starts.iter().map(|events| events.started.pid).collect();
    assert!(pids.iter().all(|pid| *pid == pids[0]), "{pids:?}");
    world.send("once", b"and more", None).await.unwrap();
    world.close("once").await;
    for finished in join_all(starts.into_iter().map(Events::finish)).await {
        assert_eq!(
            (finished.code(), finished.stdout.as_slice()),
            (Some(0), &b"hello\nand more"[..])
        );
    }
    // Also when it has ended.
    assert_eq!(world.run(request).await.stdout, b"hello\nand more");
    assert_eq!(world.printed("cat log").await, "started\n");
}

#[tokio::test]
async fn an_id_is_not_taken_over_by_another_request() {
    let world = World::new().await;
    let first = world.start(piped("mine", argv(&["cat"]))).await;
    for other in [
        named("mine", argv(&["cat"])),
        piped("mine", argv(&["cat", "-"])),
        piped("mine", as_user("nobody", argv(&["cat"]))),
    ] {
        let status = world.try_start(other).await.err().unwrap();
        assert_eq!(why(&status), (Code::AlreadyExists, "PROCESS_EXISTS".into()));
    }
    world.close("mine").await;
    assert_eq!(first.finish().await.code(), Some(0));
}

#[tokio::test]
async fn a_process_without_an_id_is_always_a_new_one() {
    let world = World::new().await;
    let request = sh("echo hi");
    let mut pids = Vec::new();
    // A client's IDs may look like those envd gives.
    for number in 1..20 {
        let chosen = named(&format!("p{number}"), request.clone());
        pids.push(world.start(chosen).await.started.pid);
    }
    for _ in 1..20 {
        pids.push(world.start(request.clone()).await.started.pid);
    }
    pids.sort_unstable();
    pids.dedup();
    assert_eq!(pids.len(), 38);
}

// Lists and waiting

#[tokio::test]
async fn running_and_finished_processes_are_listed_oldest_first() {
    let world = World::new().await;
    world.run(named("z", argv(&["true"]))).await;
    let request = piped("y", as_user("nobody", argv(&["cat", "-"])));
    let cat = world.start(request).await;
    world.run(named("x", sh("exit 3"))).await;
    let ids = |list: &[ProcessInfo]| {
        list.iter()
            .map(|info| info.process_id.clone())
            .collect::<Vec<_>>()
    };
    let running = world.list(false).await;
    assert_eq!(ids(&running), ["y"]);
    let info = &running[0];
    assert_eq!(
        (info.pid, info.start_time),
        (cat.started.pid, cat.started.start_time)
    );
    assert_eq!(
        (info.argv.as_slice(), info.cwd.as_str(), info.user.as_str()),
        (&["cat".to_owned(), "-".into()][..], "/", "nobody")
    );
    assert_eq!(info.exited, None);
    let all = world.list(true).await;
    assert_eq!(ids(&all), ["z", "y", "x"]);
    assert_eq!(
        (
            code(all[0].exited.as_ref().unwrap()),
            code(all[2].exited.as_ref().unwrap()),
        ),
        (Some(0), Some(3))
    );
}

#[tokio::test]
async fn pages_give_each_process_once_while_others_end() {
    let world = World::new().await;
    for number in 0..7 {
        world
            .start(piped(&format!("c{number}"), argv(&["cat"])))
            .await;
    }
    let mut seen = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = ProcessServiceListRequest {
            include_finished: false,
            page_size: 2,
            page_token,
        };
        let page = soon(world.processes().list(request))
            .await
            .unwrap()
            .into_inner();
        assert!(page.processes.len() <= 2);
        for info in page.processes {
            world.close(&info.process_id).await;
            world.wait(&info.process_id).await.unwrap();
            seen.push(info.process_id);
        }
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!(seen, ["c0", "c1", "c2", "c3", "c4", "c5", "c6"]);
    let request = ProcessServiceListRequest {
        page_token: "no".into(),
        ..Default::default()
    };
    let status = soon(world.processes().list(request)).await.unwrap_err();
    assert_eq!(field(&status), "page_token");
}

#[tokio::test]
async fn waiting_gives_the_exit_to_all_who_wait_also_afterwards() {
    let world = World::new().await;
    let cat = world.start(piped("cat", sh("cat; exit 5"))).await;
    let waiting = join_all((0..10).map(|_| world.wait("cat")));
    let (waited, ()) = tokio::join!(waiting, world.close("cat"));
    let exited = cat.finish().await.exited();
    assert_eq!(code(&exited), Some(5));
    assert!(waited.into_iter().all(|waited| waited.unwrap() == exited));
    assert_eq!(world.wait("cat").await.unwrap(), exited);
    let status = world.wait("no-such").await.unwrap_err();
    assert_eq!(why(&status), (Code::NotFound, "PROCESS_UNKNOWN".into()));
}

// Many

#[tokio::test]
async fn two_thousand_short_processes_leave_no_zombie_and_no_open_file() {
    let world = World::new().await;
    let zombies = "! grep -qs '^State:.Z' /proc/[0-9]*/status";
    let before = world.printed(OPEN_FILES).await;
    // What was printed is kept.
    let before: u32 = before.trim().parse::<u32>().unwrap() + 1;
    let codes: Vec<(i32, Option<i32>)> = stream::iter(0..2000)
        .map(|number| {
            let world = &world;
            async move {
                let expected = number % 256;
                (
                    expected,
                    world.run(sh(&format!("exit {expected}"))).await.code(),
                )
            }
        })
        .buffer_unordered(16)
        .collect()
        .await;
    assert_eq!(codes.len(), 2000);
    assert!(
        codes
            .into_iter()
            .all(|(expected, code)| code == Some(expected))
    );
    world.until_so(zombies).await;
    world
        .until_so(&format!("[ $({OPEN_FILES}) -le {before} ]"))
        .await;
    // The keeper may not have read of the last ones.
    world.printed("[ $(ls /proc/1/fd | wc -l) -le 100 ]").await;
    // The oldest are forgotten, the newest are not.
    let remembered = world.list(true).await.len();
    assert!((500..2000).contains(&remembered), "{remembered}");
}

#[tokio::test]
async fn orphans_are_collected_too() {
    let world = World::new().await;
    let script = "i=0; while [ $i -lt 200 ]; do i=$((i+1)); (sleep 0 &) ; done";
    assert_eq!(world.run(sh(script)).await.code(), Some(0));
    world
        .until_so("! grep -qs '^State:.Z' /proc/[0-9]*/status")
        .await;
}

#[tokio::test]
async fn two_hundred_processes_at_once_each_keep_to_themselves() {
    let world = World::new().await;
    let ids: Vec<String> = (0..200).map(|number| format!("cat-{number}")).collect();
    let cats = join_all(
        ids.iter()
            .map(|id| world.start(piped(id, sh("cat; cat >&2")))),
    )
    .await;
    assert_eq!(world.list(false).await.len(), 200);
    join_all(ids.iter().map(async |id| {
        let text = id.repeat(1000);
        world.send(id, text.as_bytes(), None).await.unwrap();
        world.close(id).await;
    }))
    .await;
    for (finished, id) in join_all(cats.into_iter().map(Events::finish))
        .await
        .iter()
        .zip(&ids)
    {
        assert!(finished.stdout == id.repeat(1000).as_bytes() && finished.stderr.is_empty());
        assert_eq!(finished.code(), Some(0));
    }
    assert_eq!(world.list(false).await, []);
}

/// Resident memory of envd, keeper and daemon, and of the files in memory that it has, in KiB.
async fn memory(world: &World) -> u64 {
    let script = "daemon=$(cut -d' ' -f1 /proc/1/task/1/children); \
                  { grep -h VmRSS /proc/1/status /proc/$daemon/status | tr -dc '0-9\\n'; \
                  for fd in /proc/1/fd/*; do case $(readlink $fd) in /memfd:*) \
                  echo $(($(stat -L -c %b $fd) / 2));; esac; done; }";
    let printed = world.printed(script).await;
    printed
        .lines()
        .map(|line| line.parse::<u64>().unwrap())
        .sum()
}

#[tokio::test]
async fn output_of_many_small_writes_costs_little_more_than_its_bytes() {
    let world = World::new().await;
    let before = memory(&world).await;
    let script = "i=0; while [ $i -lt 30000 ]; do i=$((i+1)); echo $i; done";
    world.run(named("small", sh(script))).await;
    let grown = memory(&world).await.saturating_sub(before);
    assert!(grown < 20 << 10, "{grown} KiB for 170 KB of output");
}

#[tokio::test]
async fn the_output_of_finished_processes_is_let_go_before_it_fills_the_guest() {
    let world = World::new().await;
    let before = memory(&world).await;
    for number in 0..90 {
        let request = named(
            &format!("p-{number}"),
            argv(&["head", "-c", "1000000", "/dev/zero"]),
        );
        world.run(request).await;
    }
    let grown = memory(&world).await.saturating_sub(before);
    assert!(grown < 60 << 10, "{grown} KiB of 90 MB are kept");
    // How they ended is remembered all the same.
    let status = world.attach(from("p-0", 0)).await.err().unwrap();
    assert_eq!(why(&status), (Code::OutOfRange, "OUTPUT_GONE".into()));
    assert_eq!(world.wait("p-0").await.unwrap().stdout_bytes, 1_000_000);
    assert_eq!(
        world
            .attach(from("p-89", 0))
            .await
            .unwrap()
            .finish()
            .await
            .stdout
            .len(),
        1_000_000
    );
}

#[tokio::test]
async fn a_pid_that_is_used_again_is_not_taken_for_the_one_before() {
    let world = World::new().await;
    // The first process has ended, but is waited for, since something it left holds its output open.
    let first = world.start(sh("setsid sleep 600 & exit 0")).await;
    let pid = first.started.pid;
    let gone = format!("[ ! -e /proc/{pid} ]");
    world.until_so(&gone).await;
    let next = format!("echo {} > /proc/sys/kernel/ns_last_pid", pid - 1);
    let mut tries = 0;
    let second = loop {
        assert_eq!(world.run(argv(&["sh", "-c", &next])).await.code(), Some(0));
        let second = world.start(piped("", sh("read go; exit 7"))).await;
        if second.started.pid == pid {
            break second;
        }
        // A thread of envd may have taken it.
        tries += 1;
        assert!(tries < 10, "{} is not {pid}", second.started.pid);
    };
    assert!(first.finish().await.exited().output_held_open);
    world.send(second.id(), b"\n", None).await.unwrap();
    assert_eq!(second.finish().await.code(), Some(7));
}
