//! The control database: made and migrated by pgusher itself, and read into the [`Directory`].
//!
//! Writing to it is [`control`](crate::control)'s business. [`follow`](super::follow) decides when to read.
//!
//! How no change is lost: every followed row carries the id of the transaction that changed it last. A reader
//! remembers the server's snapshot from *before* its last read ([`Seen`]) and next time asks for the rows whose
//! transaction that snapshot does not see. Numbers from a sequence would not do: they are drawn before commit, so a
//! smaller one may become visible after a greater one has been read.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::TryStreamExt as _;
use parking_lot::Mutex;
use tokio::time::Instant;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Row};

use super::connector::{ConnectError, Connector, Endpoint, explain};
use super::snapshot::Contents;
use super::{AppUser, Directory, Names, Shard, Tenant};
use crate::error::sqlstate;
use crate::tenant::credential::Verifier;
use crate::tenant::sql::Ident;
use crate::tenant::{Plan, Status, TenantId};

/// Channel on which the catalog's triggers notify.
pub const CHANNEL: &str = "pgusher_changes";

/// Key of the advisory lock under which the catalog is migrated; the letters `pgusher` as a number.
const MIGRATION_LOCK: i64 = 0x70_67_75_73_68_65_72;

/// Versioned migrations, run in order, each in a transaction of its own.
const MIGRATIONS: &[(i32, &str, &str)] = &[
    (1, "catalog", include_str!("migrations/0001_catalog.sql")),
    (2, "plans", include_str!("migrations/0002_plans.sql")),
    (3, "plans of a shard", include_str!("migrations/0003_plans_of_a_shard.sql")),
];

/// Removals older than this are forgotten ten times later; who has not read for so long reads everything.
const FORGET: Duration = Duration::from_secs(24 * 3600);

/// Why the catalog cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// No connection.
    #[error("cannot connect to the catalog at {0}: {1}")]
    Connect(Endpoint, #[source] ConnectError),
    /// A statement failed.
    #[error("cannot {doing}: {}", explain(.source))]
    Postgres {
        /// What was to be done.
        doing: &'static str,
        /// What came of it.
        source: tokio_postgres::Error,
    },
    /// A migration failed.
    #[error("migration {name} of the catalog failed: {}", explain(.source))]
    Migration {
        /// Which one.
        name: &'static str,
        /// What came of it.
        source: tokio_postgres::Error,
    },
    /// Another pgusher has migrated further.
    #[error("the catalog has version {found}, this pgusher knows only versions up to {known}")]
    TooNew {
        /// Version of the catalog.
        found: i32,
        /// The last version known here.
        known: i32,
    },
    /// A read took too long.
    #[error("the catalog does not answer")]
    Silent,
}

impl CatalogError {
    /// Whether it may be there in a moment: it does not answer, or is starting up. A server that refuses us says so
    /// with another code.
    pub fn is_away(&self) -> bool {
        match self {
            Self::Connect(_, error) => error.code().is_none_or(|code| code == sqlstate::CANNOT_CONNECT_NOW),
            Self::Silent => true,
            Self::Postgres { source, .. } | Self::Migration { source, .. } => source.is_closed(),
            Self::TooNew { .. } => false,
        }
    }
}

/// A catalog restored into another cluster carries that one's transaction ids, which here may lie in the future: such
/// rows would look new for ever. What is visible to a snapshot cannot be from after it, unless it was restored.
const REPAIR: &str = "\
    UPDATE pgusher.shards SET changed_at = changed_at WHERE changed_in >= pg_snapshot_xmax(pg_current_snapshot()); \
    UPDATE pgusher.tenants SET changed_at = changed_at WHERE changed_in >= pg_snapshot_xmax(pg_current_snapshot()); \
    UPDATE pgusher.credentials SET changed_at = changed_at WHERE changed_in >= pg_snapshot_xmax(pg_current_snapshot()); \
    DELETE FROM pgusher.removals WHERE changed_in >= pg_snapshot_xmax(pg_current_snapshot()) \
      OR changed_at < now() - interval '10 days'";

