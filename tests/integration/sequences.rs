//! `pool_mode = "auto"`: what `currval` and `lastval` say in another transaction than the one that it is about.

use std::time::{Duration, Instant};

use crate::raw::{Batch, Raw};
use crate::world::World;

const INSERT: &str = "INSERT INTO bookings (note) VALUES ('x') RETURNING id";
const LAST: &str = "SELECT lastval()";
const CURRENT: &str = "SELECT currval('bookings_id_seq')";
const PINNED: &str = "pgusher_pinned_clients{reason=\"sequence\"}";

async fn world(connections: usize) -> World {
    World::start(|config| {
        config.pool.default_pool_size = connections;
        config.pool.query_wait_timeout = Duration::from_secs(30);
    })
    .await
}

async fn clients(world: &World, tenant: &str, n: usize) -> Vec<Raw> {
    let mut clients = Vec::new();
    for _ in 0..n {
        clients.push(world.raw(tenant).await);
    }
    clients
}

/// What it says to this by the simple protocol or the extended one: a value, or the code of an error.
async fn number(raw: &mut Raw, sql: &str, extended: bool) -> String {
    raw.compose(|b| if extended { b.extended(sql, &[]) } else { b.query(sql) }).await;
    let said = raw.until_ready().await;
    let row = said.iter().find(|m| m.tag == b'D').map(|m| m.values().swap_remove(0));
    row.unwrap_or_else(|| said.iter().find(|m| m.tag == b'E').unwrap().code())
}

/// One has asked, and whoever inserts keeps its connection from then on.
#[tokio::test(flavor = "multi_thread")]
async fn the_first_question_of_a_tenant_is_the_only_one_that_comes_too_late() {
    for connections in [2, 3] {
        let world = world(connections).await;
        let mut some = clients(&world, "client_001", connections).await;
        let mut reader = world.raw("client_001").await;
        some[0].query(INSERT).await;
        some[1].query(INSERT).await;
        assert_eq!(some[0].error(LAST).await.code(), "55000", "there was somebody in between");
        for round in 0..4 {
            let mut ids = Vec::new();
            for raw in &mut some {
                ids.push(number(raw, INSERT, round % 2 == 0).await);
            }
            for (at, raw) in some.iter_mut().enumerate() {
                let extended = (at + round).is_multiple_of(2);
                assert_eq!(number(raw, if extended { LAST } else { CURRENT }, extended).await, ids[at]);
            }
        }
        world.metric_until(PINNED, connections as f64).await;
        // Who only reads gets what one of them can do without, and keeps nothing.
        assert_eq!(reader.value("SELECT 1").await, "1");
        assert_eq!(world.metric(PINNED).await, connections as f64 - 1.0);
        // Other tenants do not ask.
        let mut other = world.raw("client_002").await;
        assert_eq!(number(&mut other, INSERT, false).await, "1");
        assert_eq!(other.value("SELECT 1").await, "1");
        assert_eq!(world.metric(PINNED).await, connections as f64 - 1.0);
    }
}

/// More clients than connections, in all of which somebody asks at once.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_waits_in_vain_and_nobody_is_told_anothers_number() {
    for connections in [2, 3] {
        let world = world(connections).await;
        let mut teacher = world.raw("client_001").await;
        assert_eq!(teacher.error(LAST).await.code(), "55000");
        drop(teacher);
        let work = (0..7).map(async |n: usize| {
            let mut raw = world.raw("client_001").await;
            for round in 0..4 {
                let extended = (n + round).is_multiple_of(2);
                let id = number(&mut raw, INSERT, extended).await;
                let since = Instant::now();
                let last = number(&mut raw, LAST, extended).await;
                let late = last == "55000" && since.elapsed() > Duration::from_millis(90);
                assert!(last == id || late, "{last} is not {id}");
                tokio::time::sleep(Duration::from_millis(40 * (n as u64 % 4))).await;
                let later = number(&mut raw, CURRENT, !extended).await;
                assert!(later == id || later == "55000", "{later} is not {id}");
            }
        });
        futures_util::future::join_all(work).await;
        world.metric_until(PINNED, 0.0).await;
    }
}

