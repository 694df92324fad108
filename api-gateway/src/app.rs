//! Puts api-gateway together: bind both listeners, migrate, serve, drain.

use std::time::Duration;

use proto::{
    key::v1::key_service_server::KeyServiceServer,
    session::v1::{
        session_service_client::SessionServiceClient, session_service_server::SessionServiceServer,
    },
    template::v1::{
        template_service_client::TemplateServiceClient,
        template_service_server::TemplateServiceServer,
    },
};
use service_kit::{
    address::Address,
    mesh::{self, MeshToken, TokenError},
    serve::{self, Bound, Grpc, ServeError},
};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic_web::GrpcWebLayer;

use crate::{
    api::{KeyApi, SessionApi, TemplateApi},
    config::Config,
    door::Door,
    keys::Keys,
    store::{Store, StoreError},
};

const MIGRATION_RETRY: Duration = Duration::from_millis(500);
/// Requests with a megabyte of labels are to be refused with words, not with a broken stream.
const LARGEST_MESSAGE: usize = 8 << 20;

/// api-gateway cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// A listener.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// The mesh token.
    #[error("--mesh-token-file: {0}")]
    Token(#[from] TokenError),
    /// The database.
    #[error("--database-url: {0}")]
    Database(#[from] StoreError),
}

/// A bound api-gateway.
#[derive(Debug)]
pub struct App {
    public: Bound,
    operators: Bound,
    token: MeshToken,
    store: Store,
    config: Config,
    shutdown: CancellationToken,
}

impl App {
    /// Binds; nothing is served yet.
    pub async fn build(config: Config, shutdown: CancellationToken) -> Result<Self, AppError> {
        let token = MeshToken::load(&config.mesh_token_file)?;
        let store = Store::new(&config.database_url, config.database_connections)?;
        let public = Bound::bind(&config.listen).await?;
        let operators = Bound::bind(&config.operator_listen).await?;
        Ok(Self {
            public,
            operators,
            token,
            store,
            config,
            shutdown,
        })
    }

    /// Where clients' calls arrive.
    pub fn address(&self) -> &Address {
        self.public.address()
    }

    /// Where operators' calls arrive.
    pub fn operator_address(&self) -> &Address {
        self.operators.address()
    }

    /// Serves until shutdown.
    pub async fn run(self) -> Result<(), AppError> {
        let Self {
            public,
            operators,
            token,
            store,
            config,
            shutdown,
        } = self;
        loop {
            let migrated = tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                migrated = store.migrate() => migrated,
            };
            match migrated {
                Ok(()) => break,
                Err(error) => tracing::warn!(%error, "waiting for the database"),
            }
            tokio::time::sleep(MIGRATION_RETRY).await;
        }
        let door = Door::new(Keys::new(store.clone()));
        let sessions = SessionServiceClient::new(mesh::connect(&config.session_addresses, &token));
        let templates =
            TemplateServiceClient::new(mesh::connect(&config.template_addresses, &token))
                .max_decoding_message_size(LARGEST_MESSAGE);
        let sessions = SessionServiceServer::new(SessionApi {
            door: door.clone(),
            sessions,
        })
        .max_decoding_message_size(LARGEST_MESSAGE);
        let templates = TemplateServiceServer::new(TemplateApi { door, templates })
            .max_decoding_message_size(LARGEST_MESSAGE);
        let routes = Routes::new(sessions).add_service(templates);
        // envd's too: its calls come in by the same address, and Envoy sends them on.
        let reflected = [
            "sandmesh.session.v1.SessionService",
            "sandmesh.template.v1.TemplateService",
            "sandmesh.envd.v1.ProcessService",
            "sandmesh.envd.v1.FilesystemService",
            "sandmesh.envd.v1.PortService",
            "sandmesh.envd.v1.SystemService",
        ];
        // gRPC-Web is translated outermost, so that everything else sees plain gRPC.
        let router = Grpc::new("api-gateway")
            .reflect(&reflected)
            .router(routes)
            .await?
            .layer(GrpcWebLayer::new());
        let keys = Routes::new(KeyServiceServer::new(KeyApi { store }));
        let operators = Grpc::new("api-gateway-operators")
            .mesh_only(token)
            .reflect(&["sandmesh.key.v1.KeyService"])
            .serve(operators, keys, shutdown.clone());
        let (public, operators) = tokio::join!(
            serve::serve_router(public, router, shutdown.clone()),
            operators
        );
        public?;
        Ok(operators?)
    }
}
