//! The words of Firecracker's API this driver needs (`src/firecracker/swagger/firecracker.yaml` of Firecracker): JSON over HTTP/1.1
//! on a unix socket, one connection per call, so that a call that was given up is never answered to another.

use std::{io, time::Duration};

use axum::body::{self, Body};
use http::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::jail::JailRoot;

/// The longest answer: GET /vm/config, which is not asked for, would be some KiB.
pub const LONGEST_ANSWER: usize = 64 << 10;

/// Firecracker did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// It refused; in its own words.
    #[error("{call}: {fault} (HTTP {status})")]
    Refused {
        /// Method and path.
        call: String,
        /// HTTP status.
        status: u16,
        /// Its `fault_message`.
        fault: String,
    },
    /// It did not answer in time.
    #[error("{call}: no answer within {limit:?}")]
    Late {
        /// Method and path.
        call: String,
        /// How long it had.
        limit: Duration,
    },
    /// It could not be asked, or its answer not be read.
    #[error("{call}: {cause}")]
    Broken {
        /// Method and path.
        call: String,
        /// Why.
        cause: io::Error,
    },
}

impl From<ApiError> for io::Error {
    fn from(error: ApiError) -> Self {
        let kind = match &error {
            ApiError::Refused { fault, .. } if fault.contains("No space left on device") => {
                io::ErrorKind::StorageFull
            }
            ApiError::Refused { .. } => io::ErrorKind::Other,
            ApiError::Late { .. } => io::ErrorKind::TimedOut,
            ApiError::Broken { cause, .. } => cause.kind(),
        };
        Self::new(kind, error)
    }
}

/// `GET /`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct InstanceInfo {
    /// The name given to the jailer.
    pub id: String,
    /// Whether its guest runs.
    pub state: InstanceState,
    /// Its version.
    pub vmm_version: String,
}

/// Whether the guest runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum InstanceState {
    /// There is none yet.
    #[serde(rename = "Not started")]
    NotStarted,
    /// Its CPUs run.
    Running,
    /// They stand still.
    Paused,
}

/// `GET /version`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Version {
    /// As its program says.
    pub firecracker_version: String,
}

/// `PUT /boot-source`.
#[derive(Debug, Clone, Serialize)]
pub struct BootSource {
    /// Uncompressed kernel.
    pub kernel_image_path: String,
    /// Initial RAM disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd_path: Option<String>,
    /// The kernel's command line; Firecracker adds what describes its devices.
    pub boot_args: String,
}

/// `PUT /drives/{drive_id}`.
#[derive(Debug, Clone, Serialize)]
pub struct Drive {
    /// Its name.
    pub drive_id: String,
    /// Its file.
    pub path_on_host: String,
    /// Whether Firecracker names it as the root on the command line.
    pub is_root_device: bool,
    /// Whether it is never written.
    pub is_read_only: bool,
    /// `Writeback` makes a guest's flush an fsync; `Unsafe` makes it nothing.
    pub cache_type: CacheType,
}

/// What a flush of the guest does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum CacheType {
    /// Nothing.
    Unsafe,
    /// fsync(2).
    Writeback,
}

/// `PUT /network-interfaces/{iface_id}`.
#[derive(Debug, Clone, Serialize)]
pub struct NetworkInterface {
    /// Its name.
    pub iface_id: String,
    /// The guest's hardware address.
    pub guest_mac: String,
    /// The tap.
    pub host_dev_name: String,
}

/// `PUT /machine-config`.
#[derive(Debug, Clone, Serialize)]
pub struct MachineConfig {
    /// Virtual CPUs.
    pub vcpu_count: u32,
    /// Memory.
    pub mem_size_mib: u64,
    /// Whether CPUs are threads of cores.
    pub smt: bool,
    /// Whether KVM notes which pages are written.
    pub track_dirty_pages: bool,
}

/// `PUT /vsock`.
#[derive(Debug, Clone, Serialize)]
pub struct Vsock {
    /// The guest's address.
    pub guest_cid: u32,
    /// The socket that stands for it on the host.
    pub uds_path: String,
}

/// `PUT /entropy`: a virtio-rng, unlimited.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Entropy {}

/// `PUT /balloon`.
#[derive(Debug, Clone, Serialize)]
pub struct Balloon {
    /// How much it takes.
    pub amount_mib: u64,
    /// Whether the guest gets it back rather than kill a process.
    pub deflate_on_oom: bool,
    /// Between two statistics; 0 is none, for good.
    pub stats_polling_interval_s: u16,
    /// Whether the guest tells what is free (Firecracker 1.14 and newer; older ones refuse the word).
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub free_page_reporting: bool,
}

/// `GET /balloon/statistics`, as far as it is of use.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct BalloonStatistics {
    /// How much it is to take.
    pub target_mib: u64,
    /// How much it has.
    pub actual_mib: u64,
    /// Bytes nobody uses.
    pub free_memory: Option<u64>,
}

/// `PUT /serial` (Firecracker 1.14 and newer).
#[derive(Debug, Clone, Serialize)]
pub struct Serial {
    /// Where the guest's serial port is written to.
    pub serial_out_path: String,
}

