//! Shards: registering, setting up, probing, measuring.

use std::time::Duration;

use serde::Serialize;
use serde_json::json;
use tokio::time::Instant;

use super::Control;
use super::admin::{Admin, AdminPool, failed};
use super::records::{self, ShardRecord};
use crate::config::{Config, ShardConfig};
use crate::directory::catalog::create_database;
use crate::directory::connector::Endpoint;
use crate::directory::{Shard, Tenant};
use crate::error::{PgError, sqlstate};
use crate::tenant::plan::{SETUP_VERSION, Setup, TemplateUse};
use crate::tenant::sql::Literal;
use crate::tenant::{Plan, TenantId};

/// Tenants made at the same time on one shard by one proxy.
const ADMIN_CONNECTIONS: usize = 4;
/// How long a probe may take.
const PROBE_TIMEOUT: Duration = Duration::from_secs(3);
/// The lock under which a shard is set up; the letters `pgusher` as a number.
const SETUP_LOCK: i64 = 0x70_67_75_73_68_65_72;

/// What is known about a shard's health.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ShardHealth {
    /// Whether the last probe was answered.
    pub healthy: bool,
    /// How long the last answer took.
    pub latency_ms: Option<f64>,
    /// PostgreSQL's version.
    pub version: Option<String>,
    /// Connections of everyone.
    pub connections: Option<i64>,
    /// Its `max_connections`.
    pub max_connections: Option<i64>,
    /// Bytes of the tenants' database, as last measured.
    pub size_bytes: Option<i64>,
    /// Why it is not healthy.
    pub error: Option<String>,
}

/// A shard as `GET /shards/status` shows it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ShardStatus {
    /// Name.
    pub name: String,
    /// Host.
    pub host: String,
    /// Port.
    pub port: u16,
    /// Database of new tenants.
    pub database: String,
    /// Where it stands.
    pub region: String,
    /// Weight on the ring.
    pub weight: u32,
    /// Tenants on it.
    pub tenants: usize,
    /// This proxy's server connections, all.
    pub server_connections: usize,
    /// This proxy's server connections that wait for work.
    pub idle_server_connections: usize,
    /// Health as last probed.
    #[serde(flatten)]
    pub health: ShardHealth,
}

/// The answer of a probe as the tenant itself.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Probe {
    /// Whether the tenant's role could log in and query.
    pub reachable: bool,
    /// How long that took.
    pub latency_ms: Option<f64>,
    /// Why not.
    pub error: Option<String>,
}

impl Control {
    /// Writes the config's shards into the catalog; only what differs changes anything.
    pub(super) async fn register_config_shards(&self, config: &Config) -> Result<(), PgError> {
        let catalog = self.catalog().await?;
        for shard in &config.shards {
            let record = config_shard(shard);
            check_dedication(&catalog, &record).await?;
            if record.put(&*catalog).await? {
                let detail = json!({ "shard": record.name, "host": record.host, "port": record.port });
                records::event(&*catalog, "config", "shard registered", None, &detail).await?;
                self.audit_change("config", "shard registered", None, &detail).await;
            }
        }
        catalog.give_back().await;
        Ok(())
    }

    /// Adds a shard, or changes one: sets it up first, so that only a working one takes tenants.
    ///
    /// # Errors
    /// What the shard or the catalog said.
    pub async fn add_shard(&self, record: &ShardRecord, who: &str) -> Result<(), PgError> {
        if record.name.is_empty() || record.host.is_empty() || record.port == 0 || record.database.is_empty() {
            return Err(PgError::error(
                sqlstate::INVALID_PARAMETER_VALUE,
                "a shard needs a name, a host, a port and a database",
            ));
        }
        if record.rls_database == record.database {
            return Err(PgError::error(sqlstate::INVALID_PARAMETER_VALUE, "plans do not share a database"));
        }
        if let Some(id) = &record.dedicated_to {
            TenantId::parse(id).map_err(|e| PgError::error(sqlstate::INVALID_PARAMETER_VALUE, e.to_string()))?;
        }
        let catalog = self.catalog().await?;
        check_dedication(&catalog, record).await?;
        catalog.give_back().await;
        let plan = self.config.provision.plan;
        let shard = super::known_shard(record, self.config.pool.max_db_connections);
        if shard.dedicated_to.is_some() || plan.wants_own_shard() {
            // Nothing to set up, but it must be there.
            let endpoint = admin_endpoint(&self.config, &shard.name, &shard.host, shard.port, "postgres");
            self.connector.connect(&endpoint).await.map_err(|error| {
                PgError::fatal(sqlstate::CANNOT_CONNECT_NOW, format!("shard \"{}\" is not reachable", shard.name))
                    .detail(error.to_string())
            })?;
        } else {
            self.ensure_setup(&shard, plan).await?;
        }
        let catalog = self.catalog().await?;
        record.put(&*catalog).await?;
        let detail = json!({ "shard": record.name, "host": record.host, "port": record.port, "weight": record.weight });
        records::event(&*catalog, who, "shard added", None, &detail).await?;
        self.audit_change(who, "shard added", None, &detail).await;
        catalog.give_back().await;
        self.sync().await;
        Ok(())
    }

