//! The sessions of this node: who is here, in which phase, and how to reach them. Admission is decided here.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    net::IpAddr,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use proto::{
    node::v1::{Capacity, HostedSession, SessionNotice},
    session::v1::{self as wire, PortAccess, SessionState},
};
use service_kit::ids::SessionId;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::{driver::Command, guest::GuestClient};

/// How long a session that ended can be told from an unknown one.
const TOMBSTONE: Duration = Duration::from_hours(1);
const TOMBSTONES: usize = 100_000;
/// Commands that wait for a session's driver.
const COMMANDS: usize = 32;
/// Notices that wait for the registry.
const NOTICES: usize = 1000;

/// Why a session ended here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// Stopped as asked, or Failed.
    pub state: SessionState,
    /// Stable word.
    pub reason: String,
    /// One sentence for people.
    pub message: String,
}

impl Ended {
    /// As the registry wants to hear it.
    pub fn wire(&self, id: &SessionId) -> HostedSession {
        HostedSession {
            session_id: id.to_string(),
            state: self.state.into(),
            end_reason: Some(wire::EndReason {
                reason: self.reason.clone(),
                message: self.message.clone(),
            }),
            ..HostedSession::default()
        }
    }
}

/// Where a session is, on this node.
#[derive(Debug, Clone)]
pub enum Phase {
    /// Its guest is being started.
    Starting,
    /// An earlier node-svc left it running; it is being taken over.
    Adopting,
    /// Its guest answers.
    Running(Arc<Reach>),
    /// It stands still for a moment, while it is copied or put back; callers wait.
    Held,
    /// It is being stored.
    Pausing,
    /// It is stored, and nothing of it runs.
    Paused,
    /// It is being continued from what was stored.
    Resuming,
    /// It is being taken down.
    Stopping,
    /// Nothing of it is left.
    Ended(Ended),
}

impl Phase {
    /// Whether it passes by itself and soon.
    fn is_passing(&self) -> bool {
        matches!(
            self,
            Self::Starting | Self::Adopting | Self::Held | Self::Pausing | Self::Resuming
        )
    }

    fn state(&self) -> SessionState {
        match self {
            Self::Starting => SessionState::Starting,
            Self::Adopting | Self::Running(_) | Self::Held => SessionState::Running,
            Self::Pausing => SessionState::Pausing,
            Self::Paused => SessionState::Paused,
            Self::Resuming => SessionState::Resuming,
            Self::Stopping => SessionState::Stopping,
            Self::Ended(ended) => ended.state,
        }
    }
}

/// Why a guest is not reached any more by the way it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Over {
    /// The session ends.
    Ended,
    /// It is paused.
    Paused,
    /// It went back to a checkpoint.
    RolledBack,
}

/// The envd of a session's guest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Envd {
    /// The first digits of its digest; empty if not known.
    pub digest: String,
    /// Whether guests that boot now get another.
    pub is_outdated: bool,
}

/// How a running session is reached.
#[derive(Debug)]
pub struct Reach {
    /// envd.
    pub guest: GuestClient,
    /// The guest's address, where it has a network.
    pub address: Option<IpAddr>,
    /// Cancelled when the session leaves Running.
    pub over: CancellationToken,
    why: OnceLock<Over>,
    silent: AtomicBool,
}

impl Reach {
    /// A way to a guest; `over` also ends the connection to it.
    pub fn new(guest: GuestClient, address: Option<IpAddr>, over: CancellationToken) -> Self {
        Self {
            guest,
            address,
            over,
            why: OnceLock::new(),
            silent: AtomicBool::new(false),
        }
    }

    /// Whether envd has not answered for a while.
    pub fn is_silent(&self) -> bool {
        self.silent.load(Ordering::Relaxed)
    }

    /// Notes whether envd answers; what was noted before.
    pub fn set_silent(&self, is_silent: bool) -> bool {
        self.silent.swap(is_silent, Ordering::Relaxed)
    }

    /// Ends it, and whatever is under way by it. The first reason counts.
    pub fn end(&self, why: Over) {
        // One that is set already stays.
        let _ = self.why.set(why);
        self.over.cancel();
    }

    /// Why it ended.
    pub fn why(&self) -> Over {
        self.why.get().copied().unwrap_or(Over::Ended)
    }
}

/// What may change while a session lives, as far as its node needs it at every request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Who may reach its ports.
    pub port_access: PortAccess,
    /// Whether a request to it, while paused, wakes it.
    pub wake_on_request: bool,
}

