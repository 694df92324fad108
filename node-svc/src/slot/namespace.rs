//! Network namespaces of slots: made, wired and removed through netlink, on threads that enter them.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    net::Ipv4Addr,
    os::fd::AsRawFd as _,
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use nix::{
    errno::Errno,
    libc,
    mount::{MntFlags, MsFlags, mount, umount2},
    net::if_::if_nametoindex,
    sched::{CloneFlags, setns, unshare},
    sys::socket::SockProtocol,
};
use rtnetlink::{
    AddressMessageBuilder, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder,
    packet_core::{DefaultNla, Parseable as _},
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        link::{
            AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoVeth, LinkAttribute,
            LinkMessage,
        },
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    },
};

use super::{
    SlotError, SlotIndex, TAP, Traffic, block,
    firewall::Model,
    netlink::{Attributes, CREATE, EXCLUSIVE, Message, Netlink},
    tap,
};

const NAMESPACES: &str = "/run/netns";
const LINKS: &str = "/sys/class/net";
const LOOPBACK: u32 = 1;
/// Index of `eth0` in a slot; far from those the kernel gives.
pub(super) const ETH: u32 = 1_000_000;
/// Index of the first slot's link on the host; the others follow.
const HOST_LINKS: u32 = 1_000_000;
/// The group of links that are about to be deleted, all at once.
const DYING: u32 = 0x0073_6d68;
/// Threads that remove namespaces at once: each waits for the kernel most of the time.
const REMOVERS: usize = 16;

fn system(step: &'static str) -> impl Fn(Errno) -> SlotError {
    move |error| SlotError::system(step)(error.into())
}

/// Runs work on a thread of its own, which may change its namespace and then ends.
pub(super) fn on_own_thread<T: Send>(
    work: impl FnOnce() -> Result<T, SlotError> + Send,
) -> Result<T, SlotError> {
    thread::scope(|scope| {
        let thread = thread::Builder::new()
            .name("slot".into())
            .spawn_scoped(scope, work)
            .map_err(SlotError::system("thread"))?;
        thread.join().map_err(|_| SlotError::System {
            step: "thread",
            cause: "it panicked".into(),
        })?
    })
}

/// Makes a slot. Blocking.
pub(super) fn make(index: SlotIndex, model: &Model) -> Result<(), SlotError> {
    let made = on_own_thread(|| make_inside(index, model)).and_then(|()| make_outside(index));
    if made.is_err() {
        // What there is of it would be in the way of the next try.
        if let Err(error) = remove(&[index]) {
            tracing::warn!(%error, slot = index.0, "a network slot is left half made");
        }
    }
    made
}

