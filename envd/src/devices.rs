//! Devices as the kernel has them: what lies in `/dev` is whatever root of the guest has made of it, a pipe that never answers, or nothing. Root may mount something over
//! `/proc` and `/sys`, too, by which they are found; then its own layers are wrong, or there are none.

use std::{
    fs::File,
    io,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    path::PathBuf,
};

use rustix::{
    fs::{FileType, Mode, OFlags, makedev, mknodat, openat},
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen},
};

const NAME: &str = "device";

/// A device's file, in a file system of its own that has no place in the tree.
#[derive(Debug)]
pub(crate) struct Device {
    folder: OwnedFd,
}

impl Device {
    /// The device of these numbers (mknod(2)).
    pub(crate) fn new(kind: FileType, major: u32, minor: u32) -> io::Result<Self> {
        let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_create(context.as_fd())?;
        let folder = fsmount(
            context.as_fd(),
            FsMountFlags::FSMOUNT_CLOEXEC,
            MountAttrFlags::empty(),
        )?;
        let mode = Mode::RUSR | Mode::WUSR;
        mknodat(&folder, NAME, kind, mode, makedev(major, minor))?;
        Ok(Self { folder })
    }

    /// /dev/random (random(4)).
    pub(crate) fn random() -> io::Result<Self> {
        Self::new(FileType::CharacterDevice, 1, 8)
    }

    /// Opens it for writing.
    pub(crate) fn open(&self) -> io::Result<File> {
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        Ok(openat(&self.folder, NAME, flags, Mode::empty())?.into())
    }

    /// Where it is for as long as this is.
    pub(crate) fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}/{NAME}", self.folder.as_raw_fd()).into()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};

    use super::*;

    #[test]
    fn a_device_is_that_of_its_numbers() {
        let random = Device::random().unwrap();
        let there = std::fs::metadata(random.path()).unwrap();
        assert!(there.file_type().is_char_device());
        assert_eq!(there.rdev(), makedev(1, 8));
        // It is open also when its file is gone.
        let open = random.open().unwrap();
        drop(random);
        assert_eq!(open.metadata().unwrap().rdev(), makedev(1, 8));
    }
}