/// `PUT /logger`.
#[derive(Debug, Clone, Serialize)]
pub struct Logger {
    /// Where to.
    pub log_path: String,
    /// From which weight on.
    pub level: String,
}

/// `PUT /metrics`.
#[derive(Debug, Clone, Serialize)]
pub struct Metrics {
    /// Where to.
    pub metrics_path: String,
}

/// `PUT /actions`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Action {
    /// Boots.
    InstanceStart,
    /// Writes metrics now.
    FlushMetrics,
    /// Asks an x86 guest to end.
    SendCtrlAltDel,
}

/// `PATCH /vm`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum VmState {
    /// CPUs stand still.
    Paused,
    /// They run.
    Resumed,
}

/// What a snapshot is to hold of the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum SnapshotType {
    /// All of it.
    Full,
    /// What was written since the one before, or since the load.
    Diff,
}

/// `PUT /snapshot/create`.
#[derive(Debug, Clone, Serialize)]
pub struct SnapshotCreate {
    /// How much memory.
    pub snapshot_type: SnapshotType,
    /// Where CPUs and devices go.
    pub snapshot_path: String,
    /// Where memory goes.
    pub mem_file_path: String,
}

/// `PUT /snapshot/load`.
#[derive(Debug, Clone, Serialize)]
pub struct SnapshotLoad {
    /// CPUs and devices.
    pub snapshot_path: String,
    /// Memory.
    pub mem_backend: MemoryBackend,
    /// Whether written pages are noted from here on: its name since Firecracker 1.13.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub track_dirty_pages: bool,
    /// The same, before 1.13.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub enable_diff_snapshots: bool,
    /// Whether it runs at once.
    pub resume_vm: bool,
}

/// Where a restored guest's memory comes from.
#[derive(Debug, Clone, Serialize)]
pub struct MemoryBackend {
    /// How.
    pub backend_type: BackendType,
    /// Where.
    pub backend_path: String,
}

/// How a restored guest's memory is filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum BackendType {
    /// By mapping a file privately.
    File,
    /// By another process, page by page.
    Uffd,
}

/// All of a guest's machine: what `--config-file` takes.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct VmConfig {
    /// What it boots.
    pub boot_source: BootSource,
    /// Disks, in the guest's order.
    pub drives: Vec<Drive>,
    /// CPUs and memory.
    pub machine_config: MachineConfig,
    /// Network.
    pub network_interfaces: Vec<NetworkInterface>,
    /// The channel to the guest.
    pub vsock: Vsock,
    /// Memory to take back.
    pub balloon: Balloon,
    /// Random bytes.
    pub entropy: Entropy,
}

#[derive(Deserialize)]
struct Fault {
    fault_message: String,
}

/// The API of one Firecracker.
#[derive(Debug, Clone)]
pub struct Api {
    root: JailRoot,
    socket: &'static str,
}

impl Api {
    /// The API behind a socket in a jail; nothing is asked yet.
    pub fn new(root: JailRoot, socket: &'static str) -> Self {
        Self { root, socket }
    }

    /// What it is and whether its guest runs.
    pub async fn describe(&self, limit: Duration) -> Result<InstanceInfo, ApiError> {
        self.get("/", limit).await
    }

    /// Its version.
    pub async fn version(&self, limit: Duration) -> Result<Version, ApiError> {
        self.get("/version", limit).await
    }

    /// What is booted.
    pub async fn boot_source(&self, source: &BootSource, limit: Duration) -> Result<(), ApiError> {
        self.put("/boot-source", source, limit).await
    }

    /// Adds a disk.
    pub async fn drive(&self, drive: &Drive, limit: Duration) -> Result<(), ApiError> {
        let path = format!("/drives/{}", drive.drive_id);
        self.put(&path, drive, limit).await
    }

    /// Adds a network device.
    pub async fn network_interface(
        &self,
        interface: &NetworkInterface,
        limit: Duration,
    ) -> Result<(), ApiError> {
        let path = format!("/network-interfaces/{}", interface.iface_id);
        self.put(&path, interface, limit).await
    }

    /// Sets CPUs and memory.
    pub async fn machine_config(
        &self,
        config: &MachineConfig,
        limit: Duration,
    ) -> Result<(), ApiError> {
        self.put("/machine-config", config, limit).await
    }

    /// Adds the channel to the guest.
    pub async fn vsock(&self, vsock: &Vsock, limit: Duration) -> Result<(), ApiError> {
        self.put("/vsock", vsock, limit).await
    }

    /// Adds the entropy device.
    pub async fn entropy(&self, limit: Duration) -> Result<(), ApiError> {
        self.put("/entropy", &Entropy {}, limit).await
    }

    /// Adds the balloon.
    pub async fn balloon(&self, balloon: &Balloon, limit: Duration) -> Result<(), ApiError> {
        self.put("/balloon", balloon, limit).await
    }

    /// Sets how much the balloon takes.
    pub async fn inflate(&self, amount_mib: u64, limit: Duration) -> Result<(), ApiError> {
        let update = serde_json::json!({ "amount_mib": amount_mib });
        self.patch("/balloon", &update, limit).await
    }

