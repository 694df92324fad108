//! The gate between callers and the guest.
//!
//! ```text
//!                  Configure            PrepareSnapshot
//!   [new] ------------------> [open] ------------------> [closed]
//!                               ^        Configure          |
//!                               +---------------------------+
//! ```
//! A snapshot is taken of a guest that is new (a template's) or closed (a session's), and a guest restored from one is what that was: so
//! nothing of a user runs in it, and nothing is answered, before Configure has made it somebody's. PrepareSnapshot leaves a new guest new.

use std::time::{Duration, Instant};

use tokio::sync::watch;
use tonic::{Code, Status};

use crate::errors::{refuse, refuse_for_now};

/// What callers are told to wait; a snapshot takes less, a restore not much more.
const RETRY: Duration = Duration::from_millis(50);

#[derive(Debug, Clone, Copy)]
enum State {
    New,
    Open { since: Instant, before: Duration },
    Closed { before: Duration },
}

/// Open or not, and for how long it has been open in all.
#[derive(Debug)]
pub(crate) struct Gate(watch::Sender<State>);

/// What the next daemon begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub(crate) enum Stand {
    New = 0,
    Open = 1,
    Closed = 2,
}

impl Gate {
    /// As it was left; the time before is no matter of those who sleep from now on.
    pub(crate) fn left(stand: Stand) -> Self {
        let before = Duration::ZERO;
        Self(watch::Sender::new(match stand {
            Stand::New => State::New,
            Stand::Open => State::Open {
                since: Instant::now(),
                before,
            },
            Stand::Closed => State::Closed { before },
        }))
    }

    pub(crate) fn stand(&self) -> Stand {
        match *self.0.borrow() {
            State::New => Stand::New,
            State::Open { .. } => Stand::Open,
            State::Closed { .. } => Stand::Closed,
        }
    }

    pub(crate) fn is_new(&self) -> bool {
        matches!(*self.0.borrow(), State::New)
    }

    pub(crate) fn is_open(&self) -> bool {
        matches!(*self.0.borrow(), State::Open { .. })
    }

    /// Refuses those that may not pass now.
    pub(crate) fn admit(&self) -> Result<(), Status> {
        match *self.0.borrow() {
            State::Open { .. } => Ok(()),
            State::New => Err(refuse(
                Code::FailedPrecondition,
                "GUEST_NOT_CONFIGURED",
                "this guest is not a session's yet",
            )),
            State::Closed { .. } => Err(refuse_for_now(
                "SESSION_RESUMING",
                "a snapshot of this session is taken or restored; try again in a moment",
                RETRY,
            )),
        }
    }

    pub(crate) fn open(&self) {
        let now = Instant::now();
        self.0.send_modify(|state| {
            let before = match *state {
                State::Open { .. } => return,
                State::New => Duration::ZERO,
                State::Closed { before } => before,
            };
            *state = State::Open { since: now, before };
        });
    }

    /// Closes it if it is open, and says whether it was. A new one stays new.
    pub(crate) fn close(&self) -> bool {
        self.0.send_if_modified(|state| {
            let State::Open { since, before } = *state else {
                return false;
            };
            let before = before + since.elapsed();
            *state = State::Closed { before };
            true
        })
    }

    /// For how long it has been open: the time users' processes have had, whatever clocks did over a snapshot.
    fn time(&self) -> Duration {
        match *self.0.borrow() {
            State::New => Duration::ZERO,
            State::Open { since, before } => before + since.elapsed(),
            State::Closed { before } => before,
        }
    }

    /// Sleeps for that much time of an open gate.
    ///
    /// The monotonic clock stands still while a VM does, but some VMMs set it forward on a restore, and it runs while processes are frozen:
    /// a deadline counted by it alone could pass without the process having run.
    pub(crate) async fn sleep(&self, time: Duration) {
        let end = self.time().saturating_add(time);
        let mut state = self.0.subscribe();
        loop {
            // Fails only without a sender, which is here.
            let _ = state
                .wait_for(|state| matches!(state, State::Open { .. }))
                .await;
            let left = end.saturating_sub(self.time());
            if left.is_zero() {
                return;
            }
            tokio::time::sleep(left).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(30);

    #[tokio::test]
    async fn time_of_a_closed_gate_is_no_time() {
        let gate = Gate::left(Stand::New);
        gate.open();
        let began = Instant::now();
        let mut sleep = std::pin::pin!(gate.sleep(SHORT * 4));
        assert!(tokio::time::timeout(SHORT, &mut sleep).await.is_err());
        assert!(gate.close());
        assert!(
            tokio::time::timeout(SHORT * 6, &mut sleep).await.is_err(),
            "it slept through a closed gate"
        );
        gate.open();
        sleep.await;
        assert!(began.elapsed() >= SHORT * 10);
    }

    #[tokio::test]
    async fn a_gate_that_closed_and_opened_unseen_counts_as_well() {
        let gate = Gate::left(Stand::New);
        gate.open();
        let began = Instant::now();
        let mut sleep = std::pin::pin!(gate.sleep(SHORT));
        assert!(futures::poll!(&mut sleep).is_pending());
        gate.close();
        std::thread::sleep(SHORT * 2);
        gate.open();
        sleep.await;
        assert!(began.elapsed() >= SHORT * 3);
    }

    #[test]
    fn a_new_gate_is_not_closed_by_a_snapshot() {
        let gate = Gate::left(Stand::New);
        assert!(!gate.close() && gate.is_new());
        assert_eq!(gate.admit().unwrap_err().code(), Code::FailedPrecondition);
        gate.open();
        assert!(gate.is_open() && gate.close() && !gate.close());
        assert_eq!(gate.admit().unwrap_err().code(), Code::Unavailable);
    }
}
