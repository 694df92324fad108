//! Getting ready for a snapshot: gate closed, processes frozen, disk written.
//!
//! A guest that is nobody's yet is warmed first: every session of the template starts from its memory, so what Configure and the first
//! process need (the files of its names, its devices, the shell and its libraries) is in that memory already.
//!
//! Cached files stay. Most are the template's, so they cost a session nothing as long as they lie where they lay in the template's memory;
//! dropped, they are read again by the first command of every resumed or forked session, into pages that are its own. What a session has
//! read itself is better taken by the balloon, for which the kernel gives up first what has not been used for longest.

use std::{fs, fs::File, path::Path, sync::Arc, time::Duration};

use nix::unistd::syncfs;
use proto::envd::v1::GuestNetwork;
use tonic::{Code, Status};

use crate::{
    errors::refuse,
    freezer::Freezer,
    identity::{self, Guest},
    logs, network,
    process::Processes,
    spawn::{self, Plan, Stdio},
};

/// A disk that takes longer is stuck, on the host's side.
const SYNC_LIMIT: Duration = Duration::from_secs(20);
/// A shell that does nothing ends at once; one that does not is killed.
const WARM_LIMIT: Duration = Duration::from_secs(3);
fn failed(step: &'static str) -> impl Fn(String) -> Status {
    move |error| refuse(Code::Internal, "PREPARE_FAILED", format!("{step}: {error}"))
}

/// Stops the guest as far as users are concerned; says how much memory is free. If that fails, the guest is as it was.
pub(crate) async fn prepare(
    guest: Arc<Guest>,
    processes: Processes,
    network: Option<GuestNetwork>,
) -> Result<u64, Status> {
    let _one_at_a_time = guest.changing.lock().await;
    let was_open = guest.gate.close();
    guest.keep();
    let stopped = stop(&guest, processes, network).await;
    // One that was closed before stays so: its processes wait for Configure.
    match &stopped {
        Ok(_) => logs::info("the gate is closed for a snapshot"),
        Err(why) => logs::warn(format_args!("not ready for a snapshot: {}", why.message())),
    }
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
        guest.keep();
    }
    stopped
}

async fn stop(
    guest: &Arc<Guest>,
    processes: Processes,
    network: Option<GuestNetwork>,
) -> Result<u64, Status> {
    if guest.gate.is_new() && guest.owns_system {
        let warmed = match network {
            Some(network) => guest.set_network(network).await,
            None => network::warm().await,
        };
        warmed.map_err(failed("warm"))?;
    }
    let stopping = Arc::clone(guest);
    blocking("freeze", move || {
        // A start that passed the gate in time holds the table until its process is there.
        drop(processes.hold());
        if stopping.gate.is_new() {
            warm(&stopping)?;
        }
        stopping.freezer.as_ref().map_or(Ok(()), Freezer::freeze)
    })
    .await?;
    if guest.owns_system {
        tokio::time::timeout(SYNC_LIMIT, blocking("sync", sync))
            .await
            .map_err(|_| failed("sync")(format!("the disk did not answer in {SYNC_LIMIT:?}")))??;
    }
    blocking("memory", || {
        let memory = fs::read_to_string("/proc/meminfo").map_err(|error| error.to_string())?;
        free(&memory).ok_or_else(|| "/proc/meminfo is not understood".into())
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

/// Does once, for nothing, what Configure and the first start will do. That the shell fails is the template's matter; that it stays is not.
fn warm(guest: &Guest) -> Result<(), String> {
    if guest.owns_system {
        // Files that are there already, on the writable disk, are overwritten faster than they are copied up or made.
        identity::set_names("localhost", &[0; 16])?;
    }
    let Some(freezer) = &guest.freezer else {
        return Ok(());
    };
    freezer.thaw()?;
    let Some(user) = guest.user("") else {
        return Ok(());
    };
    let group = freezer.group("warm").map_err(|error| error.to_string())?;
    let plan = Plan {
        program: Path::new(&user.shell),
        name: &user.shell,
        arguments: &["-c".into(), ":".into()],
        cwd: Path::new("/"),
        env: &[],
        user: &user,
        stdio: Stdio::Pipes { stdin: false },
        group: Some(&group),
    };
    match spawn::spawn(plan) {
        Ok(_collected_by_the_reaper) => {
            freezer.empty(WARM_LIMIT)?;
            group.remove();
            Ok(())
        }
        Err(error) => {
            logs::warn(format_args!("{} cannot be started: {error}", user.shell));
            Ok(())
        }
    }
}

/// Free memory in bytes (proc_meminfo(5)).
fn free(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemFree:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_memory_is_read_from_the_kernels_words() {
        assert_eq!(
            free("MemTotal:  100 kB\nMemFree:   40 kB\nMemAvailable: 60 kB\n"),
            Some(40 << 10)
        );
        assert_eq!(free("MemFree: lots\n"), None);
        assert_eq!(free("MemFree: 99999999999999999999 kB\n"), None);
    }
}
