//! What packets may do, as nftables rules: one `nft -f -` (one transaction) per batch.
//!
//! In a slot: TCP from the node goes to the guest; the guest's packets must carry its own addresses, reach no link-local or
//! metadata address, and leave under the slot's address. On the host: slots reach neither the host nor each other.

use std::{
    io::Write as _,
    process::{Command, Stdio},
};

use super::{BLOCK, GUEST_MAC, SlotError, SlotIndex, TAP};

fn nft(batch: &str) -> Result<(), SlotError> {
    let run = || {
        let mut child = Command::new("nft")
            .args(["-f", "-"])
            .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(batch.as_bytes())?;
        }
        child.wait_with_output()
    };
    let output = run().map_err(SlotError::system("nft"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(SlotError::System {
        step: "nft",
        cause: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}

/// The rules inside a slot; for a thread that is in its namespace.
pub(super) fn lay_slot() -> Result<(), SlotError> {
    nft(&format!(
        "table inet slot {{
           chain to_guest {{ type nat hook prerouting priority dstnat; policy accept;
             iifname eth0 meta l4proto tcp dnat ip to 169.254.100.2
           }}
           chain to_outside {{ type nat hook postrouting priority srcnat; policy accept;
             oifname eth0 masquerade
           }}
           set forbidden {{ type ipv4_addr; flags interval;
             elements = {{ 0.0.0.0/8, 127.0.0.0/8, 169.254.0.0/16, 224.0.0.0/3 }}
           }}
           chain internet {{ }}
           chain forward {{ type filter hook forward priority filter; policy drop;
             iifname {TAP} ip saddr != 169.254.100.2 drop
             ct state established,related accept
             iifname {TAP} ip daddr @forbidden drop
             iifname {TAP} jump internet
             iifname {TAP} oifname eth0 accept
             iifname eth0 oifname {TAP} accept
           }}
           chain input {{ type filter hook input priority filter; policy drop;
             iifname lo accept
             iifname {TAP} ip saddr 169.254.100.2 icmp type echo-request accept
           }}
         }}
         table netdev slot {{
           chain from_guest {{ type filter hook ingress device {TAP} priority -500; policy accept;
             ether saddr != {GUEST_MAC} drop
             ether type != {{ ip, arp }} drop
             arp saddr ip != 169.254.100.2 drop
           }}
         }}"
    ))
}

/// Lets the guest open no connections to the outside; for a thread that is in the slot's namespace.
pub(super) fn close_internet() -> Result<(), SlotError> {
    nft("add rule inet slot internet drop")
}

fn table(block: u32) -> String {
    format!("sandmesh_{block}")
}

/// The host's rules for a block of slots.
pub(super) fn lay_host(block: u32) -> Result<(), SlotError> {
    let (table, first) = (table(block), SlotIndex(block * BLOCK).host_address());
    // 64 pairs of addresses are a /25.
    nft(&format!(
        "table inet {table} {{ }}
         delete table inet {table}
         table inet {table} {{
           chain to_outside {{ type nat hook postrouting priority srcnat; policy accept;
             ip saddr {first}/25 ip daddr != 10.213.0.0/16 masquerade
           }}
           chain forward {{ type filter hook forward priority filter; policy accept;
             ip saddr != {first}/25 ip daddr != {first}/25 return
             ct state established,related accept
             ip saddr {first}/25 ip daddr 10.213.0.0/16 drop
             ip saddr {first}/25 ip daddr 169.254.0.0/16 drop
             ip daddr {first}/25 drop
           }}
           chain input {{ type filter hook input priority filter; policy accept;
             ip saddr != {first}/25 return
             iifname != \"smh*\" return
             ct state established,related accept
             drop
           }}
         }}"
    ))
}

/// Removes the host's rules.
pub(super) fn remove_host(block: u32) -> Result<(), SlotError> {
    let table = table(block);
    nft(&format!(
        "table inet {table} {{ }}\ndelete table inet {table}"
    ))
}
