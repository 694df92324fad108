//! `COPY` and `ADD`: files of the build context, or of another root, into a build's session.
//!
//! ```text
//!   context, or layers --> a folder --> a thread whose root it is (chroot(2)) --> tarball --> envd unpacks it in the session
//! ```
//! What is copied is looked for where links lead within its own root; where it goes, envd finds within the session's. The host is between them with
//! a tarball only.

use std::{
    collections::HashMap,
    ffi::OsString,
    fs::{self, File},
    io::{self, Read as _, Seek as _, Write as _},
    os::unix::{
        ffi::OsStrExt as _,
        fs::{FileTypeExt as _, MetadataExt as _},
    },
    path::{Path, PathBuf},
};

use proto::envd::v1::{FileType, ReadRequest, StatRequest};
use sdk::Sandbox;
use service_kit::errors::reason_of;
use tar::{EntryType, Header};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::{
    BuildError, Builder, blocking, failed, io_failed,
    steps::{Building, Planned, Running, Tree},
};
use crate::{
    context::Pattern,
    dockerfile::{Copy, Source},
    layer::within,
    sessions::{is_unanswered, patiently},
};

/// Paths that a `COPY` may name, and folders in each other.
const MOST_FOUND: usize = 100_000;
const DEEPEST: usize = 256;
/// Tarballs that one ADD unpacks; each is open.
const MOST_ARCHIVES: usize = 100;
/// Of a tarball on its way.
const MOST_ENTRIES: u64 = 4_000_000;
/// Files with several names that stay one.
const MOST_LINKED: usize = 100_000;
/// Of what has no time of its own: 1980, before which some formats know none.
const NO_TIME: i64 = 315_619_200;
/// Names of tarballs that are packed as envd does not unpack them.
const PACKED: [&str; 8] = [
    ".tar.xz",
    ".txz",
    ".tar.bz2",
    ".tbz2",
    ".tbz",
    ".tar.zst",
    ".tzst",
    ".tar.lzma",
];
const LARGEST_DATABASE: u64 = 1 << 20;
/// Of a folder that no source speaks of.
const FOLDER_MODE: u32 = 0o755;
const FILE_MODE: u32 = 0o644;
/// Where a tar header says that it is one (POSIX pax, "ustar Interchange Format").
const MAGIC: (usize, &[u8]) = (257, b"ustar");
const BLOCK: u64 = 512;

/// Something that is copied, in the order of the sources.
enum Found {
    /// Under the root it is copied from, with all links followed.
    Path {
        path: PathBuf,
        is_folder: bool,
    },
    Text {
        name: String,
        text: String,
    },
    /// A tarball that is unpacked.
    Archive(File),
}

impl Found {
    fn name(&self) -> OsString {
        match self {
            Self::Path { path, .. } => path.file_name().unwrap_or_default().to_owned(),
            Self::Text { name, .. } => name.into(),
            Self::Archive(_) => OsString::new(),
        }
    }

    /// Whether what is in it goes into a folder.
    fn is_many(&self) -> bool {
        !matches!(
            self,
            Self::Path {
                is_folder: false,
                ..
            } | Self::Text { .. }
        )
    }
}

/// Where files go in a session.
struct Target {
    /// A folder that is there.
    folder: String,
    /// Folders within it that are not there yet.
    new: Vec<String>,
    /// The name of the one file; if there is none, everything goes into the last folder by its own name.
    name: Option<OsString>,
}

/// How files are to be.
#[derive(Debug, Clone, Copy)]
struct Look {
    /// User and group. Without: as they are, and root's if they come from a context.
    owner: Option<(u32, u32)>,
    is_of_context: bool,
    mode: Option<u32>,
}