fn make_inside(index: SlotIndex, model: &Model) -> Result<(), SlotError> {
    let host =
        File::open("/proc/thread-self/ns/net").map_err(SlotError::system("host namespace"))?;
    let path = index.namespace_path();
    File::create(&path).map_err(SlotError::system("namespace file"))?;
    unshare(CloneFlags::CLONE_NEWNET).map_err(system("unshare"))?;
    mount(
        Some("/proc/thread-self/ns/net"),
        &path,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .map_err(system("mount namespace"))?;
    tap::make(TAP).map_err(SlotError::system("tap"))?;
    model.lay()?;
    let tap = if_nametoindex(TAP).map_err(system("tap"))?;
    let has_ipv6 = Path::new("/proc/net/if_inet6").exists();
    send(&mut route_socket()?, &inside(index, tap, &host, has_ipv6))
}

fn route_socket() -> Result<Netlink, SlotError> {
    Netlink::open(SockProtocol::NetlinkRoute).map_err(SlotError::system("netlink"))
}

/// Has the folder of namespaces be a shared mount, as ip-netns(8) does: what is unmounted here is then gone from the mount namespaces of
/// others too, and `ip netns` does not mount a second folder over slots that are there. Blocking.
pub(super) fn share() -> Result<(), SlotError> {
    let failed = || system("share the folder of namespaces");
    fs::create_dir_all(NAMESPACES).map_err(SlotError::system("namespace folder"))?;
    let _lock = block::one_at_a_time()?;
    let change = |source, flags| mount(source, NAMESPACES, None::<&str>, flags, None::<&str>);
    let shared = MsFlags::MS_SHARED | MsFlags::MS_REC;
    match change(None, shared) {
        // It is no mount yet.
        Err(Errno::EINVAL) => {}
        other => return other.map_err(failed()),
    }
    change(Some(NAMESPACES), MsFlags::MS_BIND | MsFlags::MS_REC).map_err(failed())?;
    change(None, shared).map_err(failed())
}

/// A message, and what it is for.
type Step = (&'static str, Message);

fn send(socket: &mut Netlink, steps: &[Step]) -> Result<(), SlotError> {
    let messages: Vec<Message> = steps.iter().map(|(_, message)| message.clone()).collect();
    socket.send_all(&messages).map_err(|(place, error)| {
        let step = steps.get(place).map_or("netlink", |(step, _)| step);
        SlotError::system(step)(error)
    })
}

fn add(message: RouteNetlinkMessage) -> Message {
    Message::route(&message, CREATE | EXCLUSIVE)
}

/// Has a link forward, and, where there is IPv6, take no address of it when it comes up. By netlink, not by writing to /proc/sys, since
/// the kernel looks for a file there among those of all namespaces: with 4,000 that takes longer than all else together.
fn prepare(link: u32, has_ipv6: bool) -> Message {
    // linux/if_link.h and linux/ip.h
    const INET_CONF: u16 = 1;
    const FORWARDING: u16 = 1;
    const NESTED: u16 = 0x8000;
    let forwarding = Attributes::default().put(FORWARDING, &1_u32.to_ne_bytes());
    let inet = Attributes::default().nest(INET_CONF, &forwarding);
    let mut families = vec![AfSpecUnspec::Other(DefaultNla::new(
        libc::AF_INET as u16 | NESTED,
        inet.bytes().to_vec(),
    ))];
    if has_ipv6 {
        let none = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
        families.push(AfSpecUnspec::Inet6(vec![none]));
    }
    let link = LinkUnspec::new_with_index(link)
        .append_extra_attribute(LinkAttribute::AfSpecUnspec(families))
        .build();
    Message::route(&RouteNetlinkMessage::SetLink(link), 0)
}

fn up(link: u32) -> Message {
    let link = LinkUnspec::new_with_index(link).up().build();
    Message::route(&RouteNetlinkMessage::SetLink(link), 0)
}

fn address(link: u32, address: Ipv4Addr, prefix: u8) -> Message {
    add(RouteNetlinkMessage::NewAddress(
        AddressMessageBuilder::<Ipv4Addr>::new()
            .index(link)
            .address(address, prefix)
            .build(),
    ))
}

/// What a slot has inside.
fn inside(index: SlotIndex, tap: u32, host: &File, has_ipv6: bool) -> Vec<Step> {
    let mut peer = LinkMessage::default();
    peer.header.index = HOST_LINKS + index.0;
    peer.attributes = vec![
        LinkAttribute::IfName(index.host_link()),
        LinkAttribute::Address(hardware_address(HOST_SIDE, index)),
        LinkAttribute::NetNsFd(host.as_raw_fd()),
    ];
    let mut pair = LinkVeth::new("eth0", "")
        .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
        .address(hardware_address(SLOT_SIDE, index))
        .build();
    pair.header.index = ETH;
    let route = RouteMessageBuilder::<Ipv4Addr>::new()
        .gateway(index.host_address())
        .build();
    vec![
        ("veth", add(RouteNetlinkMessage::NewLink(pair))),
        ("eth0", prepare(ETH, has_ipv6)),
        ("tap", prepare(tap, has_ipv6)),
        ("loopback up", up(LOOPBACK)),
        ("slot address", address(ETH, index.slot_address(), 31)),
        ("gateway address", address(tap, super::GATEWAY_ADDRESS, 30)),
        ("eth0 up", up(ETH)),
        ("gateway's hardware address", hardware(tap)),
        ("tap up", up(tap)),
        (
            "guest's hardware address",
            neighbour(tap, super::GUEST, super::GUEST_MAC_BYTES.to_vec()),
        ),
        (
            "host's hardware address",
            neighbour(
                ETH,
                index.host_address(),
                hardware_address(HOST_SIDE, index),
            ),
        ),
        ("default route", add(RouteNetlinkMessage::NewRoute(route))),
    ]
}

/// The gateway looks the same in every slot: what a guest knows of it stays right when it is restored in another.
fn hardware(tap: u32) -> Message {
    let link = LinkUnspec::new_with_index(tap)
        .address(super::GATEWAY_MAC_BYTES.to_vec())
        .build();
    Message::route(&RouteNetlinkMessage::SetLink(link), 0)
}

/// Second byte of the hardware addresses of the two ends of a slot's pair.
const HOST_SIDE: u8 = 0xfd;
const SLOT_SIDE: u8 = 0xfe;

/// Locally administered, and computed like all else.
fn hardware_address(side: u8, index: SlotIndex) -> Vec<u8> {
    [&[2, side], index.0.to_be_bytes().as_slice()].concat()
}

/// Where somebody is, once and for all. Nothing that is said about it is believed, and nobody is asked: the kernel has one table for
/// what it learns in all namespaces, and by default that is full at 1,024.
fn neighbour(link: u32, address: Ipv4Addr, hardware: Vec<u8>) -> Message {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.ifindex = link;
    message.header.state = NeighbourState::Permanent;
    message.attributes = vec![
        NeighbourAttribute::Destination(NeighbourAddress::Inet(address)),
        NeighbourAttribute::LinkLayerAddress(hardware),
    ];
    add(RouteNetlinkMessage::NewNeighbour(message))
}

/// What a slot has on the host; for a thread that is in the host's namespace.
fn make_outside(index: SlotIndex) -> Result<(), SlotError> {
    // Without IPv6 altogether: its routes are looked through at every change of a link.
    let ipv6 = format!("/proc/sys/net/ipv6/conf/{}/disable_ipv6", index.host_link());
    match fs::write(ipv6, "1") {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(SlotError::system("ipv6 of the host link")(error));
        }
        _ => {}
    }
    let link = HOST_LINKS + index.0;
    let steps = [
        ("host address", address(link, index.host_address(), 31)),
        ("host link up", up(link)),
        (
            "slot's hardware address",
            neighbour(
                link,
                index.slot_address(),
                hardware_address(SLOT_SIDE, index),
            ),
        ),
    ];
    send(&mut route_socket()?, &steps)
}

/// Runs work inside a slot's namespace. Blocking.
pub(super) fn enter<T: Send>(
    index: SlotIndex,
    work: impl FnOnce() -> Result<T, SlotError> + Send,
) -> Result<T, SlotError> {
    enter_at(&index.namespace_path(), work)
}

/// Runs work inside the namespace that is mounted there. Blocking.
pub(super) fn enter_at<T: Send>(
    namespace: &Path,
    work: impl FnOnce() -> Result<T, SlotError> + Send,
) -> Result<T, SlotError> {
    on_own_thread(|| {
        let namespace = File::open(namespace).map_err(SlotError::system("open namespace"))?;
        setns(namespace, CloneFlags::CLONE_NEWNET).map_err(system("setns"))?;
        work()
    })
}

/// Removes slots; what is not there is removed already. Afterwards their names are free. Blocking.
pub(super) fn remove(slots: &[SlotIndex]) -> Result<(), SlotError> {
    remove_links(slots)?;
    let next = AtomicUsize::new(0);
    let remover = || {
        while let Some(index) = slots.get(next.fetch_add(1, Ordering::Relaxed)) {
            remove_namespace(*index)?;
        }
        Ok(())
    };
    if slots.len() == 1 {
        return remover();
    }
    thread::scope(|scope| {
        let removers: Vec<_> = (0..REMOVERS.min(slots.len()))
            .map(|_| scope.spawn(remover))
            .collect();
        removers.into_iter().try_for_each(|remover| {
            remover.join().map_err(|_| SlotError::System {
                step: "thread",
                cause: "it panicked".into(),
            })?
        })
    })
}

/// Deletes the host's ends, and with them the slots'. Many are deleted as a group: the kernel then waits once, not for each.
fn remove_links(slots: &[SlotIndex]) -> Result<(), SlotError> {
    let is_there = |index: &&SlotIndex| Path::new(LINKS).join(index.host_link()).exists();
    let links: Vec<&SlotIndex> = slots.iter().filter(is_there).collect();
    let failed = SlotError::system("delete links");
    let gone = |error: &io::Error| error.raw_os_error() == Some(libc::ENODEV);
    let mut socket = route_socket()?;
    let delete = |link| Message::route(&RouteNetlinkMessage::DelLink(link), 0);
    let last = match links.as_slice() {
        [] => return Ok(()),
        [index] => delete(LinkUnspec::new_with_name(&index.host_link()).build()),
        many => {
            let dying: Vec<Message> = many
                .iter()
                .map(|index| {
                    let link = LinkUnspec::new_with_name(&index.host_link())
                        .link_group(DYING)
                        .build();
                    Message::route(&RouteNetlinkMessage::SetLink(link), 0)
                })
                .collect();
            for result in socket.send_each(&dying).map_err(&failed)? {
                match result {
                    Err(error) if !gone(&error) => return Err(failed(error)),
                    _ => {}
                }
            }
            delete(
                LinkMessageBuilder::<LinkUnspec>::new()
                    .link_group(DYING)
                    .build(),
            )
        }
    };
    match socket.send_all(&[last]) {
        Err((_, error)) if !gone(&error) => Err(failed(error)),
        _ => Ok(()),
    }
}

fn remove_namespace(index: SlotIndex) -> Result<(), SlotError> {
    let path = index.namespace_path();
    match umount2(&path, MntFlags::MNT_DETACH) {
        // Not a mount: its maker died in between.
        Ok(()) | Err(Errno::EINVAL) => {}
        Err(Errno::ENOENT) => return Ok(()),
        Err(error) => return Err(system("unmount namespace")(error)),
    }
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(SlotError::system("remove namespace")(error))
        }
        _ => Ok(()),
    }
}

