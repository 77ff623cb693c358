//! Server connections: one pool per tenant, one budget per shard.
//!
//! Invariants: a server connection belongs to one tenant for its whole life (a pool never changes its tenant and a
//! connection never changes its pool); dropping a [`Lease`] closes the connection, only [`Lease::release`] gives it
//! back.
//!
//! A tenant's clients are served by one worker thread, and so are its server connections. The locks below are
//! therefore hardly ever contended; they are what makes the rare crossings (eviction, control plane) simple.

pub mod cancel;
pub mod connect;
pub mod defaults;
pub mod faces;
pub mod keepers;
pub mod lease;
pub mod listener;
pub mod params;
pub mod passwords;
mod queue;
pub mod recent;
pub mod residue;
pub mod scope;
pub mod scram;
pub mod shard;
mod spare;
pub mod statements;
#[cfg(test)]
mod tests;
pub mod tls;
mod welcome;

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use dashmap::{DashMap, DashSet};
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::directory::Tenant;
use crate::error::{PgError, sqlstate};
use crate::metrics::Metrics;
use crate::tenant::TenantId;
use connect::{Connector, ServerConnection};
use defaults::{Before, Defaults};
use faces::{Faces, Question, Questions};
use keepers::{Claim, Keepers};
pub use lease::Lease;
use listener::Listeners;
use params::Params;
use queue::{Place, Queue};
use residue::Carried;
use shard::Budget;
use statements::{Registry, Stay};
use welcome::Welcomes;

/// A client's startup settings: name (lower case) and value, sorted. Part of what makes two server connections equal.
pub type Settings = Vec<(String, String)>;

/// What makes server connections equal: startup settings and generation (see [`Pool::renew`]).
type Kind = (Arc<Settings>, u64);

/// The one that is no setting but the database that the client asked for; only where a plan lets it choose.
pub const DATABASE: &str = "database";

/// How many connections, and for how long. See `[pool]` in the configuration.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Most server connections of a tenant.
    pub default_pool_size: usize,
    /// An idle connection is closed after this.
    pub server_idle_timeout: Duration,
}

/// All pools of this proxy.
pub struct Pools {
    pools: DashMap<TenantId, Arc<Pool>>,
    budgets: DashMap<String, Arc<Budget>>,
    connector: Arc<Connector>,
    limits: arc_swap::ArcSwap<Limits>,
    metrics: Arc<Metrics>,
    statement_ids: Arc<AtomicU64>,
    questions: Questions,
    /// Tenants whose clients ask for the state of sequences, also when they have no pool at present; see [`Registry::asks`].
    asking: DashSet<TenantId>,
}

/// The server connections of one tenant at one home.
pub struct Pool {
    tenant: Arc<Tenant>,
    budget: Arc<Budget>,
    connector: Arc<Connector>,
    limits: Arc<Limits>,
    /// Where its connections live.
    worker: Handle,
    /// Prepared statements of the tenant's clients, shared.
    pub statements: Registry,
    state: Mutex<State>,
    /// As [`State::retired`], for those who only want to know that.
    retired: AtomicBool,
    /// Who listens for the tenant's clients, by database and encoding.
    listeners: Listeners,
}

#[derive(Default)]
#[expect(clippy::vec_box, reason = "a connection moves at every checkout: a pointer is cheaper than its fields")]
struct State {
    /// Most recently used last.
    idle: Vec<Box<ServerConnection>>,
    /// Idle, leased, being opened or being reset.
    open: usize,
    /// Among them the listener's, which is one more than clients may have: none or one.
    apart: usize,
    connecting: usize,
    waiters: Queue,
    keepers: Keepers,
    /// A task calls them when they have rested.
    calls: bool,
    /// When a client last gave a connection back.
    came_back: Option<Instant>,
    /// Since when somebody has been waiting all the time, the time before the last login not counted.
    pressed_since: Option<Instant>,
    /// Whether a task opens connections for those who wait as soon as it is time.
    grows: bool,
    /// When the task that ends waits looks again; `None` if there is no such task.
    alarm: Option<Instant>,
    /// Until then no connection becomes idle, see [`Pool::make_way`].
    makes_way_until: Option<Instant>,
    /// Set when the tenant moved, was suspended or deleted, or the pool was empty and forgotten.
    retired: bool,
    /// How many connections have logged in, by what makes them equal.
    logged_in: Vec<(Kind, usize)>,
    /// What a server reported at login, by startup settings.
    welcome: Welcomes,
    /// How often what logins begin with has changed; see [`Pool::renew`].
    generation: u64,
    /// What they began with before.
    defaults: Defaults,
    /// Equal parameters are kept once, so that comparing them is comparing pointers.
    params: Vec<Arc<Params>>,
    /// The same for settings that are carried.
    carried: Vec<Arc<Carried>>,
}

fn one_of_its_kind<T: PartialEq>(known: &mut Vec<Arc<T>>, value: Arc<T>) -> Arc<T> {
    if let Some(same) = known.iter().find(|known| **known == value) {
        return same.clone();
    }
    if known.len() >= KEPT {
        known.retain(|known| Arc::strong_count(known) > 1);
    }
    if known.len() < KEPT * KEPT {
        known.push(value.clone());
    }
    value
}

