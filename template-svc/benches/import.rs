//! What it takes to make a template's image of layers, as ratios against `tar` and `mkfs.erofs` in the same run, what one image saves over several, and what it takes to store and fetch it. Run by `./deploy/bench templates`.
//!
//! Rounds of all variants take turns, and medians are shown. What is read is in the page cache, what is written is not waited for: by nobody.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    fs::{self, File},
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use blobs::{Address, Blobs, Cut};
use rand::{Rng as _, RngExt as _, SeedableRng as _, rngs::SmallRng};
use template_svc::{
    layer::{Limits, Root, Whiteouts},
    rootfs,
};
use tokio_util::sync::CancellationToken;

const ROUNDS: usize = 3;
const VERSIONS: usize = 20;
/// Images that are laid one upon the other.
const STACKED: u64 = 10;
const MIB: u64 = 1 << 20;
const LIMITS: Limits = Limits {
    bytes: 1 << 40,
    entries: 10_000_000,
};

/// Of so many MiB, 256 if not named.
fn main() {
    let mut arguments = std::env::args().skip(1);
    let mib = arguments.find_map(|word| word.parse().ok()).unwrap_or(256);
    let work = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let at = |name: &str| work.path().join(name);
    let files = plant(&at("tree"), mib * MIB);
    println!("a root of {mib} MiB in {files} files; medians of {ROUNDS} rounds");
    tar(&["-C", path(&at("tree")), "-cf", path(&at("plain.tar")), "."]);
    packed("gzip", &["-1"], &at("plain.tar"), &at("gzip.tar"));
    packed("zstd", &["-q", "-1"], &at("plain.tar"), &at("zstd.tar"));
    for kind in ["plain", "gzip", "zstd"] {
        let layer = at(&format!("{kind}.tar"));
        let (mut theirs, mut ours) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            theirs.push(timed(&at("theirs"), |to| {
                tar(&[
                    "-xpf",
                    path(&layer),
                    "--numeric-owner",
                    "--xattrs",
                    "-C",
                    path(to),
                ]);
            }));
            ours.push(timed(&at("ours"), |to| apply(&layer, to)));
        }
        report(&format!("unpack, {kind}"), "tar x", &mut ours, &mut theirs);
    }
    let root = at("packed");
    fs::create_dir(&root).unwrap();
    apply(&at("plain.tar"), &root);
    let (mut theirs, mut ours) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        theirs.push(timed(&at("theirs"), |to| {
            let image = to.join("image");
            run(Command::new("mkfs.erofs").args(["-zlz4", "--quiet", path(&image), path(&root)]));
        }));
        ours.push(timed(&at("ours"), |to| {
            rootfs::pack(&root, &to.join("image")).unwrap();
        }));
    }
    report("pack", "mkfs.erofs", &mut ours, &mut theirs);
    stacked(&root, &at("stacked"));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(store(&root, work.path()));
}

/// The same files in one image, and in several that overlayfs lays one upon the other: to mount them, to look at every file, and to read all of it. Mounts are
/// new in each round, so names and files are not known to the kernel yet; images are in the page cache.
fn stacked(root: &Path, work: &Path) {
    if !rustix::process::geteuid().is_root() {
        println!("stacked images are mounted by root alone: not measured");
        return;
    }
    fs::create_dir(work).unwrap();
    let at = |name: &str| work.join(name);
    rootfs::pack(root, &at("merged.erofs")).unwrap();
    for layer in 0..STACKED {
        let part = at("part");
        fs::create_dir(&part).unwrap();
        share(root, &part, layer, &mut 0);
        rootfs::pack(&part, &at(&format!("{layer}.erofs"))).unwrap();
        fs::remove_dir_all(&part).unwrap();
    }
    let mut took: [[Vec<Duration>; 2]; 3] = Default::default();
    for _ in 0..ROUNDS {
        for (which, layers) in [STACKED, 0].into_iter().enumerate() {
            let top = at("top");
            fs::create_dir(&top).unwrap();
            let mut mounted: Vec<std::path::PathBuf> = Vec::new();
            let since = Instant::now();
            for layer in 0..layers {
                let below = at(&layer.to_string());
                fs::create_dir_all(&below).unwrap();
                mount_image(&at(&format!("{layer}.erofs")), &below);
                mounted.push(below);
            }
            if layers > 0 {
                let below: Vec<_> = mounted.iter().map(|below| path(below)).collect();
                let options = format!("lowerdir={}", below.join(":"));
                let mut mount = Command::new("mount");
                run(mount.args(["-t", "overlay", "-o", &options, "overlay", path(&top)]));
            } else {
                mount_image(&at("merged.erofs"), &top);
            }
            took[0][which].push(since.elapsed());
            let since = Instant::now();
            quietly(&["find", path(&top), "-printf", "%s"]);
            took[1][which].push(since.elapsed());
            let since = Instant::now();
            quietly(&["grep", "-rc", "never there", path(&top)]);
            took[2][which].push(since.elapsed());
            for folder in std::iter::once(&top).chain(&mounted) {
                run(Command::new("umount").arg(folder));
            }
            fs::remove_dir(&top).unwrap();
        }
    }
    for (what, [ours, theirs]) in ["mount", "look at all", "read all"].iter().zip(&mut took) {
        report(&format!("{STACKED}: {what}"), "one image", ours, theirs);
    }
}

/// Every so manieth file of a tree, by hard links.
fn share(from: &Path, to: &Path, layer: u64, number: &mut u64) {
    let mut entries: Vec<_> = fs::read_dir(from).unwrap().map(Result::unwrap).collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            fs::create_dir(&to).unwrap();
            share(&entry.path(), &to, layer, number);
            continue;
        }
        *number += 1;
        if *number % STACKED == layer {
            fs::hard_link(entry.path(), to).unwrap();
        }
    }
}

