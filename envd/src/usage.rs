//! What the guest uses, by its kernel's own account (proc(5)).

use std::{fs, path::Path, time::SystemTime};

use nix::sys::statvfs::statvfs;
use proto::envd::v1::{NetworkUse, Pressure, StreamMetricsResponse};

/// The root is the overlay, which answers for the writable disk (Linux, fs/overlayfs/super.c, `ovl_statfs`).
const DISK: &str = "/";
const INTERFACE: &str = "eth0";
/// Of `USER_HZ`, which is 100 on all that we run on (time(7)).
const NANOSECONDS_PER_TICK: u64 = 10_000_000;
/// `PF_KTHREAD` (linux/sched.h).
const KERNEL_THREAD: u64 = 0x0020_0000;

/// As it is now.
pub(crate) async fn measure() -> Result<StreamMetricsResponse, String> {
    tokio::task::spawn_blocking(now)
        .await
        .map_err(|error| error.to_string())?
}

fn now() -> Result<StreamMetricsResponse, String> {
    let (ticks, cpus) = cpu(&read("/proc/stat")?).ok_or("/proc/stat is not understood")?;
    let memory = read("/proc/meminfo")?;
    let memory = |field| kibibytes(&memory, field).ok_or("/proc/meminfo is not understood");
    let (total, available) = (memory("MemTotal:")?, memory("MemAvailable:")?);
    let disk = statvfs(DISK).map_err(|error| format!("{DISK}: {error}"))?;
    let pressure =
        |of| parse_pressure(&fs::read_to_string(Path::new("/proc/pressure").join(of)).ok()?);
    Ok(StreamMetricsResponse {
        time: Some(SystemTime::now().into()),
        cpu_time: Some(prost_types::Duration {
            seconds: (ticks / 100) as i64,
            nanos: (ticks % 100 * NANOSECONDS_PER_TICK) as i32,
        }),
        cpus,
        memory_used_bytes: total.saturating_sub(available),
        memory_total_bytes: total,
        memory_available_bytes: available,
        processes: processes(),
        cpu_pressure: pressure("cpu"),
        memory_pressure: pressure("memory"),
        io_pressure: pressure("io"),
        disk_used_bytes: (disk.blocks() - disk.blocks_free()) * disk.fragment_size(),
        disk_total_bytes: disk.blocks() * disk.fragment_size(),
        network: network(&read("/proc/net/dev")?),
    })
}

fn read(path: &str) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| format!("{path}: {error}"))
}

/// Ticks of work, and how many CPUs there are. Idle, and waiting for disks or for the host, is no work; guests' time is in the user's already.
fn cpu(stat: &str) -> Option<(u64, u32)> {
    let all = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let fields: Vec<u64> = all
        .split_whitespace()
        .map(|field| field.parse().ok())
        .collect::<Option<_>>()?;
    let [user, nice, system, _idle, _iowait, irq, softirq, ..] = *fields.as_slice() else {
        return None;
    };
    let cpus = stat.lines().filter(|line| {
        line.strip_prefix("cpu")
            .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    });
    Some((user + nice + system + irq + softirq, cpus.count() as u32))
}

/// In bytes.
fn kibibytes(meminfo: &str, field: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(field))?;
    let kibibytes: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    kibibytes.checked_mul(1024)
}

/// Before Linux 5.13 nothing is said of all work that waits for the CPU.
fn parse_pressure(text: &str) -> Option<Pressure> {
    let average = |kind: &str| -> Option<f64> {
        let line = text.lines().find_map(|line| line.strip_prefix(kind))?;
        let field = line.split(' ').find_map(|f| f.strip_prefix("avg10="))?;
        field.parse().ok()
    };
    Some(Pressure {
        some_avg10: average("some ")?,
        full_avg10: average("full ").unwrap_or_default(),
    })
}

