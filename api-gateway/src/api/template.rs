//! `sandmesh.template.v1.TemplateService`, passed on to template-svc.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
};

use futures::{Stream, TryStreamExt as _};
use proto::template::v1::{
    BuildTemplateRequest, BuildTemplateResponse, CancelBuildRequest, CancelBuildResponse,
    DeleteTemplateRequest, DeleteTemplateResponse, FindMissingFilesRequest,
    FindMissingFilesResponse, GetBuildRequest, GetBuildResponse, GetTemplateRequest,
    GetTemplateResponse, ListTemplatesRequest, ListTemplatesResponse, StreamBuildLogsRequest,
    StreamBuildLogsResponse, TagTemplateRequest, TagTemplateResponse, UploadFilesRequest,
    UploadFilesResponse, UploadSourceRequest, UploadSourceResponse,
    template_service_client::TemplateServiceClient, template_service_server::TemplateService,
};
use service_kit::mesh::MeshChannel;
use tonic::{Request, Response, Status, Streaming};

use crate::door::{Door, Limit, outward};

/// Templates, for clients.
#[derive(Debug)]
pub struct TemplateApi {
    /// The door.
    pub door: Door,
    /// template-svc.
    pub templates: TemplateServiceClient<MeshChannel>,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// What has ended a client's stream early.
#[derive(Clone, Default)]
struct Broken(Arc<Mutex<Option<Status>>>);

impl Broken {
    fn note(&self, status: Status) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(status);
    }

    /// It comes before the answer to what was sent until then.
    fn or<T>(&self, answer: Result<T, Status>) -> Result<T, Status> {
        match self.0.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(status) => Err(status),
            None => answer,
        }
    }
}

/// A stream as the other side takes it: of parts alone.
fn parts_of<T: Send + 'static>(
    request: Request<Streaming<T>>,
) -> (Request<impl Stream<Item = T> + Send + 'static>, Broken) {
    let broken = Broken::default();
    let note = broken.clone();
    let request = request.map(|stream| {
        tokio_stream::StreamExt::map_while(stream, move |part| {
            part.map_err(|status| note.note(status)).ok()
        })
    });
    (request, broken)
}

#[tonic::async_trait]
impl TemplateService for TemplateApi {
    async fn upload_source(
        &self,
        request: Request<Streaming<UploadSourceRequest>>,
    ) -> Result<Response<UploadSourceResponse>, Status> {
        let request = self.door.enter(request, Limit::None).await?;
        let (request, broken) = parts_of(request);
        let answer = self.templates.clone().upload_source(request).await;
        broken.or(answer.map_err(outward))
    }

    async fn find_missing_files(
        &self,
        request: Request<FindMissingFilesRequest>,
    ) -> Result<Response<FindMissingFilesResponse>, Status> {
        let request = self.door.enter(request, Limit::Usual).await?;
        self.templates
            .clone()
            .find_missing_files(request)
            .await
            .map_err(outward)
    }

    async fn upload_files(
        &self,
        request: Request<Streaming<UploadFilesRequest>>,
    ) -> Result<Response<UploadFilesResponse>, Status> {
        let request = self.door.enter(request, Limit::None).await?;
        let (request, broken) = parts_of(request);
        let answer = self.templates.clone().upload_files(request).await;
        broken.or(answer.map_err(outward))
    }

    async fn build_template(
        &self,
        request: Request<BuildTemplateRequest>,
    ) -> Result<Response<BuildTemplateResponse>, Status> {
        let request = self.door.enter(request, Limit::Usual).await?;
        self.templates
            .clone()
            .build_template(request)
            .await
            .map_err(outward)
    }

    async fn get_build(
        &self,
        request: Request<GetBuildRequest>,
    ) -> Result<Response<GetBuildResponse>, Status> {
        let request = self.door.enter(request, Limit::Usual).await?;
        self.templates
            .clone()
            .get_build(request)
            .await
            .map_err(outward)
    }

    async fn cancel_build(
        &self,
        request: Request<CancelBuildRequest>,
    ) -> Result<Response<CancelBuildResponse>, Status> {
        let request = self.door.enter(request, Limit::Usual).await?;
        self.templates
            .clone()
            .cancel_build(request)
            .await
            .map_err(outward)
    }

    async fn get_template(
        &self,
        request: Request<GetTemplateRequest>,
    ) -> Result<Response<GetTemplateResponse>, Status> {
        let request = self.door.enter(request, Limit::Usual).await?;
        self.templates
            .clone()
            .get_template(request)
            .await
            .map_err(outward)
    }

    async fn list_templates(
        &self,
        request: Request<ListTemplatesRequest>,
    ) -> Result<Response<ListTemplatesResponse>, Status> {
        let request = self.door.enter(request, Limit::Usual).await?;
        self.templates
            .clone()
            .list_templates(request)
            .await
            .map_err(outward)
    }

    async fn tag_template(
        &self,
        request: Request<TagTemplateRequest>,
    ) -> Result<Response<TagTemplateResponse>, Status> {
        let request = self.door.enter(request, Limit::Usual).await?;
        self.templates
            .clone()
            .tag_template(request)
            .await
            .map_err(outward)
    }

    async fn delete_template(
        &self,
        request: Request<DeleteTemplateRequest>,
    ) -> Result<Response<DeleteTemplateResponse>, Status> {
        let request = self.door.enter(request, Limit::Usual).await?;
        self.templates
            .clone()
            .delete_template(request)
            .await
            .map_err(outward)
    }

    type StreamBuildLogsStream = Answers<StreamBuildLogsResponse>;

    async fn stream_build_logs(
        &self,
        request: Request<StreamBuildLogsRequest>,
    ) -> Result<Response<Self::StreamBuildLogsStream>, Status> {
        let request = self.door.enter(request, Limit::None).await?;
        let answer = self
            .templates
            .clone()
            .stream_build_logs(request)
            .await
            .map_err(outward)?;
        Ok(answer.map(|stream| Box::pin(stream.map_err(outward)) as _))
    }
}
