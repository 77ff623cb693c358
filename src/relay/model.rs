//! Random sessions through the relay and its pool, without a socket, against servers in miniature.
//!
//! Three clients share two server connections. Whatever a client says goes to a session of its own ([`pg::Pg`], what
//! PostgreSQL would do) and through the relay to one of the shared ones. All bytes that come back must be the same. As a
//! server in miniature tells in a notice what its session holds before it carries anything out, that is to say:
//! settings are the client's before every statement, nothing of another client is ever there, and prepared names mean the
//! client's own texts. Between steps a client must have a server connection exactly if its own session is in a
//! transaction or holds what cannot be carried, and be counted as pinned for that reason.
//!
//! `PROPTEST_CASES=20000 cargo test --lib relay::model` tries more, `PROPTEST_RNG_SEED=1` others. What has failed once is
//! kept in `proptest-regressions/`.

mod pg;

use parking_lot::Mutex;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, ReadBuf};
use tokio::sync::mpsc;

use super::*;
use crate::config::Config;
use crate::directory::Shard;
use crate::pool::Limits;
use crate::pool::cancel::CancelKeys;
use crate::pool::connect::Connector;
use crate::pool::passwords::Passwords;
use crate::pool::tls::ClientTls;
use crate::stream::Socket;
use crate::tenant::{Plan, TenantId};
use pg::Pg;

const CLIENTS: usize = 3;
const SERVERS: usize = 2;
/// Prepared statements on a server connection: few, so that they are closed and made again.
const MAX_PREPARED: usize = 2;
/// Longer than any test.
const NEVER: Duration = Duration::from_secs(600);
/// So many turns of the runtime without a byte mean that everybody waits for the next step.
const QUIET_TURNS: usize = 24;

/// A message of the extended protocol.
#[derive(Debug, Clone)]
enum Part {
    Parse { name: u8, text: String },
    Bind { name: u8, values: Vec<&'static str> },
    Describe { name: u8 },
    Execute,
    Close { name: u8 },
}

#[derive(Debug, Clone)]
enum Say {
    Query(String),
    /// With its Sync, or a Flush that leaves it open.
    Group(Vec<Part>, bool),
    /// With its Sync; after that the unnamed statement is closed.
    Alone(Vec<Part>),
}

/// What a client does next.
#[derive(Debug, Clone)]
enum Step {
    /// All of it at once.
    Say(Vec<Say>),
    /// It goes, and another takes its seat.
    Leave,
}

fn name() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec!["work_mem", "search_path", "TimeZone", "app.user", "application_name", "lock_timeout"])
}

fn value() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec!["v1", "v2", "UTC", "own"])
}

/// Texts of which every kind may be prepared under a name.
fn plain() -> impl Strategy<Value = String> {
    prop_oneof![
        6 => (0..4u8).prop_map(|n| format!("SELECT 'text{n}'")),
        3 => name().prop_map(|name| format!("SHOW {name}")),
        4 => (name(), value()).prop_map(|(name, value)| format!("SET {name} = '{value}'")),
        2 => (name(), value()).prop_map(|(name, value)| format!("SET LOCAL {name} = '{value}'")),
        2 => (name(), value(), any::<bool>())
            .prop_map(|(name, value, local)| format!("SELECT set_config('{name}', '{value}', {local})")),
        1 => name().prop_map(|name| format!("RESET {name}")),
        1 => Just("SELECT meddle()".to_owned()),
        2 => Just("SELECT 1/0".to_owned()),
        1 => (0..2u8).prop_map(|n| format!("SELECT count(*) FROM t{n}")),
    ]
}

/// Transactions, and what only one session can have.
fn special() -> impl Strategy<Value = String> {
    let tx = prop::sample::select(vec![
        "BEGIN",
        "BEGIN",
        "COMMIT",
        "ROLLBACK",
        "SAVEPOINT s",
        "ROLLBACK TO s",
        "RELEASE s",
        "SAVEPOINT s1",
        "ROLLBACK TO s1",
    ]);
    let ends = prop::sample::select(vec!["RESET ALL", "DISCARD ALL", "DEALLOCATE ALL"]);
    let kept = prop::sample::select(vec![
        "CREATE TEMP TABLE t0 (a int)",
        "DROP TABLE t0",
        "DECLARE c CURSOR WITH HOLD FOR SELECT 'row'",
        "FETCH c",
        "CLOSE c",
        "SELECT pg_advisory_lock(1)",
        "SELECT pg_advisory_unlock(1)",
        "PREPARE n0 AS SELECT 'by_sql'",
        "EXECUTE n0",
        "EXECUTE n1",
        "DEALLOCATE n0",
        "DEALLOCATE n1",
    ]);
    prop_oneof![5 => tx, 2 => ends, 5 => kept].prop_map(str::to_owned)
}

