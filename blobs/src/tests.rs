use std::{
    collections::HashSet,
    fs,
    sync::atomic::{AtomicU32, Ordering},
};

use futures::stream::BoxStream;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta,
    PutMultipartOptions, PutOptions, PutResult, memory::InMemory,
};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use super::*;

fn noise(seed: u64, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    StdRng::seed_from_u64(seed).fill(&mut bytes[..]);
    bytes
}

fn in_memory() -> Blobs {
    Blobs::of(Arc::new(InMemory::new()))
}

async fn put(blobs: &Blobs, bytes: &[u8], cut: Cut) -> (String, Moved) {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), bytes).unwrap();
    let put = blobs.put(file.path(), cut).await.unwrap();
    assert_eq!(put.0, blake3::hash(bytes).to_hex().as_str());
    put
}

async fn get(blobs: &Blobs, digest: &str, size: usize) -> Result<(Vec<u8>, Moved), BlobError> {
    let file = tempfile::NamedTempFile::new().unwrap();
    let moved = blobs
        .get(digest, size as u64, file.reopen().unwrap())
        .await?;
    Ok((fs::read(file.path()).unwrap(), moved))
}

#[tokio::test]
async fn what_is_stored_is_fetched() {
    let folder = tempfile::tempdir().unwrap();
    let url = Address::of_folder(&folder.path().join("store")).unwrap();
    let mut sparse = noise(1, 5 << 20);
    sparse[(1 << 20)..(4 << 20)].fill(0);
    for (number, bytes) in [Vec::new(), b"x".to_vec(), noise(2, 3 << 20), sparse]
        .into_iter()
        .enumerate()
    {
        for cut in [Cut::Content, Cut::Every(256 << 10), Cut::Every(1)] {
            if cut == Cut::Every(1) && bytes.len() > 10 {
                continue;
            }
            let blobs = if number % 2 == 0 {
                in_memory()
            } else {
                Blobs::open(&url).unwrap()
            };
            let (digest, moved) = put(&blobs, &bytes, cut).await;
            assert!(blobs.has(&digest).await.unwrap());
            let (back, fetched) = get(&blobs, &digest, bytes.len()).await.unwrap();
            assert!(back == bytes);
            assert_eq!(fetched.chunks, moved.chunks);
            // Again costs nothing.
            let (_, again) = put(&blobs, &bytes, cut).await;
            assert_eq!((again.moved_chunks, again.chunks), (0, moved.chunks));
        }
    }
    let blobs = in_memory();
    let digest = blake3::hash(b"none").to_hex();
    assert!(!blobs.has(&digest).await.unwrap());
    assert!(matches!(
        get(&blobs, &digest, 4).await,
        Err(BlobError::Missing(_))
    ));
}

/// What is inserted, or changed in place, costs what it is.
#[tokio::test]
async fn what_files_have_in_common_is_there_once() {
    let blobs = in_memory();
    let first = noise(1, 16 << 20);
    put(&blobs, &first, Cut::Content).await;
    let inserted = [&first[..5_000_000], &noise(2, 1 << 20), &first[5_000_000..]].concat();
    let (_, moved) = put(&blobs, &inserted, Cut::Content).await;
    assert!(moved.moved_bytes < 3 << 20, "{moved:?}");
    put(&blobs, &first, Cut::Every(64 << 10)).await;
    let mut changed = first.clone();
    changed[8 << 20] ^= 1;
    let (_, moved) = put(&blobs, &changed, Cut::Every(64 << 10)).await;
    assert_eq!(moved.moved_chunks, 1);
}

/// Holes are neither read nor stored, nor written.
#[tokio::test]
async fn memory_that_nobody_wrote_costs_nothing() {
    let blobs = in_memory();
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 30).unwrap();
    file.as_file()
        .write_all_at(b"something", 700 << 20)
        .unwrap();
    let (digest, moved) = blobs.put(file.path(), Cut::Every(2 << 20)).await.unwrap();
    assert_eq!((moved.bytes, moved.chunks), (1 << 30, 1));
    let back = tempfile::NamedTempFile::new().unwrap();
    blobs
        .get(&digest, 1 << 30, back.reopen().unwrap())
        .await
        .unwrap();
    let blocks = std::os::unix::fs::MetadataExt::blocks(&back.as_file().metadata().unwrap());
    assert!(blocks * 512 <= 4 << 20);
}

