//! What a node has to know of a session after it died itself: written before the effect, checksummed, synced.
//!
//! Two files in the session's folder: the request it was started with, which changes only with its settings, and the journal proper,
//! which says how far it is. The next node-svc on this state folder reads both and goes on, or ends what cannot go on.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::Path,
};

use prost::Message as _;
use proto::node::v1::StartSessionRequest;
use serde::{Deserialize, Serialize};

use crate::{slot::SlotIndex, vmm::process::ProcessId};

const FILE: &str = "journal.json";
const REQUEST: &str = "request.pb";
const HASH: usize = 32;

/// How far a session is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Being started: of no use to anybody yet.
    #[default]
    Starting,
    /// Its guest runs, or stands still for a moment.
    Running,
    /// All of it is in its folder of stored state; whatever else there may be of it is to be ended.
    Paused,
}

/// What was begun for a session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Entry {
    /// Which session.
    pub session_id: String,
    /// How far it is.
    pub step: Step,
    /// Its network slot.
    pub slot: Option<SlotIndex>,
    /// Its VMM.
    pub process: Option<ProcessId>,
    /// What its guest's /etc/machine-id says, in hexadecimal; the same for as long as it lives.
    pub machine_id: String,
    /// Which envd its guest has; empty if that was not noted.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub envd: String,
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

/// Whose death what is written has to survive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// node-svc's: it is in the kernel's hands. A session that starts does not survive more than that anyway.
    Process,
    /// The host's: it is on the disk.
    Host,
}

/// Writes an entry to a session's folder: whole, or the one before stays. Blocking.
pub fn write(folder: &Path, entry: &Entry) -> io::Result<()> {
    let durability = match entry.step {
        Step::Starting => Durability::Process,
        Step::Running | Step::Paused => Durability::Host,
    };
    let sealed = Sealed {
        checksum: checksum(entry)?,
        entry: entry.clone(),
    };
    put(folder, FILE, &serde_json::to_vec(&sealed)?, durability)
}

/// Reads a session's entry; `None` if there is none that can be trusted.
pub fn read(folder: &Path) -> Option<Entry> {
    let sealed: Sealed = serde_json::from_slice(&fs::read(folder.join(FILE)).ok()?).ok()?;
    (checksum(&sealed.entry).ok()? == sealed.checksum).then_some(sealed.entry)
}

/// Writes what a session was started with, as its settings are now. Blocking.
pub fn write_request(
    folder: &Path,
    request: &StartSessionRequest,
    durability: Durability,
) -> io::Result<()> {
    let mut bytes = request.encode_to_vec();
    let hash = blake3::hash(&bytes);
    bytes.extend_from_slice(hash.as_bytes());
    put(folder, REQUEST, &bytes, durability)
}

/// Reads what a session was started with; `None` if that cannot be trusted.
pub fn read_request(folder: &Path) -> Option<StartSessionRequest> {
    let bytes = fs::read(folder.join(REQUEST)).ok()?;
    let (request, hash) = bytes.split_at_checked(bytes.len().checked_sub(HASH)?)?;
    (blake3::hash(request).as_bytes().as_slice() == hash)
        .then(|| StartSessionRequest::decode(request).ok())
        .flatten()
}

fn put(folder: &Path, name: &str, bytes: &[u8], durability: Durability) -> io::Result<()> {
    // Mode 0600: a request has its session's environment.
    let mut file = tempfile::Builder::new()
        .prefix(".journal-")
        .tempfile_in(folder)?;
    file.write_all(bytes)?;
    let is_synced = durability == Durability::Host;
    if is_synced {
        file.as_file().sync_data()?;
    }
    file.persist(folder.join(name))
        .map_err(|error| error.error)?;
    if is_synced {
        File::open(folder)?.sync_all()?;
    }
    Ok(())
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
            step: Step::Running,
            slot: None,
            process: Some(ProcessId {
                pid: 7,
                start_ticks: 9,
            }),
            machine_id: "ab".repeat(16),
            envd: "0123".into(),
        };
        write(folder.path(), &entry).unwrap();
        assert_eq!(read(folder.path()), Some(entry));
        let path = folder.path().join(FILE);
        // One of before envd was noted.
        let entry =
            r#"{"session_id":"a","step":"running","slot":null,"process":null,"machine_id":"ab"}"#;
        let checksum = blake3::hash(entry.as_bytes()).to_hex();
        let sealed = format!(r#"{{"entry":{entry},"checksum":"{checksum}"}}"#);
        let noted = fs::read(&path).unwrap();
        fs::write(&path, sealed).unwrap();
        assert_eq!(read(folder.path()).unwrap().envd, "");
        fs::write(&path, noted).unwrap();
        let damaged = fs::read_to_string(&path)
            .unwrap()
            .replace("\"pid\":7", "\"pid\":8");
        fs::write(&path, damaged).unwrap();
        assert_eq!(read(folder.path()), None);
        fs::write(&path, b"{\"half").unwrap();
        assert_eq!(read(folder.path()), None);
    }

    #[test]
    fn a_request_survives_and_a_damaged_one_is_not_believed() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(read_request(folder.path()), None);
        let request = StartSessionRequest {
            session_id: "a".into(),
            ..StartSessionRequest::default()
        };
        write_request(folder.path(), &request, Durability::Host).unwrap();
        assert_eq!(read_request(folder.path()), Some(request));
        let path = folder.path().join(REQUEST);
        let good = fs::read(&path).unwrap();
        for length in 0..good.len() {
            fs::write(&path, &good[..length]).unwrap();
            assert_eq!(read_request(folder.path()), None, "cut to {length}");
        }
    }
}