/// The slots of which there is anything on this host: a namespace or a link, of whomever.
pub(super) fn existing() -> Result<BTreeSet<SlotIndex>, SlotError> {
    let mut found = BTreeSet::new();
    for (folder, prefix) in [(NAMESPACES, "sandmesh-"), (LINKS, "smh")] {
        let entries = match fs::read_dir(folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            other => other.map_err(SlotError::system("list slots"))?,
        };
        for entry in entries {
            let name = entry.map_err(SlotError::system("list slots"))?.file_name();
            let number = name.to_str().and_then(|name| name.strip_prefix(prefix));
            found.extend(number.and_then(|number| number.parse().ok()).map(SlotIndex));
        }
    }
    Ok(found)
}

/// What went through a slot's link since it was made. Blocking, but not for long.
pub(super) fn traffic(index: SlotIndex) -> Result<Traffic, SlotError> {
    let failed = SlotError::system("traffic of the slot");
    let link = LinkUnspec::new_with_name(&index.host_link()).build();
    let answer = route_socket()?
        .get(&Message::route(&RouteNetlinkMessage::GetLink(link), 0))
        .map_err(&failed)?;
    let link = LinkMessage::parse(answer.body.as_slice())
        .map_err(|error| failed(io::Error::other(error)))?;
    let stats = link
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::Stats64(stats) => Some(stats),
            _ => None,
        });
    // What the host's end receives, the guest has sent.
    stats
        .map(|stats| Traffic {
            sent: stats.rx_bytes,
            received: stats.tx_bytes,
        })
        .ok_or_else(|| failed(io::ErrorKind::UnexpectedEof.into()))
}
