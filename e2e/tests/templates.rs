//! Templates from images, as other programs make those.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use bytes::Bytes;
use e2e::{
    Mesh, http,
    images::{image, run},
    small, wait_for,
};
use proto::{
    session::v1::ListSessionsRequest,
    template::v1::{
        FindMissingFilesRequest, GetTemplateRequest, ListTemplatesRequest, UploadFilesRequest,
    },
};
use sdk::NewSession;
use service_kit::config::tools_folder;
use testbed::Registry;
use tonic::Code;

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
            ..GetTemplateRequest::default()
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

/// Makes the template `changed` of a session; whether it is made, and what is said.
fn promote(mesh: &Mesh, session: &str) -> (bool, String) {
    let built = mesh.run(&[
        "template",
        "build",
        "-t",
        "changed",
        "--from-session",
        session,
    ]);
    let said = String::from_utf8_lossy(&built.stderr).into_owned();
    (built.status.success(), said)
}

/// A session is changed in every way that a layer has a word for; a template of it is what it was.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_becomes_a_template() {
    let mesh = Mesh::start(&[]);
    let session = mesh.session().await;
    let id = &session.session_id;
    let sandbox = &mesh.client().sandbox(&session).unwrap();
    // Counts for as long as it runs, which is not while it is exported.
    let counter = sdk::Command {
        process_id: Some("counter".into()),
        ..sdk::Command::new([
            "sh",
            "-c",
            "echo $$ > /tmp/pid; i=0; while :; do i=$((i+1)); echo $i > /tmp/next; mv /tmp/next /tmp/count; sleep 0.1; done",
        ])
    };
    let counter = sandbox.start(counter).await.unwrap();
    let script = r#"set -e
        rm /etc/issue; rm -r /usr/share/doc; mkdir /usr/share/doc; echo anew > /usr/share/doc/only
        cd /srv; mkdir -p "$(printf 'deep/\303')/$(printf 'n%0180d' 0)"; printf bytes > "$(printf 'deep/\303')/$(printf 'n%0180d' 0)/file"
        ln -s /nowhere link; echo one > file; ln file twin; mkfifo fifo; mknod null c 1 3
        chown 4000000:12 file; chmod 4711 file; touch -d @1000000000.000000042 file
        truncate -s 20M sparse; printf end >> sparse
        setcap cap_net_raw+ep /usr/bin/env 2>/dev/null || true
        echo renamed > before; mv before after; rm -f /etc/motd"#;
    let look = r#"cat /usr/share/doc/only; ls /usr/share/doc; test -e /etc/issue || echo no issue
        cd /srv; find . | sort | sed 's/0*$//'; find . -type f -print0 | sort -z | xargs -0 cat | cksum
        stat -c '%n %a %u %g %Y %F %t %T' *; stat -c '%y %h %s' file sparse; readlink link
        test "$(du sparse | cut -f1)" -lt 1000 && echo holes; test -e /etc/motd || echo no motd"#;
    let shell = async |sandbox: &sdk::Sandbox, script: &str| {
        let mut command = sdk::Command::new(["sh", "-c", script]);
        command.user = "root".into();
        let output = sandbox
            .start(command)
            .await
            .unwrap()
            .output()
            .await
            .unwrap();
        assert_eq!(
            output.exit.code(),
            0,
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    shell(sandbox, script).await;
    let before = shell(sandbox, look).await;
    assert!(before.contains("4711 4000000 12 1000000000"), "{before}");
    let (is_built, said) = promote(&mesh, id);
    assert!(is_built, "{said}");
    // It goes on as if nothing had been.
    let counted = shell(sandbox, "cat /tmp/count; sleep 0.5; cat /tmp/count").await;
    let counts: Vec<u64> = counted.lines().map(|line| line.parse().unwrap()).collect();
    assert!(counts[1] > counts[0], "{counts:?}");
    shell(sandbox, "kill -9 $(cat /tmp/pid)").await;
    assert_eq!(counter.output().await.unwrap().exit.code(), 128 + 9);

    let changed = NewSession {
        template: "changed".into(),
        ..small()
    };
    let session = mesh.client().create(changed).await.unwrap();
    let again = mesh.client().sandbox(&session).unwrap();
    assert_eq!(shell(&again, look).await, before);
    // One whose layers lie upon each other can be changed again.
    shell(&again, "rm -r /srv/deep; echo second > /srv/file").await;
    let (is_built, said) = promote(&mesh, &session.session_id);
    assert!(is_built, "{said}");
    mesh.client().stop(&session.session_id).await.unwrap();
    let (_, said) = promote(&mesh, &session.session_id);
    assert!(
        said.contains("(SESSION_STOPPED)") || said.contains("(SESSION_UNKNOWN)"),
        "{said}"
    );
    let request = GetTemplateRequest {
        template: "changed@2".into(),
        ..GetTemplateRequest::default()
    };
    let answer = mesh.client().templates().get_template(request).await;
    let template = answer.unwrap().into_inner().template.unwrap();
    assert_eq!(template.layers.len(), 3);
}

const DOCKERFILE: &str = r#"# syntax=docker/dockerfile:1
ARG base
FROM ${base} AS first
ARG who=world
ENV GREETING="hello $who" PATH=/opt/tools:$PATH
WORKDIR /srv/app
USER root
RUN echo one > file && \
    # It is not to be there in the end.
    echo removed > gone
RUN rm gone && printf '%s' "$GREETING" > greeting && echo "$PATH" > path && pwd > cwd
EXPOSE 80
FROM first
USER 4242
RUN <<EOF
set -e
id -u > /tmp/uid
(sleep 1000; echo late > /tmp/late) > /dev/null 2>&1 &
echo said by a step
EOF
CMD ["serve"]
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_dockerfile_becomes_a_template() {
    let registry = testbed::Registry::start(&tools_folder().join("bin")).unwrap();
    let trusted = format!("http://{}", registry.address());
    let mesh = Mesh::start(&["--separate", "--trusted-registries", &trusted]);
    let folder = tempfile::tempdir().unwrap();
    image(folder.path());
    registry
        .push(&folder.path().join("image"), "v1", "team/app")
        .unwrap();
    let build = |text: &str, more: &[&str]| {
        let file = folder.path().join("Dockerfile");
        fs::write(&file, text).unwrap();
        let arguments = [
            "template",
            "build",
            "-t",
            "made",
            "-f",
            file.to_str().unwrap(),
        ];
        let since = Instant::now();
        let built = mesh.run(&[&arguments, more].concat());
        let said = String::from_utf8_lossy(&built.stderr).into_owned();
        (built.status.success(), said, since.elapsed())
    };
    let base = format!("base={}/team/app:v1", registry.address());
    let password = folder.path().join("password");
    fs::write(&password, testbed::PASSWORD).unwrap();
    let common = [
        "--memory",
        "512MiB",
        "--disk",
        "512MiB",
        "--build-arg",
        &base,
    ];
    let address = registry.address().to_string();
    let login = [
        "--registry",
        &address,
        "--registry-user",
        testbed::USER,
        "--registry-password-file",
        password.to_str().unwrap(),
    ];
    let usual = [&common[..], &login[..]].concat();

    // What is wrong is told at once, with its place, or when it is come to.
    let (_, said, _) = build("FROM base\nRUNN x\n", &[]);
    assert!(said.contains("line 2, column 1"), "{said}");
    let (_, said, _) = build("FROM base\nCOPY x /\n", &[]);
    assert!(said.contains("context: is required"), "{said}");
    let (_, said, _) = build("ARG base\nFROM ${base}\n", &common);
    assert!(said.contains("(PULL_UNAUTHORIZED)"), "{said}");
    let (is_built, said, first) = build(DOCKERFILE, &usual);
    assert!(is_built, "{said}");
    let (is_built, said, again) = build(DOCKERFILE, &usual);
    assert!(is_built, "{said}");
    // template-svc dies in the middle of a step: the build goes on with that step, and whoever watches it sees it through.
    let changed = DOCKERFILE.replace("echo said", "sleep 5; echo said anew");
    let (is_built, said, last) = std::thread::scope(|scope| {
        let building = scope.spawn(|| build(&changed, &usual));
        wait_for(
            "a session of the build runs",
            Duration::from_mins(1),
            || {
                let listed = mesh.run(&["session", "list"]).stdout;
                String::from_utf8_lossy(&listed)
                    .to_lowercase()
                    .contains("running")
            },
        );
        mesh.crash("template");
        building.join().unwrap()
    });
    assert!(is_built, "{said}");
    assert!(said.contains("said anew by a step"), "{said}");
    println!("first {first:?}, again {again:?}, last step changed {last:?}");

    let (_, said, _) = build("ARG base\nFROM ${base}\nRUN echo so far; exit 3\n", &usual);
    assert!(
        said.contains("line 3: RUN echo so far; exit 3: ended with code 3 (STEP_FAILED)"),
        "{said}"
    );

    // All of them are the same; logs say what was done, and what was known.
    let mut client = mesh.client().templates();
    let mut made = Vec::new();
    for version in 1..=3 {
        let request = GetTemplateRequest {
            template: format!("made@{version}"),
            ..GetTemplateRequest::default()
        };
        let answer = client.get_template(request).await.unwrap();
        made.push(answer.into_inner().template.unwrap());
    }
    assert_eq!(made[0].rootfs, made[1].rootfs);
    assert_eq!(made[0].layers, made[1].layers);
    assert_eq!(made[0].layers.len(), 3);
    assert_eq!(made[0].env["GREETING"], "hello world");
    assert_eq!(made[0].default_user, "4242");
    let names = client.list_templates(ListTemplatesRequest::default()).await;
    let names = names.unwrap().into_inner().templates;
    assert!(names.iter().all(|template| !template.name.contains('/')));

    let look =
        "cd /srv/app; cat file greeting path cwd; ls; cat /tmp/uid; ls /tmp; id -u; cat /srv/hello";
    let expected = "one\nhello world/opt/tools:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n/srv/app\n\
                    cwd\nfile\ngreeting\npath\n4242\nuid\n4242\nfrom the second layer";
    let session = NewSession {
        template: "made@1".into(),
        ..small()
    };
    let session = mesh.client().create(session).await.unwrap();
    let sandbox = mesh.client().sandbox(&session).unwrap();
    let output = sandbox.run(["sh", "-c", look]).await.unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), expected);

    // Nothing of builds is left running, not of those that failed either.
    let left = async {
        loop {
            let mut sessions = mesh.client().sessions();
            let listed = sessions.list_sessions(ListSessionsRequest::default()).await;
            let listed = listed.unwrap().into_inner().sessions;
            if listed
                .iter()
                .all(|one| one.session_id == session.session_id)
            {
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), left)
        .await
        .unwrap();
    let work = mesh.state().join("templates/work");
    wait_for("nothing is left behind", Duration::from_secs(10), || {
        fs::read_dir(&work).unwrap().count() == 0
    });
}

