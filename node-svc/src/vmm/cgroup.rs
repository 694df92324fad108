//! A cgroup (v2) for each guest's VMM: how much of the host it may take, and whether the host ended it for taking too much.
//!
//! All of it is by files of Documentation/admin-guide/cgroup-v2.rst. Where a host has no such controllers (they are all with cgroup v1), VMMs
//! run without limits, and the node says so when it starts.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

/// Beyond the guest's own memory: the VMM's, page tables, and buffers of its disks.
const MEMORY_OVERHEAD: u64 = 128 << 20;
/// Threads beyond one per virtual CPU: QEMU has up to 64 workers for its disks, and aborts when it cannot have one.
const THREADS: u32 = 80;
/// Microseconds in which a guest may use each of its CPUs whole (`cpu.max`).
const PERIOD: u64 = 100_000;

/// The unified hierarchy (cgroup v2) of this host, and where in it guests are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroups {
    mount: PathBuf,
    parent: String,
    controllers: BTreeSet<String>,
}

impl Cgroups {
    /// Those for guests of the node with this state folder: no other node makes or removes cgroups there.
    pub fn of_node(mounts: &Path, state: &Path) -> Option<Self> {
        let Some(cgroups) = Self::find(mounts, state) else {
            tracing::warn!(
                "VMMs run without limits of CPU, memory and processes: this host has no cgroup v2 controllers"
            );
            return None;
        };
        cgroups.sweep();
        // A container may show a hierarchy that it must not change.
        let tried = cgroups.make("trial", 1, MEMORY_OVERHEAD);
        remove(&cgroups.folder("trial"));
        match tried {
            Ok(_) => Some(cgroups),
            Err(error) => {
                tracing::warn!(%error, "VMMs run without limits of CPU, memory and processes: cgroups cannot be made");
                None
            }
        }
    }

    /// Removes all of a node that is gone for good.
    pub fn remove_all(mounts: &Path, state: &Path) {
        if let Some(cgroups) = Self::find(mounts, state) {
            cgroups.sweep();
            remove(&cgroups.mount.join(&cgroups.parent));
        }
    }

    fn find(mounts: &Path, state: &Path) -> Option<Self> {
        let mounts = fs::read_to_string(mounts).unwrap_or_default();
        let owner = blake3::hash(state.as_os_str().as_encoded_bytes()).to_hex();
        let parent = format!("sandmesh/{}", owner.get(..8).unwrap_or_default());
        Self::detect(&mounts, parent)
    }

    /// With these controllers.
    #[cfg(test)]
    pub(super) fn new(mount: &str, parent: &str, controllers: &[&str]) -> Self {
        Self {
            mount: mount.into(),
            parent: parent.into(),
            controllers: controllers.iter().map(ToString::to_string).collect(),
        }
    }

    /// Where below the mount guests are.
    pub fn parent(&self) -> &str {
        &self.parent
    }

    /// Those of the node with this state folder; the jailer looks in the same place: the first mount of it. None where there is none, or it controls nothing: then all controllers are
    /// with cgroup v1.
    fn detect(mounts: &str, parent: String) -> Option<Self> {
        let mount = mounts.lines().find_map(|line| {
            let mut fields = line.split(' ');
            let (_, mount, kind) = (fields.next()?, fields.next()?, fields.next()?);
            (kind == "cgroup2").then(|| PathBuf::from(mount))
        })?;
        let controllers = fs::read_to_string(mount.join("cgroup.controllers")).ok()?;
        let controllers: BTreeSet<String> = controllers
            .split_ascii_whitespace()
            .filter(|name| matches!(*name, "cpu" | "memory" | "pids"))
            .map(ToOwned::to_owned)
            .collect();
        (!controllers.is_empty()).then_some(Self {
            mount,
            parent,
            controllers,
        })
    }

    /// What a VMM with a guest of this size is held to, as `file=value`.
    pub fn limits(&self, vcpus: u32, memory_bytes: u64) -> Vec<String> {
        let limits = [
            (
                "cpu",
                format!("cpu.weight={}", (100 * vcpus).clamp(1, 10_000)),
            ),
            (
                "cpu",
                format!("cpu.max={} {PERIOD}", u64::from(vcpus) * PERIOD),
            ),
            (
                "memory",
                format!("memory.max={}", memory_bytes + MEMORY_OVERHEAD),
            ),
            ("memory", "memory.swap.max=0".to_owned()),
            ("pids", format!("pids.max={}", vcpus + THREADS)),
        ];
        limits
            .into_iter()
            .filter(|(controller, _)| self.controllers.contains(*controller))
            .map(|(_, limit)| limit)
            .collect()
    }

