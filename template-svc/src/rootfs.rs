//! From a root filesystem tarball to the read-only image sandboxes share. Blocking; run it on a thread of its own.
//!
//! The tarball is untrusted: entries cannot leave the work folder (the tar crate refuses `..` and links out of it), device nodes
//! are left out (the guest makes its own), and what it unpacks to is bounded.

use std::{
    fs::File,
    io::{self, BufReader, Read, Seek as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use tar::{Archive, EntryType};

/// A tarball that makes no image.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    /// It is not a tarball, is cut short, or tries to leave its folder.
    #[error("the tarball cannot be unpacked: {0}")]
    Unpack(io::Error),
    /// It unpacks to more than is allowed.
    #[error("the root filesystem is larger than {0} bytes")]
    TooLarge(u64),
    /// It has no files a Linux system needs.
    #[error("the tarball holds no root filesystem: {0} is missing")]
    NotARoot(&'static str),
    /// The disk is full.
    #[error("the disk of template-svc is full")]
    DiskFull,
    /// mkfs.erofs failed.
    #[error("mkfs.erofs: {0}")]
    Pack(String),
}

impl RootfsError {
    /// The stable word of a build's failure.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Unpack(_) | Self::NotARoot(_) => "SOURCE_INVALID",
            Self::TooLarge(_) => "SOURCE_TOO_LARGE",
            Self::DiskFull => "DISK_FULL",
            Self::Pack(_) => "PACK_FAILED",
        }
    }
}

fn unpack_error(error: io::Error) -> RootfsError {
    // tar wraps the cause; the number survives in the source.
    let mut cause: Option<&dyn std::error::Error> = Some(&error);
    while let Some(current) = cause {
        if let Some(io) = current.downcast_ref::<io::Error>()
            && io.kind() == io::ErrorKind::StorageFull
        {
            return RootfsError::DiskFull;
        }
        cause = current.source();
    }
    RootfsError::Unpack(error)
}

/// Counts what is read and stops at a bound.
struct Bounded<R> {
    inner: R,
    left: u64,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.left = self
            .left
            .checked_sub(count as u64)
            .ok_or_else(|| io::Error::new(io::ErrorKind::FileTooLarge, "larger than allowed"))?;
        Ok(count)
    }
}

fn decompressed(path: &Path) -> io::Result<Box<dyn Read>> {
    let mut file = File::open(path)?;
    let mut magic = [0; 4];
    let count = file.read(&mut magic)?;
    file.rewind()?;
    let reader = BufReader::with_capacity(1 << 20, file);
    Ok(match magic.get(..count) {
        Some([0x1f, 0x8b, ..]) => Box::new(flate2::read::MultiGzDecoder::new(reader)),
        Some([0x28, 0xb5, 0x2f, 0xfd]) => Box::new(zstd::stream::read::Decoder::new(reader)?),
        _ => Box::new(reader),
    })
}

/// Unpacks a tarball (plain, gzip or zstd) into a folder with owners, modes and extended attributes.
pub fn unpack(tarball: &Path, root: &Path, limit: u64) -> Result<u64, RootfsError> {
    let reader = Bounded {
        inner: decompressed(tarball).map_err(RootfsError::Unpack)?,
        left: limit,
    };
    let mut archive = Archive::new(reader);
    archive.set_preserve_permissions(true);
    archive.set_preserve_ownerships(true);
    archive.set_unpack_xattrs(true);
    archive.set_overwrite(true);
    let too_large = |error: io::Error| {
        if error.kind() == io::ErrorKind::FileTooLarge
            || error.to_string().contains("larger than allowed")
        {
            RootfsError::TooLarge(limit)
        } else {
            unpack_error(error)
        }
    };
    let mut entries = 0_u64;
    // Folders last, as `Archive::unpack` does: their modes might forbid writing into them.
    let mut folders = Vec::new();
    for entry in archive.entries().map_err(too_large)? {
        let mut entry = entry.map_err(too_large)?;
        match entry.header().entry_type() {
            EntryType::Char | EntryType::Block | EntryType::Fifo => continue,
            EntryType::Directory => folders.push(entry),
            _ => {
                entry.unpack_in(root).map_err(too_large)?;
            }
        }
        entries += 1;
    }
    folders.sort_by(|a, b| b.path_bytes().cmp(&a.path_bytes()));
    for mut folder in folders {
        folder.unpack_in(root).map_err(too_large)?;
    }
    for needed in ["bin", "etc", "usr"] {
        if !root.join(needed).exists() {
            return Err(RootfsError::NotARoot(needed));
        }
    }
    Ok(entries)
}