/// Makes the database if it is missing and brings its tables to this version. Any number of proxies may do so at once.
///
/// # Errors
/// See [`CatalogError`].
pub async fn migrate(connector: &Connector, at: &Endpoint) -> Result<(), CatalogError> {
    let mut client = match connector.connect(at).await {
        Err(error) if error.code() == Some("3D000") => {
            create_database(connector, at, &at.database)
                .await
                .map_err(|e| CatalogError::Connect(at.database("postgres"), e))?;
            connector.connect(at).await
        }
        other => other,
    }
    .map_err(|e| CatalogError::Connect(at.clone(), e))?;
    let failed = |source| CatalogError::Postgres { doing: "migrate the catalog", source };
    client.execute("SELECT pg_advisory_lock($1)", &[&MIGRATION_LOCK]).await.map_err(failed)?;
    client
        .batch_execute(
            "CREATE SCHEMA IF NOT EXISTS pgusher; CREATE TABLE IF NOT EXISTS pgusher.migrations \
             (version integer PRIMARY KEY, name text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())",
        )
        .await
        .map_err(failed)?;
    let row =
        client.query_one("SELECT coalesce(max(version), 0) FROM pgusher.migrations", &[]).await.map_err(failed)?;
    let found: i32 = row.get(0);
    let known = MIGRATIONS.iter().map(|m| m.0).max().unwrap_or(0);
    if found > known {
        return Err(CatalogError::TooNew { found, known });
    }
    for &(version, name, sql) in MIGRATIONS.iter().filter(|m| m.0 > found) {
        let failed = |source| CatalogError::Migration { name, source };
        let transaction = client.transaction().await.map_err(failed)?;
        transaction.batch_execute(sql).await.map_err(failed)?;
        transaction
            .execute("INSERT INTO pgusher.migrations (version, name) VALUES ($1, $2)", &[&version, &name])
            .await
            .map_err(failed)?;
        transaction.commit().await.map_err(failed)?;
        tracing::info!(version, name, "migrated the catalog");
    }
    client.batch_execute(REPAIR).await.map_err(failed)?;
    // Closing the connection gives the lock back.
    Ok(())
}

/// Creates a database unless it exists; asks through database `postgres`.
///
/// # Errors
/// What the server says.
pub async fn create_database(connector: &Connector, at: &Endpoint, name: &str) -> Result<(), ConnectError> {
    let client = connector.connect(&at.database("postgres")).await?;
    match client.batch_execute(&format!("CREATE DATABASE {}", Ident(name))).await {
        // Somebody else was faster: duplicate_database, or unique_violation in pg_database.
        Err(e) if e.code().is_some_and(|c| ["42P04", "23505"].contains(&c.code())) => Ok(()),
        other => other.map_err(ConnectError::Postgres),
    }
}

/// How far the catalog has been read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Which cluster, timeline and database: transaction ids of another one mean nothing.
    pub(super) system: String,
    /// `pg_current_snapshot()` from before the read.
    pub(super) snapshot: String,
}

impl Seen {
    async fn now(client: &Client) -> Result<Self, CatalogError> {
        // A restored backup has a timeline of its own, a database that was dropped and loaded again another oid.
        let sql = "SELECT concat_ws('/', s.system_identifier, c.timeline_id, d.oid), pg_current_snapshot()::text \
                   FROM pg_control_system() s, pg_control_checkpoint() c, pg_database d \
                   WHERE d.datname = current_database()";
        let row = client.query_one(sql, &[]).await.map_err(read_failed)?;
        Ok(Self { system: row.get(0), snapshot: row.get(1) })
    }

    fn xmax(&self) -> u64 {
        self.snapshot.split(':').nth(1).and_then(|xmax| xmax.parse().ok()).unwrap_or(0)
    }

    /// Whether what has been read since `earlier` can be told: not after another cluster took over, nor after time
    /// was turned back (a backup restored).
    fn continues(&self, earlier: &Self) -> bool {
        self.system == earlier.system && self.xmax() >= earlier.xmax()
    }
}

fn read_failed(source: tokio_postgres::Error) -> CatalogError {
    CatalogError::Postgres { doing: "read the catalog", source }
}

/// What happened to a tenant that was known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// It is somewhere else, or came back: sessions must take the new route.
    Moved,
    /// No client may use it for now.
    Suspended,
    /// It is being deleted or is gone.
    Gone,
}

/// Called when sessions of a tenant must end.
pub type OnChange = Arc<dyn Fn(&TenantId, Change) + Send + Sync>;

