//! The daemon's side: what it gives to be kept, and what it is given when it begins.

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use nix::{
    sys::{
        prctl::{set_child_subreaper, set_name, set_pdeathsig},
        signal::{SigSet, Signal, kill},
        socket::MsgFlags,
    },
    unistd::{dup2_stdin, getppid},
};
use prost::Message;
use tokio::io::{Interest, unix::AsyncFd};

use super::{
    BELL, GUEST,
    packet::{self, Kind, Packet, Slot},
};
use crate::{descriptors, logs, process::Processes, spawn::Ended};

/// Packets that wait in the socket until the keeper is woken.
const MOST_WAITING: usize = 64;

/// How a child ended, as it is kept.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct EndedWord {
    #[prost(int32, tag = "1")]
    pid: i32,
    #[prost(int32, optional, tag = "2")]
    code: Option<i32>,
    #[prost(int32, optional, tag = "3")]
    signal: Option<i32>,
    #[prost(uint64, tag = "4")]
    cpu_micros: u64,
    #[prost(uint64, tag = "5")]
    peak_memory_bytes: u64,
    #[prost(message, optional, tag = "6")]
    time: Option<prost_types::Timestamp>,
}

impl EndedWord {
    pub(crate) fn of(ended: &Ended, time: SystemTime) -> Self {
        Self {
            pid: ended.pid,
            code: ended.code,
            signal: ended.signal,
            cpu_micros: ended.cpu_micros,
            peak_memory_bytes: ended.peak_memory_bytes,
            time: Some(time.into()),
        }
    }

    pub(crate) fn read(self) -> (Ended, SystemTime) {
        let time = self.time.and_then(|time| SystemTime::try_from(time).ok());
        let ended = Ended {
            pid: self.pid,
            code: self.code,
            signal: self.signal,
            cpu_micros: self.cpu_micros,
            peak_memory_bytes: self.peak_memory_bytes,
        };
        (ended, time.unwrap_or(SystemTime::UNIX_EPOCH))
    }
}

/// A number as it is kept.
pub(crate) fn number_of(word: &[u8]) -> Option<u64> {
    Some(u64::from_le_bytes(word.get(..8)?.try_into().ok()?))
}

/// Keeps what is given for the next daemon. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Keeper {
    /// Without one, nothing is kept.
    line: Option<Arc<Mutex<Line>>>,
}

/// The way to the keeper; held while the parts of one word are sent.
#[derive(Debug)]
struct Line {
    socket: OwnedFd,
    /// Packets that it may not have read.
    waiting: usize,
}

impl Line {
    fn send(&mut self, packet: &Packet, files: &[BorrowedFd<'_>]) -> io::Result<()> {
        let socket = self.socket.as_fd();
        match packet::send(socket, packet, files, MsgFlags::MSG_DONTWAIT) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.waiting = 0;
                ring()?;
                packet::send(socket, packet, files, MsgFlags::empty())?;
            }
            sent => sent?,
        }
        self.waiting += 1;
        if self.waiting == MOST_WAITING {
            self.waiting = 0;
            ring()?;
        }
        Ok(())
    }
}

/// Wakes the keeper to read what was sent.
fn ring() -> io::Result<()> {
    Ok(kill(getppid(), BELL)?)
}

/// What was kept of one process, or of the guest.
#[derive(Debug, Default)]
pub(crate) struct Item {
    pub(crate) pid: i32,
    words: HashMap<i32, Vec<u8>>,
    files: HashMap<i32, OwnedFd>,
}

impl Item {
    pub(crate) fn word(&mut self, slot: Slot) -> Option<Vec<u8>> {
        self.words.remove(&slot.into())
    }

    /// A word that is a message.
    pub(crate) fn message<M: Message + Default>(&mut self, slot: Slot) -> io::Result<Option<M>> {
        let word = self.word(slot);
        Ok(word.map(|word| M::decode(&*word)).transpose()?)
    }

