//! `sandmesh node`: nodes, for operators of this machine's deployment.

use clap::Subcommand;
use proto::node::v1::{
    ListNodesRequest, NodeRegistryServiceDrainNodeRequest,
    node_registry_service_client::NodeRegistryServiceClient,
};

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
