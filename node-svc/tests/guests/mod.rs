//! What stands in for guests: their side of a slot's tap, as raw frames or as a namespace with ordinary sockets, and an outside world
//! beyond the host.
#![allow(dead_code, unreachable_pub)] // each test file uses its part

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    net::Ipv4Addr,
    os::fd::{AsFd, OwnedFd},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sched::{CloneFlags, setns},
};
use node_svc::slot::{GATEWAY, GUEST_ADDRESS, GUEST_MAC, SlotIndex, SlotPool};

pub const GUEST: Ipv4Addr = Ipv4Addr::new(169, 254, 100, 2);
pub const GATEWAY_IP: Ipv4Addr = Ipv4Addr::new(169, 254, 100, 1);
pub const MAC: [u8; 6] = [2, 0xfc, 0, 0, 0, 1];
/// `struct virtio_net_hdr` before each frame.
const VIRTIO: usize = 10;
const PATIENCE: Duration = Duration::from_secs(20);

/// Runs a program of iproute2, which must succeed.
pub fn ip(arguments: &str) {
    let output = Command::new("ip")
        .args(arguments.split_whitespace())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "ip {arguments}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// What a program prints, which must succeed.
pub fn printed(program: &str, arguments: &str) -> String {
    let output = Command::new(program)
        .args(arguments.split_whitespace())
        .output()
        .unwrap();
    assert!(output.status.success(), "{program} {arguments}");
    String::from_utf8(output.stdout).unwrap()
}

/// Runs work on a thread in a namespace.
pub fn inside<T: Send>(namespace: &str, work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        scope
            .spawn(|| {
                let file = File::open(format!("/run/netns/{namespace}")).unwrap();
                setns(file, CloneFlags::CLONE_NEWNET).unwrap();
                work()
            })
            .join()
            .unwrap()
    })
}

/// A namespace that goes with its value.
pub struct Namespace(pub String);

