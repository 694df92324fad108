//! How much of a team is kept: its versions, and what its builds have remembered so that steps are not done again.
//!
//! ```text
//!   versions .......... count first, and stay: what is too much with them is refused
//!   remembered ........ fills what they leave; the longest unused is forgotten when it is too much
//! ```
//! Files that several are made of count once, as they are stored once; those of shared versions are no team's. Files of what is forgotten go as all files that nothing is made
//! of ([`crate::collect`]).

use std::{collections::HashSet, time::Duration};

use proto::template::v1::Template;

use crate::{
    collect::parts_of,
    store::{self, Remembered, Store, StoreError},
};

/// What was of use so lately may be in use: a session that waits for room begins with it.
pub const IN_USE: Duration = Duration::from_mins(30);

/// Bounds it.
#[derive(Debug, Clone)]
pub struct Quota {
    store: Store,
    most: u64,
    in_use: Duration,
}

/// There is no room.
#[derive(Debug, thiserror::Error)]
pub enum QuotaError {
    /// Too much would stay.
    #[error(
        "the team's templates take {needed} of the {most} bytes it may have; delete versions it does not need (sandmesh template delete NAME@VERSION)"
    )]
    Full {
        /// With what was to come.
        needed: u64,
        /// What there may be.
        most: u64,
    },
    /// The rows.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl QuotaError {
    /// The stable word of being refused.
    pub const FULL: &str = "TEAM_STORAGE_FULL";
}

/// Files, each once.
#[derive(Debug, Default)]
struct Parts {
    digests: HashSet<String>,
    bytes: u64,
}

impl Parts {
    /// Of a version, or of what one is about to be. Kernels are no team's.
    fn add(&mut self, template: Template) {
        let own = Template {
            kernel: None,
            modules: None,
            ..template
        };
        for part in parts_of(own) {
            if self.digests.insert(part.digest) {
                self.bytes = self.bytes.saturating_add(part.size_bytes);
            }
        }
    }
}

impl Quota {
    /// A team may have so many bytes. What was of use for less than `in_use` is not forgotten.
    pub fn new(store: Store, most: u64, in_use: Duration) -> Self {
        Self {
            store,
            most,
            in_use,
        }
    }

    /// Whether a team's versions leave room for any more. Shared ones, of nobody, are not bounded.
    pub async fn has_room(&self, team: &str) -> Result<(), QuotaError> {
        if team.is_empty() {
            return Ok(());
        }
        let kept = self.kept(team).await?;
        self.bound(kept.bytes, kept.bytes < self.most)
    }

    /// Makes room for a version, or for what a step has come to: it has first what it needs of what the team's versions leave. Builds of a team that end at once may together come to
    /// more, by what each has made.
    pub async fn make_room(&self, team: &str, new: Template) -> Result<(), QuotaError> {
        if team.is_empty() {
            return Ok(());
        }
        let mut kept = self.kept(team).await?;
        kept.add(new);
        self.bound(kept.bytes, kept.bytes <= self.most)?;
        let in_use = i64::try_from(self.in_use.as_micros()).unwrap_or(i64::MAX);
        let before = store::now().saturating_sub(in_use);
        let mut forgotten = Vec::new();
        let see = |Remembered {
                       id,
                       use_time,
                       template,
                   }| {
            if forgotten.is_empty() {
                kept.add(template);
            }
            if kept.bytes > self.most && use_time < before {
                forgotten.push(id);
            }
        };
        self.store.each_remembered(team, see).await?;
        if !forgotten.is_empty() {
            let count = forgotten.len();
            self.store.forget_these(team, forgotten, before).await?;
            tracing::info!(
                team,
                count,
                "steps of builds are forgotten for want of room"
            );
        }
        Ok(())
    }

    async fn kept(&self, team: &str) -> Result<Parts, QuotaError> {
        let mut kept = Parts::default();
        self.store
            .each_version("", |shared| kept.add(shared))
            .await?;
        kept.bytes = 0;
        self.store.each_version(team, |own| kept.add(own)).await?;
        Ok(kept)
    }

    fn bound(&self, needed: u64, fits: bool) -> Result<(), QuotaError> {
        let most = self.most;
        fits.then_some(()).ok_or(QuotaError::Full { needed, most })
    }
}
