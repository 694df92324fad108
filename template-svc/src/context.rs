//! Build contexts: what `COPY` and `ADD` take files from. A client says what is in its folder, and uploads the files that are not here yet.
//!
//! What it says is looked at in memory, to know what a step depends on; it becomes a folder only when a step takes of it.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::{
        ffi::OsStrExt as _,
        fs::{DirBuilderExt as _, OpenOptionsExt as _, symlink},
    },
    path::{Path, PathBuf},
};

use prost::{
    Message as _,
    encoding::{DecodeContext, decode_key, skip_field},
};
use proto::template::v1::{Artifact, BuildContext, ContextEntry, context_entry::Kind};
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, utimensat};

use crate::artifact::{ArtifactDigest, Artifacts};

/// Entries of a context at most.
pub const MOST_ENTRIES: usize = 100_000;
/// Bytes of what says what is in it.
pub const LARGEST_MANIFEST: u64 = 64 << 20;
/// Names of a path, and bytes of one, at most.
const DEEPEST: usize = 128;
const LONGEST: usize = 4095;
const PIECE: usize = 256 << 10;

/// A context that cannot be built with.
#[derive(Debug, thiserror::Error)]
pub enum ContextError {
    /// What says what is in it makes no sense.
    #[error("the build context is none: {0}")]
    Invalid(String),
    /// A file was not uploaded, or too long ago.
    #[error("\"{0}\" of the build context is not here; upload it again")]
    Missing(String),
    /// The disk of template-svc.
    #[error("the build context cannot be laid out: {0}")]
    Disk(#[from] io::Error),
}

impl ContextError {
    /// The stable word of a build's failure.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Invalid(_) => "CONTEXT_INVALID",
            Self::Missing(_) => "CONTEXT_MISSING",
            Self::Disk(error) if error.kind() == io::ErrorKind::StorageFull => "DISK_FULL",
            Self::Disk(_) => "BUILD_FAILED",
        }
    }
}

/// What is in a context.
#[derive(Debug)]
pub struct Context {
    /// By path; sorted by bytes a folder comes before what is in it, but not next to it.
    entries: BTreeMap<PathBuf, ContextEntry>,
    digest: [u8; 32],
}

impl Context {
    /// Reads it from the file it was uploaded as. Blocking.
    pub fn open(files: &Artifacts, digest: &str) -> Result<Self, ContextError> {
        let missing = || ContextError::Missing("all".to_owned());
        let digest = ArtifactDigest::parse(digest).ok_or_else(missing)?;
        let path = files.find(&digest).ok_or_else(missing)?;
        let mut bytes = Vec::new();
        let manifest = File::open(path)?;
        manifest
            .take(LARGEST_MANIFEST + 1)
            .read_to_end(&mut bytes)?;
        if bytes.len() as u64 > LARGEST_MANIFEST {
            return Err(ContextError::Invalid(format!(
                "it is described by more than {LARGEST_MANIFEST} bytes"
            )));
        }
        let hash = blake3::hash(&bytes);
        if hash.to_hex().as_str() != digest.as_str() {
            // So that it is uploaded again.
            files.remove_one(&digest)?;
            return Err(missing());
        }
        Self::read(&bytes, hash.into())
    }

