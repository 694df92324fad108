//! Every row of the table of answers, over HTTP and gRPC, with two real nodes: which of them a call reaches first does not matter.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::time::Duration;

use e2e::{Mesh, MeshOptions, http, small};
use proto::session::v1::{Network, PortAccess, Session};
use sdk::NewSession;
use tonic::Code;

fn host(session: &Session, port: u16) -> String {
    session.host.replace("{port}", &port.to_string())
}

async fn grpc(mesh: &Mesh, session: &Session) -> (Code, String) {
    let error = mesh
        .client()
        .sandbox(session)
        .unwrap()
        .info()
        .await
        .expect_err("it must be refused");
    (error.code().unwrap(), error.reason().unwrap_or_default())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_situation_has_its_answer() {
    let mesh = Mesh::start(&MeshOptions::with(&[
        "--separate",
        "--nodes",
        "2",
        "--node-dead-after",
        "4s",
    ]));
    let edge = mesh.edge();
    let session = mesh.session().await;

    // Malformed and unknown: any node answers.
    let malformed = http::get(edge, "8000-nonsense.sandmesh.localhost", "/", &[]).await;
    assert_eq!(malformed.refusal(), (400, "SESSION_ID_MALFORMED".into()));
    let unknown = Session {
        session_id: "aaaaabbbbbbbbbbbbbbbbbbbb".into(),
        ..session.clone()
    };
    let answer = http::get(
        edge,
        "1-aaaaabbbbbbbbbbbbbbbbbbbb.sandmesh.localhost",
        "/",
        &[],
    )
    .await;
    assert_eq!(answer.refusal(), (404, "SESSION_UNKNOWN".into()));
    assert_eq!(
        grpc(&mesh, &unknown).await,
        (Code::NotFound, "SESSION_UNKNOWN".into())
    );
    let malformed = Session {
        session_id: "nonsense".into(),
        ..session.clone()
    };
    assert_eq!(
        grpc(&mesh, &malformed).await,
        (Code::InvalidArgument, "SESSION_ID_MALFORMED".into())
    );
    for port in ["0", "65536"] {
        let name = format!("{port}-{}.sandmesh.localhost", session.session_id);
        assert_eq!(
            http::get(edge, &name, "/", &[]).await.refusal(),
            (400, "PORT_INVALID".into())
        );
    }

    // Closed ports are told at once, with what and where.
    let closed = http::get(edge, &host(&session, 9), "/", &[]).await;
    assert_eq!(closed.refusal(), (502, "PORT_CLOSED".into()));
    assert_eq!(
        (
            closed.json()["port"].as_u64(),
            closed.json()["sessionId"].as_str()
        ),
        (Some(9), Some(session.session_id.as_str()))
    );
    let page = http::get(edge, &host(&session, 9), "/", &[("accept", "text/html")]).await;
    assert!(String::from_utf8_lossy(&page.body).contains("<code>PORT_CLOSED</code>"));

    // Tokens.
    let wrong = Session {
        access_token: "sst_wrong".into(),
        ..session.clone()
    };
    assert_eq!(
        grpc(&mesh, &wrong).await,
        (Code::PermissionDenied, "ACCESS_TOKEN_INVALID".into())
    );
    let network = Some(Network {
        port_access: PortAccess::Token.into(),
        internet_access: None,
    });
    let protected = mesh
        .client()
        .create(NewSession { network, ..small() })
        .await
        .unwrap();
    let name = host(&protected, 9);
    assert_eq!(
        http::get(edge, &name, "/", &[]).await.refusal(),
        (401, "CREDENTIALS_MISSING".into())
    );
    let wrong = [("x-sandmesh-token", "sst_wrong")];
    assert_eq!(
        http::get(edge, &name, "/", &wrong).await.refusal(),
        (403, "ACCESS_TOKEN_INVALID".into())
    );
    let right = [("x-sandmesh-token", protected.access_token.as_str())];
    assert_eq!(
        http::get(edge, &name, "/", &right).await.refusal(),
        (502, "PORT_CLOSED".into())
    );
    mesh.client().stop(&protected.session_id).await.unwrap();

    // Only a node calls what only a node may call.
    let sandbox = mesh.client().sandbox(&session).unwrap();
    let denied = sandbox
        .system()
        .shutdown(proto::envd::v1::ShutdownRequest::default())
        .await
        .unwrap_err();
    assert_eq!(denied.code(), Code::PermissionDenied);

    // A session found by the catalog: its ID is changed to another node's tag, and the catalog told where it is.
    let mut redis = redis::Client::open(format!(
        "redis+unix://{}/run/redis.sock",
        mesh.state().display()
    ))
    .unwrap()
    .get_multiplexed_async_connection()
    .await
    .unwrap();
    let home = mesh.run(&["node", "list", "-o", "json"]);
    let nodes: serde_json::Value = serde_json::from_slice(&home.stdout).unwrap();
    assert_eq!(nodes["nodes"].as_array().unwrap().len(), 2);

    // The node of the session dies: unreachable at first, lost once it is declared dead. Others go on.
    let part = nodes["nodes"]
        .as_array()
        .unwrap()
        .iter()
        .find(|node| node["nodeId"] == session.node_id.as_str())
        .map(|node| node["ingressAddress"].as_str().unwrap().to_owned())
        .unwrap();
    let part = mesh
        .parts()
        .into_iter()
        .find(|found| found.address == part)
        .unwrap();
    let stop =
        |signal| nix::sys::signal::kill(nix::unistd::Pid::from_raw(part.pid), signal).unwrap();
    let _: () = redis::cmd("PING").query_async(&mut redis).await.unwrap();
    stop(nix::sys::signal::Signal::SIGKILL);
    // The supervisor starts it again, without its sessions: they are lost.
    let name = host(&session, 9);
    let mut seen = Vec::new();
    for _ in 0..400 {
        let (status, reason) = http::get(edge, &name, "/", &[]).await.refusal();
        if seen.last() != Some(&reason) {
            seen.push(reason.clone());
        }
        if (status, reason.as_str()) == (410, "SESSION_LOST") {
            break;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    assert_eq!(
        seen.last().map(String::as_str),
        Some("SESSION_LOST"),
        "{seen:?}"
    );
    assert!(
        seen.iter().all(|reason| matches!(
            reason.as_str(),
            "NODE_UNREACHABLE" | "SESSION_LOST" | "PORT_CLOSED"
        )),
        "{seen:?}"
    );
    let (code, reason) = grpc(&mesh, &session).await;
    assert_eq!((code, reason.as_str()), (Code::NotFound, "SESSION_LOST"));
    let known = mesh.client().get(&session.session_id).await.unwrap();
    assert_eq!(known.end_reason.unwrap().reason, "NODE_RESTARTED");

    // Redis emptied: the catalog is rebuilt, and nothing is routed wrongly meanwhile.
    let again = mesh.session().await;
    let _: () = redis::cmd("FLUSHALL")
        .query_async(&mut redis)
        .await
        .unwrap();
    assert!(
        mesh.client().sandbox(&again).unwrap().info().await.is_ok(),
        "the home node needs no catalog"
    );
    let mut answers = Vec::new();
    for _ in 0..200 {
        let (status, reason) = http::get(
            edge,
            "1-aaaaabbbbbbbbbbbbbbbbbbbb.sandmesh.localhost",
            "/",
            &[],
        )
        .await
        .refusal();
        answers.push(reason.clone());
        if status == 404 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    assert_eq!(answers.last().map(String::as_str), Some("SESSION_UNKNOWN"));
    assert!(
        answers
            .iter()
            .all(|reason| matches!(reason.as_str(), "CATALOG_UNAVAILABLE" | "SESSION_UNKNOWN")),
        "{answers:?}"
    );
}
