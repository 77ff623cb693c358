//! Two tenants and one server connection between them: whatever one of them does, the other never sees anything of it.
//!
//! Four clients, two of each tenant, do random things (seeded) at the same time through `max_db_connections = 1`. What
//! each of them sees is checked at once; what the server saw is checked at the end, from its log and its catalogs.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use pgusher::config::PoolMode;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use crate::postgres::Cluster;
use crate::raw::{Message, PATIENCE, Raw, cancel, show};
use crate::world::World;

const TENANTS: [&str; 2] = ["client_001", "client_002"];

/// What all clients of a run share.
struct Arena {
    world: World,
    mode: PoolMode,
    /// Transactions still to be begun.
    left: AtomicUsize,
    done: AtomicUsize,
    cancelled: AtomicUsize,
    lost: AtomicUsize,
    /// Whom each server process has served, as the clients saw it: its number as the log writes it, and the tenant.
    served: Mutex<BTreeMap<String, BTreeSet<&'static str>>>,
}

/// One client and what it must be seeing.
struct Actor<'a> {
    arena: &'a Arena,
    tenant: &'static str,
    random: StdRng,
    raw: Raw,
    /// Settings, a temporary table, prepared statements, a channel, a lock: what it has made in this session.
    setting: Option<String>,
    temp: bool,
    prepared: BTreeSet<String>,
    serial: usize,
}

