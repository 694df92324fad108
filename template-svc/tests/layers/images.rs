//! What an image says it is, and what it is.

use std::{fs, path::Path};

use rstest::rstest;
use rustix::fs::{CWD, FileType, Mode};
use serde_json::{Value, json};
use template_svc::{
    image::{Defaults, Image, ImageError},
    layer::Limits,
};
use tokio_util::sync::CancellationToken;

use crate::layout::{self, Layer, Packing};

const LIMITS: Limits = Limits {
    bytes: 1 << 20,
    entries: 1000,
};

fn layers() -> Vec<Vec<u8>> {
    vec![
        Layer::new().file("a", b"a").file("b", b"b").bytes(),
        Layer::new().whiteout(".wh.a").bytes(),
    ]
}

/// A layout as it should be, changed by whoever asks.
fn layout() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    layout::write(folder.path(), &layers(), Packing::Gzip);
    folder
}

fn unpack(folder: &Path) -> Result<Vec<String>, ImageError> {
    let image = Image::open(folder, None)?;
    let to = tempfile::tempdir().unwrap();
    image.unpack(
        to.path(),
        LIMITS,
        &CancellationToken::new(),
        || Ok(()),
        |_, _| {},
    )?;
    let names = fs::read_dir(to.path()).unwrap();
    Ok(names
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect())
}

fn edit(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut document = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    edit(&mut document);
    fs::write(path, document.to_string()).unwrap();
}

#[rstest]
#[case(Packing::Plain)]
#[case(Packing::Gzip)]
#[case(Packing::Zstd)]
fn a_layout(#[case] packing: Packing) {
    let folder = tempfile::tempdir().unwrap();
    layout::write(folder.path(), &layers(), packing);
    assert_eq!(unpack(folder.path()).unwrap(), ["b"]);
}

/// Layers beside each other, known by their content alone.
#[test]
fn what_docker_saved() {
    let folder = tempfile::tempdir().unwrap();
    let layers = layers();
    for (number, layer) in layers.iter().enumerate() {
        let name = folder.path().join(number.to_string());
        fs::create_dir(&name).unwrap();
        fs::write(name.join("layer.tar"), layer).unwrap();
    }
    let config = json!({
        "architecture": "amd64", "os": "linux",
        "config": {
            "Env": ["PATH=/bin", "EMPTY=", "A=b=c"], "User": "1:2", "WorkingDir": "/srv",
            "Entrypoint": ["/init"], "Cmd": ["serve"],
        },
        "rootfs": {"type": "layers", "diff_ids": layers.iter().map(|layer| layout::digest(layer)).collect::<Vec<_>>()},
    });
    fs::write(folder.path().join("c.json"), config.to_string()).unwrap();
    let saved = json!([{"Config": "c.json", "RepoTags": ["app:1"], "Layers": ["0/layer.tar", "1/layer.tar"]}]);
    fs::write(folder.path().join("manifest.json"), saved.to_string()).unwrap();
    assert_eq!(unpack(folder.path()).unwrap(), ["b"]);
    let image = Image::open(folder.path(), Some("app:1")).unwrap();
    let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    assert_eq!(
        image.defaults(),
        Defaults {
            env: vec![pair("PATH", "/bin"), pair("EMPTY", ""), pair("A", "b=c")],
            user: "1:2".into(),
            cwd: "/srv".into(),
            entrypoint: vec!["/init".into()],
            command: vec!["serve".into()],
        }
    );
    // Layers of another content than the config says.
    fs::write(folder.path().join("0/layer.tar"), &layers[1]).unwrap();
    let error = unpack(folder.path()).unwrap_err();
    assert_eq!(error.reason(), "DIGEST_MISMATCH", "{error}");
}

fn largest(folder: &Path) -> std::path::PathBuf {
    let blobs = fs::read_dir(folder.join("blobs/sha256")).unwrap();
    blobs
        .map(|entry| entry.unwrap().path())
        .max_by_key(|path| fs::metadata(path).unwrap().len())
        .unwrap()
}

