//! The canary: it finds nothing where nothing is wrong, a hole where there is one, and leaves nothing behind.

#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod support;

use std::process::Command;
use std::time::{Duration, Instant};

use pgusher::config::{Config, Purpose};
use pgusher::control::canary::Outcome;
use pgusher::control::provision::Choice;
use pgusher::server::Server;
use pgusher::tenant::{Plan, TenantId};
use support::postgres::{Cluster, PASSWORD};

const SECRET: &str = "0123456789abcdef0123456789abcdef";
const TOKEN: &str = "a-token-of-some-length";

struct Proxy {
    server: Server,
    dir: tempfile::TempDir,
}

impl Proxy {
    /// With one tenant of each of these plans.
    async fn start(cluster: &Cluster, plans: &[Plan], more: &str) -> Self {
        let hardening = if more.is_empty() { "compat" } else { "strict" };
        let dir = tempfile::tempdir().unwrap();
        let text = format!(
            "{more}[proxy]\nlisten_port = 6432\n[api]\nlisten = \"127.0.0.1:6480\"\ntoken = \"{TOKEN}\"\n[audit]\nfile = {:?}\n\
             [provision]\nmaster_secret = \"{SECRET}\"\nhardening = \"{hardening}\"\n\
             [[users]]\nname = \"app\"\npassword = \"x\"\ntenants = [\"*\"]\nauto_provision = true\n\
             [[shards]]\nname = \"one\"\nport = {}\nadmin_password = \"{PASSWORD}\"\n",
            dir.path().join("audit.log"),
            cluster.port(),
        );
        std::fs::write(dir.path().join("pgusher.toml"), &text).unwrap();
        let no_variables = std::iter::empty::<(String, String)>();
        let mut config = Config::parse("test", &text, no_variables, Purpose::Serve).unwrap();
        config.proxy.listen_port = 0;
        (config.api.listen, config.metrics.listen) = ("127.0.0.1:0".into(), "127.0.0.1:0".into());
        let server = Server::start(config).await.unwrap();
        for plan in plans {
            let id = TenantId::parse(&format!("tenant_{}", plan.as_str())).unwrap();
            let choice = Choice { plan: Some(*plan), shard: None };
            server.control().create(&id, "test", choice).await.unwrap();
        }
        Self { server, dir }
    }

    async fn run(&self) -> Vec<Outcome> {
        self.server.control().run_canary("test").await.unwrap()
    }

    async fn metrics(&self) -> String {
        let url = format!("http://{}/metrics", self.server.addresses().metrics.unwrap());
        tokio::task::spawn_blocking(move || pgusher::cli::health::probe(&url, Duration::from_secs(5)).unwrap())
            .await
            .unwrap()
    }

    async fn stop(self) {
        self.server.drain(Duration::from_secs(5)).await;
    }
}

async fn left_on(cluster: &Cluster) -> i64 {
    let sql = "SELECT (SELECT count(*) FROM pg_roles WHERE rolname ~ '^pgusher_canary') \
               + (SELECT count(*) FROM pg_database WHERE datname ~ '^pgusher_canary') \
               + (SELECT count(*) FROM pg_namespace WHERE nspname ~ '^pgusher_canary') \
               + (SELECT count(*) FROM pg_class WHERE relname ~ '^pgusher_canary')";
    let mut left = 0;
    for database in ["tenants", "shared"] {
        left += match cluster.connect("postgres", PASSWORD, database).await {
            Ok(client) => client.query_one(sql, &[]).await.unwrap().get::<_, i64>(0),
            Err(_) => 0,
        };
    }
    left
}

