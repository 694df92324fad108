//! A node that hosts nothing real, and does what a test tells it to.

use std::{
    collections::{BTreeMap, BTreeSet},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use proto::{
    node::v1::{
        self as wire, node_registry_service_client as registry, node_service_server as server,
    },
    session::v1::{
        EndReason, GetSessionMetricsResponse, Network, Resources, SessionState,
        StreamSessionLogsResponse,
    },
};
use service_kit::{
    address::Address,
    errors::{Failure, Reason},
    mesh::{MeshChannel, MeshToken},
    serve::{Bound, Grpc},
};
use tokio::sync::watch;
use tokio_stream::{Stream, StreamExt as _};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Code, Request, Response, Status, service::Routes};

use crate::world::eventually;

/// The one port of its guests where somebody listens.
pub(crate) const OPEN_PORT: u32 = 8000;
const MEMORY_EACH: u64 = 128 << 20;
/// What a paused session takes, and what a checkpoint does.
pub(crate) const STORED: u64 = 5 << 20;
/// How long a session stands still for it.
pub(crate) const STOP_NANOS: i32 = 7_000_000;

#[derive(Debug, Default)]
pub(crate) struct Inside {
    pub(crate) hosted: BTreeMap<String, Resources>,
    /// Every start and stop it was asked for.
    pub(crate) starts: Vec<String>,
    pub(crate) stops: Vec<String>,
    /// What it says to starts instead of starting.
    pub(crate) refuse: Option<Status>,
    /// Of those it hosts, the ones that are stored.
    pub(crate) paused: BTreeSet<String>,
    /// Session and ID of each checkpoint.
    pub(crate) checkpoints: BTreeSet<(String, String)>,
    /// The settings it was told of last.
    pub(crate) settings: BTreeMap<String, (Network, bool)>,
    /// Method and session of every other call.
    pub(crate) calls: Vec<(&'static str, String)>,
    /// What it says to a method instead of doing it.
    pub(crate) refuse_method: BTreeMap<&'static str, Status>,
    /// How many children of a fork do not start.
    pub(crate) fail_children: usize,
    /// Sessions that ended by themselves and are not acknowledged.
    pub(crate) ended: Vec<wire::HostedSession>,
    /// Its heartbeats do not bring those yet.
    pub(crate) is_late: bool,
    /// What it has to say of sessions and is not acknowledged.
    pub(crate) notices: Vec<wire::SessionNotice>,
    /// Its next answer to a heartbeat is lost.
    pub(crate) is_deaf: bool,
    /// Whether its heartbeats say that it takes no new sessions.
    pub(crate) draining: bool,
    /// When its current start began.
    pub(crate) started: Option<prost_types::Timestamp>,
    capacity: u32,
    pub(crate) vcpus: u32,
}

#[derive(Debug, Clone)]
struct Service {
    inside: Arc<Mutex<Inside>>,
    held: watch::Receiver<BTreeSet<&'static str>>,
    stop: CancellationToken,
}

#[derive(Debug)]
pub(crate) struct FakeNode {
    pub(crate) id: String,
    pub(crate) address: Address,
    inside: Arc<Mutex<Inside>>,
    token: MeshToken,
    registry: MeshChannel,
    /// Methods that wait.
    held: watch::Sender<BTreeSet<&'static str>>,
    beating: Option<DropGuard>,
    tag: watch::Sender<String>,
    serving: Option<DropGuard>,
}

impl FakeNode {
    pub(crate) async fn start(token: &MeshToken, registry: MeshChannel, capacity: u32) -> Self {
        let mut node = Self {
            id: format!("node-{:08x}", rand::random::<u32>()),
            address: "127.0.0.1:0".parse().unwrap(),
            inside: Arc::new(Mutex::new(Inside {
                capacity,
                vcpus: 64,
                started: Some(std::time::SystemTime::now().into()),
                ..Inside::default()
            })),
            token: token.clone(),
            registry,
            held: watch::Sender::default(),
            beating: None,
            tag: watch::Sender::default(),
            serving: None,
        };
        node.serve().await;
        node.beat();
        node
    }

