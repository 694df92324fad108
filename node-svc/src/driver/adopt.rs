//! What an earlier node-svc left on this state folder: sessions that run go on, paused ones stay, all else is ended.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use proto::node::v1::StartSessionRequest;
use service_kit::ids::SessionId;
use tokio::sync::mpsc;
use tracing::Span;

use super::{
    CHECKPOINTS, Command, DriveError, Driver, Origin, PAUSED, Plan, REACH_AGAIN, UNFINISHED,
    Workshop, blocking, keep, start,
};
use crate::{
    hosted::{Phase, Session},
    journal::{self, Step},
    slot::{Slot, SlotIndex},
    stored,
    vmm::{VmExit, VmmError, process},
};

/// A session that is taken over, and what its driver hears and starts from.
#[derive(Debug)]
pub struct Adopted {
    /// The session, already among those of this node.
    pub session: Arc<Session>,
    /// For its driver.
    pub commands: mpsc::Receiver<Command>,
    /// For its driver.
    pub plan: Plan,
}

/// Slots of sessions that may still run: they must not be touched when slots are opened. Blocking.
pub fn slots_in_use(sessions: &Path) -> io::Result<BTreeSet<SlotIndex>> {
    let mut slots = BTreeSet::new();
    for folder in folders(sessions)? {
        if let Some(entry) = journal::read(&folder)
            && entry.step == Step::Running
            && entry.process.is_some_and(process::ProcessId::is_alive)
        {
            slots.extend(entry.slot);
        }
    }
    Ok(slots)
}

/// Takes over what can go on and ends the rest; to be done before anything new is started. Blocking.
pub fn adopt_all(shop: &Workshop) -> io::Result<Vec<Adopted>> {
    let mut adopted = Vec::new();
    for folder in folders(&shop.sessions)? {
        if let Some((entry, request, id)) = adoptable(&folder) {
            adopted.push(take_over(shop, entry, request, id));
        } else {
            tracing::warn!(folder = %folder.display(), "a session that cannot go on is ended");
            end(&folder)?;
        }
    }
    end_all(&shop.forks)?;
    Ok(adopted)
}

fn folders(parent: &Path) -> io::Result<Vec<PathBuf>> {
    fs::create_dir_all(parent)?;
    fs::read_dir(parent)?
        .map(|entry| Ok(entry?.path()))
        .collect()
}

fn adoptable(folder: &Path) -> Option<(journal::Entry, StartSessionRequest, SessionId)> {
    let entry = journal::read(folder)?;
    let request = journal::read_request(folder)?;
    let id = SessionId::parse(&entry.session_id).ok()?;
    let is_its_own = folder.file_name().is_some_and(|name| name == id.as_str());
    let goes_on = match entry.step {
        Step::Starting => false,
        Step::Running => entry.process.is_some_and(process::ProcessId::is_alive),
        Step::Paused => true,
    };
    // A pause that was not noted: the VMM is gone, and what it was is stored whole.
    let is_stored = folder.join(PAUSED).exists();
    (is_its_own && (goes_on || (entry.step == Step::Running && is_stored)))
        .then_some((entry, request, id))
}

fn take_over(
    shop: &Workshop,
    mut entry: journal::Entry,
    request: StartSessionRequest,
    id: SessionId,
) -> Adopted {
    if !entry.process.is_some_and(process::ProcessId::is_alive) {
        entry.step = Step::Paused;
    }
    let (session, commands) = Session::new(
        id,
        request.access_token_sha256.clone(),
        request.resources.unwrap_or_default(),
        keep::settings_of(&request),
    );
    // Before anybody may ask: a log that has not begun here is taken for one that has ended.
    shop.logs.begin(&session.id);
    let is_paused = entry.step == Step::Paused;
    session.enter(if is_paused {
        Phase::Paused
    } else {
        Phase::Adopting
    });
    Adopted {
        session: shop.hosted.adopt(session, is_paused),
        commands,
        plan: Plan {
            request,
            origin: Origin::Earlier(entry),
            span: Span::none(),
        },
    }
}

