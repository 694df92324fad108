//! What is printed: tables for people, protobuf's JSON form for programs.

use std::{
    borrow::Cow,
    io::{self, IsTerminal as _, Write as _},
    sync::LazyLock,
    time::Duration,
};

use anyhow::Context as _;
use comfy_table::{Table, TableStyle};
use indicatif::ProgressBar;
use prost_reflect::{DescriptorPool, DynamicMessage};

const SPINNER_TICK: Duration = Duration::from_millis(100);

/// How to print.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// Columns for people.
    Table,
    /// Protobuf JSON for programs.
    Json,
}

static DESCRIPTORS: LazyLock<Option<DescriptorPool>> =
    LazyLock::new(|| DescriptorPool::decode(proto::DESCRIPTORS).ok());

/// A message in protobuf's JSON form; `name` is its full name.
fn json(name: &str, message: &impl prost::Message) -> anyhow::Result<String> {
    let pool = DESCRIPTORS.as_ref().context("descriptors")?;
    let descriptor = pool
        .get_message_by_name(name)
        .with_context(|| format!("no message {name}"))?;
    let dynamic = DynamicMessage::decode(descriptor, message.encode_to_vec().as_slice())?;
    Ok(serde_json::to_string_pretty(&dynamic)?)
}

/// Prints an answer: in its JSON form for programs, or for people as `table` says.
pub(crate) fn print<M: prost::Message>(
    format: Format,
    name: &str,
    answer: M,
    table: impl FnOnce(M),
) -> anyhow::Result<()> {
    match format {
        Format::Json => line(&json(name, &answer)?)?,
        Format::Table => table(answer),
    }
    Ok(())
}

/// Prints a line at once.
pub(crate) fn line(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{text}")?;
    stdout.flush()
}

/// Whether it is only that whoever read our output has gone.
pub(crate) fn is_unread(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<io::Error>();
    error.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// Prints columns.
pub(crate) fn table(header: &[&str], rows: Vec<Vec<String>>) {
    let mut table = Table::new();
    table
        .load_style(TableStyle::new())
        .set_header(header.iter().map(|name| name.to_uppercase()));
    for row in rows {
        table.add_row(row);
    }
    for line in table.lines() {
        println!("{}", line.trim_end());
    }
}

/// Shows on a terminal that something goes on; clear it when it is done.
pub(crate) fn spinner(message: impl Into<Cow<'static, str>>) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let spinner = ProgressBar::new_spinner().with_message(message);
    spinner.enable_steady_tick(SPINNER_TICK);
    spinner
}

/// A time in UTC, to the second.
pub(crate) fn time(timestamp: Option<prost_types::Timestamp>) -> String {
    timestamp
        .and_then(|timestamp| jiff::Timestamp::from_second(timestamp.seconds).ok())
        .map_or_else(|| "-".into(), |time| time.to_string())
}

/// A state's short name.
pub(crate) fn short<'a>(name: &'a str, prefix: &str) -> &'a str {
    name.strip_prefix(prefix).unwrap_or(name)
}

/// Bytes in the largest unit that keeps them whole enough.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let text = if value.fract() < 0.05 {
        format!("{value:.0}")
    } else {
        format!("{value:.1}")
    };
    format!("{text} {}", UNITS.get(unit).unwrap_or(&"B"))
}

/// What came out of a sandbox, without what would make a terminal do something. Tabs stay.
pub(crate) fn plain(text: &str) -> String {
    let is_harmless = |c: char| c == '\t' || !c.is_control();
    text.chars().fold(String::new(), |mut plain, c| {
        if is_harmless(c) {
            plain.push(c);
        } else {
            plain.extend(c.escape_default());
        }
        plain
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_protobufs_own() {
        let session = proto::session::v1::Session {
            session_id: "abc".into(),
            state: proto::session::v1::SessionState::Running.into(),
            version: 3,
            ..Default::default()
        };
        insta::assert_snapshot!(json("sandmesh.session.v1.Session", &session).unwrap(), @r#"
        {
          "sessionId": "abc",
          "state": "SESSION_STATE_RUNNING",
          "version": "3"
        }
        "#);
    }

    #[test]
    fn bytes_are_readable() {
        assert_eq!(
            [0, 1023, 1024, 1536, 128 << 20].map(bytes),
            ["0 B", "1023 B", "1 KiB", "1.5 KiB", "128 MiB"]
        );
    }
}
