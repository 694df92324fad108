//! A private Postgres.
//!
//! `initdb` takes a second, so it is done once per machine and version into `$XDG_CACHE_HOME/sandmesh-testbed`; each server gets
//! a copy. Postgres refuses to run as root, so under root it runs as the `postgres` system user.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use nix::{
    fcntl::{Flock, FlockArg},
    sys::signal::Signal,
    unistd::Uid,
};
use tempfile::TempDir;

use crate::{
    TestbedError, io_error,
    process::{Server, find, run},
};

const USER: &str = "postgres";

/// Whether commits wait for the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// They do, as in production: for benches.
    Full,
    /// They do not, which is fast. A killed server keeps its commits all the same; only a power cut would lose them.
    None,
}

/// A private Postgres server with a database `postgres` and a superuser `postgres`.
#[derive(Debug)]
pub struct Postgres {
    // Fields drop in this order: the server ends before its folder goes.
    server: Option<Server>,
    folder: TempDir,
    programs: PathBuf,
    durability: Durability,
}

impl Postgres {
    /// Starts one that does not wait for the disk.
    pub fn start() -> Result<Self, TestbedError> {
        Self::with(Durability::None)
    }

    /// Starts one.
    pub fn with(durability: Durability) -> Result<Self, TestbedError> {
        let programs = programs()?;
        let cluster = cluster(&programs)?;
        let folder = private_folder("smpg")?;
        let data = folder.path().join("data");
        run(Command::new("cp")
            .args(["-a", "--reflink=auto"])
            .arg(&cluster)
            .arg(&data))?;
        give_to_user(folder.path())?;
        let mut postgres = Self {
            server: None,
            folder,
            programs,
            durability,
        };
        postgres.start_again()?;
        Ok(postgres)
    }

    /// `postgres://...`, for sqlx and libpq.
    pub fn url(&self) -> String {
        let socket = self.socket_folder();
        format!(
            "postgres://{USER}@localhost/postgres?host={}",
            socket.display()
        )
    }

    /// The folder its socket is in, for `psql -h`.
    pub fn socket_folder(&self) -> &Path {
        self.folder.path()
    }

    /// A program of the same version, such as `pgbench`.
    pub fn program(&self, name: &'static str) -> Result<PathBuf, TestbedError> {
        find(name, std::slice::from_ref(&self.programs))
    }

    /// What it logged so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_file()).unwrap_or_default()
    }

    /// Ends it as an administrator does: sessions are cut, commits are kept.
    pub fn stop(&mut self) -> Result<(), TestbedError> {
        match self.server.take() {
            Some(server) => server.end(Signal::SIGINT),
            None => Ok(()),
        }
    }

    /// Ends it as a crash does; the next start recovers.
    pub fn kill(&mut self) -> Result<(), TestbedError> {
        match self.server.take() {
            Some(server) => server.end(Signal::SIGQUIT),
            None => Ok(()),
        }
    }

    /// Stops and starts.
    pub fn restart(&mut self) -> Result<(), TestbedError> {
        self.stop()?;
        self.start_again()
    }

    /// Starts it after [`Postgres::stop`] or [`Postgres::kill`], with the same data and address.
    pub fn start_again(&mut self) -> Result<(), TestbedError> {
        let data = self.folder.path().join("data");
        let on = if self.durability == Durability::Full {
            "on"
        } else {
            "off"
        };
        let settings = [
            "listen_addresses=",
            &format!("unix_socket_directories={}", self.folder.path().display()),
            &format!("fsync={on}"),
            &format!("full_page_writes={on}"),
            "max_connections=200",
            "shared_buffers=64MB",
        ]
        .map(|setting| ["-c".to_owned(), setting.to_owned()]);
        let arguments: Vec<String> = ["-D".to_owned(), data.display().to_string()]
            .into_iter()
            .chain(settings.into_iter().flatten())
            .collect();
        let mut server = Server::start(
            &self.programs.join("postgres"),
            &arguments,
            user(),
            Signal::SIGQUIT,
            &self.log_file(),
        )?;
        // The eighth line of this file is the server's state (postgres: src/include/utils/pidfile.h).
        let status = data.join("postmaster.pid");
        server.wait_until("the start of postgres", || {
            fs::read_to_string(&status)
                .is_ok_and(|text| text.lines().nth(7).is_some_and(|s| s.trim() == "ready"))
        })?;
        self.server = Some(server);
        Ok(())
    }

    fn log_file(&self) -> PathBuf {
        self.folder.path().join("log")
    }
}

