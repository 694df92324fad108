//! A fake of Firecracker and its jailer: the rules of its API, its files and its sockets, without KVM.
//!
//! What it answers follows `src/vmm/src/rpc_interface.rs`, `src/firecracker/src/api_server` and `docs/` of Firecracker 1.7 to 1.16: which call
//! is allowed in which state, with which words it is refused, and what a snapshot does to connections. As a program it is this test's own
//! binary, started by a script that stands for the jailer; it becomes its user in its root folder as the jailer would.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    os::unix::fs::{FileExt as _, PermissionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};

use axum::body::{Body, to_bytes};
use guest_link::guest::{
    Listener,
    vsock::{Listen, VsockChannel},
};
use http::{Method, Request, Response, StatusCode};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
    sync::{mpsc, watch},
};
use tokio_util::sync::CancellationToken;

/// How the script tells the program what the jailer was told.
pub(crate) const TOLD: &str = "SANDMESH_FAKE_JAILER";
const DEVICES: &str = "devices of a fake, version ";
/// Firecracker's limit for a connection that the guest does not answer.
const UNANSWERED: Duration = Duration::from_secs(2);
const POST_BOOT: &str = "The requested operation is not supported after starting the microVM.";
const PRE_BOOT: &str = "The requested operation is not supported before starting the microVM.";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    NotStarted,
    Running,
    Paused,
}

/// What a call does beyond its answer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    Nothing,
    Boot,
    Load(Value),
    Create(Value),
    /// CPUs run, or stand still.
    State(State),
}

/// The rules. Pure.
#[derive(Debug)]
pub(crate) struct Rules {
    pub(crate) state: State,
    /// Something was configured that only a boot needs.
    boots: bool,
    has_kernel: bool,
    pub(crate) tracks_dirty_pages: bool,
    pub(crate) has_vsock: bool,
    minor: u32,
}

pub(crate) type Answer = Result<(Option<Value>, Effect), String>;

impl Rules {
    pub(crate) fn new(minor: u32) -> Self {
        Self {
            state: State::NotStarted,
            boots: false,
            has_kernel: false,
            tracks_dirty_pages: false,
            has_vsock: false,
            minor,
        }
    }

