//! The rules of layer.md, one case each.

use std::{
    fs,
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
};

use rstest::rstest;
use tar::EntryType;
use template_svc::layer::{Limits, Root, Whiteouts};
use tokio_util::sync::CancellationToken;

use crate::{
    layout::{self, Layer, Packing},
    tree,
};

const LIMITS: Limits = Limits {
    bytes: 64 << 20,
    entries: 10_000,
};

fn by_umoci(layout: &Path, to: &Path) {
    let image = format!("{}:latest", layout.display());
    let output = Command::new("umoci")
        .args(["raw", "unpack", "--image", &image])
        .arg(to)
        .stdin(Stdio::null())
        .output()
        .expect("umoci is installed (./deploy/install test)");
    assert!(
        output.status.success(),
        "umoci: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

fn by_us(layers: &[Vec<u8>], packing: Packing, to: &Path) {
    fs::create_dir(to).unwrap();
    let mut root = Root::new(to.to_owned(), LIMITS);
    for layer in layers {
        let packed = layout::pack(layer, packing);
        root.apply(&*packed, Whiteouts::Apply, &CancellationToken::new())
            .unwrap();
    }
    root.finish().unwrap();
}

/// Both unpack the same image; all that is there, and said of it, is the same.
fn agrees(layers: Vec<Layer>, packing: Packing) -> tree::Tree {
    let layers: Vec<Vec<u8>> = layers.into_iter().map(Layer::bytes).collect();
    let folder = tempfile::tempdir().unwrap();
    let [layout, theirs, ours] = ["layout", "theirs", "ours"].map(|name| folder.path().join(name));
    layout::write(&layout, &layers, packing);
    by_umoci(&layout, &theirs);
    by_us(&layers, packing, &ours);
    let (theirs, ours) = (tree::read(&theirs), tree::read(&ours));
    let differences = tree::differences(&ours, &theirs);
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    ours
}

/// A root as images have one.
fn base() -> Layer {
    Layer::new()
        .folder("./", 0o755)
        .folder("etc/", 0o755)
        .file("etc/passwd", b"root:x:0:0::/root:/bin/sh\n")
        .folder("usr/", 0o755)
        .folder("usr/bin/", 0o755)
        .file_of("usr/bin/su", b"\x7fELF", 0o4755, (0, 0))
        .file_of("usr/bin/wall", b"\x7fELF", 0o2755, (0, 5))
        .symlink("bin", "usr/bin")
        .folder("tmp/", 0o1777)
        .folder("var/", 0o755)
        .folder("var/lib/", 0o755)
        .file("var/lib/a", b"a")
        .file("var/lib/b", b"b")
}

#[rstest]
#[case::plain(Packing::Plain)]
#[case::gzip(Packing::Gzip)]
fn one_layer(#[case] packing: Packing) {
    let tree = agrees(vec![base()], packing);
    assert!(tree["usr/bin/su"].contains("mode 4755"));
    assert!(tree["tmp"].contains("mode 1777"));
}

/// `umoci` of Debian 12 does not know zstd: it unpacks the same layers plain.
#[test]
fn zstd_is_the_same_as_plain() {
    let folder = tempfile::tempdir().unwrap();
    let layers = [base().bytes()];
    let [plain, zstd] = ["plain", "zstd"].map(|name| folder.path().join(name));
    by_us(&layers, Packing::Plain, &plain);
    by_us(&layers, Packing::Zstd, &zstd);
    assert_eq!(tree::read(&plain), tree::read(&zstd));
}

#[rstest]
#[case::a_file(vec![base(), Layer::new().whiteout("var/lib/.wh.a")])]
#[case::a_folder(vec![base(), Layer::new().whiteout("var/.wh.lib")])]
#[case::what_is_not_there(vec![base(), Layer::new().whiteout("var/lib/.wh.nothing").whiteout("srv/.wh.nothing")])]
#[case::through_a_link(vec![base(), Layer::new().whiteout("bin/.wh.su")])]
#[case::a_link_itself(vec![base(), Layer::new().whiteout(".wh.bin")])]
#[case::and_made_anew(vec![base(), Layer::new().whiteout("var/.wh.lib").folder("var/lib/", 0o700).file("var/lib/c", b"c")])]
#[case::of_the_layer_before_only(vec![
    base(),
    Layer::new().whiteout("var/lib/.wh.a"),
    Layer::new().file("var/lib/a", b"back"),
])]
fn whiteouts(#[case] layers: Vec<Layer>) {
    agrees(layers, Packing::Plain);
}

