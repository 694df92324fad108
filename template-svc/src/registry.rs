//! Images from registries (OCI distribution specification, 1.1): what is needed of one comes into a folder, as an OCI layout.
//!
//! ```text
//!   reference --> manifests/<tag> --> [index -->] manifest --> config     documents: one after the other, as each lists the next
//!                                                         \-> layers      three at a time; one is unpacked while the next ones come
//! ```
//! A registry is not trusted. What it sends is bounded, and is what its digest says ([`crate::image`] looks at that). Where it sends us, for
//! blobs or for tokens, must be an address that may be asked ([`trust`]); credentials go to itself and to where it gives tokens, never after
//! a redirect to somebody else. A connection that breaks or stands still is made again, and goes on where it broke.

use std::{
    collections::HashSet,
    error::Error as _,
    io::{self, SeekFrom},
    path::PathBuf,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use backon::{BackoffBuilder as _, ExponentialBuilder, Retryable as _};
use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _};
use oci_spec::distribution::Reference;
use reqwest::{
    Client, Response, StatusCode,
    header::{
        ACCEPT, AUTHORIZATION, CONTENT_RANGE, CONTENT_TYPE, HeaderMap, HeaderValue, LOCATION,
        RANGE, RETRY_AFTER,
    },
    redirect,
};
use serde::Deserialize;
use serde_json::json;
use tokio::{
    io::{AsyncSeekExt as _, AsyncWriteExt as _, BufWriter},
    sync::mpsc,
};
use url::Url;

use self::{
    auth::Challenge,
    trust::{Forbidden, Trust, Unresolved},
};
use crate::image::{self, Image, ImageError, Listed};

mod auth;
mod trust;

pub use self::{
    auth::Login,
    trust::{MalformedRegistry, TrustedRegistry},
};

/// Longest name of an image that is looked at.
pub const LONGEST_NAME: usize = 1024;
/// A layer that has come at less than that for so long is not waited for.
const LEAST_RATE: u64 = 16 << 10;
const RATE_WINDOW: Duration = Duration::from_mins(1);
const CONNECT: Duration = Duration::from_secs(10);
/// Documents of one image: an index and what it lists for this platform are a handful.
const MOST_DOCUMENTS: usize = 32;
/// They are small, and few.
const DOCUMENTS_LIMIT: Duration = Duration::from_mins(10);
/// As browsers and Go's client have it, at most.
const MOST_REDIRECTS: usize = 10;
const MOST_TOKEN: u64 = 1 << 20;
const MOST_ERROR: u64 = 64 << 10;
/// Of what a registry says, for people.
const LONGEST_MESSAGE: usize = 300;
const LAYERS_AT_ONCE: usize = 3;
const WRITE_BUFFER: usize = 1 << 20;
/// So much more has come that a registry is tried as often again.
const PROGRESS: u64 = 1 << 20;
/// Longest wait a registry may ask for.
const LONGEST_WAIT: Duration = Duration::from_mins(1);

