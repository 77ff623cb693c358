//! The same session twice: on a server, and through the proxy to another server that is just like it.

use std::sync::Arc;

use pgusher::config::PoolMode;
use pgusher::tenant::Plan;
use pgusher::tenant::credential::server_password;

use crate::postgres::Cluster;
use crate::raw::{Batch, Message, Raw};
use crate::script::{Dice, Known, Op, Script, Step, moves};
use crate::world::{APP_PASSWORD, SECRET, World};

/// Server connections of each tenant.
const CONNECTIONS: usize = 3;
/// Clients of each tenant.
pub(crate) const CLIENTS: usize = 5;
/// Steps of a case. Logins cost more than statements: clients come back within a case.
const STEPS: usize = 250;

/// Two servers, each with a proxy in front; of the first one only the server is used.
pub(crate) struct Pair {
    direct: World,
    auto: World,
    /// Superuser's connections to the two.
    admins: tokio::sync::OnceCell<[tokio_postgres::Client; 2]>,
}

/// Where the two were not the same.
#[derive(Debug)]
pub(crate) struct Difference {
    at: usize,
    direct: String,
    auto: String,
}

/// A case that went wrong.
pub(crate) struct Failure {
    pub(crate) steps: Vec<Step>,
    pub(crate) difference: Difference,
}

struct Couple {
    direct: Raw,
    auto: Raw,
}

impl Pair {
    pub(crate) async fn start() -> Self {
        let start = async || {
            World::with_clusters(vec![Arc::new(Cluster::start())], |config| {
                config.pool.pool_mode = PoolMode::Auto;
                config.pool.default_pool_size = CONNECTIONS;
                config.pool.query_wait_timeout = std::time::Duration::from_secs(10);
            })
            .await
        };
        Self { direct: start().await, auto: start().await, admins: tokio::sync::OnceCell::new() }
    }

    /// What every case of a tenant starts with.
    pub(crate) async fn prepare(&self, tenant: &str) {
        for world in [&self.direct, &self.auto] {
            let mut raw = world.raw(tenant).await;
            let mut sql = "CREATE TABLE notes (id serial, note text); CREATE SEQUENCE numbers; \
                CREATE FUNCTION f_set(text, text) RETURNS text LANGUAGE sql AS 'SELECT set_config($1, $2, false)'; \
                CREATE FUNCTION f_temp() RETURNS void LANGUAGE plpgsql AS 'BEGIN CREATE TEMP TABLE tmp_f (x int); END'; \
                CREATE FUNCTION f_note() RETURNS void LANGUAGE plpgsql AS 'BEGIN RAISE NOTICE ''note''; END';"
                .to_owned();
            for client in 0..CLIENTS {
                sql.push_str(&format!("CREATE TABLE own_{client} (k int PRIMARY KEY, v text);"));
            }
            let said = raw.query(&sql).await;
            assert!(said.iter().all(|m| m.tag != b'E'), "{said:?}");
            raw.terminate().await;
        }
    }

    async fn reset(&self, tenant: &str) {
        let columns: String =
            (0..CLIENTS).map(|client| format!("ALTER TABLE own_{client} DROP COLUMN IF EXISTS w;")).collect();
        for world in [&self.direct, &self.auto] {
            // As the tenant: a change that the proxy has not seen is another story.
            let mut raw = world.raw(tenant).await;
            raw.query(&columns).await;
            raw.terminate().await;
        }
        let mut sql = format!(
            "SET search_path = \"{tenant}\"; DELETE FROM notes; \
            SELECT setval('numbers', 1, false); SELECT setval('notes_id_seq', 1, false);"
        );
        for client in 0..CLIENTS {
            sql.push_str(&format!("DELETE FROM own_{client}; INSERT INTO own_{client} VALUES (1, 'a'), (2, 'b');"));
        }
        let admins =
            async || [self.direct.cluster().admin("tenants").await, self.auto.cluster().admin("tenants").await];
        let [direct, auto] = self.admins.get_or_init(admins).await;
        let (direct, auto) = tokio::join!(direct.batch_execute(&sql), auto.batch_execute(&sql));
        direct.and(auto).unwrap();
        // With TRUNCATE the test would make files most of the time.
        for admin in self.admins.get_or_init(admins).await {
            admin.batch_execute(&format!("VACUUM \"{tenant}\".notes")).await.unwrap();
        }
    }

    async fn couple(&self, tenant: &str, parameters: &[(&'static str, &'static str)]) -> Couple {
        let path = Plan::search_path(tenant);
        let mut all = vec![("user", tenant), ("database", "tenants"), ("search_path", &*path)];
        all.extend_from_slice(parameters);
        let password = server_password(SECRET, tenant);
        let direct = Raw::login(self.direct.cluster().port(), &all, &password);
        let user = format!("app.{tenant}");
        let mut through = vec![("user", &*user), ("database", tenant)];
        through.extend_from_slice(parameters);
        let (direct, auto) = tokio::join!(direct, Raw::login(self.auto.port, &through, APP_PASSWORD));
        Couple { direct: direct.unwrap(), auto: auto.unwrap() }
    }

