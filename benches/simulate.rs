//! Half a million tenants on fifty shards, simulated: `make simulate`.
//!
//! Placement is done by the real [`Ring`]. Server connections follow the rules of `src/pool`: a transaction takes its
//! tenant's idle connection that was used last; without one it logs in, if `max_db_connections` is reached in the place
//! of the shard's idle connection that was used longest ago; idle connections are closed after `server_idle_timeout`.
//!
//! Tenants are as active as Zipf's law has it. Somebody comes, does some transactions with pauses to think, and goes.
//! Prints tables and draws `docs/scale.svg`. Deterministic: the same program prints the same numbers.

#![allow(clippy::unwrap_used, missing_docs, reason = "a simulation")]

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, HashMap};
use std::fmt::Write as _;

use pgusher::directory::ring::Ring;

const TENANTS: usize = 500_000;
const SHARDS: usize = 50;
/// Exponent of Zipf's law.
const ZIPF: f64 = 1.0;
/// Visits per tenant and hour, on average over all.
const VISITS_PER_HOUR: f64 = 1.0;
/// Transactions of a visit, on average.
const TRANSACTIONS: f64 = 20.0;
/// Median of the pauses between them (seconds), and how far they scatter (of the logarithm).
const THINK: (f64, f64) = (3.0, 1.0);
/// A transaction's time on the server (seconds), and a login's.
const BUSY: f64 = 0.005;
/// Simulated time, of which the first part only fills the pools (seconds).
const TIME: f64 = 3.0 * 3600.0;
const WARM_UP: f64 = 3600.0;

const LIMITS: [usize; 6] = [20, 40, 80, 160, 320, 640];
const TIMEOUTS: [(f64, &str); 4] = [(10.0, "10 s"), (60.0, "1 min"), (600.0, "10 min"), (3600.0, "1 h")];

/// xorshift64*
struct Random(u64);

impl Random {
    fn next(&mut self) -> f64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn exponential(&mut self, mean: f64) -> f64 {
        -mean * (1.0 - self.next()).ln()
    }

    fn think(&mut self) -> f64 {
        let normal = (-2.0 * (1.0 - self.next()).ln()).sqrt() * (std::f64::consts::TAU * self.next()).cos();
        THINK.0 * (THINK.1 * normal).exp()
    }
}

fn ring(shards: usize) -> Ring {
    let names: Vec<String> = (1..=shards).map(|n| format!("shard_{n}")).collect();
    Ring::new(names.iter().map(|name| (name.as_str(), 100)))
}

fn id(tenant: usize) -> String {
    format!("client_{tenant:06}")
}

/// The tenants of each shard, and each tenant's share of all visits. Who is how active has nothing to do with names.
struct World {
    shards: Vec<Vec<usize>>,
    share: Vec<f64>,
}

impl World {
    fn new() -> Self {
        let (ring, mut random) = (ring(SHARDS), Random(42));
        let mut ranks: Vec<usize> = (0..TENANTS).collect();
        for at in (1..TENANTS).rev() {
            ranks.swap(at, (random.next() * (at + 1) as f64) as usize);
        }
        let total: f64 = (1..=TENANTS).map(|rank| (rank as f64).powf(-ZIPF)).sum();
        let share = ranks.iter().map(|&rank| ((rank + 1) as f64).powf(-ZIPF) / total).collect();
        let mut by_name: HashMap<String, Vec<usize>> = HashMap::new();
        for tenant in 0..TENANTS {
            by_name.entry(ring.place(&id(tenant)).unwrap().to_owned()).or_default().push(tenant);
        }
        let mut shards: Vec<_> = by_name.into_values().collect();
        shards.sort();
        Self { shards, share }
    }

    fn activity(&self, shard: usize) -> f64 {
        self.shards[shard].iter().map(|&tenant| self.share[tenant]).sum()
    }

    /// Largest over mean, of tenants and of activity; and what a shard more takes over.
    fn report_balance(&self) {
        let mean = TENANTS as f64 / SHARDS as f64;
        let counts: Vec<usize> = self.shards.iter().map(Vec::len).collect();
        let busiest = (0..SHARDS).map(|shard| self.activity(shard)).fold(0.0, f64::max) * SHARDS as f64;
        println!("ring: {TENANTS} tenants on {SHARDS} shards");
        println!("  largest shard over mean: {:.3}", *counts.iter().max().unwrap() as f64 / mean);
        println!("  smallest shard over mean: {:.3}", *counts.iter().min().unwrap() as f64 / mean);
        println!("  most active shard over mean: {busiest:.2}");
        println!(
            "  the most active tenant has {:.1} % of all activity",
            self.share.iter().fold(0.0, |a: f64, &b| a.max(b)) * 100.0
        );
        let (before, after, new) = (ring(SHARDS), ring(SHARDS + 1), format!("shard_{}", SHARDS + 1));
        let (mut taken, mut elsewhere) = (0, 0);
        for id in (0..TENANTS).map(id) {
            let (was, is) = (before.place(&id), after.place(&id));
            taken += usize::from(is == Some(&new));
            elsewhere += usize::from(is != was && is != Some(&new));
        }
        let expected = TENANTS / (SHARDS + 1);
        println!(
            "  shard {} takes {taken} of them ({expected} would be its share), and {elsewhere} go elsewhere",
            SHARDS + 1
        );
    }
}