/// Reads the catalog into the directory. The only writer of the directory, so that an older state never wins.
pub struct Reader {
    directory: Arc<Directory>,
    on_change: OnChange,
    /// For shards whose row does not say how many server connections they take.
    max_db_connections: usize,
    /// One `Arc<Shard>` for each shard and, in it, database that tenants are recorded in.
    homes: HashMap<String, HashMap<String, Arc<Shard>>>,
    seen: Position,
    read_at: Instant,
    /// What is known comes from a snapshot, which is not to be trusted with what can be read in no time.
    restored: bool,
}

/// How far the directory is known to be, for the snapshot; `None` before the first read.
pub type Position = Arc<Mutex<Option<Seen>>>;

const TENANTS: &str = "SELECT t.id, t.plan, t.shard, t.database, t.schema, t.role, t.status, t.epoch, c.verifier, t.managed \
                       FROM pgusher.tenants t LEFT JOIN pgusher.credentials c ON c.tenant = t.id";
const SHARDS: &str = "SELECT s.name, s.host, s.port, s.database, s.weight, s.region, s.max_db_connections, \
                      s.rls_database, s.dedicated_to FROM pgusher.shards s";
const USERS: &str = "SELECT u.name, u.verifier, u.tenants, u.auto_provision FROM pgusher.credentials u \
                     WHERE u.kind = 'user'";

/// The condition "changed in a transaction that snapshot `$1` does not see"; the first half can use the index.
fn since(alias: &str) -> String {
    format!(
        "{alias}.changed_in >= pg_snapshot_xmin($1::text::pg_snapshot) \
         AND NOT pg_visible_in_snapshot({alias}.changed_in, $1::text::pg_snapshot)"
    )
}

impl Reader {
    /// A reader that has read nothing yet.
    pub fn new(directory: Arc<Directory>, on_change: OnChange, max_db_connections: usize) -> Self {
        let (homes, seen, read_at) = (HashMap::new(), Position::default(), Instant::now());
        Self { directory, on_change, max_db_connections, homes, seen, read_at, restored: false }
    }

    /// What it reads into.
    pub fn directory(&self) -> Arc<Directory> {
        self.directory.clone()
    }

    /// How far it has read, now and later.
    pub fn position(&self) -> Position {
        self.seen.clone()
    }

    /// Takes over a snapshot, before anything is read; the first read then reads what has changed since.
    pub fn restore(&mut self, contents: Contents) {
        contents.shards.into_iter().for_each(|shard| self.put_shard(shard));
        contents.users.into_iter().for_each(|user| self.directory.put_user(user));
        for tenant in contents.tenants {
            let homes = self.homes.entry(tenant.shard.name.clone()).or_default();
            homes.entry(tenant.shard.database.clone()).or_insert_with(|| tenant.shard.clone());
            self.directory.put(tenant);
        }
        // Removals before that are perhaps forgotten.
        if contents.age.is_some_and(|age| age < FORGET / 2) {
            *self.seen.lock() = Some(contents.seen);
        }
        self.restored = true;
    }

    /// Reads what is new since the last time; everything, the first time and when that cannot be told.
    ///
    /// # Errors
    /// [`CatalogError`]; the next call then reads again what this one did not finish.
    pub async fn read(&mut self, client: &Client) -> Result<(), CatalogError> {
        let now = Seen::now(client).await?;
        let seen = self.seen.lock().clone();
        match seen {
            Some(seen) if now.continues(&seen) && self.read_at.elapsed() < FORGET => {
                if self.restored {
                    self.read_shards_and_users(client).await?;
                }
                self.read_changes(client, &seen.snapshot).await?;
            }
            seen => {
                if self.restored && seen.is_some() {
                    tracing::warn!(
                        "the snapshot is of another catalog, or the catalog was restored: reading all of it"
                    );
                }
                self.read_all(client).await?;
            }
        }
        *self.seen.lock() = Some(now);
        self.read_at = Instant::now();
        self.restored = false;
        Ok(())
    }

    async fn read_all(&mut self, client: &Client) -> Result<(), CatalogError> {
        let gone = self.read_shards_and_users(client).await?;
        self.read_tenants(client).await?;
        gone.iter().for_each(|shard| self.directory.remove_shard(shard));
        Ok(())
    }

