//! What a template's root is made of, by its source: layers, which are unpacked upon each other and kept as they came.

use std::{
    fs::File,
    io::Write as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use oci_spec::distribution::Reference;
use prost::Message as _;
use proto::{
    node::v1::{ExportSessionResponse, export_session_response::Part},
    template::v1::{Artifact, BuildTemplateRequest, Layer, Template, build_source::Source},
};
use service_kit::ids::SessionId;
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;

use super::{BuildError, Builder, Work, failed, io_failed, lost::is_worth_another_try, team_of};
use crate::{
    artifact::{ArtifactDigest, Artifacts},
    context::Context,
    image::{Defaults, Image, MOST_LAYERS},
    layer::{Applied, LayerError, Limits, Root, Whiteouts},
    registry::{self, Login, Pull},
    rootfs,
    sessions::{ExportError, patiently},
    store::StoredBuild,
};

/// An image has come within it, or does not come.
const PULL_LIMIT: Duration = Duration::from_hours(1);
/// Pieces of a session's layer that wait to be written.
const PIECES: usize = 4;
/// Of zstd: what a session has changed is unpacked more often than packed.
const LEVEL: i32 = 3;

/// A root, and what there is to say of it.
#[derive(Debug, Default)]
pub(super) struct Made {
    pub(super) defaults: Defaults,
    pub(super) source_image: String,
    pub(super) layers: Vec<Layer>,
    /// The root, packed before by another build; if not, it lies where it was to be made.
    pub(super) packed: Option<Artifact>,
}

/// An image of which all is here but its layers.
struct Pulled {
    reference: Reference,
    pull: Pull,
    image: Arc<Image>,
    digest: String,
}

impl Pulled {
    fn source_image(&self) -> String {
        let (registry, repository) = (self.reference.registry(), self.reference.repository());
        format!("{registry}/{repository}@{}", self.digest)
    }

    /// Under which its layers are known.
    fn key(&self) -> [u8; 32] {
        blake3::derive_key("sandmesh build: image", self.digest.as_bytes())
    }
}

/// Where a root is made: a build's folder.
///
/// ```text
///   fetched/   what comes from elsewhere lies there, an archive as its maker wants it: nothing of ours is written among it
///   root/      the root itself
///   laid       of which layers it is
///   packed     the root, packed
/// ```
#[derive(Clone)]
pub(super) struct Making {
    work: Work,
    /// Of the build's folder, the part that is its own.
    place: PathBuf,
    limits: Limits,
    /// For the layers.
    artifacts: Artifacts,
    cancel: CancellationToken,
}

impl Builder {
    /// Makes the root of that source.
    pub(super) async fn make(
        &self,
        stored: &StoredBuild,
        source: Option<Source>,
        making: Making,
    ) -> Result<Made, BuildError> {
        let id = &stored.build.build_id;
        match source {
            Some(Source::RootfsTarball(digest)) => {
                let tarball = self.uploaded(stored, &digest)?;
                self.store.log(id, "unpacking the root filesystem").await?;
                self.logged(id, move |lines| making.tarball(&tarball, &digest, lines))
                    .await
            }
            Some(Source::ImageArchive(archive)) => {
                let tarball = self.uploaded(stored, &archive.digest)?;
                self.store.log(id, "unpacking the archive").await?;
                let unpack = move |lines: &_| making.archive(&tarball, &archive.image, lines);
                self.logged(id, unpack).await
            }
            Some(Source::OciImage(name)) => self.pull(stored, &name, making).await,
            Some(Source::SessionId(session)) => self.export(stored, &session, making).await,
            Some(Source::Dockerfile(text)) => self.dockerfile(stored, &text, making).await,
            None => Err(failed("SOURCE_INVALID", "it says not what to build from")),
        }
    }

    fn uploaded(&self, stored: &StoredBuild, digest: &str) -> Result<PathBuf, BuildError> {
        let found = self.uploads.find(&team_of(stored)?, digest);
        found.map_err(io_failed)?.ok_or_else(|| {
            failed(
                "SOURCE_UNKNOWN",
                format!("no uploaded source {digest}; upload it again"),
            )
        })
    }

    /// Fetches an image, and unpacks its layers as they come.
    async fn pull(
        &self,
        stored: &StoredBuild,
        name: &str,
        making: Making,
    ) -> Result<Made, BuildError> {
        let pulled = self.documents(stored, name, &making).await?;
        self.pull_layers(stored, pulled, making).await
    }

    /// Fetches what an image says of itself.
    async fn documents(
        &self,
        stored: &StoredBuild,
        name: &str,
        making: &Making,
    ) -> Result<Pulled, BuildError> {
        let reference = registry::parse_reference(name)?;
        let login = self.login(stored, &registry::registry_of(reference.registry()))?;
        let folder = making.fetched();
        let pull = Pull::new(&self.registries, reference.clone(), login, folder)?;
        let (image, digest) = pull.documents().await?;
        let sizes = image.blobs().map(|(_, size)| size);
        let bytes = sizes.fold(0_u64, u64::saturating_add);
        let layers = image.layers();
        let line = format!("{reference} is {digest}: {layers} layers of {bytes} bytes");
        self.store.log(&stored.build.build_id, &line).await?;
        Ok(Pulled {
            reference,
            pull,
            image: Arc::new(image),
            digest,
        })
    }

    async fn pull_layers(
        &self,
        stored: &StoredBuild,
        pulled: Pulled,
        making: Making,
    ) -> Result<Made, BuildError> {
        let Pulled {
            reference,
            pull,
            image,
            ..
        } = &pulled;
        // Room for all: those that come do not wait for those that are unpacked.
        let (arrived, mut arrivals) = mpsc::channel(image.layers().max(1));
        let limit = making.limits.bytes;
        let since = Instant::now();
        let fetch = async {
            let fetched = pull.layers(image, limit, arrived);
            let late = |_| {
                let limit = PULL_LIMIT.as_secs();
                failed(
                    "PULL_TIMED_OUT",
                    format!("{reference} has not come within {limit} s"),
                )
            };
            let fetched = tokio::time::timeout(PULL_LIMIT, fetched).await;
            fetched.map_err(late)??;
            Ok(since.elapsed())
        };
        let unpacked = Arc::clone(image);
        let unpack = self.logged(&stored.build.build_id, move |lines| {
            making.image(&unpacked, lines, || {
                arrivals.blocking_recv().ok_or(LayerError::Cancelled)
            })
        });
        let (made, fetched) = tokio::try_join!(unpack, fetch)?;
        let line = format!(
            "all layers had come after {:.2} s, and were unpacked after {:.2} s",
            fetched.as_secs_f64(),
            since.elapsed().as_secs_f64()
        );
        self.store.log(&stored.build.build_id, &line).await?;
        Ok(Made {
            source_image: pulled.source_image(),
            ..made
        })
    }

    /// The credentials a build has for a registry.
    fn login(&self, stored: &StoredBuild, registry: &str) -> Result<Option<Login>, BuildError> {
        let mut logins = self.opened(stored)?.registry_logins.into_iter();
        let login = logins.find(|login| registry::registry_of(&login.registry) == registry);
        Ok(login.map(|login| Login {
            username: login.username,
            password: login.password,
        }))
    }

    /// What was taken out of a build's request, since nobody else may read it.
    pub(super) fn opened(&self, stored: &StoredBuild) -> Result<BuildTemplateRequest, BuildError> {
        let Some(sealed) = &stored.secrets else {
            return Ok(BuildTemplateRequest::default());
        };
        let opened = self.sealer.open(&stored.build.build_id, sealed);
        let opened = opened.map_err(|error| failed("CREDENTIALS_UNREADABLE", error.to_string()))?;
        BuildTemplateRequest::decode(&*opened).map_err(|_| {
            failed(
                "CREDENTIALS_UNREADABLE",
                "the build's credentials do not parse",
            )
        })
    }

    /// Takes what was changed in a session, and puts it upon its template.
    async fn export(
        &self,
        stored: &StoredBuild,
        session: &str,
        making: Making,
    ) -> Result<Made, BuildError> {
        let id = &stored.build.build_id;
        let team = team_of(stored)?;
        let session = SessionId::parse(session)
            .map_err(|error| failed("SESSION_UNKNOWN", error.to_string()))?;
        let line = format!("taking what was changed in session {session}");
        self.store.log(id, &line).await?;
        let take = || async {
            let mut parts = self.sessions.export(&team, &session).await?;
            let base = match parts
                .message()
                .await
                .map_err(ExportError::from)?
                .and_then(|answer| answer.part)
            {
                Some(Part::Template(template)) => self.layers_of(&template).await?,
                _ => {
                    return Err(failed(
                        "EXPORT_FAILED",
                        "the node does not say of what template",
                    ));
                }
            };
            has_room(&base.layers)?;
            let change = self.take_change(id, parts, &making).await?;
            Ok((base, change))
        };
        let (base, change) = patiently(is_worth_another_try, take).await?;
        let mut layers = base.layers;
        layers.push(change);
        let defaults = Defaults {
            env: base.env.into_iter().collect(),
            user: base.default_user,
            ..Defaults::default()
        };
        self.logged(id, move |lines| {
            making.lay(&layers, lines)?;
            making.check(&defaults)?;
            // It is not the template's image any more.
            Ok(Made {
                defaults,
                layers,
                ..Made::default()
            })
        })
        .await
    }

    /// Receives what was changed in a session, and keeps it.
    pub(super) async fn take_change(
        &self,
        id: &str,
        mut parts: Streaming<ExportSessionResponse>,
        making: &Making,
    ) -> Result<Layer, BuildError> {
        let (pieces, arriving) = mpsc::channel(PIECES);
        let carry = async move {
            while let Some(answer) = parts.message().await.map_err(ExportError::from)? {
                let Some(Part::Data(data)) = answer.part else {
                    continue;
                };
                if pieces.send(data).await.is_err() {
                    break;
                }
            }
            // What breaks off must not look like an end. Whoever does not hear it has failed, and says so.
            let _ = pieces.send(bytes::Bytes::new()).await;
            Ok(())
        };
        let making = making.clone();
        let receive = self.logged(id, move |lines| making.receive(arriving, lines));
        let (layer, ()) = tokio::try_join!(receive, carry)?;
        Ok(layer)
    }

    /// An image to begin with; one whose layers are known is not fetched again.
    pub(super) async fn image_base(
        &self,
        stored: &StoredBuild,
        name: &str,
        making: Making,
    ) -> Result<Made, BuildError> {
        let pulled = self.documents(stored, name, &making).await?;
        let known = self.known(stored, pulled.key()).await?;
        if let Some(layers) = known {
            let line = "its layers are known";
            self.store.log(&stored.build.build_id, line).await?;
            return Ok(Made {
                defaults: without_group(pulled.image.defaults()).0,
                source_image: pulled.source_image(),
                layers,
                packed: None,
            });
        }
        let key = pulled.key();
        let made = self.pull_layers(stored, pulled, making).await?;
        self.remember(stored, &key, &made.layers).await?;
        Ok(made)
    }

    /// A version with its layers.
    async fn layers_of(&self, template: &Template) -> Result<Template, BuildError> {
        let Template {
            team,
            name,
            version,
            ..
        } = template;
        let stored = self.store.version(team, name, *version).await?;
        // A number may have been given anew since.
        let stored = stored.filter(|stored| stored.rootfs == template.rootfs);
        let stored = stored.ok_or_else(|| {
            failed(
                "TEMPLATE_UNKNOWN",
                format!("the session's template, {name}@{version}, was removed"),
            )
        })?;
        self.held(has_layers(stored)?)
    }

    /// A template whose layers stay for as long as a build may last, also if it is removed meanwhile.
    pub(super) fn held(&self, template: Template) -> Result<Template, BuildError> {
        let blobs = template.layers.iter().map(|layer| layer.blob.as_ref());
        let gone = blobs.flatten().find(|blob| !self.is_kept(blob));
        match gone {
            None => Ok(template),
            Some(Artifact { digest, .. }) => Err(failed(
                "ARTIFACT_MISSING",
                format!("the stored layer {digest} is gone"),
            )),
        }
    }
}

impl Making {
    pub(super) fn new(
        work: Work,
        limits: Limits,
        artifacts: Artifacts,
        cancel: CancellationToken,
    ) -> Result<Self, BuildError> {
        let making = Self {
            work,
            place: PathBuf::new(),
            limits,
            artifacts,
            cancel,
        };
        making.begin()
    }

    /// Another root within the same build's folder; by the same name it is the same one.
    pub(super) fn aside(&self, name: &str) -> Result<Self, BuildError> {
        let making = Self {
            place: self.place.join(format!("aside-{name}")),
            ..self.clone()
        };
        match std::fs::create_dir(making.path("")) {
            Ok(()) => making.begin(),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(making),
            Err(error) => Err(io_failed(error)),
        }
    }

    /// The same, empty, whatever was there before. Blocking.
    pub(super) fn fresh_aside(&self, name: &str) -> Result<Self, BuildError> {
        let place = self.path(&format!("aside-{name}"));
        match std::fs::remove_dir_all(place) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(io_failed(error)),
            _ => self.aside(name),
        }
    }

    fn begin(self) -> Result<Self, BuildError> {
        for folder in [self.root(), self.fetched()] {
            std::fs::create_dir(folder).map_err(io_failed)?;
        }
        Ok(self)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.work.path(&self.place).join(name)
    }

    fn fetched(&self) -> PathBuf {
        self.path("fetched")
    }

    pub(super) fn root(&self) -> PathBuf {
        self.path("root")
    }

    fn laid(&self) -> PathBuf {
        self.path("laid")
    }

    pub(super) fn cancelled(&self) -> CancellationToken {
        self.cancel.clone()
    }

    /// Bytes that may be unpacked.
    pub(super) fn largest(&self) -> u64 {
        self.limits.bytes
    }

    /// A file without a name.
    pub(super) fn scratch(&self) -> Result<File, BuildError> {
        tempfile::tempfile_in(self.path("")).map_err(io_failed)
    }

    /// Lays a build context out, once. Blocking.
    pub(super) fn lay_context(
        &self,
        context: &Context,
        files: &Artifacts,
    ) -> Result<(), BuildError> {
        if self.laid().exists() {
            return Ok(());
        }
        let is_cancelled = || self.cancel.is_cancelled();
        context.lay(files, &self.root(), self.limits.bytes, is_cancelled)?;
        std::fs::write(self.laid(), "").map_err(io_failed)
    }

    /// A whole root. Blocking.
    fn tarball(
        self,
        tarball: &Path,
        digest: &str,
        lines: &mpsc::Sender<String>,
    ) -> Result<Made, BuildError> {
        let applied = rootfs::unpack(tarball, &self.root(), self.limits, &self.cancel)?;
        say(lines, said(&applied));
        let digest = ArtifactDigest::parse(digest)
            .ok_or_else(|| failed("SOURCE_UNKNOWN", "no digest of an upload"))?;
        let blob = self.artifacts.share(tarball, &digest).map_err(io_failed)?;
        Ok(Made {
            layers: vec![Layer {
                blob: Some(blob),
                diff_id: format!("sha256:{}", applied.digest),
                has_whiteouts: false,
            }],
            ..Made::default()
        })
    }

    /// The image of that name in an archive, or the only one if that is empty. Blocking.
    fn archive(
        self,
        tarball: &Path,
        name: &str,
        lines: &mpsc::Sender<String>,
    ) -> Result<Made, BuildError> {
        let mut archive = Root::new(self.fetched(), self.limits);
        let file = File::open(tarball).map_err(io_failed)?;
        archive.apply(file, Whiteouts::Keep, &self.cancel)?;
        let image = Image::open(&self.fetched(), Some(name).filter(|name| !name.is_empty()))?;
        self.image(&image, lines, || Ok(()))
    }

    /// Each layer when it is there. What is to be said goes to `lines`, whoever reads those. Blocking.
    fn image(
        self,
        image: &Image,
        lines: &mpsc::Sender<String>,
        ready: impl FnMut() -> Result<(), LayerError>,
    ) -> Result<Made, BuildError> {
        let count = image.layers();
        let done = |number, applied| {
            say(
                lines,
                format!("layer {number} of {count}: {}", said(&applied)),
            );
        };
        image.unpack(&self.root(), self.limits, &self.cancel, ready, done)?;
        rootfs::check(&self.root())?;
        let (defaults, told) = without_group(image.defaults());
        if let Some(told) = told {
            say(lines, told);
        }
        defaults.check(&self.root())?;
        let mut layers = Vec::new();
        for number in 0..count {
            let (file, diff_id) = image.layer(number)?;
            layers.push(Layer {
                blob: Some(self.artifacts.ingest_from(file).map_err(io_failed)?),
                diff_id,
                has_whiteouts: true,
            });
        }
        self.note_laid(&layers)?;
        Ok(Made {
            defaults,
            layers,
            ..Made::default()
        })
    }

    /// A layer in pieces, of which the last is empty. Blocking.
    fn receive(
        self,
        mut pieces: mpsc::Receiver<bytes::Bytes>,
        lines: &mpsc::Sender<String>,
    ) -> Result<Layer, BuildError> {
        let mut incoming = self.artifacts.begin().map_err(io_failed)?;
        let mut packed = zstd::Encoder::new(&mut incoming, LEVEL).map_err(io_failed)?;
        let (mut size, mut hasher) = (0_u64, Sha256::new());
        loop {
            let Some(piece) = pieces.blocking_recv() else {
                // Whoever sent it says why it broke off.
                return Err(BuildError::Cancelled);
            };
            if piece.is_empty() {
                break;
            }
            size += piece.len() as u64;
            if size > self.limits.bytes {
                return Err(LayerError::TooLarge(self.limits.bytes).into());
            }
            hasher.update(&piece);
            packed.write_all(&piece).map_err(io_failed)?;
        }
        packed.finish().map_err(io_failed)?;
        let blob = incoming.finish().map_err(io_failed)?;
        let line = format!("what was changed is a tarball of {size} bytes");
        say(lines, line);
        Ok(Layer {
            blob: Some(blob),
            diff_id: format!("sha256:{}", hex::encode(hasher.finalize())),
            has_whiteouts: true,
        })
    }

    /// Lays stored layers upon each other in a root that is new. Blocking.
    pub(super) fn lay(
        &self,
        layers: &[Layer],
        lines: &mpsc::Sender<String>,
    ) -> Result<(), BuildError> {
        if self.is_laid(layers) {
            return Ok(());
        }
        std::fs::remove_dir_all(self.root()).map_err(io_failed)?;
        std::fs::create_dir(self.root()).map_err(io_failed)?;
        let mut root = Root::new(self.root(), self.limits);
        let count = layers.len();
        for (number, layer) in (1..).zip(layers) {
            let whiteouts = if layer.has_whiteouts {
                Whiteouts::Apply
            } else {
                Whiteouts::Keep
            };
            let file = self.stored(layer.blob.as_ref())?;
            let applied = root.apply(file, whiteouts, &self.cancel);
            let applied = applied.map_err(|error| {
                failed(
                    error.reason(),
                    format!("layer {number} of {count}: {error}"),
                )
            })?;
            let found = format!("sha256:{}", applied.digest);
            if layer.diff_id != found {
                let wanted = &layer.diff_id;
                let message = format!("a stored layer is damaged: it is {found}, not {wanted}");
                return Err(failed("LAYER_DAMAGED", message));
            }
            say(
                lines,
                format!("layer {number} of {count}: {}", said(&applied)),
            );
        }
        root.finish()?;
        rootfs::check(&self.root())?;
        self.note_laid(layers)
    }

    /// Whether the root is of just these layers.
    fn is_laid(&self, layers: &[Layer]) -> bool {
        std::fs::read(self.laid()).is_ok_and(|laid| laid == super::steps::first_key(layers))
    }

    fn note_laid(&self, layers: &[Layer]) -> Result<(), BuildError> {
        let key = super::steps::first_key(layers);
        std::fs::write(self.laid(), key).map_err(io_failed)
    }

    /// Packs the root. Blocking.
    pub(super) fn pack(&self) -> Result<Artifact, BuildError> {
        let image = self.path("packed");
        rootfs::pack(&self.root(), &image)?;
        self.artifacts.ingest(&image).map_err(io_failed)
    }

    /// Whether programs can be started so in it. Blocking.
    pub(super) fn check(&self, defaults: &Defaults) -> Result<(), BuildError> {
        Ok(defaults.check(&self.root())?)
    }

    fn stored(&self, blob: Option<&Artifact>) -> Result<File, BuildError> {
        let digest = blob.map(|blob| blob.digest.as_str()).unwrap_or_default();
        let path = ArtifactDigest::parse(digest).and_then(|digest| self.artifacts.find(&digest));
        let missing = || {
            failed(
                "ARTIFACT_MISSING",
                format!("the stored layer {digest} is gone"),
            )
        };
        File::open(path.ok_or_else(missing)?).map_err(io_failed)
    }
}