const COPIES: &str = r#"
FROM base AS made
RUN mkdir -p /out/deep && echo built > /out/deep/file && chown 33:34 /out/deep/file && ln -s /out/deep/file /out/link && mkfifo /out/pipe
FROM base
RUN ln -s /var/lib /srv/lib && echo old > /srv/old
WORKDIR /srv/app
COPY . .
COPY sub/a.txt /srv/lib/copied.txt
COPY app.sh /srv/old
COPY --from=made /out /opt/out
COPY --from=0 --chown=www-data:daemon --chmod=0600 /out/link /opt/renamed
COPY --chown=4242 sub/*.txt sub/*.none /opt/texts/new/
COPY merged /
ADD archive.tar.gz /opt/archive/
COPY <<one.txt <<"two.txt" /opt/said/
hello $PATHS
one.txt
$PATH
two.txt
"#;

#[tokio::test(flavor = "multi_thread")]
async fn files_are_copied_into_templates() {
    let mesh = Mesh::start(&[]);
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir_all(at("sub/deep")).unwrap();
    for (name, text) in [
        ("sub/a.txt", "a"),
        ("sub/b.txt", "b"),
        ("sub/deep/c", "c"),
        ("app.sh", "#!/bin/sh\n"),
        ("secret", "key"),
        (".dockerignore", "secret\nDockerfile\n**/*.log\n"),
        ("sub/x.log", "left out"),
        ("sub/big", &"0123456789".repeat(200_000)),
    ] {
        fs::write(at(name), text).unwrap();
    }
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(at("app.sh"), executable).unwrap();
    std::os::unix::fs::symlink("deep/c", at("sub/link")).unwrap();
    // Of the base's, /bin is a link to a folder.
    fs::create_dir_all(at("merged/bin")).unwrap();
    fs::write(at("merged/bin/mine"), "m").unwrap();
    run(
        "tar",
        &["-czf", "archive.tar.gz", "-C", "sub", "deep"],
        folder.path(),
    );
    let build = |text: &str, more: &[&str]| {
        fs::write(at("Dockerfile"), text).unwrap();
        let arguments = [
            "template",
            "build",
            "-t",
            "copied",
            folder.path().to_str().unwrap(),
        ];
        let since = Instant::now();
        let built = mesh.run(&[&arguments, more].concat());
        let said = String::from_utf8_lossy(&built.stderr).into_owned();
        (built.status.success(), said, since.elapsed())
    };
    // A file is kept if it is what its digest says.
    let mut templates = mesh.client().templates();
    let upload = |digest: &str, data: &'static [u8]| UploadFilesRequest {
        digest: digest.into(),
        data: Bytes::from_static(data),
    };
    let digest = blake3::hash(b"two pieces").to_hex().to_string();
    for (parts, field) in [
        (vec![upload("", b"nobody's")], "digest"),
        (
            vec![upload(&digest, b"two "), upload("", b"other pieces")],
            "digest",
        ),
        (vec![upload("../../etc/passwd", b"x")], "digest"),
    ] {
        let refused = templates.upload_files(tokio_stream::iter(parts)).await;
        let refused = refused.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert!(refused.message().starts_with(field), "{refused:?}");
    }
    let ask = |digest: &str| FindMissingFilesRequest {
        digests: vec![digest.to_owned()],
    };
    let missing = templates.find_missing_files(ask(&digest)).await.unwrap();
    assert_eq!(missing.into_inner().digests, [digest.as_str()]);
    let parts = vec![upload(&digest, b"two "), upload("", b"pieces")];
    let kept = templates.upload_files(tokio_stream::iter(parts)).await;
    assert_eq!(kept.unwrap().into_inner().size_bytes, 10);
    let missing = templates.find_missing_files(ask(&digest)).await.unwrap();
    assert!(missing.into_inner().digests.is_empty());

    // What is not there is told before anything runs.
    for (text, reason) in [
        (
            "FROM base\nCOPY none /\n",
            "line 2: COPY none /: there is no \"none\" in what it copies from (COPY_SOURCE_MISSING)",
        ),
        ("FROM base\nCOPY secret /\n", "(COPY_SOURCE_MISSING)"),
        ("FROM base\nCOPY sub/x.log /\n", "(COPY_SOURCE_MISSING)"),
    ] {
        let (is_built, said, _) = build(text, &[]);
        assert!(!is_built && said.contains(reason), "{said}");
    }
    let (is_built, said, first) = build(COPIES, &[]);
    assert!(is_built, "{said}");
    let (is_built, said, again) = build(COPIES, &[]);
    assert!(
        is_built && said.contains("ADD archive.tar.gz /opt/archive/: known"),
        "{said}"
    );
    fs::write(at("sub/b.txt"), "changed").unwrap();
    let (is_built, said, changed) = build(COPIES, &[]);
    assert!(is_built, "{said}");
    assert!(
        said.contains("line 5: RUN ln -s /var/lib /srv/lib && echo old > /srv/old: known"),
        "{said}"
    );
    println!("first {first:?}, again {again:?}, a file changed {changed:?}");

    let look = "cd /srv/app; find . /srv/old /var/lib/copied.txt /opt -mindepth 0 -type f | sort | xargs stat -c '%n %u:%g %a %s'; \
                cat /opt/texts/new/b.txt; readlink sub/link; stat -c '%F' /opt/out/pipe; cat /opt/said/*; stat -c '%u' /opt/texts/new; \
                stat -c %a /opt /srv/app /srv/app/sub; readlink /bin; cat /usr/bin/mine; stat -c %u:%g /opt/out/link /opt/out/pipe";
    let session = NewSession {
        template: "copied".into(),
        ..small()
    };
    let session = mesh.client().create(session).await.unwrap();
    let sandbox = mesh.client().sandbox(&session).unwrap();
    let output = sandbox.run(["sh", "-c", look]).await.unwrap();
    let archive = fs::metadata(at("archive.tar.gz")).unwrap().len();
    let expected = format!(
        "./.dockerignore 0:0 644 27\n./app.sh 0:0 755 10\n./archive.tar.gz 0:0 644 {archive}\n./merged/bin/mine 0:0 644 1\n./sub/a.txt 0:0 644 1\n\
         ./sub/b.txt 0:0 644 7\n./sub/big 0:0 644 2000000\n./sub/deep/c 0:0 644 1\n/opt/archive/deep/c 0:0 644 1\n\
         /opt/out/deep/file 33:34 644 6\n/opt/renamed 33:1 600 6\n/opt/said/one.txt 0:0 644 7\n/opt/said/two.txt 0:0 644 6\n\
         /opt/texts/new/a.txt 4242:4242 644 1\n/opt/texts/new/b.txt 4242:4242 644 7\n/srv/old 0:0 755 10\n/var/lib/copied.txt 0:0 644 1\n\
         changeddeep/c\nfifo\nhello \n$PATH\n4242\n755\n755\n755\nusr/bin\nm0:0\n0:0\n"
    );
    assert_eq!(String::from_utf8_lossy(&output.stdout), expected);
}

