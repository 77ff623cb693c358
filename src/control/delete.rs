//! Deleting a tenant: sessions end, objects go in batches, then what is left of place and role; a tombstone remains.
//!
//! Every step can be run again, so a deletion that was interrupted is taken up by the janitor or by asking again.
//! Dropping runs no code of the tenant's (event triggers are for superusers), so the administrator may do it.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokio_postgres::error::SqlState;

use super::admin::{Admin, failed};
use super::provision::{Place, known_plan, lock_tenant, run_step};
use super::records::TenantRecord;
use super::{Control, records};
use crate::error::{PgError, sqlstate};
use crate::tenant::plan::Home;
use crate::tenant::sql::Ident;
use crate::tenant::{Plan, Status, TenantId};

/// Objects dropped in one transaction. Each table takes a handful of locks (indexes, TOAST, sequences), and a server
/// has some 64 per connection slot for everyone.
const BATCH: i64 = 64;

/// How long the last sessions of the tenant's role have to end.
const TERMINATE_TIMEOUT: Duration = Duration::from_secs(10);

impl Control {
    /// Deletes the tenant and returns its tombstone. Goes on when whoever asked has left.
    ///
    /// # Errors
    /// `3D000` if there is no such tenant, else what a server said; the tenant then stays `deleting` and is taken up
    /// again.
    pub async fn delete(self: &Arc<Self>, id: &TenantId, who: &str) -> Result<TenantRecord, PgError> {
        let (control, id, who) = (self.clone(), id.clone(), who.to_owned());
        let work = self.tasks.spawn(async move { control.delete_now(&id, &who).await });
        work.await.unwrap_or_else(|_| Err(PgError::fatal(sqlstate::INTERNAL, "the deletion was broken off")))
    }

    async fn delete_now(&self, id: &TenantId, who: &str) -> Result<TenantRecord, PgError> {
        let record = self.mark_deleting(id, who).await?;
        if record.status() == Some(Status::Deleted) {
            return Ok(record);
        }
        // Every proxy hears of it; this one at once.
        self.sync().await;
        self.traffic.close_tenant(id, super::closing(id, crate::directory::catalog::Change::Gone));
        let plan = known_plan(&record)?;
        self.drop_place(id, &record, plan).await?;
        self.bury(id, who).await?;
        self.sync().await;
        tracing::info!(tenant = %id, shard = record.shard, who, "deleted the tenant");
        self.show(id).await
    }

    async fn mark_deleting(&self, id: &TenantId, who: &str) -> Result<TenantRecord, PgError> {
        let catalog = self.catalog().await?;
        let sql = "UPDATE pgusher.tenants SET status = 'deleting', epoch = epoch + 1, attempt = NULL \
                   WHERE id = $1 AND status NOT IN ('deleting', 'deleted')";
        let marked = catalog.execute(sql, &[&id.as_str()]).await.map_err(failed("mark the tenant as being deleted"))?;
        if marked == 1 {
            records::event(&*catalog, who, "tenant deletion began", Some(id), &json!({})).await?;
            self.audit_change(who, "tenant deletion began", Some(id), &json!({})).await;
        }
        let record = TenantRecord::find(&*catalog, id).await?;
        catalog.give_back().await;
        record.ok_or_else(|| super::tenants::unknown(id))
    }

    async fn drop_place(&self, id: &TenantId, record: &TenantRecord, plan: Plan) -> Result<(), PgError> {
        if !record.managed {
            return Ok(());
        }
        let home = record.home(id);
        let meeting = self.shard_pool(&record.shard, plan.meeting(&home))?.checkout().await?;
        // Waits for an attempt to make it that is still under way.
        lock_tenant(&*meeting, id, "pg_advisory_lock").await?;
        self.remove_place(&meeting, &home, &record.shard, plan).await?;
        meeting.give_back().await;
        Ok(())
    }

    /// Removes a place, whole or not, under the tenant's lock, which `meeting` holds.
    pub(super) async fn remove_place(
        &self,
        meeting: &Admin,
        home: &Home,
        shard: &str,
        plan: Plan,
    ) -> Result<(), PgError> {
        let place = Place::look(&**meeting, plan, home).await?;
        if place.is_foreign() {
            return Err(PgError::fatal(
                sqlstate::NOT_IN_PREREQUISITE_STATE,
                format!("role, schema or database \"{}\" on shard \"{shard}\" is not a tenant's", home.id),
            ));
        }
        if place.has_role() {
            end_sessions(meeting, &home.role).await?;
        }
        let deprovision = plan.deprovision(home);
        let doing = failed("drop the tenant's place");
        if plan.meeting(home) == home.database || place.has_rest() {
            // In the tenant's database, which may be another one.
            let mut there = self.place_client(shard, &home.database).await?;
            if place.has_role() {
                roll_back_prepared(&there, &home.role).await?;
            }
            if let Some(schema) = plan.private_schema(home) {
                drop_objects(&there, schema, &home.role).await?;
            }
            let transaction = there.transaction().await.map_err(&doing)?;
            for statement in &deprovision.inside {
                transaction.batch_execute(statement).await.map_err(&doing)?;
            }
            transaction.commit().await.map_err(&doing)?;
        }
        for step in &deprovision.after {
            run_step(meeting, step).await.map_err(&doing)?;
        }
        Ok(())
    }