/// Kept values above which those that nobody holds are forgotten.
const KEPT: usize = 32;

/// See [`Pool::make_way`].
const MAKE_WAY: Duration = Duration::from_secs(2);

/// See [`State::at_once`].
const MIN_AT_ONCE: usize = 2;

/// See [`State::opens_at`]: in the time without a connection that comes back after which none is waited for.
const WAITED_LONG: u32 = 2;
const NEVER_PAUSED: u32 = 8;

/// What has come back already and was not yet read is there within this time.
const AT_LEAST: Duration = Duration::from_millis(2);

/// Before the next login to a server that takes no more connections.
const SERVER_FULL_PAUSE: Duration = Duration::from_millis(100);

/// Server connections to a shard.
#[derive(Debug, Clone, Copy, Default)]
pub struct Use {
    /// All of them.
    pub open: usize,
    /// Those that wait for work.
    pub idle: usize,
    /// Those that are being opened.
    pub connecting: usize,
}

/// Why there is no server connection.
#[derive(Debug, Clone)]
pub enum CheckoutError {
    /// The pool is no longer the tenant's: route again.
    Retired,
    /// What the client is told.
    Failed(PgError),
}

impl Pools {
    /// No pools yet.
    pub fn new(connector: Arc<Connector>, limits: Limits, metrics: Arc<Metrics>) -> Self {
        let limits = arc_swap::ArcSwap::from_pointee(limits);
        Self {
            pools: DashMap::new(),
            budgets: DashMap::new(),
            connector,
            limits,
            metrics,
            statement_ids: Arc::default(),
            questions: Questions::default(),
            asking: DashSet::new(),
        }
    }

    /// The tenant's pool; made on first use, and anew when the tenant's epoch has grown.
    ///
    /// Its connections live in the runtime that calls this first.
    pub fn get(&self, tenant: &Arc<Tenant>) -> Arc<Pool> {
        if let Some(pool) = self.pools.get(&tenant.id)
            && pool.tenant.epoch == tenant.epoch
            && !pool.state.lock().retired
        {
            return pool.clone();
        }
        let pool = Arc::new(Pool {
            tenant: tenant.clone(),
            budget: self.budget(&tenant.shard.name, tenant.shard.max_db_connections),
            connector: self.connector.clone(),
            limits: self.limits.load_full(),
            worker: Handle::current(),
            statements: Registry::new(self.statement_ids.clone()),
            state: Mutex::default(),
            retired: AtomicBool::new(false),
            listeners: Listeners::default(),
        });
        if self.asking.contains(&tenant.id) {
            pool.statements.note_asks();
        }
        let mut entry = self.pools.entry(tenant.id.clone()).or_insert_with(|| pool.clone());
        if !Arc::ptr_eq(&entry, &pool) {
            if entry.tenant.epoch >= tenant.epoch && !entry.state.lock().retired {
                return entry.clone();
            }
            if entry.statements.asks() {
                pool.statements.note_asks();
            }
            entry.retire();
            *entry = pool.clone();
        }
        drop(entry);
        pool.budget.join(&pool);
        pool
    }

    fn budget(&self, shard: &str, limit: usize) -> Arc<Budget> {
        if let Some(budget) = self.budgets.get(shard) {
            budget.set_limit(limit);
            return budget.clone();
        }
        let new = || {
            let faces = Arc::new(Faces::new(shard, &self.questions, self.metrics.notified.clone()));
            Arc::new(Budget::new(limit, self.metrics.shard(shard), faces))
        };
        self.budgets.entry(shard.to_owned()).or_insert_with(new).clone()
    }

    /// Closes a tenant's idle connections, and the others as they come back.
    pub fn close_tenant(&self, id: &str) {
        self.asking.remove(id);
        if let Some((_, pool)) = self.pools.remove(id) {
            pool.retire();
        }
    }

    /// New limits; pools made from now on have them.
    pub fn set_limits(&self, limits: Limits) {
        self.limits.store(Arc::new(limits));
    }

    /// Open and idle connections of a tenant.
    pub fn tenant_connections(&self, id: &str) -> (usize, usize) {
        self.pools.get(id).map_or((0, 0), |pool| pool.connections())
    }

    /// Questions about server processes that are not ours, for whoever can answer them; once.
    pub fn questions(&self) -> Option<mpsc::Receiver<Question>> {
        self.questions.open()
    }

    /// How a shard's budget is used.
    pub fn shard_use(&self, shard: &str) -> Use {
        let Some(budget) = self.budgets.get(shard).map(|b| b.clone()) else { return Use::default() };
        let mut used = Use { open: budget.open(), ..Use::default() };
        for pool in budget.pools() {
            let state = pool.state.lock();
            used.idle += state.idle.len();
            used.connecting += state.connecting;
        }
        used
    }

    /// Every pool that is there, with its tenant.
    pub fn live(&self) -> Vec<Arc<Pool>> {
        self.pools.iter().map(|entry| entry.value().clone()).collect()
    }

