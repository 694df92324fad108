//! Dockerfiles, as the Dockerfile reference of BuildKit has them: from text to what is to be done, one stage after the other. Pure.
//!
//! `parse-dockerfile` tells instructions apart; words, quotes and variables are taken apart here ([`words`]), because what they mean depends
//! on the environment of the image below. Every error says where: line and column.

use std::collections::BTreeMap;

use parse_dockerfile::{Command, Flag, Instruction as Parsed, Keyword, Source as Origin, Span};

mod mounts;
pub mod words;

use mounts::{MOST_MOUNTS, Mount};
pub use mounts::{Secret, is_secret_id};
use words::{Here, Lexer, WordError};

/// Bytes and instructions of a Dockerfile, at most.
pub const LARGEST: usize = 256 << 10;
const MOST_INSTRUCTIONS: usize = 1000;
/// Bytes of an environment, and of build arguments.
const MOST_VARIABLES: usize = 64 << 10;
/// Characters of an instruction that are shown.
const LONGEST_SHOWN: usize = 120;
/// Sources of a `COPY`, and bytes of their names and here-documents when variables are in them.
const MOST_SOURCES: usize = 1000;
const MOST_TEXT: usize = 1 << 20;
const LONGEST_PATH: usize = 4095;
const TOO_MUCH: &str = "the environment, or the build arguments, are more than 64 KiB";
/// Arguments that are there without being given (Dockerfile reference, "Automatic platform ARGs"): guests have this host's platform.
const PLATFORM: [(&str, &str); 8] = [
    ("TARGETPLATFORM", "linux/amd64"),
    ("TARGETOS", "linux"),
    ("TARGETARCH", "amd64"),
    ("TARGETVARIANT", ""),
    ("BUILDPLATFORM", "linux/amd64"),
    ("BUILDOS", "linux"),
    ("BUILDARCH", "amd64"),
    ("BUILDVARIANT", ""),
];
/// Of an image that has none, as BuildKit has it.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const SHELL: [&str; 2] = ["/bin/sh", "-c"];

/// What is wrong with a Dockerfile, and where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: {message}")]
pub struct DockerfileError {
    /// From 1.
    pub line: usize,
    /// From 1.
    pub column: usize,
    /// What is wrong, or what was expected.
    pub message: String,
}

/// A Dockerfile that parses.
#[derive(Debug, Clone)]
pub struct Dockerfile {
    /// `ARG`s before the first `FROM`, with their defaults.
    globals: Vec<Step>,
    /// In order; the last is what is built.
    pub stages: Vec<Stage>,
    lexer: Lexer,
}

/// A stage: what it begins with, and what is done upon it.
#[derive(Debug, Clone)]
pub struct Stage {
    /// The image or template, as it stands there.
    base: String,
    /// `AS`.
    pub name: Option<String>,
    /// Of its `FROM`.
    place: Place,
    /// In order.
    pub steps: Vec<Step>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    line: usize,
    column: usize,
}

impl Place {
    fn error(self, message: impl Into<String>) -> DockerfileError {
        DockerfileError {
            line: self.line,
            column: self.column,
            message: message.into(),
        }
    }
}

/// An instruction.
#[derive(Debug, Clone)]
pub struct Step {
    place: Place,
    /// As it stands there, on one line.
    pub text: String,
    instruction: Instruction,
}

impl Step {
    /// Where it stands, from 1.
    pub fn line(&self) -> usize {
        self.place.line
    }
}

#[derive(Debug, Clone)]
enum Instruction {
    Run(Words, Vec<Mount>),
    Env(String),
    Arg(String),
    Workdir(String),
    User(String),
    Shell(Vec<String>),
    Cmd(Words),
    Entrypoint(Words),
    Copy(Copying),
    /// Nothing comes of it, which is said.
    Told(&'static str),
}

/// `COPY` or `ADD`, before variables are known.
#[derive(Debug, Clone)]
struct Copying {
    is_add: bool,
    from: Option<String>,
    owner: Option<String>,
    mode: Option<String>,
    sources: Vec<Original>,
    destination: String,
}

#[derive(Debug, Clone)]
enum Original {
    Path(String),
    /// A here-document.
    Text {
        name: String,
        text: String,
        has_variables: bool,
    },
}

/// A command: as a list, or as text for the shell.
#[derive(Debug, Clone)]
enum Words {
    Exec(Vec<String>),
    Shell(String),
    /// A script of its own.
    Script(String),
}

/// What is to be done in a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// A program runs to its end.
    Run {
        /// Program and arguments.
        argv: Vec<String>,
        /// What it is lent.
        secrets: Vec<Secret>,
    },
    /// A folder is made, with those above it.
    MakeFolder(String),
    /// Files are copied.
    Copy(Copy),
}

/// Files that are copied, and where to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Copy {
    /// Whether tarballs are unpacked.
    pub is_add: bool,
    /// A stage, an image or a template; the build context if it is none.
    pub from: Option<String>,
    /// Name or number of a user, and after a colon of a group.
    pub owner: Option<String>,
    /// Permissions of all that is copied.
    pub mode: Option<u32>,
    /// In order, at least one.
    pub sources: Vec<Source>,
    /// Absolute.
    pub destination: String,
    /// Whether the destination is surely a folder.
    pub into_folder: bool,
}

