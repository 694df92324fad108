//! Directories as archives, out and in, each a stream.
//!
//! Out: what is in a directory, names from it on. What the acting user may not read is left out. In: nothing an archive says leads out of the
//! directory it is unpacked in, neither `..` nor a symbolic link, be it there before or from the archive itself.

use std::{
    borrow::Cow,
    cell::Cell,
    collections::HashMap,
    ffi::{OsStr, OsString},
    fs::{File, FileTimes},
    io::{self, Read, Write},
    os::unix::ffi::OsStrExt as _,
    path::{Component, Path, PathBuf},
    time::{Duration, SystemTime},
};

use flate2::read::MultiGzDecoder;
use nix::{
    sys::stat::{FileStat, Mode, SFlag, fchmod},
    unistd::{Gid, Uid, fchown},
};
use tar::{EntryType, Header};
use tonic::{Code, Status};
use zip::{ZipWriter, write::SimpleFileOptions, write::StreamWriter};

use super::folder::{DEEPEST, Folder, MOST_LINKED, kind};
use crate::errors::{path_error, refuse};

/// What comes before an entry's contents: its name and attributes, which are held in memory.
const LARGEST_HEADER: u64 = 1 << 20;
const GZIP: [u8; 2] = [0x1f, 0x8b];

/// Forms of archives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// POSIX tar with GNU's long names. Holes of sparse files are zeros.
    Tar,
    /// ZIP; names that are not UTF-8 are changed, and only files, directories and symbolic links are there. What has been packed is listed
    /// at its end, so its memory grows by some 300 bytes per entry.
    Zip,
}

/// Writes what is in a directory.
pub(crate) fn pack(path: &Path, form: Form, to: impl Write) -> io::Result<()> {
    let folder = Folder::open(path)?;
    match form {
        Form::Tar => {
            let mut packing = Packing::new(tar::Builder::new(to));
            packing.folder(&folder, Path::new(""))?;
            packing.sink.into_inner()?.flush()
        }
        Form::Zip => {
            let mut packing = Packing::new(ZipWriter::new_stream(to));
            packing.folder(&folder, Path::new(""))?;
            packing.sink.finish()?.into_inner().flush()
        }
    }
}

