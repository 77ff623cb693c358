//! Every metric, declared once.
//!
//! What the hot path counts is kept per worker thread and per tenant, in atomics that only one thread writes in steady
//! state, and is added up when somebody scrapes.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use dashmap::DashMap;
use parking_lot::Mutex;

use crate::tenant::CANARY_PREFIX;
use crate::violation::{Desk, Violation};

/// Upper bounds of the time histograms, in microseconds.
pub const TIME_BUCKETS: [u64; 18] = [
    100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000,
    5_000_000, 10_000_000, 30_000_000, 60_000_000,
];

/// Adds to a counter that only the calling thread writes: a tenth of what an addition costs that others may write too.
#[inline]
pub fn count(counter: &AtomicU64, by: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(by), Ordering::Relaxed);
}

/// Moves a gauge that only the calling thread writes.
#[inline]
pub fn shift(gauge: &AtomicUsize, by: isize) {
    gauge.store(gauge.load(Ordering::Relaxed).wrapping_add_signed(by), Ordering::Relaxed);
}

/// A histogram of durations, written by one thread.
#[derive(Debug, Default)]
pub struct Times {
    buckets: [AtomicU64; TIME_BUCKETS.len() + 1],
    sum_us: AtomicU64,
}

impl Times {
    /// Adds one duration.
    #[inline]
    pub fn observe(&self, time: Duration) {
        let us = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let at = TIME_BUCKETS.iter().position(|&bound| us <= bound).unwrap_or(TIME_BUCKETS.len());
        count(&self.buckets[at], 1);
        count(&self.sum_us, us);
    }

    /// Count per bucket (not cumulative; the last one is above every bound), and the sum in microseconds.
    pub fn read(&self) -> ([u64; TIME_BUCKETS.len() + 1], u64) {
        let counts = std::array::from_fn(|i| self.buckets[i].load(Ordering::Relaxed));
        (counts, self.sum_us.load(Ordering::Relaxed))
    }
}

/// What one worker thread counts.
#[derive(Debug, Default)]
pub struct WorkerStats {
    /// Client statements: simple queries and executes.
    pub queries: AtomicU64,
    /// Server connections given back after a transaction.
    pub transactions: AtomicU64,
    /// From the first byte sent to the server to the answer's end.
    pub query_time: Times,
    /// How long a server connection was lent.
    pub transaction_time: Times,
    /// How long clients waited for a server connection.
    pub wait_time: Times,
    /// Bytes received from clients.
    pub client_in: AtomicU64,
    /// Bytes sent to clients.
    pub client_out: AtomicU64,
    /// Bytes received from servers.
    pub server_in: AtomicU64,
    /// Bytes sent to servers.
    pub server_out: AtomicU64,
    /// Clients that hold a server connection now.
    pub clients_active: AtomicUsize,
    /// Clients that wait for one now.
    pub clients_waiting: AtomicUsize,
    /// Clients that keep one between transactions now, by [`PIN_REASONS`].
    pub clients_pinned: [AtomicUsize; PIN_REASONS.len()],
}

/// Why a client keeps its server connection between transactions.
pub const PIN_REASONS: [&str; 10] =
    ["temp", "cursor", "prepare", "listen", "lock", "role", "sequence", "seed", "process", "unknown"];

/// Notifications, by what became of them.
#[derive(Debug, Default)]
pub struct Notified {
    /// Delivered to a client.
    pub delivered: AtomicU64,
    /// Dropped: another tenant's.
    pub foreign: AtomicU64,
    /// Dropped: nobody could say that it was the tenant's own.
    pub unknown: AtomicU64,
    /// Server connections that listen for the clients of a tenant now.
    pub listeners: AtomicUsize,
}

/// What is counted per shard.
#[derive(Debug, Default)]
pub struct ShardStats {
    /// Logins to the server that succeeded.
    pub logins_ok: AtomicU64,
    /// Logins to the server that failed.
    pub logins_failed: AtomicU64,
    /// Idle connections closed in favour of another tenant.
    pub evictions: AtomicU64,
}

/// Seconds that the rate of a tenant's statements is averaged over.
const RATE_WINDOW: u64 = 10;

