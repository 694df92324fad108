//! Kernels and modules that nobody could run, with all that is looked at.

use std::io::Write as _;

pub(crate) const RELEASE: &str = "6.1.0-57-cloud-amd64";

const EM_X86_64: u16 = 62;
const ET_REL: u16 = 1;
const ET_EXEC: u16 = 2;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const SHT_PROGBITS: u32 = 1;
const SHT_STRTAB: u32 = 3;
const HEADER: u64 = 64;
const PROGRAM_HEADER: u64 = 56;
const START: u64 = 0x0100_0000;

struct Header {
    kind: u16,
    machine: u16,
    program_headers: u16,
    sections_at: u64,
    sections: u16,
}

fn header(header: &Header) -> Vec<u8> {
    let mut bytes = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    bytes.extend(header.kind.to_le_bytes());
    bytes.extend(header.machine.to_le_bytes());
    bytes.extend(1_u32.to_le_bytes());
    bytes.extend(START.to_le_bytes());
    let programs_at = if header.program_headers > 0 {
        HEADER
    } else {
        0
    };
    bytes.extend(programs_at.to_le_bytes());
    bytes.extend(header.sections_at.to_le_bytes());
    bytes.extend(0_u32.to_le_bytes());
    for field in [64, 56, header.program_headers, 64, header.sections] {
        bytes.extend(field.to_le_bytes());
    }
    bytes.extend(header.sections.saturating_sub(1).to_le_bytes());
    bytes
}

/// A kernel, or nearly one.
#[derive(Clone)]
pub(crate) struct Kernel {
    pub(crate) machine: u16,
    pub(crate) kind: u16,
    /// Owner, number and content of its only note.
    pub(crate) note: (&'static [u8; 4], u32, Vec<u8>),
    pub(crate) text: String,
}

impl Default for Kernel {
    fn default() -> Self {
        Self {
            machine: EM_X86_64,
            kind: ET_EXEC,
            note: (b"Xen\0", 18, (START + 0x100).to_le_bytes().to_vec()),
            text: format!("Linux version %s\0Linux version {RELEASE} (someone@somewhere) #1 SMP\n"),
        }
    }
}

impl Kernel {
    pub(crate) fn make(&self) -> Vec<u8> {
        let (owner, number, content) = &self.note;
        let mut note = Vec::new();
        for field in [4, u32::try_from(content.len()).unwrap(), *number] {
            note.extend(field.to_le_bytes());
        }
        note.extend(*owner);
        note.extend(content);
        let note_at = HEADER + 2 * PROGRAM_HEADER;
        let size = note_at + (note.len() + self.text.len()) as u64;
        let mut bytes = header(&Header {
            kind: self.kind,
            machine: self.machine,
            program_headers: 2,
            sections_at: 0,
            sections: 0,
        });
        for (kind, at, size, room, align) in [
            (PT_LOAD, 0, size, 1 << 20, 1 << 12),
            (PT_NOTE, note_at, note.len() as u64, note.len() as u64, 4),
        ] {
            bytes.extend(kind.to_le_bytes());
            bytes.extend(5_u32.to_le_bytes());
            for field in [at, START + at, START + at, size, room, align] {
                bytes.extend(field.to_le_bytes());
            }
        }
        bytes.extend(note);
        bytes.extend(self.text.as_bytes());
        bytes
    }
}

/// A module for the kernel of a release.
pub(crate) fn module(release: &str) -> Vec<u8> {
    module_saying(
        format!("license=GPL\0vermagic={release} SMP preempt mod_unload modversions \0").as_bytes(),
    )
}

pub(crate) fn module_saying(info: &[u8]) -> Vec<u8> {
    const NAMES: &[u8] = b"\0.modinfo\0.shstrtab\0";
    let names_at = HEADER + info.len() as u64;
    let sections_at = (names_at + NAMES.len() as u64).next_multiple_of(8);
    let mut bytes = header(&Header {
        kind: ET_REL,
        machine: EM_X86_64,
        program_headers: 0,
        sections_at,
        sections: 3,
    });
    bytes.extend(info);
    bytes.extend(NAMES);
    bytes.resize(usize::try_from(sections_at).unwrap(), 0);
    for (name, kind, at, size) in [
        (0, 0, 0, 0),
        (1, SHT_PROGBITS, HEADER, info.len() as u64),
        (10, SHT_STRTAB, names_at, NAMES.len() as u64),
    ] {
        bytes.extend(u32::to_le_bytes(name));
        bytes.extend(u32::to_le_bytes(kind));
        for field in [0, 0, at, size, 0, 1, 0] {
            bytes.extend(u64::to_le_bytes(field));
        }
    }
    bytes
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packed.write_all(bytes).unwrap();
    packed.finish().unwrap()
}

pub(crate) fn xz(bytes: &[u8]) -> Vec<u8> {
    let mut packed = liblzma::write::XzEncoder::new(Vec::new(), 0);
    packed.write_all(bytes).unwrap();
    packed.finish().unwrap()
}

pub(crate) fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).unwrap()
}

/// As `lz4 -l`.
pub(crate) fn lz4(bytes: &[u8]) -> Vec<u8> {
    let mut packed = b"\x02\x21\x4c\x18".to_vec();
    for block in bytes.chunks(8 << 20) {
        let block = lz4_flex::block::compress(block);
        packed.extend(u32::try_from(block.len()).unwrap().to_le_bytes());
        packed.extend(block);
    }
    packed
}

/// What is packed, and behind it how much it is, as the kernel's build has it; gzip ends with that itself.
pub(crate) fn sized(mut packed: Vec<u8>, size: usize) -> Vec<u8> {
    packed.extend(u32::try_from(size).unwrap().to_le_bytes());
    packed
}

/// A bzImage with two sectors of setup.
pub(crate) fn bzimage(payload: &[u8]) -> Vec<u8> {
    const OFFSET: u32 = 0x2cc;
    let mut image = vec![0; 3 * 512 + OFFSET as usize];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[2]);
    put(0x202, b"HdrS");
    put(0x206, &0x020f_u16.to_le_bytes());
    put(0x248, &OFFSET.to_le_bytes());
    put(0x24c, &u32::try_from(payload.len()).unwrap().to_le_bytes());
    image.extend(payload);
    // What follows it is the code that unpacks it.
    image.extend([0x90; 100]);
    image
}
