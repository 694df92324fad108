//! What a process wrote to one stream: a bounded ring of bytes with offsets, and any number of readers.
//!
//! The reader of the call that started the process holds the process back when it is slow, as a pipe in a shell would, so that a
//! plain `exec | slow` loses nothing. When that client is gone, or for all other readers, the ring overwrites its oldest bytes
//! instead, and who comes too late is told how far it reaches. The process is never held up for long by anybody who left.

use std::{
    collections::VecDeque,
    mem,
    sync::{Mutex, MutexGuard, PoisonError},
};

use bytes::{Bytes, BytesMut};
use tokio::sync::Notify;

/// Bytes kept per stream.
pub(crate) const CAPACITY: u64 = 1 << 20;

/// A reader asked for bytes that are gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooLate {
    pub(crate) earliest: u64,
}

/// What a reader finds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Found {
    /// Bytes from the offset asked for.
    Bytes(Bytes),
    /// Nothing yet.
    Nothing,
    /// Nothing, and there will be nothing.
    End,
}

/// Smaller writes are gathered, so that many of them cost neither a piece of memory each nor a long search.
const GATHERED: usize = 32 << 10;

#[derive(Debug, Default)]
struct Ring {
    chunks: VecDeque<Bytes>,
    /// The newest bytes, not yet a chunk.
    tail: BytesMut,
    start: u64,
    end: u64,
    closed: bool,
    /// How far the client that started the process has read, while it is there.
    primary: Option<u64>,
}

impl Ring {
    fn append(&mut self, bytes: Bytes) {
        self.end += bytes.len() as u64;
        if bytes.len() < GATHERED {
            self.tail.extend_from_slice(&bytes);
            if self.tail.len() >= GATHERED {
                self.end_tail();
            }
        } else {
            self.end_tail();
            self.chunks.push_back(bytes);
        }
    }

    fn end_tail(&mut self) {
        if !self.tail.is_empty() {
            self.chunks.push_back(mem::take(&mut self.tail).freeze());
        }
    }

    /// Drops the oldest chunks no promise is about: what is left is at least the capacity, and all the first reader has not seen.
    fn shrink(&mut self) {
        while let Some(oldest) = self.chunks.front().map(|chunk| chunk.len() as u64) {
            let next = self.start + oldest;
            if self.end - next < CAPACITY || self.primary.is_some_and(|seen| seen < next) {
                break;
            }
            self.start = next;
            self.chunks.pop_front();
        }
    }
}

/// One stream's output.
#[derive(Debug, Default)]
pub(crate) struct Output {
    ring: Mutex<Ring>,
    /// Something was written or closed.
    grown: Notify,
    /// The primary reader moved or left.
    read: Notify,
}

impl Output {
    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the reader of the starting call the one that is waited for.
    pub(crate) fn set_primary(&self, offset: Option<u64>) {
        self.ring().primary = offset;
        self.read.notify_waiters();
    }

