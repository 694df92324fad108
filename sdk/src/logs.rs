//! Logs of a session, whatever state it is in.

use proto::session::v1::{StreamSessionLogsRequest, StreamSessionLogsResponse};

use crate::{Client, Error, resumed::Resumed};

impl Client {
    /// What is kept of a session's logs after that message (0: from the oldest), also when it is paused or has ended, and if followed, what
    /// comes until it ends.
    pub fn logs(
        &self,
        session_id: impl Into<String>,
        after_sequence: u64,
        follow: bool,
    ) -> SessionLogs {
        SessionLogs {
            client: self.clone(),
            session_id: session_id.into(),
            seen: after_sequence,
            follow,
            stream: Resumed::default(),
        }
    }
}

/// Messages of a session; taken up again, after the last that came, when the connection breaks.
pub struct SessionLogs {
    client: Client,
    session_id: String,
    seen: u64,
    follow: bool,
    stream: Resumed<StreamSessionLogsResponse>,
}

impl std::fmt::Debug for SessionLogs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SessionLogs")
            .field("session_id", &self.session_id)
            .field("seen", &self.seen)
            .field("follow", &self.follow)
            .finish_non_exhaustive()
    }
}

impl SessionLogs {
    /// The next message, each once; how many are lost before it, it says itself. `None` at the end.
    pub async fn next(&mut self) -> Result<Option<StreamSessionLogsResponse>, Error> {
        let request = StreamSessionLogsRequest {
            session_id: self.session_id.clone(),
            after_sequence: self.seen,
            follow: self.follow,
        };
        let client = self.client.clone();
        // It owns what it needs, so that this may be awaited in a task.
        let open = move || {
            let (mut sessions, request) = (client.sessions(), request.clone());
            async move { sessions.stream_session_logs(request).await }
        };
        let next = self.stream.next(open).await?;
        Ok(next.map(|(message, _)| {
            self.seen = message.sequence;
            message
        }))
    }
}
