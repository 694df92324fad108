//! `sandmesh template`.

use std::{
    collections::BTreeMap,
    io::IsTerminal as _,
    os::unix::ffi::OsStringExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use clap::Subcommand;
use indicatif::ProgressBar;
use proto::template::v1::{
    Artifact, BuildSecret, BuildSource, BuildState, BuildTemplateRequest, BuildTemplateResponse,
    CancelBuildRequest, GetBuildRequest, GetBuildResponse, GetTemplateRequest, ImageArchive,
    ListTemplatesRequest, PortProbe, Readiness, RegistryLogin, StartCommand, StoredSnapshot,
    StreamBuildLogsRequest, Template, UploadSourceRequest, UploadSourceResponse,
    build_source::Source, readiness::Probe, template_service_client::TemplateServiceClient,
};
use sdk::BuildContext;
use service_kit::{
    config::{parse_bytes, parse_duration},
    errors::reason_of,
    mesh::MeshChannel,
};
use template_svc::dockerfile::LARGEST;
use tokio::{fs::File, io::AsyncReadExt as _, sync::mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Request,
    client::GrpcService,
    codegen::{Body, StdError},
    service::interceptor::InterceptedService,
};

use crate::{
    context::{Context, operator_of, said},
    output,
};

const CHUNK: usize = 512 << 10;
const IN_FLIGHT: usize = 4;
/// A service that does not answer is waited for.
const PATIENCE: Duration = Duration::from_mins(1);
const LOOK_AGAIN: Duration = Duration::from_millis(300);
/// Whoever could be listened to for so long was there.
const LISTENED: Duration = Duration::from_secs(2);
/// As template-svc takes them.
const LARGEST_SECRET: u64 = 500 << 10;
const PASSWORD: &str = "SANDMESH_REGISTRY_PASSWORD";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List templates
    List,
    /// What a version is made of
    Inspect {
        /// name, name:tag or name@version.
        template: String,
    },
    /// Make a new version of a template
    Build(Box<Build>),
}

