//! `sandmesh.key.v1.KeyService`, for operators.

use proto::key::v1::{
    CreateKeyRequest, CreateKeyResponse, Key, ListKeysRequest, ListKeysResponse, RevokeKeyRequest,
    RevokeKeyResponse, key_service_server::KeyService,
};
use service_kit::{
    errors::{Failure, Reason},
    ids::TeamId,
};
use tonic::{Code, Request, Response, Status};

use crate::{
    keys::ApiKey,
    store::{KeyRow, Store, StoreError},
};

const DEFAULT_TEAM: &str = "default";

/// Keys, for operators.
#[derive(Debug)]
pub struct KeyApi {
    /// The rows.
    pub store: Store,
}

fn timestamp(micros: i64) -> prost_types::Timestamp {
    let nanos = i32::try_from(micros.rem_euclid(1_000_000)).unwrap_or_default() * 1000;
    prost_types::Timestamp {
        seconds: micros.div_euclid(1_000_000),
        nanos,
    }
}

fn wire(row: KeyRow) -> Key {
    Key {
        key_id: row.key_id,
        team: row.team,
        description: row.description,
        create_time: Some(timestamp(row.create_time)),
        revoke_time: row.revoke_time.map(timestamp),
    }
}

fn store_error(error: StoreError) -> Status {
    tracing::warn!(%error, "keys cannot be reached");
    Failure::unavailable(
        Reason::DATABASE_UNAVAILABLE,
        "the database cannot be reached right now; try again",
    )
    .into()
}

#[tonic::async_trait]
impl KeyService for KeyApi {
    async fn create_key(
        &self,
        request: Request<CreateKeyRequest>,
    ) -> Result<Response<CreateKeyResponse>, Status> {
        let request = request.into_inner();
        let team = if request.team.is_empty() {
            DEFAULT_TEAM
        } else {
            &request.team
        };
        let team = TeamId::parse(team)
            .map_err(|error| Failure::field_invalid("team", error.to_string()))?;
        if request.description.len() > 256 {
            return Err(Failure::field_invalid("description", "must be at most 256 bytes").into());
        }
        let key = ApiKey::random();
        let row = self
            .store
            .insert(key.id(), team.as_str(), &key.sha256(), &request.description)
            .await
            .map_err(store_error)?;
        Ok(Response::new(CreateKeyResponse {
            key: Some(wire(row)),
            secret: key.expose().to_owned(),
        }))
    }

    async fn list_keys(
        &self,
        request: Request<ListKeysRequest>,
    ) -> Result<Response<ListKeysResponse>, Status> {
        let request = request.into_inner();
        let limit = if request.page_size == 0 {
            100
        } else {
            i64::from(request.page_size.min(1000))
        };
        let before = match request.page_token.as_str() {
            "" => i64::MAX,
            token => token.parse().map_err(|_| {
                Failure::field_invalid("page_token", "is not one this service gave out")
            })?,
        };
        let team = Some(request.team.as_str()).filter(|team| !team.is_empty());
        let rows = self
            .store
            .list(team, before, limit)
            .await
            .map_err(store_error)?;
        let full = i64::try_from(rows.len()).is_ok_and(|count| count == limit);
        let next_page_token = rows
            .last()
            .filter(|_| full)
            .map(|row| row.create_time.to_string())
            .unwrap_or_default();
        Ok(Response::new(ListKeysResponse {
            keys: rows.into_iter().map(wire).collect(),
            next_page_token,
        }))
    }

    async fn revoke_key(
        &self,
        request: Request<RevokeKeyRequest>,
    ) -> Result<Response<RevokeKeyResponse>, Status> {
        let id = &request.get_ref().key_id;
        let row = self
            .store
            .revoke(id)
            .await
            .map_err(store_error)?
            .ok_or_else(|| {
                Failure::new(
                    Code::NotFound,
                    Reason::new("API_KEY_UNKNOWN"),
                    format!("no key {id}"),
                )
                .with("keyId", id)
            })?;
        Ok(Response::new(RevokeKeyResponse {
            key: Some(wire(row)),
        }))
    }
}
