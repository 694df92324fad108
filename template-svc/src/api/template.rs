//! `sandmesh.template.v1.TemplateService`.

use std::{collections::HashSet, pin::Pin, sync::Arc, time::Duration};

use blobs::Blobs;
use futures::Stream;
use prost::Message;
use proto::template::v1::{
    BuildSecret, BuildSource, BuildState, BuildTemplateRequest, BuildTemplateResponse,
    CancelBuildRequest, CancelBuildResponse, DeleteTemplateRequest, DeleteTemplateResponse,
    FindMissingFilesRequest, FindMissingFilesResponse, GetBuildRequest, GetBuildResponse,
    GetTemplateRequest, GetTemplateResponse, ImageArchive, ListTemplatesRequest,
    ListTemplatesResponse, RegistryLogin, StoredSnapshot, StreamBuildLogsRequest,
    StreamBuildLogsResponse, TagTemplateRequest, TagTemplateResponse, Template, UploadFilesRequest,
    UploadFilesResponse, UploadSourceRequest, UploadSourceResponse, build_source::Source,
    template_service_server::TemplateService,
};
use service_kit::{
    errors::{Failure, Reason},
    ids::SessionId,
    kernel_arguments::KernelArguments,
    mesh::Caller,
    templates,
};
use tokio::sync::{Notify, Semaphore, SemaphorePermit};
use tonic::{Code, Request, Response, Status, Streaming};

use super::{context, kernel::kernel_unknown};
use crate::{
    dockerfile::{Dockerfile, is_secret_id},
    names::{self, TemplateRef, Which},
    quota::{Quota, QuotaError},
    registry,
    secrets::Sealer,
    start,
    store::{Store, StoredBuild},
    uploads::{UploadError, Uploads},
};

const FOLLOW_EVERY: Duration = Duration::from_millis(200);
const UPLOADS_AT_ONCE: usize = 8;
const UPLOAD_IDLE: Duration = Duration::from_mins(1);
/// Builds of a team that wait or run.
const MOST_UNFINISHED: i64 = 100;
/// What no session may have by default is no default.
const MOST_MEMORY: u64 = 64 << 30;
const MOST_DISK: u64 = 1 << 40;
const MOST_CPUS: u64 = 64;
const MOST_ARGS: usize = 256;
/// Of a look at what the object store has of a template.
const LIST_LIMIT: Duration = Duration::from_secs(10);
const LARGEST_ARGS: usize = 64 << 10;
const MOST_LOGINS: usize = 16;
/// All credentials of a build together; tokens of some registries are a few thousand characters.
const MOST_CREDENTIALS: usize = 64 << 10;
/// Secrets that steps are lent, and bytes of one, as BuildKit has it, and of all.
const MOST_LENT: usize = 16;
const LARGEST_LENT: usize = 500 << 10;
const LARGEST_LENT_TOGETHER: usize = 1 << 20;

/// Serves templates.
#[derive(Debug)]
pub struct TemplateApi {
    store: Store,
    blobs: Blobs,
    sealer: Sealer,
    uploads: Uploads,
    quota: Quota,
    wake: Arc<Notify>,
    uploading: Semaphore,
}

impl TemplateApi {
    /// `wake` tells the builder of a new build.
    pub fn new(
        store: Store,
        blobs: Blobs,
        sealer: Sealer,
        uploads: Uploads,
        quota: Quota,
        wake: Arc<Notify>,
    ) -> Self {
        Self {
            store,
            blobs,
            sealer,
            uploads,
            quota,
            wake,
            uploading: Semaphore::new(UPLOADS_AT_ONCE),
        }
    }

    async fn find(&self, caller: &Caller, text: &str) -> Result<Template, Status> {
        let reference = TemplateRef::parse(text)
            .map_err(|error| Failure::field_invalid("template", error.to_string()).into_status())?;
        if let Some(template) = self.store.find(caller.team.as_str(), &reference).await? {
            return Ok(template);
        }
        let names = self.store.names(caller.team.as_str()).await?;
        let closest = names::closest(&reference.name, &names);
        let hint = if closest.is_empty() {
            String::new()
        } else {
            format!("; the closest are {}", closest.join(", "))
        };
        Err(Failure::new(
            Code::NotFound,
            Reason::TEMPLATE_UNKNOWN,
            format!("no template {text}{hint}"),
        )
        .with("template", text)
        .with("closest", closest.join(","))
        .into())
    }

