//! Where a service listens or is found: `host:port` or `unix:/path`.

use std::{fmt, path::PathBuf, str::FromStr};

/// A TCP or unix-socket address.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Address {
    /// `host:port`; port 0 lets the kernel choose when binding.
    Tcp(String),
    /// `unix:/absolute/path`, at most 107 bytes (unix(7)).
    Unix(PathBuf),
}

/// Text that is not an address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not an address: use host:port or unix:/absolute/path (at most 107 bytes)")]
pub struct MalformedAddress(String);

impl FromStr for Address {
    type Err = MalformedAddress;

    fn from_str(text: &str) -> Result<Self, MalformedAddress> {
        let malformed = || MalformedAddress(text.to_owned());
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.starts_with('/') && path.len() <= 107 {
                Ok(Self::Unix(path.into()))
            } else {
                Err(malformed())
            };
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(malformed)?;
        if host.is_empty() || host.contains('/') || port.parse::<u16>().is_err() {
            return Err(malformed());
        }
        Ok(Self::Tcp(text.to_owned()))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => f.write_str(address),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl serde::Serialize for Address {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Address {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_parse_and_print_the_same() {
        for text in [
            "127.0.0.1:0",
            "[::1]:80",
            "node-7.internal:9000",
            "unix:/run/sandmesh/a.sock",
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "80",
            "host:",
            "host:70000",
            ":1",
            "unix:relative",
            "http://a:1",
        ] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }
}
