//! Placement of *new* tenants: a consistent-hash ring with virtual nodes.
//!
//! Invariant: the same shards and weights send the same id to the same shard in every release. Hence what is hashed
//! are explicit bytes, the hash is SHA-256, and a golden file of 1,000 ids pins both. Where a tenant *is* stands in
//! the catalog; the ring is asked once in a tenant's life.

use std::hash::{BuildHasher, Hash, Hasher};
use std::sync::Arc;

use hashring::HashRing;
use sha2::{Digest as _, Sha256};

/// Virtual nodes per 100 of weight. With 256 the fullest of a few equal shards is some ten per cent above the mean.
const NODES_PER_100_WEIGHT: u64 = 256;

/// Weights above this count as this, so that a slip in a config cannot fill the memory.
const MAX_WEIGHT: u32 = 10_000;

/// Which shard a new tenant goes to.
#[derive(Clone)]
pub struct Ring {
    ring: HashRing<VirtualNode, Sha256Builder>,
}

impl Ring {
    /// A ring of shards with their weights, in any order. Weight 0 takes nothing.
    pub fn new<'a>(shards: impl IntoIterator<Item = (&'a str, u32)>) -> Self {
        let mut shards: Vec<_> = shards.into_iter().filter(|&(_, weight)| weight > 0).collect();
        // The crate sorts by hash and keeps ties in the order of insertion; a fixed order makes them no exception.
        shards.sort_unstable();
        shards.dedup_by_key(|shard| shard.0);
        let mut ring = HashRing::with_hasher(Sha256Builder);
        ring.batch_add(shards.into_iter().flat_map(|(name, weight)| virtual_nodes(name, weight)).collect());
        Self { ring }
    }

    /// The shard for a new tenant; none if no shard takes tenants.
    pub fn place(&self, tenant: &str) -> Option<&str> {
        self.ring.get(&Key(tenant)).map(|node| &*node.shard)
    }
}

fn virtual_nodes(name: &str, weight: u32) -> impl Iterator<Item = VirtualNode> {
    let count = (u64::from(weight.min(MAX_WEIGHT)) * NODES_PER_100_WEIGHT).div_ceil(100);
    let shard: Arc<str> = name.into();
    (0..count).map(move |index| VirtualNode { shard: shard.clone(), index })
}

#[derive(Clone)]
struct VirtualNode {
    shard: Arc<str>,
    index: u64,
}

// Written by hand: a derived `Hash` would hash whatever layout and length prefixes the compiler's library has today.
impl Hash for VirtualNode {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write(b"pgusher ring v1 node\0");
        state.write(self.shard.as_bytes());
        state.write(b"\0");
        state.write(&self.index.to_be_bytes());
    }
}

struct Key<'a>(&'a str);

impl Hash for Key<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write(b"pgusher ring v1 tenant\0");
        state.write(self.0.as_bytes());
    }
}

#[derive(Clone)]
struct Sha256Builder;

impl BuildHasher for Sha256Builder {
    type Hasher = Sha256Hasher;

    fn build_hasher(&self) -> Sha256Hasher {
        Sha256Hasher(Sha256::new())
    }
}

struct Sha256Hasher(Sha256);

impl Hasher for Sha256Hasher {
    fn write(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    fn finish(&self) -> u64 {
        let digest: [u8; 32] = self.0.clone().finalize().into();
        digest.iter().take(8).fold(0, |key, &byte| key << 8 | u64::from(byte))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn ids() -> impl Iterator<Item = String> {
        (0..1000).map(|n| format!("client_{n:03}"))
    }

    fn counts(ring: &Ring, n: usize) -> HashMap<String, usize> {
        let mut counts = HashMap::new();
        for id in (0..n).map(|n| format!("t{n}")) {
            *counts.entry(ring.place(&id).unwrap().to_owned()).or_default() += 1;
        }
        counts
    }

    #[test]
    fn a_thousand_ids_stay_where_they_were_in_every_release() {
        let ring = Ring::new([("shard_1", 100), ("shard_2", 100), ("shard_3", 50), ("shard_4", 0)]);
        let mut text = String::new();
        for id in ids() {
            text.push_str(&format!("{id} {}\n", ring.place(&id).unwrap()));
        }
        let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/ring.txt");
        if std::env::var_os("PGUSHER_WRITE_GOLDEN").is_some() {
            std::fs::write(golden, &text).unwrap();
        }
        assert_eq!(text, std::fs::read_to_string(golden).unwrap());
    }

    #[test]
    fn shares_follow_weights() {
        let ring = Ring::new([("a", 100), ("b", 100), ("c", 200), ("d", 0)]);
        let counts = counts(&ring, 20_000);
        for (shard, share) in [("a", 0.25), ("b", 0.25), ("c", 0.5)] {
            let got = counts[shard] as f64 / 20_000.0;
            assert!((got / share - 1.0).abs() < 0.2, "{shard}: {got}");
        }
        assert!(!counts.contains_key("d"));
    }

    #[test]
    fn a_shard_more_takes_only_its_share_and_nothing_else_moves() {
        let names: Vec<String> = (0..10).map(|n| format!("s{n}")).collect();
        let before = Ring::new(names.iter().map(|name| (name.as_str(), 100)));
        let after = Ring::new(names.iter().map(|name| (name.as_str(), 100)).chain([("new", 100)]));
        let mut moved = 0;
        for id in (0..10_000).map(|n| format!("t{n}")) {
            let (was, is) = (before.place(&id).unwrap(), after.place(&id).unwrap());
            if was != is {
                assert_eq!(is, "new");
                moved += 1;
            }
        }
        assert!((600..1250).contains(&moved), "{moved} of 10,000 moved, 909 expected");
    }

    #[test]
    fn order_and_repetition_do_not_matter() {
        let one = Ring::new([("a", 100), ("b", 100), ("c", 30)]);
        let other = Ring::new([("c", 30), ("a", 100), ("b", 100), ("a", 100)]);
        assert!(ids().all(|id| one.place(&id) == other.place(&id)));
    }

    #[test]
    fn an_empty_ring_places_nobody() {
        assert_eq!(Ring::new([]).place("x"), None);
        assert_eq!(Ring::new([("a", 0)]).place("x"), None);
    }
}
