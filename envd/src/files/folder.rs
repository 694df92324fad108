//! Directories as the kernel has them and not as their paths say: what is done in one stays in it, whatever others do to the path meanwhile.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io,
    os::{fd::OwnedFd, unix::ffi::OsStringExt as _},
    path::Path,
};

use nix::{
    dir::Dir,
    fcntl::{
        AT_FDCWD, AtFlags, OFlag, OpenHow, RenameFlags, ResolveFlag, openat, openat2, readlinkat,
        renameat2,
    },
    sys::stat::{FileStat, Mode, SFlag, fstat, fstatat, mkdirat, mknodat},
    unistd::{Gid, LinkatFlags, Uid, UnlinkatFlags, fchownat, linkat, symlinkat, unlinkat},
};

/// Of those who go through a tree: directories in each other. Each is open meanwhile, and on this thread's stack.
pub(super) const DEEPEST: usize = 512;
/// Files with several names that are known by them; those beyond become files of their own.
pub(super) const MOST_LINKED: usize = 100_000;

/// What something is (`S_IFMT` of inode(7)).
pub(super) fn kind(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits())
}

/// An open directory.
#[derive(Debug)]
pub(super) struct Folder(OwnedFd);

const DIRECTORY: OFlag = OFlag::O_DIRECTORY.union(OFlag::O_CLOEXEC);
pub(super) const OWNER_ONLY: Mode = Mode::S_IRUSR.union(Mode::S_IWUSR);

impl Folder {
    /// Opens one, whatever links lead to it.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        Ok(Self(openat(AT_FDCWD, path, DIRECTORY, Mode::empty())?))
    }

    /// A directory in this one; not a link to one.
    pub(super) fn folder(&self, name: &OsStr) -> io::Result<Self> {
        let flags = DIRECTORY | OFlag::O_NOFOLLOW;
        Ok(Self(openat(&self.0, name, flags, Mode::empty())?))
    }

    /// A directory further below, by links too, as long as none of them leads out (RESOLVE_BENEATH of openat2(2)).
    pub(super) fn beneath(&self, path: &Path) -> io::Result<Self> {
        let how = OpenHow::new()
            .flags(DIRECTORY)
            .resolve(ResolveFlag::RESOLVE_BENEATH);
        Ok(Self(openat2(&self.0, path, how)?))
    }

    /// What is in it, in no order.
    pub(super) fn names(&self) -> io::Result<Vec<OsString>> {
        // Opened anew, so that two who read it do not take each other's entries.
        let mut names = Vec::new();
        for found in Dir::openat(&self.0, ".", DIRECTORY, Mode::empty())?.iter() {
            let name = found?.file_name().to_bytes().to_vec();
            if name != b"." && name != b".." {
                names.push(OsString::from_vec(name));
            }
        }
        Ok(names)
    }

    pub(super) fn stat(&self, name: &OsStr) -> io::Result<FileStat> {
        Ok(fstatat(&self.0, name, AtFlags::AT_SYMLINK_NOFOLLOW)?)
    }

    /// A file, for reading. A FIFO or device in its place is opened too, but nobody waits for it.
    pub(super) fn file(&self, name: &OsStr) -> io::Result<File> {
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        Ok(openat(&self.0, name, flags, Mode::empty())?.into())
    }

    /// A new file, its owner's alone until somebody says otherwise.
    pub(super) fn create(&self, name: &OsStr) -> io::Result<File> {
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
        Ok(openat(&self.0, name, flags, OWNER_ONLY)?.into())
    }

    pub(super) fn link_target(&self, name: &OsStr) -> io::Result<OsString> {
        Ok(readlinkat(&self.0, name)?)
    }

    pub(super) fn make_symlink(&self, name: &OsStr, target: &OsStr) -> io::Result<()> {
        Ok(symlinkat(target, &self.0, name)?)
    }

    /// Another name for a file of a folder; of a link, for the link itself.
    pub(super) fn make_hard_link(
        &self,
        name: &OsStr,
        of: &Self,
        original: &OsStr,
    ) -> io::Result<()> {
        Ok(linkat(
            &of.0,
            original,
            &self.0,
            name,
            LinkatFlags::empty(),
        )?)
    }

    /// A new directory, its owner's alone until somebody says otherwise.
    pub(super) fn make_folder(&self, name: &OsStr) -> io::Result<()> {
        Ok(mkdirat(&self.0, name, OWNER_ONLY | Mode::S_IXUSR)?)
    }

    /// A new FIFO; the umask takes from its mode.
    pub(super) fn make_fifo(&self, name: &OsStr, mode: Mode) -> io::Result<()> {
        Ok(mknodat(&self.0, name, SFlag::S_IFIFO, mode, 0)?)
    }

    /// Gives something in it to somebody; a link itself, not what it leads to.
    pub(super) fn give(&self, name: &OsStr, (user, group): (Uid, Gid)) -> io::Result<()> {
        let flags = AtFlags::AT_SYMLINK_NOFOLLOW;
        Ok(fchownat(&self.0, name, Some(user), Some(group), flags)?)
    }

    /// Removes anything but a directory.
    pub(super) fn remove(&self, name: &OsStr) -> io::Result<()> {
        Ok(unlinkat(&self.0, name, UnlinkatFlags::NoRemoveDir)?)
    }

    /// Removes anything with all below it.
    pub(super) fn remove_all(&self, name: &OsStr) -> io::Result<()> {
        if kind(&self.stat(name)?) != SFlag::S_IFDIR {
            return self.remove(name);
        }
        let folder = self.folder(name)?;
        for name in folder.names()? {
            folder.remove_all(&name)?;
        }
        Ok(unlinkat(&self.0, name, UnlinkatFlags::RemoveDir)?)
    }

    /// Whether another is the same directory.
    pub(super) fn is(&self, other: &Self) -> io::Result<bool> {
        let (this, other) = (fstat(&self.0)?, fstat(&other.0)?);
        Ok((this.st_dev, this.st_ino) == (other.st_dev, other.st_ino))
    }

    pub(super) fn rename(&self, from: &OsStr, to: &OsStr, replace: bool) -> io::Result<()> {
        let flags = if replace {
            RenameFlags::empty()
        } else {
            RenameFlags::RENAME_NOREPLACE
        };
        Ok(renameat2(&self.0, from, &self.0, to, flags)?)
    }

    /// The directory itself, for fchmod(2) and the like.
    pub(super) fn as_fd(&self) -> &OwnedFd {
        &self.0
    }
}
