//! Guests that are restored ahead of need and wait at their gate, so that a session only has to be told who it is.
//!
//! A template is kept warm for as long as it is used: every session that found no guest ready raises the number kept for its
//! template by one, up to a limit; without a session for some time the number falls back. Filling never stands in the way of a session that
//! starts: it begins only while none does.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    fs,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use proto::node::v1::StartSessionRequest;
use service_kit::ids::{HomeTag, SessionId};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::{
    DriveError, Driver, Stopwatch, Workshop, adopt, blocking, open,
    start::{self, connections_of},
};
use crate::{
    cache::Item,
    disk,
    guest::{Connections, GuestClient, Identity},
    journal::Step,
    slot::{NetworkRules, Slot},
    snapshot::TemplateSnapshot,
    stored::{self, SCRATCH},
    vmm::{DEVICES, Machine, RestoreSpec, Vm, process},
};

/// Between two looks when nothing was taken.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// After a guest could not be made ready.
const TRY_AGAIN: Duration = Duration::from_secs(10);

/// How many guests are kept ready.
#[derive(Debug, Clone, Copy)]
pub struct WarmPolicy {
    /// For each template in use, at least.
    pub min_idle: usize,
    /// For each template in use, at most.
    pub max_idle: usize,
    /// Bytes of memory of all of them, as if each used all it has.
    pub memory: u64,
    /// A template nobody started a session of for so long is not in use.
    pub idle_ttl: Duration,
}

/// A guest that waits.
struct Warm {
    folder: PathBuf,
    slot: Option<Slot>,
    vm: Option<Box<dyn Vm>>,
    way: Option<(GuestClient, CancellationToken)>,
    memory_bytes: u64,
}

impl std::fmt::Debug for Warm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Warm")
            .field("folder", &self.folder)
            .finish_non_exhaustive()
    }
}

/// What is kept for one template and size.
#[derive(Debug)]
struct Shelf {
    snapshot: TemplateSnapshot,
    request: StartSessionRequest,
    wanted: usize,
    used: Instant,
    ready: VecDeque<Warm>,
}

/// The guests that wait on this node.
#[derive(Debug)]
pub struct WarmPool {
    policy: WarmPolicy,
    folder: PathBuf,
    shelves: Mutex<HashMap<String, Shelf>>,
    taken: Notify,
}

impl WarmPool {
    /// Keeps guests in the folder; what an earlier node-svc left there must have ended.
    pub fn new(folder: PathBuf, policy: WarmPolicy) -> Self {
        Self {
            policy,
            folder,
            shelves: Mutex::default(),
            taken: Notify::new(),
        }
    }

    /// Most guests that can wait at once.
    pub fn most(policy: WarmPolicy, least_memory: u64) -> usize {
        usize::try_from(policy.memory / least_memory.max(1)).unwrap_or(usize::MAX)
    }

    fn shelves(&self) -> std::sync::MutexGuard<'_, HashMap<String, Shelf>> {
        self.shelves.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A guest that is ready, if there is one; either way the template is in use.
    fn take(&self, snapshot: &TemplateSnapshot, request: &StartSessionRequest) -> Option<Warm> {
        if self.policy.max_idle == 0 {
            return None;
        }
        let mut shelves = self.shelves();
        let shelf = shelves
            .entry(snapshot.key.clone())
            .or_insert_with(|| Shelf {
                snapshot: snapshot.clone(),
                request: StartSessionRequest {
                    template: request.template.clone(),
                    resources: request.resources,
                    ..StartSessionRequest::default()
                },
                wanted: self.policy.min_idle,
                used: Instant::now(),
                ready: VecDeque::new(),
            });
        shelf.used = Instant::now();
        let found = shelf.ready.pop_front();
        if found.is_none() {
            shelf.wanted = (shelf.wanted + 1).min(self.policy.max_idle);
        }
        metrics::counter!("sandmesh_node_warm_total", "outcome" => if found.is_some() { "hit" } else { "miss" })
            .increment(1);
        drop(shelves);
        self.taken.notify_one();
        found
    }

    /// What should be made next, if anything; and what is there too long.
    fn plan(&self) -> (Option<(TemplateSnapshot, StartSessionRequest)>, Vec<Warm>) {
        let mut shelves = self.shelves();
        let mut old = Vec::new();
        shelves.retain(|_, shelf| {
            if shelf.used.elapsed() < self.policy.idle_ttl {
                return true;
            }
            old.extend(shelf.ready.drain(..));
            false
        });
        let held: u64 = shelves
            .values()
            .flat_map(|shelf| &shelf.ready)
            .map(|warm| warm.memory_bytes)
            .sum();
        let next = shelves
            .values()
            .filter(|shelf| shelf.ready.len() < shelf.wanted)
            .find(|shelf| {
                let more = shelf.request.resources.unwrap_or_default().memory_bytes;
                held + more <= self.policy.memory
            })
            .map(|shelf| (shelf.snapshot.clone(), shelf.request.clone()));
        let ready: usize = shelves.values().map(|shelf| shelf.ready.len()).sum();
        #[expect(clippy::cast_precision_loss, reason = "a handful")]
        metrics::gauge!("sandmesh_node_warm_idle").set(ready as f64);
        (next, old)
    }

