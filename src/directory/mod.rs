//! Where a tenant lives: the proxy's in-memory view of the catalog.
//!
//! Reading never waits on I/O. Entries are immutable snapshots behind `Arc`; a change replaces the entry and raises
//! [`Directory::version`], so that a connection which remembers the version it saw pays one atomic load per
//! transaction to learn that nothing changed.

pub mod catalog;
pub mod connector;
pub mod follow;
pub mod names;
pub mod ring;
pub mod snapshot;
mod tenants;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use arc_swap::ArcSwap;
use dashmap::DashMap;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};

use crate::error::PgError;
use crate::tenant::credential::Verifier;
use crate::tenant::plan::Databases;
use crate::tenant::{Plan, Status, TenantId};

use self::names::NameSet;
use self::ring::Ring;
use self::tenants::Tenants;

/// A PostgreSQL cluster that tenants live on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shard {
    /// Its name in the catalog and in metrics.
    pub name: String,
    /// Host name, address, or directory of a Unix socket (starts with `/`).
    pub host: String,
    /// TCP port, or the number in the Unix socket's name.
    pub port: u16,
    /// The database that holds the tenants of plan `schema`.
    pub database: String,
    /// The database that holds the tenants of plan `rls`.
    pub rls_database: String,
    /// The tenant that has the shard to itself; it takes no other.
    pub dedicated_to: Option<TenantId>,
    /// Weight on the ring; 0 takes no new tenants.
    pub weight: u32,
    /// Where it stands, for placement and display; may be empty.
    pub region: String,
    /// Most server connections that this proxy opens to it.
    pub max_db_connections: usize,
}

#[cfg(test)]
impl Shard {
    /// Some shard of that name.
    pub(crate) fn for_tests(name: &str) -> Self {
        Self {
            name: name.into(),
            host: "127.0.0.1".into(),
            port: 5432,
            database: "tenants".into(),
            rls_database: "shared".into(),
            dedicated_to: None,
            weight: 100,
            region: String::new(),
            max_db_connections: 10,
        }
    }
}

impl Shard {
    /// Its databases that tenants share.
    pub fn databases(&self) -> Databases<'_> {
        Databases { schemas: &self.database, rows: &self.rls_database }
    }
}

/// Names of a tenant's place that are not what its plan would give it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Names {
    /// Schema of its tables.
    pub schema: String,
    /// Role of its server connections.
    pub role: String,
}

/// A tenant as this proxy knows it.
// In this order in memory: a look-up compares the name, and counts a reference just before it.
#[derive(Clone, PartialEq)]
#[repr(C)]
pub struct Tenant {
    /// Its name.
    pub id: TenantId,
    /// Where it lives. Its `database` is the one recorded for this tenant, which need not be where new tenants go.
    pub shard: Arc<Shard>,
    /// Grows each time home or status change.
    pub epoch: u64,
    /// Names that were there before the tenant; `None` is what the plan says.
    pub names: Option<Box<Names>>,
    /// How it is separated.
    pub plan: Plan,
    /// Whether it may be used.
    pub status: Status,
    /// Whether pgusher made its place, and its role's password.
    pub managed: bool,
    /// The tenant's own credential, if it has one.
    pub verifier: Option<Verifier>,
}

impl Tenant {
    /// The role that its server connections log in as.
    pub fn role(&self) -> &str {
        self.names.as_ref().map_or(self.id.as_str(), |names| &names.role)
    }

    /// The schema that holds its objects.
    pub fn schema(&self) -> &str {
        self.names.as_ref().map_or_else(|| self.plan.default_schema(&self.id), |names| &names.schema)
    }

    /// The database that it lives in.
    pub fn database(&self) -> &str {
        &self.shard.database
    }

    /// The startup settings with which an unchanged client finds its tables.
    pub fn startup_settings(&self) -> Vec<(String, String)> {
        self.plan.startup_settings(self.schema())
    }
}

/// A login that is entitled to several tenants.
#[derive(Clone, PartialEq)]
pub struct AppUser {
    /// Its name.
    pub name: String,
    /// Its credential; `None` cannot log in by password.
    pub verifier: Option<Verifier>,
    /// Tenants it may use: names, or patterns with `*`.
    pub tenants: Vec<String>,
    /// Whether it may make a tenant by connecting.
    pub auto_provision: bool,
}

impl AppUser {
    /// Whether one of the user's patterns names this tenant. `*` stands for any run of characters.
    pub fn may_use(&self, id: &TenantId) -> bool {
        self.tenants.iter().any(|pattern| matches(pattern, id.as_str()))
    }
}

