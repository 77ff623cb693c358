//! The guard, the counting of violations and the audit log, on a running proxy with a real server behind it.

#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod support;

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use pgusher::config::{Config, Purpose};
use pgusher::server::Server;
use support::postgres::{Cluster, PASSWORD, bin_dir, client_program};
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

const SECRET: &str = "0123456789abcdef0123456789abcdef";

/// A proxy with the tenants client_001 and client_002, in front of a cluster of its own.
struct Proxy {
    server: Server,
    cluster: Cluster,
    dir: tempfile::TempDir,
}

impl Proxy {
    async fn start(guard: &str, pool: &str) -> Self {
        Self::start_on(Cluster::start(), tempfile::tempdir().unwrap(), guard, pool).await
    }

    async fn start_on(cluster: Cluster, dir: tempfile::TempDir, guard: &str, pool: &str) -> Self {
        let template = dir.path().join("template");
        std::fs::create_dir_all(&template).unwrap();
        std::fs::write(
            template.join("1.sql"),
            "CREATE TABLE bookings (id serial PRIMARY KEY, note text); INSERT INTO bookings (note) VALUES ('SECRET')",
        )
        .unwrap();
        let text = format!(
            "[proxy]\nlisten_port = 6432\n[pool]\npool_mode = \"{pool}\"\n[auth]\nauth_type = \"trust\"\n\
             [guard]\nmode = \"{guard}\"\n[audit]\nfile = {:?}\n\
             [provision]\nmaster_secret = \"{SECRET}\"\ntemplate_dir = {template:?}\n\
             [[users]]\nname = \"app\"\npassword = \"x\"\ntenants = [\"*\"]\nauto_provision = true\n\
             [[shards]]\nname = \"one\"\nport = {}\nadmin_password = \"{PASSWORD}\"\n",
            dir.path().join("audit.log"),
            cluster.port(),
        );
        std::fs::write(dir.path().join("pgusher.toml"), &text).unwrap();
        let no_variables = std::iter::empty::<(String, String)>();
        let mut config = Config::parse("test", &text, no_variables, Purpose::Serve).unwrap();
        config.proxy.listen_port = 0;
        (config.api.listen, config.metrics.listen) = ("".into(), "127.0.0.1:0".into());
        let server = Server::start(config).await.unwrap();
        let proxy = Self { server, cluster, dir };
        proxy.connect("client_002").await;
        proxy
    }

    fn dsn(&self, tenant: &str) -> String {
        format!("postgresql://app.{tenant}@127.0.0.1:{}/{tenant}", self.server.addresses().proxy[0].port())
    }

    async fn connect(&self, tenant: &str) -> Client {
        let (client, connection) = tokio_postgres::connect(&self.dsn(tenant), NoTls).await.unwrap();
        tokio::spawn(connection);
        client
    }

    /// Violations by kind and action, all tenants.
    fn violations(&self) -> BTreeMap<String, u64> {
        let mut stream = TcpStream::connect(self.server.addresses().metrics.unwrap()).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let mut found = BTreeMap::new();
        for line in text.lines().filter(|line| line.starts_with("cross_tenant_isolation_violations{")) {
            let label = |name: &str| line.split(&format!("{name}=\"")).nth(1).unwrap().split('"').next().unwrap();
            let count = line.rsplit(' ').next().unwrap().parse::<f64>().unwrap() as u64;
            if count > 0 {
                *found.entry(format!("{} {}", label("kind"), label("action"))).or_default() += count;
            }
        }
        found
    }

    fn audit_log(&self) -> PathBuf {
        self.dir.path().join("audit.log")
    }

    fn program(&self, name: &str, arguments: &[&str], tenant: &str) -> String {
        let output = Command::new(client_program(name)).args(arguments).arg(self.dsn(tenant)).output().unwrap();
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{name} {arguments:?}: {err}");
        format!("{out}{err}")
    }
}

