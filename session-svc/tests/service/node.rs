//! A node that hosts nothing real, and does what a test tells it to.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use proto::{
    node::v1::{
        self as wire, node_registry_service_client as registry, node_service_server as server,
    },
    session::v1::{EndReason, Resources, SessionState},
};
use service_kit::{
    address::Address,
    errors::{Failure, Reason},
    mesh::{MeshChannel, MeshToken},
    serve::{Bound, Grpc},
};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Code, Request, Response, Status, service::Routes};

use crate::world::eventually;

const MEMORY_EACH: u64 = 128 << 20;

#[derive(Debug, Default)]
pub(crate) struct Inside {
    pub(crate) hosted: BTreeMap<String, Resources>,
    /// Every start and stop it was asked for.
    pub(crate) starts: Vec<String>,
    pub(crate) stops: Vec<String>,
    /// What it says to starts instead of starting.
    pub(crate) refuse: Option<Status>,
    /// Sessions that ended by themselves and are not acknowledged.
    pub(crate) ended: Vec<wire::HostedSession>,
    /// Whether its heartbeats say that it takes no new sessions.
    pub(crate) draining: bool,
    /// When its current start began.
    pub(crate) started: Option<prost_types::Timestamp>,
    capacity: u32,
}

#[derive(Debug, Clone)]
struct Service {
    inside: Arc<Mutex<Inside>>,
    starts_open: watch::Receiver<bool>,
    stops_open: watch::Receiver<bool>,
}

#[derive(Debug)]
pub(crate) struct FakeNode {
    pub(crate) id: String,
    pub(crate) address: Address,
    inside: Arc<Mutex<Inside>>,
    token: MeshToken,
    registry: MeshChannel,
    starts_open: watch::Sender<bool>,
    stops_open: watch::Sender<bool>,
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
                started: Some(std::time::SystemTime::now().into()),
                ..Inside::default()
            })),
            token: token.clone(),
            registry,
            starts_open: watch::Sender::new(true),
            stops_open: watch::Sender::new(true),
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
            starts_open: self.starts_open.subscribe(),
            stops_open: self.stops_open.subscribe(),
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
                            ended: inside.ended.clone(),
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
        self.inside().started = Some(std::time::SystemTime::now().into());
        self.serve().await;
        self.beat();
    }

    /// Lets starts wait until [`FakeNode::open`].
    pub(crate) fn hold_starts(&self) {
        self.starts_open.send_replace(false);
    }

    /// Lets stops wait until [`FakeNode::open`].
    pub(crate) fn hold_stops(&self) {
        self.stops_open.send_replace(false);
    }

    pub(crate) fn open(&self) {
        self.starts_open.send_replace(true);
        self.stops_open.send_replace(true);
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
            resources: None,
            stored_bytes: 0,
        });
    }
}

fn total(inside: &Inside) -> wire::Capacity {
    let sessions = inside.capacity;
    wire::Capacity {
        sessions,
        memory_bytes: u64::from(sessions) * MEMORY_EACH,
        vcpus: 64,
        disk_bytes: 1 << 42,
    }
}

fn used(inside: &Inside) -> wire::Capacity {
    wire::Capacity {
        sessions: inside.hosted.len() as u32,
        memory_bytes: inside.hosted.values().map(|size| size.memory_bytes).sum(),
        vcpus: 0,
        disk_bytes: 0,
    }
}

fn listing(inside: &Inside) -> Vec<wire::HostedSession> {
    let hosted = inside.hosted.iter().map(|(id, size)| wire::HostedSession {
        session_id: id.clone(),
        state: SessionState::Running.into(),
        end_reason: None,
        resources: Some(*size),
        stored_bytes: 0,
    });
    hosted.chain(inside.ended.clone()).collect()
}

fn end(inside: &Mutex<Inside>, ids: &[String]) {
    let mut inside = inside.lock().unwrap();
    for id in ids {
        inside.hosted.remove(id);
        inside.stops.push(id.clone());
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
            let fits = inside.hosted.len() < inside.capacity as usize
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
        let mut open = self.starts_open.clone();
        open.wait_for(|open| *open).await.unwrap();
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
        let mut open = self.stops_open.clone();
        open.wait_for(|open| *open).await.unwrap();
        self.inside.lock().unwrap().hosted.remove(&id);
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
        _: Request<wire::UpdateSessionRequest>,
    ) -> Result<Response<wire::UpdateSessionResponse>, Status> {
        Ok(Response::new(wire::UpdateSessionResponse {}))
    }

    type WatchSessionsStream = tokio_stream::Empty<Result<wire::WatchSessionsResponse, Status>>;

    async fn watch_sessions(
        &self,
        _: Request<wire::WatchSessionsRequest>,
    ) -> Result<Response<Self::WatchSessionsStream>, Status> {
        later()
    }
    async fn pause_session(
        &self,
        _: Request<wire::PauseSessionRequest>,
    ) -> Result<Response<wire::PauseSessionResponse>, Status> {
        later()
    }
    async fn resume_session(
        &self,
        _: Request<wire::ResumeSessionRequest>,
    ) -> Result<Response<wire::ResumeSessionResponse>, Status> {
        later()
    }
    async fn fork_session(
        &self,
        _: Request<wire::ForkSessionRequest>,
    ) -> Result<Response<wire::ForkSessionResponse>, Status> {
        later()
    }
    async fn snapshot_session(
        &self,
        _: Request<wire::SnapshotSessionRequest>,
    ) -> Result<Response<wire::SnapshotSessionResponse>, Status> {
        later()
    }
    async fn drain_node(
        &self,
        _: Request<wire::DrainNodeRequest>,
    ) -> Result<Response<wire::DrainNodeResponse>, Status> {
        later()
    }

    async fn rollback_session(
        &self,
        _: Request<wire::RollbackSessionRequest>,
    ) -> Result<Response<wire::RollbackSessionResponse>, Status> {
        later()
    }

    async fn delete_snapshot(
        &self,
        _: Request<wire::DeleteSnapshotRequest>,
    ) -> Result<Response<wire::DeleteSnapshotResponse>, Status> {
        later()
    }

    async fn get_session_metrics(
        &self,
        _: Request<wire::GetSessionMetricsRequest>,
    ) -> Result<Response<wire::GetSessionMetricsResponse>, Status> {
        later()
    }
}
