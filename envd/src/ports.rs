//! Who listens: the kernel's TCP listeners ([`crate::sock_diag`]), with the process that has each. [`wait`] waits for one.
//!
//! That somebody closed a listener the kernel tells, to those who joined its groups. That somebody began to listen it tells nobody: a guest
//! that is to learn of it within 200 ms has to look, and looks every 100 ms, while anybody watches and only then. A look asks for listeners
//! alone, however many connections there are. It takes 0.3 ms of a CPU with ten listeners and 1.8 ms with a thousand (release build, two
//! virtual CPUs): 0.3 % and 2 % of one. Which process it is costs a walk over all descriptors of all processes, and is found out once for
//! each listener.
//!
//! One task looks for all who watch. They read its newest state and say what is different from what they said last: one that is slow makes no
//! queue. While the gate is closed nobody looks, for nobody runs.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{Arc, Weak},
    time::Duration,
};

use nix::libc;
use proto::envd::v1::{Listener, PortServiceWatchResponse};
use rtnetlink::sys::{
    AsyncSocket as _, AsyncSocketExt as _, SocketAddr, TokioSocket, protocols::NETLINK_SOCK_DIAG,
};
use tokio::sync::{Mutex, watch};

use crate::{
    identity::Guest,
    logs,
    sock_diag::{self, Answer, ID_IN_MESSAGE},
};

pub(crate) mod wait;

/// Half of what is promised, for the other half is the machine's to waste.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// `TCP_LISTEN` of `enum tcp_state`, as a bit.
const LISTEN: u32 = 1 << 10;
/// `SKNLGRP_INET_TCP_DESTROY` and `SKNLGRP_INET6_TCP_DESTROY` (linux/sock_diag.h).
const DESTROYED: [u32; 2] = [1, 3];

/// Those who listen. What the kernel calls the cookie is a socket's own for as long as the guest runs.
pub(crate) type Listeners = BTreeMap<Key, Listener>;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Key {
    port: u16,
    cookie: u64,
}

/// A listening socket as the kernel tells of it.
#[derive(Debug, PartialEq, Eq)]
struct Socket {
    key: Key,
    address: IpAddr,
    inode: u32,
}

impl Socket {
    /// From a `struct inet_diag_msg`: family, 3 bytes, then in the ID both ports, both addresses, interface and cookie; then five
    /// words, of which the last is the inode.
    fn parse(message: &[u8]) -> Option<Self> {
        let family = i32::from(*message.first()?);
        let (port, rest) = message.get(ID_IN_MESSAGE..)?.split_first_chunk::<2>()?;
        let address = rest.get(2..)?.first_chunk::<16>()?;
        let address = if family == libc::AF_INET {
            let [a, b, c, d, ..] = *address;
            Ipv4Addr::new(a, b, c, d).into()
        } else {
            Ipv6Addr::from(*address).into()
        };
        let (cookie, rest) = rest.get(2 + 16 + 16 + 4..)?.split_first_chunk::<8>()?;
        let inode = rest.get(16..)?.first_chunk::<4>()?;
        Some(Self {
            key: Key {
                port: u16::from_be_bytes(*port),
                cookie: u64::from_ne_bytes(*cookie),
            },
            address,
            inode: u32::from_ne_bytes(*inode),
        })
    }
}

/// All TCP listeners. Of those there were before, the process is not looked for again.
pub(crate) async fn look(before: &Listeners) -> Result<Listeners, String> {
    let found = listening()?;
    let is_new = |socket: &&Socket| !before.contains_key(&socket.key);
    let new: HashSet<u32> = found.iter().filter(is_new).map(|new| new.inode).collect();
    let owners = if new.is_empty() {
        HashMap::new()
    } else {
        let looking = tokio::task::spawn_blocking(|| owners(new));
        looking.await.map_err(|error| error.to_string())?
    };
    let listener = |socket: Socket| {
        let known = before.get(&socket.key).cloned();
        let listener = known.unwrap_or_else(|| {
            let (pid, command) = owners.get(&socket.inode).cloned().unwrap_or_default();
            Listener {
                address: socket.address.to_string(),
                port: socket.key.port.into(),
                pid,
                command,
            }
        });
        (socket.key, listener)
    };
    Ok(found.into_iter().map(listener).collect())
}

