//! `sandmesh.envd.v1.SystemService`.

use std::{sync::Arc, time::Duration};

use futures::stream;
use nix::sys::{
    reboot::{RebootMode, reboot},
    signal::Signal,
};
use proto::envd::v1::{
    ConfigureRequest, ConfigureResponse, GetInfoRequest, GetInfoResponse, PrepareSnapshotRequest,
    PrepareSnapshotResponse, ShutdownRequest, ShutdownResponse, StreamLogsRequest,
    StreamLogsResponse, StreamMetricsRequest, StreamMetricsResponse, StreamSpansRequest,
    StreamSpansResponse, system_service_server::SystemService,
};
use tonic::{Code, Request, Response, Status};

use super::Answers;
use crate::{
    errors::{not_yet, refuse},
    identity::Guest,
    process::Processes,
    snapshot,
    spans::Spans,
};

const LOOK_AGAIN: Duration = Duration::from_millis(10);

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
        _: Request<StreamMetricsRequest>,
    ) -> Result<Response<Self::StreamMetricsStream>, Status> {
        Err(not_yet("StreamMetrics"))
    }

    type StreamLogsStream = Answers<StreamLogsResponse>;

    async fn stream_logs(
        &self,
        _: Request<StreamLogsRequest>,
    ) -> Result<Response<Self::StreamLogsStream>, Status> {
        Err(not_yet("StreamLogs"))
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
            if std::process::id() == 1
                && let Err(error) = reboot(RebootMode::RB_POWER_OFF)
            {
                eprintln!("envd: power off: {error}");
            }
        });
        Ok(Response::new(ShutdownResponse {}))
    }
}
