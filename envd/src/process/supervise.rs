//! A process from its start to its end: what it writes, how long it may work, how it ended.

use std::{
    io,
    sync::{Arc, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use nix::sys::signal::Signal;
use proto::envd::v1::{OomVictim, ProcessExited, process_exited};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{
    Process, Processes,
    source::{LARGEST_PIPE, Source},
};
use crate::{
    gate::Gate,
    group::Group,
    logs::{self, Lines},
    output::{Found, Output},
    spawn::Ended,
};

/// How long output may stay open after the process has ended, because a grandchild holds it.
const HELD_OPEN: Duration = Duration::from_secs(1);
/// How often that is waited for once more while something still comes, and no reader holds it back.
const HELD_OPEN_TIMES: u32 = 4;
/// No two small writes are moved sooner after each other than that.
const PACE: Duration = Duration::from_millis(2);
/// Nor sooner than that, if there are more and more of them.
const SLOWEST_PACE: Duration = Duration::from_millis(16);
/// As many are named in the exit event.
const MOST_VICTIMS: usize = 16;
/// Between SIGTERM and SIGKILL when a deadline has passed.
const GRACE: Duration = Duration::from_secs(5);

/// Sees a process through: its output, its deadline, its end.
pub(super) async fn supervise(
    processes: Processes,
    process: Arc<Process>,
    stdout: Source,
    stderr: Source,
) {
    let stop = CancellationToken::new();
    let pump = |source: Source, output: &Arc<Output>, is_stderr| {
        let logged = process.request.log_output;
        let sink = Sink {
            output: Arc::clone(output),
            lines: logged.then(|| Lines::of(&process.id, is_stderr)),
        };
        tokio::spawn(drain(source, sink, stop.clone()))
    };
    let pumps = [
        pump(stdout, &process.stdout, false),
        pump(stderr, &process.stderr, true),
    ];
    let deadline = process
        .request
        .deadline
        .and_then(|deadline| Duration::try_from(deadline).ok())
        // Of one that a daemon before has started, time has passed.
        .map(|deadline| deadline.saturating_sub(process.began.elapsed()));
    let mut ended = process.ended.subscribe();
    let (how, at) = tokio::select! {
        how = seen(&mut ended) => how,
        () = enforce(&processes.guest.gate, &process, deadline) => seen(&mut ended).await,
    };
    if *process.deadline_passed.borrow() && process.is_survived() {
        // What outlives it has the time that it would have had.
        let (processes, process) = (processes.clone(), Arc::clone(&process));
        tokio::spawn(async move {
            processes.guest.gate.sleep(GRACE).await;
            process.end_all(Signal::SIGKILL);
        });
    }
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
    // A reader that holds the output back is waited for; a grandchild that holds it open, or goes on writing, is not, for long.
    let gate = &processes.guest.gate;
    let at_exit = written(&process);
    let held_open = tokio::select! {
        () = closed => false,
        () = gate.sleep(HELD_OPEN) => !wait_for_slow_reader(gate, &process, at_exit).await,
    };
    stop.cancel();
    for pump in pumps {
        // It waits for nothing any more. One that panicked leaves the output as it is.
        let _ = pump.await;
    }
    process.stdout.close();
    process.stderr.close();
    // A terminal hangs up: what was started from it and is still there hears it.
    process.stdin.lock().await.sink = None;
    process
        .terminal
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take();
    let used = process.group.as_ref().map(Group::used).unwrap_or_default();
    let oom_victims = victims(process.group.as_ref(), used.oom_kills).await;
    let status = match (how.code, how.signal) {
        (Some(code), _) => Some(process_exited::Status::Code(code)),
        (None, Some(signal)) => Some(process_exited::Status::Signal(signal)),
        (None, None) => None,
    };
    let exited = ProcessExited {
        status,
        oom_killed: used.oom_kills > 0,
        deadline_exceeded: *process.deadline_passed.borrow(),
        output_held_open: held_open,
        cpu_time: prost_types::Duration::try_from(Duration::from_micros(
            used.cpu_micros.unwrap_or(how.cpu_micros),
        ))
        .ok(),
        peak_memory_bytes: used.peak_memory.unwrap_or(how.peak_memory_bytes),
        wall_time: prost_types::Duration::try_from(process.began.elapsed()).ok(),
        end_time: Some(at.into()),
        stdout_bytes: process.stdout.end(),
        stderr_bytes: process.stderr.end(),
        oom_kills: used.oom_kills,
        left_running: process.is_survived(),
        oom_victims,
    };
    let is_survived = held_open || exited.left_running || process.has_terminal();
    process
        .keeper
        .keep_exited(process.number, &exited, is_survived);
    processes.retire(&process);
    process.exited.send_replace(Some(exited));
}

/// Who was killed for want of memory.
async fn victims(group: Option<&Group>, kills: u32) -> Vec<OomVictim> {
    let count = usize::try_from(kills).map_or(MOST_VICTIMS, |kills| kills.min(MOST_VICTIMS));
    let Some(group) = group.filter(|_| count > 0) else {
        return Vec::new();
    };
    let victim = |kill: logs::OomKill| OomVictim {
        pid: kill.pid,
        command: kill.command,
    };
    let kills = logs::oom_kills(group.name(), count).await;
    kills.into_iter().take(MOST_VICTIMS).map(victim).collect()
}

fn written(process: &Process) -> [u64; 2] {
    [process.stdout.end(), process.stderr.end()]
}

/// Whether the output closed after all, because what delayed it was a reader and not a grandchild. What came after all that a pipe can
/// have held at the exit is a grandchild's.
async fn wait_for_slow_reader(gate: &Gate, process: &Process, at_exit: [u64; 2]) -> bool {
    let mut patience = HELD_OPEN_TIMES;
    loop {
        let before = written(process);
        let grown = before.iter().zip(at_exit).map(|(now, then)| now - then);
        if grown.max() > Some(LARGEST_PIPE) {
            return false;
        }
        gate.sleep(HELD_OPEN).await;
        if process.stdout.is_closed() && process.stderr.is_closed() {
            return true;
        }
        let held_back = process.stdout.is_held_back() || process.stderr.is_held_back();
        let moved = before != written(process);
        if held_back {
            patience = HELD_OPEN_TIMES;
        } else if !moved || patience == 0 {
            return false;
        } else {
            patience -= 1;
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

/// Returns when the deadline has passed and all was killed that the process had started; never without one. Time in which the process was frozen is not counted:
/// a deadline bounds how long it may work, and a session that slept for days must not wake to processes that are late already.
async fn enforce(gate: &Gate, process: &Process, deadline: Option<Duration>) {
    let Some(deadline) = deadline else {
        return std::future::pending().await;
    };
    gate.sleep(deadline).await;
    process.deadline_passed.send_replace(true);
    process.end_all(Signal::SIGTERM);
    gate.sleep(GRACE).await;
    process.end_all(Signal::SIGKILL);
}

/// Where output goes.
struct Sink {
    output: Arc<Output>,
    /// Where it is logged, too.
    lines: Option<Lines>,
}

impl Sink {
    /// Logs what has come since an offset.
    fn log(&mut self, mut since: u64) {
        let Some(lines) = &mut self.lines else { return };
        while let Ok(Found::Bytes(bytes, _)) = self.output.read(since) {
            lines.take(&bytes);
            since += bytes.len() as u64;
        }
    }
}

/// How long is waited after a small write, to move what follows it closely together with it: each on its own would cost its reader a message,
/// and of a program that writes line by line, as all do at a terminal, messages would take more of the CPU than the program. The first after
/// a while is moved at once, so that nobody who types waits; longer than [`PACE`] is waited only where waiting has brought more.
struct Pace {
    last: Option<Moved>,
    next: Duration,
}

struct Moved {
    when: Instant,
    count: usize,
}

impl Pace {
    fn new() -> Self {
        Self {
            last: None,
            next: PACE,
        }
    }

    /// What is to be waited for more of what has just come.
    fn wait(&self, small: usize) -> Option<Duration> {
        let last = self.last.as_ref()?;
        if last.count >= small {
            // A program that writes much has filled what there is room for again.
            return None;
        }
        self.next.checked_sub(last.when.elapsed())
    }

    /// So much was moved, and so much of it was there before it was waited, if it was.
    fn moved(&mut self, count: usize, before: Option<usize>) {
        self.next = match before {
            Some(before) if count > before => (self.next * 2).min(SLOWEST_PACE),
            // Many small ones that fill the room are still small ones.
            None if self
                .last
                .as_ref()
                .is_some_and(|last| last.when.elapsed() < self.next) =>
            {
                self.next
            }
            _ => PACE,
        };
        self.last = Some(Moved {
            when: Instant::now(),
            count,
        });
    }
}

/// Moves bytes to where they are kept until they end, or `stop`.
async fn drain(mut source: Source, mut sink: Sink, stop: CancellationToken) {
    let read = async {
        let mut pace = Pace::new();
        loop {
            sink.output.room().await;
            let is_ending = source.ready().await?;
            let mut before = None;
            if !is_ending && let Some(early) = pace.wait(source.small()) {
                before = Some(source.look_away()?);
                // What comes meanwhile waits where it is.
                tokio::time::sleep(early).await;
            }
            let since = sink.output.end();
            match source.take(&sink.output).await? {
                0 => return Ok::<_, io::Error>(()),
                count => pace.moved(count, before),
            }
            sink.log(since);
        }
    };
    tokio::select! {
        ended = read => if let Err(error) = ended {
            logs::warn(format_args!("reading output: {error}"));
        },
        () = stop.cancelled() => {}
    }
    if stop.is_cancelled() {
        // On a busy machine nobody may have come to read what was written before the end.
        let since = sink.output.end();
        source.take_rest(&sink.output);
        sink.log(since);
    }
    // The last of the logs is there before the end is told.
    sink.lines = None;
    sink.output.close();
}
