//! `sandmesh exec`, `shell` and `attach`: raw bytes in and out, and the command's own exit code.

use std::{io::IsTerminal as _, time::Duration};

use anyhow::bail;
use bytes::{Bytes, BytesMut};
use proto::envd::v1::Backpressure;
use sdk::{Command, Event, Exit, Process, Remote, Sandbox};
use service_kit::config::parse_duration;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use super::pair;
use crate::{
    context::Context,
    terminal::{self, Raw},
};

const INPUT_CHUNK: usize = 64 << 10;
/// As much as a process takes at once.
const LARGEST_INPUT: usize = 1 << 20;
/// Reads of stdin that may wait.
const READ_AHEAD: usize = 16;
/// A terminal waits for its sandbox while a network is down, as one does not want to begin anew.
const PATIENCE: Duration = Duration::from_mins(10);
/// What a shell that is killed by SIGKILL ends with.
const KILLED: i32 = 137;

#[derive(Debug, clap::Args)]
pub(crate) struct Surroundings {
    /// User to run as; default: the template's.
    #[arg(short, long, default_value = "")]
    user: String,
    /// Working directory; default: the user's home.
    #[arg(short = 'w', long, default_value = "")]
    cwd: String,
    /// Environment: NAME=VALUE.
    #[arg(short, long, value_parser = pair)]
    env: Vec<(String, String)>,
    /// Its ID, to find it again; default: a random one.
    #[arg(long)]
    id: Option<String>,
    /// Put its output into the session's logs, too, where it stays when the session has ended.
    #[arg(long)]
    log: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    surroundings: Surroundings,
    /// The command is ended after this long.
    #[arg(long, value_parser = parse_duration)]
    timeout: Option<Duration>,
    /// With a terminal.
    #[arg(short, long)]
    tty: bool,
    /// Start it, print its ID, and leave it running.
    #[arg(long, conflicts_with = "tty")]
    detach: bool,
    /// Which session.
    session: String,
    /// The command and its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ShellOptions {
    #[command(flatten)]
    surroundings: Surroundings,
    /// Which session.
    session: String,
}

#[derive(Debug, clap::Args)]
pub(crate) struct AttachOptions {
    /// From this offset of its stdout or terminal on; default: the beginning.
    #[arg(long, conflicts_with = "now")]
    from: Option<u64>,
    /// Only what it writes from now on.
    #[arg(long)]
    now: bool,
    /// Which session.
    session: String,
    /// Which process: `sandmesh ps` lists them.
    process: String,
}

pub(crate) async fn run(context: &Context, options: Options) -> anyhow::Result<u8> {
    let sandbox = sandbox(context, &options.session).await?;
    let feed = !options.detach && (options.tty || !std::io::stdin().is_terminal());
    let mut process = sandbox
        .start(Command {
            argv: options.command,
            stdin: feed,
            deadline: options.timeout,
            terminal: options.tty.then(terminal::size),
            backpressure: if options.detach {
                Backpressure::Unspecified
            } else {
                Backpressure::WhileAttached
            },
            ..command(options.surroundings)
        })
        .await?;
    if options.detach {
        println!("{}", process.id());
        return Ok(0);
    }
    if options.tty {
        return at_terminal(&mut process, Some(0)).await;
    }
    follow(&mut process, feed).await
}

/// A login shell with a terminal, as by ssh.
pub(crate) async fn shell(context: &Context, options: ShellOptions) -> anyhow::Result<u8> {
    let sandbox = sandbox(context, &options.session).await?;
    let mut process = sandbox
        .start(Command {
            stdin: true,
            terminal: Some(terminal::size()),
            backpressure: Backpressure::WhileAttached,
            ..command(options.surroundings)
        })
        .await?;
    at_terminal(&mut process, Some(0)).await
}

/// A process that was started before.
pub(crate) async fn attach(context: &Context, options: AttachOptions) -> anyhow::Result<u8> {
    let sandbox = sandbox(context, &options.session).await?;
    let processes = sandbox.process_list(true).await?;
    let found = processes
        .iter()
        .find(|process| process.process_id == options.process);
    let has_terminal = found.is_some_and(|process| process.terminal.is_some());
    let mut process = if options.now {
        sandbox.attach_from_now(&options.process).await?
    } else {
        let from = options.from.unwrap_or_default();
        sandbox.attach(&options.process, from, 0).await?
    };
    if has_terminal && std::io::stdin().is_terminal() {
        process.remote().resize(terminal::size()).await?;
        return at_terminal(&mut process, None).await;
    }
    follow(&mut process, false).await
}

async fn sandbox(context: &Context, session: &str) -> anyhow::Result<Sandbox> {
    let client = context.client()?;
    let session = client.get(session).await?;
    Ok(client.sandbox(&session)?)
}

fn command(surroundings: Surroundings) -> Command {
    Command {
        cwd: surroundings.cwd,
        env: surroundings.env.into_iter().collect(),
        user: surroundings.user,
        process_id: surroundings.id,
        log_output: surroundings.log,
        ..Command::default()
    }
}

