//! Files of the sandbox, streamed with constant memory.

use bytes::Bytes;
use proto::envd::v1::{
    Entry, FileChange, FilesystemServiceListRequest, FilesystemServiceWatchRequest,
    FilesystemServiceWatchResponse, ReadRequest, StatRequest, WriteHeader, WriteRequest,
    write_request::Part,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;

use crate::{Error, Sandbox, resumed::Resumed};

const CHUNK: usize = 256 << 10;
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
        let mut entries = Vec::new();
        let mut page_token = String::new();
        loop {
            let request = FilesystemServiceListRequest {
                path: path.into(),
                page_token,
                ..Default::default()
            };
            let page = self.filesystem().list(request).await?.into_inner();
            entries.extend(page.entries);
            page_token = page.next_page_token;
            if page_token.is_empty() {
                return Ok(entries);
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

    /// Copies a file out; `progress` hears the bytes so far. Returns its size.
    pub async fn read_to(
        &self,
        path: &str,
        to: &mut (impl AsyncWrite + Unpin),
        mut progress: impl FnMut(u64),
    ) -> Result<u64, Error> {
        let request = ReadRequest {
            path: path.into(),
            ..ReadRequest::default()
        };
        let mut stream = self.filesystem().read(request).await?.into_inner();
        let mut count = 0;
        while let Some(part) = stream.message().await? {
            to.write_all(&part.data).await?;
            count += part.data.len() as u64;
            progress(count);
        }
        to.flush().await?;
        Ok(count)
    }

    /// Copies a file in; it appears whole or not at all.
    pub async fn write_from(
        &self,
        header: WriteHeader,
        from: &mut (impl AsyncRead + Unpin),
        mut progress: impl FnMut(u64),
    ) -> Result<Entry, Error> {
        let (parts, stream) = mpsc::channel(IN_FLIGHT);
        let mut filesystem = self.filesystem();
        let write = filesystem.write(ReceiverStream::new(stream));
        let feed = async {
            let part = |part| WriteRequest { part: Some(part) };
            let mut sent = parts.send(part(Part::Header(header))).await;
            let mut count = 0;
            while sent.is_ok() {
                let mut chunk = Vec::with_capacity(CHUNK);
                if (&mut *from)
                    .take(CHUNK as u64)
                    .read_to_end(&mut chunk)
                    .await?
                    == 0
                {
                    break;
                }
                count += chunk.len() as u64;
                sent = parts.send(part(Part::Data(Bytes::from(chunk)))).await;
                progress(count);
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
