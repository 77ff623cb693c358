//! The proxy under attack: one that runs already, or `pgusher dev` of our own.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::Error;
use super::client::Login;
use super::corpus::{ATTACKER, VICTIM};

/// The tables of every tenant; under plan `rls` the product makes shared ones of them.
pub const TABLES: &str = "
    CREATE TABLE users(id bigserial PRIMARY KEY, email text UNIQUE, note text);
    CREATE TABLE services(id bigserial PRIMARY KEY, name text UNIQUE, note text);
    CREATE TABLE bookings(id bigserial PRIMARY KEY, user_id bigint REFERENCES users,
                          service_id bigint REFERENCES services, note text);";

/// The tenants of every corpus.
pub const TENANTS: [&str; 2] = ["client_001", "client_002"];

/// The tenant that an entry means.
pub fn tenant(role: &str) -> &str {
    match role {
        ATTACKER | "" => TENANTS[0],
        VICTIM => TENANTS[1],
        other => other,
    }
}

/// How to reach the proxy, and the servers behind it.
#[derive(Debug, Clone)]
pub struct Target {
    /// By tenant.
    pub logins: BTreeMap<String, Login>,
    /// DSN of a superuser on the tenant's server, by tenant.
    pub admins: BTreeMap<String, String>,
    /// `host:port` of `/metrics`.
    pub metrics: Option<String>,
}

/// What the proxy is to do; what is `None` is left to its defaults.
#[derive(Debug, Clone, Default)]
pub struct Rules {
    pub plan: String,
    pub pool_mode: String,
    pub hardening: Option<String>,
    pub guard: Option<String>,
    /// More of the configuration: variables such as `PGUSHER_POOL_MAX_DB_CONNECTIONS`.
    pub variables: Vec<(String, String)>,
}

/// A `pgusher dev`, stopped on drop.
pub struct Dev {
    child: Child,
    dir: tempfile::TempDir,
    pub ready: Value,
}

impl Dev {
    /// Starts it and waits until it is ready. `None` where there is no PostgreSQL.
    ///
    /// # Errors
    /// It did not start.
    pub async fn start(program: &Path, rules: &Rules) -> Result<Option<Self>, Error> {
        let dir = tempfile::Builder::new().prefix("attack").tempdir()?;
        let config = dir.path().join("pgusher.toml");
        let template = dir.path().join("template");
        std::fs::create_dir(&template)?;
        std::fs::write(template.join("tables.sql"), TABLES)?;
        std::fs::write(&config, configuration(rules, &template))?;
        let log = dir.path().join("log");
        let mut command = Command::new(program);
        command
            // Plan `cluster` makes more of them: one for each tenant, and one for the catalog.
            .args(["dev", "--json", "--port", "0", "--shards", "1", "--tenants", &TENANTS.join(",")])
            .arg("--config")
            .arg(&config);
        for (key, value) in [("PROVISION_HARDENING", &rules.hardening), ("GUARD_MODE", &rules.guard)] {
            if let Some(value) = value {
                command.env(format!("PGUSHER_{key}"), value);
            }
        }
        command.envs(rules.variables.iter().cloned());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(std::fs::File::create(&log)?);
        let mut child = command.spawn().map_err(|error| format!("{}: {error}", program.display()))?;
        let out = child.stdout.take().ok_or("no standard output")?;
        let line = tokio::task::spawn_blocking(move || {
            use std::io::BufRead as _;
            let mut line = String::new();
            std::io::BufReader::new(out).read_line(&mut line).map(|_| line)
        })
        .await??;
        if line.is_empty() {
            let _ = child.wait();
            let message = std::fs::read_to_string(&log)?;
            if message.contains("PostgreSQL's programs") {
                return Ok(None);
            }
            return Err(format!("pgusher dev did not start: {message}").into());
        }
        Ok(Some(Self { child, dir, ready: serde_json::from_str(&line)? }))
    }

    /// How to reach it.
    ///
    /// # Errors
    /// It did not say so.
    pub fn target(&self, plan: &str) -> Result<Target, Error> {
        let text = |value: &Value, name: &str| {
            value[name].as_str().map(str::to_owned).ok_or_else(|| format!("pgusher dev does not say {name}"))
        };
        let list = |name: &str| self.ready[name].as_array().cloned().unwrap_or_default();
        let shards: BTreeMap<String, String> = list("shards")
            .iter()
            .map(|shard| Ok((text(shard, "name")?, text(shard, "admin_dsn")?)))
            .collect::<Result<_, Error>>()?;
        let (mut logins, mut admins) = (BTreeMap::new(), BTreeMap::new());
        for seat in list("tenants") {
            let id = text(&seat, "id")?;
            let admin = shards.get(&text(&seat, "shard")?).ok_or("a tenant on an unknown shard")?;
            logins.insert(id.clone(), login(&text(&seat, "dsn")?)?);
            let admin = match seat["database"].as_str() {
                Some(database) => in_database(admin, database)?,
                None => admin_of(plan, admin, &id)?,
            };
            admins.insert(id.clone(), admin);
        }
        let metrics = self.ready["metrics"].as_str().map(metrics_address);
        Ok(Target { logins, admins, metrics })
    }

