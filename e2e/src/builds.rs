//! What builds run on, and may not leave behind.

use std::{
    fs,
    time::{Duration, Instant},
};

use proto::session::v1::{ListSessionsRequest, Session};

use crate::{Mesh, leaks, wait_for};

/// The label of a build's sessions.
const LABEL: &str = "sandmesh.dev/build";
const GONE_LIMIT: Duration = Duration::from_secs(30);
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Sessions of builds.
pub async fn sessions(mesh: &Mesh) -> Vec<Session> {
    let mut sessions = mesh.client().sessions();
    let listed = sessions.list_sessions(ListSessionsRequest::default()).await;
    let listed = listed.map(|answer| answer.into_inner().sessions);
    let is_of_build = |session: &Session| session.metadata.contains_key(LABEL);
    listed.unwrap().into_iter().filter(is_of_build).collect()
}

/// Nothing of builds is left: sessions, VMMs, folders.
pub async fn leave_nothing(mesh: &Mesh) {
    let end = Instant::now() + GONE_LIMIT;
    loop {
        let left = sessions(mesh).await;
        if left.is_empty() {
            break;
        }
        assert!(Instant::now() < end, "left behind: {left:?}");
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    let work = mesh.state().join("templates/work");
    let sessions = mesh.state().join("node/s");
    wait_for("nothing is left behind", GONE_LIMIT, || {
        [&work, &sessions]
            .iter()
            .all(|folder| fs::read_dir(folder).unwrap().count() == 0)
    });
    let vmms = leaks::of_state(&sessions.to_string_lossy());
    assert!(vmms.is_empty(), "{vmms:?}");
}
