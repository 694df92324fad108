//! Watches of files: each change once, by its name, or word that some were not told.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::Write as _,
    os::unix::{ffi::OsStrExt as _, fs::symlink},
    path::{Path, PathBuf},
};

use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use proto::envd::v1::{
    FileChange, FilesystemServiceWatchRequest, FilesystemServiceWatchResponse, MoveRequest,
};
use tonic::{Code, Status, Streaming};

use crate::{
    files::chmod,
    world::{World, soon, why},
};

/// More than the kernel's queue holds (fs.inotify.max_queued_events: 16,384).
const MANY: usize = 40_000;

struct Watching {
    top: PathBuf,
    changes: Streaming<FilesystemServiceWatchResponse>,
}

impl World {
    async fn try_watch(
        &self,
        user: &str,
        path: &Path,
        recursive: bool,
    ) -> Result<Streaming<FilesystemServiceWatchResponse>, Status> {
        let request = FilesystemServiceWatchRequest {
            path_bytes: path.as_os_str().as_bytes().to_vec(),
            user: user.into(),
            recursive,
            ..Default::default()
        };
        Ok(soon(self.files().watch(request)).await?.into_inner())
    }

    async fn watch(&self, path: &Path, recursive: bool) -> Watching {
        let mut watching = Watching {
            top: path.to_owned(),
            changes: self.try_watch("", path, recursive).await.unwrap(),
        };
        assert_eq!(
            watching.next().await.unwrap(),
            (FileChange::Watching, String::new(), String::new())
        );
        watching
    }
}

impl Watching {
    /// A change, and its paths below the top.
    async fn next(&mut self) -> Option<(FileChange, String, String)> {
        let change = soon(self.changes.message()).await.unwrap()?;
        let below = |bytes: &[u8]| {
            let path = Path::new(OsStr::from_bytes(bytes));
            let below = path.strip_prefix(&self.top).unwrap_or(path);
            below.to_string_lossy().into_owned()
        };
        let paths = (below(&change.path_bytes), below(&change.new_path_bytes));
        Some((change.change(), paths.0, paths.1))
    }

    /// What came to be, until one of that name did.
    async fn created_until(&mut self, last: &str) -> Vec<String> {
        let mut created = Vec::new();
        loop {
            let (change, path, _) = self.next().await.unwrap();
            if change == FileChange::Created {
                created.push(path);
            }
            if created.last().is_some_and(|path| path == last) {
                return created;
            }
        }
    }

    /// Changes but those of attributes and contents, until one that removed this.
    async fn until_removed(&mut self, last: &str) -> Vec<(FileChange, String, String)> {
        let mut seen = Vec::new();
        loop {
            let change = self.next().await.unwrap();
            let is_last = change.0 == FileChange::Removed && change.1 == last;
            if !matches!(change.0, FileChange::Written | FileChange::Attributes) {
                seen.push(change);
            }
            if is_last {
                return seen;
            }
        }
    }
}

fn folder(world: &World, name: &str) -> PathBuf {
    let folder = world.path(name);
    fs::create_dir_all(&folder).unwrap();
    folder
}

