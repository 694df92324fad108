//! From nothing, or from files, to a guest that is the session's.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use proto::{
    node::v1::{StartSessionRequest, StartStep},
    template::v1::Template,
};
use service_kit::kernel_arguments::KernelArguments;
use tokio_util::sync::CancellationToken;

use super::{
    DriveError, Driver, OLDEST_ENVD, Origin, REACH_AGAIN, Stopwatch, TEMPLATE_MEMORY,
    TEMPLATE_ROOTFS, Workshop, blocking, open, remove_file,
};
use crate::{
    disk,
    guest::{Connections, GuestClient},
    hosted::Envd,
    journal::{self, Durability, Step},
    slot::{self, NetworkRules, RuleError, Slot},
    snapshot::TemplateSnapshot,
    stored::SCRATCH,
    vmm::{BootSpec, DEVICES, GuestPlace, MEMORY, Machine, RestoreSpec, VmmError},
};

/// What a guest is restored from.
pub(super) struct Source {
    pub(super) devices: PathBuf,
    pub(super) difference: Option<PathBuf>,
    pub(super) scratch: PathBuf,
}

/// A call may fail a moment before its connection is known to be gone.
async fn is_cut(guest: &GuestClient) -> bool {
    tokio::time::timeout(REACH_AGAIN, guest.closed())
        .await
        .is_ok()
}

impl Driver {
    /// Starts the session, or takes it over.
    pub(super) async fn begin(&mut self, origin: Origin) -> Result<Vec<StartStep>, DriveError> {
        if let Origin::Earlier(entry) = origin {
            self.adopt(entry).await?;
            return Ok(Vec::new());
        }
        self.entry.envd = match &origin {
            Origin::Fork(image) => image.envd().to_owned(),
            _ => self.shop.envd().to_owned(),
        };
        self.note_envd();
        let mut watch = Stopwatch::new();
        let (folder, request) = (self.folder.clone(), self.request.clone());
        blocking(move || {
            fs::create_dir(&folder)?;
            journal::write_request(&folder, &request, Durability::Process)
        })
        .await?;
        let (guest, over) = match origin {
            Origin::Fork(image) => {
                let source = self.take_image(&image).await?;
                self.restore(source, Connections::Reset, &mut watch).await?
            }
            _ if self.shop.vmm.needs_place() => {
                let shop = Arc::clone(&self.shop);
                let wanted = shop.wanted(&self.request).await?;
                watch.lap("artifacts");
                // Until it has names of its own for what stays its, and has read the rest.
                let _pins = wanted.pins.clone();
                let chosen = shop.snapshot_for_session(wanted).await?;
                watch.lap("template");
                let snapshot = &chosen.snapshot;
                self.entry.envd.clone_from(&snapshot.envd);
                self.note_envd();
                let reached = if let Some(reached) = self.take_warm(snapshot, &mut watch).await? {
                    reached
                } else {
                    let source = self.take_template(snapshot, &mut watch).await?;
                    let restored = self.restore(source, self.connections(), &mut watch).await;
                    if let Err(DriveError::Vmm(VmmError::Load(_))) = &restored {
                        shop.does_not_load(&chosen).await;
                    }
                    restored?
                };
                shop.has_served(&chosen);
                reached
            }
            _ => self.simulate(&mut watch).await?,
        };
        self.journal(Step::Running).await?;
        self.enter_running(guest, over);
        tracing::info!(session_id = self.session.id.short(), "session runs");
        Ok(watch.1)
    }

    /// What becomes of connections that are in its template's snapshot: only a start command has any.
    pub(super) fn connections(&self) -> Connections {
        connections_of(self.request.template.as_ref())
    }

    /// Gives the session's folder the memory of its template's snapshot.
    async fn take_template(
        &mut self,
        snapshot: &TemplateSnapshot,
        watch: &mut Stopwatch,
    ) -> Result<Source, DriveError> {
        let (folder, from) = (self.folder.clone(), snapshot.folder.clone());
        blocking(move || link_memory(&from, &folder)).await?;
        watch.lap("snapshot");
        Ok(Source {
            devices: snapshot.folder.join(DEVICES),
            difference: None,
            scratch: snapshot.folder.join(SCRATCH),
        })
    }

