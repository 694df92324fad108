//! What a build runs on may go away, and the build goes on: another session takes the place of one that was lost, room is waited for.
//!
//! ```text
//!   room? --no--> wait, 10 minutes at most
//!     | yes
//!   session --step--> kept --step--> kept --step ... --> layers
//!     ^         |
//!     +-- lost -+   begins with what was kept last; 4 times in a build
//! ```
//! A session is lost when the registry says that it has ended, or when nobody answers for it any more. A node whose agent is killed and comes back has its sessions still: streams are
//! taken up again, and steps go on. What a step did to its own guest is lost with it, too; such a step is tried once more.

use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};
use service_kit::errors::reason_of;
use tokio::time::Instant;
use tonic::{Code, Status};

use super::{BuildError, Builder, failed};
use crate::sessions::{End, ExportError, UnpackError, is_unanswered};

/// Sessions of a build that others take the place of.
const MOST_LOST: u32 = 4;
/// How long a build waits until a node has room for it.
const ROOM_LIMIT: Duration = Duration::from_mins(10);
const FIRST_LOOK: Duration = Duration::from_millis(500);
const LAST_LOOKS: Duration = Duration::from_secs(10);
/// How a node says that a session is not there, or is about to end, whatever the registry knows of it yet.
const GONE: [&str; 6] = [
    "SESSION_UNKNOWN",
    "SESSION_STOPPED",
    "SESSION_FAILED",
    "SESSION_LOST",
    "SESSION_PAUSED",
    "SESSION_ROLLED_BACK",
];
/// How an export ends when the VMM or the guest does.
const UNEXPORTED: [&str; 3] = ["GUEST_NOT_READY", "CONFIGURE_FAILED", "VMM_FAILED"];
/// Ends that what runs in a guest can bring about.
const OF_THE_GUEST: [&str; 4] = [
    "GUEST_PANIC",
    "GUEST_POWERED_OFF",
    "GUEST_SILENT",
    "VMM_OUT_OF_MEMORY",
];

/// What to make of a status of a session, or of its node; `reason` is the build's if it is final.
fn told(status: &Status, gone: &[&str], reason: String, message: String) -> BuildError {
    let said = reason_of(status);
    let is_gone = said.as_ref().is_some_and(|said| gone.contains(&&**said));
    if is_gone || is_unanswered(status) {
        BuildError::Sandbox {
            end: End::new(said.unwrap_or(reason), message),
            is_gone,
        }
    } else {
        failed(reason, message)
    }
}

impl From<sdk::Error> for BuildError {
    fn from(error: sdk::Error) -> Self {
        const FAILED: &str = "SANDBOX_FAILED";
        let message = error.to_string();
        match &error {
            sdk::Error::Status(status) => told(status, &GONE, FAILED.into(), message),
            _ => failed(FAILED, message),
        }
    }
}

impl From<ExportError> for BuildError {
    fn from(error: ExportError) -> Self {
        let (reason, message) = (error.reason(), error.to_string());
        match &error {
            ExportError::Refused(status) => {
                let gone = [&GONE[..], &UNEXPORTED].concat();
                told(status, &gone, reason, message)
            }
            ExportError::NodeGone(_) => Self::Sandbox {
                end: End::new(reason, message),
                is_gone: true,
            },
        }
    }
}

/// What to make of a tarball that a step's session did not unpack.
pub(super) fn not_unpacked(step: &str, error: &UnpackError) -> BuildError {
    let lost = |reason: &str, is_gone| BuildError::Sandbox {
        end: End::new(reason.to_owned(), error.to_string()),
        is_gone,
    };
    match error {
        UnpackError::Refused { reason, .. } if GONE.contains(&&**reason) => lost(reason, true),
        UnpackError::Unreachable(_) => lost(error.reason(), false),
        _ => failed(error.reason(), format!("{step}: {error}")),
    }
}

/// Whether it may be had of the same session, or its node, when that is asked again.
pub(super) fn is_worth_another_try(error: &BuildError) -> bool {
    matches!(error, BuildError::Sandbox { is_gone: false, .. })
}

/// What a session was not created for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// No node has room.
    Room,
    /// Nobody has answered, or somebody was faster.
    Unanswered,
    /// It did not come to run: it is lost.
    Lost,
    /// What was asked for cannot be.
    Final,
}

/// Whether it says that there is no room now.
pub(super) fn is_room(status: &Status) -> bool {
    status.code() == Code::ResourceExhausted
}