    /// Nobody is kept ready for a template until a session of it starts; those that were are given back.
    fn forget(&self, key: &str) -> VecDeque<Warm> {
        let shelf = self.shelves().remove(key);
        shelf.map(|shelf| shelf.ready).unwrap_or_default()
    }

    /// Puts a guest with the others; gives it back if nobody will want it.
    fn put(&self, key: &str, warm: Warm) -> Option<Warm> {
        match self.shelves().get_mut(key) {
            Some(shelf) => {
                shelf.ready.push_back(warm);
                None
            }
            None => Some(warm),
        }
    }

    fn drain(&self) -> Vec<Warm> {
        let mut shelves = self.shelves();
        shelves.drain().flat_map(|(_, shelf)| shelf.ready).collect()
    }
}

impl Workshop {
    /// Keeps guests ready until `shutdown`, then ends those that wait.
    pub async fn keep_warm(self: Arc<Self>, shutdown: CancellationToken) {
        tokio::select! {
            () = shutdown.cancelled() => {}
            never = self.fill() => match never {},
        }
        for warm in self.warm.drain() {
            self.discard(warm).await;
        }
        // One that was being made when the line was drawn.
        let folder = self.warm.folder.clone();
        if let Err(error) = blocking(move || adopt::end_all(&folder)).await {
            tracing::error!(%error, "guests that waited are left behind");
        }
    }

    async fn fill(&self) -> std::convert::Infallible {
        loop {
            let (next, old) = self.warm.plan();
            for warm in old {
                self.discard(warm).await;
            }
            let Some((snapshot, request)) = next.filter(|_| self.is_quiet()) else {
                tokio::select! {
                    () = self.warm.taken.notified() => {}
                    () = tokio::time::sleep(LOOK_AGAIN) => {}
                }
                continue;
            };
            let pin = self.cache.pin(Item::Snapshot(snapshot.key.clone()));
            if !snapshot.folder.exists() {
                // It had to go. The next session of it has it made anew, and finds nobody ready.
                for warm in self.warm.forget(&snapshot.key) {
                    self.discard(warm).await;
                }
                continue;
            }
            let made = self.make_warm(&snapshot, &request).await;
            drop(pin);
            match made {
                Ok(warm) => {
                    if let Some(unwanted) = self.warm.put(&snapshot.key, warm) {
                        self.discard(unwanted).await;
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "a guest could not be made ready");
                    tokio::time::sleep(TRY_AGAIN).await;
                }
            }
        }
    }

    async fn make_warm(
        &self,
        snapshot: &TemplateSnapshot,
        request: &StartSessionRequest,
    ) -> Result<Warm, DriveError> {
        let resources = request.resources.unwrap_or_default();
        let mut warm = Warm {
            folder: self
                .warm
                .folder
                .join(uuid::Uuid::new_v4().simple().to_string()),
            slot: None,
            vm: None,
            way: None,
            memory_bytes: resources.memory_bytes,
        };
        let limit = self.boot_timeout;
        let made = tokio::time::timeout(
            limit,
            Box::pin(self.restore_warm(&mut warm, snapshot, request)),
        )
        .await;
        match made {
            Ok(Ok(())) => Ok(warm),
            other => {
                self.discard(warm).await;
                Err(match other {
                    Ok(Err(error)) => error,
                    _ => DriveError::Timeout(limit),
                })
            }
        }
    }

    async fn restore_warm(
        &self,
        warm: &mut Warm,
        snapshot: &TemplateSnapshot,
        request: &StartSessionRequest,
    ) -> Result<(), DriveError> {
        let resources = request.resources.unwrap_or_default();
        let template = request.template.as_ref();
        let (folder, from) = (warm.folder.clone(), snapshot.folder.clone());
        blocking(move || {
            fs::create_dir_all(&folder)?;
            start::link_memory(&from, &folder)?;
            disk::copy(&from.join(SCRATCH), &folder.join(SCRATCH))
        })
        .await?;
        let rootfs = self.link_rootfs(template, &warm.folder).await?;
        if let Some(slots) = &self.slots {
            warm.slot = Some(slots.take(&NetworkRules::internet(true)).await?);
        }
        let spec = RestoreSpec {
            machine: Machine {
                folder: warm.folder.clone(),
                rootfs,
                scratch: warm.folder.join(SCRATCH),
                vcpus: resources.vcpus,
                memory_bytes: resources.memory_bytes,
                place: warm.slot.as_ref().map(start::place),
            },
            devices: snapshot.folder.join(DEVICES),
            difference: None,
        };
        let vm = warm.vm.insert(self.vmm.restore(spec).await?);
        vm.run().await?;
        let way = warm.way.insert(open(vm.as_mut(), self.boot_timeout).await?);
        self.exercise(&way.0, connections_of(template)).await
    }

