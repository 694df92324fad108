//! All SQL of template-svc.

use std::{collections::HashSet, time::Duration};

use futures::TryStreamExt as _;
use prost::Message as _;
use proto::template::v1::{
    Artifact, Build, BuildState, BuildTemplateRequest, Kernel, Layer, StreamBuildLogsResponse,
    Template,
};
use service_kit::database;
use sqlx::{FromRow, PgPool};

use crate::{
    collect::parts_of,
    names::{TemplateRef, Which},
};

const SCHEMA: &str = "sandmesh_template";
/// Characters of a line of a log, or of an error, at most.
const LONGEST_LINE: usize = 4096;

/// How many kernels there may be.
pub const MOST_KERNELS: i64 = 1000;

static MIGRATIONS: sqlx::migrate::Migrator = sqlx::migrate!();

/// A statement failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Postgres cannot be reached or refused.
    #[error("database: {0}")]
    Database(#[from] sqlx::Error),
    /// The schema could not be brought up to date.
    #[error("database migration: {0}")]
    Migration(#[from] sqlx::migrate::MigrateError),
    /// A stored row does not parse.
    #[error("stored row of {0} does not parse")]
    Malformed(String),
}

/// The tables of template-svc.
#[derive(Debug, Clone)]
pub struct Store {
    pool: PgPool,
}

/// Microseconds since 1970, now.
pub fn now() -> i64 {
    jiff::Timestamp::now().as_microsecond()
}

/// What sources say of themselves may be in it: no control characters, of which Postgres refuses NUL, and no more than is read.
fn presentable(message: &str) -> String {
    let shown = |character: char| {
        if character.is_control() {
            char::REPLACEMENT_CHARACTER
        } else {
            character
        }
    };
    message.chars().take(LONGEST_LINE).map(shown).collect()
}

/// What a build has remembered of a step, or kept as a hidden template.
#[derive(Debug, Clone)]
pub struct Remembered {
    /// To forget it.
    pub id: RememberedId,
    /// When it was last of use: microseconds since 1970.
    pub use_time: i64,
    /// What it is made of; of a step there are only layers.
    pub template: Template,
}

#[derive(FromRow)]
struct RememberedRow {
    key: Option<Vec<u8>>,
    name: Option<String>,
    use_time: i64,
    layers: Vec<u8>,
}

/// Which it is, of a team.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RememberedId {
    /// The key of a step.
    Step(Vec<u8>),
    /// The name of a hidden template.
    Hidden(String),
}

/// A stored spec, or the layers of a step.
fn decoded(spec: &[u8]) -> Result<Template, StoreError> {
    Template::decode(spec).map_err(|_| StoreError::Malformed("a template".to_owned()))
}

/// As on the wire.
pub fn timestamp(micros: i64) -> prost_types::Timestamp {
    let nanos = i32::try_from(micros.rem_euclid(1_000_000)).unwrap_or_default() * 1000;
    prost_types::Timestamp {
        seconds: micros.div_euclid(1_000_000),
        nanos,
    }
}

/// A build as it is stored.
#[derive(Debug, Clone)]
pub struct StoredBuild {
    /// As on the wire.
    pub build: Build,
    /// Who asked.
    pub team: String,
    /// Whose template it makes; empty for shared.
    pub template_team: String,
    /// What was asked.
    pub request: BuildTemplateRequest,
    /// How often a builder has taken it.
    pub attempts: u32,
    /// Sealed; only of a build that was taken.
    pub secrets: Option<Vec<u8>>,
}

#[derive(FromRow)]
struct BuildRow {
    build_id: String,
    team: String,
    template_team: String,
    name: String,
    state: i16,
    request: Vec<u8>,
    create_time: i64,
    end_time: Option<i64>,
    version: Option<i64>,
    error_reason: String,
    error_message: String,
    attempts: i32,
    snapshotting: bool,
    /// Only where it is asked for.
    #[sqlx(default)]
    secrets: Option<Vec<u8>>,
}

impl TryFrom<BuildRow> for StoredBuild {
    type Error = StoreError;