    fn read(bytes: &[u8], digest: [u8; 32]) -> Result<Self, ContextError> {
        let invalid = |why: &str| ContextError::Invalid(why.to_owned());
        // Before it takes many times as much memory.
        let count = fields(bytes).ok_or_else(|| invalid("it does not parse"))?;
        if count > MOST_ENTRIES {
            return Err(invalid(&format!("it has more than {MOST_ENTRIES} entries")));
        }
        let context = BuildContext::decode(bytes).map_err(|_| invalid("it does not parse"))?;
        let mut entries: BTreeMap<PathBuf, ContextEntry> = BTreeMap::new();
        for entry in context.entries {
            let shown = String::from_utf8_lossy(&entry.path).into_owned();
            let wrong = |why: &str| ContextError::Invalid(format!("\"{shown}\": {why}"));
            let bytes = &entry.path;
            let mut names = bytes.split(|byte| *byte == b'/');
            let is_path = !bytes.contains(&0)
                && bytes.len() <= LONGEST
                && names.all(|name| !matches!(name, b"" | b"." | b".."));
            if !is_path {
                return Err(wrong("no path within it"));
            }
            let path = Path::new(std::ffi::OsStr::from_bytes(bytes)).to_owned();
            if path.components().count() > DEEPEST {
                return Err(wrong("more than 128 folders in each other"));
            }
            let parent = path.parent().unwrap_or(Path::new(""));
            let parent = entries.get(parent).map(|parent| &parent.kind);
            if !matches!(parent, Some(Some(Kind::Folder(true)))) && bytes.contains(&b'/') {
                return Err(wrong("its folder does not come before it"));
            }
            let is_kind = match &entry.kind {
                Some(Kind::File(file)) => ArtifactDigest::parse(&file.digest).is_some(),
                Some(Kind::Symlink(target)) => {
                    !target.is_empty() && target.len() <= LONGEST && !target.contains(&0)
                }
                Some(Kind::Folder(is_folder)) => *is_folder,
                None => false,
            };
            if !is_kind {
                return Err(wrong("no file, folder or link"));
            }
            if entries.insert(path, entry).is_some() {
                return Err(wrong("it is there twice"));
            }
        }
        Ok(Self { entries, digest })
    }

    /// What a step depends on that takes what the pattern means; `None` if there is nothing.
    pub fn key(&self, pattern: &str, is_cancelled: &dyn Fn() -> bool) -> Option<[u8; 32]> {
        let pattern = Pattern::new(pattern);
        let mut hasher = blake3::Hasher::new_derive_key("sandmesh build: files");
        let mut is_there = pattern.is_all();
        for (path, entry) in &self.entries {
            if is_cancelled() {
                return None;
            }
            let is_link = matches!(entry.kind, Some(Kind::Symlink(_)));
            match pattern.meets(path) {
                // What is behind a link is anything.
                Meets::Above | Meets::Just if is_link => return Some(self.digest),
                Meets::Nothing | Meets::Above => continue,
                Meets::Just | Meets::Below => is_there = true,
            }
            let mut add = |bytes: &[u8]| {
                hasher.update(&(bytes.len() as u64).to_le_bytes());
                hasher.update(bytes);
            };
            add(&entry.path);
            match &entry.kind {
                Some(Kind::File(file)) => {
                    add(b"file");
                    add(file.digest.as_bytes());
                }
                Some(Kind::Symlink(target)) => {
                    add(b"link");
                    add(target);
                }
                _ => add(b"folder"),
            }
            hasher.update(&(entry.mode & 0o7777).to_le_bytes());
        }
        is_there.then(|| hasher.finalize().into())
    }

    /// Lays it out in an empty folder that nobody else may enter. Blocking.
    pub fn lay(
        &self,
        files: &Artifacts,
        folder: &Path,
        limit: u64,
        is_cancelled: impl Fn() -> bool,
    ) -> Result<(), ContextError> {
        let mut left = limit;
        // By path a folder comes before what is in it, and only what was made here is on the way: no link of its own is gone through.
        for (path, entry) in &self.entries {
            if is_cancelled() {
                return Err(ContextError::Disk(io::ErrorKind::Interrupted.into()));
            }
            let at = folder.join(path);
            match &entry.kind {
                Some(Kind::File(file)) => {
                    left = left.checked_sub(file.size_bytes).ok_or_else(|| {
                        ContextError::Invalid(format!("it is more than {limit} bytes"))
                    })?;
                    if !copy(files, file, &at, entry.mode)? {
                        let shown = path.to_string_lossy().into_owned();
                        return Err(ContextError::Missing(shown));
                    }
                }
                Some(Kind::Symlink(target)) => {
                    symlink(std::ffi::OsStr::from_bytes(target), &at)?;
                }
                _ => {
                    fs::DirBuilder::new().mode(0o700).create(&at)?;
                    set_mode(&File::open(&at)?, entry.mode)?;
                }
            }
        }
        // Each after what is in it, which changes it.
        for (path, entry) in self.entries.iter().rev() {
            let time = Timespec {
                tv_sec: entry.modified.max(0),
                tv_nsec: 0,
            };
            let times = Timestamps {
                last_access: time,
                last_modification: time,
            };
            utimensat(CWD, folder.join(path), &times, AtFlags::SYMLINK_NOFOLLOW)
                .map_err(io::Error::from)?;
        }
        Ok(())
    }
}