    /// Closes what has been idle or alive for too long and forgets empty pools. Called about once a second; looks at
    /// pools that exist, which are bounded by connections, not by tenants.
    pub fn sweep(&self, now: Instant) {
        for budget in &self.budgets {
            budget.faces.sweep();
        }
        let limits = self.limits.load();
        for pool in self.live() {
            pool.close_expired(now, limits.server_idle_timeout);
            if pool.statements.asks() && !self.asking.contains(&pool.tenant.id) {
                self.asking.insert(pool.tenant.id.clone());
            }
            let removed =
                self.pools.remove_if(&pool.tenant.id, |_, held| Arc::ptr_eq(held, &pool) && pool.retire_if_empty());
            if removed.is_some() {
                pool.budget.leave(&pool);
            }
        }
    }

    /// Closes every idle connection, for a shutdown.
    pub fn close_all(&self) {
        for pool in self.live() {
            pool.retire();
        }
    }
}

impl Pool {
    /// Whose connections these are.
    pub fn tenant(&self) -> &Arc<Tenant> {
        &self.tenant
    }

    /// Whether the pool has ended, and the tenant must be looked up again.
    #[inline]
    pub fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Acquire)
    }

    /// Whose the server processes of its shard are.
    pub fn faces(&self) -> &Arc<Faces> {
        &self.budget.faces
    }

    /// Open and idle connections.
    pub fn connections(&self) -> (usize, usize) {
        let state = self.state.lock();
        (state.open, state.idle.len())
    }

    /// Closes idle connections, and for a moment those that become idle: a server makes, drops and renames only databases
    /// that nobody is connected to, and waits for others to go for as long.
    pub fn make_way(&self) {
        let idle = {
            let mut state = self.state.lock();
            state.makes_way_until = Some(Instant::now() + MAKE_WAY);
            std::mem::take(&mut state.idle)
        };
        drop(idle);
    }

    /// How often what logins begin with has changed. A client gets no connection that is of an earlier generation than it is.
    pub fn generation(&self) -> u64 {
        self.state.lock().generation
    }

    /// What logins begin with has changed (`ALTER ROLE … SET`): what servers have reported is forgotten, idle connections
    /// close now, others when they come back, unless a client waits that is as old. `before` is what those of a generation
    /// began with, if that is known.
    pub fn renew(&self, before: Option<(u64, Before)>) {
        let idle = {
            let mut state = self.state.lock();
            if let Some((generation, before)) = before.filter(|(generation, _)| *generation == state.generation) {
                state.defaults.note(generation, before);
            }
            state.generation += 1;
            state.welcome = Welcomes::default();
            std::mem::take(&mut state.idle)
        };
        drop(idle);
    }

    /// What a client of that generation began with; see [`Defaults::of`].
    pub fn began_with(&self, generation: u64, settings: &Settings) -> Carried {
        self.state.lock().defaults.of(generation, settings)
    }

    /// Clients that wait for a connection.
    pub fn waiting(&self) -> usize {
        self.state.lock().waiters.len()
    }

    /// Whether a checkout would most likely not have to wait for another client.
    pub fn has_room(&self, settings: &Arc<Settings>) -> bool {
        let state = self.state.lock();
        let open = state.waiters.is_empty() && state.used() < self.limits.default_pool_size;
        state.has_idle(settings) || (open && self.budget.has_room())
    }

    /// What a server reports right after a login with these settings, if one has been seen.
    pub fn welcome(&self, settings: &Arc<Settings>) -> Option<Arc<Params>> {
        self.state.lock().welcome.get(settings)
    }

    /// The one of its kind among the parameters of the tenant's clients and servers.
    pub fn intern(&self, params: Arc<Params>) -> Arc<Params> {
        one_of_its_kind(&mut self.state.lock().params, params)
    }

    /// The same for parameters with one value changed, which are not made anew if they are known.
    pub fn intern_with(&self, params: &Arc<Params>, name: &str, value: &str) -> Arc<Params> {
        let known = &mut self.state.lock().params;
        if let Some(same) = known.iter().find(|known| known.are(params, name, value)) {
            return same.clone();
        }
        one_of_its_kind(known, params.with(name, value))
    }

    /// The one of its kind among the settings that the tenant's clients take along.
    pub fn intern_carried(&self, carried: Arc<Carried>) -> Arc<Carried> {
        one_of_its_kind(&mut self.state.lock().carried, carried)
    }

    /// A connection that is idle now; `None` if there is none or others wait. `stay` is that of a client that may advance
    /// sequences: see [`State::apart`].
    #[inline]
    pub fn try_checkout(self: &Arc<Self>, settings: &Arc<Settings>, stay: Option<Stay>) -> Option<Lease> {
        loop {
            let mut conn = self.state.lock().take_idle(settings, stay)?;
            // A connection that has anything to say while idle is going away, or in doubt: it is closed.
            if conn.is_quiet() {
                return Some(Lease::new(conn));
            }
        }
    }

    /// A connection, after waiting in line if need be. Cancel safe: a connection that arrives too late goes back.
    ///
    /// # Errors
    /// [`CheckoutError::Retired`] when the tenant's home has changed; otherwise what the client is told: the wait was
    /// too long, or the server refused.
    pub async fn checkout(
        self: &Arc<Self>,
        settings: &Arc<Settings>,
        application_name: &Arc<str>,
        query_wait_timeout: Duration,
    ) -> Result<Lease, CheckoutError> {
        let generation = self.generation();
        loop {
            if let Some(lease) = self.try_checkout(settings, None) {
                return Ok(lease);
            }
            let wait = self.wait(settings, Some(application_name), query_wait_timeout, generation, None);
            if let Some(lease) = wait.await.0? {
                return Ok(lease);
            }
        }
    }

    /// Stands in line for a connection, for a client of that generation. What comes of it, and how long it took; a connection
    /// that ended while it was handed over is `None`: try again. Whom to wake can be said by the task that polls it first, and at once:
    /// it is not looked for an answer then.
    pub fn wait(
        self: &Arc<Self>,
        settings: &Arc<Settings>,
        application_name: Option<&Arc<str>>,
        query_wait_timeout: Duration,
        generation: u64,
        waker: Option<&Waker>,
    ) -> Wait<'_> {
        let now = Instant::now();
        let deadline = (!query_wait_timeout.is_zero()).then(|| now + query_wait_timeout);
        let mut state = self.state.lock();
        // One may have come back since the caller has looked.
        let free = state.take_idle(settings, None);
        let answer = if state.retired { Some(Err(CheckoutError::Retired)) } else { free.map(Ok) };
        if state.waiters.is_empty() {
            state.pressed_since = Some(now);
        }
        let asleep = waker.is_some() && answer.is_none();
        let place = Place::new(settings, application_name, now, deadline, generation, waker.cloned());
        let key = state.waiters.join(place);
        if let Some(answer) = answer {
            // Whoever is to be woken is awake.
            let last = state.waiters.len() - 1;
            drop(state.waiters.answer(last, answer, now));
        } else if let Some(deadline) = deadline
            && state.alarm.is_none_or(|alarm| deadline < alarm)
        {
            state.alarm = Some(deadline);
            self.worker.spawn(end_waits(Arc::downgrade(self), deadline));
        }
        let may_serve = state.may_serve(self.limits.default_pool_size);
        drop(state);
        if may_serve {
            self.serve(now);
        }
        Wait { pool: self, key: Some(key), since: now, asleep }
    }

    /// Answers those who have waited too long; when to do it again.
    fn end_long_waits(&self, now: Instant) -> Option<Instant> {
        let (open, _) = self.connections();
        let shard = self.budget.open();
        let why = |place: &Place| {
            let waited = place.deadline.map(|deadline| deadline.duration_since(place.since)).unwrap_or_default();
            CheckoutError::Failed(self.waited_too_long(waited, open, shard))
        };
        let (wake, next) = {
            let mut state = self.state.lock();
            let (wake, next) = state.waiters.expire(now, why);
            state.alarm = next;
            (wake, next)
        };
        for waker in wake {
            waker.wake();
        }
        next
    }

    fn waited_too_long(&self, waited: Duration, open: usize, shard: usize) -> PgError {
        PgError::fatal(sqlstate::TOO_MANY_CONNECTIONS, "query_wait_timeout: no server connection became free")
            .detail(format!(
                "Waited {waited:?}; tenant \"{}\" has {open} server connections, its shard has {shard}.",
                self.tenant.id
            ))
            .hint("Shorten transactions, or raise default_pool_size, max_db_connections or query_wait_timeout.")
    }

    /// Takes a connection back that is clean and idle.
    pub(super) fn checkin(self: &Arc<Self>, mut conn: Box<ServerConnection>, now: Instant) {
        let is_new = conn.last_used == conn.opened;
        conn.last_used = now;
        let (to_close, wake) = {
            let mut state = self.state.lock();
            if !is_new {
                // A client that has kept it for a while gives it back as of when it was idle.
                state.came_back = state.came_back.max(Some(now));
            }
            state.bring_back(&mut conn, self.limits.default_pool_size);
            let oldest = state.waiters.oldest();
            let elsewhere = self.budget.contended()
                && now.duration_since(conn.opened) >= self.budget.quantum()
                && self.budget.oldest().is_some_and(|s| oldest.is_none_or(|o| s < o));
            if state.retired || conn.expires <= now || elsewhere || conn.slot.apart {
                (Some(conn), None)
            } else {
                match state.waiters.give(conn, now) {
                    Ok(wake) => (None, wake),
                    // A waiter with other settings cannot use it and would otherwise wait for ever for this slot.
                    Err(conn) if !state.waiters.is_empty() && state.used() >= self.limits.default_pool_size => {
                        (Some(conn), None)
                    }
                    Err(conn) if state.makes_way_until.is_some_and(|until| now < until) => (Some(conn), None),
                    Err(conn) if conn.generation != state.generation => (Some(conn), None),
                    Err(conn) => {
                        state.idle.push(conn);
                        (None, None)
                    }
                }
            }
        };
        // Outside the lock: its slot goes to the next in line.
        drop(to_close);
        if let Some(waker) = wake {
            waker.wake();
        }
    }

    /// Opens connections for those who wait, as far as pool size and budget allow, unless others are likely to be back
    /// before.
    fn serve(self: &Arc<Self>, mut now: Instant) {
        loop {
            let (since, ticket) = {
                let mut state = self.state.lock();
                let unmet = state.waiters.len() > state.connecting;
                // One that comes back may be there before a new one is.
                if unmet && state.connecting >= state.at_once() {
                    return;
                }
                if state.retired || !unmet || state.used() >= self.limits.default_pool_size {
                    // Idle connections with other settings are in the way of those who wait.
                    let stale = if unmet && !state.retired && !state.idle.is_empty() {
                        Some(state.idle.remove(0))
                    } else {
                        None
                    };
                    drop(state);
                    if stale.is_none() {
                        self.call_keepers(now);
                        return;
                    }
                    continue;
                }
                let at = state.opens_at(self.budget.patience(), now);
                if at > now {
                    if !std::mem::replace(&mut state.grows, true) {
                        self.worker.spawn(grow(Arc::downgrade(self), at));
                    }
                    return;
                }
                let position = state.connecting;
                match state.waiters.first_without_turn(position) {
                    Some(place) => (place.since, place.ticket()),
                    None => return,
                }
            };
            if self.budget.try_reserve() {
                if !self.open_with_slot() {
                    self.budget.release();
                    return;
                }
            } else if self.budget.oldest().is_some() || !self.budget.evict_for(Some(self)) {
                // Who stands in the shard's queue has found nothing to evict; what became idle since went to them.
                self.budget.enqueue(since, self, ticket);
                self.budget.watch(&self.worker);
                // A slot may have become free between the two steps.
                self.budget.grant();
            }
            now = Instant::now();
        }
    }

    /// Opens a connection into a slot of the budget that the caller has taken; `false` if nobody needs it.
    pub(super) fn open_with_slot(self: &Arc<Self>) -> bool {
        let (settings, application_name) = {
            let mut state = self.state.lock();
            if state.retired || state.used() >= self.limits.default_pool_size || state.waiters.len() <= state.connecting
            {
                return false;
            }
            let position = state.connecting;
            let Some(place) = state.waiters.at(position) else { return false };
            let wanted = (place.settings.clone(), place.application_name.clone().unwrap_or_default());
            state.open += 1;
            state.connecting += 1;
            wanted
        };
        let slot = Slot { pool: self.clone(), kind: None, apart: false };
        self.worker.spawn(open(slot, settings, application_name));
        true
    }

    /// A connection for the tenant's listener, beside those of clients, where these would have none: whoever waits for the
    /// listener may hold one of theirs, and so all of them. `None` if it need not be so, or cannot: one at a time, and only as
    /// far as the shard has room.
    pub(super) async fn checkout_apart(
        self: &Arc<Self>,
        settings: &Arc<Settings>,
        application_name: &Arc<str>,
    ) -> Option<Lease> {
        if !self.state.lock().may_be_apart(self.limits.default_pool_size) {
            return None;
        }
        if !(self.budget.try_reserve() || self.budget.evict_for(Some(self)) && self.budget.try_reserve()) {
            return None;
        }
        {
            let mut state = self.state.lock();
            state.open += 1;
            state.apart += 1;
        }
        let slot = Slot { pool: self.clone(), kind: None, apart: true };
        login(slot, settings.clone(), application_name.clone()).await.ok().map(Lease::new)
    }

    /// Has the listener's connection not count for the pool's size, so that clients can have all of that, unless another one
    /// is apart already.
    pub(super) fn set_apart(self: &Arc<Self>, lease: &mut Lease) {
        self.state.lock().set_apart(lease.conn());
        self.serve(Instant::now());
    }

    fn opened(
        self: &Arc<Self>,
        mut result: Result<Box<ServerConnection>, PgError>,
        settings: &Arc<Settings>,
        began: Instant,
    ) {
        let now = Instant::now();
        {
            let mut state = self.state.lock();
            state.connecting -= 1;
            state.pressed_since = Some(now);
            if let Ok(conn) = &mut result {
                state.enrol(conn);
                if conn.generation == state.generation {
                    state.welcome.note(&conn.settings, &conn.params);
                }
            }
        }
        match result {
            Ok(conn) => {
                self.checkin(conn, now);
                self.serve(now);
            }
            Err(error) => self.login_failed(error, settings, began),
        }
    }

    /// Tells the first in line whose login it was: who wants these settings, which may be what the server did not like, and
    /// has waited since it began. If the server is full (another proxy may use it, too), those who wait go on waiting, as
    /// they do when our own budget is spent.
    fn login_failed(self: &Arc<Self>, error: PgError, settings: &Arc<Settings>, began: Instant) {
        if error.code == sqlstate::TOO_MANY_CONNECTIONS {
            self.budget.evict_for(Some(self));
            let pool = self.clone();
            self.worker.spawn(async move {
                tokio::time::sleep(SERVER_FULL_PAUSE).await;
                pool.serve(Instant::now());
            });
            return;
        }
        let wake = {
            let mut state = self.state.lock();
            // Who came after it began may be luckier: it is not what they would have been told.
            let position = state.waiters.position(|place| place.since <= began && place.settings == *settings);
            position.and_then(|at| state.waiters.answer(at, Err(CheckoutError::Failed(error)), Instant::now()))
        };
        if let Some(waker) = wake {
            waker.wake();
        }
        self.serve(Instant::now());
    }

    /// Ends the pool: idle connections close now, others when they come back; those who wait route again.
    fn retire(&self) {
        let (idle, wake) = {
            let mut state = self.state.lock();
            state.retired = true;
            self.retired.store(true, Ordering::Release);
            let (now, mut wake) = (Instant::now(), Vec::new());
            while !state.waiters.is_empty() {
                wake.extend(state.waiters.answer(0, Err(CheckoutError::Retired), now));
            }
            (std::mem::take(&mut state.idle), wake)
        };
        drop(idle);
        self.listeners.retire();
        for waker in wake {
            waker.wake();
        }
        self.budget.leave(self);
    }

    fn retire_if_empty(&self) -> bool {
        let mut state = self.state.lock();
        let empty = state.open == 0 && state.waiters.is_empty();
        state.retired |= empty;
        self.retired.store(state.retired, Ordering::Release);
        empty
    }

    /// When the least recently used of the idle connections that others may have was used.
    pub(super) fn oldest_idle(&self, now: Instant) -> Option<Instant> {
        let state = self.state.lock();
        state.idle.iter().filter(|conn| self.budget.spares(conn, now)).map(|conn| conn.last_used).min()
    }

    pub(super) fn take_oldest_idle(&self, now: Instant) -> Option<Box<ServerConnection>> {
        let mut state = self.state.lock();
        let spared = state.idle.iter().enumerate().filter(|(_, conn)| self.budget.spares(conn, now));
        let at = spared.min_by_key(|(_, conn)| conn.last_used)?.0;
        Some(state.idle.remove(at))
    }

    /// Notes that a client keeps a connection for nothing but the state of sequences, and has been idle `since` then; until
    /// the result is dropped.
    pub fn stand_by(self: &Arc<Self>, since: Instant, claim: Claim, waker: &Waker) -> StandBy {
        let key = self.state.lock().keepers.join(since, claim, waker);
        self.call_keepers(Instant::now());
        StandBy { pool: self.clone(), key }
    }

    /// Has as many of them give way as there are waiters that no connection can be opened for.
    fn call_keepers(self: &Arc<Self>, now: Instant) {
        let mut wake = Vec::new();
        let next = {
            let mut state = self.state.lock();
            let state = &mut *state;
            let (false, Some(waiting)) = (state.keepers.is_empty(), state.waiters.oldest()) else { return };
            if state.used() < self.limits.default_pool_size {
                return;
            }
            let unmet = |state: &State| state.waiters.len() > state.connecting + state.keepers.called();
            while unmet(state)
                && let Some(waker) = state.keepers.call(waiting, now)
            {
                wake.push(waker);
            }
            let next = state.keepers.next(waiting, now).filter(|_| unmet(state) && !state.calls);
            state.calls |= next.is_some();
            next
        };
        for waker in wake {
            waker.wake();
        }
        if let Some(at) = next {
            self.worker.spawn(call_keepers_at(Arc::downgrade(self), at));
        }
    }

    /// Since when the one of them is idle that would give way for another tenant; `None` if one is doing that.
    pub(super) fn resting_keeper(&self, waiting: Instant, now: Instant) -> Option<Instant> {
        let state = self.state.lock();
        if state.keepers.called() > 0 { None } else { state.keepers.resting(waiting, now) }
    }

    /// Has it give way.
    pub(super) fn call_keeper(&self, waiting: Instant, now: Instant) {
        let waker = self.state.lock().keepers.call(waiting, now);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn close_expired(&self, now: Instant, idle_timeout: Duration) {
        let expired = {
            let mut state = self.state.lock();
            let keep = |conn: &mut Box<ServerConnection>| {
                conn.expires > now
                    && (idle_timeout.is_zero() || now.duration_since(conn.last_used) < idle_timeout)
                    && conn.is_quiet()
            };
            let (kept, expired): (Vec<_>, Vec<_>) = std::mem::take(&mut state.idle).into_iter().partition_mut(keep);
            state.idle = kept;
            expired
        };
        drop(expired);
    }
}

