//! Puts node-svc together: lock, reap, bind, serve, register, drain.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, Read as _, Seek as _, Write as _},
    net::Ipv4Addr,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant, SystemTime},
};

use axum::{Router, body::Body};
use blobs::{BlobError, Blobs};
use futures::{FutureExt as _, future::BoxFuture};
use http::{Request, Response};
use nix::fcntl::{Flock, FlockArg};
use proto::node::v1::{
    Capacity, Node, node_registry_service_client::NodeRegistryServiceClient,
    node_service_server::NodeServiceServer,
};
use service_kit::{
    address::Address,
    ids::NodeId,
    mesh::{self, MeshToken, TokenError},
    serve::{self, Bound, Grpc, ServeError},
};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, watch},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::service::Routes;
use tower::ServiceExt as _;

use crate::{
    api::NodeApi,
    artifact::Artifacts,
    cache::Cache,
    catalog::Catalog,
    config::{Config, VmmChoice},
    disk::Disks,
    driver::{self, Adopted, Makings, WarmPolicy, WarmPool, Workshop},
    guest_image::GuestImages,
    hosted::Hosted,
    ingress::{self, HOP_HEADER, Ingress, Waker},
    logs::{Retention, SessionLogs},
    register::Registrar,
    slot::{SlotConfig, SlotError, SlotPool},
    snapshot::TemplateSnapshots,
    snapshot_store::SnapshotStore,
    stored::Maker,
    vmm::{
        Vmm,
        cgroup::Cgroups,
        fake::Fake,
        firecracker::{self, Firecracker, FirecrackerError},
        qemu::{Qemu, QemuError},
    },
};

