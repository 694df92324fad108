//! Firecracker: for hosts where KVM works. Started under its jailer, told what to do over its API, reached over its vsock.
//!
//! ```text
//!  boot:    jail, config.json -> jailer -> Firecracker boots it at once -> pause -> full snapshot: devices, memory
//!  restore: jail, both files  -> jailer -> load, memory mapped privately -> run
//! ```
//! - The guest's channel is one connection to a port on which envd listens. Making a snapshot ends all connections
//!   (docs/snapshotting/snapshot-support.md of Firecracker, "Vsock device reset"), so it is made anew after each, also by the guest that goes on.
//! - Firecracker writes devices and memory in one call. Of a booted guest both are wanted: the memory becomes [`MEMORY`]. Of a restored
//!   guest KVM notes which pages are written, so that the memory's part is short; it is thrown away, and what differs is read from
//!   the process as for every VMM (`memory.rs`), which needs no chain of differences and has a checksum.
//! - A load takes whole memory only: a resumed guest's is the template's with its difference put in, in a file of its own.
//!
//! Proven against a fake of its API (`node-svc/tests/firecracker.rs`), not against Firecracker itself: `docs/firecracker.md` says what is left.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use proto::node::v1::VmmKind;
use service_kit::kernel_arguments::KernelArguments;

use super::{
    BootSpec, LastWords, LinkStream, MEMORY, Machine, RestoreSpec, Vm, VmExit, Vmm, VmmError,
    cgroup::{self, Cgroups},
    memory::{self, MemoryError},
    process::{self, Launch, Process, ProcessId},
    users::UidRange,
};
use crate::disk;

pub mod api;
pub mod jail;
mod version;
pub mod vsock;

use api::{
    Api, ApiError, BackendType, Balloon, BootSource, CacheType, Drive, Entropy, InstanceState,
    MachineConfig, MemoryBackend, NetworkInterface, SnapshotCreate, SnapshotLoad, SnapshotType,
    VmConfig, VmState, Vsock,
};
use jail::{Imprisonment, JailRoot};
pub use version::Version;

/// From the jailer's start until Firecracker answers.
const START_LIMIT: Duration = Duration::from_secs(10);
const START_RETRY: Duration = Duration::from_millis(2);
/// A call that only has to be heard.
const CALL_LIMIT: Duration = Duration::from_secs(2);
/// A call that reads or writes files. Firecracker gives its CPUs 30 s to stand still.
const WORK_LIMIT: Duration = Duration::from_mins(1);
/// Between two looks whether it still answers.
const PROBE: Duration = Duration::from_millis(500);
const PROBE_LIMIT: Duration = Duration::from_secs(1);
const HUNG_AFTER: u32 = 10;
const LOG_TAIL: u64 = 4 << 10;
const MIB: u64 = 1 << 20;
/// State of CPUs and devices is some hundred KiB.
const LARGEST_DEVICES: u64 = 64 << 20;
/// Any number but 0, 1 and 2; every guest has its own Firecracker.
const GUEST_CID: u32 = 3;

/// Names in a jail, and so the same in every snapshot.
pub(in crate::vmm) const API_SOCKET: &str = "api.sock";
pub(in crate::vmm) const CONFIG: &str = "config.json";
const VSOCK: &str = "v.sock";
const KERNEL: &str = "kernel";
const INITRD: &str = "initrd";
const ROOTFS: &str = "rootfs";
const SCRATCH: &str = "scratch";
const DEVICES_IN: &str = "devices";
const MEMORY_IN: &str = "memory";
const DEVICES_OUT: &str = "devices.out";
const MEMORY_OUT: &str = "memory.out";

/// How a restored guest's memory is filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum MemoryChoice {
    /// Firecracker maps the file privately; the kernel reads pages when they are touched, and all guests of a template share them.
    File,
    /// A process of its own answers page faults. There is none yet.
    Uffd,
}