/// A file of a context; whether it is here whole.
fn copy(files: &Artifacts, file: &Artifact, at: &Path, mode: u32) -> io::Result<bool> {
    let digest = ArtifactDigest::parse(&file.digest);
    let Some(from) = digest.as_ref().and_then(|digest| files.find(digest)) else {
        return Ok(false);
    };
    let mut from = match File::open(from) {
        // Swept in between.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        from => from?,
    };
    let mut made = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(at)?;
    let mut hasher = blake3::Hasher::new();
    let mut size = 0;
    let mut piece = vec![0; PIECE];
    loop {
        let count = from.read(&mut piece)?;
        let bytes = piece.get(..count).unwrap_or_default();
        size += count as u64;
        if bytes.is_empty() || size > file.size_bytes {
            break;
        }
        hasher.update(bytes);
        made.write_all(bytes)?;
    }
    // They are not synced: one may not have survived a crash of the host.
    let is_whole =
        size == file.size_bytes && hasher.finalize().to_hex().as_str() == file.digest.as_str();
    if let Some(digest) = digest.filter(|_| !is_whole) {
        // So that it is uploaded again.
        files.remove_one(&digest)?;
    }
    set_mode(&made, mode)?;
    Ok(is_whole)
}

fn set_mode(file: &File, mode: u32) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    file.set_permissions(fs::Permissions::from_mode(mode & 0o7777))
}

/// Fields of a message, at its top; none if it is no message.
fn fields(mut bytes: &[u8]) -> Option<usize> {
    let mut count = 0;
    while !bytes.is_empty() {
        let (tag, wire) = decode_key(&mut bytes).ok()?;
        skip_field(wire, tag, &mut bytes, DecodeContext::default()).ok()?;
        count += 1;
    }
    Some(count)
}

/// A path with `*`, `?` and `[...]` in names, as Go's `filepath.Match` has them, from the top of what is copied from.
#[derive(Debug, Clone)]
pub struct Pattern {
    names: Vec<Name>,
}

#[derive(Debug, Clone)]
enum Name {
    Exactly(String),
    Like(String),
}

/// How a path stands to a pattern.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Meets {
    /// It is neither.
    Nothing,
    /// What the pattern means may be in it.
    Above,
    /// The pattern means it.
    Just,
    /// The pattern means a folder it is in.
    Below,
}

impl Pattern {
    /// Leading slashes and `..` lead no higher than to the top.
    pub fn new(pattern: &str) -> Self {
        let path = crate::dockerfile::words::join("/", pattern);
        let names = path.split('/').filter(|name| !name.is_empty());
        let name = |name: &str| {
            if name.contains(['*', '?', '[', '\\']) {
                // Braces and a leading `!` mean something to the crate only.
                let mut glob = name.replace('{', "\\{").replace('}', "\\}");
                if glob.starts_with('!') {
                    glob.insert(0, '\\');
                }
                Name::Like(glob.replace("**", "*"))
            } else {
                Name::Exactly(name.to_owned())
            }
        };
        Self {
            names: names.map(name).collect(),
        }
    }

