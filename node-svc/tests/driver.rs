//! Sessions on a node whose guests are simulated: what they pass through, what fails, what is left.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    fs,
    path::PathBuf,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures::{Stream, StreamExt as _};

use node_svc::{
    api::NodeApi,
    artifact::Artifacts,
    cache::Cache,
    disk::Disks,
    driver::{Makings, WarmPolicy, WarmPool, Workshop},
    hosted::{Hosted, Lookup, Phase},
    logs::{Retention, SessionLogs},
    snapshot::TemplateSnapshots,
    stored::Maker,
    vmm::{DEVICES, fake::Fake},
};
use proto::{
    envd::v1::{MemoryShortage, OomVictim, StreamLogsResponse},
    node::v1::{
        Capacity, DeleteSnapshotRequest, ExportSessionRequest, ForkChild, ForkSessionRequest,
        PauseSessionRequest, ResumeSessionRequest, RollbackSessionRequest, SnapshotSessionRequest,
        StartSessionRequest, StopSessionRequest, StreamSessionLogsRequest, UpdateSessionRequest,
        WatchSessionsRequest, export_session_response::Part, node_service_server::NodeService as _,
    },
    session::v1::{Network, PortAccess, Resources, SessionState},
    template::v1::Template,
};
use service_kit::{
    errors::reason_of,
    ids::{HomeTag, SessionId},
    mesh::{self, MeshToken},
};
use tempfile::TempDir;
use tokio::sync::{Semaphore, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Code, Request, Status};

const LIMIT: Duration = Duration::from_secs(10);

struct Node {
    api: NodeApi,
    hosted: Arc<Hosted>,
    folder: TempDir,
}

impl Node {
    fn new(fake: Fake) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let hosted = Arc::new(Hosted::new(Capacity {
            sessions: 8,
            memory_bytes: 800,
            vcpus: 8,
            disk_bytes: 20_000,
        }));
        fs::create_dir(path("s")).unwrap();
        let policy = WarmPolicy {
            min_idle: 0,
            max_idle: 0,
            memory: 0,
            idle_ttl: LIMIT,
        };
        let cache = Arc::new(Cache::open(path("artifacts"), path("t"), 1 << 20).unwrap());
        let workshop = Workshop {
            vmm: Arc::new(fake),
            maker: Maker {
                vmm: "fake".into(),
                cpu: "any".into(),
            },
            slots: None,
            // Nobody is there, and nobody is asked.
            artifacts: Artifacts::open(
                path("artifacts"),
                Arc::clone(&cache),
                None,
                mesh::connect(&["127.0.0.1:9".parse().unwrap()], &MeshToken::random()),
            )
            .unwrap(),
            cache,
            snapshots: TemplateSnapshots::open(path("t")).unwrap(),
            makings: Makings::default(),
            store: None,
            images: None,
            disks: Disks::open(path("disks")).unwrap(),
            sessions: path("s"),
            forks: path("f"),
            warm: WarmPool::new(path("w"), policy),
            boots: Semaphore::new(8),
            parallel_boots: 8,
            boot_timeout: LIMIT,
            nameservers: Vec::new(),
            hosted: Arc::clone(&hosted),
            logs: Arc::new(SessionLogs::new(
                path("logs"),
                Retention {
                    age: LIMIT,
                    bytes: 1 << 20,
                },
            )),
        };
        Self {
            api: NodeApi {
                hosted: Arc::clone(&hosted),
                workshop: Arc::new(workshop),
                drivers: TaskTracker::new(),
                start_time: prost_types::Timestamp::default(),
                shutdown: CancellationToken::new(),
            },
            hosted,
            folder,
        }
    }

    async fn start(&self) -> String {
        self.try_start().await.unwrap()
    }

    async fn try_start(&self) -> Result<String, Status> {
        let id = new_id();
        let request = StartSessionRequest {
            session_id: id.clone(),
            template: Some(Template::default()),
            resources: Some(Resources {
                vcpus: 1,
                memory_bytes: 100,
                disk_bytes: 1000,
            }),
            network: Some(Network::default()),
            access_token_sha256: vec![0; 32],
            ..StartSessionRequest::default()
        };
        self.api.start_session(Request::new(request)).await?;
        Ok(id)
    }

    async fn pause(&self, id: &str) -> Result<u64, Status> {
        let session_id = id.to_owned();
        let request = Request::new(PauseSessionRequest { session_id });
        let paused = self.api.pause_session(request).await?;
        Ok(paused.into_inner().stored_bytes)
    }

    async fn resume(&self, id: &str) -> Result<(), Status> {
        let session_id = id.to_owned();
        let request = Request::new(ResumeSessionRequest { session_id });
        self.api.resume_session(request).await.map(drop)
    }

    async fn fork(&self, id: &str, count: usize) -> Result<Vec<String>, Status> {
        let children: Vec<ForkChild> = (0..count)
            .map(|_| ForkChild {
                session_id: new_id(),
                access_token_sha256: vec![0; 32],
            })
            .collect();
        let ids = children
            .iter()
            .map(|child| child.session_id.clone())
            .collect();
        let request = ForkSessionRequest {
            session_id: id.to_owned(),
            children,
        };
        let forked = self.api.fork_session(Request::new(request)).await?;
        let failed = forked.into_inner().failed;
        match failed.into_iter().next() {
            Some(failed) => Err(Status::aborted(failed.end_reason.unwrap().reason)),
            None => Ok(ids),
        }
    }

    async fn snapshot(&self, id: &str, checkpoint: &str) -> Result<(), Status> {
        let request = SnapshotSessionRequest {
            session_id: id.to_owned(),
            checkpoint_id: checkpoint.to_owned(),
        };
        self.api
            .snapshot_session(Request::new(request))
            .await
            .map(drop)
    }

    async fn roll_back(&self, id: &str, checkpoint: &str) -> Result<(), Status> {
        let request = RollbackSessionRequest {
            session_id: id.to_owned(),
            checkpoint_id: checkpoint.to_owned(),
        };
        self.api
            .rollback_session(Request::new(request))
            .await
            .map(drop)
    }

    async fn stop(&self, id: &str) {
        let session_id = id.to_owned();
        let request = Request::new(StopSessionRequest { session_id });
        self.api.stop_session(request).await.unwrap();
    }

    fn state(&self, id: &str) -> SessionState {
        let listed = self.hosted.listing();
        let found = listed.iter().find(|hosted| hosted.session_id == id);
        found.map_or(
            SessionState::Unspecified,
            proto::node::v1::HostedSession::state,
        )
    }

    fn path(&self, id: &str, name: &str) -> PathBuf {
        self.folder.path().join("s").join(id).join(name)
    }

    fn is_clean(&self) -> bool {
        ["s", "f", "w"].iter().all(|name| {
            let folder = self.folder.path().join(name);
            fs::read_dir(folder).map_or(true, |mut entries| entries.next().is_none())
        })
    }
}

