//! QEMU's microvm machine: with KVM where it really works, else emulated (TCG), so that it runs on any Linux machine.
//!
//! The device model is as small as it goes: two block devices, one network device, one serial port for the link, entropy, balloon.
//! Facts this command line rests on were measured with QEMU 7.2; see `docs/qemu.md`.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, Read as _, Seek as _, Write as _},
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use nix::fcntl::{Flock, FlockArg};
use proto::node::v1::VmmKind;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::{net::UnixStream, process::Child};

use super::{BootSpec, LinkStream, Vm, VmExit, Vmm, VmmError, process, process::ProcessId, qmp};

const CONSOLE_BYTES: u32 = 64 << 10;
const CONSOLE_TAIL: usize = 4 << 10;
const CONNECT_RETRY: Duration = Duration::from_millis(5);
const TRIAL_LIMIT: Duration = Duration::from_secs(10);
const MIB: u64 = 1 << 20;
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
        };
        match (only_tcg || !Path::new("/dev/kvm").exists(), trial_kernel) {
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

    fn arguments(&self, spec: &BootSpec) -> Vec<OsString> {
        let memory = spec.memory_bytes.div_ceil(MIB);
        let mut arguments: Vec<OsString> = Vec::new();
        let mut add = |flag: &str, value: String| {
            arguments.push(flag.into());
            arguments.push(value.into());
        };
        add(
            "-M",
            "microvm,acpi=on,rtc=on,pit=off,pic=off,isa-serial=on,usb=off,memory-backend=mem"
                .into(),
        );
        match self.accelerator {
            Accelerator::Kvm => {
                add("-accel", "kvm".into());
                add("-cpu", "host".into());
            }
            Accelerator::Tcg => {
                add("-accel", "tcg,thread=multi".into());
                add("-cpu", "max".into());
            }
        }
        add("-smp", spec.vcpus.to_string());
        add("-m", format!("{memory}M"));
        add(
            "-object",
            format!("memory-backend-memfd,id=mem,size={memory}M,share=on"),
        );
        add(
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".into(),
        );
        add("-display", "none".into());
        add("-kernel", path(&spec.kernel));
        add("-initrd", path(&spec.initrd));
        add("-append", self.command_line());
        add(
            "-chardev",
            format!("ringbuf,id=console,size={CONSOLE_BYTES}"),
        );
        add("-serial", "chardev:console".into());
        add(
            "-chardev",
            format!(
                "socket,id=qmp,path={},server=on,wait=off",
                path(&qmp_socket(&spec.folder))
            ),
        );
        add("-mon", "chardev=qmp,mode=control".into());
        add("-device", "virtio-serial-device,max_ports=2".into());
        add(
            "-chardev",
            format!(
                "socket,id=link,path={},server=on,wait=off",
                path(&link_socket(&spec.folder))
            ),
        );
        add(
            "-device",
            "virtserialport,chardev=link,name=sandmesh.link,nr=1".into(),
        );
        add(
            "-drive",
            format!(
                "if=none,id=rootfs,file={},format=raw,readonly=on",
                path(&spec.rootfs)
            ),
        );
        add(
            "-device",
            "virtio-blk-device,drive=rootfs,serial=rootfs".into(),
        );
        add(
            "-drive",
            format!(
                "if=none,id=scratch,file={},format=raw,discard=unmap",
                path(&spec.scratch)
            ),
        );
        add(
            "-device",
            "virtio-blk-device,drive=scratch,serial=scratch".into(),
        );
        if let Some(place) = &spec.place {
            add(
                "-netdev",
                format!("tap,id=net,ifname={},script=no,downscript=no", place.tap),
            );
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
        arguments.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(OsString::from));
        arguments
    }
}

/// A comma in a value starts another option in QEMU's syntax; it is doubled to mean itself.
fn path(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

fn qmp_socket(folder: &Path) -> PathBuf {
    folder.join("qmp.sock")
}

fn link_socket(folder: &Path) -> PathBuf {
    folder.join("link.sock")
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
        let output = File::create(spec.folder.join("qemu.log")).map_err(VmmError::Spawn)?;
        let netns = spec.place.as_ref().map(|place| place.netns.as_path());
        let mut command =
            process::detached(&self.program, netns, output).map_err(VmmError::Spawn)?;
        command.args(self.arguments(&spec));
        let child = tokio::process::Command::from(command)
            .spawn()
            .map_err(VmmError::Spawn)?;
        let process = child
            .id()
            .and_then(|pid| i32::try_from(pid).ok())
            .and_then(ProcessId::of);
        Ok(Box::new(QemuVm {
            child,
            process,
            folder: spec.folder,
        }))
    }
}

/// A running QEMU.
#[derive(Debug)]
struct QemuVm {
    child: Child,
    process: Option<ProcessId>,
    folder: PathBuf,
}

impl QemuVm {
    fn said(&self) -> String {
        let said = fs::read(self.folder.join("qemu.log")).unwrap_or_default();
        String::from_utf8_lossy(
            said.get(said.len().saturating_sub(CONSOLE_TAIL)..)
                .unwrap_or_default(),
        )
        .into_owned()
    }
}

#[tonic::async_trait]
impl Vm for QemuVm {
    fn process(&self) -> Option<ProcessId> {
        self.process
    }

    async fn connect(&mut self, deadline: Instant) -> Result<Box<dyn LinkStream>, VmmError> {
        let socket = link_socket(&self.folder);
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
                exit = self.wait() => return Err(VmmError::Ended(exit)),
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

    async fn wait(&mut self) -> VmExit {
        match self.child.wait().await {
            Ok(status) => match (status.code(), status.signal()) {
                (Some(code), _) => VmExit::Code(code),
                (None, signal) => VmExit::Signal(signal.unwrap_or_default()),
            },
            Err(error) => {
                tracing::error!(%error, "a VMM cannot be waited for");
                VmExit::Code(-1)
            }
        }
    }

    async fn console_tail(&mut self) -> String {
        let arguments = json!({"device": "console", "size": CONSOLE_BYTES, "format": "utf8"});
        let console = match qmp::execute(&qmp_socket(&self.folder), "ringbuf-read", arguments).await
        {
            Ok(value) => value.as_str().unwrap_or_default().to_owned(),
            // QEMU is gone, and its buffer with it; its own last words are on disk.
            Err(_) => String::new(),
        };
        let all = format!("{console}{}", self.said());
        let start = all.len().saturating_sub(CONSOLE_TAIL);
        let start = (start..all.len())
            .find(|at| all.is_char_boundary(*at))
            .unwrap_or(all.len());
        all.get(start..).unwrap_or_default().to_owned()
    }

    async fn kill(&mut self) {
        if let Err(error) = self.child.start_kill() {
            tracing::debug!(%error, "the VMM had ended");
        }
        self.wait().await;
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
        };
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
