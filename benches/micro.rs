//! Times of the small things that a query or a login consists of: `cargo bench --bench micro`.

#![allow(missing_docs, reason = "measurements")]

mod cases;

use cases::{Checkout, Conversation, Framing, Login, Lookup};
use divan::Bencher;

fn main() {
    divan::main();
}

#[divan::bench]
fn framing_100_frames(bencher: Bencher<'_, '_>) {
    let case = Framing::new();
    bencher.bench_local(|| case.run());
}

#[divan::bench]
fn session_simple_query(bencher: Bencher<'_, '_>) {
    let mut case = Conversation::simple();
    bencher.bench_local(|| case.run());
}

#[divan::bench]
fn session_prepared(bencher: Bencher<'_, '_>) {
    let mut case = Conversation::prepared();
    bencher.bench_local(|| case.run());
}

#[divan::bench(args = [cases::SELECT, cases::LONG])]
fn scan(sql: &str) -> bool {
    cases::scan(sql)
}

#[divan::bench]
fn guard_suspicious() -> bool {
    cases::judge(cases::SUSPICIOUS)
}

#[divan::bench(args = [1_000, 50_000, 500_000])]
fn directory(bencher: Bencher<'_, '_>, tenants: usize) {
    let mut case = Lookup::new(tenants);
    bencher.bench_local(|| case.run());
}

#[divan::bench]
fn pool_checkout_and_back(bencher: Bencher<'_, '_>) {
    let case = Checkout::new();
    bencher.bench_local(|| case.run());
}

#[divan::bench]
fn scram_server(bencher: Bencher<'_, '_>) {
    let case = Login::new();
    bencher.bench_local(|| case.run());
}
