//! Measures the directory with half a million tenants: memory, look-up, load from the catalog and from the snapshot.
//!
//! Prints numbers, asserts none of them:
//! `cargo test --release --test scale -- --ignored --nocapture`

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::time::{Duration, Instant};

use pgusher::config::{Config, Secret, ShardConfig};
use pgusher::directory::Directory;
use pgusher::server::Server;
use support::postgres::{Cluster, PASSWORD};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// Sizes measured, the smallest first; `PGUSHER_SCALE=1000` measures that one alone.
const SIZES: [usize; 3] = [1_000, 50_000, 500_000];
const SHARDS: usize = 50;
/// Look-ups in one timing, and how many timings.
const BATCH: usize = 100;
const BATCHES: usize = 20_000;

fn config(cluster: &Cluster) -> Config {
    let mut config = Config::default();
    config.shards.push(ShardConfig {
        name: "shard_1".into(),
        port: cluster.port(),
        admin_password: Secret::new(PASSWORD),
        ..ShardConfig::default()
    });
    config.provision.master_secret = Secret::new("0123456789abcdef0123456789abcdef");
    (config.proxy.listen_port, config.proxy.workers) = (0, 2);
    config.api.listen = String::new();
    config.metrics.listen = "127.0.0.1:0".into();
    config.metrics.storage_interval = Duration::ZERO;
    config
}