fn said(sequence: u64, text: &str) -> StreamLogsResponse {
    StreamLogsResponse {
        sequence,
        time: Some(std::time::SystemTime::now().into()),
        source: "kernel".into(),
        data: text.into(),
        ..StreamLogsResponse::default()
    }
}

async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, what).await.unwrap()
}

/// The log of a session: numbers and texts.
struct Reader(Pin<Box<dyn Stream<Item = (u64, String, u64)> + Send>>);

impl Reader {
    async fn of(node: &Node, id: &str, after: u64, follow: bool) -> Result<Self, Status> {
        let request = proto::session::v1::StreamSessionLogsRequest {
            session_id: id.into(),
            after_sequence: after,
            follow,
        };
        let request = StreamSessionLogsRequest {
            request: Some(request),
        };
        let messages = node.api.stream_session_logs(Request::new(request)).await?;
        let messages = messages.into_inner().map(|answer| {
            let message = answer.unwrap().message.unwrap();
            let text = String::from_utf8(message.data).unwrap();
            (message.sequence, text, message.dropped)
        });
        Ok(Self(Box::pin(messages)))
    }

    async fn next(&mut self) -> Option<(u64, String, u64)> {
        soon(self.0.next()).await
    }

    async fn expect(&mut self, expected: &[(u64, &str)]) {
        for (sequence, text) in expected {
            let (number, said, dropped) = self.next().await.unwrap();
            assert_eq!((number, &*said, dropped), (*sequence, *text, 0));
        }
    }
}