    /// Whether it is a name, and means nothing else.
    pub fn is_exact(&self) -> bool {
        let is_exact = |name: &Name| matches!(name, Name::Exactly(_));
        self.names.iter().all(is_exact)
    }

    fn is_all(&self) -> bool {
        self.names.is_empty()
    }

    fn meets(&self, path: &Path) -> Meets {
        let mut names = self.names.iter();
        for part in path {
            match names.next() {
                None => return Meets::Below,
                Some(name) if name.is(part.as_bytes()) => {}
                Some(_) => return Meets::Nothing,
            }
        }
        if names.next().is_some() {
            Meets::Above
        } else {
            Meets::Just
        }
    }

    /// What it means under the root of this thread, in the order of names; links on the way are followed. Blocking.
    pub fn find(&self, most: usize, is_cancelled: &dyn Fn() -> bool) -> io::Result<Vec<PathBuf>> {
        let mut found = vec![PathBuf::from("/")];
        for name in &self.names {
            let mut next = Vec::new();
            for folder in found {
                if is_cancelled() {
                    return Err(io::ErrorKind::Interrupted.into());
                }
                match name {
                    Name::Exactly(name) => next.push(folder.join(name)),
                    Name::Like(_) => {
                        let Ok(inside) = fs::read_dir(&folder) else {
                            continue;
                        };
                        let mut here = Vec::new();
                        for entry in inside {
                            let found = entry?.file_name();
                            if name.is(found.as_bytes()) {
                                here.push(folder.join(found));
                            }
                            if next.len() + here.len() > most {
                                break;
                            }
                        }
                        here.sort_unstable();
                        next.extend(here);
                    }
                }
                if next.len() > most {
                    return Err(io::Error::other(format!("more than {most} paths")));
                }
            }
            found = next;
        }
        found.retain(|path| path.exists());
        Ok(found)
    }
}