/// Something in a directory.
enum Item<'a> {
    File(&'a File, u64),
    Folder,
    Symlink(OsString),
    HardLink(&'a Path),
    Fifo,
}

/// A form that takes one entry after the other.
trait Sink {
    /// Whether it has hard links; if not, each name is a file of its own.
    const HAS_HARD_LINKS: bool;

    fn add(&mut self, path: &Path, stat: &FileStat, item: Item<'_>) -> io::Result<()>;
}

struct Packing<S> {
    sink: S,
    linked: HashMap<(u64, u64), PathBuf>,
}

impl<S: Sink> Packing<S> {
    fn new(sink: S) -> Self {
        Self {
            sink,
            linked: HashMap::new(),
        }
    }

    fn folder(&mut self, folder: &Folder, path: &Path) -> io::Result<()> {
        if path.components().count() > DEEPEST {
            return Err(io::Error::other("more than 512 directories in each other"));
        }
        let mut names = folder.names()?;
        names.sort_unstable();
        for name in names {
            let path = path.join(&name);
            // What went away in between is not there.
            let Ok(stat) = folder.stat(&name) else {
                continue;
            };
            let identity = (stat.st_dev, stat.st_ino);
            match kind(&stat) {
                SFlag::S_IFREG if self.linked.contains_key(&identity) => {
                    let original = &self.linked[&identity];
                    self.sink.add(&path, &stat, Item::HardLink(original))?;
                }
                SFlag::S_IFREG => {
                    let Some((file, size)) = readable(folder, &name) else {
                        continue;
                    };
                    self.sink.add(&path, &stat, Item::File(&file, size))?;
                    if S::HAS_HARD_LINKS && stat.st_nlink > 1 && self.linked.len() < MOST_LINKED {
                        self.linked.insert(identity, path);
                    }
                }
                SFlag::S_IFDIR => {
                    self.sink.add(&path, &stat, Item::Folder)?;
                    if let Ok(below) = folder.folder(&name) {
                        self.folder(&below, &path)?;
                    }
                }
                SFlag::S_IFLNK => {
                    if let Ok(target) = folder.link_target(&name) {
                        self.sink.add(&path, &stat, Item::Symlink(target))?;
                    }
                }
                SFlag::S_IFIFO => self.sink.add(&path, &stat, Item::Fifo)?,
                _ => {}
            }
        }
        Ok(())
    }
}

/// A file and its size, if the acting user may read it and it is one still.
fn readable(folder: &Folder, name: &OsStr) -> Option<(File, u64)> {
    let file = folder.file(name).ok()?;
    let metadata = file.metadata().ok().filter(std::fs::Metadata::is_file)?;
    Some((file, metadata.len()))
}

/// Exactly so many bytes, whatever becomes of the file meanwhile: an archive has said already how many come.
pub(super) fn exactly(file: &File, size: u64) -> impl Read {
    file.take(size).chain(io::repeat(0)).take(size)
}

/// Mode, owner and time; kind and size are to be set.
pub(super) fn header_of(stat: &FileStat) -> Header {
    let mut header = Header::new_gnu();
    header.set_mode(stat.st_mode & 0o7777);
    header.set_uid(stat.st_uid.into());
    header.set_gid(stat.st_gid.into());
    header.set_mtime(u64::try_from(stat.st_mtime).unwrap_or(0));
    header.set_size(0);
    header
}

/// The name of an entry that says the next one's link.
const LONG_LINK: &[u8] = b"././@LongLink";

/// A symbolic link whose target stays as it is, byte by byte: as a path "/" would become "//", and "./a" or "a//b" something else, too.
pub(super) fn append_symlink<W: Write>(
    tar: &mut tar::Builder<W>,
    header: &mut Header,
    path: &Path,
    target: &OsStr,
) -> io::Result<()> {
    header.set_entry_type(EntryType::Symlink);
    let target = target.as_bytes();
    if header.set_link_name_literal(target).is_err() {
        // Too long for a header: GNU tar has an entry for it, which comes before (tar.info, "Extensions").
        let mut long = Header::new_gnu();
        if let Some(name) = long.as_mut_bytes().get_mut(..LONG_LINK.len()) {
            name.copy_from_slice(LONG_LINK);
        }
        long.set_entry_type(EntryType::GNULongLink);
        long.set_mode(0o644);
        long.set_size(target.len() as u64 + 1);
        long.set_cksum();
        tar.append(&long, target.chain(&[0][..]))?;
    }
    tar.append_data(header, path, io::empty())
}

impl<W: Write> Sink for tar::Builder<W> {
    const HAS_HARD_LINKS: bool = true;

    fn add(&mut self, path: &Path, stat: &FileStat, item: Item<'_>) -> io::Result<()> {
        let mut header = header_of(stat);
        let mut bare = |header: &mut Header, kind| {
            header.set_entry_type(kind);
            self.append_data(header, path, io::empty())
        };
        match item {
            Item::File(file, size) => {
                header.set_entry_type(EntryType::Regular);
                header.set_size(size);
                self.append_data(&mut header, path, exactly(file, size))
            }
            Item::Folder => bare(&mut header, EntryType::Directory),
            Item::Fifo => bare(&mut header, EntryType::Fifo),
            Item::Symlink(target) => append_symlink(self, &mut header, path, &target),
            Item::HardLink(original) => {
                header.set_entry_type(EntryType::Link);
                self.append_link(&mut header, path, original)
            }
        }
    }
}

impl<W: Write> Sink for ZipWriter<StreamWriter<W>> {
    const HAS_HARD_LINKS: bool = false;

    fn add(&mut self, path: &Path, stat: &FileStat, item: Item<'_>) -> io::Result<()> {
        let name = path.to_string_lossy();
        let modified = time::OffsetDateTime::from_unix_timestamp(stat.st_mtime)
            .ok()
            // ZIP knows times from 1980 to 2107 only.
            .and_then(|time| {
                zip::DateTime::try_from(time::PrimitiveDateTime::new(time.date(), time.time())).ok()
            });
        let options = SimpleFileOptions::default()
            .unix_permissions(stat.st_mode & 0o7777)
            .last_modified_time(modified.unwrap_or_default());
        match item {
            Item::File(file, size) => {
                self.start_file(name, options.large_file(size >= u64::from(u32::MAX)))?;
                io::copy(&mut exactly(file, size), self)?;
            }
            Item::Folder => self.add_directory(name, options)?,
            Item::Symlink(target) => self.add_symlink(name, target.to_string_lossy(), options)?,
            Item::HardLink(_) | Item::Fifo => {}
        }
        Ok(())
    }
}

/// What an archive has brought.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Unpacked {
    pub(crate) entries: u64,
    pub(crate) size_bytes: u64,
    /// Devices, which no archive may make.
    pub(crate) left_out: u64,
}

/// Unpacks a tar archive, gzipped or not, in a directory. Files that are there are replaced; directories that are there get what the archive says
/// of them, or keep what they have.
pub(crate) fn unpack(
    path: &Path,
    mut from: impl Read,
    is_root: bool,
    keeps_folders: bool,
) -> Result<Unpacked, Status> {
    let top = Folder::open(path).map_err(|error| path_error(&super::shown(path), &error))?;
    let mut beginning = Vec::new();
    (&mut from)
        .take(GZIP.len() as u64)
        .read_to_end(&mut beginning)
        .map_err(broken)?;
    let is_zipped = beginning == GZIP;
    let from = io::Cursor::new(beginning).chain(from);
    let from: Box<dyn Read> = if is_zipped {
        Box::new(MultiGzDecoder::new(from))
    } else {
        Box::new(from)
    };
    let budget = Cell::new(LARGEST_HEADER);
    let mut archive = tar::Archive::new(Budgeted {
        inner: from,
        left: &budget,
    });
    let mut unpacking = Unpacking {
        top: &top,
        is_root,
        keeps_folders,
        folders: Vec::new(),
        unpacked: Unpacked::default(),
    };
    let mut entries = archive.entries().map_err(broken)?;
    let mut take_all = || {
        loop {
            budget.set(LARGEST_HEADER);
            let Some(entry) = entries.next() else {
                return Ok(());
            };
            let mut entry = entry.map_err(broken)?;
            budget.set(u64::MAX);
            unpacking.entry(&mut entry)?;
            // Skipped here, where it costs nothing.
            io::copy(&mut entry, &mut io::sink()).map_err(broken)?;
        }
    };
    let taken = take_all();
    // Also of what broke off: whoever sends it again may want directories that are there to stay as they are.
    let finished = unpacking.finish();
    taken.and(finished)
}

fn broken(error: io::Error) -> Status {
    // Who sent it may have gone, which is told apart.
    if error.kind() == io::ErrorKind::ConnectionAborted {
        return refuse(Code::Aborted, "UPLOAD_BROKE_OFF", error.to_string());
    }
    let message = format!("not a tar archive, or a damaged one: {error}");
    refuse(Code::InvalidArgument, "ARCHIVE_INVALID", message)
}

/// Reads only so much until somebody allows more.
struct Budgeted<'a, R> {
    inner: R,
    left: &'a Cell<u64>,
}