/// What is counted per tenant, while it has clients.
#[derive(Debug)]
pub struct TenantStats {
    /// Statements in each of the last seconds: `second << 32 | count`.
    window: [AtomicU64; RATE_WINDOW as usize + 1],
    /// Client statements since the tenant's first client.
    pub queries: AtomicU64,
    /// Transactions since the tenant's first client.
    pub transactions: AtomicU64,
    /// Errors that the server sent.
    pub errors: AtomicU64,
    /// Bytes received from the tenant's clients.
    pub client_in: AtomicU64,
    /// Bytes sent to the tenant's clients.
    pub client_out: AtomicU64,
    /// Clients connected now.
    pub clients: AtomicUsize,
}

/// One client more of a tenant, as long as this lives.
#[derive(Debug)]
pub struct Present(Arc<TenantStats>);

impl Present {
    /// Counts it.
    pub fn new(stats: Arc<TenantStats>) -> Self {
        stats.clients.fetch_add(1, Ordering::Relaxed);
        Self(stats)
    }
}

impl std::ops::Deref for Present {
    type Target = TenantStats;

    #[inline]
    fn deref(&self) -> &TenantStats {
        &self.0
    }
}

impl Drop for Present {
    fn drop(&mut self) {
        self.0.clients.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Default for TenantStats {
    fn default() -> Self {
        Self {
            window: Default::default(),
            queries: 0.into(),
            transactions: 0.into(),
            errors: 0.into(),
            client_in: 0.into(),
            client_out: 0.into(),
            clients: 0.into(),
        }
    }
}

impl TenantStats {
    /// Counts statements; `second` is any clock that grows by one a second.
    #[inline]
    pub fn count_queries(&self, n: u32, second: u64) {
        count(&self.queries, u64::from(n));
        let slot = &self.window[(second % self.window.len() as u64) as usize];
        let old = slot.load(Ordering::Relaxed);
        let so_far = if old >> 32 == second & 0xffff_ffff { old & 0xffff_ffff } else { 0 };
        slot.store((second << 32) | (so_far + u64::from(n)), Ordering::Relaxed);
    }

    /// Statements per second over the last full [`RATE_WINDOW`] seconds.
    pub fn rate(&self, second: u64) -> f64 {
        let recent = |stamp: u64| (1..=RATE_WINDOW).contains(&second.saturating_sub(stamp));
        let counts = self.window.iter().map(|slot| slot.load(Ordering::Relaxed));
        let sum: u64 = counts.filter(|v| recent(v >> 32)).map(|v| v & 0xffff_ffff).sum();
        sum as f64 / RATE_WINDOW as f64
    }
}

/// Labels of a violation: kind, action, tenant.
pub type ViolationKey = (&'static str, &'static str, String);

/// Everything that is counted.
#[derive(Debug)]
pub struct Metrics {
    started: std::time::Instant,
    workers: Vec<Arc<WorkerStats>>,
    shards: DashMap<String, Arc<ShardStats>>,
    tenants: DashMap<String, Arc<TenantStats>>,
    errors: DashMap<(String, &'static str), u64>,
    violations: Mutex<HashMap<ViolationKey, u64>>,
    /// Notifications.
    pub notified: Arc<Notified>,
    /// Attempts of the canary's that were stopped by somebody who counts.
    pub canary_seen: AtomicU64,
    /// Where violations are written down.
    pub desk: Desk,
    /// Clients connected, logging in included.
    pub clients: AtomicUsize,
    /// Clients ever accepted.
    pub clients_total: AtomicU64,
    /// Client logins that succeeded.
    pub client_logins_ok: AtomicU64,
    /// Client logins that failed.
    pub client_logins_failed: AtomicU64,
}

/// Most tenants that get a violation label of their own; later ones share `other`.
const VIOLATION_TENANTS: usize = 1000;

impl Metrics {
    /// Nothing counted yet, for so many worker threads.
    pub fn new(workers: usize) -> Self {
        Self {
            started: std::time::Instant::now(),
            workers: (0..workers.max(1)).map(|_| Arc::default()).collect(),
            shards: DashMap::new(),
            tenants: DashMap::new(),
            errors: DashMap::new(),
            violations: Mutex::default(),
            notified: Arc::default(),
            canary_seen: 0.into(),
            desk: Desk::default(),
            clients: 0.into(),
            clients_total: 0.into(),
            client_logins_ok: 0.into(),
            client_logins_failed: 0.into(),
        }
    }

    /// Seconds since the start, the clock of [`TenantStats::rate`].
    pub fn second(&self, now: std::time::Instant) -> u64 {
        now.saturating_duration_since(self.started).as_secs()
    }

    /// The counters of worker `at`.
    pub fn worker(&self, at: usize) -> Arc<WorkerStats> {
        self.workers[at % self.workers.len()].clone()
    }

    /// All workers' counters.
    pub fn workers(&self) -> &[Arc<WorkerStats>] {
        &self.workers
    }

    /// A shard's counters.
    pub fn shard(&self, name: &str) -> Arc<ShardStats> {
        if let Some(stats) = self.shards.get(name) {
            return stats.clone();
        }
        self.shards.entry(name.to_owned()).or_default().clone()
    }

    /// All shards' counters.
    pub fn shards(&self) -> Vec<(String, Arc<ShardStats>)> {
        self.shards.iter().map(|e| (e.key().clone(), e.value().clone())).collect()
    }

    /// A tenant's counters, made when its first client comes.
    pub fn tenant(&self, id: &str) -> Arc<TenantStats> {
        if let Some(stats) = self.tenants.get(id) {
            return stats.clone();
        }
        self.tenants.entry(id.to_owned()).or_default().clone()
    }

    /// A tenant's counters, if it has any.
    pub fn find_tenant(&self, id: &str) -> Option<Arc<TenantStats>> {
        self.tenants.get(id).map(|stats| stats.clone())
    }

    /// Tenants that have counters.
    pub fn tenants(&self) -> Vec<(String, Arc<TenantStats>)> {
        self.tenants.iter().map(|e| (e.key().clone(), e.value().clone())).collect()
    }

    /// Forgets the counters of tenants that have had no client for a while.
    pub fn forget_idle_tenants(&self, second: u64) {
        self.tenants
            .retain(|_, t| t.clients.load(Ordering::Relaxed) > 0 || Arc::strong_count(t) > 1 || t.rate(second) > 0.0);
    }

    /// Counts an error by SQLSTATE and by who made it (`server` or `proxy`).
    pub fn count_error(&self, code: &str, origin: &'static str) {
        let known = code.len() == 5 && code.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit());
        let code = if known && self.errors.len() < 1000 { code } else { "other" };
        *self.errors.entry((code.to_owned(), origin)).or_default() += 1;
    }

    /// Errors by SQLSTATE and origin.
    pub fn errors(&self) -> Vec<((String, &'static str), u64)> {
        self.errors.iter().map(|e| (e.key().clone(), *e.value())).collect()
    }

    /// Counts an attempt to reach outside a tenant's own seat, and has it written down.
    ///
    /// What pgusher's own throwaway tenants try is counted apart: nobody has to look.
    pub fn report(&self, violation: Violation) {
        if violation.tenant.starts_with(CANARY_PREFIX) {
            self.canary_seen.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let Violation { kind, action, ref tenant, ref who, ref from, ref what, .. } = violation;
        let (kind, action) = (kind.as_str(), action.as_str());
        tracing::warn!(tenant, who, from, kind, action, what, "isolation violation");
        self.count_violation(kind, action, tenant);
        self.desk.hand_in(violation);
    }

    fn count_violation(&self, kind: &'static str, action: &'static str, tenant: &str) {
        let mut violations = self.violations.lock();
        let known = violations.len() < VIOLATION_TENANTS || violations.keys().any(|(_, _, t)| t == tenant);
        let tenant = if known { tenant } else { "other" };
        *violations.entry((kind, action, tenant.to_owned())).or_default() += 1;
    }

    /// Violations by kind, action and tenant.
    pub fn violations(&self) -> Vec<(ViolationKey, u64)> {
        self.violations.lock().iter().map(|(key, n)| (key.clone(), *n)).collect()
    }
}
