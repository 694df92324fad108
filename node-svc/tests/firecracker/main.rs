//! The Firecracker driver against a fake of Firecracker: what it says in which order, and what it makes of every answer.
//!
//! The fake becomes another user in another root folder, so these tests need root, as node-svc does.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use http::Method;
use node_svc::vmm::{
    BootSpec, GuestPlace, LinkStream, MEMORY, Machine, RestoreSpec, VmExit, Vmm as _, VmmError,
    firecracker::{
        Firecracker, FirecrackerError, MemoryChoice, Options,
        api::{
            Action, Api, ApiError, BackendType, Balloon, BootSource, CacheType, Drive,
            InstanceState, LONGEST_ANSWER, Logger, MachineConfig, MemoryBackend, Metrics,
            NetworkInterface, Serial, SnapshotCreate, SnapshotLoad, SnapshotType, VmState, Vsock,
        },
        jail::JailRoot,
        vsock::{self, VsockError},
    },
    process,
};
use service_kit::kernel_arguments::KernelArguments;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
};

mod fake;

use fake::{Effect, Rules, State};

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(5);

#[test]
#[ignore = "no test: the program that other tests start, by a script"]
fn the_program_that_tests_start() {
    if let Ok(told) = std::env::var(fake::TOLD) {
        fake::main(&told);
    }
}

/// A host with Firecracker, and files a template has.
struct Host {
    folder: TempDir,
    options: Options,
}

impl Host {
    fn new(minor: u32) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (firecracker, jailer) = fake::install(folder.path(), minor);
        for name in ["kernel", "initrd", "rootfs", "kvm", "netns", "mounts"] {
            fs::write(folder.path().join(name), name).unwrap();
        }
        // As the artifact cache has them.
        fs::set_permissions(
            folder.path().join("rootfs"),
            std::os::unix::fs::PermissionsExt::from_mode(0o600),
        )
        .unwrap();
        let options = Options {
            firecracker,
            jailer,
            uids: "1900000000-1900000999".parse().unwrap(),
            memory: MemoryChoice::File,
            console: false,
            state: folder.path().join("state"),
            kvm: folder.path().join("kvm"),
            mounts: folder.path().join("mounts"),
        };
        Self { folder, options }
    }

    fn open(&self) -> Firecracker {
        Firecracker::open(self.options.clone()).unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn machine(&self, name: &str, slot: u32) -> Machine {
        let folder = self.path("state").join(name);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("scratch.ext4"), vec![0; 4096]).unwrap();
        Machine {
            rootfs: self.path("rootfs"),
            scratch: folder.join("scratch.ext4"),
            folder,
            vcpus: 2,
            memory_bytes: 4 * MIB,
            place: Some(GuestPlace {
                slot,
                netns: self.path("netns"),
                tap: "tap0".into(),
                mac: "02:fc:00:00:00:01".into(),
                reach: [10, 213, 0, 1].into(),
            }),
        }
    }

    fn boot_spec(&self, slot: u32) -> BootSpec {
        BootSpec {
            machine: self.machine("template", slot),
            kernel: self.path("kernel"),
            initrd: self.path("initrd"),
            arguments: KernelArguments::parse("sandmesh.test=1").unwrap(),
        }
    }

    /// A template's snapshot: its folder.
    async fn template(&self, firecracker: &Firecracker) -> PathBuf {
        let folder = self.path("state/template");
        let mut vm = firecracker.boot(self.boot_spec(1)).await.unwrap();
        vm.pause().await.unwrap();
        vm.store_devices(&folder.join("devices")).await.unwrap();
        vm.kill().await;
        folder
    }

    /// A machine with the template's memory.
    fn restored(&self, template: &Path, name: &str, slot: u32) -> RestoreSpec {
        let machine = self.machine(name, slot);
        fs::hard_link(template.join(MEMORY), machine.folder.join(MEMORY)).unwrap();
        RestoreSpec {
            machine,
            devices: template.join("devices"),
            difference: None,
        }
    }
}

