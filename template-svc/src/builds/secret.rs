//! `RUN --mount=type=secret`: what a step may know, and no layer.
//!
//! ```text
//!   builds.secrets, sealed --> template-svc, for this step --> /run of the session, in memory --> the step --> removed
//!                                        |
//!                                        +--> a variable of the step's process
//! ```
//! A layer is what lies on the session's disk, and `/run` does not (`envd/src/boot.rs`). A target that is elsewhere is a symbolic link to there: it,
//! and folders made for it, are removed before the layer is taken, and the folder they lay in has its time again. If something in between fails, so
//! does the step, and nothing of its session is taken.

use std::{collections::BTreeMap, io, time::Duration};

use proto::{
    envd::v1::{
        Entry, FileType, MakeDirectoryRequest, MakeSymlinkRequest, MoveRequest, RemoveRequest,
        StatRequest, WriteHeader,
    },
    template::v1::BuildSecret,
};
use sdk::Sandbox;
use service_kit::errors::reason_of;
use tar::{EntryType, Header};
use tonic::{Code, Status};

use super::{
    BuildError, Builder, blocking,
    copy::is_missing,
    failed, io_failed,
    steps::{Building, Running},
};
use crate::{
    dockerfile::{Secret, words},
    sessions::{End, is_unanswered, patiently},
};

/// Where values are written first, in a folder that no step before can have made.
const PLACE: &str = "/run/sandmesh-secrets-";
const ROOT: &str = "root";
/// Everything before a step, and everything after it, takes no longer.
const LIMIT: Duration = Duration::from_mins(3);
/// Of a variable, with its name, what ends it and the `=` (`MAX_ARG_STRLEN`, execve(2)); of all of a step's, for which the rest is to have room.
const LONGEST_VARIABLE: usize = 128 << 10;
const MOST_VARIABLES: usize = 512 << 10;
/// Links in each other (path_resolution(7)).
const MOST_LINKS: usize = 40;

/// What a step has been lent.
#[derive(Default)]
pub(super) struct Lent {
    /// Variables of its process.
    pub(super) env: Vec<(String, String)>,
    /// In which values lie.
    place: String,
    /// Files, or links to them.
    files: Vec<String>,
    /// Folders that were not there, each before those in it.
    made: Vec<String>,
    /// Folders that were there, and have something in them now, by their path without links.
    changed: BTreeMap<String, Changed>,
}

/// A folder before it was changed, and since then.
struct Changed {
    before: Entry,
    since: Entry,
}

impl Builder {
    /// Lends a step its secrets.
    pub(super) async fn lend(
        &self,
        building: &Building,
        running: &Running,
        step: &str,
        secrets: &[Secret],
    ) -> Result<Lent, BuildError> {
        if secrets.is_empty() {
            return Ok(Lent::default());
        }
        let id = &building.stored.build.build_id;
        let given = self.opened(&building.stored)?.secrets;
        let mut lent = Lent {
            place: format!("{PLACE}{:016x}", rand::random::<u64>()),
            ..Lent::default()
        };
        let lending = async {
            for secret in secrets {
                if let Some(value) = value_of(&given, secret, step)? {
                    lent.add(running.sandbox()?, secret, value, step).await?;
                } else {
                    let name = &secret.id;
                    let line = format!("the secret {name:?} was not given; the step does without");
                    self.store.log(id, &line).await?;
                }
            }
            lent.note_times(running.sandbox()?).await
        };
        in_time(step, lending).await?;
        Ok(lent)
    }

    /// Leaves nothing of it, once the step has ended.
    pub(super) async fn take_back(
        &self,
        building: &Building,
        running: &Running,
        step: &str,
        lent: Lent,
    ) -> Result<(), BuildError> {
        if lent.files.is_empty() {
            return Ok(());
        }
        let taking = async {
            let sandbox = running.sandbox()?;
            let untouched = lent.untouched(sandbox).await?;
            lent.remove(sandbox).await?;
            for (path, before) in untouched {
                // It may have been one that was made for another secret.
                if !is_folder(stat(sandbox, &path, true).await?.as_ref()) {
                    continue;
                }
                // Of the root itself no layer says anything.
                let name = path.rsplit_once('/').map_or("", |(_, name)| name);
                if name.is_empty() {
                    continue;
                }
                let (making, name) = (building.making.clone(), name.to_owned());
                let tarball = blocking(move || {
                    let mut tarball = making.scratch()?;
                    pack_folder(&mut tarball, &name, &before).map_err(io_failed)?;
                    Ok(tarball)
                });
                running
                    .restore(step, parent_of(&path), tarball.await?)
                    .await?;
            }
            Ok(())
        };
        in_time(step, taking).await
    }
}