    /// What nodes have put into the object store of it, the last used first.
    async fn snapshots(&self, template: &Template) -> Result<Vec<StoredSnapshot>, Status> {
        let rootfs = template.rootfs.as_ref();
        let digest = rootfs.map_or("", |rootfs| &rootfs.digest);
        let listed = tokio::time::timeout(LIST_LIMIT, self.blobs.bundles(digest)).await;
        let failed = |why: String| {
            let message = format!("the object store does not say what snapshots it has: {why}");
            Failure::new(Code::Unavailable, Reason::new("STORE_FAILED"), message).into_status()
        };
        let listed = listed
            .map_err(|_| failed("it takes too long".into()))?
            .map_err(|error| failed(error.to_string()))?;
        let of = templates::snapshot_of(template);
        let told = listed.into_iter().filter_map(|bundle| {
            // Said by a node; one of another version may say it otherwise.
            let mut about = StoredSnapshot::decode(bundle.about.as_slice()).ok()?;
            about.use_time = Some(bundle.used.into());
            Some(about)
        });
        let is_of_it = |about: &StoredSnapshot| {
            about.of == of && (about.team.is_empty() || about.team == template.team)
        };
        let mut snapshots: Vec<_> = told.filter(is_of_it).collect();
        snapshots.sort_by_key(|about| {
            std::cmp::Reverse(about.use_time.map(|time| (time.seconds, time.nanos)))
        });
        Ok(snapshots)
    }

    /// Among those that upload.
    fn place(&self) -> Result<SemaphorePermit<'_>, Status> {
        self.uploading.try_acquire().map_err(|_| {
            Failure::new(
                Code::ResourceExhausted,
                Reason::new("TOO_MANY_UPLOADS"),
                "too many uploads at once; try again",
            )
            .retry_after(Duration::from_secs(5))
            .into_status()
        })
    }

    async fn build_of(&self, caller: &Caller, id: &str) -> Result<StoredBuild, Status> {
        let stored = self
            .store
            .build(id)
            .await?
            .filter(|stored| stored.team == caller.team.as_str());
        stored.ok_or_else(|| {
            Failure::new(
                Code::NotFound,
                Reason::BUILD_UNKNOWN,
                format!("no build {id}"),
            )
            .with("buildId", id)
            .into()
        })
    }
}

pub(super) fn source_unknown(digest: &str) -> Status {
    Failure::new(
        Code::NotFound,
        Reason::new("SOURCE_UNKNOWN"),
        "no such uploaded source; upload it first",
    )
    .with("digest", digest)
    .into()
}

/// The next part of an upload; a place is not for those that send nothing.
pub(super) async fn next<T>(stream: &mut Streaming<T>) -> Result<Option<T>, Status> {
    let part = tokio::time::timeout(UPLOAD_IDLE, stream.message()).await;
    part.unwrap_or_else(|_| {
        let limit = UPLOAD_IDLE.as_secs();
        let message = format!("nothing came for {limit} s");
        Err(Failure::new(Code::Aborted, Reason::new("UPLOAD_STALLED"), message).into())
    })
}

pub(super) fn upload_refused(error: UploadError) -> Status {
    let message = error.to_string();
    let (code, reason) = match error {
        UploadError::TooLarge(_) => (Code::InvalidArgument, "SOURCE_TOO_LARGE"),
        UploadError::NoRoom(_) => (Code::ResourceExhausted, "TEAM_UPLOADS_FULL"),
        UploadError::Disk(error) => return disk_error(error),
    };
    Failure::new(code, Reason::new(reason), message).into()
}

/// Takes what nobody else may read out of a request.
fn take_secrets(request: &mut BuildTemplateRequest) -> Result<Option<Vec<u8>>, Failure> {
    let taken = BuildTemplateRequest {
        registry_logins: take_logins(request)?,
        secrets: take_lent(request)?,
        ..BuildTemplateRequest::default()
    };
    let has_any = !taken.registry_logins.is_empty() || !taken.secrets.is_empty();
    Ok(has_any.then(|| taken.encode_to_vec()))
}