impl Builder {
    /// Copies, and says so.
    pub(super) async fn copy(
        &self,
        building: &Building,
        running: &Running,
        plan: &Planned,
        copy: &Copy,
    ) -> Result<(), BuildError> {
        let id = &building.stored.build.build_id;
        let step = plan.step.clone();
        let is_of_context =
            !matches!(&plan.origin, Some(origin) if matches!(origin.tree, Tree::Layers(..)));
        let from = match plan.origin.as_ref().map(|origin| &origin.tree) {
            Some(Tree::Layers(layers)) => {
                // One after the other, each in the place of the last.
                let making = building.making.aside("from")?;
                let (laid, layers) = (making.clone(), layers.clone());
                self.logged(id, move |lines| laid.lay(&layers, lines))
                    .await?;
                making
            }
            None => building.making.aside("nothing")?,
            Some(Tree::Context) => {
                let making = building.making.aside("context")?;
                if let Some(context) = building.context.clone() {
                    let (laid, files) = (making.clone(), building.files.clone());
                    blocking(move || laid.lay_context(&context, &files)).await?;
                }
                making
            }
        };
        let sandbox = running.sandbox()?;
        let owner = match &copy.owner {
            Some(owner) => {
                let resolved = resolve(sandbox, owner).await?;
                Some(resolved.map_err(|why| failed("STEP_FAILED", format!("{step}: {why}")))?)
            }
            None => None,
        };
        let look = Look {
            owner,
            is_of_context,
            mode: copy.mode,
        };
        let (root, cancel, scratch) = (from.root(), from.cancelled(), from.clone());
        let (sources, is_add) = (copy.sources.clone(), copy.is_add);
        let (of, named) = (root.clone(), step.clone());
        let looking = cancel.clone();
        let found = move || within(&of, || find(&sources, is_add, &named, &looking));
        let found = blocking(found).await?;
        let is_archive = |found: &Found| matches!(found, Found::Archive(_));
        if copy.owner.is_some() && found.iter().any(is_archive) {
            let message = format!("{step}: --chown is not for what ADD unpacks");
            return Err(failed("STEP_FAILED", message));
        }
        if found.is_empty() {
            // Patterns that mean nothing.
            return Ok(());
        }
        let is_one = found.len() == 1 && !found.iter().any(Found::is_many);
        let target = target(sandbox, copy, is_one, found.first().map(Found::name)).await?;
        let target = target.map_err(|why| failed("STEP_FAILED", format!("{step}: {why}")))?;
        let limit = from.largest();
        let folder = target.folder.clone();
        let (tarball, archives) = blocking(move || {
            let mut tarball = scratch.scratch()?;
            let archives = within(&root, || {
                pack(&mut tarball, found, &target, look, limit, &cancel)
            })?;
            tarball.rewind().map_err(io_failed)?;
            Ok((tarball, archives))
        })
        .await?;
        running.unpack(&step, &folder, tarball).await?;
        for archive in archives {
            running.unpack(&step, &copy.destination, archive).await?;
        }
        Ok(())
    }
}

/// Looks for all sources. In a thread of its own root. Blocking.
fn find(
    sources: &[Source],
    is_add: bool,
    step: &str,
    cancel: &CancellationToken,
) -> Result<Vec<Found>, BuildError> {
    let mut found = Vec::new();
    let mut archives = 0;
    for source in sources {
        let pattern = match source {
            Source::Path(pattern) => pattern,
            Source::Text { name, text } => {
                found.push(Found::Text {
                    name: name.clone(),
                    text: text.clone(),
                });
                continue;
            }
        };
        let pattern = (Pattern::new(pattern), pattern);
        let paths = pattern.0.find(MOST_FOUND, &|| cancel.is_cancelled());
        let paths = paths.map_err(io_failed)?;
        // As with BuildKit, one that is no name may mean nothing.
        if paths.is_empty() && pattern.0.is_exact() {
            return Err(missing(step, pattern.1));
        }
        for path in paths {
            // Its name is the one it was asked for by, whatever link leads there.
            let metadata = fs::metadata(&path).map_err(io_failed)?;
            if is_add && metadata.is_file() {
                let file = File::open(&path).map_err(io_failed)?;
                if let Some(archive) = archive(file, step, &path)? {
                    archives += 1;
                    if archives > MOST_ARCHIVES {
                        let message = format!("{step}: more than {MOST_ARCHIVES} tarballs");
                        return Err(failed("STEP_FAILED", message));
                    }
                    found.push(archive);
                    continue;
                }
            }
            found.push(Found::Path {
                is_folder: metadata.is_dir(),
                path,
            });
        }
        if found.len() > MOST_FOUND {
            let message = format!("{step}: more than {MOST_FOUND} paths");
            return Err(failed("STEP_FAILED", message));
        }
    }
    Ok(found)
}

