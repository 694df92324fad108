//! Files through whatever breaks on the way. A longer run, by hand: `SANDMESH_E2E_UPLOAD_MIB=2048 SANDMESH_E2E_KILLS=10`.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    fs::File,
    io::{Read as _, Seek as _, Write as _},
    time::Duration,
};

use e2e::{Mesh, how_many};
use proto::envd::v1::{
    FileChange, FilesystemServiceWatchRequest, FilesystemServiceWatchResponse as Change,
    WriteHeader,
};
use sha2::{Digest as _, Sha256};
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_mins(1);

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_and_a_watch_go_on_over_what_breaks() {
    let size = how_many("SANDMESH_E2E_UPLOAD_MIB", 32) << 20;
    let kills = how_many("SANDMESH_E2E_KILLS", 2);
    let mesh = Mesh::start(&["--separate"]);
    let session = mesh.session().await;
    let sandbox = mesh.client().sandbox(&session).unwrap();
    let mut watch = sandbox.watch_files(FilesystemServiceWatchRequest {
        path: "~".into(),
        ..Default::default()
    });
    let first = timeout(PATIENCE, watch.next()).await.unwrap().unwrap();
    assert_eq!(first.unwrap().change(), FileChange::Watching);

    let mut file = tempfile::tempfile().unwrap();
    let mut noise = File::open("/dev/urandom").unwrap();
    let mut hash = Sha256::new();
    let mut part = vec![0; 1 << 20];
    for _ in 0..size >> 20 {
        noise.read_exact(&mut part).unwrap();
        hash.update(&part);
        file.write_all(&part).unwrap();
    }
    file.rewind().unwrap();
    let header = WriteHeader {
        path: "~/noise".into(),
        ..WriteHeader::default()
    };
    let mut killed = 0;
    let progress = |sent: u64| {
        if killed < kills && sent * (kills + 1) >= size * (killed + 1) {
            killed += 1;
            mesh.crash(if killed % 2 == 1 { "node" } else { "envoy" });
        }
    };
    let mut file = tokio::fs::File::from_std(file);
    let entry = sandbox.upload(header, &mut file, progress).await.unwrap();
    assert_eq!((entry.size_bytes, killed), (size, kills));
    let there = sandbox
        .run(["sh", "-c", "sha256sum < ~/noise; ls -A ~ | grep -c part"])
        .await
        .unwrap();
    assert_eq!(
        String::from_utf8_lossy(&there.stdout),
        format!("{}  -\n0\n", hex::encode(hash.finalize()))
    );
    // Whoever watched is told that something may have been missed, and then sees what comes.
    let mut until = async |wanted: fn(&Change) -> bool| {
        while !wanted(
            &timeout(PATIENCE, watch.next())
                .await
                .unwrap()
                .unwrap()
                .unwrap(),
        ) {}
    };
    until(|change| change.change() == FileChange::Overflow).await;
    sandbox.run(["touch", "last"]).await.unwrap();
    until(|change| change.path_bytes.ends_with(b"/last")).await;
}