/// Why an image does not come.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// No name of an image.
    #[error("{text:?} is no name of an image: {why}")]
    Reference {
        /// What was asked for.
        text: String,
        /// What is wrong with it.
        why: String,
    },
    /// An address that is not asked.
    #[error("{0}")]
    Forbidden(String),
    /// No connection, or one that broke.
    #[error("{host} cannot be reached: {why}")]
    Unreachable {
        /// Whose.
        host: String,
        /// What the system says.
        why: String,
        /// Whether it would be so again.
        is_lasting: bool,
    },
    /// It comes too slowly to wait for it.
    #[error("{host} sends less than {LEAST_RATE} bytes a second")]
    Slow {
        /// Who.
        host: String,
    },
    /// There is nothing to ask with.
    #[error("registries cannot be asked from here: {0}")]
    Client(String),
    /// Nothing comes any more.
    #[error("{host} sent nothing for {seconds} s")]
    Stalled {
        /// Who.
        host: String,
        /// How long.
        seconds: u64,
    },
    /// Not for us.
    #[error(
        "{what} may not be pulled{}; if there is such an image, its registry wants {}",
        if *.has_login { " with these credentials" } else { "" },
        if *.has_login { "others" } else { "credentials" }
    )]
    Unauthorized {
        /// The image.
        what: String,
        /// Whether credentials were shown.
        has_login: bool,
    },
    /// Not there.
    #[error("there is no {0}")]
    Unknown(String),
    /// Asked too often.
    #[error("{host} is asked too often{}", said(.message))]
    Busy {
        /// Who.
        host: String,
        /// Its words.
        message: String,
        /// When it wants to be asked again.
        after: Option<Duration>,
    },
    /// It answers with an error.
    #[error("{host} answers {status}{}", said(.message))]
    Status {
        /// Who.
        host: String,
        /// Of HTTP.
        status: StatusCode,
        /// Its words.
        message: String,
    },
    /// What it sends is not what a registry sends.
    #[error("what the registry sends makes no sense: {what}")]
    Protocol {
        /// What.
        what: String,
    },
    /// More than may be.
    #[error("{what} is larger than {limit} bytes")]
    TooLarge {
        /// What.
        what: String,
        /// How much may be.
        limit: u64,
    },
    /// What came is no image, or not the one it should be.
    #[error("{0}")]
    Image(#[from] ImageError),
    /// The disk of template-svc.
    #[error("the disk of template-svc: {0}")]
    Disk(#[from] io::Error),
}

fn said(message: &str) -> String {
    if message.is_empty() {
        String::new()
    } else {
        format!(": {message}")
    }
}

impl RegistryError {
    /// The stable word of a build's failure.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Reference { .. } => "REFERENCE_INVALID",
            Self::Forbidden(_) => "REGISTRY_FORBIDDEN",
            Self::Unreachable { .. } => "REGISTRY_UNREACHABLE",
            Self::Stalled { .. } | Self::Slow { .. } => "REGISTRY_STALLED",
            Self::Unauthorized { .. } => "PULL_UNAUTHORIZED",
            Self::Unknown(_) => "IMAGE_UNKNOWN",
            Self::Busy { .. } => "REGISTRY_BUSY",
            Self::Status { .. } => "REGISTRY_FAILED",
            Self::Protocol { .. } => "REGISTRY_INVALID",
            Self::TooLarge { .. } => "SOURCE_TOO_LARGE",
            Self::Image(error) => error.reason(),
            Self::Disk(error) if error.kind() == io::ErrorKind::StorageFull => "DISK_FULL",
            Self::Disk(_) | Self::Client(_) => "BUILD_FAILED",
        }
    }

    /// Whether it may be different the next time.
    fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { is_lasting, .. } => !is_lasting,
            Self::Stalled { .. } | Self::Busy { .. } => true,
            Self::Status { status, .. } => {
                status.is_server_error() || *status == StatusCode::REQUEST_TIMEOUT
            }
            _ => false,
        }
    }

    /// How long to wait, if that was said.
    fn wait(&self, planned: Duration) -> Duration {
        match self {
            Self::Busy {
                after: Some(after), ..
            } => planned.max(*after).min(LONGEST_WAIT),
            _ => planned,
        }
    }
}

/// The name of an image, as docker writes them: `debian:12`, `registry.example/team/app@sha256:...`.
pub fn parse_reference(text: &str) -> Result<Reference, RegistryError> {
    let wrong = |why: String| RegistryError::Reference {
        text: text.chars().take(LONGEST_MESSAGE).collect(),
        why,
    };
    if text.len() > LONGEST_NAME {
        return Err(wrong(format!("it is longer than {LONGEST_NAME} bytes")));
    }
    let reference: Reference = text
        .parse()
        .map_err(|error: oci_spec::distribution::ParseError| wrong(error.to_string()))?;
    match reference.digest() {
        Some(digest) if image::sha256("reference", digest).is_err() => {
            Err(wrong("only SHA-256 digests are known".into()))
        }
        _ => Ok(reference),
    }
}

/// The registry that credentials are for, as names of images have it: docker itself writes its own in several ways.
pub fn registry_of(text: &str) -> String {
    let bare = text
        .trim_start_matches("https://")
        .trim_start_matches("http://");
    let host = bare.split('/').next().unwrap_or_default().to_lowercase();
    match host.as_str() {
        "index.docker.io" | "registry-1.docker.io" => "docker.io".to_owned(),
        _ => host,
    }
}

/// How registries are asked.
#[derive(Debug, Clone)]
pub struct Registries {
    trust: Trust,
    patience: Patience,
}

