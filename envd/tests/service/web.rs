//! Files by plain HTTP: what browsers, curl and tar expect, and what a hostile archive must not get.

use std::{
    fs::{self, File},
    io::{Cursor, Read as _, Write as _},
    os::unix::fs::{MetadataExt as _, symlink},
    path::Path,
    process::{Command, Stdio},
};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full, StreamBody};
use nix::{sys::stat::Mode, unistd::mkfifo};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, body::Body};
use tower::Service as _;

use crate::{
    files::{chmod, drafts},
    world::{ADA, World, noise, soon, until, why},
};

struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

impl Answer {
    fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .map_or("", |value| value.to_str().unwrap())
    }

    /// Code and stable word of a refusal.
    fn refusal(&self) -> (Code, String) {
        why(&Status::from_header_map(&self.headers).expect("a refusal"))
    }
}

impl World {
    async fn begin_http(&self, request: Request<Body>) -> Response<Body> {
        soon(self.channel().call(request)).await.unwrap()
    }

    async fn http(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Bytes,
    ) -> Answer {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("http://guest/files/{path}"));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Body::new(Full::new(body))).unwrap();
        let (head, body) = self.begin_http(request).await.into_parts();
        Answer {
            status: head.status,
            headers: head.headers,
            body: soon(body.collect()).await.unwrap().to_bytes(),
        }
    }

    async fn get(&self, path: &str, headers: &[(&str, &str)]) -> Answer {
        self.http(Method::GET, path, headers, Bytes::new()).await
    }

    async fn put(&self, path: &str, body: impl Into<Bytes>) -> Answer {
        self.http(Method::PUT, path, &[], body.into()).await
    }
}

#[tokio::test]
async fn files_come_whole_in_parts_or_not_again() {
    let world = World::new().await;
    let bytes = noise(700_000);
    let made = world
        .put("~/new/deep/a%20b?user=ada&mode=640", bytes.clone())
        .await;
    assert_eq!(made.status, StatusCode::CREATED);
    let path = world.path("ada/new/deep/a b");
    let metadata = fs::metadata(&path).unwrap();
    assert_eq!((metadata.mode() & 0o7777, metadata.uid()), (0o640, ADA));
    let got = world.get("~/new/deep/a%20b?user=ada", &[]).await;
    assert_eq!((got.status, &got.body), (StatusCode::OK, &bytes));
    assert_eq!(got.header("content-length"), "700000");
    assert_eq!(got.header("content-type"), "application/octet-stream");
    assert_eq!(got.header("x-content-type-options"), "nosniff");
    assert_eq!(got.header("accept-ranges"), "bytes");
    let tag = got.header("etag").to_owned();
    assert_eq!(made.header("etag"), tag);
    let absolute = &world.text("ada/new/deep/a b")[1..].replace(' ', "%20");
    let head = world.http(Method::HEAD, absolute, &[], Bytes::new()).await;
    assert_eq!(
        (head.header("etag"), head.header("content-length")),
        (tag.as_str(), "700000")
    );
    assert!(head.body.is_empty());

    let part = async |range: &str| world.get(absolute, &[("range", range)]).await;
    for (range, of, wanted) in [
        ("bytes=0-0", "bytes 0-0/700000", 0..1),
        (
            "bytes=699999-",
            "bytes 699999-699999/700000",
            699_999..700_000,
        ),
        ("bytes=-10", "bytes 699990-699999/700000", 699_990..700_000),
        ("bytes=10-9999999", "bytes 10-699999/700000", 10..700_000),
    ] {
        let got = part(range).await;
        assert_eq!(got.status, StatusCode::PARTIAL_CONTENT, "{range}");
        assert_eq!(
            (got.header("content-range"), &got.body[..]),
            (of, &bytes[wanted])
        );
    }
    let beyond = part("bytes=700000-").await;
    assert_eq!(beyond.status, StatusCode::RANGE_NOT_SATISFIABLE);
    assert_eq!(beyond.header("content-range"), "bytes */700000");
    // What is no range, or several, is answered with all of it.
    for range in ["lines=1-2", "bytes=0-1,5-6", "x"] {
        assert_eq!(part(range).await.body.len(), 700_000, "{range}");
    }
    let modified = got.header("last-modified").to_owned();
    for (headers, status) in [
        ([("if-none-match", tag.as_str())], 304),
        ([("if-none-match", "\"other\"")], 200),
        ([("if-modified-since", &modified)], 304),
        ([("if-match", "\"other\"")], 412),
        ([("if-match", &tag)], 200),
        (
            [("if-unmodified-since", "Sat, 01 Jan 2000 00:00:00 GMT")],
            412,
        ),
    ] {
        let got = world.get(absolute, &headers).await;
        assert_eq!(got.status, status, "{headers:?}");
        assert_eq!(got.header("etag"), tag);
    }
    let resumed = [("range", "bytes=1-1"), ("if-range", tag.as_str())];
    assert_eq!(world.get(absolute, &resumed).await.status, 206);
    fs::write(&path, "short").unwrap();
    let resumed = world.get(absolute, &resumed).await;
    assert_eq!(
        (resumed.status, &resumed.body[..]),
        (StatusCode::OK, &b"short"[..])
    );

    // Only what is as the client thinks is replaced.
    let put = async |headers: &[_]| {
        world
            .http(Method::PUT, absolute, headers, Bytes::from("x"))
            .await
    };
    for headers in [[("if-none-match", "*")], [("if-match", tag.as_str())]] {
        let refused = put(&headers).await.refusal();
        assert_eq!(
            refused,
            (Code::FailedPrecondition, "PRECONDITION_FAILED".into())
        );
    }
    let tag = resumed.header("etag");
    assert_eq!(
        put(&[("if-match", tag)]).await.status,
        StatusCode::NO_CONTENT
    );
    fs::remove_file(&path).unwrap();
    assert_eq!(
        put(&[("if-match", tag)]).await.refusal().1,
        "PRECONDITION_FAILED"
    );
    assert_eq!(
        put(&[("if-none-match", "*")]).await.status,
        StatusCode::CREATED
    );
}

