//! Whether envd still answers. A guest whose kernel runs on while envd stands still has a link, a VMM and open ports: only asking tells.

use std::{convert::Infallible, time::Duration};

use proto::envd::v1::GetInfoRequest;
use service_kit::ids::SessionId;
use tokio::time::{sleep, timeout};

use crate::hosted::Reach;

const ASK_EVERY: Duration = Duration::from_secs(5);
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// Answers that may fail to come in a row. An emulated guest that starts a thousand processes at once was silent for 25 s.
const MISSED: u32 = 4;

/// Asks for as long as it is polled, and notes what comes of it where requests are answered.
pub(super) async fn look_after(reach: &Reach, session: &SessionId) -> Infallible {
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
        if is_silent {
            metrics::counter!("sandmesh_node_guests_silent_total").increment(1);
            tracing::error!(session_id, "envd of a session does not answer any more");
        } else {
            tracing::warn!(session_id, "envd of a session answers again");
        }
    }
}
