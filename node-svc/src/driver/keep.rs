//! A session that stands still: paused, kept as a checkpoint, and back.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::Path,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use proto::{
    envd::v1::ExportLayerRequest,
    node::v1::{
        ExportSessionResponse, PauseSessionResponse, ResumeSessionResponse,
        SnapshotSessionResponse, StartSessionRequest, UpdateSessionRequest,
        export_session_response::Part,
    },
    session::v1::{GetSessionMetricsResponse, Network, PortAccess, SessionState},
    template::v1::Template,
};
use tokio_util::sync::CancellationToken;
use tonic::Code;

use super::{
    DriveError, Driver, Export, Outcome, PAUSED, REACH_AGAIN, Stopwatch, TEMPLATE_MEMORY, blocking,
    link_anew, remove_file,
    start::{Source, rules_of},
    unfinished,
};
use crate::{
    disk,
    guest::{Connections, GuestClient},
    hosted::{Ended, Over, Phase, Reach, Settings},
    journal::{self, Durability, Step},
    slot::Traffic,
    stored::{self, SCRATCH, StoredError},
    vmm::{DEVICES, MEMORY, MEMORY_DIFFERENCE, ROOM},
};

/// Whoever takes a session's layer keeps it standing no longer than that.
const EXPORT_LIMIT: Duration = Duration::from_mins(10);

/// A guest that was stopped to be stored, and since when.
pub(super) struct Still {
    reach: Arc<Reach>,
    pub(super) since: Instant,
    /// Whether its CPUs stand, too.
    is_stopped: bool,
}

impl Driver {
    /// Stops the guest in a state that can be stored: its processes frozen, its disk written, its gate closed, its CPUs stopped. The
    /// session is in `phase` until [`Driver::go_on`].
    pub(super) async fn stand_still(&mut self, phase: Phase) -> Result<Still, DriveError> {
        // Those that go on at once are not made to wait for their memory to be given back, and to be theirs again.
        let is_pause = matches!(phase, Phase::Pausing);
        let (mut still, free) = self.freeze(phase).await?;
        let vm = self.vm.as_mut().ok_or(DriveError::State("not running"))?;
        if is_pause && let Err(error) = vm.shrink(free).await {
            // What is stored is larger than it had to be.
            tracing::warn!(session_id = self.session.id.short(), %error, "a guest does not give back what it does not use");
        }
        still.is_stopped = true;
        match vm.pause().await {
            Ok(()) => Ok(still),
            Err(error) => {
                self.go_on(still).await?;
                Err(error.into())
            }
        }
    }

    /// The same as far as the guest itself does it: its CPUs run. Also how much memory it does not use.
    async fn freeze(&mut self, phase: Phase) -> Result<(Still, u64), DriveError> {
        let reach = self.reach.clone().ok_or(DriveError::State("not running"))?;
        let since = Instant::now();
        self.session.enter(phase);
        match reach.guest.prepare_snapshot(&self.shop.nameservers).await {
            Ok(free) => {
                let still = Still {
                    reach,
                    since,
                    is_stopped: false,
                };
                Ok((still, free))
            }
            Err(status) => {
                // envd opened its gate again before it answered; it may not have answered at all, so it is told once more.
                let message = status.message().to_owned();
                let configured = self.configure(&reach.guest, Connections::Keep).await;
                self.session.enter(Phase::Running(reach));
                configured?;
                Err(DriveError::Prepare(message))
            }
        }
    }

    /// Lets a guest that stands still go on as it was; returns how long it stood.
    pub(super) async fn go_on(&mut self, still: Still) -> Result<Duration, DriveError> {
        let vm = self.vm.as_mut().ok_or(DriveError::State("not running"))?;
        // Where the CPUs did not stand, the link stands.
        let is_linked = !still.is_stopped || vm.link_outlives_store();
        if still.is_stopped {
            vm.run().await?;
        }
        if is_linked {
            let configured = self.configure(&still.reach.guest, Connections::Keep);
            match configured.await {
                Ok(()) => {
                    let stood = still.since.elapsed();
                    self.session.enter(Phase::Running(still.reach));
                    return Ok(stood);
                }
                // Its daemon may have died; the next one answers by a new link.
                Err(error) => {
                    tracing::warn!(session_id = self.session.id.short(), %error, "a guest that stood still is reached anew");
                }
            }
        }
        let (guest, over) = self.reach().await?;
        let stood = still.since.elapsed();
        still.reach.end(Over::Ended);
        self.enter_running(guest, over);
        Ok(stood)
    }

