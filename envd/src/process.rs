//! Processes: started once per ID, their output kept, their end remembered.

use std::{
    collections::{BTreeMap, HashMap, VecDeque, hash_map::Entry},
    io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use nix::{
    sys::signal::{Signal, kill, killpg},
    unistd::Pid,
};
use proto::envd::v1::{ProcessExited, ProcessInfo, StartRequest, StdinMode, process_exited};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::unix::pipe,
    sync::{Mutex as AsyncMutex, Notify, watch},
};
use tonic::{Code, Status};

use crate::{
    errors::{invalid, refuse},
    files,
    gate::Gate,
    identity::{self, Guest},
    output::Output,
    spawn::{self, Ended, Plan},
    users::{self, User},
};

const READ_CHUNK: usize = 64 << 10;
/// How long output may stay open after the process has ended, because a grandchild holds it.
const HELD_OPEN: Duration = Duration::from_secs(1);
/// Between SIGTERM and SIGKILL when a deadline has passed.
const GRACE: Duration = Duration::from_secs(5);
const REMEMBERED: usize = 1024;
const REMEMBERED_FOR: Duration = Duration::from_hours(1);
/// Bytes of output kept of all finished processes; beyond that the oldest lose theirs, though not how they ended.
const KEPT_OF_FINISHED: u64 = 32 << 20;
const LARGEST_ARGV: usize = 1 << 20;

/// All processes of the guest. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Processes {
    guest: Arc<Guest>,
    table: Arc<Mutex<Table>>,
}

#[derive(Debug, Default)]
struct Table {
    by_id: BTreeMap<String, Arc<Process>>,
    by_pid: HashMap<i32, Arc<Process>>,
    finished: Finished,
    next: u64,
}

/// Those that have ended, oldest first.
#[derive(Debug, Default)]
struct Finished {
    queue: VecDeque<(Instant, Arc<Process>, u64)>,
    /// How many have let go of their output already: the oldest.
    bare: usize,
    /// Bytes of output the others keep.
    kept: u64,
}

impl Finished {
    fn add(&mut self, process: Arc<Process>) {
        let kept = process.stdout.kept() + process.stderr.kept();
        self.kept += kept;
        self.queue.push_back((Instant::now(), process, kept));
        while self.kept > KEPT_OF_FINISHED
            && let Some((_, process, kept)) = self.queue.get(self.bare)
        {
            process.stdout.let_go();
            process.stderr.let_go();
            self.kept -= kept;
            self.bare += 1;
        }
    }

    /// The oldest, if it has been remembered long enough.
    fn forget(&mut self) -> Option<Arc<Process>> {
        let (ended, _, _) = self.queue.front()?;
        if self.queue.len() <= REMEMBERED && ended.elapsed() < REMEMBERED_FOR {
            return None;
        }
        let (_, process, kept) = self.queue.pop_front()?;
        if self.bare > 0 {
            self.bare -= 1;
        } else {
            self.kept -= kept;
        }
        Some(process)
    }
}

impl Table {
    /// An ID no client has chosen.
    fn new_id(&mut self) -> String {
        loop {
            self.next += 1;
            let id = format!("p{}", self.next);
            if !self.by_id.contains_key(&id) {
                return id;
            }
        }
    }
}

/// One process.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) id: String,
    pub(crate) pid: i32,
    pub(crate) started: SystemTime,
    pub(crate) stdout: Arc<Output>,
    pub(crate) stderr: Arc<Output>,
    began: Instant,
    request: StartRequest,
    user: String,
    cwd: PathBuf,
    number: u64,
    /// How it ended, as the kernel said.
    ended: watch::Sender<Option<(Ended, SystemTime)>>,
    /// How it ended, told once the last byte is in.
    exited: watch::Sender<Option<ProcessExited>>,
    deadline_passed: watch::Sender<bool>,
    stdin: AsyncMutex<Input>,
}

#[derive(Debug, Default)]
struct Input {
    pipe: Option<pipe::Sender>,
    offset: u64,
}

