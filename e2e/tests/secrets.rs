//! What a step of a Dockerfile is lent comes to be in no layer, no log and no row.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    fs,
    io::Read as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use e2e::{Mesh, sandmesh, small, wait_for};
use proto::{
    session::v1::ListSessionsRequest,
    template::v1::{
        BuildSecret, BuildSource, BuildTemplateRequest, CancelBuildRequest, GetTemplateRequest,
        build_source::Source,
    },
};
use sdk::{NewSession, Sandbox};
use sha2::{Digest as _, Sha256};

/// The first step waits until it was looked at. `COPIED` proves that what is looked for can be found.
const LENT: &str = r#"FROM base
RUN --mount=type=secret,id=token,required=true cd /run/secrets && stat -c '%F %a %u:%g %n' * >/srv/looks && sha256sum <token >/srv/sums && echo COPIED >>/srv/sums && for i in $(seq 900); do test -e /tmp/go && break; sleep 0.1; done
RUN test ! -e /run/secrets && test -z "$(find /run -name 'sandmesh-secrets*')" && stat -c '%Y %a' /root >/srv/root
RUN --mount=type=secret,id=token,target=/root/.config/x/token --mount=type=secret,id=word,target=.word sha256sum </root/.config/x/token >>/srv/sums && test "$(stat -L -c %a /root/.config/x/token)" = 400 && test -s /.word
RUN test ! -e /root/.config && test ! -L /.word && stat -c '%Y %a' /root | cmp - /srv/root
RUN --mount=type=secret,id=token,dst=/root/.config/x/token cp /root/.config/x/token /root/.config/x/new && mv /root/.config/x/new /root/.config/x/token && touch /root/.config/mine
RUN test ! -e /root/.config/x && test -e /root/.config/mine
RUN --mount=type=secret,id=word,env=WORD printf %s "$WORD" | sha256sum >>/srv/sums && test ! -e /run/secrets
RUN --mount=type=secret,id=none test ! -e /run/secrets && test -z "$WORD"
USER 4242
RUN --mount=type=secret,id=token,target=/tmp/own,uid=4242,gid=33,mode=0440 --mount=type=secret,id=word,mode=0400 sha256sum </tmp/own >/tmp/sum && test "$(stat -L -c '%a %u:%g' /tmp/own)" = '440 4242:33' && ! cat /run/secrets/word
RUN test ! -L /tmp/own
"#;

/// Something that is in no other place.
fn random() -> String {
    let mut bytes = [0; 32];
    fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .unwrap();
    hex::encode(bytes)
}

fn sum(value: &str) -> String {
    format!("{}  -\n", hex::encode(Sha256::digest(value)))
}

/// Files of a folder with that text in them.
fn files_with(text: &str, folder: &Path) -> String {
    let found = Command::new("grep")
        .args(["-rlF", "-D", "skip", "-e", text])
        .arg(folder)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    String::from_utf8(found.stdout).unwrap()
}

fn files_of(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            files.extend(files_of(&entry.path()));
        } else if kind.is_file() {
            files.push(entry.path());
        }
    }
    files
}

/// Unpacks what zstd has packed, layers and parts of roots, into another folder.
fn unpack_all(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for (number, file) in files_of(from).into_iter().enumerate() {
        let mut magic = [0; 4];
        let begun = fs::File::open(&file).and_then(|mut file| file.read_exact(&mut magic));
        if begun.is_err() || magic != [0x28, 0xb5, 0x2f, 0xfd] {
            continue;
        }
        let unpacked = Command::new("zstd")
            .args(["-dq", "-o"])
            .arg(to.join(number.to_string()))
            .arg(&file)
            .stdin(Stdio::null())
            .status()
            .unwrap();
        // One that went meanwhile, or got another name, is not what is left.
        assert!(unpacked.success() || !file.exists(), "{}", file.display());
    }
}

struct Building<'a> {
    mesh: &'a Mesh,
    folder: &'a Path,
}