    /// A guest that cannot go on after it was stopped is at its end.
    pub(super) async fn beyond_help(&mut self, error: &DriveError) -> Ended {
        // What it stumbled over may be the end of its VMM.
        if let Some(vm) = self.vm.as_mut()
            && let Ok(exit) = tokio::time::timeout(REACH_AGAIN, vm.wait()).await
        {
            return self.failed(&exit).await;
        }
        let console = self.console().await;
        tracing::error!(session_id = self.session.id.short(), %error, console, "a guest does not go on after it was stopped");
        Ended {
            state: SessionState::Failed,
            reason: "GUEST_SILENT".into(),
            message: format!("its guest did not go on after it stood still: {error}"),
        }
    }

    /// Stores devices, memory and disk of a guest that stands still in a new folder, which gets its name when all of it is synced. A
    /// disk that nobody will write any more needs no copy.
    async fn store(&mut self, to: &Path, disk_stays: bool) -> Result<u64, DriveError> {
        let parent = to.parent().unwrap_or(&self.folder).to_owned();
        let made = {
            let parent = parent.clone();
            blocking(move || unfinished(&parent)).await?
        };
        self.store_into(made.path(), disk_stays).await?;
        let (named, maker) = (to.to_owned(), self.shop.maker.clone());
        crate::work::blocking(move || {
            stored::publish(made.path(), &named, &maker)?;
            // It has its name now, and is no longer what goes with this.
            let _: std::path::PathBuf = made.keep();
            Ok::<_, StoredError>(())
        })
        .await
        .map_err(io::Error::other)??;
        let to = to.to_owned();
        Ok(blocking(move || stored::bytes(&to)).await?)
    }

    async fn store_into(&mut self, made: &Path, disk_stays: bool) -> Result<(), DriveError> {
        let base = self.path(TEMPLATE_MEMORY);
        let vm = self.vm.as_mut().ok_or(DriveError::State("not running"))?;
        vm.store_devices(&made.join(DEVICES)).await?;
        vm.store_memory(&base, &made.join(MEMORY_DIFFERENCE))
            .await?;
        let (scratch, copy) = (self.path(SCRATCH), made.join(SCRATCH));
        blocking(move || {
            if !scratch.exists() {
                // A simulated guest has none.
                Ok(())
            } else if disk_stays {
                fs::hard_link(&scratch, &copy)
            } else {
                disk::copy(&scratch, &copy)
            }
        })
        .await?;
        Ok(())
    }

    /// Stores the session and ends its VMM. The outer error is the session's end.
    pub(super) async fn pause(&mut self) -> Result<Outcome<PauseSessionResponse>, Ended> {
        if self.reach.is_none() {
            // Asked again by somebody who did not hear the answer.
            return Ok(Ok(PauseSessionResponse {
                stored_bytes: self.session.stored_bytes(),
                stop_time: None,
            }));
        }
        let still = match self.stand_still(Phase::Pausing).await {
            Ok(still) => still,
            Err(error @ (DriveError::Configure(_) | DriveError::Vmm(_)))
                if !matches!(*self.session.phase().borrow(), Phase::Running(_)) =>
            {
                return Err(self.beyond_help(&error).await);
            }
            Err(error) => return Ok(Err(error)),
        };
        let since = still.since;
        let paused = self.path(PAUSED);
        let older = paused.clone();
        let stored = async {
            // Left behind only if it could not be removed after a resume.
            blocking(move || stored::remove(&older)).await?;
            self.store(&paused, true).await
        };
        let stored = match stored.await {
            Ok(bytes) => bytes,
            Err(error) => {
                // Nothing is lost: it goes on as if it had not been asked.
                return match self.go_on(still).await {
                    Ok(_) => Ok(Err(error)),
                    Err(error) => Err(self.beyond_help(&error).await),
                };
            }
        };
        still.reach.end(Over::Paused);
        self.end_vm().await;
        let took = since.elapsed();
        self.session.set_stored_bytes(stored);
        if let Err(error) = self.journal(Step::Paused).await {
            // What is stored stands; the next node-svc finds a VMM that is gone, and the stored state.
            tracing::error!(session_id = self.session.id.short(), %error, "a pause is not in the journal");
        }
        self.forget_running().await;
        self.shop.hosted.park(&self.session);
        self.session.enter(Phase::Paused);
        tracing::info!(
            session_id = self.session.id.short(),
            stored,
            ?took,
            "session paused"
        );
        Ok(Ok(PauseSessionResponse {
            stored_bytes: stored,
            stop_time: prost_types::Duration::try_from(took).ok(),
        }))
    }

