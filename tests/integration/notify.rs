//! LISTEN and NOTIFY: what arrives, what does not, and what it costs.

use std::time::Duration;

use pgusher::config::{Config, PoolMode};
use pgusher::control::provision::Choice;
use pgusher::tenant::{Plan, TenantId};

use crate::raw::{Message, Raw, show};
use crate::world::World;

const OWN: &str = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'client_001'";

/// A proxy in this mode with two tenants of this plan on one shard.
async fn world(mode: PoolMode, plan: Plan, change: impl FnOnce(&mut Config)) -> World {
    let world = World::start(|config| {
        config.pool.pool_mode = mode;
        if plan != Plan::Schema {
            config.provision.template_dir = None;
        }
        change(config);
    })
    .await;
    for tenant in ["client_001", "client_002"] {
        let choice = Choice { shard: None, plan: Some(plan) };
        world.server.control().create(&TenantId::parse(tenant).unwrap(), "test", choice).await.unwrap();
    }
    world
}

async fn auto(change: impl FnOnce(&mut Config)) -> World {
    world(PoolMode::Auto, Plan::Schema, change).await
}

/// Notifications among messages: process id, channel and payload.
fn notes(messages: &[Message]) -> Vec<(i32, String)> {
    messages.iter().filter(|m| m.tag == b'A').map(note).collect()
}

fn note(message: &Message) -> (i32, String) {
    assert_eq!(message.tag, b'A', "{}", show(std::slice::from_ref(message)));
    let text = String::from_utf8_lossy(&message.body[4..]).into_owned();
    let pid = i32::from_be_bytes(message.body[..4].try_into().unwrap());
    (pid, text.trim_end_matches('\0').replace('\0', " "))
}

/// The next message, which has to be a notification.
async fn next(raw: &mut Raw) -> (i32, String) {
    note(&raw.next().await.expect("closed"))
}

async fn ok(raw: &mut Raw, sql: &str) -> Vec<Message> {
    let said = raw.query(sql).await;
    assert!(!said.iter().any(|m| m.tag == b'E'), "{sql}: {}", show(&said));
    said
}

