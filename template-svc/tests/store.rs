//! Rows of builds, in a real database.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::time::Duration;

use proto::template::v1::{BuildState, BuildTemplateRequest, Template};
use template_svc::store::Store;
use testbed::{Durability, Postgres};

async fn store(postgres: &Postgres) -> Store {
    let store = Store::new(&postgres.url(), 2).unwrap();
    store.migrate().await.unwrap();
    let request = BuildTemplateRequest {
        name: "app".into(),
        ..BuildTemplateRequest::default()
    };
    store
        .insert_build("b1", "team", "team", &request, Some(b"sealed".to_vec()))
        .await
        .unwrap();
    store
}

/// Whoever takes it can see that builders die of it.
#[tokio::test]
async fn a_build_counts_its_builders() {
    let postgres = Postgres::with(Durability::None).unwrap();
    let store = store(&postgres).await;
    for attempt in 1..=3 {
        let taken = store.take_build(Duration::ZERO).await.unwrap().unwrap();
        assert_eq!(taken.attempts, attempt);
    }
}

/// Whoever reads the database later finds no credentials of builds that have ended.
#[tokio::test]
async fn credentials_go_with_the_build() {
    let postgres = Postgres::with(Durability::None).unwrap();
    let store = store(&postgres).await;
    let taken = store.take_build(Duration::from_mins(1)).await.unwrap();
    let taken = taken.unwrap();
    assert_eq!(taken.secrets.as_deref(), Some(&b"sealed"[..]));
    let version = store.publish(&taken, &Template::default()).await;
    assert_eq!(version.unwrap(), Some(1));
    let request = BuildTemplateRequest {
        name: "app".into(),
        ..BuildTemplateRequest::default()
    };
    let secrets = Some(b"sealed".to_vec());
    let inserted = store.insert_build("b2", "team", "team", &request, secrets);
    inserted.await.unwrap();
    let ended = store.end_build("b2", BuildState::Cancelled, "CANCELLED", "");
    assert!(ended.await.unwrap());
    let pool = sqlx::PgPool::connect(&postgres.url()).await.unwrap();
    let kept = "select count(*), count(secrets) from sandmesh_template.builds";
    let kept: (i64, i64) = sqlx::query_as(kept).fetch_one(&pool).await.unwrap();
    assert_eq!(kept, (2, 0));
}

/// Sources say what they like, and it is in errors: a database takes no NUL, and nobody reads megabytes.
#[tokio::test]
async fn whatever_a_source_says_is_stored() {
    let postgres = Postgres::with(Durability::None).unwrap();
    let store = store(&postgres).await;
    let said = format!("image \0a\u{1b}[2J{}", "x".repeat(1 << 20));
    store.log("b1", &said).await.unwrap();
    let ended = store.end_build("b1", BuildState::Failed, "IMAGE_UNKNOWN", &said);
    assert!(ended.await.unwrap());
    let build = store.build("b1").await.unwrap().unwrap().build;
    let (_, line) = store.log_after("b1", 0).await.unwrap().remove(0);
    for text in [build.error_message, line.message] {
        assert!(text.starts_with("image \u{fffd}a\u{fffd}[2Jxx"));
        assert_eq!(text.chars().count(), 4096);
    }
}