impl Building<'_> {
    /// Builds, with a file `token` and a variable `WORD`; whether it is built, and what is said.
    fn build(&self, text: &str, token: &str, word: &str, secrets: &[&str]) -> (bool, String) {
        let file = self.folder.join("Dockerfile");
        fs::write(&file, text).unwrap();
        let path = self.folder.join("token");
        fs::write(&path, token).unwrap();
        let mut command = self.mesh.command(sandmesh());
        command
            .args(["template", "build", "-t", "made", "-f"])
            .arg(&file);
        for secret in secrets {
            command.args(["--secret", secret]);
        }
        let built = command
            .current_dir(self.folder)
            .env("WORD", word)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&built.stderr).into_owned();
        (built.status.success(), said)
    }

    /// The inside of the one session there is, once its step has that file.
    async fn sandbox(&self, path: &str) -> Sandbox {
        let look = async {
            loop {
                let mut sessions = self.mesh.client().sessions();
                let listed = sessions.list_sessions(ListSessionsRequest::default());
                let listed = listed.await.unwrap().into_inner().sessions;
                if let Some(session) = listed.first() {
                    let session = self.mesh.client().get(&session.session_id).await.unwrap();
                    let sandbox = self.mesh.client().sandbox(&session);
                    if let Ok(sandbox) = sandbox
                        && sandbox.stat(path).await.is_ok()
                    {
                        return sandbox;
                    }
                }
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        };
        tokio::time::timeout(Duration::from_mins(2), look)
            .await
            .expect("a step has its secret")
    }
}

const SECRETS: [&str; 2] = ["id=token,src=token", "id=word,env=WORD"];

