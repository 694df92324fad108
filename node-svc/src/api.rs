//! `sandmesh.node.v1.NodeService`: conversion and nothing else.

use std::{
    collections::{HashMap, VecDeque},
    pin::Pin,
    sync::Arc,
};

use futures::{Stream, StreamExt as _, TryStreamExt as _, future, stream};
use proto::{
    node::v1::{
        DeleteSnapshotRequest, DeleteSnapshotResponse, DrainNodeRequest, DrainNodeResponse,
        ExportSessionRequest, ExportSessionResponse, ForkChild, ForkSessionRequest,
        ForkSessionResponse, GetSessionMetricsRequest, GetSessionMetricsResponse, HostedSession,
        ListSessionsRequest, ListSessionsResponse, MakeTemplateSnapshotRequest,
        MakeTemplateSnapshotResponse, PauseSessionRequest, PauseSessionResponse,
        ResumeSessionRequest, ResumeSessionResponse, RollbackSessionRequest,
        RollbackSessionResponse, SnapshotSessionRequest, SnapshotSessionResponse,
        StartSessionRequest, StartSessionResponse, StartStep, StopSessionRequest,
        StopSessionResponse, StreamSessionLogsRequest, StreamSessionLogsResponse,
        UpdateSessionRequest, UpdateSessionResponse, WaitForPortRequest, WaitForPortResponse,
        WatchSessionsRequest, WatchSessionsResponse, node_service_server::NodeService,
    },
    session::v1::{EndReason, Resources, SessionState},
};
use service_kit::{
    errors::{Failure, Reason, reason_of},
    ids::SessionId,
};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Code, Request, Response, Status};

use crate::{
    driver::{self, Command, DriveError, ForkImage, Origin, Outcome, Plan, Workshop},
    hosted::{Admitted, Hosted, Lookup, NodeFull, Phase, Session},
    logs::ReadError,
    ready,
    stored::StoredError,
    vmm::{VmmError, memory::MemoryError},
};

const LOGS_GONE: Reason = Reason::new("LOGS_GONE");
const LOG_SEQUENCE_UNKNOWN: Reason = Reason::new("LOG_SEQUENCE_UNKNOWN");
const NODE_DISK_FAILED: Reason = Reason::new("NODE_DISK_FAILED");
/// Pieces of a layer that wait for its reader.
const EXPORT_IN_FLIGHT: usize = 2;
const START_COMMAND_FAILED: &str = "START_COMMAND_FAILED";
/// Pieces of a start command's output that wait for their reader.
const START_OUTPUT_IN_FLIGHT: usize = 16;
/// Children of one fork.
const MOST_CHILDREN: usize = 100;

