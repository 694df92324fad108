//! Slots: network places for guests, made ahead of need.
//!
//! ```text
//!   host                      | network namespace sandmesh-<n>
//!   smh<n> 10.213.x.y/31 -----+----- eth0 10.213.x.y+1/31    tap0 169.254.100.1/30 ---- guest 169.254.100.2
//! ```
//! Inside, every slot looks the same. TCP to the address of `eth0` goes to the guest; what the guest sends leaves under that
//! address or not at all, and where to is its session's [`NetworkRules`]. The addresses follow from the slot's number; numbers are
//! given out in blocks of 64, as many per node process as its capacity needs, locked by files under `/run/sandmesh`, so that several
//! nodes on one host never meet.
//!
//! A slot that was used is removed with all a guest may have left in it, and made anew. Slots outlive their node process: the next
//! one adopts those it is told to keep, untouched, and removes the rest.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    fs, io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use ipnet::Ipv4Net;
use tokio::{
    sync::{Notify, Semaphore},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use self::{
    block::{BLOCKS, Block, Held},
    dns::{Forwarder, NamePolicy, Upstream},
    firewall::Model,
};

mod block;
mod dns;
mod firewall;
mod namespace;
mod netlink;
mod rules;
mod shape;
mod tap;

pub use self::{
    block::BLOCK,
    rules::{MAX_RULES, MIN_RATE, NamePattern, NetworkRules, Rule, RuleError},
};

/// Slots a node can have at most: all of the host's.
pub const MAX_CAPACITY: usize = (BLOCK * BLOCKS) as usize;
/// Slots that are made at once: the kernel does most of it one by one.
const PARALLEL: usize = 8;
/// Between tries to make a slot ahead, after one failed.
const TRY_AGAIN: Duration = Duration::from_secs(1);

/// The guest's side, the same in every slot.
pub const GUEST_ADDRESS: &str = "169.254.100.2/30";
/// The guest's gateway.
pub const GATEWAY: &str = "169.254.100.1";
/// The guest's hardware address: locally administered.
pub const GUEST_MAC: &str = "02:fc:00:00:00:01";
/// Name of the tap device in the namespace.
pub const TAP: &str = "tap0";

const GUEST: Ipv4Addr = Ipv4Addr::new(169, 254, 100, 2);
const GATEWAY_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 100, 1);
const GUEST_MAC_BYTES: [u8; 6] = [2, 0xfc, 0, 0, 0, 1];
const GATEWAY_MAC_BYTES: [u8; 6] = [2, 0xfc, 0, 0, 0, 2];

/// Slots cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// Not enough blocks of the host are free.
    #[error(
        "{wanted} blocks of {BLOCK} network slots are needed and {found} of this host's {BLOCKS} can be had; lower the node's number of slots, or stop another node"
    )]
    NoBlock {
        /// How many were needed.
        wanted: usize,
        /// How many there were.
        found: usize,
    },
    /// A slot that is to be kept lies in a block of another node.
    #[error(
        "the block {block} of network slots is held by the node with the state folder {holder}"
    )]
    NotOurs {
        /// Which block.
        block: u32,
        /// Whose it is.
        holder: String,
    },
    /// More than there are.
    #[error("{capacity} network slots are asked for; a host has {MAX_CAPACITY}")]
    Capacity {
        /// How many were asked for.
        capacity: usize,
    },
    /// All slots of the node are in use.
    #[error("all {capacity} network slots of this node are in use")]
    NoSlot {
        /// How many there are.
        capacity: usize,
    },
    /// A system call failed.
    #[error("network slot: {step}: {cause}")]
    System {
        /// What was being done.
        step: &'static str,
        /// What the system said.
        cause: String,
    },
}

impl SlotError {
    fn system(step: &'static str) -> impl Fn(io::Error) -> Self {
        move |error| Self::System {
            step,
            cause: error.to_string(),
        }
    }
}

/// Number of a slot on this host.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
pub struct SlotIndex(u32);

impl SlotIndex {
    /// The number itself.
    pub fn number(self) -> u32 {
        self.0
    }

    /// The host's end of the pair.
    pub fn host_address(self) -> Ipv4Addr {
        let [high, low] = (u16::try_from(self.0 * 2).unwrap_or(u16::MAX - 1)).to_be_bytes();
        Ipv4Addr::new(10, 213, high, low)
    }

    /// The slot's end of the pair: where the node reaches the guest.
    pub fn slot_address(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.host_address().to_bits() + 1)
    }

    /// Name of its namespace.
    pub fn namespace(self) -> String {
        format!("sandmesh-{}", self.0)
    }

    /// Where its namespace is mounted.
    pub fn namespace_path(self) -> PathBuf {
        Path::new("/run/netns").join(self.namespace())
    }

    /// Name of the host's end.
    pub fn host_link(self) -> String {
        format!("smh{}", self.0)
    }
}

