//! What it takes from the name of an image to a session of it, as ratios against what other programs need for the same bytes in the same run:
//! `curl`, `tar x`, `mkfs.erofs`, a copy. Run by `./deploy/bench image`, with release builds.
//!
//! The registry is a real one on the loopback. Each is done once: an image is fetched once, and what it wrote is in the page cache for those who
//! come after. What others write is not waited for, but for the copy, which is on the disk in the end as what is in the store.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    fs::{self, File},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use e2e::{Mesh, bench::arguments, images, small};
use sdk::NewSession;
use service_kit::config::tools_folder;
use testbed::{PASSWORD, Registry, USER};

const MIB: u64 = 1 << 20;
const NAME: &str = "bench/image";
const NOBODY: &str = "00000000-0000-0000-0000-000000000000";
const MADE: &str = "4102444800";

/// Of so many MiB, 1024 if not named, upon a Debian.
fn main() {
    let named = arguments();
    let mib = named.iter().find_map(|word| word.parse().ok());
    let work = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (layers, files) = images::large_image(work.path(), mib.unwrap_or(1024) * MIB);
    let sizes: Vec<_> = layers.iter().map(|layer| layer.size / MIB).collect();
    println!(
        "an image of {} MiB in {files} files upon a Debian: layers of {sizes:?} MiB",
        mib.unwrap_or(1024)
    );
    let registry = Registry::start(&tools_folder().join("bin")).unwrap();
    registry
        .push(&work.path().join("image"), "v1", NAME)
        .unwrap();
    fs::remove_dir_all(work.path().join("image")).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let ours = runtime.block_on(Ours::measure(&registry, work.path()));
    let theirs = Theirs::measure(&registry, &layers, work.path());
    ours.report(&theirs);
}

/// What the mesh needs.
struct Ours {
    build: f64,
    came: f64,
    unpacked: f64,
    packed: f64,
    stored: f64,
    first: f64,
    second: f64,
}

impl Ours {
    async fn measure(registry: &Registry, work: &Path) -> Self {
        let trusted = format!("http://{}", registry.address());
        let mesh = Mesh::start(&["--separate", "--trusted-registries", &trusted]);
        let password = work.join("password");
        fs::write(&password, PASSWORD).unwrap();
        let image = format!("{}/{NAME}:v1", registry.address());
        let since = Instant::now();
        let built = mesh.run(&[
            "template",
            "build",
            "-t",
            "large",
            "--image",
            &image,
            "--registry-user",
            USER,
            "--registry-password-file",
            password.to_str().unwrap(),
        ]);
        let build = since.elapsed().as_secs_f64();
        let said = String::from_utf8_lossy(&built.stderr);
        assert!(built.status.success(), "{said}");
        let first = start(&mesh).await.as_secs_f64();
        let second = start(&mesh).await.as_secs_f64();
        Self {
            build,
            came: seconds(&said, "had come after "),
            unpacked: seconds(&said, "were unpacked after "),
            packed: seconds(&said, "packed in "),
            stored: seconds(&said, "stored in "),
            first,
            second,
        }
    }

    fn report(&self, theirs: &Theirs) {
        let line = |what: &str, ours: f64, floor: &str, theirs: f64| {
            let ratio = ours / theirs;
            println!("  {what:<26}{ours:8.2} s   {floor:<26}{theirs:8.2} s   ratio {ratio:5.2}");
        };
        let unpack = theirs.fetch + theirs.unpack;
        line("pull", self.came, "curl", theirs.fetch);
        line("pull and unpack", self.unpacked, "curl, tar x", unpack);
        line("pack", self.packed, "mkfs.erofs", theirs.pack);
        line("store", self.stored, "copy, synced", theirs.copy);
        let all = unpack + theirs.pack + theirs.copy;
        line("the build as a whole", self.build, "all of these", all);
        println!(
            "  first session, on a node that fetches, boots and leaves a snapshot  {:6.2} s\n  second session, restored from it                                    {:6.2} s",
            self.first, self.second
        );
    }
}

/// From the request to the end of the first command.
async fn start(mesh: &Mesh) -> Duration {
    let new = NewSession {
        template: "large".into(),
        ..small()
    };
    let since = Instant::now();
    let session = mesh.client().create(new).await.unwrap();
    let sandbox = mesh.client().sandbox(&session).unwrap();
    let output = sandbox.run(["cat", "/srv/0/0/0"]).await.unwrap();
    assert!(output.exit.code() == 0 && !output.stdout.is_empty());
    let took = since.elapsed();
    mesh.client().stop(&session.session_id).await.unwrap();
    took
}

/// What comes after that in a build's log.
fn seconds(said: &str, before: &str) -> f64 {
    let found = said.split_once(before).map(|(_, rest)| rest);
    let word = found.and_then(|rest| rest.split(' ').next()?.parse().ok());
    word.unwrap_or_else(|| panic!("{before:?} is not in {said}"))
}

/// What others need.
struct Theirs {
    fetch: f64,
    unpack: f64,
    pack: f64,
    copy: f64,
}

impl Theirs {
    fn measure(registry: &Registry, layers: &[images::Layer], work: &Path) -> Self {
        let at = |name: String| work.join(name);
        let numbered = || (1..).zip(layers);
        let root = at("root".into());
        fs::create_dir(&root).unwrap();
        let fetch = timed(|| {
            for (number, layer) in numbered() {
                let address = registry.address();
                let url = format!("http://{address}/v2/{NAME}/blobs/{}", layer.digest);
                run(Command::new("curl")
                    .args([
                        "--noproxy",
                        "*",
                        "-fsS",
                        "-u",
                        &format!("{USER}:{PASSWORD}"),
                    ])
                    .args(["-o", path(&at(format!("layer-{number}"))), &url]));
            }
        });
        let unpack = timed(|| {
            for (number, _) in numbered() {
                let layer = at(format!("layer-{number}"));
                run(Command::new("tar")
                    .args(["-xpf", path(&layer), "--numeric-owner", "--xattrs", "-C"])
                    .arg(&root));
            }
        });
        let image = at("image.erofs".into());
        let pack = timed(|| {
            // As template-svc does: without who made it, and when.
            run(Command::new("mkfs.erofs")
                .args(["-zlz4", "--quiet", "-U", NOBODY, path(&image), path(&root)])
                .env("SOURCE_DATE_EPOCH", MADE));
        });
        let copy = timed(|| {
            let copy = at("copy".into());
            fs::copy(&image, &copy).unwrap();
            File::open(copy).unwrap().sync_all().unwrap();
        });
        Self {
            fetch,
            unpack,
            pack,
            copy,
        }
    }
}

fn timed(work: impl FnOnce()) -> f64 {
    let since = Instant::now();
    work();
    since.elapsed().as_secs_f64()
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn run(command: &mut Command) {
    let status = command.stdin(Stdio::null()).status().unwrap();
    assert!(status.success(), "{command:?}");
}