/// What a refusal to create a session means. Pure.
pub(super) fn refused(status: &Status) -> Refused {
    let reason = reason_of(status).unwrap_or_default();
    match status.code() {
        _ if is_room(status) => Refused::Room,
        _ if is_unanswered(status) => Refused::Unanswered,
        _ if GONE.contains(&&*reason) => Refused::Lost,
        Code::Aborted => Refused::Unanswered,
        _ => Refused::Final,
    }
}

/// Why a session did not come to run.
pub(super) fn not_started(status: &Status) -> End {
    let error = sdk::Error::from(status.clone());
    let reason = error.fact("cause").or_else(|| error.reason());
    End::new(reason.unwrap_or_default(), status.message())
}

/// Sessions that a build has lost.
#[derive(Debug, Default)]
pub(super) struct Losses {
    count: u32,
    /// The step that was the last to end its guest.
    crashed: Option<String>,
}

impl Losses {
    /// Counts one that was lost, at a step or before any; an error if no other one is to take its place. Pure.
    pub(super) fn count(&mut self, step: Option<&str>, end: &End) -> Result<(), BuildError> {
        self.count += 1;
        if let Some(step) = step.filter(|_| OF_THE_GUEST.contains(&&*end.reason)) {
            if self.crashed.as_deref() == Some(step) {
                let message = format!("{step}: ended its sandbox, a second time: {end}");
                return Err(failed("STEP_CRASHED_GUEST", message));
            }
            self.crashed = Some(step.to_owned());
        }
        if self.count > MOST_LOST {
            let count = self.count;
            let at = step.map_or("before any step".to_owned(), |step| format!("at {step}"));
            let message = format!("its session was lost {count} times, the last time {at}: {end}");
            return Err(failed("SANDBOX_FAILED", message));
        }
        Ok(())
    }
}

/// Waiting for room.
#[derive(Debug, Default)]
pub(super) struct Room {
    waiting: Option<Waiting>,
    is_said: bool,
}

#[derive(Debug)]
struct Waiting {
    until: Instant,
    looks: ExponentialBackoff,
}

impl Room {
    /// When to look again; nothing if it was waited for long enough.
    fn next(&mut self) -> Option<Duration> {
        let waiting = self.waiting.get_or_insert_with(|| Waiting {
            until: Instant::now() + ROOM_LIMIT,
            looks: ExponentialBuilder::default()
                .with_min_delay(FIRST_LOOK)
                .with_max_delay(LAST_LOOKS)
                .without_max_times()
                .with_jitter()
                .build(),
        });
        let next = waiting.looks.next()?;
        (Instant::now() + next < waiting.until).then_some(next)
    }
}

impl Builder {
    /// Waits before whoever had no room, or did not answer, is asked again; the log has it once.
    pub(super) async fn wait_for_room(
        &self,
        id: &str,
        room: &mut Room,
        why: &Status,
    ) -> Result<(), BuildError> {
        let Some(next) = room.next() else {
            let limit = ROOM_LIMIT.as_secs();
            let why = why.message();
            let message = format!("there was no room for the build within {limit} s: {why}");
            return Err(failed("NO_ROOM", message));
        };
        if !std::mem::replace(&mut room.is_said, true) {
            let why = why.message();
            let line = format!("waits for room: {why}");
            self.store.log(id, &line).await?;
        }
        tokio::time::sleep(next).await;
        Ok(())
    }

