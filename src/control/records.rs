//! Rows of the catalog as the control plane reads and writes them.

use serde::Serialize;
use serde_json::Value;
use tokio_postgres::{GenericClient, Row};

use super::admin::failed;
use crate::error::PgError;
use crate::tenant::plan::Home;
use crate::tenant::{Plan, Status, TenantId};

/// A tenant's row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TenantRecord {
    /// Its id.
    pub id: String,
    /// Its plan.
    pub plan: String,
    /// Name of the shard it lives on.
    pub shard: String,
    /// Database there.
    pub database: String,
    /// Schema there.
    pub schema: String,
    /// Role of its server connections.
    pub role: String,
    /// `creating`, `active`, `suspended`, `deleting`, `deleted`.
    pub status: String,
    /// Grows with each change of home or status.
    pub epoch: i64,
    /// Whether pgusher made its place; what it did not make it does not drop.
    pub managed: bool,
    /// When it was made, ISO 8601.
    pub created_at: String,
    /// When its row changed last.
    pub changed_at: String,
    /// When it was deleted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deleted_at: Option<String>,
}

/// A shard's row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ShardRecord {
    /// Its name.
    pub name: String,
    /// Host name, address or socket directory.
    pub host: String,
    /// Port.
    pub port: u16,
    /// Database of new tenants.
    pub database: String,
    /// Weight on the ring.
    pub weight: u32,
    /// Where it stands.
    pub region: String,
    /// Most server connections of a proxy to it; the proxy's default if absent.
    pub max_db_connections: Option<usize>,
    /// Database of new tenants of plan `rls`.
    pub rls_database: String,
    /// The tenant that has it to itself.
    pub dedicated_to: Option<String>,
    /// Tenants on it.
    pub tenants: i64,
}

const COLUMNS: &str = "id, plan, shard, database, schema, role, status, epoch, \
    to_char(created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.MS\"Z\"'), \
    to_char(changed_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.MS\"Z\"'), \
    to_char(deleted_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.MS\"Z\"'), managed";

impl TenantRecord {
    fn read(row: &Row) -> Self {
        Self {
            id: row.get(0),
            plan: row.get(1),
            shard: row.get(2),
            database: row.get(3),
            schema: row.get(4),
            role: row.get(5),
            status: row.get(6),
            epoch: row.get(7),
            created_at: row.get(8),
            changed_at: row.get(9),
            deleted_at: row.get(10),
            managed: row.get(11),
        }
    }

    /// Its status; a word from a newer pgusher is `None`.
    pub fn status(&self) -> Option<Status> {
        Status::parse(&self.status)
    }

    /// Its place.
    pub(crate) fn home(&self, id: &TenantId) -> Home {
        Home { id: id.clone(), database: self.database.clone(), schema: self.schema.clone(), role: self.role.clone() }
    }

    /// Its plan.
    pub fn plan(&self) -> Option<Plan> {
        Plan::parse(&self.plan)
    }

    /// The row of this tenant.
    pub(crate) async fn find(client: &impl GenericClient, id: &TenantId) -> Result<Option<Self>, PgError> {
        let sql = format!("SELECT {COLUMNS} FROM pgusher.tenants WHERE id = $1");
        let row = client.query_opt(&sql, &[&id.as_str()]).await.map_err(failed("read the catalog"))?;
        Ok(row.as_ref().map(Self::read))
    }

    /// Up to `limit` rows in the order of ids, from the first after `after` on.
    pub(crate) async fn list(
        client: &impl GenericClient,
        after: &str,
        limit: i64,
        deleted_too: bool,
    ) -> Result<Vec<Self>, PgError> {
        let sql = format!(
            "SELECT {COLUMNS} FROM pgusher.tenants WHERE id > $1 AND ($2 OR status <> 'deleted') ORDER BY id LIMIT $3"
        );
        let rows = client.query(&sql, &[&after, &deleted_too, &limit]).await.map_err(failed("read the catalog"))?;
        Ok(rows.iter().map(Self::read).collect())
    }

    /// Tenants that somebody began to make or to delete, and left so for `seconds`.
    pub(crate) async fn unfinished(client: &impl GenericClient, seconds: f64) -> Result<Vec<Self>, PgError> {
        let sql = format!(
            "SELECT {COLUMNS} FROM pgusher.tenants WHERE status IN ('creating', 'deleting') \
             AND changed_at < now() - make_interval(secs => $1) ORDER BY changed_at LIMIT 100"
        );
        let rows = client.query(&sql, &[&seconds]).await.map_err(failed("read the catalog"))?;
        Ok(rows.iter().map(Self::read).collect())
    }
}

