//! The back side: server connections.

pub mod tls;
