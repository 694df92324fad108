//! Files: any bytes under any name, whole or not at all.

use std::{
    ffi::OsStr,
    fs,
    os::unix::{
        ffi::OsStrExt as _,
        fs::{PermissionsExt as _, symlink},
    },
    path::{Path, PathBuf},
};

use bytes::Bytes;
use futures::{future::join_all, stream};
use proto::envd::v1::{
    Entry, FileType, FilesystemServiceListRequest, FilesystemServiceListResponse,
    MakeDirectoryRequest, MoveRequest, ReadRequest, RemoveRequest, StatRequest, WriteHeader,
    WriteRequest, write_request::Part,
};
use tokio::{sync::mpsc, task::JoinHandle};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use crate::world::{ADA, World, argv, configuration, field, noise, soon, until, why};

pub(crate) fn header(path: &str) -> WriteHeader {
    WriteHeader {
        path: path.into(),
        ..WriteHeader::default()
    }
}

pub(crate) fn of(user: &str, path: &str) -> WriteHeader {
    WriteHeader {
        user: user.into(),
        ..header(path)
    }
}

pub(crate) fn head(header: WriteHeader) -> WriteRequest {
    WriteRequest {
        part: Some(Part::Header(header)),
    }
}

pub(crate) fn data(bytes: &[u8]) -> WriteRequest {
    WriteRequest {
        part: Some(Part::Data(Bytes::copy_from_slice(bytes))),
    }
}

pub(crate) fn reading(path: &str) -> ReadRequest {
    ReadRequest {
        path: path.into(),
        ..ReadRequest::default()
    }
}

