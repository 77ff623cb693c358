//! What can be asked about tenants, and what is answered.

use std::sync::Arc;

use serde::Serialize;

use super::Control;
use super::provision::{Choice, Wanted};
use super::records::TenantRecord;
use super::shards::Probe;
use crate::config::Config;
use crate::error::{PgError, sqlstate};
use crate::tenant::{Plan, TenantId, credential};

/// How a tenant is, as `GET /tenant/{id}/health` says it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TenantHealth {
    /// Its id.
    pub tenant: String,
    /// Its status in the catalog, as this proxy knows it.
    pub status: &'static str,
    /// Its plan.
    pub plan: &'static str,
    /// Its shard.
    pub shard: String,
    /// Its database there.
    pub database: String,
    /// Its schema there.
    pub schema: String,
    /// Grows with each change of home or status.
    pub epoch: u64,
    /// Clients of this proxy.
    pub clients: usize,
    /// Server connections of this proxy.
    pub server_connections: usize,
    /// Bytes, as last measured.
    pub storage_bytes: Option<u64>,
    /// Whether the tenant's own login works.
    #[serde(flatten)]
    pub probe: Probe,
}

/// A DSN through the proxy.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DatabaseUrl {
    /// The tenant.
    pub tenant: String,
    /// `postgresql://tenant:password@host:port/tenant`
    pub database_url: String,
    /// The proxy's host.
    pub host: String,
    /// The proxy's port.
    pub port: u16,
    /// User name: the tenant.
    pub user: String,
    /// Database name: the tenant.
    pub database: String,
    /// Schema that its tables are in.
    pub schema: String,
    /// Shard it lives on.
    pub shard: String,
    /// Its plan.
    pub plan: &'static str,
}

impl Control {
    /// Makes the tenant unless it exists, and shows it.
    ///
    /// # Errors
    /// What is told to whoever asked.
    pub async fn create(self: &Arc<Self>, id: &TenantId, who: &str, choice: Choice) -> Result<TenantRecord, PgError> {
        super::not_a_canary(id)?;
        let plan = choice.plan;
        self.make(id, who, Wanted::ByOperator(choice)).await?;
        self.sync().await;
        let record = self.show(id).await?;
        check_plan(id, record.plan(), plan)?;
        Ok(record)
    }

    /// One tenant's row.
    ///
    /// # Errors
    /// `3D000` if there is none.
    pub async fn show(&self, id: &TenantId) -> Result<TenantRecord, PgError> {
        let catalog = self.catalog().await?;
        let record = TenantRecord::find(&*catalog, id).await?;
        catalog.give_back().await;
        record.ok_or_else(|| unknown(id))
    }

    /// Up to `limit` tenants in the order of ids, those after `after`.
    ///
    /// # Errors
    /// The catalog is away.
    pub async fn list(&self, after: &str, limit: u32, deleted_too: bool) -> Result<Vec<TenantRecord>, PgError> {
        let catalog = self.catalog().await?;
        let records = TenantRecord::list(&*catalog, after, i64::from(limit), deleted_too).await?;
        catalog.give_back().await;
        Ok(records)
    }

    /// A DSN through the proxy for the tenant's own login; makes the tenant if need be, with this plan.
    ///
    /// # Errors
    /// What is told to whoever asked; `55000` if it exists with another plan.
    pub async fn database_url(
        self: &Arc<Self>,
        id: &TenantId,
        who: &str,
        plan: Option<Plan>,
    ) -> Result<DatabaseUrl, PgError> {
        super::not_a_canary(id)?;
        let (shard, schema, has) = match self.directory.find(id.as_str()) {
            Some(tenant) => (tenant.shard.name.clone(), tenant.schema().to_owned(), tenant.plan),
            None => {
                let record = self.create(id, who, Choice { plan, shard: None }).await?;
                let plan = super::provision::known_plan(&record)?;
                (record.shard, record.schema, plan)
            }
        };
        check_plan(id, Some(has), plan)?;
        let (host, port) = public_address(&self.config);
        let secret = self.config.provision.master_secret.expose();
        let password = credential::client_password(secret, id.as_str());
        let bracketed = if host.contains(':') { format!("[{host}]") } else { host.clone() };
        Ok(DatabaseUrl {
            tenant: id.to_string(),
            database_url: format!("postgresql://{id}:{password}@{bracketed}:{port}/{id}"),
            host,
            port,
            user: id.to_string(),
            database: id.to_string(),
            schema,
            shard,
            plan: has.as_str(),
        })
    }

    /// How the tenant is, asked now.
    ///
    /// # Errors
    /// `3D000` if this proxy knows no such tenant.
    pub async fn tenant_health(&self, id: &TenantId) -> Result<TenantHealth, PgError> {
        let tenant = self.directory.find(id.as_str()).ok_or_else(|| unknown(id))?;
        let probe = self.probe_tenant(&tenant).await;
        Ok(TenantHealth {
            tenant: id.to_string(),
            status: tenant.status.as_str(),
            plan: tenant.plan.as_str(),
            shard: tenant.shard.name.clone(),
            database: tenant.shard.database.clone(),
            schema: tenant.schema().to_owned(),
            epoch: tenant.epoch,
            clients: self.traffic.tenant_clients(id),
            server_connections: self.traffic.tenant_servers(id),
            storage_bytes: self.directory.storage(id.as_str()),
            probe,
        })
    }
}

/// A tenant does not change its plan because somebody asks for it under another one.
fn check_plan(id: &TenantId, has: Option<Plan>, wanted: Option<Plan>) -> Result<(), PgError> {
    match (has, wanted) {
        (Some(has), Some(wanted)) if has != wanted => Err(PgError::error(
            sqlstate::NOT_IN_PREREQUISITE_STATE,
            format!("tenant \"{id}\" has plan \"{}\", not \"{}\"", has.as_str(), wanted.as_str()),
        )),
        _ => Ok(()),
    }
}

pub(super) fn unknown(id: &TenantId) -> PgError {
    PgError::error(sqlstate::UNKNOWN_DATABASE, format!("there is no tenant \"{id}\""))
}

/// Host and port that DSNs handed out contain.
fn public_address(config: &Config) -> (String, u16) {
    let port = config.api.public_port.unwrap_or(config.proxy.listen_port);
    let first = config.proxy.listen_addr.split(',').next().unwrap_or_default().trim();
    let host = config.api.public_host.clone().unwrap_or_else(|| match first {
        "" | "*" | "0.0.0.0" | "::" => "127.0.0.1".to_owned(),
        address => address.to_owned(),
    });
    (host, port)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dsns_name_an_address_that_can_be_connected_to() {
        for (listen, public, expected) in [
            ("127.0.0.1", None, "127.0.0.1"),
            ("*", None, "127.0.0.1"),
            ("10.0.0.1,10.0.0.2", None, "10.0.0.1"),
            ("*", Some("db.example"), "db.example"),
        ] {
            let mut config = Config::default();
            config.proxy.listen_addr = listen.into();
            config.api.public_host = public.map(str::to_owned);
            assert_eq!(public_address(&config).0, expected);
        }
    }
}
