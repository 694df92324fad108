//! Slots: network places for guests, made ahead of need.
//!
//! ```text
//!   host                      | network namespace sandmesh-<n>
//!   smh<n> 10.213.x.y/31 -----+----- eth0 10.213.x.y+1/31    tap0 169.254.100.1/30 ---- guest 169.254.100.2
//! ```
//! Inside, every slot looks the same. TCP to the address of `eth0` goes to the guest; what the guest sends leaves under that
//! address or not at all. The addresses follow from the slot's number; numbers are given out in blocks of 64 per node process,
//! locked by a file under `/run/sandmesh`, so that several nodes on one host never meet.

use std::{
    collections::VecDeque,
    fs::{self, File},
    io,
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use nix::fcntl::{Flock, FlockArg};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

mod firewall;
mod namespace;
mod tap;

/// Slots in a block.
pub const BLOCK: u32 = 64;
/// Blocks on a host: 10.213.0.0/16 in pairs of addresses.
const BLOCKS: u32 = 512;
const LOCKS: &str = "/run/sandmesh/blocks";

/// The guest's side, the same in every slot.
pub const GUEST_ADDRESS: &str = "169.254.100.2/30";
/// The guest's gateway.
pub const GATEWAY: &str = "169.254.100.1";
/// The guest's hardware address: locally administered.
pub const GUEST_MAC: &str = "02:fc:00:00:00:01";
/// Name of the tap device in the namespace.
pub const TAP: &str = "tap0";

/// Slots cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// All blocks of the host are taken.
    #[error("all {BLOCKS} blocks of network slots on this host are taken")]
    NoBlock,
    /// All slots of the block are in use.
    #[error("all {BLOCK} network slots of this node are in use")]
    NoSlot,
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

/// A network place in use.
#[derive(Debug, Clone)]
pub struct Slot {
    /// Its number.
    pub index: SlotIndex,
    /// Where the node reaches the guest.
    pub reach: IpAddr,
}

/// How slots are made.
#[derive(Debug, Clone)]
pub struct SlotConfig {
    /// Who holds the block: the node's state folder.
    pub owner: PathBuf,
    /// How many are kept ready.
    pub ready: usize,
}

#[derive(Debug, Default)]
struct Places {
    ready: VecDeque<SlotIndex>,
    /// Not made.
    empty: Vec<SlotIndex>,
}

/// The slots of one node process.
#[derive(Debug, Clone)]
pub struct SlotPool {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    block: u32,
    /// Held for as long as the process lives.
    _lock: Flock<File>,
    places: Mutex<Places>,
    wanted: Notify,
    ready: usize,
}

impl SlotPool {
    /// Takes a block, clears what an earlier process left in it, and lays the host's firewall. Blocking.
    pub fn open(config: &SlotConfig) -> Result<Self, SlotError> {
        let (block, lock) = take_block(&config.owner)?;
        let first = block * BLOCK;
        let all: Vec<SlotIndex> = (first..first + BLOCK).map(SlotIndex).collect();
        for index in &all {
            namespace::remove(*index)?;
        }
        // Guests' packets cross the host.
        fs::write("/proc/sys/net/ipv4/ip_forward", "1")
            .map_err(SlotError::system("enable ip_forward"))?;
        firewall::lay_host(block)?;
        let places = Places {
            ready: VecDeque::new(),
            empty: all.into_iter().rev().collect(),
        };
        Ok(Self {
            inner: Arc::new(Inner {
                block,
                _lock: lock,
                places: Mutex::new(places),
                wanted: Notify::new(),
                ready: config.ready,
            }),
        })
    }

    /// Makes slots ahead until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) {
        loop {
            let next = {
                let mut places = self.places();
                if places.ready.len() < self.inner.ready {
                    places.empty.pop()
                } else {
                    None
                }
            };
            if let Some(index) = next {
                match make(index).await {
                    Ok(()) => self.places().ready.push_back(index),
                    Err(error) => {
                        tracing::error!(%error, "a network slot cannot be made");
                        self.places().empty.insert(0, index);
                        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
                    }
                }
                if !shutdown.is_cancelled() {
                    continue;
                }
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = self.inner.wanted.notified() => {}
            }
        }
    }

    /// A slot nobody uses: one made ahead, or one made now.
    pub async fn take(&self, internet: bool) -> Result<Slot, SlotError> {
        let (index, is_ready) = {
            let mut places = self.places();
            match places.ready.pop_front() {
                Some(index) => (index, true),
                None => (places.empty.pop().ok_or(SlotError::NoSlot)?, false),
            }
        };
        self.inner.wanted.notify_one();
        let made = async {
            if !is_ready {
                make(index).await?;
            }
            if !internet {
                blocking(move || namespace::enter(index, firewall::close_internet)).await?;
            }
            Ok(())
        };
        if let Err(error) = made.await {
            self.give_back(index).await;
            return Err(error);
        }
        Ok(Slot {
            index,
            reach: IpAddr::V4(index.slot_address()),
        })
    }

    /// Takes a slot down; its number can be used again. What a guest may have left in it goes with the namespace.
    pub async fn give_back(&self, index: SlotIndex) {
        if let Err(error) = blocking(move || namespace::remove(index)).await {
            tracing::error!(%error, slot = index.0, "a network slot cannot be removed; it is not used again");
            return;
        }
        self.places().empty.insert(0, index);
        self.inner.wanted.notify_one();
    }

    /// Removes every slot and the host's firewall. Blocking.
    pub fn remove_all(&self) -> Result<(), SlotError> {
        let first = self.inner.block * BLOCK;
        for index in (first..first + BLOCK).map(SlotIndex) {
            namespace::remove(index)?;
        }
        firewall::remove_host(self.inner.block)?;
        release_block(self.inner.block);
        Ok(())
    }

    fn places(&self) -> std::sync::MutexGuard<'_, Places> {
        self.inner
            .places
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

async fn make(index: SlotIndex) -> Result<(), SlotError> {
    namespace::make(index).await
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

/// The block this owner had, or the first that nobody has. A block whose owner's folder still stands is left to it.
fn take_block(owner: &Path) -> Result<(u32, Flock<File>), SlotError> {
    fs::create_dir_all(LOCKS).map_err(SlotError::system("lock folder"))?;
    let owner = owner.to_string_lossy().into_owned();
    let held = |block: u32| fs::read_to_string(lock_path(block)).unwrap_or_default();
    let mine = (0..BLOCKS).find(|block| held(*block) == owner);
    for block in mine.into_iter().chain(0..BLOCKS) {
        let holder = held(block);
        if !holder.is_empty() && holder != owner && Path::new(&holder).exists() {
            continue;
        }
        let path = lock_path(block);
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(SlotError::system("lock file"))?;
        let Ok(lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else {
            continue;
        };
        // Read again under the lock: another may have come and gone.
        let holder = held(block);
        if !holder.is_empty() && holder != owner && Path::new(&holder).exists() {
            continue;
        }
        fs::write(&path, &owner).map_err(SlotError::system("lock file"))?;
        return Ok((block, lock));
    }
    Err(SlotError::NoBlock)
}

fn release_block(block: u32) {
    // Emptied, not removed: another process may be about to lock this very file.
    if let Err(error) = fs::write(lock_path(block), "") {
        tracing::warn!(%error, block, "the block of network slots stays marked as taken");
    }
}

fn lock_path(block: u32) -> PathBuf {
    Path::new(LOCKS).join(format!("{block}.lock"))
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
}
