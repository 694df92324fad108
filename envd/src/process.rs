//! Processes: started once per ID, their output kept, their end remembered.

use std::{
    collections::{BTreeMap, HashMap, VecDeque, hash_map::Entry},
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use nix::{
    sys::signal::{Signal, kill, killpg},
    unistd::Pid,
};
use prost::Message as _;
use proto::envd::v1::{
    ProcessExited, ProcessInfo, SignalTarget, StartRequest, StdinMode, TerminalSize,
};
use tokio::{
    net::unix::pipe,
    sync::{Mutex as AsyncMutex, watch},
};
use tonic::{Code, Status};

use crate::{
    errors::{invalid, refuse},
    group::Group,
    identity::Guest,
    keeper::{EndedWord, Keeper, Slot},
    output::Output,
    spawn::{self, Ended, Plan, Stdio},
    terminal::Terminal,
    users::{self, User},
};

mod input;
mod left;
mod request;
mod source;
mod supervise;

use input::{Input, Progress, Sink};
use left::Record;
use request::{Program, look_up};
use source::{Side, Source};
use supervise::supervise;

const REMEMBERED: usize = 1024;
const REMEMBERED_FOR: Duration = Duration::from_hours(1);
/// Bytes of output kept of all finished processes, in memory and in all; beyond that the oldest lose theirs, though not how they ended.
const KEPT_OF_FINISHED: (u64, u64) = (32 << 20, 512 << 20);
const DEFAULT_TERMINAL: &str = "xterm-256color";

/// All processes of the guest. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Processes {
    guest: Arc<Guest>,
    keeper: Keeper,
    table: Arc<Mutex<Table>>,
}

#[derive(Debug, Default)]
struct Table {
    by_id: BTreeMap<String, Arc<Process>>,
    by_pid: HashMap<i32, Arc<Process>>,
    finished: Finished,
    /// Those that have ended and whose cgroup is still there, because of what they had started.
    lingering: Vec<Arc<Process>>,
    next: u64,
}

/// Those that have ended, oldest first.
#[derive(Debug, Default)]
struct Finished {
    queue: VecDeque<(Instant, Arc<Process>, (u64, u64))>,
    /// How many have let go of their output already: the oldest.
    bare: usize,
    /// Bytes of output the others keep, in memory and in all.
    kept: (u64, u64),
}

