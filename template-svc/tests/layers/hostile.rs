//! Layers whose makers want something else than files in a folder.

use std::{
    fs,
    io::{self, Read},
    path::PathBuf,
};

use proptest::prelude::*;
use rstest::rstest;
use tar::EntryType;
use template_svc::layer::{Applied, LayerError, Limits, Root, Whiteouts};
use tokio_util::sync::CancellationToken;

use crate::{
    layout::{self, Layer, Packing},
    tree,
};

const LIMITS: Limits = Limits {
    bytes: 1 << 20,
    entries: 1000,
};

/// A folder that is to be left alone, with the root in it.
struct Place {
    folder: tempfile::TempDir,
    root: PathBuf,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        fs::create_dir(&root).unwrap();
        fs::write(folder.path().join("secret"), "secret").unwrap();
        Self { folder, root }
    }

    fn apply(&self, layer: impl Read + Send) -> Result<Applied, LayerError> {
        let mut root = Root::new(self.root.clone(), LIMITS);
        let applied = root.apply(layer, Whiteouts::Apply, &CancellationToken::new())?;
        root.finish()?;
        Ok(applied)
    }

    /// All there is beside the root.
    fn outside(&self) -> tree::Tree {
        let mut tree = tree::read(self.folder.path());
        // The folder's own time and names are of what is in it.
        tree.retain(|name, _| !name.is_empty() && !name.starts_with("root"));
        tree
    }
}

/// Refused, with the entry's name, and nothing outside has changed.
#[rstest]
#[case::up(Layer::new().file("../secret", b"x"), "../secret", "leads out")]
#[case::up_within(Layer::new().file("a/../../secret", b"x"), "a/../../secret", "leads out")]
#[case::folder_up(Layer::new().folder("../", 0o777), "../", "leads out")]
#[case::whiteout_of_all(Layer::new().whiteout(".wh..."), ".wh...", "no name")]
#[case::whiteout_of_nothing(Layer::new().whiteout("a/.wh."), "a/.wh.", "no name")]
#[case::whiteout_up(Layer::new().whiteout("../.wh.secret"), "../.wh.secret", "leads out")]
#[case::link_up(Layer::new().link("x", "../secret"), "x", "leads out")]
#[case::link_to_nothing(Layer::new().link("x", "nothing"), "x", "not there")]
#[case::link_to_the_root(Layer::new().link("x", "/"), "x", "not there")]
#[case::link_to_a_folder(Layer::new().folder("d/", 0o755).link("x", "d"), "x", "to a folder")]
#[case::empty_link(Layer::new().symlink("x", ""), "x", "to nothing")]
#[case::file_as_folder(Layer::new().file("f", b"x").file("f/x", b"x"), "f/x", "directory")]
#[case::endless_links(Layer::new().symlink("a", "b").symlink("b", "a").file("a/x", b"x"), "a/x", "symbolic links")]
#[case::root_as_file(Layer::new().file("./", b"").file(".", b"x"), ".", "no folder")]
#[case::long_part(Layer::new().pax([("path", [b'n'; 300].as_slice())]).file("x", b"x"), "nnn", "too long")]
#[case::nul_in_a_name(Layer::new().pax([("path", b"a\0b".as_slice())]).file("x", b"x"), "a\\x00b", "NUL")]
#[case::owner_nobody_can_be(Layer::new().pax([("uid", b"4294967295".as_slice())]).file("x", b"x"), "x", "no owner")]
#[case::unknown_kind(Layer::new().of_kind(b'V', "label", b""), "label", "kind")]
#[case::too_deep(Layer::new().pax([("path", "d/".repeat(300).as_bytes())]).file("x", b"x"), "d/d/", "deeper")]
#[case::size_nobody_has(Layer::new().pax([("size", b"18446744073709551615".as_slice())]).file(".wh.x", b"x"), ".wh.x", "no size")]
#[case::sparse_folder(Layer::new().pax([("GNU.sparse.map", b"0,1".as_slice())]).folder("d/", 0o755), "d/", "no file")]
fn what_is_refused(#[case] layer: Layer, #[case] name: &str, #[case] why: &str) {
    let place = Place::new();
    let before = place.outside();
    let error = place.apply(&*layer.bytes()).unwrap_err().to_string();
    assert!(error.contains(&format!("entry \"{name}")), "{error}");
    assert!(error.contains(why), "{error}");
    assert_eq!(place.outside(), before);
}

