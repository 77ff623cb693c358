//! The whole path, with real parts: PostgreSQL clusters of the test's own, the proxy in this process or in one of its
//! own, clients that are drivers or bytes by hand. A file per behaviour.
//!
//! Tests that take long or much are `#[ignore]`d: `make test-full` runs them.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[path = "../support/postgres.rs"]
#[allow(dead_code, unreachable_pub, reason = "each test binary uses a part of it")]
mod postgres;
mod raw;
mod world;

mod addressed;
mod bad_input;
mod cancel;
mod classes;
mod copy;
mod demo;
mod drain;
mod encodings;
mod failures;
mod interleaved;
mod logins;
mod notify;
mod own_server;
mod pooling;
mod provisioning;
mod replication;
mod sequences;
mod startup;
mod statements;
mod tls;
