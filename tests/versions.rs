//! What differs between versions of PostgreSQL, seen through the proxy. `make test-matrix` runs it on several.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::time::Duration;

use pgusher::config::{Config, PoolMode, Secret, ShardConfig};
use pgusher::server::Server;
use pgusher::tenant::TenantId;
use pgusher::tenant::credential::client_password;
use support::postgres::{Cluster, PASSWORD};
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

const SECRET: &str = "0123456789abcdef0123456789abcdef";
const PATH: &str = "client_001, tenant_shim, pg_catalog";

async fn start(cluster: &Cluster, servers: usize) -> Server {
    let mut config = Config::default();
    (config.proxy.listen_port, config.proxy.workers) = (0, 1);
    (config.pool.pool_mode, config.pool.default_pool_size) = (PoolMode::Transaction, servers);
    config.api.listen = String::new();
    config.metrics.listen = String::new();
    config.shards.push(ShardConfig {
        name: "shard_1".into(),
        port: cluster.port(),
        admin_password: Secret::new(PASSWORD),
        ..ShardConfig::default()
    });
    config.provision.master_secret = Secret::new(SECRET);
    let server = Server::start(config).await.unwrap();
    for tenant in ["client_001", "client_002"] {
        server.control().create(&TenantId::parse(tenant).unwrap(), "test", Default::default()).await.unwrap();
    }
    server
}

async fn connect(server: &Server) -> Client {
    let address = server.addresses().proxy[0];
    let (client, connection) = tokio_postgres::Config::new()
        .host(address.ip().to_string())
        .port(address.port())
        .user("client_001")
        .password(client_password(SECRET, "client_001"))
        .dbname("client_001")
        .connect(NoTls)
        .await
        .unwrap();
    tokio::spawn(connection);
    client
}

async fn ask(client: &Client, sql: &str) -> String {
    let rows = client.simple_query(sql).await.unwrap();
    let row = rows.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    });
    row.unwrap().get(0).unwrap().replace('"', "")
}

async fn version(cluster: &Cluster) -> u32 {
    let row = cluster.admin("postgres").await;
    let row = row.query_one("SELECT current_setting('server_version_num')::int / 10000", &[]).await.unwrap();
    row.get::<_, i32>(0).try_into().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_that_the_server_reports_follow_their_client_and_no_other() {
    let cluster = Cluster::start();
    let reports_path = version(&cluster).await >= 18;
    // One server connection for both clients.
    let server = start(&cluster, 1).await;
    let (one, other) = (connect(&server).await, connect(&server).await);
    assert_eq!(ask(&one, "SHOW search_path").await, PATH);
    one.batch_execute("SET TimeZone = 'Pacific/Auckland'").await.unwrap();
    one.batch_execute("SET search_path = pg_temp, client_001").await.unwrap();
    for _ in 0..2 {
        assert_eq!(ask(&other, "SHOW search_path").await, PATH);
        assert_ne!(ask(&other, "SHOW TimeZone").await, "Pacific/Auckland");
        assert_eq!(ask(&one, "SHOW TimeZone").await, "Pacific/Auckland");
        let expected = if reports_path { "pg_temp, client_001" } else { PATH };
        assert_eq!(ask(&one, "SHOW search_path").await, expected);
    }
    // What was true when the client came is what RESET returns to.
    one.batch_execute("RESET ALL").await.unwrap();
    assert_eq!(ask(&one, "SHOW search_path").await, PATH);
    assert_eq!(ask(&other, "SHOW search_path").await, PATH);
    // A path that was rolled back was never there.
    one.batch_execute("BEGIN; SET search_path = pg_temp; ROLLBACK").await.unwrap();
    assert_eq!(ask(&one, "SHOW search_path").await, PATH);
    drop((one, other));
    server.drain(Duration::ZERO).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_cannot_become_what_it_is_a_member_of() {
    let cluster = Cluster::start();
    let since_16 = version(&cluster).await >= 16;
    let server = start(&cluster, 1).await;
    let client = connect(&server).await;
    for statement in ["SET ROLE client_002", "SET ROLE provisioner", "SET SESSION AUTHORIZATION client_002"] {
        let refused = client.batch_execute(statement).await.unwrap_err();
        assert_eq!(refused.code().unwrap().code(), "42501", "{statement}");
    }
    // Before 16 PostgreSQL lets a member become its group, which owns nothing.
    if since_16 {
        assert!(client.batch_execute("BEGIN; SET LOCAL ROLE app_tenants").await.is_err());
    }
    drop(client);
    server.drain(Duration::ZERO).await;
}
