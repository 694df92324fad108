//! Servers never outlive the test process, however it ends.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use testbed::{Postgres, Redis};

/// Not a test of its own: what the other one starts and kills.
#[test]
#[ignore = "run by the test below"]
fn hold_servers_until_killed() {
    let postgres = Postgres::start().unwrap();
    let redis = Redis::start().unwrap();
    println!("\nredis {}", redis.socket().parent().unwrap().display());
    println!("postgres {}", postgres.socket_folder().display());
    // Killed from outside long before.
    std::thread::sleep(Duration::from_mins(1));
}

#[test]
fn servers_die_with_a_killed_test_process() {
    let mut holder = Command::new(std::env::current_exe().unwrap())
        .args([
            "--ignored",
            "--exact",
            "--nocapture",
            "hold_servers_until_killed",
        ])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(holder.stdout.take().unwrap()).lines();
    let mut folder = |prefix: &str| {
        lines
            .by_ref()
            .map_while(Result::ok)
            .find_map(|line| line.strip_prefix(prefix).map(str::to_owned))
            .unwrap()
    };
    let (redis, postgres) = (folder("redis "), folder("postgres "));
    let status = fs::read_to_string(Path::new(&postgres).join("data/postmaster.pid")).unwrap();
    let pid = status.lines().next().unwrap().to_owned();
    holder.kill().unwrap();
    holder.wait().unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while Path::new("/proc").join(&pid).exists() {
        assert!(
            Instant::now() < deadline,
            "postgres {pid} outlived its test"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    // A killed process cannot tidy up.
    fs::remove_dir_all(redis).unwrap();
    fs::remove_dir_all(postgres).unwrap();
}
