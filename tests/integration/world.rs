//! Clusters and a proxy, in this process or in one of its own.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pgusher::config::{Config, Secret, ShardConfig, User};
use pgusher::server::Server;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_postgres::NoTls;

use crate::postgres::{Cluster, PASSWORD, free_port};
use crate::raw::{PATIENCE, Raw};

pub(crate) const SECRET: &str = "0123456789abcdef0123456789abcdef";
pub(crate) const APP_PASSWORD: &str = "app-secret";

/// What every tenant of these tests starts with.
const TEMPLATE: &str = "
    CREATE TABLE bookings (id bigserial PRIMARY KEY, note text);
    CREATE TABLE things (k int PRIMARY KEY, v text);
";

/// Clusters and a proxy in this process.
pub(crate) struct World {
    pub(crate) clusters: Vec<Arc<Cluster>>,
    pub(crate) server: Arc<Server>,
    pub(crate) config: Config,
    pub(crate) port: u16,
    pub(crate) metrics_port: u16,
    /// Holds the template.
    _dir: tempfile::TempDir,
}

/// A directory with a template.
pub(crate) fn template(dir: &Path, sql: &str) -> PathBuf {
    let path = dir.join("template");
    std::fs::create_dir_all(&path).unwrap();
    std::fs::write(path.join("01_tables.sql"), sql).unwrap();
    path
}

/// A configuration for these clusters, with an application user `app` for all tenants.
pub(crate) fn config(clusters: &[Arc<Cluster>], dir: &Path) -> Config {
    let mut config = Config::default();
    for (at, cluster) in clusters.iter().enumerate() {
        config.shards.push(ShardConfig {
            name: format!("shard_{}", at + 1),
            port: cluster.port(),
            admin_password: Secret::new(PASSWORD),
            ..ShardConfig::default()
        });
    }
    config.users.push(User {
        name: "app".into(),
        password: Secret::new(APP_PASSWORD),
        tenants: vec!["*".into()],
        auto_provision: true,
    });
    config.proxy.listen_port = 0;
    config.proxy.workers = 2;
    config.provision.master_secret = Secret::new(SECRET);
    config.provision.template_dir = Some(template(dir, TEMPLATE));
    config.api.listen = "127.0.0.1:0".into();
    config.metrics.listen = "127.0.0.1:0".into();
    config
}

impl World {
    /// One shard.
    pub(crate) async fn start(change: impl FnOnce(&mut Config)) -> Self {
        Self::with_clusters(vec![Arc::new(Cluster::start())], change).await
    }

    /// One shard, `pool_mode = "transaction"`.
    pub(crate) async fn transaction(change: impl FnOnce(&mut Config)) -> Self {
        Self::start(|config| {
            config.pool.pool_mode = pgusher::config::PoolMode::Transaction;
            change(config);
        })
        .await
    }

    pub(crate) async fn with_clusters(clusters: Vec<Arc<Cluster>>, change: impl FnOnce(&mut Config)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = config(&clusters, dir.path());
        change(&mut config);
        let server = Arc::new(Server::start(config.clone()).await.unwrap());
        let addresses = server.addresses();
        let port = addresses.proxy[0].port();
        let metrics_port = addresses.metrics.unwrap().port();
        Self { clusters, server, config, port, metrics_port, _dir: dir }
    }

    /// The first cluster.
    pub(crate) fn cluster(&self) -> &Cluster {
        &self.clusters[0]
    }

    /// A driver's connection as application user, for the tenant.
    pub(crate) async fn client(&self, tenant: &str) -> tokio_postgres::Client {
        client(self.port, tenant).await.unwrap()
    }

    /// A connection of bytes as application user, for the tenant.
    pub(crate) async fn raw(&self, tenant: &str) -> Raw {
        self.raw_with(tenant, &[]).await
    }

    /// The same with startup parameters.
    pub(crate) async fn raw_with(&self, tenant: &str, parameters: &[(&str, &str)]) -> Raw {
        raw(self.port, tenant, parameters).await.unwrap_or_else(|refused| panic!("{}", refused.error.field(b'M')))
    }

    /// Value of a metric, by its whole name with labels; 0 if there is none.
    pub(crate) async fn metric(&self, name: &str) -> f64 {
        metric(self.metrics_port, name).await
    }

    /// A value that the superuser sees in the tenants' database of the first shard.
    pub(crate) async fn admin_value(&self, sql: &str) -> i64 {
        let admin = self.cluster().admin("tenants").await;
        admin.query_one(sql, &[]).await.unwrap().get(0)
    }

    /// Server processes of tenants, as the server sees them.
    pub(crate) async fn server_processes(&self) -> i64 {
        self.admin_value("SELECT count(*) FROM pg_stat_activity WHERE datname = 'tenants' AND usename <> 'postgres'")
            .await
    }

