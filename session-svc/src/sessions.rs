//! Sessions: created, found, changed and ended.
//!
//! A start ([`start`]), stop ([`stop`]), pause or resume ([`pause`]), fork ([`fork`]) or checkpoint ([`checkpoint`]) runs in a task of its own that the service joins at shutdown, so that a client which goes
//! away leaves nothing half done. The task keeps renewing a lease on the row; when its replica dies, another takes the lease over
//! ([`crate::reconcile`]) and repeats the same idempotent call to the node.

use std::time::Duration;

use proto::{node::v1::SessionNotice, session::v1 as wire, template::v1::Template};
use service_kit::{
    ids::{NodeId, SessionId},
    mesh::{Caller, MeshChannel, MeshToken},
    request_id,
};
use tokio_util::task::TaskTracker;
use tracing::Instrument as _;

use crate::{
    changes::Changes,
    errors::SessionError,
    lifecycle::{Happening, State, Step, decide},
    nodes::{Nodes, Placed},
    placement::Need,
    session::{HostPattern, Micros, Network, Session, access_token},
    store::{Filter, NewEvent, Store},
};

mod checkpoint;
mod drain;
mod fork;
mod node_call;
mod pause;
mod settings;
mod start;
mod stop;
mod template;
pub use drain::Drained;
pub use fork::{Forked, NewFork};
pub use pause::set_time_to_live;
use template::{Templates, sized};

/// How often a change is tried anew when others were faster.
const UPDATE_TRIES: usize = 8;
/// What nodes notice.
const NOTICES: [&str; 5] = [
    "MEMORY_PRESSURE",
    "OOM_KILLED",
    "GUEST_SILENT",
    "GUEST_ANSWERS",
    "ENVD_RESTARTED",
];
/// A session begins with two events.
const FIRST_VERSION: i64 = 2;

/// What a session is created from, checked.
#[derive(Debug, Clone)]
pub struct NewSession {
    /// Template as asked for.
    pub template: String,
    /// Time to live.
    pub timeout: Duration,
    /// Size; zero fields take the template's.
    pub resources: wire::Resources,
    /// How it meets the network.
    pub network: Network,
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
    /// For what stores or restores memory: pause, resume, fork, checkpoint, rollback.
    pub store: Duration,
    /// How long what is stored of a paused session is kept.
    pub paused_retention: Duration,
    /// How long after its last sign of life a replica's starts and stops are taken over.
    pub lease: Duration,
    /// Largest memory a session may ask for, in bytes.
    pub max_memory: u64,
    /// Largest disk a session may ask for, in bytes.
    pub max_disk: u64,
}

/// Sessions of all teams.
#[derive(Debug, Clone)]
pub struct Sessions {
    store: Store,
    nodes: Nodes,
    templates: Templates,
    token: MeshToken,
    changes: Changes,
    hosts: HostPattern,
    limits: Limits,
    tasks: TaskTracker,
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
        Self {
            store,
            nodes,
            templates: Templates::new(templates),
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
        let request_id = new.request_id.clone();
        let session = match self.plan(caller, new).await {
            Ok(session) => session,
            Err(away @ SessionError::Store(_)) => return Err(away),
            // What was asked for before needs no room, and no template, a second time. Looked up only now: nearly all are new.
            Err(refused) => {
                let earlier = match &request_id {
                    Some(id) => self.store.by_request(&caller.team, id).await?,
                    None => None,
                };
                return match earlier {
                    Some(earlier) => self.started(earlier).await,
                    None => Err(refused),
                };
            }
        };
        if !self.store.insert(&session, &beginning(&session)).await? {
            // Somebody else was faster with the same request ID.
            let request_id = session.request_id.as_deref().unwrap_or_default();
            let winner = self.store.by_request(&caller.team, request_id).await?;
            return self
                .started(winner.ok_or(SessionError::Contended(session.id))?)
                .await;
        }
        self.changes.tell();
        let sessions = self.clone();
        self.owned(async move { Box::pin(sessions.start(session)).await })
            .await
    }

