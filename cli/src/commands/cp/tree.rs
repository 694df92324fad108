//! Folders with all that is in them.

use std::{
    ffi::OsStr,
    os::unix::{ffi::OsStrExt as _, fs::PermissionsExt as _},
    path::{Component, Path, PathBuf},
};

use anyhow::{Context as _, bail};
use cap_std::{ambient_authority, fs::Dir};
use futures::StreamExt as _;
use proto::envd::v1::{
    Entry, FileType, FilesystemServiceListRequest, MakeDirectoryRequest, MakeSymlinkRequest,
};
use walkdir::WalkDir;

use super::{Copying, Meter, Place};

/// Files on their way at once.
const AT_ONCE: usize = 8;
/// Levels of a listing; what is deeper is listed from there.
const LEVELS: u32 = 64;
/// A sandbox may say anything, also that there is always something deeper.
const MOST_LISTINGS: u32 = 10_000;

/// What could not be copied, told as it happens.
#[derive(Default)]
struct Failures(usize);

impl Failures {
    fn note<T>(&mut self, meter: &Meter, what: &Path, done: anyhow::Result<T>) -> Option<T> {
        match done {
            Ok(done) => Some(done),
            Err(error) => {
                self.0 += 1;
                meter
                    .0
                    .suspend(|| eprintln!("sandmesh: {}: {error:#}", what.display()));
                None
            }
        }
    }

    fn end(self) -> anyhow::Result<()> {
        match self.0 {
            0 => Ok(()),
            1 => bail!("1 entry was not copied"),
            count => bail!("{count} entries were not copied"),
        }
    }
}

/// What is in a folder of a sandbox, each path checked and from the folder on.
#[derive(Default)]
struct Found {
    folders: Vec<(PathBuf, Entry)>,
    files: Vec<(PathBuf, Entry)>,
    links: Vec<(PathBuf, Entry)>,
    others: Vec<PathBuf>,
}

impl Copying {
    pub(super) async fn tree_out(&self, from: &Path, to: &Path) -> anyhow::Result<()> {
        let found = self.find(from).await?;
        std::fs::create_dir_all(to).with_context(|| to.display().to_string())?;
        let top = Dir::open_ambient_dir(to, ambient_authority())
            .with_context(|| to.display().to_string())?;
        let meter = Meter::new(found.files.iter().map(|(_, file)| file.size_bytes).sum());
        let mut failures = Failures::default();
        for (path, _) in &found.folders {
            let made = top.create_dir_all(path);
            failures.note(&meter, path, made.map_err(Into::into));
        }
        let mut copies = futures::stream::iter(&found.files)
            .map(async |(path, file)| (path, self.file_out(file, &top, path, &meter).await))
            .buffer_unordered(AT_ONCE);
        while let Some((path, copied)) = copies.next().await {
            failures.note(&meter, path, copied);
        }
        drop(copies);
        for (path, link) in &found.links {
            let made = replace_link(
                &top,
                path,
                Path::new(OsStr::from_bytes(&link.symlink_target)),
            );
            failures.note(&meter, path, made.map_err(Into::into));
        }
        // Last, since one that may not be written to could take nothing.
        for (path, folder) in found.folders.iter().rev() {
            let mode = cap_std::fs::Permissions::from_std(std::fs::Permissions::from_mode(
                folder.mode & 0o777,
            ));
            let set = top.set_permissions(path, mode);
            failures.note(&meter, path, set.map_err(Into::into));
        }
        for path in &found.others {
            meter.0.suspend(|| {
                eprintln!(
                    "sandmesh: {}: neither file, folder nor link; left out",
                    path.display()
                );
            });
        }
        meter.end();
        failures.end()
    }