impl Registries {
    /// Those on public addresses are, and the trusted ones.
    pub fn new(trusted: &[TrustedRegistry], patience: Patience) -> Self {
        Self {
            trust: Trust::new(trusted),
            patience,
        }
    }

    /// A client for one image, with the certificates that the host trusts now.
    fn asker(&self) -> Result<Asker, RegistryError> {
        // Whoever was first has chosen; all of ours choose the same.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = Client::builder()
            .user_agent(concat!("sandmesh/", env!("CARGO_PKG_VERSION")))
            // Each hop is looked at first, and credentials do not go along.
            .redirect(redirect::Policy::none())
            // A proxy would look names up in our place.
            .no_proxy()
            // What stands still is a connection, which is made anew; of HTTP/2 it would be a stream of it.
            .http1_only()
            .dns_resolver(std::sync::Arc::new(self.trust.clone()))
            .connect_timeout(CONNECT)
            .build();
        let client = client.map_err(|error| RegistryError::Client(innermost(&error)))?;
        Ok(Asker {
            client,
            trust: self.trust.clone(),
            patience: self.patience,
        })
    }
}

/// What an error says that is no other's.
fn innermost(error: &dyn std::error::Error) -> String {
    let mut innermost = error;
    while let Some(cause) = innermost.source() {
        innermost = cause;
    }
    innermost.to_string()
}

/// What was asked for: of what is not there or not for us, another thing is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    Manifest,
    Blob,
    Token,
}

/// Asks the registries of one image.
#[derive(Debug)]
struct Asker {
    client: Client,
    trust: Trust,
    patience: Patience,
}

impl Asker {
    /// Waits for a registry as long as that is borne.
    async fn within<T>(
        &self,
        url: &Url,
        work: impl Future<Output = Result<T, reqwest::Error>>,
    ) -> Result<T, RegistryError> {
        match tokio::time::timeout(self.patience.stall, work).await {
            Ok(done) => done.map_err(|error| failed(url, &error)),
            Err(_) => Err(RegistryError::Stalled {
                host: trust::shown(url),
                seconds: self.patience.stall.as_secs(),
            }),
        }
    }

    /// Asks, and again where it is sent; `authorization` goes to the origin of the first URL only.
    async fn follow(
        &self,
        url: Url,
        authorization: Option<&HeaderValue>,
        headers: &HeaderMap,
    ) -> Result<Response, RegistryError> {
        let origin = url.origin();
        let mut next = url;
        for _ in 0..=MOST_REDIRECTS {
            self.trust.check(&next)?;
            let mut request = self.client.get(next.clone()).headers(headers.clone());
            if let Some(value) = authorization.filter(|_| next.origin() == origin) {
                request = request.header(AUTHORIZATION, value.clone());
            }
            let answer = self.within(&next, request.send()).await?;
            if !matches!(answer.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok(answer);
            }
            let location = answer.headers().get(LOCATION);
            let to = location
                .and_then(|location| location.to_str().ok())
                .and_then(|location| next.join(location).ok())
                .map(trust::without_login);
            next = to.ok_or_else(|| RegistryError::Protocol {
                what: "it redirects to nowhere".into(),
            })?;
        }
        Err(RegistryError::Protocol {
            what: format!("it redirects more than {MOST_REDIRECTS} times"),
        })
    }

    /// All of an answer.
    async fn body(&self, mut answer: Response, limit: u64) -> Result<Vec<u8>, RegistryError> {
        let mut body = Vec::new();
        while let Some(bytes) = self.chunk(&mut answer).await? {
            if (body.len() + bytes.len()) as u64 > limit {
                return Err(RegistryError::TooLarge {
                    what: "an answer of the registry".into(),
                    limit,
                });
            }
            body.extend_from_slice(&bytes);
        }
        Ok(body)
    }

    async fn chunk(&self, answer: &mut Response) -> Result<Option<Bytes>, RegistryError> {
        let url = answer.url().clone();
        self.within(&url, answer.chunk()).await
    }

