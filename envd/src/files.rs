//! Files, as a user: the kernel itself decides what that user may do.
//!
//! Work runs on a thread whose file system user and groups are the acting user's (setfsuid(2): per thread, and it drops the
//! capabilities that would let root pass). Nothing is checked by hand, so nothing can be raced.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File, Metadata},
    io::{self, Read as _, Seek as _, SeekFrom},
    os::unix::{
        ffi::{OsStrExt as _, OsStringExt as _},
        fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
    time::SystemTime,
};

use bytes::Bytes;
use proto::envd::v1::{Entry, FileType};
use tokio::sync::{Semaphore, SemaphorePermit};
use tonic::{Code, Status};

use crate::{
    errors::{invalid, path_error, refuse},
    identity::Guest,
    users::{self, User},
};

mod archive;
mod copy;
mod folder;
pub(crate) mod layer;
mod list;
mod setfsuid;
mod watch;
mod write;

pub(crate) use archive::{Form, pack, unpack};
pub(crate) use copy::copy;
use folder::Folder;
pub(crate) use list::Listing;
use setfsuid::Acting;
pub(crate) use watch::{Look, Watch};
pub(crate) use write::{Draft, uploaded};

const LONGEST_PATH: usize = 4096;
/// As many as the kernel follows (path_resolution(7)).
const MOST_LINKS: usize = 40;

/// The acting user and the path a request names.
pub(crate) fn resolve(
    guest: &Guest,
    user: &str,
    path: &str,
    path_bytes: &[u8],
) -> Result<(User, PathBuf), Status> {
    let user = guest
        .user(user)
        .ok_or_else(|| refuse(Code::NotFound, "USER_UNKNOWN", format!("no user {user}")))?;
    let path = match (path.is_empty(), path_bytes.is_empty()) {
        (false, true) => users::expand(&user, path).ok_or_else(|| {
            refuse(
                Code::NotFound,
                "USER_UNKNOWN",
                format!("{path}: no such user"),
            )
        })?,
        (true, false) => user.home.join(OsStr::from_bytes(path_bytes)),
        _ => return Err(invalid("path", "give either path or path_bytes")),
    };
    let bytes = path.as_os_str().as_bytes();
    if bytes.len() > LONGEST_PATH || bytes.contains(&0) {
        return Err(invalid("path", "must be at most 4096 bytes without NUL"));
    }
    Ok((user, path))
}

/// Runs work on the file system as a user.
pub(crate) async fn acting_as<T: Send + 'static>(
    user: User,
    work: impl FnOnce() -> Result<T, Status> + Send + 'static,
) -> Result<T, Status> {
    let run = move || {
        let _acting = Acting::begin(&user).map_err(|error| {
            refuse(
                Code::Internal,
                "INTERNAL",
                format!("acting as {}: {error}", user.name),
            )
        })?;
        work()
    };
    tokio::task::spawn_blocking(run)
        .await
        .map_err(|_| refuse(Code::Internal, "INTERNAL", "the file work ended early"))?
}

/// Whether a user may make a directory the working directory.
pub(crate) fn may_enter(user: &User, directory: &Path) -> bool {
    Acting::begin(user).is_ok_and(|_acting| fs::metadata(directory.join(".")).is_ok())
}

pub(crate) fn shown(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn entry(path: &Path, metadata: &Metadata) -> Entry {
    let kind = metadata.file_type();
    let file_type = if kind.is_file() {
        FileType::File
    } else if kind.is_dir() {
        FileType::Directory
    } else if kind.is_symlink() {
        FileType::Symlink
    } else {
        FileType::Other
    };
    let target = if kind.is_symlink() {
        fs::read_link(path).unwrap_or_default()
    } else {
        PathBuf::new()
    };
    Entry {
        path: shown(path),
        path_bytes: path.as_os_str().as_bytes().to_vec(),
        r#type: file_type.into(),
        size_bytes: metadata.len(),
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        modify_time: Some(metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH).into()),
        symlink_target: target.into_os_string().into_vec(),
    }
}

/// What a path is.
pub(crate) fn stat(path: &Path, no_follow: bool) -> Result<Entry, Status> {
    let metadata = if no_follow {
        fs::symlink_metadata(path)
    } else {
        fs::metadata(path)
    };
    Ok(entry(
        path,
        &metadata.map_err(|error| path_error(&shown(path), &error))?,
    ))
}

/// Transfers at once: each has a thread, of which there are 512, and a client may leave it waiting.
const MOST_TRANSFERS: usize = 256;
static TRANSFERS: Semaphore = Semaphore::const_new(MOST_TRANSFERS);
/// Chunks of a transfer that wait for their reader.
pub(crate) const IN_FLIGHT: usize = 4;
const CHUNK: usize = 128 << 10;

/// The place of a transfer, until it is dropped.
#[derive(Debug)]
pub(crate) struct Transfer {
    _permit: SemaphorePermit<'static>,
}

impl Transfer {
    /// Takes one, if there is one left.
    pub(crate) fn begin() -> Result<Self, Status> {
        let permit = TRANSFERS.try_acquire().map_err(|_| {
            let message =
                format!("{MOST_TRANSFERS} files of this session are on their way already");
            refuse(Code::ResourceExhausted, "TOO_MANY_TRANSFERS", message)
        })?;
        Ok(Self { _permit: permit })
    }
}

