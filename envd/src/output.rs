//! What a process wrote to one stream: bytes with offsets and times, and any number of readers.
//!
//! The newest bytes are in memory, older ones in a file that has no name and a limit; what is older than that is gone, and who comes too
//! late is told how far it reaches. A process is held up by nobody, unless it was asked for: then it waits, as it would at a pipe, for the
//! slowest of those that read.
//!
//! ```text
//!  offset 0 ........ start ............ memory ............ end
//!            gone     |   in the file     |   in memory      |
//! ```
//! A daemon that is killed loses none of it, nor its count. "In memory" is a memfd (memfd_create(2)) where each byte lies at its offset,
//! holes where older ones were. The kernel moves bytes into it (splice(2)) and counts them by the file's own position in the same call, and
//! no signal comes between. The [`Keeper`] has every file as well, from before anything is in it, so the next daemon finds all that was
//! moved, and in the pipe all that was not. What it does not find is the times.

use std::{
    collections::{HashMap, VecDeque},
    fs::File,
    io::{self, Seek as _, SeekFrom},
    ops::Range,
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd},
        unix::fs::FileExt as _,
    },
    path::Path,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use bytes::{Bytes, BytesMut};
use nix::{
    fcntl::{FallocateFlags, SpliceFFlags, fallocate, splice},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::sendfile::sendfile64,
    unistd::{Whence, lseek64},
};
use proto::envd::v1::Backpressure;
use tokio::sync::Notify;

use crate::{
    descriptors,
    keeper::{Keeper, Slot},
    logs,
};

/// Where output goes that is too much for memory: on the guest's disk, where the guest has one.
const SPILL: &str = "/var/tmp";
/// Bytes with the same time: a time for each small write would cost more than the write.
const GATHERED: u64 = 32 << 10;
/// Largest piece read at once.
const PIECE: u64 = 64 << 10;
/// Memory is given back in whole pages, and not for less than that.
const PAGE: u64 = 4 << 10;
const SLACK: u64 = 32 << 10;
/// Moved to the file at once. Of so much there it is not known, when a daemon was killed, whether it was overwritten.
const MOVED: u64 = 256 << 10;
/// Bytes all processes' output may take in memory; when it is more, each stream keeps only little there.
const MEMORY_OF_ALL: u64 = 32 << 20;
const LITTLE: u64 = 64 << 10;

static IN_MEMORY: AtomicU64 = AtomicU64::new(0);

/// How much of a stream is kept, in bytes, and whom the process waits for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Keeping {
    pub(crate) memory: u64,
    pub(crate) file: u64,
    pub(crate) backpressure: Backpressure,
}

impl Default for Keeping {
    fn default() -> Self {
        Self {
            memory: 1 << 20,
            file: 64 << 20,
            backpressure: Backpressure::Unspecified,
        }
    }
}

/// Where a stream's files are kept for the next daemon.
#[derive(Debug, Clone)]
pub(crate) struct Home {
    pub(crate) keeper: Keeper,
    /// Of the process.
    pub(crate) number: u64,
    pub(crate) memory: Slot,
    pub(crate) file: Slot,
}

/// A reader asked for bytes that are gone, or that were never written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooLate {
    pub(crate) earliest: u64,
}

/// What a reader finds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Found {
    /// Bytes from the offset asked for, and when the first of them were written, if that is known.
    Bytes(Bytes, Option<SystemTime>),
    /// Nothing yet.
    Nothing,
    /// Nothing, and there will be nothing.
    End,
}

/// The file, as a ring: the byte at an offset lies at the offset modulo its size.
#[derive(Debug)]
struct Spill {
    file: File,
    /// Offset of the first byte that was ever put there.
    first: u64,
}

#[derive(Debug)]
struct Ring {
    keeping: Keeping,
    home: Home,
    /// Of the oldest byte that is kept anywhere.
    start: u64,
    spill: Option<Spill>,
    /// Of the oldest byte in memory; a page begins there.
    memory: u64,
    newest: Option<File>,
    end: u64,
    /// First offsets of bytes that were written at about the same time, oldest first.
    times: VecDeque<(u64, SystemTime)>,
    closed: bool,
    /// How far each reader has come.
    readers: HashMap<u64, u64>,
    /// How far any has come.
    furthest: u64,
    next_reader: u64,
}

