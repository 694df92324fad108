//! What a layer's tarball holds, entry by entry: ustar, GNU and PAX with their long names, sparse files, times and attributes.
//!
//! `tar-core` understands the headers; here they meet a stream. What a reader of another make would take for something else (names with a
//! NUL, a file that claims content where its kind has none) is refused, or read as Go's `archive/tar` reads it, with which images are made.

use std::{
    ffi::OsStr,
    io::{self, Read},
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

use tar_core::{
    EntryType, HEADER_SIZE, Header, PaxExtensions,
    parse::{Limits, ParseError, ParseEvent, ParsedEntry, Parser},
};

/// Headers of one entry at most: its names, attributes and map of a sparse file.
const MOST_HEADERS: usize = 4 << 20;
const READ: usize = 64 << 10;
/// Most bytes of a file, as Go's reader has it.
const MOST_SIZE: u64 = i64::MAX.unsigned_abs();
/// Longest name, as of a path (path_resolution(7), `PATH_MAX`).
const MOST_NAME: u32 = 4096;
const NANOS: u32 = 1_000_000_000;

/// What is wrong with an entry, or with what comes where one should be.
#[derive(Debug, thiserror::Error)]
pub enum EntryError {
    /// No tarball, or a damaged one.
    #[error("{0}")]
    Malformed(String),
    /// It ends within an entry.
    #[error("it ends in the middle")]
    Cut,
    /// Names and attributes of one entry are larger than any real ones.
    #[error("its headers are larger than {MOST_HEADERS} bytes")]
    Headers,
    /// The name leads out of the folder, or cannot be one.
    #[error("{0}")]
    Name(&'static str),
    /// Something that no file system has.
    #[error("its kind is {0:?}, which is none of a file system")]
    Kind(char),
    /// Neither can be read.
    #[error("{0}")]
    Read(#[from] io::Error),
}

/// Seconds since 1970 and nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Time {
    pub(super) seconds: i64,
    pub(super) nanos: u32,
}

/// A region of a sparse file that is not zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Region {
    pub(super) offset: u64,
    pub(super) length: u64,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Folder,
    /// Its content follows, region by region.
    File {
        size: u64,
        regions: Vec<Region>,
    },
    Symlink(PathBuf),
    /// To another entry's path, within the root.
    Link(PathBuf),
    Character {
        major: u32,
        minor: u32,
    },
    Block {
        major: u32,
        minor: u32,
    },
    Fifo,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// Within the root; empty for the root itself.
    pub(super) path: PathBuf,
    pub(super) kind: Kind,
    /// Permissions, set-ID and sticky bits.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) modified: Time,
    /// Names and values.
    pub(super) attributes: Vec<(String, Vec<u8>)>,
}

/// Reads entries from a stream; each one's content is read from it before the next.
pub(super) struct Entries<R> {
    from: R,
    parser: Parser,
    buffer: Vec<u8>,
    /// How far the buffer is used up.
    used: usize,
    /// Content of the current entry that was not read.
    content: u64,
    /// After it, to a whole block.
    padding: u64,
    /// The name of the current entry, for errors.
    name: Vec<u8>,
}

impl<R: Read> Entries<R> {
    pub(super) fn new(from: R) -> Self {
        let limits = Limits {
            max_path_len: Some(MOST_NAME),
            ..Limits::default()
        };
        Self {
            from,
            parser: Parser::new(limits),
            buffer: Vec::new(),
            used: 0,
            content: 0,
            padding: 0,
            name: Vec::new(),
        }
    }

    /// Of the current entry as it stands in the tarball, printable.
    pub(super) fn name(&self) -> String {
        let most = self.name.get(..256).unwrap_or(&self.name);
        most.escape_ascii().to_string()
    }

    /// The next entry; what of the one before was not read is skipped.
    pub(super) fn next(&mut self) -> Result<Option<Entry>, EntryError> {
        self.skip()?;
        self.name.clear();
        loop {
            let input = self.buffer.get(self.used..).unwrap_or_default();
            let (consumed, parsed) = match self.parser.parse(input).map_err(malformed)? {
                ParseEvent::NeedData { .. } => {
                    if self.fill()? {
                        continue;
                    }
                    // Some writers leave the two empty blocks at the end out, or one of them.
                    let rest = self.buffer.get(self.used..).unwrap_or_default();
                    return if rest.iter().all(|byte| *byte == 0) {
                        Ok(None)
                    } else {
                        Err(EntryError::Cut)
                    };
                }
                ParseEvent::End { .. } => return Ok(None),
                ParseEvent::GlobalExtensions { consumed, .. } => {
                    // As Go's reader does: it is no entry, and what it holds is a comment in practice.
                    self.used += consumed;
                    continue;
                }
                ParseEvent::Entry { consumed, entry } => {
                    self.name = entry.path.to_vec();
                    check_headers(input.get(..consumed).unwrap_or_default())?;
                    (consumed, convert(&entry, None)?)
                }
                ParseEvent::SparseEntry {
                    consumed,
                    entry,
                    sparse_map,
                    real_size,
                } => {
                    self.name = entry.path.to_vec();
                    let region = |it: &tar_core::SparseEntry| Region {
                        offset: it.offset,
                        length: it.length,
                    };
                    let map = check_headers(input.get(..consumed).unwrap_or_default())?;
                    let sparse = Sparse {
                        size: real_size,
                        regions: sparse_map.iter().map(region).collect(),
                        map,
                    };
                    (consumed, convert(&entry, Some(sparse))?)
                }
            };
            self.used += consumed;
            self.content = match &parsed.kind {
                Kind::File { regions, .. } => regions.iter().map(|region| region.length).sum(),
                _ => 0,
            };
            let block = HEADER_SIZE as u64;
            self.padding = self.content.next_multiple_of(block) - self.content;
            return Ok(Some(parsed));
        }
    }

    /// More of the stream into the buffer; whether there was more.
    fn fill(&mut self) -> Result<bool, EntryError> {
        self.buffer.drain(..self.used);
        self.used = 0;
        let length = self.buffer.len();
        if length >= MOST_HEADERS {
            return Err(EntryError::Headers);
        }
        self.buffer.resize(length + READ, 0);
        let mut end = length;
        // All there is room for: headers are looked at anew each time.
        let read = loop {
            let space = self.buffer.get_mut(end..).unwrap_or_default();
            if space.is_empty() {
                break Ok(());
            }
            match read_some(&mut self.from, space) {
                Ok(0) => break Ok(()),
                Ok(count) => end += count,
                Err(error) => break Err(error),
            }
        };
        self.buffer.truncate(end);
        read?;
        Ok(end > length)
    }

    fn skip(&mut self) -> Result<(), EntryError> {
        let mut left = self.content + self.padding;
        loop {
            let there = self.buffer.len() - self.used;
            let count = usize::try_from(left).map_or(there, |left| left.min(there));
            self.used += count;
            left -= count as u64;
            if left == 0 {
                break;
            }
            if !self.fill()? {
                // Nothing is missing but what means nothing.
                if left <= self.padding {
                    break;
                }
                return Err(EntryError::Cut);
            }
        }
        (self.content, self.padding) = (0, 0);
        Ok(())
    }

    /// Some of the current entry's content; 0 at its end.
    pub(super) fn read_content(&mut self, into: &mut [u8]) -> Result<usize, EntryError> {
        let most = usize::try_from(self.content).map_or(into.len(), |most| most.min(into.len()));
        if most == 0 {
            return Ok(0);
        }
        let count = self.take(into.get_mut(..most).unwrap_or_default())?;
        if count == 0 {
            return Err(EntryError::Cut);
        }
        self.content -= count as u64;
        Ok(count)
    }

    fn take(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let mut there = self.buffer.get(self.used..).unwrap_or_default();
        if there.is_empty() {
            return read_some(&mut self.from, into);
        }
        let count = there.read(into)?;
        self.used += count;
        Ok(count)
    }

    /// The rest of the stream, which means nothing, but belongs to its digest.
    pub(super) fn drain(mut self) -> io::Result<()> {
        io::copy(&mut self.from, &mut io::sink()).map(drop)
    }
}

fn read_some(from: &mut impl Read, into: &mut [u8]) -> io::Result<usize> {
    loop {
        match from.read(into) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            read => return read,
        }
    }
}

