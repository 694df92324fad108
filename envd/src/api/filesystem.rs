//! `sandmesh.envd.v1.FilesystemService`.

use std::{
    ffi::{OsStr, OsString},
    io,
    os::unix::ffi::{OsStrExt as _, OsStringExt as _},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use proto::envd::v1::{
    CopyRequest, CopyResponse, FilesystemServiceListRequest, FilesystemServiceListResponse,
    FilesystemServiceWatchRequest, FilesystemServiceWatchResponse, GetUploadRequest,
    GetUploadResponse, MakeDirectoryRequest, MakeDirectoryResponse, MakeSymlinkRequest,
    MakeSymlinkResponse, MoveRequest, MoveResponse, ReadRequest, ReadResponse, RemoveRequest,
    RemoveResponse, StatRequest, StatResponse, WriteRequest, WriteResponse,
    filesystem_service_server::FilesystemService, write_request::Part,
};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status, Streaming};

use super::Answers;
use crate::{
    errors::{invalid, path_error, refuse},
    files::{self, Draft, IN_FLIGHT, Listing, Look, Transfer, Watch},
    identity::Guest,
    users::User,
};

const PAGE: usize = 1000;
const LARGEST_PAGE: usize = 10_000;
const DEEPEST_LISTING: u32 = 64;
/// As long as the kernel takes it (symlink(7)).
const LONGEST_TARGET: usize = 4095;
/// The kernel allows root 128 inotify instances (fs.inotify.max_user_instances), and root's own programs may want some.
const MOST_WATCHES: usize = 64;
static WATCHES: Semaphore = Semaphore::const_new(MOST_WATCHES);
/// Between looks at what changed. Changes are told within 200 ms.
const GATHERING: Duration = Duration::from_millis(20);

pub(crate) struct Api {
    pub(crate) guest: Arc<Guest>,
}

impl Api {
    fn resolve(&self, user: &str, path: &str, bytes: &[u8]) -> Result<(User, PathBuf), Status> {
        files::resolve(&self.guest, user, path, bytes)
    }
}

#[tonic::async_trait]
impl FilesystemService for Api {
    async fn stat(&self, request: Request<StatRequest>) -> Result<Response<StatResponse>, Status> {
        let request = request.into_inner();
        let (user, path) = self.resolve(&request.user, &request.path, &request.path_bytes)?;
        let entry = files::acting_as(user, move || files::stat(&path, request.no_follow)).await?;
        Ok(Response::new(StatResponse { entry: Some(entry) }))
    }

    async fn list(
        &self,
        request: Request<FilesystemServiceListRequest>,
    ) -> Result<Response<FilesystemServiceListResponse>, Status> {
        let request = request.into_inner();
        let (user, path) = self.resolve(&request.user, &request.path, &request.path_bytes)?;
        let limit = match usize::try_from(request.page_size).unwrap_or(PAGE) {
            0 => PAGE,
            size => size.min(LARGEST_PAGE),
        };
        let depth = match request.depth {
            0 => 1,
            depth @ 1..=DEEPEST_LISTING => depth,
            _ => return Err(invalid("depth", "must be at most 64")),
        };
        // The token is the last entry's path, in hexadecimal: names are bytes, tokens are text.
        let after = from_hex(&request.page_token)
            .ok_or_else(|| invalid("page_token", "is not one this service gave out"))?;
        let listing = Listing {
            depth,
            pattern: request.pattern,
            after: OsString::from_vec(after).into(),
            limit,
        };
        let (entries, last) = files::acting_as(user, move || listing.page(&path)).await?;
        let next_page_token = last
            .map(|path| to_hex(path.as_os_str().as_bytes()))
            .unwrap_or_default();
        Ok(Response::new(FilesystemServiceListResponse {
            entries,
            next_page_token,
        }))
    }

    async fn make_directory(
        &self,
        request: Request<MakeDirectoryRequest>,
    ) -> Result<Response<MakeDirectoryResponse>, Status> {
        let request = request.into_inner();
        let (user, path) = self.resolve(&request.user, &request.path, &request.path_bytes)?;
        let mode = request.mode.unwrap_or(0o755);
        let entry = files::acting_as(user, move || files::make_directory(&path, mode)).await?;
        Ok(Response::new(MakeDirectoryResponse { entry: Some(entry) }))
    }