impl Actor<'_> {
    fn below(&mut self, limit: usize) -> usize {
        self.random.random_range(0..limit)
    }

    /// Sends a text with the tenant's mark, which the server logs with the user's name.
    async fn query(&mut self, sql: &str) -> Vec<Message> {
        let text = format!("/* of {} */ {sql}", self.tenant);
        self.raw.compose(|b| b.query(&text)).await;
        self.answer().await
    }

    /// What the server has to say, without the notifications among it, which may come at any time.
    async fn answer(&mut self) -> Vec<Message> {
        let mut messages = self.raw.until_ready().await;
        self.check(&messages);
        messages.retain(|m| m.tag != b'A');
        messages
    }

    /// Nothing that comes is the other's, and nothing is cancelled that was not one's own to cancel.
    fn check(&self, messages: &[Message]) {
        let other = TENANTS.iter().find(|t| **t != self.tenant).unwrap();
        for message in messages {
            let text = String::from_utf8_lossy(&message.body);
            assert!(!text.contains(other), "{} sees {text:?}", self.tenant);
        }
        assert_eq!(messages.last().map(|m| m.tag), Some(b'Z'), "{}: {}", self.tenant, show(messages));
    }

    fn expect(&self, messages: &[Message], shown: &str) {
        assert_eq!(show(messages), shown, "{} in {:?}", self.tenant, self.arena.mode);
    }

    /// The client's own view of its session: who it is, on which process, and that there is nothing but its own.
    async fn look(&mut self) {
        let said = self
            .query(
                "SELECT session_user, current_user, to_hex(pg_backend_pid()), \
                 coalesce(current_setting('zz.mark', true), ''), coalesce(to_regclass('pg_temp.scratch')::text, ''), \
                 (SELECT coalesce(string_agg(DISTINCT who, ','), '') FROM marks), \
                 (SELECT coalesce(string_agg(name, ','), '') FROM pg_prepared_statements WHERE from_sql), \
                 (SELECT coalesce(string_agg(c, ','), '') FROM pg_listening_channels() c)",
            )
            .await;
        let row = said.iter().find(|m| m.tag == b'D').unwrap_or_else(|| panic!("{}", show(&said))).values();
        assert_eq!([row[0].as_str(), row[1].as_str()], [self.tenant; 2]);
        self.arena.served.lock().entry(row[2].clone()).or_default().insert(self.tenant);
        // Transaction mode promises no setting to anybody, but nobody's to anybody else.
        let mine = self.setting.clone().unwrap_or_default();
        assert!(row[3] == mine || (self.arena.mode == PoolMode::Transaction && row[3].is_empty()), "{row:?}, {mine}");
        if self.arena.mode != PoolMode::Transaction {
            assert_eq!(!row[4].is_empty(), self.temp, "{row:?}");
        }
        assert!(row[5].is_empty() || row[5] == self.tenant, "rows of {}", row[5]);
        assert!(row[6].is_empty() || row[6] == "stated", "{row:?}");
    }

    /// One transaction, of one of many kinds. `false`: the client is gone and has to come again.
    async fn transaction(&mut self) -> bool {
        let me = self.tenant;
        match self.below(16) {
            0 | 1 => self.look().await,
            2 => {
                let said = self.query(&format!("INSERT INTO marks VALUES ('{me}')")).await;
                self.expect(&said, "C(INSERT 0 1) Z(I)");
            }
            3 => {
                let sql = format!("BEGIN; INSERT INTO marks VALUES ('{me} undone'); SET zz.mark = 'undone'");
                self.query(&sql).await;
                let said = self.query("ROLLBACK").await;
                self.expect(&said, "C(ROLLBACK) Z(I)");
            }
            4 => {
                let said = self.query("SELECT 1/0").await;
                self.expect(&said, "E(22012) Z(I)");
            }
            5 => {
                self.query("BEGIN; SELECT no_such_column FROM marks").await;
                let said = self.query("COMMIT").await;
                self.expect(&said, "C(ROLLBACK) Z(I)");
            }
            6 => {
                // Its own value, that nobody else ever has.
                self.serial += 1;
                let mark = format!("{me}/{}/{}", self.serial, self.random.random::<u32>());
                let said = self.query(&format!("SET zz.mark = '{mark}'")).await;
                self.expect(&said, "C(SET) Z(I)");
                self.setting = Some(mark);
            }
            7 if self.arena.mode != PoolMode::Transaction => {
                let (sql, shown) = if self.temp {
                    ("DROP TABLE pg_temp.scratch", "C(DROP TABLE) Z(I)")
                } else {
                    ("CREATE TEMP TABLE scratch AS SELECT session_user::text AS who", "C(SELECT 1) Z(I)")
                };
                let said = self.query(sql).await;
                self.expect(&said, shown);
                self.temp = !self.temp;
            }
            8 if self.temp => {
                let said = self.query("SELECT who FROM pg_temp.scratch").await;
                self.expect(&said, &format!("D({me}) C(SELECT 1) Z(I)"));
            }
            9 | 10 => self.prepared().await,
            11 if self.arena.mode != PoolMode::Transaction => self.notify().await,
            12 => self.lock().await,
            13 => self.cancel().await,
            14 => {
                self.leave().await;
                return false;
            }
            _ => {
                let said = self.query("BEGIN; SELECT count(*) FROM marks WHERE who <> session_user; COMMIT").await;
                self.expect(&said, "C(BEGIN) D(0) C(SELECT 1) C(COMMIT) Z(I)");
            }
        }
        true
    }

    /// Both tenants use the same names for statements of their own.
    async fn prepared(&mut self) {
        let (me, name) = (self.tenant, format!("s{}", self.below(3)));
        let new = self.prepared.insert(name.clone());
        let text = format!("SELECT '{name} of {me}', session_user, $1::text");
        self.raw
            .compose(|b| {
                if new {
                    b.parse(&name, &text);
                }
                b.bind("", &name, &["x"]);
                b.execute("");
                b.sync();
            })
            .await;
        let said = self.answer().await;
        let parsed = if new { "1 " } else { "" };
        self.expect(&said, &format!("{parsed}2 D({name} of {me},{me},x) C(SELECT 1) Z(I)"));
    }

    /// Both listen on the same channel; what is sent there says by whom.
    async fn notify(&mut self) {
        let me = self.tenant;
        self.query("LISTEN news").await;
        self.query(&format!("NOTIFY news, '{me}'")).await;
        if self.below(2) == 0 {
            self.query("UNLISTEN *").await;
        }
    }

    /// Both take the same locks, and never wait for each other.
    async fn lock(&mut self) {
        let key = self.below(3);
        let sql = format!("BEGIN; SET LOCAL lock_timeout = '10s'; SELECT pg_advisory_xact_lock({key}); COMMIT");
        let said = self.query(&sql).await;
        assert!(show(&said).ends_with("C(COMMIT) Z(I)"), "{}", show(&said));
        if self.arena.mode != PoolMode::Transaction {
            let said =
                self.query(&format!("SELECT pg_advisory_lock_shared({key}), pg_advisory_unlock_shared({key})")).await;
            assert!(show(&said).ends_with("C(SELECT 1) Z(I)"), "{}", show(&said));
        }
    }

    /// Cancels what it runs itself, perhaps too early, perhaps too late.
    async fn cancel(&mut self) {
        let (port, pid, secret) = (self.arena.world.port, self.raw.pid, self.raw.secret.clone());
        let text = format!("/* of {} */ SELECT pg_sleep(0.003)", self.tenant);
        self.raw.compose(|b| b.query(&text)).await;
        let pause = u64::try_from(self.below(6)).unwrap();
        let request = async {
            tokio::time::sleep(Duration::from_millis(pause)).await;
            cancel(port, pid, &secret).await;
        };
        let (said, ()) = tokio::join!(self.answer(), request);
        let shown = show(&said);
        // One that comes late finds the row on its way already.
        let cancelled = matches!(shown.as_str(), "E(57014) Z(I)" | "D() E(57014) Z(I)");
        assert!(cancelled || shown == "D() C(SELECT 1) Z(I)", "{shown}");
        self.arena.cancelled.fetch_add(usize::from(cancelled), Ordering::Relaxed);
    }

    /// Goes in the middle of something.
    async fn leave(&mut self) {
        let me = self.tenant;
        match self.below(5) {
            0 => {
                self.query(&format!("BEGIN; INSERT INTO marks VALUES ('{me} lost')")).await;
            }
            1 => self.raw.compose(|b| b.query("BEGIN; SELECT pg_sleep(0.002)")).await,
            2 => {
                self.raw.compose(|b| b.query("COPY marks FROM stdin")).await;
                self.raw.until(b'G').await;
                self.raw.compose(|b| b.copy_data(format!("{me} lost\n").as_bytes())).await;
            }
            3 => {
                self.raw
                    .compose(|b| {
                        b.parse("", "INSERT INTO marks VALUES (session_user || ' lost')");
                        b.bind("", "", &[]);
                        b.execute("");
                        b.flush();
                    })
                    .await;
                self.raw.until(b'C').await;
            }
            _ => {
                let half = [b"Q\0\0\x01\0".as_slice(), b"SELECT 1 /* half of it"].concat();
                self.raw.send(&half).await;
            }
        }
        self.arena.lost.fetch_add(1, Ordering::Relaxed);
    }
}

