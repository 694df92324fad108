//! What no file that is wanted is made of goes, some time after it was last asked for.

use std::collections::HashSet;

use futures::{StreamExt as _, TryStreamExt as _};
use object_store::{ObjectMeta, ObjectStoreExt as _, path::Path as Key};

use crate::{
    BlobError, Blobs, GRACE, LARGEST_LIST,
    bundle::{self, BundleName, is_unused},
};

/// What was removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Swept {
    /// Lists of files.
    pub files: u64,
    /// Bundles.
    pub bundles: u64,
    /// Chunks.
    pub chunks: u64,
    /// Their bytes, packed.
    pub bytes: u64,
}

impl Blobs {
    /// Removes files that are not wanted, by their digests, bundles of groups that are not, or that were of no use for [`crate::UNUSED`], and chunks that nothing is
    /// made of any more; what is younger than [`GRACE`] stays, since it may belong to a file whose list is still to come.
    pub async fn sweep(&self, wanted: &HashSet<String>) -> Result<Swept, BlobError> {
        let mut swept = Swept::default();
        let mut used = HashSet::new();
        let mut files = self.store.list(Some(&Key::from("files")));
        while let Some(file) = files.try_next().await? {
            let digest = file.location.filename().unwrap_or_default().to_owned();
            if !wanted.contains(&digest) && is_over(&file) && self.remove(&file.location).await? {
                swept.files += 1;
                continue;
            }
            match self.list(&digest, LARGEST_LIST).await {
                Ok(list) => used.extend(list.chunks.iter().filter_map(crate::Chunk::hash)),
                // Of one that cannot be read nobody knows what it is made of: nothing goes.
                Err(error) => return Err(error),
            }
        }
        let mut bundles = self.store.list(Some(&Key::from(bundle::FOLDER)));
        while let Some(object) = bundles.try_next().await? {
            let Some(name) = BundleName::of(&object.location) else {
                continue;
            };
            let is_wanted = wanted.contains(name.group()) && !is_unused(&object);
            if !is_wanted && is_over(&object) && self.remove(&object.location).await? {
                swept.bundles += 1;
                continue;
            }
            if let Some(chunks) = self.chunks_of_bundle(&name).await? {
                used.extend(chunks);
            } else {
                // Whoever needs it makes it again.
                self.remove_bundle(&name).await?;
                swept.bundles += 1;
            }
        }
        let mut chunks = self.store.list(Some(&Key::from("chunks")));
        while let Some(chunk) = chunks.next().await.transpose()? {
            let name = chunk.location.filename().unwrap_or_default();
            let is_used = blake3::Hash::from_hex(name).is_ok_and(|hash| used.contains(&hash));
            if !is_used && is_over(&chunk) && self.remove(&chunk.location).await? {
                swept.chunks += 1;
                swept.bytes += chunk.size;
            }
        }
        Ok(swept)
    }

    /// Unless somebody has written it again since it was listed. Between that look and its end there is a moment in which somebody may: whoever wrote it looks
    /// at a chunk that old, so he was at it for longer than [`GRACE`] is half.
    async fn remove(&self, key: &Key) -> Result<bool, BlobError> {
        let removed = self.again(|| async {
            if is_over(&self.store.head(key).await?) {
                self.store.delete(key).await.map(|()| true)
            } else {
                Ok(false)
            }
        });
        match removed.await {
            // Somebody was faster.
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            removed => Ok(removed?),
        }
    }
}

fn is_over(object: &ObjectMeta) -> bool {
    let time: std::time::SystemTime = object.last_modified.into();
    time.elapsed().is_ok_and(|age| age > GRACE)
}
