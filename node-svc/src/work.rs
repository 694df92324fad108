//! Blocking work on threads of its own, which whoever cleans up can wait for: a future that is dropped leaves its thread at work, and what
//! that still writes would be left behind.

use tokio::task::JoinError;
use tokio_util::task::TaskTracker;

tokio::task_local! {
    static WORK: TaskTracker;
}

/// Runs the future, dropped or not; [`finished`] of the tracker says when all blocking work it began is over.
pub(crate) async fn tracked<F: Future>(tracker: TaskTracker, future: F) -> F::Output {
    WORK.scope(tracker, future).await
}

/// Waits until all work that was begun is over.
pub(crate) async fn finished(tracker: &TaskTracker) {
    tracker.close();
    tracker.wait().await;
}

/// Does something that blocks, on a thread of its own.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, JoinError> {
    let tracker = WORK.try_with(TaskTracker::clone).unwrap_or_default();
    tracker.spawn_blocking(work).await
}

#[cfg(test)]
mod tests {
    use std::{
        sync::mpsc,
        time::{Duration, Instant},
    };

    use super::*;

    #[tokio::test]
    async fn work_of_a_dropped_future_is_waited_for() {
        let tracker = TaskTracker::new();
        let (go, gone) = mpsc::channel::<()>();
        let (done, is_done) = mpsc::channel();
        let work = tracked(
            tracker.clone(),
            blocking(move || {
                gone.recv().unwrap();
                done.send(()).unwrap();
            }),
        );
        assert!(
            tokio::time::timeout(Duration::from_millis(10), work)
                .await
                .is_err()
        );
        go.send(()).unwrap();
        let began = Instant::now();
        finished(&tracker).await;
        assert!(began.elapsed() < Duration::from_secs(10));
        is_done.try_recv().unwrap();
    }
}
