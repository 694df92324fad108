//! Starts the parts in order, starts again what ends, and stops them in the reverse order.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, bail};
use proto::key::v1::{CreateKeyRequest, key_service_client::KeyServiceClient};
use service_kit::{
    address::Address,
    config,
    mesh::{self, MeshToken},
    telemetry::{self, LogFormat, TelemetryConfig},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    Options,
    child::{self, User},
    down,
    envoy::Envoy,
    plan::{Plan, ServicePlan},
    postgres::Postgres,
    redis::Redis,
    status::{PartRecord, ProcessRecord, Record, answers},
};
use crate::{
    context::ClientFile,
    serve::{self, Service},
};

const BACK_OFF: Duration = Duration::from_millis(500);
const START_LIMIT: Duration = Duration::from_mins(1);
const STOP_LIMIT: Duration = Duration::from_secs(45);
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Runs everything until SIGTERM or SIGINT.
pub(super) async fn run(state: &Path, options: &Options) -> anyhow::Result<()> {
    for folder in ["run", "logs"] {
        fs::create_dir_all(state.join(folder))?;
    }
    let mut telemetry_config = TelemetryConfig {
        log_format: LogFormat::Json,
        log: std::env::var("SANDMESH_LOG").unwrap_or_else(|_| "info".into()),
        otlp_endpoint: options.otlp.map(|otlp| format!("http://{otlp}")),
        admin_address: None,
    };
    let guard = telemetry::init("sandmesh", &telemetry_config)?;
    let shutdown = CancellationToken::new();
    tokio::spawn(serve::on_signal(shutdown.clone()));
    // A supervisor before this one may have been killed: nodes that run again take over what they left.
    down::clean_nodes(state, usize::try_from(options.nodes)?)?;
    let plan = Plan::make(state, options)?;
    let token = MeshToken::load_or_create(&state.join("mesh.token"))?;
    let supervisor = Supervisor::new(&plan, shutdown.clone())?;
    if !options.separate {
        telemetry_config.admin_address = Some(plan.admin.to_string());
    }
    let admin = serve::admin(&telemetry_config, &guard, shutdown.clone());
    let outcome = supervisor.run(&plan, &token, options).await;
    shutdown.cancel();
    supervisor.stop().await;
    admin.await?;
    Record::remove(state)?;
    tokio::task::spawn_blocking(move || guard.shutdown()).await?;
    outcome
}

/// One stage of the start: its parts are stopped together.
#[derive(Debug, Clone)]
struct Stage {
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Stage {
    fn new() -> Self {
        Self {
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
        }
    }

    async fn end(&self, name: &str) {
        self.stop.cancel();
        self.tasks.close();
        if tokio::time::timeout(STOP_LIMIT, self.tasks.wait())
            .await
            .is_err()
        {
            tracing::error!(stage = name, "parts did not stop in time");
        }
    }
}

#[derive(Debug, Clone)]
struct Supervisor {
    state: PathBuf,
    shutdown: CancellationToken,
    record: Arc<Mutex<Record>>,
    stores: Stage,
    services: Stage,
    edge: Stage,
}

/// A program that is kept running.
#[derive(Debug, Clone)]
struct Program {
    name: String,
    path: PathBuf,
    arguments: Vec<String>,
    user: Option<User>,
    address: String,
    metrics: Option<String>,
}

impl Supervisor {
    fn new(plan: &Plan, shutdown: CancellationToken) -> anyhow::Result<Self> {
        let myself =
            ProcessRecord::of(std::process::id()).context("no entry of this process in /proc")?;
        let record = Record {
            supervisor: myself,
            endpoint: format!("http://{}", plan.edge),
            ready: false,
            parts: Vec::new(),
        };
        record.write(&plan.state)?;
        Ok(Self {
            state: plan.state.clone(),
            shutdown,
            record: Arc::new(Mutex::new(record)),
            stores: Stage::new(),
            services: Stage::new(),
            edge: Stage::new(),
        })
    }

    async fn run(&self, plan: &Plan, token: &MeshToken, options: &Options) -> anyhow::Result<()> {
        let start = self.start(plan, token, options);
        tokio::select! {
            started = start => started?,
            () = self.shutdown.cancelled() => return Ok(()),
        }
        self.note(|record| record.ready = true)?;
        tracing::info!(endpoint = %plan.edge, "up");
        self.shutdown.cancelled().await;
        Ok(())
    }

