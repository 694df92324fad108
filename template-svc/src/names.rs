//! How templates are named: `name`, `name:tag` or `name@version`. Pure.

pub use service_kit::templates::{hidden, is_hidden};

/// A reference to a template version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TemplateRef {
    /// The name.
    pub name: String,
    /// Which version of it.
    pub which: Which,
}

/// Which version of a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Which {
    /// The one a tag points at; `latest` when none is said.
    Tag(String),
    /// This one.
    Version(u64),
}

/// Text that names no template.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("must be name, name:tag or name@version, each name and tag 1-63 characters [a-z0-9._-]")]
pub struct MalformedRef;

/// Whether text is a template name or tag.
pub fn is_name(text: &str) -> bool {
    (1..=63).contains(&text.len())
        && text.bytes().all(|b| {
            b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'_' | b'-')
        })
}

impl TemplateRef {
    /// Parses.
    pub fn parse(text: &str) -> Result<Self, MalformedRef> {
        let (name, which) = if let Some((name, version)) = text.split_once('@') {
            (
                name,
                Which::Version(
                    version
                        .parse()
                        .ok()
                        .filter(|version| *version > 0)
                        .ok_or(MalformedRef)?,
                ),
            )
        } else if let Some((name, tag)) = text.split_once(':') {
            (name, Which::Tag(tag.to_owned()))
        } else {
            (text, Which::Tag("latest".to_owned()))
        };
        let tag_fits = !matches!(&which, Which::Tag(tag) if !is_name(tag));
        if (is_name(name) || is_hidden(name)) && tag_fits {
            Ok(Self {
                name: name.to_owned(),
                which,
            })
        } else {
            Err(MalformedRef)
        }
    }
}

/// The known names most like the one asked for, closest first, three at most.
pub fn closest(asked: &str, known: &[String]) -> Vec<String> {
    let mut scored: Vec<(f64, &String)> = known
        .iter()
        .map(|name| (strsim::jaro_winkler(asked, name), name))
        .filter(|(score, _)| *score > 0.6)
        .collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| a.1.cmp(b.1)));
    scored
        .into_iter()
        .take(3)
        .map(|(_, name)| name.clone())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_parse() {
        let parsed = |text| TemplateRef::parse(text).map(|r| (r.name, r.which));
        assert_eq!(
            parsed("base"),
            Ok(("base".into(), Which::Tag("latest".into())))
        );
        assert_eq!(
            parsed("base:v1.2"),
            Ok(("base".into(), Which::Tag("v1.2".into())))
        );
        assert_eq!(parsed("base@3"), Ok(("base".into(), Which::Version(3))));
        for text in [
            "", "Base", "a b", "base:", "base@", "base@0", "base@-1", "base@x", "a:b:c", "../etc",
        ] {
            assert_eq!(TemplateRef::parse(text), Err(MalformedRef), "{text}");
        }
    }

    #[test]
    fn the_closest_names_come_first() {
        let known = ["base", "bases", "python", "node"].map(String::from);
        assert_eq!(
            closest("bsae", &known).first().map(String::as_str),
            Some("base")
        );
        assert!(closest("zzzz", &known).is_empty());
    }
}
