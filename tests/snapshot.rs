//! A proxy that starts while the catalog is away: what it serves, and what it learns when the catalog is back.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pgusher::config::{Config, Secret, ShardConfig, User};
use pgusher::directory::Directory;
use pgusher::directory::connector::Endpoint;
use pgusher::directory::snapshot::SnapshotFile;
use pgusher::server::Server;
use pgusher::tenant::credential::client_password;
use pgusher::tenant::{Status, TenantId};
use support::postgres::{Cluster, PASSWORD};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_postgres::{Client, NoTls};

const SECRET: &str = "0123456789abcdef0123456789abcdef";

/// A catalog and a shard, each a cluster of its own, and a place for the snapshot.
struct World {
    catalog: Cluster,
    shard: Cluster,
    dir: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        Self { catalog: Cluster::start(), shard: Cluster::start(), dir: tempfile::tempdir().unwrap() }
    }

    fn file(&self) -> PathBuf {
        self.dir.path().join("catalog.snapshot")
    }

    fn snapshot(&self) -> SnapshotFile {
        let (host, database, user) = ("127.0.0.1".into(), "pgusher".into(), "postgres".into());
        let at = Endpoint { host, port: self.catalog.port(), database, user, password: Secret::default() };
        SnapshotFile::new(&self.file(), &Secret::new(SECRET), &at)
    }

    async fn start(&self) -> Server {
        let mut config = Config::default();
        (config.proxy.listen_port, config.proxy.workers) = (0, 1);
        config.api.listen = String::new();
        config.metrics.listen = "127.0.0.1:0".into();
        config.shards.push(ShardConfig {
            name: "shard_1".into(),
            port: self.shard.port(),
            admin_password: Secret::new(PASSWORD),
            ..ShardConfig::default()
        });
        config.catalog.host = Some("127.0.0.1".into());
        (config.catalog.port, config.catalog.password) = (self.catalog.port(), Secret::new(PASSWORD));
        config.catalog.snapshot_file = Some(self.file());
        config.provision.master_secret = Secret::new(SECRET);
        for (name, auto_provision) in [("maker", true), ("user", false)] {
            let (name, password, tenants) = (name.into(), Secret::new("pw"), vec!["*".into()]);
            config.users.push(User { name, password, tenants, auto_provision });
        }
        Server::start(config).await.unwrap()
    }
}

async fn create(server: &Server, tenants: &[&str]) {
    for tenant in tenants {
        server.control().create(&TenantId::parse(tenant).unwrap(), "test", Default::default()).await.unwrap();
    }
}

async fn connect(server: &Server, user: &str, password: &str) -> Result<Client, tokio_postgres::Error> {
    let address = server.addresses().proxy[0];
    let (client, connection) = tokio_postgres::Config::new()
        .host(address.ip().to_string())
        .port(address.port())
        .user(user)
        .password(password)
        .connect(NoTls)
        .await?;
    tokio::spawn(connection);
    Ok(client)
}

/// Logs in and asks for the schema that it is in; or the SQLSTATE of the refusal.
async fn schema(server: &Server, user: &str, password: &str) -> Result<String, String> {
    let code = |error: tokio_postgres::Error| error.code().unwrap().code().to_owned();
    let client = connect(server, user, password).await.map_err(code)?;
    Ok(client.query_one("SELECT current_schema()::text", &[]).await.map_err(code)?.get(0))
}

async fn http(server: &Server, path: &str) -> String {
    let mut socket = tokio::net::TcpStream::connect(server.addresses().metrics.unwrap()).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    socket.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    answer
}

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < Duration::from_secs(30), "{what} did not happen");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn status(directory: &Arc<Directory>, tenant: &str) -> Option<Status> {
    directory.find(tenant).map(|tenant| tenant.status)
}

fn mode(file: &Path) -> u32 {
    std::fs::metadata(file).unwrap().permissions().mode() & 0o777
}

