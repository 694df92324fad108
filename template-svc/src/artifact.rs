//! Files named by what they hold: root filesystems, kernels, modules, and uploads on their way to become one.
//!
//! A file appears under its digest whole or not at all: it is written under another name, synced, then renamed.

use std::{
    collections::HashSet,
    ffi::OsStr,
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use proto::template::v1::Artifact;

/// Begins the names of files that are being written.
const UNFINISHED: &str = ".incoming-";
const COPY_BUFFER: usize = 1 << 20;
/// What a file takes of a disk, however small it is: ext4 has an inode for so many bytes (mke2fs.conf(5), `inode_ratio`).
pub const LEAST_TAKEN: u64 = 16 << 10;

/// A folder of artifacts.
#[derive(Debug, Clone)]
pub struct Artifacts {
    folder: PathBuf,
}

/// A BLAKE3 digest as 64 hexadecimal characters: safe as a file name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArtifactDigest(String);

/// Whether it is a digest of 256 bits as text: 64 lower-case hexadecimal characters.
pub(crate) fn is_digest(text: &str) -> bool {
    text.len() == 64
        && text
            .bytes()
            .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

impl ArtifactDigest {
    /// Accepts 64 lower-case hexadecimal characters.
    pub fn parse(text: &str) -> Option<Self> {
        is_digest(text).then(|| Self(text.to_owned()))
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// An artifact being written.
#[derive(Debug)]
pub struct Incoming {
    folder: PathBuf,
    file: tempfile::NamedTempFile,
    hasher: blake3::Hasher,
    size: u64,
}

impl Artifacts {
    /// Makes the folder if it is missing.
    pub fn open(folder: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&folder)?;
        Ok(Self { folder })
    }

    /// Begins a new artifact.
    pub fn begin(&self) -> io::Result<Incoming> {
        let file = tempfile::Builder::new()
            .prefix(UNFINISHED)
            .tempfile_in(&self.folder)?;
        Ok(Incoming {
            folder: self.folder.clone(),
            file,
            hasher: blake3::Hasher::new(),
            size: 0,
        })
    }

    /// Copies a file in.
    pub fn ingest(&self, path: &Path) -> io::Result<Artifact> {
        self.ingest_from(File::open(path)?)
    }

    /// Has a file of another folder under its digest here, too: by another name for it, or as a copy if it lies on another disk.
    pub fn share(&self, path: &Path, digest: &ArtifactDigest) -> io::Result<Artifact> {
        match fs::hard_link(path, self.folder.join(digest.as_str())) {
            Ok(()) => File::open(&self.folder)?.sync_all()?,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {
                return self.ingest(path);
            }
            Err(error) => return Err(error),
        }
        Ok(Artifact {
            digest: digest.as_str().to_owned(),
            size_bytes: fs::metadata(path)?.len(),
        })
    }

    /// Copies in what is read.
    pub fn ingest_from(&self, mut source: impl Read) -> io::Result<Artifact> {
        let mut incoming = self.begin()?;
        let mut buffer = vec![0; COPY_BUFFER];
        loop {
            let count = source.read(&mut buffer)?;
            if count == 0 {
                return incoming.finish();
            }
            incoming.write_all(buffer.get(..count).unwrap_or_default())?;
        }
    }

    /// Where an artifact is, if it is here.
    pub fn find(&self, digest: &ArtifactDigest) -> Option<PathBuf> {
        let path = self.folder.join(digest.as_str());
        path.is_file().then_some(path)
    }

    /// Makes an artifact as young as if it had been made then; whether it is here.
    pub fn touch(&self, digest: &ArtifactDigest, time: SystemTime) -> io::Result<bool> {
        let file = match File::open(self.folder.join(digest.as_str())) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            file => file?,
        };
        file.set_modified(time)?;
        Ok(true)
    }

    /// Removes one, if it is here.
    pub fn remove_one(&self, digest: &ArtifactDigest) -> io::Result<()> {
        match fs::remove_file(self.folder.join(digest.as_str())) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed,
        }
    }

    /// Bytes of the files here, half-written ones, too; a small one takes [`LEAST_TAKEN`].
    pub fn taken(&self) -> io::Result<u64> {
        let mut taken = 0;
        for entry in fs::read_dir(&self.folder)? {
            match entry?.metadata() {
                Ok(metadata) => taken += metadata.len().max(LEAST_TAKEN),
                // Removed, or finished under its name, meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(taken)
    }

    /// Removes uploads and half-written files older than `age`.
    pub fn sweep(&self, age: Duration) -> io::Result<()> {
        self.remove(age, |_| true).map(drop)
    }

    /// Removes half-written files older than `age`, whose writer was killed.
    pub fn sweep_unfinished(&self, age: Duration) -> io::Result<()> {
        self.remove(age, |name| {
            name.as_encoded_bytes().starts_with(UNFINISHED.as_bytes())
        })
        .map(drop)
    }

    /// Removes files that nobody wants, by their digests, and that are older than `age`; how many.
    pub fn sweep_unwanted(&self, wanted: &HashSet<String>, age: Duration) -> io::Result<u64> {
        self.remove(age, |name| {
            let name = name.to_str().unwrap_or_default();
            is_digest(name) && !wanted.contains(name)
        })
    }

    fn remove(&self, age: Duration, is_meant: impl Fn(&OsStr) -> bool) -> io::Result<u64> {
        let mut count = 0;
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            if !is_meant(&entry.file_name()) {
                continue;
            }
            let is_old = entry.metadata().and_then(|metadata| {
                let elapsed = metadata.modified()?.elapsed();
                Ok(elapsed.is_ok_and(|elapsed| elapsed > age))
            });
            let removed = match is_old {
                Ok(true) => fs::remove_file(entry.path()).map(|()| true),
                other => other,
            };
            match removed {
                // Another replica, or whoever wrote it, was faster.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                removed => count += u64::from(removed?),
            }
        }
        Ok(count)
    }
}

impl Write for Incoming {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.file.write(bytes)?;
        self.hasher.update(bytes.get(..count).unwrap_or_default());
        self.size += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Incoming {
    /// Bytes so far.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Makes it appear under that digest, if that is its own. After a crash of the host it may be there without its bytes.
    pub fn finish_unsynced(self, digest: &ArtifactDigest) -> io::Result<bool> {
        let is_it = self.hasher.finalize().to_hex().as_str() == digest.as_str();
        if is_it {
            let persisted = self.file.persist(self.folder.join(digest.as_str()));
            persisted.map_err(|error| error.error)?;
        }
        Ok(is_it)
    }

    /// Makes it appear under its digest.
    pub fn finish(self) -> io::Result<Artifact> {
        let digest = self.hasher.finalize().to_hex().to_string();
        self.file.as_file().sync_all()?;
        self.file
            .persist(self.folder.join(&digest))
            .map_err(|error| error.error)?;
        // The name must survive a crash as well as the bytes.
        File::open(&self.folder)?.sync_all()?;
        Ok(Artifact {
            digest,
            size_bytes: self.size,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_artifact_appears_whole_under_its_digest() {
        let folder = tempfile::tempdir().unwrap();
        let artifacts = Artifacts::open(folder.path().into()).unwrap();
        let mut incoming = artifacts.begin().unwrap();
        incoming.write_all(b"hello ").unwrap();
        incoming.write_all(b"world").unwrap();
        let artifact = incoming.finish().unwrap();
        assert_eq!(
            artifact.digest,
            blake3::hash(b"hello world").to_hex().to_string()
        );
        let path = artifacts
            .find(&ArtifactDigest::parse(&artifact.digest).unwrap())
            .unwrap();
        assert_eq!(fs::read(path).unwrap(), b"hello world");

        drop(artifacts.begin().unwrap());
        assert_eq!(
            fs::read_dir(folder.path()).unwrap().count(),
            1,
            "a given-up upload leaves nothing"
        );
    }

    #[test]
    fn only_digests_are_file_names() {
        for text in [
            "",
            "../../etc/passwd",
            &"A".repeat(64),
            &"g".repeat(64),
            &"a".repeat(63),
        ] {
            assert_eq!(ArtifactDigest::parse(text), None);
        }
    }
}
