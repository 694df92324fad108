//! A process's stdin: each byte once, by its offset.
//!
//! How much was written is kept where the next daemon finds it. The kernel does not count what is written to a pipe, so a daemon that is
//! killed in the very call may leave it open whether that went through: then it is said, once, from where to where.

use std::{
    fs::File,
    io,
    ops::Range,
    os::{
        fd::{AsFd as _, BorrowedFd},
        unix::fs::FileExt as _,
    },
    sync::Arc,
};

use bytes::Bytes;
use tokio::net::unix::pipe;
use tonic::{Code, Status};

use super::Process;
use crate::{
    descriptors,
    errors::{refuse, refuse_with},
    keeper::{Keeper, Slot},
    terminal::{END_OF_FILE, Terminal},
};

/// Written to a pipe at once, or not at all (pipe(7), `PIPE_BUF`).
const PIECE: usize = 4 << 10;

#[derive(Debug)]
pub(super) struct Input {
    pub(super) sink: Option<Sink>,
    pub(super) progress: Progress,
}

/// Where input goes.
#[derive(Debug)]
pub(super) enum Sink {
    Pipe(pipe::Sender),
    Terminal(Arc<Terminal>),
}

impl Sink {
    /// What the next daemon needs of it; a terminal's is the one that output comes from.
    pub(super) fn descriptor(&self) -> Option<(Slot, BorrowedFd<'_>)> {
        match self {
            Self::Pipe(pipe) => Some((Slot::Stdin, pipe.as_fd())),
            Self::Terminal(_) => None,
        }
    }

    async fn writable(&self) -> io::Result<()> {
        match self {
            Self::Pipe(pipe) => pipe.writable().await,
            Self::Terminal(terminal) => terminal.writable().await,
        }
    }

    fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Pipe(pipe) => pipe.try_write(bytes),
            Self::Terminal(terminal) => terminal.try_write(bytes),
        }
    }
}

/// How much was written, and what is being written; kept in a file from the first byte on.
#[derive(Debug, Default)]
pub(super) struct Progress {
    file: Option<File>,
    written: u64,
    /// Written or not: a daemon died while it wrote this.
    doubt: Option<Range<u64>>,
}

impl Progress {
    /// As it was left.
    pub(super) fn left(file: Option<File>) -> io::Result<Self> {
        let mut numbers = [[0; 8]; 2];
        if let Some(file) = &file {
            file.read_exact_at(numbers.as_flattened_mut(), 0)?;
        }
        let [written, until] = numbers.map(u64::from_le_bytes);
        Ok(Self {
            file,
            written,
            doubt: (written < until).then_some(written..until),
        })
    }

    /// Keeps it, and notes what is about to be written.
    fn begin(&mut self, keeper: &Keeper, number: u64, length: usize) -> io::Result<()> {
        if self.file.is_none() {
            let file = descriptors::memory_file("input", 16)?;
            keeper.keep(number, &[(Slot::Input, file.as_fd())], None);
            self.file = Some(file);
        }
        self.note(self.written + length as u64)
    }

    fn end(&mut self, count: usize) -> io::Result<()> {
        self.written += count as u64;
        self.note(self.written)
    }

    fn note(&self, until: u64) -> io::Result<()> {
        let Some(file) = &self.file else {
            return Ok(());
        };
        // In one call, so that both are of one moment.
        let numbers = [self.written.to_le_bytes(), until.to_le_bytes()];
        file.write_all_at(numbers.as_flattened(), 0)
    }

    /// What is in doubt; from now on it counts as written.
    fn take_doubt(&mut self) -> io::Result<Option<Range<u64>>> {
        let doubt = self.doubt.take();
        if let Some(doubt) = &doubt {
            self.written = doubt.end;
            self.note(doubt.end)?;
        }
        Ok(doubt)
    }
}