/// What is copied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// Files, folders: a pattern.
    Path(String),
    /// A file with that name and text.
    Text {
        /// Without slashes.
        name: String,
        /// All of it.
        text: String,
    },
}

/// What holds for what comes next: of the image below, then as instructions change it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    /// In order.
    pub env: Vec<(String, String)>,
    /// Build arguments of this stage; the environment comes before them.
    pub args: BTreeMap<String, String>,
    /// Absolute.
    pub cwd: String,
    /// Empty for root.
    pub user: String,
    shell: Vec<String>,
    /// `ENTRYPOINT`.
    pub entrypoint: Vec<String>,
    /// `CMD`.
    pub command: Vec<String>,
    /// Whether that is of this stage.
    has_command: bool,
}

impl State {
    /// Of an image with that environment, folder and user.
    pub fn new(env: Vec<(String, String)>, cwd: &str, user: &str) -> Self {
        let mut env = env;
        if !env.iter().any(|(name, _)| name == "PATH") {
            env.push(("PATH".to_owned(), PATH.to_owned()));
        }
        Self {
            env,
            args: BTreeMap::new(),
            cwd: if cwd.starts_with('/') { cwd } else { "/" }.to_owned(),
            user: user.to_owned(),
            shell: SHELL.map(str::to_owned).to_vec(),
            entrypoint: Vec::new(),
            command: Vec::new(),
            has_command: false,
        }
    }

    /// Goes on in a stage that begins with what was before.
    pub fn begin_stage(&mut self) {
        self.has_command = false;
    }

    /// What programs of the build see: arguments, and over them the environment.
    pub fn visible(&self) -> BTreeMap<String, String> {
        let mut all = self.args.clone();
        all.extend(self.env.iter().cloned());
        all
    }

    fn set(&mut self, name: String, value: String) {
        match self.env.iter_mut().find(|(known, _)| *known == name) {
            Some((_, old)) => *old = value,
            None => self.env.push((name, value)),
        }
    }

    /// Whether it is no more than may be.
    fn fits(&self) -> bool {
        let env: usize = self
            .env
            .iter()
            .map(|(name, value)| name.len() + value.len())
            .sum();
        let args: usize = self
            .args
            .iter()
            .map(|(name, value)| name.len() + value.len())
            .sum();
        env.max(args) <= MOST_VARIABLES
    }

    fn argv(&self, words: &Words) -> Vec<String> {
        let with = |text: &String| [self.shell.as_slice(), std::slice::from_ref(text)].concat();
        match words {
            Words::Exec(words) => words.clone(),
            // One that says who reads it is a program (execve(2), "Interpreter scripts").
            Words::Script(text) if text.starts_with("#!") => {
                let script = "f=$(mktemp) && printf %s \"$0\" >\"$f\" && chmod +x \"$f\" && { \"$f\"; s=$?; rm -f \"$f\"; exit $s; }";
                vec![
                    SHELL[0].into(),
                    SHELL[1].into(),
                    script.into(),
                    text.clone(),
                ]
            }
            Words::Shell(text) | Words::Script(text) => with(text),
        }
    }
}

impl Dockerfile {
    /// Parses.
    pub fn parse(text: &str) -> Result<Self, DockerfileError> {
        let beginning = Place { line: 1, column: 1 };
        if text.len() > LARGEST {
            return Err(beginning.error(format!("a Dockerfile is at most {LARGEST} bytes")));
        }
        let text = text.trim_start_matches('\u{feff}').replace("\r\n", "\n");
        let lexer = Lexer {
            escape: escape_of(&text),
        };
        let (text, bodies) = words::take_here_documents(&text, lexer).map_err(|endless| {
            let place = Place {
                line: endless.line,
                column: 1,
            };
            place.error(format!(
                "expected a line {:?} that ends the here-document",
                endless.end
            ))
        })?;
        let parsed = parse_dockerfile::parse(&text).map_err(|error| DockerfileError {
            line: error.line().max(1),
            column: error.column().max(1),
            message: reason(&error.to_string()),
        })?;
        let reading = Reading {
            text: &text,
            bodies: &bodies,
            lexer,
        };
        if let Some(next) = parsed.instructions.get(MOST_INSTRUCTIONS) {
            let place = match next {
                Parsed::From(from) => reading.place(&from.from.span),
                other => reading.step(other)?.place,
            };
            return Err(place.error(format!("it has more than {MOST_INSTRUCTIONS} instructions")));
        }
        let mut globals = Vec::new();
        let mut stages: Vec<Stage> = Vec::new();
        for instruction in &parsed.instructions {
            if let Parsed::From(from) = instruction {
                let place = reading.place(&from.from.span);
                if from
                    .options
                    .iter()
                    .any(|flag| flag.name.value != "platform")
                {
                    return Err(place.error("of options FROM knows --platform only"));
                }
                stages.push(Stage {
                    base: reading.raw(&from.image.span),
                    name: from.as_.as_ref().map(|(_, name)| name.value.to_string()),
                    place,
                    steps: Vec::new(),
                });
                continue;
            }
            let step = reading.step(instruction)?;
            match (stages.last_mut(), &step.instruction) {
                (Some(stage), _) => stage.steps.push(step),
                (None, Instruction::Arg(_)) => globals.push(step),
                (None, _) => return Err(step.place.error("expected FROM or ARG")),
            }
        }
        if stages.is_empty() {
            return Err(beginning.error("it has no FROM"));
        }
        Ok(Self {
            globals,
            stages,
            lexer,
        })
    }

