//! Calls between services: who is let in, what travels along, and what a dead replica costs.
#![allow(clippy::unwrap_used, clippy::expect_used)] // helpers outside of #[test] functions

use proto::envd::v1::{
    ConfigureRequest, ConfigureResponse, GetInfoRequest, GetInfoResponse, GuestInfo,
    ShutdownRequest, ShutdownResponse, StreamLogsRequest, StreamLogsResponse, StreamMetricsRequest,
    StreamMetricsResponse, StreamSpansRequest, StreamSpansResponse,
    system_service_client::SystemServiceClient,
    system_service_server::{SystemService, SystemServiceServer},
};
use service_kit::{
    address::Address,
    errors::reason_of,
    mesh::{self, Caller, MeshToken},
    request_id,
    serve::{Bound, Grpc},
};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, service::Routes};

type Answers<T> = tokio_stream::wrappers::ReceiverStream<Result<T, Status>>;

/// Answers `GetInfo` with its own name, the caller's team and the request ID.
struct Named(&'static str);

#[tonic::async_trait]
impl SystemService for Named {
    type ExportLayerStream = Answers<proto::envd::v1::ExportLayerResponse>;
    type StreamMetricsStream = Answers<StreamMetricsResponse>;
    type StreamLogsStream = Answers<StreamLogsResponse>;
    type StreamSpansStream = Answers<StreamSpansResponse>;

    async fn get_info(
        &self,
        request: Request<GetInfoRequest>,
    ) -> Result<Response<GetInfoResponse>, Status> {
        let caller = Caller::of(&request)?;
        let info = GuestInfo {
            envd_version: self.0.into(),
            hostname: caller.team.to_string(),
            session_id: request_id::current().unwrap_or_default(),
            ..GuestInfo::default()
        };
        Ok(Response::new(GetInfoResponse { info: Some(info) }))
    }
    async fn export_layer(
        &self,
        _: Request<proto::envd::v1::ExportLayerRequest>,
    ) -> Result<Response<Self::ExportLayerStream>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn prepare_snapshot(
        &self,
        _: Request<proto::envd::v1::PrepareSnapshotRequest>,
    ) -> Result<Response<proto::envd::v1::PrepareSnapshotResponse>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn configure(
        &self,
        _: Request<ConfigureRequest>,
    ) -> Result<Response<ConfigureResponse>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn stream_metrics(
        &self,
        _: Request<StreamMetricsRequest>,
    ) -> Result<Response<Self::StreamMetricsStream>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn stream_logs(
        &self,
        _: Request<StreamLogsRequest>,
    ) -> Result<Response<Self::StreamLogsStream>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn stream_spans(
        &self,
        _: Request<StreamSpansRequest>,
    ) -> Result<Response<Self::StreamSpansStream>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn shutdown(
        &self,
        _: Request<ShutdownRequest>,
    ) -> Result<Response<ShutdownResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}

async fn start(
    name: &'static str,
    token: &MeshToken,
) -> (Address, CancellationToken, tokio::task::JoinHandle<()>) {
    let bound = Bound::bind(&"127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = bound.address().clone();
    let stop = CancellationToken::new();
    let server = Grpc::new(name)
        .mesh_only(token.clone())
        .reflect(&["sandmesh.envd.v1.SystemService"]);
    let serving = server.serve(
        bound,
        Routes::new(SystemServiceServer::new(Named(name))),
        stop.clone(),
    );
    let task = tokio::spawn(async move { serving.await.unwrap() });
    (address, stop, task)
}

fn ask() -> Request<GetInfoRequest> {
    let mut request = Request::new(GetInfoRequest {});
    let team = service_kit::ids::TeamId::parse("red").unwrap();
    Caller {
        team,
        key_id: "smk_test".into(),
        operator: false,
    }
    .apply(request.metadata_mut());
    request
}

#[tokio::test]
async fn the_token_lets_in_and_caller_and_request_id_travel_along() {
    let token = MeshToken::random();
    let (address, _stop, _task) = start("one", &token).await;
    let mut client =
        SystemServiceClient::new(mesh::connect(std::slice::from_ref(&address), &token));
    let answer = request_id::scope("quote-me".into(), client.get_info(ask()))
        .await
        .unwrap();
    let id = answer
        .metadata()
        .get("x-request-id")
        .unwrap()
        .to_str()
        .unwrap()
        .to_owned();
    let info = answer.into_inner().info.unwrap();
    assert_eq!(
        (
            info.hostname.as_str(),
            info.session_id.as_str(),
            id.as_str()
        ),
        ("red", "quote-me", "quote-me")
    );

    let mut stranger = SystemServiceClient::new(mesh::connect(&[address], &MeshToken::random()));
    let refused = stranger.get_info(ask()).await.unwrap_err();
    assert_eq!(reason_of(&refused).as_deref(), Some("CREDENTIALS_MISSING"));
}

#[tokio::test]
async fn a_dead_replica_does_not_eat_calls() {
    let token = MeshToken::random();
    let (first, stop_first, task) = start("first", &token).await;
    let (second, _stop, _task) = start("second", &token).await;
    let mut client = SystemServiceClient::new(mesh::connect(&[first, second], &token));
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..10 {
        seen.insert(
            client
                .get_info(ask())
                .await
                .unwrap()
                .into_inner()
                .info
                .unwrap()
                .envd_version,
        );
    }
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), ["first", "second"]);

    stop_first.cancel();
    task.await.unwrap();
    for _ in 0..20 {
        assert_eq!(
            client
                .get_info(ask())
                .await
                .unwrap()
                .into_inner()
                .info
                .unwrap()
                .envd_version,
            "second"
        );
    }
}

#[tokio::test]
async fn a_stale_unix_socket_is_replaced_and_removed_at_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let address = Address::Unix(folder.path().join("s.sock"));
    drop(Bound::bind(&address).await.unwrap());
    let bound = Bound::bind(&address)
        .await
        .expect("nobody listens there any more");
    assert!(
        Bound::bind(&address).await.is_err(),
        "a living server is not replaced"
    );
    let stop = CancellationToken::new();
    stop.cancel();
    Grpc::new("x")
        .serve(
            bound,
            Routes::new(SystemServiceServer::new(Named("x"))),
            stop,
        )
        .await
        .unwrap();
    assert!(!folder.path().join("s.sock").exists());
}