/// Something that happens. Times are in microseconds, which have an order.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// A transaction of a visit; so many are to come after it.
    Transaction { tenant: usize, left: u32 },
    /// A server connection has done its work.
    Free { tenant: usize },
}

/// What one shard went through.
#[derive(Default, Clone, Copy)]
struct Outcome {
    transactions: f64,
    logins: f64,
    evictions: f64,
    waits: f64,
    open: f64,
}

/// The server connections of one shard.
struct Shard {
    limit: usize,
    timeout: u64,
    open: usize,
    /// Idle ones by when they were used last; a number makes equal times differ.
    idle: BTreeSet<(u64, u64, usize)>,
    by_tenant: HashMap<usize, Vec<(u64, u64)>>,
    serial: u64,
}

impl Shard {
    /// Closes the idle connection that was used longest ago, if it was before then.
    fn close_oldest(&mut self, before: u64) -> bool {
        let Some(&(used, serial, tenant)) = self.idle.first() else { return false };
        if used >= before {
            return false;
        }
        self.idle.pop_first();
        let connections = self.by_tenant.get_mut(&tenant).unwrap();
        connections.retain(|connection| *connection != (used, serial));
        if connections.is_empty() {
            self.by_tenant.remove(&tenant);
        }
        self.open -= 1;
        true
    }

    /// Takes a connection for a tenant; what it took to have one.
    fn take(&mut self, tenant: usize, now: u64, outcome: &mut Outcome) -> bool {
        while self.close_oldest(now.saturating_sub(self.timeout)) {}
        if let Some(connections) = self.by_tenant.get_mut(&tenant) {
            let (used, serial) = connections.pop().unwrap();
            if connections.is_empty() {
                self.by_tenant.remove(&tenant);
            }
            self.idle.remove(&(used, serial, tenant));
            return true;
        }
        if self.open >= self.limit {
            if !self.close_oldest(u64::MAX) {
                return false;
            }
            outcome.evictions += 1.0;
        }
        self.open += 1;
        outcome.logins += 1.0;
        true
    }

    fn give(&mut self, tenant: usize, now: u64) {
        self.serial += 1;
        self.idle.insert((now, self.serial, tenant));
        self.by_tenant.entry(tenant).or_default().push((now, self.serial));
    }
}

const fn micros(seconds: f64) -> u64 {
    (seconds * 1e6) as u64
}

/// Three hours of one shard; rates per second.
fn simulate(world: &World, shard: usize, limit: usize, timeout: f64) -> Outcome {
    let tenants = &world.shards[shard];
    let mut sum = 0.0;
    let sums: Vec<f64> = tenants
        .iter()
        .map(|&tenant| {
            sum += world.share[tenant];
            sum
        })
        .collect();
    let between_visits = 3600.0 / (VISITS_PER_HOUR * TENANTS as f64 * sum);
    let mut random = Random(7 + shard as u64);
    let mut pool =
        Shard { limit, timeout: micros(timeout), open: 0, idle: BTreeSet::new(), by_tenant: HashMap::new(), serial: 0 };
    let (mut events, mut outcome, mut measured) = (BinaryHeap::new(), Outcome::default(), false);
    let mut next_visit = 0.0;
    while next_visit < TIME {
        let pick = random.next() * sum;
        let at = sums.partition_point(|&below| below < pick).min(tenants.len() - 1);
        let left = random.exponential(TRANSACTIONS - 1.0).round() as u32;
        events.push(Reverse((micros(next_visit), Event::Transaction { tenant: tenants[at], left })));
        next_visit += random.exponential(between_visits);
        // Everything up to the next visit.
        while events.peek().is_some_and(|Reverse((at, _))| *at <= micros(next_visit)) {
            let Reverse((now, event)) = events.pop().unwrap();
            if !measured && now >= micros(WARM_UP) {
                (outcome, measured) = (Outcome::default(), true);
            }
            match event {
                Event::Free { tenant } => pool.give(tenant, now),
                Event::Transaction { tenant, left } => {
                    if !pool.take(tenant, now, &mut outcome) {
                        outcome.waits += 1.0;
                        events.push(Reverse((now + micros(BUSY), Event::Transaction { tenant, left })));
                        continue;
                    }
                    outcome.transactions += 1.0;
                    outcome.open += pool.open as f64;
                    events.push(Reverse((now + micros(BUSY), Event::Free { tenant })));
                    if left > 0 {
                        let then = now + micros(BUSY + random.think());
                        events.push(Reverse((then, Event::Transaction { tenant, left: left - 1 })));
                    }
                }
            }
        }
    }
    let time = TIME - WARM_UP;
    Outcome {
        transactions: outcome.transactions / time,
        logins: outcome.logins / time,
        evictions: outcome.evictions / time,
        waits: outcome.waits / time,
        open: outcome.open / outcome.transactions,
    }
}

