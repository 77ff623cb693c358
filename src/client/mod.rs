//! The front side: from accept to an authenticated client.

pub mod tls;
