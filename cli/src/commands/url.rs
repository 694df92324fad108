//! `sandmesh url`.

use crate::context::Context;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Which session.
    session: String,
    /// Which port of it.
    #[arg(value_parser = clap::value_parser!(u16).range(1..))]
    port: u16,
}

pub(crate) async fn run(context: &Context, options: &Options) -> anyhow::Result<()> {
    let session = context.client()?.get(&options.session).await?;
    println!(
        "http://{}/",
        session.host.replace("{port}", &options.port.to_string())
    );
    Ok(())
}
