//! What a build must know and nobody else: credentials, and what its steps are lent. They lie in its row sealed (XChaCha20-Poly1305), under a key
//! that is derived from the mesh token and the build's ID, and go when it ends. Who has the database has nothing of them, nor can a row's be moved
//! to another build.

use chacha20poly1305::{KeyInit as _, XChaCha20Poly1305, XNonce, aead::Aead as _};
use service_kit::mesh::MeshToken;

const LABEL: &[u8] = b"template-build-secrets";
const NONCE: usize = 24;

/// Seals and opens the secrets of builds.
#[derive(Debug, Clone)]
pub struct Sealer {
    token: MeshToken,
}

/// Secrets that this deployment has not sealed, or under another mesh token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the build's credentials and secrets cannot be read any more; start it again with them")]
pub struct Unreadable;

impl Sealer {
    /// With the token of the deployment.
    pub fn new(token: MeshToken) -> Self {
        Self { token }
    }

    fn cipher(&self, build_id: &str) -> XChaCha20Poly1305 {
        XChaCha20Poly1305::new(&self.token.derive(LABEL, build_id.as_bytes()).into())
    }

    /// A nonce and what is sealed with it.
    pub fn seal(&self, build_id: &str, secrets: &[u8]) -> Vec<u8> {
        let nonce: [u8; NONCE] = rand::random();
        let sealed = self.cipher(build_id).encrypt(&nonce.into(), secrets);
        let Ok(sealed) = sealed else {
            unreachable!("no secrets are as long as the cipher allows")
        };
        [nonce.as_slice(), &sealed].concat()
    }

    /// What was sealed for that build.
    pub fn open(&self, build_id: &str, sealed: &[u8]) -> Result<Vec<u8>, Unreadable> {
        let (nonce, sealed) = sealed.split_first_chunk::<NONCE>().ok_or(Unreadable)?;
        let opened = self.cipher(build_id).decrypt(&XNonce::from(*nonce), sealed);
        opened.map_err(|_| Unreadable)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_its_build_reads_it() {
        let sealer = Sealer::new(MeshToken::random());
        let sealed = sealer.seal("b1", b"password");
        assert_ne!(sealed, sealer.seal("b1", b"password"));
        assert!(!sealed.windows(8).any(|bytes| bytes == b"password"));
        assert_eq!(sealer.open("b1", &sealed).unwrap(), b"password");
        assert_eq!(sealer.open("b2", &sealed), Err(Unreadable));
        let other = Sealer::new(MeshToken::random());
        assert_eq!(other.open("b1", &sealed), Err(Unreadable));
        for cut in [0, NONCE, sealed.len() - 1] {
            assert_eq!(sealer.open("b1", &sealed[..cut]), Err(Unreadable));
        }
    }
}
