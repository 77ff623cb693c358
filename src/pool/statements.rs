//! Prepared statements that a tenant's clients share, and which of them a server connection has. No I/O.
//!
//! Invariant: a prepared name never resolves to another statement; identity is the full text and the parameter types,
//! compared whole. A registry belongs to one tenant's pool, so statements never cross tenants.

use std::borrow::{Borrow, Cow};
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use super::residue::Residue;
use super::scope;

type HashMap<K, V> = std::collections::HashMap<K, V, ahash::RandomState>;
type HashSet<K> = std::collections::HashSet<K, ahash::RandomState>;

/// A statement as `Parse` describes it.
#[derive(Debug)]
pub struct Statement {
    /// Number, never used twice.
    pub id: u64,
    /// Its name on every server connection, without the NUL.
    pub name: Box<[u8]>,
    /// The body, behind it the scope that it was prepared in (see [`Registry::intern`]).
    key: Box<[u8]>,
    /// Length of the body.
    length: usize,
    /// What running it may leave behind in the session.
    pub residue: Residue,
    /// Whether it may have to do with names of prepared statements (`EXECUTE`).
    pub names: bool,
    /// Whether a server is known to have accepted it in its scope.
    pub accepted: AtomicBool,
    /// Whether it is one client's own, because nobody can say in what scope it was prepared.
    apart: bool,
    /// Whether what it returns has changed since: who prepares the same text again gets a new one.
    pub outdated: AtomicBool,
}

impl Statement {
    /// What follows the name in a Parse message: text, NUL, number and OIDs of the parameter types.
    #[inline]
    pub fn body(&self) -> &[u8] {
        &self.key[..self.length]
    }

    /// About the memory that it takes (bytes).
    fn cost(&self) -> usize {
        self.key.len() + size_of::<Self>()
    }

    /// What it was prepared in; see [`Registry::intern`].
    pub fn scope(&self) -> &str {
        scope::home(self.place())
    }

    /// The same, and behind it where it is used, if literals are read otherwise there.
    fn place(&self) -> &str {
        std::str::from_utf8(&self.key[self.length..]).unwrap_or_default()
    }

    /// Its text.
    pub fn text(&self) -> &[u8] {
        self.body().split(|&b| b == 0).next().unwrap_or_default()
    }

    /// Whether what it means depends on the scope.
    pub fn has_scope(&self) -> bool {
        has_scope(self.body())
    }
}

#[derive(Debug)]
struct ByBody(Arc<Statement>);

impl PartialEq for ByBody {
    fn eq(&self, other: &Self) -> bool {
        self.0.key == other.0.key
    }
}

impl Eq for ByBody {}

impl Hash for ByBody {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.key.hash(state);
    }
}

impl Borrow<[u8]> for ByBody {
    fn borrow(&self) -> &[u8] {
        &self.0.key
    }
}

/// The statements of one tenant.
#[derive(Debug, Default)]
pub struct Registry {
    next: Arc<AtomicU64>,
    known: Mutex<Known>,
    /// See [`Registry::asks`].
    asks: AtomicBool,
}

#[derive(Debug, Default)]
struct Known {
    statements: HashSet<ByBody>,
    /// What they cost.
    bytes: usize,
    /// How many there were after those that nobody holds were forgotten last, and what they cost.
    held: (usize, usize),
}

impl Known {
    /// Forgets those that nobody holds, if there are twice as many as were held last, or they cost as much: who closes
    /// what it prepares must not have it kept.
    fn tidy(&mut self) {
        let few = self.statements.len() < TIDY_ABOVE.max(2 * self.held.0);
        if few && self.bytes <= TIDY_ABOVE_BYTES.max(2 * self.held.1) {
            return;
        }
        self.statements.retain(|ByBody(statement)| Arc::strong_count(statement) > 1);
        // What has room for many keeps it.
        self.statements.shrink_to(2 * self.statements.len().max(TIDY_ABOVE));
        self.bytes = self.statements.iter().map(|ByBody(statement)| statement.cost()).sum();
        self.held = (self.statements.len(), self.bytes);
    }

    fn insert(&mut self, statement: Arc<Statement>) {
        self.tidy();
        self.bytes += statement.cost();
        self.statements.insert(ByBody(statement));
    }

