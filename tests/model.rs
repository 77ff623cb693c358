//! A model test whose model is PostgreSQL itself: random sessions of several clients run on a server, and through
//! `pool_mode = "auto"` over fewer server connections than clients. Every answer must be the same.
//!
//! `make test-model STATEMENTS=1000000 SEED=1 JOBS=2` runs it at length (`SECONDS=150`: for no longer than
//! that). A case that fails is shown with as few steps as still show it; `CASE=<its seed>` runs that case alone.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![allow(clippy::print_stdout, reason = "a long test says how far it is")]

#[path = "model/pair.rs"]
mod pair;
#[path = "support/postgres.rs"]
#[allow(dead_code, unreachable_pub, reason = "each test binary uses a part of it")]
mod postgres;
#[path = "integration/raw.rs"]
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod raw;
#[path = "model/script.rs"]
mod script;
#[path = "integration/world.rs"]
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod world;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use pair::Pair;
use script::Dice;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().filter(|text| !text.is_empty()).map(|text| text.parse().unwrap())
}

/// Runs cases until there were so many statements; returns how many differed.
async fn run(statements: usize, seed: u64, jobs: usize) -> usize {
    let (pair, done, wrong) =
        (Arc::new(Pair::start().await), Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    // Whole cases, until one of the two is reached.
    let until = number("SECONDS").map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let most = number("FAILURES").map_or(3, |n| usize::try_from(n).unwrap());
    let job = async |job: usize| {
        let (pair, done, wrong) = (pair.clone(), done.clone(), wrong.clone());
        tokio::spawn(async move {
            let tenant = format!("model_{job}");
            pair.prepare(&tenant).await;
            let mut seeds = Dice::new(seed.wrapping_add(u64::try_from(job).unwrap() << 32));
            let mut cases = 0_usize;
            let in_time = || until.is_none_or(|until| Instant::now() < until);
            while in_time() && done.load(Ordering::Relaxed) < statements && wrong.load(Ordering::Relaxed) < most {
                let case = number("CASE").unwrap_or_else(|| seeds.next());
                match pair.case(&tenant, case).await {
                    Ok(statements) => drop(done.fetch_add(statements, Ordering::Relaxed)),
                    Err(failure) => {
                        wrong.fetch_add(1, Ordering::Relaxed);
                        let all = failure.steps.len();
                        let small = pair.shrink(&tenant, case, failure).await;
                        println!("DIFFERENT seed {seed} case {case} ({} of {all} steps):\n{small}", small.steps.len());
                    }
                }
                cases += 1;
                if cases.is_multiple_of(20) {
                    println!("job {job}: {cases} cases, {} statements so far", done.load(Ordering::Relaxed));
                }
                if number("CASE").is_some() {
                    break;
                }
            }
        })
        .await
        .unwrap();
    };
    println!("seed {seed}");
    futures_util::future::join_all((0..jobs).map(job)).await;
    let (done, wrong) = (done.load(Ordering::Relaxed), wrong.load(Ordering::Relaxed));
    println!("seed {seed}: {done} statements, {wrong} differences");
    wrong
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_few_random_sessions_are_the_same_direct_and_through_auto() {
    assert_eq!(run(4_000, number("SEED").unwrap_or(4), 2).await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
#[ignore = "long: make test-model"]
async fn many_random_sessions_are_the_same_direct_and_through_auto() {
    let statements = number("STATEMENTS").unwrap_or(1_000_000);
    let seed = number("SEED").unwrap_or_else(|| u64::from(std::process::id()) << 20);
    let jobs = number("JOBS").unwrap_or(2);
    assert_eq!(run(usize::try_from(statements).unwrap(), seed, usize::try_from(jobs).unwrap()).await, 0);
}
