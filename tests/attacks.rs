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

/// What the README says cannot be stopped is what the list says: id, plan and grade, each with a reason in both.
#[test]
fn the_readme_has_the_list_of_what_cannot_be_stopped() {
    let list = std::fs::read_to_string(folder().join("unstoppable.txt")).unwrap();
    let of_list = |line: &str| line.split_whitespace().take(3).map(str::to_owned).collect::<Vec<_>>();
    let lines = list.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#'));
    let listed: std::collections::BTreeSet<Vec<String>> = lines.map(of_list).collect();
    let readme = std::fs::read_to_string(folder().join("../../README.md")).unwrap();
    let (_, table) = readme.split_once("| attacks | plan | grade | why |\n|---|---|---|---|\n").unwrap();
    let mut told = std::collections::BTreeSet::new();
    for row in table.lines().take_while(|line| line.starts_with('|')) {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let [ids, plan, grade, why] = cells.as_slice() else { panic!("{row}") };
        assert!(why.len() >= 8, "{row}");
        for id in ids.split_whitespace() {
            let entry = [id, plan, grade].map(|cell| cell.trim_matches('`').to_owned()).to_vec();
            assert!(told.insert(entry), "twice: {row}");
        }
    }
    assert_eq!(told, listed);
    // How long the lists may be: strict as the best that was measured without a guard, compat ten more.
    let count = |plan: &str, grade: &str| listed.iter().filter(|e| e[1] == plan && e[2] == grade).count();
    for (plan, most) in [("schema", 18), ("rls", 5), ("database", 1)] {
        let any = count(plan, "any");
        assert!(any <= most && any + count(plan, "compat") <= most + 10, "{plan}");
    }
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