#[tokio::test]
async fn what_cannot_be_is_said_with_its_reason() {
    let world = World::new().await;
    fs::create_dir(world.path("ada/dir")).unwrap();
    fs::write(world.path("ada/file"), "").unwrap();
    fs::write(world.path("root/secret"), "").unwrap();
    chmod(world.path("root"), 0o700);
    mkfifo(&world.path("ada/fifo"), Mode::S_IRWXU).unwrap();
    let secret = format!("{}?user=ada", &world.text("root/secret")[1..]);
    let long = "x".repeat(5000);
    for (method, path, reason) in [
        (Method::GET, "~/none?user=ada", "PATH_NOT_FOUND"),
        (Method::GET, "~nobody-here/x", "USER_UNKNOWN"),
        (Method::GET, "~/file?user=nobody-here", "USER_UNKNOWN"),
        (Method::GET, &secret, "PATH_PERMISSION_DENIED"),
        (Method::PUT, &secret, "PATH_PERMISSION_DENIED"),
        (Method::GET, "~ada/fifo", "PATH_NOT_A_FILE"),
        (Method::PUT, "~ada/dir", "PATH_IS_A_DIRECTORY"),
        (Method::GET, "a%00b", "INVALID_ARGUMENT"),
        (Method::GET, &long, "INVALID_ARGUMENT"),
        (Method::GET, "~ada/file?archive=tar", "INVALID_ARGUMENT"),
        (Method::GET, "~ada/dir?archive=rar", "INVALID_ARGUMENT"),
        (Method::GET, "~ada/file?unpack=tar", "INVALID_ARGUMENT"),
        (Method::GET, "~ada/file?colour=red", "INVALID_ARGUMENT"),
        (Method::PUT, "~ada/file?mode=abc", "INVALID_ARGUMENT"),
        (Method::PUT, "~ada/file?mode=17777", "INVALID_ARGUMENT"),
        (Method::PUT, "~ada/file?unpack=zip", "INVALID_ARGUMENT"),
        (
            Method::PUT,
            "~ada/dir?unpack=tar&folders=x",
            "INVALID_ARGUMENT",
        ),
        (Method::PUT, "~ada/dir?unpack=tar", "ARCHIVE_INVALID"),
        (Method::PUT, "~ada/file?unpack=tar", "PATH_EXISTS"),
        (Method::DELETE, "~ada/file", "METHOD_NOT_ALLOWED"),
    ] {
        let answer = world
            .http(method, path, &[], Bytes::from("no archive".repeat(100)))
            .await;
        assert_eq!(answer.refusal().1, reason, "{path}");
    }
    let headers = [("content-range", "bytes 0-1/5")];
    let part = world
        .http(Method::PUT, "~ada/file", &headers, Bytes::from("ab"))
        .await;
    assert_eq!(part.refusal().1, "INVALID_ARGUMENT");
    assert!(fs::read(world.path("ada/file")).unwrap().is_empty());
}

