//! Files of the sandbox, streamed with constant memory.

use std::{
    cell::Cell,
    io::SeekFrom,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use proto::envd::v1::{
    Entry, FileChange, FilesystemServiceListRequest, FilesystemServiceWatchRequest,
    FilesystemServiceWatchResponse, GetUploadRequest, ReadRequest, StatRequest, WriteEnd,
    WriteHeader, WriteRequest, write_request::Part,
};
use proto::session::v1::Session;
use rand::RngExt as _;
use service_kit::file_url::{Key, Use};
use tokio::{
    io::{
        AsyncRead, AsyncReadExt as _, AsyncSeek, AsyncSeekExt as _, AsyncWrite, AsyncWriteExt as _,
    },
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

use crate::{
    Error, Sandbox,
    resumed::{RETRIES, Resumed, wait_after},
};

const CHUNK: usize = 256 << 10;
const LARGEST_PAGE: u32 = 10_000;
/// A sandbox may say anything, also that there is always one more.
const MOST_ENTRIES: usize = 5_000_000;
const IN_FLIGHT: usize = 4;

impl Sandbox {
    /// What a path is.
    pub async fn stat(&self, path: &str) -> Result<Entry, Error> {
        let request = StatRequest {
            path: path.into(),
            ..StatRequest::default()
        };
        self.filesystem()
            .stat(request)
            .await?
            .into_inner()
            .entry
            .ok_or(Error::Incomplete("entry"))
    }

    /// All entries of a directory.
    pub async fn list(&self, path: &str) -> Result<Vec<Entry>, Error> {
        let request = FilesystemServiceListRequest {
            path: path.into(),
            ..Default::default()
        };
        self.list_all(request).await
    }

    /// All pages of a listing, 5 million entries at most.
    pub async fn list_all(
        &self,
        mut request: FilesystemServiceListRequest,
    ) -> Result<Vec<Entry>, Error> {
        let mut entries = Vec::new();
        // Each page is looked for from the beginning, so few large ones take less.
        request.page_size = LARGEST_PAGE;
        loop {
            let page = self.filesystem().list(request.clone()).await?.into_inner();
            entries.extend(page.entries);
            request.page_token = page.next_page_token;
            if request.page_token.is_empty() {
                return Ok(entries);
            }
            if entries.len() > MOST_ENTRIES {
                return Err(Error::Incomplete("an end to its entries"));
            }
        }
    }

    /// What changes at a path.
    pub fn watch_files(&self, request: FilesystemServiceWatchRequest) -> FileWatch {
        FileWatch {
            sandbox: self.clone(),
            request,
            stream: Resumed::default(),
            is_told: false,
        }
    }

    /// Copies a file out, as [`Self::download`] does.
    pub async fn read_to(
        &self,
        path: &str,
        to: &mut (impl AsyncWrite + Unpin),
        progress: impl FnMut(u64),
    ) -> Result<u64, Error> {
        let request = ReadRequest {
            path: path.into(),
            ..ReadRequest::default()
        };
        self.download(request, to, progress).await
    }

    /// Copies a file, or a part of it, out. When the connection breaks, it goes on where it broke off; if the file has changed meanwhile, it fails with
    /// [`Error::Changed`]. `progress` hears the bytes so far. Returns how many there were.
    pub async fn download(
        &self,
        request: ReadRequest,
        to: &mut (impl AsyncWrite + Unpin),
        mut progress: impl FnMut(u64),
    ) -> Result<u64, Error> {
        let count = Cell::new(0);
        let mut version = None;
        let mut stream = Resumed::default();
        let open = async || {
            let rest = ReadRequest {
                offset: request.offset + count.get(),
                length: request.length.map(|length| length - count.get()),
                ..request.clone()
            };
            self.filesystem().read(rest).await
        };
        while let Some((part, is_first)) = stream.next(open).await? {
            if is_first {
                let entry = part.entry.as_ref().ok_or(Error::Incomplete("entry"))?;
                let this = (entry.size_bytes, entry.modify_time);
                if *version.get_or_insert(this) != this {
                    return Err(Error::Changed);
                }
            }
            let so_far = count.get() + part.data.len() as u64;
            if request.length.is_some_and(|length| so_far > length) {
                return Err(Error::Incomplete("an end where it should"));
            }
            to.write_all(&part.data).await?;
            count.set(so_far);
            progress(so_far);
        }
        to.flush().await?;
        Ok(count.get())
    }

    /// Copies a stream in; the file appears whole or not at all.
    pub async fn write_from(
        &self,
        header: WriteHeader,
        from: &mut (impl AsyncRead + Unpin),
        mut progress: impl FnMut(u64),
    ) -> Result<Entry, Error> {
        let mut sent = Sent::default();
        self.send(header, from, &mut sent, &mut progress).await
    }

    /// Copies a file in; it appears whole or not at all. When the connection breaks, it goes on where it broke off; at the end the checksum of the
    /// whole is compared. `progress` hears the bytes so far.
    pub async fn upload(
        &self,
        mut header: WriteHeader,
        from: &mut (impl AsyncRead + AsyncSeek + Unpin),
        mut progress: impl FnMut(u64),
    ) -> Result<Entry, Error> {
        header.upload_id = format!("{:016x}", rand::rng().random::<u64>());
        let mut sent = Sent {
            hasher: Some(blake3::Hasher::new()),
            ..Sent::default()
        };
        let mut failures = 0;
        loop {
            let before = sent.count;
            let failed = match self
                .send(header.clone(), from, &mut sent, &mut progress)
                .await
            {
                Ok(entry) => return Ok(entry),
                Err(error) => error,
            };
            if sent.count > before {
                failures = 0;
            }
            // A guest may say anything; more than was sent it cannot have.
            let there = self.go_on(failed, &header, &mut failures).await?;
            header.offset = there.min(sent.count);
            sent.position = header.offset;
            from.seek(SeekFrom::Start(header.offset)).await?;
        }
    }

    /// After a failure: from where to go on, once it is known.
    async fn go_on(
        &self,
        mut failed: Error,
        header: &WriteHeader,
        failures: &mut u32,
    ) -> Result<u64, Error> {
        loop {
            // The guest may hear later than we that the connection is broken.
            let is_busy = failed
                .reason()
                .is_some_and(|reason| reason == "UPLOAD_BUSY");
            if !(is_busy || failed.is_interruption()) || *failures == RETRIES {
                return Err(failed);
            }
            tokio::time::sleep(wait_after(*failures)).await;
            *failures += 1;
            let request = GetUploadRequest {
                path: header.path.clone(),
                path_bytes: header.path_bytes.clone(),
                user: header.user.clone(),
                upload_id: header.upload_id.clone(),
            };
            match self.filesystem().get_upload(request).await {
                Ok(answer) => return Ok(answer.into_inner().size_bytes),
                // Nothing has come, or all has and the answer was lost.
                Err(status) if status.code() == Code::NotFound => return Ok(0),
                Err(status) => failed = status.into(),
            }
        }
    }

    async fn send(
        &self,
        header: WriteHeader,
        from: &mut (impl AsyncRead + Unpin),
        sent: &mut Sent,
        progress: &mut impl FnMut(u64),
    ) -> Result<Entry, Error> {
        let (parts, stream) = mpsc::channel(IN_FLIGHT);
        let mut filesystem = self.filesystem();
        let write = filesystem.write(ReceiverStream::new(stream));
        let feed = async {
            let part = |part| WriteRequest { part: Some(part) };
            let mut taken = parts.send(part(Part::Header(header))).await;
            while taken.is_ok() {
                let mut chunk = Vec::with_capacity(CHUNK);
                if (&mut *from)
                    .take(CHUNK as u64)
                    .read_to_end(&mut chunk)
                    .await?
                    == 0
                {
                    if let Some(hasher) = &sent.hasher {
                        let blake3 = hasher.finalize().as_bytes().to_vec();
                        // A server that stopped listening says why in its answer.
                        let _ = parts.send(part(Part::End(WriteEnd { blake3 }))).await;
                    }
                    break;
                }
                sent.add(&chunk);
                taken = parts.send(part(Part::Data(Bytes::from(chunk)))).await;
                progress(sent.position);
            }
            drop(parts);
            // A server that stopped listening says why in its answer.
            Ok::<_, Error>(())
        };
        let (answer, fed) = tokio::join!(write, feed);
        fed?;
        answer?.into_inner().entry.ok_or(Error::Incomplete("entry"))
    }
}

/// An address of a file or directory that anybody may use who has it, until it expires: for browsers, `curl`, and others without gRPC. Nothing is
/// asked for it; the session's access token signs it.
#[derive(Debug, Clone)]
pub struct FileUrl {
    /// Absolute, relative to the user's home, or with `~`.
    pub path: String,
    /// Acting user. Empty: the template's default user.
    pub user: String,
    /// Form of a directory: `tar` or `zip`. Empty: the server's choice.
    pub archive: String,
    /// Read it, or write it.
    pub what: Use,
    /// For how long, from now; at most 7 days.
    pub valid: Duration,
}

impl FileUrl {
    /// Of a session as `create` and `get` answer it, with its token.
    pub fn of(&self, session: &Session) -> String {
        let host = session.host.replace("{port}-", "");
        let path = match self.path.strip_prefix('/') {
            Some(absolute) => absolute.to_owned(),
            None if self.path.starts_with('~') => self.path.clone(),
            None => format!("~/{}", self.path),
        };
        let path = format!("/files/{}", utf8_percent_encode(&path, &IN_PATH));
        let query: Vec<String> = [("user", &self.user), ("archive", &self.archive)]
            .into_iter()
            .filter(|(_, value)| !value.is_empty())
            .map(|(name, value)| format!("{name}={}", utf8_percent_encode(value, &IN_PATH)))
            .collect();
        let key = Key::of_token(&session.access_token);
        let expires = SystemTime::now() + self.valid;
        let signed = key.sign(self.what, &path, &query.join("&"), expires);
        format!("http://{host}{signed}")
    }
}

/// What has no meaning of its own in a path (RFC 3986, 2.3), and the slash.
const IN_PATH: AsciiSet = NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~')
    .remove(b'/');

/// What has been sent of a file, each byte hashed once if its end is to be checked.
#[derive(Default)]
struct Sent {
    hasher: Option<blake3::Hasher>,
    /// Bytes that have been sent at least once, from the first on.
    count: u64,
    position: u64,
}

impl Sent {
    fn add(&mut self, chunk: &[u8]) {
        let known = usize::try_from(self.count - self.position).unwrap_or(usize::MAX);
        if let Some(new) = chunk.get(known..) {
            if let Some(hasher) = &mut self.hasher {
                hasher.update(new);
            }
            self.count += new.len() as u64;
        }
        self.position += chunk.len() as u64;
    }
}

/// Changes of files; taken up again when the connection breaks.
pub struct FileWatch {
    sandbox: Sandbox,
    request: FilesystemServiceWatchRequest,
    stream: Resumed<FilesystemServiceWatchResponse>,
    /// Whether the caller knows that the watch stands.
    is_told: bool,
}

impl std::fmt::Debug for FileWatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut debug = f.debug_struct("FileWatch");
        debug
            .field("request", &self.request)
            .finish_non_exhaustive()
    }
}

impl FileWatch {
    /// The next change: first that the watch stands. What changed while a connection was broken is told as `FILE_CHANGE_OVERFLOW`. `None` when
    /// the watched directory is gone.
    pub async fn next(&mut self) -> Result<Option<FilesystemServiceWatchResponse>, Error> {
        let (sandbox, request) = (&self.sandbox, &self.request);
        let open = async || sandbox.filesystem().watch(request.clone()).await;
        let Some((mut change, _)) = self.stream.next(open).await? else {
            return Ok(None);
        };
        if change.change() == FileChange::Watching && std::mem::replace(&mut self.is_told, true) {
            change.set_change(FileChange::Overflow);
        }
        Ok(Some(change))
    }
}