    /// The shards in the catalog.
    ///
    /// # Errors
    /// The catalog is away.
    pub async fn list_shards(&self) -> Result<Vec<ShardRecord>, PgError> {
        let catalog = self.catalog().await?;
        let shards = ShardRecord::list(&*catalog).await?;
        catalog.give_back().await;
        Ok(shards)
    }

    /// Every shard with its health as last probed.
    pub fn shards_status(&self) -> Vec<ShardStatus> {
        self.directory.shards().iter().map(|shard| self.shard_status(shard)).collect()
    }

    fn shard_status(&self, shard: &Shard) -> ShardStatus {
        let (open, idle) = self.traffic.shard_servers(&shard.name);
        ShardStatus {
            name: shard.name.clone(),
            host: shard.host.clone(),
            port: shard.port,
            database: shard.database.clone(),
            region: shard.region.clone(),
            weight: shard.weight,
            tenants: self.directory.tenants_on(&shard.name),
            server_connections: open,
            idle_server_connections: idle,
            health: self.shard_health(&shard.name),
        }
    }

    /// Health of a shard as last probed.
    pub fn shard_health(&self, shard: &str) -> ShardHealth {
        self.health.get(shard).map_or_else(|| ShardHealth::unknown("not probed yet"), |health| health.clone())
    }

    /// Connections as administrator to a database of a shard.
    pub(super) fn shard_pool(&self, shard: &str, database: &str) -> Result<std::sync::Arc<AdminPool>, PgError> {
        let Some(known) = self.directory.shard(shard) else {
            return Err(PgError::fatal(sqlstate::UNKNOWN_DATABASE, format!("there is no shard \"{shard}\"")));
        };
        let endpoint = admin_endpoint(&self.config, shard, &known.host, known.port, database);
        let key = (shard.to_owned(), database.to_owned());
        let mut entry = self.pools.entry(key).or_insert_with(|| self.admin_pool(shard, endpoint.clone()));
        if *entry.endpoint() != endpoint {
            *entry = self.admin_pool(shard, endpoint);
        }
        Ok(entry.clone())
    }

    /// A pool for one connection, which nobody else knows.
    pub(super) fn single(&self, shard: &str, database: &str) -> Result<AdminPool, PgError> {
        let endpoint = self.shard_pool(shard, "postgres")?.endpoint().database(database);
        Ok(AdminPool::new(self.connector.clone(), endpoint, format!("shard \"{shard}\""), 1))
    }

    fn admin_pool(&self, shard: &str, endpoint: Endpoint) -> std::sync::Arc<AdminPool> {
        let what = format!("shard \"{shard}\"");
        std::sync::Arc::new(AdminPool::new(self.connector.clone(), endpoint, what, ADMIN_CONNECTIONS))
    }

    /// Sets the shard up for a plan unless this process knows that it is.
    pub(super) async fn ensure_setup(&self, shard: &Shard, plan: Plan) -> Result<(), PgError> {
        let Some(setup) = plan.setup(shard.databases(), self.live().hardening) else { return Ok(()) };
        let endpoint = admin_endpoint(&self.config, &shard.name, &shard.host, shard.port, &setup.database);
        let key = format!("{}:{}/{}", endpoint.host, endpoint.port, endpoint.database);
        if self.prepared.contains_key(&key) {
            return Ok(());
        }
        self.setup(&shard.name, &endpoint, &setup).await?;
        if plan.template() == TemplateUse::Once {
            self.fill_shared(&shard.name, &setup.database, plan).await?;
        }
        self.prepared.insert(key, ());
        Ok(())
    }

    /// Sets the shard up for the plan of new tenants, and for those of its tenants: the grade may have changed.
    pub(super) async fn setup_plans(&self, shard: &Shard) -> Result<(), PgError> {
        let key = format!("plans of {}", shard.name);
        if self.prepared.contains_key(&key) {
            return Ok(());
        }
        self.ensure_setup(shard, self.config.provision.plan).await?;
        let catalog = self.catalog().await?;
        let plans = ShardRecord::plans(&*catalog, &shard.name).await?;
        catalog.give_back().await;
        for plan in plans {
            self.ensure_setup(shard, plan).await?;
        }
        self.prepared.insert(key, ());
        Ok(())
    }

