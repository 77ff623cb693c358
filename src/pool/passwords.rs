//! Passwords with which server connections log in.

use std::collections::HashMap;

use crate::config::{Config, Secret};
use crate::directory::Tenant;
use crate::tenant::credential::server_password;

/// Derives passwords, and holds those that the configuration gives for roles that pgusher did not make.
#[derive(Clone, Default)]
pub struct Passwords {
    master: Secret,
    /// By shard: the role of the tenant that has it to itself, and its password.
    given: HashMap<String, (String, Secret)>,
}

impl Passwords {
    /// What the configuration says.
    pub fn new(config: &Config) -> Self {
        let given = config.shards.iter().filter_map(|shard| {
            let role = shard.tenant_role.clone().filter(|_| !shard.tenant_password.expose().is_empty())?;
            Some((shard.name.clone(), (role, shard.tenant_password.clone())))
        });
        Self { master: config.provision.master_secret.clone(), given: given.collect() }
    }

    /// The password of the tenant's role.
    pub fn of(&self, tenant: &Tenant) -> Secret {
        match self.given.get(&tenant.shard.name) {
            Some((role, password)) if !tenant.managed && role == tenant.role() => password.clone(),
            _ => Secret::new(server_password(self.master.expose(), tenant.role())),
        }
    }
}