    pub(crate) fn inside(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap()
    }

    /// Serves again, at the same address if there was one.
    pub(crate) async fn serve(&mut self) {
        let stop = CancellationToken::new();
        let bound = eventually(async || Bound::bind(&self.address).await.ok());
        let bound = bound.await.unwrap();
        self.address = bound.address().clone();
        let service = Service {
            inside: Arc::clone(&self.inside),
            held: self.held.subscribe(),
            stop: stop.clone(),
        };
        let routes = Routes::new(server::NodeServiceServer::new(service));
        let grpc = Grpc::new("fake-node").mesh_only(self.token.clone());
        let (until, kill) = (stop.clone(), stop.clone());
        tokio::spawn(async move {
            // At the end calls in flight are cut, as when a process dies.
            kill.run_until_cancelled(grpc.serve(bound, routes, until))
                .await
        });
        self.serving = Some(stop.drop_guard());
    }

    /// Registers, and beats from then on.
    pub(crate) fn beat(&mut self) {
        self.tag.send_replace(String::new());
        let stop = CancellationToken::new();
        let (inside, tag) = (Arc::clone(&self.inside), self.tag.clone());
        let mut registry = registry::NodeRegistryServiceClient::new(self.registry.clone());
        let description = wire::Node {
            node_id: self.id.clone(),
            incarnation: format!("{:016x}", rand::random::<u64>()),
            ingress_address: self.address.to_string(),
            internal_address: self.address.to_string(),
            vmm: wire::VmmKind::Fake.into(),
            ..wire::Node::default()
        };
        let until = stop.clone();
        let beating = async move {
            loop {
                let request = {
                    let inside = inside.lock().unwrap();
                    wire::RegisterNodeRequest {
                        node: Some(wire::Node {
                            total: Some(total(&inside)),
                            used: Some(used(&inside)),
                            start_time: inside.started,
                            ..description.clone()
                        }),
                        sessions: listing(&inside),
                    }
                };
                let Ok(answer) = registry.register_node(request).await else {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                };
                let answer = answer.into_inner();
                end(&inside, &answer.stop_session_ids);
                let asked = Duration::try_from(answer.heartbeat_interval.unwrap()).unwrap();
                let interval = asked / 5;
                tag.send_replace(answer.home_tag);
                loop {
                    tokio::time::sleep(interval).await;
                    let request = {
                        let inside = inside.lock().unwrap();
                        wire::HeartbeatRequest {
                            node_id: description.node_id.clone(),
                            incarnation: description.incarnation.clone(),
                            used: Some(used(&inside)),
                            draining: inside.draining,
                            ended: if inside.is_late {
                                Vec::new()
                            } else {
                                inside.ended.clone()
                            },
                            notices: inside.notices.clone(),
                        }
                    };
                    let Ok(answer) = registry.heartbeat(request).await else {
                        continue;
                    };
                    let answer = answer.into_inner();
                    if answer.register {
                        break;
                    }
                    end(&inside, &answer.stop_session_ids);
                    let heard = answer.acknowledged_session_ids;
                    let mut inside = inside.lock().unwrap();
                    if std::mem::take(&mut inside.is_deaf) {
                        continue;
                    }
                    inside.notices.drain(..answer.acknowledged_notices as usize);
                    inside
                        .ended
                        .retain(|ended| !heard.contains(&ended.session_id));
                }
            }
        };
        tokio::spawn(async move { until.run_until_cancelled(beating).await });
        self.beating = Some(stop.drop_guard());
    }

