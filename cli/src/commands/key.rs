//! `sandmesh key`: API keys, for operators of this machine's deployment.

use clap::Subcommand;
use proto::key::v1::{
    CreateKeyRequest, ListKeysRequest, RevokeKeyRequest, key_service_client::KeyServiceClient,
};

use crate::{
    context::{Context, said},
    output,
};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make a key; it is shown once
    Create {
        /// Team that owns what the key creates.
        #[arg(long, default_value = "default")]
        team: String,
        /// A note.
        #[arg(long, default_value = "")]
        description: String,
    },
    /// List keys
    List {
        /// Only of this team.
        #[arg(long, default_value = "")]
        team: String,
    },
    /// Make a key useless within a second
    Revoke {
        /// Public part of the key: smk_ and 8 characters.
        key_id: String,
    },
}

pub(crate) async fn run(context: &Context, command: Command) -> anyhow::Result<()> {
    let mut keys = KeyServiceClient::new(context.operator("gateway-operators")?);
    match command {
        Command::Create { team, description } => {
            let answer = keys
                .create_key(CreateKeyRequest { team, description })
                .await
                .map_err(said)?
                .into_inner();
            output::print(
                context.format(),
                "sandmesh.key.v1.CreateKeyResponse",
                answer,
                |answer| println!("{}", answer.secret),
            )?;
        }
        Command::List { team } => {
            let answer = keys
                .list_keys(ListKeysRequest {
                    team,
                    page_size: 1000,
                    ..Default::default()
                })
                .await
                .map_err(said)?;
            let answer = answer.into_inner();
            output::print(
                context.format(),
                "sandmesh.key.v1.ListKeysResponse",
                answer,
                |answer| {
                    let rows = answer.keys.into_iter().map(|key| {
                        vec![
                            key.key_id,
                            key.team,
                            output::time(key.create_time),
                            output::time(key.revoke_time),
                            key.description,
                        ]
                    });
                    output::table(
                        &["key", "team", "created", "revoked", "description"],
                        rows.collect(),
                    );
                },
            )?;
        }
        Command::Revoke { key_id } => {
            let answer = keys
                .revoke_key(RevokeKeyRequest { key_id })
                .await
                .map_err(said)?
                .into_inner();
            output::print(
                context.format(),
                "sandmesh.key.v1.RevokeKeyResponse",
                answer,
                |_| println!("revoked"),
            )?;
        }
    }
    Ok(())
}
