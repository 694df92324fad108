//! `sandmesh cp`: files and folders, either way.
//!
//! What a sandbox says of its files is not trusted: nothing it names is written outside the folder that was named here, neither by `..` nor through
//! symbolic links, be they there from an earlier copy.

use std::{
    ffi::{OsStr, OsString},
    io::IsTerminal as _,
    os::unix::{ffi::OsStrExt as _, fs::PermissionsExt as _},
    path::Path,
};

use anyhow::{Context as _, bail};
use cap_std::{ambient_authority, fs::Dir};
use indicatif::{ProgressBar, ProgressStyle};
use proto::envd::v1::{Entry, FileType, ReadRequest, StatRequest, WriteHeader};
use sdk::Sandbox;
use tokio::fs::File;
use tonic::Code;

use crate::context::Context;

mod tree;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// From: a file or folder, ID:path, or - (standard input).
    source: String,
    /// To: a file or folder, ID:path, or - (standard output).
    destination: String,
    /// Folders too, with all that is in them.
    #[arg(short, long)]
    recursive: bool,
    /// User in the sandbox; default: the template's.
    #[arg(short, long, default_value = "")]
    user: String,
}

/// One side of a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side<'a> {
    Local(&'a str),
    Sandbox { id: &'a str, path: &'a str },
    Standard,
}

pub(crate) fn side(text: &str) -> Side<'_> {
    if text == "-" {
        return Side::Standard;
    }
    match text.split_once(':') {
        Some((id, path)) if service_kit::ids::SessionId::parse(id).is_ok() => {
            Side::Sandbox { id, path }
        }
        _ => Side::Local(text),
    }
}

pub(crate) async fn run(context: &Context, options: &Options) -> anyhow::Result<()> {
    let ends = match (side(&options.source), side(&options.destination)) {
        (Side::Sandbox { .. }, Side::Sandbox { .. }) => {
            bail!("one side must be here: copy out first, then in")
        }
        (Side::Sandbox { id, path }, to) => (id, path, to, true),
        (from, Side::Sandbox { id, path }) => (id, path, from, false),
        _ => bail!("one side must be in a sandbox: ID:path"),
    };
    let (id, path, here, is_out) = ends;
    let copying = Copying {
        sandbox: context.sandbox(id).await?,
        user: options.user.clone(),
        is_recursive: options.recursive,
    };
    let path = if path.is_empty() { "~" } else { path };
    match (here, is_out) {
        (Side::Local(local), true) => copying.out(path, Path::new(local)).await,
        (Side::Local(local), false) => copying.within(Path::new(local), path).await,
        (_, true) => {
            let request = copying.reading(path);
            let mut stdout = tokio::io::stdout();
            copying
                .sandbox
                .download(request, &mut stdout, |_| {})
                .await?;
            Ok(())
        }
        (_, false) => {
            let header = WriteHeader {
                path: path.into(),
                user: copying.user.clone(),
                ..WriteHeader::default()
            };
            let mut stdin = tokio::io::stdin();
            copying
                .sandbox
                .write_from(header, &mut stdin, |_| {})
                .await?;
            Ok(())
        }
    }
}

struct Copying {
    sandbox: Sandbox,
    user: String,
    is_recursive: bool,
}

impl Copying {
    fn reading(&self, path: &str) -> ReadRequest {
        ReadRequest {
            path: path.into(),
            user: self.user.clone(),
            ..ReadRequest::default()
        }
    }

    async fn stat(&self, path: &str) -> Result<Entry, sdk::Error> {
        let request = StatRequest {
            path: path.into(),
            user: self.user.clone(),
            ..StatRequest::default()
        };
        let answer = self.sandbox.filesystem().stat(request).await?.into_inner();
        answer.entry.ok_or(sdk::Error::Incomplete("entry"))
    }

