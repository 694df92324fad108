//! What may be asked of a port that is waited for.

use std::time::Duration;

use proto::session::v1::PortReadiness;

/// The longest anybody may wait.
pub const LONGEST_WAIT: Duration = Duration::from_mins(10);
const WAIT: Duration = Duration::from_secs(30);
const LONGEST_PATH: usize = 2048;

/// For how long to wait; or which field is wrong, and what it must be.
pub fn check(ready: &PortReadiness) -> Result<Duration, (&'static str, &'static str)> {
    if !(1..=u32::from(u16::MAX)).contains(&ready.port) {
        return Err(("wait_for_port.port", "must be from 1 to 65535"));
    }
    let path = ready.http_path.as_str();
    if !(path.is_empty() || path.starts_with('/')) || path.len() > LONGEST_PATH {
        let rule = "must begin with / and be at most 2048 bytes";
        return Err(("wait_for_port.http_path", rule));
    }
    let timeout = ready.timeout.map_or(Ok(WAIT), Duration::try_from);
    timeout
        .ok()
        .filter(|timeout| !timeout.is_zero() && *timeout <= LONGEST_WAIT)
        .ok_or((
            "wait_for_port.timeout",
            "must be more than 0 and at most 10 minutes",
        ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_wrong_field_is_named() {
        let ready = |port, path: &str, timeout: Option<(i64, i32)>| {
            check(&PortReadiness {
                port,
                http_path: path.into(),
                timeout: timeout.map(|(seconds, nanos)| prost_types::Duration { seconds, nanos }),
            })
            .map_err(|(field, _)| field.trim_start_matches("wait_for_port."))
        };
        assert_eq!(ready(1, "", None), Ok(WAIT));
        assert_eq!(ready(65535, "/x", Some((600, 0))), Ok(LONGEST_WAIT));
        assert_eq!(ready(1, "", Some((0, 1))), Ok(Duration::from_nanos(1)));
        for (port, path, timeout, wrong) in [
            (0, "", None, "port"),
            (65536, "", None, "port"),
            (1, "x", None, "http_path"),
            (1, &format!("/{}", "x".repeat(2048)), None, "http_path"),
            (1, "", Some((0, 0)), "timeout"),
            (1, "", Some((-1, 0)), "timeout"),
            (1, "", Some((600, 1)), "timeout"),
        ] {
            assert_eq!(ready(port, path, timeout), Err(wrong));
        }
    }
}
