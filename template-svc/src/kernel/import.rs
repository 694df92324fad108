//! From what was uploaded to a kernel that templates can be built with.

use std::{fs::File, io, time::SystemTime};

use proto::template::v1::Artifact;
use service_kit::ids::TeamId;

use super::{KernelError, LARGEST_KERNEL, LARGEST_MODULES, archive, bounded, elf};
use crate::{
    artifact::{ArtifactDigest, Artifacts},
    uploads::Uploads,
};

/// It was not imported.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// Nothing of that digest was uploaded in the last day.
    #[error("no uploaded source {0}")]
    Unknown(String),
    /// It is none for guests.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The disk of template-svc.
    #[error(transparent)]
    Disk(#[from] io::Error),
}

/// What was imported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Imported {
    /// The ELF.
    pub kernel: Artifact,
    /// Its modules.
    pub modules: Artifact,
    /// What it says it is.
    pub release: String,
}

/// Takes kernels in.
#[derive(Debug, Clone)]
pub struct Importer {
    /// Uploaded sources.
    pub uploads: Uploads,
    /// Where they are kept.
    pub artifacts: Artifacts,
}

impl Importer {
    /// Looks at what a team has uploaded under these digests, and keeps it. Blocking.
    pub fn import(
        &self,
        team: &TeamId,
        kernel: &str,
        modules: &str,
    ) -> Result<Imported, ImportError> {
        let uploads = self.uploads.of(team)?;
        let (kernel, bytes) = uploaded(&uploads, kernel, "the kernel", LARGEST_KERNEL)?;
        let release = elf::release(&bytes)?;
        drop(bytes);
        let what = "the archive of modules";
        let (modules, bytes) = uploaded(&uploads, modules, what, LARGEST_MODULES)?;
        archive::check(&bytes, &release)?;
        Ok(Imported {
            kernel: self.keep(&uploads, &kernel)?,
            modules: self.keep(&uploads, &modules)?,
            release,
        })
    }

    fn keep(&self, uploads: &Artifacts, digest: &ArtifactDigest) -> Result<Artifact, ImportError> {
        let unknown = || ImportError::Unknown(digest.as_str().to_owned());
        let path = uploads.find(digest).ok_or_else(unknown)?;
        let artifact = self.artifacts.share(&path, digest)?;
        // It may have been there for long, and for nobody.
        if self.artifacts.touch(digest, SystemTime::now())? {
            Ok(artifact)
        } else {
            Err(unknown())
        }
    }
}

fn uploaded(
    uploads: &Artifacts,
    digest: &str,
    what: &str,
    most: u64,
) -> Result<(ArtifactDigest, Vec<u8>), ImportError> {
    let unknown = || ImportError::Unknown(digest.to_owned());
    let parsed = ArtifactDigest::parse(digest).ok_or_else(unknown)?;
    let path = uploads.find(&parsed).ok_or_else(unknown)?;
    let file = File::open(path)?;
    if file.metadata()?.len() > most {
        let what = what.to_owned();
        return Err(KernelError::TooLarge { what, most }.into());
    }
    let bytes = bounded(file, what, most)?;
    Ok((parsed, bytes))
}
