//! Files by plain HTTP, for those without gRPC: the access token or a signed address lets them in, envd does the rest.
//!
//! What a guest answers is no more trusted than its files: of its headers only those of a file pass, and its refusals are told in this node's words.

use std::{borrow::Cow, sync::Arc, time::SystemTime};

use axum::body::Body;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, header};
use service_kit::{
    errors::{Failure, Reason, reason_of},
    file_url::{self, Key, Use},
};
use tonic::{Code, Status};

use super::{
    answer::Refusal,
    stream,
    token::{self, TOKEN_HEADER},
};
use crate::hosted::{Reach, Session};

/// Where all paths of files begin.
pub(super) const PREFIX: &str = "/files/";
const LONGEST_MESSAGE: usize = 1024;

/// What of a guest's headers is passed on.
const PASSED: [HeaderName; 9] = [
    header::ACCEPT_RANGES,
    header::CACHE_CONTROL,
    header::CONTENT_DISPOSITION,
    header::CONTENT_LENGTH,
    header::CONTENT_RANGE,
    header::CONTENT_TYPE,
    header::DATE,
    header::ETAG,
    header::LAST_MODIFIED,
];
/// What of a client's headers the guest sees.
const ASKED: [HeaderName; 11] = [
    header::ACCEPT,
    header::CONTENT_LENGTH,
    header::CONTENT_RANGE,
    header::CONTENT_TYPE,
    header::IF_MATCH,
    header::IF_MODIFIED_SINCE,
    header::IF_NONE_MATCH,
    header::IF_RANGE,
    header::IF_UNMODIFIED_SINCE,
    header::RANGE,
    header::USER_AGENT,
];

/// What envd's refusals are over HTTP.
const REFUSALS: [(Reason, u16); 19] = [
    (Reason::INVALID_ARGUMENT, 400),
    (Reason::new("PATH_INVALID"), 400),
    (Reason::new("ARCHIVE_INVALID"), 400),
    (Reason::new("ARCHIVE_ENTRY_REFUSED"), 400),
    (Reason::new("UPLOAD_BROKE_OFF"), 400),
    (Reason::new("PATH_PERMISSION_DENIED"), 403),
    (Reason::new("PATH_NOT_FOUND"), 404),
    (Reason::new("USER_UNKNOWN"), 404),
    (Reason::new("METHOD_NOT_ALLOWED"), 405),
    (Reason::new("PATH_EXISTS"), 409),
    (Reason::new("PATH_NOT_A_DIRECTORY"), 409),
    (Reason::new("PATH_IS_A_DIRECTORY"), 409),
    (Reason::new("PATH_NOT_A_FILE"), 409),
    (Reason::new("PATH_LINK_LOOP"), 409),
    (Reason::new("FILESYSTEM_READ_ONLY"), 409),
    (Reason::new("PRECONDITION_FAILED"), 412),
    (Reason::new("TOO_MANY_TRANSFERS"), 429),
    (Reason::new("SESSION_RESUMING"), 503),
    (Reason::new("DISK_FULL"), 507),
];

/// Whether a request is for files rather than a gRPC call.
pub(super) fn is_meant<B>(request: &Request<B>) -> bool {
    request.uri().path().starts_with(PREFIX)
}

/// Lets in who brings the session's access token, or a signed address; says what of the query is for the guest.
pub(super) fn check<'a, B>(
    session: &Session,
    request: &'a Request<B>,
) -> Result<Cow<'a, str>, Refusal> {
    let query = request.uri().query().unwrap_or_default();
    let is_signed = query.split('&').any(|pair| {
        pair.strip_prefix(file_url::SIGNATURE)
            .is_some_and(|rest| rest.starts_with('='))
    });
    let has_token = request.headers().contains_key(header::AUTHORIZATION)
        || request.headers().contains_key(TOKEN_HEADER);
    if has_token || !is_signed {
        token::check_files(session, request.headers())?;
        return Ok(query.into());
    }
    let what = if request.method() == Method::PUT {
        Use::Write
    } else {
        Use::Read
    };
    let key = Key::of_sha256(&session.access_token_sha256).ok_or_else(token::wrong)?;
    let now = SystemTime::now();
    match key.check(what, request.uri().path(), query, now) {
        Ok(rest) => Ok(rest.into()),
        Err(invalid) => Err(Refusal::new(
            Failure::new(
                Code::PermissionDenied,
                Reason::new("SIGNATURE_INVALID"),
                invalid.to_string(),
            ),
            403,
        )),
    }
}

