//! Files by plain HTTP, for those without gRPC: `GET`, `HEAD` and `PUT` of `/files/<path>` (docs/files.md).
//!
//! The node lets in who may, and tells what is refused here, with a gRPC status, in the caller's tongue.

use std::{
    convert::Infallible,
    ffi::OsString,
    fs::{self, File},
    io::{self, Read as _},
    ops::RangeInclusive,
    os::unix::{ffi::OsStringExt as _, fs::MetadataExt as _},
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use futures::TryStreamExt as _;
use guest_link::body::Whole;
use headers::{
    AcceptRanges, ContentLength, ContentRange, ContentType, ETag, Header, HeaderMapExt as _,
    IfMatch, IfModifiedSince, IfNoneMatch, IfRange, IfUnmodifiedSince, LastModified,
};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, StreamBody};
use percent_encoding::percent_decode_str;
use proto::envd::v1::WriteHeader;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::io::{StreamReader, SyncIoBridge};
use tonic::{Code, Status, body::Body};
use tower::{Layer, Service};

use crate::{
    errors::{invalid, path_error, refuse},
    files::{self, Draft, Form, IN_FLIGHT, Transfer},
    identity::Guest,
    users::User,
};

const PREFIX: &str = "/files/";
const CHUNK: usize = 128 << 10;
const TAR: &str = "application/x-tar";
const ZIP: &str = "application/zip";

/// Puts [`WithFiles`] around a server.
#[derive(Debug, Clone)]
pub(crate) struct Files(pub(crate) Arc<Guest>);

impl<S> Layer<S> for Files {
    type Service = WithFiles<S>;

    fn layer(&self, inner: S) -> WithFiles<S> {
        WithFiles {
            inner,
            guest: Arc::clone(&self.0),
        }
    }
}

/// Answers requests for files, and passes on all others.
#[derive(Debug, Clone)]
pub(crate) struct WithFiles<S> {
    inner: S,
    guest: Arc<Guest>,
}

impl<S> Service<Request<Body>> for WithFiles<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        if !request.uri().path().starts_with(PREFIX) {
            return Box::pin(self.inner.call(request));
        }
        let guest = Arc::clone(&self.guest);
        Box::pin(async move {
            let answer = answer(&guest, request).await;
            Ok(answer.unwrap_or_else(Status::into_http))
        })
    }
}

async fn answer(guest: &Guest, request: Request<Body>) -> Result<Response<Body>, Status> {
    guest.gate.admit()?;
    let asked = Asked::read(guest, request.uri())?;
    match *request.method() {
        Method::GET => get(asked, request.headers(), true).await,
        Method::HEAD => get(asked, request.headers(), false).await,
        Method::PUT => put(asked, request).await,
        _ => Err(refuse(
            Code::Unimplemented,
            "METHOD_NOT_ALLOWED",
            "files are for GET, HEAD and PUT",
        )),
    }
}

/// What a request's address says.
struct Asked {
    user: User,
    path: PathBuf,
    archive: Option<Form>,
    is_unpacked: bool,
    keeps_folders: bool,
    mode: Option<u32>,
}

impl Asked {
    fn read(guest: &Guest, uri: &Uri) -> Result<Self, Status> {
        let (mut user, mut archive, mut is_unpacked, mut mode) = (String::new(), None, false, None);
        let mut keeps_folders = false;
        for (name, value) in form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes()) {
            match (name.as_ref(), value.as_ref()) {
                ("user", name) => name.clone_into(&mut user),
                ("archive", "tar") => archive = Some(Form::Tar),
                ("archive", "zip") => archive = Some(Form::Zip),
                ("archive", _) => return Err(invalid("archive", "must be tar or zip")),
                ("unpack", "tar") => is_unpacked = true,
                ("unpack", _) => return Err(invalid("unpack", "must be tar")),
                ("folders", "keep") => keeps_folders = true,
                ("folders", _) => return Err(invalid("folders", "must be keep")),
                ("mode", octal) => {
                    let bits = u32::from_str_radix(octal, 8).ok();
                    let bits = bits.filter(|bits| *bits <= 0o7777);
                    let rule = || invalid("mode", "must be octal, at most 7777");
                    mode = Some(bits.ok_or_else(rule)?);
                }
                (unknown, _) => return Err(invalid(unknown, "is no parameter of files")),
            }
        }
        let path = uri.path().strip_prefix(PREFIX).unwrap_or_default();
        let mut path: Vec<u8> = percent_decode_str(path).collect();
        if path.first() != Some(&b'~') {
            path.insert(0, b'/');
        }
        // "~" is only looked for in text.
        let (user, path) = match String::from_utf8(path) {
            Ok(path) => files::resolve(guest, &user, &path, &[])?,
            Err(bytes) => files::resolve(guest, &user, "", bytes.as_bytes())?,
        };
        Ok(Self {
            user,
            path,
            archive,
            is_unpacked,
            keeps_folders,
            mode,
        })
    }
}