    async fn find(&self, from: &Path) -> anyhow::Result<Found> {
        let mut found = Found::default();
        let (mut open, mut count) = (vec![from.to_owned()], 0);
        while let Some(folder) = open.pop() {
            let request = FilesystemServiceListRequest {
                path_bytes: folder.as_os_str().as_bytes().to_vec(),
                user: self.user.clone(),
                depth: LEVELS,
                ..Default::default()
            };
            for entry in self.sandbox.list_all(request).await? {
                let path = Path::new(OsStr::from_bytes(&entry.path_bytes));
                let relative = inside(from, path)?;
                let below = inside(&folder, path)?.components().count();
                match entry.r#type() {
                    FileType::Directory => {
                        if below == LEVELS as usize {
                            open.push(path.to_owned());
                        }
                        found.folders.push((relative, entry));
                    }
                    FileType::File => found.files.push((relative, entry)),
                    FileType::Symlink => found.links.push((relative, entry)),
                    FileType::Other | FileType::Unspecified => found.others.push(relative),
                }
            }
            count += 1;
            if count == MOST_LISTINGS {
                bail!("{} has no end", from.display());
            }
        }
        Ok(found)
    }

    pub(super) async fn tree_within(&self, from: &Path, to: Place) -> anyhow::Result<()> {
        let top = self.make_folder(to, from).await?;
        let meter = Meter::new(0);
        let mut failures = Failures::default();
        let mut files = Vec::new();
        for found in WalkDir::new(from).min_depth(1) {
            let found = found?;
            let path = found.path();
            let relative = path.strip_prefix(from)?;
            let place = || {
                let mut place = top.clone();
                place.push(b'/');
                place.extend(relative.as_os_str().as_bytes());
                Place::Bytes(place)
            };
            let kind = found.file_type();
            if kind.is_dir() {
                let made = self.make_folder(place(), path).await;
                failures.note(&meter, path, made);
            } else if kind.is_symlink() {
                let made = self.make_link(place(), path).await;
                failures.note(&meter, path, made);
            } else if kind.is_file() {
                meter.0.inc_length(found.metadata()?.len());
                files.push((path.to_owned(), place()));
            } else {
                meter.0.suspend(|| {
                    eprintln!(
                        "sandmesh: {}: neither file, folder nor link; left out",
                        path.display()
                    );
                });
            }
        }
        let mut copies = futures::stream::iter(files)
            .map(async |(path, place)| {
                let copied = self.file_within(&path, place, &meter).await;
                (path, copied)
            })
            .buffer_unordered(AT_ONCE);
        while let Some((path, copied)) = copies.next().await {
            failures.note(&meter, &path, copied);
        }
        drop(copies);
        meter.end();
        failures.end()
    }

    /// Makes a folder like one here, and says where it is.
    async fn make_folder(&self, place: Place, like: &Path) -> anyhow::Result<Vec<u8>> {
        let mode = std::fs::metadata(like)?.permissions().mode() & 0o777;
        let (path, path_bytes) = place.fields();
        let request = MakeDirectoryRequest {
            path,
            path_bytes,
            user: self.user.clone(),
            mode: Some(mode | 0o700),
        };
        let answer = self.sandbox.filesystem().make_directory(request).await;
        let entry = answer.map_err(sdk::Error::from)?.into_inner().entry;
        Ok(entry.context("the answer lacks the folder")?.path_bytes)
    }

    async fn make_link(&self, place: Place, like: &Path) -> anyhow::Result<()> {
        let target = std::fs::read_link(like)?;
        let (path, path_bytes) = place.fields();
        let request = MakeSymlinkRequest {
            path,
            path_bytes,
            user: self.user.clone(),
            target: target.as_os_str().as_bytes().to_vec(),
            replace: true,
        };
        let answer = self.sandbox.filesystem().make_symlink(request).await;
        answer.map_err(sdk::Error::from)?;
        Ok(())
    }
}

fn replace_link(folder: &Dir, path: &Path, target: &Path) -> std::io::Result<()> {
    match folder.remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    folder.symlink_contents(target, path)
}

/// A path from a folder on. A sandbox that names another is not obeyed.
fn inside(folder: &Path, path: &Path) -> anyhow::Result<PathBuf> {
    let relative = path.strip_prefix(folder).ok().filter(|relative| {
        let mut components = relative.components();
        components.clone().next().is_some()
            && components.all(|component| matches!(component, Component::Normal(_)))
    });
    match relative {
        Some(relative) => Ok(relative.to_owned()),
        None => bail!(
            "the sandbox named {}, which was not asked for",
            path.display()
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_sandbox_names_must_be_inside() {
        let inside = |path| inside(Path::new("/home/user/d"), Path::new(path)).ok();
        assert_eq!(inside("/home/user/d/a/b"), Some("a/b".into()));
        for path in [
            "/home/user/d",
            "/home/user/d/../x",
            "/home/user/d/a/../../x",
            "/etc/passwd",
            "a",
            "",
        ] {
            assert_eq!(inside(path), None, "{path}");
        }
    }

    #[test]
    fn links_of_an_earlier_copy_lead_nowhere() {
        let folder = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        let top = Dir::open_ambient_dir(folder.path(), ambient_authority()).unwrap();
        replace_link(&top, Path::new("l"), outside.path()).unwrap();
        top.create("l/x").unwrap_err();
        top.create_dir_all("l/y").unwrap_err();
        replace_link(&top, Path::new("l"), Path::new("elsewhere")).unwrap();
        let target = std::fs::read_link(folder.path().join("l")).unwrap();
        assert_eq!(target, Path::new("elsewhere"));
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
    }
}