    /// Removes what only a running guest needs: the disk has another name by now, sockets are of no use.
    async fn forget_running(&self) {
        let folder = self.folder.clone();
        let removed = blocking(move || {
            for name in [SCRATCH, MEMORY, "qemu.log"] {
                remove_file(&folder.join(name))?;
            }
            stored::remove(&folder.join(ROOM))
        });
        if let Err(error) = removed.await {
            tracing::warn!(session_id = self.session.id.short(), %error, "files of a paused session are left behind");
        }
    }

    /// Continues the session from what is stored. On an error that stays as it is.
    pub(super) async fn resume(&mut self) -> Outcome<ResumeSessionResponse> {
        if self.reach.is_some() {
            return Ok(ResumeSessionResponse { steps: Vec::new() });
        }
        self.shop.hosted.unpark(&self.session)?;
        self.session.enter(Phase::Resuming);
        let mut watch = Stopwatch::new();
        match self.resume_stored(&mut watch).await {
            Ok((guest, over)) => {
                self.enter_running(guest, over);
                tracing::info!(session_id = self.session.id.short(), "session resumed");
                Ok(ResumeSessionResponse { steps: watch.1 })
            }
            Err(error) => {
                let console = self.console().await;
                tracing::error!(session_id = self.session.id.short(), %error, steps = watch.so_far(), console, "a session is not resumed");
                self.end_vm().await;
                self.forget_running().await;
                self.shop.hosted.park(&self.session);
                self.session.enter(Phase::Paused);
                Err(error)
            }
        }
    }

    async fn resume_stored(
        &mut self,
        watch: &mut Stopwatch,
    ) -> Result<(GuestClient, CancellationToken), DriveError> {
        let (paused, maker) = (self.path(PAUSED), self.shop.maker.clone());
        let folder = self.folder.clone();
        let is_simulated = !self.shop.vmm.needs_place();
        let check = move || {
            stored::check(&paused, &maker)?;
            if !is_simulated {
                link_anew(&folder.join(TEMPLATE_MEMORY), &folder.join(MEMORY))?;
            }
            Ok::<_, StoredError>(())
        };
        crate::work::blocking(check)
            .await
            .map_err(io::Error::other)??;
        let paused = self.path(PAUSED);
        let source = Source {
            devices: paused.join(DEVICES),
            difference: Some(paused.join(MEMORY_DIFFERENCE)),
            scratch: paused.join(SCRATCH),
        };
        // Until it runs, the journal says Paused: the next node-svc would end the VMM and keep what is stored.
        self.entry.step = Step::Paused;
        let reached = self.restore(source, Connections::Reset, watch).await?;
        self.journal(Step::Running).await?;
        let stored = paused.clone();
        if let Err(error) = blocking(move || stored::remove(&stored)).await {
            tracing::warn!(session_id = self.session.id.short(), %error, "stored state of a running session is left behind");
        }
        self.session.set_stored_bytes(0);
        Ok(reached)
    }