    async fn start(&self, plan: &Plan, token: &MeshToken, options: &Options) -> anyhow::Result<()> {
        let postgres = Postgres::prepare(&self.state).await?;
        let redis = Redis::prepare(&plan.redis_socket())?;
        self.keep_program(
            &self.stores,
            Program {
                name: "postgres".into(),
                path: postgres.program,
                arguments: postgres.arguments,
                user: Some(postgres.user),
                address: format!("unix:{}", postgres.socket.display()),
                metrics: None,
            },
        )
        .await?;
        self.keep_program(
            &self.stores,
            Program {
                name: "redis".into(),
                path: redis.program,
                arguments: redis.arguments,
                user: None,
                address: format!("unix:{}", plan.redis_socket().display()),
                metrics: None,
            },
        )
        .await?;
        for service in &plan.services {
            if options.separate {
                let mut arguments = vec![
                    "serve".to_owned(),
                    service.service.to_owned(),
                    "--log-format=json".into(),
                ];
                arguments.extend(service.arguments.clone());
                self.keep_program(
                    &self.services,
                    Program {
                        name: service.name.clone(),
                        path: std::env::current_exe()?,
                        arguments,
                        user: None,
                        address: service.address.clone(),
                        metrics: Some(service.metrics()),
                    },
                )
                .await?;
            } else {
                self.keep_service(service).await?;
            }
            if service.service == "gateway" {
                self.add_part(
                    "gateway-operators",
                    &service.name,
                    &plan.operators_address(),
                )?;
                self.write_client_file(plan, token).await?;
            }
        }
        let envoy = Envoy::prepare(plan, token, &self.state)?;
        self.keep_program(
            &self.edge,
            Program {
                name: "envoy".into(),
                path: envoy.program,
                arguments: envoy.arguments,
                user: None,
                address: plan.edge.to_string(),
                metrics: Some(format!("http://{}/stats/prometheus", plan.envoy_admin)),
            },
        )
        .await
    }

    /// Another address of a part that is there.
    fn add_part(&self, name: &str, of: &str, address: &str) -> anyhow::Result<()> {
        self.note(|record| {
            if let Some(part) = record.parts.iter().find(|part| part.name == of).cloned() {
                record.parts.push(PartRecord {
                    name: name.to_owned(),
                    address: address.to_owned(),
                    ..part
                });
            }
        })
    }

    fn note(&self, change: impl FnOnce(&mut Record)) -> anyhow::Result<()> {
        let mut record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut record);
        record.write(&self.state)
    }

    fn note_part(
        &self,
        name: &str,
        pid: u32,
        address: &str,
        metrics: Option<&str>,
    ) -> anyhow::Result<()> {
        let process = ProcessRecord::of(pid).with_context(|| format!("{name} ended at once"))?;
        self.note(|record| {
            match record.parts.iter_mut().find(|part| part.name == name) {
                Some(part) => part.process = process,
                None => record.parts.push(PartRecord {
                    name: name.to_owned(),
                    process,
                    address: address.to_owned(),
                    metrics: metrics.map(str::to_owned),
                }),
            }
            if name == "gateway"
                && let Some(part) = record
                    .parts
                    .iter_mut()
                    .find(|part| part.name == "gateway-operators")
            {
                part.process = process;
            }
        })
    }

    /// Starts a program, waits until it answers, and starts it again whenever it ends.
    async fn keep_program(&self, stage: &Stage, program: Program) -> anyhow::Result<()> {
        let log = self
            .state
            .join("logs")
            .join(format!("{}.log", program.name));
        let mut running = self.start_program(&program, &log)?;
        tokio::select! {
            answered = wait_for(&program.name, &program.address) => answered?,
            exit = running.wait() => bail!("{} did not start ({}); its log: {}", program.name, describe(exit), log.display()),
        }
        let (supervisor, stop) = (self.clone(), stage.stop.clone());
        stage.tasks.spawn(async move {
            loop {
                tokio::select! {
                    () = stop.cancelled() => {
                        finish(&mut running, &program.name).await;
                        return;
                    }
                    exit = running.wait() => {
                        tracing::error!(part = program.name, exit = describe(exit), "a part ended; starting it again");
                    }
                }
                loop {
                    tokio::select! {
                        () = stop.cancelled() => return,
                        () = tokio::time::sleep(BACK_OFF) => {}
                    }
                    match supervisor.start_program(&program, &log) {
                        Ok(again) => {
                            running = again;
                            break;
                        }
                        Err(error) => tracing::error!(part = program.name, %error, "a part cannot be started"),
                    }
                }
            }
        });
        Ok(())
    }

    fn start_program(
        &self,
        program: &Program,
        log: &Path,
    ) -> anyhow::Result<tokio::process::Child> {
        let child = child::start(&program.path, &program.arguments, log, program.user)
            .with_context(|| program.path.display().to_string())?;
        let pid = child
            .id()
            .with_context(|| format!("{} ended at once", program.name))?;
        self.note_part(
            &program.name,
            pid,
            &program.address,
            program.metrics.as_deref(),
        )?;
        Ok(child)
    }

