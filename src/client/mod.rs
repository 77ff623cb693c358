//! From accept to an authenticated client.
//!
//! What decides here has no I/O: bytes and values in, decisions out.

pub mod auth;
pub mod handshake;
pub mod login;
pub mod parameters;
pub mod sessions;
pub mod signals;
pub mod tls;
