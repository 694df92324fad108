//! One task per session: it starts the guest, watches it, and takes it down. Nobody else touches what belongs to the session.
//!
//! ```text
//!  Starting: artifacts -> slot -> disk -> VMM -> boot -> configure --> Running --stop asked, VMM ended--> Stopping -> Ended
//!      \______________ any step fails, takes too long, or a stop is asked ______________________________/
//! ```
//! Whatever was taken is given back in every case, in the reverse order.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use proto::{
    node::v1::{StartSessionRequest, StartStep},
    session::v1::SessionState,
    template::v1::Template,
};
use service_kit::ids::SessionId;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument as _, Span};

use crate::{
    artifact::{ArtifactError, Artifacts},
    disk::{DiskError, Disks},
    guest::{GuestClient, Identity},
    guest_image::GuestImages,
    hosted::{Ended, Hosted, Phase, Reach, Session},
    journal,
    slot::{self, NetworkRules, Slot, SlotError, SlotPool},
    spans,
    vmm::{BootSpec, GuestPlace, Vm, Vmm, VmmError},
};

/// What drivers work with.
#[derive(Debug)]
pub struct Workshop {
    /// Runs guests.
    pub vmm: Arc<dyn Vmm>,
    /// Network places; none where the VMM needs none.
    pub slots: Option<SlotPool>,
    /// Template files.
    pub artifacts: Artifacts,
    /// Initial RAM disks; none where the VMM needs none.
    pub images: Option<GuestImages>,
    /// Writable disks.
    pub disks: Disks,
    /// A folder per session.
    pub sessions: PathBuf,
    /// Guests that may boot at once.
    pub boots: Semaphore,
    /// From the VMM's start until the guest is configured.
    pub boot_timeout: Duration,
    /// Name servers of guests.
    pub nameservers: Vec<String>,
    /// Sessions of this node.
    pub hosted: Arc<Hosted>,
}

/// What a session starts from.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The request, its fields checked.
    pub request: StartSessionRequest,
    /// Its template.
    pub template: Template,
    /// Whether it reaches the outside.
    pub internet: bool,
    /// The call that asked for it.
    pub span: Span,
}