#[tokio::test]
async fn what_a_guest_says_is_kept_once_whatever_becomes_of_it() {
    let (say, says) = watch::channel(vec![said(1, "one"), said(2, "two")]);
    let node = Node::new(Fake {
        says: Some(says),
        ..Fake::default()
    });
    let id = node.start().await;
    let mut reader = Reader::of(&node, &id, 0, true).await.unwrap();
    reader.expect(&[(1, "one"), (2, "two")]).await;
    node.snapshot(&id, "two").await.unwrap();
    say.send_modify(|log| log.push(said(3, "three")));
    reader.expect(&[(3, "three")]).await;
    // The same guest is asked again, and says nothing twice.
    node.pause(&id).await.unwrap();
    node.resume(&id).await.unwrap();
    say.send_modify(|log| log.push(said(4, "four")));
    reader.expect(&[(4, "four")]).await;
    // It went back, and its numbers with it: once it has said less than is kept, ...
    say.send_modify(|log| log.truncate(2));
    node.roll_back(&id, "two").await.unwrap();
    say.send_modify(|log| log.push(said(3, "third")));
    reader.expect(&[(5, "third")]).await;
    // ... and once as much.
    node.pause(&id).await.unwrap();
    let before = say.borrow()[..2].to_vec();
    say.send_replace([before, vec![said(3, "drei"), said(4, "vier")]].concat());
    node.roll_back(&id, "two").await.unwrap();
    reader.expect(&[(6, "drei"), (7, "vier")]).await;
    // What it could not keep is counted.
    say.send_modify(|log| log.push(said(9, "nine")));
    assert_eq!(reader.next().await.unwrap(), (12, "nine".into(), 4));
    let refused = Reader::of(&node, &id, 13, false).await.err().unwrap();
    assert_eq!(
        told(&refused),
        (Code::OutOfRange, "LOG_SEQUENCE_UNKNOWN".into())
    );
    node.stop(&id).await;
    assert_eq!(reader.next().await, None);
    assert!(node.is_clean());
    let mut late = Reader::of(&node, &id, 5, true).await.unwrap();
    late.expect(&[(6, "drei"), (7, "vier")]).await;
    assert_eq!(late.next().await.unwrap().0, 12);
    assert_eq!(late.next().await, None);
    let unknown = Reader::of(&node, &new_id(), 0, false).await.err().unwrap();
    assert_eq!(told(&unknown), (Code::NotFound, "LOGS_GONE".into()));
}

