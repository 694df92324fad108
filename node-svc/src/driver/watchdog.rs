//! Whether envd still answers. A guest whose kernel runs on while envd stands still has a link, a VMM and open ports: only asking tells.

use std::{convert::Infallible, sync::Arc, time::Duration};

use proto::envd::v1::GetInfoRequest;
use service_kit::ids::SessionId;
use tokio::time::{sleep, timeout};

use super::collect;
use crate::{
    hosted::{Hosted, Reach},
    logs::{NewMessage, SessionLog},
};

const ASK_EVERY: Duration = Duration::from_secs(5);
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// Answers that may fail to come in a row. An emulated guest that starts a thousand processes at once was silent for 25 s.
const MISSED: u32 = 4;

/// Asks for as long as it is polled, and notes what comes of it where requests are answered, and in the session's log.
pub(super) async fn look_after(
    reach: &Reach,
    session: &SessionId,
    log: &Arc<SessionLog>,
    hosted: &Hosted,
) -> Infallible {
    let mut missed = 0;
    loop {
        sleep(ASK_EVERY).await;
        let mut system = reach.guest.system();
        let answer = timeout(ANSWER_LIMIT, system.get_info(GetInfoRequest {})).await;
        missed = match answer {
            Ok(Ok(_)) => 0,
            _ => missed + 1,
        };
        let is_silent = missed >= MISSED;
        if missed != 0 && !is_silent || reach.set_silent(is_silent) == is_silent {
            continue;
        }
        let session_id = session.short();
        let (severity, event, text) = if is_silent {
            metrics::counter!("sandmesh_node_guests_silent_total").increment(1);
            tracing::error!(session_id, "envd of a session does not answer any more");
            (
                3,
                "GUEST_SILENT",
                "envd in the guest does not answer; what runs goes on, calls and files are refused until it does",
            )
        } else {
            tracing::warn!(session_id, "envd of a session answers again");
            (5, "GUEST_ANSWERS", "envd in the guest answers again")
        };
        collect::put(
            log,
            hosted,
            vec![NewMessage::of_node(severity, event, text)],
        )
        .await;
    }
}
