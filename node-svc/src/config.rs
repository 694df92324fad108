//! Settings of node-svc.

use std::{path::PathBuf, time::Duration};

use service_kit::{
    address::Address,
    config::{parse_bytes, parse_duration},
};

use crate::vmm::{firecracker::MemoryChoice, users::UidRange};

/// Which VMM runs the guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum VmmChoice {
    /// QEMU, with KVM if a trial boot shows that it works, else emulated.
    Qemu,
    /// QEMU, always emulated.
    QemuTcg,
    /// Firecracker under its jailer, for hosts where KVM works: see docs/firecracker.md.
    Firecracker,
    /// In memory, for simulations: sessions start at once and run nothing.
    Fake,
}

/// Settings of node-svc.
#[derive(Debug, Clone, clap::Args)]
pub struct Config {
    /// Where Envoy reaches streams and ports (host:port).
    #[arg(long, env = "SANDMESH_NODE_INGRESS", default_value = "127.0.0.1:10110")]
    pub ingress: Address,
    /// Where other services and nodes call (host:port).
    #[arg(
        long,
        env = "SANDMESH_NODE_INTERNAL",
        default_value = "127.0.0.1:10111"
    )]
    pub internal: Address,
    /// Address of the ingress as others see it; default: as bound.
    #[arg(long, env = "SANDMESH_NODE_ADVERTISE_INGRESS")]
    pub advertise_ingress: Option<String>,
    /// Address of the internal listener as others see it; default: as bound.
    #[arg(long, env = "SANDMESH_NODE_ADVERTISE_INTERNAL")]
    pub advertise_internal: Option<String>,
    /// Folder of everything this node keeps. Keep it short: it holds unix sockets.
    #[arg(
        long,
        env = "SANDMESH_NODE_STATE",
        default_value = "/var/lib/sandmesh/node"
    )]
    pub state: PathBuf,
    /// Object store of what templates are made of, as template-svc has it; what is not to be had there is asked of template-svc. Default: template-svc
    /// is asked for all of it.
    #[arg(long, env = "SANDMESH_STORE", value_name = "FOLDER|URL")]
    pub store: Option<blobs::Address>,
    /// Room for what this node has fetched of templates, and for its snapshots of them; what was used longest ago goes first. Default: half of the file system of
    /// --state.
    #[arg(long, env = "SANDMESH_NODE_CACHE", value_parser = parse_bytes)]
    pub cache: Option<u64>,
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
    /// template-svc's addresses: artifacts.
    #[arg(
        long,
        env = "SANDMESH_TEMPLATE_ADDRESSES",
        value_delimiter = ',',
        default_value = "127.0.0.1:10102"
    )]
    pub template_addresses: Vec<Address>,
    /// Redis with the catalog: redis://host:port or redis+unix:///path.
    #[arg(long, env = "SANDMESH_REDIS_URL")]
    pub redis_url: String,
    /// Prefix of every Redis key and channel.
    #[arg(long, env = "SANDMESH_REDIS_PREFIX", default_value = "sandmesh")]
    pub redis_prefix: String,
    /// Domain of sandbox hosts.
    #[arg(long, env = "SANDMESH_DOMAIN", default_value = "sandmesh.localhost")]
    pub domain: String,
    /// How guests are run.
    #[arg(long, env = "SANDMESH_NODE_VMM", value_enum, default_value = "qemu")]
    pub vmm: VmmChoice,
    /// QEMU's program.
    #[arg(long, env = "SANDMESH_QEMU", default_value = "qemu-system-x86_64")]
    pub qemu: PathBuf,
    /// Guest kernel (an uncompressed ELF) whose trial boot shows whether KVM works here; without it guests are emulated.
    #[arg(long, env = "SANDMESH_NODE_TRIAL_KERNEL")]
    pub trial_kernel: Option<PathBuf>,
    /// Firecracker's program, 1.7 or newer.
    #[arg(long, env = "SANDMESH_FIRECRACKER", default_value = "firecracker")]
    pub firecracker: PathBuf,
    /// The program of its jailer, of the same release.
    #[arg(long, env = "SANDMESH_JAILER", default_value = "jailer")]
    pub jailer: PathBuf,
    /// Users and groups that VMMs run as, one for each network slot: FIRST-LAST. Nothing else may run as any of them.
    #[arg(
        long,
        env = "SANDMESH_VMM_UIDS",
        default_value = "1900000000-1900032767"
    )]
    pub vmm_uids: UidRange,
    /// How the memory of guests that Firecracker restores is filled.
    #[arg(
        long,
        env = "SANDMESH_FIRECRACKER_MEMORY",
        value_enum,
        default_value = "file"
    )]
    pub firecracker_memory: MemoryChoice,
    /// Give Firecracker's guests a serial console, the end of which is in the log when one does not start; it slows them down.
    #[arg(long, env = "SANDMESH_FIRECRACKER_CONSOLE")]
    pub firecracker_console: bool,
    /// envd's static program, which becomes every guest's init.
    #[arg(long, env = "SANDMESH_ENVD", default_value = "/usr/lib/sandmesh/envd")]
    pub envd: PathBuf,
    /// Sessions at most.
    #[arg(long, env = "SANDMESH_NODE_MAX_SESSIONS", default_value_t = 64)]
    pub max_sessions: u32,
    /// Guests kept ready for each template in use, at least.
    #[arg(long, env = "SANDMESH_NODE_WARM_MIN_IDLE", default_value_t = 0)]
    pub warm_min_idle: usize,
    /// Guests kept ready for each template in use, at most; 0 keeps none.
    #[arg(long, env = "SANDMESH_NODE_WARM_MAX_IDLE", default_value_t = 2)]
    pub warm_max_idle: usize,
    /// Memory of all guests kept ready, counted as if each used all it has.
    #[arg(long, env = "SANDMESH_NODE_WARM_MEMORY", default_value = "1GiB", value_parser = parse_bytes)]
    pub warm_memory: u64,
    /// A template is in use for so long after its last session started.
    #[arg(long, env = "SANDMESH_NODE_WARM_IDLE_TTL", default_value = "10m", value_parser = parse_duration)]
    pub warm_idle_ttl: Duration,
    /// Networks that no sandbox reaches, whatever its own rules say: 10.0.0.0/8,192.168.0.0/16.
    #[arg(long, env = "SANDMESH_NODE_EGRESS_DENY", value_delimiter = ',')]
    pub egress_deny: Vec<ipnet::Ipv4Net>,
    /// Memory for guests; default: three quarters of the host's.
    #[arg(long, env = "SANDMESH_NODE_MEMORY", value_parser = parse_bytes)]
    pub memory: Option<u64>,
    /// Virtual CPUs for guests; default: 16 for each of the host's.
    #[arg(long, env = "SANDMESH_NODE_VCPUS")]
    pub vcpus: Option<u32>,
    /// Sum of the sizes of writable disks; they are sparse.
    #[arg(long, env = "SANDMESH_NODE_DISK", value_parser = parse_bytes, default_value = "1TiB")]
    pub disk: u64,
    /// Guests that boot at once; default: the host's CPUs.
    #[arg(long, env = "SANDMESH_NODE_PARALLEL_BOOTS")]
    pub parallel_boots: Option<usize>,
    /// How long a guest has from its VMM's start until it is configured.
    #[arg(long, env = "SANDMESH_NODE_BOOT_TIMEOUT", value_parser = parse_duration, default_value = "60s")]
    pub boot_timeout: Duration,
    /// Network places kept ready.
    #[arg(long, env = "SANDMESH_NODE_READY_SLOTS", default_value_t = 4)]
    pub ready_slots: usize,
    /// Name servers of guests; default: the host's that are not on loopback, else 1.1.1.1 and 8.8.8.8.
    #[arg(long, env = "SANDMESH_NODE_NAMESERVERS", value_delimiter = ',')]
    pub nameservers: Vec<std::net::Ipv4Addr>,
    /// Logs of a session are kept for so long after its last message when it has ended.
    #[arg(long, env = "SANDMESH_NODE_LOG_RETENTION", default_value = "24h", value_parser = parse_duration)]
    pub log_retention: Duration,
    /// Logs of all sessions that have ended; beyond it the oldest go. One session has 4 MiB at most.
    #[arg(long, env = "SANDMESH_NODE_LOG_BYTES", default_value = "1GiB", value_parser = parse_bytes)]
    pub log_bytes: u64,
    /// Stop all sessions when node-svc is asked to stop. Without it they are left running and are lost at its next start.
    #[arg(long, env = "SANDMESH_NODE_STOP_SESSIONS_ON_EXIT")]
    pub stop_sessions_on_exit: bool,
}