    /// An answer that is one; errors have their words.
    async fn sound(
        &self,
        answer: Response,
        asked: Asked,
        pull: &Pull,
    ) -> Result<Response, RegistryError> {
        let status = answer.status();
        if status.is_success() {
            return Ok(answer);
        }
        let host = trust::shown(answer.url());
        let what = || pull.reference.to_string();
        match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN if asked != Asked::Blob => {
                return Err(RegistryError::Unauthorized {
                    what: what(),
                    has_login: pull.login.is_some(),
                });
            }
            StatusCode::NOT_FOUND if asked == Asked::Manifest => {
                return Err(RegistryError::Unknown(what()));
            }
            _ => {}
        }
        let after = answer
            .headers()
            .get(RETRY_AFTER)
            .and_then(|value| value.to_str().ok()?.parse().ok())
            .map(Duration::from_secs);
        // Its words are of use, but not worth another failure.
        let body = self.body(answer, MOST_ERROR).await.unwrap_or_default();
        let message = words(&body);
        if status == StatusCode::TOO_MANY_REQUESTS {
            return Err(RegistryError::Busy {
                host,
                message,
                after,
            });
        }
        Err(RegistryError::Status {
            host,
            status,
            message,
        })
    }
}

/// What a failed connection was.
fn failed(url: &Url, error: &reqwest::Error) -> RegistryError {
    let mut source = error.source();
    let mut is_refused = false;
    while let Some(cause) = source {
        if let Some(forbidden) = cause.downcast_ref::<Forbidden>() {
            return RegistryError::Forbidden(forbidden.to_string());
        }
        // A certificate is the same the next time, and so is a name.
        is_refused |= cause.is::<rustls::Error>() || cause.is::<Unresolved>();
        source = cause.source();
    }
    RegistryError::Unreachable {
        host: trust::shown(url),
        why: innermost(error),
        is_lasting: is_refused,
    }
}

/// What an error's body says (distribution-spec, "Error Codes").
fn words(body: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Errors {
        errors: Vec<OneError>,
    }
    #[derive(Deserialize)]
    struct OneError {
        #[serde(default)]
        message: String,
    }
    let errors = serde_json::from_slice::<Errors>(body).ok();
    let first = errors.and_then(|errors| errors.errors.into_iter().next());
    let message = first.map(|error| error.message).unwrap_or_default();
    message.chars().take(LONGEST_MESSAGE).collect()
}

impl From<Forbidden> for RegistryError {
    fn from(error: Forbidden) -> Self {
        Self::Forbidden(error.to_string())
    }
}

/// How long registries are borne.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// One that sends nothing for so long is asked again.
    pub stall: Duration,
    /// Before it is asked again for the first time; then three times as long each time, and a bit.
    pub first_wait: Duration,
    /// How often it is asked again.
    pub tries: usize,
}

/// As long as a registry may take to restart.
impl Default for Patience {
    fn default() -> Self {
        Self {
            stall: Duration::from_secs(30),
            first_wait: Duration::from_millis(500),
            tries: 5,
        }
    }
}

impl Patience {
    fn waits(&self) -> ExponentialBuilder {
        ExponentialBuilder::default()
            .with_min_delay(self.first_wait)
            .with_factor(3.0)
            .with_jitter()
            .with_max_times(self.tries)
    }
}

/// One image on its way into a folder.
#[derive(Debug)]
pub struct Pull {
    asker: Asker,
    reference: Reference,
    base: Url,
    login: Option<Login>,
    /// What the registry last wanted to see.
    authorization: Mutex<Option<HeaderValue>>,
    folder: PathBuf,
}

impl Pull {
    /// Of that image, into a folder that is empty or not there.
    pub fn new(
        registries: &Registries,
        reference: Reference,
        login: Option<Login>,
        folder: PathBuf,
    ) -> Result<Self, RegistryError> {
        let base = registries.trust.base(reference.resolve_registry())?;
        Ok(Self {
            asker: registries.asker()?,
            reference,
            base,
            login,
            authorization: Mutex::default(),
            folder,
        })
    }

    /// Fetches all but the layers; the digest is of what the name leads to.
    pub async fn documents(&self) -> Result<(Image, String), RegistryError> {
        let fetched = tokio::time::timeout(DOCUMENTS_LIMIT, self.fetch_documents()).await;
        fetched.unwrap_or_else(|_| {
            Err(RegistryError::Slow {
                host: trust::shown(&self.base),
            })
        })
    }

