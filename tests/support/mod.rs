//! What the test binaries share.
#![allow(dead_code, missing_docs, unreachable_pub, reason = "each test binary uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

pub mod postgres;