impl<R: Read> Read for Budgeted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.left.get()).unwrap_or(usize::MAX);
        if left == 0 {
            return Err(io::Error::other(
                "names and attributes of an entry are too long",
            ));
        }
        let end = buffer.len().min(left);
        let count = self.inner.read(&mut buffer[..end])?;
        self.left.set(self.left.get() - count as u64);
        Ok(count)
    }
}

/// Owner, permissions and time an entry asks for.
#[derive(Debug, Clone, Copy)]
struct Attributes {
    owner: Option<(Uid, Gid)>,
    mode: u32,
    modified: SystemTime,
}

impl Attributes {
    fn of(header: &Header, is_root: bool) -> io::Result<Self> {
        let id = |id: u64| {
            u32::try_from(id).map_err(|_| io::Error::other("an owner is no number of a user"))
        };
        let owner = is_root
            .then(|| {
                Ok::<_, io::Error>((
                    Uid::from_raw(id(header.uid()?)?),
                    Gid::from_raw(id(header.gid()?)?),
                ))
            })
            .transpose()?;
        let kept = if is_root { 0o7777 } else { 0o777 };
        let since = Duration::from_secs(header.mtime()?);
        Ok(Self {
            owner,
            mode: header.mode()? & kept,
            modified: SystemTime::UNIX_EPOCH
                .checked_add(since)
                .ok_or_else(|| io::Error::other("a time is none"))?,
        })
    }