    pub(crate) fn call(&mut self, method: &Method, path: &str, body: &[u8]) -> Answer {
        let mut parts = path.trim_start_matches('/').split('/');
        let (first, second) = (parts.next().unwrap_or_default(), parts.next());
        let name = method.as_str();
        match (name, body.is_empty()) {
            ("GET", false) => return Err("GET request cannot have a body.".into()),
            ("PUT", true) => return Err("Empty PUT request.".into()),
            ("PATCH", true) => return Err("Empty PATCH request.".into()),
            _ => {}
        }
        let json = if body.is_empty() {
            Value::Null
        } else {
            serde_json::from_slice(body).map_err(|error| deserializing(&error.to_string()))?
        };
        let done = Ok((None, Effect::Nothing));
        let started = self.state != State::NotStarted;
        match (name, first, second) {
            ("GET", "", None) => {
                let state = match self.state {
                    State::NotStarted => "Not started",
                    State::Running => "Running",
                    State::Paused => "Paused",
                };
                let info = json!({
                    "id": "fake", "state": state, "vmm_version": format!("1.{}.0", self.minor), "app_name": "Firecracker"
                });
                Ok((Some(info), Effect::Nothing))
            }
            ("GET", "version", None) => {
                let version = json!({ "firecracker_version": format!("1.{}.0", self.minor) });
                Ok((Some(version), Effect::Nothing))
            }
            ("GET", "balloon", Some("statistics"))
            | ("PUT", "snapshot", Some("create"))
            | ("PATCH", "vm" | "balloon", None)
                if !started =>
            {
                Err(PRE_BOOT.into())
            }
            ("GET", "balloon", Some("statistics")) => {
                Err("Internal VMM error: Statistics for the balloon device are not enabled".into())
            }
            ("PUT", "logger" | "metrics" | "serial", None) if !started => {
                if first == "serial" && self.minor < 14 {
                    return Err(format!("Invalid request method and/or path: PUT {first}."));
                }
                let fields: &[&str] = match first {
                    "logger" => &[
                        "level",
                        "log_path",
                        "show_level",
                        "show_log_origin",
                        "module",
                    ],
                    "metrics" => &["metrics_path"],
                    _ => &["serial_out_path"],
                };
                only(&json, fields)?;
                done
            }
            ("PUT", "boot-source" | "machine-config" | "vsock" | "entropy" | "balloon", None)
            | ("PUT", "drives" | "network-interfaces", Some(_))
                if !started =>
            {
                self.configure(first, &json)?;
                if let Some(id) = second {
                    let field = if first == "drives" {
                        "drive_id"
                    } else {
                        "iface_id"
                    };
                    if json.get(field).and_then(Value::as_str) != Some(id) {
                        return Err(
                            "The id from the path does not match the id from the body!".into()
                        );
                    }
                }
                done
            }
            ("PUT", "actions", None) => match json.get("action_type").and_then(Value::as_str) {
                Some("InstanceStart") if started => Err(POST_BOOT.into()),
                Some("InstanceStart") if self.has_kernel => {
                    self.state = State::Running;
                    Ok((None, Effect::Boot))
                }
                Some("InstanceStart") => Err(
                    "Start microvm error: Cannot start microvm without kernel configuration."
                        .into(),
                ),
                Some("FlushMetrics" | "SendCtrlAltDel") if started => done,
                Some("FlushMetrics" | "SendCtrlAltDel") => Err(PRE_BOOT.into()),
                other => Err(deserializing(&format!(
                    "unknown variant `{}`",
                    other.unwrap_or_default()
                ))),
            },
            ("PUT", "snapshot", Some("load")) if started => Err(POST_BOOT.into()),
            ("PUT", "snapshot", Some("load")) => self.load(json),
            ("PUT", "snapshot", Some("create")) => {
                only(&json, &["snapshot_type", "snapshot_path", "mem_file_path"])?;
                if self.state == State::Running {
                    return Err(
                        "Create snapshot error: Cannot save the microVM state: Operation not allowed: save/restore unavailable while running"
                            .into(),
                    );
                }
                if json.get("snapshot_type") == Some(&json!("Diff")) && !self.tracks_dirty_pages {
                    return Err("Create snapshot error: Cannot get dirty bitmap: Dirty page tracking is off".into());
                }
                Ok((None, Effect::Create(json)))
            }
            ("PATCH", "vm", None) => {
                self.state = match json.get("state").and_then(Value::as_str) {
                    Some("Paused") => State::Paused,
                    Some("Resumed") => State::Running,
                    _ => {
                        return Err(deserializing(
                            "unknown variant, expected `Paused` or `Resumed`",
                        ));
                    }
                };
                Ok((None, Effect::State(self.state)))
            }
            ("PATCH", "balloon", None) => {
                only(&json, &["amount_mib"])?;
                done
            }
            (
                "PUT",
                "boot-source" | "drives" | "network-interfaces" | "machine-config" | "vsock"
                | "entropy" | "balloon" | "logger" | "metrics" | "serial",
                _,
            ) => Err(POST_BOOT.into()),
            _ => Err(format!(
                "Invalid request method and/or path: {name} {first}."
            )),
        }
    }

