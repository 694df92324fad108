//! The first snapshot of a template with a start command: a node boots it, runs the command, and takes the snapshot once it is ready.

use std::time::Duration;

use proto::{
    node::v1::MakeTemplateSnapshotRequest,
    session::v1::Resources,
    template::v1::{StartCommand, Template},
};
use service_kit::errors::reason_of;
use tonic::{Code, Status};

use super::{
    BuildError, Builder, failed,
    steps::{Lines, Said},
};
use crate::{image::Defaults, start, store::StoredBuild};

/// Booting and storing, beyond what the command may take.
const AROUND: Duration = Duration::from_mins(5);
/// A node that goes away is one of several.
const TRIES: u32 = 5;
const TRY_AGAIN: Duration = Duration::from_secs(2);

/// What is started, when that was asked for an image or Dockerfile with these defaults.
pub(super) fn start_command(
    asked: &StartCommand,
    defaults: &Defaults,
) -> Result<StartCommand, BuildError> {
    let mut start = asked.clone();
    if start.argv.is_empty() {
        start.argv = defaults.argv();
    }
    if start.argv.is_empty() {
        let message = "a start command is asked for, and neither the request nor ENTRYPOINT or CMD says which";
        return Err(failed("START_COMMAND_UNKNOWN", message));
    }
    if start.cwd.is_empty() {
        start.cwd.clone_from(&defaults.cwd);
    }
    // That of the image may be none.
    let checked = start::check(&start);
    checked.map_err(|(field, rule)| failed("START_COMMAND_INVALID", format!("{field}: {rule}")))?;
    Ok(start)
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
        let made = tokio::time::timeout(limit, self.snapshot_somewhere(id, spec)).await;
        let late = |_| {
            let message = format!("no node has made the snapshot within {} s", limit.as_secs());
            failed("SNAPSHOT_FAILED", message)
        };
        made.map_err(late)??;
        self.store
            .log(id, "it is ready, and its snapshot is taken")
            .await?;
        Ok(())
    }

    async fn snapshot_somewhere(&self, id: &str, spec: &Template) -> Result<(), BuildError> {
        let mut said = Said::default();
        let mut tries = 1;
        loop {
            let status = match self.snapshot_once(id, spec, &mut said).await? {
                Ok(()) => return Ok(()),
                Err(status) => status,
            };
            let goes_away = matches!(
                status.code(),
                Code::Unavailable | Code::Unknown | Code::Internal | Code::Cancelled
            );
            if !goes_away || tries >= TRIES {
                let reason = reason_of(&status).unwrap_or_else(|| "SNAPSHOT_FAILED".into());
                return Err(failed(reason, status.message()));
            }
            tries += 1;
            tracing::warn!(build_id = id, %status, "a node did not make a snapshot");
            tokio::time::sleep(TRY_AGAIN).await;
        }
    }

    async fn snapshot_once(
        &self,
        id: &str,
        spec: &Template,
        said: &mut Said,
    ) -> Result<Result<(), Status>, BuildError> {
        let request = MakeTemplateSnapshotRequest {
            template: Some(spec.clone()),
            resources: Some(Resources {
                vcpus: spec.default_vcpus,
                memory_bytes: spec.default_memory_bytes,
                disk_bytes: spec.default_disk_bytes,
            }),
        };
        let mut output = match self.sessions.make_snapshot(request).await {
            Ok(output) => output,
            Err(status) => return Ok(Err(status)),
        };
        let mut lines = Lines::default();
        let ended = loop {
            let next = tokio::time::timeout(super::steps::LINGER, output.message()).await;
            match next {
                Ok(Ok(Some(piece))) => lines.push(piece.is_stderr, &piece.output, said),
                Ok(Ok(None)) => break Ok(()),
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