    async fn fetch_documents(&self) -> Result<(Image, String), RegistryError> {
        let digest = self.top().await?;
        for _ in 0..MOST_DOCUMENTS {
            let folder = self.folder.clone();
            let opened = blocking(move || Image::open(&folder, None)).await?;
            let (path, digest, accept) = match opened {
                Err(ImageError::Missing(Listed::Manifest(digest))) => {
                    (format!("manifests/{digest}"), digest, true)
                }
                Err(ImageError::Missing(Listed::Blob(digest))) => {
                    (format!("blobs/{digest}"), digest, false)
                }
                opened => return Ok((opened?, digest)),
            };
            let (bytes, _) = self.document(&path, accept).await?;
            // Found under its digest it is hashed; if it is something else, that says so.
            self.keep(&digest, bytes).await?;
        }
        Err(RegistryError::Protocol {
            what: format!("an image of more than {MOST_DOCUMENTS} documents"),
        })
    }

    /// What the name leads to, and the layout that begins with it.
    async fn top(&self) -> Result<String, RegistryError> {
        let blobs = self.folder.join("blobs/sha256");
        tokio::fs::create_dir_all(blobs).await?;
        let wanted = self.reference.digest();
        let which = wanted.or(self.reference.tag()).unwrap_or("latest");
        let (bytes, kind) = self.document(&format!("manifests/{which}"), true).await?;
        let digest = image::digest_of(&bytes);
        if let Some(wanted) = wanted.filter(|wanted| **wanted != digest) {
            return Err(RegistryError::Image(ImageError::Digest {
                what: self.reference.to_string(),
                wanted: wanted.to_owned(),
                found: digest,
            }));
        }
        let kind = kind_of(kind.as_deref(), &bytes).ok_or_else(|| RegistryError::Protocol {
            what: format!("{} is no image of a kind that is known", self.reference),
        })?;
        let index = json!({
            "schemaVersion": 2,
            "manifests": [{ "mediaType": kind, "digest": digest, "size": bytes.len() }],
        });
        self.keep(&digest, bytes).await?;
        let path = self.folder.join("index.json");
        tokio::fs::write(path, index.to_string()).await?;
        Ok(digest)
    }

    /// Fetches the layers, in order; a word for each that is there. Ends early when nobody waits for them any more.
    pub async fn layers(
        &self,
        image: &Image,
        limit: u64,
        arrived: mpsc::Sender<()>,
    ) -> Result<(), RegistryError> {
        let blobs: Vec<(String, u64)> = image.blobs().collect();
        let mut sizes = blobs.iter().map(|(_, size)| *size);
        if sizes
            .try_fold(0_u64, u64::checked_add)
            .is_none_or(|all| all > limit)
        {
            return Err(RegistryError::TooLarge {
                what: format!("{} as it is sent", self.reference),
                limit,
            });
        }
        let mut seen = HashSet::new();
        let fetches = blobs.into_iter().map(|(digest, size)| {
            // A layer may come twice in an image; the first has it.
            let is_new = seen.insert(digest.clone());
            async move {
                if is_new {
                    self.layer(&digest, size).await
                } else {
                    Ok(())
                }
            }
        });
        let fetches: Vec<_> = fetches.collect();
        let mut fetched = futures::stream::iter(fetches).buffered(LAYERS_AT_ONCE);
        while let Some(()) = fetched.try_next().await? {
            if arrived.send(()).await.is_err() {
                break;
            }
        }
        Ok(())
    }

    async fn layer(&self, digest: &str, size: u64) -> Result<(), RegistryError> {
        let path = self.folder.join(image::blob_path(digest));
        let part = path.with_extension("part");
        let file = tokio::fs::File::create(&part).await?;
        let mut file = BufWriter::with_capacity(WRITE_BUFFER, file);
        let waits = self.asker.patience.waits();
        let (mut left, mut tried_at) = (waits.build(), 0);
        let mut at = 0;
        while let Err(error) = self.rest(digest, size, &mut at, &mut file).await {
            if at >= tried_at + PROGRESS {
                (left, tried_at) = (waits.build(), at);
            }
            let wait = left.next().filter(|_| error.is_transient());
            let Some(wait) = wait else {
                return Err(error);
            };
            tracing::info!(%error, digest, at, "a layer is asked for again");
            tokio::time::sleep(error.wait(wait)).await;
        }
        tokio::fs::rename(part, path).await?;
        Ok(())
    }

