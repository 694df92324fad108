//! A private Redis that keeps nothing on disk.

use std::{
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::sys::signal::Signal;
use tempfile::TempDir;

use crate::{
    TestbedError,
    postgres::private_folder,
    process::{Server, find},
};

/// A private Redis server.
#[derive(Debug)]
pub struct Redis {
    // Fields drop in this order: the server ends before its folder goes.
    server: Option<Server>,
    folder: TempDir,
    program: PathBuf,
}

impl Redis {
    /// Starts one.
    pub fn start() -> Result<Self, TestbedError> {
        let mut redis = Self {
            server: None,
            folder: private_folder("smre")?,
            program: find("redis-server", &[])?,
        };
        redis.start_again()?;
        Ok(redis)
    }

    /// `redis+unix://...`.
    pub fn url(&self) -> String {
        format!("redis+unix://{}", self.socket().display())
    }

    /// Its socket, for `redis-cli -s`.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("redis.sock")
    }

    /// Ends it; all it held is gone.
    pub fn stop(&mut self) -> Result<(), TestbedError> {
        match self.server.take() {
            Some(server) => server.end(Signal::SIGKILL),
            None => Ok(()),
        }
    }

    /// Stops and starts, empty.
    pub fn restart(&mut self) -> Result<(), TestbedError> {
        self.stop()?;
        self.start_again()
    }

    /// Starts it after [`Redis::stop`], empty, with the same address.
    pub fn start_again(&mut self) -> Result<(), TestbedError> {
        let socket = self.socket();
        // Redis makes its socket anew; an old one would look like a server that does not answer.
        let _ = std::fs::remove_file(&socket);
        let folder = self.folder.path().display().to_string();
        let text = socket.display().to_string();
        let arguments = [
            ["--port", "0"],
            ["--unixsocket", &text],
            ["--save", ""],
            ["--appendonly", "no"],
            ["--dir", &folder],
        ];
        let arguments: Vec<String> = arguments.concat().into_iter().map(str::to_owned).collect();
        let log = self.folder.path().join("log");
        let mut server = Server::start(&self.program, &arguments, None, Signal::SIGKILL, &log)?;
        server.wait_until("the start of redis", || answers(&socket))?;
        self.server = Some(server);
        Ok(())
    }
}

fn answers(socket: &Path) -> bool {
    let ping = || {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        stream.write_all(b"PING\r\n")?;
        let mut answer = [0; 5];
        stream.read_exact(&mut answer)?;
        Ok::<_, std::io::Error>(answer == *b"+PONG")
    };
    ping().unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_answers_again_after_a_restart() {
        let mut redis = Redis::start().unwrap();
        assert!(answers(&redis.socket()));
        redis.stop().unwrap();
        assert!(!answers(&redis.socket()));
        redis.start_again().unwrap();
        assert!(answers(&redis.socket()));
    }
}
