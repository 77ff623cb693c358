//! Prepared statements of the protocol, shared by clients over many server connections.

use pgusher::config::PoolMode;

use crate::raw::{Raw, show};
use crate::world::World;

/// Runs the unnamed portal of a statement and returns what was answered.
async fn run(raw: &mut Raw, statement: &str, values: &[&str]) -> String {
    raw.compose(|b| {
        b.bind("", statement, values);
        b.execute("");
        b.sync();
    })
    .await;
    show(&raw.until_ready().await)
}

async fn prepare(raw: &mut Raw, name: &str, sql: &str) -> String {
    raw.compose(|b| {
        b.parse(name, sql);
        b.describe(b'S', name);
        b.sync();
    })
    .await;
    show(&raw.until_ready().await)
}

/// A client in a transaction, so that others get another server connection.
async fn occupant(world: &World) -> Raw {
    let mut raw = world.raw("client_001").await;
    raw.query("BEGIN").await;
    raw
}

#[tokio::test(flavor = "multi_thread")]
async fn one_name_means_each_clients_own_statement_on_every_connection() {
    let world = World::transaction(|config| config.pool.default_pool_size = 3).await;
    let mut clients = Vec::new();
    for n in 0..6 {
        let mut client = world.raw("client_001").await;
        assert_eq!(prepare(&mut client, "s", &format!("SELECT {n} + $1::int")).await, "1 Z(I)");
        clients.push(client);
    }
    let work = clients.iter_mut().enumerate().map(async |(n, client)| {
        for round in 0..50 {
            let expected = format!("2 D({}) C(SELECT 1) Z(I)", n + round);
            assert_eq!(run(client, "s", &[&round.to_string()]).await, expected);
        }
    });
    futures_util::future::join_all(work).await;
    assert!(world.server_processes().await <= 3);
    // A name in use is refused, and means what it meant.
    assert_eq!(prepare(&mut clients[0], "s", "SELECT 'other'").await, "E(42P05) Z(I)");
    assert_eq!(run(&mut clients[0], "s", &["1"]).await, "2 D(1) C(SELECT 1) Z(I)");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_lives_from_one_sync_to_the_next_wherever_it_runs() {
    let world = World::transaction(|config| config.pool.default_pool_size = 2).await;
    let mut client = world.raw("client_001").await;
    for name in ["", "named"] {
        // Prepared on one connection, bound on another that never saw it.
        assert_eq!(prepare(&mut client, name, "SELECT $1::text || '!'").await, "1 Z(I)");
        let mut occupant = occupant(&world).await;
        assert_eq!(run(&mut client, name, &["a"]).await, "2 D(a!) C(SELECT 1) Z(I)", "{name:?}");
        client
            .compose(|b| {
                b.describe(b'S', name);
                b.sync();
            })
            .await;
        assert_eq!(show(&client.until_ready().await), "Z(I)");
        assert_eq!(run(&mut client, name, &["b"]).await, "2 D(b!) C(SELECT 1) Z(I)", "{name:?}");
        occupant.query("COMMIT").await;
        occupant.terminate().await;
    }
    // Each message with a Sync of its own, as pg8000 does it.
    let mut other = world.raw("client_001").await;
    client
        .compose(|b| {
            b.parse("", "SELECT 'mine'");
            b.sync();
        })
        .await;
    assert_eq!(show(&client.until_ready().await), "1 Z(I)");
    other.compose(|b| b.extended("SELECT 'not yours'", &[])).await;
    assert_eq!(show(&other.until_ready().await), "1 2 D(not yours) C(SELECT 1) Z(I)");
    assert_eq!(run(&mut client, "", &[]).await, "2 D(mine) C(SELECT 1) Z(I)");
    // A simple Query drops the unnamed statement, as on a server.
    client.query("SELECT 1").await;
    assert_eq!(run(&mut client, "", &[]).await, "E(26000) Z(I)");
}

#[tokio::test(flavor = "multi_thread")]
async fn closing_and_deallocating_mean_ones_own() {
    let world = World::transaction(|config| config.pool.default_pool_size = 1).await;
    let (mut one, mut two) = (world.raw("client_001").await, world.raw("client_001").await);
    for end in ["Close", "DEALLOCATE ALL", "DISCARD ALL"] {
        prepare(&mut one, "s", "SELECT 5").await;
        prepare(&mut two, "s", "SELECT 5").await;
        prepare(&mut two, "t", "SELECT 6").await;
        if end == "Close" {
            one.compose(|b| {
                b.close(b'S', "s");
                b.close(b'S', "never was");
                b.sync();
            })
            .await;
            assert_eq!(show(&one.until_ready().await), "3 3 Z(I)");
        } else {
            assert_eq!(show(&one.query(end).await), format!("C({end}) Z(I)"));
        }
        assert_eq!(run(&mut one, "s", &[]).await, "E(26000) Z(I)", "{end}");
        assert_eq!(run(&mut two, "s", &[]).await, "2 D(5) C(SELECT 1) Z(I)", "{end}");
        assert_eq!(run(&mut two, "t", &[]).await, "2 D(6) C(SELECT 1) Z(I)", "{end}");
        two.compose(|b| {
            b.close(b'S', "s");
            b.close(b'S', "t");
            b.sync();
        })
        .await;
        assert_eq!(show(&two.until_ready().await), "3 3 Z(I)");
    }
    // The name is free again, also within one group.
    one.compose(|b| {
        b.parse("s", "SELECT 1");
        b.close(b'S', "s");
        b.parse("s", "SELECT 2");
        b.bind("", "s", &[]);
        b.execute("");
        b.sync();
    })
    .await;
    assert_eq!(show(&one.until_ready().await), "1 3 1 2 D(2) C(SELECT 1) Z(I)");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_in_a_pipeline_skips_to_the_sync_and_takes_back_what_was_not_prepared() {
    let world = World::transaction(|config| config.pool.default_pool_size = 2).await;
    let mut client = world.raw("client_001").await;
    client
        .compose(|b| {
            b.parse("before", "SELECT 'before'");
            b.extended("SELECT 1/0", &[]);
            b.parse("after", "SELECT 'after'");
            b.bind("", "before", &[]);
            b.execute("");
            b.sync();
            b.parse("bad", "SELEC");
            b.parse("behind", "SELECT 1");
            b.close(b'S', "before");
            b.sync();
        })
        .await;
    assert_eq!(show(&client.until_ready().await), "1 1 E(22012) Z(I)");
    assert_eq!(show(&client.until_ready().await), "1 2 D(before) C(SELECT 1) Z(I)");
    assert_eq!(show(&client.until_ready().await), "E(42601) Z(I)");
    for (name, answer) in [
        ("before", "2 D(before) C(SELECT 1) Z(I)"),
        ("after", "2 D(after) C(SELECT 1) Z(I)"),
        ("bad", "E(26000) Z(I)"),
        ("behind", "E(26000) Z(I)"),
    ] {
        assert_eq!(run(&mut client, name, &[]).await, answer, "{name}");
        let mut occupant = occupant(&world).await;
        assert_eq!(run(&mut client, name, &[]).await, answer, "{name} elsewhere");
        occupant.query("COMMIT").await;
        occupant.terminate().await;
    }
    // In a transaction that has failed nothing can be prepared but what ends it.
    client.query("BEGIN").await;
    client.error("SELECT 1/0").await;
    assert_eq!(prepare(&mut client, "late", "SELECT 1").await, "E(25P02) Z(E)");
    assert_eq!(run(&mut client, "before", &[]).await, "E(25P02) Z(E)");
    assert_eq!(show(&client.query("ROLLBACK").await), "C(ROLLBACK) Z(I)");
    assert_eq!(prepare(&mut client, "late", "SELECT 9").await, "1 Z(I)");
    assert_eq!(run(&mut client, "late", &[]).await, "2 D(9) C(SELECT 1) Z(I)");
    // What does not exist is refused where it stands, and the transaction fails as on a server.
    client.query("BEGIN").await;
    assert_eq!(run(&mut client, "no such", &[]).await, "E(26000) Z(E)");
    client.query("ROLLBACK").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn more_statements_than_a_server_connection_may_keep() {
    let world = World::transaction(|config| {
        config.pool.max_prepared_statements = 5;
        config.pool.default_pool_size = 1;
    })
    .await;
    let mut client = world.raw("client_001").await;
    for n in 0..30 {
        assert_eq!(prepare(&mut client, &format!("s{n}"), &format!("SELECT {n}")).await, "1 Z(I)");
    }
    for n in (0..30).rev().chain(0..30) {
        assert_eq!(run(&mut client, &format!("s{n}"), &[]).await, format!("2 D({n}) C(SELECT 1) Z(I)"));
    }
    let kept = client.value("SELECT count(*) FROM pg_prepared_statements").await;
    assert!(kept.parse::<u32>().unwrap() <= 5, "{kept}");
    // More than fit within one group.
    client
        .compose(|b| {
            for n in 0..30 {
                b.bind("", &format!("s{n}"), &[]);
                b.execute("");
            }
            b.sync();
        })
        .await;
    let answer = show(&client.until_ready().await);
    let expected: Vec<_> = (0..30).map(|n| format!("2 D({n}) C(SELECT 1)")).collect();
    assert_eq!(answer, format!("{} Z(I)", expected.join(" ")));
}

/// A table changes under a prepared statement: what heals it for a driver on a server heals it here.
#[tokio::test(flavor = "multi_thread")]
async fn a_changed_table_is_healed_by_preparing_again() {
    let world = World::transaction(|config| config.pool.default_pool_size = 1).await;
    let mut client = world.raw("client_001").await;
    prepare(&mut client, "s", "SELECT * FROM things").await;
    run(&mut client, "s", &[]).await;
    client.query("ALTER TABLE things ADD COLUMN more int").await;
    assert_eq!(run(&mut client, "s", &[]).await, "E(0A000) Z(I)");
    client
        .compose(|b| {
            b.close(b'S', "s");
            b.sync();
        })
        .await;
    client.until_ready().await;
    prepare(&mut client, "s2", "SELECT * FROM things").await;
    assert_eq!(run(&mut client, "s2", &[]).await, "2 C(SELECT 0) Z(I)");
}

/// A server connection on which a statement is prepared only after its table has changed does not know what the client was told.
#[tokio::test(flavor = "multi_thread")]
async fn a_changed_table_is_noticed_where_the_statement_is_prepared_anew() {
    let world = World::start(|config| config.pool.default_pool_size = 2).await;
    let portal = async |client: &mut Raw, name: &str| {
        client
            .compose(|b| {
                b.bind("", name, &[]);
                b.describe(b'P', "");
                b.execute("");
                b.sync();
            })
            .await;
        show(&client.until_ready().await)
    };
    for (round, by_portal) in [false, true].into_iter().enumerate() {
        let mut client = world.raw("client_001").await;
        client
            .query("DROP TABLE IF EXISTS wide; CREATE TABLE wide (a int, b int); INSERT INTO wide VALUES (1, 2)")
            .await;
        let (old, same) = (format!("old{round}"), format!("same{round}"));
        if by_portal {
            // As PgJDBC does, which remembers what the first portal said.
            client.compose(|b| b.parse(&old, "SELECT * FROM wide")).await;
            assert_eq!(portal(&mut client, &old).await, "1 2 D(1,2) C(SELECT 1) Z(I)");
        } else {
            assert_eq!(prepare(&mut client, &old, "SELECT * FROM wide").await, "1 Z(I)");
        }
        assert_eq!(prepare(&mut client, &same, "SELECT a FROM wide WHERE b = $1::int").await, "1 Z(I)");
        let mut occupant = occupant(&world).await;
        client.query("ALTER TABLE wide ADD COLUMN c int DEFAULT 3").await;
        // What still returns the same is not disturbed; behind it, in one group, comes what does not.
        assert_eq!(run(&mut client, &same, &["2"]).await, "2 D(1) C(SELECT 1) Z(I)");
        client
            .compose(|b| {
                for (name, values) in [(&same, &["2"][..]), (&old, &[])] {
                    b.bind("", name, values);
                    b.execute("");
                }
                b.sync();
            })
            .await;
        let answer = client.until_ready().await;
        assert_eq!(show(&answer), "2 D(1) C(SELECT 1) E(0A000) Z(I)");
        let error = answer.iter().find(|m| m.tag == b'E').unwrap();
        assert_eq!(error.field(b'M'), "cached plan must not change result type");
        assert_eq!(error.field(b'R'), "RevalidateCachedQuery");
        client.query("BEGIN").await;
        assert_eq!(run(&mut client, &old, &[]).await, "E(0A000) Z(E)");
        client.query("ROLLBACK").await;
        // What drivers do then.
        client
            .compose(|b| {
                b.close(b'S', &old);
                b.sync();
            })
            .await;
        client.until_ready().await;
        assert_eq!(prepare(&mut client, &old, "SELECT * FROM wide").await, "1 Z(I)");
        for _ in 0..2 {
            assert_eq!(run(&mut client, &old, &[]).await, "2 D(1,2,3) C(SELECT 1) Z(I)");
            occupant.query("COMMIT").await;
        }
        occupant.terminate().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_text_is_another_statement_where_literals_are_read_otherwise() {
    let world = World::start(|config| config.pool.default_pool_size = 2).await;
    let (mut tokyo, mut utc) = (world.raw("client_001").await, world.raw("client_001").await);
    tokyo.query("SET TimeZone = 'Asia/Tokyo'").await;
    utc.query("SET TimeZone = 'UTC'").await;
    let sql = "SELECT '2026-01-02 03:04'::timestamptz AT TIME ZONE 'UTC'";
    let (eastern, own) = ("2 D(2026-01-01 18:04:00) C(SELECT 1) Z(I)", "2 D(2026-01-02 03:04:00) C(SELECT 1) Z(I)");
    for (client, expected) in [(&mut tokyo, eastern), (&mut utc, own)] {
        assert_eq!(prepare(client, "s", sql).await, "1 Z(I)");
        assert_eq!(run(client, "s", &[]).await, expected);
    }
    // It was read when it was prepared, and is what it was, elsewhere too.
    tokyo.query("SET TimeZone = 'UTC'").await;
    for _ in 0..2 {
        assert_eq!(run(&mut tokyo, "s", &[]).await, eastern);
        let mut occupant = occupant(&world).await;
        assert_eq!(run(&mut tokyo, "s", &[]).await, eastern);
        let expected = "D(2026-01-01 18:04:00) C(SELECT 1) D(UTC) C(SHOW) Z(I)";
        assert_eq!(show(&tokyo.query("EXECUTE s; SHOW TimeZone").await), expected);
        occupant.query("COMMIT").await;
        occupant.terminate().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_prepared_here_is_missing_nowhere() {
    let world = World::start(|config| config.pool.default_pool_size = 2).await;
    let mut client = world.raw("client_001").await;
    assert_eq!(prepare(&mut client, "s", "SELECT v FROM things WHERE k = $1").await, "1 Z(I)");
    assert_eq!(prepare(&mut client, "d", "DELETE FROM things").await, "1 n Z(I)");
    client.query("SET search_path = ''").await;
    // On the connection where it was prepared, and where it was not.
    for _ in 0..2 {
        let mut occupant = occupant(&world).await;
        assert_eq!(run(&mut client, "s", &[]).await, "E(08P01) Z(I)");
        assert_eq!(run(&mut client, "s", &["1"]).await, "E(42P01) Z(I)");
        assert_eq!(show(&client.query("EXECUTE s (1)").await), "E(42P01) Z(I)");
        assert_eq!(show(&client.query("EXECUTE s").await), "E(42601) Z(I)");
        client
            .compose(|b| {
                b.describe(b'S', "d");
                b.sync();
            })
            .await;
        assert_eq!(client.until_ready().await.iter().map(|m| char::from(m.tag)).collect::<String>(), "tnZ");
        // In a transaction its search_path is the client's own before and after.
        let text = "BEGIN; SET LOCAL search_path = pg_catalog";
        assert_eq!(show(&client.query(text).await), "C(BEGIN) C(SET) Z(T)");
        client
            .compose(|b| {
                b.describe(b'S', "s");
                b.sync();
            })
            .await;
        // PostgreSQL 18 reports that the path is the old one again.
        let said = client.until_ready().await;
        assert_eq!(said.iter().map(|m| char::from(m.tag)).filter(|tag| *tag != 'S').collect::<String>(), "tEZ");
        client.query("ROLLBACK").await;
        assert_eq!(client.value("SHOW search_path").await, "\"\"");
        occupant.query("COMMIT").await;
        occupant.terminate().await;
    }
    assert_eq!(show(&client.query("DEALLOCATE s; DEALLOCATE d").await), "C(DEALLOCATE) C(DEALLOCATE) Z(I)");
    assert_eq!(run(&mut client, "s", &["1"]).await, "E(26000) Z(I)");
}

#[tokio::test(flavor = "multi_thread")]
async fn names_are_free_behind_a_discard_in_the_same_pipeline() {
    let world = World::start(|config| config.pool.default_pool_size = 2).await;
    let mut client = world.raw("client_001").await;
    for end in ["DISCARD ALL", "DEALLOCATE ALL", "DEALLOCATE s"] {
        prepare(&mut client, "s", "SELECT 1").await;
        let mut occupant = occupant(&world).await;
        client
            .compose(|b| {
                b.parse("", end);
                b.bind("", "", &[]);
                b.execute("");
                b.parse("s", "SELECT 2");
                b.bind("", "s", &[]);
                b.execute("");
                b.close(b'S', "s");
                b.sync();
            })
            .await;
        let tag = if end.ends_with('s') { "DEALLOCATE" } else { end };
        let expected = format!("1 2 C({tag}) 1 2 D(2) C(SELECT 1) 3 Z(I)");
        assert_eq!(show(&client.until_ready().await), expected);
        // In one message, too.
        prepare(&mut client, "s", "SELECT 1").await;
        if !end.starts_with("DISCARD") {
            let text = format!("{end}; PREPARE s AS SELECT 3; EXECUTE s; DEALLOCATE s");
            let expected = format!("C({tag}) C(PREPARE) D(3) C(SELECT 1) C(DEALLOCATE) Z(I)");
            assert_eq!(show(&client.query(&text).await), expected);
        }
        client.query("DEALLOCATE ALL").await;
        occupant.query("COMMIT").await;
        occupant.terminate().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn session_mode_passes_names_on() {
    let world = World::start(|config| {
        config.pool.pool_mode = PoolMode::Session;
        config.pool.default_pool_size = 1;
    })
    .await;
    let mut client = world.raw("client_001").await;
    prepare(&mut client, "s", "SELECT $1::int * 2").await;
    assert_eq!(run(&mut client, "s", &["4"]).await, "2 D(8) C(SELECT 1) Z(I)");
    assert_eq!(client.value("SELECT name FROM pg_prepared_statements").await, "s");
    assert_eq!(show(&client.query("EXECUTE s(5)").await), "D(10) C(SELECT 1) Z(I)");
    client.terminate().await;
    let mut next = world.raw("client_001").await;
    assert_eq!(run(&mut next, "s", &["4"]).await, "E(26000) Z(I)");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_driver_with_many_statements_beside_others() {
    let world = World::transaction(|config| {
        config.pool.default_pool_size = 2;
        config.pool.max_prepared_statements = 7;
    })
    .await;
    let work = (0..5).map(async |who: i32| {
        let client = world.client("client_001").await;
        let mut statements = Vec::new();
        for n in 0..10 {
            statements.push(client.prepare(&format!("SELECT {n} * 100 + $1::int")).await.unwrap());
        }
        for _ in 0..10 {
            let answers = statements.iter().map(async |s| client.query_one(s, &[&who]).await);
            for (n, row) in futures_util::future::join_all(answers).await.into_iter().enumerate() {
                assert_eq!(row.unwrap().get::<_, i32>(0), i32::try_from(n).unwrap() * 100 + who);
            }
        }
    });
    futures_util::future::join_all(work).await;
}

/// An answer that pgusher gives itself waits until the server's message before it has come whole.
#[tokio::test(flavor = "multi_thread")]
async fn answers_of_ours_do_not_break_into_a_long_message() {
    let world = World::transaction(|_| {}).await;
    let mut raw = world.raw("client_001").await;
    // Its description has about 100 kB, so it comes in pieces.
    let columns: Vec<String> = (0..1_600).map(|n| format!("1 AS a_rather_long_name_for_a_column_{n:015}")).collect();
    prepare(&mut raw, "wide", &format!("SELECT {}", columns.join(", "))).await;
    prepare(&mut raw, "one", "SELECT 1").await;
    for round in 0..20 {
        raw.compose(|b| {
            b.describe(b'S', "wide");
            // The server has this one: it is answered without it.
            b.parse(&format!("again_{round}"), "SELECT 1");
            b.close(b'S', &format!("again_{round}"));
            b.sync();
        })
        .await;
        let said = raw.until_ready().await;
        let tags: String = said.iter().map(|m| char::from(m.tag)).collect();
        assert_eq!(tags, "tT13Z");
        assert!(said[1].body.len() > 50_000 && said[1].body.ends_with(&[0, 0]));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_prepares_without_end_is_refused_and_goes_on() {
    for mode in [PoolMode::Auto, PoolMode::Transaction] {
        let world = World::start(|config| {
            config.pool.pool_mode = mode;
            config.pool.max_client_prepared_memory = 64 << 10;
        })
        .await;
        let mut client = world.raw("client_001").await;
        let mut kept = 0;
        let refused = loop {
            let said = prepare(&mut client, &format!("s{kept}"), "SELECT 1").await;
            if said != "1 Z(I)" {
                break said;
            }
            kept += 1;
            assert!(kept < 1_000, "it is never refused");
        };
        assert_eq!(refused, "E(53400) Z(I)");
        // What it has works, in a transaction it is an error like others, and room can be made.
        assert_eq!(run(&mut client, "s0", &[]).await, "2 D(1) C(SELECT 1) Z(I)");
        client.query("BEGIN").await;
        assert_eq!(prepare(&mut client, "more", "SELECT 2").await, "E(53400) Z(E)");
        client.query("ROLLBACK").await;
        assert_eq!(prepare(&mut client, "", "SELECT 3").await, "1 Z(I)");
        assert_eq!(show(&client.query("DEALLOCATE ALL").await), "C(DEALLOCATE ALL) Z(I)");
        assert_eq!(prepare(&mut client, "more", "SELECT 2").await, "1 Z(I)");
        assert_eq!(run(&mut client, "more", &[]).await, "2 D(2) C(SELECT 1) Z(I)");
    }
}

/// What the session settles between two groups of messages would take it away.
#[tokio::test(flavor = "multi_thread")]
async fn an_unnamed_statement_that_is_longer_than_a_buffer_lasts_from_one_sync_to_the_next() {
    for mode in [PoolMode::Auto, PoolMode::Transaction] {
        let world = World::start(|config| config.pool.pool_mode = mode).await;
        let mut raw = world.raw("client_001").await;
        for size in [1_000, 20_000, 70_000, 900_000] {
            let sql = format!("SELECT $1::int + 1 /* {} */", "x".repeat(size));
            raw.compose(|b| {
                b.parse("", &sql);
                b.describe(b'S', "");
                b.sync();
            })
            .await;
            assert_eq!(show(&raw.until_ready().await).replace("t ", "").replace("T ", ""), "1 Z(I)", "{size}");
            assert_eq!(run(&mut raw, "", &["4"]).await, "2 D(5) C(SELECT 1) Z(I)", "{size}");
        }
    }
}

/// Statements of the protocol that a function takes away are gone for everybody who used them there.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_function_deallocates_is_prepared_again() {
    let world = World::start(|config| config.pool.default_pool_size = 1).await;
    let (mut one, mut other) = (world.raw("client_001").await, world.raw("client_001").await);
    prepare(&mut one, "a", "SELECT 1").await;
    prepare(&mut other, "b", "SELECT 1").await;
    other.query("DO $$BEGIN EXECUTE 'DEALLOCATE ALL'; END$$").await;
    assert_eq!(run(&mut one, "a", &[]).await, "2 D(1) C(SELECT 1) Z(I)");
    // Direct, it would be gone for who has done it; to know that is not worth asking after every function.
    assert_eq!(run(&mut other, "b", &[]).await, "2 D(1) C(SELECT 1) Z(I)");
}

/// `SET LOCAL` in every spelling: what is read under it is not what others get who say the same.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_prepared_under_a_local_setting_is_not_shared() {
    let world = World::start(|config| {
        config.pool.pool_mode = PoolMode::Auto;
        config.pool.default_pool_size = 1;
    })
    .await;
    let (mut tokyo, mut plain) = (world.raw("client_001").await, world.raw("client_001").await);
    for client in [&mut tokyo, &mut plain] {
        client.query("SET TimeZone = 'UTC'").await;
    }
    for (number, set) in [
        "SET LOCAL TimeZone = 'Asia/Tokyo'",
        "SET LOCAL\nTimeZone = 'Asia/Tokyo'",
        "SET LOCAL\tTIME\nZONE 'Asia/Tokyo'",
        "SET/**/LOCAL TimeZone = 'Asia/Tokyo'",
        "SET --\nLOCAL--\nTimeZone = 'Asia/Tokyo'",
        "SET work_mem = '1MB'; SET LOCAL TimeZone = 'Asia/Tokyo'",
        "SET LOCAL U&\"Time!005Aone\" UESCAPE '!' = 'Asia/Tokyo'",
        "SET LOCAL DateStyle = 'ISO'; SET LOCAL TimeZone = 'Asia/Tokyo'",
        "SELECT set_config('TimeZone', 'Asia/Tokyo', true)",
        "DO $$ BEGIN SET LOCAL TimeZone = 'Asia/Tokyo'; END $$",
    ]
    .into_iter()
    .enumerate()
    {
        let sql = format!("SELECT '2026-01-02 03:04'::timestamptz AT TIME ZONE 'UTC' AS a{number}");
        let name = format!("s{number}");
        tokyo.query("BEGIN").await;
        tokyo.query(set).await;
        assert_eq!(prepare(&mut tokyo, &name, &sql).await, "1 Z(T)", "{set}");
        assert_eq!(run(&mut tokyo, &name, &[]).await, "2 D(2026-01-01 18:04:00) C(SELECT 1) Z(T)", "{set}");
        tokyo.query("COMMIT").await;
        assert_eq!(prepare(&mut plain, &name, &sql).await, "1 Z(I)", "{set}");
        assert_eq!(run(&mut plain, &name, &[]).await, "2 D(2026-01-02 03:04:00) C(SELECT 1) Z(I)", "{set}");
    }
}

/// Behind a SET as well.
#[tokio::test(flavor = "multi_thread")]
async fn who_lists_prepared_statements_lists_its_own() {
    let world = World::start(|config| {
        config.pool.pool_mode = PoolMode::Auto;
        config.pool.default_pool_size = 1;
    })
    .await;
    let (mut one, mut two) = (world.raw("client_001").await, world.raw("client_001").await);
    for list in [
        "SELECT statement FROM pg_prepared_statements WHERE NOT from_sql",
        "SET work_mem = '1MB'; SELECT statement FROM pg_prepared_statements WHERE NOT from_sql",
        "SELECT statement FROM \"pg_prepared_statements\" WHERE NOT from_sql",
        "SELECT statement FROM pg_prepared_statement() WHERE NOT from_sql",
        "SELECT statement FROM U&\"pg!005fprepared_statements\" UESCAPE '!' WHERE NOT from_sql",
    ] {
        assert_eq!(prepare(&mut one, "s", "SELECT 'secret'").await, "1 Z(I)");
        assert_eq!(run(&mut one, "s", &[]).await, "2 D(secret) C(SELECT 1) Z(I)");
        let said = show(&two.query(list).await);
        assert!(!said.contains("secret") && said.contains("C(SELECT 0)"), "{list}: {said}");
        one.query("DEALLOCATE s").await;
    }
}

/// SQL that runs a statement which the protocol has prepared may say so in the middle.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_protocol_prepared_is_explained_and_fills_tables() {
    let world = World::transaction(|config| {
        config.pool.pool_mode = PoolMode::Auto;
        config.pool.default_pool_size = 2;
    })
    .await;
    let mut client = world.raw("client_001").await;
    prepare(&mut client, "S", "SELECT $1::int AS v").await;
    for pause in [false, true] {
        // On a server connection that has it, and on one that does not.
        let _other = if pause { Some(occupant(&world).await) } else { None };
        let explained = "D(Result) C(EXPLAIN) Z(I)";
        assert_eq!(show(&client.query("EXPLAIN (COSTS off) EXECUTE \"S\"(1)").await), explained);
        let made = "C(SELECT 1) D(7) C(SELECT 1) C(DROP TABLE) Z(I)";
        let sql = "CREATE TABLE made (v) AS EXECUTE \"S\"(7); SELECT v FROM made; DROP TABLE made";
        assert_eq!(show(&client.query(sql).await), made);
        assert_eq!(prepare(&mut client, "", "EXPLAIN (COSTS off) EXECUTE \"S\"(1)").await, "1 Z(I)");
        assert_eq!(run(&mut client, "", &[]).await, format!("2 {explained}"));
    }
    assert_eq!(show(&client.query("EXPLAIN EXECUTE nothing").await), "E(26000) Z(I)");
}