    /// A guest without disks and memory, which has nothing to be restored from.
    async fn simulate(
        &mut self,
        watch: &mut Stopwatch,
    ) -> Result<(GuestClient, CancellationToken), DriveError> {
        let spec = BootSpec {
            machine: self.machine(PathBuf::new()),
            kernel: PathBuf::new(),
            initrd: PathBuf::new(),
            arguments: KernelArguments::default(),
        };
        let vm = self.vm.insert(self.shop.vmm.boot(spec).await?);
        let (guest, over) = open(vm.as_mut(), self.shop.boot_timeout).await?;
        watch.lap("boot");
        self.configure(&guest, Connections::Keep).await?;
        watch.lap("configure");
        Ok((guest, over))
    }

    /// From stored state to a guest that is the session's. What was taken is in `self`, whatever comes of it.
    pub(super) async fn restore(
        &mut self,
        source: Source,
        connections: Connections,
        watch: &mut Stopwatch,
    ) -> Result<(GuestClient, CancellationToken), DriveError> {
        // Too many at once would make all of them late.
        let shop = Arc::clone(&self.shop);
        let turn = shop
            .boots
            .acquire()
            .await
            .map_err(|_| DriveError::Stopped)?;
        let limit = self.shop.boot_timeout;
        let restored = tokio::time::timeout(
            limit,
            Box::pin(self.restore_now(source, connections, watch)),
        )
        .await;
        drop(turn);
        restored.map_err(|_| DriveError::Timeout(limit))?
    }

    async fn restore_now(
        &mut self,
        source: Source,
        connections: Connections,
        watch: &mut Stopwatch,
    ) -> Result<(GuestClient, CancellationToken), DriveError> {
        let rootfs = self.rootfs().await?;
        if let Some(slots) = &self.shop.slots {
            let slot = slots.take(&rules_of(&self.request)?).await?;
            self.slot = Some(slot);
            watch.lap("slot");
        }
        // Before the effect: from here on there is something to clean up.
        let step = self.entry.step;
        self.journal(step).await?;
        if self.shop.vmm.needs_place() {
            let scratch = self.path(SCRATCH);
            blocking(move || {
                remove_file(&scratch)?;
                disk::copy(&source.scratch, &scratch)
            })
            .await?;
            watch.lap("disk");
        }
        let spec = RestoreSpec {
            machine: self.machine(rootfs),
            devices: source.devices,
            difference: source.difference,
        };
        self.vm = Some(self.shop.vmm.restore(spec).await?);
        self.journal(step).await?;
        let vm = self.vm.as_mut().ok_or(DriveError::Stopped)?;
        vm.run().await?;
        watch.lap("restore");
        let reached = self.reach_restored(connections, watch).await?;
        watch.lap("configure");
        Ok(reached)
    }

    /// Connects until the guest is configured: that the host it was stored with is gone may reach it late, and costs what is connected by then
    /// (`guest-link`, "Snapshots"). The caller has a limit.
    async fn reach_restored(
        &mut self,
        connections: Connections,
        watch: &mut Stopwatch,
    ) -> Result<(GuestClient, CancellationToken), DriveError> {
        loop {
            let vm = self.vm.as_mut().ok_or(DriveError::Stopped)?;
            let cut = match open(vm.as_mut(), self.shop.boot_timeout).await {
                Ok((guest, over)) => {
                    watch.lap("link");
                    match self.configure(&guest, connections).await {
                        Err(DriveError::Configure(error)) if is_cut(&guest).await => error,
                        configured => return configured.map(|()| (guest, over)),
                    }
                }
                Err(DriveError::Configure(error)) => error,
                Err(error) => return Err(error),
            };
            tracing::warn!(
                session_id = self.session.id.short(),
                error = cut,
                "the link to a restored guest broke, and is made anew"
            );
            tokio::time::sleep(REACH_AGAIN).await;
        }
    }