    fn configure(&mut self, what: &str, json: &Value) -> Result<(), String> {
        let mut balloon = vec!["amount_mib", "deflate_on_oom", "stats_polling_interval_s"];
        if self.minor >= 14 {
            balloon.extend(["free_page_hinting", "free_page_reporting"]);
        }
        let fields: &[&str] = match what {
            "boot-source" => &["kernel_image_path", "initrd_path", "boot_args"],
            "drives" => &[
                "drive_id",
                "path_on_host",
                "is_root_device",
                "is_read_only",
                "cache_type",
                "partuuid",
                "rate_limiter",
                "io_engine",
                "socket",
            ],
            "network-interfaces" => &[
                "iface_id",
                "guest_mac",
                "host_dev_name",
                "rx_rate_limiter",
                "tx_rate_limiter",
            ],
            "machine-config" => &[
                "vcpu_count",
                "mem_size_mib",
                "smt",
                "cpu_template",
                "track_dirty_pages",
                "huge_pages",
            ],
            "vsock" => &["guest_cid", "uds_path", "vsock_id"],
            "entropy" => &["rate_limiter"],
            _ => &balloon,
        };
        only(json, fields)?;
        self.boots = true;
        match what {
            "boot-source" => self.has_kernel = true,
            "vsock" => self.has_vsock = true,
            "machine-config" => {
                let cpus = json
                    .get("vcpu_count")
                    .and_then(Value::as_u64)
                    .unwrap_or_default();
                if !(1..=32).contains(&cpus) {
                    return Err(
                        "Machine config error: The vCPU number is invalid! The vCPU number can only be 1 or an even number when SMT is enabled."
                            .into(),
                    );
                }
                self.tracks_dirty_pages = json.get("track_dirty_pages") == Some(&json!(true));
            }
            _ => {}
        }
        Ok(())
    }

    fn load(&mut self, json: Value) -> Answer {
        let mut fields = vec![
            "snapshot_path",
            "mem_file_path",
            "mem_backend",
            "enable_diff_snapshots",
            "resume_vm",
        ];
        if self.minor >= 12 {
            fields.push("network_overrides");
        }
        if self.minor >= 13 {
            fields.push("track_dirty_pages");
        }
        only(&json, &fields)?;
        match (json.get("mem_backend"), json.get("mem_file_path")) {
            (Some(_), None) | (None, Some(_)) => {}
            (None, None) => {
                return Err(deserializing(
                    "missing field: either `mem_backend` or `mem_file_path` is required",
                ));
            }
            _ => {
                return Err(deserializing(
                    "too many fields: either `mem_backend` or `mem_file_path` exclusively is required",
                ));
            }
        }
        if self.boots {
            return Err(
                "Load snapshot error: Loading a microVM snapshot not allowed after configuring boot-specific resources."
                    .into(),
            );
        }
        let is_on = |name: &str| json.get(name) == Some(&json!(true));
        self.tracks_dirty_pages = is_on("track_dirty_pages") || is_on("enable_diff_snapshots");
        self.has_vsock = true;
        self.state = if is_on("resume_vm") {
            State::Running
        } else {
            State::Paused
        };
        Ok((None, Effect::Load(json)))
    }
}

fn deserializing(cause: &str) -> String {
    format!("An error occurred when deserializing the json body of a request: {cause}.")
}

fn only(json: &Value, fields: &[&str]) -> Result<(), String> {
    let object = json
        .as_object()
        .ok_or_else(|| deserializing("invalid type"))?;
    match object.keys().find(|key| !fields.contains(&key.as_str())) {
        Some(key) => Err(deserializing(&format!("unknown field `{key}`"))),
        None => Ok(()),
    }
}

pub(crate) fn refusal(fault: &str) -> Response<Body> {
    let body = json!({ "fault_message": fault }).to_string();
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = StatusCode::BAD_REQUEST;
    response
}

/// Writes the scripts that stand for Firecracker and its jailer; returns their paths.
pub(crate) fn install(folder: &Path, minor: u32) -> (PathBuf, PathBuf) {
    let write = |name: &str, script: String| {
        let path = folder.join(name);
        fs::write(&path, format!("#!/bin/sh\n{script}")).unwrap();
        fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        path
    };
    let firecracker = write(
        "firecracker",
        format!(
            "case $1 in --version) echo 'Firecracker v1.{minor}.0'; echo;; --snapshot-version) echo v9.0.0;; *) exit 153;; esac\n"
        ),
    );
    let jailer = write(
        "jailer",
        format!(
            "[ \"$1\" = --version ] && {{ echo 'Jailer v1.{minor}.0'; exit; }}\n\
             export {TOLD}=\"{minor} $*\"\n\
             exec {} --exact the_program_that_tests_start --ignored --nocapture\n",
            std::env::current_exe().unwrap().display()
        ),
    );
    (firecracker, jailer)
}

