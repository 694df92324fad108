//! Commands. A stream that breaks is taken up again where it stopped: the process goes on meanwhile, and no byte is lost or seen
//! twice.

use std::{collections::HashMap, time::Duration};

use bytes::Bytes;
use proto::envd::v1::{
    AttachRequest, Backpressure, CloseInputRequest, OutputKept, OutputStream, ProcessEvent,
    ProcessExited, ProcessInfo, ProcessServiceListRequest, ResizeRequest, ResourceLimits,
    SendInputRequest, SignalRequest, SignalTarget, StartRequest, StdinMode, TerminalSize,
    WaitRequest, process_event, process_exited,
};
use rand::RngExt as _;
use tokio::time::Instant;
use tonic::{Code, Streaming};

use crate::{Error, Sandbox};

/// How long a stream that broke is tried to be taken up again.
const PATIENCE: Duration = Duration::from_secs(30);
const FIRST_WAIT: Duration = Duration::from_millis(50);
const LONGEST_WAIT: Duration = Duration::from_secs(2);

/// What to run.
#[derive(Debug, Clone, Default)]
pub struct Command {
    /// Program and arguments; none, with a terminal, is the user's login shell.
    pub argv: Vec<String>,
    /// Working directory.
    pub cwd: String,
    /// Added environment.
    pub env: HashMap<String, String>,
    /// User.
    pub user: String,
    /// Whether stdin is a pipe fed by [`Process::send_input`].
    pub stdin: bool,
    /// The process is ended after this long.
    pub deadline: Option<Duration>,
    /// Its ID; a random one by default.
    pub process_id: Option<String>,
    /// It has a terminal of this size.
    pub terminal: Option<TerminalSize>,
    /// What it and all it starts may take.
    pub limits: Option<ResourceLimits>,
    /// Whom it waits for when it writes faster than it is read; by default nobody, and who is too slow is told what it lost.
    pub backpressure: Backpressure,
    /// How much of its output is kept.
    pub output_kept: Option<OutputKept>,
    /// Whether its output is in the session's logs, too, line by line.
    pub log_output: bool,
}

impl Command {
    /// A program with arguments.
    pub fn new<S: Into<String>>(argv: impl IntoIterator<Item = S>) -> Self {
        Self {
            argv: argv.into_iter().map(Into::into).collect(),
            ..Self::default()
        }
    }
}

/// How a process ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Exit(pub ProcessExited);

impl Exit {
    /// As a shell says it: the code, or 128 + the signal.
    pub fn code(&self) -> i32 {
        match self.0.status {
            Some(process_exited::Status::Code(code)) => code,
            Some(process_exited::Status::Signal(signal)) => 128 + signal,
            None => 255,
        }
    }
}

/// Something a process did.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// It runs.
    Started {
        /// Its PID in the guest.
        pid: u32,
    },
    /// It wrote to stdout, or to its terminal.
    Stdout(Bytes),
    /// It wrote to stderr.
    Stderr(Bytes),
    /// It ended; nothing follows.
    Exited(Exit),
}

/// All a process wrote, and how it ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Output {
    /// Its stdout.
    pub stdout: Vec<u8>,
    /// Its stderr.
    pub stderr: Vec<u8>,
    /// How it ended.
    pub exit: Exit,
}

enum Source {
    Start(Streaming<proto::envd::v1::StartResponse>),
    Attach(Streaming<proto::envd::v1::AttachResponse>),
}

/// A started process, as a stream of events.
pub struct Process {
    sandbox: Sandbox,
    id: String,
    source: Source,
    stdout_seen: u64,
    stderr_seen: u64,
    over: bool,
    patience: Duration,
}

impl std::fmt::Debug for Process {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Process")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl Sandbox {
    /// Starts a process.
    pub async fn start(&self, command: Command) -> Result<Process, Error> {
        let id = command
            .process_id
            .unwrap_or_else(|| format!("{:016x}", rand::rng().random::<u64>()));
        let request = StartRequest {
            process_id: id.clone(),
            argv: command.argv,
            cwd: command.cwd,
            env: command.env,
            user: command.user,
            stdin: if command.stdin {
                StdinMode::Pipe
            } else {
                StdinMode::Null
            }
            .into(),
            deadline: command
                .deadline
                .and_then(|deadline| prost_types::Duration::try_from(deadline).ok()),
            terminal: command.terminal,
            limits: command.limits,
            backpressure: command.backpressure.into(),
            output_kept: command.output_kept,
            log_output: command.log_output,
            ..StartRequest::default()
        };
        let stream = self.processes().start(request).await?.into_inner();
        Ok(Process {
            sandbox: self.clone(),
            id,
            source: Source::Start(stream),
            stdout_seen: 0,
            stderr_seen: 0,
            over: false,
            patience: PATIENCE,
        })
    }

