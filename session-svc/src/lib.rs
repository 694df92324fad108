//! session-svc: the life of sessions, where they run, and the registry of nodes. Postgres is the truth; any number of replicas.
//!
//! A create goes [`api`] -> [`sessions`] -> [`placement`] (which node) -> [`store`] (the row, with its events) -> the node ->
//! [`store`] again (Running). [`lifecycle`] decides what may follow what. [`reconcile`] finishes what a dead replica began, and
//! ends what is over; [`audit`] compares what nodes host with what they should. A pause, resume, fork, checkpoint or rollback goes the
//! same way: row, node, row. The events of all sessions are one ordered feed (`store/events.rs`): [`watch`] sends it to clients and
//! [`catalog`] writes it to Redis; [`changes`] only says that there is something new in it.

pub mod api;
mod app;
pub mod audit;
pub mod catalog;
pub mod changes;
mod config;
pub mod errors;
pub mod lifecycle;
pub mod nodes;
pub mod placement;
pub mod reconcile;
pub mod session;
pub mod sessions;
pub mod store;
pub mod watch;

pub use app::{App, AppError};
pub use config::Config;
