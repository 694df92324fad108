//! What a test needs: servers, replicas that can be killed, a template service, callers.

use std::{collections::HashMap, path::PathBuf, time::Duration};

use proto::{
    node::v1::{WakeSessionRequest, node_registry_service_client::NodeRegistryServiceClient},
    session::v1::{
        Checkpoint, CreateCheckpointRequest, CreateSessionRequest, ForkSessionRequest,
        ForkSessionResponse, GetSessionRequest, ListCheckpointsRequest, ListSessionEventsRequest,
        PauseSessionRequest, ResumeSessionRequest, RollbackSessionRequest, Session, SessionState,
        StopSessionRequest, session_service_client::SessionServiceClient,
    },
    template::v1::{self as template, template_service_server as template_server},
};
use redis::AsyncCommands as _;
use serde_json::{Value, json};
use service_kit::{
    address::Address,
    errors::{Failure, Reason, reason_of},
    ids::TeamId,
    mesh::{self, Caller, MeshChannel, MeshToken},
    serve::{Bound, Grpc},
};
use session_svc::{App, Config};
use testbed::{Durability, Postgres, Redis};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status, service::Routes};

use crate::node::FakeNode;

pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
/// Nodes beat more often than they are asked to (node.rs), so that none falls silent because the machine is slow.
pub(crate) const HEARTBEAT: Duration = Duration::from_millis(500);
pub(crate) const PAUSED_RETENTION: Duration = Duration::from_hours(720);
/// For replicas that are [`burying`].
pub(crate) const NODE_DEAD_AFTER: Duration = Duration::from_secs(2);

/// Postgres, Redis, a template service.
pub(crate) struct World {
    pub(crate) postgres: Postgres,
    pub(crate) redis: Redis,
    pub(crate) token: MeshToken,
    templates: Address,
    folder: tempfile::TempDir,
    _stop: tokio_util::sync::DropGuard,
}

impl World {
    pub(crate) async fn new() -> Self {
        Self::with(Durability::None).await
    }

    pub(crate) async fn with(durability: Durability) -> Self {
        let postgres = Postgres::with(durability).unwrap();
        let redis = Redis::start().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let token = MeshToken::load_or_create(&folder.path().join("mesh.token")).unwrap();
        let stop = CancellationToken::new();
        let bound = Bound::bind(&"127.0.0.1:0".parse().unwrap()).await.unwrap();
        let templates = bound.address().clone();
        let routes = Routes::new(template_server::TemplateServiceServer::new(Templates));
        let grpc = Grpc::new("fake-templates").mesh_only(token.clone());
        tokio::spawn(grpc.serve(bound, routes, stop.clone()));
        Self {
            postgres,
            redis,
            token,
            templates,
            folder,
            _stop: stop.drop_guard(),
        }
    }

    pub(crate) fn config(&self) -> Config {
        Config {
            listen: "127.0.0.1:0".parse().unwrap(),
            database_url: self.postgres.url(),
            database_connections: 16,
            redis_url: self.redis.url(),
            redis_prefix: "test".into(),
            mesh_token_file: self.token_file(),
            template_addresses: vec![self.templates.clone()],
            domain: "example.test".into(),
            edge_port: 10080,
            start_timeout: Duration::from_secs(10),
            stop_timeout: Duration::from_secs(5),
            store_timeout: Duration::from_secs(10),
            paused_retention: PAUSED_RETENTION,
            heartbeat_interval: HEARTBEAT,
            node_dead_after: Duration::from_mins(10),
            retention: Duration::from_hours(24),
            max_memory: 64 << 30,
            max_disk: 1 << 40,
            lease: Duration::from_secs(2),
            audit_interval: Duration::from_millis(500),
            watch_heartbeat: Duration::from_millis(300),
        }
    }

    fn token_file(&self) -> PathBuf {
        self.folder.path().join("mesh.token")
    }

    pub(crate) fn replica(&self) -> Replica {
        self.replica_with(|_| {})
    }

    pub(crate) fn replica_with(&self, change: impl FnOnce(&mut Config)) -> Replica {
        let mut config = self.config();
        change(&mut config);
        Replica::start(config, self.token.clone())
    }

    /// A node that hosts up to so many sessions and is registered at a replica.
    pub(crate) async fn node(&self, replica: &Replica, sessions: u32) -> FakeNode {
        let node = FakeNode::start(&self.token, replica.channel.clone(), sessions).await;
        node.registered().await;
        node
    }