    /// Waits until it is, and has done what it was told; its home tag.
    pub(crate) async fn registered(&self) -> String {
        let mut tag = self.tag.subscribe();
        let tag = tokio::time::timeout(crate::world::PATIENCE, tag.wait_for(|tag| !tag.is_empty()));
        tag.await.unwrap().unwrap().clone()
    }

    /// Sends no heartbeats any more.
    pub(crate) fn fall_silent(&mut self) {
        self.beating = None;
    }

    /// As SIGKILL: neither answers nor beats; what it hosts is on its disk still.
    pub(crate) fn die(&mut self) {
        self.beating = None;
        self.serving = None;
    }

    /// A new start of node-svc that has reaped everything.
    pub(crate) async fn restart_empty(&mut self) {
        self.die();
        self.inside().hosted.clear();
        self.inside().paused.clear();
        self.inside().started = Some(std::time::SystemTime::now().into());
        self.serve().await;
        self.beat();
    }

    /// A new start of node-svc that has found everything on its disk.
    pub(crate) async fn restart(&mut self) {
        self.die();
        self.inside().started = Some(std::time::SystemTime::now().into());
        self.serve().await;
        self.beat();
    }

    /// Lets starts wait until [`FakeNode::open`].
    pub(crate) fn hold_starts(&self) {
        self.hold("start");
    }

    /// Lets stops wait until [`FakeNode::open`].
    pub(crate) fn hold_stops(&self) {
        self.hold("stop");
    }

    /// Lets calls of a method wait until [`FakeNode::open`].
    pub(crate) fn hold(&self, method: &'static str) {
        self.held.send_modify(|held| {
            held.insert(method);
        });
    }

    /// Lets only calls of a method go on.
    pub(crate) fn release(&self, method: &str) {
        self.held.send_modify(|held| {
            held.remove(method);
        });
    }

    pub(crate) fn open(&self) {
        self.held.send_modify(BTreeSet::clear);
    }

    /// How often a method was called.
    pub(crate) fn count(&self, method: &str) -> usize {
        let inside = self.inside();
        inside
            .calls
            .iter()
            .filter(|(called, _)| *called == method)
            .count()
    }

    /// Waits until a method was called so often.
    pub(crate) async fn called(&self, method: &str, times: usize) {
        let called = eventually(async || (self.count(method) >= times).then_some(()));
        called
            .await
            .unwrap_or_else(|| panic!("{method} was not called {times} times"));
    }

    pub(crate) fn is_paused(&self, id: &str) -> bool {
        self.inside().paused.contains(id)
    }

    /// A session ends by itself.
    pub(crate) fn break_session(&self, id: &str, reason: &str) {
        let mut inside = self.inside();
        inside.hosted.remove(id);
        inside.ended.push(wire::HostedSession {
            session_id: id.into(),
            state: SessionState::Failed.into(),
            end_reason: Some(EndReason {
                reason: reason.into(),
                message: "it broke".into(),
            }),
            ..wire::HostedSession::default()
        });
    }
}

fn total(inside: &Inside) -> wire::Capacity {
    let sessions = inside.capacity;
    wire::Capacity {
        sessions,
        memory_bytes: u64::from(sessions) * MEMORY_EACH,
        vcpus: inside.vcpus,
        disk_bytes: 1 << 42,
    }
}

/// What is paused takes nothing but disk.
fn used(inside: &Inside) -> wire::Capacity {
    let active = inside
        .hosted
        .iter()
        .filter(|(id, _)| !inside.paused.contains(*id));
    wire::Capacity {
        sessions: active.clone().count() as u32,
        memory_bytes: active.map(|(_, size)| size.memory_bytes).sum(),
        vcpus: 0,
        disk_bytes: 0,
    }
}

fn listing(inside: &Inside) -> Vec<wire::HostedSession> {
    let hosted = inside.hosted.iter().map(|(id, size)| wire::HostedSession {
        session_id: id.clone(),
        state: if inside.paused.contains(id) {
            SessionState::Paused.into()
        } else {
            SessionState::Running.into()
        },
        end_reason: None,
        resources: Some(*size),
        stored_bytes: if inside.paused.contains(id) {
            STORED
        } else {
            0
        },
        ..wire::HostedSession::default()
    });
    hosted.chain(inside.ended.clone()).collect()
}

fn end(inside: &Mutex<Inside>, ids: &[String]) {
    let mut inside = inside.lock().unwrap();
    for id in ids {
        remove(&mut inside, id);
        inside.stops.push(id.clone());
    }
}

/// Nothing of it is left.
fn remove(inside: &mut Inside, id: &str) {
    inside.hosted.remove(id);
    inside.paused.remove(id);
    inside.checkpoints.retain(|(session, _)| session != id);
}

fn unknown() -> Status {
    Failure::new(Code::NotFound, Reason::SESSION_UNKNOWN, "not on this node").into()
}

fn stood_still() -> prost_types::Duration {
    prost_types::Duration {
        seconds: 0,
        nanos: STOP_NANOS,
    }
}

impl Service {
    async fn opened(&self, method: &'static str) -> Result<(), Status> {
        let mut held = self.held.clone();
        tokio::select! {
            _ = held.wait_for(|held| !held.contains(method)) => Ok(()),
            () = self.stop.cancelled() => Err(Status::unavailable("the node died")),
        }
    }

