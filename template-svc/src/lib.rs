//! template-svc: what sessions start from. Names and versions in Postgres, files by digest on its disk.
//!
//! A source is uploaded ([`api`]), a build is queued, [`builds`] takes it: [`registry`] fetches an image, [`image`] reads what it is, [`layer`] unpacks it, [`rootfs`] packs it, [`artifact`] keeps the
//! image under its digest, [`store`] publishes the version. Nodes fetch artifacts by digest. [`names`] parses references; [`kernel`] says what guests can boot.

pub mod api;
mod app;
pub mod artifact;
pub mod builds;
pub mod collect;
mod config;
pub mod context;
pub mod dockerfile;
pub mod image;
pub mod kernel;
pub mod layer;
pub mod names;
pub mod quota;
pub mod registry;
pub mod rootfs;
pub mod secrets;
mod sessions;
mod start;
pub mod store;
pub mod uploads;

pub use app::{App, AppError};
pub use config::Config;
pub use registry::TrustedRegistry;
