//! Netlink sockets for batches: many messages in one send, answered by the kernel before the send returns (netlink(7)).
//!
//! A socket belongs to the network namespace of the thread that opened it, wherever it is used later. Links, addresses and routes
//! are built with rtnetlink's types; nftables' messages, which it does not know, with [`Attributes`].

use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd},
};

use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto,
        socket,
    },
};
use rtnetlink::{packet_core::NetlinkSerializable as _, packet_route::RouteNetlinkMessage};

/// `NLM_F_*` of linux/netlink.h.
pub(super) const REQUEST: u16 = 0x001;
pub(super) const ACK: u16 = 0x004;
pub(super) const REPLACE: u16 = 0x100;
pub(super) const EXCLUSIVE: u16 = 0x200;
pub(super) const CREATE: u16 = 0x400;
pub(super) const APPEND: u16 = 0x800;
const DUMP: u16 = 0x300;

const ERROR: u16 = 2;
const DONE: u16 = 3;
const HEADER: usize = 16;
/// Messages sent at once, so that their answers fit in the socket's receive buffer.
const AT_ONCE: usize = 64;
/// The largest a kernel answers with at once is 32 KiB.
const ANSWER: usize = 64 << 10;

/// Attributes of a message, encoded.
#[derive(Debug, Clone, Default)]
pub(super) struct Attributes(Vec<u8>);

impl Attributes {
    /// Appends an attribute.
    pub(super) fn put(mut self, kind: u16, value: &[u8]) -> Self {
        let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// Appends a text, ended by a zero.
    pub(super) fn text(self, kind: u16, value: &str) -> Self {
        self.put(kind, &[value.as_bytes(), b"\0"].concat())
    }

    /// Appends attributes in an attribute.
    pub(super) fn nest(self, kind: u16, inner: &Self) -> Self {
        const NESTED: u16 = 0x8000;
        self.put(kind | NESTED, &inner.0)
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// The attributes in these bytes: kind without flags, kind as it stands, value. Ends at what is malformed.
pub(super) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, u16, &[u8])> {
    std::iter::from_fn(move || {
        let (length, rest) = bytes.split_first_chunk::<2>()?;
        let (kind, _) = rest.split_first_chunk::<2>()?;
        let (length, kind) = (
            usize::from(u16::from_ne_bytes(*length)),
            u16::from_ne_bytes(*kind),
        );
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind & 0x3fff, kind, value))
    })
}

/// A message: what follows netlink's own header is in `body`.
#[derive(Debug, Clone)]
pub(super) struct Message {
    pub(super) kind: u16,
    pub(super) flags: u16,
    pub(super) body: Vec<u8>,
}

impl Message {
    /// One of rtnetlink's.
    pub(super) fn route(message: &RouteNetlinkMessage, flags: u16) -> Self {
        let mut body = vec![0; message.buffer_len()];
        message.serialize(&mut body);
        Self {
            kind: message.message_type(),
            flags,
            body,
        }
    }

    fn append_to(&self, buffer: &mut Vec<u8>, sequence: u32, flags: u16) {
        let length = u32::try_from(HEADER + self.body.len()).unwrap_or(u32::MAX);
        buffer.extend(length.to_ne_bytes());
        buffer.extend(self.kind.to_ne_bytes());
        buffer.extend((self.flags | flags | REQUEST).to_ne_bytes());
        buffer.extend(sequence.to_ne_bytes());
        buffer.extend(0_u32.to_ne_bytes());
        buffer.extend(&self.body);
        buffer.resize(buffer.len().next_multiple_of(4), 0);
    }
}

/// A message as received, with its sequence number.
struct Received {
    sequence: u32,
    message: Message,
}

/// A netlink socket.
#[derive(Debug)]
pub(super) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

