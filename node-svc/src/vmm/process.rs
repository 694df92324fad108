//! VMM processes: started in a network namespace and a session of their own, so that they outlive node-svc, and named by PID
//! *and* start time, so that a PID used again is never taken for them.
#![allow(unsafe_code)] // pre_exec: what has to happen between fork and exec

use std::{
    ffi::OsString,
    fs::File,
    io::{self, Write as _},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::{fs::MetadataExt as _, process::CommandExt as _},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    fcntl::{FcntlArg, FdFlag, fcntl},
    sched::{CloneFlags, setns},
    sys::signal::{Signal, kill},
    unistd::{Gid, Pid, Uid, setgroups, setresgid, setresuid, setsid},
};
use proto::session::v1::GetSessionMetricsResponse;
use rustix::process::{WaitId, WaitIdOptions, waitid};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use serde::{Deserialize, Serialize};
use tokio::io::{Interest, unix::AsyncFd};

use super::{VmExit, users::User};

const GONE_POLL: Duration = Duration::from_millis(2);
const GONE_LIMIT: Duration = Duration::from_secs(10);

/// A process that cannot be confused with another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// PID.
    pub pid: i32,
    /// Start time in clock ticks since boot, field 22 of proc_pid_stat(5).
    pub start_ticks: u64,
}

impl ProcessId {
    /// Names the process that has this PID now.
    pub fn of(pid: i32) -> Option<Self> {
        let stat = procfs::process::Process::new(pid).ok()?.stat().ok()?;
        // A zombie has ended; only its parent still has to be told.
        (stat.state != 'Z').then_some(Self {
            pid,
            start_ticks: stat.starttime,
        })
    }

    /// Whether it still runs.
    pub fn is_alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }

    /// What it uses now: CPU time, memory by kind (proc_pid_smaps_rollup in proc(5)), threads. Blocking.
    pub fn usage(self) -> io::Result<GetSessionMetricsResponse> {
        let process = procfs::process::Process::new(self.pid).map_err(io::Error::other)?;
        let stat = process.stat().map_err(io::Error::other)?;
        let rollup = process.smaps_rollup().map_err(io::Error::other)?;
        let sum = |names: &[&str]| -> u64 {
            let maps = rollup.memory_map_rollup.iter();
            maps.map(|map| {
                let values = names.iter().map(|name| map.extension.map.get(*name));
                values.flatten().sum::<u64>()
            })
            .sum()
        };
        let ticks = (stat.utime + stat.stime) * 1000 / procfs::ticks_per_second();
        Ok(GetSessionMetricsResponse {
            cpu_time: prost_types::Duration::try_from(Duration::from_millis(ticks)).ok(),
            memory_bytes: sum(&["Rss"]),
            memory_private_bytes: sum(&["Private_Clean", "Private_Dirty"]),
            memory_shared_bytes: sum(&["Shared_Clean", "Shared_Dirty"]),
            host_threads: u32::try_from(stat.num_threads).unwrap_or_default(),
            ..GetSessionMetricsResponse::default()
        })
    }

    /// Kills it and waits until it is gone; for processes that are not our children. Blocking.
    pub fn kill_and_wait(self) -> io::Result<()> {
        let limit = Instant::now() + GONE_LIMIT;
        while self.is_alive() {
            kill(Pid::from_raw(self.pid), Signal::SIGKILL)?;
            if Instant::now() > limit {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("process {} does not die", self.pid),
                ));
            }
            std::thread::sleep(GONE_POLL);
        }
        Ok(())
    }
}

/// What a VMM's process is started with.
#[derive(Debug)]
pub struct Launch<'a> {
    /// The program.
    pub program: &'a Path,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// Its working folder; names in the arguments may be relative to it, and it can be found by it.
    pub folder: &'a Path,
    /// Its network namespace.
    pub netns: Option<&'a Path>,
    /// Where it says what goes wrong.
    pub output: File,
    /// Files it inherits under the numbers they have here.
    pub inherited: Vec<File>,
    /// Who it becomes; it stays root if nobody.
    pub user: Option<User>,
    /// Where it enters its cgroup (`cgroup.procs`).
    pub cgroup: Option<File>,
}

/// Starts a process in a network namespace and a session of its own, with nothing inherited but what is named.
///
/// Memory of guests is a private mapping of a file many share. A balloon gives a page back by punching a hole into the file and
/// then dropping the mapping's page; the hole would be everybody's. So fallocate(2) does nothing for this process and says that it
/// went well: the private page still goes. Disks must then neither discard nor write zeroes by it.
pub fn launch(launch: Launch<'_>) -> io::Result<Process> {
    start(launch, Some(without_fallocate()?))
}

/// The same for a process that may do all it asks for: Firecracker drops pages without touching files, and its disks need the call.
pub fn launch_unfiltered(launch: Launch<'_>) -> io::Result<Process> {
    start(launch, None)
}