/// What the jailer and then Firecracker do with their arguments. Returns when Firecracker would end.
pub(crate) fn main(told: &str) {
    let mut words = told.split(' ');
    let minor = words.next().unwrap().parse().unwrap();
    let words: Vec<&str> = words.collect();
    let value = |flag: &str| {
        let at = words.iter().position(|word| *word == flag)?;
        words.get(at + 1).copied()
    };
    let exec = Path::new(value("--exec-file").unwrap());
    let base = Path::new(value("--chroot-base-dir").unwrap());
    fs::write(base.join("told"), words.join(" ")).unwrap();
    let root = base
        .join(exec.file_name().unwrap())
        .join(value("--id").unwrap())
        .join("root");
    let uid = value("--uid").unwrap().parse().unwrap();
    let gid = value("--gid").unwrap().parse().unwrap();
    assert!(
        Path::new(value("--netns").unwrap()).exists(),
        "no such network namespace"
    );
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    std::os::unix::fs::chown(&root, Some(uid), Some(gid)).unwrap();
    nix::unistd::chdir(&root).unwrap();
    nix::unistd::chroot(".").unwrap();
    nix::unistd::setgroups(&[]).unwrap();
    nix::unistd::setgid(gid.into()).unwrap();
    nix::unistd::setuid(uid.into()).unwrap();
    println!("fake Firecracker v1.{minor}.0");
    let code = runtime.block_on(Fake::serve(
        minor,
        value("--api-sock").unwrap(),
        value("--config-file"),
    ));
    std::process::exit(code);
}

/// A running fake.
struct Fake {
    rules: Mutex<Rules>,
    running: watch::Sender<bool>,
    guests: mpsc::UnboundedSender<UnixStream>,
    /// Cancelled by a snapshot, which ends all connections to the guest.
    connections: Mutex<CancellationToken>,
    memory: Mutex<Option<Memory>>,
    over: watch::Sender<Option<i32>>,
}

impl Fake {
    async fn serve(minor: u32, socket: &str, config: Option<&str>) -> i32 {
        let (guests, connecting) = mpsc::unbounded_channel();
        let fake = Arc::new(Self {
            rules: Mutex::new(Rules::new(minor)),
            running: watch::Sender::new(false),
            guests,
            connections: Mutex::default(),
            memory: Mutex::default(),
            over: watch::Sender::new(None),
        });
        let listener = UnixListener::bind(socket).unwrap();
        let mut over = fake.over.subscribe();
        tokio::spawn(guest(connecting));
        if let Some(config) = config {
            let config: BTreeMap<String, Value> =
                serde_json::from_slice(&fs::read(config).unwrap()).unwrap();
            if let Err(fault) = fake.boot_from(config) {
                println!("Building VMM configured from cmdline json failed: {fault}");
                return 152;
            }
        }
        loop {
            tokio::select! {
                code = over.wait_for(Option::is_some) => return code.unwrap().unwrap(),
                accepted = listener.accept() => {
                    let fake = Arc::clone(&fake);
                    tokio::spawn(async move {
                        let service = service_fn(|request| Arc::clone(&fake).answer(request));
                        let stream = TokioIo::new(accepted.unwrap().0);
                        let served = hyper::server::conn::http1::Builder::new();
                        let _ = served.serve_connection(stream, service).await;
                    });
                }
            }
        }
    }

