//! The clients that are connected now, by tenant: to close them, or to let them finish.

use std::collections::HashMap;
use std::sync::Arc;

use dashmap::DashMap;

use super::signals::Signals;
use crate::error::PgError;
use crate::tenant::TenantId;

/// Connected clients.
#[derive(Debug, Default)]
pub struct Sessions {
    by_tenant: DashMap<TenantId, HashMap<u64, Arc<Signals>>>,
}

/// An entry; it goes when this is dropped.
#[derive(Debug)]
pub struct Registered {
    sessions: Arc<Sessions>,
    tenant: TenantId,
    id: u64,
}

impl Sessions {
    /// Notes a client.
    pub fn register(self: &Arc<Self>, tenant: &TenantId, id: u64, signals: Arc<Signals>) -> Registered {
        self.by_tenant.entry(tenant.clone()).or_default().insert(id, signals);
        Registered { sessions: self.clone(), tenant: tenant.clone(), id }
    }

    /// Clients of a tenant.
    pub fn count(&self, tenant: &str) -> usize {
        self.by_tenant.get(tenant).map_or(0, |sessions| sessions.len())
    }

    /// Closes a tenant's clients at once.
    pub fn close_tenant(&self, tenant: &str, reason: &PgError) {
        if let Some(sessions) = self.by_tenant.get(tenant) {
            for signals in sessions.values() {
                signals.kill(reason.clone());
            }
        }
    }

    /// Closes every client as soon as no transaction of it is under way.
    pub fn drain(&self, reason: &PgError) {
        for sessions in &self.by_tenant {
            for signals in sessions.values() {
                signals.drain(reason.clone());
            }
        }
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        if let Some(mut sessions) = self.sessions.by_tenant.get_mut(self.tenant.as_str()) {
            sessions.remove(&self.id);
        }
        self.sessions.by_tenant.remove_if(self.tenant.as_str(), |_, sessions| sessions.is_empty());
    }
}
