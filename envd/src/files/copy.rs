//! Copies within the guest: everything as it is, holes and links included, and under its name only when all of it is there.

use std::{
    collections::HashMap,
    ffi::{OsStr, OsString},
    fs::{self, File, FileTimes},
    io::{self, Read as _, Seek as _, SeekFrom},
    os::{fd::AsFd, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    sys::stat::{FileStat, Mode, SFlag, fchmod},
    unistd::{Gid, Uid, Whence, fchown, lseek},
};
use proto::envd::v1::CopyResponse;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

use super::{
    folder::{DEEPEST, Folder, MOST_LINKED, OWNER_ONLY, kind},
    random, shown, stat,
};
use crate::errors::{invalid, path_error, refuse};

/// Between looks at whether anybody still wants the copy.
const STRETCH: u64 = 8 << 20;

/// Why there is no copy.
enum Stopped {
    Cancelled,
    IntoItself,
    TooDeep,
    NotAFile,
    Io(io::Error),
}

impl From<io::Error> for Stopped {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<Errno> for Stopped {
    fn from(error: Errno) -> Self {
        Self::Io(error.into())
    }
}

/// Copies. Cancelled, it ends early, and what there is of the copy goes.
pub(crate) fn copy(
    source: &Path,
    destination: &Path,
    replace: bool,
    cancelled: &CancellationToken,
) -> Result<CopyResponse, Status> {
    let (from, name) = place(source, "source")?;
    let (to, target) = place(destination, "destination")?;
    let there = fs::symlink_metadata(destination);
    if there.is_ok_and(|there| there.is_dir() || !replace) {
        let taken = io::ErrorKind::AlreadyExists.into();
        return Err(path_error(&shown(destination), &taken));
    }
    let temporary = OsString::from(format!(".{:016x}.part", random()));
    let mut copying = Copying {
        top: &to,
        cancelled,
        linked: HashMap::new(),
        copied: CopyResponse::default(),
    };
    let mut made = copying.entry(&from, &name, &to, Path::new(&temporary));
    if made.is_ok() && copying.copied.entries == 0 {
        made = Err(Stopped::NotAFile);
    }
    let made = made.and_then(|()| Ok(to.rename(&temporary, &target, replace)?));
    let copied = copying.copied;
    let Err(stopped) = made else {
        let entry = Some(stat(destination, true)?);
        return Ok(CopyResponse { entry, ..copied });
    };
    if let Err(error) = to.remove_all(&temporary)
        && error.kind() != io::ErrorKind::NotFound
    {
        crate::logs::warn(format_args!("what there is of a copy stays: {error}"));
    }
    let (code, reason, message) = match stopped {
        Stopped::Io(error) => {
            let both = format!("{} to {}", shown(source), shown(destination));
            return Err(path_error(&both, &error));
        }
        Stopped::Cancelled => (Code::Cancelled, "CANCELLED", "the copy was cancelled"),
        Stopped::IntoItself => (
            Code::InvalidArgument,
            "PATH_INVALID",
            "a directory cannot be copied into itself",
        ),
        Stopped::TooDeep => (
            Code::FailedPrecondition,
            "PATH_TOO_DEEP",
            "more than 512 directories in each other",
        ),
        Stopped::NotAFile => (
            Code::FailedPrecondition,
            "PATH_NOT_A_FILE",
            "sockets and devices are not copied",
        ),
    };
    Err(refuse(
        code,
        reason,
        format!("{}: {message}", shown(source)),
    ))
}

/// The directory something is in, and its name there.
fn place(path: &Path, field: &str) -> Result<(Folder, OsString), Status> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(invalid(field, "names no file"));
    };
    let folder = Folder::open(parent).map_err(|error| path_error(&shown(path), &error))?;
    Ok((folder, name.to_owned()))
}

struct Copying<'a> {
    /// Where all of the copy is.
    top: &'a Folder,
    cancelled: &'a CancellationToken,
    /// Device and inode of files with several names, and the copy's first name from the top on.
    linked: HashMap<(u64, u64), PathBuf>,
    copied: CopyResponse,
}