/// Links that point out of the root point into it when a path goes through them.
#[rstest]
#[case::absolute(Layer::new().symlink("out", "/").file("out/secret", b"x"))]
#[case::relative(Layer::new().symlink("out", "../../../..").file("out/secret", b"x"))]
#[case::swapped(
    Layer::new().folder("out/", 0o755).file("out/a", b"a").symlink("out", "..").file("out/secret", b"x")
)]
#[case::whiteout(Layer::new().symlink("out", "..").whiteout("out/.wh.secret").file("secret", b"x"))]
#[case::opaque(Layer::new().symlink("out", "..").whiteout("out/.wh..wh..opq").file("secret", b"x"))]
#[case::hard_link(
    Layer::new().symlink("out", "..").file("secret", b"x").link("stolen", "out/secret")
)]
fn links_lead_nowhere_else(#[case] layer: Layer) {
    let place = Place::new();
    let before = place.outside();
    place.apply(&*layer.bytes()).unwrap();
    assert_eq!(fs::read(place.root.join("secret")).unwrap(), b"x");
    assert_eq!(place.outside(), before);
}

/// Of a link at the end of a path the link is meant: neither is written through it, nor is its target described.
#[test]
fn what_is_written_is_never_a_links_target() {
    let place = Place::new();
    let secret = place.folder.path().join("secret").display().to_string();
    let before = place.outside();
    let layer = Layer::new()
        .symlink("a", &secret)
        .file_of("a", b"x", 0o4777, (7, 7))
        .symlink("b", "../secret")
        .link("c", "b")
        .symlink("d", "../secret")
        .device(EntryType::Fifo, "d", 0, 0);
    place.apply(&*layer.bytes()).unwrap();
    assert_eq!(fs::read(place.root.join("a")).unwrap(), b"x");
    assert!(
        fs::symlink_metadata(place.root.join("c"))
            .unwrap()
            .is_symlink()
    );
    assert_eq!(place.outside(), before);
}

/// `/proc/self/root` and its like are no way out: there is no such file system in the root.
#[test]
fn what_the_host_would_give_a_meaning_is_left_out() {
    let place = Place::new();
    let layer = Layer::new()
        .pax([
            ("SCHILY.xattr.trusted.overlay.redirect", b"/etc".as_slice()),
            (
                "SCHILY.xattr.security.selinux",
                b"system_u:object_r:shadow_t:s0",
            ),
        ])
        .folder("d/", 0o755)
        .whiteout(".wh..wh.plnk");
    let applied = place.apply(&*layer.bytes()).unwrap();
    assert_eq!((applied.entries, applied.left_out), (2, 2));
    let tree = tree::read(&place.root);
    assert!(tree["d"].ends_with("attributes {}"), "{}", tree["d"]);
}

#[rstest]
#[case::gzip(Packing::Gzip)]
#[case::zstd(Packing::Zstd)]
fn bombs(#[case] packing: Packing) {
    let place = Place::new();
    let packed = layout::pack(
        &Layer::new().file("big", &vec![0; 64 << 20]).bytes(),
        packing,
    );
    assert!(packed.len() < 8 << 20, "of {} bytes", packed.len());
    let error = place.apply(&*packed).unwrap_err();
    assert!(matches!(error, LayerError::TooLarge(_)), "{error}");
}

