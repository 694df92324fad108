//! What starting, forking, pausing and freeing cost. Run by `./deploy/bench lifecycle`, with release builds.
//!
//! The floor of a start is the VMM alone, measured in the same run: a restore of the same snapshot, its disk copied, until the guest
//! answers on its link. Everything else a create does (control plane, network place, journal, telling the guest who it is) comes on top.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::{
    collections::{BTreeSet, HashSet},
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use e2e::{
    Mesh,
    bench::{arguments, is_wanted},
    guest, http, small,
};
use futures::{StreamExt as _, stream};
use node_svc::{
    disk,
    slot::{GUEST_MAC, NetworkRules, Slot, SlotConfig, SlotPool, TAP},
    vmm::{DEVICES, GuestPlace, MEMORY, Machine, RestoreSpec, Vmm as _, qemu::Qemu},
};
use proto::session::v1::{Resources, Session};
use sdk::{Command, NewFork, NewSession, Sandbox};

const STARTS: usize = 100;
const CHILDREN: u32 = 50;
const DATASET: usize = 100 << 20;
const TWINS: usize = 200;
const TWINS_AT_ONCE: usize = 4;
const WAKES: usize = 10;

/// All of it, or what is named; a number is how often starts are measured.
fn main() {
    let mut named = arguments();
    let starts = named.iter().find_map(|text| text.parse().ok());
    named.retain(|text| text.parse::<usize>().is_err());
    let wanted = |part: &str| is_wanted(&named, part);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        if wanted("starts") {
            measure_starts(starts.unwrap_or(STARTS)).await;
        }
        if wanted("fork") {
            measure_fork().await;
        }
        if wanted("twins") {
            look_for_twins(starts.unwrap_or(TWINS)).await;
        }
        if wanted("paused") {
            measure_pause().await;
        }
        if wanted("memory") {
            measure_memory().await;
        }
    });
}

fn show(name: &str, times: &mut [Duration]) -> f64 {
    times.sort();
    let at = |percent: usize| times[(times.len() - 1) * percent / 100].as_secs_f64() * 1000.0;
    println!(
        "  {name:<44}p50 {:>8.1} ms   p95 {:>8.1} ms",
        at(50),
        at(95)
    );
    at(50)
}

