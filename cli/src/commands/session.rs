//! `sandmesh session`.

mod update;

use std::time::Duration;

use clap::Subcommand;
use proto::session::v1::{
    CreateSessionRequest, Egress, ExtendSessionRequest, ForkSessionRequest,
    GetSessionMetricsResponse, GetSessionRequest, ListSessionEventsRequest, ListSessionsRequest,
    Network, PauseSessionRequest, PauseSessionResponse, PortAccess, PortReadiness, Resources,
    ResumeSessionRequest, Session, SessionState, StopSessionRequest, UpdateSessionResponse,
    WatchSessionsRequest,
};
use service_kit::config::{parse_bytes, parse_duration};

use super::{pair, wire};
use update::{OnTimeout, Update};

use crate::{
    context::{Context, said},
    output,
};

#[derive(Debug, clap::Args)]
pub(crate) struct Create {
    /// Template: name, name:tag or name@version.
    template: String,
    /// Time to live, such as 30s, 5m or 1h.
    #[arg(long, value_parser = parse_duration)]
    timeout: Option<Duration>,
    /// Memory, such as 512MiB; default: the template's.
    #[arg(long, value_parser = parse_bytes)]
    memory: Option<u64>,
    /// Virtual CPUs; default: the template's.
    #[arg(long)]
    vcpus: Option<u32>,
    /// Writable disk, such as 4GiB; default: the template's.
    #[arg(long, value_parser = parse_bytes)]
    disk: Option<u64>,
    /// Label, any number of times: NAME=VALUE.
    #[arg(short, long, value_parser = pair)]
    label: Vec<(String, String)>,
    /// Environment of every process: NAME=VALUE.
    #[arg(short, long, value_parser = pair)]
    env: Vec<(String, String)>,
    /// Ports only with the session's access token.
    #[arg(long)]
    protect_ports: bool,
    /// No connections to the outside.
    #[arg(long)]
    no_internet: bool,
    /// Let through though there is no internet: network, address, domain or *.domain, any number of times.
    #[arg(long)]
    allow: Vec<String>,
    /// Not let through though there is.
    #[arg(long)]
    deny: Vec<String>,
    /// Per second to the outside, such as 1MiB; default: the node's limit.
    #[arg(long, value_parser = parse_bytes)]
    egress_rate: Option<u64>,
    /// Per second from the outside, such as 1MiB; default: the node's limit.
    #[arg(long, value_parser = parse_bytes)]
    ingress_rate: Option<u64>,
    /// What happens at its deadline.
    #[arg(long, value_enum, default_value = "stop")]
    on_timeout: OnTimeout,
    /// A call wakes it when it is paused.
    #[arg(long)]
    wake: bool,
    /// The same ID gives the same session.
    #[arg(long, default_value = "")]
    request_id: String,
    /// Returns only when somebody listens on this port.
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    wait_port: Option<u16>,
    /// And when a GET of this path there is answered with 2xx or 3xx.
    #[arg(long, value_name = "PATH", requires = "wait_port", default_value = "")]
    wait_http: String,
    /// For how long after the session runs; default: 30s.
    #[arg(long, value_name = "DURATION", requires = "wait_port", value_parser = parse_duration)]
    wait_timeout: Option<Duration>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Create a session and wait until it runs
    Create(Box<Create>),
    /// Show a session
    Get {
        /// Which.
        id: String,
    },
    /// List sessions that are not over
    List {
        /// Those that are over too.
        #[arg(long)]
        all: bool,
        /// Only with this label: NAME=VALUE.
        #[arg(short, long, value_parser = pair)]
        label: Vec<(String, String)>,
    },
    /// Stop a session
    Stop {
        /// Which; any number.
        #[arg(required = true)]
        ids: Vec<String>,
    },
    /// Move a session's deadline to now + DURATION
    Extend {
        /// Which.
        id: String,
        /// Such as 30m.
        #[arg(value_parser = parse_duration)]
        timeout: Duration,
    },
    /// Store a session's memory and disk, and give its node's resources back
    Pause {
        /// Which; any number.
        #[arg(required = true)]
        ids: Vec<String>,
    },
    /// Continue a paused session where it was
    Resume {
        /// Which.
        id: String,
        /// New time to live, such as 30m; default: what was left.
        #[arg(long, value_parser = parse_duration)]
        timeout: Option<Duration>,
    },
    /// Make children of a session with its memory, disk and processes
    Fork {
        /// The parent.
        id: String,
        /// How many.
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100))]
        count: u32,
        /// Time to live of each, such as 5m.
        #[arg(long, value_parser = parse_duration)]
        timeout: Option<Duration>,
        /// The same ID gives the same children.
        #[arg(long, default_value = "")]
        request_id: String,
    },
    /// Change a session while it lives
    Update(Box<Update>),
    /// Show what a session uses
    Metrics {
        /// Which.
        id: String,
    },
    /// Show what happened to a session
    Events {
        /// Which.
        id: String,
    },
    /// Print changes as they happen
    Watch {
        /// Only after this revision.
        #[arg(long, default_value = "")]
        revision: String,
    },
}

