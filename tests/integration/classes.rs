//! Sixteen classes of what breaks behind poolers, each with a test of its own, in `pool_mode = "auto"`. A server
//! connection changes hands between any two transactions here: there are more clients than server connections.

use std::time::Duration;

use pgusher::config::PoolMode;

use crate::raw::{Batch, Raw, show};
use crate::world::{APP_PASSWORD, World, raw};

async fn world() -> World {
    World::start(|config| {
        config.pool.pool_mode = PoolMode::Auto;
        config.pool.default_pool_size = 2;
    })
    .await
}

/// Gives every idle server connection to somebody else for a moment.
async fn others(world: &World) {
    let mut one = world.raw("client_001").await;
    let mut two = world.raw("client_001").await;
    one.query("BEGIN").await;
    two.query("SELECT 1").await;
    one.query("COMMIT").await;
    one.terminate().await;
    two.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn class_01_the_process_id_is_stable_fits_and_cancels_the_right_client() {
    let world = world().await;
    let mut one = world.raw("client_001").await;
    let mut two = world.raw("client_001").await;
    assert!(one.pid > 0 && two.pid > 0 && one.pid != two.pid);
    one.compose(|b| b.query("SELECT pg_sleep(30)")).await;
    world
        .admin_until("SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%sleep%' AND pid <> pg_backend_pid()", 1)
        .await;
    crate::raw::cancel(world.port, one.pid, &one.secret).await;
    assert!(show(&one.until_ready().await).contains("E(57014)"));
    assert_eq!(two.value("SELECT 1").await, "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn class_02_any_startup_parameter_is_a_setting() {
    let world = world().await;
    let parameters = [
        ("Statement_Timeout", "12345"),
        ("lock_timeout", "12346"),
        ("some.var", "x"),
        ("options", "-c work_mem=5MB -c some.other=a\\ b"),
        ("client_min_messages", "warning"),
    ];
    let mut client = world.raw_with("client_001", &parameters).await;
    others(&world).await;
    for (name, value) in [
        ("statement_timeout", "12345ms"),
        ("lock_timeout", "12346ms"),
        ("some.var", "x"),
        ("work_mem", "5MB"),
        ("some.other", "a b"),
        ("client_min_messages", "warning"),
    ] {
        assert_eq!(client.value(&format!("SELECT current_setting('{name}')")).await, value, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn class_03_a_startup_value_is_what_a_reset_brings_back() {
    let world = world().await;
    let parameters = [("TimeZone", "Asia/Tokyo"), ("DateStyle", "German"), ("application_name", "mine")];
    let mut client = world.raw_with("client_001", &parameters).await;
    for reset in ["RESET TimeZone; RESET DateStyle; RESET application_name", "RESET ALL", "DISCARD ALL"] {
        client.query("SET TimeZone = 'UTC'; SET DateStyle = 'ISO'; SET application_name = 'other'").await;
        others(&world).await;
        assert_eq!(client.value("SHOW TimeZone").await, "UTC");
        client.query(reset).await;
        others(&world).await;
        assert_eq!(client.value("SHOW TimeZone").await, "Asia/Tokyo", "{reset}");
        assert_eq!(client.value("SHOW DateStyle").await, "German, DMY", "{reset}");
        assert_eq!(client.value("SHOW application_name").await, "mine", "{reset}");
        assert_eq!(client.params["application_name"], "mine", "{reset}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn class_04_a_login_that_fails_says_why() {
    let world = world().await;
    world.raw("client_001").await.terminate().await;
    let login = async |database: &str, password: &str| {
        let parameters = [("user", "app.client_001"), ("database", database)];
        Raw::login(world.port, &parameters, password).await.err().map(|refused| refused.error.field(b'C'))
    };
    assert_eq!(login("client_001", "wrong").await.as_deref(), Some("28P01"));
    assert_eq!(login("no_such_database", APP_PASSWORD).await.as_deref(), Some("3D000"));
    assert_eq!(login("client_001", APP_PASSWORD).await, None);
}

/// Even with no server connection to be had: nobody is asked.
#[tokio::test(flavor = "multi_thread")]
async fn class_05_a_database_that_does_not_exist_is_refused_at_once() {
    let world = world().await;
    let mut holders = Vec::new();
    for _ in 0..2 {
        let mut holder = world.raw("client_001").await;
        holder.query("BEGIN").await;
        holders.push(holder);
    }
    let refused = Raw::login(world.port, &[("user", "app.client_001"), ("database", "nowhere")], APP_PASSWORD).await;
    assert_eq!(refused.err().unwrap().error.field(b'C'), "3D000");
}

#[tokio::test(flavor = "multi_thread")]
async fn class_06_the_servers_last_words_arrive_as_they_are() {
    let world = world().await;
    let mut client = world.raw("client_001").await;
    let said = client.query("BEGIN; SELECT pg_backend_pid()").await;
    let pid = said.iter().find(|m| m.tag == b'D').unwrap().values().swap_remove(0);
    world.admin_until(&format!("SELECT count(*) FROM (SELECT pg_terminate_backend({pid})) t"), 1).await;
    let error = client.next().await.unwrap();
    assert_eq!((error.field(b'S').as_str(), error.code().as_str()), ("FATAL", "57P01"));
    assert_eq!(error.field(b'M'), "terminating connection due to administrator command");
    assert!(client.is_closed().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn class_07_a_cancel_whose_sender_leaves_at_once_is_carried_out() {
    let world = world().await;
    let mut client = world.raw("client_001").await;
    client.compose(|b| b.query("SELECT pg_sleep(30)")).await;
    world
        .admin_until("SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%sleep%' AND pid <> pg_backend_pid()", 1)
        .await;
    let mut packet = u32::try_from(12 + client.secret.len()).unwrap().to_be_bytes().to_vec();
    packet.extend(80_877_102_u32.to_be_bytes());
    packet.extend(client.pid.to_be_bytes());
    packet.extend(&client.secret);
    let mut sender = Raw::tcp(world.port).await;
    sender.send(&packet).await;
    drop(sender);
    assert!(show(&client.until_ready().await).contains("E(57014)"));
}

#[tokio::test(flavor = "multi_thread")]
async fn class_08_reported_values_are_the_servers_spelling() {
    let world = world().await;
    for spelling in ["'utf-8'", "utf8", "UTF8"] {
        let client = world.raw_with("client_001", &[("client_encoding", spelling)]).await;
        assert_eq!(client.params["client_encoding"], "UTF8", "{spelling}");
    }
    let mut client = world.raw_with("client_001", &[("datestyle", "iso, mdy")]).await;
    assert_eq!(client.params["DateStyle"], "ISO, MDY");
    client.query("SET client_encoding TO 'latin-1'").await;
    assert_eq!(client.params["client_encoding"], "LATIN1");
}

#[tokio::test(flavor = "multi_thread")]
async fn class_09_replication_is_refused_with_a_reason_where_a_server_is_shared() {
    let world = world().await;
    world.raw("client_001").await.terminate().await;
    for kind in ["database", "true", "on"] {
        let refused = raw(world.port, "client_001", &[("replication", kind)]).await.err().unwrap();
        assert_ne!(refused.error.code(), "08P01", "{kind}");
        assert!(refused.error.field(b'M').contains("replication"), "{}", refused.error.field(b'M'));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn class_10_prepared_names_of_several_clients_do_not_collide() {
    let world = world().await;
    let mut clients = Vec::new();
    for n in 0..5 {
        let mut client = world.raw("client_001").await;
        client
            .compose(|b| {
                b.parse("s", &format!("SELECT {n} + $1::int"));
                b.sync();
            })
            .await;
        assert_eq!(show(&client.until_ready().await), "1 Z(I)");
        clients.push(client);
    }
    for round in 0..3 {
        for (n, client) in clients.iter_mut().enumerate() {
            client
                .compose(|b| {
                    b.bind("", "s", &["10"]);
                    b.execute("");
                    b.sync();
                })
                .await;
            assert_eq!(show(&client.until_ready().await), format!("2 D({}) C(SELECT 1) Z(I)", 10 + n), "{round}");
        }
    }
    // By SQL too: the names are one and the same to the client.
    assert_eq!(clients[0].value("EXECUTE s (5)").await, "5");
    assert_eq!(show(&clients[0].query("DEALLOCATE s").await), "C(DEALLOCATE) Z(I)");
    let error = clients[0].error("EXECUTE \"s\" (5)").await;
    assert_eq!((error.code().as_str(), &*error.field(b'M')), ("26000", "prepared statement \"s\" does not exist"));
    assert_eq!(clients[1].value("EXECUTE s (5)").await, "6");
    let error = clients[1].error("PREPARE s AS SELECT 1").await;
    assert_eq!((error.code().as_str(), &*error.field(b'M')), ("42P05", "prepared statement \"s\" already exists"));
}

/// What SQL has prepared can be run by the protocol.
#[tokio::test(flavor = "multi_thread")]
async fn class_10_what_sql_prepares_is_there_for_the_protocol() {
    let world = world().await;
    let mut client = world.raw("client_001").await;
    client.query("PREPARE p AS SELECT 7").await;
    client
        .compose(|b| {
            b.bind("", "p", &[]);
            b.execute("");
            b.close(b'S', "p");
            b.bind("", "p", &[]);
            b.sync();
        })
        .await;
    assert_eq!(show(&client.until_ready().await), "2 D(7) C(SELECT 1) 3 E(26000) Z(I)");
    world.metric_until("pgusher_pinned_clients{reason=\"prepare\"}", 0.0).await;
}

/// `EXECUTE` may itself be prepared, as asyncpg does with everything.
#[tokio::test(flavor = "multi_thread")]
async fn class_10_what_the_protocol_prepares_is_there_for_a_prepared_execute() {
    let world = world().await;
    let mut client = world.raw("client_001").await;
    for (name, sql) in [("p", "SELECT 7"), ("x", "EXECUTE p")] {
        client
            .compose(|b| {
                b.parse(name, sql);
                b.describe(b'S', name);
                b.sync();
            })
            .await;
        assert_eq!(show(&client.until_ready().await), "1 Z(I)", "{sql}");
        others(&world).await;
    }
    for expected in ["2 D(7) C(SELECT 1) Z(I)", "2 D(8) C(SELECT 1) Z(I)"] {
        client
            .compose(|b| {
                b.bind("", "x", &[]);
                b.execute("");
                b.sync();
            })
            .await;
        assert_eq!(show(&client.until_ready().await), expected);
        others(&world).await;
        client
            .compose(|b| {
                b.close(b'S', "p");
                b.parse("p", "SELECT 8");
                b.sync();
            })
            .await;
        assert_eq!(show(&client.until_ready().await), "3 1 Z(I)");
    }
}

/// What is prepared for others is not listed.
#[tokio::test(flavor = "multi_thread")]
async fn class_10_who_lists_prepared_statements_sees_none_of_others() {
    const LIST: &str = "SELECT count(*) FROM pg_prepared_statements";
    let world = world().await;
    let (mut one, mut two) = (world.raw("client_001").await, world.raw("client_001").await);
    for round in 1..4 {
        one.compose(|b| {
            b.parse(&format!("s{round}"), &format!("SELECT {round}"));
            b.bind("", &format!("s{round}"), &[]);
            b.execute("");
            b.sync();
        })
        .await;
        one.until_ready().await;
        assert_eq!(one.value(LIST).await, round.to_string());
        assert_eq!(two.value(LIST).await, "0");
        two.compose(|b| b.extended(LIST, &[])).await;
        assert_eq!(show(&two.until_ready().await), "1 2 D(0) C(SELECT 1) Z(I)");
        // They are prepared again where they are used again.
        for used in 1..=round {
            one.compose(|b| {
                b.bind("", &format!("s{used}"), &[]);
                b.execute("");
                b.sync();
            })
            .await;
            assert_eq!(show(&one.until_ready().await), format!("2 D({used}) C(SELECT 1) Z(I)"));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn class_11_a_statement_lives_from_one_sync_to_the_next() {
    let world = world().await;
    let mut client = world.raw("client_001").await;
    for name in ["", "n"] {
        client
            .compose(|b| {
                b.parse(name, "SELECT set_config('app.who', $1, false)");
                b.describe(b'S', name);
                b.sync();
            })
            .await;
        client.until_ready().await;
        others(&world).await;
        client
            .compose(|b| {
                b.bind("", name, &[&format!("me{name}")]);
                b.execute("");
                b.sync();
            })
            .await;
        client.until_ready().await;
        others(&world).await;
        assert_eq!(client.value("SHOW app.who").await, format!("me{name}"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn class_12_a_session_keeps_what_it_made_and_others_do_not_see_it() {
    let world = world().await;
    let mut one = world.raw("client_001").await;
    let mut two = world.raw("client_001").await;
    for sql in [
        "CREATE TEMP TABLE t AS SELECT 1 AS x",
        "SET work_mem = '1MB'",
        "SELECT pg_advisory_lock(5)",
        "SET default_transaction_read_only = on",
    ] {
        assert!(!show(&one.query(sql).await).contains("E("), "{sql}");
        for _ in 0..2 {
            assert_eq!(two.value("SHOW default_transaction_read_only").await, "off");
            assert_eq!(two.error("SELECT * FROM t").await.code(), "42P01");
            assert_eq!(two.value("SHOW work_mem").await, "4MB");
        }
    }
    assert_eq!(two.value("SELECT pg_try_advisory_lock(5)").await, "f");
    assert_eq!(one.value("SELECT x FROM t").await, "1");
    assert_eq!(one.value("SHOW work_mem").await, "1MB");
    // Without a reset or a goodbye, the connection goes back when nothing holds it any more.
    one.query("RESET default_transaction_read_only").await;
    one.query("DROP TABLE t").await;
    one.query("SELECT pg_advisory_unlock(5)").await;
    for reason in ["temp", "lock", "unknown"] {
        world.metric_until(&format!("pgusher_pinned_clients{{reason=\"{reason}\"}}"), 0.0).await;
    }
}

/// Whatever is in `pg_temp` keeps the connection, and nothing else does.
#[tokio::test(flavor = "multi_thread")]
async fn class_12_every_kind_of_temporary_object_is_kept() {
    let world = world().await;
    let mut one = world.raw("client_001").await;
    let mut two = world.raw("client_001").await;
    let pinned = "pgusher_pinned_clients{reason=\"temp\"}";
    one.query("CREATE TABLE kept (a int, b int)").await;
    for (made, taken) in [
        ("CREATE TEMP TABLE x (a int)", "DROP TABLE x"),
        ("CREATE TEMP VIEW x AS SELECT 1 AS a", "DROP VIEW x"),
        ("CREATE TEMP SEQUENCE x", "DROP SEQUENCE x"),
        ("CREATE FUNCTION pg_temp.x() RETURNS int LANGUAGE sql AS 'SELECT 1'", "DROP FUNCTION pg_temp.x()"),
        ("CREATE TYPE pg_temp.x AS ENUM ('a')", "DROP TYPE x"),
        ("CREATE DOMAIN pg_temp.x AS int", "DROP DOMAIN x"),
        ("CREATE STATISTICS pg_temp.x ON a, b FROM kept", "DROP STATISTICS pg_temp.x"),
        ("CREATE COLLATION pg_temp.x FROM \"C\"", "DROP COLLATION pg_temp.x"),
        (
            "CREATE OPERATOR pg_temp.=== (leftarg = int, rightarg = int, function = int4eq)",
            "DROP OPERATOR pg_temp.=== (int, int)",
        ),
        ("CREATE TEXT SEARCH CONFIGURATION pg_temp.x (COPY = simple)", "DROP TEXT SEARCH CONFIGURATION pg_temp.x"),
    ] {
        let said = show(&one.query(made).await);
        assert!(said.starts_with("C("), "{made}: {said}");
        world.metric_until(pinned, 1.0).await;
        assert_eq!(two.value("SELECT 1").await, "1");
        let said = show(&one.query(taken).await);
        assert!(said.starts_with("C("), "{taken}: {said}");
        world.metric_until(pinned, 0.0).await;
    }
}

/// What the client says about plans must not make the proxy's own questions dear: they would be compiled.
#[tokio::test(flavor = "multi_thread")]
async fn class_12_what_a_client_tells_the_planner_is_not_about_us() {
    let world = world().await;
    let mut one = world.raw("client_001").await;
    for way in ["seqscan", "indexscan", "indexonlyscan", "bitmapscan", "tidscan"] {
        one.query(&format!("SET enable_{way} = off")).await;
    }
    one.query("CREATE TEMP TABLE x (a int)").await;
    world.metric_until("pgusher_pinned_clients{reason=\"temp\"}", 1.0).await;
    assert_eq!(one.value("SHOW jit").await, "on");
    one.query("DROP TABLE x").await;
    world.metric_until("pgusher_pinned_clients{reason=\"temp\"}", 0.0).await;
    assert_eq!(one.value("SHOW jit").await, "on");
    assert_eq!(one.value("SHOW enable_seqscan").await, "off");
}

/// Who asks for the state of sequences gets its own, and keeps its server connection for that.
#[tokio::test(flavor = "multi_thread")]
async fn class_12_sequences_say_what_this_session_did() {
    let world = world().await;
    let mut one = world.raw("client_001").await;
    let mut two = world.raw("client_001").await;
    let insert = "INSERT INTO bookings (note) VALUES ('x')";
    two.query(insert).await;
    assert_eq!(one.error("SELECT lastval()").await.code(), "55000", "somebody else's");
    one.query(insert).await;
    for _ in 0..3 {
        two.query(insert).await;
    }
    assert_eq!(one.value("SELECT lastval()").await, "2");
    assert_eq!(one.value("SELECT currval('bookings_id_seq')").await, "2");
    // The other one may ask as well.
    world.metric_until("pgusher_pinned_clients{reason=\"sequence\"}", 2.0).await;
    one.query("DISCARD SEQUENCES").await;
    world.metric_until("pgusher_pinned_clients{reason=\"sequence\"}", 1.0).await;
    assert_eq!(one.error("SELECT lastval()").await.code(), "55000");
    assert_eq!(world.metric("pgusher_pinned_clients{reason=\"seed\"}").await, 0.0);
    let direct = world.cluster().admin("tenants").await;
    direct.batch_execute("SELECT setseed(0.5)").await.unwrap();
    let expected: String = direct.query_one("SELECT random()::text", &[]).await.unwrap().get(0);
    one.query("SELECT setseed(0.5)").await;
    two.query("SELECT random()").await;
    assert_eq!(one.value("SELECT random()::text").await, expected);
}

/// Also who keeps a connection for another reason does not find what others did with sequences there.
#[tokio::test(flavor = "multi_thread")]
async fn class_12_sequences_of_others_are_not_seen_by_who_is_pinned() {
    let world = world().await;
    let (mut one, mut two) = (world.raw("client_001").await, world.raw("client_001").await);
    one.query("CREATE SEQUENCE numbers; SELECT nextval('numbers')").await;
    two.query("SELECT pg_try_advisory_lock(1)").await;
    assert_eq!(two.error("SELECT currval('numbers')").await.code(), "55000");
    // Forgetting that leaves alone what was prepared before.
    let mut three = world.raw("client_001").await;
    three
        .compose(|b| {
            b.parse("", "SELECT coalesce(pg_try_advisory_lock(2), false)");
            b.sync();
        })
        .await;
    three.until_ready().await;
    one.query("SELECT nextval('numbers')").await;
    three
        .compose(|b| {
            b.bind("", "", &[]);
            b.execute("");
            b.sync();
        })
        .await;
    assert_eq!(show(&three.until_ready().await), "2 D(t) C(SELECT 1) Z(I)");
}

/// Some commands want to be alone in their group of messages, whoever used the server connection before.
#[tokio::test(flavor = "multi_thread")]
async fn class_12_nothing_of_ours_is_in_the_way_of_what_runs_alone() {
    let world = World::transaction(|config| {
        config.pool.pool_mode = PoolMode::Auto;
        config.pool.default_pool_size = 1;
    })
    .await;
    let (mut one, mut two) = (world.raw("client_001").await, world.raw("client_001").await);
    let sql = "CREATE INDEX CONCURRENTLY notes ON bookings (lower(note))";
    for (name, closes) in [("", 0), ("a", 0), ("", 1), ("a", 3)] {
        let put_closes = |b: &mut Batch| {
            [(b'S', ""), (b'P', "p"), (b'S', "z")][..closes].iter().for_each(|(what, name)| b.close(*what, name))
        };
        let closed = "3 ".repeat(closes);
        for apart in [false, true] {
            two.query("INSERT INTO bookings (note) VALUES ('x')").await;
            one.compose(|b| {
                put_closes(b);
                b.parse(name, sql);
                if apart {
                    b.sync();
                }
            })
            .await;
            if apart {
                assert_eq!(show(&one.until_ready().await), format!("{closed}1 Z(I)"));
                two.query("INSERT INTO bookings (note) VALUES ('x')").await;
            }
            one.compose(|b| {
                if apart && !name.is_empty() {
                    put_closes(b);
                }
                b.bind("", name, &[]);
                b.execute("");
                b.sync();
            })
            .await;
            let first = match (apart, name) {
                (false, _) => format!("{closed}1 "),
                (true, "") => String::new(),
                (true, _) => closed.clone(),
            };
            assert_eq!(show(&one.until_ready().await), format!("{first}2 C(CREATE INDEX) Z(I)"), "{name:?} {apart}");
            one.query("DROP INDEX notes").await;
            one.query("DEALLOCATE ALL").await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn class_13_notifications_reach_those_who_listen() {
    let world = world().await;
    let mut one = world.raw("client_001").await;
    let mut two = world.raw("client_001").await;
    one.query("LISTEN news").await;
    two.query("SELECT 1").await;
    let said = two.query("NOTIFY news, 'hello'").await;
    assert!(said.iter().all(|m| m.tag != b'A'), "the other does not listen");
    let heard = one.until(b'A').await.pop().unwrap();
    assert!(String::from_utf8_lossy(&heard.body[4..]).starts_with("news\0hello\0"));
}

/// `CREATE DATABASE` and `DROP DATABASE` need the database to themselves. A tenant of a shared server is in one database
/// only, which is nobody's template; its idle connections keep nobody from making others.
#[tokio::test(flavor = "multi_thread")]
async fn class_14_idle_connections_do_not_stand_in_the_way_of_databases() {
    let world = world().await;
    others(&world).await;
    let admin = world.cluster().admin("postgres").await;
    admin.batch_execute("CREATE DATABASE more").await.unwrap();
    admin.batch_execute("DROP DATABASE more").await.unwrap();
    let idle =
        "SELECT count(*) FROM pg_stat_activity WHERE datname IN ('template1', 'postgres') AND usename LIKE 'client%'";
    assert_eq!(world.admin_value(idle).await, 0);
}

/// Who has a server of its own makes and drops databases, which takes that no idle connection uses them.
#[tokio::test(flavor = "multi_thread")]
async fn class_14_idle_connections_make_way_for_who_drops_a_database() {
    let world = world().await;
    others(&world).await;
    world.admin_until("SELECT count(*) FROM pg_stat_activity WHERE usename = 'client_001'", 2).await;
    let mut client = world.raw("client_001").await;
    assert_eq!(client.error("DROP DATABASE no_such_database").await.code(), "3D000");
    world.admin_until("SELECT count(*) FROM pg_stat_activity WHERE usename = 'client_001'", 0).await;
    assert_eq!(client.value("SELECT 1").await, "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn class_15_a_changed_table_heals_as_it_does_on_a_server() {
    let world = world().await;
    let mut client = world.raw("client_001").await;
    let prepare = |name: &'static str| {
        move |b: &mut Batch| {
            b.parse(name, "SELECT * FROM things");
            b.bind("", name, &[]);
            b.execute("");
            b.sync();
        }
    };
    client.compose(prepare("a")).await;
    assert_eq!(show(&client.until_ready().await), "1 2 C(SELECT 0) Z(I)");
    client.query("ALTER TABLE things ADD COLUMN more int").await;
    client
        .compose(|b| {
            b.bind("", "a", &[]);
            b.execute("");
            b.sync();
        })
        .await;
    assert_eq!(show(&client.until_ready().await), "E(0A000) Z(I)");
    // What PgJDBC does then.
    client.compose(prepare("b")).await;
    assert_eq!(show(&client.until_ready().await), "1 2 C(SELECT 0) Z(I)");
}

/// Who prepares a text after a table was made anew does not get what others prepared before.
#[tokio::test(flavor = "multi_thread")]
async fn class_15_a_table_made_anew_is_another_table_to_who_prepares_then() {
    let world = world().await;
    for columns in ["a int", "a text, b int", "c date"] {
        let mut client = world.raw("client_001").await;
        client.query(&format!("DROP TABLE IF EXISTS anew; CREATE TABLE anew ({columns})")).await;
        client
            .compose(|b| {
                b.parse("s", "SELECT * FROM anew");
                b.bind("", "s", &[]);
                b.execute("");
                b.sync();
            })
            .await;
        assert_eq!(show(&client.until_ready().await), "1 2 C(SELECT 0) Z(I)", "{columns}");
        client.terminate().await;
    }
}

/// A connection that served somebody before is as good as new.
#[tokio::test(flavor = "multi_thread")]
async fn class_16_an_earlier_client_leaves_no_trace() {
    let world = world().await;
    let mut one = world.raw("client_001").await;
    one.query("CREATE TEMP TABLE t (x int); PREPARE p AS SELECT 1; DECLARE c CURSOR WITH HOLD FOR SELECT 1").await;
    one.query("SELECT setseed(0.1), set_config('app.secret', 'x', false)").await;
    one.terminate().await;
    world.metric_until("pgusher_clients{state=\"active\"}", 0.0).await;
    tokio::time::timeout(Duration::from_secs(10), async {
        let mut two = world.raw("client_001").await;
        for sql in ["SELECT * FROM t", "EXECUTE p", "FETCH c"] {
            two.error(sql).await;
        }
        assert_eq!(two.value("SELECT coalesce(current_setting('app.secret', true), '')").await, "");
        assert_eq!(two.value("SELECT count(*) FROM pg_prepared_statements WHERE from_sql").await, "0");
    })
    .await
    .unwrap();
}

/// Advisory locks under a `search_path` of the client's own: refused with a way out, and kept apart by tenant on that way.
#[tokio::test(flavor = "multi_thread")]
async fn advisory_locks_under_an_own_search_path() {
    let world = World::start(|config| config.pool.pool_mode = PoolMode::Auto).await;
    let (mut one, mut two) = (world.raw("client_001").await, world.raw("client_002").await);
    one.query("SET search_path = client_001").await;
    let said = one.query("SELECT pg_try_advisory_lock(7)").await;
    let error = said.iter().find(|m| m.tag == b'E').unwrap();
    assert_eq!(error.code(), "42501");
    assert!(error.field(b'H').contains("tenant_shim"), "{}", error.field(b'H'));
    assert_eq!(one.value("SELECT tenant_shim.pg_try_advisory_lock(7)").await, "t");
    one.query("SET search_path = client_001, tenant_shim, pg_catalog").await;
    assert_eq!(one.value("SELECT pg_try_advisory_lock(8)").await, "t");
    // Kept from others of the tenant, not from other tenants.
    let mut again = world.raw("client_001").await;
    for key in [7, 8] {
        assert_eq!(again.value(&format!("SELECT pg_try_advisory_lock({key})")).await, "f");
        assert_eq!(two.value(&format!("SELECT pg_try_advisory_lock({key})")).await, "t");
    }
}

/// What a `search_path` makes temporary is as temporary as what says so itself: its client keeps it, and nobody else has it.
#[tokio::test(flavor = "multi_thread")]
async fn objects_are_temporary_without_the_word() {
    let world = World::start(|config| {
        config.pool.pool_mode = PoolMode::Auto;
        config.pool.default_pool_size = 2;
    })
    .await;
    let make = "CREATE TABLE hidden AS SELECT 'mine' AS a";
    for texts in [
        &["CREATE TABLE \"pg_temp\".hidden AS SELECT 'mine' AS a"][..],
        &["CREATE VIEW \"pg_temp\".hidden AS SELECT 'mine' AS a"],
        &["CREATE TABLE U&\"pg!005ftemp\" UESCAPE '!'.hidden AS SELECT 'mine' AS a"],
        &["SET search_path = pg_temp", make],
        &["SET search_path = nowhere, \"pg_temp\", public", "SELECT 'mine' AS a INTO hidden"],
        &["SET search_path = pg_temp; CREATE TABLE hidden AS SELECT 'mine' AS a"],
        &[
            "SELECT set_config('search_path', 'pg_' || 'temp', false)",
            "EXPLAIN ANALYZE CREATE TABLE hidden AS SELECT 'mine' AS a",
        ],
        &["BEGIN; SET LOCAL search_path = pg_temp", make, "COMMIT"],
        &["BEGIN", "SET LOCAL\nsearch_path = pg_temp", "SELECT 'mine' AS a INTO hidden", "COMMIT"],
        &["BEGIN", "SELECT set_config('search_path', 'pg_temp', true)", make, "COMMIT"],
    ] {
        let mut client = world.raw("client_001").await;
        for text in texts {
            client.query(text).await;
        }
        client.query("RESET search_path").await;
        // Somebody else is served by another connection then.
        let mut other = world.raw("client_001").await;
        assert_eq!(other.error("SELECT a FROM pg_temp.hidden").await.code(), "42P01", "{texts:?}");
        other.query("BEGIN").await;
        assert_eq!(client.value("SELECT a FROM pg_temp.hidden").await, "mine", "{texts:?}");
        client.terminate().await;
        other.terminate().await;
    }
}

/// It is the path of the moment in which it runs that counts.
#[tokio::test(flavor = "multi_thread")]
async fn a_prepared_statement_may_make_what_is_temporary() {
    let world = world().await;
    let mut client = world.raw("client_001").await;
    client
        .compose(|b| {
            b.parse("s", "CREATE TABLE hidden AS SELECT 'mine' AS a");
            b.sync();
        })
        .await;
    client.until_ready().await;
    client.query("SET search_path = pg_temp").await;
    client
        .compose(|b| {
            b.bind("", "s", &[]);
            b.execute("");
            b.sync();
        })
        .await;
    assert_eq!(show(&client.until_ready().await), "2 C(SELECT 1) Z(I)");
    // Somebody else is served by another connection then.
    let mut other = world.raw("client_001").await;
    assert_eq!(other.error("SELECT a FROM pg_temp.hidden").await.code(), "42P01");
    other.query("BEGIN").await;
    assert_eq!(client.value("SELECT a FROM pg_temp.hidden").await, "mine");
}

/// Names of settings that begin like words of SET.
#[tokio::test(flavor = "multi_thread")]
async fn a_setting_of_ones_own_may_be_called_like_a_word_of_set() {
    let world = world().await;
    let mut client = world.raw("client_001").await;
    let prefixes = ["local", "session", "transaction", "constraints", "role", "names", "schema", "seed", "time", "xml"];
    for prefix in prefixes {
        client.query(&format!("SET {prefix}.id = 'me'; SET SESSION {prefix}.own = 'me'")).await;
    }
    // What else is in the text is no reason to forget them.
    client.query("CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'").await;
    client.query("SELECT set_config('beside.id', 'me', false), f()").await;
    client.query("EXPLAIN ANALYZE SELECT set_config('explained.id', 'me', false)").await;
    client
        .query("SELECT set_config('put_' || 'together.id', 'me', false), set_config('cast.id'::text, 'me', false)")
        .await;
    client.query("CREATE TABLE t (a text); INSERT INTO t SELECT \"set_config\"('quoted.id', 'me', false)").await;
    client.query("SELECT 1 AS into, set_config('into.id', 'me', false)").await;
    client.query("SELECT set_config/**/('apart.id', 'me', false)").await;
    client.query("SELECT set_config-- \n('line.id', 'me', false)").await;
    others(&world).await;
    let names = prefixes.iter().flat_map(|prefix| [format!("{prefix}.id"), format!("{prefix}.own")]);
    let kept = ["beside.id", "explained.id", "cast.id", "quoted.id", "into.id", "apart.id", "line.id"];
    let names: Vec<String> = names.chain(kept.map(str::to_owned)).collect();
    let mut other = world.raw("client_001").await;
    for name in &names {
        let sql = format!("SELECT coalesce(current_setting('{name}', true), '')");
        assert_eq!(other.value(&sql).await, "", "{name}");
        assert_eq!(client.value(&sql).await, "me", "{name}");
    }
    // A name that nobody can read is nobody else's either.
    assert_eq!(other.value("SELECT coalesce(current_setting('put_together.id', true), '')").await, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_writes_its_process_id_down_behind_a_set_keeps_its_process() {
    let world = world().await;
    let mut client = world.raw("client_001").await;
    client.query("CREATE TABLE workers (pid int)").await;
    client.query("SET work_mem = '1MB'; INSERT INTO workers VALUES (pg_backend_pid())").await;
    let mut occupant = world.raw("client_001").await;
    occupant.query("BEGIN").await;
    assert_eq!(client.value("SELECT count(*) FROM workers WHERE pid = pg_backend_pid()").await, "1");
}
