//! Name servers of slots: what a guest asks any server on port 53 comes here, so that rules can speak of names.
//!
//! A forwarder listens in its slot's namespace, on the gateway's address, and asks the node's own name servers from the host. Names
//! that are not let through are answered with NXDOMAIN, which ends a look-up at once; the addresses of names that a rule lets through
//! are opened in the slot's firewall before the guest sees them. Everything a guest can make it hold is bounded.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use hickory_proto::op::ResponseCode;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::{Semaphore, watch},
    task::JoinSet,
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::message::{Answer, Policy, Question, Verdict};
use super::{SlotError, SlotIndex, firewall::Names, namespace};

mod message;

/// Questions of one slot at once, by UDP; more are not answered, and asked again by who wants to know.
const QUESTIONS: usize = 32;
/// Connections of one slot at once.
const CONNECTIONS: usize = 8;
/// Questions of all slots at once.
const ALL_QUESTIONS: usize = 1024;
/// Bytes of a question, and of an answer by UDP.
const MESSAGE: usize = 4096;
/// How long one name server has.
const SERVER_TIME: Duration = Duration::from_secs(2);
/// Name servers that are tried; resolvers give up after 5 s.
const SERVERS: usize = 2;
/// How long a connection may be silent.
const IDLE: Duration = Duration::from_secs(10);
/// Addresses stay open for as long as the answer says, but so long at least, since programs keep them a while.
const OPEN_AT_LEAST: Duration = Duration::from_mins(1);
/// Beyond the time an answer says: for the way to the guest, and the time until it connects.
const GRACE: Duration = Duration::from_secs(30);

/// The node's name servers, shared by all slots.
#[derive(Debug)]
pub(super) struct Upstream {
    servers: Vec<SocketAddr>,
    questions: Semaphore,
}

impl Upstream {
    pub(super) fn new(servers: Vec<SocketAddr>) -> Self {
        Self {
            servers,
            questions: Semaphore::new(ALL_QUESTIONS),
        }
    }

    /// The answer of the first server that gives one.
    async fn ask(&self, question: &Question, way: Way) -> Option<Answer> {
        let _permit = self.questions.try_acquire().ok()?;
        for server in self.servers.iter().take(SERVERS) {
            let asked = async {
                match way {
                    Way::Udp => ask_by_udp(question, *server).await,
                    Way::Tcp => ask_by_tcp(question, *server).await,
                }
            };
            match timeout(SERVER_TIME, asked).await {
                Ok(Ok(answer)) => return Some(answer),
                Ok(Err(error)) => tracing::debug!(%error, %server, "a name server failed"),
                Err(_) => tracing::debug!(%server, "a name server is silent"),
            }
        }
        None
    }
}

#[derive(Debug, Clone, Copy)]
enum Way {
    Udp,
    Tcp,
}

async fn ask_by_udp(question: &Question, server: SocketAddr) -> io::Result<Answer> {
    let any: SocketAddr = if server.is_ipv4() {
        (Ipv4Addr::UNSPECIFIED, 0).into()
    } else {
        (Ipv6Addr::UNSPECIFIED, 0).into()
    };
    // A socket for each question: its port is as hard to guess as its ID.
    let socket = UdpSocket::bind(any).await?;
    socket.connect(server).await?;
    let id = rand::random();
    socket.send(&question.to_server(id)?).await?;
    let mut buffer = vec![0; MESSAGE];
    loop {
        let length = socket.recv(&mut buffer).await?;
        // Anything else is somebody's guess.
        if let Some(answer) = question.answer(id, buffer.get(..length).unwrap_or_default()) {
            return Ok(answer);
        }
    }
}

async fn ask_by_tcp(question: &Question, server: SocketAddr) -> io::Result<Answer> {
    let mut stream = TcpStream::connect(server).await?;
    let id = rand::random();
    write_message(&mut stream, &question.to_server(id)?).await?;
    let answer = read_message(&mut stream, usize::from(u16::MAX)).await?;
    question
        .answer(id, &answer)
        .ok_or_else(|| io::ErrorKind::InvalidData.into())
}

