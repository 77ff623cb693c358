//! A tenant with a server of its own may have roles of its own, and be a superuser there: what it does with that is
//! session state like any other, in `pool_mode = "auto"`.

use std::sync::Arc;

use pgusher::config::ShardConfig;

use crate::postgres::Cluster;
use crate::raw::{Raw, show};
use crate::world::World;

/// A tenant `client_001` that is superuser on its own server, with a few roles.
pub(crate) async fn world() -> World {
    let clusters = vec![Arc::new(Cluster::start()), Arc::new(Cluster::start())];
    let world = World::with_clusters(clusters, |config| {
        config.shards[1].dedicated_to = Some("client_001".into());
        config.shards[1] = ShardConfig { name: "own".into(), ..config.shards[1].clone() };
    })
    .await;
    world.client("client_001").await.batch_execute("SELECT 1").await.unwrap();
    let admin = world.clusters[1].admin("postgres").await;
    admin.batch_execute("ALTER ROLE client_001 SUPERUSER; CREATE ROLE one; CREATE ROLE two").await.unwrap();
    // The proxy's idle connection logged in as what it was before.
    admin
        .batch_execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'client_001'")
        .await
        .unwrap();
    world
}

const WHO: &str = "SELECT session_user || ' ' || current_user || ' ' || current_setting('role')";

/// Clients that come, stay and go beside it are themselves.
async fn others(world: &World, stays: &mut Raw) {
    for _ in 0..2 {
        assert_eq!(stays.value(WHO).await, "client_001 client_001 none");
        let mut comes = world.raw("client_001").await;
        assert_eq!(comes.value(WHO).await, "client_001 client_001 none");
        assert_eq!(comes.value("SHOW is_superuser").await, "on");
        comes.terminate().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_role_is_the_clients_own_and_ends_when_it_says_so() {
    let world = world().await;
    let (mut client, mut stays) = (world.raw("client_001").await, world.raw("client_001").await);
    let pinned = "pgusher_pinned_clients{reason=\"role\"}";
    for (sql, who, back) in [
        ("SET ROLE one", "client_001 one one", "RESET ROLE"),
        ("SET \"role\" = 'one'", "client_001 one one", "SET ROLE NONE"),
        ("SELECT set_config('role', 'two', false)", "client_001 two two", "DISCARD ALL"),
        ("SET SESSION AUTHORIZATION one", "one one none", "RESET SESSION AUTHORIZATION"),
        ("SET session_authorization = two", "two two none", "DISCARD ALL"),
        ("DO $$ BEGIN SET SESSION AUTHORIZATION two; END $$", "two two none", "SET SESSION AUTHORIZATION DEFAULT"),
    ] {
        let said = client.query(sql).await;
        assert!(!show(&said).contains("E("), "{sql}: {}", show(&said));
        world.metric_until(pinned, 1.0).await;
        others(&world, &mut stays).await;
        assert_eq!(client.value(WHO).await, who, "{sql}");
        client.query(back).await;
        assert_eq!(client.value(WHO).await, "client_001 client_001 none", "{back}");
        world.metric_until(pinned, 0.0).await;
    }
    // Which ends with the transaction, or is taken back, keeps nothing.
    for sql in ["BEGIN; SET LOCAL ROLE one; COMMIT", "BEGIN; SET SESSION AUTHORIZATION one; ROLLBACK"] {
        client.query(sql).await;
        others(&world, &mut stays).await;
        assert_eq!(client.value(WHO).await, "client_001 client_001 none", "{sql}");
    }
    assert_eq!(world.metric(pinned).await, 0.0);
    for kind in ["identity", "superuser"] {
        let closed =
            format!("cross_tenant_isolation_violations{{action=\"closed\",kind=\"{kind}\",tenant=\"client_001\"}}");
        assert_eq!(world.metric(&closed).await, 0.0, "{kind}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_leaves_as_somebody_else_leaves_no_trace() {
    let world = world().await;
    let mut stays = world.raw("client_001").await;
    for sql in ["SET ROLE one", "SET SESSION AUTHORIZATION one", "SET SESSION AUTHORIZATION two; SET ROLE two"] {
        let mut client = world.raw("client_001").await;
        client.query(sql).await;
        client.terminate().await;
        others(&world, &mut stays).await;
    }
}

/// A role that the login begins with is no state of the session's, and is there again after a reset.
#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_the_login_is_given_keeps_no_connection() {
    let world = world().await;
    let admin = world.clusters[1].admin("postgres").await;
    admin.batch_execute("ALTER ROLE client_001 SET role = two; ALTER ROLE one SET role = one").await.unwrap();
    let given = "client_001 two two";
    let mut client = world.raw("client_001").await;
    for sql in ["DO $$ BEGIN END $$", "SET ROLE one; RESET ROLE", "SELECT 1"] {
        client.query(sql).await;
        assert_eq!(client.value(WHO).await, given, "{sql}");
    }
    world.metric_until("pgusher_pinned_clients{reason=\"role\"}", 0.0).await;
    client.query("SET ROLE one").await;
    world.metric_until("pgusher_pinned_clients{reason=\"role\"}", 1.0).await;
    client.terminate().await;
    for _ in 0..3 {
        let mut next = world.raw("client_001").await;
        assert_eq!(next.value(WHO).await, given);
        next.terminate().await;
    }
}
