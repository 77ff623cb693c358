//! What is measured, without saying how: by time in `micro.rs`, by instructions in `instructions.rs`.
//!
//! A case is something that has been set up, and a method that does the work once.

#![allow(clippy::unwrap_used, missing_docs, dead_code, unreachable_pub, reason = "measurements")]

use std::hint::black_box;
use std::sync::Arc;

use bytes::BytesMut;
use pgusher::client::auth::{Exchange, MockSecret, Step};
use pgusher::config::{Config, PoolMode, Secret};
use pgusher::directory::{Directory, Shard, Tenant};
use pgusher::error::PgError;
use pgusher::metrics::Metrics;
use pgusher::pool::connect::Connector;
use pgusher::pool::lease::CheckIn;
use pgusher::pool::passwords::Passwords;
use pgusher::pool::scram::Scram;
use pgusher::pool::statements::{Prepared, Registry};
use pgusher::pool::tls::ClientTls;
use pgusher::pool::{Limits, Pool, Pools, Settings};
use pgusher::relay::guard::{self, Neighbours, Seat};
use pgusher::relay::lex::Lex;
use pgusher::relay::scan;
use pgusher::relay::session::{Link, Session, Verdict, Ward};
use pgusher::tenant::credential::Verifier;
use pgusher::tenant::{Plan, Status, TenantId};
use pgusher::wire::frame;
use pgusher::wire::message::SaslInitialResponse;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::runtime::Runtime;

pub const SELECT: &str = "SELECT abalance FROM pgbench_accounts WHERE aid = 12345;";
pub const LONG: &str = "SELECT u.id, u.name, count(b.id) AS bookings, coalesce(sum(b.price), 0) AS total FROM users u \
    LEFT JOIN bookings b ON b.user_id = u.id AND b.created_at > now() - interval '30 days' \
    WHERE u.active AND lower(u.name) LIKE 'a%' GROUP BY u.id, u.name ORDER BY total DESC LIMIT 20";
pub const SUSPICIOUS: &str = "SET ROLE client_002; SELECT * FROM client_002.bookings";

fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len() + 4).unwrap();
    [&[tag][..], &length.to_be_bytes(), body].concat()
}

/// The server's answer to a query of one row, seen as frames.
pub struct Framing(Vec<u8>);

impl Framing {
    pub fn new() -> Self {
        let row = message(b'D', &[0; 40]);
        Self([message(b'T', &[0; 33]), row.repeat(97), message(b'C', b"SELECT 1\0"), message(b'Z', b"I")].concat())
    }

    /// A hundred frames.
    pub fn run(&self) -> usize {
        let (mut rest, mut frames) = (&self.0[..], 0);
        while let Ok(Some(header)) = frame::header(black_box(rest)) {
            rest = &rest[header.total..];
            frames += 1;
        }
        frames
    }
}

struct Guard;

impl Ward for Guard {
    fn looks(&self) -> bool {
        true
    }

    fn lex(&self) -> Lex {
        Lex::default()
    }

    fn look(&self, text: &[u8], lex: Lex, _: bool) -> scan::Seen {
        scan::look(&lex.narrow(text), lex, |_| false)
    }

    fn judge(&self, _: &[u8], _: Lex) -> Option<PgError> {
        None
    }

    fn function_call_refused(&self) {}

    fn replication_refused(&self, _: &str) {}

    fn remember(&self, _: &[u8], _: Lex) {}
}

/// A client's frames and the server's answers, through the session's bookkeeping.
pub struct Conversation {
    session: Session,
    prepared: Prepared,
    registry: Registry,
    client: Vec<Vec<u8>>,
    server: Vec<Vec<u8>>,
    out: BytesMut,
}

impl Conversation {
    fn new(client: Vec<Vec<u8>>, server: Vec<Vec<u8>>) -> Self {
        let session = Session::new(1, PoolMode::Auto, 200);
        let (prepared, registry) = (Prepared::default(), Registry::new(Arc::default()));
        Self { session, prepared, registry, client, server, out: BytesMut::with_capacity(1024) }
    }

