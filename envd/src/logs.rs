//! What the guest's kernel ([`kmsg`]) and envd have said, and what processes wrote whose output is logged ([`Lines`]), kept in memory for
//! whoever asks (`SystemService.StreamLogs`).
//!
//! Every message has a number. Old ones make room for new ones, and those the kernel itself has dropped have numbers too, so a reader sees by
//! the numbers how many it will never see; it is told. The messages go with the guest's memory: a fork has its parent's, a rollback goes back.
//!
//! envd says what it has to say by [`warn`] (to the console as well, which the node keeps the end of) or [`info`].

use std::{
    collections::VecDeque,
    fmt,
    fs::File,
    io::{self, Write as _},
    os::{fd::AsFd as _, unix::fs::FileExt as _},
    sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use futures::{Stream, stream};
use proto::envd::v1::{MemoryShortage, OomVictim, StreamLogsResponse};
use tokio::sync::watch;

use crate::{
    descriptors,
    keeper::{Item, Keeper, Slot},
};

pub(crate) mod kmsg;
mod lines;

pub(crate) use lines::Lines;

/// In bytes, what it takes to keep them included; as much again is kept of what processes write.
const KEPT: usize = 2 << 20;
/// What is longer loses its end.
const LONGEST: usize = 8 << 10;
/// Kills that are remembered for whoever asks.
const KILLS: usize = 256;
/// The kernel says whom it has killed after it has done so.
const KERNEL_SAYS: Duration = Duration::from_millis(500);

const WARNING: u8 = 4;
const INFORMATION: u8 = 6;

static LOGS: LazyLock<Logs> = LazyLock::new(|| Logs::new(KEPT));
static KILLED: LazyLock<watch::Sender<VecDeque<OomKill>>> = LazyLock::new(watch::Sender::default);

/// Says something on the console and in the logs: what should not be so.
pub(crate) fn warn(message: impl fmt::Display) {
    // A console that takes nothing changes nothing.
    let _ = writeln!(std::io::stderr(), "envd: {message}");
    say(WARNING, message);
}

/// Says something in the logs.
pub(crate) fn info(message: impl fmt::Display) {
    say(INFORMATION, message);
}

fn say(severity: u8, message: impl fmt::Display) {
    say_of(severity, message, None);
}

fn say_of(severity: u8, message: impl fmt::Display, about: Option<About>) {
    LOGS.put(Message {
        source: Source::Envd,
        severity,
        time: SystemTime::now(),
        text: message.to_string().into(),
        about: about.map(Box::new),
    });
}

/// Says that processes have little memory left.
pub(crate) fn warn_of_memory(left: MemoryShortage) {
    let mib = |bytes: u64| bytes >> 20;
    let (available, total) = (mib(left.available_bytes), mib(left.total_bytes));
    let text = format!("memory is short: {available} MiB of {total} MiB are left to processes");
    say_of(WARNING, text, Some(About::Memory(left)));
}

/// A process the kernel has ended because there was no memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct OomKill {
    pub(crate) pid: u32,
    pub(crate) command: String,
    /// The cgroup it was in, below that of users' processes.
    pub(crate) group: Option<String>,
}

/// Whom the kernel has killed of a cgroup, oldest first. If those are fewer than `count`, it may not have said so yet, and is waited for.
pub(crate) async fn oom_kills(group: &str, count: usize) -> Vec<OomKill> {
    let of = |kills: &VecDeque<OomKill>| -> Vec<OomKill> {
        let here = kills.iter();
        here.filter(|kill| kill.group.as_deref() == Some(group))
            .cloned()
            .collect()
    };
    let mut kills = KILLED.subscribe();
    let all = kills.wait_for(|kills| of(kills).len() >= count);
    // When time is up, those it has named are named.
    let _ = tokio::time::timeout(KERNEL_SAYS, all).await;
    of(&kills.borrow())
}

fn note_kill(kill: OomKill) {
    KILLED.send_modify(|kills| {
        if kills.len() == KILLS {
            kills.pop_front();
        }
        kills.push_back(kill);
    });
}

/// Messages after one, oldest first; with `follow` also those to come. Fails if there has not been that one yet, and says which was last.
pub(crate) fn read(
    after: u64,
    follow: bool,
) -> Result<impl Stream<Item = StreamLogsResponse> + Send + use<>, u64> {
    LOGS.read(after, follow)
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Source {
    Kernel,
    /// A program of the guest, through the kernel's log.
    User,
    Envd,
    /// Output of the process with this ID.
    Process(Arc<str>),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kernel => f.write_str("kernel"),
            Self::User => f.write_str("user"),
            Self::Envd => f.write_str("envd"),
            Self::Process(id) => write!(f, "process:{id}"),
        }
    }
}

#[derive(Debug)]
struct Message {
    source: Source,
    severity: u8,
    time: SystemTime,
    text: Vec<u8>,
    /// What it says, for programs.
    about: Option<Box<About>>,
}

#[derive(Debug, Clone)]
enum About {
    /// Whom the kernel has killed.
    Kill(OomVictim),
    Memory(MemoryShortage),
}

#[derive(Debug)]
struct Entry {
    sequence: u64,
    message: Message,
}

