//! `sandmesh up`: a whole deployment on one machine, in one process tree.
//!
//! [`plan`] decides addresses and settings once and keeps them; [`supervise`] starts Postgres, Redis, the services and Envoy, and
//! starts again what ends; [`child`] is a process that dies with its supervisor; [`status`] and [`down`] read what [`status::Record`]
//! holds on disk, so they work whether the supervisor lives or not.

use std::{
    fs::{self, File},
    os::unix::process::CommandExt as _,
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use service_kit::config::parse_bytes;

use crate::context::Context;

mod child;
pub(crate) mod down;
mod envoy;
mod plan;
mod postgres;
mod redis;
pub(crate) mod status;
mod supervise;

const READY_LIMIT: Duration = Duration::from_mins(2);
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// How guests are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum VmmChoice {
    /// QEMU, with KVM where it works, else emulated.
    Qemu,
    /// QEMU, always emulated.
    QemuTcg,
    /// Firecracker under its jailer, where KVM works; its programs are named by SANDMESH_FIRECRACKER and SANDMESH_JAILER.
    Firecracker,
    /// In memory, for simulations.
    Fake,
}

impl VmmChoice {
    fn name(self) -> &'static str {
        match self {
            Self::Qemu => "qemu",
            Self::QemuTcg => "qemu-tcg",
            Self::Firecracker => "firecracker",
            Self::Fake => "fake",
        }
    }
}

/// Options of `up`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Stay in the foreground.
    #[arg(long)]
    foreground: bool,
    /// Each service in a process of its own.
    #[arg(long)]
    separate: bool,
    /// Address users reach, 0 for any free port: host:port.
    #[arg(long, default_value = "127.0.0.1:10080")]
    edge: std::net::SocketAddr,
    /// Domain of sandbox hosts.
    #[arg(long, default_value = "sandmesh.localhost")]
    domain: String,
    /// How guests are run.
    #[arg(long, value_enum, default_value = "qemu")]
    vmm: VmmChoice,
    /// envd's static program; default: beside this program.
    #[arg(long)]
    envd: Option<PathBuf>,
    /// Sessions at most.
    #[arg(long, default_value_t = 64)]
    max_sessions: u32,
    /// Memory for guests; default: three quarters of the machine's.
    #[arg(long, value_parser = parse_bytes)]
    memory: Option<u64>,
    /// Virtual CPUs for guests; default: 16 for each of the machine's.
    #[arg(long)]
    vcpus: Option<u32>,
    /// Room on each node for what it has fetched of templates, and for its snapshots of them; default: half of the state's file system.
    #[arg(long, value_parser = parse_bytes)]
    cache: Option<u64>,
    /// Nodes, all on this machine.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=8))]
    nodes: u32,
    /// Replicas of session-svc.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=8))]
    session_replicas: u32,
    /// OTLP collector (gRPC) for traces: host:port.
    #[arg(long)]
    otlp: Option<std::net::SocketAddr>,
    /// Registries that images may come from although they lie on private addresses: host or host:port, with http:// before it for one
    /// without TLS.
    #[arg(long, value_name = "REGISTRY", value_delimiter = ',')]
    trusted_registries: Vec<template_svc::TrustedRegistry>,
    /// Object store of what templates are made of: a folder, or s3://bucket/prefix, gs://..., az://... with credentials in the environment. Default: a folder of
    /// the state.
    #[arg(long, env = "SANDMESH_STORE", value_name = "FOLDER|URL")]
    store: Option<blobs::Address>,
    /// After how long without a heartbeat a node is dead.
    #[arg(long, default_value = "30s")]
    node_dead_after: String,
}

/// Starts everything, or says that it runs already.
pub(crate) async fn run(context: &Context, options: Options) -> anyhow::Result<()> {
    let state = context.state();
    if let Some(record) = status::Record::read(state)?
        && record.supervisor_lives()
    {
        println!("up already: {}", record.endpoint);
        return Ok(());
    }
    if !nix::unistd::Uid::effective().is_root() {
        bail!("root rights are needed to make network namespaces: run it as root or with sudo");
    }
    fs::create_dir_all(state).with_context(|| state.display().to_string())?;
    if options.foreground {
        return supervise::run(state, &options).await;
    }
    in_background(state).await
}

/// Runs this very command again in the foreground of a process group of its own, and waits until it is ready.
async fn in_background(state: &std::path::Path) -> anyhow::Result<()> {
    let logs = state.join("logs");
    fs::create_dir_all(&logs)?;
    let log = logs.join("sandmesh.log");
    let output = File::options().create(true).append(true).open(&log)?;
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args(std::env::args_os().skip(1))
        .arg("--foreground")
        .env("SANDMESH_STATE", state);
    command
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .process_group(0);
    let mut supervisor = command.spawn()?;
    let limit = Instant::now() + READY_LIMIT;
    let mut told = Vec::new();
    loop {
        if let Some(exit) = supervisor.try_wait()? {
            bail!("it did not start ({exit}); its log: {}", log.display());
        }
        if let Some(record) =
            status::Record::read(state)?.filter(|record| record.supervisor.pid == supervisor.id())
        {
            for part in &record.parts {
                if !told.contains(&part.name) {
                    println!("{:<20}{}", part.name, part.address);
                    told.push(part.name.clone());
                }
            }
            if record.ready {
                println!("up: {}", record.endpoint);
                return Ok(());
            }
        }
        if Instant::now() > limit {
            bail!(
                "it is not ready after {READY_LIMIT:?}; its log: {}; `sandmesh down` ends it",
                log.display()
            );
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}
