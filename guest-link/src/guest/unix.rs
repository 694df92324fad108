//! The channel as a unix socket, for tests and for an envd outside a VM. Each connection is one host; the next waits until
//! the one before is gone, as with QEMU's character devices.

use std::{io, path::Path};

use tokio::net::{UnixListener, UnixStream};

use super::Channel;

/// Listens where QEMU would.
#[derive(Debug)]
pub struct UnixChannel {
    listener: UnixListener,
    accepted: Option<UnixStream>,
}

impl UnixChannel {
    /// Binds the socket; a file left by one before is in the way and an error.
    pub fn bind(path: &Path) -> io::Result<Self> {
        Ok(Self {
            listener: UnixListener::bind(path)?,
            accepted: None,
        })
    }
}

impl Channel for UnixChannel {
    type Stream = UnixStream;

    fn connected(&mut self) -> io::Result<Option<UnixStream>> {
        Ok(self.accepted.take())
    }

    async fn wait(&mut self) -> io::Result<()> {
        let (stream, _) = self.listener.accept().await?;
        self.accepted = Some(stream);
        Ok(())
    }
}
