//! The kernel's log, /dev/kmsg (Linux, Documentation/ABI/testing/dev-kmsg): from its first message, each as it comes.
//!
//! A reader that is overtaken by the kernel's own ring is told so (EPIPE) and goes on with the oldest message there is; how many it has missed
//! the messages' numbers say. Whoever writes to /dev/kmsg cannot pass for the kernel: the facility 0 is the kernel's alone.
#![allow(unsafe_code)] // registration of the device with the runtime

use std::{
    fs::{File, OpenOptions},
    io::{self, Read as _},
    os::{fd::AsFd as _, unix::fs::OpenOptionsExt as _},
    time::{Duration, SystemTime},
};

use nix::{
    libc,
    time::{ClockId, clock_gettime},
};
use tokio::io::{Interest, unix::AsyncFd};

use super::{About, LOGS, Message, OomKill, Source, note_kill, warn};
use crate::{
    freezer::USER,
    keeper::{Keeper, Slot},
};
use proto::envd::v1::OomVictim;

const DEVICE: &str = "/dev/kmsg";
/// A read gets one record, or EINVAL if that does not fit (Linux, kernel/printk/internal.h, `PRINTK_MESSAGE_MAX`; once 8192).
const LARGEST: usize = 8192;
const KILLED_PROCESS: &str = "Killed process ";

/// Puts what the kernel says into the logs, for as long as the guest lives.
/// A daemon that follows another goes on where that was, which the device knows.
pub(crate) async fn follow(keeper: Keeper, left: Option<File>) {
    if let Err(error) = try_follow(&keeper, left).await {
        warn(format_args!("the kernel's log ends here: {error}"));
    }
}

async fn try_follow(keeper: &Keeper, left: Option<File>) -> io::Result<()> {
    let is_first = left.is_none();
    let device = if let Some(device) = left {
        device
    } else {
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(libc::O_NONBLOCK);
        let device = options.open(DEVICE)?;
        keeper.keep_file_of_guest(Slot::Kmsg, device.as_fd());
        device
    };
    // SAFETY: a file answers with the same descriptor for as long as it lives, and it lives in there.
    let device = unsafe { AsyncFd::register_with_interest(device, Interest::READABLE)? };
    let mut record = [0; LARGEST];
    let mut expected = is_first.then_some(0);
    let mut is_old = is_first;
    let mut chosen = None;
    loop {
        let mut ready = device.readable().await?;
        let read = ready.try_io(|device| {
            let mut device: &File = device.get_ref();
            device.read(&mut record)
        });
        match read {
            // Up to here it was said before we came.
            Err(_would_block) => is_old = false,
            Ok(Err(error)) if error.raw_os_error() == Some(libc::EPIPE) => {}
            Ok(Err(error)) => return Err(error),
            Ok(Ok(length)) => {
                let record = record.get(..length).and_then(Record::parse);
                let record = record.ok_or(io::ErrorKind::InvalidData)?;
                LOGS.skip(
                    record
                        .number
                        .saturating_sub(expected.unwrap_or(record.number)),
                );
                expected = Some(record.number + 1);
                take(record, is_old, &mut chosen);
            }
        }
    }
}

/// `chosen` is whom the kernel has said it will kill.
fn take(record: Record, is_old: bool, chosen: &mut Option<OomKill>) {
    let mut about = None;
    if record.source == Source::Kernel {
        if let Some(choice) = choice(&record.text) {
            *chosen = Some(choice);
        } else if let Some(mut kill) = killed(&record.text) {
            kill.group = chosen
                .take_if(|chosen| chosen.pid == kill.pid)
                .and_then(|chosen| chosen.group);
            about = Some(Box::new(About::Kill(OomVictim {
                pid: kill.pid,
                command: kill.command.clone(),
            })));
            note_kill(kill);
        }
    }
    let mut time = SystemTime::now();
    if is_old {
        time -= age(record.since_boot);
    }
    LOGS.put(Message {
        source: record.source,
        severity: record.severity,
        time,
        text: record.text,
        about,
    });
}

