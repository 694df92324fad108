//! Whose guest this is, and the one call that makes it somebody's and opens its gate.
//!
//! Every step must succeed, in this order, or the guest stays closed and its processes frozen: entropy first, so that nothing random is
//! made before it; processes last, so that none sees a guest that is still another's. Only files that programs may look at are written as well as can be.
//!
//! envd itself makes nothing random that leaves it: span IDs and epochs are the node's, process IDs count. What the seeds of its hash
//! tables decide (the order of buckets, which ready branch of a select goes first) may be the same in two guests. Processes that carry a
//! generator of their own over a snapshot are out of reach; the kernel's, which new processes and getrandom(2) use, is seeded anew.
#![allow(unsafe_code)] // ioctl on /dev/random

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    io::{self, Read as _, Write as _},
    os::{fd::AsRawFd as _, unix::fs::OpenOptionsExt as _},
    path::Path,
    sync::{Mutex, PoisonError},
};

use nix::{
    sys::time::TimeSpec,
    time::{ClockId, clock_settime},
    unistd::sethostname,
};
use prost::Message as _;
use proto::envd::v1::{ConfigureRequest, GuestInfo, GuestNetwork};
use tonic::{Code, Status};

use crate::{
    connections,
    devices::Device,
    errors::{invalid, refuse},
    files,
    freezer::Freezer,
    gate::{Gate, Stand},
    group::Group,
    keeper::{Item, Keeper, Slot},
    logs, network,
    users::{self, User},
};

const LEAST_ENTROPY: usize = 32;
const MOST_ENTROPY: usize = 512;
const API_LEVEL: u32 = 7;
const LARGEST_ENV: usize = 1 << 20;

/// The guest, closed until it is configured.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) gate: Gate,
    /// Stops users' processes; outside of a VM there may be none.
    pub(crate) freezer: Option<Freezer>,
    /// Whether this is a VM of our own, whose clock, name and network are ours to set.
    pub(crate) owns_system: bool,
    /// Held while the guest becomes somebody's or gets ready for a snapshot.
    pub(crate) changing: tokio::sync::Mutex<()>,
    /// The kernel's generator of a system of our own.
    random: Option<File>,
    identity: Mutex<Option<Identity>>,
    /// What was set last.
    network: tokio::sync::Mutex<Option<GuestNetwork>>,
    keeper: Keeper,
    /// Daemons there were before.
    pub(crate) restarts: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Identity {
    #[prost(string, tag = "1")]
    session_id: String,
    #[prost(string, tag = "2")]
    hostname: String,
    #[prost(btree_map = "string, string", tag = "3")]
    env: BTreeMap<String, String>,
    #[prost(string, tag = "4")]
    default_user: String,
    #[prost(string, tag = "5")]
    template: String,
}

/// What the next daemon has to know of the guest.
#[derive(Clone, PartialEq, prost::Message)]
struct Word {
    #[prost(enumeration = "Stand", tag = "1")]
    gate: i32,
    #[prost(message, optional, tag = "2")]
    identity: Option<Identity>,
    #[prost(message, optional, tag = "3")]
    network: Option<GuestNetwork>,
}

impl Guest {
    #[cfg(test)]
    pub(crate) fn for_tests() -> Self {
        Self::left(false, None, Keeper::none(), &mut Item::default()).unwrap()
    }

    /// As it was left by a daemon before; nobody's, if there was none.
    pub(crate) fn left(
        owns_system: bool,
        freezer: Option<Freezer>,
        keeper: Keeper,
        left: &mut Item,
    ) -> io::Result<Self> {
        let restarts = left.number(Slot::Starts).unwrap_or_default();
        let word: Word = left.message(Slot::Guest)?.unwrap_or_default();
        Ok(Self {
            gate: Gate::left(word.gate()),
            freezer,
            owns_system,
            changing: tokio::sync::Mutex::default(),
            random: owns_system.then(random).transpose()?,
            identity: Mutex::new(word.identity),
            network: tokio::sync::Mutex::new(word.network),
            keeper,
            restarts: u32::try_from(restarts).unwrap_or(u32::MAX),
        })
    }