    /// Notes a call, and answers what the node is when it is time to do it.
    async fn called(
        &self,
        method: &'static str,
        id: &str,
    ) -> Result<MutexGuard<'_, Inside>, Status> {
        {
            let mut inside = self.inside.lock().unwrap();
            inside.calls.push((method, id.to_owned()));
            if let Some(status) = inside.refuse_method.get(method) {
                return Err(status.clone());
            }
        }
        self.opened(method).await?;
        let inside = self.inside.lock().unwrap();
        if inside.hosted.contains_key(id) || method == "drain" {
            Ok(inside)
        } else {
            Err(unknown())
        }
    }
}

fn later<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("not in this test"))
}

#[tonic::async_trait]
impl server::NodeService for Service {
    async fn start_session(
        &self,
        request: Request<wire::StartSessionRequest>,
    ) -> Result<Response<wire::StartSessionResponse>, Status> {
        let request = request.into_inner();
        assert_eq!(request.access_token_sha256.len(), 32);
        {
            let mut inside = self.inside.lock().unwrap();
            inside.starts.push(request.session_id.clone());
            if let Some(status) = &inside.refuse {
                return Err(status.clone());
            }
            let known = inside.hosted.contains_key(&request.session_id);
            let room = total(&inside).memory_bytes - used(&inside).memory_bytes;
            let fits = used(&inside).sessions < inside.capacity
                && request.resources.unwrap().memory_bytes <= room;
            if !known && !fits {
                return Err(Failure::new(
                    Code::ResourceExhausted,
                    Reason::NODE_FULL,
                    "this node is full",
                )
                .into());
            }
        }
        self.opened("start").await?;
        let mut inside = self.inside.lock().unwrap();
        inside
            .hosted
            .insert(request.session_id, request.resources.unwrap());
        Ok(Response::new(wire::StartSessionResponse::default()))
    }

    async fn stop_session(
        &self,
        request: Request<wire::StopSessionRequest>,
    ) -> Result<Response<wire::StopSessionResponse>, Status> {
        let id = request.into_inner().session_id;
        self.inside.lock().unwrap().stops.push(id.clone());
        self.opened("stop").await?;
        remove(&mut self.inside.lock().unwrap(), &id);
        Ok(Response::new(wire::StopSessionResponse {}))
    }

    async fn list_sessions(
        &self,
        _: Request<wire::ListSessionsRequest>,
    ) -> Result<Response<wire::ListSessionsResponse>, Status> {
        let inside = self.inside.lock().unwrap();
        Ok(Response::new(wire::ListSessionsResponse {
            sessions: listing(&inside),
            start_time: inside.started,
        }))
    }

