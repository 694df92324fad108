//! A call to a paused session wakes it: the control plane is asked to resume it, once however many calls there are.

use std::time::Duration;

use proto::node::v1::{
    WakeSessionRequest, node_registry_service_client::NodeRegistryServiceClient,
};
use service_kit::{
    errors::{Failure, Reason, reason_of},
    ids::NodeId,
    mesh::MeshChannel,
};
use tonic::Request;

use crate::hosted::{Phase, Session};

/// How long a call waits for its session.
const WAKE_LIMIT: Duration = Duration::from_mins(1);

/// Asks for sessions to be woken.
#[derive(Debug, Clone)]
pub struct Waker {
    registry: NodeRegistryServiceClient<MeshChannel>,
    node: NodeId,
}

impl Waker {
    /// Asks this registry, in this node's name.
    pub fn new(registry: NodeRegistryServiceClient<MeshChannel>, node: NodeId) -> Self {
        Self { registry, node }
    }

    /// Wakes a session and returns the phase it is in then.
    pub(super) async fn wake(&self, session: &Session) -> Result<Phase, Failure> {
        let late = || {
            Failure::unavailable(
                Reason::SESSION_PAUSED,
                "the session is paused and did not wake in time",
            )
        };
        tokio::time::timeout(WAKE_LIMIT, self.ask(session))
            .await
            .map_err(|_| late())?
    }

    async fn ask(&self, session: &Session) -> Result<Phase, Failure> {
        let _first_asks = session.waking.lock().await;
        let phase = session.phase().borrow().clone();
        if !matches!(phase, Phase::Paused) {
            // Another call has woken it.
            return Ok(session.settled(WAKE_LIMIT).await);
        }
        let mut request = Request::new(WakeSessionRequest {
            session_id: session.id.to_string(),
            node_id: self.node.to_string(),
        });
        request.set_timeout(WAKE_LIMIT);
        match self.registry.clone().wake_session(request).await {
            Ok(_) => Ok(session.settled(WAKE_LIMIT).await),
            Err(status) => {
                tracing::warn!(session_id = session.id.short(), %status, "a session was not woken");
                // What a resume fails with is for its caller to know; who only calls a port learns the reason.
                let reason = reason_of(&status);
                Err(Failure::unavailable(
                    Reason::SESSION_PAUSED,
                    format!(
                        "the session is paused and could not be woken{}",
                        reason
                            .map(|reason| format!(" ({reason})"))
                            .unwrap_or_default()
                    ),
                ))
            }
        }
    }
}
