//! What a request for a process asks for: checked, and made whole.

use std::{
    io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use proto::envd::v1::{ResourceLimits, StartRequest, TerminalSize};
use tonic::{Code, Status};

use crate::{
    errors::{invalid, refuse},
    files, identity,
    output::Keeping,
    users::User,
};

const LARGEST_ARGV: usize = 1 << 20;
const KEPT_IN_MEMORY: std::ops::RangeInclusive<u64> = 64 << 10..=16 << 20;
const MOST_KEPT_IN_FILE: u64 = 4 << 30;
const LEAST_MEMORY: u64 = 1 << 20;
const LARGEST_TERMINAL: std::ops::RangeInclusive<u32> = 1..=4096;

pub(super) fn check(request: &StartRequest) -> Result<(), Status> {
    let id = &request.process_id;
    if id.len() > 128
        || !id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
    {
        return Err(invalid(
            "process_id",
            "must be at most 128 characters [A-Za-z0-9._-]",
        ));
    }
    let is_shell = request.argv.is_empty() && request.shell_command.is_empty();
    if is_shell && request.terminal.is_none() {
        return Err(invalid(
            "argv",
            "give argv or shell_command; only with a terminal neither is a login shell",
        ));
    }
    if !request.argv.is_empty() && !request.shell_command.is_empty() {
        return Err(invalid("argv", "give either argv or shell_command"));
    }
    if request.argv.first().is_some_and(String::is_empty) {
        return Err(invalid("argv", "the program's name must not be empty"));
    }
    let nul = |text: &String| text.contains('\0');
    if request.argv.iter().any(nul) || nul(&request.shell_command) {
        return Err(invalid("argv", "must not hold NUL"));
    }
    if request.argv.iter().map(String::len).sum::<usize>() + request.shell_command.len()
        > LARGEST_ARGV
    {
        return Err(invalid("argv", "must be at most 1 MiB in all"));
    }
    if nul(&request.cwd) || request.cwd.len() > 4096 {
        return Err(invalid("cwd", "must be at most 4096 bytes without NUL"));
    }
    if let Some(problem) = identity::problem_of_env(&request.env) {
        return Err(invalid("env", problem));
    }
    if let Some(size) = request.terminal {
        check_size("terminal", size)?;
    }
    if let Some(limits) = &request.limits
        && limits.memory_bytes > 0
        && limits.memory_bytes < LEAST_MEMORY
    {
        return Err(invalid("limits.memory_bytes", "must be at least 1 MiB"));
    }
    let kept = request.output_kept.unwrap_or_default();
    if kept
        .memory_bytes
        .is_some_and(|bytes| !KEPT_IN_MEMORY.contains(&bytes))
    {
        return Err(invalid(
            "output_kept.memory_bytes",
            "must be from 65536 to 16777216",
        ));
    }
    if kept
        .file_bytes
        .is_some_and(|bytes| bytes > MOST_KEPT_IN_FILE)
    {
        return Err(invalid("output_kept.file_bytes", "must be at most 4 GiB"));
    }
    if proto::envd::v1::Backpressure::try_from(request.backpressure).is_err() {
        return Err(invalid("backpressure", "is none of the known ones"));
    }
    if proto::envd::v1::StdinMode::try_from(request.stdin).is_err() {
        return Err(invalid("stdin", "is none of the known ones"));
    }
    if request
        .deadline
        .is_some_and(|deadline| Duration::try_from(deadline).is_err())
    {
        return Err(invalid("deadline", "must not be negative"));
    }
    Ok(())
}

/// A terminal's size, in the field of that name.
pub(super) fn check_size(field: &str, size: TerminalSize) -> Result<(), Status> {
    for (name, count) in [("rows", size.rows), ("cols", size.cols)] {
        if !LARGEST_TERMINAL.contains(&count) {
            return Err(invalid(
                &format!("{field}.{name}"),
                "must be from 1 to 4096",
            ));
        }
    }
    Ok(())
}

/// How much of its output is kept.
pub(super) fn keeping(request: &StartRequest) -> Keeping {
    let usual = Keeping::default();
    let kept = request.output_kept.unwrap_or_default();
    Keeping {
        memory: kept.memory_bytes.unwrap_or(usual.memory),
        file: kept.file_bytes.unwrap_or(usual.file),
        backpressure: request.backpressure(),
    }
}

/// A program as it is asked for.
pub(super) struct Program {
    /// A path, or a name to be looked for.
    pub(super) name: String,
    /// What it is told it is called.
    pub(super) called: String,
    pub(super) arguments: Vec<String>,
}

pub(super) fn program(user: &User, request: &StartRequest) -> Program {
    if let Some((name, arguments)) = request.argv.split_first() {
        return Program {
            name: name.clone(),
            called: name.clone(),
            arguments: arguments.to_vec(),
        };
    }
    let (name, shell) = (user.shell.clone(), user.shell.rsplit('/').next());
    if request.shell_command.is_empty() {
        // By the dash it knows that it is a login shell.
        return Program {
            called: format!("-{}", shell.unwrap_or_default()),
            name,
            arguments: Vec::new(),
        };
    }
    Program {
        called: name.clone(),
        name,
        arguments: vec!["-c".into(), request.shell_command.clone()],
    }
}

/// The limits could not be set.
pub(super) fn limits_error(limits: Option<&ResourceLimits>, error: &io::Error) -> Status {
    if limits.is_some()
        && matches!(
            error.kind(),
            io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied
        )
    {
        return refuse(
            Code::FailedPrecondition,
            "LIMITS_UNAVAILABLE",
            format!("the guest's kernel cannot limit what was asked for: {error}"),
        );
    }
    refuse(
        Code::Internal,
        "START_FAILED",
        format!("the cgroup of a process: {error}"),
    )
}

/// As a shell finds a program: a name with a slash is a path, any other is looked for in PATH.
pub(super) fn look_up(name: &str, env: &[(String, String)], cwd: &Path) -> Result<PathBuf, Status> {
    let mut found_unusable = false;
    let mut usable = |path: &Path| {
        let Ok(metadata) = path.metadata() else {
            return false;
        };
        let fits = metadata.is_file() && metadata.permissions().mode() & 0o111 != 0;
        found_unusable |= !fits;
        fits
    };
    if name.contains('/') {
        let path = cwd.join(name);
        if usable(&path) {
            return Ok(path);
        }
    } else {
        let path = env
            .iter()
            .find_map(|(key, value)| (key == "PATH").then_some(value.as_str()))
            .unwrap_or_default();
        for folder in path.split(':').filter(|folder| !folder.is_empty()) {
            let path = cwd.join(folder).join(name);
            if usable(&path) {
                return Ok(path);
            }
        }
    }
    Err(if found_unusable {
        refuse(
            Code::PermissionDenied,
            "PROGRAM_NOT_EXECUTABLE",
            format!("{name}: permission denied"),
        )
    } else {
        refuse(
            Code::NotFound,
            "PROGRAM_NOT_FOUND",
            format!("{name}: command not found"),
        )
    })
}

pub(super) fn spawn_error(name: &str, user: &User, cwd: &Path, error: &io::Error) -> Status {
    match error.kind() {
        io::ErrorKind::NotFound => refuse(
            Code::NotFound,
            "PROGRAM_NOT_FOUND",
            format!(
                "{name}: its interpreter, or {}, is not there",
                cwd.display()
            ),
        ),
        io::ErrorKind::PermissionDenied if !files::may_enter(user, cwd) => refuse(
            Code::PermissionDenied,
            "CWD_PERMISSION_DENIED",
            format!("{}: permission denied", cwd.display()),
        ),
        io::ErrorKind::PermissionDenied => refuse(
            Code::PermissionDenied,
            "PROGRAM_NOT_EXECUTABLE",
            format!("{name}: permission denied"),
        ),
        io::ErrorKind::ArgumentListTooLong => invalid(
            "argv",
            "arguments and environment are too long for the kernel",
        ),
        _ if matches!(
            error.raw_os_error(),
            Some(nix::libc::EAGAIN | nix::libc::ENOMEM | nix::libc::EMFILE | nix::libc::ENFILE)
        ) =>
        {
            refuse(
                Code::ResourceExhausted,
                "NO_RESOURCES",
                format!("{name}: {error}"),
            )
        }
        _ if error.raw_os_error() == Some(nix::libc::ENOEXEC) => refuse(
            Code::InvalidArgument,
            "PROGRAM_FORMAT",
            format!("{name}: not a program this kernel runs"),
        ),
        _ => refuse(Code::Unknown, "START_FAILED", format!("{name}: {error}")),
    }
}
