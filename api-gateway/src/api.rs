//! The gRPC services of the gateway.

mod key;
mod session;
mod template;

pub use key::KeyApi;
pub use session::SessionApi;
pub use template::TemplateApi;
