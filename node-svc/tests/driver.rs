//! Sessions on a node whose guests are simulated: what they pass through, what fails, what is left.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{fs, path::PathBuf, sync::Arc, time::Duration};

use node_svc::{
    api::NodeApi,
    artifact::Artifacts,
    disk::Disks,
    driver::{WarmPolicy, WarmPool, Workshop},
    hosted::{Hosted, Lookup, Phase},
    snapshot::TemplateSnapshots,
    stored::Maker,
    vmm::{DEVICES, fake::Fake},
};
use proto::{
    node::v1::{
        Capacity, DeleteSnapshotRequest, ForkChild, ForkSessionRequest, PauseSessionRequest,
        ResumeSessionRequest, RollbackSessionRequest, SnapshotSessionRequest, StartSessionRequest,
        StopSessionRequest, UpdateSessionRequest, node_service_server::NodeService as _,
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
use tokio_util::task::TaskTracker;
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
                mesh::connect(&["127.0.0.1:9".parse().unwrap()], &MeshToken::random()),
            )
            .unwrap(),
            snapshots: TemplateSnapshots::open(path("t")).unwrap(),
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
        };
        Self {
            api: NodeApi {
                hosted: Arc::clone(&hosted),
                workshop: Arc::new(workshop),
                drivers: TaskTracker::new(),
                start_time: prost_types::Timestamp::default(),
            },
            hosted,
            folder,
        }
    }

    async fn start(&self) -> String {
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
        self.api.start_session(Request::new(request)).await.unwrap();
        id
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
