//! A stream that is opened again when its connection breaks.

use std::time::Duration;

use tonic::{Response, Status, Streaming};

use crate::Error;

pub(crate) const RETRIES: u32 = 30;
const FIRST_WAIT: Duration = Duration::from_millis(50);
const LONGEST_WAIT: Duration = Duration::from_secs(2);

/// How long to wait after so many failures in a row before the next attempt.
pub(crate) fn wait_after(failures: u32) -> Duration {
    let wait = FIRST_WAIT.saturating_mul(1 << failures.min(10));
    wait.min(LONGEST_WAIT)
}

/// What has been opened, if anything is.
pub(crate) struct Resumed<T> {
    stream: Option<Streaming<T>>,
    is_new: bool,
    failures: u32,
}

impl<T> Default for Resumed<T> {
    fn default() -> Self {
        Self {
            stream: None,
            is_new: false,
            failures: 0,
        }
    }
}

impl<T> Resumed<T> {
    /// The next message, and whether it is the first of a stream that `open` gave; `None` at the stream's end. Cancel-safe if `open` is.
    pub(crate) async fn next(
        &mut self,
        open: impl AsyncFn() -> Result<Response<Streaming<T>>, Status>,
    ) -> Result<Option<(T, bool)>, Error> {
        loop {
            let failed = match &mut self.stream {
                Some(stream) => match stream.message().await {
                    Ok(message) => {
                        self.failures = 0;
                        let is_first = std::mem::take(&mut self.is_new);
                        return Ok(message.map(|message| (message, is_first)));
                    }
                    Err(status) => status,
                },
                None => match open().await {
                    Ok(answer) => {
                        self.stream = Some(answer.into_inner());
                        self.is_new = true;
                        continue;
                    }
                    Err(status) => status,
                },
            };
            self.stream = None;
            let failed = Error::from(failed);
            if !failed.is_interruption() || self.failures == RETRIES {
                return Err(failed);
            }
            let wait = wait_after(self.failures);
            self.failures += 1;
            tokio::time::sleep(wait).await;
        }
    }
}