#[tokio::test]
async fn every_kind_of_change_is_told_by_its_name() {
    let world = World::new().await;
    let top = folder(&world, "ada/watched");
    let odd = top.join(OsStr::from_bytes(b"\xff\xfe odd"));
    let mut watching = world.watch(&top, false).await;
    let mut file = File::create(top.join("a")).unwrap();
    assert_eq!(watching.next().await.unwrap().0, FileChange::Created);
    file.write_all(b"still open").unwrap();
    let written = (FileChange::Written, "a".to_owned(), String::new());
    assert_eq!(
        watching.next().await.unwrap(),
        written,
        "also before it is closed"
    );
    chmod(top.join("a"), 0o600);
    while watching.next().await.unwrap().0 != FileChange::Attributes {}
    fs::rename(top.join("a"), top.join("b")).unwrap();
    let renamed = (FileChange::Renamed, "a".to_owned(), "b".to_owned());
    assert_eq!(watching.next().await.unwrap(), renamed);
    fs::rename(top.join("b"), world.path("ada/elsewhere")).unwrap();
    let gone = (FileChange::Removed, "b".to_owned(), String::new());
    assert_eq!(watching.next().await.unwrap(), gone);
    fs::rename(world.path("ada/elsewhere"), &odd).unwrap();
    let change = soon(watching.changes.message()).await.unwrap().unwrap();
    assert_eq!(
        (change.change(), change.path_bytes.as_slice()),
        (FileChange::Created, odd.as_os_str().as_bytes())
    );
    // Not recursive: a directory is told, what happens in it is not.
    fs::create_dir(top.join("d")).unwrap();
    File::create(top.join("d/unseen")).unwrap();
    fs::remove_file(top.join("d/unseen")).unwrap();
    fs::remove_dir(top.join("d")).unwrap();
    let seen = watching.until_removed("d").await;
    assert_eq!(seen.len(), 2, "{seen:?}");
    // With the watched directory the watch ends, once nothing in it is open.
    drop(file);
    fs::remove_dir_all(&top).unwrap();
    let mut last = watching.next().await;
    while let Some(change) = watching.next().await {
        last = Some(change);
    }
    assert_eq!(
        last.unwrap(),
        (FileChange::Removed, String::new(), String::new())
    );
}

#[tokio::test]
async fn what_is_made_deep_below_at_once_is_told_once_each() {
    let world = World::new().await;
    let top = folder(&world, "ada/deep");
    fs::create_dir(top.join("old")).unwrap();
    symlink("/", top.join("link")).unwrap();
    let mut watching = world.watch(&top, true).await;
    let mut made = Vec::new();
    for tree in 0..20 {
        let mut path = PathBuf::from("old");
        for depth in 0..6 {
            path.push(format!("{tree}-{depth}"));
            fs::create_dir(top.join(&path)).unwrap();
            made.push(path.to_string_lossy().into_owned());
            for name in ["x", "y"] {
                File::create(top.join(&path).join(name)).unwrap();
                made.push(path.join(name).to_string_lossy().into_owned());
            }
        }
    }
    File::create(top.join("last")).unwrap();
    made.push("last".into());
    let mut told = watching.created_until("last").await;
    // A directory is looked through with its own event, so the rest of the tree may still come after what is named last.
    while told.len() < made.len() {
        let (change, path, _) = watching.next().await.unwrap();
        if change == FileChange::Created {
            told.push(path);
        }
    }
    told.sort();
    made.sort();
    assert_eq!(told, made);

    // A moved tree has its new names; one that leaves is left.
    fs::rename(top.join("old/0-0"), top.join("new")).unwrap();
    File::create(top.join("new/0-1/0-2/here")).unwrap();
    let told = watching.created_until("new/0-1/0-2/here").await;
    assert_eq!(told.len(), 1, "{told:?}");
    fs::rename(top.join("new"), world.path("ada/away")).unwrap();
    File::create(world.path("ada/away/0-1/unseen")).unwrap();
    fs::remove_file(top.join("last")).unwrap();
    let seen = watching.until_removed("last").await;
    assert_eq!(seen.len(), 2, "{seen:?}");
    // Two that change places.
    let (one, two) = (top.join("old/1-0"), top.join("old/2-0"));
    renameat2(AT_FDCWD, &one, AT_FDCWD, &two, RenameFlags::RENAME_EXCHANGE).unwrap();
    File::create(one.join("2-1/here")).unwrap();
    watching.created_until("old/1-0/2-1/here").await;
}