#[test]
fn damage_is_seen() {
    for at in [0, 20, 60] {
        let folder = layout();
        let blobs = fs::read_dir(folder.path().join("blobs/sha256")).unwrap();
        for blob in blobs {
            let path = blob.unwrap().path();
            let whole = fs::read(&path).unwrap();
            let mut damaged = whole.clone();
            let at = at % whole.len();
            damaged[at] ^= 0x20;
            fs::write(&path, damaged).unwrap();
            let error = unpack(folder.path()).unwrap_err();
            assert!(
                ["DIGEST_MISMATCH", "LAYER_DAMAGED", "LAYER_INVALID"].contains(&error.reason()),
                "{error}"
            );
            fs::write(&path, whole).unwrap();
        }
        unpack(folder.path()).unwrap();
    }
}

#[test]
fn what_is_missing_is_named() {
    let folder = layout();
    let path = largest(folder.path());
    fs::remove_file(&path).unwrap();
    let error = unpack(folder.path()).unwrap_err();
    let name = path.file_name().unwrap().to_str().unwrap();
    assert!(error.to_string().contains(name), "{error}");
    let empty = tempfile::tempdir().unwrap();
    let error = unpack(empty.path()).unwrap_err();
    assert!(matches!(error, ImageError::NoImage), "{error}");
}

/// Blobs and documents that are links out of the folder, or no files at all.
#[test]
fn nothing_outside_is_read() {
    let outside = tempfile::tempdir().unwrap();
    for name in ["index.json", "blobs"] {
        let folder = layout();
        let (inside, moved) = (folder.path().join(name), outside.path().join(name));
        fs::rename(&inside, &moved).unwrap();
        std::os::unix::fs::symlink(&moved, &inside).unwrap();
        let error = unpack(folder.path()).unwrap_err();
        assert!(
            matches!(error, ImageError::NoImage | ImageError::Missing(_)),
            "{error}"
        );
        // Neither is waited for, nor opened: the host would notice.
        for kind in [FileType::Fifo, FileType::CharacterDevice] {
            fs::remove_file(&inside).unwrap();
            make(&inside, kind);
            let error = unpack(folder.path()).unwrap_err();
            assert_eq!(error.reason(), "IMAGE_INVALID", "{error}");
        }
        fs::remove_dir_all(&moved)
            .or_else(|_| fs::remove_file(&moved))
            .unwrap();
    }
}

fn make(path: &Path, kind: FileType) {
    let mode = Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(CWD, path, kind, mode, rustix::fs::makedev(1, 3)).unwrap();
}

#[rstest]
#[case::no_json("{".into(), "index.json")]
#[case::huge(" ".repeat((4 << 20) + 1), "larger than")]
fn documents_that_are_none(#[case] text: String, #[case] why: &str) {
    let folder = layout();
    fs::write(folder.path().join("index.json"), text).unwrap();
    let error = unpack(folder.path()).unwrap_err();
    assert_eq!(error.reason(), "IMAGE_INVALID");
    assert!(error.to_string().contains(why), "{error}");
}

/// Each of them could be read, and read again.
#[test]
fn an_index_of_very_many() {
    let folder = layout();
    edit(&folder.path().join("index.json"), |index| {
        let mut manifest = index["manifests"][0].clone();
        manifest["platform"] = json!({"os": "linux", "architecture": "s390x\0".repeat(100)});
        let manifests = (0..2000).map(|number| {
            let mut manifest = manifest.clone();
            manifest["digest"] = json!(format!("sha256:{number:064}"));
            manifest
        });
        index["manifests"] = manifests.collect();
    });
    let error = unpack(folder.path()).unwrap_err();
    assert!(error.to_string().contains("more than 1000"), "{error}");
    edit(&folder.path().join("index.json"), |index| {
        index["manifests"].as_array_mut().unwrap().truncate(500);
    });
    let error = unpack(folder.path()).unwrap_err();
    assert_eq!(error.reason(), "PLATFORM_MISSING");
    assert!(error.to_string().len() < 4096);
}

