//! An image: its layers, and what it says of the programs in it. It lies in a folder as an OCI layout (image-layout.md of the OCI image
//! specification, 1.1) or as `docker save` has written it.
//!
//! ```text
//!   index.json --> [index -->] manifest --> config, layers      an OCI layout; each arrow is a digest
//!   manifest.json ---------------------> config, layers      docker save before it wrote layouts, too
//! ```
//! Whoever made the folder is not trusted: files are looked for within it only, whatever links there are (openat2(2), `RESOLVE_IN_ROOT`);
//! documents are bounded; and nothing is taken whose digest is not what the document above says: of a layer both that of its blob and that
//! of its content (DiffID).

use std::{
    collections::HashSet,
    fmt,
    fs::File,
    io::{self, Read},
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
};

use oci_spec::image::{Arch, Descriptor, ImageConfiguration, ImageIndex, ImageManifest, Os};
use rustix::fs::{Mode, OFlags, ResolveFlags};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use tokio_util::sync::CancellationToken;

use crate::{
    artifact::is_digest,
    layer::{Applied, LayerError, Limits, Root, Whiteouts},
};

/// Largest manifest, index or config: as registries take them (distribution-spec, "Pushing Manifests").
pub(crate) const MOST_DOCUMENT: u64 = 4 << 20;
/// An index may list indexes, so deep and so many of anything.
const DEEPEST_INDEX: u32 = 3;
const MOST_LISTED: usize = 1000;
/// Names and values of an environment together: as much as the kernel takes for one of them (execve(2)).
const MOST_ENV: usize = 128 << 10;
/// While something on the host is renamed, a path within a root may have to be looked up again (openat2(2), `EAGAIN`).
const TRIES: u32 = 100;
/// As the runtimes of containers have it; overlayfs takes no more, and no tool makes more.
pub(crate) const MOST_LAYERS: usize = 500;
const REFERENCE: &str = "org.opencontainers.image.ref.name";

/// What a document lists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listed {
    /// A manifest or an index, by digest.
    Manifest(String),
    /// Anything else that has a digest.
    Blob(String),
    /// A file of an archive.
    File(String),
}

impl fmt::Display for Listed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Manifest(digest) => write!(f, "the manifest {digest}"),
            Self::Blob(digest) => write!(f, "the blob {digest}"),
            Self::File(path) => path.fmt(f),
        }
    }
}

/// An image that is none, or not the one it says it is.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It holds neither index.json nor manifest.json.
    #[error(
        "it is no image: there is neither index.json (an OCI layout) nor manifest.json (docker save) in it"
    )]
    NoImage,
    /// A document does not parse, or says what cannot be.
    #[error("{what}: {why}")]
    Malformed {
        /// Which document.
        what: String,
        /// What is wrong with it.
        why: String,
    },
    /// Something that is listed is not there.
    #[error("{0} is listed, but not there")]
    Missing(Listed),
    /// Something is not what it should be.
    #[error("{what} is damaged: its digest is {found}, not {wanted}")]
    Digest {
        /// Which.
        what: String,
        /// As the document above says.
        wanted: String,
        /// Of what is there.
        found: String,
    },
    /// None of its images runs here.
    #[error("it has no image for {wanted}, only for {there}")]
    Platform {
        /// Of this host's guests.
        wanted: String,
        /// What it has.
        there: String,
    },
    /// Several images of which none is meant more than the others.
    #[error("it has several images; say which: {0}")]
    Several(String),
    /// None has the name that was asked for.
    #[error("it has no image {wanted:?}, only {there}")]
    NoSuchImage {
        /// Asked for.
        wanted: String,
        /// What it has.
        there: String,
    },
    /// A layer does not unpack.
    #[error("layer {number} ({digest}): {error}")]
    Layer {
        /// Counted from 1.
        number: usize,
        /// Of its blob, or of its content.
        digest: String,
        /// Why.
        error: LayerError,
    },
    /// The disk of template-svc.
    #[error("the disk of template-svc: {0}")]
    Disk(io::Error),
}