/// Asks the kernel, which answers at once: another thread would take longer to wake.
fn listening() -> Result<Vec<Socket>, String> {
    let socket = sock_diag::open()?;
    let mut found = Vec::new();
    for family in sock_diag::FAMILIES {
        found.extend(sock_diag::dump(&socket, family, LISTEN, Socket::parse)?);
    }
    Ok(found)
}

/// The processes of these sockets, by inode: a walk over every process' descriptors that ends when all are found.
fn owners(mut wanted: HashSet<u32>) -> HashMap<u32, (u32, String)> {
    let mut owners = HashMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        if wanted.is_empty() {
            break;
        }
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let descriptors = fs::read_dir(entry.path().join("fd"));
        for descriptor in descriptors.into_iter().flatten().flatten() {
            let target = fs::read_link(descriptor.path()).unwrap_or_default();
            let inode = target.to_str().and_then(|text| {
                text.strip_prefix("socket:[")?
                    .strip_suffix(']')?
                    .parse()
                    .ok()
            });
            if let Some(inode) = inode.filter(|inode| wanted.remove(inode)) {
                let command = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
                owners.insert(inode, (pid, command.trim().to_owned()));
            }
        }
    }
    owners
}

/// What is to be said to somebody who knew these; nothing if there is nothing new.
pub(crate) fn difference(before: &Listeners, now: &Listeners) -> Option<PortServiceWatchResponse> {
    let only_in = |some: &Listeners, others: &Listeners| {
        let only = some.iter().filter(|(key, _)| !others.contains_key(key));
        only.map(|(_, listener)| listener.clone()).collect()
    };
    let changes = PortServiceWatchResponse {
        opened: only_in(now, before),
        closed: only_in(before, now),
    };
    (!changes.opened.is_empty() || !changes.closed.is_empty()).then_some(changes)
}

/// Looks for all who watch. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Ports {
    guest: Arc<Guest>,
    /// What the task that looks tells, if there is one: only the task holds it.
    looking: Arc<Mutex<Weak<watch::Sender<Arc<Listeners>>>>>,
}

impl Ports {
    pub(crate) fn new(guest: Arc<Guest>) -> Self {
        Self {
            guest,
            looking: Arc::default(),
        }
    }

    /// Who listens, now and from now on. If nobody else watches, this begins the looking, and whoever lets go last ends it.
    pub(crate) async fn watch(&self) -> Result<watch::Receiver<Arc<Listeners>>, String> {
        // Held over the first look, so that two who come at once share it.
        let mut looking = self.looking.lock().await;
        if let Some(state) = looking.upgrade() {
            return Ok(state.subscribe());
        }
        // Before the look: what closes after it is heard of.
        let closings = Closings::new();
        let first = look(&Listeners::new()).await?;
        let (state, receiver) = watch::channel(Arc::new(first));
        let state = Arc::new(state);
        *looking = Arc::downgrade(&state);
        tokio::spawn(self.clone().keep_looking(state, closings));
        Ok(receiver)
    }

    /// Returns when one of these may be gone and the gate is open.
    async fn closed_and_open(&self, closings: &mut Closings, listeners: &Listeners) {
        closings.one_of(listeners).await;
        self.guest.gate.sleep(Duration::ZERO).await;
    }

    async fn keep_looking(self, state: Arc<watch::Sender<Arc<Listeners>>>, mut closings: Closings) {
        loop {
            let before = Arc::clone(&state.borrow());
            tokio::select! {
                () = state.closed() => {
                    let mut looking = self.looking.lock().await;
                    // Nobody comes while this is held.
                    if state.is_closed() {
                        *looking = Weak::new();
                        return;
                    }
                }
                () = self.guest.gate.sleep(LOOK_AGAIN) => {}
                () = self.closed_and_open(&mut closings, &before) => {}
            }
            match look(&before).await {
                Ok(now) => {
                    state.send_if_modified(|state| {
                        let is_news = now != **state;
                        if is_news {
                            *state = Arc::new(now);
                        }
                        is_news
                    });
                }
                // Those who watch learn it by the end of what they read.
                Err(error) => {
                    logs::warn(format_args!("who listens cannot be seen: {error}"));
                    *self.looking.lock().await = Weak::new();
                    return;
                }
            }
        }
    }
}