    /// Runs the case of a seed.
    pub(crate) async fn case(&self, tenant: &str, seed: u64) -> Result<usize, Failure> {
        let mut script = Script {
            dice: Dice::new(seed),
            holders: CONNECTIONS - 1,
            asks: false,
            failed: false,
            moved: false,
            pins: false,
        };
        let odd = script.dice.below(CLIENTS * 2);
        let mut room = Room::open(self, tenant, odd).await;
        let (mut steps, mut statements) = (Vec::new(), 0);
        for _ in 0..STEPS {
            let step = script.step(&room.known);
            steps.push(step.clone());
            statements += step.statements;
            if let Err(mut difference) = room.step(&step, steps.len() - 1).await {
                if difference.auto.contains("53300") {
                    if room.known.iter().filter(|known| known.holds()).count() >= CONNECTIONS {
                        // A name that began a transaction when it was run has left none for the others.
                        break;
                    }
                    // Who has the others, and why.
                    difference.auto.push_str(&format!("\n  {}", self.sessions(tenant).await));
                }
                return Err(Failure { steps, difference });
            }
        }
        for couple in room.couples {
            couple.leave().await;
        }
        Ok(statements)
    }

    /// What the server connections of the tenant are about.
    async fn sessions(&self, tenant: &str) -> String {
        let sql = "SELECT coalesce(string_agg(concat_ws(' ', state, pid, query), '; '), '') FROM pg_stat_activity WHERE usename = $1";
        let admin = self.auto.cluster().admin("postgres").await;
        admin.query_one(sql, &[&tenant]).await.unwrap().get(0)
    }

    /// Runs steps that went wrong again, perhaps fewer of them.
    async fn replay(&self, tenant: &str, seed: u64, steps: &[Step]) -> Option<Difference> {
        let mut room = Room::open(self, tenant, Dice::new(seed).below(CLIENTS * 2)).await;
        for (at, step) in steps.iter().enumerate() {
            if let Err(difference) = room.step(step, at).await {
                // Nobody is to wait for a server connection: that would be another failure.
                return (!difference.auto.contains("53300")).then_some(difference);
            }
        }
        None
    }

    /// The failure with as few steps as still show it.
    pub(crate) async fn shrink(&self, tenant: &str, seed: u64, failure: Failure) -> Failure {
        let mut best = failure;
        let mut size = best.steps.len() / 2;
        let began = std::time::Instant::now();
        while size > 0 {
            let mut from = 0;
            while from < best.steps.len() && began.elapsed().as_secs() < 60 {
                let mut fewer = best.steps.clone();
                fewer.drain(from..(from + size).min(fewer.len()));
                match self.replay(tenant, seed, &fewer).await {
                    Some(difference) => {
                        fewer.truncate(difference.at + 1);
                        best = Failure { steps: fewer, difference };
                    }
                    None => from += size,
                }
            }
            size /= 2;
        }
        best
    }
}

/// The clients of a case.
struct Room<'a> {
    pair: &'a Pair,
    tenant: &'a str,
    /// The one with other startup settings.
    odd: usize,
    couples: Vec<Couple>,
    known: Vec<Known>,
}

impl<'a> Room<'a> {
    async fn open(pair: &'a Pair, tenant: &'a str, odd: usize) -> Self {
        pair.reset(tenant).await;
        let couples = (0..CLIENTS).map(|client| pair.couple(tenant, parameters(client, odd)));
        let couples = futures_util::future::join_all(couples).await;
        Self { pair, tenant, odd, couples, known: vec![Known::default(); CLIENTS] }
    }

    async fn step(&mut self, step: &Step, at: usize) -> Result<(), Difference> {
        let Step { client, leaves, .. } = *step;
        self.couples[client].run(step, at, &mut self.known[client]).await?;
        if leaves {
            let new = self.pair.couple(self.tenant, parameters(client, self.odd)).await;
            std::mem::replace(&mut self.couples[client], new).leave().await;
            self.known[client] = Known::default();
        }
        Ok(())
    }
}

/// Some clients have startup settings of their own.
fn parameters(client: usize, odd: usize) -> &'static [(&'static str, &'static str)] {
    match client {
        _ if client == odd => &[("TimeZone", "Asia/Tokyo"), ("options", "-c work_mem=5MB")],
        1 => &[("application_name", "one")],
        _ => &[],
    }
}

impl Couple {
    async fn leave(self) {
        tokio::join!(self.direct.terminate(), self.auto.terminate());
    }

