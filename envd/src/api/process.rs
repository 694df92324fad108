//! `sandmesh.envd.v1.ProcessService`.

use std::sync::Arc;

use proto::envd::v1::{
    AttachRequest, AttachResponse, CloseInputRequest, CloseInputResponse, OutputStream,
    ProcessEvent, ProcessOutput, ProcessServiceListRequest, ProcessServiceListResponse,
    ProcessStarted, ResizeRequest, ResizeResponse, SendInputRequest, SendInputResponse,
    SignalRequest, SignalResponse, SignalTarget, StartRequest, StartResponse, WaitRequest,
    WaitResponse, process_event::Event, process_service_server::ProcessService,
};
use tokio::sync::mpsc;
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tonic::{Code, Request, Response, Status};

use super::Answers;
use crate::{
    errors::{invalid, refuse},
    output::{Found, TooLate},
    process::{Places, Process, Processes},
};

const IN_FLIGHT: usize = 4;
const LARGEST_INPUT: usize = 1 << 20;
const PAGE: usize = 1000;

pub(crate) struct Api {
    pub(crate) processes: Processes,
}

/// Where a reader stands in both streams.
struct Reader {
    places: Places,
    stdout: u64,
    stderr: u64,
    /// What its stdout is.
    first: OutputStream,
}

fn too_late(late: TooLate, stream: &str) -> Status {
    refuse(
        Code::OutOfRange,
        "OUTPUT_GONE",
        format!("{stream} is kept from offset {} on", late.earliest),
    )
}

impl Reader {
    /// Streams events until the exit, or until nobody listens.
    fn stream(self) -> impl futures::Stream<Item = Result<ProcessEvent, Status>> + Send {
        let (to, events) = mpsc::channel(IN_FLIGHT);
        tokio::spawn(async move {
            let gone = to.clone();
            tokio::select! {
                () = self.run(&to) => {}
                () = gone.closed() => {}
            }
        });
        ReceiverStream::new(events)
    }

    async fn run(mut self, to: &mpsc::Sender<Result<ProcessEvent, Status>>) {
        let process = Arc::clone(&self.places.process);
        let started = ProcessStarted {
            process_id: process.id.clone(),
            pid: process.pid.unsigned_abs(),
            start_time: Some(process.started.into()),
        };
        let mut sent = to.send(Ok(event(Event::Started(started)))).await.is_ok();
        let mut exit = process.exit();
        while sent {
            // Registered before looking, so that nothing written in between is missed.
            let (more_out, more_err) = (process.stdout.growth(), process.stderr.growth());
            let exited = exit.borrow_and_update().clone();
            let out = self.look(self.first, &process);
            let err = self.look(OutputStream::Stderr, &process);
            match (out, err, exited) {
                (Err(status), _, _) | (_, Err(status), _) => {
                    // The stream ends with it either way.
                    let _ = to.send(Err(status)).await;
                    return;
                }
                (Ok(None), Ok(None), Some(exited)) => {
                    let _ = to.send(Ok(event(Event::Exited(exited)))).await;
                    return;
                }
                (Ok(None), Ok(None), None) => {
                    tokio::select! {
                        () = more_out => {}
                        () = more_err => {}
                        _ = exit.changed() => {}
                    }
                }
                (Ok(out), Ok(err), _) => {
                    for output in [out, err].into_iter().flatten() {
                        let (stream, end) =
                            (output.stream(), output.offset + output.data.len() as u64);
                        sent = sent && to.send(Ok(event(Event::Output(output)))).await.is_ok();
                        self.advance(stream, end);
                    }
                }
            }
        }
    }

    fn look(
        &self,
        stream: OutputStream,
        process: &Process,
    ) -> Result<Option<ProcessOutput>, Status> {
        let (offset, output, name) = match stream {
            OutputStream::Stderr => (self.stderr, &process.stderr, "stderr"),
            _ => (self.stdout, &process.stdout, "stdout"),
        };
        match output.read(offset).map_err(|late| too_late(late, name))? {
            Found::Bytes(data, time) => Ok(Some(ProcessOutput {
                stream: stream.into(),
                offset,
                data,
                time: time.map(Into::into),
            })),
            Found::Nothing | Found::End => Ok(None),
        }
    }

    fn advance(&mut self, stream: OutputStream, to: u64) {
        let is_stderr = stream == OutputStream::Stderr;
        *(if is_stderr {
            &mut self.stderr
        } else {
            &mut self.stdout
        }) = to;
        self.places.advance(is_stderr, to);
    }
}

