//! What a team may keep, in a real database.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::time::Duration;

use proto::template::v1::{Artifact, BuildTemplateRequest, Layer, Template};
use template_svc::{
    names::hidden,
    quota::{IN_USE, Quota, QuotaError},
    store::Store,
};
use testbed::{Durability, Postgres};

mod fresh;

struct World {
    store: Store,
    _postgres: Postgres,
}

impl World {
    async fn new() -> Self {
        let postgres = Postgres::with(Durability::None).unwrap();
        Self {
            store: fresh::store(&postgres).await,
            _postgres: postgres,
        }
    }

    async fn publish(&self, team: &str, id: &str, spec: &Template) {
        let request = BuildTemplateRequest {
            name: id.into(),
            ..BuildTemplateRequest::default()
        };
        let inserted = self.store.insert_build(id, team, team, &request, None);
        inserted.await.unwrap();
        let taken = self.store.take_build(Duration::from_mins(1), 9).await;
        let taken = taken.unwrap().unwrap();
        self.store.publish(&taken, spec).await.unwrap().unwrap();
    }

    async fn is_known(&self, team: &str, key: u8) -> bool {
        let known = self.store.known_step(team, &[key; 32]).await;
        known.unwrap().is_some()
    }
}

fn artifact(name: &str, size_bytes: u64) -> Artifact {
    Artifact {
        digest: blake3::hash(name.as_bytes()).to_hex().to_string(),
        size_bytes,
    }
}

fn layers(sizes: &[(&str, u64)]) -> Vec<Layer> {
    let layer = |(name, size): &(&str, u64)| Layer {
        blob: Some(artifact(name, *size)),
        ..Layer::default()
    };
    sizes.iter().map(layer).collect()
}

fn of(root: (&str, u64), below: &[(&str, u64)]) -> Template {
    Template {
        rootfs: Some(artifact(root.0, root.1)),
        // Not the team's.
        kernel: Some(artifact("kernel", 1 << 40)),
        modules: Some(artifact("modules", 1 << 40)),
        layers: layers(below),
        ..Template::default()
    }
}

#[tokio::test]
async fn versions_count_once_what_they_share() {
    let world = World::new().await;
    let quota = Quota::new(world.store.clone(), 100, Duration::ZERO);
    quota.has_room("team").await.unwrap();
    world
        .publish("team", "one", &of(("root 1", 20), &[("base", 40)]))
        .await;
    let next = of(("root 2", 20), &[("base", 40), ("top", 20)]);
    quota.make_room("team", next.clone()).await.unwrap();
    let too_much = of(("root 2", 20), &[("base", 40), ("top", 21)]);
    let refused = quota.make_room("team", too_much.clone()).await;
    assert!(matches!(
        refused,
        Err(QuotaError::Full {
            needed: 101,
            most: 100
        })
    ));
    // What is shared counts for nobody.
    world
        .publish("", "shared", &of(("root 4", 1), &[("base", 40)]))
        .await;
    quota.make_room("team", too_much.clone()).await.unwrap();
    world.store.delete("", "shared", None).await.unwrap();
    // Another team's is no matter of its.
    quota.make_room("other", too_much).await.unwrap();
    quota
        .make_room("", of(("root 3", 1 << 40), &[]))
        .await
        .unwrap();
    world.publish("team", "two", &next).await;
    let full = quota.has_room("team").await.unwrap_err();
    assert!(full.to_string().contains("100 of the 100 bytes"), "{full}");
    assert!(matches!(full, QuotaError::Full { .. }));
    world.store.delete("team", "two", None).await.unwrap();
    quota.has_room("team").await.unwrap();
}

#[tokio::test]
async fn what_was_not_used_for_longest_is_forgotten_first() {
    let world = World::new().await;
    let quota = Quota::new(world.store.clone(), 100, Duration::ZERO);
    world.publish("team", "one", &of(("root", 40), &[])).await;
    for (team, key, size) in [("team", 1, 20), ("team", 2, 20), ("other", 1, 90)] {
        let name = format!("{team} {key}");
        let (key, made) = ([key; 32], layers(&[(&name, size)]));
        let remembered = world.store.remember_step(team, &key, &made);
        remembered.await.unwrap();
    }
    let name = hidden(&"a".repeat(64));
    let kept = of(("begin", 20), &[]);
    world.store.keep_hidden("team", &name, &kept).await.unwrap();
    // All of it is just what there may be.
    quota.make_room("team", Template::default()).await.unwrap();
    assert!(world.is_known("team", 2).await && world.is_known("team", 1).await);
    // The hidden one is the longest unused now, and a byte more has no room beside it.
    let new = of(("root", 40), &[("new", 1)]);
    quota.make_room("team", new).await.unwrap();
    assert_eq!(world.store.hidden("team", &name).await.unwrap(), None);
    assert!(world.is_known("team", 2).await && world.is_known("team", 1).await);
    let new = of(("root", 40), &[("new", 40)]);
    quota.make_room("team", new).await.unwrap();
    assert!(!world.is_known("team", 2).await && world.is_known("team", 1).await);
    assert!(world.is_known("other", 1).await);
    let mut versions = 0;
    let counted = world.store.each_version("team", |_| versions += 1);
    counted.await.unwrap();
    assert_eq!(versions, 1);
    // What may be in use stays, whatever comes.
    let careful = Quota::new(world.store.clone(), 100, IN_USE);
    let new = of(("root", 40), &[("newer", 60)]);
    careful.make_room("team", new.clone()).await.unwrap();
    assert!(world.is_known("team", 1).await);
    quota.make_room("team", new).await.unwrap();
    assert!(!world.is_known("team", 1).await);
}
