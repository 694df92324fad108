//! As many slots as a node is to have, and how long that takes. Not run by default: it takes a minute, and the machine.
//!
//! `cargo nextest run --release -p node-svc --test many_slots --run-ignored only --no-capture`
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::{
    collections::BTreeSet,
    fs,
    time::{Duration, Instant},
};

use node_svc::slot::{NetworkRules, SlotConfig, SlotPool, leftovers};
use tokio_util::sync::CancellationToken;

const SLOTS: usize = 4000;
const STALE: usize = 1000;

/// Processes this machine has started since it runs.
fn forks() -> u64 {
    let stat = fs::read_to_string("/proc/stat").unwrap();
    let line = stat
        .lines()
        .find_map(|line| line.strip_prefix("processes "));
    line.unwrap().parse().unwrap()
}

async fn fill(pool: &SlotPool, count: usize) -> Duration {
    let begun = Instant::now();
    let stop = CancellationToken::new();
    let filling = tokio::spawn(pool.clone().run(stop.clone()));
    let limit = Instant::now() + Duration::from_secs(300);
    while pool.ready() < count {
        assert!(Instant::now() < limit, "only {} slots", pool.ready());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let took = begun.elapsed();
    stop.cancel();
    filling.await.unwrap();
    took
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes a minute, and the machine"]
async fn four_thousand_slots_are_made_used_left_behind_and_removed() {
    let folder = tempfile::tempdir().unwrap();
    let none = BTreeSet::new();
    let config = SlotConfig {
        ready: SLOTS,
        capacity: SLOTS,
        ..SlotConfig::new(folder.path().to_owned(), 0)
    };
    let pool = SlotPool::open(&config, &none).unwrap();
    let blocks = pool.blocks();
    let took = fill(&pool, SLOTS).await;
    println!(
        "{SLOTS} slots made in {:.1} s ({:.2} ms each)",
        took.as_secs_f64(),
        took.as_secs_f64() * 1000.0 / SLOTS as f64
    );

    let mut taking = Vec::new();
    for _ in 0..100 {
        let begun = Instant::now();
        pool.take(&NetworkRules::internet(true)).await.unwrap();
        taking.push(begun.elapsed());
    }
    taking.sort();
    println!(
        "one of them taken: p50 {:?}, p95 {:?}",
        taking[50], taking[95]
    );

    let begun = Instant::now();
    pool.remove_all().unwrap();
    println!("all removed in {:.1} s", begun.elapsed().as_secs_f64());
    assert_eq!(leftovers(&blocks).unwrap(), Vec::<String>::new());
    drop(pool);

    let config = SlotConfig {
        ready: STALE,
        capacity: STALE,
        ..config
    };
    let pool = SlotPool::open(&config, &none).unwrap();
    let blocks = pool.blocks();
    let before = forks();
    fill(&pool, STALE).await;
    // Threads count as processes here; each slot is made on two.
    println!(
        "{:.2} threads and processes per slot, with all else on this machine",
        (forks() - before) as f64 / STALE as f64
    );
    drop(pool);
    let begun = Instant::now();
    let pool = SlotPool::open(&config, &none).unwrap();
    let took = begun.elapsed();
    println!(
        "opened on {STALE} stale slots in {:.2} s",
        took.as_secs_f64()
    );
    assert!(took < Duration::from_secs(20));
    pool.remove_all().unwrap();
    assert_eq!(leftovers(&blocks).unwrap(), Vec::<String>::new());
}