async fn eventually(what: &str, condition: impl AsyncFn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition().await {
        assert!(Instant::now() < deadline, "still not: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Each attempt, and what counts it: in "enforce", in "observe", in "off".
const ATTEMPTS: &[(&str, [&str; 3])] = &[
    ("SET ROLE client_002", ["guard refused", "guard observed", "permission_denied blocked"]),
    ("SET U&\"r\\006Fle\" TO 'client_002'", ["guard refused", "guard observed", "permission_denied blocked"]),
    ("SELECT note FROM client_002.bookings", ["guard refused", "guard observed", "permission_denied blocked"]),
    ("INSERT INTO client_002 . bookings VALUES (9)", ["guard refused", "guard observed", "permission_denied blocked"]),
    ("SET search_path = client_002, public", ["guard refused", "guard observed", ""]),
    ("COPY bookings FROM PROGRAM 'true'", ["guard refused", "guard observed", ""]),
    ("SELECT nextval('client_002.bookings_id_seq')", ["permission_denied blocked"; 3]),
    ("DO $$ BEGIN EXECUTE 'SET RO'||'LE client_002'; END $$", ["permission_denied blocked"; 3]),
    ("SELECT 1/0", [""; 3]),
    ("SELECT * FROM nowhere", [""; 3]),
    ("SELECT * FROM pg_authid", ["permission_denied blocked"; 3]),
    ("SELECT * FROM pg_locks", [""; 3]),
    // What is refused says nothing about whom it was for; the statement does.
    ("SELECT * FROM pg_locks WHERE pid = (SELECT 1 WHERE 'x' = 'client_002')", ["permission_denied blocked"; 3]),
    (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'client_002'",
        ["permission_denied blocked"; 3],
    ),
    ("SELECT query_to_xml('select note from client_002.bookings', true, true, '')", ["permission_denied blocked"; 3]),
    (
        "DO $$ BEGIN EXECUTE 'SET search_' || 'path = client_002'; EXECUTE 'SELECT note FROM bookings'; END $$",
        ["permission_denied blocked"; 3],
    ),
    ("SELECT pg_database_size('tenants') -- client_002", [""; 3]),
    ("CREATE EXTENSION hstore", [""; 3]),
];

#[tokio::test(flavor = "multi_thread")]
async fn every_attempt_counts_once_whoever_stops_it() {
    let (mut cluster, mut dir) = (Cluster::start(), tempfile::tempdir().unwrap());
    for (at, mode) in ["enforce", "observe", "off"].into_iter().enumerate() {
        for pool in ["transaction", "session"] {
            let proxy = Proxy::start_on(cluster, dir, mode, pool).await;
            let client = proxy.connect("client_001").await;
            for (sql, expected) in ATTEMPTS {
                for extended in [false, true] {
                    let before = proxy.violations();
                    let result = if extended {
                        client.query(*sql, &[]).await.map(drop)
                    } else {
                        client.batch_execute(sql).await
                    };
                    let case = format!("{sql} in {mode}, {pool}, extended: {extended}");
                    let mut wanted = before.clone();
                    if !expected[at].is_empty() {
                        *wanted.entry(expected[at].to_owned()).or_default() += 1;
                    }
                    assert_eq!(proxy.violations(), wanted, "{case}");
                    if expected[at] == "guard refused" {
                        let error = result.unwrap_err();
                        let error = error.as_db_error().unwrap();
                        assert_eq!(error.code().code(), "42501", "{case}");
                        assert!(error.hint().is_some() && error.detail().is_some(), "{case}");
                    }
                    client.batch_execute("RESET ALL").await.unwrap();
                }
            }
            // A refusal fails a transaction as a server's error does.
            if mode == "enforce" {
                client.batch_execute("BEGIN; INSERT INTO bookings VALUES (77)").await.unwrap();
                client.batch_execute("SET ROLE client_002").await.unwrap_err();
                let error = client.batch_execute("SELECT 1").await.unwrap_err();
                assert_eq!(error.code().unwrap().code(), "25P02");
                client.batch_execute("ROLLBACK").await.unwrap();
                let rows = client.simple_query("SELECT count(*) FROM bookings WHERE id = 77").await.unwrap();
                let count = rows.iter().find_map(|row| match row {
                    SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
                    _ => None,
                });
                assert_eq!(count.as_deref(), Some("0"));
            }
            drop(client);
            proxy.server.drain(Duration::from_secs(5)).await;
            (cluster, dir) = (proxy.cluster, proxy.dir);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ordinary_traffic_counts_nothing() {
    let (mut cluster, mut dir) = (Cluster::start(), tempfile::tempdir().unwrap());
    for pool in ["transaction", "session", "auto"] {
        let proxy = Proxy::start_on(cluster, dir, "enforce", pool).await;
        ordinary_traffic(&proxy).await;
        proxy.server.drain(Duration::from_secs(5)).await;
        (cluster, dir) = (proxy.cluster, proxy.dir);
    }
}

async fn ordinary_traffic(proxy: &Proxy) {
    let client = proxy.connect("client_001").await;
    // What is refused on a tenant's own account.
    for sql in [
        "SELECT * FROM nowhere",
        "SELECT nothing()",
        "SELECT * FROM pg_stat_activity",
        "SELECT pg_read_file('x')",
        "CREATE EXTENSION hstore",
        "CREATE SCHEMA mine",
        "CREATE DATABASE mine",
        "ALTER TABLE bookings DISABLE TRIGGER ALL; SET session_replication_role = replica",
        "DROP SCHEMA client_001",
        "SELECT pg_cancel_backend(1)",
        "INSERT INTO bookings (note) VALUES ('client_002'); SELECT 1 / 0",
        "SET application_name = 'client_002'; SELECT 1 / 0",
        "SELECT 'client_002'::pg_lsn",
    ] {
        client.batch_execute(sql).await.err();
        client.batch_execute("RESET ALL").await.unwrap();
        assert_eq!(proxy.violations(), BTreeMap::new(), "{sql}");
    }
    for sql in [
        "SELECT pg_advisory_unlock_all(); CLOSE ALL; UNLISTEN *; RESET ALL;",
        "SET SESSION AUTHORIZATION DEFAULT; RESET ALL; CLOSE ALL; UNLISTEN *; DISCARD SEQUENCES; DISCARD TEMP",
        "DISCARD ALL",
        "RESET ROLE; RESET SESSION AUTHORIZATION; SET ROLE NONE",
        "SET ROLE client_001",
        "SET search_path = client_001, public, pg_catalog",
        "RESET search_path",
        "CREATE EXTENSION IF NOT EXISTS plpgsql",
        "SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace",
        "SELECT * FROM information_schema.columns WHERE table_schema = current_schema()",
        "CREATE TABLE client_002 (id int, role text); INSERT INTO client_002 VALUES (1, 'admin'); \
         UPDATE client_002 SET role = 'x' WHERE client_002.id = 1; SELECT client_002.id FROM client_002; \
         DROP TABLE client_002",
        "DO $$ BEGIN IF true THEN CREATE TEMP TABLE x (id int); END IF; END $$",
    ] {
        client.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
        assert_eq!(proxy.violations(), BTreeMap::new(), "{sql}");
    }
    drop(client);
    for command in ["\\d", "\\d bookings", "\\dt+", "\\dn+", "\\df", "\\du", "\\dp", "\\dx"] {
        proxy.program("psql", &["-X", "-c", command, "-d"], "client_001");
    }
    // An older pg_dump, and an older \l, do not know newer servers.
    if client_program("pg_dump").parent() == bin_dir().as_deref() {
        proxy.program("psql", &["-X", "-c", "\\l", "-d"], "client_001");
        let dump = proxy.program("pg_dump", &["-n", "client_001", "-d"], "client_001");
        assert!(dump.contains("COPY client_001.bookings"));
    }
    proxy.program("pgbench", &["-i", "-q", "-s", "1"], "client_001");
    for protocol in ["simple", "extended", "prepared"] {
        proxy.program("pgbench", &["-n", "-c", "2", "-t", "50", "-M", protocol], "client_001");
    }
    assert_eq!(proxy.violations(), BTreeMap::new());
}

/// What makes the session's state, and what is refused because of it, are two statements.
#[tokio::test(flavor = "multi_thread")]
async fn a_name_given_in_one_statement_explains_a_refusal_of_the_next() {
    let (mut cluster, mut dir) = (Cluster::start(), tempfile::tempdir().unwrap());
    for pool in ["transaction", "session", "auto"] {
        let proxy = Proxy::start_on(cluster, dir, "enforce", pool).await;
        let client = proxy.connect("client_001").await;
        let counted = |n: u64| BTreeMap::from([("permission_denied blocked".to_owned(), n)]);
        client.batch_execute("BEGIN; DO $$ BEGIN EXECUTE 'SET search_'||'path = client_002'; END $$").await.unwrap();
        client.batch_execute("SELECT note FROM bookings").await.unwrap_err();
        assert_eq!(proxy.violations(), counted(1), "{pool}");
        client.batch_execute("ROLLBACK").await.unwrap();
        // It explains one refusal, not all that come.
        client.batch_execute("SELECT * FROM nowhere").await.unwrap_err();
        assert_eq!(proxy.violations(), counted(1), "{pool}");
        // A prepared statement that is run later, and a value.
        let hidden = "SELECT $1::text FROM pg_stat_activity WHERE usename = 'client_002'";
        let statement = client.prepare(hidden).await.unwrap();
        client.query(&statement, &[&"x"]).await.unwrap_err();
        assert_eq!(proxy.violations(), counted(2), "{pool}");
        let value = client.prepare("SELECT 1 FROM pg_stat_activity WHERE usename = $1::text").await.unwrap();
        client.query(&value, &[&"client_002"]).await.unwrap_err();
        assert_eq!(proxy.violations(), counted(3), "{pool}");
        client.query(&value, &[&"client_001"]).await.unwrap_err();
        assert_eq!(proxy.violations(), counted(3), "{pool}");
        drop(client);
        proxy.server.drain(Duration::from_secs(5)).await;
        (cluster, dir) = (proxy.cluster, proxy.dir);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_happened_is_in_the_event_log_and_the_audit_log() {
    let proxy = Proxy::start("enforce", "transaction").await;
    let client = proxy.connect("client_001").await;
    client.batch_execute("SET ROLE 'client_002' /* hidden-comment */").await.unwrap_err();
    client.batch_execute("SELECT 'hidden-literal', * FROM client_002.bookings WHERE id = 4711").await.unwrap_err();
    client.batch_execute("SELECT nextval('client_002.bookings_id_seq')").await.unwrap_err();
    let catalog = proxy.cluster.connect("postgres", PASSWORD, "pgusher").await.unwrap();
    let sql = "SELECT count(*) FROM pgusher.events WHERE what = 'violation' AND tenant = 'client_001' \
               AND who = 'app.client_001' AND detail->>'kind' IN ('guard', 'permission_denied')";
    eventually("three violations in the event log", async || {
        catalog.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) == 3
    })
    .await;
    drop(client);
    proxy.server.drain(Duration::from_secs(5)).await;

    let text = std::fs::read_to_string(proxy.audit_log()).unwrap();
    assert!(!text.contains("hidden") && !text.contains("4711"), "{text}");
    let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let find = |kind: &str, action: &str| lines.iter().find(|line| line["kind"] == kind && line["action"] == action);
    assert!(find("control", "tenant created").is_some_and(|line| line["who"] == "app.client_002"), "{text}");
    let refused = find("guard", "refused").unwrap();
    assert_eq!((refused["tenant"].as_str(), refused["who"].as_str()), (Some("client_001"), Some("app.client_001")));
    assert!(refused["from"].as_str().unwrap().starts_with("127.0.0.1:"));
    assert_eq!(refused["statement"].as_str().unwrap().len(), 16);
    let blocked = find("permission_denied", "blocked").unwrap();
    assert_eq!(blocked["statement"].as_str().unwrap().len(), 16, "{text}");

    let verify = || {
        let config = proxy.dir.path().join("pgusher.toml");
        let mut command = Command::new(env!("CARGO_BIN_EXE_pgusher"));
        let output = command.args(["audit", "verify", "--config"]).arg(config).output().unwrap();
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        (output.status.success(), format!("{out}{err}"))
    };
    let (sound, said) = verify();
    assert!(sound && said.contains(&format!("{} lines", lines.len())), "{said}");
    std::fs::write(proxy.audit_log(), text.replacen("client_001", "client_009", 1)).unwrap();
    let (sound, said) = verify();
    assert!(!sound && said.contains("this line was changed"), "{said}");
}