/// Passes what it writes to stdout and stderr, until it ends.
async fn follow(process: &mut Process, feed: bool) -> anyhow::Result<u8> {
    let mut helpers = JoinSet::new();
    if feed {
        helpers.spawn(feed_stdin(process.remote()));
    }
    helpers.spawn(pass_signals(process.remote()));
    let (mut stdout, mut stderr) = (tokio::io::stdout(), tokio::io::stderr());
    while let Some(event) = process.next().await? {
        match event {
            Event::Started { .. } => {}
            Event::Stdout(bytes) => {
                // Whoever read us has gone: so do we, as a program in a pipe does. The process goes on.
                if stdout.write_all(&bytes).await.is_err() || stdout.flush().await.is_err() {
                    return Ok(141);
                }
            }
            Event::Stderr(bytes) => {
                stderr.write_all(&bytes).await?;
                stderr.flush().await?;
            }
            Event::Exited(exit) => return Ok(told(&exit)),
        }
    }
    bail!("the process ended without saying how")
}

/// Gives it the user's terminal, until it ends or the user leaves it by `~.` at the beginning of a line. `offset` is where keys begin, if
/// nobody else types.
async fn at_terminal(process: &mut Process, offset: Option<u64>) -> anyhow::Result<u8> {
    process.set_patience(PATIENCE);
    let raw = if std::io::stdin().is_terminal() {
        Some(Raw::new()?)
    } else {
        None
    };
    let left = CancellationToken::new();
    let mut helpers = JoinSet::new();
    let leave = raw.is_some().then(|| left.clone());
    helpers.spawn(type_keys(process.remote(), offset, leave));
    helpers.spawn(pass_size(process.remote()));
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    let mut stdout = tokio::io::stdout();
    let exit = loop {
        let event = tokio::select! {
            event = process.next() => event?,
            () = left.cancelled() => break None,
            _ = terminate.recv() => break None,
            _ = hang_up.recv() => break None,
        };
        match event {
            Some(Event::Stdout(bytes) | Event::Stderr(bytes)) => {
                stdout.write_all(&bytes).await?;
                stdout.flush().await?;
            }
            Some(Event::Started { .. }) => {}
            Some(Event::Exited(exit)) => break Some(exit),
            None => bail!("the process ended without saying how"),
        }
    };
    drop(raw);
    if let Some(exit) = exit {
        return Ok(told(&exit));
    }
    eprintln!("\nsandmesh: left; it goes on as process {}", process.id());
    Ok(0)
}

/// What its end means, in words where there is more to say than a code.
fn told(exit: &Exit) -> u8 {
    if exit.0.deadline_exceeded {
        eprintln!("sandmesh: the command was ended at its deadline");
    }
    if exit.0.oom_killed {
        let whom = if exit.code() == KILLED {
            "the command"
        } else {
            "a process of the command"
        };
        eprintln!(
            "sandmesh: out of memory: {whom} was killed{}",
            victims(exit)
        );
    }
    u8::try_from(exit.code()).unwrap_or(255)
}

/// Those that were killed, if the guest has named them.
fn victims(exit: &Exit) -> String {
    let victims = &exit.0.oom_victims;
    let named: Vec<String> = victims
        .iter()
        .map(|victim| format!("{} ({})", crate::output::plain(&victim.command), victim.pid))
        .collect();
    if named.is_empty() {
        return String::new();
    }
    format!(": {}", named.join(", "))
}

/// Passes stdin on. What comes while a part is on its way is the next part: with each read on its own, a pipe's 64 KiB, a distant or slow guest
/// would get little in much time.
async fn feed_stdin(process: Remote) {
    let (ahead, mut parts) = mpsc::channel(READ_AHEAD);
    let read = async move {
        let mut stdin = tokio::io::stdin();
        loop {
            let mut chunk = BytesMut::with_capacity(INPUT_CHUNK);
            match stdin.read_buf(&mut chunk).await {
                Ok(0) => break,
                Ok(_) if ahead.send(chunk).await.is_ok() => {}
                Ok(_) => break,
                Err(error) => {
                    eprintln!("sandmesh: stdin: {error}");
                    break;
                }
            }
        }
        drop(ahead);
        std::future::pending::<()>().await;
    };
    let feed = async {
        let mut offset = 0;
        while let Some(mut part) = parts.recv().await {
            while part.len() + INPUT_CHUNK <= LARGEST_INPUT
                && let Ok(more) = parts.try_recv()
            {
                part.unsplit(more);
            }
            match process.send_input(offset, part.freeze()).await {
                Ok(next) => offset = next,
                Err(error) if is_uncertain(&error) => {
                    // It must not take a part for the whole.
                    eprintln!("sandmesh: stdin: {error}; the command is ended");
                    if let Err(error) = process.signal(nix::libc::SIGTERM).await {
                        eprintln!("sandmesh: {error}");
                    }
                    return;
                }
                // The command does not read any more; its exit says the rest.
                Err(_) => return,
            }
        }
        if let Err(error) = process.close_input().await {
            eprintln!("sandmesh: stdin: {error}");
        }
    };
    tokio::select! {
        () = feed => {}
        () = read => {}
    }
}