impl Ring {
    fn new(keeping: Keeping, home: Home) -> Self {
        Self {
            keeping,
            home,
            start: 0,
            spill: None,
            memory: 0,
            newest: None,
            end: 0,
            times: VecDeque::new(),
            closed: false,
            readers: HashMap::new(),
            furthest: 0,
            next_reader: 0,
        }
    }

    /// Lets bytes be put at the end of what is in memory.
    fn append(&mut self, put: impl FnOnce(&File) -> io::Result<usize>) -> io::Result<usize> {
        let file = if let Some(file) = &self.newest {
            file
        } else {
            let file = descriptors::memory_file("output", 0)?;
            let files = [(self.home.memory, file.as_fd())];
            self.home.keeper.keep(self.home.number, &files, None);
            self.newest.insert(file)
        };
        let count = put(file)?;
        if count > 0 {
            let is_new = |(first, _): &(u64, SystemTime)| self.end - first >= GATHERED;
            if self.times.back().is_none_or(is_new) {
                self.times.push_back((self.end, SystemTime::now()));
            }
            self.end += count as u64;
            IN_MEMORY.fetch_add(count as u64, Ordering::Relaxed);
            self.shrink();
        }
        Ok(count)
    }

    fn memory_limit(&self) -> u64 {
        if IN_MEMORY.load(Ordering::Relaxed) > MEMORY_OF_ALL {
            self.keeping.memory.min(LITTLE)
        } else {
            self.keeping.memory
        }
    }

    /// Moves the oldest bytes from memory to the file, over what is oldest there.
    fn shrink(&mut self) {
        let limit = self.memory_limit();
        while self.end - self.memory >= limit + SLACK {
            let to = (self.end - limit) / PAGE * PAGE;
            if !self.shrink_to(to.min(self.memory + MOVED)) {
                return;
            }
        }
    }

    /// Whether there was something to move.
    fn shrink_to(&mut self, to: u64) -> bool {
        let from = self.memory;
        let Some(newest) = self.newest.as_ref().filter(|_| to > from) else {
            return false;
        };
        if self.keeping.file > 0 {
            let (size, spill, home) = (self.keeping.file, &mut self.spill, &self.home);
            if let Err(error) = blocking(|| move_to(spill, newest, from..to, size, home)) {
                // The guest's disk is full, or there is none: what does not fit into memory is gone.
                logs::warn(format_args!("output is not kept: {error}"));
                self.spill = None;
                self.home.keeper.remove(self.home.number, &[self.home.file]);
            }
        }
        self.memory = to;
        IN_MEMORY.fetch_sub(to - from, Ordering::Relaxed);
        self.start = match &self.spill {
            Some(spill) => self
                .start
                .max(spill.first)
                .max(to.saturating_sub(self.keeping.file)),
            None => to,
        };
        if let Err(error) = give_back(newest, from, to) {
            logs::warn(format_args!("memory of output is not given back: {error}"));
        }
        // The piece that the oldest byte is in stays, for its time.
        while self
            .times
            .get(1)
            .is_some_and(|(next, _)| *next <= self.start)
        {
            self.times.pop_front();
        }
        true
    }

    /// When the byte at an offset was written, and where those end that have its time.
    fn time_of(&self, offset: u64) -> (Option<SystemTime>, u64) {
        let after = self.times.partition_point(|(first, _)| *first <= offset);
        let time = after
            .checked_sub(1)
            .and_then(|index| self.times.get(index))
            .map(|(_, time)| *time);
        let next = self.times.get(after).map_or(self.end, |(first, _)| *first);
        (time, next)
    }

    fn read(&self, offset: u64) -> io::Result<Found> {
        let (time, next) = self.time_of(offset);
        let (file, place, most) = if offset < self.memory {
            let spill = self.spill.as_ref().ok_or(io::ErrorKind::NotFound)?;
            let place = offset % self.keeping.file;
            let most = (self.memory - offset).min(self.keeping.file - place);
            (&spill.file, place, most)
        } else {
            let newest = self.newest.as_ref().ok_or(io::ErrorKind::NotFound)?;
            (newest, offset, self.end - offset)
        };
        let length = (next - offset).min(PIECE).min(most);
        let mut bytes = BytesMut::zeroed(usize::try_from(length).unwrap_or_default());
        if offset < self.memory {
            blocking(|| file.read_exact_at(&mut bytes, place))?;
        } else {
            file.read_exact_at(&mut bytes, place)?;
        }
        Ok(Found::Bytes(bytes.freeze(), time))
    }

