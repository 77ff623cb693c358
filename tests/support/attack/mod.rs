//! Runs a corpus of attacks through a running proxy and says what leaked.
//!
//! Used by `examples/attack.rs`, which reads any corpus, and by `tests/attacks.rs`, which runs our own. It needs nothing
//! of the product's code: what it knows of the proxy is its wire protocol, its metrics and the servers behind it.
//!
//! - [`corpus`]: the files, and when an entry counts as a leak;
//! - [`client`]: a client that says exactly what it is told, right or wrong;
//! - [`target`]: where the proxy is, or one of our own;
//! - [`fixture`]: what the tenants own when an entry starts;
//! - [`run`]: one entry, start to verdict; [`report`]: all of them.
#![allow(dead_code, missing_docs, unreachable_pub, reason = "each user uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

pub mod client;
pub mod corpus;
pub mod fixture;
pub mod report;
pub mod run;
pub mod target;

/// Why an attack could not be tried; never an attack's outcome.
pub type Error = Box<dyn std::error::Error + Send + Sync>;
