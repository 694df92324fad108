//! `sandmesh node`: nodes, for operators of this machine's deployment.

use anyhow::Context as _;
use clap::Subcommand;
use proto::node::v1::{
    ListNodesRequest, ListSessionsRequest, NodeRegistryServiceDrainNodeRequest,
    node_registry_service_client::NodeRegistryServiceClient,
    node_service_client::NodeServiceClient,
};
use service_kit::mesh::MeshChannel;

use crate::{
    context::{Context, said},
    output,
};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List nodes
    List {
        /// Dead ones too.
        #[arg(long)]
        all: bool,
    },
    /// List what a node hosts, with the envd of each: `*` marks one that guests do not boot with any more
    Sessions {
        /// Which.
        node: String,
    },
    /// Make a node take no new sessions; those it has run out
    Drain {
        /// Which.
        node: String,
        /// Pause what runs on it.
        #[arg(long, conflicts_with = "undo")]
        pause: bool,
        /// Let it take sessions again.
        #[arg(long)]
        undo: bool,
    },
}

pub(crate) async fn run(context: &Context, command: Command) -> anyhow::Result<()> {
    let mut registry = NodeRegistryServiceClient::new(context.operator("session")?);
    let all = match command {
        Command::List { all } => all,
        Command::Sessions { node } => return sessions(context, registry, &node).await,
        Command::Drain { node, pause, undo } => {
            let request = NodeRegistryServiceDrainNodeRequest {
                node_id: node.clone(),
                draining: !undo,
                pause,
            };
            let spinner = output::spinner(format!("telling {node}"));
            let drained = registry.drain_node(request).await;
            spinner.finish_and_clear();
            return output::print(
                context.format(),
                "sandmesh.node.v1.NodeRegistryServiceDrainNodeResponse",
                drained.map_err(said)?.into_inner(),
                |answer| {
                    let takes = if undo {
                        "takes sessions again"
                    } else {
                        "takes no new sessions"
                    };
                    println!(
                        "{node} {takes}; {} paused now, {} running",
                        answer.paused, answer.running
                    );
                },
            );
        }
    };
    let request = ListNodesRequest {
        include_dead: all,
        ..ListNodesRequest::default()
    };
    let answer = registry
        .list_nodes(request)
        .await
        .map_err(said)?
        .into_inner();
    output::print(
        context.format(),
        "sandmesh.node.v1.ListNodesResponse",
        answer,
        |answer| {
            let rows = answer.nodes.into_iter().map(|node| {
                let (used, total) = (
                    node.used.unwrap_or_default(),
                    node.total.unwrap_or_default(),
                );
                vec![
                    node.node_id.clone(),
                    node.home_tag.clone(),
                    output::short(node.state().as_str_name(), "NODE_STATE_").to_lowercase(),
                    output::short(node.vmm().as_str_name(), "VMM_KIND_").to_lowercase(),
                    format!("{}/{}", used.sessions, total.sessions),
                    format!(
                        "{}/{}",
                        output::bytes(used.memory_bytes),
                        output::bytes(total.memory_bytes)
                    ),
                    node.ingress_address.clone(),
                ]
            });
            output::table(
                &[
                    "node", "tag", "state", "vmm", "sessions", "memory", "ingress",
                ],
                rows.collect(),
            );
        },
    )?;
    Ok(())
}

async fn sessions(
    context: &Context,
    mut registry: NodeRegistryServiceClient<MeshChannel>,
    node: &str,
) -> anyhow::Result<()> {
    let nodes = registry.list_nodes(ListNodesRequest::default()).await;
    let nodes = nodes.map_err(said)?.into_inner().nodes;
    let found = nodes.iter().find(|known| known.node_id == node);
    let found = found.with_context(|| format!("no node {node} that lives"))?;
    let mut node = NodeServiceClient::new(context.at(&found.internal_address)?);
    let answer = node.list_sessions(ListSessionsRequest {}).await;
    output::print(
        context.format(),
        "sandmesh.node.v1.ListSessionsResponse",
        answer.map_err(said)?.into_inner(),
        |answer| {
            let rows = answer.sessions.into_iter().map(|session| {
                let mark = if session.envd_outdated { "*" } else { "" };
                let state = output::short(session.state().as_str_name(), "SESSION_STATE_");
                vec![
                    session.session_id.clone(),
                    state.to_lowercase(),
                    output::bytes(session.resources.unwrap_or_default().memory_bytes),
                    output::bytes(session.stored_bytes),
                    format!("{}{mark}", session.envd),
                ]
            });
            let columns = ["session", "state", "memory", "stored", "envd"];
            output::table(&columns, rows.collect());
        },
    )
}
