//! What of a guest's memory differs from the snapshot it was restored from, as a file.
//!
//! A restored guest maps the snapshot's memory privately, so a page it never wrote is the file's own page cache and a page it wrote is
//! anonymous. `/proc/PID/pagemap` tells them apart (bit 61, Documentation/admin-guide/mm/pagemap.rst), which needs no dirty logging
//! of any VMM. Candidates are then compared with the snapshot, so that what was written back as it was costs nothing.
//!
//! ```text
//!  magic, pages of data ..., runs (first page, pages, kind) ..., footer (where the runs begin, how many, BLAKE3 of all before)
//! ```

use std::{
    fs::{self, File},
    io::{self, BufWriter, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use super::{MEMORY, VmmError};

/// Bytes in a page of the host, and of the guest.
pub const PAGE: u64 = 4096;
const PAGE_USIZE: usize = 4096;
const MAGIC: &[u8; 16] = b"sandmesh-memory1";
const RUN: usize = 17;
const FOOTER: usize = 48;
/// Pages handled at once.
const BATCH: u64 = 256;
/// Bit 63: present, bit 62: swapped out, bit 61: of a file or shared.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_FILE: u64 = 1 << 61;

/// A difference cannot be stored or put back.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Reading or writing failed.
    #[error("guest memory: {0}")]
    Io(#[from] io::Error),
    /// The VMM does not map the file.
    #[error("the VMM does not map its guest's memory")]
    NotMapped,
    /// The file is not what was written.
    #[error("the stored memory is damaged: {0}")]
    Damaged(&'static str),
}

/// A guest's memory inside its VMM's process.
#[derive(Debug)]
pub struct GuestMemory {
    memory: File,
    pagemap: File,
    /// In order, without gaps.
    regions: Vec<Region>,
    pages: u64,
    /// Device and inode of what is mapped.
    file: (u64, u64),
}

/// Pages of the file that follow each other in the process too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Region {
    first: u64,
    pages: u64,
    address: u64,
}

/// A line of proc_pid_maps(5).
#[derive(Debug, Clone, Copy)]
struct Area {
    start: u64,
    end: u64,
    /// Into the file.
    offset: u64,
    inode: u64,
    is_writable: bool,
}

impl Area {
    /// address perms offset dev inode path
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split_ascii_whitespace();
        let (range, permissions, offset) = (fields.next()?, fields.next()?, fields.next()?);
        let (start, end) = range.split_once('-')?;
        Some(Self {
            start: number(start)?,
            end: number(end)?,
            offset: number(offset)?,
            inode: fields.nth(1)?.parse().ok()?,
            is_writable: permissions.starts_with("rw"),
        })
    }
}

/// Where the file lies, by what the process maps. A VMM may map it in parts: x86 has a hole below 4 GiB. And where the guest gave pages
/// back, Firecracker has put anonymous memory over the file's: those belong to whatever part of the file they are in the middle of.
fn regions(maps: &str, inode: u64, length: u64) -> Option<Vec<Region>> {
    let areas: Vec<Area> = maps.lines().filter_map(Area::parse).collect();
    // Parts of the file at the same distance from it are one region: first and last byte of it that is seen, and the distance.
    let mut seen: Vec<(u64, u64, u64)> = Vec::new();
    for area in areas.iter().filter(|area| area.inode == inode) {
        let (distance, end) = (
            area.start.checked_sub(area.offset)?,
            area.offset + (area.end - area.start),
        );
        match seen.iter_mut().find(|(_, _, other)| *other == distance) {
            Some((first, last, _)) => {
                *first = area.offset.min(*first);
                *last = end.max(*last);
            }
            None => seen.push((area.offset, end, distance)),
        }
    }
    seen.sort_unstable();
    // How far anonymous memory reaches from an address, up and down.
    let above = |mut at: u64, limit: u64| {
        while at < limit
            && let Some(area) = areas.iter().find(|area| area.start == at)
            && (area.inode, area.is_writable) == (0, true)
        {
            at = area.end;
        }
        at.min(limit)
    };
    let below = |mut at: u64, limit: u64| {
        while at > limit
            && let Some(area) = areas.iter().find(|area| area.end == at)
            && (area.inode, area.is_writable) == (0, true)
        {
            at = area.start;
        }
        at.max(limit)
    };
    let mut at = 0;
    let mut regions: Vec<Region> = Vec::new();
    for (index, (first, last, distance)) in seen.iter().copied().enumerate() {
        let begin = below(distance + first, distance + at) - distance;
        if begin > at {
            return None;
        }
        let next = seen.get(index + 1).map_or(length, |(next, _, _)| *next);
        // Two mappings of the same part: there is no telling which is the guest's.
        if next < last.min(length) {
            return None;
        }
        let mut end = above(distance + last.min(length), distance + next) - distance;
        if let Some((next, _, other)) = seen.get(index + 1)
            && end > last
            && below(other + next, other + last) - other < end
        {
            // What is between the two could be of either.
            return None;
        }
        end = end.min(length);
        regions.push(Region {
            first: at / PAGE,
            pages: (end - at) / PAGE,
            address: distance + at,
        });
        at = end;
    }
    (at == length && length > 0).then_some(regions)
}

/// A run of pages: all data, or all zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    first: u64,
    pages: u64,
    is_zero: bool,
}

