//! What others bring: grpcurl with reflection, gRPC-Web, traces and metrics. Every service in a process of its own.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use bytes::{BufMut as _, Bytes, BytesMut};
use e2e::{Collector, Mesh, http};
use prost::Message as _;
use proto::session::v1::{GetSessionRequest, GetSessionResponse};
use serde_json::{Value, json};
use service_kit::config::tools_folder;

/// Spans are sent in batches, every five seconds unless said otherwise.
const TRACE_LIMIT: Duration = Duration::from_secs(30);

fn grpcurl() -> PathBuf {
    let path = tools_folder().join("bin/grpcurl");
    assert!(
        path.exists(),
        "no {}: run ./deploy/install test",
        path.display()
    );
    path
}

/// Runs grpcurl through Envoy; its standard output.
fn call(mesh: &Mesh, headers: &[String], data: &Value, method: &str) -> String {
    let mut command = Command::new(grpcurl());
    command.arg("-plaintext");
    for header in headers {
        command.args(["-H", header]);
    }
    if !data.is_null() {
        command.args(["-d", &data.to_string()]);
    }
    let output = command
        .arg(mesh.edge())
        .arg(method)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "grpcurl {method}: {said}");
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn grpcurl_grpc_web_traces_and_metrics() {
    let collector = Collector::start().await;
    let mesh = Mesh::start(&["--separate", "--otlp", &collector.address().to_string()]);
    let key = format!("authorization: Bearer {}", mesh.api_key());

    // Reflection through Envoy, of the API and of a sandbox.
    let services = call(&mesh, &[], &Value::Null, "list");
    for service in [
        "sandmesh.session.v1.SessionService",
        "sandmesh.template.v1.TemplateService",
        "sandmesh.envd.v1.ProcessService",
        "grpc.health.v1.Health",
    ] {
        assert!(services.lines().any(|line| line == service), "{services}");
    }
    assert!(
        !["NodeService", "KeyService", "ArtifactService"]
            .iter()
            .any(|internal| services.contains(internal)),
        "{services}"
    );
    let health = call(&mesh, &[], &json!({}), "grpc.health.v1.Health/Check");
    assert!(health.contains("SERVING"), "{health}");
    let create = json!({
        "template": "base",
        "timeout": "600s",
        "resources": {"vcpus": 1, "memoryBytes": "134217728", "diskBytes": "268435456"},
    });
    let created = call(
        &mesh,
        std::slice::from_ref(&key),
        &create,
        "sandmesh.session.v1.SessionService/CreateSession",
    );
    let created: Value = serde_json::from_str(&created).unwrap();
    let session = &created["session"];
    assert_eq!(session["state"], "SESSION_STATE_RUNNING");
    let id = session["sessionId"].as_str().unwrap();
    let inside = [
        format!("x-session-id: {id}"),
        format!(
            "authorization: Bearer {}",
            session["accessToken"].as_str().unwrap()
        ),
    ];
    let services = call(&mesh, &inside, &Value::Null, "list");
    assert!(
        services.contains("sandmesh.envd.v1.FilesystemService"),
        "{services}"
    );
    let start = json!({"argv": ["sh", "-c", "echo from a microVM"]});
    let stream = call(
        &mesh,
        &inside,
        &start,
        "sandmesh.envd.v1.ProcessService/Start",
    );
    let events: Vec<Value> = serde_json::Deserializer::from_str(&stream)
        .into_iter()
        .collect::<Result<_, _>>()
        .unwrap();
    assert!(events[0]["event"]["started"]["pid"].is_number(), "{stream}");
    // "from a microVM\n" in base64, as protobuf's JSON form has bytes.
    assert_eq!(events[1]["event"]["output"]["data"], "ZnJvbSBhIG1pY3JvVk0K");
    assert!(
        events.last().unwrap()["event"]["exited"].is_object(),
        "{stream}"
    );

    // A browser's way: gRPC-Web over HTTP/1.1.
    let get = GetSessionRequest {
        session_id: id.into(),
    };
    let answer = grpc_web(
        &mesh,
        "/sandmesh.session.v1.SessionService/GetSession",
        &get,
    )
    .await;
    let (message, trailers) = answer;
    let got = GetSessionResponse::decode(message).unwrap();
    assert_eq!(got.session.unwrap().session_id, id);
    assert!(trailers.contains("grpc-status:0"), "{trailers}");

    // One trace from Envoy to the guest, for a create and for a stream.
    let create = [
        ("envoy", ""),
        (
            "api-gateway",
            "sandmesh.session.v1.SessionService/CreateSession",
        ),
        (
            "session-svc",
            "sandmesh.session.v1.SessionService/CreateSession",
        ),
        ("node-svc", "sandmesh.node.v1.NodeService/StartSession"),
        ("envd", "sandmesh.envd.v1.SystemService/Configure"),
    ];
    let stream = [
        ("envoy", ""),
        ("node-svc", "ingress stream"),
        ("envd", "sandmesh.envd.v1.ProcessService/Start"),
    ];
    let end = Instant::now() + TRACE_LIMIT;
    for wanted in [&create[..], &stream[..]] {
        loop {
            let traces = collector.traces();
            let whole = traces.values().any(|spans| {
                wanted.iter().all(|(service, name)| {
                    spans
                        .iter()
                        .any(|(s, n)| s == service && (name.is_empty() || n == name))
                })
            });
            if whole {
                break;
            }
            assert!(
                Instant::now() < end,
                "no trace spans {wanted:?}: {traces:#?}"
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    // Rate, errors and duration per method, of every service.
    for (part, method) in [
        (
            "gateway",
            "sandmesh.session.v1.SessionService/CreateSession",
        ),
        (
            "session",
            "sandmesh.node.v1.NodeRegistryService/RegisterNode",
        ),
        (
            "template",
            "sandmesh.template.v1.TemplateService/GetTemplate",
        ),
        ("node", "sandmesh.node.v1.NodeService/StartSession"),
    ] {
        let metrics = mesh.metrics(part).await;
        let count = format!("method=\"{method}\",code=\"Ok\"");
        assert!(metrics.contains(&count), "{part}: {metrics}");
        let duration = format!(
            "sandmesh_grpc_request_seconds_count{{service=\"{}\"",
            service(part)
        );
        assert!(metrics.contains(&duration), "{part}: {metrics}");
        assert!(!metrics.contains(id), "no ID is a label");
    }
}

fn service(part: &str) -> String {
    match part {
        "gateway" => "api-gateway".into(),
        other => format!("{other}-svc"),
    }
}

/// A unary call as gRPC-Web frames it: message, then trailers as text.
async fn grpc_web(mesh: &Mesh, path: &str, message: &impl prost::Message) -> (Bytes, String) {
    let mut body = BytesMut::new();
    body.put_u8(0);
    body.put_u32(u32::try_from(message.encoded_len()).unwrap());
    message.encode(&mut body).unwrap();
    let key = format!("Bearer {}", mesh.api_key());
    let headers = [
        ("content-type", "application/grpc-web+proto"),
        ("x-grpc-web", "1"),
        ("authorization", key.as_str()),
    ];
    let answer = http::post(
        mesh.edge(),
        mesh.edge(),
        path,
        &headers,
        http::whole(body.freeze()),
    )
    .await;
    assert_eq!(answer.status, 200);
    let mut frames = answer.body;
    let (mut data, mut trailers) = (Bytes::new(), String::new());
    while !frames.is_empty() {
        let head = frames.split_to(5);
        let size = u32::from_be_bytes(head[1..].try_into().unwrap());
        let payload = frames.split_to(size as usize);
        if head[0] & 0x80 == 0 {
            data = payload;
        } else {
            trailers = String::from_utf8_lossy(&payload).replace(": ", ":");
        }
    }
    (data, trailers)
}