/// What steps of a Dockerfile may be lent.
fn take_lent(request: &mut BuildTemplateRequest) -> Result<Vec<BuildSecret>, Failure> {
    let secrets = std::mem::take(&mut request.secrets);
    if secrets.is_empty() {
        return Ok(secrets);
    }
    let wrong = |why: String| Failure::field_invalid("secrets", why);
    let source = request.source.as_ref();
    let source = source.and_then(|source| source.source.as_ref());
    if !matches!(source, Some(Source::Dockerfile(_))) {
        return Err(wrong("are for the steps of a Dockerfile".into()));
    }
    let ids: HashSet<&str> = secrets.iter().map(|secret| &*secret.id).collect();
    if secrets.len() > MOST_LENT || ids.len() < secrets.len() {
        return Err(wrong(format!(
            "must be at most {MOST_LENT}, each with an ID of its own"
        )));
    }
    if let Some(id) = ids.iter().find(|id| !is_secret_id(id)) {
        let rule = "an ID must be 1-128 characters [A-Za-z0-9._-], and no dots alone";
        return Err(wrong(format!("{id:?}: {rule}")));
    }
    if let Some(large) = secrets.iter().find(|it| it.value.len() > LARGEST_LENT) {
        let id = &large.id;
        return Err(wrong(format!("{id:?} is more than {LARGEST_LENT} bytes")));
    }
    if secrets.iter().map(|it| it.value.len()).sum::<usize>() > LARGEST_LENT_TOGETHER {
        return Err(wrong(format!(
            "must be at most {LARGEST_LENT_TOGETHER} bytes together"
        )));
    }
    Ok(secrets)
}

fn take_logins(request: &mut BuildTemplateRequest) -> Result<Vec<RegistryLogin>, Failure> {
    let logins = std::mem::take(&mut request.registry_logins);
    if logins.is_empty() {
        return Ok(logins);
    }
    let wrong = |why: String| Failure::field_invalid("registry_logins", why);
    let is_one = |login: &RegistryLogin| {
        [&login.registry, &login.username, &login.password]
            .iter()
            .all(|text| !text.is_empty())
            // Nobody could tell where the password begins (RFC 7617, 2).
            && !login.username.contains(':')
    };
    if logins.len() > MOST_LOGINS || !logins.iter().all(is_one) {
        return Err(wrong(format!(
            "must be at most {MOST_LOGINS}, each with registry, username without a colon, and password"
        )));
    }
    let source = request.source.as_ref();
    let image = match source.and_then(|source| source.source.as_ref()) {
        Some(Source::OciImage(name)) => registry::parse_reference(name).ok(),
        _ => None,
    };
    if let Some(image) = image {
        let wanted = registry::registry_of(image.registry());
        let is_for = |login: &RegistryLogin| registry::registry_of(&login.registry) == wanted;
        if !logins.iter().any(is_for) {
            return Err(wrong(format!(
                "has none for {wanted}, the image's registry"
            )));
        }
    }
    if logins.iter().map(Message::encoded_len).sum::<usize>() > MOST_CREDENTIALS {
        return Err(wrong(format!(
            "must be at most {MOST_CREDENTIALS} bytes together"
        )));
    }
    Ok(logins)
}

/// Whose templates a caller may change.
fn owned<'a>(caller: &'a Caller, template: &Template) -> Result<&'a str, Status> {
    if template.team == caller.team.as_str() {
        Ok(caller.team.as_str())
    } else if caller.operator {
        Ok("")
    } else {
        Err(Failure::new(
            Code::PermissionDenied,
            Reason::NOT_ALLOWED,
            "shared templates are changed by operators only",
        )
        .into())
    }
}

#[tonic::async_trait]
impl TemplateService for TemplateApi {
    async fn upload_source(
        &self,
        request: Request<Streaming<UploadSourceRequest>>,
    ) -> Result<Response<UploadSourceResponse>, Status> {
        let caller = Caller::of(&request)?;
        let _place = self.place()?;
        let mut stream = request.into_inner();
        let (files, mut room) = context::begin(&self.uploads, &caller.team).await?;
        let mut incoming = room.begin(&files).map_err(upload_refused)?;
        while let Some(part) = next(&mut stream).await? {
            let written = room.write(&mut incoming, &part.data);
            written.map_err(upload_refused)?;
        }
        let source = tokio::task::spawn_blocking(move || incoming.finish())
            .await
            .map_err(|_| Status::internal("upload"))?
            .map_err(disk_error)?;
        Ok(Response::new(UploadSourceResponse {
            source: Some(source),
        }))
    }

