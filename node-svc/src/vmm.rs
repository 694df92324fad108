//! What runs guests. [`Vmm`] starts one, [`Vm`] is a running one; the driver of a session knows no more.
//!
//! ```text
//!  boot ----------------------------------> running <-> paused --store--> files
//!  restore: from a template's snapshot, or from that and what was stored --> paused --run--> running
//!  adopt: what an earlier node-svc left running
//! ```
//! A second VMM is a new file in `vmm/` that implements both traits, and a line in `app.rs`.

use std::{
    io,
    net::IpAddr,
    path::{Path, PathBuf},
    time::Instant,
};

use proto::node::v1::VmmKind;
use service_kit::kernel_arguments::KernelArguments;
use tokio::io::{AsyncRead, AsyncWrite};

pub mod cgroup;
pub mod fake;
pub mod firecracker;
pub mod memory;
pub mod process;
pub mod qemu;
mod qmp;
pub mod users;

use memory::MemoryError;

/// Of a template's snapshot, and what a guest maps as its memory.
pub const MEMORY: &str = "memory";
/// What differs from the template's snapshot.
pub const MEMORY_DIFFERENCE: &str = "memory.diff";
/// State of CPUs and devices.
pub const DEVICES: &str = "devices";
/// In a guest's folder, what belongs to its VMM's user: sockets, and files it writes until they are taken from it.
pub const ROOM: &str = "vmm";

/// The network place a guest is put into.
#[derive(Debug, Clone)]
pub struct GuestPlace {
    /// Number of its slot: no other on this host has it.
    pub slot: u32,
    /// Network namespace of the VMM.
    pub netns: PathBuf,
    /// Tap device in it.
    pub tap: String,
    /// The guest's hardware address.
    pub mac: String,
    /// Where the node reaches the guest.
    pub reach: IpAddr,
}

/// A guest's machine: the same for a boot and for every restore of what booted.
#[derive(Debug, Clone)]
pub struct Machine {
    /// Folder of this guest: its sockets, its log, and [`MEMORY`]. It may be renamed while the guest runs.
    pub folder: PathBuf,
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

/// What a guest boots from.
#[derive(Debug, Clone)]
pub struct BootSpec {
    /// Its machine. [`MEMORY`] in its folder is made, and holds the guest's memory from then on.
    pub machine: Machine,
    /// Uncompressed kernel.
    pub kernel: PathBuf,
    /// Modules and envd.
    pub initrd: PathBuf,
    /// What its command line has after our own words.
    pub arguments: KernelArguments,
}

/// What a guest is restored from.
#[derive(Debug, Clone)]
pub struct RestoreSpec {
    /// Its machine. [`MEMORY`] in its folder is mapped privately: it is never written.
    pub machine: Machine,
    /// State of CPUs and devices.
    pub devices: PathBuf,
    /// What of the memory differs from [`MEMORY`].
    pub difference: Option<PathBuf>,
}

/// A guest did not start, or did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// The VMM's process could not be started.
    #[error("the VMM cannot be started: {0}")]
    Spawn(io::Error),
    /// It ended before it was of use.
    #[error("the VMM ended at once ({0})")]
    Ended(VmExit),
    /// The channel to the guest could not be made.
    #[error("the guest does not answer: {0}")]
    Link(String),
    /// The VMM refused a command, or did not answer it.
    #[error("the VMM did not do as told: {0}")]
    Control(io::Error),
    /// The guest's memory could not be stored or put back.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The VMM did not take what was stored.
    #[error("the stored state cannot be loaded: {0}")]
    Load(String),
}

impl VmmError {
    /// Whether the node's disk is full.
    pub fn is_disk_full(&self) -> bool {
        let (Self::Spawn(error) | Self::Control(error) | Self::Memory(MemoryError::Io(error))) =
            self
        else {
            return false;
        };
        // QEMU hands on what the system said in words only.
        error.kind() == io::ErrorKind::StorageFull
            || error.to_string().contains("No space left on device")
    }
}

