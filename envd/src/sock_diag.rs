//! sock_diag(7): the kernel's own account of TCP sockets, asked for by state, so that nothing is read that was not asked for.
//!
//! The guest's kernel needs the module `tcp_diag`, which Debian's have.

use nix::libc;
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_SOCK_DIAG};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const HEADER: usize = 16;
/// `struct inet_diag_sockid` in `struct inet_diag_msg` and `struct inet_diag_req_v2` (linux/inet_diag.h).
pub(crate) const ID: usize = 48;
pub(crate) const ID_IN_MESSAGE: usize = 4;
pub(crate) const FAMILIES: [u8; 2] = [libc::AF_INET as u8, libc::AF_INET6 as u8];

pub(crate) fn open() -> Result<Socket, String> {
    let mut socket = Socket::new(NETLINK_SOCK_DIAG).map_err(|error| error.to_string())?;
    socket.bind_auto().map_err(|error| error.to_string())?;
    Ok(socket)
}

/// A request of `struct inet_diag_req_v2`.
pub(crate) struct Request<'a> {
    pub(crate) kind: u16,
    pub(crate) flags: i32,
    pub(crate) family: u8,
    /// A bit for each of `enum tcp_state`.
    pub(crate) states: u32,
    pub(crate) id: &'a [u8; ID],
}

impl Request<'_> {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER + 8 + ID);
        bytes.extend(((HEADER + 8 + ID) as u32).to_ne_bytes());
        bytes.extend(self.kind.to_ne_bytes());
        bytes.extend((self.flags as u16).to_ne_bytes());
        // Sequence and port: one request at a time, to the kernel.
        bytes.extend([0; 8]);
        bytes.extend([self.family, libc::IPPROTO_TCP as u8, 0, 0]);
        bytes.extend(self.states.to_ne_bytes());
        bytes.extend(self.id);
        bytes
    }

    pub(crate) fn send(&self, socket: &Socket) -> Result<(), String> {
        let kernel = SocketAddr::new(0, 0);
        let sent = socket.send_to(&self.bytes(), &kernel, 0);
        sent.map(drop).map_err(|error| error.to_string())
    }
}

/// What the kernel answers with.
pub(crate) enum Answer<'a> {
    Message(&'a [u8]),
    Done,
    /// An errno, or zero for a success.
    Result(i32),
}

/// Takes the messages of one datagram.
pub(crate) fn answers(mut datagram: &[u8]) -> Vec<Answer<'_>> {
    let mut found = Vec::new();
    while let Some((header, _)) = datagram.split_first_chunk::<HEADER>() {
        let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let Some(body) = datagram.get(HEADER..length) else {
            break;
        };
        found.push(
            match i32::from(u16::from_ne_bytes([header[4], header[5]])) {
                libc::NLMSG_DONE => Answer::Done,
                libc::NLMSG_ERROR => {
                    let code = body
                        .first_chunk()
                        .map_or(-libc::EPROTO, |code| i32::from_ne_bytes(*code));
                    Answer::Result(-code)
                }
                _ => Answer::Message(body),
            },
        );
        datagram = datagram
            .get(length.next_multiple_of(4)..)
            .unwrap_or_default();
    }
    found
}

pub(crate) fn said(errno: i32) -> String {
    match errno {
        libc::ENOENT => {
            "the guest's kernel has no tcp_diag; add the module to the template's".into()
        }
        libc::EOPNOTSUPP => "the guest's kernel has no CONFIG_INET_DIAG_DESTROY".into(),
        errno => nix::errno::Errno::from_raw(errno).to_string(),
    }
}

/// All sockets of a family that are in one of the states, read from their `struct inet_diag_msg`.
pub(crate) fn dump<T>(
    socket: &Socket,
    family: u8,
    states: u32,
    read: impl Fn(&[u8]) -> Option<T>,
) -> Result<Vec<T>, String> {
    let request = Request {
        kind: SOCK_DIAG_BY_FAMILY,
        flags: libc::NLM_F_REQUEST | libc::NLM_F_DUMP,
        family,
        states,
        id: &[0; ID],
    };
    request.send(socket)?;
    let mut found = Vec::new();
    loop {
        let (datagram, _) = socket.recv_from_full().map_err(|error| error.to_string())?;
        for answer in answers(&datagram) {
            match answer {
                Answer::Message(message) => found.extend(read(message)),
                Answer::Result(0) | Answer::Done => return Ok(found),
                Answer::Result(errno) => return Err(said(errno)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_could_say_is_read_without_harm() {
        assert!(answers(&[0; 40]).is_empty());
        assert!(answers(&[0xff; 64]).is_empty());
        let request = Request {
            kind: SOCK_DIAG_BY_FAMILY,
            flags: 5,
            family: 2,
            states: 1,
            id: &[0; ID],
        };
        let mut message = request.bytes();
        assert_eq!(answers(&message).len(), 1);
        message[0] = 15;
        assert!(answers(&message).is_empty(), "shorter than its header");
    }
}
