//! What packets may do, as nftables rules.
//!
//! Every slot has the same rules, [`SLOT`]: its guest's packets must carry its own addresses, reach no other slot, no link-local or
//! metadata address and nothing of the host, and leave under the slot's address. What differs between sessions is only what is in
//! the rules' sets, changed in one transaction by [`apply`]. `nft` compiles the rules once, in a namespace made for that; a slot gets
//! a copy of what the kernel then holds ([`Model`]), so that making one starts no process.
//!
//! On the host one table per node holds for all its slots, by their addresses, however many there are.

use std::{
    io::{self, Write as _},
    net::Ipv4Addr,
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use ipnet::Ipv4Net;
use nix::{
    libc,
    sched::{CloneFlags, unshare},
    sys::socket::SockProtocol,
};

use super::{
    GUEST_MAC, SlotError,
    block::Block,
    namespace,
    netlink::{APPEND, Attributes, CREATE, EXCLUSIVE, Message, Netlink, attributes},
    rules::{NetworkRules, Rule, ranges},
    tap,
};

/// The rules in a slot.
///
/// The guest's packets are looked at one by one, not only the first of a connection, so that a rule that is changed holds for what is
/// open already. Addresses that DNS opened (`names`) carry the mark of the rule that let them through; a connection keeps that mark
/// when the address runs out, and is let through for as long as its rule is in force (`live`).
fn slot_rules() -> String {
    let (tap, mac) = (super::TAP, GUEST_MAC);
    format!(
        "table inet slot {{
           set forbidden {{ type ipv4_addr; flags interval;
             elements = {{ 0.0.0.0/8, 10.213.0.0/16, 127.0.0.0/8, 169.254.0.0/16, 224.0.0.0/3 }}
           }}
           set allow {{ type ipv4_addr; flags interval; }}
           set deny {{ type ipv4_addr; flags interval; }}
           set open {{ type ipv4_addr; flags interval; }}
           set asked {{ type ipv4_addr; flags interval; }}
           map names {{ type ipv4_addr : mark; flags timeout; size {NAMES}; }}
           set live {{ type mark; }}
           chain to_guest {{ type nat hook prerouting priority dstnat; policy accept;
             iifname eth0 meta l4proto tcp dnat ip to 169.254.100.2
             iifname {tap} ip daddr @asked udp dport 53 redirect
             iifname {tap} ip daddr @asked tcp dport 53 redirect
           }}
           chain to_outside {{ type nat hook postrouting priority srcnat; policy accept;
             oifname eth0 masquerade
           }}
           chain refuse {{
             meta l4proto tcp reject with tcp reset
             reject with icmpx type admin-prohibited
           }}
           chain from_guest {{
             ct direction reply ct state established,related accept
             ip daddr @forbidden jump refuse
             ip daddr @asked udp dport 53 jump refuse
             ip daddr @asked tcp dport 53 jump refuse
             ct state new limit rate over 1000/second burst 2000 packets drop
             ip daddr @allow accept
             ct mark set ip daddr map @names
             ct mark @live accept
             ip daddr @deny jump refuse
             ip daddr @open accept
             jump refuse
           }}
           chain forward {{ type filter hook forward priority filter; policy drop;
             ct state invalid drop
             iifname {tap} oifname eth0 ip saddr 169.254.100.2 jump from_guest
             iifname eth0 oifname {tap} ct state established,related accept
             iifname eth0 oifname {tap} ct status dnat accept
           }}
           chain input {{ type filter hook input priority filter; policy drop;
             iifname lo accept
             iifname != {tap} drop
             ip saddr != 169.254.100.2 drop
             ip daddr != 169.254.100.1 jump refuse
             icmp type echo-request accept
             udp dport 53 accept
             tcp dport 53 accept
             jump refuse
           }}
           chain output {{ type filter hook output priority filter; policy drop;
             oifname lo accept
             ct state established,related accept
           }}
         }}
         table netdev slot {{
           chain from_guest {{ type filter hook ingress device {tap} priority -500; policy drop;
             ether saddr != {mac} drop
             ether type ip ip saddr 169.254.100.2 accept
             ether type arp arp saddr ether {mac} arp saddr ip 169.254.100.2 arp daddr ip 169.254.100.1 accept
           }}
         }}"
    )
}

/// Addresses that DNS may have opened at once in a slot.
const NAMES: usize = 4096;

