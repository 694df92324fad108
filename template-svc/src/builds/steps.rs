//! Dockerfiles, step by step, in microVMs. Nothing of one runs on this host: a build has a session of its own, as its team could have started
//! it, with the same limits of CPU, memory, disk and network.
//!
//! ```text
//!   FROM --> layers --> root, packed --> session --RUN--> what was changed, as a layer --RUN--> again, in place of it --> ... --> template
//!                                           ^
//!   build context, other stages ------------+ COPY
//! ```
//! After each `RUN` the whole of what was changed since the session's start is taken as one layer, so what a step removes of an earlier one is
//! gone. What a step has come to is remembered under its key: all that it depends on. The next build begins after the last step whose key is
//! known. Keys are of one team: what another team's step has made is not to be had by writing the same instruction. A session that is lost is
//! replaced ([`super::lost`]), and what was kept last is what the next one begins with.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs::File,
    sync::Arc,
    time::{Duration, SystemTime},
};

use proto::{
    envd::v1::{Backpressure, MakeDirectoryRequest, SignalTarget},
    session::v1::{CreateSessionRequest, Resources, Session},
    template::v1::{Artifact, Layer, Template},
};
use sdk::{Command, Event, Exit, Sandbox};
use service_kit::ids::{SessionId, TeamId};
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};
use tonic::Status;

use super::{
    BuildError, Builder, blocking,
    copy::missing,
    failed, io_failed,
    lost::{Losses, Refused, Room, is_worth_another_try, not_started, not_unpacked, refused},
    make::{Made, Making, has_layers, has_room},
    team_of,
};
use crate::{
    artifact::{ArtifactDigest, Artifacts},
    context::{Context, Pattern},
    dockerfile::{Action, Copy, Dockerfile, DockerfileError, Source, State, Step},
    image::{Defaults, MOST_LAYERS},
    names::{self, TemplateRef},
    sessions::{
        End, ExportError, Folders, PATIENCE, SandboxFiles, Sessions, is_unanswered, patiently,
    },
    store::{Store, StoreError, StoredBuild},
};

/// Which build a session is of.
pub(super) const LABEL: &str = "sandmesh.dev/build";
/// A step takes no longer, nor all of them together.
const STEP_LIMIT: Duration = Duration::from_mins(30);
const STEPS_LIMIT: Duration = Duration::from_hours(2);
/// After a step's deadline, until its end is known.
const GRACE: Duration = Duration::from_mins(1);
/// How often the registry is asked whether a build's session still runs. A watch would begin with all sessions of the team.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// How long it may take the registry to know of an end that is noticed here.
const SETTLE: Duration = Duration::from_secs(20);
/// What steps say beyond it is left out of the log.
const MOST_SAID: usize = 8 << 20;
const LONGEST_LINE: usize = 4096;
const ROW: usize = 64;
/// Lines are stored so many at once, or after so long.
const LINES_AT_ONCE: usize = 200;
pub(super) const LINGER: Duration = Duration::from_millis(200);
/// Pieces of a step's output that wait.
const PIECES: usize = 16;
/// Stages and images that files are copied from.
const MOST_ORIGINS: usize = 64;
/// `SIGKILL`
const KILL: i32 = 9;
/// Why envd does not start a program.
const OF_STEP: [&str; 7] = [
    "USER_UNKNOWN",
    "CWD_NOT_FOUND",
    "CWD_PERMISSION_DENIED",
    "PROGRAM_NOT_FOUND",
    "PROGRAM_NOT_EXECUTABLE",
    "INVALID_ARGUMENT",
    "NO_RESOURCES",
];

impl From<DockerfileError> for BuildError {
    fn from(error: DockerfileError) -> Self {
        failed("DOCKERFILE_INVALID", error.to_string())
    }
}

/// An action, and what holds for it.
pub(super) struct Planned {
    line: usize,
    /// As it is shown.
    pub(super) step: String,
    action: Action,
    state: Arc<State>,
    /// Where files are copied from.
    pub(super) origin: Option<Origin>,
    key: [u8; 32],
}

/// Where files are copied from.
#[derive(Clone)]
pub(super) struct Origin {
    /// What is copied, as far as it is known.
    key: [u8; 32],
    pub(super) tree: Tree,
}

#[derive(Clone)]
pub(super) enum Tree {
    /// The build context.
    Context,
    /// Another root.
    Layers(Vec<Layer>),
}

/// A Dockerfile that is being built.
pub(super) struct Building {
    pub(super) stored: Arc<StoredBuild>,
    pub(super) making: Making,
    pub(super) context: Option<Arc<Context>>,
    /// Of its team's contexts.
    pub(super) files: Artifacts,
    dockerfile: Arc<Dockerfile>,
    given: BTreeMap<String, String>,
    deadline: Instant,
    /// What files were copied from by now, by the number of its stage, or its name.
    origins: HashMap<String, Origin>,
    /// Sessions so far.
    sessions: u32,
    /// Of these, the ones that were lost.
    losses: Losses,
    said: Said,
}

impl Building {
    fn add_origin(&mut self, name: String, layers: Vec<Layer>) -> Result<Origin, BuildError> {
        if self.origins.len() >= MOST_ORIGINS {
            let message = format!("it copies from more than {MOST_ORIGINS} stages and images");
            return Err(failed("DOCKERFILE_INVALID", message));
        }
        let origin = Origin {
            key: first_key(&layers),
            tree: Tree::Layers(layers),
        };
        self.origins.insert(name, origin.clone());
        Ok(origin)
    }
}

/// How far the steps of a stage are.
struct Progress {
    /// What the session begins with, and how many steps have come to that.
    layers: Vec<Layer>,
    done: usize,
    /// The same of what was kept since.
    kept: Option<(Vec<Layer>, usize)>,
    /// The step that is done now.
    at: usize,
    said: Said,
}

