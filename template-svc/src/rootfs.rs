//! From a root filesystem to the read-only image sandboxes share. Blocking; run it on a thread of its own.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use tokio_util::sync::CancellationToken;

use crate::layer::{Applied, LayerError, Limits, Root, Whiteouts};

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// When all images were made, in seconds since 1970: files that are newer would get this time.
const MADE: &str = "4102444800";

/// What makes no image.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    /// The tarball.
    #[error("the tarball cannot be unpacked: {0}")]
    Unpack(#[from] LayerError),
    /// It has no files a Linux system needs.
    #[error("it holds no root filesystem: {0} is missing")]
    NotARoot(&'static str),
    /// The disk is full.
    #[error("the disk of template-svc is full")]
    DiskFull,
    /// Its disk fails.
    #[error("the disk of template-svc: {0}")]
    Disk(#[from] std::io::Error),
    /// mkfs.erofs failed.
    #[error("mkfs.erofs: {0}")]
    Pack(String),
}

impl RootfsError {
    /// The stable word of a build's failure.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Unpack(
                LayerError::Entry { .. } | LayerError::Make { .. } | LayerError::Compression(_),
            )
            | Self::NotARoot(_) => "SOURCE_INVALID",
            Self::Unpack(error) => error.reason(),
            Self::DiskFull => "DISK_FULL",
            Self::Disk(_) => "BUILD_FAILED",
            Self::Pack(_) => "PACK_FAILED",
        }
    }
}

/// Unpacks a tarball (plain, gzip or zstd) of a whole root into an empty folder.
pub fn unpack(
    tarball: &Path,
    folder: &Path,
    limits: Limits,
    cancel: &CancellationToken,
) -> Result<Applied, RootfsError> {
    let mut root = Root::new(folder.to_owned(), limits);
    let applied = root.apply(File::open(tarball)?, Whiteouts::Keep, cancel)?;
    root.finish()?;
    check(folder)?;
    Ok(applied)
}

/// Whether a Linux system may be in it.
pub fn check(folder: &Path) -> Result<(), RootfsError> {
    for needed in ["bin", "etc", "usr"] {
        if folder.join(needed).symlink_metadata().is_err() {
            return Err(RootfsError::NotARoot(needed));
        }
    }
    Ok(())
}

/// Packs a folder into an EROFS image (LZ4), as mkfs.erofs(1) does.
pub fn pack(root: &Path, image: &PathBuf) -> Result<(), RootfsError> {
    let output = Command::new("mkfs.erofs")
        // Neither who made it nor when: the same files are the same image.
        .args([
            "-zlz4",
            "--quiet",
            "-U",
            "00000000-0000-0000-0000-000000000000",
        ])
        .arg(image)
        .arg(root)
        .env("PATH", PATH)
        .env("SOURCE_DATE_EPOCH", MADE)
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
    use std::io::Read as _;

    use super::*;

    const LIMITS: Limits = Limits {
        bytes: 1 << 20,
        entries: 100,
    };

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
            builder.append_data(&mut header, path, *data).unwrap();
        }
        builder.finish().unwrap();
        file
    }

    const ROOT: [(&str, &[u8]); 3] = [("bin/sh", b"#!"), ("etc/passwd", b"root"), ("usr/x", b"y")];

    #[test]
    fn a_root_is_unpacked_and_packed_the_same_each_time() {
        let folder = tempfile::tempdir().unwrap();
        let tarball = tarball(&ROOT);
        let mut images = Vec::new();
        for name in ["a", "b"] {
            let root = folder.path().join(name);
            std::fs::create_dir(&root).unwrap();
            let cancel = CancellationToken::new();
            let applied = unpack(tarball.path(), &root, LIMITS, &cancel).unwrap();
            assert_eq!(applied.entries, 3);
            let image = folder.path().join(format!("{name}.erofs"));
            pack(&root, &image).unwrap();
            let mut bytes = Vec::new();
            File::open(&image).unwrap().read_to_end(&mut bytes).unwrap();
            assert_eq!(
                bytes[1024..1028],
                0xe0f5_e1e2_u32.to_le_bytes(),
                "EROFS magic at 1024"
            );
            images.push(bytes);
        }
        assert!(images[0] == images[1]);
    }

    #[test]
    fn what_is_no_root_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let tarball = tarball(&ROOT[..2]);
        let cancel = CancellationToken::new();
        let error = unpack(tarball.path(), folder.path(), LIMITS, &cancel).unwrap_err();
        assert_eq!(error.reason(), "SOURCE_INVALID");
        let small = Limits {
            bytes: 1024,
            ..LIMITS
        };
        let error = unpack(tarball.path(), folder.path(), small, &cancel).unwrap_err();
        assert_eq!(error.reason(), "SOURCE_TOO_LARGE");
    }
}
