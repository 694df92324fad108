//! The files of one session's log: `1`, `2`, ..., each a row of messages with their lengths before them. The newest two are kept.
//!
//! A write that was cut, by a full disk or the host's end, leaves half a message at the end of a file: readers do not see it, and the next
//! writer cuts it off. Nothing is synced: what node-svc wrote survives its own death, and that of the host need not be.

use std::{
    fs::{self, File},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
    time::SystemTime,
};

use prost::Message as _;
use prost_types::Timestamp;
use proto::session::v1::StreamSessionLogsResponse;

use super::Anchor;

/// Of one file, in bytes.
const SEGMENT: u64 = 2 << 20;
/// What a reader takes at once; more than the longest message has.
const PAGE: usize = 256 << 10;

/// A message as it is kept.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Kept {
    /// Its number in the session; never 0.
    #[prost(uint64, tag = "1")]
    pub(super) sequence: u64,
    #[prost(message, optional, tag = "2")]
    pub(super) time: Option<Timestamp>,
    #[prost(string, tag = "3")]
    pub(super) source: String,
    #[prost(bytes = "vec", tag = "4")]
    pub(super) data: Vec<u8>,
    #[prost(uint32, tag = "5")]
    pub(super) severity: u32,
    #[prost(uint64, tag = "6")]
    pub(super) guest_sequence: u64,
    #[prost(string, tag = "7")]
    pub(super) event: String,
}

impl Kept {
    pub(super) fn shown(self, dropped: u64) -> StreamSessionLogsResponse {
        StreamSessionLogsResponse {
            sequence: self.sequence,
            time: self.time,
            source: self.source,
            data: self.data,
            dropped,
            severity: self.severity,
        }
    }
}

/// Numbers of the files, oldest first.
fn numbers(folder: &Path) -> io::Result<Vec<u64>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut numbers = Vec::new();
    for entry in entries {
        if let Some(number) = entry?
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        {
            numbers.push(number);
        }
    }
    numbers.sort_unstable();
    Ok(numbers)
}

fn path(folder: &Path, number: u64) -> PathBuf {
    folder.join(number.to_string())
}

/// Whole messages at the beginning of `bytes` with numbers that grow, and how long they are.
fn decode(bytes: &[u8], mut after: u64) -> (Vec<Kept>, usize) {
    let mut rest = bytes;
    let mut messages = Vec::new();
    let mut whole = 0;
    while let Ok(message) = Kept::decode_length_delimited(&mut rest) {
        if message.sequence <= after {
            break;
        }
        after = message.sequence;
        whole = bytes.len() - rest.len();
        messages.push(message);
    }
    (messages, whole)
}

/// All that is kept. Blocking.
pub(super) fn all(folder: &Path) -> io::Result<Vec<Kept>> {
    let mut cursor = Cursor::after(0);
    let mut all = Vec::new();
    loop {
        let page = cursor.page(folder)?;
        if page.is_empty() {
            return Ok(all);
        }
        all.extend(page);
    }
}

/// The last number; `None` if there are no files. Blocking.
pub(super) fn last(folder: &Path) -> io::Result<Option<u64>> {
    if numbers(folder)?.is_empty() {
        return Ok(None);
    }
    Ok(Some(all(folder)?.last().map_or(0, |kept| kept.sequence)))
}

/// Bytes in all, and when it was last written. Blocking.
pub(super) fn size(folder: &Path) -> io::Result<(u64, SystemTime)> {
    let mut bytes = 0;
    let mut newest = fs::metadata(folder)?.modified()?;
    for number in numbers(folder)? {
        let metadata = fs::metadata(path(folder, number))?;
        bytes += metadata.len();
        newest = newest.max(metadata.modified()?);
    }
    Ok((bytes, newest))
}

/// A reader's place.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cursor {
    seen: u64,
    number: u64,
    offset: u64,
}

impl Cursor {
    pub(super) fn after(seen: u64) -> Self {
        Self {
            seen,
            number: 0,
            offset: 0,
        }
    }

    pub(super) fn seen(&self) -> u64 {
        self.seen
    }

    /// Messages after those seen; none if there are none now. Blocking.
    pub(super) fn page(&mut self, folder: &Path) -> io::Result<Vec<Kept>> {
        for number in numbers(folder)? {
            if number < self.number {
                continue;
            }
            if number > self.number {
                (self.number, self.offset) = (number, 0);
            }
            let messages = self.read_on(folder)?;
            if !messages.is_empty() {
                return Ok(messages);
            }
        }
        Ok(Vec::new())
    }

    fn read_on(&mut self, folder: &Path) -> io::Result<Vec<Kept>> {
        let mut file = match File::open(path(folder, self.number)) {
            // Made room for a newer one, after the folder was read.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            file => file?,
        };
        loop {
            file.seek(SeekFrom::Start(self.offset))?;
            let mut bytes = Vec::new();
            (&file).take(PAGE as u64).read_to_end(&mut bytes)?;
            let (mut messages, whole) = decode(&bytes, 0);
            if whole == 0 {
                return Ok(Vec::new());
            }
            self.offset += whole as u64;
            messages.retain(|message| message.sequence > self.seen);
            if let Some(last) = messages.last() {
                self.seen = last.sequence;
                return Ok(messages);
            }
        }
    }
}

/// Adds messages.
#[derive(Debug)]
pub(super) struct Writer {
    folder: PathBuf,
    file: Option<File>,
    number: u64,
    size: u64,
    last: u64,
    lost: u64,
    anchor: Option<Anchor>,
}