#[tokio::test(flavor = "multi_thread")]
async fn known_tenants_are_served_without_the_catalog_and_changes_arrive_when_it_is_back() {
    let world = World::new();
    let before = world.start().await;
    create(&before, &["client_001", "client_002", "client_004"]).await;
    before.drain(Duration::ZERO).await;
    assert_eq!(mode(&world.file()), 0o600);

    // What nobody has told the file: one suspended, one new, one gone, a new user. And a row that a reader of changes
    // does not see, because its transaction is an old one: should it turn up, everything was read.
    let catalog = world.catalog.admin("pgusher").await;
    let copy = "INSERT INTO pgusher.tenants (id, plan, shard, database, schema, role, status, changed_in)
                SELECT $ID, plan, shard, database, $ID, $ID, status, '3' FROM pgusher.tenants WHERE id = 'client_001';";
    catalog
        .batch_execute(&format!(
            "UPDATE pgusher.tenants SET status = 'suspended', epoch = epoch + 1 WHERE id = 'client_002';
             DELETE FROM pgusher.tenants WHERE id = 'client_004';
             INSERT INTO pgusher.credentials (name, kind, tenants) VALUES ('late', 'user', '{{*}}');
             {} ALTER TABLE pgusher.tenants DISABLE TRIGGER touch; {} ALTER TABLE pgusher.tenants ENABLE TRIGGER touch",
            copy.replace("$ID", "'client_003'"),
            copy.replace("$ID", "'client_005'"),
        ))
        .await
        .unwrap();
    world.catalog.stop();

    let server = world.start().await;
    let directory = server.control().directory().clone();
    let own = |tenant: &str| client_password(SECRET, tenant);
    assert_eq!(schema(&server, "client_001", &own("client_001")).await.unwrap(), "client_001");
    assert_eq!(schema(&server, "maker.client_002", "pw").await.unwrap(), "client_002");
    assert_eq!(schema(&server, "user.client_004", "pw").await.unwrap(), "client_004");
    // Whether others exist cannot be said; whoever has not proved anything is told nothing.
    assert_eq!(schema(&server, "maker.client_003", "pw").await.unwrap_err(), "57P03");
    assert_eq!(schema(&server, "user.client_003", "pw").await.unwrap_err(), "57P03");
    assert_eq!(schema(&server, "client_003", &own("client_003")).await.unwrap_err(), "28P01");
    assert_eq!(schema(&server, "client_001", "wrong").await.unwrap_err(), "28P01");
    assert!(http(&server, "/readyz").await.ends_with("ready, but the catalog is away\n"));
    assert!(http(&server, "/metrics").await.contains("\npgusher_catalog_up 0\n"));
    let session = connect(&server, "client_001", &own("client_001")).await.unwrap();

    world.catalog.start_again();
    until("following", || server.control().catalog_connected()).await;
    assert_eq!(status(&directory, "client_001"), Some(Status::Active));
    assert_eq!(status(&directory, "client_002"), Some(Status::Suspended));
    assert_eq!(status(&directory, "client_003"), Some(Status::Active));
    assert_eq!(status(&directory, "client_004"), None);
    assert_eq!(status(&directory, "client_005"), None, "everything was read again");
    assert!(directory.user("late").is_some());
    assert!(http(&server, "/readyz").await.ends_with("ready\n"));
    assert_eq!(schema(&server, "user.client_009", "pw").await.unwrap_err(), "3D000");
    assert_eq!(schema(&server, "maker.client_009", "pw").await.unwrap(), "client_009");
    session.batch_execute("SELECT 1").await.unwrap();
    drop(session);
    server.drain(Duration::ZERO).await;
    assert!(world.snapshot().read().unwrap().is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_file_is_left_aside_and_replaced() {
    let world = World::new();
    let before = world.start().await;
    create(&before, &["client_001"]).await;
    before.drain(Duration::ZERO).await;
    let mut bytes = std::fs::read(world.file()).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(world.file(), &bytes).unwrap();
    assert!(world.snapshot().read().is_err());

    let server = world.start().await;
    assert!(server.control().directory().find("client_001").is_some());
    until("writing a good one", || world.snapshot().read().is_ok()).await;
    server.drain(Duration::ZERO).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_catalog_said_is_forgotten() {
    let world = World::new();
    let before = world.start().await;
    create(&before, &["client_001"]).await;
    before.drain(Duration::ZERO).await;
    // At the same address, but not the one that the file is of.
    let admin = world.catalog.admin("postgres").await;
    admin.batch_execute("DROP DATABASE pgusher WITH (FORCE)").await.unwrap();

    let server = world.start().await;
    assert!(server.control().directory().is_empty());
    assert_eq!(schema(&server, "user.client_001", "pw").await.unwrap_err(), "3D000");
    server.drain(Duration::ZERO).await;
}