#[tokio::test]
async fn what_is_damaged_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let url = Address::of_folder(folder.path()).unwrap();
    let blobs = Blobs::open(&url).unwrap();
    let bytes = noise(1, 1 << 20);
    let (digest, _) = put(&blobs, &bytes, Cut::Content).await;
    let (other, _) = put(&blobs, &noise(2, 1 << 20), Cut::Content).await;
    let list = folder.path().join(key("files", &digest).to_string());
    let good = fs::read(&list).unwrap();
    let damaged = |found| matches!(found, Err(BlobError::Damaged(_)));
    assert!(damaged(get(&blobs, &digest, bytes.len() + 1).await));
    // A list of other chunks, one that is none, one of chunks without end, and one that says it is larger.
    fs::copy(folder.path().join(key("files", &other).to_string()), &list).unwrap();
    assert!(damaged(get(&blobs, &digest, bytes.len()).await));
    fs::write(&list, "no list").unwrap();
    assert!(damaged(get(&blobs, &digest, bytes.len()).await));
    let endless = Chunk {
        digest: Bytes::from_static(&[1; 32]),
        length: u32::MAX,
    };
    for list_of in [
        List {
            size: u64::from(u32::MAX),
            chunks: vec![endless],
        },
        List {
            size: 1 << 60,
            chunks: Vec::new(),
        },
    ] {
        fs::write(&list, list_of.encode_to_vec()).unwrap();
        assert!(damaged(get(&blobs, &digest, bytes.len()).await));
    }
    fs::write(&list, &good).unwrap();
    // A chunk of something else, and one that unpacks to more than it may.
    let chunk = List::decode(&*good).unwrap().chunks[0].clone();
    let name = chunk.hash().unwrap().to_hex();
    let path = folder.path().join(key("chunks", &name).to_string());
    for data in [vec![7; chunk.length as usize], vec![0; 64 << 20]] {
        fs::write(&path, zstd::bulk::compress(&data, 1).unwrap()).unwrap();
        assert!(damaged(get(&blobs, &digest, bytes.len()).await));
    }
    fs::write(&path, "").unwrap();
    assert!(damaged(get(&blobs, &digest, bytes.len()).await));
    fs::remove_file(&path).unwrap();
    assert!(matches!(
        get(&blobs, &digest, bytes.len()).await,
        Err(BlobError::Missing(_))
    ));
    // It is mended by storing it again.
    put(&blobs, &bytes, Cut::Content).await;
    assert!(get(&blobs, &digest, bytes.len()).await.unwrap().0 == bytes);
}

/// Fails every third call, or every one.
#[derive(Debug)]
struct Failing {
    inner: InMemory,
    calls: AtomicU32,
    every: u32,
}

impl std::fmt::Display for Failing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("failing")
    }
}

impl Failing {
    fn blobs(every: u32) -> (Blobs, Arc<Self>) {
        let store = Arc::new(Self {
            inner: InMemory::new(),
            calls: AtomicU32::new(0),
            every,
        });
        (Blobs::of(store.clone()), store)
    }

    fn call(&self) -> object_store::Result<()> {
        let call = self.calls.fetch_add(1, Ordering::Relaxed) + 1;
        if call.is_multiple_of(self.every) {
            let full = io::Error::from(io::ErrorKind::StorageFull);
            return Err(object_store::Error::Generic {
                store: "failing",
                source: Box::new(full),
            });
        }
        Ok(())
    }
}

#[async_trait::async_trait]
impl ObjectStore for Failing {
    async fn put_opts(
        &self,
        key: &Key,
        payload: PutPayload,
        options: PutOptions,
    ) -> object_store::Result<PutResult> {
        self.call()?;
        self.inner.put_opts(key, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        key: &Key,
        options: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(key, options).await
    }

    async fn get_opts(&self, key: &Key, options: GetOptions) -> object_store::Result<GetResult> {
        self.call()?;
        self.inner.get_opts(key, options).await
    }

    fn delete_stream(
        &self,
        keys: BoxStream<'static, object_store::Result<Key>>,
    ) -> BoxStream<'static, object_store::Result<Key>> {
        self.inner.delete_stream(keys)
    }

