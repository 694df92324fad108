//! Where to a session may open connections, and how fast: values that are valid once they exist.

use std::{fmt, net::Ipv4Addr, str::FromStr};

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

/// Entries of a list of rules at most.
pub const MAX_RULES: usize = 64;
/// The least rate that can be asked for, in bytes per second.
pub const MIN_RATE: u64 = 1024;

/// A text is not a rule, or there are too many.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RuleError {
    /// It is none of the forms.
    #[error(
        "{text:?} is not an IPv4 address (203.0.113.7), a network (203.0.113.0/24), or a domain (example.com, *.example.com)"
    )]
    Malformed {
        /// As it was given.
        text: String,
    },
    /// More than [`MAX_RULES`].
    #[error("{list} has {count} entries; at most {MAX_RULES} are possible")]
    TooMany {
        /// `allow` or `deny`.
        list: &'static str,
        /// How many there were.
        count: usize,
    },
    /// Less than [`MIN_RATE`].
    #[error("{field} is {rate} bytes per second; it is 0 for no limit, or at least {MIN_RATE}")]
    TooSlow {
        /// Which rate.
        field: &'static str,
        /// As it was given.
        rate: u64,
    },
}

/// One entry: an IPv4 network, or names.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Rule {
    /// Addresses; a single one is a /32. Bits beyond the prefix are zero.
    Net(Ipv4Net),
    /// Domain names.
    Name(NamePattern),
}

/// `example.com`, or `*.example.com` for all names below it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NamePattern {
    /// In lower case, last label last.
    labels: Vec<String>,
    is_below: bool,
}

impl NamePattern {
    /// Whether a name, as labels from the first to the last, is meant.
    pub fn matches<'a>(&self, name: impl DoubleEndedIterator<Item = &'a [u8]>) -> bool {
        let mut name = name.rev();
        for label in self.labels.iter().rev() {
            match name.next() {
                Some(given) if given.eq_ignore_ascii_case(label.as_bytes()) => {}
                _ => return false,
            }
        }
        name.next().is_some() == self.is_below
    }
}

impl FromStr for Rule {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let malformed = || RuleError::Malformed {
            text: text.chars().take(300).collect(),
        };
        if text.contains('/') {
            let net: Ipv4Net = text.parse().map_err(|_| malformed())?;
            return Ok(Self::Net(net.trunc()));
        }
        if let Ok(address) = text.parse::<Ipv4Addr>() {
            return Ok(Self::Net(address.into()));
        }
        let (rest, is_below) = match text.strip_prefix("*.") {
            Some(rest) => (rest, true),
            None => (text, false),
        };
        let rest = rest.strip_suffix('.').unwrap_or(rest);
        // RFC 1035 2.3.4: 63 octets a label, 255 a name, in which each label has a length octet.
        let is_label = |label: &str| {
            (1..=63).contains(&label.len())
                && label
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
        };
        let labels: Vec<String> = rest.split('.').map(str::to_ascii_lowercase).collect();
        // A last label of digits is an address gone wrong.
        let is_name = rest.len() <= 253
            && labels.iter().all(|label| is_label(label))
            && labels
                .last()
                .is_some_and(|last| !last.bytes().all(|byte| byte.is_ascii_digit()));
        if is_name {
            Ok(Self::Name(NamePattern { labels, is_below }))
        } else {
            Err(malformed())
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Net(net) if net.prefix_len() == 32 => net.addr().fmt(f),
            Self::Net(net) => net.fmt(f),
            Self::Name(name) => {
                if name.is_below {
                    f.write_str("*.")?;
                }
                f.write_str(&name.labels.join("."))
            }
        }
    }
}

impl TryFrom<String> for Rule {
    type Error = RuleError;

    fn try_from(text: String) -> Result<Self, RuleError> {
        text.parse()
    }
}

impl From<Rule> for String {
    fn from(rule: Rule) -> Self {
        rule.to_string()
    }
}

/// What a session may do on the network: what matches `allow` is let through; else what matches `deny` is not; the rest is as
/// `internet` says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkRules {
    /// Whether connections to the outside may be opened.
    pub internet: bool,
    /// Let through.
    pub allow: Vec<Rule>,
    /// Not let through.
    pub deny: Vec<Rule>,
    /// Bytes per second from the guest; 0: no limit.
    pub egress_bytes_per_second: u64,
    /// Bytes per second to the guest; 0: no limit.
    pub ingress_bytes_per_second: u64,
}

impl NetworkRules {
    /// No lists and no limits.
    pub fn internet(internet: bool) -> Self {
        Self {
            internet,
            ..Self::default()
        }
    }

    /// From the texts of a request.
    pub fn parse(
        internet: bool,
        allow: &[String],
        deny: &[String],
        egress_bytes_per_second: u64,
        ingress_bytes_per_second: u64,
    ) -> Result<Self, RuleError> {
        let list = |list, texts: &[String]| {
            if texts.len() > MAX_RULES {
                return Err(RuleError::TooMany {
                    list,
                    count: texts.len(),
                });
            }
            texts.iter().map(|text| text.parse()).collect()
        };
        for (field, rate) in [
            ("egress_bytes_per_second", egress_bytes_per_second),
            ("ingress_bytes_per_second", ingress_bytes_per_second),
        ] {
            if (1..MIN_RATE).contains(&rate) {
                return Err(RuleError::TooSlow { field, rate });
            }
        }
        Ok(Self {
            internet,
            allow: list("allow", allow)?,
            deny: list("deny", deny)?,
            egress_bytes_per_second,
            ingress_bytes_per_second,
        })
    }