    /// The slowest that the process has to wait for.
    fn waited_for(&self) -> Option<u64> {
        let slowest = self.readers.values().min().copied();
        match self.keeping.backpressure {
            Backpressure::Unspecified => None,
            Backpressure::WhileAttached => slowest,
            Backpressure::Always => Some(slowest.unwrap_or(self.furthest)),
        }
    }

    fn has_room(&self) -> bool {
        self.waited_for()
            .is_none_or(|seen| self.end - seen.min(self.end) < self.keeping.memory)
    }

    fn let_go(&mut self) {
        IN_MEMORY.fetch_sub(self.end - self.memory, Ordering::Relaxed);
        (self.newest, self.spill) = (None, None);
        self.times.clear();
        self.closed = true;
        (self.start, self.memory) = (self.end, self.end);
        let Home {
            keeper,
            number,
            memory,
            file,
        } = &self.home;
        keeper.remove(*number, &[*memory, *file]);
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        IN_MEMORY.fetch_sub(self.end - self.memory, Ordering::Relaxed);
    }
}

/// Writes what is in memory between two offsets into the file, which is made if there is none.
fn move_to(
    spill: &mut Option<Spill>,
    newest: &File,
    mut range: Range<u64>,
    size: u64,
    home: &Home,
) -> io::Result<()> {
    let spill = if let Some(spill) = spill {
        spill
    } else {
        let (file, first) = (unnamed()?, range.start);
        let beginning = first.to_le_bytes();
        let files = [(home.file, file.as_fd())];
        let word = Some((home.file, &beginning[..]));
        home.keeper.keep(home.number, &files, word);
        spill.insert(Spill { file, first })
    };
    while range.start < range.end {
        let place = range.start % size;
        (&spill.file).seek(SeekFrom::Start(place))?;
        let most = (range.end - range.start).min(size - place);
        let mut offset = i64::try_from(range.start).map_err(io::Error::other)?;
        let most = usize::try_from(most).map_err(io::Error::other)?;
        match sendfile64(&spill.file, newest, Some(&mut offset), most)? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            count => range.start += count as u64,
        }
    }
    Ok(())
}

/// Makes a hole of pages.
fn give_back(file: &File, from: u64, to: u64) -> io::Result<()> {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let signed = |offset: u64| i64::try_from(offset).map_err(io::Error::other);
    fallocate(file, flags, signed(from)?, signed(to - from)?)?;
    Ok(())
}

/// A file that goes with its descriptor.
fn unnamed() -> io::Result<File> {
    let folder = if Path::new(SPILL).is_dir() {
        SPILL.into()
    } else {
        std::env::temp_dir()
    };
    tempfile::tempfile_in(folder)
}

/// A disk that is slow holds up nobody but those who wait for it.
fn blocking<T>(work: impl FnOnce() -> T) -> T {
    let is_in_pool = tokio::runtime::Handle::try_current().is_ok_and(|runtime| {
        runtime.runtime_flavor() == tokio::runtime::RuntimeFlavor::MultiThread
    });
    if is_in_pool {
        tokio::task::block_in_place(work)
    } else {
        work()
    }
}

/// What the daemon before left of a stream.
#[derive(Debug, Default)]
pub(crate) struct Left {
    pub(crate) memory: Option<File>,
    /// The file, and the offset of the first byte ever put there.
    pub(crate) file: Option<(File, u64)>,
    /// How much was written in all, if the stream has ended.
    pub(crate) ended: Option<u64>,
}

/// One stream's output.
#[derive(Debug)]
pub(crate) struct Output {
    ring: Mutex<Ring>,
    /// Something was written or closed.
    grown: Notify,
    /// A reader moved or left.
    read: Notify,
}