    async fn find_missing_files(
        &self,
        request: Request<FindMissingFilesRequest>,
    ) -> Result<Response<FindMissingFilesResponse>, Status> {
        let caller = Caller::of(&request)?;
        let found = context::find_missing(&self.uploads, &caller.team, request.into_inner());
        Ok(Response::new(found.await?))
    }

    async fn upload_files(
        &self,
        request: Request<Streaming<UploadFilesRequest>>,
    ) -> Result<Response<UploadFilesResponse>, Status> {
        let caller = Caller::of(&request)?;
        let _place = self.place()?;
        let kept = context::upload(&self.uploads, &caller.team, request.into_inner());
        Ok(Response::new(kept.await?))
    }

    async fn build_template(
        &self,
        request: Request<BuildTemplateRequest>,
    ) -> Result<Response<BuildTemplateResponse>, Status> {
        let caller = Caller::of(&request)?;
        let mut request = request.into_inner();
        let secrets = take_secrets(&mut request)?;
        if !names::is_name(&request.name) {
            return Err(
                Failure::field_invalid("name", "must be 1-63 characters [a-z0-9._-]").into(),
            );
        }
        if request.tags.len() > 16 || !request.tags.iter().all(|tag| names::is_name(tag)) {
            return Err(Failure::field_invalid(
                "tags",
                "must be at most 16, each 1-63 characters [a-z0-9._-]",
            )
            .into());
        }
        let args = &request.build_args;
        let args_size: usize = args
            .iter()
            .map(|(name, value)| name.len() + value.len())
            .sum();
        if args.len() > MOST_ARGS || args_size > LARGEST_ARGS {
            let message = format!("must be at most {MOST_ARGS}, and {LARGEST_ARGS} bytes together");
            return Err(Failure::field_invalid("build_args", message).into());
        }
        if request.shared
            && matches!(
                &request.source,
                Some(BuildSource {
                    source: Some(Source::SessionId(_))
                })
            )
        {
            let message = "sessions are of teams, and make templates of theirs; share the image or Dockerfile";
            return Err(Failure::field_invalid("shared", message).into());
        }
        if request.shared && !caller.operator {
            return Err(Failure::new(
                Code::PermissionDenied,
                Reason::NOT_ALLOWED,
                "only operators make shared templates",
            )
            .into());
        }
        for (field, bytes, most) in [
            (
                "default_memory_bytes",
                request.default_memory_bytes,
                MOST_MEMORY,
            ),
            ("default_disk_bytes", request.default_disk_bytes, MOST_DISK),
            ("default_vcpus", request.default_vcpus.into(), MOST_CPUS),
        ] {
            if bytes > most {
                let rule = format!("must be at most {most}");
                return Err(Failure::field_invalid(field, rule).into());
            }
        }
        let arguments = KernelArguments::parse(&request.kernel_arguments).map_err(|error| {
            Failure::field_invalid("kernel_arguments", error.to_string()).into_status()
        })?;
        arguments.as_str().clone_into(&mut request.kernel_arguments);
        let kernel = request.kernel.as_str();
        if !kernel.is_empty() && self.store.kernel(kernel).await?.is_none() {
            return Err(kernel_unknown(&self.store, kernel).await?);
        }
        if let Some(start) = &request.start
            && let Err((field, rule)) = start::check(start)
        {
            return Err(Failure::field_invalid(field, rule).into());
        }
        let uploaded = |digest: &str| {
            let found = self.uploads.find(&caller.team, digest);
            let found = found.map_err(disk_error)?;
            found.map(drop).ok_or_else(|| source_unknown(digest))
        };
        if !request.context.is_empty() {
            uploaded(&request.context)?;
        }
        match request
            .source
            .as_ref()
            .and_then(|source| source.source.as_ref())
        {
            Some(
                Source::RootfsTarball(digest) | Source::ImageArchive(ImageArchive { digest, .. }),
            ) => uploaded(digest)?,
            Some(Source::OciImage(name)) => {
                if let Err(error) = registry::parse_reference(name) {
                    return Err(
                        Failure::field_invalid("source.oci_image", error.to_string()).into(),
                    );
                }
            }
            Some(Source::SessionId(id)) => {
                if let Err(error) = SessionId::parse(id) {
                    return Err(
                        Failure::field_invalid("source.session_id", error.to_string()).into(),
                    );
                }
            }
            Some(Source::Dockerfile(text)) => {
                let parsed = Dockerfile::parse(text).map_err(|error| {
                    Failure::field_invalid("source.dockerfile", error.to_string()).into_status()
                })?;
                if request.context.is_empty() && parsed.needs_context() {
                    let rule = "is required: the Dockerfile copies files of its build context";
                    return Err(Failure::field_invalid("context", rule).into());
                }
            }
            None => return Err(Failure::field_invalid("source", "is required").into()),
        }
        // Asked again, it is the same, whatever has become of it and of others since.
        let (team, request_id) = (caller.team.as_str(), request.request_id.as_str());
        if !request_id.is_empty()
            && let Some(stored) = self.store.requested(team, request_id).await?
        {
            let build = Some(stored.build);
            return Ok(Response::new(BuildTemplateResponse { build }));
        }
        if self.store.unfinished(team).await? >= MOST_UNFINISHED {
            return Err(Failure::new(
                Code::ResourceExhausted,
                Reason::new("TOO_MANY_BUILDS"),
                format!("{MOST_UNFINISHED} builds of the team wait or run, the most there may be"),
            )
            .retry_after(Duration::from_mins(1))
            .into());
        }
        let template_team = if request.shared {
            ""
        } else {
            caller.team.as_str()
        };
        match self.quota.has_room(template_team).await {
            Ok(()) => {}
            Err(QuotaError::Store(error)) => return Err(error.into()),
            Err(full @ QuotaError::Full { .. }) => {
                let reason = Reason::new(QuotaError::FULL);
                return Err(Failure::new(Code::ResourceExhausted, reason, full.to_string()).into());
            }
        }
        let id = uuid::Uuid::now_v7().to_string();
        let stored = self
            .store
            .insert_build(
                &id,
                caller.team.as_str(),
                template_team,
                &request,
                secrets.map(|secrets| self.sealer.seal(&id, &secrets)),
            )
            .await?;
        self.wake.notify_one();
        Ok(Response::new(BuildTemplateResponse {
            build: Some(stored.build),
        }))
    }

