//! Cancel requests: the right query, and no other.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pgusher::config::PoolMode;

use crate::raw::{cancel, show};
use crate::world::World;

const SLEEPING: &str =
    "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep(30)%' AND state = 'active'";

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_reaches_its_own_query_only() {
    for mode in [PoolMode::Auto, PoolMode::Session, PoolMode::Transaction] {
        let world = World::start(|config| config.pool.pool_mode = mode).await;
        let (mut one, mut two) = (world.raw("client_001").await, world.raw("client_001").await);
        for client in [&mut one, &mut two] {
            client.compose(|b| b.query("SELECT pg_sleep(30)")).await;
        }
        world.admin_until(SLEEPING, 2).await;
        // Wrong keys do nothing.
        cancel(world.port, one.pid, &[1, 2, 3, 4]).await;
        cancel(world.port, one.pid, &two.secret).await;
        cancel(world.port, one.pid ^ 1, &one.secret).await;
        assert_eq!(world.admin_value(SLEEPING).await, 2);
        cancel(world.port, one.pid, &one.secret).await;
        assert_eq!(show(&one.until_ready().await), "E(57014) Z(I)");
        assert_eq!(world.admin_value(SLEEPING).await, 1);
        cancel(world.port, two.pid, &two.secret).await;
        assert_eq!(show(&two.until_ready().await), "E(57014) Z(I)");
        // With nothing running it does nothing, and nothing later.
        cancel(world.port, one.pid, &one.secret).await;
        assert_eq!(one.value("SELECT 1").await, "1");
        // A key dies with its client.
        let (pid, secret) = (one.pid, one.secret.clone());
        one.terminate().await;
        cancel(world.port, pid, &secret).await;
        assert_eq!(two.value("SELECT 1").await, "1");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_driver_that_closes_at_once_is_heard_too() {
    let world = World::transaction(|_| {}).await;
    let client = world.client("client_001").await;
    let token = client.cancel_token();
    let (answer, ()) = tokio::join!(client.batch_execute("SELECT pg_sleep(30)"), async {
        world.client("client_001").await;
        world.admin_until(SLEEPING, 1).await;
        token.cancel_query(tokio_postgres::NoTls).await.unwrap();
    });
    assert_eq!(answer.unwrap_err().code().unwrap().code(), "57014");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waits_in_line_can_cancel_the_wait() {
    let world = World::transaction(|config| config.pool.default_pool_size = 1).await;
    let (mut holder, mut waiter) = (world.raw("client_001").await, world.raw("client_001").await);
    holder.query("BEGIN").await;
    for extended in [false, true] {
        waiter.compose(|b| if extended { b.extended("SELECT 1", &[]) } else { b.query("SELECT 1") }).await;
        world.metric_until("pgusher_clients{state=\"waiting\"}", 1.0).await;
        cancel(world.port, waiter.pid, &waiter.secret).await;
        assert_eq!(show(&waiter.until_ready().await), "E(57014) Z(I)");
        world.metric_until("pgusher_clients{state=\"waiting\"}", 0.0).await;
    }
    assert_eq!(show(&holder.query("COMMIT").await), "C(COMMIT) Z(I)");
    assert_eq!(waiter.value("SELECT 5").await, "5");
}

/// One server connection, two clients: a storm of cancels for the one, who takes turns with the other.
#[tokio::test(flavor = "multi_thread")]
async fn a_storm_of_cancels_never_hits_the_other() {
    let world = Arc::new(World::transaction(|config| config.pool.default_pool_size = 1).await);
    let (mut one, mut two) = (world.raw("client_001").await, world.raw("client_001").await);
    let over = Arc::new(AtomicBool::new(false));
    let storm = {
        let (over, port, pid, secret) = (over.clone(), world.port, one.pid, one.secret.clone());
        tokio::spawn(async move {
            let mut sent = 0;
            while !over.load(Ordering::Relaxed) {
                futures_util::future::join_all((0..4).map(|_| cancel(port, pid, &secret))).await;
                sent += 4;
            }
            sent
        })
    };
    let victim = tokio::spawn(async move {
        let mut cancelled = 0;
        for _ in 0..400 {
            let answer = show(&one.query("SELECT pg_sleep(0.002)").await);
            cancelled += usize::from(answer == "E(57014) Z(I)");
            assert!(["E(57014) Z(I)", "D() C(SELECT 1) Z(I)"].contains(&answer.as_str()), "{answer}");
        }
        cancelled
    });
    for _ in 0..400 {
        assert_eq!(show(&two.query("SELECT pg_sleep(0.001)").await), "D() C(SELECT 1) Z(I)");
    }
    let cancelled = tokio::time::timeout(Duration::from_secs(60), victim).await.unwrap().unwrap();
    over.store(true, Ordering::Relaxed);
    let sent = storm.await.unwrap();
    assert!(cancelled > 0, "{sent} cancels hit nothing");
}