#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("source"))]
pub(crate) struct Build {
    /// Its name, and a tag for the new version besides "latest": name or name:tag.
    #[arg(short, long, value_name = "NAME[:TAG]")]
    tag: String,
    /// From a tarball of a root filesystem: plain, gzip or zstd.
    #[arg(long, group = "source", value_name = "TARBALL")]
    rootfs: Option<PathBuf>,
    /// From a tarball of an image: an OCI layout, or what "docker save" wrote.
    #[arg(long, group = "source", value_name = "TARBALL")]
    image_archive: Option<PathBuf>,
    /// From an image of a registry, by its name as docker writes it: debian:12, registry.example/team/app@sha256:...
    #[arg(long, group = "source", value_name = "IMAGE")]
    image: Option<String>,
    /// From a running session: its template, and what was changed in it. Its processes stand still meanwhile.
    #[arg(long, group = "source", value_name = "SESSION")]
    from_session: Option<String>,
    /// From the Dockerfile of a folder, whose files COPY and ADD take; what its .dockerignore names is left out.
    #[arg(group = "source", value_name = "DIR")]
    folder: Option<PathBuf>,
    /// The Dockerfile. Default: DIR/Dockerfile. Without a DIR it has no files to take.
    #[arg(short, long, value_name = "DOCKERFILE", conflicts_with_all = ["rootfs", "image_archive", "image", "from_session"])]
    file: Option<PathBuf>,
    /// A value for one of the Dockerfile's ARGs; no place for secrets.
    #[arg(long = "build-arg", value_name = "NAME=VALUE", value_parser = argument, conflicts_with_all = ["rootfs", "image_archive", "image", "from_session"])]
    arguments: Vec<(String, String)>,
    /// A secret that steps of the Dockerfile ask for (RUN --mount=type=secret,id=ID), in a file or a variable; it comes to be in no layer. With an ID alone it is the
    /// variable of that name, or else the file.
    #[arg(long = "secret", value_name = "id=ID[,src=FILE|,env=VARIABLE]", value_parser = secret_source, conflicts_with_all = ["rootfs", "image_archive", "image", "from_session"])]
    secrets: Vec<SecretSource>,
    /// Do every step of the Dockerfile anew, also those that were done before.
    #[arg(long, conflicts_with_all = ["rootfs", "image_archive", "image", "from_session"])]
    no_cache: bool,
    /// Registry whose user is named, as names of images have it: host or host:port. Default: the image's.
    #[arg(long, requires = "registry_user", value_name = "REGISTRY")]
    registry: Option<String>,
    /// Name of a user at the registry.
    #[arg(long, value_name = "NAME")]
    registry_user: Option<String>,
    /// File with that user's password, or - for standard input.
    #[arg(long, requires = "registry_user", value_name = "FILE")]
    registry_password_file: Option<PathBuf>,
    /// Which image of the archive, if it has several: its tag in a layout, its name:tag if docker wrote it.
    #[arg(long, requires = "image_archive", value_name = "NAME")]
    image_name: Option<String>,
    /// Have its sessions begin with its ENTRYPOINT and CMD running, and ready.
    #[arg(long, requires = "ready", conflicts_with = "start_command")]
    start: bool,
    /// The same with a command for the shell.
    #[arg(long, requires = "ready", value_name = "COMMAND")]
    start_command: Option<String>,
    /// It is ready when somebody listens on this port; with a path, when a GET of that is answered with 2xx or 3xx: 8000, 8000/health.
    #[arg(long, group = "ready", value_name = "PORT[/PATH]", value_parser = port_probe)]
    ready_port: Option<PortProbe>,
    /// It is ready when this command for the shell, tried again and again, ends with 0.
    #[arg(long, group = "ready", value_name = "COMMAND")]
    ready_command: Option<String>,
    /// It is ready when a line of its output has this text in it.
    #[arg(long, group = "ready", value_name = "TEXT")]
    ready_log: Option<String>,
    /// For how long it may take until it is ready, at most 10m.
    #[arg(long, requires = "ready", value_name = "DURATION", default_value = "60s", value_parser = parse_duration)]
    ready_timeout: Duration,
    /// Default memory of its sessions.
    #[arg(long, value_parser = parse_bytes, default_value = "512MiB")]
    memory: u64,
    /// Default virtual CPUs of its sessions.
    #[arg(long, default_value_t = 1)]
    vcpus: u32,
    /// Default writable disk of its sessions.
    #[arg(long, value_parser = parse_bytes, default_value = "4GiB")]
    disk: u64,
    /// The kernel of its sessions, by the name an operator gave it. Default: the deployment's.
    #[arg(
        long,
        value_name = "NAME",
        default_value = "",
        hide_default_value = true
    )]
    kernel: String,
    /// What its kernel is told after the node's own words: mitigations=off
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        hide_default_value = true
    )]
    kernel_arguments: String,
    /// For every team (operators).
    #[arg(long)]
    shared: bool,
}