    async fn update_session(
        &self,
        request: Request<wire::UpdateSessionRequest>,
    ) -> Result<Response<wire::UpdateSessionResponse>, Status> {
        let request = request.into_inner();
        let mut inside = self.called("update", &request.session_id).await?;
        let settings = (request.network.unwrap(), request.wake_on_request.unwrap());
        inside.settings.insert(request.session_id, settings);
        Ok(Response::new(wire::UpdateSessionResponse {}))
    }

    type WatchSessionsStream = tokio_stream::Empty<Result<wire::WatchSessionsResponse, Status>>;

    async fn watch_sessions(
        &self,
        _: Request<wire::WatchSessionsRequest>,
    ) -> Result<Response<Self::WatchSessionsStream>, Status> {
        later()
    }

    type MakeTemplateSnapshotStream =
        Pin<Box<dyn Stream<Item = Result<wire::MakeTemplateSnapshotResponse, Status>> + Send>>;

    async fn make_template_snapshot(
        &self,
        _: Request<wire::MakeTemplateSnapshotRequest>,
    ) -> Result<Response<Self::MakeTemplateSnapshotStream>, Status> {
        later()
    }

    type ExportSessionStream =
        Pin<Box<dyn Stream<Item = Result<wire::ExportSessionResponse, Status>> + Send>>;

    async fn export_session(
        &self,
        _: Request<wire::ExportSessionRequest>,
    ) -> Result<Response<Self::ExportSessionStream>, Status> {
        later()
    }

    type StreamSessionLogsStream =
        Pin<Box<dyn Stream<Item = Result<wire::StreamSessionLogsResponse, Status>> + Send>>;

    /// Three messages; followed, they end when the node dies.
    async fn stream_session_logs(
        &self,
        request: Request<wire::StreamSessionLogsRequest>,
    ) -> Result<Response<Self::StreamSessionLogsStream>, Status> {
        let request = request.into_inner().request.unwrap();
        drop(self.called("logs", &request.session_id).await?);
        let messages = (request.after_sequence + 1..=3).map(|sequence| {
            Ok(wire::StreamSessionLogsResponse {
                message: Some(StreamSessionLogsResponse {
                    sequence,
                    ..StreamSessionLogsResponse::default()
                }),
            })
        });
        let messages = tokio_stream::iter(messages.collect::<Vec<_>>());
        Ok(Response::new(if request.follow {
            let stop = self.stop.clone();
            let died = async move {
                stop.cancelled().await;
                Err(Status::unavailable("the node died"))
            };
            Box::pin(messages.chain(futures::stream::once(died)))
        } else {
            Box::pin(messages)
        }))
    }

    async fn pause_session(
        &self,
        request: Request<wire::PauseSessionRequest>,
    ) -> Result<Response<wire::PauseSessionResponse>, Status> {
        let id = request.into_inner().session_id;
        let mut inside = self.called("pause", &id).await?;
        inside.paused.insert(id);
        Ok(Response::new(wire::PauseSessionResponse {
            stored_bytes: STORED,
            stop_time: Some(stood_still()),
        }))
    }

    async fn resume_session(
        &self,
        request: Request<wire::ResumeSessionRequest>,
    ) -> Result<Response<wire::ResumeSessionResponse>, Status> {
        let id = request.into_inner().session_id;
        let mut inside = self.called("resume", &id).await?;
        inside.paused.remove(&id);
        Ok(Response::new(wire::ResumeSessionResponse { steps: vec![] }))
    }

