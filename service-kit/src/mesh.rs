//! Trust between services.
//!
//! All services of a deployment hold one secret, the [`MeshToken`]. A call between services carries a word derived from it in
//! `x-sandmesh-mesh`; a server behind [`require_token`] refuses calls without it (health checks excepted), and only behind it
//! may a handler believe who the [`Caller`] is. [`MeshChannel`] is the client side: it adds the token, the request ID and the
//! trace context to every call, and moves on to the next replica when one is gone.

use std::{
    fmt, fs,
    io::{self, Write as _},
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use axum::{
    extract::Request as HttpRequest, extract::State, middleware::Next,
    response::Response as HttpResponse,
};
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;
use subtle::ConstantTimeEq as _;
use tonic::{Code, Request, Status, metadata::MetadataMap};

use crate::{
    errors::{Failure, Reason},
    ids::TeamId,
};

mod channel;
pub use channel::{MeshChannel, connect};

/// Metadata that carries the derived token.
pub const TOKEN_HEADER: &str = "x-sandmesh-mesh";
/// Metadata that names the caller's team.
pub const TEAM_HEADER: &str = "x-sandmesh-team";
/// Metadata that names the caller's API key.
pub const KEY_HEADER: &str = "x-sandmesh-key";
/// Metadata that says the caller is an operator.
pub const OPERATOR_HEADER: &str = "x-sandmesh-operator";

/// The secret all services of a deployment share.
#[derive(Clone)]
pub struct MeshToken {
    secret: Arc<[u8; 32]>,
    header: Arc<str>,
}

/// A token file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// Reading or writing failed.
    #[error("mesh token file {path}: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Not 64 hexadecimal characters.
    #[error("mesh token file {0} must hold 64 hexadecimal characters")]
    Malformed(PathBuf),
    /// Others may read it.
    #[error("mesh token file {0} can be read by others: chmod 600 it")]
    Exposed(PathBuf),
}

impl MeshToken {
    /// From its bytes.
    pub fn from_bytes(secret: [u8; 32]) -> Self {
        // What travels is derived, so that a captured header gives no session tokens away.
        let header = hex::encode(keyed(&secret, b"mesh-header", b""));
        Self {
            secret: Arc::new(secret),
            header: header.into(),
        }
    }

    /// A new secret.
    pub fn random() -> Self {
        Self::from_bytes(rand::random())
    }

    /// Reads a file of 64 hexadecimal characters that only its owner may read.
    pub fn load(path: &Path) -> Result<Self, TokenError> {
        let io = |source| TokenError::Io {
            path: path.to_owned(),
            source,
        };
        if fs::metadata(path).map_err(io)?.permissions().mode() & 0o077 != 0 {
            return Err(TokenError::Exposed(path.to_owned()));
        }
        let text = fs::read_to_string(path).map_err(io)?;
        let mut secret = [0; 32];
        hex::decode_to_slice(text.trim(), &mut secret)
            .map_err(|_| TokenError::Malformed(path.to_owned()))?;
        Ok(Self::from_bytes(secret))
    }

    /// Reads the file, or makes it with a new secret and mode 0600; safe when two processes do so at once.
    pub fn load_or_create(path: &Path) -> Result<Self, TokenError> {
        let io = |source| TokenError::Io {
            path: path.to_owned(),
            source,
        };
        if !path.exists() {
            let fresh: [u8; 32] = rand::random();
            let temporary = path.with_extension(format!("{:016x}", rand::random::<u64>()));
            let mut file = fs::OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&temporary)
                .map_err(io)?;
            file.write_all(hex::encode(fresh).as_bytes())
                .and_then(|()| file.sync_all())
                .map_err(io)?;
            let linked = fs::hard_link(&temporary, path);
            fs::remove_file(&temporary).map_err(io)?;
            match linked {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(io(error));
                }
                _ => {}
            }
        }
        Self::load(path)
    }

    /// The value of [`TOKEN_HEADER`]. A secret: never log it.
    pub fn header(&self) -> &str {
        &self.header
    }

    /// HMAC-SHA256 of `data` under a key only holders of the token know; `label` separates uses.
    pub fn derive(&self, label: &[u8], data: &[u8]) -> [u8; 32] {
        keyed(&self.secret, label, data)
    }

    /// Whether a header map carries the token.
    pub fn is_in(&self, headers: &http::HeaderMap) -> bool {
        headers
            .get(TOKEN_HEADER)
            .is_some_and(|value| value.as_bytes().ct_eq(self.header.as_bytes()).into())
    }
}

