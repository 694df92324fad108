//! Settings of api-gateway.

use std::path::PathBuf;

use service_kit::address::Address;

/// Settings of api-gateway.
#[derive(Debug, Clone, clap::Args)]
pub struct Config {
    /// Where Envoy sends API calls (host:port).
    #[arg(
        long,
        env = "SANDMESH_GATEWAY_LISTEN",
        default_value = "127.0.0.1:10100"
    )]
    pub listen: Address,
    /// Where operators manage keys, with the mesh token (host:port or unix:/path).
    #[arg(
        long,
        env = "SANDMESH_GATEWAY_OPERATOR_LISTEN",
        default_value = "127.0.0.1:10104"
    )]
    pub operator_listen: Address,
    /// Postgres: postgres://user@host/database, or with ?host=/socket/folder.
    #[arg(long, env = "SANDMESH_DATABASE_URL")]
    pub database_url: String,
    /// Connections to Postgres at most.
    #[arg(
        long,
        env = "SANDMESH_GATEWAY_DATABASE_CONNECTIONS",
        default_value_t = 8
    )]
    pub database_connections: u32,
    /// File of the mesh token, mode 0600.
    #[arg(long, env = "SANDMESH_MESH_TOKEN_FILE")]
    pub mesh_token_file: PathBuf,
    /// session-svc's addresses.
    #[arg(
        long,
        env = "SANDMESH_SESSION_ADDRESSES",
        value_delimiter = ',',
        default_value = "127.0.0.1:10101"
    )]
    pub session_addresses: Vec<Address>,
    /// template-svc's addresses.
    #[arg(
        long,
        env = "SANDMESH_TEMPLATE_ADDRESSES",
        value_delimiter = ',',
        default_value = "127.0.0.1:10102"
    )]
    pub template_addresses: Vec<Address>,
}