    pub(super) async fn configure(
        &mut self,
        guest: &GuestClient,
        connections: Connections,
    ) -> Result<(), DriveError> {
        let configured = guest.configure(&self.identity(), connections).await;
        let info =
            configured.map_err(|status| DriveError::Configure(status.message().to_owned()))?;
        // A newer one is no other: what is added to its API takes nothing away.
        if info.api_level < OLDEST_ENVD {
            return Err(DriveError::EnvdTooOld(info.api_level));
        }
        self.envd_restarts = info.envd_restarts;
        Ok(())
    }

    /// Says which envd the session has where its sessions are listed.
    pub(super) fn note_envd(&self) {
        let digest = self.entry.envd.clone();
        self.session.set_envd(Envd {
            is_outdated: !digest.is_empty() && self.shop.envd() != digest,
            digest,
        });
    }

    /// Its root, by the name that is its own; those that have none yet get one.
    async fn rootfs(&self) -> Result<PathBuf, DriveError> {
        if !self.shop.vmm.needs_place() {
            return Ok(PathBuf::new());
        }
        let own = self.path(TEMPLATE_ROOTFS);
        if own.exists() {
            return Ok(own);
        }
        let template = self.request.template.as_ref();
        self.shop.link_rootfs(template, &self.folder).await
    }

    fn machine(&self, rootfs: PathBuf) -> Machine {
        let resources = self.request.resources.unwrap_or_default();
        Machine {
            folder: self.folder.clone(),
            rootfs,
            scratch: self.path(SCRATCH),
            vcpus: resources.vcpus,
            memory_bytes: resources.memory_bytes,
            place: self.slot.as_ref().map(place),
        }
    }
}

impl Workshop {
    /// Gives a guest's folder its template's root, which stays there whatever becomes of the node's.
    pub(super) async fn link_rootfs(
        &self,
        template: Option<&Template>,
        folder: &Path,
    ) -> Result<PathBuf, DriveError> {
        let rootfs = template.and_then(|template| template.rootfs.as_ref());
        let (rootfs, _pin) = self.artifacts.get("root filesystem", rootfs).await?;
        let own = folder.join(TEMPLATE_ROOTFS);
        let name = own.clone();
        blocking(move || fs::hard_link(rootfs, name)).await?;
        Ok(own)
    }
}

/// Where a session may open connections, and how fast.
pub(super) fn rules_of(request: &StartSessionRequest) -> Result<NetworkRules, RuleError> {
    let network = request.network.clone().unwrap_or_default();
    let egress = network.egress.unwrap_or_default();
    NetworkRules::parse(
        network.internet_access.unwrap_or(true),
        &egress.allow,
        &egress.deny,
        network.egress_bytes_per_second,
        network.ingress_bytes_per_second,
    )
}

/// What becomes of connections that are in a template's snapshot: only a start command has any.
pub(super) fn connections_of(template: Option<&Template>) -> Connections {
    if template.is_some_and(|template| template.start.is_some()) {
        Connections::Reset
    } else {
        Connections::Keep
    }
}

/// Gives a folder the root that another has; a session that began before there was such a name has none.
pub(super) fn link_own_rootfs(from: &Path, to: &Path) -> io::Result<()> {
    match fs::hard_link(from.join(TEMPLATE_ROOTFS), to.join(TEMPLATE_ROOTFS)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Gives a guest's folder the memory of its template's snapshot.
pub(super) fn link_memory(snapshot: &Path, folder: &Path) -> io::Result<()> {
    let memory = snapshot.join(MEMORY);
    fs::hard_link(&memory, folder.join(TEMPLATE_MEMORY))?;
    fs::hard_link(&memory, folder.join(MEMORY))
}

/// Where a guest of this slot is.
pub(super) fn place(slot: &Slot) -> GuestPlace {
    GuestPlace {
        slot: slot.index.number(),
        netns: slot.index.namespace_path(),
        tap: slot::TAP.into(),
        mac: slot::GUEST_MAC.into(),
        reach: slot.reach,
    }
}
