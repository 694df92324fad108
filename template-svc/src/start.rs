//! Start commands: what may be asked for.

use std::time::Duration;

use http::uri::PathAndQuery;
use proto::template::v1::{StartCommand, readiness::Probe};

/// The longest a start command may take until it is ready.
pub(crate) const LONGEST: Duration = Duration::from_mins(10);
const MOST_WORDS: usize = 1000;
const LARGEST_COMMAND: usize = 64 << 10;
const LONGEST_PATH: usize = 4095;
const LONGEST_HTTP_PATH: usize = 2048;
const LONGEST_USER: usize = 64;
const LONGEST_LINE: usize = 1000;

/// Whether it can be asked for; if not, which field is wrong, and what it must be.
pub(crate) fn check(start: &StartCommand) -> Result<(), (&'static str, String)> {
    let size: usize = start.argv.iter().map(String::len).sum();
    let holds_nul = |text: &String| text.contains('\0');
    if start.argv.len() > MOST_WORDS || size > LARGEST_COMMAND || start.argv.iter().any(holds_nul) {
        let rule = format!(
            "must be at most {MOST_WORDS} words of {LARGEST_COMMAND} bytes together, without NUL"
        );
        return Err(("start.argv", rule));
    }
    if start.argv.first().is_some_and(String::is_empty) {
        return Err(("start.argv", "must begin with a program".into()));
    }
    if start.cwd.len() > LONGEST_PATH || holds_nul(&start.cwd) {
        let rule = format!("must be a path of at most {LONGEST_PATH} bytes");
        return Err(("start.cwd", rule));
    }
    if start.user.len() > LONGEST_USER || holds_nul(&start.user) {
        let rule = format!("must be at most {LONGEST_USER} bytes");
        return Err(("start.user", rule));
    }
    let readiness = start.readiness.clone().unwrap_or_default();
    let timeout = readiness.timeout.map(Duration::try_from);
    let is_timeout = match timeout {
        None => true,
        Some(Ok(timeout)) => !timeout.is_zero() && timeout <= LONGEST,
        Some(Err(_)) => false,
    };
    if !is_timeout {
        let rule = "must be more than 0 and at most 10 minutes".into();
        return Err(("start.readiness.timeout", rule));
    }
    match &readiness.probe {
        None => Err((
            "start.readiness",
            "is required: a port, a command or a line of its log says when it is ready".into(),
        )),
        Some(Probe::Port(port)) if !(1..=u32::from(u16::MAX)).contains(&port.port) => {
            Err(("start.readiness.port", "must be from 1 to 65535".into()))
        }
        Some(Probe::Port(port)) => {
            let path = &port.http_path;
            let is_path = path.starts_with('/') && path.parse::<PathAndQuery>().is_ok();
            if path.is_empty() || is_path && path.len() <= LONGEST_HTTP_PATH {
                Ok(())
            } else {
                let rule = format!(
                    "must be a path of HTTP that begins with /, of at most {LONGEST_HTTP_PATH} bytes"
                );
                Err(("start.readiness.port.http_path", rule))
            }
        }
        Some(Probe::Command(command)) => {
            let size = 1..=LARGEST_COMMAND;
            if size.contains(&command.len()) && !holds_nul(command) {
                Ok(())
            } else {
                let rule = format!("must be 1 to {LARGEST_COMMAND} bytes without NUL");
                Err(("start.readiness.command", rule))
            }
        }
        Some(Probe::LogLine(text)) => {
            let is_line = (1..=LONGEST_LINE).contains(&text.len()) && !text.contains(['\n', '\r']);
            if is_line {
                Ok(())
            } else {
                let rule = format!("must be 1 to {LONGEST_LINE} bytes of one line");
                Err(("start.readiness.log_line", rule))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proto::template::v1::{PortProbe, Readiness};
    use rstest::rstest;

    use super::*;

    fn port(port: u32, path: &str) -> Probe {
        Probe::Port(PortProbe {
            port,
            http_path: path.into(),
        })
    }

    fn asked(argv: &[&str], probe: Option<Probe>, timeout: Option<i64>) -> StartCommand {
        StartCommand {
            argv: argv.iter().map(ToString::to_string).collect(),
            readiness: Some(Readiness {
                probe,
                timeout: timeout.map(|seconds| prost_types::Duration { seconds, nanos: 0 }),
            }),
            ..StartCommand::default()
        }
    }

    #[test]
    fn what_may_be_asked_for() {
        for probe in [
            port(80, ""),
            port(65535, "/health"),
            Probe::Command("true".into()),
            Probe::LogLine("ready".into()),
        ] {
            assert_eq!(check(&asked(&[], Some(probe.clone()), None)), Ok(()));
            assert_eq!(check(&asked(&["a", ""], Some(probe), Some(600))), Ok(()));
        }
    }

    #[rstest]
    #[case(asked(&["", "x"], Some(port(1, "")), None), "start.argv")]
    #[case(asked(&["a\0"], Some(port(1, "")), None), "start.argv")]
    #[case(asked(&["a"; 1001], Some(port(1, "")), None), "start.argv")]
    #[case(asked(&["a"], None, None), "start.readiness")]
    #[case(StartCommand::default(), "start.readiness")]
    #[case(asked(&[], Some(port(0, "")), None), "start.readiness.port")]
    #[case(asked(&[], Some(port(65536, "")), None), "start.readiness.port")]
    #[case(asked(&[], Some(port(1, "x")), None), "start.readiness.port.http_path")]
    #[case(asked(&[], Some(port(1, "/a b")), None), "start.readiness.port.http_path")]
    #[case(asked(&[], Some(Probe::Command(String::new())), None), "start.readiness.command")]
    #[case(asked(&[], Some(Probe::LogLine(String::new())), None), "start.readiness.log_line")]
    #[case(asked(&[], Some(Probe::LogLine("a\nb".into())), None), "start.readiness.log_line")]
    #[case(asked(&[], Some(port(1, "")), Some(0)), "start.readiness.timeout")]
    #[case(asked(&[], Some(port(1, "")), Some(-1)), "start.readiness.timeout")]
    #[case(asked(&[], Some(port(1, "")), Some(601)), "start.readiness.timeout")]
    #[case(StartCommand { user: "u".repeat(65), ..asked(&[], Some(port(1, "")), None) }, "start.user")]
    #[case(StartCommand { cwd: "c".repeat(4096), ..asked(&[], Some(port(1, "")), None) }, "start.cwd")]
    fn every_wrong_field_is_named(#[case] start: StartCommand, #[case] field: &str) {
        assert_eq!(check(&start).unwrap_err().0, field);
    }
}