/// One session on this node.
#[derive(Debug)]
pub struct Session {
    /// Which.
    pub id: SessionId,
    /// SHA-256 of its access token.
    pub access_token_sha256: Vec<u8>,
    /// What it takes.
    pub resources: wire::Resources,
    settings: watch::Sender<Settings>,
    phase: watch::Sender<Phase>,
    stored_bytes: AtomicU64,
    commands: mpsc::Sender<Command>,
    /// Asks the driver to stop.
    pub stop: CancellationToken,
    /// Held by whoever asks for it to be woken, so that many ask once.
    pub waking: tokio::sync::Mutex<()>,
    /// Its node's; whoever watches all sessions hears of this one.
    changed: watch::Sender<()>,
    envd: OnceLock<Envd>,
}

impl Session {
    /// A session about to start, and what its driver is to hear.
    pub fn new(
        id: SessionId,
        access_token_sha256: Vec<u8>,
        resources: wire::Resources,
        settings: Settings,
    ) -> (Self, mpsc::Receiver<Command>) {
        let (commands, heard) = mpsc::channel(COMMANDS);
        let session = Self {
            id,
            access_token_sha256,
            resources,
            settings: watch::Sender::new(settings),
            phase: watch::Sender::new(Phase::Starting),
            stored_bytes: AtomicU64::new(0),
            commands,
            stop: CancellationToken::new(),
            waking: tokio::sync::Mutex::new(()),
            changed: watch::Sender::default(),
            envd: OnceLock::new(),
        };
        (session, heard)
    }

    /// Its phase now, and as it changes.
    pub fn phase(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    /// Moves it on; for its driver only.
    pub fn enter(&self, phase: Phase) {
        self.phase.send_replace(phase);
        self.changed.send_replace(());
    }

    /// What may change of it.
    pub fn settings(&self) -> Settings {
        *self.settings.borrow()
    }

    /// Changes what may change of it; for its driver only.
    pub fn set(&self, settings: Settings) {
        self.settings.send_replace(settings);
    }

    /// Who may reach its ports.
    pub fn port_access(&self) -> PortAccess {
        self.settings().port_access
    }

    /// Says which envd its guest has, once; for its driver only.
    pub fn set_envd(&self, envd: Envd) {
        // It is the same for as long as the session lives.
        let _ = self.envd.set(envd);
    }

    /// Notes what its stored state takes, in bytes.
    pub fn set_stored_bytes(&self, bytes: u64) {
        self.stored_bytes.store(bytes, Ordering::Relaxed);
    }

    /// What its stored state takes while it is paused, in bytes.
    pub fn stored_bytes(&self) -> u64 {
        self.stored_bytes.load(Ordering::Relaxed)
    }

    /// Asks its driver for something and waits for the answer; `None` if the session ends instead.
    pub async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.ok()?;
        answer.await.ok()
    }

    /// Waits until it is in a phase that lasts, for so long at most.
    pub async fn settled(&self, limit: Duration) -> Phase {
        let mut phase = self.phase();
        // When time is up the phase is what it is.
        let _ = tokio::time::timeout(limit, phase.wait_for(|phase| !phase.is_passing())).await;
        phase.borrow().clone()
    }

    /// As the registry wants to hear it.
    pub fn wire(&self) -> HostedSession {
        let state = self.phase.borrow().state();
        let envd = self.envd.get().cloned().unwrap_or_default();
        HostedSession {
            session_id: self.id.to_string(),
            state: state.into(),
            end_reason: None,
            resources: Some(self.resources),
            stored_bytes: self.stored_bytes(),
            envd: envd.digest,
            envd_outdated: envd.is_outdated,
        }
    }

    /// Waits until nothing of it is left.
    pub async fn ended(&self) {
        let mut phase = self.phase();
        // The sender lives in `self`, so the wait does not fail.
        let _ = phase
            .wait_for(|phase| matches!(phase, Phase::Ended(_)))
            .await;
    }
}

/// What a look-up finds.
#[derive(Debug, Clone)]
pub enum Lookup {
    /// It is here.
    Here(Arc<Session>),
    /// It was here.
    Was(Ended),
    /// Never heard of.
    Unknown,
}

/// A node that has no room.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "this node has no room: {free_sessions} sessions, {free_memory} bytes of memory, {free_vcpus} vCPUs and {free_disk} bytes of disk are free"
)]
pub struct NodeFull {
    /// Sessions left.
    pub free_sessions: u32,
    /// Memory left, in bytes.
    pub free_memory: u64,
    /// Virtual CPUs left.
    pub free_vcpus: u32,
    /// Disk left, in bytes.
    pub free_disk: u64,
}

