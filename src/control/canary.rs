//! The canary: the proxy makes two throwaway tenants on each of its shards and has one attack the other, through its own
//! listener, so that a wall that has got a hole (by a grant, a setting, a new version of PostgreSQL) is noticed before
//! somebody else finds it.
//!
//! Each attack is tried twice, with the guard as it is configured and without it. The victim has a row with a secret
//! in it; it looks at it after every attack, in a transaction that it began before. What an attack hears is searched
//! for the secret. The tenants' names (`pgusher_canary_…`) are taken by nobody else; what an earlier run left behind
//! because it was broken off is removed by the next one, of any proxy. What they try is not counted as a violation of
//! real tenants'; a leak is.

mod attack;
mod client;

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio_postgres::error::SqlState;

pub use client::Front;

use self::attack::{ADVISORY_KEY, Attack, Heard, MAKE, Names, TABLE, TIDY};
use self::client::Client;
use super::admin::failed;
use super::provision::{Choice, Wanted};
use super::shards::admin_endpoint;
use super::{Control, records};
use crate::directory::Shard;
use crate::error::{PgError, sqlstate};
use crate::metrics::Metrics;
use crate::tenant::plan::TemplateUse;
use crate::tenant::rls;
use crate::tenant::{CANARY_PREFIX, Plan, TenantId, credential};
use crate::violation::{Action, Kind, Violation};

/// Its clients' application_name.
const NAME: &str = "pgusher canary";
/// The same of a client for which nobody guards: only of a canary's tenant this is believed.
pub const WITHOUT_GUARD: &str = "pgusher canary without guard";
/// Longest time for one attack, and for looking after it.
const PATIENCE: Duration = Duration::from_secs(15);
/// What an attack has done that ends the victim's session, or takes its table away.
const FAILED: &str = "the victim's transaction failed";
/// Who did it, in the event log.
const WHO: &str = "canary";

/// What came of the last run on one shard, with one plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// The shard.
    pub shard: String,
    /// The plan.
    pub plan: String,
    /// When it ended, in seconds since 1970.
    pub at: u64,
    /// Attacks tried, each spelling with and without guard.
    pub attacks: usize,
    /// Those that reached the victim, and how.
    pub leaks: Vec<String>,
    /// What could not be tried, or not be cleaned up.
    pub errors: Vec<String>,
}

/// What the canary keeps.
#[derive(Default)]
pub(super) struct Cage {
    /// How to reach the proxy, and where leaks are reported; nothing in a program that is no proxy.
    surroundings: OnceLock<(Front, Arc<Metrics>)>,
    outcomes: Mutex<BTreeMap<(String, String), Outcome>>,
    running: tokio::sync::Mutex<()>,
}

/// A pair of tenants that is at it.
struct Pair<'a> {
    front: &'a Front,
    plan: Plan,
    attacker: TenantId,
    victim: TenantId,
    passwords: [String; 2],
    secret: String,
    names: Names,
    admin: String,
}

impl Control {
    /// Tells the canary how to reach the proxy, and starts its schedule.
    pub fn open_canary(self: &Arc<Self>, front: Option<Front>, metrics: Arc<Metrics>) {
        let Some(front) = front else { return };
        if self.canary.surroundings.set((front, metrics)).is_err() {
            return;
        }
        let control = self.clone();
        self.spawn(async move {
            let mut last = Instant::now();
            loop {
                tokio::time::sleep(Duration::from_secs(1)).await;
                // Read each time: a reload may change it.
                let interval = control.live().canary_interval;
                if !interval.is_zero() && last.elapsed() >= interval {
                    last = Instant::now();
                    if let Err(error) = control.canary_run(WHO).await {
                        tracing::warn!(%error, "the canary did not run");
                    }
                }
            }
        });
    }

    /// What came of the last runs, by shard and plan.
    pub fn canary_outcomes(&self) -> Vec<Outcome> {
        self.canary.outcomes.lock().values().cloned().collect()
    }

    /// Runs it on every shard that tenants share. Goes on when whoever asked has left.
    ///
    /// # Errors
    /// `55000` if it runs already, here or in another proxy; the catalog is away.
    pub async fn run_canary(self: &Arc<Self>, who: &str) -> Result<Vec<Outcome>, PgError> {
        let (control, who, shutdown) = (self.clone(), who.to_owned(), self.shutdown.clone());
        let work = self.tasks.spawn(async move { shutdown.run_until_cancelled(control.canary_run(&who)).await });
        let broken_off = || PgError::fatal(sqlstate::CANNOT_CONNECT_NOW, "the proxy is shutting down");
        work.await.ok().flatten().unwrap_or_else(|| Err(broken_off()))
    }

