//! node-svc: the agent on each node. It runs microVMs and answers for them.
//!
//! A start comes in by [`api`], is admitted by [`hosted`], and is carried out by the session's own task in [`driver`]: artifacts
//! ([`artifact`], kept within a bound by [`cache`]), network place ([`slot`]), writable disk ([`disk`]), VMM ([`vmm`]), then envd is told whose it is ([`guest`]).
//! Streams and ports come in by [`ingress`], which asks [`hosted`], and for sessions that are elsewhere the [`catalog`].
//! Their trace spans come out by `spans`, and what they say is kept by [`logs`]. [`register`] keeps the node in the registry; [`journal`] is what the next node-svc knows of this one.

pub mod api;
mod app;
pub mod artifact;
pub mod cache;
pub mod catalog;
mod config;
pub mod disk;
pub mod driver;
pub mod guest;
pub mod guest_image;
pub mod hosted;
pub mod ingress;
pub mod journal;
pub mod logs;
mod ready;
pub mod register;
pub mod slot;
pub mod snapshot;
pub mod snapshot_store;
mod spans;
pub mod stored;
pub mod vmm;
mod work;

pub use app::{App, AppError, clean_up};
pub use config::{Config, VmmChoice};
