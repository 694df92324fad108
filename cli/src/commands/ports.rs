//! `sandmesh ports` and `sandmesh port-forward`.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use anyhow::Context as _;
use proto::envd::v1::{
    Listener, PortServiceListResponse, PortServiceWatchResponse, WaitForPortResponse,
};
use service_kit::config::parse_duration;
use tokio::net::TcpListener;

use crate::{
    context::Context,
    output::{self, Format},
};

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Which session.
    session: String,
    /// Go on, and print each change.
    #[arg(long, conflicts_with = "wait")]
    watch: bool,
    /// Wait until somebody listens on this port.
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    wait: Option<u16>,
    /// And until a GET of this path of it is answered with 2xx or 3xx.
    #[arg(long, value_name = "PATH", requires = "wait")]
    http: Option<String>,
    /// But no longer than this, such as 2m; default: 30s.
    #[arg(long, value_parser = parse_duration, requires = "wait")]
    timeout: Option<Duration>,
}

pub(crate) async fn run(context: &Context, options: Options) -> anyhow::Result<()> {
    let sandbox = context.sandbox(&options.session).await?;
    if let Some(port) = options.wait {
        let waiting = sandbox.wait_for_port(port, options.http.as_deref(), options.timeout);
        return output::print(
            context.format(),
            "sandmesh.envd.v1.WaitForPortResponse",
            waiting.await?,
            |WaitForPortResponse { listener, .. }| table(listener.into_iter()),
        );
    }
    if !options.watch {
        let listeners = sandbox.ports().await?;
        return output::print(
            context.format(),
            "sandmesh.envd.v1.PortServiceListResponse",
            PortServiceListResponse { listeners },
            |answer| table(answer.listeners.into_iter()),
        );
    }
    let mut watch = sandbox.watch_ports();
    loop {
        let changes = watch.next().await?;
        match context.format() {
            Format::Table => {
                for line in lines(&changes) {
                    output::line(&line)?;
                }
            }
            json @ Format::Json => {
                let name = "sandmesh.envd.v1.PortServiceWatchResponse";
                output::print(json, name, changes, |_| {})?;
            }
        }
    }
}

fn table(listeners: impl Iterator<Item = Listener>) {
    let rows = listeners.map(|listener| {
        vec![
            output::plain(&listener.address),
            listener.port.to_string(),
            or_dash(&pid(&listener)),
            or_dash(&output::plain(&listener.command)),
        ]
    });
    output::table(&["address", "port", "pid", "command"], rows.collect());
}

fn or_dash(text: &str) -> String {
    if text.is_empty() { "-" } else { text }.to_owned()
}

/// Empty if not known.
fn pid(listener: &Listener) -> String {
    match listener.pid {
        0 => String::new(),
        pid => pid.to_string(),
    }
}

/// A line for each: + for a new one, - for one that is gone.
fn lines(changes: &PortServiceWatchResponse) -> Vec<String> {
    let gone = changes.closed.iter().map(|listener| ('-', listener));
    let new = changes.opened.iter().map(|listener| ('+', listener));
    let line = |(sign, one): (char, &Listener)| {
        let (pid, command) = (pid(one), &one.command);
        let line = format!("{sign} {} {} {pid} {command}", one.address, one.port);
        output::plain(line.trim_end())
    };
    gone.chain(new).map(line).collect()
}

#[derive(Debug, clap::Args)]
pub(crate) struct Forward {
    /// Which session.
    session: String,
    /// Port of it, after a port of this machine if that is another: 8080 or 9000:8080 (0 takes any)
    #[arg(value_name = "[LOCAL:]PORT", value_parser = ports)]
    ports: Ports,
    /// Address of this machine to listen on.
    #[arg(long, default_value_t = Ipv4Addr::LOCALHOST.into())]
    address: std::net::IpAddr,
}

/// Which port of this machine is which port of the sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ports {
    local: u16,
    remote: u16,
}

fn ports(text: &str) -> Result<Ports, String> {
    let number = |text: &str| {
        let number = text.parse::<u16>();
        number.map_err(|_| format!("`{text}` is not a port"))
    };
    let (local, remote) = text.split_once(':').unwrap_or((text, text));
    let ports = Ports {
        local: number(local)?,
        remote: number(remote)?,
    };
    match ports.remote {
        0 => Err("no sandbox has a port 0".into()),
        _ => Ok(ports),
    }
}

/// Carries connections until it is ended.
pub(crate) async fn forward(context: &Context, options: Forward) -> anyhow::Result<()> {
    let Ports { local, remote } = options.ports;
    let sandbox = context.sandbox(&options.session).await?;
    let asked = SocketAddr::new(options.address, local);
    let listener = TcpListener::bind(asked)
        .await
        .with_context(|| format!("listening on {asked}"))?;
    let here = listener.local_addr()?;
    match context.format() {
        Format::Json => {
            let told = serde_json::json!({"address": here, "port": remote});
            output::line(&told.to_string())?;
        }
        Format::Table => {
            output::line(&format!("{here} is port {remote} of {}", options.session))?;
        }
    }
    let failed = move |_, error| eprintln!("sandmesh: port {remote}: {error}");
    sandbox.forward_all(remote, listener, failed).await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_the_same_on_both_sides_or_each_is_named() {
        let both = |local, remote| Ok(Ports { local, remote });
        assert_eq!(ports("8080"), both(8080, 8080));
        assert_eq!(ports("9000:8080"), both(9000, 8080));
        assert_eq!(ports("0:80"), both(0, 80));
        for wrong in [
            "", ":", ":80", "80:", "0", "80:0", "65536", "1:2:3", "http", "-1",
        ] {
            assert!(ports(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn changes_are_a_line_each_and_cannot_write_over_others() {
        let listener = |port, pid, command: &str| Listener {
            address: "127.0.0.1".into(),
            port,
            pid,
            command: command.into(),
        };
        let changes = PortServiceWatchResponse {
            opened: vec![listener(80, 7, "a\u{1b}[2Jb\nc"), listener(81, 0, "")],
            closed: vec![listener(82, 9, "nc")],
        };
        insta::assert_snapshot!(lines(&changes).join("\n"), @r"
        - 127.0.0.1 82 9 nc
        + 127.0.0.1 80 7 a\u{1b}[2Jb\nc
        + 127.0.0.1 81
        ");
    }
}
