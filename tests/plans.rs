//! The four plans against real clusters: provisioned by the control plane, then looked at past every proxy, so that
//! nothing but grants stands between two tenants.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use pgusher::config::{Config, Secret, ShardConfig, User};
use pgusher::control::adopt::{Adopted, Adoption};
use pgusher::control::provision::Choice;
use pgusher::control::records::ShardRecord;
use pgusher::control::shared_tables::Conversion;
use pgusher::control::{Control, NoTraffic};
use pgusher::directory::Directory;
use pgusher::server::Server;
use pgusher::tenant::credential::server_password;
use pgusher::tenant::plan::Hardening;
use pgusher::tenant::{Plan, TenantId};
use support::postgres::{Cluster, PASSWORD};
use tokio::sync::mpsc;
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

const SECRET: &str = "0123456789abcdef0123456789abcdef";
const NOTES: &str = "CREATE TABLE notes (id bigserial PRIMARY KEY, note text);";

struct Proxy {
    control: Arc<Control>,
    directory: Arc<Directory>,
    shutdown: CancellationToken,
}

impl Proxy {
    async fn start(config: Config) -> Self {
        let (sender, receiver) = mpsc::channel(16);
        let directory = Arc::new(Directory::new(sender));
        let shutdown = CancellationToken::new();
        let control =
            Control::start(Arc::new(config), directory.clone(), receiver, Arc::new(NoTraffic), shutdown.clone())
                .await
                .unwrap();
        Self { control, directory, shutdown }
    }

    async fn create(&self, tenant: &str, plan: Plan) {
        let choice = Choice { shard: None, plan: Some(plan) };
        self.control.create(&id(tenant), "test", choice).await.unwrap();
    }

    async fn stop(self) {
        self.shutdown.cancel();
        self.control.finish().await;
    }
}

fn id(text: &str) -> TenantId {
    TenantId::parse(text).unwrap()
}

fn config(cluster: &Cluster, template: Option<&Path>) -> Config {
    let mut config = Config::default();
    config.shards.push(shard("shard_1", cluster));
    config.provision.master_secret = Secret::new(SECRET);
    config.provision.template_dir = template.map(Path::to_owned);
    config.provision.provision_timeout = Duration::from_secs(30);
    config
}

fn shard(name: &str, cluster: &Cluster) -> ShardConfig {
    ShardConfig {
        name: name.into(),
        port: cluster.port(),
        admin_password: Secret::new(PASSWORD),
        ..ShardConfig::default()
    }
}

fn template(text: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("01.sql"), text).unwrap();
    dir
}

async fn login(cluster: &Cluster, role: &str, database: &str) -> Result<Client, tokio_postgres::Error> {
    cluster.connect(role, &server_password(SECRET, role), database).await
}

/// The server connection that the proxy would open for the tenant.
async fn seat(proxy: &Proxy, cluster: &Cluster, tenant: &str) -> Client {
    let tenant = proxy.directory.find(tenant).unwrap();
    let client = login(cluster, tenant.role(), tenant.database()).await.unwrap();
    for (name, value) in tenant.startup_settings().iter().filter(|(name, _)| name == "search_path") {
        client.batch_execute(&format!("SET {name} = {value}")).await.unwrap();
    }
    client
}

async fn count(client: &Client, sql: &str) -> i64 {
    client.query_one(sql, &[]).await.unwrap().get(0)
}

async fn code(client: &Client, sql: &str) -> String {
    match client.batch_execute(sql).await {
        Ok(()) => "00000".to_owned(),
        Err(error) => error.code().unwrap().code().to_owned(),
    }
}

