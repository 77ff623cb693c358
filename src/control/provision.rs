//! Making a tenant: row `creating` in the catalog, one transaction on the shard, row `active`.
//!
//! Invariants:
//! - A tenant's place exists whole or not at all: role, schema and template are one transaction.
//! - A tenant is visible (`active`) only after that transaction has committed.
//! - Whoever is killed halfway leaves a row `creating` and at most a whole place; the next attempt, of any proxy,
//!   takes over. Attempts for one tenant follow one another by an advisory lock on its shard, and each writes its own
//!   number into the row after it got the lock, so that one that failed takes back only what is still its own.

use std::collections::HashMap;
use std::sync::Arc;

use futures_util::TryStreamExt as _;
use parking_lot::Mutex;
use serde_json::json;
use tokio::sync::watch;
use tokio_postgres::Transaction;

use super::admin::{Admin, failed, refused};
use super::records::TenantRecord;
use super::{Control, records, template};
use crate::error::{PgError, sqlstate};
use crate::tenant::credential::{self, Verifier};
use crate::tenant::plan::{GROUP, Limits, OWNER};
use crate::tenant::sql::Ident;
use crate::tenant::{Plan, Status, TenantId};

/// How a tenant came to be wanted.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Wanted {
    /// A client connected: a deleted tenant does not come back this way.
    ByConnecting,
    /// The operator asked, on this shard or where the ring says. Makes a deleted tenant anew, empty.
    ByOperator(Option<String>),
}

type Outcome = Option<Result<(), PgError>>;

/// Creations under way in this proxy, so that many clients wait for one.
#[derive(Default)]
pub(super) struct Flights(Mutex<HashMap<(TenantId, Wanted), watch::Receiver<Outcome>>>);

/// Attempts that found the row changed under them before giving up.
const MAX_ROUNDS: usize = 10;

/// An attempt that failed.
struct BuildError {
    error: PgError,
    left: Left,
}

/// What a failed attempt left on the shard.
#[derive(PartialEq, Eq)]
enum Left {
    Nothing,
    /// A whole place, perhaps: the row must stay, so that the next attempt finds it.
    Perhaps,
}

impl From<PgError> for BuildError {
    fn from(error: PgError) -> Self {
        Self { error, left: Left::Nothing }
    }
}

impl BuildError {
    fn perhaps(error: PgError) -> Self {
        Self { error, left: Left::Perhaps }
    }
}

/// What one look at the catalog said.
enum Claim {
    Ready,
    Make(Box<TenantRecord>),
    LookAgain,
}

impl Control {
    /// Makes the tenant unless it exists. Everyone who wants it now waits for the same attempt, which goes on when
    /// they leave.
    ///
    /// # Errors
    /// What the client or operator is told.
    pub async fn make(self: &Arc<Self>, id: &TenantId, who: &str, wanted: Wanted) -> Result<(), PgError> {
        let mut outcome = self.join_flight(id, who, wanted);
        match outcome.wait_for(Option::is_some).await {
            Ok(done) => done.clone().unwrap_or(Ok(())),
            Err(_) => Err(PgError::fatal(sqlstate::CANNOT_CONNECT_NOW, "the proxy is shutting down")),
        }
    }

    fn join_flight(self: &Arc<Self>, id: &TenantId, who: &str, wanted: Wanted) -> watch::Receiver<Outcome> {
        let key = (id.clone(), wanted);
        let mut flights = self.flights.0.lock();
        // One whose task died without an outcome is not waited for.
        if let Some(flight) = flights.get(&key).filter(|flight| flight.has_changed().is_ok()) {
            return flight.clone();
        }
        let (sender, receiver) = watch::channel(None);
        flights.insert(key.clone(), receiver.clone());
        let (control, who) = (self.clone(), who.to_owned());
        self.tasks.spawn(async move {
            let limit = control.config.provision.provision_timeout;
            let made =
                tokio::time::timeout(limit, control.make_once(&key.0, &who, &key.1)).await.unwrap_or_else(|_| {
                    Err(PgError::fatal(
                        sqlstate::CANNOT_CONNECT_NOW,
                        format!("tenant \"{}\" was not ready in time", key.0),
                    )
                    .hint("Its creation is taken up again by the next connection."))
                });
            if let Err(error) = &made {
                tracing::warn!(tenant = %key.0, %error, "cannot make the tenant");
            }
            control.flights.0.lock().remove(&key);
            sender.send_replace(Some(made));
        });
        receiver
    }