/// What the kernel tells of sockets that are gone, connections included; a kernel that does not tell is only looked at later.
struct Closings(Option<TokioSocket>);

impl Closings {
    fn new() -> Self {
        let open = || {
            let mut socket = TokioSocket::new(NETLINK_SOCK_DIAG)?;
            socket.socket_mut().bind(&SocketAddr::new(0, 0))?;
            for group in DESTROYED {
                socket.socket_ref().add_membership(group)?;
            }
            Ok::<_, std::io::Error>(socket)
        };
        Self(open().ok())
    }

    /// Returns when one of these may be gone.
    async fn one_of(&mut self, listeners: &Listeners) {
        while let Some(socket) = &self.0 {
            match socket.recv_from_full().await {
                Ok((datagram, _)) => {
                    let is_one = |answer| match answer {
                        // Its port may be no longer there.
                        Answer::Message(message) => Socket::parse(message).is_some_and(|gone| {
                            let mut cookies = listeners.keys().map(|key| key.cookie);
                            cookies.any(|cookie| cookie == gone.key.cookie)
                        }),
                        Answer::Done | Answer::Result(_) => false,
                    };
                    if sock_diag::answers(&datagram).into_iter().any(is_one) {
                        return;
                    }
                }
                // More came than there was room for; any of it may have been one.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => return,
                Err(_) => self.0 = None,
            }
        }
        std::future::pending::<()>().await;
    }
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, time::Instant};

    use super::*;
    use crate::network::tests::in_own_network;

    const LIMIT: Duration = Duration::from_mins(1);

    fn ports() -> Ports {
        let guest = Arc::new(Guest::for_tests());
        guest.gate.open();
        Ports::new(guest)
    }

    fn listen(address: &str) -> (TcpListener, u16) {
        let listener = TcpListener::bind((address, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        (listener, port)
    }

    async fn next(state: &mut watch::Receiver<Arc<Listeners>>) -> Vec<u32> {
        tokio::time::timeout(LIMIT, state.changed())
            .await
            .unwrap()
            .unwrap();
        let now = state.borrow_and_update();
        now.values().map(|listener| listener.port).collect()
    }

    #[test]
    fn a_message_of_the_kernel_is_read_and_one_cut_short_is_not() {
        let mut message = vec![0; 72];
        message[0] = 10;
        message[4..6].copy_from_slice(&8080_u16.to_be_bytes());
        message[8..24].copy_from_slice(&Ipv6Addr::LOCALHOST.octets());
        message[44..52].copy_from_slice(&77_u64.to_ne_bytes());
        message[68..72].copy_from_slice(&4242_u32.to_ne_bytes());
        let socket = Socket::parse(&message).unwrap();
        let key = Key {
            port: 8080,
            cookie: 77,
        };
        assert_eq!((socket.key, socket.inode), (key, 4242));
        assert_eq!(socket.address, Ipv6Addr::LOCALHOST);
        message[0] = 2;
        message[8..12].copy_from_slice(&[127, 0, 0, 1]);
        assert_eq!(
            Socket::parse(&message).unwrap().address,
            Ipv4Addr::LOCALHOST
        );
        for length in 0..72 {
            assert_eq!(Socket::parse(&message[..length]), None);
        }
    }

    #[test]
    fn listeners_are_seen_with_their_process_and_nothing_else_is() {
        in_own_network(async |_| {
            let (listener, port) = listen("127.0.0.1");
            let (_six, six) = listen("::1");
            let _connection = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
            let _accepted = listener.accept().unwrap();
            let found = look(&Listeners::new()).await.unwrap();
            let mut found: Vec<_> = found.into_values().collect();
            found.sort_by(|a, b| a.address.cmp(&b.address));
            let command = fs::read_to_string("/proc/self/comm").unwrap();
            let expected = [("127.0.0.1", port), ("::1", six)].map(|(address, port)| Listener {
                address: address.into(),
                port: port.into(),
                pid: std::process::id(),
                command: command.trim().into(),
            });
            assert_eq!(found, expected);
        });
    }

    #[test]
    fn a_process_is_looked_for_once() {
        in_own_network(async |_| {
            let (_listener, _) = listen("127.0.0.1");
            let mut known = look(&Listeners::new()).await.unwrap();
            for listener in known.values_mut() {
                listener.command = "remembered".into();
            }
            assert_eq!(look(&known).await.unwrap(), known);
        });
    }

    #[test]
    fn a_close_is_told_by_the_kernel_and_not_by_the_clock() {
        in_own_network(async |_| {
            let (listener, _) = listen("127.0.0.1");
            let (six, _) = listen("::1");
            let known = look(&Listeners::new()).await.unwrap();
            let mut closings = Closings::new();
            assert!(closings.0.is_some());
            // A connection that ends is none of it.
            let connection = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            drop((listener.accept().unwrap(), connection));
            for closed in [listener, six] {
                {
                    let mut wait = std::pin::pin!(closings.one_of(&known));
                    assert!(futures::poll!(&mut wait).is_pending());
                    drop(closed);
                    tokio::time::timeout(LIMIT, wait).await.unwrap();
                }
            }
        });
    }

    #[test]
    fn one_task_looks_for_all_and_none_when_nobody_watches() {
        in_own_network(async |_| {
            let ports = ports();
            let alive = |ports: &Ports| {
                let looking = Arc::clone(&ports.looking);
                async move { looking.lock().await.strong_count() }
            };
            let (_first, port) = listen("127.0.0.1");
            let mut one = ports.watch().await.unwrap();
            let mut two = ports.watch().await.unwrap();
            assert_eq!(alive(&ports).await, 1);
            assert_eq!(two.borrow_and_update().len(), 1);
            let (_second, other) = listen("127.0.0.1");
            let mut both = vec![u32::from(port), u32::from(other)];
            both.sort_unstable();
            assert_eq!(next(&mut one).await, both);
            assert_eq!(next(&mut two).await, both);
            drop((one, two));
            let limit = Instant::now() + LIMIT;
            while alive(&ports).await > 0 {
                assert!(Instant::now() < limit, "it looks on");
                tokio::task::yield_now().await;
            }
            // And again, from what is so then.
            assert_eq!(ports.watch().await.unwrap().borrow().len(), 2);
        });
    }

    #[test]
    fn nobody_looks_while_the_gate_is_closed() {
        in_own_network(async |_| {
            let ports = ports();
            let (goes, _) = listen("127.0.0.1");
            let mut state = ports.watch().await.unwrap();
            ports.guest.gate.close();
            drop(goes);
            let (_listener, port) = listen("127.0.0.1");
            let looked = tokio::time::timeout(LOOK_AGAIN * 5, state.changed()).await;
            assert!(looked.is_err());
            ports.guest.gate.open();
            assert_eq!(next(&mut state).await, [u32::from(port)]);
        });
    }

    #[test]
    fn a_difference_is_net() {
        let listeners = |ports: &[u16]| -> Listeners {
            let entry = |port: &u16| {
                let key = Key {
                    port: *port,
                    cookie: u64::from(*port),
                };
                let listener = Listener {
                    port: u32::from(*port),
                    ..Listener::default()
                };
                (key, listener)
            };
            ports.iter().map(entry).collect()
        };
        let changes = difference(&listeners(&[1, 2]), &listeners(&[2, 3, 4])).unwrap();
        let ports = |some: &[Listener]| some.iter().map(|one| one.port).collect::<Vec<_>>();
        assert_eq!(
            (ports(&changes.opened), ports(&changes.closed)),
            (vec![3, 4], vec![1])
        );
        assert_eq!(difference(&listeners(&[1]), &listeners(&[1])), None);
        // The same port, but another socket.
        let mut again = listeners(&[]);
        let key = Key { port: 1, cookie: 9 };
        again.insert(key, Listener::default());
        assert!(difference(&listeners(&[1]), &again).is_some());
    }
}
