//! Taking in a schema or a database that was there before pgusher, as a tenant's place.

use serde::Serialize;
use serde_json::json;

use super::Control;
use super::admin::failed;
use super::provision::{Choice, Wanted, lock_tenant};
use super::records::{self, TenantRecord};
use super::shards::server_version;
use crate::error::{PgError, sqlstate};
use crate::tenant::adopt::{self, Finding, Weight};
use crate::tenant::plan::{Limits, Step};
use crate::tenant::{Plan, TenantId};

/// What `pgusher tenant adopt` is told.
#[derive(Debug, Clone)]
pub struct Adoption {
    /// The tenant that it becomes.
    pub id: TenantId,
    /// Its plan.
    pub plan: Plan,
    /// The shard.
    pub shard: String,
    /// The schema; what the plan says if absent.
    pub schema: Option<String>,
    /// The database; what the plan says if absent.
    pub database: Option<String>,
    /// The role; the tenant's name if absent.
    pub role: Option<String>,
    /// Whether to repair what is found.
    pub fix: bool,
}

/// What was found, and what came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Adopted {
    /// What contradicts the plan.
    pub findings: Vec<Finding>,
    /// What makes it a tenant's place, in one transaction; passwords are left out.
    pub sql: Vec<String>,
    /// Whether it is a tenant's now.
    pub adopted: bool,
}

impl Control {
    /// Looks at what is there, and if nothing contradicts the plan, or `fix` repairs it, makes it a tenant's.
    ///
    /// # Errors
    /// What the server or the catalog said; `55000` if the names belong to a tenant.
    pub async fn adopt(&self, adoption: &Adoption, who: &str) -> Result<Adopted, PgError> {
        let Adoption { id, plan, .. } = adoption;
        super::not_a_canary(id)?;
        let not_now = |message: String| PgError::error(sqlstate::NOT_IN_PREREQUISITE_STATE, message);
        if !adopt::is_possible(*plan) {
            return Err(not_now(format!("a tenant of plan \"{}\" cannot be adopted", plan.as_str()))
                .hint("For shared tables there is `pgusher rls convert`, for a whole shard tenant_role."));
        }
        let choice = Choice { shard: Some(adoption.shard.clone()), plan: Some(*plan) };
        let (_, shard) = self.choose(id, &Wanted::ByOperator(choice))?;
        let mut home = plan.home(id, shard.databases());
        for (name, given) in [
            (&mut home.schema, &adoption.schema),
            (&mut home.database, &adoption.database),
            (&mut home.role, &adoption.role),
        ] {
            if let Some(given) = given {
                name.clone_from(given);
            }
        }
        if *plan == Plan::Database
            && [&shard.database, &shard.rls_database, &self.config.catalog.database].contains(&&home.database)
        {
            return Err(not_now(format!("database \"{}\" is not one of a tenant", home.database)));
        }
        let planned = plan.home(id, shard.databases()).database;
        if plan.private_schema(&home).is_some() && home.database != planned {
            return Err(not_now(format!(
                "schemas of tenants are in database \"{planned}\" of shard \"{}\"",
                shard.name
            ))
            .hint("Add a shard for the other database, or adopt it whole: --plan database."));
        }
        self.check_names(id, &home, &shard.name).await?;
        if adoption.fix {
            self.ensure_setup(&shard, *plan).await?;
        }
        let mut client = self.single(&shard.name, &home.database)?.checkout().await?;
        let doing = failed("adopt the place");
        let transaction = client.transaction().await.map_err(&doing)?;
        lock_tenant(&transaction, id, "pg_advisory_xact_lock").await?;
        let there = "SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = $1)";
        if !transaction.query_one(there, &[&home.schema]).await.map_err(&doing)?.get::<_, bool>(0) {
            return Err(not_now(format!("there is no schema \"{}\" in database \"{}\"", home.schema, home.database)));
        }
        let mut findings = Vec::new();
        for query in adopt::queries(*plan, &home) {
            for row in transaction.query(&query, &[]).await.map_err(&doing)? {
                findings.push(Finding::new(row.get(0), row.get(1), row.get(2)));
            }
        }
        let (server, verifier) = self.verifiers(id, &home.role).await?;
        let mark = self.mark(&server_version(transaction.client()).await?);
        let limits = Limits { connections: self.config.provision.role_connection_limit };
        let provision = plan.provision(&home, &server.to_text(), limits, &mark);
        // The role first: what is found is given to it. Its attributes are set with its password.
        let role = adopt_role(&provision.before, &provision.inside);
        let rest = provision.inside.iter().filter(|sql| !role.contains(*sql)).chain(&provision.seal);
        let fixes = findings.iter().filter_map(|finding| finding.sql.clone());
        let mut sql: Vec<String> = role.iter().cloned().chain(fixes).chain(rest.cloned()).collect();
        if plan.setup(shard.databases(), self.live().hardening).is_some_and(|s| s.outdated.is_some()) {
            sql.push(Plan::harden(&home.database, id.as_str(), self.live().hardening, &mark));
        }
        let blocked = findings.iter().any(|finding| finding.weight == Weight::Blocks);
        let contradicts = findings.iter().any(|finding| finding.weight != Weight::Note);
        let shown = |sql: &[String]| sql.iter().map(|one| one.replace(&server.to_text(), "***")).collect();
        if blocked || (contradicts && !adoption.fix) {
            return Ok(Adopted { findings, sql: shown(&sql), adopted: false });
        }
        if !adoption.fix {
            self.ensure_setup(&shard, *plan).await?;
        }
        for statement in &sql {
            transaction.batch_execute(statement).await.map_err(&doing)?;
        }
        transaction.commit().await.map_err(&doing)?;
        drop(client);
        let record = self.register(id, *plan, &shard.name, &home).await?;
        self.activate(id, &verifier, who).await?;
        let catalog = self.catalog().await?;
        let detail = json!({ "shard": record.shard, "database": record.database, "schema": record.schema,
                             "role": record.role, "repaired": findings.len() });
        records::event(&*catalog, who, "tenant adopted", Some(id), &detail).await?;
        catalog.give_back().await;
        self.sync().await;
        Ok(Adopted { findings, sql: shown(&sql), adopted: true })
    }