    pub(crate) fn number(&mut self, slot: Slot) -> Option<u64> {
        number_of(&self.word(slot)?)
    }

    pub(crate) fn descriptor(&mut self, slot: Slot) -> Option<OwnedFd> {
        self.files.remove(&slot.into())
    }

    pub(crate) fn file(&mut self, slot: Slot) -> Option<File> {
        self.descriptor(slot).map(File::from)
    }
}

/// What the daemon before has left.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    pub(crate) guest: Item,
    /// By their numbers.
    pub(crate) processes: BTreeMap<u64, Item>,
    /// The last that any has had.
    pub(crate) last_number: u64,
}

impl Keeper {
    /// Keeps nothing; for tests of what has no process.
    #[cfg(test)]
    pub(crate) fn none() -> Self {
        Self { line: None }
    }

    /// Becomes the daemon of the keeper that is at stdin: takes what was kept, and what orphans come. Blocking.
    pub(crate) fn meet() -> io::Result<(Self, Kept)> {
        // Outside of a VM nobody else ends it with its keeper; this is called by the main thread, which started it.
        set_pdeathsig(Signal::SIGKILL)?;
        set_child_subreaper(true)?;
        // What it was called by is a link without a name.
        set_name(c"envd")?;
        SigSet::empty().thread_set_mask()?;
        let socket = io::stdin().as_fd().try_clone_to_owned()?;
        dup2_stdin(File::open("/dev/null")?)?;
        let mut kept = Kept::default();
        loop {
            let Some((packet, files)) = packet::receive(&socket, MsgFlags::empty())? else {
                return Err(io::ErrorKind::UnexpectedEof.into());
            };
            if packet.kind() == Kind::Ready {
                kept.last_number = packet.number;
                break;
            }
            kept.take(packet, files);
        }
        let line = Line { socket, waiting: 0 };
        let line = Some(Arc::new(Mutex::new(line)));
        Ok((Self { line }, kept))
    }

