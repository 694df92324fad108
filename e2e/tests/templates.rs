//! Templates from images, as other programs make those.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use e2e::{Mesh, small, wait_for};
use proto::template::v1::GetTemplateRequest;
use sdk::NewSession;
use service_kit::config::tools_folder;
use testbed::Registry;

fn run(program: &str, arguments: &[&str], folder: &Path) {
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

/// Two layers by `umoci`: a Debian, and what was changed in it.
fn image(folder: &Path) {
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

fn build(mesh: &Mesh, archive: &Path, more: &[&str]) -> std::process::Output {
    let archive = archive.to_str().unwrap();
    let arguments = [
        "template",
        "build",
        "-t",
        "app:v1",
        "--image-archive",
        archive,
    ];
    mesh.run(&[&arguments, more].concat())
}

fn pull(mesh: &Mesh, registry: &Registry, more: &[&str]) -> std::process::Output {
    let image = format!("{}/team/app:v1", registry.address());
    let arguments = ["template", "build", "-t", "pulled", "--image", &image];
    mesh.run(&[&arguments, more].concat())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_becomes_a_template() {
    let registry = testbed::Registry::start(&tools_folder().join("bin")).unwrap();
    let trusted = format!("http://{}", registry.address());
    let mesh = Mesh::start(&["--trusted-registries", &trusted]);
    let folder = tempfile::tempdir().unwrap();
    image(folder.path());
    let archive = folder.path().join("image.tar");
    run(
        "tar",
        &["-C", "image", "-cf", archive.to_str().unwrap(), "."],
        folder.path(),
    );

    let built = build(&mesh, &archive, &["--image-name", "v2"]);
    let said = String::from_utf8_lossy(&built.stderr).into_owned();
    assert!(!built.status.success());
    assert!(
        said.contains("no image \"v2\", only v1 (IMAGE_UNKNOWN)"),
        "{said}"
    );
    let built = build(&mesh, &archive, &[]);
    assert!(
        built.status.success(),
        "{}",
        String::from_utf8_lossy(&built.stderr)
    );
    assert_eq!(String::from_utf8_lossy(&built.stdout), "app@1\n");

    let session = NewSession {
        template: "app:v1".into(),
        env: [("OVER".to_owned(), "session".to_owned())].into(),
        ..small()
    };
    let session = mesh.client().create(session).await.unwrap();
    let sandbox = mesh.client().sandbox(&session).unwrap();
    let script =
        "cat /srv/hello; test -e /etc/issue || echo; echo $GREETING, $OVER, $(id -u), $HOME";
    let output = sandbox.run(["sh", "-c", script]).await.unwrap();
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "from the second layer\ngood morning, session, 4242, /\n"
    );

    // The same image out of a registry is the same root, byte for byte.
    let layout = folder.path().join("image");
    registry.push(&layout, "v1", "team/app").unwrap();
    let built = pull(&mesh, &registry, &[]);
    let said = String::from_utf8_lossy(&built.stderr).into_owned();
    assert!(said.contains("(PULL_UNAUTHORIZED)"), "{said}");
    let password = folder.path().join("password");
    fs::write(&password, format!("{}\n", testbed::PASSWORD)).unwrap();
    let password = ["--registry-password-file", password.to_str().unwrap()];
    let built = pull(
        &mesh,
        &registry,
        &[&["--registry-user", testbed::USER], &password[..]].concat(),
    );
    assert!(
        built.status.success(),
        "{}",
        String::from_utf8_lossy(&built.stderr)
    );
    let mut client = mesh.client().templates();
    let mut rootfs = Vec::new();
    for name in ["app", "pulled"] {
        let request = GetTemplateRequest {
            template: name.into(),
        };
        let template = client.get_template(request).await.unwrap().into_inner();
        let template = template.template.unwrap();
        let image = format!("{}/team/app@sha256:", registry.address());
        assert_eq!(template.source_image.starts_with(&image), name == "pulled");
        rootfs.push((
            template.rootfs.unwrap(),
            template.env,
            template.default_user,
        ));
    }
    assert_eq!(rootfs[0], rootfs[1]);

    // One byte of a layer is another: nothing of it becomes a template.
    let blobs = folder.path().join("image/blobs/sha256");
    let largest = fs::read_dir(blobs)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .max_by_key(|path| fs::metadata(path).unwrap().len())
        .unwrap();
    let mut bytes = fs::read(&largest).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&largest, bytes).unwrap();
    run(
        "tar",
        &["-C", "image", "-cf", archive.to_str().unwrap(), "."],
        folder.path(),
    );
    let built = build(&mesh, &archive, &[]);
    let said = String::from_utf8_lossy(&built.stderr).into_owned();
    assert!(said.contains("layer 1"), "{said}");
    assert!(
        said.contains("(LAYER_DAMAGED)") || said.contains("(DIGEST_MISMATCH)"),
        "{said}"
    );
    let work = mesh.state().join("templates/work");
    wait_for("nothing is left behind", Duration::from_secs(10), || {
        fs::read_dir(&work).unwrap().count() == 0
    });
}
