//! envoy-control: what Envoy is told.
//!
//! [`bootstrap`] renders the file it starts from: listener, routes, clusters, how the home tag is read. [`nodes`] turns the
//! registry into endpoints, [`xds`] serves them over ADS. Nothing here grows with sessions.

mod app;
pub mod bootstrap;
mod config;
pub mod nodes;
pub mod xds;

pub use app::{App, AppError};
pub use config::Config;
