//! Where users' processes live, and how they are stopped as one: a cgroup (cgroup-v2.rst, "cgroup.freeze").
//!
//! envd stays in the hierarchy's root, which cannot be frozen; every process it starts enters a cgroup of its own below `user` before its
//! program runs ([`Group`]), and its children are born there. Cgroups that users make beside it (container engines do) are frozen with it, and a process that moved itself
//! out to the root is put back first. Root in a guest can get around this: it owns the guest, and cheats nobody else.

use std::{
    fs::{self, File},
    io::{self, Read as _, Seek as _},
    os::{fd::AsFd as _, unix::process::parent_id},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::group::Group;

pub(crate) const USER: &str = "user";
/// Below it, for processes that had left.
const STRAYS: &str = "strays";
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];
/// Of the memory that is free when there are no users' processes yet, for envd and the kernel alone: as much, or that part of it, if that is more.
/// When users' processes have taken all the rest, one of them is killed at once. Without it the guest would first throw out every page of a
/// program that it could read again, envd's answers with them, and may never come to an end of it: of a guest of 128 MiB with 8 MiB reserved
/// nothing was heard any more (Linux 6.1.192); with 12 MiB a process was killed within 4 s.
const RESERVE: u64 = 16 << 20;
const RESERVE_PART: u64 = 32;
/// A process that waits for a disk freezes when the disk has answered; longer than that and something is wrong.
const LIMIT: Duration = Duration::from_secs(5);
/// A process that forks out of the root faster than it is put back.
const PASSES: usize = 8;

/// The cgroups below one folder, all of them users'.
#[derive(Debug)]
pub(crate) struct Freezer {
    root: PathBuf,
}

impl Freezer {
    /// Of a cgroup v2 hierarchy that is all envd's.
    pub(crate) fn new(root: PathBuf) -> io::Result<Self> {
        let freezer = Self { root };
        freezer.ensure()?;
        Ok(freezer)
    }

    /// Makes `user`, if it is not there: while it is empty, root in the guest may remove it. What is below it may be limited as far as the
    /// kernel can.
    fn ensure(&self) -> io::Result<()> {
        match fs::create_dir(self.user()) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
            Err(error) => return Err(error),
        }
        let there = fs::read_to_string(self.root.join("cgroup.controllers"))?;
        let wanted = CONTROLLERS
            .iter()
            .filter(|name| there.split_whitespace().any(|it| it == **name));
        let wanted: Vec<String> = wanted.map(|name| format!("+{name}")).collect();
        if !wanted.is_empty() {
            for folder in [&self.root, &self.user()] {
                fs::write(folder.join("cgroup.subtree_control"), wanted.join(" "))?;
            }
        }
        if let (Some(free), true) = (free_memory(), wanted.iter().any(|name| name == "+memory")) {
            let most = free - RESERVE.max(free / RESERVE_PART).min(free / 2);
            fs::write(self.user().join("memory.max"), most.to_string())?;
        }
        Ok(())
    }

    /// Where all processes of users are.
    pub(crate) fn user(&self) -> PathBuf {
        self.root.join(USER)
    }

    /// A cgroup for a process and all it will start.
    pub(crate) fn group(&self, name: &str) -> io::Result<Group> {
        match Group::make(&self.user(), name) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.ensure()?;
                Group::make(&self.user(), name)
            }
            made => made,
        }
    }

    /// Stops every process of users and waits until each stands still. Blocking, for a few seconds at most.
    pub(crate) fn freeze(&self) -> Result<(), String> {
        let limit = Instant::now() + LIMIT;
        self.ensure().map_err(|error| error.to_string())?;
        freeze(&self.user(), limit)?;
        self.put_back().map_err(|error| error.to_string())?;
        for folder in self.folders()? {
            freeze(&folder, limit)?;
        }
        Ok(())
    }

    /// Lets them run again. Again is a success.
    pub(crate) fn thaw(&self) -> Result<(), String> {
        for folder in self.folders()? {
            write(&folder.join("cgroup.freeze"), "0")?;
        }
        Ok(())
    }

    /// Waits until no process is left in `user`; those that stay are killed. Blocking.
    pub(crate) fn empty(&self, patience: Duration) -> Result<(), String> {
        let folder = self.user();
        if wait(&folder, "populated", "0", Instant::now() + patience).is_ok() {
            return Ok(());
        }
        write(&folder.join("cgroup.kill"), "1")?;
        wait(&folder, "populated", "0", Instant::now() + LIMIT)
    }

    fn folders(&self) -> Result<Vec<PathBuf>, String> {
        let failed = |error: io::Error| format!("{}: {error}", self.root.display());
        let mut folders = Vec::new();
        for entry in fs::read_dir(&self.root).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if entry.file_type().map_err(failed)?.is_dir() {
                folders.push(entry.path());
            }
        }
        // Without it nothing was frozen where processes are, or nothing would be thawed there.
        if folders.iter().any(|folder| folder.ends_with(USER)) {
            Ok(folders)
        } else {
            Err(format!("{} is gone", self.user().display()))
        }
    }

    /// Puts processes that are in the root where they belong.
    fn put_back(&self) -> io::Result<()> {
        // The daemon, and its keeper.
        let own = [std::process::id(), parent_id()].map(|pid| pid.to_string());
        for _ in 0..PASSES {
            let members = fs::read_to_string(self.root.join("cgroup.procs"))?;
            let mut strays = members
                .lines()
                // What has no program is the kernel's, or has ended (proc_pid_exe(5)).
                .filter(|pid| {
                    own.iter().all(|own| own != pid)
                        && fs::read_link(format!("/proc/{pid}/exe")).is_ok()
                })
                .peekable();
            if strays.peek().is_none() {
                return Ok(());
            }
            let home = self.user().join(STRAYS);
            match fs::create_dir(&home) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
            for pid in strays {
                match fs::write(home.join("cgroup.procs"), pid) {
                    Err(error) if error.raw_os_error() != Some(nix::libc::ESRCH) => {
                        return Err(error);
                    }
                    _ => {}
                }
            }
        }
        Err(io::Error::other(
            "processes leave the cgroup faster than they are put back",
        ))
    }
}

/// What programs could be given, in bytes (`MemAvailable` of proc_meminfo(5)). Not all that the guest has: of a small one the kernel takes a third.
pub(crate) fn free_memory() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    kib.checked_mul(1024)
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
}

fn freeze(folder: &Path, limit: Instant) -> Result<(), String> {
    write(&folder.join("cgroup.freeze"), "1")?;
    wait(folder, "frozen", "1", limit)
}

/// Waits until `cgroup.events` says so. The kernel tells of changes by POLLPRI, once for each time the file was read.
fn wait(folder: &Path, key: &str, value: &str, limit: Instant) -> Result<(), String> {
    let path = folder.join("cgroup.events");
    let failed = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let mut file = File::open(&path).map_err(|error| failed(&error))?;
    loop {
        let mut text = String::new();
        file.rewind().map_err(|error| failed(&error))?;
        file.read_to_string(&mut text)
            .map_err(|error| failed(&error))?;
        let line = format!("{key} {value}");
        if text.lines().any(|found| found == line) {
            return Ok(());
        }
        let left = limit.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(failed(&format!("no \"{line}\" in time")));
        }
        // Rounded up, or the last millisecond would be spent asking.
        let left =
            PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLPRI)];
        match poll(&mut fds, left) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(failed(&error)),
        }
    }
}
