//! `sandmesh ls` and `sandmesh watch`.

use anyhow::bail;
use proto::envd::v1::{
    Entry, FileChange, FileType, FilesystemServiceListRequest, FilesystemServiceListResponse,
    FilesystemServiceWatchRequest, FilesystemServiceWatchResponse, StatRequest,
};

use super::cp::{Side, side};
use crate::{
    context::Context,
    output::{self, Format},
};

#[derive(Debug, clap::Args)]
pub(crate) struct LsOptions {
    /// The folder.
    #[arg(value_name = "ID:PATH")]
    folder: String,
    /// Also what is in its folders, so many levels deep.
    #[arg(short, long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    depth: u32,
    /// Only what matches: *, ?, [a-z], {a,b}, and ** across folders; without a slash, the name.
    #[arg(short, long, default_value = "")]
    pattern: String,
    /// User in the sandbox; default: the template's.
    #[arg(short, long, default_value = "")]
    user: String,
}

pub(crate) async fn ls(context: &Context, options: &LsOptions) -> anyhow::Result<()> {
    let (id, path) = in_sandbox(&options.folder)?;
    let request = FilesystemServiceListRequest {
        path: path.to_owned(),
        depth: options.depth,
        pattern: options.pattern.clone(),
        user: options.user.clone(),
        ..Default::default()
    };
    let sandbox = context.sandbox(id).await?;
    // Names of what is further below are from the folder on, so where that is must be known.
    let stat = StatRequest {
        path: path.to_owned(),
        user: options.user.clone(),
        ..Default::default()
    };
    let folder = sandbox
        .filesystem()
        .stat(stat)
        .await
        .map_err(sdk::Error::from)?;
    let folder = folder.into_inner().entry.unwrap_or_default().path_bytes;
    let entries = sandbox.list_all(request).await?;
    let answer = FilesystemServiceListResponse {
        entries,
        next_page_token: String::new(),
    };
    let name = "sandmesh.envd.v1.FilesystemServiceListResponse";
    output::print(context.format(), name, answer, |answer| {
        let rows = answer.entries.iter().map(|entry| row(entry, &folder));
        output::table(
            &["mode", "uid", "gid", "size", "modified", "name"],
            rows.collect(),
        );
    })
}

/// The sandbox's side, as `cp` names it; without a path it is the user's home.
fn in_sandbox(text: &str) -> anyhow::Result<(&str, &str)> {
    match side(text) {
        Side::Sandbox { id, path: "" } => Ok((id, "~")),
        Side::Sandbox { id, path } => Ok((id, path)),
        Side::Local(_) | Side::Standard => {
            bail!("`{text}` names no path of a session: give ID:PATH")
        }
    }
}

fn row(entry: &Entry, folder: &[u8]) -> Vec<String> {
    let path = entry.path_bytes.as_slice();
    let name = path.strip_prefix(folder).unwrap_or(path);
    let name = name.strip_prefix(b"/").unwrap_or(name);
    let mut name = String::from_utf8_lossy(name).into_owned();
    if entry.r#type() == FileType::Symlink {
        name = format!(
            "{name} -> {}",
            String::from_utf8_lossy(&entry.symlink_target)
        );
    }
    vec![
        mode(entry),
        entry.uid.to_string(),
        entry.gid.to_string(),
        entry.size_bytes.to_string(),
        output::time(entry.modify_time),
        output::plain(&name),
    ]
}

/// As ls(1) writes it, but for what is no file, directory or link.
fn mode(entry: &Entry) -> String {
    let kind = match entry.r#type() {
        FileType::File => '-',
        FileType::Directory => 'd',
        FileType::Symlink => 'l',
        FileType::Other | FileType::Unspecified => '?',
    };
    let is = |bit: u32| entry.mode & bit != 0;
    let execute = |may: bool, special: bool, letter: char| match (may, special) {
        (true, true) => letter,
        (false, true) => letter.to_ascii_uppercase(),
        (true, false) => 'x',
        (false, false) => '-',
    };
    let mut text = String::from(kind);
    for (shift, special, letter) in [(6, 0o4000, 's'), (3, 0o2000, 's'), (0, 0o1000, 't')] {
        text.push(if is(0o4 << shift) { 'r' } else { '-' });
        text.push(if is(0o2 << shift) { 'w' } else { '-' });
        text.push(execute(is(0o1 << shift), is(special), letter));
    }
    text
}

#[derive(Debug, clap::Args)]
pub(crate) struct WatchOptions {
    /// The folder or file.
    #[arg(value_name = "ID:PATH")]
    path: String,
    /// Also everything below it.
    #[arg(short, long)]
    recursive: bool,
    /// User in the sandbox; default: the template's.
    #[arg(short, long, default_value = "")]
    user: String,
}

pub(crate) async fn watch(context: &Context, options: WatchOptions) -> anyhow::Result<()> {
    let (id, path) = in_sandbox(&options.path)?;
    let request = FilesystemServiceWatchRequest {
        path: path.to_owned(),
        user: options.user,
        recursive: options.recursive,
        ..Default::default()
    };
    let mut changes = context.sandbox(id).await?.watch_files(request);
    while let Some(change) = changes.next().await? {
        match context.format() {
            Format::Table => output::line(&line(&change))?,
            json @ Format::Json => {
                let name = "sandmesh.envd.v1.FilesystemServiceWatchResponse";
                output::print(json, name, change, |_| {})?;
            }
        }
    }
    Ok(())
}

fn line(change: &FilesystemServiceWatchResponse) -> String {
    let word = output::short(change.change().as_str_name(), "FILE_CHANGE_").to_lowercase();
    let shown = |path: &[u8]| output::plain(&String::from_utf8_lossy(path));
    let slash = if change.is_directory { "/" } else { "" };
    let path = shown(&change.path_bytes);
    match change.change() {
        FileChange::Renamed => {
            let to = shown(&change.new_path_bytes);
            format!("{word:<10} {path}{slash} -> {to}{slash}")
        }
        FileChange::Overflow => format!("{word:<10} {path}: some changes were not told; look anew"),
        _ => format!("{word:<10} {path}{slash}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mode_is_shown_as_by_ls() {
        let shown = |r#type: FileType, mode_bits| {
            mode(&Entry {
                r#type: r#type.into(),
                mode: mode_bits,
                ..Entry::default()
            })
        };
        assert_eq!(shown(FileType::File, 0o644), "-rw-r--r--");
        assert_eq!(shown(FileType::Directory, 0o1777), "drwxrwxrwt");
        assert_eq!(shown(FileType::File, 0o6755), "-rwsr-sr-x");
        assert_eq!(shown(FileType::Symlink, 0o4600), "lrwS------");
    }

    #[test]
    fn a_change_is_a_line_whatever_its_name() {
        let change = FilesystemServiceWatchResponse {
            change: FileChange::Renamed.into(),
            path_bytes: b"/a\nb".to_vec(),
            new_path_bytes: b"/\xff".to_vec(),
            is_directory: true,
        };
        insta::assert_snapshot!(line(&change), @r"renamed    /a\nb/ -> /�/");
    }
}