/// Packs a folder into an EROFS image (LZ4), as mkfs.erofs(1) does.
pub fn pack(root: &Path, image: &PathBuf) -> Result<(), RootfsError> {
    let output = Command::new("mkfs.erofs")
        .args(["-zlz4", "--quiet"])
        .arg(image)
        .arg(root)
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        )
        .stdin(Stdio::null())
        .output()
        .map_err(|error| RootfsError::Pack(error.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("No space left") {
        return Err(RootfsError::DiskFull);
    }
    Err(RootfsError::Pack(
        said.lines()
            .last()
            .unwrap_or("failed without a word")
            .to_owned(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tarball(entries: &[(&str, &[u8])]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut builder = tar::Builder::new(file.reopen().unwrap());
        for (path, data) in entries {
            let mut header = tar::Header::new_gnu();
            header.set_size(data.len() as u64);
            header.set_mode(0o644);
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(0);
            // Written by hand: the builder refuses the paths an attacker would use.
            header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
            header.set_cksum();
            builder.append(&header, *data).unwrap();
        }
        builder.finish().unwrap();
        file
    }

    const ROOT: [(&str, &[u8]); 3] = [("bin/sh", b"#!"), ("etc/passwd", b"root"), ("usr/x", b"y")];

    #[test]
    fn a_root_is_unpacked_and_packed() {
        let folder = tempfile::tempdir().unwrap();
        let tarball = tarball(&ROOT);
        let root = folder.path().join("root");
        std::fs::create_dir(&root).unwrap();
        assert_eq!(unpack(tarball.path(), &root, 1 << 20).unwrap(), 3);
        let image = folder.path().join("image");
        pack(&root, &image).unwrap();
        let mut magic = vec![0; 1028];
        File::open(&image).unwrap().read_exact(&mut magic).unwrap();
        assert_eq!(
            magic[1024..],
            0xe0f5_e1e2_u32.to_le_bytes(),
            "EROFS magic at 1024"
        );
    }

    #[test]
    fn nothing_leaves_the_folder_and_bombs_are_stopped() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        std::fs::create_dir(&root).unwrap();
        let evil = tarball(&[
            ("../evil", b"x"),
            ("/absolute", b"x"),
            ROOT[0],
            ROOT[1],
            ROOT[2],
        ]);
        unpack(evil.path(), &root, 1 << 20).unwrap();
        assert!(!folder.path().join("evil").exists());
        assert!(!Path::new("/absolute").exists());

        let big = vec![0; 100_000];
        let bomb = tarball(&[("bin/big", &big)]);
        assert!(matches!(
            unpack(bomb.path(), &root, 50_000),
            Err(RootfsError::TooLarge(50_000))
        ));
    }

    #[test]
    fn what_is_no_tarball_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let garbage = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(garbage.path(), vec![7; 4096]).unwrap();
        let error = unpack(garbage.path(), folder.path(), 1 << 20).unwrap_err();
        assert_eq!(error.reason(), "SOURCE_INVALID");
        let cut = tarball(&ROOT);
        cut.as_file().set_len(700).unwrap();
        assert_eq!(
            unpack(cut.path(), folder.path(), 1 << 20)
                .unwrap_err()
                .reason(),
            "SOURCE_INVALID"
        );
    }
}