#[tokio::test]
async fn nonsense_of_a_guest_is_bounded_and_kills_are_noticed() {
    let victim = |sequence, pid| StreamLogsResponse {
        oom_victim: Some(OomVictim {
            pid,
            command: "py\nthon".repeat(1000),
        }),
        ..said(sequence, "Out of memory")
    };
    let short = |sequence| StreamLogsResponse {
        memory_shortage: Some(MemoryShortage {
            available_bytes: u64::MAX,
            total_bytes: 0,
        }),
        ..said(sequence, "short")
    };
    let hostile = vec![
        StreamLogsResponse {
            source: "node".into(),
            time: Some(prost_types::Timestamp {
                seconds: i64::MAX,
                nanos: -1,
            }),
            severity: 1000,
            ..said(7, &"x".repeat(50_000))
        },
        victim(u64::MAX - 4, 42),
        short(u64::MAX - 3),
        short(u64::MAX - 2),
        victim(u64::MAX - 1, 43),
        said(3, "not again"),
        said(u64::MAX, "end"),
    ];
    let (_say, says) = watch::channel(hostile);
    let node = Node::new(Fake {
        says: Some(says),
        ..Fake::default()
    });
    let id = node.start().await;
    let mut reader = Reader::of(&node, &id, 0, true).await.unwrap();
    let (first, text, dropped) = reader.next().await.unwrap();
    assert_eq!((first, text.len(), dropped), (7, 8192, 6));
    let (second, ..) = reader.next().await.unwrap();
    assert!(second < 1 << 21, "{second}");
    let (_, event, _) = reader.next().await.unwrap();
    assert!(event.contains("(PID 42)") && event.len() < 200 && !event.contains('\n'));
    while let (number, text, _) = reader.next().await.unwrap()
        && text != "end"
    {
        assert!(number < 1 << 21);
    }
    soon(async {
        while node.hosted.notices().len() < 2 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let notices = node.hosted.notices();
    assert_eq!(notices.len(), 2, "{notices:?}");
    assert_eq!(notices[1].r#type, "MEMORY_PRESSURE");
    assert_eq!(
        (&*notices[0].r#type, &*notices[0].session_id),
        ("OOM_KILLED", &*id)
    );
    assert_eq!(notices[0].message, event);
    node.hosted.noted(2);
    assert!(node.hosted.notices().is_empty());
}

#[tokio::test]
async fn a_watch_tells_what_is_there_and_each_change() {
    let (die, dies) = watch::channel(false);
    let node = Node::new(Fake {
        dies: Some(dies),
        ..Fake::default()
    });
    let id = node.start().await;
    let watch = node
        .api
        .watch_sessions(Request::new(WatchSessionsRequest {}));
    let mut watch = watch.await.unwrap().into_inner();
    let first = soon(watch.next()).await.unwrap().unwrap();
    let session = first.session.unwrap();
    assert_eq!(
        (&*session.session_id, session.state()),
        (&*id, SessionState::Running)
    );
    assert!(soon(watch.next()).await.unwrap().unwrap().listing_complete);
    let other = node.start().await;
    let mut next = async || {
        let next = soon(watch.next()).await;
        next.map(|answer| answer.map(|answer| answer.session))
    };
    let mut until = async |id: &str, state: SessionState| loop {
        let session = next().await.unwrap().unwrap().unwrap();
        if session.session_id == id && session.state() == state {
            break session;
        }
    };
    until(&other, SessionState::Running).await;
    node.pause(&other).await.unwrap();
    assert!(until(&other, SessionState::Paused).await.stored_bytes > 0);
    node.stop(&other).await;
    until(&other, SessionState::Stopped).await;
    die.send_replace(true);
    let ended = until(&id, SessionState::Failed).await;
    assert_eq!(ended.end_reason.unwrap().reason, "VMM_EXITED");
    node.api.shutdown.cancel();
    let cut = next().await.unwrap().unwrap_err();
    assert_eq!(cut.code(), Code::Unavailable);
    assert!(next().await.is_none());
}

fn new_id() -> String {
    SessionId::random(&HomeTag::random()).to_string()
}

fn told(refused: &Status) -> (Code, String) {
    (refused.code(), reason_of(refused).unwrap_or_default())
}

#[tokio::test]
async fn a_session_passes_through_all_it_can() {
    let node = Node::new(Fake::default());
    let id = node.start().await;
    assert!(node.pause(&id).await.unwrap() > 0);
    assert_eq!(node.state(&id), SessionState::Paused);
    let used = node.hosted.used();
    assert_eq!(
        (used.sessions, used.memory_bytes, used.disk_bytes),
        (0, 0, 1000)
    );
    node.pause(&id).await.unwrap();
    let child = node.fork(&id, 1).await.unwrap();
    node.snapshot(&id, "paused").await.unwrap();
    node.resume(&id).await.unwrap();
    node.resume(&id).await.unwrap();
    assert_eq!(node.state(&id), SessionState::Running);
    assert!(!node.path(&id, "paused").exists());
    let children = node.fork(&id, 2).await.unwrap();
    node.snapshot(&id, "running").await.unwrap();
    node.snapshot(&id, "running").await.unwrap();
    node.roll_back(&id, "running").await.unwrap();
    node.roll_back(&id, "paused").await.unwrap();
    assert_eq!(node.state(&id), SessionState::Running);
    let unknown = node.roll_back(&id, "none").await.unwrap_err();
    assert_eq!(
        told(&unknown),
        (Code::NotFound, "CHECKPOINT_UNKNOWN".into())
    );
    let request = DeleteSnapshotRequest {
        session_id: id.clone(),
        checkpoint_id: "paused".into(),
    };
    node.api
        .delete_snapshot(Request::new(request))
        .await
        .unwrap();
    assert!(!node.path(&id, "checkpoints/paused").exists());
    for id in child.iter().chain(&children).chain([&id]) {
        assert_eq!(node.state(id), SessionState::Running);
        node.stop(id).await;
    }
    assert_eq!(node.hosted.used(), Capacity::default());
    assert!(node.is_clean());
}

#[tokio::test]
async fn a_layer_is_sent_for_as_long_as_somebody_listens() {
    let node = Node::new(Fake::default());
    let id = node.start().await;
    let export = |id: &str| {
        let session_id = id.to_owned();
        node.api
            .export_session(Request::new(ExportSessionRequest { session_id }))
    };
    let mut parts = export(&id).await.unwrap().into_inner();
    let first = soon(parts.next()).await.unwrap().unwrap();
    assert_eq!(first.part, Some(Part::Template(Template::default())));
    for _ in 0..100 {
        let next = soon(parts.next()).await.unwrap().unwrap();
        assert_eq!(next.part, Some(Part::Data("layer".into())));
    }
    let session = SessionId::parse(&id).unwrap();
    let Lookup::Here(session) = node.hosted.lookup(&session) else {
        panic!("it is here");
    };
    // Callers wait meanwhile; it does not look as if it had ended.
    let mut phase = session.phase();
    assert!(matches!(*phase.borrow_and_update(), Phase::Held));
    assert_eq!(node.state(&id), SessionState::Running);
    drop(parts);
    let runs = phase.wait_for(|phase| matches!(phase, Phase::Running(_)));
    soon(runs).await.unwrap();

    // Stopped in the middle, it ends.
    let mut parts = export(&id).await.unwrap().into_inner();
    soon(parts.next()).await.unwrap().unwrap();
    soon(node.stop(&id)).await;
    let last = async {
        loop {
            if let Err(status) = parts.next().await.unwrap() {
                break status;
            }
        }
    };
    let status = soon(last).await;
    assert_eq!(reason_of(&status).as_deref(), Some("SESSION_STOPPED"));
    assert!(node.is_clean());
    assert_eq!(export(&id).await.err().unwrap().code(), Code::NotFound);

    let id = node.start().await;
    node.pause(&id).await.unwrap();
    let mut parts = export(&id).await.unwrap().into_inner();
    let status = soon(parts.next()).await.unwrap().unwrap_err();
    assert_eq!(reason_of(&status).as_deref(), Some("SESSION_PAUSED"));
    node.stop(&id).await;
}

#[tokio::test]
async fn an_envd_of_any_later_level_is_talked_to_and_one_too_old_is_refused() {
    let level = |level| Fake {
        envd_level: Some(level),
        ..Fake::default()
    };
    let node = Node::new(level(1000));
    let id = node.start().await;
    node.pause(&id).await.unwrap();
    node.resume(&id).await.unwrap();
    node.stop(&id).await;
    let node = Node::new(level(0));
    let refused = node.try_start().await.unwrap_err();
    assert_eq!(told(&refused), (Code::Aborted, "ENVD_TOO_OLD".into()));
    assert!(refused.message().contains("level 0"), "{refused}");
    assert!(node.is_clean());
}

#[tokio::test]
async fn a_link_that_breaks_when_a_guest_is_restored_is_made_anew() {
    let fake = Fake::default();
    let cut = Arc::clone(&fake.cut);
    let node = Node::new(fake);
    let id = node.start().await;
    for times in [1, 3] {
        node.pause(&id).await.unwrap();
        cut.store(times, Ordering::Relaxed);
        node.resume(&id).await.unwrap();
        assert_eq!(cut.load(Ordering::Relaxed), 0);
        cut.store(times, Ordering::Relaxed);
        let children = node.fork(&id, 1).await.unwrap();
        assert_eq!(node.state(&children[0]), SessionState::Running);
    }
}

#[tokio::test]
async fn bad_input_is_refused() {
    let node = Node::new(Fake::default());
    let id = node.start().await;
    for count in [0, 101] {
        let refused = node.fork(&id, count).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
    }
    for name in ["", "../x", "UPPER", &"a".repeat(65)] {
        let refused = node.snapshot(&id, name).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{name}");
    }
    let unknown = node.pause(&new_id()).await.unwrap_err();
    assert_eq!(told(&unknown), (Code::NotFound, "SESSION_UNKNOWN".into()));
    let request = UpdateSessionRequest {
        session_id: id.clone(),
        network: Some(Network {
            egress_bytes_per_second: 1,
            ..Network::default()
        }),
        wake_on_request: Some(true),
    };
    assert!(
        node.api
            .update_session(Request::new(request))
            .await
            .is_err()
    );
    let Lookup::Here(session) = node.hosted.lookup(&SessionId::parse(&id).unwrap()) else {
        panic!()
    };
    assert!(!session.settings().wake_on_request, "all or nothing");
    let request = UpdateSessionRequest {
        session_id: id.clone(),
        network: Some(Network {
            port_access: PortAccess::Token.into(),
            ..Network::default()
        }),
        wake_on_request: Some(true),
    };
    node.api
        .update_session(Request::new(request))
        .await
        .unwrap();
    assert!(session.settings().wake_on_request);
    assert_eq!(session.settings().port_access, PortAccess::Token);
    node.stop(&id).await;
}

#[tokio::test]
async fn a_full_disk_loses_nothing() {
    let (full, is_full) = watch::channel(false);
    let node = Node::new(Fake {
        disk_full: Some(is_full),
        ..Fake::default()
    });
    let id = node.start().await;
    full.send_replace(true);
    let wanted = (Code::ResourceExhausted, "NODE_DISK_FULL".to_owned());
    assert_eq!(told(&node.pause(&id).await.unwrap_err()), wanted);
    assert_eq!(told(&node.snapshot(&id, "a").await.unwrap_err()), wanted);
    assert_eq!(told(&node.fork(&id, 1).await.unwrap_err()), wanted);
    assert_eq!(node.state(&id), SessionState::Running);
    let left: Vec<_> = fs::read_dir(node.path(&id, ""))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with('.') || name == "paused")
        .collect();
    assert!(left.is_empty(), "{left:?}");
    full.send_replace(false);
    node.pause(&id).await.unwrap();
    node.resume(&id).await.unwrap();
    node.stop(&id).await;
    assert!(node.is_clean());
}

#[tokio::test]
async fn damaged_state_stays_and_is_told() {
    let node = Node::new(Fake::default());
    let id = node.start().await;
    node.pause(&id).await.unwrap();
    let devices = node.path(&id, "paused").join(DEVICES);
    let good = fs::read(&devices).unwrap();
    fs::write(&devices, "bad").unwrap();
    let wanted = (Code::FailedPrecondition, "SNAPSHOT_DAMAGED".to_owned());
    assert_eq!(told(&node.resume(&id).await.unwrap_err()), wanted);
    assert_eq!(told(&node.fork(&id, 1).await.unwrap_err()), wanted);
    assert_eq!(node.state(&id), SessionState::Paused);
    fs::write(&devices, good).unwrap();
    node.resume(&id).await.unwrap();
    node.stop(&id).await;
}

#[tokio::test]
async fn a_resume_needs_room() {
    let node = Node::new(Fake::default());
    let paused = node.start().await;
    node.pause(&paused).await.unwrap();
    let mut others = Vec::new();
    for _ in 0..8 {
        others.push(node.start().await);
    }
    let full = (Code::ResourceExhausted, "NODE_FULL".to_owned());
    assert_eq!(told(&node.resume(&paused).await.unwrap_err()), full);
    assert_eq!(node.state(&paused), SessionState::Paused);
    let child = node.fork(&others[0], 1).await.unwrap_err();
    assert_eq!(child.message(), "NODE_FULL");
    node.stop(&others.pop().unwrap()).await;
    node.resume(&paused).await.unwrap();
    for id in &others {
        node.stop(id).await;
    }
    node.stop(&paused).await;
    assert_eq!(node.hosted.used(), Capacity::default());
    assert!(node.is_clean());
}

#[tokio::test]
async fn a_vmm_that_dies_is_told_to_the_control_plane() {
    let (die, dies) = watch::channel(false);
    let node = Node::new(Fake {
        dies: Some(dies),
        ..Fake::default()
    });
    let id = node.start().await;
    let Lookup::Here(session) = node.hosted.lookup(&SessionId::parse(&id).unwrap()) else {
        panic!()
    };
    die.send_replace(true);
    tokio::time::timeout(LIMIT, session.ended()).await.unwrap();
    let phase = session.phase().borrow().clone();
    assert!(matches!(phase, Phase::Ended(ended) if ended.reason == "VMM_EXITED"));
    assert_eq!(node.hosted.unreported().len(), 1);
    assert!(node.is_clean());
}

/// Whatever is asked at once, and whenever the stop comes: nothing is left, and nobody waits for ever.
#[tokio::test(flavor = "multi_thread")]
async fn everything_at_once_ends_well() {
    let node = Arc::new(Node::new(Fake::default()));
    for round in 0..20_u64 {
        let id = node.start().await;
        let mut asked = Vec::new();
        for number in 0..6 {
            let (node, id) = (Arc::clone(&node), id.clone());
            asked.push(tokio::spawn(async move {
                // Each of them may be refused, as the others come first.
                match number {
                    0 => drop(node.pause(&id).await),
                    1 => drop(node.resume(&id).await),
                    2 => drop(node.snapshot(&id, "a").await),
                    3 => drop(node.roll_back(&id, "a").await),
                    4 => {
                        for child in node.fork(&id, 2).await.unwrap_or_default() {
                            node.stop(&child).await;
                        }
                    }
                    _ => {
                        tokio::time::sleep(Duration::from_micros(round * 700)).await;
                        node.stop(&id).await;
                    }
                }
            }));
        }
        for asked in asked {
            tokio::time::timeout(LIMIT, asked).await.unwrap().unwrap();
        }
        node.stop(&id).await;
    }
    assert_eq!(node.hosted.used(), Capacity::default());
    assert!(node.is_clean());
}
