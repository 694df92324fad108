//! What nobody needs any more goes: what builds have remembered and not used for long, then files that no version, nothing remembered and no kernel is made of.
//!
//! ```text
//!   template_versions, build_steps, kernels --> digests that are wanted --> files of the state folder, and of the object store, that are not, and not young
//! ```
//! A build that uses a file makes it young first ([`crate::artifact::Artifacts::touch`]), and lasts for less than files are kept; so what it is about to name stays.

use std::time::Duration;

use blobs::{BlobError, Blobs, Swept};
use proto::template::v1::{Artifact, Template};

use crate::{
    artifact::Artifacts,
    store::{Store, StoreError},
};

/// Steps of builds that were not of use for so long are forgotten.
pub const REMEMBERED: Duration = Duration::from_hours(7 * 24);
/// A file that nothing is made of stays so long: longer than a build lasts.
pub const KEPT: Duration = Duration::from_hours(48);

/// What was not removed, this time.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// The rows.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The disk.
    #[error("the folder of artifacts: {0}")]
    Disk(#[from] std::io::Error),
    /// The object store.
    #[error(transparent)]
    Blobs(#[from] BlobError),
}

/// What was removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Collected {
    /// Steps, and what builds kept for themselves.
    pub forgotten: u64,
    /// Files of the state folder.
    pub artifacts: u64,
    /// Of the object store.
    pub blobs: Swept,
}

/// Removes it. `own` are files that are needed whatever is made of them.
pub async fn collect(
    store: &Store,
    artifacts: &Artifacts,
    blobs: &Blobs,
    own: &[Artifact],
) -> Result<Collected, CollectError> {
    let forgotten = store.forget(REMEMBERED).await?;
    let mut wanted = store.digests().await?;
    wanted.extend(own.iter().map(|artifact| artifact.digest.clone()));
    let folder = artifacts.clone();
    let (removed, wanted) = tokio::task::spawn_blocking(move || {
        let removed = folder.sweep_unwanted(&wanted, KEPT)?;
        Ok::<_, std::io::Error>((removed, wanted))
    })
    .await
    .map_err(std::io::Error::other)??;
    Ok(Collected {
        forgotten,
        artifacts: removed,
        blobs: blobs.sweep(&wanted).await?,
    })
}

/// What a template, or a step, is made of.
pub(crate) fn parts_of(template: Template) -> impl Iterator<Item = Artifact> {
    let layers = template.layers.into_iter().filter_map(|layer| layer.blob);
    let parts = [template.rootfs, template.kernel, template.modules];
    parts.into_iter().flatten().chain(layers)
}