    /// Has a guest do once, for nobody, what it will do for its session: its pages are there then, and under emulation its code is
    /// translated. After it the gate is closed as it was.
    async fn exercise(
        &self,
        guest: &GuestClient,
        connections: Connections,
    ) -> Result<(), DriveError> {
        let prepare = async || {
            guest
                .prepare_snapshot(&self.nameservers)
                .await
                .map(drop)
                .map_err(|status| DriveError::Prepare(status.message().to_owned()))
        };
        prepare().await?;
        let nobody = Identity {
            session_id: SessionId::random(&HomeTag::random()),
            env: BTreeMap::new(),
            default_user: String::new(),
            nameservers: self.nameservers.clone(),
            template: String::new(),
            machine_id: rand::random::<[u8; 16]>().to_vec(),
        };
        guest
            .configure(&nobody, connections)
            .await
            .map_err(|status| DriveError::Configure(status.message().to_owned()))?;
        prepare().await
    }

    async fn discard(&self, warm: Warm) {
        if let Some((_, over)) = warm.way {
            over.cancel();
        }
        if let Some(mut vm) = warm.vm {
            vm.kill().await;
        }
        if let (Some(slot), Some(slots)) = (warm.slot, &self.slots) {
            slots.give_back(slot.index).await;
        }
        let folder = warm.folder;
        if let Err(error) = blocking(move || stored::remove(&folder)).await {
            tracing::error!(%error, "the folder of a guest that waited is left behind");
        }
    }
}

impl Driver {
    /// Makes a guest that waits the session's, if there is one that still works.
    pub(super) async fn take_warm(
        &mut self,
        snapshot: &TemplateSnapshot,
        watch: &mut Stopwatch,
    ) -> Result<Option<(GuestClient, CancellationToken)>, DriveError> {
        let rules = start::rules_of(&self.request)?;
        loop {
            let Some(mut warm) = self.shop.warm.take(snapshot, &self.request) else {
                return Ok(None);
            };
            let process = warm.vm.as_ref().and_then(|vm| vm.process());
            if !process.is_some_and(process::ProcessId::is_alive) {
                self.shop.discard(warm).await;
                continue;
            }
            // The session's folder has its request and nothing else yet.
            let (from, to) = (warm.folder.clone(), self.folder.clone());
            blocking(move || {
                for entry in fs::read_dir(&to)? {
                    let entry = entry?;
                    fs::rename(entry.path(), from.join(entry.file_name()))?;
                }
                fs::rename(&from, &to)
            })
            .await?;
            self.slot = warm.slot.take();
            self.vm = warm.vm.take();
            let Some((guest, over)) = warm.way.take() else {
                return Ok(None);
            };
            if let Some(vm) = self.vm.as_mut() {
                vm.moved(&self.folder);
            }
            self.journal(Step::Starting).await?;
            if let (Some(slot), Some(slots)) = (&self.slot, &self.shop.slots)
                && rules != NetworkRules::internet(true)
            {
                slots.apply(slot.index, &rules).await?;
            }
            watch.lap("warm");
            self.configure(&guest, self.connections()).await?;
            watch.lap("configure");
            return Ok(Some((guest, over)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_made_ready_for_what_was_forgotten_until_it_is_used_again() {
        let policy = WarmPolicy {
            min_idle: 0,
            max_idle: 2,
            memory: 1 << 30,
            idle_ttl: Duration::from_mins(1),
        };
        let pool = WarmPool::new("/w".into(), policy);
        let snapshot = TemplateSnapshot {
            envd: String::new(),
            key: "k".into(),
            folder: "/t/k".into(),
        };
        let request = StartSessionRequest::default();
        let is_planned = || pool.plan().0.is_some();
        assert!(pool.take(&snapshot, &request).is_none());
        assert!(is_planned());
        assert!(pool.forget("k").is_empty());
        assert!(!is_planned());
        assert!(pool.take(&snapshot, &request).is_none());
        assert!(is_planned());
    }
}
