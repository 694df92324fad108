//! envd: the daemon inside the guest, and the guest's init.
//!
//! [`boot`] turns a bare kernel into a system: modules, disks, overlay. Then the services in [`api`] are served over the guest
//! link, one HTTP/2 connection per epoch. [`process`] runs commands and keeps their output ([`output`]), [`reap`] is PID 1's duty to
//! collect what has ended, [`group`] a cgroup for each, [`terminal`] what a shell has for stdin and stdout, [`users`] knows who is who,
//! [`files`] acts as them, for gRPC and, in [`web`], for plain HTTP, [`ports`] knows who listens, [`usage`] what the guest uses, [`logs`] what its kernel and envd have said; [`spans`]
//! tells the node how calls went.
//!
//! [`identity`] makes the guest a session's, with its [`network`] and without the [`connections`] of whoever it was before; [`snapshot`]
//! gets it ready to be kept or copied, with the [`freezer`]. The [`gate`] is between them: nothing but health, reflection and the node's own
//! calls is answered before Configure has succeeded, or between a snapshot's preparation and the next Configure.

use std::{convert::Infallible, error::Error, io, path::Path, pin::Pin, sync::Arc, task};

use guest_link::guest::{
    Channel, Link, Listener,
    unix::UnixChannel,
    vport::Vport,
    vsock::{VsockChannel, VsockListener},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::server::{Connected, Server};

pub mod api;
mod boot;
mod connections;
mod errors;
mod files;
mod freezer;
mod gate;
mod group;
mod identity;
mod logs;
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
use ports::Ports;
use process::Processes;
use spans::{Spans, Trace};

const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 8 << 20;
const FRAME: u32 = 64 << 10;
const MAX_STREAMS: u32 = 100_000;
const LARGEST_MESSAGE: usize = 4 << 20;

type Failure = Box<dyn Error + Send + Sync>;

/// Brings the guest up as PID 1 and serves until it is powered off.
pub fn init() -> Result<(), Failure> {
    let device = boot::bring_up()?;
    spawn::raise_own_limits();
    runtime()?.block_on(async {
        let freezer = Freezer::new(boot::CGROUPS.into())
            .map_err(|error| format!("the cgroup of users' processes: {error}"))?;
        let guest = Arc::new(Guest::new(true, Some(freezer)));
        let processes = Processes::new(Arc::clone(&guest));
        tokio::spawn(reap::run(processes.clone()));
        tokio::spawn(logs::kmsg::follow());
        match device {
            boot::LinkDevice::Port(port) => {
                serve(Vport::open(&port)?, guest, processes, Spans::default()).await;
            }
            boot::LinkDevice::Vsock => {
                let listener = VsockListener::bind(guest_link::VSOCK_PORT)?;
                let channel = VsockChannel::new(listener);
                serve(channel, guest, processes, Spans::default()).await;
            }
        }
        Ok(())
    })
}

/// Serves over a unix socket with the guest link's framing; for tests. The host's clock, name and network are left alone. Processes can be
/// frozen if there is a cgroup (v2) of their own for them.
pub fn serve_on_socket(socket: &Path, cgroup: Option<&Path>) -> Result<(), Failure> {
    runtime()?.block_on(async {
        let channel = UnixChannel::bind(socket)?;
        let freezer = cgroup.map(|folder| Freezer::new(folder.to_owned()));
        let guest = Arc::new(Guest::new(false, freezer.transpose()?));
        let processes = Processes::new(Arc::clone(&guest));
        tokio::spawn(reap::run(processes.clone()));
        tokio::spawn(logs::kmsg::follow());
        serve(channel, guest, processes, Spans::default()).await;
        Ok(())
    })
}

fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
}

/// Serves one epoch after the other; an older one ends when its host is gone.
async fn serve<C: Channel>(channel: C, guest: Arc<Guest>, processes: Processes, spans: Spans) {
    let mut listener = Listener::new(channel);
    let ports = Ports::new(Arc::clone(&guest));
    loop {
        let link = listener.accept().await;
        let (guest, processes, spans) = (Arc::clone(&guest), processes.clone(), spans.clone());
        let ports = ports.clone();
        tokio::spawn(async move {
            if let Err(error) = serve_link(link, guest, processes, ports, spans).await {
                logs::warn(format_args!("an epoch ended: {error}"));
            }
        });
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
        .serve_with_incoming(OneConnection(Some(Epoch(link))))
        .await?;
    Ok(())
}

/// A stream of one connection that stays open, so that the server serves it to its end.
struct OneConnection(Option<Epoch>);

impl tokio_stream::Stream for OneConnection {
    type Item = Result<Epoch, Infallible>;

    fn poll_next(
        mut self: Pin<&mut Self>,
        _: &mut task::Context<'_>,
    ) -> task::Poll<Option<Self::Item>> {
        task::Poll::Ready(self.0.take().map(Ok))
    }
}

/// A link as tonic wants it.
struct Epoch(Link);

impl Connected for Epoch {
    type ConnectInfo = ();
    fn connect_info(&self) {}
}

impl AsyncRead for Epoch {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut task::Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> task::Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Epoch {
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
