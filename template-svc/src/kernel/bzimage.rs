//! bzImages: a kernel that unpacks itself. We do that for it, since a VMM without firmware boots what is in it
//! (Documentation/arch/x86/boot.rst of Linux).

use std::{
    borrow::Cow,
    io::{self, Read},
    ops::Range,
};

use flate2::read::GzDecoder;

use super::{KernelError, LARGEST_KERNEL, bounded, xz, zstd};

const ELF: &[u8] = b"\x7fELF";
const GZIP: &[u8] = b"\x1f\x8b\x08";
const XZ: &[u8] = b"\xfd7zXZ\0";
const ZSTD: &[u8] = b"\x28\xb5\x2f\xfd";
const LZ4: &[u8] = b"\x02\x21\x4c\x18";
/// What a block of lz4's legacy format unpacks to, at most (doc/lz4_Frame_format.md of lz4).
const LZ4_BLOCK: usize = 8 << 20;

// Fields of the setup header.
const SETUP_SECTORS: usize = 0x1f1;
const MAGIC: usize = 0x202;
const PROTOCOL: usize = 0x206;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;

const SECTOR: usize = 512;
/// The first that says where the payload is.
const OLDEST_PROTOCOL: u16 = 0x0208;

/// The uncompressed kernel of an image.
pub fn vmlinux(image: &[u8]) -> Result<Cow<'_, [u8]>, KernelError> {
    if image.starts_with(ELF) {
        return Ok(Cow::Borrowed(image));
    }
    let kernel = unpack(payload(image)?)?;
    if kernel.starts_with(ELF) {
        Ok(Cow::Owned(kernel))
    } else {
        Err(KernelError::Image("what is packed in it is no ELF file"))
    }
}

fn field<const N: usize>(image: &[u8], at: usize) -> Result<[u8; N], KernelError> {
    let bytes = image.get(at..).and_then(|rest| rest.first_chunk());
    bytes
        .copied()
        .ok_or(KernelError::Image("it ends within its header"))
}

fn payload(image: &[u8]) -> Result<&[u8], KernelError> {
    if image.get(MAGIC..).and_then(|rest| rest.first_chunk()) != Some(b"HdrS") {
        return Err(KernelError::NotAKernel);
    }
    let [minor, major] = field(image, PROTOCOL)?;
    if u16::from_le_bytes([minor, major]) < OLDEST_PROTOCOL {
        return Err(KernelError::Protocol { major, minor });
    }
    let sectors = match field(image, SETUP_SECTORS)? {
        // Of old.
        [0] => 4,
        [sectors] => usize::from(sectors),
    };
    let offset = u32::from_le_bytes(field(image, PAYLOAD_OFFSET)?) as usize;
    let length = u32::from_le_bytes(field(image, PAYLOAD_LENGTH)?) as usize;
    let start = ((sectors + 1) * SECTOR).checked_add(offset);
    let range = start.and_then(|start| Some(start..start.checked_add(length)?));
    let payload = range.and_then(|range| image.get(range));
    payload.ok_or(KernelError::Image("it ends before its payload does"))
}

/// Behind what is packed is its size, as four bytes; gzip has that of its own.
fn unpack(payload: &[u8]) -> Result<Vec<u8>, KernelError> {
    let (stream, size) = payload
        .split_last_chunk()
        .ok_or(KernelError::Image("its payload is empty"))?;
    let size = u64::from(u32::from_le_bytes(*size));
    let what = "the kernel in the bzImage";
    if size > LARGEST_KERNEL {
        return Err(KernelError::TooLarge {
            what: what.into(),
            most: LARGEST_KERNEL,
        });
    }
    let broken = |cause| KernelError::Unpack {
        what: what.into(),
        cause,
    };
    let reader: Box<dyn Read + '_> = if payload.starts_with(GZIP) {
        Box::new(GzDecoder::new(payload))
    } else if payload.starts_with(XZ) {
        Box::new(xz(stream).map_err(broken)?)
    } else if payload.starts_with(ZSTD) {
        Box::new(zstd(stream).map_err(broken)?)
    } else if let Some(blocks) = stream.strip_prefix(LZ4) {
        Box::new(Lz4Blocks {
            blocks,
            buffer: vec![0; LZ4_BLOCK],
            unread: 0..0,
        })
    } else {
        return Err(KernelError::Compression);
    };
    // One that goes on for ever is another size by then.
    let kernel = bounded(reader.take(size + 1), what, LARGEST_KERNEL)?;
    if kernel.len() as u64 == size {
        Ok(kernel)
    } else {
        Err(KernelError::Image(
            "it unpacks to another size than it says",
        ))
    }
}

/// lz4's legacy format, as `lz4 -l` writes it for kernels: blocks with their packed sizes, and no end.
struct Lz4Blocks<'a> {
    blocks: &'a [u8],
    buffer: Vec<u8>,
    /// What of the buffer is unpacked and not read.
    unread: Range<usize>,
}

impl Lz4Blocks<'_> {
    fn next_block(&mut self) -> io::Result<()> {
        let cut = || io::Error::from(io::ErrorKind::UnexpectedEof);
        let (size, rest) = self.blocks.split_first_chunk::<4>().ok_or_else(cut)?;
        // Another stream may begin.
        if size == LZ4 {
            self.blocks = rest;
            return Ok(());
        }
        let size = u32::from_le_bytes(*size) as usize;
        let (block, rest) = rest.split_at_checked(size).ok_or_else(cut)?;
        let count = lz4_flex::block::decompress_into(block, &mut self.buffer);
        self.unread = 0..count.map_err(io::Error::other)?;
        self.blocks = rest;
        Ok(())
    }
}

impl Read for Lz4Blocks<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.unread.is_empty() && !self.blocks.is_empty() {
            self.next_block()?;
        }
        let mut unread = self.buffer.get(self.unread.clone()).unwrap_or_default();
        let count = unread.read(buffer)?;
        self.unread.start += count;
        Ok(count)
    }
}