impl fmt::Debug for MeshToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MeshToken(..)")
    }
}

fn keyed(secret: &[u8; 32], label: &[u8], data: &[u8]) -> [u8; 32] {
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(secret) else {
        unreachable!("HMAC takes keys of any length")
    };
    mac.update(&(label.len() as u64).to_be_bytes());
    mac.update(label);
    mac.update(data);
    mac.finalize().into_bytes().into()
}

/// Middleware: refuses calls without the mesh token, except health checks.
pub async fn require_token(
    State(token): State<MeshToken>,
    request: HttpRequest,
    next: Next,
) -> HttpResponse {
    if token.is_in(request.headers()) || request.uri().path().starts_with("/grpc.health.v1.") {
        return next.run(request).await;
    }
    Failure::new(
        Code::Unauthenticated,
        Reason::CREDENTIALS_MISSING,
        "this listener is for Sandmesh's own services",
    )
    .into_status()
    .into_http()
}

/// Who made a call, as the gateway found out. Only believed behind [`require_token`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// Owner of what the call creates, and of all it may see.
    pub team: TeamId,
    /// Public part of the API key; empty for operators on the internal listeners.
    pub key_id: String,
    /// Whether the caller runs the deployment.
    pub operator: bool,
}

impl Caller {
    /// Reads the caller a mesh peer passed on.
    pub fn of<T>(request: &Request<T>) -> Result<Self, Status> {
        Self::from_metadata(request.metadata())
    }

    /// As [`Caller::of`], from metadata alone.
    pub fn from_metadata(metadata: &MetadataMap) -> Result<Self, Status> {
        let text = |name: &str| {
            metadata
                .get(name)
                .and_then(|value| value.to_str().ok())
                .unwrap_or_default()
        };
        let team = TeamId::parse(text(TEAM_HEADER)).map_err(|_| {
            Failure::new(
                Code::Unauthenticated,
                Reason::CREDENTIALS_MISSING,
                "the call names no team",
            )
            .into_status()
        })?;
        Ok(Self {
            team,
            key_id: text(KEY_HEADER).to_owned(),
            operator: text(OPERATOR_HEADER) == "true",
        })
    }

    /// Passes the caller on.
    pub fn apply(&self, metadata: &mut MetadataMap) {
        let mut set = |name: &'static str, value: &str| {
            if let Ok(value) = value.parse() {
                metadata.insert(name, value);
            }
        };
        set(TEAM_HEADER, self.team.as_str());
        set(KEY_HEADER, &self.key_id);
        set(
            OPERATOR_HEADER,
            if self.operator { "true" } else { "false" },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_file_is_made_once_and_is_private() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mesh.token");
        let first = MeshToken::load_or_create(&path).unwrap();
        let second = MeshToken::load_or_create(&path).unwrap();
        assert_eq!(first.header(), second.header());
        assert_eq!(first.derive(b"a", b"b"), second.derive(b"a", b"b"));
        assert_ne!(first.derive(b"a", b"b"), first.derive(b"ab", b""));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(
            MeshToken::load(&path),
            Err(TokenError::Exposed(_))
        ));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_caller_travels_in_metadata() {
        let caller = Caller {
            team: TeamId::parse("red").unwrap(),
            key_id: "smk_x".into(),
            operator: true,
        };
        let mut request = Request::new(());
        assert!(Caller::of(&request).is_err());
        caller.apply(request.metadata_mut());
        assert_eq!(Caller::of(&request).unwrap(), caller);
    }
}
