//! What a node has to know of a session after it died itself: written before the effect, checksummed, synced.
//!
//! For now it serves reaping: the next node-svc on this folder ends what the last one left. Adoption will read the same file.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::Path,
};

use serde::{Deserialize, Serialize};

use crate::{slot::SlotIndex, vmm::process::ProcessId};

const FILE: &str = "journal.json";

/// What was begun for a session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Entry {
    /// Which session.
    pub session_id: String,
    /// Its network slot.
    pub slot: Option<SlotIndex>,
    /// Its VMM.
    pub process: Option<ProcessId>,
}

#[derive(Serialize, Deserialize)]
struct Sealed {
    entry: Entry,
    checksum: String,
}

fn checksum(entry: &Entry) -> io::Result<String> {
    Ok(blake3::hash(&serde_json::to_vec(entry)?)
        .to_hex()
        .to_string())
}

/// Writes an entry to a session's folder: whole, or the one before stays.
pub fn write(folder: &Path, entry: &Entry) -> io::Result<()> {
    let sealed = Sealed {
        checksum: checksum(entry)?,
        entry: entry.clone(),
    };
    let mut file = tempfile::Builder::new()
        .prefix(".journal-")
        .tempfile_in(folder)?;
    file.write_all(&serde_json::to_vec(&sealed)?)?;
    file.as_file().sync_data()?;
    file.persist(folder.join(FILE))
        .map_err(|error| error.error)?;
    File::open(folder)?.sync_all()
}

/// Reads a session's entry; `None` if there is none that can be trusted.
pub fn read(folder: &Path) -> Option<Entry> {
    let sealed: Sealed = serde_json::from_slice(&fs::read(folder.join(FILE)).ok()?).ok()?;
    (checksum(&sealed.entry).ok()? == sealed.checksum).then_some(sealed.entry)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_survives_and_a_damaged_one_is_not_believed() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(read(folder.path()), None);
        let entry = Entry {
            session_id: "a".into(),
            slot: None,
            process: Some(ProcessId {
                pid: 7,
                start_ticks: 9,
            }),
        };
        write(folder.path(), &entry).unwrap();
        assert_eq!(read(folder.path()), Some(entry));
        let path = folder.path().join(FILE);
        let damaged = fs::read_to_string(&path)
            .unwrap()
            .replace("\"pid\":7", "\"pid\":8");
        fs::write(&path, damaged).unwrap();
        assert_eq!(read(folder.path()), None);
        fs::write(&path, b"{\"half").unwrap();
        assert_eq!(read(folder.path()), None);
    }
}