/// There is nothing of that name.
pub(super) fn missing(step: &str, pattern: &str) -> BuildError {
    failed(
        "COPY_SOURCE_MISSING",
        format!("{step}: there is no {pattern:?} in what it copies from"),
    )
}

/// A file that is a tarball, as one that envd can unpack.
fn archive(mut file: File, step: &str, path: &Path) -> Result<Option<Found>, BuildError> {
    let mut beginning = Vec::new();
    (&mut file)
        .take(BLOCK)
        .read_to_end(&mut beginning)
        .map_err(io_failed)?;
    file.rewind().map_err(io_failed)?;
    let is_tar = |block: &[u8]| {
        let (at, magic) = MAGIC;
        block.get(at..at + magic.len()) == Some(magic)
    };
    let first_of = |unpacked: &mut dyn io::Read| {
        let mut block = Vec::new();
        // One that does not unpack is a file like others.
        let read = unpacked.take(BLOCK).read_to_end(&mut block);
        read.is_ok() && is_tar(&block)
    };
    let name = path.to_string_lossy().to_lowercase();
    let is_packed = PACKED.iter().any(|ending| name.ends_with(ending));
    let is_archive = match beginning.as_slice() {
        [0x1f, 0x8b, ..] => first_of(&mut flate2::read::MultiGzDecoder::new(&file)),
        _ if is_packed => {
            let message = format!(
                "{step}: {} is packed with zstd, bzip2 or xz, which ADD does not unpack: COPY it, and unpack it in a RUN",
                path.display()
            );
            return Err(failed("STEP_FAILED", message));
        }
        block => is_tar(block),
    };
    file.rewind().map_err(io_failed)?;
    Ok(is_archive.then_some(Found::Archive(file)))
}

/// Where it goes; why nowhere.
async fn target(
    sandbox: &Sandbox,
    copy: &Copy,
    is_one: bool,
    name: Option<OsString>,
) -> Result<Result<Target, String>, BuildError> {
    let kind = kind(sandbox, &copy.destination).await?;
    let is_folder = kind == Some(FileType::Directory);
    let own_name = !is_one || copy.into_folder || is_folder;
    if own_name && kind.is_some() && !is_folder {
        let path = &copy.destination;
        return Ok(Err(format!("{path} is there, and is no folder")));
    }
    // Upwards to what is there: the root is.
    let mut folder = copy.destination.clone();
    let mut new = Vec::new();
    if !own_name {
        pop(&mut folder, &mut new);
    }
    let last = new.pop();
    loop {
        match self::kind(sandbox, &folder).await? {
            Some(FileType::Directory) => break,
            Some(_) => return Ok(Err(format!("{folder} is there, and is no folder"))),
            // Whatever the guest says.
            None if folder == "/" => break,
            None => pop(&mut folder, &mut new),
        }
    }
    new.reverse();
    let name = if own_name {
        None
    } else {
        last.map(OsString::from).or(name)
    };
    Ok(Ok(Target { folder, new, name }))
}

/// Takes the last name off a path.
fn pop(path: &mut String, names: &mut Vec<String>) {
    if let Some((parent, name)) = path.rsplit_once('/') {
        names.push(name.to_owned());
        *path = if parent.is_empty() { "/" } else { parent }.to_owned();
    }
}

