//! As many slots as a node is to have, and how long that takes. Not run by default: it takes a minute, and the machine.
//!
//! `cargo nextest run --release -p node-svc --test many_slots --run-ignored only --no-capture`
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::{
    collections::BTreeSet,
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use guests::{Card, GUEST, Guest, MAC, Outside, inside, udp};
use node_svc::slot::{NetworkRules, Slot, SlotConfig, SlotPool, leftovers};
use tokio_util::sync::CancellationToken;

mod guests;

const SLOTS: usize = 4000;
const STALE: usize = 1000;
const USED: usize = 20;
const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

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
    let limit = Instant::now() + Duration::from_mins(5);
    while pool.ready() < count {
        assert!(Instant::now() < limit, "only {} slots", pool.ready());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let took = begun.elapsed();
    stop.cancel();
    filling.await.unwrap();
    took
}

/// Some guests with an HTTP server each: all are reached from the node, none from another, and none sends what it must not.
async fn use_some(pool: &SlotPool) {
    let outside = Outside::new(pool);
    let mut used: Vec<(Slot, Guest, u16)> = Vec::new();
    for _ in 0..USED {
        let slot = pool.take(&NetworkRules::internet(true)).await.unwrap();
        let guest = Guest::new(pool, slot.index).await;
        let port = serve(guest.run(|| TcpListener::bind("0.0.0.0:0").unwrap()));
        used.push((slot, guest, port));
    }
    let far = serve(inside(&outside.namespace.0, || {
        TcpListener::bind("0.0.0.0:0").unwrap()
    }));
    let (mut refused, begun) = (0, Instant::now());
    for (slot, guest, port) in &used {
        assert!(get((slot.reach, *port).into()), "reached from its node");
        assert!(guest.run(|| get((outside.addresses[0], far).into())));
        assert!(!guest.run(|| get((METADATA, 80).into())));
        for (other, _, port) in &used {
            assert!(!guest.run(|| get((other.reach, *port).into())));
            refused += 1;
        }
    }
    println!(
        "{USED} guests: {refused} ways to each other refused in {:.1} s",
        begun.elapsed().as_secs_f64()
    );
    let sink = inside(&outside.namespace.0, || {
        UdpSocket::bind("0.0.0.0:0").unwrap()
    });
    sink.set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let to = (outside.addresses[0], sink.local_addr().unwrap().port());
    for _ in 0..USED {
        let slot = pool.take(&NetworkRules::internet(true)).await.unwrap();
        let card = Card::of(pool, slot.index).await;
        let gateway = card.gateway();
        for (victim, _, _) in &used {
            let source = (MAC, victim.index.slot_address());
            card.send(&udp(source, gateway, to, b"spoofed"));
        }
        card.send(&udp((MAC, GUEST), gateway, to, b"honest"));
        let mut buffer = [0; 100];
        let length = sink.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"honest");
    }
    println!(
        "{USED} guests: {} spoofed packets, none came through",
        USED * USED
    );
}

fn serve(listener: TcpListener) -> u16 {
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            let _ = stream.read(&mut [0; 1000]);
            let _ = stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nhello");
        }
    });
    port
}

fn get(from: SocketAddr) -> bool {
    let Ok(mut stream) = TcpStream::connect_timeout(&from, Duration::from_secs(5)) else {
        return false;
    };
    let mut answer = String::new();
    let asked = stream.write_all(b"GET / HTTP/1.0\r\n\r\n");
    asked.is_ok() && stream.read_to_string(&mut answer).is_ok() && answer.ends_with("hello")
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

    let (mut taking, mut giving) = (Vec::new(), Vec::new());
    for _ in 0..100 {
        let begun = Instant::now();
        let slot = pool.take(&NetworkRules::internet(true)).await.unwrap();
        taking.push(begun.elapsed());
        let begun = Instant::now();
        pool.give_back(slot.index).await;
        giving.push(begun.elapsed());
    }
    for (what, times) in [("taken", &mut taking), ("given back", &mut giving)] {
        times.sort();
        println!(
            "one of them {what}: p50 {:?}, p95 {:?}",
            times[50], times[95]
        );
    }
    use_some(&pool).await;

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
    // Threads count here; each slot is made on one of its own.
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
