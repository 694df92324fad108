//! Sessions and their nodes, as templates need them.

use futures::TryStreamExt as _;
use proto::{
    node::v1::{
        ExportSessionRequest, ExportSessionResponse, ListNodesRequest, Node,
        node_registry_service_client::NodeRegistryServiceClient,
        node_service_client::NodeServiceClient,
    },
    session::v1::{GetSessionRequest, session_service_client::SessionServiceClient},
};
use service_kit::{
    address::Address,
    errors::reason_of,
    ids::{SessionId, TeamId},
    mesh::{self, Caller, MeshChannel, MeshToken},
};
use tonic::{Request, Status, Streaming};

/// Pages of nodes that are looked through.
const MOST_PAGES: usize = 100;

/// Asks session-svc, and nodes.
#[derive(Debug, Clone)]
pub struct Sessions {
    control: SessionServiceClient<MeshChannel>,
    nodes: NodeRegistryServiceClient<MeshChannel>,
    token: MeshToken,
}

/// Why nothing comes of a session.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// Said by whom it was asked of.
    #[error("{}", .0.message())]
    Refused(#[from] Status),
    /// The session is on no node that is known.
    #[error("session {0} is on a node that is not known now; try again")]
    NodeUnknown(SessionId),
}

impl ExportError {
    /// The stable word of a build's failure.
    pub fn reason(&self) -> String {
        match self {
            Self::Refused(status) => reason_of(status).unwrap_or_else(|| "EXPORT_FAILED".into()),
            Self::NodeUnknown(_) => "NODE_UNREACHABLE".into(),
        }
    }
}

impl Sessions {
    /// Asks these replicas of session-svc.
    pub fn new(replicas: &[Address], token: &MeshToken) -> Self {
        let channel = mesh::connect(replicas, token);
        Self {
            control: SessionServiceClient::new(channel.clone()),
            nodes: NodeRegistryServiceClient::new(channel),
            token: token.clone(),
        }
    }

    /// What a team's running session has that its template has not; the template comes first.
    pub async fn export(
        &self,
        team: &TeamId,
        session: &SessionId,
    ) -> Result<Streaming<ExportSessionResponse>, ExportError> {
        let mut request = Request::new(GetSessionRequest {
            session_id: session.to_string(),
        });
        let caller = Caller {
            team: team.clone(),
            key_id: String::new(),
            operator: false,
        };
        caller.apply(request.metadata_mut());
        let answer = self.control.clone().get_session(request).await?;
        let found = answer.into_inner().session.unwrap_or_default();
        let node = self.node(&found.node_id).await?;
        let address = node.and_then(|node| node.internal_address.parse().ok());
        let address: Address = address.ok_or_else(|| ExportError::NodeUnknown(session.clone()))?;
        let mut node = NodeServiceClient::new(mesh::connect(&[address], &self.token));
        let request = ExportSessionRequest {
            session_id: session.to_string(),
        };
        Ok(node.export_session(request).await?.into_inner())
    }

    async fn node(&self, id: &str) -> Result<Option<Node>, Status> {
        let first = (self.nodes.clone(), Some(String::new()));
        let pages = futures::stream::try_unfold(first, |(mut nodes, token)| async move {
            let Some(page_token) = token else {
                return Ok::<_, Status>(None);
            };
            let request = ListNodesRequest {
                page_token,
                ..ListNodesRequest::default()
            };
            let page = nodes.list_nodes(request).await?.into_inner();
            let next = Some(page.next_page_token).filter(|token| !token.is_empty());
            Ok(Some((page.nodes, (nodes, next))))
        });
        let pages = futures::StreamExt::take(pages, MOST_PAGES);
        let mut found = None;
        let mut pages = std::pin::pin!(pages);
        while let Some(nodes) = pages.try_next().await? {
            found = nodes.into_iter().find(|node| node.node_id == id);
            if found.is_some() {
                break;
            }
        }
        Ok(found)
    }
}