    async fn run(&mut self, step: &Step, at: usize, known: &mut Known) -> Result<(), Difference> {
        let (direct, auto) = tokio::join!(say(&mut self.direct, &step.ops), say(&mut self.auto, &step.ops));
        let params = |raw: &Raw| format!("{:?}", raw.params);
        if direct != auto && !another_error_first(&direct, &auto) {
            return Err(Difference { at, direct: direct.join(" "), auto: auto.join(" ") });
        }
        if params(&self.direct) != params(&self.auto) {
            return Err(Difference { at, direct: params(&self.direct), auto: params(&self.auto) });
        }
        known.met = true;
        known.failed = direct.last().is_some_and(|last| last == "Z(E)");
        known.in_transaction = direct.last().is_some_and(|last| last != "Z(I)");
        let text = format!("{:?}", step.ops).to_lowercase();
        known.moved = known.in_transaction && (known.moved || moves(&text));
        known.asks |= text.contains("lastval");
        known.seeded |= text.contains("seed");
        known.may_be_pinned |= known.asks || step.pins;
        if direct.iter().any(|m| m == "C(DISCARD ALL)") && direct.len() == 2 && !known.asks && !known.seeded {
            known.may_be_pinned = false;
        }
        Ok(())
    }
}

/// Whether the only difference is this: a statement that returns nothing is described in a transaction that has failed, on a
/// server connection that has not prepared it and now cannot.
fn another_error_first(direct: &[String], auto: &[String]) -> bool {
    let Some(at) = auto.iter().zip(direct).position(|(a, d)| a != d) else { return false };
    let described = matches!(&direct[at..], [types, nothing, ..] if types.starts_with("t(") && nothing == "n");
    described && auto[at].starts_with("E(ERROR 25P02") && direct[at + 2..] == auto[at + 1..]
}

/// Says it, and hears the answers in a comparable form.
async fn say(raw: &mut Raw, ops: &[Op]) -> Vec<String> {
    let mut heard = Vec::new();
    let mut batch = Batch::default();
    let mut ready = 0;
    for op in ops {
        match op {
            Op::Query(sql) => batch.query(sql),
            Op::Parse(name, sql) => batch.parse(name, sql),
            Op::Bind(name, values) => {
                let values: Vec<&str> = values.iter().map(|v| &**v).collect();
                batch.bind("", name, &values);
            }
            Op::DescribeStatement(name) => batch.describe(b'S', name),
            Op::DescribePortal => batch.describe(b'P', ""),
            Op::Execute => batch.execute(""),
            Op::CloseStatement(name) => batch.close(b'S', name),
            Op::Sync => batch.sync(),
            Op::Flush => {
                batch.flush();
                raw.send(&std::mem::take(&mut batch).0).await;
                hear(raw, &mut heard, |m| matches!(m.tag, b'T' | b'n' | b'E' | b'Z')).await;
            }
            Op::CopyData(data) => batch.copy_data(data.as_bytes()),
            Op::CopyDone => batch.copy_done(),
            Op::CopyFail => batch.message(b'f', b"no more\0"),
        }
        ready += usize::from(matches!(op, Op::Query(_) | Op::Sync));
    }
    raw.send(&batch.0).await;
    while ready > 0 {
        hear(raw, &mut heard, |m| m.tag == b'Z').await;
        ready -= 1;
    }
    heard
}

async fn hear(raw: &mut Raw, heard: &mut Vec<String>, last: impl Fn(&Message) -> bool) {
    loop {
        let Some(message) = raw.next().await else {
            heard.push("closed".to_owned());
            return;
        };
        if message.tag != b'S' {
            heard.push(comparable(&message));
        }
        if last(&message) {
            return;
        }
    }
}

fn comparable(message: &Message) -> String {
    let body = &message.body;
    match message.tag {
        b'D' => format!("D({})", message.values().join(",")),
        b'C' => format!("C({})", String::from_utf8_lossy(&body[..body.len() - 1])),
        b'E' | b'N' => {
            let [severity, code, text] = [b'S', b'C', b'M'].map(|field| message.field(field));
            // What ends the connection is never right: it may say why.
            let why = if severity == "FATAL" { format!(": {}", message.field(b'D')) } else { String::new() };
            format!("{}({severity} {code} {text}{why})", char::from(message.tag))
        }
        b'Z' => format!("Z({})", char::from(body[0])),
        b'T' => format!("T({})", columns(body)),
        b'd' => format!("d({})", String::from_utf8_lossy(body)),
        b't' => format!("t({body:?})"),
        tag => char::from(tag).to_string(),
    }
}

/// Names and types; a table's number is not the same everywhere.
fn columns(body: &[u8]) -> String {
    let (mut rest, mut shown) = (&body[2..], Vec::new());
    while let Some(end) = rest.iter().position(|&b| b == 0) {
        let kind = u32::from_be_bytes(rest[end + 7..end + 11].try_into().unwrap());
        shown.push(format!("{}:{kind}", String::from_utf8_lossy(&rest[..end])));
        rest = &rest[end + 19..];
    }
    shown.join(",")
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (at, step) in self.steps.iter().enumerate() {
            writeln!(f, "  {at:3} client {}: {:?}", step.client, step.ops)?;
        }
        let Difference { direct, auto, .. } = &self.difference;
        writeln!(f, "  direct: {direct}\n  auto:   {auto}")
    }
}
