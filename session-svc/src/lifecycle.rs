//! What may happen to a session, and what follows. Pure: no I/O, no clock.
//!
//! ```text
//! Pending -> Starting -> Running -> Pausing -> Paused -> Resuming -> Running
//!                 \       ^   ^       |          ^ \________|    \
//!                  \      |   `-------'          `-- failed      Stopping -> Stopped
//!                   \     `- a pause that failed                 Lost <- the node is gone
//!                    `-> Failed <- whatever breaks
//! ```
//! - A pause that fails leaves the session Running, a resume that fails leaves it Paused with what is stored.
//! - A rollback goes Running or Paused -> Resuming -> Running; if it fails, back to where it came from.
//! - Asking for a pause while one is under way joins it; so does asking for a resume. A resume of what runs is a success, so two
//!   resumes are one however they meet. A pause of what is Paused is denied: what its caller saw of the session is older than that.
//! - The node is the authority on which of the two it is, Running or stored: [`Happening::Runs`] and [`Happening::Stored`] are
//!   answers to calls as well as what audits find.
//! - Every living session can be stopped. Final states are never left.

use proto::session::v1::SessionState as Wire;

/// Where a session is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    /// Accepted, no node yet.
    Pending,
    /// A node starts it.
    Starting,
    /// Ready.
    Running,
    /// Being stored.
    Pausing,
    /// Stored.
    Paused,
    /// Being continued.
    Resuming,
    /// Being taken down.
    Stopping,
    /// Ended as asked. Final.
    Stopped,
    /// Ended by an error. Final.
    Failed,
    /// Its node is gone. Final.
    Lost,
}

/// Something that happens to a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Happening {
    /// A node was chosen and asked.
    StartAsked,
    /// The node says it runs.
    StartDone,
    /// A client, the deadline or an operator wants it paused.
    PauseAsked,
    /// A client, or a call that reached it, wants it to go on.
    ResumeAsked,
    /// A client wants it back at a checkpoint.
    RollbackAsked,
    /// The node says that it runs: resumed, rolled back, or never paused.
    Runs,
    /// The node says that it is stored: paused, or not resumed.
    Stored,
    /// A client, the deadline or the reconciler wants it stopped.
    StopAsked,
    /// The node says nothing of it is left.
    StopDone,
    /// The node says it ended by an error, or refused to start it.
    Broke,
    /// Its node was declared dead, or came back without it.
    NodeGone,
}

/// What follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The session moves to this state.
    Move(State),
    /// Nothing changes: it has happened already.
    Nothing,
}

/// Why something may not happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// Not in this state.
    #[error("a session that is {0:?} cannot do that")]
    WrongState(State),
}

impl State {
    /// Whether it is never left.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Stopped | Self::Failed | Self::Lost)
    }

    /// All states.
    pub const ALL: [Self; 10] = [
        Self::Pending,
        Self::Starting,
        Self::Running,
        Self::Pausing,
        Self::Paused,
        Self::Resuming,
        Self::Stopping,
        Self::Stopped,
        Self::Failed,
        Self::Lost,
    ];

    /// As on the wire and in the database.
    pub fn wire(self) -> Wire {
        match self {
            Self::Pending => Wire::Pending,
            Self::Starting => Wire::Starting,
            Self::Running => Wire::Running,
            Self::Pausing => Wire::Pausing,
            Self::Paused => Wire::Paused,
            Self::Resuming => Wire::Resuming,
            Self::Stopping => Wire::Stopping,
            Self::Stopped => Wire::Stopped,
            Self::Failed => Wire::Failed,
            Self::Lost => Wire::Lost,
        }
    }

    /// From the wire; `None` for a number that is no state.
    pub fn from_wire(number: i32) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|state| state.wire() as i32 == number)
    }
}