/// How Firecrackers are run on a node.
#[derive(Debug, Clone)]
pub struct Options {
    /// Firecracker's program: a path, or a name on the `PATH`.
    pub firecracker: PathBuf,
    /// Its jailer's program.
    pub jailer: PathBuf,
    /// Users they run as.
    pub uids: UidRange,
    /// How memory is filled.
    pub memory: MemoryChoice,
    /// Whether guests have a serial console.
    pub console: bool,
    /// The node's state folder.
    pub state: PathBuf,
    /// KVM.
    pub kvm: PathBuf,
    /// Mounts of the host: where cgroup v2 is.
    pub mounts: PathBuf,
}

/// Firecracker cannot be used here.
#[derive(Debug, thiserror::Error)]
pub enum FirecrackerError {
    /// A program is not installed.
    #[error(
        "{program} is not there ({setting} names it): install firecracker and jailer of one release, 1.7 or newer, from \
         https://github.com/firecracker-microvm/firecracker/releases; docs/firecracker.md has the steps"
    )]
    Missing {
        /// By which setting it is named.
        setting: &'static str,
        /// Its name.
        program: PathBuf,
    },
    /// A program does not say what it is.
    #[error("{program} does not tell its version: {cause}")]
    Program {
        /// Which.
        program: PathBuf,
        /// Why, or what it said.
        cause: String,
    },
    /// Its snapshots and devices are others.
    #[error("Firecracker {0} is too old: 1.7 or newer is needed")]
    TooOld(Version),
    /// A jailer works with its own Firecracker only.
    #[error(
        "Firecracker is {firecracker} and its jailer is {jailer}: install both from one release"
    )]
    Mismatch {
        /// Firecracker's version.
        firecracker: Version,
        /// The jailer's.
        jailer: Version,
    },
    /// There is no KVM.
    #[error("{kvm} cannot be opened ({cause}): Firecracker needs KVM; --vmm qemu does not")]
    Kvm {
        /// The device.
        kvm: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// It is not built.
    #[error(
        "--firecracker-memory uffd needs a process that answers page faults, which Sandmesh does not have yet; use --firecracker-memory file"
    )]
    Uffd,
    /// The state folder could not be closed to others.
    #[error("--state {state}: {cause}")]
    State {
        /// The folder.
        state: PathBuf,
        /// Why.
        cause: io::Error,
    },
}

/// Firecracker on this host.
#[derive(Debug)]
pub struct Firecracker {
    program: PathBuf,
    jailer: PathBuf,
    release: Version,
    version: String,
    uids: UidRange,
    console: bool,
    cgroups: Option<Cgroups>,
}

impl Firecracker {
    /// Finds out whether Firecracker can be used here, and makes room for it: nobody but root may look into the state folder from then
    /// on, since files in it are readable for all jails. Blocking.
    pub fn open(options: Options) -> Result<Self, FirecrackerError> {
        let mut firecracker = Self::look(&options)?;
        let closed = fs::create_dir_all(&options.state)
            .and_then(|()| fs::set_permissions(&options.state, fs::Permissions::from_mode(0o700)));
        closed.map_err(|cause| FirecrackerError::State {
            state: options.state.clone(),
            cause,
        })?;
        firecracker.cgroups = Cgroups::of_node(&options.mounts, &options.state);
        if !firecracker.release.has_acpi() {
            tracing::warn!(
                version = %firecracker.release,
                "this Firecracker has no ACPI and no VMGenID: guests need a kernel with VIRTIO_MMIO_CMDLINE_DEVICES built in"
            );
        }
        Ok(firecracker)
    }

    /// Why Firecracker cannot be used here, if it cannot. Changes nothing. Blocking.
    pub fn look(options: &Options) -> Result<Self, FirecrackerError> {
        let program = find("--firecracker", &options.firecracker)?;
        let jailer = find("--jailer", &options.jailer)?;
        let said = ask(&program, "--version")?;
        let release = named(&program, &said, "Firecracker")?;
        let jailers = named(&jailer, &ask(&jailer, "--version")?, "Jailer")?;
        if !release.is_supported() {
            return Err(FirecrackerError::TooOld(release));
        }
        if release != jailers {
            return Err(FirecrackerError::Mismatch {
                firecracker: release,
                jailer: jailers,
            });
        }
        if options.memory == MemoryChoice::Uffd {
            return Err(FirecrackerError::Uffd);
        }
        // A release may keep the format of its snapshots over others, but not the other way round.
        let format = ask(&program, "--snapshot-version")?;
        let format = format
            .lines()
            .next()
            .unwrap_or_default()
            .trim_start_matches('v');
        let opened = File::options().read(true).write(true).open(&options.kvm);
        opened.map_err(|cause| FirecrackerError::Kvm {
            kvm: options.kvm.clone(),
            cause,
        })?;
        Ok(Self {
            version: format!("{release} (snapshots {format})"),
            program,
            jailer,
            release,
            uids: options.uids,
            console: options.console,
            cgroups: None,
        })
    }