/// Opens the tap of this name in the namespace that is mounted there, as [`SlotPool::open_tap`]. Blocking.
pub(crate) fn open_tap(namespace: &Path, name: &str) -> Result<OwnedFd, SlotError> {
    namespace::enter_at(namespace, || {
        tap::open(name).map_err(SlotError::system("open tap"))
    })
}

/// A network place in use.
#[derive(Debug, Clone)]
pub struct Slot {
    /// Its number.
    pub index: SlotIndex,
    /// Where the node reaches the guest.
    pub reach: IpAddr,
}

impl Slot {
    /// The slot with this number.
    pub fn of(index: SlotIndex) -> Self {
        Self {
            index,
            reach: IpAddr::V4(index.slot_address()),
        }
    }
}

/// Bytes that went through a slot's link, headers included.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// From the guest.
    pub sent: u64,
    /// To the guest.
    pub received: u64,
}

/// How slots are made.
#[derive(Debug, Clone)]
pub struct SlotConfig {
    /// Who holds the blocks: the node's state folder.
    pub owner: PathBuf,
    /// How many are kept ready.
    pub ready: usize,
    /// How many there are, those in use included.
    pub capacity: usize,
    /// Networks that no session reaches, whatever its rules say.
    pub egress_deny: Vec<Ipv4Net>,
    /// Who is asked, from the host, for the names that guests ask for.
    pub name_servers: Vec<SocketAddr>,
}

impl SlotConfig {
    /// One block of slots, nothing denied to all, no name servers.
    pub fn new(owner: PathBuf, ready: usize) -> Self {
        Self {
            owner,
            ready,
            capacity: BLOCK as usize,
            egress_deny: Vec::new(),
            name_servers: Vec::new(),
        }
    }
}

#[derive(Debug, Default)]
struct Places {
    ready: VecDeque<SlotIndex>,
    /// Not made.
    empty: VecDeque<SlotIndex>,
}

/// A slot on its way to whoever asked for it; given back if he does not wait.
struct Taken<'a> {
    pool: &'a SlotPool,
    index: Option<SlotIndex>,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if let Some(index) = self.index.take() {
            let pool = self.pool.clone();
            tokio::spawn(async move { pool.give_back(index).await });
        }
    }
}

/// The slots of one node process.
#[derive(Debug, Clone)]
pub struct SlotPool {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// Held for as long as the process lives.
    held: Vec<Held>,
    capacity: usize,
    ready: usize,
    places: Mutex<Places>,
    wanted: Notify,
    making: Semaphore,
    model: Model,
    upstream: Arc<Upstream>,
    /// Whether guests' questions are answered even if no rule speaks of names, since guests cannot reach the name servers.
    is_always_asked: bool,
    forwarders: Mutex<HashMap<SlotIndex, Forwarder>>,
}

impl SlotPool {
    /// Takes the blocks, removes what an earlier process left in them but for the slots in `keep`, and lays the host's firewall.
    /// Slots that are kept are in use, and stay as they are; their rules about names work again after [`Self::apply`]. Blocking.
    pub fn open(config: &SlotConfig, keep: &BTreeSet<SlotIndex>) -> Result<Self, SlotError> {
        let capacity = config.capacity.max(1);
        if capacity > MAX_CAPACITY {
            return Err(SlotError::Capacity { capacity });
        }
        let count = capacity.div_ceil(BLOCK as usize);
        let mut held = block::take(&config.owner, count, keep)?;
        let blocks: BTreeSet<Block> = held.iter().map(|one| one.block).collect();
        let stale: Vec<SlotIndex> = namespace::existing()?
            .into_iter()
            .filter(|index| blocks.contains(&Block::of(*index)) && !keep.contains(index))
            .collect();
        namespace::remove(&stale)?;
        namespace::share()?;
        // Guests' packets cross the host.
        fs::write("/proc/sys/net/ipv4/ip_forward", "1")
            .map_err(SlotError::system("enable ip_forward"))?;
        // A node that has become smaller leaves its last blocks to others, once nothing of it is in them.
        let kept: BTreeSet<Block> = keep.iter().copied().map(Block::of).collect();
        let mut surplus = Vec::new();
        while held.len() > count {
            let Some(place) = held.iter().rposition(|one| !kept.contains(&one.block)) else {
                break;
            };
            surplus.push(held.remove(place));
        }
        let blocks: Vec<Block> = held.iter().map(|one| one.block).collect();
        let all: Vec<Block> = surplus
            .iter()
            .map(|one| one.block)
            .chain(blocks.clone())
            .collect();
        firewall::lay_host(&blocks, &all, &config.egress_deny)?;
        surplus.into_iter().for_each(Held::release);
        let empty = blocks
            .iter()
            .flat_map(|block| block.slots())
            .filter(|index| !keep.contains(index))
            .take(capacity.saturating_sub(keep.len()))
            .collect();
        // A name server on loopback or in a network that is denied to guests can still be asked by the node.
        let is_out_of_reach = |server: &SocketAddr| match server.ip() {
            IpAddr::V4(address) => {
                address.is_loopback()
                    || address.is_link_local()
                    || config.egress_deny.iter().any(|net| net.contains(&address))
            }
            IpAddr::V6(_) => true,
        };
        Ok(Self {
            inner: Arc::new(Inner {
                held,
                capacity,
                ready: config.ready,
                places: Mutex::new(Places {
                    ready: VecDeque::new(),
                    empty,
                }),
                wanted: Notify::new(),
                making: Semaphore::new(PARALLEL),
                model: Model::make()?,
                is_always_asked: config.name_servers.iter().any(is_out_of_reach),
                upstream: Arc::new(Upstream::new(config.name_servers.clone())),
                forwarders: Mutex::default(),
            }),
        })
    }