/// Whose connections are free gets the one that it inserted on, also before anybody has asked.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_inserts_gets_the_connection_back_that_it_inserted_on() {
    let world = world(3).await;
    let mut some = clients(&world, "client_001", 3).await;
    for raw in &mut some {
        raw.query("BEGIN").await;
    }
    let mut ids = Vec::new();
    for raw in &mut some {
        ids.push(raw.value(INSERT).await);
    }
    for raw in &mut some {
        raw.query("COMMIT").await;
    }
    // Who only reads disturbs nobody.
    let mut reader = world.raw("client_001").await;
    reader.query("SELECT 1").await;
    assert_eq!(world.metric(PINNED).await, 0.0);
    for (raw, id) in some.iter_mut().zip(&ids) {
        assert_eq!(raw.value(LAST).await, *id);
    }
}

/// An `INSERT` that draws from no sequence looks the same.
#[tokio::test(flavor = "multi_thread")]
async fn what_others_have_left_is_nobodys_answer() {
    let world = world(1).await;
    let (mut one, mut two) = (world.raw("client_001").await, world.raw("client_001").await);
    one.query(INSERT).await;
    two.query("INSERT INTO things VALUES (1, 'a')").await;
    assert_eq!(two.error(CURRENT).await.code(), "55000");
}

/// Nothing is known of the texts of what was prepared before.
#[tokio::test(flavor = "multi_thread")]
async fn it_is_the_same_where_names_are_passed_through() {
    let world = World::start(|config| {
        config.pool.default_pool_size = 2;
        config.pool.max_prepared_statements = 0;
    })
    .await;
    let (mut one, mut two) = (world.raw("client_001").await, world.raw("client_001").await);
    number(&mut one, INSERT, true).await;
    assert_eq!(number(&mut two, CURRENT, true).await, "55000", "it has done nothing");
    for _ in 0..2 {
        let ids = [number(&mut one, INSERT, true).await, number(&mut two, INSERT, true).await];
        world.metric_until(PINNED, 2.0).await;
        assert_eq!([number(&mut two, CURRENT, true).await, number(&mut one, LAST, true).await], [&*ids[1], &*ids[0]]);
    }
    for raw in [&mut one, &mut two] {
        raw.query("DISCARD ALL").await;
    }
    world.metric_until(PINNED, 0.0).await;
    number(&mut one, "SELECT 1", true).await;
    assert_eq!(world.metric(PINNED).await, 0.0, "only what may advance one counts");
    one.compose(|b| {
        b.parse("s", INSERT);
        b.sync();
    })
    .await;
    one.until_ready().await;
    one.query("DISCARD SEQUENCES").await;
    world.metric_until(PINNED, 0.0).await;
    one.compose(|b| {
        b.bind("", "s", &[]);
        b.execute("");
        b.sync();
    })
    .await;
    assert_eq!(one.until_ready().await.iter().filter(|m| m.tag == b'D').count(), 1);
    world.metric_until(PINNED, 1.0).await;
    assert_ne!(number(&mut one, LAST, true).await, "55000");
}

/// Another tenant waits for the only connection of the shard.
#[tokio::test(flavor = "multi_thread")]
async fn other_tenants_are_not_kept_from_theirs() {
    let world = World::start(|config| config.pool.max_db_connections = 1).await;
    let mut one = world.raw("client_001").await;
    assert_eq!(one.error(LAST).await.code(), "55000");
    let id = one.value(INSERT).await;
    assert_eq!(one.value(LAST).await, id);
    assert_eq!(world.metric(PINNED).await, 1.0);
    let mut two = world.raw("client_002").await;
    assert_eq!(two.value("SELECT 2").await, "2");
    assert_eq!(one.error(LAST).await.code(), "55000");
    assert_eq!(world.metric("pgusher_pinned_clients{reason=\"unknown\"}").await, 0.0);
}

