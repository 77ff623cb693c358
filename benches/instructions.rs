//! Instructions of the small things that a query or a login consists of, counted by callgrind, which does not jitter:
//! `cargo bench --bench instructions`. Needs valgrind, and `cargo install gungraun-runner --version 0.20.0`.

#![allow(missing_docs, reason = "measurements")]

mod cases;

use cases::{Checkout, Conversation, Framing, Login, Lookup};
use gungraun::{library_benchmark, library_benchmark_group, main};

#[library_benchmark]
#[bench::frames_100(Framing::new())]
fn framing(case: Framing) -> (usize, Framing) {
    (case.run(), case)
}

#[library_benchmark]
#[bench::simple(warm(Conversation::simple()))]
#[bench::prepared(warm(Conversation::prepared()))]
fn session(mut case: Conversation) -> (bool, Conversation) {
    (case.run(), case)
}

fn warm(mut case: Conversation) -> Conversation {
    case.run();
    case
}

#[library_benchmark]
#[bench::short(cases::SELECT)]
#[bench::long(cases::LONG)]
fn scan(sql: &str) -> bool {
    cases::scan(sql)
}

#[library_benchmark]
#[bench::suspicious(cases::SUSPICIOUS)]
fn guard(sql: &str) -> bool {
    cases::judge(sql)
}

#[library_benchmark]
#[bench::tenants_1000(Lookup::new(1_000))]
#[bench::tenants_50000(Lookup::new(50_000))]
fn directory(mut case: Lookup) -> Lookup {
    case.run();
    case
}

#[library_benchmark]
#[bench::and_back(Checkout::new())]
fn checkout(case: Checkout) -> Checkout {
    case.run();
    case
}

#[library_benchmark]
#[bench::server(Login::new())]
fn scram(case: Login) -> Login {
    case.run();
    case
}

library_benchmark_group!(name = all, benchmarks = [framing, session, scan, guard, directory, checkout, scram]);
main!(library_benchmark_groups = all);