/// After the end of a tarball, where no entry is, as well.
#[test]
fn a_bomb_behind_the_end() {
    let place = Place::new();
    let mut layer = Layer::new().file("a", b"a").bytes();
    layer.resize(64 << 20, 0);
    let error = place
        .apply(&*layout::pack(&layer, Packing::Gzip))
        .unwrap_err();
    assert!(matches!(error, LayerError::TooLarge(_)), "{error}");
}

#[test]
fn a_sparse_file_of_exabytes() {
    let place = Place::new();
    let layer = Layer::new()
        .pax([
            ("GNU.sparse.major", b"1".as_slice()),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.realsize", b"8000000000000000000"),
        ])
        .file("sparse", &[b"0\n".as_slice(), &[0; 510]].concat());
    let error = place.apply(&*layer.bytes()).unwrap_err();
    assert!(matches!(error, LayerError::TooLarge(_)), "{error}");
}

#[rstest]
#[case::overlapping(b"2\n0\n8\n4\n8\n")]
#[case::beyond_the_end(b"1\n1000\n16\n")]
#[case::more_than_there_is(b"1\n0\n100\n")]
#[case::huge(b"1\n0\n18446744073709551615\n")]
#[case::no_numbers(b"one\n")]
fn maps_of_sparse_files_that_lie(#[case] map: &[u8]) {
    let place = Place::new();
    let mut content = map.to_vec();
    content.resize(512, 0);
    content.extend([1; 16]);
    let layer = Layer::new()
        .pax([
            ("GNU.sparse.major", b"1".as_slice()),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.realsize", b"1000"),
        ])
        .file("sparse", &content);
    let error = place.apply(&*layer.bytes()).unwrap_err().to_string();
    assert!(error.contains("sparse"), "{error}");
}

