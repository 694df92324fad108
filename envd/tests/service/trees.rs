//! Whole trees: listed in pages, and copied.

use std::{
    fs::{self, File},
    io::{Seek as _, SeekFrom, Write as _},
    os::unix::{
        fs::{MetadataExt as _, chown, symlink},
        net::UnixListener,
    },
    path::Path,
    time::{Duration, SystemTime},
};

use nix::{sys::stat::Mode, unistd::mkfifo};
use proto::envd::v1::{
    CopyRequest, CopyResponse, FilesystemServiceListRequest, MakeSymlinkRequest,
};
use tonic::{Code, Status};

use crate::{
    files::{chmod, drafts, names},
    world::{ADA, World, field, noise, soon, until, why},
};

fn listing(path: &str) -> FilesystemServiceListRequest {
    FilesystemServiceListRequest {
        path: path.into(),
        user: "ada".into(),
        ..Default::default()
    }
}

fn copying(source: &str, destination: &str) -> CopyRequest {
    CopyRequest {
        source: source.into(),
        destination: destination.into(),
        user: "ada".into(),
        ..Default::default()
    }
}

/// Owned by ada, as what she makes herself is.
fn give(path: &Path) {
    std::os::unix::fs::lchown(path, Some(ADA), Some(ADA)).unwrap();
}

impl World {
    /// All pages, and paths from ada's home on.
    async fn listed(
        &self,
        mut request: FilesystemServiceListRequest,
    ) -> Result<Vec<String>, Status> {
        let home = self.text("ada");
        let mut listed = Vec::new();
        loop {
            let page = soon(self.files().list(request.clone())).await?.into_inner();
            let relative = |path: &str| path.strip_prefix(&home).unwrap()[1..].to_owned();
            listed.extend(page.entries.iter().map(|entry| relative(&entry.path)));
            request.page_token = page.next_page_token;
            if request.page_token.is_empty() {
                return Ok(listed);
            }
        }
    }

    async fn copy(&self, request: CopyRequest) -> Result<CopyResponse, Status> {
        Ok(soon(self.files().copy(request)).await?.into_inner())
    }
}

#[tokio::test]
async fn a_tree_is_listed_level_by_level_whatever_the_size_of_a_page() {
    let world = World::new().await;
    let home = world.path("ada");
    fs::create_dir_all(home.join("a/y/deep")).unwrap();
    fs::create_dir_all(home.join("closed/in")).unwrap();
    for file in [
        "a/x",
        "a/y/deep/z.rs",
        "a/y/w.rs",
        "a-b",
        "b.rs",
        "closed/in/secret",
    ] {
        fs::write(home.join(file), "").unwrap();
    }
    symlink(&home, home.join("a/home")).unwrap();
    chown(home.join("closed"), Some(0), Some(0)).unwrap();
    chmod(home.join("closed"), 0o700);
    // A directory's own entries follow it, so "a/x" is before "a-b".
    let all = [
        "a",
        "a/home",
        "a/x",
        "a/y",
        "a/y/deep",
        "a/y/deep/z.rs",
        "a/y/w.rs",
        "a-b",
        "b.rs",
        "closed",
    ];
    for page_size in [1, 2, 3, 0] {
        for depth in 1..=4 {
            let request = FilesystemServiceListRequest {
                depth,
                page_size,
                ..listing("~")
            };
            let listed = world.listed(request).await.unwrap();
            let wanted = all
                .iter()
                .filter(|path| path.split('/').count() <= depth as usize);
            assert!(listed.iter().eq(wanted), "{depth} {page_size} {listed:?}");
        }
    }
    for (pattern, wanted) in [
        ("*.rs", &["a/y/deep/z.rs", "a/y/w.rs", "b.rs"][..]),
        ("a/**/*.rs", &["a/y/deep/z.rs", "a/y/w.rs"]),
        ("a/*", &["a/home", "a/x", "a/y"]),
        ("[ab]*", &["a", "a-b", "b.rs"]),
        ("{x,w.rs}", &["a/x", "a/y/w.rs"]),
        ("none", &[]),
    ] {
        let request = FilesystemServiceListRequest {
            depth: 64,
            page_size: 1,
            pattern: pattern.into(),
            ..listing("~")
        };
        assert_eq!(world.listed(request).await.unwrap(), wanted, "{pattern}");
    }
    // What came before the page that was told, and what went, changes nothing of the rest.
    let first = FilesystemServiceListRequest {
        depth: 3,
        page_size: 4,
        ..listing("~")
    };
    let page = soon(world.files().list(first.clone()))
        .await
        .unwrap()
        .into_inner();
    fs::write(home.join("a/aaa"), "").unwrap();
    fs::remove_dir_all(home.join("a/y")).unwrap();
    let rest = FilesystemServiceListRequest {
        page_token: page.next_page_token,
        ..first
    };
    assert_eq!(world.listed(rest).await.unwrap(), ["a-b", "b.rs", "closed"]);

    for (request, wrong) in [
        (
            FilesystemServiceListRequest {
                depth: 65,
                ..listing("~")
            },
            "depth",
        ),
        (
            FilesystemServiceListRequest {
                pattern: "[a".into(),
                ..listing("~")
            },
            "pattern",
        ),
        (
            FilesystemServiceListRequest {
                pattern: "x".repeat(1025),
                ..listing("~")
            },
            "pattern",
        ),
        (
            FilesystemServiceListRequest {
                page_token: "7".into(),
                ..listing("~")
            },
            "page_token",
        ),
    ] {
        assert_eq!(field(&world.listed(request).await.unwrap_err()), wrong);
    }
    let closed = world.listed(listing("~/closed")).await.unwrap_err();
    assert_eq!(
        why(&closed),
        (Code::PermissionDenied, "PATH_PERMISSION_DENIED".into())
    );
}