    /// The session a request leads to, on the node it will be sent to.
    async fn plan(&self, caller: &Caller, new: NewSession) -> Result<Session, SessionError> {
        let template = self.templates.get(caller, &new.template).await?;
        let resources = sized(new.resources, &template, &self.limits)?;
        let node = match self.nodes.place(Need::of(&resources), &[]).await? {
            Placed::On(node) => node,
            Placed::Nowhere(most) => return Err(SessionError::NoCapacity { most }),
        };
        let now = Micros::now();
        Ok(Session {
            id: SessionId::random(&node.home_tag),
            team: caller.team.clone(),
            request_id: new.request_id,
            state: State::Starting,
            node_id: node.node_id,
            template: template.name.clone(),
            template_version: format!("{}@{}", template.name, template.version),
            template_spec: Template {
                // Nodes have the root packed.
                layers: Vec::new(),
                ..Template::clone(&template)
            },
            resources,
            network: new.network,
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
            lease_until: Some(now.plus(self.limits.lease)),
            version: FIRST_VERSION,
            parent: None,
            stored_bytes: 0,
            time_left: None,
            state_version: FIRST_VERSION,
            state_time: now,
            rollback: None,
            push_due: None,
            noted: 0,
        })
    }

    /// Runs work to its end even if the caller goes away meanwhile; the service joins it at shutdown.
    fn owned<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, SessionError>> + Send + 'static,
    ) -> impl Future<Output = Result<T, SessionError>> + Send {
        let request = request_id::current().unwrap_or_else(request_id::random);
        let work = request_id::scope(request, work).in_current_span();
        let task = self.tasks.spawn(work);
        async { task.await.map_err(|_| SessionError::ShuttingDown)? }
    }

    /// Works on a session while holding its lease, so that no other replica takes it for abandoned.
    async fn holding<T>(&self, session: &Session, work: impl Future<Output = T> + Send) -> T {
        tokio::select! {
            done = work => done,
            never = self.renew(session.clone()) => match never {},
        }
    }

    async fn renew(&self, mut session: Session) -> std::convert::Infallible {
        let every = self.limits.lease / 3;
        let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + every, every);
        loop {
            ticks.tick().await;
            let until = Micros::now().plus(self.limits.lease);
            match self.store.take_lease(&session, until).await {
                Ok(true) => session.lease_until = Some(until),
                // Stopped, or taken over: what comes of the work is decided by the row's version.
                Ok(false) => std::future::pending().await,
                Err(error) => {
                    tracing::warn!(session_id = session.id.short(), %error, "a lease could not be renewed");
                }
            }
        }
    }

    /// Moves a session on as `decide` says, against the newest state of it: whoever changed it meanwhile is heard first.
    async fn change(
        &self,
        session: Session,
        happening: Happening,
        event: NewEvent,
        edit: impl FnOnce(&mut Session, Micros) + Clone,
    ) -> Result<Session, SessionError> {
        let (session, _) = self
            .change_if(session, None, happening, event, edit)
            .await?;
        Ok(session)
    }

    /// As [`Self::change`], for the answer to what was begun when the session entered the state it is in here: if it has left that
    /// state since, the answer is old, and changes nothing.
    async fn answer(
        &self,
        session: Session,
        happening: Happening,
        event: NewEvent,
        edit: impl FnOnce(&mut Session, Micros) + Clone,
    ) -> Result<Session, SessionError> {
        let entered = Some(session.state_version);
        let (session, _) = self
            .change_if(session, entered, happening, event, edit)
            .await?;
        Ok(session)
    }

    /// The session as it is then, and whether this call moved it.
    async fn change_if(
        &self,
        mut session: Session,
        entered: Option<i64>,
        happening: Happening,
        event: NewEvent,
        edit: impl FnOnce(&mut Session, Micros) + Clone,
    ) -> Result<(Session, bool), SessionError> {
        for _ in 0..UPDATE_TRIES {
            if entered.is_some_and(|entered| entered != session.state_version) {
                return Ok((session, false));
            }
            let step = decide(session.state, happening).map_err(|_| SessionError::WrongState {
                id: session.id.clone(),
                state: session.state,
            })?;
            let Step::Move(state) = step else {
                return Ok((session, false));
            };
            let now = Micros::now();
            let version = session.version + 1;
            let mut changed = Session {
                state,
                version,
                state_version: version,
                state_time: now,
                ..session.clone()
            };
            edit.clone()(&mut changed, now);
            if self.store.update(&changed, &event).await? {
                self.changes.tell();
                return Ok((changed, true));
            }
            session = self.newest(session.id).await?;
        }
        Err(SessionError::Contended(session.id))
    }

    /// A session as it is now, whoever owns it.
    async fn newest(&self, id: SessionId) -> Result<Session, SessionError> {
        let found = self.store.get(&id).await?;
        found.ok_or(SessionError::Unknown(id))
    }

    /// Waits until a session is in a state of which `settled` says so.
    async fn wait_until(
        &self,
        mut session: Session,
        settled: impl Fn(State) -> bool + Send,
    ) -> Result<Session, SessionError> {
        let (id, state) = (session.id.clone(), session.state);
        let mut listener = self.changes.listen();
        let waiting = async {
            while !settled(session.state) {
                listener.heard().await;
                session = self.newest(session.id).await?;
            }
            Ok(session)
        };
        tokio::time::timeout(self.limits.store + self.limits.lease, waiting)
            .await
            .unwrap_or(Err(SessionError::StillBusy { id, state }))
    }

    /// A session once no pause, resume or rollback of it is under way.
    async fn at_rest(&self, session: Session) -> Result<Session, SessionError> {
        self.wait_until(session, |state| {
            !matches!(state, State::Pausing | State::Resuming)
        })
        .await
    }

    /// Adds an event to a session's history that changes nothing else; what has ended gets none any more.
    async fn note(&self, id: &SessionId, event: &NewEvent) -> Result<(), SessionError> {
        self.note_with(id, event, Some).await
    }

    /// The same, with what `edit` changes beside it; if it returns nothing, nothing is added.
    async fn note_with(
        &self,
        id: &SessionId,
        event: &NewEvent,
        edit: impl Fn(Session) -> Option<Session> + Send,
    ) -> Result<(), SessionError> {
        for _ in 0..UPDATE_TRIES {
            let session = self.newest(id.clone()).await?;
            if session.state.is_final() {
                return Ok(());
            }
            let Some(mut noted) = edit(session) else {
                return Ok(());
            };
            noted.version += 1;
            if self.store.update(&noted, event).await? {
                self.changes.tell();
                return Ok(());
            }
        }
        Err(SessionError::Contended(id.clone()))
    }

    /// Makes an event of what a node has to say of a session of its own, once however often it says so; what has ended gets none any more.
    pub async fn notice(&self, node: &NodeId, notice: &SessionNotice) -> Result<(), SessionError> {
        let kind = NOTICES.into_iter().find(|kind| *kind == notice.r#type);
        let (Ok(id), Some(kind)) = (SessionId::parse(&notice.session_id), kind) else {
            tracing::warn!(node_id = %node, r#type = notice.r#type, "a notice of a node is not understood");
            return Ok(());
        };
        let event = NewEvent::new(kind, format!("node:{node}")).because("", &*notice.message);
        let sequence = i64::try_from(notice.sequence).unwrap_or(i64::MAX);
        let is_new = |session: &Session| session.node_id == *node && session.noted < sequence;
        let note = |session| {
            Some(session).filter(is_new).map(|session| Session {
                noted: sequence,
                ..session
            })
        };
        match self.note_with(&id, &event, note).await {
            // It is forgotten already.
            Err(SessionError::Unknown(_)) => Ok(()),
            noted => noted,
        }
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
        match tokio::time::timeout(self.limits.start + self.limits.lease, waiting).await {
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
}

/// The first events of a session, whose version is then [`FIRST_VERSION`].
fn beginning(session: &Session) -> [NewEvent; FIRST_VERSION as usize] {
    let actor = format!("team:{}", session.team);
    [
        NewEvent::new("CREATED", &*actor),
        NewEvent::new("STARTING", actor),
    ]
}
