//! Kernels and modules as ELF files: as much of them as tells whether guests can have them.

use memchr::memmem;
use object::{
    LittleEndian,
    elf::{self, FileHeader64},
    read::elf::{FileHeader as _, ProgramHeader as _, SectionHeader as _},
};

use super::KernelError;

type Header = FileHeader64<LittleEndian>;

/// XEN_ELFNOTE_PHYS32_ENTRY of include/xen/interface/elfnote.h of Linux: where a kernel begins that is started in 32 bits, by its physical address.
const PHYS32_ENTRY: u32 = 18;
const BANNER: &[u8] = b"Linux version ";
/// __NEW_UTS_LEN of include/uapi/linux/utsname.h of Linux.
const LONGEST_RELEASE: usize = 64;

fn header(file: &[u8]) -> Result<&Header, object::read::Error> {
    let header = Header::parse(file)?;
    header.endian()?;
    Ok(header)
}

/// The release of an uncompressed kernel, as `uname -r` says it in a guest, if QEMU and Firecracker can boot it.
pub fn release(kernel: &[u8]) -> Result<String, KernelError> {
    let header = header(kernel).map_err(KernelError::Elf)?;
    let endian = LittleEndian;
    if header.e_machine(endian) != elf::EM_X86_64 {
        return Err(KernelError::NotBootable("it is for another CPU"));
    }
    if header.e_type(endian) != elf::ET_EXEC {
        return Err(KernelError::NotBootable("it is no executable"));
    }
    let segments = header.program_headers(endian, kernel);
    let segments = segments.map_err(KernelError::Elf)?;
    let loaded = segments
        .iter()
        .filter(|it| it.p_type(endian) == elf::PT_LOAD);
    for segment in loaded.clone() {
        let is_whole = segment.data(endian, kernel).is_ok()
            && segment.p_filesz(endian) <= segment.p_memsz(endian);
        if !is_whole {
            return Err(KernelError::NotBootable("it is cut short"));
        }
    }
    let is_loaded = |address: u64| {
        loaded.clone().any(|segment| {
            let start = segment.p_paddr(endian);
            start <= address && address - start < segment.p_memsz(endian)
        })
    };
    // Some that are no kernel's do not parse; they are not looked at further.
    let notes = segments
        .iter()
        .filter_map(|segment| segment.notes(endian, kernel).ok().flatten())
        .flat_map(|notes| notes.map_while(Result::ok));
    let mut entries = notes.filter_map(|note| {
        let is_entry = note.name() == b"Xen" && note.n_type(endian).0 == PHYS32_ENTRY;
        let desc = note.desc();
        let wide = || desc.try_into().ok().map(u64::from_le_bytes);
        let narrow = || Some(u32::from_le_bytes(desc.try_into().ok()?).into());
        if is_entry {
            wide().or_else(narrow)
        } else {
            None
        }
    });
    if !entries.any(is_loaded) {
        return Err(KernelError::NoPvh);
    }
    memmem::find_iter(kernel, BANNER)
        .find_map(|at| release_at(kernel.get(at + BANNER.len()..)?))
        .ok_or(KernelError::NoRelease)
}

/// In the kernel there is more that begins as the banner does.
fn release_at(text: &[u8]) -> Option<String> {
    let end = text
        .iter()
        .take(LONGEST_RELEASE + 1)
        .position(|b| *b == b' ')?;
    let release = text.get(..end)?;
    let is_one = release.first()?.is_ascii_digit() && release.iter().all(u8::is_ascii_graphic);
    is_one.then(|| String::from_utf8_lossy(release).into_owned())
}

/// Whether a module can be loaded into the kernel of a release; if not, why.
pub(super) fn check_module(module: &[u8], release: &str) -> Result<(), String> {
    let header = header(module).map_err(|error| format!("no whole ELF file: {error}"))?;
    let endian = LittleEndian;
    if header.e_machine(endian) != elf::EM_X86_64 || header.e_type(endian) != elf::ET_REL {
        return Err("no module for this CPU".into());
    }
    let sections = header.sections(endian, module);
    let sections = sections.map_err(|error| format!("no whole ELF file: {error}"))?;
    let info = sections.section_by_name(endian, b".modinfo");
    let info = info.and_then(|(_, section)| section.data(endian, module).ok());
    let info = info.ok_or("it says nothing of itself (.modinfo)")?;
    let magic = info
        .split(|byte| *byte == 0)
        .find_map(|field| field.strip_prefix(b"vermagic="));
    let magic = magic.ok_or("it does not say for which kernel it is (vermagic)")?;
    let of = magic.split(|byte| *byte == b' ').next().unwrap_or_default();
    if of == release.as_bytes() {
        Ok(())
    } else {
        let of: String = String::from_utf8_lossy(of)
            .chars()
            .take(LONGEST_RELEASE)
            .collect();
        Err(format!("it is for the kernel {of:?}, not for {release}"))
    }
}
