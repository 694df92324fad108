//! The world a test lives in: an envd of its own, its users, and calls to it.
//!
//! envd is PID 1 of a PID namespace, as in a guest: it collects orphans, and whatever it started dies with it. In its mount
//! namespace /etc/passwd and /etc/group are those below, so that homes lie in the test's folder and nothing of the host is touched.

use std::{
    fs,
    future::Future,
    net::Shutdown,
    os::unix::fs::{PermissionsExt as _, chown},
    path::{Path, PathBuf},
    pin::Pin,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use http::{Request, Response, Uri};
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use proto::envd::v1::{
    AttachRequest, ConfigureRequest, GuestNetwork, OutputStream, ProcessExited, ProcessStarted,
    StartRequest, WaitRequest, filesystem_service_client::FilesystemServiceClient,
    port_service_client::PortServiceClient, process_event::Event, process_exited,
    process_service_client::ProcessServiceClient, system_service_client::SystemServiceClient,
};
use tempfile::TempDir;
use tokio::{net::UnixStream, task::JoinHandle, time::Instant};
use tonic::{Code, Status, body::Body};
use tonic_types::StatusExt as _;
use tower::Service;

pub(crate) const NOBODY: u32 = 65534;
/// `ada` is in the group `team`, which envd itself has as well, and nobody has not.
pub(crate) const ADA: u32 = 4201;
pub(crate) const TEAM: u32 = 4300;
pub(crate) const SESSION: &str = "aaaaabbbbbbbbbbbbbbbbbbbb";

/// Far beyond what anything here takes, also on a busy machine: a test fails rather than hangs.
const LIMIT: Duration = Duration::from_mins(1);

/// Waits for what must come.
pub(crate) async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, what)
        .await
        .expect("this should have come long ago")
}

