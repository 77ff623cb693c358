//! Bytes that no driver sends, from fixed seeds: every connection ends, and nothing is left of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::postgres::Cluster;
use crate::raw::{Batch, PATIENCE, V3_0, V3_2, startup_packet};
use crate::world::{self, Process, Setup};

/// xorshift64*: the same numbers on every machine.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        let mut random = Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        random.next();
        random
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() >> 33).unwrap() % limit.max(1)
    }

    fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }

    /// Spoils bytes in one of the ways that networks, bugs and attackers have.
    fn mutate(&mut self, bytes: &mut Vec<u8>) {
        let (at, len) = (self.below(bytes.len()), self.below(9));
        let end = (at + len).min(bytes.len());
        match self.below(8) {
            0 => bytes.truncate(at),
            1 => drop(bytes.drain(at..end)),
            2 => {
                let copy = bytes[at..end].to_vec();
                drop(bytes.splice(at..at, copy));
            }
            3 => {
                let junk: Vec<u8> = (0..len).map(|_| self.next().to_le_bytes()[0]).collect();
                drop(bytes.splice(at..at, junk));
            }
            // Numbers that lengths and counts are made of.
            4 => {
                let number = *self.pick(&[0_u32, 1, 3, 4, 5, 7, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff, 0x0001_0000]);
                let end = (at + 4).min(bytes.len());
                drop(bytes.splice(at..end, number.to_be_bytes()));
            }
            5 => drop(bytes.splice(at..end, std::iter::repeat_n(0, len))),
            _ => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 1 << self.below(8);
                }
            }
        }
    }
}

fn startups() -> Vec<Vec<u8>> {
    let who = [("user", "app.client_001"), ("database", "client_001")];
    let mut many = vec![who[0], ("options", "-c work_mem=1MB -c a.b=c"), ("application_name", "x")];
    many.extend(std::iter::repeat_n(("DateStyle", "ISO"), 50));
    vec![
        startup_packet(V3_0, &who),
        startup_packet(V3_2, &who),
        startup_packet(V3_2, &[who[0], ("_pq_.x", "1")]),
        startup_packet(V3_0, &many),
        startup_packet(V3_0, &[("user", &"x".repeat(9_000))]),
        startup_packet(V3_0, &[]),
        startup_packet(0x0002_0000, &who),
        b"\0\0\0\x08\x04\xd2\x16\x2f".to_vec(),
        b"\0\0\0\x08\x04\xd2\x16\x30".to_vec(),
        b"\0\0\0\x10\x04\xd2\x16\x2e\0\0\0\x05abcd".to_vec(),
        [b"\0\0\0\x08\x04\xd2\x16\x2f".to_vec(), startup_packet(V3_0, &who)].concat(),
        b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03".to_vec(),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        vec![0; 100],
        vec![0xff; 100],
    ]
}

fn streams() -> Vec<Vec<u8>> {
    let of = |compose: &dyn Fn(&mut Batch)| {
        let mut batch = Batch::default();
        compose(&mut batch);
        batch.0.to_vec()
    };
    vec![
        of(&|b| b.query("SELECT 1")),
        of(&|b| b.query("SELECT 1; SELECT 1/0; SELECT 2")),
        of(&|b| b.query("BEGIN; INSERT INTO bookings (note) VALUES ('x')")),
        of(&|b| b.query("COMMIT")),
        of(&|b| b.query("SET TimeZone = 'UTC'")),
        of(&|b| b.query("DISCARD ALL")),
        of(&|b| b.query("DEALLOCATE ALL")),
        of(&|b| b.extended("SELECT $1::text", &["x"])),
        of(&|b| b.extended("INSERT INTO bookings (note) VALUES ($1)", &["x"])),
        of(&|b| {
            b.parse("s", "SELECT $1::int + 1");
            b.describe(b'S', "s");
            b.sync();
            b.bind("", "s", &["1"]);
            b.execute("");
            b.sync();
        }),
        of(&|b| {
            b.bind("p", "s", &["2"]);
            b.describe(b'P', "p");
            b.execute("p");
            b.flush();
            b.close(b'P', "p");
            b.close(b'S', "s");
            b.sync();
        }),
        of(&|b| {
            b.parse("t", "SELEC");
            b.parse("t", "SELECT 1");
            b.sync();
        }),
        of(&|b| {
            b.query("COPY things FROM stdin");
            b.copy_data(b"1\tx\n");
            b.copy_done();
        }),
        of(&|b| {
            b.extended("COPY things FROM stdin", &[]);
            b.copy_data(b"bad\tx\n");
            b.copy_done();
            b.sync();
        }),
        of(&|b| b.query("COPY bookings TO stdout")),
        of(&|b| b.message(b'f', b"no\0")),
        of(&|b| b.message(b'F', &[0, 0, 3, 0xbd, 0, 1, 0, 1, 0, 1, 0, 0, 0, 4, 0xff, 0xff, 0xff, 0xff, 0, 1])),
        of(&|b| b.message(b'X', b"")),
        of(&|b| b.message(b'p', b"secret\0")),
        of(&|b| b.sync()),
        of(&|b| b.flush()),
    ]
}

