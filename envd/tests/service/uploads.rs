//! Writes that go on after they broke off, and writes into files as they are.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink},
};

use futures::{future::join_all, stream};
use proto::envd::v1::{
    Entry, GetUploadRequest, WriteEnd, WriteHeader, WritePlace, WriteRequest, write_request::Part,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use crate::{
    files::{chmod, data, head, header, names, of},
    world::{ADA, World, field, noise, soon, until, why},
};

fn end(blake3: Vec<u8>) -> WriteRequest {
    WriteRequest {
        part: Some(Part::End(WriteEnd { blake3 })),
    }
}

fn upload(path: &str, offset: u64) -> WriteHeader {
    WriteHeader {
        upload_id: "up-1".into(),
        offset,
        ..of("ada", path)
    }
}

fn placed(place: WritePlace, offset: u64, path: &str) -> WriteHeader {
    WriteHeader {
        place: place.into(),
        offset,
        ..of("ada", path)
    }
}

fn contents(world: &World, path: &str) -> String {
    fs::read_to_string(world.path(path)).unwrap()
}

impl World {
    async fn send_parts(&self, parts: Vec<WriteRequest>) -> Result<Entry, Status> {
        let answer = soon(self.files().write(stream::iter(parts))).await?;
        Ok(answer.into_inner().entry.unwrap())
    }

    async fn uploaded(&self, path: &str) -> Result<u64, Status> {
        let request = GetUploadRequest {
            path: path.into(),
            user: "ada".into(),
            upload_id: "up-1".into(),
            ..Default::default()
        };
        let answer = soon(self.files().get_upload(request)).await?;
        Ok(answer.into_inner().size_bytes)
    }
}

#[tokio::test]
async fn an_upload_goes_on_where_it_broke_off_and_is_checked_as_a_whole() {
    let world = World::new().await;
    let bytes = noise(700_000);
    let hash = blake3::hash(&bytes).as_bytes().to_vec();
    fs::write(world.path("ada/file"), "old").unwrap();
    chown(world.path("ada/file"), Some(0), Some(0)).unwrap();
    chmod(world.path("ada/file"), 0o606);

    // The client goes in the middle.
    let (parts, stream) = mpsc::channel(4);
    let mut files = world.files();
    let broken = tokio::spawn(async move { files.write(ReceiverStream::new(stream)).await });
    parts.send(head(upload("file", 0))).await.unwrap();
    parts.send(data(&bytes[..300_000])).await.unwrap();
    let draft = world.path("ada/.file.up-1.part");
    until(|| fs::metadata(&draft).is_ok_and(|draft| draft.len() == 300_000)).await;
    assert_eq!(fs::metadata(&draft).unwrap().mode() & 0o777, 0o600);
    // Another may not write to it meanwhile.
    let busy = world
        .send_parts(vec![head(upload("file", 0))])
        .await
        .unwrap_err();
    assert_eq!(why(&busy), (Code::Aborted, "UPLOAD_BUSY".into()));
    broken.abort();
    drop(parts);
    assert!(broken.await.unwrap_err().is_cancelled());
    assert_eq!(contents(&world, "ada/file"), "old");

    // It is known how far it got, and that nothing further is there.
    assert_eq!(world.uploaded("file").await.unwrap(), 300_000);
    let mut beyond = world.send_parts(vec![head(upload("file", 300_001))]).await;
    while beyond
        .as_ref()
        .is_err_and(|status| status.code() == Code::Aborted)
    {
        // The guest has yet to hear that the first client is gone.
        beyond = world.send_parts(vec![head(upload("file", 300_001))]).await;
    }
    assert_eq!(
        why(&beyond.unwrap_err()),
        (Code::OutOfRange, "UPLOAD_OFFSET".into())
    );
    // A stream that ends without its end does not make it whole.
    let unfinished = world
        .send_parts(vec![
            head(upload("file", 300_000)),
            data(&bytes[300_000..400_000]),
        ])
        .await;
    assert_eq!(
        why(&unfinished.unwrap_err()),
        (Code::Aborted, "UPLOAD_BROKE_OFF".into())
    );
    // From before what is there is as good.
    let last = WriteHeader {
        mode: Some(0o640),
        ..upload("file", 250_000)
    };
    let rest = [head(last)]
        .into_iter()
        .chain(bytes[250_000..].chunks(100_000).map(data))
        .chain([end(hash)]);
    let entry = world.send_parts(rest.collect()).await.unwrap();
    assert_eq!((entry.size_bytes, entry.mode), (700_000, 0o640));
    assert_eq!(fs::read(world.path("ada/file")).unwrap(), bytes);
    assert_eq!(
        why(&world.uploaded("file").await.unwrap_err()),
        (Code::NotFound, "UPLOAD_NOT_FOUND".into())
    );
    assert_eq!(names(world.path("ada")), ["file"]);
}

#[tokio::test]
async fn what_came_otherwise_than_it_was_sent_does_not_appear() {
    let world = World::new().await;
    fs::write(world.path("ada/file"), "old").unwrap();
    chown(world.path("ada/file"), Some(ADA), Some(ADA)).unwrap();
    let other = blake3::hash(b"what was meant").as_bytes().to_vec();
    for header in [upload("file", 0), of("ada", "file")] {
        let parts = vec![head(header), data(b"what came"), end(other.clone())];
        let refused = world.send_parts(parts).await.unwrap_err();
        assert_eq!(why(&refused), (Code::DataLoss, "CHECKSUM_MISMATCH".into()));
        assert_eq!(names(world.path("ada")), ["file"]);
        assert_eq!(contents(&world, "ada/file"), "old");
    }
    let right = blake3::hash(b"what came").as_bytes().to_vec();
    let parts = vec![head(of("ada", "file")), data(b"what came"), end(right)];
    world.send_parts(parts).await.unwrap();
    assert_eq!(contents(&world, "ada/file"), "what came");
}

#[tokio::test]
async fn what_another_user_put_in_an_uploads_place_is_not_written_to() {
    let world = World::new().await;
    let shared = world.path("shared");
    fs::create_dir(&shared).unwrap();
    chmod(&shared, 0o777);
    fs::write(world.path("ada/precious"), "mine").unwrap();
    chown(world.path("ada/precious"), Some(ADA), Some(ADA)).unwrap();
    let draft = shared.join(".file.up-1.part");
    let path = shared.join("file").to_string_lossy().into_owned();
    let parts = || vec![head(upload(&path, 0)), data(b"bytes"), end(Vec::new())];

    symlink(world.path("ada/precious"), &draft).unwrap();
    world.send_parts(parts()).await.unwrap_err();
    fs::remove_file(&draft).unwrap();
    fs::hard_link(world.path("ada/precious"), &draft).unwrap();
    assert_eq!(
        why(&world.send_parts(parts()).await.unwrap_err()),
        (Code::AlreadyExists, "PATH_EXISTS".into())
    );
    fs::remove_file(&draft).unwrap();
    // Root's, which everyone may write to: whoever has it open could change it when it is whole.
    fs::write(&draft, "").unwrap();
    chmod(&draft, 0o666);
    assert_eq!(
        why(&world.send_parts(parts()).await.unwrap_err()),
        (Code::AlreadyExists, "PATH_EXISTS".into())
    );
    assert_eq!(contents(&world, "ada/precious"), "mine");
    fs::remove_file(&draft).unwrap();
    world.send_parts(parts()).await.unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"bytes");
}

