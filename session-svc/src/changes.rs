//! Word that something changed: between the tasks of a replica at once, between replicas by Redis.
//!
//! It carries nothing. Whoever hears it reads the change feed from where it stood; whoever misses it looks again soon anyway, so
//! Redis may be away.

use std::{sync::Arc, time::Duration};

use futures::StreamExt as _;
use redis::aio::ConnectionManager;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// How long a reader waits for word before it looks by itself.
pub const LOOK_ANYWAY: Duration = Duration::from_millis(250);
const RECONNECT: Duration = Duration::from_millis(500);

/// Tells of changes and hears of them.
#[derive(Debug, Clone)]
pub struct Changes {
    /// Counts every change heard of, ours and others'.
    here: Arc<watch::Sender<u64>>,
    /// Counts our own, which are passed on; apart, so that word that comes back is not passed on again.
    ours: Arc<watch::Sender<u64>>,
    channel: Arc<str>,
}

impl Changes {
    /// For the deployment of this prefix.
    pub fn new(prefix: &str) -> Self {
        Self {
            here: Arc::default(),
            ours: Arc::default(),
            channel: format!("{prefix}:changes").into(),
        }
    }

    /// Something was committed.
    pub fn tell(&self) {
        self.here
            .send_modify(|count| *count = count.wrapping_add(1));
        self.ours
            .send_modify(|count| *count = count.wrapping_add(1));
    }

    /// For one reader.
    pub fn listen(&self) -> Listener {
        Listener(self.here.subscribe())
    }

    /// Passes word between this replica and the others until `shutdown`.
    pub async fn run(self, client: redis::Client, shutdown: CancellationToken) {
        let others = self.hear_others(&client);
        let ours = self.tell_others(&client);
        tokio::select! {
            () = shutdown.cancelled() => {}
            never = async { tokio::join!(others, ours) } => match never {},
        }
    }

    async fn hear_others(&self, client: &redis::Client) -> std::convert::Infallible {
        loop {
            match client.get_async_pubsub().await {
                Ok(mut pubsub) => match pubsub.subscribe(&*self.channel).await {
                    Ok(()) => {
                        let mut messages = pubsub.into_on_message();
                        while messages.next().await.is_some() {
                            self.here
                                .send_modify(|count| *count = count.wrapping_add(1));
                        }
                    }
                    Err(error) => tracing::debug!(%error, "cannot subscribe to changes"),
                },
                Err(error) => {
                    tracing::debug!(%error, "redis is away; changes are found by looking");
                }
            }
            tokio::time::sleep(RECONNECT).await;
        }
    }

    async fn tell_others(&self, client: &redis::Client) -> std::convert::Infallible {
        let mut listener = self.ours.subscribe();
        let mut connection: Option<ConnectionManager> = None;
        loop {
            if listener.changed().await.is_err() {
                // The sender lives in `self`.
                std::future::pending::<()>().await;
            }
            if connection.is_none() {
                connection = client.get_connection_manager().await.ok();
            }
            if let Some(redis) = connection.as_mut() {
                let told: Result<i64, _> = redis::cmd("PUBLISH")
                    .arg(&*self.channel)
                    .arg("")
                    .query_async(redis)
                    .await;
                if told.is_err() {
                    connection = None;
                }
            }
        }
    }
}

/// Waits for word.
#[derive(Debug)]
pub struct Listener(watch::Receiver<u64>);

impl Listener {
    /// Returns when something changed, or when it is time to look anyway.
    pub async fn heard(&mut self) {
        // Time running out is the other reason to look.
        let _ = tokio::time::timeout(LOOK_ANYWAY, self.0.changed()).await;
    }
}
