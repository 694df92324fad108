//! Fields of requests as our own types; each says what is wrong with it by its name.

use std::time::Duration;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use proto::session::v1 as wire;
use service_kit::{
    egress::{Entry, LEAST_RATE, MOST_ENTRIES},
    errors::{Failure, Reason},
    ids::{CheckpointId, SessionId},
};
use tonic::{Code, Status};

use crate::session::Network;

const LONGEST_TIMEOUT: Duration = Duration::from_hours(24);
const DEFAULT_PAGE: u32 = 100;
const LARGEST_PAGE: u32 = 1000;

pub(super) fn session_id(text: &str) -> Result<SessionId, Status> {
    SessionId::parse(text).map_err(|error| {
        Failure::new(
            Code::InvalidArgument,
            Reason::SESSION_ID_MALFORMED,
            error.to_string(),
        )
        .field("session_id", error.to_string())
        .into_status()
    })
}

pub(super) fn timeout(
    asked: Option<prost_types::Duration>,
    default: Option<Duration>,
) -> Result<Duration, Status> {
    let wrong = || Failure::field_invalid("timeout", "must be from 1 s to 24 h").into_status();
    let asked = match asked {
        Some(asked) => Duration::try_from(asked).map_err(|_| wrong())?,
        None => default.ok_or_else(wrong)?,
    };
    if (Duration::from_secs(1)..=LONGEST_TIMEOUT).contains(&asked) {
        Ok(asked)
    } else {
        Err(wrong())
    }
}

pub(super) fn page_size(asked: u32) -> i64 {
    i64::from(if asked == 0 {
        DEFAULT_PAGE
    } else {
        asked.min(LARGEST_PAGE)
    })
}

pub(super) fn checkpoint_id(text: &str) -> Result<CheckpointId, Status> {
    CheckpointId::parse(text)
        .map_err(|error| Failure::field_invalid("checkpoint_id", error.to_string()).into_status())
}

pub(super) fn port_access(network: &wire::Network) -> wire::PortAccess {
    match network.port_access() {
        wire::PortAccess::Token => wire::PortAccess::Token,
        _ => wire::PortAccess::Public,
    }
}

/// Network settings, defaults for what is left out.
pub(super) fn network(asked: Option<wire::Network>) -> Result<Network, Status> {
    let asked = asked.unwrap_or_default();
    Ok(Network {
        port_access: port_access(&asked),
        internet_access: asked.internet_access.unwrap_or(true),
        egress_rate: rate(
            "network.egress_bytes_per_second",
            asked.egress_bytes_per_second,
        )?,
        ingress_rate: rate(
            "network.ingress_bytes_per_second",
            asked.ingress_bytes_per_second,
        )?,
        egress: egress(asked.egress.unwrap_or_default())?,
    })
}

fn rate(field: &str, rate: u64) -> Result<u64, Status> {
    if rate == 0 || rate >= LEAST_RATE {
        return Ok(rate);
    }
    let description = format!("must be 0, for the node's limit, or at least {LEAST_RATE}");
    Err(Failure::field_invalid(field, description).into_status())
}

fn egress(asked: wire::Egress) -> Result<wire::Egress, Status> {
    let list = |field: &str, entries: Vec<String>| {
        if entries.len() > MOST_ENTRIES {
            let description = format!("may have at most {MOST_ENTRIES} entries");
            return Err(Failure::field_invalid(field, description).into_status());
        }
        entries
            .iter()
            .map(|entry| Entry::parse(entry).map(|entry| entry.to_string()))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| Failure::field_invalid(field, error.to_string()).into_status())
    };
    Ok(wire::Egress {
        allow: list("network.egress.allow", asked.allow)?,
        deny: list("network.egress.deny", asked.deny)?,
    })
}

pub(super) fn on_timeout(asked: wire::OnTimeout) -> wire::OnTimeout {
    match asked {
        wire::OnTimeout::Pause => wire::OnTimeout::Pause,
        _ => wire::OnTimeout::Stop,
    }
}

pub(super) fn encode_page_token(time: i64, id: &str) -> String {
    URL_SAFE_NO_PAD.encode(format!("{time}/{id}"))
}

pub(super) fn decode_page_token(token: &str) -> Result<Option<(i64, String)>, Status> {
    if token.is_empty() {
        return Ok(None);
    }
    let parse = || {
        let text = String::from_utf8(URL_SAFE_NO_PAD.decode(token).ok()?).ok()?;
        let (time, id) = text.split_once('/')?;
        Some((time.parse().ok()?, id.to_owned()))
    };
    parse().map(Some).ok_or_else(|| {
        Failure::field_invalid("page_token", "is not one this service gave out").into_status()
    })
}

#[cfg(test)]
mod tests {
    use tonic_types::StatusExt as _;

    use super::*;

    fn wrong_field(asked: wire::Network) -> String {
        let status = network(Some(asked)).unwrap_err();
        let mut details = status.get_details_bad_request().unwrap();
        details.field_violations.remove(0).field
    }

    #[test]
    fn networks_have_limits() {
        let lists = |allow: Vec<String>, deny: Vec<String>| wire::Network {
            egress: Some(wire::Egress { allow, deny }),
            ..wire::Network::default()
        };
        assert_eq!(network(None).unwrap(), Network::default());
        let most = vec!["10.0.0.0/8".to_owned(); 64];
        let parsed = network(Some(lists(most.clone(), vec!["*.Example.com".into()]))).unwrap();
        assert_eq!(parsed.egress.allow.len(), 64);
        assert_eq!(parsed.egress.deny, ["*.example.com"]);
        let many = vec!["10.0.0.0/8".to_owned(); 65];
        assert_eq!(
            wrong_field(lists(many.clone(), vec![])),
            "network.egress.allow"
        );
        assert_eq!(wrong_field(lists(most, many)), "network.egress.deny");
        let nonsense = lists(vec![], vec!["not a name".into()]);
        assert_eq!(wrong_field(nonsense), "network.egress.deny");
        for (rate, fits) in [(0, true), (1, false), (1023, false), (1024, true)] {
            let asked = wire::Network {
                ingress_bytes_per_second: rate,
                ..wire::Network::default()
            };
            assert_eq!(network(Some(asked)).is_ok(), fits, "{rate}");
        }
    }
}