    /// Makes slots ahead, several at once, until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut making = JoinSet::new();
        loop {
            while !shutdown.is_cancelled() && making.len() < PARALLEL {
                let next = {
                    let mut places = self.places();
                    if places.ready.len() + making.len() < self.inner.ready {
                        places.empty.pop_front()
                    } else {
                        None
                    }
                };
                let Some(index) = next else { break };
                let pool = self.clone();
                making.spawn(async move { (index, pool.make(index).await) });
            }
            tokio::select! {
                Some(made) = making.join_next() => match made {
                    Ok((index, Ok(()))) => self.places().ready.push_back(index),
                    Ok((index, Err(error))) => {
                        tracing::error!(%error, slot = index.0, "a network slot cannot be made");
                        self.places().empty.push_back(index);
                        tokio::select! {
                            () = tokio::time::sleep(TRY_AGAIN) => {}
                            () = shutdown.cancelled() => {}
                        }
                    }
                    Err(error) => tracing::error!(%error, "making a network slot failed"),
                },
                () = self.inner.wanted.notified(), if !shutdown.is_cancelled() => {}
                () = shutdown.cancelled(), if making.is_empty() => return,
            }
        }
    }

    /// A slot nobody uses, under these rules: one made ahead, or one made now.
    pub async fn take(&self, rules: &NetworkRules) -> Result<Slot, SlotError> {
        let (index, is_ready) = {
            let mut places = self.places();
            if let Some(index) = places.ready.pop_front() {
                (index, true)
            } else {
                let capacity = self.inner.capacity;
                let next = places.empty.pop_front();
                (next.ok_or(SlotError::NoSlot { capacity })?, false)
            }
        };
        self.inner.wanted.notify_one();
        // Whoever asked may give up in between.
        let mut taken = Taken {
            pool: self,
            index: Some(index),
        };
        let made = async {
            if !is_ready {
                self.make(index).await?;
            }
            self.apply(index, rules).await
        };
        let made = made.await;
        taken.index = None;
        if let Err(error) = made {
            self.give_back(index).await;
            return Err(error);
        }
        Ok(Slot::of(index))
    }

    /// Puts rules into force in a slot that is in use, for what is open already too. One caller at a time for each slot.
    pub async fn apply(&self, index: SlotIndex, rules: &NetworkRules) -> Result<(), SlotError> {
        let is_asked = rules.has_names() || self.inner.is_always_asked;
        let is_answered = self.forwarders().contains_key(&index);
        if is_asked && !is_answered {
            // It listens before the guest is sent there.
            let policy = NamePolicy::new(rules);
            let upstream = Arc::clone(&self.inner.upstream);
            let forwarder = Forwarder::start(index, upstream, policy).await?;
            self.forwarders().insert(index, forwarder);
        }
        let ruled = rules.clone();
        blocking(move || {
            namespace::enter(index, || {
                firewall::apply(&ruled, is_asked)?;
                shape::apply(&ruled)
            })
        })
        .await?;
        if is_asked {
            if let Some(forwarder) = self.forwarders().get(&index) {
                forwarder.set(NamePolicy::new(rules));
            }
        } else {
            self.stop_forwarder(index).await;
        }
        Ok(())
    }

    /// Opens a slot's tap, for a VMM that gets it as a file: frames, each after a `struct virtio_net_hdr` of 10 bytes. Only one at a
    /// time may have it open.
    pub async fn open_tap(&self, index: SlotIndex) -> Result<OwnedFd, SlotError> {
        blocking(move || open_tap(&index.namespace_path(), TAP)).await
    }

    /// What went through a slot since it was made.
    pub async fn traffic(&self, index: SlotIndex) -> Result<Traffic, SlotError> {
        blocking(move || namespace::traffic(index)).await
    }

    /// Takes a slot down; its number can be used again. What a guest may have left in it goes with the namespace.
    pub async fn give_back(&self, index: SlotIndex) {
        self.stop_forwarder(index).await;
        if let Err(error) = blocking(move || namespace::remove(&[index])).await {
            tracing::error!(%error, slot = index.0, "a network slot cannot be removed; it is not used again");
            return;
        }
        self.places().empty.push_back(index);
        self.inner.wanted.notify_one();
    }

    /// Removes every slot and the host's firewall, and leaves the blocks to others. Blocking.
    pub fn remove_all(&self) -> Result<(), SlotError> {
        self.forwarders().clear();
        let blocks: Vec<Block> = self.inner.held.iter().map(|one| one.block).collect();
        let all: Vec<SlotIndex> = namespace::existing()?
            .into_iter()
            .filter(|index| blocks.contains(&Block::of(*index)))
            .collect();
        namespace::remove(&all)?;
        firewall::remove_host(&blocks)?;
        blocks.into_iter().for_each(block::release);
        Ok(())
    }

    /// The numbers of the node's blocks.
    pub fn blocks(&self) -> Vec<u32> {
        self.inner.held.iter().map(|one| one.block.0).collect()
    }

    /// How many slots are made and wait to be used.
    pub fn ready(&self) -> usize {
        self.places().ready.len()
    }

    async fn make(&self, index: SlotIndex) -> Result<(), SlotError> {
        let _turn = self.inner.making.acquire().await;
        let model = self.inner.model.clone();
        blocking(move || namespace::make(index, &model)).await
    }

    async fn stop_forwarder(&self, index: SlotIndex) {
        let forwarder = self.forwarders().remove(&index);
        if let Some(forwarder) = forwarder {
            forwarder.stop().await;
        }
    }

    fn places(&self) -> MutexGuard<'_, Places> {
        self.inner
            .places
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn forwarders(&self) -> MutexGuard<'_, HashMap<SlotIndex, Forwarder>> {
        self.inner
            .forwarders
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, SlotError> + Send + 'static,
) -> Result<T, SlotError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| SlotError::System {
            step: "thread",
            cause: error.to_string(),
        })?
}

