//! Every row of the table of answers, over HTTP and gRPC, with two real nodes: which of them a call reaches first does not matter.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    fs::File,
    time::{Duration, Instant},
};

use e2e::{Mesh, Part, guest, http, small, wait_for};
use futures::{SinkExt as _, StreamExt as _};
use nix::{
    fcntl::{Flock, FlockArg},
    sys::signal::Signal,
};
use proto::{
    envd::v1::ShutdownRequest,
    node::v1::{StartSessionRequest, node_service_client::NodeServiceClient},
    session::v1::{Network, PortAccess, Session, SessionState},
    template::v1::GetTemplateRequest,
};
use redis::aio::MultiplexedConnection;
use sdk::NewSession;
use serde::Deserialize;
use serde_json::json;
use service_kit::{
    ids::{HomeTag, SessionId},
    mesh::{self, MeshToken},
};
use sha2::{Digest as _, Sha256};
use tokio_tungstenite::tungstenite::{Message, client::IntoClientRequest as _};
use tonic::Code;

const UNKNOWN: &str = "aaaaabbbbbbbbbbbbbbbbbbbb";

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Node {
    #[serde(rename = "nodeId")]
    id: String,
    home_tag: String,
    ingress_address: String,
    internal_address: String,
}

#[derive(Debug, Deserialize)]
struct Nodes {
    nodes: Vec<Node>,
}

fn nodes(mesh: &Mesh) -> Vec<Node> {
    let list = mesh.run(&["node", "list", "-o", "json"]).stdout;
    serde_json::from_slice::<Nodes>(&list).unwrap().nodes
}

fn part_of(mesh: &Mesh, node: &Node) -> Part {
    let mut parts = mesh.parts().into_iter();
    parts
        .find(|part| part.address == node.ingress_address)
        .unwrap()
}

fn host(session: &Session, port: u16) -> String {
    session.host.replace("{port}", &port.to_string())
}

async fn grpc(mesh: &Mesh, session: &Session) -> (Code, String) {
    let info = mesh.client().sandbox(session).unwrap().info().await;
    let error = info.expect_err("it must be refused");
    (error.code().unwrap(), error.reason().unwrap_or_default())
}

async fn redis(mesh: &Mesh) -> MultiplexedConnection {
    let url = format!("redis+unix://{}/run/redis.sock", mesh.state().display());
    let client = redis::Client::open(url).unwrap();
    client.get_multiplexed_async_connection().await.unwrap()
}