    /// Changes what tests cannot wait for.
    pub(crate) async fn sql(&self, statement: &'static str, id: &str) {
        let database = sqlx::PgPool::connect(&self.postgres.url()).await.unwrap();
        let done = sqlx::query(statement).bind(id).execute(&database).await;
        assert_eq!(done.unwrap().rows_affected(), 1);
    }

    pub(crate) async fn redis(&self) -> redis::aio::MultiplexedConnection {
        let client = redis::Client::open(self.redis.url()).unwrap();
        client.get_multiplexed_async_connection().await.unwrap()
    }

    /// What the catalog says of a session.
    pub(crate) async fn catalog_entry(&self, id: &str) -> Option<Value> {
        let text: Option<String> = self.redis().await.get(catalog_key(id)).await.unwrap();
        text.map(|text| serde_json::from_str(&text).unwrap())
    }

    /// Waits until the catalog says that it is whole, and sees to it that it does not say so before it is. The sessions must
    /// not be changing.
    pub(crate) async fn catalog_is_whole_again(&self, sessions: &[Session]) {
        let mut redis = self.redis().await;
        let whole = eventually(async || {
            let mut look = redis::pipe();
            look.atomic().exists("test:ready");
            for session in sessions {
                look.get(catalog_key(&session.session_id));
            }
            let mut answers: Vec<redis::Value> = look.query_async(&mut redis).await.unwrap();
            let ready: bool = redis::from_redis_value(answers.remove(0)).unwrap();
            for (session, answer) in sessions.iter().zip(answers).filter(|_| ready) {
                let text: Option<String> = redis::from_redis_value(answer).unwrap();
                let entry = text.map(|text| serde_json::from_str(&text).unwrap());
                assert_eq!(entry, Some(entry_of(session)));
            }
            ready.then_some(())
        });
        whole.await.expect("the catalog is not rebuilt");
    }
}

fn catalog_key(id: &str) -> String {
    format!("test:session:{id}")
}

/// What the catalog should say of a session.
pub(crate) fn entry_of(session: &Session) -> Value {
    json!({ "nodeId": session.node_id, "state": session.state, "version": session.version })
}

/// Declares nodes dead soon; other replicas never do in a test.
pub(crate) fn burying(config: &mut Config) {
    config.node_dead_after = NODE_DEAD_AFTER;
}

/// One session-svc in a runtime of its own, so that killing it takes all of its tasks along.
pub(crate) struct Replica {
    runtime: Option<Runtime>,
    shutdown: CancellationToken,
    done: tokio::task::JoinHandle<()>,
    pub(crate) address: Address,
    pub(crate) channel: MeshChannel,
}