    fn command_line(&self) -> String {
        let console = if self.console {
            "console=ttyS0 8250.nr_uarts=1"
        } else {
            // Output to a serial port that nobody reads is many exits of the guest (docs/prod-host-setup.md of Firecracker).
            "8250.nr_uarts=0"
        };
        format!(
            "{console} quiet random.trust_cpu=on panic=-1 reboot=k pci=off i8042.noaux i8042.nomux i8042.dumbkbd"
        )
    }

    fn config(
        &self,
        machine: &Machine,
        arguments: &KernelArguments,
        tap: &str,
        mac: &str,
    ) -> VmConfig {
        let drive = |name: &str, is_read_only| Drive {
            drive_id: name.to_owned(),
            path_on_host: name.to_owned(),
            is_root_device: false,
            is_read_only,
            // What the host's page cache has outlives the VMM; only the host's own crash loses it, and the sandbox with it.
            cache_type: CacheType::Unsafe,
        };
        VmConfig {
            boot_source: BootSource {
                kernel_image_path: KERNEL.into(),
                initrd_path: Some(INITRD.into()),
                boot_args: arguments.after(self.command_line()),
            },
            drives: vec![drive(ROOTFS, true), drive(SCRATCH, false)],
            machine_config: MachineConfig {
                vcpu_count: machine.vcpus,
                mem_size_mib: machine.memory_bytes / MIB,
                smt: false,
                // Its only snapshot is a whole one.
                track_dirty_pages: false,
            },
            network_interfaces: vec![NetworkInterface {
                iface_id: "net".into(),
                guest_mac: mac.to_owned(),
                host_dev_name: tap.to_owned(),
            }],
            vsock: Vsock {
                guest_cid: GUEST_CID,
                uds_path: VSOCK.into(),
            },
            balloon: Balloon {
                amount_mib: 0,
                deflate_on_oom: true,
                stats_polling_interval_s: 0,
                free_page_reporting: self.release.has_free_page_reporting(),
            },
            entropy: Entropy::default(),
        }
    }

    /// Makes the jail, lets `fill` put files into it, and starts Firecracker in it. On an error nothing is left.
    async fn start(
        &self,
        machine: &Machine,
        boots: bool,
        fill: impl FnOnce(&JailRoot, u32) -> io::Result<()> + Send + 'static,
    ) -> Result<FirecrackerVm, VmmError> {
        let place = machine.place.clone().ok_or_else(|| {
            invalid("a guest of Firecracker needs a network slot: its user follows from it".into())
        })?;
        let uid = self
            .uids
            .of(place.slot)
            .map_err(|error| invalid(error.to_string()))?;
        let id = format!("sandmesh-{}", place.slot);
        let (folder, program) = (machine.folder.clone(), self.program.clone());
        let (rootfs, scratch) = (machine.rootfs.clone(), machine.scratch.clone());
        let jail_id = id.clone();
        let make = move || {
            let root = jail::make(&folder, &program, &jail_id)?;
            root.lend(&rootfs, ROOTFS)?;
            root.give(&scratch, SCRATCH, uid)?;
            fill(&root, uid)?;
            let largest = fs::metadata(&scratch)?.len();
            Ok::<_, io::Error>((root, largest, jail::open_log(&folder)?))
        };
        let made = blocking(make).await;
        let launched = made.and_then(|(root, largest_disk, log)| {
            let told = Imprisonment {
                id: &id,
                firecracker: &self.program,
                uid,
                folder: &machine.folder,
                netns: &place.netns,
                cgroups: self.cgroups.as_ref(),
                vcpus: machine.vcpus,
                memory_bytes: machine.memory_bytes,
                largest_file: largest_disk.max(machine.memory_bytes) + LARGEST_DEVICES,
                boots,
            };
            let process = process::launch_unfiltered(Launch {
                program: &self.jailer,
                arguments: told.arguments(),
                folder: &machine.folder,
                netns: None,
                output: log,
                inherited: Vec::new(),
                // The jailer becomes it.
                user: None,
                // The jailer puts it there.
                cgroup: None,
            })?;
            let cgroup = self.cgroups.as_ref().map(|cgroups| cgroups.folder(&id));
            Ok(FirecrackerVm::new(
                process,
                &machine.folder,
                root,
                cgroup,
                boots,
            ))
        });
        match launched {
            Ok(vm) => Ok(vm),
            Err(error) => {
                remove_jail(&machine.folder).await;
                Err(VmmError::Spawn(error))
            }
        }
    }
}

