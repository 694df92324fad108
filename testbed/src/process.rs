//! Child processes that never outlive the test process.
//!
//! The kernel sends a child its parent-death signal when the *thread* that made it ends (prctl(2), PR_SET_PDEATHSIG), and test
//! threads come and go. So one thread, which lives as long as the process, makes all children. `setpriv` of util-linux sets the
//! signal and the user without unsafe code here.

use std::{
    fs::File,
    io,
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{OnceLock, mpsc},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{PATIENCE, TestbedError, io_error};

const LOOK_EVERY: Duration = Duration::from_millis(5);

type Order = (Command, mpsc::SyncSender<io::Result<Child>>);

/// Starts a command on the thread that lives as long as the process.
fn spawn(command: Command) -> io::Result<Child> {
    static SPAWNER: OnceLock<mpsc::Sender<Order>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (orders, inbox) = mpsc::channel::<Order>();
        std::thread::spawn(move || {
            for (mut command, answer) in inbox {
                // Nobody waits any more: the child is dropped and dies with the process.
                let _ = answer.send(command.spawn());
            }
        });
        orders
    });
    let (answer, answered) = mpsc::sync_channel(1);
    let gone = || io::Error::other("the thread that starts processes is gone");
    spawner.send((command, answer)).map_err(|_| gone())?;
    answered.recv().map_err(|_| gone())?
}

/// A program in the PATH or one of the folders.
pub(crate) fn find(name: &'static str, folders: &[PathBuf]) -> Result<PathBuf, TestbedError> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let known = folders.iter().cloned().chain(std::env::split_paths(&path));
    known
        .map(|folder| folder.join(name))
        .find(|file| file.is_file())
        .ok_or(TestbedError::Missing(name))
}

/// Runs a program to its end.
pub(crate) fn run(command: &mut Command) -> Result<(), TestbedError> {
    let what = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(io_error(&*what))?;
    if output.status.success() {
        return Ok(());
    }
    Err(TestbedError::Failed {
        what,
        output: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

/// A server process.
#[derive(Debug)]
pub(crate) struct Server {
    child: Child,
    /// What it does last, and the kernel makes it do when the test process is gone.
    last_signal: Signal,
    log: PathBuf,
}

impl Server {
    /// Starts a program; `user` is who it runs as, if not whoever runs the test.
    pub(crate) fn start(
        program: &Path,
        arguments: &[String],
        user: Option<&str>,
        last_signal: Signal,
        log: &Path,
    ) -> Result<Self, TestbedError> {
        let mut command = Command::new(find("setpriv", &[])?);
        let signal = last_signal.as_str().trim_start_matches("SIG");
        command.args(["--pdeathsig", signal]);
        if let Some(user) = user {
            command.args(["--reuid", user, "--regid", user, "--init-groups"]);
        }
        let output = File::options()
            .create(true)
            .append(true)
            .open(log)
            .map_err(io_error(log.display().to_string()))?;
        let errors = output.try_clone().map_err(io_error("log"))?;
        command
            .arg("--")
            .arg(program)
            .args(arguments)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors);
        let child = spawn(command).map_err(io_error(program.display().to_string()))?;
        Ok(Self {
            child,
            last_signal,
            log: log.to_owned(),
        })
    }

    pub(crate) fn signal(&self, signal: Signal) -> Result<(), TestbedError> {
        let pid = Pid::from_raw(self.child.id().cast_signed());
        kill(pid, signal).map_err(|errno| io_error("signal")(errno.into()))
    }

    /// Waits until a condition holds; an error if the server ends before.
    pub(crate) fn wait_until(
        &mut self,
        what: &'static str,
        mut ready: impl FnMut() -> bool,
    ) -> Result<(), TestbedError> {
        let deadline = Instant::now() + PATIENCE;
        while !ready() {
            if let Some(status) = self.child.try_wait().map_err(io_error(what))? {
                return Err(self.ended(what, status));
            }
            self.pause(what, deadline)?;
        }
        Ok(())
    }

    /// Sends a signal and waits for the end.
    pub(crate) fn end(mut self, signal: Signal) -> Result<(), TestbedError> {
        self.signal(signal)?;
        let deadline = Instant::now() + PATIENCE;
        while self
            .child
            .try_wait()
            .map_err(io_error("waiting for a server"))?
            .is_none()
        {
            self.pause("the end of a server", deadline)?;
        }
        Ok(())
    }

    fn ended(&self, what: &'static str, status: ExitStatus) -> TestbedError {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let how = status.signal().map_or_else(
            || format!("exit {:?}", status.code()),
            |n| format!("signal {n}"),
        );
        TestbedError::Failed {
            what: format!("{what} ({how})"),
            output: log,
        }
    }

    fn pause(&self, what: &'static str, deadline: Instant) -> Result<(), TestbedError> {
        if Instant::now() > deadline {
            return Err(TestbedError::Slow {
                what,
                log: self.log.clone(),
            });
        }
        std::thread::sleep(LOOK_EVERY);
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(Some(_))) {
            return;
        }
        // A frozen process acts on no signal but SIGKILL until it goes on.
        let _ = self.signal(Signal::SIGCONT);
        let _ = self.signal(self.last_signal);
        let deadline = Instant::now() + Duration::from_secs(5);
        while matches!(self.child.try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                let _ = self.child.kill();
                let _ = self.child.wait();
                return;
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }
}