/// How long ago that was. The kernel's log has a clock of its own, which is not exactly this one (printk_clock), and after a restore maybe
/// not at all: so it serves for messages of the boot only.
fn age(since_boot: Duration) -> Duration {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
    now.saturating_sub(since_boot)
}

#[derive(Debug, PartialEq, Eq)]
struct Record {
    source: Source,
    severity: u8,
    number: u64,
    since_boot: Duration,
    text: Vec<u8>,
}

impl Record {
    /// `facility * 8 + severity,number,microseconds,flags[,more];text`, then lines of a dictionary, each begun by a space.
    fn parse(record: &[u8]) -> Option<Self> {
        let border = record.iter().position(|byte| *byte == b';')?;
        let (prefix, text) = record.split_at_checked(border)?;
        let mut fields = str::from_utf8(prefix).ok()?.split(',');
        let priority: u32 = fields.next()?.parse().ok()?;
        let number = fields.next()?.parse().ok()?;
        let microseconds = fields.next()?.parse().ok()?;
        let text = text.get(1..)?.split(|byte| *byte == b'\n').next()?;
        Some(Self {
            source: if priority >> 3 == 0 {
                Source::Kernel
            } else {
                Source::User
            },
            severity: (priority & 7) as u8,
            number,
            since_boot: Duration::from_micros(microseconds),
            text: unescape(text),
        })
    }
}

/// The kernel writes what is not printable, and the backslash, as `\x5c`.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, after)) = rest.split_first() {
        let escaped = after
            .strip_prefix(b"x")
            .filter(|_| *first == b'\\')
            .and_then(|hex| hex.split_at_checked(2))
            .and_then(|(hex, after)| {
                let hex = str::from_utf8(hex).ok()?;
                Some((u8::from_str_radix(hex, 16).ok()?, after))
            });
        let (byte, after) = escaped.unwrap_or((*first, after));
        bytes.push(byte);
        rest = after;
    }
    bytes
}

/// Who will be killed, and its cgroup, if the message says that (Linux, mm/oom_kill.c, `dump_oom_summary`):
/// "oom-kill:constraint=CONSTRAINT_NONE,...,task_memcg=/user/p4,task=python3,pid=93,uid=1000". A cgroup that a program made within its own is
/// its own.
fn choice(text: &[u8]) -> Option<OomKill> {
    let text = String::from_utf8_lossy(text);
    let rest = text.strip_prefix("oom-kill:")?;
    let (_, rest) = rest.split_once(",task_memcg=")?;
    let (group, task) = rest.split_once(",task=")?;
    let (command, rest) = task.rsplit_once(",pid=")?;
    let (pid, _) = rest.split_once(",uid=")?;
    let mut path = group.split('/').skip_while(|part| *part != USER);
    Some(OomKill {
        pid: pid.parse().ok()?,
        command: command.to_owned(),
        group: path.nth(1).map(str::to_owned),
    })
}

