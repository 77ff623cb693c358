//! The budget of server connections to one shard, shared by all of its tenants' pools.
//!
//! Invariant: open connections (those being opened included) never exceed the limit.
//!
//! A checkout that finds the budget spent first takes the slot of the least recently used idle connection of any
//! tenant; only if every connection is in use does its pool queue up here, first come, first served.
//!
//! "In use" is wider than "busy": a login costs as much as a hundred short transactions, so a connection that was used
//! a moment ago stays with its tenant until it has been open for a [quantum](Budget::quantum). Otherwise more tenants
//! than connections would log in for every transaction.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::time::Instant;

use super::Pool;
use super::connect::ServerConnection;
use super::faces::Faces;
use crate::metrics::ShardStats;

/// The budget of one shard.
pub struct Budget {
    limit: AtomicUsize,
    /// Length of the queue, readable without the lock at every check-in.
    waiting: AtomicUsize,
    /// What a login has taken of late (microseconds).
    login: AtomicU64,
    state: Mutex<State>,
    /// Counters of the shard.
    pub stats: Arc<ShardStats>,
    /// Whose its server processes are.
    pub faces: Arc<Faces>,
}

#[derive(Default)]
struct State {
    open: usize,
    pools: Vec<Weak<Pool>>,
    queue: VecDeque<Turn>,
    /// Whether a task looks for connections that fall idle while others wait.
    watched: bool,
    /// When a client was last asked to give way.
    called: Option<Instant>,
}

/// An idle connection that was used more recently than this counts as in use: for so many times what a login takes at
/// present ([`Budget::grace`]), within these bounds. Where logins are slow, so is everything else, and a client that pauses
/// for longer than on an idle machine has not gone to sleep.
const GRACE_IN_LOGINS: u32 = 4;
const MIN_GRACE: Duration = Duration::from_millis(10);
const MAX_GRACE: Duration = Duration::from_millis(250);

/// See [`Budget::patience`].
const LONGEST_PATIENCE: Duration = Duration::from_millis(50);

/// How much of a tenant's time with a connection the budget allows per connection: with `n` connections one comes of
/// age every 50 ms, which bounds both the logins (20 a second) and the newcomer's wait.
const SHARE: Duration = Duration::from_millis(50);

/// Longest time that a connection is kept from others who wait.
const LONGEST_QUANTUM: Duration = Duration::from_secs(5);

/// A place in the queue; void once the checkout that stands behind it is over.
struct Turn {
    since: Instant,
    pool: Weak<Pool>,
    ticket: Ticket,
}

/// Dies with the checkout that it was handed out by.
pub(super) type Ticket = Weak<()>;

impl Budget {
    /// A budget of `limit` connections.
    pub fn new(limit: usize, stats: Arc<ShardStats>, faces: Arc<Faces>) -> Self {
        Self { limit: limit.into(), waiting: 0.into(), login: 0.into(), state: Mutex::default(), stats, faces }
    }

    /// Connections open or being opened.
    pub fn open(&self) -> usize {
        self.state.lock().open
    }

    /// Whether a slot is free.
    pub(super) fn has_room(&self) -> bool {
        self.open() < self.limit.load(Ordering::Relaxed)
    }

    /// Changes the limit; connections above it go as they become idle.
    pub fn set_limit(&self, limit: usize) {
        self.limit.store(limit, Ordering::Relaxed);
    }

    /// Makes a pool known, as one whose idle connections may be evicted.
    pub(super) fn join(&self, pool: &Arc<Pool>) {
        let mut state = self.state.lock();
        state.pools.retain(|p| p.strong_count() > 0);
        state.pools.push(Arc::downgrade(pool));
    }

    /// Forgets a pool.
    pub(super) fn leave(&self, pool: &Pool) {
        self.state.lock().pools.retain(|p| !std::ptr::eq(p.as_ptr(), pool));
    }

    /// Live pools.
    pub(super) fn pools(&self) -> Vec<Arc<Pool>> {
        self.state.lock().pools.iter().filter_map(Weak::upgrade).collect()
    }

    /// Takes a slot if one is free.
    pub(super) fn try_reserve(&self) -> bool {
        let mut state = self.state.lock();
        let free = state.open < self.limit.load(Ordering::Relaxed);
        if free {
            state.open += 1;
        }
        free
    }