impl Netlink {
    /// A socket of the calling thread's network namespace.
    pub(super) fn open(protocol: SockProtocol) -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            protocol,
        )?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Sends all messages; each result is the kernel's.
    pub(super) fn send_each(&mut self, messages: &[Message]) -> io::Result<Vec<io::Result<()>>> {
        let mut results = Vec::with_capacity(messages.len());
        for chunk in messages.chunks(AT_ONCE) {
            let first = self.sequence;
            self.send(chunk, ACK)?;
            let mut answers = vec![None; chunk.len()];
            for received in self.answered()? {
                let place = received.sequence.wrapping_sub(first) as usize;
                if let (Some(answer), Some(code)) =
                    (answers.get_mut(place), error_code(&received.message))
                {
                    *answer = Some(code);
                }
            }
            results.extend(answers.into_iter().map(|answer| match answer {
                Some(0) => Ok(()),
                Some(code) => Err(io::Error::from_raw_os_error(code)),
                None => Err(io::ErrorKind::UnexpectedEof.into()),
            }));
        }
        Ok(results)
    }

    /// Sends all messages; the first that fails is the error, by its place.
    pub(super) fn send_all(&mut self, messages: &[Message]) -> Result<(), (usize, io::Error)> {
        let results = self.send_each(messages).map_err(|error| (0, error))?;
        for (place, result) in results.into_iter().enumerate() {
            result.map_err(|error| (place, error))?;
        }
        Ok(())
    }

    /// Sends messages of nftables as one transaction: all or none.
    pub(super) fn transact(&mut self, messages: &[Message]) -> io::Result<()> {
        /// `NFNL_MSG_BATCH_BEGIN` and `NFNL_MSG_BATCH_END` of linux/netfilter/nfnetlink.h, with `NFNL_SUBSYS_NFTABLES`.
        const BEGIN: u16 = 0x10;
        const END: u16 = 0x11;
        let mark = |kind| Message {
            kind,
            flags: 0,
            body: vec![0, 0, 0, 10],
        };
        let mut buffer = Vec::new();
        let first = self.sequence;
        mark(BEGIN).append_to(&mut buffer, self.next(), 0);
        for message in messages {
            message.append_to(&mut buffer, self.next(), ACK);
        }
        mark(END).append_to(&mut buffer, self.next(), 0);
        self.send_bytes(&buffer)?;
        let mut acknowledged = 0;
        for received in self.answered()? {
            match error_code(&received.message) {
                Some(0) if received.sequence != first => acknowledged += 1,
                Some(0) | None => {}
                Some(code) => return Err(io::Error::from_raw_os_error(code)),
            }
        }
        if acknowledged == messages.len() {
            Ok(())
        } else {
            Err(io::ErrorKind::UnexpectedEof.into())
        }
    }

    /// Asks for a list.
    pub(super) fn dump(&mut self, message: &Message) -> io::Result<Vec<Message>> {
        self.send(std::slice::from_ref(message), DUMP)?;
        let mut found = Vec::new();
        loop {
            // The kernel writes the list as it is read, so nothing is waited for.
            for Received { message, .. } in self.receive(MsgFlags::empty())? {
                match message.kind {
                    DONE => return Ok(found),
                    ERROR => {
                        let code = error_code(&message).unwrap_or(0);
                        return Err(io::Error::from_raw_os_error(code));
                    }
                    _ => found.push(message),
                }
            }
        }
    }

    /// Asks for one thing.
    pub(super) fn get(&mut self, message: &Message) -> io::Result<Message> {
        self.send(std::slice::from_ref(message), 0)?;
        let Some(Received { message, .. }) = self.answered()?.pop() else {
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        match error_code(&message) {
            None => Ok(message),
            Some(code) => Err(io::Error::from_raw_os_error(code)),
        }
    }

    fn next(&mut self) -> u32 {
        let sequence = self.sequence;
        self.sequence = self.sequence.wrapping_add(1);
        sequence
    }

    fn send(&mut self, messages: &[Message], flags: u16) -> io::Result<()> {
        let mut buffer = Vec::new();
        for message in messages {
            let sequence = self.next();
            message.append_to(&mut buffer, sequence, flags);
        }
        self.send_bytes(&buffer)
    }

    fn send_bytes(&self, buffer: &[u8]) -> io::Result<()> {
        let kernel = NetlinkAddr::new(0, 0);
        sendto(self.socket.as_raw_fd(), buffer, &kernel, MsgFlags::empty())?;
        Ok(())
    }

    /// Everything that lies in the socket: the kernel has answered before a send returns.
    fn answered(&self) -> io::Result<Vec<Received>> {
        let mut all = Vec::new();
        loop {
            match self.receive(MsgFlags::MSG_DONTWAIT) {
                Ok(received) => all.extend(received),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(all),
                Err(error) => return Err(error),
            }
        }
    }

    fn receive(&self, flags: MsgFlags) -> io::Result<Vec<Received>> {
        let mut buffer = vec![0; ANSWER];
        let length = loop {
            match recv(self.socket.as_raw_fd(), &mut buffer, flags) {
                Err(Errno::EINTR) => {}
                other => break other?,
            }
        };
        buffer.truncate(length);
        let mut rest = buffer.as_slice();
        let mut received = Vec::new();
        while let Some(message) = take_message(&mut rest) {
            received.push(message);
        }
        Ok(received)
    }
}

fn take_message(bytes: &mut &[u8]) -> Option<Received> {
    let header = bytes.first_chunk::<HEADER>()?;
    let [l0, l1, l2, l3, k0, k1, f0, f1, s0, s1, s2, s3, ..] = *header;
    let length = u32::from_ne_bytes([l0, l1, l2, l3]) as usize;
    let body = bytes.get(HEADER..length)?.to_vec();
    *bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some(Received {
        sequence: u32::from_ne_bytes([s0, s1, s2, s3]),
        message: Message {
            kind: u16::from_ne_bytes([k0, k1]),
            flags: u16::from_ne_bytes([f0, f1]),
            body,
        },
    })
}

/// The error number of an answer that is one; 0 acknowledges.
fn error_code(message: &Message) -> Option<i32> {
    if message.kind != ERROR {
        return None;
    }
    let code = message.body.first_chunk::<4>()?;
    Some(i32::from_ne_bytes(*code).saturating_neg())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_read_as_they_were_written() {
        let inner = Attributes::default().put(7, &[1, 2, 3, 4]);
        let encoded = Attributes::default().text(1, "slot").nest(2, &inner);
        let read: Vec<_> = attributes(encoded.bytes())
            .map(|(kind, _, value)| (kind, value.to_vec()))
            .collect();
        assert_eq!(read, [(1, b"slot\0".to_vec()), (2, inner.bytes().to_vec())]);
    }

    #[test]
    fn attributes_end_at_what_is_malformed() {
        for garbage in [&[0][..], &[3, 0, 1, 0], &[9, 0, 1, 0, 5], &[0, 0, 0, 0]] {
            assert_eq!(attributes(garbage).count(), 0, "{garbage:?}");
        }
    }

    #[test]
    fn every_message_of_a_batch_has_its_own_answer() {
        let mut socket = Netlink::open(SockProtocol::NetlinkRoute).unwrap();
        // No such messages: each is refused, in order, and none is lost over several sends.
        let nonsense = Message {
            kind: 4000,
            flags: 0,
            body: vec![0; 16],
        };
        let results = socket.send_each(&vec![nonsense; AT_ONCE * 2 + 1]).unwrap();
        assert_eq!(results.len(), AT_ONCE * 2 + 1);
        for result in results {
            assert_eq!(
                result.unwrap_err().raw_os_error(),
                Some(nix::libc::EOPNOTSUPP)
            );
        }
    }
}
