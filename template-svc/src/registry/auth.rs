//! Who a registry takes us for: nobody, a name with a password, or the bearer of a token it sends us to fetch (distribution's "Token
//! Authentication Specification").

use http_auth::{ChallengeParser, ChallengeRef};
use reqwest::header::{HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use serde::Deserialize;
use url::Url;

use super::RegistryError;

/// A name and a password, or a token in its place, for one registry.
#[derive(Clone, PartialEq, Eq)]
pub struct Login {
    /// The name.
    pub username: String,
    /// The password.
    pub password: String,
}

impl std::fmt::Debug for Login {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Login")
            .field("username", &self.username)
            .finish_non_exhaustive()
    }
}

/// What a registry wants of who asks it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    /// A name and a password with each request (RFC 7617).
    Basic,
    /// A token, which is given there.
    Token(Url),
}

/// Of what a registry wants, what we know.
pub(super) fn challenge(
    headers: &HeaderMap,
    base: &Url,
    repository: &str,
) -> Result<Challenge, RegistryError> {
    let unknown = || RegistryError::Protocol {
        what: "it asks for credentials in a way that is not known".into(),
    };
    let mut is_basic = false;
    for value in headers.get_all(WWW_AUTHENTICATE) {
        // What does not parse is no reason to overlook what does.
        let text = value.to_str().unwrap_or_default();
        for challenge in ChallengeParser::new(text).map_while(Result::ok) {
            if challenge.scheme.eq_ignore_ascii_case("Bearer") {
                let of = |name| parameter(&challenge, name);
                let realm = of("realm").ok_or_else(unknown)?;
                let url = base.join(&realm).map_err(|_| unknown())?;
                let mut url = super::trust::without_login(url);
                let scope = of("scope").unwrap_or_else(|| format!("repository:{repository}:pull"));
                let mut query = url.query_pairs_mut();
                if let Some(service) = of("service") {
                    query.append_pair("service", &service);
                }
                query.append_pair("scope", &scope);
                drop(query);
                return Ok(Challenge::Token(url));
            }
            is_basic |= challenge.scheme.eq_ignore_ascii_case("Basic");
        }
    }
    if is_basic {
        Ok(Challenge::Basic)
    } else {
        Err(unknown())
    }
}

fn parameter(challenge: &ChallengeRef<'_>, name: &str) -> Option<String> {
    let mut named = challenge.params.iter();
    let (_, value) = named.find(|(key, _)| key.eq_ignore_ascii_case(name))?;
    Some(value.to_unescaped())
}

#[derive(Deserialize)]
struct Answer {
    token: Option<String>,
    access_token: Option<String>,
}

/// The header that bears the token of an answer.
pub(super) fn bearer(answer: &[u8]) -> Result<HeaderValue, RegistryError> {
    let token = serde_json::from_slice::<Answer>(answer)
        .ok()
        .and_then(|answer| {
            let named = [answer.token, answer.access_token].into_iter().flatten();
            named.into_iter().find(|token| !token.is_empty())
        })
        .and_then(|token| HeaderValue::from_str(&format!("Bearer {token}")).ok());
    let mut token = token.ok_or_else(|| RegistryError::Protocol {
        what: "where it gives its tokens, none came".into(),
    })?;
    token.set_sensitive(true);
    Ok(token)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn challenged(values: &[&str]) -> Result<Challenge, RegistryError> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(WWW_AUTHENTICATE, value.parse().unwrap());
        }
        let base = Url::parse("https://registry.example/").unwrap();
        challenge(&headers, &base, "team/app")
    }

    #[test]
    fn challenges_as_registries_write_them() {
        let hub = r#"Bearer realm="https://auth.example/token",service="registry.example",scope="repository:team/app:pull""#;
        let url = "https://auth.example/token?service=registry.example&scope=repository%3Ateam%2Fapp%3Apull";
        let token = |url: &str| Challenge::Token(Url::parse(url).unwrap());
        assert_eq!(challenged(&[hub]).unwrap(), token(url));
        assert_eq!(
            challenged(&["Basic realm=\"x\"", "bearer realm=\"/token\""]).unwrap(),
            token("https://registry.example/token?scope=repository%3Ateam%2Fapp%3Apull")
        );
        assert_eq!(
            challenged(&["Basic realm=\"x\""]).unwrap(),
            Challenge::Basic
        );
        assert_eq!(
            challenged(&["Negotiate TlRMTVNTUAAB==", "Basic realm=\"x\""]).unwrap(),
            Challenge::Basic
        );
        for none in [
            &["Digest realm=\"x\""][..],
            &[],
            &["Bearer service=\"x\""],
            &["\"\""],
        ] {
            assert!(challenged(none).is_err(), "{none:?}");
        }
    }

    #[test]
    fn tokens_have_two_names() {
        for answer in [
            r#"{"token": "t"}"#,
            r#"{"access_token": "t", "expires_in": 60}"#,
            r#"{"token": "", "access_token": "t"}"#,
        ] {
            assert_eq!(bearer(answer.as_bytes()).unwrap(), "Bearer t");
        }
        for none in ["", "{}", r#"{"token": "a\nb"}"#] {
            assert!(bearer(none.as_bytes()).is_err(), "{none}");
        }
    }

    #[test]
    fn a_login_does_not_tell() {
        let login = Login {
            username: "me".into(),
            password: "hidden".into(),
        };
        assert!(!format!("{login:?}").contains("hidden"));
    }
}
