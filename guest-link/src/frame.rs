//! The codec: frames to bytes, and bytes that may hold anything back to frames. No I/O.
//!
//! The layout and its reasons are in the crate's documentation.

use std::{fmt, io::IoSlice};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};

/// Most bytes a data frame carries.
pub const MAX_PAYLOAD: usize = 64 * 1024;

/// Bytes before the payload.
pub const HEADER: usize = 28;

/// Bytes after the payload.
pub const TRAILER: usize = 4;

/// The longest frame there is; as much padding completes any half frame.
pub const MAX_FRAME: usize = HEADER + MAX_PAYLOAD + TRAILER;

/// Not text, not zero, and with a newline in it that a terminal line discipline would mangle: a mangled channel never syncs.
const MAGIC: [u8; 4] = [0x89, b'S', b'M', b'\n'];

const VERSION: u8 = 1;

/// One conversation between a host and the guest. Chosen by the host at random; zero is no epoch.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Epoch(u64);

impl Epoch {
    /// A new one, that no earlier host can have chosen.
    pub fn random() -> Self {
        Self(rand::random::<u64>().max(1))
    }

    /// From its number; zero becomes one.
    pub fn from_number(number: u64) -> Self {
        Self(number.max(1))
    }

    /// Its number.
    pub fn number(self) -> u64 {
        self.0
    }
}

impl fmt::Debug for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// What a frame is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Host to guest: take this epoch.
    Hello = 1,
    /// Guest to host: taken.
    HelloAck = 2,
    /// Bytes.
    Data = 3,
    /// No more bytes from this side.
    End = 4,
    /// The epoch is over.
    Reset = 5,
}

impl Kind {
    fn parse(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Hello,
            2 => Self::HelloAck,
            3 => Self::Data,
            4 => Self::End,
            5 => Self::Reset,
            _ => return None,
        })
    }
}

/// A whole frame, read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What it is for.
    pub kind: Kind,
    /// Whose it is.
    pub epoch: Epoch,
    /// Which of its direction it is.
    pub sequence: u32,
    /// Its bytes; empty for all but data frames.
    pub payload: Bytes,
}

struct Header {
    kind: Kind,
    epoch: Epoch,
    sequence: u32,
    length: usize,
    checksum: u32,
}

impl Header {
    /// `None` for anything that is not exactly a header.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let mut fields = bytes.get(..HEADER)?;
        // First what is cheap: a flood of bytes that begin like the magic would have each of them summed over.
        if !fields.starts_with(&MAGIC) {
            return None;
        }
        let checksum = crc32c(bytes.get(..HEADER - 4)?);
        fields.advance(MAGIC.len());
        let (version, kind, zero) = (fields.get_u8(), fields.get_u8(), fields.get_u16_le());
        let (epoch, sequence) = (fields.get_u64_le(), fields.get_u32_le());
        let (length, stated) = (fields.get_u32_le(), fields.get_u32_le());
        let kind = Kind::parse(kind)?;
        let length = usize::try_from(length).ok()?;
        let longest = if kind == Kind::Data { MAX_PAYLOAD } else { 0 };
        let right = version == VERSION
            && zero == 0
            && epoch != 0
            && length <= longest
            && stated == checksum;
        right.then_some(Self {
            kind,
            epoch: Epoch(epoch),
            sequence,
            length,
            checksum,
        })
    }

    fn bytes(kind: Kind, epoch: Epoch, sequence: u32, length: usize) -> ([u8; HEADER], u32) {
        let mut bytes = [0; HEADER];
        let mut fields = &mut bytes[..];
        fields.put_slice(&MAGIC);
        fields.put_u8(VERSION);
        fields.put_u8(kind as u8);
        fields.put_u16_le(0);
        fields.put_u64_le(epoch.0);
        fields.put_u32_le(sequence);
        fields.put_u32_le(length as u32);
        let checksum = crc32c(&bytes[..HEADER - 4]);
        bytes[HEADER - 4..].copy_from_slice(&checksum.to_le_bytes());
        (bytes, checksum)
    }
}

/// Appends a frame without payload.
pub fn put_control(out: &mut BytesMut, kind: Kind, epoch: Epoch, sequence: u32) {
    let (header, checksum) = Header::bytes(kind, epoch, sequence, 0);
    out.put_slice(&header);
    out.put_u32_le(!checksum);
}

