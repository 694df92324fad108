//! Descriptors of others, as the runtime waits for them.
#![allow(unsafe_code)] // the runtime asks for a promise about the lifetime of descriptors

use std::{fs::File, io, os::fd::OwnedFd};

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
