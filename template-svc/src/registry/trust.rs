//! Where registries may lie. Whoever asks for a build says which registry, and a registry says where its blobs and its tokens are: without
//! a limit that would make template-svc ask the networks it lies in, or the host's metadata service.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use ipnet::{Ipv4Net, Ipv6Net};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use url::{Host, Url};

/// Between a look-up that failed and another.
const LOOK_UP_AGAIN: Duration = Duration::from_secs(1);
/// IPv4 addresses that are not of the public internet: IANA IPv4 Special-Purpose Address Registry, multicast and the reserved block.
const SPECIAL_V4: [Ipv4Net; 15] = [
    v4([0, 0, 0, 0], 8),
    v4([10, 0, 0, 0], 8),
    v4([100, 64, 0, 0], 10),
    v4([127, 0, 0, 0], 8),
    v4([169, 254, 0, 0], 16),
    v4([172, 16, 0, 0], 12),
    v4([192, 0, 0, 0], 24),
    v4([192, 0, 2, 0], 24),
    v4([192, 88, 99, 0], 24),
    v4([192, 168, 0, 0], 16),
    v4([198, 18, 0, 0], 15),
    v4([198, 51, 100, 0], 24),
    v4([203, 0, 113, 0], 24),
    v4([224, 0, 0, 0], 4),
    v4([240, 0, 0, 0], 4),
];
/// All that IANA has given out as global unicast (RFC 4291, 2.4); what carries an IPv4 address in it lies outside or is listed below.
const GLOBAL_V6: Ipv6Net = v6(0x2000_0000, 3);
/// Of these what is special (IANA IPv6 Special-Purpose Address Registry): IETF protocols with Teredo, documentation, 6to4.
const SPECIAL_V6: [Ipv6Net; 4] = [
    v6(0x2001_0000, 23),
    v6(0x2001_0db8, 32),
    v6(0x2002_0000, 16),
    v6(0x3fff_0000, 20),
];

const fn v4(octets: [u8; 4], prefix: u8) -> Ipv4Net {
    let [a, b, c, d] = octets;
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), prefix)
}

const fn v6(first: u32, prefix: u8) -> Ipv6Net {
    Ipv6Net::new_assert(Ipv6Addr::from_bits((first as u128) << 96), prefix)
}

fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => !SPECIAL_V4.iter().any(|net| net.contains(&address)),
        IpAddr::V6(address) => {
            GLOBAL_V6.contains(&address) && !SPECIAL_V6.iter().any(|net| net.contains(&address))
        }
    }
}

/// A registry the operator names: it may lie anywhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrustedRegistry {
    host: String,
    port: u16,
    /// HTTP without TLS.
    plain: bool,
}

/// Text that names no registry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no registry: write host, host:port, or http://host:port for one without TLS")]
pub struct MalformedRegistry(String);

impl FromStr for TrustedRegistry {
    type Err = MalformedRegistry;

    fn from_str(text: &str) -> Result<Self, MalformedRegistry> {
        let malformed = || MalformedRegistry(text.to_owned());
        let url = if text.contains("://") {
            text.to_owned()
        } else {
            format!("https://{text}")
        };
        let url = Url::parse(&url).map_err(|_| malformed())?;
        let is_bare = url.path() == "/"
            && url.query().is_none()
            && url.fragment().is_none()
            && url.username().is_empty()
            && url.password().is_none();
        match (url.host_str(), url.port_or_known_default(), url.scheme()) {
            (Some(host), Some(port), scheme @ ("http" | "https")) if is_bare => Ok(Self {
                host: host.to_owned(),
                port,
                plain: scheme == "http",
            }),
            _ => Err(malformed()),
        }
    }
}

impl fmt::Display for TrustedRegistry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.plain { "http" } else { "https" };
        write!(f, "{scheme}://{}:{}", self.host, self.port)
    }
}