async fn get(asked: Asked, headers: &HeaderMap, has_body: bool) -> Result<Response<Body>, Status> {
    if asked.is_unpacked || asked.mode.is_some() {
        return Err(invalid("unpack, mode", "are for PUT"));
    }
    let path = asked.path.clone();
    let open = move || {
        let failed = |error: io::Error| path_error(&files::shown(&path), &error);
        let metadata = fs::metadata(&path).map_err(failed)?;
        if metadata.is_dir() {
            // Whether it may be listed is told now; the rest only while it is sent.
            fs::read_dir(&path).map_err(failed)?;
            return Ok(None);
        }
        let (file, _) = files::open(&path)?;
        let metadata = file.metadata().map_err(failed)?;
        Ok(Some((file, metadata)))
    };
    let Some((file, metadata)) = files::acting_as(asked.user.clone(), open).await? else {
        let form = asked.archive.unwrap_or(Form::Tar);
        return get_archive(asked, form, has_body);
    };
    if asked.archive.is_some() {
        return Err(invalid("archive", "is for directories, and this is a file"));
    }
    let (mut response, range) = conditional(&metadata, headers)?;
    if let (Some(range), true) = (range, has_body) {
        *response.body_mut() = contents(file, range, files::shown(&asked.path))?;
    }
    Ok(response)
}

/// The head of the answer, and what of the file goes with it (RFC 9110, 13.2.2 and 14.2).
fn conditional(
    metadata: &fs::Metadata,
    headers: &HeaderMap,
) -> Result<(Response<Body>, Option<RangeInclusive<u64>>), Status> {
    let size = metadata.len();
    let etag = etag(metadata)?;
    let modified = metadata.modified().ok();
    let last_modified = modified.map(LastModified::from);
    let mut response = Response::new(Body::empty());
    let head = response.headers_mut();
    head.typed_insert(etag.clone());
    head.typed_insert(AcceptRanges::bytes());
    if let Some(last_modified) = last_modified {
        head.typed_insert(last_modified);
    }
    let is_other = match (
        typed::<IfMatch>(headers)?,
        typed::<IfUnmodifiedSince>(headers)?,
    ) {
        (Some(wanted), _) => !wanted.precondition_passes(&etag),
        (None, Some(since)) => modified.is_some_and(|time| !since.precondition_passes(time)),
        (None, None) => false,
    };
    if is_other {
        *response.status_mut() = StatusCode::PRECONDITION_FAILED;
        return Ok((response, None));
    }
    let is_known = match (
        typed::<IfNoneMatch>(headers)?,
        typed::<IfModifiedSince>(headers)?,
    ) {
        (Some(known), _) => !known.precondition_passes(&etag),
        (None, Some(since)) => modified.is_some_and(|time| !since.is_modified(time)),
        (None, None) => false,
    };
    if is_known {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        return Ok((response, None));
    }
    let wants_part = typed::<IfRange>(headers)?
        .is_none_or(|wanted| !wanted.is_modified(Some(&etag), last_modified.as_ref()));
    let head = response.headers_mut();
    plain(head, ContentType::octet_stream());
    match part(headers, size).filter(|_| wants_part) {
        None => {
            head.typed_insert(ContentLength(size));
            let whole = size.checked_sub(1).map(|last| 0..=last);
            Ok((response, whole))
        }
        Some(Ok(range)) => {
            head.typed_insert(ContentLength(range.end() - range.start() + 1));
            if let Ok(content_range) = ContentRange::bytes(range.clone(), size) {
                head.typed_insert(content_range);
            }
            *response.status_mut() = StatusCode::PARTIAL_CONTENT;
            Ok((response, Some(range)))
        }
        Some(Err(())) => {
            head.typed_insert(ContentRange::unsatisfied_bytes(size));
            *response.status_mut() = StatusCode::RANGE_NOT_SATISFIABLE;
            Ok((response, None))
        }
    }
}

