//! Sessions and their nodes, as templates need them.

use std::{
    borrow::Cow, collections::HashMap, error::Error as _, fmt, fs::File, io, os::fd::AsRawFd as _,
    time::Duration,
};

use backon::{ExponentialBuilder, Retryable as _};
use bytes::Bytes;
use futures::{TryStreamExt as _, future::BoxFuture};
use http::StatusCode;
use http_body::Frame;
use http_body_util::{BodyExt as _, Limited, StreamBody, combinators::BoxBody};
use hyper_util::{
    client::legacy::{Client as Http, connect::HttpConnector},
    rt::TokioExecutor,
};
use percent_encoding::{NON_ALPHANUMERIC, percent_encode};
use proto::{
    node::v1::{
        ExportSessionRequest, ExportSessionResponse, ListNodesRequest, MakeTemplateSnapshotRequest,
        MakeTemplateSnapshotResponse, Node, NodeState,
        node_registry_service_client::NodeRegistryServiceClient,
        node_service_client::NodeServiceClient,
    },
    session::v1::{
        CreateSessionRequest, GetSessionRequest, ListSessionsRequest, Session, SessionState,
        StopSessionRequest, session_service_client::SessionServiceClient,
    },
};
use rand::seq::IteratorRandom as _;
use sdk::Sandbox;
use service_kit::{
    address::Address,
    errors::{Failure, Reason, reason_of},
    ids::{SessionId, TeamId},
    mesh::{self, Caller, MeshChannel, MeshToken},
};
use tokio_util::io::ReaderStream;
use tonic::{Code, Request, Status, Streaming};

/// Pages of nodes that are looked through.
const MOST_PAGES: usize = 100;
/// In the place of a node's ID, when there is none.
const NO_NODE: &str = "";
const PIECE: usize = 128 << 10;
/// Of a refusal.
const LONGEST_ANSWER: usize = 64 << 10;
/// What breaks off is tried so often, over about a minute.
const TRIES: usize = 7;
const FIRST_WAIT: Duration = Duration::from_millis(500);
/// Who does not answer is asked again for so long: as long as a service, or a node's agent, may need to come back.
pub(crate) const PATIENCE: Duration = Duration::from_mins(1);
const LONGEST_WAIT: Duration = Duration::from_secs(3);

/// Whether nobody has answered, rather than said no.
pub(crate) fn is_unanswered(status: &Status) -> bool {
    // HTTP/2 tells a broken connection in as many ways as there are to die.
    status.source().is_some() || sdk::Error::from(status.clone()).is_interruption()
}

/// Asks again for as long as nobody answers, which must do no harm.
pub(crate) async fn patiently<T, E, F: Future<Output = Result<T, E>>>(
    is_unanswered: impl FnMut(&E) -> bool,
    ask: impl FnMut() -> F,
) -> Result<T, E> {
    ask.retry(patience()).when(is_unanswered).await
}

/// How long to wait before each next try.
fn patience() -> ExponentialBuilder {
    ExponentialBuilder::default()
        .with_min_delay(FIRST_WAIT)
        .with_max_delay(LONGEST_WAIT)
        .without_max_times()
        .with_total_delay(Some(PATIENCE))
}

/// Why a session does not run any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    /// The stable word.
    pub reason: Cow<'static, str>,
    /// One sentence.
    pub message: String,
}

impl End {
    pub(crate) fn new(reason: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
            message: message.into(),
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.message, self.reason)
    }
}