    /// A step, by the numbers of its stage and its own.
    pub fn step(&self, stage: usize, number: usize) -> Option<&Step> {
        self.stages.get(stage)?.steps.get(number)
    }

    /// An earlier stage than that one, by its name.
    pub fn stage_before(&self, before: usize, name: &str) -> Option<usize> {
        let earlier = self.stages.get(..before).unwrap_or_default();
        let is_named = |stage: &Stage| {
            let known = stage.name.as_deref();
            known.is_some_and(|known| known.eq_ignore_ascii_case(name))
        };
        earlier.iter().rposition(is_named)
    }

    /// The earlier stage than that one which `--from` means, by its name or number.
    pub fn origin(&self, before: usize, from: &str) -> Option<usize> {
        let counted = || from.parse().ok().filter(|stage| *stage < before);
        self.stage_before(before, from).or_else(counted)
    }

    /// The stages that one copies from.
    pub fn origins(&self, stage: usize) -> Vec<usize> {
        let steps = self.stages.get(stage).map(|stage| stage.steps.as_slice());
        let froms = steps.unwrap_or_default().iter().filter_map(|step| {
            let Instruction::Copy(copying) = &step.instruction else {
                return None;
            };
            copying.from.as_deref()
        });
        froms.filter_map(|from| self.origin(stage, from)).collect()
    }

    /// Whether it takes files of a build context.
    pub fn needs_context(&self) -> bool {
        let mut steps = self.stages.iter().flat_map(|stage| &stage.steps);
        steps.any(|step| match &step.instruction {
            Instruction::Copy(copying) => {
                let is_path = |source: &Original| matches!(source, Original::Path(_));
                copying.from.is_none() && copying.sources.iter().any(is_path)
            }
            _ => false,
        })
    }

    /// The image or template that a stage begins with, when these arguments are given.
    pub fn base(
        &self,
        stage: &Stage,
        given: &BTreeMap<String, String>,
    ) -> Result<String, DockerfileError> {
        let globals = self.globals(given)?;
        let base = self.lexer.word(&stage.base, &globals);
        let base = base.map_err(|error| stage.place.error(error.to_string()))?;
        if base.is_empty() {
            return Err(stage
                .place
                .error("FROM names nothing: its variables are empty"));
        }
        Ok(base)
    }

    fn globals(
        &self,
        given: &BTreeMap<String, String>,
    ) -> Result<BTreeMap<String, String>, DockerfileError> {
        let mut globals: BTreeMap<String, String> = PLATFORM
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        let mut bytes = 0;
        for step in &self.globals {
            let Instruction::Arg(text) = &step.instruction else {
                continue;
            };
            let failed = |error: WordError| step.place.error(error.to_string());
            for (name, default) in self.lexer.arguments(text, &globals).map_err(failed)? {
                let value = given.get(&name).cloned().or(default);
                let value = value
                    .or_else(|| globals.get(&name).cloned())
                    .unwrap_or_default();
                bytes += name.len() + value.len();
                globals.insert(name, value);
                if bytes > MOST_VARIABLES {
                    return Err(step.place.error(TOO_MUCH));
                }
            }
        }
        Ok(globals)
    }

    /// Follows an instruction: changes what holds, and says what is to be done, and what there is to say of it.
    pub fn follow(
        &self,
        step: &Step,
        state: &mut State,
        given: &BTreeMap<String, String>,
    ) -> Result<(Option<Action>, Option<String>), DockerfileError> {
        let failed = |error: WordError| step.place.error(error.to_string());
        let is_grown = matches!(step.instruction, Instruction::Env(_) | Instruction::Arg(_));
        let visible = state.visible();
        let word = |text: &str| self.lexer.word(text, &visible).map_err(failed);
        match &step.instruction {
            Instruction::Run(words, mounts) => {
                let argv = state.argv(words);
                let secrets = mounts.iter().map(|mount| mount.secret(&state.cwd, word));
                let secrets = secrets.collect::<Result<_, _>>()?;
                return Ok((Some(Action::Run { argv, secrets }), None));
            }
            Instruction::Env(text) => {
                for (name, value) in self.lexer.pairs(text, &visible).map_err(failed)? {
                    state.set(name, value);
                }
            }
            Instruction::Arg(text) => {
                let globals = self.globals(given)?;
                for (name, default) in self.lexer.arguments(text, &visible).map_err(failed)? {
                    let value = given.get(&name).cloned().or(default);
                    // One that was set before the first FROM keeps that value, if it is named again.
                    if let Some(value) = value.or_else(|| globals.get(&name).cloned()) {
                        state.args.insert(name, value);
                    }
                }
            }
            Instruction::Workdir(text) => {
                state.cwd = words::join(&state.cwd, &word(text)?);
                if state.cwd.len() > LONGEST_PATH {
                    let message = format!("a path of more than {LONGEST_PATH} bytes");
                    return Err(step.place.error(message));
                }
                return Ok((Some(Action::MakeFolder(state.cwd.clone())), None));
            }
            Instruction::User(text) => {
                let user = word(text)?;
                let (name, group) = match user.split_once(':') {
                    Some((name, group)) => (name.to_owned(), Some(group.to_owned())),
                    None => (user, None),
                };
                if name.is_empty() {
                    return Err(step.place.error("USER names nobody"));
                }
                state.user = name;
                let told = group.map(|group| {
                    format!("the group {group:?} is left out: processes have those of their user")
                });
                return Ok((None, told));
            }
            Instruction::Shell(words) => state.shell.clone_from(words),
            Instruction::Cmd(words) => {
                state.command = state.argv(words);
                state.has_command = true;
            }
            Instruction::Entrypoint(words) => {
                state.entrypoint = state.argv(words);
                // Of the image below; one of this stage is for it.
                if !state.has_command {
                    state.command.clear();
                }
            }
            Instruction::Copy(copying) => {
                let copy = self.copy(step, copying, state)?;
                return Ok((Some(Action::Copy(copy)), None));
            }
            Instruction::Told(what) => return Ok((None, Some((*what).to_owned()))),
        }
        if is_grown && !state.fits() {
            return Err(step.place.error(TOO_MUCH));
        }
        Ok((None, None))
    }

