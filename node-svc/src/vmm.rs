//! What runs guests. [`Vmm`] starts one, [`Vm`] is a running one; the driver of a session knows no more.
//!
//! A second VMM is a new file in `vmm/` that implements both traits, and a line in `app.rs`. Restoring from a snapshot will be a
//! second way to make a [`Vm`] beside [`Vmm::boot`]; everything after that stays as it is.

use std::{net::IpAddr, path::PathBuf, time::Instant};

use proto::node::v1::VmmKind;
use tokio::io::{AsyncRead, AsyncWrite};

pub mod fake;
pub mod process;
pub mod qemu;
mod qmp;

/// The network place a guest is put into.
#[derive(Debug, Clone)]
pub struct GuestPlace {
    /// Network namespace of the VMM.
    pub netns: PathBuf,
    /// Tap device in it.
    pub tap: String,
    /// The guest's hardware address.
    pub mac: String,
    /// Where the node reaches the guest.
    pub reach: IpAddr,
}

/// What a guest boots from.
#[derive(Debug, Clone)]
pub struct BootSpec {
    /// Folder for sockets and logs of this guest.
    pub folder: PathBuf,
    /// Uncompressed kernel.
    pub kernel: PathBuf,
    /// Modules and envd.
    pub initrd: PathBuf,
    /// Read-only root image.
    pub rootfs: PathBuf,
    /// Writable disk.
    pub scratch: PathBuf,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory in bytes, whole MiB.
    pub memory_bytes: u64,
    /// Its network place; none for VMMs without a network.
    pub place: Option<GuestPlace>,
}

/// A guest did not start.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// The VMM's process could not be started.
    #[error("the VMM cannot be started: {0}")]
    Spawn(std::io::Error),
    /// It ended before it was of use.
    #[error("the VMM ended at once ({0})")]
    Ended(VmExit),
    /// The channel to the guest could not be made.
    #[error("the guest does not answer: {0}")]
    Link(String),
}

/// How a VMM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmExit {
    /// With a code; 0 also when the guest powered off.
    Code(i32),
    /// By a signal.
    Signal(i32),
}

impl std::fmt::Display for VmExit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(signal) => write!(f, "signal {signal}"),
        }
    }
}

/// Bytes to and from envd.
pub trait LinkStream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> LinkStream for S {}

/// A way to run guests.
#[tonic::async_trait]
pub trait Vmm: Send + Sync + std::fmt::Debug {
    /// How it runs them.
    fn kind(&self) -> VmmKind;
    /// Its version, as it says.
    fn version(&self) -> &str;
    /// Whether guests need a network place.
    fn needs_place(&self) -> bool;
    /// Starts a guest; returns as soon as its VMM runs.
    async fn boot(&self, spec: BootSpec) -> Result<Box<dyn Vm>, VmmError>;
}

/// A running guest. Dropping it does not end it.
#[tonic::async_trait]
pub trait Vm: Send + std::fmt::Debug {
    /// The VMM's process, if it has one: PID and start time.
    fn process(&self) -> Option<process::ProcessId>;
    /// Opens the channel to envd.
    async fn connect(&mut self, deadline: Instant) -> Result<Box<dyn LinkStream>, VmmError>;
    /// Waits until it ends by itself. Cancel-safe.
    async fn wait(&mut self) -> VmExit;
    /// The last the guest said on its console.
    async fn console_tail(&mut self) -> String;
    /// Ends it; returns when it is gone.
    async fn kill(&mut self);
}
