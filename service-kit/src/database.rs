//! Postgres as every service uses it: a schema of its own, connected to lazily, brought up to date before serving.

use std::time::Duration;

use sqlx::{
    AssertSqlSafe, Connection as _, PgPool,
    migrate::{MigrateError, Migrator},
    postgres::{PgConnectOptions, PgPoolOptions},
};

const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(1);
/// A connection that was used so recently is taken for alive; others are asked first.
const SURELY_ALIVE: Duration = Duration::from_millis(500);

/// A pool whose connections see one schema. A database that is away is an error of the statement, not of the start.
pub fn connect(
    url: &str,
    service: &str,
    schema: &str,
    connections: u32,
) -> Result<PgPool, sqlx::Error> {
    let options: PgConnectOptions = url.parse()?;
    let options = options
        .options([("search_path", schema)])
        .application_name(service);
    let pool = PgPoolOptions::new()
        .max_connections(connections)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        // Asking before each use would double the round trips.
        .test_before_acquire(false)
        .before_acquire(|connection, use_of_it| {
            Box::pin(async move {
                if use_of_it.idle_for > SURELY_ALIVE {
                    connection.ping().await?;
                }
                Ok(true)
            })
        });
    Ok(pool.connect_lazy_with(options))
}

/// Makes the schema and brings it up to date; safe when several replicas do so at once. `schema` is a name of our own.
pub async fn migrate<E>(
    pool: &PgPool,
    schema: &'static str,
    migrations: &'static Migrator,
) -> Result<(), E>
where
    E: From<sqlx::Error> + From<MigrateError>,
{
    let mut connection = pool.acquire().await?;
    // `if not exists` alone races in Postgres; sqlx's own lock covers only what comes after.
    sqlx::query("select pg_advisory_lock(hashtext($1))")
        .bind(schema)
        .execute(&mut *connection)
        .await?;
    let make = AssertSqlSafe(format!("create schema if not exists {schema}"));
    let made = sqlx::query(make).execute(&mut *connection).await;
    sqlx::query("select pg_advisory_unlock(hashtext($1))")
        .bind(schema)
        .execute(&mut *connection)
        .await?;
    made?;
    drop(connection);
    migrations.run(pool).await?;
    Ok(())
}