impl Output {
    pub(crate) fn new(keeping: Keeping, home: Home) -> Self {
        Self {
            ring: Mutex::new(Ring::new(keeping, home)),
            grown: Notify::new(),
            read: Notify::new(),
        }
    }

    /// Goes on where the daemon before was.
    pub(crate) fn restored(keeping: Keeping, home: Home, left: Left) -> io::Result<Self> {
        let mut ring = Ring::new(keeping, home);
        if let Some(newest) = left.memory {
            (ring.memory, ring.end) = extent(&newest)?;
            IN_MEMORY.fetch_add(ring.end - ring.memory, Ordering::Relaxed);
            ring.newest = Some(newest);
        } else {
            ring.end = left.ended.unwrap_or_default();
            ring.memory = ring.end;
        }
        ring.start = ring.memory;
        if let Some((file, first)) = left.file
            && ring.newest.is_some()
        {
            // The oldest may be half overwritten by what was on its way.
            let whole = ring.memory + MOVED;
            let start = first.max(whole.saturating_sub(keeping.file));
            ring.start = start.min(ring.memory);
            ring.spill = Some(Spill { file, first });
        }
        ring.furthest = ring.start;
        ring.closed = left.ended.is_some();
        Ok(Self {
            ring: Mutex::new(ring),
            grown: Notify::new(),
            read: Notify::new(),
        })
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a reader that begins at an offset; its number.
    pub(crate) fn enter(&self, offset: u64) -> u64 {
        let mut ring = self.ring();
        ring.next_reader += 1;
        let number = ring.next_reader;
        ring.readers.insert(number, offset);
        ring.furthest = ring.furthest.max(offset.min(ring.end));
        drop(ring);
        // After a crash nobody knew how far any had come: whoever says so may make room.
        self.read.notify_waiters();
        number
    }

    /// A reader has come so far.
    pub(crate) fn advance(&self, reader: u64, offset: u64) {
        let mut ring = self.ring();
        ring.readers.insert(reader, offset);
        ring.furthest = ring.furthest.max(offset);
        drop(ring);
        self.read.notify_waiters();
    }

    /// A reader has left.
    pub(crate) fn leave(&self, reader: u64) {
        self.ring().readers.remove(&reader);
        self.read.notify_waiters();
    }

    /// Waits until whoever the process has to wait for has read enough.
    pub(crate) async fn room(&self) {
        loop {
            let moved = self.read.notified();
            tokio::pin!(moved);
            moved.as_mut().enable();
            if self.ring().has_room() {
                return;
            }
            moved.await;
        }
    }

    /// Takes what a pipe holds, at most so much; 0 at its end.
    pub(crate) fn take(&self, pipe: BorrowedFd<'_>, most: usize) -> io::Result<usize> {
        // Most processes say nothing to one stream or the other, which then needs no memory.
        if self.end() == 0 && !has_something(pipe)? {
            return Ok(0);
        }
        self.append(|file| {
            let flags = SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE;
            Ok(splice(pipe, None, file, None, most, flags)?)
        })
    }

    fn append(&self, put: impl FnOnce(&File) -> io::Result<usize>) -> io::Result<usize> {
        let count = {
            let mut ring = self.ring();
            if ring.closed {
                return Ok(0);
            }
            ring.append(put)?
        };
        self.grown.notify_waiters();
        Ok(count)
    }

    /// Nothing more will come.
    pub(crate) fn close(&self) {
        self.ring().closed = true;
        self.grown.notify_waiters();
    }

    /// Whether nothing more will come.
    pub(crate) fn is_closed(&self) -> bool {
        self.ring().closed
    }

    /// Whether the process waits for a reader.
    pub(crate) fn is_held_back(&self) -> bool {
        !self.ring().has_room()
    }

    /// How much it takes to keep it, in memory and in all.
    pub(crate) fn kept(&self) -> (u64, u64) {
        let ring = self.ring();
        let pages = |bytes: u64| bytes.next_multiple_of(PAGE);
        (pages(ring.end - ring.memory), pages(ring.end - ring.start))
    }

    /// Keeps nothing any more of a process that has ended, unless somebody still reads.
    pub(crate) fn let_go(&self) {
        let mut ring = self.ring();
        if ring.readers.is_empty() {
            ring.let_go();
        }
    }

    /// How much was written in all.
    pub(crate) fn end(&self) -> u64 {
        self.ring().end
    }

    /// What is there from an offset: one piece at most.
    pub(crate) fn read(&self, offset: u64) -> Result<Found, TooLate> {
        let mut ring = self.ring();
        if offset < ring.start || offset > ring.end {
            return Err(TooLate {
                earliest: ring.start,
            });
        }
        if offset == ring.end {
            return Ok(if ring.closed {
                Found::End
            } else {
                Found::Nothing
            });
        }
        ring.read(offset).map_err(|error| {
            logs::warn(format_args!("output cannot be read back: {error}"));
            ring.spill = None;
            ring.start = if offset < ring.memory {
                ring.memory
            } else {
                ring.end
            };
            TooLate {
                earliest: ring.start,
            }
        })
    }

    /// Waits until there may be something new. Register before looking.
    pub(crate) fn growth(&self) -> tokio::sync::futures::Notified<'_> {
        self.grown.notified()
    }
}