fn start(launch: Launch<'_>, filter: Option<BpfProgram>) -> io::Result<Process> {
    let mut command = Command::new(launch.program);
    command.env_clear().env(
        "PATH",
        "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    );
    let errors = launch.output.try_clone()?;
    command
        .args(launch.arguments)
        .current_dir(launch.folder)
        .stdin(Stdio::null())
        .stdout(launch.output)
        .stderr(errors);
    let netns = launch.netns.map(File::open).transpose()?;
    let (inherited, cgroup, user) = (launch.inherited, launch.cgroup, launch.user);
    let group = user.and_then(|user| user.group).map(Gid::from_raw);
    // SAFETY: between fork and exec only write(2), setsid(2), setns(2), fcntl(2), setgroups(2), setresgid(2), setresuid(2), prctl(2)
    // and seccomp(2) are called, which allocate nothing and take no lock; files were opened and the filter was built before the fork.
    unsafe {
        command.pre_exec(move || {
            if let Some(mut cgroup) = cgroup.as_ref() {
                // 0 is whoever writes it.
                cgroup.write_all(b"0")?;
            }
            setsid()?;
            if let Some(netns) = &netns {
                setns(netns.as_fd(), CloneFlags::CLONE_NEWNET)?;
            }
            for file in &inherited {
                fcntl(file, FcntlArg::F_SETFD(FdFlag::empty()))?;
            }
            if let Some(user) = user {
                setgroups(group.as_slice())?;
                let gid = Gid::from_raw(user.uid);
                setresgid(gid, gid, gid)?;
                let uid = Uid::from_raw(user.uid);
                setresuid(uid, uid, uid)?;
            }
            if let Some(filter) = &filter {
                seccompiler::apply_filter(filter).map_err(|_| io::Error::last_os_error())?;
            }
            Ok(())
        });
    }
    Process::of_child(&command.spawn()?)
}

fn without_fallocate() -> io::Result<BpfProgram> {
    let arch = std::env::consts::ARCH
        .try_into()
        .map_err(io::Error::other)?;
    SeccompFilter::new(
        [(nix::libc::SYS_fallocate, Vec::new())].into(),
        SeccompAction::Allow,
        SeccompAction::Errno(0),
        arch,
    )
    .and_then(BpfProgram::try_from)
    .map_err(io::Error::other)
}

/// A VMM's process, our child or that of an earlier node-svc. Dropping it does not end it.
#[derive(Debug)]
pub struct Process {
    id: ProcessId,
    pidfd: AsyncFd<OwnedFd>,
    is_child: bool,
    exit: Option<VmExit>,
}

impl Process {
    fn of_child(child: &std::process::Child) -> io::Result<Self> {
        let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
        // A child that has ended is a zombie until it is waited for, so its PID is still its own.
        let pidfd = pidfd(pid)?;
        let stat = procfs::process::Process::new(pid)
            .and_then(|process| process.stat())
            .map_err(io::Error::other)?;
        Ok(Self {
            id: ProcessId {
                pid,
                start_ticks: stat.starttime,
            },
            pidfd,
            is_child: true,
            exit: None,
        })
    }

    /// Takes over a process that an earlier node-svc started; `None` if it is gone.
    pub fn adopt(id: ProcessId) -> io::Result<Option<Self>> {
        let pidfd = match pidfd(id.pid) {
            Ok(pidfd) => pidfd,
            Err(error) if error.raw_os_error() == Some(nix::libc::ESRCH) => return Ok(None),
            Err(error) => return Err(error),
        };
        // Looked at after the descriptor was opened: it cannot change under us now.
        Ok(id.is_alive().then_some(Self {
            id,
            pidfd,
            is_child: false,
            exit: None,
        }))
    }

    /// Which it is.
    pub fn id(&self) -> ProcessId {
        self.id
    }

    /// Waits until it has ended. Cancel-safe.
    pub async fn wait(&mut self) -> VmExit {
        if let Some(exit) = &self.exit {
            return exit.clone();
        }
        if let Err(error) = self.pidfd.readable().await {
            tracing::error!(%error, pid = self.id.pid, "a VMM cannot be waited for");
        }
        let exit = if self.is_child {
            let flags = WaitIdOptions::EXITED;
            match waitid(WaitId::PidFd(self.pidfd.get_ref().as_fd()), flags) {
                Ok(Some(status)) => match (status.exit_status(), status.terminating_signal()) {
                    (Some(code), _) => VmExit::Code(code),
                    (None, Some(signal)) => VmExit::Signal(signal),
                    (None, None) => VmExit::Unknown,
                },
                _ => VmExit::Unknown,
            }
        } else {
            VmExit::Unknown
        };
        self.exit = Some(exit.clone());
        exit
    }

    /// Kills it; returns when it is gone.
    pub async fn kill(&mut self) {
        if self.exit.is_none()
            && let Err(error) = rustix::process::pidfd_send_signal(
                self.pidfd.get_ref(),
                rustix::process::Signal::KILL,
            )
        {
            tracing::debug!(%error, "the VMM had ended");
        }
        self.wait().await;
    }

    /// Whether it was stopped by a signal or a debugger, so that nothing of it moves.
    pub fn is_stopped(&self) -> bool {
        let stat = procfs::process::Process::new(self.id.pid).and_then(|process| process.stat());
        stat.is_ok_and(|stat| matches!(stat.state, 'T' | 't'))
    }
}

fn pidfd(pid: i32) -> io::Result<AsyncFd<OwnedFd>> {
    let pid = rustix::process::Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?;
    let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
    // SAFETY: an owned descriptor is open, and the same, for as long as it is owned.
    let registered = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) };
    registered.map_err(io::Error::from)
}