/// Reads a part of a file, or as much of it as there is, until `send` wants no more; it is told each chunk's offset.
pub(crate) fn each_chunk(
    mut file: File,
    mut offset: u64,
    length: u64,
    mut send: impl FnMut(u64, Bytes) -> bool,
) -> io::Result<()> {
    file.seek(SeekFrom::Start(offset))?;
    let mut left = length;
    while left > 0 {
        let wanted = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        let mut chunk = vec![0; wanted];
        let count = file.read(&mut chunk)?;
        chunk.truncate(count);
        if count == 0 || !send(offset, Bytes::from(chunk)) {
            break;
        }
        offset += count as u64;
        left -= count as u64;
    }
    Ok(())
}

/// Opens a file for reading: a regular one only, since a pipe or device might never answer.
pub(crate) fn open(path: &Path) -> Result<(File, Entry), Status> {
    let failed = |error: io::Error| path_error(&shown(path), &error);
    let file = File::options()
        .read(true)
        .custom_flags(nix::libc::O_NONBLOCK)
        .open(path)
        .map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    regular(path, &metadata)?;
    Ok((file, entry(path, &metadata)))
}

fn regular(path: &Path, metadata: &Metadata) -> Result<(), Status> {
    if metadata.is_file() {
        return Ok(());
    }
    let (reason, what) = if metadata.is_dir() {
        ("PATH_IS_A_DIRECTORY", "is a directory")
    } else {
        ("PATH_NOT_A_FILE", "not a regular file")
    };
    Err(refuse(
        Code::FailedPrecondition,
        reason,
        format!("{}: {what}", shown(path)),
    ))
}

/// Where a write to a link goes, as with a shell's redirection: also when there is nothing yet.
fn follow(mut path: PathBuf) -> io::Result<PathBuf> {
    for _ in 0..MOST_LINKS {
        // What is no link, or not there at all, is where it goes.
        let Ok(target) = fs::read_link(&path) else {
            return Ok(path);
        };
        path = path.parent().unwrap_or(Path::new("/")).join(target);
    }
    Err(io::Error::from_raw_os_error(nix::libc::ELOOP))
}

fn make_parents(parent: &Path) -> io::Result<()> {
    fs::create_dir_all(parent).map_err(|error| match error.kind() {
        // A file is where a directory should be.
        io::ErrorKind::AlreadyExists => io::ErrorKind::NotADirectory.into(),
        _ => error,
    })
}

/// Makes a directory and its missing parents; one that is there is left as it is.
pub(crate) fn make_directory(path: &Path, mode: u32) -> Result<Entry, Status> {
    let failed = |error: io::Error| path_error(&shown(path), &error);
    if let Some(parent) = path.parent() {
        make_parents(parent).map_err(failed)?;
    }
    match fs::create_dir(path) {
        Ok(()) => fs::set_permissions(path, fs::Permissions::from_mode(mode & 0o7777)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        Err(error) => Err(error),
    }
    .map_err(failed)?;
    stat(path, false)
}

/// Makes a symbolic link; in place of something only if asked.
pub(crate) fn make_symlink(path: &Path, target: &OsStr, replace: bool) -> Result<Entry, Status> {
    let failed = |error: io::Error| path_error(&shown(path), &error);
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(invalid("path", "names no file"));
    };
    let folder = Folder::open(parent).map_err(failed)?;
    if replace {
        let temporary = OsString::from(format!(".{:016x}.part", random()));
        folder.make_symlink(&temporary, target).map_err(failed)?;
        if let Err(error) = folder.rename(&temporary, name, true) {
            // It was made just now, and is of no use.
            let _ = folder.remove(&temporary);
            return Err(failed(error));
        }
    } else {
        folder.make_symlink(name, target).map_err(failed)?;
    }
    stat(path, true)
}

/// Renames; onto something only if asked.
pub(crate) fn rename(source: &Path, destination: &Path, replace: bool) -> Result<Entry, Status> {
    use nix::fcntl::{RenameFlags, renameat2};
    let flags = if replace {
        RenameFlags::empty()
    } else {
        RenameFlags::RENAME_NOREPLACE
    };
    renameat2(
        nix::fcntl::AT_FDCWD,
        source,
        nix::fcntl::AT_FDCWD,
        destination,
        flags,
    )
    .map_err(|error| {
        let both = format!("{} to {}", shown(source), shown(destination));
        path_error(&both, &error.into())
    })?;
    stat(destination, true)
}

/// Removes.
pub(crate) fn remove(path: &Path, recursive: bool) -> Result<(), Status> {
    let failed = |error: io::Error| path_error(&shown(path), &error);
    let metadata = fs::symlink_metadata(path).map_err(failed)?;
    let removed = match (metadata.is_dir(), recursive) {
        (false, _) => fs::remove_file(path),
        (true, true) => fs::remove_dir_all(path),
        (true, false) => fs::remove_dir(path),
    };
    removed.map_err(failed)
}

/// For names that nobody else has taken.
fn random() -> u64 {
    use std::hash::{BuildHasher as _, RandomState};
    RandomState::new().hash_one(SystemTime::now())
}