    /// Keeps the session as it is now. The outer error is the session's end.
    pub(super) async fn snapshot(
        &mut self,
        id: &str,
    ) -> Result<Outcome<SnapshotSessionResponse>, Ended> {
        let to = self.checkpoint(id);
        if to.exists() {
            // Asked again.
            let bytes = blocking(move || stored::bytes(&to)).await;
            return Ok(bytes
                .map(|stored_bytes| SnapshotSessionResponse {
                    stored_bytes,
                    stop_time: None,
                })
                .map_err(DriveError::Io));
        }
        if self.reach.is_none() {
            let paused = self.path(PAUSED);
            let copied = blocking(move || link_folder(&paused, &to));
            return Ok(copied
                .await
                .map(|stored_bytes| SnapshotSessionResponse {
                    stored_bytes,
                    stop_time: Some(prost_types::Duration::default()),
                })
                .map_err(DriveError::Io));
        }
        let still = match self.stand_still(Phase::Held).await {
            Ok(still) => still,
            Err(error) => return self.stood_not(error).await,
        };
        let stored = self.store(&to, false).await;
        let stood = match self.go_on(still).await {
            Ok(stood) => stood,
            Err(error) => return Err(self.beyond_help(&error).await),
        };
        Ok(stored.map(|stored_bytes| SnapshotSessionResponse {
            stored_bytes,
            stop_time: prost_types::Duration::try_from(stood).ok(),
        }))
    }

    /// Sends the layer of a guest that stands still meanwhile. The outer error is the session's end.
    pub(super) async fn export(&mut self, to: Export) -> Result<Outcome<()>, Ended> {
        if self.reach.is_none() {
            return Ok(Err(DriveError::State("paused")));
        }
        if to.is_closed() {
            // Whoever asked has gone while others had their turn.
            return Ok(Ok(()));
        }
        let still = match self.freeze(Phase::Held).await {
            Ok((still, _)) => still,
            Err(error) => return self.stood_not(error).await,
        };
        let template = self.request.template.clone().unwrap_or_default();
        let carry = carry(&still.reach.guest, template, &to);
        let vm = self.vm.as_mut();
        let died = async {
            match vm {
                Some(vm) => vm.wait().await,
                None => std::future::pending().await,
            }
        };
        let carried = tokio::select! {
            carried = tokio::time::timeout(EXPORT_LIMIT, carry) => carried.unwrap_or_else(|_| {
                let limit = EXPORT_LIMIT.as_secs();
                Err(DriveError::Export(format!("it was not through in {limit} s")))
            }),
            // A guest that says nothing is not waited for when nobody listens any more.
            () = to.closed() => Ok(()),
            exit = died => return Err(self.failed(&exit).await),
        };
        if let Err(error) = self.go_on(still).await {
            return Err(self.beyond_help(&error).await);
        }
        Ok(carried)
    }

    /// A guest that would not stand still either runs on, or is at its end.
    pub(super) async fn stood_not<T>(&mut self, error: DriveError) -> Result<Outcome<T>, Ended> {
        if matches!(*self.session.phase().borrow(), Phase::Running(_)) {
            Ok(Err(error))
        } else {
            Err(self.beyond_help(&error).await)
        }
    }

    /// Puts the session back to a checkpoint: its state becomes what is stored, and is resumed. What was before is gone only once the
    /// checkpoint was read whole and is sound.
    pub(super) async fn roll_back(&mut self, id: &str) -> Outcome<()> {
        let kept = self.checkpoint(id);
        if !kept.exists() {
            return Err(DriveError::CheckpointUnknown(id.to_owned()));
        }
        let (folder, maker) = (self.folder.clone(), self.shop.maker.clone());
        let next = crate::work::blocking(move || {
            stored::check_all(&kept, &maker)?;
            let next = unfinished(&folder)?;
            link_files(&kept, next.path())?;
            Ok::<_, StoredError>(next)
        })
        .await
        .map_err(io::Error::other)??;
        self.session.enter(Phase::Held);
        if let Some(reach) = &self.reach {
            reach.end(Over::RolledBack);
        }
        self.end_vm().await;
        let (paused, folder) = (self.path(PAUSED), self.folder.clone());
        let bytes = blocking(move || {
            stored::remove(&paused)?;
            fs::rename(next.keep(), &paused)?;
            fs::File::open(&folder)?.sync_all()?;
            stored::bytes(&paused)
        })
        .await?;
        self.session.set_stored_bytes(bytes);
        self.journal(Step::Paused).await?;
        self.forget_running().await;
        self.resume().await.map(drop)
    }