impl Replica {
    fn start(config: Config, token: MeshToken) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let shutdown = CancellationToken::new();
        let (tell, told) = std::sync::mpsc::channel();
        let stop = shutdown.clone();
        let done = runtime.spawn(async move {
            let app = App::build(config, stop).await.unwrap();
            tell.send(app.address().clone()).unwrap();
            app.run().await.unwrap();
        });
        let address = told.recv().unwrap();
        Self {
            runtime: Some(runtime),
            shutdown,
            done,
            channel: mesh::connect(std::slice::from_ref(&address), &token),
            address,
        }
    }

    /// As SIGKILL: whatever it was at stays as it is.
    pub(crate) fn kill(mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }

    /// As SIGTERM.
    pub(crate) async fn stop(mut self) {
        self.shutdown.cancel();
        (&mut self.done).await.unwrap();
    }

    pub(crate) fn sessions(&self) -> SessionServiceClient<MeshChannel> {
        SessionServiceClient::new(self.channel.clone())
    }

    pub(crate) fn registry(&self) -> NodeRegistryServiceClient<MeshChannel> {
        NodeRegistryServiceClient::new(self.channel.clone())
    }

    pub(crate) async fn create(&self, request: CreateSessionRequest) -> Result<Session, Status> {
        let answer = self.sessions().create_session(red(request)).await?;
        Ok(answer.into_inner().session.unwrap())
    }

    pub(crate) async fn get(&self, id: &str) -> Result<Session, Status> {
        let request = GetSessionRequest {
            session_id: id.into(),
        };
        let answer = self.sessions().get_session(red(request)).await?;
        Ok(answer.into_inner().session.unwrap())
    }

    pub(crate) async fn stop_session(&self, id: &str) -> Result<Session, Status> {
        let request = StopSessionRequest {
            session_id: id.into(),
        };
        let answer = self.sessions().stop_session(red(request)).await?;
        Ok(answer.into_inner().session.unwrap())
    }

    pub(crate) async fn pause(&self, id: &str) -> Result<Session, Status> {
        let request = PauseSessionRequest {
            session_id: id.into(),
        };
        let answer = self.sessions().pause_session(red(request)).await?;
        Ok(answer.into_inner().session.unwrap())
    }

    pub(crate) async fn resume(&self, id: &str) -> Result<Session, Status> {
        let request = ResumeSessionRequest {
            session_id: id.into(),
            timeout: None,
        };
        let answer = self.sessions().resume_session(red(request)).await?;
        Ok(answer.into_inner().session.unwrap())
    }

    pub(crate) async fn fork(
        &self,
        id: &str,
        count: u32,
        request_id: &str,
    ) -> Result<ForkSessionResponse, Status> {
        let request = ForkSessionRequest {
            session_id: id.into(),
            count,
            request_id: request_id.into(),
            timeout: None,
        };
        let answer = self.sessions().fork_session(red(request)).await?;
        Ok(answer.into_inner())
    }

    pub(crate) async fn checkpoint(
        &self,
        id: &str,
        request_id: &str,
    ) -> Result<Checkpoint, Status> {
        let request = CreateCheckpointRequest {
            session_id: id.into(),
            name: "kept".into(),
            request_id: request_id.into(),
        };
        let answer = self.sessions().create_checkpoint(red(request)).await?;
        Ok(answer.into_inner().checkpoint.unwrap())
    }

    pub(crate) async fn checkpoints(&self, id: &str) -> Vec<Checkpoint> {
        let request = ListCheckpointsRequest {
            session_id: id.into(),
            ..ListCheckpointsRequest::default()
        };
        let answer = self.sessions().list_checkpoints(red(request)).await;
        answer.unwrap().into_inner().checkpoints
    }

    pub(crate) async fn rollback(&self, id: &str, to: &str) -> Result<Session, Status> {
        let request = RollbackSessionRequest {
            session_id: id.into(),
            checkpoint_id: to.into(),
        };
        let answer = self.sessions().rollback_session(red(request)).await?;
        Ok(answer.into_inner().session.unwrap())
    }

    pub(crate) async fn wake(&self, id: &str, node: &FakeNode) -> Result<(), Status> {
        let request = WakeSessionRequest {
            session_id: id.into(),
            node_id: node.id.clone(),
        };
        self.registry().wake_session(request).await.map(drop)
    }

    /// Type and reason of what happened to a session, oldest first.
    pub(crate) async fn events(&self, id: &str) -> Vec<(String, String)> {
        let request = ListSessionEventsRequest {
            session_id: id.into(),
            page_size: 1000,
            ..ListSessionEventsRequest::default()
        };
        let answer = self.sessions().list_session_events(red(request)).await;
        let events = answer.unwrap().into_inner().events;
        events
            .into_iter()
            .map(|event| (event.r#type, event.reason))
            .collect()
    }

    /// Waits until a session is in a state.
    pub(crate) async fn until(&self, id: &str, state: SessionState) -> Session {
        let mut last = None;
        let reached = eventually(async || {
            let now = self.get(id).await;
            let there = now
                .as_ref()
                .ok()
                .filter(|now| now.state() == state)
                .cloned();
            last = Some(now);
            there
        });
        reached
            .await
            .unwrap_or_else(|| panic!("{id} is not {state:?} but {last:?}"))
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        self.shutdown.cancel();
        if let Some(runtime) = self.runtime.take() {
            // A runtime must not be waited for inside another.
            runtime.shutdown_background();
        }
    }
}

/// Looks again and again until there is an answer; `None` when patience is over.
pub(crate) async fn eventually<T>(mut look: impl AsyncFnMut() -> Option<T>) -> Option<T> {
    let looking = async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, looking).await.ok()
}

pub(crate) fn by<T>(team: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    let caller = Caller {
        team: TeamId::parse(team).unwrap(),
        key_id: "smk_test".into(),
        operator: false,
    };
    caller.apply(request.metadata_mut());
    request
}

