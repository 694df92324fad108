//! `sandmesh down`: ends everything, whether the supervisor lives or was killed.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{
    plan::Plan,
    status::{ProcessRecord, Record},
};
use crate::context::Context;

const POLITE_LIMIT: Duration = Duration::from_mins(1);
const KILL_LIMIT: Duration = Duration::from_secs(10);
const LOOK_AGAIN: Duration = Duration::from_millis(50);

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Remove the state folder too: database, templates, keys.
    #[arg(long)]
    purge: bool,
}

pub(crate) async fn run(context: &Context, options: &Options) -> anyhow::Result<()> {
    let state = context.state();
    if let Some(record) = Record::read(state)? {
        end(record.supervisor, Signal::SIGTERM, POLITE_LIMIT).await?;
        // Only where the supervisor was killed, or did not manage to.
        for part in record.parts.iter().rev() {
            end(part.process, Signal::SIGKILL, KILL_LIMIT).await?;
        }
    }
    clean_nodes(state, 0)?;
    Record::remove(state)?;
    if options.purge && state.exists() {
        fs::remove_dir_all(state).with_context(|| state.display().to_string())?;
    }
    println!("down");
    Ok(())
}

/// What nodes after the first `kept` left when they were killed: VMMs, namespaces, rules.
pub(super) fn clean_nodes(state: &Path, kept: usize) -> anyhow::Result<()> {
    for node in Plan::node_states(state).into_iter().skip(kept) {
        if node.exists() {
            tokio::task::block_in_place(|| node_svc::clean_up(&node))?;
        }
    }
    Ok(())
}

async fn end(process: ProcessRecord, signal: Signal, limit: Duration) -> anyhow::Result<()> {
    let deadline = Instant::now() + limit;
    let mut sent = false;
    while process.lives() {
        if !sent {
            let pid = i32::try_from(process.pid).context("pid")?;
            // Gone between the look and the signal is as good.
            let _ = kill(Pid::from_raw(pid), signal);
            sent = true;
        }
        if Instant::now() > deadline {
            bail!("process {} does not end", process.pid);
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    Ok(())
}
