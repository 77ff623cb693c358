//! The control plane against real clusters: tenants made, followed, deleted, by API and by several proxies.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use pgusher::config::{Config, Secret, ShardConfig, User};
use pgusher::control::provision::{Choice, Wanted};
use pgusher::control::{Control, NoTraffic, Traffic, api, cli};
use pgusher::directory::Directory;
use pgusher::error::PgError;
use pgusher::tenant::credential::{client_password, server_password};
use pgusher::tenant::{Status, TenantId};
use support::postgres::{Cluster, PASSWORD};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

const SECRET: &str = "0123456789abcdef0123456789abcdef";

/// A proxy's control plane with its directory.
struct Proxy {
    control: Arc<Control>,
    directory: Arc<Directory>,
    shutdown: CancellationToken,
}

impl Proxy {
    async fn start(config: Config) -> Self {
        Self::start_with(config, Arc::new(NoTraffic)).await
    }

    async fn start_with(config: Config, traffic: Arc<dyn Traffic>) -> Self {
        let (sender, receiver) = mpsc::channel(16);
        let directory = Arc::new(Directory::new(sender));
        let shutdown = CancellationToken::new();
        let control =
            Control::start(Arc::new(config), directory.clone(), receiver, traffic, shutdown.clone()).await.unwrap();
        Self { control, directory, shutdown }
    }

    async fn ensure(&self, tenant: &str) -> Result<(), PgError> {
        self.directory.ensure(&id(tenant), "test").await.map(drop)
    }

    async fn stop(self) {
        self.shutdown.cancel();
        self.control.finish().await;
    }
}

fn id(text: &str) -> TenantId {
    TenantId::parse(text).unwrap()
}

fn config(shards: &[&Cluster], template: Option<&Path>) -> Config {
    let mut config = Config::default();
    for (at, cluster) in shards.iter().enumerate() {
        config.shards.push(ShardConfig {
            name: format!("shard_{}", at + 1),
            port: cluster.port(),
            admin_password: Secret::new(PASSWORD),
            ..ShardConfig::default()
        });
    }
    config.provision.master_secret = Secret::new(SECRET);
    config.provision.template_dir = template.map(Path::to_owned);
    config.provision.provision_timeout = Duration::from_secs(90);
    config.metrics.storage_interval = Duration::from_millis(500);
    config
}

fn template(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    dir
}

async fn as_tenant(cluster: &Cluster, tenant: &str) -> tokio_postgres::Client {
    cluster.connect(tenant, &server_password(SECRET, tenant), "tenants").await.unwrap()
}

async fn count(client: &tokio_postgres::Client, sql: &str) -> i64 {
    client.query_one(sql, &[]).await.unwrap().get(0)
}

/// Waits until the condition holds; how long it took.
async fn until(what: &str, mut condition: impl FnMut() -> bool) -> Duration {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < Duration::from_secs(120), "{what} did not happen");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    began.elapsed()
}

const BOOKINGS: &str = "CREATE TABLE bookings (id bigserial PRIMARY KEY, note text);";

