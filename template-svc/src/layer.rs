//! Layers of an image, one upon the other, in a folder: as "Applying Changesets" of the OCI image specification (1.1, layer.md) says, and where
//! that is silent as `umoci` does it.
//!
//! ```text
//!   blob ----> gzip, zstd or plain ----> entries ----> a thread whose root is the folder ----> files
//!   (its digest)      (its DiffID)       (entries.rs)            (chroot(2))
//! ```
//! A layer is somebody's untrusted bytes, unpacked by root:
//! - Nothing leaves the folder. The thread that makes files has it as its root, so that the kernel itself takes every link of every path,
//!   absolute ones and such with `..`, for one within. Names with `..` are refused.
//! - Nothing is without bound: bytes that are unpacked, also those a sparse file only claims, entries, and headers of one entry.
//! - What the host would give a meaning is left out and counted: attributes of overlayfs, labels of the host's security module.
//!
//! Rules that are easily got wrong:
//! - A whiteout hides what layers below have, and nothing of its own layer, wherever in it the whiteout stands.
//! - What replaces something of another kind removes it first, a folder with all in it; a folder upon a folder is the same folder with other
//!   metadata; a folder upon a link to one is a folder.
//! - Folders no layer names, but which are needed, are root's, 0755, of 1970: the same each time.
//! - A folder's time is set last, since each file in it changes it.

mod entries;

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, HashSet, VecDeque},
    ffi::{OsStr, OsString},
    fs::{self, File, OpenOptions, Permissions},
    io::{self, BufReader, Read, Seek as _, SeekFrom, Write as _},
    ops::Bound,
    os::unix::{
        ffi::OsStrExt as _,
        fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, lchown, symlink},
    },
    path::{Component, Path, PathBuf},
};

use nix::{
    sched::{CloneFlags, unshare},
    unistd::{chdir, chroot},
};
use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};
use sha2::{Digest as _, Sha256};
use tokio_util::sync::CancellationToken;

pub use self::entries::EntryError;
use self::entries::{Entries, Entry, Kind, Region, Time};

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Of names that the first union file system kept for itself, which no layer should have.
const AUFS: &[u8] = b".wh..wh.";
const COPY: usize = 1 << 20;
/// Bytes of all folders' names at most, which are kept until the last layer is there.
const MOST_NAMES: u64 = 256 << 20;
/// Names of a path at most: whoever removes a tree has as many files open.
const DEEPEST: usize = 256;
/// Of a path, as of the kernel (path_resolution(7), `MAXSYMLINKS`).
const MOST_LINKS: u32 = 40;
/// Access control lists, and those that what is made in a folder has (acl(5)).
const ACCESS_LIST: &str = "system.posix_acl_access";
const DEFAULT_LIST: &str = "system.posix_acl_default";
/// Attributes with a meaning to whoever mounts or labels, not to the image.
const LEFT_OUT: [&str; 4] = [
    "trusted.overlay.",
    "user.overlay.",
    "security.selinux",
    "system.nfs4_acl",
];

/// A layer that cannot be applied.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// Something is wrong with one of its entries.
    #[error("entry \"{name}\": {error}")]
    Entry {
        /// As it stands in the layer, printable.
        name: String,
        /// What.
        error: EntryError,
    },
    /// One of its entries cannot be a file here.
    #[error("entry \"{name}\" cannot be made: {error}")]
    Make {
        /// As it stands in the layer, printable.
        name: String,
        /// Why.
        error: io::Error,
    },
    /// It does not unpack.
    #[error("its compression is damaged: {0}")]
    Compression(io::Error),
    /// It unpacks to more than is allowed.
    #[error("it unpacks to more than {0} bytes")]
    TooLarge(u64),
    /// It has more entries than are allowed.
    #[error("it has more than {0} entries")]
    TooMany(u64),
    /// Its folders are too many, or lie too deep.
    #[error("the names of its folders are more than {MOST_NAMES} bytes")]
    Names,
    /// The disk is full.
    #[error("the disk of template-svc is full")]
    DiskFull,
    /// Nobody wants it any more.
    #[error("cancelled")]
    Cancelled,
    /// This host does not let it be unpacked.
    #[error("it cannot be unpacked here: {0}")]
    Host(io::Error),
}

