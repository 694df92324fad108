//! What a person at a terminal sees: a program under tmux, its keys and its screen as text.

use std::{
    process::{Command, Output},
    time::{Duration, Instant},
};

use tempfile::TempDir;

use crate::Mesh;

const LIMIT: Duration = Duration::from_secs(90);
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// A terminal with a shell in it, on this machine.
#[derive(Debug)]
pub struct Screen {
    folder: TempDir,
}

impl Screen {
    /// A terminal of this size, in which `sandmesh` is the program under test and `$STATE` its deployment.
    pub fn open(mesh: &Mesh, columns: u16, rows: u16) -> Self {
        let screen = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        let folder = crate::sandmesh();
        let folder = folder.parent().unwrap().display();
        let path = std::env::var("PATH").unwrap();
        let started = Command::new("tmux")
            .args(["-S", &screen.socket(), "-f", "/dev/null"])
            .args(["new-session", "-d", "-x", &columns.to_string()])
            .args(["-y", &rows.to_string()])
            .args(["env", &format!("PATH={folder}:{path}"), "PS1=local> "])
            .arg(format!("SANDMESH_STATE={}", mesh.state().display()))
            .args(["HISTFILE=", "bash", "--norc", "--noprofile"])
            .output()
            .unwrap();
        assert!(started.status.success(), "{started:?}");
        screen.tmux(&["set-option", "-g", "status", "off"]);
        screen.tmux(&["set-option", "-g", "history-limit", "100000"]);
        screen.shows("local>");
        screen
    }

    fn socket(&self) -> String {
        self.folder
            .path()
            .join("tmux")
            .to_string_lossy()
            .into_owned()
    }

    fn tmux(&self, arguments: &[&str]) -> Output {
        let output = Command::new("tmux")
            .args(["-S", &self.socket()])
            .args(arguments)
            .output()
            .unwrap();
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        output
    }

    /// Types text as it is.
    pub fn types(&self, text: &str) {
        self.tmux(&["send-keys", "-l", text]);
    }

    /// Presses keys by their names, such as `Enter` and `C-c`.
    pub fn presses(&self, key: &str) {
        self.tmux(&["send-keys", key]);
    }

    /// Types a line and Enter.
    pub fn enters(&self, line: &str) {
        self.types(line);
        self.presses("Enter");
    }

    /// Makes the terminal another size.
    pub fn resizes(&self, columns: u16, rows: u16) {
        let (columns, rows) = (columns.to_string(), rows.to_string());
        self.tmux(&["resize-window", "-x", &columns, "-y", &rows]);
    }

    /// What is on it.
    pub fn text(&self) -> String {
        String::from_utf8(self.tmux(&["capture-pane", "-p"]).stdout).unwrap()
    }

    /// What is on it, and all that was before.
    pub fn history(&self) -> String {
        let captured = self.tmux(&["capture-pane", "-p", "-J", "-S", "-"]);
        String::from_utf8(captured.stdout).unwrap()
    }

    /// Waits until a line of it begins with this; the rest of that line.
    pub fn shows(&self, wanted: &str) -> String {
        self.until(wanted, |line| line.strip_prefix(wanted).map(str::to_owned))
    }

    /// Waits until a line has this in it, wherever.
    pub fn has(&self, wanted: &str) {
        self.until(wanted, |line| line.contains(wanted).then_some(()));
    }

    fn until<T>(&self, wanted: &str, found: impl Fn(&str) -> Option<T>) -> T {
        let end = Instant::now() + LIMIT;
        loop {
            let text = self.text();
            if let Some(found) = text.lines().rev().find_map(&found) {
                return found;
            }
            assert!(Instant::now() < end, "{wanted:?} is not on\n{text}");
            std::thread::sleep(LOOK_AGAIN);
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // A server that has ended with its last program is gone already.
        let _ = Command::new("tmux")
            .args(["-S", &self.socket(), "kill-server"])
            .output();
    }
}
