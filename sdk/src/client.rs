//! The control plane.

use std::{collections::HashMap, time::Duration};

use proto::{
    session::v1::{
        CreateSessionRequest, ExtendSessionRequest, GetSessionRequest, Network, Resources, Session,
        StopSessionRequest, session_service_client::SessionServiceClient,
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
    /// The same ID gives the same session.
    pub request_id: String,
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
            request_id: new.request_id,
            ..Self::default()
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
