//! Where a session goes. Pure: the view of the nodes and two random numbers decide.
//!
//! A view is as old as the last heartbeat, so the answer is a good guess; the node itself decides whether it has room.

use service_kit::ids::{HomeTag, NodeId};

/// What a session takes from a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Disk in bytes.
    pub disk_bytes: u64,
}

impl Need {
    /// Of a session of this size.
    pub fn of(size: &proto::session::v1::Resources) -> Self {
        Self {
            memory_bytes: size.memory_bytes,
            vcpus: size.vcpus,
            disk_bytes: size.disk_bytes,
        }
    }
}

/// What a node has left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Free {
    /// Sessions.
    pub sessions: u32,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Disk in bytes.
    pub disk_bytes: u64,
}

/// A node that takes sessions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Which.
    pub node_id: NodeId,
    /// What its session IDs begin with.
    pub home_tag: HomeTag,
    /// Where it is called.
    pub internal_address: String,
    /// What it had left at its last heartbeat.
    pub free: Free,
}

impl Candidate {
    /// Counts a session that was sent there and that no heartbeat shows yet.
    pub fn take(&mut self, need: Need) {
        self.free = Free {
            sessions: self.free.sessions.saturating_sub(1),
            memory_bytes: self.free.memory_bytes.saturating_sub(need.memory_bytes),
            vcpus: self.free.vcpus.saturating_sub(need.vcpus),
            disk_bytes: self.free.disk_bytes.saturating_sub(need.disk_bytes),
        };
    }

    /// Counts so many sessions, if there is room for all of them.
    pub fn take_all(&mut self, need: Need, count: u32) -> bool {
        let fits = (0..count).try_fold(self.clone(), |mut left, _| {
            left.fits(need).then(|| {
                left.take(need);
                left
            })
        });
        let Some(left) = fits else { return false };
        *self = left;
        true
    }

    fn fits(&self, need: Need) -> bool {
        self.free.sessions > 0
            && self.free.memory_bytes >= need.memory_bytes
            && self.free.vcpus >= need.vcpus
            && self.free.disk_bytes >= need.disk_bytes
    }
}

/// The emptier of two nodes picked at random among those that fit ("power of two choices": load spreads evenly although every
/// replica's view is stale). `None` when nothing fits.
pub fn choose<'a>(
    candidates: &'a [Candidate],
    need: Need,
    tried: &[NodeId],
    picks: (u32, u32),
) -> Option<&'a Candidate> {
    let fitting: Vec<&'a Candidate> = candidates
        .iter()
        .filter(|node| node.fits(need) && !tried.contains(&node.node_id))
        .collect();
    let first = fitting.get((picks.0 as usize).checked_rem(fitting.len())?)?;
    let second = fitting.get((picks.1 as usize).checked_rem(fitting.len())?)?;
    Some(if second.free.memory_bytes > first.free.memory_bytes {
        second
    } else {
        first
    })
}

/// The most any single node has left, to say when nothing fits.
pub fn most_free(candidates: &[Candidate]) -> Free {
    candidates
        .iter()
        .map(|node| node.free)
        .max_by_key(|free| (free.sessions > 0, free.memory_bytes))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn either_all_of_a_fork_fit_or_none_is_counted() {
        let need = Need {
            memory_bytes: 100,
            vcpus: 1,
            disk_bytes: 0,
        };
        let mut candidate = node("a", 9, 350);
        candidate.free.vcpus = 9;
        let before = candidate.free;
        assert!(!candidate.take_all(need, 4));
        assert_eq!(candidate.free, before);
        assert!(candidate.take_all(need, 3));
        assert_eq!(
            (candidate.free.memory_bytes, candidate.free.sessions),
            (50, 6)
        );
        assert!(!candidate.take_all(need, 1));
    }

    fn node(name: &str, sessions: u32, memory_bytes: u64) -> Candidate {
        Candidate {
            node_id: NodeId::parse(name).unwrap(),
            home_tag: HomeTag::random(),
            internal_address: String::new(),
            free: Free {
                sessions,
                memory_bytes,
                vcpus: 8,
                disk_bytes: 1 << 40,
            },
        }
    }

    const NEED: Need = Need {
        memory_bytes: 100,
        vcpus: 1,
        disk_bytes: 1,
    };

    #[test]
    fn full_and_tried_nodes_are_left_out() {
        let nodes = [
            node("full", 0, 1000),
            node("small", 9, 99),
            node("tried", 9, 1000),
            node("fits", 1, 100),
        ];
        let tried = [NodeId::parse("tried").unwrap()];
        for pick in 0..8 {
            assert_eq!(
                choose(&nodes, NEED, &tried, (pick, pick / 2))
                    .unwrap()
                    .node_id
                    .as_str(),
                "fits"
            );
        }
        assert_eq!(choose(&nodes[..2], NEED, &[], (0, 0)), None);
        assert_eq!(choose(&[], NEED, &[], (3, 4)), None);
    }

    proptest! {
        #[test]
        fn whatever_is_chosen_fits(
            sizes in prop::collection::vec((0u32..3, 0u64..300), 0..20), first: u32, second: u32,
        ) {
            let nodes: Vec<_> =
                sizes.iter().enumerate().map(|(i, (sessions, memory))| node(&format!("n{i}"), *sessions, *memory)).collect();
            match choose(&nodes, NEED, &[], (first, second)) {
                Some(chosen) => prop_assert!(chosen.fits(NEED)),
                None => prop_assert!(nodes.iter().all(|node| !node.fits(NEED))),
            }
        }
    }
}