    /// Changes what may change while the session lives, in the journal first.
    pub(super) async fn update(&mut self, update: UpdateSessionRequest) -> Outcome<()> {
        let mut request = self.request.clone();
        if update.network.is_some() {
            request.network = update.network;
        }
        if let Some(wake) = update.wake_on_request {
            request.wake_on_request = wake;
        }
        let rules = rules_of(&request)?;
        let (folder, written) = (self.folder.clone(), request.clone());
        if folder.exists() {
            blocking(move || journal::write_request(&folder, &written, Durability::Host)).await?;
        }
        self.session.set(settings_of(&request));
        self.request = request;
        if let (Some(slot), Some(slots)) = (&self.slot, &self.shop.slots) {
            slots.apply(slot.index, &rules).await?;
        }
        Ok(())
    }

    /// What the session uses now.
    pub(super) async fn metrics(&mut self) -> Outcome<GetSessionMetricsResponse> {
        let process = self.vm.as_ref().and_then(|vm| vm.process());
        let disk = if self.reach.is_some() {
            self.path(SCRATCH)
        } else {
            self.path(PAUSED)
        };
        let used = blocking(move || {
            let disk_bytes = if disk.is_dir() {
                stored::bytes(&disk)?
            } else {
                fs::metadata(&disk).map_or(0, |metadata| metadata.blocks() * 512)
            };
            let mut answer = match process {
                Some(process) => process.usage()?,
                None => GetSessionMetricsResponse::default(),
            };
            answer.disk_bytes = disk_bytes;
            Ok(answer)
        })
        .await?;
        let traffic = match (&self.slot, &self.shop.slots) {
            (Some(slot), Some(slots)) => slots.traffic(slot.index).await?,
            _ => Traffic::default(),
        };
        Ok(GetSessionMetricsResponse {
            time: Some(SystemTime::now().into()),
            network_sent_bytes: traffic.sent,
            network_received_bytes: traffic.received,
            ..used
        })
    }
}

/// Passes the layer on until its end, or until nobody listens.
async fn carry(guest: &GuestClient, template: Template, to: &Export) -> Result<(), DriveError> {
    let failed = |status: tonic::Status| {
        DriveError::Export(if status.code() == Code::Unimplemented {
            "its envd is of before this was known; start the session anew".to_owned()
        } else {
            status.message().to_owned()
        })
    };
    let asked = guest.system().export_layer(ExportLayerRequest {}).await;
    let mut pieces = asked.map_err(failed)?.into_inner();
    let mut next = Some(Part::Template(template));
    while let Some(part) = next {
        let answer = ExportSessionResponse { part: Some(part) };
        if to.send(Ok(answer)).await.is_err() {
            break;
        }
        let piece = pieces.message().await.map_err(failed)?;
        next = piece.map(|piece| Part::Data(piece.data));
    }
    Ok(())
}

/// Gives all files of a folder second names in a new folder; none of them is ever written again. Blocking.
fn link_folder(from: &Path, to: &Path) -> io::Result<u64> {
    let parent = to.parent().unwrap_or(to).to_owned();
    let made = unfinished(&parent)?;
    link_files(from, made.path())?;
    fs::rename(made.keep(), to)?;
    fs::File::open(&parent)?.sync_all()?;
    stored::bytes(to)
}

fn link_files(from: &Path, to: &Path) -> io::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        fs::hard_link(entry.path(), to.join(entry.file_name()))?;
    }
    fs::File::open(to)?.sync_all()
}

/// What of a request may change later, as far as every call needs it.
pub(crate) fn settings_of(request: &StartSessionRequest) -> Settings {
    let access = request.network.as_ref().map(Network::port_access);
    Settings {
        port_access: match access {
            Some(PortAccess::Token) => PortAccess::Token,
            _ => PortAccess::Public,
        },
        wake_on_request: request.wake_on_request,
    }
}
