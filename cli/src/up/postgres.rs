//! The private Postgres: its own cluster under the state folder, on a unix socket only, as the user `postgres` (it refuses root).

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, chown},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use nix::unistd::User as SystemUser;

use super::{
    child::{self, User},
    status::ProcessRecord,
};

/// How long a server that was killed may take to be gone.
const DYING: Duration = Duration::from_secs(10);
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// What is run.
#[derive(Debug)]
pub(super) struct Postgres {
    pub(super) program: PathBuf,
    pub(super) arguments: Vec<String>,
    pub(super) user: User,
    pub(super) socket: PathBuf,
}

/// The newest server's programs: Debian keeps versions side by side.
fn programs() -> anyhow::Result<PathBuf> {
    let mut versions: Vec<(u32, PathBuf)> = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            Some((
                entry.file_name().to_str()?.parse().ok()?,
                entry.path().join("bin"),
            ))
        })
        .filter(|(_, bin)| bin.join("initdb").exists())
        .collect();
    versions.sort();
    versions
        .pop()
        .map(|(_, bin)| bin)
        .context("no PostgreSQL server found: run ./deploy/install")
}

impl Postgres {
    /// Makes the cluster the first time.
    pub(super) async fn prepare(state: &Path) -> anyhow::Result<Self> {
        let bin = programs()?;
        let account = SystemUser::from_name("postgres")?
            .context("no system user postgres: run ./deploy/install")?;
        let user = User {
            uid: account.uid.as_raw(),
            gid: account.gid.as_raw(),
        };
        let (data, run, logs) = (
            state.join("postgres"),
            state.join("run"),
            state.join("logs"),
        );
        fs::create_dir_all(&data)?;
        chown(&data, Some(user.uid), Some(user.gid))?;
        fs::set_permissions(&data, fs::Permissions::from_mode(0o700))?;
        // Sockets of several users lie here.
        fs::set_permissions(&run, fs::Permissions::from_mode(0o1777))?;
        if !data.join("PG_VERSION").exists() {
            let arguments = [
                "-D",
                &data.to_string_lossy(),
                "-U",
                "postgres",
                "--auth=trust",
                "--encoding=UTF8",
                "--no-locale",
                "--no-sync",
            ]
            .map(String::from);
            let log = logs.join("initdb.log");
            let exit = child::start(&bin.join("initdb"), &arguments, &log, Some(user))?
                .wait()
                .await?;
            if !exit.success() {
                // Half a cluster would be taken for a whole one.
                fs::remove_dir_all(&data)?;
                bail!("initdb failed ({exit}); its log: {}", log.display());
            }
        }
        let socket = run.join(".s.PGSQL.5432");
        for lock in [data.join("postmaster.pid"), run.join(".s.PGSQL.5432.lock")] {
            forget_dead_server(&lock).await?;
        }
        let arguments = [
            "-D",
            &data.to_string_lossy(),
            "-k",
            &run.to_string_lossy(),
            "-c",
            "listen_addresses=",
            "-c",
            "max_connections=200",
            "-c",
            "unix_socket_permissions=0700",
            "-c",
            "log_min_messages=warning",
        ];
        Ok(Self {
            program: bin.join("postgres"),
            arguments: arguments.map(String::from).to_vec(),
            user,
            socket,
        })
    }
}

/// A server that was killed leaves its PID behind, and Postgres takes it for running for as long as the process is in the table, be it
/// as a zombie that nobody waits for.
async fn forget_dead_server(lock: &Path) -> anyhow::Result<()> {
    let Some(pid) = fs::read_to_string(lock)
        .ok()
        .and_then(|text| text.lines().next()?.trim().parse().ok())
    else {
        return Ok(());
    };
    let deadline = Instant::now() + DYING;
    while ProcessRecord::of(pid).is_some_and(|_| is_server(pid)) {
        if Instant::now() > deadline {
            bail!(
                "a PostgreSQL server with PID {pid} still holds {}",
                lock.display()
            );
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    Ok(fs::remove_file(lock)?)
}

fn is_server(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "postgres")
}