// linux/netfilter/nf_tables.h
const NEW_TABLE: u16 = 0xa00;
const GET_TABLE: u16 = 0xa01;
const NEW_CHAIN: u16 = 0xa03;
const GET_CHAIN: u16 = 0xa04;
const NEW_RULE: u16 = 0xa06;
const GET_RULE: u16 = 0xa07;
const NEW_SET: u16 = 0xa09;
const GET_SET: u16 = 0xa0a;
const NEW_ELEMENTS: u16 = 0xa0c;
const GET_ELEMENTS: u16 = 0xa0d;
const DELETE_ELEMENTS: u16 = 0xa0e;
/// `NFTA_SET_TABLE` and `NFTA_SET_NAME`; `NFTA_SET_ELEM_LIST_TABLE`, `_SET` and `_ELEMENTS` have the same first two.
const TABLE: u16 = 1;
const SET: u16 = 2;
const ELEMENTS: u16 = 3;
const SET_ID: u16 = 10;
const ELEMENT: u16 = 1;
const ELEMENT_KEY: u16 = 1;
const ELEMENT_DATA: u16 = 2;
const ELEMENT_FLAGS: u16 = 3;
const ELEMENT_TIMEOUT: u16 = 4;
const INTERVAL_END: u32 = 1;
const VALUE: u16 = 1;
/// `struct nfgenmsg`: family, version, resource.
const GENERIC: [u8; 4] = [0; 4];
const INET: [u8; 4] = [libc::NFPROTO_INET as u8, 0, 0, 0];

/// The rules of a slot, as messages to the kernel.
#[derive(Debug, Clone)]
pub(super) struct Model(Arc<Vec<Message>>);

impl Model {
    /// Has `nft` lay the rules in a namespace that is gone afterwards, and reads them back. Blocking.
    pub(super) fn make() -> Result<Self, SlotError> {
        namespace::on_own_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET)
                .map_err(|error| SlotError::system("unshare")(error.into()))?;
            // The rules of a device need the device.
            tap::make(super::TAP).map_err(SlotError::system("tap"))?;
            nft(&slot_rules())?;
            read_rules()
                .map(|messages| Self(Arc::new(messages)))
                .map_err(SlotError::system("read the rules of slots"))
        })
    }

    /// Lays the rules; for a thread that is in a slot's namespace.
    pub(super) fn lay(&self) -> Result<(), SlotError> {
        open()?
            .transact(&self.0)
            .map_err(SlotError::system("rules of the slot"))
    }
}

fn open() -> Result<Netlink, SlotError> {
    Netlink::open(SockProtocol::NetlinkNetFilter).map_err(SlotError::system("nftables"))
}

/// All rules of the calling thread's namespace, as messages that make them: what the kernel lists is what it takes, but for what it
/// counts and numbers itself.
fn read_rules() -> io::Result<Vec<Message>> {
    let mut socket = Netlink::open(SockProtocol::NetlinkNetFilter)?;
    let list = |socket: &mut Netlink, kind, body: &[u8]| {
        socket.dump(&Message {
            kind,
            flags: 0,
            body: body.to_vec(),
        })
    };
    let again = |message: &Message, kind, flags, kept: &[u16], more: &Attributes| {
        let (family, rest) = message.body.split_at_checked(1).unwrap_or_default();
        let rest = rest.get(3..).unwrap_or_default();
        let mut all = Attributes::default();
        for (number, kind, value) in attributes(rest) {
            if kept.contains(&number) {
                all = all.put(kind, value);
            }
        }
        Message {
            kind,
            flags,
            body: [family, &[0; 3], all.bytes(), more.bytes()].concat(),
        }
    };
    let none = Attributes::default();
    let mut rules = Vec::new();
    for table in list(&mut socket, GET_TABLE, &GENERIC)? {
        // Name, flags.
        rules.push(again(&table, NEW_TABLE, CREATE, &[1, 2], &none));
    }
    let sets = list(&mut socket, GET_SET, &GENERIC)?;
    for (id, set) in (1_u32..).zip(&sets) {
        // Table, name, flags, types and lengths of key and data, policy, description, time-outs, nft's own notes.
        let kept = [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13];
        let id = Attributes::default().put(SET_ID, &id.to_be_bytes());
        rules.push(again(set, NEW_SET, CREATE, &kept, &id));
    }
    for chain in list(&mut socket, GET_CHAIN, &GENERIC)? {
        // Table, name, hook, policy, type, nft's own notes.
        let kept = [1, 3, 4, 5, 7, 12];
        rules.push(again(&chain, NEW_CHAIN, CREATE, &kept, &none));
    }
    for set in &sets {
        let name = again(set, GET_ELEMENTS, 0, &[TABLE, SET], &none);
        for elements in list(&mut socket, GET_ELEMENTS, &name.body)? {
            let is_empty = !attributes(elements.body.get(4..).unwrap_or_default())
                .any(|(number, _, value)| number == ELEMENTS && !value.is_empty());
            if !is_empty {
                let kept = [TABLE, SET, ELEMENTS];
                rules.push(again(&elements, NEW_ELEMENTS, CREATE, &kept, &none));
            }
        }
    }
    for rule in list(&mut socket, GET_RULE, &GENERIC)? {
        // Table, chain, expressions, nft's own notes.
        rules.push(again(
            &rule,
            NEW_RULE,
            CREATE | APPEND,
            &[1, 2, 4, 7],
            &none,
        ));
    }
    Ok(rules)
}

