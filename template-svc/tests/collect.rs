//! What nobody needs goes, and nothing else, in a real database, folder and store.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    fs::{self, File},
    path::Path,
    time::{Duration, SystemTime},
};

use blobs::{Address, Blobs, Cut};
use proto::template::v1::{Artifact, BuildTemplateRequest, Kernel, Layer, Template};
use template_svc::{
    artifact::{ArtifactDigest, Artifacts},
    collect::{KEPT, REMEMBERED, collect},
    names::hidden,
};
use testbed::{Durability, Postgres};

mod fresh;

fn age(folder: &Path, by: Duration) {
    for entry in walkdir::WalkDir::new(folder) {
        let entry = entry.unwrap();
        if entry.file_type().is_file() {
            let file = File::open(entry.path()).unwrap();
            file.set_modified(SystemTime::now() - by).unwrap();
        }
    }
}

#[tokio::test]
async fn what_nobody_needs_goes() {
    let postgres = Postgres::with(Durability::None).unwrap();
    let store = fresh::store(&postgres).await;
    let folder = tempfile::tempdir().unwrap();
    let artifacts = Artifacts::open(folder.path().join("artifacts")).unwrap();
    let address = Address::of_folder(&folder.path().join("store")).unwrap();
    let blobs = Blobs::open(&address).unwrap();
    let mut made = Vec::new();
    for text in [
        "root",
        "layer",
        "of a step",
        "hidden",
        "failed",
        "own",
        "kernel",
        "young",
    ] {
        let artifact = artifacts.ingest_from(text.repeat(1000).as_bytes()).unwrap();
        let path = artifacts.find(&ArtifactDigest::parse(&artifact.digest).unwrap());
        blobs.put(&path.unwrap(), Cut::Content).await.unwrap();
        made.push(artifact);
    }
    let [root, layer, step, kept, failed, own, kernel, young] =
        <[Artifact; 8]>::try_from(made).unwrap();
    let layer_of = |blob: &Artifact| Layer {
        blob: Some(blob.clone()),
        ..Layer::default()
    };
    let request = BuildTemplateRequest {
        name: "app".into(),
        ..BuildTemplateRequest::default()
    };
    let inserted = store.insert_build("b", "team", "team", &request, None);
    inserted.await.unwrap();
    let taken = store.take_build(Duration::from_mins(1), 2).await.unwrap();
    let version = Template {
        rootfs: Some(root.clone()),
        layers: vec![layer_of(&layer)],
        ..Template::default()
    };
    store.publish(&taken.unwrap(), &version).await.unwrap();
    store
        .remember_step("team", &[1; 32], &[layer_of(&step)])
        .await
        .unwrap();
    let name = hidden(&"a".repeat(64));
    let spec = Template {
        rootfs: Some(kept.clone()),
        ..Template::default()
    };
    store.keep_hidden("team", &name, &spec).await.unwrap();

    let named = Kernel {
        name: "k".into(),
        kernel: Some(kernel.clone()),
        modules: Some(kernel.clone()),
        ..Kernel::default()
    };
    assert!(store.put_kernel(&named).await.unwrap());

    let here = |artifact: &Artifact| {
        let digest = ArtifactDigest::parse(&artifact.digest).unwrap();
        artifacts.find(&digest).is_some()
    };
    let own_files = [own.clone()];
    let run = || collect(&store, &artifacts, &blobs, &own_files);
    assert_eq!(run().await.unwrap(), Default::default());
    age(folder.path(), KEPT + Duration::from_hours(1));
    // Somebody builds with it right now.
    let digest = ArtifactDigest::parse(&young.digest).unwrap();
    assert!(artifacts.touch(&digest, SystemTime::now()).unwrap());
    let collected = run().await.unwrap();
    assert_eq!((collected.forgotten, collected.artifacts), (0, 1));
    assert_eq!((collected.blobs.files, collected.blobs.chunks), (2, 2));
    for (artifact, stays) in [
        (&root, true),
        (&layer, true),
        (&step, true),
        (&kept, true),
        (&failed, false),
        (&own, true),
        (&kernel, true),
        (&young, true),
    ] {
        assert_eq!(here(artifact), stays);
        let is_stored = blobs.has(&artifact.digest).await.unwrap();
        assert_eq!(is_stored, stays && artifact != &young);
    }

    // What was of no use for long is forgotten; what was, is not, and versions are never.
    let pool = sqlx::PgPool::connect(&postgres.url()).await.unwrap();
    let back = i64::try_from(REMEMBERED.as_micros()).unwrap() + 1;
    for sql in [
        "update sandmesh_template.build_steps set use_time = use_time - $1",
        "update sandmesh_template.template_versions set create_time = create_time - $1",
    ] {
        sqlx::query(sql).bind(back).execute(&pool).await.unwrap();
    }
    assert!(store.known_step("team", &[1; 32]).await.unwrap().is_some());
    age(folder.path(), KEPT + Duration::from_hours(1));
    let collected = run().await.unwrap();
    assert_eq!(collected.forgotten, 1);
    assert!(here(&step) && here(&root) && here(&kernel) && !here(&kept) && !here(&young));
    assert!(store.delete_kernel("k").await.unwrap());
    assert!(store.hidden("team", &name).await.unwrap().is_none());
    assert_eq!(store.delete("team", "app", None).await.unwrap(), 1);
    run().await.unwrap();
    assert!(!here(&root) && !here(&layer) && !here(&kernel));
    assert_eq!(
        fs::read_dir(folder.path().join("artifacts"))
            .unwrap()
            .count(),
        2
    );
}
