//! What slots promise, tried in real namespaces: who stands in for a guest does what a hostile one would. Needs root.
#![allow(clippy::unwrap_used)]

use std::{
    collections::BTreeSet,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use guests::{Card, GATEWAY_IP, GUEST, Guest, MAC, Outside, arp, inside, printed, udp};
use hickory_proto::{
    op::{Message, MessageType, OpCode, Query, ResponseCode},
    rr::{Name, RData, Record, RecordType, rdata::A},
};
use node_svc::slot::{
    NetworkRules, Slot, SlotConfig, SlotError, SlotIndex, SlotPool, Traffic, leftovers,
};
use tempfile::TempDir;

mod guests;

const PATIENCE: Duration = Duration::from_secs(20);
/// For what must not come: what is refused says so at once.
const REFUSED_WITHIN: Duration = Duration::from_secs(5);
const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// A pool with a folder of its own, which leaves nothing.
struct Node {
    pool: SlotPool,
    config: SlotConfig,
    _folder: TempDir,
}

impl Node {
    fn new(change: impl FnOnce(&mut SlotConfig)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut config = SlotConfig::new(folder.path().to_owned(), 0);
        change(&mut config);
        let pool = SlotPool::open(&config, &BTreeSet::new()).unwrap();
        Self {
            pool,
            config,
            _folder: folder,
        }
    }

    /// As if the process had died and come back.
    fn restart(&mut self, keep: &[SlotIndex]) {
        let unlocked = SlotConfig::new(tempfile::tempdir().unwrap().path().to_owned(), 0);
        let spare = SlotPool::open(&unlocked, &BTreeSet::new()).unwrap();
        // The locks go with the last of the pool, before the next one wants them.
        drop(std::mem::replace(&mut self.pool, spare.clone()));
        let keep = keep.iter().copied().collect();
        self.pool = SlotPool::open(&self.config, &keep).unwrap();
        spare.remove_all().unwrap();
    }

    async fn open(&self) -> Slot {
        self.pool.take(&NetworkRules::internet(true)).await.unwrap()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let blocks = self.pool.blocks();
        self.pool.remove_all().unwrap();
        if !thread::panicking() {
            assert_eq!(leftovers(&blocks).unwrap(), Vec::<String>::new());
        }
    }
}

fn rules(internet: bool, allow: &[&str], deny: &[&str]) -> NetworkRules {
    let texts = |list: &[&str]| list.iter().map(ToString::to_string).collect::<Vec<_>>();
    NetworkRules::parse(internet, &texts(allow), &texts(deny), 0, 0).unwrap()
}

fn connect(guest: &Guest, to: (Ipv4Addr, u16)) -> std::io::Result<TcpStream> {
    guest.run(|| TcpStream::connect_timeout(&SocketAddr::from(to), REFUSED_WITHIN))
}

/// A server that answers every connection with one byte and then keeps it, on any address of a namespace.
fn greet(namespace: &str) -> u16 {
    let listener = inside(namespace, || TcpListener::bind("0.0.0.0:0").unwrap());
    greet_at(listener)
}

fn greet_at(listener: TcpListener) -> u16 {
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        let mut open = Vec::new();
        while let Ok((mut stream, _)) = listener.accept() {
            let _ = stream.write_all(b"!");
            open.push(stream);
        }
    });
    port
}

fn is_greeted(stream: &mut TcpStream) -> bool {
    let mut byte = [0];
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.read_exact(&mut byte).is_ok()
}

/// Whether a connection that its server keeps has ended, once something was sent.
fn is_cut(stream: &mut TcpStream) -> bool {
    let _ = stream.write_all(b"?");
    match stream.read(&mut [0]) {
        // The reset may have come before, and been told to who wrote.
        Ok(0) => true,
        Ok(_) => false,
        Err(error) => error.kind() != std::io::ErrorKind::WouldBlock,
    }
}

