//! QEMU's microvm machine: with KVM where it really works, else emulated (TCG), so that it runs on any Linux machine.
//!
//! The device model is as small as it goes: two block devices, one network device, one serial port for the link, entropy, balloon.
//! Facts this command line rests on were measured with QEMU 7.2; see `docs/qemu.md`.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, Read as _, Seek as _, Write as _},
    os::{
        fd::AsRawFd as _,
        unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _, chown},
    },
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use nix::fcntl::{Flock, FlockArg};
use proto::node::v1::VmmKind;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::net::UnixStream;

use super::{
    BootSpec, LastWords, LinkStream, MEMORY, Machine, ROOM, RestoreSpec, Vm, VmExit, Vmm, VmmError,
    cgroup::{self, Cgroups},
    memory,
    process::{self, Launch, Process, ProcessId},
    qmp::Qmp,
    users::{UidRange, User},
};
use crate::slot;

const CONSOLE_BYTES: u32 = 64 << 10;
const CONSOLE_TAIL: usize = 8 << 10;
/// All that can be emulated, but for the words that make the guest's kernel and C library copy by `rep movsb`, which is emulated byte by byte:
/// without them the guest link moves three to five times as much (docs/qemu.md).
const EMULATED_CPU: &str = "max,erms=off,fsrm=off";
const CONNECT_RETRY: Duration = Duration::from_millis(2);
/// From QEMU's start until it listens.
const QMP_LIMIT: Duration = Duration::from_secs(10);
/// A command that only has to be heard.
const COMMAND_LIMIT: Duration = Duration::from_secs(2);
/// A command that writes a file, or waits for disks.
const WORK_LIMIT: Duration = Duration::from_mins(1);
/// Between two looks whether QEMU still answers.
const PROBE: Duration = Duration::from_millis(500);
/// How long it may leave a look unanswered: at once when it stands still, else for as long as a busy host may need.
const PROBE_LIMIT: Duration = Duration::from_secs(1);
const HUNG_AFTER: u32 = 10;
/// A guest is asked to give back what it does not use if that may be as much; it keeps some free memory, or a part of all if that is more.
const WORTH_SHRINKING: u64 = 32 << 20;
const KEPT_FREE: u64 = 16 << 20;
const KEPT_FREE_PART: u64 = 16;
/// How long it has for it, in all and without any progress.
const SHRINK_LIMIT: Duration = Duration::from_secs(3);
const SHRINK_STALL: Duration = Duration::from_millis(300);
/// QEMU tells each change, but not more than once in a second.
const SHRUNK_POLL: Duration = Duration::from_millis(10);
/// Between two looks whether state is loaded.
const LOADED_POLL: Duration = Duration::from_millis(1);
const TRIAL_LIMIT: Duration = Duration::from_secs(10);
const MIB: u64 = 1 << 20;
/// What the emulator keeps of the guest's translated code at most.
const TRANSLATED_MIB: u64 = 256;
/// Names in [`ROOM`], QEMU's working folder: the folder above may be renamed.
const QMP_SOCKET: &str = "qmp.sock";
const LINK_SOCKET: &str = "link.sock";
const NEW_DEVICES: &str = "devices.new";
/// In the guest's folder.
const LOG: &str = "qemu.log";
const KVM: &str = "/dev/kvm";
/// Number of the set of descriptors that is the root image.
const ROOTFS_SET: u32 = 1;
/// Since 8.2 a file that may only be read can be mapped privately (`rom=off` of memory-backend-file).
const MAPS_READ_ONLY_FILES: (u32, u32) = (8, 2);
/// Emptied when the host boots, as a verdict must be.
const VERDICTS: &str = "/run/sandmesh";

/// How QEMU runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Accelerator {
    Kvm,
    Tcg,
}

/// QEMU on this host.
#[derive(Debug)]
pub struct Qemu {
    program: PathBuf,
    version: String,
    accelerator: Accelerator,
    tsc_khz: Option<u64>,
    cgroups: Option<Cgroups>,
    users: Option<UidRange>,
}

/// Files QEMU gets opened: its user could not open them by name.
struct Opened {
    rootfs: File,
    tap: Option<File>,
}

