//! Logs of sessions: what their guests have said, kept on the node's disk under the session's ID, so that they outlive the guest.
//!
//! Each session has a folder of at most two [`segment`]s: the older goes when the newer is full. Messages are numbered within the
//! session, whatever becomes of its guest; what was lost has numbers too. Readers follow the files, so a slow one holds up nobody and
//! costs no memory.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use futures::{Stream, stream};
use prost_types::Timestamp;
use proto::{node::v1::SessionNotice, session::v1::StreamSessionLogsResponse};
use service_kit::ids::SessionId;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use self::segment::{Cursor, Kept, Writer};
use crate::work;

mod segment;

/// Longest text of a message that is kept, in bytes; as envd has it.
pub const LONGEST: usize = 8 << 10;
/// Messages that are lost in a row and counted; a guest says what it likes.
const MOST_LOST: u64 = 1 << 20;
const SWEEP: Duration = Duration::from_mins(10);
/// Notices of a session that the registry is told again after a restart of node-svc.
const NOTICES: usize = 100;

/// A message to be kept.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct NewMessage {
    /// As in `StreamSessionLogsResponse`.
    pub source: String,
    /// When, by the guest's clock.
    pub time: Option<Timestamp>,
    /// Without a newline.
    pub data: Vec<u8>,
    /// As in syslog(3).
    pub severity: u32,
    /// How many are lost before it.
    pub dropped: u64,
    /// Its number in the guest, 0 for none.
    pub guest_sequence: u64,
    /// Type of the session's event it is; empty for none.
    pub event: String,
}

impl NewMessage {
    /// What the node has to say.
    pub fn of_node(severity: u32, event: &str, text: impl Into<String>) -> Self {
        Self {
            source: "node".into(),
            time: Some(SystemTime::now().into()),
            data: text.into().into_bytes(),
            severity,
            event: event.into(),
            ..Self::default()
        }
    }
}

/// The last message of a guest that is kept: its number there, and its time.
pub type Anchor = (u64, Option<Timestamp>);

/// How long logs of sessions that have ended are kept, and how many bytes of them.
#[derive(Debug, Clone, Copy)]
pub struct Retention {
    /// After the last message.
    pub age: Duration,
    /// In all; the oldest go first.
    pub bytes: u64,
}

/// Where a log ends, right now.
#[derive(Debug, Clone, Copy, Default)]
struct End {
    last: u64,
    is_over: bool,
}

/// The log of one session that is here.
#[derive(Debug)]
pub struct SessionLog {
    id: SessionId,
    folder: PathBuf,
    /// Opened when first needed.
    writer: Mutex<Option<Writer>>,
    end: watch::Sender<End>,
}

impl SessionLog {
    /// Keeps messages; those that are events come back as notices. What cannot be written is counted as lost.
    pub async fn put(self: &Arc<Self>, messages: Vec<NewMessage>) -> Vec<SessionNotice> {
        let log = Arc::clone(self);
        let put = work::blocking(move || log.put_blocking(messages)).await;
        put.unwrap_or_else(|error| {
            tracing::error!(session_id = self.id.short(), %error, "logs of a session are lost");
            Vec::new()
        })
    }

    fn put_blocking(&self, messages: Vec<NewMessage>) -> Vec<SessionNotice> {
        let mut slot = self.writer();
        let mut notices = Vec::new();
        let writer = match self.opened(&mut slot) {
            Ok(writer) => writer,
            Err(error) => {
                tracing::error!(session_id = self.id.short(), %error, lost = messages.len(), "the logs of a session cannot be written");
                return notices;
            }
        };
        for message in messages {
            let NewMessage {
                source,
                time,
                mut data,
                severity,
                dropped,
                guest_sequence,
                event,
            } = message;
            data.truncate(LONGEST);
            writer.lose(dropped.min(MOST_LOST));
            let mut kept = Kept {
                sequence: 0,
                time,
                source,
                data,
                severity,
                guest_sequence,
                event,
            };
            match writer.append(&mut kept) {
                Ok(()) => notices.extend(notice(&self.id, &kept)),
                Err(error) => {
                    if !writer.is_losing() {
                        tracing::error!(session_id = self.id.short(), %error, "logs of a session are not written, and are lost");
                    }
                    writer.lose(1);
                }
            }
        }
        let last = writer.last();
        self.end.send_modify(|end| end.last = last);
        notices
    }

