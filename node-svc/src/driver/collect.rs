//! What a guest says goes into its session's log, for as long as there is a way to it.
//!
//! A collector goes on after the last message that is kept, and asks for that one again: if the guest has another under its number, the guest
//! went back to an earlier state, its log with it, and what is new is found by comparing. Whatever a guest says is bounded: messages in
//! length, bytes in time, numbers in how far they jump.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures::{Stream, StreamExt as _, TryStreamExt as _, stream};
use proto::envd::v1::{MemoryShortage, OomVictim, StreamLogsRequest, StreamLogsResponse};
use service_kit::errors::reason_of;
use tokio::time::Instant;
use tonic::Status;

use crate::{
    hosted::{Hosted, Reach},
    logs::{LONGEST, NewMessage, SessionLog},
};

/// Messages that are written together.
const TOGETHER: usize = 64;
const TRY_AGAIN: Duration = Duration::from_secs(1);
/// What is taken of a guest in a window of time; the rest waits in the guest, where the oldest goes.
const BYTES: usize = 2 << 20;
const WINDOW: Duration = Duration::from_secs(10);
/// A message on the wire, with all there is around its text.
const LARGEST: usize = 64 << 10;
/// Between events of one kind; what is more often is in the log.
pub(super) const EVENT_PAUSE: Duration = Duration::from_secs(10);
/// As in syslog(3).
pub(super) const WARNING: u32 = 4;
const UNKNOWN: &str = "LOG_SEQUENCE_UNKNOWN";
/// Of a process's ID, as envd has it.
const LONGEST_ID: usize = 128;
/// Of a process's name, which has 15 (Linux, `TASK_COMM_LEN`), with room for what cannot be shown.
const LONGEST_NAME: usize = 64;

/// Puts messages into the log, and what of them are events where the registry hears of it.
pub(super) async fn put(log: &Arc<SessionLog>, hosted: &Hosted, messages: Vec<NewMessage>) {
    hosted.notify(log.put(messages).await);
}

/// Collects until this way to the guest is over, and all that came by it is kept.
pub(super) async fn collect(reach: Arc<Reach>, log: Arc<SessionLog>, hosted: Arc<Hosted>) {
    let mut collector = Collector {
        reach: Arc::clone(&reach),
        log,
        hosted,
        window: (Instant::now(), 0),
        last_events: HashMap::new(),
    };
    loop {
        if let Err(status) = collector.follow().await {
            tracing::debug!(%status, "logs of a guest end here");
        }
        tokio::select! {
            () = reach.over.cancelled() => return,
            () = reach.guest.closed() => return,
            () = tokio::time::sleep(TRY_AGAIN) => {}
        }
    }
}

struct Collector {
    reach: Arc<Reach>,
    log: Arc<SessionLog>,
    hosted: Arc<Hosted>,
    /// Since when, and how many bytes.
    window: (Instant, usize),
    /// When one of a kind was told last.
    last_events: HashMap<&'static str, Instant>,
}

impl Collector {
    async fn follow(&mut self) -> Result<(), Status> {
        let Some((sequence, time)) = self.log.anchor().await? else {
            let messages = messages_after(&self.reach, 0, true).await?;
            return self.take(0, messages).await;
        };
        let is_there = match messages_after(&self.reach, sequence - 1, false).await {
            Ok(messages) => {
                let first = Box::pin(messages).try_next().await?;
                // Of a later one it cannot be told; a guest that was put back says less.
                first.is_some_and(|first| first.sequence > sequence || first.time == time)
            }
            Err(status) if reason_of(&status).as_deref() == Some(UNKNOWN) => false,
            Err(status) => return Err(status),
        };
        if is_there {
            let messages = messages_after(&self.reach, sequence, true).await?;
            return self.take(sequence, messages).await;
        }
        self.follow_rewound().await
    }

    /// The guest went back: what it says from its beginning on, but for what is kept.
    async fn follow_rewound(&mut self) -> Result<(), Status> {
        let (known, oldest) = self.log.known().await?;
        let mut messages = Box::pin(messages_after(&self.reach, 0, true).await?);
        let mut seen = 0;
        while let Some(message) = messages.try_next().await? {
            let time = message.time.unwrap_or_default();
            let is_known = time.seconds < oldest
                || known.contains(&(message.sequence, time.seconds, time.nanos));
            if !is_known {
                let messages = stream::once(async { Ok(message) }).chain(messages);
                return self.take(seen, messages).await;
            }
            seen = message.sequence;
        }
        Ok(())
    }

