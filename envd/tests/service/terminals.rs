//! Processes with a terminal: what a program sees that is used by hand.

use proto::envd::v1::{
    OutputStream, ResizeRequest, StartRequest, TerminalSize, process_event::Event,
};
use tonic::{Code, Status};

use crate::{
    processes::named,
    world::{Events, World, argv, field, sh, soon, why},
};

const SIZE: TerminalSize = TerminalSize {
    rows: 30,
    cols: 100,
};

fn at_terminal(id: &str, request: StartRequest) -> StartRequest {
    StartRequest {
        terminal: Some(SIZE),
        ..named(id, request)
    }
}

/// Reads until the screen says so.
async fn shows(events: &mut Events, wanted: &str) {
    while !String::from_utf8_lossy(&events.seen().stdout).contains(wanted) {
        let seen = String::from_utf8_lossy(&events.seen().stdout).into_owned();
        assert!(
            events.step().await.unwrap(),
            "{wanted:?} is not in {seen:?}"
        );
    }
}

async fn resize(world: &World, id: &str, size: Option<TerminalSize>) -> Result<(), Status> {
    let process_id = id.to_owned();
    let mut processes = world.processes();
    let resized = processes.resize(ResizeRequest { process_id, size });
    soon(resized).await.map(drop)
}

#[tokio::test]
async fn a_program_sees_a_terminal_of_its_own_and_its_size() {
    let world = World::new().await;
    let script = "tty; stty size; echo $TERM; test -t 0 && test -t 1 && test -t 2 && ps -o tty= -p $$; stty -a | grep -o iutf8";
    let finished = world.run(at_terminal("a", sh(script))).await;
    let said = String::from_utf8(finished.stdout.clone()).unwrap();
    let lines: Vec<&str> = said.split("\r\n").collect();
    assert_eq!(lines[1..3], ["30 100", "xterm-256color"], "{said}");
    assert_eq!(format!("/dev/{}", lines[3]), lines[0], "it controls it");
    assert_eq!(lines[4], "iutf8");
    assert_eq!(finished.exited().stderr_bytes, 0);
    let own = StartRequest {
        env: [("TERM".to_owned(), "dumb".to_owned())].into(),
        ..at_terminal("b", sh("echo $TERM"))
    };
    assert_eq!(world.run(own).await.stdout, b"dumb\r\n");
    // Its bytes are told from those of a pipe.
    let mut stream = world
        .processes()
        .start(at_terminal("c", sh("echo c")))
        .await
        .unwrap()
        .into_inner();
    loop {
        let event = soon(stream.message())
            .await
            .unwrap()
            .unwrap()
            .event
            .unwrap()
            .event;
        if let Some(Event::Output(output)) = event {
            assert_eq!(output.stream(), OutputStream::Terminal);
            break;
        }
    }
}

#[tokio::test]
async fn a_new_size_is_told_at_once() {
    let world = World::new().await;
    let script = "trap 'stty size' WINCH; echo ready; while :; do sleep 0.05; done";
    let mut events = world.start(at_terminal("a", sh(script))).await;
    shows(&mut events, "ready").await;
    let wide = TerminalSize { rows: 5, cols: 200 };
    resize(&world, "a", Some(wide)).await.unwrap();
    shows(&mut events, "5 200").await;
    assert_eq!(world.list(false).await[0].terminal, Some(wide));
    for (size, name) in [
        (None, "size"),
        (Some(TerminalSize { rows: 0, cols: 0 }), "size.rows"),
        (Some(TerminalSize { rows: 1, cols: 0 }), "size.cols"),
    ] {
        assert_eq!(field(&resize(&world, "a", size).await.unwrap_err()), name);
    }
    world.start(named("pipes", argv(&["sleep", "600"]))).await;
    let status = resize(&world, "pipes", Some(SIZE)).await.unwrap_err();
    assert_eq!(
        why(&status),
        (Code::FailedPrecondition, "NO_TERMINAL".into())
    );
    world.run(at_terminal("over", sh("true"))).await;
    let status = resize(&world, "over", Some(SIZE)).await.unwrap_err();
    assert_eq!(
        why(&status),
        (Code::FailedPrecondition, "PROCESS_ENDED".into())
    );
}

#[tokio::test]
async fn keys_do_what_they_do_at_a_terminal() {
    let world = World::new().await;
    // No argv at all is a login shell.
    let mut shell = world
        .start(at_terminal("shell", StartRequest::default()))
        .await;
    world.send("shell", b"echo [$0]\n", None).await.unwrap();
    shows(&mut shell, "[-sh]").await;
    // What is typed is shown, and erased.
    world
        .send("shell", b"echo ab\x7fc[d]\n", None)
        .await
        .unwrap();
    shows(&mut shell, "ac[d]").await;
    // Ctrl-C ends the program in front, not the shell; a job goes on behind it.
    world
        .send(
            "shell",
            b"set -m; sleep 600 & echo [job]; sleep 601; echo [$?]\n",
            None,
        )
        .await
        .unwrap();
    shows(&mut shell, "[job]").await;
    world.until_so("pgrep -f '[s]leep 601'").await;
    world.send("shell", b"\x03", None).await.unwrap();
    world.until_so("! pgrep -f '[s]leep 601'").await;
    world
        .send("shell", b"\necho [still $((40+2))]\n", None)
        .await
        .unwrap();
    shows(&mut shell, "[still 42]").await;
    world.printed("pgrep -f '[s]leep 600'").await;
    // The end of input is a key too.
    world.close("shell").await;
    assert_eq!(
        shell.finish().await.code(),
        Some(130).filter(|_| false).or(Some(0))
    );
}

#[tokio::test]
async fn what_is_left_at_a_terminal_that_hangs_up_hears_it() {
    let world = World::new().await;
    let script = "(trap 'echo hung > hung; exit' HUP; echo [on]; while :; do sleep 0.05; done) & until [ -e go ]; do sleep 0.01; done";
    let mut events = world.start(at_terminal("a", sh(script))).await;
    shows(&mut events, "[on]").await;
    world.printed("touch go").await;
    let finished = events.finish().await;
    assert_eq!(finished.code(), Some(0));
    world.until_so("[ -s hung ]").await;
}

#[tokio::test]
async fn a_megabyte_goes_through_a_terminal_unharmed() {
    let world = World::new().await;
    let mut cat = world
        .start(at_terminal(
            "cat",
            sh("stty raw -echo; echo ready; exec cat"),
        ))
        .await;
    shows(&mut cat, "ready").await;
    let before = cat.seen().stdout.len();
    let all: Vec<u8> = (0..1_000_000_u32).map(|n| (n ^ (n >> 8)) as u8).collect();
    let sending = async {
        for part in all.chunks(100_000) {
            world.send("cat", part, None).await.unwrap();
        }
    };
    let reading = async { cat.read(before + all.len()).await[before..].to_vec() };
    let ((), read) = tokio::join!(sending, reading);
    assert!(read == all);
}