impl ImageError {
    /// The stable word of a build's failure.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NoImage | Self::Malformed { .. } | Self::Missing(_) => "IMAGE_INVALID",
            Self::Digest { .. } => "DIGEST_MISMATCH",
            Self::Platform { .. } => "PLATFORM_MISSING",
            Self::Several(_) | Self::NoSuchImage { .. } => "IMAGE_UNKNOWN",
            Self::Layer { error, .. } => error.reason(),
            Self::Disk(_) => "BUILD_FAILED",
        }
    }
}

/// One layer.
#[derive(Debug)]
struct Layer {
    /// In the folder.
    path: String,
    /// Of the blob, if a document says it; and its size.
    blob: Option<(String, u64)>,
    /// Of the content.
    diff_id: String,
}

/// An image whose documents are read and sound.
#[derive(Debug)]
pub struct Image {
    folder: PathBuf,
    config: ImageConfiguration,
    layers: Vec<Layer>,
}

/// What an image says of its programs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Defaults {
    /// Environment, in order.
    pub env: Vec<(String, String)>,
    /// Who runs them; empty for root.
    pub user: String,
    /// Where they begin; empty for the root.
    pub cwd: String,
    /// What is started: `ENTRYPOINT`.
    pub entrypoint: Vec<String>,
    /// What is started when nothing else is said, or given to that: `CMD`.
    pub command: Vec<String>,
}

impl Defaults {
    /// What is started, whole.
    pub fn argv(&self) -> Vec<String> {
        [self.entrypoint.as_slice(), &self.command].concat()
    }

    /// Whether processes can be started so, in that root. Blocking.
    pub fn check(&self, root: &Path) -> Result<(), ImageError> {
        let wrong = |why: String| malformed("config", why);
        self.check_env()?;
        if self.user.is_empty() || self.user.parse::<u32>().is_ok() {
            // Numbers need no name.
            return Ok(());
        }
        let reader = Reader { folder: root };
        let users = reader.document("etc/passwd")?.unwrap_or_default();
        let is_one =
            |line: &[u8]| line.split(|byte| *byte == b':').next() == Some(self.user.as_bytes());
        if users.split(|byte| *byte == b'\n').any(is_one) {
            Ok(())
        } else {
            Err(wrong(format!(
                "its user {:?} is not in its /etc/passwd",
                self.user
            )))
        }
    }

    /// Whether programs can be given that environment.
    pub fn check_env(&self) -> Result<(), ImageError> {
        let wrong = |why: String| malformed("config", why);
        for (name, value) in &self.env {
            if name.is_empty() || name.contains('\0') || value.contains('\0') {
                return Err(wrong(format!(
                    "{name:?} is no name of an environment variable"
                )));
            }
        }
        let length = |(name, value): &(String, String)| name.len() + value.len();
        if self.env.iter().map(length).sum::<usize>() > MOST_ENV {
            return Err(wrong(format!(
                "its environment is larger than {MOST_ENV} bytes"
            )));
        }
        Ok(())
    }
}

/// An entry of `manifest.json`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

impl Image {
    /// Finds the image of that name, or the only one. Blocking.
    pub fn open(folder: &Path, name: Option<&str>) -> Result<Self, ImageError> {
        let reader = Reader { folder };
        if let Some(index) = reader.document("index.json")? {
            let index: ImageIndex = parse("index.json", &index)?;
            return reader.image_of_layout(&index, name);
        }
        match reader.document("manifest.json")? {
            Some(saved) => reader.saved_image(&parse::<Vec<Saved>>("manifest.json", &saved)?, name),
            None => Err(ImageError::NoImage),
        }
    }