fn soon() -> Instant {
    Instant::now() + LIMIT
}

async fn echoes(link: &mut Box<dyn LinkStream>, text: &[u8]) -> bool {
    let mut answer = vec![0; text.len()];
    link.write_all(text).await.is_ok()
        && link.flush().await.is_ok()
        && link.read_exact(&mut answer).await.is_ok()
        && answer == text
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn jail(folder: &Path, slot: u32) -> PathBuf {
    folder.join(format!("jail/firecracker/sandmesh-{slot}/root"))
}

#[tokio::test]
async fn a_guest_is_booted_stored_and_restored_many_times() {
    let host = Host::new(14);
    let firecracker = host.open();
    assert_eq!(firecracker.version(), "1.14.0 (snapshots 9.0.0)");
    let mut vm = firecracker.boot(host.boot_spec(1)).await.unwrap();
    let folder = host.path("state/template");
    let root = jail(&folder, 1);
    let config: serde_json::Value =
        serde_json::from_slice(&fs::read(root.join("config.json")).unwrap()).unwrap();
    insta::assert_json_snapshot!(config);
    assert_eq!(fs::metadata(&root).unwrap().uid(), 1_900_000_001);
    assert_eq!(
        fs::metadata(root.join("scratch")).unwrap().uid(),
        1_900_000_001
    );
    assert_eq!(
        fs::metadata(root.join("rootfs")).unwrap().uid(),
        0,
        "lent, not given"
    );
    let told = fs::read_to_string(folder.join("jail/told")).unwrap();
    assert!(
        told.ends_with("-- --api-sock api.sock --level Warning --config-file config.json"),
        "{told}"
    );
    let mut link = vm.connect(soon()).await.unwrap();
    assert!(echoes(&mut link, b"hello").await);
    let refused = vm.store_devices(&folder.join("early")).await.unwrap_err();
    assert!(
        refused.to_string().contains("unavailable while running"),
        "{refused}"
    );
    vm.pause().await.unwrap();
    vm.store_devices(&folder.join("devices")).await.unwrap();
    let memory = fs::read(folder.join(MEMORY)).unwrap();
    assert_eq!(memory.len() as u64, 4 * MIB);
    assert!(memory[..4096].iter().all(|byte| *byte == b'b'));
    assert_eq!(fs::metadata(folder.join(MEMORY)).unwrap().uid(), 0);
    vm.kill().await;
    assert_eq!(names(&folder), ["devices", "memory", "scratch.ext4"]);

    for slot in [2, 3] {
        let spec = host.restored(&folder, &format!("s{slot}"), slot);
        let mut vm = firecracker.restore(spec).await.unwrap();
        // It stands still, so nobody answers yet.
        let silent = vm
            .connect(Instant::now() + Duration::from_millis(100))
            .await;
        assert!(matches!(silent, Err(VmmError::Link(_))));
        vm.run().await.unwrap();
        vm.run().await.unwrap();
        let mut link = vm.connect(soon()).await.unwrap();
        assert!(echoes(&mut link, b"again").await);
        vm.kill().await;
    }
    assert_eq!(
        fs::read(folder.join(MEMORY)).unwrap(),
        memory,
        "nobody wrote it"
    );
}

#[tokio::test]
async fn what_a_guest_wrote_is_stored_and_comes_back_in_a_file_of_its_own() {
    let host = Host::new(14);
    let firecracker = host.open();
    let template = host.template(&firecracker).await;
    let mut vm = firecracker
        .restore(host.restored(&template, "s", 2))
        .await
        .unwrap();
    vm.run().await.unwrap();
    assert!(!vm.link_outlives_store());
    let mut link = vm.connect(soon()).await.unwrap();
    assert!(echoes(&mut link, b"before").await);
    vm.pause().await.unwrap();
    let stored = host.path("state/stored");
    fs::create_dir(&stored).unwrap();
    vm.store_devices(&stored.join("devices")).await.unwrap();
    let difference = stored.join("memory.diff");
    vm.store_memory(&template.join(MEMORY), &difference)
        .await
        .unwrap();
    assert!(fs::metadata(&difference).unwrap().len() < 3 * 4096);
    let copy = stored.join("copy");
    fs::copy(template.join(MEMORY), &copy).unwrap();
    vm.copy_memory(&copy).await.unwrap();
    assert_eq!(fs::read(&copy).unwrap()[4096], 1);
    // It goes on, over a new connection: making a snapshot has ended the one before.
    vm.run().await.unwrap();
    assert!(!echoes(&mut link, b"gone").await);
    let mut link = vm.connect(soon()).await.unwrap();
    assert!(echoes(&mut link, b"after").await);
    vm.kill().await;

    let spec = RestoreSpec {
        devices: stored.join("devices"),
        difference: Some(difference.clone()),
        ..host.restored(&template, "r", 3)
    };
    let folder = spec.machine.folder.clone();
    let mut vm = firecracker.restore(spec).await.unwrap();
    assert_eq!(
        fs::read(folder.join(MEMORY)).unwrap()[4096],
        1,
        "merged before the load"
    );
    assert_eq!(
        fs::read(template.join(MEMORY)).unwrap()[4096],
        0,
        "the template's stays"
    );
    vm.pause().await.unwrap();
    let again = stored.join("again.diff");
    vm.store_memory(&template.join(MEMORY), &again)
        .await
        .unwrap();
    vm.kill().await;
    let whole = fs::File::options().write(true).open(&copy).unwrap();
    node_svc::vmm::memory::apply_to_file(&again, &whole).unwrap();
    assert_eq!(
        fs::read(&copy).unwrap()[4096],
        2,
        "what was put in, and what came after"
    );

    let mut damaged = fs::read(&difference).unwrap();
    damaged[20] ^= 1;
    fs::write(&difference, damaged).unwrap();
    let spec = RestoreSpec {
        devices: stored.join("devices"),
        difference: Some(difference),
        ..host.restored(&template, "d", 4)
    };
    let refused = firecracker.restore(spec).await;
    assert!(matches!(refused, Err(VmmError::Memory(_))));
    assert!(!host.path("state/d/jail").exists());
}

#[tokio::test]
async fn a_guest_is_taken_over_after_its_folder_was_renamed() {
    let host = Host::new(12);
    let firecracker = host.open();
    let template = host.template(&firecracker).await;
    let spec = host.restored(&template, "s", 2);
    let folder = spec.machine.folder.clone();
    let mut vm = firecracker.restore(spec).await.unwrap();
    vm.run().await.unwrap();
    let moved = host.path("state/moved");
    fs::rename(&folder, &moved).unwrap();
    vm.moved(&moved);
    let mut link = vm.connect(soon()).await.unwrap();
    assert!(echoes(&mut link, b"moved").await);
    let id = vm.process().unwrap();
    drop(vm);
    let mut adopted = firecracker.adopt(&moved, id).await.unwrap().unwrap();
    let mut link = adopted.connect(soon()).await.unwrap();
    assert!(echoes(&mut link, b"adopted").await);
    adopted.pause().await.unwrap();
    adopted
        .store_devices(&host.path("state/devices"))
        .await
        .unwrap();
    adopted.kill().await;
    assert!(!moved.join("jail").exists());
    assert!(firecracker.adopt(&moved, id).await.unwrap().is_none());
}

#[tokio::test]
async fn a_jailed_process_is_found_by_its_folder() {
    let host = Host::new(14);
    let firecracker = host.open();
    let template = host.template(&firecracker).await;
    let spec = host.restored(&template, "s", 2);
    let folder = spec.machine.folder.clone();
    let mut vm = firecracker.restore(spec).await.unwrap();
    process::kill_all_below(&host.path("state/template")).unwrap();
    vm.run().await.unwrap();
    process::kill_all_below(&folder).unwrap();
    assert_eq!(vm.wait().await, VmExit::Signal(9));
}

#[tokio::test]
async fn ends_and_silence_are_told_apart() {
    let host = Host::new(14);
    let firecracker = host.open();
    let template = host.template(&firecracker).await;
    let spec = host.restored(&template, "s", 2);
    let root = jail(&spec.machine.folder, 2);
    let mut vm = firecracker.restore(spec).await.unwrap();
    assert!(vm.last_words().await.vmm.contains("fake Firecracker"));
    fs::write(root.join("reset"), "").unwrap();
    vm.run().await.unwrap();
    assert_eq!(vm.wait().await, VmExit::Guest("it reset".into()));
    vm.kill().await;

    let mut vm = firecracker
        .restore(host.restored(&template, "h", 3))
        .await
        .unwrap();
    let pid = nix::unistd::Pid::from_raw(vm.process().unwrap().pid);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
    let hung = tokio::time::timeout(Duration::from_secs(4), vm.wait()).await;
    assert_eq!(hung.unwrap(), VmExit::Hung);
    vm.kill().await;
}

#[tokio::test]
async fn what_cannot_be_started_says_why_and_leaves_nothing() {
    let host = Host::new(14);
    let firecracker = host.open();
    let template = host.template(&firecracker).await;
    let mut spec = host.restored(&template, "damaged", 2);
    spec.devices = host.path("state/damaged-devices");
    fs::write(&spec.devices, "?").unwrap();
    let folder = spec.machine.folder.clone();
    let error = firecracker.restore(spec).await.unwrap_err();
    assert!(matches!(error, VmmError::Load(_)), "{error}");
    assert!(
        error.to_string().contains("CRC64 validation failed"),
        "{error}"
    );
    assert_eq!(names(&folder), ["memory", "scratch.ext4"]);

    let mut spec = host.boot_spec(4);
    spec.machine.vcpus = 33;
    let folder = spec.machine.folder.clone();
    let error = firecracker.boot(spec).await.unwrap_err().to_string();
    assert!(
        error.contains("The vCPU number is invalid") && error.contains("152"),
        "{error}"
    );
    assert!(!folder.join("jail").exists());

    let mut spec = host.restored(&template, "many", 1000);
    let error = firecracker.restore(spec.clone()).await.unwrap_err();
    assert!(error.to_string().contains("--vmm-uids"), "{error}");
    spec.machine.place = None;
    assert!(firecracker.restore(spec.clone()).await.is_err());
    spec = host.restored(&template, "missing", 5);
    fs::remove_file(spec.machine.folder.join(MEMORY)).unwrap();
    let folder = spec.machine.folder.clone();
    let error = firecracker.restore(spec).await.unwrap_err();
    assert!(
        error.to_string().contains("memory cannot be linked")
            || error.to_string().contains("No such file"),
        "{error}"
    );
    assert_eq!(names(&folder), ["scratch.ext4"]);
}

#[test]
fn what_is_missing_is_named_with_what_to_do() {
    let host = Host::new(14);
    let refused = |change: &dyn Fn(&mut Options)| {
        let mut options = host.options.clone();
        change(&mut options);
        Firecracker::open(options).unwrap_err()
    };
    let error = refused(&|options| options.firecracker = "/nowhere/firecracker".into());
    assert!(matches!(error, FirecrackerError::Missing { .. }));
    let text = error.to_string();
    assert!(
        text.contains("--firecracker names it")
            && text.contains("github.com")
            && text.contains("docs/firecracker.md"),
        "{text}"
    );
    let error = refused(&|options| options.jailer = "no-such-jailer".into());
    assert!(error.to_string().contains("--jailer"), "{error}");
    let error = refused(&|options| options.memory = MemoryChoice::Uffd);
    assert!(
        error.to_string().contains("--firecracker-memory file"),
        "{error}"
    );
    let error = refused(&|options| options.kvm = "/nowhere/kvm".into());
    assert!(error.to_string().contains("needs KVM"), "{error}");
    let old = Host::new(6);
    let error = refused(&|options| {
        (options.firecracker, options.jailer) =
            (old.options.firecracker.clone(), old.options.jailer.clone());
    });
    assert_eq!(
        error.to_string(),
        "Firecracker 1.6.0 is too old: 1.7 or newer is needed"
    );
    let other = Host::new(13);
    let error = refused(&|options| options.jailer = other.options.jailer.clone());
    assert!(
        error
            .to_string()
            .contains("Firecracker is 1.14.0 and its jailer is 1.13.0"),
        "{error}"
    );
    let error = refused(&|options| options.jailer = options.firecracker.clone());
    assert!(matches!(error, FirecrackerError::Program { .. }), "{error}");
    assert!(!host.path("state").exists(), "looking changes nothing");
}

/// Every word the client knows, against the rules: what is allowed when, and what is refused with which words.
#[tokio::test]
async fn calls_are_what_the_api_takes_in_the_order_it_takes_them() {
    let folder = tempfile::tempdir().unwrap();
    let (api, rules) = rules_server(folder.path(), 14);
    let refused = |result: Result<(), ApiError>, words: &str| match result {
        Err(ApiError::Refused {
            status: 400, fault, ..
        }) => assert!(fault.contains(words), "{fault}"),
        other => panic!("{other:?}"),
    };
    let before = "not supported before starting the microVM";
    let after = "not supported after starting the microVM";
    let create = |snapshot_type| SnapshotCreate {
        snapshot_type,
        snapshot_path: "s".into(),
        mem_file_path: "m".into(),
    };
    let load = SnapshotLoad {
        snapshot_path: "s".into(),
        mem_backend: MemoryBackend {
            backend_type: BackendType::File,
            backend_path: "m".into(),
        },
        track_dirty_pages: true,
        enable_diff_snapshots: false,
        resume_vm: false,
    };
    let drive = Drive {
        drive_id: "rootfs".into(),
        path_on_host: "rootfs".into(),
        is_root_device: false,
        is_read_only: true,
        cache_type: CacheType::Writeback,
    };
    let source = BootSource {
        kernel_image_path: "kernel".into(),
        initrd_path: None,
        boot_args: "quiet".into(),
    };
    assert_eq!(
        api.version(LIMIT).await.unwrap().firecracker_version,
        "1.14.0"
    );
    let info = api.describe(LIMIT).await.unwrap();
    assert_eq!(
        (info.state, info.vmm_version.as_str()),
        (InstanceState::NotStarted, "1.14.0")
    );
    refused(api.set_state(VmState::Paused, LIMIT).await, before);
    refused(
        api.create_snapshot(&create(SnapshotType::Full), LIMIT)
            .await,
        before,
    );
    refused(api.inflate(1, LIMIT).await, before);
    refused(api.balloon_statistics(LIMIT).await.map(drop), before);
    refused(api.action(Action::FlushMetrics, LIMIT).await, before);
    refused(api.action(Action::SendCtrlAltDel, LIMIT).await, before);
    api.logger(
        &Logger {
            log_path: "l".into(),
            level: "Info".into(),
        },
        LIMIT,
    )
    .await
    .unwrap();
    api.metrics(
        &Metrics {
            metrics_path: "m".into(),
        },
        LIMIT,
    )
    .await
    .unwrap();
    api.serial(
        &Serial {
            serial_out_path: "s".into(),
        },
        LIMIT,
    )
    .await
    .unwrap();
    refused(
        api.action(Action::InstanceStart, LIMIT).await,
        "without kernel configuration",
    );
    api.boot_source(&source, LIMIT).await.unwrap();
    refused(
        api.load_snapshot(&load, LIMIT).await,
        "not allowed after configuring boot-specific resources",
    );
    api.drive(&drive, LIMIT).await.unwrap();
    let mut machine = MachineConfig {
        vcpu_count: 0,
        mem_size_mib: 128,
        smt: false,
        track_dirty_pages: false,
    };
    refused(
        api.machine_config(&machine, LIMIT).await,
        "vCPU number is invalid",
    );
    machine.vcpu_count = 2;
    api.machine_config(&machine, LIMIT).await.unwrap();
    let interface = NetworkInterface {
        iface_id: "net".into(),
        guest_mac: "02:fc:00:00:00:01".into(),
        host_dev_name: "tap0".into(),
    };
    api.network_interface(&interface, LIMIT).await.unwrap();
    api.vsock(
        &Vsock {
            guest_cid: 3,
            uds_path: "v.sock".into(),
        },
        LIMIT,
    )
    .await
    .unwrap();
    api.entropy(LIMIT).await.unwrap();
    let balloon = Balloon {
        amount_mib: 0,
        deflate_on_oom: true,
        stats_polling_interval_s: 0,
        free_page_reporting: true,
    };
    api.balloon(&balloon, LIMIT).await.unwrap();
    api.action(Action::InstanceStart, LIMIT).await.unwrap();
    assert_eq!(
        api.describe(LIMIT).await.unwrap().state,
        InstanceState::Running
    );
    refused(api.boot_source(&source, LIMIT).await, after);
    refused(api.drive(&drive, LIMIT).await, after);
    refused(api.machine_config(&machine, LIMIT).await, after);
    refused(api.load_snapshot(&load, LIMIT).await, after);
    refused(api.action(Action::InstanceStart, LIMIT).await, after);
    refused(
        api.balloon_statistics(LIMIT).await.map(drop),
        "are not enabled",
    );
    refused(
        api.create_snapshot(&create(SnapshotType::Full), LIMIT)
            .await,
        "unavailable while running",
    );
    api.inflate(1, LIMIT).await.unwrap();
    api.set_state(VmState::Paused, LIMIT).await.unwrap();
    api.set_state(VmState::Paused, LIMIT).await.unwrap();
    assert_eq!(
        api.describe(LIMIT).await.unwrap().state,
        InstanceState::Paused
    );
    refused(
        api.create_snapshot(&create(SnapshotType::Diff), LIMIT)
            .await,
        "dirty bitmap",
    );
    api.create_snapshot(&create(SnapshotType::Full), LIMIT)
        .await
        .unwrap();
    api.set_state(VmState::Resumed, LIMIT).await.unwrap();
    rules.abort();

    // Old versions do not know new words, and the driver does not use them there.
    let mut old = Rules::new(12);
    let body = serde_json::to_vec(&balloon).unwrap();
    let refused = old.call(&Method::PUT, "/balloon", &body).unwrap_err();
    assert!(
        refused.contains("unknown field `free_page_reporting`"),
        "{refused}"
    );
    let body = serde_json::to_vec(&load).unwrap();
    let refused = old.call(&Method::PUT, "/snapshot/load", &body).unwrap_err();
    assert!(
        refused.contains("unknown field `track_dirty_pages`"),
        "{refused}"
    );
    let load = SnapshotLoad {
        track_dirty_pages: false,
        enable_diff_snapshots: true,
        ..load
    };
    let mut fresh = Rules::new(12);
    let (_, effect) = fresh
        .call(
            &Method::PUT,
            "/snapshot/load",
            &serde_json::to_vec(&load).unwrap(),
        )
        .unwrap();
    assert!(matches!(effect, Effect::Load(_)));
    assert_eq!(
        (fresh.state, fresh.tracks_dirty_pages, fresh.has_vsock),
        (State::Paused, true, true)
    );
}

fn rules_server(folder: &Path, minor: u32) -> (Api, tokio::task::JoinHandle<()>) {
    let listener = UnixListener::bind(folder.join("api.sock")).unwrap();
    let rules = std::sync::Arc::new(std::sync::Mutex::new(Rules::new(minor)));
    let server = tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let rules = std::sync::Arc::clone(&rules);
            let service =
                hyper::service::service_fn(move |request: http::Request<hyper::body::Incoming>| {
                    let rules = std::sync::Arc::clone(&rules);
                    async move {
                        let (parts, body) = request.into_parts();
                        let body =
                            axum::body::to_bytes(axum::body::Body::new(body), 64 << 10).await?;
                        let called =
                            rules
                                .lock()
                                .unwrap()
                                .call(&parts.method, parts.uri.path(), &body);
                        Ok::<_, axum::Error>(match called {
                            Ok((Some(value), _)) => http::Response::new(value.to_string().into()),
                            Ok((None, _)) => http::Response::builder()
                                .status(204)
                                .body(axum::body::Body::empty())
                                .unwrap(),
                            Err(fault) => fake::refusal(&fault),
                        })
                    }
                });
            hyper::server::conn::http1::Builder::new()
                .serve_connection(hyper_util::rt::TokioIo::new(stream), service)
                .await
                .unwrap();
        }
    });
    (
        Api::new(JailRoot::open(folder).unwrap(), "api.sock"),
        server,
    )
}

