//! Clients that name each other by process ids: to end a session, to cancel what it does, to ask who waits for whom.

use pgusher::config::PoolMode;

use crate::raw::{Raw, show};
use crate::world::World;

const POOLED: [PoolMode; 2] = [PoolMode::Auto, PoolMode::Transaction];

async fn world(mode: PoolMode) -> World {
    World::start(|config| config.pool.pool_mode = mode).await
}

/// The server's last words, and nothing behind them.
async fn assert_terminated(client: &mut Raw, what: &str) {
    assert_eq!(show(&client.until_ready().await), "E(57P01)", "{what}");
    assert!(client.is_closed().await, "{what}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_ended_by_the_process_id_that_it_was_told() {
    for mode in POOLED {
        let world = world(mode).await;
        let mut other = world.raw("client_001").await;
        for state in ["fresh", "used", "in a transaction"] {
            let mut victim = world.raw("client_001").await;
            let mut bystander = world.raw("client_001").await;
            match state {
                "fresh" => {}
                "used" => drop(victim.query("SELECT 1").await),
                _ => drop(victim.query("BEGIN").await),
            }
            let kill = format!("SELECT pg_terminate_backend({})", victim.pid);
            assert_eq!(show(&other.query(&kill).await), "D(t) C(SELECT 1) Z(I)", "{mode:?} {state}");
            assert_terminated(&mut victim, state).await;
            assert_eq!(bystander.value("SELECT 1").await, "1", "{mode:?} {state}");
            // Now it is nobody's.
            assert_eq!(other.value(&kill).await, "f", "{mode:?} {state}");
        }
        // As a value, in a statement that lives on, in a transaction.
        other.compose(|b| b.parse("kill", "SELECT pg_terminate_backend($1::int4)")).await;
        other.query("BEGIN").await;
        for name in ["kill", "kill", ""] {
            let mut victim = world.raw("client_001").await;
            let pid = victim.pid.to_string();
            other
                .compose(|b| {
                    if name.is_empty() {
                        b.parse("", "SELECT pg_terminate_backend($1::int4)");
                    }
                    b.bind("", name, &[&pid]);
                    b.execute("");
                    b.sync();
                })
                .await;
            let said = show(&other.until_ready().await);
            assert!(said.contains("D(t)"), "{mode:?} {said}");
            assert_terminated(&mut victim, "by a value").await;
        }
        other.query("COMMIT").await;
        // One's own.
        let own = format!("SELECT pg_terminate_backend({})", other.pid);
        assert_eq!(other.query(&own).await.last().unwrap().code(), "57P01");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_ended_knows_it_before_the_one_who_did_it() {
    for mode in POOLED {
        let world = world(mode).await;
        let mut other = world.raw("client_001").await;
        for (state, ready) in [("I", "Z(I)"), ("T", "Z(T)")] {
            if state == "T" {
                other.query("BEGIN").await;
            }
            for round in 0..10 {
                let (mut first, mut second) = (world.raw("client_001").await, world.raw("client_001").await);
                let pids = format!("{{{},{}}}", first.pid, second.pid);
                let kill = "SELECT count(pg_terminate_backend(pid)) FROM unnest($1::int4[]) AS pid";
                other.compose(|b| b.extended(kill, &[&pids])).await;
                let said = show(&other.until_ready().await);
                assert!(said.contains("D(2)") && said.ends_with(ready), "{mode:?} {said}");
                // As whoever uses all of them, and at once.
                for victim in [&mut first, &mut second] {
                    victim.compose(|b| b.query("SELECT 1")).await;
                    assert_terminated(victim, &format!("{mode:?} {state} {round}")).await;
                }
            }
        }
        assert_eq!(show(&other.query("COMMIT").await), "C(COMMIT) Z(I)", "{mode:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_ended_by_the_process_id_that_the_server_gave_it() {
    let world = world(PoolMode::Auto).await;
    let (mut other, mut victim) = (world.raw("client_001").await, world.raw("client_001").await);
    let pid = victim.value("SELECT pg_backend_pid()").await;
    // It has the same server connection now, but did not ask.
    assert_eq!(other.value("SELECT 1").await, "1");
    other.compose(|b| b.extended("SELECT pg_terminate_backend($1::int4)", &[&pid])).await;
    assert!(show(&other.until_ready().await).contains("D(t)"));
    assert_terminated(&mut victim, "idle").await;
    assert_eq!(other.value("SELECT 1").await, "1");
    // On another one by now, and somebody else on the one it asked.
    let mut victim = world.raw("client_001").await;
    let pid = victim.value("SELECT pg_backend_pid()").await;
    let mut third = world.raw("client_001").await;
    third.query("BEGIN; SELECT 'third'").await;
    world
        .admin_until(&format!("SELECT count(*) FROM pg_stat_activity WHERE pid = {pid} AND query LIKE '%third%'"), 1)
        .await;
    let mut fourth = world.raw("client_001").await;
    fourth.query("BEGIN").await;
    let kill = format!("SELECT pg_terminate_backend({pid})");
    assert_eq!(fourth.value(&kill).await, "t");
    assert_terminated(&mut third, "who is there").await;
    assert_eq!(victim.value("SELECT 1").await, "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_is_cancelled_by_process_id() {
    for mode in POOLED {
        let world = world(mode).await;
        let (mut other, mut victim) = (world.raw("client_001").await, world.raw("client_001").await);
        victim.compose(|b| b.query("SELECT pg_sleep(30)")).await;
        let sleeping =
            "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep(30)%' AND state = 'active'";
        world.admin_until(sleeping, 1).await;
        let cancel = format!("SELECT pg_cancel_backend({})", victim.pid);
        assert_eq!(other.value(&cancel).await, "t", "{mode:?}");
        assert_eq!(show(&victim.until_ready().await), "E(57014) Z(I)");
        // With nothing running it does nothing.
        assert_eq!(other.value(&cancel).await, "t", "{mode:?}");
        assert_eq!(victim.value("SELECT 1").await, "1");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waits_for_whom_is_told_by_process_ids() {
    let world = world(PoolMode::Auto).await;
    let (mut one, mut two, mut other) =
        (world.raw("client_001").await, world.raw("client_001").await, world.raw("client_001").await);
    one.query("BEGIN; SELECT pg_advisory_xact_lock(5)").await;
    other.compose(|b| b.parse("blocked", &blocked(&[one.pid, two.pid]))).await;
    let mut is_blocked = async |pid: i32| {
        other
            .compose(|b| {
                b.bind("", "blocked", &[&pid.to_string()]);
                b.execute("");
                b.sync();
            })
            .await;
        show(&other.until_ready().await).contains("D(t)")
    };
    assert!(!is_blocked(two.pid).await);
    two.compose(|b| b.query("BEGIN; SELECT pg_advisory_xact_lock(5)")).await;
    world.admin_until("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted", 1).await;
    assert!(is_blocked(two.pid).await);
    assert!(!is_blocked(one.pid).await);
    one.query("COMMIT").await;
    two.until_ready().await;
    assert!(!is_blocked(two.pid).await);
}

/// What PostgreSQL's isolation tester asks.
fn blocked(pids: &[i32]) -> String {
    let pids: Vec<String> = pids.iter().map(i32::to_string).collect();
    format!("SELECT pg_catalog.pg_isolation_test_session_is_blocked($1, '{{{}}}')", pids.join(","))
}

/// As work queues do with who has taken a job.
#[tokio::test(flavor = "multi_thread")]
async fn a_process_id_that_is_written_down_stays_the_sessions() {
    let world = world(PoolMode::Auto).await;
    let (mut one, mut other) = (world.raw("client_001").await, world.raw("client_001").await);
    one.query("CREATE TABLE workers (pid int)").await;
    one.value("SELECT pg_backend_pid()").await;
    let pinned = "pgusher_pinned_clients{reason=\"process\"}";
    assert_eq!(world.metric(pinned).await, 0.0);
    one.query("INSERT INTO workers SELECT pg_backend_pid()").await;
    world.metric_until(pinned, 1.0).await;
    let own = one.value("SELECT pg_backend_pid()").await;
    for _ in 0..3 {
        assert_ne!(other.value("SELECT pg_backend_pid()").await, own);
        assert_eq!(one.value("SELECT pid = pg_backend_pid() FROM workers").await, "t");
    }
    one.compose(|b| b.query("SELECT pg_sleep(60)")).await;
    world.admin_until("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'", 1).await;
    assert_eq!(other.value("SELECT pg_cancel_backend(pid) FROM workers").await, "t");
    assert!(show(&one.until_ready().await).contains("E(57014)"));
    one.terminate().await;
    world.metric_until(pinned, 0.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn other_tenants_have_no_process_ids() {
    let world = world(PoolMode::Auto).await;
    let mut victim = world.raw("client_002").await;
    let asked = victim.value("SELECT pg_backend_pid()").await;
    let mut attacker = world.raw("client_001").await;
    for state in ["idle", "in a transaction"] {
        for function in ["pg_terminate_backend", "pg_cancel_backend"] {
            // Its made-up id is nobody's for the server, and its server's process is refused there.
            let said = attacker.query(&format!("SELECT {function}({})", victim.pid)).await;
            assert!(show(&said).contains("D(f)"), "{function} {state}: {}", show(&said));
            assert_eq!(
                attacker.error(&format!("SELECT {function}({asked})")).await.code(),
                "42501",
                "{function} {state}"
            );
        }
        assert_eq!(victim.value("SELECT 1").await, "1", "{state}");
        victim.query("BEGIN").await;
    }
}