impl Entry {
    fn size(&self) -> usize {
        size_of::<Self>() + self.message.text.len()
    }

    /// For a reader who has seen all up to a number.
    fn answer(&self, seen: u64) -> StreamLogsResponse {
        let message = &self.message;
        let (oom_victim, memory_shortage) = match message.about.as_deref() {
            Some(About::Kill(victim)) => (Some(victim.clone()), None),
            Some(About::Memory(left)) => (None, Some(*left)),
            None => (None, None),
        };
        StreamLogsResponse {
            sequence: self.sequence,
            time: Some(message.time.into()),
            source: message.source.to_string(),
            data: message.text.clone(),
            dropped: self.sequence - seen - 1,
            severity: message.severity.into(),
            oom_victim,
            memory_shortage,
        }
    }
}

/// Messages of one kind, oldest first.
#[derive(Debug, Default)]
struct Queue {
    entries: VecDeque<Entry>,
    size: usize,
}

impl Queue {
    fn put(&mut self, entry: Entry, most: usize) {
        self.size += entry.size();
        self.entries.push_back(entry);
        while self.size > most
            && let Some(oldest) = self.entries.pop_front()
        {
            self.size -= oldest.size();
        }
    }

    fn after(&self, sequence: u64) -> Option<&Entry> {
        let index = self
            .entries
            .partition_point(|entry| entry.sequence <= sequence);
        self.entries.get(index)
    }
}

/// The newest messages, by their numbers. A process that writes much makes only output go.
#[derive(Debug)]
struct Ring {
    system: Queue,
    output: Queue,
    /// In bytes, of each.
    most: usize,
    last: u64,
    /// Where the next daemon finds the last number.
    kept: Option<File>,
}

impl Ring {
    fn new(most: usize) -> Self {
        Self {
            system: Queue::default(),
            output: Queue::default(),
            most,
            last: 0,
            kept: None,
        }
    }

    fn put(&mut self, mut message: Message) {
        message.text.truncate(LONGEST);
        message.text.shrink_to_fit();
        self.skip(1);
        let queue = match message.source {
            Source::Process(_) => &mut self.output,
            _ => &mut self.system,
        };
        let sequence = self.last;
        queue.put(Entry { sequence, message }, self.most);
    }

    /// So many were lost before they came here.
    fn skip(&mut self, lost: u64) {
        self.last += lost;
        if let Some(kept) = &self.kept {
            // Before anybody reads it, so that no number is given twice. Memory of our own takes eight bytes.
            let _ = kept.write_all_at(&self.last.to_le_bytes(), 0);
        }
    }

    fn after(&self, sequence: u64) -> Option<&Entry> {
        let queues = [&self.system, &self.output].into_iter();
        queues
            .filter_map(|queue| queue.after(sequence))
            .min_by_key(|entry| entry.sequence)
    }
}

/// Goes on with the numbers of the daemon before, if there was one, whose messages are gone.
pub(crate) fn go_on(keeper: &Keeper, left: &mut Item) -> io::Result<()> {
    let number = if let Some(number) = left.file(Slot::LastMessage) {
        number
    } else {
        let number = descriptors::memory_file("messages", 8)?;
        keeper.keep_file_of_guest(Slot::LastMessage, number.as_fd());
        number
    };
    let mut last = [0; 8];
    number.read_exact_at(&mut last, 0)?;
    let mut ring = LOGS.ring();
    ring.last += u64::from_le_bytes(last);
    ring.kept = Some(number);
    LOGS.last.send_replace(ring.last);
    Ok(())
}

#[derive(Debug)]
struct Logs {
    ring: Mutex<Ring>,
    /// The last number.
    last: watch::Sender<u64>,
}

impl Logs {
    fn new(most: usize) -> Self {
        Self {
            ring: Mutex::new(Ring::new(most)),
            last: watch::Sender::new(0),
        }
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, message: Message) {
        let mut ring = self.ring();
        ring.put(message);
        // While it is held, so that numbers are told in their order.
        self.last.send_replace(ring.last);
    }

    fn skip(&self, lost: u64) {
        self.ring().skip(lost);
    }

    fn read(
        &self,
        after: u64,
        follow: bool,
    ) -> Result<impl Stream<Item = StreamLogsResponse> + Send + use<'_>, u64> {
        let last = self.ring().last;
        if after > last {
            return Err(last);
        }
        let news = self.last.subscribe();
        Ok(stream::unfold(
            (after, news),
            move |(seen, mut news)| async move {
                loop {
                    news.borrow_and_update();
                    let next = self.ring().after(seen).map(|entry| entry.answer(seen));
                    match next {
                        Some(answer) if follow || answer.sequence <= last => {
                            let seen = answer.sequence;
                            return Some((answer, (seen, news)));
                        }
                        _ if !follow => return None,
                        _ => news.changed().await.ok()?,
                    }
                }
            },
        ))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures::{FutureExt as _, StreamExt as _};

    use super::*;

    fn message(source: Source, text: impl Into<Vec<u8>>) -> Message {
        Message {
            source,
            severity: INFORMATION,
            time: SystemTime::now(),
            text: text.into(),
            about: None,
        }
    }