    async fn get_build(
        &self,
        request: Request<GetBuildRequest>,
    ) -> Result<Response<GetBuildResponse>, Status> {
        let caller = Caller::of(&request)?;
        let stored = self.build_of(&caller, &request.get_ref().build_id).await?;
        let template = if stored.build.version > 0 {
            let reference = TemplateRef {
                name: stored.build.name.clone(),
                which: Which::Version(stored.build.version),
            };
            self.store.find(&stored.template_team, &reference).await?
        } else {
            None
        };
        Ok(Response::new(GetBuildResponse {
            build: Some(stored.build),
            template,
        }))
    }

    type StreamBuildLogsStream =
        Pin<Box<dyn Stream<Item = Result<StreamBuildLogsResponse, Status>> + Send>>;

    async fn stream_build_logs(
        &self,
        request: Request<StreamBuildLogsRequest>,
    ) -> Result<Response<Self::StreamBuildLogsStream>, Status> {
        let caller = Caller::of(&request)?;
        let id = self
            .build_of(&caller, &request.get_ref().build_id)
            .await?
            .build
            .build_id;
        let store = self.store.clone();
        // State: the number of the last line sent, and whether the build had ended before the last look.
        let after = i64::try_from(request.get_ref().after_number).unwrap_or(i64::MAX);
        let lines = futures::stream::try_unfold((after, false), move |(after, ended)| {
            let (store, id) = (store.clone(), id.clone());
            async move {
                let mut ended = ended;
                loop {
                    let lines = store.log_after(&id, after).await?;
                    if let Some((last, _)) = lines.last() {
                        let last = *last;
                        let lines = futures::stream::iter(
                            lines.into_iter().map(|(_, line)| Ok::<_, Status>(line)),
                        );
                        return Ok::<_, Status>(Some((lines, (last, ended))));
                    }
                    if ended {
                        return Ok(None);
                    }
                    let state = store.build(&id).await?.map(|stored| stored.build.state());
                    // Lines may have been written between the two looks; one more look comes first.
                    ended = !matches!(
                        state,
                        Some(BuildState::Queued | BuildState::Running | BuildState::Snapshotting)
                    );
                    if !ended {
                        tokio::time::sleep(FOLLOW_EVERY).await;
                    }
                }
            }
        });
        Ok(Response::new(Box::pin(futures::TryStreamExt::try_flatten(
            lines,
        ))))
    }

