//! Guests in memory, for simulations and for measuring everything but a VMM. They answer Configure and GetInfo, say what they
//! are told to, and run nothing.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::stream::{self, BoxStream};
use proto::{
    envd::v1::{
        ConfigureRequest, ConfigureResponse, ExportLayerRequest, ExportLayerResponse,
        GetInfoRequest, GetInfoResponse, GuestInfo, PrepareSnapshotRequest,
        PrepareSnapshotResponse, ShutdownRequest, ShutdownResponse, StreamLogsRequest,
        StreamLogsResponse, StreamMetricsRequest, StreamMetricsResponse, StreamSpansRequest,
        StreamSpansResponse,
        system_service_server::{SystemService, SystemServiceServer},
    },
    node::v1::VmmKind,
};
use service_kit::errors::{Failure, Reason};
use tokio::{io::DuplexStream, sync::watch};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Code, Request, Response, Status, transport::server::Connected};

use super::{
    BootSpec, LastWords, LinkStream, RestoreSpec, Vm, VmExit, Vmm, VmmError, memory,
    process::ProcessId,
};

const PIPE: usize = 64 << 10;

/// Behaviour on command.
#[derive(Debug, Clone, Default)]
pub struct Fake {
    /// How long a boot, or a restore, takes.
    pub boot_time: Duration,
    /// Whether boots and restores fail.
    pub fails: bool,
    /// Whether storing a guest fails, as on a full disk.
    pub disk_full: Option<watch::Receiver<bool>>,
    /// Sending ends every guest, as if its VMM had died.
    pub dies: Option<watch::Receiver<bool>>,
    /// So many connections to guests break at once.
    pub cut: Arc<AtomicU32>,
    /// Level of its envd's API; default: the oldest.
    pub envd_level: Option<u32>,
    /// The logs of every guest, by their numbers.
    pub says: Option<watch::Receiver<Vec<StreamLogsResponse>>>,
}

impl Fake {
    async fn start(&self) -> Result<Box<dyn Vm>, VmmError> {
        tokio::time::sleep(self.boot_time).await;
        if self.fails {
            return Err(VmmError::Ended(VmExit::Code(1)));
        }
        Ok(Box::new(FakeVm {
            dies: self.dies.clone(),
            says: self.says.clone(),
            cut: Arc::clone(&self.cut),
            envd_level: self.envd_level,
            disk_full: self.disk_full.clone(),
            guests: Vec::new(),
        }))
    }
}

#[tonic::async_trait]
impl Vmm for Fake {
    fn kind(&self) -> VmmKind {
        VmmKind::Fake
    }

    fn version(&self) -> &'static str {
        "fake"
    }

    fn needs_place(&self) -> bool {
        false
    }

    async fn boot(&self, _: BootSpec) -> Result<Box<dyn Vm>, VmmError> {
        self.start().await
    }

    async fn restore(&self, spec: RestoreSpec) -> Result<Box<dyn Vm>, VmmError> {
        if std::fs::read(&spec.devices).map_err(VmmError::Spawn)? != STORED {
            return Err(VmmError::Load("it is no fake guest's".into()));
        }
        self.start().await
    }

    async fn adopt(&self, _: &Path, _: ProcessId) -> Result<Option<Box<dyn Vm>>, VmmError> {
        // It lived in the process that is gone.
        Ok(None)
    }
}

/// What a stored fake guest is.
const STORED: &[u8] = b"fake";

#[derive(Debug)]
struct FakeVm {
    dies: Option<watch::Receiver<bool>>,
    says: Option<watch::Receiver<Vec<StreamLogsResponse>>>,
    cut: Arc<AtomicU32>,
    envd_level: Option<u32>,
    disk_full: Option<watch::Receiver<bool>>,
    guests: Vec<DropGuard>,
}

/// A process is collected after its channels have broken.
const SEEN_LATER: std::time::Duration = std::time::Duration::from_millis(50);

