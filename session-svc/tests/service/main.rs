//! session-svc as a whole, against a real Postgres and Redis of its own, with nodes and a template service that only pretend.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod feed;
mod life;
mod node;
mod outages;
mod registry;
mod watcher;
mod world;