impl Opened {
    fn into_files<const N: usize>(self, more: [File; N]) -> Vec<File> {
        let mut files = Vec::from(more);
        files.push(self.rootfs);
        files.extend(self.tap);
        files
    }
}

/// What a trial boot showed, kept for all nodes of this host until it boots anew or has another QEMU.
#[derive(Debug, Serialize, Deserialize, PartialEq, Eq)]
struct Verdict {
    accelerator: Accelerator,
    qemu: String,
}

/// QEMU cannot be used here.
#[derive(Debug, thiserror::Error)]
pub enum QemuError {
    /// The program does not run.
    #[error("{program} does not run: {cause}")]
    Program {
        /// Which.
        program: PathBuf,
        /// Why.
        cause: String,
    },
}

impl Qemu {
    /// Finds out what QEMU can do here. KVM is believed only after `trial_kernel` has booted on it. Blocking, for up to ten seconds
    /// the first time since the host booted.
    pub fn probe(
        program: &Path,
        trial_kernel: Option<&Path>,
        only_tcg: bool,
    ) -> Result<Self, QemuError> {
        let failed = |cause: String| QemuError::Program {
            program: program.to_owned(),
            cause,
        };
        let output = std::process::Command::new(program)
            .arg("--version")
            .output()
            .map_err(|error| failed(error.to_string()))?;
        let said = String::from_utf8_lossy(&output.stdout);
        let version = said
            .lines()
            .next()
            .and_then(|line| line.strip_prefix("QEMU emulator version "))
            .ok_or_else(|| failed("it does not tell its version".into()))?
            .to_owned();
        let mut qemu = Self {
            program: program.to_owned(),
            version,
            accelerator: Accelerator::Tcg,
            tsc_khz: tsc_khz(),
            cgroups: None,
            users: None,
        };
        match (only_tcg || !Path::new(KVM).exists(), trial_kernel) {
            (true, _) => {}
            (false, Some(kernel)) => match qemu.verdict(kernel, Path::new(VERDICTS)) {
                Ok(accelerator) => qemu.accelerator = accelerator,
                Err(error) => {
                    tracing::warn!(%error, "whether KVM works cannot be found out; guests are emulated");
                }
            },
            (false, None) => {
                tracing::warn!(
                    "guests are emulated: without --trial-kernel it is not known whether KVM works"
                );
            }
        }
        Ok(qemu)
    }

    /// Holds each guest to its size, where the host can.
    #[must_use]
    pub fn with_cgroups(mut self, cgroups: Option<Cgroups>) -> Self {
        self.cgroups = cgroups;
        self
    }

    /// Has each guest's QEMU run as a user of its own, by its slot; those without a slot stay root.
    #[must_use]
    pub fn with_users(mut self, users: UidRange) -> Self {
        self.users = Some(users);
        if self.accelerator == Accelerator::Kvm
            && let Err(error) = kvm_group()
        {
            tracing::error!(%error, "guests are emulated: no user but root may use KVM");
            self.accelerator = Accelerator::Tcg;
        }
        self
    }

    fn maps_read_only_files(&self) -> bool {
        let mut numbers = self.version.split('.').map_while(|part| part.parse().ok());
        numbers.next().zip(numbers.next()) >= Some(MAPS_READ_ONLY_FILES)
    }

