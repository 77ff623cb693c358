//! Replication connections to a server that tenants share (plan `database`): a tenant whose role has `REPLICATION` streams
//! its own database, and reaches nobody else's data or slots, neither by commands nor by SQL.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pgusher::config::{Config, GuardMode};
use pgusher::tenant::{Plan, TenantId};

use crate::postgres::{Cluster, bin_dir, client_program};
use crate::raw::{Message, PATIENCE, Raw, show};
use crate::world::{APP_PASSWORD, World, raw};

/// `client_001` and `client_002` are entitled, `client_003` is not. `None`: there is no output plugin to stream with.
async fn world(guard: GuardMode) -> Option<World> {
    world_with(|config| config.guard.mode = guard).await
}

async fn world_with(change: impl FnOnce(&mut Config)) -> Option<World> {
    let settings = ["wal_level=logical", "max_replication_slots=20", "max_wal_senders=20"];
    let world = World::with_clusters(vec![Arc::new(Cluster::start_with(&settings))], |config| {
        config.provision.plan = Plan::Database;
        change(config);
    })
    .await;
    for tenant in ["client_001", "client_002", "client_003"] {
        world.client(tenant).await.batch_execute("SELECT 1").await.unwrap();
    }
    let admin = world.cluster().admin("postgres").await;
    admin.batch_execute("ALTER ROLE client_001 REPLICATION; ALTER ROLE client_002 REPLICATION").await.unwrap();
    let plugin = "SELECT pg_create_logical_replication_slot('probe', 'test_decoding', true)";
    if let Err(error) = admin.batch_execute(plugin).await {
        let version = admin.query_one("SHOW server_version_num", &[]).await.unwrap().get::<_, String>(0);
        assert!(version.as_str() >= "160000", "{error}");
        eprintln!("skipped: PostgreSQL {version} without test_decoding in {:?}", bin_dir());
        return None;
    }
    Some(world)
}

async fn walsender(world: &World, tenant: &str) -> Raw {
    world.raw_with(tenant, &[("replication", "database")]).await
}

async fn fine(raw: &mut Raw, sql: &str) {
    let said = show(&raw.query(sql).await);
    assert!(!said.contains("E(") && said.ends_with("Z(I)"), "{sql}: {said}");
}

/// What the stream says, up to the one message that has this text.
async fn streamed_up_to(raw: &mut Raw, text: &str) -> String {
    let mut said = String::new();
    while !said.contains(text) {
        let message = raw.next().await.expect("the stream goes on");
        if message.tag == b'd' && message.body[0] == b'w' {
            // Behind two positions and a time.
            said += &String::from_utf8_lossy(&message.body[25..]);
            said += "\n";
        }
        assert!(matches!(message.tag, b'd' | b'S' | b'N'), "{said} {message:?}");
    }
    said
}

/// Starts a stream of the slot, which has to begin.
async fn stream(raw: &mut Raw, slot: &str) {
    let options = "(\"include-xids\" '0', \"skip-empty-xacts\" '1')";
    raw.compose(|b| b.query(&format!("START_REPLICATION SLOT {slot} LOGICAL 0/0 {options}"))).await;
    let said = raw.until(b'W').await;
    assert!(!said.iter().any(|message| message.tag == b'E'), "{}", show(&said));
}

/// Nothing written, flushed or applied; an answer is asked for.
fn status_update() -> Vec<u8> {
    let mut update = vec![b'r'];
    update.extend([0; 32]);
    update.push(1);
    update
}

