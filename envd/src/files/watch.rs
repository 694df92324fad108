//! What changes below a path, by inotify(7), with the rights of a user.
//!
//! A directory made or moved below a watched one gets a watch of its own, and is then looked through, since there may be something in it
//! already: each entry is told once, by whichever of the two saw it first. The kernel's queue is the only one: a reader that is slow makes
//! it overflow, and is told.

use std::{
    collections::{HashMap, HashSet},
    ffi::OsString,
    fs, io, mem,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor},
};
use proto::envd::v1::{FileChange, FilesystemServiceWatchResponse as Change};
use tokio::io::{Interest, unix::AsyncFd};
use tonic::{Code, Status};

use super::{LONGEST_PATH, shown};
use crate::errors::{invalid, path_error, refuse};

/// Directories of one watch. The kernel takes about 1 KiB for each.
const MOST_FOLDERS: usize = 32_768;
/// Changes gathered in one look; a tree that was moved in may hold any number.
const MOST_CHANGES: usize = 16_384;
/// A look that has this many changes leaves the rest for the next.
const ENOUGH: usize = 1024;
/// How long after the first half of a move the second may come, milliseconds: they are not queued as one (inotify(7)).
const SECOND_HALF: u8 = 5;

const EVENTS: AddWatchFlags = AddWatchFlags::IN_CREATE
    .union(AddWatchFlags::IN_MODIFY)
    .union(AddWatchFlags::IN_CLOSE_WRITE)
    .union(AddWatchFlags::IN_ATTRIB)
    .union(AddWatchFlags::IN_DELETE)
    .union(AddWatchFlags::IN_DELETE_SELF)
    .union(AddWatchFlags::IN_MOVE)
    .union(AddWatchFlags::IN_MOVE_SELF)
    .union(AddWatchFlags::IN_ONLYDIR);

/// A watched directory, or name in one.
#[derive(Debug)]
pub(crate) struct Watch {
    inotify: Inotify,
    top: PathBuf,
    /// The one entry of `top` that is meant.
    only: Option<OsString>,
    is_recursive: bool,
    folders: HashMap<WatchDescriptor, PathBuf>,
    /// Told because they were found; the kernel may have an event for them in its queue still.
    found: HashSet<PathBuf>,
    /// What was moved away, maybe to another watched place.
    moved: Option<Moved>,
    changes: Vec<Change>,
    is_full: bool,
    is_over: bool,
}

#[derive(Debug)]
struct Moved {
    cookie: u32,
    path: PathBuf,
    is_directory: bool,
}

/// What one look found.
#[derive(Debug)]
pub(crate) struct Look {
    pub(crate) changes: Vec<Change>,
    /// Whether there may be more at once.
    pub(crate) has_more: bool,
    /// Whether what is watched is gone, and nothing more will come.
    pub(crate) is_over: bool,
}