fn malformed(error: ParseError) -> EntryError {
    match error {
        ParseError::Io(error) => EntryError::Read(error),
        ParseError::UnexpectedEof { .. } => EntryError::Cut,
        error => EntryError::Malformed(error.to_string()),
    }
}

/// Where a header keeps its numbers (tar(5)): mode, owner, group, size, time, checksum.
const NUMBERS: [std::ops::Range<usize>; 6] =
    [100..108, 108..116, 116..124, 124..136, 136..148, 148..156];
const TYPE_FLAG: usize = 156;

/// Refuses headers of one entry that readers understand differently: numbers that begin with a NUL are nothing to some, and what follows it to
/// others. Says how many bytes come after the last of them, of a sparse file's map.
fn check_headers(mut headers: &[u8]) -> Result<u64, EntryError> {
    while let Some((block, rest)) = headers.split_first_chunk::<HEADER_SIZE>() {
        headers = rest;
        if block.iter().all(|byte| *byte == 0) {
            continue;
        }
        for numbers in NUMBERS {
            let number = block.get(numbers).unwrap_or_default();
            if number.starts_with(&[0]) && number.iter().any(|byte| *byte != 0) {
                return Err(EntryError::Malformed("a number begins with a NUL".into()));
            }
        }
        let header = Header::from_bytes(block);
        let is_extension = matches!(
            header.entry_type(),
            EntryType::XHeader | EntryType::GnuLongName | EntryType::GnuLongLink
        ) && (header.is_gnu() || header.is_ustar());
        if !is_extension {
            break;
        }
        let size = header
            .entry_size()
            .map_err(|error| malformed(error.into()))?;
        let size = usize::try_from(size)
            .ok()
            .and_then(|size| size.checked_next_multiple_of(HEADER_SIZE));
        headers = size
            .and_then(|size| headers.get(size..))
            .unwrap_or_default();
    }
    Ok(headers.len() as u64)
}

