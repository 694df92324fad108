//! Whose guest it is: closed until Configure, then one session's.

use futures::stream;
use proto::envd::v1::{
    AttachRequest, CloseInputRequest, ConfigureRequest, FilesystemServiceListRequest,
    FilesystemServiceWatchRequest, ForwardRequest, GetInfoRequest, GuestInfo, MakeDirectoryRequest,
    MoveRequest, PortServiceListRequest, PortServiceWatchRequest, ProcessServiceListRequest,
    ReadRequest, RemoveRequest, ResizeRequest, SendInputRequest, ShutdownRequest, SignalRequest,
    StatRequest, StreamLogsRequest, StreamMetricsRequest, WaitForPortRequest, WaitRequest,
    WriteRequest,
};
use tonic::{Code, Status};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use crate::world::{SESSION, World, argv, configuration, field, origin, sh, soon, until, why};

async fn info(world: &World) -> GuestInfo {
    let answer = soon(world.system().get_info(GetInfoRequest {})).await;
    answer.unwrap().into_inner().info.unwrap()
}

fn is_closed(what: &str, status: Option<Status>) {
    let status = status.unwrap_or_else(|| panic!("{what} was answered"));
    assert_eq!(
        why(&status),
        (Code::FailedPrecondition, "GUEST_NOT_CONFIGURED".into()),
        "{what}"
    );
}

macro_rules! refused {
    ($client:expr, $($method:ident($request:expr)),+ $(,)?) => {
        $(is_closed(stringify!($method), soon($client.$method($request)).await.err());)+
    };
}

#[tokio::test]
async fn nothing_of_processes_files_ports_use_or_logs_is_answered_before_configure() {
    let world = World::closed().await;
    let path = world.text("open/there");
    let make = MakeDirectoryRequest {
        path: path.clone(),
        ..Default::default()
    };
    refused!(
        world.processes(),
        start(sh(&format!("mkdir {path}"))),
        attach(AttachRequest::default()),
        send_input(SendInputRequest::default()),
        close_input(CloseInputRequest::default()),
        resize(ResizeRequest::default()),
        signal(SignalRequest::default()),
        list(ProcessServiceListRequest::default()),
        wait(WaitRequest::default()),
    );
    refused!(
        world.files(),
        stat(StatRequest::default()),
        list(FilesystemServiceListRequest::default()),
        make_directory(make),
        r#move(MoveRequest::default()),
        remove(RemoveRequest::default()),
        read(ReadRequest::default()),
        write(stream::iter([WriteRequest::default()])),
        watch(FilesystemServiceWatchRequest::default()),
    );
    refused!(
        world.ports(),
        list(PortServiceListRequest::default()),
        watch(PortServiceWatchRequest::default()),
        wait_for_port(WaitForPortRequest::default()),
        forward(stream::iter([ForwardRequest::default()])),
    );
    refused!(
        world.system(),
        stream_metrics(StreamMetricsRequest::default()),
        stream_logs(StreamLogsRequest::default()),
    );
    assert!(!world.path("open/there").exists());
}

#[tokio::test]
async fn health_and_reflection_are_answered_before_configure() {
    let world = World::closed().await;
    let mut health = HealthClient::with_origin(world.channel(), origin());
    let answer = soon(health.check(HealthCheckRequest::default())).await;
    assert_eq!(answer.unwrap().into_inner().status, 1, "SERVING");
    let services = reflected(&world).await;
    for service in ["Process", "Filesystem", "Port", "System"] {
        let name = format!("sandmesh.envd.v1.{service}Service");
        assert!(services.contains(&name), "{services:?}");
    }
    assert!(
        !services.iter().any(|name| name.contains("node")),
        "a guest does not know what is behind the node: {services:?}"
    );
    assert_eq!(info(&world).await.session_id, "");
}