    /// Keeps for the next daemon whose guest this is. A network that is being set is none that was set.
    pub(crate) fn keep(&self) {
        let word = Word {
            gate: self.gate.stand().into(),
            identity: self.identity(),
            network: self.network.try_lock().ok().and_then(|last| last.clone()),
        };
        self.keeper
            .keep_of_guest(Slot::Guest, &word.encode_to_vec());
    }

    fn identity(&self) -> Option<Identity> {
        self.identity
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// A cgroup for a process of a user, where there are cgroups.
    pub(crate) fn group(&self, name: &str) -> io::Result<Option<Group>> {
        let freezer = self.freezer.as_ref();
        freezer.map(|freezer| freezer.group(name)).transpose()
    }

    pub(crate) fn env(&self) -> BTreeMap<String, String> {
        self.identity()
            .map(|identity| identity.env)
            .unwrap_or_default()
    }

    /// A user by name or number; empty means the session's default.
    pub(crate) fn user(&self, asked: &str) -> Option<User> {
        if !asked.is_empty() {
            return users::find(asked);
        }
        let default = self.identity().map(|identity| identity.default_user);
        users::find(&default.unwrap_or_default())
    }

    pub(crate) fn info(&self) -> GuestInfo {
        let identity = self.identity();
        let uptime = fs::read_to_string("/proc/uptime").unwrap_or_default();
        let uptime: f64 = uptime
            .split(' ')
            .next()
            .and_then(|text| text.parse().ok())
            .unwrap_or_default();
        GuestInfo {
            envd_version: env!("CARGO_PKG_VERSION").into(),
            api_level: API_LEVEL,
            kernel_release: fs::read_to_string("/proc/sys/kernel/osrelease")
                .unwrap_or_default()
                .trim()
                .into(),
            uptime: prost_types::Duration::try_from(std::time::Duration::from_secs_f64(
                uptime.max(0.0),
            ))
            .ok(),
            session_id: identity
                .as_ref()
                .map(|identity| identity.session_id.clone())
                .unwrap_or_default(),
            template: identity
                .as_ref()
                .map(|identity| identity.template.clone())
                .unwrap_or_default(),
            hostname: identity
                .map(|identity| identity.hostname)
                .unwrap_or_default(),
            envd_restarts: self.restarts,
        }
    }

    /// Sets the network, unless that is what was set last: every place a guest is restored into looks the same from inside, down to the
    /// gateway's hardware address, and what its user has changed since is the user's.
    pub(crate) async fn set_network(&self, network: GuestNetwork) -> Result<(), String> {
        let mut last = self.network.lock().await;
        if last.as_ref() != Some(&network) {
            *last = None;
            network::set(&network).await?;
            *last = Some(network);
        }
        Ok(())
    }

    /// Makes the guest a session's and opens the gate. While it is open, again is a success that changes nothing for the same session, and
    /// refused for another; once a snapshot's preparation has closed it, the guest may become anybody's.
    pub(crate) async fn configure(&self, request: ConfigureRequest) -> Result<(), Status> {
        let _one_at_a_time = self.changing.lock().await;
        if self.gate.is_open() {
            let whose = self.identity().map(|identity| identity.session_id);
            return if whose.as_ref() == Some(&request.session_id) {
                Ok(())
            } else {
                Err(refuse(
                    Code::FailedPrecondition,
                    "ALREADY_CONFIGURED",
                    "this guest is another session's",
                ))
            };
        }
        check(&request)?;
        // Whoever has been in it may have removed its user since: processes are told when they are to begin.
        let is_new = self
            .identity()
            .is_none_or(|identity| identity.default_user != request.default_user);
        if is_new && users::find(&request.default_user).is_none() {
            return Err(invalid("default_user", "there is no such user"));
        }
        let failed = |step: &'static str| {
            move |error: String| {
                refuse(
                    Code::Internal,
                    "CONFIGURE_FAILED",
                    format!("{step}: {error}"),
                )
            }
        };
        if let Some(random) = &self.random {
            seed(random, &request.entropy).map_err(failed("entropy"))?;
            set_clock(request.time.unwrap_or_default()).map_err(failed("clock"))?;
            set_names(&request.hostname, &request.machine_id).map_err(failed("names"))?;
            if request.reset_connections {
                // Before the network is another's: no packet of theirs leaves by it.
                connections::reset().await.map_err(failed("connections"))?;
            }
            let network = request.network.clone().unwrap_or_default();
            self.set_network(network).await.map_err(failed("network"))?;
        }
        let identity = Identity {
            session_id: request.session_id,
            hostname: request.hostname,
            env: request.env.into_iter().collect(),
            default_user: request.default_user,
            template: request.template,
        };
        *self.identity.lock().unwrap_or_else(PoisonError::into_inner) = Some(identity);
        if let Some(freezer) = &self.freezer {
            freezer.thaw().map_err(failed("thaw"))?;
        }
        self.gate.open();
        self.keep();
        logs::info("the gate is open");
        Ok(())
    }
}