fn text() -> impl Strategy<Value = String> {
    prop_oneof![plain(), special()]
}

/// What has nothing to do with names of prepared statements.
fn without_names() -> impl Strategy<Value = String> {
    text().prop_map(|text| if is_about_names(&text) { "SELECT 'text0'".to_owned() } else { text })
}

fn is_about_names(text: &str) -> bool {
    ["DISCARD", "DEALLOCATE", "EXECUTE"].iter().any(|verb| text.starts_with(verb))
}

fn part() -> impl Strategy<Value = Part> {
    let parameters = (name(), value()).prop_map(|(name, value)| vec![name, value]);
    prop_oneof![
        3 => (1..3u8, plain()).prop_map(|(name, text)| Part::Parse { name, text }),
        3 => without_names().prop_map(|text| Part::Parse { name: 0, text }),
        1 => (0..3u8).prop_map(|name| Part::Parse { name, text: "SELECT set_config($1, $2, false)".into() }),
        5 => (0..3u8, prop_oneof![Just(Vec::new()), parameters]).prop_map(|(name, values)| Part::Bind { name, values }),
        1 => (0..3u8).prop_map(|name| Part::Describe { name }),
        5 => Just(Part::Execute),
        1 => (0..3u8).prop_map(|name| Part::Close { name }),
    ]
}

/// As drivers do it: prepare, bind, execute, in this order.
fn driver() -> impl Strategy<Value = Vec<Part>> {
    let named = (1..3u8, plain());
    let unnamed = (Just(0), without_names());
    (prop_oneof![named, unnamed], any::<bool>()).prop_map(|((name, text), again)| {
        let mut parts = vec![Part::Parse { name, text }, Part::Bind { name, values: Vec::new() }, Part::Execute];
        if again {
            parts.remove(0);
        }
        parts
    })
}

/// What names prepared statements, or takes them away, by the extended protocol. Left out: messages about names between
/// its Parse and its Sync. One that was to be prepared again on another server connection is prepared too early, or not at
/// all.
fn about_names() -> impl Strategy<Value = Say> {
    let texts = ["DISCARD ALL", "DEALLOCATE ALL", "DEALLOCATE n0", "DEALLOCATE n1", "EXECUTE n0", "EXECUTE n1"];
    prop::sample::select(texts.to_vec()).prop_map(|text| {
        let parse = Part::Parse { name: 0, text: text.to_owned() };
        Say::Alone(vec![parse, Part::Bind { name: 0, values: Vec::new() }, Part::Execute])
    })
}

/// Several statements in one text. Left out: a name behind the end of a transaction. Where that has failed, nothing can be
/// prepared on another server connection before it has ended.
fn one_text(mut texts: Vec<String>) -> Say {
    let ends = |text: &String| text.starts_with("COMMIT") || text.starts_with("ROLLBACK");
    if let Some(end) = texts.iter().position(ends) {
        texts[end..].iter_mut().filter(|text| text.contains(" n")).for_each(|text| *text = "SELECT 'text0'".into());
    }
    Say::Query(texts.join("; "))
}

fn say() -> impl Strategy<Value = Say> {
    let several = vec(text(), 2..4).prop_map(one_text);
    let group = (vec(part(), 1..6), prop::bool::weighted(0.9)).prop_map(|(parts, sync)| Say::Group(parts, sync));
    let driver = vec(driver(), 1..3).prop_map(|parts| Say::Group(parts.concat(), true));
    prop_oneof![6 => text().prop_map(Say::Query), 2 => several, 2 => group, 5 => driver, 2 => about_names()]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![30 => vec(say(), 1..3).prop_map(Step::Say), 1 => Just(Step::Leave)]
}