/// One client after the other, as long as there are transactions to be done.
async fn act(arena: Arc<Arena>, tenant: &'static str, seed: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    loop {
        let raw = arena.world.raw(tenant).await;
        let seed = random.random();
        let mut actor = Actor {
            arena: &arena,
            tenant,
            random: StdRng::seed_from_u64(seed),
            raw,
            setting: None,
            temp: false,
            prepared: BTreeSet::new(),
            serial: 0,
        };
        actor.look().await;
        // Some stay long, some do not; a client in session mode has the connection until it goes.
        let stay = 1 + actor.below(25);
        let mut here = true;
        for _ in 0..stay {
            let more = arena.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
            if more.is_err() {
                return;
            }
            here = tokio::time::timeout(PATIENCE * 3, actor.transaction()).await.expect("it hangs");
            arena.done.fetch_add(1, Ordering::Relaxed);
            if !here {
                break;
            }
        }
        if here && actor.below(3) > 0 {
            actor.raw.terminate().await;
        }
    }
}

/// The server's own view: a line of its log says which session, which user, and what was said.
fn from_the_log(log: &str) -> Vec<String> {
    let mut sessions: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for line in log.lines().filter_map(|line| line.strip_prefix("pgu/")) {
        let mut parts = line.splitn(3, '/');
        let (session, user) = (parts.next().unwrap(), parts.next().unwrap());
        let text = parts.next().unwrap();
        if !TENANTS.contains(&user) {
            assert!(!text.contains("/* of "), "said as {user}: {line}");
            continue;
        }
        sessions.entry(session).or_default().insert(user);
        for tenant in TENANTS {
            assert!(!text.contains(&format!("of {tenant}")) || user == tenant, "said for {tenant} as {user}: {line}");
        }
    }
    for (session, users) in &sessions {
        assert_eq!(users.len(), 1, "server process {session} served {users:?}");
    }
    sessions.into_keys().map(str::to_owned).collect()
}