async fn read_message(stream: &mut TcpStream, limit: usize) -> io::Result<Vec<u8>> {
    let length = usize::from(stream.read_u16().await?);
    if length > limit {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut message = vec![0; length];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

async fn write_message(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(|_| io::ErrorKind::InvalidData)?;
    stream
        .write_all(&[&length.to_be_bytes(), message].concat())
        .await
}

/// A slot's name server, until it is stopped or dropped.
#[derive(Debug)]
pub(super) struct Forwarder {
    policy: watch::Sender<Arc<Policy>>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Forwarder {
    /// Listens in a slot.
    pub(super) async fn start(
        index: SlotIndex,
        upstream: Arc<Upstream>,
        policy: Policy,
    ) -> Result<Self, SlotError> {
        let bind = move || {
            namespace::enter(index, || {
                let failed = SlotError::system("name server of the slot");
                let address = (super::GATEWAY_ADDRESS, 53);
                let udp = std::net::UdpSocket::bind(address).map_err(&failed)?;
                let tcp = std::net::TcpListener::bind(address).map_err(&failed)?;
                udp.set_nonblocking(true).map_err(&failed)?;
                tcp.set_nonblocking(true).map_err(&failed)?;
                Ok((udp, tcp, Names::open()?))
            })
        };
        let (udp, tcp, names) = super::blocking(bind).await?;
        let failed = SlotError::system("name server of the slot");
        let (udp, tcp) = (
            UdpSocket::from_std(udp).map_err(&failed)?,
            TcpListener::from_std(tcp).map_err(&failed)?,
        );
        let (sender, receiver) = watch::channel(Arc::new(policy));
        let server = Arc::new(Server {
            policy: receiver,
            upstream,
            names: Mutex::new(names),
        });
        let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
        tasks.spawn(
            stop.clone()
                .run_until_cancelled_owned(serve_udp(Arc::clone(&server), udp)),
        );
        tasks.spawn(
            stop.clone()
                .run_until_cancelled_owned(serve_tcp(server, tcp)),
        );
        tasks.close();
        Ok(Self {
            policy: sender,
            stop,
            tasks,
        })
    }

    /// What holds from the next question on.
    pub(super) fn set(&self, policy: Policy) {
        self.policy.send_replace(Arc::new(policy));
    }

    /// Ends it; its sockets are closed then.
    pub(super) async fn stop(self) {
        self.stop.cancel();
        self.tasks.wait().await;
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

#[derive(Debug)]
struct Server {
    policy: watch::Receiver<Arc<Policy>>,
    upstream: Arc<Upstream>,
    names: Mutex<Names>,
}

async fn serve_udp(server: Arc<Server>, socket: UdpSocket) {
    let socket = Arc::new(socket);
    let mut asked = JoinSet::new();
    let mut buffer = vec![0; MESSAGE];
    loop {
        tokio::select! {
            Some(_) = asked.join_next() => {}
            received = socket.recv_from(&mut buffer) => match received {
                Ok((length, from)) if asked.len() < QUESTIONS => {
                    let question = buffer.get(..length).unwrap_or_default().to_vec();
                    let (server, socket) = (Arc::clone(&server), Arc::clone(&socket));
                    asked.spawn(async move {
                        if let Some(answer) = server.answer(&question, Way::Udp).await
                            && let Err(error) = socket.send_to(&answer, from).await
                        {
                            tracing::debug!(%error, "a guest does not get its answer");
                        }
                    });
                }
                Ok(_) => {}
                // Such as an answer that found its asker's port closed.
                Err(error) => {
                    tracing::debug!(%error, "a slot's name server cannot receive");
                    tokio::task::yield_now().await;
                }
            },
        }
    }
}

async fn serve_tcp(server: Arc<Server>, listener: TcpListener) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = connections.join_next() => {}
            accepted = listener.accept(), if connections.len() < CONNECTIONS => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(serve_connection(Arc::clone(&server), stream));
                }
                Err(error) => {
                    tracing::debug!(%error, "a slot's name server cannot accept");
                    tokio::task::yield_now().await;
                }
            },
        }
    }
}

async fn serve_connection(server: Arc<Server>, mut stream: TcpStream) {
    while let Ok(Ok(question)) = timeout(IDLE, read_message(&mut stream, MESSAGE)).await {
        let Some(answer) = server.answer(&question, Way::Tcp).await else {
            return;
        };
        if !matches!(
            timeout(IDLE, write_message(&mut stream, &answer)).await,
            Ok(Ok(()))
        ) {
            return;
        }
    }
}

impl Server {
    /// The answer to a message, if it is to have one.
    async fn answer(self: &Arc<Self>, message: &[u8], way: Way) -> Option<Vec<u8>> {
        let question = match Question::read(message) {
            Ok(question) => question,
            Err(answer) => return answer,
        };
        let policy = Arc::clone(&self.policy.borrow());
        let verdict = policy.judge(&question);
        if verdict == Verdict::Withhold {
            return question.refusal(ResponseCode::NXDomain);
        }
        let Some(answer) = self.upstream.ask(&question, way).await else {
            return question.refusal(ResponseCode::ServFail);
        };
        if let Verdict::Open(mark) = verdict {
            if let Err(error) = self.open(&answer, mark).await {
                tracing::warn!(%error, "addresses of a name cannot be let through");
                return question.refusal(ResponseCode::ServFail);
            }
        } else if policy.withholds(&answer) {
            return question.refusal(ResponseCode::NXDomain);
        }
        let limit = match way {
            Way::Udp => question.udp_limit(),
            Way::Tcp => usize::from(u16::MAX),
        };
        question.pass_on(answer, limit)
    }

    async fn open(self: &Arc<Self>, answer: &Answer, mark: u32) -> io::Result<()> {
        let addresses = answer.addresses();
        if addresses.is_empty() {
            return Ok(());
        }
        let server = Arc::clone(self);
        tokio::task::spawn_blocking(move || {
            let mut names = server.names.lock().unwrap_or_else(PoisonError::into_inner);
            for (address, time) in addresses {
                names.let_through(address, mark, time.max(OPEN_AT_LEAST) + GRACE)?;
            }
            Ok(())
        })
        .await?
    }
}

pub(super) use message::Policy as NamePolicy;