    /// The names of shards that are no more; their last tenants are perhaps still here.
    async fn read_shards_and_users(&mut self, client: &Client) -> Result<Vec<String>, CatalogError> {
        let mut shards = HashSet::new();
        for row in client.query(SHARDS, &[]).await.map_err(read_failed)? {
            shards.insert(row.get::<_, String>(0));
            self.apply_shard(&row);
        }
        let mut users: HashSet<String> = HashSet::new();
        for row in client.query(USERS, &[]).await.map_err(read_failed)? {
            users.insert(row.get(0));
            self.apply_user(&row);
        }
        self.directory.user_names().iter().filter(|n| !users.contains(*n)).for_each(|n| self.directory.remove_user(n));
        let known = self.directory.shards();
        Ok(known.iter().filter(|shard| !shards.contains(&shard.name)).map(|shard| shard.name.clone()).collect())
    }

    async fn read_tenants(&mut self, client: &Client) -> Result<(), CatalogError> {
        // Only a second full read can find tenants here that the catalog no longer has.
        let again = !self.directory.is_empty();
        let mut read = HashSet::new();
        let sql = format!("{TENANTS} WHERE t.status IN ('active', 'suspended')");
        let rows = client.query_raw(&sql, std::iter::empty::<&(dyn ToSql + Sync)>()).await.map_err(read_failed)?;
        let mut rows = std::pin::pin!(rows);
        while let Some(row) = rows.try_next().await.map_err(read_failed)? {
            self.apply_tenant(&row);
            if again {
                read.insert(row.get::<_, String>(0));
            }
        }
        if again {
            let gone = self.directory.tenants().filter(|tenant| !read.contains(tenant.id.as_str()));
            gone.for_each(|tenant| self.forget(&tenant.id));
        }
        Ok(())
    }

    async fn read_changes(&mut self, client: &Client, snapshot: &str) -> Result<(), CatalogError> {
        let removed = format!("SELECT r.kind, r.key FROM pgusher.removals r WHERE {}", since("r"));
        let (shards, users, tenants) = (
            format!("{SHARDS} WHERE {}", since("s")),
            format!("{USERS} AND {}", since("u")),
            format!("{TENANTS} WHERE {}", since("t")),
        );
        let snapshot: &[&(dyn ToSql + Sync)] = &[&snapshot];
        // Removals first: a row that was removed and made again is found below.
        let (removed, shards, users, tenants) = futures_util::future::try_join4(
            client.query(&removed, snapshot),
            client.query(&shards, snapshot),
            client.query(&users, snapshot),
            client.query(&tenants, snapshot),
        )
        .await
        .map_err(read_failed)?;
        for row in &removed {
            self.apply_removal(row);
        }
        for row in &shards {
            self.apply_shard(row);
        }
        for row in &users {
            self.apply_user(row);
        }
        for row in &tenants {
            self.apply_tenant(row);
        }
        Ok(())
    }

    fn apply_removal(&self, row: &Row) {
        let (kind, key): (&str, &str) = (row.get(0), row.get(1));
        match kind {
            "shards" => self.directory.remove_shard(key),
            "credentials" => self.directory.remove_user(key),
            "tenants" => {
                if let Ok(id) = TenantId::parse(key) {
                    self.forget(&id);
                }
            }
            _ => {}
        }
    }

    fn apply_shard(&mut self, row: &Row) {
        let Some(shard) = shard(row, self.max_db_connections) else {
            tracing::error!(shard = row.get::<_, &str>(0), "the catalog's row of this shard is not valid, ignored");
            return;
        };
        self.put_shard(shard);
    }

    /// Puts a shard in place, and in the place of what its tenants know of it if that makes a difference to them: that
    /// is work for each of them.
    pub fn put_shard(&mut self, shard: Shard) {
        let known = self.directory.shard(&shard.name);
        if known.as_ref().is_some_and(|known| **known == shard) {
            return;
        }
        tracing::info!(shard = shard.name, host = shard.host, port = shard.port, weight = shard.weight, "shard");
        self.homes.remove(&shard.name);
        self.directory.put_shard(shard.clone());
        let reached = |shard: &Shard| (shard.host.clone(), shard.port, shard.max_db_connections);
        if known.is_none_or(|known| reached(&known) == reached(&shard)) {
            return;
        }
        let directory = self.directory.clone();
        for tenant in directory.tenants().filter(|tenant| tenant.shard.name == shard.name) {
            let home = self.home(&shard.name, &tenant.shard.database).unwrap_or_else(|| tenant.shard.clone());
            self.directory.put(Tenant { shard: home, ..(*tenant).clone() });
        }
    }

