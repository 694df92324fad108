//! `sandmesh cp`: one file, either way.

use std::{io::IsTerminal as _, os::unix::fs::PermissionsExt as _};

use anyhow::{Context as _, bail};
use indicatif::{ProgressBar, ProgressStyle};
use proto::envd::v1::WriteHeader;
use sdk::Sandbox;
use tokio::fs::File;

use crate::context::Context;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// From: a file, ID:path, or -.
    source: String,
    /// To: a file, ID:path, or -.
    destination: String,
    /// User in the sandbox; default: the template's.
    #[arg(short, long, default_value = "")]
    user: String,
}

/// One side of a copy.
#[derive(Debug, PartialEq, Eq)]
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
    match (side(&options.source), side(&options.destination)) {
        (Side::Sandbox { id, path }, to) => {
            let sandbox = context.sandbox(id).await?;
            copy_out(&sandbox, path, to).await
        }
        (from, Side::Sandbox { id, path }) => {
            let sandbox = context.sandbox(id).await?;
            copy_in(&sandbox, from, path, &options.user).await
        }
        _ => bail!("one side must be in a sandbox: ID:path"),
    }
}

fn bar(total: u64) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(total);
    if let Ok(style) =
        ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} {bytes_per_sec}")
    {
        bar.set_style(style);
    }
    bar
}

async fn copy_out(sandbox: &Sandbox, path: &str, to: Side<'_>) -> anyhow::Result<()> {
    match to {
        Side::Standard => {
            sandbox
                .read_to(path, &mut tokio::io::stdout(), |_| {})
                .await?;
        }
        Side::Local(local) => {
            let total = sandbox.stat(path).await?.size_bytes;
            let name = path.rsplit('/').next().unwrap_or(path);
            let target = std::path::Path::new(local);
            let target = if target.is_dir() {
                target.join(name)
            } else {
                target.to_owned()
            };
            // Beside its place first, so that a copy that breaks leaves what was there.
            let part = target.with_file_name(format!(
                ".{}.part",
                target.file_name().unwrap_or_default().to_string_lossy()
            ));
            let mut file = File::create(&part)
                .await
                .with_context(|| part.display().to_string())?;
            let bar = bar(total);
            let copied = sandbox
                .read_to(path, &mut file, |count| bar.set_position(count))
                .await;
            bar.finish_and_clear();
            if let Err(error) = copied {
                tokio::fs::remove_file(&part).await?;
                return Err(error.into());
            }
            tokio::fs::rename(&part, &target).await?;
        }
        Side::Sandbox { .. } => bail!("one side must be here: copy out first, then in"),
    }
    Ok(())
}

async fn copy_in(sandbox: &Sandbox, from: Side<'_>, path: &str, user: &str) -> anyhow::Result<()> {
    let mut header = WriteHeader {
        path: path.into(),
        user: user.into(),
        ..WriteHeader::default()
    };
    match from {
        Side::Standard => {
            sandbox
                .write_from(header, &mut tokio::io::stdin(), |_| {})
                .await?;
        }
        Side::Local(local) => {
            let mut file = File::open(local).await.with_context(|| local.to_owned())?;
            let metadata = file.metadata().await?;
            if metadata.is_dir() {
                bail!("{local} is a folder: only files are copied in this version");
            }
            header.mode = Some(metadata.permissions().mode() & 0o777);
            if path.is_empty() || path.ends_with('/') {
                let name = local.rsplit('/').next().unwrap_or(local);
                header.path = if path.is_empty() {
                    name.to_owned()
                } else {
                    format!("{path}{name}")
                };
            }
            let bar = bar(metadata.len());
            let copied = sandbox
                .upload(header, &mut file, |count| bar.set_position(count))
                .await;
            bar.finish_and_clear();
            copied?;
        }
        Side::Sandbox { .. } => bail!("one side must be here"),
    }
    Ok(())
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
