//! A template's start command: it runs in a guest that is nobody's yet, until it is ready; then the template's snapshot is taken.

use std::{collections::VecDeque, future, time::Duration};

use proto::{
    envd::v1::{
        Backpressure, OutputStream, ProcessExited, StartRequest, WaitForPortRequest, WaitRequest,
        process_event::Event, process_exited,
    },
    node::v1::MakeTemplateSnapshotResponse,
    template::v1::{StartCommand, Template, readiness::Probe},
};
use service_kit::ids::{HomeTag, SessionId};
use tokio::sync::{Mutex, mpsc};
use tonic::Status;

use super::{DriveError, OLDEST_ENVD, Workshop};
use crate::guest::{Connections, GuestClient, Identity};

/// Its process, in every session of the template.
const ID: &str = "start-command";
const USUAL_LIMIT: Duration = Duration::from_mins(1);
/// For the guest's own answer, beyond the time it was given.
const ANSWER: Duration = Duration::from_secs(5);
/// For a listener to take a piece of the output.
const LISTENING: Duration = Duration::from_secs(2);
/// A command that looks whether it is ready.
const LOOK_LIMIT: Duration = Duration::from_secs(30);
const LOOK_AGAIN: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Of a line that is looked at, of what is told of the output, and of a refusal.
const LONGEST_LINE: usize = 64 << 10;
const TAIL: usize = 512;
const LONGEST_MESSAGE: usize = 500;

/// Where its output goes.
pub type StartOutput = mpsc::Sender<Result<MakeTemplateSnapshotResponse, Status>>;

impl Workshop {
    /// Runs it in a guest that is nobody's.
    pub(super) async fn start_command(
        &self,
        guest: &GuestClient,
        template: &Template,
        start: &StartCommand,
        listeners: &(impl Fn() -> Vec<StartOutput> + Sync),
    ) -> Result<(), DriveError> {
        let env = template.env.iter();
        let nobody = Identity {
            session_id: SessionId::random(&HomeTag::random()),
            env: env
                .map(|(name, value)| (name.clone(), value.clone()))
                .collect(),
            default_user: template.default_user.clone(),
            nameservers: self.nameservers.clone(),
            template: String::new(),
            machine_id: rand::random::<[u8; 16]>().to_vec(),
        };
        let info = guest.configure(&nobody, Connections::Keep).await;
        let info = info.map_err(|status| DriveError::Configure(status.message().to_owned()))?;
        if info.api_level < OLDEST_ENVD {
            return Err(DriveError::EnvdTooOld(info.api_level));
        }
        let limit = start.readiness.as_ref().and_then(|it| it.timeout);
        let limit = limit.and_then(|limit| Duration::try_from(limit).ok());
        let limit = limit.unwrap_or(USUAL_LIMIT);
        let tail = Mutex::new(VecDeque::new());
        let ran = tokio::time::timeout(limit + ANSWER, run(guest, start, limit, listeners, &tail));
        let why = match ran.await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(why)) => why,
            Err(_) => format!("it was not ready within {} s", limit.as_secs_f64()),
        };
        let tail: Vec<u8> = tail.into_inner().into();
        Err(DriveError::StartCommand {
            why,
            output: printable(&tail),
        })
    }
}

/// Until it is ready; why it is not.
async fn run(
    guest: &GuestClient,
    start: &StartCommand,
    limit: Duration,
    listeners: &(impl Fn() -> Vec<StartOutput> + Sync),
    tail: &Mutex<VecDeque<u8>>,
) -> Result<(), String> {
    let request = StartRequest {
        process_id: ID.into(),
        argv: start.argv.clone(),
        cwd: start.cwd.clone(),
        user: start.user.clone(),
        log_output: true,
        // What it says while this listens is heard; later it waits for nobody.
        backpressure: Backpressure::WhileAttached.into(),
        ..StartRequest::default()
    };
    let events = guest.processes().start(request).await;
    let mut events = events.map_err(|status| said(&status))?.into_inner();
    let readiness = start.readiness.clone().unwrap_or_default();
    let wanted = match &readiness.probe {
        Some(Probe::LogLine(text)) => Some(text.clone().into_bytes()),
        _ => None,
    };
    let follow = async {
        let mut lines = Lines::default();
        loop {
            let event = events.message().await.map_err(|status| said(&status))?;
            match event.and_then(|answer| answer.event?.event) {
                Some(Event::Output(piece)) => {
                    let is_stderr = piece.stream() == OutputStream::Stderr;
                    let data = piece.data;
                    let mut tail = tail.lock().await;
                    tail.extend(&data);
                    let beyond = tail.len().saturating_sub(TAIL);
                    tail.drain(..beyond);
                    drop(tail);
                    for listener in listeners() {
                        let piece = MakeTemplateSnapshotResponse {
                            output: data.clone(),
                            is_stderr,
                            ..MakeTemplateSnapshotResponse::default()
                        };
                        // Nobody has to listen, and nobody holds up the others for long.
                        let _ = listener.send_timeout(Ok(piece), LISTENING).await;
                    }
                    if let Some(wanted) = &wanted
                        && lines.hold(is_stderr, &data, wanted)
                    {
                        return Ok(());
                    }
                }
                Some(Event::Exited(exit)) => match ending(&exit) {
                    // It may have left a daemon, which is what is waited for.
                    None if wanted.is_none() => future::pending().await,
                    None => return Err("it ended without having said so".into()),
                    Some(how) => return Err(how),
                },
                Some(_) => {}
                None => return Err("its output broke off".to_owned()),
            }
        }
    };
    let probe = async {
        match &readiness.probe {
            Some(Probe::Port(port)) => {
                let request = WaitForPortRequest {
                    port: port.port,
                    timeout: prost_types::Duration::try_from(limit).ok(),
                    http_path: port.http_path.clone(),
                };
                let waited = guest.ports().wait_for_port(request).await;
                waited.map(drop).map_err(|status| said(&status))
            }
            Some(Probe::Command(command)) => until_it_succeeds(guest, start, command).await,
            Some(Probe::LogLine(_)) => future::pending().await,
            None => Err("nothing says when it is ready".to_owned()),
        }
    };
    tokio::select! {
        followed = follow => followed,
        probed = probe => probed,
    }
}

