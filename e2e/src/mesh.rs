//! One deployment.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use proto::session::v1::{Resources, Session};
use sdk::{Client, NewSession};
use serde::Deserialize;
use service_kit::config::tools_folder;
use tempfile::TempDir;

const READY_LIMIT: Duration = Duration::from_secs(90);
const LOOK_AGAIN: Duration = Duration::from_millis(50);
const DOWN_LIMIT: Duration = Duration::from_mins(1);
/// The least a guest with Python needs.
const GUEST_MEMORY: u64 = 128 << 20;

/// A running deployment; dropping it takes it down.
#[derive(Debug)]
pub struct Mesh {
    supervisor: Child,
    folder: TempDir,
    endpoint: String,
    client: Client,
}

/// A part as `status -o json` shows it.
#[derive(Debug, Clone, Deserialize)]
pub struct Part {
    /// Its name.
    pub name: String,
    /// Its process.
    pub pid: i32,
    /// Whether it answers.
    pub healthy: bool,
    /// Where.
    pub address: String,
    /// Where its metrics are.
    pub metrics: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Status {
    healthy: bool,
    #[serde(default)]
    endpoint: String,
    parts: Vec<Part>,
}

#[derive(Debug, Deserialize)]
struct ClientFile {
    api_key: String,
}

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the workspace")
        .to_owned()
}

/// A program under test: named by the environment, else where cargo and `deploy/test` put it.
fn program(variable: &str, default: &str) -> PathBuf {
    let path = std::env::var_os(variable).map_or_else(
        || {
            std::env::var_os("CARGO_TARGET_DIR")
                .map_or_else(|| workspace().join("target"), PathBuf::from)
                .join(default)
        },
        PathBuf::from,
    );
    assert!(
        path.exists(),
        "{} is missing: ./deploy/test builds it ({variable} may name another)",
        path.display()
    );
    path
}

/// The `sandmesh` program under test.
pub fn sandmesh() -> PathBuf {
    program("SANDMESH_BIN", "debug/sandmesh")
}

/// The VMM the whole suite is to run on, for tests that do not choose one: `SANDMESH_TEST_VMM=firecracker`.
fn vmm(arguments: &[&str]) -> Vec<String> {
    match std::env::var("SANDMESH_TEST_VMM") {
        Ok(vmm) if !arguments.contains(&"--vmm") => vec!["--vmm".into(), vmm],
        _ => Vec::new(),
    }
}

impl Mesh {
    /// Starts a deployment, with more arguments of `sandmesh up`, and imports the template `base`.
    pub fn start(arguments: &[&str]) -> Self {
        Self::start_warm(arguments, 0)
    }

    /// The same, with so many guests kept ready for each template.
    pub fn start_warm(arguments: &[&str], warm: usize) -> Self {
        // Unix sockets lie in it: the name must be short.
        let folder = tempfile::Builder::new()
            .prefix("sm")
            .tempdir_in("/tmp")
            .unwrap();
        let log = std::fs::File::create(folder.path().join("up.log")).unwrap();
        let envd = folder.path().join("guest-envd");
        std::fs::copy(program("SANDMESH_ENVD", "guest-envd"), &envd).unwrap();
        // The supervisor is asked to stop when the test dies, however it does.
        let supervisor = Command::new("setpriv")
            .args(["--pdeathsig", "TERM"])
            .arg(sandmesh())
            .args(["up", "--foreground", "--edge", "127.0.0.1:0", "--envd"])
            .arg(envd)
            .args(vmm(arguments))
            .args(arguments)
            .env("SANDMESH_STATE", folder.path())
            // Guests that wait would take the processors from those that are tested.
            .env("SANDMESH_NODE_WARM_MAX_IDLE", warm.to_string())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("setpriv starts sandmesh");
        let mut mesh = Self {
            supervisor,
            endpoint: String::new(),
            client: Client::connect("http://127.0.0.1:1", "none").unwrap(),
            folder,
        };
        mesh.wait_until_ready();
        let tarball = tools_folder().join("base-rootfs.tar");
        assert!(
            tarball.exists(),
            "{} is missing: run ./deploy/install test",
            tarball.display()
        );
        let memory = format!("{GUEST_MEMORY}B");
        let imported = mesh.run(&[
            "template",
            "build",
            "-t",
            "base",
            "--rootfs",
            &tarball.to_string_lossy(),
            "--shared",
            "--memory",
            &memory,
            "--disk",
            "256MiB",
        ]);
        assert!(
            imported.status.success(),
            "{}",
            String::from_utf8_lossy(&imported.stderr)
        );
        mesh
    }