/// From team red, which most tests are.
pub(crate) fn red<T>(message: T) -> Request<T> {
    by("red", message)
}

pub(crate) fn base() -> CreateSessionRequest {
    CreateSessionRequest {
        template: "base".into(),
        ..CreateSessionRequest::default()
    }
}

pub(crate) fn named(request_id: &str) -> CreateSessionRequest {
    CreateSessionRequest {
        request_id: request_id.into(),
        ..base()
    }
}

pub(crate) fn labels<const N: usize>(labels: [(&str, &str); N]) -> HashMap<String, String> {
    labels
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
}

#[track_caller]
pub(crate) fn assert_refused<T: std::fmt::Debug>(
    answer: Result<T, Status>,
    code: Code,
    reason: &str,
) -> Status {
    let status = answer.unwrap_err();
    assert_eq!(status.code(), code, "{status:?}");
    assert_eq!(reason_of(&status).as_deref(), Some(reason), "{status:?}");
    status
}

/// Knows one template.
struct Templates;

#[tonic::async_trait]
impl template_server::TemplateService for Templates {
    async fn get_template(
        &self,
        request: Request<template::GetTemplateRequest>,
    ) -> Result<Response<template::GetTemplateResponse>, Status> {
        let name = request.into_inner().template;
        if name != "base" {
            return Err(Failure::new(
                Code::NotFound,
                Reason::TEMPLATE_UNKNOWN,
                format!("no template {name}; the closest: base"),
            )
            .with("template", name)
            .with("closest", "base")
            .into());
        }
        Ok(Response::new(template::GetTemplateResponse {
            template: Some(template::Template {
                name: "base".into(),
                version: 3,
                default_vcpus: 1,
                default_memory_bytes: 128 << 20,
                default_disk_bytes: 1 << 30,
                ..template::Template::default()
            }),
            ..template::GetTemplateResponse::default()
        }))
    }

    type StreamBuildLogsStream =
        tokio_stream::Empty<Result<template::StreamBuildLogsResponse, Status>>;

    async fn upload_source(
        &self,
        _: Request<tonic::Streaming<template::UploadSourceRequest>>,
    ) -> Result<Response<template::UploadSourceResponse>, Status> {
        Err(Status::unimplemented("not in this test"))
    }
    async fn find_missing_files(
        &self,
        _: Request<template::FindMissingFilesRequest>,
    ) -> Result<Response<template::FindMissingFilesResponse>, Status> {
        Err(Status::unimplemented("not in this test"))
    }
    async fn upload_files(
        &self,
        _: Request<tonic::Streaming<template::UploadFilesRequest>>,
    ) -> Result<Response<template::UploadFilesResponse>, Status> {
        Err(Status::unimplemented("not in this test"))
    }
    async fn build_template(
        &self,
        _: Request<template::BuildTemplateRequest>,
    ) -> Result<Response<template::BuildTemplateResponse>, Status> {
        Err(Status::unimplemented("not in this test"))
    }
    async fn get_build(
        &self,
        _: Request<template::GetBuildRequest>,
    ) -> Result<Response<template::GetBuildResponse>, Status> {
        Err(Status::unimplemented("not in this test"))
    }
    async fn stream_build_logs(
        &self,
        _: Request<template::StreamBuildLogsRequest>,
    ) -> Result<Response<Self::StreamBuildLogsStream>, Status> {
        Err(Status::unimplemented("not in this test"))
    }
    async fn cancel_build(
        &self,
        _: Request<template::CancelBuildRequest>,
    ) -> Result<Response<template::CancelBuildResponse>, Status> {
        Err(Status::unimplemented("not in this test"))
    }
    async fn list_templates(
        &self,
        _: Request<template::ListTemplatesRequest>,
    ) -> Result<Response<template::ListTemplatesResponse>, Status> {
        Err(Status::unimplemented("not in this test"))
    }
    async fn tag_template(
        &self,
        _: Request<template::TagTemplateRequest>,
    ) -> Result<Response<template::TagTemplateResponse>, Status> {
        Err(Status::unimplemented("not in this test"))
    }
    async fn delete_template(
        &self,
        _: Request<template::DeleteTemplateRequest>,
    ) -> Result<Response<template::DeleteTemplateResponse>, Status> {
        Err(Status::unimplemented("not in this test"))
    }
}
