//! Writes of files: beside their place first, so that they appear whole or not at all, or into them as they are.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File, FileTimes, TryLockError},
    io::{self, Seek as _, SeekFrom, Write as _},
    os::{
        fd::OwnedFd,
        unix::{
            ffi::OsStrExt as _,
            fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
        },
    },
    path::{Path, PathBuf},
    time::SystemTime,
};

use nix::{
    fcntl::{AtFlags, OFlag, openat, renameat},
    sys::stat::{Mode, fstatat},
    unistd::{AccessFlags, Gid, Uid, UnlinkatFlags, faccessat, fchown, unlinkat},
};
use proto::envd::v1::{Entry, WriteEnd, WriteHeader, WritePlace};
use tonic::{Code, Status};

use super::{entry, follow, make_parents, random, regular, shown};
use crate::{
    errors::{invalid, path_error, refuse, refuse_with},
    users::User,
};

const LONGEST_UPLOAD_ID: usize = 64;
/// Of a name, in the name of its draft: with an upload's ID that is at most 255 bytes.
const NAME_IN_DRAFT: usize = 180;

/// A file being written.
#[derive(Debug)]
pub(crate) struct Draft {
    file: File,
    path: PathBuf,
    modify_time: Option<SystemTime>,
    rights: Rights,
    /// None of a write in place.
    beside: Option<Beside>,
}

/// What a file's owner and permissions become; what is not set stays as it is.
#[derive(Debug, Default)]
struct Rights {
    /// Those of the file that is replaced.
    inherited: Option<(Uid, Gid)>,
    uid: Option<Uid>,
    gid: Option<Gid>,
    mode: Option<u32>,
}

/// A draft under another name beside its own; dropped before its end, it leaves nothing but what an upload has sent.
///
/// All of it happens in the directory that was opened at the beginning, whatever its path leads to by the end.
#[derive(Debug)]
struct Beside {
    folder: OwnedFd,
    temporary: OsString,
    name: OsString,
    is_upload: bool,
    is_finished: bool,
}

impl Draft {
    /// Begins a write, as its user.
    pub(crate) fn begin(path: PathBuf, user: &User, header: &WriteHeader) -> Result<Self, Status> {
        let modify_time = header
            .modify_time
            .map(SystemTime::try_from)
            .transpose()
            .map_err(|_| invalid("modify_time", "is no time"))?;
        let path = follow(path.clone()).map_err(|error| path_error(&shown(&path), &error))?;
        let failed = |error: io::Error| path_error(&shown(&path), &error);
        let (Some(parent), Some(_)) = (path.parent(), path.file_name()) else {
            return Err(invalid("path", "names no file"));
        };
        let is_upload = !header.upload_id.is_empty();
        if header.make_parents {
            make_parents(parent).map_err(failed)?;
        }
        let there = match fs::metadata(&path) {
            Ok(there) => Some(there),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(failed(error)),
        };
        if let Some(there) = &there {
            regular(&path, there)?;
        }
        let (file, beside) = match header.place() {
            WritePlace::Unspecified if header.offset != 0 && !is_upload => {
                return Err(invalid("offset", "is of AT_OFFSET and uploads only"));
            }
            WritePlace::Unspecified => {
                let beside = Beside::new(&path, &header.upload_id)?;
                let file = if is_upload {
                    beside.go_on(&path, user, header.offset)?
                } else {
                    beside.create().map_err(failed)?
                };
                (file, Some(beside))
            }
            WritePlace::Append | WritePlace::AtOffset if is_upload => {
                return Err(invalid("upload_id", "is not for writes in place"));
            }
            place => (in_place(&path, place, header.offset)?, None),
        };
        let rights = Rights::new(header, there.as_ref(), beside.is_some());
        let draft = Self {
            file,
            path: path.clone(),
            modify_time,
            rights,
            beside,
        };
        // Until its end an upload is its user's, who else could not go on with it; others hear at once what they may not.
        if !is_upload {
            draft.rights.set(&draft.file).map_err(failed)?;
        }
        Ok(draft)
    }

    /// Adds bytes.
    pub(crate) fn write(&mut self, data: &[u8]) -> Result<(), Status> {
        let written = self.file.write_all(data);
        written.map_err(|error| path_error(&shown(&self.path), &error))
    }

