//! What a deployment may not leave behind on the host.

use std::{collections::BTreeSet, fs, process::Command};

/// Everything of Sandmesh that is on this host now. Others may run at the same time, so two views are compared for what is new and
/// belongs to one state folder or is of a kind nobody else makes.
pub fn of_state(state: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        // A VMM is told no whole path; it works in its session's folder.
        let works_in = fs::read_link(entry.path().join("cwd")).unwrap_or_default();
        if command.contains(state) || works_in.to_string_lossy().contains(state) {
            found.insert(format!("process {command}"));
        }
    }
    for line in fs::read_to_string("/proc/self/mounts")
        .unwrap()
        .lines()
        .filter(|line| line.contains(state))
    {
        found.insert(format!("mount {line}"));
    }
    found
}

/// Network objects of a block of slots: namespaces, links, firewall tables.
pub fn of_block(block: u32) -> BTreeSet<String> {
    let first = block * 64;
    let mut found = BTreeSet::new();
    for index in first..first + 64 {
        if fs::exists(format!("/run/netns/sandmesh-{index}")).unwrap() {
            found.insert(format!("namespace sandmesh-{index}"));
        }
        if fs::exists(format!("/sys/class/net/smh{index}")).unwrap() {
            found.insert(format!("link smh{index}"));
        }
    }
    let tables = Command::new("nft")
        .args(["list", "tables"])
        .output()
        .unwrap();
    let tables = String::from_utf8_lossy(&tables.stdout).into_owned();
    if tables
        .lines()
        .any(|line| line.ends_with(&format!(" sandmesh_{block}")))
    {
        found.insert(format!("table sandmesh_{block}"));
    }
    found
}

/// The first block that a node with this state folder has.
pub fn block_of(node_state: &str) -> Option<u32> {
    blocks_of(node_state).next()
}

fn blocks_of(node_state: &str) -> impl Iterator<Item = u32> {
    (0..512).filter(move |block| {
        fs::read_to_string(format!("/run/sandmesh/blocks/{block}.lock"))
            .is_ok_and(|owner| owner == node_state)
    })
}

/// How many slots a node with this state folder has.
pub fn slots_of(node_state: &str) -> usize {
    blocks_of(node_state)
        .flat_map(|block| block * 64..(block + 1) * 64)
        .filter(|index| fs::exists(format!("/run/netns/sandmesh-{index}")).unwrap())
        .count()
}