    /// Whether any rule is a name.
    pub fn has_names(&self) -> bool {
        let mut all = self.allow.iter().chain(&self.deny);
        all.any(|rule| matches!(rule, Rule::Name(_)))
    }
}

/// The addresses of these rules as ranges, first and last, that neither overlap nor touch.
pub(super) fn ranges<'a>(nets: impl Iterator<Item = &'a Ipv4Net>) -> Vec<(u32, u32)> {
    let mut nets: Vec<(u32, u32)> = nets
        .map(|net| (net.network().to_bits(), net.broadcast().to_bits()))
        .collect();
    nets.sort_unstable();
    let mut merged: Vec<(u32, u32)> = Vec::new();
    for (first, last) in nets {
        match merged.last_mut() {
            Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
            _ => merged.push((first, last)),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(text: &str) -> Rule {
        text.parse().unwrap()
    }

    #[test]
    fn rules_are_addresses_networks_and_names() {
        for (text, shown) in [
            ("203.0.113.7", "203.0.113.7"),
            ("203.0.113.0/24", "203.0.113.0/24"),
            ("203.0.113.9/24", "203.0.113.0/24"),
            ("203.0.113.7/32", "203.0.113.7"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("Example.COM", "example.com"),
            ("example.com.", "example.com"),
            ("*.example.com", "*.example.com"),
            ("xn--bcher-kva.example", "xn--bcher-kva.example"),
            ("_dmarc.example.com", "_dmarc.example.com"),
            ("localhost", "localhost"),
        ] {
            assert_eq!(rule(text).to_string(), shown);
            assert_eq!(rule(shown).to_string(), shown, "a rule is its own text");
        }
        assert!(matches!(rule("10.0.0.0/8"), Rule::Net(_)));
        assert!(matches!(rule("*.10.example"), Rule::Name(_)));
    }

    #[test]
    fn what_is_no_rule_is_refused() {
        let long_label = format!("{}.example", "a".repeat(64));
        let long_name = ["a".repeat(60).as_str(); 5].join(".");
        for text in [
            "",
            ".",
            "*",
            "*.",
            "**.example.com",
            "a.*.example.com",
            "*example.com",
            "example..com",
            ".example.com",
            "exa mple.com",
            "example.com:443",
            "http://example.com",
            "bücher.example",
            "1.2.3",
            "1.2.3.256",
            "01.2.3.4",
            "10.0.0.0/33",
            "10.0.0.0/",
            "/8",
            "10.0.0.0/8/8",
            "example.com/24",
            "::1",
            "2001:db8::/32",
            long_label.as_str(),
            long_name.as_str(),
        ] {
            assert!(text.parse::<Rule>().is_err(), "{text:?} was taken");
        }
    }

    #[test]
    fn a_pattern_matches_whole_labels_only() {
        let matches = |pattern: &str, name: &[&str]| match rule(pattern) {
            Rule::Name(pattern) => pattern.matches(name.iter().map(|label| label.as_bytes())),
            Rule::Net(_) => panic!("{pattern} is a network"),
        };
        assert!(matches("example.com", &["example", "com"]));
        assert!(matches("example.com", &["EXAMPLE", "Com"]));
        assert!(!matches("example.com", &["www", "example", "com"]));
        assert!(!matches("example.com", &["badexample", "com"]));
        assert!(!matches("example.com", &["com"]));
        assert!(matches("*.example.com", &["www", "example", "com"]));
        assert!(matches("*.example.com", &["a", "b", "example", "com"]));
        assert!(!matches("*.example.com", &["example", "com"]));
        // A dot inside a label is not a border between labels.
        assert!(!matches("*.example.com", &["www.example", "com"]));
        assert!(!matches("example.com", &["example.com"]));
    }

    #[test]
    fn rules_of_a_request_are_bounded() {
        let many = |count| vec!["203.0.113.7".to_owned(); count];
        let parse = |allow: &[String], deny: &[String], rate| {
            NetworkRules::parse(true, allow, deny, rate, 0)
        };
        assert!(parse(&many(64), &many(64), 0).is_ok());
        assert_eq!(
            parse(&many(1), &many(65), 0),
            Err(RuleError::TooMany {
                list: "deny",
                count: 65
            })
        );
        assert!(parse(&[], &[], 1024).is_ok());
        assert!(matches!(
            parse(&[], &[], 1023),
            Err(RuleError::TooSlow { rate: 1023, .. })
        ));
    }

    #[test]
    fn rules_survive_the_journal() {
        let rules = NetworkRules {
            allow: vec![rule("*.example.com"), rule("10.0.0.0/8")],
            ..NetworkRules::internet(true)
        };
        let text = serde_json::to_string(&rules).unwrap();
        assert_eq!(serde_json::from_str::<NetworkRules>(&text).unwrap(), rules);
    }

    #[test]
    fn ranges_are_merged() {
        let nets: Vec<Ipv4Net> = [
            "10.1.0.0/16",
            "10.0.0.0/16",
            "10.0.3.0/24",
            "192.0.2.1/32",
            "255.255.255.0/24",
        ]
        .iter()
        .map(|net| net.parse().unwrap())
        .collect();
        assert_eq!(
            ranges(nets.iter()),
            [
                (0x0a00_0000, 0x0a01_ffff),
                (0xc000_0201, 0xc000_0201),
                (0xffff_ff00, 0xffff_ffff)
            ]
        );
        let all = "0.0.0.0/0".parse().unwrap();
        assert_eq!(ranges([&all, &nets[0]].into_iter()), [(0, u32::MAX)]);
    }
}
