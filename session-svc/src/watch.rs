//! `WatchSessions`: a team's sessions as they are, then every change in the order of the feed, resumable from any revision.
//!
//! Each watch reads the feed for itself from where it stands, so a slow client holds up nobody and buffers nothing here.

use std::time::Duration;

use futures::Stream;
use proto::session::v1::{SessionEvent, WatchEventType, WatchSessionsResponse};
use service_kit::{
    errors::{Failure, Reason},
    ids::{SessionId, TeamId},
    mesh::Caller,
};
use tokio::{sync::mpsc, time::Instant};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Code, Status};

use crate::{
    changes::Changes,
    errors::SessionError,
    session::HostPattern,
    store::{Filter, Revision, Store, StoreError},
};

const PAGE: i64 = 200;
const BUFFER: usize = 16;
/// How long a client has to take why its watch ends.
const LAST_WORD: Duration = Duration::from_secs(2);

/// Opens watches.
#[derive(Debug, Clone)]
pub struct Watches {
    /// The feed.
    pub store: Store,
    /// Word of changes.
    pub changes: Changes,
    /// How hosts are written.
    pub hosts: HostPattern,
    /// Joined at shutdown.
    pub tasks: TaskTracker,
    /// After how long without a change a watch says so.
    pub heartbeat: Duration,
    /// Ends all watches.
    pub shutdown: CancellationToken,
}

struct Watch {
    team: TeamId,
    only: Option<SessionId>,
    to: mpsc::Sender<Result<WatchSessionsResponse, Status>>,
}

/// The client went away, or the database did.
enum End {
    Gone,
    Store(StoreError),
}

impl From<StoreError> for End {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl Watches {
    /// A page of one session's history.
    pub async fn history(
        &self,
        caller: &Caller,
        id: &SessionId,
        after: i64,
        limit: i64,
    ) -> Result<Vec<SessionEvent>, SessionError> {
        Ok(self.store.history(&caller.team, id, after, limit).await?)
    }

    /// A watch from a revision, or from a snapshot.
    pub async fn open(
        &self,
        caller: &Caller,
        only: Option<SessionId>,
        after: Option<&str>,
    ) -> Result<impl Stream<Item = Result<WatchSessionsResponse, Status>> + Send + use<>, Status>
    {
        let from = match after {
            None => None,
            Some(text) => {
                let revision: Revision = text.parse().map_err(|_| {
                    Failure::field_invalid("revision", "is not one this service gave out")
                        .into_status()
                })?;
                self.still_kept(revision).await?;
                Some(revision)
            }
        };
        if let Some(id) = &only {
            let known = self.store.get(id).await.map_err(SessionError::from)?;
            if known.is_none_or(|session| session.team != caller.team) {
                return Err(SessionError::Unknown(id.clone()).into());
            }
        }
        let (to, stream) = mpsc::channel(BUFFER);
        let watch = Watch {
            team: caller.team.clone(),
            only,
            to,
        };
        let watches = self.clone();
        self.tasks.spawn(async move {
            let shutdown = watches.shutdown.clone();
            let to = watch.to.clone();
            let end = tokio::select! {
                () = shutdown.cancelled() => {
                    Some(Failure::unavailable(Reason::SERVICE_UNAVAILABLE, "the service restarts; watch again from the last revision"))
                }
                end = watches.follow(watch, from) => match end {
                    End::Gone => None,
                    End::Store(error) => Some(error.into()),
                },
            };
            if let Some(failure) = end {
                // A client that is gone needs no reason, one that reads nothing gets none in time.
                let _ = to
                    .send_timeout(Err(failure.into_status()), LAST_WORD)
                    .await;
            }
        });
        Ok(ReceiverStream::new(stream))
    }

    async fn still_kept(&self, revision: Revision) -> Result<(), Status> {
        let span = self.store.span().await;
        let span = span.map_err(|error| Failure::from(error).into_status())?;
        if span.holds(revision) {
            return Ok(());
        }
        Err(Failure::new(
            Code::OutOfRange,
            Reason::REVISION_TOO_OLD,
            "changes after this revision are not all kept any more; watch without a revision",
        )
        .into())
    }

    async fn follow(&self, watch: Watch, from: Option<Revision>) -> End {
        let Err(end) = self.try_follow(&watch, from).await;
        end
    }

    async fn try_follow(
        &self,
        watch: &Watch,
        from: Option<Revision>,
    ) -> Result<std::convert::Infallible, End> {
        let mut listener = self.changes.listen();
        let mut revision = match from {
            Some(revision) => revision,
            None => self.snapshot(watch).await?,
        };
        let mut last_sent = Instant::now();
        loop {
            let changes = self.store.changes_after(revision, PAGE).await?;
            let full = i64::try_from(changes.len()).is_ok_and(|count| count == PAGE);
            for change in changes {
                revision = change.revision;
                if watch.wants(&change.team, &change.session.session_id) {
                    let (session, event) = (Some(change.session), Some(change.event));
                    watch
                        .send(WatchEventType::Change, session, event, revision)
                        .await?;
                    last_sent = Instant::now();
                }
            }
            if full {
                continue;
            }
            if last_sent.elapsed() >= self.heartbeat {
                watch
                    .send(WatchEventType::Heartbeat, None, None, revision)
                    .await?;
                last_sent = Instant::now();
            }
            tokio::select! {
                () = listener.heard() => {}
                () = watch.to.closed() => return Err(End::Gone),
            }
        }
    }

    async fn snapshot(&self, watch: &Watch) -> Result<Revision, End> {
        // Taken before the rows are read: a change in between is sent twice rather than never.
        let head = self.store.head().await?;
        let mut after = None;
        loop {
            let filter = Filter {
                team: watch.team.clone(),
                states: Vec::new(),
                metadata: std::collections::BTreeMap::new(),
                template: None,
                after,
                limit: PAGE,
            };
            let page = self.store.list(&filter).await?;
            let Some(last) = page.last() else { break };
            after = Some((last.create_time.0, last.id.to_string()));
            for session in page {
                if watch.wants(session.team.as_str(), session.id.as_str()) {
                    watch
                        .send(
                            WatchEventType::Snapshot,
                            Some(session.wire(&self.hosts)),
                            None,
                            head,
                        )
                        .await?;
                }
            }
        }
        watch
            .send(WatchEventType::SnapshotEnd, None, None, head)
            .await?;
        Ok(head)
    }
}

impl Watch {
    fn wants(&self, team: &str, id: &str) -> bool {
        self.team.as_str() == team && self.only.as_ref().is_none_or(|only| only.as_str() == id)
    }

    async fn send(
        &self,
        kind: WatchEventType,
        session: Option<proto::session::v1::Session>,
        event: Option<SessionEvent>,
        revision: Revision,
    ) -> Result<(), End> {
        let answer = WatchSessionsResponse {
            r#type: kind.into(),
            session,
            event,
            revision: revision.to_string(),
        };
        self.to.send(Ok(answer)).await.map_err(|_| End::Gone)
    }
}
