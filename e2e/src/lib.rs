//! The whole mesh, for end-to-end tests: real processes, real Envoy, Postgres, Redis and microVMs, in a state folder of its own on
//! free ports, so that any number of meshes run side by side.
//!
//! [`Mesh`] is one deployment, started with the `sandmesh` program under test and taken down when dropped; [`leaks`] is what may not
//! differ before and after, [`builds`] what builds may not leave; [`guest`] is the server that tests run inside; [`images`] makes images; [`Collector`] takes traces, [`Screen`] is a terminal with a person at it.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot be set up has failed

pub mod bench;
pub mod builds;
mod collector;
mod dice;
pub mod guest;
pub mod http;
pub mod images;
pub mod leaks;
mod mesh;
mod screen;

pub use collector::Collector;
pub use dice::Dice;
pub use mesh::{Mesh, Part, sandmesh, small, wait_for};
pub use screen::Screen;

/// A number that can be set by an environment variable, for longer runs by hand.
pub fn how_many(variable: &str, otherwise: u64) -> u64 {
    std::env::var(variable).map_or(otherwise, |text| {
        text.parse()
            .unwrap_or_else(|_| panic!("{variable} is {text:?}, not a number"))
    })
}
