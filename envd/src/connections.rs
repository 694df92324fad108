//! Ends TCP connections that are not this guest's any more: after a fork their other end is the parent's, after a change of place nobody's.
//! Whoever holds one reads ECONNABORTED at once, instead of waiting for answers that cannot come.
//!
//! The kernel is asked by sock_diag(7), `SOCK_DESTROY`; the guest's kernel needs `CONFIG_INET_DIAG_DESTROY` and the module `tcp_diag`, which
//! Debian's have. Listeners stay, and what has a loopback address is within the guest. Network namespaces that users made are their own.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use nix::libc;
use rtnetlink::sys::Socket;

use crate::sock_diag::{self, Answer, ID, ID_IN_MESSAGE, Request, answers, said};

const SOCK_DESTROY: u16 = 21;
/// `enum tcp_state`: all in which there is a peer, so neither CLOSE, TIME_WAIT nor LISTEN.
const FIN_WAIT2: u8 = 5;
const STATES: u32 = 0b1_1011_0011_1110;
const LIMIT: Duration = Duration::from_secs(5);

/// Ends every TCP connection that leaves the guest.
pub(crate) async fn reset() -> Result<(), String> {
    let resetting = tokio::task::spawn_blocking(|| {
        let socket = sock_diag::open()?;
        for family in sock_diag::FAMILIES {
            for connection in list(&socket, family)? {
                destroy(&socket, &connection)?;
            }
        }
        Ok(())
    });
    match tokio::time::timeout(LIMIT, resetting).await {
        Ok(Ok(done)) => done,
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("not done in {LIMIT:?}")),
    }
}

/// A connection as the kernel names it.
#[derive(Debug, PartialEq, Eq)]
struct Connection {
    family: u8,
    state: u8,
    id: [u8; ID],
}

impl Connection {
    /// From a `struct inet_diag_msg`.
    fn parse(message: &[u8]) -> Option<Self> {
        let id = message.get(ID_IN_MESSAGE..ID_IN_MESSAGE + ID)?;
        Some(Self {
            family: *message.first()?,
            state: *message.get(1)?,
            id: id.try_into().ok()?,
        })
    }

    fn is_local(&self) -> bool {
        // Ports first, then both addresses, 16 bytes each.
        let (ends, _) = self.id[4..36].as_chunks::<16>();
        ends.iter().any(|end| {
            if i32::from(self.family) == libc::AF_INET {
                let [a, b, c, d, ..] = *end;
                Ipv4Addr::new(a, b, c, d).is_loopback()
            } else {
                IpAddr::from(Ipv6Addr::from(*end))
                    .to_canonical()
                    .is_loopback()
            }
        })
    }
}

fn list(socket: &Socket, family: u8) -> Result<Vec<Connection>, String> {
    let mut connections = sock_diag::dump(socket, family, STATES, Connection::parse)?;
    connections.retain(|connection| !connection.is_local());
    Ok(connections)
}

fn destroy(socket: &Socket, connection: &Connection) -> Result<(), String> {
    let flags = libc::NLM_F_REQUEST | libc::NLM_F_ACK;
    let request = Request {
        kind: SOCK_DESTROY,
        flags,
        family: connection.family,
        states: STATES,
        id: &connection.id,
    };
    request.send(socket)?;
    loop {
        let (datagram, _) = socket.recv_from_full().map_err(|error| error.to_string())?;
        for answer in answers(&datagram) {
            match answer {
                // It ended by itself meanwhile.
                Answer::Result(0 | libc::ENOENT) => return Ok(()),
                // One no process holds any more, which the kernel only remembers.
                Answer::Result(libc::EOPNOTSUPP) if connection.state == FIN_WAIT2 => return Ok(()),
                Answer::Result(errno) => return Err(said(errno)),
                Answer::Message(_) | Answer::Done => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{self, Read as _, Write as _},
        net::{TcpListener, TcpStream},
        time::Instant,
    };

    use super::*;
    use crate::network::tests::in_own_network;

    struct Pair {
        listener: TcpListener,
        client: TcpStream,
        server: TcpStream,
    }

    /// The kernel takes a moment until a new IPv6 address can be used, and tells nobody.
    fn at_last<T>(mut what: impl FnMut() -> io::Result<T>) -> T {
        let limit = Instant::now() + LIMIT;
        loop {
            match what() {
                Ok(done) => return done,
                Err(error) => assert!(Instant::now() < limit, "{error}"),
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    impl Pair {
        fn new(listen: &str, connect: &str) -> Self {
            let listener = at_last(|| TcpListener::bind((listen, 0)));
            let port = listener.local_addr().unwrap().port();
            let client = at_last(|| TcpStream::connect((connect, port)));
            let (server, _) = listener.accept().unwrap();
            for stream in [&client, &server] {
                stream.set_read_timeout(Some(LIMIT)).unwrap();
            }
            Self {
                listener,
                client,
                server,
            }
        }

        fn works(&mut self) -> io::Result<()> {
            self.client.write_all(b"x")?;
            self.server.read_exact(&mut [0])
        }
    }

    #[test]
    fn connections_out_of_the_guest_are_aborted_and_nothing_else_is() {
        in_own_network(async |handle| {
            for address in ["10.77.0.1", "fd00::1"] {
                let address = address.parse().unwrap();
                let add = handle.address().add(1, address, 32);
                add.execute().await.unwrap();
            }
            let mut out = [
                Pair::new("10.77.0.1", "10.77.0.1"),
                Pair::new("fd00::1", "fd00::1"),
                // The server's side is an IPv6 socket with mapped addresses.
                Pair::new("::", "10.77.0.1"),
            ];
            let mut within = [
                Pair::new("127.0.0.1", "127.0.0.1"),
                Pair::new("::1", "::1"),
                Pair::new("::", "127.0.0.1"),
            ];
            for pair in out.iter_mut().chain(&mut within) {
                pair.works().unwrap();
            }
            // One nobody has accepted yet.
            let unaccepted = TcpStream::connect(out[0].listener.local_addr().unwrap()).unwrap();
            reset().await.unwrap();
            for mut stream in out
                .iter()
                .flat_map(|pair| [&pair.client, &pair.server])
                .chain([&unaccepted])
            {
                let error = stream.read(&mut [0]).unwrap_err();
                // Both ends are here: the one that is ended second may hear of it from the first.
                let ended = [
                    io::ErrorKind::ConnectionAborted,
                    io::ErrorKind::ConnectionReset,
                ];
                assert!(ended.contains(&error.kind()), "{stream:?}: {error}");
            }
            for pair in &mut within {
                pair.works().unwrap();
            }
            for pair in &out {
                let address = pair.listener.local_addr().unwrap();
                let host = match address.ip() {
                    ip if ip.is_unspecified() => "10.77.0.1".parse().unwrap(),
                    ip => ip,
                };
                TcpStream::connect((host, address.port())).expect("listeners stay");
            }
            reset()
                .await
                .expect("again, and with connections that are ending");
        });
    }

    #[test]
    fn a_connection_cut_short_is_none() {
        assert_eq!(Connection::parse(&[0; 51]), None);
        assert!(Connection::parse(&[0; 52]).is_some());
    }
}