    async fn make_once(&self, id: &TenantId, who: &str, wanted: &Wanted) -> Result<(), PgError> {
        for _ in 0..MAX_ROUNDS {
            match self.claim(id, wanted).await? {
                Claim::Ready => return Ok(()),
                Claim::LookAgain => {}
                Claim::Make(record) => {
                    let attempt = rand::random();
                    match self.build(id, &record, attempt, who).await {
                        Ok(true) => return Ok(()),
                        Ok(false) => {}
                        Err(BuildError { error, left }) => {
                            if left == Left::Nothing {
                                self.take_back(id, attempt, who, &error).await;
                            }
                            return Err(error);
                        }
                    }
                }
            }
        }
        Err(PgError::fatal(sqlstate::CANNOT_CONNECT_NOW, format!("tenant \"{id}\" is changed by others all the time")))
    }

    /// Looks at the row, and makes one if there is none.
    async fn claim(&self, id: &TenantId, wanted: &Wanted) -> Result<Claim, PgError> {
        let catalog = self.catalog().await?;
        let record = TenantRecord::find(&*catalog, id).await?;
        let claim = match record {
            None => self.insert_row(&catalog, id, wanted).await?,
            Some(record) => match (record.status(), wanted) {
                (Some(Status::Active | Status::Suspended), _) => Claim::Ready,
                (Some(Status::Creating), _) => Claim::Make(Box::new(record)),
                (Some(Status::Deleted), Wanted::ByOperator(_)) => self.insert_row(&catalog, id, wanted).await?,
                (Some(Status::Deleted), Wanted::ByConnecting) => {
                    return Err(PgError::fatal(
                        sqlstate::NOT_IN_PREREQUISITE_STATE,
                        format!("tenant \"{id}\" has been deleted"),
                    )
                    .detail("A deleted tenant does not come back by connecting to it.")
                    .hint("Ask the operator to create it again."));
                }
                (Some(Status::Deleting), _) => {
                    return Err(PgError::fatal(
                        sqlstate::NOT_IN_PREREQUISITE_STATE,
                        format!("tenant \"{id}\" is being deleted"),
                    )
                    .hint("Try again when that is done."));
                }
                (None, _) => {
                    return Err(PgError::fatal(
                        sqlstate::INTERNAL,
                        format!("tenant \"{id}\" has status \"{}\", which this pgusher does not know", record.status),
                    ));
                }
            },
        };
        catalog.give_back().await;
        Ok(claim)
    }

    /// Places the tenant and writes its row; a deleted one's row is written over.
    async fn insert_row(&self, catalog: &Admin, id: &TenantId, wanted: &Wanted) -> Result<Claim, PgError> {
        let shard = match wanted {
            Wanted::ByOperator(Some(name)) => self
                .directory
                .shard(name)
                .ok_or_else(|| PgError::fatal(sqlstate::UNKNOWN_DATABASE, format!("there is no shard \"{name}\"")))?,
            _ => self.directory.place(id).ok_or_else(|| {
                PgError::fatal(sqlstate::NOT_IN_PREREQUISITE_STATE, "no shard takes new tenants")
                    .hint("Add a shard, or give one a weight greater than 0.")
            })?,
        };
        let plan = self.config.provision.plan;
        let (schema, role) = (plan.schema(id), plan.role(id));
        let sql = "INSERT INTO pgusher.tenants AS t (id, plan, shard, database, schema, role, status) \
                   VALUES ($1, $2, $3, $4, $5, $6, 'creating') ON CONFLICT (id) DO UPDATE SET plan = EXCLUDED.plan, \
                   shard = EXCLUDED.shard, database = EXCLUDED.database, schema = EXCLUDED.schema, \
                   role = EXCLUDED.role, status = 'creating', epoch = t.epoch + 1, attempt = NULL \
                   WHERE t.status = 'deleted'";
        catalog
            .execute(sql, &[&id.as_str(), &plan.as_str(), &shard.name, &shard.database, &schema, &role])
            .await
            .map_err(failed("write the tenant into the catalog"))?;
        Ok(Claim::LookAgain)
    }