pub(crate) async fn run(context: &Context, command: Command) -> anyhow::Result<()> {
    let client = context.client()?;
    let mut sessions = client.sessions();
    match command {
        Command::Create(create) => {
            let request = CreateSessionRequest::from(*create);
            let spinner = output::spinner("starting a session");
            let created = sessions.create_session(request).await;
            spinner.finish_and_clear();
            let answer = created.map_err(said)?.into_inner();
            output::print(
                context.format(),
                "sandmesh.session.v1.CreateSessionResponse",
                answer,
                |answer| println!("{}", answer.session.unwrap_or_default().session_id),
            )?;
        }
        Command::Get { id } => {
            let answer = sessions
                .get_session(GetSessionRequest { session_id: id })
                .await
                .map_err(said)?
                .into_inner();
            output::print(
                context.format(),
                "sandmesh.session.v1.GetSessionResponse",
                answer,
                |answer| show(&answer.session.unwrap_or_default()),
            )?;
        }
        Command::List { all, label } => list(context, &client, all, label).await?,
        Command::Stop { ids } => {
            for id in ids {
                let request = StopSessionRequest {
                    session_id: id.clone(),
                };
                let spinner = output::spinner(format!("stopping {id}"));
                let stopped = sessions.stop_session(request).await;
                spinner.finish_and_clear();
                let answer = stopped.map_err(said)?;
                output::print(
                    context.format(),
                    "sandmesh.session.v1.StopSessionResponse",
                    answer.into_inner(),
                    |_| println!("{id} stopped"),
                )?;
            }
        }
        Command::Extend { id, timeout } => {
            let request = ExtendSessionRequest {
                session_id: id,
                timeout: wire(timeout),
            };
            let answer = sessions
                .extend_session(request)
                .await
                .map_err(said)?
                .into_inner();
            output::print(
                context.format(),
                "sandmesh.session.v1.ExtendSessionResponse",
                answer,
                |answer| {
                    println!(
                        "until {}",
                        output::time(answer.session.unwrap_or_default().deadline)
                    );
                },
            )?;
        }
        Command::Pause { ids } => {
            for id in ids {
                let request = PauseSessionRequest {
                    session_id: id.clone(),
                };
                let spinner = output::spinner(format!("pausing {id}"));
                let paused = sessions.pause_session(request).await;
                spinner.finish_and_clear();
                output::print(
                    context.format(),
                    "sandmesh.session.v1.PauseSessionResponse",
                    paused.map_err(said)?.into_inner(),
                    |PauseSessionResponse { session }| {
                        let stored = session.unwrap_or_default().stored_bytes;
                        println!("{id} paused, {} stored", output::bytes(stored));
                    },
                )?;
            }
        }
        Command::Resume { id, timeout } => {
            let request = ResumeSessionRequest {
                session_id: id.clone(),
                timeout: timeout.and_then(wire),
            };
            let spinner = output::spinner(format!("resuming {id}"));
            let resumed = sessions.resume_session(request).await;
            spinner.finish_and_clear();
            output::print(
                context.format(),
                "sandmesh.session.v1.ResumeSessionResponse",
                resumed.map_err(said)?.into_inner(),
                |answer| {
                    let deadline = answer.session.unwrap_or_default().deadline;
                    println!("{id} runs until {}", output::time(deadline));
                },
            )?;
        }
        Command::Fork {
            id,
            count,
            timeout,
            request_id,
        } => {
            let request = ForkSessionRequest {
                session_id: id,
                count,
                request_id,
                timeout: timeout.and_then(wire),
            };
            fork(context, &client, request).await?;
        }
        Command::Update(update) => {
            let id = update.id.clone();
            let now = if update.keeps_rules() {
                client.get(&id).await?.network
            } else {
                None
            };
            let session = client.update(&id, update.changes(now)).await?;
            output::print(
                context.format(),
                "sandmesh.session.v1.UpdateSessionResponse",
                UpdateSessionResponse {
                    session: Some(session),
                },
                |_| println!("{id} updated"),
            )?;
        }
        Command::Metrics { id } => {
            let used = client.metrics(&id).await?;
            output::print(
                context.format(),
                "sandmesh.session.v1.GetSessionMetricsResponse",
                used,
                |used| print_rows(&used_rows(&used)),
            )?;
        }
        Command::Events { id } => {
            let request = ListSessionEventsRequest {
                session_id: id,
                page_size: 1000,
                ..Default::default()
            };
            let answer = sessions
                .list_session_events(request)
                .await
                .map_err(said)?
                .into_inner();
            output::print(
                context.format(),
                "sandmesh.session.v1.ListSessionEventsResponse",
                answer,
                |answer| {
                    let rows = answer.events.into_iter().map(|event| {
                        vec![
                            event.sequence.to_string(),
                            output::time(event.time),
                            event.r#type,
                            event.actor,
                            event.reason,
                            event.message,
                        ]
                    });
                    output::table(
                        &["#", "time", "event", "by", "reason", "message"],
                        rows.collect(),
                    );
                },
            )?;
        }
        Command::Watch { revision } => {
            let request = WatchSessionsRequest {
                revision,
                ..WatchSessionsRequest::default()
            };
            let mut stream = sessions
                .watch_sessions(request)
                .await
                .map_err(said)?
                .into_inner();
            while let Some(change) = stream.message().await.map_err(said)? {
                output::print(
                    context.format(),
                    "sandmesh.session.v1.WatchSessionsResponse",
                    change,
                    |change| {
                        if let Some(session) = change.session {
                            println!(
                                "{} {} {}",
                                session.session_id,
                                state(&session),
                                change.revision
                            );
                        }
                    },
                )?;
            }
        }
    }
    Ok(())
}

