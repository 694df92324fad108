//! A private registry of images (CNCF Distribution, as Debian has it) on the loopback.

use std::{
    fs,
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::{Command, Stdio},
};

use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    TestbedError, io_error,
    postgres::private_folder,
    process::{Server, find, run},
};

/// Who may ask a [`Registry`].
pub const USER: &str = "someone";
/// With this password.
pub const PASSWORD: &str = "secret";
/// Both as htpasswd(1) with `-B` writes them.
const HTPASSWD: &str = "someone:$2y$04$Q9efavUVM3cBNDq8NnuNGOgoPDMXhjQxXFFi4UzqTy1rlLwq3wxvi\n";

/// A private registry, which wants [`USER`] and [`PASSWORD`].
#[derive(Debug)]
pub struct Registry {
    // Fields drop in this order: the server ends before its folder goes.
    _server: Server,
    folder: TempDir,
    address: SocketAddr,
}

impl Registry {
    /// Starts one, whose program is in that folder or in the PATH.
    pub fn start(programs: &Path) -> Result<Self, TestbedError> {
        let program = find("docker-registry", &[programs.to_owned()])?;
        let folder = private_folder("smrg")?;
        // It cannot say which port it chose; until it has it, another process may take this one, and it ends.
        let free = TcpListener::bind("127.0.0.1:0").map_err(io_error("a free port"))?;
        let address = free.local_addr().map_err(io_error("a free port"))?;
        drop(free);
        let path = |name: &str| folder.path().join(name);
        fs::write(path("htpasswd"), HTPASSWD).map_err(io_error("htpasswd"))?;
        let config = format!(
            "version: 0.1\nlog: {{level: warn, accesslog: {{disabled: true}}}}\n\
             storage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: '{address}', secret: testbed}}\n\
             auth: {{htpasswd: {{realm: testbed, path: {}}}}}\n",
            path("images").display(),
            path("htpasswd").display(),
        );
        fs::write(path("config.yml"), config).map_err(io_error("config.yml"))?;
        let arguments = ["serve".to_owned(), path("config.yml").display().to_string()];
        let log = path("log");
        let mut server = Server::start(&program, &arguments, None, Signal::SIGKILL, &log)?;
        server.wait_until("the start of a registry", || {
            TcpStream::connect(address).is_ok()
        })?;
        Ok(Self {
            _server: server,
            folder,
            address,
        })
    }

    /// Where it listens, without TLS.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Puts an image of an OCI layout there, under `name:tag`.
    pub fn push(&self, layout: &Path, tag: &str, name: &str) -> Result<(), TestbedError> {
        let blob = |digest: &str| layout.join("blobs").join(digest.replacen(':', "/", 1));
        let index = document(&layout.join("index.json"))?;
        let manifests = index["manifests"].as_array().into_iter().flatten();
        let named = manifests
            .into_iter()
            .find(|it| it["annotations"]["org.opencontainers.image.ref.name"] == tag);
        let missing = |what: &str| TestbedError::Failed {
            what: format!("push of {name}"),
            output: format!("no {what} in {}", layout.display()),
        };
        let digest = |it: &Value| it["digest"].as_str().map(str::to_owned);
        let of_manifest = named.and_then(digest).ok_or_else(|| missing(tag))?;
        let kind = named.and_then(|it| it["mediaType"].as_str());
        let manifest = document(&blob(&of_manifest))?;
        let layers = manifest["layers"].as_array().into_iter().flatten();
        for one in layers.chain([&manifest["config"]]) {
            let digest = digest(one).ok_or_else(|| missing("digest"))?;
            self.push_blob(name, &digest, &blob(&digest))?;
        }
        let url = format!("http://{}/v2/{name}/manifests/{tag}", self.address);
        let kind = format!("Content-Type: {}", kind.unwrap_or_default());
        run(Self::curl()?
            .args(["-H", &kind, "-T"])
            .arg(blob(&of_manifest))
            .arg(url))
    }

    /// Two requests (distribution-spec, "POST then PUT").
    fn push_blob(&self, name: &str, digest: &str, file: &Path) -> Result<(), TestbedError> {
        let headers = self.folder.path().join("headers");
        let url = format!("http://{}/v2/{name}/blobs/uploads/", self.address);
        run(Self::curl()?
            .args(["-X", "POST", "-d", "", "-D"])
            .arg(&headers)
            .arg(url))?;
        let headers = fs::read_to_string(&headers).map_err(io_error("headers"))?;
        let location = headers.lines().find_map(|line| {
            let (name, value) = line.split_once(": ")?;
            name.eq_ignore_ascii_case("location").then(|| value.trim())
        });
        let location = location.ok_or_else(|| TestbedError::Failed {
            what: format!("push of {name}"),
            output: headers.clone(),
        })?;
        let mark = if location.contains('?') { '&' } else { '?' };
        let url = format!("{location}{mark}digest={digest}");
        let kind = "Content-Type: application/octet-stream";
        run(Self::curl()?.args(["-H", kind, "-T"]).arg(file).arg(url))
    }

    fn curl() -> Result<Command, TestbedError> {
        let mut curl = Command::new(find("curl", &[])?);
        curl.args([
            "--noproxy",
            "*",
            "-fsS",
            "-u",
            &format!("{USER}:{PASSWORD}"),
        ]);
        curl.stdout(Stdio::null());
        Ok(curl)
    }
}

fn document(path: &Path) -> Result<Value, TestbedError> {
    let what = || path.display().to_string();
    let bytes = fs::read(path).map_err(io_error(what()))?;
    serde_json::from_slice(&bytes).map_err(|error| io_error(what())(error.into()))
}