/// `Iterator::partition` with a mutable look at each item.
trait PartitionMut<T> {
    fn partition_mut(self, keep: impl FnMut(&mut T) -> bool) -> (Vec<T>, Vec<T>);
}

impl<T, I: Iterator<Item = T>> PartitionMut<T> for I {
    fn partition_mut(self, mut keep: impl FnMut(&mut T) -> bool) -> (Vec<T>, Vec<T>) {
        let (mut yes, mut no) = (Vec::new(), Vec::new());
        for mut item in self {
            if keep(&mut item) { yes.push(item) } else { no.push(item) }
        }
        (yes, no)
    }
}

impl State {
    /// Connections that count for the pool's size.
    fn used(&self) -> usize {
        self.open - self.apart
    }

    /// Whether there is anything that [`Pool::serve`] could do; in a full pool that is busy there is not.
    fn may_serve(&self, default_pool_size: usize) -> bool {
        self.used() < default_pool_size || !self.idle.is_empty() || !self.keepers.is_empty()
    }

    /// How many more clients could have one.
    fn free(&self, default_pool_size: usize) -> usize {
        default_pool_size.saturating_sub(self.used()) + self.idle.len()
    }

    /// See [`Pool::checkout_apart`].
    fn may_be_apart(&self, default_pool_size: usize) -> bool {
        !self.retired && self.apart == 0 && self.free(default_pool_size) < 2
    }