    /// The mark of a database that is set up now: which set-up was done, on which version of PostgreSQL (a newer one
    /// has new functions), to which grade. Without the letter-case or spaces that would make it hard to look for.
    pub(super) fn mark(&self, version: &str) -> String {
        format!("setup {SETUP_VERSION} on {version} {}", self.live().hardening.as_str())
    }

    pub(super) async fn setup(&self, shard: &str, endpoint: &Endpoint, setup: &Setup) -> Result<(), PgError> {
        let unreachable = |error: crate::directory::connector::ConnectError| {
            tracing::warn!(shard, at = %endpoint, %error, "cannot connect");
            PgError::fatal(sqlstate::CANNOT_CONNECT_NOW, format!("shard \"{shard}\" is not reachable"))
                .detail(error.to_string())
        };
        let doing = failed("set up the shard");
        let cluster = self.connector.connect(&endpoint.database("postgres")).await.map_err(unreachable)?;
        cluster.execute("SELECT pg_advisory_lock($1)", &[&SETUP_LOCK]).await.map_err(&doing)?;
        let exists = cluster
            .query_opt("SELECT FROM pg_database WHERE datname = $1", &[&endpoint.database])
            .await
            .map_err(&doing)?;
        if exists.is_none() {
            create_database(&self.connector, endpoint, &endpoint.database).await.map_err(unreachable)?;
        }
        let database = self.connector.connect(endpoint).await.map_err(unreachable)?;
        let mark = self.mark(&server_version(&cluster).await?);
        let found = "SELECT obj_description(oid, 'pg_namespace') FROM pg_namespace WHERE nspname = 'tenant_shim'";
        let found: Option<String> =
            database.query_opt(found, &[]).await.map_err(&doing)?.and_then(|row| row.get::<_, Option<String>>(0));
        if found.as_deref() != Some(&mark) {
            cluster.batch_execute(&setup.cluster).await.map_err(&doing)?;
            let marked = format!("{};\nCOMMENT ON SCHEMA tenant_shim IS {}", setup.sql, Literal(&mark));
            database.batch_execute(&marked).await.map_err(&doing)?;
            tracing::info!(shard, at = %endpoint, mark, "set up the shard");
        }
        if let Some(outdated) = setup.outdated {
            for row in cluster.query(outdated, &[&mark]).await.map_err(&doing)? {
                let (name, comment): (String, String) = (row.get(0), row.get(1));
                let id = comment.split(' ').nth(2).unwrap_or_default();
                let sql = Plan::harden(&name, id, self.live().hardening, &mark);
                let hardened = async {
                    let client = self.connector.connect(&endpoint.database(&name)).await.map_err(unreachable)?;
                    client.batch_execute(&sql).await.map_err(&doing)
                };
                // One that cannot be done now must not keep others from being done; the next start tries again.
                match hardened.await {
                    Ok(()) => tracing::info!(shard, database = name, mark, "set up the tenant's database"),
                    Err(error) => {
                        tracing::error!(shard, database = name, %error, "cannot set up the tenant's database")
                    }
                }
            }
        }
        // Closing `cluster` gives the lock back.
        Ok(())
    }

    /// Asks the shard how it is, and notes the answer.
    pub(super) async fn probe_shard(&self, shard: &Shard) {
        let health = match tokio::time::timeout(PROBE_TIMEOUT, self.ask_shard(shard)).await {
            Ok(Ok(health)) => health,
            Ok(Err(error)) => ShardHealth::unknown(&error.to_string()),
            Err(_) => ShardHealth::unknown("no answer in time"),
        };
        let before = self.health.insert(shard.name.clone(), health.clone());
        if before.is_none_or(|before| before.healthy != health.healthy) {
            match &health.error {
                None => tracing::info!(shard = shard.name, "the shard is healthy"),
                Some(error) => tracing::warn!(shard = shard.name, error, "the shard is not healthy"),
            }
        }
    }