async fn eventually(what: &str, condition: impl AsyncFn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !condition().await {
        assert!(Instant::now() < deadline, "still not: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn where_nothing_is_wrong_it_finds_nothing_and_leaves_nothing() {
    let cluster = Cluster::start();
    let proxy = Proxy::start(&cluster, &[Plan::Schema, Plan::Database, Plan::Rls], "").await;
    let outcomes = proxy.run().await;
    assert_eq!(outcomes.iter().map(|o| o.plan.as_str()).collect::<Vec<_>>(), ["rls", "schema", "database"]);
    for outcome in &outcomes {
        assert!(outcome.leaks.is_empty() && outcome.errors.is_empty(), "{outcome:#?}");
        assert!(outcome.attacks >= 50, "{outcome:?}");
    }
    assert_eq!(left_on(&cluster).await, 0);
    assert_eq!(proxy.server.control().list("", 100, false).await.unwrap().len(), 3);
    let metrics = proxy.metrics().await;
    let line = |start: &str| metrics.lines().find(|line| line.starts_with(start)).unwrap_or_default().to_owned();
    assert_eq!(line("pgusher_canary_leaks{plan=\"schema\""), "pgusher_canary_leaks{plan=\"schema\",shard=\"one\"} 0");
    assert!(!line("pgusher_canary_last_run_timestamp_seconds{").ends_with(" 0"));
    // What it tried was seen, and is nobody's violation.
    let seen: u64 = line("pgusher_canary_seen_total").rsplit(' ').next().unwrap().parse().unwrap();
    assert!(seen > 100, "{seen}");
    let counted = metrics.lines().filter(|line| line.starts_with("cross_tenant_isolation_violations{"));
    assert!(counted.clone().all(|line| line.ends_with(" 0")), "{:?}", counted.collect::<Vec<_>>());
    proxy.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn strict_holds_too_and_it_runs_by_itself() {
    let cluster = Cluster::start();
    let strict = "[canary]\ninterval = \"1s\"\n";
    let proxy = Proxy::start(&cluster, &[Plan::Schema, Plan::Database, Plan::Rls], strict).await;
    // By itself, on its schedule.
    eventually("a run on schedule", async || proxy.server.control().canary_outcomes().len() == 3).await;
    let outcomes = proxy.server.control().canary_outcomes();
    assert!(outcomes.iter().all(|o| o.leaks.is_empty() && o.errors.is_empty()), "{outcomes:#?}");
    proxy.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hole_in_the_wall_is_found() {
    let cluster = Cluster::start();
    let proxy = Proxy::start(&cluster, &[Plan::Schema, Plan::Rls], "").await;
    // Somebody grants too much, and somebody else turns row-level security off wherever it is turned on.
    let admin = cluster.admin("tenants").await;
    admin.batch_execute("GRANT pg_read_all_data, pg_write_all_data TO app_tenants").await.unwrap();
    let shared = cluster.admin("shared").await;
    shared
        .batch_execute(
            "CREATE FUNCTION open() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN \
               IF EXISTS (SELECT FROM pg_class WHERE relname = 'pgusher_canary' AND relrowsecurity) THEN \
                 ALTER TABLE public.pgusher_canary DISABLE ROW LEVEL SECURITY; END IF; END $$; \
             CREATE EVENT TRIGGER open ON ddl_command_end WHEN TAG IN ('CREATE POLICY') EXECUTE FUNCTION open()",
        )
        .await
        .unwrap();
    let outcomes = proxy.run().await;
    let leaks = |plan: &str| outcomes.iter().find(|o| o.plan == plan).unwrap().leaks.clone();
    for (plan, expected) in [
        ("schema", "read-qualified without guard: it read the victim's secret"),
        ("schema", "read-do with guard: it read the victim's secret"),
        ("schema", "write-update without guard"),
        ("rls", "rows-all with guard: it read the victim's secret"),
        ("rls", "rows-forge without guard"),
    ] {
        let leaks = leaks(plan);
        assert!(leaks.iter().any(|leak| leak.starts_with(expected)), "{expected}: {leaks:#?}");
    }
    // The guard alone would have stopped this one.
    assert!(!leaks("schema").iter().any(|leak| leak.starts_with("read-qualified with guard")));
    assert_eq!(left_on(&cluster).await, 0);
    let metrics = proxy.metrics().await;
    let counted = |line: &&str| line.starts_with("cross_tenant_isolation_violations{") && line.contains("\"canary\"");
    assert!(
        metrics.lines().any(|line| counted(&line) && line.contains("leaked") && !line.ends_with(" 0")),
        "{metrics}"
    );

    // Repaired, it finds nothing any more.
    shared.batch_execute("DROP EVENT TRIGGER open; DROP FUNCTION open()").await.unwrap();
    admin.batch_execute("REVOKE pg_read_all_data, pg_write_all_data FROM app_tenants").await.unwrap();
    assert!(proxy.run().await.iter().all(|outcome| outcome.leaks.is_empty()));
    let catalog = cluster.admin("pgusher").await;
    let sql = "SELECT count(*) FROM pgusher.events WHERE what = 'violation' AND detail->>'kind' = 'canary'";
    eventually("the leaks in the event log", async || catalog.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) > 5)
        .await;
    let log = proxy.dir.path().join("audit.log");
    proxy.server.drain(Duration::from_secs(5)).await;
    let log = std::fs::read_to_string(log).unwrap();
    assert!(log.contains("\"kind\":\"canary\"") && log.contains("\"canary ran\""), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_broken_off_run_leaves_the_next_one_removes() {
    let cluster = Cluster::start();
    let proxy = Proxy::start(&cluster, &[Plan::Schema], "").await;
    let control = proxy.server.control();
    let running = tokio::spawn(async move { control.run_canary("test").await });
    eventually("canaries", async || left_on(&cluster).await >= 4).await;
    // Not twice at the same time.
    assert_eq!(&*proxy.server.control().run_canary("test").await.unwrap_err().code, "55000");
    proxy.stop().await;
    assert_eq!(&*running.await.unwrap().unwrap_err().code, "57P03");
    assert!(left_on(&cluster).await > 0);

    let proxy = Proxy::start(&cluster, &[], "").await;
    let outcomes = proxy.run().await;
    assert!(outcomes.iter().all(|o| o.leaks.is_empty() && o.errors.is_empty()), "{outcomes:#?}");
    assert_eq!(left_on(&cluster).await, 0);
    let catalog = cluster.admin("pgusher").await;
    let sql =
        "SELECT (detail->>'leftovers')::int FROM pgusher.events WHERE what = 'canary ran' ORDER BY id DESC LIMIT 1";
    assert!(catalog.query_one(sql, &[]).await.unwrap().get::<_, i32>(0) > 0);
    proxy.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_takes_its_names_and_the_command_line_runs_it() {
    let cluster = Cluster::start();
    let proxy = Proxy::start(&cluster, &[Plan::Schema], "").await;
    let id = TenantId::parse("pgusher_canary_mine").unwrap();
    let error = proxy.server.control().create(&id, "test", Choice::default()).await.unwrap_err();
    assert!(error.message.contains("reserved") && error.hint.is_some(), "{error:?}");
    assert!(proxy.server.control().database_url(&id, "test", None).await.is_err());
    let dsn = format!(
        "postgresql://app.pgusher_canary_mine:x@127.0.0.1:{}/pgusher_canary_mine",
        proxy.server.addresses().proxy[0].port()
    );
    assert!(tokio_postgres::connect(&dsn, tokio_postgres::NoTls).await.is_err());

    let url = format!("http://{}", proxy.server.addresses().api.unwrap());
    let config = proxy.dir.path().join("pgusher.toml");
    let run = move || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pgusher"));
        command.arg("canary").arg("--config").arg(&config).args(["--url", &url]);
        let output = command.output().unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let (sound, said) = tokio::task::spawn_blocking(run.clone()).await.unwrap();
    assert!(sound && said.contains("one    schema"), "{said}");
    let admin = cluster.admin("tenants").await;
    admin.batch_execute("GRANT pg_read_all_data TO app_tenants").await.unwrap();
    let (sound, said) = tokio::task::spawn_blocking(run).await.unwrap();
    assert!(!sound && said.contains("LEAK: shard one, plan schema: read-qualified without guard"), "{said}");
    proxy.stop().await;
}
