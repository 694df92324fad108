//! What nodes and template-svc both know of templates.

use std::collections::BTreeMap;

use prost::Message as _;
use proto::template::v1::Template;

/// Begins names of what builds use between them; nobody can give a template such a name.
const HIDDEN: &str = "build/";

/// The name of what builds use, by 64 hexadecimal characters.
pub fn hidden(digest: &str) -> String {
    format!("{HIDDEN}{}", digest.chars().take(40).collect::<String>())
}

/// Whether it is such a name.
pub fn is_hidden(name: &str) -> bool {
    let digits = name.strip_prefix(HIDDEN).unwrap_or_default();
    (1..=63).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Says, in hexadecimal, what a snapshot of a template is of, besides its root, its size, and what made it: those of two templates that say the same serve both.
pub fn snapshot_of(template: &Template) -> String {
    let mut hasher = blake3::Hasher::new();
    for artifact in [&template.kernel, &template.modules] {
        let digest = artifact.as_ref().map_or("", |artifact| &artifact.digest);
        hasher.update(digest.as_bytes());
        hasher.update(b"\n");
    }
    if !template.kernel_arguments.is_empty() {
        hasher.update(template.kernel_arguments.as_bytes());
        hasher.update(b"\n");
    }
    if let Some(start) = &template.start {
        // What it begins with.
        let env: BTreeMap<_, _> = template.env.iter().collect();
        // And whose: what a program makes up at its start, such as a password, is its team's.
        let rest = format!("{:?} {env:?} {:?}\n", template.team, template.default_user);
        hasher.update(rest.as_bytes());
        hasher.update(&start.encode_to_vec());
    }
    hasher.finalize().to_hex().to_string()
}

#[cfg(test)]
mod tests {
    use proto::template::v1::StartCommand;

    use super::*;

    #[test]
    fn what_runs_in_a_snapshot_counts_and_what_that_runs_in() {
        let mut template = Template {
            env: [("A".to_owned(), "1".to_owned())].into(),
            ..Template::default()
        };
        let plain = snapshot_of(&template);
        assert_eq!(plain, snapshot_of(&Template::default()));
        template.start = Some(StartCommand::default());
        let started = snapshot_of(&template);
        template.team = "other".into();
        let others = snapshot_of(&template);
        template.env.clear();
        assert!(started != plain && others != started && snapshot_of(&template) != others);
    }

    #[test]
    fn hidden_names_are_nobodys() {
        let name = hidden(&"ab".repeat(32));
        assert!(is_hidden(&name) && name.len() == HIDDEN.len() + 40);
        assert!(!is_hidden("build/") && !is_hidden("a/build/1") && !is_hidden("build/x"));
    }
}
