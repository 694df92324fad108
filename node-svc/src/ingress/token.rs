//! A session's access token, as requests carry it.

use axum::body::Body;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use service_kit::errors::{Failure, Reason};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use tonic::Code;

use super::answer::Refusal;
use crate::hosted::Session;

/// Header of a protected port's token.
pub(super) const TOKEN_HEADER: &str = "x-sandmesh-token";
/// Cookie of it, and the query parameter that sets the cookie.
pub(super) const TOKEN_COOKIE: &str = "sandmesh_token";

fn matches(session: &Session, token: &str) -> bool {
    Sha256::digest(token)
        .as_slice()
        .ct_eq(&session.access_token_sha256)
        .into()
}

fn missing(what: &str) -> Refusal {
    Refusal::new(
        Failure::new(Code::Unauthenticated, Reason::CREDENTIALS_MISSING, what),
        401,
    )
}

pub(super) fn wrong() -> Refusal {
    let failure = Failure::new(
        Code::PermissionDenied,
        Reason::ACCESS_TOKEN_INVALID,
        "this is not the session's access token",
    );
    Refusal::new(failure, 403)
}

/// Streams carry it as `authorization: Bearer`.
pub(super) fn check_stream(session: &Session, headers: &HeaderMap) -> Result<(), Refusal> {
    let value = headers
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let Some(token) = value.strip_prefix("Bearer ") else {
        return Err(missing(
            "send the session's access token as authorization: Bearer <token>",
        ));
    };
    if matches(session, token) {
        Ok(())
    } else {
        Err(wrong())
    }
}

/// Requests for files carry it like streams, or like requests to a port.
pub(super) fn check_files(session: &Session, headers: &HeaderMap) -> Result<(), Refusal> {
    let token = headers.get(TOKEN_HEADER);
    match token.and_then(|value| value.to_str().ok()) {
        None => check_stream(session, headers),
        Some(token) if matches(session, token) => Ok(()),
        Some(_) => Err(wrong()),
    }
}

/// What a request to a protected port leads to.
pub(super) enum PortCheck {
    /// It may pass.
    Pass,
    /// It brought the token in its address: set the cookie, and come again without it.
    SetCookie(Response<Body>),
}

/// Protected ports take a header, a cookie, or, from a browser's first request, the address.
pub(super) fn check_port(session: &Session, request: &Request<Body>) -> Result<PortCheck, Refusal> {
    if let Some(token) = request
        .headers()
        .get(TOKEN_HEADER)
        .and_then(|value| value.to_str().ok())
    {
        return if matches(session, token) {
            Ok(PortCheck::Pass)
        } else {
            Err(wrong())
        };
    }
    if let Some(token) =
        cookies(request.headers()).find_map(|(name, value)| (name == TOKEN_COOKIE).then_some(value))
    {
        return if matches(session, token) {
            Ok(PortCheck::Pass)
        } else {
            Err(wrong())
        };
    }
    let query = request.uri().query().unwrap_or_default();
    let mut rest = Vec::new();
    let mut token = None;
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        match pair.split_once('=') {
            Some((TOKEN_COOKIE, value)) => token = Some(value),
            _ => rest.push(pair),
        }
    }
    let token = token.ok_or_else(|| {
        missing("this port needs the session's access token in header x-sandmesh-token")
    })?;
    if !matches(session, token) {
        return Err(wrong());
    }
    let path = request.uri().path();
    // Only ever back to this very host: a path that begins with two slashes would name another.
    let path = format!("/{}", path.trim_start_matches('/'));
    let location = if rest.is_empty() {
        path
    } else {
        format!("{path}?{}", rest.join("&"))
    };
    let cookie = format!("{TOKEN_COOKIE}={token}; Path=/; HttpOnly; SameSite=Lax");
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SEE_OTHER;
    for (name, value) in [(header::LOCATION, location), (header::SET_COOKIE, cookie)] {
        let value = HeaderValue::from_str(&value)
            .map_err(|_| missing("the address holds bytes that are not allowed"))?;
        response.headers_mut().insert(name, value);
    }
    Ok(PortCheck::SetCookie(response))
}

