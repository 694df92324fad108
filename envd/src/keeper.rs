//! The guest's init: starts the daemon, and starts it again if it dies, with all that is needed to go on.
//!
//! ```text
//!   init: keeper ----- socket ----- daemon ------ link ------ node
//!     ^  what is kept, ends  what is to be kept  |
//!     |                                          +-- processes, its children and orphans
//!     +-- its children once it has died: they go on, and are the next daemon's by what is kept
//! ```
//! The daemon gives the keeper a copy of every descriptor a process depends on before anything depends on it, and a word on what the
//! process is. So nothing a process has to do with ends with the daemon: its pipes and its terminal stay open, its output stays where it
//! is ([`crate::output`]), it is not signalled. The daemon collects its own children and, as their subreaper (prctl(2)), orphans; those of
//! one that died are the kernel's gift to init, which tells the next how they ended. How a child ended is kept before it is collected, so
//! it is known whatever dies.
//!
//! What the daemon says waits in the socket, until somebody waits for a descriptor to be closed, or there is much of it, or the daemon is dead: a
//! keeper that woke for every word would cost each process, however short, eight changes between the two.
//!
//! The keeper does nothing else, and nothing that waits: a guest whose init dies is at its end. It is one thread, and takes from the daemon,
//! which is the same program, without further questions. A daemon that cannot begin, or dies again and again, takes the guest with it.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::process::CommandExt as _,
    },
    path::PathBuf,
    process::{Child, Command},
    rc::Rc,
    thread,
    time::{Duration, Instant, SystemTime},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        prctl::set_child_subreaper,
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
        socket::MsgFlags,
    },
};
use prost::Message as _;

mod client;
#[allow(unsafe_code)] // descriptors that came with a packet
mod packet;

pub(crate) use client::{EndedWord, Item, Keeper, Kept};
pub(crate) use packet::Slot;

use crate::{
    Failure,
    spawn::{self, Ended},
};
use packet::{Kind, Packet};

/// One that was started so often in that time is not started again.
const MOST_STARTS: usize = 10;
const WINDOW: Duration = Duration::from_mins(1);
const TRY_AGAIN: Duration = Duration::from_millis(200);
/// Wakes the keeper to read what the daemon has said. For init, too, a signal that is blocked is not ignored (Linux, kernel/signal.c,
/// `sig_ignored`).
const BELL: Signal = Signal::SIGUSR1;
/// The guest itself, among the numbers of processes.
const GUEST: u64 = 0;

/// Where the daemon serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// A virtio-serial port.
    Port(PathBuf),
    /// The vsock.
    Vsock,
    /// A unix socket, with processes in a cgroup if one is named; for tests outside of a VM.
    Socket(PathBuf, Option<PathBuf>),
}

impl Place {
    fn arguments(&self) -> Vec<PathBuf> {
        match self {
            Self::Port(port) => vec!["port".into(), port.clone()],
            Self::Vsock => vec!["vsock".into()],
            Self::Socket(socket, cgroup) => {
                let mut arguments = vec!["socket".into(), socket.clone()];
                arguments.extend(cgroup.clone());
                arguments
            }
        }
    }

    pub(crate) fn parse(arguments: &[String]) -> Option<Self> {
        match arguments {
            [kind, port] if kind == "port" => Some(Self::Port(port.into())),
            [kind] if kind == "vsock" => Some(Self::Vsock),
            [kind, socket] if kind == "socket" => Some(Self::Socket(socket.into(), None)),
            [kind, socket, cgroup] if kind == "socket" => {
                Some(Self::Socket(socket.into(), Some(cgroup.into())))
            }
            _ => None,
        }
    }
}

/// What is kept of one process.
#[derive(Debug, Default)]
struct Keeping {
    pid: i32,
    words: BTreeMap<i32, Vec<u8>>,
    files: BTreeMap<i32, Rc<OwnedFd>>,
}

/// All that is kept, by the number of the process.
#[derive(Debug, Default)]
struct Store {
    items: BTreeMap<u64, Keeping>,
    /// The last number any process has had.
    last_number: u64,
    /// Data that has not come whole.
    begun: Vec<u8>,
    /// A daemon has once begun to serve, so another one can.
    has_served: bool,
}

impl Store {
    fn take(&mut self, packet: Packet, files: Vec<OwnedFd>) {
        self.begun.extend_from_slice(&packet.data);
        if packet.more {
            return;
        }
        let data = std::mem::take(&mut self.begun);
        if packet.kind() == Kind::Forget {
            self.items.remove(&packet.number);
            return;
        }
        self.last_number = self.last_number.max(packet.number);
        let item = self.items.entry(packet.number).or_default();
        if packet.pid != 0 {
            item.pid = packet.pid;
        }
        if packet.slot() != Slot::None {
            item.words.insert(packet.slot, data);
        }
        let files = files.into_iter().map(Rc::new);
        item.files.extend(packet.files.iter().copied().zip(files));
        for slot in &packet.removed {
            item.words.remove(slot);
            item.files.remove(slot);
        }
    }