/// Who was killed, if the message says that (Linux, mm/oom_kill.c, `__oom_kill_process`): "Out of memory", "Memory cgroup out of memory" or
/// "Out of memory (oom_kill_allocating_task)", then ": Killed process 42 (name) total-vm:...".
fn killed(text: &[u8]) -> Option<OomKill> {
    let text = String::from_utf8_lossy(text);
    let (why, who) = text.split_once(KILLED_PROCESS)?;
    if !["Out of memory", "Memory cgroup out of memory"]
        .iter()
        .any(|known| why.starts_with(known))
    {
        return None;
    }
    let (pid, name) = who.split_once(" (")?;
    // A name may hold anything, brackets and what follows it included.
    let (name, _) = name.rsplit_once(") total-vm:").or(name.rsplit_once(')'))?;
    Some(OomKill {
        pid: pid.parse().ok()?,
        command: name.to_owned(),
        group: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::logs::oom_kills;

    #[test]
    fn a_record_is_read_and_nonsense_is_not() {
        let record = Record::parse(
            b"4,1234,5140900,-,caller=T1;tab\\x09 and \\x5c, semi;colon\n SUBSYSTEM=acpi\n DEVICE=+acpi:PNP0A03:00\n",
        );
        let expected = Record {
            source: Source::Kernel,
            severity: 4,
            number: 1234,
            since_boot: Duration::from_micros(5_140_900),
            text: b"tab\t and \\, semi;colon".to_vec(),
        };
        assert_eq!(record, Some(expected));
        let user = Record::parse(b"14,7,1,-;hello\n").unwrap();
        assert_eq!((user.source, user.severity), (Source::User, 6));
        for nonsense in [
            &b""[..],
            b";",
            b"4,1,2",
            b"4,1;x",
            b"x,1,2,-;x",
            b"4,-1,2,-;x",
            b"4,1,99999999999999999999,-;x",
            b"\xff,1,2,-;x",
        ] {
            assert_eq!(Record::parse(nonsense), None, "{nonsense:?}");
        }
    }

    #[test]
    fn escapes_are_undone_and_what_looks_like_one_is_left() {
        assert_eq!(unescape(b"\\xff\\x00a\\xzz\\x4\\"), b"\xff\0a\\xzz\\x4\\");
    }

    #[test]
    fn kills_for_want_of_memory_are_known_from_all_else() {
        let kill = |text: &str| killed(text.as_bytes()).map(|kill| (kill.pid, kill.command));
        let rest = "total-vm:4220036kB, anon-rss:3890404kB, file-rss:0kB, shmem-rss:0kB, UID:0 pgtables:8076kB oom_score_adj:0";
        for (why, name) in [
            ("Out of memory", "stress"),
            ("Memory cgroup out of memory", "python3.11"),
            ("Out of memory (oom_kill_allocating_task)", "a b) (c"),
            ("Out of memory", ") total-vm:x"),
        ] {
            assert_eq!(
                kill(&format!("{why}: Killed process 4242 ({name}) {rest}")),
                Some((4242, name.to_owned()))
            );
        }
        assert_eq!(
            kill("Out of memory: Killed process 7 (old)"),
            Some((7, "old".into()))
        );
        for other in [
            "oom_reaper: reaped process 4242 (stress), now anon-rss:0kB",
            "stress invoked oom-killer: gfp_mask=0x100cca(GFP_HIGHUSER_MOVABLE), order=0",
            "Out of memory: Killed process -1 (x) total-vm:0kB",
            "Out of memory: Killed process 1",
            "somebody said Out of memory: Killed process 1 (x) total-vm:0kB",
        ] {
            assert_eq!(kill(other), None, "{other}");
        }
    }

    #[tokio::test]
    async fn a_kill_is_told_by_its_cgroup_and_only_the_kernel_can_tell_it() {
        let mut chosen = None;
        let mut say = |priority: u32, text: &str| {
            let record = format!("{priority},1,1,-;{text}\n");
            take(
                Record::parse(record.as_bytes()).unwrap(),
                false,
                &mut chosen,
            );
        };
        let choice = |group: &str, task: &str, pid: u32| {
            format!(
                "oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=/,mems_allowed=0,oom_memcg=/user,task_memcg={group},task={task},pid={pid},uid=1000"
            )
        };
        let kill = |pid: u32, task: &str| {
            format!("Memory cgroup out of memory: Killed process {pid} ({task}) total-vm:1kB")
        };
        // A program's own words in the log are a program's.
        say(14, &choice("/user/p990", "x", 1));
        say(14, &kill(1, "x"));
        say(6, &choice("/user/p990/own,task=y", "a,pid=7,b", 2));
        say(3, &kill(2, "a,pid=7,b"));
        // Killed along with it, of which no cgroup was told.
        say(3, &kill(3, "c"));
        let waiting = tokio::spawn(oom_kills("p990", 2));
        say(6, &choice("/user/p991", "d", 4));
        say(3, &kill(4, "d"));
        say(6, &choice("/user/p990", "e", 5));
        say(3, &kill(5, "e"));
        let kills = waiting.await.unwrap();
        let kills: Vec<_> = kills
            .iter()
            .map(|kill| (kill.pid, &*kill.command))
            .collect();
        assert_eq!(kills, [(2, "a,pid=7,b"), (5, "e")]);
        assert_eq!(oom_kills("p991", 2).await.len(), 1, "the wait ends");
    }
}
