//! What runs, as the supervisor writes it down, and whether it is healthy, as found out anew each time.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use service_kit::address::Address;
use tokio::net::{TcpStream, UnixStream};

use crate::{
    context::Context,
    output::{self, Format},
};

const FILE: &str = "up.json";
const CONNECT_LIMIT: Duration = Duration::from_secs(1);

/// A process, by PID and start time, so that another with the same PID is not taken for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ProcessRecord {
    pub(crate) pid: u32,
    pub(crate) start_ticks: u64,
}

impl ProcessRecord {
    pub(crate) fn of(pid: u32) -> Option<Self> {
        let stat = procfs::process::Process::new(i32::try_from(pid).ok()?)
            .ok()?
            .stat()
            .ok()?;
        (stat.state != 'Z').then_some(Self {
            pid,
            start_ticks: stat.starttime,
        })
    }

    pub(crate) fn lives(self) -> bool {
        Self::of(self.pid) == Some(self)
    }
}

/// A part of the deployment.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PartRecord {
    pub(crate) name: String,
    pub(crate) process: ProcessRecord,
    pub(crate) address: String,
    /// Where Prometheus finds its metrics.
    pub(crate) metrics: Option<String>,
}

/// What the supervisor wrote down.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Record {
    pub(crate) supervisor: ProcessRecord,
    pub(crate) endpoint: String,
    pub(crate) ready: bool,
    pub(crate) parts: Vec<PartRecord>,
}

impl Record {
    /// `None` if nothing was started here.
    pub(crate) fn read(state: &Path) -> anyhow::Result<Option<Self>> {
        let path = state.join(FILE);
        match fs::read(&path) {
            Ok(bytes) => Ok(Some(
                serde_json::from_slice(&bytes).with_context(|| path.display().to_string())?,
            )),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| path.display().to_string()),
        }
    }

    /// Whole, or the one before stays.
    pub(crate) fn write(&self, state: &Path) -> anyhow::Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(state)?;
        serde_json::to_writer_pretty(&mut file, self)?;
        file.persist(state.join(FILE))?;
        Ok(())
    }

    pub(crate) fn remove(state: &Path) -> io::Result<()> {
        match fs::remove_file(state.join(FILE)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    pub(crate) fn supervisor_lives(&self) -> bool {
        self.supervisor.lives()
    }

    pub(crate) fn address(&self, part: &str) -> Option<&str> {
        self.parts
            .iter()
            .find(|known| known.name == part)
            .map(|part| part.address.as_str())
    }
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Part {
    name: String,
    pid: u32,
    healthy: bool,
    address: String,
    metrics: Option<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Status {
    state: PathBuf,
    endpoint: String,
    healthy: bool,
    parts: Vec<Part>,
}

/// Whether somebody listens at an address.
pub(crate) async fn answers(address: &str) -> bool {
    let connect = async {
        match address.parse() {
            Ok(Address::Tcp(address)) => TcpStream::connect(address).await.is_ok(),
            Ok(Address::Unix(path)) => UnixStream::connect(path).await.is_ok(),
            Err(_) => false,
        }
    };
    tokio::time::timeout(CONNECT_LIMIT, connect)
        .await
        .unwrap_or(false)
}

/// Prints what runs; the exit code says whether all of it is healthy.
pub(crate) async fn run(context: &Context) -> anyhow::Result<u8> {
    let state = context.state().clone();
    let record = Record::read(&state)?;
    let Some(record) = record else {
        match context.format() {
            Format::Json => println!("{{\"healthy\": false, \"parts\": []}}"),
            Format::Table => println!("nothing runs in {}", state.display()),
        }
        return Ok(1);
    };
    let mut parts = Vec::new();
    for part in record.parts {
        let healthy = part.process.lives() && answers(&part.address).await;
        parts.push(Part {
            name: part.name,
            pid: part.process.pid,
            healthy,
            address: part.address,
            metrics: part.metrics,
        });
    }
    let healthy =
        record.ready && record.supervisor.lives() && parts.iter().all(|part| part.healthy);
    let status = Status {
        state,
        endpoint: record.endpoint,
        healthy,
        parts,
    };
    match context.format() {
        Format::Json => println!("{}", serde_json::to_string_pretty(&status)?),
        Format::Table => {
            let rows = status.parts.iter().map(|part| {
                let health = if part.healthy { "healthy" } else { "unhealthy" };
                vec![
                    part.name.clone(),
                    part.pid.to_string(),
                    health.to_owned(),
                    part.address.clone(),
                ]
            });
            output::table(&["part", "pid", "health", "address"], rows.collect());
        }
    }
    Ok(u8::from(!healthy))
}