    /// All has come: the file appears under its own name.
    pub(crate) fn finish(mut self, end: Option<&WriteEnd>) -> Result<Entry, Status> {
        let path = self.path.clone();
        let failed = |error: io::Error| path_error(&shown(&path), &error);
        let is_upload = self.beside.as_ref().is_some_and(|beside| beside.is_upload);
        if is_upload && end.is_none() {
            let message = format!("{}: the upload ended without its end", shown(&path));
            return Err(refuse(Code::Aborted, "UPLOAD_BROKE_OFF", message));
        }
        let expected = end.map(|end| end.blake3.as_slice()).unwrap_or_default();
        if !expected.is_empty() {
            self.check(expected)?;
        }
        if is_upload {
            self.rights.set(&self.file).map_err(failed)?;
        }
        if let Some(time) = self.modify_time {
            let times = FileTimes::new().set_modified(time);
            self.file.set_times(times).map_err(failed)?;
        }
        if let Some(beside) = &mut self.beside {
            renameat(
                &beside.folder,
                beside.temporary.as_os_str(),
                &beside.folder,
                beside.name.as_os_str(),
            )
            .map_err(|error| failed(error.into()))?;
            beside.is_finished = true;
        }
        let metadata = self.file.metadata().map_err(failed)?;
        Ok(entry(&path, &metadata))
    }

    /// Reads what is there, since of an upload that went on only a part came by.
    fn check(&mut self, expected: &[u8]) -> Result<(), Status> {
        let Some(beside) = &mut self.beside else {
            return Err(invalid("blake3", "is not for writes in place"));
        };
        let expected =
            <[u8; 32]>::try_from(expected).map_err(|_| invalid("blake3", "must have 32 bytes"))?;
        let failed = |error: io::Error| path_error(&shown(&self.path), &error);
        self.file.rewind().map_err(failed)?;
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(&self.file).map_err(failed)?;
        if hasher.finalize() == expected {
            return Ok(());
        }
        // Which byte is wrong nobody knows, so nothing of it is worth keeping.
        beside.is_upload = false;
        Err(refuse(
            Code::DataLoss,
            "CHECKSUM_MISMATCH",
            format!(
                "{}: what came has another checksum; nothing was changed",
                shown(&self.path)
            ),
        ))
    }
}

impl Rights {
    fn new(header: &WriteHeader, there: Option<&fs::Metadata>, is_new: bool) -> Self {
        let there = there.filter(|_| is_new);
        let inherited = there.map(|there| (Uid::from_raw(there.uid()), Gid::from_raw(there.gid())));
        let mode = header.mode.or(there.map(fs::Metadata::mode));
        Self {
            inherited,
            uid: header.uid.map(Uid::from_raw),
            gid: header.gid.map(Gid::from_raw),
            mode: mode.or(is_new.then_some(0o644)).map(|mode| mode & 0o7777),
        }
    }

    fn set(&self, file: &File) -> io::Result<()> {
        if let Some((uid, gid)) = self.inherited {
            // Who may write to another's file but not give files away becomes its owner.
            let _ = fchown(file, Some(uid), Some(gid));
        }
        if self.uid.is_some() || self.gid.is_some() {
            fchown(file, self.uid, self.gid)?;
        }
        // After the owner, whose change takes setuid and setgid away (chown(2)).
        match self.mode {
            Some(mode) => file.set_permissions(fs::Permissions::from_mode(mode)),
            None => Ok(()),
        }
    }
}