#[derive(Debug, Default)]
struct Table {
    here: HashMap<SessionId, Arc<Session>>,
    /// What all that are here take.
    used: Capacity,
    /// Those that are paused.
    parked: HashSet<SessionId>,
    was: HashMap<SessionId, Ended>,
    /// When those that were here ended, oldest first.
    graves: VecDeque<(Instant, SessionId)>,
    /// Ended by themselves and not yet known to the control plane.
    unreported: HashMap<SessionId, Ended>,
    notices: VecDeque<SessionNotice>,
    draining: bool,
}

/// All sessions of this node.
#[derive(Debug)]
pub struct Hosted {
    total: Capacity,
    table: Mutex<Table>,
    /// Changes with each change of what is here.
    changed: watch::Sender<()>,
}

/// What a request to host a session leads to.
#[derive(Debug)]
pub enum Admitted {
    /// It is new: its driver must be started.
    New(Arc<Session>),
    /// It is here already.
    Here(Arc<Session>),
}

impl Hosted {
    /// Nothing yet, with room for `total`.
    pub fn new(total: Capacity) -> Self {
        Self {
            total,
            table: Mutex::default(),
            changed: watch::Sender::default(),
        }
    }

    fn table(&self) -> std::sync::MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds a session.
    pub fn lookup(&self, id: &SessionId) -> Lookup {
        let table = self.table();
        if let Some(session) = table.here.get(id) {
            return Lookup::Here(Arc::clone(session));
        }
        match table.was.get(id) {
            Some(ended) => Lookup::Was(ended.clone()),
            None => Lookup::Unknown,
        }
    }

    /// Takes a session in if there is room; the same ID twice is one session.
    pub fn admit(&self, mut session: Session) -> Result<Admitted, NodeFull> {
        let mut table = self.table();
        if let Some(here) = table.here.get(&session.id) {
            return Ok(Admitted::Here(Arc::clone(here)));
        }
        if table.draining {
            return Err(self.free(&table));
        }
        self.take(&mut table, &whole(&session))?;
        session.changed = self.changed.clone();
        let session = Arc::new(session);
        table.here.insert(session.id.clone(), Arc::clone(&session));
        self.changed.send_replace(());
        Ok(Admitted::New(session))
    }

    /// Room for a guest that is no session's, until it is given back.
    pub fn reserve(
        self: &Arc<Self>,
        size: proto::session::v1::Resources,
    ) -> Result<Reserved, NodeFull> {
        let need = Capacity {
            sessions: 1,
            memory_bytes: size.memory_bytes,
            vcpus: size.vcpus,
            disk_bytes: size.disk_bytes,
        };
        let mut table = self.table();
        if table.draining {
            return Err(self.free(&table));
        }
        self.take(&mut table, &need)?;
        Ok(Reserved {
            hosted: Arc::clone(self),
            need,
        })
    }

    /// Takes in a session that was here before this node-svc, whether there is room or not.
    pub fn adopt(&self, mut session: Session, is_paused: bool) -> Arc<Session> {
        let mut table = self.table();
        session.changed = self.changed.clone();
        let takes = if is_paused {
            parked(&session)
        } else {
            whole(&session)
        };
        add(&mut table.used, &takes);
        if is_paused {
            table.parked.insert(session.id.clone());
        }
        let session = Arc::new(session);
        table.here.insert(session.id.clone(), Arc::clone(&session));
        session
    }

    /// A session is paused: it takes its disk and nothing more.
    pub fn park(&self, session: &Session) {
        let mut table = self.table();
        if table.parked.insert(session.id.clone()) {
            subtract(&mut table.used, &whole(session));
            add(&mut table.used, &parked(session));
        }
    }

    /// A paused session is to run again, if there is room.
    pub fn unpark(&self, session: &Session) -> Result<(), NodeFull> {
        let mut table = self.table();
        if !table.parked.contains(&session.id) {
            return Ok(());
        }
        let mut more = whole(session);
        subtract(&mut more, &parked(session));
        self.take(&mut table, &more)?;
        table.parked.remove(&session.id);
        Ok(())
    }