/// What a sparse file is said to be.
struct Sparse {
    size: u64,
    regions: Vec<Region>,
    /// Bytes of its map.
    map: u64,
}

fn convert(entry: &ParsedEntry<'_>, sparse: Option<Sparse>) -> Result<Entry, EntryError> {
    let is_file = matches!(
        entry.entry_type,
        EntryType::Regular | EntryType::Continuous | EntryType::GnuSparse
    );
    let flag = entry.header.as_bytes().get(TYPE_FLAG);
    // Tarballs older than POSIX, whose files have no other flag than this, have folders that are files whose names end so.
    let is_old_folder = entry.path.ends_with(b"/") && flag == Some(&0);
    if sparse.is_some() && (!is_file || is_old_folder) {
        return Err(EntryError::Malformed(
            "a map of a sparse file, but no file".into(),
        ));
    }
    let kind = match entry.entry_type {
        EntryType::Regular if is_old_folder => Kind::Folder,
        EntryType::Regular | EntryType::Continuous | EntryType::GnuSparse => file(entry, sparse)?,
        EntryType::Directory => Kind::Folder,
        EntryType::Symlink => Kind::Symlink(target(entry)?),
        EntryType::Link => Kind::Link(inside(target(entry)?.as_os_str().as_bytes())?),
        EntryType::Char => {
            let (major, minor) = device(entry)?;
            Kind::Character { major, minor }
        }
        EntryType::Block => {
            let (major, minor) = device(entry)?;
            Kind::Block { major, minor }
        }
        EntryType::Fifo => Kind::Fifo,
        other => return Err(EntryError::Kind(char::from(other.to_byte()))),
    };
    let id = |id: u64| {
        u32::try_from(id)
            .ok()
            .filter(|id| *id != u32::MAX)
            .ok_or_else(|| EntryError::Malformed(format!("{id} is no owner")))
    };
    let mut attributes = Vec::new();
    for (name, value) in &entry.xattrs {
        let name = String::from_utf8(name.to_vec())
            .map_err(|_| EntryError::Name("the name of an attribute is not UTF-8"))?;
        attributes.push((name, value.to_vec()));
    }
    Ok(Entry {
        path: inside(&entry.path)?,
        kind,
        mode: entry.mode & 0o7777,
        uid: id(entry.uid)?,
        gid: id(entry.gid)?,
        modified: modified(entry)?,
        attributes,
    })
}

