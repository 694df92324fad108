//! Addresses of files that anybody may use who has them, until they expire (docs/files.md).
//!
//! Whoever has a session's access token signs them without asking anybody; the node that hosts the session checks them. Signed are method, path and
//! every parameter, by HMAC-SHA256; the key is the SHA-256 of the access token, which is what a node has of it.

use std::time::{Duration, SystemTime};

use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::{Digest as _, Sha256};

/// Parameter with the second, counted from 1970, from which on it is of no use.
pub const EXPIRES: &str = "expires";
/// Parameter with the signature in hexadecimal; the last of all.
pub const SIGNATURE: &str = "signature";
/// The longest time an address may be of use.
pub const LONGEST: Duration = Duration::from_hours(7 * 24);

/// What the signature of an address is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// `GET` and `HEAD`.
    Read,
    /// `PUT`.
    Write,
}

/// Why an address is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// Not what was signed, or signed by another.
    #[error("the signature is not this session's for this method, path and parameters")]
    Forged,
    /// Its time is over.
    #[error("this address has expired")]
    Expired,
    /// Its time is longer than any may be.
    #[error("an address may be signed for 7 days at most")]
    TooLong,
}

/// Signs and checks addresses of one session's files.
pub struct Key([u8; 32]);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(..)")
    }
}

impl Key {
    /// Of who has the access token.
    pub fn of_token(token: &str) -> Self {
        Self(Sha256::digest(token).into())
    }

    /// Of who has its SHA-256; `None` if it is none.
    pub fn of_sha256(sha256: &[u8]) -> Option<Self> {
        Some(Self(sha256.try_into().ok()?))
    }

    /// A path with its parameters, signed. `path` is percent-encoded, `query` too and without a question mark.
    pub fn sign(&self, what: Use, path: &str, query: &str, expires: SystemTime) -> String {
        let expires = expires
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs();
        let separator = if query.is_empty() { "" } else { "&" };
        let address = format!("{path}?{query}{separator}{EXPIRES}={expires}");
        let signature = hex::encode(self.mac(what, &address).finalize().into_bytes());
        format!("{address}&{SIGNATURE}={signature}")
    }

    /// The parameters without those of the signature, if it is right.
    pub fn check<'a>(
        &self,
        what: Use,
        path: &str,
        query: &'a str,
        now: SystemTime,
    ) -> Result<&'a str, Invalid> {
        let (signed, signature) = query
            .rsplit_once('&')
            .and_then(|(signed, last)| {
                let signature = last.strip_prefix(SIGNATURE)?.strip_prefix('=')?;
                Some((signed, signature))
            })
            .ok_or(Invalid::Forged)?;
        let signature = hex::decode(signature).map_err(|_| Invalid::Forged)?;
        self.mac(what, &format!("{path}?{signed}"))
            .verify_slice(&signature)
            .map_err(|_| Invalid::Forged)?;
        // Only what was signed is worth a look.
        let (rest, expires) = signed.rsplit_once('&').unwrap_or(("", signed));
        let expires = expires
            .strip_prefix(EXPIRES)
            .and_then(|rest| rest.strip_prefix('=')?.parse().ok())
            .ok_or(Invalid::Forged)?;
        let expires = SystemTime::UNIX_EPOCH
            .checked_add(Duration::from_secs(expires))
            .ok_or(Invalid::TooLong)?;
        match expires.duration_since(now) {
            Err(_) => Err(Invalid::Expired),
            Ok(left) if left > LONGEST => Err(Invalid::TooLong),
            Ok(_) => Ok(rest),
        }
    }

    fn mac(&self, what: Use, address: &str) -> Hmac<Sha256> {
        #[allow(clippy::expect_used)] // HMAC takes keys of any length (RFC 2104)
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).expect("any length will do");
        mac.update(match what {
            Use::Read => b"sandmesh file\nGET\n",
            Use::Write => b"sandmesh file\nPUT\n",
        });
        mac.update(address.as_bytes());
        mac
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn an_address_is_of_use_for_what_it_was_signed_for_and_until_it_expires() {
        let key = Key::of_token("sst_a");
        for query in ["", "archive=zip", "a=1&b=2"] {
            let signed = key.sign(Use::Read, "/files/~/a%20b", query, at(1000));
            let (path, all) = signed.split_once('?').unwrap();
            let node = Key::of_sha256(&Sha256::digest("sst_a")).unwrap();
            let check = |key: &Key, what, path: &str, all: &str, now| {
                key.check(what, path, all, at(now)).map(str::to_owned)
            };
            assert_eq!(
                check(&node, Use::Read, path, all, 999),
                Ok(query.to_owned())
            );
            assert_eq!(
                check(&node, Use::Read, path, all, 1001),
                Err(Invalid::Expired)
            );
            for (key, what, path, all) in [
                (&Key::of_token("sst_b"), Use::Read, path, all.to_owned()),
                (&node, Use::Write, path, all.to_owned()),
                (&node, Use::Read, "/files/~/a", all.to_owned()),
                (
                    &node,
                    Use::Read,
                    path,
                    all.replace("expires=1000", "expires=9000"),
                ),
                (&node, Use::Read, path, format!("user=root&{all}")),
                (&node, Use::Read, path, format!("{all}&user=root")),
                (&node, Use::Read, path, all[..all.len() - 1].to_owned()),
                (&node, Use::Read, path, String::new()),
            ] {
                assert_eq!(
                    check(key, what, path, &all, 1),
                    Err(Invalid::Forged),
                    "{all}"
                );
            }
        }
        let signed = key.sign(Use::Write, "/files/x", "", at(8 * 24 * 3600));
        let (path, all) = signed.split_once('?').unwrap();
        assert_eq!(
            key.check(Use::Write, path, all, at(0)),
            Err(Invalid::TooLong)
        );
    }

    /// Whoever writes a client of their own can compare.
    #[test]
    fn the_documented_example_holds() {
        let key = Key::of_token("sst_example");
        let signed = key.sign(
            Use::Read,
            "/files/~/report.pdf",
            "user=ada",
            at(2_000_000_000),
        );
        assert_eq!(
            signed,
            "/files/~/report.pdf?user=ada&expires=2000000000&signature=\
             d831f318f64bb637eca822bb32026ec97e182e6810e6fa467387c8cb24458d57"
        );
    }

    proptest! {
        #[test]
        fn nothing_that_was_not_signed_passes(path in "\\PC{0,40}", query in "\\PC{0,80}") {
            let key = Key::of_token("sst_a");
            prop_assert_eq!(key.check(Use::Read, &path, &query, at(0)), Err(Invalid::Forged));
        }
    }
}