    /// Makes a guest's cgroup, with its limits; returns where processes enter it.
    pub fn make(&self, id: &str, vcpus: u32, memory_bytes: u64) -> io::Result<File> {
        let enable: String = self
            .controllers
            .iter()
            .map(|name| format!("+{name}"))
            .collect::<Vec<_>>()
            .join(" ");
        let mut above = self.mount.clone();
        for part in Path::new(&self.parent) {
            if !enable.is_empty() {
                fs::write(above.join("cgroup.subtree_control"), &enable)?;
            }
            above.push(part);
            make_folder(&above)?;
        }
        if !enable.is_empty() {
            fs::write(above.join("cgroup.subtree_control"), &enable)?;
        }
        let folder = self.folder(id);
        make_folder(&folder)?;
        for limit in self.limits(vcpus, memory_bytes) {
            let (file, value) = limit.split_once('=').unwrap_or((&limit, ""));
            match fs::write(folder.join(file), value) {
                // A kernel without swap accounting has nothing to limit.
                Err(error) if error.kind() == io::ErrorKind::NotFound && file.contains("swap") => {}
                written => written?,
            }
        }
        File::options()
            .write(true)
            .open(folder.join("cgroup.procs"))
    }

    /// A guest's cgroup.
    pub fn folder(&self, id: &str) -> PathBuf {
        self.mount.join(&self.parent).join(id)
    }

    /// The cgroup of a process, if it is that of a guest of this node.
    pub fn of_process(&self, pid: i32) -> Option<PathBuf> {
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
        let path = self.mount.join(path);
        (path.parent() == Some(&self.mount.join(&self.parent))).then_some(path)
    }

    /// Removes cgroups of guests that are gone; those with a process in them stay.
    fn sweep(&self) {
        for entry in fs::read_dir(self.mount.join(&self.parent))
            .into_iter()
            .flatten()
        {
            if let Ok(entry) = entry
                && entry.file_type().is_ok_and(|kind| kind.is_dir())
            {
                remove(&entry.path());
            }
        }
    }
}

fn make_folder(folder: &Path) -> io::Result<()> {
    match fs::create_dir(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// Whether the host ended a process in the cgroup because it took too much memory.
pub fn was_out_of_memory(folder: &Path) -> bool {
    let events = fs::read_to_string(folder.join("memory.events")).unwrap_or_default();
    events
        .lines()
        .filter_map(|line| line.strip_prefix("oom_kill "))
        .any(|count| count.trim() != "0")
}

/// Removes a cgroup whose processes have ended.
pub fn remove(folder: &Path) {
    if let Err(error) = fs::remove_dir(folder)
        && !matches!(
            error.kind(),
            io::ErrorKind::NotFound | io::ErrorKind::ResourceBusy
        )
    {
        tracing::warn!(%error, folder = %folder.display(), "a cgroup is left behind");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::{
        VmExit,
        process::{Launch, launch},
    };

    #[test]
    fn cgroups_are_used_where_they_control_something() {
        let mount = tempfile::tempdir().unwrap();
        let mounts = format!(
            "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup2 {} cgroup2 rw 0 0\n",
            mount.path().display()
        );
        let detect = || Cgroups::detect(&mounts, "sandmesh/x".into());
        assert_eq!(detect(), None, "it says nothing");
        let controllers = mount.path().join("cgroup.controllers");
        fs::write(&controllers, "\n").unwrap();
        assert_eq!(detect(), None, "v1 has all");
        fs::write(&controllers, "cpuset cpu io pids\n").unwrap();
        let cgroups = detect().unwrap();
        assert_eq!(
            cgroups.limits(1, 1),
            ["cpu.weight=100", "cpu.max=100000 100000", "pids.max=81"]
        );
        let (old, busy) = (cgroups.folder("old"), cgroups.folder("busy"));
        fs::create_dir_all(&old).unwrap();
        fs::create_dir_all(busy.join("process")).unwrap();
        cgroups.sweep();
        assert!(!old.exists() && busy.exists());
        let events = old.with_file_name("busy").join("memory.events");
        fs::write(&events, "low 0\noom 1\noom_kill 0\n").unwrap();
        assert!(!was_out_of_memory(&busy));
        fs::write(&events, "low 0\noom 1\noom_kill 1\n").unwrap();
        assert!(was_out_of_memory(&busy));
    }

    /// On the host's own hierarchy, with whatever controllers it has.
    #[tokio::test]
    async fn a_process_starts_in_its_cgroup() {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let mount = mounts
            .lines()
            .filter_map(|line| line.split_once(' '))
            .find(|(_, rest)| rest.split(' ').nth(1) == Some("cgroup2"))
            .and_then(|(_, rest)| rest.split(' ').next())
            .expect("cgroup v2 is mounted");
        let cgroups = Cgroups::new(mount, &format!("sandmesh-test-{}", std::process::id()), &[]);
        let folder = tempfile::tempdir().unwrap();
        let mut process = launch(Launch {
            program: Path::new("sleep"),
            arguments: vec!["60".into()],
            folder: folder.path(),
            netns: None,
            output: File::create(folder.path().join("log")).unwrap(),
            inherited: Vec::new(),
            user: None,
            cgroup: Some(cgroups.make("guest", 1, 1 << 20).unwrap()),
        })
        .unwrap();
        let its_own = cgroups.folder("guest");
        assert_eq!(cgroups.of_process(process.id().pid), Some(its_own.clone()));
        process.kill().await;
        assert_eq!(process.wait().await, VmExit::Signal(9));
        cgroups.sweep();
        assert!(!its_own.exists());
        fs::remove_dir(Path::new(mount).join(&cgroups.parent)).unwrap();
    }
}