impl GuestMemory {
    /// Finds where a process maps a file; `file` is followed by device and inode, so its name may have changed.
    pub fn of(pid: i32, file: &Path) -> Result<Self, MemoryError> {
        let wanted = fs::metadata(file)?;
        let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
        let regions = regions(&maps, wanted.ino(), wanted.len()).ok_or(MemoryError::NotMapped)?;
        Ok(Self {
            memory: File::options()
                .read(true)
                .write(true)
                .open(format!("/proc/{pid}/mem"))?,
            pagemap: File::open(format!("/proc/{pid}/pagemap"))?,
            regions,
            pages: wanted.len() / PAGE,
            file: (wanted.dev(), wanted.ino()),
        })
    }

    /// Calls `each` with the parts that pages have in the process: how many bytes from the first on, and their address.
    fn parts(
        &self,
        first: u64,
        pages: u64,
        mut each: impl FnMut(std::ops::Range<usize>, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        for region in &self.regions {
            let begin = first.max(region.first);
            let end = (first + pages).min(region.first + region.pages);
            if begin < end {
                let bytes =
                    |page: u64| usize::try_from((page - first) * PAGE).unwrap_or(usize::MAX);
                let address = region.address + (begin - region.first) * PAGE;
                each(bytes(begin)..bytes(end), address)?;
            }
        }
        Ok(())
    }

    fn read(&self, first: u64, into: &mut [u8]) -> io::Result<()> {
        self.parts(first, into.len() as u64 / PAGE, |part, address| {
            let part = into.get_mut(part).unwrap_or_default();
            self.memory.read_exact_at(part, address)
        })
    }

    fn write(&self, first: u64, bytes: &[u8]) -> io::Result<()> {
        self.parts(first, bytes.len() as u64 / PAGE, |part, address| {
            let part = bytes.get(part).unwrap_or_default();
            self.memory.write_all_at(part, address)
        })
    }

    /// Calls `each` with runs of pages that are the guest's own, at most [`BATCH`] long.
    fn own_pages(
        &self,
        mut each: impl FnMut(u64, u64) -> Result<(), MemoryError>,
    ) -> Result<(), MemoryError> {
        for region in &self.regions {
            self.own_pages_of(*region, &mut each)?;
        }
        Ok(())
    }

    fn own_pages_of(
        &self,
        region: Region,
        each: &mut impl FnMut(u64, u64) -> Result<(), MemoryError>,
    ) -> Result<(), MemoryError> {
        let mut entries = vec![0; usize::try_from(BATCH * 8).unwrap_or_default()];
        let (mut first, end) = (region.first, region.first + region.pages);
        while first < end {
            let count = BATCH.min(end - first);
            let bytes = entries
                .get_mut(..usize::try_from(count * 8).unwrap_or_default())
                .unwrap_or_default();
            self.pagemap
                .read_exact_at(bytes, (region.address / PAGE + first - region.first) * 8)?;
            let mut start = None;
            let (words, _) = bytes.as_chunks::<8>();
            for (page, word) in (first..).zip(words) {
                let entry = u64::from_ne_bytes(*word);
                let is_own = entry & SWAPPED != 0 || (entry & PRESENT != 0 && entry & OF_FILE == 0);
                match (start, is_own) {
                    (None, true) => start = Some(page),
                    (Some(begin), false) => {
                        each(begin, page - begin)?;
                        start = None;
                    }
                    _ => {}
                }
            }
            if let Some(begin) = start {
                each(begin, first + count - begin)?;
            }
            first += count;
        }
        Ok(())
    }

    /// Bytes that are the guest's own. Blocking.
    pub fn own_bytes(&self) -> Result<u64, MemoryError> {
        let mut own = 0;
        self.own_pages(|_, pages| {
            own += pages * PAGE;
            Ok(())
        })?;
        Ok(own)
    }

    /// Writes what differs from `base` to a new file. The guest must stand still. Blocking.
    pub fn store(&self, base: &Path, to: &Path) -> Result<u64, MemoryError> {
        let base = File::open(base)?;
        let metadata = base.metadata()?;
        let mut candidates = Bitmap::new(self.pages);
        if (metadata.dev(), metadata.ino()) == self.file {
            self.own_pages(|first, pages| {
                candidates.set(first, pages);
                Ok(())
            })?;
        } else {
            // It was forked: what its parent had written is in the file it maps.
            candidates.set(0, self.pages);
        }
        let mut out = Writer::new(to)?;
        let mut ours = vec![0; usize::try_from(BATCH * PAGE).unwrap_or_default()];
        let mut theirs = ours.clone();
        candidates.runs(|first, pages| {
            let length = usize::try_from(pages * PAGE).unwrap_or_default();
            let (ours, theirs) = (
                ours.get_mut(..length).unwrap_or_default(),
                theirs.get_mut(..length).unwrap_or_default(),
            );
            self.read(first, ours)?;
            base.read_exact_at(theirs, first * PAGE)?;
            for (page, (own, before)) in (first..).zip(
                ours.as_chunks::<PAGE_USIZE>()
                    .0
                    .iter()
                    .zip(theirs.as_chunks::<PAGE_USIZE>().0),
            ) {
                if own != before {
                    out.put(page, own)?;
                }
            }
            Ok(())
        })?;
        out.finish()
    }

    /// Copies every page that is the guest's own into `copy`, a file as long as its memory. The guest must stand still. Blocking.
    pub fn copy_own(&self, copy: &File) -> Result<u64, MemoryError> {
        let mut buffer = vec![0; usize::try_from(BATCH * PAGE).unwrap_or_default()];
        let mut copied = 0;
        self.own_pages(|first, pages| {
            let length = usize::try_from(pages * PAGE).unwrap_or_default();
            let part = buffer.get_mut(..length).unwrap_or_default();
            self.read(first, part)?;
            copy.write_all_at(part, first * PAGE)?;
            copied += pages * PAGE;
            Ok(())
        })?;
        Ok(copied)
    }

    /// Puts a stored difference back, checking it on the way: on an error the guest must not run. Blocking.
    pub fn apply(&self, stored: &Path) -> Result<(), MemoryError> {
        Stored::open(stored)?.each(self.pages, |first, bytes| Ok(self.write(first, bytes)?))
    }
}

/// Stores what a guest that works in this folder has of its own, as [`GuestMemory::store`].
pub(super) async fn store_own(
    pid: i32,
    folder: &Path,
    base: &Path,
    to: &Path,
) -> Result<(), VmmError> {
    let (base, to) = (base.to_owned(), to.to_owned());
    of_guest(pid, folder, move |guest| guest.store(&base, &to).map(drop)).await
}

/// Copies what a guest that works in this folder has of its own, as [`GuestMemory::copy_own`].
pub(super) async fn copy_own(pid: i32, folder: &Path, copy: &Path) -> Result<(), VmmError> {
    let copy = copy.to_owned();
    of_guest(pid, folder, move |guest| {
        let copy = File::options().write(true).open(copy)?;
        guest.copy_own(&copy).map(drop)
    })
    .await
}

/// Puts a stored difference into a guest that works in this folder, as [`GuestMemory::apply`].
pub(super) async fn apply_own(pid: i32, folder: &Path, stored: PathBuf) -> Result<(), VmmError> {
    of_guest(pid, folder, move |guest| guest.apply(&stored)).await
}

/// Bytes that a guest that works in this folder has of its own.
pub(super) async fn own_bytes(pid: i32, folder: &Path) -> Result<u64, VmmError> {
    of_guest(pid, folder, GuestMemory::own_bytes).await
}

/// Works on a guest's memory on a thread of its own.
async fn of_guest<T: Send + 'static>(
    pid: i32,
    folder: &Path,
    work: impl FnOnce(&GuestMemory) -> Result<T, MemoryError> + Send + 'static,
) -> Result<T, VmmError> {
    let file = folder.join(MEMORY);
    let worked = crate::work::blocking(move || work(&GuestMemory::of(pid, &file)?)).await;
    Ok(worked.map_err(|error| VmmError::Control(io::Error::other(error)))??)
}