#[tokio::test(flavor = "multi_thread")]
async fn secrets_reach_a_step_and_no_layer() {
    let mesh = Mesh::start(&["--separate"]);
    let folder = tempfile::tempdir().unwrap();
    let building = Building {
        mesh: &mesh,
        folder: folder.path(),
    };
    let (token, word) = (random(), random());
    let values = [token.as_str(), word.as_str()];

    // While a step has them, nobody else does.
    let (is_built, said) = tokio::task::block_in_place(|| {
        std::thread::scope(|scope| {
            let built = scope.spawn(|| building.build(LENT, &token, &word, &SECRETS));
            let look = async {
                let sandbox = building.sandbox("/srv/sums").await;
                let dump = mesh.postgres("pg_dumpall", &[]);
                for value in values {
                    assert!(!dump.contains(value));
                    assert!(!dump.contains(&hex::encode(value)));
                }
                let processes = procfs::process::all_processes().unwrap().flatten();
                let arguments = processes.filter_map(|process| process.cmdline().ok());
                let arguments: Vec<String> = arguments.flatten().collect();
                for value in values {
                    assert!(!arguments.iter().any(|argument| argument.contains(value)));
                }
                let go = sandbox.run(["touch", "/tmp/go"]).await.unwrap();
                assert_eq!(go.exit.code(), 0);
            };
            tokio::runtime::Handle::current().block_on(look);
            built.join().unwrap()
        })
    });
    assert!(is_built, "{said}");
    assert!(
        said.contains("the secret \"none\" was not given; the step does without"),
        "{said}"
    );

    // Another value is no other step.
    let (other, another) = (random(), random());
    let (is_built, again) = building.build(LENT, &other, &another, &SECRETS);
    assert!(is_built, "{again}");
    assert_eq!(again.matches(": known").count(), 10, "{again}");

    // What was lent was what was given, and where it was asked for.
    let session = NewSession {
        template: "made".into(),
        ..small()
    };
    let session = mesh.client().create(session).await.unwrap();
    let sandbox = mesh.client().sandbox(&session).unwrap();
    let look = "cat /srv/looks /srv/sums /tmp/sum; find /root /run /.word /tmp/own -name '*token*' -o -name '*.word' -o -name own -o -name '*secret*'";
    let output = sandbox.run(["sh", "-c", look]).await.unwrap();
    let (of_token, of_word) = (sum(&token), sum(&word));
    let expected =
        format!("regular file 400 0:0 token\n{of_token}COPIED\n{of_token}{of_word}{of_token}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), expected);

    // A step may do without what it does not require, and is told what it cannot have.
    for (step, secrets, expected) in [
        (
            "--mount=type=secret,id=key,required true",
            &SECRETS[..],
            "line 2: RUN --mount=type=secret,id=key,required true: the secret \"key\", which it requires, was not given (SECRET_MISSING)",
        ),
        (
            "--mount=type=secret,id=token,target=/etc/passwd true",
            &SECRETS[..],
            "cannot be put at /etc/passwd: there is something of that name (STEP_FAILED)",
        ),
        (
            "--mount=type=secret,id=token,target=/etc/passwd/x true",
            &SECRETS[..],
            "(STEP_FAILED)",
        ),
        (
            "--mount=type=secret,id=Dockerfile,env=TEXT test -z \"$TEXT\"",
            &["id=Dockerfile"],
            "ended with code 1 (STEP_FAILED)",
        ),
        ("--mount=type=ssh true", &[], "line 2, column 5"),
    ] {
        let text = format!("FROM base\nRUN {step}\n");
        let (is_built, said) = building.build(&text, &token, &word, secrets);
        assert!(!is_built && said.contains(expected), "{said}");
    }

    // The same request twice is one build, whatever it lends the second time.
    let request = |value: &str| BuildTemplateRequest {
        name: "twice".into(),
        source: Some(BuildSource {
            source: Some(Source::Dockerfile(
                "FROM base\nRUN --mount=type=secret,id=a true\n".into(),
            )),
        }),
        request_id: "the same".into(),
        secrets: vec![BuildSecret {
            id: "a".into(),
            value: value.into(),
        }],
        ..BuildTemplateRequest::default()
    };
    let mut templates = mesh.client().templates();
    let mut ids = Vec::new();
    for value in [&token, &other] {
        let asked = templates.build_template(request(value)).await.unwrap();
        ids.push(asked.into_inner().build.unwrap().build_id);
    }
    assert_eq!(ids[0], ids[1]);
    let request = CancelBuildRequest {
        build_id: ids.remove(0),
    };
    templates.cancel_build(request).await.unwrap();

    // Nothing of them is left, packed or not: in layers, roots, logs, rows, and what Postgres keeps of rows that were.
    let work = mesh.state().join("templates/work");
    wait_for("builds have ended", Duration::from_mins(1), || {
        fs::read_dir(&work).unwrap().count() == 0
    });
    mesh.client().stop(&session.session_id).await.unwrap();
    let request = GetTemplateRequest {
        template: "made@1".into(),
        ..GetTemplateRequest::default()
    };
    let made = templates.get_template(request).await.unwrap().into_inner();
    let root = made.template.unwrap().rootfs.unwrap().digest;
    let root = mesh.state().join("templates/artifacts").join(root);
    let unpacked = folder.path().join("root");
    let extracted = Command::new("fsck.erofs")
        .arg(format!("--extract={}", unpacked.display()))
        .arg(root)
        .output()
        .unwrap();
    assert!(extracted.status.success(), "{extracted:?}");
    assert!(files_with("COPIED", &unpacked.join("srv")).contains("srv/sums"));
    for value in [&token, &word, &other, &another] {
        assert_eq!(files_with(value, &unpacked), "");
        // Disks of sessions that were go a moment after them.
        wait_for("nothing is left", Duration::from_mins(1), || {
            files_with(value, mesh.state()).is_empty()
        });
        let bytes = hex::encode(value);
        assert_eq!(files_with(&bytes, mesh.state()), "");
        assert!(!said.contains(value.as_str()) && !again.contains(value.as_str()));
        assert!(!mesh.postgres("pg_dumpall", &[]).contains(&bytes));
    }
    let packed = folder.path().join("packed");
    unpack_all(mesh.state(), &packed);
    assert_ne!(files_with("COPIED", &packed), "");
    for value in [&token, &word, &other, &another] {
        assert_eq!(files_with(value, &packed), "");
    }
}