    fn list(&self, prefix: Option<&Key>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Key>) -> object_store::Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(
        &self,
        from: &Key,
        to: &Key,
        options: CopyOptions,
    ) -> object_store::Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

#[tokio::test]
async fn what_fails_now_and_then_is_tried_again() {
    let (blobs, _) = Failing::blobs(3);
    let bytes = noise(1, 4 << 20);
    let (digest, _) = put(&blobs, &bytes, Cut::Content).await;
    assert!(get(&blobs, &digest, bytes.len()).await.unwrap().0 == bytes);
    let (blobs, store) = Failing::blobs(1);
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), &bytes).unwrap();
    let failed = blobs.put(file.path(), Cut::Content).await.unwrap_err();
    assert!(failed.is_full(), "{failed}");
    assert!(store.calls.load(Ordering::Relaxed) > 5);
}

#[tokio::test]
async fn what_nobody_wants_goes_after_a_while() {
    let folder = tempfile::tempdir().unwrap();
    let url = Address::of_folder(folder.path()).unwrap();
    let blobs = Blobs::open(&url).unwrap();
    let shared = noise(1, 2 << 20);
    let kept = [shared.clone(), noise(2, 1 << 20)].concat();
    let gone = [shared, noise(3, 1 << 20)].concat();
    let (kept_digest, _) = put(&blobs, &kept, Cut::Content).await;
    let (gone_digest, _) = put(&blobs, &gone, Cut::Content).await;
    let wanted = HashSet::from([kept_digest.clone()]);
    assert_eq!(blobs.sweep(&wanted).await.unwrap(), Swept::default());

    let age = |by: Duration| {
        for kind in ["chunks", "files"] {
            for shard in fs::read_dir(folder.path().join(kind)).unwrap() {
                for object in fs::read_dir(shard.unwrap().path()).unwrap() {
                    let object = File::open(object.unwrap().path()).unwrap();
                    object.set_modified(SystemTime::now() - by).unwrap();
                }
            }
        }
    };
    // Half as old they are written again by whoever needs them, and live on.
    age(GRACE * 2 / 3);
    let (_, again) = put(&blobs, &gone, Cut::Content).await;
    assert_eq!(again.moved_chunks, again.chunks);
    age(GRACE * 2);
    let swept = blobs.sweep(&wanted).await.unwrap();
    assert_eq!(swept.files, 1);
    assert!(swept.chunks > 0 && swept.bytes < 3 << 20, "{swept:?}");
    assert!(get(&blobs, &kept_digest, kept.len()).await.unwrap().0 == kept);
    assert!(!blobs.has(&gone_digest).await.unwrap());
}

#[test]
fn addresses_of_stores() {
    for (text, shown) in [
        ("/var/lib/x", "file:///var/lib/x/"),
        ("file:///a", "file:///a"),
        ("s3://bucket/a/b", "s3://bucket/a/b"),
    ] {
        assert_eq!(text.parse::<Address>().unwrap().to_string(), shown);
    }
    for text in ["", "a/b", "http://x", "redis://x"] {
        assert!(text.parse::<Address>().is_err(), "{text}");
    }
}

fn name(key: &str) -> BundleName {
    BundleName::new("ab", key).unwrap()
}

async fn put_bundle(blobs: &Blobs, key: &str, files: &[(&str, &[u8])]) -> Moved {
    let mut sum = Moved::default();
    let mut parts = Vec::new();
    for (name, bytes) in files {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), bytes).unwrap();
        let cut = Cut::Every(64 << 10);
        let (part, moved) = blobs
            .put_part(name, file.reopen().unwrap(), cut, &|| Box::pin(async {}))
            .await
            .unwrap();
        sum += moved;
        parts.push(part);
    }
    let about = key.as_bytes().to_vec();
    blobs.put_bundle(&name(key), about, parts).await.unwrap();
    sum
}

