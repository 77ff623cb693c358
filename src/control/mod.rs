//! Changes to the world: tenants made and deleted, shards registered and probed, and who asks for it (HTTP, command
//! line, a client that connects).
//!
//! [`Control`] does the work; [`api`] and [`cli`] only translate. The catalog is the truth, the
//! [`Directory`] follows it through [`follow`] alone: nothing here writes a
//! tenant into the directory, so that an older state never wins over a newer one.

pub(crate) mod admin;
pub mod adopt;
pub mod api;
pub mod cli;
mod delete;
mod journal;
pub mod provision;
pub mod records;
mod senders;
pub mod shards;
pub mod shared_tables;
mod snapshots;
mod template;
pub mod tenants;

use std::sync::Arc;
use std::time::Duration;

use dashmap::DashMap;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::admin::{Admin, AdminPool};
use self::provision::{Flights, Wanted};
use self::records::{ShardRecord, TenantRecord};
use self::shards::{ShardHealth, admin_endpoint};
use crate::audit::Audit;
use crate::config::{Config, Secret};
use crate::directory::catalog::{self, CatalogError, Change, OnChange, Reader};
use crate::directory::connector::{Connector, Endpoint};
use crate::directory::follow::{self, Follower, Link};
use crate::directory::{AppUser, Directory, ProvisionRequest, Shard, Tenant};
use crate::error::{PgError, sqlstate};
use crate::pool::passwords::Passwords;
use crate::pool::tls::ClientTls;
use crate::tenant::credential::Verifier;
use crate::tenant::{Status, TenantId};
use crate::tls::TlsError;

/// Connections to the catalog for changes, besides the one that follows.
const CATALOG_CONNECTIONS: usize = 8;
/// How often shards are probed.
const PROBE_INTERVAL: Duration = Duration::from_secs(5);
/// How often unfinished work of others is looked for.
const JANITOR_INTERVAL: Duration = Duration::from_secs(30);
/// How long to wait for the directory to catch up with the catalog.
const SYNC_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a catalog that is not there yet is waited for at start.
const START_PATIENCE: Duration = Duration::from_secs(30);
/// The same where there is a snapshot to start from.
const SNAPSHOT_PATIENCE: Duration = Duration::from_secs(5);

/// The data plane, as far as the control plane needs it.
pub trait Traffic: Send + Sync {
    /// Ends every session and server connection of the tenant.
    fn close_tenant(&self, id: &TenantId, why: PgError);
    /// Clients connected now.
    fn tenant_clients(&self, id: &TenantId) -> usize;
    /// Server connections open now.
    fn tenant_servers(&self, id: &TenantId) -> usize;
    /// Server connections to a shard: all, and those that wait for work.
    fn shard_servers(&self, shard: &str) -> (usize, usize);
}

/// No data plane: for the command line.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoTraffic;

impl Traffic for NoTraffic {
    fn close_tenant(&self, _: &TenantId, _: PgError) {}

    fn tenant_clients(&self, _: &TenantId) -> usize {
        0
    }

    fn tenant_servers(&self, _: &TenantId) -> usize {
        0
    }

    fn shard_servers(&self, _: &str) -> (usize, usize) {
        (0, 0)
    }
}

/// Why the control plane did not start.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The catalog cannot be used.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// Something else failed.
    #[error(transparent)]
    Failed(#[from] PgError),
    /// TLS towards servers.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Neither `[catalog] host` nor a shard is configured.
    #[error("no catalog: the config has neither [catalog] host nor a [[shards]] section")]
    NoCatalog,
}

/// The control plane.
pub struct Control {
    config: Arc<Config>,
    directory: Arc<Directory>,
    traffic: Arc<dyn Traffic>,
    connector: Connector,
    catalog: AdminPool,
    audit: Option<Arc<Audit>>,
    /// `None` in a program that ends after one command: then the directory holds shards only.
    follower: Option<follow::Handle>,
    flights: Flights,
    /// Administrators' connections, by shard and database.
    pools: DashMap<(String, String), Arc<AdminPool>>,
    passwords: Passwords,
    /// Databases known to be set up.
    prepared: DashMap<String, ()>,
    health: DashMap<String, ShardHealth>,
    probes: DashMap<String, tokio_postgres::Client>,
    /// The tenants with most storage, found when they were measured, so that a scrape need not look at all.
    largest: arc_swap::ArcSwap<Vec<(TenantId, u64)>>,
    /// Bytes of each shard's database.
    sizes: DashMap<String, i64>,
    tasks: TaskTracker,
    shutdown: CancellationToken,
}

