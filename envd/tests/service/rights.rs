//! Rights to files: those of the acting user, whichever way a path goes.

use std::{
    fs,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _, chown, symlink},
};

use futures::{StreamExt as _, stream};
use nix::{
    sys::stat::{Mode, SFlag, makedev, mknod},
    unistd::mkfifo,
};
use proto::envd::v1::{
    FileType, FilesystemServiceListRequest, ReadRequest, StatRequest, WriteHeader,
};
use tonic::Code;

use crate::{
    files::{chmod, drafts, header, names, of, reading},
    world::{ADA, NOBODY, TEAM, World, soon, until, why},
};

fn denied() -> (Code, String) {
    (Code::PermissionDenied, "PATH_PERMISSION_DENIED".into())
}

// Modes and owners

#[tokio::test]
async fn a_new_file_is_the_acting_users_with_the_mode_asked_for() {
    let world = World::new().await;
    let path = world.text("open/file");
    for (user, uid) in [("ada", ADA), ("nobody", NOBODY), ("root", 0)] {
        let entry = world.write(of(user, &path), b"").await.unwrap();
        assert_eq!(
            (entry.uid, entry.gid, entry.mode),
            (uid, uid, 0o644),
            "{user}"
        );
        fs::remove_file(&path).unwrap();
    }
    for mode in [0, 0o600, 0o755, 0o4755, 0o1777] {
        let asked = WriteHeader {
            mode: Some(mode),
            ..of("ada", &path)
        };
        assert_eq!(world.write(asked, b"").await.unwrap().mode, mode);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, mode);
        fs::remove_file(&path).unwrap();
    }
}

#[tokio::test]
async fn a_file_there_is_keeps_its_mode_and_owner() {
    let world = World::new().await;
    let path = world.path("ada/file");
    fs::write(&path, b"old").unwrap();
    chown(&path, Some(ADA), Some(TEAM)).unwrap();
    chmod(&path, 0o751);
    let entry = world.write(header("~ada/file"), b"new").await.unwrap();
    assert_eq!((entry.uid, entry.gid, entry.mode), (ADA, TEAM, 0o751));
    let entry = world.write(of("ada", "file"), b"newer").await.unwrap();
    assert_eq!((entry.uid, entry.gid, entry.mode), (ADA, TEAM, 0o751));
    assert_eq!(fs::read(&path).unwrap(), b"newer");
}

#[tokio::test]
async fn missing_parents_are_made_if_asked_and_are_the_users() {
    let world = World::new().await;
    let path = "deep/er/file";
    let status = world.write(of("ada", path), b"").await.unwrap_err();
    assert_eq!(why(&status), (Code::NotFound, "PATH_NOT_FOUND".into()));
    assert!(
        status.message().contains("deep/er/file"),
        "{}",
        status.message()
    );
    assert_eq!(names(world.path("ada")), [""; 0]);
    let asked = WriteHeader {
        make_parents: true,
        ..of("ada", path)
    };
    world.write(asked, b"hello").await.unwrap();
    for made in ["ada/deep", "ada/deep/er", "ada/deep/er/file"] {
        assert_eq!(fs::metadata(world.path(made)).unwrap().uid(), ADA);
    }
}

