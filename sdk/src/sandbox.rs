//! One session's inside.

use proto::envd::v1::{
    filesystem_service_client::FilesystemServiceClient, port_service_client::PortServiceClient,
    process_service_client::ProcessServiceClient, system_service_client::SystemServiceClient,
};
use tonic::transport::Channel;

use crate::client::{Authorized, Headers};

const LARGEST_MESSAGE: usize = 8 << 20;

/// Calls into one session. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Sandbox {
    channel: Channel,
    headers: Headers,
}

impl Sandbox {
    pub(crate) fn new(channel: Channel, headers: Headers) -> Self {
        Self { channel, headers }
    }

    /// The whole process API.
    pub fn processes(&self) -> ProcessServiceClient<Authorized> {
        ProcessServiceClient::with_interceptor(self.channel.clone(), self.headers.clone())
            .max_decoding_message_size(LARGEST_MESSAGE)
    }

    /// The whole filesystem API.
    pub fn filesystem(&self) -> FilesystemServiceClient<Authorized> {
        FilesystemServiceClient::with_interceptor(self.channel.clone(), self.headers.clone())
            .max_decoding_message_size(LARGEST_MESSAGE)
    }

    /// The whole port API.
    pub fn port_service(&self) -> PortServiceClient<Authorized> {
        PortServiceClient::with_interceptor(self.channel.clone(), self.headers.clone())
    }

    /// The whole system API.
    pub fn system(&self) -> SystemServiceClient<Authorized> {
        SystemServiceClient::with_interceptor(self.channel.clone(), self.headers.clone())
    }
}