impl Lent {
    async fn add(
        &mut self,
        sandbox: &Sandbox,
        secret: &Secret,
        value: &[u8],
        step: &str,
    ) -> Result<(), BuildError> {
        if let Some(name) = &secret.env {
            let variable = as_variable(name, value);
            let variable = variable.map_err(|why| invalid(step, secret, why))?;
            self.env.push((name.clone(), variable));
            let bytes: usize = self.env.iter().map(|(_, value)| value.len()).sum();
            if bytes > MOST_VARIABLES {
                let why = format!("its variables are more than {MOST_VARIABLES} bytes together");
                return Err(invalid(step, secret, &why));
            }
        }
        let Some(target) = &secret.target else {
            return Ok(());
        };
        let refused = |error: sdk::Error| refused(step, secret, target, error);
        let place = format!("{}/{}", self.place, self.files.len());
        let header = WriteHeader {
            path: place.clone(),
            user: ROOT.to_owned(),
            mode: Some(secret.mode),
            uid: Some(secret.uid),
            gid: Some(secret.gid),
            make_parents: true,
            ..WriteHeader::default()
        };
        let value_bytes = value.len() as u64;
        let mut value = io::Cursor::new(value.to_vec());
        let written = sandbox.upload(header, &mut value, |_| {}).await;
        written.map_err(refused)?;
        self.make_folders(sandbox, target, step, secret).await?;
        // Where it is of the same file system, /run, it is a file; the kernel knows, whatever links lead there.
        let request = MoveRequest {
            source: place.clone(),
            destination: target.clone(),
            user: ROOT.to_owned(),
            ..MoveRequest::default()
        };
        let moving = || {
            let request = request.clone();
            async move { sandbox.filesystem().r#move(request).await }
        };
        match patiently(is_unanswered, moving).await {
            Err(status) if is_elsewhere(&status) => {
                let request = MakeSymlinkRequest {
                    path: target.clone(),
                    user: ROOT.to_owned(),
                    target: place.clone().into_bytes(),
                    ..MakeSymlinkRequest::default()
                };
                let making = || {
                    let request = request.clone();
                    async move { sandbox.filesystem().make_symlink(request).await }
                };
                if let Err(status) = patiently(is_unanswered, making).await {
                    // One that was asked for before may have been made, and nobody was told.
                    let there = stat(sandbox, target, true).await.map_err(refused)?;
                    if there.is_none_or(|there| there.symlink_target != place.as_bytes()) {
                        return Err(refused(status.into()));
                    }
                }
            }
            Err(status) if is_missing(&status) => {
                // The same, if nothing is left where it was.
                let there = stat(sandbox, target, true).await.map_err(refused)?;
                let is_it = |there: &Entry| {
                    there.r#type() == FileType::File
                        && there.size_bytes == value_bytes
                        && (there.uid, there.gid) == (secret.uid, secret.gid)
                };
                if !there.as_ref().is_some_and(is_it) {
                    return Err(refused(status.into()));
                }
            }
            moved => {
                moved.map_err(|status| refused(status.into()))?;
            }
        }
        self.files.push(target.clone());
        Ok(())
    }

    /// Makes the folders that a file lies in, and remembers which.
    async fn make_folders(
        &mut self,
        sandbox: &Sandbox,
        target: &str,
        step: &str,
        secret: &Secret,
    ) -> Result<(), BuildError> {
        let refused = |error: sdk::Error| refused(step, secret, target, error);
        let folder = parent_of(target);
        let mut missing = Vec::new();
        let mut there = folder;
        while there != "/"
            && stat(sandbox, there, false)
                .await
                .map_err(refused)?
                .is_none()
        {
            missing.push(there.to_owned());
            there = parent_of(there);
        }
        let there = without_links(sandbox, there).await?;
        if let Some(before) = stat(sandbox, &there, true).await? {
            let since = before.clone();
            let changed = Changed { before, since };
            self.changed.entry(there).or_insert(changed);
        }
        if missing.is_empty() {
            return Ok(());
        }
        let request = MakeDirectoryRequest {
            path: folder.to_owned(),
            user: ROOT.to_owned(),
            ..MakeDirectoryRequest::default()
        };
        let making = || {
            let request = request.clone();
            async move { sandbox.filesystem().make_directory(request).await }
        };
        let made = patiently(is_unanswered, making).await;
        made.map_err(|status| refused(status.into()))?;
        self.made.extend(missing.into_iter().rev());
        Ok(())
    }

    /// What it looks like before the step.
    async fn note_times(&mut self, sandbox: &Sandbox) -> Result<(), BuildError> {
        for (path, folder) in &mut self.changed {
            if let Some(since) = stat(sandbox, path, true).await? {
                folder.since = since;
            }
        }
        Ok(())
    }

    /// Folders in which the step has made nothing, and removed nothing, as they were before.
    async fn untouched(&self, sandbox: &Sandbox) -> Result<Vec<(String, Entry)>, BuildError> {
        let mut untouched = Vec::new();
        for (path, folder) in &self.changed {
            let now = stat(sandbox, path, true).await?;
            let is_same = |now: &Entry| now.modify_time == folder.since.modify_time;
            // Owner and permissions the step may have changed all the same.
            if let Some(now) = now.filter(|now| is_folder(Some(now)) && is_same(now)) {
                let modify_time = folder.before.modify_time;
                untouched.push((path.clone(), Entry { modify_time, ..now }));
            }
        }
        Ok(untouched)
    }

    /// Removes files and folders.
    async fn remove(&self, sandbox: &Sandbox) -> Result<(), BuildError> {
        // Whatever stands there now: a program that writes a file anew puts it in the link's place.
        for file in &self.files {
            remove(sandbox, file, true).await?;
        }
        for folder in self.made.iter().rev() {
            // In which the step may have made something.
            if is_folder(stat(sandbox, folder, true).await?.as_ref()) {
                remove(sandbox, folder, false).await?;
            }
        }
        remove(sandbox, &self.place, true).await
    }
}

async fn in_time<T>(
    step: &str,
    work: impl Future<Output = Result<T, BuildError>>,
) -> Result<T, BuildError> {
    let late = |_| {
        let limit = LIMIT.as_secs();
        let message = format!("{step}: its secrets took more than {limit} s");
        // Whoever has not answered may be gone.
        BuildError::Sandbox {
            end: End::new("SANDBOX_FAILED", message),
            is_gone: false,
        }
    };
    tokio::time::timeout(LIMIT, work).await.map_err(late)?
}

/// The value, if there is one, or need not be.
fn value_of<'a>(
    given: &'a [BuildSecret],
    secret: &Secret,
    step: &str,
) -> Result<Option<&'a [u8]>, BuildError> {
    let id = &secret.id;
    let found = given.iter().find(|given| given.id == *id);
    if found.is_none() && secret.is_required {
        let message = format!("{step}: the secret {id:?}, which it requires, was not given");
        return Err(failed("SECRET_MISSING", message));
    }
    Ok(found.map(|found| &*found.value))
}

