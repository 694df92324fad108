//! The aggregated discovery service: state of the world, one resource type (endpoints), versions and nonces.
//!
//! A resource is sent when Envoy first asks and again when it changes. An ACK or NACK only changes what is shown: a refused version
//! is logged and counted and not sent again, so that nothing loops; Envoy keeps the last it took. (xDS protocol, "ACK/NACK".)

use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
};

use envoy_types::pb::{
    envoy::{
        config::endpoint::v3::ClusterLoadAssignment,
        service::discovery::v3::{
            DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
            aggregated_discovery_service_server::AggregatedDiscoveryService,
        },
    },
    google::protobuf::Any,
};
use futures::Stream;
use prost::Message as _;
use serde::Serialize;
use service_kit::errors::Failure;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Request, Response, Status, Streaming};

/// Type of the resources served.
pub const ENDPOINTS: &str = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment";
const BUFFER: usize = 4;

/// A version of the endpoints.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Grows with every change.
    pub version: u64,
    /// The resource.
    pub endpoints: ClusterLoadAssignment,
}

/// How far an Envoy is.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Progress {
    /// Last version sent.
    pub sent: u64,
    /// Last version it took.
    pub accepted: u64,
    /// Why it refused the last version it refused.
    pub refused: Option<String>,
}

/// What connected Envoys have taken, by node ID.
#[derive(Debug, Clone, Default)]
pub struct Connected(Arc<Mutex<BTreeMap<String, Progress>>>);

impl Connected {
    /// As it is now.
    pub fn view(&self) -> BTreeMap<String, Progress> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn note(&self, node: &str, change: impl FnOnce(&mut Progress)) {
        change(
            self.0
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .entry(node.to_owned())
                .or_default(),
        );
    }

    fn forget(&self, node: &str) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(node);
    }
}

/// Serves snapshots to Envoys.
#[derive(Debug)]
pub struct Discovery {
    /// The newest snapshot; none before the registry first answered, so that no Envoy is ever given an empty world by mistake.
    pub snapshots: watch::Receiver<Option<Snapshot>>,
    /// Who is connected.
    pub connected: Connected,
    /// Joined at shutdown.
    pub tasks: TaskTracker,
    /// Ends streams.
    pub shutdown: CancellationToken,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl AggregatedDiscoveryService for Discovery {
    type StreamAggregatedResourcesStream = Answers<DiscoveryResponse>;

    async fn stream_aggregated_resources(
        &self,
        request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        let (to, answers) = mpsc::channel(BUFFER);
        let conversation = Conversation {
            requests: request.into_inner(),
            to,
            snapshots: self.snapshots.clone(),
            connected: self.connected.clone(),
            node: String::new(),
            subscribed: false,
            sent: 0,
        };
        let shutdown = self.shutdown.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = shutdown.cancelled() => {}
                () = conversation.run() => {}
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }

    type DeltaAggregatedResourcesStream = Answers<DeltaDiscoveryResponse>;

    async fn delta_aggregated_resources(
        &self,
        _: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        Err(Failure::not_yet("delta xDS").into())
    }
}

struct Conversation {
    requests: Streaming<DiscoveryRequest>,
    to: mpsc::Sender<Result<DiscoveryResponse, Status>>,
    snapshots: watch::Receiver<Option<Snapshot>>,
    connected: Connected,
    node: String,
    subscribed: bool,
    sent: u64,
}

impl Conversation {
    async fn run(mut self) {
        loop {
            tokio::select! {
                request = self.requests.message() => match request {
                    Ok(Some(request)) => self.hear(&request),
                    Ok(None) => break,
                    Err(status) => {
                        tracing::debug!(%status, "an envoy went away");
                        break;
                    }
                },
                changed = self.snapshots.changed() => if changed.is_err() {
                    break;
                },
            }
            if !self.send_news().await {
                break;
            }
        }
        self.connected.forget(&self.node);
    }

    fn hear(&mut self, request: &DiscoveryRequest) {
        if let Some(node) = &request.node {
            self.node.clone_from(&node.id);
            tracing::info!(envoy = self.node, "an envoy connected");
        }
        if request.type_url != ENDPOINTS {
            tracing::warn!(
                type_url = request.type_url,
                "an envoy asked for what is not served"
            );
            return;
        }
        self.subscribed = true;
        let version: u64 = request.version_info.parse().unwrap_or_default();
        if let Some(error) = &request.error_detail {
            metrics::counter!("sandmesh_envoy_nacks_total").increment(1);
            tracing::error!(
                envoy = self.node,
                error = error.message,
                kept = version,
                "an envoy refused a configuration"
            );
            self.connected.note(&self.node, |progress| {
                progress.refused = Some(error.message.clone());
            });
        } else if version > 0 {
            metrics::counter!("sandmesh_envoy_acks_total").increment(1);
            self.connected.note(&self.node, |progress| {
                progress.accepted = version;
                progress.refused = None;
            });
        }
    }

    /// `false` when the Envoy is gone.
    async fn send_news(&mut self) -> bool {
        let Some(snapshot) = self.snapshots.borrow_and_update().clone() else {
            return true;
        };
        if !self.subscribed || snapshot.version == self.sent {
            return true;
        }
        let resource = Any {
            type_url: ENDPOINTS.into(),
            value: snapshot.endpoints.encode_to_vec(),
        };
        let response = DiscoveryResponse {
            version_info: snapshot.version.to_string(),
            resources: vec![resource],
            type_url: ENDPOINTS.into(),
            nonce: snapshot.version.to_string(),
            ..DiscoveryResponse::default()
        };
        self.sent = snapshot.version;
        self.connected
            .note(&self.node, |progress| progress.sent = snapshot.version);
        self.to.send(Ok(response)).await.is_ok()
    }
}