impl ShardRecord {
    /// All shards, by name.
    pub(crate) async fn list(client: &impl GenericClient) -> Result<Vec<Self>, PgError> {
        let sql = "SELECT s.name, s.host, s.port, s.database, s.weight, s.region, s.max_db_connections, \
                   s.rls_database, s.dedicated_to, \
                   (SELECT count(*) FROM pgusher.tenants t WHERE t.shard = s.name AND t.status <> 'deleted') \
                   FROM pgusher.shards s ORDER BY s.name";
        let rows = client.query(sql, &[]).await.map_err(failed("read the catalog"))?;
        Ok(rows
            .iter()
            .map(|row| Self {
                name: row.get(0),
                host: row.get(1),
                port: u16::try_from(row.get::<_, i32>(2)).unwrap_or_default(),
                database: row.get(3),
                weight: u32::try_from(row.get::<_, i32>(4)).unwrap_or_default(),
                region: row.get(5),
                max_db_connections: row.get::<_, Option<i32>>(6).and_then(|n| usize::try_from(n).ok()),
                rls_database: row.get(7),
                dedicated_to: row.get(8),
                tenants: row.get(9),
            })
            .collect())
    }

    /// The plans of the tenants that live on a shard; takes no longer where there are many.
    pub(crate) async fn plans(client: &impl GenericClient, shard: &str) -> Result<Vec<Plan>, PgError> {
        let sql = "SELECT p FROM unnest($2::text[]) p, LATERAL (SELECT FROM pgusher.tenants t \
                   WHERE t.shard = $1 AND t.plan = p AND t.status <> 'deleted' LIMIT 1) one";
        let all = Plan::ALL.map(Plan::as_str);
        let rows = client.query(sql, &[&shard, &all.as_slice()]).await.map_err(failed("read the catalog"))?;
        Ok(rows.iter().filter_map(|row| Plan::parse(row.get(0))).collect())
    }

    /// Writes the shard; whether that changed anything.
    pub(crate) async fn put(&self, client: &impl GenericClient) -> Result<bool, PgError> {
        let sql = "INSERT INTO pgusher.shards AS s (name, host, port, database, weight, region, max_db_connections, \
                   rls_database, dedicated_to) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) ON CONFLICT (name) DO UPDATE SET host = EXCLUDED.host, \
                   port = EXCLUDED.port, database = EXCLUDED.database, weight = EXCLUDED.weight, \
                   region = EXCLUDED.region, max_db_connections = EXCLUDED.max_db_connections, \
                   rls_database = EXCLUDED.rls_database, dedicated_to = EXCLUDED.dedicated_to \
                   WHERE (s.host, s.port, s.database, s.weight, s.region, s.max_db_connections, s.rls_database, \
                   s.dedicated_to) IS DISTINCT FROM (EXCLUDED.host, EXCLUDED.port, EXCLUDED.database, \
                   EXCLUDED.weight, EXCLUDED.region, EXCLUDED.max_db_connections, EXCLUDED.rls_database, \
                   EXCLUDED.dedicated_to)";
        let weight = i32::try_from(self.weight).unwrap_or(i32::MAX);
        let most = self.max_db_connections.map(|n| i32::try_from(n).unwrap_or(i32::MAX));
        let changed = client
            .execute(
                sql,
                &[
                    &self.name,
                    &self.host,
                    &i32::from(self.port),
                    &self.database,
                    &weight,
                    &self.region,
                    &most,
                    &self.rls_database,
                    &self.dedicated_to,
                ],
            )
            .await
            .map_err(failed("write the shard into the catalog"))?;
        Ok(changed > 0)
    }
}

/// Writes a line into the event log.
pub(crate) async fn event(
    client: &impl GenericClient,
    who: &str,
    what: &str,
    tenant: Option<&TenantId>,
    detail: &Value,
) -> Result<(), PgError> {
    let tenant = tenant.map(TenantId::as_str);
    client
        .execute(
            "INSERT INTO pgusher.events (who, what, tenant, detail) VALUES ($1, $2, $3, $4::text::jsonb)",
            &[&who, &what, &tenant, &detail.to_string()],
        )
        .await
        .map_err(failed("write to the event log"))?;
    Ok(())
}