/// Resident memory of this process that is its own.
fn resident() -> usize {
    let rollup = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap();
    let line = rollup.lines().find(|line| line.starts_with("Private_Dirty:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}

fn mb(bytes: usize) -> f64 {
    bytes as f64 / 1e6
}

/// Fills the catalog up to `tenants`, each with a verifier of its own, spread over the shards.
async fn fill(cluster: &Cluster, tenants: usize) {
    let catalog = cluster.admin("pgusher").await;
    catalog
        .batch_execute(&format!(
            "INSERT INTO pgusher.shards (name, host, port, database, weight)
             SELECT 'shard_' || n, '127.0.0.1', {port}, 'tenants', 0 FROM generate_series(2, {SHARDS}) n
             ON CONFLICT DO NOTHING;
             ALTER TABLE pgusher.tenants DISABLE TRIGGER announce;
             ALTER TABLE pgusher.credentials DISABLE TRIGGER announce;
             INSERT INTO pgusher.tenants (id, plan, shard, database, schema, role, status)
             SELECT id, 'schema', 'shard_' || (1 + n % {SHARDS}), 'tenants', id, id, 'active'
             FROM (SELECT n, 'client_' || lpad(n::text, 7, '0') AS id FROM generate_series(0, {tenants} - 1) n) t
             ON CONFLICT DO NOTHING;
             INSERT INTO pgusher.credentials (name, kind, tenant, verifier)
             SELECT id, 'tenant', id, 'SCRAM-SHA-256$4096:' || encode(substr(sha256(id::bytea), 1, 16), 'base64')
               || '$' || encode(sha256(('a' || id)::bytea), 'base64') || ':'
               || encode(sha256(('b' || id)::bytea), 'base64') FROM pgusher.tenants
             ON CONFLICT DO NOTHING;
             ALTER TABLE pgusher.tenants ENABLE TRIGGER announce;
             ALTER TABLE pgusher.credentials ENABLE TRIGGER announce; ANALYZE",
            port = cluster.port()
        ))
        .await
        .unwrap();
}

/// Random numbers, the same ones each time.
fn random() -> impl FnMut() -> u64 {
    let mut state = 88_172_645_463_325_252_u64;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    }
}

/// The median over batches of what one step takes. What a batch needs is made just before it, and not measured.
fn median_step<T>(mut prepare: impl FnMut() -> T, run: impl Fn(&T)) -> f64 {
    let mut times: Vec<f64> = (0..BATCHES)
        .map(|_| {
            let prepared = prepare();
            let began = Instant::now();
            run(&prepared);
            began.elapsed().as_nanos() as f64 / BATCH as f64
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Look-ups of random tenants: the names are in cache when it begins, the tenants are not.
fn look_up(directory: &Directory, tenants: usize, run: impl Fn(&Directory, &[String])) -> f64 {
    let mut random = random();
    let names = || (0..BATCH).map(|_| format!("client_{:07}", random() % tenants as u64)).collect::<Vec<_>>();
    median_step(names, |names| run(directory, names))
}

/// The processor may begin with the next before it has this one.
fn side_by_side(directory: &Directory, names: &[String]) {
    for name in names {
        assert!(std::hint::black_box(directory.find(name)).is_some());
    }
}

/// Which name is next depends on what was found (no epoch is that high), so that none begins before the last has ended.
fn one_by_one(directory: &Directory, names: &[String]) {
    let mut at = 0;
    while let Some(name) = names.get(at) {
        at += 1 + (directory.find(name).unwrap().epoch >> 63) as usize;
    }
}

/// What this machine takes to read a place in 100 MB that it could not foresee: the measure of a look-up.
fn miss() -> f64 {
    let (mut random, lines) = (random(), 100_000_000 / 64);
    let mut order: Vec<usize> = (0..lines).collect();
    for at in (1..lines).rev() {
        order.swap(at, random() as usize % (at + 1));
    }
    let mut next = vec![[0_usize; 8]; lines];
    for (n, &at) in order.iter().enumerate() {
        next[at][0] = order[(n + 1) % lines];
    }
    let at = std::cell::Cell::new(0);
    median_step(|| (), |()| (0..BATCH).for_each(|_| at.set(next[at.get()][0])))
}

/// One scrape of `/metrics`.
async fn scrape(server: &Server) {
    let mut socket = tokio::net::TcpStream::connect(server.addresses().metrics.unwrap()).await.unwrap();
    socket.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    assert!(answer.contains("pgusher_tenants"), "{answer}");
}

/// The median time of ten.
async fn median<F: Future<Output = ()>>(mut work: impl FnMut() -> F) -> Duration {
    let mut times = Vec::new();
    for _ in 0..10 {
        let began = Instant::now();
        work().await;
        times.push(began.elapsed());
    }
    times.sort();
    times[5]
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "measures: half a million tenants"]
async fn half_a_million_tenants() {
    let cluster = Cluster::start();
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(&cluster);
    Server::start(config.clone()).await.unwrap().drain(Duration::ZERO).await;
    let asked = std::env::var("PGUSHER_SCALE").ok().map(|size| vec![size.parse().unwrap()]);
    for tenants in asked.unwrap_or(SIZES.to_vec()) {
        fill(&cluster, tenants).await;
        println!("{tenants} tenants on {SHARDS} shards");
        let file = dir.path().join(tenants.to_string());
        config.catalog.snapshot_file = Some(file.clone());
        for from in ["catalog", "snapshot"] {
            let before = resident();
            let began = Instant::now();
            let server = Server::start(config.clone()).await.unwrap();
            println!("  start from the {from}: {:.2?}", began.elapsed());
            let directory = server.control().directory().clone();
            assert_eq!(directory.len(), tenants);
            println!("    memory: {:.1} MB more", mb(resident().saturating_sub(before)));
            println!(
                "    look-up: {:.0} ns side by side, {:.0} ns one by one; a cache miss takes {:.0} ns",
                look_up(&directory, tenants, side_by_side),
                look_up(&directory, tenants, one_by_one),
                miss()
            );
            println!("    scrape: {:.2?}", median(|| scrape(&server)).await);
            println!("    reload: {:.2?}", median(|| async { server.reload(config.clone()).await.unwrap() }).await);
            server.drain(Duration::ZERO).await;
            drop((server, directory));
            println!("    file: {:.1} MB", mb(std::fs::metadata(&file).unwrap().len() as usize));
        }
    }
}