    fn remove(&mut self, key: &[u8]) {
        if let Some(ByBody(statement)) = self.statements.take(key) {
            self.bytes -= statement.cost();
        }
    }
}

fn key<'a>(scope: &str, body: &'a [u8]) -> Cow<'a, [u8]> {
    let shared = scope.is_empty() || !has_scope(body);
    if shared { Cow::Borrowed(body) } else { Cow::Owned([body, scope.as_bytes()].concat()) }
}

/// First words of statements in which neither a name nor a value is looked at when they are prepared.
const WITHOUT_NAMES: &[&str] = &[
    "abort",
    "begin",
    "close",
    "commit",
    "deallocate",
    "discard",
    "end",
    "execute",
    "fetch",
    "listen",
    "lock",
    "move",
    "notify",
    "prepare",
    "release",
    "reset",
    "rollback",
    "savepoint",
    "set",
    "show",
    "start",
    "unlisten",
];

/// Whether what a statement with this body means depends on the scope.
pub fn has_scope(body: &[u8]) -> bool {
    let text = body.split(|&b| b == 0).next().unwrap_or_default().trim_ascii_start();
    let end = text.iter().position(|b| !b.is_ascii_alphabetic()).unwrap_or(text.len());
    // A backslash means something or nothing, a byte is a letter or half of one.
    let plain = text.is_ascii() && !text.contains(&b'\\');
    !plain || !WITHOUT_NAMES.iter().any(|word| text[..end].eq_ignore_ascii_case(word.as_bytes()))
}

fn names_others(body: &[u8]) -> bool {
    let contains = |word: &[u8]| body.windows(word.len()).any(|found| found.eq_ignore_ascii_case(word));
    ["execute", "deallocate", "prepare", "discard"].iter().any(|word| contains(word.as_bytes()))
}

/// Known statements above which those that no client holds are forgotten.
const TIDY_ABOVE: usize = 512;

/// And what they cost above which they are.
const TIDY_ABOVE_BYTES: usize = 1 << 20;

impl Registry {
    /// An empty registry. Numbers come from `next`, which all registries share: a client that goes from one pool to the
    /// next when its tenant moves takes its statements along.
    pub fn new(next: Arc<AtomicU64>) -> Self {
        Self { next, ..Self::default() }
    }

    /// Whether a client of the tenant has ever asked for the state of sequences: others may, then.
    #[inline]
    pub fn asks(&self) -> bool {
        self.asks.load(Ordering::Relaxed)
    }

    /// Notes that one has.
    pub fn note_asks(&self) {
        self.asks.store(true, Ordering::Relaxed);
    }

    /// The statement with this body in this scope, if a server has accepted it before.
    pub fn accepted(&self, scope: &str, body: &[u8]) -> Option<Arc<Statement>> {
        let known = self.known.lock();
        let usable = |s: &Arc<Statement>| s.accepted.load(Ordering::Relaxed) && !s.outdated.load(Ordering::Relaxed);
        known.statements.get(&*key(scope, body)).map(|ByBody(statement)| statement.clone()).filter(usable)
    }

