//! Sessions: created, found, changed and ended.
//!
//! A start or stop runs in a task of its own that the service joins at shutdown, so that a client which goes away leaves nothing
//! half done. The row carries a lease for as long as the task may take; when a replica dies in between, another takes the lease
//! over ([`crate::reconcile`]) and repeats the same idempotent call to the node.

use std::{sync::Arc, time::Duration};

use proto::{
    node::v1::{StartSessionRequest, StopSessionRequest},
    session::v1 as wire,
    template::v1::{GetTemplateRequest, Template, template_service_client::TemplateServiceClient},
};
use service_kit::{
    errors::reason_of,
    ids::{NodeId, SessionId, TeamId},
    mesh::{Caller, MeshChannel, MeshToken},
    request_id,
};
use tokio_util::task::TaskTracker;
use tonic::{Code, Request};
use tracing::Instrument as _;

use crate::{
    changes::Changes,
    errors::SessionError,
    lifecycle::{Happening, State, Step, decide},
    nodes::Nodes,
    placement::{Candidate, Need, choose, most_free},
    session::{EndReason, HostPattern, Micros, Session, access_token, access_token_sha256},
    store::{Filter, NewEvent, Store},
};

/// How many nodes are tried before a create is given up.
const PLACEMENT_TRIES: usize = 3;
/// How often a change is tried anew when others were faster.
const UPDATE_TRIES: usize = 8;
/// What a lease has beyond the node's own time limit.
const LEASE_MARGIN: Duration = Duration::from_secs(5);

/// What a session is created from, checked.
#[derive(Debug, Clone)]
pub struct NewSession {
    /// Template as asked for.
    pub template: String,
    /// Time to live.
    pub timeout: Duration,
    /// Size; zero fields take the template's.
    pub resources: wire::Resources,
    /// Who may reach its ports.
    pub port_access: wire::PortAccess,
    /// Whether it reaches the outside.
    pub internet_access: bool,
    /// Labels.
    pub metadata: std::collections::BTreeMap<String, String>,
    /// Environment.
    pub env: std::collections::BTreeMap<String, String>,
    /// At the deadline.
    pub on_timeout: wire::OnTimeout,
    /// Whether a call wakes it.
    pub wake_on_request: bool,
    /// The client's own ID for the request.
    pub request_id: Option<String>,
}

/// Time limits of calls to nodes.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// For a start.
    pub start: Duration,
    /// For a stop.
    pub stop: Duration,
    /// Largest memory a session may ask for, in bytes.
    pub max_memory: u64,
}

/// Sessions of all teams.
#[derive(Debug, Clone)]
pub struct Sessions {
    store: Store,
    nodes: Nodes,
    templates: TemplateServiceClient<MeshChannel>,
    template_cache: moka::future::Cache<(TeamId, String), Arc<Template>>,
    token: MeshToken,
    changes: Changes,
    hosts: HostPattern,
    limits: Limits,
    tasks: TaskTracker,
}

/// How a node answered a start.
enum Start {
    Runs,
    Full,
    Failed(EndReason),
    /// No answer: the lease decides.
    Unclear,
}

impl Sessions {
    /// Puts the parts together.
    #[expect(clippy::too_many_arguments, reason = "called once, by app.rs")]
    pub fn new(
        store: Store,
        nodes: Nodes,
        templates: MeshChannel,
        token: MeshToken,
        changes: Changes,
        hosts: HostPattern,
        limits: Limits,
        tasks: TaskTracker,
    ) -> Self {
        // Names may be moved to another version at any time; five seconds is what a create may lag behind.
        let template_cache = moka::future::Cache::builder()
            .max_capacity(1000)
            .time_to_live(Duration::from_secs(5))
            .build();
        Self {
            store,
            nodes,
            templates: TemplateServiceClient::new(templates),
            template_cache,
            token,
            changes,
            hosts,
            limits,
            tasks,
        }
    }

    /// As the owner sees it: with its access token.
    pub fn for_owner(&self, session: &Session) -> wire::Session {
        wire::Session {
            access_token: access_token(&self.token, &session.id),
            ..session.wire(&self.hosts)
        }
    }

    /// As listings show it.
    pub fn for_listing(&self, session: &Session) -> wire::Session {
        session.wire(&self.hosts)
    }