fn file(entry: &ParsedEntry<'_>, sparse: Option<Sparse>) -> Result<Kind, EntryError> {
    let size = sparse.as_ref().map_or(entry.size, |sparse| sparse.size);
    if size.max(entry.size) > MOST_SIZE {
        return Err(EntryError::Malformed(format!(
            "{size} bytes are no size of a file"
        )));
    }
    let Some(Sparse { regions, map, .. }) = sparse else {
        let whole = Region {
            offset: 0,
            length: entry.size,
        };
        return Ok(Kind::File {
            size: entry.size,
            regions: vec![whole],
        });
    };
    let mut end = 0;
    let mut stored = 0_u64;
    for region in &regions {
        let ends = region.offset.checked_add(region.length);
        match ends {
            Some(ends) if region.offset >= end && ends <= size => end = ends,
            _ => {
                return Err(EntryError::Malformed(
                    "its map of a sparse file has regions that overlap or lie beyond its end"
                        .into(),
                ));
            }
        }
        stored += region.length;
    }
    // A size of its own in PAX is of the map and what it maps (GNU tar, format 1.0).
    let with_map = stored + map == entry.size && pax(entry, "size")?.is_some();
    if stored != entry.size && !with_map {
        return Err(EntryError::Malformed(
            "its map of a sparse file is not of as many bytes as it has".into(),
        ));
    }
    Ok(Kind::File { size, regions })
}

fn target(entry: &ParsedEntry<'_>) -> Result<PathBuf, EntryError> {
    let target = entry.link_target.as_deref().unwrap_or_default();
    if target.is_empty() {
        return Err(EntryError::Name("it is a link to nothing"));
    }
    if target.contains(&0) {
        return Err(EntryError::Name("its target has a NUL in it"));
    }
    Ok(PathBuf::from(OsStr::from_bytes(target)))
}

fn device(entry: &ParsedEntry<'_>) -> Result<(u32, u32), EntryError> {
    match (entry.dev_major, entry.dev_minor) {
        (Some(major), Some(minor)) => Ok((major, minor)),
        _ => Err(EntryError::Malformed(
            "it is a device without numbers".into(),
        )),
    }
}

/// A name as a path below the root. Leading slashes mean nothing, as in all programs that unpack tarballs.
fn inside(name: &[u8]) -> Result<PathBuf, EntryError> {
    if name.contains(&0) {
        return Err(EntryError::Name("a name has a NUL in it"));
    }
    let mut path = PathBuf::new();
    for part in name.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return Err(EntryError::Name("a name leads out with \"..\"")),
            part => path.push(Path::new(OsStr::from_bytes(part))),
        }
    }
    Ok(path)
}

fn pax(entry: &ParsedEntry<'_>, key: &str) -> Result<Option<String>, EntryError> {
    let mut found = None;
    for extension in entry.pax.map(PaxExtensions::new).into_iter().flatten() {
        let extension = extension.map_err(|error| EntryError::Malformed(error.to_string()))?;
        if extension.key() == Ok(key) {
            found = Some(String::from_utf8_lossy(extension.value_bytes()).into_owned());
        }
    }
    Ok(found)
}

/// Whole seconds are in the header, parts of them in PAX only.
fn modified(entry: &ParsedEntry<'_>) -> Result<Time, EntryError> {
    let text = pax(entry, "mtime")?.unwrap_or_default();
    let digits = text.split_once('.').map_or("", |(_, digits)| digits);
    let mut nanos = 0;
    let mut unit = NANOS;
    for digit in digits.chars() {
        let digit = digit
            .to_digit(10)
            .ok_or_else(|| EntryError::Malformed(format!("{text:?} is no time")))?;
        unit /= 10;
        nanos += digit * unit;
    }
    let seconds = i64::try_from(entry.mtime)
        .map_err(|_| EntryError::Malformed(format!("{} is no time", entry.mtime)))?;
    Ok(Time { seconds, nanos })
}