impl Progress {
    /// Another session begins with what was kept last. Upon the most layers there may be nothing can be laid.
    fn begin_again(&mut self) {
        if let Some((layers, done)) = self.kept.take()
            && layers.len() < MOST_LAYERS
        {
            (self.layers, self.done) = (layers, done);
        }
        self.at = self.done;
    }
}

/// A stage, done.
struct Done {
    layers: Vec<Layer>,
    state: State,
}

impl Builder {
    /// Builds the last stage.
    pub(super) async fn dockerfile(
        &self,
        stored: &StoredBuild,
        text: &str,
        making: Making,
    ) -> Result<Made, BuildError> {
        let id = &stored.build.build_id;
        let given: BTreeMap<String, String> =
            stored.request.build_args.clone().into_iter().collect();
        let dockerfile = Arc::new(Dockerfile::parse(text)?);
        let last = dockerfile.stages.len().saturating_sub(1);
        let files = self.uploads.of(&team_of(stored)?).map_err(io_failed)?;
        let digest = stored.request.context.clone();
        let context = if digest.is_empty() {
            None
        } else {
            let files = files.clone();
            let open = move || Ok(Context::open(&files, &digest)?);
            Some(Arc::new(blocking(open).await?))
        };
        let mut building = Building {
            stored: Arc::new(stored.clone()),
            making: making.clone(),
            context,
            files,
            dockerfile,
            given,
            deadline: Instant::now() + STEPS_LIMIT,
            origins: HashMap::new(),
            sessions: 0,
            losses: Losses::default(),
            said: Said::default(),
        };
        let stages = needed(&building.dockerfile, last, &building.given)?;
        let deadline = building.deadline;
        let built = Box::pin(self.stages(&mut building, &stages));
        let late = |_| {
            let limit = STEPS_LIMIT.as_secs();
            let message = format!("the steps took more than {limit} s");
            failed("STEPS_TIMED_OUT", message)
        };
        let built = tokio::time::timeout_at(deadline, built).await;
        let Done { state, layers } = built.map_err(late)??;
        let defaults = Defaults {
            env: state.env.clone(),
            user: state.user.clone(),
            cwd: state.cwd.clone(),
            entrypoint: state.entrypoint.clone(),
            command: state.command.clone(),
        };
        defaults.check_env()?;
        let name = last_name(&layers, &state.user);
        let mut packed = None;
        if !stored.request.no_cache {
            let known = self.store.hidden(&stored.team, &name).await?;
            packed = known.and_then(|known| known.rootfs);
        }
        packed = packed.filter(|packed| self.is_kept(packed));
        if packed.is_none() {
            self.store.log(id, "packing the root filesystem").await?;
            let (defaults, laid) = (defaults.clone(), layers.clone());
            let rootfs = self
                .logged(id, move |lines| {
                    making.lay(&laid, lines)?;
                    making.check(&defaults)?;
                    making.pack()
                })
                .await?;
            self.keep_hidden(stored, &name, rootfs.clone()).await?;
            packed = Some(rootfs);
        }
        Ok(Made {
            defaults,
            source_image: String::new(),
            layers,
            packed,
        })
    }

    /// Builds stages, of which each copies from earlier ones only; the last is what is wanted.
    async fn stages(&self, building: &mut Building, stages: &[usize]) -> Result<Done, BuildError> {
        let mut last = None;
        for number in stages {
            if stages.last() == Some(number) {
                let making = building.making.clone();
                last = Some(self.stage(building, *number, making).await?);
                break;
            }
            // What is left of one is its layers.
            let making = building.making.clone();
            let making = blocking(move || making.fresh_aside("stage")).await?;
            let done = self.stage(building, *number, making).await?;
            building.add_origin(name_of(*number), done.layers)?;
        }
        last.ok_or_else(|| failed("DOCKERFILE_INVALID", "it has no stage"))
    }

    /// Builds a stage, and those it begins with.
    async fn stage(
        &self,
        building: &mut Building,
        number: usize,
        making: Making,
    ) -> Result<Done, BuildError> {
        let stored = Arc::clone(&building.stored);
        let dockerfile = Arc::clone(&building.dockerfile);
        let (base, stages) = chain(&dockerfile, number, &building.given)?;
        let made = self.base(&stored, &base, making.clone()).await?;
        let Defaults { env, user, cwd, .. } = &made.defaults;
        let mut state = State::new(env.clone(), cwd, user);
        state.entrypoint.clone_from(&made.defaults.entrypoint);
        state.command.clone_from(&made.defaults.command);
        let mut key = first_key(&made.layers);
        let mut planned = Vec::new();
        for number in stages {
            state.begin_stage();
            let count = dockerfile.stages.get(number).map_or(0, |it| it.steps.len());
            // Arguments of a stage hold in those that begin with it, too.
            for at in 0..count {
                let step = dockerfile.step(number, at);
                let followed = step.map(|step| {
                    let followed = dockerfile.follow(step, &mut state, &building.given);
                    followed.map(|followed| (step.line(), shown(step), followed))
                });
                let Some((line, step, (action, told))) = followed.transpose()? else {
                    continue;
                };
                if let Some(told) = told {
                    let line = format!("line {line}: {told}");
                    self.store.log(&stored.build.build_id, &line).await?;
                }
                let Some(action) = action else {
                    continue;
                };
                let origin = match &action {
                    Action::Copy(copy) => {
                        let copy = copy.clone();
                        self.origin(building, number, step.clone(), copy).await?
                    }
                    _ => None,
                };
                let from = origin.as_ref().map(|origin| origin.key);
                key = next_key(&key, &action, &state, from);
                // Most steps change nothing of it.
                let same = planned.last().map(|last: &Planned| &last.state);
                let same = same.filter(|same| ***same == state).cloned();
                planned.push(Planned {
                    line,
                    step,
                    action,
                    state: same.unwrap_or_else(|| Arc::new(state.clone())),
                    origin,
                    key,
                });
            }
        }
        let layers = self.steps(building, &planned, &made, &making).await?;
        Ok(Done { layers, state })
    }

