//! Settings of the Envoy control plane.

use std::{path::PathBuf, time::Duration};

use service_kit::{address::Address, config::parse_duration};

/// Settings of the Envoy control plane.
#[derive(Debug, Clone, clap::Args)]
pub struct Config {
    /// Where Envoy asks (host:port).
    #[arg(long, env = "SANDMESH_ENVOY_LISTEN", default_value = "127.0.0.1:10103")]
    pub listen: Address,
    /// File of the mesh token, mode 0600.
    #[arg(long, env = "SANDMESH_MESH_TOKEN_FILE")]
    pub mesh_token_file: PathBuf,
    /// session-svc's addresses: the node registry.
    #[arg(
        long,
        env = "SANDMESH_SESSION_ADDRESSES",
        value_delimiter = ',',
        default_value = "127.0.0.1:10101"
    )]
    pub session_addresses: Vec<Address>,
    /// How often the registry is read; changes in between reach Envoy together.
    #[arg(long, env = "SANDMESH_ENVOY_REFRESH", value_parser = parse_duration, default_value = "500ms")]
    pub refresh: Duration,
}
