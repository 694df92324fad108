//! The Rust SDK: [`Client`] for the control plane, [`Sandbox`] for one session.
//!
//! ```no_run
//! # async fn demo() -> Result<(), sdk::Error> {
//! let client = sdk::Client::connect("http://127.0.0.1:10080", "smk_...")?;
//! let session = client.create(sdk::NewSession::from_template("base")).await?;
//! let output = client.sandbox(&session)?.run(["echo", "hello"]).await?;
//! assert_eq!(output.stdout, b"hello\n");
//! client.stop(&session.session_id).await?;
//! # Ok(()) }
//! ```

mod client;
mod context;
mod error;
mod files;
mod logs;
mod ports;
mod process;
mod resumed;
mod sandbox;
mod system;

pub use client::{Changes, Client, NewFork, NewSession};
pub use context::BuildContext;
pub use error::Error;
pub use files::{FileUrl, FileWatch};
pub use logs::SessionLogs;
pub use ports::PortWatch;
pub use process::{Command, Event, Exit, Output, Process, Remote};
pub use sandbox::Sandbox;
pub use service_kit::file_url::Use;
pub use system::{Logs, Metrics};