/// `umoci` does the same, but lets the folder's time be that of the unpacking.
#[test]
fn a_whiteout_after_what_the_layer_made_in_its_place() {
    let folder = tempfile::tempdir().unwrap();
    let ours = folder.path().join("ours");
    let layer = Layer::new()
        .folder("var/lib/", 0o700)
        .file("var/lib/a", b"new")
        .whiteout("var/.wh.lib");
    by_us(&[base().bytes(), layer.bytes()], Packing::Plain, &ours);
    let tree = tree::read(&ours);
    assert!(tree["var/lib"].contains("mode 700"));
    assert!(tree["var/lib"].contains(&format!("modified {}", layout::TIME)));
    assert!(tree["var/lib/a"].contains("file of 3 bytes"));
    assert!(!tree.contains_key("var/lib/b"));
}

#[rstest]
#[case::before(vec![base(), Layer::new().folder("var/lib/", 0o755).whiteout("var/lib/.wh..wh..opq").file("var/lib/c", b"c")])]
#[case::after(vec![base(), Layer::new().folder("var/lib/", 0o755).file("var/lib/c", b"c").whiteout("var/lib/.wh..wh..opq")])]
#[case::with_folders_below(vec![
    base().folder("var/lib/x/", 0o755).file("var/lib/x/old", b"old").folder("var/lib/y/", 0o755),
    Layer::new().folder("var/lib/", 0o755).whiteout("var/lib/.wh..wh..opq").folder("var/lib/x/", 0o755).file("var/lib/x/new", b"new"),
])]
#[case::of_the_root(vec![base(), Layer::new().whiteout(".wh..wh..opq").folder("opt/", 0o755)])]
fn opaque_folders(#[case] layers: Vec<Layer>) {
    let tree = agrees(layers, Packing::Plain);
    assert!(!tree.contains_key("var/lib/a"));
}

#[rstest]
#[case::a_file_by_a_folder(vec![base(), Layer::new().folder("etc/passwd/", 0o755).file("etc/passwd/x", b"x")])]
#[case::a_folder_by_a_file(vec![base(), Layer::new().file("var/lib", b"now a file")])]
#[case::a_folder_by_a_link(vec![base(), Layer::new().symlink("var/lib", "../tmp")])]
#[case::a_link_by_a_folder(vec![base(), Layer::new().folder("bin/", 0o755).file("bin/x", b"x")])]
#[case::a_link_by_a_file(vec![base(), Layer::new().file("bin", b"x")])]
#[case::a_file_by_a_file(vec![base(), Layer::new().file_of("etc/passwd", b"", 0o600, (1, 2))])]
#[case::a_folder_by_itself(vec![base(), Layer::new().folder("var/lib/", 0o711)])]
#[case::in_the_same_layer(vec![base().file("etc/passwd", b"second").folder("etc/passwd/", 0o700).file("etc/passwd", b"third")])]
#[case::one_of_two_names(vec![base().link("etc/passwd-", "etc/passwd"), Layer::new().file("etc/passwd", b"new")])]
fn what_is_replaced(#[case] layers: Vec<Layer>) {
    agrees(layers, Packing::Plain);
}

#[rstest]
#[case::in_one_layer(vec![base().link("etc/passwd-", "etc/passwd")])]
#[case::to_a_layer_below(vec![base(), Layer::new().link("etc/passwd-", "etc/passwd")])]
#[case::through_a_link(vec![base(), Layer::new().link("etc/su", "bin/su")])]
#[case::absolute(vec![base().link("etc/passwd-", "/etc/passwd")])]
#[case::to_a_symlink(vec![base().link("sbin", "bin")])]
#[case::in_place_of_a_file(vec![base(), Layer::new().link("var/lib/a", "var/lib/b")])]
fn hard_links(#[case] layers: Vec<Layer>) {
    agrees(layers, Packing::Plain);
}

#[rstest]
#[case::through_a_link(vec![base(), Layer::new().file("bin/new", b"new")])]
#[case::through_an_absolute_link(vec![base().symlink("lib", "/usr/lib").folder("usr/lib/", 0o755), Layer::new().file("lib/new", b"new")])]
#[case::absolute_names(vec![base().file("/etc/hosts", b"hosts")])]
#[case::names_with_dots(vec![base().file("./etc/./hosts", b"hosts")])]
#[case::of_symlinks(vec![base().symlink("etc/a", "/absolute").symlink("etc/b", "../../../../x").symlink("etc/c", "c")])]
fn paths(#[case] layers: Vec<Layer>) {
    agrees(layers, Packing::Plain);
}