impl Control {
    /// Migrates the catalog, registers the config's shards and users, loads the directory and starts the long-lived
    /// tasks. When it returns, every tenant of the catalog is in the directory; or, if the catalog is away, every tenant
    /// of the snapshot.
    ///
    /// # Errors
    /// The catalog cannot be reached within half a minute and there is no snapshot, or it cannot be migrated.
    pub async fn start(
        config: Arc<Config>,
        directory: Arc<Directory>,
        provision: mpsc::Receiver<ProvisionRequest>,
        traffic: Arc<dyn Traffic>,
        shutdown: CancellationToken,
    ) -> Result<Arc<Self>, ControlError> {
        let connector = connector(&config)?;
        let at = catalog_endpoint(&config)?;
        put_config_users(&config, &directory).await;
        let mut reader = Reader::new(directory.clone(), close_on_change(&traffic), config.pool.max_db_connections);
        let snapshot = snapshots::file(&config, &at);
        let restored = snapshots::restore(snapshot.as_ref(), &mut reader, &config).await;
        let position = reader.position();
        let quick = Connector { connect_timeout: connector.connect_timeout.min(SYNC_TIMEOUT), ..connector.clone() };
        let (mut follower, handle) = Follower::new(quick, at, reader);
        let link =
            if restored { load_or_go_on(&mut follower).await? } else { Some(load_patiently(&mut follower).await?) };
        let away = link.is_none();
        let control = Arc::new(Self::new(connector, config, directory, traffic, Some(handle), shutdown.clone())?);
        if !away {
            control.register_config_shards(&control.config).await?;
        }
        control.tasks.spawn(follower.run(link, shutdown));
        if away {
            control.clone().register_later();
        } else {
            control.sync().await;
        }
        let (tenants, shards) = (control.directory.len(), control.directory.shards().len());
        tracing::info!(tenants, shards, "loaded the {}", if away { "snapshot" } else { "catalog" });
        control.spawn_tasks(provision);
        if let Some(file) = snapshot {
            control.tasks.spawn(snapshots::keep(file, control.directory.clone(), position, control.shutdown.clone()));
        }
        Ok(control)
    }

    /// Registers the config's shards as soon as the catalog is there.
    fn register_later(self: Arc<Self>) {
        let control = self.clone();
        self.spawn(async move {
            while let Some(follower) = &control.follower {
                follower.connected().await;
                match control.register_config_shards(&control.config).await {
                    Ok(()) => return,
                    Err(error) => tracing::warn!(%error, "cannot register the configuration's shards"),
                }
                tokio::time::sleep(PROBE_INTERVAL).await;
            }
        });
    }

    /// Connects for one command: no long-lived tasks, no tenants in the directory.
    ///
    /// # Errors
    /// The catalog cannot be reached or migrated.
    pub async fn open(config: Arc<Config>) -> Result<Arc<Self>, ControlError> {
        let connector = connector(&config)?;
        let at = catalog_endpoint(&config)?;
        catalog::migrate(&connector, &at).await?;
        let (provision, _) = mpsc::channel(1);
        let directory = Arc::new(Directory::new(provision));
        let control = Self::new(connector, config, directory, Arc::new(NoTraffic), None, CancellationToken::new())?;
        control.register_config_shards(&control.config).await?;
        for shard in control.list_shards().await? {
            control.directory.put_shard(known_shard(&shard, control.config.pool.max_db_connections));
        }
        Ok(Arc::new(control))
    }

    fn new(
        connector: Connector,
        config: Arc<Config>,
        directory: Arc<Directory>,
        traffic: Arc<dyn Traffic>,
        follower: Option<follow::Handle>,
        shutdown: CancellationToken,
    ) -> Result<Self, ControlError> {
        let at = catalog_endpoint(&config)?;
        let catalog = AdminPool::new(connector.clone(), at, "the catalog".to_owned(), CATALOG_CONNECTIONS);
        let audit = journal::audit_of(&config);
        Ok(Self {
            passwords: Passwords::new(&config),
            config,
            directory,
            traffic,
            connector,
            catalog,
            audit,
            follower,
            flights: Flights::default(),
            pools: DashMap::new(),
            prepared: DashMap::new(),
            health: DashMap::new(),
            probes: DashMap::new(),
            largest: arc_swap::ArcSwap::default(),
            sizes: DashMap::new(),
            tasks: TaskTracker::new(),
            shutdown,
        })
    }

    /// The directory that this control plane keeps up to date.
    pub fn directory(&self) -> &Arc<Directory> {
        &self.directory
    }

    /// Whether the catalog is followed right now.
    pub fn catalog_connected(&self) -> bool {
        self.follower.as_ref().is_none_or(follow::Handle::is_connected)
    }

    /// Bytes that a tenant uses, as last measured.
    pub fn storage_of(&self, id: &str) -> Option<u64> {
        self.directory.storage(id)
    }

    /// The tenants that use most, as last measured; at most `metrics_top_tenants`.
    pub fn largest_tenants(&self) -> Arc<Vec<(TenantId, u64)>> {
        self.largest.load_full()
    }