    fn copy(&self, step: &Step, copying: &Copying, state: &State) -> Result<Copy, DockerfileError> {
        let failed = |error: WordError| step.place.error(error.to_string());
        let visible = state.visible();
        let word = |text: &String| self.lexer.word(text, &visible).map_err(failed);
        if copying.sources.len() > MOST_SOURCES {
            let message = format!("it copies more than {MOST_SOURCES} sources");
            return Err(step.place.error(message));
        }
        let mut sources = Vec::new();
        let mut bytes = 0;
        for source in &copying.sources {
            let source = match source {
                Original::Path(path) => {
                    let path = word(path)?;
                    if copying.is_add && is_remote(&path) {
                        let message = format!("ADD of {path:?} cannot be built: fetch it in a RUN");
                        return Err(step.place.error(message));
                    }
                    if path.is_empty() {
                        return Err(step.place.error("a source is empty"));
                    }
                    Source::Path(path)
                }
                Original::Text {
                    name,
                    text,
                    has_variables,
                } => Source::Text {
                    name: name.clone(),
                    text: if *has_variables {
                        self.lexer.document(text, &visible).map_err(failed)?
                    } else {
                        text.clone()
                    },
                },
            };
            bytes += match &source {
                Source::Path(path) => path.len(),
                Source::Text { text, .. } => text.len(),
            };
            if bytes > MOST_TEXT {
                let message = format!("its sources are more than {MOST_TEXT} bytes");
                return Err(step.place.error(message));
            }
            sources.push(source);
        }
        let destination = word(&copying.destination)?;
        let last = destination.rsplit('/').next().unwrap_or_default();
        let into_folder = matches!(last, "" | "." | "..") || sources.len() > 1;
        let owner = copying.owner.as_ref().map(word).transpose()?;
        let owner = owner.filter(|owner| !owner.is_empty());
        let octal = |text: String| {
            let mode = u32::from_str_radix(&text, 8);
            mode.ok().filter(|mode| *mode <= 0o7777).ok_or_else(|| {
                let message = format!("expected octal permissions after --chmod=, not {text:?}");
                step.place.error(message)
            })
        };
        let mode = copying.mode.as_ref().map(word).transpose()?;
        Ok(Copy {
            is_add: copying.is_add,
            from: copying.from.clone(),
            owner,
            mode: mode.map(octal).transpose()?,
            sources,
            destination: words::join(&state.cwd, &destination),
            into_folder,
        })
    }
}

/// What `ADD` fetches elsewhere: by HTTP, or from git.
fn is_remote(source: &str) -> bool {
    let schemes = ["http://", "https://", "git://", "ssh://", "git@"];
    schemes.iter().any(|scheme| source.starts_with(scheme))
}

/// `\`, or what a directive at the beginning says (Dockerfile reference, "Parser directives").
fn escape_of(text: &str) -> char {
    let directives = text.lines().map_while(|line| line.trim().strip_prefix('#'));
    let escape = directives.filter_map(|directive| {
        let (name, value) = directive.split_once('=')?;
        let is_escape = name.trim().eq_ignore_ascii_case("escape");
        value.trim().chars().next().filter(|_| is_escape)
    });
    escape
        .last()
        .filter(|escape| *escape == '`')
        .unwrap_or('\\')
}

/// What the parser says, without the place it says, too.
fn reason(said: &str) -> String {
    let said = said.split(" at line ").next().unwrap_or(said);
    said.to_owned()
}

struct Reading<'a> {
    text: &'a str,
    /// Commands with here-documents, by their line.
    bodies: &'a BTreeMap<usize, Here>,
    lexer: Lexer,
}

