//! Builds outlive what they run on.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use e2e::{Dice, Mesh, builds, how_many};
use nix::sys::signal::Signal;
use proto::template::v1::{
    BuildSource, BuildState, BuildTemplateRequest, CancelBuildRequest, GetBuildRequest,
    GetTemplateRequest, StreamBuildLogsRequest, build_source::Source,
};

const BUILDS: u64 = 2;
const KILLS: u64 = 3;
/// Builds that are asked for at once; a team has two running.
const AT_ONCE: usize = 4;
/// Between two kills, at most.
const PAUSE_MILLIS: usize = 8000;
/// A build that is killed at may need another lease, and its steps anew.
const BUILD_LIMIT: Duration = Duration::from_mins(10);
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Whatever is made has the time 0, so that it is the same whenever it is made.
const DOCKERFILE: &str = r"FROM base
WORKDIR /srv/app
COPY files files
RUN echo NUMBER > number; seq 1 20000 | sort -r > numbers; touch -d @0 /srv/app /srv/app/*
RUN sleep 2; cat numbers files/deep/text > all; rm numbers; touch -d @0 /srv/app /srv/app/*
COPY files/top /srv/app/top
RUN mkdir -p /srv/app/many; cd /srv/app/many; for i in $(seq 1 100); do echo $i > $i; done; sleep 2; touch -d @0 /srv/app /srv/app/* /srv/app/many/* /srv
RUN ln -s many /srv/app/link; touch -h -d @0 /srv/app/link; touch -d @0 /srv/app /srv
";

fn context(folder: &Path, number: u64) {
    fs::create_dir_all(folder.join("files/deep")).unwrap();
    fs::write(folder.join("files/top"), "top").unwrap();
    let text = format!("text of {number}\n").repeat(1000);
    fs::write(folder.join("files/deep/text"), text).unwrap();
    let dockerfile = DOCKERFILE.replace("NUMBER", &number.to_string());
    fs::write(folder.join("Dockerfile"), dockerfile).unwrap();
    // COPY keeps the times of a context.
    for name in ["files/deep/text", "files/top", "files/deep", "files"] {
        let file = fs::File::open(folder.join(name)).unwrap();
        file.set_modified(std::time::UNIX_EPOCH).unwrap();
    }
}

/// Builds, to its end; what was said.
fn build(mesh: &Mesh, name: &str, folder: &Path, more: &[&str]) -> (bool, String) {
    let folder = folder.to_str().unwrap();
    let arguments = [
        "template", "build", "-t", name, "--memory", "192MiB", "--disk", "256MiB", folder,
    ];
    let built = mesh.run(&[&arguments, more].concat());
    let said = String::from_utf8_lossy(&built.stderr).into_owned();
    (built.status.success(), said)
}

async fn root(mesh: &Mesh, name: &str) -> String {
    let request = GetTemplateRequest {
        template: name.into(),
        ..GetTemplateRequest::default()
    };
    let answer = mesh.client().templates().get_template(request).await;
    let template = answer.unwrap().into_inner().template.unwrap();
    template.rootfs.unwrap().digest
}

/// Kills one of the three things a build runs on, in turn; whether there was one.
async fn kill(mesh: &Mesh, dice: &mut Dice, kind: u64) -> Option<String> {
    match kind % 3 {
        0 => {
            let sessions = builds::sessions(mesh).await;
            if sessions.is_empty() {
                return None;
            }
            let session = &sessions[dice.below(sessions.len())];
            // It may just have ended.
            let vmm = mesh.find_vmm(session)?;
            nix::sys::signal::kill(vmm, Signal::SIGKILL).ok()?;
            Some(format!("the VMM of {}", session.session_id))
        }
        1 => {
            mesh.crash("template");
            Some("template-svc".into())
        }
        _ => {
            mesh.crash("node");
            Some("node-svc".into())
        }
    }
}

/// `SANDMESH_E2E_BUILDS` builds, each also from scratch; meanwhile `SANDMESH_E2E_KILLS` kills at random moments, as
/// `SANDMESH_E2E_SEED` has them.
#[tokio::test(flavor = "multi_thread")]
async fn builds_outlive_what_they_run_on() {
    let count = how_many("SANDMESH_E2E_BUILDS", BUILDS);
    let kills = how_many("SANDMESH_E2E_KILLS", KILLS);
    // More builds take longer, and the kills are to meet most of them.
    let pause = PAUSE_MILLIS * usize::try_from(count.div_ceil(AT_ONCE as u64)).unwrap();
    let mut dice = Dice::of("SANDMESH_E2E_SEED");
    let mesh = Mesh::start(&["--separate"]);
    let folder = tempfile::tempdir().unwrap();
    let folders: Vec<_> = (0..count)
        .map(|number| folder.path().join(number.to_string()))
        .collect();
    for (number, folder) in (0..).zip(&folders) {
        context(folder, number);
    }
    let since = Instant::now();
    let mut lost = 0;
    std::thread::scope(|scope| {
        // Each of so many asks for its share, one build after the other.
        let building: Vec<_> = (0..AT_ONCE.min(folders.len()))
            .map(|first| {
                let (mesh, folders) = (&mesh, &folders);
                scope.spawn(move || {
                    let mut all = String::new();
                    for (number, folder) in folders.iter().enumerate().skip(first).step_by(AT_ONCE)
                    {
                        let since = Instant::now();
                        let (is_built, said) = build(mesh, &format!("b{number}"), folder, &[]);
                        assert!(is_built, "b{number}: {said}");
                        assert!(since.elapsed() < BUILD_LIMIT, "b{number}: {said}");
                        println!("b{number} took {:.1?}", since.elapsed());
                        all += &said;
                    }
                    all
                })
            })
            .collect();
        let is_over = || {
            building
                .iter()
                .all(std::thread::ScopedJoinHandle::is_finished)
        };
        let runtime = tokio::runtime::Handle::current();
        let (mut done, mut kind) = (0, 0);
        while done < kills && !is_over() {
            let pause = Duration::from_millis(dice.below(pause) as u64);
            let until = Instant::now() + pause;
            while Instant::now() < until && !is_over() {
                std::thread::sleep(LOOK_AGAIN);
            }
            let killed =
                tokio::task::block_in_place(|| runtime.block_on(kill(&mesh, &mut dice, kind)));
            kind += 1;
            if let Some(killed) = killed {
                println!("{:.1?}: killed {killed}", since.elapsed());
                done += 1;
            }
        }
        println!("{done} of {kills} kills while builds ran");
        assert!(kills == 0 || done > 0);
        for one in building {
            lost += one.join().unwrap().matches("the session was lost").count();
        }
    });
    println!(
        "{count} builds in {:.1?}, {lost} sessions lost",
        since.elapsed()
    );
    builds::leave_nothing(&mesh).await;
    for (number, folder) in folders.iter().enumerate() {
        let (is_built, said) = build(&mesh, &format!("anew{number}"), folder, &["--no-cache"]);
        assert!(is_built, "anew{number}: {said}");
        assert!(!said.contains(": known"), "{said}");
        let [first, anew] = [
            root(&mesh, &format!("b{number}")).await,
            root(&mesh, &format!("anew{number}")).await,
        ];
        assert_eq!(first, anew, "b{number} is not what it is from scratch");
    }
    // What was made from scratch is remembered.
    if let Some(folder) = folders.first() {
        let (is_built, said) = build(&mesh, "again", folder, &[]);
        assert!(is_built && said.contains(": known"), "{said}");
        assert!(!said.contains(": done in"), "{said}");
    }
    builds::leave_nothing(&mesh).await;
}

/// Of a step that ends its own guest the build says so; it is not tried for ever.
#[tokio::test(flavor = "multi_thread")]
async fn a_step_that_ends_its_guest_fails_its_build() {
    let mesh = Mesh::start(&[]);
    let folder = tempfile::tempdir().unwrap();
    let dockerfile =
        "FROM base\nRUN echo kept > /kept\nRUN cat /kept; echo c > /proc/sysrq-trigger; sleep 60\n";
    fs::write(folder.path().join("Dockerfile"), dockerfile).unwrap();
    let (is_built, said) = build(&mesh, "crashes", folder.path(), &[]);
    assert!(!is_built);
    assert!(said.contains("(STEP_CRASHED_GUEST)"), "{said}");
    assert!(said.contains("the guest's kernel panicked"), "{said}");
    assert_eq!(said.matches("the session was lost").count(), 2, "{said}");
    // The step before it was done once.
    assert_eq!(said.matches("line 2: done in").count(), 1, "{said}");
    builds::leave_nothing(&mesh).await;
}

/// A build that finds no room waits for it, can be cancelled meanwhile, and goes on when there is some.
#[tokio::test(flavor = "multi_thread")]
async fn a_build_waits_for_room() {
    let mesh = Mesh::start(&["--max-sessions", "2"]);
    let taken = [mesh.session().await, mesh.session().await];
    let mut templates = mesh.client().templates();
    let mut waiting = Vec::new();
    for name in ["cancelled", "made"] {
        let source = Source::Dockerfile("FROM base\nRUN echo made > /made\n".into());
        let request = BuildTemplateRequest {
            name: name.into(),
            source: Some(BuildSource {
                source: Some(source),
            }),
            default_memory_bytes: 128 << 20,
            default_disk_bytes: 256 << 20,
            ..BuildTemplateRequest::default()
        };
        let build = templates.build_template(request).await.unwrap();
        let build_id = build.into_inner().build.unwrap().build_id;
        let request = StreamBuildLogsRequest {
            build_id: build_id.clone(),
            after_number: 0,
        };
        let mut log = templates
            .stream_build_logs(request)
            .await
            .unwrap()
            .into_inner();
        let waits = async {
            while let Some(line) = log.message().await.unwrap() {
                if line.message.starts_with("waits for room: no node has room") {
                    return;
                }
            }
            panic!("it ended without room");
        };
        tokio::time::timeout(BUILD_LIMIT, waits).await.unwrap();
        waiting.push(build_id);
    }
    let [cancelled, made] = &waiting[..] else {
        panic!()
    };
    let request = CancelBuildRequest {
        build_id: cancelled.clone(),
    };
    templates.cancel_build(request).await.unwrap();
    for session in &taken {
        mesh.client().stop(&session.session_id).await.unwrap();
    }
    for (build_id, expected) in [
        (cancelled, BuildState::Cancelled),
        (made, BuildState::Succeeded),
    ] {
        let end = Instant::now() + BUILD_LIMIT;
        loop {
            let request = GetBuildRequest {
                build_id: build_id.clone(),
            };
            let build = templates.get_build(request).await.unwrap().into_inner();
            let build = build.build.unwrap();
            if build.end_time.is_some() {
                assert_eq!(build.state(), expected, "{}", build.error_message);
                break;
            }
            assert!(Instant::now() < end, "{build:?}");
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }
    builds::leave_nothing(&mesh).await;
}