/// The guest never sees the token.
pub(super) fn strip(headers: &mut HeaderMap) {
    headers.remove(TOKEN_HEADER);
    let kept: Vec<String> = cookies(headers)
        .filter(|(name, _)| *name != TOKEN_COOKIE)
        .map(|(name, value)| {
            if value.is_empty() {
                name.to_owned()
            } else {
                format!("{name}={value}")
            }
        })
        .collect();
    let had = headers.remove(header::COOKIE).is_some();
    if had
        && !kept.is_empty()
        && let Ok(value) = HeaderValue::from_str(&kept.join("; "))
    {
        headers.insert(header::COOKIE, value);
    }
}

fn cookies(headers: &HeaderMap) -> impl Iterator<Item = (&str, &str)> {
    headers
        .get_all(header::COOKIE)
        .into_iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|line| line.split(';'))
        .map(|pair| {
            let pair = pair.trim();
            pair.split_once('=').unwrap_or((pair, ""))
        })
}

#[cfg(test)]
pub(super) mod tests {
    use proto::session::v1::{PortAccess, Resources};
    use service_kit::ids::{HomeTag, SessionId};

    use super::*;
    use crate::hosted::Settings;

    pub(in crate::ingress) fn session() -> Session {
        let id = SessionId::random(&HomeTag::random());
        Session::new(
            id,
            Sha256::digest("sst_right").to_vec(),
            Resources::default(),
            Settings {
                port_access: PortAccess::Token,
                wake_on_request: false,
            },
        )
        .0
    }

    fn request(uri: &str, name: &str, value: &str) -> Request<Body> {
        Request::builder()
            .uri(uri)
            .header(name, value)
            .body(Body::empty())
            .unwrap()
    }

    #[test]
    fn streams_need_the_right_bearer() {
        let session = session();
        let check = |value: &str| {
            check_stream(&session, request("/", "authorization", value).headers())
                .map_err(|r| r.label())
        };
        assert_eq!(check("Bearer sst_right"), Ok(()));
        assert_eq!(check("Bearer sst_wrong"), Err("ACCESS_TOKEN_INVALID"));
        assert_eq!(check("Basic sst_right"), Err("CREDENTIALS_MISSING"));
    }

    #[test]
    fn protected_ports_take_header_cookie_and_address() {
        let session = session();
        let passes = |request| matches!(check_port(&session, &request), Ok(PortCheck::Pass));
        assert!(passes(request("/", "x-sandmesh-token", "sst_right")));
        assert!(passes(request(
            "/",
            "cookie",
            "a=b; sandmesh_token=sst_right"
        )));
        assert!(!passes(request("/", "x-sandmesh-token", "sst_wrong")));
        assert!(!passes(request("/", "x", "y")));
        let Ok(PortCheck::SetCookie(response)) = check_port(
            &session,
            &request("//evil/x?a=1&sandmesh_token=sst_right&b=2", "x", "y"),
        ) else {
            panic!("the address was not taken")
        };
        assert_eq!(response.headers()["location"], "/evil/x?a=1&b=2");
        assert!(
            response.headers()["set-cookie"]
                .to_str()
                .unwrap()
                .contains("HttpOnly")
        );
    }

    #[test]
    fn the_guest_never_sees_the_token() {
        let mut headers = request("/", "cookie", "a=b; sandmesh_token=sst_right; c=d=e")
            .headers()
            .clone();
        headers.insert(TOKEN_HEADER, HeaderValue::from_static("sst_right"));
        strip(&mut headers);
        assert_eq!(headers.len(), 1);
        assert_eq!(headers["cookie"], "a=b; c=d=e");
    }
}
