//! Kernels that operators import, and what templates tell theirs.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{fs, path::Path, process::Output};

use e2e::{Mesh, small};
use proto::template::v1::{GetTemplateRequest, Template};
use sdk::NewSession;
use service_kit::config::tools_folder;

/// What a command prints that is to succeed.
fn stdout(output: Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    String::from_utf8(output.stdout).unwrap()
}

/// What a command says that is to fail.
fn refused(output: Output) -> String {
    assert!(!output.status.success());
    String::from_utf8_lossy(&output.stderr).into_owned()
}

async fn template(mesh: &Mesh, name: &str) -> Template {
    let request = GetTemplateRequest {
        template: name.into(),
        ..GetTemplateRequest::default()
    };
    let answer = mesh.client().templates().get_template(request).await;
    answer.unwrap().into_inner().template.unwrap()
}

/// What a new session of a template says of its kernel: its release, and what it was told.
async fn kernel_of(mesh: &Mesh, template: &str) -> (String, String) {
    let session = NewSession {
        template: template.into(),
        ..small()
    };
    let session = mesh.client().create(session).await.unwrap();
    let sandbox = mesh.client().sandbox(&session).unwrap();
    let script = "uname -r; cat /proc/cmdline";
    let output = sandbox.run(["sh", "-c", script]).await.unwrap();
    mesh.client().stop(&session.session_id).await.unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let (release, line) = text.split_once('\n').unwrap();
    (release.to_owned(), line.trim_end().to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_template_has_the_kernel_it_was_built_with() {
    let package = tools_folder().join("kernel-package");
    let boot = fs::read_dir(package.join("boot")).expect("./deploy/install test");
    let image = boot
        .map(|entry| entry.unwrap().path())
        .find(|path| path.to_string_lossy().contains("/vmlinuz-"))
        .unwrap();
    let release = image.file_name().unwrap().to_str().unwrap();
    let release = release.strip_prefix("vmlinuz-").unwrap();
    let mesh = Mesh::start(&[]);
    let import = |image: &Path, modules: &Path| {
        let (image, modules) = (image.to_str().unwrap(), modules.to_str().unwrap());
        let import = ["kernel", "import", image, "--modules", modules];
        mesh.run(&[&import[..], &["--name", "imported"]].concat())
    };
    let folder = tempfile::tempdir().unwrap();
    let said = refused(import(&image, folder.path()));
    assert!(said.contains("is not of this kernel"), "{said}");
    assert_eq!(stdout(import(&image, &package)), "imported\n");
    let listed = stdout(mesh.run(&["kernel", "list"]));
    assert!(
        listed.contains("imported") && listed.contains(release),
        "{listed}"
    );

    fs::write(folder.path().join("Dockerfile"), "FROM base\n").unwrap();
    let build = |kernel: &str, arguments: &str| {
        let folder = folder.path().to_str().unwrap();
        let build = ["template", "build", "-t", "app", folder];
        let with = ["--kernel", kernel, "--kernel-arguments", arguments];
        mesh.run(&[&build[..], &with[..]].concat())
    };
    let said = refused(build("imported", "root=/dev/vda"));
    assert!(
        said.contains("kernel_arguments") && said.contains("envd"),
        "{said}"
    );
    let said = refused(build("import", ""));
    assert!(said.contains("the closest are imported"), "{said}");
    let arguments = "sandmesh.test=1 mitigations=off";
    assert_eq!(stdout(build("imported", arguments)), "app@1\n");
    let built = template(&mesh, "app@1").await;
    assert_eq!(built.kernel_name, "imported");
    assert_eq!(built.kernel_arguments, arguments);
    let shown = stdout(mesh.run(&["template", "inspect", "app@1"]));
    for part in ["imported", release, arguments] {
        assert!(shown.contains(part), "{shown}");
    }

    let (running, told) = kernel_of(&mesh, "app").await;
    assert_eq!(running, release);
    // Others are told what they were; a VMM may add words of its own.
    let (_, others) = kernel_of(&mesh, "base").await;
    assert!(told.contains(&format!(" {arguments}")), "{told}");
    assert_eq!(told.replace(&format!(" {arguments}"), ""), others);

    // The name stands for another kernel now, and then for none; what was built stays as it is. What follows the segments of an ELF file is
    // nobody's.
    let own = tools_folder().join("guest-kernel/current");
    let said = fs::read_to_string(own.join("version")).unwrap();
    if said.contains(release) {
        let changed = folder.path().join("vmlinux");
        let bytes = fs::read(own.join("vmlinux")).unwrap();
        fs::write(&changed, [bytes, vec![0]].concat()).unwrap();
        let modules = package.join("lib/modules").join(release);
        assert_eq!(stdout(import(&changed, &modules)), "imported\n");
        assert_eq!(stdout(build("imported", "")), "app@2\n");
        let changed = template(&mesh, "app@2").await;
        assert_ne!(changed.kernel, built.kernel);
        assert_eq!(changed.kernel_arguments, "");
        assert_eq!(
            kernel_of(&mesh, "app@2").await,
            (release.to_owned(), others)
        );
    }
    stdout(mesh.run(&["kernel", "delete", "imported"]));
    let said = refused(build("imported", ""));
    assert!(said.contains("no kernel \"imported\""), "{said}");
    assert_eq!(template(&mesh, "app@1").await.kernel, built.kernel);
    assert_eq!(kernel_of(&mesh, "app@1").await, (running, told));
}