    /// Takes over what a new config says about users and shards; the rest is for the next start.
    ///
    /// # Errors
    /// The catalog is away: users are taken over, shards are not.
    pub async fn reload(&self, config: &Config) -> Result<(), PgError> {
        put_config_users(config, &self.directory).await;
        self.register_config_shards(config).await?;
        self.sync().await;
        Ok(())
    }

    /// Waits until the tasks have ended after the shutdown token was cancelled; creations and deletions under way
    /// are finished first.
    pub async fn finish(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Waits until the directory has everything that is in the catalog now, if the catalog is there.
    pub(crate) async fn sync(&self) -> bool {
        match &self.follower {
            Some(follower) => tokio::time::timeout(SYNC_TIMEOUT, follower.sync()).await.unwrap_or(false),
            None => true,
        }
    }

    async fn catalog(&self) -> Result<Admin, PgError> {
        if !self.catalog_connected() {
            return Err(PgError::fatal(sqlstate::CANNOT_CONNECT_NOW, "the catalog is not reachable")
                .detail("Tenants that this proxy knows go on; new ones cannot be made.")
                .hint("Try again in a moment."));
        }
        self.catalog.checkout().await
    }

    /// The tenant for a client that connects, made if need be.
    async fn ensure(self: &Arc<Self>, id: &TenantId, who: &str) -> Result<Arc<Tenant>, PgError> {
        if let Some(tenant) = self.directory.find(id.as_str()) {
            return Ok(tenant);
        }
        self.make(id, who, Wanted::ByConnecting).await?;
        self.sync().await;
        self.directory.find(id.as_str()).ok_or_else(|| {
            PgError::fatal(sqlstate::CANNOT_CONNECT_NOW, format!("tenant \"{id}\" is not ready")).hint("Try again.")
        })
    }

    fn spawn_tasks(self: &Arc<Self>, mut provision: mpsc::Receiver<ProvisionRequest>) {
        let control = self.clone();
        self.spawn(async move {
            while let Some(request) = provision.recv().await {
                let worker = control.clone();
                control.tasks.spawn(async move {
                    let answer = worker.ensure(&request.id, &request.requested_by).await;
                    let _ = request.reply.send(answer);
                });
            }
        });
        let control = self.clone();
        self.every(PROBE_INTERVAL, move || control.clone().probe_shards());
        let control = self.clone();
        self.every(JANITOR_INTERVAL, move || control.clone().tidy());
        let control = self.clone();
        let interval = self.config.metrics.storage_interval;
        if !interval.is_zero() {
            self.every(interval, move || control.clone().measure());
        }
    }

    fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let shutdown = self.shutdown.clone();
        self.tasks.spawn(async move {
            shutdown.run_until_cancelled(work).await;
        });
    }

    /// Runs the work now and then, one run at a time.
    fn every<F>(&self, interval: Duration, work: impl Fn() -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send,
    {
        self.spawn(async move {
            let mut ticks = tokio::time::interval(interval);
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                ticks.tick().await;
                work().await;
            }
        });
    }

    async fn probe_shards(self: Arc<Self>) {
        let shards = self.directory.shards();
        futures_util::future::join_all(shards.iter().map(|shard| self.probe_shard(shard))).await;
        self.health.retain(|name, _| shards.iter().any(|shard| shard.name == *name));
    }

    async fn measure(self: Arc<Self>) {
        for shard in self.directory.shards() {
            if let Err(error) = self.measure_storage(&shard).await {
                tracing::debug!(shard = shard.name, %error, "cannot measure storage");
            }
        }
    }

    /// Sets up shards that are not, and takes up what others left unfinished.
    async fn tidy(self: Arc<Self>) {
        self.catalog.sweep();
        self.pools.iter().for_each(|pool| pool.sweep());
        for shard in self.directory.shards() {
            if shard.dedicated_to.is_some() {
                continue;
            }
            if let Err(error) = self.setup_plans(&shard).await {
                tracing::warn!(shard = shard.name, %error, "cannot set up the shard");
            }
        }
        let left = async {
            let catalog = self.catalog().await?;
            let after = self.config.provision.provision_timeout.as_secs_f64();
            let unfinished = TenantRecord::unfinished(&*catalog, after).await?;
            catalog.give_back().await;
            Ok::<_, PgError>(unfinished)
        };
        for record in left.await.unwrap_or_default() {
            let Ok(id) = TenantId::parse(&record.id) else { continue };
            tracing::info!(tenant = %id, status = record.status, "taking up unfinished work");
            let done = match record.status() {
                Some(Status::Deleting) => self.delete(&id, "janitor").await.map(drop),
                _ => self.make(&id, "janitor", Wanted::ByConnecting).await,
            };
            if let Err(error) = done {
                tracing::warn!(tenant = %id, %error, "cannot finish what was begun");
            }
        }
    }
}