    async fn make_symlink(
        &self,
        request: Request<MakeSymlinkRequest>,
    ) -> Result<Response<MakeSymlinkResponse>, Status> {
        let request = request.into_inner();
        let (user, path) = self.resolve(&request.user, &request.path, &request.path_bytes)?;
        let target = request.target;
        if target.is_empty() || target.len() > LONGEST_TARGET || target.contains(&0) {
            return Err(invalid("target", "must be 1-4095 bytes without NUL"));
        }
        let make = move || files::make_symlink(&path, OsStr::from_bytes(&target), request.replace);
        let entry = files::acting_as(user, make).await?;
        Ok(Response::new(MakeSymlinkResponse { entry: Some(entry) }))
    }

    async fn copy(&self, request: Request<CopyRequest>) -> Result<Response<CopyResponse>, Status> {
        let request = request.into_inner();
        let (user, source) = self.resolve(&request.user, &request.source, &request.source_bytes)?;
        let (_, destination) = self.resolve(
            &request.user,
            &request.destination,
            &request.destination_bytes,
        )?;
        let cancelled = CancellationToken::new();
        // Dropped with this call, also when its client goes.
        let _cancel = cancelled.clone().drop_guard();
        let copied = files::acting_as(user, move || {
            files::copy(&source, &destination, request.replace, &cancelled)
        })
        .await?;
        Ok(Response::new(copied))
    }

