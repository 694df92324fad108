//! From Starting to Running, on the first node that has room.

use std::time::Duration;

use proto::{node::v1::StartSessionRequest, template::v1::Template};
use service_kit::{
    errors::reason_of,
    ids::{NodeId, SessionId},
};
use tonic::{Code, Request, Status};

use super::{
    FIRST_VERSION, Happening, Need, SessionError, Sessions, beginning, node_call::is_broken,
};
use crate::{
    lifecycle::State,
    nodes::Placed,
    placement::{Candidate, Free},
    session::{EndReason, Micros, Session, access_token_sha256},
    store::NewEvent,
};

/// How many nodes are tried before a create is given up.
const PLACEMENT_TRIES: usize = 3;
/// How long a node that did not answer a start has for a stop before the next one is tried.
const LAST_CALL: Duration = Duration::from_secs(2);

/// How a node answered a start.
enum Start {
    Runs,
    /// It has no room: nothing was begun.
    Full,
    Failed(EndReason),
    /// It did not answer, or lost the connection: the session may be there or not.
    Unclear(EndReason),
}

/// Why the last node was no use.
enum Refused {
    Full(Free),
    Unreachable {
        end: EndReason,
        /// Whether it has heard that the session is not wanted there.
        told: bool,
    },
}

impl Sessions {
    /// Takes a Starting session to Running, on another node if need be, or to its end.
    pub(super) async fn start(&self, mut session: Session) -> Result<Session, SessionError> {
        let mut tried: Vec<NodeId> = Vec::new();
        loop {
            let asked = Box::pin(self.ask_to_start(&session));
            let answer = self.holding(&session, asked).await?;
            let refused = match answer {
                Start::Runs => return self.runs(session).await,
                Start::Failed(end) => {
                    let id = session.id.clone();
                    self.fail(session, end.clone()).await?;
                    return Err(SessionError::DidNotStart { id, end });
                }
                Start::Full => Refused::Full(self.nodes.is_full(&session.node_id).await),
                Start::Unclear(end) => {
                    // If it can still be told to stop, the answer becomes clear; if not, its ID is given up with it, and the
                    // node ends it when it is heard of again (audit.rs).
                    let told = self.tell_to_stop(&session, LAST_CALL).await.is_ok();
                    self.nodes.is_full(&session.node_id).await;
                    if end.reason == TIMED_OUT {
                        return self.give_up(session, end, told).await;
                    }
                    Refused::Unreachable { end, told }
                }
            };
            tried.push(session.node_id.clone());
            let need = Need::of(&session.resources);
            let next = match self.nodes.place(need, &tried).await? {
                Placed::On(node) if tried.len() < PLACEMENT_TRIES => node,
                Placed::On(_) | Placed::Nowhere(_) => {
                    return match refused {
                        Refused::Full(most) => {
                            let end = EndReason::new("NO_CAPACITY", "no node had room");
                            self.fail(session, end).await?;
                            Err(SessionError::NoCapacity { most })
                        }
                        Refused::Unreachable { end, told } => {
                            self.give_up(session, end, told).await
                        }
                    };
                }
            };
            session = self.move_to(session, &next, &refused).await?;
        }
    }

    /// The node has it: so it runs, unless somebody wanted it stopped meanwhile.
    pub(super) async fn runs(&self, session: Session) -> Result<Session, SessionError> {
        let event = NewEvent::new("RUNNING", format!("node:{}", session.node_id));
        let asked = session.clone();
        let running = self
            .change(session, Happening::StartDone, event, |session, now| {
                session.start_time = Some(now);
                session.deadline = now.plus(Duration::from_micros(session.timeout.unsigned_abs()));
                session.lease_until = None;
            })
            .await;
        if matches!(
            running,
            Err(SessionError::WrongState { .. } | SessionError::Unknown(_))
        ) {
            // The stop may have reached the node before this start did.
            self.tell_to_stop(&asked, self.limits.stop).await?;
        }
        Self::only_running(running?)
    }

