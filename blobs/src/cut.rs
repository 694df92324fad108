//! Where files are cut.

use std::{fs::File, io, os::unix::fs::FileExt as _};

use fastcdc::v2020::StreamCDC;
use rustix::fs::{SeekFrom, seek};
use tokio::sync::mpsc;

use crate::LARGEST;

/// Chunks that are cut by content: what is inserted or changed costs about two of them.
const SMALLEST: usize = 64 << 10;
const USUAL: usize = 256 << 10;

/// How a file is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// Where its content says so.
    Content,
    /// Every so many bytes, at most 2 MiB: for what stays where it is, as memory does.
    Every(usize),
}

/// A chunk on its way.
#[derive(Debug)]
pub(crate) struct Piece {
    /// None if all of it is zero.
    pub(crate) hash: Option<blake3::Hash>,
    pub(crate) data: Vec<u8>,
    pub(crate) length: u32,
}

impl Piece {
    fn of(data: Vec<u8>) -> Self {
        let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
        if is_zero(&data) {
            return Self::zero(length);
        }
        Self {
            hash: Some(blake3::hash(&data)),
            data,
            length,
        }
    }

    fn zero(length: u32) -> Self {
        Self {
            hash: None,
            data: Vec::new(),
            length,
        }
    }
}

fn is_zero(data: &[u8]) -> bool {
    let zeros = [0; 4096];
    data.chunks(zeros.len())
        .all(|part| zeros.get(..part.len()) == Some(part))
}

/// Cuts a file, and hashes all of it. Ends early if nobody takes the pieces. Blocking.
pub(crate) fn run(file: File, cut: Cut, to: &mpsc::Sender<Piece>) -> io::Result<blake3::Hash> {
    let mut hasher = blake3::Hasher::new();
    match cut {
        Cut::Content => {
            for chunk in StreamCDC::new(&file, SMALLEST, USUAL, LARGEST) {
                let chunk = chunk.map_err(io::Error::from)?;
                hasher.update(&chunk.data);
                if to.blocking_send(Piece::of(chunk.data)).is_err() {
                    break;
                }
            }
        }
        Cut::Every(length) => {
            let length = length.clamp(1, LARGEST);
            every(&file, length, to, &mut hasher)?;
        }
    }
    Ok(hasher.finalize())
}

fn every(
    file: &File,
    length: usize,
    to: &mpsc::Sender<Piece>,
    hasher: &mut blake3::Hasher,
) -> io::Result<()> {
    let size = file.metadata()?.len();
    let step = length as u64;
    let mut zeros = Vec::new();
    let mut at = 0;
    let mut data_from = next_data(file, 0, size);
    while at < size {
        let end = size.min(at + step);
        let length = usize::try_from(end - at).map_err(io::Error::other)?;
        if data_from < at {
            data_from = next_data(file, at, size);
        }
        // Holes are not read: most of a guest's memory is none.
        let piece = if data_from >= end {
            zeros.resize(length, 0);
            hasher.update(&zeros);
            Piece::zero(u32::try_from(length).unwrap_or(u32::MAX))
        } else {
            let mut data = vec![0; length];
            file.read_exact_at(&mut data, at)?;
            hasher.update(&data);
            Piece::of(data)
        };
        if to.blocking_send(piece).is_err() {
            return Ok(());
        }
        at = end;
    }
    Ok(())
}

/// Where something is written from there on (lseek(2), `SEEK_DATA`); there itself, if nobody knows.
fn next_data(file: &File, at: u64, size: u64) -> u64 {
    match seek(file, SeekFrom::Data(at)) {
        Ok(data) => data,
        Err(rustix::io::Errno::NXIO) => size,
        Err(_) => at,
    }
}