    /// The statement in the place of this one for a client whose scope is now another. A server may read the text again when it
    /// is used, by the settings of that moment; who uses it with others must not find what has come of that.
    pub fn used_in(&self, statement: &Statement, scope: &str) -> Option<Arc<Statement>> {
        let home = statement.scope();
        let place = scope::used_in(home, scope);
        if statement.apart || *place == *statement.place() || !statement.has_scope() {
            return None;
        }
        let found = self.intern(&place, statement.body(), || statement.residue.clone());
        if *place != *home {
            found.accepted.fetch_or(statement.accepted.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        Some(found)
    }

    /// Nothing that was prepared so far is what a client gets that prepares the same text from now on: a table that it
    /// reads may be another one. Who has prepared it keeps it.
    pub fn forget(&self) {
        *self.known.lock() = Known::default();
    }

    /// The statement with this body (see [`Statement::body`]); `residue` is asked only when it is new. The scope says
    /// what else its meaning depends on: see [`scope`].
    pub fn intern(&self, scope: &str, body: &[u8], residue: impl FnOnce() -> Residue) -> Arc<Statement> {
        let key = key(scope, body);
        let mut known = self.known.lock();
        if let Some(ByBody(statement)) = known.statements.get(&*key) {
            if !statement.outdated.load(Ordering::Relaxed) {
                return statement.clone();
            }
            known.remove(&key);
        }
        let statement = Arc::new(self.statement(key.into(), body, residue()));
        known.insert(statement.clone());
        statement
    }

    /// The same for one client alone: nobody else gets this one, whatever it prepares.
    pub fn apart(&self, scope: &str, body: &[u8], residue: Residue) -> Arc<Statement> {
        let statement = self.statement(key(scope, body).into(), body, residue);
        Arc::new(Statement { apart: true, ..statement })
    }

    fn statement(&self, key: Box<[u8]>, body: &[u8], residue: Residue) -> Statement {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let name = format!("pgusher_{id}").into_bytes().into();
        let names = (residue.unknown || residue.frees) && names_others(body);
        let (accepted, outdated) = (false.into(), false.into());
        Statement { id, name, key, length: body.len(), residue, names, accepted, apart: false, outdated }
    }
}

/// Which statements a server connection has prepared, and whose the unnamed one is.
#[derive(Debug, Default)]
pub struct Prepared {
    have: HashMap<u64, Held>,
    /// What they cost.
    bytes: usize,
    clock: u64,
    /// Who parsed the unnamed statement last.
    pub unnamed: Option<UnnamedOwner>,
    /// Statements whose names mean something else there: to be closed before they are prepared.
    squatted: HashSet<u64>,
    /// Who may have changed last what `currval` and `lastval` say.
    pub sequences_of: Option<Stay>,
    /// They may still say what others have done before.
    pub sequences_mixed: bool,
}

/// A client, and which of the server connections on which it has advanced sequences, one after the other. What it did on
/// an earlier one is not what it did last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stay {
    /// The client; 0 is nobody.
    pub client: u64,
    /// Counted from 1; 0 is none.
    pub number: u64,
}

#[derive(Debug)]
struct Held {
    statement: Arc<Statement>,
    used: u64,
    /// What it returns here, as far as is known; 0 is not.
    described: u64,
}

/// What the statements of one server connection may cost (bytes), but for one that costs more alone. The server needs
/// several times as much for them.
const MAX_BYTES: usize = 4 << 20;

/// A client and the number of its Parse of the unnamed statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnnamedOwner {
    /// The client.
    pub client: u64,
    /// Which of its unnamed statements.
    pub serial: u64,
}

impl Prepared {
    /// `currval` and `lastval` say nothing any more.
    pub fn forget_sequences(&mut self) {
        (self.sequences_of, self.sequences_mixed) = (None, false);
    }

    /// They may still say what somebody has done before: letting the session forget it has failed.
    pub fn doubt_sequences(&mut self) {
        self.sequences_of.get_or_insert(Stay { client: 0, number: 0 });
        self.sequences_mixed = true;
    }

    /// Whether the statement is there; if so it counts as used now.
    #[inline]
    pub fn touch(&mut self, id: u64) -> bool {
        self.clock += 1;
        let clock = self.clock;
        self.have.get_mut(&id).map(|held| held.used = clock).is_some()
    }

    /// The same, with a fingerprint of what the statement returns on this server connection, or 0 if nobody has asked.
    /// `None`: it is not there.
    #[inline]
    pub fn described(&mut self, id: u64) -> Option<u64> {
        self.clock += 1;
        let clock = self.clock;
        self.have.get_mut(&id).map(|held| {
            held.used = clock;
            held.described
        })
    }

    /// Notes what it returns.
    pub fn describe(&mut self, id: u64, described: u64) {
        if let Some(held) = self.have.get_mut(&id) {
            held.described = described;
        }
    }

    /// Notes that the statement is being prepared. Returns those to be closed to stay within `max`, and within
    /// [`MAX_BYTES`].
    pub fn add(&mut self, statement: Arc<Statement>, max: usize) -> Vec<Arc<Statement>> {
        self.clock += 1;
        let used = self.clock;
        let mut closed = Vec::new();
        while self.have.len() >= max.max(1) || self.bytes + statement.cost() > MAX_BYTES {
            let oldest = self.have.iter().min_by_key(|(_, held)| held.used).map(|(id, _)| *id);
            let Some(held) = oldest.and_then(|id| self.take(id)) else { break };
            closed.push(held);
        }
        self.bytes += statement.cost();
        self.have.insert(statement.id, Held { statement, used, described: 0 });
        closed
    }

