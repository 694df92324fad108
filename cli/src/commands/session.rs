//! `sandmesh session`.

use std::time::Duration;

use clap::Subcommand;
use proto::session::v1::{
    CreateSessionRequest, ExtendSessionRequest, GetSessionRequest, ListSessionEventsRequest,
    ListSessionsRequest, Network, PortAccess, Resources, Session, SessionState, StopSessionRequest,
    WatchSessionsRequest,
};
use service_kit::config::{parse_bytes, parse_duration};

use super::{pair, wire};
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
    /// The same ID gives the same session.
    #[arg(long, default_value = "")]
    request_id: String,
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
                ..Network::default()
            }),
            request_id: create.request_id,
            ..Self::default()
        }
    }
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
    if let Some(end) = &session.end_reason {
        rows.push(("ended", format!("{}: {}", end.reason, end.message)));
    }
    for (name, value) in rows {
        println!("{name:<10}{value}");
    }
}