/// Whatever a role can leave on a server.
async fn left(cluster: &Cluster, pattern: &str) -> Vec<String> {
    let admin = cluster.admin("postgres").await;
    let sql = format!(
        "SELECT 'role ' || rolname FROM pg_roles WHERE rolname ~ '{pattern}' \
         UNION ALL SELECT 'database ' || datname FROM pg_database WHERE datname ~ '{pattern}' \
         UNION ALL SELECT 'setting ' || setconfig::text FROM pg_db_role_setting WHERE setconfig::text ~ '{pattern}'"
    );
    admin.query(&sql, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_of_its_own_lets_nobody_else_in() {
    let cluster = Cluster::start();
    let files = template(NOTES);
    let proxy = Proxy::start(config(&cluster, Some(files.path()))).await;
    proxy.create("client_001", Plan::Database).await;
    proxy.create("client_002", Plan::Database).await;
    proxy.create("neighbour", Plan::Schema).await;
    let one = seat(&proxy, &cluster, "client_001").await;
    let two = seat(&proxy, &cluster, "client_002").await;
    one.batch_execute("INSERT INTO notes (note) VALUES ('one')").await.unwrap();
    two.batch_execute("INSERT INTO notes (note) VALUES ('two'), ('two')").await.unwrap();
    assert_eq!(count(&one, "SELECT count(*) FROM notes").await, 1);
    assert_eq!(count(&two, "SELECT count(*) FROM public.notes").await, 2);
    for (role, databases) in [
        ("client_001", &["client_002", "tenants", "postgres", "template1", "pgusher", "pgusher_template"][..]),
        ("neighbour", &["client_001", "pgusher_template"]),
    ] {
        for database in databases {
            let refused = login(&cluster, role, database).await.err().unwrap();
            assert_eq!(refused.code().unwrap().code(), "42501", "{role} {database}");
        }
    }
    for (sql, expected) in [
        ("SET ROLE client_002", "42501"),
        ("CREATE SCHEMA x", "42501"),
        ("CREATE EXTENSION pg_trgm", "42501"),
        ("CREATE DATABASE x", "42501"),
        (
            "GRANT CONNECT ON DATABASE client_001 TO client_002; SELECT 1 / has_database_privilege('client_002', 'client_001', 'CONNECT')::int",
            "22012",
        ),
        ("ALTER DATABASE client_001 CONNECTION LIMIT 0", "42501"),
        ("DROP DATABASE client_002", "42501"),
        ("COMMENT ON DATABASE client_001 IS 'x'", "42501"),
        ("COMMENT ON ROLE client_001 IS 'x'", "42501"),
        ("ALTER TABLE notes ADD COLUMN x int", "00000"),
        ("SELECT pg_catalog.pg_advisory_lock(1)", "42501"),
        ("SELECT pg_advisory_lock(1); SELECT pg_advisory_unlock(1)", "00000"),
        ("SELECT * FROM pg_stat_activity", "42501"),
    ] {
        assert_eq!(code(&one, sql).await, expected, "{sql}");
    }
    // Sessions, a prepared transaction and large objects do not hold a deletion up.
    one.batch_execute("SELECT lo_create(0)").await.unwrap();
    proxy.control.delete(&id("client_001"), "test").await.unwrap();
    assert_eq!(left(&cluster, "client_001").await, Vec::<String>::new());
    assert_eq!(count(&two, "SELECT count(*) FROM notes").await, 2);
    // It can come back, empty.
    proxy.create("client_001", Plan::Database).await;
    let one = seat(&proxy, &cluster, "client_001").await;
    assert_eq!(count(&one, "SELECT count(*) FROM notes").await, 0);
    proxy.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_cannot_be_made_leaves_nothing() {
    let cluster = Cluster::start();
    let files = template("CREATE TABLE t (a int);\nSELECT 1/0;");
    let proxy = Proxy::start(config(&cluster, Some(files.path()))).await;
    let admin = cluster.admin("postgres").await;
    let choice = || Choice { shard: None, plan: Some(Plan::Database) };
    let error = proxy.control.create(&id("client_001"), "test", choice()).await.unwrap_err();
    assert_eq!(error.message, "template 01.sql, line 2: division by zero");
    assert_eq!(left(&cluster, "client_001").await, Vec::<String>::new());
    // One whose making was cut off is completed: the role and the database are there, nothing in it.
    std::fs::write(files.path().join("01.sql"), NOTES).unwrap();
    admin
        .batch_execute("CREATE ROLE client_001; COMMENT ON ROLE client_001 IS 'pgusher tenant client_001'")
        .await
        .unwrap();
    admin.batch_execute("CREATE DATABASE client_001 OWNER provisioner TEMPLATE pgusher_template").await.unwrap();
    proxy.control.create(&id("client_001"), "test", choice()).await.unwrap();
    assert_eq!(count(&seat(&proxy, &cluster, "client_001").await, "SELECT count(*) FROM notes").await, 0);
    // A database of that name that is somebody else's is left alone, by creation and by deletion.
    for sql in [
        "CREATE DATABASE client_003",
        "CREATE DATABASE client_004 OWNER provisioner",
        "COMMENT ON DATABASE client_004 IS 'pgusher tenant client_001 x'",
    ] {
        admin.batch_execute(sql).await.unwrap();
    }
    for taken in ["client_003", "client_004", "tenants"] {
        let error = proxy.control.create(&id(taken), "test", choice()).await.unwrap_err();
        assert_eq!(error.code, "55000", "{error}");
    }
    assert_eq!(left(&cluster, "client_00[34]").await.len(), 2);
    // A tenant keeps its plan.
    let error = proxy.control.database_url(&id("client_001"), "test", Some(Plan::Schema)).await.unwrap_err();
    assert_eq!(error.message, "tenant \"client_001\" has plan \"database\", not \"schema\"");
    proxy.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_with_a_shard_of_its_own_shares_it_with_nobody() {
    let (shared, own, old) = (Cluster::start(), Cluster::start(), Cluster::start());
    let files = template(NOTES);
    let mut config = config(&shared, Some(files.path()));
    config.shards.push(ShardConfig { dedicated_to: Some("client_001".into()), ..shard("own", &own) });
    config.shards.push(ShardConfig {
        dedicated_to: Some("client_002".into()),
        database: "app".into(),
        tenant_role: Some("boss".into()),
        tenant_password: Secret::new("given"),
        ..shard("old", &old)
    });
    let admin = old.admin("postgres").await;
    admin.batch_execute("CREATE ROLE boss LOGIN SUPERUSER PASSWORD 'given'").await.unwrap();
    admin.batch_execute("CREATE DATABASE app").await.unwrap();
    let proxy = Proxy::start(config).await;
    for n in 0..20 {
        proxy.create(&format!("t{n}"), Plan::Schema).await;
    }
    assert_eq!(proxy.directory.tenants_on("shard_1"), 20, "none is put on somebody's own shard");
    // Its shard waits for it, whatever plan the others have.
    proxy.control.create(&id("client_001"), "test", Choice::default()).await.unwrap();
    let tenant = proxy.directory.find("client_001").unwrap();
    assert_eq!((tenant.plan, tenant.shard.name.as_str(), tenant.managed), (Plan::Cluster, "own", true));
    let one = seat(&proxy, &own, "client_001").await;
    for sql in ["INSERT INTO notes (note) VALUES ('x')", "CREATE SCHEMA more", "CREATE DATABASE second"] {
        one.batch_execute(sql).await.unwrap();
    }
    login(&own, "client_001", "second").await.unwrap();
    // An existing role is used as it is.
    proxy.control.create(&id("client_002"), "test", Choice::default()).await.unwrap();
    let tenant = proxy.directory.find("client_002").unwrap();
    assert_eq!((tenant.role(), tenant.database(), tenant.managed), ("boss", "app", false));
    let health = proxy.control.tenant_health(&id("client_002")).await.unwrap();
    assert!(health.probe.reachable, "{health:?}");
    for (tenant, choice) in [
        ("t0x", Choice { shard: Some("own".into()), plan: Some(Plan::Schema) }),
        ("t0x", Choice { shard: None, plan: Some(Plan::Cluster) }),
        ("t0x", Choice { shard: Some("own".into()), plan: Some(Plan::Cluster) }),
    ] {
        let error = proxy.control.create(&id(tenant), "test", choice.clone()).await.unwrap_err();
        assert_eq!(error.code, "55000", "{choice:?} {error}");
    }
    own.admin("postgres").await.batch_execute("ALTER ROLE client_001 REPLICATION").await.unwrap();
    proxy.control.delete(&id("client_001"), "test").await.unwrap();
    assert_eq!(left(&own, "client_001|second|tenants").await, Vec::<String>::new());
    let record = proxy.control.delete(&id("client_002"), "test").await.unwrap();
    assert!(!record.managed);
    assert_eq!(left(&old, "boss|app$").await, ["role boss", "database app"]);
    proxy.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grade_can_be_changed_there_and_back() {
    let cluster = Cluster::start();
    let files = template(NOTES);
    let config = config(&cluster, Some(files.path()));
    // Allowed by a fresh server, by compat, by strict.
    let probes = [
        ("SELECT relname FROM pg_class LIMIT 1", [true, true]),
        ("SELECT reltuples FROM pg_class LIMIT 1", [true, false]),
        ("SELECT prosrc FROM pg_proc LIMIT 1", [true, false]),
        ("SELECT proname FROM pg_proc LIMIT 1", [true, true]),
        ("SELECT rolname FROM pg_roles LIMIT 1", [true, false]),
        ("SELECT pg_relation_size('notes')", [true, false]),
        ("SELECT lo_unlink(lo_create(0))", [true, false]),
        ("SELECT description FROM pg_description LIMIT 1", [true, false]),
        ("SELECT pg_catalog.pg_advisory_lock(1)", [false, false]),
        ("SELECT pg_advisory_lock(1); SELECT pg_advisory_unlock(1)", [true, true]),
        ("SELECT pg_notify('a', 'b')", [true, true]),
        ("SELECT pg_notification_queue_usage()", [false, false]),
        ("SELECT lo_export(1, 'x')", [false, false]),
        ("SELECT count(*) FROM pg_locks", [false, false]),
        ("SELECT count(*) FROM pg_catalog.pg_replication_slots", [false, false]),
        ("SELECT count(*) FROM pg_replication_slots", [true, true]),
        ("INSERT INTO notes (note) VALUES ('x'); UPDATE notes SET note = 'y'; SELECT note FROM notes", [true, true]),
    ];
    for (round, grade) in
        [Hardening::Compat, Hardening::Strict, Hardening::Compat, Hardening::Strict].into_iter().enumerate()
    {
        let mut config = config.clone();
        config.provision.hardening = grade;
        let proxy = Proxy::start(config).await;
        for plan in [Plan::Rls, Plan::Schema, Plan::Database] {
            let first = format!("{}_first", plan.as_str());
            let fresh = format!("{}_{round}", plan.as_str());
            if round > 0 {
                // Without a new tenant: what is there is brought to the grade at the start.
                let client = seat(&proxy, &cluster, &first).await;
                let until = tokio::time::Instant::now() + Duration::from_secs(20);
                while (code(&client, "SELECT rolname FROM pg_roles").await == "00000") != (grade == Hardening::Compat) {
                    assert!(tokio::time::Instant::now() < until, "{first} was not brought to {grade:?}");
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
            proxy.create(&first, plan).await;
            proxy.create(&fresh, plan).await;
            for tenant in [first, fresh] {
                let client = seat(&proxy, &cluster, &tenant).await;
                for (sql, allowed) in probes {
                    let expected = allowed[usize::from(grade == Hardening::Strict)];
                    let got = code(&client, sql).await;
                    assert_eq!(got == "00000", expected, "{tenant} {grade:?} {got} {sql}");
                }
            }
        }
        proxy.stop().await;
    }
}

/// A policy of the name that pgusher looks for, on a temporary table, with a trigger that runs whatever the mode is.
#[tokio::test(flavor = "multi_thread")]
async fn deleting_a_tenant_runs_nothing_that_another_has_planted() {
    let cluster = Cluster::start();
    let files = template(NOTES);
    let proxy = Proxy::start(config(&cluster, Some(files.path()))).await;
    for (plan, planted) in [(Plan::Rls, "TEMP TABLE t"), (Plan::Schema, "TABLE t"), (Plan::Database, "TABLE t")] {
        let [bad, good] = ["bad", "good"].map(|name| format!("{}_{name}", plan.as_str()));
        proxy.create(&bad, plan).await;
        proxy.create(&good, plan).await;
        let client = seat(&proxy, &cluster, &bad).await;
        let function = if plan == Plan::Rls { "pg_temp.grab" } else { "grab" };
        client
            .batch_execute(&format!(
                "CREATE {planted} (tenant_id name, id int); \
                 ALTER TABLE t ENABLE ROW LEVEL SECURITY; CREATE POLICY tenant_isolation ON t USING (true); \
                 CREATE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS $$ \
                   BEGIN EXECUTE 'ALTER ROLE {bad} SUPERUSER'; RETURN NULL; END $$; \
                 CREATE TRIGGER g BEFORE DELETE OR TRUNCATE ON t FOR EACH STATEMENT EXECUTE FUNCTION {function}(); \
                 ALTER TABLE t ENABLE ALWAYS TRIGGER g"
            ))
            .await
            .unwrap();
        let admin = cluster.admin("postgres").await;
        let superusers = format!("SELECT count(*) FROM pg_roles WHERE rolname = '{bad}' AND rolsuper");
        proxy.control.delete(&id(&good), "test").await.unwrap();
        assert_eq!(count(&admin, &superusers).await, 0, "{plan:?}: by deleting another");
        proxy.control.delete(&id(&bad), "test").await.unwrap();
        assert_eq!(left(&cluster, &bad).await, Vec::<String>::new(), "{plan:?}");
    }
    proxy.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_changes_the_grade_of_tenants_that_are_there() {
    let cluster = Cluster::start();
    let files = template(NOTES);
    let mut config = config(&cluster, Some(files.path()));
    let proxy = Proxy::start(config.clone()).await;
    for plan in [Plan::Rls, Plan::Schema, Plan::Database] {
        proxy.create(plan.as_str(), plan).await;
    }
    for grade in [Hardening::Strict, Hardening::Compat, Hardening::Strict] {
        config.provision.hardening = grade;
        proxy.control.reload(&config).await.unwrap();
        for plan in [Plan::Rls, Plan::Schema, Plan::Database] {
            let client = seat(&proxy, &cluster, plan.as_str()).await;
            for sql in ["SELECT rolname FROM pg_roles", "SELECT prosrc FROM pg_proc", "SELECT lo_unlink(lo_create(0))"]
            {
                let allowed = code(&client, sql).await == "00000";
                assert_eq!(allowed, grade == Hardening::Compat, "{plan:?} {grade:?} {sql}");
            }
            let deletes = code(&client, "DELETE FROM notes").await == "00000";
            assert_eq!(deletes, grade == Hardening::Compat || plan != Plan::Rls, "{plan:?} {grade:?}");
        }
        // New ones, too.
        let fresh = format!("fresh_{}", grade.as_str());
        proxy.create(&fresh, Plan::Database).await;
        let client = seat(&proxy, &cluster, &fresh).await;
        assert_eq!(code(&client, "SELECT rolname FROM pg_roles").await == "00000", grade == Hardening::Compat);
        proxy.control.delete(&id(&fresh), "test").await.unwrap();
    }
    proxy.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shard_changes_hands_only_when_nobody_lives_there() {
    let (shared, own) = (Cluster::start(), Cluster::start());
    let mut config = config(&shared, None);
    config.shards.push(ShardConfig { dedicated_to: Some("boss".into()), ..shard("own", &own) });
    let proxy = Proxy::start(config.clone()).await;
    proxy.create("t1", Plan::Schema).await;
    proxy.create("boss", Plan::Cluster).await;
    let shards = proxy.control.list_shards().await.unwrap();
    let record = |name: &str| shards.iter().find(|shard| shard.name == name).unwrap().clone();
    for (name, dedicated_to, whose) in [
        ("shard_1", Some("t1"), "t1"),
        ("shard_1", Some("boss"), "t1"),
        ("own", None, "boss"),
        ("own", Some("t2"), "boss"),
    ] {
        let changed = ShardRecord { dedicated_to: dedicated_to.map(str::to_owned), ..record(name) };
        let error = proxy.control.add_shard(&changed, "test").await.unwrap_err();
        assert_eq!((&*error.code, error.hint.is_some()), ("55000", true), "{name} {dedicated_to:?}: {error}");
        assert!(error.detail.unwrap().contains(&format!("\"{whose}\"")), "{name} {dedicated_to:?}");
        // Nor by the configuration.
        let mut changed = config.clone();
        changed.shards.iter_mut().find(|shard| shard.name == name).unwrap().dedicated_to =
            dedicated_to.map(str::to_owned);
        assert_eq!(proxy.control.reload(&changed).await.unwrap_err().code, "55000", "{name} {dedicated_to:?}");
    }
    proxy.control.delete(&id("t1"), "test").await.unwrap();
    // The database that tenants shared is not one of its own.
    let changed = ShardRecord { dedicated_to: Some("t1".into()), database: "t1".into(), ..record("shard_1") };
    proxy.control.add_shard(&changed, "test").await.unwrap();
    proxy.create("t1", Plan::Cluster).await;
    proxy.stop().await;
}

/// The shape of a small application: numbers from sequences and identity, keys, references of each kind.
const APP: &str = "\
    CREATE TABLE users (id bigserial PRIMARY KEY, email text UNIQUE, note text);
    CREATE TABLE services (id bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, name text);
    CREATE UNIQUE INDEX services_name ON services (name);
    CREATE TABLE bookings (id serial PRIMARY KEY, user_id bigint NOT NULL REFERENCES users ON DELETE CASCADE,
      service_id bigint REFERENCES services (id) ON DELETE SET NULL DEFERRABLE INITIALLY DEFERRED,
      parent int REFERENCES bookings, note text DEFAULT 'none');
    CREATE INDEX ON bookings (user_id);";

/// Everything that a tenant does to its rows, and everything that it must not be able to do to those of another.
async fn rows_are_apart(one: &Client, two: &Client, other: &str) {
    for client in [one, two] {
        // The same keys for both.
        client
            .batch_execute(
                "INSERT INTO users (id, email) VALUES (901, 'a@b'), (902, 'c@d');
                 INSERT INTO services (id, name) VALUES (901, 'cut');
                 INSERT INTO bookings (id, user_id, service_id) VALUES (901, 901, 901), (902, 902, NULL);
                 INSERT INTO bookings (user_id, parent) VALUES (901, 901);
                 INSERT INTO services (name) VALUES ('dye');
                 INSERT INTO users (email) VALUES ('e@f');
                 UPDATE bookings SET note = 'mine' WHERE id = 901",
            )
            .await
            .unwrap();
    }
    assert_eq!(count(one, "SELECT count(*) FROM bookings").await, 3);
    assert_eq!(count(one, "SELECT count(*) FROM bookings NATURAL JOIN (SELECT 901 AS id) x").await, 1);
    assert_eq!(count(one, &format!("SELECT count(*) FROM bookings WHERE tenant_id = '{other}'")).await, 0);
    for (sql, expected) in [
        (format!("INSERT INTO users (tenant_id, email) VALUES ('{other}', 'x')"), "42501"),
        (format!("UPDATE users SET tenant_id = '{other}'"), "42501"),
        (format!("SET ROLE {other}"), "42501"),
        ("SET ROLE provisioner".to_owned(), "42501"),
        // Of the other's: a key that only it has does not exist.
        ("INSERT INTO bookings (user_id) VALUES (977)".to_owned(), "23503"),
        ("INSERT INTO users (email) VALUES ('a@b')".to_owned(), "23505"),
        ("ALTER TABLE users DISABLE ROW LEVEL SECURITY".to_owned(), "42501"),
        ("DROP POLICY tenant_isolation ON users".to_owned(), "42501"),
        ("CREATE TABLE mine (a int)".to_owned(), "42501"),
        ("TRUNCATE bookings".to_owned(), "42501"),
        ("SELECT setval('users_id_seq', 1)".to_owned(), "42501"),
        ("SELECT last_value FROM users_id_seq".to_owned(), "42501"),
        (
            "CREATE TRIGGER t BEFORE INSERT ON users EXECUTE FUNCTION pg_catalog.suppress_redundant_updates_trigger()"
                .to_owned(),
            "42501",
        ),
        ("COPY users FROM STDIN".to_owned(), "0A000"),
        ("SET row_security = off; SELECT * FROM users".to_owned(), "42501"),
    ] {
        if sql.contains("977") {
            two.batch_execute("INSERT INTO users (id) VALUES (977)").await.unwrap();
        }
        assert_eq!(code(one, &sql).await, expected, "{sql}");
        one.batch_execute("RESET row_security").await.unwrap();
    }
    // Deleting: what hangs on it goes or is emptied, the other's does not.
    one.batch_execute("DELETE FROM bookings WHERE parent = 901; DELETE FROM users WHERE id = 902; DELETE FROM services WHERE id = 901").await.unwrap();
    assert_eq!(count(one, "SELECT count(*) FROM bookings").await, 1);
    assert_eq!(
        count(one, "SELECT count(*) FROM bookings WHERE service_id IS NULL AND tenant_id = session_user").await,
        1
    );
    assert_eq!(count(two, "SELECT count(*) FROM bookings").await, 3);
    assert_eq!(count(two, "SELECT count(*) FROM bookings WHERE service_id = 901").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_shared_tables_are_told_apart_by_login() {
    let cluster = Cluster::start();
    let files = template(APP);
    let mut config = config(&cluster, Some(files.path()));
    config.provision.plan = Plan::Rls;
    let proxy = Proxy::start(config.clone()).await;
    proxy.create("client_001", Plan::Rls).await;
    proxy.create("client_002", Plan::Rls).await;
    let one = seat(&proxy, &cluster, "client_001").await;
    let two = seat(&proxy, &cluster, "client_002").await;
    rows_are_apart(&one, &two, "client_002").await;
    let rows = count(&two, "SELECT count(*) FROM bookings").await;
    proxy.control.delete(&id("client_001"), "test").await.unwrap();
    assert_eq!(left(&cluster, "client_001").await, Vec::<String>::new());
    assert_eq!(count(&two, "SELECT count(*) FROM bookings").await, rows);
    let admin = cluster.admin("shared").await;
    for table in ["users", "services", "bookings"] {
        let sql = format!("SELECT count(*) FROM {table} WHERE tenant_id <> 'client_002'");
        assert_eq!(count(&admin, &sql).await, 0, "{table}");
    }
    proxy.stop().await;
    // strict: no right to delete, since it is one to lock the table against everybody.
    assert_eq!(code(&two, "BEGIN; LOCK TABLE users IN ACCESS EXCLUSIVE MODE; ROLLBACK").await, "00000");
    config.provision.hardening = Hardening::Strict;
    let proxy = Proxy::start(config).await;
    proxy.create("client_003", Plan::Rls).await;
    two.batch_execute("ROLLBACK").await.unwrap();
    assert_eq!(code(&two, "BEGIN; LOCK TABLE users IN ACCESS EXCLUSIVE MODE").await, "42501");
    two.batch_execute("ROLLBACK").await.unwrap();
    assert_eq!(code(&two, "DELETE FROM users").await, "42501");
    assert_eq!(code(&two, "UPDATE users SET note = 'x'").await, "00000");
    proxy.stop().await;
}

fn conversion(apply: bool) -> Conversion {
    Conversion { shard: "shard_1".into(), apply, ..Conversion::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_application_without_tenants_becomes_one_with() {
    let cluster = Cluster::start();
    let admin = cluster.admin("postgres").await;
    admin.batch_execute("CREATE ROLE app LOGIN").await.unwrap();
    admin.batch_execute("CREATE DATABASE shared OWNER app").await.unwrap();
    let app = cluster.admin("shared").await;
    app.batch_execute(&format!("{APP} GRANT ALL ON users TO PUBLIC; GRANT ALL ON bookings TO app")).await.unwrap();
    app.batch_execute("INSERT INTO users (email) VALUES ('old'); INSERT INTO bookings (user_id) VALUES (1)")
        .await
        .unwrap();
    let config = config(&cluster, None);
    let proxy = Proxy::start(config.clone()).await;
    // The tables are not taken as they are.
    let choice = Choice { shard: None, plan: Some(Plan::Rls) };
    let error = proxy.control.create(&id("client_001"), "test", choice).await.unwrap_err();
    assert_eq!(error.code, "55000", "{error}");
    assert!(error.detail.unwrap().contains("table users: has rows"));
    let with = Conversion { default_tenant: Some(id("client_001")), ..conversion(false) };
    let said = proxy.control.convert_tables(&with).await.unwrap();
    assert_eq!(code(&app, "SELECT tenant_id FROM users").await, "42703", "nothing is done by saying it");
    let done = proxy.control.convert_tables(&Conversion { apply: true, ..with.clone() }).await.unwrap();
    assert_eq!(said, done);
    assert_eq!(proxy.control.convert_tables(&with).await.unwrap(), Vec::<String>::new(), "once is enough");
    proxy.create("client_001", Plan::Rls).await;
    proxy.create("client_002", Plan::Rls).await;
    let one = seat(&proxy, &cluster, "client_001").await;
    let two = seat(&proxy, &cluster, "client_002").await;
    assert_eq!(count(&one, "SELECT count(*) FROM bookings JOIN users ON users.id = user_id").await, 1);
    assert_eq!(count(&two, "SELECT count(*) FROM bookings").await, 0);
    one.batch_execute("DELETE FROM bookings; DELETE FROM users").await.unwrap();
    rows_are_apart(&one, &two, "client_002").await;
    let sql = "SELECT count(*) FROM pg_class c, aclexplode(relacl) a WHERE relnamespace = 'public'::regnamespace \
               AND relkind = 'r' AND a.grantee NOT IN ('provisioner'::regrole, 'app_tenants'::regrole)";
    assert_eq!(count(&app, sql).await, 0, "others had rights on it");
    proxy.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_shared_safely_is_refused_with_the_reason() {
    let cluster = Cluster::start();
    let proxy = Proxy::start(config(&cluster, None)).await;
    let admin = cluster.admin("postgres").await;
    admin.batch_execute("CREATE DATABASE shared").await.unwrap();
    let client = cluster.admin("shared").await;
    for (sql, reason) in [
        ("CREATE TABLE t (a int); INSERT INTO t VALUES (1)", "table t: has rows"),
        ("CREATE TABLE t (a int) PARTITION BY LIST (a)", "table t: is partitioned"),
        ("CREATE TABLE t (a int); CREATE TABLE u () INHERITS (t)", "table u: inherits"),
        ("CREATE TABLE t (a int4range, EXCLUDE USING gist (a WITH &&))", "table t: constraint t_a_excl excludes"),
        ("CREATE TABLE t (a int); CREATE UNIQUE INDEX i ON t (a) WHERE a > 0", "table t: unique index public.i has"),
        ("CREATE TABLE t (a text); CREATE UNIQUE INDEX i ON t (lower(a))", "table t: unique index public.i has"),
        ("CREATE TABLE t (a int UNIQUE NULLS NOT DISTINCT)", "table t: unique index"),
        ("CREATE TABLE t (a int, b int, UNIQUE (a) INCLUDE (b))", "table t: unique index"),
        (
            "CREATE TABLE t (a int); CREATE TRIGGER x BEFORE UPDATE ON t FOR EACH ROW \
             EXECUTE FUNCTION suppress_redundant_updates_trigger()",
            "table t: trigger x runs code",
        ),
        ("CREATE TABLE t (a int); CREATE VIEW v AS SELECT * FROM t", "table t: view public.v reads it"),
        ("CREATE TABLE t (a int); CREATE MATERIALIZED VIEW v AS SELECT * FROM t", "table t: view public.v reads it"),
        ("CREATE TABLE t (a int); CREATE RULE x AS ON DELETE TO t DO INSTEAD NOTHING", "table t: rule x rewrites"),
        ("CREATE TABLE t (tenant_id int)", "table t: has a column tenant_id of type integer"),
        ("CREATE TABLE t (a int); CREATE POLICY x ON t", "table t: policy x is not pgusher's"),
        (
            "CREATE SCHEMA s; CREATE TABLE s.o (a int PRIMARY KEY); CREATE TABLE t (a int REFERENCES s.o)",
            "table t: foreign key t_a_fkey leads to s.o, which is not among the tables",
        ),
        (
            "CREATE SCHEMA s; CREATE TABLE t (a int PRIMARY KEY); CREATE TABLE s.o (a int REFERENCES t)",
            "table t: foreign key o_a_fkey of s.o leads here",
        ),
        (
            "CREATE TABLE t (a int PRIMARY KEY, b int REFERENCES t MATCH FULL)",
            "table t: foreign key t_b_fkey matches full",
        ),
        (
            "CREATE FUNCTION f() RETURNS int LANGUAGE sql SECURITY DEFINER AS 'SELECT 1'",
            "function public.f() runs as postgres, who is above row-level security",
        ),
    ] {
        client.batch_execute(sql).await.unwrap();
        let error = proxy.control.convert_tables(&conversion(true)).await.unwrap_err();
        let detail = error.detail.clone().unwrap_or_default();
        assert!(detail.lines().any(|line| line.starts_with(reason)), "{sql}: {error}");
        let sql = "SELECT count(*) FROM pg_policy WHERE polname = 'tenant_isolation'";
        assert_eq!(count(&client, sql).await, 0);
        client
            .batch_execute("DROP SCHEMA public CASCADE; DROP SCHEMA IF EXISTS s CASCADE; CREATE SCHEMA public")
            .await
            .unwrap();
    }
    proxy.stop().await;
}

fn adoption(tenant: &str, plan: Plan, fix: bool) -> Adoption {
    Adoption { id: id(tenant), plan, shard: "shard_1".into(), schema: None, database: None, role: None, fix }
}

fn told(adopted: &Adopted) -> Vec<&str> {
    adopted.findings.iter().map(|finding| finding.what.as_str()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schema_is_adopted_when_every_defect_in_it_is_repaired() {
    let cluster = Cluster::start();
    let proxy = Proxy::start(config(&cluster, None)).await;
    proxy.create("neighbour", Plan::Schema).await;
    let admin = cluster.admin("tenants").await;
    admin
        .batch_execute(
            "CREATE ROLE old LOGIN CREATEROLE BYPASSRLS; CREATE ROLE boss; CREATE ROLE spy LOGIN;
             GRANT boss TO old; GRANT old TO spy; ALTER ROLE old SET work_mem = '1MB';
             GRANT CREATE ON DATABASE tenants TO old;
             CREATE SCHEMA shop AUTHORIZATION old; GRANT USAGE ON SCHEMA shop TO PUBLIC;
             CREATE TABLE shop.a (id serial PRIMARY KEY, note text); GRANT SELECT ON shop.a TO PUBLIC;
             GRANT UPDATE (note) ON shop.a TO spy;
             CREATE TABLE shop.b (id int REFERENCES shop.a); ALTER TABLE shop.b OWNER TO old;
             ALTER TABLE shop.b ENABLE ROW LEVEL SECURITY;
             CREATE VIEW shop.v AS SELECT * FROM shop.a;
             CREATE FUNCTION shop.f() RETURNS int LANGUAGE sql SECURITY DEFINER AS 'SELECT 1';
             GRANT EXECUTE ON FUNCTION shop.f() TO spy;
             CREATE TYPE shop.e AS ENUM ('x');
             ALTER DEFAULT PRIVILEGES FOR ROLE old IN SCHEMA shop GRANT SELECT ON TABLES TO spy;
             INSERT INTO shop.a (note) VALUES ('kept');
             CREATE SCHEMA other; GRANT USAGE ON SCHEMA other TO old;
             CREATE TABLE other.o (id int PRIMARY KEY); GRANT SELECT ON other.o TO old",
        )
        .await
        .unwrap();
    let wanted =
        |fix| Adoption { schema: Some("shop".into()), role: Some("old".into()), ..adoption("shop", Plan::Schema, fix) };
    let seen = proxy.control.adopt(&wanted(false), "test").await.unwrap();
    assert!(!seen.adopted);
    for part in [
        "role old is CREATEROLE",
        "role old is BYPASSRLS",
        "role old is a member of boss",
        "role spy is a member of old and can do what it can",
        "role old has settings of its own: work_mem=1MB",
        "role old may CREATE on database tenants",
        "schema shop belongs to old",
        "PUBLIC may USAGE on schema shop",
        "shop.a belongs to postgres",
        "PUBLIC may SELECT on shop.a",
        "spy may UPDATE on shop.a",
        "shop.b has policies that its owner need not obey (no FORCE)",
        "shop.v belongs to postgres",
        "routine shop.f() belongs to postgres, as whom it runs",
        "spy may execute shop.f()",
        "type shop.e belongs to postgres",
        "what old makes in schema shop, spy may SELECT",
        "role old may USAGE on schema other",
        "role old may SELECT on other.o",
    ] {
        assert!(told(&seen).contains(&part), "{part}: {:#?}", told(&seen));
    }
    assert!(!seen.sql.join("").contains("SCRAM"), "no verifier is shown");
    assert!(proxy.directory.find("shop").is_none());
    assert_eq!(
        count(&admin, "SELECT count(*) FROM pg_namespace n WHERE nspname = 'shop' AND nspowner = 'old'::regrole").await,
        1
    );
    // What somebody must decide stops it, even with fix.
    admin.batch_execute("CREATE TABLE shop.x (o int REFERENCES other.o)").await.unwrap();
    let blocked = proxy.control.adopt(&wanted(true), "test").await.unwrap();
    assert!(!blocked.adopted);
    assert!(told(&blocked).contains(&"foreign key x_o_fkey of shop.x leads to other.o"), "{:#?}", told(&blocked));
    admin.batch_execute("DROP TABLE shop.x").await.unwrap();
    let done = proxy.control.adopt(&wanted(true), "test").await.unwrap();
    assert!(done.adopted, "{done:#?}");
    let client = seat(&proxy, &cluster, "shop").await;
    assert_eq!(count(&client, "SELECT count(*) FROM a JOIN v USING (id) WHERE v.note = 'kept'").await, 1);
    client
        .batch_execute("INSERT INTO a (note) VALUES ('new'); ALTER TABLE b ADD COLUMN c int; CREATE TABLE d ()")
        .await
        .unwrap();
    for (sql, expected) in [
        ("SELECT * FROM neighbour.x", "42501"),
        ("SELECT * FROM other.o", "42501"),
        ("SET ROLE boss", "42501"),
        ("CREATE SCHEMA y", "42501"),
        ("CREATE ROLE y", "42501"),
        (
            "GRANT USAGE ON SCHEMA shop TO neighbour; SELECT 1 / has_schema_privilege('neighbour', 'shop', 'USAGE')::int",
            "22012",
        ),
    ] {
        assert_eq!(code(&client, sql).await, expected, "{sql}");
    }
    admin.batch_execute("SET SESSION AUTHORIZATION spy").await.unwrap();
    for sql in ["SELECT * FROM shop.a", "SELECT shop.f()", "SET ROLE old"] {
        assert_eq!(code(&admin, sql).await, "42501", "{sql}");
    }
    admin.batch_execute("RESET SESSION AUTHORIZATION").await.unwrap();
    // It is looked at again: nothing is found, and the place is taken.
    let error = proxy.control.adopt(&wanted(false), "test").await.unwrap_err();
    assert_eq!(error.code, "55000", "{error}");
    proxy.control.delete(&id("shop"), "test").await.unwrap();
    assert_eq!(left(&cluster, "^old$").await, Vec::<String>::new());
    proxy.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_is_adopted_when_every_defect_in_it_is_repaired() {
    let cluster = Cluster::start();
    let proxy = Proxy::start(config(&cluster, None)).await;
    let server = cluster.admin("postgres").await;
    for sql in [
        "CREATE ROLE old LOGIN",
        "CREATE ROLE spy LOGIN PASSWORD 'spy'",
        "CREATE DATABASE legacy OWNER old",
        "GRANT CREATE ON DATABASE legacy TO spy",
    ] {
        server.batch_execute(sql).await.unwrap();
    }
    let admin = cluster.admin("legacy").await;
    admin
        .batch_execute(
            "CREATE TABLE notes (id bigserial PRIMARY KEY, note text); INSERT INTO notes (note) VALUES ('kept');
             CREATE SCHEMA more AUTHORIZATION spy; CREATE TABLE more.m (a int);
             GRANT ALL ON SCHEMA public TO PUBLIC;
             CREATE FUNCTION f() RETURNS int LANGUAGE sql SECURITY DEFINER AS 'SELECT 1';
             CREATE EXTENSION pg_trgm",
        )
        .await
        .unwrap_or_else(|error| {
            assert!(error.code().unwrap().code() == "0A000" || error.code().unwrap().code() == "58P01", "{error}")
        });
    let wanted = |fix| Adoption {
        database: Some("legacy".into()),
        role: Some("old".into()),
        ..adoption("shop", Plan::Database, fix)
    };
    let seen = proxy.control.adopt(&wanted(false), "test").await.unwrap();
    for part in [
        "database legacy belongs to old",
        "spy may CREATE on database legacy",
        "PUBLIC may CONNECT, TEMPORARY on database legacy",
    ] {
        assert!(told(&seen).contains(&part), "{part}: {:#?}", told(&seen));
    }
    admin.batch_execute("CREATE TABLE IF NOT EXISTS notes (id bigserial PRIMARY KEY, note text)").await.unwrap();
    let done = proxy.control.adopt(&wanted(true), "test").await.unwrap();
    assert!(done.adopted, "{done:#?}");
    let client = seat(&proxy, &cluster, "shop").await;
    client
        .batch_execute("INSERT INTO notes (note) VALUES ('new'); CREATE TABLE t (); SELECT pg_advisory_lock(1)")
        .await
        .unwrap();
    assert_eq!(code(&client, "CREATE SCHEMA x").await, "42501");
    assert_eq!(code(&client, "SELECT * FROM pg_stat_activity").await, "42501");
    let refused = cluster.connect("spy", "spy", "legacy").await.err().unwrap();
    assert_eq!(refused.code().unwrap().code(), "42501");
    for name in ["tenants", "postgres", "pgusher"] {
        let bad =
            Adoption { database: Some(name.into()), role: Some("spy".into()), ..adoption("bad", Plan::Database, true) };
        let refused = proxy.control.adopt(&bad, "test").await;
        assert!(refused.as_ref().map_or(true, |seen| !seen.adopted), "{name} {refused:?}");
    }
    drop(client);
    proxy.control.delete(&id("shop"), "test").await.unwrap();
    assert_eq!(left(&cluster, "^(old|legacy)$").await, Vec::<String>::new());
    proxy.stop().await;
}

/// Everybody is at home on `shared`, but `client_001`, whose server is `own` and whose role there is `boss`.
fn with_a_server_of_its_own(shared: &Cluster, own: &Cluster, template: Option<&Path>) -> Config {
    let mut config = config(shared, template);
    config.shards.push(ShardConfig {
        dedicated_to: Some("client_001".into()),
        database: "app".into(),
        tenant_role: Some("boss".into()),
        tenant_password: Secret::new("given"),
        ..shard("own", own)
    });
    config.users.push(User {
        name: "app".into(),
        password: Secret::new("pw"),
        tenants: vec!["*".into()],
        auto_provision: true,
    });
    config.proxy.listen_port = support::postgres::free_port();
    (config.api.listen, config.metrics.listen) = (String::new(), String::new());
    config
}

#[tokio::test(flavor = "multi_thread")]
async fn through_the_proxy_only_a_tenant_with_its_own_shard_chooses_a_database_and_may_be_superuser() {
    let (shared, old) = (Cluster::start(), Cluster::start());
    let admin = old.admin("postgres").await;
    admin.batch_execute("CREATE ROLE boss LOGIN SUPERUSER PASSWORD 'given'").await.unwrap();
    for sql in ["CREATE DATABASE app", "CREATE DATABASE second"] {
        admin.batch_execute(sql).await.unwrap();
    }
    let files = template(NOTES);
    let config = with_a_server_of_its_own(&shared, &old, Some(files.path()));
    let server = Server::start(config.clone()).await.unwrap();
    let connect = async |user: &str, database: &str| {
        let (client, connection) = tokio_postgres::Config::new()
            .host("127.0.0.1")
            .port(config.proxy.listen_port)
            .user(user)
            .password("pw")
            .dbname(database)
            .connect(tokio_postgres::NoTls)
            .await?;
        tokio::spawn(connection);
        let row = client.query_one("SELECT current_database()::text, session_user::text", &[]).await?;
        Ok::<(String, String), tokio_postgres::Error>((row.get(0), row.get(1)))
    };
    for (asked, got) in [("client_001", "app"), ("app.client_001", "app"), ("second", "second"), ("app", "app")] {
        assert_eq!(connect("app.client_001", asked).await.unwrap(), (got.into(), "boss".into()), "{asked}");
    }
    for refused in ["nothing", "second"] {
        let error = connect("app.client_002", refused).await.unwrap_err();
        assert_eq!(error.code().unwrap().code(), "3D000", "{refused}");
    }
    let error = connect("app.client_001", "nothing").await.unwrap_err();
    assert_eq!(error.code().unwrap().code(), "3D000", "the server's own word");
    assert_eq!(connect("app.client_002", "client_002").await.unwrap(), ("tenants".into(), "client_002".into()));
    // Elsewhere a superuser is nobody's server connection.
    shared.admin("postgres").await.batch_execute("ALTER ROLE client_003 SUPERUSER").await.unwrap_err();
    connect("app.client_003", "client_003").await.unwrap();
    shared.admin("postgres").await.batch_execute("ALTER ROLE client_003 SUPERUSER").await.unwrap();
    let fresh = tokio_postgres::Config::new()
        .host("127.0.0.1")
        .port(config.proxy.listen_port)
        .user("app.client_003")
        .password("pw")
        .dbname("client_003")
        .options("-c work_mem=7MB")
        .connect(tokio_postgres::NoTls)
        .await
        .err()
        .unwrap();
    assert_eq!(fresh.as_db_error().unwrap().message(), "the server logged in as somebody else");
    server.drain(Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_tenant_with_its_own_shard_replicates() {
    let (shared, own) = (Cluster::start(), Cluster::start());
    let admin = own.admin("postgres").await;
    admin.batch_execute("CREATE ROLE boss LOGIN REPLICATION PASSWORD 'given'").await.unwrap();
    admin.batch_execute("CREATE DATABASE app OWNER boss").await.unwrap();
    let config = with_a_server_of_its_own(&shared, &own, None);
    let server = Server::start(config.clone()).await.unwrap();
    let port = config.proxy.listen_port;
    let run = async move |program: &str, user: &str, arguments: &[&str]| {
        let mut command = tokio::process::Command::new(program);
        command.env("PGPASSWORD", "pw").env("PGHOST", "127.0.0.1").env("PGPORT", port.to_string()).env("PGUSER", user);
        let done = command.args(arguments).output().await.unwrap();
        let said = String::from_utf8_lossy(&done.stderr).into_owned() + &String::from_utf8_lossy(&done.stdout);
        (done.status.success(), said)
    };
    for kind in ["database", "true"] {
        let asked = format!("dbname=client_001 replication={kind}");
        let identify = ["-At", &asked, "-c", "IDENTIFY_SYSTEM"];
        let (fine, said) = run("psql", "app.client_001", &identify).await;
        assert!(fine && said.split('|').count() == 4, "{said}");
        let asked = asked.replace("client_001", "client_002");
        let (fine, said) = run("psql", "app.client_002", &["-At", &asked, "-c", "IDENTIFY_SYSTEM"]).await;
        assert!(!fine && said.contains("not supported for this tenant"), "{said}");
    }
    // SQL beside the commands, and a session as any other afterwards.
    let sql = ["-At", "dbname=client_001 replication=database", "-c", "SELECT session_user"];
    assert_eq!(run("psql", "app.client_001", &sql).await, (true, "boss\n".into()));
    assert_eq!(run("psql", "app.client_001", &["-At", "client_001", "-c", "SELECT 1"]).await, (true, "1\n".into()));
    // Two connections, one of which is a stream in both directions. An older pg_basebackup does not know newer servers.
    let version = admin.query_one("SHOW server_version_num", &[]).await.unwrap().get::<_, String>(0);
    if version.starts_with("15") {
        let copy = tempfile::tempdir().unwrap();
        let path = copy.path().join("copy");
        let arguments = ["-D", path.to_str().unwrap(), "-X", "stream", "-c", "fast"];
        let (fine, said) = run("pg_basebackup", "app.client_001", &arguments).await;
        assert!(fine, "{said}");
        assert!(path.join("backup_label").exists() && path.join("base").exists());
    }
    // None of them stays.
    let walsenders = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'walsender'";
    for _ in 0..100 {
        if admin.query_one(walsenders, &[]).await.unwrap().get::<_, i64>(0) == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(admin.query_one(walsenders, &[]).await.unwrap().get::<_, i64>(0), 0);
    server.drain(Duration::from_secs(5)).await;
}
