//! What clients have uploaded to build from: tarballs, kernels, and files of build contexts.

use std::{
    fs,
    io::{self, Write as _},
    path::PathBuf,
    time::Duration,
};

use service_kit::ids::TeamId;

use crate::artifact::{ArtifactDigest, Artifacts, Incoming, LEAST_TAKEN};

/// Uploads, each team's apart: whether a file is here says something of whoever has uploaded it.
#[derive(Debug, Clone)]
pub struct Uploads {
    folder: PathBuf,
    largest: u64,
    most: u64,
}

/// An upload is not taken.
#[derive(Debug, thiserror::Error)]
pub enum UploadError {
    /// It alone is more than one may be.
    #[error("a source is at most {0} bytes")]
    TooLarge(u64),
    /// The team has uploaded too much in the last day.
    #[error(
        "what the team has uploaded in the last day and this are more than the {0} bytes there may be; try again when some of it is a day old"
    )]
    NoRoom(u64),
    /// The disk of template-svc.
    #[error(transparent)]
    Disk(#[from] io::Error),
}

/// How much more of an upload is taken.
#[derive(Debug)]
pub struct Room {
    taken: u64,
    of_file: u64,
    largest: u64,
    left: u64,
    most: u64,
}

impl Uploads {
    /// Makes the folder if it is missing. One upload has `largest` bytes at most, all of a team `most`.
    pub fn open(folder: PathBuf, largest: u64, most: u64) -> io::Result<Self> {
        fs::create_dir_all(&folder)?;
        Ok(Self {
            folder,
            largest,
            most,
        })
    }

    /// Those of a team.
    pub fn of(&self, team: &TeamId) -> io::Result<Artifacts> {
        Artifacts::open(self.folder.join(team.as_str()))
    }

    /// A file that a team has uploaded in the last day.
    pub fn find(&self, team: &TeamId, digest: &str) -> io::Result<Option<PathBuf>> {
        let digest = ArtifactDigest::parse(digest);
        let files = self.of(team)?;
        Ok(digest.and_then(|digest| files.find(&digest)))
    }

    /// How much a team may upload now. Those that do so at once may together come to more, by what each has uploaded until the other began. Blocking.
    pub fn room(&self, team: &TeamId) -> Result<Room, UploadError> {
        let left = self.most.saturating_sub(self.of(team)?.taken()?);
        if left == 0 {
            return Err(UploadError::NoRoom(self.most));
        }
        Ok(Room {
            taken: 0,
            of_file: 0,
            largest: self.largest,
            left,
            most: self.most,
        })
    }

    /// Removes files that nobody has uploaded or asked for since `age`.
    pub fn sweep(&self, age: Duration) -> io::Result<()> {
        let mut swept = Ok(());
        for team in fs::read_dir(&self.folder)? {
            let path = team?.path();
            // What is wrong with one team's is no matter of others'.
            let one = if path.is_dir() {
                Artifacts::open(path).and_then(|files| files.sweep(age))
            } else {
                // Of before they were each team's: nobody looks here. Another replica may be faster.
                match fs::remove_file(path) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                    removed => removed,
                }
            };
            swept = swept.and(one);
        }
        swept
    }
}

impl Room {
    /// Of a file of an upload.
    pub fn begin(&mut self, files: &Artifacts) -> Result<Incoming, UploadError> {
        self.of_file = 0;
        self.take(LEAST_TAKEN)?;
        Ok(files.begin()?)
    }

    /// A part of it. Page-cache writes of at most 1 MiB: not worth a thread.
    pub fn write(&mut self, incoming: &mut Incoming, data: &[u8]) -> Result<(), UploadError> {
        let before = self.of_file.max(LEAST_TAKEN);
        self.of_file += data.len() as u64;
        self.take(self.of_file.max(LEAST_TAKEN) - before)?;
        Ok(incoming.write_all(data)?)
    }

    fn take(&mut self, bytes: u64) -> Result<(), UploadError> {
        self.taken += bytes;
        if self.taken > self.largest {
            return Err(UploadError::TooLarge(self.largest));
        }
        if self.taken > self.left {
            return Err(UploadError::NoRoom(self.most));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1 << 10;

    fn upload(uploads: &Uploads, team: &TeamId, bytes: u64) -> Result<(), UploadError> {
        let files = uploads.of(team)?;
        let mut room = uploads.room(team)?;
        let mut incoming = room.begin(&files)?;
        let data = vec![u8::try_from(bytes % 251).unwrap(); usize::try_from(bytes).unwrap()];
        for part in data.chunks(4 << 10) {
            room.write(&mut incoming, part)?;
        }
        incoming.finish()?;
        Ok(())
    }

    #[test]
    fn a_team_has_room_of_its_own_and_uploads_go_with_time() {
        let folder = tempfile::tempdir().unwrap();
        let uploads = Uploads::open(folder.path().into(), 64 * KIB, 128 * KIB).unwrap();
        let [one, other] = ["one", "other"].map(|team| TeamId::parse(team).unwrap());
        let large = upload(&uploads, &one, 65 * KIB);
        assert!(matches!(large, Err(UploadError::TooLarge(most)) if most == 64 * KIB));
        upload(&uploads, &one, 64 * KIB).unwrap();
        // What was refused, and what was given up, takes none.
        upload(&uploads, &one, 40 * KIB).unwrap();
        let more = upload(&uploads, &one, 40 * KIB + 1);
        assert!(matches!(more, Err(UploadError::NoRoom(most)) if most == 128 * KIB));
        upload(&uploads, &other, 64 * KIB).unwrap();
        uploads.sweep(Duration::ZERO).unwrap();
        upload(&uploads, &one, 64 * KIB).unwrap();
    }

    /// A hundred thousand empty files take a disk, too.
    #[test]
    fn small_files_take_more_than_they_have() {
        let folder = tempfile::tempdir().unwrap();
        let uploads = Uploads::open(folder.path().into(), 64 * KIB, 128 * KIB).unwrap();
        let team = TeamId::parse("one").unwrap();
        let files = uploads.of(&team).unwrap();
        let mut room = uploads.room(&team).unwrap();
        let begun = (0..32).take_while(|_| room.begin(&files).is_ok()).count();
        assert_eq!(begun, 4);
        let mut room = uploads.room(&team).unwrap();
        let mut incoming = room.begin(&files).unwrap();
        room.write(&mut incoming, &[0; 1 << 10]).unwrap();
        incoming.finish().unwrap();
        assert_eq!(files.taken().unwrap(), LEAST_TAKEN);
    }
}
