//! The tenants by name: a table of pointers, in which a tenant's name is kept once, in the tenant itself.
//!
//! With half a million of them every byte counts and every place looked at is a miss of cache and page table, hence no
//! map with keys of its own: the hash stands beside the pointer, so that a look-up touches two places, the slot and the
//! tenant. The table is in parts, each behind a lock that a reader holds for one look-up and a writer for one change.

use std::sync::Arc;

use parking_lot::RwLock;

use super::Tenant;

/// A power of two.
const PARTS: usize = 64;

/// The tenants, by name.
pub(super) struct Tenants {
    parts: [RwLock<Table>; PARTS],
    hasher: ahash::RandomState,
}

impl Tenants {
    pub(super) fn new() -> Self {
        Self { parts: [const { RwLock::new(Table::new()) }; PARTS], hasher: ahash::RandomState::new() }
    }

    /// The part that a name belongs to, and its hash there.
    #[inline]
    fn part(&self, id: &str) -> (&RwLock<Table>, u32) {
        let hash = self.hasher.hash_one(id);
        (&self.parts[(hash >> 32) as usize % PARTS], hash as u32)
    }

    #[inline]
    pub(super) fn get(&self, id: &str) -> Option<Arc<Tenant>> {
        let (part, hash) = self.part(id);
        let part = part.read();
        part.find(id, hash).and_then(|at| part.slots[at].tenant.clone())
    }

    /// Puts a tenant in place of the one with its name, which is returned.
    pub(super) fn put(&self, tenant: Arc<Tenant>) -> Option<Arc<Tenant>> {
        let (part, hash) = self.part(tenant.id.as_str());
        let mut part = part.write();
        match part.find(tenant.id.as_str(), hash) {
            Some(at) => part.slots[at].tenant.replace(tenant),
            None => {
                part.insert(Slot { hash, tenant: Some(tenant) }, 0);
                None
            }
        }
    }

    pub(super) fn remove(&self, id: &str) -> Option<Arc<Tenant>> {
        let (part, hash) = self.part(id);
        let mut part = part.write();
        part.find(id, hash).and_then(|at| part.remove(at))
    }

    /// Bytes that a tenant uses, as last measured.
    pub(super) fn storage(&self, id: &str) -> Option<u64> {
        let (part, hash) = self.part(id);
        let part = part.read();
        part.find(id, hash).map(|at| part.storage[at]).filter(|&bytes| bytes > 0)
    }

    /// Notes what was measured; whether there is such a tenant.
    pub(super) fn set_storage(&self, id: &str, bytes: u64) -> bool {
        let (part, hash) = self.part(id);
        let mut part = part.write();
        let found = part.find(id, hash);
        found.map(|at| part.storage[at] = bytes).is_some()
    }

    pub(super) fn len(&self) -> usize {
        self.parts.iter().map(|part| part.read().len).sum()
    }

    /// All of them, part by part: none is missed that is there all the time, and no lock is held while they are used.
    pub(super) fn iter(&self) -> impl Iterator<Item = Arc<Tenant>> {
        self.parts.iter().flat_map(|part| {
            let tenants: Vec<_> = part.read().slots.iter().filter_map(|slot| slot.tenant.clone()).collect();
            tenants
        })
    }
}

/// Open addressing, linear probing, no tombstones: from a tenant's own place to where it is no slot is free.
struct Table {
    slots: Vec<Slot>,
    /// Bytes that the tenant in the slot of this number uses, as last measured; 0 if it was not. Not in the tenant, which
    /// never changes, nor in the slot, of which four are to fit into a cache line.
    storage: Vec<u64>,
    len: usize,
}

#[derive(Clone, Default)]
struct Slot {
    hash: u32,
    tenant: Option<Arc<Tenant>>,
}

impl Table {
    const fn new() -> Self {
        Self { slots: Vec::new(), storage: Vec::new(), len: 0 }
    }

    /// Where a hash wants to be, for any number of slots.
    #[inline]
    fn home(&self, hash: u32) -> usize {
        ((u64::from(hash) * self.slots.len() as u64) >> 32) as usize
    }

    #[inline]
    fn after(&self, at: usize) -> usize {
        if at + 1 == self.slots.len() { 0 } else { at + 1 }
    }

    #[inline]
    fn find(&self, id: &str, hash: u32) -> Option<usize> {
        let mut at = self.home(hash);
        loop {
            let slot = self.slots.get(at)?;
            let tenant = slot.tenant.as_ref()?;
            if slot.hash == hash && tenant.id.as_str() == id {
                return Some(at);
            }
            at = self.after(at);
        }
    }

