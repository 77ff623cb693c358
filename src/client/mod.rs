//! From accept to an authenticated client.
//!
//! Everything here that decides has no I/O: bytes and values in, decisions out.

pub mod auth;
pub mod handshake;
pub mod parameters;
