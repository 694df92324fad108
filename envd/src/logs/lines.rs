//! Output of a process as messages of the log: a message per line, and one that is longer in several.

use std::{sync::Arc, time::SystemTime};

use super::{LOGS, LONGEST, Logs, Message, Source};

/// Those of syslog(3) that other loggers give to stdout and stderr, such as systemd-cat(1) and the journald driver of Docker.
const STDOUT: u8 = 6;
const STDERR: u8 = 3;

/// Passes one stream of a process on.
#[derive(Debug)]
pub(crate) struct Lines {
    logs: &'static Logs,
    process: Arc<str>,
    severity: u8,
    /// A line that has not ended yet.
    begun: Vec<u8>,
    /// A line as long as may be was put: if it ends now, no empty one follows.
    was_cut: bool,
}

impl Lines {
    pub(crate) fn of(process: &str, is_stderr: bool) -> Self {
        Self::into(&LOGS, process, is_stderr)
    }

    fn into(logs: &'static Logs, process: &str, is_stderr: bool) -> Self {
        Self {
            logs,
            process: process.into(),
            severity: if is_stderr { STDERR } else { STDOUT },
            begun: Vec::new(),
            was_cut: false,
        }
    }

    /// Bytes in their order.
    pub(crate) fn take(&mut self, mut bytes: &[u8]) {
        while let Some(first) = bytes.first() {
            if std::mem::take(&mut self.was_cut) && *first == b'\n' {
                bytes = &bytes[1..];
                continue;
            }
            let room = LONGEST - self.begun.len();
            let part = bytes.get(..room).unwrap_or(bytes);
            let end = part.iter().position(|byte| *byte == b'\n');
            let length = end.unwrap_or(part.len());
            self.begun.extend_from_slice(&bytes[..length]);
            bytes = &bytes[length + usize::from(end.is_some())..];
            if end.is_some() {
                // Terminals end lines by both (termios(3), ONLCR).
                self.begun.pop_if(|last| *last == b'\r');
                self.put();
            } else if self.begun.len() == LONGEST {
                self.was_cut = true;
                self.put();
            }
        }
    }

    fn put(&mut self) {
        self.logs.put(Message {
            source: Source::Process(Arc::clone(&self.process)),
            severity: self.severity,
            time: SystemTime::now(),
            text: std::mem::take(&mut self.begun),
            about: None,
        });
    }
}

impl Drop for Lines {
    /// The last line may have no end.
    fn drop(&mut self) {
        if !self.begun.is_empty() {
            self.put();
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::{FutureExt as _, StreamExt as _};

    use super::*;

    fn lines(parts: &[&[u8]]) -> Vec<Vec<u8>> {
        let logs = Box::leak(Box::new(Logs::new(1 << 20)));
        let mut lines = Lines::into(logs, "build", true);
        for part in parts {
            lines.take(part);
        }
        drop(lines);
        let answers = logs.read(0, false).unwrap().collect::<Vec<_>>();
        let answers = answers.now_or_never().unwrap();
        let text = |answer: proto::envd::v1::StreamLogsResponse| {
            assert_eq!((&*answer.source, answer.severity), ("process:build", 3));
            answer.data
        };
        answers.into_iter().map(text).collect()
    }

    #[test]
    fn a_line_is_a_message_however_it_comes() {
        let expected: [&[u8]; 4] = [b"one", b"", b"two \xff", b"no end"];
        let whole: &[u8] = b"one\n\ntwo \xff\r\nno end";
        assert_eq!(lines(&[whole]), expected);
        let bytes: Vec<&[u8]> = whole.chunks(1).collect();
        assert_eq!(lines(&bytes), expected);
        assert!(lines(&[]).is_empty());
    }

    #[test]
    fn a_long_line_is_several_messages() {
        let long = vec![b'x'; LONGEST * 2];
        assert_eq!(
            lines(&[&long, b"\n"])[..],
            [&long[..LONGEST], &long[..LONGEST]]
        );
        let longer = [&long[..], b"yz\nend"].concat();
        assert_eq!(lines(&[&longer])[2..], [b"yz".to_vec(), b"end".to_vec()]);
    }
}
