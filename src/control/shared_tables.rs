//! Tables that tenants of one database share: what is there, and converting it ([`crate::tenant::rls`] says how).

use tokio_postgres::Transaction;

use super::Control;
use super::admin::failed;
use super::shards::admin_endpoint;
use crate::directory::Shard;
use crate::error::{PgError, sqlstate};
use crate::tenant::plan::{Databases, POLICY, TENANT_COLUMN};
use crate::tenant::rls::{Key, KeyKind, Reference, Table, Wanted, convert};
use crate::tenant::{Plan, TenantId};

/// What `pgusher rls convert` is told.
#[derive(Debug, Clone, Default)]
pub struct Conversion {
    /// The shard.
    pub shard: String,
    /// The database; the shard's `rls_database` if absent.
    pub database: Option<String>,
    /// Tables of schema `public`; all of them if empty.
    pub tables: Vec<String>,
    /// The tenant that gets the rows that are there.
    pub default_tenant: Option<TenantId>,
    /// Whether to do it, and not only to say it.
    pub apply: bool,
}

impl Control {
    /// Says what makes the tables of a database into shared ones, and does it if asked to, in one transaction.
    ///
    /// # Errors
    /// `55000` with every reason against it; what the server said.
    pub async fn convert_tables(&self, conversion: &Conversion) -> Result<Vec<String>, PgError> {
        let Some(shard) = self.directory.shard(&conversion.shard) else {
            let message = format!("there is no shard \"{}\"", conversion.shard);
            return Err(PgError::error(sqlstate::UNKNOWN_DATABASE, message));
        };
        let database = conversion.database.as_deref().unwrap_or(&shard.rls_database);
        if conversion.apply {
            self.setup_shared(&shard, database).await?;
        }
        let mut client = self.single(&shard.name, database)?.checkout().await?;
        let doing = failed("convert the tables");
        let transaction = client.transaction().await.map_err(&doing)?;
        transaction.batch_execute("SET LOCAL lock_timeout = '10s'").await.map_err(&doing)?;
        let role = conversion.default_tenant.as_ref().map(TenantId::as_str);
        let wanted = Wanted { rows_to: role, hardening: self.live().hardening };
        let sql = convert_all(&transaction, &conversion.tables, wanted, conversion.apply).await?;
        if conversion.apply {
            transaction.commit().await.map_err(&doing)?;
            tracing::info!(shard = shard.name, database, statements = sql.len(), "converted the tables");
        }
        Ok(sql)
    }

    async fn setup_shared(&self, shard: &Shard, database: &str) -> Result<(), PgError> {
        let databases = Databases { schemas: &shard.database, rows: database };
        let Some(setup) = Plan::Rls.setup(databases, self.live().hardening) else { return Ok(()) };
        let endpoint = admin_endpoint(&self.config, &shard.name, &shard.host, shard.port, database);
        self.setup(&shard.name, &endpoint, &setup).await
    }
}

/// Looks, and with `apply` runs what is to be run, in the caller's transaction.
pub(super) async fn convert_all(
    transaction: &Transaction<'_>,
    only: &[String],
    wanted: Wanted<'_>,
    apply: bool,
) -> Result<Vec<String>, PgError> {
    let doing = failed("convert the tables");
    let mut tables = inspect(transaction, only).await?;
    if apply {
        // Nothing may change between looking and doing.
        for table in tables.iter().filter(|table| !table.converted) {
            let name = crate::tenant::sql::Ident(&table.name);
            transaction.batch_execute(&format!("LOCK TABLE public.{name}")).await.map_err(&doing)?;
        }
        tables = inspect(transaction, only).await?;
    }
    if let Some(missing) = only.iter().find(|name| !tables.iter().any(|table| table.name == **name)) {
        return Err(PgError::error(sqlstate::UNKNOWN_DATABASE, format!("there is no table public.{missing}")));
    }
    let mut reasons = general_obstacles(transaction).await?;
    let sql = convert(&tables, wanted).unwrap_or_else(|more| {
        reasons.extend(more);
        Vec::new()
    });
    if !reasons.is_empty() {
        return Err(PgError::error(sqlstate::NOT_IN_PREREQUISITE_STATE, "the tables cannot be shared safely")
            .detail(reasons.join("\n"))
            .hint("Change what is named, or give --tables without these."));
    }
    if apply {
        for statement in &sql {
            transaction.batch_execute(statement).await.map_err(&doing)?;
        }
    }
    Ok(sql)
}