impl From<Create> for CreateSessionRequest {
    fn from(create: Create) -> Self {
        let access = if create.protect_ports {
            PortAccess::Token
        } else {
            PortAccess::Public
        };
        Self {
            template: create.template,
            timeout: create.timeout.and_then(wire),
            metadata: create.label.into_iter().collect(),
            env: create.env.into_iter().collect(),
            resources: Some(Resources {
                vcpus: create.vcpus.unwrap_or_default(),
                memory_bytes: create.memory.unwrap_or_default(),
                disk_bytes: create.disk.unwrap_or_default(),
            }),
            network: Some(Network {
                port_access: access.into(),
                internet_access: Some(!create.no_internet),
                egress: Some(Egress {
                    allow: create.allow,
                    deny: create.deny,
                }),
                egress_bytes_per_second: create.egress_rate.unwrap_or_default(),
                ingress_bytes_per_second: create.ingress_rate.unwrap_or_default(),
            }),
            on_timeout: proto::session::v1::OnTimeout::from(create.on_timeout).into(),
            wake_on_request: create.wake,
            request_id: create.request_id,
            wait_for_port: create.wait_port.map(|port| PortReadiness {
                port: port.into(),
                http_path: create.wait_http,
                timeout: create.wait_timeout.and_then(wire),
            }),
        }
    }
}

/// Forks, and says so if some children did not start.
async fn fork(
    context: &Context,
    client: &sdk::Client,
    request: ForkSessionRequest,
) -> anyhow::Result<()> {
    let spinner = output::spinner("forking a session");
    let forked = client.sessions().fork_session(request).await;
    spinner.finish_and_clear();
    let forked = forked.map_err(said)?.into_inner();
    let failed: Vec<String> = forked
        .failed
        .iter()
        .map(|child| {
            let end = child.end_reason.clone().unwrap_or_default();
            format!("{}: {} ({})", child.session_id, end.message, end.reason)
        })
        .collect();
    output::print(
        context.format(),
        "sandmesh.session.v1.ForkSessionResponse",
        forked,
        |forked| {
            for child in forked.sessions {
                println!("{}", child.session_id);
            }
        },
    )?;
    if failed.is_empty() {
        return Ok(());
    }
    anyhow::bail!(
        "{} children did not start\n{}",
        failed.len(),
        failed.join("\n")
    )
}