/// Carries a request for a file.
pub(super) async fn carry(
    session: &Session,
    reach: &Arc<Reach>,
    mut request: Request<Body>,
) -> Result<Response<Body>, Refusal> {
    let query = check(session, &request)?;
    let path = request.uri().path();
    let address = if query.is_empty() {
        path.to_owned()
    } else {
        format!("{path}?{query}")
    };
    *request.headers_mut() = only(request.headers(), &ASKED);
    let answer = stream::pass(reach, request, address, false).await?;
    if let Some(status) = Status::from_header_map(answer.headers()) {
        return Err(refusal(&status));
    }
    let (mut head, body) = answer.into_parts();
    head.headers = only(&head.headers, &PASSED);
    for (name, value) in [
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        // A guest's file is no page of this host.
        (header::CONTENT_SECURITY_POLICY, "sandbox"),
    ] {
        head.headers.insert(name, HeaderValue::from_static(value));
    }
    Ok(Response::from_parts(head, body))
}

fn only(headers: &HeaderMap, names: &[HeaderName]) -> HeaderMap {
    let kept = names.iter().flat_map(|name| {
        let values = headers.get_all(name).into_iter();
        values.map(move |value| (name.clone(), value.clone()))
    });
    kept.collect()
}

fn refusal(status: &Status) -> Refusal {
    let said = reason_of(status).unwrap_or_default();
    let known = REFUSALS.iter().find(|(reason, _)| reason.as_str() == said);
    let (reason, http) = known
        .cloned()
        .unwrap_or((Reason::new("GUEST_REFUSED"), 502));
    let message: String = status.message().chars().take(LONGEST_MESSAGE).collect();
    let mut failure = Failure::new(status.code(), reason, message);
    if http == 503 {
        failure = failure.retry_after(std::time::Duration::from_secs(1));
    }
    Refusal::new(failure, http)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::ingress::token::tests::session;

    fn request(method: Method, address: &str, headers: &[(&str, &str)]) -> Request<()> {
        let mut request = Request::builder().method(method).uri(address);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap()
    }

    #[test]
    fn a_token_or_a_signed_address_lets_in() {
        let session = session();
        let check = |request: Request<()>| {
            check(&session, &request)
                .map(Cow::into_owned)
                .map_err(|refusal| refusal.label())
        };
        let get = |address: &str, headers: &[_]| check(request(Method::GET, address, headers));
        for headers in [
            [("authorization", "Bearer sst_right")],
            [("x-sandmesh-token", "sst_right")],
        ] {
            assert_eq!(get("/files/x?user=ada", &headers), Ok("user=ada".into()));
        }
        assert_eq!(get("/files/x", &[]), Err("CREDENTIALS_MISSING"));
        for headers in [
            [("authorization", "Bearer sst_wrong")],
            [("x-sandmesh-token", "sst_wrong")],
        ] {
            assert_eq!(get("/files/x", &headers), Err("ACCESS_TOKEN_INVALID"));
        }
        let soon = SystemTime::now() + Duration::from_mins(1);
        let key = Key::of_token("sst_right");
        let signed = key.sign(Use::Read, "/files/x", "archive=zip", soon);
        assert_eq!(get(&signed, &[]), Ok("archive=zip".into()));
        let head = request(Method::HEAD, &signed, &[]);
        assert_eq!(check(head), Ok("archive=zip".into()));
        let put = request(Method::PUT, &signed, &[]);
        assert_eq!(check(put), Err("SIGNATURE_INVALID"));
        // A wrong token is not made good by an address, and the other way round.
        let wrong = [("x-sandmesh-token", "sst_wrong")];
        assert_eq!(get(&signed, &wrong), Err("ACCESS_TOKEN_INVALID"));
        let over = key.sign(Use::Read, "/files/x", "", SystemTime::UNIX_EPOCH);
        assert_eq!(get(&over, &[]), Err("SIGNATURE_INVALID"));
    }

    #[test]
    fn what_a_guest_says_is_bounded() {
        let status = Status::new(Code::NotFound, "x".repeat(5000));
        let refusal = refusal(&status);
        assert_eq!(refusal.label(), "GUEST_REFUSED");
        let mut headers = HeaderMap::new();
        headers.insert(header::SET_COOKIE, HeaderValue::from_static("a=b"));
        headers.insert(header::ETAG, HeaderValue::from_static("\"x\""));
        assert_eq!(only(&headers, &PASSED).keys().len(), 1);
    }
}
