//! API keys: made, found, checked, revoked. Only the hash of a key is stored.

use std::time::{Duration, Instant};

use rand::RngExt as _;
use service_kit::{ids::TeamId, mesh::Caller};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

use crate::store::{KeyRow, Store, StoreError};

/// How long an answer of the database is believed: a revoked key works this long at most.
const FRESH: Duration = Duration::from_secs(1);
/// How long it is believed while the database is away.
const STALE: Duration = Duration::from_mins(5);
const CACHED: u64 = 10_000;
const PREFIX: &str = "smk_";
const ID_LENGTH: usize = 8;
const SECRET_LENGTH: usize = 32;

/// A key a client sent, taken apart: `smk_<8 characters>_<32 characters>`.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey {
    whole: String,
}

impl std::fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.id())
    }
}

impl ApiKey {
    /// `None` if it is not shaped like a key.
    pub fn parse(text: &str) -> Option<Self> {
        let (id, secret) = text.strip_prefix(PREFIX)?.split_once('_')?;
        let fits = |part: &str, length| {
            part.len() == length && part.bytes().all(|b| b.is_ascii_alphanumeric())
        };
        (fits(id, ID_LENGTH) && fits(secret, SECRET_LENGTH)).then(|| Self {
            whole: text.to_owned(),
        })
    }

    /// A new key.
    pub fn random() -> Self {
        let mut rng = rand::rng();
        let mut part = |length| -> String {
            (0..length)
                .map(|_| char::from(rng.sample(rand::distr::Alphanumeric)))
                .collect()
        };
        Self {
            whole: format!("{PREFIX}{}_{}", part(ID_LENGTH), part(SECRET_LENGTH)),
        }
    }

    /// Its public part.
    pub fn id(&self) -> &str {
        self.whole
            .get(..PREFIX.len() + ID_LENGTH)
            .unwrap_or_default()
    }

    /// What is stored.
    pub fn sha256(&self) -> Vec<u8> {
        Sha256::digest(&self.whole).to_vec()
    }

    /// All of it: for its owner's eyes, once.
    pub fn expose(&self) -> &str {
        &self.whole
    }
}

/// Why a key is not accepted.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// Unknown or revoked; which of both is nobody's business.
    #[error("the API key is unknown or was revoked")]
    Invalid,
    /// It cannot be looked up.
    #[error("{0}")]
    Store(#[from] StoreError),
}

/// Checks keys.
#[derive(Debug, Clone)]
pub struct Keys {
    store: Store,
    cache: moka::future::Cache<String, (Instant, Option<KeyRow>)>,
}

impl Keys {
    /// Looks keys up in the store.
    pub fn new(store: Store) -> Self {
        let cache = moka::future::Cache::builder()
            .max_capacity(CACHED)
            .time_to_live(STALE)
            .build();
        Self { store, cache }
    }

    /// Who a key belongs to.
    pub async fn check(&self, key: &ApiKey) -> Result<Caller, KeyError> {
        let row = self.find(key.id()).await?.ok_or(KeyError::Invalid)?;
        let same: bool = key.sha256().ct_eq(&row.secret_sha256).into();
        let team = TeamId::parse(&row.team)
            .ok()
            .filter(|_| same && row.revoke_time.is_none())
            .ok_or(KeyError::Invalid)?;
        Ok(Caller {
            team,
            key_id: row.key_id,
            operator: row.operator,
        })
    }

    async fn find(&self, id: &str) -> Result<Option<KeyRow>, StoreError> {
        let cached = self.cache.get(id).await;
        if let Some((at, row)) = &cached
            && at.elapsed() < FRESH
        {
            return Ok(row.clone());
        }
        match (self.store.key(id).await, cached) {
            (Ok(row), _) => {
                self.cache
                    .insert(id.to_owned(), (Instant::now(), row.clone()))
                    .await;
                Ok(row)
            }
            // Better a key revoked a moment ago than nobody let in.
            (Err(error), Some((_, row))) => {
                tracing::warn!(%error, "keys cannot be looked up; the last answer stands");
                Ok(row)
            }
            (Err(error), None) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_parse_and_keep_their_secret_out_of_logs() {
        let key = ApiKey::random();
        assert_eq!(ApiKey::parse(key.expose()), Some(key.clone()));
        assert_eq!(format!("{key:?}"), key.id());
        assert_ne!(key.sha256(), ApiKey::random().sha256());
        for text in [
            "",
            "smk_",
            "smk_short_secret",
            "xyz_12345678_12345678901234567890123456789012",
        ] {
            assert_eq!(ApiKey::parse(text), None, "{text}");
        }
    }
}