    /// Where a step's files come from; nowhere if they all stand in the Dockerfile.
    async fn origin(
        &self,
        building: &mut Building,
        number: usize,
        step: String,
        copy: Copy,
    ) -> Result<Option<Origin>, BuildError> {
        let paths = copy.sources.iter().filter_map(|source| match source {
            Source::Path(pattern) => Some(pattern.clone()),
            Source::Text { .. } => None,
        });
        let paths: Vec<String> = paths.collect();
        if paths.is_empty() {
            return Ok(None);
        }
        let Some(from) = copy.from else {
            let none = || {
                let message = format!("{step}: the build has no context");
                failed("CONTEXT_MISSING", message)
            };
            let context = building.context.clone().ok_or_else(none)?;
            let cancel = building.making.cancelled();
            let key = move || {
                let mut hasher = blake3::Hasher::new_derive_key("sandmesh build: sources");
                for path in &paths {
                    let key = context.key(path, &|| cancel.is_cancelled());
                    match key {
                        Some(key) => hasher.update(&key),
                        // As with BuildKit, a pattern may mean nothing.
                        None if Pattern::new(path).is_exact() => return Err(missing(&step, path)),
                        None => hasher.update(b"nothing"),
                    };
                }
                Ok(hasher.finalize().into())
            };
            return Ok(Some(Origin {
                key: blocking(key).await?,
                tree: Tree::Context,
            }));
        };
        let name = match building.dockerfile.origin(number, &from) {
            Some(stage) => name_of(stage),
            None => from.clone(),
        };
        if let Some(known) = building.origins.get(&name) {
            return Ok(Some(known.clone()));
        }
        let making = building.making.clone();
        let making = blocking(move || making.fresh_aside("image")).await?;
        let stored = Arc::clone(&building.stored);
        let made = self.base(&stored, &from, making).await?;
        building.add_origin(name, made.layers).map(Some)
    }

    /// A template of the team's or everybody's, or else an image.
    async fn base(
        &self,
        stored: &StoredBuild,
        name: &str,
        making: Making,
    ) -> Result<Made, BuildError> {
        let id = &stored.build.build_id;
        let template = match TemplateRef::parse(name) {
            Ok(reference) if !names::is_hidden(&reference.name) => {
                self.store.find(&stored.team, &reference).await?
            }
            _ => None,
        };
        let Some(template) = template else {
            return self.image_base(stored, name, making).await;
        };
        let shown = format!("{}@{}", template.name, template.version);
        let template = self.held(has_layers(template)?)?;
        let start = template.start.unwrap_or_default();
        let line = format!("{name} is the template {shown}");
        self.store.log(id, &line).await?;
        Ok(Made {
            defaults: Defaults {
                env: template.env.into_iter().collect(),
                user: template.default_user,
                cwd: start.cwd,
                command: start.argv,
                ..Defaults::default()
            },
            layers: template.layers,
            ..Made::default()
        })
    }

    /// Does what no build has done before; the layers that come of it.
    async fn steps(
        &self,
        building: &mut Building,
        planned: &[Planned],
        base: &Made,
        making: &Making,
    ) -> Result<Vec<Layer>, BuildError> {
        let stored = Arc::clone(&building.stored);
        let stored = &*stored;
        let id = &stored.build.build_id;
        let mut layers = base.layers.clone();
        let mut done = 0;
        let looked_up = if stored.request.no_cache {
            0
        } else {
            planned.len()
        };
        for number in (1..=looked_up).rev() {
            let Some(plan) = planned.get(number - 1) else {
                continue;
            };
            let known = self.known(stored, plan.key).await?;
            // Upon the most there may be nothing can be laid.
            let is_last = number == planned.len();
            if let Some(known) = known.filter(|it| is_last || it.len() < MOST_LAYERS) {
                (layers, done) = (known, number);
                break;
            }
        }
        let known = planned.get(..done).unwrap_or_default();
        let lines = known.iter().map(|plan| format!("{}: known", plan.step));
        let lines: Vec<String> = lines.collect();
        self.store.log_all(id, &lines).await?;
        if done == planned.len() {
            return Ok(layers);
        }
        has_room(&layers)?;
        if let Err(error) = self.stop_leftovers(&team_of(stored)?, id).await {
            // Whoever ends the build tries again.
            tracing::warn!(build_id = id, %error, "sessions of an earlier builder are left for now");
        }
        let mut progress = Progress {
            layers,
            done,
            kept: None,
            at: done,
            // Of all stages together.
            said: std::mem::take(&mut building.said),
        };
        loop {
            let done = self.session(building, planned, &mut progress, making);
            let lost = Box::pin(done).await?;
            // It may have been lost after all was kept.
            if let Some((layers, _)) = progress.kept.take_if(|(_, done)| *done == planned.len()) {
                building.said = progress.said;
                return Ok(layers);
            }
            let Some((end, began)) = lost else {
                return Err(failed("BUILD_FAILED", "steps ended with nothing kept"));
            };
            let step = planned.get(progress.at).map_or("", |plan| &plan.step);
            let line = format!("{step}: the session was lost: {end}");
            self.store.log(id, &line).await?;
            building.losses.count(began.then_some(step), &end)?;
            progress.begin_again();
            let next = planned.get(progress.done).map_or("", |plan| &plan.step);
            let line = format!("another session goes on with {next}");
            self.store.log(id, &line).await?;
        }
    }