    /// To its owner, what is not opened for that.
    fn give(&self, parent: &Folder, name: &OsStr) -> io::Result<()> {
        self.owner.map_or(Ok(()), |owner| parent.give(name, owner))
    }

    fn set(&self, file: &File) -> io::Result<()> {
        if let Some((uid, gid)) = self.owner {
            fchown(file, Some(uid), Some(gid))?;
        }
        fchmod(file, Mode::from_bits_truncate(self.mode))?;
        file.set_times(FileTimes::new().set_modified(self.modified))
    }
}

struct Unpacking<'a> {
    top: &'a Folder,
    is_root: bool,
    keeps_folders: bool,
    /// Directories get their attributes last: one that may not be written to could take nothing, and each new entry changes its time.
    folders: Vec<(PathBuf, Attributes)>,
    unpacked: Unpacked,
}

impl Unpacking<'_> {
    fn entry<R: Read>(&mut self, entry: &mut tar::Entry<'_, R>) -> Result<(), Status> {
        let said = entry.path_bytes().into_owned();
        let shown = String::from_utf8_lossy(&said).into_owned();
        let refused = |error: io::Error| match error.kind() {
            io::ErrorKind::ConnectionAborted => broken(error),
            // By a link (openat2(2)).
            _ if error.raw_os_error() == Some(nix::libc::EXDEV) => outside(&shown),
            _ => path_error(&shown, &error),
        };
        let path = inside(Path::new(OsStr::from_bytes(&said))).ok_or_else(|| outside(&shown))?;
        let kind = entry.header().entry_type();
        if matches!(kind, EntryType::Char | EntryType::Block) {
            self.unpacked.left_out += 1;
            return Ok(());
        }
        let attributes = Attributes::of(entry.header(), self.is_root).map_err(broken)?;
        let Some(name) = path.file_name() else {
            // The directory itself, as `tar c .` puts it first.
            return Ok(());
        };
        let parent = self
            .parent(path.parent().unwrap_or(Path::new("")))
            .map_err(refused)?;
        if kind == EntryType::Directory {
            let is_new = make_folder(&parent, name, self.keeps_folders).map_err(refused)?;
            if !is_new && self.keeps_folders {
                // If it is a link, it leads to one that may be filled, or that is told.
                self.top.beneath(&path).map_err(refused)?;
            }
            if is_new || !self.keeps_folders {
                self.folders.push((path.clone(), attributes));
            }
            self.unpacked.entries += 1;
            return Ok(());
        }
        let original = entry.link_name_bytes().map(Cow::into_owned);
        let original = Path::new(OsStr::from_bytes(original.as_deref().unwrap_or_default()));
        // Looked for first, since it may be what is replaced.
        let linked = if kind == EntryType::Link {
            let original = inside(original).ok_or_else(|| outside(&shown))?;
            let folder = self
                .parent(original.parent().unwrap_or(Path::new("")))
                .map_err(refused)?;
            let original_name = original.file_name().unwrap_or_default().to_owned();
            folder.stat(&original_name).map_err(refused)?;
            if original_name == name && folder.is(&parent).map_err(refused)? {
                // A link to itself is there already.
                return Ok(());
            }
            Some((folder, original_name))
        } else {
            None
        };
        match parent.remove(name) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(refused(error)),
            _ => {}
        }
        match (kind, linked) {
            (_, Some((folder, original))) => {
                parent
                    .make_hard_link(name, &folder, &original)
                    .map_err(refused)?;
            }
            (EntryType::Symlink, _) => {
                let made = parent.make_symlink(name, original.as_os_str());
                let given = made.and_then(|()| attributes.give(&parent, name));
                given.map_err(refused)?;
            }
            (EntryType::Fifo, _) => {
                let mode = Mode::from_bits_truncate(attributes.mode);
                let made = parent.make_fifo(name, mode);
                let given = made.and_then(|()| attributes.give(&parent, name));
                given.map_err(refused)?;
            }
            _ => {
                let mut file = parent.create(name).map_err(refused)?;
                self.unpacked.size_bytes += io::copy(entry, &mut file).map_err(refused)?;
                attributes.set(&file).map_err(refused)?;
            }
        }
        self.unpacked.entries += 1;
        Ok(())
    }

    /// A directory of the archive, made if it is not there.
    fn parent(&self, path: &Path) -> io::Result<Folder> {
        if path.as_os_str().is_empty() {
            return self.top.beneath(Path::new("."));
        }
        match self.top.beneath(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            found => return found,
        }
        let mut so_far = PathBuf::new();
        let mut folder = self.top.beneath(Path::new("."))?;
        for name in path {
            make_folder_like_others(&folder, name)?;
            so_far.push(name);
            folder = self.top.beneath(&so_far)?;
        }
        Ok(folder)
    }

    fn finish(self) -> Result<Unpacked, Status> {
        for (path, attributes) in self.folders.iter().rev() {
            let set = self
                .top
                .beneath(path)
                .and_then(|folder| attributes.set(&File::from(folder.as_fd().try_clone()?)));
            match set {
                // A later entry took its place.
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                    ) => {}
                set => set.map_err(|error| path_error(&super::shown(path), &error))?,
            }
        }
        Ok(self.unpacked)
    }
}