/// Why a session of this state does not run; nothing if it does. Pure.
fn end_of(session: &Session) -> Option<End> {
    let state = session.state();
    let is_running = matches!(
        state,
        SessionState::Unspecified
            | SessionState::Pending
            | SessionState::Starting
            | SessionState::Running
    );
    if is_running {
        return None;
    }
    let said = session.end_reason.clone().unwrap_or_default();
    Some(if said.reason.is_empty() {
        // Somebody has paused it, or rolled it back: what ran in it does not go on here.
        let state = state.as_str_name().trim_start_matches("SESSION_STATE_");
        End::new(
            format!("SESSION_{state}"),
            "the session was paused or ended",
        )
    } else {
        End::new(said.reason, said.message)
    })
}

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
    ) -> Result<Session, Status> {
        let request = of_team(team, request);
        let answer = self.control.clone().create_session(request).await?;
        Ok(answer.into_inner().session.unwrap_or_default())
    }

    /// Stops one; one that has ended is a success.
    pub async fn stop(&self, team: &TeamId, session: &SessionId) -> Result<(), ExportError> {
        // What session-svc has begun it repeats until the node has heard it.
        let is_begun = |status: &Status| {
            reason_of(status).as_deref() == Some(Reason::NODE_UNREACHABLE.as_str())
        };
        let stop = || {
            let request = StopSessionRequest {
                session_id: session.to_string(),
            };
            let mut control = self.control.clone();
            async move { control.stop_session(of_team(team, request)).await }
        };
        let is_again = |status: &Status| is_unanswered(status) && !is_begun(status);
        match patiently(is_again, stop).await {
            Err(status) if status.code() != Code::NotFound && !is_begun(&status) => {
                Err(status.into())
            }
            _ => Ok(()),
        }
    }

    /// Why a team's session does not run any more; nothing if it does.
    pub async fn end_of(&self, team: &TeamId, session: &SessionId) -> Result<Option<End>, Status> {
        let request = GetSessionRequest {
            session_id: session.to_string(),
        };
        let mut control = self.control.clone();
        match control.get_session(of_team(team, request)).await {
            Ok(answer) => Ok(end_of(&answer.into_inner().session.unwrap_or_default())),
            Err(status) if status.code() == Code::NotFound => {
                let reason = Reason::SESSION_UNKNOWN.word();
                Ok(Some(End::new(reason, "there is no such session any more")))
            }
            Err(status) => Err(status),
        }
    }

    /// A team's sessions with that label that have not ended.
    pub async fn labelled(
        &self,
        team: &TeamId,
        label: &str,
        value: &str,
    ) -> Result<Vec<SessionId>, ExportError> {
        let list = || {
            let request = ListSessionsRequest {
                metadata: HashMap::from([(label.to_owned(), value.to_owned())]),
                ..ListSessionsRequest::default()
            };
            let mut control = self.control.clone();
            async move { control.list_sessions(of_team(team, request)).await }
        };
        let listed = patiently(is_unanswered, list).await?;
        let sessions = listed.into_inner().sessions.into_iter();
        let ids = sessions.filter_map(|session| SessionId::parse(&session.session_id).ok());
        Ok(ids.collect())
    }

    /// The inside of a running session, by its node.
    pub async fn sandbox(&self, session: &Session) -> Result<(Sandbox, SandboxFiles), ExportError> {
        let unknown = || ExportError::NodeGone(session.session_id.clone());
        let find = || self.node(&session.node_id);
        let node = patiently(is_unanswered, find).await?;
        let node = node.ok_or_else(unknown)?;
        // The session's own token is all that is needed there.
        let endpoint = format!("http://{}", node.ingress_address);
        let client = sdk::Client::connect(&endpoint, "none").map_err(|_| unknown())?;
        let sandbox = client.sandbox(session).map_err(|_| unknown())?;
        let files = SandboxFiles {
            client: Http::builder(TokioExecutor::new()).build_http(),
            endpoint,
            session_id: session.session_id.clone(),
            token: session.access_token.clone(),
        };
        Ok((sandbox, files))
    }

    /// Has one of the nodes make a template's snapshot, of those that failed least; counts it as one that failed until it has not. What the template's
    /// start command says.
    pub async fn make_snapshot(
        &self,
        request: MakeTemplateSnapshotRequest,
        failures: &mut HashMap<String, u32>,
    ) -> Result<Streaming<MakeTemplateSnapshotResponse>, Status> {
        *failures.entry(NO_NODE.to_owned()).or_default() += 1;
        let nodes = self.all_nodes().await?;
        let ready = nodes
            .into_iter()
            .filter(|node| node.state() == NodeState::Ready);
        let failed = |node: &Node| failures.get(&node.node_id).copied().unwrap_or_default();
        let ready: Vec<Node> = ready.collect();
        let least = ready.iter().map(failed).min();
        let best = ready.iter().filter(|node| Some(failed(node)) == least);
        // Which one is as good as any: sessions of it may start on each.
        let node = best.choose(&mut rand::rng()).cloned();
        if let Some(node) = &node {
            failures.remove(NO_NODE);
            *failures.entry(node.node_id.clone()).or_default() += 1;
        }
        let address = node.and_then(|node| node.internal_address.parse().ok());
        let none = || {
            let message = "no node is ready to make a snapshot";
            Failure::new(Code::ResourceExhausted, Reason::NO_CAPACITY, message).into_status()
        };
        let address: Address = address.ok_or_else(none)?;
        let mut node = NodeServiceClient::new(mesh::connect(&[address], &self.token));
        Ok(node.make_template_snapshot(request).await?.into_inner())
    }

    async fn node(&self, id: &str) -> Result<Option<Node>, Status> {
        let nodes = self.all_nodes().await?;
        Ok(nodes.into_iter().find(|node| node.node_id == id))
    }

    async fn all_nodes(&self) -> Result<Vec<Node>, Status> {
        let mut request = ListNodesRequest::default();
        let mut nodes = Vec::new();
        for _ in 0..MOST_PAGES {
            let page = self.nodes.clone().list_nodes(request.clone()).await?;
            let page = page.into_inner();
            nodes.extend(page.nodes);
            if page.next_page_token.is_empty() {
                break;
            }
            request.page_token = page.next_page_token;
        }
        Ok(nodes)
    }
}