/// Appends a data frame with as much of `slices` as one frame holds; tells how much that was.
pub fn put_data(out: &mut BytesMut, epoch: Epoch, sequence: u32, slices: &[IoSlice<'_>]) -> usize {
    let total: usize = slices.iter().map(|slice| slice.len()).sum();
    let length = total.min(MAX_PAYLOAD);
    let (header, checksum) = Header::bytes(Kind::Data, epoch, sequence, length);
    out.reserve(HEADER + length + TRAILER);
    out.put_slice(&header);
    let mut left = length;
    for slice in slices {
        let part = slice.get(..left.min(slice.len())).unwrap_or_default();
        out.put_slice(part);
        left -= part.len();
        if left == 0 {
            break;
        }
    }
    out.put_u32_le(!checksum);
    length
}

/// Appends padding: completes any half frame at the reader, and is skipped.
pub fn put_padding(out: &mut BytesMut) {
    out.put_bytes(0, MAX_FRAME);
}

/// Finds frames in a stream of bytes that may hold anything.
///
/// Bytes are put into [`Decoder::space`]; [`Decoder::next_frame`] takes frames out. Its memory is bounded by the longest
/// frame plus what the caller adds between two calls.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: BytesMut,
    skipped: u64,
}

impl Decoder {
    /// Empty.
    pub fn new() -> Self {
        Self::default()
    }

    /// Where to append bytes from the channel; has room for a good read.
    pub fn space(&mut self) -> &mut BytesMut {
        self.buffer.reserve(MAX_FRAME);
        &mut self.buffer
    }

    /// Bytes that were no part of a frame, so far.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// The next whole frame, or `None` if more bytes are needed.
    pub fn next_frame(&mut self) -> Option<Frame> {
        loop {
            self.skip_to_magic();
            if self.buffer.len() < HEADER {
                return None;
            }
            let Some(header) = Header::parse(&self.buffer) else {
                self.skip(1);
                continue;
            };
            let end = HEADER + header.length;
            let trailer = self.buffer.get(end..end + TRAILER)?;
            if trailer != (!header.checksum).to_le_bytes() {
                self.skip(1);
                continue;
            }
            self.buffer.advance(HEADER);
            let payload = self.buffer.split_to(header.length).freeze();
            self.buffer.advance(TRAILER);
            return Some(Frame {
                kind: header.kind,
                epoch: header.epoch,
                sequence: header.sequence,
                payload,
            });
        }
    }

    /// Drops bytes until the buffer is empty or starts like the magic.
    fn skip_to_magic(&mut self) {
        let [first, ..] = MAGIC;
        let at = self.buffer.iter().position(|byte| *byte == first);
        self.skip(at.unwrap_or(self.buffer.len()));
    }

    fn skip(&mut self, count: usize) {
        self.buffer.advance(count);
        self.skipped += count as u64;
    }
}