impl Copying<'_> {
    /// Copies one entry of a directory into another; `path` is the new one's from the top on.
    fn entry(
        &mut self,
        from: &Folder,
        name: &OsStr,
        to: &Folder,
        path: &Path,
    ) -> Result<(), Stopped> {
        if self.cancelled.is_cancelled() {
            return Err(Stopped::Cancelled);
        }
        let target = path.file_name().unwrap_or_default();
        let stat = from.stat(name)?;
        match kind(&stat) {
            SFlag::S_IFREG if self.link(&stat, to, target)? => {}
            SFlag::S_IFREG => {
                self.file(&from.file(name)?, &to.create(target)?)?;
                if stat.st_nlink > 1 && self.linked.len() < MOST_LINKED {
                    let identity = (stat.st_dev, stat.st_ino);
                    self.linked.insert(identity, path.to_owned());
                }
            }
            SFlag::S_IFDIR => {
                to.make_folder(target)?;
                self.folder(&from.folder(name)?, &to.folder(target)?, path)?;
            }
            SFlag::S_IFLNK => to.make_symlink(target, &from.link_target(name)?)?,
            SFlag::S_IFIFO => to.make_fifo(target, OWNER_ONLY)?,
            _ => {
                self.copied.left_out += 1;
                return Ok(());
            }
        }
        self.copied.entries += 1;
        Ok(())
    }

    /// Gives the copy of another name of the same file this name too.
    fn link(&self, stat: &FileStat, to: &Folder, target: &OsStr) -> io::Result<bool> {
        let Some(original) = self.linked.get(&(stat.st_dev, stat.st_ino)) else {
            return Ok(false);
        };
        to.make_hard_link(target, self.top, original.as_os_str())?;
        Ok(true)
    }

    fn folder(&mut self, from: &Folder, to: &Folder, path: &Path) -> Result<(), Stopped> {
        if path.components().count() > DEEPEST {
            return Err(Stopped::TooDeep);
        }
        if from.is(self.top)? {
            return Err(Stopped::IntoItself);
        }
        for name in from.names()? {
            match self.entry(from, &name, to, &path.join(&name)) {
                // It went away in between.
                Err(Stopped::Io(error)) if error.kind() == io::ErrorKind::NotFound => {}
                done => done?,
            }
        }
        let metadata = File::from(from.as_fd().try_clone()?).metadata()?;
        keep(&metadata, &File::from(to.as_fd().try_clone()?))?;
        Ok(())
    }

    fn file(&mut self, mut from: &File, mut to: &File) -> Result<(), Stopped> {
        let metadata = from.metadata()?;
        if !metadata.is_file() {
            return Err(Stopped::NotAFile);
        }
        let size = metadata.len();
        let mut position = 0;
        while let Some(data) = next(from, position, Whence::SeekData)?.filter(|at| *at < size) {
            let hole = next(from, data, Whence::SeekHole)?.unwrap_or(size);
            position = data;
            from.seek(SeekFrom::Start(data))?;
            to.seek(SeekFrom::Start(data))?;
            while position < hole.min(size) {
                if self.cancelled.is_cancelled() {
                    return Err(Stopped::Cancelled);
                }
                let stretch = (hole.min(size) - position).min(STRETCH);
                let count = io::copy(&mut from.take(stretch), &mut to)?;
                position += count;
                if count == 0 {
                    // It became shorter meanwhile.
                    break;
                }
            }
        }
        to.set_len(size)?;
        self.copied.size_bytes += size;
        keep(&metadata, to)?;
        Ok(())
    }
}

/// Where data or a hole begins (lseek(2)); `None` where nothing more comes.
fn next(file: &File, from: u64, what: Whence) -> io::Result<Option<u64>> {
    match lseek(file.as_fd(), from.cast_signed(), what) {
        Ok(position) => Ok(Some(position.cast_unsigned())),
        Err(Errno::ENXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Gives a copy what its original has: the owner, where the acting user may, permissions and time.
fn keep(original: &fs::Metadata, copy: &File) -> io::Result<()> {
    let (uid, gid) = (original.uid(), original.gid());
    let is_owner_kept = fchown(copy, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))).is_ok();
    // Whose rights a program takes on is another matter with another owner.
    let kept = if is_owner_kept { 0o7777 } else { 0o777 };
    fchmod(copy, Mode::from_bits_truncate(original.mode() & kept))?;
    copy.set_times(FileTimes::new().set_modified(original.modified()?))
}