    async fn r#move(
        &self,
        request: Request<MoveRequest>,
    ) -> Result<Response<MoveResponse>, Status> {
        let request = request.into_inner();
        let (user, source) = self.resolve(&request.user, &request.source, &request.source_bytes)?;
        let (_, destination) = self.resolve(
            &request.user,
            &request.destination,
            &request.destination_bytes,
        )?;
        let entry = files::acting_as(user, move || {
            files::rename(&source, &destination, request.replace)
        })
        .await?;
        Ok(Response::new(MoveResponse { entry: Some(entry) }))
    }

    async fn remove(
        &self,
        request: Request<RemoveRequest>,
    ) -> Result<Response<RemoveResponse>, Status> {
        let request = request.into_inner();
        let (user, path) = self.resolve(&request.user, &request.path, &request.path_bytes)?;
        files::acting_as(user, move || files::remove(&path, request.recursive)).await?;
        Ok(Response::new(RemoveResponse {}))
    }

    type ReadStream = Answers<ReadResponse>;

    async fn read(
        &self,
        request: Request<ReadRequest>,
    ) -> Result<Response<Self::ReadStream>, Status> {
        let request = request.into_inner();
        let (user, path) = self.resolve(&request.user, &request.path, &request.path_bytes)?;
        let shown = files::shown(&path);
        let transfer = Transfer::begin()?;
        let (file, entry) = files::acting_as(user, move || files::open(&path)).await?;
        let (to, answers) = mpsc::channel(IN_FLIGHT);
        let (offset, length) = (request.offset, request.length.unwrap_or(u64::MAX));
        // An open file needs no user any more; reading it blocks, so it has a thread.
        tokio::task::spawn_blocking(move || {
            let _transfer = transfer;
            let first = ReadResponse {
                entry: Some(entry),
                offset,
                data: Bytes::new(),
            };
            if to.blocking_send(Ok(first)).is_err() {
                return;
            }
            let send = |offset, data| {
                let part = ReadResponse {
                    entry: None,
                    offset,
                    data,
                };
                to.blocking_send(Ok(part)).is_ok()
            };
            if let Err(error) = files::each_chunk(file, offset, length, send) {
                // Nobody listens any more, or they hear why.
                let _ = to.blocking_send(Err(path_error(&shown, &error)));
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }

    async fn write(
        &self,
        request: Request<Streaming<WriteRequest>>,
    ) -> Result<Response<WriteResponse>, Status> {
        let mut parts = request.into_inner();
        let first = parts.message().await?.and_then(|message| message.part);
        let Some(Part::Header(header)) = first else {
            return Err(invalid("header", "must come first"));
        };
        let (user, path) = self.resolve(&header.user, &header.path, &header.path_bytes)?;
        let begin = {
            let user = user.clone();
            move || Draft::begin(path, &user, &header)
        };
        let mut draft = files::acting_as(user.clone(), begin).await?;
        let mut end = None;
        while let Some(message) = parts.message().await? {
            let data = match message.part {
                Some(Part::Data(data)) if end.is_none() => data,
                Some(Part::End(last)) if end.is_none() => {
                    end = Some(last);
                    continue;
                }
                Some(Part::Header(_)) => return Err(invalid("header", "must come once")),
                _ => return Err(invalid("end", "must come last")),
            };
            draft = tokio::task::spawn_blocking(move || {
                draft.write(&data)?;
                Ok::<_, Status>(draft)
            })
            .await
            .map_err(|_| refuse(Code::Internal, "INTERNAL", "the write ended early"))??;
        }
        // To tonic a call that was cancelled is one that ended (0.14, codec/decode.rs), but half a file must not appear. hyper looks for
        // a reset each time the call has nothing to answer yet (1.12, proto/h2/server.rs), and drops it then: here.
        tokio::task::yield_now().await;
        let entry = files::acting_as(user, move || draft.finish(end.as_ref())).await?;
        Ok(Response::new(WriteResponse { entry: Some(entry) }))
    }

    async fn get_upload(
        &self,
        request: Request<GetUploadRequest>,
    ) -> Result<Response<GetUploadResponse>, Status> {
        let request = request.into_inner();
        let (user, path) = self.resolve(&request.user, &request.path, &request.path_bytes)?;
        let look = move || files::uploaded(path, &request.upload_id);
        let size_bytes = files::acting_as(user, look).await?;
        Ok(Response::new(GetUploadResponse { size_bytes }))
    }

    type WatchStream = Answers<FilesystemServiceWatchResponse>;

    async fn watch(
        &self,
        request: Request<FilesystemServiceWatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let request = request.into_inner();
        let (user, path) = self.resolve(&request.user, &request.path, &request.path_bytes)?;
        let permit = WATCHES.try_acquire().map_err(|_| {
            let message = format!("this session has {MOST_WATCHES} watches of files already");
            refuse(Code::ResourceExhausted, "TOO_MANY_WATCHES", message)
        })?;
        let begin = move || Watch::begin(path, request.recursive);
        let watch = files::acting_as(user.clone(), begin).await?;
        let (to, answers) = mpsc::channel(IN_FLIGHT);
        tokio::spawn(async move {
            let _permit = permit;
            if let Err(status) = follow(watch, user, &to).await {
                // Nobody listens any more, or they hear why.
                let _ = to.send(Err(status)).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }
}

/// Sends changes until the reader or what is watched is gone.
async fn follow(
    mut watch: Watch,
    user: User,
    to: &mpsc::Sender<Result<FilesystemServiceWatchResponse, Status>>,
) -> Result<(), Status> {
    let blind = |error: io::Error| {
        let message = format!("what changes cannot be seen: {error}");
        refuse(Code::Internal, "INTERNAL", message)
    };
    let wakeups = watch.wakeups().map_err(blind)?;
    loop {
        let look;
        (watch, look) = files::acting_as(user.clone(), move || {
            let look = watch.look()?;
            Ok((watch, look))
        })
        .await?;
        let Look {
            changes,
            has_more,
            is_over,
        } = look;
        for change in changes {
            if to.send(Ok(change)).await.is_err() {
                return Ok(());
            }
        }
        if is_over {
            return Ok(());
        }
        if has_more {
            continue;
        }
        // Many writes to one file are then one change.
        tokio::time::sleep(GATHERING).await;
        tokio::select! {
            ready = wakeups.readable() => ready.map_err(blind)?.clear_ready(),
            () = to.closed() => return Ok(()),
        }
    }
}

fn to_hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .fold(String::new(), |text, byte| format!("{text}{byte:02x}"))
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let pairs = text.as_bytes().chunks(2);
    pairs
        .map(|pair| {
            u8::from_str_radix(
                std::str::from_utf8(pair)
                    .ok()
                    .filter(|pair| pair.len() == 2)?,
                16,
            )
            .ok()
        })
        .collect()
}
