//! The channel to the guest: Firecracker stands for the guest's vsock by a unix socket (docs/vsock.md of Firecracker). Whoever
//! connects says which port, and reads under which of the host's ports Firecracker knows the connection.

use std::{io, time::Duration};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    time::Instant,
};

use super::jail::JailRoot;

/// `OK 4294967295\n` and some.
const LONGEST_ANSWER: usize = 32;
/// Firecracker gives a guest 2 s to answer a connection (`defs::CONN_REQUEST_TIMEOUT_MS`).
const TRY_LIMIT: Duration = Duration::from_secs(3);
const RETRY: Duration = Duration::from_millis(5);

/// There is no channel.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// Nobody listened, for as long as there was time.
    #[error("nobody listens on port {port} in the guest ({last})")]
    Refused {
        /// Which port.
        port: u32,
        /// How the last try went.
        last: io::Error,
    },
    /// What answered is no Firecracker.
    #[error("the answer to CONNECT {port} is {said:?}, not OK and a port")]
    Garbage {
        /// Which port.
        port: u32,
        /// The answer, or how it began.
        said: String,
    },
}

/// Connects to a port of the guest, which may still boot, until the deadline.
pub async fn connect(
    root: &JailRoot,
    socket: &str,
    port: u32,
    deadline: Instant,
) -> Result<UnixStream, VsockError> {
    loop {
        let limit = deadline.min(Instant::now() + TRY_LIMIT);
        let tried = tokio::time::timeout_at(limit, try_once(root, socket, port)).await;
        let last = match tried {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(Try::Garbage(said))) => {
                let said = String::from_utf8_lossy(&said).into_owned();
                return Err(VsockError::Garbage { port, said });
            }
            Ok(Err(Try::Again(error))) => error,
            Err(late) => late.into(),
        };
        if Instant::now() + RETRY >= deadline {
            return Err(VsockError::Refused { port, last });
        }
        tokio::time::sleep(RETRY).await;
    }
}

enum Try {
    Again(io::Error),
    Garbage(Vec<u8>),
}

impl From<io::Error> for Try {
    fn from(error: io::Error) -> Self {
        Self::Again(error)
    }
}

async fn try_once(root: &JailRoot, socket: &str, port: u32) -> Result<UnixStream, Try> {
    let mut stream = root.connect(socket).await?;
    stream
        .write_all(format!("CONNECT {port}\n").as_bytes())
        .await?;
    // Byte by byte: what follows the line is the guest's.
    let mut line = Vec::with_capacity(LONGEST_ANSWER);
    while line.last() != Some(&b'\n') {
        if line.len() == LONGEST_ANSWER {
            return Err(Try::Garbage(line));
        }
        // It hangs up where nobody listens.
        line.push(stream.read_u8().await?);
    }
    let is_ok = std::str::from_utf8(&line)
        .ok()
        .and_then(|line| line.strip_prefix("OK ")?.strip_suffix('\n'))
        .is_some_and(|port| port.parse::<u32>().is_ok());
    if is_ok {
        Ok(stream)
    } else {
        Err(Try::Garbage(line))
    }
}