    pub fn simple() -> Self {
        let answer = vec![message(b'T', &[0; 33]), message(b'D', &[0; 11]), message(b'C', b"SELECT 1\0")];
        let query = message(b'Q', format!("{SELECT}\0").as_bytes());
        Self::new(vec![query], [answer, vec![message(b'Z', b"I")]].concat())
    }

    /// Bind, Describe, Execute, Sync of a statement that the server has.
    pub fn prepared() -> Self {
        let parse = message(b'P', format!("S_1\0{SELECT}\0\0\0").as_bytes());
        let sync = message(b'S', b"");
        let mut this = Self::new(vec![parse, sync.clone()], vec![message(b'1', b""), message(b'Z', b"I")]);
        this.run();
        this.client = vec![
            message(b'B', b"\0S_1\0\0\0\0\x01\0\0\0\x0512345\0\0"),
            message(b'D', b"P\0"),
            message(b'E', b"\0\0\0\0\0"),
            sync,
        ];
        let answer = [(b'2', &b""[..]), (b'T', &[0; 33]), (b'D', &[0; 11]), (b'C', b"SELECT 1\0"), (b'Z', b"I")];
        this.server = answer.iter().map(|(tag, body)| message(*tag, body)).collect();
        this
    }

    pub fn run(&mut self) -> bool {
        for frame in &self.client {
            let header = frame::header(black_box(frame)).unwrap().unwrap();
            let mut link = Link { prepared: &mut self.prepared, registry: &self.registry, ward: &Guard };
            black_box(self.session.on_client(header, frame, &mut link, &mut self.out).unwrap());
            self.out.clear();
        }
        for frame in &self.server {
            let header = frame::header(black_box(frame)).unwrap().unwrap();
            let verdict = self.session.on_server(header, frame, &mut self.prepared, &mut self.out).unwrap();
            assert_eq!(verdict, Verdict::Forward);
        }
        self.session.is_idle()
    }
}

/// The look at every text.
pub fn scan(sql: &str) -> bool {
    scan::look(black_box(sql.as_bytes()), Lex::default(), |_| false).suspicious
}

/// The guard's reading of a suspicious one.
pub fn judge(sql: &str) -> bool {
    let is_tenant = |name: &str| name == "client_002";
    let seat = Seat { role: "client_001", neighbours: Neighbours::Schemas, is_tenant: &is_tenant };
    guard::judge(black_box(sql.as_bytes()), Lex::default(), &seat).is_some()
}

fn tenant(id: &str, shard: &Arc<Shard>, verifier: Option<Verifier>) -> Tenant {
    let id = TenantId::parse(id).unwrap();
    let (plan, status) = (Plan::Schema, Status::Active);
    Tenant { id, plan, shard: shard.clone(), status, epoch: 1, verifier, names: None, managed: true }
}

fn shard(port: u16) -> Shard {
    Shard {
        name: "shard_1".into(),
        host: "127.0.0.1".into(),
        port,
        database: "tenants".into(),
        rls_database: "shared".into(),
        dedicated_to: None,
        weight: 100,
        region: String::new(),
        max_db_connections: 100,
    }
}

/// A directory of so many tenants, and names to look up in a random order.
pub struct Lookup {
    directory: Directory,
    names: Vec<String>,
    at: usize,
}

impl Lookup {
    pub fn new(tenants: usize) -> Self {
        let directory = Directory::new(tokio::sync::mpsc::channel(1).0);
        let shard = Arc::new(shard(5432));
        let verifier = |n: usize| Verifier {
            iterations: 4096,
            salt: n.to_be_bytes().repeat(2).as_slice().into(),
            stored_key: [n as u8; 32],
            server_key: [n as u8; 32],
        };
        for n in 0..tenants {
            directory.put(tenant(&format!("client_{n:07}"), &shard, Some(verifier(n))));
        }
        let mut state = 88_172_645_463_325_252_u64;
        let mut random = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % tenants as u64
        };
        let names = (0..100_000).map(|_| format!("client_{:07}", random())).collect();
        Self { directory, names, at: 0 }
    }

    pub fn run(&mut self) -> Arc<Tenant> {
        self.at = (self.at + 1) % self.names.len();
        self.directory.find(black_box(&self.names[self.at])).unwrap()
    }
}