    /// How many connections are opened at a time. A burst of short transactions is over before it has a connection for
    /// each of them, and opening those would cost more than the work: while a server forks, others wait, and who waits then
    /// says nothing about how many are needed.
    fn at_once(&self) -> usize {
        MIN_AT_ONCE.max((self.open - self.connecting.min(self.open)) / 16)
    }

    /// When the next login for those who wait may begin. At once if no client could give a connection back. Where they do
    /// give them back, one of those is there before a new one would be: then only for who has waited long, or, one at a
    /// time, if somebody has been waiting all the time, as where clients never pause.
    fn opens_at(&mut self, patience: Duration, now: Instant) -> Instant {
        let lent = self.used().saturating_sub(self.connecting + self.idle.len());
        let (Some(came_back), Some(next)) = (self.came_back, self.waiters.at(self.connecting)) else { return now };
        let useful = |((settings, generation), _): &(Kind, usize)| next.takes(settings, *generation);
        let (since, same) = (next.since, self.logged_in.iter().any(useful));
        // Others are of no use.
        if lent == 0 || !same {
            return now;
        }
        let none_comes = (came_back + patience).max(since + AT_LEAST);
        let soonest = none_comes.min(since + patience * WAITED_LONG);
        match self.pressed_since {
            Some(since) if self.connecting == 0 => soonest.min(since + patience * NEVER_PAUSED),
            _ => soonest,
        }
    }

