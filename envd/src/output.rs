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

use std::{
    collections::{HashMap, VecDeque},
    fs::File,
    io,
    os::unix::fs::FileExt as _,
    path::Path,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use bytes::{Bytes, BytesMut};
use proto::envd::v1::Backpressure;
use tokio::sync::Notify;

use crate::logs;

/// Where output goes that is too much for memory: on the guest's disk, where the guest has one.
const SPILL: &str = "/var/tmp";
/// Smaller writes are gathered, so that many of them cost neither a piece of memory each nor a long search.
const GATHERED: usize = 32 << 10;
const FULL: usize = 56 << 10;
/// Largest piece read from the file at once.
const PIECE: u64 = 64 << 10;
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

/// A reader asked for bytes that are gone, or that were never written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooLate {
    pub(crate) earliest: u64,
}

/// What a reader finds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Found {
    /// Bytes from the offset asked for, and when the first of them were written.
    Bytes(Bytes, SystemTime),
    /// Nothing yet.
    Nothing,
    /// Nothing, and there will be nothing.
    End,
}

/// Bytes that were written at about the same time.
#[derive(Debug)]
struct Chunk {
    bytes: Bytes,
    time: SystemTime,
}

/// The file, as a ring: the byte at an offset lies at the offset modulo its size.
#[derive(Debug, Default)]
struct Spill {
    file: Option<File>,
    /// First offsets of the pieces in it, with their times, oldest first.
    pieces: VecDeque<(u64, SystemTime)>,
}

#[derive(Debug)]
struct Ring {
    keeping: Keeping,
    /// Of the oldest byte that is kept anywhere.
    start: u64,
    spill: Spill,
    /// Of the oldest byte in memory.
    memory: u64,
    chunks: VecDeque<Chunk>,
    /// The newest bytes, not yet a chunk.
    tail: BytesMut,
    tail_time: SystemTime,
    end: u64,
    closed: bool,
    /// How far each reader has come.
    readers: HashMap<u64, u64>,
    /// How far any has come.
    furthest: u64,
    next_reader: u64,
}

impl Ring {
    fn append(&mut self, mut bytes: Bytes, time: SystemTime) {
        self.end += bytes.len() as u64;
        IN_MEMORY.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        if bytes.len() < GATHERED {
            if self.tail.is_empty() {
                self.tail_time = time;
            }
            self.tail.extend_from_slice(&bytes);
            if self.tail.len() >= GATHERED {
                self.end_tail();
            }
        } else {
            self.end_tail();
            if bytes.len() < FULL {
                // What it was read into is larger, and would be kept with it.
                bytes = Bytes::copy_from_slice(&bytes);
            }
            self.chunks.push_back(Chunk { bytes, time });
        }
    }

    fn end_tail(&mut self) {
        if !self.tail.is_empty() {
            self.chunks.push_back(Chunk {
                bytes: std::mem::take(&mut self.tail).freeze(),
                time: self.tail_time,
            });
        }
    }

    fn memory_limit(&self) -> u64 {
        if IN_MEMORY.load(Ordering::Relaxed) > MEMORY_OF_ALL {
            self.keeping.memory.min(LITTLE)
        } else {
            self.keeping.memory
        }
    }

    fn must_shrink(&self) -> bool {
        let oldest = self.chunks.front().map(|chunk| chunk.bytes.len() as u64);
        oldest.is_some_and(|oldest| self.end - (self.memory + oldest) >= self.memory_limit())
    }