    /// The last message of the guest.
    pub async fn anchor(self: &Arc<Self>) -> io::Result<Option<Anchor>> {
        self.with_writer(|_, writer| Ok(writer.anchor())).await
    }

    /// All messages of the guest that are kept, as numbers and times, and the oldest of the times.
    pub async fn known(self: &Arc<Self>) -> io::Result<(HashSet<(u64, i64, i32)>, i64)> {
        self.with_writer(|log, _| {
            let kept = segment::all(&log.folder)?;
            let of_guest = kept.iter().filter(|kept| kept.guest_sequence > 0);
            let known: HashSet<_> = of_guest
                .map(|kept| {
                    let time = kept.time.unwrap_or_default();
                    (kept.guest_sequence, time.seconds, time.nanos)
                })
                .collect();
            let oldest = known.iter().map(|(_, seconds, _)| *seconds).min();
            Ok((known, oldest.unwrap_or(i64::MIN)))
        })
        .await
    }

    /// What the registry may not know yet.
    pub async fn notices(self: &Arc<Self>) -> io::Result<Vec<SessionNotice>> {
        self.with_writer(|log, _| {
            let kept = segment::all(&log.folder)?;
            let mut notices: Vec<_> = kept
                .iter()
                .filter_map(|kept| notice(&log.id, kept))
                .collect();
            notices.drain(..notices.len().saturating_sub(NOTICES));
            Ok(notices)
        })
        .await
    }

    /// Waits until nothing has come for so long, or the limit.
    pub async fn quiet(&self, silence: Duration, limit: Duration) {
        let mut end = self.end.subscribe();
        let quiet = async {
            while tokio::time::timeout(silence, end.changed())
                .await
                .is_ok_and(|heard| heard.is_ok())
            {}
        };
        // Over the limit it is as good as quiet.
        let _ = tokio::time::timeout(limit, quiet).await;
    }

    async fn with_writer<T: Send + 'static>(
        self: &Arc<Self>,
        ask: impl FnOnce(&Self, &mut Writer) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let log = Arc::clone(self);
        let asked = work::blocking(move || ask(&log, log.opened(&mut log.writer())?));
        asked.await.map_err(io::Error::other)?
    }

    fn writer(&self) -> MutexGuard<'_, Option<Writer>> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn opened<'a>(&self, slot: &'a mut Option<Writer>) -> io::Result<&'a mut Writer> {
        if let Some(writer) = slot {
            return Ok(writer);
        }
        let writer = Writer::open(self.folder.clone())?;
        self.end.send_modify(|end| end.last = writer.last());
        Ok(slot.insert(writer))
    }
}

fn notice(id: &SessionId, kept: &Kept) -> Option<SessionNotice> {
    (!kept.event.is_empty()).then(|| SessionNotice {
        session_id: id.to_string(),
        sequence: kept.sequence,
        r#type: kept.event.clone(),
        message: String::from_utf8_lossy(&kept.data).into_owned(),
    })
}

/// Why a log is not read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// There is none.
    #[error("no logs of this session are kept here")]
    None,
    /// From later on than it goes.
    #[error("there is no message {after} yet, the last is {last}")]
    NotYet {
        /// What was asked for.
        after: u64,
        /// The last there is.
        last: u64,
    },
    /// The node's disk.
    #[error("the node's disk: {0}")]
    Io(#[from] io::Error),
}

/// The logs of all sessions of this node, also of those that have ended.
#[derive(Debug)]
pub struct SessionLogs {
    folder: PathBuf,
    retention: Retention,
    open: Mutex<HashMap<SessionId, Arc<SessionLog>>>,
}

impl SessionLogs {
    /// In this folder.
    pub fn new(folder: PathBuf, retention: Retention) -> Self {
        Self {
            folder,
            retention,
            open: Mutex::default(),
        }
    }

    fn open(&self) -> MutexGuard<'_, HashMap<SessionId, Arc<SessionLog>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The log of a session that is here, until [`SessionLogs::end`].
    pub fn begin(&self, id: &SessionId) -> Arc<SessionLog> {
        let log = || {
            Arc::new(SessionLog {
                id: id.clone(),
                folder: self.folder.join(id.as_str()),
                writer: Mutex::default(),
                end: watch::Sender::default(),
            })
        };
        Arc::clone(self.open().entry(id.clone()).or_insert_with(log))
    }

