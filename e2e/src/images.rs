//! Images, as other programs make those, and of a size.

use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    path::Path,
    process::{Child, Command, Stdio},
};

use serde_json::{Value, json};
use service_kit::config::tools_folder;
use sha2::{Digest as _, Sha256};

/// Where an OCI layout says how a manifest is called.
const REFERENCE: &str = "org.opencontainers.image.ref.name";
const BLOCK: usize = 64 << 10;
/// Bytes of noise, and of text after it, in turns.
const HALF: usize = 1024;
/// Of what texts are.
const WORDS: [&str; 16] = [
    "the ",
    "layer ",
    "of ",
    "an ",
    "image ",
    "which ",
    "is ",
    "unpacked ",
    "and ",
    "read ",
    "by ",
    "nobody ",
    "but ",
    "us ",
    "often\n",
    "    ",
];

/// Runs a program, which must end well.
pub fn run(program: &str, arguments: &[&str], folder: &Path) {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(folder)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error} (./deploy/install test)"));
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Two layers by `umoci`: a Debian, and what was changed in it. The layout is `image`, its only image `v1`.
pub fn image(folder: &Path) {
    let umoci = |arguments: &[&str]| run("umoci", arguments, folder);
    umoci(&["init", "--layout", "image"]);
    umoci(&["new", "--image", "image:v1"]);
    umoci(&["unpack", "--image", "image:v1", "bundle"]);
    let base = tools_folder().join("base-rootfs.tar");
    let base = base.to_str().unwrap();
    run("tar", &["-C", "bundle/rootfs", "-xf", base], folder);
    umoci(&[
        "repack",
        "--refresh-bundle",
        "--image",
        "image:v1",
        "bundle",
    ]);
    let root = folder.join("bundle/rootfs");
    fs::remove_file(root.join("etc/issue")).unwrap();
    fs::write(root.join("srv/hello"), "from the second layer").unwrap();
    umoci(&["repack", "--image", "image:v1", "bundle"]);
    umoci(&[
        "config",
        "--image",
        "image:v1",
        "--config.env=GREETING=good morning",
        "--config.env=OVER=image",
        "--config.user=4242",
    ]);
}

/// A layer of a [`large_image`].
#[derive(Debug)]
pub struct Layer {
    /// Of its blob.
    pub digest: String,
    /// Of its blob, in bytes.
    pub size: u64,
}

/// Two layers packed by gzip, a Debian and upon it so many bytes in files of many sizes, half of them text and half of them noise. The layout
/// is `image`, its only image `v1`. Layers, and the number of files.
pub fn large_image(folder: &Path, bytes: u64) -> (Vec<Layer>, u64) {
    let layout = folder.join("image");
    fs::create_dir_all(layout.join("blobs/sha256")).unwrap();
    fs::write(
        layout.join("oci-layout"),
        r#"{"imageLayoutVersion":"1.0.0"}"#,
    )
    .unwrap();
    let tree = folder.join("tree");
    let files = plant(&tree.join("srv"), bytes);
    let base = File::open(tools_folder().join("base-rootfs.tar")).unwrap();
    let mut tar = Command::new("tar")
        .args(["--owner=0", "--group=0", "--numeric-owner", "-cf", "-", "."])
        .current_dir(&tree)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let made = tar.stdout.take().unwrap();
    let packed = [pack(&layout, base), pack(&layout, made)];
    assert!(tar.wait().unwrap().success());
    fs::remove_dir_all(tree).unwrap();
    let kind = |of: &str| format!("application/vnd.oci.image.{of}");
    let descriptor = |kind: String, (digest, size): (&str, u64)| json!({ "mediaType": kind, "digest": digest, "size": size });
    let diff_ids: Vec<&str> = packed.iter().map(|(_, diff_id)| diff_id.as_str()).collect();
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": {},
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    let config = document(&layout, &config);
    let layers = packed
        .iter()
        .map(|(layer, _)| descriptor(kind("layer.v1.tar+gzip"), (&layer.digest, layer.size)));
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": kind("manifest.v1+json"),
        "config": descriptor(kind("config.v1+json"), (&config.0, config.1)),
        "layers": layers.collect::<Vec<_>>(),
    });
    let manifest = document(&layout, &manifest);
    let mut named = descriptor(kind("manifest.v1+json"), (&manifest.0, manifest.1));
    named["annotations"] = json!({ REFERENCE: "v1" });
    let index = json!({ "schemaVersion": 2, "manifests": [named] });
    fs::write(layout.join("index.json"), index.to_string()).unwrap();
    (packed.into_iter().map(|(layer, _)| layer).collect(), files)
}

/// A document as a blob; its digest and size.
fn document(layout: &Path, document: &Value) -> (String, u64) {
    let text = document.to_string();
    let digest = hex::encode(Sha256::digest(&text));
    fs::write(layout.join("blobs/sha256").join(&digest), &text).unwrap();
    (format!("sha256:{digest}"), text.len() as u64)
}

/// A tarball as a blob, packed; and its own digest.
fn pack(layout: &Path, mut tarball: impl io::Read) -> (Layer, String) {
    let path = layout.join("packing");
    let mut gzip: Child = Command::new("gzip")
        .arg("-1")
        .stdin(Stdio::piped())
        .stdout(File::create(&path).unwrap())
        .spawn()
        .unwrap();
    let mut to = gzip.stdin.take().unwrap();
    let diff_id = each_piece(&mut tarball, |piece| to.write_all(piece).unwrap());
    drop(to);
    assert!(gzip.wait().unwrap().success());
    let digest = each_piece(&mut File::open(&path).unwrap(), |_| {});
    let size = fs::metadata(&path).unwrap().len();
    fs::rename(path, layout.join("blobs/sha256").join(&digest)).unwrap();
    let digest = format!("sha256:{digest}");
    (Layer { digest, size }, format!("sha256:{diff_id}"))
}

/// The digest of what is read.
fn each_piece(from: &mut impl io::Read, mut take: impl FnMut(&[u8])) -> String {
    let (mut hasher, mut piece) = (Sha256::new(), vec![0; BLOCK]);
    loop {
        let count = from.read(&mut piece).unwrap();
        if count == 0 {
            return hex::encode(hasher.finalize());
        }
        hasher.update(&piece[..count]);
        take(&piece[..count]);
    }
}

/// Many small files and some large ones, the same ones each time; their number.
fn plant(root: &Path, mut bytes: u64) -> u64 {
    let mut noise = blake3::Hasher::new().update(b"noise").finalize_xof();
    let mut block = [0; 2 * HALF];
    let mut files = 0;
    while bytes > 0 {
        let folder = root.join(format!("{}/{}", files / 1000, files % 1000 / 50));
        fs::create_dir_all(&folder).unwrap();
        noise.fill(&mut block[..2]);
        // From 512 bytes to 64 KiB, and now and then as large as libraries are.
        let largest = if files % 200 == 0 { 24 } else { 16 };
        let size = 1_u64 << (9 + u32::from(block[0]) % (largest - 8));
        let size = (size + u64::from(block[1])).min(bytes);
        let mut file = io::BufWriter::new(File::create(folder.join(files.to_string())).unwrap());
        let mut left = size;
        while left > 0 {
            noise.fill(&mut block);
            let (noisy, chosen) = block.split_at(HALF);
            let words = chosen.iter().map(|byte| WORDS[usize::from(*byte) % 16]);
            let text = words.collect::<String>();
            let text = &text.as_bytes()[..HALF];
            left -= io::copy(&mut noisy.chain(text).take(left), &mut file).unwrap();
        }
        file.flush().unwrap();
        bytes -= size;
        files += 1;
    }
    files
}
