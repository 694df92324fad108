//! The whole mesh, for end-to-end tests: real processes, real Envoy, Postgres, Redis and microVMs, in a state folder of its own on
//! free ports, so that any number of meshes run side by side.
//!
//! [`Mesh`] is one deployment, started with the `sandmesh` program under test and taken down when dropped; [`leaks`] is what may not
//! differ before and after; [`guest`] is the server that tests run inside; [`Collector`] takes traces.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot be set up has failed

mod collector;
pub mod guest;
pub mod http;
pub mod leaks;
mod mesh;

pub use collector::Collector;
pub use mesh::{Mesh, Part, sandmesh, small, wait_for};