fn check(request: &ConfigureRequest) -> Result<(), Status> {
    if request.session_id.is_empty() {
        return Err(invalid("session_id", "is required"));
    }
    let hostname = &request.hostname;
    if !(1..=63).contains(&hostname.len())
        || !hostname
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-')
    {
        return Err(invalid("hostname", "must be 1-63 characters [A-Za-z0-9-]"));
    }
    if !(LEAST_ENTROPY..=MOST_ENTROPY).contains(&request.entropy.len()) {
        return Err(invalid("entropy", "must be 32-512 bytes"));
    }
    if request.machine_id.len() != 16 {
        return Err(invalid("machine_id", "must be 16 bytes"));
    }
    if request.time.is_none() {
        return Err(invalid("time", "is required"));
    }
    if request.network.is_none() {
        return Err(invalid("network", "is required"));
    }
    if let Some(problem) = problem_of_env(&request.env) {
        return Err(invalid("env", problem));
    }
    Ok(())
}

/// What is wrong with an environment, if anything (environ(7)).
pub(crate) fn problem_of_env(env: &HashMap<String, String>) -> Option<&'static str> {
    let bad_name = |name: &String| name.is_empty() || name.contains(['=', '\0']);
    if env
        .iter()
        .any(|(name, value)| bad_name(name) || value.contains('\0'))
    {
        return Some("names must not be empty or hold =, and nothing may hold NUL");
    }
    let size: usize = env
        .iter()
        .map(|(name, value)| name.len() + value.len())
        .sum();
    (size > LARGEST_ENV).then_some("must be at most 1 MiB in all")
}

/// `struct rand_pool_info` of random(4) with room for the most we take.
#[repr(C)]
struct PoolInfo {
    entropy_bits: i32,
    size: i32,
    bytes: [u8; MOST_ENTROPY],
}

nix::ioctl_write_ptr_bad!(
    add_entropy,
    nix::request_code_write!(b'R', 0x03, size_of::<[i32; 2]>()),
    PoolInfo
);
nix::ioctl_none!(reseed, b'R', 0x07);

/// Opened once: a file system of its own is not taken down in an instant.
fn random() -> io::Result<File> {
    Device::random()?.open()
}

/// Credits the bytes to the kernel's pool and reseeds its generator from it, so that the first random byte read is ours alone.
fn seed(random: &File, entropy: &[u8]) -> Result<(), String> {
    let mut info = PoolInfo {
        entropy_bits: 0,
        size: 0,
        bytes: [0; MOST_ENTROPY],
    };
    let target = info
        .bytes
        .get_mut(..entropy.len())
        .ok_or("too much entropy")?;
    target.copy_from_slice(entropy);
    info.size = i32::try_from(entropy.len()).map_err(|error| error.to_string())?;
    info.entropy_bits = info.size * 8;
    // SAFETY: the descriptor is open for both calls; the kernel reads `size` bytes, which `bytes` holds.
    unsafe {
        add_entropy(random.as_raw_fd(), &raw const info).map_err(|error| error.to_string())?;
        reseed(random.as_raw_fd()).map_err(|error| error.to_string())?;
    }
    Ok(())
}

fn set_clock(time: prost_types::Timestamp) -> Result<(), String> {
    clock_settime(
        ClockId::CLOCK_REALTIME,
        TimeSpec::new(time.seconds, time.nanos.into()),
    )
    .map_err(|error| error.to_string())
}

