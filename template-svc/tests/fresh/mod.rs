//! A database with nothing in it, for tests of rows.

use template_svc::store::Store;
use testbed::Postgres;

/// Its tables.
pub(crate) async fn store(postgres: &Postgres) -> Store {
    let store = Store::new(&postgres.url(), 2).unwrap();
    store.migrate().await.unwrap();
    store
}
