//! Processes that a daemon before this one has left: what is kept of each, and how they go on.

use std::{
    ffi::OsString,
    io,
    os::unix::ffi::{OsStrExt as _, OsStringExt as _},
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, Instant, SystemTime},
};

use nix::{
    sys::signal::Signal,
    time::{ClockId, clock_gettime},
};
use proto::envd::v1::{ProcessExited, StartRequest};
use tokio::{
    net::unix::pipe,
    sync::{Mutex as AsyncMutex, watch},
};

use super::{
    Process, Processes,
    input::{Input, Progress, Sink},
    request,
    source::{Side, Source},
    supervise::supervise,
};
use crate::{
    keeper::{EndedWord, Item, Keeper, Kept, Slot},
    logs,
    output::{Home, Left, Output},
    spawn::Ended,
    terminal::Terminal,
    users::User,
};

/// What a process is, from its start on.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Record {
    #[prost(message, optional, tag = "1")]
    request: Option<StartRequest>,
    #[prost(string, tag = "2")]
    user: String,
    #[prost(bytes = "vec", tag = "3")]
    cwd: Vec<u8>,
    #[prost(message, optional, tag = "4")]
    started: Option<prost_types::Timestamp>,
    /// By the monotonic clock.
    #[prost(uint64, tag = "5")]
    began_micros: u64,
}

impl Record {
    pub(super) fn of(request: &StartRequest, user: &User, cwd: &Path, started: SystemTime) -> Self {
        Self {
            request: Some(request.clone()),
            user: user.name.clone(),
            cwd: cwd.as_os_str().as_bytes().to_vec(),
            started: Some(started.into()),
            began_micros: monotonic_micros(),
        }
    }
}

fn monotonic_micros() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
    u64::try_from(now.as_micros()).unwrap_or(u64::MAX)
}

/// Where the output of a process is kept: of stdout, and of stderr.
pub(super) fn homes(keeper: &Keeper, number: u64) -> (Home, Home) {
    let home = |memory, file| Home {
        keeper: keeper.clone(),
        number,
        memory,
        file,
    };
    (
        home(Slot::StdoutMemory, Slot::StdoutFile),
        home(Slot::StderrMemory, Slot::StderrFile),
    )
}

impl Processes {
    /// Goes on with what was kept.
    pub(crate) fn go_on(&self, kept: Kept) {
        let count = kept.processes.len();
        self.table().next = kept.last_number;
        for (number, item) in kept.processes {
            if let Err(error) = self.take_over(number, item) {
                logs::warn(format_args!("process number {number} is lost: {error}"));
                self.keeper.forget(number);
            }
        }
        if count > 0 {
            logs::info(format_args!("{count} processes go on, or are remembered"));
        }
        self.sweep();
    }

    fn take_over(&self, number: u64, mut item: Item) -> io::Result<()> {
        let record = item.message::<Record>(Slot::Record)?.unwrap_or_default();
        let request = record.request.ok_or(io::ErrorKind::InvalidData)?;
        let exited: Option<ProcessExited> = item.message(Slot::Exited)?;
        let ended: Option<EndedWord> = item.message(Slot::Ended)?;
        let terminal = item
            .descriptor(Slot::Terminal)
            .map(Terminal::left)
            .transpose()?
            .map(Arc::new);
        let size = terminal.as_ref().and_then(|terminal| terminal.size());
        let stdin = item.descriptor(Slot::Stdin);
        let sink = match (&terminal, stdin) {
            (Some(terminal), _) => Some(Sink::Terminal(Arc::clone(terminal))),
            (None, Some(stdin)) => Some(Sink::Pipe(pipe::Sender::from_owned_fd(stdin)?)),
            (None, None) => None,
        };
        let stdout = match (&terminal, Side::left(&mut item)) {
            (Some(terminal), Some(side)) => Source::terminal(Arc::clone(terminal), side)?,
            _ => Source::left(&mut item, Slot::Stdout),
        };
        let stderr = Source::left(&mut item, Slot::Stderr);
        let progress = Progress::left(item.file(Slot::Input))?;
        let keeping = request::keeping(&request);
        let mut left = |memory, file, ended| Left {
            memory: item.file(memory),
            file: item.file(file).zip(item.number(file)),
            ended,
        };
        let (out_home, err_home) = homes(&self.keeper, number);
        let out = left(
            Slot::StdoutMemory,
            Slot::StdoutFile,
            exited.as_ref().map(|exited| exited.stdout_bytes),
        );
        let err = left(
            Slot::StderrMemory,
            Slot::StderrFile,
            exited.as_ref().map(|exited| exited.stderr_bytes),
        );
        let age = Duration::from_micros(monotonic_micros().saturating_sub(record.began_micros));
        let started = record.started.and_then(|it| SystemTime::try_from(it).ok());
        let is_over = exited.is_some();
        let group = self.guest.group(&format!("p{number}"))?;
        let mut ended = ended.map(EndedWord::read);
        if item.pid == 0 && !is_over {
            logs::warn(format_args!(
                "the daemon died while it started {}, which was ended",
                request.process_id
            ));
            if let Some(group) = &group {
                group.signal(Signal::SIGKILL)?;
            }
            ended = Some((Ended::by(Signal::SIGKILL), SystemTime::now()));
        }
        let process = Arc::new(Process {
            id: request.process_id.clone(),
            pid: item.pid,
            started: started.unwrap_or(SystemTime::UNIX_EPOCH),
            stdout: Arc::new(Output::restored(keeping, out_home, out)?),
            stderr: Arc::new(Output::restored(keeping, err_home, err)?),
            began: Instant::now().checked_sub(age).unwrap_or_else(Instant::now),
            user: record.user,
            cwd: OsString::from_vec(record.cwd).into(),
            number,
            ended: watch::Sender::new(ended),
            exited: watch::Sender::new(exited),
            keeper: self.keeper.clone(),
            deadline_passed: watch::Sender::new(false),
            stdin: AsyncMutex::new(Input { sink, progress }),
            group,
            terminal: Mutex::new(terminal),
            size: Mutex::new(size.or(request.terminal)),
            request,
        });
        let mut table = self.table();
        table.by_id.insert(process.id.clone(), Arc::clone(&process));
        if is_over {
            drop(table);
            self.retire(&process);
            return Ok(());
        }
        if process.pid != 0 {
            table.by_pid.insert(process.pid, Arc::clone(&process));
        }
        drop(table);
        tokio::spawn(supervise(self.clone(), process, stdout, stderr));
        Ok(())
    }
}