/// Sends the bytes, reads until nothing more comes, closes its side and waits for the other's.
async fn throw(port: u16, bytes: &[u8], quiet: Duration) -> usize {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let _ = stream.write_all(bytes).await;
    let (mut answer, mut buffer) = (0, vec![0; 16 << 10]);
    let all = async {
        let mut half_closed = false;
        loop {
            match tokio::time::timeout(quiet, stream.read(&mut buffer)).await {
                Ok(Ok(0) | Err(_)) => return answer,
                Ok(Ok(n)) => answer += n,
                Err(_) if half_closed => {}
                Err(_) => {
                    half_closed = true;
                    let _ = stream.shutdown().await;
                }
            }
        }
    };
    let ended = tokio::time::timeout(PATIENCE, all).await;
    ended.unwrap_or_else(|_| panic!("the connection stays open after {}", bytes.escape_ascii()))
}

async fn proxy() -> (Arc<Cluster>, Setup, Process) {
    let cluster = tokio::task::spawn_blocking(|| Arc::new(Cluster::start())).await.unwrap();
    let toml = "[proxy]\nclient_login_timeout = \"5s\"\n[auth]\nauth_type = \"trust\"\n\
                [pool]\npool_mode = \"transaction\"\ndefault_pool_size = 24\n[log]\nlog_connections = false\n";
    let setup = Setup::new(std::slice::from_ref(&cluster), toml);
    let process = setup.start().await;
    world::raw(setup.port, "client_001", &[]).await.ok().unwrap().terminate().await;
    (cluster, setup, process)
}

