//! Real servers for tests: a private [`Postgres`] and a private [`Redis`] on unix sockets in a temporary folder, and a private
//! [`Registry`] of images on the loopback.
//!
//! Each value is one server of its own, so tests may stop, kill and restart it without others noticing. It ends when the value
//! is dropped, and with the test process however that ends: the kernel sends the signal ([`process`]). All calls block; none
//! takes longer than [`PATIENCE`] plus the server's own time.

#![allow(clippy::missing_errors_doc)]

mod postgres;
mod process;
mod redis;
mod registry;

use std::{io, path::PathBuf, time::Duration};

pub use postgres::{Durability, Postgres};
pub use redis::Redis;
pub use registry::{PASSWORD, Registry, USER};

/// How long a server has to start or stop.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A server for a test cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum TestbedError {
    /// The program is not installed.
    #[error("{0} is not installed: run deploy/install test")]
    Missing(&'static str),
    /// A file or process failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// A program ended with an error.
    #[error("{what} failed: {output}")]
    Failed {
        /// Which.
        what: String,
        /// What it said.
        output: String,
    },
    /// The server was not ready, or not gone, in time.
    #[error("{what} took too long; its log is {log}")]
    Slow {
        /// What was waited for.
        what: &'static str,
        /// Where to look.
        log: PathBuf,
    },
}

fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> TestbedError {
    let what = what.into();
    move |source| TestbedError::Io { what, source }
}