#[tokio::test]
async fn a_pattern_that_matches_one_of_very_many_finds_it() {
    let world = World::new().await;
    let many = world.path("ada/many");
    fs::create_dir(&many).unwrap();
    for number in 0..120_000 {
        File::create(many.join(format!("{number:06}"))).unwrap();
    }
    let request = FilesystemServiceListRequest {
        pattern: "119999".into(),
        ..listing("~/many")
    };
    // No page takes longer because nothing matches.
    let page = soon(world.files().list(request.clone()))
        .await
        .unwrap()
        .into_inner();
    assert!(page.entries.is_empty() && !page.next_page_token.is_empty());
    assert_eq!(world.listed(request).await.unwrap(), ["many/119999"]);
}

#[tokio::test]
async fn a_copy_is_like_its_original() {
    let world = World::new().await;
    let home = world.path("ada");
    let from = home.join("from");
    fs::create_dir_all(from.join("sub/empty")).unwrap();
    let mut sparse = File::create(from.join("sparse")).unwrap();
    sparse.seek(SeekFrom::Start(64 << 20)).unwrap();
    sparse.write_all(&noise(10_000)).unwrap();
    sparse.set_len(1 << 30).unwrap();
    fs::write(from.join("one"), noise(300_000)).unwrap();
    fs::hard_link(from.join("one"), from.join("sub/same")).unwrap();
    let name = <std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(b"b\xff\xfe");
    fs::write(from.join(name), "bytes").unwrap();
    symlink("nowhere/at\u{20ac}all", from.join("link")).unwrap();
    mkfifo(&from.join("fifo"), Mode::from_bits_truncate(0o640)).unwrap();
    let _socket = UnixListener::bind(from.join("socket")).unwrap();
    fs::write(from.join("suid"), "").unwrap();
    let long_ago = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    for made in ["sub/empty", "sub", "sparse", "one"] {
        File::open(from.join(made))
            .unwrap()
            .set_modified(long_ago)
            .unwrap();
        give(&from.join(made));
    }
    for made in [
        Path::new("link"),
        Path::new("fifo"),
        Path::new(name),
        Path::new(""),
    ] {
        give(&from.join(made));
    }
    chmod(from.join("suid"), 0o4755);
    chmod(from.join("sub/empty"), 0o500);
    chmod(from.join("one"), 0o640);

    let copied = world.copy(copying("~/from", "~/to")).await.unwrap();
    assert_eq!((copied.entries, copied.left_out), (10, 1));
    assert_eq!(copied.size_bytes, (1 << 30) + 300_000 + 5);
    assert_eq!(copied.entry.unwrap().path, world.text("ada/to"));
    assert_eq!(names(&home), ["from", "to"]);
    let to = home.join("to");
    let stat = |path: &str| fs::symlink_metadata(to.join(path)).unwrap();
    assert_eq!(fs::read(to.join("one")).unwrap(), noise(300_000));
    assert_eq!(
        (stat("one").mode() & 0o7777, stat("one").uid()),
        (0o640, ADA)
    );
    assert_eq!(stat("one").ino(), stat("sub/same").ino());
    assert_eq!(stat("one").nlink(), 2);
    for kept in ["one", "sub", "sub/empty", "sparse"] {
        assert_eq!(stat(kept).modified().unwrap(), long_ago, "{kept}");
    }
    assert_eq!(stat("sub/empty").mode() & 0o7777, 0o500);
    assert_eq!(fs::read(to.join(name)).unwrap(), b"bytes");
    assert_eq!(
        fs::read_link(to.join("link")).unwrap(),
        Path::new("nowhere/at\u{20ac}all")
    );
    // Another's program does not become one that acts as ada for everybody.
    assert_eq!(
        (stat("suid").mode() & 0o7777, stat("suid").uid()),
        (0o755, ADA)
    );
    assert!(stat("sparse").len() == 1 << 30 && stat("sparse").blocks() * 512 < 1 << 20);
    let mut copy = File::open(to.join("sparse")).unwrap();
    copy.seek(SeekFrom::Start(64 << 20)).unwrap();
    let mut bytes = vec![0; 10_001];
    std::io::Read::read_exact(&mut copy, &mut bytes).unwrap();
    assert_eq!(bytes, [&noise(10_000)[..], &[0]].concat());

    // Root's copies keep their owners and what programs may do.
    let as_root = CopyRequest {
        user: "root".into(),
        ..copying(&world.text("ada/from"), &world.text("ada/roots"))
    };
    world.copy(as_root).await.unwrap();
    let suid = fs::metadata(home.join("roots/suid")).unwrap();
    assert_eq!((suid.mode() & 0o7777, suid.uid()), (0o4755, 0));
    assert_eq!(fs::metadata(home.join("roots/one")).unwrap().uid(), ADA);
}

