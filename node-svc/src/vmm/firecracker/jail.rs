//! What is Firecracker's own: a user, a root folder and a cgroup (docs/jailer.md of Firecracker).
//!
//! ```text
//!  FOLDER/jail/log                          what the jailer and Firecracker say
//!  FOLDER/jail/<program>/<id>/root/         the jail, owned by its user from the start of Firecracker on
//!                                 api.sock  v.sock  scratch  rootfs  memory ...
//! ```
//! A guest that broke out of its VM owns the jail and nothing else, so nothing in there is believed: sockets and files are opened
//! beneath a descriptor of the jail, without following links, and looked at before they are used. That descriptor also makes names
//! short, however long the folder's is, and stays good when the folder is renamed.

use std::{
    ffi::OsString,
    fs::{self, DirBuilder, File, Permissions},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::fs::{
            DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
        },
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags};
use tokio::net::UnixStream;

use crate::vmm::cgroup::Cgroups;

/// Beneath a guest's folder.
const JAIL: &str = "jail";
const LOG: &str = "log";
/// The log is cut to this when it has grown to four times as much.
const LOG_KEPT: u64 = 256 << 10;

/// What the jailer is told.
#[derive(Debug)]
pub struct Imprisonment<'a> {
    /// Unlike that of any other jail of the host.
    pub id: &'a str,
    /// Firecracker's program.
    pub firecracker: &'a Path,
    /// User, and group.
    pub uid: u32,
    /// The guest's folder.
    pub folder: &'a Path,
    /// Network namespace.
    pub netns: &'a Path,
    /// Where there is cgroup v2.
    pub cgroups: Option<&'a Cgroups>,
    /// Virtual CPUs of the guest.
    pub vcpus: u32,
    /// Memory of the guest.
    pub memory_bytes: u64,
    /// No file in the jail grows beyond it.
    pub largest_file: u64,
    /// Whether it boots from `config.json` at once.
    pub boots: bool,
}

impl Imprisonment<'_> {
    /// The jailer's arguments, Firecracker's after `--`. It is not told to daemonize or to take a PID namespace: so it becomes
    /// Firecracker, and its PID is Firecracker's.
    pub fn arguments(&self) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = Vec::new();
        let mut add = |flag: &str, value: OsString| {
            arguments.push(flag.into());
            arguments.push(value);
        };
        add("--id", self.id.into());
        add("--exec-file", self.firecracker.into());
        add("--uid", self.uid.to_string().into());
        add("--gid", self.uid.to_string().into());
        add("--chroot-base-dir", self.folder.join(JAIL).into());
        add("--netns", self.netns.into());
        if let Some(cgroups) = self.cgroups {
            add("--cgroup-version", "2".into());
            add("--parent-cgroup", cgroups.parent().to_owned().into());
            for limit in cgroups.limits(self.vcpus, self.memory_bytes) {
                add("--cgroup", limit.into());
            }
        }
        add(
            "--resource-limit",
            format!("fsize={}", self.largest_file).into(),
        );
        arguments.push("--".into());
        let mut add = |flag: &str, value: &str| {
            arguments.push(flag.into());
            arguments.push(value.into());
        };
        add("--api-sock", super::API_SOCKET);
        // Seccomp filters are on unless one asks otherwise.
        add("--level", "Warning");
        if self.boots {
            add("--config-file", super::CONFIG);
        }
        arguments
    }
}

/// Makes the jail's folder, with nothing in it, in place of any before; the jailer gives it to its user.
pub fn make(folder: &Path, firecracker: &Path, id: &str) -> io::Result<JailRoot> {
    remove(folder)?;
    let program = firecracker.file_name().unwrap_or_default();
    let mut private = DirBuilder::new();
    private.mode(0o700).recursive(true);
    let root = folder.join(JAIL).join(program).join(id).join("root");
    private.create(&root)?;
    JailRoot::open(&root)
}

/// Removes the jail of a Firecracker that is gone. Blocking.
pub fn remove(folder: &Path) -> io::Result<()> {
    crate::stored::remove(&folder.join(JAIL))
}

/// The jail's root folder in a guest's folder, if there is one.
pub fn root_in(folder: &Path) -> Option<PathBuf> {
    let only = |folder: PathBuf| {
        let mut folders = fs::read_dir(folder).ok()?.flatten().filter(|entry| {
            // Beside the program's there is the log.
            entry.file_type().is_ok_and(|kind| kind.is_dir())
        });
        folders.next().map(|entry| entry.path())
    };
    Some(only(only(folder.join(JAIL))?)?.join("root"))
}

/// Opens the log that the jailer and Firecracker write. Every write goes to its end, so that it can be cut under them.
pub fn open_log(folder: &Path) -> io::Result<File> {
    File::options()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(folder.join(JAIL).join(LOG))
}

