//! Pseudoterminals (pty(7)): what a process with a terminal has for stdin, stdout and stderr, and our side of it.
#![allow(unsafe_code)] // ioctl

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, FdFlag, SpliceFFlags, fcntl, splice},
    pty::{Winsize, openpty},
    sys::termios::{InputFlags, SetArg, tcgetattr, tcsetattr},
    unistd::{Gid, Uid, fchown, write},
};
use proto::envd::v1::TerminalSize;
use tokio::io::{Interest, unix::AsyncFd};

use crate::{descriptors, users::User};

/// What the group `tty` is in every distribution; write(1) is of it.
const TTY_GROUP: u32 = 5;
/// VEOF as a terminal begins with it (termios(3)).
pub(crate) const END_OF_FILE: u8 = 4;

nix::ioctl_write_ptr_bad!(set_size, nix::libc::TIOCSWINSZ, Winsize);
nix::ioctl_read_bad!(get_size, nix::libc::TIOCGWINSZ, Winsize);

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

/// Moves what the process wrote from our side into a pipe that has room; 0 once nobody has the terminal open any more.
pub(crate) fn move_to(
    ours: BorrowedFd<'_>,
    pipe: BorrowedFd<'_>,
    most: usize,
) -> io::Result<usize> {
    match splice(
        ours,
        None,
        pipe,
        None,
        most,
        SpliceFFlags::SPLICE_F_NONBLOCK,
    ) {
        // All other sides are closed.
        Err(Errno::EIO) => Ok(0),
        moved => moved.map_err(io::Error::from),
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
        descriptors::set_nonblocking(&ours)?;
        let mut settings = tcgetattr(&theirs)?;
        // Erasing erases a character, not a byte of it.
        settings.input_flags |= InputFlags::IUTF8;
        tcsetattr(&theirs, SetArg::TCSANOW, &settings)?;
        if Uid::effective().is_root() {
            let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(TTY_GROUP));
            fchown(theirs.as_fd(), Some(uid), Some(gid))?;
        }
        Ok((Self::left(ours)?, theirs))
    }

    /// The terminal of a process that is there already.
    pub(crate) fn left(ours: OwnedFd) -> io::Result<Self> {
        let ours = descriptors::register(ours, Interest::WRITABLE)?;
        Ok(Self { ours })
    }

    /// Our side, for the next daemon.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.ours.get_ref().as_fd()
    }

    /// Waits until it may take something.
    pub(crate) async fn writable(&self) -> io::Result<()> {
        self.ours.writable().await?.retain_ready();
        Ok(())
    }

    /// Types; how much of it the terminal took.
    pub(crate) fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        let type_in = |ours: &OwnedFd| write(ours.as_fd(), bytes).map_err(io::Error::from);
        self.ours.try_io(Interest::WRITABLE, type_in)
    }

    /// Its size, if it says so.
    pub(crate) fn size(&self) -> Option<TerminalSize> {
        let mut size = Winsize {
            ws_row: 0,
            ws_col: 0,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: the descriptor is open, and the kernel writes no more than the size.
        unsafe { get_size(self.ours.get_ref().as_raw_fd(), &raw mut size) }.ok()?;
        Some(TerminalSize {
            rows: size.ws_row.into(),
            cols: size.ws_col.into(),
        })
    }

    /// Tells its size; the processes in front of it get SIGWINCH.
    pub(crate) fn resize(&self, size: TerminalSize) -> io::Result<()> {
        let size = winsize(size);
        // SAFETY: the descriptor is open, and the size outlives the call.
        unsafe { set_size(self.ours.get_ref().as_raw_fd(), &raw const size) }?;
        Ok(())
    }
}

/// Makes the terminal that is stdin the controlling one of a new session. For a child between fork and exec.
pub(crate) fn take_control() -> io::Result<()> {
    // SAFETY: ioctl(2) is one system call; the argument is a number.
    match unsafe { nix::libc::ioctl(0, nix::libc::TIOCSCTTY, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