/// Never, if it cannot die.
async fn died(dies: Option<watch::Receiver<bool>>) {
    if let Some(mut dies) = dies
        && dies.wait_for(|dies| *dies).await.is_ok()
    {
        return;
    }
    std::future::pending::<()>().await;
}

impl FakeVm {
    /// Whether its control channel is still there.
    fn answer(&self) -> Result<(), VmmError> {
        if self.dies.as_ref().is_some_and(|dies| *dies.borrow()) {
            return Err(VmmError::Control(std::io::ErrorKind::BrokenPipe.into()));
        }
        Ok(())
    }

    fn put(&self, to: &Path) -> Result<(), VmmError> {
        if self.disk_full.as_ref().is_some_and(|full| *full.borrow()) {
            return Err(VmmError::Control(std::io::ErrorKind::StorageFull.into()));
        }
        std::fs::write(to, STORED).map_err(VmmError::Control)
    }
}

#[tonic::async_trait]
impl Vm for FakeVm {
    fn process(&self) -> Option<ProcessId> {
        None
    }

    fn moved(&mut self, _: &Path) {}

    async fn run(&mut self) -> Result<(), VmmError> {
        self.answer()
    }

    async fn pause(&mut self) -> Result<(), VmmError> {
        Ok(())
    }

    async fn store_devices(&mut self, to: &Path) -> Result<(), VmmError> {
        self.put(to)
    }

    async fn store_memory(&mut self, _: &Path, to: &Path) -> Result<(), VmmError> {
        Ok(memory::store_nothing(to)?)
    }

    async fn copy_memory(&mut self, _: &Path) -> Result<(), VmmError> {
        Ok(())
    }

    async fn connect(&mut self, _: Instant) -> Result<Box<dyn LinkStream>, VmmError> {
        self.answer()?;
        let (ours, mut far) = tokio::io::duplex(PIPE);
        let (mut near, guests) = tokio::io::duplex(PIPE);
        let dies = self.dies.clone();
        // As a VMM's channel, which ends with it, whatever the guest would still say.
        tokio::spawn(async move {
            tokio::select! {
                () = died(dies) => {}
                ended = tokio::io::copy_bidirectional(&mut far, &mut near) => {
                    if let Err(error) = ended {
                        tracing::debug!(%error, "the link to a fake guest broke");
                    }
                }
            }
        });
        let one_less = |left: u32| left.checked_sub(1);
        if self
            .cut
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less)
            .is_ok()
        {
            return Ok(Box::new(ours));
        }
        let stop = CancellationToken::new();
        self.guests.push(stop.clone().drop_guard());
        let server = tonic::transport::Server::builder()
            .add_service(SystemServiceServer::new(FakeGuest {
                says: self.says.clone(),
                level: self.envd_level.unwrap_or(1),
            }))
            .serve_with_incoming_shutdown(
                // One connection, and then none that ends: the server must outlive the handshake.
                tokio_stream::once(Ok::<_, std::io::Error>(Pipe(guests)))
                    .chain(tokio_stream::pending()),
                stop.cancelled_owned(),
            );
        tokio::spawn(async move {
            if let Err(error) = server.await {
                tracing::debug!(%error, "a fake guest ended");
            }
        });
        Ok(Box::new(ours))
    }

    async fn wait(&mut self) -> VmExit {
        died(self.dies.clone()).await;
        tokio::time::sleep(SEEN_LATER).await;
        VmExit::Signal(9)
    }

    async fn last_words(&mut self) -> LastWords {
        LastWords::default()
    }

    async fn kill(&mut self) {
        self.guests.clear();
    }
}

struct Pipe(DuplexStream);

impl Connected for Pipe {
    type ConnectInfo = ();
    fn connect_info(&self) {}
}