/// Serves this node.
#[derive(Debug)]
pub struct NodeApi {
    /// The sessions.
    pub hosted: Arc<Hosted>,
    /// What drivers work with.
    pub workshop: Arc<Workshop>,
    /// The drivers.
    pub drivers: TaskTracker,
    /// When this node-svc began.
    pub start_time: prost_types::Timestamp,
    /// Ends streams that have no end.
    pub shutdown: CancellationToken,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn session_id(text: &str) -> Result<SessionId, Status> {
    SessionId::parse(text)
        .map_err(|error| Failure::field_invalid("session_id", error.to_string()).into_status())
}

fn required(field: &'static str) -> impl Fn() -> Status {
    move || Failure::field_invalid(field, "is required").into_status()
}

/// A checkpoint's ID becomes the name of a folder.
fn checkpoint_id(text: String) -> Result<String, Status> {
    let is_good = (1..=64).contains(&text.len())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
    if is_good {
        Ok(text)
    } else {
        Err(Failure::field_invalid("checkpoint_id", "must be 1-64 characters [a-z0-9]").into())
    }
}

fn full(full: &NodeFull) -> Failure {
    Failure::new(Code::ResourceExhausted, Reason::NODE_FULL, full.to_string())
        .with("freeSessions", full.free_sessions)
        .with("freeMemoryBytes", full.free_memory)
}

fn not_here(id: &SessionId) -> Status {
    Failure::new(Code::NotFound, Reason::SESSION_UNKNOWN, "not on this node")
        .with("sessionId", id)
        .into_status()
}

fn ended_meanwhile(id: &SessionId) -> Status {
    let message = "the session ended meanwhile";
    Failure::new(Code::Aborted, Reason::SESSION_STOPPED, message)
        .with("sessionId", id)
        .into_status()
}

/// How a driver's no is told.
fn refused(id: &SessionId, error: &DriveError) -> Status {
    let code = match error {
        DriveError::Full(error) => return full(error).with("sessionId", id).into_status(),
        DriveError::State(_) | DriveError::EnvdTooOld(_) => Code::FailedPrecondition,
        DriveError::CheckpointUnknown(_) => Code::NotFound,
        // Another try is refused the same way, so not Aborted.
        DriveError::Stored(StoredError::Damaged(_) | StoredError::Incompatible { .. })
        | DriveError::Vmm(VmmError::Memory(MemoryError::Damaged(_)) | VmmError::Load(_)) => {
            Code::FailedPrecondition
        }
        _ if error.reason() == Reason::NODE_DISK_FULL => Code::ResourceExhausted,
        _ => Code::Aborted,
    };
    Failure::new(code, error.reason(), error.to_string())
        .with("sessionId", id)
        .into_status()
}

/// Why a template's snapshot is not there, to whoever asks for no session.
fn not_made(error: &DriveError) -> Status {
    let reason = error.reason();
    let code = match error {
        DriveError::Full(error) => return full(error).into_status(),
        _ if reason.as_str() == START_COMMAND_FAILED => Code::FailedPrecondition,
        _ if reason == Reason::NODE_DISK_FULL => Code::ResourceExhausted,
        _ => Code::Aborted,
    };
    Failure::new(code, reason, error.to_string()).into_status()
}

impl NodeApi {
    /// A stream that ends with this node-svc says so: its end alone would mean that there is no more.
    fn until_shutdown<T: Send + 'static>(
        &self,
        answers: impl Stream<Item = Result<T, Status>> + Send + 'static,
    ) -> Answers<T> {
        let shutdown = self.shutdown.clone();
        let last_word = stream::once(async move {
            let message = "the node's agent restarts; ask again";
            let stopped = Failure::unavailable(Reason::SERVICE_UNAVAILABLE, message);
            shutdown.is_cancelled().then(|| Err(stopped.into_status()))
        });
        let answers = answers.take_until(self.shutdown.clone().cancelled_owned());
        Box::pin(answers.chain(last_word.filter_map(future::ready)))
    }

    async fn stop(&self, id: &SessionId) {
        if let Lookup::Here(session) = self.hosted.lookup(id) {
            session.stop.cancel();
            session.ended().await;
        }
    }

    /// Has a session's driver do something, and waits for it.
    async fn ask<T>(
        &self,
        id: &SessionId,
        command: impl FnOnce(oneshot::Sender<Outcome<T>>) -> Command,
    ) -> Result<T, Status> {
        let Lookup::Here(session) = self.hosted.lookup(id) else {
            return Err(not_here(id));
        };
        match session.ask(command).await {
            Some(Ok(done)) => Ok(done),
            Some(Err(error)) => Err(refused(id, &error)),
            None => Err(ended_meanwhile(id)),
        }
    }