    /// Moves the oldest chunks from memory to the file, over what is oldest there.
    fn shrink(&mut self) {
        while self.must_shrink() {
            let Some(chunk) = self.chunks.pop_front() else {
                return;
            };
            let length = chunk.bytes.len() as u64;
            IN_MEMORY.fetch_sub(length, Ordering::Relaxed);
            let at = self.memory;
            self.memory += length;
            if let Err(error) = self.spill.write(self.keeping.file, at, &chunk) {
                // The guest's disk is full, or there is none: what does not fit into memory is gone.
                logs::warn(format_args!("output is not kept: {error}"));
                self.spill = Spill::default();
            }
            self.start = match self.spill.pieces.front() {
                Some((first, _)) => self
                    .start
                    .max(*first)
                    .max(self.memory.saturating_sub(self.keeping.file)),
                None => self.memory,
            };
        }
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
}

impl Drop for Ring {
    fn drop(&mut self) {
        IN_MEMORY.fetch_sub(self.end - self.memory, Ordering::Relaxed);
    }
}

impl Spill {
    fn write(&mut self, size: u64, at: u64, chunk: &Chunk) -> io::Result<()> {
        if size < chunk.bytes.len() as u64 {
            self.pieces.clear();
            return Ok(());
        }
        let file = match &self.file {
            Some(file) => file,
            None => self.file.insert(unnamed()?),
        };
        let place = at % size;
        let fits = usize::try_from(size - place).unwrap_or(usize::MAX);
        let (first, rest) = chunk.bytes.split_at(fits.min(chunk.bytes.len()));
        blocking(|| {
            file.write_all_at(first, place)?;
            file.write_all_at(rest, 0)
        })?;
        self.pieces.push_back((at, chunk.time));
        let oldest = (at + chunk.bytes.len() as u64).saturating_sub(size);
        // The piece that the oldest byte is in stays, for its time.
        while self.pieces.get(1).is_some_and(|(next, _)| *next <= oldest) {
            self.pieces.pop_front();
        }
        Ok(())
    }