    /// Waits until a number that the superuser sees is as expected.
    pub(crate) async fn admin_until(&self, sql: &str, expected: i64) {
        let admin = self.cluster().admin("tenants").await;
        let began = Instant::now();
        loop {
            let value: i64 = admin.query_one(sql, &[]).await.unwrap().get(0);
            if value == expected {
                return;
            }
            assert!(began.elapsed() < PATIENCE, "{sql} stays {value}, not {expected}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits until a metric has a value.
    pub(crate) async fn metric_until(&self, name: &str, expected: f64) {
        let began = Instant::now();
        loop {
            let value = self.metric(name).await;
            if value == expected {
                return;
            }
            assert!(began.elapsed() < PATIENCE, "{name} stays {value}, not {expected}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// A driver's connection as application user, for the tenant.
pub(crate) async fn client(port: u16, tenant: &str) -> Result<tokio_postgres::Client, tokio_postgres::Error> {
    let (client, connection) = tokio_postgres::Config::new()
        .host("127.0.0.1")
        .port(port)
        .user(format!("app.{tenant}"))
        .password(APP_PASSWORD)
        .dbname(tenant)
        .connect(NoTls)
        .await?;
    tokio::spawn(connection);
    Ok(client)
}

/// A connection of bytes as application user, for the tenant.
pub(crate) async fn raw(port: u16, tenant: &str, parameters: &[(&str, &str)]) -> Result<Raw, crate::raw::Refused> {
    let user = format!("app.{tenant}");
    let mut all = vec![("user", user.as_str()), ("database", tenant)];
    all.extend_from_slice(parameters);
    Raw::login(port, &all, APP_PASSWORD).await
}

/// What a driver was told.
pub(crate) fn told(error: &tokio_postgres::Error) -> (String, String) {
    let db = error.as_db_error().unwrap_or_else(|| panic!("{error:?}"));
    (db.code().code().to_owned(), db.message().to_owned())
}

pub(crate) async fn http_get(port: u16, path: &str) -> String {
    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

pub(crate) async fn metric(port: u16, name: &str) -> f64 {
    let answer = http_get(port, "/metrics").await;
    let found = answer.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
    found.unwrap_or_default()
}

/// `pgusher serve` in a process of its own.
pub(crate) struct Process {
    child: Child,
    log: PathBuf,
}

/// What a process is started with; the same again starts its successor.
pub(crate) struct Setup {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) port: u16,
    pub(crate) metrics_port: u16,
}

impl Setup {
    /// Writes a configuration; `more` is TOML that comes first.
    pub(crate) fn new(clusters: &[Arc<Cluster>], more: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let template = template(dir.path(), TEMPLATE);
        let mut text = format!(
            "{more}\n[api]\nlisten = \"\"\n[provision]\nmaster_secret = \"{SECRET}\"\ntemplate_dir = \"{}\"\n\
             [[users]]\nname = \"app\"\npassword = \"{APP_PASSWORD}\"\ntenants = [\"*\"]\nauto_provision = true\n",
            template.display()
        );
        for (at, cluster) in clusters.iter().enumerate() {
            text.push_str(&format!(
                "[[shards]]\nname = \"shard_{}\"\nhost = \"127.0.0.1\"\nport = {}\nadmin_password = \"{PASSWORD}\"\n",
                at + 1,
                cluster.port()
            ));
        }
        std::fs::write(dir.path().join("pgusher.toml"), text).unwrap();
        Self { dir, port: free_port(), metrics_port: free_port() }
    }

    /// Where the configuration is.
    pub(crate) fn file(&self) -> PathBuf {
        self.dir.path().join("pgusher.toml")
    }

    /// Starts the proxy and waits until it serves.
    pub(crate) async fn start(&self) -> Process {
        let log = self.dir.path().join("log");
        let output = std::fs::OpenOptions::new().create(true).append(true).open(&log).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_pgusher"))
            .args(["serve", "--config"])
            .arg(self.file())
            .env("PGUSHER_PROXY_LISTEN_PORT", self.port.to_string())
            .env("PGUSHER_METRICS_LISTEN", format!("127.0.0.1:{}", self.metrics_port))
            .env("RUST_BACKTRACE", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(output)
            .spawn()
            .unwrap();
        let mut process = Process { child, log };
        let began = Instant::now();
        while tokio::net::TcpStream::connect(("127.0.0.1", self.metrics_port)).await.is_err() {
            assert!(process.child.try_wait().unwrap().is_none(), "it did not start: {}", process.log());
            assert!(began.elapsed() < PATIENCE, "it does not listen: {}", process.log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        process
    }
}

impl Process {
    /// What it has written so far (with what its predecessors wrote).
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub(crate) fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        nix::sys::signal::kill(pid, signal).unwrap();
    }

    /// Whether it still runs.
    pub(crate) fn runs(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits for its end.
    pub(crate) async fn exit_code(&mut self) -> Option<i32> {
        let began = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(began.elapsed() < PATIENCE, "it does not end: {}", self.log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Resident memory in kB.
    pub(crate) fn resident_kb(&self) -> u64 {
        self.status("VmRSS:")
    }

    /// The largest resident memory so far in kB.
    pub(crate) fn peak_kb(&self) -> u64 {
        self.status("VmHWM:")
    }

    fn status(&self, name: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