impl LayerError {
    /// The stable word of a build's failure.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Entry { .. } | Self::Make { .. } => "LAYER_INVALID",
            Self::Compression(_) => "LAYER_DAMAGED",
            Self::TooLarge(_) | Self::TooMany(_) | Self::Names => "SOURCE_TOO_LARGE",
            Self::DiskFull => "DISK_FULL",
            Self::Cancelled => "CANCELLED",
            Self::Host(_) => "BUILD_FAILED",
        }
    }
}

/// What all layers of an image together may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes after decompression, with what sparse files claim.
    pub bytes: u64,
    /// Files, folders, links.
    pub entries: u64,
}

/// Whether names that begin with `.wh.` hide others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whiteouts {
    /// As in layers of an image.
    Apply,
    /// They are names like any other, as in a tarball of a whole root.
    Keep,
}

/// What was in a layer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Applied {
    /// Entries of any kind.
    pub entries: u64,
    /// Folders it needs and does not name.
    pub folders: u64,
    /// Bytes of the tarball, and those that its sparse files claim.
    pub bytes: u64,
    /// SHA-256 of the tarball, in hexadecimal: in an image, its DiffID.
    pub digest: String,
    /// Attributes that were left out.
    pub left_out: u64,
}

/// A root file system that is being put together.
#[derive(Debug)]
pub struct Root {
    folder: PathBuf,
    limits: Limits,
    used: Limits,
    folders: Folders,
}

/// Times of folders, by their real paths.
#[derive(Debug, Default)]
struct Folders {
    times: BTreeMap<PathBuf, Time>,
    /// Bytes of their names.
    names: u64,
    /// Whether what is made in some of them inherits access control lists (acl(5)).
    have_defaults: bool,
}

impl Folders {
    fn insert(&mut self, path: &Path, time: Time) -> Result<(), Failed> {
        if let Some(known) = self.times.get_mut(path) {
            *known = time;
            return Ok(());
        }
        self.names += path.as_os_str().len() as u64;
        self.times.insert(path.to_owned(), time);
        if self.names > MOST_NAMES {
            return Err(Failed::Names);
        }
        Ok(())
    }

    /// Forgets one, and all below it.
    fn remove(&mut self, path: &Path) {
        let below: Vec<PathBuf> = self
            .times
            .range::<Path, _>((Bound::Included(path), Bound::Unbounded))
            .map(|(folder, _)| folder)
            .take_while(|folder| folder.starts_with(path))
            .cloned()
            .collect();
        for folder in below {
            self.names -= folder.as_os_str().len() as u64;
            self.times.remove(&folder);
        }
    }
}

impl Root {
    /// In an empty folder that nobody else may enter.
    pub fn new(folder: PathBuf, limits: Limits) -> Self {
        Self {
            folder,
            limits,
            used: Limits {
                bytes: 0,
                entries: 0,
            },
            folders: Folders {
                times: BTreeMap::from([(PathBuf::from("/"), Time::default())]),
                names: 1,
                have_defaults: false,
            },
        }
    }

    /// Applies the next layer: a tarball, plain or compressed by gzip or zstd, which is read to its end. Blocking; what is there after an error is
    /// of no use.
    pub fn apply(
        &mut self,
        layer: impl Read + Send,
        whiteouts: Whiteouts,
        cancel: &CancellationToken,
    ) -> Result<Applied, LayerError> {
        let layer = decompress(layer).map_err(LayerError::Compression)?;
        let (limits, before) = (self.limits, self.used);
        let folders = &mut self.folders;
        let applied = within(&self.folder, move || {
            let meter = Meter {
                left: Cell::new(limits.bytes.saturating_sub(before.bytes)),
                hasher: RefCell::default(),
                cancel,
            };
            let metered = Metered {
                inner: layer,
                meter: &meter,
            };
            let applying = Applying {
                entries: Entries::new(metered),
                meter: &meter,
                entries_left: limits.entries.saturating_sub(before.entries),
                limits,
                whiteouts,
                cancel,
                folders,
                touched: HashSet::new(),
                hidden: HashSet::new(),
                emptied: HashSet::new(),
                parent: None,
                applied: Applied::default(),
                buffer: vec![0; COPY],
            };
            applying.run()
        })?;
        self.used.bytes += applied.bytes;
        self.used.entries += applied.entries + applied.folders;
        Ok(applied)
    }

    /// Gives folders their times. Blocking.
    pub fn finish(self) -> Result<(), LayerError> {
        let times = self.folders.times;
        within(&self.folder, move || {
            for (path, time) in times.iter().rev() {
                set_time(path, *time).map_err(|error| LayerError::Host(error.into()))?;
            }
            Ok(())
        })
    }
}

