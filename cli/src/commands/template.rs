//! `sandmesh template`.

use std::{
    collections::BTreeMap,
    io::IsTerminal as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use clap::Subcommand;
use indicatif::ProgressBar;
use proto::template::v1::{
    Artifact, BuildSource, BuildState, BuildTemplateRequest, BuildTemplateResponse,
    CancelBuildRequest, GetBuildRequest, GetBuildResponse, GetTemplateRequest, ImageArchive,
    ListTemplatesRequest, PortProbe, Readiness, RegistryLogin, StartCommand,
    StreamBuildLogsRequest, Template, UploadSourceRequest, UploadSourceResponse,
    build_source::Source, readiness::Probe, template_service_client::TemplateServiceClient,
};
use sdk::BuildContext;
use service_kit::{
    config::{parse_bytes, parse_duration},
    mesh::MeshChannel,
};
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
/// A log that is not to be had is waited for.
const PATIENCE: Duration = Duration::from_mins(1);
const LOOK_AGAIN: Duration = Duration::from_millis(300);
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
            let request = GetTemplateRequest { template };
            let mut client = context.client()?.templates();
            let answer = client.get_template(request).await.map_err(said)?;
            let template = answer.into_inner().template;
            let template = template.context("the template was not answered")?;
            output::print(
                context.format(),
                "sandmesh.template.v1.Template",
                template,
                inspect,
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
            build_args: arguments.into_iter().collect(),
            ..BuildTemplateRequest::default()
        };
        if shared {
            let channel: MeshChannel = context.operator("template")?;
            let caller = operator_of("operators")?;
            let as_operator = move |mut request: Request<()>| {
                caller.apply(request.metadata_mut());
                Ok(request)
            };
            let client = TemplateServiceClient::new(InterceptedService::new(channel, as_operator));
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
    line("", kernel_version);
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

fn argument(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("must be NAME=VALUE".into()),
    }
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

/// What a client speaks by, as a team or as an operator.
trait Transport:
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
    let text = tokio::fs::read_to_string(&file).await;
    let text = text.with_context(|| file.display().to_string())?;
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
    let BuildTemplateResponse { build } = client
        .build_template(request)
        .await
        .map_err(said)?
        .into_inner();
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

/// Shows a build's log until its end, over what breaks in between; how it ended.
async fn follow<T: Transport>(
    client: &mut TemplateServiceClient<T>,
    build_id: &str,
    spinner: &ProgressBar,
) -> anyhow::Result<GetBuildResponse> {
    let (mut seen, mut before) = (0, 0);
    let mut failing = None;
    loop {
        let error = match follow_once(client, build_id, &mut seen, spinner).await {
            Ok(answer) => return Ok(answer),
            Err(error) => error,
        };
        if seen > before {
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
async fn upload<T: Transport>(
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
