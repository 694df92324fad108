//! A node that has not room for all it was ever asked for: what goes is fetched and made again, and nobody who runs or sleeps misses it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use e2e::{Mesh, small, wait_for};
use proto::{session::v1::Session, template::v1::GetTemplateRequest};
use sdk::{NewFork, NewSession};
use service_kit::config::tools_folder;

/// One of the two templates with its snapshot, and a kernel; not both.
const BOUND: u64 = 320 << 20;
/// Of what does not get smaller by packing.
const OWN: usize = 60 << 20;
/// Reads some ten MiB of a template's root.
const READ_ROOT: &str = "cat /usr/bin/* 2>/dev/null | cksum";

async fn output(mesh: &Mesh, session: &Session, script: &str) -> String {
    let sandbox = mesh.client().sandbox(session).unwrap();
    let output = sandbox.run(["sh", "-c", script]).await.unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.exit.code(), 0, "{script}: {said}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// Makes the template `other`: the same root, and a file of its own.
fn make_other(mesh: &Mesh) {
    let folder = tempfile::tempdir().unwrap();
    let mut random = fs::File::open("/dev/urandom").unwrap();
    let mut own = vec![0; OWN];
    std::io::Read::read_exact(&mut random, &mut own).unwrap();
    fs::create_dir(folder.path().join("srv")).unwrap();
    fs::write(folder.path().join("srv/own"), own).unwrap();
    let tarball = folder.path().join("other.tar");
    fs::copy(tools_folder().join("base-rootfs.tar"), &tarball).unwrap();
    let added = Command::new("tar")
        .args(["-rf", "other.tar", "srv/own"])
        .current_dir(&folder)
        .stdin(Stdio::null())
        .status();
    assert!(added.unwrap().success());
    let built = mesh.run(&[
        "template",
        "build",
        "-t",
        "other",
        "--rootfs",
        tarball.to_str().unwrap(),
        "--memory",
        "128MiB",
        "--disk",
        "256MiB",
    ]);
    let said = String::from_utf8_lossy(&built.stderr);
    assert!(built.status.success(), "{said}");
}

/// The digest of a template's root.
async fn rootfs(mesh: &Mesh, template: &str) -> String {
    let request = GetTemplateRequest {
        template: template.into(),
        ..GetTemplateRequest::default()
    };
    let answer = mesh.client().templates().get_template(request).await;
    let template = answer.unwrap().into_inner().template.unwrap();
    template.rootfs.unwrap().digest
}

/// Bytes of the files below a folder; none if something is on its way in or out.
fn walk(folder: &Path) -> Option<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(folder).ok()? {
        let entry = entry.ok()?;
        let metadata = entry.metadata().ok()?;
        bytes += if entry.file_name().to_string_lossy().starts_with('.') {
            return None;
        } else if metadata.is_dir() {
            walk(&entry.path())?
        } else {
            metadata.blocks() * 512
        };
    }
    Some(bytes)
}

/// Bytes of its artifacts and of its snapshots of templates.
fn kept(mesh: &Mesh) -> Option<u64> {
    let node = mesh.state().join("node");
    Some(walk(&node.join("artifacts"))? + walk(&node.join("t"))?)
}

async fn metric(mesh: &Mesh, name: &str) -> f64 {
    let metrics = mesh.metrics("node").await;
    let values = metrics
        .lines()
        .filter(|line| line.starts_with(name))
        .map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap());
    values.sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_outlive_what_their_node_forgets() {
    let bound = format!("{BOUND}B");
    let mesh = Mesh::start(&["--separate", "--cache", &bound]);
    let client = mesh.client();
    make_other(&mesh);
    let base = rootfs(&mesh, "base").await;
    let others = rootfs(&mesh, "other").await;
    let node = mesh.state().join("node");
    let is_kept = |digest: &str| node.join("artifacts").join(digest).exists();
    let snapshots = || {
        let names = fs::read_dir(node.join("t")).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name());
        names
            .filter(|name| !name.to_string_lossy().starts_with('.'))
            .count()
    };

    let (first, paused) = (mesh.session().await, mesh.session().await);
    output(&mesh, &paused, "echo its own > ~/file").await;
    client.pause(&paused.session_id).await.unwrap();
    let checkpoint = client.create_checkpoint(&first.session_id, "c").await;
    let checkpoint = checkpoint.unwrap().checkpoint_id;
    assert!(is_kept(&base) && snapshots() == 1);
    let other = NewSession {
        template: "other".into(),
        ..small()
    };
    let other = client.create(other).await.unwrap();
    assert!(is_kept(&others) && !is_kept(&base));
    assert_eq!(snapshots(), 1);
    assert!(metric(&mesh, "sandmesh_node_cache_evictions_total").await >= 2.0);

    // What runs, what sleeps, what goes back, and what is made of them has it all the same, and makes nobody fetch it.
    let root = output(&mesh, &first, READ_ROOT).await;
    client.resume(&paused.session_id, None).await.unwrap();
    assert_eq!(output(&mesh, &paused, "cat ~/file").await, "its own");
    assert_eq!(output(&mesh, &paused, READ_ROOT).await, root);
    client.pause(&paused.session_id).await.unwrap();
    let mut children = Vec::new();
    for parent in [&first, &paused] {
        let forked = client.fork(&parent.session_id, NewFork::of(1)).await;
        children.extend(forked.unwrap().sessions);
    }
    assert_eq!(children.len(), 2);
    for child in &children {
        assert_eq!(output(&mesh, child, READ_ROOT).await, root);
    }
    mesh.crash("node");
    let rolled = client.rollback(&first.session_id, &checkpoint).await;
    rolled.unwrap();
    assert_eq!(output(&mesh, &first, READ_ROOT).await, root);
    client.resume(&paused.session_id, None).await.unwrap();
    assert_eq!(output(&mesh, &paused, READ_ROOT).await, root);
    assert!(is_kept(&others) && !is_kept(&base));

    // Who starts has it fetched, and made, and is the same; now the other goes.
    let own = output(&mesh, &other, "cksum < /srv/own").await;
    let again = mesh.session().await;
    assert_eq!(output(&mesh, &again, READ_ROOT).await, root);
    assert!(is_kept(&base) && !is_kept(&others));
    client.pause(&other.session_id).await.unwrap();
    client.resume(&other.session_id, None).await.unwrap();
    assert_eq!(output(&mesh, &other, "cksum < /srv/own").await, own);
    wait_for("it is within its bound", Duration::from_secs(10), || {
        kept(&mesh).is_some_and(|bytes| bytes <= BOUND)
    });
    // File systems give and take blocks after a file was written.
    let (counted, found) = (
        metric(&mesh, "sandmesh_node_cache_bytes").await,
        kept(&mesh).unwrap_or_default() as f64,
    );
    assert!((counted - found).abs() < 4e6, "{counted} {found}");
    for session in children.iter().chain([&first, &paused, &other, &again]) {
        client.stop(&session.session_id).await.unwrap();
    }
}
