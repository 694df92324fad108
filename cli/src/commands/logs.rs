//! `sandmesh logs`: what the kernel of a sandbox, its daemon and its logged processes have said, and its node of it.

use proto::session::v1::StreamSessionLogsResponse;

use crate::{
    context::Context,
    output::{self, Format},
};

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Which session.
    session: String,
    /// Go on with what comes, until the session ends.
    #[arg(short, long)]
    follow: bool,
    /// Only after the message with this number.
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    after: u64,
}

pub(crate) async fn run(context: &Context, options: &Options) -> anyhow::Result<()> {
    let client = context.client()?;
    let mut logs = client.logs(&options.session, options.after, options.follow);
    while let Some(message) = logs.next().await? {
        if message.dropped > 0 {
            eprintln!("sandmesh: {} messages are lost here", message.dropped);
        }
        match context.format() {
            Format::Table => output::line(&line(&message))?,
            json @ Format::Json => {
                let name = "sandmesh.session.v1.StreamSessionLogsResponse";
                output::print(json, name, message, |_| {})?;
            }
        }
    }
    Ok(())
}

fn line(message: &StreamSessionLogsResponse) -> String {
    let time = output::time(message.time);
    let text = String::from_utf8_lossy(&message.data);
    let line = format!("{time} {:<7} {text}", message.source);
    output::plain(&line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_a_line_whatever_is_in_it() {
        let message = StreamSessionLogsResponse {
            sequence: 7,
            time: Some(prost_types::Timestamp {
                seconds: 1_700_000_000,
                nanos: 5,
            }),
            source: "envd".into(),
            data: b"tab\there, \x1b]0;title\x07, \xff and\nanother".to_vec(),
            ..StreamSessionLogsResponse::default()
        };
        insta::assert_snapshot!(line(&message), @r"2023-11-14T22:13:20Z envd    tab	here, \u{1b}]0;title\u{7}, � and\nanother");
    }
}