/// A value that can be a variable's; why it cannot.
fn as_variable(name: &str, value: &[u8]) -> Result<String, &'static str> {
    let value = str::from_utf8(value).map_err(|_| "is no UTF-8, and no variable can hold it")?;
    if value.contains('\0') {
        return Err("has a NUL in it, and no variable can hold it");
    }
    if name.len() + value.len() + 2 > LONGEST_VARIABLE {
        return Err("is longer than a variable may be, 128 KiB");
    }
    Ok(value.to_owned())
}

fn invalid(step: &str, secret: &Secret, why: &str) -> BuildError {
    let message = format!("{step}: the secret {:?} {why}", secret.id);
    failed("SECRET_INVALID", message)
}

/// The session has its reasons, or cannot be asked.
fn refused(step: &str, secret: &Secret, target: &str, error: sdk::Error) -> BuildError {
    let why = match error.code() {
        Some(Code::AlreadyExists) => "there is something of that name".to_owned(),
        _ => error.to_string(),
    };
    if let lost @ BuildError::Sandbox { .. } = error.into() {
        return lost;
    }
    let message = format!(
        "{step}: the secret {:?} cannot be put at {target}: {why}",
        secret.id
    );
    failed("STEP_FAILED", message)
}

/// Whether nothing is there, nor can be.
fn is_not_there(status: &Status) -> bool {
    is_missing(status) || reason_of(status).is_some_and(|why| why == "PATH_NOT_A_DIRECTORY")
}

fn is_elsewhere(status: &Status) -> bool {
    reason_of(status).is_some_and(|reason| reason == "PATH_ON_ANOTHER_FILESYSTEM")
}