#[rstest]
#[case::up("sha256:../../../etc/passwd")]
#[case::short("sha256:abcd")]
#[case::another_kind("md5:d41d8cd98f00b204e9800998ecf8427e")]
fn digests_that_are_none(#[case] digest: &str) {
    let folder = layout();
    edit(&folder.path().join("index.json"), |index| {
        index["manifests"][0]["digest"] = json!(digest);
    });
    let error = unpack(folder.path()).unwrap_err();
    assert_eq!(error.reason(), "IMAGE_INVALID", "{error}");
}

#[test]
fn the_image_of_this_platform_is_taken() {
    let folder = layout();
    edit(&folder.path().join("index.json"), |index| {
        let manifest = index["manifests"][0].clone();
        let of = |architecture: &str| {
            let mut manifest = manifest.clone();
            manifest["platform"] = json!({"os": "linux", "architecture": architecture});
            manifest
        };
        // Others are not even looked at: their blobs may be elsewhere.
        let mut other = of("s390x");
        other["digest"] = json!(format!("sha256:{}", "0".repeat(64)));
        let mut attestation = of("unknown");
        attestation["digest"] = other["digest"].clone();
        index["manifests"] = json!([other, attestation, of("amd64")]);
    });
    assert_eq!(unpack(folder.path()).unwrap(), ["b"]);
    edit(&folder.path().join("index.json"), |index| {
        index["manifests"].as_array_mut().unwrap().pop();
    });
    let error = unpack(folder.path()).unwrap_err();
    assert_eq!(error.reason(), "PLATFORM_MISSING");
    assert!(error.to_string().contains("linux/s390x"), "{error}");
}

#[test]
fn of_several_images_one_is_named() {
    let folder = layout();
    let other = tempfile::tempdir().unwrap();
    layout::write(other.path(), &layers()[..1], Packing::Plain);
    for blob in fs::read_dir(other.path().join("blobs/sha256")).unwrap() {
        let blob = blob.unwrap();
        let to = folder.path().join("blobs/sha256").join(blob.file_name());
        fs::copy(blob.path(), to).unwrap();
    }
    let index = fs::read(other.path().join("index.json")).unwrap();
    let index: Value = serde_json::from_slice(&index).unwrap();
    let mut second = index["manifests"][0].clone();
    second["annotations"]["org.opencontainers.image.ref.name"] = json!("second");
    edit(&folder.path().join("index.json"), |index| {
        index["manifests"].as_array_mut().unwrap().push(second);
    });
    let error = Image::open(folder.path(), None).unwrap_err();
    assert!(error.to_string().contains("latest, second"), "{error}");
    let error = Image::open(folder.path(), Some("third")).unwrap_err();
    assert_eq!(error.reason(), "IMAGE_UNKNOWN");
    assert_eq!(
        Image::open(folder.path(), Some("second")).unwrap().layers(),
        1
    );
}

#[test]
fn users_are_looked_for_in_the_image() {
    let root = tempfile::tempdir().unwrap();
    fs::create_dir(root.path().join("etc")).unwrap();
    fs::write(
        root.path().join("etc/passwd"),
        "root:x:0:0::/:/bin/sh\nweb:x:7:7::/:\n",
    )
    .unwrap();
    let of = |user: &str| Defaults {
        user: user.into(),
        ..Defaults::default()
    };
    for user in ["", "web", "0", "4242"] {
        of(user).check(root.path()).unwrap();
    }
    for user in ["we", "webb", "x", "../web", "-1"] {
        let error = of(user).check(root.path()).unwrap_err();
        assert!(error.to_string().contains("passwd"), "{error}");
    }
    let odd = Defaults {
        env: vec![("A\0".into(), "b".into())],
        ..Defaults::default()
    };
    odd.check(root.path()).unwrap_err();
}
