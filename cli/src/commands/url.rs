//! `sandmesh url`.

use std::time::Duration;

use anyhow::{Context as _, bail};
use sdk::{FileUrl, Use};
use service_kit::config::parse_duration;

use super::cp::{Side, side};
use crate::context::Context;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// A session, for one of its ports; or a file or folder of it.
    #[arg(value_name = "ID | ID:PATH")]
    target: String,
    /// Which port of the session.
    #[arg(value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,
    /// Of a file: for writing it, by PUT, instead of reading.
    #[arg(long)]
    put: bool,
    /// Of a file: for how long, at most 7 days.
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = parse_duration)]
    valid: Duration,
    /// Of a folder: tar or zip.
    #[arg(long, default_value = "", value_parser = ["", "tar", "zip"])]
    archive: String,
    /// Of a file: user in the sandbox; default: the template's.
    #[arg(short, long, default_value = "")]
    user: String,
}

pub(crate) async fn run(context: &Context, options: &Options) -> anyhow::Result<()> {
    let client = context.client()?;
    if let Side::Sandbox { id, path } = side(&options.target) {
        if options.port.is_some() {
            bail!("give a port or a path, not both");
        }
        let session = client.get(id).await?;
        let file = FileUrl {
            path: path.to_owned(),
            user: options.user.clone(),
            archive: options.archive.clone(),
            what: if options.put { Use::Write } else { Use::Read },
            valid: options.valid,
        };
        println!("{}", file.of(&session));
        return Ok(());
    }
    let port = options.port.context("which port, or ID:PATH of a file")?;
    let session = client.get(&options.target).await?;
    println!(
        "http://{}/",
        session.host.replace("{port}", &port.to_string())
    );
    Ok(())
}
