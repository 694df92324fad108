//! The words of QMP this driver needs (docs/interop/qmp-spec.rst of QEMU): one connection, one command at a time.

use std::{io, path::Path, time::Duration};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::UnixStream,
    time::Instant,
};

/// An answer is at most the console's ring buffer, JSON-escaped, and some words.
const LONGEST_ANSWER: u64 = 1 << 20;
const RETRY: Duration = Duration::from_millis(1);

/// A negotiated connection.
#[derive(Debug)]
pub(super) struct Qmp {
    stream: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects until `deadline`; QEMU makes its socket some milliseconds after its start, and there is nothing to wait on but the
    /// file system.
    pub(super) async fn connect(socket: &Path, deadline: Instant) -> io::Result<Self> {
        let stream = loop {
            match UnixStream::connect(socket).await {
                Ok(stream) => break stream,
                Err(error) if Instant::now() >= deadline => return Err(error),
                Err(_) => tokio::time::sleep(RETRY).await,
            }
        };
        let mut qmp = Self {
            stream: BufReader::new(stream),
        };
        let negotiate = async {
            qmp.read_line().await?;
            qmp.send(&json!({"execute": "qmp_capabilities"})).await
        };
        tokio::time::timeout_at(deadline, negotiate).await??;
        Ok(qmp)
    }

    /// Runs one command and returns what it returned.
    pub(super) async fn execute(
        &mut self,
        command: &str,
        arguments: Value,
        limit: Duration,
    ) -> io::Result<Value> {
        let message = json!({"execute": command, "arguments": arguments});
        let answer = tokio::time::timeout(limit, self.send(&message)).await;
        answer?.map_err(|error| io::Error::new(error.kind(), format!("{command}: {error}")))
    }

    async fn send(&mut self, message: &Value) -> io::Result<Value> {
        self.stream
            .get_mut()
            .write_all(format!("{message}\n").as_bytes())
            .await?;
        loop {
            let answer = self.read_line().await?;
            if let Some(value) = answer.get("return") {
                return Ok(value.clone());
            }
            if let Some(error) = answer.get("error") {
                return Err(io::Error::other(error.to_string()));
            }
            // Anything else is an event.
        }
    }

    async fn read_line(&mut self) -> io::Result<Value> {
        let mut line = String::new();
        let mut limited = (&mut self.stream).take(LONGEST_ANSWER);
        if limited.read_line(&mut line).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        serde_json::from_str(&line).map_err(io::Error::from)
    }
}
