//! One entry, from its set-up to a verdict.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::Error;
use super::client::{Client, Reply};
use super::corpus::{Entry, Link, Step};
use super::fixture::Fixture;
use super::target::{TENANTS, Target, tenant, violations};

/// What came of one entry.
#[derive(Debug, Clone, Serialize)]
pub struct Outcome {
    pub id: String,
    pub group: String,
    pub plan: String,
    pub mode: String,
    pub leaked: bool,
    /// The conditions of `leak_if` that held, or what changed that nobody may change.
    pub why: Vec<String>,
    /// Rows of the other tenant were read or written: the wall itself did not hold.
    pub rows_crossed: bool,
    /// Who refused first, if anybody did.
    pub stopped_by: Option<Stop>,
    /// What `cross_tenant_isolation_violations` moved by, by `kind/action`.
    pub violations: BTreeMap<String, f64>,
    /// It names the other tenant, and was refused for want of a right.
    pub refused_crossing: bool,
    /// Something got no answer in time.
    pub stuck: bool,
    /// It could not be tried.
    pub broken: Option<String>,
    /// What was heard, for a look at a leak.
    pub heard: BTreeMap<String, String>,
}

/// A refusal.
#[derive(Debug, Clone, Serialize)]
pub struct Stop {
    /// `guard` (anything that pgusher itself says) or `server`.
    pub by: &'static str,
    pub sqlstate: String,
    pub message: String,
}

/// Runs entries against one proxy.
pub struct Runner {
    pub target: Target,
    pub fixture: Fixture,
    pub plan: String,
    pub mode: String,
    /// How long an answer may take.
    pub patience: Duration,
}

/// SQLSTATEs of somebody who was not let: no privilege, or no such schema, table, database, role.
const REFUSALS: [&str; 6] = ["42501", "3F000", "3D000", "28000", "42P01", "42704"];

impl Runner {
    /// Whether the entry is meant for this plan and pool mode.
    pub fn applies(&self, entry: &Entry) -> bool {
        // A plan or mode that is newer than the corpus has the same walls as the one it resembles.
        let plan = |plan: &String| *plan == self.plan || (self.plan == "cluster" && plan == "database");
        let mode = |mode: &String| *mode == self.mode || (self.mode == "auto" && mode == "transaction");
        entry.plan.iter().any(plan) && (entry.mode.is_empty() || entry.mode.iter().any(mode))
    }

    /// Tries one entry. What cannot be tried is `broken`.
    pub async fn run(&self, entry: &Entry) -> Outcome {
        let mut outcome = Outcome {
            id: entry.id.clone(),
            group: entry.group.clone(),
            plan: self.plan.clone(),
            mode: self.mode.clone(),
            leaked: false,
            why: Vec::new(),
            rows_crossed: false,
            stopped_by: None,
            violations: BTreeMap::new(),
            refused_crossing: false,
            stuck: false,
            broken: None,
            heard: BTreeMap::new(),
        };
        if let Err(error) = self.try_entry(entry, &mut outcome).await {
            let source = error.source().map(|source| format!(": {source}")).unwrap_or_default();
            outcome.broken = Some(format!("{error}{source}"));
            // For the next entry; if it fails, that one will say so.
            let _ = self.fixture.reset().await;
        }
        outcome
    }

