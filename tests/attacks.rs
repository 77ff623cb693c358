//! Our own corpus of attacks, through a `pgusher dev` in every pool mode. Larger ones: `make test-attacks CORPUS=…`.

#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

#[path = "support/attack/mod.rs"]
mod attack;

use std::path::{Path, PathBuf};
use std::time::Duration;

use attack::corpus::{self, Entry, Unstoppable};
use attack::fixture::Fixture;
use attack::report::{Summary, line};
use attack::run::Runner;
use attack::target::{Dev, Rules};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/isolation")
}

/// Runs everything that is meant for the plan and mode.
async fn run(plan: &str, mode: &str) {
    let entries = corpus::load(&folder().join("corpus")).unwrap();
    let unstoppable = Unstoppable::load(&folder().join("unstoppable.txt")).unwrap();
    let rules = Rules { plan: plan.to_owned(), pool_mode: mode.to_owned(), ..Rules::default() };
    let Some(dev) = Dev::start(Path::new(env!("CARGO_BIN_EXE_pgusher")), &rules).await.unwrap() else {
        eprintln!("skipped: no PostgreSQL");
        return;
    };
    let target = dev.target(plan).unwrap();
    let fixture = Fixture::prepare(plan, &target).await.unwrap();
    let runner =
        Runner { target, fixture, plan: plan.to_owned(), mode: mode.to_owned(), patience: Duration::from_secs(10) };
    let mut outcomes = Vec::new();
    for entry in entries.iter().filter(|entry| runner.applies(entry)) {
        outcomes.push(runner.run(entry).await);
    }
    assert!(outcomes.len() > 30, "{} entries", outcomes.len());
    let summary = Summary::of(&outcomes, &unstoppable, plan, "compat", true);
    let bad = outcomes.iter().filter(|outcome| outcome.leaked || outcome.broken.is_some());
    let lines: Vec<String> = bad.map(|outcome| format!("{} {:?}", line(outcome), outcome.heard)).collect();
    assert!(summary.is_good(), "{plan}, {mode}:\n{}\n{}\n{}", lines.join("\n"), summary.text(), dev.log());
}

#[tokio::test]
async fn nothing_leaks_in_session_mode() {
    run("schema", "session").await;
}

#[tokio::test]
async fn nothing_leaks_in_transaction_mode() {
    run("schema", "transaction").await;
}

#[tokio::test]
async fn nothing_leaks_in_auto_mode() {
    run("schema", "auto").await;
}

/// The tests above are worth something only if a leak is seen as one.
#[tokio::test]
async fn a_leak_is_seen() {
    // The guard would stand before the wall.
    let guard = Some("off".to_owned());
    let rules = Rules { plan: "schema".to_owned(), pool_mode: "session".to_owned(), guard, ..Rules::default() };
    let Some(dev) = Dev::start(Path::new(env!("CARGO_BIN_EXE_pgusher")), &rules).await.unwrap() else {
        eprintln!("skipped: no PostgreSQL");
        return;
    };
    let target = dev.target("schema").unwrap();
    let (admin, connection) =
        tokio_postgres::connect(&target.admins["client_001"], tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    // A wall with a door.
    admin
        .batch_execute("GRANT USAGE ON SCHEMA client_002 TO client_001; GRANT client_002 TO client_001")
        .await
        .unwrap();
    let fixture = Fixture::prepare("schema", &target).await.unwrap();
    let runner = Runner {
        target,
        fixture,
        plan: "schema".to_owned(),
        mode: "session".to_owned(),
        patience: Duration::from_secs(10),
    };
    let entry = |json: &str| serde_json::from_str::<Entry>(json).unwrap();
    let read = entry(
        r#"{"id": "read", "plan": ["schema"], "sql": ["SELECT note FROM client_002.bookings"],
            "leak_if": {"sql_regex": "SECRET_OF_client_002"}}"#,
    );
    let write = entry(
        r#"{"id": "write", "plan": ["schema"], "sql": ["UPDATE client_002.bookings SET note = 'PWNED'"],
            "link": "concurrent", "then_as": "tenant_b", "then_sql": ["SELECT note FROM bookings"]}"#,
    );
    let wire = entry(
        r#"{"id": "wire", "plan": ["schema"], "leak_if": {"regex": "SECRET_OF_client_002"},
            "steps": [["conn", "a", "tenant_a", {}],
                      ["send", "a", [["P", "", "SELECT note FROM client_002.bookings"], ["B", "", "", []], ["E", ""], ["S"]]],
                      ["recv", "a", 1]]}"#,
    );
    let grant = entry(r#"{"id": "grant", "plan": ["schema"], "sql": ["ALTER ROLE client_001 SET work_mem = '1MB'"]}"#);
    let (read, write, wire) = (runner.run(&read).await, runner.run(&write).await, runner.run(&wire).await);
    assert!(read.leaked && read.rows_crossed, "{read:?}");
    assert!(write.leaked && write.rows_crossed, "{write:?}");
    assert!(wire.leaked, "{wire:?}");
    // What is a tenant's own to change is no leak, and is put back.
    let grant = runner.run(&grant).await;
    assert!(!grant.leaked && grant.broken.is_none(), "{grant:?}");
    assert_eq!(runner.fixture.reset().await.unwrap(), Vec::<String>::new());
}
