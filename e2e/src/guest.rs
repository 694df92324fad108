//! The server that tests run inside sandboxes.

use proto::envd::v1::WriteHeader;
use sdk::{Command, Process, Sandbox};

const PATH: &str = "guest-server";

/// Copies the program `guest-server` in. The guest has the same C library as this machine: its root filesystem is made here.
pub async fn upload(sandbox: &Sandbox, program: &str) {
    let mut file = tokio::fs::File::open(program).await.unwrap();
    let header = WriteHeader {
        path: PATH.into(),
        mode: Some(0o755),
        ..WriteHeader::default()
    };
    sandbox.write_from(header, &mut file, |_| {}).await.unwrap();
}

/// Starts it on an address.
pub async fn serve(sandbox: &Sandbox, address: &str) -> Process {
    sandbox
        .start(Command::new([&format!("./{PATH}"), address]))
        .await
        .unwrap()
}