    /// Starts a session, or joins in its start, and waits until it runs.
    async fn begin(
        &self,
        request: StartSessionRequest,
        resources: Resources,
        origin: Origin,
    ) -> Result<Vec<StartStep>, Status> {
        let id = session_id(&request.session_id)?;
        let (session, commands) = Session::new(
            id.clone(),
            request.access_token_sha256.clone(),
            resources,
            driver::settings_of(&request),
        );
        let admitted = self
            .hosted
            .admit(session)
            .map_err(|error| full(&error).into_status())?;
        let mut steps = Vec::new();
        let session = match admitted {
            Admitted::Here(session) => session,
            Admitted::New(session) => {
                let plan = Plan {
                    request,
                    origin,
                    span: tracing::Span::current(),
                };
                self.workshop.logs.begin(&id);
                let (tell, told) = oneshot::channel();
                self.drivers.spawn(Arc::clone(&self.workshop).drive(
                    Arc::clone(&session),
                    commands,
                    plan,
                    tell,
                ));
                // An error means that it did not start; the phase says why.
                steps = told.await.unwrap_or_default();
                session
            }
        };
        let mut phase = session.phase();
        let settled = phase
            .wait_for(|phase| !matches!(phase, Phase::Starting | Phase::Stopping))
            .await;
        match settled.as_deref() {
            Ok(Phase::Ended(ended)) => {
                let reason = Reason::new(start_reason(&ended.reason));
                Err(Failure::new(Code::Aborted, reason, ended.message.clone())
                    .with("sessionId", &id)
                    .into())
            }
            Ok(_) => Ok(steps),
            Err(_) => Err(Failure::new(
                Code::Internal,
                Reason::INTERNAL,
                "the session's driver ended",
            )
            .into()),
        }
    }

    /// A child of a fork; what did not start is told as the registry wants to hear it.
    async fn start_child(
        &self,
        child: ForkChild,
        image: &Arc<ForkImage>,
    ) -> Result<(), HostedSession> {
        let session_id = child.session_id.clone();
        let request = StartSessionRequest {
            session_id: child.session_id,
            access_token_sha256: child.access_token_sha256,
            ..image.request().clone()
        };
        let resources = request.resources.unwrap_or_default();
        let started = self.begin(request, resources, Origin::Fork(Arc::clone(image)));
        started.await.map(drop).map_err(|status| HostedSession {
            session_id,
            state: SessionState::Failed.into(),
            end_reason: Some(EndReason {
                reason: reason_of(&status).unwrap_or_else(|| "START_FAILED".into()),
                message: status.message().to_owned(),
            }),
            resources: Some(resources),
            ..HostedSession::default()
        })
    }
}

/// The sessions as somebody was told of them.
struct Watch {
    changed: watch::Receiver<()>,
    hosted: Arc<Hosted>,
    told: Option<HashMap<SessionId, HostedSession>>,
    next: VecDeque<WatchSessionsResponse>,
}

impl Watch {
    async fn next(&mut self) -> Option<WatchSessionsResponse> {
        loop {
            if let Some(next) = self.next.pop_front() {
                return Some(next);
            }
            if self.told.is_some() {
                self.changed.changed().await.ok()?;
            } else {
                self.changed.mark_unchanged();
            }
            self.look();
        }
    }

    fn look(&mut self) {
        let is_first = self.told.is_none();
        let before = self.told.take().unwrap_or_default();
        let here = self.hosted.all().into_iter();
        let now: HashMap<_, _> = here
            .map(|session| (session.id.clone(), session.wire()))
            .collect();
        let gone = before.keys().filter(|id| !now.contains_key(id));
        let ended = gone.filter_map(|id| match self.hosted.lookup(id) {
            Lookup::Was(ended) => Some(ended.wire(id)),
            _ => None,
        });
        let changed = now
            .iter()
            .filter(|(id, session)| before.get(id) != Some(session));
        let changed = changed.map(|(_, session)| session.clone());
        let answers = ended.chain(changed).map(|session| WatchSessionsResponse {
            session: Some(session),
            listing_complete: false,
        });
        self.next.extend(answers);
        if is_first {
            self.next.push_back(WatchSessionsResponse {
                session: None,
                listing_complete: true,
            });
        }
        self.told = Some(now);
    }
}

