//! Files through whatever breaks on the way. A longer run, by hand: `SANDMESH_E2E_UPLOAD_MIB=2048 SANDMESH_E2E_KILLS=10`.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    ffi::OsStr,
    fs::{File, Permissions},
    io::{Read as _, Seek as _, Write as _},
    os::unix::{
        ffi::OsStrExt as _,
        fs::{PermissionsExt as _, symlink},
    },
    path::Path,
    time::{Duration, Instant},
};

use bytes::Bytes;
use e2e::{Mesh, how_many, http};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use proto::envd::v1::{
    FileChange, FilesystemServiceWatchRequest, FilesystemServiceWatchResponse as Change,
    WriteHeader,
};
use sdk::{FileUrl, Use};
use sha2::{Digest as _, Sha256};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;

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

fn is_draft(path: &str) -> bool {
    Path::new(path).extension() == Some(OsStr::new("part"))
}

/// Host and path of an address.
fn parts(address: &str) -> (&str, &str) {
    let rest = address.strip_prefix("http://").unwrap();
    rest.split_at(rest.find('/').unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn files_and_folders_come_and_go_by_http_and_cp() {
    let mesh = Mesh::start(&[]);
    let session = mesh.session().await;
    let id = &session.session_id;
    let sandbox = mesh.client().sandbox(&session).unwrap();
    let url = |path: &str, what| {
        FileUrl {
            path: path.into(),
            user: String::new(),
            archive: String::new(),
            what,
            valid: Duration::from_mins(10),
        }
        .of(&session)
    };
    let get = async |address: &str, headers: &[_]| {
        let (host, path) = parts(address);
        http::get(mesh.edge(), host, path, headers).await
    };

    // A signed address is for one file and one use; a token for all.
    let bytes = Bytes::from(vec![7; 300_000]);
    let address = url("in/data", Use::Write);
    let (host, path) = parts(&address);
    let answer = http::put(mesh.edge(), host, path, &[], http::whole(bytes.clone())).await;
    assert_eq!(answer.status, 201);
    let refused = get(&address, &[]).await;
    assert_eq!(refused.refusal(), (403, "SIGNATURE_INVALID".into()));
    let address = url("in/data", Use::Read);
    let answer = get(&address, &[("range", "bytes=299990-")]).await;
    assert_eq!((answer.status.as_u16(), answer.body.len()), (206, 10));
    let tag = answer.headers["etag"].to_str().unwrap().to_owned();
    assert_eq!(get(&address, &[("if-none-match", &tag)]).await.status, 304);
    let plain = format!("http://{host}/files/~/in/data");
    let refused = get(&plain, &[]).await;
    assert_eq!(refused.refusal(), (401, "CREDENTIALS_MISSING".into()));
    let token = [("x-sandmesh-token", session.access_token.as_str())];
    assert_eq!(get(&plain, &token).await.body, bytes);
    let shadow = format!("http://{host}/files/etc/shadow");
    let refused = get(&shadow, &token).await;
    assert_eq!(refused.refusal(), (403, "PATH_PERMISSION_DENIED".into()));
    assert_eq!(refused.json()["sessionId"], id.as_str());
    let none = get(&url("none", Use::Read), &[("accept", "text/html")]).await;
    assert_eq!(none.status, 404);
    assert!(String::from_utf8_lossy(&none.body).contains("<code>PATH_NOT_FOUND</code>"));

    // A folder there and back, with all that is in it.
    let here = tempfile::tempdir().unwrap();
    let from = here.path().join("from");
    std::fs::create_dir_all(from.join("sub/empty")).unwrap();
    for number in 0..30 {
        std::fs::write(from.join(format!("sub/{number}")), number.to_string()).unwrap();
    }
    std::fs::write(from.join(OsStr::from_bytes(b"b\xff")), &bytes).unwrap();
    symlink("../up", from.join("link")).unwrap();
    std::fs::set_permissions(from.join("sub/1"), Permissions::from_mode(0o750)).unwrap();
    let there = format!("{id}:");
    let done = mesh.run(&["cp", "-r", from.to_str().unwrap(), &there]);
    assert!(done.status.success(), "{done:?}");
    let to = here.path().join("to");
    let source = format!("{id}:from");
    let done = mesh.run(&["cp", "-r", &source, to.to_str().unwrap()]);
    assert!(done.status.success(), "{done:?}");
    let same = std::process::Command::new("diff")
        .args(["-r", "--no-dereference"])
        .args([&from, &to])
        .output()
        .unwrap();
    assert!(same.status.success(), "{same:?}");
    let mode = std::fs::metadata(to.join("sub/1"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o750);
    let listed = mesh.run(&["ls", "--depth", "2", "--pattern", "2?", &source]);
    assert_eq!(String::from_utf8_lossy(&listed.stdout).lines().count(), 11);
    let file = mesh.run(&["cp", &source, to.to_str().unwrap()]);
    assert!(String::from_utf8_lossy(&file.stderr).contains("copy it with -r"));

    // As an archive: what tar makes of it here is the same.
    let tar = get(&url("from", Use::Read), &[]).await;
    assert_eq!(tar.headers["content-type"], "application/x-tar");
    let unpacked = here.path().join("unpacked");
    tar::Archive::new(tar.body.as_ref())
        .unpack(&unpacked)
        .unwrap();
    let same = std::process::Command::new("diff")
        .args(["-r", "--no-dereference"])
        .args([&from, &unpacked])
        .output()
        .unwrap();
    assert!(same.status.success(), "{same:?}");

    // What breaks off on the way in leaves nothing, also when nobody said how long it is.
    let (sender, stream) = tokio::sync::mpsc::channel(2);
    let address = url("half", Use::Write);
    let (host, path) = parts(&address);
    let body = StreamBody::new(ReceiverStream::new(stream)).boxed();
    let half = http::put(mesh.edge(), host, path, &[], body);
    let feed = async {
        sender.send(Ok(Frame::data(bytes))).await.unwrap();
        // It is on its way through; then its client goes.
        while sandbox
            .list("~")
            .await
            .unwrap()
            .iter()
            .all(|entry| !is_draft(&entry.path))
        {}
    };
    tokio::select! {
        answer = half => panic!("{answer:?}"),
        () = feed => {}
    }
    let end = Instant::now() + PATIENCE;
    loop {
        let names: Vec<String> = sandbox
            .list("~")
            .await
            .unwrap()
            .into_iter()
            .map(|entry| entry.path)
            .collect();
        assert!(
            !names.iter().any(|name| name.ends_with("/half")),
            "{names:?}"
        );
        if !names.iter().any(|name| is_draft(name)) {
            break;
        }
        assert!(Instant::now() < end, "{names:?}");
    }
}