    /// The same for whoever did not answer.
    pub(super) async fn wait_for_answer(
        &self,
        id: &str,
        room: &mut Room,
        why: &Status,
    ) -> Result<(), BuildError> {
        let Some(next) = room.next() else {
            let reason = reason_of(why).unwrap_or_else(|| "SANDBOX_FAILED".into());
            return Err(failed(reason, why.message()));
        };
        tracing::warn!(build_id = id, status = %why, "a build's session is not made yet");
        tokio::time::sleep(next).await;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use service_kit::errors::{Failure, Reason};

    use super::*;

    fn status(code: Code, reason: &'static str) -> Status {
        if reason.is_empty() {
            return Status::new(code, "x");
        }
        Failure::new(code, Reason::new(reason), "x").into_status()
    }

    #[rstest]
    #[case(Code::NotFound, "SESSION_STOPPED", Some(true))]
    #[case(Code::NotFound, "SESSION_LOST", Some(true))]
    #[case(Code::Aborted, "SESSION_STOPPED", Some(true))]
    #[case(Code::FailedPrecondition, "SESSION_PAUSED", Some(true))]
    #[case(Code::Unavailable, "GUEST_SILENT", Some(false))]
    #[case(Code::Unavailable, "", Some(false))]
    #[case(Code::Unknown, "", Some(false))]
    #[case(Code::NotFound, "PROGRAM_NOT_FOUND", None)]
    #[case(Code::InvalidArgument, "", None)]
    #[case(Code::Internal, "INTERNAL", None)]
    #[case(Code::Aborted, "EXPORT_FAILED", None)]
    fn only_what_says_that_a_session_is_gone_may_be_its_loss(
        #[case] code: Code,
        #[case] reason: &'static str,
        #[case] lost: Option<bool>,
    ) {
        let status = status(code, reason);
        let of = |error| match error {
            BuildError::Sandbox { is_gone, .. } => Some(is_gone),
            _ => None,
        };
        assert_eq!(of(sdk::Error::from(status.clone()).into()), lost);
        assert_eq!(of(ExportError::from(status).into()), lost);
    }

    #[test]
    fn an_export_that_the_guest_did_not_come_to_may_be_its_loss() {
        let status = status(Code::Aborted, "GUEST_NOT_READY");
        let error = BuildError::from(ExportError::from(status.clone()));
        assert!(matches!(error, BuildError::Sandbox { is_gone: true, .. }));
        let error = BuildError::from(sdk::Error::from(status));
        assert!(matches!(error, BuildError::Failed { .. }));
    }

    #[rstest]
    #[case(Code::ResourceExhausted, "NO_CAPACITY", Refused::Room)]
    #[case(Code::Unavailable, "NODE_UNREACHABLE", Refused::Unanswered)]
    #[case(Code::Unavailable, "", Refused::Unanswered)]
    #[case(Code::Aborted, "WRONG_STATE", Refused::Unanswered)]
    #[case(Code::Aborted, "SESSION_FAILED", Refused::Lost)]
    #[case(Code::NotFound, "SESSION_LOST", Refused::Lost)]
    #[case(Code::NotFound, "TEMPLATE_UNKNOWN", Refused::Final)]
    #[case(Code::InvalidArgument, "INVALID_ARGUMENT", Refused::Final)]
    fn what_a_session_is_not_created_for(
        #[case] code: Code,
        #[case] reason: &'static str,
        #[case] expected: Refused,
    ) {
        assert_eq!(refused(&status(code, reason)), expected);
    }

    fn reason(counted: Result<(), BuildError>) -> Option<String> {
        match counted {
            Ok(()) => None,
            Err(BuildError::Failed { reason, message }) => Some(format!("{reason}: {message}")),
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn a_build_loses_so_many_sessions_and_no_more() {
        let mut losses = Losses::default();
        let killed = End::new("VMM_EXITED", "its VMM ended");
        for _ in 0..MOST_LOST {
            assert_eq!(reason(losses.count(Some("line 1: RUN x"), &killed)), None);
        }
        assert_eq!(
            reason(losses.count(Some("line 2: RUN y"), &killed)).unwrap(),
            "SANDBOX_FAILED: its session was lost 5 times, the last time at line 2: RUN y: its VMM ended (VMM_EXITED)"
        );
    }

    #[test]
    fn a_step_that_ends_its_guest_is_tried_once_more() {
        let mut losses = Losses::default();
        let panic = End::new("GUEST_PANIC", "the guest's kernel panicked");
        let killed = End::new("VMM_EXITED", "its VMM ended");
        assert_eq!(reason(losses.count(Some("line 1: RUN x"), &panic)), None);
        assert_eq!(reason(losses.count(Some("line 1: RUN x"), &killed)), None);
        // It had not begun.
        assert_eq!(reason(losses.count(None, &panic)), None);
        assert_eq!(reason(losses.count(Some("line 2: RUN y"), &panic)), None);
        assert_eq!(
            reason(losses.count(Some("line 2: RUN y"), &panic)).unwrap(),
            "STEP_CRASHED_GUEST: line 2: RUN y: ended its sandbox, a second time: the guest's kernel panicked (GUEST_PANIC)"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn room_is_waited_for_so_long() {
        let began = Instant::now();
        let mut room = Room::default();
        let mut looks = 0;
        while let Some(next) = room.next() {
            tokio::time::sleep(next).await;
            looks += 1;
        }
        let waited = began.elapsed();
        assert!(waited <= ROOM_LIMIT && waited + 3 * LAST_LOOKS > ROOM_LIMIT);
        assert!((30..200).contains(&looks), "{looks}");
    }
}