pub(crate) async fn run(context: &Context, command: Command) -> anyhow::Result<()> {
    match command {
        Command::List => {
            let request = ListTemplatesRequest {
                page_size: 1000,
                ..ListTemplatesRequest::default()
            };
            let answer = context
                .client()?
                .templates()
                .list_templates(request)
                .await
                .map_err(said)?
                .into_inner();
            output::print(
                context.format(),
                "sandmesh.template.v1.ListTemplatesResponse",
                answer,
                |answer| {
                    let rows = answer.templates.into_iter().map(|template| {
                        let size = template
                            .rootfs
                            .map(|rootfs| output::bytes(rootfs.size_bytes))
                            .unwrap_or_default();
                        vec![
                            template.name,
                            template.version.to_string(),
                            template.tags.join(","),
                            size,
                            output::time(template.create_time),
                        ]
                    });
                    output::table(
                        &["template", "version", "tags", "image", "created"],
                        rows.collect(),
                    );
                },
            )?;
            Ok(())
        }
        Command::Inspect { template } => {
            let mut request = GetTemplateRequest {
                template,
                with_snapshots: true,
            };
            let mut client = context.client()?.templates();
            let mut answer = client.get_template(request.clone()).await;
            // All else is known without the store.
            if let Err(status) = &answer
                && reason_of(status).is_some_and(|reason| reason == "STORE_FAILED")
            {
                eprintln!("without its snapshots: {}", status.message());
                request.with_snapshots = false;
                answer = client.get_template(request).await;
            }
            let answer = answer.map_err(said)?.into_inner();
            output::print(
                context.format(),
                "sandmesh.template.v1.GetTemplateResponse",
                answer,
                |answer| {
                    inspect(answer.template.unwrap_or_default());
                    snapshots(&answer.snapshots);
                },
            )?;
            Ok(())
        }
        Command::Build(options) => {
            let template = options.run(context).await?;
            output::print(
                context.format(),
                "sandmesh.template.v1.Template",
                template,
                |template| println!("{}@{}", template.name, template.version),
            )?;
            Ok(())
        }
    }
}

impl Build {
    async fn run(self, context: &Context) -> anyhow::Result<Template> {
        let Self {
            tag,
            rootfs,
            image_archive,
            image,
            from_session,
            folder,
            file,
            arguments,
            secrets: sources,
            no_cache,
            registry,
            registry_user,
            registry_password_file,
            image_name,
            start,
            start_command,
            ready_port,
            ready_command,
            ready_log,
            ready_timeout,
            memory,
            vcpus,
            disk,
            kernel,
            kernel_arguments,
            shared,
        } = self;
        let (name, tags) = match tag.split_once(':') {
            Some((name, tag)) => (name.to_owned(), vec![tag.to_owned()]),
            None => (tag, Vec::new()),
        };
        let from = if let Some(tarball) = rootfs {
            From::Rootfs(tarball)
        } else if let Some(archive) = image_archive {
            From::Archive(archive, image_name.unwrap_or_default())
        } else if let Some(image) = image {
            From::Registry(image)
        } else if let Some(session) = from_session {
            From::Session(session)
        } else {
            dockerfile(file, folder).await?
        };
        let registry_logins = match registry_user {
            Some(username) => {
                let registry = match (registry, &from) {
                    (Some(registry), _) => registry,
                    (None, From::Registry(image)) => {
                        template_svc::registry::parse_reference(image)?
                            .registry()
                            .to_owned()
                    }
                    _ => bail!("say whose user it is: --registry"),
                };
                vec![login(registry, username, registry_password_file).await?]
            }
            None => Vec::new(),
        };
        let mut secrets = Vec::new();
        for source in sources {
            secrets.push(source.read().await?);
        }
        let probe = ready_port
            .map(Probe::Port)
            .or(ready_command.map(Probe::Command))
            .or(ready_log.map(Probe::LogLine));
        let argv = match start_command {
            Some(command) => vec!["/bin/sh".into(), "-c".into(), command],
            None => Vec::new(),
        };
        if probe.is_some() && !start && argv.is_empty() {
            bail!("say what is to be ready: --start or --start-command");
        }
        let start = (start || !argv.is_empty()).then(|| StartCommand {
            argv,
            readiness: Some(Readiness {
                probe,
                timeout: prost_types::Duration::try_from(ready_timeout).ok(),
            }),
            ..StartCommand::default()
        });
        let request = BuildTemplateRequest {
            start,
            name,
            tags,
            default_memory_bytes: memory,
            default_vcpus: vcpus,
            default_disk_bytes: disk,
            shared,
            registry_logins,
            secrets,
            build_args: arguments.into_iter().collect(),
            no_cache,
            kernel,
            kernel_arguments,
            ..BuildTemplateRequest::default()
        };
        if shared {
            let client = TemplateServiceClient::new(as_operator(context)?);
            build(client, from, request).await
        } else {
            build(context.client()?.templates(), from, request).await
        }
    }
}