    /// Takes in what is not there yet.
    fn insert(&mut self, slot: Slot, storage: u64) {
        if (self.len + 1) * 4 > self.slots.len() * 3 {
            self.grow();
        }
        let mut at = self.home(slot.hash);
        while self.slots[at].tenant.is_some() {
            at = self.after(at);
        }
        (self.slots[at], self.storage[at]) = (slot, storage);
        self.len += 1;
    }

    /// Half as many slots more; needs no look at the tenants.
    fn grow(&mut self) {
        let size = (self.slots.len() + self.slots.len() / 2).max(8);
        let slots = std::mem::replace(&mut self.slots, vec![Slot::default(); size]);
        let storage = std::mem::replace(&mut self.storage, vec![0; size]);
        self.len = 0;
        for (slot, storage) in slots.into_iter().zip(storage) {
            if slot.tenant.is_some() {
                self.insert(slot, storage);
            }
        }
    }

    /// Empties a slot, and moves into it what would not be found behind it.
    fn remove(&mut self, mut at: usize) -> Option<Arc<Tenant>> {
        let removed = std::mem::take(&mut self.slots[at]).tenant;
        self.storage[at] = 0;
        self.len -= 1;
        let mut next = self.after(at);
        while self.slots[next].tenant.is_some() {
            let home = self.home(self.slots[next].hash);
            // Whether `home` lies, going round, behind the gap and not behind `next`: then it is found where it is.
            let stays = if at < next { at < home && home <= next } else { at < home || home <= next };
            if !stays {
                self.slots.swap(at, next);
                self.storage.swap(at, next);
                at = next;
            }
            next = self.after(next);
        }
        removed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::directory::Shard;
    use crate::tenant::{Plan, Status, TenantId};

    fn tenant(id: &str, shard: &Arc<Shard>, epoch: u64) -> Arc<Tenant> {
        let id = TenantId::parse(id).unwrap();
        let (plan, status, verifier) = (Plan::Schema, Status::Active, None);
        Arc::new(Tenant { id, plan, shard: shard.clone(), status, epoch, verifier, names: None, managed: true })
    }

    #[test]
    fn what_was_put_last_is_found_and_measurements_stay() {
        let (tenants, shard) = (Tenants::new(), Arc::new(Shard::for_tests("a")));
        let names: Vec<String> = (0..5000).map(|n| format!("client_{n}")).collect();
        for epoch in [1, 2] {
            for name in &names {
                let old = tenants.put(tenant(name, &shard, epoch));
                assert_eq!(old.map(|old| old.epoch), (epoch == 2).then_some(1));
                assert_eq!(tenants.storage(name).is_some(), epoch == 2);
                assert!(tenants.set_storage(name, 7));
            }
        }
        assert_eq!(tenants.len(), names.len());
        assert!(names.iter().all(|name| tenants.get(name).is_some_and(|t| t.id.as_str() == name && t.epoch == 2)));
        assert_eq!(tenants.iter().map(|t| t.id.to_string()).collect::<std::collections::HashSet<_>>().len(), 5000);
        assert!(names.iter().all(|name| tenants.remove(name).is_some() && tenants.remove(name).is_none()));
        assert_eq!((tenants.len(), tenants.get("client_1").is_none()), (0, true));
        assert!(!tenants.set_storage("client_1", 7));
    }
    #[test]
    fn the_table_does_what_a_map_does() {
        let (tenants, shard) = (Tenants::new(), Arc::new(Shard::for_tests("a")));
        let mut model = std::collections::HashMap::new();
        let mut state = 88_172_645_463_325_252_u64;
        for step in 0..60_000_u64 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            // Few names for many parts, so that parts fill, empty and fill again.
            let name = format!("t{}", state % 3000);
            match (state >> 32) % 5 {
                0 | 1 => {
                    let old = tenants.put(tenant(&name, &shard, step)).map(|old| old.epoch);
                    let known: Option<&mut (u64, u64)> = model.get_mut(&name);
                    assert_eq!(old, known.as_ref().map(|known| known.0));
                    match known {
                        Some(known) => known.0 = step,
                        None => drop(model.insert(name, (step, 0))),
                    }
                }
                2 => assert_eq!(tenants.remove(&name).map(|old| old.epoch), model.remove(&name).map(|old| old.0)),
                3 => assert_eq!(
                    tenants.set_storage(&name, step + 1),
                    model.get_mut(&name).map(|known| known.1 = step + 1).is_some()
                ),
                _ => {
                    assert_eq!(tenants.get(&name).map(|found| found.epoch), model.get(&name).map(|known| known.0));
                    let bytes = model.get(&name).map(|known| known.1).filter(|&bytes| bytes > 0);
                    assert_eq!(tenants.storage(&name), bytes);
                }
            }
            assert_eq!(tenants.len(), model.len());
        }
        assert!(model.iter().all(|(name, (epoch, _))| tenants.get(name).is_some_and(|t| t.epoch == *epoch)));
    }
}
