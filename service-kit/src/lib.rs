//! What every Sandmesh service needs and none of them is about.
//!
//! - [`ids`]: session IDs and the other names that travel between services; parsed once, valid ever after.
//! - [`egress`]: what an entry of a session's egress list may be.
//! - [`errors`]: [`Failure`](errors::Failure), the one way a domain error becomes a gRPC status with `google.rpc` details.
//! - [`kernel_arguments`]: what a template may add to its kernel's command line.
//! - [`file_url`]: addresses of files that carry their own right.
//! - [`address`], [`config`]: where a service listens, and how its settings are read (flags, environment, TOML file).
//! - [`mesh`]: trust between services: the mesh token, who the caller is, and channels that carry both.
//! - [`database`]: Postgres, a schema for each service (feature `database`).
//! - [`serve`]: bind first, then serve gRPC with health, reflection, telemetry, and drain on shutdown.
//! - [`telemetry`]: logs, traces, metrics, and the admin listener that shows them.
//! - [`readiness`]: what may be asked of a port that is waited for.
//! - [`templates`]: hidden names, and what a snapshot is of.
//! - [`request_id`]: the ID a person can quote, carried through every hop.

pub mod address;
pub mod config;
#[cfg(feature = "database")]
pub mod database;
pub mod egress;
pub mod errors;
pub mod file_url;
pub mod ids;
pub mod kernel_arguments;
pub mod mesh;
pub mod readiness;
pub mod request_id;
pub mod serve;
pub mod telemetry;
pub mod templates;
