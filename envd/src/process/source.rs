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

use crate::{
    descriptors::{self, Watched},
    keeper::{Item, Slot},
    output::Output,
    terminal::{self, Terminal},
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
    Pipe(Watched),
    /// Watched apart from the side that is written to.
    Terminal(Arc<Terminal>, Side, Watched),
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
        Ok(Self::Pipe(Watched::new(end)))
    }

    /// Our side of a terminal.
    pub(super) fn terminal(terminal: Arc<Terminal>, side: Side) -> io::Result<Self> {
        let ours = terminal.descriptor().try_clone_to_owned()?;
        Ok(Self::Terminal(terminal, side, Watched::new(ours)))
    }

    /// As it was left; what was not is at its end.
    pub(super) fn left(item: &mut Item, slot: Slot) -> Self {
        let end = item.descriptor(slot);
        end.map_or(Self::Nothing, |end| Self::Pipe(Watched::new(end)))
    }

    /// What the next daemon needs of it.
    pub(super) fn descriptors(&self, slot: Slot) -> Vec<(Slot, BorrowedFd<'_>)> {
        match self {
            Self::Nothing => Vec::new(),
            Self::Pipe(pipe) => vec![(slot, pipe.as_fd())],
            Self::Terminal(terminal, side, _) => vec![
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

    fn watched(&mut self) -> Option<&mut Watched> {
        match self {
            Self::Nothing => None,
            Self::Pipe(watched) | Self::Terminal(_, _, watched) => Some(watched),
        }
    }

    /// Waits until there is something; whether nobody writes any more, so that what is there is the last.
    pub(super) async fn ready(&mut self) -> io::Result<bool> {
        match self.watched() {
            Some(watched) => watched.ready().await,
            None => Ok(true),
        }
    }

    /// How many bytes are there. Whoever writes more is not noticed before the next [`take`](Self::take).
    pub(super) fn look_away(&mut self) -> io::Result<usize> {
        self.watched().map_or(Ok(0), |watched| {
            watched.look_away();
            watched.waiting()
        })
    }

    /// Waits until there is something, and lets the output take of it; 0 at the end. Cancel-safe.
    pub(super) async fn take(&mut self, output: &Output) -> io::Result<usize> {
        match self {
            Self::Nothing => Ok(0),
            Self::Pipe(pipe) => pipe.read(|pipe| output.take(pipe, CHUNK)).await,
            Self::Terminal(_, side, watched) => {
                let rest = side.take(output)?;
                if rest > 0 {
                    return Ok(rest);
                }
                let enter = side.enter.as_fd();
                let moved = watched.read(|ours| terminal::move_to(ours, enter, CHUNK));
                if moved.await? == 0 {
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
            Self::Pipe(pipe) => output.take(pipe.as_fd(), CHUNK),
            Self::Terminal(_, side, _) => side.take(output),
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
