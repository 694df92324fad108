//! What envd promises those who call it, each promise under attack: the real binary, over the guest link's framing, as the init
//! of a PID namespace of its own (so these tests need root, as envd does).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod crashes;
mod files;
mod gate;
mod ports;
mod processes;
mod rights;
mod snapshots;
mod streams;
mod system;
mod terminals;
mod trees;
mod uploads;
mod watches;
mod web;
mod world;