fn invalid(message: String) -> VmmError {
    VmmError::Spawn(io::Error::new(io::ErrorKind::InvalidInput, message))
}

/// The whole path of a program: the jailer wants one.
fn find(setting: &'static str, program: &Path) -> Result<PathBuf, FirecrackerError> {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let candidates: Vec<PathBuf> = if program.components().count() > 1 {
        vec![program.to_owned()]
    } else {
        std::env::split_paths(&paths)
            .map(|folder| folder.join(program))
            .collect()
    };
    candidates
        .into_iter()
        .filter_map(|path| path.canonicalize().ok())
        .find(|path| path.is_file())
        .ok_or_else(|| FirecrackerError::Missing {
            setting,
            program: program.to_owned(),
        })
}

fn ask(program: &Path, what: &str) -> Result<String, FirecrackerError> {
    let failed = |cause: String| FirecrackerError::Program {
        program: program.to_owned(),
        cause,
    };
    let output = Command::new(program)
        .arg(what)
        .output()
        .map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(failed(format!(
            "{what}: {}, {}",
            output.status,
            said.trim()
        )));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn named(program: &Path, said: &str, name: &str) -> Result<Version, FirecrackerError> {
    Version::parse(said, name).ok_or_else(|| FirecrackerError::Program {
        program: program.to_owned(),
        cause: format!("it says {:?}", said.lines().next().unwrap_or_default()),
    })
}

/// What of this host's CPU a snapshot depends on: model, stepping, microcode and features, and the kernel, whose KVM decides
/// what of it a guest sees (docs/snapshotting/snapshot-support.md of Firecracker, "Where can I resume my snapshots?").
pub fn cpu_identity(cpuinfo: &str, kernel: &str) -> String {
    let field = |name: &str| {
        cpuinfo
            .lines()
            .find_map(|line| {
                let (key, value) = line.split_once(':')?;
                (key.trim() == name).then(|| value.trim())
            })
            .unwrap_or("?")
    };
    let features: BTreeSet<&str> = field("flags").split_ascii_whitespace().collect();
    let features = features.into_iter().collect::<Vec<_>>().join(" ");
    let digest = blake3::hash(features.as_bytes()).to_hex();
    format!(
        "{} (family {}, model {}, stepping {}, microcode {}, features {}), Linux {}",
        field("model name"),
        field("cpu family"),
        field("model"),
        field("stepping"),
        field("microcode"),
        digest.get(..8).unwrap_or_default(),
        kernel.trim(),
    )
}

#[tonic::async_trait]
impl Vmm for Firecracker {
    fn kind(&self) -> VmmKind {
        VmmKind::Firecracker
    }

    fn version(&self) -> &str {
        &self.version
    }

    fn needs_place(&self) -> bool {
        true
    }

    async fn boot(&self, spec: BootSpec) -> Result<Box<dyn Vm>, VmmError> {
        let (tap, mac) = spec
            .machine
            .place
            .as_ref()
            .map(|place| (place.tap.clone(), place.mac.clone()))
            .unwrap_or_default();
        let config = self.config(&spec.machine, &spec.arguments, &tap, &mac);
        let config = serde_json::to_vec(&config).map_err(|error| VmmError::Spawn(error.into()))?;
        let (kernel, initrd) = (spec.kernel, spec.initrd);
        let fill = move |root: &JailRoot, _| {
            root.lend(&kernel, KERNEL)?;
            root.lend(&initrd, INITRD)?;
            root.put(CONFIG, &config)
        };
        let mut vm = self.start(&spec.machine, true, fill).await?;
        // It listens once the guest runs.
        match vm.wait_for_api(InstanceState::Running).await {
            Ok(()) => Ok(Box::new(vm)),
            Err(error) => Err(vm.give_up(error).await),
        }
    }

    async fn restore(&self, spec: RestoreSpec) -> Result<Box<dyn Vm>, VmmError> {
        let memory = spec.machine.folder.join(MEMORY);
        if let Some(difference) = spec.difference {
            let memory = memory.clone();
            let merged = crate::work::blocking(move || merge(&memory, &difference)).await;
            merged.map_err(|error| VmmError::Control(io::Error::other(error)))??;
        }
        let devices = spec.devices;
        let fill = move |root: &JailRoot, _| {
            root.lend(&devices, DEVICES_IN)?;
            root.lend(&memory, MEMORY_IN)
        };
        let mut vm = self.start(&spec.machine, false, fill).await?;
        let tracks = self.release.has_new_load_names();
        let load = SnapshotLoad {
            snapshot_path: DEVICES_IN.into(),
            mem_backend: MemoryBackend {
                backend_type: BackendType::File,
                backend_path: MEMORY_IN.into(),
            },
            track_dirty_pages: tracks,
            enable_diff_snapshots: !tracks,
            resume_vm: false,
        };
        match vm.load(&load).await {
            Ok(()) => Ok(Box::new(vm)),
            Err(error) => Err(vm.give_up(error).await),
        }
    }

    async fn adopt(
        &self,
        folder: &Path,
        process: ProcessId,
    ) -> Result<Option<Box<dyn Vm>>, VmmError> {
        let Some(process) = Process::adopt(process).map_err(VmmError::Spawn)? else {
            return Ok(None);
        };
        let root = jail::root_in(folder).ok_or_else(|| io::Error::from(io::ErrorKind::NotFound));
        let root = root
            .and_then(|root| JailRoot::open(&root))
            .map_err(VmmError::Control)?;
        let cgroups = self.cgroups.as_ref();
        let cgroup = cgroups.and_then(|cgroups| cgroups.of_process(process.id().pid));
        // Guests that booted are their template's, and nobody takes those over.
        let vm = FirecrackerVm::new(process, folder, root, cgroup, false);
        Ok(Some(Box::new(vm)))
    }
}

/// Puts a difference into a file of the guest's own, in place of its name for the template's. Blocking.
fn merge(memory: &Path, difference: &Path) -> Result<(), MemoryError> {
    let merged = memory.with_extension("merging");
    match fs::remove_file(&merged) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    disk::copy(memory, &merged)?;
    let file = File::options().write(true).open(&merged)?;
    let put =
        memory::apply_to_file(difference, &file).and_then(|()| Ok(fs::rename(&merged, memory)?));
    if put.is_err() {
        fs::remove_file(&merged)?;
    }
    put
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    crate::work::blocking(work)
        .await
        .map_err(io::Error::other)?
}

async fn remove_jail(folder: &Path) {
    let name = folder.to_owned();
    if let Err(error) = blocking(move || jail::remove(&name)).await {
        tracing::error!(%error, folder = %folder.display(), "a jail is left behind");
    }
}

/// A running Firecracker.
#[derive(Debug)]
struct FirecrackerVm {
    process: Process,
    folder: PathBuf,
    root: JailRoot,
    api: Api,
    cgroup: Option<PathBuf>,
    /// Its memory is in no file yet.
    booted: bool,
    unanswered: u32,
}

impl FirecrackerVm {
    fn new(
        process: Process,
        folder: &Path,
        root: JailRoot,
        cgroup: Option<PathBuf>,
        booted: bool,
    ) -> Self {
        Self {
            process,
            folder: folder.to_owned(),
            api: Api::new(root.clone(), API_SOCKET),
            root,
            cgroup,
            booted,
            unanswered: 0,
        }
    }

    /// Waits until Firecracker answers. It makes its socket some milliseconds after its start; there is nothing to wait on but the file
    /// system.
    async fn wait_for_api(&mut self, wanted: InstanceState) -> Result<(), VmmError> {
        let limit = Instant::now() + START_LIMIT;
        loop {
            let last = match self.api.describe(CALL_LIMIT).await {
                Ok(info) if info.state == wanted => return Ok(()),
                Ok(info) => io::Error::other(format!("it is {:?}, not {wanted:?}", info.state)),
                Err(error) => error.into(),
            };
            if Instant::now() > limit {
                return Err(VmmError::Control(last));
            }
            tokio::select! {
                exit = self.process.wait() => return Err(VmmError::Ended(exit)),
                () = tokio::time::sleep(START_RETRY) => {}
            }
        }
    }

    async fn load(&mut self, load: &SnapshotLoad) -> Result<(), VmmError> {
        self.wait_for_api(InstanceState::NotStarted).await?;
        match self.api.load_snapshot(load, WORK_LIMIT).await {
            Ok(()) => Ok(()),
            Err(ApiError::Refused { fault, .. }) => Err(VmmError::Load(fault)),
            Err(error) => Err(VmmError::Control(error.into())),
        }
    }

    /// Ends one that is of no use; what it said goes into the error.
    async fn give_up(&mut self, error: VmmError) -> VmmError {
        // It may be ending by itself, and its exit code says more than our signal would.
        let exit = tokio::time::timeout(START_RETRY, self.process.wait()).await;
        self.process.kill().await;
        let said = jail::log_tail(&self.folder, LOG_TAIL);
        self.kill().await;
        let said = said.trim();
        match error {
            VmmError::Load(fault) if !said.is_empty() => {
                VmmError::Load(format!("{fault}; it said: {said}"))
            }
            VmmError::Load(_) => error,
            other => {
                let exit = exit.map_or_else(|_| String::new(), |exit| format!(" ({exit})"));
                VmmError::Control(io::Error::other(format!("{other}{exit}; it said: {said}")))
            }
        }
    }

    /// One look whether it still does what it should.
    async fn probe(&mut self) -> Option<VmExit> {
        match self.api.describe(PROBE_LIMIT).await {
            Ok(_) => {}
            Err(_) if self.process.is_stopped() => return Some(VmExit::Hung),
            Err(error) => {
                tracing::warn!(%error, folder = %self.folder.display(), "a VMM did not answer");
                self.unanswered += 1;
                return (self.unanswered >= HUNG_AFTER).then_some(VmExit::Hung);
            }
        }
        self.unanswered = 0;
        None
    }

    async fn snapshot(&self, kind: SnapshotType) -> Result<(), VmmError> {
        let root = self.root.clone();
        blocking(move || {
            // Of a try that was given up.
            root.forget(DEVICES_OUT)?;
            root.forget(MEMORY_OUT)
        })
        .await
        .map_err(VmmError::Control)?;
        let snapshot = SnapshotCreate {
            snapshot_type: kind,
            snapshot_path: DEVICES_OUT.into(),
            mem_file_path: MEMORY_OUT.into(),
        };
        self.api
            .create_snapshot(&snapshot, WORK_LIMIT)
            .await
            .map_err(|error| VmmError::Control(error.into()))
    }
}

#[tonic::async_trait]
impl Vm for FirecrackerVm {
    fn process(&self) -> Option<ProcessId> {
        Some(self.process.id())
    }

    fn moved(&mut self, folder: &Path) {
        folder.clone_into(&mut self.folder);
    }

    fn link_outlives_store(&self) -> bool {
        false
    }

    async fn connect(&mut self, deadline: Instant) -> Result<Box<dyn LinkStream>, VmmError> {
        let linked = async {
            let port = guest_link::VSOCK_PORT;
            let stream = vsock::connect(&self.root, VSOCK, port, deadline.into())
                .await
                .map_err(|error| error.to_string())?;
            guest_link::host::connect(stream, deadline.into())
                .await
                .map_err(|error| error.to_string())
        };
        tokio::select! {
            exit = self.process.wait() => Err(VmmError::Ended(exit)),
            linked = linked => match linked {
                Ok(link) => Ok(Box::new(link)),
                Err(error) => Err(VmmError::Link(error)),
            },
        }
    }

    async fn run(&mut self) -> Result<(), VmmError> {
        let resumed = self.api.set_state(VmState::Resumed, CALL_LIMIT).await;
        resumed.map_err(|error| VmmError::Control(error.into()))
    }

    async fn pause(&mut self) -> Result<(), VmmError> {
        let paused = self.api.set_state(VmState::Paused, WORK_LIMIT).await;
        paused.map_err(|error| VmmError::Control(error.into()))
    }

    async fn store_devices(&mut self, to: &Path) -> Result<(), VmmError> {
        let booted = self.booted;
        self.snapshot(if booted {
            SnapshotType::Full
        } else {
            SnapshotType::Diff
        })
        .await?;
        let (root, to, memory) = (self.root.clone(), to.to_owned(), self.folder.join(MEMORY));
        blocking(move || {
            root.take_copy(DEVICES_OUT, &to, LARGEST_DEVICES)?;
            if booted {
                root.take(MEMORY_OUT, &memory)
            } else {
                root.forget(MEMORY_OUT)
            }
        })
        .await
        .map_err(VmmError::Control)
    }

    async fn store_memory(&mut self, base: &Path, to: &Path) -> Result<(), VmmError> {
        memory::store_own(self.process.id().pid, &self.folder, base, to).await
    }

    async fn copy_memory(&mut self, copy: &Path) -> Result<(), VmmError> {
        memory::copy_own(self.process.id().pid, &self.folder, copy).await
    }

    async fn wait(&mut self) -> VmExit {
        loop {
            tokio::select! {
                exit = self.process.wait() => return match exit {
                    // A guest that reboots, panics (`panic=-1`) or resets ends it well.
                    VmExit::Code(0) => VmExit::Guest("it reset".into()),
                    other => other,
                },
                () = tokio::time::sleep(PROBE) => {}
            }
            if let Err(error) = jail::trim_log(&self.folder) {
                tracing::warn!(%error, folder = %self.folder.display(), "a log is not cut");
            }
            if let Some(exit) = self.probe().await {
                return exit;
            }
        }
    }

    async fn last_words(&mut self) -> LastWords {
        LastWords {
            guest: String::new(),
            vmm: jail::log_tail(&self.folder, LOG_TAIL),
        }
    }

    async fn kill(&mut self) {
        self.process.kill().await;
        if let Some(cgroup) = &self.cgroup {
            cgroup::remove(cgroup);
        }
        remove_jail(&self.folder).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_is_more_than_its_name() {
        let info = |microcode: &str, flags: &str| {
            format!(
                "processor : 0\ncpu family : 6\nmodel : 85\nmodel name : Xeon\nstepping : 7\nmicrocode : {microcode}\nflags : {flags}\n\
                 processor : 1\n"
            )
        };
        let one = cpu_identity(&info("0x1", "fpu vme"), "6.1.0\n");
        assert!(
            one.starts_with("Xeon (family 6, model 85, stepping 7, microcode 0x1, features "),
            "{one}"
        );
        assert!(one.ends_with("), Linux 6.1.0"), "{one}");
        assert_eq!(one, cpu_identity(&info("0x1", "vme fpu"), "6.1.0"));
        assert_ne!(one, cpu_identity(&info("0x2", "fpu vme"), "6.1.0"));
        assert_ne!(one, cpu_identity(&info("0x1", "fpu vme amx"), "6.1.0"));
        assert_ne!(one, cpu_identity(&info("0x1", "fpu vme"), "6.8.0"));
    }

    #[test]
    fn memory_is_the_templates_with_the_difference_and_the_template_stays() {
        let folder = tempfile::tempdir().unwrap();
        let (template, memory) = (folder.path().join("template"), folder.path().join(MEMORY));
        fs::write(&template, vec![1; 64 << 10]).unwrap();
        fs::hard_link(&template, &memory).unwrap();
        let difference = folder.path().join("diff");
        fs::write(&difference, b"no difference").unwrap();
        assert!(merge(&memory, &difference).is_err());
        assert_eq!(fs::read(&memory).unwrap(), fs::read(&template).unwrap());
        assert_eq!(
            fs::read_dir(folder.path()).unwrap().count(),
            3,
            "nothing is left"
        );
    }
}
