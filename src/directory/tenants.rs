//! The tenants by name: a table of pointers, in which a tenant's name is kept once, in the tenant itself.
//!
//! With half a million of them every byte counts and every pointer followed is a cache miss, hence no map with keys of
//! its own. The table is in parts, each behind a lock that a reader holds for one look-up and a writer for one change.

use std::num::NonZeroU64;
use std::sync::Arc;

use hashbrown::HashTable;
use hashbrown::hash_table::Entry as Place;
use parking_lot::RwLock;

use super::Tenant;

/// A power of two.
const PARTS: usize = 64;

/// The tenants, by name.
pub(super) struct Tenants {
    parts: [RwLock<HashTable<Entry>>; PARTS],
    hasher: ahash::RandomState,
}

struct Entry {
    tenant: Arc<Tenant>,
    /// Bytes that it uses, as last measured. Not in the tenant, which never changes.
    storage: Option<NonZeroU64>,
}

impl Entry {
    fn is(&self, id: &str) -> bool {
        self.tenant.id.as_str() == id
    }
}

impl Tenants {
    pub(super) fn new() -> Self {
        Self { parts: [const { RwLock::new(HashTable::new()) }; PARTS], hasher: ahash::RandomState::new() }
    }

    fn hash(&self, id: &str) -> u64 {
        self.hasher.hash_one(id)
    }

    /// By bits that the table itself looks at last.
    fn part(&self, hash: u64) -> &RwLock<HashTable<Entry>> {
        &self.parts[(hash >> 32) as usize % PARTS]
    }

    pub(super) fn get(&self, id: &str) -> Option<Arc<Tenant>> {
        let hash = self.hash(id);
        self.part(hash).read().find(hash, |entry| entry.is(id)).map(|entry| entry.tenant.clone())
    }

    /// Puts a tenant in place of the one with its name, which is returned.
    pub(super) fn put(&self, tenant: Arc<Tenant>) -> Option<Arc<Tenant>> {
        let hash = self.hash(tenant.id.as_str());
        let mut part = self.part(hash).write();
        let place = part.entry(hash, |entry| entry.is(tenant.id.as_str()), |entry| self.hash(entry.tenant.id.as_str()));
        match place {
            Place::Occupied(mut known) => Some(std::mem::replace(&mut known.get_mut().tenant, tenant)),
            Place::Vacant(free) => {
                free.insert(Entry { tenant, storage: None });
                None
            }
        }
    }

    pub(super) fn remove(&self, id: &str) -> Option<Arc<Tenant>> {
        let hash = self.hash(id);
        let mut part = self.part(hash).write();
        let found = part.find_entry(hash, |entry| entry.is(id)).ok()?;
        Some(found.remove().0.tenant)
    }

    /// Bytes that a tenant uses, as last measured.
    pub(super) fn storage(&self, id: &str) -> Option<u64> {
        let hash = self.hash(id);
        let part = self.part(hash).read();
        part.find(hash, |entry| entry.is(id))?.storage.map(NonZeroU64::get)
    }

    /// Notes what was measured; whether there is such a tenant.
    pub(super) fn set_storage(&self, id: &str, bytes: u64) -> bool {
        let hash = self.hash(id);
        let mut part = self.part(hash).write();
        let entry = part.find_mut(hash, |entry| entry.is(id));
        entry.map(|entry| entry.storage = NonZeroU64::new(bytes)).is_some()
    }

    pub(super) fn len(&self) -> usize {
        self.parts.iter().map(|part| part.read().len()).sum()
    }

    /// All of them, part by part: none is missed that is there all the time, and no lock is held while they are used.
    pub(super) fn iter(&self) -> impl Iterator<Item = Arc<Tenant>> {
        self.parts.iter().flat_map(|part| {
            let tenants: Vec<_> = part.read().iter().map(|entry| entry.tenant.clone()).collect();
            tenants
        })
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
}
