//! Getting ready for a snapshot: gate closed, processes frozen, disk written.
//!
//! A guest that is nobody's yet is warmed instead: every session of the template starts from its memory, so what the first process needs
//! (the shell, its libraries, the kernel's way to start one) is in that memory already.

use std::{fs, fs::File, path::Path, sync::Arc, time::Duration};

use nix::unistd::syncfs;
use tonic::{Code, Status};

use crate::{
    errors::refuse,
    freezer::Freezer,
    identity::Guest,
    process::Processes,
    spawn::{self, Plan},
};

/// A disk that takes longer is stuck, on the host's side.
const SYNC_LIMIT: Duration = Duration::from_secs(20);
/// A shell that does nothing ends at once; one that does not is killed.
const WARM_LIMIT: Duration = Duration::from_secs(3);
/// Less clean cache than this is not worth reading again.
const CACHE_WORTH_DROPPING: u64 = 16 << 20;

fn failed(step: &'static str) -> impl Fn(String) -> Status {
    move |error| refuse(Code::Internal, "PREPARE_FAILED", format!("{step}: {error}"))
}

/// Stops the guest as far as users are concerned; says how much memory is free. If that fails, the guest is as it was.
pub(crate) async fn prepare(guest: Arc<Guest>, processes: Processes) -> Result<u64, Status> {
    let _one_at_a_time = guest.changing.lock().await;
    let was_open = guest.gate.close();
    let stopped = stop(&guest, processes).await;
    // One that was closed before stays so: its processes wait for Configure.
    if let Err(why) = &stopped
        && was_open
    {
        if let Some(freezer) = &guest.freezer {
            freezer.thaw().map_err(|error| {
                let also = format!("{}; then thaw, so the gate stays closed", why.message());
                failed("undo")(format!("{also}: {error}"))
            })?;
        }
        guest.gate.open();
    }
    stopped
}

async fn stop(guest: &Arc<Guest>, processes: Processes) -> Result<u64, Status> {
    let stopping = Arc::clone(guest);
    blocking("freeze", move || {
        // A start that passed the gate in time holds the table until its process is there.
        drop(processes.hold());
        let Some(freezer) = &stopping.freezer else {
            return Ok(());
        };
        if stopping.gate.is_new() {
            freezer.thaw()?;
            warm(&stopping, freezer)?;
        }
        freezer.freeze()
    })
    .await?;
    let own = guest.owns_system;
    if own {
        tokio::time::timeout(SYNC_LIMIT, blocking("sync", sync))
            .await
            .map_err(|_| failed("sync")(format!("the disk did not answer in {SYNC_LIMIT:?}")))??;
    }
    let is_a_sessions = !guest.gate.is_new();
    blocking("memory", move || {
        let memory = Memory::read()?;
        // What a template has read is shared by all who start from it, and spares them the disk. What a session has read is its own copy
        // and would be stored with it; only unmapped pages go, so running programs keep theirs.
        if own && is_a_sessions && memory.clean_cache() >= CACHE_WORTH_DROPPING {
            fs::write("/proc/sys/vm/drop_caches", "1").map_err(|error| error.to_string())?;
            return Ok(Memory::read()?.free);
        }
        Ok(memory.free)
    })
    .await
}

async fn blocking<T: Send + 'static>(
    step: &'static str,
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, Status> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(error.to_string()))
        .map_err(failed(step))
}

/// The root is the overlay, and syncing it syncs the writable disk below (Linux, fs/overlayfs/super.c, `ovl_sync_fs`).
fn sync() -> Result<(), String> {
    let root = File::open("/").map_err(|error| error.to_string())?;
    syncfs(&root).map_err(|error| error.to_string())
}

/// Starts the default user's shell once, for nothing. That it fails is the template's matter; that it stays is not.
fn warm(guest: &Guest, freezer: &Freezer) -> Result<(), String> {
    let Some(user) = guest.user("") else {
        return Ok(());
    };
    let entrance = freezer.entrance().map_err(|error| error.to_string())?;
    let plan = Plan {
        program: Path::new(&user.shell),
        name: &user.shell,
        arguments: &["-c".into(), ":".into()],
        cwd: Path::new("/"),
        env: &[],
        user: &user,
        stdin: false,
        cgroup: Some(entrance),
    };
    match spawn::spawn(plan) {
        Ok(_collected_by_the_reaper) => freezer.empty(WARM_LIMIT),
        Err(error) => {
            eprintln!("envd: {} cannot be started: {error}", user.shell);
            Ok(())
        }
    }
}

/// What /proc/meminfo says, in bytes (proc_meminfo(5)).
#[derive(Debug, PartialEq, Eq)]
struct Memory {
    free: u64,
    cached: u64,
    mapped: u64,
    shared: u64,
}

impl Memory {
    fn read() -> Result<Self, String> {
        let text = fs::read_to_string("/proc/meminfo").map_err(|error| error.to_string())?;
        Self::parse(&text).ok_or_else(|| "/proc/meminfo is not understood".into())
    }

    fn parse(text: &str) -> Option<Self> {
        let value = |name: &str| {
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
            kib.checked_mul(1024)
        };
        Some(Self {
            free: value("MemFree")?,
            cached: value("Cached")?,
            mapped: value("Mapped")?,
            shared: value("Shmem")?,
        })
    }

    /// Cache that can go. Shared memory counts as cache but is nowhere else.
    fn clean_cache(&self) -> u64 {
        self.cached.saturating_sub(self.shared + self.mapped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_from_the_kernels_words() {
        let text = "MemTotal:  100 kB\nMemFree:   40 kB\nCached:   30 kB\nSwapCached:   5 kB\nMapped:  10 kB\nShmem:   4 kB\n";
        let memory = Memory::parse(text).unwrap();
        assert_eq!((memory.free, memory.clean_cache()), (40 << 10, 16 << 10));
        assert_eq!(Memory::parse("MemFree: lots\n"), None);
        assert!(Memory::read().unwrap().free > 0);
    }
}