    fn try_from(row: BuildRow) -> Result<Self, StoreError> {
        let request = BuildTemplateRequest::decode(&*row.request)
            .map_err(|_| StoreError::Malformed(row.build_id.clone()))?;
        let micros = row
            .end_time
            .unwrap_or_else(now)
            .saturating_sub(row.create_time)
            .max(0)
            .unsigned_abs();
        let build = Build {
            build_id: row.build_id,
            name: row.name,
            // To the queue it is running as well.
            state: if row.snapshotting && row.state == BuildState::Running as i16 {
                BuildState::Snapshotting.into()
            } else {
                row.state.into()
            },
            create_time: Some(timestamp(row.create_time)),
            end_time: row.end_time.map(timestamp),
            version: row.version.unwrap_or_default().unsigned_abs(),
            error_reason: row.error_reason,
            error_message: row.error_message,
            elapsed: prost_types::Duration::try_from(Duration::from_micros(micros)).ok(),
        };
        Ok(Self {
            build,
            team: row.team,
            template_team: row.template_team,
            request,
            attempts: row.attempts.unsigned_abs(),
            secrets: row.secrets,
        })
    }
}

const BUILD_COLUMNS: &str = "build_id, team, template_team, name, state, request, create_time, end_time, version, \
     error_reason, error_message, attempts, snapshotting";

#[derive(FromRow)]
struct VersionRow {
    team: String,
    name: String,
    version: i64,
    create_time: i64,
    spec: Vec<u8>,
    tags: Vec<String>,
}

impl TryFrom<VersionRow> for Template {
    type Error = StoreError;

    fn try_from(row: VersionRow) -> Result<Self, StoreError> {
        let spec = Self::decode(&*row.spec).map_err(|_| StoreError::Malformed(row.name.clone()))?;
        Ok(Self {
            name: row.name,
            version: row.version.unsigned_abs(),
            tags: row.tags,
            create_time: Some(timestamp(row.create_time)),
            team: row.team,
            ..spec
        })
    }
}

#[derive(FromRow)]
struct KernelRow {
    name: String,
    version: String,
    arch: String,
    kernel_digest: String,
    kernel_size: i64,
    modules_digest: String,
    modules_size: i64,
    create_time: i64,
}

impl From<KernelRow> for Kernel {
    fn from(row: KernelRow) -> Self {
        let artifact = |digest: String, size: i64| Artifact {
            digest,
            size_bytes: size.unsigned_abs(),
        };
        Self {
            name: row.name,
            version: row.version,
            kernel: Some(artifact(row.kernel_digest, row.kernel_size)),
            modules: Some(artifact(row.modules_digest, row.modules_size)),
            create_time: Some(timestamp(row.create_time)),
            architecture: row.arch,
        }
    }
}

const KERNEL_COLUMNS: &str =
    "name, version, arch, kernel_digest, kernel_size, modules_digest, modules_size, create_time";

const VERSION_COLUMNS: &str = "v.team, v.name, v.version, v.create_time, v.spec, \
     array(select tag from template_tags t where t.team = v.team and t.name = v.name and t.version = v.version order by tag) as tags";

impl Store {
    /// Connects lazily.
    pub fn new(url: &str, connections: u32) -> Result<Self, StoreError> {
        let pool = database::connect(url, "template-svc", SCHEMA, connections)?;
        Ok(Self { pool })
    }

    /// Makes the schema and brings it up to date; safe when several replicas do so at once.
    pub async fn migrate(&self) -> Result<(), StoreError> {
        database::migrate(&self.pool, SCHEMA, &MIGRATIONS).await
    }

    /// A version by reference: the team's own before the shared one.
    pub async fn find(
        &self,
        team: &str,
        reference: &TemplateRef,
    ) -> Result<Option<Template>, StoreError> {
        let (tag, version) = match &reference.which {
            Which::Tag(tag) => (Some(tag.clone()), None),
            Which::Version(version) => (None, Some(i64::try_from(*version).unwrap_or(i64::MAX))),
        };
        let sql = format!(
            "select {VERSION_COLUMNS} from template_versions v where v.team in ($1, '') and v.name = $2 and \
             (v.version = $3 or exists (select 1 from template_tags g where g.team = v.team and g.name = v.name \
             and g.version = v.version and g.tag = $4)) order by v.team desc limit 1"
        );
        let row = sqlx::query_as::<_, VersionRow>(sqlx::AssertSqlSafe(sql))
            .bind(team)
            .bind(&reference.name)
            .bind(version)
            .bind(tag)
            .fetch_optional(&self.pool)
            .await?;
        row.map(Template::try_from).transpose()
    }