    /// A process that was started before, from these offsets of its stdout (or terminal) and stderr on.
    pub async fn attach(&self, id: &str, stdout: u64, stderr: u64) -> Result<Process, Error> {
        let stream = attach(self, id, stdout, stderr).await?;
        Ok(Process {
            sandbox: self.clone(),
            id: id.to_owned(),
            source: Source::Attach(stream),
            stdout_seen: stdout,
            stderr_seen: stderr,
            over: false,
            patience: PATIENCE,
        })
    }

    /// A process that was started before, from what it writes from now on.
    pub async fn attach_from_now(&self, id: &str) -> Result<Process, Error> {
        let request = AttachRequest {
            process_id: id.to_owned(),
            from_now: true,
            ..AttachRequest::default()
        };
        let stream = self.processes().attach(request).await?.into_inner();
        Ok(Process {
            sandbox: self.clone(),
            id: id.to_owned(),
            source: Source::Attach(stream),
            stdout_seen: 0,
            stderr_seen: 0,
            over: false,
            patience: PATIENCE,
        })
    }

    /// Running processes, and finished ones still remembered if they are wanted.
    pub async fn process_list(&self, include_finished: bool) -> Result<Vec<ProcessInfo>, Error> {
        let mut processes = Vec::new();
        let mut page_token = String::new();
        loop {
            let request = ProcessServiceListRequest {
                include_finished,
                page_size: 0,
                page_token,
            };
            let page = self.processes().list(request).await?.into_inner();
            processes.extend(page.processes);
            page_token = page.next_page_token;
            if page_token.is_empty() {
                return Ok(processes);
            }
        }
    }

    /// Waits for the end of a process.
    pub async fn wait(&self, id: &str) -> Result<Exit, Error> {
        let process_id = id.to_owned();
        let answer = self.processes().wait(WaitRequest { process_id }).await?;
        let exited = answer.into_inner().exited;
        exited.map(Exit).ok_or(Error::Incomplete("exit"))
    }

    /// The input and signals of a process that was started before.
    pub fn process(&self, id: &str) -> Remote {
        Remote {
            sandbox: self.clone(),
            id: id.to_owned(),
        }
    }

    /// Runs a command to its end. It waits for us if it writes faster than we read.
    pub async fn run<S: Into<String>>(
        &self,
        argv: impl IntoIterator<Item = S>,
    ) -> Result<Output, Error> {
        let command = Command {
            backpressure: Backpressure::WhileAttached,
            ..Command::new(argv)
        };
        self.start(command).await?.output().await
    }
}

async fn attach(
    sandbox: &Sandbox,
    id: &str,
    stdout_offset: u64,
    stderr_offset: u64,
) -> Result<Streaming<proto::envd::v1::AttachResponse>, Error> {
    let request = AttachRequest {
        process_id: id.to_owned(),
        stdout_offset,
        stderr_offset,
        from_now: false,
    };
    Ok(sandbox.processes().attach(request).await?.into_inner())
}

impl Process {
    /// Its ID.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// How long it is tried to take a stream up again that broke. Default: 30 s.
    pub fn set_patience(&mut self, patience: Duration) {
        self.patience = patience;
    }

    /// Offsets of the next byte of stdout (or the terminal) and stderr.
    pub fn offsets(&self) -> (u64, u64) {
        (self.stdout_seen, self.stderr_seen)
    }

    /// The next event; `None` after the exit.
    pub async fn next(&mut self) -> Result<Option<Event>, Error> {
        if self.over {
            return Ok(None);
        }
        loop {
            let event = match &mut self.source {
                Source::Start(stream) => stream
                    .message()
                    .await
                    .map(|message| message.and_then(|part| part.event)),
                Source::Attach(stream) => stream
                    .message()
                    .await
                    .map(|message| message.and_then(|part| part.event)),
            };
            let broken = match event {
                Ok(Some(event)) => match self.take(event) {
                    Some(event) => return Ok(Some(event)),
                    None => continue,
                },
                // A stream ends with the exit; one that ends before it was cut.
                Ok(None) => Error::from(tonic::Status::unavailable(
                    "the stream ended before the process did",
                )),
                Err(status) => Error::from(status),
            };
            if !broken.is_interruption() {
                return Err(broken);
            }
            self.take_up_again().await?;
        }
    }

    async fn take_up_again(&mut self) -> Result<(), Error> {
        let end = Instant::now() + self.patience;
        let mut wait = FIRST_WAIT;
        loop {
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(LONGEST_WAIT);
            match self.reattach().await {
                Err(error) if error.is_interruption() && Instant::now() < end => {}
                done => return done,
            }
        }
    }

