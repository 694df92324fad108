//! Writable disks: sparse ext4 images, formatted once per size and copied without their holes.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use nix::unistd::{Whence, lseek};

const COPY_BUFFER: usize = 256 << 10;

/// A disk cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// Reading or writing failed.
    #[error("writable disk: {0}")]
    Io(#[from] io::Error),
    /// mke2fs failed.
    #[error("mke2fs: {0}")]
    Format(String),
}

/// Makes writable disks.
#[derive(Debug)]
pub struct Disks {
    folder: PathBuf,
}

impl Disks {
    /// Keeps formatted images in the folder.
    pub fn open(folder: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&folder)?;
        Ok(Self { folder })
    }

    /// Makes a new, empty disk. Blocking.
    pub fn make(&self, size: u64, path: &Path) -> Result<(), DiskError> {
        Ok(copy(&self.template(size)?, path)?)
    }

    fn template(&self, size: u64) -> Result<PathBuf, DiskError> {
        let path = self.folder.join(format!("empty-{size}.ext4"));
        if path.exists() {
            return Ok(path);
        }
        let file = tempfile::Builder::new()
            .prefix(".incoming-")
            .tempfile_in(&self.folder)?;
        file.as_file().set_len(size)?;
        let output = Command::new("mke2fs")
            .args([
                "-q",
                "-F",
                "-t",
                "ext4",
                "-m",
                "0",
                "-E",
                "lazy_itable_init=1,lazy_journal_init=1",
            ])
            .arg(file.path())
            .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
            .stdin(Stdio::null())
            .output()?;
        if !output.status.success() {
            return Err(DiskError::Format(
                String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            ));
        }
        file.as_file().sync_all()?;
        file.persist(&path).map_err(|error| error.error)?;
        Ok(path)
    }
}

/// Makes a copy of a sparse file: by reference where the file system can (ioctl_ficlone(2)), else of its data. Blocking.
pub fn copy(source: &Path, path: &Path) -> io::Result<()> {
    let (source, copy) = (File::open(source)?, File::create_new(path)?);
    if rustix::fs::ioctl_ficlone(&copy, &source).is_ok() {
        return Ok(());
    }
    let size = source.metadata()?.len();
    copy.set_len(size)?;
    copy_data(&source, &copy, size)
}

/// Copies only what is data: holes stay holes (lseek(2), `SEEK_DATA`).
fn copy_data(source: &File, copy: &File, size: u64) -> io::Result<()> {
    let size = i64::try_from(size).map_err(io::Error::other)?;
    let mut buffer = vec![0; COPY_BUFFER];
    let mut at = 0;
    while at < size {
        let start = match lseek(source, at, Whence::SeekData) {
            Ok(start) => start,
            // No data after this place.
            Err(nix::errno::Errno::ENXIO) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let end = lseek(source, start, Whence::SeekHole)?;
        let mut position = start.unsigned_abs();
        while position < end.unsigned_abs() {
            let wanted = usize::try_from(end.unsigned_abs() - position)
                .unwrap_or(COPY_BUFFER)
                .min(COPY_BUFFER);
            let part = buffer.get_mut(..wanted).unwrap_or_default();
            let count = source.read_at(part, position)?;
            if count == 0 {
                break;
            }
            copy.write_all_at(part.get(..count).unwrap_or_default(), position)?;
            position += count as u64;
        }
        at = end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn a_disk_is_formatted_and_sparse() {
        let folder = tempfile::tempdir().unwrap();
        let disks = Disks::open(folder.path().join("disks")).unwrap();
        let path = folder.path().join("disk.ext4");
        disks.make(256 << 20, &path).unwrap();
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!(metadata.len(), 256 << 20);
        assert!(
            metadata.blocks() * 512 < 16 << 20,
            "{} bytes taken",
            metadata.blocks() * 512
        );
        let check = Command::new("e2fsck")
            .args(["-f", "-n"])
            .arg(&path)
            .env("PATH", "/sbin:/usr/sbin")
            .output()
            .unwrap();
        assert!(
            check.status.success(),
            "{}",
            String::from_utf8_lossy(&check.stdout)
        );
        assert!(
            disks.make(256 << 20, &path).is_err(),
            "a disk that is there is not overwritten"
        );
    }
}
