//! One task per session: it starts the guest, watches it, pauses and resumes it, and takes it down. Nobody else touches what belongs
//! to the session; whoever wants something of it sends a [`Command`].
//!
//! ```text
//!  Starting: template's snapshot -> slot -> disk -> restore -> configure --> Running --stop asked, VMM ended--> Stopping -> Ended
//!                                                                           |  ^   \
//!                                       freeze -> stop -> store -> publish  |  |    fork, checkpoint: the same, and it goes on
//!                                                                           v  |
//!                                                                          Paused
//! ```
//! Whatever was taken is given back in every case, in the reverse order. The journal says how far a session is before it goes on, so
//! that the next node-svc can take over from any point ([`adopt`]).

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use data_encoding::HEXLOWER;
use proto::{
    node::v1::{
        ExportSessionResponse, PauseSessionResponse, ResumeSessionResponse,
        SnapshotSessionResponse, StartSessionRequest, StartStep, UpdateSessionRequest,
    },
    session::v1::{GetSessionMetricsResponse, SessionState},
};
use service_kit::{errors::Reason, kernel_arguments::MalformedArguments};
use tempfile::TempDir;
use tokio::{
    sync::{Semaphore, mpsc, oneshot},
    task::JoinHandle,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{Instrument as _, Span};

use crate::{
    artifact::{ArtifactError, Artifacts},
    cache::Cache,
    disk::{DiskError, Disks},
    guest::{Connections, GuestClient, Identity},
    guest_image::GuestImages,
    hosted::{Ended, Hosted, NodeFull, Over, Phase, Reach, Session},
    journal::{self, Step},
    logs::{NewMessage, SessionLog, SessionLogs},
    slot::{RuleError, Slot, SlotError, SlotPool},
    snapshot::TemplateSnapshots,
    snapshot_store::SnapshotStore,
    spans,
    stored::{self, Maker, StoredError},
    vmm::{Vm, VmExit, Vmm, VmmError, memory::MemoryError},
    work,
};

mod adopt;
mod collect;
mod fork;
mod keep;
mod start;
mod start_command;
mod template;
mod warm;
mod watchdog;

pub use adopt::{Adopted, adopt_all, end_all, end_template_boots, reap, slots_in_use};
pub use fork::ForkImage;
pub(crate) use keep::settings_of;
pub use start_command::StartOutput;
pub use template::Makings;
pub use warm::{WarmPolicy, WarmPool};

/// Between a link that broke and another try.
const REACH_AGAIN: Duration = Duration::from_millis(200);
/// A guest's link is quiet when nothing has come by it for so long; it is waited for no longer than the limit.
const QUIET: Duration = Duration::from_millis(50);
const QUIET_LIMIT: Duration = Duration::from_secs(1);
/// How long what a guest has said may take to be kept when it has ended.
const COLLECTED: Duration = Duration::from_secs(2);
/// Level of envd's API without which nothing goes; raised when compatibility ends.
const OLDEST_ENVD: u32 = 1;
/// As in syslog(3).
const ERROR: u32 = 3;
const NOTICE: u32 = 5;
/// Memory of the template's snapshot, by its name in a session's folder.
const TEMPLATE_MEMORY: &str = "template-memory";
/// The template's root, likewise.
const TEMPLATE_ROOTFS: &str = "template-rootfs";
/// What a paused session is.
const PAUSED: &str = "paused";
/// Checkpoints, each a folder by its ID.
const CHECKPOINTS: &str = "checkpoints";
/// Begins names of what is being made; left behind only by a node-svc that died.
const UNFINISHED: &str = ".unfinished-";

/// What drivers work with.
#[derive(Debug)]
pub struct Workshop {
    /// Runs guests.
    pub vmm: Arc<dyn Vmm>,
    /// What stored state says of this node.
    pub maker: Maker,
    /// Network places; none where the VMM needs none.
    pub slots: Option<SlotPool>,
    /// What there is room for of templates.
    pub cache: Arc<Cache>,
    /// Template files.
    pub artifacts: Artifacts,
    /// Snapshots of templates.
    pub snapshots: TemplateSnapshots,
    /// Those that are being made.
    pub makings: Makings,
    /// Those that other nodes have made, or will want; none without an object store.
    pub store: Option<Arc<SnapshotStore>>,
    /// Initial RAM disks; none where the VMM needs none.
    pub images: Option<GuestImages>,
    /// Writable disks.
    pub disks: Disks,
    /// A folder per session.
    pub sessions: PathBuf,
    /// A folder per fork that is under way.
    pub forks: PathBuf,
    /// Guests that wait.
    pub warm: WarmPool,
    /// Guests that may boot or be restored at once.
    pub boots: Semaphore,
    /// How many that are when none is.
    pub parallel_boots: usize,
    /// From the VMM's start until the guest is configured.
    pub boot_timeout: Duration,
    /// Name servers of guests.
    pub nameservers: Vec<String>,
    /// Sessions of this node.
    pub hosted: Arc<Hosted>,
    /// What their guests say.
    pub logs: Arc<SessionLogs>,
}

/// Where a session comes from.
#[derive(Debug)]
pub enum Origin {
    /// Its template.
    Template,
    /// Another session.
    Fork(Arc<ForkImage>),
    /// An earlier node-svc.
    Earlier(journal::Entry),
}

/// What a session starts from.
#[derive(Debug)]
pub struct Plan {
    /// The request, its fields checked.
    pub request: StartSessionRequest,
    /// Where it comes from.
    pub origin: Origin,
    /// The call that asked for it.
    pub span: Span,
}

/// Where the layer of a session goes.
pub type Export = mpsc::Sender<Result<ExportSessionResponse, tonic::Status>>;

/// What came of a command.
pub type Outcome<T> = Result<T, DriveError>;

/// What a driver is asked for.
#[derive(Debug)]
pub enum Command {
    /// Store it and end its VMM.
    Pause(oneshot::Sender<Outcome<PauseSessionResponse>>),
    /// Continue it.
    Resume(oneshot::Sender<Outcome<ResumeSessionResponse>>),
    /// Make an image of it for children; also how long it stood still.
    Fork(oneshot::Sender<Outcome<(Arc<ForkImage>, Duration)>>),
    /// Keep it as it is now under this ID.
    Snapshot(String, oneshot::Sender<Outcome<SnapshotSessionResponse>>),
    /// Send what its root has that its template has not, to whoever still listens.
    Export(Export, oneshot::Sender<Outcome<()>>),
    /// Go back to what was kept under this ID.
    Rollback(String, oneshot::Sender<Outcome<()>>),
    /// Forget what was kept under this ID.
    DeleteSnapshot(String, oneshot::Sender<Outcome<()>>),
    /// Change its settings.
    Update(Box<UpdateSessionRequest>, oneshot::Sender<Outcome<()>>),
    /// Say what it uses.
    Metrics(oneshot::Sender<Outcome<Box<GetSessionMetricsResponse>>>),
}

/// Something a session needs could not be had.
#[derive(Debug, thiserror::Error)]
pub enum DriveError {
    /// A file of its template.
    #[error("{0}")]
    Artifact(#[from] ArtifactError),
    /// A network place.
    #[error("{0}")]
    Slot(#[from] SlotError),
    /// Its network rules make no sense.
    #[error("network: {0}")]
    Rules(#[from] RuleError),
    /// What its template adds to its kernel's command line.
    #[error("kernel arguments: {0}")]
    KernelArguments(#[from] MalformedArguments),
    /// A writable disk.
    #[error("{0}")]
    Disk(#[from] DiskError),
    /// The VMM.
    #[error("{0}")]
    Vmm(#[from] VmmError),
    /// The node's disk.
    #[error("the node's disk: {0}")]
    Io(#[from] io::Error),
    /// Stored state.
    #[error("{0}")]
    Stored(#[from] StoredError),
    /// The guest could not be made the session's.
    #[error("the guest could not be configured: {0}")]
    Configure(String),
    /// Its guest has an envd that this node does not know how to talk to any more.
    #[error(
        "the envd in its guest has level {0} of its API, this node needs {OLDEST_ENVD}; let a node with an older Sandmesh run it, or stop it"
    )]
    EnvdTooOld(u32),
    /// The guest did not send what was changed in it.
    #[error("the guest did not send its layer: {0}")]
    Export(String),
    /// The guest could not be made ready to be stored.
    #[error("the guest did not get ready to be stored: {0}")]
    Prepare(String),
    /// Its template's start command did not become ready.
    #[error("the template's start command is not ready: {why}; the end of its output: {output:?}")]
    StartCommand {
        /// What became of it.
        why: String,
        /// On one line.
        output: String,
    },
    /// Its template's snapshot could not be made.
    #[error("{0}")]
    Template(Arc<DriveError>),
    /// A task ended in the middle of its work.
    #[error("what makes its template's snapshot broke off")]
    BrokeOff,
    /// The guest took too long.
    #[error("the guest was not ready within {0:?}")]
    Timeout(Duration),
    /// There is no room for it to run.
    #[error("{0}")]
    Full(#[from] NodeFull),
    /// It is not in the state for it.
    #[error("the session is {0}")]
    State(&'static str),
    /// There is no such checkpoint.
    #[error("there is no checkpoint {0} of this session here")]
    CheckpointUnknown(String),
    /// It was stopped meanwhile.
    #[error("it was stopped while it started")]
    Stopped,
}

impl DriveError {
    /// Its stable word.
    pub fn reason(&self) -> Reason {
        if self.is_disk_full() {
            return Reason::NODE_DISK_FULL;
        }
        Reason::new(match self {
            Self::Template(error) => return error.reason(),
            Self::BrokeOff => "START_FAILED",
            Self::Artifact(_) => "ARTIFACT_UNAVAILABLE",
            Self::Slot(_) => "NETWORK_SLOT_FAILED",
            Self::Rules(_) | Self::KernelArguments(_) => return Reason::INVALID_ARGUMENT,
            Self::Disk(_) => "DISK_FAILED",
            Self::Stored(StoredError::Damaged(_))
            | Self::Vmm(VmmError::Memory(MemoryError::Damaged(_)) | VmmError::Load(_)) => {
                "SNAPSHOT_DAMAGED"
            }
            Self::Vmm(_) => "VMM_FAILED",
            Self::Io(_) | Self::Stored(StoredError::Io(_)) => "NODE_DISK_FAILED",
            Self::Stored(StoredError::Incompatible { .. }) => "SNAPSHOT_INCOMPATIBLE",
            Self::Configure(_) => "CONFIGURE_FAILED",
            Self::EnvdTooOld(_) => "ENVD_TOO_OLD",
            Self::Prepare(_) => "GUEST_NOT_READY",
            Self::Export(_) => "EXPORT_FAILED",
            Self::StartCommand { .. } => "START_COMMAND_FAILED",
            Self::Timeout(_) => "START_TIMEOUT",
            Self::Full(_) => return Reason::NODE_FULL,
            Self::State("paused") => return Reason::SESSION_PAUSED,
            Self::State(_) => return Reason::WRONG_STATE,
            Self::CheckpointUnknown(_) => "CHECKPOINT_UNKNOWN",
            Self::Stopped => "STOP_REQUESTED",
        })
    }

    fn is_disk_full(&self) -> bool {
        let full = |error: &io::Error| error.kind() == io::ErrorKind::StorageFull;
        match self {
            Self::Disk(DiskError::Io(error))
            | Self::Artifact(ArtifactError::Disk(error))
            | Self::Io(error)
            | Self::Stored(StoredError::Io(error)) => full(error),
            Self::Vmm(error) => error.is_disk_full(),
            Self::Template(error) => error.is_disk_full(),
            _ => false,
        }
    }
}

/// How long each part of something took.
struct Stopwatch(Instant, Vec<StartStep>);

impl Stopwatch {
    fn new() -> Self {
        Self(Instant::now(), Vec::new())
    }

    fn lap(&mut self, name: &str) {
        let elapsed = prost_types::Duration::try_from(self.0.elapsed()).ok();
        metrics::histogram!("sandmesh_node_start_step_seconds", "step" => name.to_owned())
            .record(self.0.elapsed().as_secs_f64());
        self.1.push(StartStep {
            name: name.to_owned(),
            elapsed,
        });
        self.0 = Instant::now();
    }

    /// What was done, and how long the step that came next has taken.
    fn so_far(&self) -> String {
        let word = |step: &StartStep| {
            let elapsed = step
                .elapsed
                .and_then(|elapsed| Duration::try_from(elapsed).ok());
            format!(
                "{} {:.3}",
                step.name,
                elapsed.unwrap_or_default().as_secs_f64()
            )
        };
        let mut words: Vec<String> = self.1.iter().map(word).collect();
        words.push(format!("then {:.3}", self.0.elapsed().as_secs_f64()));
        words.join(", ")
    }
}

/// Drives one session; all it has taken is in here.
struct Driver {
    shop: Arc<Workshop>,
    session: Arc<Session>,
    request: StartSessionRequest,
    entry: journal::Entry,
    folder: PathBuf,
    slot: Option<Slot>,
    vm: Option<Box<dyn Vm>>,
    /// The way to the guest while it runs.
    reach: Option<Arc<Reach>>,
    log: Arc<SessionLog>,
    /// Fills the log while there is a way to the guest.
    collector: Option<JoinHandle<()>>,
    /// How often envd had been started again, when the guest was configured last.
    envd_restarts: u32,
    /// When that was told last.
    last_restart: Option<Instant>,
}

/// Something a driver has to do.
enum Event {
    Command(Command),
    Exit(VmExit),
    LinkLost,
}

impl Workshop {
    /// Drives a session from its start to its end. `steps` hears how the start went.
    pub async fn drive(
        self: Arc<Self>,
        session: Arc<Session>,
        mut commands: mpsc::Receiver<Command>,
        plan: Plan,
        steps: oneshot::Sender<Vec<StartStep>>,
    ) {
        let mut driver = Driver {
            folder: self.sessions.join(session.id.as_str()),
            entry: journal::Entry {
                session_id: session.id.to_string(),
                machine_id: HEXLOWER.encode(&rand::random::<[u8; 16]>()),
                ..journal::Entry::default()
            },
            shop: Arc::clone(&self),
            session: Arc::clone(&session),
            request: plan.request,
            slot: None,
            vm: None,
            reach: None,
            log: self.logs.begin(&session.id),
            collector: None,
            envd_restarts: 0,
            last_restart: None,
        };
        let was_here = matches!(plan.origin, Origin::Earlier(_));
        let work = TaskTracker::new();
        let started = tokio::select! {
            started = work::tracked(work.clone(), driver.begin(plan.origin)).instrument(plan.span.clone()) => started,
            () = session.stop.cancelled() => Err(DriveError::Stopped),
        };
        // Traced is how it started, not how long it lives.
        drop(plan.span);
        let (ended, report) = match started {
            Ok(taken) => {
                // The asker may be gone.
                let _ = steps.send(taken);
                work::tracked(work.clone(), driver.live(&mut commands)).await
            }
            Err(DriveError::Stopped) => (stopped(), false),
            Err(error) => {
                let console = driver.console().await;
                tracing::error!(session_id = session.id.short(), %error, console, "session did not start");
                let ended = Ended {
                    state: if was_here {
                        SessionState::Lost
                    } else {
                        SessionState::Failed
                    },
                    reason: error.reason().as_str().to_owned(),
                    message: error.to_string(),
                };
                (ended, was_here)
            }
        };
        if ended.state != SessionState::Stopped {
            let text = format!("the session ended: {}: {}", ended.reason, ended.message);
            let message = NewMessage::of_node(ERROR, "", text);
            collect::put(&driver.log, &self.hosted, vec![message]).await;
        }
        session.enter(Phase::Stopping);
        // Whoever still asks hears that it ends.
        drop(commands);
        // What was cut short may still write into what is removed now.
        work::finished(&work).await;
        driver.give_back().await;
        self.logs.end(&session.id);
        tracing::info!(
            session_id = session.id.short(),
            reason = ended.reason,
            "session ended"
        );
        self.hosted.bury(&session, ended, report);
    }

    /// Names the envd of this node.
    fn envd(&self) -> &str {
        self.images.as_ref().map_or("", GuestImages::envd)
    }

    async fn write_journal(&self, folder: &Path, entry: &journal::Entry) -> io::Result<()> {
        let (folder, entry) = (folder.to_owned(), entry.clone());
        blocking(move || journal::write(&folder, &entry)).await
    }
}

impl Driver {
    /// Serves the session until it ends; also whether the control plane has to be told.
    async fn live(&mut self, commands: &mut mpsc::Receiver<Command>) -> (Ended, bool) {
        let session = Arc::clone(&self.session);
        loop {
            let event = tokio::select! {
                () = session.stop.cancelled() => return (stopped(), false),
                event = self.next(commands) => event,
            };
            match event {
                Event::Command(command) => {
                    let done = tokio::select! {
                        () = session.stop.cancelled() => return (stopped(), false),
                        done = Box::pin(self.obey(command)) => done,
                    };
                    if let Err(ended) = done {
                        return (ended, true);
                    }
                }
                Event::Exit(exit) => return (self.failed(&exit).await, true),
                Event::LinkLost => {
                    let again = tokio::select! {
                        () = session.stop.cancelled() => return (stopped(), false),
                        again = self.reach_again() => again,
                    };
                    if let Err(ended) = again {
                        return (ended, true);
                    }
                }
            }
        }
    }

    /// What comes next. Cancel-safe.
    async fn next(&mut self, commands: &mut mpsc::Receiver<Command>) -> Event {
        let command = async {
            match commands.recv().await {
                Some(command) => Event::Command(command),
                // The session holds the sender.
                None => std::future::pending().await,
            }
        };
        let (Some(vm), Some(reach)) = (self.vm.as_mut(), self.reach.as_ref()) else {
            return command.await;
        };
        tokio::select! {
            event = command => event,
            exit = vm.wait() => Event::Exit(exit),
            () = reach.guest.closed() => Event::LinkLost,
            never = spans::pass_on(&reach.guest, &self.session.id) => match never {},
            never = watchdog::look_after(reach, &self.session.id, &self.log, &self.shop.hosted) => match never {},
        }
    }

    /// Carries out a command; an error is the session's end.
    async fn obey(&mut self, command: Command) -> Result<(), Ended> {
        // Who asked may be gone; what was done stays done.
        match command {
            Command::Pause(reply) => {
                let done = self.pause().await?;
                let _ = reply.send(done);
            }
            Command::Resume(reply) => {
                let done = self.resume().await;
                let _ = reply.send(done);
            }
            Command::Fork(reply) => {
                let done = self.fork().await?;
                let _ = reply.send(done);
            }
            Command::Snapshot(id, reply) => {
                let done = self.snapshot(&id).await?;
                let _ = reply.send(done);
            }
            Command::Export(to, reply) => {
                let done = self.export(to).await?;
                let _ = reply.send(done);
            }
            Command::Rollback(id, reply) => {
                let done = self.roll_back(&id).await;
                let _ = reply.send(done);
            }
            Command::DeleteSnapshot(id, reply) => {
                let folder = self.checkpoint(&id);
                let done = blocking(move || stored::remove(&folder)).await;
                let _ = reply.send(done.map_err(DriveError::Io));
            }
            Command::Update(update, reply) => {
                let done = self.update(*update).await;
                let _ = reply.send(done);
            }
            Command::Metrics(reply) => {
                let done = self.metrics().await.map(Box::new);
                let _ = reply.send(done);
            }
        }
        Ok(())
    }

    /// The last words of a guest that is at its end, which go into its log, too.
    async fn console(&mut self) -> String {
        let Some(vm) = self.vm.as_mut() else {
            return String::new();
        };
        let words = vm.last_words().await;
        // What the guest said by the link came before.
        self.log.quiet(QUIET, QUIET_LIMIT).await;
        let lines = words.guest.lines();
        let messages = lines.map(|line| NewMessage {
            source: "console".into(),
            ..NewMessage::of_node(NOTICE, "", line)
        });
        let messages = messages.collect();
        collect::put(&self.log, &self.shop.hosted, messages).await;
        words.to_string()
    }

    async fn failed(&mut self, exit: &VmExit) -> Ended {
        let console = self.console().await;
        tracing::error!(session_id = self.session.id.short(), %exit, console, "a VMM ended by itself");
        let (reason, message) = match exit {
            VmExit::Guest(_) if console.contains("Kernel panic") => {
                ("GUEST_PANIC", "the guest's kernel panicked".to_owned())
            }
            VmExit::Guest(_) => (
                "GUEST_POWERED_OFF",
                "the guest powered off or rebooted".to_owned(),
            ),
            VmExit::Hung => (
                "VMM_HUNG",
                "its VMM did not answer any more and was ended".to_owned(),
            ),
            VmExit::OutOfMemory => (
                "VMM_OUT_OF_MEMORY",
                "the host ended its VMM, which took more memory than it may".to_owned(),
            ),
            _ => ("VMM_EXITED", format!("its VMM ended by itself ({exit})")),
        };
        Ended {
            state: SessionState::Failed,
            reason: reason.into(),
            message,
        }
    }

    /// The link broke while the VMM lives: it is made anew, or the guest is beyond help.
    async fn reach_again(&mut self) -> Result<(), Ended> {
        let restarts = self.envd_restarts;
        let limit = Instant::now() + self.shop.boot_timeout;
        let (guest, over) = loop {
            let Some(vm) = self.vm.as_mut() else {
                return Ok(());
            };
            // A guest that breaks it again and again costs no more than this. What broke it may be the end of its VMM.
            if let Ok(exit) = tokio::time::timeout(REACH_AGAIN, vm.wait()).await {
                return Err(self.failed(&exit).await);
            }
            match self.reach().await {
                Ok(reached) => break reached,
                Err(DriveError::Vmm(VmmError::Ended(exit))) => {
                    return Err(self.failed(&exit).await);
                }
                // A daemon that has just begun may die as well.
                Err(error) if Instant::now() < limit => {
                    tracing::debug!(session_id = self.session.id.short(), %error, "a guest is not reached yet");
                }
                Err(error) => {
                    let console = self.console().await;
                    tracing::error!(session_id = self.session.id.short(), %error, console, "a guest is silent");
                    return Err(Ended {
                        state: SessionState::Failed,
                        reason: "GUEST_SILENT".into(),
                        message: format!("its guest does not answer any more: {error}"),
                    });
                }
            }
        };
        if let Some(before) = self.reach.take() {
            before.end(Over::Ended);
        }
        self.enter_running(guest, over);
        if self.envd_restarts > restarts {
            self.note_restart().await;
        }
        Ok(())
    }

    /// Makes a new way to a guest that is this session's already.
    async fn reach(&mut self) -> Result<(GuestClient, CancellationToken), DriveError> {
        let vm = self.vm.as_mut().ok_or(DriveError::State("not running"))?;
        vm.run().await?;
        let (guest, over) = open(vm.as_mut(), self.shop.boot_timeout).await?;
        self.configure(&guest, Connections::Keep).await?;
        Ok((guest, over))
    }

    /// Its daemon has died, and another one answers.
    async fn note_restart(&mut self) {
        metrics::counter!("sandmesh_node_envd_restarts_total").increment(1);
        tracing::warn!(
            session_id = self.session.id.short(),
            restarts = self.envd_restarts,
            "envd of a session died and was started again"
        );
        let now = Instant::now();
        let is_early = |last: Instant| now.saturating_duration_since(last) < collect::EVENT_PAUSE;
        if self.last_restart.is_some_and(is_early) {
            return;
        }
        self.last_restart = Some(now);
        let text = "envd in the guest died and was started again; processes go on, calls under way broke off";
        let message = NewMessage::of_node(collect::WARNING, "ENVD_RESTARTED", text);
        collect::put(&self.log, &self.shop.hosted, vec![message]).await;
    }

    fn enter_running(&mut self, guest: GuestClient, over: CancellationToken) {
        let address = self.slot.as_ref().map(|slot| slot.reach);
        let reach = Arc::new(Reach::new(guest, address, over));
        self.reach = Some(Arc::clone(&reach));
        let collect = collect::collect(
            Arc::clone(&reach),
            Arc::clone(&self.log),
            Arc::clone(&self.shop.hosted),
        );
        let before = self.collector.take();
        self.collector = Some(tokio::spawn(async move {
            // One at a time, so that each message is kept once. One that panicked has said so.
            if let Some(before) = before {
                let _ = before.await;
            }
            collect.await;
        }));
        self.session.enter(Phase::Running(reach));
    }

    /// Writes how far it is.
    async fn journal(&mut self, step: Step) -> io::Result<()> {
        self.entry.step = step;
        self.entry.process = self.vm.as_ref().and_then(|vm| vm.process());
        self.entry.slot = self.slot.as_ref().map(|slot| slot.index);
        self.shop.write_journal(&self.folder, &self.entry).await
    }

    /// Ends the VMM and gives the network place back; what is on the disk stays.
    async fn end_vm(&mut self) {
        if let Some(reach) = self.reach.take() {
            reach.end(Over::Ended);
        }
        if let Some(mut vm) = self.vm.take() {
            vm.kill().await;
        }
        if let (Some(slot), Some(slots)) = (self.slot.take(), &self.shop.slots) {
            slots.give_back(slot.index).await;
        }
    }

    async fn give_back(mut self) {
        self.end_vm().await;
        if let Some(mut collector) = self.collector.take()
            && tokio::time::timeout(COLLECTED, &mut collector)
                .await
                .is_err()
        {
            collector.abort();
        }
        let folder = self.folder;
        if let Err(error) = blocking({
            let folder = folder.clone();
            move || stored::remove(&folder)
        })
        .await
        {
            tracing::error!(%error, folder = %folder.display(), "a session's folder is left behind");
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn checkpoint(&self, id: &str) -> PathBuf {
        self.path(CHECKPOINTS).join(id)
    }

    fn identity(&self) -> Identity {
        let template = self.request.template.as_ref();
        // The template's below the session's.
        let env = template.map(|template| &template.env);
        let env = env.into_iter().flatten().chain(&self.request.env);
        Identity {
            session_id: self.session.id.clone(),
            env: env
                .map(|(name, value)| (name.clone(), value.clone()))
                .collect(),
            default_user: template
                .map(|template| template.default_user.clone())
                .unwrap_or_default(),
            nameservers: self.shop.nameservers.clone(),
            template: template
                .map(|template| format!("{}@{}", template.name, template.version))
                .unwrap_or_default(),
            // The journal's checksum was right, so it is what was written.
            machine_id: HEXLOWER
                .decode(self.entry.machine_id.as_bytes())
                .unwrap_or_default(),
        }
    }
}

/// Opens the link to a guest and HTTP/2 over it.
async fn open(
    vm: &mut dyn Vm,
    limit: Duration,
) -> Result<(GuestClient, CancellationToken), DriveError> {
    let link = vm.connect(Instant::now() + limit).await?;
    let over = CancellationToken::new();
    let guest = GuestClient::open(link, over.clone())
        .await
        .map_err(|error| DriveError::Configure(error.to_string()))?;
    Ok((guest, over))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    crate::work::blocking(work)
        .await
        .map_err(io::Error::other)?
}

/// Makes an empty folder under a name that shows it is not finished; it goes with what is returned, unless it gets another name.
fn unfinished(parent: &Path) -> io::Result<TempDir> {
    fs::create_dir_all(parent)?;
    tempfile::Builder::new()
        .prefix(UNFINISHED)
        .tempdir_in(parent)
}

/// Gives a file a second name, in place of whatever has that.
fn link_anew(file: &Path, name: &Path) -> io::Result<()> {
    remove_file(name)?;
    fs::hard_link(file, name)
}

/// Removes a file that may not be there.
fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn stopped() -> Ended {
    Ended {
        state: SessionState::Stopped,
        reason: "STOP_REQUESTED".into(),
        message: "it was asked to stop".into(),
    }
}
