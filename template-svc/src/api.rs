//! The gRPC services: conversion and nothing else.

mod artifact;
mod context;
mod kernel;
mod template;

pub use artifact::ArtifactApi;
pub use kernel::KernelApi;
pub use template::TemplateApi;

use service_kit::errors::{Failure, Reason};
use tonic::Code;

use crate::store::StoreError;

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Database(
                sqlx::Error::Io(_) | sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed,
            ) => {
                tracing::warn!("database unavailable");
                Self::unavailable(
                    Reason::DATABASE_UNAVAILABLE,
                    "the database cannot be reached right now; try again",
                )
            }
            StoreError::Database(sqlx::Error::Database(cause))
                if cause
                    .code()
                    .is_some_and(|code| code.starts_with("08") || code.starts_with("57")) =>
            {
                Self::unavailable(
                    Reason::DATABASE_UNAVAILABLE,
                    "the database cannot be reached right now; try again",
                )
            }
            other => {
                tracing::error!(error = %other, "database statement failed");
                Self::new(
                    Code::Internal,
                    Reason::INTERNAL,
                    "something went wrong inside; quote the request ID",
                )
            }
        }
    }
}

impl From<StoreError> for tonic::Status {
    fn from(error: StoreError) -> Self {
        Failure::from(error).into_status()
    }
}