async fn list(
    context: &Context,
    client: &sdk::Client,
    all: bool,
    label: Vec<(String, String)>,
) -> anyhow::Result<()> {
    let states = if all { (1..=10).collect() } else { Vec::new() };
    let mut request = ListSessionsRequest {
        states,
        page_size: 1000,
        metadata: label.into_iter().collect(),
        ..ListSessionsRequest::default()
    };
    let mut whole = proto::session::v1::ListSessionsResponse::default();
    loop {
        let page = client
            .sessions()
            .list_sessions(request.clone())
            .await
            .map_err(said)?
            .into_inner();
        whole.sessions.extend(page.sessions);
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    output::print(
        context.format(),
        "sandmesh.session.v1.ListSessionsResponse",
        whole,
        |whole| {
            let rows = whole.sessions.iter().map(|session| {
                vec![
                    session.session_id.clone(),
                    state(session),
                    session.template_version.clone(),
                    output::time(session.create_time),
                    output::time(session.deadline),
                ]
            });
            output::table(
                &["session", "state", "template", "created", "deadline"],
                rows.collect(),
            );
        },
    )?;
    Ok(())
}

fn state(session: &Session) -> String {
    let state = SessionState::try_from(session.state).unwrap_or_default();
    output::short(state.as_str_name(), "SESSION_STATE_").to_lowercase()
}

fn show(session: &Session) {
    let resources = session.resources.unwrap_or_default();
    let size = format!(
        "{} vCPU, {} memory, {} disk",
        resources.vcpus,
        output::bytes(resources.memory_bytes),
        output::bytes(resources.disk_bytes)
    );
    let mut rows = vec![
        ("session", session.session_id.clone()),
        ("state", state(session)),
        ("template", session.template_version.clone()),
        ("node", session.node_id.clone()),
        ("size", size),
        ("created", output::time(session.create_time)),
        ("deadline", output::time(session.deadline)),
        ("ports", format!("http://{}/", session.host)),
    ];
    if !session.parent_session_id.is_empty() {
        rows.push(("parent", session.parent_session_id.clone()));
    }
    if session.stored_bytes > 0 {
        rows.push(("stored", output::bytes(session.stored_bytes)));
    }
    if let Some(end) = &session.end_reason {
        rows.push(("ended", format!("{}: {}", end.reason, end.message)));
    }
    print_rows(&rows);
}

fn used_rows(used: &GetSessionMetricsResponse) -> Vec<(&'static str, String)> {
    let cpu = used.cpu_time.unwrap_or_default();
    vec![
        (
            "cpu",
            format!("{}.{:03} s", cpu.seconds, cpu.nanos / 1_000_000),
        ),
        ("memory", output::bytes(used.memory_bytes)),
        ("private", output::bytes(used.memory_private_bytes)),
        ("shared", output::bytes(used.memory_shared_bytes)),
        ("disk", output::bytes(used.disk_bytes)),
        ("sent", output::bytes(used.network_sent_bytes)),
        ("received", output::bytes(used.network_received_bytes)),
        ("threads", used.host_threads.to_string()),
    ]
}

fn print_rows(rows: &[(&str, String)]) {
    for (name, value) in rows {
        println!("{name:<10}{value}");
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(subcommand)]
        command: Command,
    }

    fn parsed(line: &str) -> Result<Command, clap::Error> {
        let words = ["session"].into_iter().chain(line.split_whitespace());
        Line::try_parse_from(words).map(|line| line.command)
    }

    #[test]
    fn a_fork_makes_from_1_to_100() {
        for (line, expected) in [("fork s", Some(1)), ("fork s --count 100", Some(100))] {
            match parsed(line).unwrap() {
                Command::Fork { count, .. } => assert_eq!(Some(count), expected),
                other => panic!("{other:?}"),
            }
        }
        for line in ["fork s --count 0", "fork s --count 101", "fork", "pause"] {
            assert!(parsed(line).is_err(), "{line}");
        }
    }

    #[test]
    fn a_create_says_what_becomes_of_it_and_where_to_it_may_go() {
        let line = "create base --on-timeout pause --wake --no-internet --allow *.example.com --egress-rate 1MiB";
        let Command::Create(create) = parsed(line).unwrap() else {
            panic!("{line}")
        };
        let request = CreateSessionRequest::from(*create);
        assert_eq!(request.on_timeout(), proto::session::v1::OnTimeout::Pause);
        assert!(request.wake_on_request);
        let network = request.network.unwrap();
        assert_eq!(network.internet_access, Some(false));
        assert_eq!(network.egress.unwrap().allow, ["*.example.com"]);
        assert_eq!(network.egress_bytes_per_second, 1 << 20);
    }

    #[test]
    fn metrics_are_readable() {
        let used = GetSessionMetricsResponse {
            cpu_time: Some(prost_types::Duration {
                seconds: 3,
                nanos: 45_000_000,
            }),
            memory_bytes: 128 << 20,
            ..GetSessionMetricsResponse::default()
        };
        let rows = used_rows(&used);
        assert_eq!(rows[0], ("cpu", "3.045 s".to_owned()));
        assert_eq!(rows[1], ("memory", "128 MiB".to_owned()));
    }
}