/// What the smallest guest is counted with when there may be many.
const LEAST_MEMORY: u64 = 128 << 20;
const MOUNTS: &str = "/proc/mounts";
const STOP_LIMIT: Duration = Duration::from_secs(30);
/// How long a process that was killed may take to be gone.
const DYING: Duration = Duration::from_secs(5);
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// node-svc cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// A listener.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// The ingress listens on TCP only.
    #[error("--ingress and --internal must be host:port")]
    NotTcp,
    /// The mesh token.
    #[error("--mesh-token-file: {0}")]
    Token(#[from] TokenError),
    /// The object store.
    #[error("--store: {0}")]
    Store(#[from] BlobError),
    /// The Redis address.
    #[error("--redis-url: {0}")]
    Redis(#[from] redis::RedisError),
    /// A folder or file.
    #[error("{setting} {path}: {source}")]
    File {
        /// The setting.
        setting: &'static str,
        /// Its value.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another node-svc has the state folder.
    #[error("--state {path} is in use by node-svc with PID {pid}")]
    InUse {
        /// The folder.
        path: PathBuf,
        /// Who has it.
        pid: String,
    },
    /// Network slots.
    #[error("{0}")]
    Slot(#[from] SlotError),
    /// QEMU.
    #[error("--qemu: {0}")]
    Qemu(#[from] QemuError),
    /// Firecracker.
    #[error("--vmm firecracker: {0}")]
    Firecracker(#[from] FirecrackerError),
}

/// A bound node-svc.
#[derive(Debug)]
pub struct App {
    ingress_listener: TcpListener,
    internal_listener: TcpListener,
    node_id: NodeId,
    node: Node,
    token: MeshToken,
    redis: redis::Client,
    workshop: Arc<Workshop>,
    adopted: Vec<Adopted>,
    hosted: Arc<Hosted>,
    config: Config,
    registered: watch::Sender<Option<String>>,
    shutdown: CancellationToken,
    _lock: Flock<File>,
}

impl App {
    /// Locks the state folder, ends what an earlier node-svc left there, and binds.
    pub async fn build(config: Config, shutdown: CancellationToken) -> Result<Self, AppError> {
        let state = |source| AppError::File {
            setting: "--state",
            path: config.state.clone(),
            source,
        };
        fs::create_dir_all(&config.state).map_err(state)?;
        let lock = lock(&config.state)?;
        // VMMs have their own working folders, so every name they are given is a whole one.
        let folder = config.state.canonicalize().map_err(state)?;
        // VMMs are others' users: what they may have, they have open or beneath their own folder.
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o700)).map_err(state)?;
        let sessions = folder.join("s");
        let in_use = driver::slots_in_use(&sessions).map_err(state)?;
        let token = MeshToken::load(&config.mesh_token_file)?;
        let redis = redis::Client::open(config.redis_url.as_str())?;
        let vmm = tokio::task::block_in_place(|| vmm(&config))?;
        let warm_policy = WarmPolicy {
            min_idle: config.warm_min_idle,
            max_idle: config.warm_max_idle,
            memory: config.warm_memory,
            idle_ttl: config.warm_idle_ttl,
        };
        let (slots, images) = if vmm.needs_place() {
            let slots = SlotConfig {
                name_servers: nameservers(&config.nameservers)
                    .into_iter()
                    .map(|address| (address, 53).into())
                    .collect(),
                // More for templates that boot and for guests that wait.
                capacity: config.max_sessions as usize
                    + parallel_boots(&config)
                    + WarmPool::most(warm_policy, LEAST_MEMORY),
                egress_deny: config.egress_deny.clone(),
                ..SlotConfig::new(config.state.clone(), config.ready_slots)
            };
            let envd = |source| AppError::File {
                setting: "--envd",
                path: config.envd.clone(),
                source,
            };
            let images = GuestImages::open(folder.join("images"), &config.envd).map_err(envd)?;
            (
                Some(tokio::task::block_in_place(|| {
                    SlotPool::open(&slots, &in_use)
                })?),
                Some(images),
            )
        } else {
            (None, None)
        };
        let total = capacity(&config);
        let hosted = Arc::new(Hosted::new(total));
        let parallel = parallel_boots(&config);
        let boots = if vmm.needs_place() {
            parallel.max(1)
        } else {
            Semaphore::MAX_PERMITS
        };
        let (forks, warm) = (folder.join("f"), folder.join("w"));
        tokio::task::block_in_place(|| driver::end_all(&warm)).map_err(state)?;
        let (cache, snapshots) = tokio::task::block_in_place(|| {
            let (artifacts, snapshots) = (folder.join("artifacts"), folder.join("t"));
            driver::end_template_boots(&snapshots)?;
            let bound = match config.cache {
                Some(bound) => bound,
                None => Cache::usual_bound(&folder)?,
            };
            let cache = Cache::open(artifacts, snapshots.clone(), bound)?;
            Ok((Arc::new(cache), TemplateSnapshots::open(snapshots)?))
        })
        .map_err(state)?;
        let blobs = config.store.as_ref().map(Blobs::open).transpose()?;
        let workshop = Workshop {
            maker: Maker {
                vmm: format!("{} {}", vmm.kind().as_str_name(), vmm.version()),
                cpu: match config.vmm {
                    VmmChoice::Firecracker => cpu_identity(),
                    _ => cpu_model(),
                },
            },
            snapshots,
            forks,
            makings: Makings::default(),
            store: blobs
                .clone()
                .map(|blobs| Arc::new(SnapshotStore::new(blobs, cpu_identity()))),
            artifacts: Artifacts::open(
                folder.join("artifacts"),
                Arc::clone(&cache),
                blobs,
                mesh::connect(&config.template_addresses, &token),
            )
            .map_err(state)?,
            cache,
            disks: Disks::open(folder.join("disks")).map_err(state)?,
            slots,
            images,
            sessions,
            warm: WarmPool::new(warm, warm_policy),
            boots: Semaphore::new(boots),
            parallel_boots: boots,
            boot_timeout: config.boot_timeout,
            nameservers: nameservers(&config.nameservers)
                .iter()
                .map(ToString::to_string)
                .collect(),
            hosted: Arc::clone(&hosted),
            logs: Arc::new(SessionLogs::new(
                folder.join("logs"),
                Retention {
                    age: config.log_retention,
                    bytes: config.log_bytes,
                },
            )),
            vmm: Arc::clone(&vmm),
        };
        let ingress_bound = Bound::bind(&config.ingress).await?;
        let internal_bound = Bound::bind(&config.internal).await?;
        let (Address::Tcp(ingress_address), Address::Tcp(internal_address)) = (
            ingress_bound.address().clone(),
            internal_bound.address().clone(),
        ) else {
            return Err(AppError::NotTcp);
        };
        let node_id = node_id(&config.state).map_err(state)?;
        let adopted =
            tokio::task::block_in_place(|| driver::adopt_all(&workshop)).map_err(state)?;
        if !adopted.is_empty() {
            tracing::info!(
                sessions = adopted.len(),
                "sessions of an earlier node-svc are taken over"
            );
        }
        let node = Node {
            node_id: node_id.to_string(),
            ingress_address: config.advertise_ingress.clone().unwrap_or(ingress_address),
            internal_address: config
                .advertise_internal
                .clone()
                .unwrap_or(internal_address),
            total: Some(total),
            vmm: vmm.kind().into(),
            vmm_version: vmm.version().to_owned(),
            unavailable_vmms: tokio::task::block_in_place(|| unavailable_vmms(&config)),
            cpu_model: cpu_model(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            envd: workshop
                .images
                .as_ref()
                .map(|images| images.envd().to_owned())
                .unwrap_or_default(),
            incarnation: uuid::Uuid::new_v4().to_string(),
            start_time: Some(SystemTime::now().into()),
            ..Node::default()
        };
        Ok(Self {
            ingress_listener: ingress_bound.into_tcp().map_err(|_| AppError::NotTcp)?,
            internal_listener: internal_bound.into_tcp().map_err(|_| AppError::NotTcp)?,
            node_id,
            node,
            token,
            redis,
            workshop: Arc::new(workshop),
            adopted,
            hosted,
            config,
            registered: watch::Sender::new(None),
            shutdown,
            _lock: lock,
        })
    }

    /// What this node says of itself.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Hears the home tag once the registry knows this node.
    pub fn registered(&self) -> watch::Receiver<Option<String>> {
        self.registered.subscribe()
    }

    /// Serves until shutdown. Sessions are stopped or left running, as configured.
    pub async fn run(self) -> Result<(), AppError> {
        let Self {
            ingress_listener,
            internal_listener,
            node_id,
            node,
            token,
            redis,
            workshop,
            adopted,
            hosted,
            config,
            registered,
            shutdown,
            _lock,
        } = self;
        let start_time = node.start_time.unwrap_or_default();
        let drivers = TaskTracker::new();
        let connections = TaskTracker::new();
        let background = TaskTracker::new();
        for Adopted {
            session,
            commands,
            plan,
        } in adopted
        {
            // Nobody waits to hear how it went.
            let (steps, _) = tokio::sync::oneshot::channel();
            drivers.spawn(Arc::clone(&workshop).drive(session, commands, plan, steps));
        }
        let catalog = Catalog::new(redis, &config.redis_prefix);
        let registry =
            NodeRegistryServiceClient::new(mesh::connect(&config.session_addresses, &token));
        let waker = Waker::new(registry.clone(), node_id.clone());
        let ingress = Arc::new(Ingress::new(
            node_id,
            Arc::clone(&hosted),
            catalog,
            waker,
            &token,
            &config.domain,
            connections.clone(),
        ));
        if let Some(slots) = &workshop.slots {
            background.spawn(slots.clone().run(shutdown.clone()));
            background.spawn(Arc::clone(&workshop).keep_warm(shutdown.clone()));
            background.spawn(Arc::clone(&workshop).renew_snapshots(shutdown.clone()));
        }
        background.spawn(Arc::clone(&workshop.cache).keep_small(shutdown.clone()));
        background.spawn(Arc::clone(&workshop.logs).keep_clean(shutdown.clone()));
        let registrar = Registrar {
            registry,
            node,
            hosted: Arc::clone(&hosted),
            tasks: connections.clone(),
            registered,
        };
        background.spawn(registrar.run(shutdown.clone()));
        let from_edge = {
            let ingress = Arc::clone(&ingress);
            move |request| Arc::clone(&ingress).answer(request, ingress::From::Edge)
        };
        background.spawn(ingress::serve(
            ingress_listener,
            connections.clone(),
            shutdown.clone(),
            from_edge,
        ));

        let api = NodeApi {
            hosted: Arc::clone(&hosted),
            workshop: Arc::clone(&workshop),
            drivers: drivers.clone(),
            start_time,
            shutdown: shutdown.clone(),
        };
        let grpc = Grpc::new("node-svc")
            .mesh_only(token.clone())
            .reflect(&["sandmesh.node.v1.NodeService"]);
        let own = grpc
            .router(Routes::new(NodeServiceServer::new(api)))
            .await?;
        ingress::serve(
            internal_listener,
            connections.clone(),
            shutdown.clone(),
            internal_calls(own, ingress, token),
        )
        .await;
        shutdown.cancel();
        if config.stop_sessions_on_exit {
            stop_all(&hosted).await;
        }
        background.close();
        background.wait().await;
        if let Some(store) = &workshop.store {
            store.stop().await;
        }
        connections.close();
        if tokio::time::timeout(serve::DRAIN_DEADLINE, connections.wait())
            .await
            .is_err()
        {
            tracing::warn!("connections through this node were cut");
        }
        if config.stop_sessions_on_exit
            && let Some(slots) = &workshop.slots
        {
            // Of templates that were being made.
            workshop.makings.stop().await;
            let boots = config.state.join("t");
            tokio::task::block_in_place(|| driver::end_template_boots(&boots)).map_err(
                |source| AppError::File {
                    setting: "--state",
                    path: boots.clone(),
                    source,
                },
            )?;
            tokio::task::block_in_place(|| slots.remove_all())?;
            Cgroups::remove_all(Path::new(MOUNTS), &config.state);
        }
        Ok(())
    }
}

/// Requests that another node sends on share the internal listener with the node's own API.
fn internal_calls(
    own: Router,
    ingress: Arc<Ingress>,
    token: MeshToken,
) -> impl Fn(Request<Body>) -> BoxFuture<'static, Response<Body>> + Clone + Send + Sync + 'static {
    move |request| {
        if request.headers().contains_key(&HOP_HEADER) && token.is_in(request.headers()) {
            return Arc::clone(&ingress)
                .answer(request, ingress::From::Peer)
                .boxed();
        }
        let answer = own.clone().oneshot(request);
        async move { answer.await.unwrap_or_else(|never| match never {}) }.boxed()
    }
}

async fn stop_all(hosted: &Hosted) {
    let sessions = hosted.all();
    for session in &sessions {
        session.stop.cancel();
    }
    let ended = futures::future::join_all(sessions.iter().map(|session| session.ended()));
    if tokio::time::timeout(STOP_LIMIT, ended).await.is_err() {
        tracing::error!("some sessions did not stop in time");
    }
}

/// Removes everything a node-svc that was killed left behind: VMMs, folders, slots, firewall. Blocking.
pub fn clean_up(state: &Path) -> Result<(), AppError> {
    if !state.exists() {
        return Ok(());
    }
    // A process that was killed holds its files until the last of its threads is gone, which may be after it looks dead.
    let limit = Instant::now() + DYING;
    let _lock = loop {
        match lock(state) {
            Err(AppError::InUse { .. }) if Instant::now() < limit => thread::sleep(LOOK_AGAIN),
            other => break other?,
        }
    };
    let failed = |source| AppError::File {
        setting: "--state",
        path: state.to_owned(),
        source,
    };
    driver::reap(state).map_err(failed)?;
    SlotPool::open(&SlotConfig::new(state.to_owned(), 0), &BTreeSet::new())?.remove_all()?;
    Cgroups::remove_all(Path::new(MOUNTS), state);
    Ok(())
}

fn lock(state: &Path) -> Result<Flock<File>, AppError> {
    let path = state.join("lock");
    let failed = |source| AppError::File {
        setting: "--state",
        path: path.clone(),
        source,
    };
    let file = File::options()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(&path)
        .map_err(failed)?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(mut lock) => {
            lock.set_len(0)
                .and_then(|()| lock.rewind())
                .map_err(failed)?;
            write!(lock, "{}", std::process::id()).map_err(failed)?;
            Ok(lock)
        }
        Err((mut file, _)) => {
            let mut pid = String::new();
            file.read_to_string(&mut pid).map_err(failed)?;
            Err(AppError::InUse {
                path: state.to_owned(),
                pid,
            })
        }
    }
}

fn node_id(state: &Path) -> io::Result<NodeId> {
    let path = state.join("node-id");
    if let Ok(text) = fs::read_to_string(&path)
        && let Ok(id) = NodeId::parse(text.trim())
    {
        return Ok(id);
    }
    let id = uuid::Uuid::new_v4().to_string();
    fs::write(&path, &id)?;
    NodeId::parse(&id).map_err(io::Error::other)
}

fn vmm(config: &Config) -> Result<Arc<dyn Vmm>, AppError> {
    Ok(match config.vmm {
        VmmChoice::Fake => Arc::new(Fake::default()),
        VmmChoice::Firecracker => Arc::new(Firecracker::open(firecracker_options(config))?),
        VmmChoice::Qemu | VmmChoice::QemuTcg => {
            let only_tcg = config.vmm == VmmChoice::QemuTcg;
            let qemu = Qemu::probe(&config.qemu, config.trial_kernel.as_deref(), only_tcg)?;
            let cgroups = Cgroups::of_node(Path::new(MOUNTS), &config.state);
            Arc::new(qemu.with_cgroups(cgroups).with_users(config.vmm_uids))
        }
    })
}

fn firecracker_options(config: &Config) -> firecracker::Options {
    firecracker::Options {
        firecracker: config.firecracker.clone(),
        jailer: config.jailer.clone(),
        uids: config.vmm_uids,
        memory: config.firecracker_memory,
        console: config.firecracker_console,
        state: config.state.clone(),
        kvm: "/dev/kvm".into(),
        mounts: MOUNTS.into(),
    }
}

/// VMMs this node could not use if it were told to, and why. Blocking.
fn unavailable_vmms(config: &Config) -> Vec<String> {
    if config.vmm == VmmChoice::Firecracker {
        return Vec::new();
    }
    Firecracker::look(&firecracker_options(config))
        .err()
        .map(|error| format!("firecracker: {error}"))
        .into_iter()
        .collect()
}

fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn parallel_boots(config: &Config) -> usize {
    config.parallel_boots.unwrap_or_else(cpus).max(1)
}

fn capacity(config: &Config) -> Capacity {
    let host = procfs::Current::current()
        .map(|info: procfs::Meminfo| info.mem_total)
        .unwrap_or_default();
    Capacity {
        sessions: config.max_sessions,
        memory_bytes: config.memory.unwrap_or(host / 4 * 3),
        vcpus: config
            .vcpus
            .unwrap_or_else(|| u32::try_from(cpus()).unwrap_or(1).saturating_mul(16)),
        disk_bytes: config.disk,
    }
}

fn cpu_identity() -> String {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    firecracker::cpu_identity(&cpuinfo, &kernel)
}

fn cpu_model() -> String {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name"));
    line.and_then(|line| line.split_once(':'))
        .map(|(_, model)| model.trim().to_owned())
        .unwrap_or_default()
}

fn nameservers(configured: &[Ipv4Addr]) -> Vec<Ipv4Addr> {
    if !configured.is_empty() {
        return configured.to_vec();
    }
    let resolv = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let own: Vec<Ipv4Addr> = resolv
        .lines()
        .filter_map(|line| line.strip_prefix("nameserver"))
        .filter_map(|address| address.trim().parse().ok())
        .filter(|address: &Ipv4Addr| !address.is_loopback())
        .collect();
    if own.is_empty() {
        vec![Ipv4Addr::new(1, 1, 1, 1), Ipv4Addr::new(8, 8, 8, 8)]
    } else {
        own
    }
}
