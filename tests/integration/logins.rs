//! What logins begin with (`ALTER ROLE … SET`, `ALTER DATABASE … SET`) when that changes.

use std::time::Duration;

use pgusher::config::PoolMode;

use crate::own_server;
use crate::raw::{Raw, show};
use crate::world::World;

async fn ok(raw: &mut Raw, sql: &str, extended: bool) {
    raw.compose(|b| if extended { b.extended(sql, &[]) } else { b.query(sql) }).await;
    let said = raw.until_ready().await;
    assert!(!said.iter().any(|m| m.tag == b'E'), "{sql}: {}", show(&said));
}

/// Two settings that servers do not report, and one that they do.
async fn settings(raw: &mut Raw) -> String {
    let settings = ["work_mem", "bytea_output", "TimeZone"].map(|name| format!("current_setting('{name}')"));
    let said = raw.value(&format!("SELECT concat_ws(' ', {})", settings.join(", "))).await;
    assert_eq!(said.rsplit(' ').next(), raw.params.get("TimeZone").map(String::as_str), "what it was told");
    said
}

#[tokio::test(flavor = "multi_thread")]
async fn what_logins_begin_with_counts_for_who_comes_afterwards() {
    let world = World::start(|_| {}).await;
    let mut other = world.raw("client_002").await;
    other.value("SELECT 1").await;
    let others = "SELECT coalesce(sum(pid), 0)::int8 FROM pg_stat_activity WHERE usename = 'client_002'";
    let before = world.admin_value(others).await;
    let began = settings(&mut world.raw("client_001").await).await;
    let zone = began.strip_prefix("4MB hex ").unwrap().to_owned();
    for extended in [false, true] {
        let (mut idle, mut busy, mut who) =
            (world.raw("client_001").await, world.raw("client_001").await, world.raw("client_001").await);
        assert_eq!(settings(&mut idle).await, began);
        ok(&mut busy, "BEGIN", false).await;
        ok(&mut who, "BEGIN", false).await;
        for set in ["work_mem = '7MB'", "bytea_output = escape", "TimeZone = 'Asia/Tokyo'"] {
            ok(&mut who, &format!("ALTER ROLE client_001 SET {set}"), extended).await;
        }
        assert_eq!(settings(&mut world.raw("client_001").await).await, began, "not yet");
        ok(&mut who, "COMMIT", extended).await;
        let mut comes = world.raw("client_001").await;
        assert_eq!(settings(&mut comes).await, "7MB escape Asia/Tokyo");
        ok(&mut busy, "COMMIT", false).await;
        // Who was there keeps what it had, also if something else has changed: a tenant more.
        world.raw(if extended { "client_003" } else { "client_004" }).await;
        for raw in [&mut idle, &mut busy, &mut who] {
            assert_eq!(settings(raw).await, began);
        }
        assert_eq!(settings(&mut world.raw("client_001").await).await, "7MB escape Asia/Tokyo");
        let mut named = world.raw_with("client_001", &[("options", "-c work_mem=9MB")]).await;
        assert_eq!(settings(&mut named).await, "9MB escape Asia/Tokyo");
        ok(&mut idle, "SET work_mem = '3MB'", extended).await;
        ok(&mut comes, "ALTER ROLE client_001 RESET work_mem", extended).await;
        ok(&mut comes, "ALTER USER client_001 RESET TimeZone", extended).await;
        for (raw, expected) in [
            (&mut idle, format!("3MB hex {zone}")),
            (&mut busy, began.clone()),
            (&mut comes, "7MB escape Asia/Tokyo".into()),
            (&mut named, "9MB escape Asia/Tokyo".into()),
            (&mut world.raw("client_001").await, format!("4MB escape {zone}")),
        ] {
            assert_eq!(settings(raw).await, expected);
        }
        ok(&mut comes, "ALTER ROLE client_001 RESET bytea_output", extended).await;
        assert_eq!(settings(&mut world.raw("client_001").await).await, began);
    }
    assert_eq!(world.admin_value(others).await, before, "another tenant's connection is what it was");
    assert_eq!(other.value("SELECT 1").await, "1");
}

/// Where nobody keeps anything, too.
#[tokio::test(flavor = "multi_thread")]
async fn what_logins_begin_with_counts_in_all_modes() {
    for mode in [PoolMode::Transaction, PoolMode::Session] {
        let world = World::start(|config| config.pool.pool_mode = mode).await;
        let mut who = world.raw("client_001").await;
        world.raw("client_001").await.value("SELECT 1").await;
        for work_mem in ["7MB", "8MB"] {
            ok(&mut who, &format!("ALTER ROLE client_001 SET work_mem = '{work_mem}'"), false).await;
            assert_eq!(world.raw("client_001").await.value("SHOW work_mem").await, work_mem, "{mode:?}");
        }
    }
}

/// As often as it likes: others of the tenant, who come and stay, are served all the same.
#[tokio::test(flavor = "multi_thread")]
async fn who_changes_it_all_the_time_is_in_nobodys_way() {
    let world = World::start(|config| config.pool.default_pool_size = 3).await;
    let mut stays = world.raw("client_001").await;
    let mut who = world.raw("client_001").await;
    let changes = tokio::spawn(async move {
        for n in 1.. {
            ok(&mut who, &format!("ALTER ROLE client_001 SET work_mem = '{}MB'", n % 1000 + 5), n % 2 == 0).await;
        }
    });
    for n in 0..20 {
        let (mut one, mut two) = (world.raw("client_001").await, world.raw("client_001").await);
        let work = async { tokio::join!(stays.value("SELECT 0"), one.value("SELECT 1"), two.value("SELECT 2"),) };
        let said = tokio::time::timeout(Duration::from_secs(10), work).await.unwrap();
        assert_eq!(said, ("0".into(), "1".into(), "2".into()), "{n}");
    }
    assert!(!changes.is_finished());
    changes.abort();
}

/// One that is too long to be remembered is one of the new ones for who was there, and no more than that.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_setting_costs_nobody_the_connection() {
    let world = World::start(|_| ()).await;
    let (mut who, mut other) = (world.raw("client_001").await, world.raw("client_001").await);
    for letter in ["a", "b", "c"] {
        let long = letter.repeat(700_000);
        ok(&mut who, &format!("ALTER ROLE client_001 SET temp_tablespaces = '{long}'"), false).await;
        other.value("SELECT 1").await;
        let first = "SELECT left(current_setting('temp_tablespaces'), 1)";
        assert_eq!(world.raw("client_001").await.value(first).await, letter);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_logins_to_a_database_begin_with_counts_too() {
    let world = own_server::world().await;
    let mut stays = world.raw("client_001").await;
    assert_eq!(stays.value("SHOW work_mem").await, "4MB");
    let database = stays.value("SELECT quote_ident(current_database())").await;
    for (change, expected) in [("SET work_mem = '9MB'", "9MB"), ("RESET work_mem", "4MB")] {
        stays.query(&format!("ALTER DATABASE {database} {change}")).await;
        assert_eq!(world.raw("client_001").await.value("SHOW work_mem").await, expected);
        assert_eq!(stays.value("SHOW work_mem").await, "4MB");
    }
}