/// How a VMM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmExit {
    /// With a code.
    Code(i32),
    /// By a signal.
    Signal(i32),
    /// It was not our child, so nobody told us.
    Unknown,
    /// The guest powered off, rebooted or panicked; in the VMM's word.
    Guest(String),
    /// It does not move or answer any more.
    Hung,
    /// The host ended it, because it took more memory than it may.
    OutOfMemory,
}

impl std::fmt::Display for VmExit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(signal) => write!(f, "signal {signal}"),
            Self::Unknown => write!(f, "how is not known"),
            Self::Guest(word) => write!(f, "the guest ended: {word}"),
            Self::Hung => write!(f, "it hung"),
            Self::OutOfMemory => write!(f, "it took more memory than it may"),
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
    /// Whether guests need a network place, a root and disks: all but simulated ones do.
    fn needs_place(&self) -> bool;
    /// Starts a guest; returns as soon as its VMM runs.
    async fn boot(&self, spec: BootSpec) -> Result<Box<dyn Vm>, VmmError>;
    /// Loads a guest, which stands still until [`Vm::run`]. On an error nothing is left of it.
    async fn restore(&self, spec: RestoreSpec) -> Result<Box<dyn Vm>, VmmError>;
    /// Takes over a guest that an earlier node-svc left in this folder; `None` if it is gone.
    async fn adopt(
        &self,
        folder: &Path,
        process: process::ProcessId,
    ) -> Result<Option<Box<dyn Vm>>, VmmError>;
}

/// The end of what was said by and of a guest; control characters and all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LastWords {
    /// On its console: for its owner.
    pub guest: String,
    /// By its VMM, maybe mixed with its console: for the operator.
    pub vmm: String,
}

impl std::fmt::Display for LastWords {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{}", self.guest, self.vmm)
    }
}

/// A running guest. Dropping it does not end it.
#[tonic::async_trait]
pub trait Vm: Send + Sync + std::fmt::Debug {
    /// The VMM's process, if it has one: PID and start time.
    fn process(&self) -> Option<process::ProcessId>;
    /// Its folder was renamed.
    fn moved(&mut self, folder: &Path);
    /// Opens the channel to envd; one opened before is of no use any more.
    async fn connect(&mut self, deadline: Instant) -> Result<Box<dyn LinkStream>, VmmError>;
    /// Lets its CPUs run.
    async fn run(&mut self) -> Result<(), VmmError>;
    /// Has the guest give memory back that it does not use, of which it says that it is `free` bytes; for some seconds at most, and only if
    /// that is worth while. [`Vm::run`] lets it have all of it again. VMMs that cannot do it store more.
    async fn shrink(&mut self, _free: u64) -> Result<(), VmmError> {
        Ok(())
    }
    /// Stops its CPUs; what it wrote is in the disk's file then.
    async fn pause(&mut self) -> Result<(), VmmError>;
    /// Whether a guest that was stored and goes on has the channel it had; else it needs another [`Vm::connect`].
    fn link_outlives_store(&self) -> bool {
        true
    }
    /// Stores CPUs and devices of a guest that stands still in a new file. Of a guest that booted, [`MEMORY`] is whole after it.
    async fn store_devices(&mut self, to: &Path) -> Result<(), VmmError>;
    /// Stores what of the memory of a guest that stands still differs from `base`, its template's, in a new file.
    async fn store_memory(&mut self, base: &Path, to: &Path) -> Result<(), VmmError>;
    /// Puts the memory of a guest that stands still into `copy`, a copy of the [`MEMORY`] in its folder.
    async fn copy_memory(&mut self, copy: &Path) -> Result<(), VmmError>;
    /// Waits until it ends by itself, or hangs. Cancel-safe.
    async fn wait(&mut self) -> VmExit;
    /// The last that was said before its end. Each word is told once.
    async fn last_words(&mut self) -> LastWords;
    /// Ends it; returns when it is gone.
    async fn kill(&mut self);
}