    /// Notes that the name of this statement means something else.
    pub fn squat(&mut self, id: u64) {
        self.remove(id);
        self.squatted.insert(id);
    }

    /// Whether the name of this statement means something else.
    pub fn is_squatted(&self, id: u64) -> bool {
        self.squatted.contains(&id)
    }

    /// Whether the name of this statement means something else; it is taken as put right by that.
    pub fn put_right(&mut self, id: u64) -> bool {
        !self.squatted.is_empty() && self.squatted.remove(&id)
    }

    /// Notes that the statement is not there after all.
    pub fn remove(&mut self, id: u64) {
        self.take(id);
    }

    fn take(&mut self, id: u64) -> Option<Arc<Statement>> {
        let held = self.have.remove(&id)?;
        self.bytes -= held.statement.cost();
        Some(held.statement)
    }

    /// Notes that the server no longer runs the statement as it was prepared.
    pub fn outdate(&self, id: u64) {
        if let Some(held) = self.have.get(&id) {
            held.statement.outdated.store(true, Ordering::Relaxed);
        }
    }

    /// Takes out the statements that are not to be kept.
    pub fn take_unless(&mut self, keep: impl Fn(u64) -> bool) -> Vec<Arc<Statement>> {
        let others: Vec<u64> = self.have.keys().copied().filter(|id| !keep(*id)).collect();
        others.into_iter().filter_map(|id| self.take(id)).collect()
    }

    /// Notes that nothing is prepared any more.
    pub fn clear(&mut self) {
        self.have.clear();
        self.bytes = 0;
        self.squatted.clear();
        self.unnamed = None;
    }

