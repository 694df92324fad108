//! The control plane.

use std::{collections::HashMap, time::Duration};

use proto::{
    session::v1::{
        Checkpoint, CreateCheckpointRequest, CreateSessionRequest, DeleteCheckpointRequest, Egress,
        ExtendSessionRequest, ForkSessionRequest, ForkSessionResponse, GetSessionMetricsRequest,
        GetSessionMetricsResponse, GetSessionRequest, ListCheckpointsRequest, Network, OnTimeout,
        PauseSessionRequest, PortAccess, PortReadiness, Resources, ResumeSessionRequest,
        RollbackSessionRequest, Session, StopSessionRequest, UpdateSessionRequest,
        session_service_client::SessionServiceClient,
    },
    template::v1::template_service_client::TemplateServiceClient,
};
use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Channel, Endpoint},
};

use crate::{Error, Sandbox};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;

/// Calls a Sandmesh deployment. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Client {
    channel: Channel,
    key: Headers,
}

/// Metadata added to every call.
#[derive(Clone)]
pub struct Headers {
    entries: Vec<(&'static str, MetadataValue<Ascii>)>,
}

impl std::fmt::Debug for Headers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Headers(..)")
    }
}

impl Headers {
    pub(crate) fn new(entries: &[(&'static str, String)]) -> Result<Self, Error> {
        let parse = |(name, value): &(&'static str, String)| {
            let value = value.parse().map_err(|_| {
                Error::Endpoint(format!("{name} holds characters that are not allowed"))
            })?;
            Ok((*name, value))
        };
        Ok(Self {
            entries: entries.iter().map(parse).collect::<Result<_, Error>>()?,
        })
    }
}

impl Interceptor for Headers {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        for (name, value) in &self.entries {
            request.metadata_mut().insert(*name, value.clone());
        }
        Ok(request)
    }
}

/// A channel that adds metadata.
pub(crate) type Authorized = InterceptedService<Channel, Headers>;

/// What to create; everything but the template has a default.
#[derive(Debug, Clone, Default)]
pub struct NewSession {
    /// Template name, `name:tag` or `name@version`.
    pub template: String,
    /// Time to live.
    pub timeout: Option<Duration>,
    /// Labels.
    pub metadata: HashMap<String, String>,
    /// Environment of every process.
    pub env: HashMap<String, String>,
    /// Size.
    pub resources: Option<Resources>,
    /// Network.
    pub network: Option<Network>,
    /// At the deadline.
    pub on_timeout: OnTimeout,
    /// Whether a call to the paused session wakes it.
    pub wake_on_request: bool,
    /// The same ID gives the same session.
    pub request_id: String,
    /// A port that is to be open before `create` returns.
    pub wait_for_port: Option<PortReadiness>,
}

/// What to fork.
#[derive(Debug, Clone)]
pub struct NewFork {
    /// How many children, 1-100.
    pub count: u32,
    /// Time to live of each.
    pub timeout: Option<Duration>,
    /// The same ID gives the same children.
    pub request_id: String,
}

impl NewFork {
    /// So many children, all else as by default.
    pub fn of(count: u32) -> Self {
        Self {
            count,
            timeout: None,
            request_id: String::new(),
        }
    }
}

/// What to change of a session; what is left out stays as it is.
#[derive(Debug, Clone, Default)]
pub struct Changes {
    /// New labels, replacing all.
    pub metadata: Option<HashMap<String, String>>,
    /// New behaviour at the deadline.
    pub on_timeout: Option<OnTimeout>,
    /// New wake behaviour.
    pub wake_on_request: Option<bool>,
    /// Who may reach its ports.
    pub port_access: Option<PortAccess>,
    /// Whether it reaches the outside where `egress` says nothing.
    pub internet_access: Option<bool>,
    /// Where to it may open connections, replacing both lists.
    pub egress: Option<Egress>,
    /// Bytes per second to the outside; 0 is the node's limit.
    pub egress_bytes_per_second: Option<u64>,
    /// Bytes per second from the outside; 0 is the node's limit.
    pub ingress_bytes_per_second: Option<u64>,
}

impl Changes {
    fn request(self, session_id: &str) -> UpdateSessionRequest {
        let named = [
            ("metadata", self.metadata.is_some()),
            ("on_timeout", self.on_timeout.is_some()),
            ("wake_on_request", self.wake_on_request.is_some()),
            ("network.port_access", self.port_access.is_some()),
            ("network.internet_access", self.internet_access.is_some()),
            ("network.egress", self.egress.is_some()),
            (
                "network.egress_bytes_per_second",
                self.egress_bytes_per_second.is_some(),
            ),
            (
                "network.ingress_bytes_per_second",
                self.ingress_bytes_per_second.is_some(),
            ),
        ];
        let paths = named.into_iter().filter(|(_, is_named)| *is_named);
        UpdateSessionRequest {
            session_id: session_id.into(),
            update_mask: Some(prost_types::FieldMask {
                paths: paths.map(|(path, _)| path.to_owned()).collect(),
            }),
            metadata: self.metadata.unwrap_or_default(),
            on_timeout: self.on_timeout.unwrap_or_default().into(),
            wake_on_request: self.wake_on_request.unwrap_or_default(),
            network: Some(Network {
                port_access: self.port_access.unwrap_or_default().into(),
                internet_access: self.internet_access,
                egress: self.egress,
                egress_bytes_per_second: self.egress_bytes_per_second.unwrap_or_default(),
                ingress_bytes_per_second: self.ingress_bytes_per_second.unwrap_or_default(),
            }),
        }
    }
}

impl NewSession {
    /// All defaults.
    pub fn from_template(template: impl Into<String>) -> Self {
        Self {
            template: template.into(),
            ..Self::default()
        }
    }
}

impl From<NewSession> for CreateSessionRequest {
    fn from(new: NewSession) -> Self {
        Self {
            template: new.template,
            timeout: new
                .timeout
                .and_then(|timeout| prost_types::Duration::try_from(timeout).ok()),
            metadata: new.metadata,
            env: new.env,
            resources: new.resources,
            network: new.network,
            on_timeout: new.on_timeout.into(),
            wake_on_request: new.wake_on_request,
            request_id: new.request_id,
            wait_for_port: new.wait_for_port,
        }
    }
}

impl Client {
    /// For an endpoint such as `http://127.0.0.1:10080`; connects at the first call.
    pub fn connect(endpoint: &str, api_key: &str) -> Result<Self, Error> {
        let channel = Endpoint::from_shared(endpoint.to_owned())
            .map_err(|error| Error::Endpoint(error.to_string()))?
            .connect_timeout(CONNECT_TIMEOUT)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .http2_keep_alive_interval(Duration::from_secs(20))
            .connect_lazy();
        Ok(Self {
            channel,
            key: Headers::new(&[("authorization", format!("Bearer {api_key}"))])?,
        })
    }