/// What a path is, if it is there.
async fn kind(sandbox: &Sandbox, path: &str) -> Result<Option<FileType>, BuildError> {
    let request = StatRequest {
        path: path.to_owned(),
        user: "root".to_owned(),
        ..StatRequest::default()
    };
    let stat = || {
        let request = request.clone();
        async move { sandbox.filesystem().stat(request).await }
    };
    match patiently(is_unanswered, stat).await {
        Ok(answer) => Ok(answer.into_inner().entry.map(|entry| entry.r#type())),
        Err(status) if is_missing(&status) => Ok(None),
        Err(status) => Err(sdk::Error::from(status).into()),
    }
}

/// Whether what is there is something else than a file.
fn is_no_file(status: &Status) -> bool {
    let reason = reason_of(status);
    let reasons = ["PATH_IS_A_DIRECTORY", "PATH_NOT_A_FILE"];
    reason.is_some_and(|reason| reasons.contains(&&*reason))
}

/// Whether a path is not there; a session that is not there is another matter.
pub(super) fn is_missing(status: &Status) -> bool {
    reason_of(status).as_deref() == Some("PATH_NOT_FOUND")
}

/// The numbers of `user` or `user:group`, by the session's own files; why there are none.
async fn resolve(sandbox: &Sandbox, owner: &str) -> Result<Result<(u32, u32), String>, BuildError> {
    let (user, group) = match owner.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (owner, None),
    };
    // As BuildKit has it: a number is its own group, a name has that of /etc/passwd, and nobody is root.
    let (uid, own) = match user.parse() {
        Ok(uid) => (uid, uid),
        Err(_) if user.is_empty() => (0, 0),
        Err(_) => {
            let users = database(sandbox, "/etc/passwd").await?;
            let Some(uid) = number(&users, user, UID) else {
                return Ok(Err(format!("there is no user {user:?} in /etc/passwd")));
            };
            (uid, number(&users, user, GID).unwrap_or(uid))
        }
    };
    let Some(group) = group else {
        return Ok(Ok((uid, own)));
    };
    let is_known = |text: &str| text.parse::<u32>().is_ok();
    let mut groups = String::new();
    if !is_known(group) {
        groups = database(sandbox, "/etc/group").await?;
    }
    match group.parse().ok().or_else(|| number(&groups, group, UID)) {
        Some(gid) => Ok(Ok((uid, gid))),
        None => Ok(Err(format!("there is no group {group:?} in /etc/group"))),
    }
}

/// Fields of a line after its name (passwd(5)); of a group's the first is its own (group(5)).
const UID: usize = 1;
const GID: usize = 2;

/// A number in the line of a name.
fn number(database: &str, name: &str, field: usize) -> Option<u32> {
    database.lines().find_map(|line| {
        let mut fields = line.split(':');
        let is_it = fields.next() == Some(name);
        fields.nth(field).filter(|_| is_it)?.parse().ok()
    })
}

async fn database(sandbox: &Sandbox, path: &str) -> Result<String, BuildError> {
    let read = || async move {
        let request = ReadRequest {
            path: path.to_owned(),
            user: "root".to_owned(),
            length: Some(LARGEST_DATABASE),
            ..ReadRequest::default()
        };
        let mut bytes = Vec::new();
        let mut parts = sandbox.filesystem().read(request).await?.into_inner();
        while let Some(part) = parts.message().await? {
            bytes.extend_from_slice(&part.data);
            // Whatever length was asked for.
            if bytes.len() as u64 > LARGEST_DATABASE {
                break;
            }
        }
        Ok(bytes)
    };
    match patiently(is_unanswered, read).await {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        // One that is no file names nobody either.
        Err(status) if is_missing(&status) || is_no_file(&status) => Ok(String::new()),
        Err(status) => Err(sdk::Error::from(status).into()),
    }
}

/// Writes what was found, and hands back the tarballs among it. In a thread of its own root. Blocking.
fn pack(
    to: &mut File,
    found: Vec<Found>,
    target: &Target,
    look: Look,
    limit: u64,
    cancel: &CancellationToken,
) -> Result<Vec<File>, BuildError> {
    let mut packing = Packing {
        tar: tar::Builder::new(io::BufWriter::new(to)),
        look,
        left: limit,
        limit,
        entries: 0,
        linked: HashMap::new(),
        cancel,
    };
    // Whatever name comes first: it is no gzip.
    let mut header = packing.header(FOLDER_MODE, (0, 0), NO_TIME);
    packing.bare(&mut header, EntryType::Directory, Path::new("./"))?;
    let mut folder = PathBuf::new();
    for name in &target.new {
        folder.push(name);
        let mut header = packing.header(FOLDER_MODE, (0, 0), NO_TIME);
        header.set_mode(FOLDER_MODE);
        packing.bare(&mut header, EntryType::Directory, &folder)?;
    }
    let mut archives = Vec::new();
    for found in found {
        // A later source may take the place of what an earlier one has made.
        packing.linked.clear();
        let name = target.name.clone().unwrap_or_else(|| found.name());
        let path = folder.join(name);
        match found {
            Found::Path {
                path: from,
                is_folder: true,
            } => packing.inside(&from, &folder, 0)?,
            Found::Path { path: from, .. } => {
                // Followed: the link was what was asked for, not what is meant.
                let metadata = fs::metadata(&from).map_err(io_failed)?;
                packing.add(&from, &path, &metadata)?;
            }
            Found::Text { text, .. } => {
                let mut header = packing.header(FILE_MODE, (0, 0), NO_TIME);
                packing.file(&mut header, &path, text.len() as u64, text.as_bytes())?;
            }
            Found::Archive(file) => archives.push(file),
        }
    }
    let done = packing.tar.into_inner().and_then(|mut done| done.flush());
    done.map_err(io_failed)?;
    Ok(archives)
}

struct Packing<'a> {
    tar: tar::Builder<io::BufWriter<&'a mut File>>,
    look: Look,
    left: u64,
    limit: u64,
    entries: u64,
    /// Where files with several names went first.
    linked: HashMap<(u64, u64), PathBuf>,
    cancel: &'a CancellationToken,
}