/// Does something in a thread whose root is the folder (unshare(2), `CLONE_FS`; chroot(2)).
pub(crate) fn within<T: Send, E: From<LayerError> + Send>(
    folder: &Path,
    work: impl FnOnce() -> Result<T, E> + Send,
) -> Result<T, E> {
    let enter = || -> io::Result<()> {
        unshare(CloneFlags::CLONE_FS)?;
        chroot(folder)?;
        chdir("/")?;
        // What files may be is said of each.
        rustix::process::umask(Mode::empty());
        Ok(())
    };
    std::thread::scope(|scope| {
        let done = scope.spawn(|| {
            enter().map_err(LayerError::Host)?;
            work()
        });
        done.join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn decompress<'a>(layer: impl Read + Send + 'a) -> io::Result<Box<dyn Read + Send + 'a>> {
    let mut layer = BufReader::with_capacity(COPY, layer);
    let magic = io::BufRead::fill_buf(&mut layer)?;
    Ok(match magic {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(layer)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Box::new(zstd::stream::read::Decoder::with_buffer(layer)?),
        _ => Box::new(layer),
    })
}

/// Ends with an error of this kind, which no other reader below has, beyond a bound.
const BEYOND: io::ErrorKind = io::ErrorKind::FileTooLarge;

/// What passed, and how much more may.
struct Meter<'a> {
    left: Cell<u64>,
    hasher: RefCell<Sha256>,
    cancel: &'a CancellationToken,
}

impl Meter<'_> {
    /// Whether there was so much left.
    fn take(&self, count: u64) -> bool {
        let left = self.left.get().checked_sub(count);
        self.left.set(left.unwrap_or_default());
        left.is_some()
    }
}

struct Metered<'a, R> {
    inner: R,
    meter: &'a Meter<'a>,
}

impl<R: Read> Read for Metered<'_, R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.meter.cancel.is_cancelled() {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        let count = self.inner.read(into)?;
        let read = into.get(..count).unwrap_or_default();
        self.meter.hasher.borrow_mut().update(read);
        if self.meter.take(count as u64) {
            Ok(count)
        } else {
            Err(BEYOND.into())
        }
    }
}

/// One layer, within the root.
struct Applying<'a, R> {
    entries: Entries<Metered<'a, R>>,
    meter: &'a Meter<'a>,
    entries_left: u64,
    limits: Limits,
    whiteouts: Whiteouts,
    cancel: &'a CancellationToken,
    folders: &'a mut Folders,
    /// Real paths this layer has made, and all above them.
    touched: HashSet<Mark>,
    /// Real paths at which nothing of the layers below is left, and folders in which nothing of them is: to look again and again would be endless.
    hidden: HashSet<Mark>,
    emptied: HashSet<Mark>,
    /// The parent of the entry before as it was named, and its real path.
    parent: Option<(PathBuf, PathBuf)>,
    applied: Applied,
    buffer: Vec<u8>,
}

/// A path, told from others by its hash: paths themselves could be gigabytes.
type Mark = [u8; 16];

fn mark(path: &Path) -> Mark {
    let mut mark = Mark::default();
    let mut hasher = blake3::Hasher::new();
    hasher.update(path.as_os_str().as_bytes());
    hasher.finalize_xof().fill(&mut mark);
    mark
}

/// Why an entry is not there.
enum Failed {
    Entry(EntryError),
    /// The host did not let it be made.
    Make(io::Error),
    TooLarge,
    Names,
    Cancelled,
}

impl From<EntryError> for Failed {
    fn from(error: EntryError) -> Self {
        Self::Entry(error)
    }
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Self {
        Self::Make(error)
    }
}

impl From<rustix::io::Errno> for Failed {
    fn from(error: rustix::io::Errno) -> Self {
        Self::Make(error.into())
    }
}