    /// Sends it, to be read whenever the keeper is awake, or the daemon dead.
    fn send(&self, packet: Packet, files: &[BorrowedFd<'_>]) {
        let Some(line) = &self.line else { return };
        let mut line = line.lock().unwrap_or_else(PoisonError::into_inner);
        let parts = packet.parts();
        let last = parts.len().saturating_sub(1);
        for (at, part) in parts.iter().enumerate() {
            let files = if at == last { files } else { &[] };
            if let Err(error) = line.send(part, files) {
                logs::warn(format_args!(
                    "a next daemon would not know of this: {error}"
                ));
                return;
            }
        }
    }

    /// Sends it, to be read now: somebody waits for a descriptor to be closed.
    fn send_now(&self, packet: Packet) {
        self.send(packet, &[]);
        if self.line.is_some()
            && let Err(error) = ring()
        {
            logs::warn(format_args!("the keeper does not hear: {error}"));
        }
    }

    /// Keeps descriptors of a process, and a word.
    pub(crate) fn keep(
        &self,
        number: u64,
        files: &[(Slot, BorrowedFd<'_>)],
        word: Option<(Slot, &[u8])>,
    ) {
        self.keep_all(number, 0, files, word);
    }

    /// Keeps the PID and the descriptors of a process that has them now.
    pub(crate) fn keep_started(&self, number: u64, pid: i32, files: &[(Slot, BorrowedFd<'_>)]) {
        self.keep_all(number, pid, files, None);
    }

    fn keep_all(
        &self,
        number: u64,
        pid: i32,
        files: &[(Slot, BorrowedFd<'_>)],
        word: Option<(Slot, &[u8])>,
    ) {
        debug_assert!(
            files.len() <= packet::MOST_FILES,
            "more than one packet takes"
        );
        let (slot, data) = word.unwrap_or((Slot::None, &[]));
        let packet = Packet {
            number,
            pid,
            slot: slot.into(),
            data: data.to_vec(),
            files: files.iter().map(|(slot, _)| (*slot).into()).collect(),
            ..Packet::default()
        };
        let files: Vec<_> = files.iter().map(|(_, file)| *file).collect();
        self.send(packet, &files);
    }

    /// Keeps a word of the guest itself.
    pub(crate) fn keep_of_guest(&self, slot: Slot, word: &[u8]) {
        self.keep(GUEST, &[], Some((slot, word)));
    }

    /// Keeps a descriptor of the guest itself.
    pub(crate) fn keep_file_of_guest(&self, slot: Slot, file: BorrowedFd<'_>) {
        self.keep(GUEST, &[(slot, file)], None);
    }

    /// Keeps how a process ended, in place of what it needed to run. What it has started, and is still there, gets to know that nobody is at
    /// the other end of its pipes and terminals.
    pub(crate) fn keep_exited(&self, number: u64, exited: &impl Message, is_survived: bool) {
        let removed = [
            Slot::Ended,
            Slot::Stdin,
            Slot::Stdout,
            Slot::Stderr,
            Slot::Terminal,
            Slot::FromTerminal,
            Slot::ToTerminal,
            Slot::Input,
        ];
        let packet = Packet {
            number,
            slot: Slot::Exited.into(),
            data: exited.encode_to_vec(),
            removed: removed.map(i32::from).to_vec(),
            ..Packet::default()
        };
        if is_survived {
            self.send_now(packet);
        } else {
            self.send(packet, &[]);
        }
    }

    /// Keeps that no more, and closes it.
    pub(crate) fn remove(&self, number: u64, slots: &[Slot]) {
        let packet = Packet {
            number,
            removed: slots.iter().map(|slot| (*slot).into()).collect(),
            ..Packet::default()
        };
        self.send_now(packet);
    }

    /// Keeps nothing of a process any more.
    pub(crate) fn forget(&self, number: u64) {
        let packet = Packet {
            kind: Kind::Forget.into(),
            number,
            ..Packet::default()
        };
        self.send(packet, &[]);
    }

    /// The daemon has begun: if it dies now, there will be a next one.
    pub(crate) fn ready(&self) {
        let packet = Packet {
            kind: Kind::Ready.into(),
            ..Packet::default()
        };
        self.send(packet, &[]);
    }

    /// Hears of the ends of those that the keeper collects.
    pub(crate) async fn listen(self, processes: Processes) {
        if let Err(error) = self.try_listen(&processes).await {
            logs::warn(format_args!("the keeper is not heard any more: {error}"));
        }
    }

    async fn try_listen(&self, processes: &Processes) -> io::Result<()> {
        let Some(line) = &self.line else {
            return Ok(());
        };
        let socket = line
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .socket
            .try_clone()?;
        let socket = descriptors::register(socket, Interest::READABLE)?;
        loop {
            match next(&socket).await? {
                None => return Err(io::ErrorKind::UnexpectedEof.into()),
                Some(packet) if packet.pid != 0 => {
                    let (ended, time) = EndedWord::decode(&*packet.data)?.read();
                    processes.note_end_of(packet.number, &ended, time);
                }
                Some(_) => processes.sweep(),
            }
        }
    }
}

async fn next(socket: &AsyncFd<OwnedFd>) -> io::Result<Option<Packet>> {
    loop {
        let mut ready = socket.readable().await?;
        let received =
            ready.try_io(|socket| packet::receive(socket.get_ref(), MsgFlags::MSG_DONTWAIT));
        if let Ok(received) = received {
            return Ok(received?.map(|(packet, _)| packet));
        }
    }
}

impl Kept {
    fn take(&mut self, packet: Packet, files: Vec<OwnedFd>) {
        let item = if packet.number == GUEST {
            &mut self.guest
        } else {
            self.processes.entry(packet.number).or_default()
        };
        item.pid = item.pid.max(packet.pid);
        if packet.slot() != Slot::None {
            let word = item.words.entry(packet.slot).or_default();
            word.extend_from_slice(&packet.data);
        }
        item.files.extend(packet.files.into_iter().zip(files));
    }
}
