//! What clients and operators do, one file per noun.

pub(crate) mod checkpoint;
pub(crate) mod cp;
pub(crate) mod exec;
pub(crate) mod files;
pub(crate) mod kernel;
pub(crate) mod key;
pub(crate) mod logs;
pub(crate) mod node;
pub(crate) mod ports;
pub(crate) mod process;
pub(crate) mod session;
pub(crate) mod template;
pub(crate) mod top;
pub(crate) mod url;

use std::time::Duration;

/// `K=V` as a pair.
pub(crate) fn pair(text: &str) -> Result<(String, String), String> {
    text.split_once('=')
        .filter(|(key, _)| !key.is_empty())
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .ok_or_else(|| format!("`{text}` is not NAME=VALUE"))
}

/// A duration on the wire.
pub(crate) fn wire(duration: Duration) -> Option<prost_types::Duration> {
    prost_types::Duration::try_from(duration).ok()
}
