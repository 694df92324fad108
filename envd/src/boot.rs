//! From a bare kernel to a system: modules, file systems, overlay root. Runs once, as PID 1, before anything else.
//!
//! The root is an overlay: the template's read-only image below, the session's own disk above. The tools are the kernel's own calls;
//! nothing of the template is run.

use std::{
    fs::{self, File},
    io,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant, SystemTime},
};

use nix::{
    kmod::{ModuleInitFlags, finit_module},
    mount::{MsFlags, mount},
    unistd::{chdir, chroot},
};
use rustix::fs::FileType;

use crate::{Failure, devices::Device, freezer::free_memory, logs};

const MODULES: &str = "/modules";
/// The hierarchy is envd's to divide.
pub(crate) const CGROUPS: &str = "/sys/fs/cgroup";
/// 128 KiB. The kernel's default, 2 MiB, finds little in a small guest whose memory is in pieces; much smaller ones are many calls to the
/// host for few bytes.
const REPORTED_ORDER: &str = "5";
/// Of the memory that is free at the start, what /dev/shm and /run may take.
const SHARED_PART: u64 = 3;
const RUN_PART: u64 = 10;
const LINK_NAME: &str = "sandmesh.link";
/// A socket device by its number (virtio 1.2, 5.10).
const VSOCK_DEVICE: &str = "0x0013";
const DEVICES_LIMIT: Duration = Duration::from_secs(10);
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// What the guest link runs over.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum LinkDevice {
    /// A virtio-serial port.
    Port(PathBuf),
    /// The vsock; Firecracker has no ports.
    Vsock,
}

/// Brings the system up; returns what the guest link runs over.
pub(crate) fn bring_up() -> Result<LinkDevice, Failure> {
    mount_new("proc", "proc", "/proc", "")?;
    mount_new("sysfs", "sysfs", "/sys", "")?;
    mount_new("devtmpfs", "devtmpfs", "/dev", "mode=0755")?;
    load_modules()?;
    let rootfs = wait_for("the root image", || block_device("rootfs", "1"))?;
    let scratch = wait_for("the writable disk", scratch_device)?;
    let link = wait_for("the guest link", link_device)?;
    mount_root(&rootfs, &scratch)?;
    mount_rest()?;
    report_free_memory();
    // The daemon is the last thing to go when memory is short; its children get a 0 again when they are started.
    fs::write("/proc/self/oom_score_adj", "-1000")?;
    Ok(link)
}

/// Makes a folder that something is mounted at, if it is not there. It does not tell when this guest began: it may become a part of a template.
fn mount_point(path: impl AsRef<Path>) -> io::Result<()> {
    let path = path.as_ref();
    if path.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(path)?;
    File::open(path)?.set_modified(SystemTime::UNIX_EPOCH)
}

fn mount_new(source: &str, kind: &str, target: &str, options: &str) -> Result<(), Failure> {
    mount_point(target)?;
    let flags = if matches!(kind, "proc" | "sysfs" | "cgroup2") {
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC
    } else {
        MsFlags::MS_NOSUID
    };
    mount(Some(source), target, Some(kind), flags, Some(options))
        .map_err(|error| format!("mount {target}: {error}").into())
}

/// In the order of their names, in which each follows what it needs.
fn load_modules() -> Result<(), Failure> {
    let mut paths: Vec<PathBuf> = fs::read_dir(MODULES)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<io::Result<_>>()?;
    paths.sort();
    for path in paths {
        let file = File::open(&path)?;
        match finit_module(file.as_fd(), c"", ModuleInitFlags::empty()) {
            // There already, or for a device this machine cannot have.
            Ok(()) | Err(nix::errno::Errno::EEXIST | nix::errno::Errno::ENODEV) => {}
            Err(error) => return Err(format!("module {}: {error}", path.display()).into()),
        }
    }
    Ok(())
}

/// Devices appear a moment after their driver; before user space runs there is nobody to wait for but the clock.
fn wait_for<T>(what: &str, find: impl Fn() -> Option<T>) -> Result<T, Failure> {
    let limit = Instant::now() + DEVICES_LIMIT;
    loop {
        if let Some(found) = find() {
            return Ok(found);
        }
        if Instant::now() > limit {
            return Err(format!("{what} did not appear").into());
        }
        thread::sleep(LOOK_AGAIN);
    }
}

fn names(folder: &str) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

/// By its serial number; Firecracker makes those up, but of the two disks one is read-only.
fn block_device(serial: &str, read_only: &str) -> Option<PathBuf> {
    let path = Path::new("/dev").join(block_name(serial, read_only)?);
    path.exists().then_some(path)
}

fn block_name(serial: &str, read_only: &str) -> Option<String> {
    let disks = names("/sys/block");
    let reads = |name: &str, field: &str, wanted: &str| {
        fs::read_to_string(format!("/sys/block/{name}/{field}"))
            .is_ok_and(|text| text.trim() == wanted)
    };
    let by_serial = disks.iter().find(|name| reads(name, "serial", serial));
    let name = by_serial.or_else(|| {
        disks
            .iter()
            .find(|name| name.starts_with("vd") && reads(name, "ro", read_only))
    });
    name.cloned()
}

const SCRATCH: (&str, &str) = ("scratch", "0");

