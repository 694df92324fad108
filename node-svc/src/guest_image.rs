//! The initial RAM disk of guests: the kernel's modules, then envd as `/init`.
//!
//! envd comes from the node, not from the template, so a new envd reaches every template. The kernel unpacks concatenated cpio
//! archives one after the other (Documentation/driver-api/early-userspace/buffer-format.rst), so nothing is repacked.

use std::{
    fs, io,
    io::Write as _,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

/// Of a digest, in names.
const DIGITS: usize = 16;
const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;
/// /dev/console, so that init has a stdout before it mounts devtmpfs: Documentation/admin-guide/devices.txt.
const CONSOLE: (u32, u32) = (5, 1);

/// Makes initial RAM disks from one envd.
#[derive(Debug)]
pub struct GuestImages {
    folder: PathBuf,
    envd: Vec<u8>,
    envd_digest: String,
}

impl GuestImages {
    /// Reads envd once; a new one is taken at the next start of node-svc.
    pub fn open(folder: PathBuf, envd: &Path) -> io::Result<Self> {
        fs::create_dir_all(&folder)?;
        let envd = fs::read(envd)?;
        let mut envd_digest = blake3::hash(&envd).to_hex().to_string();
        envd_digest.truncate(DIGITS);
        Ok(Self {
            folder,
            envd,
            envd_digest,
        })
    }

    /// Names the envd that is in the images: the first digits of its digest.
    pub fn envd(&self) -> &str {
        &self.envd_digest
    }

    /// The image for these modules; made the first time. Blocking.
    pub fn initrd(&self, modules: &Path) -> io::Result<PathBuf> {
        let name = modules
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default();
        let path = self.folder.join(format!(
            "initrd-{}-{}",
            name.get(..DIGITS).unwrap_or(&name),
            self.envd_digest
        ));
        if path.exists() {
            return Ok(path);
        }
        let mut file = tempfile::Builder::new()
            .prefix(".incoming-")
            .tempfile_in(&self.folder)?;
        io::copy(&mut fs::File::open(modules)?, file.as_file_mut())?;
        file.write_all(&init_archive(&self.envd))?;
        file.as_file().sync_all()?;
        // Readable for a VMM of any user.
        fs::set_permissions(file.path(), fs::Permissions::from_mode(0o444))?;
        file.persist(&path).map_err(|error| error.error)?;
        Ok(path)
    }
}

fn init_archive(envd: &[u8]) -> Vec<u8> {
    let mut archive = Vec::with_capacity(envd.len() + 1024);
    put(&mut archive, "dev", DIRECTORY, (0, 0), &[]);
    put(&mut archive, "dev/console", CHARACTER_DEVICE, CONSOLE, &[]);
    put(&mut archive, "init", PROGRAM, (0, 0), envd);
    put(&mut archive, "TRAILER!!!", 0, (0, 0), &[]);
    archive
}

/// Appends one entry of a newc archive.
fn put(archive: &mut Vec<u8>, name: &str, mode: u32, device: (u32, u32), data: &[u8]) {
    let inode = u32::try_from(archive.len()).unwrap_or_default() + 1;
    let size = u32::try_from(data.len()).unwrap_or(u32::MAX);
    let fields = [
        inode,
        mode,
        0,
        0,
        1,
        0,
        size,
        0,
        0,
        device.0,
        device.1,
        name.len() as u32 + 1,
        0,
    ];
    archive.extend_from_slice(b"070701");
    for field in fields {
        archive.extend_from_slice(format!("{field:08X}").as_bytes());
    }
    archive.extend_from_slice(name.as_bytes());
    archive.push(0);
    pad(archive);
    archive.extend_from_slice(data);
    pad(archive);
}

fn pad(archive: &mut Vec<u8>) {
    archive.resize(archive.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_modules_then_init_and_made_once() {
        let folder = tempfile::tempdir().unwrap();
        let (envd, modules) = (
            folder.path().join("envd"),
            folder.path().join("0123456789abcdef01"),
        );
        fs::write(&envd, b"\x7fELF not really").unwrap();
        fs::write(&modules, b"070701modules").unwrap();
        let images = GuestImages::open(folder.path().join("images"), &envd).unwrap();
        let path = images.initrd(&modules).unwrap();
        let bytes = fs::read(&path).unwrap();
        assert!(bytes.starts_with(b"070701modules"));
        assert_eq!((bytes.len() - b"070701modules".len()) % 4, 0);
        let init = bytes
            .windows(5)
            .position(|window| window == b"init\0")
            .unwrap();
        assert!(
            bytes[init..]
                .windows(13)
                .any(|window| window == b"\x7fELF not real")
        );
        fs::write(&modules, b"changed").unwrap();
        assert_eq!(fs::read(images.initrd(&modules).unwrap()).unwrap(), bytes);
    }
}
