//! What keeper and daemon say to each other: packets on a unix socket that keeps their bounds (unix(7), `SOCK_SEQPACKET`), with descriptors.

use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
};

use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg,
    sendmsg, socketpair,
};
use prost::Message as _;

/// Bytes of data in one packet: what is longer comes in parts.
pub(super) const PART: usize = 32 << 10;
/// Descriptors in one packet.
pub(super) const MOST_FILES: usize = 4;
/// With all there is around the data.
const LARGEST: usize = PART + 1024;

/// What is kept of one process, or, with the number 0, of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub(crate) enum Slot {
    None = 0,
    /// What was asked for, and what became of it.
    Record = 1,
    /// How it ended, as the kernel says.
    Ended = 2,
    /// How it ended, as clients are told.
    Exited = 3,
    /// The writing end of stdin.
    Stdin = 4,
    /// The reading end.
    Stdout = 5,
    /// The reading end.
    Stderr = 6,
    /// Our side of its terminal.
    Terminal = 7,
    /// A pipe on the way from the terminal to memory, to read from.
    FromTerminal = 8,
    /// The other end of that.
    ToTerminal = 9,
    /// Output in memory.
    StdoutMemory = 10,
    /// Output in a file, and its first offset.
    StdoutFile = 11,
    /// As of stdout.
    StderrMemory = 12,
    /// As of stdout.
    StderrFile = 13,
    /// How much input was written, and is being written.
    Input = 14,
    /// Whose guest it is.
    Guest = 15,
    /// /dev/kmsg, read so far.
    Kmsg = 16,
    /// The number of the last message of the log.
    LastMessage = 17,
    /// The epoch of the link.
    Epoch = 18,
    /// How often the daemon was started before.
    Starts = 19,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub(super) enum Kind {
    /// To be kept, in place of what was in its slots. From the keeper: what is kept.
    Keep = 0,
    /// Nothing of it is to be kept any more.
    Forget = 1,
    /// The daemon serves. From the keeper: that was all.
    Ready = 2,
    /// A child of the keeper has ended: one it keeps something of, or any.
    Ended = 3,
}

/// Never without a byte, which would be the end.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Packet {
    #[prost(enumeration = "Kind", required, tag = "1")]
    pub(super) kind: i32,
    /// Of the process; 0 is the guest.
    #[prost(uint64, tag = "2")]
    pub(super) number: u64,
    /// Its PID, once it has one.
    #[prost(int32, tag = "3")]
    pub(super) pid: i32,
    /// Where the data belongs.
    #[prost(enumeration = "Slot", tag = "4")]
    pub(super) slot: i32,
    #[prost(bytes = "vec", tag = "5")]
    pub(super) data: Vec<u8>,
    /// More of the data follows.
    #[prost(bool, tag = "6")]
    pub(super) more: bool,
    /// Where the descriptors belong that come with it, in their order.
    #[prost(enumeration = "Slot", repeated, tag = "7")]
    pub(super) files: Vec<i32>,
    /// What is to be kept no more.
    #[prost(enumeration = "Slot", repeated, tag = "8")]
    pub(super) removed: Vec<i32>,
}

impl Packet {
    /// The data in parts, each but the last with `more`; everything else goes with the last.
    pub(super) fn parts(mut self) -> Vec<Self> {
        let data = std::mem::take(&mut self.data);
        let mut parts: Vec<Self> = data
            .chunks(PART)
            .map(|part| Self {
                number: self.number,
                slot: self.slot,
                data: part.to_vec(),
                more: true,
                ..Self::default()
            })
            .collect();
        self.data = parts.pop().unwrap_or_default().data;
        parts.push(self);
        parts
    }
}

/// Both ends of a connection.
pub(super) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?)
}

/// Sends one; `flags` say whether it may wait for room.
pub(super) fn send(
    socket: BorrowedFd<'_>,
    packet: &Packet,
    files: &[BorrowedFd<'_>],
    flags: MsgFlags,
) -> io::Result<()> {
    let bytes = packet.encode_to_vec();
    let raw: Vec<RawFd> = files.iter().map(std::os::fd::AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[][..] } else { &rights[..] };
    sendmsg::<()>(
        socket.as_raw_fd(),
        &[IoSlice::new(&bytes)],
        control,
        flags | MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    Ok(())
}

/// The next one, and its descriptors; nothing when the other side is gone.
pub(super) fn receive(
    socket: impl AsFd,
    flags: MsgFlags,
) -> io::Result<Option<(Packet, Vec<OwnedFd>)>> {
    let mut bytes = vec![0; LARGEST];
    let mut control = nix::cmsg_space!([RawFd; MOST_FILES]);
    let mut slices = [IoSliceMut::new(&mut bytes)];
    let received = recvmsg::<()>(
        socket.as_fd().as_raw_fd(),
        &mut slices,
        Some(&mut control),
        flags | MsgFlags::MSG_CMSG_CLOEXEC,
    );
    let received = match received {
        Err(nix::errno::Errno::ECONNRESET) => return Ok(None),
        received => received?,
    };
    let mut files = Vec::new();
    for message in received.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = message {
            // SAFETY: the kernel has just made these descriptors for us, and nobody else knows them.
            files.extend(
                raw.into_iter()
                    .map(|raw| unsafe { OwnedFd::from_raw_fd(raw) }),
            );
        }
    }
    let length = received.bytes;
    if length == 0 {
        return Ok(None);
    }
    let packet = Packet::decode(bytes.get(..length).unwrap_or_default())?;
    Ok(Some((packet, files)))
}