async fn interleave(mode: PoolMode, count: usize) {
    let seed = std::env::var("SEED").ok().and_then(|s| s.parse().ok()).unwrap_or_else(rand::random::<u64>);
    println!("{mode:?}: SEED={seed}");
    let log = ["log_line_prefix=pgu/%c/%u/", "log_statement=all", "log_connections=on"];
    let cluster = tokio::task::spawn_blocking(move || Arc::new(Cluster::start_with(&log))).await.unwrap();
    let world = World::with_clusters(vec![cluster.clone()], |config| {
        config.pool.pool_mode = mode;
        config.pool.query_wait_timeout = Duration::from_secs(120);
        config.shards[0].max_db_connections = Some(1);
    })
    .await;
    for tenant in TENANTS {
        world.raw(tenant).await.query("CREATE TABLE marks (who text)").await;
    }
    let arena = Arc::new(Arena {
        world,
        mode,
        left: count.into(),
        done: 0.into(),
        cancelled: 0.into(),
        lost: 0.into(),
        served: Mutex::default(),
    });
    let actors: Vec<_> =
        (0..4).map(|at| tokio::spawn(act(arena.clone(), TENANTS[at % 2], seed.wrapping_add(at as u64)))).collect();
    for actor in actors {
        actor.await.unwrap_or_else(|error| panic!("SEED={seed}: {error}"));
    }
    assert_eq!(arena.done.load(Ordering::Relaxed), count);
    let world = &arena.world;
    for tenant in TENANTS {
        let strangers = format!("SELECT count(*) FROM {tenant}.marks WHERE who <> '{tenant}'");
        assert_eq!(world.admin_value(&strangers).await, 0, "{tenant} has rows that it should not");
        assert!(world.admin_value(&format!("SELECT count(*) FROM {tenant}.marks")).await > 0);
    }
    let sessions = from_the_log(&cluster.log());
    let seen = {
        let served = arena.served.lock();
        for (process, tenants) in served.iter() {
            // Numbers of processes come again, in the end.
            let lives = sessions.iter().filter(|session| session.ends_with(&format!(".{process}"))).count();
            assert!((1..=lives).contains(&tenants.len()), "process {process} served {tenants:?} in {lives} lives");
        }
        served.len()
    };
    let sessions = sessions.len();
    assert!(sessions >= seen && seen > 10, "{seen} processes seen, {sessions} in the log");
    // With all clients gone nothing is held, and no more than one process is there.
    world.admin_until("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'", 0).await;
    assert!(world.server_processes().await <= 1);
    println!(
        "{mode:?}: {count} transactions on {sessions} server processes, one tenant each; {} cancelled, {} clients lost",
        arena.cancelled.load(Ordering::Relaxed),
        arena.lost.load(Ordering::Relaxed)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn two_tenants_share_one_place_and_nothing_else_auto() {
    interleave(PoolMode::Auto, 1_000).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_tenants_share_one_place_and_nothing_else_transaction() {
    interleave(PoolMode::Transaction, 1_000).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_tenants_share_one_place_and_nothing_else_session() {
    interleave(PoolMode::Session, 1_000).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes: make test-full"]
async fn two_tenants_share_one_place_ten_thousand_times() {
    for mode in [PoolMode::Auto, PoolMode::Transaction, PoolMode::Session] {
        interleave(mode, 10_000).await;
    }
}