    /// How many layers it has.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// What it says of its programs.
    pub fn defaults(&self) -> Defaults {
        let Some(config) = self.config.config() else {
            return Defaults::default();
        };
        let words = |words: &Option<Vec<String>>| words.clone().unwrap_or_default();
        let pair = |line: String| match line.split_once('=') {
            Some((name, value)) => (name.to_owned(), value.to_owned()),
            None => (line, String::new()),
        };
        Defaults {
            env: words(config.env()).into_iter().map(pair).collect(),
            user: config.user().clone().unwrap_or_default(),
            cwd: config.working_dir().clone().unwrap_or_default(),
            entrypoint: words(config.entrypoint()),
            command: words(config.cmd()),
        }
    }

    /// Digests and sizes of its layers as they are sent, in order.
    pub fn blobs(&self) -> impl Iterator<Item = (String, u64)> {
        self.layers.iter().filter_map(|layer| layer.blob.clone())
    }

    /// A layer as it lies there, counted from 0, and its DiffID.
    pub fn layer(&self, number: usize) -> Result<(File, String), ImageError> {
        let missing = |what: String| ImageError::Missing(Listed::File(what));
        let layer = self.layers.get(number);
        let layer = layer.ok_or_else(|| missing(format!("layer {number}")))?;
        let reader = Reader {
            folder: &self.folder,
        };
        let file = reader.file(&layer.path)?;
        let file = file.ok_or_else(|| missing(layer.path.clone()))?;
        Ok((file, layer.diff_id.clone()))
    }

    /// Puts its layers upon each other in an empty folder; `ready` waits for each to be there, and `said` hears of each that is done.
    /// Blocking.
    pub fn unpack(
        &self,
        to: &Path,
        limits: Limits,
        cancel: &CancellationToken,
        mut ready: impl FnMut() -> Result<(), LayerError>,
        mut said: impl FnMut(usize, Applied),
    ) -> Result<(), ImageError> {
        let reader = Reader {
            folder: &self.folder,
        };
        let mut root = Root::new(to.to_owned(), limits);
        for (number, layer) in (1..).zip(&self.layers) {
            let failed = |error| ImageError::Layer {
                number,
                digest: layer
                    .blob
                    .as_ref()
                    .map_or(&layer.diff_id, |(digest, _)| digest)
                    .clone(),
                error,
            };
            ready().map_err(failed)?;
            let file = reader.file(&layer.path)?;
            let missing = || ImageError::Missing(Listed::File(layer.path.clone()));
            let mut blob = Hashed::new(file.ok_or_else(missing)?);
            let applied = root
                .apply(&mut blob, Whiteouts::Apply, cancel)
                .map_err(failed)?;
            let what = || format!("layer {number}");
            if let Some((digest, size)) = &layer.blob {
                let (found, read) = blob.finish().map_err(ImageError::Disk)?;
                is_same(what, digest, &found)?;
                if read != *size {
                    return Err(malformed(
                        "the manifest",
                        format!("layer {number} has {read} bytes, not {size}"),
                    ));
                }
            }
            is_same(what, &layer.diff_id, &format!("sha256:{}", applied.digest))?;
            said(number, applied);
        }
        root.finish().map_err(|error| ImageError::Layer {
            number: self.layers.len(),
            digest: String::new(),
            error,
        })
    }
}

fn malformed(what: &str, why: impl ToString) -> ImageError {
    ImageError::Malformed {
        what: what.to_owned(),
        why: why.to_string(),
    }
}

fn parse<T: for<'a> Deserialize<'a>>(what: &str, bytes: &[u8]) -> Result<T, ImageError> {
    serde_json::from_slice(bytes).map_err(|error| malformed(what, error))
}

fn is_same(what: impl Fn() -> String, wanted: &str, found: &str) -> Result<(), ImageError> {
    if wanted == found {
        Ok(())
    } else {
        Err(ImageError::Digest {
            what: what(),
            wanted: wanted.to_owned(),
            found: found.to_owned(),
        })
    }
}

/// A digest of the one kind there is in practice, as text.
pub(crate) fn sha256(what: &str, digest: &str) -> Result<String, ImageError> {
    if digest.strip_prefix("sha256:").is_some_and(is_digest) {
        Ok(digest.to_owned())
    } else {
        Err(malformed(what, format!("{digest:?} is no SHA-256 digest")))
    }
}