/// An address that is not asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0} is not asked: only registries on public addresses are, by HTTPS, and those the operator trusts (--trusted-registries)"
)]
pub(super) struct Forbidden(pub(super) String);

/// A name that has no address.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Unresolved(String);

/// Who may be asked.
#[derive(Debug, Clone, Default)]
pub(super) struct Trust {
    trusted: Arc<[TrustedRegistry]>,
}

impl Trust {
    pub(super) fn new(trusted: &[TrustedRegistry]) -> Self {
        Self {
            trusted: trusted.into(),
        }
    }

    /// Where the registry of that name is asked.
    pub(super) fn base(&self, registry: &str) -> Result<Url, Forbidden> {
        let named = |scheme| Url::parse(&format!("{scheme}://{registry}/"));
        let (Ok(secure), Ok(plain)) = (named("https"), named("http")) else {
            return Err(Forbidden(registry.to_owned()));
        };
        let is_plain = self.trusted.iter().any(|one| {
            one.plain
                && Some(one.host.as_str()) == plain.host_str()
                && Some(one.port) == plain.port_or_known_default()
        });
        let url = if is_plain { plain } else { secure };
        self.check(&url)?;
        Ok(url)
    }

    /// Whether a URL may be asked; names are looked at again when they are resolved.
    pub(super) fn check(&self, url: &Url) -> Result<(), Forbidden> {
        let host = url.host_str().unwrap_or_default();
        let of_host: Vec<_> = self.trusted.iter().filter(|one| one.host == host).collect();
        let is_allowed = if of_host.is_empty() {
            url.scheme() == "https"
                && match url.host() {
                    Some(Host::Ipv4(address)) => is_public(address.into()),
                    Some(Host::Ipv6(address)) => is_public(address.into()),
                    Some(Host::Domain(_)) => true,
                    None => false,
                }
        } else {
            // Of such a host nothing else is asked: its name may resolve to any address.
            let scheme = |one: &TrustedRegistry| if one.plain { "http" } else { "https" };
            of_host.iter().any(|one| {
                Some(one.port) == url.port_or_known_default() && scheme(one) == url.scheme()
            })
        };
        if is_allowed {
            Ok(())
        } else {
            Err(Forbidden(shown(url)))
        }
    }
}

/// Where somebody sends us, as nobody in particular.
pub(super) fn without_login(mut url: Url) -> Url {
    // Of a URL that cannot have any, there is nothing to remove.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url
}

/// A URL without what may be secret in it: signed ones have it in their query.
pub(super) fn shown(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    match url.port() {
        Some(port) => format!("{}://{host}:{port}", url.scheme()),
        None => format!("{}://{host}", url.scheme()),
    }
}

