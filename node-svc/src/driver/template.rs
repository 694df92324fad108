//! Snapshots of templates. Each is made once, by a task of its own for all that wait for it; it is given up when nobody does any more.
//!
//! ```text
//!   on this node? --no--> with another envd? --no--> in the object store? --no--> boot, start command, store
//!        |                     |                          |                          |
//!        +---------------------+---- sessions are --------+--------------------------+
//!                              |     restored from it                                |
//!                              +-- made anew, while it serves ----------------------+
//! ```

use std::{
    collections::HashMap,
    panic::AssertUnwindSafe,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use futures::FutureExt as _;
use proto::{
    node::v1::{MakeTemplateSnapshotRequest, StartSessionRequest},
    session::v1::Resources,
    template::v1::Template,
};
use service_kit::kernel_arguments::KernelArguments;
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{DriveError, StartOutput, Workshop, blocking, open, start::place};
use crate::{
    cache::{Item, Pin, Room},
    guest::GuestClient,
    slot::{NetworkRules, Slot},
    snapshot::{Origin, SnapshotOf, TemplateSnapshot, TemplateSnapshots},
    snapshot_store::StoredAs,
    stored::{self, SCRATCH},
    vmm::{BootSpec, DEVICES, Machine, Vm, VmmError, process},
    work,
};

/// Between two looks whether no guest starts.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// Snapshots that were used within that time are made anew when there is another envd.
const IN_USE: Duration = Duration::from_hours(7 * 24);
/// After one could not be.
const RENEW_AGAIN: Duration = Duration::from_hours(1);
/// What a snapshot takes beside the guest's memory: devices, and of a disk what is written at a boot.
const BESIDE_MEMORY: u64 = 16 << 20;

type Outcome = Result<PathBuf, Arc<DriveError>>;

/// Those that are being made, by their keys.
#[derive(Debug, Default)]
pub struct Makings {
    table: Mutex<HashMap<String, Arc<Making>>>,
    /// Those that are made anew, or could not be, by their keys.
    renewals: Mutex<HashMap<String, Renewal>>,
    /// Held while one of these is.
    renewing: tokio::sync::Mutex<()>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

/// Of a snapshot that has an earlier envd.
#[derive(Debug)]
enum Renewal {
    UnderWay,
    NotBefore(Instant),
}

/// One that is being made. Whoever waits for it has a receiver.
#[derive(Debug)]
struct Making {
    done: watch::Sender<Option<Outcome>>,
    /// Who hears what a start command says.
    listeners: Mutex<Vec<StartOutput>>,
}

impl Makings {
    fn table(&self) -> MutexGuard<'_, HashMap<String, Arc<Making>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn renewals(&self) -> MutexGuard<'_, HashMap<String, Renewal>> {
        self.renewals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether one is to be made anew now, by whoever asks.
    fn begin_renewal(&self, key: &str) -> bool {
        let mut renewals = self.renewals();
        let now = Instant::now();
        let is_over =
            |renewal: &Renewal| matches!(renewal, Renewal::NotBefore(then) if *then <= now);
        if renewals.get(key).is_some_and(|renewal| !is_over(renewal)) {
            return false;
        }
        renewals.insert(key.to_owned(), Renewal::UnderWay);
        true
    }

    fn end_renewal(&self, key: &str, is_made: bool) {
        let mut renewals = self.renewals();
        if is_made {
            renewals.remove(key);
        } else {
            let then = Instant::now() + RENEW_AGAIN;
            renewals.insert(key.to_owned(), Renewal::NotBefore(then));
        }
    }

    /// Gives all of them up, and waits until nothing of them is left.
    pub async fn stop(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Waits with the others, or as the first.
    fn join(
        &self,
        key: &str,
        listener: Option<StartOutput>,
    ) -> (watch::Receiver<Option<Outcome>>, Option<Arc<Making>>) {
        let mut table = self.table();
        if let Some(making) = table.get(key) {
            making.listeners().extend(listener);
            return (making.done.subscribe(), None);
        }
        let (done, outcome) = watch::channel(None);
        let making = Arc::new(Making {
            done,
            listeners: Mutex::new(listener.into_iter().collect()),
        });
        table.insert(key.to_owned(), Arc::clone(&making));
        (outcome, Some(making))
    }

    /// Returns when nobody waits for it any more; whoever comes after that begins anew.
    async fn abandoned(&self, key: &str, making: &Making) {
        loop {
            making.done.closed().await;
            let mut table = self.table();
            if making.done.receiver_count() == 0 {
                table.remove(key);
                return;
            }
        }
    }

    fn end(&self, key: &str, making: &Arc<Making>, outcome: Outcome) {
        let mut table = self.table();
        if table
            .get(key)
            .is_some_and(|known| Arc::ptr_eq(known, making))
        {
            table.remove(key);
        }
        drop(table);
        making.done.send_replace(Some(outcome));
    }
}

impl Making {
    fn listeners(&self) -> MutexGuard<'_, Vec<StartOutput>> {
        self.listeners
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is to be made.
#[derive(Clone)]
pub(super) struct Wanted {
    of: SnapshotOf,
    template: Template,
    resources: Resources,
    kernel: PathBuf,
    rootfs: PathBuf,
    initrd: PathBuf,
    /// Keep its files here, and the snapshot itself.
    pub(super) pins: [Pin; 4],
    arguments: KernelArguments,
    /// For a session like this, with nothing that is its own.
    request: StartSessionRequest,
}

/// The snapshot that a session is restored from.
pub(super) struct Chosen {
    pub(super) snapshot: TemplateSnapshot,
    /// How other nodes have it, if they may.
    stored: Option<StoredAs>,
    /// Keeps it here.
    _pin: Pin,
}

/// What a boot of a template has taken.
#[derive(Default)]
struct TemplateBoot {
    room: Option<Room>,
    slot: Option<Slot>,
    vm: Option<Box<dyn Vm>>,
}

impl Workshop {
    /// The snapshot that sessions of this shape are restored from; booted and taken the first time.
    pub(super) async fn template_snapshot(
        self: &Arc<Self>,
        wanted: Wanted,
        listener: Option<StartOutput>,
    ) -> Result<TemplateSnapshot, DriveError> {
        let of = wanted.of.clone();
        let (mut outcome, making) = self.makings.join(&of.key, listener);
        if let Some(making) = making {
            let make = Arc::clone(self).make_for_all(wanted, making);
            self.makings.tasks.spawn(make);
        }
        let outcome = outcome.wait_for(Option::is_some).await;
        match outcome.as_deref() {
            Ok(Some(Ok(folder))) => Ok(TemplateSnapshot {
                folder: folder.clone(),
                key: of.key,
                envd: of.envd,
            }),
            Ok(Some(Err(error))) => Err(DriveError::Template(Arc::clone(error))),
            // Its task always says how it ended.
            Ok(None) | Err(_) => Err(DriveError::Stopped),
        }
    }

    /// The same, for a session that does not wait for a boot if one with another envd is there: it is made anew for those that come later.
    pub(super) async fn snapshot_for_session(
        self: &Arc<Self>,
        wanted: Wanted,
    ) -> Result<Chosen, DriveError> {
        if !self.snapshots.is_here(&wanted.of.key)
            && let Some((snapshot, pin)) = self.other_snapshot(&wanted.of).await
        {
            let renew = Arc::clone(self).renew(wanted.of.key, wanted.request);
            self.makings.tasks.spawn(renew);
            return Ok(Chosen {
                snapshot,
                stored: None,
                _pin: pin,
            });
        }
        let stored = self.stored_as(&wanted);
        let pin = self.cache.pin(Item::Snapshot(wanted.of.key.clone()));
        let snapshot = self.template_snapshot(wanted, None).await?;
        Ok(Chosen {
            snapshot,
            stored,
            _pin: pin,
        })
    }

    /// One of the same lineage with another envd, if there is one that can be had.
    async fn other_snapshot(&self, of: &SnapshotOf) -> Option<(TemplateSnapshot, Pin)> {
        for other in self.snapshots.others(of).await {
            let pin = self.cache.pin(Item::Snapshot(other.key.clone()));
            let turn = self.snapshots.turn(&other.key);
            let _turn = turn.lock().await;
            match self.snapshots.find(&other.key, &self.maker).await {
                Ok(Some(_)) => return Some((other, pin)),
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!(snapshot = other.key, %error, "a snapshot with an earlier envd does not serve");
                }
            }
        }
        None
    }

    /// What becomes of a snapshot from which a session was restored: others are to have it.
    pub(super) fn has_served(self: &Arc<Self>, chosen: &Chosen) {
        let (Some(store), Some(stored)) = (&self.store, &chosen.stored) else {
            return;
        };
        let shop = Arc::downgrade(self);
        let quiet = move || {
            let shop = shop.clone();
            async move {
                while let Some(shop) = shop.upgrade() {
                    if shop.is_quiet() {
                        return;
                    }
                    drop(shop);
                    tokio::time::sleep(LOOK_AGAIN).await;
                }
            }
            .boxed()
        };
        let folder = chosen.snapshot.folder.clone();
        store.used(stored.clone(), folder, self.maker.clone(), quiet);
    }

    /// What becomes of one that is whole and cannot be loaded, as when it comes from a host that is less like this one than it says: it is booted the next
    /// time.
    pub(super) async fn does_not_load(&self, chosen: &Chosen) {
        let key = &chosen.snapshot.key;
        tracing::error!(
            snapshot = key,
            "a template's snapshot cannot be loaded; it is made anew"
        );
        if let (Some(store), Some(stored)) = (&self.store, &chosen.stored) {
            store.distrust(stored);
        }
        let turn = self.snapshots.turn(key);
        let _turn = turn.lock().await;
        if let Err(error) = self.snapshots.discard(key).await {
            tracing::error!(snapshot = key, %error, "it stays");
        }
        if let Err(error) = self.cache.added(&Item::Snapshot(key.clone())) {
            tracing::error!(snapshot = key, %error, "it is counted still");
        }
    }

    /// How it is stored for other nodes, if it is.
    fn stored_as(&self, wanted: &Wanted) -> Option<StoredAs> {
        let (store, SnapshotOf { key, envd, .. }) = (self.store.as_ref()?, &wanted.of);
        let (template, resources) = (&wanted.template, wanted.resources);
        StoredAs::new(store.host(), key, template, resources, envd)
    }

    /// Whether no guest starts.
    pub(super) fn is_quiet(&self) -> bool {
        self.boots.available_permits() >= self.parallel_boots
    }

    /// Makes a snapshot anew that an earlier envd is in, when no guest starts and there is room for one more.
    async fn renew(self: Arc<Self>, key: String, request: StartSessionRequest) {
        if !self.makings.begin_renewal(&key) {
            return;
        }
        let renew = async {
            // One after the other.
            let _turn = self.makings.renewing.lock().await;
            while !self.is_quiet() {
                tokio::time::sleep(LOOK_AGAIN).await;
            }
            if self.snapshots.is_here(&key) {
                return Ok(());
            }
            // A session that needs it has been let in; this has not.
            let _room = self.hosted.reserve(request.resources.unwrap_or_default())?;
            let wanted = self.wanted(&request).await?;
            self.template_snapshot(wanted, None).await?;
            tracing::info!(snapshot = key, "a template's snapshot has this envd now");
            Ok::<_, DriveError>(())
        };
        let renewed = tokio::select! {
            renewed = renew => renewed,
            () = self.makings.stop.cancelled() => Ok(()),
        };
        if let Err(error) = &renewed {
            tracing::warn!(snapshot = key, %error, "a template's snapshot keeps its earlier envd for now");
        }
        self.makings.end_renewal(&key, renewed.is_ok());
    }

    /// Makes those anew that are in use and have another envd than this node, or are another VMM's or CPU's.
    pub async fn renew_snapshots(self: Arc<Self>, shutdown: CancellationToken) {
        let Some(images) = &self.images else {
            return;
        };
        let since = SystemTime::now() - IN_USE;
        let outdated = tokio::task::block_in_place(|| {
            // A week is a guess: what goes wrong with it is told, and nothing else.
            self.snapshots.outdated(images.envd(), &self.maker, since)
        });
        let outdated = outdated.unwrap_or_else(|error| {
            tracing::error!(%error, "outdated snapshots are not looked for");
            Vec::new()
        });
        for MakeTemplateSnapshotRequest {
            template,
            resources,
        } in outdated
        {
            let request = StartSessionRequest {
                template,
                resources,
                ..StartSessionRequest::default()
            };
            let renew = async {
                match self.wanted(&request).await {
                    Ok(wanted) => Arc::clone(&self).renew(wanted.of.key, request).await,
                    // Its template is gone, or template-svc is not there yet: its next session does it.
                    Err(error) => {
                        tracing::warn!(%error, "a template's snapshot keeps its earlier envd");
                    }
                }
            };
            tokio::select! {
                () = renew => {}
                () = shutdown.cancelled() => return,
            }
        }
    }

    /// The same, for nobody yet.
    pub async fn make_snapshot(
        self: &Arc<Self>,
        request: MakeTemplateSnapshotRequest,
        listener: StartOutput,
    ) -> Result<(), DriveError> {
        if !self.vmm.needs_place() {
            return Ok(());
        }
        // A session that needs it has been let in; this has not.
        let _room = self.hosted.reserve(request.resources.unwrap_or_default())?;
        let request = StartSessionRequest {
            template: request.template,
            resources: request.resources,
            ..StartSessionRequest::default()
        };
        let wanted = self.wanted(&request).await?;
        self.template_snapshot(wanted, Some(listener)).await?;
        Ok(())
    }

    /// What a session's snapshot is of, with the files for it.
    pub(super) async fn wanted(&self, request: &StartSessionRequest) -> Result<Wanted, DriveError> {
        let template = request.template.clone().unwrap_or_default();
        let resources = request.resources.unwrap_or_default();
        let arguments = KernelArguments::parse(&template.kernel_arguments)?;
        let kernel = self.artifacts.get("kernel", template.kernel.as_ref());
        let (kernel, kernel_pin) = kernel.await?;
        let rootfs = template.rootfs.as_ref();
        let (rootfs, rootfs_pin) = self.artifacts.get("root filesystem", rootfs).await?;
        let modules = self.artifacts.get("modules", template.modules.as_ref());
        let (modules, modules_pin) = modules.await?;
        let mut initrd = PathBuf::new();
        if let Some(images) = &self.images {
            // A copy of some MiB the first time, a look at a file name after.
            initrd = tokio::task::block_in_place(|| images.initrd(&modules))?;
        }
        let key_of =
            |files: &[&PathBuf]| TemplateSnapshots::key(files, resources, &self.maker, &template);
        let of = SnapshotOf {
            key: key_of(&[&kernel, &rootfs, &initrd]),
            lineage: key_of(&[&kernel, &rootfs, &modules]),
            envd: self.envd().to_owned(),
        };
        let pin = self.cache.pin(Item::Snapshot(of.key.clone()));
        Ok(Wanted {
            of,
            request: StartSessionRequest {
                template: Some(template.clone()),
                resources: Some(resources),
                ..StartSessionRequest::default()
            },
            template,
            resources,
            kernel,
            rootfs,
            initrd,
            pins: [kernel_pin, rootfs_pin, modules_pin, pin],
            arguments,
        })
    }

    /// Makes it, and leaves nothing behind but that.
    async fn make_for_all(self: Arc<Self>, wanted: Wanted, making: Arc<Making>) {
        // One that was given up may still be cleaned up after.
        let turn = self.snapshots.turn(&wanted.of.key);
        let _turn = turn.lock().await;
        let mut boot = TemplateBoot::default();
        let threads = TaskTracker::new();
        let make = self.find_or_make(&wanted, &making, &mut boot);
        let make = work::tracked(threads.clone(), Box::pin(make));
        let made = tokio::select! {
            made = AssertUnwindSafe(make).catch_unwind() => {
                Some(made.unwrap_or(Err(DriveError::BrokeOff)))
            }
            () = self.makings.abandoned(&wanted.of.key, &making) => None,
            () = self.makings.stop.cancelled() => Some(Err(DriveError::Stopped)),
        };
        // What was given up may be written to still.
        work::finished(&threads).await;
        let tidy = self.tidy(&wanted.of.key, boot, made.as_ref());
        let is_tidy = AssertUnwindSafe(Box::pin(tidy)).catch_unwind().await;
        // It is there now, or one that was damaged is not.
        if let Err(error) = self.cache.added(&Item::Snapshot(wanted.of.key.clone())) {
            tracing::error!(%error, "a template's snapshot is counted by the next node-svc only");
        }
        let made = match is_tidy {
            Ok(()) => made,
            Err(_) => Some(Err(DriveError::BrokeOff)),
        };
        if let Some(made) = made {
            self.makings
                .end(&wanted.of.key, &making, made.map_err(Arc::new));
        }
    }

    async fn find_or_make(
        &self,
        wanted: &Wanted,
        making: &Making,
        boot: &mut TemplateBoot,
    ) -> Result<PathBuf, DriveError> {
        let key = &wanted.of.key;
        if let Some(folder) = self.snapshots.find(key, &self.maker).await? {
            return Ok(folder);
        }
        let memory = wanted.resources.memory_bytes;
        let bytes = memory.saturating_add(BESIDE_MEMORY);
        boot.room = Some(self.cache.make_room(bytes).await);
        if !self.fetch(wanted).await? {
            self.make(wanted, making, boot).await?;
            if let Some(mut vm) = boot.vm.take() {
                vm.kill().await;
            }
        }
        let origin = Origin::new(&wanted.of, &wanted.template, wanted.resources);
        let folder = self.snapshots.making(key);
        blocking(move || origin.write(&folder)).await?;
        Ok(self.snapshots.publish(key, &self.maker).await?)
    }

    /// Fetches it from the object store; whether it was there.
    async fn fetch(&self, wanted: &Wanted) -> Result<bool, DriveError> {
        let (Some(store), Some(stored)) = (&self.store, self.stored_as(wanted)) else {
            return Ok(false);
        };
        let folder = self.snapshots.begin(&wanted.of.key)?;
        match store.fetch(&stored, &folder).await {
            Ok(is_there) => Ok(is_there),
            Err(error) => {
                let key = &wanted.of.key;
                tracing::warn!(snapshot = key, %error, "the store does not have a snapshot, so it is booted");
                Ok(false)
            }
        }
    }

    /// Ends its VM, gives its network place back, and removes what is half made.
    async fn tidy(
        &self,
        key: &str,
        mut boot: TemplateBoot,
        made: Option<&Result<PathBuf, DriveError>>,
    ) {
        if let Some(vm) = &mut boot.vm {
            // A start command that fails says why itself.
            let is_dark = !matches!(made, Some(Ok(_) | Err(DriveError::StartCommand { .. })));
            if is_dark && made.is_some() {
                let console = vm.last_words().await.to_string();
                tracing::error!(console, "a template did not boot");
            }
            vm.kill().await;
        }
        let is_made = matches!(made, Some(Ok(_)));
        let folder = self.snapshots.making(key);
        let remove = move || {
            if is_made {
                return Ok(());
            }
            // It may have been given up while its VMM was started.
            process::kill_all_below(&folder)?;
            stored::remove(&folder)
        };
        let removed = blocking(remove).await;
        if let (Some(slot), Some(slots)) = (boot.slot.take(), &self.slots) {
            slots.give_back(slot.index).await;
        }
        if let Err(error) = removed {
            tracing::error!(%error, "what is left of a template's snapshot is removed by the next node-svc");
        }
    }

    async fn make(
        &self,
        wanted: &Wanted,
        making: &Making,
        boot: &mut TemplateBoot,
    ) -> Result<(), DriveError> {
        let Wanted {
            of: SnapshotOf { key, .. },
            template,
            resources,
            kernel,
            rootfs,
            initrd,
            pins: _,
            arguments,
            request: _,
        } = wanted;
        let folder = self.snapshots.begin(key)?;
        let devices = folder.join(DEVICES);
        let spec = BootSpec {
            machine: Machine {
                scratch: folder.join(SCRATCH),
                folder,
                rootfs: rootfs.clone(),
                vcpus: resources.vcpus,
                memory_bytes: resources.memory_bytes,
                place: None,
            },
            kernel: kernel.clone(),
            initrd: initrd.clone(),
            arguments: arguments.clone(),
        };
        let limit = self.boot_timeout;
        let late = |_| DriveError::Timeout(limit);
        // As sessions have it unless they say otherwise.
        let rules = NetworkRules::internet(template.start.is_some());
        let turn = self.boots.acquire().await;
        let turn = turn.map_err(|_| DriveError::Stopped)?;
        let booted = self.boot_template(spec, resources.disk_bytes, &rules, boot);
        let booted = tokio::time::timeout(limit, Box::pin(booted)).await;
        let (guest, over) = booted.map_err(late)??;
        let vm = boot.vm.as_mut().ok_or(DriveError::Stopped)?;
        let mut turn = Some(turn);
        if let Some(start) = &template.start {
            // It may take minutes, and others are to boot meanwhile.
            turn = None;
            let heard = || making.listeners().clone();
            let run = self.start_command(&guest, template, start, &heard);
            tokio::select! {
                run = Box::pin(run) => run?,
                exit = vm.wait() => return Err(VmmError::Ended(exit).into()),
            }
        }
        if turn.is_none() {
            let again = self.boots.acquire().await;
            turn = Some(again.map_err(|_| DriveError::Stopped)?);
        }
        let store = async {
            guest
                .prepare_snapshot(&self.nameservers)
                .await
                .map_err(|status| DriveError::Prepare(status.message().to_owned()))?;
            vm.pause().await?;
            vm.store_devices(&devices).await?;
            Ok(())
        };
        let stored = tokio::time::timeout(limit, Box::pin(store)).await;
        drop(turn);
        over.cancel();
        stored.map_err(late)?
    }

    async fn boot_template(
        &self,
        mut spec: BootSpec,
        disk_bytes: u64,
        rules: &NetworkRules,
        boot: &mut TemplateBoot,
    ) -> Result<(GuestClient, CancellationToken), DriveError> {
        tokio::task::block_in_place(|| self.disks.make(disk_bytes, &spec.machine.scratch))?;
        if let Some(slots) = &self.slots {
            let slot = boot.slot.insert(slots.take(rules).await?);
            spec.machine.place = Some(place(slot));
        }
        let vm = boot.vm.insert(self.vmm.boot(spec).await?);
        open(vm.as_mut(), self.boot_timeout).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_is_made_for_all_that_wait_and_given_up_with_the_last() {
        let makings = Arc::new(Makings::default());
        let (first, making) = makings.join("k", None);
        let making = making.unwrap();
        let (mut second, none) = makings.join("k", None);
        assert!(none.is_none());
        let given_up = tokio::spawn({
            let (makings, making) = (Arc::clone(&makings), Arc::clone(&making));
            async move { makings.abandoned("k", &making).await }
        });
        drop(first);
        tokio::task::yield_now().await;
        assert!(!given_up.is_finished());
        makings.end("k", &making, Ok("/made".into()));
        let outcome = second.wait_for(Option::is_some).await.unwrap().clone();
        assert_eq!(outcome.unwrap().unwrap(), PathBuf::from("/made"));
        // What was ended is begun anew, and what nobody waits for goes.
        let (third, making) = makings.join("k", None);
        let making = making.unwrap();
        drop((second, third));
        makings.abandoned("k", &making).await;
        let (_fourth, begun) = makings.join("k", None);
        let begun = begun.unwrap();
        // An end that comes late is nobody's else.
        makings.end("k", &making, Ok("/late".into()));
        assert!(makings.join("k", None).1.is_none());
        drop(begun);
        given_up.abort();
    }
}