/// The mark of the connections that a name lets through; never 0, which is no mark.
pub(super) fn mark_of(rule: &Rule) -> u32 {
    let hash = blake3::hash(rule.to_string().as_bytes());
    let [a, b, c, d, ..] = *hash.as_bytes();
    u32::from_ne_bytes([a, b, c, d]).max(1)
}

fn elements(kind: u16, flags: u16, set: &str, elements: &[Attributes]) -> Message {
    let mut body = Attributes::default().text(TABLE, "slot").text(SET, set);
    if !elements.is_empty() {
        let all = elements
            .iter()
            .fold(Attributes::default(), |all, one| all.nest(ELEMENT, one));
        body = body.nest(ELEMENTS, &all);
    }
    Message {
        kind,
        flags,
        body: [&INET, body.bytes()].concat(),
    }
}

fn element(key: [u8; 4]) -> Attributes {
    Attributes::default().nest(ELEMENT_KEY, &Attributes::default().put(VALUE, &key))
}

/// Gives a set new content, in the transaction it is sent in.
fn refill(set: &str, content: &[Attributes]) -> Vec<Message> {
    // Without elements it deletes all.
    let mut messages = vec![elements(DELETE_ELEMENTS, 0, set, &[])];
    if !content.is_empty() {
        messages.push(elements(NEW_ELEMENTS, CREATE, set, content));
    }
    messages
}

/// Ranges as the kernel has them: where each begins, and where what follows it does.
fn intervals(ranges: &[(u32, u32)]) -> Vec<Attributes> {
    let mut all = Vec::new();
    for (first, last) in ranges {
        all.push(element(first.to_be_bytes()));
        if let Some(after) = last.checked_add(1) {
            all.push(element(after.to_be_bytes()).put(ELEMENT_FLAGS, &INTERVAL_END.to_be_bytes()));
        }
    }
    all
}

/// Puts a session's rules into force, all at once; for a thread that is in the slot's namespace. With `is_asked` what the guest sends
/// to any name server comes to the gateway.
pub(super) fn apply(rules: &NetworkRules, is_asked: bool) -> Result<(), SlotError> {
    let nets = |list: &[Rule]| {
        intervals(&ranges(list.iter().filter_map(|rule| match rule {
            Rule::Net(net) => Some(net),
            Rule::Name(_) => None,
        })))
    };
    let all_or_none = |all| if all { vec![(0, u32::MAX)] } else { Vec::new() };
    let mut marks: Vec<u32> = rules
        .allow
        .iter()
        .filter(|rule| matches!(rule, Rule::Name(_)))
        .map(mark_of)
        .collect();
    marks.sort_unstable();
    marks.dedup();
    let live: Vec<Attributes> = marks
        .into_iter()
        .map(|mark| element(mark.to_ne_bytes()))
        .collect();
    let messages = [
        refill("allow", &nets(&rules.allow)),
        refill("deny", &nets(&rules.deny)),
        refill("open", &intervals(&all_or_none(rules.internet))),
        refill("asked", &intervals(&all_or_none(is_asked))),
        refill("live", &live),
    ]
    .concat();
    open()?
        .transact(&messages)
        .map_err(SlotError::system("network rules of the session"))
}

/// Opens addresses in a slot, for as long as the answers that named them hold.
#[derive(Debug)]
pub(super) struct Names {
    socket: Netlink,
}

impl Names {
    /// For a thread that is in the slot's namespace; may be used anywhere then.
    pub(super) fn open() -> Result<Self, SlotError> {
        Ok(Self { socket: open()? })
    }

    /// Lets an address through under a rule's mark. One that is open already stays open for at least that long.
    pub(super) fn let_through(
        &mut self,
        address: Ipv4Addr,
        mark: u32,
        time: Duration,
    ) -> io::Result<()> {
        let key = element(address.octets());
        let milliseconds = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let whole = key
            .clone()
            .nest(
                ELEMENT_DATA,
                &Attributes::default().put(VALUE, &mark.to_ne_bytes()),
            )
            .put(ELEMENT_TIMEOUT, &milliseconds.to_be_bytes());
        let add = elements(NEW_ELEMENTS, CREATE | EXCLUSIVE, "names", &[whole]);
        // One that is there may run out, and one that ran out may come back, between two tries.
        let mut tries = 3;
        loop {
            tries -= 1;
            let there = match self.socket.transact(std::slice::from_ref(&add)) {
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                    let remove = elements(DELETE_ELEMENTS, 0, "names", std::slice::from_ref(&key));
                    self.socket.transact(&[remove, add.clone()])
                }
                other => return other,
            };
            match there {
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) && tries > 0 => {}
                other => return other,
            }
        }
    }
}

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

