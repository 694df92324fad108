//! Listings: by name, level by level, in pages that any number of entries and any pattern keep bounded.

use std::{
    ffi::OsString,
    fs, io,
    ops::ControlFlow,
    os::unix::ffi::OsStrExt as _,
    path::{Components, Path, PathBuf},
};

use prost::Message as _;
use proto::envd::v1::Entry;
use tonic::Status;

use super::{entry, shown};
use crate::errors::{invalid, path_error};

/// A page ends here, however many entries were asked for: a gRPC message has at most 4 MiB by default.
const LARGEST_PAGE: usize = 2 << 20;
/// A page ends after so many looks, whether or not a pattern has matched.
const MOST_LOOKS: usize = 50_000;
const LONGEST_PATTERN: usize = 1024;

/// What of a directory is wanted.
#[derive(Debug)]
pub(crate) struct Listing {
    /// Levels below it, from 1.
    pub(crate) depth: u32,
    pub(crate) pattern: String,
    /// Path of the last entry that was told, from the directory on.
    pub(crate) after: PathBuf,
    pub(crate) limit: usize,
}

impl Listing {
    /// A page, and the entry to go on after.
    pub(crate) fn page(&self, root: &Path) -> Result<(Vec<Entry>, Option<PathBuf>), Status> {
        if self.pattern.len() > LONGEST_PATTERN {
            return Err(invalid("pattern", "must be at most 1024 bytes"));
        }
        fast_glob::validate(&self.pattern)
            .map_err(|error| invalid("pattern", format!("{error}")))?;
        let mut page = Page {
            listing: self,
            root,
            entries: Vec::new(),
            size: 0,
            looks: 0,
            last: PathBuf::new(),
        };
        let after = Some(self.after.as_path()).filter(|after| !after.as_os_str().is_empty());
        let walked = page.walk(Path::new(""), 1, after);
        let has_more = walked
            .map_err(|error| path_error(&shown(root), &error))?
            .is_break();
        Ok((page.entries, has_more.then_some(page.last)))
    }

    fn wants(&self, relative: &Path) -> bool {
        let subject = match (self.pattern.as_str(), relative.file_name()) {
            ("", _) => return true,
            (pattern, Some(name)) if !pattern.contains('/') => name,
            _ => relative.as_os_str(),
        };
        fast_glob::glob_match(&self.pattern, subject.as_bytes())
    }
}

struct Page<'a> {
    listing: &'a Listing,
    root: &'a Path,
    entries: Vec<Entry>,
    size: usize,
    looks: usize,
    /// Looked at last.
    last: PathBuf,
}

impl Page<'_> {
    /// Goes through a directory from an entry on; breaks when the page is full and there is more.
    fn walk(
        &mut self,
        folder: &Path,
        level: u32,
        after: Option<&Path>,
    ) -> io::Result<ControlFlow<()>> {
        let mut after = after.map(Path::components);
        let first = after.as_mut().and_then(Iterator::next);
        let first = first.map(|component| component.as_os_str().to_owned());
        for name in sorted(&self.root.join(folder), first.as_ref())? {
            let relative = folder.join(&name);
            let rest = after
                .as_ref()
                .filter(|_| Some(&name) == first.as_ref())
                .map(Components::as_path);
            // One that went away in between is not there.
            let Ok(metadata) = fs::symlink_metadata(self.root.join(&relative)) else {
                continue;
            };
            if rest.is_none() && self.look(&relative, &metadata).is_break() {
                return Ok(ControlFlow::Break(()));
            }
            let below = rest.filter(|rest| !rest.as_os_str().is_empty());
            if metadata.is_dir()
                && level < self.listing.depth
                // One that may not be read, or is gone, shows nothing of what is in it.
                && let Ok(ControlFlow::Break(())) = self.walk(&relative, level + 1, below)
            {
                return Ok(ControlFlow::Break(()));
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    fn look(&mut self, relative: &Path, metadata: &fs::Metadata) -> ControlFlow<()> {
        let is_full = self.entries.len() == self.listing.limit || self.size >= LARGEST_PAGE;
        if is_full || self.looks == MOST_LOOKS {
            return ControlFlow::Break(());
        }
        self.looks += 1;
        if self.listing.wants(relative) {
            let entry = entry(&self.root.join(relative), metadata);
            self.size += entry.encoded_len();
            self.entries.push(entry);
        }
        relative.clone_into(&mut self.last);
        ControlFlow::Continue(())
    }
}

/// The names in a directory, from one on.
fn sorted(folder: &Path, first: Option<&OsString>) -> io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for child in fs::read_dir(folder)? {
        let name = child?.file_name();
        if first.is_none_or(|first| name >= *first) {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names)
}
