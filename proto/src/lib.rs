//! The wire types of Sandmesh, generated from the `.proto` files beside this crate, and their descriptors.
//!
//! One module per package: [`session`], [`template`], [`node`], [`envd`], [`key`]. Each holds messages, a client and a server
//! per service. [`DESCRIPTORS`] is the encoded `FileDescriptorSet` of all of them, for reflection and for JSON.
#![allow(missing_docs, clippy::all, clippy::pedantic)]

/// Sessions, the public API.
pub mod session {
    /// Version 1.
    pub mod v1 {
        tonic::include_proto!("sandmesh.session.v1");
    }
}

/// Templates, and the artifacts they are made of.
pub mod template {
    /// Version 1.
    pub mod v1 {
        tonic::include_proto!("sandmesh.template.v1");

        /// Without the password: messages are printed where something went wrong.
        impl std::fmt::Debug for RegistryLogin {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_struct("RegistryLogin")
                    .field("registry", &self.registry)
                    .field("username", &self.username)
                    .finish_non_exhaustive()
            }
        }

        /// Without the value.
        impl std::fmt::Debug for BuildSecret {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_struct("BuildSecret")
                    .field("id", &self.id)
                    .finish_non_exhaustive()
            }
        }
    }
}

/// Nodes and their registry; internal.
pub mod node {
    /// Version 1.
    pub mod v1 {
        tonic::include_proto!("sandmesh.node.v1");
    }
}

/// The daemon inside the guest.
pub mod envd {
    /// Version 1.
    pub mod v1 {
        tonic::include_proto!("sandmesh.envd.v1");
    }
}

/// API keys; internal.
pub mod key {
    /// Version 1.
    pub mod v1 {
        tonic::include_proto!("sandmesh.key.v1");
    }
}

/// Encoded `FileDescriptorSet` of every package, with comments.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/sandmesh.bin"));

/// Encoded `FileDescriptorSet` of `sandmesh.envd.v1` alone, which is all a guest carries.
pub const ENVD_DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/envd.bin"));