    fn boot_from(self: &Arc<Self>, config: BTreeMap<String, Value>) -> Result<(), String> {
        let mut rules = self.rules.lock().unwrap();
        for (part, value) in config {
            let each = |rules: &mut Rules, path: String, value: &Value| {
                rules
                    .call(&Method::PUT, &path, value.to_string().as_bytes())
                    .map(drop)
            };
            match value.as_array() {
                Some(values) => {
                    let id = if part == "drives" {
                        "drive_id"
                    } else {
                        "iface_id"
                    };
                    for value in values {
                        let path = format!("/{part}/{}", value[id].as_str().unwrap());
                        each(&mut rules, path, value)?;
                        if let Some(file) = value.get("path_on_host") {
                            // As its user, for as much as it may.
                            let writes = value["is_read_only"] == json!(false);
                            let opened = File::options()
                                .read(true)
                                .write(writes)
                                .open(file.as_str().unwrap());
                            opened.map_err(|error| format!("{file}: {error}"))?;
                        }
                    }
                }
                None => each(&mut rules, format!("/{part}"), &value)?,
            }
            if part == "boot-source" {
                for name in ["kernel_image_path", "initrd_path"] {
                    let file = value[name].as_str().unwrap();
                    File::open(file).map_err(|error| format!("{file}: {error}"))?;
                }
            }
            if part == "machine-config" {
                let size = value["mem_size_mib"].as_u64().unwrap() << 20;
                *self.memory.lock().unwrap() = Some(Memory::anonymous(size));
            }
        }
        let start = json!({ "action_type": "InstanceStart" }).to_string();
        rules.call(&Method::PUT, "/actions", start.as_bytes())?;
        drop(rules);
        self.started();
        self.running.send_replace(true);
        Ok(())
    }

    /// The guest's vsock is there from now on.
    fn started(self: &Arc<Self>) {
        let listener = UnixListener::bind("v.sock").unwrap();
        let fake = Arc::clone(self);
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                tokio::spawn(Arc::clone(&fake).connect(stream));
            }
        });
    }

    async fn connect(self: Arc<Self>, mut host: UnixStream) {
        let connections = self.connections.lock().unwrap().clone();
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            match host.read_u8().await {
                Ok(byte) => line.push(byte),
                Err(_) => return,
            }
        }
        if line != format!("CONNECT {}\n", guest_link::VSOCK_PORT).as_bytes() {
            return;
        }
        let mut running = self.running.subscribe();
        let running = async { running.wait_for(|running| *running).await.is_ok() };
        let answered = tokio::time::timeout(UNANSWERED, running).await;
        if answered != Ok(true) {
            return;
        }
        let (mut ours, guests) = UnixStream::pair().unwrap();
        self.guests.send(guests).unwrap();
        if host.write_all(b"OK 1073741824\n").await.is_err() {
            return;
        }
        tokio::select! {
            () = connections.cancelled() => {}
            _ = tokio::io::copy_bidirectional(&mut host, &mut ours) => {}
        }
    }

    async fn answer(
        self: Arc<Self>,
        request: Request<hyper::body::Incoming>,
    ) -> io::Result<Response<Body>> {
        let (parts, body) = request.into_parts();
        let body = to_bytes(Body::new(body), 64 << 10)
            .await
            .map_err(io::Error::other)?;
        let called = self
            .rules
            .lock()
            .unwrap()
            .call(&parts.method, parts.uri.path(), &body);
        let (answer, effect) = match called {
            Ok(done) => done,
            Err(fault) => return Ok(refusal(&fault)),
        };
        match effect {
            Effect::Nothing => {}
            Effect::Boot => {
                self.started();
                self.running.send_replace(true);
            }
            Effect::State(state) => {
                self.running.send_replace(state == State::Running);
                // A word to end by, as a guest's reset would.
                if state == State::Running && Path::new("reset").exists() {
                    self.over.send_replace(Some(0));
                }
            }
            Effect::Load(load) => {
                if let Err(cause) = self.load(&load) {
                    // Too dirty to go on: it answers, then ends.
                    let fake = Arc::clone(&self);
                    tokio::spawn(async move {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                        fake.over.send_replace(Some(1));
                    });
                    return Ok(refusal(&format!(
                        "Load snapshot error: Failed to restore from snapshot: {cause}"
                    )));
                }
                self.started();
            }
            Effect::Create(create) => {
                if let Err(error) = self.create(&create) {
                    return Ok(refusal(&format!("Create snapshot error: {error}")));
                }
                let mut connections = self.connections.lock().unwrap();
                connections.cancel();
                *connections = CancellationToken::new();
            }
        }
        if let Some(value) = answer {
            return Ok(Response::new(Body::from(value.to_string())));
        }
        let mut response = Response::new(Body::empty());
        *response.status_mut() = StatusCode::NO_CONTENT;
        Ok(response)
    }

    fn load(&self, load: &Value) -> Result<(), String> {
        let path = load["snapshot_path"].as_str().unwrap();
        let devices = fs::read_to_string(path).map_err(|error| {
            format!("Failed to get snapshot state from file: Failed to open snapshot file: {error}")
        })?;
        if !devices.starts_with(DEVICES) {
            return Err(
                "Failed to get snapshot state from file: Failed to load snapshot state from file: CRC64 validation failed"
                    .into(),
            );
        }
        let path = load["mem_backend"]["backend_path"].as_str().unwrap();
        let memory = Memory::of_file(path)
            .map_err(|error| format!("Failed to load guest memory: {error}"))?;
        for (drive, writes) in [("rootfs", false), ("scratch", true)] {
            let opened = File::options().read(true).write(writes).open(drive);
            opened.map_err(|error| {
                format!("Failed to build microVM from snapshot: {drive}: {error}")
            })?;
        }
        *self.memory.lock().unwrap() = Some(memory);
        Ok(())
    }

    fn create(&self, create: &Value) -> io::Result<()> {
        let mut memory = self.memory.lock().unwrap();
        let memory = memory.as_mut().unwrap();
        let version = self.rules.lock().unwrap().minor;
        fs::write(
            create["snapshot_path"].as_str().unwrap(),
            format!("{DEVICES}{version}"),
        )?;
        let file = File::create(create["mem_file_path"].as_str().unwrap())?;
        file.set_len(memory.bytes().len() as u64)?;
        if create["snapshot_type"] == json!("Full") {
            file.write_all_at(memory.bytes(), 0)?;
        }
        Ok(())
    }
}

