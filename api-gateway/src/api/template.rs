//! `sandmesh.template.v1.TemplateService`, passed on to template-svc.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
};

use futures::{Stream, TryStreamExt as _};
use proto::template::v1::{
    BuildTemplateRequest, BuildTemplateResponse, CancelBuildRequest, CancelBuildResponse,
    DeleteTemplateRequest, DeleteTemplateResponse, GetBuildRequest, GetBuildResponse,
    GetTemplateRequest, GetTemplateResponse, ListTemplatesRequest, ListTemplatesResponse,
    StreamBuildLogsRequest, StreamBuildLogsResponse, TagTemplateRequest, TagTemplateResponse,
    UploadSourceRequest, UploadSourceResponse, template_service_client::TemplateServiceClient,
    template_service_server::TemplateService,
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

#[tonic::async_trait]
impl TemplateService for TemplateApi {
    async fn upload_source(
        &self,
        request: Request<Streaming<UploadSourceRequest>>,
    ) -> Result<Response<UploadSourceResponse>, Status> {
        let request = self.door.enter(request, Limit::None).await?;
        // The other side takes a stream of parts alone; what ends this one early is kept, to be said instead of its answer.
        let broken: Arc<Mutex<Option<Status>>> = Arc::default();
        let note = Arc::clone(&broken);
        let request = request.map(|stream| {
            tokio_stream::StreamExt::map_while(stream, move |part| {
                part.map_err(|status| {
                    *note.lock().unwrap_or_else(PoisonError::into_inner) = Some(status);
                })
                .ok()
            })
        });
        let answer = self
            .templates
            .clone()
            .upload_source(request)
            .await
            .map_err(outward);
        match broken.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(status) => Err(status),
            None => answer,
        }
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