#[tonic::async_trait]
impl NodeService for NodeApi {
    async fn start_session(
        &self,
        request: Request<StartSessionRequest>,
    ) -> Result<Response<StartSessionResponse>, Status> {
        let request = request.into_inner();
        if request.template.is_none() {
            return Err(required("template")());
        }
        let resources = request.resources.ok_or_else(required("resources"))?;
        if request.network.is_none() {
            return Err(required("network")());
        }
        if request.access_token_sha256.len() != 32 {
            return Err(Failure::field_invalid("access_token_sha256", "must be 32 bytes").into());
        }
        let steps = self.begin(request, resources, Origin::Template).await?;
        Ok(Response::new(StartSessionResponse { steps }))
    }

    type MakeTemplateSnapshotStream = Answers<MakeTemplateSnapshotResponse>;

    async fn make_template_snapshot(
        &self,
        request: Request<MakeTemplateSnapshotRequest>,
    ) -> Result<Response<Self::MakeTemplateSnapshotStream>, Status> {
        let request = request.into_inner();
        if request.template.is_none() {
            return Err(required("template")());
        }
        if request.resources.is_none() {
            return Err(required("resources")());
        }
        let (to, pieces) = mpsc::channel(START_OUTPUT_IN_FLIGHT);
        let (workshop, shutdown) = (Arc::clone(&self.workshop), self.shutdown.clone());
        self.drivers.spawn(async move {
            // What is cut off here is removed by the next node-svc.
            let made = tokio::select! {
                () = shutdown.cancelled() => return,
                // Whoever asked is gone; if nobody else waits, it is given up.
                () = to.closed() => return,
                made = workshop.make_snapshot(request, to.clone()) => made,
            };
            let last = match made {
                Ok(()) => Ok(MakeTemplateSnapshotResponse {
                    is_made: true,
                    ..MakeTemplateSnapshotResponse::default()
                }),
                Err(error) => {
                    tracing::warn!(%error, "a template's snapshot was not made");
                    Err(not_made(&error))
                }
            };
            // Nobody listens any more, or hears it.
            let _ = to.send(last).await;
        });
        let pieces = ReceiverStream::new(pieces);
        Ok(Response::new(self.until_shutdown(pieces)))
    }

    async fn pause_session(
        &self,
        request: Request<PauseSessionRequest>,
    ) -> Result<Response<PauseSessionResponse>, Status> {
        let id = session_id(&request.get_ref().session_id)?;
        self.ask(&id, Command::Pause).await.map(Response::new)
    }

    async fn resume_session(
        &self,
        request: Request<ResumeSessionRequest>,
    ) -> Result<Response<ResumeSessionResponse>, Status> {
        let id = session_id(&request.get_ref().session_id)?;
        self.ask(&id, Command::Resume).await.map(Response::new)
    }

    async fn fork_session(
        &self,
        request: Request<ForkSessionRequest>,
    ) -> Result<Response<ForkSessionResponse>, Status> {
        let request = request.into_inner();
        let id = session_id(&request.session_id)?;
        let children = request.children;
        if !(1..=MOST_CHILDREN).contains(&children.len()) {
            return Err(Failure::field_invalid("children", "must be 1-100").into());
        }
        for child in &children {
            SessionId::parse(&child.session_id).map_err(|error| {
                Failure::field_invalid("children.session_id", error.to_string()).into_status()
            })?;
            if child.access_token_sha256.len() != 32 {
                let field = "children.access_token_sha256";
                return Err(Failure::field_invalid(field, "must be 32 bytes").into());
            }
        }
        let (image, stood) = self.ask(&id, Command::Fork).await?;
        let started = futures::future::join_all(
            children
                .into_iter()
                .map(|child| self.start_child(child, &image)),
        );
        let failed = started.await.into_iter().filter_map(Result::err).collect();
        Ok(Response::new(ForkSessionResponse {
            parent_stop_time: prost_types::Duration::try_from(stood).ok(),
            failed,
        }))
    }