    /// The whole session API.
    pub fn sessions(&self) -> SessionServiceClient<Authorized> {
        SessionServiceClient::with_interceptor(self.channel.clone(), self.key.clone())
    }

    /// The whole template API.
    pub fn templates(&self) -> TemplateServiceClient<Authorized> {
        TemplateServiceClient::with_interceptor(self.channel.clone(), self.key.clone())
    }

    /// Creates a session and returns it running.
    pub async fn create(&self, new: NewSession) -> Result<Session, Error> {
        let answer = self
            .sessions()
            .create_session(CreateSessionRequest::from(new))
            .await?;
        answer
            .into_inner()
            .session
            .ok_or(Error::Incomplete("session"))
    }

    /// Reads a session, its access token included.
    pub async fn get(&self, session_id: &str) -> Result<Session, Error> {
        let answer = self
            .sessions()
            .get_session(GetSessionRequest {
                session_id: session_id.into(),
            })
            .await?;
        answer
            .into_inner()
            .session
            .ok_or(Error::Incomplete("session"))
    }

    /// Moves a session's deadline to now + `timeout`.
    pub async fn extend(&self, session_id: &str, timeout: Duration) -> Result<Session, Error> {
        let timeout = prost_types::Duration::try_from(timeout).ok();
        let request = ExtendSessionRequest {
            session_id: session_id.into(),
            timeout,
        };
        let answer = self.sessions().extend_session(request).await?;
        answer
            .into_inner()
            .session
            .ok_or(Error::Incomplete("session"))
    }

    /// Changes a session.
    pub async fn update(&self, session_id: &str, changes: Changes) -> Result<Session, Error> {
        let answer = self
            .sessions()
            .update_session(changes.request(session_id))
            .await?;
        answer
            .into_inner()
            .session
            .ok_or(Error::Incomplete("session"))
    }

    /// Stores a session's memory and disk, and gives its node's resources back.
    pub async fn pause(&self, session_id: &str) -> Result<Session, Error> {
        let answer = self
            .sessions()
            .pause_session(PauseSessionRequest {
                session_id: session_id.into(),
            })
            .await?;
        answer
            .into_inner()
            .session
            .ok_or(Error::Incomplete("session"))
    }

    /// Continues a paused session where it was, with a new time to live if one is given, else with what was left.
    pub async fn resume(
        &self,
        session_id: &str,
        timeout: Option<Duration>,
    ) -> Result<Session, Error> {
        let request = ResumeSessionRequest {
            session_id: session_id.into(),
            timeout: timeout.and_then(|timeout| prost_types::Duration::try_from(timeout).ok()),
        };
        let answer = self.sessions().resume_session(request).await?;
        answer
            .into_inner()
            .session
            .ok_or(Error::Incomplete("session"))
    }

