//! api-gateway: the public door. Stateless; API keys in Postgres.
//!
//! A call comes in by [`api`], passes [`door`] (its key checked by [`keys`], its deadline set, everything else it brought along
//! dropped), is checked field by field in [`validate`], and goes on to the service that knows. [`store`] holds all SQL.

pub mod api;
mod app;
mod config;
pub mod door;
pub mod keys;
pub mod store;
pub mod validate;

pub use app::{App, AppError};
pub use config::Config;