/// Readers that end a number at a NUL and those that begin behind it would find other entries.
#[test]
fn numbers_that_are_read_differently() {
    let mut layer = Layer::new().file("a", &[1; 512]).bytes();
    layer[124..136].copy_from_slice(b"\x000000001000\0");
    layer[148..156].copy_from_slice(b"        ");
    let sum: u32 = layer[..512].iter().map(|byte| u32::from(*byte)).sum();
    layer[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let error = Place::new().apply(&*layer).unwrap_err().to_string();
    assert!(error.contains("begins with a NUL"), "{error}");
}

/// Only a tarball older than POSIX has folders that are files whose names end so; what looks like an entry in a file is its content.
#[test]
fn content_is_never_read_as_entries() {
    let place = Place::new();
    let inner = Layer::new().file("inner", b"x").bytes();
    let layer = Layer::new().file("d/", &inner[..512]).file("b", b"b");
    place.apply(&*layer.bytes()).unwrap();
    assert!(place.root.join("d").is_file());
    assert!(place.root.join("b").is_file());
    assert!(!place.root.join("inner").exists());
}

/// Folders that no entry names are as many as entries may be.
#[test]
fn too_many_folders_that_are_only_needed() {
    let place = Place::new();
    let layer = (0..300).fold(Layer::new(), |layer, number| {
        layer.file(&format!("{number}/a/b/c/f"), b"")
    });
    let error = place.apply(&*layer.bytes()).unwrap_err();
    assert!(matches!(error, LayerError::TooMany(1000)), "{error}");
}

/// Said again and again, it is done once; what the layer makes in between stays.
#[test]
fn whiteouts_without_end() {
    let place = Place::new();
    let mut root = Root::new(place.root.clone(), LIMITS);
    let below = Layer::new().file("d/old", b"old").file("e/old", b"old");
    let mut layer = Layer::new().file("d/new", b"new");
    for _ in 0..300 {
        layer = layer
            .whiteout("d/.wh..wh..opq")
            .whiteout(".wh.e")
            .file("e/new", b"new");
    }
    for layer in [below.bytes(), layer.bytes()] {
        root.apply(&*layer, Whiteouts::Apply, &CancellationToken::new())
            .unwrap();
    }
    root.finish().unwrap();
    for folder in ["d", "e"] {
        let names: Vec<_> = fs::read_dir(place.root.join(folder))
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(names, ["new"]);
    }
}

#[test]
fn too_many_entries() {
    let place = Place::new();
    let layer = (0..1001).fold(Layer::new(), |layer, _| layer.file("a", b""));
    let error = place.apply(&*layer.bytes()).unwrap_err();
    assert!(matches!(error, LayerError::TooMany(1000)), "{error}");
}

#[test]
fn headers_without_end() {
    let place = Place::new();
    let value = vec![b'v'; 900 << 10];
    let layer = Layer::new()
        .pax([("comment", value.as_slice())])
        .pax([("comment", value.as_slice())])
        .file("a", b"a");
    let error = place.apply(&*layer.bytes()).unwrap_err().to_string();
    assert!(error.contains("PAX"), "{error}");
    let layer = Layer::new()
        .pax([("comment", vec![b'v'; 1 << 20].as_slice())])
        .file("a", b"a");
    // Larger than all that may be unpacked, or than headers may be: whichever is seen first.
    place.apply(&*layer.bytes()).unwrap_err();
}

#[rstest]
#[case::gzip(Packing::Gzip)]
#[case::zstd(Packing::Zstd)]
#[case::plain(Packing::Plain)]
fn cut_and_damaged_layers(#[case] packing: Packing) {
    let noise: Vec<u8> = (0..100_000_u32)
        .map(|at| at.wrapping_mul(2_654_435_761).to_le_bytes()[3])
        .collect();
    let whole = layout::pack(&Layer::new().file("a", &noise).bytes(), packing);
    for length in [1, 100, 513, whole.len() / 2] {
        let place = Place::new();
        let error = place.apply(&whole[..length]).unwrap_err();
        assert!(
            matches!(error, LayerError::Compression(_) | LayerError::Entry { .. }),
            "{length}: {error}"
        );
    }
    if packing != Packing::Plain {
        let mut damaged = whole.clone();
        let middle = damaged.len() / 2;
        damaged[middle..middle + 100].fill(0);
        Place::new().apply(&*damaged).unwrap_err();
    }
}

#[test]
fn a_reader_that_fails_is_told_from_a_layer_that_is_wrong() {
    struct Fails;
    impl Read for Fails {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::ErrorKind::ConnectionReset.into())
        }
    }
    let start = Layer::new().file("a", b"a").bytes();
    let error = Place::new().apply(start[..1024].chain(Fails)).unwrap_err();
    assert!(matches!(error, LayerError::Compression(_)), "{error}");
}

#[test]
fn a_cancelled_one_ends() {
    let place = Place::new();
    let cancel = CancellationToken::new();
    cancel.cancel();
    let layer = Layer::new().file("a", b"a").bytes();
    let error = Root::new(place.root.clone(), LIMITS)
        .apply(&*layer, Whiteouts::Apply, &cancel)
        .unwrap_err();
    assert!(matches!(error, LayerError::Cancelled));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Bytes of whatever kind, with headers that are sound so that they get far: nothing panics, hangs or gets out.
    #[test]
    fn any_bytes(
        blocks in prop::collection::vec((any::<u8>(), "[a-c./]{1,20}", prop::collection::vec(any::<u8>(), 0..1024)), 1..8),
        cut in 0..4096_usize,
    ) {
        let place = Place::new();
        let before = place.outside();
        let layer = blocks.iter().fold(Layer::new(), |layer, (kind, name, content)| {
            let kinds = b"01234567xgLKS";
            layer.of_kind(kinds[usize::from(*kind) % kinds.len()], name, content)
        });
        let mut bytes = layer.bytes();
        let length = bytes.len();
        bytes.truncate(length - cut % length);
        let _either_is_fine = place.apply(&*bytes);
        prop_assert_eq!(place.outside(), before);
    }
}
