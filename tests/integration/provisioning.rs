//! Tenants made by connecting: once each, whole or not at all, whoever asks and whatever dies meanwhile.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::postgres::Cluster;
use crate::world::{self, Setup, World, told};

const CLIENTS: usize = 200;
const TENANTS: usize = 50;

fn tenant(client: usize) -> String {
    format!("new_{:03}", client % TENANTS)
}

async fn clusters(count: usize) -> Vec<Arc<Cluster>> {
    let start = |_| tokio::task::spawn_blocking(|| Arc::new(Cluster::start()));
    futures_util::future::join_all((0..count).map(start)).await.into_iter().map(Result::unwrap).collect()
}

/// Watches the catalog and the shards: a tenant that the catalog shows as active is whole, at every moment.
struct Watch {
    over: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<usize>,
}

impl Watch {
    fn start(clusters: &[Arc<Cluster>]) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let (clusters, stop) = (clusters.to_vec(), over.clone());
        let task = tokio::spawn(async move {
            let mut looks = 0;
            while !stop.load(Ordering::Relaxed) {
                if let Some(active) = active(&clusters).await {
                    assert_whole(&clusters, &active).await;
                    looks += 1;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            looks
        });
        Self { over, task }
    }

    async fn end(self) -> usize {
        self.over.store(true, Ordering::Relaxed);
        self.task.await.unwrap()
    }
}

/// Active tenants and the shard of each, as the catalog has it; `None` before there is one.
async fn active(clusters: &[Arc<Cluster>]) -> Option<Vec<(String, String)>> {
    let catalog = clusters[0].connect("postgres", crate::postgres::PASSWORD, "pgusher").await.ok()?;
    let rows = catalog.query("SELECT id, shard FROM pgusher.tenants WHERE status = 'active'", &[]).await.ok()?;
    Some(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

async fn assert_whole(clusters: &[Arc<Cluster>], active: &[(String, String)]) {
    for (at, cluster) in clusters.iter().enumerate() {
        let shard = format!("shard_{}", at + 1);
        let ids: Vec<&str> = active.iter().filter(|(_, s)| *s == shard).map(|(id, _)| id.as_str()).collect();
        if ids.is_empty() {
            continue;
        }
        let admin = cluster.admin("tenants").await;
        let whole: i64 = admin
            .query_one(
                "SELECT count(*) FROM pg_namespace n JOIN pg_roles r ON r.rolname = n.nspname AND r.rolcanlogin \
                 WHERE nspname = ANY($1) AND 2 = (SELECT count(*) FROM pg_class c WHERE relnamespace = n.oid AND \
                 relkind = 'r' AND has_table_privilege(r.oid, c.oid, 'SELECT'))",
                &[&ids],
            )
            .await
            .unwrap()
            .get(0);
        assert_eq!(whole, i64::try_from(ids.len()).unwrap(), "half-made tenants on {shard}");
    }
}

/// Each tenant once, whole, on one shard, and nothing else anywhere.
async fn assert_each_once(clusters: &[Arc<Cluster>]) {
    let active = active(clusters).await.unwrap();
    let ids: BTreeSet<_> = active.iter().map(|(id, _)| id.clone()).collect();
    assert_eq!(ids, (0..TENANTS).map(tenant).collect());
    assert_eq!(active.len(), TENANTS);
    assert_whole(clusters, &active).await;
    let mut places: BTreeMap<String, usize> = BTreeMap::new();
    for cluster in clusters {
        let admin = cluster.admin("tenants").await;
        for row in
            admin.query("SELECT nspname::text FROM pg_namespace WHERE nspname LIKE 'new\\_%'", &[]).await.unwrap()
        {
            *places.entry(row.get(0)).or_default() += 1;
        }
    }
    assert_eq!(places.len(), TENANTS);
    assert!(places.values().all(|&n| n == 1), "{places:?}");
}

/// Connects and works; again if the proxy is not there, as an application does.
async fn served(port: u16, who: usize) -> usize {
    let (began, tenant) = (Instant::now(), tenant(who));
    let mut tries = 0;
    loop {
        tries += 1;
        let attempt = async {
            let client = world::client(port, &tenant).await?;
            client.execute("INSERT INTO bookings (note) VALUES ('here')", &[]).await?;
            let row = client.query_one("SELECT current_user::text, current_schema()::text", &[]).await?;
            assert_eq!((row.get(0), row.get(1)), (tenant.as_str(), tenant.as_str()));
            Ok::<_, tokio_postgres::Error>(())
        };
        match attempt.await {
            Ok(()) => return tries,
            // The proxy's own refusals are not to be expected, its absence is.
            Err(error) if error.as_db_error().is_some() => panic!("{tenant}: {error:?}"),
            Err(error) => assert!(began.elapsed() < Duration::from_secs(90), "{tenant}: {error:?}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn bookings(clusters: &[Arc<Cluster>]) -> i64 {
    let mut sum = 0;
    for (id, shard) in active(clusters).await.unwrap() {
        let at: usize = shard.trim_start_matches("shard_").parse().unwrap();
        let admin = clusters[at - 1].admin("tenants").await;
        sum += admin.query_one(&format!("SELECT count(*) FROM {id}.bookings"), &[]).await.unwrap().get::<_, i64>(0);
    }
    sum
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_clients_for_fifty_new_tenants_at_once() {
    let clusters = clusters(2).await;
    let watch = Watch::start(&clusters);
    let world = World::with_clusters(clusters.clone(), |_| {}).await;
    let port = world.port;
    let tasks: Vec<_> = (0..CLIENTS).map(|who| tokio::spawn(served(port, who))).collect();
    for task in tasks {
        assert_eq!(task.await.unwrap(), 1);
    }
    assert!(watch.end().await > 0);
    assert_each_once(&clusters).await;
    assert_eq!(bookings(&clusters).await, i64::try_from(CLIENTS).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_with_the_proxy_killed_halfway() {
    let clusters = clusters(2).await;
    let setup = Setup::new(&clusters, "");
    let watch = Watch::start(&clusters);
    let process = setup.start().await;
    let port = setup.port;
    let done = Arc::new(AtomicUsize::new(0));
    let tasks: Vec<_> = (0..CLIENTS)
        .map(|who| {
            let done = done.clone();
            tokio::spawn(async move {
                let tries = served(port, who).await;
                done.fetch_add(1, Ordering::Relaxed);
                tries
            })
        })
        .collect();
    // Halfway: some tenants are there, some are not.
    let began = Instant::now();
    loop {
        let made = active(&clusters).await.map_or(0, |active| active.len());
        if made >= 5 {
            assert!(made < TENANTS, "all were made before anybody could kill the proxy");
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(60));
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    process.signal(Signal::SIGKILL);
    drop(process);
    let again = setup.start().await;
    let mut tries = 0;
    for task in tasks {
        tries += task.await.unwrap();
    }
    assert!(tries > CLIENTS, "nobody noticed");
    assert!(watch.end().await > 0);
    assert_each_once(&clusters).await;
    assert!(bookings(&clusters).await >= i64::try_from(CLIENTS).unwrap());
    assert!(!again.log().contains("panicked"), "{}", again.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_with_two_proxies_on_one_catalog() {
    let clusters = clusters(2).await;
    // Together within the servers' max_connections.
    let budget = "[pool]\nmax_db_connections = 45\n";
    let (one, two) = (Setup::new(&clusters, budget), Setup::new(&clusters, budget));
    let watch = Watch::start(&clusters);
    let (first, second) = tokio::join!(one.start(), two.start());
    let ports = [one.port, two.port];
    let tasks: Vec<_> = (0..CLIENTS).map(|who| tokio::spawn(served(ports[who / TENANTS % 2], who))).collect();
    for task in tasks {
        assert_eq!(task.await.unwrap(), 1);
    }
    assert!(watch.end().await > 0);
    assert_each_once(&clusters).await;
    assert_eq!(bookings(&clusters).await, i64::try_from(CLIENTS).unwrap());
    for process in [first, second] {
        assert!(!process.log().contains("panicked"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_template_that_fails_says_where_and_leaves_nothing() {
    let world = World::start(|_| {}).await;
    world.client("good").await;
    let bad = world.config.provision.template_dir.clone().unwrap().join("02_more.sql");
    std::fs::write(
        &bad,
        "-- two lines that are fine\nCREATE TABLE more (a int);\n\nCREATE TABLE broken (a no_such_type);\n",
    )
    .unwrap();
    for _ in 0..2 {
        let error = world::client(world.port, "bad_tenant").await.err().unwrap();
        let db = error.as_db_error().unwrap();
        let all = format!("{} {} {}", db.message(), db.detail().unwrap_or_default(), db.hint().unwrap_or_default());
        assert!(all.contains("02_more.sql") && all.contains("no_such_type"), "{all}");
        assert!(all.contains("line 4") || all.contains(":4"), "{all}");
        assert_eq!(db.code().code(), "42704", "{all}");
    }
    for sql in [
        "SELECT count(*) FROM pg_namespace WHERE nspname = 'bad_tenant'",
        "SELECT count(*) FROM pg_roles WHERE rolname = 'bad_tenant'",
        "SELECT count(*) FROM pg_class WHERE relname IN ('more', 'broken')",
    ] {
        assert_eq!(world.admin_value(sql).await, 0, "{sql}");
    }
    let catalog = world.cluster().admin("pgusher").await;
    let left = catalog.query("SELECT id, status FROM pgusher.tenants WHERE id = 'bad_tenant'", &[]).await.unwrap();
    assert!(left.is_empty(), "{left:?}");
    // Repaired, it works.
    std::fs::write(&bad, "CREATE TABLE more (a int);").unwrap();
    let client = world.client("bad_tenant").await;
    client.query("SELECT * FROM more", &[]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_tenant_is_refused_and_its_sessions_end() {
    let world = World::transaction(|_| {}).await;
    let mut open = world.raw("client_001").await;
    let mut working = world.raw("client_001").await;
    open.query("SELECT 1").await;
    working.compose(|b| b.query("SELECT pg_sleep(30)")).await;
    world.admin_until("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%'", 1).await;
    let id = pgusher::tenant::TenantId::parse("client_001").unwrap();
    world.server.control().delete(&id, "test").await.unwrap();
    for client in [&mut open, &mut working] {
        let last = client.until(b'E').await;
        assert_eq!(last.last().unwrap().code(), "57P01");
        assert!(client.is_closed().await);
    }
    let error = world::client(world.port, "client_001").await.err().unwrap();
    assert_eq!(told(&error), ("55000".into(), "tenant \"client_001\" has been deleted".into()));
    for sql in [
        "SELECT count(*) FROM pg_namespace WHERE nspname = 'client_001'",
        "SELECT count(*) FROM pg_roles WHERE rolname = 'client_001'",
        "SELECT count(*) FROM pg_stat_activity WHERE usename = 'client_001'",
    ] {
        assert_eq!(world.admin_value(sql).await, 0, "{sql}");
    }
}