    async fn canary_run(self: &Arc<Self>, who: &str) -> Result<Vec<Outcome>, PgError> {
        let at_it = || PgError::error(sqlstate::NOT_IN_PREREQUISITE_STATE, "the canary is running already");
        let Some((front, metrics)) = self.canary.surroundings.get() else {
            return Err(PgError::error(sqlstate::NOT_IN_PREREQUISITE_STATE, "the canary cannot reach the proxy")
                .hint("It connects to unix_socket_dir, or to the first listen_addr."));
        };
        let _one = self.canary.running.try_lock().map_err(|_| at_it())?;
        let catalog = self.catalog().await?;
        let lock = "SELECT pg_catalog.pg_try_advisory_lock(pg_catalog.hashtextextended('pgusher canary', 0))";
        if !catalog.query_one(lock, &[]).await.map_err(failed("lock the canary"))?.get::<_, bool>(0) {
            return Err(at_it().detail("Another proxy runs it."));
        }
        let leftovers = self.remove_canaries().await?;
        let mut outcomes = Vec::new();
        for shard in self.directory.shards().iter().filter(|shard| shard.dedicated_to.is_none()) {
            for plan in self.offered(shard).await? {
                let outcome = self.canary_on(front, metrics, shard, plan).await;
                self.canary.outcomes.lock().insert((outcome.shard.clone(), outcome.plan.clone()), outcome.clone());
                outcomes.push(outcome);
            }
        }
        let sum = |of: fn(&Outcome) -> usize| outcomes.iter().map(of).sum::<usize>();
        let detail = json!({ "attacks": sum(|o| o.attacks), "leaks": sum(|o| o.leaks.len()),
                             "errors": sum(|o| o.errors.len()), "leftovers": leftovers });
        records::event(&*catalog, who, "canary ran", None, &detail).await?;
        self.audit_change(who, "canary ran", None, &detail).await;
        // Gives the lock back.
        catalog.give_back().await;
        Ok(outcomes)
    }

    /// The plans of a shard: that of new tenants, and those of its tenants.
    async fn offered(&self, shard: &Shard) -> Result<Vec<Plan>, PgError> {
        let catalog = self.catalog().await?;
        let mut plans = records::ShardRecord::plans(&*catalog, &shard.name).await?;
        catalog.give_back().await;
        plans.push(self.config.provision.plan);
        Ok(Plan::ALL.into_iter().filter(|plan| plans.contains(plan) && !plan.wants_own_shard()).collect())
    }

    /// Removes what a run that was broken off has left behind.
    async fn remove_canaries(self: &Arc<Self>) -> Result<usize, PgError> {
        let catalog = self.catalog().await?;
        let sql = "SELECT id FROM pgusher.tenants WHERE pg_catalog.starts_with(id, $1) AND status <> 'deleted'";
        let rows = catalog.query(sql, &[&CANARY_PREFIX]).await.map_err(failed("look for canaries"))?;
        catalog.give_back().await;
        for id in rows.iter().filter_map(|row| TenantId::parse(row.get(0)).ok()) {
            tracing::info!(tenant = %id, "removing what an earlier canary left behind");
            self.delete(&id, WHO).await?;
        }
        Ok(rows.len())
    }

    async fn canary_on(self: &Arc<Self>, front: &Front, metrics: &Metrics, shard: &Shard, plan: Plan) -> Outcome {
        let (mut attacks, mut leaks, mut errors) = (0, Vec::new(), Vec::new());
        match self.hatch(front, shard, plan).await {
            Ok(mut pair) => {
                for name in [WITHOUT_GUARD, NAME] {
                    match pair.attack_all(name, &mut attacks, &mut errors).await {
                        Ok(found) => leaks.extend(found),
                        Err(error) => errors.push(error),
                    }
                }
            }
            Err(error) => errors.push(error.to_string()),
        }
        for error in self.bury_canaries(shard, plan).await {
            errors.push(error.to_string());
        }
        for leak in &leaks {
            let found = Violation::new(Kind::Canary, Action::Leaked, "", WHO, &shard.name);
            metrics.report(found.what(format!("plan {}: {leak}", plan.as_str())));
        }
        for error in &errors {
            tracing::warn!(shard = shard.name, plan = plan.as_str(), error, "the canary could not do all it should");
        }
        let at = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        Outcome { shard: shard.name.clone(), plan: plan.as_str().to_owned(), at, attacks, leaks, errors }
    }