/// Something else that the client holds keeps the connection for it, also if it was not known.
#[tokio::test(flavor = "multi_thread")]
async fn who_holds_more_than_that_does_not_give_way() {
    let world = world(1).await;
    let mut one = world.raw("client_001").await;
    one.query("CREATE FUNCTION mine() RETURNS void LANGUAGE plpgsql AS $$ BEGIN PERFORM set_config('my.own', 'x', false); END $$")
        .await;
    assert_eq!(one.error(LAST).await.code(), "55000");
    one.query(INSERT).await;
    one.query("SELECT mine()").await;
    world.metric_until(PINNED, 1.0).await;
    let mut two = world.raw("client_001").await;
    assert_eq!(two.value("SELECT coalesce(current_setting('my.own', true), '')").await, "");
    two.query("SELECT setseed(0.5)").await;
    two.query(INSERT).await;
    world.metric_until(PINNED, 1.0).await;
    one.compose(|b| b.query("SELECT 1")).await;
    world.metric_until("pgusher_pinned_clients{reason=\"seed\"}", 1.0).await;
    assert_eq!(world.metric("pgusher_clients{state=\"waiting\"}").await, 1.0);
    drop(two);
    one.until_ready().await;
}

/// A tenant that nobody has used for a while is known still.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_tenant_asks_is_remembered_when_its_pool_is_gone() {
    let world = World::start(|config| config.pool.server_idle_timeout = Duration::from_millis(100)).await;
    let mut one = world.raw("client_001").await;
    assert_eq!(one.error(LAST).await.code(), "55000");
    one.query("DISCARD ALL").await;
    drop(one);
    world.metric_until("pgusher_pools", 0.0).await;
    let (mut one, mut two) = (world.raw("client_001").await, world.raw("client_001").await);
    let id = one.value(INSERT).await;
    two.query(INSERT).await;
    assert_eq!(one.value(LAST).await, id);
}

/// Longer than `pin_timeout` allows: the connection goes, the client stays.
#[tokio::test(flavor = "multi_thread")]
async fn pin_timeout_ends_no_client_for_that() {
    let world = World::start(|config| config.pool.pin_timeout = Duration::from_millis(300)).await;
    let (mut one, mut two) = (world.raw("client_001").await, world.raw("client_001").await);
    assert_eq!(one.error(LAST).await.code(), "55000");
    let id = two.value(INSERT).await;
    world.metric_until(PINNED, 0.0).await;
    assert_eq!(two.value(LAST).await, id, "nobody has used it since");
    one.query("SELECT setseed(0.5)").await;
    one.query(INSERT).await;
    assert_eq!(one.next().await.unwrap().code(), "57P05", "it holds something else, too");
}

/// A message of ours that fails, and has nothing to do with sequences, takes nothing away.
#[tokio::test(flavor = "multi_thread")]
async fn a_parse_that_is_refused_leaves_the_state_of_sequences() {
    let world = world(2).await;
    let mut raw = world.raw("client_001").await;
    raw.query("CREATE SEQUENCE numbers START 7").await;
    assert_eq!(raw.value("SELECT nextval('numbers') + 0 * lastval()").await, "7");
    let prepare = |b: &mut Batch| {
        b.parse("a", "SELECT * FROM bookings");
        b.describe(b'S', "a");
        b.bind("", "a", &[]);
        b.execute("");
        b.sync();
    };
    raw.compose(prepare).await;
    raw.until_ready().await;
    // What is prepared is prepared again as it was, by steps of ours behind the Parse.
    raw.query("SET TIME ZONE 'Europe/Oslo'").await;
    raw.compose(prepare).await;
    assert_eq!(raw.until_ready().await[0].code(), "42P05");
    assert_eq!(raw.value(LAST).await, "7");
}