/// A template whose layers are known.
pub(super) fn has_layers(template: Template) -> Result<Template, BuildError> {
    if template.layers.is_empty() {
        let Template { name, version, .. } = &template;
        let message = format!(
            "the template {name}@{version} was built before layers were kept; build it anew"
        );
        return Err(failed("TEMPLATE_WITHOUT_LAYERS", message));
    }
    Ok(template)
}

/// Whether another layer may be laid upon these.
pub(super) fn has_room(layers: &[Layer]) -> Result<(), BuildError> {
    if layers.len() >= MOST_LAYERS {
        let message = format!("it is upon {MOST_LAYERS} layers, the most there may be");
        return Err(failed("TOO_MANY_LAYERS", message));
    }
    Ok(())
}

/// Nobody hears it any more if the build was given up; then it is cancelled, too.
pub(super) fn say(lines: &mpsc::Sender<String>, line: String) {
    drop(lines.blocking_send(line));
}

/// Processes have the groups of their user; says so if an image wants another.
fn without_group(mut defaults: Defaults) -> (Defaults, Option<String>) {
    let Some((user, group)) = defaults.user.split_once(':') else {
        return (defaults, None);
    };
    let told = format!("the image's user has a group, {group:?}; processes have those of {user:?}");
    defaults.user = user.to_owned();
    (defaults, Some(told))
}

