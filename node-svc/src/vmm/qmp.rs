//! The two words of QMP this driver needs (docs/interop/qmp-spec.rst of QEMU): read the console's ring buffer, and quit.

use std::{io, path::Path, time::Duration};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::UnixStream,
};

const TIMEOUT: Duration = Duration::from_secs(2);
/// An answer is at most the ring buffer, JSON-escaped, and some words.
const LONGEST_ANSWER: u64 = 1 << 20;

/// Connects, negotiates, runs one command and returns what it returned.
pub(super) async fn execute(socket: &Path, command: &str, arguments: Value) -> io::Result<Value> {
    let run = async {
        let mut stream = BufReader::new(UnixStream::connect(socket).await?);
        read_line(&mut stream).await?;
        send(&mut stream, &json!({"execute": "qmp_capabilities"})).await?;
        send(
            &mut stream,
            &json!({"execute": command, "arguments": arguments}),
        )
        .await
    };
    tokio::time::timeout(TIMEOUT, run)
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

async fn send(stream: &mut BufReader<UnixStream>, message: &Value) -> io::Result<Value> {
    stream
        .get_mut()
        .write_all(format!("{message}\n").as_bytes())
        .await?;
    loop {
        let answer = read_line(stream).await?;
        if let Some(value) = answer.get("return") {
            return Ok(value.clone());
        }
        if let Some(error) = answer.get("error") {
            return Err(io::Error::other(error.to_string()));
        }
        // Anything else is an event.
    }
}

async fn read_line(stream: &mut BufReader<UnixStream>) -> io::Result<Value> {
    let mut line = String::new();
    if stream.take(LONGEST_ANSWER).read_line(&mut line).await? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    serde_json::from_str(&line).map_err(io::Error::from)
}