impl Packing<'_> {
    fn header(&self, mode: u32, owner: (u32, u32), modified: i64) -> Header {
        let mut header = Header::new_gnu();
        let (uid, gid) = match self.look.owner {
            Some(owner) => owner,
            None if self.look.is_of_context => (0, 0),
            None => owner,
        };
        header.set_uid(uid.into());
        header.set_gid(gid.into());
        header.set_mode(self.look.mode.unwrap_or(mode & 0o7777));
        header.set_mtime(modified.try_into().unwrap_or(0));
        header.set_size(0);
        header
    }

    /// Counts what an entry takes: a header, a long name as an entry of its own, and whole blocks.
    fn charge(&mut self, path: &Path, size: u64) -> Result<(), BuildError> {
        self.entries += 1;
        let name = path.as_os_str().len() as u64;
        let takes = size
            .checked_next_multiple_of(BLOCK)
            .and_then(|size| size.checked_add(4 * BLOCK + name));
        let left = takes.and_then(|takes| self.left.checked_sub(takes));
        match left {
            Some(left) if self.entries <= MOST_ENTRIES => {
                self.left = left;
                Ok(())
            }
            _ => {
                let limit = self.limit;
                let message = format!(
                    "it copies more than {limit} bytes, or {MOST_ENTRIES} files and folders"
                );
                Err(failed("SOURCE_TOO_LARGE", message))
            }
        }
    }

    fn bare(
        &mut self,
        header: &mut Header,
        kind: EntryType,
        path: &Path,
    ) -> Result<(), BuildError> {
        self.charge(path, 0)?;
        header.set_entry_type(kind);
        self.tar
            .append_data(header, path, io::empty())
            .map_err(io_failed)
    }

    fn file(
        &mut self,
        header: &mut Header,
        path: &Path,
        size: u64,
        bytes: impl io::Read,
    ) -> Result<(), BuildError> {
        self.charge(path, size)?;
        header.set_entry_type(EntryType::Regular);
        header.set_size(size);
        self.tar.append_data(header, path, bytes).map_err(io_failed)
    }

    /// What is in a folder.
    fn inside(&mut self, folder: &Path, to: &Path, depth: usize) -> Result<(), BuildError> {
        if depth > DEEPEST {
            let message = format!("more than {DEEPEST} folders in each other");
            return Err(failed("SOURCE_INVALID", message));
        }
        let names = fs::read_dir(folder).and_then(|inside| {
            let names = inside.map(|entry| entry.map(|entry| entry.file_name()));
            names.collect::<io::Result<Vec<_>>>()
        });
        let mut names = names.map_err(io_failed)?;
        names.sort_unstable();
        for name in names {
            let from = folder.join(&name);
            let metadata = fs::symlink_metadata(&from).map_err(io_failed)?;
            let path = to.join(&name);
            self.add(&from, &path, &metadata)?;
            if metadata.is_dir() {
                self.inside(&from, &path, depth + 1)?;
            }
        }
        Ok(())
    }

    fn add(&mut self, from: &Path, to: &Path, metadata: &fs::Metadata) -> Result<(), BuildError> {
        if self.cancel.is_cancelled() {
            return Err(BuildError::Cancelled);
        }
        let owner = (metadata.uid(), metadata.gid());
        let mut header = self.header(metadata.mode(), owner, metadata.mtime());
        let kind = metadata.file_type();
        if kind.is_dir() {
            self.bare(&mut header, EntryType::Directory, to)
        } else if kind.is_symlink() {
            let leads_to = fs::read_link(from).map_err(io_failed)?;
            self.charge(to, leads_to.as_os_str().len() as u64)?;
            header.set_entry_type(EntryType::Symlink);
            // Byte by byte: as a path "/" would become "//".
            let bytes = leads_to.as_os_str().as_bytes();
            let added = match header.set_link_name_literal(bytes) {
                Ok(()) => self.tar.append_data(&mut header, to, io::empty()),
                // There is room elsewhere for one that is too long.
                Err(_) => self.tar.append_link(&mut header, to, leads_to),
            };
            added.map_err(io_failed)
        } else if kind.is_file() {
            let identity = (metadata.dev(), metadata.ino());
            if let Some(original) = self.linked.get(&identity).cloned() {
                self.charge(to, original.as_os_str().len() as u64)?;
                header.set_entry_type(EntryType::Link);
                let added = self.tar.append_link(&mut header, to, original);
                return added.map_err(io_failed);
            }
            if metadata.nlink() > 1 && self.linked.len() < MOST_LINKED {
                self.linked.insert(identity, to.to_owned());
            }
            let file = File::open(from).map_err(io_failed)?;
            let size = metadata.len();
            self.file(&mut header, to, size, file.take(size))
        } else if kind.is_fifo() {
            self.bare(&mut header, EntryType::Fifo, to)
        } else {
            // Devices and sockets are nothing that is copied.
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_are_known_by_their_files() {
        let passwd = "root:x:0:0::/root:/bin/sh\nweb:x:33:34::/:/bin/sh\nbroken\nbad:x:y\n";
        assert_eq!(number(passwd, "web", UID), Some(33));
        assert_eq!(number(passwd, "web", GID), Some(34));
        for name in ["root2", "broken", "bad", "", "x"] {
            assert_eq!(number(passwd, name, UID), None);
        }
    }
}