/// What is on this host of slots of these blocks, for those who check that nothing was left: namespaces, links, firewall tables, and
/// blocks that bear a node's name. Blocking.
pub fn leftovers(blocks: &[u32]) -> Result<Vec<String>, SlotError> {
    let mut found = Vec::new();
    for index in namespace::existing()? {
        if blocks.contains(&Block::of(index).0) {
            found.push(format!("slot {}", index.0));
        }
    }
    let tables = firewall::tables()?;
    for block in blocks.iter().copied().map(Block) {
        let table = firewall::table(block);
        if tables.contains(&table) {
            found.push(format!("table {table}"));
        }
        let holder = block.holder();
        if !holder.is_empty() {
            found.push(format!("block {block} of {holder}"));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_follow_from_the_number_and_never_meet() {
        assert_eq!(SlotIndex(0).host_address(), Ipv4Addr::new(10, 213, 0, 0));
        assert_eq!(SlotIndex(0).slot_address(), Ipv4Addr::new(10, 213, 0, 1));
        assert_eq!(
            SlotIndex(200).host_address(),
            Ipv4Addr::new(10, 213, 1, 144)
        );
        let last = SlotIndex(BLOCK * BLOCKS - 1);
        assert_eq!(last.slot_address(), Ipv4Addr::new(10, 213, 255, 255));
        assert!(last.host_link().len() <= 15, "IFNAMSIZ");
    }

    #[test]
    fn a_block_is_its_slots() {
        let block = Block::of(SlotIndex(200));
        let slots: Vec<SlotIndex> = block.slots().collect();
        assert_eq!(slots.len(), BLOCK as usize);
        for index in [slots[0], slots[63]] {
            assert_eq!(Block::of(index), block);
            assert!(block.net().contains(&index.host_address()));
            assert!(block.net().contains(&index.slot_address()));
        }
    }

    #[test]
    fn texts_and_values_of_the_guests_side_agree() {
        assert_eq!(GUEST_ADDRESS, format!("{GUEST}/30"));
        assert_eq!(GATEWAY, GATEWAY_ADDRESS.to_string());
        let mac: Vec<String> = GUEST_MAC_BYTES
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(GUEST_MAC, mac.join(":"));
    }
}
