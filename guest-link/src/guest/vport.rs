//! The channel as a virtio-serial port, `/dev/vportNpM`.
//!
//! What the driver does (Linux 6.1, `drivers/char/virtio_console.c`): a port can be opened once; while no host is connected,
//! `poll` reports a hang-up and reads return 0 after the last buffered byte; a host's coming and going wakes whoever polls. And
//! what tokio does: readiness it saw once as "closed" stays so for the life of the registration, so a port registered during
//! a hang-up would make readers spin.
//!
//! Hence one open file for good, and a registration per connection: first wait until `poll(2)` shows no hang-up, then
//! register, and give the registration up at the first sign of a hang-up. The waiting is for an event as well: an epoll
//! instance of our own watches the port edge-triggered, so it fires once per wake-up of the port and not all the time; it
//! never hangs up itself, so tokio can watch *it*.

#![allow(
    unsafe_code,
    reason = "tokio asks for a promise about the lifetime of descriptors"
)]

use std::{
    fs::{File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::OpenOptionsExt as _,
    },
    path::Path,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use nix::{
    libc,
    poll::{PollFd, PollFlags, PollTimeout},
    sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf, unix::AsyncFd};

use super::Channel;

/// The port, open for the life of envd.
#[derive(Debug)]
pub struct Vport {
    port: Arc<File>,
    wakeups: AsyncFd<OwnedFd>,
}

impl Vport {
    /// Opens the port.
    pub fn open(device: &Path) -> io::Result<Self> {
        let port = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(device)?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let events = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
        epoll.add(&port, EpollEvent::new(events, 0))?;
        // SAFETY: the `AsyncFd` owns the descriptor, which stays the same and open until it is dropped.
        let wakeups = unsafe { AsyncFd::register_with_interest(epoll.0, Interest::READABLE)? };
        Ok(Self {
            port: Arc::new(port),
            wakeups,
        })
    }

    fn hung_up(&self) -> io::Result<bool> {
        let mut fds = [PollFd::new(self.port.as_fd(), PollFlags::POLLIN)];
        nix::poll::poll(&mut fds, PollTimeout::ZERO)?;
        let [fd] = fds;
        Ok(fd
            .revents()
            .is_some_and(|events| events.contains(PollFlags::POLLHUP)))
    }
}

impl Channel for Vport {
    type Stream = VportStream;

    fn connected(&mut self) -> io::Result<Option<VportStream>> {
        if self.hung_up()? {
            return Ok(None);
        }
        // SAFETY: the `AsyncFd` holds the file, whose descriptor stays the same and open until it is dropped.
        let port = unsafe { AsyncFd::register(Arc::clone(&self.port))? };
        Ok(Some(VportStream { port }))
    }

    async fn wait(&mut self) -> io::Result<()> {
        loop {
            // Taken before the look at the port: a wake-up after it is seen by the wait below.
            take_event(&self.wakeups)?;
            if !self.hung_up()? {
                return Ok(());
            }
            self.wakeups.readable().await?.clear_ready();
        }
    }
}

/// Takes the event that waits in our epoll instance, if any.
fn take_event(wakeups: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let epoll = Epoll(wakeups.get_ref().try_clone()?);
    epoll.wait(&mut [EpollEvent::empty()], EpollTimeout::ZERO)?;
    Ok(())
}

/// The port while a host is connected.
#[derive(Debug)]
pub struct VportStream {
    port: AsyncFd<Arc<File>>,
}

impl AsyncRead for VportStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut ready = ready!(self.port.poll_read_ready(cx))?;
            let closed = ready.ready().is_read_closed();
            let space = into.initialize_unfilled();
            match ready.try_io(|port| port.get_ref().as_ref().read(space)) {
                Ok(Ok(count)) => {
                    into.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                // Hung up and nothing left: a host may be back already, but it needs a new registration.
                Err(_) if closed => return Poll::Ready(Ok(())),
                Err(_) => {}
            }
        }
    }
}

impl AsyncWrite for VportStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut ready = ready!(self.port.poll_write_ready(cx))?;
            let closed = ready.ready().is_write_closed();
            match ready.try_io(|port| port.get_ref().as_ref().write(bytes)) {
                Ok(written) => return Poll::Ready(written),
                // Hung up: the reading half ends the stream, and wakes whoever waits for both.
                Err(_) if closed => return Poll::Pending,
                Err(_) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
