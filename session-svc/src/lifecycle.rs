//! What may happen to a session, and what follows. Pure: no I/O, no clock.
//!
//! ```text
//! Pending -> Starting -> Running -> (Pausing -> Paused -> Resuming -> Running)* -> Stopping -> Stopped
//!                \           \__________________________________________/   \
//!                 `-> Failed <- whatever breaks                              Lost <- the node is gone
//! ```
//! Final states are never left. Pausing and what follows it have their places here; nothing enters them yet.

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
    use Happening::{Broke, NodeGone, StartAsked, StartDone, StopAsked, StopDone};
    use State::{Failed, Lost, Pending, Running, Starting, Stopped, Stopping};
    match (state, happening) {
        (Pending, StartAsked) => Ok(Step::Move(Starting)),
        (Starting, StartAsked) | (Running, StartDone) | (Stopping, StopAsked) => Ok(Step::Nothing),
        (Starting, StartDone) => Ok(Step::Move(Running)),
        // Stopping twice is stopping once, and nothing can be done to what has ended.
        (ended, StopAsked | StopDone | Broke | NodeGone) if ended.is_final() => Ok(Step::Nothing),
        (_, StopAsked) => Ok(Step::Move(Stopping)),
        (Stopping, StopDone | Broke) => Ok(Step::Move(Stopped)),
        (_, Broke) => Ok(Step::Move(Failed)),
        (_, NodeGone) => Ok(Step::Move(Lost)),
        (other, StartAsked | StartDone | StopDone) => Err(Denied::WrongState(other)),
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
            Just(Happening::StopAsked),
            Just(Happening::StopDone),
            Just(Happening::Broke),
            Just(Happening::NodeGone),
        ]
    }

    #[test]
    fn the_usual_life() {
        let mut state = State::Pending;
        for happening in [
            Happening::StartAsked,
            Happening::StartDone,
            Happening::StopAsked,
            Happening::StopDone,
        ] {
            let Ok(Step::Move(next)) = decide(state, happening) else {
                panic!("{state:?} {happening:?}")
            };
            state = next;
        }
        assert_eq!(state, State::Stopped);
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
        fn running_is_only_reached_by_a_start(events in prop::collection::vec(happenings(), 0..40)) {
            let mut state = State::Pending;
            for happening in events {
                if let Ok(Step::Move(next)) = decide(state, happening) {
                    prop_assert!(next != State::Running || happening == Happening::StartDone);
                    state = next;
                }
            }
        }
    }
}
