//! What clients are promised about single sessions.

use std::{collections::HashSet, time::Duration};

use proto::session::v1::{
    CreateSessionRequest, Egress, ExtendSessionRequest, GetSessionRequest,
    ListSessionEventsRequest, ListSessionsRequest, Network, PortReadiness, Resources, SessionState,
    UpdateSessionRequest,
};
use service_kit::errors::reason_of;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::{
    node::OPEN_PORT,
    registry::listed,
    world::{Replica, World, assert_refused, base, by, eventually, labels, named, red},
};

async fn history(replica: &Replica, id: &str) -> Vec<String> {
    let request = ListSessionEventsRequest {
        session_id: id.into(),
        ..ListSessionEventsRequest::default()
    };
    let answer = replica.sessions().list_session_events(red(request)).await;
    let events = answer.unwrap().into_inner().events;
    for (index, event) in events.iter().enumerate() {
        assert_eq!(event.sequence, index as u64 + 1);
    }
    events.into_iter().map(|event| event.r#type).collect()
}

#[tokio::test]
async fn a_create_waits_for_a_port_and_what_was_created_stays() {
    let world = World::new().await;
    let replica = world.replica();
    let node = world.node(&replica, 4).await;
    let create = |port| CreateSessionRequest {
        request_id: format!("port-{port}"),
        wait_for_port: Some(PortReadiness {
            port,
            timeout: Some(prost_types::Duration {
                seconds: 1,
                nanos: 0,
            }),
            ..PortReadiness::default()
        }),
        ..base()
    };
    let session = replica.create(create(OPEN_PORT)).await.unwrap();
    assert_eq!(session.state(), SessionState::Running);
    let closed = replica.create(create(81)).await.unwrap_err();
    assert_eq!(closed.code(), Code::DeadlineExceeded);
    assert_eq!(reason_of(&closed).as_deref(), Some("PORT_CLOSED"));
    let details = closed.get_details_error_info().unwrap().metadata;
    assert_eq!(
        replica.get(&details["sessionId"]).await.unwrap().state(),
        SessionState::Running
    );
    // The same request is the same session, and waits again.
    let again = replica.create(create(81)).await.unwrap_err();
    assert_eq!(again.get_details_error_info().unwrap().metadata, details);
    let waits = node
        .inside()
        .calls
        .iter()
        .filter(|(call, _)| *call == "wait")
        .count();
    assert_eq!((waits, node.inside().hosted.len()), (3, 2));
    assert_refused(
        replica.create(create(0)).await,
        Code::InvalidArgument,
        "INVALID_ARGUMENT",
    );
}

#[tokio::test]
async fn a_session_lives_from_create_to_stop() {
    let world = World::new().await;
    let replica = world.replica();
    let node = world.node(&replica, 4).await;
    let session = replica.create(base()).await.unwrap();
    assert_eq!(session.state(), SessionState::Running);
    assert_eq!(session.node_id, node.id);
    assert!(session.session_id.starts_with(&node.registered().await));
    assert_eq!(
        session.host,
        format!("{{port}}-{}.example.test:10080", session.session_id)
    );
    assert!(session.access_token.starts_with("sst_"));
    assert_eq!(session.template_version, "base@3");
    assert_eq!(session.resources.unwrap().memory_bytes, 128 << 20);
    assert!(session.start_time.is_some() && session.end_time.is_none());
    assert_eq!(replica.get(&session.session_id).await.unwrap(), session);

    let stopped = replica.stop_session(&session.session_id).await.unwrap();
    assert_eq!(stopped.state(), SessionState::Stopped);
    assert_eq!(stopped.end_reason.unwrap().reason, "STOP_REQUESTED");
    assert!(node.inside().hosted.is_empty());
    let again = replica.stop_session(&session.session_id).await.unwrap();
    assert_eq!(again.version, stopped.version);
    assert_eq!(
        history(&replica, &session.session_id).await,
        ["CREATED", "STARTING", "RUNNING", "STOPPING", "STOPPED"]
    );
}

#[tokio::test]
async fn one_request_id_is_one_session_whichever_replica_hears_it() {
    let world = World::new().await;
    let replicas = [world.replica(), world.replica()];
    let node = world.node(&replicas[0], 50).await;
    node.hold_starts();
    let creates: Vec<_> = (0..20)
        .map(|n| {
            let mut client = replicas[n % 2].sessions();
            tokio::spawn(async move { client.create_session(red(named("once"))).await })
        })
        .collect();
    eventually(async || (!node.inside().starts.is_empty()).then_some(()))
        .await
        .unwrap();
    node.open();
    let mut ids = HashSet::new();
    for create in creates {
        let session = create.await.unwrap().unwrap().into_inner().session.unwrap();
        assert_eq!(session.state(), SessionState::Running);
        assert!(!session.access_token.is_empty());
        ids.insert(session.session_id);
    }
    assert_eq!(ids.len(), 1);
    assert_eq!(node.inside().starts.len(), 1);
    // Another team's request IDs are its own.
    let other = by("blue", named("once"));
    let other = replicas[0].sessions().create_session(other).await.unwrap();
    assert!(!ids.contains(&other.into_inner().session.unwrap().session_id));
}

#[tokio::test]
async fn a_failed_create_does_not_use_up_its_request_id() {
    let world = World::new().await;
    let replica = world.replica();
    let node = world.node(&replica, 4).await;
    node.inside().refuse = Some(Status::failed_precondition("no such kernel"));
    let refused = replica.create(named("again")).await;
    assert_refused(refused, Code::Aborted, "SESSION_FAILED");
    node.inside().refuse = None;
    let session = replica.create(named("again")).await.unwrap();
    assert_eq!(session.state(), SessionState::Running);
}

#[tokio::test]
async fn a_client_that_goes_away_leaves_nothing_half_done() {
    let world = World::new().await;
    let replica = world.replica();
    let node = world.node(&replica, 4).await;
    node.hold_starts();
    let mut client = replica.sessions();
    let create = tokio::spawn(async move { client.create_session(red(named("gone"))).await });
    eventually(async || (!node.inside().starts.is_empty()).then_some(()))
        .await
        .unwrap();
    create.abort();
    node.open();
    let session = replica.create(named("gone")).await.unwrap();
    assert_eq!(session.state(), SessionState::Running);
    assert_eq!(node.inside().starts.len(), 1);
}

#[tokio::test]
async fn a_stop_during_the_start_leaves_nothing_on_the_node() {
    let world = World::new().await;
    let replica = world.replica();
    let node = world.node(&replica, 4).await;
    node.hold_starts();
    let mut client = replica.sessions();
    let create = tokio::spawn(async move { client.create_session(red(base())).await });
    let id = eventually(async || node.inside().starts.first().cloned());
    let id = id.await.unwrap();
    let stopped = replica.stop_session(&id).await.unwrap();
    assert_eq!(stopped.state(), SessionState::Stopped);
    // This node was told to stop first, and starts it all the same.
    node.open();
    let create = create.await.unwrap();
    assert_refused(create, Code::NotFound, "SESSION_STOPPED");
    assert!(node.inside().hosted.is_empty());
}

#[tokio::test]
async fn another_teams_session_looks_unknown() {
    let world = World::new().await;
    let replica = world.replica();
    let _node = world.node(&replica, 4).await;
    let id = replica.create(base()).await.unwrap().session_id;
    let get = |team: &'static str, id: &str| {
        let session_id = id.to_owned();
        let mut client = replica.sessions();
        async move {
            client
                .get_session(by(team, GetSessionRequest { session_id }))
                .await
        }
    };
    let foreign = assert_refused(get("blue", &id).await, Code::NotFound, "SESSION_UNKNOWN");
    let never = "a".repeat(25);
    let unknown = assert_refused(get("blue", &never).await, Code::NotFound, "SESSION_UNKNOWN");
    assert_eq!(
        foreign.message().replace(&id, "X"),
        unknown.message().replace(&never, "X")
    );
    // Capitals are the same ID: host names do not keep case.
    get("red", &id.to_uppercase()).await.unwrap();
    let watch = proto::session::v1::WatchSessionsRequest {
        session_id: id,
        revision: String::new(),
    };
    let watch = replica.sessions().watch_sessions(by("blue", watch)).await;
    assert_eq!(watch.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn a_full_node_passes_a_session_on_until_all_are_full() {
    let world = World::new().await;
    let replica = world.replica();
    let first = world.node(&replica, 1).await;
    let second = world.node(&replica, 1).await;
    // Both say they have room, and the first will not take any.
    let full = service_kit::errors::Failure::new(
        Code::ResourceExhausted,
        service_kit::errors::Reason::NODE_FULL,
        "full",
    );
    first.inside().refuse = Some(full.into());
    let mut sessions = Vec::new();
    for n in 0..2 {
        match replica.create(named(&format!("full-{n}"))).await {
            Ok(session) => {
                sessions.push(session);
                let shown = eventually(async || {
                    let node = listed(&replica, &second, false).await?;
                    (node.used?.sessions == 1).then_some(())
                });
                shown.await.unwrap();
            }
            Err(status) => {
                let details = status.get_error_details();
                let info = details.error_info().unwrap();
                assert_eq!(info.reason, "NO_CAPACITY");
                assert_eq!(status.code(), Code::ResourceExhausted);
                assert_eq!(info.metadata["freeSessions"], "0");
                assert!(details.retry_info().is_some());
            }
        }
    }
    assert_eq!(sessions.len(), 1);
    assert_eq!(sessions[0].node_id, second.id);
    assert!(
        sessions[0]
            .session_id
            .starts_with(&second.registered().await)
    );
    assert_eq!(
        history(&replica, &sessions[0].session_id).await,
        ["CREATED", "STARTING", "RUNNING"]
    );
    // Larger than what any node has: says what is free.
    first.inside().refuse = None;
    let large = CreateSessionRequest {
        resources: Some(Resources {
            memory_bytes: 1 << 30,
            ..Resources::default()
        }),
        ..base()
    };
    let refused = replica.create(large).await;
    let status = assert_refused(refused, Code::ResourceExhausted, "NO_CAPACITY");
    let details = status.get_error_details();
    assert_eq!(
        details.error_info().unwrap().metadata["freeMemoryBytes"],
        (128 << 20).to_string()
    );
}

#[tokio::test]
async fn a_node_that_does_not_answer_costs_no_create() {
    let world = World::new().await;
    let replica = world.replica();
    let mut dead = world.node(&replica, 9).await;
    let alive = world.node(&replica, 9).await;
    // Still beating, so it is still chosen; but nobody answers there.
    let tag = dead.registered().await;
    dead.die();
    for _ in 0..6 {
        let session = replica.create(base()).await.unwrap();
        assert_eq!(session.node_id, alive.id);
        assert!(!session.session_id.starts_with(&tag));
    }
}

#[tokio::test]
async fn nonsense_is_refused_with_the_fields_name() {
    let world = World::new().await;
    let replica = world.replica();
    let _node = world.node(&replica, 4).await;
    let seconds = |seconds| Some(prost_types::Duration { seconds, nanos: 0 });
    let size = |vcpus, memory_bytes, disk_bytes| {
        Some(Resources {
            vcpus,
            memory_bytes,
            disk_bytes,
        })
    };
    let cases = [
        (
            "template",
            CreateSessionRequest {
                template: String::new(),
                ..base()
            },
        ),
        (
            "timeout",
            CreateSessionRequest {
                timeout: seconds(0),
                ..base()
            },
        ),
        (
            "timeout",
            CreateSessionRequest {
                timeout: seconds(-5),
                ..base()
            },
        ),
        (
            "timeout",
            CreateSessionRequest {
                timeout: seconds(365 * 86_400),
                ..base()
            },
        ),
        (
            "metadata",
            CreateSessionRequest {
                metadata: labels([("k", &"x".repeat(1 << 20))]),
                ..base()
            },
        ),
        (
            "env",
            CreateSessionRequest {
                env: labels([("A=B", "")]),
                ..base()
            },
        ),
        (
            "network.egress.allow",
            CreateSessionRequest {
                network: Some(Network {
                    egress: Some(Egress {
                        allow: vec!["10.0.0.1/8".into()],
                        deny: vec![],
                    }),
                    ..Network::default()
                }),
                ..base()
            },
        ),
        (
            "network.egress_bytes_per_second",
            CreateSessionRequest {
                network: Some(Network {
                    egress_bytes_per_second: 1023,
                    ..Network::default()
                }),
                ..base()
            },
        ),
        ("request_id", named("has space")),
        (
            "resources.vcpus",
            CreateSessionRequest {
                resources: size(1000, 0, 0),
                ..base()
            },
        ),
        (
            "resources.memory_bytes",
            CreateSessionRequest {
                resources: size(0, u64::MAX, 0),
                ..base()
            },
        ),
        (
            "resources.disk_bytes",
            CreateSessionRequest {
                resources: size(0, 0, u64::MAX),
                ..base()
            },
        ),
    ];
    for (field, request) in cases {
        let status = assert_refused(
            replica.create(request).await,
            Code::InvalidArgument,
            "INVALID_ARGUMENT",
        );
        let details = status.get_error_details();
        assert_eq!(
            details.bad_request().unwrap().field_violations[0].field,
            field
        );
    }
    let malformed = replica.get("not-an-id").await;
    assert_refused(malformed, Code::InvalidArgument, "SESSION_ID_MALFORMED");
    let unknown = CreateSessionRequest {
        template: "bsae".into(),
        ..base()
    };
    let status = assert_refused(
        replica.create(unknown).await,
        Code::NotFound,
        "TEMPLATE_UNKNOWN",
    );
    assert!(status.message().contains("base"), "{status:?}");
}

#[tokio::test]
async fn listings_are_newest_first_paged_and_filtered() {
    let world = World::new().await;
    let replica = world.replica();
    let _node = world.node(&replica, 50).await;
    let mut ids = Vec::new();
    for n in 0..7 {
        let request = CreateSessionRequest {
            metadata: labels([
                ("n", &n.to_string()),
                ("odd", if n % 2 == 1 { "yes" } else { "no" }),
            ]),
            ..base()
        };
        ids.push(replica.create(request).await.unwrap().session_id);
    }
    ids.reverse();
    let list = |request: ListSessionsRequest| {
        let mut client = replica.sessions();
        async move {
            client
                .list_sessions(red(request))
                .await
                .map(tonic::Response::into_inner)
        }
    };
    let mut seen = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = ListSessionsRequest {
            page_size: 3,
            page_token,
            ..ListSessionsRequest::default()
        };
        let page = list(request).await.unwrap();
        assert!(page.sessions.len() <= 3);
        for session in page.sessions {
            assert_eq!(session.access_token, "", "listings show no secrets");
            seen.push(session.session_id);
        }
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!(seen, ids);

    let odd = ListSessionsRequest {
        metadata: labels([("odd", "yes")]),
        ..ListSessionsRequest::default()
    };
    assert_eq!(list(odd).await.unwrap().sessions.len(), 3);
    let other = ListSessionsRequest {
        template: "other".into(),
        ..ListSessionsRequest::default()
    };
    assert!(list(other).await.unwrap().sessions.is_empty());
    replica.stop_session(&ids[0]).await.unwrap();
    assert_eq!(
        list(ListSessionsRequest::default())
            .await
            .unwrap()
            .sessions
            .len(),
        6
    );
    let stopped = ListSessionsRequest {
        states: vec![SessionState::Stopped.into()],
        ..ListSessionsRequest::default()
    };
    assert_eq!(list(stopped).await.unwrap().sessions[0].session_id, ids[0]);
    for wrong in [
        ListSessionsRequest {
            page_token: "%%%".into(),
            ..ListSessionsRequest::default()
        },
        ListSessionsRequest {
            states: vec![99],
            ..ListSessionsRequest::default()
        },
    ] {
        assert_refused(list(wrong).await, Code::InvalidArgument, "INVALID_ARGUMENT");
    }
}

#[tokio::test]
async fn labels_and_deadline_change_while_it_lives() {
    let world = World::new().await;
    let replica = world.replica();
    let _node = world.node(&replica, 4).await;
    let session = replica.create(base()).await.unwrap();
    let id = session.session_id.clone();
    let update = UpdateSessionRequest {
        session_id: id.clone(),
        update_mask: Some(prost_types::FieldMask {
            paths: vec!["metadata".into()],
        }),
        metadata: labels([("a", "1")]),
        ..UpdateSessionRequest::default()
    };
    replica
        .sessions()
        .update_session(red(update.clone()))
        .await
        .unwrap();
    let extend = |seconds| ExtendSessionRequest {
        session_id: id.clone(),
        timeout: Some(prost_types::Duration { seconds, nanos: 0 }),
    };
    replica
        .sessions()
        .extend_session(red(extend(7200)))
        .await
        .unwrap();
    let now = replica.get(&id).await.unwrap();
    assert_eq!(now.metadata, labels([("a", "1")]));
    let left = now.deadline.unwrap().seconds - session.deadline.unwrap().seconds;
    assert!((6800..=7200).contains(&left), "{left}");
    let too_long = replica.sessions().extend_session(red(extend(90_000))).await;
    assert_refused(too_long, Code::InvalidArgument, "INVALID_ARGUMENT");
    let unknown_field = UpdateSessionRequest {
        update_mask: Some(prost_types::FieldMask {
            paths: vec!["state".into()],
        }),
        ..update.clone()
    };
    let unknown_field = replica.sessions().update_session(red(unknown_field)).await;
    assert_refused(unknown_field, Code::InvalidArgument, "INVALID_ARGUMENT");
    replica.stop_session(&id).await.unwrap();
    let late = replica.sessions().update_session(red(update)).await;
    assert_eq!(
        reason_of(&late.unwrap_err()).as_deref(),
        Some("SESSION_STOPPED")
    );
}

#[tokio::test]
async fn a_deadline_holds_although_all_replicas_were_away_when_it_passed() {
    let world = World::new().await;
    let replica = world.replica();
    let node = world.node(&replica, 4).await;
    let request = CreateSessionRequest {
        timeout: Some(prost_types::Duration {
            seconds: 1,
            nanos: 0,
        }),
        ..base()
    };
    let id = replica.create(request).await.unwrap().session_id;
    replica.stop().await;
    tokio::time::sleep(Duration::from_millis(1200)).await;
    assert_eq!(node.inside().hosted.len(), 1);
    let replica = world.replica();
    let ended = replica.until(&id, SessionState::Stopped).await;
    assert_eq!(ended.end_reason.unwrap().reason, "DEADLINE_EXPIRED");
    assert!(node.inside().hosted.is_empty());
    let request = ListSessionEventsRequest {
        session_id: id,
        ..ListSessionEventsRequest::default()
    };
    let events = replica.sessions().list_session_events(red(request)).await;
    let events = events.unwrap().into_inner().events;
    assert!(
        events
            .iter()
            .any(|event| event.r#type == "STOPPING" && event.actor == "deadline")
    );
}