async fn reflected(world: &World) -> Vec<String> {
    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    };
    let mut reflection = ServerReflectionClient::with_origin(world.channel(), origin());
    let asked = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let answers = soon(reflection.server_reflection_info(stream::iter([asked]))).await;
    let answer = soon(answers.unwrap().into_inner().message()).await;
    match answer.unwrap().unwrap().message_response.unwrap() {
        MessageResponse::ListServicesResponse(list) => list
            .service
            .into_iter()
            .map(|service| service.name)
            .collect(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_bad_configure_names_its_field_and_leaves_the_guest_closed() {
    let world = World::closed().await;
    let good = configuration();
    let with = |change: fn(&mut ConfigureRequest)| {
        let mut request = good.clone();
        change(&mut request);
        request
    };
    for (named, request) in [
        ("session_id", with(|r| r.session_id.clear())),
        ("hostname", with(|r| r.hostname.clear())),
        ("hostname", with(|r| r.hostname = "a".repeat(64))),
        ("hostname", with(|r| r.hostname = "a b".into())),
        (
            "hostname",
            with(|r| r.hostname = "a\n127.0.0.1 evil".into()),
        ),
        ("entropy", with(|r| r.entropy.truncate(31))),
        ("entropy", with(|r| r.entropy.resize(513, 0))),
        ("machine_id", with(|r| r.machine_id.truncate(15))),
        ("machine_id", with(|r| r.machine_id.push(0))),
        ("time", with(|r| r.time = None)),
        ("network", with(|r| r.network = None)),
        (
            "env",
            with(|r| drop(r.env.insert("A=B".into(), String::new()))),
        ),
        (
            "env",
            with(|r| drop(r.env.insert(String::new(), String::new()))),
        ),
        ("env", with(|r| drop(r.env.insert("A".into(), "\0".into())))),
        (
            "default_user",
            with(|r| r.default_user = "no-such-user".into()),
        ),
    ] {
        let status = soon(world.system().configure(request.clone()))
            .await
            .expect_err(named);
        assert_eq!(field(&status), named, "{request:?}");
    }
    refused!(world.processes(), start(argv(&["true"])));
    assert_eq!(info(&world).await.session_id, "");
    soon(world.system().configure(good)).await.unwrap();
}

#[tokio::test]
async fn a_configured_guest_says_whose_it_is() {
    let name = nix::unistd::gethostname().unwrap();
    let mut request = configuration();
    request.template = "base@7".into();
    let world = World::configured(request).await;
    let info = info(&world).await;
    assert_eq!(info.template, "base@7");
    assert_eq!(
        (info.session_id.as_str(), info.hostname.as_str()),
        (SESSION, "sandbox-aaaaa")
    );
    assert!(info.api_level >= 1 && !info.kernel_release.is_empty() && info.uptime.is_some());
    assert_eq!(
        nix::unistd::gethostname().unwrap(),
        name,
        "outside a VM the host is left alone"
    );
}

#[tokio::test]
async fn configuring_again_is_a_success_for_the_same_session_and_changes_nothing() {
    let world = World::new().await;
    let mut again = configuration();
    again.hostname = "another".into();
    again.env.insert("LATE".into(), "1".into());
    soon(world.system().configure(again)).await.unwrap();
    assert_eq!(info(&world).await.hostname, "sandbox-aaaaa");
    assert_eq!(world.printed("echo \"[$LATE]\"").await, "[]\n");
}

#[tokio::test]
async fn a_sessions_guest_is_never_anothers() {
    let world = World::new().await;
    let mut other = configuration();
    other.session_id = "bbbbbccccccccccccccccccccc".into();
    let status = soon(world.system().configure(other)).await.unwrap_err();
    assert_eq!(
        why(&status),
        (Code::FailedPrecondition, "ALREADY_CONFIGURED".into())
    );
    assert_eq!(info(&world).await.session_id, SESSION);
}

#[tokio::test]
async fn of_two_sessions_that_configure_at_once_one_wins() {
    let world = World::closed().await;
    let attempts = (0..20).map(|number| {
        let mut request = configuration();
        request.session_id = format!("session-{}", number % 2);
        let mut system = world.system();
        async move {
            let session = request.session_id.clone();
            (session, soon(system.configure(request)).await.is_ok())
        }
    });
    let outcomes = futures::future::join_all(attempts).await;
    let winner = info(&world).await.session_id;
    for (session, accepted) in outcomes {
        assert_eq!(accepted, session == winner);
    }
}

#[tokio::test]
async fn a_guest_stays_its_sessions_over_connections() {
    let mut world = World::new().await;
    world.reconnect().await;
    assert_eq!(info(&world).await.session_id, SESSION);
    assert_eq!(world.printed("echo hi").await, "hi\n");
}

#[tokio::test]
async fn processes_and_files_belong_to_the_configured_default_user() {
    let mut request = configuration();
    request.default_user = "ada".into();
    let world = World::configured(request).await;
    assert_eq!(world.printed("id -un; echo > mine").await, "ada\n");
    let asked = StatRequest {
        path: "~/mine".into(),
        ..Default::default()
    };
    let entry = soon(world.files().stat(asked)).await.unwrap().into_inner();
    assert_eq!(entry.entry.unwrap().uid, crate::world::ADA);
}

#[tokio::test]
async fn shutdown_ends_processes_that_listen_and_those_that_do_not() {
    let mut world = World::new().await;
    let mut polite = world
        .start(sh(
            "trap 'echo bye; exit 4' TERM; echo; while :; do sleep 0.01; done",
        ))
        .await;
    let mut deaf = world
        .start(sh("trap '' TERM; echo; while :; do sleep 0.01; done"))
        .await;
    polite.read(1).await;
    deaf.read(1).await;
    let grace = prost_types::Duration {
        seconds: 2,
        nanos: 0,
    };
    let asked = ShutdownRequest { grace: Some(grace) };
    soon(world.system().shutdown(asked)).await.unwrap();
    let polite = polite.finish().await;
    assert_eq!(
        (polite.code(), polite.stdout.as_slice()),
        (Some(4), &b"\nbye\n"[..])
    );
    // The namespace ends as the guest would; whether the last word still came through is a matter of luck.
    while let Ok(true) = deaf.step().await {}
    until(|| world.is_over()).await;
}