/// A guest's memory. A guest that runs counts the snapshots it has seen in its second page.
struct Memory {
    at: std::ptr::NonNull<std::ffi::c_void>,
    length: usize,
}

// SAFETY: the mapping is the process's, not a thread's.
#[allow(unsafe_code)]
unsafe impl Send for Memory {}

#[allow(unsafe_code)] // mmap
impl Memory {
    fn map(length: u64, file: Option<&File>) -> nix::Result<Self> {
        use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous};
        let size = usize::try_from(length).unwrap().try_into().unwrap();
        let (protection, flags) = (
            ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
            MapFlags::MAP_PRIVATE,
        );
        // SAFETY: a new mapping, of a file that is as long or of none.
        let at = unsafe {
            match file {
                Some(file) => mmap(None, size, protection, flags, file, 0),
                None => mmap_anonymous(None, size, protection, flags),
            }
        }?;
        Ok(Self {
            at,
            length: size.get(),
        })
    }

    fn anonymous(length: u64) -> Self {
        let mut memory = Self::map(length, None).unwrap();
        memory.bytes()[..4096].fill(b'b');
        memory
    }

    fn of_file(path: &str) -> io::Result<Self> {
        let file = File::open(path)?;
        let mut memory = Self::map(file.metadata()?.len(), Some(&file))?;
        memory.bytes()[4096] += 1;
        Ok(memory)
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: it is as long as that for the life of the process.
        unsafe { std::slice::from_raw_parts_mut(self.at.cast().as_ptr(), self.length) }
    }
}

/// Hosts that reached the guest.
struct Hosts(Mutex<mpsc::UnboundedReceiver<UnixStream>>);

impl Listen for Hosts {
    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<UnixStream>> {
        match self.0.lock().unwrap().poll_recv(cx) {
            Poll::Ready(Some(stream)) => Poll::Ready(Ok(stream)),
            _ => Poll::Pending,
        }
    }
}

/// A guest that sends back what it gets.
async fn guest(hosts: mpsc::UnboundedReceiver<UnixStream>) {
    let mut listener = Listener::new(VsockChannel::new(Hosts(Mutex::new(hosts))));
    loop {
        let link = listener.accept().await;
        tokio::spawn(async move {
            let (mut from, mut to) = tokio::io::split(link);
            let _ = tokio::io::copy(&mut from, &mut to).await;
        });
    }
}
