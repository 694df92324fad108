//! Names that travel between services. A value of these types is well-formed; whether it exists is another question.

use std::{fmt, str::FromStr};

use rand::RngExt as _;

const ALPHABET: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";
const TAG_LENGTH: usize = 5;
const SESSION_ID_LENGTH: usize = 25;
const CHECKPOINT_ID_LENGTH: usize = 20;

fn random_text(length: usize) -> String {
    let mut rng = rand::rng();
    (0..length)
        .map(|_| char::from(ALPHABET[rng.random_range(0..ALPHABET.len())]))
        .collect()
}

fn all_in_alphabet(text: &str) -> bool {
    text.bytes()
        .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
}

/// The 5 characters `[a-z0-9]` that name the node which first hosted a session.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HomeTag(String);

/// Text that is not a home tag.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a home tag is 5 characters [a-z0-9]")]
pub struct MalformedHomeTag;

impl HomeTag {
    /// A tag nobody can foresee.
    pub fn random() -> Self {
        Self(random_text(TAG_LENGTH))
    }

    /// Accepts exactly 5 characters `[a-z0-9]`.
    pub fn parse(text: &str) -> Result<Self, MalformedHomeTag> {
        if text.len() == TAG_LENGTH && all_in_alphabet(text) {
            Ok(Self(text.to_owned()))
        } else {
            Err(MalformedHomeTag)
        }
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// One session: its home tag, then 20 random characters (103 bits), so that it cannot be guessed.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(String);

/// Text that is not a session ID.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a session ID is 25 characters [a-z0-9]")]
pub struct MalformedSessionId;

impl SessionId {
    /// A new ID whose home is the node of this tag.
    pub fn random(home: &HomeTag) -> Self {
        Self(format!(
            "{}{}",
            home.0,
            random_text(SESSION_ID_LENGTH - TAG_LENGTH)
        ))
    }

    /// Accepts 25 characters `[a-z0-9]`; capitals are lowered, since host names do not keep case.
    pub fn parse(text: &str) -> Result<Self, MalformedSessionId> {
        if text.len() != SESSION_ID_LENGTH || !text.is_ascii() {
            return Err(MalformedSessionId);
        }
        let text = text.to_ascii_lowercase();
        if all_in_alphabet(&text) {
            Ok(Self(text))
        } else {
            Err(MalformedSessionId)
        }
    }

    /// The node that first hosted it.
    pub fn home_tag(&self) -> HomeTag {
        HomeTag(self.0.chars().take(TAG_LENGTH).collect())
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The first 8 characters: enough to find it in logs, not enough to use it.
    pub fn short(&self) -> &str {
        self.0.get(..8).unwrap_or(&self.0)
    }
}

macro_rules! text_traits {
    ($name:ident, $error:ident) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl FromStr for $name {
            type Err = $error;
            fn from_str(text: &str) -> Result<Self, $error> {
                Self::parse(text)
            }
        }
        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }
        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }
        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
                Self::parse(&text).map_err(serde::de::Error::custom)
            }
        }
    };
}

/// One checkpoint of a session: 20 random characters `[a-z0-9]`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CheckpointId(String);

/// Text that is not a checkpoint ID.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a checkpoint ID is 20 characters [a-z0-9]")]
pub struct MalformedCheckpointId;

impl CheckpointId {
    /// A new ID.
    pub fn random() -> Self {
        Self(random_text(CHECKPOINT_ID_LENGTH))
    }

    /// Accepts exactly 20 characters `[a-z0-9]`.
    pub fn parse(text: &str) -> Result<Self, MalformedCheckpointId> {
        if text.len() == CHECKPOINT_ID_LENGTH && all_in_alphabet(text) {
            Ok(Self(text.to_owned()))
        } else {
            Err(MalformedCheckpointId)
        }
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A node's lasting ID: 1-64 characters `[A-Za-z0-9._-]`, by default a UUID kept on its disk.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(String);

/// Text that is not a node ID.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a node ID is 1-64 characters [A-Za-z0-9._-]")]
pub struct MalformedNodeId;

impl NodeId {
    /// Accepts 1-64 characters `[A-Za-z0-9._-]`.
    pub fn parse(text: &str) -> Result<Self, MalformedNodeId> {
        let fits = (1..=64).contains(&text.len())
            && text
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
        if fits {
            Ok(Self(text.to_owned()))
        } else {
            Err(MalformedNodeId)
        }
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A team's name: 1-63 characters `[a-z0-9-]`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TeamId(String);

/// Text that is not a team name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a team name is 1-63 characters [a-z0-9-]")]
pub struct MalformedTeamId;

impl TeamId {
    /// Accepts 1-63 characters `[a-z0-9-]`.
    pub fn parse(text: &str) -> Result<Self, MalformedTeamId> {
        let fits = (1..=63).contains(&text.len())
            && text
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        if fits {
            Ok(Self(text.to_owned()))
        } else {
            Err(MalformedTeamId)
        }
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

text_traits!(HomeTag, MalformedHomeTag);
text_traits!(SessionId, MalformedSessionId);
text_traits!(CheckpointId, MalformedCheckpointId);
text_traits!(NodeId, MalformedNodeId);
text_traits!(TeamId, MalformedTeamId);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_session_ids_carry_their_home_and_parse() {
        let home = HomeTag::random();
        let id = SessionId::random(&home);
        assert_eq!(id.home_tag(), home);
        assert_eq!(SessionId::parse(id.as_str()), Ok(id.clone()));
        assert_eq!(SessionId::parse(&id.as_str().to_uppercase()), Ok(id));
    }

    proptest::proptest! {
        #[test]
        fn only_25_alphanumerics_are_a_session_id(text in "\\PC{0,40}") {
            let fits = text.len() == 25 && text.bytes().all(|b| b.is_ascii_alphanumeric());
            proptest::prop_assert_eq!(SessionId::parse(&text).is_ok(), fits);
        }
    }
}