/// The end of the log, at most so many bytes.
pub fn log_tail(folder: &Path, bytes: u64) -> String {
    let read = || {
        let mut log = File::open(folder.join(JAIL).join(LOG))?;
        let length = log.metadata()?.len();
        log.seek(SeekFrom::Start(length.saturating_sub(bytes)))?;
        let mut tail = Vec::new();
        log.take(bytes).read_to_end(&mut tail)?;
        Ok::<_, io::Error>(tail)
    };
    String::from_utf8_lossy(&read().unwrap_or_default()).into_owned()
}

/// Forgets the beginning of a log that has grown too long: a guest that prints must not fill the disk.
pub fn trim_log(folder: &Path) -> io::Result<()> {
    let path = folder.join(JAIL).join(LOG);
    match fs::metadata(&path) {
        Ok(metadata) if metadata.len() > 4 * LOG_KEPT => {}
        _ => return Ok(()),
    }
    let tail = log_tail(folder, LOG_KEPT);
    let mut log = File::options().append(true).open(path)?;
    log.set_len(0)?;
    log.write_all(tail.as_bytes())
}

/// Lets every jailed Firecracker that is given a name of this file read it. Others do not get near it: the node's folder is closed.
fn make_readable(path: &Path) -> io::Result<()> {
    let mode = fs::metadata(path)?.mode();
    if mode & 0o444 == 0o444 {
        return Ok(());
    }
    fs::set_permissions(path, Permissions::from_mode(mode & 0o7777 | 0o444))
}

/// The inside of a jail.
#[derive(Debug, Clone)]
pub struct JailRoot(Arc<OwnedFd>);

impl JailRoot {
    /// A jail by its path.
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(Self(Arc::new(rustix::fs::open(
            path,
            flags,
            Mode::empty(),
        )?)))
    }

    /// Connects to a socket in the jail, and to nothing that a link there names.
    pub async fn connect(&self, name: &str) -> io::Result<UnixStream> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let socket = rustix::fs::openat(&*self.0, name, flags, Mode::empty())?;
        if FileType::from_raw_mode(rustix::fs::fstat(&socket)?.st_mode) != FileType::Socket {
            let message = format!("{name} in the jail is no socket");
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        UnixStream::connect(format!("/proc/self/fd/{}", socket.as_raw_fd())).await
    }

    /// Writes a file before Firecracker starts.
    pub fn put(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&*self.0, name, flags, Mode::from_raw_mode(0o444))?;
        File::from(file).write_all(bytes)
    }

    /// Gives a file a name in the jail, to be read only.
    pub fn lend(&self, file: &Path, name: &str) -> io::Result<()> {
        make_readable(file)?;
        self.link(file, name)
    }

    /// Gives a file to the jail's user.
    pub fn give(&self, file: &Path, name: &str, uid: u32) -> io::Result<()> {
        std::os::unix::fs::lchown(file, Some(uid), Some(uid))?;
        fs::set_permissions(file, Permissions::from_mode(0o600))?;
        self.link(file, name)
    }

    fn link(&self, file: &Path, name: &str) -> io::Result<()> {
        rustix::fs::linkat(CWD, file, &*self.0, name, AtFlags::empty()).map_err(|errno| {
            let error = io::Error::from(errno);
            let message = format!("{} cannot be linked into the jail: {error}", file.display());
            io::Error::new(error.kind(), message)
        })
    }

    /// Forgets a name, if it is there.
    pub fn forget(&self, name: &str) -> io::Result<()> {
        match rustix::fs::unlinkat(&*self.0, name, AtFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Moves a copy of a file that Firecracker made out of the jail. Blocking.
    pub fn take_copy(&self, name: &str, to: &Path, longest: u64) -> io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let made = File::from(rustix::fs::openat(&*self.0, name, flags, Mode::empty())?);
        let metadata = made.metadata()?;
        if !metadata.is_file() || metadata.len() > longest {
            return Err(unexpected(name));
        }
        let mut copy = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(to)?;
        io::copy(&mut made.take(longest), &mut copy)?;
        self.forget(name)
    }

    /// Moves a file that Firecracker made out of the jail, and makes it ours. Firecracker may still write it if it has it open, so it
    /// has to end before the file is believed.
    pub fn take(&self, name: &str, to: &Path) -> io::Result<()> {
        rustix::fs::renameat(&*self.0, name, CWD, to)?;
        let owned = || {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let file = File::from(rustix::fs::open(to, flags, Mode::empty())?);
            let metadata = file.metadata()?;
            if !metadata.is_file() || metadata.nlink() != 1 {
                return Err(unexpected(name));
            }
            std::os::unix::fs::fchown(&file, Some(0), Some(0))?;
            file.set_permissions(Permissions::from_mode(0o644))
        };
        owned().inspect_err(|_| {
            if let Err(error) = fs::remove_file(to) {
                tracing::error!(%error, file = %to.display(), "what came out of a jail is left behind");
            }
        })
    }
}