    /// Makes the place and activates the tenant; `false` if the row turned out to be somebody else's by now.
    async fn build(&self, id: &TenantId, record: &TenantRecord, attempt: i64, who: &str) -> Result<bool, BuildError> {
        let plan = known_plan(record)?;
        let template = self.load_template().await?;
        let (server, client) = self.verifiers(id, &record.role).await?;
        self.ensure_setup(&record.shard, &record.database).await?;

        let mut shard = self.shard_pool(&record.shard, &record.database)?.checkout().await?;
        let doing = failed("make the tenant's place");
        let transaction = shard.transaction().await.map_err(&doing)?;
        lock_tenant(&transaction, id, "pg_advisory_xact_lock").await?;
        if !self.take_over(id, record, attempt).await? {
            return Ok(false);
        }
        let place = Place::look(&transaction, &record.role, &record.schema).await?;
        let fill = place.wants_template(id, &record.shard)?;
        let left = |error| if fill { BuildError::from(error) } else { BuildError::perhaps(error) };
        let limits = Limits { connections: self.config.provision.role_connection_limit };
        for statement in plan.provision(id, &server.to_text(), limits) {
            transaction.batch_execute(&statement).await.map_err(&doing).map_err(left)?;
        }
        if fill {
            run_template(&transaction, id, plan, &template).await?;
        }
        transaction.commit().await.map_err(&doing).map_err(BuildError::perhaps)?;
        shard.give_back().await;
        self.activate(id, &client, who).await.map_err(BuildError::perhaps)
    }

    async fn load_template(&self) -> Result<Vec<template::File>, PgError> {
        let Some(dir) = self.config.provision.template_dir.clone() else { return Ok(Vec::new()) };
        tokio::task::spawn_blocking(move || template::load(&dir))
            .await
            .unwrap_or_else(|_| Err(PgError::fatal(sqlstate::INTERNAL, "cannot read the template")))
    }

    /// Verifiers for the server's role and for the tenant's own login; PBKDF2 takes its time, so not on this thread.
    async fn verifiers(&self, id: &TenantId, role: &str) -> Result<(Verifier, Verifier), PgError> {
        let (config, id, role) = (self.config.clone(), id.clone(), role.to_owned());
        let work = move || {
            let secret = config.provision.master_secret.expose();
            let server = Verifier::random(&credential::server_password(secret, &role));
            (server, Verifier::random(&credential::client_password(secret, id.as_str())))
        };
        tokio::task::spawn_blocking(work)
            .await
            .map_err(|_| PgError::fatal(sqlstate::INTERNAL, "cannot make a verifier"))
    }

    /// Under the tenant's lock: this attempt is now the one, unless the row has changed.
    async fn take_over(&self, id: &TenantId, record: &TenantRecord, attempt: i64) -> Result<bool, PgError> {
        let catalog = self.catalog().await?;
        let sql = "UPDATE pgusher.tenants SET attempt = $2 WHERE id = $1 AND status = 'creating' AND shard = $3 \
                   AND database = $4 AND epoch = $5";
        let taken = catalog
            .execute(sql, &[&id.as_str(), &attempt, &record.shard, &record.database, &record.epoch])
            .await
            .map_err(failed("write the tenant into the catalog"))?;
        catalog.give_back().await;
        Ok(taken == 1)
    }

    async fn activate(&self, id: &TenantId, verifier: &Verifier, who: &str) -> Result<bool, PgError> {
        let mut catalog = self.catalog().await?;
        let doing = failed("activate the tenant in the catalog");
        let transaction = catalog.transaction().await.map_err(&doing)?;
        let sql = "UPDATE pgusher.tenants SET status = 'active', epoch = epoch + 1, attempt = NULL, deleted_at = NULL \
                   WHERE id = $1 AND status = 'creating' RETURNING shard";
        let Some(row) = transaction.query_opt(sql, &[&id.as_str()]).await.map_err(&doing)? else {
            // Another attempt was faster, or it is being deleted: the row says which.
            return Ok(false);
        };
        // An application user of the same name keeps its credential.
        let sql = "INSERT INTO pgusher.credentials AS c (name, kind, tenant, verifier) VALUES ($1, 'tenant', $1, $2) \
                   ON CONFLICT (name) DO UPDATE SET verifier = EXCLUDED.verifier WHERE c.kind = 'tenant'";
        transaction.execute(sql, &[&id.as_str(), &verifier.to_text()]).await.map_err(&doing)?;
        let shard: String = row.get(0);
        let detail = json!({ "shard": shard });
        records::event(&transaction, who, "tenant created", Some(id), &detail).await?;
        transaction.commit().await.map_err(&doing)?;
        self.audit_change(who, "tenant created", Some(id), &detail).await;
        catalog.give_back().await;
        tracing::info!(tenant = %id, shard, who, "made the tenant");
        Ok(true)
    }