impl Namespace {
    pub fn new(kind: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("smtest-{kind}-{}-{number}", std::process::id());
        ip(&format!("netns add {name}"));
        ip(&format!("-n {name} link set lo up"));
        Self(name)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

/// The world beyond the host: a namespace with some addresses, which the host is the router of.
pub struct Outside {
    pub namespace: Namespace,
    /// The host's address towards it.
    pub host: Ipv4Addr,
    pub addresses: [Ipv4Addr; 3],
    link: String,
}

impl Drop for Outside {
    fn drop(&mut self) {
        // Now, not when the kernel takes the namespace apart: the next test may use the same addresses.
        let _ = Command::new("ip")
            .args(["link", "del", &self.link])
            .status();
    }
}

impl Outside {
    /// One for each pool: its addresses follow from the pool's first block.
    pub fn new(pool: &SlotPool) -> Self {
        let block = u8::try_from(pool.blocks()[0] % 256).unwrap();
        let at = |last| Ipv4Addr::new(198, 18, block, last);
        let namespace = Namespace::new("outside");
        let name = &namespace.0;
        let link = format!("smt{}", pool.blocks()[0]);
        ip(&format!(
            "link add {link} type veth peer name eth0 netns {name}"
        ));
        ip(&format!("addr add {}/24 dev {link}", at(1)));
        ip(&format!("link set {link} up"));
        let addresses = [at(2), at(3), at(4)];
        for address in addresses {
            ip(&format!("-n {name} addr add {address}/24 dev eth0"));
        }
        ip(&format!("-n {name} link set eth0 up"));
        ip(&format!("-n {name} route add default via {}", at(1)));
        Self {
            host: at(1),
            addresses,
            namespace,
            link,
        }
    }
}

/// A slot's tap, as a guest's network card has it.
pub struct Card(OwnedFd);

impl Card {
    pub async fn of(pool: &SlotPool, index: SlotIndex) -> Self {
        Self(pool.open_tap(index).await.unwrap())
    }

    pub fn send(&self, frame: &[u8]) {
        let whole = [&[0; VIRTIO], frame].concat();
        let sent = nix::unistd::write(&self.0, &whole).unwrap();
        assert_eq!(sent, whole.len());
    }

    /// Asks for the gateway's hardware address until it is answered: the tap drops what it sends for the moment after it is opened.
    pub fn gateway(&self) -> [u8; 6] {
        for _ in 0..100 {
            self.send(&arp(MAC, 1, (MAC, GUEST), GATEWAY_IP));
            let is_arp = |frame: &[u8]| frame.get(12..14) == Some(&[8, 6]);
            if let Some(answer) = self.receive_within(Duration::from_millis(200), is_arp) {
                return answer[6..12].try_into().unwrap();
            }
        }
        panic!("the gateway does not answer");
    }

    /// The next frame that is wanted, within a while.
    pub fn receive(&self, is_wanted: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
        self.receive_within(PATIENCE, is_wanted)
    }

    fn receive_within(&self, time: Duration, is_wanted: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
        let limit = Instant::now() + time;
        let mut buffer = vec![0; 70_000];
        while let Some(rest) = limit.checked_duration_since(Instant::now()) {
            let mut waiting = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
            let rest = PollTimeout::try_from(rest).unwrap();
            if poll(&mut waiting, rest).unwrap() == 0 {
                return None;
            }
            let length = nix::unistd::read(&self.0, &mut buffer).unwrap();
            let frame = &buffer[VIRTIO..length];
            if is_wanted(frame) {
                return Some(frame.to_vec());
            }
        }
        None
    }
}

fn checksum(bytes: &[u8]) -> [u8; 2] {
    let mut sum = 0_u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

/// A frame with a UDP packet, from these addresses to these.
pub fn udp(
    from: ([u8; 6], Ipv4Addr),
    gateway: [u8; 6],
    to: (Ipv4Addr, u16),
    payload: &[u8],
) -> Vec<u8> {
    let length = 20 + 8 + payload.len() as u16;
    let mut ip = vec![0x45, 0];
    ip.extend(length.to_be_bytes());
    ip.extend([0, 1, 0, 0, 64, 17, 0, 0]);
    ip.extend(from.1.octets());
    ip.extend(to.0.octets());
    let sum = checksum(&ip);
    ip[10..12].copy_from_slice(&sum);
    let mut frame = [&gateway[..], &from.0, &[8, 0]].concat();
    frame.extend(ip);
    frame.extend(40_000_u16.to_be_bytes());
    frame.extend(to.1.to_be_bytes());
    frame.extend((8 + payload.len() as u16).to_be_bytes());
    frame.extend([0, 0]);
    frame.extend(payload);
    frame
}

/// An ARP message: 1 asks, 2 answers.
pub fn arp(
    ether: [u8; 6],
    operation: u8,
    sender: ([u8; 6], Ipv4Addr),
    target: Ipv4Addr,
) -> Vec<u8> {
    let mut frame = [
        &[0xff; 6][..],
        &ether,
        &[8, 6, 0, 1, 8, 0, 6, 4, 0, operation],
    ]
    .concat();
    frame.extend(sender.0);
    frame.extend(sender.1.octets());
    frame.extend([0; 6]);
    frame.extend(target.octets());
    frame
}

/// A guest: a namespace with a network card at the other end of a slot's tap.
pub struct Guest {
    pub namespace: Namespace,
}

impl Guest {
    pub async fn new(pool: &SlotPool, index: SlotIndex) -> Self {
        let namespace = Namespace::new("guest");
        let name = &namespace.0;
        ip(&format!("-n {name} tuntap add eth0 mode tap vnet_hdr"));
        ip(&format!("-n {name} link set eth0 address {GUEST_MAC}"));
        ip(&format!("-n {name} addr add {GUEST_ADDRESS} dev eth0"));
        let card = open_card(name);
        ip(&format!("-n {name} link set eth0 up"));
        ip(&format!("-n {name} route add default via {GATEWAY}"));
        let slot: OwnedFd = pool.open_tap(index).await.unwrap();
        let (slot, card) = (File::from(slot), File::from(card));
        let (to_slot, to_guest) = (slot.try_clone().unwrap(), card.try_clone().unwrap());
        // Both end when their namespaces do.
        thread::spawn(move || carry(card, to_slot));
        thread::spawn(move || carry(slot, to_guest));
        Self { namespace }
    }

    /// Runs work with the guest's network.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        inside(&self.namespace.0, work)
    }
}

fn carry(mut from: File, mut to: File) -> io::Result<()> {
    let mut buffer = vec![0; 70_000];
    loop {
        let length = from.read(&mut buffer)?;
        match to.write(&buffer[..length]) {
            // Full, or not up yet: a frame is lost, as on a wire.
            Err(error)
                if !matches!(
                    error.raw_os_error(),
                    Some(nix::libc::EIO | nix::libc::EAGAIN)
                ) =>
            {
                return Err(error);
            }
            _ => {}
        }
    }
}

#[allow(unsafe_code)] // ioctl
fn open_card(namespace: &str) -> OwnedFd {
    #[repr(C)]
    struct InterfaceRequest {
        name: [u8; 16],
        flags: i16,
        rest: [u8; 22],
    }
    nix::ioctl_write_ptr_bad!(
        set_interface,
        nix::request_code_write!(b'T', 202, size_of::<nix::libc::c_int>()),
        InterfaceRequest
    );
    inside(namespace, || {
        let tun = File::options()
            .read(true)
            .write(true)
            .open("/dev/net/tun")
            .unwrap();
        let mut request = InterfaceRequest {
            name: [0; 16],
            flags: 0x0002 | 0x1000 | 0x4000,
            rest: [0; 22],
        };
        request.name[..4].copy_from_slice(b"eth0");
        // SAFETY: the descriptor is open for the length of the call, and the request is whole.
        unsafe { set_interface(std::os::fd::AsRawFd::as_raw_fd(&tun), &raw const request) }
            .unwrap();
        tun.into()
    })
}
