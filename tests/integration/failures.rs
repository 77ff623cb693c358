//! Server processes, shards and the catalog die; those who depend on them are told so, nobody else notices.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pgusher::config::PoolMode;

use crate::postgres::Cluster;
use crate::raw::{PATIENCE, Raw, show};
use crate::world::{self, World};

/// Catalog on a cluster of its own, two shards; a tenant on each shard.
async fn three(change: impl FnOnce(&mut pgusher::config::Config)) -> (World, Arc<Cluster>, [String; 2]) {
    let start = || tokio::task::spawn_blocking(|| Arc::new(Cluster::start()));
    let (catalog, one, two) = tokio::join!(start(), start(), start());
    let (catalog, one, two) = (catalog.unwrap(), one.unwrap(), two.unwrap());
    let world = World::with_clusters(vec![one, two], |config| {
        config.catalog.host = Some("127.0.0.1".into());
        config.catalog.port = catalog.port();
        config.catalog.password = pgusher::config::Secret::new(crate::postgres::PASSWORD);
        change(config);
    })
    .await;
    let mut tenants = [None, None];
    for n in 0.. {
        let name = format!("t{n}");
        world.client(&name).await;
        let at = usize::from(world.server.control().directory().find(&name).unwrap().shard.name == "shard_2");
        tenants[at].get_or_insert(name);
        if tenants.iter().all(Option::is_some) {
            break;
        }
    }
    (world, catalog, tenants.map(Option::unwrap))
}