    /// It is one of those that clients use.
    fn enrol(&mut self, conn: &mut ServerConnection) {
        let kind = (conn.settings.clone(), conn.generation);
        self.logged_in(&kind);
        conn.slot.kind = Some(kind);
    }

    fn logged_in(&mut self, kind: &Kind) {
        match self.logged_in.iter_mut().find(|(have, _)| have == kind) {
            Some((_, count)) => *count += 1,
            None => self.logged_in.push((kind.clone(), 1)),
        }
    }

    /// See [`Pool::set_apart`].
    fn set_apart(&mut self, conn: &mut ServerConnection) {
        if self.apart > 0 {
            return;
        }
        (self.apart, conn.slot.apart) = (1, true);
        if let Some(kind) = conn.slot.kind.take() {
            self.logged_out(&kind);
        }
    }

    /// It counts for the pool's size again, if there is room.
    fn bring_back(&mut self, conn: &mut ServerConnection, default_pool_size: usize) {
        if conn.slot.apart && self.used() < default_pool_size {
            (self.apart, conn.slot.apart) = (0, false);
            self.enrol(conn);
        }
    }

    fn logged_out(&mut self, kind: &Kind) {
        if let Some(at) = self.logged_in.iter().position(|(have, _)| have == kind) {
            self.logged_in[at].1 -= 1;
            if self.logged_in[at].1 == 0 {
                self.logged_in.swap_remove(at);
            }
        }
    }

