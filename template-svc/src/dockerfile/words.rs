//! Words of Dockerfiles: quotes, escapes, variables (Dockerfile reference, "Environment replacement"), and here-documents within commands.

use std::{collections::BTreeMap, iter::Peekable, str::Chars};

/// Of what a variable's default holds: others in it, and so on.
const DEEPEST: u32 = 16;

/// A word that is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WordError {
    /// A quote has no end.
    #[error("expected a closing quote {0}")]
    Quote(char),
    /// A brace has no end.
    #[error("expected }} after ${{{0}")]
    Brace(String),
    /// Another form of variable than is known.
    #[error("${{{0}...}} is not known: only :- :+ :? and - + ? are")]
    Modifier(String),
    /// `${name:?message}` of one that is not set.
    #[error("{name}: {message}")]
    Missing {
        /// Which.
        name: String,
        /// As it stands there.
        message: String,
    },
    /// No `name=value`.
    #[error("expected name=value in place of {0:?}")]
    Pair(String),
    /// Variables in variables without end.
    #[error("variables in each other, more than {DEEPEST} deep")]
    Deep,
}

type Text<'a> = Peekable<Chars<'a>>;
type Variables = BTreeMap<String, String>;

/// Takes words apart.
#[derive(Debug, Clone, Copy)]
pub struct Lexer {
    /// `\`, or what the file says in its `escape` directive.
    pub escape: char,
}

impl Lexer {
    /// An instruction on one line: what the escape at a line's end goes on with, without comments and empty lines between.
    pub fn joined(self, raw: &str) -> String {
        let mut joined = String::new();
        let mut goes_on = false;
        for line in raw.lines() {
            let is_nothing = line.trim().is_empty() || line.trim_start().starts_with('#');
            if goes_on && is_nothing {
                continue;
            }
            let end = line.trim_end();
            match end.strip_suffix(self.escape) {
                Some(part) => {
                    joined.push_str(part);
                    goes_on = true;
                }
                None => joined.push_str(line),
            }
        }
        joined
    }

    /// One word, whatever blanks are in it.
    pub fn word(self, raw: &str, variables: &Variables) -> Result<String, WordError> {
        let mut text = raw.trim().chars().peekable();
        let word = self.piece(&mut text, variables, |_| false, 0)?;
        Ok(word)
    }

    /// `name=value ...`, or a name and one value after a blank.
    pub fn pairs(
        self,
        raw: &str,
        variables: &Variables,
    ) -> Result<Vec<(String, String)>, WordError> {
        let raw = raw.trim();
        let first = raw.split(char::is_whitespace).next().unwrap_or_default();
        if !first.contains('=') {
            let (name, value) = raw
                .split_once(char::is_whitespace)
                .ok_or_else(|| WordError::Pair(raw.to_owned()))?;
            return Ok(vec![(name.to_owned(), self.word(value, variables)?)]);
        }
        let pair = |word: String| match word.split_once('=') {
            Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
            _ => Err(WordError::Pair(word)),
        };
        self.words(raw, variables)?.into_iter().map(pair).collect()
    }

    /// `name` or `name=default`, several.
    pub fn arguments(
        self,
        raw: &str,
        variables: &Variables,
    ) -> Result<Vec<(String, Option<String>)>, WordError> {
        let argument = |word: String| match word.split_once('=') {
            Some(("", _)) => Err(WordError::Pair(word)),
            Some((name, default)) => Ok((name.to_owned(), Some(default.to_owned()))),
            None => Ok((word, None)),
        };
        let words = self.words(raw, variables)?;
        words.into_iter().map(argument).collect()
    }

    fn words(self, raw: &str, variables: &Variables) -> Result<Vec<String>, WordError> {
        let mut text = raw.chars().peekable();
        let mut words = Vec::new();
        loop {
            while text.next_if(|next| next.is_whitespace()).is_some() {}
            if text.peek().is_none() {
                return Ok(words);
            }
            words.push(self.piece(&mut text, variables, char::is_whitespace, 0)?);
        }
    }