impl Reading<'_> {
    fn place(&self, span: &Span) -> Place {
        let before = self.text.get(..span.start).unwrap_or_default();
        let line_start = before.rfind('\n').map_or(0, |at| at + 1);
        let in_line = before.get(line_start..).unwrap_or_default();
        Place {
            line: before.matches('\n').count() + 1,
            column: in_line.chars().count() + 1,
        }
    }

    /// As it stands there, with its lines joined.
    fn raw(&self, span: &Span) -> String {
        let raw = self.text.get(span.clone()).unwrap_or_default();
        self.lexer.joined(raw)
    }

    fn words(&self, command: &Command<'_>) -> Words {
        match command {
            Command::Exec(words) => {
                let words = words.value.iter();
                Words::Exec(words.map(|word| word.value.to_string()).collect())
            }
            Command::Shell(text) => match self.bodies.get(&self.place(&text.span).line) {
                Some(Here::Script(text)) => Words::Script(text.clone()),
                Some(Here::Command(text)) => Words::Shell(text.clone()),
                None => Words::Shell(self.raw(&text.span)),
            },
            // The crate may learn of others.
            _ => Words::Shell(String::new()),
        }
    }

    /// Of a `RUN`.
    fn mounts(&self, options: &[Flag<'_>]) -> Result<Vec<Mount>, DockerfileError> {
        let mut mounts = Vec::new();
        for flag in options {
            let place = self.place(&flag.flag_span());
            match (&*flag.name.value, &flag.value) {
                ("mount", Some(value)) if mounts.len() < MOST_MOUNTS => {
                    mounts.push(Mount::read(place, &self.raw(&value.span))?);
                }
                ("mount", Some(_)) => {
                    return Err(place.error(format!("RUN has more than {MOST_MOUNTS} mounts")));
                }
                ("mount", None) => return Err(place.error("expected RUN --mount=type=secret,...")),
                (name, _) => {
                    return Err(place.error(format!("RUN --{name} cannot be built yet")));
                }
            }
        }
        Ok(mounts)
    }

    fn copying<'a>(
        &self,
        keyword: &Keyword,
        options: &[Flag<'_>],
        sources: impl Iterator<Item = &'a Origin<'a>>,
        destination: &str,
    ) -> Result<Copying, DockerfileError> {
        let place = self.place(&keyword.span);
        let word = self.text.get(keyword.span.clone()).unwrap_or_default();
        let is_add = word.eq_ignore_ascii_case("add");
        let mut copying = Copying {
            is_add,
            from: None,
            owner: None,
            mode: None,
            sources: Vec::new(),
            destination: destination.to_owned(),
        };
        for flag in options {
            let value = flag.value.as_ref().map(|value| value.value.to_string());
            match &*flag.name.value {
                "from" if !is_add => copying.from = value,
                "chown" => copying.owner = value,
                "chmod" => copying.mode = value,
                // Of layers that are here no part is kept apart.
                "link" => {}
                name => {
                    let message = format!("{word} --{name} cannot be built yet");
                    return Err(place.error(message));
                }
            }
        }
        for source in sources {
            copying.sources.push(match source {
                Origin::Path(path) => Original::Path(path.value.to_string()),
                Origin::HereDoc(document) => {
                    let end = self.text.get(document.span.end..).unwrap_or_default();
                    let name = end.lines().next().unwrap_or_default();
                    if name.is_empty() || name.contains('/') || matches!(name, "." | "..") {
                        return Err(place.error("a here-document's word is no name of a file"));
                    }
                    Original::Text {
                        name: name.to_owned(),
                        text: document.value.to_string(),
                        has_variables: document.expand,
                    }
                }
                _ => return Err(place.error("a source is of a kind that is not known")),
            });
        }
        Ok(copying)
    }

    fn step(&self, parsed: &Parsed<'_>) -> Result<Step, DockerfileError> {
        let (keyword, instruction) = match parsed {
            Parsed::Run(run) => {
                let mounts = self.mounts(&run.options)?;
                let words = self.words(&run.arguments);
                (&run.run, Instruction::Run(words, mounts))
            }
            Parsed::Env(env) => (&env.env, Instruction::Env(self.raw(&env.arguments.span))),
            Parsed::Arg(arg) => (&arg.arg, Instruction::Arg(self.raw(&arg.arguments.span))),
            Parsed::Workdir(it) => {
                let text = self.raw(&it.arguments.span);
                (&it.workdir, Instruction::Workdir(text))
            }
            Parsed::User(it) => (&it.user, Instruction::User(self.raw(&it.arguments.span))),
            Parsed::Shell(it) => {
                let words = it.arguments.iter();
                let words = words.map(|word| word.value.to_string()).collect();
                (&it.shell, Instruction::Shell(words))
            }
            Parsed::Cmd(it) => (&it.cmd, Instruction::Cmd(self.words(&it.arguments))),
            Parsed::Entrypoint(it) => {
                let words = self.words(&it.arguments);
                (&it.entrypoint, Instruction::Entrypoint(words))
            }
            Parsed::Label(it) => (&it.label, Instruction::Told("labels are left out")),
            Parsed::Maintainer(it) => (&it.maintainer, Instruction::Told("MAINTAINER is left out")),
            Parsed::Expose(it) => {
                let told = "EXPOSE needs nothing: every port of a session can be reached";
                (&it.expose, Instruction::Told(told))
            }
            Parsed::Volume(it) => {
                let told = "VOLUME needs nothing: all of a session's disk is its own";
                (&it.volume, Instruction::Told(told))
            }
            Parsed::Healthcheck(it) => {
                let told = "HEALTHCHECK is left out: sessions are not checked";
                (&it.healthcheck, Instruction::Told(told))
            }
            Parsed::Stopsignal(it) => {
                let told =
                    "STOPSIGNAL is left out: a session's end is told to its processes by SIGTERM";
                (&it.stopsignal, Instruction::Told(told))
            }
            Parsed::Onbuild(it) => {
                let told = "ONBUILD is left out: it would be done in builds upon this one";
                (&it.onbuild, Instruction::Told(told))
            }
            Parsed::Copy(it) => {
                let sources = it.src.iter();
                let copying = self.copying(&it.copy, &it.options, sources, &it.dest.value)?;
                (&it.copy, Instruction::Copy(copying))
            }
            Parsed::Add(it) => {
                let sources = it.src.iter();
                let adding = self.copying(&it.add, &it.options, sources, &it.dest.value)?;
                (&it.add, Instruction::Copy(adding))
            }
            _ => {
                let place = Place { line: 1, column: 1 };
                return Err(place.error("it has an instruction that is not known"));
            }
        };
        let place = self.place(&keyword.span);
        let line = self.text.get(keyword.span.start..).unwrap_or_default();
        let line = line.lines().next().unwrap_or_default();
        Ok(Step {
            place,
            text: line.trim_end().chars().take(LONGEST_SHOWN).collect(),
            instruction,
        })
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    /// What is done in the last stage, and what holds then.
    fn done(text: &str, given: &[(&str, &str)]) -> (Vec<Action>, State) {
        let dockerfile = Dockerfile::parse(text).unwrap();
        let given: BTreeMap<String, String> = given
            .iter()
            .map(|(name, value)| ((*name).into(), (*value).into()))
            .collect();
        let env = vec![("PATH".into(), "/bin".into())];
        let mut state = State::new(env, "", "");
        let mut actions = Vec::new();
        for step in &dockerfile.stages.last().unwrap().steps {
            let (action, _) = dockerfile.follow(step, &mut state, &given).unwrap();
            actions.extend(action);
        }
        (actions, state)
    }

    fn shell(text: &str) -> Action {
        let argv = ["/bin/sh", "-c", text].map(str::to_owned).to_vec();
        let secrets = Vec::new();
        Action::Run { argv, secrets }
    }

    #[test]
    fn commands_in_all_their_forms() {
        let text = r#"FROM debian
RUN apt-get update && \
    # why
    apt-get install -y \
      python3
RUN ["printf", "%s", "$HOME"]
SHELL ["/bin/bash", "-ec"]
RUN echo 'single  $quoted' "and \" more"
"#;
        let (actions, _) = done(text, &[]);
        let argv = |words: &[&str]| Action::Run {
            argv: words.iter().map(ToString::to_string).collect(),
            secrets: Vec::new(),
        };
        assert_eq!(
            actions,
            [
                shell("apt-get update &&     apt-get install -y       python3"),
                argv(&["printf", "%s", "$HOME"]),
                argv(&[
                    "/bin/bash",
                    "-ec",
                    r#"echo 'single  $quoted' "and \" more""#
                ]),
            ]
        );
    }

    #[test]
    fn here_documents() {
        let text = "FROM debian\nRUN <<EOF\nset -e\necho $HOME\nEOF\nRUN cat <<'A' >/a && cat <<-B >/b\none\nRUN two\nA\n\tthree\n\tB\nRUN <<EOF\n#!/usr/bin/python3\nprint(1)\nEOF\nUSER me\n";
        let (actions, state) = done(text, &[]);
        assert_eq!(actions[0], shell("set -e\necho $HOME\n"));
        let two = "cat <<'A' >/a && cat <<-B >/b\none\nRUN two\nA\nthree\nB\n";
        assert_eq!(actions[1], shell(two));
        let Action::Run { argv, .. } = &actions[2] else {
            panic!()
        };
        assert_eq!(argv.last().unwrap(), "#!/usr/bin/python3\nprint(1)\n");
        assert_eq!(state.user, "me");
    }

    #[test]
    fn steps_are_lent_secrets() {
        let text = "FROM a\nARG where=/opt\nWORKDIR /srv\nRUN --mount=type=secret,id=a \\\n  --mount=type=secret,id=b,target=$where/b,env=B \\\n  cat x\nRUN --mount=type=secret,id=c,dst=c <<EOF\ncat c\nEOF\nRUN --mount=type=secret,id=d [\"true\"]\nRUN --mount=type=secret,id=e cat <<EOF\nx\nEOF\n";
        let (actions, _) = done(text, &[]);
        let found: Vec<_> = actions
            .iter()
            .filter_map(|action| match action {
                Action::Run { argv, secrets } => {
                    let secrets = secrets.iter();
                    let secrets = secrets.map(|it| (it.target.clone().unwrap(), it.env.is_some()));
                    Some((argv.last().unwrap().trim(), secrets.collect::<Vec<_>>()))
                }
                _ => None,
            })
            .collect();
        let at = |path: &str| vec![(path.to_owned(), false)];
        let first = [at("/run/secrets/a"), vec![("/opt/b".into(), true)]].concat();
        assert_eq!(found[0], ("cat x", first));
        assert_eq!(found[1], ("cat c", at("/srv/c")));
        assert_eq!(found[2], ("true", at("/run/secrets/d")));
        assert_eq!(found[3], ("cat <<EOF\nx\nEOF", at("/run/secrets/e")));
    }

    #[rstest]
    #[case(
        "RUN mkdir /x && \\\n  # why\n  cat <<END-OF-IT >/x/y\nUSER no\nEND-OF-IT\n",
        "mkdir /x &&   cat <<END-OF-IT >/x/y\nUSER no\nEND-OF-IT\n"
    )]
    #[case("RUN <<EOF cat > /x\nhi\nEOF\n", "<<EOF cat > /x\nhi\nEOF\n")]
    #[case(
        "RUN [ -e /x ] || cat <<EOF\r\nhi\r\nEOF\r\n",
        "[ -e /x ] || cat <<EOF\nhi\nEOF\n"
    )]
    #[case("RUN cat <<\"A B\"\nhi\nA B\n", "cat <<\"A B\"\nhi\nA B\n")]
    fn here_documents_are_of_the_whole_instruction(#[case] run: &str, #[case] command: &str) {
        let (actions, state) = done(&format!("\u{feff}FROM a\n{run}USER me\n"), &[]);
        assert_eq!(actions, [shell(command)]);
        assert_eq!(state.user, "me");
    }

    /// A few lines must not become more than memory holds.
    #[rstest]
    #[case("ENV A=xx\n", "ENV A=$A$A\n")]
    #[case("ARG A=xx\n", "ARG A=$A$A\n")]
    #[case("ENV A=xx\n", "ENV A=\"$A$A$A$A$A$A$A$A\"\n")]
    #[case("", "ENV A$RANDOM=1\n")]
    #[case("ENV A=0123456789012345678901234567890123456789\n", "WORKDIR $A$A$A\n")]
    fn variables_do_not_grow_without_end(#[case] first: &str, #[case] then: &str) {
        let text = format!("FROM a\n{first}{}", then.repeat(998));
        let dockerfile = Dockerfile::parse(&text).unwrap();
        let (mut state, none) = (State::new(Vec::new(), "", ""), BTreeMap::new());
        let steps = &dockerfile.stages[0].steps;
        let failed = steps
            .iter()
            .find_map(|step| dockerfile.follow(step, &mut state, &none).err());
        assert_eq!(failed.is_some(), !first.is_empty());
        assert!(
            state
                .env
                .iter()
                .map(|(_, value)| value.len())
                .sum::<usize>()
                <= 2 * MOST_VARIABLES
        );
        let text = format!("FROM a\n{}", "RUN x\n".repeat(MOST_INSTRUCTIONS));
        assert_eq!(
            Dockerfile::parse(&text).unwrap_err().line,
            MOST_INSTRUCTIONS + 1
        );
    }

    #[test]
    fn the_platform_is_known() {
        let text =
            "ARG TARGETARCH\nFROM a-${TARGETARCH}\nARG TARGETARCH\nENV A=$TARGETARCH B=$TARGETOS\n";
        let dockerfile = Dockerfile::parse(text).unwrap();
        let base = dockerfile.base(&dockerfile.stages[0], &BTreeMap::new());
        assert_eq!(base.unwrap(), "a-amd64");
        let (_, state) = done(text, &[]);
        let of = |name: &str| state.visible().remove(name).unwrap();
        assert_eq!((of("A"), of("B")), ("amd64".into(), String::new()));
    }

    #[test]
    fn variables() {
        let text = r#"ARG base=debian
ARG tag=12
FROM ${base}:${tag:-x} AS final
ARG base
ARG who=nobody greeting
ENV PATH=/opt/bin:$PATH A="one two" B='$A' C=a\ b
ENV OLD it is
ENV D=${A:+set} E=${missing:-un set} F=$who-${greeting}
WORKDIR /srv
WORKDIR app/${who}
WORKDIR ../x
RUN true
"#;
        let dockerfile = Dockerfile::parse(text).unwrap();
        let none = BTreeMap::new();
        assert_eq!(
            dockerfile.base(&dockerfile.stages[0], &none).unwrap(),
            "debian:12"
        );
        let given = BTreeMap::from([("tag".to_owned(), "13".to_owned())]);
        assert_eq!(
            dockerfile.base(&dockerfile.stages[0], &given).unwrap(),
            "debian:13"
        );
        let (actions, state) = done(text, &[("greeting", "hi"), ("other", "x")]);
        let env = [
            ("PATH", "/opt/bin:/bin"),
            ("A", "one two"),
            ("B", "$A"),
            ("C", "a b"),
            ("OLD", "it is"),
            ("D", "set"),
            ("E", "un set"),
            ("F", "nobody-hi"),
        ];
        let env = env.map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(state.env, env);
        assert_eq!(state.args["base"], "debian");
        assert_eq!(state.args["greeting"], "hi");
        assert!(!state.args.contains_key("other"));
        let folders: Vec<_> = actions
            .iter()
            .filter_map(|action| match action {
                Action::MakeFolder(path) => Some(path.as_str()),
                Action::Run { .. } | Action::Copy(_) => None,
            })
            .collect();
        assert_eq!(folders, ["/srv", "/srv/app/nobody", "/srv/app/x"]);
    }

    #[test]
    fn copies_in_all_their_forms() {
        let text = r#"FROM debian AS one
ARG dir=src
WORKDIR /srv
COPY ${dir}/*.py "a" ./
COPY --from=one --chown=$dir:33 --chmod=0640 /etc/passwd p
ADD ["x y.tar", "/opt"]
COPY <<one.txt <<'two.txt' sub
RUN is "$dir" \$dir
one.txt
RUN is $dir
two.txt
COPY a \
  # why
  b
USER me
"#;
        let (actions, state) = done(text, &[]);
        let copies: Vec<_> = actions
            .iter()
            .filter_map(|action| match action {
                Action::Copy(copy) => Some(copy),
                _ => None,
            })
            .collect();
        let copy = |sources: &[&str], destination: &str, into_folder| Copy {
            is_add: false,
            from: None,
            owner: None,
            mode: None,
            sources: sources
                .iter()
                .map(|path| Source::Path((*path).into()))
                .collect(),
            destination: destination.into(),
            into_folder,
        };
        let text = |name: &str, text: &str| Source::Text {
            name: name.into(),
            text: text.into(),
        };
        let texts = Copy {
            sources: vec![
                text("one.txt", "RUN is \"src\" $dir\n"),
                text("two.txt", "RUN is $dir\n"),
            ],
            ..copy(&[], "/srv/sub", true)
        };
        assert_eq!(*copies[0], copy(&["src/*.py", "a"], "/srv", true));
        let from = Copy {
            from: Some("one".into()),
            owner: Some("src:33".into()),
            mode: Some(0o640),
            ..copy(&["/etc/passwd"], "/srv/p", false)
        };
        assert_eq!(*copies[1], from);
        let add = Copy {
            is_add: true,
            ..copy(&["x y.tar"], "/opt", false)
        };
        assert_eq!(*copies[2], add);
        assert_eq!(*copies[3], texts);
        assert_eq!(*copies[4], copy(&["a"], "/srv/b", false));
        assert_eq!(state.user, "me");
    }

    #[test]
    fn what_is_started_later_is_known() {
        let text = "FROM a\nCMD first\nENTRYPOINT [\"/serve\"]\nCMD [\"--port\", \"80\"]\n";
        let (_, state) = done(text, &[]);
        assert_eq!(state.entrypoint, ["/serve"]);
        assert_eq!(state.command, ["--port", "80"]);
        let (_, state) = done("FROM a\nCMD [\"app\"]\nENTRYPOINT serve\n", &[]);
        assert_eq!(state.entrypoint, ["/bin/sh", "-c", "serve"]);
        assert_eq!(state.command, ["app"]);
        // What the image below is given is not meant for another program.
        let dockerfile = Dockerfile::parse("FROM a\nENTRYPOINT [\"serve\"]\n").unwrap();
        let mut state = State::new(Vec::new(), "", "");
        state.command = vec!["below".into()];
        let step = &dockerfile.stages[0].steps[0];
        dockerfile
            .follow(step, &mut state, &BTreeMap::new())
            .unwrap();
        assert!(state.command.is_empty());
    }

    #[rstest]
    #[case::nothing("", 1, "FROM")]
    #[case::unknown("FROM a\n  RUNN x\n", 2, "instruction")]
    #[case::too_early("RUN x\nFROM a\n", 1, "FROM")]
    #[case::no_name("FROM a AS\n", 1, "AS")]
    #[case::no_end("FROM a\nRUN <<EOF\nx\n", 2, "EOF")]
    #[case::copy("FROM a\n\nCOPY x\n", 3, "argument")]
    #[case::copy_flag("FROM a\n\nCOPY --parents x /\n", 3, "COPY --parents")]
    #[case::copy_mode("FROM a\nCOPY --chmod=u+x x /\n", 2, "octal")]
    #[case::copy_endless("FROM a\nCOPY <<EOF /x\n", 2, "EOF")]
    #[case::copy_nothing("FROM a\nCOPY $none /\n", 2, "empty")]
    #[case::add_from("FROM a\nADD --from=b x /\n", 2, "ADD --from")]
    #[case::add_url("FROM a\nADD https://b/c /\n", 2, "https://b/c")]
    #[case::mount("FROM a\nRUN --mount=type=cache,target=/x y\n", 2, "RUN --mount")]
    #[case::mount_words("FROM a\nRUN \\\n --mount=type=secret,id=a,x=y z\n", 3, "column 2")]
    #[case::mount_variables("FROM a\nARG b\nRUN --mount=type=secret,id=$b y\n", 3, "id")]
    #[case::mount_of_document("FROM a\nRUN --mount=type=ssh <<EOF\nx\nEOF\n", 2, "ssh")]
    #[case::mount_nothing("FROM a\nRUN --mount x\n", 2, "--mount=type=secret")]
    #[case::network("FROM a\nRUN --network=none y\n", 2, "RUN --network")]
    #[case::security("FROM a\nRUN --security=insecure y\n", 2, "RUN --security")]
    #[case::quote("FROM a\nENV A=\"x\n", 2, "quote")]
    #[case::brace("FROM a\nENV A=${x\n", 2, "}")]
    #[case::modifier("FROM a\nENV A=${x%y}\n", 2, "${x%")]
    #[case::env("FROM a\nENV A=1 B\n", 2, "=")]
    #[case::required("FROM a\nENV A=${x:?not given}\n", 2, "not given")]
    #[case::empty_base("FROM $missing\n", 1, "names nothing")]
    fn errors_say_where(#[case] text: &str, #[case] line: usize, #[case] message: &str) {
        let found = (|| {
            let dockerfile = Dockerfile::parse(text)?;
            let none = BTreeMap::new();
            for stage in &dockerfile.stages {
                dockerfile.base(stage, &none)?;
                let mut state = State::new(Vec::new(), "", "");
                for step in &stage.steps {
                    dockerfile.follow(step, &mut state, &none)?;
                }
            }
            Ok::<_, DockerfileError>(())
        })();
        let error = found.unwrap_err();
        assert_eq!(error.line, line, "{error}");
        assert!(error.to_string().contains(message), "{error}");
    }
}
