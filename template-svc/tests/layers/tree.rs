//! What is in a folder, file by file, so that two can be compared.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::{
        ffi::OsStrExt as _,
        fs::{FileTypeExt as _, MetadataExt as _},
    },
    path::Path,
};

use walkdir::WalkDir;

/// Paths, printable, and all there is to say of each.
pub(crate) type Tree = BTreeMap<String, String>;

/// What of one is not as in the other, for people.
pub(crate) fn differences(ours: &Tree, theirs: &Tree) -> Vec<String> {
    let names: BTreeSet<&String> = ours.keys().chain(theirs.keys()).collect();
    let differs = |name: &&String| ours.get(*name) != theirs.get(*name);
    let said = |name: &String| {
        format!(
            "{name}:\n  ours {:?}\n  theirs {:?}",
            ours.get(name),
            theirs.get(name)
        )
    };
    names.into_iter().filter(differs).map(said).collect()
}

pub(crate) fn read(root: &Path) -> Tree {
    // The first name of each file: others say that they are the same.
    let mut first = BTreeMap::new();
    let mut tree = Tree::new();
    for entry in WalkDir::new(root).sort_by_file_name() {
        let entry = entry.unwrap();
        let path = entry.path();
        let name = path.strip_prefix(root).unwrap().as_os_str().as_bytes();
        let name = name.escape_ascii().to_string();
        let metadata = fs::symlink_metadata(path).unwrap();
        let kind = metadata.file_type();
        let what = if kind.is_dir() {
            "folder".to_owned()
        } else if kind.is_symlink() {
            let target = fs::read_link(path).unwrap();
            format!("link to {}", target.as_os_str().as_bytes().escape_ascii())
        } else if kind.is_file() {
            let content = fs::read(path).unwrap();
            let blocks = if metadata.blocks() * 512 < metadata.len() {
                "sparse "
            } else {
                ""
            };
            format!(
                "{blocks}file of {} bytes {}",
                content.len(),
                blake3::hash(&content)
            )
        } else if kind.is_fifo() {
            "fifo".to_owned()
        } else if kind.is_char_device() {
            format!("character device {:x}", metadata.rdev())
        } else {
            format!("block device {:x}", metadata.rdev())
        };
        let inode = (metadata.dev(), metadata.ino());
        let same = first.entry(inode).or_insert_with(|| name.clone()).clone();
        let described = format!(
            "{what}, mode {:o}, owner {}:{}, {} names, as {same}, modified {}.{:09}, attributes {:?}",
            metadata.mode() & 0o7777,
            metadata.uid(),
            metadata.gid(),
            if kind.is_dir() { 1 } else { metadata.nlink() },
            metadata.mtime(),
            metadata.mtime_nsec(),
            attributes(path),
        );
        tree.insert(name, described);
    }
    tree
}

fn attributes(path: &Path) -> BTreeMap<String, String> {
    let mut names = vec![0; 64 << 10];
    let length = rustix::fs::llistxattr(path, &mut names).unwrap();
    let mut found = BTreeMap::new();
    for name in names[..length].split(|byte| *byte == 0) {
        if name.is_empty() {
            continue;
        }
        let mut value = vec![0; 64 << 10];
        let length = rustix::fs::lgetxattr(path, name, &mut value).unwrap();
        found.insert(
            name.escape_ascii().to_string(),
            value[..length].escape_ascii().to_string(),
        );
    }
    found
}