/// Waits until something outside of envd's answers is so, such as the state of a file.
pub(crate) async fn until(mut so: impl FnMut() -> bool) {
    soon(async {
        while !so() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

pub(crate) struct World {
    folder: TempDir,
    envd: Child,
    guest: Guest,
    cgroup: Option<Cgroup>,
}

impl World {
    /// An envd that is a session's.
    pub(crate) async fn new() -> Self {
        Self::configured(configuration()).await
    }

    pub(crate) async fn configured(request: ConfigureRequest) -> Self {
        let world = Self::closed().await;
        soon(world.system().configure(request)).await.unwrap();
        world
    }

    /// An envd nobody has configured yet.
    pub(crate) async fn closed() -> Self {
        Self::with(None).await
    }

    /// The same, that can freeze what it starts.
    pub(crate) async fn freezable() -> Self {
        Self::with(Some(Cgroup::new())).await
    }

    async fn with(cgroup: Option<Cgroup>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        fs::set_permissions(root, fs::Permissions::from_mode(0o755)).unwrap();
        for (home, owner) in [("root", 0), ("ada", ADA)] {
            fs::create_dir(root.join(home)).unwrap();
            chown(root.join(home), Some(owner), Some(owner)).unwrap();
        }
        fs::create_dir(root.join("open")).unwrap();
        fs::set_permissions(root.join("open"), fs::Permissions::from_mode(0o777)).unwrap();
        let shown = root.display();
        let passwd = format!(
            "root:x:0:0:root:{shown}/root:/bin/sh\n\
             nobody:x:{NOBODY}:{NOBODY}:nobody:/nonexistent:/usr/sbin/nologin\n\
             ada:x:{ADA}:{ADA}::{shown}/ada:/bin/sh\n"
        );
        fs::write(root.join("passwd"), passwd).unwrap();
        let group = format!("root:x:0:\nteam:x:{TEAM}:ada\n");
        fs::write(root.join("group"), group).unwrap();
        // Descriptors a test runner leaves open are none of a guest's.
        let script = "for fd in /proc/self/fd/*; do fd=${fd##*/}; [ $fd -le 2 ] || eval \"exec $fd>&-\"; done; \
                      mount --bind \"$1/passwd\" /etc/passwd && mount --bind \"$1/group\" /etc/group \
                      && exec \"$0\" --serve \"$1/socket\" ${2:+\"$2\"}";
        // If the test dies, so does unshare; if unshare dies, so does envd; and with it, being its namespace's init, all it started.
        let envd = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--groups", &TEAM.to_string()])
            .args(["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"])
            .args(["bash", "-c", script, env!("CARGO_BIN_EXE_envd")])
            .arg(root)
            .args(cgroup.as_ref().map(|cgroup| &cgroup.0))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let guest = Guest::connect(&root.join("socket")).await;
        Self {
            folder,
            envd,
            guest,
            cgroup,
        }
    }

    /// A file of the cgroup its processes are in.
    pub(crate) fn cgroup(&self, below: &str) -> PathBuf {
        self.cgroup.as_ref().unwrap().0.join(below)
    }

    /// The connection is gone, and with it all its calls.
    pub(crate) async fn disconnect(&mut self) {
        self.guest.socket.shutdown(Shutdown::Both).unwrap();
        let _ = soon(&mut self.guest.connection).await;
    }

    /// The connection is gone, another takes its place.
    pub(crate) async fn reconnect(&mut self) {
        self.disconnect().await;
        self.guest = Guest::connect(&self.path("socket")).await;
    }

    /// The PID, outside of the namespace, of the daemon there is now.
    fn daemon(&self) -> Option<i32> {
        let child_of = |pid: i32| -> Option<i32> {
            let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
            // The keeper may have others, of a daemon before.
            let is_envd = |child: &i32| {
                let name = fs::read_to_string(format!("/proc/{child}/comm"));
                name.is_ok_and(|name| name == "envd\n")
            };
            let mut children = children.split(' ').flat_map(str::parse);
            children.find(is_envd)
        };
        // unshare, the keeper, its daemon.
        child_of(child_of(self.envd.id().cast_signed())?)
    }

    /// Kills the daemon; its calls break. Another takes its place.
    pub(crate) async fn crash(&mut self) {
        let before = self.daemon().unwrap();
        kill(Pid::from_raw(before), Signal::SIGKILL).unwrap();
        let _ = soon(&mut self.guest.connection).await;
        until(|| self.daemon().is_some_and(|daemon| daemon != before)).await;
        self.guest = Guest::connect(&self.path("socket")).await;
    }

    /// Kills the daemon, and the next ones, until the keeper gives up.
    pub(crate) async fn crash_for_good(&mut self) {
        until(|| {
            if let Some(daemon) = self.daemon() {
                // One that is gone already needs no signal.
                let _ = kill(Pid::from_raw(daemon), Signal::SIGKILL);
            }
            self.is_over()
        })
        .await;
    }

    /// Whether envd has ended.
    pub(crate) fn is_over(&mut self) -> bool {
        self.envd.try_wait().unwrap().is_some()
    }

    /// A path in the test's folder, where `open` is everybody's, `root` and `ada` are homes.
    pub(crate) fn path(&self, below: impl AsRef<Path>) -> PathBuf {
        self.folder.path().join(below)
    }

    pub(crate) fn text(&self, below: &str) -> String {
        self.path(below).to_str().unwrap().to_owned()
    }

    pub(crate) fn channel(&self) -> Http {
        Http(self.guest.sender.clone())
    }

    pub(crate) fn system(&self) -> SystemServiceClient<Http> {
        SystemServiceClient::with_origin(self.channel(), origin())
    }

    pub(crate) fn processes(&self) -> ProcessServiceClient<Http> {
        ProcessServiceClient::with_origin(self.channel(), origin())
    }

    pub(crate) fn files(&self) -> FilesystemServiceClient<Http> {
        FilesystemServiceClient::with_origin(self.channel(), origin())
    }

    pub(crate) fn ports(&self) -> PortServiceClient<Http> {
        PortServiceClient::with_origin(self.channel(), origin())
    }

    /// Starts a process that has to start.
    pub(crate) async fn start(&self, request: StartRequest) -> Events {
        self.try_start(request).await.unwrap()
    }

    pub(crate) async fn try_start(&self, request: StartRequest) -> Result<Events, Status> {
        let stream = soon(self.processes().start(request)).await?.into_inner();
        Events::open(Box::pin(stream.map(|answer| {
            answer.map(|answer| answer.event.unwrap().event.unwrap())
        })))
        .await
    }

    pub(crate) async fn attach(&self, request: AttachRequest) -> Result<Events, Status> {
        let stream = soon(self.processes().attach(request)).await?.into_inner();
        Events::open(Box::pin(stream.map(|answer| {
            answer.map(|answer| answer.event.unwrap().event.unwrap())
        })))
        .await
    }

    /// Runs a process to its end.
    pub(crate) async fn run(&self, request: StartRequest) -> Finished {
        self.start(request).await.finish().await
    }

    /// What a command prints, which has to succeed.
    pub(crate) async fn printed(&self, script: &str) -> String {
        let finished = self.run(sh(script)).await;
        assert_eq!(finished.code(), Some(0), "{script}: {finished:?}");
        String::from_utf8(finished.stdout).unwrap()
    }

    pub(crate) async fn wait(&self, id: &str) -> Result<ProcessExited, Status> {
        let process_id = id.to_owned();
        let answer = soon(self.processes().wait(WaitRequest { process_id })).await?;
        Ok(answer.into_inner().exited.unwrap())
    }
}

/// Counts the open files of the daemon.
pub(crate) const OPEN_FILES: &str = "ls /proc/$(cut -d' ' -f1 /proc/1/task/1/children)/fd | wc -l";

impl Drop for World {
    fn drop(&mut self) {
        let _ = self.envd.kill();
        let _ = self.envd.wait();
    }
}

/// A cgroup for one envd, in whatever cgroup v2 hierarchy this machine has.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let hierarchy = mounts
            .lines()
            .find_map(|mount| {
                let (place, kind) = mount.split_once(" - ")?;
                let is_v2 = kind.starts_with("cgroup2 ");
                is_v2.then(|| place.split(' ').nth(4)).flatten()
            })
            .expect("a cgroup v2 hierarchy");
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("envd-test-{}-{number}", std::process::id());
        let folder = Path::new(hierarchy).join(name);
        fs::create_dir(&folder).unwrap();
        Self(folder)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::write(self.0.join("cgroup.kill"), "1");
        let limit = std::time::Instant::now() + LIMIT;
        let mut folders = vec![self.0.clone()];
        let mut at = 0;
        while let Some(folder) = folders.get(at).cloned() {
            at += 1;
            folders.extend(
                fs::read_dir(folder)
                    .into_iter()
                    .flatten()
                    .filter_map(|entry| entry.ok().map(|entry| entry.path()))
                    .filter(|path| path.is_dir()),
            );
        }
        for folder in folders.into_iter().rev() {
            // What was killed takes a moment to be gone.
            while fs::remove_dir(&folder).is_err_and(|error| {
                error.kind() == std::io::ErrorKind::ResourceBusy
                    && std::time::Instant::now() < limit
            }) {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }
}

/// A whole and right request.
pub(crate) fn configuration() -> ConfigureRequest {
    ConfigureRequest {
        session_id: SESSION.into(),
        hostname: "sandbox-aaaaa".into(),
        entropy: vec![7; 64],
        time: Some(prost_types::Timestamp {
            seconds: 1_700_000_000,
            nanos: 0,
        }),
        network: Some(GuestNetwork {
            address: "169.254.100.2/30".into(),
            gateway: "169.254.100.1".into(),
            nameservers: vec!["169.254.100.1".into()],
        }),
        machine_id: vec![9; 16],
        ..ConfigureRequest::default()
    }
}

pub(crate) fn sh(script: &str) -> StartRequest {
    StartRequest {
        shell_command: script.into(),
        ..StartRequest::default()
    }
}

pub(crate) fn argv(words: &[&str]) -> StartRequest {
    StartRequest {
        argv: words.iter().map(|word| (*word).to_owned()).collect(),
        ..StartRequest::default()
    }
}

/// Code and stable word of a refusal, which every refusal has.
pub(crate) fn why(status: &Status) -> (Code, String) {
    let details = status.get_error_details();
    let info = details
        .error_info()
        .unwrap_or_else(|| panic!("no reason in {status:?}"));
    assert_eq!(info.domain, "sandmesh.dev");
    (status.code(), info.reason.clone())
}

/// The field a bad request is about.
pub(crate) fn field(status: &Status) -> String {
    assert_eq!(
        why(status),
        (Code::InvalidArgument, "INVALID_ARGUMENT".into())
    );
    let details = status.get_error_details();
    details.bad_request().unwrap().field_violations[0]
        .field
        .clone()
}

type Boxed = Pin<Box<dyn Stream<Item = Result<Event, Status>> + Send>>;

/// What is streamed of a process, after its start.
pub(crate) struct Events {
    pub(crate) started: ProcessStarted,
    stream: Boxed,
    finished: Finished,
}

/// All that was streamed.
#[derive(Debug, Default, Clone, PartialEq)]
pub(crate) struct Finished {
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    /// Where the next byte of each belongs, once one came.
    next: [Option<u64>; 2],
    exited: Option<ProcessExited>,
}

impl Events {
    async fn open(mut stream: Boxed) -> Result<Self, Status> {
        let first = soon(stream.next()).await.expect("an event");
        let Event::Started(started) = first? else {
            panic!("the first event is the start");
        };
        Ok(Self {
            started,
            stream,
            finished: Finished::default(),
        })
    }

    pub(crate) fn id(&self) -> &str {
        &self.started.process_id
    }

    /// What came so far.
    pub(crate) fn seen(&self) -> &Finished {
        &self.finished
    }

    /// Takes one event; false at the end.
    pub(crate) async fn step(&mut self) -> Result<bool, Status> {
        let Some(event) = soon(self.stream.next()).await else {
            return Ok(false);
        };
        assert!(self.finished.exited.is_none(), "nothing follows the exit");
        match event? {
            Event::Started(_) => panic!("a process starts once"),
            Event::Exited(exited) => self.finished.exited = Some(exited),
            Event::Output(output) => {
                let (which, bytes) = match output.stream() {
                    OutputStream::Stdout | OutputStream::Terminal => (0, &mut self.finished.stdout),
                    OutputStream::Stderr => (1, &mut self.finished.stderr),
                    other @ OutputStream::Unspecified => panic!("{other:?}"),
                };
                let next = &mut self.finished.next[which];
                assert_eq!(
                    next.unwrap_or(output.offset),
                    output.offset,
                    "no hole, no repeat"
                );
                *next = Some(output.offset + output.data.len() as u64);
                bytes.extend_from_slice(&output.data);
            }
        }
        Ok(true)
    }

    /// Reads until that much was written to stdout.
    pub(crate) async fn read(&mut self, count: usize) -> &[u8] {
        while self.finished.stdout.len() < count {
            assert!(self.step().await.unwrap(), "the process ended early");
        }
        &self.finished.stdout
    }

    /// Reads until the exit.
    pub(crate) async fn finish(mut self) -> Finished {
        while self.step().await.unwrap() {}
        assert!(self.finished.exited.is_some(), "the last event is the exit");
        self.finished
    }
}

impl Finished {
    pub(crate) fn exited(&self) -> ProcessExited {
        self.exited.clone().unwrap()
    }

    pub(crate) fn code(&self) -> Option<i32> {
        code(&self.exited())
    }

    pub(crate) fn signal(&self) -> Option<i32> {
        match self.exited().status {
            Some(process_exited::Status::Signal(signal)) => Some(signal),
            _ => None,
        }
    }
}

pub(crate) fn code(exited: &ProcessExited) -> Option<i32> {
    match exited.status {
        Some(process_exited::Status::Code(code)) => Some(code),
        _ => None,
    }
}

/// One epoch of the guest link.
struct Guest {
    /// The socket below, to cut it: hyper itself ends a connection only when its last call has ended.
    socket: std::os::unix::net::UnixStream,
    sender: SendRequest<Body>,
    connection: JoinHandle<()>,
}

impl Guest {
    async fn connect(socket: &Path) -> Self {
        let stream = soon(async {
            loop {
                match UnixStream::connect(socket).await {
                    Ok(stream) => return stream,
                    // It has not bound it yet.
                    Err(_) => tokio::time::sleep(Duration::from_millis(2)).await,
                }
            }
        })
        .await
        .into_std()
        .unwrap();
        let socket = stream.try_clone().unwrap();
        let stream = UnixStream::from_std(stream).unwrap();
        let link = guest_link::host::connect(stream, Instant::now() + LIMIT)
            .await
            .unwrap();
        let (sender, connection) = Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .handshake(TokioIo::new(link))
            .await
            .unwrap();
        let connection = tokio::spawn(async move {
            let _ = connection.await;
        });
        Self {
            socket,
            sender,
            connection,
        }
    }
}

pub(crate) fn origin() -> Uri {
    Uri::from_static("http://guest")
}

/// An HTTP/2 connection as tonic wants it.
#[derive(Debug, Clone)]
pub(crate) struct Http(SendRequest<Body>);

impl Service<Request<Body>> for Http {
    type Response = Response<Body>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, hyper::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), hyper::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let answer = self.0.send_request(request);
        Box::pin(async move { Ok(answer.await?.map(Body::new)) })
    }
}

/// Bytes without a pattern that a shift by any small number would leave as they are.
pub(crate) fn noise(count: usize) -> Bytes {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(count + 8);
    while bytes.len() < count {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(count);
    bytes.into()
}
