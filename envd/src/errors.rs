//! How envd says no: a gRPC status with `google.rpc.ErrorInfo` of the same domain as everywhere in Sandmesh.

use std::{collections::HashMap, io, time::Duration};

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

const DOMAIN: &str = "sandmesh.dev";
/// A message travels in HTTP/2 headers, percent-encoded and once more in the details, and those are bounded; what callers name is not.
const LONGEST_MESSAGE: usize = 1024;

/// A status with a stable word.
pub(crate) fn refuse(code: Code, reason: &str, message: impl Into<String>) -> Status {
    refuse_with(code, reason, message, &[])
}

/// A status with a stable word, and facts for programs.
pub(crate) fn refuse_with(
    code: Code,
    reason: &str,
    message: impl Into<String>,
    facts: &[(&str, String)],
) -> Status {
    let facts = facts
        .iter()
        .map(|(name, fact)| ((*name).to_owned(), fact.clone()));
    let details = ErrorDetails::with_error_info(reason, DOMAIN, facts.collect::<HashMap<_, _>>());
    Status::with_error_details(code, short(message.into()), details)
}

/// `UNAVAILABLE`, but not for long.
pub(crate) fn refuse_for_now(reason: &str, message: &str, retry: Duration) -> Status {
    let mut details = ErrorDetails::with_error_info(reason, DOMAIN, HashMap::new());
    details.set_retry_info(Some(retry));
    Status::with_error_details(Code::Unavailable, message, details)
}

/// The beginning of a message, if it is too long.
fn short(mut message: String) -> String {
    if message.len() > LONGEST_MESSAGE {
        message.truncate(message.floor_char_boundary(LONGEST_MESSAGE));
        message.push('…');
    }
    message
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
        io::ErrorKind::ReadOnlyFilesystem => (Code::FailedPrecondition, "FILESYSTEM_READ_ONLY"),
        io::ErrorKind::CrossesDevices => (Code::FailedPrecondition, "PATH_ON_ANOTHER_FILESYSTEM"),
        _ if error.raw_os_error() == Some(nix::libc::ELOOP) => {
            (Code::FailedPrecondition, "PATH_LINK_LOOP")
        }
        _ => (Code::Unknown, "IO_ERROR"),
    };
    refuse(code, reason, format!("{path}: {error}"))
}
