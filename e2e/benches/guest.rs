//! What envd and the way to it cost: commands against the guest's own fork and exec and against a bare call, bulk against the guest link alone.
//! Run by `./deploy/bench`, with release builds. Rounds take turns, so that whatever else the machine does falls on all; medians are shown.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use e2e::{
    Mesh,
    bench::{arguments, is_wanted, milliseconds, percentile},
    guest, how_many, small,
};
use node_svc::{
    guest::{Connections, GuestClient, Identity, origin},
    guest_image::GuestImages,
    vmm::{BootSpec, LinkStream, Machine, Vm, Vmm as _, qemu::Qemu},
};
use proto::{
    envd::v1::{
        Backpressure, GetInfoRequest, OutputKept, StartRequest, WriteHeader,
        process_service_client::ProcessServiceClient,
    },
    session::v1::Resources,
};
use sdk::{Command, Event, NewSession, Sandbox};
use service_kit::{config::tools_folder, kernel_arguments::KernelArguments};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
};
use tokio_util::sync::CancellationToken;

const COMMANDS: usize = 300;
const ROUNDS: usize = 7;
const MIB: u64 = 1 << 20;
const BOOT_LIMIT: Duration = Duration::from_mins(1);
const MEMORY_BYTES: u64 = 512 * MIB;
const DISK_BYTES: u64 = 512 * MIB;

/// All of it, or what is named: `native`, `exec`, `bulk`.
fn main() {
    let named = arguments();
    let wanted = |part: &str| is_wanted(&named, part);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        if wanted("native") {
            native().await;
        }
        if !wanted("exec") && !wanted("bulk") {
            return;
        }
        let mesh = Mesh::start(&["--separate"]);
        let resources = small().resources.map(|resources| Resources {
            memory_bytes: MEMORY_BYTES,
            disk_bytes: DISK_BYTES,
            ..resources
        });
        let session = NewSession {
            resources,
            ..small()
        };
        let session = mesh.client().create(session).await.unwrap();
        let sandbox = mesh.client().sandbox(&session).unwrap();
        if wanted("exec") {
            exec(&sandbox).await;
        }
        if wanted("bulk") {
            bulk(&sandbox).await;
        }
    });
}

async fn exec(sandbox: &Sandbox) {
    guest::upload(sandbox, env!("CARGO_BIN_EXE_guest-server")).await;
    let run = async || {
        let began = Instant::now();
        assert_eq!(sandbox.run(["true"]).await.unwrap().exit.code(), 0);
        began.elapsed()
    };
    for _ in 0..20 {
        run().await;
        sandbox.info().await.unwrap();
    }
    let commands = usize::try_from(how_many("SANDMESH_BENCH_COMMANDS", COMMANDS as u64)).unwrap();
    let spawn = ["./guest-server", "spawn", &commands.to_string()].map(str::to_owned);
    let spawned = sandbox.run(spawn).await.unwrap();
    assert_eq!(spawned.exit.code(), 0);
    let spawned = String::from_utf8(spawned.stdout).unwrap();
    let mut spawns: Vec<Duration> = spawned
        .lines()
        .map(|nanos| Duration::from_nanos(nanos.parse().unwrap()))
        .collect();
    let (mut pings, mut execs) = (Vec::new(), Vec::new());
    for _ in 0..commands {
        let began = Instant::now();
        sandbox.info().await.unwrap();
        pings.push(began.elapsed());
        execs.push(run().await);
    }
    println!("\n`true` through Envoy, node and guest link, start to exit ({commands} times)");
    compare(&mut execs, &mut spawns, &mut pings);
}

fn compare(execs: &mut [Duration], spawns: &mut [Duration], pings: &mut [Duration]) {
    let line = |name: &str, values: &mut [Duration]| {
        let at = |percent, values: &mut [Duration]| milliseconds(percentile(values, percent));
        let (p50, p99) = (at(50, values), at(99, values));
        println!("  {name:<44} p50 {p50:>7.2} ms  p99 {p99:>7.2} ms");
        (p50, p99)
    };
    let exec = line("exec", execs);
    let spawn = line("fork, exec and wait in the same place", spawns);
    let ping = line("a bare gRPC call to envd", pings);
    let over = (exec.0 - spawn.0 - ping.0, exec.1 - spawn.1 - ping.1);
    println!(
        "  {:<44} p50 {:>7.2} ms  p99 {:>7.2} ms",
        "exec over both", over.0, over.1
    );
    println!(
        "  {:<44} p50 {:>7.2}     p99 {:>7.2}",
        "ratio to both",
        exec.0 / (spawn.0 + ping.0),
        exec.1 / (spawn.1 + ping.1)
    );
}