    /// Its log so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Dev {
    fn drop(&mut self) {
        // Its clusters stop when it does, but it removes its data only if it is asked.
        let pid = nix::unistd::Pid::from_raw(self.child.id().cast_signed());
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        for _ in 0..200 {
            if matches!(self.child.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Few server connections, so that what one leaves, the next one finds.
fn configuration(rules: &Rules, template: &Path) -> String {
    format!(
        "[proxy]\nshutdown_timeout = \"1s\"\n\
         [pool]\npool_mode = \"{}\"\ndefault_pool_size = 2\nmax_db_connections = 4\nquery_wait_timeout = \"4s\"\n\
         [provision]\nplan = \"{}\"\ntemplate_dir = {:?}\n[metrics]\nstorage_interval = 0\n[log]\nlevel = \"info\"\n",
        rules.pool_mode, rules.plan, template
    )
}

/// A DSN with `{tenant}` and `{password}` in it, filled in.
///
/// # Errors
/// It is no DSN.
pub fn from_template(template: &str, tenant: &str, password: &str) -> Result<Login, Error> {
    login(&template.replace("{tenant}", tenant).replace("{password}", password))
}

fn login(dsn: &str) -> Result<Login, Error> {
    let config: tokio_postgres::Config = dsn.parse()?;
    let host = match config.get_hosts() {
        [tokio_postgres::config::Host::Tcp(host), ..] => host.clone(),
        _ => return Err(format!("no host in {dsn}").into()),
    };
    Ok(Login {
        host,
        port: config.get_ports().first().copied().unwrap_or(5432),
        user: config.get_user().unwrap_or_default().to_owned(),
        password: String::from_utf8_lossy(config.get_password().unwrap_or_default()).into_owned(),
        database: config.get_dbname().or(config.get_user()).unwrap_or_default().to_owned(),
    })
}

/// The superuser's DSN for the database in which the tenant lives, unless somebody decided otherwise.
///
/// # Errors
/// The DSN names no database.
pub fn admin_of(plan: &str, dsn: &str, tenant: &str) -> Result<String, Error> {
    match plan {
        "database" => in_database(dsn, tenant),
        "rls" => in_database(dsn, "shared"),
        _ => Ok(dsn.to_owned()),
    }
}

fn in_database(dsn: &str, database: &str) -> Result<String, Error> {
    let (server, _) = dsn.rsplit_once('/').ok_or("the superuser's DSN names no database")?;
    Ok(format!("{server}/{database}"))
}

/// `host:port` of a URL.
pub fn metrics_address(url: &str) -> String {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    rest.split('/').next().unwrap_or_default().to_owned()
}

/// Sum of `cross_tenant_isolation_violations`, whatever the labels, by `kind/action`.
///
/// # Errors
/// The metrics cannot be read.
pub async fn violations(address: &str) -> Result<BTreeMap<String, f64>, Error> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(format!("GET /metrics HTTP/1.0\r\nHost: {address}\r\n\r\n").as_bytes()).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    let answer = String::from_utf8_lossy(&answer);
    if !answer.contains("# TYPE cross_tenant_isolation_violations") {
        return Err("no metric cross_tenant_isolation_violations".into());
    }
    let mut sums = BTreeMap::new();
    for line in answer.lines().filter(|line| line.starts_with("cross_tenant_isolation_violations")) {
        let label = |name: &str| {
            let rest = line.split_once(&format!("{name}=\"")).map_or("", |(_, rest)| rest);
            rest.split('"').next().unwrap_or_default().to_owned()
        };
        let value: f64 = line.rsplit(' ').next().unwrap_or_default().parse()?;
        *sums.entry(format!("{}/{}", label("kind"), label("action"))).or_default() += value;
    }
    Ok(sums)
}

/// The program beside the running one: `target/debug/examples/attack` or `target/debug/deps/attacks-…` →
/// `target/debug/pgusher`.
pub fn beside() -> Option<PathBuf> {
    let program = std::env::current_exe().ok()?.parent()?.parent()?.join("pgusher");
    program.exists().then_some(program)
}