    /// Does what steps it can in a session of its own; why that was lost, if it was, and whether it had begun.
    async fn session(
        &self,
        building: &mut Building,
        planned: &[Planned],
        progress: &mut Progress,
        making: &Making,
    ) -> Result<Option<(End, bool)>, BuildError> {
        let stored = Arc::clone(&building.stored);
        let team = team_of(&stored)?;
        let template = self.packed(&stored, &progress.layers, making).await?;
        building.sessions += 1;
        let started = self
            .start(&stored, &team, &template, building.sessions)
            .await;
        let running = match started {
            Err(BuildError::Sandbox { end, .. }) => return Ok(Some((end, false))),
            started => started?,
        };
        let done = tokio::select! {
            biased;
            done = self.steps_in(&running, building, planned, progress, making) => done,
            // Streams tell it sooner, but not if their host has gone without a word.
            end = running.ended() => return Ok(Some((end, true))),
        };
        match done {
            Err(BuildError::Sandbox { end, .. }) => {
                // The registry has the true reason, if it comes to know of it.
                let ended = tokio::time::timeout(SETTLE, running.ended()).await;
                Ok(Some((ended.unwrap_or(end), true)))
            }
            done => {
                done?;
                running.stop().await;
                Ok(None)
            }
        }
    }

    /// Does the steps that are to be done, and keeps what they come to.
    async fn steps_in(
        &self,
        running: &Running,
        building: &Building,
        planned: &[Planned],
        progress: &mut Progress,
        making: &Making,
    ) -> Result<(), BuildError> {
        let stored = &*building.stored;
        let id = &stored.build.build_id;
        let done = progress.done;
        for (number, plan) in planned.iter().enumerate().skip(done) {
            progress.at = number;
            self.store.log(id, &plan.step).await?;
            let since = Instant::now();
            let said = &mut progress.said;
            let is_run = self.act(building, running, plan, said).await?;
            // What only folders and copies have come to is taken with what comes next.
            if is_run || number + 1 == planned.len() {
                let changed = self.change_of(id, running, making).await?;
                let mut all = progress.layers.clone();
                all.push(changed);
                self.remember(stored, &plan.key, &all).await?;
                progress.kept = Some((all, number + 1));
            }
            let line = format!(
                "line {}: done in {:.1} s",
                plan.line,
                since.elapsed().as_secs_f64()
            );
            self.store.log(id, &line).await?;
        }
        Ok(())
    }

    /// What a step has come to before, if all of it is still here.
    pub(super) async fn known(
        &self,
        stored: &StoredBuild,
        key: [u8; 32],
    ) -> Result<Option<Vec<Layer>>, BuildError> {
        let known = self.store.known_step(&stored.team, &key).await?;
        let is_here = |layer: &Layer| layer.blob.as_ref().is_some_and(|blob| self.is_kept(blob));
        Ok(known.filter(|layers| layers.iter().all(is_here)))
    }

    /// Remembers what a step has come to, if there is room for it.
    pub(super) async fn remember(
        &self,
        stored: &StoredBuild,
        key: &[u8; 32],
        layers: &[Layer],
    ) -> Result<(), BuildError> {
        let made_of = Template {
            layers: layers.to_vec(),
            ..Template::default()
        };
        self.quota.make_room(&stored.team, made_of).await?;
        Ok(self.store.remember_step(&stored.team, key, layers).await?)
    }

    /// Keeps a root for builds to come, under a hidden name, if there is room for it.
    async fn keep_hidden(
        &self,
        stored: &StoredBuild,
        name: &str,
        rootfs: Artifact,
    ) -> Result<(), BuildError> {
        let spec = Template {
            rootfs: Some(rootfs),
            ..self.spec(stored)
        };
        self.quota.make_room(&stored.team, spec.clone()).await?;
        Ok(self.store.keep_hidden(&stored.team, name, &spec).await?)
    }

    /// Whether it is here, and stays for as long as a build may last.
    pub(super) fn is_kept(&self, artifact: &Artifact) -> bool {
        let digest = ArtifactDigest::parse(&artifact.digest);
        let kept = digest.map(|digest| self.artifacts.touch(&digest, SystemTime::now()));
        // One that cannot be looked at is none that can be used.
        matches!(kept, Some(Ok(true)))
    }

    /// A template, for builds only, of those layers.
    async fn packed(
        &self,
        stored: &StoredBuild,
        layers: &[Layer],
        making: &Making,
    ) -> Result<String, BuildError> {
        let mut hasher = blake3::Hasher::new_derive_key("sandmesh build: begin");
        hasher.update(&first_key(layers));
        // With another kernel it is another template.
        for part in [&self.kernel.kernel, &self.kernel.modules] {
            hasher.update(part.digest.as_bytes());
        }
        let name = names::hidden(&hasher.finalize().to_hex());
        let known = self.store.hidden(&stored.team, &name).await?;
        let known = known.and_then(|known| known.rootfs);
        if !known.is_some_and(|rootfs| self.is_kept(&rootfs)) {
            let id = &stored.build.build_id;
            self.store
                .log(id, "packing what the steps begin with")
                .await?;
            let (making, layers) = (making.clone(), layers.to_vec());
            let rootfs = self
                .logged(id, move |lines| {
                    making.lay(&layers, lines)?;
                    making.pack()
                })
                .await?;
            self.keep_hidden(stored, &name, rootfs).await?;
        }
        Ok(format!("{name}@1"))
    }

    /// Ends what an earlier builder of this build has left.
    pub(super) async fn stop_leftovers(&self, team: &TeamId, id: &str) -> Result<(), BuildError> {
        for session in self.sessions.labelled(team, LABEL, id).await? {
            self.sessions.stop(team, &session).await?;
        }
        Ok(())
    }

