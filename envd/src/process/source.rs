//! Where output comes from, and how it gets to where it is kept.

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    sync::Arc,
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    unistd::pipe2,
};
use tokio::io::{Interest, unix::AsyncFd};

use crate::{
    descriptors,
    keeper::{Item, Slot},
    output::Output,
    terminal::Terminal,
};

/// Taken at once.
const CHUNK: usize = 64 << 10;
/// What a pipe holds (pipe(7), `F_SETPIPE_SZ`): a process that writes much in small pieces must not wait at a full one while they are gathered.
const PIPE: i32 = 256 << 10;
/// What a pipe can hold at most, unless root in the guest allows more (`pipe-max-size` of proc_sys_fs(5)).
pub(super) const LARGEST_PIPE: u64 = 1 << 20;

const SMALL: usize = 16 << 10;
/// The kernel gives no more of a terminal at once than 4 KiB (drivers/tty/n_tty.c, `N_TTY_BUF_SIZE`).
const SMALL_AT_TERMINAL: usize = 2 << 10;

/// One stream.
#[derive(Debug)]
pub(super) enum Source {
    Nothing,
    Pipe(AsyncFd<OwnedFd>),
    Terminal(Arc<Terminal>, Side),
}

impl Source {
    /// From our end of a new pipe.
    pub(super) fn pipe(end: Option<impl Into<OwnedFd>>) -> io::Result<Self> {
        let Some(end) = end.map(Into::into) else {
            return Ok(Self::Nothing);
        };
        // One of the usual size does as well.
        let _ = fcntl(&end, FcntlArg::F_SETPIPE_SZ(PIPE));
        descriptors::set_nonblocking(&end)?;
        Self::pipe_again(end)
    }

    fn pipe_again(end: OwnedFd) -> io::Result<Self> {
        Ok(Self::Pipe(descriptors::register(end, Interest::READABLE)?))
    }

    /// As it was left; what was not is at its end.
    pub(super) fn left(item: &mut Item, slot: Slot) -> io::Result<Self> {
        let end = item.descriptor(slot);
        end.map_or(Ok(Self::Nothing), Self::pipe_again)
    }

    /// What the next daemon needs of it.
    pub(super) fn descriptors(&self, slot: Slot) -> Vec<(Slot, BorrowedFd<'_>)> {
        match self {
            Self::Nothing => Vec::new(),
            Self::Pipe(pipe) => vec![(slot, pipe.get_ref().as_fd())],
            Self::Terminal(terminal, side) => vec![
                (Slot::Terminal, terminal.descriptor()),
                (Slot::FromTerminal, side.leave.as_fd()),
                (Slot::ToTerminal, side.enter.as_fd()),
            ],
        }
    }

    /// Less than so many bytes are a small write: a program that writes much fills most of what there is room for.
    pub(super) fn small(&self) -> usize {
        match self {
            Self::Nothing | Self::Pipe(_) => SMALL,
            Self::Terminal(..) => SMALL_AT_TERMINAL,
        }
    }

    /// Waits until there is something; whether nobody writes any more, so that what is there is the last.
    pub(super) async fn ready(&self) -> io::Result<bool> {
        match self {
            Self::Nothing => Ok(true),
            Self::Pipe(pipe) => Ok(pipe.readable().await?.ready().is_read_closed()),
            Self::Terminal(terminal, _) => terminal.ready().await,
        }
    }

    /// Waits until there is something, and lets the output take of it; 0 at the end. Cancel-safe.
    pub(super) async fn take(&self, output: &Output) -> io::Result<usize> {
        match self {
            Self::Nothing => Ok(0),
            Self::Pipe(pipe) => loop {
                let mut ready = pipe.readable().await?;
                let taken = ready.try_io(|pipe| output.take(pipe.get_ref().as_fd(), CHUNK));
                if let Ok(taken) = taken {
                    return taken;
                }
            },
            Self::Terminal(terminal, side) => {
                let rest = side.take(output)?;
                if rest > 0 {
                    return Ok(rest);
                }
                if terminal.move_to(side.enter.as_fd(), CHUNK).await? == 0 {
                    return Ok(0);
                }
                side.take(output)
            }
        }
    }

    /// What a pipe holds, without waiting, nor asking the runtime whether it has seen that there is something. A terminal's rest is the kernel's:
    /// it is gone with its last user.
    pub(super) fn take_rest(&self, output: &Output) {
        let mut left = LARGEST_PIPE;
        let take = || match self {
            Self::Nothing => Ok(0),
            Self::Pipe(pipe) => output.take(pipe.get_ref().as_fd(), CHUNK),
            Self::Terminal(_, side) => side.take(output),
        };
        while left > 0
            && let Ok(count @ 1..) = take()
        {
            left = left.saturating_sub(count as u64);
        }
    }
}

/// A pipe between a terminal and memory: the kernel moves bytes from or to a pipe only (splice(2)).
#[derive(Debug)]
pub(super) struct Side {
    leave: OwnedFd,
    enter: OwnedFd,
}

impl Side {
    pub(super) fn new() -> io::Result<Self> {
        let (leave, enter) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        Ok(Self { leave, enter })
    }

    /// As it was left, with what is in it.
    pub(super) fn left(item: &mut Item) -> Option<Self> {
        Some(Self {
            leave: item.descriptor(Slot::FromTerminal)?,
            enter: item.descriptor(Slot::ToTerminal)?,
        })
    }

    /// 0 if there is nothing in it.
    fn take(&self, output: &Output) -> io::Result<usize> {
        match output.take(self.leave.as_fd(), CHUNK) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            taken => taken,
        }
    }
}