/// Stores that nothing differs. Blocking.
pub fn store_nothing(to: &Path) -> Result<(), MemoryError> {
    Writer::new(to)?.finish().map(drop)
}

/// Reads a stored difference whole, to see whether it is what was written. Blocking.
pub fn verify(stored: &Path) -> Result<(), MemoryError> {
    Stored::open(stored)?.each(u64::MAX / PAGE, |_, _| Ok(()))
}

/// Puts a stored difference into a file that is as long as the memory. Blocking.
pub fn apply_to_file(stored: &Path, file: &File) -> Result<(), MemoryError> {
    let pages = file.metadata()?.len() / PAGE;
    Stored::open(stored)?.each(pages, |first, bytes| {
        Ok(file.write_all_at(bytes, first * PAGE)?)
    })
}

fn number(hex: &str) -> Option<u64> {
    u64::from_str_radix(hex, 16).ok()
}

struct Bitmap {
    words: Vec<u64>,
    pages: u64,
}

impl Bitmap {
    fn new(pages: u64) -> Self {
        let words = usize::try_from(pages.div_ceil(64)).unwrap_or_default();
        Self {
            words: vec![0; words],
            pages,
        }
    }

    fn set(&mut self, first: u64, pages: u64) {
        for page in first..(first + pages).min(self.pages) {
            if let Some(word) = usize::try_from(page / 64)
                .ok()
                .and_then(|index| self.words.get_mut(index))
            {
                *word |= 1 << (page % 64);
            }
        }
    }