#[test]
fn devices() {
    let tree = agrees(
        vec![
            base()
                .folder("dev/", 0o755)
                .device(EntryType::Char, "dev/null", 1, 3)
                .device(EntryType::Block, "dev/sda17", 259, 65_537)
                .device(EntryType::Fifo, "dev/initctl", 0, 0),
        ],
        Packing::Plain,
    );
    assert!(tree["dev/null"].starts_with("character device 103"));
}

/// PAX for all that does not fit into a header.
#[test]
fn names_of_any_length_and_bytes() {
    let long = format!("{}/{}", "d".repeat(200), "f".repeat(255));
    let strange: &[u8] = b"etc/\xff\xfe \n\t\\ \"name";
    let latin = String::from_utf8_lossy(b"etc/gr\xc3\xbc\xc3\x9fe").into_owned();
    let target = "t/".repeat(1500);
    let (folder, _) = long.split_once('/').unwrap();
    let layer = base()
        .pax([("path", folder.as_bytes())])
        .folder("short/", 0o755)
        .pax([("path", long.as_bytes())])
        .file("short", b"long")
        .pax([("path", strange)])
        .file("short", b"strange")
        .file(&latin, b"utf-8")
        .raw(
            b"etc/\xe9",
            {
                let mut header = tar::Header::new_ustar();
                header.set_mode(0o644);
                header.set_mtime(layout::TIME);
                header.set_uid(0);
                header.set_gid(0);
                header
            },
            b"latin-1",
        )
        .pax([("linkpath", target.as_bytes())])
        .symlink("etc/far", "short");
    let tree = agrees(vec![layer], Packing::Plain);
    assert!(tree.keys().any(|name| name.len() == 456));
}