async fn until_it_succeeds(
    guest: &GuestClient,
    start: &StartCommand,
    command: &str,
) -> Result<(), String> {
    let mut number = 0_u32;
    let mut pause = LOOK_AGAIN;
    loop {
        number += 1;
        let process_id = format!("{ID}.ready.{number}");
        let request = StartRequest {
            process_id: process_id.clone(),
            argv: vec!["/bin/sh".into(), "-c".into(), command.to_owned()],
            cwd: start.cwd.clone(),
            user: start.user.clone(),
            deadline: prost_types::Duration::try_from(LOOK_LIMIT).ok(),
            ..StartRequest::default()
        };
        let events = guest.processes().start(request).await;
        drop(events.map_err(|status| said(&status))?);
        let ended = guest.processes().wait(WaitRequest { process_id }).await;
        let ended = ended.map_err(|status| said(&status))?.into_inner().exited;
        if ended.is_some_and(|exit| ending(&exit).is_none()) {
            return Ok(());
        }
        tokio::time::sleep(pause).await;
        // Each is a process that is remembered.
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// How it ended, if not well.
fn ending(exit: &ProcessExited) -> Option<String> {
    if exit.oom_killed {
        return Some("it ran out of memory".into());
    }
    match exit.status {
        Some(process_exited::Status::Code(0)) => None,
        Some(process_exited::Status::Code(code)) => Some(format!("it ended with code {code}")),
        Some(process_exited::Status::Signal(signal)) => {
            Some(format!("it was ended by signal {signal}"))
        }
        None => Some("it ended, nobody knows how".into()),
    }
}

/// What a guest says, as far as it is passed on.
fn said(status: &Status) -> String {
    status.message().chars().take(LONGEST_MESSAGE).collect()
}

/// On one line.
fn printable(output: &[u8]) -> String {
    let text = String::from_utf8_lossy(output);
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let lines: Vec<String> = lines
        .map(|line| line.chars().filter(|char| !char.is_control()).collect())
        .collect();
    lines.join(" | ")
}

/// Lines of two streams, as far as they are there.
#[derive(Default)]
struct Lines([Vec<u8>; 2]);

impl Lines {
    /// Whether one of them has it now.
    fn hold(&mut self, is_stderr: bool, data: &[u8], wanted: &[u8]) -> bool {
        let Self([stdout, stderr]) = self;
        let line = if is_stderr { stderr } else { stdout };
        for piece in data.split_inclusive(|byte| *byte == b'\n') {
            // What was looked at is not looked at again.
            let from = line.len().saturating_sub(wanted.len() - 1);
            line.extend_from_slice(piece);
            let new = line.get(from..).unwrap_or_default();
            if new.windows(wanted.len()).any(|part| part == wanted) {
                return true;
            }
            if piece.ends_with(b"\n") {
                line.clear();
            } else if line.len() > LONGEST_LINE {
                // What is looked for may begin at its end.
                let beyond = line.len() - wanted.len().min(line.len());
                line.drain(..beyond);
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_found_however_it_comes() {
        let mut lines = Lines::default();
        for (is_stderr, data) in [
            (false, "star"),
            (true, "ted"),
            (false, "t\n"),
            (true, "\nrea"),
        ] {
            assert!(!lines.hold(is_stderr, data.as_bytes(), b"ready"));
        }
        assert!(lines.hold(true, b"dy now\n", b"ready"));
        let mut lines = Lines::default();
        assert!(!lines.hold(false, &vec![b'x'; LONGEST_LINE + 10], b"xy"));
        assert!(lines.0[0].len() <= 2);
        assert!(lines.hold(false, b"y", b"xy"));
        assert!(!Lines::default().hold(false, b"rea\ndy", b"ready"));
    }

    #[test]
    fn output_is_told_on_one_line() {
        let output = b"one\n\x1b[1mtwo\x07\xff\r\n\n";
        assert_eq!(printable(output), "one | [1mtwo\u{fffd}");
    }
}