fn network(dev: &str) -> Option<NetworkUse> {
    let line = dev.lines().find_map(|line| {
        let (name, counters) = line.split_once(':')?;
        (name.trim() == INTERFACE).then_some(counters)
    })?;
    let mut counters = line.split_whitespace().map(str::parse);
    let mut counter = |skip| counters.nth(skip)?.ok();
    Some(NetworkUse {
        received_bytes: counter(0)?,
        received_packets: counter(0)?,
        sent_bytes: counter(6)?,
        sent_packets: counter(0)?,
    })
}

fn processes() -> u32 {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let stats = entries.filter_map(|entry| {
        let name = entry.file_name();
        let is_pid = name.as_encoded_bytes().iter().all(u8::is_ascii_digit);
        // One that has ended meanwhile is none.
        fs::read(entry.path().join("stat")).ok().filter(|_| is_pid)
    });
    stats.filter(|stat| is_process(stat)).count() as u32
}

/// Neither a thread of the kernel nor dead (proc_pid_stat(5)). A name may hold anything, so fields count from its end.
fn is_process(stat: &[u8]) -> bool {
    let stat = String::from_utf8_lossy(stat);
    let Some((_, fields)) = stat.rsplit_once(") ") else {
        return false;
    };
    let mut fields = fields.split(' ');
    let state = fields.next();
    let flags = fields.nth(5).and_then(|flags| flags.parse::<u64>().ok());
    !matches!(state, Some("Z" | "X")) && flags.is_some_and(|flags| flags & KERNEL_THREAD == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_work_is_cpu_time() {
        let stat = "cpu  100 20 30 4000 500 6 7 800 90 9\ncpu0 1 2\ncpu1 1 2\nintr 5\n";
        assert_eq!(cpu(stat), Some((163, 2)));
        assert_eq!(cpu("cpu  1 2 3\n"), None);
        assert_eq!(cpu("intr 1"), None);
    }

    #[test]
    fn pressure_is_read_with_and_without_its_second_line() {
        let some = "some avg10=1.25 avg60=0.00 avg300=0.00 total=7\n";
        let full = "full avg10=0.50 avg60=0.00 avg300=0.00 total=7\n";
        let both = parse_pressure(&format!("{some}{full}")).unwrap();
        assert_eq!((both.some_avg10, both.full_avg10), (1.25, 0.5));
        let one = parse_pressure(some).unwrap();
        assert_eq!((one.some_avg10, one.full_avg10), (1.25, 0.0));
        assert_eq!(parse_pressure(""), None);
    }

    #[test]
    fn the_guests_interface_is_found_among_others() {
        let dev = "Inter-|   Receive  |  Transmit\n face |bytes packets errs\n    \
            lo: 1 2 0 0 0 0 0 0 3 4 0 0 0 0 0 0\n  eth0:11 12 0 0 0 0 0 0 13 14 0 0 0 0 0 0\n";
        let used = network(dev).unwrap();
        assert_eq!((used.received_bytes, used.received_packets), (11, 12));
        assert_eq!((used.sent_bytes, used.sent_packets), (13, 14));
        assert_eq!(network("lo: 1 2"), None);
        assert_eq!(network("eth0: 1 2"), None);
    }

    #[test]
    fn threads_of_the_kernel_and_the_dead_are_no_processes() {
        let stat = |state: &str, flags: u64| format!("7 (a) Z (b) {state} 1 7 7 0 -1 {flags} 0 0");
        assert!(is_process(stat("S", 4_194_304).as_bytes()));
        assert!(!is_process(stat("I", KERNEL_THREAD | 64).as_bytes()));
        assert!(!is_process(stat("Z", 4_194_304).as_bytes()));
        assert!(!is_process(b""));
    }

    #[test]
    fn what_is_measured_here_makes_sense() {
        let used = now().unwrap();
        assert!(used.memory_used_bytes > 0);
        assert_eq!(
            used.memory_used_bytes + used.memory_available_bytes,
            used.memory_total_bytes
        );
        assert!(used.cpus > 0 && used.processes > 0);
        assert!(used.disk_total_bytes >= used.disk_used_bytes);
    }
}
