//! Making a tenant: row `creating` in the catalog, one transaction on the shard, row `active`.
//!
//! Invariants:
//! - A tenant's place is whole or is not used: the last thing that the transaction with the template in it does is to
//!   say so. What cannot be in that transaction (a database) comes before it, and goes again if it fails.
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
use super::shards::server_version;
use super::{Control, records, template};
use crate::directory::Shard;
use crate::error::{PgError, sqlstate};
use crate::tenant::credential::{self, Verifier};
use crate::tenant::plan::{Home, Limits, OWNER, Step, TemplateUse};
use crate::tenant::sql::Ident;
use crate::tenant::{Plan, Status, TenantId, rls};

/// How a tenant came to be wanted.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Wanted {
    /// A client connected: a deleted tenant does not come back this way.
    ByConnecting,
    /// The operator asked. Makes a deleted tenant anew, empty.
    ByOperator(Choice),
}

/// What the operator chose; ring and configuration choose the rest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Choice {
    /// The shard.
    pub shard: Option<String>,
    /// The plan.
    pub plan: Option<Plan>,
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

    /// Which plan and which shard a new tenant gets.
    pub(super) fn choose(&self, id: &TenantId, wanted: &Wanted) -> Result<(Plan, Arc<Shard>), PgError> {
        let none = Choice::default();
        let choice = match wanted {
            Wanted::ByOperator(choice) => choice,
            Wanted::ByConnecting => &none,
        };
        let not_now = |message: String| PgError::fatal(sqlstate::NOT_IN_PREREQUISITE_STATE, message);
        let own = self.directory.own_shard(id);
        // A shard that waits for this tenant says more than the plan of all others.
        let own_plan = Plan::ALL.into_iter().find(|plan| plan.wants_own_shard()).filter(|_| own.is_some());
        let plan = choice.plan.or(own_plan).unwrap_or(self.config.provision.plan);
        let named =
            match &choice.shard {
                Some(name) => Some(self.directory.shard(name).ok_or_else(|| {
                    PgError::fatal(sqlstate::UNKNOWN_DATABASE, format!("there is no shard \"{name}\""))
                })?),
                None => None,
            };
        let shard = if plan.wants_own_shard() {
            let own = own.ok_or_else(|| {
                not_now(format!("no shard is dedicated to tenant \"{id}\"")).hint(format!(
                    "Give a shard dedicated_to = \"{id}\", or add one: pgusher shard add … --dedicated {id}"
                ))
            })?;
            named.unwrap_or(own)
        } else {
            named.or_else(|| self.directory.place(id)).ok_or_else(|| {
                not_now("no shard takes new tenants".to_owned())
                    .hint("Add a shard, or give one a weight greater than 0.")
            })?
        };
        let fits = shard.dedicated_to.as_ref() == Some(id) && plan.wants_own_shard()
            || shard.dedicated_to.is_none() && !plan.wants_own_shard();
        if !fits {
            let whose = shard.dedicated_to.as_ref().map_or("all tenants".to_owned(), |id| format!("tenant \"{id}\""));
            let plan = plan.as_str();
            return Err(not_now(format!("shard \"{}\" is for {whose}: not for \"{id}\" with plan {plan}", shard.name)));
        }
        Ok((plan, shard))
    }

    /// Places the tenant and writes its row; a deleted one's row is written over.
    async fn insert_row(&self, catalog: &Admin, id: &TenantId, wanted: &Wanted) -> Result<Claim, PgError> {
        let (plan, shard) = self.choose(id, wanted)?;
        let mut home = plan.home(id, shard.databases());
        let known = self.config.shards.iter().find(|known| known.name == shard.name && plan.wants_own_shard());
        let given = known.and_then(|known| known.tenant_role.clone());
        let managed = given.is_none();
        if let Some(role) = given {
            home.role = role;
        }
        self.put_row(catalog, plan, &shard.name, &home, managed).await?;
        Ok(Claim::LookAgain)
    }

    /// Writes the row of a tenant that is being made, unless there is a live one.
    pub(super) async fn put_row(
        &self,
        catalog: &Admin,
        plan: Plan,
        shard: &str,
        home: &Home,
        managed: bool,
    ) -> Result<(), PgError> {
        let sql = "INSERT INTO pgusher.tenants AS t (id, plan, shard, database, schema, role, managed, status) \
                   VALUES ($1, $2, $3, $4, $5, $6, $7, 'creating') ON CONFLICT (id) DO UPDATE SET \
                   plan = EXCLUDED.plan, shard = EXCLUDED.shard, database = EXCLUDED.database, \
                   schema = EXCLUDED.schema, role = EXCLUDED.role, managed = EXCLUDED.managed, status = 'creating', \
                   epoch = t.epoch + 1, attempt = NULL WHERE t.status = 'deleted'";
        let Home { id, database, schema, role } = home;
        catalog
            .execute(sql, &[&id.as_str(), &plan.as_str(), &shard, database, schema, role, &managed])
            .await
            .map_err(failed("write the tenant into the catalog"))?;
        Ok(())
    }

    /// Makes the place and activates the tenant; `false` if the row turned out to be somebody else's by now.
    async fn build(&self, id: &TenantId, record: &TenantRecord, attempt: i64, who: &str) -> Result<bool, BuildError> {
        let plan = known_plan(record)?;
        let home = record.home(id);
        let (server, client) = self.verifiers(id, &record.role).await?;
        let known = self.directory.shard(&record.shard).ok_or_else(|| {
            PgError::fatal(sqlstate::UNKNOWN_DATABASE, format!("there is no shard \"{}\"", record.shard))
        })?;
        if record.managed {
            self.ensure_setup(&known, plan).await?;
            let meeting = self.shard_pool(&record.shard, plan.meeting(&home))?.checkout().await?;
            lock_tenant(&*meeting, id, "pg_advisory_lock").await?;
            if !self.take_over(id, record, attempt).await? {
                return Ok(false);
            }
            let meeting = self.make_place(meeting, &home, record, plan, &server).await?;
            // Gives the lock back.
            meeting.give_back().await;
        } else if !self.take_over(id, record, attempt).await? {
            return Ok(false);
        }
        self.activate(id, &client, who).await.map_err(BuildError::perhaps)
    }

    /// Makes the place unless it is whole, under the tenant's lock, which `meeting` holds.
    async fn make_place(
        &self,
        mut meeting: Admin,
        home: &Home,
        record: &TenantRecord,
        plan: Plan,
        verifier: &Verifier,
    ) -> Result<Admin, BuildError> {
        let doing = failed("make the tenant's place");
        let place = Place::look(&*meeting, plan, home).await?;
        let fill = place.wants_template(&home.id, &record.shard)?;
        let template =
            if fill && plan.template() == TemplateUse::EachTenant { self.load_template().await? } else { Vec::new() };
        let mark = self.mark(&server_version(&meeting).await?);
        let limits = Limits { connections: self.config.provision.role_connection_limit };
        let provision = plan.provision(home, &verifier.to_text(), limits, &mark);
        let work = async {
            for step in &provision.before {
                run_step(&meeting, step).await.map_err(&doing)?;
            }
            let elsewhere = plan.meeting(home) != home.database;
            let mut other = match elsewhere {
                true => Some(self.place_client(&record.shard, &home.database).await?),
                false => None,
            };
            let client = other.as_mut().unwrap_or(&mut meeting);
            let transaction = client.transaction().await.map_err(&doing)?;
            // Also here, where an attempt whose connection above was lost may still be at work.
            lock_tenant(&transaction, &home.id, "pg_advisory_xact_lock").await?;
            for statement in &provision.inside {
                transaction.batch_execute(statement).await.map_err(&doing)?;
            }
            if fill {
                let path = plan.template_path(&home.schema);
                run_template(&transaction, &home.role, &path, &template).await?;
            }
            for statement in &provision.seal {
                transaction.batch_execute(statement).await.map_err(&doing)?;
            }
            Ok::<_, PgError>(transaction.commit().await)
        };
        match work.await {
            Ok(Ok(())) => Ok(meeting),
            // Whether it was committed cannot be told.
            Ok(Err(error)) => Err(BuildError::perhaps(doing(error))),
            Err(error) if !fill => Err(BuildError::perhaps(error)),
            Err(error) if provision.before.is_empty() => Err(error.into()),
            // What was made outside the transaction goes, too.
            Err(error) => match self.remove_place(&meeting, home, &record.shard, plan).await {
                Ok(()) => Err(error.into()),
                Err(left) => {
                    tracing::warn!(tenant = %home.id, error = %left, "a place that is not whole stays for the next attempt");
                    Err(BuildError::perhaps(error))
                }
            },
        }
    }

    /// A connection as administrator of its own, besides the one that holds a lock: whoever waited here for one of the
    /// pool's could wait for others that do the same. It is not kept, since it would be in the way of a database's end.
    pub(super) async fn place_client(&self, shard: &str, database: &str) -> Result<Admin, PgError> {
        self.single(shard, database)?.checkout().await
    }

    /// Fills a database that tenants share from the template, once, as the owner of its tables.
    pub(super) async fn fill_shared(&self, shard: &str, database: &str, plan: Plan) -> Result<(), PgError> {
        const FILLED: &str = "pgusher template";
        let template = self.load_template().await?;
        let mut client = self.shard_pool(shard, database)?.checkout().await?;
        let doing = failed("fill the shared database");
        let transaction = client.transaction().await.map_err(&doing)?;
        transaction
            .execute("SELECT pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtextextended($1, 0))", &[&FILLED])
            .await
            .map_err(&doing)?;
        let sql = "SELECT obj_description(oid, 'pg_namespace') FROM pg_namespace WHERE nspname = 'public'";
        let comment: Option<String> = transaction.query_one(sql, &[]).await.map_err(&doing)?.get(0);
        if comment.as_deref() != Some(FILLED) {
            let sql =
                "SELECT EXISTS (SELECT FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r')";
            // Tables that are there are the operator's: they are taken as they are, if they are safe.
            if !transaction.query_one(sql, &[]).await.map_err(&doing)?.get::<_, bool>(0) {
                run_template(&transaction, OWNER, &plan.template_path("public"), &template).await?;
            }
            let wanted = rls::Wanted { rows_to: None, hardening: self.live().hardening };
            let left = super::shared_tables::convert_all(&transaction, &[], wanted, true).await.map_err(|error| {
                PgError { message: format!("database \"{database}\": {}", error.message), ..error }
                    .hint("See `pgusher rls convert --help`, or make the template so that its tables can be shared.")
            })?;
            tracing::info!(shard, database, statements = left.len(), "shared the tables of the template");
            let sql = format!("COMMENT ON SCHEMA public IS '{FILLED}'");
            transaction.batch_execute(&sql).await.map_err(&doing)?;
        }
        transaction.commit().await.map_err(&doing)?;
        client.give_back().await;
        Ok(())
    }

    async fn load_template(&self) -> Result<Vec<template::File>, PgError> {
        let Some(dir) = self.config.provision.template_dir.clone() else { return Ok(Vec::new()) };
        tokio::task::spawn_blocking(move || template::load(&dir))
            .await
            .unwrap_or_else(|_| Err(PgError::fatal(sqlstate::INTERNAL, "cannot read the template")))
    }

    /// Verifiers for the server's role and for the tenant's own login; PBKDF2 takes its time, so not on this thread.
    pub(super) async fn verifiers(&self, id: &TenantId, role: &str) -> Result<(Verifier, Verifier), PgError> {
        let (config, id, role) = (self.config.clone(), id.clone(), role.to_owned());
        let work = move || {
            let secret = config.provision.master_secret.expose();
            let server = Verifier::of_role(&credential::server_password(secret, &role));
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

    pub(super) async fn activate(&self, id: &TenantId, verifier: &Verifier, who: &str) -> Result<bool, PgError> {
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
    /// The schema or the database.
    rest: Found,
    /// Whether the template has been run.
    whole: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    Nothing,
    /// Made by pgusher, for a tenant.
    Ours,
    /// Somebody else's; never touched.
    Foreign,
}

/// Runs a step of a plan.
pub(super) async fn run_step(client: &tokio_postgres::Client, step: &Step) -> Result<(), tokio_postgres::Error> {
    match step {
        Step::Run(sql) => client.batch_execute(sql).await,
        Step::Each(query) => {
            for row in client.query(query, &[]).await? {
                client.batch_execute(row.get(0)).await?;
            }
            Ok(())
        }
    }
}

impl Place {
    /// Looks, in the plan's meeting database.
    pub(super) async fn look(
        client: &impl tokio_postgres::GenericClient,
        plan: Plan,
        home: &Home,
    ) -> Result<Self, PgError> {
        let row = client.query_one(&plan.look(home), &[]).await.map_err(failed("look at the tenant's place"))?;
        let found = |ours: Option<bool>| match ours {
            None => Found::Nothing,
            Some(true) => Found::Ours,
            Some(false) => Found::Foreign,
        };
        Ok(Self { role: found(row.get(0)), rest: found(row.get(1)), whole: row.get(2) })
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
        match (self.role, self.rest) {
            (Found::Foreign, _) => Err(taken("role")),
            (_, Found::Foreign) => Err(taken("schema or database")),
            // An attempt got that far and could not say so.
            (Found::Ours, Found::Ours) => Ok(!self.whole),
            // A schema alone may hold what a tenant of this name left behind; it is not given to a new one.
            (Found::Nothing, Found::Ours) => Err(taken("schema or database")),
            (Found::Ours | Found::Nothing, Found::Nothing) => Ok(true),
        }
    }

    /// Whether somebody else owns the role or the rest.
    pub(super) fn is_foreign(self) -> bool {
        self.role == Found::Foreign || self.rest == Found::Foreign
    }

    /// Whether the tenant's schema or database is there.
    pub(super) fn has_rest(self) -> bool {
        self.rest == Found::Ours
    }

    /// Whether the tenant's role is there.
    pub(super) fn has_role(self) -> bool {
        self.role == Found::Ours
    }
}

/// Runs the template as the tenant, within the transaction that makes its place.
///
/// The session belongs to the administrator and only takes the role's authorization, which code of a tenant could
/// undo. That is acceptable here and nowhere else: the place is brand new and invisible to others, so nothing that a
/// tenant wrote can run; the files are the operator's own. A login of the tenant's could not see the transaction.
async fn run_template(
    transaction: &Transaction<'_>,
    role: &str,
    path: &str,
    files: &[template::File],
) -> Result<(), PgError> {
    let doing = failed("run the template");
    // Nothing may have been written yet: then this is what gives the transaction its number.
    transaction.execute("SELECT pg_catalog.pg_current_xact_id()", &[]).await.map_err(&doing)?;
    let started = transaction_id(transaction).await?;
    for file in files {
        // For each file anew: the one before may have set what it liked (pg_dump's empties the search_path).
        let enter = format!("SET LOCAL SESSION AUTHORIZATION {}; SET LOCAL search_path = {path}", Ident(role));
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
        for (role, rest, expected) in [
            (Nothing, Nothing, Some(true)),
            (Ours, Nothing, Some(true)),
            (Ours, Ours, Some(false)),
            (Nothing, Ours, None),
            (Foreign, Nothing, None),
            (Foreign, Ours, None),
            (Ours, Foreign, None),
        ] {
            let place = Place { role, rest, whole: true };
            assert_eq!(place.wants_template(&id, "s").ok(), expected, "{role:?} {rest:?}");
            let half = Place { role, rest, whole: false };
            assert_eq!(half.wants_template(&id, "s").ok(), expected.map(|_| true), "{role:?} {rest:?}");
        }
    }
}