/// envd on this machine, without a guest, emulation or a mesh: what it adds to a command by itself.
async fn native() {
    let envd = std::env::var_os("SANDMESH_ENVD").expect("deploy/bench builds it");
    let folder = tempfile::tempdir().unwrap();
    let mounts = procfs::process::Process::myself()
        .unwrap()
        .mountinfo()
        .unwrap();
    let hierarchy = mounts
        .0
        .into_iter()
        .find(|mount| mount.fs_type == "cgroup2");
    let hierarchy = hierarchy.expect("a cgroup v2 hierarchy").mount_point;
    let cgroup = hierarchy.join(format!("bench-{}", std::process::id()));
    fs::create_dir(&cgroup).unwrap();
    // It is PID 1 of a namespace of its own, as in a guest, and goes with this process.
    let mut envd = std::process::Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "unshare", "--pid", "--fork"])
        .args(["--kill-child", "--mount-proc"])
        .arg(envd)
        .arg("--serve")
        .arg(folder.path().join("socket"))
        .arg(&cgroup)
        .spawn()
        .unwrap();
    let socket = loop {
        match UnixStream::connect(folder.path().join("socket")).await {
            Ok(socket) => break socket,
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    };
    let limit = tokio::time::Instant::now() + BOOT_LIMIT;
    let link = guest_link::host::connect(socket, limit).await.unwrap();
    let guest = GuestClient::open(Box::new(link), CancellationToken::new()).await;
    let guest = guest.unwrap();
    let identity = Identity {
        session_id: "aaaaabbbbbbbbbbbbbbbbbbbb".parse().unwrap(),
        default_user: String::new(),
        env: [].into(),
        nameservers: Vec::new(),
        template: String::new(),
        machine_id: vec![7; 16],
    };
    guest.configure(&identity, Connections::Keep).await.unwrap();
    let mut processes = ProcessServiceClient::with_origin(guest.clone(), origin());
    let commands = usize::try_from(how_many("SANDMESH_BENCH_COMMANDS", COMMANDS as u64)).unwrap();
    let (mut execs, mut spawns, mut pings) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..commands + 20 {
        let began = Instant::now();
        guest.system().get_info(GetInfoRequest {}).await.unwrap();
        let ping = began.elapsed();
        let began = Instant::now();
        assert!(
            std::process::Command::new("true")
                .status()
                .unwrap()
                .success()
        );
        let spawn = began.elapsed();
        let began = Instant::now();
        let request = StartRequest {
            argv: vec!["true".into()],
            ..StartRequest::default()
        };
        let mut events = processes.start(request).await.unwrap().into_inner();
        while events.message().await.unwrap().is_some() {}
        if round >= 20 {
            pings.push(ping);
            spawns.push(spawn);
            execs.push(began.elapsed());
        }
    }
    println!("\n`true` by envd on this machine itself, start to exit ({commands} times)");
    compare(&mut execs, &mut spawns, &mut pings);
    envd.kill().unwrap();
    envd.wait().unwrap();
    fs::write(cgroup.join("cgroup.kill"), "1").unwrap();
    remove_cgroups(&cgroup);
}

/// From below; what was killed takes a moment to be gone.
fn remove_cgroups(folder: &Path) {
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            remove_cgroups(&entry.path());
        }
    }
    e2e::wait_for("the end of a cgroup", BOOT_LIMIT, || {
        fs::remove_dir(folder).is_ok()
    });
}

/// A guest that only moves bytes.
struct Raw {
    vm: Box<dyn Vm>,
    link: Box<dyn LinkStream>,
    _folder: TempDir,
}

impl Raw {
    async fn start() -> Self {
        let init = std::env::var_os("SANDMESH_RAW_INIT").expect("deploy/bench builds it");
        let kernel = tools_folder().join("guest-kernel/current");
        let folder = tempfile::Builder::new()
            .prefix("sm")
            .tempdir_in("/tmp")
            .unwrap();
        let path = |name: &str| folder.path().join(name);
        let images = GuestImages::open(path("images"), Path::new(&init)).unwrap();
        fs::create_dir(path("vm")).unwrap();
        // It mounts none of them.
        for disk in ["rootfs", "scratch"] {
            fs::File::create(path(disk)).unwrap().set_len(MIB).unwrap();
        }
        let vmlinux = kernel.join("vmlinux");
        let qemu = Qemu::probe(&PathBuf::from("qemu-system-x86_64"), Some(&vmlinux), false);
        let spec = BootSpec {
            machine: Machine {
                folder: path("vm"),
                rootfs: path("rootfs"),
                scratch: path("scratch"),
                vcpus: 1,
                memory_bytes: MEMORY_BYTES,
                place: None,
            },
            kernel: vmlinux,
            initrd: images.initrd(&kernel.join("modules.cpio")).unwrap(),
            arguments: KernelArguments::default(),
        };
        let mut vm = qemu.unwrap().boot(spec).await.unwrap();
        let link = vm.connect(Instant::now() + BOOT_LIMIT).await.unwrap();
        Self {
            vm,
            link,
            _folder: folder,
        }
    }