fn inspect(template: Template) {
    let part = |artifact: &Option<Artifact>| match artifact {
        Some(Artifact { digest, size_bytes }) => {
            format!("{digest}  {}", output::bytes(*size_bytes))
        }
        None => String::new(),
    };
    let Template {
        name,
        version,
        tags,
        create_time,
        rootfs,
        kernel,
        modules,
        kernel_version,
        envd_version,
        default_vcpus,
        default_memory_bytes,
        default_disk_bytes,
        team,
        env,
        default_user,
        source_image,
        layers,
        start,
        kernel_arguments,
        kernel_name,
    } = template;
    let line = |name: &str, value: String| {
        if !value.is_empty() {
            println!("{name:<12}{value}");
        }
    };
    line("template", format!("{name}@{version}"));
    line("tags", tags.join(", "));
    line("team", team);
    line("created", output::time(create_time));
    line("image", source_image);
    line("root", part(&rootfs));
    line("kernel", part(&kernel));
    line("modules", part(&modules));
    let kernel = if kernel_name == kernel_version {
        kernel_version
    } else {
        [kernel_name, kernel_version].join(" ")
    };
    line("", kernel.trim().to_owned());
    line("  told", kernel_arguments);
    line(
        "envd",
        format!("{envd_version} when it was built; nodes give their own"),
    );
    let (memory, disk) = (
        output::bytes(default_memory_bytes),
        output::bytes(default_disk_bytes),
    );
    let size = format!(
        "{default_vcpus} vCPUs, {memory} of memory, {disk} of disk, unless a session says otherwise"
    );
    line("size", size);
    line("user", default_user);
    let env: BTreeMap<_, _> = env.into_iter().collect();
    for (number, (name, value)) in env.into_iter().enumerate() {
        let first = if number == 0 { "environment" } else { "" };
        line(first, format!("{name}={value}"));
    }
    if let Some(start) = start {
        line("start", start.argv.join(" "));
        line("  in", start.cwd);
        line("  as", start.user);
        let ready = match start.readiness.and_then(|it| it.probe) {
            Some(Probe::Port(port)) => format!("port {}{}", port.port, port.http_path),
            Some(Probe::Command(command)) => format!("command {command}"),
            Some(Probe::LogLine(text)) => format!("a line with {text:?}"),
            None => String::new(),
        };
        line("  ready by", ready);
    }
    for (number, layer) in layers.iter().enumerate() {
        let first = if number == 0 { "layers" } else { "" };
        line(first, format!("{}  {}", layer.diff_id, part(&layer.blob)));
    }
}

/// What nodes have made of a template for each other.
fn snapshots(snapshots: &[StoredSnapshot]) {
    if snapshots.is_empty() {
        return;
    }
    let rows = snapshots.iter().map(|snapshot| {
        let memory = output::bytes(snapshot.memory_bytes);
        let disk = output::bytes(snapshot.disk_bytes);
        vec![
            format!("{} vCPUs, {memory}, {disk}", snapshot.vcpus),
            snapshot.vmm.clone(),
            snapshot.cpu.clone(),
            snapshot.envd.clone(),
            output::bytes(snapshot.stored_bytes),
            output::time(snapshot.use_time),
        ]
    });
    println!();
    output::table(
        &["snapshot", "vmm", "cpu", "envd", "stored", "used"],
        rows.collect(),
    );
}

fn argument(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("must be NAME=VALUE".into()),
    }
}