pub(crate) fn chmod(path: impl AsRef<Path>, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

pub(crate) fn names(folder: impl AsRef<Path>) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

impl World {
    pub(crate) async fn write(&self, header: WriteHeader, bytes: &[u8]) -> Result<Entry, Status> {
        let parts: Vec<WriteRequest> = std::iter::once(head(header))
            .chain(bytes.chunks(100_001).map(data))
            .collect();
        let answer = soon(self.files().write(stream::iter(parts))).await?;
        Ok(answer.into_inner().entry.unwrap())
    }

    pub(crate) async fn read(&self, request: ReadRequest) -> Result<(Entry, Vec<u8>), Status> {
        let offset = request.offset;
        let mut parts = soon(self.files().read(request)).await?.into_inner();
        let first = soon(parts.message()).await?.expect("the entry first");
        let (entry, mut bytes) = (first.entry.unwrap(), first.data.to_vec());
        while let Some(part) = soon(parts.message()).await? {
            assert!(part.entry.is_none());
            assert_eq!(part.offset, offset + bytes.len() as u64);
            bytes.extend_from_slice(&part.data);
        }
        Ok((entry, bytes))
    }

    pub(crate) async fn stat(&self, request: StatRequest) -> Result<Entry, Status> {
        let answer = soon(self.files().stat(request)).await?;
        Ok(answer.into_inner().entry.unwrap())
    }

    pub(crate) async fn page(
        &self,
        path: &str,
        page_size: u32,
        page_token: &str,
    ) -> Result<FilesystemServiceListResponse, Status> {
        let request = FilesystemServiceListRequest {
            path: path.into(),
            page_size,
            page_token: page_token.into(),
            ..Default::default()
        };
        Ok(soon(self.files().list(request)).await?.into_inner())
    }

    pub(crate) async fn make(
        &self,
        user: &str,
        path: &str,
        mode: Option<u32>,
    ) -> Result<Entry, Status> {
        let request = MakeDirectoryRequest {
            path: path.into(),
            user: user.into(),
            mode,
            ..Default::default()
        };
        let answer = soon(self.files().make_directory(request)).await?;
        Ok(answer.into_inner().entry.unwrap())
    }

    pub(crate) async fn rename(
        &self,
        user: &str,
        from: &str,
        to: &str,
        replace: bool,
    ) -> Result<Entry, Status> {
        let request = MoveRequest {
            source: from.into(),
            destination: to.into(),
            user: user.into(),
            replace,
            ..Default::default()
        };
        Ok(soon(self.files().r#move(request))
            .await?
            .into_inner()
            .entry
            .unwrap())
    }

    pub(crate) async fn remove(
        &self,
        user: &str,
        path: &str,
        recursive: bool,
    ) -> Result<(), Status> {
        let request = RemoveRequest {
            path: path.into(),
            user: user.into(),
            recursive,
            ..Default::default()
        };
        soon(self.files().remove(request)).await.map(drop)
    }

    /// A write that has begun: its temporary file is there, holding what was sent.
    pub(crate) async fn begin(&self, header: WriteHeader, sent: &[u8]) -> Begun {
        let folder = Path::new(&header.path).parent().unwrap().to_owned();
        let (parts, requests) = mpsc::channel(4);
        let mut files = self.files();
        let call =
            tokio::spawn(async move { files.write(ReceiverStream::new(requests)).await.map(drop) });
        parts.send(head(header)).await.unwrap();
        parts.send(data(sent)).await.unwrap();
        until(|| {
            drafts(&folder).iter().any(|draft| {
                draft
                    .metadata()
                    .is_ok_and(|is| is.len() == sent.len() as u64)
            })
        })
        .await;
        Begun { parts, call }
    }
}

pub(crate) struct Begun {
    pub(crate) parts: mpsc::Sender<WriteRequest>,
    pub(crate) call: JoinHandle<Result<(), Status>>,
}

pub(crate) fn drafts(folder: &Path) -> Vec<PathBuf> {
    let paths = names(folder).into_iter().map(|name| folder.join(name));
    paths
        .filter(|path| path.extension() == Some(OsStr::new("part")))
        .collect()
}

// Bytes and names

#[tokio::test]
async fn what_is_written_is_read_byte_for_byte() {
    let world = World::new().await;
    let path = world.text("root/file");
    for size in [0, 1, 256, 128 << 10, (3 << 20) + 1] {
        let bytes = noise(size);
        let written = world.write(header(&path), &bytes).await.unwrap();
        let (entry, read) = world.read(reading(&path)).await.unwrap();
        assert!(read == bytes, "{size} bytes");
        assert!(fs::read(&path).unwrap() == bytes);
        assert_eq!(entry, written);
        assert_eq!(
            (entry.path.as_str(), entry.path_bytes.as_slice()),
            (path.as_str(), path.as_bytes())
        );
        assert_eq!(
            (entry.r#type(), entry.size_bytes),
            (FileType::File, size as u64)
        );
        assert_eq!((entry.uid, entry.gid, entry.mode), (0, 0, 0o644));
        assert!(entry.modify_time.unwrap().seconds > 1_600_000_000);
    }
    assert_eq!(names(world.path("root")), ["file"]);
}

#[tokio::test]
async fn a_part_is_read_by_offset_and_length() {
    let world = World::new().await;
    let path = world.text("root/file");
    let bytes = noise(300_000);
    fs::write(&path, &bytes).unwrap();
    for (offset, length) in [
        (0, Some(0)),
        (0, Some(1)),
        (131_071, Some(2)),
        (100, Some(200_000)),
        (299_999, None),
        (300_000, None),
        (299_000, Some(u64::MAX)),
        (1 << 40, Some(5)),
    ] {
        let request = ReadRequest {
            offset,
            length,
            ..reading(&path)
        };
        let start = bytes.len().min(offset as usize);
        let end = bytes
            .len()
            .min(start.saturating_add(length.unwrap_or(u64::MAX) as usize));
        let (entry, read) = world.read(request).await.unwrap();
        assert!(read == bytes[start..end], "{offset} {length:?}");
        assert_eq!(entry.size_bytes, 300_000);
    }
}

#[tokio::test]
async fn names_are_bytes() {
    let world = World::new().await;
    let folder = world.path("root/fo\nlder");
    fs::create_dir(&folder).unwrap();
    let name = OsStr::from_bytes(b"\xff\xfe *\xc3");
    let path = folder.join(name);
    let path_bytes = path.as_os_str().as_bytes().to_vec();
    let to = WriteHeader {
        path_bytes: path_bytes.clone(),
        ..WriteHeader::default()
    };
    let written = world.write(to, b"hello").await.unwrap();
    assert_eq!(written.path_bytes, path_bytes);
    assert!(written.path.ends_with("\u{fffd}\u{fffd} *\u{fffd}"));
    assert_eq!(fs::read(&path).unwrap(), b"hello");
    let request = ReadRequest {
        path_bytes: path_bytes.clone(),
        ..ReadRequest::default()
    };
    assert_eq!(world.read(request).await.unwrap().1, b"hello");
    let listed = world
        .page(folder.to_str().unwrap(), 0, "")
        .await
        .unwrap()
        .entries;
    assert_eq!(listed, std::slice::from_ref(&written));
    let remove = RemoveRequest {
        path_bytes: path_bytes.clone(),
        ..RemoveRequest::default()
    };
    soon(world.files().remove(remove)).await.unwrap();
    let stat = StatRequest {
        path_bytes,
        ..StatRequest::default()
    };
    let status = world.stat(stat).await.unwrap_err();
    assert_eq!(why(&status), (Code::NotFound, "PATH_NOT_FOUND".into()));
}

#[tokio::test]
async fn a_path_is_read_as_in_a_shell() {
    let world = World::new().await;
    for (path, expected) in [
        ("~/a", "root/a"),
        ("b", "root/b"),
        ("~ada/c", "ada/c"),
        ("~//d", "root/d"),
        ("../open/e", "open/e"),
    ] {
        world.write(header(path), b"hello").await.unwrap();
        assert_eq!(fs::read(world.path(expected)).unwrap(), b"hello", "{path}");
    }
    let home = StatRequest {
        path: "~".into(),
        user: "ada".into(),
        ..StatRequest::default()
    };
    assert_eq!(world.stat(home).await.unwrap().path, world.text("ada"));
    let status = world
        .stat(StatRequest {
            path: "~no-such/x".into(),
            ..Default::default()
        })
        .await
        .unwrap_err();
    assert_eq!(why(&status), (Code::NotFound, "USER_UNKNOWN".into()));
}

#[tokio::test]
async fn a_path_that_makes_no_sense_names_its_field() {
    let world = World::new().await;
    let stat = |path: &str, path_bytes: &[u8]| StatRequest {
        path: path.into(),
        path_bytes: path_bytes.into(),
        ..StatRequest::default()
    };
    for request in [
        stat("", b""),
        stat("/etc", b"/etc"),
        stat("/etc\0", b""),
        stat("", b"/\0"),
        stat(&"/a".repeat(3000), b""),
    ] {
        let status = world.stat(request.clone()).await.unwrap_err();
        assert_eq!(field(&status), "path", "{request:?}");
    }
    let status = world.page("/", 0, "xyz").await.unwrap_err();
    assert_eq!(field(&status), "page_token");
}

// Whole or not at all

#[tokio::test]
async fn a_write_that_is_cut_leaves_the_old_file_whole_and_nothing_else() {
    let mut world = World::new().await;
    let path = world.text("root/file");
    fs::write(&path, b"old").unwrap();
    let half = noise(200_000);
    let untouched = async || {
        until(|| drafts(Path::new(&path).parent().unwrap()).is_empty()).await;
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(Path::new(&path).parent().unwrap()), ["file"]);
    };
    // The call is cancelled: over and over, since it is a race.
    for _ in 0..30 {
        let begun = world.begin(header(&path), &half).await;
        begun.call.abort();
        assert!(begun.call.await.unwrap_err().is_cancelled());
        untouched().await;
    }
    // The client makes a mistake.
    let begun = world.begin(header(&path), &half).await;
    begun.parts.send(head(header(&path))).await.unwrap();
    let status = soon(begun.call).await.unwrap().unwrap_err();
    assert_eq!(field(&status), "header");
    untouched().await;
    // The connection is lost.
    for _ in 0..5 {
        let begun = world.begin(header(&path), &half).await;
        world.reconnect().await;
        soon(begun.call).await.unwrap().unwrap_err();
        untouched().await;
    }
}

#[tokio::test]
async fn a_file_is_old_or_new_while_it_is_written() {
    let world = World::new().await;
    let path = world.text("root/file");
    fs::write(&path, b"old").unwrap();
    let begun = world.begin(header(&path), b"new").await;
    assert_eq!(world.read(reading(&path)).await.unwrap().1, b"old");
    begun.parts.send(data(b" and more")).await.unwrap();
    drop(begun.parts);
    soon(begun.call).await.unwrap().unwrap();
    assert_eq!(world.read(reading(&path)).await.unwrap().1, b"new and more");
    // Of many at once one wins, whole.
    let writes =
        (0..8_u8).map(async |number| world.write(header("~/file"), &vec![number; 300_000]).await);
    assert!(join_all(writes).await.iter().all(Result::is_ok));
    let won = fs::read(&path).unwrap();
    assert!(won.len() == 300_000 && won.iter().all(|byte| *byte == won[0]));
    assert_eq!(names(world.path("root")), ["file"]);
}

#[tokio::test]
async fn a_write_begins_with_its_header() {
    let world = World::new().await;
    for parts in [vec![], vec![data(b"hello")], vec![WriteRequest::default()]] {
        let status = soon(world.files().write(stream::iter(parts)))
            .await
            .unwrap_err();
        assert_eq!(field(&status), "header");
    }
}

// Entries

#[tokio::test]
async fn stat_says_what_a_path_is() {
    let world = World::new().await;
    fs::write(world.path("root/file"), b"hello").unwrap();
    symlink("file", world.path("root/link")).unwrap();
    symlink("nowhere", world.path("root/dangling")).unwrap();
    let stat = async |path: &str, no_follow: bool| {
        let request = StatRequest {
            path: path.into(),
            no_follow,
            ..StatRequest::default()
        };
        world.stat(request).await
    };
    for (path, no_follow, kind) in [
        ("file", false, FileType::File),
        (".", false, FileType::Directory),
        ("link", false, FileType::File),
        ("link", true, FileType::Symlink),
        ("dangling", true, FileType::Symlink),
        ("/dev/null", false, FileType::Other),
    ] {
        assert_eq!(
            stat(path, no_follow).await.unwrap().r#type(),
            kind,
            "{path}"
        );
    }
    assert_eq!(stat("link", true).await.unwrap().symlink_target, b"file");
    assert_eq!(stat("link", false).await.unwrap().size_bytes, 5);
    for (path, code, reason) in [
        ("dangling", Code::NotFound, "PATH_NOT_FOUND"),
        (
            "file/below",
            Code::FailedPrecondition,
            "PATH_NOT_A_DIRECTORY",
        ),
        (&"a".repeat(300), Code::InvalidArgument, "PATH_INVALID"),
    ] {
        let status = stat(path, false).await.unwrap_err();
        assert_eq!(why(&status), (code, reason.into()));
        assert!(status.message().contains(path), "{status:?}");
    }
}

#[tokio::test]
async fn a_refusal_of_the_longest_path_still_arrives() {
    let world = World::new().await;
    let request = StatRequest {
        path_bytes: [b"/".as_slice(), &[0xff; 4000]].concat(),
        ..StatRequest::default()
    };
    let status = world.stat(request).await.unwrap_err();
    assert_eq!(why(&status), (Code::InvalidArgument, "PATH_INVALID".into()));
    assert_eq!(world.page("/", 1, "").await.unwrap().entries.len(), 1);
}

#[tokio::test]
async fn pages_give_every_name_once_in_order() {
    let world = World::new().await;
    let folder = world.text("open/many");
    fs::create_dir(&folder).unwrap();
    let expected: Vec<String> = (0..2500)
        .map(|number| format!("{folder}/file-{number:04}"))
        .collect();
    for path in &expected {
        fs::write(path, b"").unwrap();
    }
    for (size, pages) in [(0, 3), (2500, 1), (u32::MAX, 1)] {
        let (mut seen, mut token, mut count) = (Vec::new(), String::new(), 0);
        loop {
            let page = world.page(&folder, size, &token).await.unwrap();
            count += 1;
            seen.extend(page.entries.into_iter().map(|entry| entry.path));
            token = page.next_page_token;
            if token.is_empty() {
                break;
            }
        }
        assert!(seen == expected);
        assert_eq!(count, pages, "pages of {size}");
    }
    // What goes between two pages costs nobody their place.
    let first = world.page(&folder, 10, "").await.unwrap();
    fs::remove_file(&expected[9]).unwrap();
    let second = world
        .page(&folder, 10, &first.next_page_token)
        .await
        .unwrap();
    assert_eq!(second.entries[0].path, expected[10]);
}

#[tokio::test]
async fn a_page_of_long_paths_fits_into_a_message() {
    let world = World::new().await;
    let name = "x".repeat(250);
    let folder = world.text(&format!("open{}", format!("/{name}").repeat(14)));
    fs::create_dir_all(&folder).unwrap();
    for number in 0..700 {
        fs::write(format!("{folder}/{name}{number}"), b"").unwrap();
    }
    let (mut seen, mut token) = (0, String::new());
    loop {
        let page = world.page(&folder, 10_000, &token).await.unwrap();
        seen += page.entries.len();
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(seen, 700);
}

// Moving and removing

#[tokio::test]
async fn a_move_replaces_only_if_asked() {
    let world = World::new().await;
    let path = |name: &str| world.path("root").join(name);
    fs::write(path("a"), b"a").unwrap();
    fs::write(path("b"), b"b").unwrap();
    let status = world.rename("", "a", "b", false).await.unwrap_err();
    assert_eq!(why(&status), (Code::AlreadyExists, "PATH_EXISTS".into()));
    assert!(
        status.message().contains(path("b").to_str().unwrap()),
        "{status:?}"
    );
    assert_eq!(fs::read(path("b")).unwrap(), b"b");
    let entry = world.rename("", "a", "b", true).await.unwrap();
    assert_eq!(
        (entry.path.as_str(), entry.size_bytes),
        (path("b").to_str().unwrap(), 1)
    );
    assert_eq!(
        (names(world.path("root")), fs::read(path("b")).unwrap()),
        (vec!["b".into()], b"a".to_vec())
    );
    world.rename("", "b", "~ada/c", false).await.unwrap();
    let status = world.rename("", "b", "c", false).await.unwrap_err();
    assert_eq!(why(&status), (Code::NotFound, "PATH_NOT_FOUND".into()));
    let status = world
        .rename("", "~ada/c", "no/such", false)
        .await
        .unwrap_err();
    assert_eq!(why(&status), (Code::NotFound, "PATH_NOT_FOUND".into()));
}

#[tokio::test]
async fn a_removal_goes_no_further_than_asked() {
    let world = World::new().await;
    fs::create_dir_all(world.path("root/folder/deep")).unwrap();
    fs::write(world.path("ada/kept"), b"").unwrap();
    symlink(world.path("ada"), world.path("root/folder/deep/link")).unwrap();
    let status = world.remove("", "folder", false).await.unwrap_err();
    assert_eq!(
        why(&status),
        (Code::FailedPrecondition, "DIRECTORY_NOT_EMPTY".into())
    );
    assert!(world.path("root/folder/deep").exists());
    world.remove("", "folder", true).await.unwrap();
    assert_eq!(names(world.path("root")), [""; 0]);
    symlink(world.path("ada"), world.path("root/link")).unwrap();
    world.remove("", "link", true).await.unwrap();
    assert_eq!(
        names(world.path("ada")),
        ["kept"],
        "links are removed, not followed"
    );
    let status = world.remove("", "link", true).await.unwrap_err();
    assert_eq!(why(&status), (Code::NotFound, "PATH_NOT_FOUND".into()));
}

#[tokio::test]
async fn what_a_process_writes_a_call_reads_and_the_other_way_round() {
    let mut session = configuration();
    session.default_user = "ada".into();
    let world = World::configured(session).await;
    assert_eq!(
        world.printed("umask 027; printf hello > made; ls").await,
        "made\n"
    );
    let (entry, bytes) = world.read(reading("made")).await.unwrap();
    assert_eq!(
        (entry.uid, entry.mode, bytes.as_slice()),
        (ADA, 0o640, &b"hello"[..])
    );
    world
        .write(header("written"), b"#!/bin/sh\necho ran\n")
        .await
        .unwrap();
    let finished = world.run(argv(&["sh", "./written"])).await;
    assert_eq!(finished.stdout, b"ran\n");
}