#[tokio::test]
async fn an_upload_that_breaks_off_leaves_the_old_file() {
    let world = World::new().await;
    fs::write(world.path("ada/file"), "old").unwrap();
    for says_length in [false, true] {
        let (to, parts) = mpsc::channel::<Result<_, std::io::Error>>(4);
        let mut request = Request::put("http://guest/files/~ada/file");
        if says_length {
            request = request.header("content-length", "400000");
        }
        let body = StreamBody::new(ReceiverStream::new(parts));
        let request = request.body(Body::new(body)).unwrap();
        let mut channel = world.channel();
        let call = tokio::spawn(async move { channel.call(request).await.map(drop) });
        to.send(Ok(http_body::Frame::data(noise(200_000))))
            .await
            .unwrap();
        let parts = || drafts(&world.path("ada")).len();
        until(|| parts() == 1).await;
        call.abort();
        assert!(call.await.unwrap_err().is_cancelled());
        until(|| parts() == 0).await;
        drop(to);
        assert_eq!(fs::read(world.path("ada/file")).unwrap(), b"old");
    }
}

/// What the machine's own tar makes of an archive.
fn untar(archive: &[u8], folder: &Path) {
    let mut tar = Command::new("tar")
        .args(["-xp", "-C"])
        .arg(folder)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    tar.stdin.take().unwrap().write_all(archive).unwrap();
    assert!(tar.wait().unwrap().success());
}

/// And how it packs a folder.
fn tarred(folder: &Path, options: &[&str]) -> Bytes {
    let output = Command::new("tar")
        .args(options)
        .args(["-c", "-C"])
        .arg(folder)
        .arg(".")
        .output()
        .unwrap();
    assert!(output.status.success());
    output.stdout.into()
}

#[tokio::test]
async fn directories_come_and_go_as_archives() {
    let world = World::new().await;
    let from = world.path("ada/from");
    let long = format!("long/{}/{}", "n".repeat(120), "m".repeat(200));
    fs::create_dir_all(from.join(&long)).unwrap();
    fs::create_dir(from.join("empty")).unwrap();
    fs::write(from.join(&long).join("file"), noise(100_000)).unwrap();
    fs::hard_link(from.join(&long).join("file"), from.join("same")).unwrap();
    let name = <std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(b"b\xff");
    fs::write(from.join(name), "bytes").unwrap();
    symlink("../up", from.join("link")).unwrap();
    fs::write(from.join("program"), "#!").unwrap();
    chmod(from.join("program"), 0o751);
    chmod(from.join("empty"), 0o555);

    let tar = world.get("~ada/from", &[]).await;
    assert_eq!(tar.header("content-type"), "application/x-tar");
    assert_eq!(
        tar.header("content-disposition"),
        "attachment; filename*=UTF-8''from.tar"
    );
    let by_tar = world.path("ada/by-tar");
    fs::create_dir(&by_tar).unwrap();
    untar(&tar.body, &by_tar);
    let gzipped = tarred(&from, &["-z"]);
    let same = |folder: &Path| {
        let output = Command::new("diff")
            .args(["-r", "--no-dereference"])
            .args([&from, folder])
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        let stat = |path: &str| fs::symlink_metadata(folder.join(path)).unwrap();
        assert_eq!(stat("program").mode() & 0o7777, 0o751);
        assert_eq!(stat("empty").mode() & 0o7777, 0o555);
        assert_eq!(fs::read(folder.join(name)).unwrap(), b"bytes");
        assert_eq!(stat("same").nlink(), 2);
        let original = fs::metadata(from.join("program")).unwrap().mtime();
        assert_eq!(stat("program").mtime(), original);
    };
    same(&by_tar);
    for (folder, archive) in [("again", tar.body), ("zipped", gzipped)] {
        // Twice: what is there gives way.
        for _ in 0..2 {
            let path = format!("~/{folder}?unpack=tar&user=ada");
            let unpacked = world.put(&path, archive.clone()).await;
            assert_eq!(unpacked.status, StatusCode::OK, "{:?}", unpacked.headers);
            let answer = String::from_utf8_lossy(&unpacked.body).into_owned();
            assert_eq!(answer, r#"{"entries":9,"sizeBytes":100007,"leftOut":0}"#);
        }
        same(&world.path(format!("ada/{folder}")));
        assert_eq!(
            fs::metadata(world.path(format!("ada/{folder}/same")))
                .unwrap()
                .uid(),
            ADA
        );
    }

    // ZIP has no bytes for names, and no hard links.
    let zip = world.get("~ada/from?archive=zip", &[]).await;
    assert_eq!(zip.header("content-type"), "application/zip");
    let mut archive = zip::ZipArchive::new(Cursor::new(zip.body)).unwrap();
    let mut contents = |name: &str| {
        let mut bytes = Vec::new();
        archive
            .by_name(name)
            .unwrap()
            .read_to_end(&mut bytes)
            .unwrap();
        bytes
    };
    assert_eq!(contents("same"), noise(100_000));
    assert_eq!(contents(&format!("{long}/file")), noise(100_000));
    assert_eq!(contents("b\u{fffd}"), b"bytes");
    assert_eq!(contents("link"), b"../up");
    assert_eq!(
        archive.by_name("program").unwrap().unix_mode(),
        Some(0o100_751)
    );
    assert!(archive.by_name("empty/").unwrap().is_dir());
}

fn archive(entries: &[(&str, tar::EntryType, &str)]) -> Bytes {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, kind, what) in entries {
        let mut header = tar::Header::new_gnu();
        // As nobody's tar would: what the library refuses to write.
        header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_entry_type(*kind);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        let is_link = matches!(kind, tar::EntryType::Symlink | tar::EntryType::Link);
        if is_link {
            header.as_gnu_mut().unwrap().linkname[..what.len()].copy_from_slice(what.as_bytes());
        }
        header.set_size(if is_link { 0 } else { what.len() as u64 });
        header.set_cksum();
        let data = if is_link { &[] } else { what.as_bytes() };
        builder.append(&header, data).unwrap();
    }
    builder.into_inner().unwrap().into()
}