/// A server that reads a request and answers with these bytes, or never.
fn raw_server(folder: &Path, answer: Option<Vec<u8>>) -> tokio::task::JoinHandle<()> {
    let listener = UnixListener::bind(folder.join("api.sock")).unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = vec![0; 4096];
            let _ = stream.read(&mut request).await.unwrap();
            match &answer {
                Some(answer) => {
                    // It may have stopped listening.
                    let _ = stream.write_all(answer).await;
                }
                None => std::future::pending().await,
            }
        }
    })
}

#[tokio::test]
async fn bad_answers_end_a_call_in_time_and_bounds() {
    let short = Duration::from_millis(200);
    let ask = async |answer: Option<&[u8]>| {
        let folder = tempfile::tempdir().unwrap();
        let server = raw_server(folder.path(), answer.map(<[u8]>::to_vec));
        let api = Api::new(JailRoot::open(folder.path()).unwrap(), "api.sock");
        let error = api.describe(short).await.unwrap_err();
        server.abort();
        error
    };
    let begun = Instant::now();
    assert!(matches!(ask(None).await, ApiError::Late { .. }));
    let half = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{";
    assert!(matches!(
        ask(Some(half)).await,
        ApiError::Broken { .. } | ApiError::Late { .. }
    ));
    assert!(begun.elapsed() < LIMIT);
    assert!(matches!(ask(Some(b"")).await, ApiError::Broken { .. }));
    assert!(matches!(
        ask(Some(b"SSH-2.0-OpenSSH\r\n")).await,
        ApiError::Broken { .. }
    ));
    let mut oversize = format!(
        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n",
        LONGEST_ANSWER + 1
    )
    .into_bytes();
    oversize.resize(oversize.len() + LONGEST_ANSWER + 1, b' ');
    match ask(Some(&oversize)).await {
        ApiError::Broken { cause, .. } => {
            assert!(cause.to_string().contains("length limit"), "{cause}");
        }
        other => panic!("{other}"),
    }
    let answer = |status: &str, body: &str| {
        format!(
            "HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .into_bytes()
    };
    let wrong = ask(Some(&answer("200 OK", r#"{"state": "Sleeping"}"#))).await;
    assert!(matches!(wrong, ApiError::Broken { .. }));
    match ask(Some(&answer(
        "400 Bad Request",
        r#"{"fault_message": "no"}"#,
    )))
    .await
    {
        ApiError::Refused {
            status: 400,
            fault,
            call,
        } => assert_eq!((fault.as_str(), call.as_str()), ("no", "GET /")),
        other => panic!("{other}"),
    }
    match ask(Some(&answer("503 Service Unavailable", "busy"))).await {
        ApiError::Refused {
            status: 503, fault, ..
        } => assert_eq!(fault, "busy"),
        other => panic!("{other}"),
    }
    let full = ask(Some(&answer(
        "400 Bad Request",
        r#"{"fault_message": "No space left on device (os error 28)"}"#,
    )))
    .await;
    assert!(VmmError::Control(full.into()).is_disk_full());

    let dead = tempfile::tempdir().unwrap();
    drop(UnixListener::bind(dead.path().join("api.sock")).unwrap());
    let api = Api::new(JailRoot::open(dead.path()).unwrap(), "api.sock");
    assert!(matches!(
        api.describe(short).await,
        Err(ApiError::Broken { .. })
    ));
    fs::remove_file(dead.path().join("api.sock")).unwrap();
    assert!(matches!(
        api.describe(short).await,
        Err(ApiError::Broken { .. })
    ));
}

#[tokio::test]
async fn the_vsock_handshake_is_bounded_and_takes_no_byte_too_many() {
    let handshake = async |answers: &'static [&'static [u8]], limit: Duration| {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("v.sock")).unwrap();
        let server = tokio::spawn(async move {
            let mut open = Vec::new();
            for tried in 0.. {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut line = [0; 11];
                stream.read_exact(&mut line).await.unwrap();
                assert_eq!(&line, b"CONNECT 52\n");
                match answers.get(tried).or(answers.last()) {
                    // Hangs up: nobody listens.
                    Some(&b"") => {}
                    Some(answer) => {
                        let _ = stream.write_all(answer).await;
                        open.push(stream);
                    }
                    None => open.push(stream),
                }
            }
        });
        let root = JailRoot::open(folder.path()).unwrap();
        let deadline = tokio::time::Instant::now() + limit;
        let connected = vsock::connect(&root, "v.sock", 52, deadline).await;
        server.abort();
        connected
    };
    let short = Duration::from_millis(100);
    // The guest boots: two tries find nobody, the third one does, and its first bytes are right behind the answer.
    let mut stream: UnixStream = handshake(&[b"", b"", b"OK 1073741824\nhello"], LIMIT)
        .await
        .unwrap();
    let mut first = [0; 5];
    stream.read_exact(&mut first).await.unwrap();
    assert_eq!(&first, b"hello");
    let refused = handshake(&[b""], short).await.unwrap_err();
    assert!(
        matches!(refused, VsockError::Refused { port: 52, .. }),
        "{refused}"
    );
    let begun = Instant::now();
    let late = handshake(&[], short).await.unwrap_err();
    assert!(
        matches!(late, VsockError::Refused { .. }) && begun.elapsed() < LIMIT,
        "{late}"
    );
    let half = handshake(&[b"OK 10"], short).await.unwrap_err();
    assert!(matches!(half, VsockError::Refused { .. }), "{half}");
    let garbage: [&'static [&'static [u8]]; 5] = [
        &[b"NO\n"],
        &[b"OK\n"],
        &[b"OK x\n"],
        &[b"OK 4294967296\n"],
        &[b"OK 1                                        \n"],
    ];
    for answers in garbage {
        let begun = Instant::now();
        let error = handshake(answers, Duration::from_mins(1))
            .await
            .unwrap_err();
        assert!(
            matches!(error, VsockError::Garbage { port: 52, .. }),
            "{error}"
        );
        assert!(begun.elapsed() < LIMIT, "at once");
    }
    let nothing = tempfile::tempdir().unwrap();
    let root = JailRoot::open(nothing.path()).unwrap();
    let deadline = tokio::time::Instant::now() + short;
    assert!(vsock::connect(&root, "v.sock", 52, deadline).await.is_err());
}