fn encode(says: &[Say]) -> BytesMut {
    let mut out = BytesMut::new();
    let called = |name: u8| if name == 0 { String::new() } else { format!("n{name}") }.into_bytes();
    for (at, say) in says.iter().enumerate() {
        let (parts, sync) = match say {
            Say::Query(text) => {
                message::query(&mut out, text);
                continue;
            }
            // Left out: a Query that is skipped for an error in a group without a Sync.
            Say::Group(parts, sync) => (parts, *sync || at + 1 < says.len()),
            Say::Alone(parts) => (parts, true),
        };
        for part in parts {
            match part {
                Part::Parse { name, text } => message::parse(&mut out, &called(*name), text.as_bytes(), &[0, 0]),
                Part::Bind { name, values } => bind(&mut out, &called(*name), values),
                Part::Describe { name } => message::describe(&mut out, b'S', &called(*name)),
                Part::Execute => message::execute(&mut out, b""),
                Part::Close { name } => message::close(&mut out, b'S', &called(*name)),
            }
        }
        if sync {
            message::sync(&mut out)
        } else {
            message::put_message(&mut out, b'H', |_| {})
        }
        if matches!(say, Say::Alone(_)) {
            message::close(&mut out, b'S', b"");
            message::sync(&mut out);
        }
    }
    out
}

fn bind(out: &mut BytesMut, name: &[u8], values: &[&str]) {
    message::put_message(out, b'B', |b| {
        message::put_cstr(b, b"");
        message::put_cstr(b, name);
        b.extend_from_slice(&[0, 0, 0, u8::try_from(values.len()).unwrap()]);
        for value in values {
            b.extend_from_slice(&u32::try_from(value.len()).unwrap().to_be_bytes());
            b.extend_from_slice(value.as_bytes());
        }
        b.extend_from_slice(&[0, 0]);
    });
}

/// What all server processes share.
#[derive(Debug, Default)]
struct Machine {
    bytes_moved: Mutex<usize>,
    /// Who reads this next dies of it.
    poison: Mutex<Option<&'static str>>,
}

impl Machine {
    fn kills(&self, bytes: &[u8]) -> bool {
        let mut poison = self.poison.lock();
        let found = poison.is_some_and(|text| bytes.windows(text.len()).any(|found| found == text.as_bytes()));
        found && poison.take().is_some()
    }
}

/// A server process of the shared ones.
async fn process(mut socket: DuplexStream, machine: Arc<Machine>) {
    let (mut pg, mut startup) = (Pg::default(), [0; 4]);
    if socket.read_exact(&mut startup).await.is_err() {
        return;
    }
    let mut rest = vec![0; u32::from_be_bytes(startup) as usize - 4];
    if socket.read_exact(&mut rest).await.is_err() {
        return;
    }
    let mut answer = pg.welcome();
    let mut bytes = Vec::new();
    while socket.write_all(&answer).await.is_ok() && !pg.said_goodbye {
        bytes.clear();
        if !matches!(socket.read_buf(&mut bytes).await, Ok(1..)) {
            return;
        }
        *machine.bytes_moved.lock() += bytes.len();
        if machine.kills(&bytes) {
            return;
        }
        answer = pg.feed(&bytes);
    }
}

/// The proxy without its front.
struct World {
    worker: Arc<Worker>,
    pool: Arc<Pool>,
    cancels: Arc<CancelKeys>,
    tenant: Arc<Tenant>,
    machine: Arc<Machine>,
    clients: u64,
}

/// A client, what it was told, and what it should have been told.
struct Seat {
    direct: Pg,
    socket: DuplexStream,
    expected: Vec<u8>,
    got: Vec<u8>,
}

impl World {
    async fn new() -> Self {
        // Nothing listens there: cancel requests for what a client leaves behind go nowhere.
        let shard = Shard { port: 1, max_db_connections: 10, ..Shard::for_tests("shard_1") };
        let tenant = Arc::new(Tenant {
            id: TenantId::parse(pg::ROLE).unwrap(),
            plan: Plan::parse("schema").unwrap(),
            shard: Arc::new(shard),
            status: Status::Active,
            epoch: 1,
            verifier: None,
            names: None,
            managed: true,
        });
        let directory = Arc::new(Directory::new(mpsc::channel(1).0));
        directory.put(tenant.clone());
        let metrics = Arc::new(Metrics::new(1));
        let tls = Arc::new(ClientTls::new(&crate::config::Tls::default()).unwrap());
        let passwords = Passwords::new(&Config::default());
        let mut connector = Connector::new(tls, passwords, NEVER, Duration::ZERO, metrics.clone());
        let machine = Arc::new(Machine::default());
        let shared = machine.clone();
        connector.dial = Some(Arc::new(move || {
            let (near, far) = tokio::io::duplex(1 << 16);
            tokio::spawn(process(far, shared.clone()));
            Stream::Plain(Socket::Other(Box::new(near)))
        }));
        let limits = Limits { default_pool_size: SERVERS, server_idle_timeout: Duration::ZERO };
        let pools = Arc::new(Pools::new(Arc::new(connector), limits, metrics.clone()));
        let stats = metrics.worker(0);
        let buffers = Buffers::new(16 << 10);
        let worker =
            Arc::new(Worker { directory, pools: pools.clone(), stats, metrics, buffers, looks: Looks::default() });
        let pool = pools.get(&tenant);
        let lease = pool.checkout(&Arc::default(), &"".into(), NEVER).await.unwrap_or_else(|e| panic!("{e:?}"));
        lease.release(CheckIn::Clean, NEVER, Instant::now());
        Self { worker, pool, cancels: Arc::default(), tenant, machine, clients: 0 }
    }