impl Writer {
    /// Goes on where the last writer was. Makes nothing on the disk. Blocking.
    pub(super) fn open(folder: PathBuf) -> io::Result<Self> {
        let mut writer = Self {
            file: None,
            number: 0,
            size: 0,
            last: 0,
            lost: 0,
            anchor: None,
            folder,
        };
        for number in numbers(&writer.folder)? {
            let bytes = fs::read(path(&writer.folder, number))?;
            let (messages, whole) = decode(&bytes, writer.last);
            (writer.number, writer.size) = (number, whole as u64);
            for message in messages {
                writer.note(&message);
            }
        }
        if writer.number > 0 {
            let file = File::options()
                .append(true)
                .open(path(&writer.folder, writer.number))?;
            file.set_len(writer.size)?;
            writer.file = Some(file);
        }
        Ok(writer)
    }

    fn note(&mut self, message: &Kept) {
        self.last = message.sequence;
        if message.guest_sequence > 0 {
            self.anchor = Some((message.guest_sequence, message.time));
        }
    }

    pub(super) fn last(&self) -> u64 {
        self.last
    }

    pub(super) fn anchor(&self) -> Option<Anchor> {
        self.anchor
    }

    /// Counts messages that will never be here.
    pub(super) fn lose(&mut self, count: u64) {
        self.lost += count;
    }

    pub(super) fn is_losing(&self) -> bool {
        self.lost > 0
    }

    /// Adds a message, whole or not at all, and gives it its number. Blocking.
    pub(super) fn append(&mut self, message: &mut Kept) -> io::Result<()> {
        message.sequence = self.last + self.lost + 1;
        let bytes = message.encode_length_delimited_to_vec();
        if self.file.is_none() || self.size + bytes.len() as u64 > SEGMENT {
            self.turn()?;
        }
        let Some(file) = &mut self.file else {
            return Err(io::ErrorKind::NotFound.into());
        };
        if let Err(error) = file.write_all(&bytes) {
            // Half of it may be there.
            file.set_len(self.size)?;
            return Err(error);
        }
        self.size += bytes.len() as u64;
        self.lost = 0;
        self.note(message);
        Ok(())
    }

    /// Begins another file; the last but one goes.
    fn turn(&mut self) -> io::Result<()> {
        fs::create_dir_all(&self.folder)?;
        let number = self.number + 1;
        let file = File::options()
            .append(true)
            .create(true)
            .truncate(false)
            .open(path(&self.folder, number))?;
        file.set_len(0)?;
        (self.file, self.number, self.size) = (Some(file), number, 0);
        for old in numbers(&self.folder)? {
            if old + 1 < number {
                fs::remove_file(path(&self.folder, old))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(text: &str, guest_sequence: u64) -> Kept {
        Kept {
            data: text.as_bytes().to_vec(),
            guest_sequence,
            time: Some(Timestamp::default()),
            ..Kept::default()
        }
    }

    fn texts(messages: &[Kept]) -> Vec<(u64, &str)> {
        let texts = messages.iter();
        texts
            .map(|kept| (kept.sequence, str::from_utf8(&kept.data).unwrap()))
            .collect()
    }

    #[test]
    fn a_writer_goes_on_where_the_last_was_and_cuts_off_what_is_not_whole() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = Writer::open(folder.path().to_owned()).unwrap();
        assert_eq!(last(folder.path()).unwrap(), None);
        writer.append(&mut message("one", 7)).unwrap();
        writer.append(&mut message("two", 0)).unwrap();
        drop(writer);
        let file = path(folder.path(), 1);
        let whole = fs::read(&file).unwrap();
        for rest in [&whole[..whole.len() / 2], &[0; 100], &[0xff; 100]] {
            fs::write(&file, [&whole, rest].concat()).unwrap();
            assert_eq!(last(folder.path()).unwrap(), Some(2));
            let mut writer = Writer::open(folder.path().to_owned()).unwrap();
            assert_eq!((writer.last(), writer.anchor().unwrap().0), (2, 7));
            assert_eq!(fs::read(&file).unwrap(), whole);
            writer.append(&mut message("three", 0)).unwrap();
            let all = all(folder.path()).unwrap();
            assert_eq!(texts(&all), [(1, "one"), (2, "two"), (3, "three")]);
        }
    }

    #[test]
    fn what_is_kept_is_bounded_and_readers_go_on_over_what_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = Writer::open(folder.path().to_owned()).unwrap();
        let mut slow = Cursor::after(0);
        let mut quick = Cursor::after(0);
        let text = "x".repeat(8 << 10);
        let mut expected = 1;
        for number in 1..=1000 {
            writer.append(&mut message(&text, number)).unwrap();
            if number == 1 {
                assert_eq!(slow.page(folder.path()).unwrap().len(), 1);
            }
            for kept in quick.page(folder.path()).unwrap() {
                assert_eq!(kept.sequence, expected);
                expected += 1;
            }
        }
        assert_eq!(expected, 1001);
        let (bytes, _) = size(folder.path()).unwrap();
        assert!(bytes <= 2 * SEGMENT && bytes > SEGMENT, "{bytes}");
        let page = slow.page(folder.path()).unwrap();
        assert!(page[0].sequence > 400 && page.len() < 40);
        let mut seen = page.last().unwrap().sequence;
        while let page = slow.page(folder.path()).unwrap()
            && !page.is_empty()
        {
            assert_eq!(page[0].sequence, seen + 1);
            seen = page.last().unwrap().sequence;
        }
        assert_eq!(seen, 1000);
    }

    #[test]
    fn what_is_lost_has_numbers() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = Writer::open(folder.path().to_owned()).unwrap();
        writer.append(&mut message("one", 1)).unwrap();
        writer.lose(3);
        writer.append(&mut message("five", 5)).unwrap();
        let all = all(folder.path()).unwrap();
        assert_eq!(texts(&all), [(1, "one"), (5, "five")]);
    }
}