/// The one range that is asked for, or that there is none such. Several at once, or what is no range, may be passed over (RFC 9110, 14.2).
fn part(headers: &HeaderMap, size: u64) -> Option<Result<RangeInclusive<u64>, ()>> {
    let text = headers.get(header::RANGE)?.to_str().ok()?;
    let parsed = http_range_header::parse_range_header(text).ok()?;
    if parsed.ranges.len() != 1 {
        return None;
    }
    let ranges = parsed.validate(size).map_err(drop);
    Some(ranges.and_then(|ranges| ranges.into_iter().next().ok_or(())))
}

/// A header as it is meant; what cannot be read is refused, since to pass it over might do what the client wanted to prevent.
fn typed<H: Header>(headers: &HeaderMap) -> Result<Option<H>, Status> {
    let read = headers.typed_try_get::<H>();
    read.map_err(|_| invalid(H::name().as_str(), "cannot be read"))
}

/// Another one with each change: a file that is replaced is another inode, one that is written to has another time.
fn etag(metadata: &fs::Metadata) -> Result<ETag, Status> {
    let tag = format!(
        "\"{:x}-{:x}-{:x}.{:x}\"",
        metadata.ino(),
        metadata.len(),
        metadata.mtime(),
        metadata.mtime_nsec()
    );
    tag.parse()
        .map_err(|_| refuse(Code::Internal, "INTERNAL", "a file has no tag"))
}