    /// A client that has just been greeted.
    fn seat(&mut self) -> Seat {
        let (near, socket) = tokio::io::duplex(1 << 16);
        let signals = Arc::new(Signals::default());
        let rules = Rules {
            pool_mode: PoolMode::Auto,
            query_wait_timeout: NEVER,
            server_reset_timeout: NEVER,
            max_prepared_statements: MAX_PREPARED,
            max_client_prepared_memory: 0,
            max_packet_size: 1 << 20,
            client_idle_timeout: Duration::ZERO,
            idle_transaction_timeout: Duration::ZERO,
            pin_timeout: Duration::ZERO,
            query_timeout: Duration::ZERO,
            guard: GuardMode::Enforce,
        };
        let settings = Arc::default();
        self.clients += 1;
        let client = Client {
            id: self.clients,
            stream: Stream::Plain(Socket::Other(Box::new(near))),
            tenant: self.tenant.clone(),
            seen: self.worker.directory.version(),
            params: self.pool.welcome(&settings).unwrap(),
            settings,
            application_name: "".into(),
            key: self.cancels.issue(4, None, &self.tenant.id, signals.clone()),
            lease: None,
            replicates: false,
            signals,
            stats: Present::new(self.worker.metrics.tenant(pg::ROLE)),
            rules: Arc::new(rules),
            user: pg::ROLE.into(),
            from: "test".into(),
        };
        tokio::spawn(run(client, &[], self.worker.clone(), (), |_, _| {}));
        let mut direct = Pg::default();
        direct.welcome();
        Seat { direct, socket, expected: Vec::new(), got: Vec::new() }
    }

    /// Waits until nothing moves any more.
    async fn settle(&self, seats: &mut [Seat]) {
        let mut quiet = 0;
        while quiet < QUIET_TURNS {
            let before = *self.machine.bytes_moved.lock();
            tokio::task::yield_now().await;
            let arrived: usize = seats.iter_mut().map(Seat::listen).sum();
            quiet = if arrived == 0 && *self.machine.bytes_moved.lock() == before { quiet + 1 } else { 0 };
        }
    }

    /// Whether answers are the same, and exactly those have a server connection who need one.
    fn check(&self, seats: &mut [Seat]) {
        for seat in seats.iter_mut() {
            seat.check();
        }
        if seats.iter().any(Seat::waits) {
            return;
        }
        let needs = |seat: &&Seat| !seat.direct.is_idle() || seat.direct.holds().is_some();
        let (open, idle) = self.pool.connections();
        let needed = seats.iter().filter(needs).count();
        assert_eq!(open - idle, needed, "server connections in use, and clients that need one");
        // Whether one is pinned in the middle of a transaction depends on when it was asked last.
        if !seats.iter().all(|seat| seat.direct.is_idle()) {
            return;
        }
        for (at, reason) in metrics::PIN_REASONS.iter().enumerate() {
            let pinned = self.worker.stats.clients_pinned[at].load(Ordering::Relaxed);
            let expected = seats.iter().filter(|seat| seat.direct.holds() == Some(at)).count();
            assert_eq!(pinned, expected, "clients pinned for {reason}");
        }
    }