#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error("{0}")]
    Artifact(#[from] ArtifactError),
    #[error("{0}")]
    Slot(#[from] SlotError),
    #[error("{0}")]
    Disk(#[from] DiskError),
    #[error("{0}")]
    Vmm(#[from] VmmError),
    #[error("the node's disk: {0}")]
    Io(#[from] io::Error),
    #[error("the guest could not be configured: {0}")]
    Configure(String),
    #[error("the guest was not ready within {0:?}")]
    Timeout(Duration),
    #[error("it was stopped while it started")]
    Stopped,
}

impl StartError {
    fn reason(&self) -> &'static str {
        match self {
            Self::Artifact(_) => "ARTIFACT_UNAVAILABLE",
            Self::Slot(_) => "NETWORK_SLOT_FAILED",
            Self::Disk(DiskError::Io(error)) | Self::Io(error)
                if error.kind() == io::ErrorKind::StorageFull =>
            {
                "NODE_DISK_FULL"
            }
            Self::Disk(_) => "DISK_FAILED",
            Self::Vmm(_) => "VMM_FAILED",
            Self::Io(_) => "NODE_DISK_FAILED",
            Self::Configure(_) => "CONFIGURE_FAILED",
            Self::Timeout(_) => "START_TIMEOUT",
            Self::Stopped => "STOP_REQUESTED",
        }
    }
}

/// What a session has taken and must give back.
#[derive(Debug, Default)]
struct Taken {
    slot: Option<Slot>,
    vm: Option<Box<dyn Vm>>,
    folder: Option<PathBuf>,
}

/// A running guest, and how long each part of its start took.
struct Started {
    guest: GuestClient,
    over: CancellationToken,
    steps: Vec<StartStep>,
}

struct Stopwatch(Instant, Vec<StartStep>);

impl Stopwatch {
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
}

impl Workshop {
    /// Drives a session from its start to its end. `steps` hears how the start went.
    pub async fn drive(
        self: Arc<Self>,
        session: Arc<Session>,
        plan: Plan,
        steps: tokio::sync::oneshot::Sender<Vec<StartStep>>,
    ) {
        let mut taken = Taken::default();
        let started = tokio::select! {
            started = self.start(&session.id, &plan, &mut taken).instrument(plan.span.clone()) => started,
            () = session.stop.cancelled() => Err(StartError::Stopped),
        };
        // Traced is how it started, not how long it lives.
        drop(plan);
        let (ended, report) = match started {
            Ok(started) => {
                let guest = started.guest.clone();
                let reach = Reach {
                    guest: started.guest,
                    address: taken.slot.as_ref().map(|slot| slot.reach),
                    over: started.over.clone(),
                };
                session.enter(Phase::Running(Arc::new(reach)));
                // The asker may be gone.
                let _ = steps.send(started.steps);
                tracing::info!(session_id = session.id.short(), "session runs");
                let outcome = tokio::select! {
                    outcome = self.watch(&session, &mut taken) => outcome,
                    never = spans::pass_on(&guest, &session.id) => match never {},
                };
                session.enter(Phase::Stopping);
                started.over.cancel();
                outcome
            }
            Err(StartError::Stopped) => (stopped(), false),
            Err(error) => {
                let console = match taken.vm.as_mut() {
                    Some(vm) => vm.console_tail().await,
                    None => String::new(),
                };
                tracing::error!(session_id = session.id.short(), %error, console, "session did not start");
                (
                    Ended {
                        state: SessionState::Failed,
                        reason: error.reason().into(),
                        message: error.to_string(),
                    },
                    false,
                )
            }
        };
        session.enter(Phase::Stopping);
        self.give_back(taken).await;
        tracing::info!(
            session_id = session.id.short(),
            reason = ended.reason,
            "session ended"
        );
        self.hosted.bury(&session, ended, report);
    }

    async fn watch(&self, session: &Session, taken: &mut Taken) -> (Ended, bool) {
        let Some(vm) = taken.vm.as_mut() else {
            return (stopped(), false);
        };
        let exit = tokio::select! {
            () = session.stop.cancelled() => return (stopped(), false),
            exit = vm.wait() => exit,
        };
        let console = vm.console_tail().await;
        tracing::error!(session_id = session.id.short(), %exit, console, "a VMM ended by itself");
        let ended = Ended {
            state: SessionState::Failed,
            reason: "VMM_EXITED".into(),
            message: format!("its VMM ended by itself ({exit})"),
        };
        (ended, true)
    }

    async fn start(
        &self,
        id: &SessionId,
        plan: &Plan,
        taken: &mut Taken,
    ) -> Result<Started, StartError> {
        let mut watch = Stopwatch(Instant::now(), Vec::new());
        let needs_place = self.vmm.needs_place();
        let folder = self.sessions.join(id.as_str());
        fs::create_dir(&folder)?;
        taken.folder = Some(folder.clone());
        let mut spec = BootSpec {
            folder: folder.clone(),
            kernel: PathBuf::new(),
            initrd: PathBuf::new(),
            rootfs: PathBuf::new(),
            scratch: folder.join("scratch.ext4"),
            vcpus: plan.request.resources.unwrap_or_default().vcpus,
            memory_bytes: plan.request.resources.unwrap_or_default().memory_bytes,
            place: None,
        };
        let mut entry = journal::Entry {
            session_id: id.to_string(),
            ..journal::Entry::default()
        };
        if needs_place {
            self.prepare(plan, &mut spec, &mut watch).await?;
        }
        if let Some(slots) = &self.slots {
            let slot = slots.take(&NetworkRules::internet(plan.internet)).await?;
            taken.slot = Some(slot.clone());
            entry.slot = Some(slot.index);
            spec.place = Some(GuestPlace {
                netns: slot.index.namespace_path(),
                tap: slot::TAP.into(),
                mac: slot::GUEST_MAC.into(),
                reach: slot.reach,
            });
            watch.lap("slot");
        }
        if needs_place {
            journal::write(&folder, &entry)?;
        }
        // Too many guests booting at once would make all of them late.
        let turn = self
            .boots
            .acquire()
            .await
            .map_err(|_| StartError::Stopped)?;
        let boot = self.boot(id, plan, spec, taken, &mut entry, &mut watch);
        let booted = tokio::time::timeout(self.boot_timeout, boot).await;
        drop(turn);
        let (guest, over) = booted.map_err(|_| StartError::Timeout(self.boot_timeout))??;
        Ok(Started {
            guest,
            over,
            steps: watch.1,
        })
    }

    async fn prepare(
        &self,
        plan: &Plan,
        spec: &mut BootSpec,
        watch: &mut Stopwatch,
    ) -> Result<(), StartError> {
        let template = &plan.template;
        spec.kernel = self
            .artifacts
            .get("kernel", template.kernel.as_ref())
            .await?;
        spec.rootfs = self
            .artifacts
            .get("root filesystem", template.rootfs.as_ref())
            .await?;
        let modules = self
            .artifacts
            .get("modules", template.modules.as_ref())
            .await?;
        if let Some(images) = &self.images {
            // A copy of some MiB the first time, a look at a file name after.
            spec.initrd = tokio::task::block_in_place(|| images.initrd(&modules))?;
        }
        watch.lap("artifacts");
        let size = plan.request.resources.unwrap_or_default().disk_bytes;
        tokio::task::block_in_place(|| self.disks.make(size, &spec.scratch))?;
        watch.lap("disk");
        Ok(())
    }

    async fn boot(
        &self,
        id: &SessionId,
        plan: &Plan,
        spec: BootSpec,
        taken: &mut Taken,
        entry: &mut journal::Entry,
        watch: &mut Stopwatch,
    ) -> Result<(GuestClient, CancellationToken), StartError> {
        let deadline = Instant::now() + self.boot_timeout;
        let folder = spec.folder.clone();
        let vm = taken.vm.insert(self.vmm.boot(spec).await?);
        entry.process = vm.process();
        if entry.process.is_some() {
            journal::write(&folder, entry)?;
        }
        watch.lap("vmm");
        let link = vm.connect(deadline).await?;
        let over = CancellationToken::new();
        let guest = GuestClient::open(link, over.clone())
            .await
            .map_err(|error| StartError::Configure(error.to_string()))?;
        watch.lap("boot");
        let identity = Identity {
            session_id: id.clone(),
            env: plan.request.env.clone().into_iter().collect(),
            nameservers: self.nameservers.clone(),
        };
        guest
            .configure(&identity)
            .await
            .map_err(|status| StartError::Configure(status.message().to_owned()))?;
        watch.lap("configure");
        Ok((guest, over))
    }

    async fn give_back(&self, taken: Taken) {
        let Taken { slot, vm, folder } = taken;
        if let Some(mut vm) = vm {
            vm.kill().await;
        }
        if let (Some(slot), Some(slots)) = (slot, &self.slots) {
            slots.give_back(slot.index).await;
        }
        if let Some(folder) = folder {
            remove_folder(&folder);
        }
    }
}

fn stopped() -> Ended {
    Ended {
        state: SessionState::Stopped,
        reason: "STOP_REQUESTED".into(),
        message: "it was asked to stop".into(),
    }
}

fn remove_folder(folder: &Path) {
    if let Err(error) = fs::remove_dir_all(folder)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::error!(%error, folder = %folder.display(), "a session's folder is left behind");
    }
}

/// Ends what an earlier node-svc on this folder left: VMMs first, then folders. Slots go with their block. Blocking.
pub fn reap(sessions: &Path) -> io::Result<usize> {
    fs::create_dir_all(sessions)?;
    let mut reaped = 0;
    for entry in fs::read_dir(sessions)? {
        let folder = entry?.path();
        if let Some(process) = journal::read(&folder).and_then(|entry| entry.process) {
            process.kill_and_wait()?;
        }
        remove_folder(&folder);
        reaped += 1;
    }
    Ok(reaped)
}
