//! What a request may hold. The gateway says so first, for all wrong fields at once; here nonsense is refused whoever asks.

use std::collections::HashMap;

use service_kit::errors::Failure;

const LABELS: usize = 64;
const LABEL_KEY: usize = 63;
const LABEL_VALUE: usize = 1024;
const LABELS_TOTAL: usize = 16 << 10;
const VARIABLES: usize = 256;
const VARIABLES_TOTAL: usize = 64 << 10;
const REQUEST_ID: usize = 128;
const TEMPLATE: usize = 200;

fn total(map: &HashMap<String, String>) -> usize {
    map.iter().map(|(key, value)| key.len() + value.len()).sum()
}

/// Labels, or a filter by labels.
pub(super) fn metadata(labels: &HashMap<String, String>) -> Result<(), Failure> {
    let fits = |(key, value): (&String, &String)| {
        (1..=LABEL_KEY).contains(&key.len()) && value.len() <= LABEL_VALUE
    };
    // Postgres keeps no NUL in text.
    let clean = |(key, value): (&String, &String)| !key.contains('\0') && !value.contains('\0');
    if labels.len() > LABELS || total(labels) > LABELS_TOTAL || !labels.iter().all(fits) {
        return Err(Failure::field_invalid(
            "metadata",
            "may hold at most 64 labels, keys of 1-63 bytes, values up to 1024 bytes, 16 KiB in all",
        ));
    }
    if !labels.iter().all(clean) {
        return Err(Failure::field_invalid("metadata", "must not hold NUL"));
    }
    Ok(())
}

/// Environment.
pub(super) fn env(variables: &HashMap<String, String>) -> Result<(), Failure> {
    let named = |name: &String| !name.is_empty() && !name.contains(['=', '\0']);
    if variables.len() > VARIABLES || total(variables) > VARIABLES_TOTAL {
        return Err(Failure::field_invalid(
            "env",
            "may hold at most 256 variables, 64 KiB in all",
        ));
    }
    if !variables.keys().all(named) || variables.values().any(|value| value.contains('\0')) {
        return Err(Failure::field_invalid(
            "env",
            "names must not be empty or hold `=`, and nothing may hold NUL",
        ));
    }
    Ok(())
}

/// The client's own ID; empty is none.
pub(super) fn request_id(id: &str) -> Result<(), Failure> {
    if id.len() <= REQUEST_ID && id.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Ok(());
    }
    Err(Failure::field_invalid(
        "request_id",
        "must be 1-128 bytes of printable ASCII without spaces",
    ))
}

/// A template's name, with tag or version.
pub(super) fn template(name: &str) -> Result<(), Failure> {
    if name.is_empty() {
        return Err(Failure::field_invalid("template", "is required"));
    }
    if name.len() > TEMPLATE || name.chars().any(char::is_control) {
        return Err(Failure::field_invalid(
            "template",
            "must be a name, name:tag or name@version",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(entries: impl IntoIterator<Item = (String, String)>) -> HashMap<String, String> {
        entries.into_iter().collect()
    }

    #[test]
    fn labels_have_limits() {
        let one = |key: &str, value: &str| metadata(&map([(key.to_owned(), value.to_owned())]));
        assert!(one(&"k".repeat(63), &"v".repeat(1024)).is_ok());
        assert!(one("k", "").is_ok());
        assert!(one("", "v").is_err());
        assert!(one(&"k".repeat(64), "v").is_err());
        assert!(one("k", &"v".repeat(1025)).is_err());
        assert!(one("k", "a\0b").is_err());
        let many = |count: usize, size: usize| {
            metadata(&map(
                (0..count).map(|i| (format!("{i:02}"), "v".repeat(size)))
            ))
        };
        assert!(many(64, 10).is_ok());
        assert!(many(65, 10).is_err());
        assert!(many(17, 1024).is_err());
    }

    #[test]
    fn environments_have_limits() {
        let one = |key: &str, value: &str| env(&map([(key.to_owned(), value.to_owned())]));
        assert!(one("PATH", "/bin").is_ok());
        assert!(one("", "x").is_err());
        assert!(one("A=B", "x").is_err());
        assert!(one("A", "x\0").is_err());
        assert!(one("A", &"x".repeat(64 << 10)).is_err());
        assert!(env(&map((0..257).map(|i| (i.to_string(), String::new())))).is_err());
    }

    #[test]
    fn request_ids_are_short_printable_ascii() {
        assert!(request_id("").is_ok());
        assert!(request_id(&"x".repeat(128)).is_ok());
        for wrong in ["a b", "ä", "a\n", &"x".repeat(129)] {
            assert!(request_id(wrong).is_err(), "{wrong:?}");
        }
    }
}
