//! Files of build contexts, as they are uploaded.

use std::{
    io::{self, Write as _},
    time::SystemTime,
};

use proto::template::v1::{
    FindMissingFilesRequest, FindMissingFilesResponse, UploadFilesRequest, UploadFilesResponse,
};
use service_kit::{errors::Failure, ids::TeamId};
use tonic::{Status, Streaming};

use super::template::{disk_error, next, too_large};
use crate::{
    artifact::{ArtifactDigest, Incoming},
    context::ContextFiles,
};

/// Digests of one question.
const MOST_ASKED: usize = 10_000;
/// Of one upload: a context, and what says what is in it.
const MOST_FILES: u64 = 100_001;
/// A small file takes a block.
const LEAST_TAKEN: u64 = 4096;

fn digest(field: &'static str, text: &str) -> Result<ArtifactDigest, Status> {
    let rule = "must be 64 hexadecimal characters, each";
    ArtifactDigest::parse(text).ok_or_else(|| Failure::field_invalid(field, rule).into_status())
}

/// Which of those files a team has not uploaded; the others are as if they were uploaded now.
pub(super) async fn find_missing(
    contexts: &ContextFiles,
    team: &TeamId,
    request: FindMissingFilesRequest,
) -> Result<FindMissingFilesResponse, Status> {
    if request.digests.len() > MOST_ASKED {
        let rule = format!("must be at most {MOST_ASKED}");
        return Err(Failure::field_invalid("digests", rule).into());
    }
    let asked = request.digests.iter().map(|text| digest("digests", text));
    let asked = asked.collect::<Result<Vec<_>, _>>()?;
    let files = contexts.of(team).map_err(disk_error)?;
    let look = move || -> io::Result<_> {
        let mut digests = Vec::new();
        for digest in asked {
            if !files.touch(&digest, SystemTime::now())? {
                digests.push(digest.as_str().to_owned());
            }
        }
        Ok(digests)
    };
    let looked = tokio::task::spawn_blocking(look).await;
    let digests = looked
        .map_err(io::Error::other)
        .flatten()
        .map_err(disk_error)?;
    Ok(FindMissingFilesResponse { digests })
}

/// Keeps files as they come.
pub(super) async fn upload(
    contexts: &ContextFiles,
    team: &TeamId,
    mut stream: Streaming<UploadFilesRequest>,
    most: u64,
) -> Result<UploadFilesResponse, Status> {
    let files = contexts.of(team).map_err(disk_error)?;
    let mut answer = UploadFilesResponse::default();
    // Of the disk, as far as it can be known.
    let mut taken = 0;
    let mut begun: Option<(ArtifactDigest, Incoming)> = None;
    while let Some(part) = next(&mut stream).await? {
        if !part.digest.is_empty() {
            let named = digest("digest", &part.digest)?;
            let incoming = files.begin().map_err(disk_error)?;
            keep(begun.replace((named, incoming)), &mut answer)?;
            taken += LEAST_TAKEN;
        }
        let Some((_, incoming)) = &mut begun else {
            let rule = "must be set in the first message";
            return Err(Failure::field_invalid("digest", rule).into());
        };
        answer.size_bytes += part.data.len() as u64;
        taken += part.data.len() as u64;
        if taken > most || answer.files > MOST_FILES {
            return Err(too_large(most));
        }
        // Page-cache writes of at most 1 MiB: not worth a thread.
        incoming.write_all(&part.data).map_err(disk_error)?;
    }
    keep(begun, &mut answer)?;
    Ok(answer)
}

fn keep(
    begun: Option<(ArtifactDigest, Incoming)>,
    answer: &mut UploadFilesResponse,
) -> Result<(), Status> {
    let Some((digest, incoming)) = begun else {
        return Ok(());
    };
    answer.files += 1;
    // There may be thousands; whoever reads one looks whether it is whole.
    if incoming.finish_unsynced(&digest).map_err(disk_error)? {
        return Ok(());
    }
    let digest = digest.as_str();
    let message = format!("is {digest}, which the file is not: it may have changed");
    Err(Failure::field_invalid("digest", message).into())
}
