//! The channel as a vsock (vsock(7)): the host connects, the guest listens.
//!
//! Each connection is one host, and the newest is the one that counts: where a connection's end is not told, as over a snapshot, the
//! next one ends it. So a stream watches the listener too, and reads the end of itself when another connection is there.

#![allow(
    unsafe_code,
    reason = "tokio asks for a promise about the lifetime of descriptors"
)]

use std::{
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
};

use nix::{
    libc,
    sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept4, bind, getpeername, listen,
        socket,
    },
};
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf, unix::AsyncFd},
    net::UnixStream,
};

use super::Channel;

/// Where hosts connect.
pub trait Listen: Send + Sync + 'static {
    /// The next connection, if one waits.
    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<UnixStream>>;
}

/// A vsock that listens.
#[derive(Debug)]
pub struct VsockListener(AsyncFd<OwnedFd>);

impl VsockListener {
    /// Listens on a port, under whatever address this guest has: it may get another by a restore.
    pub fn bind(port: u32) -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Vsock,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            None,
        )?;
        bind(
            socket.as_raw_fd(),
            &VsockAddr::new(libc::VMADDR_CID_ANY, port),
        )?;
        listen(&socket, Backlog::new(4)?)?;
        // SAFETY: the `AsyncFd` owns the descriptor, which stays the same and open until it is dropped.
        let socket = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE)? };
        Ok(Self(socket))
    }
}

impl Listen for VsockListener {
    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<UnixStream>> {
        loop {
            let mut ready = ready!(self.0.poll_read_ready(cx))?;
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let accepted = ready.try_io(|socket| {
                let accepted = accept4(socket.as_raw_fd(), flags)?;
                // SAFETY: accept4(2) has just opened it, and nobody else knows it.
                Ok(unsafe { OwnedFd::from_raw_fd(accepted) })
            });
            let Ok(accepted) = accepted else { continue };
            let accepted = accepted?;
            // A process of this guest's cannot be the node.
            let peer = getpeername::<VsockAddr>(accepted.as_raw_fd());
            if peer.map(|peer| peer.cid()) != Ok(libc::VMADDR_CID_HOST) {
                continue;
            }
            // read(2), write(2) and shutdown(2) ask no stream socket for its family.
            return Poll::Ready(UnixStream::from_std(accepted.into()));
        }
    }
}

impl Listen for tokio::net::UnixListener {
    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<UnixStream>> {
        Poll::Ready(Ok(ready!(self.poll_accept(cx))?.0))
    }
}

/// Serves whoever connected last.
#[derive(Debug)]
pub struct VsockChannel<L> {
    shared: Arc<Shared<L>>,
}

#[derive(Debug)]
struct Shared<L> {
    listener: L,
    /// A connection that nobody has yet.
    next: Mutex<Option<UnixStream>>,
}

impl<L: Listen> Shared<L> {
    /// Ready once a connection waits; the newest one is kept.
    fn poll_next(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        while let Poll::Ready(accepted) = self.listener.poll_accept(cx) {
            *next = Some(accepted?);
        }
        if next.is_some() {
            Poll::Ready(Ok(()))
        } else {
            Poll::Pending
        }
    }
}

impl<L: Listen> VsockChannel<L> {
    /// The channel of a listener.
    pub fn new(listener: L) -> Self {
        Self {
            shared: Arc::new(Shared {
                listener,
                next: Mutex::default(),
            }),
        }
    }
}

impl<L: Listen> Channel for VsockChannel<L> {
    type Stream = VsockStream<L>;

    fn connected(&mut self) -> io::Result<Option<VsockStream<L>>> {
        let next = self.shared.next.lock();
        let stream = next.unwrap_or_else(PoisonError::into_inner).take();
        Ok(stream.map(|stream| VsockStream {
            stream,
            shared: Arc::clone(&self.shared),
        }))
    }

    async fn wait(&mut self) -> io::Result<()> {
        std::future::poll_fn(|cx| self.shared.poll_next(cx)).await
    }
}

/// A connection, until there is a newer one.
#[derive(Debug)]
pub struct VsockStream<L> {
    stream: UnixStream,
    shared: Arc<Shared<L>>,
}

impl<L: Listen> AsyncRead for VsockStream<L> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.shared.poll_next(cx).is_ready() {
            // Also where the listener failed: that is found out by who waits for it.
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_read(cx, into)
    }
}

impl<L: Listen> AsyncWrite for VsockStream<L> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
