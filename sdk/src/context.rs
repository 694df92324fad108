//! Build contexts: a folder that `COPY` and `ADD` of a Dockerfile take files from. Only files that are not there yet are sent.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    fs::{self, File, Metadata},
    io,
    os::unix::{
        ffi::{OsStrExt as _, OsStringExt as _},
        fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use prost::Message as _;
use proto::template::v1::{
    Artifact, BuildContext as Manifest, ContextEntry, FindMissingFilesRequest, UploadFilesRequest,
    context_entry::Kind, template_service_client::TemplateServiceClient,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    client::GrpcService,
    codegen::{Body, StdError},
};
use walkdir::WalkDir;

use crate::{
    error::Error,
    resumed::{RETRIES, wait_after},
};

const CHUNK: usize = 256 << 10;
const IN_FLIGHT: usize = 4;
/// Digests of one question.
const MOST_ASKED: usize = 10_000;
const MOST_ENTRIES: usize = 100_000;
const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// What is in a folder, as of when it was read.
#[derive(Debug)]
pub struct BuildContext {
    manifest: Bytes,
    digest: String,
    /// By digest.
    files: BTreeMap<String, (PathBuf, u64)>,
}

impl BuildContext {
    /// Reads a folder, but for what the text of a `.dockerignore` leaves out. Blocking.
    pub fn read(folder: &Path, ignore: &str) -> io::Result<Self> {
        let ignored = Ignored::parse(ignore);
        let mut entries: BTreeMap<PathBuf, ContextEntry> = BTreeMap::new();
        let mut files = BTreeMap::new();
        // Folders that are left out, but for what is in them.
        let mut left_out: BTreeSet<PathBuf> = BTreeSet::new();
        let mut walk = WalkDir::new(folder).min_depth(1).into_iter();
        while let Some(found) = walk.next() {
            let found = found?;
            let path = found.path().strip_prefix(folder);
            let path = path.map_err(io::Error::other)?.to_owned();
            let is_folder = found.file_type().is_dir();
            if ignored.matches(&path) {
                if is_folder && ignored.may_except_below(&path) {
                    left_out.insert(path);
                } else if is_folder {
                    walk.skip_current_dir();
                }
                continue;
            }
            // Those it lies in are needed after all.
            for parent in path.ancestors().skip(1) {
                if left_out.remove(parent) {
                    let metadata = fs::symlink_metadata(folder.join(parent))?;
                    let entry = entry(parent, &metadata, Kind::Folder(true));
                    entries.insert(parent.to_owned(), entry);
                }
            }
            let metadata = found.metadata()?;
            let kind = if is_folder {
                Kind::Folder(true)
            } else if metadata.is_symlink() {
                let target = fs::read_link(found.path())?;
                Kind::Symlink(target.into_os_string().into_vec())
            } else if metadata.is_file() {
                let mut hasher = blake3::Hasher::new();
                hasher.update_reader(File::open(found.path())?)?;
                let digest = hasher.finalize().to_hex().to_string();
                let size_bytes = hasher.count();
                files.insert(digest.clone(), (found.into_path(), size_bytes));
                Kind::File(Artifact { digest, size_bytes })
            } else {
                // Sockets, devices and FIFOs are of this host.
                continue;
            };
            let entry = entry(&path, &metadata, kind);
            entries.insert(path, entry);
            if entries.len() > MOST_ENTRIES {
                let message = format!(
                    "{} holds more than {MOST_ENTRIES} files and folders; leave some out by a .dockerignore",
                    folder.display()
                );
                return Err(io::Error::other(message));
            }
        }
        let entries = entries.into_values().collect();
        let manifest = Bytes::from(Manifest { entries }.encode_to_vec());
        Ok(Self {
            digest: blake3::hash(&manifest).to_hex().to_string(),
            manifest,
            files,
        })
    }

    /// Its digest, for [`proto::template::v1::BuildTemplateRequest`].
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// Sends what is not there yet; goes on when it breaks off. `progress` hears the bytes that were sent so far, and of how many.
    pub async fn upload<T>(
        &self,
        client: &mut TemplateServiceClient<T>,
        mut progress: impl FnMut(u64, u64),
    ) -> Result<(), Error>
    where
        T: GrpcService<tonic::body::Body> + Clone,
        T::Error: Into<StdError>,
        T::ResponseBody: Body<Data = Bytes> + Send + 'static,
        <T::ResponseBody as Body>::Error: Into<StdError> + Send,
    {
        let mut failures = 0;
        loop {
            let error = match self.upload_once(client, &mut progress).await {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            failures += 1;
            // There may be no place right now.
            let said = error.retry_after();
            if !error.is_interruption() && said.is_none() || failures > RETRIES {
                return Err(error);
            }
            let wait = wait_after(failures);
            tokio::time::sleep(said.map_or(wait, |said| said.min(LONGEST_WAIT).max(wait))).await;
        }
    }

    async fn upload_once<T>(
        &self,
        client: &mut TemplateServiceClient<T>,
        progress: &mut impl FnMut(u64, u64),
    ) -> Result<(), Error>
    where
        T: GrpcService<tonic::body::Body> + Clone,
        T::Error: Into<StdError>,
        T::ResponseBody: Body<Data = Bytes> + Send + 'static,
        <T::ResponseBody as Body>::Error: Into<StdError> + Send,
    {
        let mut digests: Vec<String> = self.files.keys().cloned().collect();
        digests.push(self.digest.clone());
        let mut missing = Vec::new();
        for digests in digests.chunks(MOST_ASKED) {
            let request = FindMissingFilesRequest {
                digests: digests.to_vec(),
            };
            let answer = client.find_missing_files(request).await?;
            missing.extend(answer.into_inner().digests);
        }
        if missing.is_empty() {
            return Ok(());
        }
        let size = |digest: &String| match self.files.get(digest) {
            Some((_, size)) => *size,
            None => self.manifest.len() as u64,
        };
        let total = missing.iter().map(size).sum();
        progress(0, total);
        let (parts, stream) = mpsc::channel(IN_FLIGHT);
        let mut uploader = client.clone();
        let upload = uploader.upload_files(ReceiverStream::new(stream));
        let feed = async {
            let mut sent = 0_u64;
            for digest in missing {
                let mut file: Box<dyn AsyncRead + Send + Unpin> = match self.files.get(&digest) {
                    Some((path, _)) => Box::new(tokio::fs::File::open(path).await?),
                    None => Box::new(io::Cursor::new(self.manifest.clone())),
                };
                let mut digest = Some(digest);
                loop {
                    let mut data = Vec::with_capacity(CHUNK);
                    let mut rest = (&mut file).take(CHUNK as u64);
                    // One that is empty is begun, too.
                    if rest.read_to_end(&mut data).await? == 0 && digest.is_none() {
                        break;
                    }
                    sent += data.len() as u64;
                    let part = UploadFilesRequest {
                        digest: digest.take().unwrap_or_default(),
                        data: Bytes::from(data),
                    };
                    // A server that stopped listening says why in its answer.
                    if parts.send(part).await.is_err() {
                        return Ok(());
                    }
                    progress(sent, total);
                }
            }
            drop(parts);
            Ok::<_, Error>(())
        };
        let (answer, fed) = tokio::join!(upload, feed);
        fed?;
        answer?;
        Ok(())
    }
}

fn entry(path: &Path, metadata: &Metadata, kind: Kind) -> ContextEntry {
    ContextEntry {
        path: path.as_os_str().as_bytes().to_vec(),
        kind: Some(kind),
        mode: metadata.mode() & 0o7777,
        modified: metadata.mtime(),
    }
}

/// What a `.dockerignore` leaves out (Docker, "Build context", ".dockerignore files"): the last line that matches a path, or a folder it is in, decides.
struct Ignored {
    lines: Vec<Line>,
}

struct Line {
    glob: String,
    is_exception: bool,
}

impl Ignored {
    fn parse(text: &str) -> Self {
        let text = text.trim_start_matches('\u{feff}');
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        let line = |line: &str| {
            let line = line.trim();
            let (line, is_exception) = match line.strip_prefix('!') {
                Some(line) => (line.trim(), true),
                None => (line, false),
            };
            let mut names: Vec<&str> = Vec::new();
            for name in line.split('/') {
                match name {
                    "" | "." => {}
                    ".." => drop(names.pop()),
                    name => names.push(name),
                }
            }
            // Braces, and a leading `!`, mean something to the crate only.
            let glob = names.join("/").replace('{', "\\{").replace('}', "\\}");
            let glob = match glob.strip_prefix('!') {
                Some(rest) => format!("\\!{rest}"),
                None => glob,
            };
            (!glob.is_empty()).then_some(Line { glob, is_exception })
        };
        Self {
            lines: lines.filter_map(line).collect(),
        }
    }

    /// Whether something in a folder that is left out may not be.
    fn may_except_below(&self, folder: &Path) -> bool {
        self.lines
            .iter()
            .filter(|line| line.is_exception)
            .any(|line| {
                let mut names = line.glob.split('/');
                for part in folder {
                    match names.next() {
                        Some("**") => return true,
                        Some(name) if fast_glob::glob_match(name, part.as_bytes()) => {}
                        _ => return false,
                    }
                }
                names.next().is_some()
            })
    }

    fn matches(&self, path: &Path) -> bool {
        let is_meant = |line: &&Line| {
            let mut paths = path.ancestors().filter(|path| *path != Path::new(""));
            paths.any(|path| fast_glob::glob_match(&line.glob, bytes(path)))
        };
        let last = self.lines.iter().rev().find(is_meant);
        last.is_some_and(|line| !line.is_exception)
    }
}

fn bytes(path: &Path) -> &[u8] {
    let text: &OsStr = path.as_os_str();
    text.as_bytes()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn the_last_line_that_matches_decides() {
        let ignored = Ignored::parse(
            "# comment\n\n*.log\n/build/\n**/node_modules\ntmp/*\n!tmp/keep\n  docs  \n!docs/README*\n./x/../y\n{a}\n",
        );
        for path in [
            "a.log",
            "build",
            "build/x/y",
            "node_modules",
            "a/b/node_modules/c",
            "tmp/x",
            "docs",
            "docs/x",
            "y",
            "{a}",
        ] {
            assert!(ignored.matches(Path::new(path)), "{path}");
        }
        for path in [
            "a/b.log",
            "builds",
            "tmp",
            "tmp/keep",
            "tmp/keep/x",
            "docs/README.md",
            "x",
            "a",
            "# comment",
        ] {
            assert!(!ignored.matches(Path::new(path)), "{path}");
        }
        let ignored = Ignored::parse("*\n!a/b/c\n!x/*/z\n");
        for (folder, may) in [
            ("a", true),
            ("a/b", true),
            ("a/b/c", false),
            ("b", false),
            ("x/y", true),
        ] {
            assert_eq!(ignored.may_except_below(Path::new(folder)), may, "{folder}");
        }
        assert!(Ignored::parse("*\n!**/keep\n").may_except_below(Path::new("a/b")));
        assert!(!Ignored::parse("").matches(Path::new("x")));
        assert!(Ignored::parse("*\n").matches(Path::new("x/y")));
    }

    #[test]
    fn a_folder_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::create_dir_all(at("app/deep")).unwrap();
        fs::create_dir_all(at("out/kept")).unwrap();
        for (name, text) in [
            ("app/a", "same"),
            ("app/deep/b", "same"),
            ("out/x", "x"),
            ("out/kept/y", "y"),
            (".env", "z"),
        ] {
            fs::write(at(name), text).unwrap();
        }
        symlink("deep/b", at("app/link")).unwrap();
        let context = BuildContext::read(folder.path(), ".env\nout\n!out/kept/*\n").unwrap();
        let manifest = Manifest::decode(context.manifest.clone()).unwrap();
        let paths: Vec<_> = manifest
            .entries
            .iter()
            .map(|entry| String::from_utf8_lossy(&entry.path).into_owned())
            .collect();
        let expected = [
            "app",
            "app/a",
            "app/deep",
            "app/deep/b",
            "app/link",
            "out",
            "out/kept",
            "out/kept/y",
        ];
        assert_eq!(paths, expected);
        // What is the same goes up once.
        assert_eq!(context.files.len(), 2);
        assert_eq!(
            context.digest(),
            blake3::hash(&context.manifest).to_hex().as_str()
        );
    }
}
