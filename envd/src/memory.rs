//! Says when users' processes have little memory left, before the kernel has to end one of them.
//!
//! What is left is what may still be taken below the limit of their cgroup, files that were only read not counted: the kernel gives those up
//! first (cgroup-v2.rst, `memory.stat`). Stalls (PSI) would be told by the kernel by itself, but a guest without swap has hardly any before the
//! end. So envd looks, and the more often the less there is: an idle guest is hardly woken.

use std::{fs, path::Path, sync::Arc, time::Duration};

use proto::envd::v1::MemoryShortage;

use crate::{
    freezer::{Freezer, free_memory},
    identity::Guest,
    logs,
};

/// In hundredths of all that they may have: less is little, and more than that is enough again.
const LITTLE: u64 = 10;
const ENOUGH: u64 = 20;
/// Until the next look, when less than so many hundredths are left.
const LOOKS: [(u64, Duration); 3] = [
    (25, Duration::from_millis(500)),
    (50, Duration::from_secs(2)),
    (u64::MAX, Duration::from_secs(10)),
];

/// Looks for as long as the guest lives; not while its gate is closed.
pub(crate) async fn watch(guest: Arc<Guest>) {
    let Some(folder) = guest.freezer.as_ref().map(Freezer::user) else {
        return;
    };
    let mut is_short = false;
    loop {
        let left = look(&folder);
        let hundredths = left.as_ref().map_or(100, hundredths);
        if let Some(left) = left.filter(|_| !is_short && hundredths < LITTLE) {
            is_short = true;
            logs::warn_of_memory(left);
        }
        is_short &= hundredths < ENOUGH;
        let pause = LOOKS.iter().find(|(bound, _)| hundredths < *bound);
        let pause = pause.map_or(Duration::MAX, |(_, pause)| *pause);
        guest.gate.sleep(pause).await;
    }
}

fn hundredths(left: &MemoryShortage) -> u64 {
    left.available_bytes.saturating_mul(100) / left.total_bytes.max(1)
}

/// What is left to a cgroup that has a limit.
fn look(folder: &Path) -> Option<MemoryShortage> {
    let number = |file: &str| -> Option<u64> {
        let text = fs::read_to_string(folder.join(file)).ok()?;
        text.trim().parse().ok()
    };
    let (total_bytes, current) = (number("memory.max")?, number("memory.current")?);
    let stat = fs::read_to_string(folder.join("memory.stat")).ok()?;
    let used = current.saturating_sub(given_up_first(&stat));
    let below_limit = total_bytes.saturating_sub(used);
    Some(MemoryShortage {
        available_bytes: free_memory().map_or(below_limit, |free| free.min(below_limit)),
        total_bytes,
    })
}

/// Bytes that the kernel takes back when they are needed.
fn given_up_first(stat: &str) -> u64 {
    let kinds = ["inactive_file ", "active_file ", "slab_reclaimable "];
    let sizes = stat.lines().filter_map(|line| {
        let size = kinds.iter().find_map(|kind| line.strip_prefix(kind))?;
        size.parse::<u64>().ok()
    });
    sizes.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_were_only_read_are_no_use() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
        assert_eq!(look(folder.path()), None);
        write("memory.max", "1000\n");
        write("memory.current", "900\n");
        let stat = "anon 100\nfile 750\nactive_file 300\ninactive_file 350\nslab_reclaimable 50\nshmem 100\n";
        write("memory.stat", stat);
        let left = look(folder.path()).unwrap();
        assert_eq!((left.available_bytes, left.total_bytes), (800, 1000));
        assert_eq!(hundredths(&left), 80);
        write("memory.max", "max\n");
        assert_eq!(look(folder.path()), None);
    }
}