    async fn ask_shard(&self, shard: &Shard) -> Result<ShardHealth, PgError> {
        // One connection for the probe alone: it must not wait behind those that make tenants.
        let client = self.probe_client(shard).await?;
        let asked = Instant::now();
        let sql = "SELECT current_setting('server_version'), (SELECT sum(numbackends)::bigint FROM pg_stat_database), \
                   current_setting('max_connections')::bigint";
        let row = client.query_one(sql, &[]).await.map_err(failed("probe the shard"))?;
        let health = ShardHealth {
            healthy: true,
            latency_ms: Some(asked.elapsed().as_secs_f64() * 1000.0),
            version: row.get(0),
            connections: row.get(1),
            max_connections: row.get(2),
            // Measured seldom: it looks at every file of the database.
            size_bytes: self.sizes.get(&shard.name).map(|size| *size),
            error: None,
        };
        self.probes.insert(shard.name.clone(), client);
        Ok(health)
    }

    /// The probe's connection, taken out of its place; an answered probe puts it back.
    async fn probe_client(&self, shard: &Shard) -> Result<tokio_postgres::Client, PgError> {
        if let Some((_, client)) = self.probes.remove(&shard.name).filter(|(_, client)| !client.is_closed()) {
            return Ok(client);
        }
        let endpoint = admin_endpoint(&self.config, &shard.name, &shard.host, shard.port, "postgres");
        self.connector
            .connect(&endpoint)
            .await
            .map_err(|error| PgError::fatal(sqlstate::CANNOT_CONNECT_NOW, error.to_string()))
    }

    /// Logs in as the tenant, with its own password, and asks for one row.
    pub(super) async fn probe_tenant(&self, tenant: &Tenant) -> Probe {
        let endpoint = Endpoint {
            host: tenant.shard.host.clone(),
            port: tenant.shard.port,
            database: tenant.shard.database.clone(),
            password: self.passwords.of(tenant),
            user: tenant.role().to_owned(),
        };
        let began = Instant::now();
        let asking = async {
            let client = self.connector.connect(&endpoint).await.map_err(|e| e.to_string())?;
            client.simple_query("SELECT 1").await.map_err(|e| crate::directory::connector::explain(&e))
        };
        match tokio::time::timeout(PROBE_TIMEOUT, asking).await {
            Ok(Ok(_)) => {
                Probe { reachable: true, latency_ms: Some(began.elapsed().as_secs_f64() * 1000.0), error: None }
            }
            Ok(Err(error)) => Probe { reachable: false, latency_ms: None, error: Some(error) },
            Err(_) => Probe { reachable: false, latency_ms: None, error: Some("no answer in time".to_owned()) },
        }
    }

    /// Measures every tenant's bytes on a shard, from the catalogs alone.
    pub(super) async fn measure_storage(&self, shard: &Shard) -> Result<(), PgError> {
        let doing = failed("measure the tenants' storage");
        let mut measured: std::collections::HashMap<String, i64> = std::collections::HashMap::new();
        for (database, sql) in [shard.database.as_str(), "postgres"].into_iter().zip(Plan::STORAGE) {
            let client = match self.shard_pool(&shard.name, database)?.checkout().await {
                Ok(client) => client,
                // One that a plan has not made yet.
                Err(error) if database != "postgres" => {
                    tracing::debug!(shard = shard.name, database, %error, "not measured");
                    continue;
                }
                Err(error) => return Err(error),
            };
            // Measuring a table takes a lock on it: a tenant that holds an exclusive one keeps its last value and does
            // not stop the others from being measured.
            client.batch_execute("SET lock_timeout = '1s'").await.map_err(&doing)?;
            let rows = client.query(sql, &[]).await.map_err(&doing)?;
            measured.extend(rows.iter().map(|row| (row.get(0), row.get(1))));
            if database == shard.database {
                let sql = "SELECT pg_database_size(current_database())";
                self.sizes.insert(shard.name.clone(), client.query_one(sql, &[]).await.map_err(&doing)?.get(0));
            }
            client.give_back().await;
        }
        let measured = measured.iter().map(|(id, bytes)| (id.as_str(), u64::try_from(*bytes).unwrap_or(0)));
        let known: Vec<(&str, u64)> = measured.filter(|&(id, bytes)| self.directory.set_storage(id, bytes)).collect();
        let before = self.largest.load_full();
        // Those of other shards, and those that could not be measured this time, keep their last value.
        let before = before.iter().filter_map(|(id, _)| Some((id.as_str(), self.directory.storage(id.as_str())?)));
        let largest = largest(known.into_iter().chain(before).collect(), self.config.metrics.metrics_top_tenants);
        self.largest.store(std::sync::Arc::new(largest));
        Ok(())
    }
}

