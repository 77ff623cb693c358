//! The state of sequences (`currval`, `lastval`): whose it is on this server connection.

use bytes::BytesMut;

use super::expect::Expect;
use super::{Session, Verdict};
use crate::config::PoolMode;
use crate::pool::residue::Residue;
use crate::pool::statements::Prepared;
use crate::wire::message;

impl Session {
    /// The state of sequences is a session's: who asks for it keeps its server connection, and never sees another's.
    /// `query` is the text, if it is a Query's.
    pub(super) fn note_sequences(
        &mut self,
        residue: &Residue,
        query: Option<&[u8]>,
        prepared: &mut Prepared,
        out: &mut BytesMut,
    ) {
        if self.pool_mode != PoolMode::Auto || !(residue.asks || residue.advances) {
            return;
        }
        self.asks |= residue.asks;
        self.residue.asks |= self.asks;
        if self.finds_others(residue, prepared) && !query.is_some_and(needs_first_snapshot) {
            self.discard_sequences(query.is_some(), out);
        }
        prepared.sequences_of = Some(self.client);
    }

    /// Whether what runs may ask for the state of sequences, and would find another client's.
    fn finds_others(&self, residue: &Residue, prepared: &Prepared) -> bool {
        // An aborted transaction takes nothing but its end.
        let others = prepared.sequences_of.is_some_and(|client| client != self.client) && self.status != b'E';
        // What is not understood may ask, and makes the state ours.
        others && (residue.asks || residue.advances && (self.asks || residue.unknown))
    }

    /// Whether that has to be forgotten before the client's group of messages begins: within it this would be one more
    /// statement, beside which `CREATE INDEX CONCURRENTLY` and the like are refused.
    #[inline]
    pub(super) fn must_discard_first(&self, residue: &Residue, prepared: &Prepared) -> bool {
        self.pool_mode == PoolMode::Auto && !self.open_group && self.finds_others(residue, prepared)
    }

    /// Does so. The message is to be looked at again behind it.
    pub(super) fn discard_first(&mut self, prepared: &mut Prepared, out: &mut BytesMut) -> Verdict {
        self.discard_sequences(false, out);
        message::sync(out);
        self.expects.push_back(Expect::InjectedSync);
        (self.open_group, prepared.sequences_of) = (false, None);
        Verdict::Ahead
    }

    /// Lets the session forget what another client has left. A Query would take the unnamed statement away.
    fn discard_sequences(&mut self, simple: bool, out: &mut BytesMut) {
        let text = "DISCARD SEQUENCES";
        if simple && !self.open_group {
            message::query(out, text);
            self.expects.push_back(Expect::InjectedQuery);
            return;
        }
        self.step(text, out);
    }

    /// What comes behind a DISCARD in the same Query counts again.
    #[inline]
    pub(super) fn may_advance(&mut self, prepared: &mut Prepared) {
        if std::mem::take(&mut self.forgot_sequences) {
            prepared.sequences_of = Some(self.client);
        }
    }
}

/// Whether a text may say of its transaction what has to be said before anything else is done in it, also by us.
fn needs_first_snapshot(text: &[u8]) -> bool {
    let contains = |word: &&str| text.windows(word.len()).any(|found| found.eq_ignore_ascii_case(word.as_bytes()));
    ["isolation", "snapshot", "deferrable", "read write"].iter().any(contains)
}