    async fn play(mut self, steps: Vec<(usize, Step)>) {
        let mut seats: Vec<Seat> = (0..CLIENTS).map(|_| self.seat()).collect();
        for (who, step) in steps {
            // Who waits for a server connection says nothing.
            if seats[who].waits() {
                continue;
            }
            match step {
                Step::Say(says) => seats[who].say(&encode(&says)).await,
                Step::Leave => seats[who] = self.seat(),
            }
            self.settle(&mut seats).await;
            self.check(&mut seats);
        }
        // Those who hold a connection make room for those who wait; then all of them are back.
        for _ in 0..CLIENTS {
            for who in 0..CLIENTS {
                if !seats[who].waits() {
                    seats[who] = self.seat();
                    self.settle(&mut seats).await;
                    self.check(&mut seats);
                }
            }
        }
        assert!(!seats.iter().any(Seat::waits), "somebody waits for ever");
        // Strangers, at all server connections at once.
        for seat in seats.iter_mut().take(SERVERS) {
            seat.say(&encode(&[Say::Query("BEGIN".into()), Say::Query("SHOW work_mem".into())])).await;
            self.settle(std::slice::from_mut(seat)).await;
        }
        self.check(&mut seats);
    }
}

impl Seat {
    async fn say(&mut self, bytes: &[u8]) {
        self.expected.extend_from_slice(&self.direct.feed(bytes));
        self.socket.write_all(bytes).await.unwrap();
    }

    /// Takes what has arrived.
    fn listen(&mut self) -> usize {
        let mut bytes = [0; 4096];
        let mut read = ReadBuf::new(&mut bytes);
        let mut cx = Context::from_waker(std::task::Waker::noop());
        match Pin::new(&mut self.socket).poll_read(&mut cx, &mut read) {
            Poll::Ready(Ok(())) => self.got.extend_from_slice(read.filled()),
            _ => return 0,
        }
        read.filled().len()
    }

    fn waits(&self) -> bool {
        self.got.len() < self.expected.len()
    }

    /// What has come is what should have come, as far as it has come.
    fn check(&mut self) {
        let (got, expected) = (shown(&self.got), shown(&self.expected));
        let common = got.len().min(expected.len());
        assert_eq!(got[..common], expected[..common], "through the relay (left), and alone");
        assert!(got.len() <= expected.len(), "more than was asked for: {:?}", &got[common..]);
        if self.waits() {
            // Between two requests somebody else may be first.
            let whole = got.last().is_none_or(|last| last.starts_with('Z'));
            assert!(whole, "half an answer: {:?} are missing", &expected[common..]);
            return;
        }
        (self.got, self.expected) = Default::default();
    }
}

use tokio::io::AsyncRead as _;

/// Messages, to be read by people.
fn shown(mut bytes: &[u8]) -> Vec<String> {
    let mut messages = Vec::new();
    while let Ok(Some(header)) = frame::header(bytes) {
        let Some(body) = bytes.get(HEADER..header.total) else { break };
        messages.push(format!("{} {}", char::from(header.tag), body.escape_ascii()));
        bytes = &bytes[header.total..];
    }
    messages
}

fn settings() -> ProptestConfig {
    let given = ProptestConfig::default();
    let chosen = |name| std::env::var_os(name).is_some();
    ProptestConfig {
        cases: if chosen("PROPTEST_CASES") { given.cases } else { 150 },
        rng_seed: if chosen("PROPTEST_RNG_SEED") { given.rng_seed } else { RngSeed::Fixed(1) },
        max_shrink_iters: 20_000,
        ..given
    }
}

/// A server connection that dies while it is made ready for a client, which has sent nothing on it, is replaced.
#[tokio::test]
async fn a_server_connection_that_dies_before_its_use_is_nobodys_business() {
    let mut world = World::new().await;
    let mut seats = [world.seat(), world.seat()];
    let say = async |seats: &mut [Seat; 2], who: usize, text: &str| {
        seats[who].say(&encode(&[Say::Query(text.into())])).await;
        world.settle(seats).await;
        world.check(seats);
        assert!(!seats.iter().any(Seat::waits), "{text}");
    };
    say(&mut seats, 0, "SET work_mem = 'v1'").await;
    *world.machine.poison.lock() = Some("RESET");
    say(&mut seats, 1, "SHOW work_mem").await;
    assert!(world.machine.poison.lock().is_none(), "nobody has died");
    *world.machine.poison.lock() = Some("set_config");
    say(&mut seats, 0, "SHOW work_mem").await;
    assert!(world.machine.poison.lock().is_none(), "nobody has died");
    assert_eq!(world.pool.connections(), (1, 1));
}

proptest! {
    #![proptest_config(settings())]
    #[test]
    fn sessions_are_as_if_alone(steps in vec((0..CLIENTS, step()), 1..60)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { World::new().await.play(steps).await });
    }
}