const APP: &str = r#"
import greeting, http.server, os, sys, time
began = time.monotonic()
name = os.urandom(8).hex()

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        is_ready = time.monotonic() - began > 1
        self.send_response(200 if is_ready else 503)
        self.end_headers()
        self.wfile.write(f"{name}: {os.environ['GREETING']}, {greeting.of(os.getuid())} in {os.getcwd()}".encode())

    def log_message(self, *_):
        pass

print("serving as", name, flush=True)
http.server.ThreadingHTTPServer(("", 8000), Handler).serve_forever()
"#;

const STACK: &str = r#"ARG base
FROM ${base}
USER root
ENV GREETING=hello DEBIAN_FRONTEND=noninteractive
COPY greeting.deb /tmp/
RUN apt-get install -y /tmp/greeting.deb && rm /tmp/greeting.deb
WORKDIR /srv
USER 1000
COPY app.py .
CMD ["python3", "app.py"]
"#;

/// A package of a module for Python, as `apt-get` installs it.
fn package(folder: &Path) {
    let root = folder.join("package");
    let module = root.join("usr/lib/python3/dist-packages");
    fs::create_dir_all(&module).unwrap();
    fs::create_dir_all(root.join("DEBIAN")).unwrap();
    fs::write(
        module.join("greeting.py"),
        "def of(who):\n    return f'good morning {who}'\n",
    )
    .unwrap();
    let control = "Package: greeting\nVersion: 1\nArchitecture: all\nMaintainer: nobody <nobody@example.org>\nDescription: greets\n";
    fs::write(root.join("DEBIAN/control"), control).unwrap();
    let build = ["--root-owner-group", "--build", "package", "greeting.deb"];
    run("dpkg-deb", &build, folder);
    fs::remove_dir_all(&root).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_command_runs_in_every_session() {
    let registry = testbed::Registry::start(&tools_folder().join("bin")).unwrap();
    let trusted = format!("http://{}", registry.address());
    let mesh = Mesh::start(&["--trusted-registries", &trusted]);
    let images = tempfile::tempdir().unwrap();
    image(images.path());
    registry
        .push(&images.path().join("image"), "v1", "team/app")
        .unwrap();
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    package(folder.path());
    fs::write(at("app.py"), APP).unwrap();
    fs::write(at("Dockerfile"), STACK).unwrap();
    let password = images.path().join("password");
    fs::write(&password, testbed::PASSWORD).unwrap();
    let resources = small().resources.unwrap();
    let (memory, disk) = (
        resources.memory_bytes.to_string(),
        resources.disk_bytes.to_string(),
    );
    let base = format!("base={}/team/app:v1", registry.address());
    let address = registry.address().to_string();
    let common = [
        "template",
        "build",
        "-t",
        "app",
        folder.path().to_str().unwrap(),
        "--memory",
        &memory,
        "--disk",
        &disk,
        "--build-arg",
        &base,
        "--registry",
        &address,
        "--registry-user",
        testbed::USER,
        "--registry-password-file",
        password.to_str().unwrap(),
    ];
    let build = |more: &[&str]| {
        let since = Instant::now();
        let built = mesh.run(&[&common, more].concat());
        let said = String::from_utf8_lossy(&built.stderr).into_owned();
        (built.status.success(), said, since.elapsed())
    };
    let start = ["--start", "--ready-port", "8000/health"];
    let (is_built, said, first) = build(&start);
    assert!(is_built && said.contains("serving as"), "{said}");
    let name = said
        .split("serving as ")
        .nth(1)
        .unwrap()
        .lines()
        .next()
        .unwrap()
        .to_owned();

    // A session begins with it, ready, as one of a template without it begins.
    let new = |template: &str| NewSession {
        template: template.into(),
        ..small()
    };
    let created = Instant::now();
    let session = mesh.client().create(new("app")).await.unwrap();
    let host = session.host.replace("{port}", "8000");
    let answer = http::get(mesh.edge(), &host, "/", &[]).await;
    let with = created.elapsed();
    assert_eq!(
        answer.body,
        format!("{name}: hello, good morning 1000 in /srv")
    );
    let sandbox = mesh.client().sandbox(&session).unwrap();
    let processes = sandbox.process_list(false).await.unwrap();
    let ids: Vec<_> = processes
        .iter()
        .map(|process| process.process_id.as_str())
        .collect();
    assert_eq!(ids, ["start-command"]);
    mesh.client().create(new("base")).await.unwrap();
    let created = Instant::now();
    let other = mesh.client().create(new("base")).await.unwrap();
    let sandbox = mesh.client().sandbox(&other).unwrap();
    assert_eq!(sandbox.run(["true"]).await.unwrap().exit.code(), 0);
    let without = created.elapsed();

    let (is_built, said, again) = build(&start);
    assert!(is_built && said.contains("COPY app.py .: known"), "{said}");
    fs::write(at("app.py"), format!("{APP}# changed\n")).unwrap();
    let (is_built, said, changed) = build(&start);
    assert!(
        is_built
            && said.contains(
                "RUN apt-get install -y /tmp/greeting.deb && rm /tmp/greeting.deb: known"
            ),
        "{said}"
    );
    println!("built in {first:?}, again in {again:?}, with its last file changed in {changed:?}");
    println!("a session answers after {with:?}; the first command of another after {without:?}");

    // What it is made of is told.
    let told = mesh.run(&["template", "inspect", "app@1"]);
    let told = String::from_utf8_lossy(&told.stdout).into_owned();
    for part in ["app@1", "python3 app.py", "8000/health", "layers", "kernel"] {
        assert!(told.contains(part), "{told}");
    }

    // What does not become ready is no template, says why, and leaves nothing.
    fs::write(at("Dockerfile"), "FROM base\n").unwrap();
    for (more, why) in [
        (
            [
                "--start-command",
                "echo went wrong; exit 3",
                "--ready-port",
                "1",
            ],
            "it ended with code 3; the end of its output: \"went wrong\" (START_COMMAND_FAILED)",
        ),
        (
            [
                "--start-command",
                "echo nothing",
                "--ready-log",
                "something",
            ],
            "it ended without having said so",
        ),
    ] {
        let (is_built, said, _) = build(&more);
        assert!(!is_built && said.contains(why), "{said}");
    }
    let never = [
        "--start-command",
        "sleep 1000",
        "--ready-command",
        "false",
        "--ready-timeout",
        "2s",
    ];
    let (is_built, said, _) = build(&never);
    assert!(
        !is_built && said.contains("it was not ready within 2 s"),
        "{said}"
    );
    for left in fs::read_dir(mesh.state().join("node/t")).unwrap() {
        let left = left.unwrap().file_name();
        assert!(!left.to_string_lossy().starts_with('.'), "{left:?}");
    }
    let said = [
        "--start-command",
        "echo it is ready; sleep 1000",
        "--ready-log",
        "is ready",
    ];
    let (is_built, said, _) = build(&said);
    assert!(is_built, "{said}");
}

/// What a node needs to start a template lies in the object store; template-svc has nothing of it any more.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_needs_the_store_alone() {
    let store = tempfile::tempdir().unwrap();
    let folder = store.path().to_str().unwrap();
    let mesh = Mesh::start(&["--store", folder, "--nodes", "2"]);
    let drain = |node: &str, more: &[&str]| {
        let drained = mesh.run(&[&["node", "drain", node], more].concat());
        assert!(drained.status.success(), "{drained:?}");
    };
    let nodes = mesh.run(&["node", "list", "-o", "json"]).stdout;
    let nodes: serde_json::Value = serde_json::from_slice(&nodes).unwrap();
    let [first, second] = [0, 1].map(|at| nodes["nodes"][at]["nodeId"].as_str().unwrap());
    drain(second, &[]);
    let artifacts = mesh.state().join("templates/artifacts");
    for file in fs::read_dir(&artifacts).unwrap() {
        fs::remove_file(file.unwrap().path()).unwrap();
    }
    let size = walk(store.path());
    let since = Instant::now();
    let session = mesh.session().await;
    let sandbox = mesh.client().sandbox(&session).unwrap();
    let output = sandbox.run(["cat", "/etc/hostname"]).await.unwrap();
    assert_eq!(output.exit.code(), 0);
    let booted = since.elapsed();
    let log = mesh.log();
    assert_eq!(
        log.matches("artifact fetched from the store").count(),
        3,
        "{log}"
    );
    println!("the store holds {size} bytes; first command after {booted:?}");

    let told = "a template's snapshot is in the store";
    wait_for(told, Duration::from_mins(2), || mesh.log().contains(told));
    let with_snapshot = walk(store.path());
    // What a node has booted another one restores.
    drain(second, &["--undo"]);
    drain(first, &[]);
    let since = Instant::now();
    let session = mesh.session().await;
    assert_eq!(session.node_id, second);
    let sandbox = mesh.client().sandbox(&session).unwrap();
    let output = sandbox.run(["cat", "/etc/hostname"]).await.unwrap();
    assert_eq!(output.exit.code(), 0);
    let restored = since.elapsed();
    let log = mesh.log();
    assert!(
        log.contains("a template's snapshot is fetched from the store"),
        "{log}"
    );
    let fetched = log
        .lines()
        .filter(|line| line.contains("fetched from the store"));
    for line in fetched {
        println!("{line}");
    }
    println!(
        "the snapshot added {} bytes to the store; the first command on a second node after {restored:?}",
        with_snapshot - size
    );
    let told = mesh.run(&["template", "inspect", "base"]);
    let told = String::from_utf8_lossy(&told.stdout).into_owned();
    let vmm = nodes["nodes"][0]["vmmVersion"].as_str().unwrap();
    assert!(told.contains("SNAPSHOT") && told.contains(vmm), "{told}");

    // A node whose store has lost a part says so, and of which template.
    let chunks = store.path().join("chunks");
    fs::remove_dir_all(&chunks).unwrap();
    for node in ["node", "node-2"] {
        let other = mesh.state().join(node).join("artifacts");
        for file in fs::read_dir(&other).unwrap() {
            fs::remove_file(file.unwrap().path()).unwrap();
        }
    }
    let failed = mesh.client().create(small()).await.unwrap_err();
    assert!(
        failed.to_string().contains("ARTIFACT_UNAVAILABLE")
            || failed.to_string().contains("no such artifact"),
        "{failed}"
    );
}

fn walk(folder: &Path) -> u64 {
    let mut size = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let metadata = entry.metadata().unwrap();
        size += if metadata.is_dir() {
            walk(&entry.path())
        } else {
            metadata.len()
        };
    }
    size
}