impl Process {
    /// Writes to stdin; bytes that were written before are passed over.
    pub(crate) async fn send_input(&self, data: Bytes, offset: Option<u64>) -> Result<u64, Status> {
        let mut input = self.stdin.lock().await;
        let Input { sink, progress } = &mut *input;
        if let Some(doubt) = progress.take_doubt().map_err(|error| io_error(&error))?
            && offset != Some(doubt.end)
        {
            return Err(uncertain(&doubt));
        }
        let at = offset.unwrap_or(progress.written);
        if at > progress.written {
            return Err(refuse(
                Code::OutOfRange,
                "INPUT_GAP",
                format!(
                    "offset {at} leaves a gap; {} bytes were received",
                    progress.written
                ),
            ));
        }
        let known = usize::try_from(progress.written - at).unwrap_or(usize::MAX);
        let mut fresh = data.get(known..).unwrap_or_default();
        let mut ended = self.ended.subscribe();
        while !fresh.is_empty() {
            let Some(open) = sink else {
                return Err(input_closed());
            };
            let writable = tokio::select! {
                writable = open.writable() => writable,
                _ = ended.wait_for(Option::is_some) => Err(io::ErrorKind::BrokenPipe.into()),
            };
            let written = writable.and_then(|()| {
                let piece = fresh.get(..PIECE).unwrap_or(fresh);
                progress.begin(&self.keeper, self.number, piece.len())?;
                let written = open.try_write(piece);
                progress.end(*written.as_ref().unwrap_or(&0))?;
                written
            });
            match written {
                Ok(count) => fresh = fresh.get(count..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                    *sink = None;
                    self.keeper.remove(self.number, &[Slot::Stdin]);
                    return Err(input_closed());
                }
                Err(error) => return Err(io_error(&error)),
            }
        }
        Ok(progress.written)
    }

    /// Closes stdin. At a terminal the end of a file is a character; the terminal stays open.
    pub(crate) async fn close_input(&self) -> Result<(), Status> {
        let mut input = self.stdin.lock().await;
        let mut ended = self.ended.subscribe();
        let Some(Sink::Terminal(terminal)) = &input.sink else {
            self.keeper.remove(self.number, &[Slot::Stdin]);
            input.sink = None;
            return Ok(());
        };
        let typed = async {
            loop {
                terminal.writable().await?;
                match terminal.try_write(&[END_OF_FILE]) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    typed => return typed,
                }
            }
        };
        tokio::select! {
            typed = typed => {
                typed.map_err(|error| io_error(&error))?;
            }
            _ = ended.wait_for(Option::is_some) => {}
        }
        Ok(())
    }
}

fn io_error(error: &io::Error) -> Status {
    refuse(Code::Unknown, "IO_ERROR", error.to_string())
}

fn input_closed() -> Status {
    refuse(
        Code::FailedPrecondition,
        "INPUT_CLOSED",
        "the process does not read its stdin any more",
    )
}

fn uncertain(doubt: &Range<u64>) -> Status {
    let Range { start, end } = doubt;
    refuse_with(
        Code::DataLoss,
        "INPUT_UNCERTAIN",
        format!(
            "envd died while it wrote the bytes from offset {start} to {end} to the process's stdin: whether they arrived \
             is not known. They count as written: go on from {end}, or send them again without an offset"
        ),
        &[("from", start.to_string()), ("to", end.to_string())],
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_being_written_is_in_doubt_once_and_nothing_else_is() {
        let keeper = Keeper::none();
        let again = |progress: &Progress| {
            let file = progress.file.as_ref().map(|file| file.try_clone().unwrap());
            Progress::left(file).unwrap()
        };
        let mut progress = Progress::default();
        assert_eq!(again(&progress).take_doubt().unwrap(), None);
        progress.begin(&keeper, 1, 10).unwrap();
        progress.end(4).unwrap();
        assert_eq!(again(&progress).take_doubt().unwrap(), None);
        progress.begin(&keeper, 1, 6).unwrap();
        let mut next = again(&progress);
        assert_eq!((next.written, next.take_doubt().unwrap()), (4, Some(4..10)));
        assert_eq!((next.written, next.take_doubt().unwrap()), (10, None));
        assert_eq!((again(&next).written, again(&next).doubt), (10, None));
    }
}
