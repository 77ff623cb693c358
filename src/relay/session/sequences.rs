//! The state of sequences (`currval`, `lastval`): whose it is on this server connection.

use bytes::BytesMut;

use super::expect::Expect;
use super::{Link, Session, Verdict};
use crate::config::PoolMode;
use crate::pool::keepers::Claim;
use crate::pool::residue::Residue;
use crate::pool::statements::{Prepared, Registry, Stay};
use crate::wire::message;

impl Session {
    /// How much the client would miss the state of its sequences.
    pub fn claim(&self) -> Claim {
        match (self.has_asked, self.asked_last) {
            (false, _) if self.advanced_again => Claim::Unused,
            (false, _) => Claim::New,
            (true, true) => Claim::Asked,
            (true, false) => Claim::Due,
        }
    }

    /// Whether it has to keep this server connection for the state of sequences.
    pub fn keeps_sequences(&self, prepared: &Prepared) -> bool {
        self.asks && prepared.sequences_of == Some(self.stay())
    }

    /// Where it has advanced sequences last.
    #[inline]
    pub fn stay(&self) -> Stay {
        Stay { client: self.client, number: self.stay }
    }

    /// The state of sequences is a session's: who asks for it keeps its server connection, and never sees another's; as soon
    /// as one has asked, so do all clients of the tenant that advance any. `query` is the text, if it is a Query's.
    pub(super) fn note_sequences(
        &mut self,
        residue: &Residue,
        query: Option<&[u8]>,
        link: &mut Link<'_>,
        out: &mut BytesMut,
    ) {
        if self.pool_mode != PoolMode::Auto || !(residue.asks || residue.advances) {
            return;
        }
        if residue.asks {
            self.has_asked = true;
            link.registry.note_asks();
        }
        self.asked_last = residue.asks;
        self.asks |= link.registry.asks();
        self.residue.asks |= self.asks;
        let before = link.prepared.sequences_of;
        let own = before == Some(self.stay());
        let others = self.finds_others(link.prepared);
        let forgets = self.may_discard(residue, link.registry) && !query.is_some_and(needs_first_snapshot);
        if others && forgets {
            self.discard_sequences(query.is_some(), out);
        }
        self.advanced_again = own && (self.advanced_again || !self.advanced);
        self.advanced |= residue.advances;
        self.stay += u64::from(!own);
        let prepared = &mut *link.prepared;
        prepared.sequences_of = Some(self.stay());
        prepared.sequences_mixed = !(others && forgets) && (prepared.sequences_mixed || others) && before.is_some();
    }

    /// Whether the server connection may say what others did. In the transaction that has advanced it, it is about that.
    fn finds_others(&self, prepared: &Prepared) -> bool {
        match prepared.sequences_of {
            Some(before) if before == self.stay() => prepared.sequences_mixed && !self.advanced,
            before => before.is_some(),
        }
    }

    /// Whether that may be asked for, and can be forgotten.
    fn may_discard(&self, residue: &Residue, registry: &Registry) -> bool {
        // What is not understood may ask. An aborted transaction takes nothing but its end.
        (self.asks || residue.asks || residue.unknown || registry.asks()) && self.status != b'E'
    }

    /// Whether that has to be forgotten before the client's group of messages begins: within it this would be one more
    /// statement, beside which `CREATE INDEX CONCURRENTLY` and the like are refused.
    #[inline]
    pub(super) fn must_discard_first(&self, residue: &Residue, link: &Link<'_>) -> bool {
        let touches = self.pool_mode == PoolMode::Auto && (residue.asks || residue.advances);
        touches
            && self.may_come_before()
            && self.finds_others(link.prepared)
            && self.may_discard(residue, link.registry)
    }

    /// Does so. The message is to be looked at again behind it.
    pub(super) fn discard_first(&mut self, prepared: &mut Prepared, out: &mut BytesMut) -> Verdict {
        self.discard_sequences(false, out);
        message::sync(out);
        self.expects.push_back(Expect::InjectedSync);
        self.open_group = false;
        prepared.forget_sequences();
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
        self.step(text, Expect::InjectedDiscard, out);
    }

    /// What comes behind a DISCARD in the same Query counts again.
    #[inline]
    pub(super) fn may_advance(&mut self, prepared: &mut Prepared) {
        if std::mem::take(&mut self.forgot_sequences) {
            prepared.sequences_of = Some(self.stay());
        }
    }
}

/// Whether a text may say of its transaction what has to be said before anything else is done in it, also by us.
fn needs_first_snapshot(text: &[u8]) -> bool {
    let contains = |word: &&str| text.windows(word.len()).any(|found| found.eq_ignore_ascii_case(word.as_bytes()));
    ["isolation", "snapshot", "deferrable", "read write"].iter().any(contains)
}