    /// Keeps messages after the number `seen`, until they end.
    async fn take(
        &mut self,
        mut seen: u64,
        messages: impl Stream<Item = Result<StreamLogsResponse, Status>> + Send,
    ) -> Result<(), Status> {
        let mut parts = Box::pin(messages.ready_chunks(TOGETHER));
        while let Some(part) = parts.next().await {
            let mut new = Vec::with_capacity(part.len());
            let mut failed = None;
            for message in part {
                match message {
                    // Numbers that do not grow make no sense.
                    Ok(message) if message.sequence > seen => {
                        let dropped = message.sequence - seen - 1;
                        seen = message.sequence;
                        let victim = message.oom_victim.clone();
                        let shortage = message.memory_shortage;
                        new.push(read(message, dropped));
                        new.extend(victim.and_then(|victim| self.kill(&victim)));
                        new.extend(shortage.and_then(|left| self.shortage(left)));
                    }
                    Ok(_) => {}
                    Err(status) => failed = Some(status),
                }
            }
            let bytes = new.iter().map(|message| message.data.len() + 64).sum();
            put(&self.log, &self.hosted, new).await;
            if let Some(status) = failed {
                return Err(status);
            }
            self.pace(bytes).await;
        }
        Ok(())
    }

    /// An event, unless one was just told.
    fn kill(&mut self, victim: &OomVictim) -> Option<NewMessage> {
        let name: String = victim.command.escape_debug().take(LONGEST_NAME).collect();
        let pid = victim.pid;
        let text = format!("the guest's kernel killed {name} (PID {pid}) for want of memory");
        self.event("OOM_KILLED", text)
    }

    fn shortage(&mut self, left: MemoryShortage) -> Option<NewMessage> {
        let mib = |bytes: u64| bytes >> 20;
        let (available, total) = (mib(left.available_bytes), mib(left.total_bytes));
        let text = format!("{available} MiB of {total} MiB of memory are left to processes");
        self.event("MEMORY_PRESSURE", text)
    }

    fn event(&mut self, kind: &'static str, text: String) -> Option<NewMessage> {
        let now = Instant::now();
        let last = self.last_events.get(kind);
        if last.is_some_and(|last| now - *last < EVENT_PAUSE) {
            return None;
        }
        self.last_events.insert(kind, now);
        Some(NewMessage::of_node(WARNING, kind, text))
    }

    /// Takes no more than is agreed.
    async fn pace(&mut self, bytes: usize) {
        let (since, taken) = &mut self.window;
        if since.elapsed() >= WINDOW {
            (*since, *taken) = (Instant::now(), 0);
        }
        *taken += bytes;
        if *taken >= BYTES {
            let over = self.reach.over.cancelled();
            // What has come is kept all the same.
            let _ = tokio::time::timeout_at(*since + WINDOW, over).await;
        }
    }
}

/// They end when this way to the guest is over, and what has come is taken.
async fn messages_after(
    reach: &Reach,
    sequence: u64,
    follow: bool,
) -> Result<impl Stream<Item = Result<StreamLogsResponse, Status>> + Send + use<>, Status> {
    let request = StreamLogsRequest {
        after_sequence: sequence,
        follow: Some(follow),
    };
    let mut system = reach.guest.system().max_decoding_message_size(LARGEST);
    let over = reach.over.clone();
    let answer = over.run_until_cancelled(system.stream_logs(request)).await;
    let Some(messages) = answer.transpose()? else {
        return Err(Status::cancelled("this way to the guest is over"));
    };
    let messages = (messages.into_inner(), over);
    Ok(stream::unfold(
        messages,
        |(mut messages, over)| async move {
            let message = tokio::select! {
                biased;
                message = messages.next() => message,
                () = over.cancelled() => None,
            };
            message.map(|message| (message, (messages, over)))
        },
    ))
}

/// A message of a guest as it is kept.
fn read(message: StreamLogsResponse, dropped: u64) -> NewMessage {
    let mut data = message.data;
    data.truncate(LONGEST);
    let is_source = |source: &str| match source.strip_prefix("process:") {
        Some(id) => {
            id.len() <= LONGEST_ID
                && id
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
        }
        None => matches!(source, "kernel" | "envd" | "user"),
    };
    let source = message.source;
    let time = message
        .time
        .filter(|time| SystemTime::try_from(*time).is_ok());
    NewMessage {
        source: if is_source(&source) {
            source
        } else {
            "user".into()
        },
        time: time.or_else(|| Some(SystemTime::now().into())),
        data,
        severity: message.severity.min(7),
        dropped,
        guest_sequence: message.sequence,
        event: String::new(),
    }
}