impl Name {
    fn is(&self, name: &[u8]) -> bool {
        match self {
            Self::Exactly(wanted) => wanted.as_bytes() == name,
            Self::Like(glob) => fast_glob::glob_match(glob, name),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use rstest::rstest;

    use super::*;

    fn entry(path: &str, kind: Kind) -> ContextEntry {
        ContextEntry {
            path: path.into(),
            kind: Some(kind),
            mode: 0o644,
            modified: 1_000_000,
        }
    }

    fn file(text: &str) -> Kind {
        Kind::File(Artifact {
            digest: blake3::hash(text.as_bytes()).to_hex().to_string(),
            size_bytes: text.len() as u64,
        })
    }

    fn read(entries: Vec<ContextEntry>) -> Result<Context, ContextError> {
        let bytes = BuildContext { entries }.encode_to_vec();
        Context::read(&bytes, [7; 32])
    }

    #[test]
    fn keys_are_of_what_is_taken() {
        let of = |changed: &str| {
            read(vec![
                entry("a.txt", file("one")),
                entry("b.txt", file(changed)),
                entry("dir", Kind::Folder(true)),
                entry("dir/x", file("two")),
                entry("dir.txt", file("three")),
                entry("link", Kind::Symlink("dir".into())),
            ])
            .unwrap()
        };
        let (before, after) = (of("old"), of("new"));
        for pattern in [
            "a.txt", "dir", "dir/x", "dir/*", "/../dir", "d*.txt", "[a]?txt",
        ] {
            assert_eq!(
                before.key(pattern, &|| false),
                after.key(pattern, &|| false),
                "{pattern}"
            );
            assert!(before.key(pattern, &|| false).is_some(), "{pattern}");
        }
        for pattern in ["b.txt", ".", "*.txt", "[a-d]*"] {
            assert_ne!(
                before.key(pattern, &|| false),
                after.key(pattern, &|| false),
                "{pattern}"
            );
        }
        // Through a link it may be anything.
        assert_eq!(before.key("link/x", &|| false), Some([7; 32]));
        for pattern in ["none", "a.txt/x", "dir/none", "{a,b}.txt*", "!a*"] {
            assert_eq!(before.key(pattern, &|| false), None, "{pattern}");
        }
        assert_eq!(read(vec![]).unwrap().key("x", &|| false), None);
        assert!(read(vec![]).unwrap().key(".", &|| false).is_some());
    }

    #[rstest]
    #[case::absolute(vec![entry("/etc/x", file("x"))])]
    #[case::up(vec![entry("..", Kind::Folder(true)), entry("../x", file("x"))])]
    #[case::nul(vec![entry("a\0b", file("x"))])]
    #[case::empty(vec![entry("", file("x"))])]
    #[case::no_parent(vec![entry("a/b", file("x"))])]
    #[case::in_a_link(vec![entry("a", Kind::Symlink("/etc".into())), entry("a/b", file("x"))])]
    #[case::in_a_file(vec![entry("a", file("x")), entry("a/b", file("x"))])]
    #[case::twice(vec![entry("a", file("x")), entry("a", file("y"))])]
    #[case::no_kind(vec![ContextEntry { path: "a".into(), ..ContextEntry::default() }])]
    #[case::no_digest(vec![entry("a", Kind::File(Artifact { digest: "../x".into(), size_bytes: 1 }))])]
    #[case::deep((1..=129).map(|depth| entry(&vec!["d"; depth].join("/"), Kind::Folder(true))).collect())]
    fn contexts_that_are_refused(#[case] entries: Vec<ContextEntry>) {
        assert!(matches!(read(entries), Err(ContextError::Invalid(_))));
    }

    #[test]
    fn many_entries_are_counted_before_they_take_memory() {
        let many = [0x0a, 0x00].repeat(MOST_ENTRIES + 1);
        let found = Context::read(&many, [0; 32]);
        assert!(matches!(found, Err(ContextError::Invalid(why)) if why.contains("100000")));
        assert!(fields(&[0x0a]).is_none() && fields(&[0xff; 20]).is_none());
        assert_eq!(fields(&[0x0a, 0x00, 0x0a, 0x01, 0x00]), Some(2));
    }

    #[test]
    fn a_context_is_laid_out() {
        let folder = tempfile::tempdir().unwrap();
        let files = Artifacts::open(folder.path().join("files")).unwrap();
        files.ingest_from("one".as_bytes()).unwrap();
        let context = read(vec![
            entry("dir", Kind::Folder(true)),
            entry("dir/a", file("one")),
            entry("dir/l", Kind::Symlink("/etc".into())),
        ])
        .unwrap();
        let at = folder.path().join("laid");
        fs::create_dir(&at).unwrap();
        context.lay(&files, &at, 3, || false).unwrap();
        assert_eq!(fs::read(at.join("dir/a")).unwrap(), b"one");
        assert_eq!(fs::read_link(at.join("dir/l")).unwrap(), Path::new("/etc"));
        for name in ["dir", "dir/a", "dir/l"] {
            let time = fs::symlink_metadata(at.join(name)).unwrap().mtime();
            assert_eq!(time, 1_000_000, "{name}");
        }

        // What is gone, or was not written whole, is to be uploaded again.
        let again = folder.path().join("again");
        fs::create_dir(&again).unwrap();
        let path =
            files.find(&ArtifactDigest::parse(blake3::hash(b"one").to_hex().as_str()).unwrap());
        fs::write(path.unwrap(), "").unwrap();
        let failed = context.lay(&files, &again, 3, || false);
        assert!(matches!(failed, Err(ContextError::Missing(_))));
        let digest = ArtifactDigest::parse(blake3::hash(b"one").to_hex().as_str()).unwrap();
        assert!(files.find(&digest).is_none());
        files.ingest_from("one".as_bytes()).unwrap();
        let small = folder.path().join("small");
        fs::create_dir(&small).unwrap();
        let failed = context.lay(&files, &small, 2, || false);
        assert!(matches!(failed, Err(ContextError::Invalid(_))));
    }
}
