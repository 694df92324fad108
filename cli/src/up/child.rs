//! A process that ends when its supervisor does, however that happens.
#![allow(unsafe_code)] // pre_exec

use std::{fs::File, io, os::unix::process::CommandExt as _, path::Path, process::Stdio};

use nix::sys::{prctl, signal::Signal};
use tokio::process::{Child, Command};

/// Who a process runs as.
#[derive(Debug, Clone, Copy)]
pub(super) struct User {
    pub(super) uid: u32,
    pub(super) gid: u32,
}

/// Starts a program with its output in a log.
pub(super) fn start(
    program: &Path,
    arguments: &[String],
    log: &Path,
    user: Option<User>,
) -> io::Result<Child> {
    let output = File::options().create(true).append(true).open(log)?;
    let mut command = std::process::Command::new(program);
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .process_group(0);
    if let Some(user) = user {
        command.uid(user.uid).gid(user.gid);
    }
    let supervisor = nix::unistd::getpid();
    // SAFETY: prctl(2) and getppid(2) are async-signal-safe, and nothing else happens between fork and exec.
    unsafe {
        command.pre_exec(move || {
            prctl::set_pdeathsig(Signal::SIGKILL)?;
            // It may have died before the line above.
            if nix::unistd::getppid() == supervisor {
                Ok(())
            } else {
                Err(io::ErrorKind::BrokenPipe.into())
            }
        });
    }
    Command::from(command).kill_on_drop(true).spawn()
}
