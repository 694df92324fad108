//! Commands. A stream that breaks is taken up again where it stopped: the process goes on meanwhile, and no byte is lost or seen
//! twice.

use std::{collections::HashMap, time::Duration};

use bytes::Bytes;
use proto::envd::v1::{
    AttachRequest, CloseInputRequest, OutputStream, ProcessEvent, ProcessExited, SendInputRequest,
    SignalRequest, StartRequest, StdinMode, process_event, process_exited,
};
use rand::RngExt as _;
use tonic::{Code, Streaming};

use crate::{Error, Sandbox};

const RETRIES: u32 = 30;
const FIRST_WAIT: Duration = Duration::from_millis(50);
const LONGEST_WAIT: Duration = Duration::from_secs(2);

/// What to run.
#[derive(Debug, Clone, Default)]
pub struct Command {
    /// Program and arguments.
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
        })
    }

    /// Runs a command to its end.
    pub async fn run<S: Into<String>>(
        &self,
        argv: impl IntoIterator<Item = S>,
    ) -> Result<Output, Error> {
        self.start(Command::new(argv)).await?.output().await
    }
}

impl Process {
    /// Its ID.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The next event; `None` after the exit.
    pub async fn next(&mut self) -> Result<Option<Event>, Error> {
        if self.over {
            return Ok(None);
        }
        let mut wait = FIRST_WAIT;
        for attempt in 0..=RETRIES {
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
            if !broken.is_interruption() || attempt == RETRIES {
                return Err(broken);
            }
            loop {
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(LONGEST_WAIT);
                match self.attach().await {
                    Ok(()) => break,
                    Err(error) if error.is_interruption() && wait < LONGEST_WAIT => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Err(Error::Incomplete("progress"))
    }

    async fn attach(&mut self) -> Result<(), Error> {
        let request = AttachRequest {
            process_id: self.id.clone(),
            stdout_offset: self.stdout_seen,
            stderr_offset: self.stderr_seen,
            from_now: false,
        };
        self.source = Source::Attach(self.sandbox.processes().attach(request).await?.into_inner());
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
    /// Writes to its stdin at an offset; sending the same bytes again is harmless. Returns the next offset.
    pub async fn send_input(&self, offset: u64, data: Bytes) -> Result<u64, Error> {
        let request = SendInputRequest {
            process_id: self.id.clone(),
            data,
            offset: Some(offset),
        };
        Ok(self
            .sandbox
            .processes()
            .send_input(request)
            .await?
            .into_inner()
            .next_offset)
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
        let request = SignalRequest {
            process_id: self.id.clone(),
            signal,
            target: 0,
        };
        self.sandbox.processes().signal(request).await?;
        Ok(())
    }
}