/// What was unpacked, for people.
fn said(applied: &Applied) -> String {
    let Applied {
        entries,
        bytes,
        left_out,
        ..
    } = applied;
    let mut words = format!("{entries} entries, {bytes} bytes");
    if *left_out > 0 {
        words.push_str("; left out attributes that only a host has a meaning for: ");
        words.push_str(&left_out.to_string());
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever lies among what was fetched, ours is written beside it.
    #[test]
    fn nothing_is_written_where_links_of_an_archive_lead() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["artifacts", "outside"] {
            std::fs::create_dir(at(name)).unwrap();
        }
        std::fs::write(at("outside/file"), "as it was").unwrap();
        let limits = Limits {
            bytes: 1 << 20,
            entries: 100,
        };
        let artifacts = Artifacts::open(at("artifacts")).unwrap();
        let work = Work::new(tempfile::tempdir_in(folder.path()).unwrap());
        let making = Making::new(work, limits, artifacts, CancellationToken::new()).unwrap();
        for name in ["laid", "packed"] {
            let link = making.fetched().join(name);
            std::os::unix::fs::symlink(at("outside/file"), link).unwrap();
        }
        for name in ["bin", "etc", "usr"] {
            std::fs::create_dir(making.root().join(name)).unwrap();
        }
        let layers = [Layer {
            diff_id: "sha256:x".into(),
            ..Layer::default()
        }];
        making.note_laid(&layers).unwrap();
        assert!(making.is_laid(&layers) && !making.is_laid(&[]));
        making.pack().unwrap();
        assert_eq!(std::fs::read(at("outside/file")).unwrap(), b"as it was");
    }
}
