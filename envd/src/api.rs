//! The gRPC services of envd: conversion, and streams of what the modules below keep.

use std::{pin::Pin, sync::Arc};

use futures::Stream;
use proto::envd::v1::{
    filesystem_service_server::FilesystemServiceServer, port_service_server::PortServiceServer,
    process_service_server::ProcessServiceServer, system_service_server::SystemServiceServer,
};
use tonic::{Request, Status, service::Interceptor};

use crate::{identity::Guest, ports::Ports, process::Processes, spans::Spans};

mod filesystem;
mod port;
mod process;
mod system;

pub(crate) type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Nothing passes while the guest's gate is closed.
#[derive(Debug, Clone)]
pub(crate) struct Gate(pub(crate) Arc<Guest>);

impl Interceptor for Gate {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        self.0.gate.admit()?;
        Ok(request)
    }
}

pub(crate) fn process(processes: Processes, _: Arc<Guest>) -> ProcessServiceServer<process::Api> {
    ProcessServiceServer::new(process::Api { processes })
}

pub(crate) fn filesystem(guest: Arc<Guest>) -> FilesystemServiceServer<filesystem::Api> {
    FilesystemServiceServer::new(filesystem::Api { guest })
}

pub(crate) fn port(ports: Ports) -> PortServiceServer<port::Api> {
    PortServiceServer::new(port::Api { ports })
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
