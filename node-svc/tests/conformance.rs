//! What every VMM has to do, whichever it is: boot, be stored, be restored, go on, be taken over, end.
//!
//! `fake` is always tried. The others need root, a guest and themselves, so they are run on request:
//!
//! ```sh
//! SANDMESH_CONFORMANCE_KERNEL=FOLDER   # vmlinux and modules.cpio, as deploy/guest-kernel makes them
//! SANDMESH_CONFORMANCE_ROOTFS=FILE     # EROFS
//! SANDMESH_ENVD=FILE                   # deploy/build-envd
//! cargo nextest run -p node-svc --test conformance --run-ignored all
//! ```
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use node_svc::{
    disk::Disks,
    guest::{Connections, GuestClient, Identity},
    guest_image::GuestImages,
    slot::{self, NetworkRules, Slot, SlotConfig, SlotPool},
    vmm::{
        BootSpec, DEVICES, GuestPlace, MEMORY, MEMORY_DIFFERENCE, Machine, RestoreSpec, Vm, Vmm,
        fake::Fake,
        firecracker::{Firecracker, MemoryChoice, Options},
        qemu::Qemu,
    },
};
use service_kit::{ids::SessionId, kernel_arguments::KernelArguments};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

const BOOT_LIMIT: Duration = Duration::from_mins(2);
const MEMORY_BYTES: u64 = 128 << 20;

/// Where guests are made: a node's state folder, and files of a template where guests are real.
struct Bench {
    folder: TempDir,
    slots: Option<SlotPool>,
    kernel: PathBuf,
    initrd: PathBuf,
    rootfs: PathBuf,
}

impl Bench {
    fn simulated() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            slots: None,
            kernel: PathBuf::new(),
            initrd: PathBuf::new(),
            rootfs: PathBuf::new(),
        }
    }

    fn real() -> Self {
        let given = |name: &str| {
            PathBuf::from(std::env::var_os(name).unwrap_or_else(|| panic!("{name} is not set")))
        };
        let kernel = given("SANDMESH_CONFORMANCE_KERNEL");
        let folder = tempfile::Builder::new()
            .prefix("sm")
            .tempdir_in("/tmp")
            .unwrap();
        let images =
            GuestImages::open(folder.path().join("images"), &given("SANDMESH_ENVD")).unwrap();
        let initrd = images.initrd(&kernel.join("modules.cpio")).unwrap();
        let slots = SlotConfig {
            capacity: 4,
            ..SlotConfig::new(folder.path().to_owned(), 0)
        };
        Self {
            slots: Some(SlotPool::open(&slots, &BTreeSet::new()).unwrap()),
            kernel: kernel.join("vmlinux"),
            initrd,
            rootfs: given("SANDMESH_CONFORMANCE_ROOTFS"),
            folder,
        }
    }

    async fn slot(&self) -> Option<Slot> {
        match &self.slots {
            Some(slots) => Some(slots.take(&NetworkRules::internet(false)).await.unwrap()),
            None => None,
        }
    }

    async fn give_back(&self, slot: Option<Slot>) {
        if let (Some(slots), Some(slot)) = (&self.slots, slot) {
            slots.give_back(slot.index).await;
        }
    }

    fn machine(&self, name: &str, slot: Option<&Slot>, scratch: Option<&Path>) -> Machine {
        let folder = self.folder.path().join(name);
        fs::create_dir(&folder).unwrap();
        let disk = folder.join("scratch.ext4");
        match (&self.slots, scratch) {
            (_, Some(scratch)) => node_svc::disk::copy(scratch, &disk).unwrap(),
            (Some(_), None) => {
                let disks = Disks::open(self.folder.path().join("disks")).unwrap();
                disks.make(64 << 20, &disk).unwrap();
            }
            (None, None) => fs::write(&disk, "").unwrap(),
        }
        Machine {
            rootfs: self.rootfs.clone(),
            scratch: disk,
            folder,
            vcpus: 1,
            memory_bytes: MEMORY_BYTES,
            place: slot.map(|slot| GuestPlace {
                slot: slot.index.number(),
                netns: slot.index.namespace_path(),
                tap: slot::TAP.into(),
                mac: slot::GUEST_MAC.into(),
                reach: slot.reach,
            }),
        }
    }

    fn restore_spec(&self, name: &str, from: &Machine, slot: Option<&Slot>) -> RestoreSpec {
        let machine = self.machine(name, slot, Some(&from.scratch));
        if from.folder.join(MEMORY).exists() {
            fs::hard_link(from.folder.join(MEMORY), machine.folder.join(MEMORY)).unwrap();
        }
        RestoreSpec {
            machine,
            devices: from.folder.join(DEVICES),
            difference: None,
        }
    }
}

async fn reach(vm: &mut dyn Vm) -> (GuestClient, CancellationToken) {
    let link = vm.connect(Instant::now() + BOOT_LIMIT).await.unwrap();
    let stop = CancellationToken::new();
    (GuestClient::open(link, stop.clone()).await.unwrap(), stop)
}

async fn configure(guest: &GuestClient) {
    let identity = Identity {
        session_id: SessionId::parse("abcde01234567890123456789").unwrap(),
        env: [].into(),
        default_user: String::new(),
        nameservers: Vec::new(),
        template: String::new(),
        machine_id: vec![7; 16],
    };
    guest.configure(&identity, Connections::Keep).await.unwrap();
}