impl Watch {
    /// Begins to watch; from its return on no change is missed.
    pub(crate) fn begin(path: PathBuf, is_recursive: bool) -> Result<Self, Status> {
        let failed = |error| path_error(&shown(&path), &error);
        let (top, only) = if fs::metadata(&path).map_err(failed)?.is_dir() {
            (path, None)
        } else {
            let path = fs::canonicalize(&path).map_err(failed)?;
            let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
                return Err(invalid("path", "names no file"));
            };
            (parent.to_owned(), Some(name.to_owned()))
        };
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)
            .map_err(|error| exhausted(&format!("the guest has no further watch: {error}")))?;
        let mut watch = Self {
            inotify,
            is_recursive: is_recursive && only.is_none(),
            folders: HashMap::new(),
            found: HashSet::new(),
            moved: None,
            changes: Vec::new(),
            is_full: false,
            is_over: false,
            top,
            only,
        };
        watch.enter(watch.top.clone(), false)?;
        let watched = watch.watched();
        watch.tell(FileChange::Watching, &watched, false);
        Ok(watch)
    }

    /// Readable when there is something to look at.
    #[allow(unsafe_code)]
    pub(crate) fn wakeups(&self) -> io::Result<AsyncFd<OwnedFd>> {
        let descriptor = self.inotify.as_fd().try_clone_to_owned()?;
        // SAFETY: an owned descriptor is open, and the same, for as long as it is owned.
        unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }
            .map_err(io::Error::from)
    }

    /// What changed since the last look.
    pub(crate) fn look(&mut self) -> Result<Look, Status> {
        let mut has_waited = false;
        let has_more = loop {
            match self.inotify.read_events() {
                Ok(events) => {
                    for event in events {
                        self.take(event)?;
                    }
                }
                Err(Errno::EAGAIN) if self.moved.is_some() && !has_waited => {
                    has_waited = true;
                    let mut ready = [PollFd::new(self.inotify.as_fd(), PollFlags::POLLIN)];
                    // Whether it came or not shows in the next read.
                    let _ = poll(&mut ready, PollTimeout::from(SECOND_HALF));
                }
                Err(Errno::EAGAIN) => break false,
                Err(Errno::EINTR) => {}
                Err(error) => return Err(path_error(&shown(&self.top), &error.into())),
            }
            if self.is_over || self.changes.len() >= ENOUGH {
                break true;
            }
        };
        if !has_more {
            self.flush();
        }
        if !has_more || self.found.len() > MOST_CHANGES {
            self.found.clear();
        }
        self.is_full = false;
        Ok(Look {
            changes: mem::take(&mut self.changes),
            has_more,
            is_over: self.is_over,
        })
    }

    fn take(&mut self, event: InotifyEvent) -> Result<(), Status> {
        let is = |flags| event.mask.intersects(flags);
        if is(AddWatchFlags::IN_Q_OVERFLOW) {
            return self.overflow();
        }
        if is(AddWatchFlags::IN_IGNORED) {
            self.folders.remove(&event.wd);
            return Ok(());
        }
        // Events of a directory that was left are none of ours.
        let Some(folder) = self.folders.get(&event.wd) else {
            return Ok(());
        };
        let Some(name) = event.name else {
            // Of a directory itself its parent's watch tells; the top has none.
            if *folder == self.top {
                self.take_of_top(event.mask);
            }
            return Ok(());
        };
        let path = folder.join(name);
        let is_directory = is(AddWatchFlags::IN_ISDIR);
        if is(AddWatchFlags::IN_MOVED_FROM) {
            self.flush();
            self.moved = Some(Moved {
                cookie: event.cookie,
                path,
                is_directory,
            });
        } else if is(AddWatchFlags::IN_MOVED_TO) {
            match self.moved.take() {
                Some(from) if from.cookie == event.cookie => self.renamed(&from, path)?,
                other => {
                    self.moved = other;
                    self.flush();
                    self.created(path, is_directory)?;
                }
            }
        } else if is(AddWatchFlags::IN_CREATE) {
            if !self.found.remove(&path) {
                self.created(path, is_directory)?;
            }
        } else if is(AddWatchFlags::IN_DELETE) {
            self.found.remove(&path);
            self.tell(FileChange::Removed, &path, is_directory);
        } else if is(AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_CLOSE_WRITE) {
            self.tell(FileChange::Written, &path, is_directory);
        } else if is(AddWatchFlags::IN_ATTRIB) {
            self.tell(FileChange::Attributes, &path, is_directory);
        }
        Ok(())
    }

    fn take_of_top(&mut self, mask: AddWatchFlags) {
        let top = self.top.clone();
        let gone =
            AddWatchFlags::IN_DELETE_SELF | AddWatchFlags::IN_MOVE_SELF | AddWatchFlags::IN_UNMOUNT;
        if mask.intersects(gone) {
            self.only = None;
            self.tell(FileChange::Removed, &top, true);
            self.is_over = true;
        } else if mask.contains(AddWatchFlags::IN_ATTRIB) && self.only.is_none() {
            self.tell(FileChange::Attributes, &top, true);
        }
    }

    fn created(&mut self, path: PathBuf, is_directory: bool) -> Result<(), Status> {
        self.tell(FileChange::Created, &path, is_directory);
        if is_directory && self.is_recursive {
            self.enter(path, true)?;
        }
        Ok(())
    }

    fn renamed(&mut self, from: &Moved, path: PathBuf) -> Result<(), Status> {
        if !self.is_meant(&from.path) && !self.is_meant(&path) {
            return Ok(());
        }
        if !self.is_meant(&from.path) {
            // Something took the place of the file that is watched, as editors save.
            self.tell(FileChange::Created, &path, from.is_directory);
            return Ok(());
        }
        self.push(Change {
            change: FileChange::Renamed.into(),
            path_bytes: from.path.as_os_str().as_bytes().to_vec(),
            new_path_bytes: path.as_os_str().as_bytes().to_vec(),
            is_directory: from.is_directory,
        });
        if !(from.is_directory && self.is_recursive) {
            return Ok(());
        }
        if self
            .folders
            .values()
            .any(|folder| folder.starts_with(&path))
        {
            // Two that exchanged their names (RENAME_EXCHANGE) cannot be told apart by name.
            return self.look_through_again();
        }
        let mut was_watched = false;
        for folder in self.folders.values_mut() {
            if let Ok(below) = folder.strip_prefix(&from.path) {
                was_watched = true;
                // Joining nothing would leave a slash at the end.
                *folder = if below.as_os_str().is_empty() {
                    path.clone()
                } else {
                    path.join(below)
                };
            }
        }
        if was_watched {
            Ok(())
        } else {
            self.enter(path, false)
        }
    }

    /// What was moved away, and is not coming to another watched place.
    fn flush(&mut self) {
        let Some(moved) = self.moved.take() else {
            return;
        };
        self.found.remove(&moved.path);
        self.tell(FileChange::Removed, &moved.path, moved.is_directory);
        if moved.is_directory {
            let inotify = &self.inotify;
            self.folders.retain(|watch, folder| {
                let stays = !folder.starts_with(&moved.path);
                if !stays {
                    // One that is gone already has no watch.
                    let _ = inotify.rm_watch(*watch);
                }
                stays
            });
        }
    }

    /// Watches a directory, and all below it if asked; tells of what is in it if that is new.
    fn enter(&mut self, folder: PathBuf, is_new: bool) -> Result<(), Status> {
        let mut left = vec![folder];
        while let Some(folder) = left.pop() {
            let is_top = folder == self.top;
            let flags = if is_top {
                EVENTS
            } else {
                EVENTS | AddWatchFlags::IN_DONT_FOLLOW
            };
            match self.inotify.add_watch(&folder, flags) {
                Ok(watch) => {
                    self.folders.insert(watch, folder.clone());
                }
                // The limit of the guest, not of its disk (inotify_add_watch(2)).
                Err(Errno::ENOSPC | Errno::ENOMEM) => return Err(self.too_many()),
                Err(error) if is_top => return Err(path_error(&shown(&folder), &error.into())),
                // It is gone again, or not this user's to read.
                Err(_) => continue,
            }
            if self.folders.len() > MOST_FOLDERS {
                return Err(self.too_many());
            }
            if !self.is_recursive {
                continue;
            }
            let Ok(children) = fs::read_dir(&folder) else {
                continue;
            };
            for child in children.flatten() {
                let (path, Ok(kind)) = (child.path(), child.file_type()) else {
                    continue;
                };
                if is_new && !self.is_full {
                    self.found.insert(path.clone());
                    self.tell(FileChange::Created, &path, kind.is_dir());
                }
                if kind.is_dir() && path.as_os_str().len() < LONGEST_PATH {
                    left.push(path);
                }
            }
        }
        Ok(())
    }

    fn overflow(&mut self) -> Result<(), Status> {
        self.moved = None;
        let watched = self.watched();
        self.tell(FileChange::Overflow, &watched, false);
        self.look_through_again()
    }

    /// Finds out anew what is where, since something was not told.
    fn look_through_again(&mut self) -> Result<(), Status> {
        let before = mem::take(&mut self.folders);
        if let Err(status) = self.enter(self.top.clone(), false) {
            if status.code() != Code::NotFound {
                return Err(status);
            }
            self.take_of_top(AddWatchFlags::IN_DELETE_SELF);
        }
        for watch in before.into_keys() {
            if !self.folders.contains_key(&watch) {
                // One that is gone already has no watch.
                let _ = self.inotify.rm_watch(watch);
            }
        }
        Ok(())
    }

    fn tell(&mut self, change: FileChange, path: &Path, is_directory: bool) {
        if !self.is_meant(path) {
            return;
        }
        let change = Change {
            change: change.into(),
            path_bytes: path.as_os_str().as_bytes().to_vec(),
            new_path_bytes: Vec::new(),
            is_directory,
        };
        if self.changes.last() != Some(&change) {
            self.push(change);
        }
    }

    fn push(&mut self, change: Change) {
        if self.is_full {
            return;
        }
        self.changes.push(change);
        if self.changes.len() > MOST_CHANGES {
            self.changes.clear();
            let watched = self.watched();
            self.tell(FileChange::Overflow, &watched, false);
            self.is_full = true;
        }
    }

    fn is_meant(&self, path: &Path) -> bool {
        self.only.is_none() || self.only.as_deref() == path.file_name()
    }

    fn watched(&self) -> PathBuf {
        match &self.only {
            Some(name) => self.top.join(name),
            None => self.top.clone(),
        }
    }

    fn too_many(&self) -> Status {
        exhausted(&format!(
            "{}: more directories below it than can be watched; watch a part of it",
            shown(&self.top)
        ))
    }
}

fn exhausted(message: &str) -> Status {
    refuse(Code::ResourceExhausted, "TOO_MANY_WATCHES", message)
}