/// A directory for an entry that says so; one that is there stays, a file gives way, and so does a link, unless directories are to stay: then it
/// may lead to one. Whether it is new.
fn make_folder(parent: &Folder, name: &OsStr, keeps: bool) -> io::Result<bool> {
    match parent.make_folder(name) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        made => return made.map(|()| true),
    }
    let found = kind(&parent.stat(name)?);
    if found == SFlag::S_IFDIR || keeps && found == SFlag::S_IFLNK {
        return Ok(false);
    }
    parent.remove(name)?;
    parent.make_folder(name).map(|()| true)
}

/// A directory that no entry speaks of.
fn make_folder_like_others(parent: &Folder, name: &OsStr) -> io::Result<()> {
    match parent.make_folder(name) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        Err(error) => return Err(error),
    }
    let made = parent.folder(name)?;
    Ok(fchmod(made.as_fd(), Mode::from_bits_truncate(0o755))?)
}

/// A path without the detours; `None` if it is absolute or goes up.
fn inside(path: &Path) -> Option<PathBuf> {
    let mut inside = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => inside.push(name),
            Component::CurDir => {}
            _ => return None,
        }
    }
    Some(inside)
}

fn outside(entry: &str) -> Status {
    let message = format!("{entry}: leads out of the directory it is unpacked in");
    refuse(Code::InvalidArgument, "ARCHIVE_ENTRY_REFUSED", message)
}
