//! PID 1's duty: collect every child that has ended, its own and those that were orphaned to it.

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
    while let Ok(Some(ended)) = spawn::wait4(-1) {
        has_orphans |= !known.note_end(ended);
    }
    drop(known);
    if has_orphans {
        processes.sweep();
    }
}