    /// A child of ours has ended; the process that it was, if it is known.
    fn note_end(&mut self, ended: &Ended) -> Option<(u64, Vec<u8>)> {
        let slot = i32::from(Slot::Ended);
        let mut items = self.items.iter_mut();
        let (number, item) =
            items.find(|(_, item)| item.pid == ended.pid && !item.words.contains_key(&slot))?;
        let word = EndedWord::of(ended, SystemTime::now()).encode_to_vec();
        item.words.insert(slot, word.clone());
        Some((*number, word))
    }

    /// All of it, for a new daemon.
    fn packets(&self) -> Vec<Outgoing> {
        let mut packets = Vec::new();
        for (number, item) in &self.items {
            let keep = |slot: i32| Packet {
                number: *number,
                pid: item.pid,
                slot,
                ..Packet::default()
            };
            packets.push((keep(0), None));
            for (slot, data) in &item.words {
                let packet = Packet {
                    data: data.clone(),
                    ..keep(*slot)
                };
                packets.extend(packet.parts().into_iter().map(|part| (part, None)));
            }
            for (slot, file) in &item.files {
                let packet = Packet {
                    files: vec![*slot],
                    ..keep(0)
                };
                packets.push((packet, Some(Rc::clone(file))));
            }
        }
        packets
    }
}

type Outgoing = (Packet, Option<Rc<OwnedFd>>);

/// A daemon, and what it has not been told yet.
#[derive(Debug)]
struct Daemon {
    child: Child,
    socket: OwnedFd,
    outgoing: VecDeque<Outgoing>,
}