    fn free(&self, table: &Table) -> NodeFull {
        let used = table.used;
        NodeFull {
            free_sessions: self.total.sessions.saturating_sub(used.sessions),
            free_memory: self.total.memory_bytes.saturating_sub(used.memory_bytes),
            free_vcpus: self.total.vcpus.saturating_sub(used.vcpus),
            free_disk: self.total.disk_bytes.saturating_sub(used.disk_bytes),
        }
    }

    fn take(&self, table: &mut Table, need: &Capacity) -> Result<(), NodeFull> {
        let full = self.free(table);
        let fits = full.free_sessions >= need.sessions
            && full.free_memory >= need.memory_bytes
            && full.free_vcpus >= need.vcpus
            && full.free_disk >= need.disk_bytes;
        if !fits {
            return Err(full);
        }
        add(&mut table.used, need);
        Ok(())
    }

    /// Notes that nothing of a session is left. `report` tells the control plane of an end it did not ask for.
    pub fn bury(&self, session: &Session, ended: Ended, report: bool) {
        {
            let mut table = self.table();
            if let Some(gone) = table.here.remove(&session.id) {
                let took = if table.parked.remove(&session.id) {
                    parked(&gone)
                } else {
                    whole(&gone)
                };
                subtract(&mut table.used, &took);
            }
            while let Some((ended, _)) = table.graves.front()
                && (table.graves.len() >= TOMBSTONES || ended.elapsed() >= TOMBSTONE)
                && let Some((_, id)) = table.graves.pop_front()
            {
                table.was.remove(&id);
            }
            table.was.insert(session.id.clone(), ended.clone());
            table.graves.push_back((Instant::now(), session.id.clone()));
            if report {
                table.unreported.insert(session.id.clone(), ended.clone());
            }
        }
        session.enter(Phase::Ended(ended));
    }

    /// Hears when what is here has changed.
    pub fn changed(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Keeps notices for the registry.
    pub fn notify(&self, notices: Vec<SessionNotice>) {
        let mut table = self.table();
        for notice in notices {
            if table.notices.len() == NOTICES {
                metrics::counter!("sandmesh_node_notices_dropped_total").increment(1);
            } else {
                table.notices.push_back(notice);
            }
        }
    }

    /// What the registry has not noted yet, oldest first.
    pub fn notices(&self) -> Vec<SessionNotice> {
        self.table().notices.iter().cloned().collect()
    }

    /// The registry has noted so many of the oldest.
    pub fn noted(&self, count: usize) {
        let mut table = self.table();
        let count = count.min(table.notices.len());
        table.notices.drain(..count);
    }

    /// All that are here.
    pub fn all(&self) -> Vec<Arc<Session>> {
        self.table().here.values().cloned().collect()
    }

    /// As the registry wants to hear it: all that are here, and the ends it does not know of. By the same look, so that none is in neither.
    pub fn listing(&self) -> Vec<HostedSession> {
        let table = self.table();
        let here = table.here.values().map(|session| session.wire());
        let ended = table.unreported.iter().map(|(id, ended)| ended.wire(id));
        here.chain(ended).collect()
    }

    /// Ends the control plane does not know of.
    pub fn unreported(&self) -> Vec<HostedSession> {
        let table = self.table();
        let unreported = table.unreported.iter();
        unreported.map(|(id, ended)| ended.wire(id)).collect()
    }

    /// The control plane knows of these ends.
    pub fn acknowledged(&self, ids: &[String]) {
        let mut table = self.table();
        table
            .unreported
            .retain(|id, _| !ids.iter().any(|known| known == id.as_str()));
    }

    /// What is given out.
    pub fn used(&self) -> Capacity {
        self.table().used
    }

    /// What there is.
    pub fn total(&self) -> Capacity {
        self.total
    }

    /// Takes no new sessions, or takes them again.
    pub fn set_draining(&self, draining: bool) {
        self.table().draining = draining;
    }

    /// Whether it takes no new sessions.
    pub fn draining(&self) -> bool {
        self.table().draining
    }
}

/// What a session takes that runs, or may at any moment.
fn whole(session: &Session) -> Capacity {
    Capacity {
        sessions: 1,
        memory_bytes: session.resources.memory_bytes,
        vcpus: session.resources.vcpus,
        disk_bytes: session.resources.disk_bytes,
    }
}

/// Room that is given back when this is dropped.
#[derive(Debug)]
pub struct Reserved {
    hosted: Arc<Hosted>,
    need: Capacity,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        subtract(&mut self.hosted.table().used, &self.need);
    }
}