impl<R: Read> Applying<'_, R> {
    fn run(mut self) -> Result<Applied, LayerError> {
        let before = self.meter.left.get();
        loop {
            match self.one() {
                Ok(true) => {}
                Ok(false) => break,
                Err(failed) => return Err(self.explain(failed)),
            }
            if self.applied.entries + self.applied.folders > self.entries_left {
                return Err(LayerError::TooMany(self.limits.entries));
            }
        }
        let cancel = self.cancel;
        self.entries.drain().map_err(|error| match error.kind() {
            _ if cancel.is_cancelled() => LayerError::Cancelled,
            BEYOND => LayerError::TooLarge(self.limits.bytes),
            _ => LayerError::Compression(error),
        })?;
        self.applied.bytes = before - self.meter.left.get();
        self.applied.digest = hex::encode(self.meter.hasher.take().finalize());
        Ok(self.applied)
    }

    fn explain(&self, failed: Failed) -> LayerError {
        match failed {
            _ if self.cancel.is_cancelled() => LayerError::Cancelled,
            Failed::TooLarge => LayerError::TooLarge(self.limits.bytes),
            Failed::Names => LayerError::Names,
            Failed::Cancelled => LayerError::Cancelled,
            Failed::Entry(EntryError::Read(error)) if error.kind() == BEYOND => {
                LayerError::TooLarge(self.limits.bytes)
            }
            Failed::Entry(EntryError::Read(error)) => LayerError::Compression(error),
            Failed::Entry(error) => LayerError::Entry {
                name: self.entries.name(),
                error,
            },
            Failed::Make(error) if error.kind() == io::ErrorKind::StorageFull => {
                LayerError::DiskFull
            }
            Failed::Make(error) => LayerError::Make {
                name: self.entries.name(),
                error,
            },
        }
    }

    /// Applies the next entry; whether there was one.
    fn one(&mut self) -> Result<bool, Failed> {
        if self.cancel.is_cancelled() {
            return Err(Failed::Cancelled);
        }
        let Some(entry) = self.entries.next()? else {
            return Ok(false);
        };
        self.applied.entries += 1;
        let Some(name) = entry.path.file_name() else {
            return self.root(&entry).map(|()| true);
        };
        let parent = entry.path.parent().unwrap_or(Path::new(""));
        if self.whiteouts == Whiteouts::Apply && name.as_bytes().starts_with(WHITEOUT) {
            let name = name.as_bytes().to_owned();
            self.hide(parent, &name)?;
        } else {
            let path = self.real_parent(parent)?.join(name);
            if path.components().count() > DEEPEST {
                return Err(EntryError::Name("it lies deeper than 256 folders").into());
            }
            self.make(&path, &entry)?;
            self.touch(&path);
        }
        Ok(true)
    }

    fn root(&mut self, entry: &Entry) -> Result<(), Failed> {
        if entry.kind != Kind::Folder {
            return Err(EntryError::Name("the root is no folder in it").into());
        }
        self.describe_folder(Path::new("/"), entry, true)
    }

    /// Notes that this layer made it.
    fn touch(&mut self, path: &Path) {
        self.touched.insert(mark(path));
        let mut above = path.parent();
        // Of one that is known all above it are, too.
        while let Some(folder) = above
            && self.touched.insert(mark(folder))
        {
            above = folder.parent();
        }
    }

    /// The folder in which an entry is, without links in its path; made if it is not there, also where a link leads to.
    fn real_parent(&mut self, parent: &Path) -> Result<PathBuf, Failed> {
        if let Some((named, real)) = &self.parent
            && named == parent
        {
            return Ok(real.clone());
        }
        let mut real = PathBuf::from("/");
        let mut links = 0;
        let mut parts = parts(parent);
        while let Some(part) = parts.pop_front() {
            if part == ".." {
                real.pop();
                continue;
            }
            real.push(part);
            match fs::symlink_metadata(&real) {
                Ok(metadata) if metadata.is_dir() => {}
                Ok(metadata) if metadata.is_symlink() => {
                    links += 1;
                    if links > MOST_LINKS {
                        return Err(rustix::io::Errno::LOOP.into());
                    }
                    let target = fs::read_link(&real)?;
                    real.pop();
                    if target.is_absolute() {
                        real = PathBuf::from("/");
                    }
                    let rest = std::mem::replace(&mut parts, self::parts(&target));
                    parts.extend(rest);
                }
                Ok(_) => return Err(io::Error::from(io::ErrorKind::NotADirectory).into()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    if real.components().count() > DEEPEST {
                        return Err(EntryError::Name("it lies deeper than 256 folders").into());
                    }
                    fs::create_dir(&real)?;
                    self.applied.folders += 1;
                    self.forget_inherited(&real)?;
                    fs::set_permissions(&real, Permissions::from_mode(0o755))?;
                    self.folders.insert(&real, Time::default())?;
                    self.touch(&real);
                }
                Err(error) => return Err(error.into()),
            }
        }
        self.parent = Some((parent.to_owned(), real.clone()));
        Ok(real)
    }

    /// What a whiteout says: that a name of the layers below is gone, or all names of a folder.
    fn hide(&mut self, parent: &Path, whiteout: &[u8]) -> Result<(), Failed> {
        let is_opaque = whiteout == OPAQUE;
        if !is_opaque && whiteout.starts_with(AUFS) {
            return Ok(());
        }
        let name = whiteout.get(WHITEOUT.len()..).unwrap_or_default();
        if matches!(name, b"" | b"." | b"..") {
            return Err(EntryError::Name("it hides what is no name").into());
        }
        let Some(parent) = existing_folder(parent)? else {
            // What is not there is hidden already.
            return Ok(());
        };
        if is_opaque {
            return self.empty_lower(&parent);
        }
        let path = parent.join(OsStr::from_bytes(name));
        if self.hidden.insert(mark(&path)) {
            self.remove_lower(&path)?;
        }
        Ok(())
    }

    /// Removes what layers below have in a folder.
    fn empty_lower(&mut self, folder: &Path) -> Result<(), Failed> {
        if !self.emptied.insert(mark(folder)) {
            return Ok(());
        }
        for child in fs::read_dir(folder)? {
            if self.cancel.is_cancelled() {
                return Err(Failed::Cancelled);
            }
            self.remove_lower(&child?.path())?;
        }
        Ok(())
    }

    /// Removes what layers below have made there.
    fn remove_lower(&mut self, path: &Path) -> Result<(), Failed> {
        if !self.touched.contains(&mark(path)) {
            return self.remove(path);
        }
        // Of a link that this layer has made there is nothing below.
        if fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir()) {
            self.empty_lower(path)?;
        }
        Ok(())
    }

    /// Removes whatever is there, with all in it.
    fn remove(&mut self, path: &Path) -> Result<(), Failed> {
        let is_folder = match fs::symlink_metadata(path) {
            Ok(metadata) => metadata.is_dir(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        // What was known of paths that led through it is known no more.
        self.parent = None;
        if !is_folder {
            return Ok(fs::remove_file(path)?);
        }
        fs::remove_dir_all(path)?;
        self.folders.remove(path);
        Ok(())
    }

    fn make(&mut self, path: &Path, entry: &Entry) -> Result<(), Failed> {
        if entry.kind == Kind::Folder {
            let is_there = fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir());
            if !is_there {
                self.remove(path)?;
                fs::create_dir(path)?;
                self.forget_inherited(path)?;
            }
            return self.describe_folder(path, entry, is_there);
        }
        if let Kind::Link(target) = &entry.kind {
            return self.link(path, target);
        }
        self.remove(path)?;
        let device = |kind: FileType, major: u32, minor: u32| {
            let device = rustix::fs::makedev(major, minor);
            rustix::fs::mknodat(CWD, path, kind, Mode::from_raw_mode(0o600), device)
        };
        match &entry.kind {
            Kind::File { size, regions } => self.write(path, *size, regions)?,
            Kind::Symlink(target) => symlink(target, path)?,
            Kind::Character { major, minor } => {
                device(FileType::CharacterDevice, *major, *minor)?;
            }
            Kind::Block { major, minor } => device(FileType::BlockDevice, *major, *minor)?,
            Kind::Fifo => device(FileType::Fifo, 0, 0)?,
            Kind::Folder | Kind::Link(_) => {}
        }
        self.forget_inherited(path)?;
        // In this order: a new owner costs a file its set-ID bits and capabilities (chown(2)).
        lchown(path, Some(entry.uid), Some(entry.gid))?;
        if !matches!(entry.kind, Kind::Symlink(_)) {
            fs::set_permissions(path, Permissions::from_mode(entry.mode))?;
        }
        self.set_attributes(path, entry)?;
        set_time(path, entry.modified)?;
        Ok(())
    }

    /// A second name for a file, which keeps its metadata.
    fn link(&mut self, path: &Path, target: &Path) -> Result<(), Failed> {
        let missing = || Failed::from(EntryError::Name("it is a link to what is not there"));
        let name = target.file_name().ok_or_else(missing)?;
        let parent = target.parent().unwrap_or(Path::new(""));
        let target = existing_folder(parent)?.ok_or_else(missing)?.join(name);
        let metadata = fs::symlink_metadata(&target).map_err(|_| missing())?;
        if metadata.is_dir() {
            return Err(EntryError::Name("it is a link to a folder").into());
        }
        let same =
            |there: fs::Metadata| (there.dev(), there.ino()) == (metadata.dev(), metadata.ino());
        if fs::symlink_metadata(path).is_ok_and(same) {
            return Ok(());
        }
        self.remove(path)?;
        fs::hard_link(&target, path)?;
        Ok(())
    }

    fn describe_folder(
        &mut self,
        path: &Path,
        entry: &Entry,
        was_there: bool,
    ) -> Result<(), Failed> {
        lchown(path, Some(entry.uid), Some(entry.gid))?;
        fs::set_permissions(path, Permissions::from_mode(entry.mode))?;
        if was_there {
            // Those of the layer below are not the entry's.
            let length = rustix::fs::listxattr(path, &mut self.buffer)?;
            let names = self.buffer.get(..length).unwrap_or_default();
            for name in names.split(|byte| *byte == 0) {
                if !name.is_empty() && !is_left_out(&String::from_utf8_lossy(name)) {
                    rustix::fs::removexattr(path, name)?;
                }
            }
        }
        self.set_attributes(path, entry)?;
        self.folders.insert(path, entry.modified)
    }

    /// Removes access control lists that no entry has named.
    fn forget_inherited(&self, path: &Path) -> Result<(), Failed> {
        if !self.folders.have_defaults {
            return Ok(());
        }
        for list in [ACCESS_LIST, DEFAULT_LIST] {
            match rustix::fs::lremovexattr(path, list) {
                Ok(()) | Err(rustix::io::Errno::NODATA | rustix::io::Errno::OPNOTSUPP) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn set_attributes(&mut self, path: &Path, entry: &Entry) -> Result<(), Failed> {
        for (name, value) in &entry.attributes {
            if is_left_out(name) {
                self.applied.left_out += 1;
            } else {
                self.folders.have_defaults |= name == DEFAULT_LIST;
                let set = rustix::fs::lsetxattr(path, name.as_str(), value, XattrFlags::empty());
                set.map_err(|error| match error {
                    // The disk is not full: it has no room for attributes of one file of that size.
                    rustix::io::Errno::NOSPC => io::Error::other(format!(
                        "the attribute {name} is larger than the file system takes"
                    )),
                    error => error.into(),
                })?;
            }
        }
        Ok(())
    }

    fn write(&mut self, path: &Path, size: u64, regions: &[Region]) -> Result<(), Failed> {
        let stored: u64 = regions.iter().map(|region| region.length).sum();
        // Whoever packs it reads its holes as well.
        if !self.meter.take(size.saturating_sub(stored)) {
            return Err(Failed::TooLarge);
        }
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)?;
        for region in regions {
            self.copy(&file, *region)?;
        }
        if stored < size {
            file.set_len(size)?;
        }
        Ok(())
    }

    fn copy(&mut self, mut file: &File, region: Region) -> Result<(), Failed> {
        file.seek(SeekFrom::Start(region.offset))?;
        let mut left = region.length;
        while left > 0 {
            if self.cancel.is_cancelled() {
                return Err(Failed::Cancelled);
            }
            let most = usize::try_from(left).map_or(COPY, |left| left.min(COPY));
            let part = self.buffer.get_mut(..most).unwrap_or_default();
            let count = self.entries.read_content(part)?;
            file.write_all(part.get(..count).unwrap_or_default())?;
            left -= count as u64;
        }
        Ok(())
    }
}

/// Names and `..` of a path.
fn parts(path: &Path) -> VecDeque<OsString> {
    path.components()
        .filter(|part| matches!(part, Component::Normal(_) | Component::ParentDir))
        .map(|part| part.as_os_str().to_owned())
        .collect()
}

fn is_left_out(attribute: &str) -> bool {
    LEFT_OUT.iter().any(|name| attribute.starts_with(name))
}

/// A folder's path without links in it, if there is one.
fn existing_folder(path: &Path) -> Result<Option<PathBuf>, Failed> {
    match fs::canonicalize(Path::new("/").join(path)) {
        Ok(real) if real.is_dir() => Ok(Some(real)),
        Ok(_) => Ok(None),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

/// When it was modified; when it was read is of no interest, and the same.
fn set_time(path: &Path, time: Time) -> rustix::io::Result<()> {
    let time = Timespec {
        tv_sec: time.seconds,
        tv_nsec: time.nanos.into(),
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)
}
