//! Which deployment is meant, and in which form to answer.

use std::{fs, path::PathBuf};

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};
use service_kit::{
    address::Address,
    ids::TeamId,
    mesh::{self, Caller, MeshChannel, MeshToken},
};

use crate::{output::Format, up::status::Record};

/// Options of every command.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Where Sandmesh is, such as http://127.0.0.1:10080; default: what `sandmesh up` wrote
    #[arg(long, global = true, env = "SANDMESH_ENDPOINT")]
    endpoint: Option<String>,
    /// API key; default: what `sandmesh up` wrote
    #[arg(long, global = true, env = "SANDMESH_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// State folder of a deployment on this machine; keep it short, it holds unix sockets
    #[arg(
        long,
        global = true,
        env = "SANDMESH_STATE",
        default_value = "/var/lib/sandmesh"
    )]
    state: PathBuf,
    /// How to print
    #[arg(short, long, global = true, value_enum, default_value = "table")]
    output: Format,
}

/// What `up` leaves for clients on this machine.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ClientFile {
    pub(crate) endpoint: String,
    pub(crate) api_key: String,
}

/// What commands work with.
#[derive(Debug)]
pub(crate) struct Context {
    options: Options,
}

impl Context {
    pub(crate) fn new(options: Options) -> Self {
        Self { options }
    }

    pub(crate) fn state(&self) -> &PathBuf {
        &self.options.state
    }

    pub(crate) fn format(&self) -> Format {
        self.options.output
    }

    /// A client with the user's key.
    pub(crate) fn client(&self) -> anyhow::Result<sdk::Client> {
        let (endpoint, key) = match (&self.options.endpoint, &self.options.api_key) {
            (Some(endpoint), Some(key)) => (endpoint.clone(), key.clone()),
            (endpoint, key) => {
                let path = self.options.state.join("client.toml");
                let text = fs::read_to_string(&path).with_context(|| {
                    format!("no endpoint: set SANDMESH_ENDPOINT and SANDMESH_API_KEY, or run `sandmesh up` ({})", path.display())
                })?;
                let file: ClientFile =
                    toml::from_str(&text).with_context(|| path.display().to_string())?;
                (
                    endpoint.clone().unwrap_or(file.endpoint),
                    key.clone().unwrap_or(file.api_key),
                )
            }
        };
        Ok(sdk::Client::connect(&endpoint, &key)?)
    }

    /// What runs inside a session.
    pub(crate) async fn sandbox(&self, session: &str) -> anyhow::Result<sdk::Sandbox> {
        let client = self.client()?;
        let session = client.get(session).await?;
        Ok(client.sandbox(&session)?)
    }

    /// A channel to a part of the deployment on this machine, with the mesh token: whoever may read the state folder.
    pub(crate) fn operator(&self, part: &str) -> anyhow::Result<MeshChannel> {
        let record = Record::read(&self.options.state)?;
        let Some(record) = record else {
            bail!(
                "nothing runs in {}: run `sandmesh up`",
                self.options.state.display()
            )
        };
        let address = record
            .address(part)
            .with_context(|| format!("no part {part} is known"))?;
        self.at(address)
    }

    /// A channel to a part at an address.
    pub(crate) fn at(&self, address: &str) -> anyhow::Result<MeshChannel> {
        let address: Address = address.parse()?;
        let token = MeshToken::load(&self.options.state.join("mesh.token"))?;
        Ok(mesh::connect(&[address], &token))
    }
}

/// An operator acting for a team.
pub(crate) fn operator_of(team: &str) -> anyhow::Result<Caller> {
    Ok(Caller {
        team: TeamId::parse(team)?,
        key_id: String::new(),
        operator: true,
    })
}

/// A status as a person reads it.
pub(crate) fn said(status: tonic::Status) -> sdk::Error {
    sdk::Error::from(status)
}