    fn wait_until_ready(&mut self) {
        let limit = Instant::now() + READY_LIMIT;
        loop {
            if let Some(status) = self.status().filter(|status| status.healthy) {
                self.endpoint = status.endpoint;
                break;
            }
            if let Some(exit) = self.supervisor.try_wait().unwrap() {
                panic!("sandmesh up ended ({exit}):\n{}", self.log());
            }
            assert!(
                Instant::now() < limit,
                "the mesh is not ready:\n{}",
                self.log()
            );
            std::thread::sleep(LOOK_AGAIN);
        }
        let file = std::fs::read_to_string(self.state().join("client.toml")).unwrap();
        let file: ClientFile = toml::from_str(&file).unwrap();
        self.client = Client::connect(&self.endpoint, &file.api_key).unwrap();
    }

    /// Its state folder.
    pub fn state(&self) -> &Path {
        self.folder.path()
    }

    /// What it said so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.state().join("up.log")).unwrap_or_default()
    }

    /// Host and port of Envoy.
    pub fn edge(&self) -> &str {
        self.endpoint.trim_start_matches("http://")
    }

    /// Where clients connect.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// A client of the team `default`.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The team's API key.
    pub fn api_key(&self) -> String {
        let file = std::fs::read_to_string(self.state().join("client.toml")).unwrap();
        toml::from_str::<ClientFile>(&file).unwrap().api_key
    }

    /// Runs `sandmesh` against it.
    pub fn run(&self, arguments: &[&str]) -> Output {
        let mut command = self.command(sandmesh());
        command.args(arguments).output().unwrap()
    }

    /// Any program, with an environment in which `sandmesh` speaks to it.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command
            .env("SANDMESH_STATE", self.state())
            .env_remove("SANDMESH_ENDPOINT")
            .env_remove("SANDMESH_API_KEY")
            .stdin(Stdio::null());
        command
    }

    fn status(&self) -> Option<Status> {
        serde_json::from_slice(&self.run(&["status", "-o", "json"]).stdout).ok()
    }

    /// Its parts as they are now.
    pub fn parts(&self) -> Vec<Part> {
        self.status().map(|status| status.parts).unwrap_or_default()
    }

    /// One part.
    pub fn part(&self, name: &str) -> Part {
        self.parts()
            .into_iter()
            .find(|part| part.name == name)
            .unwrap_or_else(|| panic!("no part {name}"))
    }

    /// What a part says of itself to Prometheus.
    pub async fn metrics(&self, part: &str) -> String {
        let address = self.part(part).metrics.expect("it has metrics");
        let (host, path) = address
            .trim_start_matches("http://")
            .split_once('/')
            .unwrap();
        let answer = crate::http::get(host, host, &format!("/{path}"), &[]).await;
        String::from_utf8_lossy(&answer.body).into_owned()
    }

    /// Gives the nodes another envd, which works the same; each takes it at its next start.
    pub fn change_envd(&self) {
        let path = self.state().join("guest-envd");
        // What follows the sections of an ELF file is nobody's.
        let changed = [std::fs::read(&path).unwrap(), vec![0]].concat();
        std::fs::write(&path, changed).unwrap();
    }

    /// Kills a part as a crash would, and waits until the supervisor has started another.
    pub fn crash(&self, name: &str) {
        let old = self.part(name).pid;
        self.kill(name);
        wait_for(&format!("{name} is back"), READY_LIMIT, || {
            let part = self.part(name);
            part.pid != old && part.healthy
        });
    }

    /// Kills a part and does not wait.
    pub fn kill(&self, name: &str) {
        let pid = nix::unistd::Pid::from_raw(self.part(name).pid);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    }

    /// A session's folder on its node.
    pub fn session_folder(&self, session: &Session) -> PathBuf {
        (1..=8)
            .map(|number| match number {
                1 => "node".to_owned(),
                _ => format!("node-{number}"),
            })
            .map(|node| self.state().join(node).join("s").join(&session.session_id))
            .find(|folder| folder.exists())
            .expect("the session has a folder")
    }

    /// The PID of a session's VMM.
    pub fn vmm(&self, session: &Session) -> nix::unistd::Pid {
        self.find_vmm(session).expect("the session has a VMM")
    }

    /// The same of a session that may just end, or begin: it works in the session's folder.
    pub fn find_vmm(&self, session: &Session) -> Option<nix::unistd::Pid> {
        let state = self.state().canonicalize().unwrap();
        let is_its = |cwd: PathBuf| {
            cwd.starts_with(&state) && cwd.iter().any(|name| name == session.session_id.as_str())
        };
        let found = procfs::process::all_processes()
            .unwrap()
            .flatten()
            .find(|process| process.cwd().is_ok_and(is_its));
        Some(nix::unistd::Pid::from_raw(found?.pid))
    }

    /// Kills a session's VMM.
    pub fn kill_vmm(&self, session: &Session) {
        nix::sys::signal::kill(self.vmm(session), nix::sys::signal::Signal::SIGKILL).unwrap();
    }

    /// Sends a signal to a part and all processes it started, itself first.
    pub fn signal_tree(&self, name: &str, signal: nix::sys::signal::Signal) {
        let mut tree = vec![self.part(name).pid];
        let all: Vec<(i32, i32)> = procfs::process::all_processes()
            .unwrap()
            .filter_map(|process| process.ok()?.stat().ok())
            .map(|stat| (stat.pid, stat.ppid))
            .collect();
        let mut at = 0;
        while let Some(parent) = tree.get(at).copied() {
            tree.extend(
                all.iter()
                    .filter(|(_, of)| *of == parent)
                    .map(|(pid, _)| pid),
            );
            at += 1;
        }
        for pid in tree {
            // A child may have ended in between.
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal);
        }
    }

    /// Runs a program of PostgreSQL's against its database; its standard output.
    pub fn postgres(&self, program: &str, arguments: &[&str]) -> String {
        let folders = std::fs::read_dir("/usr/lib/postgresql").unwrap().flatten();
        let newest = folders.map(|entry| entry.path().join("bin")).max();
        let output = Command::new(newest.unwrap().join(program))
            .args(["-U", "postgres", "-h"])
            .arg(self.state().join("run"))
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program}: {said}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// A session as small as works.
    pub async fn session(&self) -> Session {
        self.client
            .create(small())
            .await
            .unwrap_or_else(|error| panic!("create: {error}\n{}", self.log()))
    }

    /// Takes it down as an operator would.
    pub fn down(&mut self) {
        let down = self.run(&["down"]);
        assert!(
            down.status.success(),
            "{}",
            String::from_utf8_lossy(&down.stderr)
        );
        self.supervisor.wait().unwrap();
    }
}