    fn idle_at(&self, settings: &Arc<Settings>) -> Option<usize> {
        let same = |conn: &ServerConnection| Arc::ptr_eq(&conn.settings, settings) || conn.settings == *settings;
        self.idle.iter().rposition(|conn| same(conn))
    }

    /// Whether [`State::take_idle`] would find something.
    fn has_idle(&self, settings: &Arc<Settings>) -> bool {
        self.waiters.is_empty() && !self.retired && self.idle_at(settings).is_some()
    }

    /// The idle connection used last, unless others are in line for it.
    #[inline]
    fn take_idle(&mut self, settings: &Arc<Settings>, stay: Option<Stay>) -> Option<Box<ServerConnection>> {
        if !self.waiters.is_empty() || self.retired {
            return None;
        }
        let last = self.idle_at(settings)?;
        let at = match stay {
            Some(stay) if self.idle[last].prepared.sequences_of != Some(stay) => self.apart(last, stay),
            _ => last,
        };
        Some(self.idle.remove(at))
    }

    /// Of the idle connections like this one: the one that knows the state of this client's sequences, or one that knows
    /// nobody's, or the one whose client has not come back for longest.
    fn apart(&self, like: usize, stay: Stay) -> usize {
        let settings = &self.idle[like].settings;
        let same = |conn: &ServerConnection| Arc::ptr_eq(&conn.settings, settings) || conn.settings == *settings;
        let rank = |conn: &ServerConnection| match conn.prepared.sequences_of {
            Some(of) if of == stay => 0,
            None => 1,
            Some(_) => 2,
        };
        let ranks = self.idle.iter().enumerate().filter(|(_, conn)| same(conn)).map(|(at, conn)| (rank(conn), at));
        // The one used last, if nobody's state is on it.
        ranks.min_by_key(|&(rank, at)| (rank, if rank == 2 { at } else { usize::MAX - at })).map_or(like, |(_, at)| at)
    }
}

