//! session-svc as a whole, against a real Postgres and Redis of its own, with nodes and a template service that only pretend.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod checkpoint;
mod feed;
mod fork;
mod life;
mod node;
mod outages;
mod pause;
mod registry;
mod settings;
mod watcher;
mod world;