    /// Ends a start that did not come to an end. A node that has not been `told` may still have it: then it is Stopping, so that
    /// the stop is repeated until the node has heard it.
    pub(super) async fn give_up(
        &self,
        session: Session,
        end: EndReason,
        told: bool,
    ) -> Result<Session, SessionError> {
        let id = session.id.clone();
        let timed_out = end.reason == TIMED_OUT;
        if told {
            self.fail(session, end.clone()).await?;
        } else {
            let event =
                NewEvent::new("STOPPING", "reconciler").because(&*end.reason, &*end.message);
            let (end, lease) = (end.clone(), self.limits.lease);
            self.change(session, Happening::StopAsked, event, |session, now| {
                session.request_id = None;
                session.end_reason = Some(end);
                session.lease_until = Some(now.plus(lease));
            })
            .await?;
        }
        Err(if timed_out {
            SessionError::DidNotStart { id, end }
        } else {
            SessionError::NodeUnreachable { id }
        })
    }

    async fn move_to(
        &self,
        session: Session,
        node: &Candidate,
        why: &Refused,
    ) -> Result<Session, SessionError> {
        let now = Micros::now();
        let end = match why {
            Refused::Full(_) => EndReason::new(
                "NODE_FULL",
                "its node had no room; another ID on another node took its place",
            ),
            Refused::Unreachable { .. } => EndReason::new(
                "NODE_UNREACHABLE",
                "its node did not answer; another ID on another node took its place",
            ),
        };
        let event = NewEvent::new("FAILED", "placement").because(&*end.reason, &*end.message);
        let ended = Session {
            state: State::Failed,
            end_time: Some(now),
            end_reason: Some(end),
            lease_until: None,
            version: session.version + 1,
            ..session.clone()
        };
        let moved = Session {
            id: SessionId::random(&node.home_tag),
            node_id: node.node_id.clone(),
            lease_until: Some(now.plus(self.limits.lease)),
            version: FIRST_VERSION,
            state_version: FIRST_VERSION,
            ..session
        };
        let begin = beginning(&moved);
        if !self
            .store
            .move_before_start((&ended, &event), (&moved, &begin))
            .await?
        {
            return Err(SessionError::Contended(ended.id));
        }
        self.changes.tell();
        Ok(moved)
    }

    async fn ask_to_start(&self, session: &Session) -> Result<Start, SessionError> {
        let Some(mut node) = self.nodes.reach(&session.node_id).await? else {
            return Ok(Start::Unclear(EndReason::new(
                "NODE_DEAD",
                "its node is not known any more",
            )));
        };
        let mut request = Request::new(StartSessionRequest {
            session_id: session.id.to_string(),
            template: Some(session.template_spec.clone()),
            resources: Some(session.resources),
            network: Some(session.network.wire()),
            env: session.env.clone().into_iter().collect(),
            access_token_sha256: access_token_sha256(&self.token, &session.id),
            team_id: session.team.to_string(),
            wake_on_request: session.wake_on_request,
        });
        // Its node may have to run the start command first.
        let limit = self.limits.start + readiness_limit(&session.template_spec);
        request.set_timeout(limit);
        let answer = tokio::time::timeout(limit, node.start_session(request)).await;
        let status = match answer {
            Ok(Ok(_)) => return Ok(Start::Runs),
            Ok(Err(status)) => status,
            Err(_) => Status::deadline_exceeded("no answer in time"),
        };
        tracing::warn!(session_id = session.id.short(), node_id = %session.node_id, %status, "a node did not start a session");
        Ok(match status.code() {
            Code::ResourceExhausted => Start::Full,
            Code::DeadlineExceeded | Code::Cancelled => Start::Unclear(EndReason::new(
                TIMED_OUT,
                "its node did not start it in time",
            )),
            Code::Unavailable | Code::Unknown => {
                Start::Unclear(EndReason::new("NODE_UNREACHABLE", status.message()))
            }
            _ if is_broken(&status) => {
                Start::Unclear(EndReason::new("NODE_UNREACHABLE", status.message()))
            }
            _ => {
                let reason = reason_of(&status).unwrap_or_else(|| "START_FAILED".into());
                Start::Failed(EndReason::new(reason, status.message()))
            }
        })
    }
}

/// For how long a template's start command may take until it is ready.
fn readiness_limit(template: &Template) -> Duration {
    let Some(start) = &template.start else {
        return Duration::ZERO;
    };
    let limit = start.readiness.as_ref().and_then(|it| it.timeout);
    let limit = limit.and_then(|limit| Duration::try_from(limit).ok());
    limit.unwrap_or(READINESS)
}

/// Of a start command that says nothing else (template.proto, `Readiness`).
const READINESS: Duration = Duration::from_mins(1);

/// The stable word for a start that took too long.
const TIMED_OUT: &str = "START_TIMEOUT";