    /// A layer from there on, until it is complete.
    async fn rest(
        &self,
        digest: &str,
        size: u64,
        at: &mut u64,
        file: &mut BufWriter<tokio::fs::File>,
    ) -> Result<(), RegistryError> {
        let mut headers = HeaderMap::new();
        if *at > 0 {
            let range = format!("bytes={at}-").parse();
            headers.insert(RANGE, range.map_err(|_| protocol("a range"))?);
        }
        if *at < size {
            let path = format!("blobs/{digest}");
            let begins = match self.get(Asked::Blob, &path, headers).await {
                Err(RegistryError::Status { status, .. })
                    if *at > 0 && status == StatusCode::RANGE_NOT_SATISFIABLE =>
                {
                    None
                }
                answer => {
                    let answer = answer?;
                    Some((begin(&answer)?, answer))
                }
            };
            let known = begins.filter(|(begins, _)| [0, *at].contains(begins));
            let begins = known.as_ref().map_or(0, |(begins, _)| *begins);
            if begins != *at {
                // It knows no ranges, or not this one.
                file.flush().await?;
                file.seek(SeekFrom::Start(0)).await?;
                *at = 0;
            }
            let Some((_, mut answer)) = known else {
                return Err(RegistryError::Unreachable {
                    host: trust::shown(&self.base),
                    why: "another part of a layer came than was asked for".into(),
                    is_lasting: false,
                });
            };
            let (since, from) = (Instant::now(), *at);
            while let Some(bytes) = self.asker.chunk(&mut answer).await? {
                let after = *at + bytes.len() as u64;
                if after > size {
                    return Err(protocol("more of a layer than its manifest says"));
                }
                file.write_all(&bytes).await?;
                *at = after;
                let took = since.elapsed();
                if took > RATE_WINDOW && (after - from) / took.as_secs().max(1) < LEAST_RATE {
                    return Err(RegistryError::Slow {
                        host: trust::shown(answer.url()),
                    });
                }
            }
            if *at < size {
                return Err(RegistryError::Unreachable {
                    host: trust::shown(answer.url()),
                    why: format!("{at} of {size} bytes of a layer came"),
                    is_lasting: false,
                });
            }
        }
        file.flush().await?;
        Ok(())
    }

    /// A bounded answer and its kind, tried some times.
    async fn document(
        &self,
        path: &str,
        is_manifest: bool,
    ) -> Result<(Vec<u8>, Option<String>), RegistryError> {
        let ask = || async {
            let mut headers = HeaderMap::new();
            if is_manifest {
                headers.insert(ACCEPT, HeaderValue::from_static(image::MANIFESTS));
            }
            let what = if is_manifest {
                Asked::Manifest
            } else {
                Asked::Blob
            };
            let answer = self.get(what, path, headers).await?;
            let kind = answer.headers().get(CONTENT_TYPE);
            let kind = kind.and_then(|kind| kind.to_str().ok()).map(str::to_owned);
            let body = self.asker.body(answer, image::MOST_DOCUMENT).await?;
            Ok((body, kind))
        };
        ask.retry(self.asker.patience.waits().build())
            .when(RegistryError::is_transient)
            .adjust(|error, planned| Some(error.wait(planned?)))
            .await
    }

