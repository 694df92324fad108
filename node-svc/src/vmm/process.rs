//! VMM processes: started in a network namespace and a session of their own, so that they outlive node-svc, and named by PID
//! *and* start time, so that a PID used again is never taken for them.
#![allow(unsafe_code)] // pre_exec: setns and setsid between fork and exec

use std::{
    fs::File,
    io,
    os::{fd::AsFd as _, unix::process::CommandExt as _},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sched::{CloneFlags, setns},
    sys::signal::{Signal, kill},
    unistd::{Pid, setsid},
};
use serde::{Deserialize, Serialize};

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

/// Prepares a command to run in a network namespace, in a session of its own, with nothing inherited but its output file.
pub fn detached(program: &Path, netns: Option<&Path>, output: File) -> io::Result<Command> {
    let mut command = Command::new(program);
    let errors = output.try_clone()?;
    command.env_clear().env(
        "PATH",
        "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    );
    command.stdin(Stdio::null()).stdout(output).stderr(errors);
    let netns = netns.map(File::open).transpose()?;
    // SAFETY: between fork and exec only setsid(2) and setns(2) are called, which are async-signal-safe; the file was opened
    // before the fork.
    unsafe {
        command.pre_exec(move || {
            setsid()?;
            if let Some(netns) = &netns {
                setns(netns.as_fd(), CloneFlags::CLONE_NEWNET)?;
            }
            Ok(())
        });
    }
    Ok(command)
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
}