    /// Starts a session and returns it Running; the same request ID gives the same session.
    pub async fn create(&self, caller: &Caller, new: NewSession) -> Result<Session, SessionError> {
        if let Some(request_id) = &new.request_id
            && let Some(earlier) = self.store.by_request(&caller.team, request_id).await?
        {
            return self.started(earlier).await;
        }
        let template = self.template(caller, &new.template).await?;
        let resources = self.sized(new.resources, &template)?;
        let need = Need {
            memory_bytes: resources.memory_bytes,
            vcpus: resources.vcpus,
            disk_bytes: resources.disk_bytes,
        };
        let candidates = self.nodes.candidates().await?;
        let Some(node) = choose(&candidates, need, &[], (rand::random(), rand::random())) else {
            return Err(SessionError::NoCapacity {
                most: most_free(&candidates),
            });
        };
        let now = Micros::now();
        let session = Session {
            id: SessionId::random(&node.home_tag),
            team: caller.team.clone(),
            request_id: new.request_id.clone(),
            state: State::Starting,
            node_id: node.node_id.clone(),
            template: template.name.clone(),
            template_version: format!("{}@{}", template.name, template.version),
            template_spec: Template::clone(&template),
            resources,
            port_access: new.port_access,
            internet_access: new.internet_access,
            metadata: new.metadata,
            env: new.env,
            on_timeout: new.on_timeout,
            wake_on_request: new.wake_on_request,
            create_time: now,
            start_time: None,
            timeout: i64::try_from(new.timeout.as_micros()).unwrap_or(i64::MAX),
            deadline: now.plus(new.timeout),
            end_time: None,
            end_reason: None,
            lease_until: Some(now.plus(self.limits.start + LEASE_MARGIN)),
            version: 2,
        };
        let actor = format!("team:{}", caller.team);
        let events = [
            NewEvent::new("CREATED", &*actor),
            NewEvent::new("STARTING", &*actor),
        ];
        if !self.store.insert(&session, &events).await? {
            // Somebody else was faster with the same request ID.
            let request_id = new.request_id.unwrap_or_default();
            let winner = self.store.by_request(&caller.team, &request_id).await?;
            return self
                .started(winner.ok_or(SessionError::Contended(session.id))?)
                .await;
        }
        self.changes.tell();
        let sessions = self.clone();
        let request = request_id::current().unwrap_or_else(request_id::random);
        let start = request_id::scope(
            request,
            async move { sessions.start(session, vec![]).await },
        );
        // The task goes on when this handler is dropped.
        self.tasks
            .spawn(start.in_current_span())
            .await
            .map_err(|_| SessionError::ShuttingDown)?
    }

    /// Takes a Starting session to Running or Failed. Also how an abandoned start is repeated.
    pub async fn start(
        &self,
        mut session: Session,
        mut tried: Vec<NodeId>,
    ) -> Result<Session, SessionError> {
        loop {
            let outcome = self.ask_to_start(&session).await?;
            match outcome {
                Start::Runs => {
                    let started = self
                        .change(
                            session,
                            Happening::StartDone,
                            NewEvent::new("RUNNING", "node"),
                            |session, now| {
                                session.start_time = Some(now);
                                session.deadline =
                                    now.plus(Duration::from_micros(session.timeout.unsigned_abs()));
                                session.lease_until = None;
                            },
                        )
                        .await?;
                    return Self::only_running(started);
                }
                Start::Full => {
                    tried.push(session.node_id.clone());
                    let need = Need {
                        memory_bytes: session.resources.memory_bytes,
                        vcpus: session.resources.vcpus,
                        disk_bytes: session.resources.disk_bytes,
                    };
                    let candidates = self.nodes.candidates().await?;
                    let next = choose(&candidates, need, &tried, (rand::random(), rand::random()));
                    match next {
                        Some(node) if tried.len() < PLACEMENT_TRIES => {
                            session = self.move_to(session, node).await?;
                        }
                        _ => {
                            let most = most_free(&candidates);
                            self.fail(session, EndReason::new("NO_CAPACITY", "no node had room"))
                                .await?;
                            return Err(SessionError::NoCapacity { most });
                        }
                    }
                }
                Start::Failed(end) => {
                    let id = session.id.clone();
                    self.fail(session, end.clone()).await?;
                    return Err(SessionError::DidNotStart { id, end });
                }
                Start::Unclear => {
                    // The node may or may not have it. Ending it here makes the answer true: stop is idempotent.
                    let id = session.id.clone();
                    let end = EndReason::new("NODE_UNREACHABLE", "its node did not answer in time");
                    if self.ask_to_stop(&session).await.is_ok() {
                        self.fail(session, end.clone()).await?;
                        return Err(SessionError::DidNotStart { id, end });
                    }
                    return Err(SessionError::NodeUnreachable { id });
                }
            }
        }
    }