#[tokio::test]
async fn no_archive_leads_out_of_its_directory() {
    use tar::EntryType::{Block, Char, Link, Regular, Symlink};
    let world = World::new().await;
    fs::write(world.path("victim"), "whole").unwrap();
    let outside = world.text("");
    let absolute = world.text("victim");
    for (entries, reason) in [
        (vec![("../victim", Regular, "x")], "ARCHIVE_ENTRY_REFUSED"),
        (
            vec![("a/../../victim", Regular, "x")],
            "ARCHIVE_ENTRY_REFUSED",
        ),
        (vec![("/etc/x", Regular, "x")], "ARCHIVE_ENTRY_REFUSED"),
        (
            vec![("l", Symlink, ".."), ("l/victim", Regular, "x")],
            "ARCHIVE_ENTRY_REFUSED",
        ),
        (
            vec![("l", Symlink, &outside), ("l/victim", Regular, "x")],
            "ARCHIVE_ENTRY_REFUSED",
        ),
        (
            vec![
                ("a", Symlink, "b"),
                ("b", Symlink, "../.."),
                ("a/victim", Regular, "x"),
            ],
            "ARCHIVE_ENTRY_REFUSED",
        ),
        (
            vec![("l", Symlink, ".."), ("h", Link, "l/victim")],
            "ARCHIVE_ENTRY_REFUSED",
        ),
        (vec![("h", Link, "../victim")], "ARCHIVE_ENTRY_REFUSED"),
        (vec![("h", Link, &absolute)], "ARCHIVE_ENTRY_REFUSED"),
        (vec![("h", Link, "none")], "PATH_NOT_FOUND"),
        (
            vec![("l", Symlink, "l"), ("l/x", Regular, "x")],
            "PATH_LINK_LOOP",
        ),
    ] {
        let answer = world
            .put("~root/in?unpack=tar&user=root", archive(&entries))
            .await;
        assert_eq!(answer.refusal().1, reason, "{entries:?}");
        let folder = world.path("root/in");
        assert!(!folder.join("h").exists());
        fs::remove_dir_all(folder).unwrap();
    }
    // A link that was there before is no way out either; one that is replaced is not followed.
    fs::create_dir(world.path("root/in")).unwrap();
    symlink("../..", world.path("root/in/up")).unwrap();
    let through = archive(&[("up/victim", Regular, "x")]);
    let answer = world.put("~root/in?unpack=tar&user=root", through).await;
    assert_eq!(answer.refusal().1, "ARCHIVE_ENTRY_REFUSED");
    symlink("../../victim", world.path("root/in/file")).unwrap();
    let onto = archive(&[("file", Regular, "mine")]);
    assert_eq!(
        world
            .put("~root/in?unpack=tar&user=root", onto)
            .await
            .status,
        200
    );
    assert_eq!(fs::read(world.path("root/in/file")).unwrap(), b"mine");
    // Links that stay within lead where they say.
    let within = archive(&[
        ("d/x", Regular, "1"),
        ("l", Symlink, "d"),
        ("l/y", Regular, "2"),
    ]);
    assert_eq!(
        world
            .put("~root/in?unpack=tar&user=root", within)
            .await
            .status,
        200
    );
    assert_eq!(fs::read(world.path("root/in/d/y")).unwrap(), b"2");
    // A link to itself changes nothing.
    let own = archive(&[("d/x", Link, "d/./x")]);
    assert_eq!(
        world.put("~root/in?unpack=tar&user=root", own).await.status,
        200
    );
    assert_eq!(fs::read(world.path("root/in/d/x")).unwrap(), b"1");
    // No devices, whoever asks; and no owner but the acting user for those who are not root.
    let devices = archive(&[
        ("null", Char, ""),
        ("disk", Block, ""),
        ("file", Regular, "f"),
    ]);
    let answer = world.put("~ada/in?unpack=tar&user=ada", devices).await;
    assert_eq!(answer.body, r#"{"entries":1,"sizeBytes":1,"leftOut":2}"#);
    assert_eq!(fs::metadata(world.path("ada/in/file")).unwrap().uid(), ADA);
    assert_eq!(fs::read(world.path("victim")).unwrap(), b"whole");
}

#[tokio::test]
async fn damaged_and_boundless_archives_end_soon() {
    let world = World::new().await;
    let mut whole = archive(&[("file", tar::EntryType::Regular, &"x".repeat(2000))]).to_vec();
    let answer = world
        .put("~ada/in?unpack=tar", Bytes::copy_from_slice(&whole[..1024]))
        .await;
    assert_eq!(answer.refusal().1, "ARCHIVE_INVALID");
    whole[3] ^= 1;
    assert_eq!(
        world.put("~ada/in?unpack=tar", whole).await.refusal().1,
        "ARCHIVE_INVALID"
    );
    let not_gzip = [&[0x1f, 0x8b][..], &[7; 100]].concat();
    assert_eq!(
        world.put("~ada/in?unpack=tar", not_gzip).await.refusal().1,
        "ARCHIVE_INVALID"
    );
    // Attributes without an end are not read into memory.
    let mut header = tar::Header::new_ustar();
    header.set_path("x").unwrap();
    header.set_entry_type(tar::EntryType::XHeader);
    header.set_size(8 << 30);
    header.set_cksum();
    let (to, parts) = mpsc::channel::<Result<_, std::io::Error>>(1);
    let request = Request::put("http://guest/files/~ada/in?unpack=tar")
        .body(Body::new(StreamBody::new(ReceiverStream::new(parts))))
        .unwrap();
    let mut channel = world.channel();
    let call = tokio::spawn(async move { channel.call(request).await.unwrap() });
    let mut chunk = Bytes::copy_from_slice(header.as_bytes());
    while to.send(Ok(http_body::Frame::data(chunk))).await.is_ok() {
        chunk = noise(1 << 20);
    }
    let answer = soon(call).await.unwrap();
    let status = Status::from_header_map(answer.headers()).unwrap();
    assert_eq!(why(&status).1, "ARCHIVE_INVALID");
}

#[tokio::test]
async fn a_file_that_shrinks_while_it_is_sent_is_not_taken_for_whole() {
    let world = World::new().await;
    fs::write(world.path("ada/file"), noise(30 << 20)).unwrap();
    let request = Request::get("http://guest/files/~ada/file");
    let answer = world.begin_http(request.body(Body::empty()).unwrap()).await;
    let file = File::options()
        .write(true)
        .open(world.path("ada/file"))
        .unwrap();
    // Windows are smaller than the file, so not all of it is on its way yet.
    file.set_len(29 << 20).unwrap();
    assert!(soon(answer.into_body().collect()).await.is_err());
}