async fn end_stream(raw: &mut Raw) {
    raw.compose(|b| b.copy_done()).await;
    let said: Vec<Message> = raw.until_ready().await.into_iter().filter(|message| message.tag != b'd').collect();
    assert_eq!(show(&said), "c C(COPY 0) C(START_REPLICATION) Z(I)");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_streams_its_own_database() {
    let Some(world) = world(GuardMode::Enforce).await else { return };
    let (mut one, mut two) = (walsender(&world, "client_001").await, walsender(&world, "client_002").await);
    assert_eq!(one.value("SHOW wal_level").await, "logical");
    let identity = show(&one.query("IDENTIFY_SYSTEM").await);
    assert!(identity.contains(",client_001)") && identity.ends_with("C(IDENTIFY_SYSTEM) Z(I)"), "{identity}");
    assert_eq!(one.value("SELECT session_user || ' ' || current_database()").await, "client_001 client_001");
    for (raw, slot) in [(&mut one, "one"), (&mut two, "two")] {
        fine(raw, &format!("CREATE_REPLICATION_SLOT \"{slot}\" LOGICAL test_decoding (SNAPSHOT 'nothing')")).await;
    }
    // A name is taken for all.
    assert_eq!(two.error("CREATE_REPLICATION_SLOT one LOGICAL test_decoding").await.code(), "42710");
    let (first, second) = (world.client("client_001").await, world.client("client_002").await);
    first.batch_execute("INSERT INTO bookings (note) VALUES ('mine')").await.unwrap();
    second.batch_execute("INSERT INTO bookings (note) VALUES ('theirs')").await.unwrap();
    first.batch_execute("INSERT INTO bookings (note) VALUES ('last of mine')").await.unwrap();
    second.batch_execute("INSERT INTO bookings (note) VALUES ('last of theirs')").await.unwrap();
    // Not as somebody whom commits wait for.
    fine(&mut one, "SET application_name = 'standby_1'").await;
    stream(&mut one, "one").await;
    let said = streamed_up_to(&mut one, "last of mine").await;
    assert!(said.contains("'mine'") && !said.contains("theirs"), "{said}");
    stream(&mut two, "\"two\"").await;
    let said = streamed_up_to(&mut two, "last of theirs").await;
    assert!(said.contains("'theirs'") && !said.contains("mine"), "{said}");
    let admin = world.cluster().admin("postgres").await;
    let names = "SELECT string_agg(application_name, ',' ORDER BY application_name) FROM pg_stat_replication";
    let names: String = admin.query_one(names, &[]).await.unwrap().get(0);
    assert_eq!(names, "pgusher tenant client_001,pgusher tenant client_002");
    one.compose(|b| b.copy_data(&status_update())).await;
    first.batch_execute("INSERT INTO bookings (note) VALUES ('more')").await.unwrap();
    streamed_up_to(&mut one, "'more'").await;
    // In use, by whoever it is; then free.
    let mut other = walsender(&world, "client_001").await;
    assert_eq!(other.error("DROP_REPLICATION_SLOT one").await.code(), "55006");
    other.compose(|b| b.query("DROP_REPLICATION_SLOT one WAIT")).await;
    end_stream(&mut one).await;
    assert_eq!(show(&other.until_ready().await), "C(DROP_REPLICATION_SLOT) Z(I)");
    assert_eq!(one.error("START_REPLICATION SLOT one LOGICAL 0/0").await.code(), "42704");
    assert_eq!(one.error("DROP_REPLICATION_SLOT one").await.code(), "42704");
    // A session like any other, but without the extended protocol.
    one.compose(|b| b.extended("SELECT 1", &[])).await;
    assert_eq!(show(&one.until_ready().await), "E(08P01) Z(I)");
    fine(&mut one, "SELECT 1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_is_not_begun_where_its_name_cannot_be_set() {
    let Some(world) = world(GuardMode::Enforce).await else { return };
    let mut one = walsender(&world, "client_001").await;
    fine(&mut one, "CREATE_REPLICATION_SLOT one LOGICAL test_decoding").await;
    one.query("BEGIN").await;
    one.error("SELECT 1/0").await;
    assert_eq!(show(&one.query("START_REPLICATION SLOT one LOGICAL 0/0").await), "E(25P02) Z(E)");
    assert_eq!(show(&one.query("ROLLBACK").await), "C(ROLLBACK) Z(I)");
    one.query("BEGIN").await;
    assert_eq!(show(&one.query("START_REPLICATION SLOT one LOGICAL 0/0").await), "E(25001) Z(E)");
    one.query("ROLLBACK").await;
    // All at once; what is behind the command belongs to the stream.
    one.compose(|b| {
        b.query("SET application_name = 'standby_1'");
        b.query("SELECT 1");
        b.query("START_REPLICATION SLOT one LOGICAL 0/0");
        b.copy_data(&status_update());
        b.copy_done();
        b.query("SELECT 2");
    })
    .await;
    assert_eq!(show(&one.until_ready().await), "C(SET) Z(I)");
    assert_eq!(show(&one.until_ready().await), "D(1) C(SELECT 1) Z(I)");
    let streamed: Vec<Message> = one.until_ready().await.into_iter().filter(|message| message.tag != b'd').collect();
    assert_eq!(show(&streamed), "W c C(COPY 0) C(START_REPLICATION) Z(I)");
    assert_eq!(show(&one.until_ready().await), "D(2) C(SELECT 1) Z(I)");
    // Feedback as a standby gives it would hold up the server's cleaning for everybody. (PostgreSQL ends a second stream of a
    // connection at once.)
    let mut one = walsender(&world, "client_001").await;
    stream(&mut one, "one").await;
    one.compose(|b| b.copy_data(b"h\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x01\0\0\0\0")).await;
    let said = one.until(b'E').await;
    assert_eq!(said.last().unwrap().code(), "42501");
    assert!(one.is_closed().await);
    // COPY is not a stream.
    let mut one = walsender(&world, "client_001").await;
    one.compose(|b| {
        b.query("COPY things FROM STDIN");
        b.copy_data(b"1\thello\n");
        b.copy_done();
    })
    .await;
    assert_eq!(show(&one.until_ready().await), "G C(COPY 1) Z(I)");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_takes_as_long_as_it_likes_and_a_query_does_not() {
    let Some(world) = world_with(|config| config.proxy.query_timeout = Duration::from_secs(1)).await else { return };
    let mut one = walsender(&world, "client_001").await;
    fine(&mut one, "CREATE_REPLICATION_SLOT one LOGICAL test_decoding").await;
    stream(&mut one, "one").await;
    let mut other = walsender(&world, "client_001").await;
    let error = other.error("SELECT pg_sleep(30)").await;
    assert_eq!((error.code().as_str(), error.field(b'M').as_str()), ("57014", "query_timeout"));
    world.client("client_001").await.batch_execute("INSERT INTO bookings (note) VALUES ('later')").await.unwrap();
    streamed_up_to(&mut one, "'later'").await;
}

/// A client that is not ours, from beginning to end.
#[tokio::test(flavor = "multi_thread")]
async fn pg_recvlogical_works() {
    let Some(world) = world(GuardMode::Enforce).await else { return };
    let run = async |arguments: &[&str]| {
        let mut command = tokio::process::Command::new(client_program("pg_recvlogical"));
        command.env("PGPASSWORD", APP_PASSWORD).env("PGHOST", "127.0.0.1").env("PGPORT", world.port.to_string());
        command.args(["-d", "client_001", "-U", "app.client_001", "-S", "tool"]).args(arguments);
        let done = tokio::time::timeout(PATIENCE, command.kill_on_drop(true).output()).await.unwrap().unwrap();
        let said = String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "{arguments:?}: {said}");
        said
    };
    run(&["--create-slot", "-P", "test_decoding"]).await;
    world.client("client_001").await.batch_execute("INSERT INTO bookings (note) VALUES ('mine')").await.unwrap();
    world.client("client_002").await.batch_execute("INSERT INTO bookings (note) VALUES ('theirs')").await.unwrap();
    let admin = world.cluster().admin("postgres").await;
    let end: String = admin.query_one("SELECT pg_current_wal_lsn()::text", &[]).await.unwrap().get(0);
    let said = run(&["--start", "--no-loop", "--endpos", &end, "-f", "-", "-o", "skip-empty-xacts=1"]).await;
    assert!(said.contains("'mine'") && !said.contains("theirs"), "{said}");
    run(&["--drop-slot"]).await;
    let left: i64 =
        admin.query_one("SELECT count(*) FROM pg_replication_slots WHERE NOT temporary", &[]).await.unwrap().get(0);
    assert_eq!(left, 0);
}

/// Another one: a server that takes over what is there, follows what comes, and drops its slot.
#[tokio::test(flavor = "multi_thread")]
async fn another_server_subscribes() {
    let Some(world) = world(GuardMode::Enforce).await else { return };
    let (first, second) = (world.client("client_001").await, world.client("client_002").await);
    first.batch_execute("INSERT INTO bookings (note) VALUES ('before')").await.unwrap();
    let publisher = world.cluster().admin("client_001").await;
    publisher.batch_execute("CREATE PUBLICATION p FOR TABLE public.bookings").await.unwrap();
    let subscriber = Cluster::start();
    let admin = subscriber.admin("postgres").await;
    admin.batch_execute("CREATE TABLE bookings (id bigint PRIMARY KEY, note text)").await.unwrap();
    let connection =
        format!("host=127.0.0.1 port={} user=app.client_001 password={APP_PASSWORD} dbname=client_001", world.port);
    let subscribe = format!("CREATE SUBSCRIPTION s CONNECTION '{connection}' PUBLICATION p");
    admin.batch_execute(&subscribe).await.unwrap();
    let until = async |expected: &str| {
        let began = Instant::now();
        let sql = "SELECT coalesce(string_agg(note, ' ' ORDER BY id), '') FROM bookings";
        loop {
            let notes: String = admin.query_one(sql, &[]).await.unwrap().get(0);
            if notes == expected {
                return;
            }
            assert!(began.elapsed() < PATIENCE, "{notes:?}, not {expected:?}: {}", subscriber.log());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    until("before").await;
    second.batch_execute("INSERT INTO bookings (note) VALUES ('theirs')").await.unwrap();
    first.batch_execute("INSERT INTO bookings (note) VALUES ('after')").await.unwrap();
    until("before after").await;
    admin.batch_execute("DROP SUBSCRIPTION s").await.unwrap();
    let slots = "SELECT count(*) FROM pg_replication_slots WHERE NOT temporary";
    assert_eq!(publisher.query_one(slots, &[]).await.unwrap().get::<_, i64>(0), 0);
    let refused = "cross_tenant_isolation_violations{action=\"refused\",kind=\"replication\",tenant=\"client_001\"}";
    assert_eq!(world.metric(refused).await, 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_not_entitled_hears_it_from_the_server() {
    let Some(world) = world(GuardMode::Enforce).await else { return };
    let refused = raw(world.port, "client_003", &[("replication", "database")]).await.err().unwrap();
    assert_eq!((refused.error.code().as_str(), refused.error.field(b'S').as_str()), ("42501", "FATAL"));
    let words = refused.error.field(b'M').to_lowercase();
    assert!(words.contains("walsender") || words.contains("wal sender"), "{words}");
    for tenant in ["client_001", "client_003"] {
        let refused = raw(world.port, tenant, &[("replication", "true")]).await.err().unwrap();
        assert_eq!(refused.error.code(), "0A000", "{tenant}");
        assert!(refused.error.field(b'H').contains("replication=database"), "{tenant}");
    }
    let mut three = world.raw("client_003").await;
    for sql in [
        "SELECT pg_create_logical_replication_slot('x', 'test_decoding')",
        "SELECT pg_drop_replication_slot('x')",
        "SELECT pg_replication_slot_advance('x', '0/1')",
        "CALL tenant_shim.pgusher_drop_slot('x', false)",
        "SELECT pg_logical_slot_get_changes('x', NULL, NULL)",
    ] {
        assert_eq!(three.error(sql).await.code(), "42501", "{sql}");
    }
    assert_eq!(show(&three.query("SELECT slot_name FROM pg_replication_slots").await), "C(SELECT 0) Z(I)");
}

/// What the attacker must not move: another tenant's slot, and a standby's.
async fn slots(world: &World) -> Vec<String> {
    let admin = world.cluster().admin("postgres").await;
    let sql = "SELECT concat_ws(' ', slot_name, slot_type, database, active, xmin, restart_lsn, confirmed_flush_lsn) \
               FROM pg_replication_slots WHERE slot_name IN ('victim', 'standby') ORDER BY 1";
    admin.query(sql, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

/// On a replication connection, beyond SQL.
const COMMANDS: &[(&str, &str)] = &[
    ("BASE_BACKUP", "42501"),
    ("BASE_BACKUP (LABEL 'x', WAL true)", "42501"),
    ("base_backup", "42501"),
    ("TIMELINE_HISTORY 1", "42501"),
    ("UPLOAD_MANIFEST", "42501"),
    ("CREATE_REPLICATION_SLOT x PHYSICAL", "42501"),
    ("CREATE_REPLICATION_SLOT x TEMPORARY PHYSICAL RESERVE_WAL", "42501"),
    ("CREATE_REPLICATION_SLOT x LOGICAL \"/tmp/x\"", "42501"),
    ("CREATE_REPLICATION_SLOT x LOGICAL plpgsql", "42501"),
    ("START_REPLICATION 0/0", "42501"),
    ("START_REPLICATION PHYSICAL 0/0", "42501"),
    ("START_REPLICATION SLOT standby PHYSICAL 0/0", "42501"),
    ("START_REPLICATION SLOT standby 0/0 TIMELINE 1", "42501"),
    ("START_REPLICATION SLOT victim LOGICAL 0/0", "55000"),
    ("READ_REPLICATION_SLOT standby", "42501"),
    ("ALTER_REPLICATION_SLOT victim (FAILOVER true)", "42501"),
    ("DROP_REPLICATION_SLOT victim", "42501"),
    ("DROP_REPLICATION_SLOT \"victim\" WAIT;", "42501"),
    ("DROP_REPLICATION_SLOT standby", "42501"),
    ("IDENTIFY_SYSTEM; BASE_BACKUP", "42501"),
    ("\x0bBASE_BACKUP", "42501"),
    ("/**/ BASE_BACKUP", "42501"),
];

/// On any connection.
const SQL: &[(&str, &[&str])] = &[
    ("SELECT pg_drop_replication_slot('victim')", &["42501"]),
    ("SELECT pg_drop_replication_slot('standby')", &["42501"]),
    ("SELECT pg_catalog.pg_drop_replication_slot('victim')", &["42501"]),
    ("CALL tenant_shim.pgusher_drop_slot('victim', true)", &["42501"]),
    ("SELECT pg_replication_slot_advance('victim', 'FFFFFFFF/0')", &["42501"]),
    ("SELECT pg_replication_slot_advance('standby', 'FFFFFFFF/0')", &["42501"]),
    ("SELECT pg_catalog.pg_replication_slot_advance('standby', 'FFFFFFFF/0')", &["42501"]),
    ("SELECT pg_create_physical_replication_slot('x', true)", &["42501"]),
    ("SELECT pg_catalog.pg_create_logical_replication_slot('x', 'test_decoding')", &["42501"]),
    ("SELECT pg_create_logical_replication_slot('x', '/tmp/x')", &["42501"]),
    ("SELECT pg_create_logical_replication_slot('x', 'plpgsql')", &["42501"]),
    ("SELECT pg_copy_physical_replication_slot('standby', 'x')", &["42501"]),
    ("SELECT pg_copy_logical_replication_slot('victim', 'x')", &["42501"]),
    ("SELECT pg_copy_logical_replication_slot('victim', 'x', false, 'test_decoding')", &["42501"]),
    ("SELECT pg_sync_replication_slots()", &["42501", "42883"]),
    ("SELECT pg_logical_slot_get_changes('victim', NULL, NULL)", &["55000"]),
    ("SELECT pg_logical_slot_peek_changes('victim', NULL, NULL)", &["55000"]),
    ("SELECT pg_logical_slot_get_binary_changes('victim', NULL, NULL)", &["55000"]),
    ("SELECT pg_logical_slot_peek_binary_changes('victim', NULL, NULL)", &["55000"]),
    ("SELECT pg_logical_slot_get_changes('standby', NULL, NULL)", &["55000", "0A000"]),
    ("SELECT * FROM pg_catalog.pg_replication_slots", &["42501"]),
    ("SELECT * FROM pg_get_replication_slots()", &["42501"]),
    ("SELECT tenant_shim.pgusher_may_replicate('victim')", &["42501"]),
    ("SELECT pg_replication_origin_create('x')", &["42501"]),
    ("SELECT pg_replication_origin_drop('x')", &["42501"]),
];

#[tokio::test(flavor = "multi_thread")]
async fn replication_reaches_nobody_else_with_the_guard() {
    attack(GuardMode::Enforce).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn replication_reaches_nobody_else_without_the_guard() {
    attack(GuardMode::Off).await;
}

async fn attack(guard: GuardMode) {
    let Some(world) = world(guard).await else { return };
    let admin = world.cluster().admin("postgres").await;
    admin.batch_execute("SELECT pg_create_physical_replication_slot('standby', true)").await.unwrap();
    fine(&mut walsender(&world, "client_002").await, "CREATE_REPLICATION_SLOT victim LOGICAL test_decoding").await;
    let before = slots(&world).await;
    assert_eq!(before.len(), 2);
    let mut walsender = walsender(&world, "client_001").await;
    for (command, code) in COMMANDS {
        let error = walsender.error(command).await;
        assert_eq!(error.code(), *code, "{command}: {}", error.field(b'M'));
        assert_eq!(walsender.value("SELECT 1").await, "1", "{command}");
    }
    // SQL to the server, or a command that it does not take.
    for sql in ["SELECT 1; BASE_BACKUP", "SHOW x; BASE_BACKUP"] {
        let code = if guard == GuardMode::Off { "42601" } else { "42501" };
        assert_eq!(walsender.error(sql).await.code(), code, "{sql}");
    }
    // Longer than what is looked at: SQL to no end, a command is refused.
    let space = " ".repeat(300_000);
    assert_eq!(walsender.error(&format!("{space}BASE_BACKUP")).await.code(), "42501");
    assert_eq!(walsender.value(&format!("SELECT {space} 1")).await, "1");
    walsender.query("BEGIN").await;
    assert_eq!(show(&walsender.query("BASE_BACKUP").await), "E(42501) Z(E)");
    walsender.query("ROLLBACK").await;
    // FunctionCall of pg_drop_replication_slot(name).
    let oid: u32 = admin.query_one("SELECT 'pg_drop_replication_slot'::regproc::oid", &[]).await.unwrap().get(0);
    let mut call = oid.to_be_bytes().to_vec();
    call.extend(b"\0\0\0\x01\0\0\0\x06victim\0\0");
    let mut client = world.raw("client_001").await;
    for raw in [&mut walsender, &mut client] {
        raw.compose(|b| b.message(b'F', &call)).await;
        assert_eq!(show(&raw.until_ready().await), "E(42501) Z(I)");
        for (sql, codes) in SQL {
            let error = raw.error(sql).await;
            assert!(codes.contains(&error.code().as_str()), "{sql}: {} {}", error.code(), error.field(b'M'));
            let error = raw.error(&format!("DO $$ BEGIN EXECUTE {} ; END $$", quoted(sql))).await;
            assert!(codes.contains(&error.code().as_str()), "{sql}: {} {}", error.code(), error.field(b'M'));
        }
    }
    assert_eq!(slots(&world).await, before);
    let counted = |action: &str, kind: &str| {
        format!("cross_tenant_isolation_violations{{action=\"{action}\",kind=\"{kind}\",tenant=\"client_001\"}}")
    };
    assert_eq!(world.metric(&counted("refused", "replication")).await, 20.0);
    assert!(world.metric(&counted("blocked", "permission_denied")).await >= 10.0);
    // Its own slots by functions, as on a server of its own.
    for raw in [&mut walsender, &mut client] {
        fine(
            raw,
            "SELECT * FROM pg_create_logical_replication_slot('mine', plugin => 'test_decoding', twophase => true)",
        )
        .await;
        assert_eq!(
            show(&raw.query("SELECT slot_name, database FROM pg_replication_slots").await),
            "D(mine,client_001) C(SELECT 1) Z(I)"
        );
        fine(raw, "INSERT INTO bookings (note) VALUES ('mine')").await;
        let changes = "SELECT string_agg(data, ' ') FROM pg_logical_slot_peek_changes('mine', NULL, NULL)";
        assert!(raw.value(changes).await.contains("'mine'"));
        assert_eq!(raw.value("SELECT slot_name FROM pg_replication_slot_advance('mine', 'FFFFFFFF/0')").await, "mine");
        assert!(!raw.value(changes).await.contains("'mine'"));
        fine(raw, "SELECT pg_drop_replication_slot('mine')").await;
    }
    assert_eq!(slots(&world).await, before);
}

fn quoted(sql: &str) -> String {
    format!("'{}'", sql.replace('\'', "''"))
}

/// REPLICATION is no sign that a role is somebody else's, where the operator may have given it.
#[tokio::test(flavor = "multi_thread")]
async fn an_entitled_tenant_is_deleted_while_it_streams() {
    let Some(world) = world(GuardMode::Enforce).await else { return };
    let mut one = walsender(&world, "client_001").await;
    fine(&mut one, "CREATE_REPLICATION_SLOT one LOGICAL test_decoding").await;
    fine(&mut one, "CREATE_REPLICATION_SLOT more LOGICAL test_decoding").await;
    stream(&mut one, "one").await;
    let began = Instant::now();
    world.server.control().delete(&TenantId::parse("client_001").unwrap(), "test").await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(10));
    let admin = world.cluster().admin("postgres").await;
    let left = "SELECT (SELECT count(*) FROM pg_replication_slots WHERE NOT temporary) \
                + (SELECT count(*) FROM pg_roles WHERE rolname = 'client_001') \
                + (SELECT count(*) FROM pg_database WHERE datname = 'client_001')";
    assert_eq!(admin.query_one(left, &[]).await.unwrap().get::<_, i64>(0), 0);
}