/// A guest's files are data: no browser is to take them for pages of this host.
fn plain(headers: &mut HeaderMap, content_type: ContentType) {
    headers.typed_insert(content_type);
    for (name, value) in [
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::CONTENT_SECURITY_POLICY, "sandbox"),
        (header::CACHE_CONTROL, "no-cache"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
}

fn contents(file: File, range: RangeInclusive<u64>, shown: String) -> Result<Body, Status> {
    let transfer = Transfer::begin()?;
    let (to, body) = outward();
    tokio::task::spawn_blocking(move || {
        let _transfer = transfer;
        let length = range.end() - range.start() + 1;
        let mut sent = 0;
        let read = files::each_chunk(file, *range.start(), length, |_, chunk| {
            sent += chunk.len() as u64;
            to.blocking_send(Ok(chunk)).is_ok()
        });
        let failed = match read {
            Err(error) => path_error(&shown, &error),
            Ok(()) if sent == length => return,
            Ok(()) => refuse(
                Code::Aborted,
                "PATH_CHANGED",
                format!("{shown}: became shorter meanwhile"),
            ),
        };
        // Nobody listens any more, or the answer breaks off there.
        let _ = to.blocking_send(Err(failed));
    });
    Ok(body)
}

/// A body, and where it comes from: an error breaks it off.
fn outward() -> (mpsc::Sender<Result<Bytes, Status>>, Body) {
    let (to, chunks) = mpsc::channel(IN_FLIGHT);
    let frames = ReceiverStream::new(chunks).map_ok(http_body::Frame::data);
    (to, Body::new(StreamBody::new(frames)))
}

fn get_archive(asked: Asked, form: Form, has_body: bool) -> Result<Response<Body>, Status> {
    let mut response = Response::new(Body::empty());
    let (content_type, extension) = match form {
        Form::Tar => (TAR, "tar"),
        Form::Zip => (ZIP, "zip"),
    };
    let head = response.headers_mut();
    if let Ok(content_type) = content_type.parse() {
        plain(head, content_type);
    }
    let name = asked.path.file_name().map_or_else(
        || "root".into(),
        |name| {
            percent_encoding::percent_encode(
                name.as_encoded_bytes(),
                percent_encoding::NON_ALPHANUMERIC,
            )
            .to_string()
        },
    );
    // RFC 8187 takes bytes, percent-encoded.
    let disposition = format!("attachment; filename*=UTF-8''{name}.{extension}");
    if let Ok(disposition) = disposition.parse() {
        head.insert(header::CONTENT_DISPOSITION, disposition);
    }
    if !has_body {
        return Ok(response);
    }
    let transfer = Transfer::begin()?;
    let (to, body) = outward();
    *response.body_mut() = body;
    tokio::spawn(async move {
        let _transfer = transfer;
        let last = to.clone();
        let packed = files::acting_as(asked.user, move || {
            let to = io::BufWriter::with_capacity(CHUNK, Outward(to));
            files::pack(&asked.path, form, to)
                .map_err(|error| path_error(&files::shown(&asked.path), &error))
        });
        if let Err(status) = packed.await {
            // Nobody listens any more, or the answer breaks off there.
            let _ = last.send(Err(status)).await;
        }
    });
    Ok(response)
}

/// Writes into a stream, for threads.
pub(crate) struct Outward(pub(crate) mpsc::Sender<Result<Bytes, Status>>);

impl io::Write for Outward {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let chunk = Bytes::copy_from_slice(bytes);
        let sent = self.0.blocking_send(Ok(chunk));
        sent.map_err(|_| io::ErrorKind::BrokenPipe)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

async fn put(asked: Asked, request: Request<Body>) -> Result<Response<Body>, Status> {
    if asked.archive.is_some() {
        return Err(invalid("archive", "is for GET; PUT has unpack"));
    }
    let (head, body) = request.into_parts();
    if head.headers.contains_key(header::CONTENT_RANGE) {
        // It would mean a part of a file (RFC 9110, 14.5).
        return Err(invalid(
            "content-range",
            "is not for PUT: uploads that go on are FilesystemService.Write's",
        ));
    }
    let transfer = Transfer::begin()?;
    let body = Whole::new(body).into_data_stream();
    let body = body.map_err(|error| io::Error::new(io::ErrorKind::ConnectionAborted, error));
    let body = SyncIoBridge::new(StreamReader::new(Box::pin(body)));
    if asked.is_unpacked {
        return unpack(asked, body, transfer).await;
    }
    let Asked {
        user, path, mode, ..
    } = asked;
    let header = WriteHeader {
        mode,
        make_parents: true,
        ..WriteHeader::default()
    };
    let (wanted, unwanted) = (
        typed::<IfMatch>(&head.headers)?,
        typed::<IfNoneMatch>(&head.headers)?,
    );
    let acting = user.clone();
    let receive = move || {
        let is_new = precondition(&path, wanted, unwanted)?;
        let mut draft = Draft::begin(path, &acting, &header)?;
        let mut body = body;
        let mut chunk = vec![0; CHUNK];
        loop {
            let count = body.read(&mut chunk).map_err(broke_off)?;
            if count == 0 {
                return Ok((draft, is_new, transfer));
            }
            draft.write(&chunk[..count])?;
        }
    };
    let (draft, is_new, _transfer) = files::acting_as(user.clone(), receive).await?;
    let finish = move || {
        let entry = draft.finish(None)?;
        let path = Path::new(&OsString::from_vec(entry.path_bytes)).to_owned();
        fs::metadata(&path).map_err(|error| path_error(&entry.path, &error))
    };
    let metadata = files::acting_as(user, finish).await?;
    let mut response = Response::new(Body::empty());
    *response.status_mut() = if is_new {
        StatusCode::CREATED
    } else {
        StatusCode::NO_CONTENT
    };
    response.headers_mut().typed_insert(etag(&metadata)?);
    Ok(response)
}

/// Whether there is nothing yet; refuses where that, or what is there, is not what the client said.
fn precondition(
    path: &Path,
    wanted: Option<IfMatch>,
    unwanted: Option<IfNoneMatch>,
) -> Result<bool, Status> {
    let there = match fs::metadata(path) {
        Ok(metadata) => Some(etag(&metadata)?),
        Err(_) => None,
    };
    let passes = match &there {
        Some(tag) => {
            wanted.is_none_or(|wanted| wanted.precondition_passes(tag))
                && unwanted.is_none_or(|unwanted| unwanted.precondition_passes(tag))
        }
        None => wanted.is_none(),
    };
    if !passes {
        let message = format!(
            "{}: is not as if-match or if-none-match says",
            files::shown(path)
        );
        return Err(refuse(
            Code::FailedPrecondition,
            "PRECONDITION_FAILED",
            message,
        ));
    }
    Ok(there.is_none())
}

fn broke_off(error: io::Error) -> Status {
    refuse(Code::Aborted, "UPLOAD_BROKE_OFF", error.to_string())
}

async fn unpack(
    asked: Asked,
    body: impl io::Read + Send + 'static,
    transfer: Transfer,
) -> Result<Response<Body>, Status> {
    let Asked {
        user,
        path,
        keeps_folders,
        ..
    } = asked;
    let is_root = user.uid == 0;
    let unpacked = files::acting_as(user, move || {
        let _transfer = transfer;
        files::make_directory(&path, 0o755)?;
        files::unpack(&path, body, is_root, keeps_folders)
    });
    let unpacked = unpacked.await?;
    let answer = format!(
        "{{\"entries\":{},\"sizeBytes\":{},\"leftOut\":{}}}",
        unpacked.entries, unpacked.size_bytes, unpacked.left_out
    );
    let mut response = Response::new(Body::new(http_body_util::Full::from(answer)));
    response.headers_mut().typed_insert(ContentType::json());
    Ok(response)
}
