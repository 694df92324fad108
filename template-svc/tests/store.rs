//! Rows of builds, in a real database.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::time::Duration;

use proto::template::v1::{BuildState, BuildTemplateRequest, Layer, Template};
use template_svc::{
    names::{TemplateRef, hidden},
    store::Store,
};
use testbed::{Durability, Postgres};

mod fresh;

async fn store(postgres: &Postgres) -> Store {
    let store = fresh::store(postgres).await;
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
        let taken = store.take_build(Duration::ZERO, 2).await.unwrap().unwrap();
        assert_eq!(taken.attempts, attempt);
    }
}

/// Whoever reads the database later finds no credentials of builds that have ended.
#[tokio::test]
async fn credentials_go_with_the_build() {
    let postgres = Postgres::with(Durability::None).unwrap();
    let store = store(&postgres).await;
    let taken = store.take_build(Duration::from_mins(1), 2).await.unwrap();
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
    let ended = store.end_build("b2", None, BuildState::Cancelled, "CANCELLED", "");
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
    let ended = store.end_build("b1", None, BuildState::Failed, "IMAGE_UNKNOWN", &said);
    assert!(ended.await.unwrap());
    let build = store.build("b1").await.unwrap().unwrap().build;
    let (_, line) = store.log_after("b1", 0).await.unwrap().remove(0);
    for text in [build.error_message, line.message] {
        assert!(text.starts_with("image \u{fffd}a\u{fffd}[2Jxx"));
        assert_eq!(text.chars().count(), 4096);
    }
}

/// A team's own; another one that writes the same step does not have it.
#[tokio::test]
async fn steps_are_known_to_their_team() {
    let postgres = Postgres::with(Durability::None).unwrap();
    let store = store(&postgres).await;
    let layer = |diff_id: &str| Layer {
        diff_id: diff_id.into(),
        ..Layer::default()
    };
    let key = [7; 32];
    assert_eq!(store.known_step("team", &key).await.unwrap(), None);
    for layers in [vec![layer("a")], vec![layer("a"), layer("b")]] {
        store.remember_step("team", &key, &layers).await.unwrap();
        let known = store.known_step("team", &key).await.unwrap();
        assert_eq!(known, Some(layers));
    }
    assert_eq!(store.known_step("other", &key).await.unwrap(), None);
    assert_eq!(store.known_step("team", &[8; 32]).await.unwrap(), None);
}

/// What builds use between them is found by its name, and is in no list.
#[tokio::test]
async fn hidden_templates_are_not_listed() {
    let postgres = Postgres::with(Durability::None).unwrap();
    let store = store(&postgres).await;
    let name = hidden(&"a".repeat(64));
    for vcpus in [1, 2] {
        let spec = Template {
            default_vcpus: vcpus,
            ..Template::default()
        };
        store.keep_hidden("team", &name, &spec).await.unwrap();
    }
    let reference = TemplateRef::parse(&format!("{name}@1")).unwrap();
    let found = store.find("team", &reference).await.unwrap().unwrap();
    assert_eq!((found.version, found.default_vcpus), (1, 2));
    assert!(store.find("other", &reference).await.unwrap().is_none());
    assert!(store.names("team").await.unwrap().is_empty());
    assert!(store.list("team", "", 10).await.unwrap().is_empty());
}

#[tokio::test]
async fn lines_of_a_log_stay_in_order() {
    let postgres = Postgres::with(Durability::None).unwrap();
    let store = store(&postgres).await;
    let lines: Vec<String> = (0..500).map(|number| format!("{number} \0")).collect();
    store.log("b1", "first").await.unwrap();
    store.log_all("b1", &lines).await.unwrap();
    store.log_all("b1", &[]).await.unwrap();
    let log = store.log_after("b1", 0).await.unwrap();
    let log: Vec<_> = log.into_iter().map(|(_, line)| line.message).collect();
    assert_eq!(log[0], "first");
    let expected = (0..500).map(|number| format!("{number} \u{fffd}"));
    assert!(log[1..].iter().cloned().eq(expected));
}

/// However many a team asks for, another one's turn comes.
#[tokio::test]
async fn builds_are_taken_fairly() {
    let postgres = Postgres::with(Durability::None).unwrap();
    let store = store(&postgres).await;
    let request = BuildTemplateRequest::default();
    for (id, team) in [
        ("b2", "team"),
        ("b3", "team"),
        ("b4", "other"),
        ("b5", "other"),
    ] {
        let inserted = store.insert_build(id, team, team, &request, None);
        inserted.await.unwrap();
    }
    let take = async || {
        let taken = store.take_build(Duration::from_mins(1), 2).await.unwrap();
        taken.map(|taken| taken.build.build_id)
    };
    let mut taken = Vec::new();
    while let Some(id) = take().await {
        taken.push(id);
    }
    assert_eq!(taken, ["b1", "b4", "b2", "b5"]);
    // The third of a team waits until one of its others has ended.
    let ended = store.end_build("b2", None, BuildState::Failed, "X", "");
    assert!(ended.await.unwrap());
    assert_eq!(take().await.as_deref(), Some("b3"));
}

/// One that has missed its lease neither keeps nor ends what another has taken.
#[tokio::test]
async fn a_build_is_its_last_builders() {
    let postgres = Postgres::with(Durability::None).unwrap();
    let store = store(&postgres).await;
    let first = store.take_build(Duration::ZERO, 2).await.unwrap().unwrap();
    let second = store.take_build(Duration::from_mins(1), 2).await.unwrap();
    let second = second.unwrap();
    let renew = async |attempt| {
        let renewed = store.renew_build("b1", attempt, Duration::from_mins(1));
        renewed.await.unwrap()
    };
    assert!(!renew(first.attempts).await);
    assert!(renew(second.attempts).await);
    let failed = store.end_build("b1", Some(first.attempts), BuildState::Failed, "X", "");
    assert!(!failed.await.unwrap());
    let spec = Template::default();
    assert_eq!(store.publish(&first, &spec).await.unwrap(), None);
    assert_eq!(store.unfinished("team").await.unwrap(), 1);
    assert_eq!(store.publish(&second, &spec).await.unwrap(), Some(1));
    assert!(!renew(second.attempts).await);
    assert_eq!(store.unfinished("team").await.unwrap(), 0);
}

#[tokio::test]
async fn a_build_is_known_by_its_request() {
    let postgres = Postgres::with(Durability::None).unwrap();
    let store = store(&postgres).await;
    let request = BuildTemplateRequest {
        name: "app".into(),
        request_id: "r1".into(),
        ..BuildTemplateRequest::default()
    };
    for id in ["b2", "b3"] {
        let inserted = store.insert_build(id, "team", "team", &request, None);
        assert_eq!(inserted.await.unwrap().build.build_id, "b2");
    }
    let found = async |team, request_id| {
        let found = store.requested(team, request_id).await.unwrap();
        found.map(|found| found.build.build_id)
    };
    assert_eq!(found("team", "r1").await.as_deref(), Some("b2"));
    assert_eq!(found("team", "r2").await, None);
    assert_eq!(found("other", "r1").await, None);
}
