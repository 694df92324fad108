//! `sandmesh.template.v1.ArtifactService`.

use std::{io::SeekFrom, pin::Pin};

use bytes::BytesMut;
use futures::{Stream, StreamExt as _};
use proto::template::v1::{
    FetchArtifactRequest, FetchArtifactResponse, artifact_service_server::ArtifactService,
};
use service_kit::errors::{Failure, Reason};
use tokio::io::AsyncSeekExt as _;
use tokio_util::io::ReaderStream;
use tonic::{Code, Request, Response, Status};

use crate::artifact::{ArtifactDigest, Artifacts};

const CHUNK: usize = 512 << 10;

/// Hands out artifacts.
#[derive(Debug)]
pub struct ArtifactApi {
    /// The files.
    pub artifacts: Artifacts,
}

#[tonic::async_trait]
impl ArtifactService for ArtifactApi {
    type FetchArtifactStream =
        Pin<Box<dyn Stream<Item = Result<FetchArtifactResponse, Status>> + Send>>;

    async fn fetch_artifact(
        &self,
        request: Request<FetchArtifactRequest>,
    ) -> Result<Response<Self::FetchArtifactStream>, Status> {
        let FetchArtifactRequest { digest, offset } = request.into_inner();
        let parsed = ArtifactDigest::parse(&digest).ok_or_else(|| {
            Failure::field_invalid("digest", "must be 64 hexadecimal characters").into_status()
        })?;
        let path = self.artifacts.find(&parsed).ok_or_else(|| {
            Failure::new(
                Code::NotFound,
                Reason::new("ARTIFACT_UNKNOWN"),
                "no such artifact",
            )
            .with("digest", &digest)
            .into_status()
        })?;
        let failed = |error: std::io::Error| {
            tracing::error!(%error, digest, "artifact cannot be read");
            Failure::new(
                Code::Internal,
                Reason::INTERNAL,
                "the artifact cannot be read",
            )
            .into_status()
        };
        let mut file = tokio::fs::File::open(path).await.map_err(failed)?;
        file.seek(SeekFrom::Start(offset)).await.map_err(failed)?;
        let chunks = ReaderStream::with_capacity(file, CHUNK).map(|chunk| match chunk {
            Ok(data) => Ok(FetchArtifactResponse {
                data: BytesMut::from(data).freeze(),
            }),
            Err(error) => Err(Status::data_loss(error.to_string())),
        });
        Ok(Response::new(Box::pin(chunks)))
    }
}