    async fn bury(&self, id: &TenantId, who: &str) -> Result<(), PgError> {
        let mut catalog = self.catalog().await?;
        let doing = failed("write the tombstone");
        let transaction = catalog.transaction().await.map_err(&doing)?;
        transaction
            .execute("DELETE FROM pgusher.credentials WHERE tenant = $1", &[&id.as_str()])
            .await
            .map_err(&doing)?;
        let sql = "UPDATE pgusher.tenants SET status = 'deleted', epoch = epoch + 1, deleted_at = now() \
                   WHERE id = $1 AND status = 'deleting'";
        let buried = transaction.execute(sql, &[&id.as_str()]).await.map_err(&doing)? == 1;
        if buried {
            records::event(&transaction, who, "tenant deleted", Some(id), &json!({})).await?;
        }
        transaction.commit().await.map_err(&doing)?;
        if buried {
            self.audit_change(who, "tenant deleted", Some(id), &json!({})).await;
        }
        catalog.give_back().await;
        Ok(())
    }
}

/// Lets nobody in any more as this role, and ends who is in.
async fn end_sessions(shard: &Admin, role: &str) -> Result<(), PgError> {
    let doing = failed("end the tenant's sessions");
    shard.batch_execute(&format!("ALTER ROLE {} NOLOGIN", Ident(role))).await.map_err(&doing)?;
    let until = tokio::time::Instant::now() + TERMINATE_TIMEOUT;
    loop {
        let sql = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename = $1";
        let left: i64 = shard.query_one(sql, &[&role]).await.map_err(&doing)?.get(0);
        if left == 0 {
            break;
        }
        if tokio::time::Instant::now() > until {
            return Err(PgError::fatal(
                sqlstate::CANNOT_CONNECT_NOW,
                format!("{left} sessions of the tenant do not end"),
            ));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// Prepared transactions hold locks without a session, and keep a database from being dropped.
async fn roll_back_prepared(shard: &Admin, role: &str) -> Result<(), PgError> {
    let doing = failed("roll back the tenant's prepared transactions");
    let sql = "SELECT pg_catalog.format('ROLLBACK PREPARED %L', gid) FROM pg_prepared_xacts \
               WHERE owner = $1 AND database = current_database()";
    for row in shard.query(sql, &[&role]).await.map_err(&doing)? {
        shard.batch_execute(row.get(0)).await.map_err(&doing)?;
    }
    Ok(())
}

/// Statements that drop the next few of the tenant's objects. The text comes from the server's own `format` and
/// `regprocedure`, which quote (the search_path is empty, so every name is qualified).
///
/// Partitions come before their parents and views first, so that nothing drags a thousand others along.
const NEXT_RELATIONS: &str = "\
    SELECT pg_catalog.format('DROP %s IF EXISTS %I.%I CASCADE', \
             CASE c.relkind WHEN 'v' THEN 'VIEW' WHEN 'm' THEN 'MATERIALIZED VIEW' WHEN 'f' THEN 'FOREIGN TABLE' \
                            WHEN 'S' THEN 'SEQUENCE' WHEN 'c' THEN 'TYPE' ELSE 'TABLE' END, n.nspname, c.relname) \
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
    WHERE n.nspname = $1 AND c.relkind IN ('v', 'm', 'f', 'r', 'p', 'S', 'c') \
    ORDER BY pg_catalog.array_position(ARRAY['v', 'm', 'f', 'r', 'p', 'S', 'c'], c.relkind::text), \
             NOT c.relispartition, c.oid DESC LIMIT $2";
const NEXT_ROUTINES: &str = "\
    SELECT pg_catalog.format('DROP %s IF EXISTS %s CASCADE', \
             CASE p.prokind WHEN 'a' THEN 'AGGREGATE' ELSE 'ROUTINE' END, p.oid::regprocedure) \
    FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace WHERE n.nspname = $1 ORDER BY p.oid LIMIT $2";
const NEXT_TYPES: &str = "\
    SELECT pg_catalog.format('DROP TYPE IF EXISTS %I.%I CASCADE', n.nspname, t.typname) \
    FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace \
    WHERE n.nspname = $1 AND t.typtype IN ('e', 'd', 'r') ORDER BY t.oid LIMIT $2";
const NEXT_LARGE_OBJECTS: &str = "\
    SELECT pg_catalog.format('SELECT pg_catalog.lo_unlink(%s)', m.oid) FROM pg_largeobject_metadata m \
    WHERE pg_catalog.pg_get_userbyid(m.lomowner) = $1 ORDER BY m.oid LIMIT $2";

async fn drop_objects(shard: &Admin, schema: &str, role: &str) -> Result<(), PgError> {
    for (next, name) in
        [(NEXT_RELATIONS, schema), (NEXT_ROUTINES, schema), (NEXT_TYPES, schema), (NEXT_LARGE_OBJECTS, role)]
    {
        let mut batch = BATCH;
        loop {
            let rows = shard.query(next, &[&name, &batch]).await.map_err(failed("list the tenant's objects"))?;
            if rows.is_empty() {
                break;
            }
            let statements: Vec<&str> = rows.iter().map(|row| row.get(0)).collect();
            // Several statements in one message are one transaction.
            match shard.batch_execute(&statements.join(";\n")).await {
                Ok(()) => {}
                // Out of locks (OutOfMemory: "out of shared memory"): fewer at a time.
                Err(e) if e.code() == Some(&SqlState::OUT_OF_MEMORY) && batch > 1 => batch /= 4,
                Err(e) => return Err(super::admin::refused("drop the tenant's objects", &e)),
            }
            batch = batch.max(1);
        }
    }
    Ok(())
}
