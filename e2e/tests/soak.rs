//! Anything at any time, and whoever dies: no session contradicts what is there, and nothing is left. Long, so run by hand:
//!
//! ```sh
//! cargo nextest run -p e2e --test soak --run-ignored only --no-capture      # SANDMESH_SOAK=200 operations
//! ```
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    collections::BTreeMap,
    fs,
    time::{Duration, Instant},
};

use e2e::{Dice, Mesh, how_many, leaks, small};
use proto::session::v1::{Session, SessionState};
use sdk::{Error, NewFork, Sandbox};

const OPERATIONS: u64 = 200;
const MOST_SESSIONS: usize = 5;
/// How long a call is tried again while a node comes back.
const PATIENCE: Duration = Duration::from_mins(1);
const AGAIN: Duration = Duration::from_millis(200);

/// What must be true of a session.
#[derive(Clone)]
struct Known {
    session: Session,
    is_paused: bool,
    /// What its file says.
    file: u64,
    checkpoint: Option<(String, u64)>,
}

/// Tries again for as long as a part that was killed may need.
async fn patiently<T>(what: &str, mut call: impl AsyncFnMut() -> Result<T, Error>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        match call().await {
            Ok(done) => return done,
            Err(error) => assert!(Instant::now() < end, "{what}: {error}"),
        }
        tokio::time::sleep(AGAIN).await;
    }
}

async fn file(sandbox: &Sandbox) -> u64 {
    patiently("read", async || {
        let output = sandbox.run(["sh", "-c", "cat ~/file"]).await?;
        Ok(String::from_utf8(output.stdout).unwrap())
    })
    .await
    .trim()
    .parse()
    .unwrap()
}

async fn write(sandbox: &Sandbox, value: u64) {
    let script = format!("echo {value} > ~/file");
    patiently("write", async || {
        sandbox.run(["sh", "-c", script.as_str()]).await
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "minutes"]
async fn two_hundred_operations_and_kills_leave_nothing_wrong() {
    let operations = how_many("SANDMESH_SOAK", OPERATIONS);
    let mut dice = Dice::of("SANDMESH_SOAK_SEED");
    let mut mesh = Mesh::start_warm(&["--separate"], 1);
    let block = leaks::block_of(&mesh.state().join("node").to_string_lossy()).unwrap();
    let mut known: BTreeMap<String, Known> = BTreeMap::new();
    for number in 1..=operations {
        operation(&mesh, &mut dice, &mut known, number).await;
    }
    for one in known.values() {
        contradicts_nothing(&mesh, one).await;
    }
    for id in known.keys() {
        patiently("stop", async || mesh.client().stop(id).await).await;
    }
    let left: Vec<_> = fs::read_dir(mesh.state().join("node/s"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    assert!(left.is_empty(), "{left:?}");
    let state = mesh.state().to_string_lossy().into_owned();
    mesh.down();
    assert!(
        leaks::of_state(&state).is_empty(),
        "{:?}",
        leaks::of_state(&state)
    );
    assert!(
        leaks::of_block(block).is_empty(),
        "{:?}",
        leaks::of_block(block)
    );
}

async fn operation(mesh: &Mesh, dice: &mut Dice, known: &mut BTreeMap<String, Known>, number: u64) {
    let client = mesh.client();
    if known.is_empty() || (known.len() < MOST_SESSIONS && dice.below(4) == 0) {
        let session = patiently("create", async || client.create(small()).await).await;
        write(&client.sandbox(&session).unwrap(), number).await;
        println!("{number}: create {}", session.session_id);
        let one = Known {
            session,
            is_paused: false,
            file: number,
            checkpoint: None,
        };
        known.insert(one.session.session_id.clone(), one);
        return;
    }
    let id = known.keys().nth(dice.below(known.len())).unwrap().clone();
    let mut one = known[&id].clone();
    let sandbox = client.sandbox(&one.session).unwrap();
    let what = dice.below(12);
    println!("{number}: {what} {id}");
    match what {
        0 | 1 if !one.is_paused => {
            write(&sandbox, number).await;
            one.file = number;
        }
        2 | 3 if !one.is_paused => {
            // Asked again after an answer that was lost, it is paused already.
            patiently("pause", async || match client.pause(&id).await {
                Err(error) if error.reason().as_deref() == Some("SESSION_PAUSED") => Ok(()),
                paused => paused.map(drop),
            })
            .await;
            one.is_paused = true;
        }
        2..=5 if one.is_paused => {
            patiently("resume", async || client.resume(&id, None).await).await;
            one.is_paused = false;
        }
        6 if known.len() < MOST_SESSIONS => {
            let forked = patiently("fork", async || client.fork(&id, NewFork::of(1)).await).await;
            for session in forked.sessions {
                let child = Known {
                    session,
                    is_paused: false,
                    file: one.file,
                    checkpoint: None,
                };
                assert_eq!(
                    file(&client.sandbox(&child.session).unwrap()).await,
                    one.file
                );
                known.insert(child.session.session_id.clone(), child);
            }
        }
        7 => {
            let kept = patiently("keep", async || client.create_checkpoint(&id, "").await).await;
            one.checkpoint = Some((kept.checkpoint_id, one.file));
        }
        8 if one.checkpoint.is_some() => {
            let (checkpoint, value) = one.checkpoint.clone().unwrap();
            patiently("roll back", async || {
                client.rollback(&id, &checkpoint).await
            })
            .await;
            (one.file, one.is_paused) = (value, false);
        }
        9 => {
            patiently("stop", async || client.stop(&id).await).await;
            known.remove(&id);
            return;
        }
        10 if !one.is_paused => {
            mesh.kill_vmm(&one.session);
            if dice.below(2) == 0 {
                mesh.crash("node");
            }
            let end = Instant::now() + PATIENCE;
            loop {
                let state = patiently("get", async || client.get(&id).await)
                    .await
                    .state();
                if matches!(state, SessionState::Failed | SessionState::Lost) {
                    break;
                }
                assert!(Instant::now() < end, "{id} is {state:?}");
                tokio::time::sleep(AGAIN).await;
            }
            known.remove(&id);
            return;
        }
        11 => mesh.crash("node"),
        _ => {}
    }
    contradicts_nothing(mesh, &one).await;
    known.insert(id, one);
}

/// What the control plane says, what is there, and what it holds.
async fn contradicts_nothing(mesh: &Mesh, one: &Known) {
    let client = mesh.client();
    let id = &one.session.session_id;
    let said = patiently("get", async || client.get(id).await).await;
    if one.is_paused {
        assert_eq!(said.state(), SessionState::Paused, "{id}");
        assert!(
            mesh.session_folder(&one.session)
                .join("paused/memory.diff")
                .exists()
        );
    } else {
        assert_eq!(
            said.state(),
            SessionState::Running,
            "{id}: {:?}",
            said.end_reason
        );
        assert_eq!(
            file(&client.sandbox(&one.session).unwrap()).await,
            one.file,
            "{id}"
        );
    }
}
