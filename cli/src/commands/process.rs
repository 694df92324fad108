//! `sandmesh ps` and `kill`.

use anyhow::Context as _;
use nix::sys::signal::Signal;
use proto::envd::v1::{ProcessExited, ProcessServiceListResponse, SignalTarget, process_exited};

use crate::{context::Context, output};

#[derive(Debug, clap::Args)]
pub(crate) struct PsOptions {
    /// Also those that have ended and are still remembered.
    #[arg(short, long)]
    all: bool,
    /// Which session.
    session: String,
}

#[derive(Debug, clap::Args)]
pub(crate) struct KillOptions {
    /// Which signal: a name or a number.
    #[arg(short, long, default_value = "TERM", value_parser = parse_signal)]
    signal: i32,
    /// Its process group.
    #[arg(long, conflicts_with = "all")]
    group: bool,
    /// It and all it started, wherever that went.
    #[arg(short, long)]
    all: bool,
    /// Which session.
    session: String,
    /// Which process: `sandmesh ps` lists them.
    process: String,
}

fn parse_signal(text: &str) -> Result<i32, String> {
    if let Ok(number) = text.parse() {
        return Ok(number);
    }
    let name = text.to_uppercase();
    let name = if name.starts_with("SIG") {
        name
    } else {
        format!("SIG{name}")
    };
    name.parse::<Signal>()
        .map(|signal| signal as i32)
        .map_err(|_| format!("there is no signal {text}"))
}

pub(crate) async fn ps(context: &Context, options: &PsOptions) -> anyhow::Result<()> {
    let client = context.client()?;
    let session = client.get(&options.session).await?;
    let processes = client.sandbox(&session)?.process_list(options.all).await?;
    let answer = ProcessServiceListResponse {
        processes,
        next_page_token: String::new(),
    };
    output::print(
        context.format(),
        "sandmesh.envd.v1.ProcessServiceListResponse",
        answer,
        |answer| {
            let rows = answer.processes.into_iter().map(|process| {
                vec![
                    process.process_id,
                    process.pid.to_string(),
                    process.user,
                    output::time(process.start_time),
                    process
                        .exited
                        .map_or_else(|| "runs".into(), |exited| ended(&exited)),
                    process.argv.join(" "),
                ]
            });
            output::table(
                &["id", "pid", "user", "started", "state", "command"],
                rows.collect(),
            );
        },
    )
}

fn ended(exited: &ProcessExited) -> String {
    let how = match exited.status {
        Some(process_exited::Status::Code(code)) => format!("exit {code}"),
        Some(process_exited::Status::Signal(signal)) => Signal::try_from(signal).map_or_else(
            |_| format!("signal {signal}"),
            |name| name.as_str().to_owned(),
        ),
        None => "ended".into(),
    };
    if exited.oom_killed {
        format!("{how}, out of memory")
    } else {
        how
    }
}

pub(crate) async fn kill(context: &Context, options: &KillOptions) -> anyhow::Result<()> {
    let client = context.client()?;
    let session = client.get(&options.session).await?;
    let target = match (options.group, options.all) {
        (_, true) => SignalTarget::All,
        (true, _) => SignalTarget::Group,
        _ => SignalTarget::Process,
    };
    client
        .sandbox(&session)?
        .process(&options.process)
        .signal_to(options.signal, target)
        .await
        .with_context(|| format!("process {} of session {}", options.process, options.session))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_names_and_numbers() {
        for text in ["9", "KILL", "kill", "SIGKILL"] {
            assert_eq!(parse_signal(text), Ok(9), "{text}");
        }
        assert!(parse_signal("NOPE").is_err());
    }
}
