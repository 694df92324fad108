//! The guest as a whole: what it is, what it uses, what was said in it.

use std::time::Duration;

use proto::envd::v1::{
    GetInfoRequest, GuestInfo, StreamLogsRequest, StreamLogsResponse, StreamMetricsRequest,
    StreamMetricsResponse,
};

use crate::{Error, Sandbox, resumed::Resumed};

impl Sandbox {
    /// What the guest is.
    pub async fn info(&self) -> Result<GuestInfo, Error> {
        let answer = self.system().get_info(GetInfoRequest {}).await?;
        answer.into_inner().info.ok_or(Error::Incomplete("info"))
    }

    /// What the guest uses: at once, and then once per interval (100 ms at least).
    pub fn metrics(&self, interval: Duration) -> Metrics {
        Metrics {
            sandbox: self.clone(),
            interval,
            stream: Resumed::default(),
        }
    }

    /// What the guest's kernel and envd have said after that message (0: from the oldest kept), and if followed, what they will.
    pub fn logs(&self, after_sequence: u64, follow: bool) -> Logs {
        Logs {
            sandbox: self.clone(),
            seen: after_sequence,
            follow,
            stream: Resumed::default(),
        }
    }
}

/// What the guest uses; taken up again when the connection breaks.
pub struct Metrics {
    sandbox: Sandbox,
    interval: Duration,
    stream: Resumed<StreamMetricsResponse>,
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Metrics")
            .field("interval", &self.interval)
            .finish_non_exhaustive()
    }
}

impl Metrics {
    /// The next measurement. It ends by an error only.
    pub async fn next(&mut self) -> Result<StreamMetricsResponse, Error> {
        let request = StreamMetricsRequest {
            interval: prost_types::Duration::try_from(self.interval).ok(),
        };
        let sandbox = &self.sandbox;
        let open = async || sandbox.system().stream_metrics(request).await;
        let next = self.stream.next(open).await?;
        let (measured, _) = next.ok_or(Error::Incomplete("the rest of the measurements"))?;
        Ok(measured)
    }
}

/// Messages of the guest; taken up again, after the last that came, when the connection breaks.
pub struct Logs {
    sandbox: Sandbox,
    seen: u64,
    follow: bool,
    stream: Resumed<StreamLogsResponse>,
}

impl std::fmt::Debug for Logs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Logs")
            .field("seen", &self.seen)
            .field("follow", &self.follow)
            .finish_non_exhaustive()
    }
}

impl Logs {
    /// The next message, each once; how many are lost before it, it says itself. `None` at the end, unless they are followed.
    pub async fn next(&mut self) -> Result<Option<StreamLogsResponse>, Error> {
        let request = StreamLogsRequest {
            after_sequence: self.seen,
            follow: Some(self.follow),
        };
        let sandbox = &self.sandbox;
        let open = async || sandbox.system().stream_logs(request).await;
        let next = self.stream.next(open).await?;
        Ok(next.map(|(message, _)| {
            self.seen = message.sequence;
            message
        }))
    }
}