fn mount_image(image: &Path, to: &Path) {
    let mut mount = Command::new("mount");
    run(mount.args(["-t", "erofs", "-o", "loop,ro", path(image), path(to)]));
}

fn quietly(words: &[&str]) {
    let (program, arguments) = words.split_first().unwrap();
    let mut command = Command::new(program);
    let status = command.args(arguments).stdout(Stdio::null()).status();
    // What finds nothing says so by 1.
    assert!(status.unwrap().code().unwrap() <= 1);
}

/// Versions that differ by a file of 1 MiB, in an object store, and one of them fetched by a node that has nothing.
async fn store(root: &Path, work: &Path) {
    let folder = work.join("store");
    let blobs = Blobs::open(&Address::of_folder(&folder).unwrap()).unwrap();
    let (mut random, mut noise) = (SmallRng::seed_from_u64(8), vec![0; MIB as usize]);
    let (mut whole, mut size, mut new, mut last) = (0, 0, Vec::new(), String::new());
    let mut took = Vec::new();
    let image = work.join("version");
    for _ in 0..VERSIONS {
        random.fill_bytes(&mut noise);
        fs::write(root.join("etc/version"), &noise).unwrap();
        rootfs::pack(root, &image).unwrap();
        size = fs::metadata(&image).unwrap().len();
        whole += size;
        let since = Instant::now();
        let (digest, moved) = blobs.put(&image, Cut::Content).await.unwrap();
        took.push(since.elapsed());
        new.push(moved.moved_bytes);
        last = digest;
        fs::remove_file(&image).unwrap();
    }
    let stored: u64 = new.iter().sum();
    let first = new.remove(0);
    println!(
        "{VERSIONS} versions that differ by 1 MiB: {stored} bytes in the store, the first {first}, a further one {} to {}; \
         {VERSIONS} whole images are {whole}, ratio {:.3}",
        new.iter().min().unwrap(),
        new.iter().max().unwrap(),
        stored as f64 / whole as f64
    );
    println!(
        "storing the first took {:.2} s, the last {:.2} s",
        took[0].as_secs_f64(),
        took[VERSIONS - 1].as_secs_f64()
    );
    let (mut theirs, mut ours) = (Vec::new(), Vec::new());
    let mut fetched = 0;
    for _ in 0..ROUNDS {
        let since = Instant::now();
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&image)
            .unwrap();
        let moved = blobs.get(&last, size, file).await.unwrap();
        ours.push(since.elapsed());
        fetched = moved.moved_bytes;
        theirs.push(timed(&work.join("theirs"), |to| {
            fs::copy(&image, to.join("copy")).unwrap();
            File::open(to.join("copy")).unwrap().sync_all().unwrap();
        }));
    }
    println!("a node that has nothing fetches {fetched} bytes of the last");
    report("fetch", "copy", &mut ours, &mut theirs);
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn run(command: &mut Command) {
    let status = command.stdin(Stdio::null()).status().unwrap();
    assert!(status.success(), "{command:?}");
}

fn tar(arguments: &[&str]) {
    run(Command::new("tar").args(arguments));
}

fn packed(program: &str, arguments: &[&str], from: &Path, to: &Path) {
    let (from, to) = (File::open(from).unwrap(), File::create(to).unwrap());
    let mut command = Command::new(program);
    let status = command.args(arguments).arg("-c").stdin(from).stdout(to);
    assert!(status.status().unwrap().success());
}

fn apply(layer: &Path, to: &Path) {
    let mut root = Root::new(to.to_owned(), LIMITS);
    let layer = File::open(layer).unwrap();
    root.apply(layer, Whiteouts::Apply, &CancellationToken::new())
        .unwrap();
    root.finish().unwrap();
}

/// How long it takes in an empty folder, which is removed after.
fn timed(folder: &Path, work: impl FnOnce(&Path)) -> Duration {
    fs::create_dir(folder).unwrap();
    let since = Instant::now();
    work(folder);
    let took = since.elapsed();
    fs::remove_dir_all(folder).unwrap();
    took
}

fn report(what: &str, floor: &str, ours: &mut [Duration], theirs: &mut [Duration]) {
    let median = |values: &mut [Duration]| {
        values.sort();
        values.get(values.len() / 2).unwrap().as_secs_f64()
    };
    let (ours, theirs) = (median(ours), median(theirs));
    println!(
        "{what:15} {ours:6.2} s   {floor:10} {theirs:6.2} s   ratio {:4.2}",
        ours / theirs
    );
}

/// Many small files and some large ones, half of what is in them noise, as in a system with its libraries and packages.
fn plant(root: &Path, mut bytes: u64) -> u64 {
    let mut random = SmallRng::seed_from_u64(7);
    let mut files = 0;
    for name in ["bin", "etc", "usr"] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    while bytes > 0 {
        let folder = root.join(format!("usr/{}/{}", files / 1000, files % 1000 / 50));
        fs::create_dir_all(&folder).unwrap();
        let size = 1_u64 << random.random_range(9..=if files % 200 == 0 { 25 } else { 16 });
        let size = size.min(bytes);
        let mut file = File::create(folder.join(files.to_string())).unwrap();
        let mut noise = [0; 2048];
        for _ in 0..size.div_ceil(4096) {
            random.fill_bytes(&mut noise);
            file.write_all(&noise).unwrap();
            file.write_all(&[b'a'; 2048]).unwrap();
        }
        file.set_len(size).unwrap();
        bytes -= size;
        files += 1;
    }
    files
}