/// The files of a running session, by plain HTTP (docs/files.md).
#[derive(Clone)]
pub struct SandboxFiles {
    client: Http<HttpConnector, Body>,
    /// Of its node.
    endpoint: String,
    session_id: String,
    token: String,
}

type Body = BoxBody<Bytes, io::Error>;

impl fmt::Debug for SandboxFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("SandboxFiles");
        debug.field("session_id", &self.session_id);
        debug.finish_non_exhaustive()
    }
}

/// A tarball was not unpacked.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// It was refused.
    #[error("{message} ({reason})")]
    Refused {
        /// The stable word.
        reason: String,
        /// One sentence.
        message: String,
    },
    /// It cannot be asked for.
    #[error("the build's session cannot be reached: {0}")]
    Unreachable(String),
    /// The tarball cannot be read.
    #[error("what is copied cannot be read: {0}")]
    Disk(#[from] io::Error),
}

impl UnpackError {
    /// The stable word of a build's failure.
    pub fn reason(&self) -> &'static str {
        match self {
            // Of the session, not of this host.
            Self::Refused { .. } => "STEP_FAILED",
            Self::Unreachable(_) => "SANDBOX_FAILED",
            Self::Disk(_) => "BUILD_FAILED",
        }
    }
}

/// What becomes of folders that are there when a tarball with them is unpacked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Folders {
    /// They keep owner, permissions and time.
    Keep,
    /// They get those of the tarball.
    Change,
}

/// A refusal that will not change.
fn is_final(refusal: &Refusal) -> bool {
    refusal.reason == "GUEST_REFUSED"
}

/// What a node or envd says when it refuses.
#[derive(serde::Deserialize)]
struct Refusal {
    reason: String,
    message: String,
}

impl SandboxFiles {
    /// Unpacks a tarball in a folder, as root. Is done again when it breaks off: that does no harm.
    pub async fn unpack(
        &self,
        folder: &str,
        tarball: File,
        folders: Folders,
    ) -> Result<(), UnpackError> {
        let backoff = ExponentialBuilder::default()
            .with_min_delay(FIRST_WAIT)
            .with_max_times(TRIES);
        let unpack = || -> BoxFuture<'_, _> {
            Box::pin(async {
                // With a place of its own: what came before may be read still.
                let path = format!("/proc/self/fd/{}", tarball.as_raw_fd());
                self.unpack_once(folder, File::open(path)?, folders).await
            })
        };
        unpack
            .retry(backoff)
            .when(|error| matches!(error, UnpackError::Unreachable(_)))
            .await
    }

    async fn unpack_once(
        &self,
        folder: &str,
        tarball: File,
        folders: Folders,
    ) -> Result<(), UnpackError> {
        let pieces = ReaderStream::with_capacity(tokio::fs::File::from_std(tarball), PIECE);
        let folder = percent_encode(folder.as_bytes(), NON_ALPHANUMERIC);
        let keep = match folders {
            Folders::Keep => "&folders=keep",
            Folders::Change => "",
        };
        let uri = format!(
            "{}/files/{folder}?user=root&unpack=tar{keep}",
            self.endpoint
        );
        let request = http::Request::put(uri)
            .header("x-session-id", &self.session_id)
            .header("x-sandmesh-token", &self.token)
            .body(StreamBody::new(pieces.map_ok(Frame::data)).boxed());
        let unreachable = |error: String| UnpackError::Unreachable(error);
        let request = request.map_err(|error| unreachable(error.to_string()))?;
        let answer = self.client.request(request).await;
        let answer = answer.map_err(|error| unreachable(error.to_string()))?;
        let status = answer.status();
        // The guest has its words in it.
        let body = Limited::new(answer.into_body(), LONGEST_ANSWER)
            .collect()
            .await;
        let body = body
            .map_err(|error| unreachable(error.to_string()))?
            .to_bytes();
        if status.is_success() {
            return Ok(());
        }
        let said: Option<Refusal> = serde_json::from_slice(&body).ok();
        let again = [
            StatusCode::TOO_MANY_REQUESTS,
            StatusCode::BAD_GATEWAY,
            StatusCode::SERVICE_UNAVAILABLE,
            StatusCode::GATEWAY_TIMEOUT,
        ];
        match said {
            // What envd says, and the node does not know, will not change.
            said if again.contains(&status) && !said.as_ref().is_some_and(is_final) => {
                let said = said.map(|said| said.message);
                Err(unreachable(said.unwrap_or_else(|| status.to_string())))
            }
            Some(Refusal { reason, message }) => Err(UnpackError::Refused { reason, message }),
            None => Err(UnpackError::Refused {
                reason: "SANDBOX_FAILED".into(),
                message: status.to_string(),
            }),
        }
    }
}