async fn set_catalog(redis: &mut MultiplexedConnection, id: &str, node: &str, state: SessionState) {
    let entry = json!({"nodeId": node, "state": i32::from(state), "version": 1_000_000});
    let key = format!("sandmesh:session:{id}");
    redis::cmd("SET")
        .arg(key)
        .arg(entry.to_string())
        .query_async::<()>(redis)
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn every_situation_has_its_answer() {
    // Everything apart: 1 gateway, 2 session-svc, 1 template-svc, 2 nodes, 1 Envoy.
    let options = [
        "--separate",
        "--nodes",
        "2",
        "--session-replicas",
        "2",
        "--node-dead-after",
        "4s",
    ];
    let mesh = Mesh::start(&options);
    let session = mesh.session().await;
    malformed_and_unknown(&mesh, &session).await;
    closed_ports(&mesh, &session).await;
    tokens(&mesh, &session).await;
    states_of_the_catalog(&mesh, &session).await;
    a_session_that_moved(&mesh, &session).await;
    the_catalog_emptied(&mesh, &session).await;
    a_node_that_restarts(&mesh).await;
    a_node_that_is_gone(&mesh).await;
}

async fn malformed_and_unknown(mesh: &Mesh, session: &Session) {
    let other = |id: &str| Session {
        session_id: id.into(),
        ..session.clone()
    };
    for name in [
        "8000-nonsense.sandmesh.localhost",
        "nonsense.sandmesh.localhost",
        &format!("8000-{}.more.sandmesh.localhost", session.session_id),
        &format!("8000-{}x.sandmesh.localhost", session.session_id),
    ] {
        let answer = http::get(mesh.edge(), name, "/", &[]).await;
        assert_eq!(
            answer.refusal(),
            (400, "SESSION_ID_MALFORMED".into()),
            "{name}"
        );
    }
    assert_eq!(
        grpc(mesh, &other("nonsense")).await,
        (Code::InvalidArgument, "SESSION_ID_MALFORMED".into())
    );
    for port in ["0", "65536"] {
        let name = format!("{port}-{}.sandmesh.localhost", session.session_id);
        let answer = http::get(mesh.edge(), &name, "/", &[]).await;
        assert_eq!(answer.refusal(), (400, "PORT_INVALID".into()));
    }
    let answer = http::get(
        mesh.edge(),
        &format!("1-{UNKNOWN}.sandmesh.localhost"),
        "/",
        &[],
    )
    .await;
    assert_eq!(answer.refusal(), (404, "SESSION_UNKNOWN".into()));
    assert_eq!(
        grpc(mesh, &other(UNKNOWN)).await,
        (Code::NotFound, "SESSION_UNKNOWN".into())
    );
    // A tag that is a node's, and an ID that is nobody's: that node says so.
    let tag = session.session_id.get(..5).unwrap();
    let nobody = format!("{tag}{}", UNKNOWN.get(5..).unwrap());
    let answer = http::get(
        mesh.edge(),
        &format!("1-{nobody}.sandmesh.localhost"),
        "/",
        &[],
    )
    .await;
    assert_eq!(answer.refusal(), (404, "SESSION_UNKNOWN".into()));
}

async fn closed_ports(mesh: &Mesh, session: &Session) {
    let closed = http::get(mesh.edge(), &host(session, 9), "/", &[]).await;
    assert_eq!(closed.refusal(), (502, "PORT_CLOSED".into()));
    let body = closed.json();
    assert_eq!(
        (body["port"].as_u64(), body["sessionId"].as_str()),
        (Some(9), Some(session.session_id.as_str()))
    );
    assert_eq!(
        body["requestId"].as_str(),
        closed.headers["x-request-id"].to_str().ok()
    );
    let browser = [("accept", "text/html")];
    let page = http::get(mesh.edge(), &host(session, 9), "/", &browser).await;
    assert!(String::from_utf8_lossy(&page.body).contains("<code>PORT_CLOSED</code>"));
}

async fn tokens(mesh: &Mesh, session: &Session) {
    let wrong = Session {
        access_token: "sst_wrong".into(),
        ..session.clone()
    };
    assert_eq!(
        grpc(mesh, &wrong).await,
        (Code::PermissionDenied, "ACCESS_TOKEN_INVALID".into())
    );
    let network = Some(Network {
        port_access: PortAccess::Token.into(),
        ..Network::default()
    });
    let protected = mesh
        .client()
        .create(NewSession { network, ..small() })
        .await
        .unwrap();
    let name = host(&protected, 9);
    let answer = http::get(mesh.edge(), &name, "/", &[]).await;
    assert_eq!(answer.refusal(), (401, "CREDENTIALS_MISSING".into()));
    for (token, answer) in [
        ("sst_wrong", (403, "ACCESS_TOKEN_INVALID")),
        // Another session's token opens nothing.
        (session.access_token.as_str(), (403, "ACCESS_TOKEN_INVALID")),
        (protected.access_token.as_str(), (502, "PORT_CLOSED")),
    ] {
        let header = [("x-sandmesh-token", token)];
        let (status, reason) = http::get(mesh.edge(), &name, "/", &header).await.refusal();
        assert_eq!((status, reason.as_str()), answer);
    }
    let by_address = format!("/path?a=1&sandmesh_token={}", protected.access_token);
    let cookie = http::get(mesh.edge(), &name, &by_address, &[]).await;
    assert_eq!(cookie.status, 303);
    assert_eq!(cookie.headers["location"], "/path?a=1");
    mesh.client().stop(&protected.session_id).await.unwrap();

    // Only a node calls what only a node may call.
    let sandbox = mesh.client().sandbox(session).unwrap();
    let denied = sandbox
        .system()
        .shutdown(ShutdownRequest::default())
        .await
        .unwrap_err();
    assert_eq!(denied.code(), Code::PermissionDenied);
}

/// What any node says of sessions it has only heard of.
async fn states_of_the_catalog(mesh: &Mesh, session: &Session) {
    let mut redis = redis(mesh).await;
    let id = SessionId::random(&HomeTag::random()).to_string();
    let heard_of = Session {
        session_id: id.clone(),
        ..session.clone()
    };
    let name = format!("1-{id}.sandmesh.localhost");
    for (state, http_status, code, reason) in [
        (
            SessionState::Paused,
            409,
            Code::FailedPrecondition,
            "SESSION_PAUSED",
        ),
        (
            SessionState::Stopped,
            404,
            Code::NotFound,
            "SESSION_STOPPED",
        ),
        (SessionState::Failed, 404, Code::NotFound, "SESSION_FAILED"),
        (SessionState::Lost, 410, Code::NotFound, "SESSION_LOST"),
    ] {
        set_catalog(&mut redis, &id, &session.node_id, state).await;
        let answer = http::get(mesh.edge(), &name, "/", &[]).await;
        assert_eq!(answer.refusal(), (http_status, reason.into()));
        assert_eq!(grpc(mesh, &heard_of).await, (code, reason.into()));
    }
}

/// A session that is not on the node its ID names is found by the catalog and reached by way of that node.
async fn a_session_that_moved(mesh: &Mesh, session: &Session) {
    let nodes = nodes(mesh);
    let (home, away) = match nodes.as_slice() {
        [one, two] if one.id == session.node_id => (two, one),
        [one, two] => (one, two),
        other => panic!("{other:?}"),
    };
    let id = SessionId::random(&HomeTag::parse(&home.home_tag).unwrap());
    // As if it had moved: its row, its microVM and the catalog all say `away`, its ID says `home`.
    let script = format!(
        "set search_path = sandmesh_session; \
         create temp table moved as select * from sessions where session_id = '{}'; \
         update moved set session_id = '{id}', node_id = '{}'; \
         insert into sessions select * from moved",
        session.session_id, away.id
    );
    mesh.postgres(
        "psql",
        &["-v", "ON_ERROR_STOP=1", "-qXc", &script, "postgres"],
    );
    let moved = mesh.client().get(id.as_str()).await.unwrap();
    let get = GetTemplateRequest {
        template: "base".into(),
        ..GetTemplateRequest::default()
    };
    let template = mesh
        .client()
        .templates()
        .get_template(get)
        .await
        .unwrap()
        .into_inner()
        .template;
    let token = MeshToken::load(&mesh.state().join("mesh.token")).unwrap();
    let channel = mesh::connect(&[away.internal_address.parse().unwrap()], &token);
    let start = StartSessionRequest {
        session_id: id.to_string(),
        template,
        resources: moved.resources,
        network: moved.network.clone(),
        env: [].into(),
        access_token_sha256: Sha256::digest(&moved.access_token).to_vec(),
        team_id: "default".into(),
        wake_on_request: false,
    };
    NodeServiceClient::new(channel)
        .start_session(start)
        .await
        .unwrap();
    set_catalog(
        &mut redis(mesh).await,
        id.as_str(),
        &away.id,
        SessionState::Running,
    )
    .await;

    let sandbox = mesh.client().sandbox(&moved).unwrap();
    assert_eq!(
        sandbox.run(["echo", "moved"]).await.unwrap().stdout,
        b"moved\n"
    );
    let closed = http::get(mesh.edge(), &host(&moved, 9), "/", &[]).await;
    assert_eq!(closed.refusal(), (502, "PORT_CLOSED".into()));
    guest::upload(&sandbox, env!("CARGO_BIN_EXE_guest-server")).await;
    guest::serve(&sandbox, "0.0.0.0:8000").await;
    let seen = http::get_when_open(mesh.edge(), &host(&moved, 8000), "/headers").await;
    let seen = String::from_utf8_lossy(&seen.body).to_lowercase();
    let authority = format!("host: {}", host(&moved, 8000));
    assert!(
        seen.contains(&authority) && !seen.contains("x-sandmesh") && !seen.contains("x-session"),
        "{seen}"
    );
    let mut request = format!("ws://{}/ws", mesh.edge())
        .into_client_request()
        .unwrap();
    request
        .headers_mut()
        .insert("host", host(&moved, 8000).parse().unwrap());
    let (mut socket, _) = tokio_tungstenite::connect_async(request).await.unwrap();
    socket
        .send(Message::text("through two nodes"))
        .await
        .unwrap();
    assert_eq!(
        socket.next().await.unwrap().unwrap(),
        Message::text("through two nodes")
    );
    mesh.client().stop(id.as_str()).await.unwrap();
    assert_eq!(
        grpc(mesh, &moved).await,
        (Code::NotFound, "SESSION_STOPPED".into())
    );
}

/// Redis emptied: rebuilt from Postgres, and nothing is routed wrongly meanwhile.
async fn the_catalog_emptied(mesh: &Mesh, session: &Session) {
    let mut redis = redis(mesh).await;
    redis::cmd("FLUSHALL")
        .query_async::<()>(&mut redis)
        .await
        .unwrap();
    assert!(
        mesh.client().sandbox(session).unwrap().info().await.is_ok(),
        "the home node needs no catalog"
    );
    let mut seen = Vec::new();
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        let name = format!("1-{UNKNOWN}.sandmesh.localhost");
        let (status, reason) = http::get(mesh.edge(), &name, "/", &[]).await.refusal();
        seen.push((status, reason.clone()));
        match (status, reason.as_str()) {
            (404, "SESSION_UNKNOWN") => break,
            (503, "CATALOG_UNAVAILABLE") => {
                assert!(Instant::now() < end, "it is not rebuilt: {seen:?}");
            }
            _ => panic!("{seen:?}"),
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
}

/// Killed together with its VMMs, and started again: unreachable, then lost; never unknown, and nobody else's.
async fn a_node_that_restarts(mesh: &Mesh) {
    let session = mesh.session().await;
    let node = nodes(mesh)
        .into_iter()
        .find(|node| node.id == session.node_id)
        .unwrap();
    let part = part_of(mesh, &node);
    kill(&part);
    mesh.kill_vmm(&session);
    let seen = until_lost(mesh, &session).await;
    assert!(
        seen.iter()
            .all(|reason| matches!(reason.as_str(), "NODE_UNREACHABLE" | "SESSION_LOST")),
        "{seen:?}"
    );
    assert_eq!(
        grpc(mesh, &session).await,
        (Code::NotFound, "SESSION_LOST".into())
    );
    wait_for(
        "the session is noted as lost",
        Duration::from_secs(20),
        || {
            let known = tokio::task::block_in_place(|| {
                tokio::runtime::Handle::current().block_on(mesh.client().get(&session.session_id))
            });
            known.unwrap().state() == SessionState::Lost
        },
    );
    let known = mesh.client().get(&session.session_id).await.unwrap();
    assert_eq!(known.end_reason.unwrap().reason, "NODE_RESTARTED");
}

/// Killed for good: unreachable, as Envoy says by itself; declared dead, lost, as any other node says.
async fn a_node_that_is_gone(mesh: &Mesh) {
    let session = mesh.session().await;
    let node = nodes(mesh)
        .into_iter()
        .find(|node| node.id == session.node_id)
        .unwrap();
    let part = part_of(mesh, &node);
    kill(&part);
    // Whoever holds its lock keeps it from starting again.
    let lock = File::open(mesh.state().join(&part.name).join("lock")).unwrap();
    let lock = Flock::lock(lock, FlockArg::LockExclusive)
        .map_err(|(_, errno)| errno)
        .unwrap();
    let answer = http::get(mesh.edge(), &host(&session, 9), "/", &[]).await;
    assert_eq!(answer.refusal(), (503, "NODE_UNREACHABLE".into()));
    assert_eq!(answer.headers["retry-after"], "1");
    assert_eq!(
        grpc(mesh, &session).await,
        (Code::Unavailable, "NODE_UNREACHABLE".into())
    );
    let seen = until_lost(mesh, &session).await;
    assert_eq!(seen, ["NODE_UNREACHABLE", "SESSION_LOST"]);
    assert_eq!(
        grpc(mesh, &session).await,
        (Code::NotFound, "SESSION_LOST".into())
    );
    let known = mesh.client().get(&session.session_id).await.unwrap();
    assert_eq!(known.end_reason.unwrap().reason, "NODE_DEAD");
    // The other node takes what comes.
    let other = mesh.session().await;
    assert_ne!(other.node_id, session.node_id);
    assert!(mesh.client().sandbox(&other).unwrap().info().await.is_ok());
    drop(lock);
    wait_for("the node is back", Duration::from_secs(30), || {
        nodes(mesh)
            .iter()
            .any(|known| known.id == node.id && known.home_tag == node.home_tag)
    });
}

fn kill(part: &Part) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(part.pid), Signal::SIGKILL).unwrap();
}

/// The answers, each once, until one says that the session is lost.
async fn until_lost(mesh: &Mesh, session: &Session) -> Vec<String> {
    let mut seen = Vec::new();
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        let (status, reason) = http::get(mesh.edge(), &host(session, 9), "/", &[])
            .await
            .refusal();
        if seen.last() != Some(&reason) {
            seen.push(reason.clone());
        }
        if (status, reason.as_str()) == (410, "SESSION_LOST") {
            return seen;
        }
        assert!(Instant::now() < end, "{seen:?}");
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
}