    async fn out(&self, path: &str, local: &Path) -> anyhow::Result<()> {
        let entry = self.stat(path).await?;
        let from = Path::new(OsStr::from_bytes(&entry.path_bytes));
        let name = from.file_name();
        let target = match name {
            Some(name) if local.is_dir() => local.join(name),
            _ => local.to_owned(),
        };
        if entry.r#type() == FileType::Directory {
            self.may_recurse(path)?;
            return self.tree_out(from, &target).await;
        }
        let parent = target
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty());
        let parent = parent.unwrap_or(Path::new("."));
        let folder = Dir::open_ambient_dir(parent, ambient_authority())
            .with_context(|| parent.display().to_string())?;
        let name = target
            .file_name()
            .context("the destination names no file")?;
        let meter = Meter::new(entry.size_bytes);
        let copied = self
            .file_out(&entry, &folder, Path::new(name), &meter)
            .await;
        meter.end();
        copied
    }

    /// Copies a file out, beside its place first, so that a copy that breaks leaves what was there.
    async fn file_out(
        &self,
        entry: &Entry,
        folder: &Dir,
        to: &Path,
        meter: &Meter,
    ) -> anyhow::Result<()> {
        let mut part = OsString::from(".");
        part.push(to.file_name().unwrap_or_default());
        part.push(".part");
        let part = to.with_file_name(part);
        let file = folder
            .create(&part)
            .with_context(|| part.display().to_string())?;
        let mut file = File::from_std(file.into_std());
        let request = ReadRequest {
            path_bytes: entry.path_bytes.clone(),
            ..self.reading("")
        };
        let mut copied = self
            .sandbox
            .download(request, &mut file, meter.of_one())
            .await
            .map_err(anyhow::Error::from);
        if copied.is_ok() {
            let mode = std::fs::Permissions::from_mode(entry.mode & 0o777);
            copied = match file.set_permissions(mode).await {
                Ok(()) => folder.rename(&part, folder, to).map(|()| 0),
                Err(error) => Err(error),
            }
            .map_err(anyhow::Error::from);
        }
        if copied.is_err() {
            // What matters is why it was not copied.
            let _ = folder.remove_file(&part);
        }
        copied.map(drop)
    }

    async fn within(&self, local: &Path, path: &str) -> anyhow::Result<()> {
        let shown = || local.display().to_string();
        let metadata = tokio::fs::metadata(local).await.with_context(shown)?;
        let name = local.file_name();
        let place = match self.stat(path).await {
            Ok(there) if there.r#type() == FileType::Directory => {
                let mut place = there.path_bytes;
                if let Some(name) = name {
                    place.push(b'/');
                    place.extend(name.as_bytes());
                }
                Place::Bytes(place)
            }
            Err(error) if error.code() != Some(Code::NotFound) => return Err(error.into()),
            Err(_) if path.ends_with('/') && !metadata.is_dir() => {
                bail!("{path}: no such folder")
            }
            _ => Place::Text(path.to_owned()),
        };
        if metadata.is_dir() {
            self.may_recurse(&shown())?;
            return self.tree_within(local, place).await;
        }
        let meter = Meter::new(metadata.len());
        let copied = self.file_within(local, place, &meter).await;
        meter.end();
        copied
    }

    async fn file_within(&self, local: &Path, place: Place, meter: &Meter) -> anyhow::Result<()> {
        let mut file = File::open(local)
            .await
            .with_context(|| local.display().to_string())?;
        let (path, path_bytes) = place.fields();
        let header = WriteHeader {
            path,
            path_bytes,
            user: self.user.clone(),
            mode: Some(file.metadata().await?.permissions().mode() & 0o777),
            ..WriteHeader::default()
        };
        self.sandbox
            .upload(header, &mut file, meter.of_one())
            .await?;
        Ok(())
    }

    fn may_recurse(&self, folder: &str) -> anyhow::Result<()> {
        if self.is_recursive {
            return Ok(());
        }
        bail!("{folder} is a folder: copy it with -r")
    }
}

/// Where something goes in a sandbox: as it was typed, or as it is known to be.
enum Place {
    Text(String),
    Bytes(Vec<u8>),
}

impl Place {
    /// For `path` and `path_bytes` of a request.
    fn fields(self) -> (String, Vec<u8>) {
        match self {
            Self::Text(path) => (path, Vec::new()),
            Self::Bytes(bytes) => match String::from_utf8(bytes) {
                // Messages name what is sent as text.
                Ok(path) => (path, Vec::new()),
                Err(error) => (String::new(), error.into_bytes()),
            },
        }
    }
}

/// Shows on a terminal how far a copy is.
struct Meter(ProgressBar);

impl Meter {
    fn new(total: u64) -> Self {
        if !std::io::stderr().is_terminal() {
            return Self(ProgressBar::hidden());
        }
        let bar = ProgressBar::new(total);
        let template = "{bar:30} {bytes}/{total_bytes} {bytes_per_sec} {msg}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        Self(bar)
    }

    /// For what one of the files tells; an upload that broke off goes on from before.
    fn of_one(&self) -> impl FnMut(u64) + use<> {
        let bar = self.0.clone();
        let mut last = 0;
        move |count| {
            if count >= last {
                bar.inc(count - last);
            } else {
                bar.dec(last - count);
            }
            last = count;
        }
    }

    fn end(&self) {
        self.0.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_are_told_apart() {
        let id = "abcde0123456789abcdefghij";
        assert_eq!(side("-"), Side::Standard);
        assert_eq!(side("a/b"), Side::Local("a/b"));
        assert_eq!(side("a:b"), Side::Local("a:b"));
        assert_eq!(
            side(&format!("{id}:~/x")),
            Side::Sandbox { id, path: "~/x" }
        );
    }
}