    fn apply_user(&self, row: &Row) {
        let user = AppUser {
            name: row.get(0),
            verifier: row.get::<_, Option<&str>>(1).and_then(|text| Verifier::parse(text).ok()),
            tenants: row.get(2),
            auto_provision: row.get(3),
        };
        self.directory.put_user(user);
    }

    fn apply_tenant(&mut self, row: &Row) {
        let id: &str = row.get(0);
        let Ok(id) = TenantId::parse(id) else {
            tracing::error!(tenant = id, "the catalog has a tenant whose id is not valid, ignored");
            return;
        };
        let status = Status::parse(row.get(6)).filter(|s| matches!(s, Status::Active | Status::Suspended));
        let known = self.directory.find(id.as_str());
        let Some(tenant) = status.and_then(|status| self.tenant(&id, status, row)) else {
            return self.forget(&id);
        };
        let change = match (&known, tenant.status) {
            (None, _) => None,
            (Some(known), Status::Suspended) if known.status != Status::Suspended => Some(Change::Suspended),
            (Some(known), _) if tenant.epoch > known.epoch => Some(Change::Moved),
            (Some(_), _) => None,
        };
        if known.is_none_or(|known| *known != tenant) {
            self.directory.put(tenant);
        }
        if let Some(change) = change {
            (self.on_change)(&id, change);
        }
    }

    fn tenant(&mut self, id: &TenantId, status: Status, row: &Row) -> Option<Tenant> {
        let plan = Plan::parse(row.get(1));
        let shard = self.home(row.get(2), row.get(3));
        let (Some(plan), Some(shard)) = (plan, shard) else {
            tracing::error!(tenant = %id, "the catalog gives this tenant a home that this pgusher cannot reach");
            return None;
        };
        let verifier = row.get::<_, Option<&str>>(8).and_then(|text| Verifier::parse(text).ok());
        let epoch = u64::try_from(row.get::<_, i64>(7)).unwrap_or(0);
        let (schema, role): (&str, &str) = (row.get(4), row.get(5));
        let as_planned = schema == plan.default_schema(id) && role == id.as_str();
        let names = (!as_planned).then(|| Box::new(Names { schema: schema.to_owned(), role: role.to_owned() }));
        Some(Tenant { id: id.clone(), plan, shard, status, epoch, verifier, names, managed: row.get(9) })
    }

    fn home(&mut self, name: &str, database: &str) -> Option<Arc<Shard>> {
        if let Some(home) = self.homes.get(name).and_then(|homes| homes.get(database)) {
            return Some(home.clone());
        }
        let shard = self.directory.shard(name)?;
        let home = if shard.database == database {
            shard
        } else {
            Arc::new(Shard { database: database.to_owned(), ..(*shard).clone() })
        };
        self.homes.entry(name.to_owned()).or_default().insert(database.to_owned(), home.clone());
        Some(home)
    }

    fn forget(&self, id: &TenantId) {
        if self.directory.find(id.as_str()).is_some() {
            self.directory.remove(id.as_str());
            (self.on_change)(id, Change::Gone);
        }
    }
}

fn shard(row: &Row, max_db_connections: usize) -> Option<Shard> {
    let most: Option<i32> = row.get(6);
    Some(Shard {
        name: row.get(0),
        host: row.get(1),
        port: u16::try_from(row.get::<_, i32>(2)).ok()?,
        database: row.get(3),
        weight: u32::try_from(row.get::<_, i32>(4)).ok()?,
        region: row.get(5),
        max_db_connections: most.map_or(Some(max_db_connections), |most| usize::try_from(most).ok())?,
        rls_database: row.get(7),
        dedicated_to: match row.get::<_, Option<&str>>(8) {
            Some(id) => Some(TenantId::parse(id).ok()?),
            None => None,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_cluster_or_an_older_state_is_read_whole() {
        let seen = |system: &str, snapshot: &str| Seen { system: system.into(), snapshot: snapshot.into() };
        let before = seen("1", "100:110:100,105");
        assert!(seen("1", "100:110:100").continues(&before));
        assert!(seen("1", "200:200:").continues(&before));
        assert!(!seen("1", "90:99:").continues(&before), "restored from a backup");
        assert!(!seen("2", "200:200:").continues(&before), "another cluster");
    }

    #[test]
    fn migrations_are_numbered_without_gaps() {
        for (at, migration) in MIGRATIONS.iter().enumerate() {
            assert_eq!(usize::try_from(migration.0).unwrap(), at + 1);
        }
    }
}
