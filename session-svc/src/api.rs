//! The gRPC services: conversion and nothing else.

mod fields;
mod limits;
mod registry;
mod session;

pub use registry::Registry;
pub use session::SessionApi;