#[tokio::test]
async fn a_file_that_is_replaced_is_watched_on() {
    let world = World::new().await;
    let top = folder(&world, "ada/files");
    fs::write(top.join("real"), "1").unwrap();
    symlink("real", top.join("link")).unwrap();
    let mut file = Watching {
        top: top.clone(),
        changes: world.try_watch("", &top.join("link"), false).await.unwrap(),
    };
    let first = (FileChange::Watching, "real".to_owned(), String::new());
    assert_eq!(file.next().await.unwrap(), first);
    for _ in 0..3 {
        fs::write(top.join("beside"), "2").unwrap();
        fs::rename(top.join("beside"), top.join("real")).unwrap();
        let saved = (FileChange::Created, "real".to_owned(), String::new());
        assert_eq!(file.next().await.unwrap(), saved);
    }
    fs::remove_file(top.join("real")).unwrap();
    let removed = (FileChange::Removed, "real".to_owned(), String::new());
    assert_eq!(file.next().await.unwrap(), removed);
}

#[tokio::test]
async fn a_reader_that_is_too_slow_is_told_and_the_watch_goes_on() {
    let world = World::new().await;
    let top = folder(&world, "ada/busy");
    let mut watching = world.watch(&top, true).await;
    // Names that are long fill what is on the way.
    let name = "n".repeat(200);
    for count in 0..MANY {
        File::create(top.join(format!("{name}{count}"))).unwrap();
    }
    fs::create_dir_all(top.join("a/b")).unwrap();
    while watching.next().await.unwrap().0 != FileChange::Overflow {}
    // What came to be unseen is watched.
    while !fs::exists(top.join("a/b/later")).unwrap() {
        File::create(top.join("a/b/later")).unwrap();
    }
    loop {
        let change = watching.next().await.unwrap();
        if change.1 == "a/b/later" {
            break;
        }
    }
}

#[tokio::test]
async fn a_watch_has_the_rights_of_its_user_and_a_limit() {
    let world = World::new().await;
    let top = folder(&world, "root/secret");
    chmod(world.path("root"), 0o755);
    chmod(&top, 0o700);
    let refused = world.try_watch("ada", &top, true).await.unwrap_err();
    assert_eq!(
        why(&refused),
        (Code::PermissionDenied, "PATH_PERMISSION_DENIED".into())
    );
    let missing = world.try_watch("", &top.join("no"), true).await;
    assert_eq!(
        why(&missing.unwrap_err()),
        (Code::NotFound, "PATH_NOT_FOUND".into())
    );
    // Below what ada may watch, what she may not read is left out.
    let mut watching = Watching {
        top: world.path("root"),
        changes: world
            .try_watch("ada", &world.path("root"), true)
            .await
            .unwrap(),
    };
    assert_eq!(watching.next().await.unwrap().0, FileChange::Watching);
    File::create(top.join("unseen")).unwrap();
    File::create(world.path("root/seen")).unwrap();
    assert_eq!(watching.next().await.unwrap().1, "seen");

    let mut kept = Vec::new();
    let refused = loop {
        match world.try_watch("", &top, false).await {
            Ok(watch) => kept.push(watch),
            Err(status) => break status,
        }
    };
    assert_eq!(
        why(&refused),
        (Code::ResourceExhausted, "TOO_MANY_WATCHES".into())
    );
    assert_eq!(kept.len(), 63);
    // Those who went make room.
    drop(kept);
    soon(async { while world.try_watch("", &top, false).await.is_err() {} }).await;
}

#[tokio::test]
async fn names_that_are_not_utf8_are_moved() {
    let world = World::new().await;
    let top = folder(&world, "ada/moved");
    let (from, to) = (
        top.join(OsStr::from_bytes(b"\xff")),
        top.join(OsStr::from_bytes(b"\xfe")),
    );
    fs::write(&from, "mine").unwrap();
    let request = MoveRequest {
        source_bytes: from.as_os_str().as_bytes().to_vec(),
        destination_bytes: to.as_os_str().as_bytes().to_vec(),
        ..Default::default()
    };
    let entry = soon(world.files().r#move(request.clone())).await.unwrap();
    assert_eq!(
        entry.into_inner().entry.unwrap().path_bytes,
        to.as_os_str().as_bytes()
    );
    assert_eq!(fs::read(&to).unwrap(), b"mine");
    let both = MoveRequest {
        source: "x".into(),
        ..request
    };
    let refused = soon(world.files().r#move(both)).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
}