#[tokio::test]
async fn a_copy_that_cannot_be_leaves_nothing() {
    let world = World::new().await;
    let home = world.path("ada");
    fs::create_dir_all(home.join("tree/a/b")).unwrap();
    fs::write(home.join("tree/a/file"), "new").unwrap();
    fs::write(home.join("there"), "old").unwrap();
    let _socket = UnixListener::bind(home.join("socket")).unwrap();
    for made in ["tree", "tree/a", "tree/a/b", "tree/a/file", "there"] {
        give(&home.join(made));
    }
    fs::create_dir(home.join("secret")).unwrap();
    fs::write(home.join("secret/key"), "k").unwrap();
    chmod(home.join("secret"), 0o755);
    chmod(home.join("secret/key"), 0o600);
    let before = names(&home);
    for (from, to, reason) in [
        ("~/none", "~/x", "PATH_NOT_FOUND"),
        ("~/tree", "~/there", "PATH_EXISTS"),
        ("~/there", "~/tree", "PATH_EXISTS"),
        ("~/tree", "~/tree/a/b/tree", "PATH_INVALID"),
        ("~/socket", "~/x", "PATH_NOT_A_FILE"),
        ("~/secret", "~/x", "PATH_PERMISSION_DENIED"),
        ("~/there", "/etc/x", "PATH_PERMISSION_DENIED"),
    ] {
        let refused = world.copy(copying(from, to)).await.unwrap_err();
        assert_eq!(why(&refused).1, reason, "{from} {to}");
    }
    assert_eq!(
        field(&world.copy(copying("/", "~/x")).await.unwrap_err()),
        "source"
    );
    assert_eq!(names(&home), before);
    assert!(names(home.join("tree/a/b")).is_empty());
    let replacing = CopyRequest {
        replace: true,
        ..copying("~/tree/a/file", "~/there")
    };
    world.copy(replacing).await.unwrap();
    assert_eq!(fs::read(home.join("there")).unwrap(), b"new");

    // A client that goes.
    let mut large = File::create(home.join("large")).unwrap();
    for _ in 0..256 {
        large.write_all(&noise(1 << 20)).unwrap();
    }
    let mut files = world.files();
    let parts = || drafts(&home).len();
    let call = tokio::spawn(async move { files.copy(copying("~/large", "~/copy")).await });
    until(|| parts() == 1).await;
    call.abort();
    until(|| parts() == 0).await;
    assert!(!home.join("copy").exists());
}

#[tokio::test]
async fn links_are_made_as_they_are_asked_for() {
    let world = World::new().await;
    let link = |path: &str, target: &[u8], replace| MakeSymlinkRequest {
        path: path.into(),
        user: "ada".into(),
        target: target.to_vec(),
        replace,
        ..Default::default()
    };
    let make = async |request| soon(world.files().make_symlink(request)).await;
    let entry = make(link("~/l", b"to\xff", false))
        .await
        .unwrap()
        .into_inner()
        .entry
        .unwrap();
    assert_eq!(
        (entry.symlink_target.as_slice(), entry.uid),
        (&b"to\xff"[..], ADA)
    );
    let taken = make(link("~/l", b"other", false)).await.unwrap_err();
    assert_eq!(why(&taken), (Code::AlreadyExists, "PATH_EXISTS".into()));
    let entry = make(link("~/l", b"other", true))
        .await
        .unwrap()
        .into_inner()
        .entry
        .unwrap();
    assert_eq!(entry.symlink_target, b"other");
    fs::create_dir(world.path("ada/dir")).unwrap();
    let taken = make(link("~/dir", b"x", true)).await.unwrap_err();
    assert_eq!(why(&taken).1, "PATH_IS_A_DIRECTORY");
    for target in [&b""[..], b"a\0b", &[b'x'; 4096]] {
        assert_eq!(
            field(&make(link("~/y", target, false)).await.unwrap_err()),
            "target"
        );
    }
    assert_eq!(names(world.path("ada")), ["dir", "l"]);
}