    async fn move_to(&self, session: Session, node: &Candidate) -> Result<Session, SessionError> {
        let old = session.id.clone();
        let moved = Session {
            id: SessionId::random(&node.home_tag),
            node_id: node.node_id.clone(),
            version: session.version + 1,
            ..session
        };
        let event = NewEvent::new("RESCHEDULED", "placement")
            .because("NODE_FULL", "the first node had no room left");
        if !self.store.move_before_start(&old, &moved, &event).await? {
            return Err(SessionError::Contended(old));
        }
        self.changes.tell();
        Ok(moved)
    }

    async fn ask_to_start(&self, session: &Session) -> Result<Start, SessionError> {
        let Some(mut node) = self.node_client(session).await? else {
            return Ok(Start::Failed(EndReason::new(
                "NODE_DEAD",
                "its node is not known any more",
            )));
        };
        let mut request = Request::new(StartSessionRequest {
            session_id: session.id.to_string(),
            template: Some(session.template_spec.clone()),
            resources: Some(session.resources),
            network: Some(session.network()),
            env: session.env.clone().into_iter().collect(),
            access_token_sha256: access_token_sha256(&self.token, &session.id),
            team_id: session.team.to_string(),
        });
        request.set_timeout(self.limits.start);
        let answer = tokio::time::timeout(self.limits.start, node.start_session(request)).await;
        Ok(match answer {
            Ok(Ok(_)) => Start::Runs,
            Ok(Err(status)) if status.code() == Code::ResourceExhausted => Start::Full,
            Ok(Err(status))
                if matches!(
                    status.code(),
                    Code::Unavailable | Code::Cancelled | Code::DeadlineExceeded
                ) =>
            {
                tracing::warn!(session_id = session.id.short(), %status, "the node gave no clear answer to a start");
                Start::Unclear
            }
            Ok(Err(status)) => {
                let reason = reason_of(&status).unwrap_or_else(|| "START_FAILED".into());
                tracing::warn!(session_id = session.id.short(), %status, "a start failed");
                Start::Failed(EndReason::new(reason, status.message()))
            }
            Err(_) => Start::Unclear,
        })
    }

    /// Ends a session; returns when nothing of it is left on its node. Stopping twice is stopping once.
    pub async fn stop(
        &self,
        session: Session,
        end: EndReason,
        actor: &str,
    ) -> Result<Session, SessionError> {
        let sessions = self.clone();
        let actor = actor.to_owned();
        let request = request_id::current().unwrap_or_else(request_id::random);
        let stop = request_id::scope(request, async move {
            sessions.stop_now(session, end, &actor).await
        });
        self.tasks
            .spawn(stop.in_current_span())
            .await
            .map_err(|_| SessionError::ShuttingDown)?
    }

    async fn stop_now(
        &self,
        session: Session,
        end: EndReason,
        actor: &str,
    ) -> Result<Session, SessionError> {
        let lease = self.limits.stop + LEASE_MARGIN;
        let event = NewEvent::new("STOPPING", actor).because(&*end.reason, &*end.message);
        let stopping = self
            .change(session, Happening::StopAsked, event, |session, now| {
                session.lease_until = Some(now.plus(lease));
                session.end_reason = Some(end);
            })
            .await?;
        if stopping.state.is_final() {
            return Ok(stopping);
        }
        self.finish_stop(stopping).await
    }

