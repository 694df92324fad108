//! envd: the daemon inside the guest, and the guest's init.
//!
//! [`boot`] turns a bare kernel into a system: modules, disks, overlay. Then the services in [`api`] are served over the guest
//! link, one HTTP/2 connection per epoch. [`process`] runs commands and keeps their output ([`output`]), [`reap`] collects
//! what has ended, [`keeper`] is PID 1 and starts all of this again if it dies, [`group`] a cgroup for each, [`terminal`] what a shell has for stdin and stdout, [`users`] knows who is who,
//! [`files`] acts as them, for gRPC and, in [`web`], for plain HTTP, [`ports`] knows who listens, [`usage`] what the guest uses, [`memory`] when it gets little, [`logs`] what its kernel and envd have said; [`spans`]
//! tells the node how calls went.
//!
//! [`identity`] makes the guest a session's, with its [`network`] and without the [`connections`] of whoever it was before; [`snapshot`]
//! gets it ready to be kept or copied, with the [`freezer`]. The [`gate`] is between them: nothing but health, reflection and the node's own
//! calls is answered before Configure has succeeded, or between a snapshot's preparation and the next Configure.

use std::{convert::Infallible, error::Error, io, path::Path, pin::Pin, sync::Arc, task};

use guest_link::{
    Epoch,
    guest::{
        Channel, Link, Listener,
        unix::UnixChannel,
        vport::Vport,
        vsock::{VsockChannel, VsockListener},
    },
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::server::{Connected, Server};

pub mod api;
mod boot;
mod connections;
mod descriptors;
mod devices;
mod errors;
mod files;
mod freezer;
mod gate;
mod group;
mod identity;
mod keeper;
mod logs;
mod memory;
mod network;
mod output;
mod ports;
mod process;
mod reap;
mod snapshot;
mod sock_diag;
mod spans;
mod spawn;
mod terminal;
mod usage;
mod users;
mod web;

use freezer::Freezer;
use identity::Guest;
use keeper::{Keeper, Place, Slot};
use ports::Ports;
use process::Processes;
use spans::{Spans, Trace};

const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 8 << 20;
const FRAME: u32 = 64 << 10;
const MAX_STREAMS: u32 = 100_000;
const LARGEST_MESSAGE: usize = 4 << 20;

type Failure = Box<dyn Error + Send + Sync>;

/// Brings the guest up as PID 1 and keeps its daemon until it is powered off.
pub fn init() -> Result<(), Failure> {
    let place = match boot::bring_up()? {
        boot::LinkDevice::Port(port) => Place::Port(port),
        boot::LinkDevice::Vsock => Place::Vsock,
    };
    spawn::raise_own_limits();
    keeper::run(&place)
}

/// Keeps a daemon that serves over a unix socket with the guest link's framing; for tests. The host's clock, name and network are left alone.
/// Processes can be frozen if there is a cgroup (v2) of their own for them.
pub fn serve_on_socket(socket: &Path, cgroup: Option<&Path>) -> Result<(), Failure> {
    keeper::run(&Place::Socket(
        socket.to_owned(),
        cgroup.map(Path::to_owned),
    ))
}

/// Serves as the daemon of a keeper, which is at stdin.
pub fn work(arguments: &[String]) -> Result<(), Failure> {
    let place = Place::parse(arguments).ok_or("the keeper knows how to call it")?;
    let (keeper, mut kept) = Keeper::meet()?;
    runtime()?.block_on(async {
        logs::go_on(&keeper, &mut kept.guest)?;
        let cgroup = match &place {
            Place::Socket(_, cgroup) => cgroup.clone(),
            _ => Some(boot::CGROUPS.into()),
        };
        let freezer = cgroup
            .map(Freezer::new)
            .transpose()
            .map_err(|error| format!("the cgroup of users' processes: {error}"))?;
        let owns_system = !matches!(place, Place::Socket(..));
        let guest = Guest::left(owns_system, freezer, keeper.clone(), &mut kept.guest)?;
        let guest = Arc::new(guest);
        let processes = Processes::new(Arc::clone(&guest), keeper.clone());
        let restarts = guest.restarts;
        if restarts > 0 {
            logs::warn(format_args!(
                "the daemon died and was started again; restarts so far: {restarts}"
            ));
        }
        let epoch = kept.guest.number(Slot::Epoch);
        tokio::spawn(logs::kmsg::follow(
            keeper.clone(),
            kept.guest.file(Slot::Kmsg),
        ));
        if restarts > 0 {
            // Before any child is collected, or any call answered.
            processes.go_on(kept);
        }
        tokio::spawn(reap::run(processes.clone()));
        tokio::spawn(memory::watch(Arc::clone(&guest)));
        tokio::spawn(keeper.clone().listen(processes.clone()));
        let served = Served {
            guest,
            processes,
            keeper,
            epoch: epoch.map(Epoch::from_number),
        };
        match place {
            Place::Port(port) => served.run(Vport::open(&port)?).await,
            Place::Vsock => {
                let listener = VsockListener::bind(guest_link::VSOCK_PORT)?;
                served.run(VsockChannel::new(listener)).await;
            }
            Place::Socket(socket, _) => served.run(UnixChannel::bind(&socket)?).await,
        }
        Ok(())
    })
}

fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
}

