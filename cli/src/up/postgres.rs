//! The private Postgres: its own cluster under the state folder, on a unix socket only, as the user `postgres` (it refuses root).

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, chown},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use nix::unistd::User as SystemUser;

use super::child::{self, User};

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