/// The names GNU tar gives to what does not fit, and its own way with sparse files beside the three of PAX, as it unpacks them itself.
#[rstest]
#[case::gnu(&["--format=gnu"])]
#[case::pax_0_0(&["--format=posix", "--sparse-version=0.0"])]
#[case::pax_0_1(&["--format=posix", "--sparse-version=0.1"])]
#[case::pax_1_0(&["--format=posix", "--sparse-version=1.0"])]
fn what_gnu_tar_makes(#[case] format: &[&str]) {
    use std::os::unix::fs::FileExt as _;
    let folder = tempfile::tempdir().unwrap();
    let sparse = fs::File::create(folder.path().join("sparse")).unwrap();
    // More holes than the four of a header, so that there are blocks of them.
    for hole in 0..40 {
        sparse.write_all_at(b"data", hole * 100_000).unwrap();
    }
    sparse.set_len(5_000_000).unwrap();
    fs::write(folder.path().join("n".repeat(150)), "name").unwrap();
    std::os::unix::fs::symlink("t".repeat(150), folder.path().join("link")).unwrap();
    let made = Command::new("tar")
        .args(format)
        .args(["--sparse", "--numeric-owner", "--owner=7", "--group=8"])
        .args(["-C", folder.path().to_str().unwrap(), "-c", "."])
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    let layer = Layer::new().tar(made.stdout.trim_suffix_blocks());
    let layer = layer.bytes();
    // `umoci` of Debian 12 does not know the first format; whoever made it knows all.
    let work = tempfile::tempdir().unwrap();
    let [theirs, ours] = ["theirs", "ours"].map(|name| work.path().join(name));
    fs::create_dir(&theirs).unwrap();
    let mut unpacking = Command::new("tar")
        .args(["-xp", "--numeric-owner", "-C", theirs.to_str().unwrap()])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    unpacking.stdin.take().unwrap().write_all(&layer).unwrap();
    assert!(unpacking.wait().unwrap().success());
    by_us(&[layer], Packing::Plain, &ours);
    let (ours, theirs) = (tree::read(&ours), tree::read(&theirs));
    assert!(ours["sparse"].starts_with("sparse file of 5000000 bytes"));
    let differences = tree::differences(&ours, &theirs);
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

trait Blocks {
    /// Without the empty blocks at the end.
    fn trim_suffix_blocks(&self) -> &[u8];
}

impl Blocks for Vec<u8> {
    fn trim_suffix_blocks(&self) -> &[u8] {
        let end = self.iter().rposition(|byte| *byte != 0).unwrap_or(0) + 1;
        &self[..end.next_multiple_of(512)]
    }
}

#[test]
fn owners_and_times_beyond_a_header() {
    let layer = base()
        .pax([
            ("uid", b"3000000000".as_slice()),
            ("gid", b"4000000000"),
            ("mtime", b"1600000000.123456789"),
        ])
        .file("etc/far", b"far")
        .pax([("mtime", b"1500000000.5".as_slice())])
        .folder("srv/", 0o750)
        .file("srv/x", b"changes the folder's time");
    let tree = agrees(vec![layer], Packing::Plain);
    assert!(tree["etc/far"].contains("owner 3000000000:4000000000"));
    assert!(tree["srv"].contains("modified 1500000000.500000000"));
}

#[test]
fn a_folder_keeps_its_time_when_a_later_layer_changes_what_is_in_it() {
    agrees(
        vec![
            base(),
            Layer::new()
                .file("var/lib/c", b"c")
                .whiteout("var/lib/.wh.a"),
        ],
        Packing::Plain,
    );
}

#[test]
fn attributes_and_capabilities() {
    // As `setcap cap_net_raw+ep` writes it, and with a newline, at which careless readers of PAX stop.
    let capability =
        b"\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00";
    let tree = agrees(
        vec![
            base()
                .pax([
                    ("SCHILY.xattr.security.capability", capability.as_slice()),
                    ("SCHILY.xattr.user.note", b"a\nb\0c=d"),
                ])
                .file_of("usr/bin/ping", b"\x7fELF", 0o755, (0, 0))
                .pax([("SCHILY.xattr.user.of", b"a folder".as_slice())])
                .folder("srv/", 0o755),
            // Said again without: they are gone.
            Layer::new().folder("srv/", 0o755),
        ],
        Packing::Plain,
    );
    assert!(tree["usr/bin/ping"].contains("security.capability"));
    assert!(!tree["srv"].contains("user.of"));
}

/// What is made in a folder with a default list would have one that nobody has named (acl(5), acl_ea.h of Linux).
#[test]
fn access_control_lists() {
    let mut list = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in [
        (1, 7, u32::MAX),
        (2, 4, 1000),
        (4, 5, u32::MAX),
        (16, 7, u32::MAX),
        (32, 5, u32::MAX),
    ] {
        list.extend(u16::to_le_bytes(tag));
        list.extend(u16::to_le_bytes(permissions));
        list.extend(u32::to_le_bytes(id));
    }
    let tree = agrees(
        vec![
            base()
                .pax([("SCHILY.xattr.system.posix_acl_default", list.as_slice())])
                .folder("srv/", 0o755)
                .file("srv/x", b"x")
                .folder("srv/y/", 0o755),
        ],
        Packing::Plain,
    );
    assert!(tree["srv"].contains("posix_acl_default"));
    assert!(!tree["srv/x"].contains("posix_acl"));
}

#[test]
fn one_empty_block_at_the_end_is_an_end() {
    let folder = tempfile::tempdir().unwrap();
    let [two, one] = ["two", "one"].map(|name| folder.path().join(name));
    let layer = base().bytes();
    by_us(std::slice::from_ref(&layer), Packing::Plain, &two);
    by_us(&[layer[..layer.len() - 512].to_vec()], Packing::Plain, &one);
    assert_eq!(tree::read(&one), tree::read(&two));
}

/// As `git archive` puts one in front; `umoci` of Debian 12 refuses it.
#[test]
fn a_comment_on_the_whole_is_no_entry() {
    let comment = Layer::new().of_kind(b'g', "pax_global_header", b"17 comment=hello\n");
    let folder = tempfile::tempdir().unwrap();
    let [with, without] = ["with", "without"].map(|name| folder.path().join(name));
    let file = Layer::new().file("a", b"a").bytes();
    by_us(&[comment.file("a", b"a").bytes()], Packing::Plain, &with);
    by_us(&[file], Packing::Plain, &without);
    assert_eq!(tree::read(&with), tree::read(&without));
}

#[test]
fn many_layers_upon_each_other() {
    let mut layers = vec![base()];
    for number in 0..50_u32 {
        let mut layer =
            Layer::new().file(&format!("var/lib/{}", number % 7), &number.to_le_bytes());
        if number % 3 == 0 {
            layer = layer.whiteout(&format!("var/lib/.wh.{}", (number + 1) % 7));
        }
        layers.push(layer);
    }
    agrees(layers, Packing::Gzip);
}