    /// Asks the registry; who we are it is told when it wants to know.
    async fn get(
        &self,
        what: Asked,
        path: &str,
        headers: HeaderMap,
    ) -> Result<Response, RegistryError> {
        let url = format!("v2/{}/{path}", self.reference.repository());
        let url = self.base.join(&url).map_err(|_| protocol("a path"))?;
        let mut has_asked = false;
        loop {
            let authorization = self.authorization();
            let asked = self
                .asker
                .follow(url.clone(), authorization.as_ref(), &headers);
            let answer = asked.await?;
            let is_own = answer.url().origin() == self.base.origin();
            if answer.status() == StatusCode::UNAUTHORIZED && is_own && !has_asked {
                has_asked = true;
                let wanted =
                    auth::challenge(answer.headers(), &self.base, self.reference.repository())?;
                let shown = self.authorize(wanted).await?;
                *self
                    .authorization
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner) = shown;
                continue;
            }
            return self.asker.sound(answer, what, self).await;
        }
    }

    fn authorization(&self) -> Option<HeaderValue> {
        let authorization = self.authorization.lock();
        authorization
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// What to show who wants that.
    async fn authorize(&self, wanted: Challenge) -> Result<Option<HeaderValue>, RegistryError> {
        let basic = self.login.as_ref().map(basic).transpose()?;
        let url = match wanted {
            Challenge::Basic => return Ok(basic),
            Challenge::Token(url) => url,
        };
        let none = HeaderMap::new();
        let answer = self.asker.follow(url, basic.as_ref(), &none).await?;
        let answer = self.asker.sound(answer, Asked::Token, self).await?;
        let body = self.asker.body(answer, MOST_TOKEN).await?;
        auth::bearer(&body).map(Some)
    }

    async fn keep(&self, digest: &str, bytes: Vec<u8>) -> Result<(), RegistryError> {
        let path = self.folder.join(image::blob_path(digest));
        Ok(tokio::fs::write(path, bytes).await?)
    }
}

/// The media type of a manifest, as it was sent or, where that says nothing, as it has it itself.
fn kind_of(sent: Option<&str>, bytes: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Own {
        media_type: String,
    }
    let sent = sent.and_then(|kind| kind.split(';').next());
    let sent = sent.map(|kind| kind.trim().to_owned());
    let own = || Some(serde_json::from_slice::<Own>(bytes).ok()?.media_type);
    sent.filter(|kind| image::is_manifest(kind))
        .or_else(|| own().filter(|kind| image::is_manifest(kind)))
}

fn protocol(what: &str) -> RegistryError {
    RegistryError::Protocol { what: what.into() }
}

/// Where in a layer an answer begins.
fn begin(answer: &Response) -> Result<u64, RegistryError> {
    if answer.status() != StatusCode::PARTIAL_CONTENT {
        return Ok(0);
    }
    let range = answer.headers().get(CONTENT_RANGE);
    let first = range
        .and_then(|range| range.to_str().ok()?.strip_prefix("bytes "))
        .and_then(|range| range.split_once('-')?.0.parse().ok());
    first.ok_or_else(|| protocol("a part of a layer that does not say which"))
}

/// RFC 7617.
fn basic(login: &Login) -> Result<HeaderValue, RegistryError> {
    let encoded = http_auth::basic::encode_credentials(&login.username, &login.password);
    let mut value = HeaderValue::from_str(&encoded).map_err(|_| protocol("a login"))?;
    value.set_sensitive(true);
    Ok(value)
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, RegistryError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| RegistryError::Disk(io::Error::other(error)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registries_of_credentials() {
        for docker in [
            "docker.io",
            "https://index.docker.io/v1/",
            "Registry-1.docker.io",
        ] {
            assert_eq!(registry_of(docker), "docker.io");
        }
        assert_eq!(registry_of("Quay.io"), "quay.io");
        assert_eq!(registry_of("http://localhost:5000"), "localhost:5000");
    }

    #[test]
    fn names_of_images() {
        let parsed = |text: &str| parse_reference(text).map(|it| it.to_string());
        assert_eq!(parsed("debian:12").unwrap(), "docker.io/library/debian:12");
        assert_eq!(
            parsed("localhost:5000/a/b").unwrap(),
            "localhost:5000/a/b:latest"
        );
        let digest = "a".repeat(64);
        let pinned = format!("quay.io/a@sha256:{digest}");
        assert_eq!(parsed(&pinned).unwrap(), pinned);
        let long = format!("quay.io/a@sha512:{digest}{digest}");
        for wrong in ["", "UPPER", "a b", "x@sha256:12", "../a", &long] {
            let error = parse_reference(wrong).unwrap_err();
            assert_eq!(error.reason(), "REFERENCE_INVALID", "{wrong}");
        }
    }

    #[test]
    fn words_of_errors_are_bounded() {
        assert_eq!(words(b"{\"errors\":[{\"message\":\"denied\"}]}"), "denied");
        assert_eq!(words(b"<html>"), "");
        let long = format!("{{\"errors\":[{{\"message\":\"{}\"}}]}}", "x".repeat(9999));
        assert_eq!(words(long.as_bytes()).len(), LONGEST_MESSAGE);
    }
}
