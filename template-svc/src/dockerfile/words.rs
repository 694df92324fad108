//! Words of Dockerfiles: quotes, escapes, variables (Dockerfile reference, "Environment replacement"), and here-documents within commands.

use std::{collections::BTreeMap, iter::Peekable, str::Chars};

/// Of what a variable's default holds: others in it, and so on.
const DEEPEST: u32 = 16;
/// Bytes of a word when its variables are in it.
const LONGEST: usize = 64 << 10;

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
    /// More than a variable may hold.
    #[error("a value of more than {LONGEST} bytes")]
    Long,
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

    /// The text of a here-document: quotes are quotes there, and variables are not.
    pub fn document(self, raw: &str, variables: &Variables) -> Result<String, WordError> {
        let mut text = raw.chars().peekable();
        let mut document = String::new();
        while let Some(next) = text.next() {
            match next {
                '$' => document.push_str(&self.variable(&mut text, variables, 0)?),
                // Whatever the Dockerfile's own escape is.
                '\\' => match text.next_if(|next| matches!(next, '$' | '\\')) {
                    Some(escaped) => document.push(escaped),
                    None => document.push('\\'),
                },
                other => document.push(other),
            }
            if document.len() > raw.len() + LONGEST {
                return Err(WordError::Long);
            }
        }
        Ok(document)
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
            if piece.len() > LONGEST {
                return Err(WordError::Long);
            }
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
                        Some('$') => {
                            piece.push_str(&self.variable(text, variables, depth)?);
                            if piece.len() > LONGEST {
                                return Err(WordError::Long);
                            }
                        }
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
        if piece.len() > LONGEST {
            return Err(WordError::Long);
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

/// A `RUN` with here-documents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Here {
    /// It is one, and nothing else: a script.
    Script(String),
    /// A command for the shell, with the documents after it.
    Command(String),
}

/// A here-document without an end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endless {
    /// The line of its instruction, from 1.
    pub line: usize,
    /// What should end it.
    pub end: String,
}

/// Takes `RUN`s with here-documents out of a text: what is left has the same lines, those of the documents empty. By the line of the `RUN`. As in
/// `BuildKit` documents are looked for in the whole instruction, whose lines are joined, and follow it. Those of `COPY` and `ADD` are files, and
/// stay; nothing in them is an instruction.
pub fn take_here_documents(
    text: &str,
    lexer: Lexer,
) -> Result<(String, BTreeMap<usize, Here>), Endless> {
    let mut found = BTreeMap::new();
    let mut kept: Vec<String> = Vec::new();
    let mut lines = (1..).zip(text.split('\n'));
    while let Some((number, line)) = lines.next() {
        kept.push(line.to_owned());
        let mut words = line.trim_start().splitn(2, char::is_whitespace);
        let keyword = words.next().unwrap_or_default().to_ascii_lowercase();
        if !matches!(keyword.as_str(), "run" | "copy" | "add") {
            continue;
        }
        let first = kept.len() - 1;
        let mut instruction = words.next().unwrap_or_default().trim_start().to_owned();
        let goes_on = |line: &str| line.trim_end().ends_with(lexer.escape);
        let is_nothing = |line: &str| line.trim().is_empty() || line.trim_start().starts_with('#');
        let mut is_open = goes_on(line);
        while is_open {
            let Some((_, line)) = lines.next() else {
                break;
            };
            kept.push(line.to_owned());
            instruction.push('\n');
            instruction.push_str(line);
            is_open = is_nothing(line) || goes_on(line);
        }
        let command = lexer.joined(&instruction);
        let ends = here_documents(&command);
        if ends.is_empty() {
            continue;
        }
        let mut documents = Vec::new();
        for (end, strips_tabs) in &ends {
            let mut body = String::new();
            loop {
                let Some((_, line)) = lines.next() else {
                    let end = end.clone();
                    return Err(Endless { line: number, end });
                };
                // The parser knows those of COPY and ADD.
                let is_taken = keyword == "run";
                kept.push(if is_taken { "" } else { line }.to_owned());
                let stripped = if *strips_tabs {
                    line.trim_start_matches('\t')
                } else {
                    line
                };
                if stripped == end {
                    break;
                }
                body.push_str(if *strips_tabs { stripped } else { line });
                body.push('\n');
            }
            documents.push((end, body));
        }
        if keyword != "run" {
            continue;
        }
        let (flags, command) = split_flags(&command);
        let is_script = ends.len() == 1 && is_here_document(command.trim());
        let here = match documents.as_slice() {
            [(_, body)] if is_script => Here::Script(body.clone()),
            documents => {
                let mut whole = command.to_owned();
                for (end, body) in documents {
                    whole.push('\n');
                    whole.push_str(body);
                    whole.push_str(end);
                }
                whole.push('\n');
                Here::Command(whole)
            }
        };
        found.insert(number, here);
        // What is left is a command without them, for a parser that knows less of them.
        for line in kept.iter_mut().skip(first) {
            line.clear();
        }
        if let Some(line) = kept.get_mut(first) {
            *line = format!("RUN {flags}here-document");
        }
    }
    Ok((kept.join("\n"), found))
}

/// What a command begins with that is not its own, with the blanks after it.
fn split_flags(command: &str) -> (&str, &str) {
    let mut rest = command.trim_start();
    while rest.starts_with("--") {
        let end = rest.find(char::is_whitespace).unwrap_or(rest.len());
        rest = rest.get(end..).unwrap_or_default().trim_start();
    }
    let command = command.trim_start();
    command.split_at(command.len() - rest.len())
}

/// Whether a command is but one.
fn is_here_document(command: &str) -> bool {
    command.starts_with("<<")
        && !command.contains(|next: char| next.is_whitespace() || ";&|>()".contains(next))
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
                let ends = |next: char| match open {
                    Some(open) => next == open,
                    None => next.is_whitespace() || ";&|<>()'\"".contains(next),
                };
                while let Some(next) = text.next_if(|next| !ends(*next)) {
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
            if let Ok((kept, _)) = take_here_documents(&text, LEXER) {
                prop_assert_eq!(kept.matches('\n').count(), text.matches('\n').count());
            }
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
