//! Bundles: files that belong together, under a name that says what they are of and not what they hold, as a guest's memory, devices and disk.
//!
//! ```text
//!   snapshots/<group>/<key>   of which files, and of which chunks each is
//! ```
//! A bundle is there once its list is. Nothing in its name says what it holds, so whoever may write to the store decides what others find in it; its chunks and
//! files are checked against its list.

use std::{
    fmt,
    fs::File,
    time::{Duration, SystemTime},
};

use futures::TryStreamExt as _;
use object_store::{ObjectMeta, ObjectStoreExt as _, PutPayload, path::Path as Key};
use prost::Message as _;

use crate::{Before, BlobError, Blobs, Cut, LARGEST_LIST, List, Moved};

pub(crate) const FOLDER: &str = "snapshots";
/// One that was of no use for so long is not wanted any more.
pub const UNUSED: Duration = Duration::from_hours(7 * 24);
/// A bundle that is of use is noted to be so no more often.
const NOTED: Duration = Duration::from_hours(24);
/// Of a group, when all of them are looked at.
const MOST_OF_GROUP: usize = 100;
const MOST_PARTS: usize = 16;
const LONGEST_NAME: usize = 64;

/// A bundle's name.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct BundleName {
    group: String,
    key: String,
}

impl BundleName {
    /// Both are hexadecimal characters, at most 64. What is made of the file that the group names goes with that file.
    pub fn new(group: &str, key: &str) -> Option<Self> {
        let is_name = |text: &str| {
            (1..=LONGEST_NAME).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit())
        };
        (is_name(group) && is_name(key)).then(|| Self {
            group: group.to_owned(),
            key: key.to_owned(),
        })
    }

    /// What it is of.
    pub(crate) fn of(key: &Key) -> Option<Self> {
        let parts: Vec<_> = key.parts().collect();
        match parts.as_slice() {
            [folder, group, key] if folder.as_ref() == FOLDER => {
                Self::new(group.as_ref(), key.as_ref())
            }
            _ => None,
        }
    }

    pub(crate) fn group(&self) -> &str {
        &self.group
    }

    fn path(&self) -> Key {
        Key::from_iter([FOLDER, &self.group, &self.key])
    }
}

impl fmt::Display for BundleName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.group, self.key)
    }
}

/// A file of a bundle.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Part {
    /// Its name, unique in the bundle.
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(string, tag = "2")]
    pub(crate) digest: String,
    #[prost(message, optional, tag = "3")]
    list: Option<List>,
    /// What its chunks took in the store, packed, if all of them were new; those that were there count as nothing.
    #[prost(uint64, tag = "4")]
    pub new_bytes: u64,
}

impl Part {
    /// Its bytes, holes included, as its list says.
    pub fn bytes(&self) -> u64 {
        self.list.as_ref().map_or(0, |list| list.size)
    }
}

#[derive(Clone, PartialEq, prost::Message)]
struct Contents {
    #[prost(bytes = "vec", tag = "1")]
    about: Vec<u8>,
    #[prost(message, repeated, tag = "2")]
    parts: Vec<Part>,
}

/// Files that belong together.
#[derive(Debug, Clone)]
pub struct Bundle {
    /// Its name.
    pub name: BundleName,
    /// What its maker says of it.
    pub about: Vec<u8>,
    /// Its files.
    pub parts: Vec<Part>,
    /// When it was made, or used last, to a day.
    pub used: SystemTime,
}

impl Bundle {
    /// The file of that name.
    pub fn part(&self, name: &str) -> Option<&Part> {
        self.parts.iter().find(|part| part.name == name)
    }
}

impl Blobs {
    /// Stores a file that is to be of a bundle, one chunk at a time and each after `before`: nobody waits for it, and others have the CPUs.
    pub async fn put_part(
        &self,
        name: &str,
        file: File,
        cut: Cut,
        before: &Before<'_>,
    ) -> Result<(Part, Moved), BlobError> {
        let (digest, list, moved) = self.put_chunks(file, cut, 1, before).await?;
        let part = Part {
            name: name.to_owned(),
            digest,
            list: Some(list),
            new_bytes: moved.moved_bytes,
        };
        Ok((part, moved))
    }