fn reaches(guest: &Guest, to: (Ipv4Addr, u16)) -> bool {
    connect(guest, to).is_ok_and(|mut stream| is_greeted(&mut stream))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_reaches_the_outside_and_is_reached_from_its_node() {
    let node = Node::new(|_| {});
    let outside = Outside::new(&node.pool);
    let slot = node.open().await;
    let guest = Guest::new(&node.pool, slot.index).await;
    let far = greet(&outside.namespace.0);
    assert!(reaches(&guest, (outside.addresses[0], far)));
    let near = greet(&guest.namespace.0);
    let mut stream = TcpStream::connect_timeout(&(slot.reach, near).into(), PATIENCE).unwrap();
    assert!(is_greeted(&mut stream));
}

#[tokio::test(flavor = "multi_thread")]
async fn spoofed_packets_go_nowhere() {
    let node = Node::new(|_| {});
    let outside = Outside::new(&node.pool);
    let slot = node.open().await;
    let other = node.open().await;
    let card = Card::of(&node.pool, slot.index).await;
    let gateway = card.gateway();
    let sink = inside(&outside.namespace.0, || {
        UdpSocket::bind("0.0.0.0:0").unwrap()
    });
    sink.set_read_timeout(Some(PATIENCE)).unwrap();
    let to = (outside.addresses[0], sink.local_addr().unwrap().port());

    let strange = [2, 0xfc, 0, 0, 0, 9];
    card.send(&udp(
        (strange, GUEST),
        gateway,
        to,
        b"a strange hardware address",
    ));
    for source in [
        Ipv4Addr::new(203, 0, 113, 5),
        Ipv4Addr::new(169, 254, 100, 3),
        GATEWAY_IP,
        slot.index.slot_address(),
        slot.index.host_address(),
        other.index.slot_address(),
        outside.host,
        Ipv4Addr::LOCALHOST,
        Ipv4Addr::UNSPECIFIED,
        Ipv4Addr::BROADCAST,
    ] {
        card.send(&udp(
            (MAC, source),
            gateway,
            to,
            source.to_string().as_bytes(),
        ));
    }
    let mut tagged = udp((MAC, GUEST), gateway, to, b"in a VLAN");
    tagged.splice(12..12, [0x81, 0, 0, 5]);
    card.send(&tagged);
    // What is in order comes through, after all the above had its chance.
    card.send(&udp((MAC, GUEST), gateway, to, b"in order"));
    let mut buffer = [0; 100];
    let (length, from) = sink.recv_from(&mut buffer).unwrap();
    assert_eq!(String::from_utf8_lossy(&buffer[..length]), "in order");
    assert_eq!(
        from.ip(),
        outside.host,
        "it leaves under the host's address"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn arp_says_nothing_but_where_the_gateway_is() {
    let node = Node::new(|_| {});
    let slot = node.open().await;
    let card = Card::of(&node.pool, slot.index).await;
    card.gateway();
    let before = printed("ip", &format!("-n {} neigh", slot.index.namespace()));
    let strange = [2, 0xfc, 0, 0, 0, 9];
    // Others' addresses, and its own under another hardware address, asked for and claimed.
    for operation in [1, 2] {
        card.send(&arp(MAC, operation, (MAC, GATEWAY_IP), GATEWAY_IP));
        card.send(&arp(
            MAC,
            operation,
            (MAC, Ipv4Addr::new(169, 254, 100, 3)),
            GATEWAY_IP,
        ));
        card.send(&arp(MAC, operation, (strange, GUEST), GATEWAY_IP));
        card.send(&arp(strange, operation, (strange, GUEST), GATEWAY_IP));
        card.send(&arp(
            MAC,
            operation,
            (MAC, slot.index.host_address()),
            slot.index.slot_address(),
        ));
    }
    // The slot does not say which other addresses it has.
    card.send(&arp(MAC, 1, (MAC, GUEST), slot.index.slot_address()));
    card.send(&arp(MAC, 1, (MAC, GUEST), GATEWAY_IP));
    let answer = card
        .receive(|frame| frame.get(12..14) == Some(&[8, 6]))
        .unwrap();
    assert_eq!(
        &answer[28..32],
        &GATEWAY_IP.octets(),
        "whom the answer is about"
    );
    let after = printed("ip", &format!("-n {} neigh", slot.index.namespace()));
    assert_eq!(before, after);
    assert!(after.contains("PERMANENT"), "{after}");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_slot_reaches_another_the_host_or_metadata() {
    let node = Node::new(|_| {});
    let outside = Outside::new(&node.pool);
    let slot = node.open().await;
    let guest = Guest::new(&node.pool, slot.index).await;
    let other = node.open().await;
    let neighbour = Guest::new(&node.pool, other.index).await;
    let far = greet(&outside.namespace.0);
    let next_door = greet(&neighbour.namespace.0);
    // On every address of the host, and inside the slot itself.
    let host = greet_at(TcpListener::bind("0.0.0.0:0").unwrap());
    let own = greet(&slot.index.namespace());
    assert!(
        reaches(&guest, (outside.addresses[0], far)),
        "it reaches something"
    );
    for (what, to) in [
        ("another guest", (other.index.slot_address(), next_door)),
        (
            "another slot's host side",
            (other.index.host_address(), host),
        ),
        ("its own host side", (slot.index.host_address(), host)),
        ("its own slot address", (slot.index.slot_address(), own)),
        ("its gateway", (GATEWAY_IP, own)),
        ("the host's other address", (outside.host, host)),
        ("metadata", (METADATA, 80)),
        ("a link-local address", (Ipv4Addr::new(169, 254, 1, 1), 80)),
        (
            "the other end of its own link",
            (Ipv4Addr::new(169, 254, 100, 3), 80),
        ),
    ] {
        let begun = Instant::now();
        let error = connect(&guest, to).expect_err(what);
        assert!(
            begun.elapsed() < REFUSED_WITHIN + PATIENCE,
            "{what}: {error}"
        );
    }
    // Metadata has a server, beyond the host: what the guest sends there does not leave the slot.
    guests::ip(&format!(
        "-n {} addr add {METADATA}/32 dev lo",
        outside.namespace.0
    ));
    assert!(!reaches(&guest, (METADATA, far)));
    let before = node.pool.traffic(slot.index).await.unwrap().sent;
    assert!(!reaches(&guest, (METADATA, far)));
    assert_eq!(node.pool.traffic(slot.index).await.unwrap().sent, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_escaped_vmm_in_its_namespace_opens_nothing() {
    let node = Node::new(|_| {});
    let outside = Outside::new(&node.pool);
    let slot = node.open().await;
    let far = greet(&outside.namespace.0);
    let host = greet_at(TcpListener::bind("0.0.0.0:0").unwrap());
    for to in [
        (outside.addresses[0], far),
        (slot.index.host_address(), host),
    ] {
        let connected = inside(&slot.index.namespace(), || {
            TcpStream::connect_timeout(&SocketAddr::from(to), Duration::from_millis(300))
        });
        assert!(connected.is_err(), "{to:?}");
    }
    // Even without the slot's own rules the host lets nothing through that the slot must not reach, or that is not the slot's.
    printed(
        "ip",
        &format!("netns exec {} nft flush ruleset", slot.index.namespace()),
    );
    let other = node.open().await;
    let neighbour = Guest::new(&node.pool, other.index).await;
    let next_door = greet(&neighbour.namespace.0);
    for to in [
        (slot.index.host_address(), host),
        (outside.host, host),
        (other.index.slot_address(), next_door),
    ] {
        let connected = inside(&slot.index.namespace(), || {
            TcpStream::connect_timeout(&SocketAddr::from(to), Duration::from_millis(300))
        });
        assert!(connected.is_err(), "{to:?}");
    }
    let sink = inside(&outside.namespace.0, || {
        UdpSocket::bind("0.0.0.0:0").unwrap()
    });
    sink.set_read_timeout(Some(PATIENCE)).unwrap();
    let to = (outside.addresses[0], sink.local_addr().unwrap().port());
    inside(&slot.index.namespace(), || {
        guests::ip("addr add 203.0.113.5/32 dev lo");
        let spoofed = UdpSocket::bind("203.0.113.5:0").unwrap();
        spoofed.send_to(b"spoofed", to).unwrap();
        let honest = UdpSocket::bind("0.0.0.0:0").unwrap();
        honest.send_to(b"honest", to).unwrap();
    });
    let mut buffer = [0; 100];
    let length = sink.recv(&mut buffer).unwrap();
    assert_eq!(&buffer[..length], b"honest");
}

#[tokio::test(flavor = "multi_thread")]
async fn ipv6_is_dropped() {
    let node = Node::new(|_| {});
    let slot = node.open().await;
    let addresses = printed(
        "ip",
        &format!("-n {} -6 addr show scope link", slot.index.namespace()),
    );
    assert_eq!(addresses.trim(), "", "the slot has no IPv6 address");
    let host = printed(
        "ip",
        &format!("-6 addr show dev {}", slot.index.host_link()),
    );
    assert_eq!(host.trim(), "", "nor has the host towards it");
    let card = Card::of(&node.pool, slot.index).await;
    card.gateway();
    // An echo request to all nodes, from a link-local address, with its right checksum; then something that is answered.
    let mut frame = vec![0x33, 0x33, 0, 0, 0, 1];
    frame.extend(MAC);
    frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 8, 58, 255]);
    frame.extend("fe80::1".parse::<std::net::Ipv6Addr>().unwrap().octets());
    frame.extend("ff02::1".parse::<std::net::Ipv6Addr>().unwrap().octets());
    frame.extend([128, 0, 0x82, 0xb8, 0, 0, 0, 0]);
    card.send(&frame);
    card.send(&arp(MAC, 1, (MAC, GUEST), GATEWAY_IP));
    let answer = card
        .receive(|frame| matches!(frame.get(12..14), Some([8, 6] | [0x86, 0xdd])))
        .unwrap();
    assert_eq!(&answer[12..14], &[8, 6]);
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_about_networks_hold_at_once_for_what_is_open_too() {
    let node = Node::new(|_| {});
    let outside = Outside::new(&node.pool);
    let slot = node.open().await;
    let guest = Guest::new(&node.pool, slot.index).await;
    let port = greet(&outside.namespace.0);
    let [first, second, _] = outside.addresses;
    let (one, two) = (first.to_string(), second.to_string());
    let apply = async |rules: NetworkRules| node.pool.apply(slot.index, &rules).await.unwrap();

    let mut open = connect(&guest, (first, port)).unwrap();
    assert!(is_greeted(&mut open));
    apply(rules(true, &[], &[&one])).await;
    assert!(!reaches(&guest, (first, port)), "denied");
    assert!(
        reaches(&guest, (second, port)),
        "the rest is as internet says"
    );
    // The open connection hears of it with its next packet.
    assert!(is_cut(&mut open));

    apply(rules(false, &[&two], &[])).await;
    assert!(!reaches(&guest, (first, port)), "no internet");
    assert!(reaches(&guest, (second, port)), "but for what is allowed");
    apply(rules(true, &[&one], &["198.18.0.0/15"])).await;
    assert!(reaches(&guest, (first, port)), "allow goes before deny");
    assert!(!reaches(&guest, (second, port)));
    apply(rules(true, &["0.0.0.0/0"], &[])).await;
    assert!(
        connect(&guest, (METADATA, 80)).is_err(),
        "no rule opens these"
    );
    apply(rules(false, &[], &[])).await;
    assert!(!reaches(&guest, (second, port)));
    // Who is not let out is still reached.
    let near = greet(&guest.namespace.0);
    let mut stream = TcpStream::connect_timeout(&(slot.reach, near).into(), PATIENCE).unwrap();
    assert!(is_greeted(&mut stream));
    apply(rules(true, &[], &[])).await;
    assert!(reaches(&guest, (first, port)), "all is undone");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_most_rules_there_can_be_are_taken() {
    let node = Node::new(|_| {});
    let slot = node.open().await;
    let list = |kind| {
        (0..64)
            .map(|n| format!("10.{kind}.{n}.0/25"))
            .collect::<Vec<_>>()
    };
    let most = NetworkRules::parse(true, &list(1), &list(2), 0, 0).unwrap();
    node.pool.apply(slot.index, &most).await.unwrap();
    let rules = printed(
        "ip",
        &format!(
            "netns exec {} nft list table inet slot",
            slot.index.namespace()
        ),
    );
    assert!(
        rules.contains("10.1.63.0/25") && rules.contains("10.2.0.0/25"),
        "{rules}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn no_session_reaches_what_the_operator_denies() {
    let node = Node::new(|config| config.egress_deny = vec!["198.18.0.0/15".parse().unwrap()]);
    let outside = Outside::new(&node.pool);
    let slot = node
        .pool
        .take(&rules(true, &["198.18.0.0/15"], &[]))
        .await
        .unwrap();
    let guest = Guest::new(&node.pool, slot.index).await;
    let port = greet(&outside.namespace.0);
    let begun = Instant::now();
    assert!(connect(&guest, (outside.addresses[0], port)).is_err());
    assert!(begun.elapsed() < REFUSED_WITHIN, "it is told so");
}

/// A name server on the host, by UDP and TCP, for which every name has this address.
fn name_server(address: Ipv4Addr) -> SocketAddr {
    let answer = move |question: &[u8]| {
        let question = Message::from_vec(question).unwrap();
        let query = question.queries[0].clone();
        let mut answer = Message::response(question.metadata.id, OpCode::Query);
        answer.add_answer(Record::from_rdata(
            query.name.clone(),
            1,
            RData::A(A(address)),
        ));
        answer.add_query(query);
        answer.to_vec().unwrap()
    };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = listener.local_addr().unwrap();
    let socket = UdpSocket::bind(at).unwrap();
    thread::spawn(move || {
        let mut buffer = [0; 1500];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            socket.send_to(&answer(&buffer[..length]), from).unwrap();
        }
    });
    thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            let question = read_message(&mut stream);
            write_message(&mut stream, &answer(&question));
        }
    });
    at
}

fn write_message(stream: &mut TcpStream, message: &[u8]) {
    let length = u16::try_from(message.len()).unwrap().to_be_bytes();
    stream.write_all(&[&length[..], message].concat()).unwrap();
}

fn read_message(stream: &mut TcpStream) -> Vec<u8> {
    let mut length = [0; 2];
    stream.read_exact(&mut length).unwrap();
    let mut message = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut message).unwrap();
    message
}

/// Asks a server that is not there, as a guest does.
fn resolve(guest: &Guest, name: &str, by_tcp: bool) -> Result<Option<Ipv4Addr>, ResponseCode> {
    let mut question = Message::new(7, MessageType::Query, OpCode::Query);
    let name = Name::from_ascii(name).unwrap();
    question.add_query(Query::query(name, RecordType::A));
    let question = question.to_vec().unwrap();
    let answer = guest.run(|| {
        let server = SocketAddr::from(([192, 0, 2, 53], 53));
        if by_tcp {
            let mut stream = TcpStream::connect_timeout(&server, PATIENCE).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            write_message(&mut stream, &question);
            return read_message(&mut stream);
        }
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.send_to(&question, server).unwrap();
        let mut buffer = vec![0; 1500];
        let (length, from) = socket.recv_from(&mut buffer).unwrap();
        assert_eq!(from, server, "it comes from whom was asked");
        buffer.truncate(length);
        buffer
    });
    let answer = Message::from_vec(&answer).unwrap();
    if answer.metadata.response_code != ResponseCode::NoError {
        return Err(answer.metadata.response_code);
    }
    Ok(answer.answers.iter().find_map(|record| match &record.data {
        RData::A(address) => Some(address.0),
        _ => None,
    }))
}

#[tokio::test(flavor = "multi_thread")]
async fn names_open_what_they_mean_and_nothing_else() {
    let mut node = Node::new(|_| {});
    let outside = Outside::new(&node.pool);
    let [first, second, _] = outside.addresses;
    node.config.name_servers = vec![name_server(first)];
    node.restart(&[]);
    let closed = rules(false, &["*.allowed.test"], &[]);
    let slot = node.pool.take(&closed).await.unwrap();
    let guest = Guest::new(&node.pool, slot.index).await;
    let port = greet(&outside.namespace.0);

    assert!(
        !reaches(&guest, (first, port)),
        "not before it is asked for"
    );
    assert_eq!(
        resolve(&guest, "other.test.", false),
        Err(ResponseCode::NXDomain)
    );
    assert_eq!(
        resolve(&guest, "allowed.test.", false),
        Err(ResponseCode::NXDomain)
    );
    assert!(!reaches(&guest, (first, port)));
    assert_eq!(resolve(&guest, "a.allowed.test.", false), Ok(Some(first)));
    let mut open = connect(&guest, (first, port)).unwrap();
    assert!(is_greeted(&mut open));
    assert!(!reaches(&guest, (second, port)));
    // Asked for again, it is open still.
    assert_eq!(resolve(&guest, "b.allowed.test.", false), Ok(Some(first)));
    assert!(reaches(&guest, (first, port)));

    // The rules of an adopted slot hold before and after they are applied again.
    node.restart(&[slot.index]);
    assert!(reaches(&guest, (first, port)));
    node.pool.apply(slot.index, &closed).await.unwrap();
    assert!(reaches(&guest, (first, port)));
    assert_eq!(resolve(&guest, "c.allowed.test.", false), Ok(Some(first)));

    // A rule that is gone takes with it what it had opened.
    let other = rules(false, &["*.elsewhere.test"], &[]);
    node.pool.apply(slot.index, &other).await.unwrap();
    assert!(!reaches(&guest, (first, port)));
    assert!(is_cut(&mut open));
    assert_eq!(
        resolve(&guest, "a.allowed.test.", false),
        Err(ResponseCode::NXDomain)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn denied_names_are_not_resolved_and_allowed_ones_go_before_networks() {
    let mut node = Node::new(|_| {});
    let outside = Outside::new(&node.pool);
    let [first, second, _] = outside.addresses;
    node.config.name_servers = vec![name_server(first)];
    node.restart(&[]);
    let slot = node
        .pool
        .take(&rules(
            true,
            &["ok.bad.test"],
            &["*.bad.test", "198.18.0.0/15"],
        ))
        .await
        .unwrap();
    let guest = Guest::new(&node.pool, slot.index).await;
    let port = greet(&outside.namespace.0);
    assert_eq!(
        resolve(&guest, "x.bad.test.", false),
        Err(ResponseCode::NXDomain)
    );
    assert_eq!(
        resolve(&guest, "other.test.", false),
        Ok(Some(first)),
        "the rest is as internet says"
    );
    assert!(!reaches(&guest, (first, port)), "a denied network");
    assert_eq!(resolve(&guest, "ok.bad.test.", false), Ok(Some(first)));
    assert!(reaches(&guest, (first, port)), "allow goes before deny");
    assert!(!reaches(&guest, (second, port)));
    assert_eq!(resolve(&guest, "other.test.", true), Ok(Some(first)));
    assert_eq!(
        resolve(&guest, "x.bad.test.", true),
        Err(ResponseCode::NXDomain)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn no_name_opens_what_is_closed_to_all() {
    let mut node = Node::new(|_| {});
    node.config.name_servers = vec![name_server(METADATA)];
    node.restart(&[]);
    let slot = node
        .pool
        .take(&rules(true, &["rebind.test"], &[]))
        .await
        .unwrap();
    let guest = Guest::new(&node.pool, slot.index).await;
    assert_eq!(resolve(&guest, "rebind.test.", false), Ok(Some(METADATA)));
    let before = node.pool.traffic(slot.index).await.unwrap().sent;
    assert!(connect(&guest, (METADATA, 80)).is_err());
    assert_eq!(node.pool.traffic(slot.index).await.unwrap().sent, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_questions_stays_in_its_slot() {
    const AT_ONCE: usize = 32;
    let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
    silent.set_read_timeout(Some(PATIENCE)).unwrap();
    let at = silent.local_addr().unwrap();
    let node = Node::new(|config| config.name_servers = vec![at]);
    let slot = node.open().await;
    let guest = Guest::new(&node.pool, slot.index).await;
    // Once, so that the way is open.
    assert_eq!(
        resolve(&guest, "first.test.", false),
        Err(ResponseCode::ServFail)
    );
    silent.recv(&mut [0; 1500]).unwrap();
    guest.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        for id in 0..300 {
            let mut question = Message::new(id, MessageType::Query, OpCode::Query);
            let name = Name::from_ascii(format!("n{id}.test.")).unwrap();
            question.add_query(Query::query(name, RecordType::A));
            let question = question.to_vec().unwrap();
            socket.send_to(&question, "192.0.2.53:53").unwrap();
        }
    });
    for _ in 0..AT_ONCE {
        silent.recv(&mut [0; 1500]).unwrap();
    }
    // Another slot is answered meanwhile.
    let other = node
        .pool
        .take(&rules(false, &["a.test"], &[]))
        .await
        .unwrap();
    let neighbour = Guest::new(&node.pool, other.index).await;
    assert_eq!(
        resolve(&neighbour, "b.test.", false),
        Err(ResponseCode::NXDomain)
    );
    UdpSocket::bind("127.0.0.1:0")
        .unwrap()
        .send_to(b"end", at)
        .unwrap();
    let mut next = [0; 1500];
    let length = silent.recv(&mut next).unwrap();
    assert_eq!(&next[..length], b"end", "no more than {AT_ONCE} at once");
}

/// Sends so many bytes from one place to another and says how long the last of them took.
fn transfer(bytes: usize, from: TcpStream, mut to: TcpStream) -> Duration {
    let begun = Instant::now();
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut from = from;
            from.write_all(&vec![7; bytes]).unwrap();
        });
        to.set_read_timeout(Some(PATIENCE)).unwrap();
        to.read_exact(&mut vec![0; bytes]).unwrap();
    });
    begun.elapsed()
}

#[tokio::test(flavor = "multi_thread")]
async fn limited_slots_move_about_their_rate_and_count_what_they_move() {
    const RATE: u64 = 1 << 20;
    const BYTES: usize = 3 << 20;
    let node = Node::new(|_| {});
    let outside = Outside::new(&node.pool);
    let slot = node.open().await;
    let guest = Guest::new(&node.pool, slot.index).await;
    let listener = inside(&outside.namespace.0, || {
        TcpListener::bind("0.0.0.0:0").unwrap()
    });
    let port = listener.local_addr().unwrap().port();
    let pair = || {
        let near = connect(&guest, (outside.addresses[0], port)).unwrap();
        (near, listener.accept().unwrap().0)
    };
    let limited = |egress, ingress| NetworkRules {
        egress_bytes_per_second: egress,
        ingress_bytes_per_second: ingress,
        ..NetworkRules::internet(true)
    };
    assert_eq!(
        node.pool.traffic(slot.index).await.unwrap(),
        Traffic {
            received: 0,
            sent: 0
        }
    );

    let expected = BYTES as f64 / RATE as f64;
    for (egress, ingress) in [(RATE, 0), (0, RATE)] {
        node.pool
            .apply(slot.index, &limited(egress, ingress))
            .await
            .unwrap();
        let (near, far) = pair();
        let before = node.pool.traffic(slot.index).await.unwrap();
        let took = if egress > 0 {
            transfer(BYTES, near, far)
        } else {
            transfer(BYTES, far, near)
        };
        let ratio = took.as_secs_f64() / expected;
        assert!(
            (0.7..3.0).contains(&ratio),
            "{egress} {ingress}: {ratio:.2} of the time"
        );
        let after = node.pool.traffic(slot.index).await.unwrap();
        let moved = if egress > 0 {
            after.sent - before.sent
        } else {
            after.received - before.received
        };
        assert!(
            (BYTES as u64..2 * BYTES as u64).contains(&moved),
            "{moved} bytes counted"
        );
        // The other way is not limited.
        let (near, far) = pair();
        let took = if egress > 0 {
            transfer(BYTES, far, near)
        } else {
            transfer(BYTES, near, far)
        };
        assert!(took.as_secs_f64() < expected * 0.7, "{took:?}");
    }
    node.pool.apply(slot.index, &limited(0, 0)).await.unwrap();
    let (near, far) = pair();
    assert!(
        transfer(BYTES, near, far).as_secs_f64() < expected * 0.7,
        "no limit any more"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_node_adopts_what_it_is_to_keep_and_removes_the_rest() {
    let mut node = Node::new(|config| config.capacity = 3);
    let blocks = node.pool.blocks();
    let (kept, lost) = (node.open().await, node.open().await);
    let guest = Guest::new(&node.pool, kept.index).await;
    let near = greet(&guest.namespace.0);
    let mut stream = TcpStream::connect_timeout(&(kept.reach, near).into(), PATIENCE).unwrap();
    assert!(is_greeted(&mut stream));

    node.restart(&[kept.index]);
    assert_eq!(node.pool.blocks(), blocks);
    assert!(!lost.index.namespace_path().exists());
    let mut again = TcpStream::connect_timeout(&(kept.reach, near).into(), PATIENCE).unwrap();
    assert!(is_greeted(&mut again));
    // It counts as taken, until it is given back.
    let mut taken = Vec::new();
    for _ in 0..2 {
        taken.push(node.open().await);
    }
    assert!(taken.iter().all(|slot| slot.index != kept.index));
    let full = node.pool.take(&NetworkRules::internet(true)).await;
    assert!(
        matches!(full, Err(SlotError::NoSlot { capacity: 3 })),
        "{full:?}"
    );
    node.pool.give_back(kept.index).await;
    assert!(!kept.index.namespace_path().exists());
    assert!(node.pool.take(&NetworkRules::internet(true)).await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_is_given_back_comes_back_clean() {
    let node = Node::new(|config| config.capacity = 1);
    let limited = NetworkRules {
        egress_bytes_per_second: 4096,
        ..rules(
            true,
            &["203.0.113.0/24", "*.example.com"],
            &["198.51.100.0/24"],
        )
    };
    let first = node.pool.take(&limited).await.unwrap();
    node.pool.give_back(first.index).await;
    let again = node.open().await;
    assert_eq!(first.index, again.index);
    let namespace = again.index.namespace();
    let rules = printed(
        "ip",
        &format!("netns exec {namespace} nft list table inet slot"),
    );
    assert!(
        !rules.contains("203.0.113") && !rules.contains("198.51.100"),
        "{rules}"
    );
    let shaped = printed("tc", &format!("-n {namespace} qdisc"));
    assert!(!shaped.contains("tbf"), "{shaped}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_on_one_host_never_meet_and_grow_and_shrink() {
    let mut big = Node::new(|config| config.capacity = 150);
    let small = Node::new(|_| {});
    let before = big.pool.blocks();
    assert_eq!(before.len(), 3);
    assert!(
        small
            .pool
            .blocks()
            .iter()
            .all(|block| !before.contains(block))
    );
    big.config.capacity = 10;
    big.restart(&[]);
    assert_eq!(big.pool.blocks(), before[..1]);
    assert!(leftovers(&before[1..]).unwrap().is_empty());
    big.config.capacity = 100;
    big.restart(&[]);
    // Others on this host may have left a lower one since.
    let grown = big.pool.blocks();
    assert!(grown.len() == 2 && grown.contains(&before[0]), "{grown:?}");
    let too_many = SlotConfig {
        capacity: 1_000_000,
        ..big.config.clone()
    };
    let refused = SlotPool::open(&too_many, &BTreeSet::new());
    assert!(matches!(refused, Err(SlotError::Capacity { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_of_another_node_cannot_be_kept() {
    let (one, other) = (Node::new(|_| {}), Node::new(|_| {}));
    let slot = other.open().await;
    let blocks = one.pool.blocks();
    let refused = SlotPool::open(&one.config, &BTreeSet::from([slot.index]));
    assert!(
        matches!(refused, Err(SlotError::NotOurs { .. })),
        "{refused:?}"
    );
    assert!(slot.index.namespace_path().exists());
    assert_eq!(one.pool.blocks(), blocks);
}
