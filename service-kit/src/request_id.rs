//! The ID of a request, for people to quote: made at the public door, carried in `x-request-id` through every hop.

use rand::RngExt as _;

/// Header and metadata name.
pub const HEADER: &str = "x-request-id";

tokio::task_local! {
    static CURRENT: String;
}

/// The ID of the request this task works for.
pub fn current() -> Option<String> {
    CURRENT.try_with(Clone::clone).ok()
}

/// Runs a future as work for a request.
pub async fn scope<F: Future>(id: String, work: F) -> F::Output {
    CURRENT.scope(id, work).await
}

/// A new ID.
pub fn random() -> String {
    format!("{:032x}", rand::rng().random::<u128>())
}

/// The ID in a header if it is sane (1-64 printable ASCII characters without spaces), else a new one.
pub fn from_headers(headers: &http::HeaderMap) -> String {
    headers
        .get(HEADER)
        .and_then(|value| value.to_str().ok())
        .filter(|text| (1..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic()))
        .map_or_else(random, str::to_owned)
}
