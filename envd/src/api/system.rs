//! `sandmesh.envd.v1.SystemService`.

use std::{io, sync::Arc, time::Duration};

use futures::{StreamExt as _, stream};
use nix::sys::{
    reboot::{RebootMode, reboot},
    signal::Signal,
};
use proto::envd::v1::{
    ConfigureRequest, ConfigureResponse, ExportLayerRequest, ExportLayerResponse, GetInfoRequest,
    GetInfoResponse, PrepareSnapshotRequest, PrepareSnapshotResponse, ShutdownRequest,
    ShutdownResponse, StreamLogsRequest, StreamLogsResponse, StreamMetricsRequest,
    StreamMetricsResponse, StreamSpansRequest, StreamSpansResponse,
    system_service_server::SystemService,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status};

use super::Answers;
use crate::{
    errors::{invalid, refuse, refuse_with},
    files::layer,
    gate::Stand,
    identity::Guest,
    logs,
    process::Processes,
    snapshot,
    spans::Spans,
    usage,
    web::Outward,
};

/// Of a layer: size of its pieces, and how many wait.
const CHUNK: usize = 256 << 10;
const IN_FLIGHT: usize = 4;
const LOOK_AGAIN: Duration = Duration::from_millis(10);
const INTERVAL: Duration = Duration::from_secs(1);
const SHORTEST_INTERVAL: Duration = Duration::from_millis(100);
const LONGEST_INTERVAL: Duration = Duration::from_hours(1);

pub(crate) struct Api {
    pub(crate) processes: Processes,
    pub(crate) guest: Arc<Guest>,
    pub(crate) spans: Spans,
}

#[tonic::async_trait]
impl SystemService for Api {
    async fn configure(
        &self,
        request: Request<ConfigureRequest>,
    ) -> Result<Response<ConfigureResponse>, Status> {
        self.guest.configure(request.into_inner()).await?;
        Ok(Response::new(ConfigureResponse {
            info: Some(self.guest.info()),
        }))
    }

    async fn prepare_snapshot(
        &self,
        request: Request<PrepareSnapshotRequest>,
    ) -> Result<Response<PrepareSnapshotResponse>, Status> {
        // Goes through to its end, also if the node is gone: half way, processes would be frozen after a later call has let them go.
        let preparing = snapshot::prepare(
            Arc::clone(&self.guest),
            self.processes.clone(),
            request.into_inner().network,
        );
        let free_memory_bytes = tokio::spawn(preparing)
            .await
            .map_err(|error| refuse(Code::Internal, "PREPARE_FAILED", error.to_string()))??;
        Ok(Response::new(PrepareSnapshotResponse { free_memory_bytes }))
    }

    type ExportLayerStream = Answers<ExportLayerResponse>;

    async fn export_layer(
        &self,
        _: Request<ExportLayerRequest>,
    ) -> Result<Response<Self::ExportLayerStream>, Status> {
        if self.guest.gate.stand() != Stand::Closed || !self.guest.owns_system {
            let message = "only a guest that stands still for a snapshot has a layer";
            return Err(refuse(Code::FailedPrecondition, "GUEST_NOT_STILL", message));
        }
        let (to, chunks) = mpsc::channel(IN_FLIGHT);
        let last = to.clone();
        tokio::spawn(async move {
            let exported = tokio::task::spawn_blocking(move || {
                layer::export(io::BufWriter::with_capacity(CHUNK, Outward(to)))
            });
            if let Err(error) = exported.await.map_err(io::Error::other).flatten() {
                let status = refuse(Code::Aborted, "EXPORT_FAILED", error.to_string());
                // Nobody listens any more, or the layer breaks off there.
                let _ = last.send(Err(status)).await;
            }
        });
        let chunks = ReceiverStream::new(chunks);
        let answers = chunks.map(|data| Ok(ExportLayerResponse { data: data? }));
        Ok(Response::new(Box::pin(answers)))
    }

    async fn get_info(
        &self,
        _: Request<GetInfoRequest>,
    ) -> Result<Response<GetInfoResponse>, Status> {
        Ok(Response::new(GetInfoResponse {
            info: Some(self.guest.info()),
        }))
    }

    type StreamMetricsStream = Answers<StreamMetricsResponse>;

    async fn stream_metrics(
        &self,
        request: Request<StreamMetricsRequest>,
    ) -> Result<Response<Self::StreamMetricsStream>, Status> {
        self.guest.gate.admit()?;
        let interval = parse_interval(request.get_ref().interval)?;
        let guest = Arc::clone(&self.guest);
        let measured = stream::unfold((guest, true), move |(guest, is_first)| async move {
            if !is_first {
                guest.gate.sleep(interval).await;
            }
            let used = usage::measure().await;
            let used = used.map_err(|error| refuse(Code::Internal, "METRICS_FAILED", error));
            Some((used, (guest, false)))
        });
        Ok(Response::new(Box::pin(measured)))
    }

    type StreamLogsStream = Answers<StreamLogsResponse>;

    async fn stream_logs(
        &self,
        request: Request<StreamLogsRequest>,
    ) -> Result<Response<Self::StreamLogsStream>, Status> {
        self.guest.gate.admit()?;
        let StreamLogsRequest {
            after_sequence,
            follow,
        } = *request.get_ref();
        let messages = logs::read(after_sequence, follow.unwrap_or(true)).map_err(|last| {
            refuse_with(
                Code::OutOfRange,
                "LOG_SEQUENCE_UNKNOWN",
                format!("there is no message {after_sequence} yet, the last is {last}"),
                &[("lastSequence", last.to_string())],
            )
        })?;
        Ok(Response::new(Box::pin(messages.map(Ok))))
    }

    type StreamSpansStream = Answers<StreamSpansResponse>;

    async fn stream_spans(
        &self,
        _: Request<StreamSpansRequest>,
    ) -> Result<Response<Self::StreamSpansStream>, Status> {
        let finished = stream::unfold(self.spans.clone(), |spans| async move {
            Some((Ok(spans.take().await), spans))
        });
        Ok(Response::new(Box::pin(finished)))
    }

    async fn shutdown(
        &self,
        request: Request<ShutdownRequest>,
    ) -> Result<Response<ShutdownResponse>, Status> {
        let grace = request
            .get_ref()
            .grace
            .and_then(|grace| Duration::try_from(grace).ok())
            .unwrap_or_default();
        let processes = self.processes.clone();
        tokio::spawn(async move {
            processes.signal_all(Signal::SIGTERM);
            let ended = async {
                while processes.running() > 0 {
                    tokio::time::sleep(LOOK_AGAIN).await;
                }
            };
            // Those that do not go by themselves go now.
            let _ = tokio::time::timeout(grace, ended).await;
            processes.signal_all(Signal::SIGKILL);
            nix::unistd::sync();
            // The keeper is the system's init, or that of a namespace, which ends as a guest would (reboot(2)).
            if std::os::unix::process::parent_id() == 1
                && let Err(error) = reboot(RebootMode::RB_POWER_OFF)
            {
                logs::warn(format_args!("power off: {error}"));
            }
        });
        Ok(Response::new(ShutdownResponse {}))
    }
}

fn parse_interval(interval: Option<prost_types::Duration>) -> Result<Duration, Status> {
    let interval = interval.map_or(Ok(INTERVAL), Duration::try_from);
    interval
        .ok()
        .filter(|interval| (SHORTEST_INTERVAL..=LONGEST_INTERVAL).contains(interval))
        .ok_or_else(|| invalid("interval", "must be from 100 ms to 1 hour"))
}