    /// The verdict of an earlier trial on this host, else of one made now; others that ask meanwhile wait for it.
    fn verdict(&self, kernel: &Path, folder: &Path) -> io::Result<Accelerator> {
        fs::create_dir_all(folder)?;
        let file = File::options()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(folder.join("kvm-verdict.json"))?;
        let mut file = Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, errno)| io::Error::from(errno))?;
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        if let Ok(known) = serde_json::from_str::<Verdict>(&text)
            && known.qemu == self.version
        {
            return Ok(known.accelerator);
        }
        let accelerator = if self.trial_boot(kernel)? {
            Accelerator::Kvm
        } else {
            Accelerator::Tcg
        };
        tracing::info!(?accelerator, "KVM trial boot");
        let verdict = Verdict {
            accelerator,
            qemu: self.version.clone(),
        };
        file.set_len(0)?;
        file.rewind()?;
        file.write_all(&serde_json::to_vec(&verdict)?)?;
        Ok(accelerator)
    }

    /// A kernel without a root panics and, with `panic=-1`, ends QEMU: when that happens in time, KVM ran a kernel.
    fn trial_boot(&self, kernel: &Path) -> io::Result<bool> {
        let mut child = std::process::Command::new(&self.program)
            .args([
                "-M",
                "microvm,acpi=on,rtc=on,pit=off,pic=off,isa-serial=off",
                "-accel",
                "kvm",
                "-cpu",
                "host",
            ])
            .args([
                "-m",
                "128M",
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-no-reboot",
                "-kernel",
            ])
            .arg(kernel)
            .args(["-append", "panic=-1 reboot=t quiet"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let limit = Instant::now() + TRIAL_LIMIT;
        loop {
            if let Some(status) = child.try_wait()? {
                return Ok(status.success());
            }
            if Instant::now() > limit {
                child.kill()?;
                child.wait()?;
                return Ok(false);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn command_line(&self) -> String {
        let mut line =
            "console=ttyS0 quiet no_timer_check random.trust_cpu=on panic=-1 reboot=t 8250.nr_uarts=1".to_owned();
        // Without it one emulated boot in three hangs while the delay loop is calibrated.
        if let (Accelerator::Tcg, Some(khz)) = (self.accelerator, self.tsc_khz) {
            line = format!("{line} tsc_early_khz={khz}");
        }
        line
    }

    /// `memory` is how the memory's file is mapped; `more` follows the machine that a boot and a restore have in common.
    fn arguments(
        &self,
        machine: &Machine,
        opened: &Opened,
        memory: &str,
        more: &[OsString],
    ) -> Vec<OsString> {
        let size = machine.memory_bytes.div_ceil(MIB);
        let mut arguments: Vec<OsString> = Vec::new();
        let mut add = |flag: &str, value: String| {
            arguments.push(flag.into());
            arguments.push(value.into());
        };
        add(
            "-M",
            "microvm,acpi=on,rtc=on,pit=off,pic=off,isa-serial=on,usb=off,memory-backend=mem,suppress-vmdesc=on"
                .into(),
        );
        match self.accelerator {
            Accelerator::Kvm => {
                add("-accel", "kvm".into());
                add("-cpu", "host".into());
            }
            Accelerator::Tcg => {
                add(
                    "-accel",
                    format!("tcg,thread=multi,tb-size={TRANSLATED_MIB}"),
                );
                add("-cpu", EMULATED_CPU.into());
            }
        }
        add("-smp", machine.vcpus.to_string());
        add("-m", format!("{size}M"));
        add(
            "-object",
            format!("memory-backend-file,id=mem,size={size}M,mem-path=../{MEMORY},{memory}"),
        );
        add(
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".into(),
        );
        add("-display", "none".into());
        add(
            "-chardev",
            format!("ringbuf,id=console,size={CONSOLE_BYTES}"),
        );
        add("-serial", "chardev:console".into());
        add(
            "-chardev",
            format!("socket,id=qmp,path={QMP_SOCKET},server=on,wait=off"),
        );
        add("-mon", "chardev=qmp,mode=control".into());
        add("-device", "virtio-serial-device,max_ports=2".into());
        add(
            "-chardev",
            format!("socket,id=link,path={LINK_SOCKET},server=on,wait=off"),
        );
        add(
            "-device",
            "virtserialport,chardev=link,name=sandmesh.link,nr=1".into(),
        );
        add(
            "-add-fd",
            format!("fd={},set={ROOTFS_SET}", opened.rootfs.as_raw_fd()),
        );
        add(
            "-drive",
            format!("if=none,id=rootfs,file=/dev/fdset/{ROOTFS_SET},format=raw,readonly=on"),
        );
        add(
            "-device",
            "virtio-blk-device,drive=rootfs,serial=rootfs".into(),
        );
        add(
            "-drive",
            format!(
                "if=none,id=scratch,file={},format=raw,discard=ignore",
                path(&from_room(machine, &machine.scratch))
            ),
        );
        // Both would be fallocate(2), which does nothing here: see `process::launch`.
        add(
            "-device",
            "virtio-blk-device,drive=scratch,serial=scratch,discard=off,write-zeroes=off".into(),
        );
        if let (Some(place), Some(tap)) = (&machine.place, &opened.tap) {
            add("-netdev", format!("tap,id=net,fd={}", tap.as_raw_fd()));
            add(
                "-device",
                format!("virtio-net-device,netdev=net,mac={}", place.mac),
            );
        }
        add("-device", "virtio-rng-device".into());
        add(
            "-device",
            "virtio-balloon-device,deflate-on-oom=on,free-page-reporting=on".into(),
        );
        // A guest that powers off or panics leaves QEMU standing, so that its console can still be read.
        arguments.extend(
            [
                "-nodefaults",
                "-no-user-config",
                "-no-reboot",
                "-no-shutdown",
            ]
            .map(OsString::from),
        );
        arguments.extend_from_slice(more);
        arguments
    }

    fn vm(&self, process: Process, folder: &Path) -> QemuVm {
        let cgroups = self.cgroups.as_ref();
        let cgroup = cgroups.and_then(|cgroups| cgroups.of_process(process.id().pid));
        QemuVm {
            process,
            folder: folder.to_owned(),
            cgroup,
            qmp: None,
            unanswered: 0,
            is_shrunk: true,
        }
    }

    /// Opens what QEMU gets, and gives its user what it needs by name. Blocking, for less than a millisecond.
    fn prepare(&self, machine: &Machine, boots: bool) -> Result<(Opened, Option<User>), VmmError> {
        let user = match (self.users, &machine.place) {
            (Some(users), Some(place)) => {
                let uid = users.of(place.slot).map_err(io::Error::other);
                let group = match self.accelerator {
                    Accelerator::Kvm => kvm_group().map_err(VmmError::Spawn)?,
                    Accelerator::Tcg => None,
                };
                Some(User {
                    uid: uid.map_err(VmmError::Spawn)?,
                    group,
                })
            }
            _ => None,
        };
        self.furnish(machine, user, boots)
            .map_err(VmmError::Spawn)?;
        let tap = machine.place.as_ref().map(|place| {
            slot::open_tap(&place.netns, &place.tap)
                .map(File::from)
                .map_err(|error| VmmError::Spawn(io::Error::other(error)))
        });
        let opened = Opened {
            rootfs: File::open(&machine.rootfs).map_err(VmmError::Spawn)?,
            tap: tap.transpose()?,
        };
        Ok((opened, user))
    }

    /// The guest's folder stays root's, so that nothing in it can be put in the place of something else; its user may pass through it
    /// to its disk, its memory, and the room that is its own.
    fn furnish(&self, machine: &Machine, user: Option<User>, boots: bool) -> io::Result<()> {
        let room = machine.folder.join(ROOM);
        let uid = user.map(|user| user.uid);
        let give = |path: &Path, mode: u32| {
            chown(path, uid, uid)?;
            fs::set_permissions(path, fs::Permissions::from_mode(mode))
        };
        fs::set_permissions(&machine.folder, fs::Permissions::from_mode(0o711))?;
        match fs::remove_dir_all(&room) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        fs::DirBuilder::new().mode(0o700).create(&room)?;
        give(&room, 0o700)?;
        give(&machine.scratch, 0o600)?;
        let memory = machine.folder.join(MEMORY);
        if boots {
            File::create_new(&memory)?.set_len(machine.memory_bytes.div_ceil(MIB) * MIB)?;
            return give(&memory, 0o600);
        }
        // Others map it too. An older QEMU opens it for writing, though it maps it privately.
        let mode = if self.maps_read_only_files() {
            0o444
        } else {
            0o666
        };
        let now = fs::metadata(&memory)?;
        if now.uid() != 0 || now.mode() & 0o777 != mode {
            chown(&memory, Some(0), Some(0))?;
            fs::set_permissions(&memory, fs::Permissions::from_mode(mode))?;
        }
        Ok(())
    }

    fn start(
        &self,
        machine: &Machine,
        arguments: Vec<OsString>,
        inherited: Vec<File>,
        user: Option<User>,
    ) -> Result<QemuVm, VmmError> {
        let output = File::create(machine.folder.join(LOG)).map_err(VmmError::Spawn)?;
        let id = machine.folder.file_name().unwrap_or_default();
        let cgroup = self
            .cgroups
            .as_ref()
            .map(|cgroups| {
                let translated = match self.accelerator {
                    Accelerator::Kvm => 0,
                    Accelerator::Tcg => TRANSLATED_MIB * MIB,
                };
                let memory = machine.memory_bytes + translated;
                cgroups.make(&id.to_string_lossy(), machine.vcpus, memory)
            })
            .transpose()
            .map_err(VmmError::Spawn)?;
        let process = process::launch(Launch {
            program: &self.program,
            arguments,
            folder: &machine.folder.join(ROOM),
            netns: machine.place.as_ref().map(|place| place.netns.as_path()),
            output,
            inherited,
            user,
            cgroup,
        })
        .map_err(VmmError::Spawn)?;
        Ok(self.vm(process, &machine.folder))
    }
}

/// The group that may use KVM, if not everybody may.
fn kvm_group() -> io::Result<Option<u32>> {
    let device = fs::metadata(KVM)?;
    match device.mode() {
        mode if mode & 0o006 == 0o006 => Ok(None),
        mode if mode & 0o060 == 0o060 => Ok(Some(device.gid())),
        mode => Err(io::Error::other(format!(
            "{KVM} has mode {:o}; let a group use it: chmod 0660, and a group of its own",
            mode & 0o777
        ))),
    }
}

/// A path as QEMU sees it from its working folder.
fn from_room(machine: &Machine, file: &Path) -> PathBuf {
    match file.strip_prefix(&machine.folder) {
        Ok(name) => Path::new("..").join(name),
        Err(_) => file.to_owned(),
    }
}

/// The name of a file that a process inherits, for the process.
fn inherited_name(file: &File) -> OsString {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

/// Takes a file from the user that wrote it. What is taken is that file and nothing it may lead to. Blocking.
fn take(made: &Path, to: &Path) -> io::Result<()> {
    fs::rename(made, to)?;
    let taken = fs::symlink_metadata(to)?;
    if !taken.is_file() || taken.nlink() != 1 {
        fs::remove_file(to)?;
        return Err(io::Error::other("the VMM wrote something that is no file"));
    }
    chown(to, Some(0), Some(0))?;
    fs::set_permissions(to, fs::Permissions::from_mode(0o600))
}

/// A comma in a value starts another option in QEMU's syntax; it is doubled to mean itself.
fn path(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

fn tsc_khz() -> Option<u64> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = cpuinfo.lines().find(|line| line.starts_with("cpu MHz"))?;
    let mhz: f64 = line.split(':').nth(1)?.trim().parse().ok()?;
    Some((mhz * 1000.0) as u64)
}

#[tonic::async_trait]
impl Vmm for Qemu {
    fn kind(&self) -> VmmKind {
        match self.accelerator {
            Accelerator::Kvm => VmmKind::QemuKvm,
            Accelerator::Tcg => VmmKind::QemuTcg,
        }
    }

    fn version(&self) -> &str {
        &self.version
    }

    fn needs_place(&self) -> bool {
        true
    }

    async fn boot(&self, spec: BootSpec) -> Result<Box<dyn Vm>, VmmError> {
        let (opened, user) = self.prepare(&spec.machine, true)?;
        let open = |path: &Path| File::open(path).map_err(VmmError::Spawn);
        let (kernel, initrd) = (open(&spec.kernel)?, open(&spec.initrd)?);
        let more = [
            "-kernel".into(),
            inherited_name(&kernel),
            "-initrd".into(),
            inherited_name(&initrd),
            "-append".into(),
            spec.arguments.after(self.command_line()).into(),
        ];
        let arguments = self.arguments(&spec.machine, &opened, "share=on", &more);
        let inherited = opened.into_files([kernel, initrd]);
        let vm = self.start(&spec.machine, arguments, inherited, user)?;
        Ok(Box::new(vm))
    }

    async fn restore(&self, spec: RestoreSpec) -> Result<Box<dyn Vm>, VmmError> {
        let devices = File::open(&spec.devices).map_err(VmmError::Spawn)?;
        let number = devices.as_raw_fd();
        let more = [
            "-S",
            "-incoming",
            "defer",
            "-global",
            "migration.send-configuration=off",
        ]
        .map(OsString::from);
        let (opened, user) = self.prepare(&spec.machine, false)?;
        let memory = if self.maps_read_only_files() {
            "share=off,readonly=on,rom=off"
        } else {
            "share=off"
        };
        let arguments = self.arguments(&spec.machine, &opened, memory, &more);
        let inherited = opened.into_files([devices]);
        let mut vm = self.start(&spec.machine, arguments, inherited, user)?;
        match vm.load(number, spec.difference).await {
            Ok(()) => Ok(Box::new(vm)),
            Err(error) => {
                vm.kill().await;
                let said = vm.said();
                Err(match error {
                    // QEMU ends when it cannot load, and says why in its log only.
                    VmmError::Control(_) if !said.trim().is_empty() => {
                        VmmError::Load(said.trim().to_owned())
                    }
                    other => other,
                })
            }
        }
    }

    async fn adopt(
        &self,
        folder: &Path,
        process: ProcessId,
    ) -> Result<Option<Box<dyn Vm>>, VmmError> {
        let process = Process::adopt(process).map_err(VmmError::Spawn)?;
        Ok(process.map(|process| Box::new(self.vm(process, folder)) as Box<dyn Vm>))
    }
}

/// A running QEMU.
#[derive(Debug)]
struct QemuVm {
    process: Process,
    folder: PathBuf,
    cgroup: Option<PathBuf>,
    /// Taken while a command is under way, so that a cancelled one is never answered to another.
    qmp: Option<Qmp>,
    unanswered: u32,
    /// It may have given memory back on demand, also before it was stored.
    is_shrunk: bool,
}

impl QemuVm {
    fn room(&self) -> PathBuf {
        self.folder.join(ROOM)
    }

    fn said(&self) -> String {
        let said = fs::read(self.folder.join(LOG)).unwrap_or_default();
        String::from_utf8_lossy(
            said.get(said.len().saturating_sub(CONSOLE_TAIL)..)
                .unwrap_or_default(),
        )
        .into_owned()
    }

    async fn execute(
        &mut self,
        command: &str,
        arguments: Value,
        limit: Duration,
    ) -> io::Result<Value> {
        let mut qmp = if let Some(qmp) = self.qmp.take() {
            qmp
        } else {
            let socket = self.room().join(QMP_SOCKET);
            let deadline = tokio::time::Instant::now() + limit;
            Qmp::connect(&socket, deadline).await?
        };
        let answer = qmp.execute(command, arguments, limit).await?;
        self.qmp = Some(qmp);
        Ok(answer)
    }

    async fn control(
        &mut self,
        command: &str,
        arguments: Value,
        limit: Duration,
    ) -> Result<Value, VmmError> {
        self.execute(command, arguments, limit)
            .await
            .map_err(VmmError::Control)
    }

    async fn status(&mut self, limit: Duration) -> io::Result<String> {
        let answer = self.execute("query-status", json!({}), limit).await?;
        let status = answer.get("status").and_then(Value::as_str);
        Ok(status.unwrap_or_default().to_owned())
    }

    /// Memory first: devices read their queues from it while they are loaded.
    async fn load(&mut self, devices: i32, difference: Option<PathBuf>) -> Result<(), VmmError> {
        let socket = self.room().join(QMP_SOCKET);
        let connected = tokio::select! {
            exit = self.process.wait() => return Err(VmmError::Control(io::Error::other(exit.to_string()))),
            connected = Qmp::connect(&socket, tokio::time::Instant::now() + QMP_LIMIT) => connected,
        };
        self.qmp = Some(connected.map_err(VmmError::Control)?);
        if let Some(difference) = difference {
            memory::apply_own(self.process.id().pid, &self.folder, difference).await?;
        }
        self.control(
            "migrate-incoming",
            json!({"uri": format!("fd:{devices}")}),
            COMMAND_LIMIT,
        )
        .await?;
        let limit = Instant::now() + WORK_LIMIT;
        while self
            .status(COMMAND_LIMIT)
            .await
            .map_err(VmmError::Control)?
            == "inmigrate"
        {
            if Instant::now() > limit {
                return Err(VmmError::Load("it takes too long".into()));
            }
            tokio::time::sleep(LOADED_POLL).await;
        }
        Ok(())
    }

    /// What its balloon leaves it, in bytes.
    async fn size(&mut self) -> Result<u64, VmmError> {
        let answer = self
            .control("query-balloon", json!({}), COMMAND_LIMIT)
            .await?;
        answer
            .get("actual")
            .and_then(Value::as_u64)
            .ok_or_else(|| VmmError::Control(io::Error::other("query-balloon says nothing of use")))
    }

    async fn resize(&mut self, bytes: u64) -> Result<(), VmmError> {
        let arguments = json!({"value": bytes});
        self.control("balloon", arguments, COMMAND_LIMIT)
            .await
            .map(drop)
    }

    /// One look whether it still does what it should.
    async fn probe(&mut self) -> Option<VmExit> {
        match self.status(PROBE_LIMIT).await.as_deref() {
            Ok(status @ ("shutdown" | "guest-panicked" | "internal-error")) => {
                return Some(VmExit::Guest(status.into()));
            }
            // The host's disk is full: the guest waits, and goes on as soon as there is room.
            Ok("io-error") => {
                tracing::warn!(folder = %self.folder.display(), "a guest waits for its disk");
                if let Err(error) = self.execute("cont", json!({}), COMMAND_LIMIT).await {
                    tracing::debug!(%error, "it still waits");
                }
            }
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
}

#[tonic::async_trait]
impl Vm for QemuVm {
    fn process(&self) -> Option<ProcessId> {
        Some(self.process.id())
    }

    fn moved(&mut self, folder: &Path) {
        folder.clone_into(&mut self.folder);
    }

    async fn connect(&mut self, deadline: Instant) -> Result<Box<dyn LinkStream>, VmmError> {
        let socket = self.room().join(LINK_SOCKET);
        let stream = loop {
            // QEMU makes the socket some milliseconds after its start; there is nothing to wait on but the file system.
            match UnixStream::connect(&socket).await {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > deadline => {
                    return Err(VmmError::Link(error.to_string()));
                }
                Err(_) => {}
            }
            tokio::select! {
                exit = self.process.wait() => return Err(VmmError::Ended(exit)),
                () = tokio::time::sleep(CONNECT_RETRY) => {}
            }
        };
        tokio::select! {
            exit = self.wait() => Err(VmmError::Ended(exit)),
            link = guest_link::host::connect(stream, deadline.into()) => match link {
                Ok(link) => Ok(Box::new(link)),
                Err(error) => Err(VmmError::Link(error.to_string())),
            },
        }
    }

    async fn run(&mut self) -> Result<(), VmmError> {
        // It may be at work still on what an earlier node-svc asked for.
        self.control("cont", json!({}), WORK_LIMIT).await?;
        if self.is_shrunk {
            // More than there is is all there is.
            self.resize(i64::MAX.unsigned_abs()).await?;
            self.is_shrunk = false;
        }
        Ok(())
    }

    async fn shrink(&mut self, free: u64) -> Result<(), VmmError> {
        let own = memory::own_bytes(self.process.id().pid, &self.folder).await?;
        let size = self.size().await?;
        // Which of its own pages are free is not known; the kernel gives away first what was freed last.
        let spare = free.saturating_sub(KEPT_FREE.max(size / KEPT_FREE_PART));
        let given = spare.min(own);
        if given < WORTH_SHRINKING {
            return Ok(());
        }
        let target = size.saturating_sub(given).max(KEPT_FREE);
        self.is_shrunk = true;
        self.resize(target).await?;
        let limit = Instant::now() + SHRINK_LIMIT;
        let (mut least, mut since) = (size, Instant::now());
        while least > target && Instant::now() < limit && since.elapsed() < SHRINK_STALL {
            tokio::time::sleep(SHRUNK_POLL).await;
            let now = self.size().await?;
            if now < least {
                (least, since) = (now, Instant::now());
            }
        }
        tracing::debug!(size, target, least, "a guest gave memory back");
        Ok(())
    }

    async fn pause(&mut self) -> Result<(), VmmError> {
        self.control("stop", json!({}), WORK_LIMIT).await.map(drop)
    }

    async fn store_devices(&mut self, to: &Path) -> Result<(), VmmError> {
        // The devices alone, without memory, whatever the name says; `live` is about giving the disks away.
        let arguments = json!({"filename": NEW_DEVICES, "live": false});
        self.control("xen-save-devices-state", arguments, WORK_LIMIT)
            .await?;
        let (made, to) = (self.room().join(NEW_DEVICES), to.to_owned());
        crate::work::blocking(move || take(&made, &to))
            .await
            .map_err(io::Error::other)
            .and_then(|taken| taken)
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
                exit = self.process.wait() => {
                    let out_of_memory = self.cgroup.as_deref().is_some_and(cgroup::was_out_of_memory);
                    return if out_of_memory { VmExit::OutOfMemory } else { exit };
                }
                () = tokio::time::sleep(PROBE) => {}
            }
            if let Some(exit) = self.probe().await {
                return exit;
            }
        }
    }

    async fn last_words(&mut self) -> LastWords {
        let arguments = json!({"device": "console", "size": CONSOLE_BYTES, "format": "utf8"});
        let console = match self.execute("ringbuf-read", arguments, COMMAND_LIMIT).await {
            Ok(value) => value.as_str().unwrap_or_default().to_owned(),
            // QEMU is gone, and its buffer with it; its own last words are on disk.
            Err(_) => String::new(),
        };
        let start = console.len().saturating_sub(CONSOLE_TAIL);
        let start = (start..console.len())
            .find(|at| console.is_char_boundary(*at))
            .unwrap_or(console.len());
        LastWords {
            guest: console.get(start..).unwrap_or_default().to_owned(),
            vmm: self.said(),
        }
    }

    async fn kill(&mut self) {
        self.process.kill().await;
        if let Some(cgroup) = &self.cgroup {
            cgroup::remove(cgroup);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_in_paths_stay_in_the_path() {
        assert_eq!(path(Path::new("/a,b/c")), "/a,,b/c");
    }

    #[test]
    fn only_a_file_is_taken_and_not_what_it_leads_to() {
        let folder = tempfile::tempdir().unwrap();
        let (made, to) = (folder.path().join("made"), folder.path().join("to"));
        fs::write(&made, "devices").unwrap();
        take(&made, &to).unwrap();
        assert_eq!(fs::read(&to).unwrap(), b"devices");
        std::os::unix::fs::symlink("/etc/passwd", &made).unwrap();
        assert!(take(&made, &to).is_err());
        assert!(!to.exists());
        fs::write(&to, "another's").unwrap();
        fs::hard_link(&to, &made).unwrap();
        assert!(take(&made, &folder.path().join("linked")).is_err());
    }

    #[test]
    fn a_trial_is_made_once_and_only_a_kernel_that_ran_counts() {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("qemu");
        let calls = folder.path().join("calls");
        // Stands in for a QEMU on which KVM works: what it is asked to boot decides.
        let script = format!(
            "#!/bin/sh\necho x >> {}\ncase \"$*\" in *good*) exit 0;; esac\nexit 1\n",
            calls.display()
        );
        fs::write(&program, script).unwrap();
        fs::set_permissions(
            &program,
            std::os::unix::fs::PermissionsExt::from_mode(0o755),
        )
        .unwrap();
        let qemu = |version: &str| Qemu {
            program: program.clone(),
            version: version.into(),
            accelerator: Accelerator::Tcg,
            tsc_khz: None,
            cgroups: None,
            users: None,
        };
        for (version, maps) in [
            ("7.2.22 (Debian)", false),
            ("8.2.0", true),
            ("10.0.2", true),
        ] {
            assert_eq!(qemu(version).maps_read_only_files(), maps, "{version}");
        }
        let verdict = |version, kernel: &str| {
            qemu(version)
                .verdict(Path::new(kernel), &folder.path().join("run"))
                .unwrap()
        };
        assert_eq!(verdict("1", "bad"), Accelerator::Tcg);
        assert_eq!(verdict("1", "good"), Accelerator::Tcg, "remembered");
        assert_eq!(verdict("2", "good"), Accelerator::Kvm, "another QEMU");
        assert_eq!(verdict("2", "bad"), Accelerator::Kvm, "remembered");
        assert_eq!(fs::read_to_string(calls).unwrap().lines().count(), 2);
    }
}