    async fn start(
        &self,
        stored: &StoredBuild,
        team: &TeamId,
        template: &str,
        number: u32,
    ) -> Result<Running, BuildError> {
        let id = &stored.build.build_id;
        let spec = self.spec(stored);
        let request = CreateSessionRequest {
            template: template.to_owned(),
            timeout: prost_types::Duration::try_from(STEPS_LIMIT + GRACE).ok(),
            metadata: HashMap::from([(LABEL.to_owned(), id.clone())]),
            resources: Some(Resources {
                vcpus: spec.default_vcpus,
                memory_bytes: spec.default_memory_bytes,
                disk_bytes: spec.default_disk_bytes,
            }),
            request_id: format!("build-{id}-{}-{number}", stored.attempts),
            ..CreateSessionRequest::default()
        };
        let mut room = Room::default();
        loop {
            let (mut running, session) = match self.create(team, request.clone()).await? {
                Ok(created) => created,
                Err(status) => {
                    match refused(&status) {
                        Refused::Room => self.wait_for_room(id, &mut room, &status).await?,
                        Refused::Unanswered => self.wait_for_answer(id, &mut room, &status).await?,
                        Refused::Lost => {
                            let end = not_started(&status);
                            return Err(BuildError::Sandbox { end, is_gone: true });
                        }
                        Refused::Final => return Err(ExportError::from(status).into()),
                    }
                    continue;
                }
            };
            let (sandbox, files) = self.sessions.sandbox(&session).await?;
            (running.sandbox, running.files) = (Some(sandbox), Some(files));
            return Ok(running);
        }
    }

    /// Creates a session. Whatever becomes of this build meanwhile, what was made is ended.
    async fn create(
        &self,
        team: &TeamId,
        request: CreateSessionRequest,
    ) -> Result<Result<(Running, Session), Status>, BuildError> {
        let (tell, told) = oneshot::channel();
        let (sessions, owner) = (self.sessions.clone(), team.clone());
        tokio::spawn(async move {
            let created = sessions.create(&owner, request).await.map(|session| {
                let running = Running {
                    id: SessionId::parse(&session.session_id).ok(),
                    sessions,
                    team: owner,
                    sandbox: None,
                    files: None,
                };
                (running, session)
            });
            // If nobody hears it, it is dropped here, which ends it.
            drop(tell.send(created));
        });
        let gone = |_| failed("SANDBOX_FAILED", "its session was not made");
        told.await.map_err(gone)
    }

    /// Does it; says whether a program has run.
    async fn act(
        &self,
        building: &Building,
        running: &Running,
        plan: &Planned,
        said: &mut Said,
    ) -> Result<bool, BuildError> {
        let id = &building.stored.build.build_id;
        let sandbox = running.sandbox()?;
        let (argv, lent) = match &plan.action {
            Action::Run { argv, secrets } => {
                let lent = self.lend(building, running, &plan.step, secrets).await?;
                (argv.clone(), lent)
            }
            // By envd: the image may have no mkdir.
            Action::MakeFolder(path) => {
                running.make_folder(path).await?;
                return Ok(false);
            }
            Action::Copy(copy) => {
                let copied = self.copy(building, running, plan, copy);
                let copied = tokio::time::timeout(STEP_LIMIT, copied).await;
                copied.map_err(|_| timed_out(&plan.step))??;
                return Ok(false);
            }
        };
        let command = Command {
            // In a session each is started once, however often it is asked for.
            process_id: Some(format!("build-line-{}", plan.line)),
            cwd: plan.state.cwd.clone(),
            env: plan
                .state
                .visible()
                .into_iter()
                .chain(lent.env.iter().cloned())
                .collect(),
            user: if plan.state.user.is_empty() {
                "root".to_owned()
            } else {
                plan.state.user.clone()
            },
            deadline: Some(STEP_LIMIT),
            backpressure: Backpressure::Always,
            ..Command::new(argv)
        };
        let (tell, mut told) = mpsc::channel(PIECES);
        // Waits undisturbed: the stream is taken up again when it breaks.
        let run = async move {
            let start = || sandbox.start(command.clone());
            let started = patiently(sdk::Error::is_interruption, start).await;
            let mut process = started.map_err(|error| not_begun(&plan.step, error))?;
            process.set_patience(PATIENCE);
            loop {
                let (is_stderr, bytes) = match process.next().await? {
                    Some(Event::Stdout(bytes)) => (false, bytes),
                    Some(Event::Stderr(bytes)) => (true, bytes),
                    Some(Event::Started { .. }) => continue,
                    Some(Event::Exited(exit)) => {
                        // Nothing of it is to run on into the next step; if it has ended already, so much the better.
                        let remote = process.remote();
                        let kill = || remote.signal_to(KILL, SignalTarget::All);
                        let _ = patiently(sdk::Error::is_interruption, kill).await;
                        return Ok::<_, BuildError>(exit);
                    }
                    None => return Err(failed("SANDBOX_FAILED", "a step ended unheard")),
                };
                if tell.send((is_stderr, bytes)).await.is_err() {
                    // Whoever was to hear it has failed, and says why.
                    return Err(BuildError::Cancelled);
                }
            }
        };
        let log = async move {
            let mut lines = Lines::default();
            loop {
                // What was said is not held back until more is.
                match tokio::time::timeout(LINGER, told.recv()).await {
                    Ok(Some((is_stderr, bytes))) => lines.push(is_stderr, &bytes, said),
                    Ok(None) => break,
                    Err(_) => {}
                }
                lines.store_if_due(&self.store, id).await?;
            }
            lines.end(said);
            lines.store(&self.store, id).await?;
            Ok(())
        };
        // What was said before it was lost is in the log, too.
        let process = async {
            let (logged, ended): (Result<(), BuildError>, _) = tokio::join!(log, run);
            logged.and(ended)
        };
        let ended = tokio::time::timeout(STEP_LIMIT + GRACE, process).await;
        let ended = ended.map_err(|_| timed_out(&plan.step))?;
        sound(&plan.step, &ended?)?;
        self.take_back(building, running, &plan.step, lent).await?;
        Ok(true)
    }

    /// What was changed since the session's start, as a layer.
    async fn change_of(
        &self,
        id: &str,
        running: &Running,
        making: &Making,
    ) -> Result<Layer, BuildError> {
        let session = running.id.as_ref();
        let session = session.ok_or_else(|| failed("SANDBOX_FAILED", "a session without an ID"))?;
        let take = || async {
            let parts = self.sessions.export(&running.team, session).await?;
            self.take_change(id, parts, making).await
        };
        patiently(is_worth_another_try, take).await
    }
}

