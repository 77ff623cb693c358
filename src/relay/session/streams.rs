//! Replication from a server that others use, too: what may be said to a walsender, and under which name a stream runs.

use bytes::BytesMut;

use super::expect::Expect;
use super::{Link, Session, Verdict};
use crate::error::{PgError, sqlstate};
use crate::relay::replication::{self, Said};
use crate::tenant::sql::Literal;
use crate::wire::message;

/// What a logical stream's client tells the walsender: how far it has come.
/// <https://www.postgresql.org/docs/current/protocol-replication.html>
pub(super) const STATUS_UPDATE: u8 = b'r';

/// The streams of a client that replicates from a server that others use, too.
#[derive(Debug)]
pub(super) struct Streams {
    /// Their application_name. With a standby's a stream would be a standby: commits of all tenants would wait for it,
    /// and be safe when it says so.
    pub(super) name: Box<str>,
    /// What came of setting it, for the `START_REPLICATION` that waits for that.
    pub(super) named: Option<Result<(), PgError>>,
}

impl Session {
    /// A Query of who replicates from a server that others use, too, unless it is SQL.
    pub(super) fn replicate(
        &mut self,
        text: &[u8],
        whole: bool,
        link: &mut Link<'_>,
        out: &mut BytesMut,
    ) -> Option<Verdict> {
        let said = replication::read(text, whole);
        if said == Ok(Said::Sql) {
            return None;
        }
        let mut named = None;
        if said == Ok(Said::Stream)
            && let Some(streams) = &mut self.streams
        {
            named = streams.named.take();
            if named.is_none() {
                message::query(out, &format!("SET application_name = {}", Literal(&streams.name)));
                self.expects.push_back(Expect::InjectedQuery);
                return Some(Verdict::Ahead);
            }
        }
        (self.unnamed, link.prepared.unnamed, self.open_group) = (None, None, false);
        self.queries += 1;
        Some(match said {
            Ok(Said::Sql | Said::Command) => {
                self.expects.push_back(Expect::Query(None));
                Verdict::Forward
            }
            Ok(Said::Stream) => match named {
                // It may have been cancelled, or in a transaction that has failed.
                Some(Err(error)) => self.refuse_query(error, out),
                _ => {
                    self.expects.push_back(Expect::Stream);
                    Verdict::Forward
                }
            },
            Ok(Said::Drop { slot, wait }) => {
                message::query(out, &format!("CALL tenant_shim.pgusher_drop_slot({}, {wait})", Literal(&slot)));
                self.expects.push_back(Expect::DropSlot);
                Verdict::Instead
            }
            Err(refusal) => {
                link.ward.replication_refused(refusal.what());
                self.refuse_query(refusal.error(), out)
            }
        })
    }

    /// What came of a Query of ours, for the `START_REPLICATION` that waits for it.
    pub(super) fn note_stream_name(&mut self, outcome: Result<(), PgError>) {
        if let Some(streams) = &mut self.streams {
            streams.named = Some(outcome);
        }
    }

    /// Whether what comes now may be for a walsender that streams, beside others.
    #[inline]
    pub fn may_stream(&self) -> bool {
        self.streams.is_some() && self.expects.iter().any(|e| matches!(e, Expect::Stream))
    }
}

pub(super) fn no_feedback() -> PgError {
    PgError::fatal(sqlstate::INSUFFICIENT_PRIVILEGE, "permission denied: feedback other than a status update")
        .detail("Hot standby feedback keeps the server from cleaning up in the databases of all tenants.")
        .hint("A client of a logical stream sends standby status updates only.")
}