    /// Waits until a write would overwrite nothing the primary reader has not seen.
    pub(crate) async fn room(&self) {
        loop {
            let moved = self.read.notified();
            tokio::pin!(moved);
            moved.as_mut().enable();
            {
                let ring = self.ring();
                if ring.primary.is_none_or(|seen| ring.end - seen < CAPACITY) {
                    return;
                }
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
            ring.append(bytes);
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

    /// Whether the process waits for its first reader.
    pub(crate) fn is_held_back(&self) -> bool {
        let ring = self.ring();
        ring.primary.is_some_and(|seen| ring.end - seen >= CAPACITY)
    }

    /// How much of it is kept.
    pub(crate) fn kept(&self) -> u64 {
        let ring = self.ring();
        ring.end - ring.start
    }

    /// Keeps nothing any more, unless the first reader is still at it.
    pub(crate) fn let_go(&self) {
        let mut ring = self.ring();
        if ring.primary.is_none() {
            ring.chunks = VecDeque::new();
            ring.tail = BytesMut::new();
            ring.start = ring.end;
        }
    }

    /// How much was written in all.
    pub(crate) fn end(&self) -> u64 {
        self.ring().end
    }

    /// What is there from an offset: one chunk at most.
    pub(crate) fn read(&self, offset: u64) -> Result<Found, TooLate> {
        let ring = self.ring();
        if offset < ring.start || offset > ring.end {
            return Err(TooLate {
                earliest: ring.start,
            });
        }
        let mut at = ring.start;
        for chunk in &ring.chunks {
            let next = at + chunk.len() as u64;
            if offset < next {
                return Ok(Found::Bytes(
                    chunk.slice(usize::try_from(offset - at).unwrap_or_default()..),
                ));
            }
            at = next;
        }
        let fresh = usize::try_from(offset - at).unwrap_or_default();
        if let Some(fresh) = ring.tail.get(fresh..).filter(|fresh| !fresh.is_empty()) {
            return Ok(Found::Bytes(Bytes::copy_from_slice(fresh)));
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

    fn all(output: &Output, mut offset: u64) -> Result<Vec<u8>, TooLate> {
        let mut read = Vec::new();
        while let Found::Bytes(bytes) = output.read(offset)? {
            offset += bytes.len() as u64;
            read.extend_from_slice(&bytes);
        }
        Ok(read)
    }

    #[test]
    fn any_reader_reads_every_byte_from_its_offset_once() {
        let output = Output::default();
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

    #[tokio::test]
    async fn the_starting_client_is_waited_for_only_while_it_is_there() {
        let output = Output::default();
        output.set_primary(Some(0));
        output.push(Bytes::from(vec![7; CAPACITY as usize]));
        let waits = tokio::time::timeout(std::time::Duration::from_millis(20), output.room()).await;
        assert!(waits.is_err(), "a full ring waits for its first reader");
        output.set_primary(None);
        output.room().await;
        output.push(Bytes::from(vec![8; CAPACITY as usize]));
        assert_eq!(output.read(0), Err(TooLate { earliest: CAPACITY }));
    }

    #[test]
    fn many_small_writes_are_few_chunks() {
        let output = Output::default();
        let size = CAPACITY * 5 / 4;
        for number in 0..size {
            output.push(Bytes::copy_from_slice(&[number as u8]));
        }
        assert!(output.ring().chunks.len() <= CAPACITY as usize / GATHERED + 1);
        let earliest = output.read(0).unwrap_err().earliest;
        let kept = all(&output, earliest).unwrap();
        assert!(
            kept.iter()
                .zip(earliest..)
                .all(|(byte, at)| *byte == at as u8)
        );
        assert_eq!(earliest + kept.len() as u64, size);
    }

    #[test]
    fn what_is_let_go_is_told_apart_from_what_never_was() {
        let output = Output::default();
        output.push(Bytes::from_static(b"hello"));
        output.set_primary(Some(2));
        output.let_go();
        assert_eq!(all(&output, 2).unwrap(), b"llo");
        output.set_primary(None);
        output.let_go();
        output.close();
        assert_eq!(output.read(0), Err(TooLate { earliest: 5 }));
        assert_eq!(
            (output.read(5), output.end(), output.kept()),
            (Ok(Found::End), 5, 0)
        );
    }

    proptest! {
        #[test]
        fn the_starting_client_loses_nothing_however_it_reads(
            steps in prop::collection::vec((1usize..65_536, 0usize..4), 1..200),
        ) {
            let output = Output::default();
            output.set_primary(Some(0));
            let (mut written, mut seen) = (0_u64, 0_u64);
            for (size, reads) in steps {
                // As the process is read: only when there is room.
                if !output.is_held_back() {
                    output.push(Bytes::from(vec![1; size]));
                    written += size as u64;
                }
                for _ in 0..reads {
                    match output.read(seen) {
                        Ok(Found::Bytes(bytes)) => seen += bytes.len() as u64,
                        Ok(_) => prop_assert_eq!(seen, written),
                        Err(late) => prop_assert!(false, "lost {} to {}", seen, late.earliest),
                    }
                    output.set_primary(Some(seen));
                }
                prop_assert!(output.kept() <= CAPACITY + 2 * 65_536);
            }
        }

        #[test]
        fn the_ring_is_bounded_and_its_end_is_right(sizes in prop::collection::vec(1usize..300_000, 1..30)) {
            let output = Output::default();
            let total: usize = sizes.iter().sum();
            for size in &sizes {
                output.push(Bytes::from(vec![1; *size]));
            }
            prop_assert_eq!(output.end(), total as u64);
            let earliest = match output.read(0) { Err(late) => late.earliest, Ok(_) => 0 };
            let kept = all(&output, earliest).unwrap().len();
            prop_assert!(kept as u64 >= CAPACITY.min(total as u64));
            prop_assert!(kept as u64 <= CAPACITY + 300_000);
        }
    }
}