/// What a paused one takes.
fn parked(session: &Session) -> Capacity {
    Capacity {
        disk_bytes: session.resources.disk_bytes,
        ..Capacity::default()
    }
}

fn add(to: &mut Capacity, more: &Capacity) {
    to.sessions += more.sessions;
    to.memory_bytes += more.memory_bytes;
    to.vcpus += more.vcpus;
    to.disk_bytes += more.disk_bytes;
}

fn subtract(from: &mut Capacity, less: &Capacity) {
    from.sessions = from.sessions.saturating_sub(less.sessions);
    from.memory_bytes = from.memory_bytes.saturating_sub(less.memory_bytes);
    from.vcpus = from.vcpus.saturating_sub(less.vcpus);
    from.disk_bytes = from.disk_bytes.saturating_sub(less.disk_bytes);
}

#[cfg(test)]
mod tests {
    use service_kit::ids::HomeTag;

    use super::*;

    const SETTINGS: Settings = Settings {
        port_access: PortAccess::Public,
        wake_on_request: false,
    };

    fn session(memory_bytes: u64) -> Session {
        let resources = wire::Resources {
            vcpus: 1,
            memory_bytes,
            disk_bytes: 1,
        };
        Session::new(
            SessionId::random(&HomeTag::random()),
            vec![0; 32],
            resources,
            SETTINGS,
        )
        .0
    }

    fn hosted() -> Hosted {
        Hosted::new(Capacity {
            sessions: 2,
            memory_bytes: 100,
            vcpus: 8,
            disk_bytes: 100,
        })
    }

    #[test]
    fn what_does_not_fit_is_refused_with_what_is_free() {
        let hosted = hosted();
        assert!(matches!(hosted.admit(session(60)), Ok(Admitted::New(_))));
        let refused = hosted.admit(session(60)).unwrap_err();
        assert_eq!(
            (
                refused.free_sessions,
                refused.free_memory,
                refused.free_vcpus
            ),
            (1, 40, 7)
        );
        assert!(matches!(hosted.admit(session(40)), Ok(Admitted::New(_))));
        assert_eq!(hosted.admit(session(0)).unwrap_err().free_sessions, 0);
    }

    #[test]
    fn the_same_id_is_one_session_and_its_end_is_remembered() {
        let hosted = hosted();
        let first = session(10);
        let id = first.id.clone();
        let Ok(Admitted::New(first)) = hosted.admit(first) else {
            panic!()
        };
        let again = Session::new(id.clone(), vec![], first.resources, SETTINGS).0;
        assert!(matches!(hosted.admit(again), Ok(Admitted::Here(_))));
        let ended = Ended {
            state: SessionState::Failed,
            reason: "X".into(),
            message: String::new(),
        };
        hosted.bury(&first, ended.clone(), true);
        assert!(matches!(hosted.lookup(&id), Lookup::Was(was) if was == ended));
        assert_eq!(hosted.used(), Capacity::default());
        assert_eq!(hosted.unreported().len(), 1);
        // An audit that asks meanwhile must not take it for one that was never here.
        assert_eq!(hosted.listing(), [ended.wire(&id)]);
        hosted.acknowledged(&[id.to_string()]);
        assert!(hosted.unreported().is_empty() && hosted.listing().is_empty());
    }

    #[test]
    fn a_draining_node_takes_nothing() {
        let hosted = hosted();
        hosted.set_draining(true);
        assert!(hosted.admit(session(1)).is_err());
    }

    #[test]
    fn a_paused_session_takes_its_disk_only_and_comes_back_if_there_is_room() {
        let hosted = hosted();
        let Ok(Admitted::New(first)) = hosted.admit(session(60)) else {
            panic!()
        };
        hosted.park(&first);
        hosted.park(&first);
        assert_eq!(
            hosted.used(),
            Capacity {
                disk_bytes: 1,
                ..Capacity::default()
            }
        );
        let Ok(Admitted::New(second)) = hosted.admit(session(60)) else {
            panic!()
        };
        assert_eq!(hosted.unpark(&first).unwrap_err().free_memory, 40);
        hosted.park(&second);
        hosted.unpark(&first).unwrap();
        hosted.unpark(&first).unwrap();
        assert_eq!(hosted.used().memory_bytes, 60);
        let ended = Ended {
            state: SessionState::Stopped,
            reason: "X".into(),
            message: String::new(),
        };
        hosted.bury(&second, ended.clone(), false);
        hosted.bury(&first, ended, false);
        assert_eq!(hosted.used(), Capacity::default());
    }
}