    /// Whether somebody waits for a slot. One relaxed load, for the check-in.
    pub(super) fn contended(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// When the one who has waited longest came.
    pub(super) fn oldest(&self) -> Option<Instant> {
        let mut state = self.state.lock();
        while state.queue.front().is_some_and(|turn| turn.ticket.strong_count() == 0) {
            state.queue.pop_front();
        }
        self.waiting.store(state.queue.len(), Ordering::Relaxed);
        state.queue.front().map(|turn| turn.since)
    }

    /// Queues a pool for the next free slot.
    pub(super) fn enqueue(&self, since: Instant, pool: &Arc<Pool>, ticket: Ticket) {
        let mut state = self.state.lock();
        let at = state.queue.partition_point(|turn| turn.since <= since);
        state.queue.insert(at, Turn { since, pool: Arc::downgrade(pool), ticket });
        self.waiting.store(state.queue.len(), Ordering::Relaxed);
    }

    /// Gives a slot back and hands it to whoever waits for one.
    pub(super) fn release(&self) {
        self.state.lock().open -= 1;
        self.grant();
    }

    /// Hands free slots to the queue.
    pub(super) fn grant(&self) {
        loop {
            let next = {
                let mut state = self.state.lock();
                if state.open >= self.limit.load(Ordering::Relaxed) {
                    return;
                }
                let Some(turn) = state.queue.pop_front() else { return };
                self.waiting.store(state.queue.len(), Ordering::Relaxed);
                let live = turn.ticket.strong_count() > 0;
                let Some(pool) = turn.pool.upgrade().filter(|_| live) else { continue };
                state.open += 1;
                pool
            };
            // The pool may have been served otherwise in the meantime: then the slot goes to the next one.
            if !next.open_with_slot() {
                self.state.lock().open -= 1;
            }
        }
    }

    /// How long a connection that is in use is kept for its tenant while others wait for one.
    pub(super) fn quantum(&self) -> Duration {
        let limit = u32::try_from(self.limit.load(Ordering::Relaxed)).unwrap_or(u32::MAX);
        SHARE.saturating_mul(limit).min(LONGEST_QUANTUM)
    }

    /// Notes how long a login took. Several at a time may forget one another, which does not matter.
    pub(super) fn note_login(&self, took: Duration) {
        let before = Duration::from_micros(self.login.load(Ordering::Relaxed));
        let micros = u64::try_from(smooth(before, took).as_micros()).unwrap_or(u64::MAX);
        self.login.store(micros, Ordering::Relaxed);
    }

    /// How long an idle connection counts as in use.
    fn grace(&self) -> Duration {
        grace(Duration::from_micros(self.login.load(Ordering::Relaxed)))
    }

    /// A pool to which no connection has come back for so long has none that is worth waiting for: it is used as long as
    /// an idle one counts as in use.
    pub(super) fn patience(&self) -> Duration {
        self.grace().min(LONGEST_PATIENCE)
    }

    /// Whether an idle connection may be closed for somebody else.
    pub(super) fn spares(&self, conn: &ServerConnection, now: Instant) -> bool {
        now.duration_since(conn.last_used) >= self.grace() || now.duration_since(conn.opened) >= self.quantum()
    }

    /// Closes the least recently used idle connection of another pool, so that its slot becomes free.
    ///
    /// Looks at every pool that has connections, of which there are at most as many as the limit.
    pub(super) fn evict_for(&self, wanting: Option<&Pool>) -> bool {
        let now = Instant::now();
        let is_own = |pool: &Arc<Pool>| wanting.is_some_and(|own| std::ptr::eq(Arc::as_ptr(pool), own));
        let oldest = self
            .pools()
            .into_iter()
            .filter(|pool| !is_own(pool))
            .filter_map(|pool| pool.oldest_idle(now).map(|since| (since, pool)))
            .min_by_key(|(since, _)| *since);
        let evicted = oldest.and_then(|(_, pool)| pool.take_oldest_idle(now));
        if evicted.is_some() {
            self.stats.evictions.fetch_add(1, Ordering::Relaxed);
        }
        // Dropping it releases its slot, which goes to the first in the queue.
        evicted.is_some()
    }

    /// Has a client give way that keeps its connection for nothing but the state of sequences. One at a time: what the last one
    /// has given up may go to who waits, as soon as it does not count as used any more.
    fn call_keeper(&self) {
        let (Some(waiting), now) = (self.oldest(), Instant::now()) else { return };
        if self.state.lock().called.is_some_and(|called| now.duration_since(called) < self.grace() + MIN_GRACE) {
            return;
        }
        let resting = |pool: Arc<Pool>| pool.resting_keeper(waiting, now).map(|since| (since, pool));
        if let Some((_, pool)) = self.pools().into_iter().filter_map(resting).min_by_key(|(since, _)| *since) {
            self.state.lock().called = Some(now);
            pool.call_keeper(waiting, now);
        }
    }

    /// Sees to it that connections which fall idle while others wait are closed for them.
    pub(super) fn watch(self: &Arc<Self>, worker: &Handle) {
        if !std::mem::replace(&mut self.state.lock().watched, true) {
            worker.spawn(close_idle(Arc::downgrade(self)));
        }
    }

    /// Whether the queue is still there to be watched for.
    fn is_watched(&self) -> bool {
        let queued = self.oldest().is_some();
        let mut state = self.state.lock();
        state.watched = queued || !state.queue.is_empty();
        state.watched
    }
}

/// What a login takes of late, after one that took so long.
fn smooth(before: Duration, took: Duration) -> Duration {
    if before.is_zero() { took } else { (before * 7).saturating_add(took) / 8 }
}

fn grace(login: Duration) -> Duration {
    (login.min(MAX_GRACE) * GRACE_IN_LOGINS).clamp(MIN_GRACE, MAX_GRACE)
}

/// Runs while anybody is in the queue.
async fn close_idle(budget: Weak<Budget>) {
    loop {
        tokio::time::sleep(MIN_GRACE).await;
        let Some(budget) = budget.upgrade().filter(|budget| budget.is_watched()) else { return };
        while budget.oldest().is_some() && budget.evict_for(None) {}
        budget.call_keeper();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_pauses_on_a_slow_machine_keeps_its_connection_for_longer() {
        let ms = Duration::from_millis;
        assert_eq!([0, 1, 5, 1_000].map(|login| grace(ms(login))), [MIN_GRACE, MIN_GRACE, ms(20), MAX_GRACE]);
        assert_eq!(
            [(0, 8), (8, 16), (16, 8)].map(|(before, took)| smooth(ms(before), ms(took))),
            [ms(8), ms(9), ms(15)]
        );
        assert_eq!(grace(Duration::MAX), MAX_GRACE);
    }
}