fn scratch_device() -> Option<PathBuf> {
    block_device(SCRATCH.0, SCRATCH.1)
}

/// The session's own disk, whatever is left in `/dev`.
pub(crate) fn scratch_disk() -> io::Result<Device> {
    let gone = || io::Error::new(io::ErrorKind::NotFound, "no writable disk");
    let name = block_name(SCRATCH.0, SCRATCH.1).ok_or_else(gone)?;
    let numbers = fs::read_to_string(format!("/sys/block/{name}/dev"))?;
    let parsed = numbers.trim().split_once(':').and_then(|(major, minor)| {
        let [major, minor] = [major.parse().ok()?, minor.parse().ok()?];
        Some((major, minor))
    });
    let (major, minor) = parsed.ok_or_else(gone)?;
    Device::new(FileType::BlockDevice, major, minor)
}

fn link_device() -> Option<LinkDevice> {
    let port = names("/sys/class/virtio-ports").into_iter().find(|name| {
        fs::read_to_string(format!("/sys/class/virtio-ports/{name}/name"))
            .is_ok_and(|text| text.trim() == LINK_NAME)
    });
    if let Some(port) = port {
        let path = Path::new("/dev").join(port);
        return path.exists().then_some(LinkDevice::Port(path));
    }
    // A machine with a console has a port, which may not be there yet.
    let virtio = "/sys/bus/virtio/drivers";
    if !names(&format!("{virtio}/virtio_console"))
        .iter()
        .any(|name| name.starts_with("virtio"))
    {
        let vsock = names(&format!("{virtio}/vmw_vsock_virtio_transport"));
        let is_vsock = |name: &String| {
            let device = fs::read_to_string(format!("/sys/bus/virtio/devices/{name}/device"));
            device.is_ok_and(|device| device.trim() == VSOCK_DEVICE)
        };
        return vsock.iter().any(is_vsock).then_some(LinkDevice::Vsock);
    }
    None
}

fn mount_root(rootfs: &Path, scratch: &Path) -> Result<(), Failure> {
    let failed = |what: &'static str| move |error: nix::Error| format!("mount {what}: {error}");
    for folder in ["/lower", "/scratch", "/newroot"] {
        fs::create_dir_all(folder)?;
    }
    mount(
        Some(rootfs),
        "/lower",
        Some("erofs"),
        MsFlags::MS_RDONLY,
        None::<&str>,
    )
    .map_err(failed("root image"))?;
    mount(
        Some(scratch),
        "/scratch",
        Some("ext4"),
        MsFlags::MS_NOATIME,
        None::<&str>,
    )
    .map_err(failed("writable disk"))?;
    for folder in ["/scratch/upper", "/scratch/work"] {
        fs::create_dir_all(folder)?;
    }
    let options = "lowerdir=/lower,upperdir=/scratch/upper,workdir=/scratch/work";
    mount(
        Some("overlay"),
        "/newroot",
        Some("overlay"),
        MsFlags::empty(),
        Some(options),
    )
    .map_err(failed("overlay"))?;
    for folder in ["proc", "sys", "dev"] {
        let target = Path::new("/newroot").join(folder);
        mount_point(&target)?;
        let source = Path::new("/").join(folder);
        mount(
            Some(&source),
            &target,
            None::<&str>,
            MsFlags::MS_MOVE,
            None::<&str>,
        )
        .map_err(failed("move"))?;
    }
    // The initial RAM disk's memory comes back once nothing names its files.
    fs::remove_dir_all(MODULES)?;
    chdir("/newroot")?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).map_err(failed("root"))?;
    chroot(".")?;
    chdir("/")?;
    Ok(())
}

fn mount_rest() -> Result<(), Failure> {
    mount_new(
        "devpts",
        "devpts",
        "/dev/pts",
        "gid=5,mode=620,ptmxmode=666",
    )?;
    // What envd writes there for a client is not the memory of users' processes, so no limit of theirs holds it: without one of its own it could
    // take all there is, until the kernel finds nobody left to kill.
    let size =
        |part: u64| free_memory().map_or_else(|| "10%".into(), |free| (free / part).to_string());
    mount_new(
        "tmpfs",
        "tmpfs",
        "/dev/shm",
        &format!("mode=1777,size={}", size(SHARED_PART)),
    )?;
    mount_new(
        "tmpfs",
        "tmpfs",
        "/run",
        &format!("mode=0755,size={}", size(RUN_PART)),
    )?;
    // A process is put into a cgroup at each start, which without this option waits for all processors (cgroup-v2.rst; Linux 6.0).
    mount_new("cgroup2", "cgroup2", CGROUPS, "favordynmods")
        .or_else(|_| mount_new("cgroup2", "cgroup2", CGROUPS, ""))?;
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        if !Path::new(link).exists() {
            std::os::unix::fs::symlink(target, link)?;
        }
    }
    Ok(())
}

/// Tells the kernel from which size on free memory is told to the host. A kernel or a VMM without free page reporting loses nothing but that.
fn report_free_memory() {
    let parameter = "/sys/module/page_reporting/parameters/page_reporting_order";
    if let Err(error) = fs::write(parameter, REPORTED_ORDER)
        && error.kind() != io::ErrorKind::NotFound
    {
        logs::warn(format_args!(
            "free memory is reported in large pieces only: {error}"
        ));
    }
}
