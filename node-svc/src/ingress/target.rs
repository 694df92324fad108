//! Which session a request is for, and what of it. Pure.
//!
//! A port: host `<port>-<session id>.<domain>`, or headers `x-session-id` and `x-session-port`. A stream to envd, or a path under
//! `/files/`: header `x-session-id`, or host `<session id>.<domain>`. Headers win over the host.

use http::{HeaderMap, Request};
use service_kit::{
    errors::{Failure, Reason},
    ids::SessionId,
};
use tonic::Code;

use super::{answer::Refusal, files};

/// Header that names a session.
pub const SESSION_HEADER: &str = "x-session-id";
/// Header that names a port of it.
pub const PORT_HEADER: &str = "x-session-port";

/// Header that says how long a request to a port may wait for its server, such as `500ms` or `30s`.
pub const WAIT_HEADER: &str = "x-session-wait";

/// What a request is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The session.
    pub session: SessionId,
    /// What of it.
    pub what: What,
}

/// What of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// envd, by gRPC.
    Stream,
    /// A file of the guest, by HTTP.
    Files,
    /// A TCP port of the guest, by HTTP.
    Port(u16),
}

fn malformed(message: &str) -> Refusal {
    Refusal::new(
        Failure::new(Code::InvalidArgument, Reason::SESSION_ID_MALFORMED, message),
        400,
    )
}

fn port_invalid() -> Refusal {
    Refusal::new(
        Failure::new(
            Code::InvalidArgument,
            Reason::PORT_INVALID,
            "a port is a number from 1 to 65535",
        ),
        400,
    )
}

fn parse_port(text: &str) -> Result<u16, Refusal> {
    let digits =
        !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) && !text.starts_with('0');
    text.parse()
        .ok()
        .filter(|_| digits)
        .ok_or_else(port_invalid)
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers
        .get(name)
        .map(|value| value.to_str().unwrap_or_default())
}

/// Reads the target from headers and authority; `domain` is in lower case.
pub fn read<B>(
    request: &Request<B>,
    authority: Option<&str>,
    domain: &str,
) -> Result<Target, Refusal> {
    let headers = request.headers();
    if let Some(id) = header(headers, SESSION_HEADER) {
        let session = SessionId::parse(id).map_err(|error| malformed(&error.to_string()))?;
        let what = match header(headers, PORT_HEADER) {
            Some(port) => What::Port(parse_port(port)?),
            None => within(request),
        };
        return Ok(Target { session, what });
    }
    let mut target = from_host(authority.unwrap_or_default(), domain)?;
    if target.what == What::Stream {
        target.what = within(request);
    }
    Ok(target)
}

fn within<B>(request: &Request<B>) -> What {
    if files::is_meant(request) {
        What::Files
    } else {
        What::Stream
    }
}

fn from_host(authority: &str, domain: &str) -> Result<Target, Refusal> {
    let host = authority.to_ascii_lowercase();
    let host = host
        .rsplit_once(':')
        .map_or(host.as_str(), |(host, _)| host);
    let label = host
        .strip_suffix(domain)
        .and_then(|rest| rest.strip_suffix('.'))
        .filter(|label| !label.contains('.'))
        .ok_or_else(|| {
            malformed(&format!(
                "the host must be <port>-<session id>.{domain} or <session id>.{domain}"
            ))
        })?;
    if let Some((port, id)) = label.split_once('-') {
        let session = SessionId::parse(id).map_err(|error| malformed(&error.to_string()))?;
        let what = What::Port(parse_port(port)?);
        return Ok(Target { session, what });
    }
    let session = SessionId::parse(label).map_err(|error| malformed(&error.to_string()))?;
    Ok(Target {
        session,
        what: What::Stream,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ID: &str = "abcde0123456789abcdefghij";

    fn target(host: &str, headers: &[(&str, &str)]) -> Result<(String, What), &'static str> {
        let mut request = Request::builder().uri("/");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        read(&request.body(()).unwrap(), Some(host), "sandmesh.localhost")
            .map(|target| (target.session.to_string(), target.what))
            .map_err(|refusal| refusal.label())
    }

    #[test]
    fn hosts_and_headers_name_targets() {
        let port = Ok((ID.to_owned(), What::Port(8000)));
        let stream = Ok((ID.to_owned(), What::Stream));
        assert_eq!(target(&format!("8000-{ID}.sandmesh.localhost"), &[]), port);
        assert_eq!(
            target(&format!("8000-{ID}.sandmesh.localhost:10080"), &[]),
            port
        );
        assert_eq!(
            target(&format!("8000-{ID}.SANDMESH.localhost").to_uppercase(), &[]),
            port
        );
        assert_eq!(target(&format!("{ID}.sandmesh.localhost"), &[]), stream);
        assert_eq!(target("anything", &[("x-session-id", ID)]), stream);
        assert_eq!(
            target(
                "anything",
                &[("x-session-id", ID), ("x-session-port", "8000")]
            ),
            port
        );
    }

    #[test]
    fn what_is_malformed_is_said() {
        let malformed = Err("SESSION_ID_MALFORMED");
        let port = Err("PORT_INVALID");
        for host in [
            "",
            "localhost",
            "sandmesh.localhost",
            ".sandmesh.localhost",
            "x.sandmesh.localhost",
            "evil.example",
        ] {
            assert_eq!(target(host, &[]), malformed, "{host}");
        }
        assert_eq!(
            target(&format!("a.{ID}.sandmesh.localhost"), &[]),
            malformed
        );
        assert_eq!(
            target(&format!("8000-{ID}x.sandmesh.localhost"), &[]),
            malformed
        );
        for number in ["0", "65536", "99999", "-1", "http", "08", "+80"] {
            assert_eq!(
                target("h", &[("x-session-id", ID), ("x-session-port", number)]),
                port,
                "{number}"
            );
        }
        assert_eq!(target(&format!("0-{ID}.sandmesh.localhost"), &[]), port);
        assert_eq!(target(&format!("65536-{ID}.sandmesh.localhost"), &[]), port);
        assert_eq!(target("h", &[("x-session-id", "short")]), malformed);
    }

    proptest! {
        #[test]
        fn nothing_panics_and_every_port_survives(host in "\\PC{0,80}", number in 1u16..) {
            let _ = target(&host, &[]);
            let host = format!("{number}-{ID}.sandmesh.localhost");
            prop_assert_eq!(target(&host, &[]), Ok((ID.to_owned(), What::Port(number))));
        }
    }
}