#[tokio::test]
async fn a_directory_is_made_with_its_parents_and_one_there_is_left_as_it_is() {
    let world = World::new().await;
    let entry = world.make("ada", "a/b/c", Some(0o700)).await.unwrap();
    assert_eq!(
        (entry.r#type(), entry.uid, entry.mode),
        (FileType::Directory, ADA, 0o700)
    );
    assert_eq!(world.make("ada", "d", None).await.unwrap().mode, 0o755);
    // Like /tmp: everybody may say that it should be there, nobody changes it by that.
    let open = world.text("open");
    chmod(&open, 0o1777);
    for user in ["root", "ada"] {
        assert_eq!(world.make(user, &open, None).await.unwrap().mode, 0o1777);
    }
    fs::write(world.path("ada/file"), b"").unwrap();
    let status = world.make("ada", "file", None).await.unwrap_err();
    assert_eq!(why(&status), (Code::AlreadyExists, "PATH_EXISTS".into()));
    let status = world.make("ada", "file/below", None).await.unwrap_err();
    assert_eq!(
        why(&status),
        (Code::FailedPrecondition, "PATH_NOT_A_DIRECTORY".into())
    );
}

// The acting user

#[tokio::test]
async fn what_a_user_may_not_the_call_may_not() {
    let world = World::new().await;
    chmod(world.path("root"), 0o755);
    let secret = world.text("root/secret");
    fs::write(&secret, b"secret").unwrap();
    chmod(&secret, 0o600);
    fs::create_dir(world.path("root/closed")).unwrap();
    chmod(world.path("root/closed"), 0o700);
    let hidden = world.text("root/closed/hidden");
    fs::write(&hidden, b"").unwrap();
    let user = || "nobody".to_owned();
    let new = world.text("root/new");
    let outcomes = [
        (
            "/etc/shadow",
            world
                .read(ReadRequest {
                    user: user(),
                    ..reading("/etc/shadow")
                })
                .await
                .err(),
        ),
        (
            &secret,
            world
                .read(ReadRequest {
                    user: user(),
                    ..reading(&secret)
                })
                .await
                .err(),
        ),
        (
            &hidden,
            world
                .stat(StatRequest {
                    path: hidden.clone(),
                    user: user(),
                    ..Default::default()
                })
                .await
                .err(),
        ),
        (&new, world.write(of("nobody", &new), b"").await.err()),
        (&secret, world.write(of("nobody", &secret), b"").await.err()),
        (&new, world.make("nobody", &new, None).await.err()),
        (&secret, world.remove("nobody", &secret, false).await.err()),
        (&hidden, world.remove("nobody", &hidden, true).await.err()),
        (
            &secret,
            world
                .rename("nobody", &secret, &world.text("open/stolen"), false)
                .await
                .err(),
        ),
    ];
    for (path, status) in outcomes {
        let status = status.unwrap_or_else(|| panic!("{path} was not refused"));
        assert_eq!(why(&status), denied(), "{path}: {status:?}");
        assert!(status.message().contains(path), "{status:?}");
    }
    let list = FilesystemServiceListRequest {
        path: world.text("root/closed"),
        user: user(),
        ..Default::default()
    };
    let status = soon(world.files().list(list)).await.unwrap_err();
    assert_eq!(why(&status), denied());
    assert_eq!(names(world.path("root")), ["closed", "secret"]);
    assert_eq!(fs::read(&secret).unwrap(), b"secret");
    let status = world
        .read(ReadRequest {
            user: "no-such".into(),
            ..reading("/etc/passwd")
        })
        .await
        .unwrap_err();
    assert_eq!(why(&status), (Code::NotFound, "USER_UNKNOWN".into()));
}

#[tokio::test]
async fn a_file_the_user_may_not_write_is_not_replaced_by_writing_beside_it() {
    let world = World::new().await;
    let path = world.path("ada/roots");
    fs::write(&path, b"root's").unwrap();
    chmod(&path, 0o644);
    let status = world.write(of("ada", "roots"), b"ada's").await.unwrap_err();
    assert_eq!(why(&status), denied());
    assert_eq!(
        (fs::read(&path).unwrap(), fs::metadata(&path).unwrap().uid()),
        (b"root's".to_vec(), 0)
    );
    assert_eq!(names(world.path("ada")), ["roots"]);
}

#[tokio::test]
async fn a_users_other_groups_count_and_envds_do_not() {
    let world = World::new().await;
    let path = world.text("open/teams");
    fs::write(&path, b"for the team").unwrap();
    chown(&path, Some(0), Some(TEAM)).unwrap();
    chmod(&path, 0o640);
    let read = async |user: &str| {
        let request = ReadRequest {
            user: user.into(),
            ..reading(&path)
        };
        world.read(request).await
    };
    assert_eq!(read("ada").await.unwrap().1, b"for the team");
    // envd has the group itself.
    assert_eq!(why(&read("nobody").await.unwrap_err()), denied());
}

#[tokio::test]
async fn users_at_once_do_not_get_each_others_rights() {
    let world = World::new().await;
    let path = world.text("open/secret");
    fs::write(&path, b"secret").unwrap();
    chmod(&path, 0o600);
    let attempts = stream::iter(0..600).map(|number| {
        let user = ["root", "nobody", "ada"][number % 3];
        let request = ReadRequest {
            user: user.into(),
            ..reading(&path)
        };
        let world = &world;
        async move { (user, world.read(request).await.is_ok()) }
    });
    let outcomes: Vec<_> = attempts.buffer_unordered(32).collect().await;
    assert!(
        outcomes
            .into_iter()
            .all(|(user, read)| read == (user == "root"))
    );
}

// Links

#[tokio::test]
async fn a_link_takes_nobody_where_they_may_not_go() {
    let world = World::new().await;
    chmod(world.path("root"), 0o755);
    let target = world.path("root/file");
    fs::write(&target, b"root's").unwrap();
    chmod(&target, 0o600);
    symlink(&target, world.path("ada/file")).unwrap();
    symlink(world.path("root/new"), world.path("ada/new")).unwrap();
    symlink(world.path("root"), world.path("ada/folder")).unwrap();
    for path in ["file", "new", "folder/file", "folder/new"] {
        let status = world.write(of("ada", path), b"ada's").await.unwrap_err();
        assert_eq!(why(&status), denied(), "{path}");
    }
    for path in ["file", "folder/file"] {
        let request = ReadRequest {
            user: "ada".into(),
            ..reading(path)
        };
        assert_eq!(why(&world.read(request).await.unwrap_err()), denied());
    }
    assert_eq!(names(world.path("root")), ["file"]);
    assert_eq!(fs::read(&target).unwrap(), b"root's");
    assert_eq!(names(world.path("ada")), ["file", "folder", "new"]);
}

#[tokio::test]
async fn a_folder_swapped_for_a_link_in_the_middle_of_a_write_gains_nothing() {
    let world = World::new().await;
    chmod(world.path("root"), 0o755);
    let (folder, moved) = (world.path("ada/folder"), world.path("ada/moved"));
    fs::create_dir(&folder).unwrap();
    chown(&folder, Some(ADA), Some(ADA)).unwrap();
    for cut in [false, true] {
        let path = folder.join("file");
        let begun = world
            .begin(of("ada", path.to_str().unwrap()), b"ada's")
            .await;
        let draft = drafts(&folder).remove(0);
        let name = draft.file_name().unwrap();
        fs::rename(&folder, &moved).unwrap();
        symlink(world.path("root"), &folder).unwrap();
        // What has the same name where the link leads is not the write's to remove.
        let bystander = world.path("root").join(name);
        fs::write(&bystander, b"root's").unwrap();
        if cut {
            begun.call.abort();
            let _ = begun.call.await;
        } else {
            drop(begun.parts);
            // Done in the folder it began in, or refused: both are right.
            let _ = soon(begun.call).await.unwrap();
        }
        until(|| drafts(&moved).is_empty()).await;
        assert_eq!(fs::read(&bystander).unwrap(), b"root's");
        fs::remove_file(&bystander).unwrap();
        assert_eq!(names(world.path("root")), [""; 0]);
        fs::remove_file(&folder).unwrap();
        fs::rename(&moved, &folder).unwrap();
    }
}

#[tokio::test]
async fn writing_to_a_link_writes_to_what_it_points_at() {
    let world = World::new().await;
    fs::create_dir(world.path("ada/there")).unwrap();
    chown(world.path("ada/there"), Some(ADA), Some(ADA)).unwrap();
    // Through one link, through two, and before there is anything.
    symlink("there/file", world.path("ada/link")).unwrap();
    symlink("link", world.path("ada/links")).unwrap();
    for (path, text) in [("links", "one"), ("link", "two"), ("links", "three")] {
        world.write(of("ada", path), text.as_bytes()).await.unwrap();
        assert_eq!(
            fs::read(world.path("ada/there/file")).unwrap(),
            text.as_bytes()
        );
    }
    assert!(world.path("ada/link").is_symlink() && world.path("ada/links").is_symlink());
    symlink("round", world.path("ada/round")).unwrap();
    let status = world.write(of("ada", "round"), b"").await.unwrap_err();
    assert_eq!(
        why(&status),
        (Code::FailedPrecondition, "PATH_LINK_LOOP".into())
    );
    assert_eq!(
        names(world.path("ada")),
        ["link", "links", "round", "there"]
    );
}

#[tokio::test]
async fn what_is_no_regular_file_is_neither_read_nor_replaced() {
    let world = World::new().await;
    let (fifo, null) = (world.text("open/fifo"), world.text("open/null"));
    mkfifo(fifo.as_str(), Mode::from_bits_truncate(0o666)).unwrap();
    mknod(
        null.as_str(),
        SFlag::S_IFCHR,
        Mode::from_bits_truncate(0o666),
        makedev(1, 3),
    )
    .unwrap();
    symlink(&null, world.path("open/link")).unwrap();
    for path in [fifo, null.clone(), world.text("open/link")] {
        for status in [
            world.write(header(&path), b"hello").await.unwrap_err(),
            world.read(reading(&path)).await.unwrap_err(),
        ] {
            assert_eq!(
                why(&status),
                (Code::FailedPrecondition, "PATH_NOT_A_FILE".into()),
                "{path}"
            );
        }
    }
    assert!(fs::metadata(&null).unwrap().file_type().is_char_device());
    let folder = world.text("open");
    for status in [
        world.write(header(&folder), b"").await.unwrap_err(),
        world.read(reading(&folder)).await.unwrap_err(),
    ] {
        assert_eq!(
            why(&status),
            (Code::FailedPrecondition, "PATH_IS_A_DIRECTORY".into())
        );
    }
    assert_eq!(names(world.path("open")), ["fifo", "link", "null"]);
}
