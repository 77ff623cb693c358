//! Which names may be tenants', without a lock.

use std::sync::atomic::{AtomicU64, Ordering};

/// The names of all tenants, in so little space and time that every qualified name in every statement can be asked
/// for: a filter that forgets nothing and is sometimes wrong. Reading it takes no lock.
pub struct NameSet {
    bits: Box<[AtomicU64]>,
    hasher: ahash::RandomState,
}

impl Default for NameSet {
    fn default() -> Self {
        Self { bits: (0..WORDS).map(|_| AtomicU64::new(0)).collect(), hasher: ahash::RandomState::new() }
    }
}

/// 1 MiB: half a million names make it wrong once in seventeen times, ten thousand once in eight hundred.
const WORDS: usize = 1 << 17;

impl NameSet {
    /// Notes a name.
    pub fn add(&self, name: &str) {
        let (word, bit) = self.place(name.as_bytes());
        self.bits[word].fetch_or(bit, Ordering::Relaxed);
    }

    /// Whether the name may be one that was noted; never wrongly no.
    #[inline]
    pub fn may_have(&self, name: &[u8]) -> bool {
        let (word, bit) = self.place(name);
        self.bits[word].load(Ordering::Relaxed) & bit != 0
    }

    fn place(&self, name: &[u8]) -> (usize, u64) {
        let hash = self.hasher.hash_one(name);
        ((hash >> 6) as usize & (WORDS - 1), 1 << (hash & 63))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_never_forgotten() {
        let names = NameSet::default();
        assert!(!names.may_have(b"client_1"));
        (0..1000).for_each(|n| names.add(&format!("client_{n}")));
        assert!((0..1000).all(|n| names.may_have(format!("client_{n}").as_bytes())));
        let wrong = (0..10_000).filter(|n| names.may_have(format!("other_{n}").as_bytes())).count();
        assert!(wrong < 100, "{wrong}");
    }
}