/// Resolves as the system does, and leaves out what may not be asked; what is connected to is what was looked at here.
impl Resolve for Trust {
    fn resolve(&self, name: Name) -> Resolving {
        let trust = self.clone();
        Box::pin(async move {
            let host = name.as_str();
            let found = match tokio::net::lookup_host((host, 0)).await {
                Err(_) => {
                    tokio::time::sleep(LOOK_UP_AGAIN).await;
                    tokio::net::lookup_host((host, 0)).await
                }
                found => found,
            };
            let found = found.map_err(|error| Unresolved(error.to_string()))?;
            let found: Vec<SocketAddr> = found.collect();
            let is_trusted = trust.trusted.iter().any(|one| one.host == host);
            let (allowed, others): (Vec<_>, Vec<_>) = found
                .into_iter()
                .partition(|address| is_trusted || is_public(address.ip()));
            match (allowed.as_slice(), others.as_slice()) {
                ([], [other, ..]) => {
                    // Who asks is not told what is where in the operator's networks.
                    tracing::warn!(host, address = %other.ip(), "a registry's name leads to an address that is not asked");
                    Err(Forbidden(host.to_owned()).into())
                }
                _ => Ok(Box::new(allowed.into_iter()) as Addrs),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn trust(registries: &[&str]) -> Trust {
        let parsed: Vec<_> = registries.iter().map(|it| it.parse().unwrap()).collect();
        Trust::new(&parsed)
    }

    #[rstest]
    #[case("8.8.8.8", true)]
    #[case("127.0.0.1", false)]
    #[case("10.1.2.3", false)]
    #[case("100.64.0.1", false)]
    #[case("169.254.169.254", false)]
    #[case("172.31.255.255", false)]
    #[case("172.32.0.1", true)]
    #[case("192.168.0.1", false)]
    #[case("0.0.0.0", false)]
    #[case("224.0.0.1", false)]
    #[case("255.255.255.255", false)]
    #[case("2606:4700::1111", true)]
    #[case("::1", false)]
    #[case("::", false)]
    #[case("::ffff:127.0.0.1", false)]
    #[case("::ffff:8.8.8.8", false)]
    #[case("64:ff9b::7f00:1", false)]
    #[case("2002:7f00:1::", false)]
    #[case("2001::1", false)]
    #[case("fe80::1", false)]
    #[case("fd00::1", false)]
    #[case("ff02::1", false)]
    fn public_addresses(#[case] address: &str, #[case] expected: bool) {
        assert_eq!(is_public(address.parse().unwrap()), expected);
    }

    #[rstest]
    #[case("https://registry.example/v2/", true)]
    #[case("http://registry.example/v2/", false)]
    #[case("https://169.254.169.254/latest", false)]
    #[case("https://2852039166/latest", false)]
    #[case("https://0x7f.1/", false)]
    #[case("https://[::1]/", false)]
    #[case("https://[::ffff:169.254.169.254]/", false)]
    #[case("ftp://registry.example/", false)]
    #[case("http://127.0.0.1:5000/v2/", true)]
    #[case("https://127.0.0.1:5000/v2/", false)]
    #[case("http://127.0.0.1:5001/v2/", false)]
    #[case("https://inside.example:8443/", true)]
    #[case("https://inside.example/", false)]
    fn only_what_may_be_asked_is(#[case] url: &str, #[case] expected: bool) {
        let trust = trust(&["http://127.0.0.1:5000", "inside.example:8443"]);
        assert_eq!(trust.check(&Url::parse(url).unwrap()).is_ok(), expected);
    }

    #[tokio::test]
    async fn names_are_looked_at_when_they_are_resolved() {
        let resolved = |trust: Trust| async move {
            let resolved = trust.resolve("localhost".parse().unwrap()).await;
            resolved.map(Iterator::count)
        };
        let refused = resolved(trust(&[])).await.unwrap_err();
        assert!(refused.is::<Forbidden>(), "{refused}");
        assert!(resolved(trust(&["http://localhost:5000"])).await.unwrap() > 0);
    }

    #[test]
    fn registries_are_asked_where_the_operator_says() {
        let trust = trust(&[
            "http://localhost:5000",
            "inside.example",
            "http://old.example",
        ]);
        let base = |registry| trust.base(registry).map(|url| url.to_string());
        assert_eq!(base("localhost:5000").unwrap(), "http://localhost:5000/");
        assert_eq!(base("inside.example").unwrap(), "https://inside.example/");
        assert_eq!(base("quay.io").unwrap(), "https://quay.io/");
        for old in ["old.example", "old.example:80"] {
            assert_eq!(base(old).unwrap(), "http://old.example/");
        }
        assert!(base("old.example:443").is_err());
        assert!(base("127.0.0.1:5000").is_err());
        assert!(base("localhost:5001").is_err());
    }

    #[rstest]
    #[case("http://localhost:5000/v2")]
    #[case("http://user@localhost")]
    #[case("ftp://localhost")]
    #[case("")]
    #[case("a b")]
    fn what_names_no_registry(#[case] text: &str) {
        assert!(text.parse::<TrustedRegistry>().is_err());
    }
}