    fn read(&self, size: u64, offset: u64, until: u64) -> io::Result<(Bytes, SystemTime)> {
        let Some(file) = &self.file else {
            return Err(io::ErrorKind::NotFound.into());
        };
        let after = self.pieces.partition_point(|(first, _)| *first <= offset);
        let time = after
            .checked_sub(1)
            .and_then(|index| self.pieces.get(index))
            .map_or(SystemTime::UNIX_EPOCH, |(_, time)| *time);
        let next = self.pieces.get(after).map_or(until, |(first, _)| *first);
        let place = offset % size;
        let length = (next.min(until) - offset).min(PIECE).min(size - place);
        let mut bytes = BytesMut::zeroed(usize::try_from(length).unwrap_or_default());
        blocking(|| file.read_exact_at(&mut bytes, place))?;
        Ok((bytes.freeze(), time))
    }
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
    pub(crate) fn new(keeping: Keeping) -> Self {
        Self {
            ring: Mutex::new(Ring {
                keeping,
                start: 0,
                spill: Spill::default(),
                memory: 0,
                chunks: VecDeque::new(),
                tail: BytesMut::new(),
                tail_time: SystemTime::UNIX_EPOCH,
                end: 0,
                closed: false,
                readers: HashMap::new(),
                furthest: 0,
                next_reader: 0,
            }),
            grown: Notify::new(),
            read: Notify::new(),
        }
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

    /// Appends.
    pub(crate) fn push(&self, bytes: Bytes) {
        {
            let mut ring = self.ring();
            if ring.closed {
                return;
            }
            ring.append(bytes, SystemTime::now());
            ring.shrink();
        }
        self.grown.notify_waiters();
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

    /// How much of it is kept, in memory and in all.
    pub(crate) fn kept(&self) -> (u64, u64) {
        let ring = self.ring();
        (ring.end - ring.memory, ring.end - ring.start)
    }

    /// Keeps nothing any more, unless somebody still reads.
    pub(crate) fn let_go(&self) {
        let mut ring = self.ring();
        if ring.readers.is_empty() {
            IN_MEMORY.fetch_sub(ring.end - ring.memory, Ordering::Relaxed);
            ring.chunks = VecDeque::new();
            ring.tail = BytesMut::new();
            ring.spill = Spill::default();
            (ring.start, ring.memory) = (ring.end, ring.end);
        }
    }

    /// How much was written in all.
    pub(crate) fn end(&self) -> u64 {
        self.ring().end
    }

    /// What is there from an offset: one chunk at most.
    pub(crate) fn read(&self, offset: u64) -> Result<Found, TooLate> {
        let mut ring = self.ring();
        if offset < ring.start || offset > ring.end {
            return Err(TooLate {
                earliest: ring.start,
            });
        }
        if offset < ring.memory {
            let read = ring.spill.read(ring.keeping.file, offset, ring.memory);
            return match read {
                Ok((bytes, time)) => Ok(Found::Bytes(bytes, time)),
                Err(error) => {
                    logs::warn(format_args!("output cannot be read back: {error}"));
                    ring.spill = Spill::default();
                    ring.start = ring.memory;
                    Err(TooLate {
                        earliest: ring.start,
                    })
                }
            };
        }
        let mut at = ring.memory;
        for chunk in &ring.chunks {
            let next = at + chunk.bytes.len() as u64;
            if offset < next {
                let from = usize::try_from(offset - at).unwrap_or_default();
                return Ok(Found::Bytes(chunk.bytes.slice(from..), chunk.time));
            }
            at = next;
        }
        let fresh = usize::try_from(offset - at).unwrap_or_default();
        if let Some(fresh) = ring.tail.get(fresh..).filter(|fresh| !fresh.is_empty()) {
            return Ok(Found::Bytes(Bytes::copy_from_slice(fresh), ring.tail_time));
        }
        Ok(if ring.closed {
            Found::End
        } else {
            Found::Nothing
        })
    }

    /// Waits until there may be something new. Register before looking.
    pub(crate) fn growth(&self) -> tokio::sync::futures::Notified<'_> {
        self.grown.notified()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MEMORY: u64 = 1 << 20;
    const FILE: u64 = 3 << 20;

    fn output(backpressure: Backpressure) -> Output {
        Output::new(Keeping {
            memory: MEMORY,
            file: FILE,
            backpressure,
        })
    }

    const LITTLE_MEMORY: u64 = 64 << 10;
    const LITTLE_FILE: u64 = 200 << 10;

    fn small(backpressure: Backpressure) -> Output {
        Output::new(Keeping {
            memory: LITTLE_MEMORY,
            file: LITTLE_FILE,
            backpressure,
        })
    }

    /// The bytes that belong at an offset.
    fn bytes(at: u64, length: usize) -> Bytes {
        (at..).map(byte).take(length).collect()
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
        for at in (0..total).step_by(GATHERED) {
            output.push(bytes(at, GATHERED));
        }
        assert!(output.kept().0 <= MEMORY + GATHERED as u64);
        assert!(all(&output, 0).unwrap() == bytes(0, total as usize));
        assert!(
            matches!(output.read(5), Ok(Found::Bytes(_, time)) if time > SystemTime::UNIX_EPOCH)
        );
        for at in (total..3 * (MEMORY + FILE)).step_by(GATHERED) {
            output.push(bytes(at, GATHERED));
        }
        let TooLate { earliest } = output.read(0).unwrap_err();
        assert!(output.end() - earliest >= FILE + MEMORY - GATHERED as u64);
        assert!(output.end() - earliest <= FILE + MEMORY + GATHERED as u64);
        let kept = all(&output, earliest).unwrap();
        assert!(kept == bytes(earliest, kept.len()));
        assert_eq!(earliest + kept.len() as u64, output.end());
    }

    #[test]
    fn many_small_writes_are_few_chunks() {
        let output = output(Backpressure::Unspecified);
        let size = MEMORY * 5 / 4;
        for number in 0..size {
            output.push(Bytes::copy_from_slice(&[byte(number)]));
        }
        assert!(output.ring().chunks.len() <= MEMORY as usize / GATHERED + 1);
        assert!(all(&output, 0).unwrap() == bytes(0, size as usize));
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