    async fn try_entry(&self, entry: &Entry, outcome: &mut Outcome) -> Result<(), Error> {
        let before = self.violations().await?;
        let mut replies = if entry.steps.is_empty() {
            let (setup, sql, then) = self.run_sql(entry).await?;
            outcome.why = entry.leak_if.of_sql(&sql, &then);
            BTreeMap::from([("setup".to_owned(), setup), ("sql".to_owned(), sql), ("then".to_owned(), then)])
        } else {
            let replies = self.run_steps(&entry.steps).await?;
            outcome.why = entry.leak_if.of_wire(&replies);
            replies
        };
        for (kind, value) in self.violations().await? {
            let moved = value - before.get(&kind).copied().unwrap_or_default();
            if moved != 0.0 {
                outcome.violations.insert(kind, moved);
            }
        }
        let changed = self.fixture.reset().await?;
        outcome.why.extend(changed.into_iter().map(|what| format!("changed: {what}")));
        outcome.leaked = !outcome.why.is_empty();
        outcome.rows_crossed = rows_crossed(entry, &replies);
        outcome.leaked |= outcome.rows_crossed;
        outcome.stuck = replies.values().any(|reply| reply.stuck);
        let setup = replies.remove("setup");
        let first = replies.get("sql").into_iter().chain(replies.values()).flat_map(|reply| &reply.errors).next();
        outcome.stopped_by = first.map(|error| Stop {
            by: if error.by_server { "server" } else { "guard" },
            sqlstate: error.code.clone(),
            message: error.message.clone(),
        });
        let refused = |reply: &Reply| reply.errors.iter().any(|error| REFUSALS.contains(&error.code.as_str()));
        outcome.refused_crossing = names_other(entry) && replies.values().any(refused);
        replies.extend(setup.map(|reply| ("setup".to_owned(), reply)));
        for (name, reply) in replies {
            let heard = format!("{}{}", reply.text, reply.error_text());
            outcome.heard.insert(name, heard.chars().take(2_000).collect());
        }
        Ok(())
    }

    async fn violations(&self) -> Result<BTreeMap<String, f64>, Error> {
        match &self.target.metrics {
            Some(address) => violations(address).await,
            None => Ok(BTreeMap::new()),
        }
    }

    async fn run_sql(&self, entry: &Entry) -> Result<(Reply, Reply, Reply), Error> {
        let mut setup = None;
        if !entry.setup_sql.is_empty() || entry.link == Link::ConcurrentSetupConn {
            let mut client = self.connect(tenant(&entry.setup_as), &BTreeMap::new()).await?;
            self.say(&mut client, entry, &entry.setup_sql).await;
            setup = Some(client);
        }
        let setup_reply = setup.as_mut().map(Client::take).unwrap_or_default();
        let mut attacker = self.connect(tenant(&entry.run_as), &BTreeMap::new()).await?;
        self.say(&mut attacker, entry, &entry.sql).await;
        let mut sql = attacker.take();
        let then_as = tenant(&entry.then_as);
        let mut staying = Some(attacker);
        let mut then = Reply::default();
        match entry.link {
            Link::SameSession => {}
            Link::ConcurrentSetupConn => {
                if let Some(client) = &mut setup {
                    self.say(client, entry, &entry.then_sql).await;
                    client.poll(Duration::from_millis(50)).await;
                    then = client.take();
                }
            }
            Link::Handover | Link::NewBackend | Link::Concurrent | Link::ConcurrentPollA => {
                let idle = staying.as_ref().is_some_and(Client::is_idle);
                // In transaction mode the end of the transaction is the handover.
                let stays = match entry.link {
                    Link::Handover => self.mode != "session" && idle,
                    Link::NewBackend => false,
                    _ => true,
                };
                if !stays && let Some(client) = staying.take() {
                    client.leave(self.patience).await;
                }
                if entry.link == Link::NewBackend {
                    if let Some(client) = setup.take() {
                        client.leave(self.patience).await;
                    }
                    self.fixture.end_server_connections(then_as).await?;
                }
                let mut next = self.connect(then_as, &BTreeMap::new()).await?;
                self.say(&mut next, entry, &entry.then_sql).await;
                then = next.leave(self.patience).await;
            }
        }
        if entry.link == Link::ConcurrentPollA
            && let Some(client) = &mut staying
        {
            client.query("SELECT 1", "", self.patience).await;
            sql.absorb(client.take());
        }
        for client in staying.into_iter().chain(setup) {
            client.leave(Duration::from_secs(1)).await;
        }
        Ok((setup_reply, sql, then))
    }

