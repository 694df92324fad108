//! What the benches share.

use std::time::Duration;

/// What is asked for by name; flags are cargo's.
pub fn arguments() -> Vec<String> {
    let arguments = std::env::args().skip(1);
    arguments.filter(|name| !name.starts_with('-')).collect()
}

/// Whether a part is asked for: by name, or because nothing is named.
pub fn is_wanted(named: &[String], part: &str) -> bool {
    named.is_empty() || named.iter().any(|name| name == part)
}

/// What so many percent of the values are below; puts them in order.
pub fn percentile(values: &mut [Duration], percent: usize) -> Duration {
    values.sort();
    values[(values.len() - 1) * percent / 100]
}

/// As a number, to be printed.
pub fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}
