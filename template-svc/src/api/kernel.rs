//! `sandmesh.template.v1.KernelService`.

use proto::template::v1::{
    DeleteKernelRequest, DeleteKernelResponse, ImportKernelRequest, ImportKernelResponse, Kernel,
    ListKernelsRequest, ListKernelsResponse, kernel_service_server::KernelService,
};
use service_kit::{
    errors::{Failure, Reason},
    mesh::Caller,
};
use tokio::sync::Semaphore;
use tonic::{Code, Request, Response, Status};

use super::template::{disk_error, source_unknown};
use crate::{
    kernel::{ARCHITECTURE, ImportError, Importer, KernelError},
    names,
    store::{self, MOST_KERNELS, Store},
};

const LONGEST_VERSION: usize = 128;

/// Serves kernels, to operators.
#[derive(Debug)]
pub struct KernelApi {
    store: Store,
    importer: Importer,
    /// One at a time: all of a kernel is in memory while it is looked at.
    importing: Semaphore,
}

impl KernelApi {
    /// With what it needs.
    pub fn new(store: Store, importer: Importer) -> Self {
        Self {
            store,
            importer,
            importing: Semaphore::new(1),
        }
    }
}

fn operator<T>(request: &Request<T>) -> Result<Caller, Status> {
    let caller = Caller::of(request)?;
    if caller.operator {
        return Ok(caller);
    }
    Err(Failure::new(
        Code::PermissionDenied,
        Reason::NOT_ALLOWED,
        "kernels are for operators only",
    )
    .into())
}

fn refused(error: ImportError) -> Status {
    match error {
        ImportError::Unknown(digest) => source_unknown(&digest),
        ImportError::Disk(error) => disk_error(error),
        ImportError::Kernel(error) => {
            let reason = match &error {
                KernelError::TooLarge { .. } => "SOURCE_TOO_LARGE",
                _ => "KERNEL_INVALID",
            };
            Failure::new(
                Code::InvalidArgument,
                Reason::new(reason),
                error.to_string(),
            )
            .into()
        }
    }
}

#[tonic::async_trait]
impl KernelService for KernelApi {
    async fn import_kernel(
        &self,
        request: Request<ImportKernelRequest>,
    ) -> Result<Response<ImportKernelResponse>, Status> {
        let caller = operator(&request)?;
        let ImportKernelRequest {
            name,
            kernel,
            modules,
            version,
        } = request.into_inner();
        if !names::is_name(&name) {
            return Err(
                Failure::field_invalid("name", "must be 1-63 characters [a-z0-9._-]").into(),
            );
        }
        if version.chars().count() > LONGEST_VERSION || version.chars().any(char::is_control) {
            let rule = format!(
                "must be at most {LONGEST_VERSION} characters, none of them a control character"
            );
            return Err(Failure::field_invalid("version", rule).into());
        }
        let closed = |_| Status::internal("import");
        let _turn = self.importing.acquire().await.map_err(closed)?;
        let importer = self.importer.clone();
        let import = move || importer.import(&caller.team, &kernel, &modules);
        let imported = tokio::task::spawn_blocking(import).await;
        let imported = imported
            .map_err(|_| Status::internal("import"))?
            .map_err(refused)?;
        let kernel = Kernel {
            name,
            version: if version.is_empty() {
                imported.release
            } else {
                version
            },
            kernel: Some(imported.kernel),
            modules: Some(imported.modules),
            create_time: Some(store::timestamp(store::now())),
            architecture: ARCHITECTURE.to_owned(),
        };
        if !self.store.put_kernel(&kernel).await? {
            return Err(Failure::new(
                Code::ResourceExhausted,
                Reason::new("TOO_MANY_KERNELS"),
                format!("there are {MOST_KERNELS} kernels, the most there may be; delete some"),
            )
            .into());
        }
        tracing::info!(
            name = kernel.name,
            version = kernel.version,
            "kernel imported"
        );
        Ok(Response::new(ImportKernelResponse {
            kernel: Some(kernel),
        }))
    }

    async fn list_kernels(
        &self,
        request: Request<ListKernelsRequest>,
    ) -> Result<Response<ListKernelsResponse>, Status> {
        operator(&request)?;
        let kernels = self.store.kernels().await?;
        Ok(Response::new(ListKernelsResponse { kernels }))
    }

    async fn delete_kernel(
        &self,
        request: Request<DeleteKernelRequest>,
    ) -> Result<Response<DeleteKernelResponse>, Status> {
        operator(&request)?;
        let name = &request.get_ref().name;
        if !self.store.delete_kernel(name).await? {
            return Err(kernel_unknown(&self.store, name).await?);
        }
        tracing::info!(name, "kernel deleted");
        Ok(Response::new(DeleteKernelResponse {}))
    }
}

/// Says that there is none of that name, and which there are that are named so.
pub(super) async fn kernel_unknown(store: &Store, name: &str) -> Result<Status, Status> {
    let names: Vec<String> = store
        .kernels()
        .await?
        .into_iter()
        .map(|it| it.name)
        .collect();
    let closest = names::closest(name, &names);
    let hint = if closest.is_empty() {
        String::new()
    } else {
        format!("; the closest are {}", closest.join(", "))
    };
    let name: String = name.chars().take(64).collect();
    let message = format!("no kernel {name:?}{hint}");
    Ok(Failure::new(Code::NotFound, Reason::new("KERNEL_UNKNOWN"), message).into())
}