/// A session for steps; it is stopped whatever becomes of the build.
pub(super) struct Running {
    sessions: Sessions,
    team: TeamId,
    /// Until it is stopped.
    id: Option<SessionId>,
    sandbox: Option<Sandbox>,
    files: Option<SandboxFiles>,
}

impl Running {
    pub(super) fn sandbox(&self) -> Result<&Sandbox, BuildError> {
        let sandbox = self.sandbox.as_ref();
        sandbox.ok_or_else(|| failed("SANDBOX_FAILED", "a session that cannot be reached"))
    }

    /// Unpacks a tarball in a folder of the session's; folders that are there keep what they have.
    pub(super) async fn unpack(
        &self,
        step: &str,
        folder: &str,
        tarball: File,
    ) -> Result<(), BuildError> {
        self.unpack_as(step, folder, tarball, Folders::Keep).await
    }

    /// The same; folders that are there get owner, permissions and time of the tarball's.
    pub(super) async fn restore(
        &self,
        step: &str,
        folder: &str,
        tarball: File,
    ) -> Result<(), BuildError> {
        self.unpack_as(step, folder, tarball, Folders::Change).await
    }

    async fn unpack_as(
        &self,
        step: &str,
        folder: &str,
        tarball: File,
        folders: Folders,
    ) -> Result<(), BuildError> {
        let files = self.files.as_ref();
        let files =
            files.ok_or_else(|| failed("SANDBOX_FAILED", "a session that cannot be reached"))?;
        let unpacked = files.unpack(folder, tarball, folders).await;
        unpacked.map_err(|error| not_unpacked(step, &error))
    }