    /// Makes attacker and victim, with what each of them owns.
    async fn hatch<'a>(self: &Arc<Self>, front: &'a Front, shard: &Shard, plan: Plan) -> Result<Pair<'a>, PgError> {
        let [attacker, victim] = pair_of(shard, plan)?;
        for id in [&attacker, &victim] {
            let choice = Choice { shard: Some(shard.name.clone()), plan: Some(plan) };
            self.make(id, WHO, Wanted::ByOperator(choice)).await?;
        }
        self.sync().await;
        if shares_tables(plan) {
            self.share_table(shard).await?;
        }
        let home = plan.home(&victim, shard.databases());
        let master = self.config.provision.master_secret.expose();
        let pair = Pair {
            front,
            plan,
            passwords: [&attacker, &victim].map(|id| credential::client_password(master, id.as_str())),
            secret: format!("{:032x}", rand::random::<u128>()),
            names: Names {
                attacker: attacker.to_string(),
                victim: home.role,
                victim_database: home.database,
                victim_schema: home.schema,
                victim_pid: 0,
            },
            admin: admin_endpoint(&self.config, &shard.name, &shard.host, shard.port, "postgres").user,
            attacker,
            victim,
        };
        pair.prepare().await.map_err(failed("prepare the canary"))?;
        Ok(pair)
    }

    /// Tenants of plan `rls` make no tables: it is made for them, and shared as any other.
    async fn share_table(&self, shard: &Shard) -> Result<(), PgError> {
        let mut client = self.single(&shard.name, &shard.rls_database)?.checkout().await?;
        let doing = failed("make the canary's table");
        let transaction = client.transaction().await.map_err(&doing)?;
        let make =
            format!("DROP TABLE IF EXISTS public.{TABLE}; CREATE TABLE public.{TABLE} (id int PRIMARY KEY, note text)");
        transaction.batch_execute(&make).await.map_err(&doing)?;
        let wanted = rls::Wanted { rows_to: None, hardening: self.live().hardening };
        super::shared_tables::convert_all(&transaction, &[TABLE.to_owned()], wanted, true).await?;
        transaction.commit().await.map_err(&doing)
    }

    async fn bury_canaries(self: &Arc<Self>, shard: &Shard, plan: Plan) -> Vec<PgError> {
        let mut errors = Vec::new();
        for id in pair_of(shard, plan).into_iter().flatten() {
            match self.delete(&id, WHO).await {
                Ok(_) => {}
                // It was never made.
                Err(error) if &*error.code == sqlstate::UNKNOWN_DATABASE => {}
                Err(error) => errors.push(error),
            }
        }
        if shares_tables(plan) {
            let dropped = async {
                let client = self.single(&shard.name, &shard.rls_database)?.checkout().await?;
                let sql = format!("DROP TABLE IF EXISTS public.{TABLE}");
                client.batch_execute(&sql).await.map_err(failed("drop the canary's table"))
            };
            errors.extend(dropped.await.err());
        }
        errors
    }
}

/// Whether tenants of this plan have no tables of their own.
fn shares_tables(plan: Plan) -> bool {
    plan.template() == TemplateUse::Once
}

/// The names of the two, attacker first: one pair for each shard and plan, the same ones each time.
fn pair_of(shard: &Shard, plan: Plan) -> Result<[TenantId; 2], PgError> {
    use sha2::{Digest as _, Sha256};
    let hash = Sha256::digest(shard.name.as_bytes());
    let hash: String = hash.iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    let id = |which: &str| {
        let text = format!("{CANARY_PREFIX}{}_{hash}_{which}", plan.as_str());
        TenantId::parse(&text).map_err(|error| PgError::error(sqlstate::INTERNAL, error.to_string()))
    };
    Ok([id("a")?, id("b")?])
}