/// What is served.
struct Served {
    guest: Arc<Guest>,
    processes: Processes,
    keeper: Keeper,
    /// The last of a daemon before.
    epoch: Option<Epoch>,
}

impl Served {
    /// Serves one epoch after the other; an older one ends when its host is gone.
    async fn run<C: Channel>(self, channel: C) {
        let mut listener = Listener::after(channel, self.epoch);
        self.keeper.ready();
        let ports = Ports::new(Arc::clone(&self.guest));
        let spans = Spans::default();
        loop {
            let link = listener.accept().await;
            let epoch = link.epoch().number().to_le_bytes();
            self.keeper.keep_of_guest(Slot::Epoch, &epoch);
            let (guest, processes) = (Arc::clone(&self.guest), self.processes.clone());
            let (ports, spans) = (ports.clone(), spans.clone());
            tokio::spawn(async move {
                if let Err(error) = serve_link(link, guest, processes, ports, spans).await {
                    logs::warn(format_args!("an epoch ended: {error}"));
                }
            });
        }
    }
}

async fn serve_link(
    link: Link,
    guest: Arc<Guest>,
    processes: Processes,
    ports: Ports,
    spans: Spans,
) -> Result<(), Failure> {
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter
        .set_service_status("", tonic_health::ServingStatus::Serving)
        .await;
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(proto::ENVD_DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let gate = api::Gate(Arc::clone(&guest));
    let process = api::process(processes.clone(), Arc::clone(&guest))
        .max_decoding_message_size(LARGEST_MESSAGE);
    let filesystem = api::filesystem(Arc::clone(&guest)).max_decoding_message_size(LARGEST_MESSAGE);
    Server::builder()
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME)
        .max_concurrent_streams(MAX_STREAMS)
        .layer(Trace(spans.clone()))
        .layer(web::Files(Arc::clone(&guest)))
        .add_service(health)
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?)
        .add_service(api::system(processes, guest, spans))
        .add_service(tonic::service::interceptor::InterceptedService::new(
            process,
            gate.clone(),
        ))
        .add_service(tonic::service::interceptor::InterceptedService::new(
            filesystem,
            gate.clone(),
        ))
        .add_service(tonic::service::interceptor::InterceptedService::new(
            api::port(ports),
            gate,
        ))
        .serve_with_incoming(OneConnection(Some(Connection(link))))
        .await?;
    Ok(())
}

/// A stream of one connection that stays open, so that the server serves it to its end.
struct OneConnection(Option<Connection>);

impl tokio_stream::Stream for OneConnection {
    type Item = Result<Connection, Infallible>;

    fn poll_next(
        mut self: Pin<&mut Self>,
        _: &mut task::Context<'_>,
    ) -> task::Poll<Option<Self::Item>> {
        task::Poll::Ready(self.0.take().map(Ok))
    }
}

/// A link as tonic wants it.
struct Connection(Link);

impl Connected for Connection {
    type ConnectInfo = ();
    fn connect_info(&self) {}
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut task::Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> task::Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut task::Context<'_>,
        bytes: &[u8],
    ) -> task::Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }
    fn poll_flush(
        mut self: Pin<&mut Self>,
        cx: &mut task::Context<'_>,
    ) -> task::Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }
    fn poll_shutdown(
        mut self: Pin<&mut Self>,
        cx: &mut task::Context<'_>,
    ) -> task::Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