/// Ends whatever works in the folder, then removes it.
fn end(folder: &Path) -> io::Result<()> {
    if let Some(process) = journal::read(folder).and_then(|entry| entry.process) {
        process.kill_and_wait()?;
    }
    // Also what the journal does not name, or cannot.
    process::kill_all_below(folder)?;
    stored::remove(folder)
}

/// Ends VMMs that were booting templates. Blocking.
pub fn end_template_boots(snapshots: &Path) -> io::Result<()> {
    process::kill_all_below(snapshots)
}

/// Ends every VMM that works below the folder, and removes what is there. Blocking.
pub fn end_all(parent: &Path) -> io::Result<()> {
    process::kill_all_below(parent)?;
    for folder in folders(parent)? {
        stored::remove(&folder)?;
    }
    Ok(())
}

/// Ends everything an earlier node-svc left below these folders: VMMs first, then files. Slots go with their block. Blocking.
pub fn reap(state: &Path) -> io::Result<()> {
    process::kill_all_below(state)?;
    for parent in ["s", "w", "f"] {
        end_all(&state.join(parent))?;
    }
    Ok(())
}

impl Driver {
    pub(super) async fn adopt(&mut self, entry: journal::Entry) -> Result<(), DriveError> {
        self.entry = entry;
        self.note_envd();
        let folder = self.folder.clone();
        if self.entry.step == Step::Paused {
            // A resume that was not finished has left a VMM, and a pause that was not noted perhaps a slot's name.
            let (process, paused) = (self.entry.process, self.path(PAUSED));
            let bytes = blocking(move || {
                if let Some(process) = process {
                    process.kill_and_wait()?;
                }
                process::kill_all_below(&folder)?;
                remove_unfinished(&folder)?;
                stored::bytes(&paused)
            })
            .await?;
            self.session.set_stored_bytes(bytes);
            self.journal(Step::Paused).await?;
            self.remind().await;
            return Ok(());
        }
        let gone = || VmmError::Ended(VmExit::Unknown);
        let process = self.entry.process.ok_or_else(gone)?;
        let vm = self.shop.vmm.adopt(&self.folder, process).await?;
        self.vm = Some(vm.ok_or_else(gone)?);
        self.slot = self.entry.slot.map(Slot::of);
        if let (Some(slot), Some(slots)) = (&self.slot, &self.shop.slots) {
            slots
                .apply(slot.index, &start::rules_of(&self.request)?)
                .await?;
        }
        // It may have been stopped to be stored. What was stored of it is older than what it is from here on.
        let paused = self.path(PAUSED);
        blocking(move || {
            stored::remove(&paused)?;
            remove_unfinished(&folder)
        })
        .await?;
        let limit = Instant::now() + self.shop.boot_timeout;
        let (guest, over) = loop {
            match self.reach().await {
                Ok(reached) => break reached,
                Err(error @ DriveError::Vmm(VmmError::Ended(_))) => return Err(error),
                Err(error) if Instant::now() >= limit || !process.is_alive() => return Err(error),
                // What runs is not given up because it is slow to answer.
                Err(error) => {
                    tracing::warn!(session_id = self.session.id.short(), %error, "a session is not taken over yet");
                    tokio::time::sleep(REACH_AGAIN).await;
                }
            }
        };
        self.enter_running(guest, over);
        self.remind().await;
        tracing::info!(session_id = self.session.id.short(), "session taken over");
        Ok(())
    }

    /// The registry may not have heard of what was noted before. It knows what it has.
    async fn remind(&self) {
        match self.log.notices().await {
            Ok(notices) => self.shop.hosted.notify(notices),
            Err(error) => {
                tracing::error!(session_id = self.session.id.short(), %error, "the log of a session is not read");
            }
        }
    }
}

fn remove_unfinished(folder: &Path) -> io::Result<()> {
    for parent in [folder.to_owned(), folder.join(CHECKPOINTS)] {
        if !parent.exists() {
            continue;
        }
        for path in folders(&parent)? {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with(UNFINISHED) {
                stored::remove(&path)?;
            }
        }
    }
    Ok(())
}