    /// Exactly that version.
    pub async fn version(
        &self,
        team: &str,
        name: &str,
        version: u64,
    ) -> Result<Option<Template>, StoreError> {
        let sql = format!(
            "select {VERSION_COLUMNS} from template_versions v where v.team = $1 and v.name = $2 and v.version = $3"
        );
        let row = sqlx::query_as::<_, VersionRow>(sqlx::AssertSqlSafe(sql))
            .bind(team)
            .bind(name)
            .bind(i64::try_from(version).unwrap_or(i64::MAX))
            .fetch_optional(&self.pool)
            .await?;
        row.map(Template::try_from).transpose()
    }

    /// Keeps what builds use, as version 1 of a hidden name, in place of what was kept before.
    pub async fn keep_hidden(
        &self,
        team: &str,
        name: &str,
        spec: &Template,
    ) -> Result<(), StoreError> {
        sqlx::query(
            "insert into template_versions (team, name, version, create_time, spec) values ($1, $2, 1, $3, $4) \
             on conflict (team, name, version) do update set create_time = $3, spec = $4",
        )
        .bind(team)
        .bind(name)
        .bind(now())
        .bind(spec.encode_to_vec())
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// What a team's step of that key has come to.
    pub async fn known_step(
        &self,
        team: &str,
        key: &[u8; 32],
    ) -> Result<Option<Vec<Layer>>, StoreError> {
        let row: Option<(Vec<u8>,)> = sqlx::query_as(
            "update build_steps set use_time = $3 where team = $1 and key = $2 returning layers",
        )
        .bind(team)
        .bind(key.as_slice())
        .bind(now())
        .fetch_optional(&self.pool)
        .await?;
        let Some((layers,)) = row else {
            return Ok(None);
        };
        let of = Template::decode(&*layers);
        let of = of.map_err(|_| StoreError::Malformed("a build's step".to_owned()))?;
        Ok(Some(of.layers))
    }

    /// Remembers it, in place of what was remembered before: that may be gone.
    pub async fn remember_step(
        &self,
        team: &str,
        key: &[u8; 32],
        layers: &[Layer],
    ) -> Result<(), StoreError> {
        let of = Template {
            layers: layers.to_vec(),
            ..Template::default()
        };
        sqlx::query(
            "insert into build_steps (team, key, layers, create_time, use_time) values ($1, $2, $3, $4, $4) \
             on conflict (team, key) do update set layers = $3, use_time = $4",
        )
        .bind(team)
        .bind(key.as_slice())
        .bind(of.encode_to_vec())
        .bind(now())
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// What builds have kept as version 1 of a hidden name, if they have; it is of use for a while more.
    pub async fn hidden(&self, team: &str, name: &str) -> Result<Option<Template>, StoreError> {
        sqlx::query(
            "update template_versions set create_time = $3 where team = $1 and name = $2 and name like 'build/%'",
        )
        .bind(team)
        .bind(name)
        .bind(now())
        .execute(&self.pool)
        .await?;
        self.version(team, name, 1).await
    }

    /// Forgets steps, and what builds have kept, that were of no use for so long; how many.
    pub async fn forget(&self, unused: Duration) -> Result<u64, StoreError> {
        let before = now().saturating_sub(i64::try_from(unused.as_micros()).unwrap_or(i64::MAX));
        let steps = sqlx::query("delete from build_steps where use_time < $1")
            .bind(before)
            .execute(&self.pool)
            .await?;
        let kept = sqlx::query(
            "delete from template_versions where create_time < $1 and name like 'build/%'",
        )
        .bind(before)
        .execute(&self.pool)
        .await?;
        Ok(steps.rows_affected() + kept.rows_affected())
    }

    /// Shows what a team's versions are made of; without what builds have kept.
    pub async fn each_version(
        &self,
        team: &str,
        mut see: impl FnMut(Template),
    ) -> Result<(), StoreError> {
        let sql = "select spec from template_versions where team = $1 and name not like 'build/%'";
        let mut rows = sqlx::query_as::<_, (Vec<u8>,)>(sql)
            .bind(team)
            .fetch(&self.pool);
        while let Some((spec,)) = rows.try_next().await? {
            see(decoded(&spec)?);
        }
        Ok(())
    }

    /// Shows what a team's builds have remembered, and kept; what was of use last comes first.
    pub async fn each_remembered(
        &self,
        team: &str,
        mut see: impl FnMut(Remembered),
    ) -> Result<(), StoreError> {
        let sql = "select key, null as name, use_time, layers from build_steps where team = $1 union all \
             select null, name, create_time, spec from template_versions where team = $1 and name like 'build/%' order by use_time desc";
        let mut rows = sqlx::query_as::<_, RememberedRow>(sql)
            .bind(team)
            .fetch(&self.pool);
        while let Some(RememberedRow {
            key,
            name,
            use_time,
            layers,
        }) = rows.try_next().await?
        {
            let id = match (key, name) {
                (Some(key), _) => RememberedId::Step(key),
                (None, name) => RememberedId::Hidden(name.unwrap_or_default()),
            };
            let template = decoded(&layers)?;
            see(Remembered {
                id,
                use_time,
                template,
            });
        }
        Ok(())
    }

    /// Forgets those of what a team's builds have remembered that were of no use since then (microseconds since 1970).
    pub async fn forget_these(
        &self,
        team: &str,
        ids: Vec<RememberedId>,
        before: i64,
    ) -> Result<(), StoreError> {
        let (mut keys, mut names) = (Vec::new(), Vec::new());
        for id in ids {
            match id {
                RememberedId::Step(key) => keys.push(key),
                RememberedId::Hidden(name) => names.push(name),
            }
        }
        sqlx::query("delete from build_steps where team = $1 and key = any($2) and use_time < $3")
            .bind(team)
            .bind(keys)
            .bind(before)
            .execute(&self.pool)
            .await?;
        sqlx::query(
            "delete from template_versions where team = $1 and name = any($2) and name like 'build/%' and create_time < $3",
        )
        .bind(team)
        .bind(names)
        .bind(before)
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// The digests of all that versions are made of, of what is remembered, and of kernels.
    pub async fn digests(&self) -> Result<HashSet<String>, StoreError> {
        let mut digests = HashSet::new();
        // The second are templates of which only the layers are set.
        let sql = "select spec from template_versions union all select layers from build_steps";
        let mut rows = sqlx::query_as::<_, (Vec<u8>,)>(sql).fetch(&self.pool);
        while let Some((spec,)) = rows.try_next().await? {
            // Whatever it names must not go: one that does not parse ends this.
            let template = decoded(&spec)?;
            digests.extend(parts_of(template).map(|part| part.digest));
        }
        for kernel in self.kernels().await? {
            let parts = [kernel.kernel, kernel.modules].into_iter().flatten();
            digests.extend(parts.map(|artifact| artifact.digest));
        }
        Ok(digests)
    }

    /// Keeps a kernel under its name, in place of what was there; `false` if there are too many.
    pub async fn put_kernel(&self, kernel: &Kernel) -> Result<bool, StoreError> {
        let part = |artifact: &Option<Artifact>| {
            let artifact = artifact.clone().unwrap_or_default();
            let size = i64::try_from(artifact.size_bytes).unwrap_or(i64::MAX);
            (artifact.digest, size)
        };
        let (kernel_digest, kernel_size) = part(&kernel.kernel);
        let (modules_digest, modules_size) = part(&kernel.modules);
        let sql = format!(
            "insert into kernels ({KERNEL_COLUMNS}) select $1, $2, $3, $4, $5, $6, $7, $8 \
             where exists (select 1 from kernels where name = $1) or (select count(*) from kernels) < $9 \
             on conflict (name) do update set version = $2, arch = $3, kernel_digest = $4, kernel_size = $5, \
             modules_digest = $6, modules_size = $7, create_time = $8"
        );
        let done = sqlx::query(sqlx::AssertSqlSafe(sql))
            .bind(&kernel.name)
            .bind(&kernel.version)
            .bind(&kernel.architecture)
            .bind(kernel_digest)
            .bind(kernel_size)
            .bind(modules_digest)
            .bind(modules_size)
            .bind(now())
            .bind(MOST_KERNELS)
            .execute(&self.pool)
            .await?;
        Ok(done.rows_affected() > 0)
    }

    /// The kernel of a name.
    pub async fn kernel(&self, name: &str) -> Result<Option<Kernel>, StoreError> {
        let sql = format!("select {KERNEL_COLUMNS} from kernels where name = $1");
        let row = sqlx::query_as::<_, KernelRow>(sqlx::AssertSqlSafe(sql))
            .bind(name)
            .fetch_optional(&self.pool)
            .await?;
        Ok(row.map(Kernel::from))
    }

    /// All kernels, by name.
    pub async fn kernels(&self) -> Result<Vec<Kernel>, StoreError> {
        let sql = format!("select {KERNEL_COLUMNS} from kernels order by name");
        let rows = sqlx::query_as::<_, KernelRow>(sqlx::AssertSqlSafe(sql))
            .fetch_all(&self.pool)
            .await?;
        Ok(rows.into_iter().map(Kernel::from).collect())
    }

    /// Removes a kernel's name; `false` if there was none.
    pub async fn delete_kernel(&self, name: &str) -> Result<bool, StoreError> {
        let done = sqlx::query("delete from kernels where name = $1")
            .bind(name)
            .execute(&self.pool)
            .await?;
        Ok(done.rows_affected() > 0)
    }

    /// All names a team may use.
    pub async fn names(&self, team: &str) -> Result<Vec<String>, StoreError> {
        let rows: Vec<(String,)> =
            sqlx::query_as("select distinct name from template_versions where team in ($1, '') and name not like 'build/%' order by name limit 10000")
                .bind(team)
                .fetch_all(&self.pool)
                .await?;
        Ok(rows.into_iter().map(|(name,)| name).collect())
    }

    /// The newest version of each name, by name, after one.
    pub async fn list(
        &self,
        team: &str,
        after: &str,
        limit: i64,
    ) -> Result<Vec<Template>, StoreError> {
        let sql = format!(
            "select distinct on (v.name) {VERSION_COLUMNS} from template_versions v where v.team in ($1, '') and v.name > $2 and v.name not like 'build/%' \
             order by v.name, v.team desc, v.version desc limit $3"
        );
        let rows = sqlx::query_as::<_, VersionRow>(sqlx::AssertSqlSafe(sql))
            .bind(team)
            .bind(after)
            .bind(limit)
            .fetch_all(&self.pool)
            .await?;
        rows.into_iter().map(Template::try_from).collect()
    }

    /// Points a tag at a version.
    pub async fn tag(&self, template: &Template, tag: &str) -> Result<(), StoreError> {
        sqlx::query(
            "insert into template_tags (team, name, tag, version) values ($1, $2, $3, $4) \
             on conflict (team, name, tag) do update set version = $4",
        )
        .bind(&template.team)
        .bind(&template.name)
        .bind(tag)
        .bind(i64::try_from(template.version).unwrap_or(i64::MAX))
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Removes all versions of a name, or one.
    pub async fn delete(
        &self,
        team: &str,
        name: &str,
        version: Option<u64>,
    ) -> Result<u64, StoreError> {
        let done = sqlx::query(
            "delete from template_versions where team = $1 and name = $2 and ($3::bigint is null or version = $3)",
        )
        .bind(team)
        .bind(name)
        .bind(version.map(|version| i64::try_from(version).unwrap_or(i64::MAX)))
        .execute(&self.pool)
        .await?;
        Ok(done.rows_affected())
    }

    /// Stores a new build, or finds the one the team made with this request ID.
    pub async fn insert_build(
        &self,
        build_id: &str,
        team: &str,
        template_team: &str,
        request: &BuildTemplateRequest,
        secrets: Option<Vec<u8>>,
    ) -> Result<StoredBuild, StoreError> {
        let request_id = Some(&request.request_id).filter(|id| !id.is_empty());
        sqlx::query(
            "insert into builds (build_id, team, template_team, name, request_id, state, request, create_time, secrets) \
             values ($1, $2, $3, $4, $5, $6, $7, $8, $9) on conflict (team, request_id) where request_id is not null do nothing",
        )
        .bind(build_id)
        .bind(team)
        .bind(template_team)
        .bind(&request.name)
        .bind(request_id)
        .bind(BuildState::Queued as i16)
        .bind(request.encode_to_vec())
        .bind(now())
        .bind(secrets)
        .execute(&self.pool)
        .await?;
        let sql = format!(
            "select {BUILD_COLUMNS} from builds where build_id = $1 or (team = $2 and request_id = $3) limit 1"
        );
        let row = sqlx::query_as::<_, BuildRow>(sqlx::AssertSqlSafe(sql))
            .bind(build_id)
            .bind(team)
            .bind(request_id)
            .fetch_one(&self.pool)
            .await?;
        row.try_into()
    }

    /// The build a team has asked for with this request ID.
    pub async fn requested(
        &self,
        team: &str,
        request_id: &str,
    ) -> Result<Option<StoredBuild>, StoreError> {
        let sql = format!("select {BUILD_COLUMNS} from builds where team = $1 and request_id = $2");
        let row = sqlx::query_as::<_, BuildRow>(sqlx::AssertSqlSafe(sql))
            .bind(team)
            .bind(request_id)
            .fetch_optional(&self.pool)
            .await?;
        row.map(StoredBuild::try_from).transpose()
    }

    /// One build.
    pub async fn build(&self, build_id: &str) -> Result<Option<StoredBuild>, StoreError> {
        let sql = format!("select {BUILD_COLUMNS} from builds where build_id = $1");
        let row = sqlx::query_as::<_, BuildRow>(sqlx::AssertSqlSafe(sql))
            .bind(build_id)
            .fetch_optional(&self.pool)
            .await?;
        row.map(StoredBuild::try_from).transpose()
    }

    /// Takes a build that waits, or whose builder has not renewed its lease: of the team that has the fewest running, none that has
    /// `most_of_team`, and of that team the oldest. No two replicas get the same; two at once may take one more of a team than that.
    pub async fn take_build(
        &self,
        lease: Duration,
        most_of_team: u32,
    ) -> Result<Option<StoredBuild>, StoreError> {
        let until = now().saturating_add(i64::try_from(lease.as_micros()).unwrap_or(i64::MAX));
        let sql = format!(
            "update builds set state = 2, lease_until = $1, attempts = attempts + 1, snapshotting = false where build_id = (\
             select build_id from builds b, lateral (select count(*) as running from builds r \
             where r.team = b.team and r.state = 2 and r.lease_until >= $2) as of_team \
             where (state = 1 or (state = 2 and lease_until < $2)) and running < $3 \
             order by running, create_time limit 1 for update of b skip locked) \
             returning {BUILD_COLUMNS}, secrets"
        );
        let row = sqlx::query_as::<_, BuildRow>(sqlx::AssertSqlSafe(sql))
            .bind(until)
            .bind(now())
            .bind(i64::from(most_of_team))
            .fetch_optional(&self.pool)
            .await?;
        row.map(StoredBuild::try_from).transpose()
    }

    /// Keeps a build; `false` if it was cancelled, or another builder has it: one is known by how often it had been taken then.
    pub async fn renew_build(
        &self,
        build_id: &str,
        attempt: u32,
        lease: Duration,
    ) -> Result<bool, StoreError> {
        let until = now().saturating_add(i64::try_from(lease.as_micros()).unwrap_or(i64::MAX));
        let done = sqlx::query(
            "update builds set lease_until = $2 where build_id = $1 and state = 2 and attempts = $3",
        )
        .bind(build_id)
        .bind(until)
        .bind(i64::from(attempt))
        .execute(&self.pool)
        .await?;
        Ok(done.rows_affected() > 0)
    }

    /// Notes that a builder's build has a node make its snapshot now.
    pub async fn note_snapshotting(&self, build_id: &str, attempt: u32) -> Result<(), StoreError> {
        sqlx::query(
            "update builds set snapshotting = true where build_id = $1 and state = 2 and attempts = $2",
        )
        .bind(build_id)
        .bind(i64::from(attempt))
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Ends a build that has not ended; `false` if it has, or if it is another builder's than the one of this attempt.
    pub async fn end_build(
        &self,
        build_id: &str,
        attempt: Option<u32>,
        state: BuildState,
        reason: &str,
        message: &str,
    ) -> Result<bool, StoreError> {
        let done = sqlx::query(
            "update builds set state = $2, end_time = $3, error_reason = $4, error_message = $5, lease_until = null, secrets = null \
             where build_id = $1 and state < 3 and ($6::bigint is null or attempts = $6)",
        )
        .bind(build_id)
        .bind(state as i16)
        .bind(now())
        .bind(reason)
        .bind(presentable(message))
        .bind(attempt.map(i64::from))
        .execute(&self.pool)
        .await?;
        Ok(done.rows_affected() > 0)
    }

    /// How many of a team's builds wait or run.
    pub async fn unfinished(&self, team: &str) -> Result<i64, StoreError> {
        let (count,): (i64,) =
            sqlx::query_as("select count(*) from builds where state < 3 and team = $1")
                .bind(team)
                .fetch_one(&self.pool)
                .await?;
        Ok(count)
    }

    /// Stores what a build made as the next version, tags it, and ends the build: all or nothing.
    pub async fn publish(
        &self,
        stored: &StoredBuild,
        spec: &Template,
    ) -> Result<Option<u64>, StoreError> {
        let mut transaction = self.pool.begin().await?;
        let (team, name) = (&stored.template_team, &stored.build.name);
        // Two builds of one name must not take the same number.
        sqlx::query("select pg_advisory_xact_lock(hashtext($1))")
            .bind(format!("{team}/{name}"))
            .execute(&mut *transaction)
            .await?;
        let (version,): (i64,) = sqlx::query_as(
            "insert into template_versions (team, name, version, create_time, spec) \
             select $1, $2, coalesce(max(version), 0) + 1, $3, $4 from template_versions where team = $1 and name = $2 \
             returning version",
        )
        .bind(team)
        .bind(name)
        .bind(now())
        .bind(spec.encode_to_vec())
        .fetch_one(&mut *transaction)
        .await?;
        for tag in stored
            .request
            .tags
            .iter()
            .map(String::as_str)
            .chain(["latest"])
        {
            sqlx::query(
                "insert into template_tags (team, name, tag, version) values ($1, $2, $3, $4) \
                 on conflict (team, name, tag) do update set version = $4",
            )
            .bind(team)
            .bind(name)
            .bind(tag)
            .bind(version)
            .execute(&mut *transaction)
            .await?;
        }
        let ended = sqlx::query(
            "update builds set state = 3, end_time = $2, version = $3, lease_until = null, secrets = null \
             where build_id = $1 and state = 2 and attempts = $4",
        )
        .bind(&stored.build.build_id)
        .bind(now())
        .bind(version)
        .bind(i64::from(stored.attempts))
        .execute(&mut *transaction)
        .await?;
        if ended.rows_affected() == 0 {
            // Cancelled meanwhile, or another builder's: nothing of it is kept.
            return Ok(None);
        }
        transaction.commit().await?;
        Ok(Some(version.unsigned_abs()))
    }

    /// Adds a line to a build's log.
    pub async fn log(&self, build_id: &str, message: &str) -> Result<(), StoreError> {
        sqlx::query("insert into build_logs (build_id, time, message) values ($1, $2, $3)")
            .bind(build_id)
            .bind(now())
            .bind(presentable(message))
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    /// Adds several, in order.
    pub async fn log_all(&self, build_id: &str, messages: &[String]) -> Result<(), StoreError> {
        let messages: Vec<String> = messages.iter().map(|line| presentable(line)).collect();
        sqlx::query(
            "insert into build_logs (build_id, time, message) \
             select $1, $2, line from unnest($3::text[]) with ordinality as lines (line, number) order by number",
        )
        .bind(build_id)
        .bind(now())
        .bind(messages)
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Lines of a build's log after a number, with their numbers.
    pub async fn log_after(
        &self,
        build_id: &str,
        after: i64,
    ) -> Result<Vec<(i64, StreamBuildLogsResponse)>, StoreError> {
        let rows: Vec<(i64, i64, String)> = sqlx::query_as(
            "select number, time, message from build_logs where build_id = $1 and number > $2 order by number limit 1000",
        )
        .bind(build_id)
        .bind(after)
        .fetch_all(&self.pool)
        .await?;
        let line = |(number, time, message): (i64, i64, String)| {
            (
                number,
                StreamBuildLogsResponse {
                    time: Some(timestamp(time)),
                    message,
                    number: number.unsigned_abs(),
                },
            )
        };
        Ok(rows.into_iter().map(line).collect())
    }
}
