//! Descriptors of others, as the runtime waits for them.
#![allow(unsafe_code)] // ioctl; and the runtime asks for a promise about the lifetime of descriptors

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
    sync::Arc,
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::memfd::{MFdFlags, memfd_create},
};
use tokio::io::{Interest, unix::AsyncFd};

/// Lets the runtime wait for it.
pub(crate) fn register(descriptor: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an owned descriptor is open, and the same, for as long as it is owned.
    unsafe { AsyncFd::register_with_interest(descriptor, interest) }.map_err(io::Error::from)
}

/// A pipe or a terminal that is waited for only while nothing of it is known: whoever writes to one that the runtime watches wakes a thread at
/// every write, however long nobody will read.
#[derive(Debug)]
pub(crate) struct Watched {
    descriptor: Arc<OwnedFd>,
    watch: Option<AsyncFd<Arc<OwnedFd>>>,
}

impl Watched {
    /// One that does not block.
    pub(crate) fn new(descriptor: OwnedFd) -> Self {
        Self {
            descriptor: Arc::new(descriptor),
            watch: None,
        }
    }

    fn watch(&mut self) -> io::Result<&AsyncFd<Arc<OwnedFd>>> {
        let watch = if let Some(watch) = self.watch.take() {
            watch
        } else {
            let descriptor = Arc::clone(&self.descriptor);
            // SAFETY: what the watch owns is the same descriptor, open, for as long as it is owned.
            unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE)? }
        };
        Ok(self.watch.insert(watch))
    }

    /// Waits until something can be read; whether nobody writes any more.
    pub(crate) async fn ready(&mut self) -> io::Result<bool> {
        let ready = self.watch()?.readable().await?;
        Ok(ready.ready().is_read_closed())
    }

    /// Nobody is woken by what is written from now on.
    pub(crate) fn look_away(&mut self) {
        self.watch = None;
    }

    /// Reads in some way that does not block, as soon as that gives something. Cancel-safe.
    pub(crate) async fn read<T>(
        &mut self,
        mut read: impl FnMut(BorrowedFd<'_>) -> io::Result<T>,
    ) -> io::Result<T> {
        if self.watch.is_none() {
            match read(self.descriptor.as_fd()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => return read,
            }
        }
        let watch = self.watch()?;
        loop {
            let mut ready = watch.readable().await?;
            if let Ok(read) = ready.try_io(|it| read(it.get_ref().as_fd())) {
                return read;
            }
        }
    }

    /// How many bytes are there, as far as the kernel says (FIONREAD of ioctl_tty(2)).
    pub(crate) fn waiting(&self) -> io::Result<usize> {
        let mut count = 0;
        // SAFETY: the descriptor is open, and the kernel writes no more than the number.
        unsafe { bytes_to_read(self.descriptor.as_raw_fd(), &raw mut count) }?;
        Ok(usize::try_from(count).unwrap_or_default())
    }
}

impl AsFd for Watched {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// A file in memory, of zeroes (memfd_create(2)).
pub(crate) fn memory_file(name: &str, length: u64) -> io::Result<File> {
    let file = File::from(memfd_create(name, MFdFlags::MFD_CLOEXEC)?);
    file.set_len(length)?;
    Ok(file)
}

/// Calls on it fail rather than wait.
pub(crate) fn set_nonblocking(descriptor: &OwnedFd) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(descriptor, FcntlArg::F_GETFL)?);
    fcntl(descriptor, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

nix::ioctl_read_bad!(bytes_to_read, nix::libc::FIONREAD, nix::libc::c_int);