    fn say(logs: &Logs, text: &str) {
        logs.put(message(Source::Envd, text));
    }

    fn told(answer: &StreamLogsResponse) -> (u64, &str, u64) {
        let text = std::str::from_utf8(&answer.data).unwrap();
        (answer.sequence, text, answer.dropped)
    }

    async fn all(logs: &Logs, after: u64) -> Vec<(u64, String, u64)> {
        let answers = logs.read(after, false).unwrap();
        answers
            .map(|answer| {
                let (sequence, text, dropped) = told(&answer);
                (sequence, text.to_owned(), dropped)
            })
            .collect()
            .await
    }

    #[tokio::test]
    async fn a_reader_gets_what_is_there_and_then_what_comes() {
        let logs = Logs::new(KEPT);
        say(&logs, "one");
        say(&logs, "two");
        let mut reader = std::pin::pin!(logs.read(0, true).unwrap());
        for expected in [(1, "one", 0), (2, "two", 0)] {
            assert_eq!(told(&reader.next().await.unwrap()), expected);
        }
        assert!(reader.next().now_or_never().is_none());
        say(&logs, "three");
        assert_eq!(told(&reader.next().await.unwrap()), (3, "three", 0));
        assert_eq!(all(&logs, 2).await, [(3, "three".into(), 0)]);
        assert_eq!(all(&logs, 3).await, []);
    }

    #[tokio::test]
    async fn what_was_dropped_is_counted_wherever_it_was_dropped() {
        let logs = Logs::new(10 * (size_of::<Entry>() + 5));
        let mut slow = std::pin::pin!(logs.read(0, true).unwrap());
        for number in 1..=15 {
            say(&logs, &format!("{number:05}"));
        }
        assert_eq!(told(&slow.next().await.unwrap()), (6, "00006", 5));
        assert_eq!(told(&slow.next().await.unwrap()), (7, "00007", 0));
        // By the kernel, before it came here; and here, while the reader was slow.
        logs.skip(4);
        for number in 20..=24 {
            say(&logs, &format!("{number:05}"));
        }
        assert_eq!(told(&slow.next().await.unwrap()), (11, "00011", 3));
        for number in 12..=15 {
            assert_eq!(slow.next().await.unwrap().sequence, number);
        }
        assert_eq!(told(&slow.next().await.unwrap()), (20, "00020", 4));
        assert_eq!(all(&logs, 0).await.len(), 10);
        assert_eq!(all(&logs, 17).await[0], (20, "00020".into(), 2));
    }

    #[tokio::test]
    async fn a_number_that_has_not_been_is_refused() {
        let logs = Logs::new(KEPT);
        assert!(logs.read(0, true).is_ok());
        assert_eq!(logs.read(1, true).err(), Some(0));
        say(&logs, "one");
        assert!(logs.read(1, true).is_ok());
        assert_eq!(logs.read(2, false).err(), Some(1));
    }

    #[tokio::test]
    async fn a_reader_that_does_not_follow_ends_though_more_comes() {
        let logs = Logs::new(KEPT);
        say(&logs, "one");
        let mut reader = std::pin::pin!(logs.read(0, false).unwrap());
        say(&logs, "two");
        assert_eq!(reader.next().await.unwrap().sequence, 1);
        assert!(reader.next().await.is_none());
    }

    #[test]
    fn memory_is_bounded_whatever_is_said() {
        let mut ring = Ring::new(64 << 10);
        for size in [0, 1, 100 << 10, 100].into_iter().cycle().take(2000) {
            ring.put(message(Source::User, vec![b'x'; size]));
            let held: usize = ring.system.entries.iter().map(Entry::size).sum();
            assert!(held == ring.system.size && held <= 64 << 10);
        }
        assert_eq!(ring.last, 2000);
        assert!(ring.system.entries.len() > 3);
    }

    #[tokio::test]
    async fn output_makes_only_output_go_and_all_is_in_order() {
        let logs = Logs::new(10 * (size_of::<Entry>() + 5));
        let process = Source::Process("p1".into());
        say(&logs, "first");
        for number in 0..100 {
            logs.put(message(process.clone(), format!("{number:05}")));
        }
        say(&logs, "last ");
        let all = all(&logs, 0).await;
        assert_eq!(all.len(), 12);
        assert_eq!(all[0], (1, "first".into(), 0));
        assert_eq!(all[1], (92, "00090".into(), 90));
        assert_eq!(all[2], (93, "00091".into(), 0));
        assert_eq!(all[11], (102, "last ".into(), 0));
    }

    #[tokio::test]
    async fn what_envd_says_is_in_the_logs() {
        let before = LOGS.ring().last;
        warn("something odd");
        let mut reader = std::pin::pin!(read(before, true).unwrap());
        let answer = loop {
            let answer = tokio::time::timeout(Duration::from_mins(1), reader.next());
            let answer = answer.await.unwrap().unwrap();
            // Other tests speak, too.
            if answer.data == b"something odd" {
                break answer;
            }
        };
        assert_eq!((answer.source.as_str(), answer.severity), ("envd", 4));
    }
}