    /// After a failed attempt: the row goes, if it is still this attempt's. A row that was a tombstone is one again.
    async fn take_back(&self, id: &TenantId, attempt: i64, who: &str, error: &PgError) {
        let undo = async {
            let catalog = self.catalog().await?;
            let doing = failed("take the tenant back from the catalog");
            // `attempt` is null while nobody has got the lock: then nobody has made anything either.
            let mine = "id = $1 AND status = 'creating' AND (attempt = $2 OR attempt IS NULL)";
            let restore =
                format!("UPDATE pgusher.tenants SET status = 'deleted' WHERE {mine} AND deleted_at IS NOT NULL");
            let remove = format!("DELETE FROM pgusher.tenants WHERE {mine} AND deleted_at IS NULL");
            let restored = catalog.execute(&restore, &[&id.as_str(), &attempt]).await.map_err(&doing)?;
            let removed = catalog.execute(&remove, &[&id.as_str(), &attempt]).await.map_err(&doing)?;
            if restored + removed > 0 {
                let detail = json!({ "code": error.code, "message": error.message });
                records::event(&*catalog, who, "tenant creation failed", Some(id), &detail).await?;
                self.audit_change(who, "tenant creation failed", Some(id), &detail).await;
            }
            catalog.give_back().await;
            Ok::<(), PgError>(())
        };
        if let Err(error) = undo.await {
            tracing::warn!(tenant = %id, %error, "a row of a tenant that could not be made stays until it is wanted again");
        }
    }
}

/// The plan in the row; a newer pgusher may know more of them.
pub(super) fn known_plan(record: &TenantRecord) -> Result<Plan, PgError> {
    record.plan().ok_or_else(|| {
        let message =
            format!("tenant \"{}\" has plan \"{}\", which this pgusher does not know", record.id, record.plan);
        PgError::fatal(sqlstate::INTERNAL, message)
    })
}

/// Waits for the tenant's lock on its shard: `pg_advisory_xact_lock` or `pg_advisory_lock`. Taken with the original
/// functions; tenants reach only the shim's, whose keys are other hashes.
pub(super) async fn lock_tenant(
    client: &impl tokio_postgres::GenericClient,
    id: &TenantId,
    function: &str,
) -> Result<(), PgError> {
    let sql = format!("SELECT pg_catalog.{function}(pg_catalog.hashtextextended('pgusher tenant ' || $1, 0))");
    client.execute(&sql, &[&id.as_str()]).await.map_err(failed("wait for the tenant's lock"))?;
    Ok(())
}

/// What is on the shard under the tenant's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    role: Found,
    schema: Found,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    Nothing,
    /// Made by pgusher, for a tenant.
    Ours,
    /// Somebody else's; never touched.
    Foreign,
}

impl Place {
    pub(super) async fn look(
        client: &impl tokio_postgres::GenericClient,
        role: &str,
        schema: &str,
    ) -> Result<Self, PgError> {
        let sql = "SELECT (SELECT NOT (r.rolsuper OR r.rolcreaterole OR r.rolreplication OR r.rolbypassrls) \
                     AND EXISTS (SELECT FROM pg_auth_members m JOIN pg_roles g ON g.oid = m.roleid \
                                 WHERE m.member = r.oid AND g.rolname = $3) FROM pg_roles r WHERE r.rolname = $1), \
                   (SELECT pg_get_userbyid(n.nspowner) = $4 FROM pg_namespace n WHERE n.nspname = $2)";
        let row = client
            .query_one(sql, &[&role, &schema, &GROUP, &OWNER])
            .await
            .map_err(failed("look at the tenant's place"))?;
        let found = |ours: Option<bool>| match ours {
            None => Found::Nothing,
            Some(true) => Found::Ours,
            Some(false) => Found::Foreign,
        };
        Ok(Self { role: found(row.get(0)), schema: found(row.get(1)) })
    }

