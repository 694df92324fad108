//! Entries of a session's egress lists, as the door, session-svc and nodes must agree on them.

use std::net::Ipv4Addr;

/// How many entries a list may have.
pub const MOST_ENTRIES: usize = 64;
/// Bytes per second below which a limit makes no sense; 0 is none.
pub const LEAST_RATE: u64 = 1024;
/// RFC 1035, 2.3.4.
const NAME: usize = 253;
const LABEL: usize = 63;

/// Where to: an entry that makes sense.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// The addresses that begin with so many bits of this one; a single address has 32.
    Network(Ipv4Addr, u8),
    /// A domain name, in lower case.
    Domain(String),
    /// All names below a domain, in lower case.
    Below(String),
}

/// Text that is not an entry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MalformedEntry {
    /// Neither of the three.
    #[error("`{0}` is not an IPv4 network, an address, a domain name or *. and a domain name")]
    Unknown(String),
    /// More bits than the prefix says.
    #[error("`{0}` is not a network: its address goes on after the prefix; did you mean {1}?")]
    NotANetwork(String, String),
}

impl Entry {
    /// Accepts `203.0.113.0/24`, `203.0.113.7`, `example.com` and `*.example.com`.
    pub fn parse(text: &str) -> Result<Self, MalformedEntry> {
        let unknown = || MalformedEntry::Unknown(text.chars().take(NAME).collect());
        if let Some((address, bits)) = text.split_once('/') {
            let address: Ipv4Addr = address.parse().map_err(|_| unknown())?;
            let digits = (1..=2).contains(&bits.len()) && bits.bytes().all(|b| b.is_ascii_digit());
            let bits: u8 = bits.parse().map_err(|_| unknown())?;
            if !digits || bits > 32 {
                return Err(unknown());
            }
            let mask = u32::MAX.checked_shl(32 - u32::from(bits)).unwrap_or(0);
            let network = Ipv4Addr::from_bits(address.to_bits() & mask);
            if network != address {
                let meant = format!("{network}/{bits}");
                return Err(MalformedEntry::NotANetwork(text.to_owned(), meant));
            }
            return Ok(Self::Network(address, bits));
        }
        if let Ok(address) = text.parse() {
            return Ok(Self::Network(address, 32));
        }
        let name = text.to_ascii_lowercase();
        if let Some(domain) = name.strip_prefix("*.").filter(|domain| is_domain(domain)) {
            return Ok(Self::Below(domain.to_owned()));
        }
        if is_domain(&name) {
            return Ok(Self::Domain(name));
        }
        Err(unknown())
    }
}

fn is_domain(name: &str) -> bool {
    let is_label = |label: &str| {
        (1..=LABEL).contains(&label.len())
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    // A last label of digits is an address that is wrong, not a name.
    let last_is_number = name
        .rsplit('.')
        .next()
        .is_some_and(|last| last.bytes().all(|b| b.is_ascii_digit()));
    name.len() <= NAME && name.split('.').all(is_label) && !last_is_number
}

impl std::fmt::Display for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Network(address, 32) => write!(f, "{address}"),
            Self::Network(address, bits) => write!(f, "{address}/{bits}"),
            Self::Domain(name) => f.write_str(name),
            Self::Below(domain) => write!(f, "*.{domain}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_addresses_and_names_are_entries() {
        for (text, again) in [
            ("203.0.113.0/24", "203.0.113.0/24"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("203.0.113.7", "203.0.113.7"),
            ("203.0.113.7/32", "203.0.113.7"),
            ("Example.COM", "example.com"),
            ("*.Example.com", "*.example.com"),
            ("xn--bcher-kva.example", "xn--bcher-kva.example"),
            ("_dmarc.example.com", "_dmarc.example.com"),
            ("internal", "internal"),
        ] {
            assert_eq!(Entry::parse(text).unwrap().to_string(), again);
        }
    }

    #[test]
    fn nothing_else_is() {
        for text in [
            "",
            "*",
            "*.",
            "*.*.example.com",
            "a.*.com",
            "203.0.113.0/33",
            "203.0.113.0/",
            "203.0.113.0/+8",
            "203.0.113.0/024",
            "300.1.1.1",
            "1.2.3",
            "::1",
            "2001:db8::/32",
            "example.com.",
            "-a.com",
            "a-.com",
            "ex ample.com",
            "http://example.com",
            "example.com:443",
            "b\u{fc}cher.example",
            &"a".repeat(64),
            &["a".repeat(60).as_str(); 5].join("."),
        ] {
            assert!(Entry::parse(text).is_err(), "{text}");
        }
        let host_bits = Entry::parse("10.1.2.3/8").unwrap_err();
        assert!(host_bits.to_string().contains("10.0.0.0/8"), "{host_bits}");
    }
}