    async fn fork_session(
        &self,
        request: Request<wire::ForkSessionRequest>,
    ) -> Result<Response<wire::ForkSessionResponse>, Status> {
        let request = request.into_inner();
        let mut inside = self.called("fork", &request.session_id).await?;
        let size = inside.hosted[&request.session_id];
        let fail = inside.fail_children;
        let mut failed = Vec::new();
        for (index, child) in request.children.into_iter().enumerate() {
            assert_eq!(child.access_token_sha256.len(), 32);
            if index < fail {
                failed.push(wire::HostedSession {
                    session_id: child.session_id,
                    state: SessionState::Failed.into(),
                    end_reason: Some(EndReason {
                        reason: "CONFIGURE_FAILED".into(),
                        message: "no entropy".into(),
                    }),
                    ..wire::HostedSession::default()
                });
            } else {
                inside.hosted.insert(child.session_id, size);
            }
        }
        Ok(Response::new(wire::ForkSessionResponse {
            parent_stop_time: Some(stood_still()),
            failed,
        }))
    }

    async fn snapshot_session(
        &self,
        request: Request<wire::SnapshotSessionRequest>,
    ) -> Result<Response<wire::SnapshotSessionResponse>, Status> {
        let request = request.into_inner();
        let mut inside = self.called("snapshot", &request.session_id).await?;
        let checkpoint = (request.session_id, request.checkpoint_id);
        inside.checkpoints.insert(checkpoint);
        Ok(Response::new(wire::SnapshotSessionResponse {
            stored_bytes: STORED,
            stop_time: Some(stood_still()),
        }))
    }

    async fn rollback_session(
        &self,
        request: Request<wire::RollbackSessionRequest>,
    ) -> Result<Response<wire::RollbackSessionResponse>, Status> {
        let request = request.into_inner();
        let mut inside = self.called("rollback", &request.session_id).await?;
        let checkpoint = (request.session_id, request.checkpoint_id);
        if !inside.checkpoints.contains(&checkpoint) {
            return Err(Status::not_found("no such checkpoint"));
        }
        inside.paused.remove(&checkpoint.0);
        Ok(Response::new(wire::RollbackSessionResponse {}))
    }

    async fn delete_snapshot(
        &self,
        request: Request<wire::DeleteSnapshotRequest>,
    ) -> Result<Response<wire::DeleteSnapshotResponse>, Status> {
        let request = request.into_inner();
        let mut inside = self.called("delete", &request.session_id).await?;
        let checkpoint = (request.session_id, request.checkpoint_id);
        inside.checkpoints.remove(&checkpoint);
        Ok(Response::new(wire::DeleteSnapshotResponse {}))
    }

    async fn wait_for_port(
        &self,
        request: Request<wire::WaitForPortRequest>,
    ) -> Result<Response<wire::WaitForPortResponse>, Status> {
        let request = request.into_inner();
        drop(self.called("wait", &request.session_id).await?);
        let ready = request.ready.unwrap();
        if ready.port == OPEN_PORT {
            return Ok(Response::new(wire::WaitForPortResponse {}));
        }
        let failure = Failure::new(
            Code::DeadlineExceeded,
            Reason::PORT_CLOSED,
            "nobody listens",
        );
        Err(failure.with("sessionId", request.session_id).into())
    }

    async fn get_session_metrics(
        &self,
        request: Request<wire::GetSessionMetricsRequest>,
    ) -> Result<Response<wire::GetSessionMetricsResponse>, Status> {
        let id = request.into_inner().session_id;
        drop(self.called("metrics", &id).await?);
        Ok(Response::new(wire::GetSessionMetricsResponse {
            metrics: Some(GetSessionMetricsResponse {
                memory_bytes: MEMORY_EACH,
                disk_bytes: 3,
                host_threads: 4,
                ..GetSessionMetricsResponse::default()
            }),
        }))
    }

    async fn drain_node(
        &self,
        request: Request<wire::DrainNodeRequest>,
    ) -> Result<Response<wire::DrainNodeResponse>, Status> {
        let mut inside = self.called("drain", "").await?;
        inside.draining = request.into_inner().draining;
        Ok(Response::new(wire::DrainNodeResponse {}))
    }
}