impl Beside {
    fn new(path: &Path, upload_id: &str) -> Result<Self, Status> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(invalid("path", "names no file"));
        };
        let is_upload = !upload_id.is_empty();
        let id = if is_upload {
            check_upload_id(upload_id)?;
            upload_id.to_owned()
        } else {
            format!("{:016x}", random())
        };
        let folder = File::options()
            .read(true)
            .custom_flags(nix::libc::O_PATH | nix::libc::O_DIRECTORY)
            .open(parent)
            .map_err(|error| path_error(&shown(path), &error))?;
        // What may not be written may not be replaced either, though the kernel only asks about the directory then.
        match faccessat(&folder, name, AccessFlags::W_OK, AtFlags::AT_EACCESS) {
            Ok(()) | Err(nix::errno::Errno::ENOENT) => {}
            Err(error) => return Err(path_error(&shown(path), &error.into())),
        }
        let mut temporary = OsString::from(".");
        let beginning = name.as_bytes().get(..name.len().min(NAME_IN_DRAFT));
        temporary.push(OsStr::from_bytes(beginning.unwrap_or_default()));
        temporary.push(format!(".{id}.part"));
        Ok(Self {
            folder: folder.into(),
            temporary,
            name: name.to_owned(),
            is_upload,
            is_finished: false,
        })
    }

    fn open(&self, flags: OFlag) -> io::Result<File> {
        let flags =
            flags | OFlag::O_RDWR | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
        let mode = Mode::S_IRUSR | Mode::S_IWUSR;
        let file = openat(&self.folder, self.temporary.as_os_str(), flags, mode)?;
        Ok(file.into())
    }

    fn create(&self) -> io::Result<File> {
        self.open(OFlag::O_CREAT | OFlag::O_EXCL)
    }

    /// The draft of an upload, from an offset on. Whoever else may write to the directory could have put something in its place.
    fn go_on(&self, path: &Path, user: &User, offset: u64) -> Result<File, Status> {
        let failed = |error: io::Error| path_error(&shown(path), &error);
        let mut file = self.open(OFlag::O_CREAT).map_err(failed)?;
        let busy = || {
            let message = format!("{}: another write of this upload goes on", shown(path));
            refuse(Code::Aborted, "UPLOAD_BUSY", message)
        };
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(busy()),
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
        let metadata = file.metadata().map_err(failed)?;
        let is_own = metadata.is_file() && metadata.nlink() == 1 && metadata.uid() == user.uid;
        let named = fstatat(
            &self.folder,
            self.temporary.as_os_str(),
            AtFlags::AT_SYMLINK_NOFOLLOW,
        );
        // Between opening and locking it the upload may have ended: then it is no draft any more.
        if !named.is_ok_and(|named| named.st_ino == metadata.ino()) {
            return Err(busy());
        }
        if !is_own {
            let message = format!("{}: not an upload of this user", shown(path));
            return Err(refuse(Code::AlreadyExists, "PATH_EXISTS", message));
        }
        if offset > metadata.len() {
            let size = metadata.len();
            return Err(refuse_with(
                Code::OutOfRange,
                "UPLOAD_OFFSET",
                format!("{}: {size} bytes are there, not {offset}", shown(path)),
                &[("size", size.to_string())],
            ));
        }
        file.set_len(offset).map_err(failed)?;
        file.seek(SeekFrom::Start(offset)).map_err(failed)?;
        Ok(file)
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        if !self.is_upload && !self.is_finished {
            // One that somebody removed is gone already.
            let _ = unlinkat(
                &self.folder,
                self.temporary.as_os_str(),
                UnlinkatFlags::NoRemoveDir,
            );
        }
    }
}

fn in_place(path: &Path, place: WritePlace, offset: u64) -> Result<File, Status> {
    let failed = |error: io::Error| path_error(&shown(path), &error);
    let is_append = place == WritePlace::Append;
    if is_append && offset != 0 {
        return Err(invalid("offset", "is of AT_OFFSET and uploads only"));
    }
    let mut file = File::options()
        .write(true)
        .append(is_append)
        .create(true)
        .truncate(false)
        .mode(0o644)
        .custom_flags(nix::libc::O_NONBLOCK)
        .open(path)
        .map_err(failed)?;
    regular(path, &file.metadata().map_err(failed)?)?;
    if !is_append {
        file.seek(SeekFrom::Start(offset)).map_err(failed)?;
    }
    Ok(file)
}

/// How much there is of an upload that broke off.
pub(crate) fn uploaded(path: PathBuf, upload_id: &str) -> Result<u64, Status> {
    check_upload_id(upload_id)?;
    let path = follow(path.clone()).map_err(|error| path_error(&shown(&path), &error))?;
    let beside = Beside::new(&path, upload_id)?;
    let found = fstatat(
        &beside.folder,
        beside.temporary.as_os_str(),
        AtFlags::AT_SYMLINK_NOFOLLOW,
    );
    found
        .map_err(io::Error::from)
        .map(|found| u64::try_from(found.st_size).unwrap_or(0))
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => {
                let message = format!("{}: no upload {upload_id}", shown(&path));
                refuse(Code::NotFound, "UPLOAD_NOT_FOUND", message)
            }
            _ => path_error(&shown(&path), &error),
        })
}

fn check_upload_id(id: &str) -> Result<(), Status> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-');
    if (1..=LONGEST_UPLOAD_ID).contains(&id.len()) && id.bytes().all(is_plain) {
        return Ok(());
    }
    let rule = format!("must be 1-{LONGEST_UPLOAD_ID} letters, digits, _ and -");
    Err(invalid("upload_id", rule))
}