#[tokio::test(flavor = "multi_thread")]
async fn a_new_tenant_finds_its_tables_and_nothing_else() {
    let (one, two) = (Cluster::start(), Cluster::start());
    let files = template(&[
        ("01_tables.sql", BOOKINGS),
        ("02_rest.sql", "SELECT pg_catalog.set_config('search_path', '', false);"),
        ("03_view.sql", "CREATE VIEW latest AS SELECT * FROM bookings; -- after a file that emptied the path\n"),
        ("README", "not SQL"),
    ]);
    let proxy = Proxy::start(config(&[&one, &two], Some(files.path()))).await;
    for n in 1..=24 {
        proxy.ensure(&format!("client_{n:03}")).await.unwrap();
    }
    let mut used = HashSet::new();
    for n in 1..=24 {
        let name = format!("client_{n:03}");
        let tenant = proxy.directory.find(&name).unwrap();
        assert_eq!(tenant.status, Status::Active);
        used.insert(tenant.shard.name.clone());
        let cluster = if tenant.shard.name == "shard_1" { &one } else { &two };
        let client = as_tenant(cluster, &name).await;
        client.batch_execute("INSERT INTO bookings (note) VALUES ('mine')").await.unwrap();
        assert_eq!(count(&client, "SELECT count(*) FROM latest").await, 1);
        let row = client.query_one("SELECT current_schema()::text, current_setting('search_path')", &[]).await.unwrap();
        assert_eq!(row.get::<_, &str>(0), name);
        assert_eq!(row.get::<_, &str>(1), format!("{name}, tenant_shim, pg_catalog"));
        // The tables that psql's \dt would show.
        let shown = "SELECT count(*) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                     WHERE relkind IN ('r', 'p') AND pg_table_is_visible(c.oid) AND nspname <> 'pg_catalog'";
        assert_eq!(count(&client, shown).await, 1);
    }
    assert_eq!(used.len(), 2, "both shards are used");
    assert_eq!(proxy.directory.tenants_on("shard_1") + proxy.directory.tenants_on("shard_2"), 24);

    // Neighbours on one shard.
    let on_one: Vec<String> = (1..=24)
        .map(|n| format!("client_{n:03}"))
        .filter(|name| proxy.directory.find(name).unwrap().shard.name == "shard_1")
        .collect();
    let client = as_tenant(&one, &on_one[0]).await;
    for attempt in [
        format!("SELECT * FROM {}.bookings", on_one[1]),
        format!("SET ROLE {}", on_one[1]),
        "CREATE SCHEMA x".to_owned(),
        "CREATE TABLE public.x (a int)".to_owned(),
        format!(
            "GRANT USAGE ON SCHEMA {0} TO {1}; SELECT 1/(has_schema_privilege('{1}', '{0}', 'USAGE')::int)",
            on_one[0], on_one[1]
        ),
        "SELECT pg_catalog.pg_advisory_lock(1)".to_owned(),
        "SELECT * FROM pg_stat_activity".to_owned(),
    ] {
        assert!(client.batch_execute(&attempt).await.is_err(), "{attempt}");
    }
    for database in ["postgres", "pgusher", "template1"] {
        let refused = one.connect(&on_one[0], &server_password(SECRET, &on_one[0]), database).await.err().unwrap();
        assert_eq!(refused.code().unwrap().code(), "42501", "{database}");
    }
    // Advisory locks: a key space of its own, the same within the tenant.
    let neighbour = as_tenant(&one, &on_one[1]).await;
    let second = as_tenant(&one, &on_one[0]).await;
    client.batch_execute("SELECT pg_advisory_lock(42)").await.unwrap();
    assert!(neighbour.query_one("SELECT pg_try_advisory_lock(42)", &[]).await.unwrap().get::<_, bool>(0));
    assert!(!second.query_one("SELECT pg_try_advisory_lock(42)", &[]).await.unwrap().get::<_, bool>(0));
    // Large objects are the tenant's own.
    let oid: u32 = client.query_one("SELECT lo_from_bytea(0, 'abc')", &[]).await.unwrap().get(0);
    assert!(neighbour.query_one("SELECT lo_get($1)", &[&oid]).await.is_err());

    // The server's log never saw a password, and neither did the catalog.
    let password = server_password(SECRET, &on_one[0]);
    assert!(!one.log().contains(&password));
    // Storage is measured.
    until("measuring storage", || proxy.control.largest_tenants().len() == 24).await;
    proxy.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn psql_pgbench_and_pg_dump_work_as_the_tenant() {
    let cluster = Cluster::start();
    let files = template(&[("a.sql", "CREATE TABLE t (id int PRIMARY KEY); CREATE VIEW v AS SELECT * FROM t;")]);
    let proxy = Proxy::start(config(&[&cluster], Some(files.path()))).await;
    proxy.ensure("client_001").await.unwrap();
    proxy.ensure("client_002").await.unwrap();
    let run = |program: &str, arguments: &[&str]| {
        let output = std::process::Command::new(support::postgres::client_program(program))
            .args(["-h", "127.0.0.1", "-p", &cluster.port().to_string(), "-U", "client_001"])
            .args(arguments)
            .env("PGPASSWORD", server_password(SECRET, "client_001"))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program} {arguments:?}: {said}");
        assert!(!said.contains("ERROR"), "{program} {arguments:?}: {said}");
        said
    };
    let dt = run("psql", &["-d", "tenants", "-Atc", "\\dt"]);
    assert_eq!(dt, "client_001|t|table|client_001\n");
    let server: String = cluster
        .admin("postgres")
        .await
        .query_one("SELECT current_setting('server_version_num')", &[])
        .await
        .unwrap()
        .get(0);
    // psql and pg_dump that are older than the server do not know all of it.
    let version = run("psql", &["--version"]);
    let old =
        version.split(' ').nth(2).and_then(|v| v.split('.').next()?.parse::<u32>().ok()) < server[..2].parse().ok();
    for command in ["\\d t", "\\d+ t", "\\d v", "\\d+ v", "\\d+", "\\df", "\\dn", "\\ds", "\\dv", "\\l", "\\du", "\\di"]
        .into_iter()
        .filter(|command| !old || *command != "\\l")
    {
        run("psql", &["-d", "tenants", "-c", command]);
    }
    run("pgbench", &["-i", "-q", "tenants"]);
    run("pgbench", &["-n", "-t", "5", "-M", "prepared", "tenants"]);
    if !old {
        let dump = run("pg_dump", &["--schema-only", "-n", "client_001", "tenants"]);
        assert!(dump.contains("CREATE TABLE client_001.pgbench_accounts"));
    }
    proxy.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_template_names_file_and_line_and_leaves_nothing() {
    let cluster = Cluster::start();
    let admin = cluster.admin("postgres").await;
    for (sql, code, expected) in [
        ("\n\nCREATE TABL x ();", "42601", "template 02.sql, line 3: syntax error at or near \"TABL\""),
        (
            "CREATE TABLE y (a int);\n\nINSERT INTO y\nVALUES (1/0);",
            "22012",
            "template 02.sql, line 3: division by zero",
        ),
        ("SELECT 1;\n\nSELECT nothing;", "42703", "template 02.sql, line 3: column \"nothing\" does not exist"),
        ("DO $$ BEGIN\nRAISE EXCEPTION 'no'; END $$;", "P0001", "template 02.sql, line 1: no"),
        ("SELECT 1;\nCOMMIT;", "0A000", "template 02.sql, line 2: statements that begin or end a transaction"),
        ("CREATE ROLE other;", "42501", "template 02.sql, line 1: permission denied"),
    ] {
        let files = template(&[("01.sql", BOOKINGS), ("02.sql", sql)]);
        let proxy = Proxy::start(config(&[&cluster], Some(files.path()))).await;
        let error = proxy.ensure("client_001").await.unwrap_err();
        assert_eq!(error.code, code, "{error}");
        assert!(error.message.starts_with(expected), "{error}");
        assert_eq!(count(&admin, "SELECT count(*) FROM pg_roles WHERE rolname LIKE 'client%'").await, 0);
        let shard = cluster.admin("tenants").await;
        assert_eq!(count(&shard, "SELECT count(*) FROM pg_namespace WHERE nspname LIKE 'client%'").await, 0);
        let catalog = cluster.admin("pgusher").await;
        assert_eq!(count(&catalog, "SELECT count(*) FROM pgusher.tenants").await, 0);
        assert!(proxy.directory.find("client_001").is_none());
        // Repaired, it works at once.
        std::fs::write(files.path().join("02.sql"), "").unwrap();
        if code == "42501" {
            proxy.ensure("client_001").await.unwrap();
        }
        proxy.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_proxies_race_for_the_same_tenants_and_each_exists_once() {
    let (one, two) = (Cluster::start(), Cluster::start());
    let files = template(&[("01.sql", BOOKINGS), ("02.sql", "INSERT INTO bookings (note) VALUES ('first');")]);
    // They start at once, too: both migrate and set up.
    let config = config(&[&one, &two], Some(files.path()));
    let (a, b) = tokio::join!(Proxy::start(config.clone()), Proxy::start(config.clone()));
    let proxies = [Arc::new(a), Arc::new(b)];
    let mut clients = tokio::task::JoinSet::new();
    for n in 0..80 {
        let proxy = proxies[n % 2].clone();
        clients.spawn(async move { proxy.ensure(&format!("t{}", n / 2 % 20)).await });
    }
    while let Some(done) = clients.join_next().await {
        done.unwrap().unwrap();
    }
    for proxy in &proxies {
        until("following", || proxy.directory.len() == 20).await;
    }
    for n in 0..20 {
        let name = format!("t{n}");
        let (x, y) = (proxies[0].directory.find(&name).unwrap(), proxies[1].directory.find(&name).unwrap());
        assert!(*x == *y, "both proxies see the same");
        let cluster = if x.shard.name == "shard_1" { &one } else { &two };
        let client = as_tenant(cluster, &name).await;
        assert_eq!(count(&client, "SELECT count(*) FROM bookings").await, 1, "the template ran once");
    }
    let catalog = one.admin("pgusher").await;
    assert_eq!(count(&catalog, "SELECT count(*) FROM pgusher.events WHERE what = 'tenant created'").await, 20);
    let mut roles = 0;
    for cluster in [&one, &two] {
        let shard = cluster.admin("tenants").await;
        let sql = "SELECT count(*) FROM pg_roles WHERE rolname ~ '^t[0-9]+$'";
        roles += count(&shard, sql).await;
    }
    assert_eq!(roles, 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_proxy_left_is_completed() {
    let cluster = Cluster::start();
    let files = template(&[("01.sql", BOOKINGS)]);
    let mut config = config(&[&cluster], Some(files.path()));
    let proxy = Proxy::start(config.clone()).await;
    proxy.ensure("whole").await.unwrap();
    proxy.stop().await;
    // Killed before the shard's commit: a row alone. Killed after it: a row and a whole place. Killed in a deletion.
    let catalog = cluster.admin("pgusher").await;
    catalog
        .batch_execute(
            "UPDATE pgusher.tenants SET status = 'creating', attempt = 7 WHERE id = 'whole';
             INSERT INTO pgusher.tenants (id, plan, shard, database, schema, role, status, attempt) VALUES
               ('early', 'schema', 'shard_1', 'tenants', 'early', 'early', 'creating', 8),
               ('wanted', 'schema', 'shard_1', 'tenants', 'wanted', 'wanted', 'creating', 9),
               ('going', 'schema', 'shard_1', 'tenants', 'going', 'going', 'deleting', NULL)",
        )
        .await
        .unwrap();
    as_tenant(&cluster, "whole").await.batch_execute("INSERT INTO bookings (note) VALUES ('kept')").await.unwrap();
    config.provision.provision_timeout = Duration::from_secs(5);
    let proxy = Proxy::start(config).await;
    assert!(proxy.directory.find("early").is_none(), "what is half made is not visible");
    proxy.ensure("wanted").await.unwrap();
    proxy.ensure("whole").await.unwrap();
    assert_eq!(count(&as_tenant(&cluster, "whole").await, "SELECT count(*) FROM bookings").await, 1);
    assert_eq!(count(&as_tenant(&cluster, "wanted").await, "SELECT count(*) FROM bookings").await, 0);
    // The rest is the janitor's, at the next start once they are old enough.
    proxy.stop().await;
    catalog
        .batch_execute(
            "ALTER TABLE pgusher.tenants DISABLE TRIGGER touch;
             UPDATE pgusher.tenants SET changed_at = now() - interval '1 hour' WHERE status IN ('creating', 'deleting');
             ALTER TABLE pgusher.tenants ENABLE TRIGGER touch",
        )
        .await
        .unwrap();
    let mut config = self::config(&[&cluster], Some(files.path()));
    config.provision.provision_timeout = Duration::from_secs(90);
    let proxy = Proxy::start(config).await;
    until("completing", || proxy.directory.find("early").is_some()).await;
    let going = id("going");
    let began = Instant::now();
    while proxy.control.show(&going).await.unwrap().status != "deleted" {
        assert!(began.elapsed() < Duration::from_secs(10));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    proxy.stop().await;
}

#[test]
fn two_hundred_clients_for_fifty_tenants_are_served_though_the_proxy_is_cut_off_halfway() {
    let runtime = || tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let outer = runtime();
    let (one, two) = outer.block_on(async { (Cluster::start(), Cluster::start()) });
    let files = template(&[("01.sql", BOOKINGS)]);
    let config = config(&[&one, &two], Some(files.path()));
    // Everything of the first proxy vanishes at once, as with SIGKILL: its sockets close, nothing is tidied up.
    let doomed = runtime();
    let proxy = doomed.block_on(Proxy::start(config.clone()));
    let directory = proxy.directory.clone();
    for n in 0..200 {
        let directory = directory.clone();
        doomed.spawn(async move { directory.ensure(&id(&format!("t{:02}", n % 50)), "test").await.map(drop) });
    }
    let made = outer.block_on(async {
        until("half of it", || directory.len() >= 10).await;
        directory.len()
    });
    doomed.shutdown_background();
    assert!(made < 50, "cut off too late to show anything");
    outer.block_on(async {
        let proxy = Arc::new(Proxy::start(config).await);
        let mut clients = tokio::task::JoinSet::new();
        for n in 0..200 {
            let proxy = proxy.clone();
            clients.spawn(async move { proxy.ensure(&format!("t{:02}", n % 50)).await });
        }
        while let Some(done) = clients.join_next().await {
            done.unwrap().unwrap();
        }
        for n in 0..50 {
            let name = format!("t{n:02}");
            let cluster = if proxy.directory.find(&name).unwrap().shard.name == "shard_1" { &one } else { &two };
            assert_eq!(count(&as_tenant(cluster, &name).await, "SELECT count(*) FROM bookings").await, 0);
        }
        let catalog = one.admin("pgusher").await;
        assert_eq!(count(&catalog, "SELECT count(*) FROM pgusher.tenants WHERE status = 'active'").await, 50);
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_catalog_and_a_tenant_that_locks_its_tables_disturb_nobody() {
    let cluster = Cluster::start();
    let files = template(&[
        ("01.sql", BOOKINGS),
        (
            "02.sql",
            "CREATE FUNCTION who() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN INSERT INTO bookings (note) VALUES (session_user || current_user); RETURN NULL; END $$;
             CREATE TABLE late (a int);
             CREATE CONSTRAINT TRIGGER who AFTER INSERT ON late INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION who();
             INSERT INTO late VALUES (1);",
        ),
    ]);
    let config = config(&[&cluster], Some(files.path()));
    let proxy = Proxy::start(config.clone()).await;
    proxy.ensure("a").await.unwrap();
    proxy.ensure("b").await.unwrap();
    proxy.stop().await;
    let mut a = as_tenant(&cluster, "a").await;
    let note: String = a.query_one("SELECT note FROM bookings", &[]).await.unwrap().get(0);
    assert_eq!(note, "aa", "what a template defers runs as the tenant, too");
    let catalog = cluster.admin("pgusher").await;
    catalog
        .batch_execute(
            "ALTER TABLE pgusher.tenants DISABLE TRIGGER touch;
             UPDATE pgusher.tenants SET changed_in = '99999999999';
             ALTER TABLE pgusher.tenants ENABLE TRIGGER touch",
        )
        .await
        .unwrap();
    let held = a.transaction().await.unwrap();
    held.batch_execute("TRUNCATE bookings").await.unwrap();
    let proxy = Proxy::start(config).await;
    assert_eq!(count(&catalog, "SELECT count(*) FROM pgusher.tenants WHERE changed_in = '99999999999'").await, 0);
    until("measuring the other", || proxy.control.storage_of("b").is_some()).await;
    assert!(proxy.control.storage_of("a").is_none());
    held.rollback().await.unwrap();
    until("measuring it", || proxy.control.storage_of("a").is_some()).await;
    proxy.stop().await;
}

/// Notes whose sessions were to be closed.
#[derive(Default)]
struct Closed(Mutex<Vec<String>>);

impl Traffic for Closed {
    fn close_tenant(&self, id: &TenantId, why: PgError) {
        self.0.lock().push(format!("{id}: {}", why.message));
    }

    fn tenant_clients(&self, _: &TenantId) -> usize {
        3
    }

    fn tenant_servers(&self, _: &TenantId) -> usize {
        2
    }

    fn shard_servers(&self, _: &str) -> (usize, usize) {
        (2, 1)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_are_followed_at_once_and_across_an_outage() {
    let cluster = Cluster::start();
    let config = config(&[&cluster], None);
    let closed = Arc::new(Closed::default());
    let proxy = Proxy::start_with(config.clone(), closed.clone()).await;
    let other = Proxy::start(config).await;
    other.ensure("a").await.unwrap();
    let took = until("a", || proxy.directory.find("a").is_some()).await;
    assert!(took < Duration::from_secs(1), "{took:?}");

    let catalog = cluster.admin("pgusher").await;
    // A transaction that draws its id early and commits late, while others commit in between.
    let mut late = cluster.admin("pgusher").await;
    let transaction = late.transaction().await.unwrap();
    transaction
        .batch_execute("UPDATE pgusher.tenants SET status = 'suspended', epoch = epoch + 1 WHERE id = 'a'")
        .await
        .unwrap();
    other.ensure("b").await.unwrap();
    until("b", || proxy.directory.find("b").is_some()).await;
    assert_eq!(proxy.directory.find("a").unwrap().status, Status::Active);
    let began = Instant::now();
    transaction.commit().await.unwrap();
    until("suspension", || proxy.directory.find("a").unwrap().status == Status::Suspended).await;
    assert!(began.elapsed() < Duration::from_secs(1));
    assert_eq!(closed.0.lock().drain(..).collect::<Vec<_>>(), ["a: tenant \"a\" is suspended"]);

    // Users come and go.
    catalog
        .batch_execute("INSERT INTO pgusher.credentials (name, kind, tenants) VALUES ('app', 'user', '{a*}')")
        .await
        .unwrap();
    until("user", || proxy.directory.user("app").is_some_and(|user| user.may_use(&id("ab")))).await;
    catalog.batch_execute("DELETE FROM pgusher.credentials WHERE name = 'app'").await.unwrap();
    until("user's end", || proxy.directory.user("app").is_none()).await;

    // The catalog dies: what is known goes on, what is not is refused with a way out.
    cluster.stop();
    until("noticing", || !proxy.control.catalog_connected()).await;
    assert!(proxy.directory.find("b").is_some());
    let error = proxy.ensure("c").await.unwrap_err();
    assert_eq!((&*error.code, error.hint.is_some()), ("57P03", true), "{error}");
    cluster.start_again();
    // Changed before the proxy can have connected again, or just after: both must be seen.
    let catalog = cluster.admin("pgusher").await;
    catalog
        .batch_execute(
            "UPDATE pgusher.tenants SET status = 'active', epoch = epoch + 1 WHERE id = 'a';
             DELETE FROM pgusher.credentials WHERE name = 'b';
             UPDATE pgusher.tenants SET status = 'deleted', epoch = epoch + 1, deleted_at = now() WHERE id = 'b'",
        )
        .await
        .unwrap();
    until("catching up", || {
        proxy.directory.find("a").is_some_and(|t| t.status == Status::Active) && proxy.directory.find("b").is_none()
    })
    .await;
    assert!(closed.0.lock().contains(&"b: tenant \"b\" has been deleted".to_owned()));
    proxy.ensure("c").await.unwrap();
    until("c", || other.directory.find("c").is_some()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_with_2000_tables_is_deleted_without_a_trace_but_its_tombstone() {
    let cluster = Cluster::start();
    let proxy = Proxy::start(config(&[&cluster], None)).await;
    proxy.ensure("big").await.unwrap();
    proxy.ensure("neighbour").await.unwrap();
    let client = as_tenant(&cluster, "big").await;
    for from in (0..2000).step_by(100) {
        let sql: String =
            (from..from + 100).map(|n| format!("CREATE TABLE t{n} (id serial PRIMARY KEY, note text);")).collect();
        client.batch_execute(&sql).await.unwrap();
    }
    client
        .batch_execute(
            "CREATE VIEW v AS SELECT * FROM t1; CREATE MATERIALIZED VIEW m AS SELECT * FROM v;
             CREATE TYPE mood AS ENUM ('a', 'b'); CREATE DOMAIN d AS int; CREATE TYPE pair AS (a int, b mood);
             CREATE FUNCTION f(mood) RETURNS int LANGUAGE sql AS 'SELECT 1'; CREATE PROCEDURE p() LANGUAGE sql AS '';
             CREATE AGGREGATE agg (int) (sfunc = int4pl, stype = int); CREATE SEQUENCE s;
             CREATE TABLE child (id int REFERENCES t1, m mood DEFAULT 'a'); CREATE TABLE part (a int) PARTITION BY LIST (a);
             CREATE TABLE part_1 PARTITION OF part FOR VALUES IN (1); SELECT lo_from_bytea(0, 'x');
             ALTER ROLE big SET statement_timeout = '5s'",
        )
        .await
        .unwrap();
    let shard = cluster.admin("tenants").await;
    let whole = shard.batch_execute("DROP SCHEMA big CASCADE").await.unwrap_err();
    assert_eq!(whole.code().unwrap().code(), "53200", "the test is worth something: {whole}");
    // The error arrives before its transaction has let go of the locks.
    shard.batch_execute("SELECT 1").await.unwrap();

    let tombstone = proxy.control.delete(&id("big"), "test").await.unwrap();
    assert_eq!((tombstone.status.as_str(), tombstone.deleted_at.is_some()), ("deleted", true));
    assert!(client.simple_query("SELECT 1").await.is_err(), "its session is gone");
    for sql in [
        "SELECT count(*) FROM pg_roles WHERE rolname = 'big'",
        "SELECT count(*) FROM pg_namespace WHERE nspname = 'big'",
        "SELECT count(*) FROM pg_stat_activity WHERE usename = 'big'",
        "SELECT count(*) FROM pg_largeobject_metadata",
    ] {
        assert_eq!(count(&shard, sql).await, 0, "{sql}");
    }
    let catalog = cluster.admin("pgusher").await;
    assert_eq!(count(&catalog, "SELECT count(*) FROM pgusher.credentials WHERE tenant = 'big'").await, 0);
    assert!(proxy.directory.find("big").is_none());
    assert!(proxy.directory.find("neighbour").is_some());

    // Deleting again changes nothing, connecting does not bring it back, the operator does.
    let again = proxy.control.delete(&id("big"), "test").await.unwrap();
    assert_eq!(again, tombstone);
    let error = proxy.ensure("big").await.unwrap_err();
    assert_eq!((&*error.code, error.message.as_str()), ("55000", "tenant \"big\" has been deleted"));
    let record = proxy.control.create(&id("big"), "test", Choice::default()).await.unwrap();
    assert_eq!(record.status, "active");
    let client = as_tenant(&cluster, "big").await;
    assert_eq!(count(&client, "SELECT count(*) FROM pg_class WHERE relnamespace = 'big'::regnamespace").await, 0);
    assert_eq!(proxy.control.delete(&id("nobody"), "test").await.unwrap_err().code, "3D000");
    proxy.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn creating_and_deleting_at_once_ends_whole_or_gone() {
    let cluster = Cluster::start();
    let files = template(&[("01.sql", BOOKINGS)]);
    let config = config(&[&cluster], Some(files.path()));
    let (a, b) = tokio::join!(Proxy::start(config.clone()), Proxy::start(config));
    let mut workers = tokio::task::JoinSet::new();
    for n in 0..6 {
        let control = if n % 2 == 0 { a.control.clone() } else { b.control.clone() };
        workers.spawn(async move {
            let mut unexpected = Vec::new();
            for round in 0..15 {
                let tenant = id(["x", "y"][(n + round) % 2]);
                let done = match (n + round) % 3 {
                    0 => control.delete(&tenant, "test").await.map(drop),
                    1 => control.create(&tenant, "test", Choice::default()).await.map(drop),
                    _ => control.make(&tenant, "test", Wanted::ByConnecting).await,
                };
                // Refused because of the other's work is what may happen; nothing else is.
                unexpected.extend(done.err().filter(|e| !["55000", "3D000", "57P03"].contains(&&*e.code)));
            }
            unexpected
        });
    }
    while let Some(done) = workers.join_next().await {
        assert_eq!(done.unwrap(), []);
    }
    let shard = cluster.admin("tenants").await;
    for tenant in ["x", "y"] {
        let status = a.control.show(&id(tenant)).await.unwrap().status;
        let expected = match status.as_str() {
            "active" => 1,
            "deleted" => 0,
            other => panic!("{tenant} is {other}"),
        };
        for sql in
            ["SELECT count(*) FROM pg_roles WHERE rolname = $1", "SELECT count(*) FROM pg_tables WHERE schemaname = $1"]
        {
            let found: i64 = shard.query_one(sql, &[&tenant]).await.unwrap().get(0);
            assert_eq!(found, expected, "{tenant} is {status}: {sql}");
        }
        for proxy in [&a, &b] {
            until("following", || proxy.directory.find(tenant).is_some() == (status == "active")).await;
        }
    }
    a.stop().await;
    b.stop().await;
}

/// Passes bytes between clients and a port, until it is told to pass none without closing anything.
async fn wire(to: u16) -> (u16, Arc<std::sync::atomic::AtomicBool>) {
    let cut = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let is_cut = cut.clone();
    tokio::spawn(async move {
        loop {
            let (client, _) = listener.accept().await.unwrap();
            let server = tokio::net::TcpStream::connect(("127.0.0.1", to)).await.unwrap();
            let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
            for (mut from, mut to) in [(from_client, to_server), (from_server, to_client)] {
                let is_cut = is_cut.clone();
                tokio::spawn(async move {
                    let mut buffer = [0; 8192];
                    loop {
                        let n = from.read(&mut buffer).await.unwrap_or(0);
                        if is_cut.load(std::sync::atomic::Ordering::Relaxed) {
                            return std::future::pending::<()>().await;
                        }
                        if n == 0 || to.write_all(&buffer[..n]).await.is_err() {
                            return;
                        }
                    }
                });
            }
        }
    });
    (port, cut)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_catalog_that_falls_silent_is_noticed_and_caught_up_with() {
    let cluster = Cluster::start();
    let (port, cut) = wire(cluster.port()).await;
    let mut config = config(&[&cluster], None);
    let other = Proxy::start(config.clone()).await;
    config.catalog.host = Some("127.0.0.1".into());
    config.catalog.port = port;
    config.catalog.password = Secret::new(PASSWORD);
    config.pool.server_connect_timeout = Duration::from_secs(1);
    let proxy = Proxy::start(config).await;
    cut.store(true, std::sync::atomic::Ordering::Relaxed);
    other.ensure("a").await.unwrap();
    until("noticing", || !proxy.control.catalog_connected()).await;
    assert_eq!(proxy.ensure("b").await.unwrap_err().code, "57P03");
    cut.store(false, std::sync::atomic::Ordering::Relaxed);
    until("catching up", || proxy.directory.find("a").is_some()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_of_other_roles_are_not_taken_over() {
    let cluster = Cluster::start();
    let proxy = Proxy::start(config(&[&cluster], None)).await;
    proxy.ensure("first").await.unwrap();
    let shard = cluster.admin("tenants").await;
    shard
        .batch_execute(
            "CREATE ROLE boss SUPERUSER; CREATE SCHEMA stuff; CREATE TABLE stuff.t (); \
             CREATE ROLE reader; GRANT pg_read_all_data TO reader; \
             CREATE ROLE spoken; COMMENT ON ROLE spoken IS 'of somebody else'",
        )
        .await
        .unwrap();
    for name in ["boss", "stuff", "reader", "spoken"] {
        let error = proxy.ensure(name).await.unwrap_err();
        assert_eq!(error.code, "55000", "{error}");
        assert_eq!(proxy.control.delete(&id(name), "test").await.unwrap_err().code, "3D000");
    }
    assert_eq!(count(&shard, "SELECT count(*) FROM pg_roles WHERE rolname = 'boss' AND rolsuper").await, 1);
    assert_eq!(count(&shard, "SELECT count(*) FROM pg_tables WHERE schemaname = 'stuff'").await, 1);
    assert_eq!(count(&shard, "SELECT count(*) FROM pg_roles WHERE rolname = 'reader' AND rolcanlogin").await, 0);
    proxy.stop().await;
}

async fn http(port: u16, method: &str, path: &str, token: Option<&str>) -> (u16, serde_json::Value) {
    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let token = token.map(|token| format!("Authorization: Bearer {token}\r\n")).unwrap_or_default();
    let request = format!("{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{token}Connection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
    let body = answer.split_once("\r\n\r\n").unwrap().1;
    (status, serde_json::from_str(body).unwrap_or_else(|_| panic!("not JSON: {answer}")))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_api_answers_its_calls() {
    let cluster = Cluster::start();
    let mut config = config(&[&cluster], None);
    config.api.token = Secret::new("token");
    config.proxy.listen_port = 6543;
    let proxy = Proxy::start_with(config, Arc::new(Closed::default())).await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(api::serve(proxy.control.clone(), listener, proxy.shutdown.clone()));
    let token = Some("token");

    let (status, body) = http(port, "GET", "/tenants", None).await;
    assert_eq!((status, &body["error"]["code"]), (401, &"28000".into()));
    let (status, body) = http(port, "GET", "/tenant/client_001/database-url", token).await;
    assert_eq!(status, 200, "{body}");
    let password = client_password(SECRET, "client_001");
    assert_eq!(body["database_url"], format!("postgresql://client_001:{password}@127.0.0.1:6543/client_001"));
    let (_, again) = http(port, "GET", "/tenant/client_001/database-url", token).await;
    assert_eq!(body, again);
    // The tenant's own credential is in the directory, and it is that password's.
    let verifier = proxy.directory.find("client_001").unwrap().verifier.clone().unwrap();
    let keys = pgusher::tenant::credential::Verifier::make(&password, &verifier.salt, verifier.iterations);
    assert!(keys == verifier);

    let (status, body) = http(port, "GET", "/tenant/client_001/health", token).await;
    assert_eq!((status, &body["reachable"], &body["clients"]), (200, &true.into(), &3.into()), "{body}");
    assert_eq!((&body["status"], &body["shard"]), (&"active".into(), &"shard_1".into()));
    until("a probe", || proxy.control.shard_health("shard_1").healthy).await;
    let (status, body) = http(port, "GET", "/shards/status", token).await;
    let shard = &body["shards"][0];
    assert_eq!((status, &shard["healthy"], &shard["tenants"]), (200, &true.into(), &1.into()), "{body}");

    for n in 2..=5 {
        http(port, "GET", &format!("/tenant/client_00{n}/database-url"), token).await;
    }
    let (_, first) = http(port, "GET", "/tenants?limit=3", token).await;
    let (_, rest) =
        http(port, "GET", &format!("/tenants?limit=3&after={}", first["next"].as_str().unwrap()), token).await;
    let ids = |page: &serde_json::Value| {
        page["tenants"].as_array().unwrap().iter().map(|t| t["id"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(
        [ids(&first), ids(&rest)].concat(),
        ["client_001", "client_002", "client_003", "client_004", "client_005"]
    );
    assert!(rest["next"].is_null());

    let (status, body) = http(port, "DELETE", "/tenant/client_001", token).await;
    assert_eq!((status, &body["status"]), (200, &"deleted".into()), "{body}");
    for (method, path, expected) in [
        ("GET", "/tenant/client_001/health", 404),
        ("DELETE", "/tenant/nobody", 404),
        ("GET", "/tenant/Not%20an%20id/health", 400),
        ("GET", "/tenant/pg_catalog/database-url", 400),
        ("GET", "/tenants?limit=0", 400),
        ("GET", "/tenants?limit=x", 400),
        ("GET", "/nothing", 404),
        ("POST", "/tenants", 405),
    ] {
        let (status, body) = http(port, method, path, token).await;
        assert_eq!(status, expected, "{method} {path}: {body}");
        assert!(body["error"]["message"].is_string(), "{body}");
    }
    proxy.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_does_the_same() {
    let (one, two) = (Cluster::start(), Cluster::start());
    let mut config = config(&[&one], None);
    config.provision.admin_password = Secret::new(PASSWORD);
    config.users.push(User { name: "app".into(), password: Secret::new("pw"), ..User::default() });
    let shard = pgusher::control::records::ShardRecord {
        name: "late".into(),
        host: "127.0.0.1".into(),
        port: two.port(),
        database: "tenants".into(),
        weight: 100,
        region: "eu".into(),
        max_db_connections: None,
        rls_database: "shared".into(),
        dedicated_to: None,
        tenants: 0,
    };
    let running = Proxy::start(config.clone()).await;
    assert!(running.directory.user("app").unwrap().verifier.is_some());
    assert_eq!(cli::shard_add(&config, &shard, false).await.unwrap(), "shard late is ready\n");
    until("the shard", || running.directory.shard("late").is_some()).await;
    assert_eq!(
        cli::tenant_create(&config, "x", &Choice { shard: Some("late".into()), plan: None }, false).await.unwrap(),
        "tenant x is active on shard late\n"
    );
    until("the tenant", || running.directory.find("x").is_some()).await;
    assert!(cli::tenant_create(&config, "y", &Choice { shard: Some("none".into()), plan: None }, false).await.is_err());
    assert!(cli::tenant_create(&config, "Y", &Choice::default(), false).await.is_err());
    assert!(cli::tenant_list(&config, None, None, false, false).await.unwrap().contains("x   active"));
    assert!(cli::tenant_show(&config, "x", true).await.unwrap().contains("\"shard\": \"late\""));
    assert!(
        cli::shard_list(&config, false)
            .await
            .unwrap()
            .lines()
            .any(|line| line.starts_with("late") && line.ends_with('1'))
    );
    as_tenant(&two, "x").await;
    assert_eq!(cli::tenant_delete(&config, "x", false).await.unwrap(), "tenant x is deleted\n");
    until("the end", || running.directory.find("x").is_none()).await;
    let _ = running.control.make(&id("z"), "test", Wanted::ByConnecting).await;
    running.stop().await;
}
