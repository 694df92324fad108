//! The daemon's duty as the one who starts processes, and as their subreaper: to collect every child that has ended, its own and those that
//! were orphaned to it. What is collected is gone from the kernel, so how a process ended is kept before.

use std::time::SystemTime;

use tokio::signal::unix::{SignalKind, signal};

use crate::{logs, process::Processes, spawn};

/// Collects until the guest is powered off.
pub(crate) async fn run(processes: Processes) {
    let mut children = match signal(SignalKind::child()) {
        Ok(children) => children,
        Err(error) => {
            logs::warn(format_args!("no SIGCHLD: {error}"));
            return;
        }
    };
    loop {
        collect(&processes);
        // One signal may stand for many children, so all are looked for each time.
        if children.recv().await.is_none() {
            return;
        }
    }
}

fn collect(processes: &Processes) {
    // A start in progress is let finish, so that its child is known before it is collected.
    let known = processes.hold();
    let mut has_orphans = false;
    while let Ok(Some(how)) = spawn::look_for_ended() {
        let process = known.process_of(how.pid);
        if let Some(process) = &process {
            process.keep_end(&how);
        }
        let Ok(Some(ended)) = spawn::wait4(how.pid) else {
            break;
        };
        match process {
            Some(process) => process.note_end(&ended, SystemTime::now()),
            None => has_orphans = true,
        }
    }
    drop(known);
    if has_orphans {
        processes.sweep();
    }
}