impl tokio::io::AsyncRead for Pipe {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buffer: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl tokio::io::AsyncWrite for Pipe {
    fn poll_write(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        bytes: &[u8],
    ) -> std::task::Poll<std::io::Result<usize>> {
        std::pin::Pin::new(&mut self.0).poll_write(cx, bytes)
    }
    fn poll_flush(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.0).poll_flush(cx)
    }
    fn poll_shutdown(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

struct FakeGuest {
    says: Option<watch::Receiver<Vec<StreamLogsResponse>>>,
    level: u32,
}

#[tonic::async_trait]
impl SystemService for FakeGuest {
    async fn configure(
        &self,
        request: Request<ConfigureRequest>,
    ) -> Result<Response<ConfigureResponse>, Status> {
        let request = request.into_inner();
        let info = GuestInfo {
            session_id: request.session_id,
            hostname: request.hostname,
            ..self.info()
        };
        Ok(Response::new(ConfigureResponse { info: Some(info) }))
    }

    async fn prepare_snapshot(
        &self,
        _: Request<PrepareSnapshotRequest>,
    ) -> Result<Response<PrepareSnapshotResponse>, Status> {
        Ok(Response::new(PrepareSnapshotResponse::default()))
    }

    type ExportLayerStream = BoxStream<'static, Result<ExportLayerResponse, Status>>;
    /// A layer without end.
    async fn export_layer(
        &self,
        _: Request<ExportLayerRequest>,
    ) -> Result<Response<Self::ExportLayerStream>, Status> {
        let piece = ExportLayerResponse {
            data: Bytes::from_static(b"layer"),
        };
        Ok(Response::new(Box::pin(stream::repeat(piece).map(Ok))))
    }

    async fn get_info(
        &self,
        _: Request<GetInfoRequest>,
    ) -> Result<Response<GetInfoResponse>, Status> {
        Ok(Response::new(GetInfoResponse {
            info: Some(self.info()),
        }))
    }

    async fn shutdown(
        &self,
        _: Request<ShutdownRequest>,
    ) -> Result<Response<ShutdownResponse>, Status> {
        Ok(Response::new(ShutdownResponse {}))
    }

    type StreamMetricsStream = ReceiverStream<Result<StreamMetricsResponse, Status>>;
    async fn stream_metrics(
        &self,
        _: Request<StreamMetricsRequest>,
    ) -> Result<Response<Self::StreamMetricsStream>, Status> {
        Err(Failure::not_yet("metrics of a fake guest").into())
    }

    type StreamLogsStream = BoxStream<'static, Result<StreamLogsResponse, Status>>;
    async fn stream_logs(
        &self,
        request: Request<StreamLogsRequest>,
    ) -> Result<Response<Self::StreamLogsStream>, Status> {
        let Some(says) = self.says.clone() else {
            return Ok(Response::new(Box::pin(stream::pending())));
        };
        let after = request.get_ref().after_sequence;
        let last = says.borrow().last().map_or(0, |message| message.sequence);
        if after > last {
            let reason = Reason::new("LOG_SEQUENCE_UNKNOWN");
            return Err(Failure::new(Code::OutOfRange, reason, "not yet said").into());
        }
        if request.get_ref().follow == Some(false) {
            let said = says.borrow().clone().into_iter();
            let rest = said.filter(move |said| said.sequence > after);
            return Ok(Response::new(Box::pin(stream::iter(rest.map(Ok)))));
        }
        let messages = stream::unfold((says, after), |(mut says, seen)| async move {
            let next = says.wait_for(|said| said.last().is_some_and(|last| last.sequence > seen));
            let next = next
                .await
                .ok()?
                .iter()
                .find(|said| said.sequence > seen)
                .cloned()?;
            let seen = next.sequence;
            Some((Ok(next), (says, seen)))
        });
        Ok(Response::new(Box::pin(messages)))
    }

    type StreamSpansStream = ReceiverStream<Result<StreamSpansResponse, Status>>;
    async fn stream_spans(
        &self,
        _: Request<StreamSpansRequest>,
    ) -> Result<Response<Self::StreamSpansStream>, Status> {
        Err(Failure::not_yet("spans of a fake guest").into())
    }
}

impl FakeGuest {
    fn info(&self) -> GuestInfo {
        GuestInfo {
            envd_version: "fake".into(),
            api_level: self.level,
            ..GuestInfo::default()
        }
    }
}