/// What stands in the way of every table.
async fn general_obstacles(transaction: &Transaction<'_>) -> Result<Vec<String>, PgError> {
    let sql = "SELECT pg_catalog.format('function %s runs as %I, who is above row-level security', p.oid::regprocedure, \
                 r.rolname) FROM pg_proc p JOIN pg_roles r ON r.oid = p.proowner \
               WHERE p.prosecdef AND (r.rolsuper OR r.rolbypassrls) AND p.pronamespace = 'public'::regnamespace \
               AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = p.oid AND d.deptype = 'e')";
    let rows = transaction.query(sql, &[]).await.map_err(failed("look at the functions"))?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

const TABLES: &str = "\
    SELECT c.oid, c.relname::text, \
      ARRAY(SELECT a.attname::text FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 \
            AND NOT a.attisdropped AND a.attname <> $1 ORDER BY a.attnum), \
      (SELECT pg_catalog.format_type(a.atttypid, a.atttypmod) FROM pg_attribute a WHERE a.attrelid = c.oid \
       AND a.attname = $1 AND NOT a.attisdropped), \
      EXISTS (SELECT FROM pg_policy p WHERE p.polrelid = c.oid AND p.polname = $2) \
        AND c.relrowsecurity AND c.relforcerowsecurity, \
      ARRAY(SELECT DISTINCT s.oid::regclass::text FROM pg_attrdef d \
            JOIN pg_depend x ON x.classid = 'pg_attrdef'::regclass AND x.objid = d.oid \
              AND x.refclassid = 'pg_class'::regclass \
            JOIN pg_class s ON s.oid = x.refobjid AND s.relkind = 'S' WHERE d.adrelid = c.oid), \
      ARRAY(SELECT DISTINCT coalesce(g.rolname::text, '') FROM pg_catalog.aclexplode(c.relacl) a \
            LEFT JOIN pg_roles g ON g.oid = a.grantee WHERE a.grantee <> c.relowner), \
      ARRAY(\
        SELECT 'is partitioned, or a part' WHERE c.relkind = 'p' OR c.relispartition \
        UNION ALL SELECT 'inherits, or is inherited from' WHERE EXISTS (SELECT FROM pg_inherits i \
          WHERE c.oid IN (i.inhrelid, i.inhparent)) AND c.relkind <> 'p' AND NOT c.relispartition \
        UNION ALL SELECT pg_catalog.format('constraint %s excludes over all rows', x.conname) FROM pg_constraint x \
          WHERE x.conrelid = c.oid AND x.contype = 'x' \
        UNION ALL SELECT pg_catalog.format('unique index %s has expressions, a condition, more columns than its key \
          or an unusual order', i.indexrelid::regclass) FROM pg_index i JOIN pg_class k ON k.oid = i.indexrelid \
          JOIN pg_am m ON m.oid = k.relam WHERE i.indrelid = c.oid AND i.indisunique \
          AND (i.indexprs IS NOT NULL OR i.indpred IS NOT NULL OR i.indnkeyatts <> i.indnatts OR m.amname <> 'btree' \
               OR coalesce((to_jsonb(i) ->> 'indnullsnotdistinct')::bool, false) \
               OR EXISTS (SELECT FROM unnest(i.indoption::int2[]) o WHERE o <> 0)) \
          AND NOT EXISTS (SELECT FROM pg_constraint x WHERE x.conindid = i.indexrelid AND x.contype = 'x') \
        UNION ALL SELECT pg_catalog.format('trigger %s runs code that was not written for several tenants', t.tgname) \
          FROM pg_trigger t WHERE t.tgrelid = c.oid AND NOT t.tgisinternal \
        UNION ALL SELECT pg_catalog.format('rule %s rewrites statements', r.rulename) FROM pg_rewrite r \
          WHERE r.ev_class = c.oid \
        UNION ALL SELECT pg_catalog.format('view %s reads it and would show what its owner may see', v.oid::regclass) \
          FROM pg_class v WHERE EXISTS (SELECT FROM pg_rewrite r JOIN pg_depend d ON d.classid = \
            'pg_rewrite'::regclass AND d.objid = r.oid AND d.refclassid = 'pg_class'::regclass \
            AND d.refobjid = c.oid WHERE r.ev_class = v.oid AND v.oid <> c.oid) \
        UNION ALL SELECT pg_catalog.format('policy %s is not pgusher''s', p.polname) FROM pg_policy p \
          WHERE p.polrelid = c.oid AND p.polname <> $2 \
        UNION ALL SELECT pg_catalog.format('foreign key %s of %s leads here, which is not among the tables', x.conname, \
          x.conrelid::regclass) FROM pg_constraint x JOIN pg_class o ON o.oid = x.conrelid \
          WHERE x.confrelid = c.oid AND x.contype = 'f' AND NOT (o.relnamespace = c.relnamespace \
            AND ($3::text[] = '{}' OR o.relname = ANY ($3))) \
        UNION ALL SELECT pg_catalog.format('foreign key %s matches %s, or changes rows when a key changes', x.conname, \
          CASE x.confmatchtype WHEN 'f' THEN 'full' ELSE 'simple' END) FROM pg_constraint x \
          WHERE x.conrelid = c.oid AND x.contype = 'f' AND (x.confmatchtype <> 's' OR x.confupdtype IN ('n', 'd') \
            OR (x.confdeltype IN ('n', 'd') AND current_setting('server_version_num')::int < 150000))\
        UNION ALL SELECT 'is in a publication' WHERE EXISTS (SELECT FROM pg_publication_rel p WHERE p.prrelid = c.oid)\
      ), c.relkind = 'r' \
    FROM pg_class c WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p', 'f') \
      AND ($3::text[] = '{}' OR c.relname = ANY ($3)) \
      AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = c.oid AND d.deptype = 'e') ORDER BY c.relname";

const KEYS: &str = "\
    SELECT k.relname::text, coalesce(x.contype::text, 'i'), \
      ARRAY(SELECT a.attname::text FROM unnest(i.indkey::int2[]) WITH ORDINALITY AS n (at, position) \
            JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = n.at ORDER BY n.position), \
      CASE WHEN x.condeferrable THEN ' DEFERRABLE INITIALLY ' || CASE WHEN x.condeferred THEN 'DEFERRED' \
        ELSE 'IMMEDIATE' END ELSE '' END \
    FROM pg_index i JOIN pg_class k ON k.oid = i.indexrelid \
    LEFT JOIN pg_constraint x ON x.conindid = i.indexrelid AND x.contype IN ('p', 'u') AND x.conrelid = i.indrelid \
    WHERE i.indrelid = $1 AND i.indisunique ORDER BY k.relname";

const REFERENCES: &str = "\
    SELECT x.conname::text, \
      ARRAY(SELECT a.attname::text FROM unnest(x.conkey) WITH ORDINALITY AS n (at, position) \
            JOIN pg_attribute a ON a.attrelid = x.conrelid AND a.attnum = n.at ORDER BY n.position), \
      CASE WHEN t.relnamespace = 'public'::regnamespace THEN t.relname::text ELSE t.oid::regclass::text END, \
      ARRAY(SELECT a.attname::text FROM unnest(x.confkey) WITH ORDINALITY AS n (at, position) \
            JOIN pg_attribute a ON a.attrelid = x.confrelid AND a.attnum = n.at ORDER BY n.position), \
      CASE x.confupdtype WHEN 'r' THEN ' ON UPDATE RESTRICT' WHEN 'c' THEN ' ON UPDATE CASCADE' ELSE '' END, \
      CASE x.confdeltype WHEN 'r' THEN ' ON DELETE RESTRICT' WHEN 'c' THEN ' ON DELETE CASCADE' \
        WHEN 'n' THEN ' ON DELETE SET NULL' WHEN 'd' THEN ' ON DELETE SET DEFAULT' ELSE '' END || \
      CASE WHEN x.confdeltype IN ('n', 'd') THEN ' (' || (SELECT pg_catalog.string_agg(\
          pg_catalog.quote_ident(a.attname), ', ') FROM pg_attribute a WHERE a.attrelid = x.conrelid AND a.attnum = \
          ANY (coalesce((SELECT pg_catalog.array_agg(e::int2) FROM pg_catalog.jsonb_array_elements_text(\
            nullif(to_jsonb(x) -> 'confdelsetcols', 'null')) e), x.conkey))) || ')' ELSE '' END, \
      CASE WHEN x.condeferrable THEN ' DEFERRABLE INITIALLY ' || CASE WHEN x.condeferred THEN 'DEFERRED' \
        ELSE 'IMMEDIATE' END ELSE '' END \
    FROM pg_constraint x JOIN pg_class t ON t.oid = x.confrelid \
    WHERE x.conrelid = $1 AND x.contype = 'f' ORDER BY x.conname";

/// The tables of schema `public`, as the catalogs describe them; no code of theirs is run.
async fn inspect(transaction: &Transaction<'_>, only: &[String]) -> Result<Vec<Table>, PgError> {
    let doing = failed("look at the tables");
    let mut tables = Vec::new();
    for row in transaction.query(TABLES, &[&TENANT_COLUMN, &POLICY, &only]).await.map_err(&doing)? {
        let oid: u32 = row.get(0);
        let name: String = row.get(1);
        let mut obstacles: Vec<String> = row.get(7);
        let plain: bool = row.get(8);
        if !plain && obstacles.is_empty() {
            obstacles.push("is not a plain table".to_owned());
        }
        let has_rows = if plain {
            let sql = format!("SELECT EXISTS (SELECT FROM public.{})", crate::tenant::sql::Ident(&name));
            transaction.query_one(&sql, &[]).await.map_err(&doing)?.get(0)
        } else {
            false
        };
        let keys = transaction.query(KEYS, &[&oid]).await.map_err(&doing)?;
        let references = transaction.query(REFERENCES, &[&oid]).await.map_err(&doing)?;
        tables.push(Table {
            name,
            columns: row.get(2),
            tenant_column: row.get(3),
            has_rows,
            converted: row.get(4),
            sequences: row.get(5),
            grantees: row.get(6),
            obstacles,
            keys: keys
                .iter()
                .map(|key| Key {
                    name: key.get(0),
                    kind: match key.get(1) {
                        "p" => KeyKind::Primary,
                        "u" => KeyKind::Unique,
                        _ => KeyKind::Index,
                    },
                    columns: key.get(2),
                    deferrable: key.get(3),
                })
                .collect(),
            references: references
                .iter()
                .map(|reference| Reference {
                    name: reference.get(0),
                    columns: reference.get(1),
                    table: reference.get(2),
                    target: reference.get(3),
                    on_update: reference.get(4),
                    on_delete: reference.get(5),
                    deferrable: reference.get(6),
                })
                .collect(),
        });
    }
    Ok(tables)
}