/// A pool with one connection, to something that speaks as a server does at login.
pub struct Checkout {
    runtime: Runtime,
    pool: Arc<Pool>,
    settings: Arc<Settings>,
}

impl Checkout {
    pub fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (pool, settings) = runtime.block_on(async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = listener.local_addr().unwrap().port();
            tokio::spawn(pretend(listener));
            let mut config = Config::default();
            config.provision.master_secret = Secret::new("0123456789abcdef0123456789abcdef");
            config.tls.server_tls_sslmode = pgusher::config::SslMode::Disable;
            let (tls, metrics) = (Arc::new(ClientTls::new(&config.tls).unwrap()), Arc::new(Metrics::new(1)));
            let long = std::time::Duration::from_secs(3600);
            let connector = Arc::new(Connector::new(tls, Passwords::new(&config), long, long, metrics.clone()));
            let pools = Pools::new(connector, Limits { default_pool_size: 20, server_idle_timeout: long }, metrics);
            let pool = pools.get(&Arc::new(tenant("client_001", &Arc::new(shard(port)), None)));
            let settings = Arc::new(Settings::new());
            let lease = pool.checkout(&settings, &"".into(), long).await.unwrap();
            lease.release(CheckIn::Clean, long, tokio::time::Instant::now());
            (pool, settings)
        });
        Self { runtime, pool, settings }
    }

    pub fn run(&self) {
        let _inside = self.runtime.enter();
        let lease = self.pool.try_checkout(black_box(&self.settings), None).unwrap();
        lease.release(CheckIn::Clean, std::time::Duration::from_secs(1), tokio::time::Instant::now());
    }
}

/// Lets everybody in, and says no more.
async fn pretend(listener: tokio::net::TcpListener) {
    let (mut socket, _) = listener.accept().await.unwrap();
    let mut startup = [0; 1024];
    let _ = socket.read(&mut startup).await.unwrap();
    let mut answer = message(b'R', &[0, 0, 0, 0]);
    for parameter in ["session_authorization\0client_001\0", "is_superuser\0off\0", "server_version\x0015.1\0"] {
        answer.extend(message(b'S', parameter.as_bytes()));
    }
    answer.extend(message(b'K', &[0, 0, 0, 1, 0, 0, 0, 2]));
    answer.extend(message(b'Z', b"I"));
    socket.write_all(&answer).await.unwrap();
    std::future::pending::<()>().await;
}

/// The server's side of a login.
pub struct Login {
    verifier: Verifier,
    mock: MockSecret,
    initial: Vec<u8>,
    response: Vec<u8>,
}

impl Login {
    pub fn new() -> Self {
        let verifier = Verifier::make("password", b"0123456789abcdef", 4096);
        let mock = MockSecret::new(b"0123456789abcdef0123456789abcdef");
        let client = Scram::new(&["SCRAM-SHA-256"], "password", None, None, "rOprNGfwEbeRWgbNEkqO".into()).unwrap();
        let initial = client.initial().1;
        let mut this = Self { verifier, mock, initial, response: Vec::new() };
        let challenge = this.challenge(&mut this.exchange());
        this.response = client.respond(&challenge).unwrap().0;
        this
    }

    fn exchange(&self) -> Exchange {
        Exchange::new("client_001", Some(&self.verifier), &self.mock, None, "fyko+d2lbbFgONRv9qkxdawL".into())
    }

    fn challenge(&self, exchange: &mut Exchange) -> Vec<u8> {
        let initial = SaslInitialResponse { mechanism: "SCRAM-SHA-256", data: Some(&self.initial) };
        let Step::Continue(challenge) = exchange.initial(&initial) else { panic!("no challenge") };
        challenge
    }

    pub fn run(&self) {
        let mut exchange = self.exchange();
        black_box(self.challenge(&mut exchange));
        assert!(matches!(exchange.respond(black_box(&self.response)), Step::Done(_)));
    }
}
