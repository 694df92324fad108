//! Sessions and their nodes, as templates need them.

use std::collections::HashMap;

use proto::{
    node::v1::{
        ExportSessionRequest, ExportSessionResponse, ListNodesRequest, Node,
        node_registry_service_client::NodeRegistryServiceClient,
        node_service_client::NodeServiceClient,
    },
    session::v1::{
        CreateSessionRequest, GetSessionRequest, ListSessionsRequest, Session, StopSessionRequest,
        session_service_client::SessionServiceClient,
    },
};
use sdk::Sandbox;
use service_kit::{
    address::Address,
    errors::reason_of,
    ids::{SessionId, TeamId},
    mesh::{self, Caller, MeshChannel, MeshToken},
};
use tonic::{Code, Request, Status, Streaming};

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
    NodeGone(String),
}

impl ExportError {
    /// The stable word of a build's failure.
    pub fn reason(&self) -> String {
        match self {
            Self::Refused(status) => reason_of(status).unwrap_or_else(|| "EXPORT_FAILED".into()),
            Self::NodeGone(_) => "NODE_UNREACHABLE".into(),
        }
    }
}

fn of_team<T>(team: &TeamId, message: T) -> Request<T> {
    let mut request = Request::new(message);
    let caller = Caller {
        team: team.clone(),
        key_id: String::new(),
        operator: false,
    };
    caller.apply(request.metadata_mut());
    request
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
        let request = GetSessionRequest {
            session_id: session.to_string(),
        };
        let request = of_team(team, request);
        let answer = self.control.clone().get_session(request).await?;
        let found = answer.into_inner().session.unwrap_or_default();
        let node = self.node(&found.node_id).await?;
        let address = node.and_then(|node| node.internal_address.parse().ok());
        let address: Address = address.ok_or_else(|| ExportError::NodeGone(session.to_string()))?;
        let mut node = NodeServiceClient::new(mesh::connect(&[address], &self.token));
        let request = ExportSessionRequest {
            session_id: session.to_string(),
        };
        Ok(node.export_session(request).await?.into_inner())
    }

    /// A new session of a team, running.
    pub async fn create(
        &self,
        team: &TeamId,
        request: CreateSessionRequest,
    ) -> Result<Session, ExportError> {
        let request = of_team(team, request);
        let answer = self.control.clone().create_session(request).await?;
        Ok(answer.into_inner().session.unwrap_or_default())
    }

    /// Stops one; one that has ended is a success.
    pub async fn stop(&self, team: &TeamId, session: &SessionId) -> Result<(), ExportError> {
        let request = StopSessionRequest {
            session_id: session.to_string(),
        };
        let mut control = self.control.clone();
        match control.stop_session(of_team(team, request)).await {
            Err(status) if status.code() != Code::NotFound => Err(status.into()),
            _ => Ok(()),
        }
    }

    /// A team's sessions with that label that have not ended.
    pub async fn labelled(
        &self,
        team: &TeamId,
        label: &str,
        value: &str,
    ) -> Result<Vec<SessionId>, ExportError> {
        let request = ListSessionsRequest {
            metadata: HashMap::from([(label.to_owned(), value.to_owned())]),
            ..ListSessionsRequest::default()
        };
        let mut control = self.control.clone();
        let listed = control.list_sessions(of_team(team, request));
        let sessions = listed.await?.into_inner().sessions.into_iter();
        let ids = sessions.filter_map(|session| SessionId::parse(&session.session_id).ok());
        Ok(ids.collect())
    }

    /// The inside of a running session, by its node.
    pub async fn sandbox(&self, session: &Session) -> Result<Sandbox, ExportError> {
        let unknown = || ExportError::NodeGone(session.session_id.clone());
        let node = self.node(&session.node_id).await?.ok_or_else(unknown)?;
        // The session's own token is all that is needed there.
        let endpoint = format!("http://{}", node.ingress_address);
        let client = sdk::Client::connect(&endpoint, "none").map_err(|_| unknown())?;
        client.sandbox(session).map_err(|_| unknown())
    }

    async fn node(&self, id: &str) -> Result<Option<Node>, Status> {
        let mut request = ListNodesRequest::default();
        for _ in 0..MOST_PAGES {
            let page = self.nodes.clone().list_nodes(request.clone()).await?;
            let page = page.into_inner();
            let found = page.nodes.into_iter().find(|node| node.node_id == id);
            if found.is_some() || page.next_page_token.is_empty() {
                return Ok(found);
            }
            request.page_token = page.next_page_token;
        }
        Ok(None)
    }
}
