//! What is refused, and in what words.
//!
//! A message that the client may not send is replaced by one that the server is bound to reject, and the server's error by
//! ours. So a transaction fails, a pipeline is skipped and an implicit transaction is rolled back just as if the server
//! itself had refused.

use bytes::BytesMut;

use super::expect::Expect;
use super::parse::CHECK;
use super::{Session, Verdict};
use crate::config::PoolMode;
use crate::error::{PgError, sqlstate};
use crate::relay::scan;
use crate::wire::message;

/// Text that no PostgreSQL parses.
const REJECTED: &str = "refused by pgusher:";

impl Session {
    /// What cannot work when the server connection goes back after the transaction.
    pub(super) fn cannot_pool(&self, text: &[u8]) -> Option<PgError> {
        if self.pool_mode != PoolMode::Transaction || !scan::begins_with(text, b"listen") {
            return None;
        }
        let error =
            PgError::error(sqlstate::FEATURE_NOT_SUPPORTED, "LISTEN does not work with pool_mode = \"transaction\"");
        let detail = "Notifications would arrive at whoever uses the server connection next.";
        Some(error.detail(detail).hint("Use pool_mode = \"auto\" or \"session\"."))
    }

    /// Lets the server reject a Query in the place of what the client sent.
    pub(super) fn refuse_query(&mut self, error: PgError, out: &mut BytesMut) -> Verdict {
        message::query(out, REJECTED);
        self.expects.push_back(Expect::RefusedQuery(Box::new(error)));
        Verdict::Instead
    }

    /// Lets the server reject a Parse in the place of what the client sent. One of the unnamed statement takes away what
    /// that was.
    pub(super) fn refuse_parse(&mut self, unnamed: bool, error: PgError, out: &mut BytesMut) -> Verdict {
        message::parse(out, if unnamed { b"" } else { CHECK }, REJECTED.as_bytes(), &[0, 0]);
        self.push_extended(Expect::RefusedParse(Box::new(error)));
        Verdict::Instead
    }

    pub(super) fn unknown(&mut self, out: &mut BytesMut) -> Verdict {
        let text = "unnamed prepared statement does not exist";
        self.refuse_parse(false, PgError::error(sqlstate::UNKNOWN_STATEMENT, text), out)
    }
}

pub(super) fn malformed(kind: &str) -> PgError {
    PgError::fatal(sqlstate::PROTOCOL_VIOLATION, format!("invalid {kind} message"))
}
