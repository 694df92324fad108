//! Envoy: its bootstrap is written anew at each start; it holds the mesh token's header, so only root may read it.

use std::{
    fs::OpenOptions,
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::bail;
use envoy_control::bootstrap::Bootstrap;
use service_kit::{config::tools_folder, mesh::MeshToken};

use super::plan::Plan;

/// What is run.
#[derive(Debug)]
pub(super) struct Envoy {
    pub(super) program: PathBuf,
    pub(super) arguments: Vec<String>,
}

impl Envoy {
    pub(super) fn prepare(plan: &Plan, token: &MeshToken, state: &Path) -> anyhow::Result<Self> {
        let program = tools_folder().join("bin/envoy");
        if !program.exists() {
            bail!("no Envoy at {}: run ./deploy/install", program.display());
        }
        let bootstrap = Bootstrap {
            node_id: "edge".into(),
            edge: plan.edge,
            admin: plan.envoy_admin,
            control: plan.control,
            gateways: vec![plan.gateway],
            domain: plan.domain.clone(),
            otlp: plan.otlp,
            max_connections: 50_000,
        };
        let path = state.join("run/envoy.json");
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&path)?;
        file.write_all(serde_json::to_string_pretty(&bootstrap.render(token))?.as_bytes())?;
        // Without a base ID shared memory of another Envoy on this machine would be in the way of hot restarts we do not use.
        let arguments = [
            "-c",
            &path.to_string_lossy(),
            "--disable-hot-restart",
            "--log-level",
            "warning",
        ];
        Ok(Self {
            program,
            arguments: arguments.map(String::from).to_vec(),
        })
    }
}