    async fn ask(&mut self, what: u8, count: u64) {
        self.link.write_u8(what).await.unwrap();
        self.link.write_u64(count).await.unwrap();
        self.link.flush().await.unwrap();
    }

    async fn down(&mut self, bytes: u64) {
        self.ask(b'd', bytes).await;
        let mut taken = (&mut self.link).take(bytes);
        let count = tokio::io::copy(&mut taken, &mut tokio::io::sink()).await;
        assert_eq!(count.unwrap(), bytes);
    }

    async fn up(&mut self, bytes: u64) {
        self.ask(b'u', bytes).await;
        let mut zeros = tokio::io::repeat(0).take(bytes);
        tokio::io::copy(&mut zeros, &mut self.link).await.unwrap();
        self.link.flush().await.unwrap();
        self.link.read_u8().await.unwrap();
    }
}

/// What is printed by a command, all of it read.
async fn stdout(sandbox: &Sandbox, bytes: u64, kept: Option<OutputKept>) {
    let command = Command {
        backpressure: Backpressure::WhileAttached,
        output_kept: kept,
        ..Command::new(["cat", "/dev/shm/memory"])
    };
    let mut process = sandbox.start(command).await.unwrap();
    let mut count = 0;
    loop {
        match process.next().await.unwrap().expect("an end") {
            Event::Stdout(bytes) => count += bytes.len() as u64,
            Event::Exited(exit) => break assert_eq!((exit.code(), count), (0, bytes)),
            _ => {}
        }
    }
}

async fn write(sandbox: &Sandbox, path: &str, bytes: u64) {
    let header = WriteHeader {
        path: path.into(),
        ..WriteHeader::default()
    };
    let mut zeros = tokio::io::repeat(0).take(bytes);
    sandbox
        .write_from(header, &mut zeros, |_| {})
        .await
        .unwrap();
}

async fn read(sandbox: &Sandbox, path: &str, bytes: u64) {
    let count = sandbox.read_to(path, &mut tokio::io::sink(), |_| {}).await;
    assert_eq!(count.unwrap(), bytes);
}

async fn bulk(sandbox: &Sandbox) {
    let bytes = how_many("SANDMESH_BENCH_MIB", 24) * MIB;
    let mut raw = Raw::start().await;
    let disk = "bs=1M conv=fsync of=/home/user/floor 2>/dev/null";
    let dd = format!("dd if=/dev/zero count={} {disk}", bytes / MIB);
    let in_memory = OutputKept {
        file_bytes: Some(0),
        ..OutputKept::default()
    };
    write(sandbox, "/dev/shm/memory", bytes).await;
    const NAMES: [&str; 8] = [
        "guest link alone, down",
        "guest link alone, up",
        "stdout of a command",
        "the same, kept in memory only",
        "read of a file in memory",
        "write of a file in memory",
        "write of a file on its disk",
        "dd in the guest to that disk, synced",
    ];
    let mut times = vec![Vec::new(); NAMES.len()];
    for round in 0..=ROUNDS {
        for (index, times) in times.iter_mut().enumerate() {
            let began = Instant::now();
            match index {
                0 => raw.down(bytes).await,
                1 => raw.up(bytes).await,
                2 => stdout(sandbox, bytes, None).await,
                3 => stdout(sandbox, bytes, Some(in_memory)).await,
                4 => read(sandbox, "/dev/shm/memory", bytes).await,
                5 => write(sandbox, "/dev/shm/memory", bytes).await,
                6 => write(sandbox, "/home/user/disk", bytes).await,
                _ => {
                    let done = sandbox.run(["sh", "-c", &dd]).await.unwrap();
                    assert_eq!(done.exit.code(), 0);
                }
            }
            // The first round is for caches and the emulator's translations.
            if round > 0 {
                times.push(began.elapsed());
            }
        }
    }
    println!("\n{} MiB through Envoy, node and guest link", bytes / MIB);
    let rates: Vec<f64> = times
        .iter_mut()
        .map(|times| bytes as f64 / 1000.0 / milliseconds(percentile(times, 50)))
        .collect();
    for (index, name) in NAMES.into_iter().enumerate() {
        let floor = match index {
            2..=4 => format!("  ratio to the link {:>5.2}", rates[index] / rates[0]),
            5 | 6 => format!("  ratio to the link {:>5.2}", rates[index] / rates[1]),
            _ => String::new(),
        };
        println!("  {name:<38} {:>8.1} MB/s{floor}", rates[index]);
    }
    println!(
        "  {:<38} {:>8.2}",
        "write on its disk, ratio to dd",
        rates[6] / rates[7]
    );
    raw.vm.kill().await;
}