    /// Makes a bundle of files that are stored, in place of any of that name.
    pub async fn put_bundle(
        &self,
        name: &BundleName,
        about: Vec<u8>,
        parts: Vec<Part>,
    ) -> Result<(), BlobError> {
        let contents = Contents { about, parts };
        self.write(name, contents.encode_to_vec()).await
    }

    async fn write(&self, name: &BundleName, bytes: Vec<u8>) -> Result<(), BlobError> {
        let (key, payload) = (name.path(), PutPayload::from(bytes));
        self.again(|| self.store.put(&key, payload.clone())).await?;
        Ok(())
    }

    /// The bundle of that name, if there is one.
    pub async fn bundle(&self, name: &BundleName) -> Result<Option<Bundle>, BlobError> {
        let key = name.path();
        let found = self.again(|| async {
            let found = self.store.get(&key).await?;
            let meta = found.meta.clone();
            if meta.size > LARGEST_LIST {
                return Ok((meta, None));
            }
            Ok((meta, Some(found.bytes().await?)))
        });
        let (meta, bytes) = match found.await {
            Ok(found) => found,
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let damaged = || BlobError::Damaged(format!("the list of bundle {name}"));
        let contents = Contents::decode(bytes.ok_or_else(damaged)?).map_err(|_| damaged())?;
        let Contents { about, parts } = contents;
        let is_sound = |part: &Part| part.list.as_ref().is_some_and(List::is_sound);
        if parts.len() > MOST_PARTS || !parts.iter().all(is_sound) {
            return Err(damaged());
        }
        Ok(Some(Bundle {
            name: name.clone(),
            about,
            parts,
            used: meta.last_modified.into(),
        }))
    }

    /// Whether it is there; if it is, it is noted that it is of use.
    pub async fn use_bundle(&self, name: &BundleName) -> Result<bool, BlobError> {
        let Some(Bundle {
            about, parts, used, ..
        }) = self.bundle(name).await?
        else {
            return Ok(false);
        };
        if !used.elapsed().is_ok_and(|age| age < NOTED) {
            self.put_bundle(name, about, parts).await?;
        }
        Ok(true)
    }

    /// The bundles of a group, at most a hundred; those that cannot be read are left out.
    pub async fn bundles(&self, group: &str) -> Result<Vec<Bundle>, BlobError> {
        let Some(folder) = BundleName::new(group, "0") else {
            return Ok(Vec::new());
        };
        let prefix = Key::from_iter([FOLDER, folder.group()]);
        let mut listed = self.store.list(Some(&prefix));
        let mut found = Vec::new();
        while let Some(object) = listed.try_next().await? {
            if found.len() == MOST_OF_GROUP {
                break;
            }
            let Some(name) = BundleName::of(&object.location) else {
                continue;
            };
            match self.bundle(&name).await {
                Ok(bundle) => found.extend(bundle),
                Err(BlobError::Damaged(what)) => {
                    tracing::warn!(what, "a bundle of the store is damaged");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }

    /// Fetches a file of a bundle into an empty one, open for both ways, which is whole when this returns. After an error it may be written to for a moment more.
    pub async fn get_part(&self, part: &Part, to: File) -> Result<Moved, BlobError> {
        let list = part.list.clone().unwrap_or_default();
        self.fill(list, &part.digest, to).await
    }

    /// Removes a bundle; one that is not there is a success.
    pub async fn remove_bundle(&self, name: &BundleName) -> Result<(), BlobError> {
        let key = name.path();
        match self.again(|| self.store.delete(&key)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// The chunks of a bundle; none if it cannot be read, and so is of no use to anybody.
    pub(crate) async fn chunks_of_bundle(
        &self,
        name: &BundleName,
    ) -> Result<Option<Vec<blake3::Hash>>, BlobError> {
        let bundle = match self.bundle(name).await {
            Ok(bundle) => bundle,
            Err(BlobError::Damaged(_)) => return Ok(None),
            Err(error) => return Err(error),
        };
        // One that went a moment ago is of nothing.
        let parts = bundle.into_iter().flat_map(|bundle| bundle.parts);
        let lists = parts.filter_map(|part| part.list);
        let chunks = lists.flat_map(|list| list.chunks);
        Ok(Some(chunks.filter_map(|chunk| chunk.hash()).collect()))
    }
}

pub(crate) fn is_unused(object: &ObjectMeta) -> bool {
    let time: SystemTime = object.last_modified.into();
    time.elapsed().is_ok_and(|age| age > UNUSED)
}