/// Standing in line for a connection, see [`Pool::wait`]. Dropping it gives the place up.
pub struct Wait<'a> {
    pool: &'a Arc<Pool>,
    /// Its place in line, until it has its answer.
    key: Option<usize>,
    since: Instant,
    /// It has just joined the line, and is woken when there is an answer.
    asleep: bool,
}

impl Future for Wait<'_> {
    type Output = (Result<Option<Lease>, CheckoutError>, Duration);

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(key) = self.key.filter(|_| !std::mem::take(&mut self.asleep)) else { return Poll::Pending };
        let (answer, at) = std::task::ready!(self.pool.state.lock().waiters.poll(key, cx.waker()));
        self.key = None;
        let lease = answer.map(|mut conn| conn.is_quiet().then(|| Lease::new(conn)));
        Poll::Ready((lease, at.duration_since(self.since)))
    }
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        let Some(key) = self.key else { return };
        let untaken = self.pool.state.lock().waiters.leave(key);
        if let Some(conn) = untaken {
            self.pool.checkin(conn, Instant::now());
        }
    }
}

/// A client that keeps a connection which it could do without, see [`Pool::stand_by`].
pub struct StandBy {
    pool: Arc<Pool>,
    key: usize,
}

impl StandBy {
    /// Whether it is to give way; the task is woken when it is.
    pub fn is_called(&self, waker: &Waker) -> bool {
        self.pool.state.lock().keepers.is_called(self.key, waker)
    }
}

impl Drop for StandBy {
    fn drop(&mut self) {
        self.pool.state.lock().keepers.leave(self.key);
        self.pool.call_keepers(Instant::now());
    }
}

async fn call_keepers_at(pool: Weak<Pool>, at: Instant) {
    tokio::time::sleep_until(at).await;
    if let Some(pool) = pool.upgrade() {
        pool.state.lock().calls = false;
        pool.call_keepers(Instant::now());
    }
}

/// Ends waits that take too long: one task per pool, while anybody has waited lately.
async fn end_waits(pool: Weak<Pool>, mut at: Instant) {
    loop {
        tokio::time::sleep_until(at).await;
        let Some(pool) = pool.upgrade() else { return };
        // Another task has taken over, for somebody with a shorter patience.
        if pool.state.lock().alarm != Some(at) {
            return;
        }
        match pool.end_long_waits(Instant::now()) {
            Some(next) => at = next,
            None => return,
        }
    }
}

/// Looks again whether those who wait need more connections, once; never two for a pool at a time.
async fn grow(pool: Weak<Pool>, at: Instant) {
    tokio::time::sleep_until(at).await;
    let Some(pool) = pool.upgrade() else { return };
    pool.state.lock().grows = false;
    pool.serve(Instant::now());
}

async fn open(slot: Slot, settings: Arc<Settings>, application_name: Arc<str>) {
    let (pool, began) = (slot.pool.clone(), Instant::now());
    // A task that is dropped (shutdown) must not leave `connecting` behind, which only matters to this pool's waiters.
    let result = login(slot, settings.clone(), application_name).await;
    pool.opened(result, &settings, began);
}

async fn login(
    slot: Slot,
    settings: Arc<Settings>,
    application_name: Arc<str>,
) -> Result<Box<ServerConnection>, PgError> {
    let (pool, began) = (slot.pool.clone(), Instant::now());
    let result = pool.connector.clone().connect(slot, settings, application_name).await;
    let outcome = if result.is_ok() { &pool.budget.stats.logins_ok } else { &pool.budget.stats.logins_failed };
    outcome.fetch_add(1, Ordering::Relaxed);
    if result.is_ok() {
        pool.budget.note_login(began.elapsed());
    }
    result.map(Box::new)
}

/// A place in a pool and in its shard's budget. Held by a connection for its whole life; dropping it makes room for
/// the next in line.
pub struct Slot {
    pool: Arc<Pool>,
    /// That of the connection, once it has logged in.
    kind: Option<Kind>,
    /// It does not count for the pool's size.
    apart: bool,
}

impl Slot {
    /// The pool it is a place of.
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        {
            let mut state = self.pool.state.lock();
            state.open -= 1;
            state.apart -= usize::from(self.apart);
            if let Some(kind) = &self.kind {
                state.logged_out(kind);
            }
        }
        self.pool.budget.release();
        self.pool.serve(Instant::now());
    }
}
