//! Starting a program as a user, in a session of its own.
#![allow(unsafe_code)] // pre_exec: what a child does to itself between fork and exec

use std::{
    io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::process::CommandExt as _,
    },
    path::Path,
    process::{self, Child, Command},
};

use nix::{
    libc,
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        signal::Signal,
    },
    unistd::{Gid, Uid, chdir, setgid, setgroups, setsid, setuid, write},
};

use crate::{group::Group, logs, terminal, users::User};

/// Files a process may have open, as at a login, and how far it may raise that (getrlimit(2)).
const OPEN_FILES: (u64, u64) = (1024, 1 << 19);

/// What a process has for stdin, stdout and stderr.
#[derive(Debug)]
pub(crate) enum Stdio {
    /// Pipes; for stdin if asked.
    Pipes {
        /// Whether stdin is one, or empty.
        stdin: bool,
    },
    /// A terminal, which it controls.
    Terminal(OwnedFd),
}

/// What to start, checked and made whole.
#[derive(Debug)]
pub(crate) struct Plan<'a> {
    pub(crate) program: &'a Path,
    /// What it is called by itself; a login shell's begins with a dash.
    pub(crate) name: &'a str,
    pub(crate) arguments: &'a [String],
    pub(crate) cwd: &'a Path,
    pub(crate) env: &'a [(String, String)],
    pub(crate) user: &'a User,
    pub(crate) stdio: Stdio,
    /// The cgroup it has to be in before its program runs.
    pub(crate) group: Option<&'a Group>,
}

/// Starts it. The caller holds the reaper off until it knows the PID.
pub(crate) fn spawn(plan: Plan<'_>) -> io::Result<Child> {
    let mut command = Command::new(plan.program);
    command
        .arg0(plan.name)
        .args(plan.arguments)
        .env_clear()
        .envs(plan.env.iter().map(|(name, value)| (name, value)));
    let has_terminal = matches!(plan.stdio, Stdio::Terminal(_));
    match plan.stdio {
        Stdio::Pipes { stdin } => {
            command
                .stdin(if stdin {
                    process::Stdio::piped()
                } else {
                    process::Stdio::null()
                })
                .stdout(process::Stdio::piped())
                .stderr(process::Stdio::piped());
        }
        Stdio::Terminal(theirs) => {
            command
                .stdin(theirs.try_clone()?)
                .stdout(theirs.try_clone()?)
                .stderr(theirs);
        }
    }
    let (cwd, user) = (plan.cwd.to_owned(), plan.user.clone());
    let groups: Vec<Gid> = user.groups.iter().copied().map(Gid::from_raw).collect();
    let am_root = Uid::effective().is_root();
    let entrance = plan.group.map(Group::entrance).transpose()?;
    let (_, own) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let (soft, hard) = (OPEN_FILES.0.min(own), OPEN_FILES.1.min(own));
    // SAFETY: only system calls between fork and exec, on values made before the fork; none of them allocates.
    unsafe {
        command.pre_exec(move || {
            setsid()?;
            if has_terminal {
                terminal::take_control()?;
            }
            restore_oom_score();
            setrlimit(Resource::RLIMIT_NOFILE, soft, hard)?;
            if let Some(entrance) = &entrance {
                write(entrance.as_fd(), b"0")?;
            }
            if am_root {
                setgroups(&groups)?;
                setgid(Gid::from_raw(user.gid))?;
                setuid(Uid::from_raw(user.uid))?;
            }
            // After the user has changed: a directory only root may enter is not for others.
            chdir(&cwd)?;
            Ok(())
        });
    }
    command.spawn()
}

/// Lets envd, keeper and daemon, have as many files open as it keeps outputs of processes. What it starts has the usual number.
pub(crate) fn raise_own_limits() {
    let (_, hard) = OPEN_FILES;
    if let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
        logs::warn(format_args!("the limit of open files: {error}"));
    }
}

/// envd itself is protected from the out-of-memory killer; what it starts is not (proc_pid_oom_score_adj(5)).
fn restore_oom_score() {
    let path = c"/proc/self/oom_score_adj";
    // SAFETY: open(2), write(2) and close(2) are async-signal-safe; the path is a constant C string.
    unsafe {
        let fd = libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if fd >= 0 {
            libc::write(fd, b"0".as_ptr().cast(), 1);
            libc::close(fd);
        }
    }
}

/// A child that has ended and stays to be collected: waitid(2). What it used is known only then.
pub(crate) fn look_for_ended() -> io::Result<Option<Ended>> {
    let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: siginfo_t is plain data for which all zeroes is a value, and the pointer is valid for the call.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: as above.
    if unsafe { libc::waitid(libc::P_ALL, 0, &raw mut info, flags) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: of a child, or all zeroes, these are what the kernel has filled in.
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    let exited = info.si_code == libc::CLD_EXITED;
    Ok((pid != 0).then_some(Ended {
        pid,
        code: exited.then_some(status),
        signal: (!exited).then_some(status),
        cpu_micros: 0,
        peak_memory_bytes: 0,
    }))
}

/// CPU time and largest memory of a child that has ended, and how it ended: wait4(2), which no safe wrapper offers.
pub(crate) fn wait4(pid: i32) -> io::Result<Option<Ended>> {
    let mut status = 0;
    // SAFETY: both out-pointers are valid for the call; rusage is plain data for which all zeroes is a value.
    let (found, usage) = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        (
            libc::wait4(pid, &raw mut status, libc::WNOHANG, &raw mut usage),
            usage,
        )
    };
    match found {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(None),
        pid => {
            let micros = |time: libc::timeval| {
                time.tv_sec.unsigned_abs() * 1_000_000 + time.tv_usec.unsigned_abs()
            };
            let exited = libc::WIFEXITED(status);
            Ok(Some(Ended {
                pid,
                code: exited.then(|| libc::WEXITSTATUS(status)),
                signal: libc::WIFSIGNALED(status).then(|| libc::WTERMSIG(status)),
                cpu_micros: micros(usage.ru_utime) + micros(usage.ru_stime),
                // In KiB on Linux, getrusage(2).
                peak_memory_bytes: usage.ru_maxrss.unsigned_abs() * 1024,
            }))
        }
    }
}

/// How a child ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ended {
    pub(crate) pid: i32,
    pub(crate) code: Option<i32>,
    pub(crate) signal: Option<i32>,
    pub(crate) cpu_micros: u64,
    pub(crate) peak_memory_bytes: u64,
}

impl Ended {
    /// One of nobody knows which PID, ended before it was known.
    pub(crate) fn by(signal: Signal) -> Self {
        Self {
            pid: 0,
            code: None,
            signal: Some(signal as i32),
            cpu_micros: 0,
            peak_memory_bytes: 0,
        }
    }
}