/// The node's table bears the number of its first block.
pub(super) fn table(first: Block) -> String {
    format!("sandmesh_{first}")
}

fn elements_text(nets: &[Ipv4Net]) -> String {
    let nets: Vec<String> = ranges(nets.iter())
        .into_iter()
        .map(|(first, last)| {
            format!(
                "{}-{}",
                Ipv4Addr::from_bits(first),
                Ipv4Addr::from_bits(last)
            )
        })
        .collect();
    if nets.is_empty() {
        String::new()
    } else {
        format!("elements = {{ {} }}", nets.join(", "))
    }
}

/// The host's rules for the slots of these blocks, in one transaction with the removal of what there is of `all`.
pub(super) fn lay_host(
    blocks: &[Block],
    all: &[Block],
    denied: &[Ipv4Net],
) -> Result<(), SlotError> {
    let Some(first) = blocks.first() else {
        return Ok(());
    };
    let table = table(*first);
    let nets: Vec<Ipv4Net> = blocks.iter().map(|block| block.net()).collect();
    let (slots, denied) = (elements_text(&nets), elements_text(denied));
    // A link's only route is to its own slot, so `fib` finds the way back for no other source.
    nft(&format!(
        "{}
         table inet {table} {{
           set slots {{ type ipv4_addr; flags interval; {slots} }}
           set denied {{ type ipv4_addr; flags interval; {denied} }}
           chain spoofed {{ type filter hook prerouting priority raw; policy accept;
             iifname != \"smh*\" return
             meta nfproto ipv6 drop
             fib saddr . iif oif missing drop
           }}
           chain to_outside {{ type nat hook postrouting priority srcnat; policy accept;
             ip saddr @slots ip daddr != 10.213.0.0/16 masquerade
           }}
           chain forward {{ type filter hook forward priority filter; policy accept;
             ip saddr != @slots ip daddr != @slots return
             ip saddr @slots ip daddr @denied reject with icmpx type admin-prohibited
             ct state established,related accept
             ip saddr @slots ip daddr 10.213.0.0/16 drop
             ip saddr @slots ip daddr 169.254.0.0/16 drop
             ip daddr @slots drop
           }}
           chain input {{ type filter hook input priority filter; policy accept;
             ip saddr != @slots return
             iifname != \"smh*\" return
             ct state established,related accept
             drop
           }}
         }}",
        removal(all)
    ))
}

/// Removes the host's rules.
pub(super) fn remove_host(blocks: &[Block]) -> Result<(), SlotError> {
    nft(&removal(blocks))
}

/// A block that is not the node's first has no table, unless it was another's.
fn removal(blocks: &[Block]) -> String {
    let one = |block: &Block| {
        let table = table(*block);
        format!("table inet {table} {{ }}\ndelete table inet {table}")
    };
    blocks.iter().map(one).collect::<Vec<_>>().join("\n")
}

/// Names of the host's tables.
pub(super) fn tables() -> Result<Vec<String>, SlotError> {
    let list = Message {
        kind: GET_TABLE,
        flags: 0,
        body: GENERIC.to_vec(),
    };
    let tables = open()?
        .dump(&list)
        .map_err(SlotError::system("list tables"))?;
    let name = |message: &Message| {
        attributes(message.body.get(4..)?)
            .find(|(number, _, _)| *number == TABLE)
            .map(|(_, _, name)| {
                String::from_utf8_lossy(name)
                    .trim_end_matches('\0')
                    .to_owned()
            })
    };
    Ok(tables.iter().filter_map(name).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lays rules in a namespace of its own and lists them as `nft` does.
    fn listed(lay: impl FnOnce() -> Result<(), SlotError> + Send) -> String {
        namespace::on_own_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            tap::make(crate::slot::TAP).unwrap();
            lay()?;
            let listed = Command::new("nft")
                .args(["-s", "list", "ruleset"])
                .output()
                .unwrap();
            assert!(listed.status.success());
            Ok(String::from_utf8(listed.stdout).unwrap())
        })
        .unwrap()
    }

    #[test]
    fn a_copy_of_the_rules_is_as_nft_would_lay_them() {
        let by_nft = listed(|| nft(&slot_rules()));
        let model = Model::make().unwrap();
        let copied = listed(|| model.lay());
        assert_eq!(copied, by_nft);
        assert!(by_nft.contains("policy drop"), "{by_nft}");
    }

    #[test]
    fn marks_of_names_differ_and_stay() {
        let mark = |text: &str| mark_of(&text.parse().unwrap());
        assert_ne!(mark("example.com"), mark("*.example.com"));
        // It is in the kernel when the next process comes.
        assert_eq!(mark("Example.com"), mark("example.com"));
        assert_ne!(mark("example.com"), 0);
    }
}
