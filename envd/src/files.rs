//! Files, as a user: the kernel itself decides what that user may do.
//!
//! Work runs on a thread whose file system user and group are the acting user's (setfsuid(2): per thread, and it drops the
//! capabilities that would let root pass). Nothing is checked by hand, so nothing can be raced.

use std::{
    ffi::OsStr,
    fs::{self, File, Metadata},
    io,
    os::unix::{
        ffi::{OsStrExt as _, OsStringExt as _},
        fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
    time::SystemTime,
};

use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
use proto::envd::v1::{Entry, FileType, WriteHeader};
use tonic::{Code, Status};

use crate::{
    errors::{invalid, path_error, refuse},
    users::{self, User},
};

const LONGEST_PATH: usize = 4096;

/// The acting user and the path a request names.
pub(crate) fn resolve(
    user: &str,
    path: &str,
    path_bytes: &[u8],
) -> Result<(User, PathBuf), Status> {
    let user = users::find(user)
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
        let is_root = Uid::effective().is_root();
        if is_root && user.uid != 0 {
            setfsgid(Gid::from_raw(user.gid));
            setfsuid(Uid::from_raw(user.uid));
        }
        let outcome = work();
        if is_root && user.uid != 0 {
            setfsuid(Uid::from_raw(0));
            setfsgid(Gid::from_raw(0));
        }
        outcome
    };
    tokio::task::spawn_blocking(run)
        .await
        .map_err(|_| refuse(Code::Internal, "INTERNAL", "the file work ended early"))?
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

/// A page of a directory by name, after a name; and the name to go on from.
pub(crate) fn list(
    path: &Path,
    after: &[u8],
    limit: usize,
) -> Result<(Vec<Entry>, Option<Vec<u8>>), Status> {
    let failed = |error: io::Error| path_error(&shown(path), &error);
    let mut names = Vec::new();
    for child in fs::read_dir(path).map_err(failed)? {
        names.push(child.map_err(failed)?.file_name().into_vec());
    }
    names.sort_unstable();
    let mut entries = Vec::new();
    let mut rest = names
        .into_iter()
        .filter(|name| name.as_slice() > after)
        .peekable();
    let mut last = None;
    while entries.len() < limit {
        let Some(name) = rest.next() else { break };
        let child = path.join(OsStr::from_bytes(&name));
        // One that went away in between is not there.
        if let Ok(metadata) = fs::symlink_metadata(&child) {
            entries.push(entry(&child, &metadata));
        }
        last = Some(name);
    }
    Ok((entries, last.filter(|_| rest.peek().is_some())))
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
    let kind = metadata.file_type();
    if kind.is_dir() {
        return Err(refuse(
            Code::FailedPrecondition,
            "PATH_IS_A_DIRECTORY",
            format!("{}: is a directory", shown(path)),
        ));
    }
    if kind.is_fifo() || kind.is_socket() || kind.is_char_device() || kind.is_block_device() {
        return Err(refuse(
            Code::FailedPrecondition,
            "PATH_NOT_A_FILE",
            format!("{}: not a regular file", shown(path)),
        ));
    }
    Ok((file, entry(path, &metadata)))
}

/// A file being written under another name beside its own; dropped before its end, it leaves nothing.
#[derive(Debug)]
pub(crate) struct Draft {
    pub(crate) file: Option<File>,
    temporary: PathBuf,
    path: PathBuf,
    user: User,
}

/// Begins a write.
pub(crate) fn begin(user: &User, path: PathBuf, header: &WriteHeader) -> Result<Draft, Status> {
    // Writing to a link writes to what it points at, as a shell's redirection does.
    let path = fs::canonicalize(&path).unwrap_or(path);
    let failed = |error: io::Error| path_error(&shown(&path), &error);
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(invalid("path", "names no file"));
    };
    if path.is_dir() {
        return Err(refuse(
            Code::FailedPrecondition,
            "PATH_IS_A_DIRECTORY",
            format!("{}: is a directory", shown(&path)),
        ));
    }
    if header.make_parents {
        fs::create_dir_all(parent).map_err(failed)?;
    }
    let mode = match (header.mode, fs::metadata(&path)) {
        (Some(mode), _) => mode & 0o7777,
        (None, Ok(there)) => there.mode() & 0o7777,
        (None, Err(_)) => 0o644,
    };
    let mut hidden = b".".to_vec();
    hidden.extend_from_slice(
        name.as_bytes()
            .get(..name.len().min(200))
            .unwrap_or_default(),
    );
    hidden.extend_from_slice(format!(".{:016x}.part", random()).as_bytes());
    let temporary = parent.join(OsStr::from_bytes(&hidden));
    let file = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)
        .map_err(failed)?;
    let draft = Draft {
        file: Some(file),
        temporary,
        user: user.clone(),
        path,
    };
    if let Some(file) = &draft.file {
        file.set_permissions(fs::Permissions::from_mode(mode))
            .map_err(|error| path_error(&shown(&draft.path), &error))?;
    }
    Ok(draft)
}

fn random() -> u64 {
    use std::hash::{BuildHasher as _, RandomState};
    RandomState::new().hash_one(SystemTime::now())
}

impl Draft {
    pub(crate) fn user(&self) -> User {
        self.user.clone()
    }

    /// Makes the file appear under its own name.
    pub(crate) fn finish(mut self) -> Result<Entry, Status> {
        self.file = None;
        fs::rename(&self.temporary, &self.path)
            .map_err(|error| path_error(&shown(&self.path), &error))?;
        stat(&self.path, true)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // After `finish` it is gone already.
        let _ = fs::remove_file(&self.temporary);
    }
}

/// Makes a directory and its missing parents.
pub(crate) fn make_directory(path: &Path, mode: u32) -> Result<Entry, Status> {
    let failed = |error: io::Error| path_error(&shown(path), &error);
    fs::create_dir_all(path).map_err(failed)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode & 0o7777)).map_err(failed)?;
    stat(path, false)
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
    .map_err(|error| path_error(&shown(source), &error.into()))?;
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
