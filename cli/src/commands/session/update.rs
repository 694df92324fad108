//! `sandmesh session update`.

use clap::ValueEnum;
use proto::session::v1::{self as wire, Egress, Network};
use service_kit::config::parse_bytes;

use super::super::pair;

/// At the deadline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OnTimeout {
    /// The session is stopped.
    Stop,
    /// The session is paused.
    Pause,
}

impl From<OnTimeout> for wire::OnTimeout {
    fn from(asked: OnTimeout) -> Self {
        match asked {
            OnTimeout::Stop => Self::Stop,
            OnTimeout::Pause => Self::Pause,
        }
    }
}

#[derive(Debug, clap::Args)]
pub(crate) struct Update {
    /// Which.
    pub(crate) id: String,
    /// Let through: network, address, domain or *.domain, any number of times; replaces what was let through.
    #[arg(long)]
    allow: Vec<String>,
    /// Not let through; replaces what was not.
    #[arg(long)]
    deny: Vec<String>,
    /// Drop what --allow and --deny said before.
    #[arg(long)]
    clear_rules: bool,
    /// Whether it reaches the outside where --allow and --deny say nothing.
    #[arg(long)]
    internet: Option<bool>,
    /// Per second to the outside, such as 1MiB; 0 is the node's limit.
    #[arg(long, value_parser = parse_bytes)]
    egress_rate: Option<u64>,
    /// Per second from the outside, such as 1MiB; 0 is the node's limit.
    #[arg(long, value_parser = parse_bytes)]
    ingress_rate: Option<u64>,
    /// Whether ports need the session's access token.
    #[arg(long)]
    protect_ports: Option<bool>,
    /// Whether a call wakes it when it is paused.
    #[arg(long)]
    wake: Option<bool>,
    /// What happens at its deadline.
    #[arg(long, value_enum)]
    on_timeout: Option<OnTimeout>,
    /// Label, any number of times: NAME=VALUE; replaces all labels.
    #[arg(short, long, value_parser = pair)]
    label: Vec<(String, String)>,
}

impl Update {
    /// Whether it changes one list and keeps the other, which must be known for that.
    pub(crate) fn keeps_rules(&self) -> bool {
        !self.clear_rules && self.allow.is_empty() != self.deny.is_empty()
    }

    /// What to change of a session whose rules are these.
    pub(crate) fn changes(self, now: Option<Network>) -> sdk::Changes {
        let is_ruled = self.clear_rules || !self.allow.is_empty() || !self.deny.is_empty();
        let kept = if self.clear_rules {
            Egress::default()
        } else {
            now.and_then(|now| now.egress).unwrap_or_default()
        };
        let or = |new: Vec<String>, kept| if new.is_empty() { kept } else { new };
        let egress = Egress {
            allow: or(self.allow, kept.allow),
            deny: or(self.deny, kept.deny),
        };
        sdk::Changes {
            metadata: (!self.label.is_empty()).then(|| self.label.into_iter().collect()),
            on_timeout: self.on_timeout.map(Into::into),
            wake_on_request: self.wake,
            port_access: self.protect_ports.map(|protect| {
                if protect {
                    wire::PortAccess::Token
                } else {
                    wire::PortAccess::Public
                }
            }),
            internet_access: self.internet,
            egress: is_ruled.then_some(egress),
            egress_bytes_per_second: self.egress_rate,
            ingress_bytes_per_second: self.ingress_rate,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        update: Update,
    }

    fn update(line: &str) -> Update {
        Line::parse_from(["update", "s"].into_iter().chain(line.split_whitespace())).update
    }

    fn rules(allow: &[&str], deny: &[&str]) -> Egress {
        let owned = |list: &[&str]| list.iter().map(ToString::to_string).collect();
        Egress {
            allow: owned(allow),
            deny: owned(deny),
        }
    }

    #[test]
    fn a_list_that_is_not_named_is_kept() {
        let now = || {
            Some(Network {
                egress: Some(rules(&["a.example"], &["b.example"])),
                ..Network::default()
            })
        };
        for (line, keeps, expected) in [
            ("--internet false", false, None),
            (
                "--allow c.example",
                true,
                Some(rules(&["c.example"], &["b.example"])),
            ),
            (
                "--deny c.example",
                true,
                Some(rules(&["a.example"], &["c.example"])),
            ),
            (
                "--allow c.example --allow 10.0.0.0/8 --deny d.example",
                false,
                Some(rules(&["c.example", "10.0.0.0/8"], &["d.example"])),
            ),
            ("--clear-rules", false, Some(rules(&[], &[]))),
            (
                "--clear-rules --deny d.example",
                false,
                Some(rules(&[], &["d.example"])),
            ),
        ] {
            assert_eq!(update(line).keeps_rules(), keeps, "{line}");
            assert_eq!(update(line).changes(now()).egress, expected, "{line}");
        }
    }

    #[test]
    fn everything_else_changes_only_if_named() {
        let changes = update("--internet false --wake true --on-timeout pause --egress-rate 1MiB")
            .changes(None);
        assert_eq!(changes.internet_access, Some(false));
        assert_eq!(changes.wake_on_request, Some(true));
        assert_eq!(changes.on_timeout, Some(wire::OnTimeout::Pause));
        assert_eq!(changes.egress_bytes_per_second, Some(1 << 20));
        assert!(changes.ingress_bytes_per_second.is_none() && changes.port_access.is_none());
        assert!(changes.metadata.is_none() && changes.egress.is_none());
        assert!(Line::try_parse_from(["update", "s", "--internet", "maybe"]).is_err());
    }
}
