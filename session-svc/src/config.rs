//! Settings of session-svc.

use std::{path::PathBuf, time::Duration};

use service_kit::{
    address::Address,
    config::{parse_bytes, parse_duration},
};

/// Settings of session-svc.
#[derive(Debug, Clone, clap::Args)]
pub struct Config {
    /// Where the internal gRPC listener is (host:port or unix:/path).
    #[arg(
        long,
        env = "SANDMESH_SESSION_LISTEN",
        default_value = "127.0.0.1:10101"
    )]
    pub listen: Address,
    /// Postgres: postgres://user@host/database, or with ?host=/socket/folder.
    #[arg(long, env = "SANDMESH_DATABASE_URL")]
    pub database_url: String,
    /// Connections to Postgres at most.
    #[arg(
        long,
        env = "SANDMESH_SESSION_DATABASE_CONNECTIONS",
        default_value_t = 16
    )]
    pub database_connections: u32,
    /// Redis: redis://host:port or redis+unix:///path.
    #[arg(long, env = "SANDMESH_REDIS_URL")]
    pub redis_url: String,
    /// Prefix of every Redis key and channel.
    #[arg(long, env = "SANDMESH_REDIS_PREFIX", default_value = "sandmesh")]
    pub redis_prefix: String,
    /// File of the mesh token, mode 0600.
    #[arg(long, env = "SANDMESH_MESH_TOKEN_FILE")]
    pub mesh_token_file: PathBuf,
    /// template-svc's addresses.
    #[arg(
        long,
        env = "SANDMESH_TEMPLATE_ADDRESSES",
        value_delimiter = ',',
        default_value = "127.0.0.1:10102"
    )]
    pub template_addresses: Vec<Address>,
    /// Domain of sandbox hosts.
    #[arg(long, env = "SANDMESH_DOMAIN", default_value = "sandmesh.localhost")]
    pub domain: String,
    /// Port of the edge that users reach, as it stands in host names; 80 and 443 are left out.
    #[arg(long, env = "SANDMESH_EDGE_PORT", default_value_t = 10080)]
    pub edge_port: u16,
    /// How long a node has to start a session.
    #[arg(long, env = "SANDMESH_SESSION_START_TIMEOUT", value_parser = parse_duration, default_value = "140s")]
    pub start_timeout: Duration,
    /// How long a node has to stop a session.
    #[arg(long, env = "SANDMESH_SESSION_STOP_TIMEOUT", value_parser = parse_duration, default_value = "20s")]
    pub stop_timeout: Duration,
    /// How long a node has to pause, resume, fork, checkpoint or roll back a session.
    #[arg(long, env = "SANDMESH_SESSION_STORE_TIMEOUT", value_parser = parse_duration, default_value = "120s")]
    pub store_timeout: Duration,
    /// How long what is stored of a paused session is kept.
    #[arg(long, env = "SANDMESH_SESSION_PAUSED_RETENTION", value_parser = parse_duration, default_value = "720h")]
    pub paused_retention: Duration,
    /// How often nodes send heartbeats; after three missed ones a node gets no new sessions.
    #[arg(long, env = "SANDMESH_HEARTBEAT_INTERVAL", value_parser = parse_duration, default_value = "1s")]
    pub heartbeat_interval: Duration,
    /// After how long without a heartbeat a node is dead and its sessions are Lost.
    #[arg(long, env = "SANDMESH_NODE_DEAD_AFTER", value_parser = parse_duration, default_value = "30s")]
    pub node_dead_after: Duration,
    /// How long ended sessions and their events are kept.
    #[arg(long, env = "SANDMESH_SESSION_RETENTION", value_parser = parse_duration, default_value = "24h")]
    pub retention: Duration,
    /// Largest memory a session may ask for.
    #[arg(long, env = "SANDMESH_SESSION_MAX_MEMORY", value_parser = parse_bytes, default_value = "64GiB")]
    pub max_memory: u64,
    /// Largest writable disk a session may ask for.
    #[arg(long, env = "SANDMESH_SESSION_MAX_DISK", value_parser = parse_bytes, default_value = "1TiB")]
    pub max_disk: u64,
    /// How long after the last sign of life of a replica others go on with the starts and stops it was at.
    #[arg(long, env = "SANDMESH_SESSION_LEASE", value_parser = parse_duration, default_value = "10s")]
    pub lease: Duration,
    /// How often each node is asked what it hosts, to find what differs from the database.
    #[arg(long, env = "SANDMESH_AUDIT_INTERVAL", value_parser = parse_duration, default_value = "30s")]
    pub audit_interval: Duration,
    /// After how long without a change a watch sends a heartbeat.
    #[arg(long, env = "SANDMESH_WATCH_HEARTBEAT", value_parser = parse_duration, default_value = "10s")]
    pub watch_heartbeat: Duration,
}