impl Pair<'_> {
    async fn attacker(&self, name: &str) -> Result<Client, tokio_postgres::Error> {
        self.front.connect(self.attacker.as_str(), &self.passwords[0], name).await
    }

    async fn victim(&self) -> Result<Client, tokio_postgres::Error> {
        self.front.connect(self.victim.as_str(), &self.passwords[1], NAME).await
    }

    /// Each of the two gets its row.
    async fn prepare(&self) -> Result<(), tokio_postgres::Error> {
        for (client, note) in [(self.attacker(NAME).await?, "own"), (self.victim().await?, &*self.secret)] {
            if !shares_tables(self.plan) {
                client.run(MAKE).await?;
            }
            client.run(&format!("INSERT INTO {TABLE} (id, note) VALUES (1, '{note}')")).await?;
        }
        Ok(())
    }

    /// Tries all of them; says which leaked.
    async fn attack_all(
        &mut self,
        name: &str,
        tried: &mut usize,
        errors: &mut Vec<String>,
    ) -> Result<Vec<String>, String> {
        let attacks = attack::all().map_err(|error| format!("the attacks cannot be read: {error}"))?;
        let guard = if name == WITHOUT_GUARD { "without guard" } else { "with guard" };
        let mut leaks = Vec::new();
        let plan = self.plan;
        let broken = |error: tokio_postgres::Error| crate::directory::connector::explain(&error);
        let mut victim = self.victim().await.map_err(broken)?;
        // Tidies up after the attacker, as the attacker.
        let helper = self.attacker(NAME).await.map_err(broken)?;
        for attack in attacks.iter().filter(|attack| attack.is_for(plan)) {
            let outcome = match tokio::time::timeout(PATIENCE, self.attack(attack, name, &victim)).await {
                Ok(outcome) => outcome.map_err(broken),
                Err(_) => Err("no answer in time".to_owned()),
            };
            // What is open, what is changed and what is made must not be there for the next one.
            if victim.run("ROLLBACK").await.is_err() {
                victim = self.victim().await.map_err(broken)?;
            }
            if matches!(outcome, Ok(Some(_)) | Err(_)) {
                self.repair(&victim).await.map_err(broken)?;
            }
            for sql in TIDY {
                // Most of it is not there.
                let _ = helper.run(sql).await;
            }
            match outcome {
                Ok(leak) => {
                    *tried += 1;
                    leaks.extend(leak.map(|how| format!("{} {guard}: {how}", attack.id)));
                }
                Err(error) => errors.push(format!("{} {guard}: {error}", attack.id)),
            }
        }
        Ok(leaks)
    }

    /// One attack, between two looks of the victim at itself. `Some` if it leaked.
    async fn attack(
        &mut self,
        attack: &Attack,
        name: &str,
        victim: &Client,
    ) -> Result<Option<&'static str>, tokio_postgres::Error> {
        let began = victim.run("BEGIN; SELECT pg_catalog.pg_backend_pid()").await?;
        let pid = began.first().and_then(|row| row.first()).cloned().unwrap_or_default();
        self.names.victim_pid = pid.parse().unwrap_or_default();
        let attacker = self.attacker(name).await?;
        let mut heard = Heard::default();
        for (sql, value) in attack.messages(&self.names) {
            attacker.say(&sql, value.as_deref(), &mut heard).await;
        }
        // While the attacker is still there, with whatever it holds.
        let suffered = self.suffered(victim, &pid).await?;
        if suffered == Some(FAILED) {
            // A server that goes down takes both along: that was not the attack.
            attacker.run("ROLLBACK").await?;
        }
        if attack.listens {
            victim.run("ROLLBACK").await?;
            victim.run(&format!("NOTIFY {TABLE}, '{}'", self.secret)).await?;
            attacker.say("SELECT 1", None, &mut heard).await;
        }
        Ok(attack.reached(&heard, &self.secret, &self.names, &self.admin).or(suffered))
    }

    /// What the victim notices: somebody changed its rows, ended its session, or holds it up.
    async fn suffered(&self, victim: &Client, pid: &str) -> Result<Option<&'static str>, tokio_postgres::Error> {
        let lock = if shares_tables(self.plan) { "" } else { "LOCK TABLE pgusher_canary; " };
        let look = format!(
            "SET LOCAL lock_timeout = '2s'; {lock}UPDATE {TABLE} SET note = note; \
             SELECT id, note FROM {TABLE} ORDER BY id"
        );
        let rows = match victim.run(&look).await {
            Ok(rows) => rows,
            Err(error) if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => {
                return Ok(Some("it held the victim up"));
            }
            Err(error) if error.is_closed() || error.as_db_error().is_some() => {
                return Ok(Some(FAILED));
            }
            Err(error) => return Err(error),
        };
        if rows != [vec!["1".to_owned(), self.secret.clone()]] {
            return Ok(Some("it changed the victim's rows"));
        }
        let own = format!("SELECT pg_try_advisory_xact_lock({ADVISORY_KEY}), pg_catalog.pg_backend_pid()");
        let own = victim.run(&own).await?;
        Ok(match own.first().map(Vec::as_slice) {
            Some([lock, _]) if lock != "t" => Some("it held the victim's advisory lock"),
            Some([_, now]) if now != pid => Some("it ended the victim's session"),
            _ => None,
        })
    }

    /// Puts the victim's row back, so that the next attack is measured by itself.
    async fn repair(&self, victim: &Client) -> Result<(), tokio_postgres::Error> {
        if !shares_tables(self.plan) {
            let rest = "DROP FUNCTION IF EXISTS pgusher_canary_note(); DROP SEQUENCE IF EXISTS pgusher_canary_seq";
            victim.run(&format!("DROP TABLE IF EXISTS {TABLE} CASCADE; {rest}")).await?;
            victim.run(MAKE).await?;
        }
        let back = format!(
            "INSERT INTO {TABLE} (id, note) VALUES (1, '{0}') ON CONFLICT ON CONSTRAINT {TABLE}_pkey \
             DO UPDATE SET note = '{0}'",
            self.secret
        );
        victim.run(&back).await.map(drop)
    }
}
