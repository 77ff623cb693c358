//! What the fuzzers run: one function per target, which panics when an invariant does not hold.
//!
//! `tests/fuzz_seeds.rs` runs the same functions once over the seeds, on stable, so that neither rots.

pub mod framing;
pub mod guard;
pub mod scram_client;
pub mod scram_server;
pub mod startup;

/// Takes numbers off the front of the input; zeros when it is used up.
pub(crate) struct Input<'a>(pub(crate) &'a [u8]);

impl<'a> Input<'a> {
    pub(crate) fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        first
    }

    pub(crate) fn word(&mut self) -> usize {
        usize::from(self.byte()) << 8 | usize::from(self.byte())
    }

    pub(crate) fn take(&mut self, n: usize) -> &'a [u8] {
        let (front, rest) = self.0.split_at(n.min(self.0.len()));
        self.0 = rest;
        front
    }
}