    /// Makes children of a session with its memory, disk and processes. Those that did not start are told apart.
    pub async fn fork(&self, session_id: &str, new: NewFork) -> Result<ForkSessionResponse, Error> {
        let request = ForkSessionRequest {
            session_id: session_id.into(),
            count: new.count,
            request_id: new.request_id,
            timeout: new
                .timeout
                .and_then(|timeout| prost_types::Duration::try_from(timeout).ok()),
        };
        Ok(self.sessions().fork_session(request).await?.into_inner())
    }

    /// Keeps a session as it is now, to go back to. It goes on.
    pub async fn create_checkpoint(
        &self,
        session_id: &str,
        name: &str,
    ) -> Result<Checkpoint, Error> {
        let request = CreateCheckpointRequest {
            session_id: session_id.into(),
            name: name.into(),
            request_id: String::new(),
        };
        let answer = self.sessions().create_checkpoint(request).await?;
        answer
            .into_inner()
            .checkpoint
            .ok_or(Error::Incomplete("checkpoint"))
    }

    /// All checkpoints of a session, oldest first.
    pub async fn list_checkpoints(&self, session_id: &str) -> Result<Vec<Checkpoint>, Error> {
        let mut all = Vec::new();
        let mut request = ListCheckpointsRequest {
            session_id: session_id.into(),
            page_size: 1000,
            ..ListCheckpointsRequest::default()
        };
        loop {
            let page = self.sessions().list_checkpoints(request.clone()).await?;
            let page = page.into_inner();
            all.extend(page.checkpoints);
            if page.next_page_token.is_empty() {
                return Ok(all);
            }
            request.page_token = page.next_page_token;
        }
    }

    /// Puts a session back to one of its checkpoints; it runs then. Calls in flight end with `ABORTED`.
    pub async fn rollback(&self, session_id: &str, checkpoint_id: &str) -> Result<Session, Error> {
        let request = RollbackSessionRequest {
            session_id: session_id.into(),
            checkpoint_id: checkpoint_id.into(),
        };
        let answer = self.sessions().rollback_session(request).await?;
        answer
            .into_inner()
            .session
            .ok_or(Error::Incomplete("session"))
    }

    /// Removes a checkpoint.
    pub async fn delete_checkpoint(
        &self,
        session_id: &str,
        checkpoint_id: &str,
    ) -> Result<(), Error> {
        let request = DeleteCheckpointRequest {
            session_id: session_id.into(),
            checkpoint_id: checkpoint_id.into(),
        };
        self.sessions().delete_checkpoint(request).await?;
        Ok(())
    }

    /// What a session uses now.
    pub async fn metrics(&self, session_id: &str) -> Result<GetSessionMetricsResponse, Error> {
        let request = GetSessionMetricsRequest {
            session_id: session_id.into(),
        };
        let answer = self.sessions().get_session_metrics(request).await?;
        Ok(answer.into_inner())
    }

    /// Stops a session; when it returns nothing of it is left.
    pub async fn stop(&self, session_id: &str) -> Result<Session, Error> {
        let answer = self
            .sessions()
            .stop_session(StopSessionRequest {
                session_id: session_id.into(),
            })
            .await?;
        answer
            .into_inner()
            .session
            .ok_or(Error::Incomplete("session"))
    }

    /// What runs inside a session.
    pub fn sandbox(&self, session: &Session) -> Result<Sandbox, Error> {
        let headers = Headers::new(&[
            ("authorization", format!("Bearer {}", session.access_token)),
            ("x-session-id", session.session_id.clone()),
        ])?;
        Ok(Sandbox::new(self.channel.clone(), headers))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_to_change_is_named() {
        let paths = |changes: Changes| changes.request("s").update_mask.unwrap().paths;
        assert!(paths(Changes::default()).is_empty());
        let closed = Changes {
            internet_access: Some(false),
            egress: Some(Egress::default()),
            ..Changes::default()
        };
        assert_eq!(paths(closed), ["network.internet_access", "network.egress"]);
        let all = Changes {
            metadata: Some(HashMap::new()),
            on_timeout: Some(OnTimeout::Pause),
            wake_on_request: Some(true),
            port_access: Some(PortAccess::Token),
            internet_access: Some(true),
            egress: Some(Egress::default()),
            egress_bytes_per_second: Some(0),
            ingress_bytes_per_second: Some(4096),
        };
        let request = all.request("s");
        assert_eq!(request.update_mask.clone().unwrap().paths.len(), 8);
        assert_eq!(request.on_timeout(), OnTimeout::Pause);
        assert_eq!(request.network.unwrap().ingress_bytes_per_second, 4096);
    }
}