/// CRC-32C (Castagnoli), reflected, as in RFC 3720 appendix B.4.
fn crc32c(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut index = 0;
        while index < 256 {
            let mut value = index as u32;
            let mut bit = 0;
            while bit < 8 {
                value = if value & 1 == 1 {
                    (value >> 1) ^ 0x82F6_3B78
                } else {
                    value >> 1
                };
                bit += 1;
            }
            table[index] = value;
            index += 1;
        }
        table
    };
    !bytes.iter().fold(!0, |crc: u32, byte| {
        (crc >> 8) ^ TABLE[usize::from(crc as u8 ^ byte)]
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn data(epoch: u64, sequence: u32, payload: &[u8]) -> Vec<u8> {
        let mut out = BytesMut::new();
        let epoch = Epoch::from_number(epoch);
        put_data(&mut out, epoch, sequence, &[IoSlice::new(payload)]);
        out.to_vec()
    }

    fn control(kind: Kind, epoch: u64) -> Vec<u8> {
        let mut out = BytesMut::new();
        put_control(&mut out, kind, Epoch::from_number(epoch), 0);
        out.to_vec()
    }

    fn decode_all(decoder: &mut Decoder, bytes: &[u8]) -> Vec<Frame> {
        decoder.space().put_slice(bytes);
        std::iter::from_fn(|| decoder.next_frame()).collect()
    }

    #[test]
    fn crc_has_the_value_of_the_rfc() {
        assert_eq!(crc32c(&[0; 32]), 0x8A91_36AA);
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
    }

    #[test]
    fn a_length_of_four_gibibytes_is_garbage() {
        let mut decoder = Decoder::new();
        for length in [u32::MAX, MAX_PAYLOAD as u32 + 1] {
            let (mut header, _) = Header::bytes(Kind::Data, Epoch(7), 0, 0);
            header[20..24].copy_from_slice(&length.to_le_bytes());
            let checksum = crc32c(&header[..24]);
            header[24..].copy_from_slice(&checksum.to_le_bytes());
            let mut bytes = header.to_vec();
            bytes.extend(control(Kind::Hello, 9));
            let frames = decode_all(&mut decoder, &bytes);
            assert_eq!(frames.len(), 1, "the frame after it is found at once");
            assert_eq!(frames[0].kind, Kind::Hello);
        }
    }

    #[test]
    fn a_control_frame_with_payload_is_garbage() {
        let (mut header, _) = Header::bytes(Kind::Hello, Epoch(7), 0, 0);
        header[20] = 5;
        let checksum = crc32c(&header[..24]);
        header[24..].copy_from_slice(&checksum.to_le_bytes());
        assert!(Header::parse(&header).is_none());
    }

    #[test]
    fn a_half_frame_ends_with_padding_and_hides_no_greeting() {
        let whole = data(1, 0, &vec![0x89; 50_000]);
        for cut in [
            1,
            5,
            HEADER - 1,
            HEADER,
            HEADER + 1,
            40_000,
            whole.len() - 1,
        ] {
            let mut decoder = Decoder::new();
            let mut bytes = whole[..cut].to_vec();
            bytes.extend(control(Kind::Hello, 2));
            let mut padding = BytesMut::new();
            put_padding(&mut padding);
            bytes.extend(&padding);
            let frames = decode_all(&mut decoder, &bytes);
            assert_eq!(frames.len(), 1, "cut at {cut}");
            assert_eq!(frames[0].kind, Kind::Hello);
            assert_eq!(frames[0].epoch, Epoch(2));
        }
    }

    #[derive(Debug, Clone)]
    enum Piece {
        Frame(u64, u32, Vec<u8>),
        Garbage(Vec<u8>),
        HalfThenPadding(Vec<u8>, usize),
    }

    fn piece() -> impl Strategy<Value = Piece> {
        let bytes = || proptest::collection::vec(any::<u8>(), 0..300);
        prop_oneof![
            (1..u64::MAX, any::<u32>(), bytes()).prop_map(|(e, s, p)| Piece::Frame(e, s, p)),
            // Garbage that likes to look like a magic.
            proptest::collection::vec(
                prop_oneof![Just(0x89), Just(b'S'), Just(b'M'), Just(b'\n'), any::<u8>()],
                0..100
            )
            .prop_map(|mut garbage| {
                // A tail that is the start of a magic would be a half frame with nothing to complete it.
                garbage.extend([0; HEADER]);
                Piece::Garbage(garbage)
            }),
            (bytes(), any::<usize>()).prop_map(|(p, at)| Piece::HalfThenPadding(p, at)),
        ]
    }

    proptest! {
        #[test]
        fn frames_survive_anything_between_them(
            pieces in proptest::collection::vec(piece(), 0..8),
            chunk in 1_usize..5000,
        ) {
            let (mut stream, mut expected) = (Vec::new(), Vec::new());
            for piece in pieces {
                match piece {
                    Piece::Frame(epoch, sequence, payload) => {
                        stream.extend(data(epoch, sequence, &payload));
                        expected.push((epoch, sequence, payload));
                    }
                    Piece::Garbage(bytes) => stream.extend(bytes),
                    Piece::HalfThenPadding(payload, at) => {
                        let whole = data(3, 0, &payload);
                        let (half, rest) = whole.split_at(at % whole.len());
                        stream.extend(half);
                        stream.extend(vec![0; MAX_FRAME]);
                        // What was cut off may be what padding is: then it is that frame, whole.
                        if rest.iter().all(|byte| *byte == 0) {
                            expected.push((3, 0, payload));
                        }
                    }
                }
            }
            let mut decoder = Decoder::new();
            let mut found = Vec::new();
            for part in stream.chunks(chunk) {
                found.extend(decode_all(&mut decoder, part));
            }
            let found: Vec<_> = found.into_iter().map(|f| (f.epoch.0, f.sequence, f.payload.to_vec())).collect();
            prop_assert_eq!(found, expected);
        }

        #[test]
        fn no_bytes_make_it_panic_or_hoard(bytes in proptest::collection::vec(any::<u8>(), 0..4000)) {
            let mut decoder = Decoder::new();
            decode_all(&mut decoder, &bytes);
            prop_assert!(decoder.buffer.len() <= MAX_FRAME);
        }

        #[test]
        fn slices_are_joined(parts in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40_000), 0..5)) {
            let slices: Vec<_> = parts.iter().map(|part| IoSlice::new(part)).collect();
            let mut out = BytesMut::new();
            let taken = put_data(&mut out, Epoch(1), 0, &slices);
            let joined = parts.concat();
            prop_assert_eq!(taken, joined.len().min(MAX_PAYLOAD));
            let frames = decode_all(&mut Decoder::new(), &out);
            prop_assert_eq!(&frames[0].payload[..], &joined[..taken]);
        }
    }
}
