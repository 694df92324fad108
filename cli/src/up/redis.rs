//! The private Redis: on a unix socket only, nothing on disk, since all it holds can be made again.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};

/// What is run.
#[derive(Debug)]
pub(super) struct Redis {
    pub(super) program: PathBuf,
    pub(super) arguments: Vec<String>,
}

impl Redis {
    pub(super) fn prepare(socket: &Path) -> anyhow::Result<Self> {
        let program = PathBuf::from("/usr/bin/redis-server");
        if !program.exists() {
            bail!("no Redis server found: run ./deploy/install");
        }
        let folder = socket.parent().context("no folder for the socket")?;
        let arguments = [
            "--port",
            "0",
            "--unixsocket",
            &socket.to_string_lossy(),
            "--unixsocketperm",
            "700",
            "--save",
            "",
            "--appendonly",
            "no",
            "--dir",
            &folder.to_string_lossy(),
            "--maxmemory-policy",
            "noeviction",
        ];
        Ok(Self {
            program,
            arguments: arguments.map(String::from).to_vec(),
        })
    }
}