async fn output(sandbox: &Sandbox, script: &str) -> String {
    let output = sandbox.run(["sh", "-c", script]).await.unwrap();
    assert_eq!(
        output.exit.code(),
        0,
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

async fn timed_exec(sandbox: &Sandbox) -> Duration {
    let began = Instant::now();
    sandbox.run(["true"]).await.unwrap();
    began.elapsed()
}

// ---- starts ----

/// The VMM alone, on a snapshot that a node of the mesh has made.
struct Floor {
    qemu: Qemu,
    slots: SlotPool,
    snapshot: PathBuf,
    rootfs: PathBuf,
    folder: tempfile::TempDir,
}

impl Floor {
    fn new(mesh: &Mesh) -> Self {
        let node = mesh.state().join("node");
        let only = |folder: &Path, wanted: &dyn Fn(&Path) -> bool| {
            let mut found = fs::read_dir(folder)
                .unwrap()
                .map(|entry| entry.unwrap().path());
            found.find(|path| wanted(path)).unwrap()
        };
        let folder = tempfile::Builder::new()
            .prefix("sm")
            .tempdir_in("/tmp")
            .unwrap();
        Self {
            qemu: Qemu::probe(Path::new("qemu-system-x86_64"), None, true).unwrap(),
            slots: SlotPool::open(
                &SlotConfig::new(folder.path().to_owned(), 0),
                &BTreeSet::new(),
            )
            .unwrap(),
            snapshot: only(&node.join("t"), &|path| path.join(MEMORY).exists()),
            // The largest artifact but the kernel, which is an ELF.
            rootfs: only(&node.join("artifacts"), &|path| {
                let magic = fs::read(path).unwrap_or_default();
                magic.get(1024..1028) == Some(&[0xe2, 0xe1, 0xf5, 0xe0])
            }),
            folder,
        }
    }

    async fn restore(&self, number: usize) -> Duration {
        let slot = self
            .slots
            .take(&NetworkRules::internet(false))
            .await
            .unwrap();
        let folder = self.folder.path().join(number.to_string());
        fs::create_dir(&folder).unwrap();
        let began = Instant::now();
        fs::hard_link(self.snapshot.join(MEMORY), folder.join(MEMORY)).unwrap();
        disk::copy(&self.snapshot.join("scratch.ext4"), &folder.join("scratch")).unwrap();
        let resources = small().resources.unwrap();
        let spec = RestoreSpec {
            machine: Machine {
                scratch: folder.join("scratch"),
                rootfs: self.rootfs.clone(),
                vcpus: resources.vcpus,
                memory_bytes: resources.memory_bytes,
                place: Some(place(&slot)),
                folder,
            },
            devices: self.snapshot.join(DEVICES),
            difference: None,
        };
        let mut vm = self.qemu.restore(spec).await.unwrap();
        vm.run().await.unwrap();
        let link = vm
            .connect(Instant::now() + Duration::from_secs(30))
            .await
            .unwrap();
        let took = began.elapsed();
        drop(link);
        vm.kill().await;
        self.slots.give_back(slot.index).await;
        took
    }
}

fn place(slot: &Slot) -> GuestPlace {
    GuestPlace {
        slot: slot.index.number(),
        netns: slot.index.namespace_path(),
        tap: TAP.into(),
        mac: GUEST_MAC.into(),
        reach: slot.reach,
    }
}

async fn measure_starts(count: usize) {
    println!("\ncreate -> first exec, {count} times each, one at a time");
    let mesh = Mesh::start(&["--separate"]);
    // The snapshot of the template is made by the first.
    mesh.client()
        .stop(&mesh.session().await.session_id)
        .await
        .unwrap();
    let floor = Floor::new(&mesh);
    let (mut floors, mut cold, mut first, mut later) = (vec![], vec![], vec![], vec![]);
    for number in 0..count {
        floors.push(floor.restore(number).await);
        let (create, exec, next) = start(&mesh).await;
        cold.push(create);
        first.push(exec);
        later.push(next);
    }
    floor.slots.remove_all().unwrap();
    drop(floor);
    drop(mesh);
    let mesh = Mesh::start_warm(&["--separate"], 1);
    mesh.client()
        .stop(&mesh.session().await.session_id)
        .await
        .unwrap();
    let (mut warm, mut warm_first, mut warm_later) = (vec![], vec![], vec![]);
    for _ in 0..count {
        while !mesh
            .metrics("node")
            .await
            .contains("sandmesh_node_warm_idle 1")
        {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let (create, exec, next) = start(&mesh).await;
        warm.push(create);
        warm_first.push(exec);
        warm_later.push(next);
    }
    let bottom = show("floor: VMM restored until its guest answers", &mut floors);
    let cold = show("create, restored", &mut cold);
    let warm = show("create, a guest waited", &mut warm);
    let first = show("first exec, restored", &mut first);
    let later = show("second exec, restored", &mut later);
    let warm_first = show("first exec, a guest waited", &mut warm_first);
    let warm_later = show("second exec, a guest waited", &mut warm_later);
    println!(
        "  create, restored, to floor                  {:>5.2}",
        cold / bottom
    );
    println!(
        "  create, a guest waited, to floor            {:>5.2}",
        warm / bottom
    );
    println!(
        "  first exec to second, restored              {:>5.2}",
        first / later
    );
    println!(
        "  first exec to second, a guest waited        {:>5.2}",
        warm_first / warm_later
    );
}

async fn start(mesh: &Mesh) -> (Duration, Duration, Duration) {
    let began = Instant::now();
    let session = mesh.session().await;
    let created = began.elapsed();
    let sandbox = mesh.client().sandbox(&session).unwrap();
    let (first, second) = (timed_exec(&sandbox).await, timed_exec(&sandbox).await);
    mesh.client().stop(&session.session_id).await.unwrap();
    (created, first, second)
}

// ---- fork ----

fn sized(memory_bytes: u64) -> NewSession {
    NewSession {
        resources: Some(Resources {
            memory_bytes,
            ..small().resources.unwrap()
        }),
        ..small()
    }
}

async fn measure_fork() {
    // Room for all of them, whatever the machine has.
    let mesh = Mesh::start(&["--separate", "--vcpus", "64", "--memory", "16GiB"]);
    let client = mesh.client();
    let parent = client.create(sized(256 << 20)).await.unwrap();
    let sandbox = client.sandbox(&parent).unwrap();
    let script = format!(
        "import os, time\nkept = os.urandom({DATASET})\nopen('/tmp/ready', 'w').close()\nwhile True: time.sleep(3600)"
    );
    let mut holder = Command::new(["python3", "-c", &script]);
    holder.process_id = Some("holder".into());
    let _holder = sandbox.start(holder).await.unwrap();
    output(&sandbox, "while ! [ -e /tmp/ready ]; do sleep 0.1; done").await;
    let began = Instant::now();
    let forked = client
        .fork(&parent.session_id, NewFork::of(CHILDREN))
        .await
        .unwrap();
    let took = began.elapsed();
    let stood = Duration::try_from(forked.parent_stop_time.unwrap()).unwrap();
    let mut own = Vec::new();
    for child in &forked.sessions {
        let metrics = client.metrics(&child.session_id).await.unwrap();
        own.push(metrics.memory_private_bytes >> 10);
    }
    own.sort_unstable();
    println!(
        "\n{} children of a session with {} MiB of its own in memory",
        forked.sessions.len(),
        DATASET >> 20
    );
    println!(
        "  until all run                  {:>8.1} s",
        took.as_secs_f64()
    );
    println!(
        "  the parent stood still         {:>8.1} ms",
        stood.as_secs_f64() * 1000.0
    );
    println!(
        "  private memory of a child      {:>8.1} MiB median, {:.1} MiB most",
        own[own.len() / 2] as f64 / 1024.0,
        own[own.len() - 1] as f64 / 1024.0
    );
}

// ---- twins ----

/// What the first commands of a new session see.
async fn drawn(mesh: &Mesh) -> Vec<String> {
    let session: Session = mesh.session().await;
    let sandbox = mesh.client().sandbox(&session).unwrap();
    let script = "import os; print(os.getrandom(32).hex()); print(open('/dev/urandom', 'rb').read(32).hex()); print(open('/etc/machine-id').read().strip()); print(open('/proc/sys/kernel/random/uuid').read().strip())";
    let output = sandbox.run(["python3", "-c", script]).await.unwrap();
    let mut seen: Vec<String> = String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(str::to_owned)
        .collect();
    seen.push(session.access_token.clone());
    mesh.client().stop(&session.session_id).await.unwrap();
    seen
}

async fn look_for_twins(count: usize) {
    let mesh = Mesh::start(&["--separate"]);
    let mut seen = HashSet::new();
    let mut sessions = stream::iter(0..count)
        .map(|_| drawn(&mesh))
        .buffer_unordered(TWINS_AT_ONCE);
    let mut all = 0;
    while let Some(values) = sessions.next().await {
        assert_eq!(values.len(), 5);
        for value in values {
            all += 1;
            assert!(seen.insert(value.clone()), "{value} came twice");
        }
    }
    println!(
        "\n{count} restores of one snapshot: {all} values (getrandom, /dev/urandom, machine-id, uuid, token), all different"
    );
}

// ---- pause ----

async fn measure_pause() {
    let mesh = Mesh::start(&["--separate"]);
    let client = mesh.client();
    let session = client
        .create(NewSession {
            wake_on_request: true,
            ..small()
        })
        .await
        .unwrap();
    let sandbox = client.sandbox(&session).unwrap();
    guest::upload(&sandbox, &guest_server()).await;
    guest::serve(&sandbox, "0.0.0.0:8000").await;
    let host = session.host.replace("{port}", "8000");
    http::get_when_open(mesh.edge(), &host, "/").await;
    let (mut pauses, mut wakes, mut stored) = (vec![], vec![], 0);
    for _ in 0..WAKES {
        let began = Instant::now();
        let paused = client.pause(&session.session_id).await.unwrap();
        pauses.push(began.elapsed());
        stored = paused.stored_bytes;
        let metrics = client.metrics(&session.session_id).await.unwrap();
        assert_eq!(metrics.memory_bytes, 0);
        let began = Instant::now();
        assert_eq!(http::get(mesh.edge(), &host, "/", &[]).await.status, 200);
        wakes.push(began.elapsed());
    }
    println!(
        "\na paused session with a web server: no memory, {} KiB on disk",
        stored >> 10
    );
    show("pause", &mut pauses);
    show("a request that wakes it, through Envoy", &mut wakes);
}

fn guest_server() -> String {
    // Beside the benches' own folder.
    let mut path = std::env::current_exe().unwrap();
    path.pop();
    path.pop();
    path.join("guest-server").to_string_lossy().into_owned()
}

// ---- memory ----

async fn measure_memory() {
    let mesh = Mesh::start(&["--separate"]);
    let client = mesh.client();
    let session = client.create(sized(384 << 20)).await.unwrap();
    let sandbox = client.sandbox(&session).unwrap();
    let own = async || {
        client
            .metrics(&session.session_id)
            .await
            .unwrap()
            .memory_bytes
            >> 20
    };
    output(&sandbox, "true").await;
    let before = own().await;
    let script = "kept = bytearray(b'x') * (200 << 20)\nopen('/tmp/full', 'w').close()\nimport time\nwhile True: time.sleep(3600)";
    let process = sandbox
        .start(Command::new(["python3", "-c", script]))
        .await
        .unwrap();
    output(&sandbox, "while ! [ -e /tmp/full ]; do sleep 0.1; done").await;
    let peak = own().await;
    process.remote().signal(9).await.unwrap();
    let began = Instant::now();
    let mut after = own().await;
    while began.elapsed() < Duration::from_mins(1) && after + 190 > peak {
        tokio::time::sleep(Duration::from_millis(200)).await;
        after = own().await;
    }
    println!(
        "\n200 MiB allocated and freed in a sandbox, memory of its VMM: {before} MiB before, {peak} MiB at most, {after} MiB {:.1} s after",
        began.elapsed().as_secs_f64()
    );
}