/// A normal client works, nobody is counted who is gone, no server connection is held, nothing panicked.
async fn assert_well(cluster: &Cluster, setup: &Setup, process: &Process) {
    let mut raw = world::raw(setup.port, "client_001", &[]).await.ok().unwrap();
    for round in 0..20 {
        raw.compose(|b| b.extended("SELECT $1::text", &[&round.to_string()])).await;
        assert_eq!(crate::raw::show(&raw.until_ready().await), format!("1 2 D({round}) C(SELECT 1) Z(I)"));
    }
    raw.terminate().await;
    let gone = [
        "pgusher_clients{state=\"active\"}",
        "pgusher_clients{state=\"idle\"}",
        "pgusher_clients{state=\"waiting\"}",
        "pgusher_server_connections{shard=\"shard_1\",state=\"active\"}",
        "pgusher_server_connections{shard=\"shard_1\",state=\"connecting\"}",
    ];
    let began = std::time::Instant::now();
    for metric in gone {
        while world::metric(setup.metrics_port, metric).await != 0.0 {
            assert!(began.elapsed() < PATIENCE, "{metric} {}", world::metric(setup.metrics_port, metric).await);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    let idle = world::metric(setup.metrics_port, "pgusher_server_connections{shard=\"shard_1\",state=\"idle\"}").await;
    let admin = cluster.admin("tenants").await;
    let counted = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'client_001'";
    let began = std::time::Instant::now();
    loop {
        let open: i64 = admin.query_one(counted, &[]).await.unwrap().get(0);
        if open as f64 <= idle {
            break;
        }
        assert!(began.elapsed() < PATIENCE, "{open} server processes, {idle} known to the proxy");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let log = process.log();
    // Refused FunctionCalls among the streams count as attempts; nobody becomes somebody else.
    for bad in ["panicked", "kind=\"identity\"", "kind=\"superuser\""] {
        let line = log.lines().find(|line| line.contains(bad));
        assert!(line.is_none(), "{bad}: {line:?}");
    }
    // Closed in doubt: copy::a_sync_in_the_middle_of_copy_data_that_fails… shows a way to get there. Rare, or something else
    // is wrong.
    let lost = log.lines().filter(|line| line.contains("out of step")).count();
    println!("{lost} server connections closed in doubt");
    assert!(lost <= 10, "{lost} conversations were out of step");
}

async fn throw_startups(count: u64) {
    let (cluster, setup, process) = proxy().await;
    let (port, bases) = (setup.port, Arc::new(startups()));
    let mut answered = 0;
    let tasks = (0..count).map(|seed| {
        let bases = bases.clone();
        async move {
            let mut random = Random::new(seed);
            let mut bytes = random.pick(&bases).clone();
            for _ in 0..1 + random.below(4) {
                random.mutate(&mut bytes);
            }
            throw(port, &bytes, Duration::from_millis(30)).await
        }
    });
    for answer in in_parallel(tasks).await {
        answered += usize::from(answer > 0);
    }
    assert!(answered > 0);
    assert_well(&cluster, &setup, &process).await;
}

/// Runs all, 24 at a time.
async fn in_parallel<F: Future<Output = usize> + Send + 'static>(tasks: impl Iterator<Item = F>) -> Vec<usize> {
    use futures_util::StreamExt as _;
    let running = futures_util::stream::iter(tasks);
    running.map(tokio::spawn).buffer_unordered(24).map(|answer| answer.unwrap()).collect().await
}

async fn throw_streams(count: u64) {
    let (cluster, setup, process) = proxy().await;
    let (port, bases) = (setup.port, Arc::new(streams()));
    let hello = Arc::new(startup_packet(V3_0, &[("user", "app.client_001"), ("database", "client_001")]));
    let greeting = throw(port, &[&hello[..], b"X\0\0\0\x04"].concat(), Duration::from_secs(1)).await;
    let lively = Arc::new(AtomicUsize::new(0));
    let (mut warm, step) = (0, (count / 10).max(1));
    for from in (0..count).step_by(usize::try_from(step).unwrap()) {
        let tasks = (from..(from + step).min(count)).map(|seed| {
            let (bases, hello, lively) = (bases.clone(), hello.clone(), lively.clone());
            async move {
                let mut random = Random::new(seed ^ 0x00c0_ffee);
                let mut bytes = Vec::new();
                for _ in 0..1 + random.below(5) {
                    bytes.extend_from_slice(random.pick::<Vec<u8>>(&bases));
                }
                for _ in 0..random.below(4) {
                    random.mutate(&mut bytes);
                }
                let answer = throw(port, &[&hello[..], &bytes].concat(), Duration::from_millis(150)).await;
                lively.fetch_add(usize::from(answer > greeting), Ordering::Relaxed);
                answer
            }
        });
        in_parallel(tasks).await;
        if from == 0 {
            warm = process.resident_kb();
        }
    }
    let lively = lively.load(Ordering::Relaxed);
    println!("{count} streams, {lively} of them got answers to statements");
    assert!(lively > usize::try_from(count / 2).unwrap(), "hardly any got an answer");
    assert_well(&cluster, &setup, &process).await;
    let now = process.resident_kb();
    assert!(now < warm + 16 * 1024, "resident memory grew from {warm} kB to {now} kB");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_malformed_startups() {
    throw_startups(1_000).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn mutated_message_streams() {
    throw_streams(3_000).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes: make test-full"]
async fn a_hundred_thousand_mutated_message_streams() {
    throw_streams(100_000).await;
}