/// A shard is for one tenant, perhaps a superuser on it, or for many: which of the two does not change while somebody
/// lives there who was promised the other.
async fn check_dedication(catalog: &Admin, record: &ShardRecord) -> Result<(), PgError> {
    // Two questions, since each finds its answer in the index, whatever the number of tenants; one for both would not.
    let of_the_shard = "SELECT id, plan FROM pgusher.tenants WHERE shard = $1 AND status <> 'deleted'";
    let found = match &record.dedicated_to {
        None => {
            let sql = format!("{of_the_shard} AND plan = 'cluster' ORDER BY id LIMIT 1");
            catalog.query_opt(&sql, &[&record.name]).await
        }
        Some(tenant) => {
            let sql = format!("{of_the_shard} AND (plan <> 'cluster' OR id <> $2) ORDER BY plan, id LIMIT 1");
            catalog.query_opt(&sql, &[&record.name, tenant]).await
        }
    };
    let Some(row) = found.map_err(failed("read the catalog"))? else { return Ok(()) };
    let (id, plan): (&str, &str) = (row.get(0), row.get(1));
    let wanted = match &record.dedicated_to {
        Some(tenant) => format!("shard \"{}\" cannot be dedicated to tenant \"{tenant}\"", record.name),
        None => format!("shard \"{}\" cannot be shared", record.name),
    };
    Err(PgError::fatal(sqlstate::NOT_IN_PREREQUISITE_STATE, wanted)
        .detail(format!("Tenant \"{id}\" with plan \"{plan}\" lives on it."))
        .hint("Delete the tenants that live there, or take another shard."))
}

/// What the config says of a shard.
pub(super) fn config_shard(shard: &ShardConfig) -> ShardRecord {
    ShardRecord {
        name: shard.name.clone(),
        host: shard.host.clone(),
        port: shard.port,
        database: shard.database.clone(),
        weight: shard.weight,
        region: shard.region.clone(),
        max_db_connections: shard.max_db_connections,
        rls_database: shard.rls_database.clone(),
        dedicated_to: shard.dedicated_to.clone(),
        tenants: 0,
    }
}

/// The `most` tenants with most bytes, the largest first. A tenant may be named twice, with the same number.
fn largest(mut measured: Vec<(&str, u64)>, most: usize) -> Vec<(TenantId, u64)> {
    let order = |a: &(&str, u64), b: &(&str, u64)| b.1.cmp(&a.1).then(a.0.cmp(b.0));
    // Twice as many, because each may be there twice; only they are sorted.
    if measured.len() > 2 * most {
        measured.select_nth_unstable_by(2 * most, order);
        measured.truncate(2 * most);
    }
    measured.sort_unstable_by(order);
    measured.dedup();
    measured.truncate(most);
    measured.into_iter().filter_map(|(id, bytes)| Some((TenantId::parse(id).ok()?, bytes))).collect()
}

impl ShardHealth {
    fn unknown(error: &str) -> Self {
        Self {
            healthy: false,
            latency_ms: None,
            version: None,
            connections: None,
            max_connections: None,
            size_bytes: None,
            error: Some(error.to_owned()),
        }
    }
}

/// The version as a number, such as 150004.
pub(super) async fn server_version(client: &tokio_postgres::Client) -> Result<String, PgError> {
    let row = client.query_one("SELECT current_setting('server_version_num')", &[]).await;
    Ok(row.map_err(failed("set up the shard"))?.get(0))
}

/// Where and as whom the administrator of a shard logs in. Passwords come from the config, never from the catalog.
pub(super) fn admin_endpoint(config: &Config, shard: &str, host: &str, port: u16, database: &str) -> Endpoint {
    let (user, password) = match config.shards.iter().find(|known| known.name == shard) {
        Some(known) => (&known.admin_user, &known.admin_password),
        None => (&config.provision.admin_user, &config.provision.admin_password),
    };
    Endpoint {
        host: host.to_owned(),
        port,
        database: database.to_owned(),
        user: user.clone(),
        password: password.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_tenants_are_found_once_each() {
        let names: Vec<String> = (0..100).map(|n| format!("t{n:02}")).collect();
        let measured = || names.iter().enumerate().map(|(n, name)| (name.as_str(), (n as u64 * 37) % 100));
        let twice = || measured().chain(measured()).collect();
        let sizes = |most| largest(twice(), most).iter().map(|(_, bytes)| *bytes).collect::<Vec<_>>();
        assert_eq!(sizes(4), [99, 98, 97, 96]);
        assert!(sizes(0).is_empty());
        assert_eq!(sizes(1000).len(), 100);
        assert_eq!(largest(vec![("b", 5), ("a", 5), ("b", 5)], 2).len(), 2);
    }
}