/// Host name and machine ID, in the kernel and, where there is a place for them, in the files that say them.
pub(crate) fn set_names(name: &str, machine_id: &[u8]) -> Result<(), String> {
    sethostname(name).map_err(|error| error.to_string())?;
    let machine_id: String = machine_id
        .iter()
        .fold(String::new(), |text, byte| format!("{text}{byte:02x}"));
    let hosts = format!("127.0.0.1 localhost\n::1 localhost ip6-localhost\n127.0.1.1 {name}\n");
    let files = [
        ("/etc/hostname", format!("{name}\n")),
        ("/etc/hosts", hosts),
        ("/etc/machine-id", format!("{machine_id}\n")),
    ];
    for (path, text) in files {
        write_or_tell(path, &text);
    }
    Ok(())
}

/// Writes a file that programs may look at. Root of the guest may have left no place for it, or no room: that is in its logs, and no reason to stay closed.
pub(crate) fn write_or_tell(path: &str, text: &str) {
    if let Err(error) = write_new(path, text) {
        logs::warn(format_args!("{path} is not written: {error}"));
    }
}

/// Writes a small file, unless it says that already: a session that resumes touches no disk for it. What a link leads to is written, as images have them. Whoever made the
/// template says what is there: a link to nothing, a pipe or a device gives way to the file. Its folder stays as old as it was: a layer that is made of a
/// session is to be the same whenever that began.
fn write_new(path: impl AsRef<Path>, text: &str) -> io::Result<()> {
    let path = path.as_ref();
    if let Ok((there, _)) = files::open(path) {
        let mut said = Vec::new();
        there.take(text.len() as u64 + 1).read_to_end(&mut said)?;
        if said == text.as_bytes() {
            return Ok(());
        }
        return fs::write(path, text);
    }
    let folder = File::options()
        .read(true)
        .custom_flags(nix::libc::O_DIRECTORY)
        .open(path.parent().unwrap_or(Path::new("/")))?;
    let before = folder.metadata()?.modified()?;
    if path.symlink_metadata().is_ok() {
        fs::remove_file(path)?;
    }
    let mut made = File::options()
        .write(true)
        .create_new(true)
        .mode(0o644)
        .open(path)?;
    folder.set_modified(before)?;
    made.write_all(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::fs::symlink,
        time::{Duration, SystemTime},
    };

    use super::*;

    #[test]
    fn a_file_of_a_session_does_not_tell_when_it_began() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hosts");
        let then = SystemTime::UNIX_EPOCH + Duration::from_nanos(1_000_000_000_000_000_042);
        let set = || File::open(folder.path()).unwrap().set_modified(then);
        set().unwrap();
        for text in ["one", "one", "another"] {
            write_new(&path, text).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
            let modified = fs::metadata(folder.path()).unwrap().modified().unwrap();
            assert_eq!(modified, then, "{text}");
        }
        assert!(write_new(folder.path().join("none/file"), "").is_err());
    }

    #[test]
    fn a_template_says_not_where_it_goes_and_how_long_it_takes() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        nix::unistd::mkfifo(&at("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        fs::write(at("led to"), "a longer text than that").unwrap();
        for (name, target) in [
            ("endless", "/dev/zero"),
            ("dangling", "/run/nothing/resolv.conf"),
            ("round", "round"),
            ("link", "led to"),
        ] {
            symlink(target, at(name)).unwrap();
        }
        for name in ["fifo", "endless", "dangling", "round", "link"] {
            for text in ["one", "two"] {
                write_new(at(name), text).unwrap();
                assert_eq!(fs::read_to_string(at(name)).unwrap(), text, "{name}");
            }
            let is_file = fs::symlink_metadata(at(name)).unwrap().is_file();
            assert_eq!(is_file, name != "link", "{name}");
        }
        assert_eq!(fs::read_to_string(at("led to")).unwrap(), "two");
        fs::create_dir(at("folder")).unwrap();
        nix::unistd::mkfifo(&at("in the way"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        for name in ["folder", "in the way/file"] {
            assert!(write_new(at(name), "one").is_err(), "{name}");
        }
    }
}
