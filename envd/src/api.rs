//! The gRPC services of envd: conversion, and streams of what the modules below keep.

use std::{pin::Pin, sync::Arc};

use futures::Stream;
use proto::envd::v1::{
    filesystem_service_server::FilesystemServiceServer, port_service_server::PortServiceServer,
    process_service_server::ProcessServiceServer, system_service_server::SystemServiceServer,
};
use tonic::{Code, Request, Status, service::Interceptor};

use crate::{errors::refuse, identity::Guest, process::Processes, spans::Spans};

mod filesystem;
mod port;
mod process;
mod system;

pub(crate) type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Nothing is answered before the guest is a session's.
#[derive(Debug, Clone)]
pub(crate) struct Gate(pub(crate) Arc<Guest>);

impl Interceptor for Gate {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        if self.0.is_configured() {
            return Ok(request);
        }
        Err(refuse(
            Code::FailedPrecondition,
            "GUEST_NOT_CONFIGURED",
            "this guest is not a session's yet",
        ))
    }
}

pub(crate) fn process(processes: Processes, _: Arc<Guest>) -> ProcessServiceServer<process::Api> {
    ProcessServiceServer::new(process::Api { processes })
}

pub(crate) fn filesystem(guest: Arc<Guest>) -> FilesystemServiceServer<filesystem::Api> {
    FilesystemServiceServer::new(filesystem::Api { guest })
}

pub(crate) fn port() -> PortServiceServer<port::Api> {
    PortServiceServer::new(port::Api)
}

pub(crate) fn system(
    processes: Processes,
    guest: Arc<Guest>,
    spans: Spans,
) -> SystemServiceServer<system::Api> {
    SystemServiceServer::new(system::Api {
        processes,
        guest,
        spans,
    })
}
