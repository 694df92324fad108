//! Files of build contexts, as they are uploaded.

use std::{io, time::SystemTime};

use proto::template::v1::{
    FindMissingFilesRequest, FindMissingFilesResponse, UploadFilesRequest, UploadFilesResponse,
};
use service_kit::{errors::Failure, ids::TeamId};
use tonic::{Status, Streaming};

use super::template::{disk_error, next, upload_refused};
use crate::{
    artifact::{ArtifactDigest, Artifacts, Incoming},
    uploads::{Room, UploadError, Uploads},
};

/// Digests of one question.
const MOST_ASKED: usize = 10_000;
/// Of one upload: a context, and what says what is in it.
const MOST_FILES: u64 = 100_001;

fn digest(field: &'static str, text: &str) -> Result<ArtifactDigest, Status> {
    let rule = "must be 64 hexadecimal characters, each";
    ArtifactDigest::parse(text).ok_or_else(|| Failure::field_invalid(field, rule).into_status())
}

/// Which of those files a team has not uploaded; the others are as if they were uploaded now.
pub(super) async fn find_missing(
    uploads: &Uploads,
    team: &TeamId,
    request: FindMissingFilesRequest,
) -> Result<FindMissingFilesResponse, Status> {
    if request.digests.len() > MOST_ASKED {
        let rule = format!("must be at most {MOST_ASKED}");
        return Err(Failure::field_invalid("digests", rule).into());
    }
    let asked = request.digests.iter().map(|text| digest("digests", text));
    let asked = asked.collect::<Result<Vec<_>, _>>()?;
    let files = uploads.of(team).map_err(disk_error)?;
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

/// Where a team's upload goes, and how much of it.
pub(super) async fn begin(uploads: &Uploads, team: &TeamId) -> Result<(Artifacts, Room), Status> {
    let (uploads, team) = (uploads.clone(), team.clone());
    let begin = move || Ok((uploads.of(&team)?, uploads.room(&team)?));
    let begun = tokio::task::spawn_blocking(begin).await;
    let begun = begun.map_err(|error| UploadError::Disk(io::Error::other(error)));
    begun.flatten().map_err(upload_refused)
}

/// Keeps files as they come.
pub(super) async fn upload(
    uploads: &Uploads,
    team: &TeamId,
    mut stream: Streaming<UploadFilesRequest>,
) -> Result<UploadFilesResponse, Status> {
    let (files, mut room) = begin(uploads, team).await?;
    let mut answer = UploadFilesResponse::default();
    let mut begun: Option<(ArtifactDigest, Incoming)> = None;
    while let Some(part) = next(&mut stream).await? {
        if !part.digest.is_empty() {
            let named = digest("digest", &part.digest)?;
            let incoming = room.begin(&files).map_err(upload_refused)?;
            keep(begun.replace((named, incoming)), &mut answer)?;
        }
        let Some((_, incoming)) = &mut begun else {
            let rule = "must be set in the first message";
            return Err(Failure::field_invalid("digest", rule).into());
        };
        answer.size_bytes += part.data.len() as u64;
        if answer.files > MOST_FILES {
            let rule = format!("must be at most {MOST_FILES} files");
            return Err(Failure::field_invalid("digest", rule).into());
        }
        room.write(incoming, &part.data).map_err(upload_refused)?;
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
