//! Sandboxes side by side: reached from outside, and from nowhere else.
//!
//! Among as many slots as a node is to have, by hand:
//!
//! ```sh
//! SANDMESH_NODE_READY_SLOTS=4000 SANDMESH_E2E_SANDBOXES=20 cargo nextest run -p e2e --test network --no-capture
//! ```
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

use e2e::{Mesh, guest, how_many, http, leaks, wait_for};
use node_svc::journal;
use sdk::NewFork;

const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
const SERVER: u16 = 8000;
const SLOTS_LIMIT: Duration = Duration::from_mins(5);
/// Prints those of its arguments that take a connection.
const KNOCK: &str = "
import concurrent.futures, socket, sys
def knock(target):
    host, port = target.rsplit(':', 1)
    try:
        socket.create_connection((host, int(port)), timeout=3).close()
        return target
    except OSError:
        return None
with concurrent.futures.ThreadPoolExecutor(64) as doors:
    print(' '.join(filter(None, doors.map(knock, sys.argv[1:]))))
";

#[tokio::test(flavor = "multi_thread")]
async fn no_sandbox_reaches_another_or_the_host() {
    let began = Instant::now();
    let slots = how_many("SANDMESH_NODE_READY_SLOTS", 4);
    let sessions = (slots + 60).to_string();
    let mesh = Mesh::start(&["--max-sessions", &sessions]);
    let client = mesh.client();
    let session = mesh.session().await;
    let parent = client.sandbox(&session).unwrap();
    guest::upload(&parent, env!("CARGO_BIN_EXE_guest-server")).await;
    guest::serve(&parent, &format!("0.0.0.0:{SERVER}")).await;
    let host = session.host.replace("{port}", &SERVER.to_string());
    http::get_when_open(mesh.edge(), &host, "/").await;
    let children = how_many("SANDMESH_E2E_SANDBOXES", 3) - 1;
    let children = u32::try_from(children).unwrap();
    let forked = client
        .fork(&session.session_id, NewFork::of(children))
        .await
        .unwrap();
    assert_eq!(forked.failed.len(), 0, "{:?}", forked.failed);
    let mut sessions = forked.sessions;
    sessions.push(session);

    let node = mesh.state().join("node").to_string_lossy().into_owned();
    wait_for("all slots are made", SLOTS_LIMIT, || {
        leaks::slots_of(&node) >= usize::try_from(slots).unwrap()
    });
    println!(
        "{} sandboxes among {} slots after {:?}",
        sessions.len(),
        leaks::slots_of(&node),
        began.elapsed()
    );

    let of_host = TcpListener::bind("0.0.0.0:0").unwrap();
    let host_port = of_host.local_addr().unwrap().port();
    let mut doors = vec![SocketAddr::from((METADATA, 80))];
    let mut places = Vec::new();
    for session in &sessions {
        let entry = journal::read(&mesh.session_folder(session)).unwrap();
        let slot = entry.slot.unwrap();
        // All of them are there: the host, which carries the calls, reaches them.
        let place = SocketAddr::from((slot.slot_address(), SERVER));
        TcpStream::connect_timeout(&place, Duration::from_secs(5)).unwrap();
        places.push(place);
        doors.push(place);
        doors.push((slot.host_address(), SERVER).into());
        doors.push((slot.host_address(), host_port).into());
        doors.push((slot.slot_address(), host_port).into());
        let host = session.host.replace("{port}", &SERVER.to_string());
        let page = http::get(mesh.edge(), &host, "/", &[]).await;
        assert_eq!(page.status, 200, "{host}");
    }
    let own = format!("127.0.0.1:{SERVER}");
    for (session, place) in sessions.iter().zip(&places) {
        let others = doors.iter().filter(|door| *door != place);
        let mut command = vec!["python3".to_owned(), "-c".into(), KNOCK.into(), own.clone()];
        command.extend(others.map(ToString::to_string));
        let output = client.sandbox(session).unwrap().run(command).await.unwrap();
        assert_eq!(output.exit.code(), 0, "{output:?}");
        let opened = String::from_utf8(output.stdout).unwrap();
        assert_eq!(opened.trim(), own, "of {}", session.session_id);
    }
    println!(
        "{} doors stayed closed to each of {} sandboxes",
        doors.len() - 1,
        sessions.len()
    );
}