#[tokio::test]
async fn bundles_are_fetched_whole_and_share_what_is_the_same() {
    let blobs = in_memory();
    assert!(blobs.bundle(&name("1")).await.unwrap().is_none());
    assert!(!blobs.use_bundle(&name("1")).await.unwrap());
    let mut memory = noise(1, 1 << 20);
    memory.extend(vec![0; 4 << 20]);
    let first = put_bundle(&blobs, "1", &[("memory", &memory), ("devices", b"d")]).await;
    assert_eq!((first.chunks, first.moved_chunks), (17, 17));
    memory[3] ^= 1;
    let second = put_bundle(&blobs, "2", &[("memory", &memory), ("devices", b"d")]).await;
    assert_eq!((second.chunks, second.moved_chunks), (17, 1));
    assert!(blobs.use_bundle(&name("2")).await.unwrap());

    let bundle = blobs.bundle(&name("2")).await.unwrap().unwrap();
    assert_eq!(bundle.about, b"2");
    assert!(bundle.part("disk").is_none());
    let part = bundle.part("memory").unwrap();
    assert_eq!(part.bytes(), memory.len() as u64);
    let to = tempfile::NamedTempFile::new().unwrap();
    let moved = blobs.get_part(part, to.reopen().unwrap()).await.unwrap();
    assert_eq!(moved.moved_chunks, 16);
    assert!(fs::read(to.path()).unwrap() == memory);
    assert_eq!(blobs.bundles("ab").await.unwrap().len(), 2);
    assert!(blobs.bundles("cd").await.unwrap().is_empty());

    // Whoever claims another content is found out.
    let mut lying = part.clone();
    lying.digest = blake3::hash(b"other").to_hex().to_string();
    let to = tempfile::tempfile().unwrap();
    let damaged = blobs.get_part(&lying, to).await;
    assert!(matches!(damaged, Err(BlobError::Damaged(_))));
    blobs.remove_bundle(&name("2")).await.unwrap();
    blobs.remove_bundle(&name("2")).await.unwrap();
    assert!(blobs.bundle(&name("2")).await.unwrap().is_none());
    for (group, key) in [("", "1"), ("1", ""), ("..", "1"), ("a/b", "1"), ("g", "1")] {
        assert!(BundleName::new(group, key).is_none());
    }
}

#[tokio::test]
async fn bundles_go_with_what_they_are_of_or_when_they_are_of_no_use() {
    let folder = tempfile::tempdir().unwrap();
    let blobs = Blobs::open(&Address::of_folder(folder.path()).unwrap()).unwrap();
    put_bundle(&blobs, "1", &[("memory", &noise(1, 1 << 20))]).await;
    put_bundle(&blobs, "2", &[("memory", &noise(2, 1 << 20))]).await;
    fs::write(folder.path().join("snapshots/ab/3"), b"\xff").unwrap();
    let bundle = |key: &str| folder.path().join("snapshots/ab").join(key);
    let age = |path: std::path::PathBuf, by: Duration| {
        let object = File::open(path).unwrap();
        object.set_modified(SystemTime::now() - by).unwrap();
    };
    for shard in fs::read_dir(folder.path().join("chunks")).unwrap() {
        for chunk in fs::read_dir(shard.unwrap().path()).unwrap() {
            age(chunk.unwrap().path(), GRACE * 2);
        }
    }
    // What nobody can read is of no use, and hinders nothing.
    let wanted = HashSet::from(["ab".to_owned()]);
    let swept = blobs.sweep(&wanted).await.unwrap();
    assert_eq!((swept.bundles, swept.chunks), (1, 0));
    age(bundle("1"), UNUSED + Duration::from_hours(1));
    age(bundle("2"), UNUSED / 2);
    assert!(blobs.use_bundle(&name("2")).await.unwrap());
    let swept = blobs.sweep(&wanted).await.unwrap();
    assert_eq!((swept.bundles, swept.chunks), (1, 16));
    // It was used a moment ago, so it stays for a while, whatever it is of.
    let swept = blobs.sweep(&HashSet::new()).await.unwrap();
    assert_eq!(swept, Swept::default());
    age(bundle("2"), GRACE * 2);
    let swept = blobs.sweep(&HashSet::new()).await.unwrap();
    assert_eq!((swept.bundles, swept.chunks), (1, 16));
}