impl Finished {
    fn add(&mut self, process: Arc<Process>) {
        let (out, err) = (process.stdout.kept(), process.stderr.kept());
        let kept = (out.0 + err.0, out.1 + err.1);
        self.kept = (self.kept.0 + kept.0, self.kept.1 + kept.1);
        self.queue.push_back((Instant::now(), process, kept));
        while (self.kept.0 > KEPT_OF_FINISHED.0 || self.kept.1 > KEPT_OF_FINISHED.1)
            && let Some((_, process, kept)) = self.queue.get(self.bare)
        {
            process.stdout.let_go();
            process.stderr.let_go();
            self.kept = (self.kept.0 - kept.0, self.kept.1 - kept.1);
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
            self.kept = (self.kept.0 - kept.0, self.kept.1 - kept.1);
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
    keeper: Keeper,
    deadline_passed: watch::Sender<bool>,
    stdin: AsyncMutex<Input>,
    /// It and all it started, where there are cgroups.
    group: Option<Group>,
    /// Until it has ended.
    terminal: Mutex<Option<Arc<Terminal>>>,
    size: Mutex<Option<TerminalSize>>,
}

/// A reader's places in both streams of a process, held from before the first byte is read.
#[derive(Debug)]
pub(crate) struct Places {
    pub(crate) process: Arc<Process>,
    stdout: u64,
    stderr: u64,
}

impl Places {
    /// From these offsets on.
    pub(crate) fn enter(process: Arc<Process>, stdout: u64, stderr: u64) -> Self {
        Self {
            stdout: process.stdout.enter(stdout),
            stderr: process.stderr.enter(stderr),
            process,
        }
    }

    /// It has read so far.
    pub(crate) fn advance(&self, is_stderr: bool, offset: u64) {
        if is_stderr {
            self.process.stderr.advance(self.stderr, offset);
        } else {
            self.process.stdout.advance(self.stdout, offset);
        }
    }
}

impl Drop for Places {
    fn drop(&mut self) {
        // A reader that left holds nothing back.
        self.process.stdout.leave(self.stdout);
        self.process.stderr.leave(self.stderr);
    }
}

/// The table, held so that no child is collected before it is known.
pub(crate) struct Held<'a>(MutexGuard<'a, Table>);

impl Held<'_> {
    /// The process that a child is; without one, it is an orphan.
    pub(crate) fn process_of(&self, pid: i32) -> Option<Arc<Process>> {
        self.0.by_pid.get(&pid).cloned()
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
    pub(crate) fn new(guest: Arc<Guest>, keeper: Keeper) -> Self {
        Self {
            guest,
            keeper,
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

    /// Starts a process; the same ID with the same request is the process there is. Either way from its first byte on.
    pub(crate) fn start(&self, mut request: StartRequest) -> Result<Places, Status> {
        request::check(&request)?;
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
        let program = request::program(&user, &request);
        let mut table = self.table();
        // Asked again with the table held: a process started after a snapshot's preparation has held it would never run.
        self.guest.gate.admit()?;
        if request.process_id.is_empty() {
            request.process_id = table.new_id();
        }
        if let Some(there) = table.by_id.get(&request.process_id) {
            return if there.request == request {
                Ok(Places::enter(Arc::clone(there), 0, 0))
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
        let path = look_up(&program.name, &env, &cwd)?;
        table.next += 1;
        let number = table.next;
        let started = SystemTime::now();
        let record = Record::of(&request, &user, &cwd, started).encode_to_vec();
        // Before it can have done anything: if the daemon dies now, the next one knows of it.
        let word = Some((Slot::Record, &record[..]));
        self.keeper.keep(number, &[], word);
        let unstarted = Unstarted {
            keeper: &self.keeper,
            number,
        };
        let group = self.group(number, &request)?;
        let spawned = spawn_in(&path, &program, &cwd, &env, &user, &request, group.as_ref());
        let Spawned {
            pid,
            sink,
            stdout,
            stderr,
            terminal,
        } = spawned.map_err(|error| {
            if let Some(group) = &group {
                group.remove();
            }
            request::spawn_error(&program.name, &user, &cwd, &error)
        })?;
        std::mem::forget(unstarted);
        // Before anybody hears of it.
        let mut files = stdout.descriptors(Slot::Stdout);
        files.extend(stderr.descriptors(Slot::Stderr));
        files.extend(sink.as_ref().and_then(Sink::descriptor));
        self.keeper.keep_started(number, pid, &files);
        let keeping = request::keeping(&request);
        let (out_home, err_home) = left::homes(&self.keeper, number);
        let process = Arc::new(Process {
            id: request.process_id.clone(),
            pid,
            started,
            stdout: Arc::new(Output::new(keeping, out_home)),
            stderr: Arc::new(Output::new(keeping, err_home)),
            began: Instant::now(),
            user: user.name.clone(),
            cwd,
            number,
            ended: watch::Sender::new(None),
            exited: watch::Sender::new(None),
            keeper: self.keeper.clone(),
            deadline_passed: watch::Sender::new(false),
            stdin: AsyncMutex::new(Input {
                sink,
                progress: Progress::default(),
            }),
            group,
            terminal: Mutex::new(terminal),
            size: Mutex::new(request.terminal),
            request,
        });
        table.by_id.insert(process.id.clone(), Arc::clone(&process));
        table.by_pid.insert(pid, Arc::clone(&process));
        drop(table);
        let places = Places::enter(Arc::clone(&process), 0, 0);
        tokio::spawn(supervise(self.clone(), process, stdout, stderr));
        Ok(places)
    }

    fn group(&self, number: u64, request: &StartRequest) -> Result<Option<Group>, Status> {
        let failed = |error: io::Error| request::limits_error(request.limits.as_ref(), &error);
        let group = self.guest.group(&format!("p{number}")).map_err(failed)?;
        match (&group, &request.limits) {
            (Some(group), Some(limits)) => {
                if let Err(error) = group.limit(limits) {
                    group.remove();
                    return Err(failed(error));
                }
            }
            (None, Some(_)) => return Err(failed(io::ErrorKind::NotFound.into())),
            (_, None) => {}
        }
        Ok(group)
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
        if request.terminal.is_some() {
            env.insert("TERM".into(), DEFAULT_TERMINAL.into());
        }
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
        if process.group.is_some() {
            table.lingering.push(Arc::clone(process));
        }
        while let Some(forgotten) = table.finished.forget() {
            table.by_id.remove(&forgotten.id);
            self.keeper.forget(forgotten.number);
        }
        drop(table);
        self.sweep();
    }

    /// Removes the cgroups that nobody is in any more. To be done whenever an orphan has ended.
    pub(crate) fn sweep(&self) {
        let is_there =
            |process: &Arc<Process>| process.group.as_ref().is_some_and(|group| !group.remove());
        self.table().lingering.retain(is_there);
    }

    /// Signals every process there is.
    pub(crate) fn signal_all(&self, signal: Signal) {
        for process in self.table().by_pid.values() {
            // One that has just ended is no error.
            let _ = killpg(Pid::from_raw(process.pid), signal);
        }
    }

    /// A child of a daemon before has ended, and was collected by the keeper.
    pub(crate) fn note_end_of(&self, number: u64, ended: &Ended, time: SystemTime) {
        let process = self.table().by_pid.get(&ended.pid).cloned();
        if let Some(process) = process.filter(|process| process.number == number) {
            process.note_end(ended, time);
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
            exited: self.exited.borrow().clone(),
            terminal: *self.size.lock().unwrap_or_else(PoisonError::into_inner),
        }
    }

    /// Notes how it ended, before it is collected.
    pub(crate) fn keep_end(&self, ended: &Ended) {
        let word = EndedWord::of(ended, SystemTime::now()).encode_to_vec();
        self.keeper
            .keep(self.number, &[], Some((Slot::Ended, &word)));
    }

    /// It was collected.
    pub(crate) fn note_end(&self, ended: &Ended, time: SystemTime) {
        self.ended.send_replace(Some((ended.clone(), time)));
    }

    /// How it ended, once the last byte of its output is in.
    pub(crate) fn exit(&self) -> watch::Receiver<Option<ProcessExited>> {
        self.exited.subscribe()
    }

    pub(crate) fn has_terminal(&self) -> bool {
        self.request.terminal.is_some()
    }

    fn over(&self) -> bool {
        self.ended.borrow().is_some()
    }

    /// Changes the size of its terminal.
    pub(crate) fn resize(&self, size: TerminalSize) -> Result<(), Status> {
        request::check_size("size", size)?;
        let terminal = self.terminal.lock().unwrap_or_else(PoisonError::into_inner);
        let mut known = self.size.lock().unwrap_or_else(PoisonError::into_inner);
        if known.is_none() {
            return Err(refuse(
                Code::FailedPrecondition,
                "NO_TERMINAL",
                "the process has no terminal",
            ));
        }
        let Some(terminal) = terminal.as_ref() else {
            return Err(process_ended());
        };
        terminal
            .resize(size)
            .map_err(|error| refuse(Code::Unknown, "IO_ERROR", error.to_string()))?;
        *known = Some(size);
        Ok(())
    }

    pub(crate) fn signal(&self, number: i32, target: SignalTarget) -> Result<(), Status> {
        let signal = Signal::try_from(number)
            .map_err(|_| invalid("signal", "must be a signal number, 1-31"))?;
        if target == SignalTarget::All
            && let Some(group) = &self.group
        {
            let met = group.signal(signal);
            let met = met.map_err(|error| refuse(Code::Unknown, "IO_ERROR", error.to_string()))?;
            return if met > 0 {
                Ok(())
            } else {
                Err(process_ended())
            };
        }
        // Until it is collected its PID is its own; after that it may be anybody's.
        if self.over() {
            return Err(process_ended());
        }
        let pid = Pid::from_raw(self.pid);
        let sent = match target {
            SignalTarget::Unspecified | SignalTarget::Process => kill(pid, signal),
            SignalTarget::Group | SignalTarget::All => killpg(pid, signal),
        };
        sent.map_err(|error| refuse(Code::FailedPrecondition, "PROCESS_ENDED", error.to_string()))
    }

    /// Whether something it started is there; once it has been collected itself, something that outlives it.
    fn is_survived(&self) -> bool {
        self.group.as_ref().is_some_and(|group| !group.is_empty())
    }

    /// Ends it and all it started.
    fn end_all(&self, signal: Signal) {
        // What has ended meanwhile needs no signal.
        let _ = self.signal(signal as i32, SignalTarget::All);
    }
}

/// A start that did not come to be: nothing is known of it.
struct Unstarted<'a> {
    keeper: &'a Keeper,
    number: u64,
}

impl Drop for Unstarted<'_> {
    fn drop(&mut self) {
        self.keeper.forget(self.number);
    }
}

/// What came of starting a program.
struct Spawned {
    pid: i32,
    sink: Option<Sink>,
    stdout: Source,
    stderr: Source,
    terminal: Option<Arc<Terminal>>,
}

/// The caller holds off the reaper, and other starts.
fn spawn_in(
    path: &Path,
    program: &Program,
    cwd: &Path,
    env: &[(String, String)],
    user: &User,
    request: &StartRequest,
    group: Option<&Group>,
) -> io::Result<Spawned> {
    let (terminal, stdio) = if let Some(size) = request.terminal {
        let (ours, theirs) = Terminal::open(size, user)?;
        let ours = Arc::new(ours);
        let source = Source::terminal(Arc::clone(&ours), Side::new()?)?;
        (Some((ours, source)), Stdio::Terminal(theirs))
    } else {
        let stdin = request.stdin() == StdinMode::Pipe;
        (None, Stdio::Pipes { stdin })
    };
    let mut child = spawn::spawn(Plan {
        program: path,
        name: &program.called,
        arguments: &program.arguments,
        cwd,
        env,
        user,
        stdio,
        group,
    })?;
    let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
    if let Some((terminal, stdout)) = terminal {
        return Ok(Spawned {
            pid,
            sink: Some(Sink::Terminal(Arc::clone(&terminal))),
            stdout,
            stderr: Source::Nothing,
            terminal: Some(terminal),
        });
    }
    let stdin = child.stdin.take().map(OwnedFd::from);
    let stdin = stdin.map(pipe::Sender::from_owned_fd).transpose()?;
    Ok(Spawned {
        pid,
        sink: stdin.map(Sink::Pipe),
        stdout: Source::pipe(child.stdout.take())?,
        stderr: Source::pipe(child.stderr.take())?,
        terminal: None,
    })
}

fn process_ended() -> Status {
    refuse(
        Code::FailedPrecondition,
        "PROCESS_ENDED",
        "the process has ended",
    )
}
