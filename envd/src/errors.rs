//! How envd says no: a gRPC status with `google.rpc.ErrorInfo` of the same domain as everywhere in Sandmesh.

use std::{collections::HashMap, io};

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

const DOMAIN: &str = "sandmesh.dev";

/// A status with a stable word.
pub(crate) fn refuse(code: Code, reason: &str, message: impl Into<String>) -> Status {
    let details = ErrorDetails::with_error_info(reason, DOMAIN, HashMap::new());
    Status::with_error_details(code, message, details)
}

/// `INVALID_ARGUMENT` that names the field.
pub(crate) fn invalid(field: &str, description: impl Into<String>) -> Status {
    let description = description.into();
    let mut details = ErrorDetails::with_error_info("INVALID_ARGUMENT", DOMAIN, HashMap::new());
    details.add_bad_request_violation(field, &description);
    Status::with_error_details(
        Code::InvalidArgument,
        format!("{field}: {description}"),
        details,
    )
}

/// `UNIMPLEMENTED` for what a later version brings.
pub(crate) fn not_yet(what: &str) -> Status {
    refuse(
        Code::Unimplemented,
        "NOT_YET_AVAILABLE",
        format!("{what} is not available in this version"),
    )
}

/// What the kernel said about a path.
pub(crate) fn path_error(path: &str, error: &io::Error) -> Status {
    let (code, reason) = match error.kind() {
        io::ErrorKind::NotFound => (Code::NotFound, "PATH_NOT_FOUND"),
        io::ErrorKind::PermissionDenied => (Code::PermissionDenied, "PATH_PERMISSION_DENIED"),
        io::ErrorKind::AlreadyExists => (Code::AlreadyExists, "PATH_EXISTS"),
        io::ErrorKind::NotADirectory => (Code::FailedPrecondition, "PATH_NOT_A_DIRECTORY"),
        io::ErrorKind::IsADirectory => (Code::FailedPrecondition, "PATH_IS_A_DIRECTORY"),
        io::ErrorKind::DirectoryNotEmpty => (Code::FailedPrecondition, "DIRECTORY_NOT_EMPTY"),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            (Code::ResourceExhausted, "DISK_FULL")
        }
        io::ErrorKind::InvalidFilename | io::ErrorKind::InvalidInput => {
            (Code::InvalidArgument, "PATH_INVALID")
        }
        _ => (Code::Unknown, "IO_ERROR"),
    };
    refuse(code, reason, format!("{path}: {error}"))
}