/// Ends every process that works in the folder, below it, or in a jail there: what a journal that cannot be read would have named. Blocking.
pub fn kill_all_below(folder: &Path) -> io::Result<()> {
    let Ok(folder) = folder.canonicalize() else {
        return Ok(());
    };
    // By what they are: in a jail, the path of its root is `/`.
    let id_of = |path: &Path| {
        let metadata = std::fs::metadata(path).ok()?;
        Some((metadata.dev(), metadata.ino()))
    };
    let mut jails = Vec::new();
    let below = std::fs::read_dir(&folder)?.flatten();
    for place in below.map(|entry| entry.path()).chain([folder.clone()]) {
        let root = super::firecracker::jail::root_in(&place);
        jails.extend(root.as_deref().and_then(id_of));
    }
    for process in procfs::process::all_processes().map_err(io::Error::other)? {
        // One that ended while we looked is gone.
        let Ok(process) = process else { continue };
        let cwd = PathBuf::from(format!("/proc/{}/cwd", process.pid));
        let works_here = process.cwd().is_ok_and(|cwd| cwd.starts_with(&folder))
            || id_of(&cwd).is_some_and(|cwd| jails.contains(&cwd));
        if works_here
            && process.pid != std::process::id().cast_signed()
            && let Some(id) = ProcessId::of(process.pid)
        {
            id.kill_and_wait()?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_its_pid_and_its_start() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let id = ProcessId::of(i32::try_from(child.id()).unwrap()).unwrap();
        assert!(id.is_alive());
        assert!(
            !ProcessId {
                start_ticks: id.start_ticks + 1,
                ..id
            }
            .is_alive(),
            "another process with the same PID"
        );
        id.kill_and_wait().unwrap();
        assert!(!id.is_alive());
        child.wait().unwrap();
    }

    #[tokio::test]
    async fn an_end_is_told_to_parents_and_to_others() {
        let folder = tempfile::tempdir().unwrap();
        let start = |script: &str| {
            launch(Launch {
                program: Path::new("sh"),
                arguments: vec!["-c".into(), script.into()],
                folder: folder.path(),
                netns: None,
                output: File::create(folder.path().join("log")).unwrap(),
                inherited: Vec::new(),
                user: None,
                cgroup: None,
            })
            .unwrap()
        };
        assert_eq!(start("exit 3").wait().await, VmExit::Code(3));
        let mut killed = start("kill -9 $$; sleep 60");
        assert_eq!(killed.wait().await, VmExit::Signal(9));
        assert_eq!(killed.wait().await, VmExit::Signal(9), "as often as asked");
        let mut running = start("exec sleep 60");
        let mut adopted = Process::adopt(running.id()).unwrap().unwrap();
        running.kill().await;
        assert_eq!(adopted.wait().await, VmExit::Unknown);
        assert!(Process::adopt(running.id()).unwrap().is_none());
    }

    #[tokio::test]
    async fn no_process_punches_holes_and_all_in_a_folder_are_found() {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("data");
        std::fs::write(&data, [7; 8192]).unwrap();
        let mut process = launch(Launch {
            program: Path::new("sh"),
            arguments: vec![
                "-c".into(),
                "fallocate -p -l 4096 data && exec sleep 60".into(),
            ],
            folder: folder.path(),
            netns: None,
            output: File::create(folder.path().join("log")).unwrap(),
            inherited: Vec::new(),
            user: None,
            cgroup: None,
        })
        .unwrap();
        while std::fs::read_to_string(format!("/proc/{}/comm", process.id().pid))
            .unwrap()
            .trim()
            != "sleep"
        {
            tokio::task::yield_now().await;
        }
        assert_eq!(std::fs::read(&data).unwrap(), [7; 8192]);
        kill_all_below(folder.path()).unwrap();
        assert_eq!(process.wait().await, VmExit::Signal(9));
    }
}