    async fn cancel_build(
        &self,
        request: Request<CancelBuildRequest>,
    ) -> Result<Response<CancelBuildResponse>, Status> {
        let caller = Caller::of(&request)?;
        let stored = self.build_of(&caller, &request.get_ref().build_id).await?;
        self.store
            .end_build(
                &stored.build.build_id,
                None,
                BuildState::Cancelled,
                "CANCELLED",
                "cancelled by its owner",
            )
            .await?;
        let stored = self.build_of(&caller, &stored.build.build_id).await?;
        Ok(Response::new(CancelBuildResponse {
            build: Some(stored.build),
        }))
    }

    async fn get_template(
        &self,
        request: Request<GetTemplateRequest>,
    ) -> Result<Response<GetTemplateResponse>, Status> {
        let caller = Caller::of(&request)?;
        let GetTemplateRequest {
            template,
            with_snapshots,
        } = request.into_inner();
        let template = self.find(&caller, &template).await?;
        let snapshots = if with_snapshots {
            self.snapshots(&template).await?
        } else {
            Vec::new()
        };
        Ok(Response::new(GetTemplateResponse {
            template: Some(template),
            snapshots,
        }))
    }

    async fn list_templates(
        &self,
        request: Request<ListTemplatesRequest>,
    ) -> Result<Response<ListTemplatesResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let limit = if request.page_size == 0 {
            100
        } else {
            i64::from(request.page_size.min(1000))
        };
        let mut templates = self
            .store
            .list(caller.team.as_str(), &request.page_token, limit)
            .await?;
        // A page of templates with hundreds each would be more than a message may be.
        for template in &mut templates {
            template.layers.clear();
        }
        let full = i64::try_from(templates.len()).is_ok_and(|count| count == limit);
        let next_page_token = templates
            .last()
            .filter(|_| full)
            .map(|last| last.name.clone())
            .unwrap_or_default();
        Ok(Response::new(ListTemplatesResponse {
            templates,
            next_page_token,
        }))
    }

    async fn tag_template(
        &self,
        request: Request<TagTemplateRequest>,
    ) -> Result<Response<TagTemplateResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        if !names::is_name(&request.tag) {
            return Err(
                Failure::field_invalid("tag", "must be 1-63 characters [a-z0-9._-]").into(),
            );
        }
        let template = self.find(&caller, &request.template).await?;
        owned(&caller, &template)?;
        self.store.tag(&template, &request.tag).await?;
        let template = self
            .find(&caller, &format!("{}@{}", template.name, template.version))
            .await?;
        Ok(Response::new(TagTemplateResponse {
            template: Some(template),
        }))
    }

    async fn delete_template(
        &self,
        request: Request<DeleteTemplateRequest>,
    ) -> Result<Response<DeleteTemplateResponse>, Status> {
        let caller = Caller::of(&request)?;
        let text = &request.get_ref().template;
        let template = self.find(&caller, text).await?;
        let team = owned(&caller, &template)?;
        let version = text.contains('@').then_some(template.version);
        self.store.delete(team, &template.name, version).await?;
        Ok(Response::new(DeleteTemplateResponse {}))
    }
}

pub(super) fn disk_error(error: std::io::Error) -> Status {
    if error.kind() == std::io::ErrorKind::StorageFull {
        return Failure::new(
            Code::ResourceExhausted,
            Reason::new("DISK_FULL"),
            "the disk of template-svc is full",
        )
        .into();
    }
    tracing::error!(%error, "upload failed");
    Failure::new(
        Code::Internal,
        Reason::INTERNAL,
        "the upload could not be stored; quote the request ID",
    )
    .into()
}

#[cfg(test)]
mod tests {
    use proto::template::v1::BuildSource;

    use super::*;

