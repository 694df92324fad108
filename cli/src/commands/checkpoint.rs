//! `sandmesh checkpoint`: kept states of a session.

use clap::Subcommand;
use proto::session::v1::{
    CreateCheckpointRequest, DeleteCheckpointRequest, ListCheckpointsResponse,
    RollbackSessionRequest,
};

use crate::{
    context::{Context, said},
    output,
};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Keep memory and disk of a session as they are now; it goes on
    Create {
        /// Which session.
        id: String,
        /// A name for it.
        #[arg(long, default_value = "")]
        name: String,
        /// The same ID gives the same checkpoint.
        #[arg(long, default_value = "")]
        request_id: String,
    },
    /// List a session's checkpoints
    List {
        /// Which session.
        id: String,
    },
    /// Put a session back to a checkpoint: same ID, memory, processes and files of then
    Rollback {
        /// Which session.
        id: String,
        /// To which checkpoint.
        checkpoint: String,
    },
    /// Remove a checkpoint
    Delete {
        /// Which session.
        id: String,
        /// Which checkpoint.
        checkpoint: String,
    },
}

pub(crate) async fn run(context: &Context, command: Command) -> anyhow::Result<()> {
    let client = context.client()?;
    let mut sessions = client.sessions();
    match command {
        Command::Create {
            id,
            name,
            request_id,
        } => {
            let request = CreateCheckpointRequest {
                session_id: id,
                name,
                request_id,
            };
            let spinner = output::spinner("keeping the session");
            let made = sessions.create_checkpoint(request).await;
            spinner.finish_and_clear();
            output::print(
                context.format(),
                "sandmesh.session.v1.CreateCheckpointResponse",
                made.map_err(said)?.into_inner(),
                |answer| println!("{}", answer.checkpoint.unwrap_or_default().checkpoint_id),
            )?;
        }
        Command::List { id } => {
            let whole = ListCheckpointsResponse {
                checkpoints: client.list_checkpoints(&id).await?,
                next_page_token: String::new(),
            };
            output::print(
                context.format(),
                "sandmesh.session.v1.ListCheckpointsResponse",
                whole,
                |whole| {
                    let rows = whole.checkpoints.into_iter().map(|checkpoint| {
                        vec![
                            checkpoint.checkpoint_id,
                            checkpoint.name,
                            output::time(checkpoint.create_time),
                            output::bytes(checkpoint.stored_bytes),
                        ]
                    });
                    output::table(&["checkpoint", "name", "created", "size"], rows.collect());
                },
            )?;
        }
        Command::Rollback { id, checkpoint } => {
            let request = RollbackSessionRequest {
                session_id: id.clone(),
                checkpoint_id: checkpoint.clone(),
            };
            let spinner = output::spinner(format!("putting {id} back"));
            let back = sessions.rollback_session(request).await;
            spinner.finish_and_clear();
            output::print(
                context.format(),
                "sandmesh.session.v1.RollbackSessionResponse",
                back.map_err(said)?.into_inner(),
                |_| println!("{id} is back at {checkpoint}"),
            )?;
        }
        Command::Delete { id, checkpoint } => {
            let request = DeleteCheckpointRequest {
                session_id: id,
                checkpoint_id: checkpoint.clone(),
            };
            let answer = sessions.delete_checkpoint(request).await.map_err(said)?;
            output::print(
                context.format(),
                "sandmesh.session.v1.DeleteCheckpointResponse",
                answer.into_inner(),
                |_| println!("{checkpoint} deleted"),
            )?;
        }
    }
    Ok(())
}