    fn has(&self, page: u64) -> bool {
        let word = usize::try_from(page / 64)
            .ok()
            .and_then(|index| self.words.get(index));
        word.is_some_and(|word| word & (1 << (page % 64)) != 0)
    }

    fn runs(
        &self,
        mut each: impl FnMut(u64, u64) -> Result<(), MemoryError>,
    ) -> Result<(), MemoryError> {
        let mut page = 0;
        while page < self.pages {
            if !self.has(page) {
                page += 1;
                continue;
            }
            let first = page;
            while page < self.pages && page - first < BATCH && self.has(page) {
                page += 1;
            }
            each(first, page - first)?;
        }
        Ok(())
    }
}

struct Writer {
    file: BufWriter<File>,
    hasher: blake3::Hasher,
    runs: Vec<Run>,
    at: u64,
}

impl Writer {
    fn new(path: &Path) -> Result<Self, MemoryError> {
        let mut writer = Self {
            file: BufWriter::with_capacity(1 << 20, File::create_new(path)?),
            hasher: blake3::Hasher::new(),
            runs: Vec::new(),
            at: 0,
        };
        writer.write(MAGIC)?;
        Ok(writer)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), MemoryError> {
        self.hasher.update(bytes);
        self.file.write_all(bytes)?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    fn put(&mut self, page: u64, bytes: &[u8; PAGE_USIZE]) -> Result<(), MemoryError> {
        let is_zero = bytes == &[0; PAGE_USIZE];
        match self.runs.last_mut() {
            Some(run) if run.is_zero == is_zero && run.first + run.pages == page => run.pages += 1,
            _ => self.runs.push(Run {
                first: page,
                pages: 1,
                is_zero,
            }),
        }
        if is_zero {
            return Ok(());
        }
        self.write(bytes)
    }

    fn finish(mut self) -> Result<u64, MemoryError> {
        let start = self.at;
        for run in std::mem::take(&mut self.runs) {
            let mut record = [0; RUN];
            let (first, rest) = record.split_at_mut(8);
            first.copy_from_slice(&run.first.to_le_bytes());
            let (pages, kind) = rest.split_at_mut(8);
            pages.copy_from_slice(&run.pages.to_le_bytes());
            kind.fill(u8::from(run.is_zero));
            self.write(&record)?;
        }
        let count = (self.at - start) / RUN as u64;
        self.write(&start.to_le_bytes())?;
        self.write(&count.to_le_bytes())?;
        let hash = *self.hasher.finalize().as_bytes();
        self.file.write_all(&hash)?;
        self.file.flush()?;
        Ok(self.at + 32)
    }
}

struct Stored {
    file: File,
    runs: Vec<Run>,
    index_at: u64,
}

impl Stored {
    fn open(path: &Path) -> Result<Self, MemoryError> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        let footer_at = length
            .checked_sub(FOOTER as u64)
            .ok_or(MemoryError::Damaged("too short"))?;
        let mut footer = [0; 16];
        file.read_exact_at(&mut footer, footer_at)?;
        let (index_at, count) = footer.split_at(8);
        let index_at = u64::from_le_bytes(index_at.try_into().unwrap_or_default());
        let count = u64::from_le_bytes(count.try_into().unwrap_or_default());
        if index_at < MAGIC.len() as u64
            || count
                .checked_mul(RUN as u64)
                .and_then(|n| n.checked_add(index_at))
                != Some(footer_at)
        {
            return Err(MemoryError::Damaged("its index is not where it should be"));
        }
        let mut index = vec![0; usize::try_from(footer_at - index_at).unwrap_or_default()];
        file.read_exact_at(&mut index, index_at)?;
        let runs = index
            .as_chunks::<RUN>()
            .0
            .iter()
            .map(|record| {
                let (first, rest) = record.split_at(8);
                let (pages, kind) = rest.split_at(8);
                Run {
                    first: u64::from_le_bytes(first.try_into().unwrap_or_default()),
                    pages: u64::from_le_bytes(pages.try_into().unwrap_or_default()),
                    is_zero: kind == [1],
                }
            })
            .collect();
        file.seek(SeekFrom::Start(0))?;
        Ok(Self {
            file,
            runs,
            index_at,
        })
    }