async fn conforms(vmm: &dyn Vmm, bench: &Bench) {
    // A template: booted, prepared, stored.
    let slot = bench.slot().await;
    let template = bench.machine("template", slot.as_ref(), None);
    let spec = BootSpec {
        machine: template.clone(),
        kernel: bench.kernel.clone(),
        initrd: bench.initrd.clone(),
        arguments: KernelArguments::default(),
    };
    let mut vm = vmm.boot(spec).await.unwrap();
    let (guest, _stop) = reach(vm.as_mut()).await;
    guest.prepare_snapshot(&[]).await.unwrap();
    vm.pause().await.unwrap();
    vm.store_devices(&template.folder.join(DEVICES))
        .await
        .unwrap();
    vm.kill().await;
    bench.give_back(slot).await;
    if vmm.needs_place() {
        let memory = fs::metadata(template.folder.join(MEMORY)).unwrap();
        assert_eq!(
            memory.len(),
            MEMORY_BYTES,
            "it is whole once devices are stored"
        );
    }

    // A session: restored, configured, stored, and it goes on.
    let slot = bench.slot().await;
    let spec = bench.restore_spec("session", &template, slot.as_ref());
    let session = spec.machine.clone();
    let mut vm = vmm.restore(spec).await.unwrap();
    vm.run().await.unwrap();
    let (mut guest, mut stop) = reach(vm.as_mut()).await;
    configure(&guest).await;
    guest.prepare_snapshot(&[]).await.unwrap();
    vm.pause().await.unwrap();
    let stored = bench.folder.path().join("stored");
    fs::create_dir(&stored).unwrap();
    let difference = stored.join(MEMORY_DIFFERENCE);
    vm.store_devices(&stored.join(DEVICES)).await.unwrap();
    vm.store_memory(&template.folder.join(MEMORY), &difference)
        .await
        .unwrap();
    let disk = stored.join("scratch.ext4");
    node_svc::disk::copy(&session.scratch, &disk).unwrap();
    vm.run().await.unwrap();
    if !vm.link_outlives_store() {
        stop.cancel();
        (guest, stop) = reach(vm.as_mut()).await;
    }
    configure(&guest).await;

    // The next node-svc takes it over, under another name, and ends it.
    if let Some(process) = vm.process() {
        stop.cancel();
        drop((vm, guest));
        let moved = bench.folder.path().join("moved");
        fs::rename(&session.folder, &moved).unwrap();
        vm = vmm.adopt(&moved, process).await.unwrap().expect("it lives");
        let (guest, _stop) = reach(vm.as_mut()).await;
        configure(&guest).await;
        vm.kill().await;
        assert!(vmm.adopt(&moved, process).await.unwrap().is_none());
    } else {
        vm.kill().await;
    }
    bench.give_back(slot).await;

    // What was stored is restored by what differs.
    let slot = bench.slot().await;
    let mut spec = bench.restore_spec("again", &template, slot.as_ref());
    node_svc::disk::copy(&disk, &spec.machine.folder.join("disk")).unwrap();
    fs::rename(spec.machine.folder.join("disk"), &spec.machine.scratch).unwrap();
    spec.devices = stored.join(DEVICES);
    spec.difference = Some(difference);
    let mut vm = vmm.restore(spec).await.unwrap();
    vm.run().await.unwrap();
    let (guest, _stop) = reach(vm.as_mut()).await;
    configure(&guest).await;
    vm.kill().await;
    bench.give_back(slot).await;

    // What is no stored state is refused, and leaves nothing that runs.
    let slot = bench.slot().await;
    let mut spec = bench.restore_spec("damaged", &template, slot.as_ref());
    spec.devices = bench.folder.path().join("damaged-devices");
    fs::write(&spec.devices, "damaged").unwrap();
    let folder = spec.machine.folder.clone();
    assert!(vmm.restore(spec).await.is_err());
    assert!(!folder.join("jail").exists());
    bench.give_back(slot).await;
    if let Some(slots) = &bench.slots {
        slots.remove_all().unwrap();
    }
}

#[tokio::test]
async fn fake_conforms() {
    conforms(&Fake::default(), &Bench::simulated()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs QEMU, root and a guest"]
async fn qemu_conforms() {
    let qemu = Qemu::probe(Path::new("qemu-system-x86_64"), None, true).unwrap();
    conforms(&qemu, &Bench::real()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Firecracker, KVM, root and a guest"]
async fn firecracker_conforms() {
    let program = |variable: &str, name: &str| {
        PathBuf::from(std::env::var_os(variable).unwrap_or_else(|| name.into()))
    };
    let bench = Bench::real();
    let firecracker = Firecracker::open(Options {
        firecracker: program("SANDMESH_FIRECRACKER", "firecracker"),
        jailer: program("SANDMESH_JAILER", "jailer"),
        uids: "1900000000-1900032767".parse().unwrap(),
        memory: MemoryChoice::File,
        console: true,
        state: bench.folder.path().to_owned(),
        kvm: "/dev/kvm".into(),
        mounts: "/proc/mounts".into(),
    })
    .unwrap();
    conforms(&firecracker, &bench).await;
}