fn is_folder(entry: Option<&Entry>) -> bool {
    entry.is_some_and(|entry| entry.r#type() == FileType::Directory)
}

/// What is there, if something is.
async fn stat(sandbox: &Sandbox, path: &str, no_follow: bool) -> Result<Option<Entry>, sdk::Error> {
    let request = StatRequest {
        path: path.to_owned(),
        user: ROOT.to_owned(),
        no_follow,
        ..StatRequest::default()
    };
    let asking = || {
        let request = request.clone();
        async move { sandbox.filesystem().stat(request).await }
    };
    match patiently(is_unanswered, asking).await {
        Ok(answer) => Ok(answer.into_inner().entry),
        Err(status) if is_not_there(&status) => Ok(None),
        Err(status) => Err(status.into()),
    }
}

/// Removes what is there; a folder that is not empty only if that is meant.
async fn remove(sandbox: &Sandbox, path: &str, recursive: bool) -> Result<(), BuildError> {
    let request = RemoveRequest {
        path: path.to_owned(),
        user: ROOT.to_owned(),
        recursive,
        ..RemoveRequest::default()
    };
    let removing = || {
        let request = request.clone();
        async move { sandbox.filesystem().remove(request).await }
    };
    match patiently(is_unanswered, removing).await {
        Err(status) if is_not_there(&status) => Ok(()),
        Err(status)
            if !recursive
                && reason_of(&status).is_some_and(|reason| reason == "DIRECTORY_NOT_EMPTY") =>
        {
            Ok(())
        }
        removed => {
            removed.map_err(sdk::Error::from)?;
            Ok(())
        }
    }
}

/// A folder by a name that is no link itself.
async fn without_links(sandbox: &Sandbox, path: &str) -> Result<String, BuildError> {
    let mut path = path.to_owned();
    for _ in 0..MOST_LINKS {
        let entry = stat(sandbox, &path, true).await?.unwrap_or_default();
        if entry.r#type() != FileType::Symlink {
            break;
        }
        let target = String::from_utf8_lossy(&entry.symlink_target);
        path = words::join(parent_of(&path), &target);
    }
    Ok(path)
}

/// The folder of an absolute path.
fn parent_of(path: &str) -> &str {
    match path.rsplit_once('/') {
        Some(("", _)) | None => "/",
        Some((parent, _)) => parent,
    }
}

/// A tarball of a folder alone, as it is to be.
fn pack_folder(to: impl io::Write, name: &str, entry: &Entry) -> io::Result<()> {
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::Directory);
    header.set_mode(entry.mode);
    header.set_uid(entry.uid.into());
    header.set_gid(entry.gid.into());
    let modified = entry.modify_time.unwrap_or_default().seconds;
    header.set_mtime(modified.try_into().unwrap_or_default());
    header.set_size(0);
    let mut tarball = tar::Builder::new(to);
    tarball.append_data(&mut header, name, io::empty())?;
    tarball.into_inner()?.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(id: &str, is_required: bool) -> Secret {
        Secret {
            id: id.into(),
            target: None,
            env: None,
            is_required,
            mode: 0o400,
            uid: 0,
            gid: 0,
        }
    }

    #[test]
    fn a_secret_that_is_required_must_be_there() {
        let given = [BuildSecret {
            id: "a".into(),
            value: b"x".to_vec(),
        }];
        let value = |secret: &Secret| value_of(&given, secret, "line 2: RUN x");
        assert_eq!(value(&secret("a", true)).unwrap().unwrap(), b"x");
        assert!(value(&secret("b", false)).unwrap().is_none());
        let Err(BuildError::Failed { reason, message }) = value(&secret("b", true)) else {
            panic!()
        };
        assert_eq!(reason, "SECRET_MISSING");
        assert!(
            message.starts_with("line 2: RUN x: the secret \"b\""),
            "{message}"
        );
    }

    #[test]
    fn what_no_variable_can_hold_is_told() {
        assert_eq!(as_variable("A", b"one\ntwo\n").unwrap(), "one\ntwo\n");
        let long = vec![b'x'; LONGEST_VARIABLE - 3];
        assert_eq!(as_variable("A", &long).unwrap().len(), long.len());
        let too_long = vec![b'x'; LONGEST_VARIABLE - 2];
        for value in [&b"\xff"[..], b"a\0b", &too_long] {
            assert!(as_variable("A", value).is_err());
        }
    }

    #[test]
    fn folders_of_paths() {
        for (path, parent) in [("/a/b", "/a"), ("/a", "/"), ("/", "/")] {
            assert_eq!(parent_of(path), parent);
        }
    }
}