/// The table, held so that no child is collected before it is known.
pub(crate) struct Held<'a>(MutexGuard<'a, Table>);

impl Held<'_> {
    /// Notes how a child ended; one that is nobody's was an orphan.
    pub(crate) fn note_end(&self, ended: Ended) {
        if let Some(process) = self.0.by_pid.get(&ended.pid) {
            process.ended.send_replace(Some((ended, SystemTime::now())));
        }
    }
}

fn unknown(id: &str) -> Status {
    refuse(
        Code::NotFound,
        "PROCESS_UNKNOWN",
        format!("no process {id}"),
    )
}

impl Processes {
    pub(crate) fn new(guest: Arc<Guest>) -> Self {
        Self {
            guest,
            table: Arc::default(),
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn hold(&self) -> Held<'_> {
        Held(self.table())
    }

    pub(crate) fn get(&self, id: &str) -> Result<Arc<Process>, Status> {
        self.table()
            .by_id
            .get(id)
            .cloned()
            .ok_or_else(|| unknown(id))
    }

    /// Starts a process; the same ID with the same request is the process there is. The flag says whether it is new.
    pub(crate) fn start(&self, mut request: StartRequest) -> Result<(Arc<Process>, bool), Status> {
        check(&request)?;
        let user = self.guest.user(&request.user).ok_or_else(|| {
            refuse(
                Code::NotFound,
                "USER_UNKNOWN",
                format!("no user {}", request.user),
            )
        })?;
        let cwd = users::expand(&user, &request.cwd).ok_or_else(|| {
            refuse(
                Code::NotFound,
                "USER_UNKNOWN",
                format!("{}: no such user", request.cwd),
            )
        })?;
        let env = self.environment(&user, &cwd, &request);
        let arguments = arguments(&user, &request);
        let (name, rest) = arguments
            .split_first()
            .ok_or_else(|| invalid("argv", "must not be empty"))?;
        let mut table = self.table();
        // Asked again with the table held: a process started after a snapshot's preparation has held it would never run.
        self.guest.gate.admit()?;
        if request.process_id.is_empty() {
            request.process_id = table.new_id();
        }
        if let Some(there) = table.by_id.get(&request.process_id) {
            return if there.request == request {
                Ok((Arc::clone(there), false))
            } else {
                Err(refuse(
                    Code::AlreadyExists,
                    "PROCESS_EXISTS",
                    format!(
                        "process {} was started with another request",
                        request.process_id
                    ),
                ))
            };
        }
        if !cwd.is_dir() {
            return Err(refuse(
                Code::NotFound,
                "CWD_NOT_FOUND",
                format!("{} is not a directory", cwd.display()),
            ));
        }
        let program = look_up(name, &env, &cwd)?;
        let cgroup = self.guest.cgroup().map_err(|error| {
            refuse(
                Code::Internal,
                "START_FAILED",
                format!("the cgroup of users' processes: {error}"),
            )
        })?;
        let plan = Plan {
            program: &program,
            name,
            arguments: rest,
            cwd: &cwd,
            env: &env,
            user: &user,
            stdin: request.stdin() == StdinMode::Pipe,
            cgroup,
        };
        let mut child =
            spawn::spawn(plan).map_err(|error| spawn_error(name, &user, &cwd, &error))?;
        let pid = i32::try_from(child.id()).unwrap_or_default();
        table.next += 1;
        let stdin = child
            .stdin
            .take()
            .and_then(|stdin| pipe::Sender::from_owned_fd(stdin.into()).ok());
        let process = Arc::new(Process {
            id: request.process_id.clone(),
            pid,
            started: SystemTime::now(),
            stdout: Arc::default(),
            stderr: Arc::default(),
            began: Instant::now(),
            user: user.name.clone(),
            cwd,
            number: table.next,
            ended: watch::Sender::new(None),
            exited: watch::Sender::new(None),
            deadline_passed: watch::Sender::new(false),
            stdin: AsyncMutex::new(Input {
                pipe: stdin,
                offset: 0,
            }),
            request,
        });
        table.by_id.insert(process.id.clone(), Arc::clone(&process));
        table.by_pid.insert(pid, Arc::clone(&process));
        drop(table);
        // Before the first byte is read: the caller is the reader that is waited for.
        process.stdout.set_primary(Some(0));
        process.stderr.set_primary(Some(0));
        let stdout = child
            .stdout
            .take()
            .and_then(|pipe| pipe::Receiver::from_owned_fd(pipe.into()).ok());
        let stderr = child
            .stderr
            .take()
            .and_then(|pipe| pipe::Receiver::from_owned_fd(pipe.into()).ok());
        tokio::spawn(supervise(
            self.clone(),
            Arc::clone(&process),
            stdout,
            stderr,
        ));
        Ok((process, true))
    }

    fn environment(
        &self,
        user: &User,
        cwd: &Path,
        request: &StartRequest,
    ) -> Vec<(String, String)> {
        let path = if user.uid == 0 {
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        } else {
            "/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games"
        };
        let home = user.home.to_string_lossy().into_owned();
        let mut env: BTreeMap<String, String> = [
            ("HOME", home.as_str()),
            ("USER", &user.name),
            ("LOGNAME", &user.name),
            ("SHELL", &user.shell),
            ("PATH", path),
            ("LANG", "C.UTF-8"),
            ("PWD", &cwd.to_string_lossy()),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
        env.extend(self.guest.env());
        env.extend(request.env.clone());
        env.into_iter().collect()
    }

    /// Up to `size` processes started after the one with that number, oldest first; and the last one's number if there are more.
    pub(crate) fn list(
        &self,
        include_finished: bool,
        after: u64,
        size: usize,
    ) -> (Vec<ProcessInfo>, Option<u64>) {
        let mut processes: Vec<Arc<Process>> = self.table().by_id.values().cloned().collect();
        processes.retain(|process| {
            process.number > after && (include_finished || process.exited.borrow().is_none())
        });
        processes.sort_by_key(|process| process.number);
        let more = processes.len() > size;
        processes.truncate(size);
        let last = processes.last().map(|process| process.number);
        let infos = processes.iter().map(|process| process.info()).collect();
        (infos, last.filter(|_| more))
    }

    /// Forgets the PID, and the oldest of those that have ended.
    fn retire(&self, process: &Arc<Process>) {
        let mut table = self.table();
        // Since it was collected, its PID may have become another's.
        if let Entry::Occupied(there) = table.by_pid.entry(process.pid)
            && Arc::ptr_eq(there.get(), process)
        {
            there.remove();
        }
        table.finished.add(Arc::clone(process));
        while let Some(forgotten) = table.finished.forget() {
            table.by_id.remove(&forgotten.id);
        }
    }

    /// Signals every process there is.
    pub(crate) fn signal_all(&self, signal: Signal) {
        for process in self.table().by_pid.values() {
            // One that has just ended is no error.
            let _ = killpg(Pid::from_raw(process.pid), signal);
        }
    }

    pub(crate) fn running(&self) -> usize {
        self.table().by_pid.len()
    }
}

impl Process {
    fn info(&self) -> ProcessInfo {
        ProcessInfo {
            process_id: self.id.clone(),
            pid: self.pid.unsigned_abs(),
            argv: if self.request.argv.is_empty() {
                vec![self.request.shell_command.clone()]
            } else {
                self.request.argv.clone()
            },
            cwd: self.cwd.to_string_lossy().into_owned(),
            user: self.user.clone(),
            start_time: Some(self.started.into()),
            exited: *self.exited.borrow(),
        }
    }

    /// How it ended, once the last byte of its output is in.
    pub(crate) fn exit(&self) -> watch::Receiver<Option<ProcessExited>> {
        self.exited.subscribe()
    }

    fn over(&self) -> bool {
        self.ended.borrow().is_some()
    }

    /// Writes to stdin; bytes that were written before are passed over.
    pub(crate) async fn send_input(&self, data: Bytes, offset: Option<u64>) -> Result<u64, Status> {
        let mut input = self.stdin.lock().await;
        let at = offset.unwrap_or(input.offset);
        if at > input.offset {
            return Err(refuse(
                Code::OutOfRange,
                "INPUT_GAP",
                format!(
                    "offset {at} leaves a gap; {} bytes were received",
                    input.offset
                ),
            ));
        }
        let known = usize::try_from(input.offset - at).unwrap_or(usize::MAX);
        let fresh = data.get(known..).unwrap_or_default();
        let mut ended = self.ended.subscribe();
        let mut written = 0;
        while written < fresh.len() {
            let Some(pipe) = input.pipe.as_mut() else {
                return Err(input_closed());
            };
            let rest = fresh.get(written..).unwrap_or_default();
            let count = tokio::select! {
                count = pipe.write(rest) => count,
                _ = ended.wait_for(Option::is_some) => Err(io::ErrorKind::BrokenPipe.into()),
            };
            match count {
                Ok(count) => {
                    written += count;
                    input.offset += count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                    input.pipe = None;
                    return Err(input_closed());
                }
                Err(error) => return Err(refuse(Code::Unknown, "IO_ERROR", error.to_string())),
            }
        }
        Ok(input.offset)
    }

    pub(crate) async fn close_input(&self) {
        self.stdin.lock().await.pipe = None;
    }

    pub(crate) fn signal(&self, number: i32, group: bool) -> Result<(), Status> {
        let signal = Signal::try_from(number)
            .map_err(|_| invalid("signal", "must be a signal number, 1-31"))?;
        // Until it is collected its PID is its own; after that it may be anybody's.
        if self.over() {
            return Err(refuse(
                Code::FailedPrecondition,
                "PROCESS_ENDED",
                "the process has ended",
            ));
        }
        let pid = Pid::from_raw(self.pid);
        let sent = if group {
            killpg(pid, signal)
        } else {
            kill(pid, signal)
        };
        sent.map_err(|error| refuse(Code::FailedPrecondition, "PROCESS_ENDED", error.to_string()))
    }
}

fn input_closed() -> Status {
    refuse(
        Code::FailedPrecondition,
        "INPUT_CLOSED",
        "the process does not read its stdin any more",
    )
}

fn check(request: &StartRequest) -> Result<(), Status> {
    let id = &request.process_id;
    if id.len() > 128
        || !id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
    {
        return Err(invalid(
            "process_id",
            "must be at most 128 characters [A-Za-z0-9._-]",
        ));
    }
    if request.argv.is_empty() == request.shell_command.is_empty() {
        return Err(invalid("argv", "give either argv or shell_command"));
    }
    if request.argv.first().is_some_and(String::is_empty) {
        return Err(invalid("argv", "the program's name must not be empty"));
    }
    let nul = |text: &String| text.contains('\0');
    if request.argv.iter().any(nul) || nul(&request.shell_command) {
        return Err(invalid("argv", "must not hold NUL"));
    }
    if request.argv.iter().map(String::len).sum::<usize>() + request.shell_command.len()
        > LARGEST_ARGV
    {
        return Err(invalid("argv", "must be at most 1 MiB in all"));
    }
    if nul(&request.cwd) || request.cwd.len() > 4096 {
        return Err(invalid("cwd", "must be at most 4096 bytes without NUL"));
    }
    if let Some(problem) = identity::problem_of_env(&request.env) {
        return Err(invalid("env", problem));
    }
    if request.terminal.is_some() {
        return Err(crate::errors::not_yet("a terminal"));
    }
    if request
        .deadline
        .is_some_and(|deadline| Duration::try_from(deadline).is_err())
    {
        return Err(invalid("deadline", "must not be negative"));
    }
    Ok(())
}

fn arguments(user: &User, request: &StartRequest) -> Vec<String> {
    if request.shell_command.is_empty() {
        request.argv.clone()
    } else {
        vec![
            user.shell.clone(),
            "-c".into(),
            request.shell_command.clone(),
        ]
    }
}

/// As a shell finds a program: a name with a slash is a path, any other is looked for in PATH.
fn look_up(name: &str, env: &[(String, String)], cwd: &Path) -> Result<PathBuf, Status> {
    let mut found_unusable = false;
    let mut usable = |path: &Path| {
        let Ok(metadata) = path.metadata() else {
            return false;
        };
        let fits = metadata.is_file() && metadata.permissions().mode() & 0o111 != 0;
        found_unusable |= !fits;
        fits
    };
    if name.contains('/') {
        let path = cwd.join(name);
        if usable(&path) {
            return Ok(path);
        }
    } else {
        let path = env
            .iter()
            .find_map(|(key, value)| (key == "PATH").then_some(value.as_str()))
            .unwrap_or_default();
        for folder in path.split(':').filter(|folder| !folder.is_empty()) {
            let path = cwd.join(folder).join(name);
            if usable(&path) {
                return Ok(path);
            }
        }
    }
    Err(if found_unusable {
        refuse(
            Code::PermissionDenied,
            "PROGRAM_NOT_EXECUTABLE",
            format!("{name}: permission denied"),
        )
    } else {
        refuse(
            Code::NotFound,
            "PROGRAM_NOT_FOUND",
            format!("{name}: command not found"),
        )
    })
}

fn spawn_error(name: &str, user: &User, cwd: &Path, error: &io::Error) -> Status {
    match error.kind() {
        io::ErrorKind::NotFound => refuse(
            Code::NotFound,
            "PROGRAM_NOT_FOUND",
            format!(
                "{name}: its interpreter, or {}, is not there",
                cwd.display()
            ),
        ),
        io::ErrorKind::PermissionDenied if !files::may_enter(user, cwd) => refuse(
            Code::PermissionDenied,
            "CWD_PERMISSION_DENIED",
            format!("{}: permission denied", cwd.display()),
        ),
        io::ErrorKind::PermissionDenied => refuse(
            Code::PermissionDenied,
            "PROGRAM_NOT_EXECUTABLE",
            format!("{name}: permission denied"),
        ),
        io::ErrorKind::ArgumentListTooLong => invalid(
            "argv",
            "arguments and environment are too long for the kernel",
        ),
        _ if error.raw_os_error() == Some(nix::libc::EAGAIN)
            || error.raw_os_error() == Some(nix::libc::ENOMEM) =>
        {
            refuse(
                Code::ResourceExhausted,
                "NO_RESOURCES",
                format!("{name}: {error}"),
            )
        }
        _ if error.raw_os_error() == Some(nix::libc::ENOEXEC) => refuse(
            Code::InvalidArgument,
            "PROGRAM_FORMAT",
            format!("{name}: not a program this kernel runs"),
        ),
        _ => refuse(Code::Unknown, "START_FAILED", format!("{name}: {error}")),
    }
}

/// Sees a process through: its output, its deadline, its end.
async fn supervise(
    processes: Processes,
    process: Arc<Process>,
    stdout: Option<pipe::Receiver>,
    stderr: Option<pipe::Receiver>,
) {
    let stop = Arc::new(Notify::new());
    let pump = |pipe: Option<pipe::Receiver>, output: &Arc<Output>| {
        tokio::spawn(drain(pipe, Arc::clone(output), Arc::clone(&stop)))
    };
    let pumps = [pump(stdout, &process.stdout), pump(stderr, &process.stderr)];
    let deadline = process
        .request
        .deadline
        .and_then(|deadline| Duration::try_from(deadline).ok());
    let mut ended = process.ended.subscribe();
    let (how, at) = tokio::select! {
        how = seen(&mut ended) => how,
        () = enforce(&processes.guest.gate, &process, deadline) => seen(&mut ended).await,
    };
    let closed = async {
        for output in [&process.stdout, &process.stderr] {
            loop {
                let growth = output.growth();
                if output.is_closed() {
                    break;
                }
                growth.await;
            }
        }
    };
    // A reader that holds the output back is waited for; a grandchild that holds it open is not, for long.
    let gate = &processes.guest.gate;
    let held_open = tokio::select! {
        () = closed => false,
        () = gate.sleep(HELD_OPEN) => !wait_for_slow_reader(gate, &process).await,
    };
    stop.notify_waiters();
    stop.notify_one();
    process.stdout.close();
    process.stderr.close();
    for pump in pumps {
        pump.abort();
    }
    process.close_input().await;
    let status = match (how.code, how.signal) {
        (Some(code), _) => Some(process_exited::Status::Code(code)),
        (None, Some(signal)) => Some(process_exited::Status::Signal(signal)),
        (None, None) => None,
    };
    let exited = ProcessExited {
        status,
        oom_killed: false,
        deadline_exceeded: *process.deadline_passed.borrow(),
        output_held_open: held_open,
        cpu_time: prost_types::Duration::try_from(Duration::from_micros(how.cpu_micros)).ok(),
        peak_memory_bytes: how.peak_memory_bytes,
        wall_time: prost_types::Duration::try_from(process.began.elapsed()).ok(),
        end_time: Some(at.into()),
        stdout_bytes: process.stdout.end(),
        stderr_bytes: process.stderr.end(),
    };
    processes.retire(&process);
    process.exited.send_replace(Some(exited));
}

/// Whether the output closed after all, because what delayed it was a reader and not a grandchild.
async fn wait_for_slow_reader(gate: &Gate, process: &Process) -> bool {
    loop {
        let before = (process.stdout.end(), process.stderr.end());
        gate.sleep(HELD_OPEN).await;
        if process.stdout.is_closed() && process.stderr.is_closed() {
            return true;
        }
        let held_back = process.stdout.is_held_back() || process.stderr.is_held_back();
        let moved = before != (process.stdout.end(), process.stderr.end());
        if !held_back && !moved {
            return false;
        }
    }
}

async fn seen(ended: &mut watch::Receiver<Option<(Ended, SystemTime)>>) -> (Ended, SystemTime) {
    loop {
        if let Some(how) = ended.borrow_and_update().clone() {
            return how;
        }
        if ended.changed().await.is_err() {
            // The sender lives as long as the process is known.
            std::future::pending::<()>().await;
        }
    }
}

/// Returns when the deadline has passed and everything was killed; never without one. Time in which the process was frozen is not counted:
/// a deadline bounds how long it may work, and a session that slept for days must not wake to processes that are late already.
async fn enforce(gate: &Gate, process: &Process, deadline: Option<Duration>) {
    let Some(deadline) = deadline else {
        return std::future::pending().await;
    };
    gate.sleep(deadline).await;
    process.deadline_passed.send_replace(true);
    let group = Pid::from_raw(process.pid);
    // A group that is gone has nothing left to end.
    let _ = killpg(group, Signal::SIGTERM);
    gate.sleep(GRACE).await;
    let _ = killpg(group, Signal::SIGKILL);
}

/// Moves bytes from a pipe to the ring until the pipe ends, or `stop`.
async fn drain(pipe: Option<pipe::Receiver>, output: Arc<Output>, stop: Arc<Notify>) {
    let read = async {
        let Some(mut pipe) = pipe else { return };
        loop {
            output.room().await;
            let mut chunk = bytes::BytesMut::with_capacity(READ_CHUNK);
            match pipe.read_buf(&mut chunk).await {
                Ok(0) => return,
                Ok(_) => output.push(chunk.freeze()),
                Err(error) => {
                    eprintln!("envd: reading output: {error}");
                    return;
                }
            }
        }
    };
    tokio::select! {
        () = read => {}
        () = stop.notified() => {}
    }
    output.close();
}