    /// Up to such a character outside of quotes, which stays, or the end.
    fn piece(
        self,
        text: &mut Text<'_>,
        variables: &Variables,
        is_end: fn(char) -> bool,
        depth: u32,
    ) -> Result<String, WordError> {
        let mut piece = String::new();
        while let Some(next) = text.next_if(|next| !is_end(*next)) {
            match next {
                '\'' => loop {
                    match text.next() {
                        Some('\'') => break,
                        Some(inner) => piece.push(inner),
                        None => return Err(WordError::Quote('\'')),
                    }
                },
                '"' => loop {
                    match text.next() {
                        Some('"') => break,
                        Some('$') => piece.push_str(&self.variable(text, variables, depth)?),
                        Some(inner) if inner == self.escape => match text.next() {
                            Some(quoted)
                                if matches!(quoted, '"' | '$') || quoted == self.escape =>
                            {
                                piece.push(quoted);
                            }
                            other => {
                                piece.push(inner);
                                piece.extend(other);
                            }
                        },
                        Some(inner) => piece.push(inner),
                        None => return Err(WordError::Quote('"')),
                    }
                },
                '$' => piece.push_str(&self.variable(text, variables, depth)?),
                escape if escape == self.escape => piece.extend(text.next()),
                other => piece.push(other),
            }
        }
        Ok(piece)
    }

    /// After a `$`.
    fn variable(
        self,
        text: &mut Text<'_>,
        variables: &Variables,
        depth: u32,
    ) -> Result<String, WordError> {
        if depth >= DEEPEST {
            return Err(WordError::Deep);
        }
        let is_braced = text.next_if_eq(&'{').is_some();
        let name = name(text);
        let value = variables.get(&name);
        if !is_braced {
            return Ok(if name.is_empty() {
                // It means nothing.
                "$".to_owned()
            } else {
                value.cloned().unwrap_or_default()
            });
        }
        if name.is_empty() {
            return Err(WordError::Modifier(text.next().into_iter().collect()));
        }
        let is_strict = text.next_if_eq(&':').is_some();
        let modifier = text.next();
        if modifier == Some('}') && !is_strict {
            return Ok(value.cloned().unwrap_or_default());
        }
        let Some(modifier) = modifier else {
            return Err(WordError::Brace(name));
        };
        if !matches!(modifier, '-' | '+' | '?') {
            return Err(WordError::Modifier(format!("{name}{modifier}")));
        }
        let other = self.piece(text, variables, |next| next == '}', depth + 1)?;
        if text.next() != Some('}') {
            return Err(WordError::Brace(name));
        }
        let value = value.filter(|value| !is_strict || !value.is_empty());
        match (modifier, value) {
            ('-' | '?', Some(value)) => Ok(value.clone()),
            ('-', None) | ('+', Some(_)) => Ok(other),
            ('+', None) => Ok(String::new()),
            _ => Err(WordError::Missing {
                name,
                message: if other.is_empty() {
                    "is not set".to_owned()
                } else {
                    other
                },
            }),
        }
    }
}

fn name(text: &mut Text<'_>) -> String {
    let mut name = String::new();
    if let Some(special) = text.next_if(char::is_ascii_digit) {
        name.push(special);
        return name;
    }
    while let Some(next) = text.next_if(|next| next.is_ascii_alphanumeric() || *next == '_') {
        name.push(next);
    }
    name
}

