//! Settings of template-svc.

use std::path::PathBuf;

use service_kit::{address::Address, config::parse_bytes};

use crate::registry::TrustedRegistry;

/// Settings of template-svc.
#[derive(Debug, Clone, clap::Args)]
pub struct Config {
    /// Where the internal gRPC listener is (host:port or unix:/path).
    #[arg(
        long,
        env = "SANDMESH_TEMPLATE_LISTEN",
        default_value = "127.0.0.1:10102"
    )]
    pub listen: Address,
    /// Postgres: postgres://user@host/database, or with ?host=/socket/folder.
    #[arg(long, env = "SANDMESH_DATABASE_URL")]
    pub database_url: String,
    /// Connections to Postgres at most.
    #[arg(
        long,
        env = "SANDMESH_TEMPLATE_DATABASE_CONNECTIONS",
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
    /// Folder of artifacts, uploads and build work; shared by all replicas.
    #[arg(
        long,
        env = "SANDMESH_TEMPLATE_STATE",
        default_value = "/var/lib/sandmesh/templates"
    )]
    pub state: PathBuf,
    /// Object store of what templates are made of, from where nodes fetch it: a folder, or s3://bucket/prefix, gs://..., az://... with credentials in
    /// the environment, as AWS_ACCESS_KEY_ID. Default: the folder "store" of --state.
    #[arg(long, env = "SANDMESH_STORE", value_name = "FOLDER|URL")]
    pub store: Option<blobs::Address>,
    /// Folder of the guest kernel: vmlinux, modules.cpio and version.
    #[arg(long, env = "SANDMESH_KERNEL_DIR")]
    pub kernel_dir: PathBuf,
    /// Largest upload.
    #[arg(long, env = "SANDMESH_TEMPLATE_MAX_UPLOAD", value_parser = parse_bytes, default_value = "8GiB")]
    pub max_upload: u64,
    /// All that a team has uploaded in the last day.
    #[arg(long, env = "SANDMESH_TEMPLATE_UPLOADS_PER_TEAM", value_parser = parse_bytes, default_value = "64GiB")]
    pub uploads_per_team: u64,
    /// All that a team's templates are made of, packed. What its builds have remembered fills what versions leave of it.
    #[arg(long, env = "SANDMESH_TEMPLATE_STORAGE_PER_TEAM", value_parser = parse_bytes, default_value = "256GiB")]
    pub storage_per_team: u64,
    /// Largest root filesystem after unpacking.
    #[arg(long, env = "SANDMESH_TEMPLATE_MAX_ROOTFS", value_parser = parse_bytes, default_value = "32GiB")]
    pub max_rootfs: u64,
    /// Builds at once. Those that wait for their microVMs take little of this host.
    #[arg(long, env = "SANDMESH_TEMPLATE_BUILDS", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub builds: u32,
    /// Builds of one team at once, over all replicas.
    #[arg(long, env = "SANDMESH_TEMPLATE_BUILDS_PER_TEAM", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub builds_per_team: u32,
    /// Registries that may be asked although they lie on private addresses: host or host:port, with http:// before it for one without
    /// TLS. Others are asked by HTTPS only, and on public addresses only.
    #[arg(long, env = "SANDMESH_TRUSTED_REGISTRIES", value_delimiter = ',')]
    pub trusted_registries: Vec<TrustedRegistry>,
}