    /// How many are there, whatever they mean.
    pub fn count(&self) -> usize {
        self.have.len() + self.squatted.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identity_is_text_and_types() {
        let registry = Registry::default();
        let a = registry.intern("", b"SELECT $1\0\0\x01\0\0\0\x17", Residue::none);
        let b = registry.intern("", b"SELECT $1\0\0\x01\0\0\0\x19", Residue::none);
        let again = registry.intern("", b"SELECT $1\0\0\x01\0\0\0\x17", Residue::anything);
        assert_ne!(a.id, b.id);
        assert!(Arc::ptr_eq(&a, &again));
        assert_ne!(a.name, b.name);
    }

    #[test]
    fn the_same_text_is_another_statement_elsewhere_if_it_has_names() {
        let registry = Registry::default();
        let select = registry.intern("", b"SELECT * FROM t\0\0\0", Residue::none);
        let elsewhere = registry.intern("search_path\0x\0", b"SELECT * FROM t\0\0\0", Residue::none);
        assert_ne!(select.id, elsewhere.id);
        assert_eq!(
            (select.scope(), elsewhere.scope(), elsewhere.text()),
            ("", "search_path\0x\0", &b"SELECT * FROM t"[..])
        );
        let commit = registry.intern("", b" commit\0\0\0", Residue::none);
        assert!(Arc::ptr_eq(&commit, &registry.intern("search_path\0x\0", b" commit\0\0\0", Residue::none)));
        assert!(select.has_scope() && !commit.has_scope());
        assert!(registry.intern("", b"SET a = '\\'\0\0\0", Residue::none).has_scope());
    }

    #[test]
    fn who_uses_a_statement_with_other_settings_has_one_of_its_own() {
        let registry = Registry::default();
        let home = registry.intern("search_path\0\0", b"SELECT '1/2/2026'::date\0\0\0", Residue::none);
        home.accepted.store(true, Ordering::Relaxed);
        // Servers themselves look for another search_path.
        assert!(registry.used_in(&home, "").is_none());
        let there = registry.used_in(&home, "DateStyle\0German\0").unwrap();
        assert_ne!(there.id, home.id);
        assert!(there.scope() == home.scope() && there.accepted.load(Ordering::Relaxed));
        assert!(registry.used_in(&there, "DateStyle\0German\0search_path\0x\0").is_none());
        let back = registry.used_in(&there, "search_path\0x\0").unwrap();
        assert!(Arc::ptr_eq(&back, &home));
    }

    #[test]
    fn an_outdated_statement_is_not_given_out_again() {
        let registry = Registry::default();
        let old = registry.intern("", b"a\0\0\0", Residue::none);
        old.accepted.store(true, Ordering::Relaxed);
        let mut prepared = Prepared::default();
        prepared.add(old.clone(), 2);
        prepared.outdate(old.id);
        assert!(registry.accepted("", b"a\0\0\0").is_none());
        let new = registry.intern("", b"a\0\0\0", Residue::none);
        assert_ne!(old.name, new.name);
        assert!(Arc::ptr_eq(&new, &registry.intern("", b"a\0\0\0", Residue::none)));
    }

    #[test]
    fn the_least_recently_used_is_closed() {
        let registry = Registry::default();
        let [a, b, c] = [b"a\0\0\0", b"b\0\0\0", b"c\0\0\0"].map(|body| registry.intern("", body, Residue::none));
        let mut prepared = Prepared::default();
        assert!(prepared.add(a.clone(), 2).is_empty());
        assert!(prepared.add(b.clone(), 2).is_empty());
        assert!(prepared.touch(a.id));
        let closed = prepared.add(c, 2);
        assert_eq!(closed.iter().map(|s| s.id).collect::<Vec<_>>(), [b.id]);
        assert!(!prepared.touch(b.id));
    }

    /// A text of this many kilobytes that nobody has seen.
    fn long(number: usize, kilobytes: usize) -> Vec<u8> {
        [format!("SELECT {number} --").as_bytes(), &vec![b' '; kilobytes << 10], b"\0\0\0"].concat()
    }

    fn known_bytes(registry: &Registry) -> usize {
        registry.known.lock().statements.iter().map(|ByBody(statement)| statement.cost()).sum()
    }

    #[test]
    fn what_nobody_holds_takes_no_memory_for_long() {
        let registry = Registry::default();
        let kept: Vec<_> = (0..8).map(|n| registry.intern("", &long(n, 100), Residue::none)).collect();
        for n in 8..300 {
            registry.intern("", &long(n, 100), Residue::none);
            let known = known_bytes(&registry);
            assert!(known < 3 << 20, "{known} after {n}");
            assert_eq!(registry.known.lock().bytes, known);
        }
        for statement in &kept {
            assert!(Arc::ptr_eq(statement, &registry.intern("", statement.body(), Residue::none)));
        }
        registry.intern("", &long(300, 16 << 10), Residue::none);
        registry.intern("", &long(301, 1), Residue::none);
        assert!(known_bytes(&registry) < 3 << 20);
    }

    #[test]
    fn a_registry_is_tidied_seldom_while_all_is_held() {
        let registry = Registry::default();
        let mut tidied = 0;
        let mut before = (0, 0);
        let held: Vec<_> = (0..2_000)
            .map(|n| {
                let statement = registry.intern("", &long(n, 4), Residue::none);
                let now = registry.known.lock().held;
                tidied += usize::from(now != before);
                before = now;
                statement
            })
            .collect();
        assert!(tidied < 12, "{tidied}");
        drop(held);
        for n in 0..4_000 {
            registry.intern("", &long(10_000 + n, 0), Residue::none);
        }
        assert!(registry.known.lock().statements.len() <= 2 * TIDY_ABOVE);
    }

    #[test]
    fn a_server_connection_has_statements_of_some_size_only() {
        let registry = Registry::default();
        let mut prepared = Prepared::default();
        let mut closed = 0;
        for n in 0..100 {
            closed += prepared.add(registry.intern("", &long(n, 100), Residue::none), 200).len();
        }
        assert_eq!(closed + prepared.count(), 100);
        assert!((35..=40).contains(&prepared.count()), "{}", prepared.count());
        // Alone it may cost what it will.
        let large = registry.intern("", &long(100, 16 << 10), Residue::none);
        assert_eq!(closed + prepared.add(large.clone(), 200).len(), 100);
        assert!(prepared.touch(large.id) && prepared.count() == 1);
        let small = registry.intern("", &long(101, 1), Residue::none);
        assert_eq!(prepared.add(small, 200)[0].id, large.id);
        prepared.clear();
        assert_eq!(prepared.bytes, 0);
    }
}