/// A path from a folder on; `..` as in a path that has no links.
pub fn join(folder: &str, path: &str) -> String {
    let from = if path.starts_with('/') { "" } else { folder };
    let mut parts: Vec<&str> = Vec::new();
    for part in from.split('/').chain(path.split('/')) {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

/// Takes the bodies of here-documents that stand within a `RUN`'s command out of the text, whose lines keep their numbers; by the number of
/// the command's line. Those that are all of a command are left to the parser.
pub fn take_here_documents(text: &str) -> (String, BTreeMap<usize, String>) {
    let mut bodies = BTreeMap::new();
    let mut kept: Vec<&str> = Vec::new();
    let mut lines = (1..).zip(text.split('\n')).peekable();
    while let Some((number, line)) = lines.next() {
        kept.push(line);
        let mut words = line.trim_start().splitn(2, char::is_whitespace);
        let is_run = words
            .next()
            .is_some_and(|word| word.eq_ignore_ascii_case("run"));
        let command = words.next().unwrap_or_default().trim_start();
        if !is_run || command.starts_with("<<") || command.starts_with('[') {
            continue;
        }
        let mut body = String::new();
        for (end, strips_tabs) in here_documents(command) {
            for (_, line) in lines.by_ref() {
                kept.push("");
                body.push_str(line);
                body.push('\n');
                let line = line.trim_end_matches('\r');
                let line = if strips_tabs {
                    line.trim_start_matches('\t')
                } else {
                    line
                };
                if line == end {
                    break;
                }
            }
        }
        if !body.is_empty() {
            bodies.insert(number, body);
        }
    }
    (kept.join("\n"), bodies)
}

/// Words that end the here-documents of a command, and whether tabs before their lines go. As in `BuildKit`, one is a word of its own that begins
/// with `<<`, or a number and that; a shift in an expression is none.
fn here_documents(command: &str) -> Vec<(String, bool)> {
    let mut found = Vec::new();
    let mut quote = None;
    let mut is_beginning = true;
    let mut text = command.chars().peekable();
    while let Some(next) = text.next() {
        if let Some(open) = quote {
            quote = Some(open).filter(|open| *open != next);
            continue;
        }
        match next {
            '\'' | '"' => quote = Some(next),
            '\\' => drop(text.next()),
            '<' if is_beginning && text.next_if_eq(&'<').is_some() => {
                let strips_tabs = text.next_if_eq(&'-').is_some();
                let open = text.next_if(|next| matches!(next, '\'' | '"'));
                let mut end = String::new();
                while let Some(next) = text.next_if(|next| next.is_alphanumeric() || *next == '_') {
                    end.push(next);
                }
                if let Some(open) = open {
                    text.next_if_eq(&open);
                }
                if !end.is_empty() {
                    found.push((end, strips_tabs));
                }
            }
            _ => {}
        }
        is_beginning = next.is_whitespace() || is_beginning && next.is_ascii_digit();
    }
    found
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LEXER: Lexer = Lexer { escape: '\\' };

    #[test]
    fn paths_are_joined_as_without_links() {
        for (folder, path, joined) in [
            ("/", "a", "/a"),
            ("/a/b", "c/../d", "/a/b/d"),
            ("/a", "/x//y/", "/x/y"),
            ("/a", "../../..", "/"),
            ("/", "", "/"),
        ] {
            assert_eq!(join(folder, path), joined);
        }
    }

    #[test]
    fn shifts_are_no_here_documents() {
        for command in [
            "echo $((1 << 2))",
            "echo $((1<<2))",
            "cat <<< here",
            "echo '<<EOF'",
            "echo \\<<EOF",
        ] {
            assert!(here_documents(command).is_empty(), "{command}");
        }
        assert_eq!(
            here_documents("cat 3<<-'A' <<B"),
            [("A".into(), true), ("B".into(), false)]
        );
    }

    #[test]
    fn another_escape() {
        let lexer = Lexer { escape: '`' };
        let word = lexer.word(r"C:\dir\`$x", &Variables::new()).unwrap();
        assert_eq!(word, r"C:\dir\$x");
        assert_eq!(lexer.joined("a `\n  b"), "a   b");
    }

    proptest! {
        /// Whatever stands there, there is an answer.
        #[test]
        fn any_text(text in "[a-z$\\\\{}:+?='\" \n<#-]{0,60}") {
            let variables = Variables::from([("a".to_owned(), "b".to_owned())]);
            let joined = LEXER.joined(&text);
            let _ = LEXER.word(&joined, &variables);
            let _ = LEXER.pairs(&joined, &variables);
            let (kept, _) = take_here_documents(&text);
            prop_assert_eq!(kept.matches('\n').count(), text.matches('\n').count());
            let _ = super::super::Dockerfile::parse(&format!("FROM a\nRUN {text}\nENV {text}"));
        }

        /// What is quoted comes out as it went in.
        #[test]
        fn quoted(text in "[^'\\n]{0,40}") {
            let word = LEXER.word(&format!("'{text}'"), &Variables::new()).unwrap();
            prop_assert_eq!(word, text);
        }
    }
}