    fn request(image: &str, logins: &[(&str, &str, &str)]) -> BuildTemplateRequest {
        let login = |(registry, username, password): &(&str, &str, &str)| RegistryLogin {
            registry: (*registry).into(),
            username: (*username).into(),
            password: (*password).into(),
        };
        BuildTemplateRequest {
            source: Some(BuildSource {
                source: Some(Source::OciImage(image.into())),
            }),
            registry_logins: logins.iter().map(login).collect(),
            ..BuildTemplateRequest::default()
        }
    }

    #[test]
    fn nothing_secret_stays_in_a_request() {
        let mut asked = request("quay.io/a", &[("quay.io", "me", "hidden")]);
        assert!(!format!("{asked:?}").contains("hidden"));
        let secrets = take_secrets(&mut asked).unwrap().unwrap();
        let left = asked.encode_to_vec();
        assert!(!left.windows(6).any(|bytes| bytes == b"hidden"));
        let secrets = BuildTemplateRequest::decode(&*secrets).unwrap();
        assert_eq!(secrets.registry_logins[0].password, "hidden");
        assert_eq!(take_secrets(&mut asked).unwrap(), None);
    }

    #[test]
    fn credentials_are_for_the_image() {
        let refused = |image, logins: &[_]| take_secrets(&mut request(image, logins)).is_err();
        assert!(!refused(
            "debian",
            &[("https://index.docker.io/v1/", "me", "x")]
        ));
        assert!(refused("debian", &[("quay.io", "me", "x")]));
        assert!(refused("debian", &[("docker.io", "me:too", "x")]));
        assert!(refused("debian", &[("docker.io", "me", "")]));
        let long = "x".repeat(MOST_CREDENTIALS);
        assert!(refused("debian", &[("docker.io", "me", &long)]));
        assert!(refused("debian", &[("docker.io", "me", "x"); 17]));
    }

    fn lends(secrets: &[(&str, usize)]) -> BuildTemplateRequest {
        let secret = |(id, bytes): &(&str, usize)| BuildSecret {
            id: (*id).into(),
            value: b"hidden".repeat(bytes.div_ceil(6))[..*bytes].to_vec(),
        };
        BuildTemplateRequest {
            source: Some(BuildSource {
                source: Some(Source::Dockerfile("FROM a".into())),
            }),
            secrets: secrets.iter().map(secret).collect(),
            ..BuildTemplateRequest::default()
        }
    }

    #[test]
    fn what_steps_are_lent_does_not_stay_in_a_request() {
        let mut asked = lends(&[("npm", 12), (".netrc", 0)]);
        assert!(!format!("{asked:?}").contains("104, 105, 100"));
        let taken = take_secrets(&mut asked).unwrap().unwrap();
        assert_eq!(asked, lends(&[]));
        let taken = BuildTemplateRequest::decode(&*taken).unwrap();
        assert_eq!(taken.secrets[0].value, b"hiddenhidden");
        let sealer = Sealer::new(service_kit::mesh::MeshToken::random());
        let sealed = sealer.seal("b1", &taken.encode_to_vec());
        assert!(!sealed.windows(6).any(|bytes| bytes == b"hidden"));
    }

    #[test]
    fn what_steps_are_lent_is_bounded() {
        let refused = |secrets: &[_]| take_secrets(&mut lends(secrets)).is_err();
        assert!(!refused(&[("a", LARGEST_LENT), ("b", LARGEST_LENT)]));
        assert!(refused(&[("a", LARGEST_LENT + 1)]));
        let three = [("a", 400 << 10), ("b", 400 << 10), ("c", 400 << 10)];
        assert!(refused(&three));
        assert!(refused(&[("a", 1), ("a", 1)]));
        for id in ["", ".", "..", "a/b", "a b", "a\n", "ä"] {
            assert!(refused(&[(id, 1)]), "{id:?}");
        }
        let ids: Vec<String> = (0..17).map(|number| number.to_string()).collect();
        let many: Vec<(&str, usize)> = ids.iter().map(|id| (&**id, 1)).collect();
        assert!(!refused(&many[1..]));
        assert!(refused(&many));
        // Nobody else has steps.
        let mut image = lends(&[("a", 1)]);
        image.source = request("debian", &[]).source;
        assert!(take_secrets(&mut image).is_err());
    }
}