/// A session as small as works.
pub fn small() -> NewSession {
    NewSession {
        resources: Some(Resources {
            vcpus: 1,
            memory_bytes: GUEST_MEMORY,
            disk_bytes: 256 << 20,
        }),
        timeout: Some(Duration::from_mins(10)),
        ..NewSession::from_template("base")
    }
}

/// Waits for something that no event tells of.
pub fn wait_for(what: &str, limit: Duration, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + limit;
    while !done() {
        assert!(Instant::now() < end, "waited {limit:?} in vain: {what}");
        std::thread::sleep(LOOK_AGAIN);
    }
}

impl Mesh {
    /// The last warnings and errors of every part.
    fn warnings(&self, lines: usize) -> String {
        let Ok(logs) = std::fs::read_dir(self.state().join("logs")) else {
            return String::new();
        };
        let of_one = |path: PathBuf| {
            let log = std::fs::read(&path).unwrap_or_default();
            let log = String::from_utf8_lossy(&log);
            let found = log
                .lines()
                .filter(|line| line.contains("WARN") || line.contains("ERROR"));
            let found = found.collect::<Vec<_>>().join("\n");
            format!("{}:\n{}", path.display(), tail(&found, lines))
        };
        logs.flatten()
            .map(|log| of_one(log.path()))
            .collect::<Vec<_>>()
            .join("\n")
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the mesh's log ends with:\n{}", tail(&self.log(), 30));
            eprintln!("what its parts found wrong:\n{}", self.warnings(60));
        }
        let down = self.run(&["down"]);
        if !down.status.success() {
            eprintln!("down: {}", String::from_utf8_lossy(&down.stderr));
        }
        let end = Instant::now() + DOWN_LIMIT;
        while matches!(self.supervisor.try_wait(), Ok(None)) {
            if Instant::now() > end {
                self.supervisor.kill().expect("the supervisor is ours");
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }
}

fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all.get(all.len().saturating_sub(lines)..)
        .unwrap_or_default()
        .join("\n")
}