    /// Says all of it, one after the other, whatever the answers are.
    async fn say(&self, client: &mut Client, entry: &Entry, statements: &[String]) {
        for sql in statements {
            if client.is_closed() {
                return;
            }
            match entry.proto.as_str() {
                "extended" => client.execute(sql, self.patience).await,
                _ => client.query(sql, &entry.copy_data, self.patience).await,
            }
        }
    }

    async fn run_steps(&self, steps: &[Step]) -> Result<BTreeMap<String, Reply>, Error> {
        let mut clients: BTreeMap<&str, Client> = BTreeMap::new();
        let mut replies: BTreeMap<String, Reply> = BTreeMap::new();
        for step in steps {
            match step {
                Step::Connect { name, tenant: who, parameters } => {
                    clients.insert(name, self.connect(tenant(who), parameters).await?);
                }
                Step::Handover { name, tenant: who } => {
                    if let Some(client) = clients.remove(name.as_str()) {
                        replies.entry(name.clone()).or_default().absorb(client.leave(self.patience).await);
                    }
                    clients.insert(name, self.connect(tenant(who), &BTreeMap::new()).await?);
                }
                Step::Drop { name } => {
                    if let Some(mut client) = clients.remove(name.as_str()) {
                        replies.entry(name.clone()).or_default().absorb(client.take());
                    }
                }
                Step::Cancel { of } => match clients.get(of.as_str()) {
                    Some(client) => client.cancel().await?,
                    None => return Err(format!("no connection {of} to cancel").into()),
                },
                Step::Send { name, messages } => open(&mut clients, name)?.send(messages).await,
                Step::Receive { name, ready } => open(&mut clients, name)?.receive(*ready, self.patience).await,
                Step::Poll { name, seconds } => {
                    open(&mut clients, name)?.poll(Duration::from_secs_f64(*seconds)).await;
                }
            }
        }
        for (name, client) in clients {
            let reply = client.leave(Duration::from_millis(300)).await;
            replies.entry(name.to_owned()).or_default().absorb(reply);
        }
        Ok(replies)
    }

    async fn connect(&self, tenant: &str, parameters: &BTreeMap<String, String>) -> Result<Client, Error> {
        let login = self.target.logins.get(tenant).ok_or_else(|| format!("no login for {tenant}"))?;
        Client::connect(login, parameters, self.patience).await
    }
}

fn open<'a>(clients: &'a mut BTreeMap<&str, Client>, name: &str) -> Result<&'a mut Client, Error> {
    clients.get_mut(name).ok_or_else(|| format!("no connection {name}").into())
}

/// Everything that the attacker says, as text.
fn said(entry: &Entry) -> String {
    let mut said = entry.sql.join("\n");
    said += &format!("{:?}", entry.steps);
    said
}

/// Whether the attacker names the tenant that it is not.
fn names_other(entry: &Entry) -> bool {
    let own = tenant(&entry.run_as);
    TENANTS.iter().any(|name| *name != own && said(entry).contains(name))
}

/// Whether the attacker saw rows of the other tenant's tables, or changed them. The rows' mark is looked for only where
/// nobody said it: one that stands in a statement may come back as a name or a setting.
fn rows_crossed(entry: &Entry, replies: &BTreeMap<String, Reply>) -> bool {
    let own = tenant(&entry.run_as);
    let planted = entry.setup_sql.join("\n") + &entry.then_sql.join("\n") + &said(entry);
    let foreign = |reply: &Reply| {
        TENANTS
            .iter()
            .map(|name| (name, format!("SECRET_OF_{name}")))
            .any(|(name, mark)| *name != own && !planted.contains(&mark) && reply.rows.contains(&mark))
    };
    match replies.get("sql") {
        Some(sql) => {
            let written =
                replies.get("then").is_some_and(|then| then.rows.contains("PWNED") && tenant(&entry.then_as) != own);
            foreign(sql) || written
        }
        // Of a wire entry it is the connection that tells who reads; the corpus says so in `leak_if` only.
        None => false,
    }
}