/// What sessions of a changed tenant are told.
pub(crate) fn closing(id: &TenantId, change: Change) -> PgError {
    let message = match change {
        Change::Moved => format!("tenant \"{id}\" has changed its place"),
        Change::Suspended => format!("tenant \"{id}\" is suspended"),
        Change::Gone => format!("tenant \"{id}\" has been deleted"),
    };
    let error = PgError::fatal(sqlstate::ADMIN_SHUTDOWN, message);
    if change == Change::Moved { error.hint("Connect again.") } else { error }
}

fn close_on_change(traffic: &Arc<dyn Traffic>) -> OnChange {
    let traffic = traffic.clone();
    Arc::new(move |id, change| traffic.close_tenant(id, closing(id, change)))
}

fn known_shard(record: &ShardRecord, max_db_connections: usize) -> Shard {
    Shard {
        name: record.name.clone(),
        host: record.host.clone(),
        port: record.port,
        database: record.database.clone(),
        rls_database: record.rls_database.clone(),
        dedicated_to: record.dedicated_to.as_deref().and_then(|id| TenantId::parse(id).ok()),
        weight: record.weight,
        region: record.region.clone(),
        max_db_connections: record.max_db_connections.unwrap_or(max_db_connections),
    }
}

/// How the control plane connects. The one place that decides on TLS towards the catalog and shards: `Connector::tls`.
fn connector(config: &Config) -> Result<Connector, ControlError> {
    let tls = ClientTls::new(&config.tls)?.current();
    let plain = Connector::plain(config.pool.server_connect_timeout);
    Ok(Connector { tls: Some((tls.for_tokio_postgres(), tls.mode)), ..plain })
}

/// Where the catalog is: what `[catalog]` says, or a database on the first shard.
fn catalog_endpoint(config: &Config) -> Result<Endpoint, ControlError> {
    let catalog = &config.catalog;
    if let Some(host) = &catalog.host {
        return Ok(Endpoint {
            host: host.clone(),
            port: catalog.port,
            database: catalog.database.clone(),
            user: catalog.user.clone(),
            password: catalog.password.clone(),
        });
    }
    let first = config.shards.first().ok_or(ControlError::NoCatalog)?;
    Ok(admin_endpoint(config, &first.name, &first.host, first.port, &catalog.database))
}

/// Loads; waits for a server that is only just starting (everything is started at once by compose and the like).
async fn load_patiently(follower: &mut Follower) -> Result<Link, CatalogError> {
    let until = tokio::time::Instant::now() + START_PATIENCE;
    loop {
        match follower.load().await {
            Err(error) if error.is_away() && tokio::time::Instant::now() < until => {
                tracing::warn!(%error, "waiting for the catalog");
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
            done => return done,
        }
    }
}

/// Loads what has changed since the snapshot; `None` if the catalog does not answer soon.
async fn load_or_go_on(follower: &mut Follower) -> Result<Option<Link>, CatalogError> {
    match tokio::time::timeout(SNAPSHOT_PATIENCE, load_patiently(follower)).await {
        Ok(Ok(link)) => return Ok(Some(link)),
        Ok(Err(error)) if !error.is_away() => return Err(error),
        Ok(Err(_)) | Err(_) => {}
    }
    tracing::warn!("the catalog does not answer: serving the tenants of the snapshot until it does");
    Ok(None)
}

/// Users of the config file live in memory only; a plain password becomes a verifier here.
async fn put_config_users(config: &Config, directory: &Directory) {
    let mut users = Vec::new();
    for user in &config.users {
        users.push(AppUser {
            name: user.name.clone(),
            verifier: verifier(&user.password).await,
            tenants: user.tenants.clone(),
            auto_provision: user.auto_provision,
        });
    }
    directory.set_config_users(users);
}

async fn verifier(password: &Secret) -> Option<Verifier> {
    if password.expose().is_empty() {
        return None;
    }
    if let Ok(verifier) = Verifier::parse(password.expose()) {
        return Some(verifier);
    }
    let password = password.clone();
    tokio::task::spawn_blocking(move || Verifier::random(password.expose())).await.ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ShardConfig;

    #[test]
    fn without_a_host_the_catalog_is_on_the_first_shard() {
        assert!(matches!(catalog_endpoint(&Config::default()), Err(ControlError::NoCatalog)));
        let shard = ShardConfig { name: "a".into(), port: 5433, admin_user: "root".into(), ..ShardConfig::default() };
        let mut config = Config { shards: vec![shard], ..Config::default() };
        let at = catalog_endpoint(&config).unwrap();
        assert_eq!((at.port, at.database.as_str(), at.user.as_str()), (5433, "pgusher", "root"));
        config.catalog.host = Some("catalog.example".into());
        assert_eq!(catalog_endpoint(&config).unwrap().host, "catalog.example");
    }
}
