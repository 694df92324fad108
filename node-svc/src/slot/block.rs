//! Blocks of slots: how several nodes on one host share its numbers. A block is locked by a file under `/run/sandmesh` for as long as
//! its holder's process lives, and says whose it is, so that a node that comes back has the same ones.

use std::{
    collections::BTreeSet,
    fmt,
    fs::{self, File},
    path::{Path, PathBuf},
};

use ipnet::Ipv4Net;
use nix::fcntl::{Flock, FlockArg};

use super::{SlotError, SlotIndex};

/// Slots in a block.
pub const BLOCK: u32 = 64;
/// Blocks on a host: 10.213.0.0/16 in pairs of addresses.
pub(super) const BLOCKS: u32 = 512;
const LOCKS: &str = "/run/sandmesh/blocks";

/// Number of a block on this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Block(pub(super) u32);

impl Block {
    /// The block of a slot.
    pub(super) fn of(index: SlotIndex) -> Self {
        Self(index.0 / BLOCK)
    }

    /// Its slots.
    pub(super) fn slots(self) -> impl Iterator<Item = SlotIndex> {
        (self.0 * BLOCK..(self.0 + 1) * BLOCK).map(SlotIndex)
    }

    /// Its addresses: 64 pairs are a /25.
    pub(super) fn net(self) -> Ipv4Net {
        Ipv4Net::new_assert(SlotIndex(self.0 * BLOCK).host_address(), 25)
    }

    fn lock_path(self) -> PathBuf {
        Path::new(LOCKS).join(format!("{self}.lock"))
    }

    /// Who had or has it; empty: nobody.
    pub(super) fn holder(self) -> String {
        fs::read_to_string(self.lock_path()).unwrap_or_default()
    }
}

impl fmt::Display for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A block that is this process's.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) block: Block,
    lock: Flock<File>,
}

impl Held {
    /// Leaves it to whoever wants it.
    pub(super) fn release(self) {
        // Emptied, not removed: another process may be about to lock this very file.
        release(self.block);
        drop(self.lock);
    }
}

/// For what only one process on the host may do at a time.
pub(super) fn one_at_a_time() -> Result<Flock<File>, SlotError> {
    let failed = SlotError::system("lock of the host");
    fs::create_dir_all(LOCKS).map_err(&failed)?;
    let file = File::create(Path::new(LOCKS).join("host")).map_err(&failed)?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| failed(error.into()))
}

/// Marks a block as nobody's.
pub(super) fn release(block: Block) {
    if let Err(error) = fs::write(block.lock_path(), "") {
        tracing::warn!(%error, %block, "the block of network slots stays marked as taken");
    }
}

/// The blocks that bear this owner's name, held or not.
pub(super) fn of_owner(owner: &Path) -> Vec<Block> {
    let owner = owner.to_string_lossy();
    (0..BLOCKS)
        .map(Block)
        .filter(|block| block.holder() == owner)
        .collect()
}

/// All blocks this owner had, those of the slots it keeps, and more until there are `count`. A block whose owner's folder still
/// stands is left to it. In order.
pub(super) fn take(
    owner: &Path,
    count: usize,
    keep: &BTreeSet<SlotIndex>,
) -> Result<Vec<Held>, SlotError> {
    fs::create_dir_all(LOCKS).map_err(SlotError::system("lock folder"))?;
    let mut held: Vec<Held> = Vec::new();
    for block in of_owner(owner) {
        held.extend(try_take(block, owner)?);
    }
    let had = held.len();
    // On failure what was taken just now is of no use.
    let give_up = |held: Vec<Held>, error| {
        held.into_iter().skip(had).for_each(Held::release);
        Err(error)
    };
    let kept: BTreeSet<Block> = keep.iter().copied().map(Block::of).collect();
    for block in kept {
        if held.iter().any(|one| one.block == block) {
            continue;
        }
        if let Some(one) = try_take(block, owner)? {
            held.push(one);
            continue;
        }
        let holder = block.holder();
        let block = block.0;
        return give_up(held, SlotError::NotOurs { block, holder });
    }
    let mut others = (0..BLOCKS).map(Block);
    while held.len() < count {
        let Some(block) = others.next() else {
            let found = held.len();
            return give_up(
                held,
                SlotError::NoBlock {
                    wanted: count,
                    found,
                },
            );
        };
        if !held.iter().any(|one| one.block == block) {
            held.extend(try_take(block, owner)?);
        }
    }
    held.sort_by_key(|one| one.block);
    Ok(held)
}

fn try_take(block: Block, owner: &Path) -> Result<Option<Held>, SlotError> {
    let owner = owner.to_string_lossy();
    let is_free = || {
        let holder = block.holder();
        holder.is_empty() || holder == owner || !Path::new(&holder).exists()
    };
    if !is_free() {
        return Ok(None);
    }
    let path = block.lock_path();
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(SlotError::system("lock file"))?;
    let Ok(lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else {
        return Ok(None);
    };
    // Read again under the lock: another may have come and gone.
    if !is_free() {
        return Ok(None);
    }
    fs::write(&path, owner.as_bytes()).map_err(SlotError::system("lock file"))?;
    Ok(Some(Held { block, lock }))
}