    /// The second half of a stop; also how an abandoned one is repeated.
    pub async fn finish_stop(&self, stopping: Session) -> Result<Session, SessionError> {
        self.ask_to_stop(&stopping).await?;
        let event = NewEvent::new("STOPPED", "node");
        self.change(stopping, Happening::StopDone, event, |session, now| {
            session.end_time = Some(now);
            session.lease_until = None;
        })
        .await
    }

    async fn ask_to_stop(&self, session: &Session) -> Result<(), SessionError> {
        let unreachable = || SessionError::NodeUnreachable {
            id: session.id.clone(),
        };
        let mut node = self.node_client(session).await?.ok_or_else(unreachable)?;
        let mut request = Request::new(StopSessionRequest {
            session_id: session.id.to_string(),
        });
        request.set_timeout(self.limits.stop);
        match tokio::time::timeout(self.limits.stop, node.stop_session(request)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(status)) => {
                tracing::warn!(session_id = session.id.short(), %status, "a stop failed; it will be repeated");
                Err(unreachable())
            }
            Err(_) => Err(unreachable()),
        }
    }

    async fn node_client(
        &self,
        session: &Session,
    ) -> Result<
        Option<proto::node::v1::node_service_client::NodeServiceClient<MeshChannel>>,
        SessionError,
    > {
        let address = self.nodes.internal_address(&session.node_id).await?;
        Ok(address.and_then(|address| self.nodes.client(&address)))
    }

    /// Notes that a session broke.
    pub async fn fail(&self, session: Session, end: EndReason) -> Result<Session, SessionError> {
        let event = NewEvent::new("FAILED", format!("node:{}", session.node_id))
            .because(&*end.reason, &*end.message);
        self.end(session, Happening::Broke, event, end).await
    }

    /// Notes that a session's node is gone.
    pub async fn lose(
        &self,
        session: Session,
        end: EndReason,
        actor: &str,
    ) -> Result<Session, SessionError> {
        let event = NewEvent::new("LOST", actor).because(&*end.reason, &*end.message);
        self.end(session, Happening::NodeGone, event, end).await
    }

    async fn end(
        &self,
        session: Session,
        happening: Happening,
        event: NewEvent,
        end: EndReason,
    ) -> Result<Session, SessionError> {
        self.change(session, happening, event, |session, now| {
            session.end_time = Some(now);
            session.end_reason.get_or_insert(end);
            session.lease_until = None;
        })
        .await
    }

    /// Moves a session on as `decide` says, against the newest state of it: whoever changed it meanwhile is heard first.
    async fn change(
        &self,
        mut session: Session,
        happening: Happening,
        event: NewEvent,
        edit: impl FnOnce(&mut Session, Micros) + Clone,
    ) -> Result<Session, SessionError> {
        for _ in 0..UPDATE_TRIES {
            let step = decide(session.state, happening).map_err(|_| SessionError::WrongState {
                id: session.id.clone(),
                state: session.state,
            })?;
            let Step::Move(state) = step else {
                return Ok(session);
            };
            let mut changed = Session {
                state,
                version: session.version + 1,
                ..session.clone()
            };
            edit.clone()(&mut changed, Micros::now());
            if self.store.update(&changed, &event).await? {
                self.changes.tell();
                return Ok(changed);
            }
            let id = session.id;
            session = self
                .store
                .get(&id)
                .await?
                .ok_or(SessionError::Unknown(id))?;
        }
        Err(SessionError::Contended(session.id))
    }

    /// Changes what may change while a session lives, without changing its state.
    pub async fn edit(
        &self,
        caller: &Caller,
        id: &SessionId,
        kind: &'static str,
        edit: impl Fn(&mut Session, Micros),
    ) -> Result<Session, SessionError> {
        for _ in 0..UPDATE_TRIES {
            let session = self.get(caller, id).await?;
            if session.state.is_final() || session.state == State::Stopping {
                return Err(SessionError::WrongState {
                    id: id.clone(),
                    state: session.state,
                });
            }
            let mut changed = Session {
                version: session.version + 1,
                ..session
            };
            edit(&mut changed, Micros::now());
            let event = NewEvent::new(kind, format!("team:{}", caller.team));
            if self.store.update(&changed, &event).await? {
                self.changes.tell();
                return Ok(changed);
            }
        }
        Err(SessionError::Contended(id.clone()))
    }

    /// Tells the node of a session what changed about its network.
    pub async fn push_network(&self, session: &Session) -> Result<(), SessionError> {
        let unreachable = || SessionError::NodeUnreachable {
            id: session.id.clone(),
        };
        let mut node = self.node_client(session).await?.ok_or_else(unreachable)?;
        let request = proto::node::v1::UpdateSessionRequest {
            session_id: session.id.to_string(),
            network: Some(session.network()),
        };
        let mut request = Request::new(request);
        request.set_timeout(self.limits.stop);
        node.update_session(request)
            .await
            .map_err(|_| unreachable())?;
        Ok(())
    }

    /// A session of the caller's team; another team's looks unknown.
    pub async fn get(&self, caller: &Caller, id: &SessionId) -> Result<Session, SessionError> {
        let session = self
            .store
            .get(id)
            .await?
            .filter(|session| session.team == caller.team);
        session.ok_or_else(|| SessionError::Unknown(id.clone()))
    }

    /// A page of sessions, newest first.
    pub async fn list(&self, filter: &Filter) -> Result<Vec<Session>, SessionError> {
        Ok(self.store.list(filter).await?)
    }

    /// Waits until a session that another request started runs.
    async fn started(&self, mut session: Session) -> Result<Session, SessionError> {
        let mut listener = self.changes.listen();
        let waiting = async {
            while matches!(session.state, State::Pending | State::Starting) {
                listener.heard().await;
                let id = session.id.clone();
                // Its ID may have changed with its node; its request ID has not.
                session = match (&session.request_id, self.store.get(&id).await?) {
                    (_, Some(found)) => found,
                    (Some(request), None) => self
                        .store
                        .by_request(&session.team, request)
                        .await?
                        .ok_or(SessionError::Unknown(id))?,
                    (None, None) => return Err(SessionError::Unknown(id)),
                };
            }
            Ok(session.clone())
        };
        match tokio::time::timeout(self.limits.start + LEASE_MARGIN, waiting).await {
            Ok(found) => Self::only_running(found?),
            Err(_) => Err(SessionError::StillStarting(session.id)),
        }
    }

    fn only_running(session: Session) -> Result<Session, SessionError> {
        match (session.state, session.end_reason.clone()) {
            (State::Failed | State::Lost, Some(end)) => Err(SessionError::DidNotStart {
                id: session.id,
                end,
            }),
            _ => Ok(session),
        }
    }

    async fn template(&self, caller: &Caller, name: &str) -> Result<Arc<Template>, SessionError> {
        let key = (caller.team.clone(), name.to_owned());
        if let Some(template) = self.template_cache.get(&key).await {
            return Ok(template);
        }
        let mut request = Request::new(GetTemplateRequest {
            template: name.to_owned(),
        });
        caller.apply(request.metadata_mut());
        request.set_timeout(Duration::from_secs(3));
        let answer = self
            .templates
            .clone()
            .get_template(request)
            .await
            .map_err(SessionError::Template)?;
        let template = Arc::new(answer.into_inner().template.unwrap_or_default());
        self.template_cache.insert(key, Arc::clone(&template)).await;
        Ok(template)
    }

    fn sized(
        &self,
        asked: wire::Resources,
        template: &Template,
    ) -> Result<wire::Resources, SessionError> {
        const MIB: u64 = 1 << 20;
        let or = |asked: u64, default: u64| if asked == 0 { default } else { asked };
        let resources = wire::Resources {
            vcpus: if asked.vcpus == 0 {
                template.default_vcpus
            } else {
                asked.vcpus
            },
            memory_bytes: or(asked.memory_bytes, template.default_memory_bytes)
                .div_ceil(MIB)
                .saturating_mul(MIB),
            disk_bytes: or(asked.disk_bytes, template.default_disk_bytes)
                .div_ceil(MIB)
                .saturating_mul(MIB),
        };
        let invalid =
            |field, description: String| Err(SessionError::Invalid { field, description });
        if resources.memory_bytes > self.limits.max_memory {
            return invalid(
                "resources.memory_bytes",
                format!("must be at most {}", self.limits.max_memory),
            );
        }
        if !(1..=64).contains(&resources.vcpus) {
            return invalid("resources.vcpus", "must be from 1 to 64".into());
        }
        Ok(resources)
    }
}