fn user() -> Option<&'static str> {
    Uid::effective().is_root().then_some(USER)
}

/// The folder of the newest installed version's programs.
fn programs() -> Result<PathBuf, TestbedError> {
    let versions = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten();
    let newest = versions
        .filter_map(|entry| {
            let version: u32 = entry.file_name().to_str()?.parse().ok()?;
            let folder = entry.path().join("bin");
            folder.join("initdb").is_file().then_some((version, folder))
        })
        .max();
    match newest {
        Some((_, folder)) => Ok(folder),
        None => Ok(find("initdb", &[])?
            .parent()
            .unwrap_or(Path::new("/"))
            .to_owned()),
    }
}

/// A temporary folder only its owner can enter, with a path short enough for sockets in it (unix(7): 107 bytes).
pub(crate) fn private_folder(prefix: &str) -> Result<TempDir, TestbedError> {
    tempfile::Builder::new()
        .prefix(prefix)
        .permissions(fs::Permissions::from_mode(0o700))
        .tempdir_in("/tmp")
        .map_err(io_error("temporary folder"))
}

fn give_to_user(folder: &Path) -> Result<(), TestbedError> {
    match user() {
        Some(user) => run(Command::new("chown")
            .args(["-R", &format!("{user}:")])
            .arg(folder)),
        None => Ok(()),
    }
}

/// The freshly initialised cluster that servers are copied from, made if it is not there; safe when several tests do so at once.
fn cluster(programs: &Path) -> Result<PathBuf, TestbedError> {
    let cache = cache_folder();
    fs::create_dir_all(&cache).map_err(io_error(cache.display().to_string()))?;
    let version = programs
        .parent()
        .and_then(Path::file_name)
        .unwrap_or_default();
    let ready = cache.join(format!("postgres-{}-small", version.display()));
    let lock = fs::File::create(cache.join("lock")).map_err(io_error("lock file"))?;
    // Held until this function returns.
    let _lock = Flock::lock(lock, FlockArg::LockExclusive)
        .map_err(|(_, errno)| io_error("lock file")(errno.into()))?;
    if ready.join("PG_VERSION").is_file() {
        return Ok(ready);
    }
    // The server's user cannot enter the cache, so it works in a folder of its own.
    let workplace = private_folder("smpg")?;
    give_to_user(workplace.path())?;
    let made = workplace.path().join("data");
    let mut initdb = Command::new("setpriv");
    if let Some(user) = user() {
        initdb.args(["--reuid", user, "--regid", user, "--init-groups"]);
    }
    initdb
        .arg("--")
        .arg(programs.join("initdb"))
        .arg("-D")
        .arg(&made);
    initdb.args(["-U", USER, "-A", "trust", "-E", "UTF8", "--no-locale"]);
    // It is copied for every test.
    initdb.arg("--wal-segsize=1");
    run(initdb.arg("--no-sync").current_dir("/"))?;
    let fresh = cache.join(format!("fresh-{}", std::process::id()));
    run(Command::new("cp").arg("-a").arg(&made).arg(&fresh))?;
    fs::rename(&fresh, &ready).map_err(io_error(ready.display().to_string()))?;
    Ok(ready)
}

fn cache_folder() -> PathBuf {
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(home)
        .unwrap_or_else(std::env::temp_dir)
        .join("sandmesh-testbed")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(postgres: &Postgres, statement: &str) -> String {
        let output = Command::new(postgres.program("psql").unwrap())
            .args(["-h", &postgres.socket_folder().display().to_string()])
            .args(["-U", USER, "-Atc", statement, "postgres"])
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    #[test]
    fn data_survives_a_stop_and_a_crash() {
        let mut postgres = Postgres::start().unwrap();
        answer(
            &postgres,
            "create table t (n int); insert into t values (7)",
        );
        postgres.restart().unwrap();
        assert_eq!(answer(&postgres, "select n from t"), "7");
        postgres.kill().unwrap();
        assert_eq!(answer(&postgres, "select 1"), "");
        postgres.start_again().unwrap();
        assert_eq!(answer(&postgres, "select n from t"), "7");
    }

    #[test]
    fn a_dropped_server_leaves_nothing() {
        let postgres = Postgres::start().unwrap();
        let folder = postgres.socket_folder().to_owned();
        let file = fs::read_to_string(folder.join("data/postmaster.pid")).unwrap();
        let pid = file.lines().next().unwrap().to_owned();
        drop(postgres);
        assert!(!folder.exists());
        assert!(!Path::new("/proc").join(pid).exists());
    }
}
