//! Children of a session: an image of its memory, devices and disk, from which any number is restored.

use std::{fs, io, sync::Arc, time::Duration};

use proto::node::v1::StartSessionRequest;
use tempfile::TempDir;

use super::{
    DriveError, Driver, Outcome, PAUSED, TEMPLATE_MEMORY, blocking,
    start::{Source, link_own_rootfs},
    unfinished,
};
use crate::{
    disk,
    hosted::{Ended, Phase},
    stored::{self, SCRATCH},
    vmm::{DEVICES, MEMORY, MEMORY_DIFFERENCE, VmmError, memory},
};

/// A session as it was at one moment. Its files go when nobody holds it any more; children have their own names for what they use.
#[derive(Debug)]
pub struct ForkImage {
    folder: TempDir,
    request: StartSessionRequest,
    envd: String,
}

impl ForkImage {
    /// Which envd its guest has.
    pub fn envd(&self) -> &str {
        &self.envd
    }

    /// What the session was started with; its children are started with the same, but for ID and token.
    pub fn request(&self) -> &StartSessionRequest {
        &self.request
    }
}

impl Driver {
    /// Makes an image of the session; also how long it stood still. The outer error is the session's end.
    pub(super) async fn fork(&mut self) -> Result<Outcome<(Arc<ForkImage>, Duration)>, Ended> {
        let forks = self.shop.forks.clone();
        let image = match blocking(move || unfinished(&forks)).await {
            Ok(folder) => Arc::new(ForkImage {
                folder,
                request: self.request.clone(),
                envd: self.entry.envd.clone(),
            }),
            Err(error) => return Ok(Err(error.into())),
        };
        if self.reach.is_none() {
            let forked = self.fork_paused(&image).await;
            return Ok(forked.map(|()| (image, Duration::ZERO)));
        }
        // Most of the memory is copied before the session stands still: what it shares with its template, or with its own parent.
        if let Err(error) = self.copy_files(&image).await {
            return Ok(Err(error.into()));
        }
        let still = match self.stand_still(Phase::Held).await {
            Ok(still) => still,
            Err(error) => return self.stood_not(error).await,
        };
        let taken = self.fork_still(&image).await;
        match self.go_on(still).await {
            Ok(stood) => {
                metrics::histogram!("sandmesh_node_fork_stop_seconds").record(stood.as_secs_f64());
                Ok(taken.map(|()| (image, stood)))
            }
            Err(error) => Err(self.beyond_help(&error).await),
        }
    }

    async fn copy_files(&self, image: &ForkImage) -> io::Result<()> {
        if !self.shop.vmm.needs_place() {
            return Ok(());
        }
        let (from, to) = (self.folder.clone(), image.folder.path().to_owned());
        blocking(move || {
            link_own_rootfs(&from, &to)?;
            fs::hard_link(from.join(TEMPLATE_MEMORY), to.join(TEMPLATE_MEMORY))?;
            disk::copy(&from.join(MEMORY), &to.join(MEMORY))
        })
        .await
    }

    async fn fork_still(&mut self, image: &ForkImage) -> Result<(), DriveError> {
        let vm = self.vm.as_mut().ok_or(DriveError::State("not running"))?;
        vm.store_devices(&image.folder.path().join(DEVICES)).await?;
        vm.copy_memory(&image.folder.path().join(MEMORY)).await?;
        if self.shop.vmm.needs_place() {
            let (scratch, copy) = (self.path(SCRATCH), image.folder.path().join(SCRATCH));
            blocking(move || disk::copy(&scratch, &copy)).await?;
        }
        Ok(())
    }

    async fn fork_paused(&self, image: &ForkImage) -> Result<(), DriveError> {
        let (from, to) = (self.folder.clone(), image.folder.path().to_owned());
        let (maker, is_simulated) = (self.shop.maker.clone(), !self.shop.vmm.needs_place());
        let fork = move || {
            let paused = from.join(PAUSED);
            stored::check(&paused, &maker)?;
            fs::hard_link(paused.join(DEVICES), to.join(DEVICES))?;
            if is_simulated {
                return Ok(());
            }
            link_own_rootfs(&from, &to)?;
            fs::hard_link(from.join(TEMPLATE_MEMORY), to.join(TEMPLATE_MEMORY))?;
            fs::hard_link(paused.join(SCRATCH), to.join(SCRATCH))?;
            disk::copy(&from.join(TEMPLATE_MEMORY), &to.join(MEMORY))?;
            let memory = fs::File::options().write(true).open(to.join(MEMORY))?;
            memory::apply_to_file(&paused.join(MEMORY_DIFFERENCE), &memory)
                .map_err(VmmError::from)?;
            Ok::<_, DriveError>(())
        };
        crate::work::blocking(fork)
            .await
            .map_err(io::Error::other)?
    }

    /// Gives a child's folder root and memory of the image.
    pub(super) async fn take_image(&mut self, image: &ForkImage) -> Result<Source, DriveError> {
        if self.shop.vmm.needs_place() {
            let (from, to) = (image.folder.path().to_owned(), self.folder.clone());
            blocking(move || {
                link_own_rootfs(&from, &to)?;
                fs::hard_link(from.join(TEMPLATE_MEMORY), to.join(TEMPLATE_MEMORY))?;
                fs::hard_link(from.join(MEMORY), to.join(MEMORY))
            })
            .await?;
        }
        Ok(Source {
            devices: image.folder.path().join(DEVICES),
            difference: None,
            scratch: image.folder.path().join(SCRATCH),
        })
    }
}
