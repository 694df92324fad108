//! Snapshots of templates. Each is made once, by a task of its own for all that wait for it; it is given up when nobody does any more.

use std::{
    collections::HashMap,
    panic::AssertUnwindSafe,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use futures::FutureExt as _;
use proto::{
    node::v1::{MakeTemplateSnapshotRequest, StartSessionRequest},
    session::v1::Resources,
    template::v1::Template,
};
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{DriveError, StartOutput, Workshop, blocking, open, start::place};
use crate::{
    guest::GuestClient,
    slot::{NetworkRules, Slot},
    snapshot::{TemplateSnapshot, TemplateSnapshots},
    stored::{self, SCRATCH},
    vmm::{BootSpec, DEVICES, Machine, Vm, VmmError, process},
    work,
};

type Outcome = Result<PathBuf, Arc<DriveError>>;

/// Those that are being made, by their keys.
#[derive(Debug, Default)]
pub struct Makings {
    table: Mutex<HashMap<String, Arc<Making>>>,
    tasks: TaskTracker,
    stop: CancellationToken,
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
pub(super) struct Wanted {
    key: String,
    template: Template,
    resources: Resources,
    kernel: PathBuf,
    rootfs: PathBuf,
    initrd: PathBuf,
}

/// What a boot of a template has taken.
#[derive(Default)]
struct TemplateBoot {
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
        let key = wanted.key.clone();
        let (mut outcome, making) = self.makings.join(&key, listener);
        if let Some(making) = making {
            let make = Arc::clone(self).make_for_all(wanted, making);
            self.makings.tasks.spawn(make);
        }
        let outcome = outcome.wait_for(Option::is_some).await;
        match outcome.as_deref() {
            Ok(Some(Ok(folder))) => Ok(TemplateSnapshot {
                folder: folder.clone(),
                key,
            }),
            Ok(Some(Err(error))) => Err(DriveError::Template(Arc::clone(error))),
            // Its task always says how it ended.
            Ok(None) | Err(_) => Err(DriveError::Stopped),
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
        let kernel = self.artifacts.get("kernel", template.kernel.as_ref());
        let kernel = kernel.await?;
        let rootfs = template.rootfs.as_ref();
        let rootfs = self.artifacts.get("root filesystem", rootfs).await?;
        let modules = self.artifacts.get("modules", template.modules.as_ref());
        let modules = modules.await?;
        let mut initrd = PathBuf::new();
        if let Some(images) = &self.images {
            // A copy of some MiB the first time, a look at a file name after.
            initrd = tokio::task::block_in_place(|| images.initrd(&modules))?;
        }
        let files = [&kernel, &rootfs, &initrd];
        let key = TemplateSnapshots::key(&files, resources, &self.maker, &template);
        Ok(Wanted {
            key,
            template,
            resources,
            kernel,
            rootfs,
            initrd,
        })
    }

    /// Makes it, and leaves nothing behind but that.
    async fn make_for_all(self: Arc<Self>, wanted: Wanted, making: Arc<Making>) {
        // One that was given up may still be cleaned up after.
        let turn = self.snapshots.turn(&wanted.key);
        let _turn = turn.lock().await;
        let mut boot = TemplateBoot::default();
        let threads = TaskTracker::new();
        let make = self.find_or_make(&wanted, &making, &mut boot);
        let make = work::tracked(threads.clone(), Box::pin(make));
        let made = tokio::select! {
            made = AssertUnwindSafe(make).catch_unwind() => {
                Some(made.unwrap_or(Err(DriveError::BrokeOff)))
            }
            () = self.makings.abandoned(&wanted.key, &making) => None,
            () = self.makings.stop.cancelled() => Some(Err(DriveError::Stopped)),
        };
        // What was given up may be written to still.
        work::finished(&threads).await;
        let tidy = self.tidy(&wanted.key, boot, made.as_ref());
        let is_tidy = AssertUnwindSafe(Box::pin(tidy)).catch_unwind().await;
        let made = match is_tidy {
            Ok(()) => made,
            Err(_) => Some(Err(DriveError::BrokeOff)),
        };
        if let Some(made) = made {
            self.makings
                .end(&wanted.key, &making, made.map_err(Arc::new));
        }
    }

    async fn find_or_make(
        &self,
        wanted: &Wanted,
        making: &Making,
        boot: &mut TemplateBoot,
    ) -> Result<PathBuf, DriveError> {
        if let Some(folder) = self.snapshots.find(&wanted.key, &self.maker).await? {
            return Ok(folder);
        }
        self.make(wanted, making, boot).await?;
        if let Some(mut vm) = boot.vm.take() {
            vm.kill().await;
        }
        Ok(self.snapshots.publish(&wanted.key, &self.maker).await?)
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
            key,
            template,
            resources,
            kernel,
            rootfs,
            initrd,
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
