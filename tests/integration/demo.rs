//! What an operator checks first: two tenants apart from each other, pgbench, large tables.

use std::process::Command;

use futures_util::{SinkExt as _, TryStreamExt as _};

use crate::postgres::{Cluster, client_program};
use crate::world::{self, APP_PASSWORD, Setup, World};

async fn psql(port: u16, tenant: &str, arguments: &[&str]) -> String {
    let dsn = format!("postgresql://app.{tenant}:{APP_PASSWORD}@127.0.0.1:{port}/{tenant}");
    let mut command = Command::new(client_program("psql"));
    command.args(["-XAtq", "-v", "ON_ERROR_STOP=1", &dsn]).args(arguments);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn one_tenants_bookings_are_not_anothers() {
    let start = || tokio::task::spawn_blocking(|| std::sync::Arc::new(Cluster::start()));
    let (one, two) = tokio::join!(start(), start());
    let world = World::with_clusters(vec![one.unwrap(), two.unwrap()], |_| {}).await;
    psql(world.port, "client_001", &["-c", "INSERT INTO bookings (note) VALUES ('mine')"]).await;
    assert_eq!(psql(world.port, "client_002", &["-c", "SELECT count(*) FROM bookings"]).await, "0");
    assert_eq!(psql(world.port, "client_001", &["-c", "SELECT note FROM bookings"]).await, "mine");
    for tenant in ["client_001", "client_002"] {
        let tables = psql(world.port, tenant, &["-c", "\\dt"]).await;
        let expected = format!("{tenant}|bookings|table|");
        assert!(tables.lines().count() == 2 && tables.contains(&expected), "{tables}");
        // Where the catalog says, and nowhere else.
        let shard = world.server.control().directory().find(tenant).unwrap().shard.name.clone();
        for (at, cluster) in world.clusters.iter().enumerate() {
            let here = shard == format!("shard_{}", at + 1);
            let sql = "SELECT count(*) FROM pg_tables WHERE schemaname = $1";
            let Ok(admin) = cluster.connect("postgres", crate::postgres::PASSWORD, "tenants").await else {
                assert!(!here);
                continue;
            };
            let tables: i64 = admin.query_one(sql, &[&tenant]).await.unwrap().get(0);
            assert_eq!(tables, if here { 2 } else { 0 }, "{tenant} on {at}");
        }
    }
}

async fn pgbench(port: u16, tenant: &'static str, arguments: Vec<String>) -> String {
    let mut command = Command::new(client_program("pgbench"));
    command
        .args(["-h", "127.0.0.1", "-p", &port.to_string(), "-U", &format!("app.{tenant}")])
        .args(arguments)
        .arg(tenant)
        .env("PGPASSWORD", APP_PASSWORD);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success() && !err.contains("aborted"), "{tenant}: {out}\n{err}");
    out
}

/// Builtin scripts in all query modes, as two tenants at the same time, in a pool mode.
async fn bench(mode: &str, seconds: u32, clients: u32) {
    let cluster = tokio::task::spawn_blocking(|| std::sync::Arc::new(Cluster::start())).await.unwrap();
    let setup = Setup::new(
        std::slice::from_ref(&cluster),
        &format!("[pool]\npool_mode = \"{mode}\"\ndefault_pool_size = 40\n"),
    );
    let process = setup.start().await;
    let tenants = ["client_001", "client_002"];
    let run = async |arguments: &[&str]| {
        let arguments: Vec<String> = arguments.iter().map(|&a| a.to_owned()).collect();
        let runs = tenants.map(|tenant| pgbench(setup.port, tenant, arguments.clone()));
        futures_util::future::join_all(runs).await
    };
    run(&["-i", "-s", "1", "-q"]).await;
    let (clients, seconds) = (clients.to_string(), seconds.to_string());
    for protocol in ["simple", "extended", "prepared"] {
        for script in ["tpcb-like", "simple-update", "select-only"] {
            psql_all(&setup, &tenants, "TRUNCATE pgbench_history").await;
            let said = run(&["-n", "-c", &clients, "-j", "2", "-T", &seconds, "-M", protocol, "-b", script]).await;
            for (tenant, said) in tenants.iter().zip(said) {
                let find = |what: &str| said.lines().find_map(|line| line.strip_prefix(what)).unwrap().to_owned();
                let done = find("number of transactions actually processed: ");
                let history = psql(setup.port, tenant, &["-c", "SELECT count(*) FROM pgbench_history"]).await;
                let expected = if script == "select-only" { "0" } else { done.as_str() };
                assert_eq!(history, expected, "{mode} {protocol} {script} {tenant}");
                assert!(done.parse::<u64>().unwrap() > 0);
                assert!(said.contains("number of failed transactions: 0 "), "{said}");
            }
        }
    }
    assert!(!process.log().contains("panicked") && !process.log().contains("out of step"), "{}", process.log());
}

async fn psql_all(setup: &Setup, tenants: &[&str], sql: &str) {
    for tenant in tenants {
        psql(setup.port, tenant, &["-c", sql]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pgbench_in_session_mode() {
    bench("session", 1, 8).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pgbench_in_transaction_mode() {
    bench("transaction", 1, 8).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes ten minutes: make test-full"]
async fn pgbench_for_thirty_seconds_each() {
    bench("session", 30, 32).await;
    bench("transaction", 30, 32).await;
}

/// A table of so many MB in and out by COPY, and one value, while the proxy stays small.
async fn large(table_mb: usize, value_mb: usize) {
    for mode in ["session", "transaction"] {
        let cluster = tokio::task::spawn_blocking(|| std::sync::Arc::new(Cluster::start())).await.unwrap();
        let setup = Setup::new(std::slice::from_ref(&cluster), &format!("[pool]\npool_mode = \"{mode}\"\n"));
        let process = setup.start().await;
        let client = world::client(setup.port, "client_001").await.unwrap();
        client.batch_execute("CREATE UNLOGGED TABLE big (line text)").await.unwrap();
        let line = format!("{}\n", "x".repeat(1023));
        let chunk = bytes::Bytes::from(line.repeat(1024));
        let sink = client.copy_in("COPY big FROM stdin").await.unwrap();
        let mut sink = std::pin::pin!(sink);
        for _ in 0..table_mb {
            sink.feed(chunk.clone()).await.unwrap();
        }
        assert_eq!(usize::try_from(sink.finish().await.unwrap()).unwrap(), table_mb * 1024);
        let stream = client.copy_out("COPY big TO stdout").await.unwrap();
        let stream = std::pin::pin!(stream);
        let bytes = stream.map_ok(|bytes| bytes.len()).try_fold(0, async |sum, n| Ok(sum + n)).await.unwrap();
        assert_eq!(bytes, table_mb << 20);
        // One value, out and in.
        let size = i32::try_from(value_mb << 20).unwrap();
        let row = client.query_one("SELECT repeat('y', $1)", &[&size]).await.unwrap();
        let value: &str = row.get(0);
        assert_eq!(value.len(), value_mb << 20);
        let row = client.query_one("SELECT length($1::text)", &[&value]).await.unwrap();
        assert_eq!(row.get::<_, i32>(0), size);
        let peak = process.peak_kb();
        assert!(peak < 64 * 1024, "{mode}: {peak} kB resident");
        println!("{mode}: {table_mb} MB in and out, a value of {value_mb} MB: {peak} kB resident at most");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn large_tables_and_values_do_not_make_the_proxy_large() {
    large(64, 30).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "moves 2.4 GB: make test-full"]
async fn a_gigabyte_does_not_make_the_proxy_large() {
    large(1024, 200).await;
}
