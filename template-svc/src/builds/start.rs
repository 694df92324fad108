//! The first snapshot of a template with a start command: a node boots it, runs the command, and takes the snapshot once it is ready.

use std::{collections::HashMap, time::Duration};

use proto::{
    node::v1::MakeTemplateSnapshotRequest,
    session::v1::Resources,
    template::v1::{StartCommand, Template},
};
use service_kit::errors::reason_of;
use tonic::{Code, Status};

use super::{
    BuildError, Builder, failed,
    lost::{Room, is_room},
    steps::{Lines, Said},
};
use crate::{image::Defaults, start, store::StoredBuild};

/// Booting and storing, beyond what the command may take.
const AROUND: Duration = Duration::from_mins(5);
/// All tries, and waiting for room.
const TRIES_LIMIT: Duration = Duration::from_hours(1);
/// A node that goes away may come back, or is one of several.
const TRIES: u32 = 12;
const TRY_AGAIN: Duration = Duration::from_secs(5);

/// What is started, when that was asked for an image or Dockerfile with these defaults.
pub(super) fn start_command(
    asked: &StartCommand,
    defaults: &Defaults,
) -> Result<StartCommand, BuildError> {
    let mut start = asked.clone();
    let is_of_image = start.argv.is_empty();
    if is_of_image {
        start.argv = defaults.argv();
    }
    if start.argv.is_empty() {
        let message = "a start command is asked for, and neither the request nor ENTRYPOINT or CMD says which";
        return Err(failed("START_COMMAND_UNKNOWN", message));
    }
    if start.cwd.is_empty() {
        start.cwd.clone_from(&defaults.cwd);
    }
    // As in a container of it.
    if is_of_image && start.cwd.is_empty() {
        start.cwd = "/".into();
    }
    if is_of_image && start.user.is_empty() && defaults.user.is_empty() {
        start.user = "root".into();
    }
    // That of the image may be none.
    let checked = start::check(&start);
    checked.map_err(|(field, rule)| failed("START_COMMAND_INVALID", format!("{field}: {rule}")))?;
    Ok(start)
}

fn late(limit: Duration) -> BuildError {
    let message = format!("no node has made the snapshot within {} s", limit.as_secs());
    failed("SNAPSHOT_FAILED", message)
}

impl Builder {
    /// Has a node make the snapshot for the template's own size, and logs what its start command says.
    pub(super) async fn snapshot(
        &self,
        stored: &StoredBuild,
        spec: &Template,
    ) -> Result<(), BuildError> {
        let id = &stored.build.build_id;
        self.store.note_snapshotting(id, stored.attempts).await?;
        self.store
            .log(id, "running the start command until it is ready")
            .await?;
        let timeout = spec.start.as_ref().and_then(|it| it.readiness.as_ref());
        let timeout = timeout.and_then(|it| Duration::try_from(it.timeout?).ok());
        let limit = timeout.unwrap_or(start::LONGEST) + AROUND;
        let team = &stored.template_team;
        let made = self.snapshot_somewhere(id, team, spec, limit);
        let made = tokio::time::timeout(TRIES_LIMIT, made).await;
        made.map_err(|_| late(TRIES_LIMIT))??;
        self.store
            .log(id, "it is ready, and its snapshot is taken")
            .await?;
        Ok(())
    }

    async fn snapshot_somewhere(
        &self,
        id: &str,
        team: &str,
        spec: &Template,
        limit: Duration,
    ) -> Result<(), BuildError> {
        let mut said = Said::default();
        // Nodes that have failed, to be asked last.
        let mut failures = HashMap::new();
        let mut room = Room::default();
        let mut tries = 0;
        loop {
            let made = self.snapshot_once(id, team, spec, &mut failures, &mut said);
            let made = tokio::time::timeout(limit, made).await;
            let status = match made.map_err(|_| late(limit))?? {
                Ok(()) => return Ok(()),
                Err(status) => status,
            };
            if is_room(&status) {
                self.wait_for_room(id, &mut room, &status).await?;
                continue;
            }
            tries += 1;
            let is_final = matches!(
                status.code(),
                Code::FailedPrecondition | Code::InvalidArgument | Code::Unimplemented
            );
            if is_final || tries >= TRIES {
                let reason = reason_of(&status).unwrap_or_else(|| "SNAPSHOT_FAILED".into());
                return Err(failed(reason, status.message()));
            }
            tracing::warn!(build_id = id, %status, "a node did not make a snapshot");
            let why = status.message();
            let line = format!("a node did not make the snapshot, which is tried again: {why}");
            self.store.log(id, &line).await?;
            tokio::time::sleep(TRY_AGAIN).await;
        }
    }

    async fn snapshot_once(
        &self,
        id: &str,
        team: &str,
        spec: &Template,
        failures: &mut HashMap<String, u32>,
        said: &mut Said,
    ) -> Result<Result<(), Status>, BuildError> {
        let request = MakeTemplateSnapshotRequest {
            template: Some(Template {
                // Snapshots are of their team.
                team: team.to_owned(),
                ..spec.clone()
            }),
            resources: Some(Resources {
                vcpus: spec.default_vcpus,
                memory_bytes: spec.default_memory_bytes,
                disk_bytes: spec.default_disk_bytes,
            }),
        };
        let mut output = match self.sessions.make_snapshot(request, failures).await {
            Ok(output) => output,
            Err(status) => return Ok(Err(status)),
        };
        let mut lines = Lines::default();
        let ended = loop {
            let next = tokio::time::timeout(super::steps::LINGER, output.message()).await;
            match next {
                Ok(Ok(Some(piece))) if piece.is_made => break Ok(()),
                Ok(Ok(Some(piece))) => lines.push(piece.is_stderr, &piece.output, said),
                Ok(Ok(None)) => break Err(Status::aborted("what makes the snapshot broke off")),
                Ok(Err(status)) => break Err(status),
                Err(_) => {}
            }
            lines.store_if_due(&self.store, id).await?;
        };
        lines.end(said);
        lines.store(&self.store, id).await?;
        Ok(ended)
    }
}