/// Works as soon as the server is back, by itself.
async fn works_again(port: u16, tenant: &str) {
    let began = Instant::now();
    loop {
        match world::raw(port, tenant, &[]).await {
            Ok(mut raw) => {
                let said = show(&raw.query("SELECT 1").await);
                if said == "D(1) C(SELECT 1) Z(I)" {
                    return;
                }
            }
            Err(refused) => assert!(["08001", "57P03"].contains(&refused.error.code().as_str()), "{refused:?}"),
        }
        assert!(began.elapsed() < PATIENCE, "{tenant} does not come back");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn assert_hint(messages: &[crate::raw::Message], codes: &[&str]) {
    let error = messages.iter().find(|m| m.tag == b'E').unwrap_or_else(|| panic!("no error: {}", show(messages)));
    assert!(codes.contains(&error.code().as_str()), "{} {}", error.code(), error.field(b'M'));
    if codes != ["57P01"] {
        assert!(!error.field(b'H').is_empty(), "no hint: {} {}", error.code(), error.field(b'M'));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_process_that_ends() {
    for mode in [PoolMode::Auto, PoolMode::Session, PoolMode::Transaction] {
        let world = World::start(|config| config.pool.pool_mode = mode).await;
        let mut bystander = world.raw("client_002").await;
        let admin = {
            world.client("client_001").await;
            world.cluster().admin("tenants").await
        };
        // The server's own last words reach the client: running, in a transaction, in the middle of results.
        for sql in
            ["SELECT pg_sleep(30)", "BEGIN", "SELECT repeat('x', 1000), pg_sleep(0.01) FROM generate_series(1, 3000)"]
        {
            let mut raw = world.raw("client_001").await;
            let pid = raw.value("SELECT pg_backend_pid()").await;
            raw.compose(|b| b.query(sql)).await;
            if sql == "BEGIN" {
                raw.until_ready().await;
            } else {
                let running = format!(
                    "SELECT count(*) FROM pg_stat_activity WHERE pid = {pid} AND query LIKE '%sleep%' AND state = 'active'"
                );
                world.admin_until(&running, 1).await;
            }
            admin.execute(&format!("SELECT pg_terminate_backend({pid})"), &[]).await.unwrap();
            let said = raw.until_ready().await;
            assert_hint(&said, &["57P01"]);
            assert_eq!(said.last().unwrap().tag, b'E', "{mode:?} {sql}");
        }
        // While nobody uses it, nobody notices (in transaction mode).
        if mode == PoolMode::Transaction {
            let mut raw = world.raw("client_001").await;
            let pid = raw.value("SELECT pg_backend_pid()").await;
            admin.execute(&format!("SELECT pg_terminate_backend({pid})"), &[]).await.unwrap();
            world.admin_until(&format!("SELECT count(*) FROM pg_stat_activity WHERE pid = {pid}"), 0).await;
            assert_ne!(raw.value("SELECT pg_backend_pid()").await, pid);
        }
        assert_eq!(bystander.value("SELECT 1").await, "1");
        drop(admin);

        // kill -9: the server restarts all of its processes; the client is told in our words or the server's.
        let mut raw = world.raw("client_001").await;
        let pid: i32 = raw.value("SELECT pg_backend_pid()").await.parse().unwrap();
        raw.query("BEGIN").await;
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
        raw.compose(|b| b.query("SELECT 1")).await;
        let said = raw.until_ready().await;
        assert_hint(&said, &["08006"]);
        works_again(world.port, "client_001").await;
        works_again(world.port, "client_002").await;
        world.metric_until("pgusher_server_connections{shard=\"shard_1\",state=\"active\"}", 0.0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shard_that_stops_and_comes_back() {
    let (world, _catalog, [here, there]) = three(|config| config.pool.pool_mode = PoolMode::Transaction).await;
    let mut busy = world.raw(&here).await;
    let mut idle = world.raw(&here).await;
    let mut bystander = world.raw(&there).await;
    idle.query("SELECT 1").await;
    busy.compose(|b| b.query("SELECT pg_sleep(30)")).await;
    world.admin_until("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%'", 1).await;
    let other = tokio::spawn({
        let tenant = there.clone();
        let port = world.port;
        async move {
            let mut raw = world::raw(port, &tenant, &[]).await.ok().unwrap();
            for _ in 0..100 {
                assert_eq!(raw.value("SELECT 2").await, "2");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    });
    let shard = world.clusters[0].clone();
    tokio::task::spawn_blocking(move || shard.stop()).await.unwrap();
    // An immediate shutdown has words of its own; a crash has none.
    let said = busy.until_ready().await;
    assert!(["57P02", "57P01", "08006"].contains(&said.iter().find(|m| m.tag == b'E').unwrap().code().as_str()));
    // Who had no server connection keeps its own, and is told what is the matter with each request.
    for _ in 0..2 {
        let error = idle.error("SELECT 1").await;
        assert_eq!(error.code(), "08001");
        assert!(error.field(b'M').contains("shard_1") && !error.field(b'H').is_empty());
    }
    // A new client is refused, or greeted from memory and told at its first query.
    let error = match world::raw(world.port, &here, &[]).await {
        Err(refused) => refused.error,
        Ok(mut raw) => raw.error("SELECT 1").await,
    };
    assert_hint(&[error], &["08001"]);
    assert_eq!(bystander.value("SELECT 1").await, "1");
    let began = Instant::now();
    assert_eq!(idle.error("SELECT 1").await.code(), "08001");
    assert!(began.elapsed() < Duration::from_secs(5), "a shard that refuses is not waited for");
    other.await.unwrap();
    let shard = world.clusters[0].clone();
    tokio::task::spawn_blocking(move || shard.start_again()).await.unwrap();
    works_again(world.port, &here).await;
    assert_eq!(idle.value("SELECT 3").await, "3");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_catalog_goes_away_and_known_tenants_go_on() {
    let (world, catalog, [one, two]) = three(|_| {}).await;
    let mut open = world.raw(&one).await;
    let stop = catalog.clone();
    tokio::task::spawn_blocking(move || stop.stop()).await.unwrap();
    world.metric_until("pgusher_catalog_up", 0.0).await;
    assert_eq!(open.value("SELECT 1").await, "1");
    for tenant in [&one, &two] {
        let mut raw = world.raw(tenant).await;
        assert_eq!(raw.value("SELECT current_user").await, *tenant);
    }
    // A new one cannot be made now.
    let refused = world::raw(world.port, "brand_new", &[]).await.err().unwrap();
    assert!(["08001", "57P03", "08006"].contains(&refused.error.code().as_str()), "{:?}", refused.error);
    assert!(!refused.error.field(b'H').is_empty(), "{}", refused.error.field(b'M'));
    let start = catalog.clone();
    tokio::task::spawn_blocking(move || start.start_again()).await.unwrap();
    world.metric_until("pgusher_catalog_up", 1.0).await;
    let mut raw = world.raw("brand_new").await;
    assert_eq!(raw.value("SELECT count(*) FROM bookings").await, "0");
    // What others change is followed again.
    let other = catalog.admin("pgusher").await;
    other
        .batch_execute(&format!(
            "UPDATE pgusher.tenants SET status = 'suspended', epoch = epoch + 1, changed_in = pg_current_xact_id() WHERE id = '{two}'"
        ))
        .await
        .unwrap();
    let began = Instant::now();
    while world::raw(world.port, &two, &[]).await.is_ok() {
        assert!(began.elapsed() < PATIENCE, "the change is not followed");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A server that accepts and says nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_silent_is_given_up() {
    let world = World::transaction(|config| {
        config.pool.server_connect_timeout = Duration::from_millis(500);
        config.pool.server_idle_timeout = Duration::from_secs(1);
    })
    .await;
    let mut raw: Raw = world.raw("client_001").await;
    raw.query("SELECT 1").await;
    world.admin_until("SELECT count(*) FROM pg_stat_activity WHERE usename = 'client_001'", 0).await;
    let shard = world.clusters[0].clone();
    let port = shard.port();
    tokio::task::spawn_blocking(move || shard.stop()).await.unwrap();
    let silent = tokio::net::TcpListener::bind(("127.0.0.1", port)).await.unwrap();
    let error = raw.error("SELECT 1").await;
    assert_eq!(error.code(), "08001");
    assert!(error.field(b'D').contains("server_connect_timeout"), "{}", error.field(b'D'));
    drop(silent);
}

/// Others have taken all of the server's connections: one waits, as for one's own budget, and works when they go.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_full_is_waited_for() {
    let cluster = tokio::task::spawn_blocking(|| Arc::new(Cluster::start_with(&["max_connections=20"]))).await.unwrap();
    let world = World::with_clusters(vec![cluster.clone()], |config| {
        config.pool.pool_mode = PoolMode::Transaction;
        config.pool.query_wait_timeout = Duration::from_secs(5);
    })
    .await;
    world.raw("client_001").await.terminate().await;
    cluster
        .admin("tenants")
        .await
        .batch_execute("CREATE ROLE hog LOGIN PASSWORD 'hog'; GRANT CONNECT ON DATABASE tenants TO hog")
        .await
        .unwrap();
    let mut hogs = Vec::new();
    while let Ok(hog) = cluster.connect("hog", "hog", "tenants").await {
        hogs.push(hog);
    }
    let mut one = world.raw("client_001").await;
    let mut held = world.raw("client_001").await;
    held.query("BEGIN").await;
    one.compose(|b| b.query("SELECT 'served'")).await;
    world.metric_until("pgusher_clients{state=\"waiting\"}", 1.0).await;
    hogs.clear();
    assert_eq!(show(&one.until_ready().await), "D(served) C(SELECT 1) Z(I)");
    assert_eq!(show(&held.query("COMMIT").await), "C(COMMIT) Z(I)");
}
