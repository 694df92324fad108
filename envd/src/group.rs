//! A cgroup for each process: what it and all it starts may take, what they took, and how all of them are ended, also those that have
//! left its process group (Documentation/admin-guide/cgroup-v2.rst).

use std::{
    fs::{self, File, OpenOptions},
    io,
    path::{Path, PathBuf},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use proto::envd::v1::ResourceLimits;

/// Of `cpu.max`, in microseconds.
const PERIOD: u64 = 100_000;
/// Processes that fork while they are signalled are met again.
const PASSES: usize = 4;

/// One of them. Dropping it leaves it there.
#[derive(Debug)]
pub(crate) struct Group {
    folder: PathBuf,
}

/// What all in it took together. What the kernel does not count is not there.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Used {
    pub(crate) cpu_micros: Option<u64>,
    pub(crate) peak_memory: Option<u64>,
    pub(crate) oom_kills: u32,
}

impl Group {
    /// Makes one below a cgroup that has no processes of its own. One of that name that was left behind is taken.
    pub(crate) fn make(parent: &Path, name: &str) -> io::Result<Self> {
        let folder = parent.join(name);
        match fs::create_dir(&folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        Ok(Self { folder })
    }

    /// Its name below its parent.
    pub(crate) fn name(&self) -> &str {
        let name = self.folder.file_name();
        name.and_then(|name| name.to_str()).unwrap_or_default()
    }

    /// The file into which a new process writes `0` to be in.
    pub(crate) fn entrance(&self) -> io::Result<File> {
        OpenOptions::new()
            .write(true)
            .open(self.folder.join("cgroup.procs"))
    }

    /// Sets what may be taken.
    pub(crate) fn limit(&self, limits: &ResourceLimits) -> io::Result<()> {
        let set = |file: &str, value: String| fs::write(self.folder.join(file), value);
        if limits.cpu_millis > 0 {
            let quota = u64::from(limits.cpu_millis) * PERIOD / 1000;
            set("cpu.max", format!("{quota} {PERIOD}"))?;
        }
        if limits.memory_bytes > 0 {
            set("memory.max", limits.memory_bytes.to_string())?;
            // A limit that swap gets around is none; where there is no swap, there is no such file.
            match set("memory.swap.max", "0".into()) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        if limits.pids > 0 {
            set("pids.max", limits.pids.to_string())?;
        }
        Ok(())
    }

    /// What was taken so far.
    pub(crate) fn used(&self) -> Used {
        let number = |file: &str, key: Option<&str>| -> Option<u64> {
            let text = fs::read_to_string(self.folder.join(file)).ok()?;
            match key {
                None => text.trim().parse().ok(),
                Some(key) => text
                    .lines()
                    .find_map(|line| line.strip_prefix(key)?.trim().parse().ok()),
            }
        };
        Used {
            cpu_micros: number("cpu.stat", Some("usage_usec ")),
            peak_memory: number("memory.peak", None),
            oom_kills: number("memory.events", Some("oom_kill "))
                .and_then(|kills| u32::try_from(kills).ok())
                .unwrap_or_default(),
        }
    }

    /// Whether nobody is in it, nor in what was made below it.
    pub(crate) fn is_empty(&self) -> bool {
        fs::read_to_string(self.folder.join("cgroup.events")).map_or(true, |events| {
            events.lines().any(|line| line == "populated 0")
        })
    }

    /// Signals all that are in it; how many those were.
    pub(crate) fn signal(&self, signal: Signal) -> io::Result<usize> {
        match self.signal_there(signal) {
            // Nobody was in it any more.
            Err(_) if !self.folder.exists() => Ok(0),
            signalled => signalled,
        }
    }

    fn signal_there(&self, signal: Signal) -> io::Result<usize> {
        if signal == Signal::SIGKILL {
            let count = usize::from(!self.is_empty());
            fs::write(self.folder.join("cgroup.kill"), "1")?;
            return Ok(count);
        }
        let mut met = Vec::new();
        for _ in 0..PASSES {
            let before = met.len();
            for folder in self.with_all_below()? {
                for pid in fs::read_to_string(folder.join("cgroup.procs"))?.lines() {
                    let Ok(pid) = pid.parse::<i32>() else {
                        continue;
                    };
                    if !met.contains(&pid) {
                        met.push(pid);
                        // One that has just ended is no error.
                        let _ = kill(Pid::from_raw(pid), signal);
                    }
                }
            }
            if met.len() == before {
                break;
            }
        }
        Ok(met.len())
    }

    fn with_all_below(&self) -> io::Result<Vec<PathBuf>> {
        let mut folders = vec![self.folder.clone()];
        let mut at = 0;
        while let Some(folder) = folders.get(at).cloned() {
            at += 1;
            for entry in fs::read_dir(folder)? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    folders.push(entry.path());
                }
            }
        }
        Ok(folders)
    }

    /// Removes it with all below it, if nobody is there; whether it is gone.
    pub(crate) fn remove(&self) -> bool {
        if !self.is_empty() {
            return false;
        }
        let Ok(folders) = self.with_all_below() else {
            return !self.folder.exists();
        };
        folders
            .iter()
            .rev()
            .all(|folder| fs::remove_dir(folder).is_ok() || !folder.exists())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the kernel writes them.
    #[test]
    fn what_was_taken_is_read_from_the_kernels_words() {
        let folder = tempfile::tempdir().unwrap();
        let files = [
            ("cgroup.procs", ""),
            ("cgroup.events", "populated 0\nfrozen 0\n"),
            ("cpu.stat", "usage_usec 1234\nuser_usec 1000\n"),
            ("memory.peak", "4096\n"),
            (
                "memory.events",
                "low 0\noom 2\noom_kill 1\noom_group_kill 0\n",
            ),
        ];
        for (name, text) in files {
            fs::write(folder.path().join(name), text).unwrap();
        }
        let parent = folder.path().parent().unwrap();
        let name = folder.path().file_name().unwrap().to_str().unwrap();
        let group = Group::make(parent, name).unwrap();
        assert_eq!(
            group.used(),
            Used {
                cpu_micros: Some(1234),
                peak_memory: Some(4096),
                oom_kills: 1
            }
        );
        group
            .limit(&ResourceLimits {
                cpu_millis: 1500,
                memory_bytes: 1 << 20,
                pids: 0,
            })
            .unwrap();
        let read = |name: &str| fs::read_to_string(folder.path().join(name)).unwrap();
        assert_eq!(read("cpu.max"), "150000 100000");
        assert_eq!(read("memory.max"), "1048576");
        assert!(!folder.path().join("pids.max").exists());
        fs::remove_file(folder.path().join("memory.peak")).unwrap();
        assert_eq!(group.used().peak_memory, None);
    }
}
