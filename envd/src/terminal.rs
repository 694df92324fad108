//! Pseudoterminals (pty(7)): what a process with a terminal has for stdin, stdout and stderr, and our side of it.
#![allow(unsafe_code)] // ioctl

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
};

use bytes::BytesMut;
use nix::{
    fcntl::{FcntlArg, FdFlag, OFlag, fcntl},
    pty::{Winsize, openpty},
    sys::termios::{InputFlags, SetArg, tcgetattr, tcsetattr},
    unistd::{Gid, Uid, fchown, read, write},
};
use proto::envd::v1::TerminalSize;
use tokio::io::unix::AsyncFd;

use crate::users::User;

/// What the group `tty` is in every distribution; write(1) is of it.
const TTY_GROUP: u32 = 5;
/// VEOF as a terminal begins with it (termios(3)).
pub(crate) const END_OF_FILE: u8 = 4;

nix::ioctl_write_ptr_bad!(set_size, nix::libc::TIOCSWINSZ, Winsize);

/// Our side. The terminal hangs up when it is dropped.
#[derive(Debug)]
pub(crate) struct Terminal {
    ours: AsyncFd<OwnedFd>,
}

fn winsize(size: TerminalSize) -> Winsize {
    let characters = |count: u32| u16::try_from(count).unwrap_or(u16::MAX);
    Winsize {
        ws_row: characters(size.rows),
        ws_col: characters(size.cols),
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

impl Terminal {
    /// Opens a new one of a user: our side, and the process's. No process may be started meanwhile: it would inherit them.
    pub(crate) fn open(size: TerminalSize, user: &User) -> io::Result<(Self, OwnedFd)> {
        let pair = openpty(Some(&winsize(size)), None)?;
        let (ours, theirs) = (pair.master, pair.slave);
        for side in [&ours, &theirs] {
            fcntl(side, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
        }
        fcntl(&ours, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        let mut settings = tcgetattr(&theirs)?;
        // Erasing erases a character, not a byte of it.
        settings.input_flags |= InputFlags::IUTF8;
        tcsetattr(&theirs, SetArg::TCSANOW, &settings)?;
        if Uid::effective().is_root() {
            let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(TTY_GROUP));
            fchown(theirs.as_fd(), Some(uid), Some(gid))?;
        }
        let ours = register(ours)?;
        Ok((Self { ours }, theirs))
    }

    /// Reads what the process wrote; 0 once nobody has the terminal open any more. Cancel-safe.
    pub(crate) async fn read(&self, into: &mut BytesMut, most: usize) -> io::Result<usize> {
        loop {
            let mut ready = self.ours.readable().await?;
            if let Ok(count) = ready.try_io(|ours| read_from(ours.get_ref(), into, most)) {
                return count;
            }
        }
    }

    /// Reads what the process has written already.
    pub(crate) fn try_read(&self, into: &mut BytesMut, most: usize) -> io::Result<usize> {
        read_from(self.ours.get_ref(), into, most)
    }

    /// Types; how much of it the terminal took. Cancel-safe.
    pub(crate) async fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            let mut ready = self.ours.writable().await?;
            let outcome = ready.try_io(|ours| write(ours.as_fd(), bytes).map_err(io::Error::from));
            if let Ok(count) = outcome {
                return count;
            }
        }
    }

    /// Tells its size; the processes in front of it get SIGWINCH.
    pub(crate) fn resize(&self, size: TerminalSize) -> io::Result<()> {
        let size = winsize(size);
        // SAFETY: the descriptor is open, and the size outlives the call.
        unsafe { set_size(self.ours.get_ref().as_raw_fd(), &raw const size) }?;
        Ok(())
    }
}

fn read_from(ours: &OwnedFd, into: &mut BytesMut, most: usize) -> io::Result<usize> {
    let start = into.len();
    into.resize(start + most, 0);
    let space = into.get_mut(start..).unwrap_or_default();
    let count = read(ours.as_fd(), space);
    into.truncate(start + *count.as_ref().unwrap_or(&0));
    match count {
        // All other sides are closed.
        Err(nix::errno::Errno::EIO) => Ok(0),
        count => count.map_err(io::Error::from),
    }
}

fn register(ours: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an owned descriptor is open, and the same, for as long as it is owned.
    unsafe { AsyncFd::register(ours) }.map_err(io::Error::from)
}

/// Makes the terminal that is stdin the controlling one of a new session. For a child between fork and exec.
pub(crate) fn take_control() -> io::Result<()> {
    // SAFETY: ioctl(2) is one system call; the argument is a number.
    match unsafe { nix::libc::ioctl(0, nix::libc::TIOCSCTTY, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