    /// No tenant has this name or this place.
    async fn check_names(&self, id: &TenantId, home: &crate::tenant::plan::Home, shard: &str) -> Result<(), PgError> {
        let catalog = self.catalog().await?;
        let sql = "SELECT id FROM pgusher.tenants WHERE status <> 'deleted' AND (id = $1 OR shard = $2 \
                   AND (role = $3 OR (database = $4 AND schema = $5))) LIMIT 1";
        let parameters: &[&(dyn tokio_postgres::types::ToSql + Sync)] =
            &[&id.as_str(), &shard, &home.role, &home.database, &home.schema];
        let taken = catalog.query_opt(sql, parameters).await.map_err(failed("read the catalog"))?;
        catalog.give_back().await;
        match taken {
            Some(row) => Err(PgError::error(
                sqlstate::NOT_IN_PREREQUISITE_STATE,
                format!("name, role or place is that of tenant \"{}\"", row.get::<_, &str>(0)),
            )),
            None => Ok(()),
        }
    }

    async fn register(
        &self,
        id: &TenantId,
        plan: Plan,
        shard: &str,
        home: &crate::tenant::plan::Home,
    ) -> Result<TenantRecord, PgError> {
        let catalog = self.catalog().await?;
        self.put_row(&catalog, plan, shard, home, true).await?;
        let record = TenantRecord::find(&*catalog, id).await?;
        catalog.give_back().await;
        record.ok_or_else(|| super::tenants::unknown(id))
    }
}

/// The statements that make the role, wherever the plan has them.
fn adopt_role(before: &[Step], inside: &[String]) -> Vec<String> {
    let outside = before.iter().filter_map(|step| match step {
        Step::Run(sql) => Some(sql.clone()),
        // A database is there.
        Step::Each(_) => None,
    });
    let is_role = |sql: &&String| sql.contains("CREATE ROLE") || sql.starts_with("ALTER ROLE") && sql.contains("LOGIN");
    outside.chain(inside.iter().filter(is_role).cloned()).collect()
}