#[tokio::test]
async fn bytes_go_to_the_end_or_to_their_offset_of_the_file_there_is() {
    let world = World::new().await;
    let append = |text: String| {
        world.send_parts(vec![
            head(placed(WritePlace::Append, 0, "log")),
            data(text.as_bytes()),
        ])
    };
    let entry = append("first\n".into()).await.unwrap();
    assert_eq!((entry.uid, entry.mode), (ADA, 0o644));
    chmod(world.path("ada/log"), 0o620);
    let inode = fs::metadata(world.path("ada/log")).unwrap().ino();
    let lines = join_all((0..20).map(|line| append(format!("line {line}\n")))).await;
    assert!(lines.iter().all(Result::is_ok));
    let text = contents(&world, "ada/log");
    let mut seen: Vec<&str> = text.lines().collect();
    seen.sort_unstable();
    let mut expected: Vec<String> = (0..20).map(|line| format!("line {line}")).collect();
    expected.push("first".into());
    expected.sort();
    assert_eq!(seen, expected, "whole lines, whoever wrote at once");
    let metadata = fs::metadata(world.path("ada/log")).unwrap();
    assert_eq!((metadata.ino(), metadata.mode() & 0o777), (inode, 0o620));

    let at = |offset| placed(WritePlace::AtOffset, offset, "holes");
    world
        .send_parts(vec![head(at(1 << 30)), data(b"end")])
        .await
        .unwrap();
    world
        .send_parts(vec![head(at(2)), data(b"be"), data(b"gin")])
        .await
        .unwrap();
    let holes = fs::File::open(world.path("ada/holes")).unwrap();
    let mut begin = [0; 8];
    std::os::unix::fs::FileExt::read_exact_at(&holes, &mut begin, 0).unwrap();
    assert_eq!(&begin, b"\0\0begin\0");
    assert_eq!(holes.metadata().unwrap().len(), (1 << 30) + 3);
    assert!(
        holes.metadata().unwrap().blocks() < 100,
        "what was left out takes no room"
    );

    fs::write(world.path("ada/roots"), "not hers").unwrap();
    for place in [WritePlace::Append, WritePlace::AtOffset] {
        let refused = world
            .send_parts(vec![head(placed(place, 0, "roots")), data(b"x")])
            .await;
        assert_eq!(
            why(&refused.unwrap_err()),
            (Code::PermissionDenied, "PATH_PERMISSION_DENIED".into())
        );
    }
    nix::unistd::mkfifo(
        &world.path("ada/fifo"),
        nix::sys::stat::Mode::from_bits_truncate(0o666),
    )
    .unwrap();
    let refused = world
        .send_parts(vec![head(placed(WritePlace::Append, 0, "fifo"))])
        .await;
    assert_eq!(why(&refused.unwrap_err()).1, "PATH_NOT_A_FILE");
}

