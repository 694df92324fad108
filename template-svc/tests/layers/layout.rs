//! Layers of the tests' own, and the smallest OCI layout that holds them (image-layout.md).

use std::{
    fs,
    io::{Read, Write as _},
    path::Path,
};

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};

pub(crate) const TIME: u64 = 1_234_567_890;

/// A tarball that grows.
pub(crate) struct Layer(Builder<Vec<u8>>);

impl Layer {
    pub(crate) fn new() -> Self {
        Self(Builder::new(Vec::new()))
    }

    fn header(kind: EntryType, mode: u32) -> Header {
        let mut header = Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_size(0);
        header.set_mtime(TIME);
        header
    }

    /// An entry whose name is put into the header as it is.
    pub(crate) fn raw(mut self, name: &[u8], mut header: Header, content: &[u8]) -> Self {
        header.as_old_mut().name[..name.len()].copy_from_slice(name);
        header.set_size(content.len() as u64);
        header.set_cksum();
        self.0.append(&header, content).unwrap();
        self
    }

    pub(crate) fn folder(self, name: &str, mode: u32) -> Self {
        self.raw(
            name.as_bytes(),
            Self::header(EntryType::Directory, mode),
            b"",
        )
    }

    pub(crate) fn file(self, name: &str, content: &[u8]) -> Self {
        self.file_of(name, content, 0o644, (0, 0))
    }

    pub(crate) fn file_of(self, name: &str, content: &[u8], mode: u32, owner: (u64, u64)) -> Self {
        let mut header = Self::header(EntryType::Regular, mode);
        header.set_uid(owner.0);
        header.set_gid(owner.1);
        self.raw(name.as_bytes(), header, content)
    }

    pub(crate) fn whiteout(self, name: &str) -> Self {
        self.file(name, b"")
    }

    fn linked(self, kind: EntryType, name: &str, target: &str) -> Self {
        let mut header = Self::header(kind, 0o777);
        header.as_old_mut().linkname[..target.len()].copy_from_slice(target.as_bytes());
        self.raw(name.as_bytes(), header, b"")
    }

    pub(crate) fn symlink(self, name: &str, target: &str) -> Self {
        self.linked(EntryType::Symlink, name, target)
    }

    pub(crate) fn link(self, name: &str, target: &str) -> Self {
        self.linked(EntryType::Link, name, target)
    }

    pub(crate) fn device(self, kind: EntryType, name: &str, major: u32, minor: u32) -> Self {
        let mut header = Self::header(kind, 0o640);
        header.set_device_major(major).unwrap();
        header.set_device_minor(minor).unwrap();
        self.raw(name.as_bytes(), header, b"")
    }

    /// What PAX says of the next entry.
    pub(crate) fn pax<'a>(
        mut self,
        records: impl IntoIterator<Item = (&'a str, &'a [u8])>,
    ) -> Self {
        self.0.append_pax_extensions(records).unwrap();
        self
    }

    /// An entry of a kind of which the crate has no name.
    pub(crate) fn of_kind(self, kind: u8, name: &str, content: &[u8]) -> Self {
        let header = Self::header(EntryType::new(kind), 0o644);
        self.raw(name.as_bytes(), header, content)
    }

    /// What another program has made: everything but the two empty blocks at its end.
    pub(crate) fn tar(mut self, bytes: &[u8]) -> Self {
        self.0.get_mut().extend_from_slice(bytes);
        self
    }

    pub(crate) fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Packing {
    Plain,
    Gzip,
    Zstd,
}

pub(crate) fn pack(bytes: &[u8], packing: Packing) -> Vec<u8> {
    match packing {
        Packing::Plain => bytes.to_owned(),
        Packing::Gzip => {
            let mut packed = Vec::new();
            flate2::read::GzEncoder::new(bytes, flate2::Compression::fast())
                .read_to_end(&mut packed)
                .unwrap();
            packed
        }
        Packing::Zstd => zstd::encode_all(bytes, 1).unwrap(),
    }
}

/// As documents write it.
pub(crate) fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

fn blob(folder: &Path, kind: &str, bytes: &[u8]) -> Value {
    let digest = digest(bytes);
    let blobs = folder.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    fs::File::create(blobs.join(digest.trim_start_matches("sha256:")))
        .unwrap()
        .write_all(bytes)
        .unwrap();
    json!({"mediaType": kind, "digest": digest, "size": bytes.len()})
}

/// Writes an image of these layers with the tag `latest`.
pub(crate) fn write(folder: &Path, layers: &[Vec<u8>], packing: Packing) {
    let kind = match packing {
        Packing::Plain => "application/vnd.oci.image.layer.v1.tar",
        Packing::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
        Packing::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
    };
    let diff_ids: Vec<String> = layers.iter().map(|layer| digest(layer)).collect();
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let config = blob(
        folder,
        "application/vnd.oci.image.config.v1+json",
        config.to_string().as_bytes(),
    );
    let layers: Vec<Value> = layers
        .iter()
        .map(|layer| blob(folder, kind, &pack(layer, packing)))
        .collect();
    let manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config, "layers": layers,
    });
    let mut manifest = blob(
        folder,
        "application/vnd.oci.image.manifest.v1+json",
        manifest.to_string().as_bytes(),
    );
    manifest["annotations"] = json!({"org.opencontainers.image.ref.name": "latest"});
    let index = json!({"schemaVersion": 2, "manifests": [manifest]});
    fs::write(folder.join("index.json"), index.to_string()).unwrap();
    fs::write(
        folder.join("oci-layout"),
        r#"{"imageLayoutVersion":"1.0.0"}"#,
    )
    .unwrap();
}