    async fn snapshot_session(
        &self,
        request: Request<SnapshotSessionRequest>,
    ) -> Result<Response<SnapshotSessionResponse>, Status> {
        let request = request.into_inner();
        let id = session_id(&request.session_id)?;
        let checkpoint = checkpoint_id(request.checkpoint_id)?;
        self.ask(&id, |reply| Command::Snapshot(checkpoint, reply))
            .await
            .map(Response::new)
    }

    type ExportSessionStream = Answers<ExportSessionResponse>;

    async fn export_session(
        &self,
        request: Request<ExportSessionRequest>,
    ) -> Result<Response<Self::ExportSessionStream>, Status> {
        let id = session_id(&request.get_ref().session_id)?;
        let Lookup::Here(session) = self.hosted.lookup(&id) else {
            return Err(not_here(&id));
        };
        let (to, pieces) = mpsc::channel(EXPORT_IN_FLIGHT);
        let last = to.clone();
        self.drivers.spawn(async move {
            let asked = session.ask(|reply| Command::Export(to, reply)).await;
            let failed = match asked {
                Some(Ok(())) => return,
                Some(Err(error)) => refused(&id, &error),
                None => ended_meanwhile(&id),
            };
            // Nobody listens any more, or the layer breaks off there.
            let _ = last.send(Err(failed)).await;
        });
        Ok(Response::new(
            self.until_shutdown(ReceiverStream::new(pieces)),
        ))
    }

    async fn rollback_session(
        &self,
        request: Request<RollbackSessionRequest>,
    ) -> Result<Response<RollbackSessionResponse>, Status> {
        let request = request.into_inner();
        let id = session_id(&request.session_id)?;
        let checkpoint = checkpoint_id(request.checkpoint_id)?;
        self.ask(&id, |reply| Command::Rollback(checkpoint, reply))
            .await?;
        Ok(Response::new(RollbackSessionResponse {}))
    }

    async fn delete_snapshot(
        &self,
        request: Request<DeleteSnapshotRequest>,
    ) -> Result<Response<DeleteSnapshotResponse>, Status> {
        let request = request.into_inner();
        let id = session_id(&request.session_id)?;
        let checkpoint = checkpoint_id(request.checkpoint_id)?;
        // A session's checkpoints go with it.
        if let Lookup::Here(_) = self.hosted.lookup(&id) {
            self.ask(&id, |reply| Command::DeleteSnapshot(checkpoint, reply))
                .await?;
        }
        Ok(Response::new(DeleteSnapshotResponse {}))
    }

    async fn get_session_metrics(
        &self,
        request: Request<GetSessionMetricsRequest>,
    ) -> Result<Response<GetSessionMetricsResponse>, Status> {
        let id = session_id(&request.get_ref().session_id)?;
        let metrics = self.ask(&id, Command::Metrics).await?;
        Ok(Response::new(GetSessionMetricsResponse {
            metrics: Some(*metrics),
        }))
    }

    async fn wait_for_port(
        &self,
        request: Request<WaitForPortRequest>,
    ) -> Result<Response<WaitForPortResponse>, Status> {
        let request = request.into_inner();
        let id = session_id(&request.session_id)?;
        let Some(ready) = request.ready else {
            return Err(Failure::field_invalid("ready", "is required").into());
        };
        let Lookup::Here(session) = self.hosted.lookup(&id) else {
            return Err(not_here(&id));
        };
        let Phase::Running(reach) = session.phase().borrow().clone() else {
            let message = "the session does not run";
            return Err(
                Failure::new(Code::FailedPrecondition, Reason::WRONG_STATE, message)
                    .with("sessionId", &id)
                    .into(),
            );
        };
        let waited = ready::wait_for_port(&reach, &ready).await;
        waited.map_err(|failure| failure.with("sessionId", &id))?;
        Ok(Response::new(WaitForPortResponse {}))
    }

    async fn update_session(
        &self,
        request: Request<UpdateSessionRequest>,
    ) -> Result<Response<UpdateSessionResponse>, Status> {
        let request = request.into_inner();
        let id = session_id(&request.session_id)?;
        self.ask(&id, |reply| Command::Update(Box::new(request), reply))
            .await?;
        Ok(Response::new(UpdateSessionResponse {}))
    }