/// Whether a pipe holds something; an error if that may still come.
fn has_something(pipe: BorrowedFd<'_>) -> io::Result<bool> {
    let mut fds = [PollFd::new(pipe, PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO)?;
    let [fd] = fds;
    match fd.revents() {
        Some(events) if events.contains(PollFlags::POLLIN) => Ok(true),
        Some(events) if !events.is_empty() => Ok(false),
        _ => Err(io::ErrorKind::WouldBlock.into()),
    }
}

/// Where data begins and ends in a file of memory.
fn extent(file: &File) -> io::Result<(u64, u64)> {
    let end = (&*file).stream_position()?;
    // By a description of our own: the position of that one is the count.
    let own = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    match lseek64(&own, 0, Whence::SeekData) {
        Ok(begin) => Ok((begin.unsigned_abs().min(end), end)),
        // Nothing but a hole.
        Err(nix::errno::Errno::ENXIO) => Ok((end, end)),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use proptest::prelude::*;

    use super::*;

    const MEMORY: u64 = 1 << 20;
    const FILE: u64 = 3 << 20;

    fn nowhere() -> Home {
        Home {
            keeper: Keeper::none(),
            number: 1,
            memory: Slot::StdoutMemory,
            file: Slot::StdoutFile,
        }
    }

    impl Output {
        fn push(&self, bytes: impl AsRef<[u8]>) {
            let mut bytes = bytes.as_ref();
            while !bytes.is_empty() {
                let count = self.append(|mut file| file.write(bytes)).unwrap();
                if count == 0 {
                    return;
                }
                bytes = &bytes[count..];
            }
        }

        /// As the next daemon finds it.
        fn after_a_crash(self) -> Self {
            let ring = self.ring.into_inner().unwrap();
            let again = |file: &File| file.try_clone().unwrap();
            let left = Left {
                memory: ring.newest.as_ref().map(again),
                file: ring.spill.as_ref().map(|it| (again(&it.file), it.first)),
                ended: ring.closed.then_some(ring.end),
            };
            Self::restored(ring.keeping, nowhere(), left).unwrap()
        }
    }

    fn output(backpressure: Backpressure) -> Output {
        let keeping = Keeping {
            memory: MEMORY,
            file: FILE,
            backpressure,
        };
        Output::new(keeping, nowhere())
    }

    const LITTLE_MEMORY: u64 = 64 << 10;
    const LITTLE_FILE: u64 = 200 << 10;

    fn small(backpressure: Backpressure) -> Output {
        let keeping = Keeping {
            memory: LITTLE_MEMORY,
            file: LITTLE_FILE,
            backpressure,
        };
        Output::new(keeping, nowhere())
    }

    /// The bytes that belong at an offset.
    fn bytes(at: u64, length: usize) -> Bytes {
        let mut bytes = Vec::with_capacity(length);
        for offset in at..at + length as u64 {
            bytes.push(byte(offset));
        }
        bytes.into()
    }

    fn byte(at: u64) -> u8 {
        (at ^ (at >> 8) ^ (at >> 16)) as u8
    }

    fn all(output: &Output, mut offset: u64) -> Result<Vec<u8>, TooLate> {
        let mut read = Vec::new();
        while let Found::Bytes(bytes, _) = output.read(offset)? {
            offset += bytes.len() as u64;
            read.extend_from_slice(&bytes);
        }
        Ok(read)
    }

    #[test]
    fn any_reader_reads_every_byte_from_its_offset_once() {
        let output = output(Backpressure::Unspecified);
        output.push(Bytes::from_static(b"hello "));
        output.push(Bytes::from_static(b"world"));
        assert_eq!(all(&output, 0).unwrap(), b"hello world");
        assert_eq!(all(&output, 8).unwrap(), b"rld");
        assert_eq!(output.read(11), Ok(Found::Nothing));
        assert_eq!(output.read(12), Err(TooLate { earliest: 0 }));
        output.close();
        assert_eq!(output.read(11), Ok(Found::End));
        output.push(Bytes::from_static(b"late"));
        assert_eq!(output.end(), 11);
    }

    async fn is_stuck(output: &Output) -> bool {
        tokio::time::timeout(std::time::Duration::from_millis(20), output.room())
            .await
            .is_err()
    }

    #[tokio::test]
    async fn a_process_waits_only_for_whom_it_was_asked_to() {
        for (backpressure, with_reader, without) in [
            (Backpressure::Unspecified, false, false),
            (Backpressure::WhileAttached, true, false),
            (Backpressure::Always, true, true),
        ] {
            let output = output(backpressure);
            let (slow, fast) = (output.enter(0), output.enter(0));
            output.push(bytes(0, MEMORY as usize));
            output.advance(fast, MEMORY);
            assert_eq!(is_stuck(&output).await, with_reader, "{backpressure:?}");
            output.advance(slow, MEMORY);
            assert!(!is_stuck(&output).await, "{backpressure:?}");
            output.leave(slow);
            output.leave(fast);
            output.push(bytes(MEMORY, MEMORY as usize));
            assert_eq!(is_stuck(&output).await, without, "{backpressure:?}");
            // Whoever comes back finds what was on its way when it left.
            let again = output.enter(MEMORY / 2);
            assert!(all(&output, MEMORY / 2).is_ok());
            output.advance(again, 2 * MEMORY);
            assert!(!is_stuck(&output).await, "{backpressure:?}");
        }
    }

    #[test]
    fn what_is_too_much_for_memory_is_read_from_the_file_until_that_is_full() {
        let output = output(Backpressure::Unspecified);
        let total = MEMORY + FILE / 2;
        const STEP: usize = 32 << 10;
        for at in (0..total).step_by(STEP) {
            output.push(bytes(at, STEP));
        }
        assert!(output.kept().0 <= MEMORY + SLACK + PAGE);
        assert!(all(&output, 0).unwrap() == bytes(0, total as usize));
        assert!(matches!(output.read(5), Ok(Found::Bytes(_, Some(_)))));
        for at in (total..3 * (MEMORY + FILE)).step_by(STEP) {
            output.push(bytes(at, STEP));
        }
        let TooLate { earliest } = output.read(0).unwrap_err();
        assert!(output.end() - earliest >= FILE + MEMORY - PAGE);
        assert!(output.end() - earliest <= FILE + MEMORY + SLACK + PAGE);
        let kept = all(&output, earliest).unwrap();
        assert!(kept == bytes(earliest, kept.len()));
        assert_eq!(earliest + kept.len() as u64, output.end());
    }

    #[test]
    fn many_small_writes_have_few_times() {
        let output = output(Backpressure::Unspecified);
        for number in 0..MEMORY / 4 {
            output.push([byte(number)]);
        }
        assert!(output.ring().times.len() as u64 <= MEMORY / 4 / GATHERED + 1);
        assert!(all(&output, 0).unwrap() == bytes(0, MEMORY as usize / 4));
    }

    #[tokio::test]
    async fn a_reader_that_comes_back_after_a_crash_says_how_far_it_had_come() {
        let before = small(Backpressure::Always);
        let reader = before.enter(0);
        for _ in 0..3 {
            let end = before.end();
            before.push(bytes(end, LITTLE_MEMORY as usize));
            before.advance(reader, before.end());
        }
        let output = before.after_a_crash();
        assert!(
            is_stuck(&output).await,
            "who may have read nothing is waited for"
        );
        let mut room = std::pin::pin!(output.room());
        assert!(futures::poll!(&mut room).is_pending());
        output.enter(output.end());
        room.await;
    }

    #[test]
    fn the_next_daemon_finds_all_that_was_taken_and_goes_on() {
        let before = output(Backpressure::Unspecified);
        before.push(bytes(0, 100));
        let output = before.after_a_crash();
        assert!(all(&output, 0).unwrap() == bytes(0, 100));
        assert!(matches!(output.read(0), Ok(Found::Bytes(_, None))));
        output.push(bytes(100, 3 * MEMORY as usize));
        let output = output.after_a_crash();
        let end = 100 + 3 * MEMORY;
        assert!(all(&output, 0).unwrap() == bytes(0, end as usize));
        output.push(bytes(end, 4 * MEMORY as usize));
        let output = output.after_a_crash();
        let TooLate { earliest } = output.read(0).unwrap_err();
        // Less by what may have been overwritten.
        assert!(output.end() - earliest >= FILE + MEMORY - MOVED - PAGE);
        let kept = all(&output, earliest).unwrap();
        assert!(kept == bytes(earliest, kept.len()));
        assert_eq!(
            (output.end(), earliest + kept.len() as u64),
            (end + 4 * MEMORY, output.end())
        );
        output.close();
        output.let_go();
        let output = output.after_a_crash();
        assert_eq!(
            output.read(5),
            Err(TooLate {
                earliest: output.end()
            })
        );
        assert_eq!(output.read(output.end()), Ok(Found::End));
    }

    #[test]
    fn what_is_let_go_is_told_apart_from_what_never_was() {
        let output = output(Backpressure::Unspecified);
        output.push(Bytes::from_static(b"hello"));
        let reader = output.enter(2);
        output.let_go();
        assert_eq!(all(&output, 2).unwrap(), b"llo");
        output.leave(reader);
        output.let_go();
        output.close();
        assert_eq!(output.read(0), Err(TooLate { earliest: 5 }));
        assert_eq!(
            (output.read(5), output.end(), output.kept()),
            (Ok(Found::End), 5, (0, 0))
        );
    }

    proptest! {
        #[test]
        fn who_is_waited_for_loses_nothing_however_it_reads(
            steps in prop::collection::vec((1usize..8_192, 0usize..4), 1..100),
        ) {
            let output = small(Backpressure::Always);
            let reader = output.enter(0);
            let (mut written, mut seen) = (0_u64, 0_u64);
            for (size, reads) in steps {
                // As the process is read: only when there is room.
                if !output.is_held_back() {
                    output.push(bytes(written, size));
                    written += size as u64;
                }
                for _ in 0..reads {
                    match output.read(seen) {
                        Ok(Found::Bytes(found, _)) => {
                            prop_assert!(found == bytes(seen, found.len()));
                            seen += found.len() as u64;
                        }
                        Ok(_) => prop_assert_eq!(seen, written),
                        Err(late) => prop_assert!(false, "lost {} to {}", seen, late.earliest),
                    }
                    output.advance(reader, seen);
                }
                prop_assert!(output.kept().0 <= LITTLE_MEMORY + 2 * 65_536);
            }
        }

        #[test]
        fn memory_and_file_are_bounded_and_what_is_kept_is_right(
            sizes in prop::collection::vec(1usize..30_000, 1..40),
        ) {
            let output = small(Backpressure::Unspecified);
            let total: usize = sizes.iter().sum();
            let mut at = 0;
            for size in &sizes {
                output.push(bytes(at, *size));
                at += *size as u64;
            }
            prop_assert_eq!(output.end(), total as u64);
            let earliest = match output.read(0) { Err(late) => late.earliest, Ok(_) => 0 };
            let kept = all(&output, earliest).unwrap();
            prop_assert!(kept == bytes(earliest, kept.len()));
            let (memory, in_all) = output.kept();
            prop_assert!(memory <= LITTLE_MEMORY + 64_000);
            prop_assert!(in_all >= (LITTLE_FILE + LITTLE_MEMORY).min(total as u64) - 64_000.min(total as u64));
            prop_assert!(in_all <= LITTLE_FILE + LITTLE_MEMORY + 64_000);
        }
    }
}
