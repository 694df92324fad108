//! What a person does at a terminal, and what the screen shows: `sandmesh shell`, `exec -t`, `attach`, with programs that use one.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::net::TcpListener;

use e2e::{Mesh, Screen};
use sdk::Command;

/// Ends of lines are marked by the shell itself, so that what was typed is not taken for what was said.
const PROMPT: &str = "PS1='in> '; PS2=''";

fn shell(mesh: &Mesh, id: &str) -> Screen {
    let screen = Screen::open(mesh, 100, 30);
    screen.enters(&format!("sandmesh shell {id}; echo \"code: $?\""));
    screen.enters(PROMPT);
    screen.shows("in>");
    screen
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shell_is_as_one_by_ssh() {
    let mesh = Mesh::start(&["--separate"]);
    let session = mesh.session().await;
    let id = &session.session_id;
    let screen = shell(&mesh, id);

    // Who and where one is, and how large the terminal is, also when that changes.
    screen.enters("echo \"$USER $PWD $(stty size) $TERM ${-//[^i]/}\" | sed 's/^/said: /'");
    assert_eq!(
        screen.shows("said: "),
        "user /home/user 30 100 xterm-256color i"
    );
    screen.resizes(90, 25);
    screen.enters("clear; stty size | sed 's/^/size: /'");
    assert_eq!(screen.shows("size: "), "25 90");

    // Ctrl-C ends what is in front, and only that.
    // It says so itself: before it is in front, the key would be the shell's.
    screen.enters("clear; sh -c 'echo sleeping; exec sleep 1000'");
    screen.shows("sleeping");
    screen.presses("C-c");
    screen.shows("in>");
    screen.enters("echo \"after: $?\"");
    assert_eq!(screen.shows("after: "), "130");

    // Programs that draw.
    screen.enters("clear; vi -u NONE -c 'set noswapfile' poem");
    screen.types("iroses – are red");
    screen.shows("roses – are red");
    screen.presses("Escape");
    screen.enters(":wq");
    // What is typed too early is for the program that ends.
    screen.shows("in>");
    screen.enters("clear; sed 's/^/poem: /' poem");
    assert_eq!(screen.shows("poem: "), "roses – are red");
    screen.enters("clear; seq 1 1000 | less");
    screen.shows("1");
    screen.types("G");
    screen.shows("1000");
    screen.types("q");
    screen.shows("in>");
    screen.enters("clear; top");
    screen.shows("top - ");
    screen.types("q");
    screen.shows("in>");

    // Much at once, and the end of it in order.
    screen.enters("clear; head -c 10000000 /dev/zero | base64; echo \"over: $?\"");
    assert_eq!(screen.shows("over: "), "0");

    // Left, it goes on, and is there again.
    screen.enters("clear; marker=mine");
    screen.presses("Enter");
    screen.types("~.");
    screen.shows("sandmesh: left; it goes on as process ");
    let left = screen.shows("sandmesh: left; it goes on as process ");
    screen.enters(&format!(
        "clear; sandmesh attach --now {id} {left}; echo \"code: $?\""
    ));
    screen.presses("Enter");
    screen.shows("in>");
    screen.enters("echo \"marker: $marker\"");
    assert_eq!(screen.shows("marker: "), "mine");

    // Its end is the shell's.
    screen.enters("clear; exit 7");
    assert_eq!(screen.shows("code: "), "7");
    screen.enters(&format!(
        "clear; sandmesh ps -a {id} | grep -c 'exit 7' | sed 's/^/ended: /'"
    ));
    assert_eq!(screen.shows("ended: "), "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shell_outlives_the_network_and_draws_nothing_twice() {
    let mesh = Mesh::start(&["--separate"]);
    let session = mesh.session().await;
    let screen = shell(&mesh, &session.session_id);
    screen.enters("clear; until [ -e over ]; do n=$((n+1)); echo \"line $n\"; sleep 0.1; done; echo \"all: $n\"");
    screen.shows("line 5");
    mesh.crash("envoy");
    mesh.crash("node");
    // A key that is pressed while nobody may be there is not lost.
    screen.types("echo pressed");
    screen.shows("line 40");
    let sandbox = mesh.client().sandbox(&session).unwrap();
    let end = std::time::Instant::now() + std::time::Duration::from_mins(1);
    while let Err(error) = sandbox.run(["touch", "/home/user/over"]).await {
        assert!(std::time::Instant::now() < end, "{error}");
    }
    let count: usize = screen.shows("all: ").parse().unwrap();
    screen.presses("Enter");
    screen.shows("pressed");
    let history = screen.history();
    let drawn: Vec<usize> = history
        .lines()
        .filter_map(|line| {
            // The key's echo is in the middle of a line.
            let number = line.split("line ").nth(1)?;
            let digits: String = number.chars().take_while(char::is_ascii_digit).collect();
            digits.parse().ok()
        })
        .collect();
    let last = drawn.len();
    let wanted: Vec<usize> = (count + 1 - last..=count).collect();
    assert_eq!(drawn, wanted, "{history}");
    assert!(last > 20);
    screen.enters("exit");
    assert_eq!(screen.shows("code: "), "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_are_run_found_and_ended() {
    let mesh = Mesh::start(&[]);
    let session = mesh.session().await;
    let id = &session.session_id;
    let screen = Screen::open(&mesh, 160, 30);
    screen.enters(&format!(
        "sandmesh exec -t {id} -- sh -c 'stty size | sed s/^/size:\\ /; exit 4'; echo \"code: $?\""
    ));
    assert_eq!(screen.shows("size: "), "30 160");
    assert_eq!(screen.shows("code: "), "4");
    screen.enters(&format!(
        "clear; echo typed | sandmesh exec {id} -- cat | sed 's/^/got: /'"
    ));
    assert_eq!(screen.shows("got: "), "typed");
    screen.enters(&format!("clear; sandmesh exec --detach --id mine {id} -- sh -c 'echo first; (setsid sleep 9999 &) ; sleep 9999' | sed 's/^/id: /'"));
    assert_eq!(screen.shows("id: "), "mine");
    screen.enters(&format!(
        "clear; sandmesh ps {id} | awk '/mine/ {{ print \"is: \" $1 }}'"
    ));
    assert_eq!(screen.shows("is: "), "mine");
    screen.enters(&format!(
        "clear; sandmesh kill -s KILL --all {id} mine; sandmesh attach {id} mine; echo \"ended: $?\""
    ));
    assert_eq!(screen.shows("ended: "), "137");
    screen.shows("first");
    screen.enters(&format!(
        "clear; sandmesh exec {id} -- pgrep -c sleep; echo \"found: $?\""
    ));
    assert_eq!(screen.shows("found: "), "1");
    screen.enters(&format!(
        "clear; sandmesh exec {id} -- no-such-program; echo \"missing: $?\""
    ));
    assert_eq!(screen.shows("missing: "), "125");
    screen.shows("error: no-such-program: command not found (PROGRAM_NOT_FOUND)");
}

#[tokio::test(flavor = "multi_thread")]
async fn ports_logs_and_use_are_seen_as_they_change() {
    let mesh = Mesh::start(&[]);
    let session = mesh.session().await;
    let id = &session.session_id;
    let sandbox = mesh.client().sandbox(&session).unwrap();
    let watching = Screen::open(&mesh, 100, 30);
    watching.enters(&format!("sandmesh ports --watch {id}"));
    let screen = Screen::open(&mesh, 160, 30);
    let local = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let forward = format!("sandmesh port-forward {id} {}:8000", local.port());
    let forwarding = Screen::open(&mesh, 160, 30);
    forwarding.enters(&forward);
    forwarding.shows(&local.to_string());
    let server = "cd /; exec python3 -m http.server --bind 127.0.0.1 8000";
    let process = sandbox
        .start(Command::new(["sh", "-c", server]))
        .await
        .unwrap();
    watching.shows("+ 127.0.0.1 8000 ");
    screen.enters(&format!(
        "sandmesh ports {id} --wait 8000 --http /etc/ && echo 'up: yes'"
    ));
    screen.shows("up: yes");
    let page = format!("curl -s http://{local}/etc/ | grep -c passwd | sed 's/^/page: /'");
    screen.enters(&format!("clear; {page}"));
    assert!(screen.shows("page: ").parse::<u32>().unwrap() > 0);
    process.remote().signal(9).await.unwrap();
    watching.shows("- 127.0.0.1 8000 ");
    screen.enters(&format!(
        "clear; sandmesh logs {id} | grep -c 'Linux version' | sed 's/^/kernel: /'"
    ));
    assert_eq!(screen.shows("kernel: "), "1");
    screen.enters(&format!(
        "clear; sandmesh top {id} -o json | grep -c memoryUsedBytes | sed 's/^/use: /'"
    ));
    assert_eq!(screen.shows("use: "), "1");
    watching.enters("\u{3}");
    watching.enters(&format!("clear; sandmesh watch -r {id}:/tmp"));
    watching.shows("watching   /tmp");
    let script = "mkdir -p /tmp/a/b; echo mine > /tmp/a/b/c; mv /tmp/a /tmp/d";
    sandbox.run(["sh", "-c", script]).await.unwrap();
    watching.shows("created    /tmp/a/b/c");
    assert_eq!(watching.shows("renamed    /tmp/a/ -> "), "/tmp/d/");
    screen.enters(&format!("clear; sandmesh ls {id}:/tmp/d/b"));
    assert!(screen.shows(" -rw-r--r--").ends_with(" c"));

    watching.enters("\u{3}");
    watching.enters(&format!("clear; sandmesh logs -f {id}"));
    watching.has("envd    the gate is open");
    let mut shout = Command::new(["sh", "-c", "echo told to the kernel > /dev/kmsg"]);
    shout.user = "root".into();
    sandbox.start(shout).await.unwrap().output().await.unwrap();
    watching.has("user    told to the kernel");

    // A folder there, with its progress before the eyes, and back.
    screen.enters("clear; cd $SANDMESH_STATE; mkdir -p up/below; head -c 25165824 /dev/urandom > up/below/noise; echo made: yes");
    screen.shows("made: yes");
    screen.enters(&format!(
        "clear; sandmesh cp -r up {id}:/tmp/up; echo \"up: $?\""
    ));
    screen.has("/24.00 MiB ");
    assert_eq!(screen.shows("up: "), "0");
    screen.enters(&format!(
        "clear; sandmesh cp -r {id}:/tmp/up down && diff -r up down; echo \"same: $?\""
    ));
    assert_eq!(screen.shows("same: "), "0");
    screen.enters(&format!(
        "clear; sandmesh cp up/below/none {id}:/tmp/none; echo \"missing: $?\""
    ));
    assert_eq!(screen.shows("missing: "), "125");
    screen.has("up/below/none: No such file or directory");
}
