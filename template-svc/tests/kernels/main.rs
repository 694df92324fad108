//! Guests boot what is imported: a kernel and its modules are looked at before, whatever is said of them, and what cannot be booted is refused with
//! what it lacks.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../fresh/mod.rs"]
mod fresh;
mod made;

mod images;
mod modules;
mod service;
