//! `sandmesh exec`: raw bytes in and out, and the command's own exit code.

use std::{io::IsTerminal as _, time::Duration};

use bytes::BytesMut;
use sdk::{Command, Event, Remote};
use service_kit::config::parse_duration;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    signal::unix::{SignalKind, signal},
};

use super::pair;
use crate::context::Context;

const INPUT_CHUNK: usize = 64 << 10;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// User to run as; default: the template's.
    #[arg(short, long, default_value = "")]
    user: String,
    /// Working directory; default: the user's home.
    #[arg(short = 'w', long, default_value = "")]
    cwd: String,
    /// Environment: NAME=VALUE.
    #[arg(short, long, value_parser = pair)]
    env: Vec<(String, String)>,
    /// The command is ended after this long.
    #[arg(long, value_parser = parse_duration)]
    timeout: Option<Duration>,
    /// Its ID, to find it again; default: a random one.
    #[arg(long)]
    id: Option<String>,
    /// Start it, print its ID, and leave it running.
    #[arg(long)]
    detach: bool,
    /// Which session.
    session: String,
    /// The command and its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

pub(crate) async fn run(context: &Context, options: Options) -> anyhow::Result<u8> {
    let client = context.client()?;
    let session = client.get(&options.session).await?;
    let sandbox = client.sandbox(&session)?;
    let feed = !options.detach && !std::io::stdin().is_terminal();
    let command = Command {
        argv: options.command,
        cwd: options.cwd,
        env: options.env.into_iter().collect(),
        user: options.user,
        stdin: feed,
        deadline: options.timeout,
        process_id: options.id,
    };
    let mut process = sandbox.start(command).await?;
    let input = feed.then(|| tokio::spawn(feed_stdin(process.remote())));
    let signals = tokio::spawn(pass_signals(process.remote()));
    let (mut stdout, mut stderr) = (tokio::io::stdout(), tokio::io::stderr());
    let mut code = 255;
    while let Some(event) = process.next().await? {
        match event {
            Event::Started { .. } if options.detach => {
                println!("{}", process.id());
                return Ok(0);
            }
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
            Event::Exited(exit) => {
                if exit.0.deadline_exceeded {
                    eprintln!("sandmesh: the command was ended at its deadline");
                }
                if exit.0.oom_killed {
                    eprintln!("sandmesh: the guest ran out of memory and ended the command");
                }
                code = exit.code();
            }
        }
    }
    signals.abort();
    if let Some(input) = input {
        input.abort();
    }
    Ok(u8::try_from(code).unwrap_or(255))
}

async fn feed_stdin(process: Remote) {
    let mut stdin = tokio::io::stdin();
    let mut offset = 0;
    loop {
        let mut chunk = BytesMut::with_capacity(INPUT_CHUNK);
        match stdin.read_buf(&mut chunk).await {
            Ok(0) => break,
            Ok(_) => match process.send_input(offset, chunk.freeze()).await {
                Ok(next) => offset = next,
                // The command does not read any more; its exit says the rest.
                Err(_) => return,
            },
            Err(error) => {
                eprintln!("sandmesh: stdin: {error}");
                break;
            }
        }
    }
    if let Err(error) = process.close_input().await {
        eprintln!("sandmesh: stdin: {error}");
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