    /// Whether the template is to be run, or an error if the names are taken.
    fn wants_template(self, id: &TenantId, shard: &str) -> Result<bool, PgError> {
        let taken = |what: &str| {
            PgError::fatal(
                sqlstate::NOT_IN_PREREQUISITE_STATE,
                format!("shard \"{shard}\" has a {what} \"{id}\" that is not a tenant's"),
            )
            .hint("Choose another id for the tenant, or remove it from the shard.")
        };
        match (self.role, self.schema) {
            (Found::Foreign, _) => Err(taken("role")),
            (_, Found::Foreign) => Err(taken("schema")),
            // An attempt got that far and could not say so: its transaction was whole, so is the place.
            (Found::Ours, Found::Ours) => Ok(false),
            // A schema alone may hold what a tenant of this name left behind; it is not given to a new one.
            (Found::Nothing, Found::Ours) => Err(taken("schema")),
            (Found::Ours | Found::Nothing, Found::Nothing) => Ok(true),
        }
    }

    /// Whether somebody else owns the role or the schema.
    pub(super) fn is_foreign(self) -> bool {
        self.role == Found::Foreign || self.schema == Found::Foreign
    }

    /// Whether the tenant's role is there.
    pub(super) fn has_role(self) -> bool {
        self.role == Found::Ours
    }
}

/// Runs the template as the tenant, within the transaction that makes its place.
///
/// The session belongs to the administrator and only takes the tenant's authorization, which code of a tenant could
/// undo. That is acceptable here and nowhere else: the schema is brand new and invisible to others, so nothing that a
/// tenant wrote can run; the files are the operator's own. A login of the tenant's could not see the transaction.
async fn run_template(
    transaction: &Transaction<'_>,
    id: &TenantId,
    plan: Plan,
    files: &[template::File],
) -> Result<(), PgError> {
    let doing = failed("run the template");
    let started = transaction_id(transaction).await?;
    for file in files {
        // For each file anew: the one before may have set what it liked (pg_dump's empties the search_path).
        let enter = format!(
            "SET LOCAL SESSION AUTHORIZATION {}; SET LOCAL search_path = {}",
            Ident(&plan.role(id)),
            plan.search_path(id)
        );
        transaction.batch_execute(&enter).await.map_err(&doing)?;
        let mut done = 0;
        let run = async {
            let messages = transaction.client().simple_query_raw(&file.text).await?;
            let mut messages = std::pin::pin!(messages);
            while let Some(message) = messages.try_next().await? {
                if matches!(message, tokio_postgres::SimpleQueryMessage::CommandComplete(_)) {
                    done += 1;
                }
            }
            Ok::<(), tokio_postgres::Error>(())
        };
        if let Err(error) = run.await {
            return Err(match error.as_db_error() {
                Some(db) => file.failed(done, db),
                None => refused("run the template", &error),
            });
        }
        // The scanner refuses COMMIT and the like; this is for what it might have overlooked.
        if transaction_id(transaction).await? != started {
            return Err(PgError::fatal(
                sqlstate::FEATURE_NOT_SUPPORTED,
                format!("template {} ended the transaction that it runs in", file.name),
            ));
        }
    }
    // What the template deferred to the commit is run now, still as the tenant.
    transaction
        .batch_execute("SET CONSTRAINTS ALL IMMEDIATE; SET LOCAL SESSION AUTHORIZATION DEFAULT")
        .await
        .map_err(&doing)
}

async fn transaction_id(transaction: &Transaction<'_>) -> Result<Option<String>, PgError> {
    let sql = "SELECT pg_catalog.pg_current_xact_id_if_assigned()::pg_catalog.text";
    let row = transaction.query_one(sql, &[]).await.map_err(failed("run the template"))?;
    Ok(row.get(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_taken_are_never_taken_over() {
        use Found::{Foreign, Nothing, Ours};
        let id = TenantId::parse("t").unwrap();
        for (role, schema, expected) in [
            (Nothing, Nothing, Some(true)),
            (Ours, Nothing, Some(true)),
            (Ours, Ours, Some(false)),
            (Nothing, Ours, None),
            (Foreign, Nothing, None),
            (Foreign, Ours, None),
            (Ours, Foreign, None),
        ] {
            assert_eq!(Place { role, schema }.wants_template(&id, "s").ok(), expected, "{role:?} {schema:?}");
        }
    }
}