/// A shard of average activity: not the fullest, not the emptiest.
fn typical(world: &World) -> usize {
    let mut shards: Vec<usize> = (0..SHARDS).collect();
    shards.sort_by(|&a, &b| world.activity(a).total_cmp(&world.activity(b)));
    shards[SHARDS / 2]
}

type Curves = Vec<(&'static str, Vec<(usize, Outcome)>)>;

fn table(name: &str, world: &World, shard: usize) -> Curves {
    let mut curves = Curves::new();
    println!("\n{name}: {} tenants", world.shards[shard].len());
    println!(
        "| max_db_connections | server_idle_timeout | tx/s | logins/s | hit rate | evictions/s | waits/s | open |"
    );
    println!("|--:|--:|--:|--:|--:|--:|--:|--:|");
    for (timeout, label) in TIMEOUTS {
        let mut curve = Vec::new();
        for limit in LIMITS {
            let o = simulate(world, shard, limit, timeout);
            let hits = 100.0 * (1.0 - o.logins / o.transactions);
            println!(
                "| {limit} | {label} | {:.0} | {:.2} | {hits:.1} % | {:.2} | {:.2} | {:.0} |",
                o.transactions, o.logins, o.evictions, o.waits, o.open
            );
            curve.push((limit, o));
        }
        curves.push((label, curve));
    }
    curves
}

const COLORS: [&str; 4] = ["#c0392b", "#d68910", "#1e8449", "#1f618d"];

/// One plot: a value by max_db_connections (logarithmic), a line per timeout.
fn plot(
    svg: &mut String,
    left: f64,
    title: &str,
    top: f64,
    unit: &str,
    curves: &Curves,
    value: impl Fn(&Outcome) -> f64,
) {
    let (width, height, base) = (270.0, 200.0, 250.0);
    let x = |limit: usize| {
        left + width * (limit as f64 / LIMITS[0] as f64).ln()
            / (LIMITS[LIMITS.len() - 1] as f64 / LIMITS[0] as f64).ln()
    };
    let y = |v: f64| base - height * (v / top).min(1.0);
    let _ = writeln!(svg, r#"<text x="{left}" y="30" font-weight="bold">{title}</text>"#);
    for step in 0..=4 {
        let v = top * f64::from(step) / 4.0;
        let _ = writeln!(
            svg,
            r##"<path d="M{left} {0:.0}h{width}" stroke="#ccc"/><text x="{1}" y="{2:.0}" text-anchor="end">{v:.0}{unit}</text>"##,
            y(v),
            left - 6.0,
            y(v) + 4.0
        );
    }
    for limit in LIMITS {
        let _ = writeln!(svg, r#"<text x="{:.0}" y="{}" text-anchor="middle">{limit}</text>"#, x(limit), base + 18.0);
    }
    let _ = writeln!(
        svg,
        r#"<text x="{}" y="{}" text-anchor="middle">max_db_connections</text>"#,
        left + width / 2.0,
        base + 38.0
    );
    for ((label, curve), color) in curves.iter().zip(COLORS) {
        let points: Vec<String> = curve.iter().map(|(l, o)| format!("{:.1},{:.1}", x(*l), y(value(o)))).collect();
        let _ = writeln!(
            svg,
            r#"<polyline points="{}" fill="none" stroke="{color}" stroke-width="2"><title>{label}</title></polyline>"#,
            points.join(" ")
        );
    }
}

fn draw(curves: &Curves) -> String {
    let mut svg = String::from(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 740 330\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"740\" height=\"330\" fill=\"#fff\"/>\n",
    );
    let most = curves.iter().flat_map(|(_, curve)| curve.iter().map(|(_, o)| o.logins)).fold(0.0, f64::max);
    let top = (most / 10.0).ceil() * 10.0;
    plot(&mut svg, 60.0, "logins per second to a shard", top, "", curves, |o| o.logins);
    plot(&mut svg, 430.0, "transactions that find a connection", 100.0, " %", curves, |o| {
        100.0 * (1.0 - o.logins / o.transactions)
    });
    svg.push_str("<text x=\"60\" y=\"318\">server_idle_timeout:</text>\n");
    for (at, ((label, _), color)) in curves.iter().zip(COLORS).enumerate() {
        let left = 190 + at * 90;
        let _ = writeln!(
            svg,
            r#"<path d="M{left} 314h24" stroke="{color}" stroke-width="3"/><text x="{}" y="318">{label}</text>"#,
            left + 30
        );
    }
    svg.push_str("</svg>\n");
    svg
}

fn main() {
    // `cargo bench` without a name runs this too.
    if std::env::args().any(|argument| argument == "--test" || argument == "--list") {
        return;
    }
    let world = World::new();
    world.report_balance();
    let curves = table("a typical shard", &world, typical(&world));
    let busiest = (0..SHARDS).max_by(|&a, &b| world.activity(a).total_cmp(&world.activity(b))).unwrap();
    table("the most active shard", &world, busiest);
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/scale.svg");
    std::fs::write(file, draw(&curves)).unwrap();
    println!("\ndrawn: {file}");
}
