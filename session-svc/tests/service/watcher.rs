//! A client that watches sessions, keeps its place, and panics when anything is missing, doubled or out of order.

use std::collections::BTreeMap;

use proto::session::v1::{WatchEventType, WatchSessionsRequest, WatchSessionsResponse};
use tonic::{Status, Streaming};

use crate::world::{PATIENCE, Replica, by};

pub(crate) struct Watcher {
    team: &'static str,
    answers: Streaming<WatchSessionsResponse>,
    /// After what it has seen.
    pub(crate) revision: String,
    /// Versions of the sessions in the snapshot. What is older may be sent once more after it.
    pub(crate) snapshot: BTreeMap<String, u64>,
    /// The newest event of each session.
    known: BTreeMap<String, u64>,
    /// Every change, in the order it came.
    pub(crate) changes: Vec<WatchSessionsResponse>,
}

async fn open(
    replica: &Replica,
    team: &str,
    revision: &str,
    session_id: &str,
) -> Result<Streaming<WatchSessionsResponse>, Status> {
    let request = WatchSessionsRequest {
        revision: revision.into(),
        session_id: session_id.into(),
    };
    let answer = replica.sessions().watch_sessions(by(team, request)).await?;
    Ok(answer.into_inner())
}

async fn patiently<T>(answer: impl Future<Output = T>) -> T {
    let answer = tokio::time::timeout(PATIENCE, answer).await;
    answer.expect("a watch must not fall silent")
}

impl Watcher {
    /// Watches team red, with the snapshot read.
    pub(crate) async fn start(replica: &Replica) -> Self {
        Self::start_as("red", replica, "").await
    }

    /// Watches one session of a team, or all, with the snapshot read.
    pub(crate) async fn start_as(team: &'static str, replica: &Replica, session_id: &str) -> Self {
        let mut watcher = Self {
            team,
            answers: open(replica, team, "", session_id).await.unwrap(),
            revision: String::new(),
            snapshot: BTreeMap::new(),
            known: BTreeMap::new(),
            changes: Vec::new(),
        };
        loop {
            let answer = patiently(watcher.answer()).await.unwrap();
            assert!(answer.event.is_none(), "{answer:?}");
            if answer.r#type() == WatchEventType::SnapshotEnd {
                watcher.known = watcher.snapshot.clone();
                return watcher;
            }
            assert_eq!(answer.r#type(), WatchEventType::Snapshot);
            let session = answer.session.unwrap();
            assert_eq!(session.access_token, "", "watches show no secrets");
            let twice = watcher.snapshot.insert(session.session_id, session.version);
            assert_eq!(twice, None);
        }
    }

    /// Watches team red from a revision on.
    pub(crate) async fn resume_from(replica: &Replica, revision: &str) -> Result<Self, Status> {
        Ok(Self {
            team: "red",
            answers: open(replica, "red", revision, "").await?,
            revision: revision.into(),
            snapshot: BTreeMap::new(),
            known: BTreeMap::new(),
            changes: Vec::new(),
        })
    }

    /// Goes on where it is, at this replica.
    pub(crate) async fn resume(&mut self, replica: &Replica) {
        self.answers = open(replica, self.team, &self.revision, "").await.unwrap();
    }

    async fn answer(&mut self) -> Result<WatchSessionsResponse, Status> {
        let answer = self.answers.message().await?;
        let answer = answer.ok_or_else(|| Status::unknown("the watch ended without a word"))?;
        self.revision.clone_from(&answer.revision);
        Ok(answer)
    }

    /// Waits for a heartbeat, noting changes on the way.
    pub(crate) async fn heartbeat(&mut self) {
        patiently(async {
            loop {
                let answer = self.answer().await.unwrap();
                if answer.r#type() == WatchEventType::Heartbeat {
                    return;
                }
                self.note(answer);
            }
        })
        .await;
    }

    /// The next change.
    pub(crate) async fn next(&mut self) -> Result<WatchSessionsResponse, Status> {
        patiently(async {
            loop {
                let answer = self.answer().await?;
                if answer.r#type() != WatchEventType::Heartbeat && self.note(answer.clone()) {
                    return Ok(answer);
                }
            }
        })
        .await
    }

    /// Whether it is news, and not older than the snapshot.
    fn note(&mut self, change: WatchSessionsResponse) -> bool {
        assert_eq!(change.r#type(), WatchEventType::Change);
        let (session, event) = (change.session.as_ref(), change.event.as_ref());
        let (session, event) = (session.unwrap(), event.unwrap());
        assert_eq!(session.session_id, event.session_id);
        assert_eq!(session.state, event.state);
        assert_eq!(session.access_token, "", "watches show no secrets");
        let (id, sequence) = (event.session_id.clone(), event.sequence);
        if self.snapshot.get(&id).is_some_and(|old| sequence <= *old) {
            return false;
        }
        // A watch that was resumed without its past cannot know what came first.
        if let Some(last) = self.known.get(&id) {
            assert_eq!(sequence, last + 1, "{id} after {last}: {event:?}");
        }
        self.known.insert(id, sequence);
        self.changes.push(change);
        true
    }

    /// Reads up to and including an event of a session.
    pub(crate) async fn until(&mut self, id: &str, kind: &str) {
        loop {
            let change = self.next().await.unwrap();
            if change
                .event
                .is_some_and(|event| event.session_id == id && event.r#type == kind)
            {
                return;
            }
        }
    }

    /// Every change so far of a session, or of all: what happened and its sequence number.
    pub(crate) fn seen(&self, id: &str) -> Vec<(u64, String)> {
        let events = self
            .changes
            .iter()
            .filter_map(|change| change.event.as_ref());
        let wanted = events.filter(|event| id.is_empty() || event.session_id == id);
        wanted
            .map(|event| (event.sequence, event.r#type.clone()))
            .collect()
    }
}