/// Matches a pattern in which `*` stands for any run of characters.
pub fn matches(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else { return false };
    let Some(last) = parts.next_back() else { return rest.is_empty() };
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

/// Asks the control plane to make a tenant; answered when it is ready or has failed.
pub struct ProvisionRequest {
    /// Which one.
    pub id: TenantId,
    /// Who wants it, for the event log.
    pub requested_by: String,
    /// The tenant, active, or what the client is told.
    pub reply: oneshot::Sender<Result<Arc<Tenant>, PgError>>,
}

/// The in-memory view of the catalog.
pub struct Directory {
    tenants: Tenants,
    users: DashMap<String, Arc<AppUser>>,
    /// Names of users from the config file; the catalog's of the same name do not count.
    config_users: Mutex<HashSet<String>>,
    shards: DashMap<String, Arc<Shard>>,
    /// Tenants per shard, counted along, so that a scrape need not walk all tenants.
    counts: DashMap<String, AtomicUsize>,
    ring: ArcSwap<Ring>,
    version: AtomicU64,
    /// Whether the catalog is followed: then a tenant that is not here does not exist.
    current: AtomicBool,
    /// Names of tenants, for those who may not wait for a lock.
    names: NameSet,
    provision: mpsc::Sender<ProvisionRequest>,
}

impl Directory {
    /// An empty directory. Requests for new tenants go to `provision`.
    pub fn new(provision: mpsc::Sender<ProvisionRequest>) -> Self {
        Self {
            tenants: Tenants::new(),
            users: DashMap::new(),
            config_users: Mutex::default(),
            shards: DashMap::new(),
            counts: DashMap::new(),
            ring: ArcSwap::from_pointee(Ring::new([])),
            version: AtomicU64::new(1),
            current: AtomicBool::new(false),
            names: NameSet::default(),
            provision,
        }
    }

    /// A number that grows with every change.
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// The tenant, whatever its status (a `Deleted` or `Creating` one is not here).
    pub fn find(&self, id: &str) -> Option<Arc<Tenant>> {
        self.tenants.get(id)
    }

    /// Whether a tenant may have this name. Sometimes wrong, never with a no; takes no lock.
    #[inline]
    pub fn may_have(&self, name: &[u8]) -> bool {
        self.names.may_have(name)
    }

    /// The application user of this name.
    pub fn user(&self, name: &str) -> Option<Arc<AppUser>> {
        self.users.get(name).map(|entry| entry.clone())
    }

    /// Number of tenants known.
    pub fn len(&self) -> usize {
        self.tenants.len()
    }

    /// Whether no tenant is known.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The shard of this name, as it is for new tenants.
    pub fn shard(&self, name: &str) -> Option<Arc<Shard>> {
        self.shards.get(name).map(|entry| entry.clone())
    }

    /// All shards, by name.
    pub fn shards(&self) -> Vec<Arc<Shard>> {
        let mut shards: Vec<_> = self.shards.iter().map(|entry| entry.clone()).collect();
        shards.sort_by(|a, b| a.name.cmp(&b.name));
        shards
    }

    /// Number of tenants on a shard.
    pub fn tenants_on(&self, shard: &str) -> usize {
        self.counts.get(shard).map_or(0, |count| count.load(Ordering::Relaxed))
    }

    /// The shard that this tenant has to itself.
    pub fn own_shard(&self, id: &TenantId) -> Option<Arc<Shard>> {
        self.shards.iter().find(|shard| shard.dedicated_to.as_ref() == Some(id)).map(|entry| entry.clone())
    }

    /// The shard where a new tenant goes; none if no shard takes tenants.
    pub fn place(&self, id: &TenantId) -> Option<Arc<Shard>> {
        self.ring.load().place(id.as_str()).and_then(|name| self.shard(name))
    }

    /// Every tenant; for start-up, snapshots and shards that move, never on a client's way.
    pub fn tenants(&self) -> impl Iterator<Item = Arc<Tenant>> {
        self.tenants.iter()
    }

    /// Bytes that a tenant uses, as last measured.
    pub fn storage(&self, id: &str) -> Option<u64> {
        self.tenants.storage(id)
    }

    /// Notes what was measured; whether the tenant is known.
    pub fn set_storage(&self, id: &str, bytes: u64) -> bool {
        self.tenants.set_storage(id, bytes)
    }

    /// Whether the catalog is followed, so that a tenant that is not here does not exist.
    pub fn is_current(&self) -> bool {
        self.current.load(Ordering::Acquire)
    }

    /// Says whether the catalog is followed.
    pub fn set_current(&self, current: bool) {
        self.current.store(current, Ordering::Release);
    }

    /// Puts a shard in place and makes the ring anew. Tenants hold their own copy: put them again.
    pub fn put_shard(&self, shard: Shard) {
        self.shards.insert(shard.name.clone(), Arc::new(shard));
        self.make_ring();
    }

    /// Forgets a shard.
    pub fn remove_shard(&self, name: &str) {
        self.shards.remove(name);
        self.make_ring();
    }

    fn make_ring(&self) {
        let shards = self.shards();
        let shared = shards.iter().filter(|shard| shard.dedicated_to.is_none());
        self.ring.store(Arc::new(Ring::new(shared.map(|shard| (shard.name.as_str(), shard.weight)))));
        self.version.fetch_add(1, Ordering::AcqRel);
    }

    /// Puts a tenant's new state in place. Only whoever follows the catalog does, so that no older state wins.
    pub fn put(&self, tenant: impl Into<Arc<Tenant>>) -> Arc<Tenant> {
        let tenant = tenant.into();
        self.names.add(tenant.id.as_str());
        let old = self.tenants.put(tenant.clone());
        match self.counts.get(&tenant.shard.name) {
            Some(count) => count.fetch_add(1, Ordering::Relaxed),
            None => self.counts.entry(tenant.shard.name.clone()).or_default().fetch_add(1, Ordering::Relaxed),
        };
        self.uncount(old.as_deref());
        self.version.fetch_add(1, Ordering::AcqRel);
        tenant
    }

    /// Forgets a tenant.
    pub fn remove(&self, id: &str) -> Option<Arc<Tenant>> {
        let old = self.tenants.remove(id);
        self.uncount(old.as_deref());
        self.version.fetch_add(1, Ordering::AcqRel);
        old
    }

    fn uncount(&self, old: Option<&Tenant>) {
        if let Some(count) = old.and_then(|old| self.counts.get(&old.shard.name)) {
            count.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Puts the config file's users in place of those it had before.
    pub fn set_config_users(&self, users: Vec<AppUser>) {
        let names: HashSet<String> = users.iter().map(|user| user.name.clone()).collect();
        let before = std::mem::replace(&mut *self.config_users.lock(), names.clone());
        for user in users {
            self.users.insert(user.name.clone(), Arc::new(user));
        }
        for name in before.difference(&names) {
            self.users.remove(name);
        }
    }

    /// Puts an application user of the catalog in place, unless the config file has one of that name.
    pub fn put_user(&self, user: AppUser) {
        let known = self.user(&user.name).is_some_and(|known| *known == user);
        if !known && !self.config_users.lock().contains(&user.name) {
            self.users.insert(user.name.clone(), Arc::new(user));
            self.version.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// Forgets an application user of the catalog.
    pub fn remove_user(&self, name: &str) {
        if !self.config_users.lock().contains(name) && self.users.remove(name).is_some() {
            self.version.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// The application users that come from the catalog.
    pub fn catalog_users(&self) -> Vec<Arc<AppUser>> {
        let of_config = self.config_users.lock();
        self.users.iter().filter(|user| !of_config.contains(user.key())).map(|user| user.clone()).collect()
    }

    /// Names of all application users.
    pub fn user_names(&self) -> Vec<String> {
        self.users.iter().map(|entry| entry.key().clone()).collect()
    }

    /// The tenant, made first if it does not exist. Waits until it is ready.
    ///
    /// # Errors
    /// What the client is to be told: a template that failed, no shard that takes tenants, the catalog away.
    pub async fn ensure(&self, id: &TenantId, requested_by: &str) -> Result<Arc<Tenant>, PgError> {
        if let Some(tenant) = self.find(id.as_str()) {
            return Ok(tenant);
        }
        let (reply, answer) = oneshot::channel();
        let request = ProvisionRequest { id: id.clone(), requested_by: requested_by.to_owned(), reply };
        let gone = || PgError::fatal(crate::error::sqlstate::CANNOT_CONNECT_NOW, "the proxy is shutting down");
        self.provision.send(request).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_any_run_of_characters() {
        for (pattern, text, expected) in [
            ("client_001", "client_001", true),
            ("client_001", "client_0011", false),
            ("client_*", "client_", true),
            ("client_*", "client_9", true),
            ("client_*", "xclient_9", false),
            ("*", "", true),
            ("*_eu", "a_eu", true),
            ("a*b*c", "a1b2c", true),
            ("a*b*c", "a1c2b", false),
            ("a*a", "a", false),
            ("", "x", false),
        ] {
            assert_eq!(matches(pattern, text), expected, "{pattern} {text}");
        }
    }
}