    /// Takes the stream up again where it stopped, such as after a pause of the session had ended it.
    pub async fn reattach(&mut self) -> Result<(), Error> {
        let (stdout, stderr) = self.offsets();
        let stream = attach(&self.sandbox, &self.id, stdout, stderr).await?;
        self.source = Source::Attach(stream);
        Ok(())
    }

    /// Counts what was seen; `None` for what was seen before.
    fn take(&mut self, event: ProcessEvent) -> Option<Event> {
        match event.event? {
            process_event::Event::Started(started) => Some(Event::Started { pid: started.pid }),
            process_event::Event::Output(output) => {
                let is_stderr = output.stream() == OutputStream::Stderr;
                let seen = if is_stderr {
                    &mut self.stderr_seen
                } else {
                    &mut self.stdout_seen
                };
                // Of one attached from now on, the first bytes say where that is.
                *seen = (*seen).max(if *seen == 0 { output.offset } else { 0 });
                let old = usize::try_from(seen.saturating_sub(output.offset)).unwrap_or(usize::MAX);
                let fresh = output.data.get(old..).filter(|fresh| !fresh.is_empty())?;
                let fresh = output.data.slice_ref(fresh);
                *seen += fresh.len() as u64;
                Some(if is_stderr {
                    Event::Stderr(fresh)
                } else {
                    Event::Stdout(fresh)
                })
            }
            process_event::Event::Exited(exited) => {
                self.over = true;
                Some(Event::Exited(Exit(exited)))
            }
        }
    }

    /// Collects everything until the exit.
    pub async fn output(mut self) -> Result<Output, Error> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        while let Some(event) = self.next().await? {
            match event {
                Event::Started { .. } => {}
                Event::Stdout(bytes) => stdout.extend_from_slice(&bytes),
                Event::Stderr(bytes) => stderr.extend_from_slice(&bytes),
                Event::Exited(exit) => {
                    return Ok(Output {
                        stdout,
                        stderr,
                        exit,
                    });
                }
            }
        }
        Err(Error::Incomplete("exit"))
    }

    /// Its input and signals, for use while another task reads the events.
    pub fn remote(&self) -> Remote {
        Remote {
            sandbox: self.sandbox.clone(),
            id: self.id.clone(),
        }
    }
}

/// The input side of a process. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Remote {
    sandbox: Sandbox,
    id: String,
}

impl Remote {
    /// Writes to its stdin at an offset; sending the same bytes again is harmless, so that a call that broke is made again. Returns the
    /// next offset.
    pub async fn send_input(&self, offset: u64, data: Bytes) -> Result<u64, Error> {
        let end = Instant::now() + PATIENCE;
        let mut wait = FIRST_WAIT;
        loop {
            let request = SendInputRequest {
                process_id: self.id.clone(),
                data: data.clone(),
                offset: Some(offset),
            };
            match self.sandbox.processes().send_input(request).await {
                Ok(answer) => return Ok(answer.into_inner().next_offset),
                Err(status) => {
                    let error = Error::from(status);
                    if !error.is_interruption() || Instant::now() >= end {
                        return Err(error);
                    }
                }
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(LONGEST_WAIT);
        }
    }

    /// Writes to its stdin after all that was written before, once.
    pub async fn append_input(&self, data: Bytes) -> Result<u64, Error> {
        let request = SendInputRequest {
            process_id: self.id.clone(),
            data,
            offset: None,
        };
        let answer = self.sandbox.processes().send_input(request).await?;
        Ok(answer.into_inner().next_offset)
    }

    /// Changes the size of its terminal.
    pub async fn resize(&self, size: TerminalSize) -> Result<(), Error> {
        let request = ResizeRequest {
            process_id: self.id.clone(),
            size: Some(size),
        };
        self.sandbox.processes().resize(request).await?;
        Ok(())
    }

    /// Closes its stdin. A process that has ended needs no closing.
    pub async fn close_input(&self) -> Result<(), Error> {
        match self
            .sandbox
            .processes()
            .close_input(CloseInputRequest {
                process_id: self.id.clone(),
            })
            .await
        {
            Ok(_) => Ok(()),
            Err(status) if status.code() == Code::FailedPrecondition => Ok(()),
            Err(status) => Err(status.into()),
        }
    }

    /// Sends it a signal.
    pub async fn signal(&self, signal: i32) -> Result<(), Error> {
        self.signal_to(signal, SignalTarget::Process).await
    }

    /// Sends a signal to it, its process group, or it and all it started.
    pub async fn signal_to(&self, signal: i32, target: SignalTarget) -> Result<(), Error> {
        let request = SignalRequest {
            process_id: self.id.clone(),
            signal,
            target: target.into(),
        };
        self.sandbox.processes().signal(request).await?;
        Ok(())
    }
}