#[tokio::test(flavor = "multi_thread")]
async fn another_tenants_notifications_never_arrive() {
    for plan in [Plan::Schema, Plan::Rls, Plan::Database] {
        for mode in [PoolMode::Session, PoolMode::Auto] {
            let world = world(mode, plan, |_| {}).await;
            let (mut listener, mut friend) = (world.raw("client_001").await, world.raw("client_001").await);
            let mut foe = world.raw("client_002").await;
            ok(&mut listener, "LISTEN jobs").await;
            ok(&mut foe, "LISTEN jobs").await;
            for _ in 0..3 {
                ok(&mut foe, "NOTIFY jobs, 'secret of client_002'").await;
                ok(&mut foe, "SELECT pg_notify('jobs', 'secret of client_002')").await;
                ok(&mut friend, "NOTIFY jobs, 'own'").await;
                // In the order in which they were sent.
                assert_eq!(next(&mut listener).await, (friend.pid, "jobs own".to_owned()), "{plan:?} {mode:?}");
            }
            // While a transaction is open, and one that began before they were sent.
            ok(&mut listener, "BEGIN").await;
            ok(&mut foe, "NOTIFY jobs, 'secret'").await;
            ok(&mut friend, "NOTIFY jobs, 'late'").await;
            assert_eq!(notes(&ok(&mut listener, "SELECT 1").await), []);
            assert_eq!(notes(&ok(&mut listener, "COMMIT").await), [(friend.pid, "jobs late".to_owned())]);
            // The other one heard its own only.
            let said = notes(&ok(&mut foe, "SELECT 1").await);
            assert!(said.iter().all(|(pid, text)| *pid == foe.pid && !text.contains("own")), "{said:?}");
            let dropped = world.metric("pgusher_notifications_total{result=\"foreign\"}").await;
            assert_eq!(dropped > 0.0, plan != Plan::Database, "{plan:?} {mode:?}: {dropped}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn in_transaction_mode_nobody_listens_and_nothing_leaks() {
    let world = world(PoolMode::Transaction, Plan::Schema, |_| {}).await;
    let (mut own, mut foe) = (world.raw("client_001").await, world.raw("client_002").await);
    assert_eq!(own.error("LISTEN jobs").await.code(), "0A000");
    // Hidden where nobody looks: it ends with the transaction, and during it nothing of others comes through.
    own.query("BEGIN").await;
    ok(&mut own, "DO $$ BEGIN EXECUTE 'LISTEN jobs'; END $$").await;
    ok(&mut own, "COMMIT; BEGIN").await;
    ok(&mut foe, "NOTIFY jobs, 'secret'").await;
    assert_eq!(notes(&ok(&mut own, "COMMIT").await), []);
    assert_eq!(own.value("SELECT count(*) FROM pg_listening_channels()").await, "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn own_notifications_come_before_the_answers_end_with_the_own_pid() {
    for mode in [PoolMode::Session, PoolMode::Auto] {
        let world = world(mode, Plan::Schema, |_| {}).await;
        let mut client = world.raw("client_001").await;
        ok(
            &mut client,
            "CREATE FUNCTION tell() RETURNS trigger LANGUAGE plpgsql AS \
               $$ BEGIN PERFORM pg_notify('jobs', NEW.note); RETURN NEW; END $$; \
             CREATE TRIGGER tell AFTER INSERT ON bookings FOR EACH ROW EXECUTE FUNCTION tell()",
        )
        .await;
        ok(&mut client, "LISTEN jobs").await;
        let me = client.pid;
        for (sql, text) in [
            ("NOTIFY jobs, 'one'", "one"),
            ("SELECT pg_notify('jobs', 'two')", "two"),
            ("INSERT INTO bookings (note) VALUES ('three')", "three"),
            ("BEGIN; NOTIFY jobs, 'four'; COMMIT", "four"),
            ("DO $$ BEGIN NOTIFY jobs, 'five'; END $$", "five"),
        ] {
            let said = ok(&mut client, sql).await;
            assert_eq!(notes(&said), [(me, format!("jobs {text}"))], "{mode:?} {sql}");
        }
        // At the end of the transaction, not before; and not at all when it is rolled back.
        ok(&mut client, "BEGIN").await;
        assert_eq!(notes(&ok(&mut client, "NOTIFY jobs, 'six'").await), []);
        assert_eq!(show(&client.query("COMMIT").await), "C(COMMIT) A Z(I)");
        assert_eq!(notes(&ok(&mut client, "BEGIN; NOTIFY jobs, 'never'; ROLLBACK").await), []);
        // Pipelined, and by the extended protocol.
        client
            .compose(|b| {
                b.extended("NOTIFY jobs, 'seven'", &[]);
                b.extended("SELECT pg_notify('jobs', $1)", &["eight"]);
                b.query("SELECT 1");
            })
            .await;
        for text in ["jobs seven", "jobs eight"] {
            assert_eq!(notes(&client.until_ready().await), [(me, text.to_owned())], "{mode:?}");
        }
        assert_eq!(show(&client.until_ready().await), "D(1) C(SELECT 1) Z(I)");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_listening_clients_use_one_server_connection() {
    let world = auto(|_| {}).await;
    let mut clients = Vec::new();
    for n in 0..100 {
        let mut client = world.raw("client_001").await;
        ok(&mut client, &format!("LISTEN jobs; LISTEN \"Odd {n}\"")).await;
        clients.push(client);
    }
    world.metric_until("pgusher_pinned_clients{reason=\"listen\"}", 0.0).await;
    assert_eq!(world.metric("pgusher_listeners").await, 1.0);
    // One listens, one was lent; all else would be in use.
    let open = world.admin_value(OWN).await;
    assert!(open <= 2, "{open} server connections");
    let mut sender = world.raw("client_001").await;
    ok(&mut sender, "NOTIFY jobs, 'all'; NOTIFY \"Odd 42\", 'one'").await;
    for (n, client) in clients.iter_mut().enumerate() {
        assert_eq!(next(client).await, (sender.pid, "jobs all".to_owned()));
        if n == 42 {
            assert_eq!(next(client).await, (sender.pid, "Odd 42 one".to_owned()));
        }
    }
    assert!(world.admin_value(OWN).await <= 2);
    // When they have gone nobody listens.
    for client in clients {
        client.terminate().await;
    }
    world.metric_until("pgusher_listeners", 0.0).await;
    let listening = "SELECT count(*) FROM pg_listening_channels()";
    assert_eq!(sender.value(listening).await, "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_client_listens_to_is_what_it_said_and_committed() {
    for mode in [PoolMode::Session, PoolMode::Auto] {
        let world = world(mode, Plan::Schema, |_| {}).await;
        let (mut client, mut sender) = (world.raw("client_001").await, world.raw("client_001").await);
        let channels = "SELECT coalesce(string_agg(c, ',' ORDER BY c), '') FROM pg_listening_channels() c";
        for (sql, expected) in [
            ("BEGIN; LISTEN a; ROLLBACK", ""),
            ("LISTEN a", "a"),
            ("BEGIN; LISTEN b; SAVEPOINT s; LISTEN c; ROLLBACK TO s; COMMIT", "a,b"),
            ("BEGIN; UNLISTEN a; ROLLBACK", "a,b"),
            ("BEGIN; UNLISTEN a; COMMIT", "b"),
            ("UNLISTEN nothing", "b"),
            ("LISTEN c; LISTEN d; UNLISTEN b", "c,d"),
            ("UNLISTEN *; LISTEN e", "e"),
            ("CREATE TEMP TABLE t (a int)", "e"),
            ("LISTEN f", "e,f"),
            ("UNLISTEN e", "f"),
            ("DROP TABLE t; SET work_mem = '1MB'", "f"),
            ("DO $$ BEGIN EXECUTE 'UNLISTEN *'; EXECUTE 'LISTEN g'; END $$", "g"),
            ("DISCARD ALL", ""),
            ("LISTEN h", "h"),
        ] {
            // One message after the other, as applications do.
            for sql in sql.split_inclusive(';').filter(|_| !sql.starts_with("DO")) {
                ok(&mut client, sql).await;
            }
            if sql.starts_with("DO") {
                ok(&mut client, sql).await;
            }
            for channel in ["a", "b", "c", "d", "e", "f", "g", "h"] {
                ok(&mut sender, &format!("NOTIFY {channel}")).await;
            }
            let got: Vec<String> = {
                let mut got = Vec::new();
                ok(&mut sender, "NOTIFY h, 'end'").await;
                let said = ok(&mut client, "SELECT 1").await;
                got.extend(notes(&said));
                // Idle clients get the rest; the one that listens to nothing else gets nothing.
                got.into_iter().map(|(_, text)| text).collect()
            };
            let expected: Vec<&str> = expected.split(',').filter(|c| !c.is_empty()).collect();
            let mut got: Vec<String> = got.into_iter().collect();
            let mut wanted: Vec<String> = expected.iter().map(|c| (*c).to_owned()).collect();
            if expected.contains(&"h") {
                wanted.push("h end".to_owned());
            }
            while got.len() < wanted.len() {
                got.push(next(&mut client).await.1);
            }
            assert_eq!(got, wanted, "{mode:?} {sql}");
            assert_eq!(client.value(channels).await, expected.join(","), "{mode:?} {sql}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_sent_after_the_answer_is_lost_and_nothing_comes_twice() {
    let world = auto(|config| config.pool.default_pool_size = 4).await;
    let mut sender = world.raw("client_001").await;
    for round in 0..50 {
        let mut client = world.raw("client_001").await;
        // Others send all the time.
        let noise = {
            let mut noisy = world.raw("client_001").await;
            tokio::spawn(async move {
                for n in 0..20 {
                    ok(&mut noisy, &format!("NOTIFY jobs, 'noise {n}'")).await;
                }
            })
        };
        ok(&mut client, "LISTEN jobs").await;
        ok(&mut sender, &format!("NOTIFY jobs, 'signal {round}'")).await;
        noise.await.unwrap();
        ok(&mut sender, "NOTIFY jobs, 'end'").await;
        let mut got = Vec::new();
        while got.last().is_none_or(|text| text != "jobs end") {
            got.push(next(&mut client).await.1);
        }
        let signals = got.iter().filter(|text| text.starts_with("jobs signal")).count();
        assert_eq!(signals, 1, "{round}: {got:?}");
        let noise: Vec<&String> = got.iter().filter(|text| text.starts_with("jobs noise")).collect();
        let mut unique = noise.clone();
        unique.dedup();
        assert_eq!(noise, unique, "{round}");
        client.terminate().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_listener_comes_back_with_its_channels() {
    let world = auto(|_| {}).await;
    let (mut client, mut sender) = (world.raw("client_001").await, world.raw("client_001").await);
    ok(&mut client, "LISTEN jobs").await;
    let listener = "usename = 'client_001' AND application_name = 'pgusher listener'";
    for round in 0..3 {
        let killed = format!("SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity WHERE {listener}");
        assert_eq!(world.admin_value(&killed).await, 1);
        world.admin_until(&format!("SELECT count(*) FROM pg_stat_activity WHERE {listener}"), 1).await;
        world
            .admin_until(&format!("SELECT count(*) FROM pg_stat_activity WHERE {listener} AND query LIKE 'LISTEN%'"), 1)
            .await;
        ok(&mut sender, &format!("NOTIFY jobs, 'round {round}'")).await;
        assert_eq!(next(&mut client).await, (sender.pid, format!("jobs round {round}")));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_room_for_a_listener_the_client_keeps_its_connection() {
    let world = auto(|config| config.pool.max_db_connections = 1).await;
    let mut client = world.raw("client_001").await;
    ok(&mut client, "LISTEN jobs").await;
    world.metric_until("pgusher_pinned_clients{reason=\"listen\"}", 1.0).await;
    let me = client.pid;
    assert_eq!(notes(&ok(&mut client, "NOTIFY jobs, 'x'").await), [(me, "jobs x".to_owned())]);
    ok(&mut client, "UNLISTEN *").await;
    world.metric_until("pgusher_pinned_clients{reason=\"listen\"}", 0.0).await;
    assert_eq!(notes(&ok(&mut client, "NOTIFY jobs, 'x'").await), []);
}

/// As many clients at once as there are server connections: each would have one, and wait for another to listen for all.
#[tokio::test(flavor = "multi_thread")]
async fn clients_that_begin_to_listen_together_do_not_take_all_connections() {
    let world = auto(|config| config.pool.default_pool_size = 3).await;
    let mut clients = Vec::new();
    for _ in 0..8 {
        clients.push(world.raw("client_001").await);
    }
    let listening = clients.iter_mut().enumerate().map(async |(n, client)| {
        if n % 2 == 0 {
            ok(client, "LISTEN jobs").await;
            return;
        }
        client
            .compose(|b| {
                b.parse("", "listen jobs");
                b.bind("", "", &[]);
                b.execute("");
                b.sync();
            })
            .await;
        assert_eq!(show(&client.until_ready().await), "1 2 C(LISTEN) Z(I)");
    });
    futures_util::future::join_all(listening).await;
    assert_eq!(world.metric("pgusher_pinned_clients{reason=\"listen\"}").await, 0.0);
    let mut sender = world.raw("client_001").await;
    ok(&mut sender, "NOTIFY jobs, 'x'").await;
    for client in &mut clients {
        assert_eq!(next(client).await, (sender.pid, "jobs x".to_owned()));
    }
    // Nobody listens any more: all connections are for others again.
    for client in clients {
        client.terminate().await;
    }
    let mut holders = Vec::new();
    for _ in 0..3 {
        let mut holder = world.raw("client_001").await;
        ok(&mut holder, "BEGIN").await;
        holders.push(holder);
    }
}

/// Nobody can know before the `COMMIT`: by then they have all connections, or the only one.
#[tokio::test(flavor = "multi_thread")]
async fn clients_that_listen_in_transactions_do_not_take_all_connections() {
    for size in [1, 3] {
        let world = auto(|config| config.pool.default_pool_size = size).await;
        let mut clients = Vec::new();
        for _ in 0..7 {
            clients.push(world.raw("client_001").await);
        }
        let listening = clients.iter_mut().enumerate().map(async |(n, client)| {
            ok(client, "BEGIN").await;
            client.compose(|b| if n % 2 == 0 { b.query("LISTEN jobs") } else { b.extended("LISTEN jobs", &[]) }).await;
            client.until_ready().await;
            tokio::time::sleep(Duration::from_millis(100)).await;
            ok(client, "COMMIT").await;
        });
        let all = futures_util::future::join_all(listening);
        tokio::time::timeout(Duration::from_secs(20), all).await.expect("they wait for each other");
        assert_eq!(world.metric("pgusher_pinned_clients{reason=\"listen\"}").await, 0.0);
        assert!(world.admin_value(OWN).await <= size as i64 + 1);
        let mut sender = world.raw("client_001").await;
        ok(&mut sender, "NOTIFY jobs, 'x'").await;
        for client in &mut clients {
            assert_eq!(next(client).await, (sender.pid, "jobs x".to_owned()));
        }
        // The one more is gone with those that listen.
        for client in clients {
            client.terminate().await;
        }
        world.metric_until("pgusher_listeners", 0.0).await;
        world.admin_until(&format!("SELECT greatest(({OWN}), {size})"), size as i64).await;
    }
}

/// They may wait for each other, and would for one that never comes.
#[tokio::test(flavor = "multi_thread")]
async fn clients_have_the_whole_pool_beside_the_listener() {
    let world = auto(|config| config.pool.default_pool_size = 2).await;
    let mut listening = world.raw("client_001").await;
    ok(&mut listening, "LISTEN jobs").await;
    for _ in 0..3 {
        let mut clients = [world.raw("client_001").await, world.raw("client_001").await];
        for client in &mut clients {
            let all = ok(client, "BEGIN");
            tokio::time::timeout(Duration::from_secs(20), all).await.expect("the listener has the last one");
        }
        for client in &mut clients {
            ok(client, "NOTIFY jobs, 'x'").await;
            ok(client, "COMMIT").await;
            assert_eq!(next(&mut listening).await, (client.pid, "jobs x".to_owned()));
        }
    }
    assert_eq!(world.admin_value(OWN).await, 3);
    // What it used is one of the pool again.
    listening.terminate().await;
    world.metric_until("pgusher_listeners", 0.0).await;
    world.admin_until(&format!("SELECT greatest(({OWN}), 2)"), 2).await;
    ok(&mut world.raw("client_001").await, "LISTEN jobs").await;
}

/// One connection is kept by another client, and one is busy: the listener must not take that for good from who wants it.
#[tokio::test(flavor = "multi_thread")]
async fn the_listener_does_not_keep_a_connection_from_who_is_going_to_listen() {
    let world = auto(|config| config.pool.default_pool_size = 2).await;
    let (mut keeper, mut sleeper) = (world.raw("client_001").await, world.raw("client_001").await);
    ok(&mut keeper, "CREATE TEMP TABLE t (a int)").await;
    let mut client = world.raw("client_001").await;
    let busy = tokio::spawn(async move {
        ok(&mut sleeper, "SELECT pg_sleep(0.5)").await;
    });
    tokio::time::sleep(Duration::from_millis(200)).await;
    tokio::time::timeout(Duration::from_secs(20), ok(&mut client, "LISTEN jobs")).await.unwrap();
    busy.await.unwrap();
    let own = client.pid;
    assert_eq!(notes(&ok(&mut client, "NOTIFY jobs, 'x'").await), [(own, "jobs x".to_owned())]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_listen_inside_a_function_keeps_the_connection() {
    let world = auto(|_| {}).await;
    let (mut client, mut sender) = (world.raw("client_001").await, world.raw("client_001").await);
    ok(
        &mut client,
        "CREATE FUNCTION hear() RETURNS void LANGUAGE plpgsql AS $$ BEGIN EXECUTE 'LIS' || 'TEN jobs'; END $$",
    )
    .await;
    ok(&mut client, "SELECT hear()").await;
    world.metric_until("pgusher_pinned_clients{reason=\"listen\"}", 1.0).await;
    for n in 0..5 {
        ok(&mut sender, &format!("NOTIFY jobs, '{n}'")).await;
        assert_eq!(next(&mut client).await, (sender.pid, format!("jobs {n}")));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_of_another_proxy_and_of_nobody_are_told_apart() {
    for mode in [PoolMode::Session, PoolMode::Auto] {
        let world = world(mode, Plan::Schema, |_| {}).await;
        let other = World::with_clusters(world.clusters.clone(), |config| config.pool.pool_mode = mode).await;
        let mut client = world.raw("client_001").await;
        ok(&mut client, "LISTEN jobs").await;
        let (mut friend, mut foe) = (other.raw("client_001").await, other.raw("client_002").await);
        let admin = world.cluster().admin("tenants").await;
        for n in 0..3 {
            ok(&mut foe, "NOTIFY jobs, 'secret'").await;
            admin.batch_execute("NOTIFY jobs, 'not the tenant'").await.unwrap();
            ok(&mut friend, &format!("NOTIFY jobs, '{n}'")).await;
            let (_, text) = next(&mut client).await;
            assert_eq!(text, format!("jobs {n}"), "{mode:?}");
        }
        assert_eq!(world.metric("pgusher_notifications_total{result=\"delivered\"}").await, 3.0);
        assert_eq!(world.metric("pgusher_notifications_total{result=\"unknown\"}").await, 6.0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_read_its_notifications_is_told_to_go() {
    let world = auto(|_| {}).await;
    let (mut client, mut sender) = (world.raw("client_001").await, world.raw("client_001").await);
    ok(&mut client, "LISTEN jobs").await;
    ok(&mut client, "BEGIN").await;
    ok(&mut sender, "SELECT pg_notify('jobs', n || repeat('x', 7000)) FROM generate_series(1, 200) n").await;
    let error = client.next().await.unwrap();
    assert_eq!((error.code().as_str(), error.field(b'S').as_str()), ("54000", "FATAL"));
    assert!(!error.field(b'H').is_empty());
    assert!(client.is_closed().await);
    // The others go on.
    assert_eq!(sender.value("SELECT 1").await, "1");
}

/// Some drivers parse and describe in one group, and run what they have parsed in the next.
#[tokio::test(flavor = "multi_thread")]
async fn a_statement_that_is_run_in_a_later_group_is_noticed() {
    let world = auto(|_| {}).await;
    let (mut client, mut sender) = (world.raw("client_001").await, world.raw("client_001").await);
    client
        .compose(|b| {
            b.parse("", "LISTEN jobs");
            b.describe(b'S', "");
            b.sync();
        })
        .await;
    assert_eq!(show(&client.until_ready().await), "1 n Z(I)");
    client
        .compose(|b| {
            b.bind("", "", &[]);
            b.execute("");
            b.sync();
        })
        .await;
    assert_eq!(show(&client.until_ready().await), "2 C(LISTEN) Z(I)");
    assert_eq!(world.metric("pgusher_listeners").await, 1.0);
    ok(&mut sender, "NOTIFY jobs, 'x'").await;
    assert_eq!(next(&mut client).await, (sender.pid, "jobs x".to_owned()));
}

/// A client that listens and runs statements that know nothing of channels has its server connection as it is.
#[tokio::test(flavor = "multi_thread")]
async fn a_statement_that_is_prepared_by_name_costs_a_listening_client_nothing_more() {
    let world = auto(|_| {}).await;
    let mut client = world.raw("client_001").await;
    let own = client.pid;
    ok(&mut client, "LISTEN jobs").await;
    for (name, text) in
        [("say", "NOTIFY jobs, 'x'"), ("hear", "LISTEN more"), ("leave", "UNLISTEN more"), ("one", "SELECT 1")]
    {
        client
            .compose(|b| {
                b.parse(name, text);
                b.describe(b'S', name);
                b.sync();
            })
            .await;
        client.until_ready().await;
    }
    // What the client's server connection did last.
    let last = "usename = 'client_001' AND application_name <> 'pgusher listener' AND query";
    let listens = "SELECT string_agg(c, ',' ORDER BY c) FROM pg_listening_channels() c";
    for (group, heard, last_said, channels) in [
        (&["say"][..], 1, "NOTIFY jobs, 'x'", "jobs"),
        (&["one", "say"], 1, "NOTIFY jobs, 'x'", "jobs"),
        (&["hear"], 0, "", "jobs,more"),
        (&["say"], 1, "NOTIFY jobs, 'x'", "jobs,more"),
        (&["one", "leave"], 0, "", "jobs"),
        (&["say", "one"], 1, "SELECT 1", "jobs"),
    ] {
        client
            .compose(|b| {
                for name in group {
                    b.bind("", name, &[]);
                    b.execute("");
                }
                b.sync();
            })
            .await;
        let said = client.until_ready().await;
        assert_eq!(notes(&said), vec![(own, "jobs x".to_owned()); heard], "{group:?}: {}", show(&said));
        if !last_said.is_empty() {
            let last_said = last_said.replace('\'', "''");
            let count = format!("SELECT count(*) FROM pg_stat_activity WHERE {last} = '{last_said}'");
            assert_eq!(world.admin_value(&count).await, 1, "{group:?} {last_said}");
        }
        assert_eq!(client.value(listens).await, channels, "{group:?}");
    }
    // Nor does an unnamed one hide what is behind it.
    client
        .compose(|b| {
            for text in ["SELECT 1", "UNLISTEN jobs"] {
                b.parse("", text);
                b.bind("", "", &[]);
                b.execute("");
            }
            b.sync();
        })
        .await;
    client.until_ready().await;
    assert_eq!(client.value("SELECT count(*) FROM pg_listening_channels()").await, "0");
    // Nor does it when the rest comes later.
    ok(&mut client, "LISTEN jobs").await;
    for (text, ends) in [("SELECT 1", false), ("UNLISTEN jobs", true)] {
        client
            .compose(|b| {
                b.parse("", text);
                b.bind("", "", &[]);
                b.execute("");
                if ends {
                    b.sync();
                }
            })
            .await;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    client.until_ready().await;
    assert_eq!(client.value("SELECT count(*) FROM pg_listening_channels()").await, "0");
}

/// A driver's own idea of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_driver_gets_its_notifications() {
    let world = auto(|_| {}).await;
    let (client, mut connection) = tokio_postgres::Config::new()
        .host("127.0.0.1")
        .port(world.port)
        .user("app.client_001")
        .password(crate::world::APP_PASSWORD)
        .dbname("client_001")
        .connect(tokio_postgres::NoTls)
        .await
        .unwrap();
    let (told, mut heard) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Some(Ok(message)) = std::future::poll_fn(|cx| connection.poll_message(cx)).await {
            if let tokio_postgres::AsyncMessage::Notification(n) = message {
                told.send(n).unwrap();
            }
        }
    });
    client.batch_execute("LISTEN \"Ünïcode\"").await.unwrap();
    client.execute("SELECT pg_notify($1, $2)", &[&"Ünïcode", &"ä"]).await.unwrap();
    let first = tokio::time::timeout(Duration::from_secs(20), heard.recv()).await.unwrap().unwrap();
    assert_eq!((first.channel(), first.payload()), ("Ünïcode", "ä"));
}

/// What is sent as soon as a LISTEN is seen to be committed arrives, though its client has not been answered yet.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_sent_between_the_commit_of_a_listen_and_its_answer_arrives_once() {
    let world = auto(|_| {}).await;
    let (mut client, mut other) = (world.raw("client_001").await, world.raw("client_001").await);
    ok(&mut client, "CREATE TABLE mark (n int)").await;
    ok(&mut client, "LISTEN standing").await;
    for kind in ["alone", "keeping its connection"] {
        if kind != "alone" {
            ok(&mut client, "CREATE TEMP TABLE kept (x int)").await;
        }
        for n in 1..=20 {
            let text = format!("LISTEN replies; INSERT INTO mark VALUES ({n})");
            client.compose(|b| b.query(&text)).await;
            while other.value(&format!("SELECT count(*) FROM mark WHERE n = {n}")).await == "0" {}
            ok(&mut other, &format!("NOTIFY replies, '{n}'")).await;
            let mut heard = notes(&client.until_ready().await);
            ok(&mut other, &format!("NOTIFY standing, '{n}'")).await;
            while heard.last().is_none_or(|(_, text)| !text.starts_with("standing")) {
                heard.push(next(&mut client).await);
            }
            let texts: Vec<_> = heard.into_iter().map(|(_, text)| text).collect();
            assert_eq!(texts, [format!("replies {n}"), format!("standing {n}")], "{kind}");
            ok(&mut client, "UNLISTEN replies").await;
            ok(&mut other, "DELETE FROM mark").await;
        }
    }
}

/// What was sent before a LISTEN is not for its client, though others of the tenant listen already.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_sent_before_a_listen_does_not_arrive() {
    let world = auto(|_| {}).await;
    let (mut always, mut sender) = (world.raw("client_001").await, world.raw("client_001").await);
    let mut client = world.raw("client_001").await;
    ok(&mut always, "LISTEN jobs").await;
    for n in 0..50 {
        ok(&mut sender, &format!("NOTIFY jobs, 'before {n}'")).await;
        assert_eq!(notes(&ok(&mut client, "LISTEN jobs").await), []);
        ok(&mut sender, &format!("NOTIFY jobs, 'after {n}'")).await;
        assert_eq!(next(&mut client).await, (sender.pid, format!("jobs after {n}")));
        ok(&mut client, "UNLISTEN *").await;
    }
}
