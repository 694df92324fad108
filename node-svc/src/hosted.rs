//! The sessions of this node: who is here, in which phase, and how to reach them. Admission is decided here.

use std::{
    collections::{HashMap, VecDeque},
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use proto::{
    node::v1::{Capacity, HostedSession},
    session::v1::{self as wire, PortAccess, SessionState},
};
use service_kit::ids::SessionId;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::guest::GuestClient;

/// How long a session that ended can be told from an unknown one.
const TOMBSTONE: Duration = Duration::from_hours(1);
const TOMBSTONES: usize = 100_000;

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

/// Where a session is, on this node.
#[derive(Debug, Clone)]
pub enum Phase {
    /// Its guest is being started.
    Starting,
    /// Its guest answers.
    Running(Arc<Reach>),
    /// It is being taken down.
    Stopping,
    /// Nothing of it is left.
    Ended(Ended),
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
    port_access: watch::Sender<PortAccess>,
    phase: watch::Sender<Phase>,
    /// Asks the driver to stop.
    pub stop: CancellationToken,
}

impl Session {
    /// A session about to start.
    pub fn new(
        id: SessionId,
        access_token_sha256: Vec<u8>,
        resources: wire::Resources,
        access: PortAccess,
    ) -> Self {
        Self {
            id,
            access_token_sha256,
            resources,
            port_access: watch::Sender::new(access),
            phase: watch::Sender::new(Phase::Starting),
            stop: CancellationToken::new(),
        }
    }

    /// Its phase now, and as it changes.
    pub fn phase(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    /// Moves it on; for its driver only.
    pub fn enter(&self, phase: Phase) {
        self.phase.send_replace(phase);
    }

    /// Who may reach its ports.
    pub fn port_access(&self) -> PortAccess {
        *self.port_access.borrow()
    }

    /// Changes who may reach its ports.
    pub fn set_port_access(&self, access: PortAccess) {
        self.port_access.send_replace(access);
    }

    /// Waits until it is no longer starting, for so long at most.
    pub async fn settled(&self, limit: Duration) -> Phase {
        let mut phase = self.phase();
        // When time is up the phase is what it is.
        let _ = tokio::time::timeout(
            limit,
            phase.wait_for(|phase| !matches!(phase, Phase::Starting)),
        )
        .await;
        phase.borrow().clone()
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
    was: HashMap<SessionId, Ended>,
    /// When those that were here ended, oldest first.
    graves: VecDeque<(Instant, SessionId)>,
    /// Ended by themselves and not yet known to the control plane.
    unreported: HashMap<SessionId, Ended>,
    draining: bool,
}

/// All sessions of this node.
#[derive(Debug)]
pub struct Hosted {
    total: Capacity,
    table: Mutex<Table>,
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
    pub fn admit(&self, session: Session) -> Result<Admitted, NodeFull> {
        let mut table = self.table();
        if let Some(here) = table.here.get(&session.id) {
            return Ok(Admitted::Here(Arc::clone(here)));
        }
        let used = table.used;
        let full = NodeFull {
            free_sessions: self.total.sessions.saturating_sub(used.sessions),
            free_memory: self.total.memory_bytes.saturating_sub(used.memory_bytes),
            free_vcpus: self.total.vcpus.saturating_sub(used.vcpus),
            free_disk: self.total.disk_bytes.saturating_sub(used.disk_bytes),
        };
        let need = session.resources;
        let fits = !table.draining
            && full.free_sessions >= 1
            && full.free_memory >= need.memory_bytes
            && full.free_vcpus >= need.vcpus
            && full.free_disk >= need.disk_bytes;
        if !fits {
            return Err(full);
        }
        let session = Arc::new(session);
        table.used.sessions += 1;
        table.used.memory_bytes += need.memory_bytes;
        table.used.vcpus += need.vcpus;
        table.used.disk_bytes += need.disk_bytes;
        table.here.insert(session.id.clone(), Arc::clone(&session));
        Ok(Admitted::New(session))
    }

    /// Notes that nothing of a session is left. `report` tells the control plane of an end it did not ask for.
    pub fn bury(&self, session: &Session, ended: Ended, report: bool) {
        {
            let mut table = self.table();
            if let Some(gone) = table.here.remove(&session.id) {
                let gone = gone.resources;
                table.used.sessions -= 1;
                table.used.memory_bytes -= gone.memory_bytes;
                table.used.vcpus -= gone.vcpus;
                table.used.disk_bytes -= gone.disk_bytes;
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

    /// All that are here.
    pub fn all(&self) -> Vec<Arc<Session>> {
        self.table().here.values().cloned().collect()
    }

    /// As the registry wants to hear it.
    pub fn listing(&self) -> Vec<HostedSession> {
        self.table()
            .here
            .values()
            .map(|session| hosted(session))
            .collect()
    }

    /// Ends the control plane does not know of.
    pub fn unreported(&self) -> Vec<HostedSession> {
        let table = self.table();
        let ended = |(id, ended): (&SessionId, &Ended)| HostedSession {
            session_id: id.to_string(),
            state: ended.state.into(),
            end_reason: Some(wire::EndReason {
                reason: ended.reason.clone(),
                message: ended.message.clone(),
            }),
            resources: None,
            stored_bytes: 0,
        };
        table.unreported.iter().map(ended).collect()
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

fn hosted(session: &Session) -> HostedSession {
    let state = match &*session.phase.borrow() {
        Phase::Starting => SessionState::Starting,
        Phase::Running(_) => SessionState::Running,
        Phase::Stopping => SessionState::Stopping,
        Phase::Ended(ended) => ended.state,
    };
    HostedSession {
        session_id: session.id.to_string(),
        state: state.into(),
        end_reason: None,
        resources: Some(session.resources),
        stored_bytes: 0,
    }
}

#[cfg(test)]
mod tests {
    use service_kit::ids::HomeTag;

    use super::*;

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
            PortAccess::Public,
        )
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
        let again = Session::new(id.clone(), vec![], first.resources, PortAccess::Public);
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
        hosted.acknowledged(&[id.to_string()]);
        assert!(hosted.unreported().is_empty());
    }

    #[test]
    fn a_draining_node_takes_nothing() {
        let hosted = hosted();
        hosted.set_draining(true);
        assert!(hosted.admit(session(1)).is_err());
    }
}