    /// What the balloon has; refused if it was made without statistics.
    pub async fn balloon_statistics(&self, limit: Duration) -> Result<BalloonStatistics, ApiError> {
        self.get("/balloon/statistics", limit).await
    }

    /// Where the serial port goes.
    pub async fn serial(&self, serial: &Serial, limit: Duration) -> Result<(), ApiError> {
        self.put("/serial", serial, limit).await
    }

    /// Where its log goes.
    pub async fn logger(&self, logger: &Logger, limit: Duration) -> Result<(), ApiError> {
        self.put("/logger", logger, limit).await
    }

    /// Where its metrics go.
    pub async fn metrics(&self, metrics: &Metrics, limit: Duration) -> Result<(), ApiError> {
        self.put("/metrics", metrics, limit).await
    }

    /// Does something once.
    pub async fn action(&self, action: Action, limit: Duration) -> Result<(), ApiError> {
        let action = serde_json::json!({ "action_type": action });
        self.put("/actions", &action, limit).await
    }

    /// Lets the guest's CPUs run or stand still; as they are already is no error.
    pub async fn set_state(&self, state: VmState, limit: Duration) -> Result<(), ApiError> {
        let state = serde_json::json!({ "state": state });
        self.patch("/vm", &state, limit).await
    }

    /// Stores a guest that stands still.
    pub async fn create_snapshot(
        &self,
        snapshot: &SnapshotCreate,
        limit: Duration,
    ) -> Result<(), ApiError> {
        self.put("/snapshot/create", snapshot, limit).await
    }

    /// Loads a guest into a process that was told nothing yet; a refusal ends the process.
    pub async fn load_snapshot(
        &self,
        snapshot: &SnapshotLoad,
        limit: Duration,
    ) -> Result<(), ApiError> {
        self.put("/snapshot/load", snapshot, limit).await
    }

    async fn get<T: DeserializeOwned>(&self, path: &str, limit: Duration) -> Result<T, ApiError> {
        let call = format!("GET {path}");
        let answer = self.call(Method::GET, path, Vec::new(), limit).await?;
        serde_json::from_slice(&answer).map_err(|error| ApiError::Broken {
            call,
            cause: io::Error::new(io::ErrorKind::InvalidData, error),
        })
    }

    async fn put(
        &self,
        path: &str,
        body: &impl Serialize,
        limit: Duration,
    ) -> Result<(), ApiError> {
        self.send(Method::PUT, path, body, limit).await
    }

    async fn patch(
        &self,
        path: &str,
        body: &impl Serialize,
        limit: Duration,
    ) -> Result<(), ApiError> {
        self.send(Method::PATCH, path, body, limit).await
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
        limit: Duration,
    ) -> Result<(), ApiError> {
        let body = serde_json::to_vec(body).map_err(|error| ApiError::Broken {
            call: format!("{method} {path}"),
            cause: error.into(),
        })?;
        self.call(method, path, body, limit).await.map(drop)
    }

    /// One call on a connection of its own; the limit covers all of it.
    async fn call(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
        limit: Duration,
    ) -> Result<Vec<u8>, ApiError> {
        let call = format!("{method} {path}");
        let exchanged = tokio::time::timeout(limit, self.exchange(method, path, body)).await;
        let (status, answer) = match exchanged {
            Ok(Ok(answered)) => answered,
            Ok(Err(cause)) => return Err(ApiError::Broken { call, cause }),
            Err(_) => return Err(ApiError::Late { call, limit }),
        };
        if status.is_success() {
            return Ok(answer);
        }
        // Every refusal has a `fault_message`; whatever else comes is shown as it is.
        let fault = serde_json::from_slice(&answer).map_or_else(
            |_| String::from_utf8_lossy(&answer).into_owned(),
            |Fault { fault_message }| fault_message,
        );
        Err(ApiError::Refused {
            call,
            status: status.as_u16(),
            fault,
        })
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> io::Result<(StatusCode, Vec<u8>)> {
        let stream = self.root.connect(self.socket).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(io::Error::other)?;
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(http::header::HOST, "localhost")
            .header(http::header::ACCEPT, "application/json");
        // A GET with a body is refused, be it empty.
        if !body.is_empty() {
            request = request.header(http::header::CONTENT_TYPE, "application/json");
        }
        let request = request.body(Body::from(body)).map_err(io::Error::other)?;
        let answer = async {
            let answer = sender
                .send_request(request)
                .await
                .map_err(io::Error::other)?;
            let status = answer.status();
            let bytes = body::to_bytes(Body::new(answer.into_body()), LONGEST_ANSWER)
                .await
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            Ok((status, bytes.to_vec()))
        };
        let mut connection = std::pin::pin!(connection);
        let mut answer = std::pin::pin!(answer);
        tokio::select! {
            answer = &mut answer => answer,
            // It may end right after the answer's last byte, which is then still to be read.
            ended = &mut connection => match ended {
                Ok(()) => answer.await,
                Err(error) => Err(io::Error::other(error)),
            },
        }
    }
}