    /// Comes when the registry says that it does not run any more; why.
    async fn ended(&self) -> End {
        loop {
            if let Some(id) = &self.id {
                match self.sessions.end_of(&self.team, id).await {
                    Ok(Some(end)) => return end,
                    Ok(None) => {}
                    // It is asked again for as long as the build waits.
                    Err(status) => {
                        tracing::debug!(session_id = id.short(), %status, "nobody says what became of a build's session");
                    }
                }
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    async fn make_folder(&self, path: &str) -> Result<(), BuildError> {
        let request = MakeDirectoryRequest {
            path: path.to_owned(),
            user: "root".to_owned(),
            ..MakeDirectoryRequest::default()
        };
        let sandbox = self.sandbox()?;
        let make = || {
            let request = request.clone();
            async move { sandbox.filesystem().make_directory(request).await }
        };
        match patiently(is_unanswered, make).await {
            // It was there.
            Err(status) if status.code() == tonic::Code::AlreadyExists => Ok(()),
            made => {
                made.map_err(sdk::Error::from)?;
                Ok(())
            }
        }
    }

    /// If it fails, it is tried again when this is dropped.
    async fn stop(mut self) {
        if let Some(id) = &self.id {
            match self.sessions.stop(&self.team, id).await {
                Ok(()) => self.id = None,
                Err(error) => {
                    tracing::warn!(session_id = id.short(), %error, "the session of a build is not stopped");
                }
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let Some(id) = self.id.take() else {
            return;
        };
        let (sessions, team) = (self.sessions.clone(), self.team.clone());
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                if let Err(error) = sessions.stop(&team, &id).await {
                    tracing::warn!(session_id = id.short(), %error, "the session of a build runs until its deadline");
                }
            });
        }
    }
}

/// How much steps have said.
#[derive(Default)]
pub(super) struct Said {
    bytes: usize,
}

/// Bytes of two streams on their way to be lines.
pub(super) struct Lines {
    begun: [Vec<u8>; 2],
    ready: Vec<String>,
    stored: Instant,
}

impl Default for Lines {
    fn default() -> Self {
        Self {
            begun: Default::default(),
            ready: Vec::new(),
            stored: Instant::now(),
        }
    }
}

impl Lines {
    pub(super) fn push(&mut self, is_stderr: bool, bytes: &[u8], said: &mut Said) {
        for piece in bytes.split_inclusive(|byte| matches!(byte, b'\n' | b'\r')) {
            let [stdout, stderr] = &mut self.begun;
            let begun = if is_stderr { stderr } else { stdout };
            begun.extend_from_slice(piece);
            let is_whole = piece.ends_with(b"\n") || piece.ends_with(b"\r");
            let mut line = Vec::new();
            if is_whole || begun.len() >= LONGEST_LINE {
                line = std::mem::take(begun);
            }
            for part in line.chunks(LONGEST_LINE) {
                self.add(part, said);
            }
        }
    }

    /// What was not ended by a newline is a line, too.
    pub(super) fn end(&mut self, said: &mut Said) {
        for line in std::mem::take(&mut self.begun) {
            self.add(&line, said);
        }
    }

    fn add(&mut self, line: &[u8], said: &mut Said) {
        let line = String::from_utf8_lossy(line);
        let line = line.trim_end();
        if line.is_empty() || said.bytes > MOST_SAID {
            return;
        }
        // A row costs something whatever is in it.
        said.bytes += line.len() + ROW;
        self.ready.push(if said.bytes > MOST_SAID {
            format!("what steps say beyond {MOST_SAID} bytes is left out")
        } else {
            line.to_owned()
        });
    }

    pub(super) async fn store_if_due(&mut self, store: &Store, id: &str) -> Result<(), StoreError> {
        let is_due = self.ready.len() >= LINES_AT_ONCE
            || !self.ready.is_empty() && self.stored.elapsed() >= LINGER;
        if is_due {
            self.store(store, id).await?;
        }
        Ok(())
    }

    pub(super) async fn store(&mut self, store: &Store, id: &str) -> Result<(), StoreError> {
        let ready = std::mem::take(&mut self.ready);
        self.stored = Instant::now();
        store.log_all(id, &ready).await
    }
}

fn shown(step: &Step) -> String {
    format!("line {}: {}", step.line(), step.text)
}

fn timed_out(step: &str) -> BuildError {
    let limit = STEP_LIMIT.as_secs();
    failed(
        "STEP_TIMED_OUT",
        format!("{step}: took more than {limit} s"),
    )
}

/// Why a step's program does not run: what makes no sense in the sandbox is the step's fault, all else is the sandbox's.
fn not_begun(step: &str, error: sdk::Error) -> BuildError {
    let reason = error.reason().unwrap_or_default();
    match error {
        sdk::Error::Status(status) if OF_STEP.contains(&reason.as_str()) => {
            failed("STEP_FAILED", format!("{step}: {}", status.message()))
        }
        error => error.into(),
    }
}

/// Whether a step's program has ended well.
fn sound(step: &str, exit: &Exit) -> Result<(), BuildError> {
    let Exit(ended) = exit;
    if ended.oom_killed {
        let message = format!("{step}: the sandbox ran out of memory; ask for more");
        return Err(failed("STEP_OUT_OF_MEMORY", message));
    }
    if ended.deadline_exceeded {
        return Err(timed_out(step));
    }
    match exit.code() {
        0 => Ok(()),
        code => {
            let message = format!("{step}: ended with code {code}");
            Err(failed("STEP_FAILED", message))
        }
    }
}

/// Under which name a stage's layers are known.
fn name_of(stage: usize) -> String {
    format!("stage {stage}")
}

/// The stages that are built for one, in an order in which each copies from earlier ones only; it comes last.
fn needed(
    dockerfile: &Dockerfile,
    last: usize,
    given: &BTreeMap<String, String>,
) -> Result<Vec<usize>, DockerfileError> {
    let mut needed = BTreeSet::new();
    let mut open = vec![last];
    while let Some(number) = open.pop() {
        if !needed.insert(number) {
            continue;
        }
        let (_, stages) = chain(dockerfile, number, given)?;
        for stage in stages {
            open.extend(dockerfile.origins(stage));
        }
    }
    Ok(needed.into_iter().collect())
}

/// What a stage begins with, and the stages that lead from there to it.
fn chain(
    dockerfile: &Dockerfile,
    mut number: usize,
    given: &BTreeMap<String, String>,
) -> Result<(String, Vec<usize>), DockerfileError> {
    let mut stages = Vec::new();
    loop {
        let Some(stage) = dockerfile.stages.get(number) else {
            return Ok((String::new(), stages));
        };
        stages.insert(0, number);
        let base = dockerfile.base(stage, given)?;
        match dockerfile.stage_before(number, &base) {
            // Each begins with one before it, so this ends.
            Some(earlier) => number = earlier,
            None => return Ok((base, stages)),
        }
    }
}

/// Under which a whole template of these layers is known, in which there is that user.
fn last_name(layers: &[Layer], user: &str) -> String {
    let mut hasher = blake3::Hasher::new_derive_key("sandmesh build: root");
    hasher.update(&first_key(layers));
    hasher.update(user.as_bytes());
    names::hidden(&hasher.finalize().to_hex())
}

/// What steps upon these layers begin with.
pub(super) fn first_key(layers: &[Layer]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("sandmesh build: layers");
    for layer in layers {
        hasher.update(layer.diff_id.as_bytes());
        hasher.update(&[u8::from(layer.has_whiteouts), 0]);
    }
    hasher.finalize().into()
}

/// All that an action depends on: what was before it, what it is, and what holds for it.
fn next_key(before: &[u8; 32], action: &Action, state: &State, from: Option<[u8; 32]>) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("sandmesh build: step");
    hasher.update(before);
    let mut add = |text: &str| {
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    };
    match action {
        Action::Run { argv, secrets } => {
            // Which, and where, but no values: they may change from build to build.
            for secret in secrets {
                add("secret");
                add(&format!("{secret:?}"));
            }
            add("run");
            for word in argv {
                add(word);
            }
            add(&state.cwd);
            add(&state.user);
            for (name, value) in state.visible() {
                add(&name);
                add(&value);
            }
        }
        Action::MakeFolder(path) => {
            add("folder");
            add(path);
        }
        Action::Copy(copy) => {
            add(if copy.is_add { "add" } else { "copy" });
            add(copy.owner.as_deref().unwrap_or_default());
            add(&copy.mode.map(|mode| mode.to_string()).unwrap_or_default());
            add(&copy.destination);
            add(if copy.into_folder { "/" } else { "" });
            for source in &copy.sources {
                match source {
                    Source::Path(pattern) => {
                        add("path");
                        add(pattern);
                    }
                    Source::Text { name, text } => {
                        add("text");
                        add(name);
                        add(text);
                    }
                }
            }
        }
    }
    if let Some(from) = from {
        hasher.update(&from);
    }
    hasher.finalize().into()
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use super::*;

    #[test]
    fn output_becomes_lines_of_bounded_length_and_number() {
        let (mut lines, mut said) = (Lines::default(), Said::default());
        lines.push(false, b"one\ntw", &mut said);
        lines.push(true, b"other", &mut said);
        lines.push(false, b"o\r50%\rno end", &mut said);
        lines.push(false, &[b'x'; 9000], &mut said);
        lines.end(&mut said);
        let lengths: Vec<_> = lines.ready.iter().map(String::len).collect();
        assert_eq!(lines.ready[..3], ["one", "two", "50%"]);
        assert!(lengths.iter().all(|length| *length <= LONGEST_LINE));
        assert_eq!(lengths.iter().sum::<usize>(), 3 + 3 + 3 + 6 + 9000 + 5);
        assert_eq!(lines.ready.last().unwrap(), "other");
        let (mut lines, mut said) = (Lines::default(), Said::default());
        for _ in 0..3000 {
            lines.push(false, &[[b'y'; 4000].as_slice(), b"\n"].concat(), &mut said);
        }
        let bytes: usize = lines.ready.iter().map(String::len).sum();
        assert!(bytes <= MOST_SAID);
        assert!(lines.ready.last().unwrap().contains("left out"));
    }

    #[test]
    fn stages_lead_to_the_last_one() {
        let text = "FROM a AS one\nRUN 1\nFROM b AS two\nRUN 2\nFROM One AS three\nRUN 3\nFROM three\nRUN 4\n";
        let dockerfile = Dockerfile::parse(text).unwrap();
        let (base, stages) = chain(&dockerfile, 3, &BTreeMap::new()).unwrap();
        assert_eq!((base.as_str(), stages), ("a", vec![0, 2, 3]));
        let dockerfile = Dockerfile::parse("FROM x AS x\nFROM x\n").unwrap();
        let (base, stages) = chain(&dockerfile, 1, &BTreeMap::new()).unwrap();
        assert_eq!((base.as_str(), stages.len()), ("x", 2));
    }

    #[test]
    fn stages_that_are_copied_from_come_first() {
        let text = "FROM a AS web\nRUN 1\nFROM a AS unused\nCOPY --from=web x /\nFROM b AS build\nCOPY --from=web x /\nFROM build AS tested\nRUN 2\nFROM c\nCOPY --from=tested x /\nCOPY --from=0 y /\nCOPY --from=image z /\n";
        let dockerfile = Dockerfile::parse(text).unwrap();
        let needed = |last| needed(&dockerfile, last, &BTreeMap::new()).unwrap();
        assert_eq!(needed(4), [0, 3, 4]);
        assert_eq!(needed(3), [0, 3]);
        assert_eq!(needed(1), [0, 1]);
        assert_eq!(needed(0), [0]);
        // However deep, there is no other one below on the stack.
        let mut text = "FROM a AS s0\n".to_owned();
        for number in 1..499 {
            let _ = writeln!(text, "FROM a AS s{number}\nCOPY --from=s{} x /", number - 1);
        }
        let dockerfile = Dockerfile::parse(&text).unwrap();
        let stages = super::needed(&dockerfile, 498, &BTreeMap::new()).unwrap();
        assert_eq!(stages, (0..499).collect::<Vec<_>>());
    }

    #[test]
    fn the_key_of_a_copy_is_of_all_it_depends_on() {
        let copy = Copy {
            is_add: false,
            from: None,
            owner: None,
            mode: None,
            sources: vec![Source::Path("a".into())],
            destination: "/b".into(),
            into_folder: false,
        };
        let state = State::new(Vec::new(), "/", "");
        let key = |copy: Copy, from: u8| {
            super::next_key(&[0; 32], &Action::Copy(copy), &state, Some([from; 32]))
        };
        let text = |name: &str, text: &str| Source::Text {
            name: name.into(),
            text: text.into(),
        };
        let sources = |sources: Vec<Source>| Copy {
            sources,
            ..copy.clone()
        };
        let keys = [
            key(copy.clone(), 0),
            key(copy.clone(), 1),
            key(
                Copy {
                    is_add: true,
                    ..copy.clone()
                },
                0,
            ),
            key(
                Copy {
                    owner: Some("1".into()),
                    ..copy.clone()
                },
                0,
            ),
            key(
                Copy {
                    mode: Some(0o600),
                    ..copy.clone()
                },
                0,
            ),
            key(
                Copy {
                    destination: "/c".into(),
                    ..copy.clone()
                },
                0,
            ),
            key(
                Copy {
                    into_folder: true,
                    ..copy.clone()
                },
                0,
            ),
            key(sources(vec![Source::Path("c".into())]), 0),
            key(sources(vec![text("a", "")]), 0),
            key(sources(vec![text("a", "x")]), 0),
            key(sources(vec![text("ax", "")]), 0),
        ];
        let different: BTreeSet<_> = keys.iter().collect();
        assert_eq!(different.len(), keys.len());
    }

    #[test]
    fn a_key_is_of_all_a_step_depends_on() {
        let action = |text: &str| Action::Run {
            argv: vec!["sh".into(), text.into()],
            secrets: Vec::new(),
        };
        let state = State::new(vec![("A".into(), "1".into())], "/", "");
        let before = first_key(&[]);
        let next_key =
            |before: &_, action: &_, state: &_| super::next_key(before, action, state, None);
        let key = next_key(&before, &action("x"), &state);
        assert_eq!(key, next_key(&before, &action("x"), &state));
        let mut others = vec![
            next_key(&key, &action("x"), &state),
            next_key(&before, &action("y"), &state),
            super::next_key(&before, &action("x"), &state, Some([1; 32])),
        ];
        let mut changed = state.clone();
        changed.user = "me".into();
        others.push(next_key(&before, &action("x"), &changed));
        let mut changed = state.clone();
        changed.cwd = "/x".into();
        others.push(next_key(&before, &action("x"), &changed));
        let mut changed = state;
        changed.args.insert("B".into(), "2".into());
        others.push(next_key(&before, &action("x"), &changed));
        others.push(next_key(&before, &Action::MakeFolder("x".into()), &changed));
        let text = "FROM a\nRUN --mount=type=secret,id=a x\nRUN --mount=type=secret,id=a,env=A x\n";
        let lending = Dockerfile::parse(text).unwrap();
        for step in &lending.stages[0].steps {
            let mut state = State::new(vec![("A".into(), "1".into())], "/", "");
            let followed = lending.follow(step, &mut state, &BTreeMap::new());
            let (action, _) = followed.unwrap();
            others.push(next_key(&before, &action.unwrap(), &state));
        }
        let distinct: BTreeSet<_> = others.iter().collect();
        assert_eq!(distinct.len(), others.len());
        assert!(others.iter().all(|other| *other != key));
    }
}