    /// No message comes any more.
    pub fn end(&self, id: &SessionId) {
        if let Some(log) = self.open().remove(id) {
            log.end.send_modify(|end| end.is_over = true);
        }
    }

    /// The messages after one; with `follow` also those to come, until the session ends.
    pub async fn read(
        &self,
        id: &SessionId,
        after: u64,
        follow: bool,
    ) -> Result<impl Stream<Item = io::Result<StreamSessionLogsResponse>> + Send + use<>, ReadError>
    {
        let open = self.open().get(id).cloned();
        let folder = self.folder.join(id.as_str());
        let (last, news) = if let Some(log) = open {
            // Opened, it knows its last message.
            log.anchor().await?;
            let news = log.end.subscribe();
            let last = news.borrow().last;
            (last, Some(news))
        } else {
            let folder = folder.clone();
            let last = blocking(move || segment::last(&folder)).await?;
            (last.ok_or(ReadError::None)?, None)
        };
        if after > last {
            return Err(ReadError::NotYet { after, last });
        }
        let reader = Reader {
            folder,
            cursor: Cursor::after(after),
            news: news.filter(|_| follow),
            last: if follow { u64::MAX } else { last },
        };
        let pages = stream::try_unfold(reader, |mut reader| async move {
            let page = reader.page().await?;
            Ok::<_, io::Error>(page.map(|page| (stream::iter(page.into_iter().map(Ok)), reader)))
        });
        Ok(futures::TryStreamExt::try_flatten(pages))
    }

    /// Removes what is too old or too much, until `shutdown`.
    pub async fn keep_clean(self: Arc<Self>, shutdown: CancellationToken) {
        let mut ticks = tokio::time::interval(SWEEP);
        while shutdown.run_until_cancelled(ticks.tick()).await.is_some() {
            let logs = Arc::clone(&self);
            if let Err(error) = blocking(move || logs.sweep(SystemTime::now())).await {
                tracing::error!(%error, "old logs of sessions are not removed");
            }
        }
    }

    /// Blocking.
    fn sweep(&self, now: SystemTime) -> io::Result<()> {
        let mut ended = Vec::new();
        let folders = match fs::read_dir(&self.folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            folders => folders?,
        };
        for folder in folders {
            let folder = folder?;
            let name = folder.file_name();
            let id = name.to_str().and_then(|name| SessionId::parse(name).ok());
            if id.is_some_and(|id| self.open().contains_key(&id)) {
                continue;
            }
            let (bytes, newest) = segment::size(&folder.path())?;
            ended.push((newest, bytes, folder.path()));
        }
        ended.sort();
        let mut bytes: u64 = ended.iter().map(|(_, bytes, _)| bytes).sum();
        for (newest, size, folder) in ended {
            let age = now.duration_since(newest).unwrap_or_default();
            if age < self.retention.age && bytes <= self.retention.bytes {
                break;
            }
            fs::remove_dir_all(folder)?;
            bytes -= size;
        }
        Ok(())
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    work::blocking(work).await.map_err(io::Error::other)?
}

struct Reader {
    folder: PathBuf,
    cursor: Cursor,
    /// While what comes is waited for.
    news: Option<watch::Receiver<End>>,
    last: u64,
}

impl Reader {
    /// Some messages more; `None` at the end.
    async fn page(&mut self) -> io::Result<Option<Vec<StreamSessionLogsResponse>>> {
        loop {
            if self.cursor.seen() >= self.last {
                return Ok(None);
            }
            let is_over = self
                .news
                .as_mut()
                .is_none_or(|news| news.borrow_and_update().is_over);
            let (folder, mut cursor) = (self.folder.clone(), self.cursor);
            let (page, cursor) = blocking(move || Ok((cursor.page(&folder)?, cursor))).await?;
            let mut seen = self.cursor.seen();
            self.cursor = cursor;
            if !page.is_empty() {
                let shown = page
                    .into_iter()
                    .take_while(|kept| kept.sequence <= self.last);
                let shown = shown.map(|kept| {
                    let dropped = kept.sequence - seen - 1;
                    seen = kept.sequence;
                    kept.shown(dropped)
                });
                return Ok(Some(shown.collect()));
            }
            match &mut self.news {
                Some(news) if !is_over => {
                    // The sender may be gone: then it is over, as the next look shows.
                    if news.changed().await.is_err() {
                        self.news = None;
                    }
                }
                _ => return Ok(None),
            }
        }
    }
}