/// Whether it is not known if some of the input arrived. It is said once, and from then on counts as written.
fn is_uncertain(error: &sdk::Error) -> bool {
    error.reason().as_deref() == Some("INPUT_UNCERTAIN")
}

/// Passes keys on. `left` hears when the user wants to leave.
async fn type_keys(process: Remote, mut offset: Option<u64>, left: Option<CancellationToken>) {
    let mut stdin = tokio::io::stdin();
    let mut escape = Escape::default();
    loop {
        let mut chunk = BytesMut::with_capacity(INPUT_CHUNK);
        let typed = match stdin.read_buf(&mut chunk).await {
            Ok(count) if count > 0 => chunk.freeze(),
            // The user's terminal is gone, or a script has ended.
            _ => {
                // What ended cannot be told, and need not.
                let _ = process.close_input().await;
                return;
            }
        };
        let (typed, leaves) = match left {
            Some(_) => escape.look(&typed),
            None => (typed, false),
        };
        if leaves
            && typed.is_empty()
            && let Some(left) = &left
        {
            return left.cancel();
        }
        if typed.is_empty() {
            continue;
        }
        // With an offset a call that broke is made again, and nothing is typed twice.
        let send = async || match offset {
            Some(at) => process.send_input(at, typed.clone()).await,
            None => process.append_input(typed.clone()).await,
        };
        let mut taken = send().await;
        if taken.as_ref().is_err_and(is_uncertain) {
            // Whoever types sees what has come of it, and what was typed after that is wanted.
            taken = send().await;
        }
        match (taken, &mut offset) {
            (Ok(next), Some(at)) => *at = next,
            (Ok(_), None) => {}
            (Err(_), _) => return,
        }
        if leaves && let Some(left) = &left {
            return left.cancel();
        }
    }
}

/// `~.` at the beginning of a line leaves, `~~` is a tilde, as in ssh.
#[derive(Debug)]
struct Escape {
    at_line_start: bool,
    after_tilde: bool,
}

impl Default for Escape {
    fn default() -> Self {
        Self {
            at_line_start: true,
            after_tilde: false,
        }
    }
}

impl Escape {
    /// What of the keys is to be passed on, and whether the user leaves then.
    fn look(&mut self, typed: &[u8]) -> (Bytes, bool) {
        let mut passed = BytesMut::with_capacity(typed.len() + 1);
        for key in typed {
            if self.after_tilde {
                self.after_tilde = false;
                match key {
                    b'.' => return (passed.freeze(), true),
                    b'~' => {}
                    _ => passed.extend_from_slice(b"~"),
                }
            } else if self.at_line_start && *key == b'~' {
                self.after_tilde = true;
                self.at_line_start = false;
                continue;
            }
            passed.extend_from_slice(&[*key]);
            self.at_line_start = matches!(key, b'\r' | b'\n');
        }
        (passed.freeze(), false)
    }
}

async fn pass_size(process: Remote) {
    let Ok(mut changed) = signal(SignalKind::window_change()) else {
        return;
    };
    while changed.recv().await.is_some() {
        // One that was missed is made good by the next.
        let _ = process.resize(terminal::size()).await;
    }
}

async fn pass_signals(process: Remote) {
    let (Ok(mut interrupt), Ok(mut terminate)) = (
        signal(SignalKind::interrupt()),
        signal(SignalKind::terminate()),
    ) else {
        return;
    };
    loop {
        let number = tokio::select! {
            _ = interrupt.recv() => 2,
            _ = terminate.recv() => 15,
        };
        if let Err(error) = process.signal(number).await {
            eprintln!("sandmesh: signal: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_tilde_at_the_beginning_of_a_line_leaves() {
        let looked = |typed: &[&str]| {
            let mut escape = Escape::default();
            let mut passed = Vec::new();
            for keys in typed {
                let (keys, leaves) = escape.look(keys.as_bytes());
                passed.extend_from_slice(&keys);
                if leaves {
                    passed.extend_from_slice(b" and left");
                    break;
                }
            }
            String::from_utf8(passed).unwrap()
        };
        assert_eq!(looked(&["~."]), " and left");
        assert_eq!(looked(&["ls\r", "~", "."]), "ls\r and left");
        assert_eq!(looked(&["ls\r~."]), "ls\r and left");
        assert_eq!(looked(&["ls ~.\r"]), "ls ~.\r");
        assert_eq!(looked(&["~", "~."]), "~.");
        assert_eq!(looked(&["~/bin/x\r"]), "~/bin/x\r");
    }
}