/// What a happening does to a session in this state.
pub fn decide(state: State, happening: Happening) -> Result<Step, Denied> {
    use Happening::{
        Broke, NodeGone, PauseAsked, ResumeAsked, RollbackAsked, Runs, StartAsked, StartDone,
        StopAsked, StopDone, Stored,
    };
    use State::{
        Failed, Lost, Paused, Pausing, Pending, Resuming, Running, Starting, Stopped, Stopping,
    };
    match (state, happening) {
        (Pending, StartAsked) => Ok(Step::Move(Starting)),
        (Starting, StartDone) | (Pausing | Paused | Resuming, Runs) => Ok(Step::Move(Running)),
        (Running, PauseAsked) => Ok(Step::Move(Pausing)),
        (Paused, ResumeAsked) | (Running | Paused, RollbackAsked) => Ok(Step::Move(Resuming)),
        (Running | Pausing | Resuming, Stored) => Ok(Step::Move(Paused)),
        (Starting, StartAsked)
        | (Running, StartDone | ResumeAsked | Runs)
        // Somebody else noted the start, and it went on from there.
        | (Pausing | Paused | Resuming, StartDone)
        | (Pausing, PauseAsked)
        | (Paused, Stored)
        | (Resuming, ResumeAsked)
        | (Stopping, StopAsked) => Ok(Step::Nothing),
        // Stopping twice is stopping once, and nothing can be done to what has ended.
        (ended, StopAsked | StopDone | Broke | NodeGone) if ended.is_final() => Ok(Step::Nothing),
        (_, StopAsked) => Ok(Step::Move(Stopping)),
        (Stopping, StopDone | Broke) => Ok(Step::Move(Stopped)),
        (_, Broke) => Ok(Step::Move(Failed)),
        (_, NodeGone) => Ok(Step::Move(Lost)),
        (
            other,
            StartAsked | StartDone | PauseAsked | ResumeAsked | RollbackAsked | Runs | Stored
            | StopDone,
        ) => Err(Denied::WrongState(other)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn happenings() -> impl Strategy<Value = Happening> {
        prop_oneof![
            Just(Happening::StartAsked),
            Just(Happening::StartDone),
            Just(Happening::PauseAsked),
            Just(Happening::ResumeAsked),
            Just(Happening::RollbackAsked),
            Just(Happening::Runs),
            Just(Happening::Stored),
            Just(Happening::StopAsked),
            Just(Happening::StopDone),
            Just(Happening::Broke),
            Just(Happening::NodeGone),
        ]
    }

    /// Where a life leads, which nothing in it is denied.
    fn after(happenings: &[Happening]) -> State {
        happenings.iter().fold(State::Pending, |state, happening| {
            match decide(state, *happening) {
                Ok(Step::Move(next)) => next,
                Ok(Step::Nothing) => state,
                Err(denied) => panic!("{happening:?}: {denied}"),
            }
        })
    }

    #[test]
    fn the_usual_life() {
        use Happening::{
            PauseAsked, ResumeAsked, RollbackAsked, Runs, StartAsked, StartDone, StopAsked,
            StopDone, Stored,
        };
        let running = [StartAsked, StartDone];
        let and = |more: &[Happening]| after(&[&running, more].concat());
        assert_eq!(and(&[StopAsked, StopDone]), State::Stopped);
        assert_eq!(and(&[PauseAsked, Stored]), State::Paused);
        assert_eq!(
            and(&[PauseAsked, Stored, ResumeAsked, Runs]),
            State::Running
        );
        assert_eq!(and(&[RollbackAsked, Runs]), State::Running);
        assert_eq!(
            and(&[PauseAsked, Stored, RollbackAsked, Runs]),
            State::Running
        );
        // What fails leaves the session as it was.
        assert_eq!(and(&[PauseAsked, Runs]), State::Running);
        assert_eq!(
            and(&[PauseAsked, Stored, ResumeAsked, Stored]),
            State::Paused
        );
    }

    #[test]
    fn a_pause_or_resume_under_way_is_joined_and_a_pause_of_the_paused_is_denied() {
        use Happening::{PauseAsked, ResumeAsked, RollbackAsked};
        assert_eq!(decide(State::Pausing, PauseAsked), Ok(Step::Nothing));
        assert_eq!(decide(State::Resuming, ResumeAsked), Ok(Step::Nothing));
        assert_eq!(decide(State::Running, ResumeAsked), Ok(Step::Nothing));
        for (state, happening) in [
            (State::Paused, PauseAsked),
            (State::Resuming, PauseAsked),
            (State::Pausing, ResumeAsked),
            (State::Pausing, RollbackAsked),
            (State::Resuming, RollbackAsked),
        ] {
            assert_eq!(decide(state, happening), Err(Denied::WrongState(state)));
        }
        // Two who waited for one start: the later of them changes nothing.
        for state in [State::Pausing, State::Paused, State::Resuming] {
            assert_eq!(decide(state, Happening::StartDone), Ok(Step::Nothing));
        }
        // Neither start nor end can be mistaken for a pause or resume.
        for state in [State::Pending, State::Starting, State::Stopping] {
            for happening in [PauseAsked, ResumeAsked, RollbackAsked] {
                assert_eq!(decide(state, happening), Err(Denied::WrongState(state)));
            }
        }
    }

    #[test]
    fn states_survive_the_wire() {
        for state in State::ALL {
            assert_eq!(State::from_wire(state.wire() as i32), Some(state));
        }
        assert_eq!(State::from_wire(0), None);
    }

    proptest! {
        #[test]
        fn final_states_are_never_left(events in prop::collection::vec(happenings(), 0..40)) {
            let mut state = State::Pending;
            for happening in events {
                if let Ok(Step::Move(next)) = decide(state, happening) {
                    prop_assert!(!state.is_final(), "{state:?} was left by {happening:?}");
                    prop_assert_ne!(state, next);
                    state = next;
                }
            }
        }

        #[test]
        fn from_every_living_state_a_stop_ends_it(events in prop::collection::vec(happenings(), 0..20)) {
            let mut state = State::Pending;
            for happening in events.into_iter().chain([Happening::StopAsked, Happening::StopDone]) {
                if let Ok(Step::Move(next)) = decide(state, happening) {
                    state = next;
                }
            }
            prop_assert!(state.is_final());
        }

        #[test]
        fn states_that_a_node_vouches_for_are_only_reached_by_its_word(
            events in prop::collection::vec(happenings(), 0..60),
        ) {
            let mut state = State::Pending;
            for happening in events {
                if let Ok(Step::Move(next)) = decide(state, happening) {
                    match next {
                        State::Running => prop_assert!(matches!(happening, Happening::StartDone | Happening::Runs)),
                        State::Paused => prop_assert_eq!(happening, Happening::Stored),
                        State::Pausing => prop_assert_eq!((state, happening), (State::Running, Happening::PauseAsked)),
                        State::Resuming => prop_assert!(matches!(state, State::Running | State::Paused)),
                        _ => {}
                    }
                    state = next;
                }
            }
        }

        #[test]
        fn a_node_can_always_settle_a_pause_or_resume(
            events in prop::collection::vec(happenings(), 0..60),
        ) {
            let mut state = State::Pending;
            for happening in events {
                if let Ok(Step::Move(next)) = decide(state, happening) {
                    state = next;
                }
                if matches!(state, State::Pausing | State::Resuming) {
                    prop_assert_eq!(decide(state, Happening::Runs), Ok(Step::Move(State::Running)));
                    prop_assert_eq!(decide(state, Happening::Stored), Ok(Step::Move(State::Paused)));
                }
            }
        }
    }
}
