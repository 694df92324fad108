//! A guest that stands still, as files: what a pause leaves, what a checkpoint keeps, what a template's snapshot is.
//!
//! A folder of them is made under another name, synced and then renamed, so that it is there whole or not at all. It says what made
//! it; nothing else loads it.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt as _,
    path::Path,
};

use serde::{Deserialize, Serialize};

use crate::vmm::{DEVICES, MEMORY_DIFFERENCE, memory};

/// The writable disk.
pub const SCRATCH: &str = "scratch.ext4";
const ABOUT: &str = "about.json";
const FORMAT: u32 = 1;

/// Stored state is of no use here.
#[derive(Debug, thiserror::Error)]
pub enum StoredError {
    /// Reading or writing failed.
    #[error("stored state: {0}")]
    Io(#[from] io::Error),
    /// Something is missing, cut or changed.
    #[error("the stored state is damaged: {0}")]
    Damaged(String),
    /// It was made by another VMM or on another CPU.
    #[error("the stored state was made by {made_by}, which {here} cannot load")]
    Incompatible {
        /// What made it.
        made_by: String,
        /// What is here.
        here: String,
    },
}

/// What state of guests depends on: it is loaded by the same only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Maker {
    /// The VMM, its version and how it runs guests.
    pub vmm: String,
    /// The CPU.
    pub cpu: String,
}

impl std::fmt::Display for Maker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} on {}", self.vmm, self.cpu)
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct About {
    format: u32,
    maker: Maker,
    devices_blake3: String,
    scratch_bytes: Option<u64>,
}

fn hash(path: &Path) -> io::Result<String> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(path)?)?;
    Ok(hasher.finalize().to_hex().to_string())
}

fn length(path: &Path) -> io::Result<Option<u64>> {
    match fs::metadata(path) {
        Ok(metadata) => Ok(Some(metadata.len())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Writes what the folder `made` is about, syncs all of it, and gives it the name `to`. Blocking.
pub fn publish(made: &Path, to: &Path, maker: &Maker) -> Result<(), StoredError> {
    let about = About {
        format: FORMAT,
        maker: maker.clone(),
        devices_blake3: hash(&made.join(DEVICES))?,
        scratch_bytes: length(&made.join(SCRATCH))?,
    };
    fs::write(
        made.join(ABOUT),
        serde_json::to_vec(&about).map_err(io::Error::other)?,
    )?;
    for entry in fs::read_dir(made)? {
        File::open(entry?.path())?.sync_all()?;
    }
    File::open(made)?.sync_all()?;
    fs::rename(made, to)?;
    if let Some(parent) = to.parent() {
        File::open(parent)?.sync_all()?;
    }
    Ok(())
}

fn about(folder: &Path) -> Option<About> {
    serde_json::from_slice(&fs::read(folder.join(ABOUT)).ok()?).ok()
}

/// Whether it says that it was made by this. Blocking.
pub fn is_made_by(folder: &Path, maker: &Maker) -> bool {
    about(folder).is_some_and(|about| about.format == FORMAT && &about.maker == maker)
}

/// Whether the folder can be loaded here, as far as can be told without reading its memory. Blocking.
pub fn check(folder: &Path, here: &Maker) -> Result<(), StoredError> {
    let damaged = |what: &str| StoredError::Damaged(what.to_owned());
    let about = about(folder).ok_or_else(|| damaged("it does not say what it is"))?;
    if about.format != FORMAT || &about.maker != here {
        return Err(StoredError::Incompatible {
            made_by: about.maker.to_string(),
            here: here.to_string(),
        });
    }
    if hash(&folder.join(DEVICES)).ok().as_ref() != Some(&about.devices_blake3) {
        return Err(damaged("its devices are missing or changed"));
    }
    if length(&folder.join(SCRATCH))? != about.scratch_bytes {
        return Err(damaged("its disk is missing or cut"));
    }
    Ok(())
}

/// Whether the folder can be loaded here, its memory read whole. Blocking.
pub fn check_all(folder: &Path, here: &Maker) -> Result<(), StoredError> {
    check(folder, here)?;
    memory::verify(&folder.join(MEMORY_DIFFERENCE))
        .map_err(|error| StoredError::Damaged(error.to_string()))
}

/// Bytes the folder takes on the disk. Blocking.
pub fn bytes(folder: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(folder)? {
        bytes += entry?.metadata()?.blocks() * 512;
    }
    Ok(bytes)
}

/// Removes a folder that may not be there. Blocking.
pub fn remove(folder: &Path) -> io::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn maker(version: &str) -> Maker {
        Maker {
            vmm: version.into(),
            cpu: "cpu".into(),
        }
    }

    #[test]
    fn it_is_there_whole_or_not_at_all_and_damage_is_told() {
        let root = tempfile::tempdir().unwrap();
        let (made, to) = (root.path().join(".made"), root.path().join("paused"));
        fs::create_dir(&made).unwrap();
        assert!(
            publish(&made, &to, &maker("1")).is_err(),
            "devices are missing"
        );
        assert!(!to.exists());
        fs::write(made.join(DEVICES), b"devices").unwrap();
        fs::write(made.join(SCRATCH), b"disk").unwrap();
        publish(&made, &to, &maker("1")).unwrap();
        check(&to, &maker("1")).unwrap();
        assert!(matches!(
            check(&to, &maker("2")),
            Err(StoredError::Incompatible { .. })
        ));
        fs::write(to.join(SCRATCH), b"dis").unwrap();
        assert!(matches!(
            check(&to, &maker("1")),
            Err(StoredError::Damaged(_))
        ));
        fs::write(to.join(SCRATCH), b"disk").unwrap();
        check(&to, &maker("1")).unwrap();
        fs::write(to.join(DEVICES), b"devicez").unwrap();
        assert!(matches!(
            check(&to, &maker("1")),
            Err(StoredError::Damaged(_))
        ));
        fs::write(to.join(ABOUT), b"{").unwrap();
        assert!(matches!(
            check(&to, &maker("1")),
            Err(StoredError::Damaged(_))
        ));
        remove(&to).unwrap();
        remove(&to).unwrap();
    }
}
