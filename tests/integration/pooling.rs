//! Server connections: how many, whose, for how long, in which state.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use pgusher::config::PoolMode;

use crate::raw::{Batch, Message, Raw, show};
use crate::world::World;

const MODES: [PoolMode; 3] = [PoolMode::Auto, PoolMode::Session, PoolMode::Transaction];

async fn world(mode: PoolMode, change: impl FnOnce(&mut pgusher::config::Config)) -> World {
    World::start(|config| {
        config.pool.pool_mode = mode;
        change(config);
    })
    .await
}

async fn pid(raw: &mut Raw) -> String {
    raw.value("SELECT pg_backend_pid()").await
}

#[tokio::test(flavor = "multi_thread")]
async fn server_connections_are_opened_when_needed_and_no_more_than_allowed() {
    let world = world(PoolMode::Transaction, |config| config.pool.default_pool_size = 3).await;
    let mut clients = Vec::new();
    for _ in 0..8 {
        clients.push(world.raw("client_001").await);
    }
    // One was asked for the greeting; the others greeted from memory.
    assert_eq!(world.server_processes().await, 1);
    let mut pids = BTreeSet::new();
    for client in &mut clients {
        pids.insert(pid(client).await);
    }
    assert_eq!(pids.len(), 1, "one after the other they need no more than one");
    let work = clients.iter_mut().map(|client| client.query("SELECT pg_backend_pid(), pg_sleep(0.2)"));
    let answers = futures_util::future::join_all(work).await;
    let pids: BTreeSet<String> = answers.iter().map(|a| a[1].values()[0].clone()).collect();
    assert_eq!(pids.len(), 3, "all at once they use what they may");
    assert_eq!(world.server_processes().await, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_burst_of_short_transactions_is_over_before_each_has_a_connection() {
    let world = world(PoolMode::Auto, |config| config.pool.default_pool_size = 40).await;
    let mut clients = Vec::new();
    for _ in 0..40 {
        clients.push(world.raw("client_001").await);
    }
    futures_util::future::join_all(clients.iter_mut().map(|client| client.query("SELECT 1"))).await;
    let open = world.server_processes().await;
    assert!(open <= 20, "{open}");
    // Long ones get what they need.
    let work = clients.iter_mut().map(|client| client.query("BEGIN; SELECT pg_backend_pid()"));
    let answers = futures_util::future::join_all(work).await;
    let row = |answer: &Vec<Message>| answer.iter().find(|m| m.tag == b'D').unwrap().values().swap_remove(0);
    let pids: BTreeSet<String> = answers.iter().map(row).collect();
    assert_eq!(pids.len(), 40);
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_wait_in_line() {
    let world = world(PoolMode::Transaction, |config| config.pool.default_pool_size = 1).await;
    let mut first = world.raw("client_001").await;
    first.query("CREATE TABLE arrivals (n serial, who int)").await;
    first.query("BEGIN").await;
    let mut clients = Vec::new();
    for who in 0..6 {
        let mut client = world.raw("client_001").await;
        client.compose(|b| b.query(&format!("INSERT INTO arrivals (who) VALUES ({who})"))).await;
        // In line before the next one comes.
        world.metric_until("pgusher_clients{state=\"waiting\"}", f64::from(who + 1)).await;
        clients.push(client);
    }
    first.query("COMMIT").await;
    for client in &mut clients {
        assert_eq!(show(&client.until_ready().await), "C(INSERT 0 1) Z(I)");
    }
    let order = first.value("SELECT string_agg(who::text, '' ORDER BY n) FROM arrivals").await;
    assert_eq!(order, "012345");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wait_that_is_too_long_is_an_error_and_the_client_goes_on() {
    let world = world(PoolMode::Transaction, |config| {
        config.pool.default_pool_size = 1;
        config.pool.query_wait_timeout = Duration::from_millis(300);
    })
    .await;
    let (mut holder, mut waiter) = (world.raw("client_001").await, world.raw("client_001").await);
    assert_eq!(show(&holder.query("BEGIN").await), "C(BEGIN) Z(T)");
    let error = waiter.error("SELECT 1").await;
    assert_eq!((error.code().as_str(), error.field(b'S').as_str()), ("53300", "ERROR"));
    assert!(error.field(b'M').contains("query_wait_timeout") && !error.field(b'H').is_empty());
    // What was pipelined behind it is skipped up to the Sync; the next group is a request of its own.
    waiter
        .compose(|b| {
            b.extended("SELECT 1", &[]);
            b.extended("SELECT 2", &[]);
        })
        .await;
    assert_eq!(show(&waiter.until_ready().await), "E(53300) Z(I)");
    assert_eq!(show(&waiter.until_ready().await), "E(53300) Z(I)");
    holder.query("ROLLBACK").await;
    assert_eq!(waiter.value("SELECT 7").await, "7");
}

/// A driver that uses Flush waits for the error before it sends Sync.
#[tokio::test(flavor = "multi_thread")]
async fn a_wait_that_is_too_long_is_told_to_who_flushes() {
    let world = world(PoolMode::Transaction, |config| {
        config.pool.default_pool_size = 1;
        config.pool.query_wait_timeout = Duration::from_millis(300);
    })
    .await;
    let (mut holder, mut waiter) = (world.raw("client_001").await, world.raw("client_001").await);
    holder.query("BEGIN").await;
    waiter
        .compose(|b| {
            b.parse("", "SELECT 1");
            b.describe(b'S', "");
            b.flush();
        })
        .await;
    assert_eq!(show(&waiter.until(b'E').await), "E(53300)");
    waiter.compose(|b| b.sync()).await;
    assert_eq!(show(&waiter.until_ready().await), "Z(I)");
    holder.query("ROLLBACK").await;
    assert_eq!(waiter.value("SELECT 7").await, "7");
}

/// Two tenants share a budget of one server connection; a server process still never serves both.
#[tokio::test(flavor = "multi_thread")]
async fn with_a_budget_of_one_tenants_take_turns_and_share_no_process() {
    for mode in MODES {
        let world = world(mode, |config| config.pool.max_db_connections = 1).await;
        let mut owners: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for round in 0..20 {
            let tenant = if round % 2 == 0 { "client_001" } else { "client_002" };
            let mut client = world.raw(tenant).await;
            let seen = client.value("SELECT pg_backend_pid() || '|' || current_user || ',' || session_user").await;
            let (pid, who) = seen.split_once('|').unwrap();
            assert_eq!(who, format!("{tenant},{tenant}"));
            let start = format!(
                "SELECT (extract(epoch FROM backend_start) * 1e6)::int8 FROM pg_stat_activity WHERE pid = {pid}"
            );
            let life = format!("{pid} since {}", world.admin_value(&start).await);
            owners.entry(life).or_default().insert(tenant.to_owned());
            assert!(world.server_processes().await <= 1);
            client.terminate().await;
        }
        assert!(owners.values().all(|tenants| tenants.len() == 1), "{owners:?}");
        assert!(owners.len() >= 10, "they took turns");
        assert!(world.metric("pgusher_evictions_total{shard=\"shard_1\"}").await >= 10.0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_least_recently_used_connection_makes_room() {
    let world = world(PoolMode::Transaction, |config| config.pool.max_db_connections = 2).await;
    let (mut a, mut b) = (world.raw("client_001").await, world.raw("client_002").await);
    let (pid_a, pid_b) = (pid(&mut a).await, pid(&mut b).await);
    assert_eq!(pid(&mut a).await, pid_a);
    // b is the one used longest ago: it goes, a stays.
    let mut c = world.raw("client_003").await;
    pid(&mut c).await;
    assert_eq!(pid(&mut a).await, pid_a);
    assert_ne!(pid(&mut b).await, pid_b);
    // Busy ones are not evicted: then one waits until a transaction ends.
    a.query("BEGIN").await;
    b.query("BEGIN").await;
    c.compose(|b| b.query("SELECT 'mine'")).await;
    world.metric_until("pgusher_clients{state=\"waiting\"}", 1.0).await;
    a.query("COMMIT").await;
    assert_eq!(show(&c.until_ready().await), "D(mine) C(SELECT 1) Z(I)");
    assert_eq!(show(&b.query("COMMIT").await), "C(COMMIT) Z(I)");
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_and_old_server_connections_are_closed() {
    let idle = world(PoolMode::Transaction, |config| config.pool.server_idle_timeout = Duration::from_secs(1)).await;
    let mut client = idle.raw("client_001").await;
    client.query("SELECT 1").await;
    assert_eq!(idle.server_processes().await, 1);
    idle.admin_until("SELECT count(*) FROM pg_stat_activity WHERE usename = 'client_001'", 0).await;
    assert_eq!(client.value("SELECT 1").await, "1");

    let old = world(PoolMode::Transaction, |config| config.pool.server_lifetime = Duration::from_secs(1)).await;
    let mut client = old.raw("client_001").await;
    let first = pid(&mut client).await;
    // In a transaction it lives on; afterwards its time is over.
    client.query("BEGIN").await;
    client.query("SELECT pg_sleep(1.2)").await;
    assert_eq!(pid(&mut client).await, first);
    client.query("COMMIT").await;
    assert_ne!(pid(&mut client).await, first);
}

/// What a client leaves behind, the next one of the tenant does not find; what leaves nothing costs no reset.
#[tokio::test(flavor = "multi_thread")]
async fn the_next_client_finds_a_clean_session() {
    for mode in MODES {
        let world = world(mode, |config| config.pool.default_pool_size = 1).await;
        let leaves = [
            ("SET work_mem = '123kB'", "SHOW work_mem", "4MB"),
            ("SET statement_timeout = '1ms'", "SELECT 1", "1"),
            ("SET default_transaction_read_only = on", "SHOW default_transaction_read_only", "off"),
            ("SELECT set_config('work_mem', '321kB', false)", "SHOW work_mem", "4MB"),
            ("DO $$ BEGIN PERFORM set_config('work_mem', '321kB', false); END $$", "SHOW work_mem", "4MB"),
            ("CREATE TEMP TABLE t (a int)", "SELECT count(*) FROM pg_class WHERE relpersistence = 't'", "0"),
            ("SELECT 1 AS a INTO TEMP t", "SELECT count(*) FROM pg_class WHERE relpersistence = 't'", "0"),
            (
                "SELECT pg_advisory_lock(42)",
                "SELECT count(*) FROM pg_catalog.pg_locks WHERE locktype = 'advisory'",
                "0",
            ),
            ("LISTEN news", "SELECT count(*) FROM pg_listening_channels()", "0"),
            ("BEGIN; DECLARE c CURSOR WITH HOLD FOR SELECT 1; COMMIT", "SELECT count(*) FROM pg_cursors", "0"),
            ("PREPARE p AS SELECT 1", "SELECT count(*) FROM pg_prepared_statements", "0"),
            ("SET search_path = pg_catalog", "SELECT current_schema()", "client_001"),
            ("SET TimeZone = 'Asia/Tokyo'", "SELECT current_setting('TimeZone') = 'Asia/Tokyo'", "f"),
            ("SET ROLE client_001", "SELECT current_setting('role')", "none"),
        ];
        for (sql, look, expected) in leaves {
            if mode == PoolMode::Auto && sql.starts_with("SET ROLE") {
                // It can only be the tenant's own, so nothing depends on it: it stays.
                continue;
            }
            let mut client = world.raw("client_001").await;
            let said = show(&client.query(sql).await);
            if sql.starts_with("LISTEN") && mode == PoolMode::Transaction {
                assert_eq!(said, "E(0A000) Z(I)");
            } else {
                assert!(!said.contains("E("), "{sql}: {said}");
            }
            client.terminate().await;
            let mut next = world.raw("client_001").await;
            let said = next.query(look).await;
            let found = said.iter().find(|m| m.tag == b'D').map(|m| m.values()[0].clone());
            if look.contains("pg_locks") && found.is_none() {
                // The view is closed to tenants; the superuser looks.
                let locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'";
                world.admin_until(locks, 0).await;
            } else {
                assert_eq!(found.as_deref(), Some(expected), "{mode:?} {sql}: {}", show(&said));
            }
            next.terminate().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_leaves_nothing_behind_costs_no_reset() {
    for mode in MODES {
        let world = world(mode, |config| config.pool.default_pool_size = 1).await;
        let mut first = world.raw("client_001").await;
        let admin = world.cluster().admin("tenants").await;
        let served_by = pid(&mut first).await;
        for sql in [
            "SELECT count(*) FROM bookings WHERE note = 'it''s' AND id IN (1, 2)",
            "INSERT INTO bookings (note) VALUES ('a'), ('b') RETURNING id",
            "BEGIN; SET LOCAL work_mem = '1MB'; UPDATE bookings SET note = upper(note); COMMIT",
            "WITH x AS (SELECT now()) SELECT * FROM x",
        ] {
            let said = first.query(sql).await;
            assert!(!said.iter().any(|m| m.tag == b'E'), "{}", show(&said));
        }
        first.terminate().await;
        let mut next = world.raw("client_001").await;
        assert_eq!(pid(&mut next).await, served_by);
        next.terminate().await;
        // The server's last word on that connection is the client's query, not a DISCARD.
        let last: String = admin
            .query_one("SELECT query FROM pg_stat_activity WHERE pid = $1::text::int", &[&served_by])
            .await
            .unwrap()
            .get(0);
        assert_eq!(last, "SELECT pg_backend_pid()");
        // And one that does leave something gets one.
        let mut third = world.raw("client_001").await;
        third.query("CREATE TEMP TABLE t (a int)").await;
        third.terminate().await;
        // It ends so.
        let reset = format!("SELECT count(*) FROM pg_stat_activity WHERE pid = {served_by} AND query = 'RESET ROLE'");
        world.admin_until(&reset, 1).await;
    }
}

/// However it was found out what they have set.
#[tokio::test(flavor = "multi_thread")]
async fn clients_with_the_same_settings_share_a_connection_without_a_word() {
    let cluster = std::sync::Arc::new(crate::postgres::Cluster::start_with(&["log_statement=all"]));
    let world = World::with_clusters(vec![cluster], |config| {
        config.pool.pool_mode = PoolMode::Auto;
        config.pool.default_pool_size = 1;
    })
    .await;
    let (mut one, mut two) = (world.raw("client_001").await, world.raw("client_001").await);
    for client in [&mut one, &mut two] {
        client.query("SET statement_timeout = '30s'; SET work_mem = 8192").await;
    }
    one.query("DO $$ BEGIN NULL; END $$").await;
    for client in [&mut one, &mut two] {
        client.query("SELECT 'first'").await;
    }
    for _ in 0..5 {
        for client in [&mut one, &mut two] {
            client.query("SELECT 'again'").await;
        }
    }
    let log = world.cluster().log();
    let (_, since) = log.rsplit_once("SELECT 'first'").unwrap();
    assert_eq!(since.matches("SELECT 'again'").count(), 10, "{since}");
    assert!(!since.contains("set_config"), "{since}");
}

#[tokio::test(flavor = "multi_thread")]
async fn reported_settings_follow_the_client() {
    let world = world(PoolMode::Transaction, |config| config.pool.default_pool_size = 1).await;
    let mut one = world.raw_with("client_001", &[("application_name", "one")]).await;
    let mut two = world.raw_with("client_001", &[("application_name", "two")]).await;
    for (name, value) in [
        ("TimeZone", "Asia/Tokyo"),
        ("DateStyle", "German, DMY"),
        ("client_encoding", "LATIN1"),
        ("IntervalStyle", "iso_8601"),
    ] {
        let default = two.value(&format!("SHOW {name}")).await;
        assert_ne!(default, value);
        one.query(&format!("SET {name} = '{}'", value.trim_end_matches(", DMY"))).await;
        assert_eq!(one.params[name], value);
        for _ in 0..3 {
            assert_eq!(two.value(&format!("SHOW {name}")).await, default, "{name} of the other");
            assert_eq!(one.value(&format!("SHOW {name}")).await, value, "{name} of one's own");
        }
        assert_eq!(two.params[name], default);
    }
    assert_eq!(one.value("SHOW application_name").await, "one");
    assert_eq!(two.value("SHOW application_name").await, "two");
    one.query("SET application_name = 'renamed'").await;
    assert_eq!(two.value("SHOW application_name").await, "two");
    assert_eq!(one.value("SHOW application_name").await, "renamed");
    // What is rolled back is not carried.
    one.query("BEGIN; SET TimeZone = 'Europe/Oslo'; ROLLBACK").await;
    two.query("SELECT 1").await;
    assert_eq!(one.value("SHOW TimeZone").await, "Asia/Tokyo");
}

/// A client that goes in the middle of something takes its server connection with it.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_lost_in_the_middle_leaves_no_connection_behind() {
    for mode in MODES {
        let world = world(mode, |config| config.pool.default_pool_size = 1).await;
        let mut seen = BTreeSet::new();
        for middle in [
            "transaction",
            "failed transaction",
            "query",
            "copy in",
            "copy out",
            "goodbye",
            "goodbye in a group",
            "goodbye after an error",
            "goodbye in a copy",
            "group",
            "half a message",
        ] {
            let mut client = world.raw("client_001").await;
            let served_by = pid(&mut client).await;
            assert!(seen.insert(served_by.clone()), "reused before {middle}");
            match middle {
                "transaction" => drop(client.query("BEGIN; INSERT INTO bookings (note) VALUES ('lost')").await),
                "failed transaction" => drop(client.query("BEGIN; SELECT 1/0").await),
                "query" => {
                    client.compose(|b| b.query("INSERT INTO bookings (note) SELECT 'lost' FROM pg_sleep(30)")).await;
                    world.admin_until(&format!("SELECT count(*) FROM pg_stat_activity WHERE pid = {served_by} AND state = 'active' AND query LIKE '%sleep%'"), 1).await;
                }
                "copy in" => {
                    client.compose(|b| b.query("COPY bookings (note) FROM stdin")).await;
                    client.until(b'G').await;
                    client.compose(|b| b.copy_data(b"lost\n")).await;
                }
                "copy out" => {
                    client
                        .compose(|b| {
                            b.query("COPY (SELECT repeat('x', 1000) FROM generate_series(1, 1000000)) TO stdout")
                        })
                        .await;
                    client.until(b'd').await;
                }
                "goodbye" => {
                    client.query("BEGIN; INSERT INTO bookings (note) VALUES ('lost')").await;
                    client.send(b"X\0\0\0\x04").await;
                }
                "goodbye in a group" => {
                    client
                        .compose(|b| {
                            b.parse("", "INSERT INTO bookings (note) VALUES ('lost')");
                            b.bind("", "", &[]);
                            b.execute("");
                            b.message(b'X', b"");
                        })
                        .await;
                }
                "goodbye after an error" => {
                    client
                        .compose(|b| {
                            b.bind("", "no such statement", &[]);
                            b.execute("");
                            b.message(b'X', b"");
                        })
                        .await;
                }
                "goodbye in a copy" => {
                    client
                        .compose(|b| {
                            b.query("COPY bookings (note) FROM stdin");
                            b.copy_data(b"lost\n");
                            b.message(b'X', b"");
                        })
                        .await;
                }
                "group" => {
                    client
                        .compose(|b| {
                            b.parse("", "INSERT INTO bookings (note) VALUES ('lost')");
                            b.bind("", "", &[]);
                            b.execute("");
                            b.flush();
                        })
                        .await;
                    client.until(b'C').await;
                }
                _ => {
                    // The server has seen the beginning of it.
                    let sql = format!("INSERT INTO bookings (note) VALUES ('lost') --{}", "x".repeat(100_000));
                    let mut batch = Batch::default();
                    batch.query(&sql);
                    client.send(&batch.0[..60_000]).await;
                    world.metric_until("pgusher_clients{state=\"active\"}", 1.0).await;
                }
            }
            if middle.starts_with("goodbye") {
                // The proxy hangs up by itself.
                assert!(client.is_closed().await);
            }
            drop(client);
            world.admin_until(&format!("SELECT count(*) FROM pg_stat_activity WHERE pid = {served_by}"), 0).await;
        }
        let mut next = world.raw("client_001").await;
        assert_eq!(next.value("SELECT count(*) FROM bookings WHERE note = 'lost'").await, "0", "{mode:?}");
        next.terminate().await;
        world.metric_until("pgusher_server_connections{shard=\"shard_1\",state=\"active\"}", 0.0).await;
        world.metric_until("pgusher_clients{state=\"active\"}", 0.0).await;
    }
}

/// Clients with other startup settings must not wait for ever behind connections that they cannot use.
#[tokio::test(flavor = "multi_thread")]
async fn different_startup_settings_share_a_full_pool() {
    let world = world(PoolMode::Transaction, |config| {
        config.pool.default_pool_size = 2;
        config.pool.query_wait_timeout = Duration::from_secs(10);
    })
    .await;
    let mut clients = Vec::new();
    for n in 0..6 {
        clients.push((n, world.raw_with("client_001", &[("statement_timeout", &(10_001 + n).to_string())]).await));
    }
    let work = clients.iter_mut().map(async |(n, client)| {
        for _ in 0..20 {
            let said = client.query("SELECT current_setting('statement_timeout'), pg_sleep(0.002)").await;
            assert_eq!(said[1].values()[0], format!("{}ms", 10_001 + *n));
        }
    });
    futures_util::future::join_all(work).await;
    assert!(world.server_processes().await <= 2);
}

/// A client that keeps its server connection and does nothing with it.
#[tokio::test(flavor = "multi_thread")]
async fn an_idle_pinned_client_is_told_to_go_after_pin_timeout() {
    let world = world(PoolMode::Auto, |config| config.pool.pin_timeout = Duration::from_millis(600)).await;
    let (mut idle, mut free) = (world.raw("client_001").await, world.raw("client_001").await);
    idle.query("CREATE TEMP TABLE t (a int)").await;
    // In a transaction it is not idle in this sense, however long that takes.
    idle.query("BEGIN").await;
    idle.query("SELECT pg_sleep(1)").await;
    assert_eq!(show(&idle.query("COMMIT").await), "C(COMMIT) Z(I)");
    let error = idle.next().await.unwrap();
    assert_eq!((error.code().as_str(), error.field(b'S').as_str()), ("57P05", "FATAL"));
    assert!(error.field(b'D').contains("(temp)") && !error.field(b'H').is_empty(), "{error:?}");
    assert!(idle.is_closed().await);
    // Who keeps nothing may stay.
    assert_eq!(free.value("SELECT 1").await, "1");
}

/// Settings say nothing about what else the session holds.
#[tokio::test(flavor = "multi_thread")]
async fn a_pinned_client_stays_pinned_when_it_changes_a_setting() {
    let world = world(PoolMode::Auto, |_| {}).await;
    let (mut client, mut other) = (world.raw("client_001").await, world.raw("client_001").await);
    client.query("CREATE TEMP TABLE t AS SELECT 7 AS a").await;
    client.query("SET work_mem = '1MB'").await;
    // The server connection used last is the one that would be lent.
    assert_eq!(other.value("SELECT count(*) FROM pg_class WHERE relpersistence = 't' AND relname = 't' AND pg_table_is_visible(oid)").await, "0");
    assert_eq!(client.value("SELECT a FROM t").await, "7");
}

/// A client that keeps its server connection is told the number of its server process; cancels still go by our own key.
#[tokio::test(flavor = "multi_thread")]
async fn in_session_mode_the_process_id_is_the_servers() {
    let world = world(PoolMode::Session, |config| config.pool.default_pool_size = 2).await;
    let (mut one, mut two) = (world.raw("client_001").await, world.raw("client_001").await);
    assert_ne!(one.pid, two.pid);
    for client in [&mut one, &mut two] {
        assert_eq!(pid(client).await, client.pid.to_string());
    }
    two.compose(|b| b.query("SELECT pg_sleep(60)")).await;
    let sleeps = format!("SELECT count(*) FROM pg_stat_activity WHERE pid = {} AND query LIKE '%pg_sleep%'", two.pid);
    world.admin_until(&sleeps, 1).await;
    crate::raw::cancel(world.port, two.pid, &two.secret).await;
    assert_eq!(show(&two.until_ready().await), "E(57014) Z(I)");
    // Without a server connection at hand the number is made up, and nobody waits for it.
    let mut late = world.raw("client_001").await;
    assert!(late.pid != one.pid && late.pid != two.pid);
    // The connection of one that goes is the next one's, number included.
    let served = one.pid;
    one.terminate().await;
    assert_eq!(late.value("SELECT 1").await, "1");
    late.terminate().await;
    let idle = "pgusher_server_connections{shard=\"shard_1\",state=\"idle\"}";
    world.metric_until(idle, 1.0).await;
    assert_eq!(world.raw("client_001").await.pid, served);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_client_is_told_to_go_in_session_mode_too() {
    let world = world(PoolMode::Session, |config| config.proxy.client_idle_timeout = Duration::from_millis(300)).await;
    let mut client = world.raw("client_001").await;
    client.query("BEGIN").await;
    client.query("SELECT pg_sleep(0.5)").await;
    assert_eq!(show(&client.query("COMMIT").await), "C(COMMIT) Z(I)");
    assert_eq!(client.next().await.unwrap().code(), "57P05");
}

/// A server that is restarted while nobody uses it: not one client hears of it, those who took settings along included.
#[tokio::test(flavor = "multi_thread")]
async fn a_restart_between_transactions_is_nobodys_business() {
    let world = world(PoolMode::Auto, |config| config.pool.default_pool_size = 4).await;
    let mut clients = Vec::new();
    for n in 0..8 {
        let mut client = world.raw("client_001").await;
        assert_eq!(show(&client.query(&format!("SET work_mem = '{}kB'", 100 + n)).await), "C(SET) Z(I)");
        let prepare = |b: &mut Batch| {
            b.parse("mine", &format!("SELECT {n}"));
            b.sync();
        };
        client.compose(prepare).await;
        client.until_ready().await;
        clients.push(client);
    }
    let held = clients.iter_mut().map(|client| client.query("SELECT pg_sleep(0.2)"));
    futures_util::future::join_all(held).await;
    let before = world.server_processes().await;
    assert!(before > 1, "{before}");
    let cluster = world.clusters[0].clone();
    tokio::task::spawn_blocking(move || cluster.restart()).await.unwrap();
    for (n, client) in clients.iter_mut().enumerate() {
        assert_eq!(client.value("SHOW work_mem").await, format!("{}kB", 100 + n));
        let run = |b: &mut Batch| {
            b.bind("", "mine", &[]);
            b.execute("");
            b.sync();
        };
        client.compose(run).await;
        assert_eq!(show(&client.until_ready().await), format!("2 D({n}) C(SELECT 1) Z(I)"));
    }
    // And if only the processes end, while they are idle.
    let admin = world.cluster().admin("tenants").await;
    let ended = "SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity WHERE usename = 'client_001'";
    for _ in 0..20 {
        admin.query_one(ended, &[]).await.unwrap();
        for (n, client) in clients.iter_mut().enumerate().take(2) {
            assert_eq!(client.value("SHOW work_mem").await, format!("{}kB", 100 + n));
        }
    }
}