    /// Runs a service in this process, and again if it fails.
    async fn keep_service(&self, plan: &ServicePlan) -> anyhow::Result<()> {
        let (stop, plan) = (self.services.stop.clone(), plan.clone());
        // Wrong settings are found before anything is served.
        check(&plan)?;
        let pid = std::process::id();
        self.note_part(&plan.name, pid, &plan.address, Some(&plan.metrics()))?;
        let (failed, mut failure) = tokio::sync::watch::channel(None);
        let (name, address) = (plan.name.clone(), plan.address.clone());
        self.services.tasks.spawn(async move {
            while !stop.is_cancelled() {
                match run_service(&plan, stop.clone()).await {
                    Ok(()) if stop.is_cancelled() => return,
                    Ok(()) => {
                        tracing::error!(part = plan.name, "a service ended; starting it again");
                    }
                    Err(error) => {
                        tracing::error!(
                            part = plan.name,
                            error = format!("{error:#}"),
                            "a service failed; starting it again"
                        );
                        failed.send_replace(Some(format!("{error:#}")));
                    }
                }
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = tokio::time::sleep(BACK_OFF) => {}
                }
            }
        });
        tokio::select! {
            answered = wait_for(&name, &address) => answered,
            _ = failure.changed() => bail!("{name}: {}", failure.borrow().clone().unwrap_or_default()),
        }
    }

    /// Makes a key for the team `default` once; clients on this machine read it from `client.toml`.
    async fn write_client_file(&self, plan: &Plan, token: &MeshToken) -> anyhow::Result<()> {
        let path = self.state.join("client.toml");
        let endpoint = format!("http://{}", plan.edge);
        let known = fs::read_to_string(&path)
            .ok()
            .and_then(|text| toml::from_str::<ClientFile>(&text).ok());
        let api_key = if let Some(known) = known {
            known.api_key
        } else {
            let address: Address = plan.operators_address().parse()?;
            wait_for("gateway-operators", &plan.operators_address()).await?;
            let mut keys = KeyServiceClient::new(mesh::connect(&[address], token));
            let request = CreateKeyRequest {
                team: "default".into(),
                description: "made by sandmesh up".into(),
            };
            keys.create_key(request).await?.into_inner().secret
        };
        let mut file = tempfile::NamedTempFile::new_in(&self.state)?;
        io::Write::write_all(
            &mut file,
            toml::to_string(&ClientFile { endpoint, api_key })?.as_bytes(),
        )?;
        file.persist(&path)?;
        Ok(())
    }

    async fn stop(&self) {
        // Users first, so that nothing new comes in; the stores last, since the services write until their end.
        self.edge.end("edge").await;
        self.services.end("services").await;
        self.stores.end("stores").await;
    }
}

fn describe(exit: io::Result<std::process::ExitStatus>) -> String {
    exit.map_or_else(|error| error.to_string(), |exit| exit.to_string())
}

async fn finish(child: &mut tokio::process::Child, name: &str) {
    // SIGINT is Postgres' fast shutdown; the others take it as SIGTERM.
    let signal = if name == "postgres" {
        nix::sys::signal::Signal::SIGINT
    } else {
        nix::sys::signal::Signal::SIGTERM
    };
    if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
        // It may have ended by itself.
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal);
    }
    if tokio::time::timeout(STOP_LIMIT, child.wait())
        .await
        .is_err()
    {
        tracing::error!(part = name, "a part had to be killed");
        if let Err(error) = child.kill().await {
            tracing::error!(part = name, %error, "a part cannot be killed");
        }
    }
}

async fn wait_for(name: &str, address: &str) -> anyhow::Result<()> {
    let waiting = async {
        while !answers(address).await {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    };
    tokio::time::timeout(START_LIMIT, waiting)
        .await
        .map_err(|_| anyhow::anyhow!("{name} does not answer at {address}"))
}

fn argv(plan: &ServicePlan) -> impl Iterator<Item = std::ffi::OsString> {
    let arguments = plan.arguments.clone().into_iter();
    std::iter::once(format!("sandmesh serve {}", plan.service))
        .chain(arguments)
        .map(Into::into)
}

fn check(plan: &ServicePlan) -> anyhow::Result<()> {
    match plan.service {
        "gateway" => config::load::<api_gateway::Config>("api-gateway", argv(plan)).map(drop)?,
        "session" => config::load::<session_svc::Config>("session-svc", argv(plan)).map(drop)?,
        "template" => config::load::<template_svc::Config>("template-svc", argv(plan)).map(drop)?,
        "node" => config::load::<node_svc::Config>("node-svc", argv(plan)).map(drop)?,
        _ => config::load::<envoy_control::Config>("envoy-control", argv(plan)).map(drop)?,
    }
    Ok(())
}

async fn run_service(plan: &ServicePlan, stop: CancellationToken) -> anyhow::Result<()> {
    async fn load_and_run<T: Service>(
        name: &'static str,
        plan: &ServicePlan,
        stop: CancellationToken,
    ) -> anyhow::Result<()> {
        let (settings, _) = config::load::<T>(name, argv(plan))?;
        // A service cancels its own token when it fails; the others must not hear it.
        settings.run(stop.child_token()).await
    }
    match plan.service {
        "gateway" => load_and_run::<api_gateway::Config>("api-gateway", plan, stop).await,
        "session" => load_and_run::<session_svc::Config>("session-svc", plan, stop).await,
        "template" => load_and_run::<template_svc::Config>("template-svc", plan, stop).await,
        "node" => load_and_run::<node_svc::Config>("node-svc", plan, stop).await,
        _ => load_and_run::<envoy_control::Config>("envoy-control", plan, stop).await,
    }
}