#[tokio::test]
async fn time_and_owner_are_as_asked_where_the_user_may() {
    let world = World::new().await;
    let time = prost_types::Timestamp {
        seconds: 1_000_000_000,
        nanos: 7,
    };
    let asked = |user: &str| WriteHeader {
        modify_time: Some(time),
        uid: Some(ADA),
        gid: Some(7),
        mode: Some(0o4755),
        ..of(user, &world.path("ada/given").to_string_lossy())
    };
    let entry = world.write(asked("root"), b"x").await.unwrap();
    assert_eq!((entry.uid, entry.gid, entry.mode), (ADA, 7, 0o4755));
    assert_eq!(entry.modify_time, Some(time));
    let refused = world.write(asked("ada"), b"y").await.unwrap_err();
    assert_eq!(why(&refused).0, Code::PermissionDenied);
    assert_eq!(contents(&world, "ada/given"), "x");
    assert_eq!(names(world.path("ada")), ["given"]);
    let kept = fs::metadata(world.path("ada/given")).unwrap();
    assert_eq!(kept.permissions().mode() & 0o7777, 0o4755);
}

#[tokio::test]
async fn a_write_that_makes_no_sense_names_its_field() {
    let world = World::new().await;
    let cases = [
        (
            vec![head(WriteHeader {
                offset: 1,
                ..header("x")
            })],
            "offset",
        ),
        (vec![head(placed(WritePlace::Append, 1, "x"))], "offset"),
        (
            vec![head(WriteHeader {
                upload_id: "a/b".into(),
                ..header("x")
            })],
            "upload_id",
        ),
        (
            vec![head(WriteHeader {
                upload_id: "a".repeat(65),
                ..header("x")
            })],
            "upload_id",
        ),
        (
            vec![head(WriteHeader {
                upload_id: "a".into(),
                ..placed(WritePlace::Append, 0, "x")
            })],
            "upload_id",
        ),
        (vec![head(header("x")), end(vec![1; 31])], "blake3"),
        (
            vec![head(placed(WritePlace::AtOffset, 0, "y")), end(vec![1; 32])],
            "blake3",
        ),
        (
            vec![head(header("x")), end(Vec::new()), data(b"more")],
            "end",
        ),
        (vec![head(header("x")), head(header("x"))], "header"),
    ];
    for (parts, name) in cases {
        let refused = world.send_parts(parts).await.unwrap_err();
        assert_eq!(
            (refused.code(), field(&refused).as_str()),
            (Code::InvalidArgument, name)
        );
    }
    assert!(!world.path("root/x").exists());
}