/// The digest of a document.
pub(crate) fn digest_of(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

/// Where a blob lies in a layout.
pub(crate) fn blob_path(digest: &str) -> String {
    format!("blobs/{}", digest.replacen(':', "/", 1))
}

/// The platform that guests of this host have.
fn platform() -> (Os, Arch) {
    (Os::Linux, Arch::default())
}

/// Whether it names no variant of its architecture, or the first.
fn is_for_every_cpu(descriptor: &Descriptor) -> bool {
    let platform = descriptor.platform().as_ref();
    let variant = platform.and_then(|platform| platform.variant().as_deref());
    variant.is_none_or(|variant| variant == "v1")
}

/// What a walk through indexes has come to.
#[derive(Default)]
struct Seen {
    digests: HashSet<String>,
    found: Vec<Descriptor>,
    /// Platforms that are not this host's.
    others: Vec<String>,
}

/// Reads what lies in the folder, and nothing else.
struct Reader<'a> {
    folder: &'a Path,
}

impl Reader<'_> {
    fn file(&self, path: &str) -> Result<Option<File>, ImageError> {
        let found = (|| {
            let named = OFlags::PATH | OFlags::CLOEXEC;
            let folder = rustix::fs::open(self.folder, named, Mode::empty())?;
            let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
            for _ in 0..TRIES {
                match rustix::fs::openat2(&folder, path, named, Mode::empty(), resolve) {
                    Err(rustix::io::Errno::AGAIN) => {}
                    found => return found,
                }
            }
            Err(rustix::io::Errno::AGAIN)
        })();
        match found {
            // Opened is only what is a file: of a device that would be the host's.
            Ok(found) => {
                let found = File::from(found);
                if !found.metadata().map_err(ImageError::Disk)?.is_file() {
                    return Err(malformed(path, "is no file"));
                }
                let name = format!("/proc/self/fd/{}", found.as_raw_fd());
                File::open(name).map(Some).map_err(ImageError::Disk)
            }
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => Ok(None),
            Err(error) => Err(malformed(path, error)),
        }
    }

    fn document(&self, path: &str) -> Result<Option<Vec<u8>>, ImageError> {
        let Some(file) = self.file(path)? else {
            return Ok(None);
        };
        let mut bytes = Vec::new();
        file.take(MOST_DOCUMENT + 1)
            .read_to_end(&mut bytes)
            .map_err(ImageError::Disk)?;
        if bytes.len() as u64 > MOST_DOCUMENT {
            return Err(malformed(
                path,
                format!("is larger than {MOST_DOCUMENT} bytes"),
            ));
        }
        Ok(Some(bytes))
    }

    /// A document that another one lists.
    fn listed(
        &self,
        what: &str,
        descriptor: &Descriptor,
        listed: fn(String) -> Listed,
    ) -> Result<Vec<u8>, ImageError> {
        let digest = sha256(what, descriptor.digest().as_ref())?;
        let missing = || ImageError::Missing(listed(digest.clone()));
        let bytes = self.document(&blob_path(&digest))?.ok_or_else(missing)?;
        is_same(|| what.to_owned(), &digest, &digest_of(&bytes))?;
        Ok(bytes)
    }

    fn image_of_layout(&self, index: &ImageIndex, name: Option<&str>) -> Result<Image, ImageError> {
        let named = |descriptor: &Descriptor| {
            let annotations = descriptor.annotations().as_ref();
            annotations.and_then(|annotations| annotations.get(REFERENCE).cloned())
        };
        let listed = index.manifests();
        let names = || join(listed.iter().filter_map(named));
        let meant: Vec<&Descriptor> = match name {
            Some(wanted) => listed
                .iter()
                .filter(|it| named(it).as_deref() == Some(wanted))
                .collect(),
            None => listed.iter().collect(),
        };
        if let (Some(wanted), []) = (name, meant.as_slice()) {
            return Err(ImageError::NoSuchImage {
                wanted: wanted.to_owned(),
                there: names(),
            });
        }
        let mut seen = Seen::default();
        for descriptor in meant {
            self.candidates(descriptor, DEEPEST_INDEX, &mut seen)?;
        }
        match seen.found.as_slice() {
            [manifest] => self.image_of_manifest(manifest),
            [] => Err(ImageError::Platform {
                wanted: shown(&platform()),
                there: join(seen.others),
            }),
            _ => Err(ImageError::Several(names())),
        }
    }

    /// Manifests of this host's platform that a descriptor leads to, and the platforms of all others.
    fn candidates(
        &self,
        descriptor: &Descriptor,
        depth: u32,
        seen: &mut Seen,
    ) -> Result<(), ImageError> {
        // The same image under several names is one.
        if !seen.digests.insert(descriptor.digest().to_string()) {
            return Ok(());
        }
        if seen.digests.len() > MOST_LISTED {
            return Err(malformed(
                "index.json",
                format!("more than {MOST_LISTED} manifests and indexes"),
            ));
        }
        let kind = descriptor.media_type().to_string();
        match kind.as_str() {
            INDEX | DOCKER_LIST => {
                let what = format!("index {}", descriptor.digest());
                let depth = depth
                    .checked_sub(1)
                    .ok_or_else(|| malformed(&what, "it is an index in an index in an index"))?;
                let index: ImageIndex =
                    parse(&what, &self.listed(&what, descriptor, Listed::Manifest)?)?;
                let before = seen.found.len();
                for descriptor in index.manifests() {
                    self.candidates(descriptor, depth, seen)?;
                    // Of several for one platform the first is meant (image-index.md, "manifests"), unless it is for a newer CPU.
                    let found = seen.found.get(before..).unwrap_or_default();
                    if let Some(plain) = found.iter().position(is_for_every_cpu) {
                        seen.found.swap(before, before + plain);
                        break;
                    }
                }
                seen.found.truncate(before + 1);
            }
            MANIFEST | DOCKER_MANIFEST => {
                let of = if let Some(platform) = descriptor.platform() {
                    (platform.os().clone(), platform.architecture().clone())
                } else {
                    // A manifest that stands alone does not say it; its config does.
                    let (_, config) = self.manifest(descriptor)?;
                    (config.os().clone(), config.architecture().clone())
                };
                if of == platform() {
                    seen.found.push(descriptor.clone());
                } else if seen.others.len() < MOST_NAMED {
                    seen.others.push(shown(&of));
                }
            }
            // Signatures, attestations and whatever else is kept beside images.
            _ => {}
        }
        Ok(())
    }

    fn manifest(
        &self,
        descriptor: &Descriptor,
    ) -> Result<(ImageManifest, ImageConfiguration), ImageError> {
        let what = format!("manifest {}", descriptor.digest());
        let manifest: ImageManifest =
            parse(&what, &self.listed(&what, descriptor, Listed::Manifest)?)?;
        let what = format!("config {}", manifest.config().digest());
        let config = parse(&what, &self.listed(&what, manifest.config(), Listed::Blob)?)?;
        Ok((manifest, config))
    }

    fn image_of_manifest(&self, descriptor: &Descriptor) -> Result<Image, ImageError> {
        let (manifest, config) = self.manifest(descriptor)?;
        let what = format!("manifest {}", descriptor.digest());
        let diff_ids = diff_ids(&config, manifest.layers().len())?;
        let mut layers = Vec::new();
        for (layer, diff_id) in manifest.layers().iter().zip(diff_ids) {
            let kind = layer.media_type().to_string();
            if !LAYERS.contains(&kind.as_str()) {
                return Err(malformed(
                    &what,
                    format!("a layer of the kind {kind}, which is not known"),
                ));
            }
            let digest = sha256(&what, layer.digest().as_ref())?;
            layers.push(Layer {
                path: blob_path(&digest),
                blob: Some((digest, layer.size())),
                diff_id,
            });
        }
        Ok(Image {
            folder: self.folder.to_owned(),
            config,
            layers,
        })
    }

    fn saved_image(&self, saved: &[Saved], name: Option<&str>) -> Result<Image, ImageError> {
        let names = || {
            join(
                saved
                    .iter()
                    .flat_map(|it| it.repo_tags.clone().unwrap_or_default()),
            )
        };
        let is_meant = |it: &&Saved| match name {
            Some(wanted) => it.repo_tags.iter().flatten().any(|tag| tag == wanted),
            None => true,
        };
        let meant: Vec<&Saved> = saved.iter().filter(is_meant).collect();
        let image = match (meant.as_slice(), name) {
            ([image], _) => image,
            ([], Some(wanted)) => {
                return Err(ImageError::NoSuchImage {
                    wanted: wanted.to_owned(),
                    there: names(),
                });
            }
            ([], None) => return Err(ImageError::NoImage),
            _ => return Err(ImageError::Several(names())),
        };
        let bytes = self
            .document(&image.config)?
            .ok_or_else(|| ImageError::Missing(Listed::File(image.config.clone())))?;
        let config: ImageConfiguration = parse(&image.config, &bytes)?;
        let of = (config.os().clone(), config.architecture().clone());
        if of != platform() {
            return Err(ImageError::Platform {
                wanted: shown(&platform()),
                there: shown(&of),
            });
        }
        let diff_ids = diff_ids(&config, image.layers.len())?;
        let layer = |(path, diff_id): (&String, String)| Layer {
            path: path.clone(),
            blob: None,
            diff_id,
        };
        Ok(Image {
            folder: self.folder.to_owned(),
            layers: image.layers.iter().zip(diff_ids).map(layer).collect(),
            config,
        })
    }
}

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// All four, as a header lists them.
pub(crate) const MANIFESTS: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";