    async fn stop_session(
        &self,
        request: Request<StopSessionRequest>,
    ) -> Result<Response<StopSessionResponse>, Status> {
        let id = session_id(&request.get_ref().session_id)?;
        self.stop(&id).await;
        Ok(Response::new(StopSessionResponse {}))
    }

    async fn list_sessions(
        &self,
        _: Request<ListSessionsRequest>,
    ) -> Result<Response<ListSessionsResponse>, Status> {
        Ok(Response::new(ListSessionsResponse {
            sessions: self.hosted.listing(),
            start_time: Some(self.start_time),
        }))
    }

    type WatchSessionsStream = Answers<WatchSessionsResponse>;

    async fn watch_sessions(
        &self,
        _: Request<WatchSessionsRequest>,
    ) -> Result<Response<Self::WatchSessionsStream>, Status> {
        let watch = Watch {
            changed: self.hosted.changed(),
            hosted: Arc::clone(&self.hosted),
            told: None,
            next: VecDeque::new(),
        };
        let answers = stream::unfold(watch, |mut watch| async move {
            watch.next().await.map(|answer| (Ok(answer), watch))
        });
        Ok(Response::new(self.until_shutdown(answers)))
    }

    type StreamSessionLogsStream = Answers<StreamSessionLogsResponse>;

    async fn stream_session_logs(
        &self,
        request: Request<StreamSessionLogsRequest>,
    ) -> Result<Response<Self::StreamSessionLogsStream>, Status> {
        let Some(request) = request.into_inner().request else {
            return Err(Failure::field_invalid("request", "is required").into());
        };
        let id = session_id(&request.session_id)?;
        let failed = move |error: &ReadError, id: &SessionId| {
            let failure = match error {
                ReadError::None => Failure::new(Code::NotFound, LOGS_GONE, error.to_string()),
                ReadError::NotYet { last, .. } => {
                    Failure::new(Code::OutOfRange, LOG_SEQUENCE_UNKNOWN, error.to_string())
                        .with("lastSequence", last)
                }
                ReadError::Io(_) => {
                    Failure::new(Code::Internal, NODE_DISK_FAILED, error.to_string())
                }
            };
            failure.with("sessionId", id).into_status()
        };
        let logs = &self.workshop.logs;
        let messages = logs.read(&id, request.after_sequence, request.follow).await;
        let messages = messages.map_err(|error| failed(&error, &id))?;
        let answers = messages
            .map_ok(|message| StreamSessionLogsResponse {
                message: Some(message),
            })
            .map_err(move |error| failed(&ReadError::Io(error), &id));
        Ok(Response::new(self.until_shutdown(answers)))
    }

    async fn drain_node(
        &self,
        request: Request<DrainNodeRequest>,
    ) -> Result<Response<DrainNodeResponse>, Status> {
        self.hosted.set_draining(request.get_ref().draining);
        Ok(Response::new(DrainNodeResponse {}))
    }
}

/// The words a start can end with; they are the only ones a caller will see as a reason.
fn start_reason(reason: &str) -> &'static str {
    const KNOWN: [&str; 14] = [
        START_COMMAND_FAILED,
        "ARTIFACT_UNAVAILABLE",
        "NETWORK_SLOT_FAILED",
        "NODE_DISK_FULL",
        "DISK_FAILED",
        "VMM_FAILED",
        "NODE_DISK_FAILED",
        "CONFIGURE_FAILED",
        "ENVD_TOO_OLD",
        "GUEST_NOT_READY",
        "SNAPSHOT_DAMAGED",
        "SNAPSHOT_INCOMPATIBLE",
        "START_TIMEOUT",
        "STOP_REQUESTED",
    ];
    KNOWN
        .into_iter()
        .find(|known| *known == reason)
        .unwrap_or("START_FAILED")
}