impl Reader {
    fn new(places: Places, stdout: u64, stderr: u64) -> Self {
        let first = if places.process.has_terminal() {
            OutputStream::Terminal
        } else {
            OutputStream::Stdout
        };
        Self {
            places,
            stdout,
            stderr,
            first,
        }
    }
}

fn event(event: Event) -> ProcessEvent {
    ProcessEvent { event: Some(event) }
}

#[tonic::async_trait]
impl ProcessService for Api {
    type StartStream = Answers<StartResponse>;

    async fn start(
        &self,
        request: Request<StartRequest>,
    ) -> Result<Response<Self::StartStream>, Status> {
        let reader = Reader::new(self.processes.start(request.into_inner())?, 0, 0);
        let events = reader
            .stream()
            .map(|event| event.map(|event| StartResponse { event: Some(event) }));
        Ok(Response::new(Box::pin(events)))
    }

    type AttachStream = Answers<AttachResponse>;

    async fn attach(
        &self,
        request: Request<AttachRequest>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let request = request.into_inner();
        let process = self.processes.get(&request.process_id)?;
        let (stdout, stderr) = if request.from_now {
            (process.stdout.end(), process.stderr.end())
        } else {
            (request.stdout_offset, request.stderr_offset)
        };
        for (output, offset, name) in [
            (&process.stdout, stdout, "stdout"),
            (&process.stderr, stderr, "stderr"),
        ] {
            output.read(offset).map_err(|late| too_late(late, name))?;
        }
        let reader = Reader::new(Places::enter(process, stdout, stderr), stdout, stderr);
        let events = reader
            .stream()
            .map(|event| event.map(|event| AttachResponse { event: Some(event) }));
        Ok(Response::new(Box::pin(events)))
    }

    async fn send_input(
        &self,
        request: Request<SendInputRequest>,
    ) -> Result<Response<SendInputResponse>, Status> {
        let request = request.into_inner();
        if request.data.len() > LARGEST_INPUT {
            return Err(invalid("data", "must be at most 1 MiB"));
        }
        let process = self.processes.get(&request.process_id)?;
        let next_offset = process.send_input(request.data, request.offset).await?;
        Ok(Response::new(SendInputResponse { next_offset }))
    }

    async fn close_input(
        &self,
        request: Request<CloseInputRequest>,
    ) -> Result<Response<CloseInputResponse>, Status> {
        self.processes
            .get(&request.get_ref().process_id)?
            .close_input()
            .await?;
        Ok(Response::new(CloseInputResponse {}))
    }

    async fn resize(
        &self,
        request: Request<ResizeRequest>,
    ) -> Result<Response<ResizeResponse>, Status> {
        let request = request.into_inner();
        let size = request.size.ok_or_else(|| invalid("size", "is required"))?;
        self.processes.get(&request.process_id)?.resize(size)?;
        Ok(Response::new(ResizeResponse {}))
    }

    async fn signal(
        &self,
        request: Request<SignalRequest>,
    ) -> Result<Response<SignalResponse>, Status> {
        let request = request.into_inner();
        let target = SignalTarget::try_from(request.target)
            .map_err(|_| invalid("target", "is none of the known ones"))?;
        self.processes
            .get(&request.process_id)?
            .signal(request.signal, target)?;
        Ok(Response::new(SignalResponse {}))
    }

    async fn list(
        &self,
        request: Request<ProcessServiceListRequest>,
    ) -> Result<Response<ProcessServiceListResponse>, Status> {
        let request = request.into_inner();
        let size = match usize::try_from(request.page_size).unwrap_or(PAGE) {
            0 => PAGE,
            size => size.min(PAGE),
        };
        // The token is the number of the last process of the page before: those may end in between.
        let after = match request.page_token.as_str() {
            "" => 0,
            token => token
                .parse()
                .map_err(|_| invalid("page_token", "is not one this service gave out"))?,
        };
        let (processes, more) = self.processes.list(request.include_finished, after, size);
        let next_page_token = more.map(|last| last.to_string()).unwrap_or_default();
        Ok(Response::new(ProcessServiceListResponse {
            processes,
            next_page_token,
        }))
    }

    async fn wait(&self, request: Request<WaitRequest>) -> Result<Response<WaitResponse>, Status> {
        let process = self.processes.get(&request.get_ref().process_id)?;
        let mut exit = process.exit();
        let exited = exit
            .wait_for(Option::is_some)
            .await
            .map(|exited| exited.clone());
        let exited = exited.map_err(|_| {
            refuse(
                Code::Internal,
                "INTERNAL",
                "the process is not watched any more",
            )
        })?;
        Ok(Response::new(WaitResponse { exited }))
    }
}
