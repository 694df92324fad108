//! envd: init of the guest and its daemon. As PID 1 it brings the guest up and keeps a daemon, which is this program called by itself with
//! `--work`; with `--serve SOCKET` it keeps one that serves over a unix socket, for tests outside a VM, with processes in a cgroup if one is named.

use std::{path::PathBuf, process::ExitCode};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match arguments.as_slice() {
        [flag, socket] if flag == "--serve" => envd::serve_on_socket(&PathBuf::from(socket), None),
        [flag, socket, cgroup] if flag == "--serve" => {
            envd::serve_on_socket(&PathBuf::from(socket), Some(&PathBuf::from(cgroup)))
        }
        [flag, place @ ..] if flag == "--work" => envd::work(place),
        _ if std::process::id() == 1 => envd::init(),
        _ => {
            eprintln!("usage: envd --serve SOCKET [CGROUP] (as PID 1 it takes no arguments)");
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // On PID 1 the kernel panics now, which ends the VM: that is what is wanted.
            eprintln!("envd: {error}");
            ExitCode::FAILURE
        }
    }
}
