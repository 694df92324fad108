//! Every service says what it can be told, and refuses what makes no sense by the setting's name, before it does anything.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    fs,
    process::{Command, Output},
};

const SERVICES: [&str; 5] = ["gateway", "session", "template", "node", "envoy"];

fn serve(service: &str, arguments: &[&str], env: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sandmesh"));
    command.env_clear().args(["serve", service]).args(arguments);
    command.envs(env.iter().copied()).output().unwrap()
}

fn said(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

#[test]
fn help_names_every_setting_with_its_environment_name() {
    for service in SERVICES {
        let help = serve(service, &["--help"], &[]);
        assert!(help.status.success(), "{service}: {}", said(&help));
        let help = said(&help);
        for setting in [
            "--mesh-token-file",
            "--log-format",
            "--otlp-endpoint",
            "--admin-address",
            "--config",
        ] {
            assert!(help.contains(setting), "{service} has {setting}: {help}");
        }
        let settings = help
            .lines()
            .filter(|line| line.trim_start().starts_with("--"));
        assert!(settings.count() >= 7, "{help}");
        assert!(help.contains("[env: SANDMESH_MESH_TOKEN_FILE=]"), "{help}");
        assert!(help.contains("[default: "), "{help}");
    }
    let unknown = serve("nonsense", &[], &[]);
    assert!(
        !unknown.status.success()
            && said(&unknown).contains("gateway, session, template, node, envoy")
    );
}

#[test]
fn what_makes_no_sense_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let token = folder.path().join("mesh.token");
    fs::write(&token, "0".repeat(64)).unwrap();
    let token = token.to_str().unwrap();
    let database = ("SANDMESH_DATABASE_URL", "postgres://nobody@localhost/none");
    let redis = ("SANDMESH_REDIS_URL", "redis://127.0.0.1:1");
    for (service, env, name) in [
        ("gateway", vec![], "--mesh-token-file"),
        (
            "gateway",
            vec![database, ("SANDMESH_MESH_TOKEN_FILE", "/no/such")],
            "mesh token file /no/such",
        ),
        // Readable by others.
        (
            "envoy",
            vec![("SANDMESH_MESH_TOKEN_FILE", token)],
            "chmod 600",
        ),
        (
            "envoy",
            vec![("SANDMESH_ENVOY_REFRESH", "soon")],
            "--refresh",
        ),
        (
            "session",
            vec![database, redis, ("SANDMESH_NODE_DEAD_AFTER", "-1s")],
            "--node-dead-after",
        ),
        (
            "session",
            vec![database, redis, ("SANDMESH_EDGE_PORT", "65536")],
            "--edge-port",
        ),
        (
            "template",
            vec![database, ("SANDMESH_TEMPLATE_MAX_UPLOAD", "much")],
            "--max-upload",
        ),
        ("node", vec![redis, ("SANDMESH_NODE_VMM", "vax")], "--vmm"),
        (
            "node",
            vec![redis, ("SANDMESH_NODE_NAMESERVERS", "here")],
            "--nameservers",
        ),
    ] {
        let refused = serve(service, &[], &env);
        assert!(!refused.status.success(), "{service} {env:?}");
        assert!(
            said(&refused).contains(name),
            "{service} {env:?}: {}",
            said(&refused)
        );
    }
    let file = folder.path().join("node.toml");
    fs::write(&file, "vmm = 'fake'\nmax_sesions = 3\n").unwrap();
    let refused = serve("node", &["--config", file.to_str().unwrap()], &[]);
    assert!(!refused.status.success());
    assert!(
        said(&refused).contains("max_sesions") && said(&refused).contains("node.toml"),
        "{}",
        said(&refused)
    );
}

#[test]
fn shells_complete_and_nothing_runs_where_nothing_was_started() {
    let sandmesh = |arguments: &[&str]| {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_sandmesh"));
        let output = command
            .env_clear()
            .env("SANDMESH_STATE", folder.path())
            .args(arguments)
            .output();
        output.unwrap()
    };
    for shell in ["bash", "zsh", "fish"] {
        let script = sandmesh(&["completions", shell]);
        assert!(said(&script).contains("sandmesh") && said(&script).contains("session"));
    }
    assert!(said(&sandmesh(&["version"])).starts_with("sandmesh "));
    let status = sandmesh(&["status", "-o", "json"]);
    assert_eq!(status.status.code(), Some(1));
    assert!(said(&status).contains("\"parts\": []"));
    let list = sandmesh(&["session", "list"]);
    assert_eq!(list.status.code(), Some(125));
    assert!(said(&list).contains("SANDMESH_ENDPOINT") && said(&list).contains("sandmesh up"));
}