impl Daemon {
    fn start(place: &Place, store: &Store) -> Result<Self, Failure> {
        if let Place::Socket(socket, _) = place {
            // That of the one before.
            match std::fs::remove_file(socket) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
                _ => {}
            }
        }
        let (ours, theirs) = packet::pair()?;
        let mut command = Command::new("/proc/self/exe");
        command.arg0("envd").arg("--work").args(place.arguments());
        let child = command.stdin(theirs).spawn()?;
        let mut outgoing: VecDeque<Outgoing> = store.packets().into();
        let ready = Packet {
            kind: Kind::Ready.into(),
            number: store.last_number,
            ..Packet::default()
        };
        outgoing.push_back((ready, None));
        Ok(Self {
            child,
            socket: ours,
            outgoing,
        })
    }

    /// Tells what can be told without waiting.
    fn flush(&mut self) -> io::Result<()> {
        while let Some((packet, file)) = self.outgoing.front() {
            let files: Vec<BorrowedFd<'_>> = file.iter().map(|file| file.as_fd()).collect();
            let sent = packet::send(self.socket.as_fd(), packet, &files, MsgFlags::MSG_DONTWAIT);
            match sent {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
            self.outgoing.pop_front();
        }
        Ok(())
    }

    /// Takes what it has said so far.
    fn hear(&self, store: &mut Store) -> io::Result<()> {
        loop {
            match packet::receive(&self.socket, MsgFlags::MSG_DONTWAIT) {
                Ok(None) => return Ok(()),
                Ok(Some((packet, _))) if packet.kind() == Kind::Ready => store.has_served = true,
                Ok(Some((packet, files))) => store.take(packet, files),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }
}

/// Runs until the guest is powered off, or the daemon cannot be helped.
pub(crate) fn run(place: &Place) -> Result<(), Failure> {
    set_child_subreaper(true)?;
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGCHLD);
    signals.add(BELL);
    signals.thread_block()?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
    let mut store = Store::default();
    let mut starts: VecDeque<Instant> = VecDeque::new();
    loop {
        let now = Instant::now();
        while starts.front().is_some_and(|start| now - *start > WINDOW) {
            starts.pop_front();
        }
        if starts.len() == MOST_STARTS {
            return Err(format!("the daemon died {MOST_STARTS} times in {WINDOW:?}").into());
        }
        starts.push_back(now);
        let mut daemon = match Daemon::start(place, &store) {
            Ok(daemon) => daemon,
            // There may be no memory for it right now.
            Err(error) if store.has_served => {
                eprintln!("envd: the daemon does not start: {error}");
                thread::sleep(TRY_AGAIN);
                continue;
            }
            Err(error) => return Err(error),
        };
        let how = look_after(&mut daemon, &signals, &mut store)?;
        // What it said before it died counts.
        daemon.hear(&mut store)?;
        store.begun.clear();
        eprintln!("envd: the daemon ended: {how}");
        if !store.has_served {
            return Err("the daemon could not begin".into());
        }
        let count = store.items.entry(GUEST).or_default();
        let word = count.words.entry(Slot::Starts.into()).or_default();
        let before = client::number_of(word).unwrap_or_default();
        *word = (before + 1).to_le_bytes().to_vec();
    }
}

/// Until the daemon has ended; how it did.
fn look_after(
    daemon: &mut Daemon,
    signals: &SignalFd,
    store: &mut Store,
) -> Result<String, Failure> {
    let own = i32::try_from(daemon.child.id())?;
    loop {
        while signals.read_signal()?.is_some() {}
        // Whose child has ended may just have been said.
        let heard = daemon.hear(store);
        let mut has_orphans = false;
        while let Ok(Some(ended)) = spawn::wait4(-1) {
            if ended.pid == own {
                return Ok(match (ended.code, ended.signal) {
                    (Some(code), _) => format!("exit code {code}"),
                    (_, signal) => format!("signal {}", signal.unwrap_or_default()),
                });
            }
            if let Some((number, data)) = store.note_end(&ended) {
                let packet = Packet {
                    kind: Kind::Ended.into(),
                    number,
                    pid: ended.pid,
                    data,
                    ..Packet::default()
                };
                daemon.outgoing.push_back((packet, None));
            } else {
                has_orphans = true;
            }
        }
        if has_orphans && daemon.outgoing.is_empty() {
            let packet = Packet {
                kind: Kind::Ended.into(),
                ..Packet::default()
            };
            daemon.outgoing.push_back((packet, None));
        }
        let mut fds = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        match heard.and_then(|()| daemon.flush()) {
            Ok(()) if daemon.outgoing.is_empty() => {}
            Ok(()) => fds.push(PollFd::new(daemon.socket.as_fd(), PollFlags::POLLOUT)),
            // It has ended, and is about to be collected.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            Err(error) => {
                eprintln!("envd: the daemon is ended, it cannot be heard: {error}");
                daemon.child.kill()?;
            }
        }
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(number: u64, slot: Slot, data: &[u8]) -> Packet {
        Packet {
            number,
            slot: slot.into(),
            data: data.to_vec(),
            ..Packet::default()
        }
    }

    fn file() -> OwnedFd {
        tempfile::tempfile().unwrap().into()
    }

    #[test]
    fn what_is_kept_comes_out_as_it_went_in_however_long_it_is() {
        let (one, other) = packet::pair().unwrap();
        let long: Vec<u8> = (0..300_000u32).map(|at| at as u8).collect();
        let mut store = Store::default();
        let packet = Packet {
            pid: 42,
            files: vec![Slot::Stdout.into(), Slot::Stderr.into()],
            ..word(7, Slot::Record, &long)
        };
        let (out, err) = (file(), file());
        let sender = std::thread::spawn(move || {
            let parts = packet.parts();
            let last = parts.len() - 1;
            for (at, part) in parts.iter().enumerate() {
                let files = [out.as_fd(), err.as_fd()];
                let files = if at == last { &files[..] } else { &[] };
                packet::send(one.as_fd(), part, files, MsgFlags::empty()).unwrap();
            }
        });
        while let Some((packet, files)) = packet::receive(&other, MsgFlags::empty()).unwrap() {
            store.take(packet, files);
        }
        sender.join().unwrap();
        let item = &store.items[&7];
        assert_eq!((item.pid, item.files.len()), (42, 2));
        assert!(item.words[&i32::from(Slot::Record)] == long);

        let mut next = Store::default();
        for (packet, file) in store.packets() {
            let files = file.map(|file| file.try_clone().unwrap());
            next.take(packet, files.into_iter().collect());
        }
        assert!(next.items[&7].words == store.items[&7].words);
        assert_eq!(next.items[&7].files.len(), 2);
        next.take(
            Packet {
                removed: vec![Slot::Stdout.into()],
                ..word(7, Slot::Exited, b"so")
            },
            Vec::new(),
        );
        assert_eq!(next.items[&7].files.len(), 1);
        next.take(
            Packet {
                kind: Kind::Forget.into(),
                ..word(7, Slot::None, b"")
            },
            Vec::new(),
        );
        assert!(next.items.is_empty());
    }

    #[test]
    fn an_end_is_noted_once_and_for_the_process_that_has_that_pid_now() {
        let ended = Ended {
            pid: 42,
            code: Some(3),
            signal: None,
            cpu_micros: 5,
            peak_memory_bytes: 6,
        };
        let mut store = Store::default();
        assert_eq!(store.note_end(&ended), None);
        for number in [1, 2] {
            let started = Packet {
                pid: 42,
                ..word(number, Slot::Record, b"x")
            };
            store.take(started, Vec::new());
            let (of, data) = store.note_end(&ended).unwrap();
            let (read, _) = EndedWord::decode(&*data).unwrap().read();
            assert_eq!((of, read), (number, ended.clone()));
            assert_eq!(store.note_end(&ended), None);
        }
    }

    #[test]
    fn a_place_is_said_and_read() {
        for place in [
            Place::Port("/dev/vport0p1".into()),
            Place::Vsock,
            Place::Socket("/a".into(), None),
            Place::Socket("/a".into(), Some("/b".into())),
        ] {
            let arguments = place.arguments();
            let arguments: Vec<String> = arguments
                .iter()
                .map(|argument| argument.to_str().unwrap().to_owned())
                .collect();
            assert_eq!(Place::parse(&arguments), Some(place));
        }
        assert_eq!(Place::parse(&["port".into()]), None);
    }
}