/// Where a secret is to be had.
#[derive(Debug, Clone, PartialEq, Eq)]
struct SecretSource {
    id: String,
    place: SecretPlace,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum SecretPlace {
    File(PathBuf),
    Variable(String),
    /// As with docker: the variable of the ID's name if it is set, else the file.
    Either,
}

/// In the words of `docker build --secret`.
fn secret_source(text: &str) -> Result<SecretSource, String> {
    let (mut id, mut kind, mut file, mut variable) = (None, None, None, None);
    for field in text.split(',') {
        let (name, value) = field.split_once('=').unwrap_or((field, ""));
        let to = match name {
            "id" => &mut id,
            "type" => &mut kind,
            "src" | "source" => &mut file,
            "env" => &mut variable,
            _ => return Err(format!("{name:?} is not known: id, src, env and type are")),
        };
        if value.is_empty() || to.is_some() {
            return Err(format!("expected {name}=VALUE, once"));
        }
        *to = Some(value.to_owned());
    }
    let id = id.ok_or("expected id=ID")?;
    let place = match (kind.as_deref(), file, variable) {
        (None | Some("file"), Some(file), None) => SecretPlace::File(file.into()),
        // What type=env has as its source is a variable.
        (None | Some("env"), None, Some(variable)) | (Some("env"), Some(variable), None) => {
            SecretPlace::Variable(variable)
        }
        (None, None, None) => SecretPlace::Either,
        (Some("file"), None, None) => SecretPlace::File(id.clone().into()),
        (Some("env"), None, None) => SecretPlace::Variable(id.clone()),
        (Some(kind), ..) if !matches!(kind, "file" | "env") => {
            return Err(format!("type={kind} is not known: file and env are"));
        }
        _ => return Err("expected src=FILE or env=VARIABLE, not both".into()),
    };
    Ok(SecretSource { id, place })
}

impl SecretSource {
    async fn read(self) -> anyhow::Result<BuildSecret> {
        let Self { id, place } = self;
        let value = match place {
            SecretPlace::File(file) => secret_file(&file).await?,
            SecretPlace::Variable(name) => {
                let value = std::env::var_os(&name);
                let value = value.with_context(|| format!("the variable {name} is not set"))?;
                value.into_vec()
            }
            SecretPlace::Either => match std::env::var_os(&id) {
                Some(value) => value.into_vec(),
                None => secret_file(Path::new(&id)).await?,
            },
        };
        if value.len() as u64 > LARGEST_SECRET {
            bail!("the secret {id} is more than {LARGEST_SECRET} bytes");
        }
        Ok(BuildSecret { id, value })
    }
}

/// As much of a file as may be sent, and a byte of what is more.
async fn secret_file(path: &Path) -> anyhow::Result<Vec<u8>> {
    let shown = || path.display().to_string();
    let file = File::open(path).await.with_context(shown)?;
    let mut value = Vec::new();
    let mut beginning = file.take(LARGEST_SECRET + 1);
    beginning
        .read_to_end(&mut value)
        .await
        .with_context(shown)?;
    Ok(value)
}

fn port_probe(text: &str) -> Result<PortProbe, String> {
    let (port, path) = match text.split_once('/') {
        Some((port, path)) => (port, format!("/{path}")),
        None => (text, String::new()),
    };
    let port: u16 = port.parse().map_err(|_| "must be PORT or PORT/PATH")?;
    Ok(PortProbe {
        port: port.into(),
        http_path: path,
    })
}

/// A channel to template-svc as an operator.
pub(crate) fn as_operator(context: &Context) -> anyhow::Result<impl Transport + use<>> {
    let channel: MeshChannel = context.operator("template")?;
    let caller = operator_of("operators")?;
    let as_operator = move |mut request: Request<()>| {
        caller.apply(request.metadata_mut());
        Ok(request)
    };
    Ok(InterceptedService::new(channel, as_operator))
}

/// What a client speaks by, as a team or as an operator.
pub(crate) trait Transport:
    GrpcService<
        tonic::body::Body,
        Error: Into<StdError>,
        Future: Send,
        ResponseBody: Body<Data = Bytes, Error: Into<StdError> + Send> + Send + 'static,
    > + Clone
    + Send
{
}

impl<T> Transport for T where
    T: GrpcService<
            tonic::body::Body,
            Error: Into<StdError>,
            Future: Send,
            ResponseBody: Body<Data = Bytes, Error: Into<StdError> + Send> + Send + 'static,
        > + Clone
        + Send
{
}

/// What a template is made of.
enum From {
    /// A tarball of a root file system.
    Rootfs(PathBuf),
    /// A tarball of images, and which of them; empty for the only one.
    Archive(PathBuf, String),
    /// The name of an image in a registry.
    Registry(String),
    /// A session's ID.
    Session(String),
    /// The text of a Dockerfile, and what it takes files from.
    Dockerfile(String, Option<BuildContext>),
}

async fn dockerfile(file: Option<PathBuf>, folder: Option<PathBuf>) -> anyhow::Result<From> {
    let file = match (file, &folder) {
        (Some(file), _) => file,
        (None, Some(folder)) => folder.join("Dockerfile"),
        (None, None) => bail!(
            "say what to build from: DIR, --file, --image, --image-archive, --rootfs or --from-session"
        ),
    };
    let shown = file.display().to_string();
    let mut text = Vec::new();
    let read = async {
        let file = File::open(&file).await?;
        // What is larger is not sent to be told so.
        file.take(LARGEST as u64 + 1).read_to_end(&mut text).await
    };
    read.await.with_context(|| shown.clone())?;
    if text.len() > LARGEST {
        bail!("{shown}: line 1, column 1: a Dockerfile is at most {LARGEST} bytes");
    }
    let text = String::from_utf8(text).context(shown)?;
    let Some(folder) = folder else {
        return Ok(From::Dockerfile(text, None));
    };
    // One of its own comes before the folder's, as with docker.
    let mut own = file.into_os_string();
    own.push(".dockerignore");
    let mut ignore = String::new();
    for path in [PathBuf::from(own), folder.join(".dockerignore")] {
        match tokio::fs::read_to_string(&path).await {
            Ok(found) => {
                ignore = found;
                break;
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| path.display().to_string()),
        }
    }
    let shown = folder.display().to_string();
    let read = tokio::task::spawn_blocking(move || BuildContext::read(&folder, &ignore)).await?;
    Ok(From::Dockerfile(text, Some(read.context(shown)?)))
}

/// The credentials of a user for a registry; the password comes from the environment or a file, never from the command line.
async fn login(
    registry: String,
    username: String,
    file: Option<PathBuf>,
) -> anyhow::Result<RegistryLogin> {
    let password = match file {
        Some(file) if file.as_os_str() == "-" => {
            let mut text = String::new();
            tokio::io::stdin().read_to_string(&mut text).await?;
            text
        }
        Some(file) => tokio::fs::read_to_string(&file)
            .await
            .with_context(|| file.display().to_string())?,
        None => std::env::var(PASSWORD).with_context(|| {
            format!("the password is to be in {PASSWORD} or in a --registry-password-file")
        })?,
    };
    Ok(RegistryLogin {
        registry,
        username,
        password: password.trim_end_matches(['\r', '\n']).to_owned(),
    })
}

async fn build<T: Transport>(
    mut client: TemplateServiceClient<T>,
    from: From,
    mut request: BuildTemplateRequest,
) -> anyhow::Result<Template> {
    let source = match from {
        From::Rootfs(file) => Source::RootfsTarball(upload(&mut client, &file).await?),
        From::Archive(file, image) => {
            let digest = upload(&mut client, &file).await?;
            Source::ImageArchive(ImageArchive { digest, image })
        }
        From::Registry(image) => Source::OciImage(image),
        From::Session(id) => Source::SessionId(id),
        From::Dockerfile(text, context) => {
            if let Some(context) = context {
                let bar = progress_bar(0);
                let sent = context.upload(&mut client, |sent, total| {
                    bar.set_length(total);
                    bar.set_position(sent);
                });
                let sent = sent.await;
                bar.finish_and_clear();
                sent?;
                request.context = context.digest().to_owned();
            }
            Source::Dockerfile(text)
        }
    };
    request.source = Some(BuildSource {
        source: Some(source),
    });
    // Asked again it is the same build.
    request.request_id = format!("{:032x}", rand::random::<u128>());
    let BuildTemplateResponse { build } = ask(&mut client, request).await?;
    let build_id = build.context("the build was not answered")?.build_id;
    let spinner = output::spinner("building");
    let mut follower = client.clone();
    let followed = tokio::select! {
        followed = follow(&mut follower, &build_id, &spinner) => followed,
        interrupted = tokio::signal::ctrl_c() => {
            interrupted?;
            spinner.set_message("cancelling");
            let request = CancelBuildRequest { build_id };
            let answer = tokio::select! {
                answer = client.cancel_build(request) => answer.map_err(said)?.into_inner(),
                again = tokio::signal::ctrl_c() => {
                    again?;
                    bail!("the build may go on");
                }
            };
            spinner.finish_and_clear();
            match answer.build.unwrap_or_default().state() {
                BuildState::Cancelled => bail!("cancelled"),
                state => bail!("the build had ended before: {state:?}"),
            }
        }
    };
    spinner.finish_and_clear();
    let answer = followed?;
    let build = answer.build.context("the build is gone")?;
    if build.state() != BuildState::Succeeded {
        bail!(
            "the build failed: {} ({})",
            build.error_message,
            build.error_reason
        );
    }
    answer.template.context("the build made no template")
}

/// Asks for a build, again if nobody answers: a service may just start anew.
async fn ask<T: Transport>(
    client: &mut TemplateServiceClient<T>,
    request: BuildTemplateRequest,
) -> Result<BuildTemplateResponse, sdk::Error> {
    let since = Instant::now();
    loop {
        let error = match client.build_template(request.clone()).await {
            Ok(answer) => return Ok(answer.into_inner()),
            Err(status) => said(status),
        };
        if !error.is_interruption() || since.elapsed() > PATIENCE {
            return Err(error);
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

/// Shows a build's log until its end, over what breaks in between; how it ended.
async fn follow<T: Transport>(
    client: &mut TemplateServiceClient<T>,
    build_id: &str,
    spinner: &ProgressBar,
) -> anyhow::Result<GetBuildResponse> {
    let (mut seen, mut before) = (0, 0);
    let mut failing = None;
    loop {
        let listening = Instant::now();
        let error = match follow_once(client, build_id, &mut seen, spinner).await {
            Ok(answer) => return Ok(answer),
            Err(error) => error,
        };
        // A step may have nothing to say for long.
        if seen > before || listening.elapsed() > LISTENED {
            (before, failing) = (seen, None);
        }
        // The build goes on without who watches it.
        let since = *failing.get_or_insert_with(Instant::now);
        if !error.is_interruption() || since.elapsed() > PATIENCE {
            return Err(error.into());
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

async fn follow_once<T: Transport>(
    client: &mut TemplateServiceClient<T>,
    build_id: &str,
    seen: &mut u64,
    spinner: &ProgressBar,
) -> Result<GetBuildResponse, sdk::Error> {
    let request = StreamBuildLogsRequest {
        build_id: build_id.to_owned(),
        after_number: *seen,
    };
    let lines = client.stream_build_logs(request).await.map_err(said)?;
    let mut lines = lines.into_inner();
    while let Some(line) = lines.message().await.map_err(said)? {
        *seen = line.number;
        spinner.suspend(|| eprintln!("{}", line.message));
    }
    let request = GetBuildRequest {
        build_id: build_id.to_owned(),
    };
    Ok(client.get_build(request).await.map_err(said)?.into_inner())
}

fn progress_bar(total: u64) -> ProgressBar {
    if std::io::stderr().is_terminal() {
        ProgressBar::new(total)
    } else {
        ProgressBar::hidden()
    }
}

/// Sends a file, and has its digest.
pub(crate) async fn upload<T: Transport>(
    client: &mut TemplateServiceClient<T>,
    file: &Path,
) -> anyhow::Result<String> {
    let mut file = File::open(file)
        .await
        .with_context(|| file.display().to_string())?;
    let total = file.metadata().await?.len();
    let bar = progress_bar(total);
    let (parts, stream) = mpsc::channel(IN_FLIGHT);
    let upload = client.upload_source(ReceiverStream::new(stream));
    let feed = async {
        loop {
            let mut chunk = Vec::with_capacity(CHUNK);
            if (&mut file)
                .take(CHUNK as u64)
                .read_to_end(&mut chunk)
                .await?
                == 0
            {
                break;
            }
            bar.inc(chunk.len() as u64);
            if parts
                .send(UploadSourceRequest {
                    data: Bytes::from(chunk),
                })
                .await
                .is_err()
            {
                // The server stopped listening; its answer says why.
                break;
            }
        }
        drop(parts);
        Ok::<_, std::io::Error>(())
    };
    let (answer, fed) = tokio::join!(upload, feed);
    bar.finish_and_clear();
    fed?;
    let UploadSourceResponse { source } = answer.map_err(said)?.into_inner();
    Ok(source.context("the upload was not answered")?.digest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_named_as_with_docker() {
        let source = |text: &str| secret_source(text).map(|it| (it.id, it.place));
        let a = |place| Ok(("a".to_owned(), place));
        let file = |path: &str| a(SecretPlace::File(path.into()));
        let variable = |name: &str| a(SecretPlace::Variable(name.into()));
        assert_eq!(source("id=a,src=x/y=z"), file("x/y=z"));
        assert_eq!(source("type=file,id=a,source=x"), file("x"));
        assert_eq!(source("id=a,env=TOKEN"), variable("TOKEN"));
        assert_eq!(source("type=env,src=TOKEN,id=a"), variable("TOKEN"));
        assert_eq!(source("type=env,id=a"), variable("a"));
        assert_eq!(source("type=file,id=a"), file("a"));
        assert_eq!(source("id=a"), a(SecretPlace::Either));
        for (text, said) in [
            ("", "is not known"),
            ("a", "is not known"),
            ("src=x", "id=ID"),
            ("id=", "id=VALUE"),
            ("id=a,id=b", "once"),
            ("id=a,src", "src=VALUE"),
            ("id=a,src=x,env=Y", "not both"),
            ("id=a,type=file,env=Y", "not both"),
            ("id=a,type=vault", "type=vault"),
            ("id=a,value=hidden", "is not known"),
        ] {
            let wrong = source(text).unwrap_err();
            assert!(wrong.contains(said), "{text}: {wrong}");
        }
    }

    #[tokio::test]
    async fn secrets_are_read_as_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        std::fs::write(&path, b"\xff\n").unwrap();
        let read = |place| {
            let id = "no-variable-of-that-name".to_owned();
            SecretSource { id, place }.read()
        };
        let secret = read(SecretPlace::File(path.clone())).await.unwrap();
        assert_eq!(secret.value, b"\xff\n");
        let missing = read(SecretPlace::Either).await.unwrap_err();
        assert!(missing.to_string().contains("no-variable-of-that-name"));
        let unset = read(SecretPlace::Variable("NO_SUCH_VARIABLE".into())).await;
        assert!(unset.unwrap_err().to_string().contains("is not set"));
        std::fs::write(&path, vec![b'x'; 500 << 10]).unwrap();
        assert!(read(SecretPlace::File(path.clone())).await.is_ok());
        std::fs::write(&path, vec![b'x'; (500 << 10) + 1]).unwrap();
        let large = read(SecretPlace::File(path)).await.unwrap_err();
        assert!(large.to_string().contains("512000"), "{large}");
    }
}