/// Whether it is the media type of a manifest or an index.
pub(crate) fn is_manifest(kind: &str) -> bool {
    [INDEX, MANIFEST, DOCKER_LIST, DOCKER_MANIFEST].contains(&kind)
}

/// How a layer is compressed is seen from its first bytes; these are the kinds that are layers.
const LAYERS: [&str; 5] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
];

fn diff_ids(config: &ImageConfiguration, layers: usize) -> Result<Vec<String>, ImageError> {
    let listed = config.rootfs().diff_ids();
    if listed.len() != layers {
        return Err(malformed(
            "config",
            format!("{} DiffIDs for {layers} layers", listed.len()),
        ));
    }
    if layers > MOST_LAYERS {
        return Err(malformed(
            "config",
            format!("more than {MOST_LAYERS} layers"),
        ));
    }
    listed.iter().map(|id| sha256("config", id)).collect()
}

/// As many are listed in an error, and so much of each.
const MOST_NAMED: usize = 20;
const LONGEST_NAMED: usize = 128;

fn shown((os, architecture): &(Os, Arch)) -> String {
    let shown = format!("{os}/{architecture}");
    shown.chars().take(LONGEST_NAMED).collect()
}

fn join(words: impl IntoIterator<Item = String>) -> String {
    let short = |word: String| word.chars().take(LONGEST_NAMED).collect();
    let words: Vec<String> = words.into_iter().take(MOST_NAMED).map(short).collect();
    if words.is_empty() {
        "such without a name".to_owned()
    } else {
        words.join(", ")
    }
}

/// Counts and hashes what is read.
struct Hashed<R> {
    inner: R,
    hasher: Sha256,
    count: u64,
}

impl<R: Read> Hashed<R> {
    fn new(inner: R) -> Self {
        Self {
            inner,
            hasher: Sha256::new(),
            count: 0,
        }
    }

    /// Digest and size of all of it, also of what nobody has read.
    fn finish(mut self) -> io::Result<(String, u64)> {
        io::copy(&mut self, &mut io::sink())?;
        let digest = hex::encode(self.hasher.finalize());
        Ok((format!("sha256:{digest}"), self.count))
    }
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(into)?;
        self.hasher.update(into.get(..count).unwrap_or_default());
        self.count += count as u64;
        Ok(count)
    }
}