fn unexpected(name: &str) -> io::Error {
    let message = format!("{name} in the jail is not the file it should be");
    io::Error::new(io::ErrorKind::InvalidData, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(arguments: &[OsString]) -> Vec<&str> {
        arguments
            .iter()
            .map(|argument| argument.to_str().unwrap())
            .collect()
    }

    #[test]
    fn the_jailer_is_told_exactly_this() {
        let cgroups = Cgroups::new(
            "/sys/fs/cgroup",
            "sandmesh/0123abcd",
            &["cpu", "memory", "pids"],
        );
        let mut told = Imprisonment {
            id: "sandmesh-7",
            firecracker: Path::new("/usr/bin/firecracker"),
            uid: 1_900_000_007,
            folder: Path::new("/var/lib/sandmesh/node/s/abc"),
            netns: Path::new("/run/netns/sandmesh-7"),
            cgroups: Some(&cgroups),
            vcpus: 2,
            memory_bytes: 256 << 20,
            largest_file: 1 << 30,
            boots: true,
        };
        assert_eq!(
            words(&told.arguments()),
            [
                "--id",
                "sandmesh-7",
                "--exec-file",
                "/usr/bin/firecracker",
                "--uid",
                "1900000007",
                "--gid",
                "1900000007",
                "--chroot-base-dir",
                "/var/lib/sandmesh/node/s/abc/jail",
                "--netns",
                "/run/netns/sandmesh-7",
                "--cgroup-version",
                "2",
                "--parent-cgroup",
                "sandmesh/0123abcd",
                "--cgroup",
                "cpu.weight=200",
                "--cgroup",
                "cpu.max=200000 100000",
                "--cgroup",
                "memory.max=402653184",
                "--cgroup",
                "memory.swap.max=0",
                "--cgroup",
                "pids.max=82",
                "--resource-limit",
                "fsize=1073741824",
                "--",
                "--api-sock",
                "api.sock",
                "--level",
                "Warning",
                "--config-file",
                "config.json",
            ]
        );
        (told.cgroups, told.boots) = (None, false);
        assert_eq!(
            words(&told.arguments())[10..],
            [
                "--netns",
                "/run/netns/sandmesh-7",
                "--resource-limit",
                "fsize=1073741824",
                "--",
                "--api-sock",
                "api.sock",
                "--level",
                "Warning",
            ][..]
        );
    }

    #[tokio::test]
    async fn nothing_in_a_jail_leads_out_of_it() {
        let folder = tempfile::tempdir().unwrap();
        let root = make(folder.path(), Path::new("/bin/firecracker"), "id").unwrap();
        let inside = root_in(folder.path()).unwrap();
        assert_eq!(inside, folder.path().join("jail/firecracker/id/root"));
        let secret = folder.path().join("secret");
        fs::write(&secret, "secret").unwrap();
        let other = folder.path().join("other.sock");
        let listener = tokio::net::UnixListener::bind(&other).unwrap();
        let real = tokio::net::UnixListener::bind(inside.join("real.sock")).unwrap();
        for (name, target) in [
            ("api.sock", &other),
            ("state", &secret),
            ("memory", &secret),
        ] {
            std::os::unix::fs::symlink(target, inside.join(name)).unwrap();
        }
        assert!(root.connect("api.sock").await.is_err());
        drop(listener);
        let to = folder.path().join("out");
        root.take_copy("state", &to, 100).unwrap_err();
        root.take("memory", &to).unwrap_err();
        assert!(!to.exists());
        assert_eq!(fs::read(&secret).unwrap(), b"secret");
        fs::hard_link(&secret, inside.join("memory")).unwrap();
        root.take("memory", &to).unwrap_err();
        assert_eq!(fs::read(&secret).unwrap(), b"secret");
        fs::remove_file(inside.join("state")).unwrap();
        fs::write(inside.join("state"), "too long").unwrap();
        root.take_copy("state", &to, 5).unwrap_err();
        root.take_copy("state", &to, 8).unwrap();
        assert_eq!(fs::read(&to).unwrap(), b"too long");
        // A jail is found by its descriptor, whatever its folder is called by now.
        fs::rename(folder.path().join("jail"), folder.path().join("moved")).unwrap();
        root.connect("real.sock").await.unwrap();
        drop(real);
    }

    #[test]
    fn a_log_is_cut_under_its_writer() {
        let folder = tempfile::tempdir().unwrap();
        make(folder.path(), Path::new("/bin/firecracker"), "id").unwrap();
        let mut log = open_log(folder.path()).unwrap();
        log.write_all(&vec![b'a'; 1 << 20]).unwrap();
        trim_log(folder.path()).unwrap();
        assert_eq!(log.metadata().unwrap().len(), 1 << 20, "not yet");
        log.write_all(b"end").unwrap();
        trim_log(folder.path()).unwrap();
        assert_eq!(log.metadata().unwrap().len(), LOG_KEPT);
        log.write_all(b" and on").unwrap();
        assert_eq!(log_tail(folder.path(), 10), "end and on");
    }
}
