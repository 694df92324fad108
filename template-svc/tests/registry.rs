//! Images from registries that behave, break, stand still, lie and send us elsewhere. The registry is the test's own, on real sockets.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    collections::{HashMap, VecDeque},
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{Request, State},
    http::{HeaderMap, Response, StatusCode, header},
};
use futures::{StreamExt as _, stream};
use rstest::rstest;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use template_svc::{
    image::Image,
    registry::{Login, Patience, Pull, Registries, RegistryError, parse_reference},
};
use tokio::sync::mpsc;

const LIMIT: u64 = 64 << 20;
const PATIENCE: Duration = Duration::from_secs(20);
const TOP: &str = "/v2/team/app/manifests/v1";

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// What becomes of one request.
#[derive(Debug, Clone)]
enum Fault {
    /// Nothing but this status, and headers with it.
    Status(u16, Vec<(&'static str, String)>),
    /// The connection breaks after so many bytes.
    Cut(usize),
    /// Nothing comes any more after so many bytes.
    Stall(usize),
    /// Zeros without end.
    Endless,
    /// All of it, whatever range was asked for.
    NoRanges,
    /// None.
    Fine,
}

/// One request that came.
#[derive(Debug, Clone, Default)]
struct Asked {
    path: String,
    range: Option<String>,
    authorization: Option<String>,
}

/// A registry: what it has, who may ask, and what goes wrong.
#[derive(Debug, Default)]
struct Fake {
    files: Mutex<HashMap<String, (Bytes, String)>>,
    /// By path, one for each request; the last one stays.
    faults: Mutex<HashMap<String, VecDeque<Fault>>>,
    asked: Mutex<Vec<Asked>>,
    /// Headers of an answer 401, to whoever does not show one of these.
    wants: Mutex<Option<(Vec<String>, Vec<String>)>>,
    address: Mutex<String>,
}

fn digest_of(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

/// Bytes that are no others'.
fn noise(seed: u8, len: usize) -> Bytes {
    let mut state = u32::from(seed) + 1;
    let mut next = move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..len).map(|_| next()).collect::<Vec<_>>().into()
}

fn body(bytes: Bytes, from: usize, fault: Option<&Fault>) -> Body {
    let rest = bytes.slice(from.min(bytes.len())..);
    let some = |count: &usize| Ok(rest.slice(..(*count).min(rest.len())));
    match fault {
        Some(Fault::Cut(count)) => {
            let cut = Err(std::io::Error::from(std::io::ErrorKind::ConnectionReset));
            Body::from_stream(stream::iter([some(count), cut]))
        }
        Some(Fault::Stall(count)) => {
            let first = stream::iter([some(count)]);
            Body::from_stream(first.chain(stream::pending::<std::io::Result<Bytes>>()))
        }
        Some(Fault::Endless) => {
            let zeros = Bytes::from(vec![0; 65536]);
            let next = move || Ok::<_, std::io::Error>(zeros.clone());
            Body::from_stream(stream::repeat_with(next))
        }
        _ => Body::from(rest),
    }
}

fn text(headers: &HeaderMap, name: header::HeaderName) -> Option<String> {
    Some(headers.get(name)?.to_str().unwrap().to_owned())
}

async fn answer(State(fake): State<Arc<Fake>>, request: Request) -> Response<Body> {
    let path = request.uri().path().to_owned();
    let headers = request.headers();
    let asked = Asked {
        path: path.clone(),
        range: text(headers, header::RANGE),
        authorization: text(headers, header::AUTHORIZATION),
    };
    fake.asked.lock().unwrap().push(asked.clone());
    let fault = {
        let mut faults = fake.faults.lock().unwrap();
        let of_path = faults.get_mut(&path);
        of_path.and_then(|faults| {
            if faults.len() > 1 {
                faults.pop_front()
            } else {
                faults.front().cloned()
            }
        })
    };
    let plain = |status: u16, more: &[(&str, String)]| {
        let mut response = Response::builder().status(status);
        for (name, value) in more {
            response = response.header(*name, value);
        }
        let errors = json!({ "errors": [{ "code": "X", "message": "the registry's words" }] });
        response.body(Body::from(errors.to_string())).unwrap()
    };
    if let Some(Fault::Status(status, more)) = &fault {
        return plain(*status, more);
    }
    let wants = fake.wants.lock().unwrap().clone();
    if let Some((challenges, allowed)) = wants.filter(|_| path.starts_with("/v2/"))
        && !asked.authorization.is_some_and(|it| allowed.contains(&it))
    {
        let challenges = challenges.into_iter();
        let more: Vec<_> = challenges.map(|it| ("www-authenticate", it)).collect();
        return plain(401, &more);
    }
    let Some((bytes, kind)) = fake.files.lock().unwrap().get(&path).cloned() else {
        return plain(404, &[]);
    };
    let from = asked
        .range
        .filter(|_| !matches!(fault, Some(Fault::NoRanges)));
    let from = from.map(|range| {
        let range = range.strip_prefix("bytes=").unwrap();
        range.strip_suffix('-').unwrap().parse::<usize>().unwrap()
    });
    let mut response = Response::builder().header(header::CONTENT_TYPE, kind);
    if let Some(from) = from {
        let range = format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len());
        response = response
            .status(StatusCode::PARTIAL_CONTENT)
            .header(header::CONTENT_RANGE, range);
    }
    response
        .body(body(bytes, from.unwrap_or_default(), fault.as_ref()))
        .unwrap()
}

impl Fake {
    async fn start() -> Arc<Self> {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let fake = Arc::new(Self::default());
        *fake.address.lock().unwrap() = listener.local_addr().unwrap().to_string();
        let router = Router::new().fallback(answer).with_state(fake.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        fake
    }

    fn address(&self) -> String {
        self.address.lock().unwrap().clone()
    }

    fn put(&self, path: &str, bytes: impl Into<Bytes>, kind: &str) {
        let mut files = self.files.lock().unwrap();
        files.insert(path.to_owned(), (bytes.into(), kind.to_owned()));
    }

    fn put_blob(&self, bytes: impl Into<Bytes>) -> Value {
        let bytes = bytes.into();
        let digest = digest_of(&bytes);
        let size = bytes.len();
        self.put(&blob_path(&digest), bytes, "application/octet-stream");
        json!({ "digest": digest, "size": size })
    }

    fn put_manifest(&self, manifest: &Value, kind: &str) -> Value {
        let bytes = manifest.to_string();
        let digest = digest_of(bytes.as_bytes());
        let descriptor = json!({ "mediaType": kind, "digest": digest, "size": bytes.len() });
        self.put(&manifest_path(&digest), bytes, kind);
        descriptor
    }

    /// An image of these layers, which are not looked into; its descriptor.
    fn put_image(&self, layers: &[Bytes], architecture: &str) -> Value {
        let diff_ids: Vec<_> = layers.iter().map(|layer| digest_of(layer)).collect();
        let config = json!({
            "os": "linux", "architecture": architecture,
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let mut config = self.put_blob(config.to_string());
        config["mediaType"] = json!("application/vnd.oci.image.config.v1+json");
        let layers: Vec<_> = layers
            .iter()
            .map(|layer| {
                let mut layer = self.put_blob(layer.clone());
                layer["mediaType"] = json!(LAYER);
                layer
            })
            .collect();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers,
        });
        let mut descriptor = self.put_manifest(&manifest, MANIFEST);
        descriptor["platform"] = json!({ "os": "linux", "architecture": architecture });
        descriptor
    }

    /// Under the name `team/app:v1`.
    fn put_top(&self, document: &Value, kind: &str) {
        self.put(TOP, document.to_string(), kind);
    }

    /// `team/app:v1` is an index of an image of these layers and of one for another platform.
    fn publish(&self, layers: &[Bytes]) -> Value {
        let ours = self.put_image(layers, "amd64");
        let index = json!({
            "schemaVersion": 2,
            "manifests": [self.put_image(&[noise(99, 10)], "s390x"), ours],
        });
        self.put_top(&index, INDEX);
        index
    }

    fn fail(&self, path: &str, faults: impl IntoIterator<Item = Fault>) {
        let mut all = self.faults.lock().unwrap();
        all.insert(path.to_owned(), faults.into_iter().collect());
    }

    fn want(&self, challenges: &[&str], allowed: &[&str]) {
        let owned = |texts: &[&str]| texts.iter().map(ToString::to_string).collect();
        *self.wants.lock().unwrap() = Some((owned(challenges), owned(allowed)));
    }

    fn asked(&self, path: &str) -> Vec<Asked> {
        let asked = self.asked.lock().unwrap();
        asked.iter().filter(|it| it.path == path).cloned().collect()
    }

    /// Trusted are this and those.
    fn registries(&self, others: &[&Self]) -> Registries {
        self.asked_with(PATIENT, others)
    }

    fn asked_with(&self, patience: Patience, others: &[&Self]) -> Registries {
        let all = [self].into_iter().chain(others.iter().copied());
        let trusted: Vec<_> = all
            .map(|one| format!("http://{}", one.address()).parse().unwrap())
            .collect();
        Registries::new(&trusted, patience)
    }

    async fn pull(&self, to: &Path, login: Option<Login>) -> Result<Image, RegistryError> {
        self.pull_by(&self.registries(&[]), ":v1", to, login).await
    }

    async fn pull_by(
        &self,
        registries: &Registries,
        which: &str,
        to: &Path,
        login: Option<Login>,
    ) -> Result<Image, RegistryError> {
        let name = format!("{}/team/app{which}", self.address());
        pull(registries, &name, to, login).await
    }
}

/// A test that is late is no registry that stands still.
const PATIENT: Patience = Patience {
    stall: Duration::from_secs(15),
    first_wait: Duration::from_millis(5),
    tries: 3,
};
const IMPATIENT: Patience = Patience {
    stall: Duration::from_millis(300),
    ..PATIENT
};

async fn pull(
    registries: &Registries,
    name: &str,
    to: &Path,
    login: Option<Login>,
) -> Result<Image, RegistryError> {
    let work = async {
        let pull = Pull::new(registries, parse_reference(name)?, login, to.to_owned())?;
        let (image, _) = pull.documents().await?;
        let (arrived, mut arrivals) = mpsc::channel(1);
        let count = async {
            let mut count = 0;
            while let Some(()) = arrivals.recv().await {
                count += 1;
            }
            count
        };
        let (fetched, count) = tokio::join!(pull.layers(&image, LIMIT, arrived), count);
        fetched?;
        assert_eq!(count, image.layers());
        Ok(image)
    };
    tokio::time::timeout(PATIENCE, work).await.expect("in time")
}

fn blob_path(digest: &str) -> String {
    format!("/v2/team/app/blobs/{digest}")
}

fn manifest_path(digest: &str) -> String {
    format!("/v2/team/app/manifests/{digest}")
}

fn blob_in(folder: &Path, digest: &str) -> Vec<u8> {
    std::fs::read(folder.join("blobs").join(digest.replace(':', "/"))).unwrap()
}

fn login(password: &str) -> Login {
    Login {
        username: "me".into(),
        password: password.into(),
    }
}

/// `me:secret`.
const BASIC: &str = "Basic bWU6c2VjcmV0";

#[tokio::test]
async fn an_image_comes_for_this_platform_only() {
    let fake = Fake::start().await;
    let layers = [noise(1, 100_000), noise(2, 3_000_000), noise(1, 100_000)];
    let index = fake.publish(&layers);
    let folder = tempfile::tempdir().unwrap();
    let image = fake.pull(folder.path(), None).await.unwrap();
    assert_eq!(image.layers(), 3);
    for layer in &layers {
        assert!(blob_in(folder.path(), &digest_of(layer)) == *layer);
        // What comes twice in an image is asked for once.
        assert_eq!(fake.asked(&blob_path(&digest_of(layer))).len(), 1);
    }
    let other = index["manifests"][0]["digest"].as_str().unwrap();
    assert!(fake.asked(&manifest_path(other)).is_empty());
}

#[tokio::test]
async fn a_pinned_image_is_that_one_or_none() {
    let fake = Fake::start().await;
    let index = fake.publish(&[noise(1, 1000)]);
    let (bytes, digest) = (index.to_string(), digest_of(index.to_string().as_bytes()));
    fake.put(&manifest_path(&digest), bytes, INDEX);
    let registries = fake.registries(&[]);
    for which in [format!("@{digest}"), format!(":other@{digest}")] {
        let folder = tempfile::tempdir().unwrap();
        let pulled = fake.pull_by(&registries, &which, folder.path(), None);
        pulled.await.unwrap();
    }
    fake.put(&manifest_path(&digest), "{}", INDEX);
    let folder = tempfile::tempdir().unwrap();
    let which = format!("@{digest}");
    let pulled = fake.pull_by(&registries, &which, folder.path(), None).await;
    assert_eq!(pulled.unwrap_err().reason(), "DIGEST_MISMATCH");
}

#[tokio::test]
async fn a_document_below_is_what_its_digest_says() {
    let fake = Fake::start().await;
    let index = fake.publish(&[noise(1, 1000)]);
    let manifest = index["manifests"][1]["digest"].as_str().unwrap();
    let other = fake.put_image(&[noise(7, 7)], "amd64");
    let other = manifest_path(other["digest"].as_str().unwrap());
    let other = fake.files.lock().unwrap()[&other].0.clone();
    fake.put(&manifest_path(manifest), other, MANIFEST);
    let folder = tempfile::tempdir().unwrap();
    let error = fake.pull(folder.path(), None).await.unwrap_err();
    assert_eq!(error.reason(), "DIGEST_MISMATCH", "{error}");
    assert!(error.to_string().contains(manifest));
}

#[rstest]
#[case::cut(Fault::Cut(1_200_000), PATIENT)]
#[case::stands_still(Fault::Stall(1_200_000), IMPATIENT)]
#[tokio::test]
async fn a_layer_goes_on_where_it_broke(#[case] fault: Fault, #[case] patience: Patience) {
    let fake = Fake::start().await;
    let layer = noise(1, 8_000_000);
    fake.publish(std::slice::from_ref(&layer));
    let path = blob_path(&digest_of(&layer));
    // More often than it is asked again without any progress.
    let faults = std::iter::repeat_n(fault, 5);
    fake.fail(&path, faults.chain([Fault::Fine]));
    let folder = tempfile::tempdir().unwrap();
    let registries = fake.asked_with(patience, &[]);
    let pulled = fake.pull_by(&registries, ":v1", folder.path(), None);
    pulled.await.unwrap();
    assert!(blob_in(folder.path(), &digest_of(&layer)) == layer);
    let asked = fake.asked(&path);
    // A late test asks again as well.
    assert!(asked.len() >= 6);
    for (number, asked) in asked.iter().enumerate().skip(1) {
        let from = asked.range.as_deref().unwrap();
        let from: usize = from
            .strip_prefix("bytes=")
            .unwrap()
            .strip_suffix('-')
            .unwrap()
            .parse()
            .unwrap();
        assert!(from > 0 && from <= number * 1_200_000, "{from}");
    }
}

#[tokio::test]
async fn a_registry_without_ranges_begins_again() {
    let fake = Fake::start().await;
    let layer = noise(1, 3_000_000);
    fake.publish(std::slice::from_ref(&layer));
    let path = blob_path(&digest_of(&layer));
    fake.fail(&path, [Fault::Cut(2_000_000), Fault::NoRanges]);
    let folder = tempfile::tempdir().unwrap();
    fake.pull(folder.path(), None).await.unwrap();
    assert!(blob_in(folder.path(), &digest_of(&layer)) == layer);
    assert!(fake.asked(&path)[1].range.is_some());
}

#[rstest]
#[case::hangs_before(Fault::Stall(0), "REGISTRY_STALLED")]
#[case::hangs_within(Fault::Stall(1000), "REGISTRY_STALLED")]
#[case::breaks(Fault::Cut(1000), "REGISTRY_UNREACHABLE")]
#[case::fails(Fault::Status(503, vec![]), "REGISTRY_FAILED")]
#[case::is_busy(Fault::Status(429, vec![("retry-after", "0".into())]), "REGISTRY_BUSY")]
#[tokio::test]
async fn patience_has_an_end(#[case] fault: Fault, #[case] reason: &str) {
    let fake = Fake::start().await;
    let layer = noise(1, 10_000);
    fake.publish(std::slice::from_ref(&layer));
    let patience = if reason == "REGISTRY_STALLED" {
        IMPATIENT
    } else {
        PATIENT
    };
    let registries = fake.asked_with(patience, &[]);
    // A break within makes a little progress each time, of which there is no end either.
    for path in [blob_path(&digest_of(&layer)), TOP.to_owned()] {
        fake.fail(&path, [fault.clone()]);
        let before = fake.asked(&path).len();
        let folder = tempfile::tempdir().unwrap();
        let pulled = fake.pull_by(&registries, ":v1", folder.path(), None).await;
        let error = pulled.unwrap_err();
        // Under load a test may find its own registry standing still before it comes to the layer.
        let is_late = patience.stall == IMPATIENT.stall;
        assert_eq!(error.reason(), reason, "{error}");
        let asked = fake.asked(&path).len() - before;
        assert!(asked == 4 || is_late && asked > 1, "{asked}");
    }
}

#[tokio::test]
async fn what_fails_for_a_while_is_asked_again() {
    let fake = Fake::start().await;
    let layer = noise(1, 1000);
    fake.publish(std::slice::from_ref(&layer));
    let busy = Fault::Status(429, vec![("retry-after", "1".into())]);
    let faults = [Fault::Status(502, vec![]), busy, Fault::Fine];
    fake.fail(TOP, faults.clone());
    fake.fail(&blob_path(&digest_of(&layer)), faults);
    let folder = tempfile::tempdir().unwrap();
    let since = Instant::now();
    fake.pull(folder.path(), None).await.unwrap();
    assert_eq!(fake.asked(TOP).len(), 3);
    assert_eq!(fake.asked(&blob_path(&digest_of(&layer))).len(), 3);
    // Each as long as it was asked to.
    assert!(since.elapsed() >= Duration::from_secs(2));
}

#[tokio::test]
async fn what_a_registry_says_is_passed_on() {
    let fake = Fake::start().await;
    fake.fail(TOP, [Fault::Status(400, vec![])]);
    let folder = tempfile::tempdir().unwrap();
    let error = fake.pull(folder.path(), None).await.unwrap_err();
    assert_eq!(error.reason(), "REGISTRY_FAILED");
    let error = error.to_string();
    assert!(
        error.contains("400") && error.contains("the registry's words"),
        "{error}"
    );
    // It would not be different the next time.
    assert_eq!(fake.asked(TOP).len(), 1);
}

#[tokio::test]
async fn a_name_and_a_password_are_shown_to_who_wants_them() {
    let fake = Fake::start().await;
    fake.publish(&[noise(1, 1000)]);
    fake.want(&["Basic realm=\"it\""], &[BASIC]);
    let folder = tempfile::tempdir().unwrap();
    fake.pull(folder.path(), Some(login("secret")))
        .await
        .unwrap();
    assert_eq!(fake.asked(TOP)[0].authorization, None);
    for (login, said) in [
        (Some(login("wrong")), "wants others"),
        (None, "wants credentials"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let error = fake.pull(folder.path(), login).await.unwrap_err();
        assert_eq!(error.reason(), "PULL_UNAUTHORIZED");
        assert!(error.to_string().contains(said), "{error}");
    }
}

#[tokio::test]
async fn tokens_are_fetched_and_fetched_again_when_they_end() {
    let fake = Fake::start().await;
    let layers = [noise(1, 1000), noise(2, 2000)];
    fake.publish(&layers);
    let challenge = format!(
        "Bearer realm=\"http://{}/token\",service=\"it\"",
        fake.address()
    );
    fake.want(&[&challenge], &["Bearer first"]);
    fake.put(
        "/token",
        json!({ "token": "first" }).to_string(),
        "application/json",
    );
    // It ends once the documents are there.
    let ended = vec![("www-authenticate", challenge.clone())];
    let path = blob_path(&digest_of(&layers[1]));
    fake.fail(&path, [Fault::Status(401, ended), Fault::Fine]);
    let folder = tempfile::tempdir().unwrap();
    fake.pull(folder.path(), Some(login("secret")))
        .await
        .unwrap();
    let tokens = fake.asked("/token");
    assert_eq!(tokens.len(), 2);
    assert!(
        tokens
            .iter()
            .all(|it| it.authorization.as_deref() == Some(BASIC))
    );
    // Nobody is asked for a token without end.
    fake.want(&[&challenge], &[]);
    let folder = tempfile::tempdir().unwrap();
    let error = fake.pull(folder.path(), None).await.unwrap_err();
    assert_eq!(error.reason(), "PULL_UNAUTHORIZED");
    assert_eq!(fake.asked("/token").len(), 3);
    fake.fail("/token", [Fault::Status(401, vec![])]);
    let error = fake
        .pull(folder.path(), Some(login("wrong")))
        .await
        .unwrap_err();
    assert_eq!(error.reason(), "PULL_UNAUTHORIZED");
}

/// Whoever unpacks may take longer than a registry may be silent.
#[tokio::test]
async fn layers_come_while_others_are_unpacked() {
    let fake = Fake::start().await;
    let layers: Vec<_> = (0..6).map(|seed| noise(seed, 2_000_000)).collect();
    fake.publish(&layers);
    let registries = fake.asked_with(IMPATIENT, &[]);
    let name = parse_reference(&format!("{}/team/app:v1", fake.address())).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let pull = Pull::new(&registries, name, None, folder.path().to_owned()).unwrap();
    let (image, _) = pull.documents().await.unwrap();
    let (arrived, mut arrivals) = mpsc::channel(layers.len());
    let unpack = async {
        let mut count = 0;
        while let Some(()) = arrivals.recv().await {
            tokio::time::sleep(IMPATIENT.stall * 2).await;
            count += 1;
        }
        count
    };
    let (fetched, count) = tokio::join!(pull.layers(&image, LIMIT, arrived), unpack);
    fetched.unwrap();
    assert_eq!(count, layers.len());
}

#[tokio::test]
async fn of_several_variants_the_one_for_every_cpu_comes() {
    let fake = Fake::start().await;
    let layers = [noise(1, 100), noise(2, 100), noise(3, 100)];
    let variants = [Some("v3"), None, Some("v1")];
    let manifests: Vec<_> = layers
        .iter()
        .zip(variants)
        .map(|(layer, variant)| {
            let mut image = fake.put_image(std::slice::from_ref(layer), "amd64");
            if let Some(variant) = variant {
                image["platform"]["variant"] = json!(variant);
            }
            image
        })
        .collect();
    fake.put_top(
        &json!({ "schemaVersion": 2, "manifests": manifests }),
        INDEX,
    );
    let folder = tempfile::tempdir().unwrap();
    let image = fake.pull(folder.path(), None).await.unwrap();
    let (digest, _) = image.blobs().next().unwrap();
    assert_eq!(digest, digest_of(&layers[1]));
}

#[tokio::test]
async fn a_range_that_is_refused_is_no_end() {
    let fake = Fake::start().await;
    let layer = noise(1, 3_000_000);
    fake.publish(std::slice::from_ref(&layer));
    let path = blob_path(&digest_of(&layer));
    let refused = Fault::Status(416, vec![]);
    fake.fail(&path, [Fault::Cut(2_000_000), refused, Fault::Fine]);
    let folder = tempfile::tempdir().unwrap();
    fake.pull(folder.path(), None).await.unwrap();
    assert!(blob_in(folder.path(), &digest_of(&layer)) == layer);
}

#[tokio::test]
async fn credentials_do_not_go_along_to_others() {
    let (fake, store) = (Fake::start().await, Fake::start().await);
    let layer = noise(1, 1000);
    fake.publish(std::slice::from_ref(&layer));
    fake.want(&["Basic realm=\"it\""], &[BASIC]);
    store.put("/there", layer.clone(), "application/octet-stream");
    let to = format!("http://{}/there?signature=hidden", store.address());
    let redirect = Fault::Status(307, vec![("location", to)]);
    fake.fail(&blob_path(&digest_of(&layer)), [redirect]);
    let folder = tempfile::tempdir().unwrap();
    let registries = fake.registries(&[&store]);
    let pulled = fake.pull_by(&registries, ":v1", folder.path(), Some(login("secret")));
    pulled.await.unwrap();
    assert!(blob_in(folder.path(), &digest_of(&layer)) == layer);
    let asked = store.asked("/there");
    assert_eq!(asked.len(), 1);
    assert_eq!(asked[0].authorization, None);
    // Neither from where tokens are given, nor as somebody whom the redirect names.
    let challenge = format!("Bearer realm=\"http://{}/token\"", fake.address());
    fake.want(&[&challenge], &["Bearer t"]);
    let to = format!("http://me:secret@{}/token", store.address());
    fake.fail("/token", [Fault::Status(302, vec![("location", to)])]);
    store.put(
        "/token",
        json!({ "token": "t" }).to_string(),
        "application/json",
    );
    let folder = tempfile::tempdir().unwrap();
    let pulled = fake.pull_by(&registries, ":v1", folder.path(), Some(login("secret")));
    pulled.await.unwrap();
    assert_eq!(
        fake.asked("/token")[0].authorization.as_deref(),
        Some(BASIC)
    );
    assert_eq!(store.asked("/token")[0].authorization, None);
}

#[rstest]
#[case::metadata("http://169.254.169.254/latest/meta-data")]
#[case::metadata_by_tls("https://169.254.169.254/latest/meta-data")]
#[case::the_host("https://127.0.0.1/")]
#[case::by_name("https://localhost/")]
#[case::as_a_number("https://2130706433/")]
#[case::no_tls("http://registry.example/")]
#[case::a_file("file:///etc/passwd")]
#[tokio::test]
async fn nobody_sends_us_into_private_networks(#[case] to: &str) {
    let fake = Fake::start().await;
    let layer = noise(1, 1000);
    fake.publish(std::slice::from_ref(&layer));
    let redirect = || Fault::Status(302, vec![("location", to.to_owned())]);
    for path in [blob_path(&digest_of(&layer)), TOP.to_owned()] {
        fake.fail(&path, [redirect()]);
        let folder = tempfile::tempdir().unwrap();
        let error = fake.pull(folder.path(), None).await.unwrap_err();
        assert_eq!(error.reason(), "REGISTRY_FORBIDDEN", "{error}");
    }
    // It is not asked again: that would not help.
    assert_eq!(fake.asked(TOP).len(), 2);
    let challenge = format!("Bearer realm=\"{to}\"");
    let wanted = vec![("www-authenticate", challenge)];
    fake.fail(TOP, [Fault::Status(401, wanted)]);
    let folder = tempfile::tempdir().unwrap();
    let error = fake
        .pull(folder.path(), Some(login("secret")))
        .await
        .unwrap_err();
    assert_eq!(error.reason(), "REGISTRY_FORBIDDEN", "{error}");
}

#[tokio::test]
async fn a_registry_in_a_private_network_is_not_asked() {
    let fake = Fake::start().await;
    fake.publish(&[noise(1, 1000)]);
    let registries = Registries::new(&[], PATIENT);
    let folder = tempfile::tempdir().unwrap();
    let pulled = fake.pull_by(&registries, ":v1", folder.path(), None).await;
    assert_eq!(pulled.unwrap_err().reason(), "REGISTRY_FORBIDDEN");
    let pulled = pull(&registries, "localhost/team/app", folder.path(), None).await;
    assert_eq!(pulled.unwrap_err().reason(), "REGISTRY_FORBIDDEN");
    assert!(fake.asked.lock().unwrap().is_empty());
}

#[tokio::test]
async fn nobody_is_sent_round_without_end() {
    let fake = Fake::start().await;
    let there = vec![("location", TOP.to_owned())];
    fake.fail(TOP, [Fault::Status(302, there)]);
    let folder = tempfile::tempdir().unwrap();
    let error = fake.pull(folder.path(), None).await.unwrap_err();
    assert_eq!(error.reason(), "REGISTRY_INVALID", "{error}");
    assert_eq!(fake.asked(TOP).len(), 11);
}

#[tokio::test]
async fn what_has_no_end_is_cut_off() {
    let fake = Fake::start().await;
    let layer = noise(1, 1000);
    fake.publish(std::slice::from_ref(&layer));
    let folder = tempfile::tempdir().unwrap();
    fake.fail(&blob_path(&digest_of(&layer)), [Fault::Endless]);
    let error = fake.pull(folder.path(), None).await.unwrap_err();
    assert_eq!(error.reason(), "REGISTRY_INVALID", "{error}");
    fake.fail(TOP, [Fault::Endless]);
    let error = fake.pull(folder.path(), None).await.unwrap_err();
    assert_eq!(error.reason(), "SOURCE_TOO_LARGE", "{error}");
}

#[tokio::test]
async fn layers_that_are_too_large_are_not_fetched() {
    let fake = Fake::start().await;
    let mut index = fake.publish(&[noise(1, 1000)]);
    let path = manifest_path(index["manifests"][1]["digest"].as_str().unwrap());
    let manifest = fake.files.lock().unwrap()[&path].0.clone();
    let mut manifest: Value = serde_json::from_slice(&manifest).unwrap();
    let other = manifest["layers"][0].clone();
    manifest["layers"].as_array_mut().unwrap().push(other);
    let path = blob_path(manifest["config"]["digest"].as_str().unwrap());
    let config = fake.files.lock().unwrap()[&path].0.clone();
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    let diff_id = config["rootfs"]["diff_ids"][0].clone();
    config["rootfs"]["diff_ids"]
        .as_array_mut()
        .unwrap()
        .push(diff_id);
    manifest["config"] = fake.put_blob(config.to_string());
    manifest["config"]["mediaType"] = json!("application/vnd.oci.image.config.v1+json");
    for size in [LIMIT + 1, u64::MAX / 2 + 1] {
        // Together as much as nothing, for who does not look.
        manifest["layers"][0]["size"] = json!(size);
        manifest["layers"][1]["size"] = json!(size);
        index["manifests"][1] = fake.put_manifest(&manifest, MANIFEST);
        index["manifests"][1]["platform"] = json!({ "os": "linux", "architecture": "amd64" });
        fake.put_top(&index, INDEX);
        let folder = tempfile::tempdir().unwrap();
        let error = fake.pull(folder.path(), None).await.unwrap_err();
        assert_eq!(error.reason(), "SOURCE_TOO_LARGE", "{error}");
    }
    let layer = manifest["layers"][0]["digest"].as_str().unwrap();
    assert!(fake.asked(&blob_path(layer)).is_empty());
}

#[tokio::test]
async fn an_index_of_very_many_images_is_not_walked() {
    let fake = Fake::start().await;
    // Without a platform each must be looked at.
    let many: Vec<_> = (0..100)
        .map(|number| {
            let mut image = fake.put_image(&[noise(number, 100)], "s390x");
            image.as_object_mut().unwrap().remove("platform");
            image
        })
        .collect();
    fake.put_top(&json!({ "schemaVersion": 2, "manifests": many }), INDEX);
    let folder = tempfile::tempdir().unwrap();
    let error = fake.pull(folder.path(), None).await.unwrap_err();
    assert_eq!(error.reason(), "REGISTRY_INVALID", "{error}");
    assert!(fake.asked.lock().unwrap().len() < 100);
}

#[tokio::test]
async fn what_is_not_there_is_named() {
    let fake = Fake::start().await;
    let folder = tempfile::tempdir().unwrap();
    let error = fake.pull(folder.path(), None).await.unwrap_err();
    assert_eq!(error.reason(), "IMAGE_UNKNOWN");
    assert!(error.to_string().contains("/team/app:v1"), "{error}");
    // A manifest of before 2016.
    fake.put(
        TOP,
        "{}",
        "application/vnd.docker.distribution.manifest.v1+prettyjws",
    );
    let error = fake.pull(folder.path(), None).await.unwrap_err();
    assert_eq!(error.reason(), "REGISTRY_INVALID");
}

#[tokio::test]
async fn nobody_there_is_told_from_a_refusal() {
    let gone = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap()
    };
    let trusted = [format!("http://{gone}").parse().unwrap()];
    let registries = Registries::new(&trusted, PATIENT);
    let folder = tempfile::tempdir().unwrap();
    let name = format!("{gone}/team/app");
    let error = pull(&registries, &name, folder.path(), None)
        .await
        .unwrap_err();
    assert_eq!(error.reason(), "REGISTRY_UNREACHABLE", "{error}");
}