    /// Hands out all pages in batches; the checksum covers all of it, so an error may come after the last.
    fn each(
        mut self,
        pages: u64,
        mut put: impl FnMut(u64, &[u8]) -> Result<(), MemoryError>,
    ) -> Result<(), MemoryError> {
        let mut hasher = blake3::Hasher::new();
        let mut magic = [0; MAGIC.len()];
        self.file.read_exact(&mut magic)?;
        if &magic != MAGIC {
            return Err(MemoryError::Damaged("it is no stored memory"));
        }
        hasher.update(&magic);
        let mut buffer = vec![0; usize::try_from(BATCH * PAGE).unwrap_or_default()];
        let mut at = magic.len() as u64;
        for run in &self.runs {
            if run
                .first
                .checked_add(run.pages)
                .is_none_or(|end| end > pages)
            {
                return Err(MemoryError::Damaged("it has pages beyond the memory's end"));
            }
            let mut done = 0;
            while done < run.pages {
                let count = BATCH.min(run.pages - done);
                let length = usize::try_from(count * PAGE).unwrap_or_default();
                let part = buffer.get_mut(..length).unwrap_or_default();
                if run.is_zero {
                    part.fill(0);
                } else {
                    at += length as u64;
                    if at > self.index_at {
                        return Err(MemoryError::Damaged("pages are missing"));
                    }
                    self.file.read_exact(part)?;
                    hasher.update(part);
                }
                put(run.first + done, part)?;
                done += count;
            }
        }
        if at != self.index_at {
            return Err(MemoryError::Damaged("it has pages its index does not know"));
        }
        let mut rest = Vec::new();
        self.file.read_to_end(&mut rest)?;
        let (covered, hash) = rest.split_at(rest.len().saturating_sub(32));
        hasher.update(covered);
        if hasher.finalize().as_bytes().as_slice() != hash {
            return Err(MemoryError::Damaged("its checksum is wrong"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(unsafe_code)] // a private mapping in this process stands in for a VMM's

    use super::*;

    const PAGES: usize = 600;

    /// A private mapping of a file, as a VMM has it.
    struct Mapping {
        at: std::ptr::NonNull<std::ffi::c_void>,
        file: tempfile::NamedTempFile,
    }

    impl Mapping {
        fn new() -> Self {
            let file = tempfile::NamedTempFile::new().unwrap();
            let bytes: Vec<u8> = (0..PAGES)
                .flat_map(|page| [(page % 251) as u8; 4096])
                .collect();
            fs::write(file.path(), bytes).unwrap();
            Self::over(file)
        }

        fn over(file: tempfile::NamedTempFile) -> Self {
            // SAFETY: a new mapping of a file that is long enough.
            let at = unsafe {
                nix::sys::mman::mmap(
                    None,
                    (PAGES * 4096).try_into().unwrap(),
                    nix::sys::mman::ProtFlags::PROT_READ | nix::sys::mman::ProtFlags::PROT_WRITE,
                    nix::sys::mman::MapFlags::MAP_PRIVATE,
                    file.as_file(),
                    0,
                )
            }
            .unwrap();
            Self { at, file }
        }

        fn bytes(&mut self) -> &mut [u8] {
            // SAFETY: the mapping is as long as that and lives as long as `self`.
            unsafe { std::slice::from_raw_parts_mut(self.at.cast().as_ptr(), PAGES * 4096) }
        }

        fn memory(&self) -> GuestMemory {
            GuestMemory::of(std::process::id().cast_signed(), self.file.path()).unwrap()
        }

        fn twin(&self) -> Self {
            let copy = tempfile::NamedTempFile::new().unwrap();
            fs::copy(self.file.path(), copy.path()).unwrap();
            Self::over(copy)
        }
    }

    #[test]
    fn a_file_in_parts_and_with_holes_is_found_whole() {
        let line = |start: u64, pages: u64, offset: u64, inode: u64| {
            let (start, end) = (start * PAGE, (start + pages) * PAGE);
            format!(
                "{start:x}-{end:x} rw-p {:08x} 08:01 {inode} /memory\n",
                offset * PAGE
            )
        };
        let region = |first, pages, address: u64| Region {
            first,
            pages,
            address: address * PAGE,
        };
        let found = |maps: &[String], pages: u64| regions(&maps.concat(), 7, pages * PAGE);
        let whole = [line(50, 3, 0, 0), line(100, 10, 0, 7), line(200, 1, 0, 8)];
        assert_eq!(found(&whole, 10), Some(vec![region(0, 10, 100)]));
        assert_eq!(found(&whole, 11), None, "not all of it");
        let parts = [line(100, 10, 0, 7), line(300, 10, 10, 7)];
        let both = Some(vec![region(0, 10, 100), region(10, 10, 300)]);
        assert_eq!(found(&parts, 20), both);
        // The guest gave back pages in the middle, and the first and last.
        let holes = [
            line(100, 2, 0, 0),
            line(102, 3, 2, 7),
            line(105, 1, 0, 0),
            line(106, 4, 6, 7),
            line(300, 8, 10, 7),
            line(308, 2, 0, 0),
        ];
        assert_eq!(found(&holes, 20), both);
        // At the border of two parts it shows whose it is, or it does not.
        let border = [line(100, 9, 0, 7), line(109, 1, 0, 0), line(300, 10, 10, 7)];
        assert_eq!(found(&border, 20), both);
        let border = [line(100, 10, 0, 7), line(300, 2, 0, 0), line(302, 8, 12, 7)];
        assert_eq!(found(&border, 20), both);
        let either = [
            line(100, 9, 0, 7),
            line(109, 1, 0, 0),
            line(299, 1, 0, 0),
            line(300, 10, 10, 7),
        ];
        assert_eq!(found(&either, 20), None);
        let twice = [line(100, 10, 0, 7), line(300, 10, 0, 7)];
        assert_eq!(found(&twice, 10), None);
        let nothing = [line(100, 10, 0, 8)];
        assert_eq!(found(&nothing, 10), None);
    }

    #[test]
    fn pages_given_back_to_the_host_cost_nothing_and_later_ones_count() {
        let mut guest = changed();
        // What Firecracker's balloon does to a restored guest's memory.
        // SAFETY: the range is the mapping's own, and nothing refers to it.
        unsafe {
            nix::sys::mman::mmap_anonymous(
                Some((guest.at.as_ptr().addr() + 100 * 4096).try_into().unwrap()),
                (300 * 4096).try_into().unwrap(),
                nix::sys::mman::ProtFlags::PROT_READ | nix::sys::mman::ProtFlags::PROT_WRITE,
                nix::sys::mman::MapFlags::MAP_PRIVATE | nix::sys::mman::MapFlags::MAP_FIXED,
            )
        }
        .unwrap();
        guest.bytes()[200 * 4096] = 5;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("diff");
        let size = guest.memory().store(guest.file.path(), &path).unwrap();
        assert!(size < 3 * 4096, "{size}");
        let mut twin = guest.twin();
        twin.memory().apply(&path).unwrap();
        assert_eq!(twin.bytes()[200 * 4096..][..2], [5, 0]);
        assert_eq!(twin.bytes()[3 * 4096 + 7], 77);
    }

    fn changed() -> Mapping {
        let mut guest = Mapping::new();
        let bytes = guest.bytes();
        bytes[3 * 4096 + 7] = 77;
        bytes[4 * 4096..5 * 4096].fill(0);
        bytes[100 * 4096..400 * 4096].fill(9);
        // Written, and as before.
        let before = bytes[500 * 4096];
        bytes[500 * 4096] = std::hint::black_box(before);
        guest
    }

    #[test]
    fn what_differs_is_stored_and_put_back() {
        let mut guest = changed();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("diff");
        let size = guest.memory().store(guest.file.path(), &path).unwrap();
        assert_eq!(size, fs::metadata(&path).unwrap().len());
        assert!(size < 303 * 4096, "{size}: the page as before is not in it");
        let mut twin = guest.twin();
        // Read, so mapped, but not written.
        assert_eq!(twin.bytes()[0], 0);
        twin.memory().apply(&path).unwrap();
        assert!(twin.bytes() == guest.bytes());
        let again = folder.path().join("again");
        twin.memory().store(twin.file.path(), &again).unwrap();
        assert!(fs::read(&again).unwrap() == fs::read(&path).unwrap());

        let whole = tempfile::tempfile().unwrap();
        io::copy(&mut File::open(guest.file.path()).unwrap(), &mut &whole).unwrap();
        apply_to_file(&path, &whole).unwrap();
        let mut bytes = vec![0; PAGES * 4096];
        whole.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes == guest.bytes());
    }

    #[test]
    fn what_a_fork_had_from_the_start_counts() {
        let mut parent = changed();
        let folder = tempfile::tempdir().unwrap();
        // A child maps all of the parent's memory as its file, and writes one page more.
        let copy = tempfile::NamedTempFile::new().unwrap();
        fs::copy(parent.file.path(), copy.path()).unwrap();
        let file = File::options().write(true).open(copy.path()).unwrap();
        assert!(parent.memory().copy_own(&file).unwrap() >= 303 * PAGE);
        let mut child = Mapping::over(copy);
        assert!(child.bytes() == parent.bytes());
        child.bytes()[550 * 4096] = 1;
        let from_child = folder.path().join("child");
        child
            .memory()
            .store(parent.file.path(), &from_child)
            .unwrap();
        let mut restored = parent.twin();
        restored.memory().apply(&from_child).unwrap();
        assert!(restored.bytes() == child.bytes());
    }

    #[test]
    fn damage_is_noticed_wherever_it_is() {
        let guest = changed();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("diff");
        guest.memory().store(guest.file.path(), &path).unwrap();
        let good = fs::read(&path).unwrap();
        let twin = guest.twin();
        for at in [
            0,
            20,
            good.len() / 2,
            good.len() - 60,
            good.len() - 40,
            good.len() - 1,
        ] {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            fs::write(&path, &bad).unwrap();
            assert!(twin.memory().apply(&path).is_err(), "bit flipped at {at}");
        }
        for length in [0, 10, 47, good.len() / 2, good.len() - 1] {
            fs::write(&path, &good[..length]).unwrap();
            assert!(twin.memory().apply(&path).is_err(), "cut to {length}");
        }
    }
}
