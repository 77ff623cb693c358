//! Statements that a client has prepared, and that its present server connection has not.
//!
//! They are prepared again when they are used, and as they were: in the scope of then (`search_path` and the like), so that
//! what the server says of them is what it says where they never went away. Others are closed to make room for them, or
//! because they are for nobody else to see.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::BytesMut;

use super::description::fingerprint;
use super::events::{Event, Events};
use super::expect::{Expect, Shared, ends_by_itself};
use super::{Link, Session, Statements, Verdict};
use crate::error::{PgError, Routine, sqlstate};
use crate::pool::scope;
use crate::pool::statements::{Prepared, Statement};
use crate::relay::lex::{self, Lex, Token};
use crate::relay::names::Verb;
use crate::tenant::sql::{Literal, Value};
use crate::wire::frame::Header;
use crate::wire::message;

type HashSet<K> = std::collections::HashSet<K, ahash::RandomState>;

/// The name of our statements that live as long as it takes to run them.
const STEP: &[u8] = b"pgusher_step";

impl Session {
    /// Whether the scope may be another than is known, in this transaction.
    pub(super) fn scope_in_doubt(&self) -> bool {
        self.rescopes || self.residue.resets || self.residue.settings.iter().any(|name| scope::has(name))
    }

    /// The same, and what a function has set counts.
    fn is_anywhere(&self) -> bool {
        self.scope_in_doubt() || self.residue.unknown
    }

    /// Prepares what a Query needs, in a group of messages of ours; in the client's, if it has not ended one before.
    pub(super) fn bring_to_query(&mut self, events: &Events, link: &mut Link<'_>, out: &mut BytesMut) {
        let Statements::Shared(max) = self.statements else { return };
        let (before, apart) = (self.expects.len(), !self.open_group);
        self.bring_all(events, max, link, out);
        if apart && self.expects.len() > before {
            message::sync(out);
            self.expects.push_back(Expect::InjectedSync);
        }
    }

    /// Prepares what the unnamed statement names.
    pub(super) fn bring_used(&mut self, max: usize, link: &mut Link<'_>, out: &mut BytesMut) {
        if let Some(events @ Some(_)) = self.unnamed.as_ref().map(|unnamed| unnamed.events.clone()) {
            self.note_used(&events);
            self.bring_all(&events, max, link, out);
        }
    }

    /// Prepares what these name. Where a name only has to be there, anything will do.
    pub(super) fn bring_all(&mut self, events: &Events, max: usize, link: &mut Link<'_>, out: &mut BytesMut) {
        let shared = |event: &Event| Some((event.verb, event.shared.clone()?));
        let mut used: Vec<_> = events.iter().flat_map(|events| events.iter()).filter_map(shared).collect();
        used.sort_by_key(|(verb, _)| *verb != Verb::Execute);
        // What has not been answered may end it.
        let failed = self.status == b'E' && !self.expects.iter().any(ends_by_itself);
        for (verb, statement) in used {
            if verb == Verb::Execute {
                // A transaction that has failed takes no statement, but an empty one.
                if failed {
                    continue;
                }
                self.bring_one(&statement, max, link, out);
            } else if !link.prepared.touch(statement.id) && !link.prepared.is_squatted(statement.id) {
                message::parse(out, &statement.name, b"", &[0, 0]);
                link.prepared.squat(statement.id);
                self.push_extended(Expect::InjectedEmpty(statement.id));
            }
        }
    }

    /// Prepares a statement for a message of the extended protocol, in a group of its own where that is needed and possible.
    pub(super) fn bring_apart(
        &mut self,
        statement: &Arc<Statement>,
        max: usize,
        link: &mut Link<'_>,
        out: &mut BytesMut,
    ) {
        // Nearly always it is there, and nothing else has to be asked.
        if link.prepared.touch(statement.id) {
            return;
        }
        let apart = self.may_come_before() && self.is_elsewhere(statement);
        self.bring_missing(statement, max, link, out);
        if apart {
            message::sync(out);
            self.expects.push_back(Expect::InjectedSync);
            self.open_group = false;
        }
    }

    fn bring_one(&mut self, statement: &Arc<Statement>, max: usize, link: &mut Link<'_>, out: &mut BytesMut) {
        if !link.prepared.touch(statement.id) {
            self.bring_missing(statement, max, link, out);
        }
    }

    fn bring_missing(&mut self, statement: &Arc<Statement>, max: usize, link: &mut Link<'_>, out: &mut BytesMut) {
        self.make_room(statement, max, link, out);
        let elsewhere = self.is_elsewhere(statement);
        let moved = if elsewhere { self.moves(statement.scope()) } else { Vec::new() };
        if elsewhere {
            let there = moved.iter().flat_map(|(name, there)| {
                let here = format!("pg_catalog.current_setting({})", Literal(name));
                [set(&kept(name), &here), set(name, there)]
            });
            self.step(&select(there), Expect::InjectedStep(b'C'), out);
        }
        message::parse_with(out, &statement.name, statement.body());
        self.push_extended(Expect::Injected(statement.id));
        if elsewhere {
            let back = moved
                .iter()
                .map(|(name, _)| set(name, &format!("pg_catalog.current_setting({})", Literal(&kept(name)))));
            self.step(&select(back), Expect::InjectedStep(b'C'), out);
        }
    }

    /// Notes a statement as prepared on the server, closes those least recently used if there are too many, and what has
    /// its name there.
    pub(super) fn make_room(
        &mut self,
        statement: &Arc<Statement>,
        max: usize,
        link: &mut Link<'_>,
        out: &mut BytesMut,
    ) {
        let victims = link.prepared.add(statement.clone(), max);
        let squatter = link.prepared.put_right(statement.id).then(|| statement.clone());
        for closed in victims.into_iter().chain(squatter) {
            message::close(out, b'S', &closed.name);
            self.push_extended(Expect::InjectedClose(closed.id));
        }
    }

    /// Closes what other clients have prepared on the server connection, for who lists prepared statements. Returns whether
    /// there was anything to close.
    pub(super) fn hide_others(&mut self, used: Option<u64>, link: &mut Link<'_>, out: &mut BytesMut) -> bool {
        if self.statements == Statements::PassThrough {
            return false;
        }
        let own: HashSet<u64> = self.named.values().map(|statement| statement.id).chain(used).collect();
        let others = link.prepared.take_unless(|id| own.contains(&id));
        for statement in &others {
            message::close(out, b'S', &statement.name);
            self.push_extended(Expect::InjectedClose(statement.id));
        }
        !others.is_empty()
    }

    /// The settings that have to be others for what was prepared in this scope, and their values as SQL.
    fn moves(&self, scope: &str) -> Vec<(&'static str, String)> {
        let doubt = self.is_anywhere();
        let differs = |name: &&str| doubt || scope::value(scope, name) != scope::value(&self.scope, name);
        let there = |name: &'static str| match scope::value(scope, name) {
            Some(value) => (name, Value(value).to_string()),
            None => (name, began_with(name)),
        };
        scope::names().filter(differs).map(there).collect()
    }

    /// Whether the statement was prepared in another scope than the present one, as far as is known. In a transaction that
    /// has failed nothing can be done about that.
    fn is_elsewhere(&self, statement: &Statement) -> bool {
        let known = statement.has_scope() && statement.accepted.load(Ordering::Relaxed);
        known && self.status != b'E' && (statement.scope() != &*self.scope || self.is_anywhere())
    }

    /// Runs a statement of ours that returns no row, within the client's group of messages; `run` stands for that.
    pub(super) fn step(&mut self, text: &str, run: Expect, out: &mut BytesMut) {
        // One that was cancelled half way is still there.
        message::close(out, b'S', STEP);
        message::parse(out, STEP, text.as_bytes(), &[0, 0]);
        message::bind(out, STEP, STEP);
        message::execute(out, STEP);
        message::close(out, b'P', STEP);
        message::close(out, b'S', STEP);
        let [before, after] = [&b"312"[..], b"33"].map(|answers| answers.iter().copied().map(Expect::InjectedStep));
        for expect in before.chain([run]).chain(after) {
            self.push_extended(expect);
        }
    }

    /// What a Bind of a named statement meets before it is the server's turn: too few or too many values for a statement
    /// that is not there, or other columns than the client was told of.
    pub(super) fn look_before_bind(
        &mut self,
        name: &[u8],
        values: &[u8],
        max: usize,
        link: &mut Link<'_>,
        out: &mut BytesMut,
    ) -> Option<Verdict> {
        let (statement, told) = self.named.get_told(name)?;
        let described = if statement.names { None } else { link.prepared.described(statement.id) };
        if described.is_some() && (told == 0 || described == Some(told)) {
            return None;
        }
        if let Some(error) = miscounted(statement, name, values) {
            return Some(self.refuse_parse(false, error, out));
        }
        self.look_at_columns(name, max, link, out)
    }

    /// Asks the server what a named statement returns here, if nobody has, before it is used; refuses what differs from what
    /// the client was told. `None`: nothing stands in the way.
    fn look_at_columns(&mut self, name: &[u8], max: usize, link: &mut Link<'_>, out: &mut BytesMut) -> Option<Verdict> {
        let (statement, told) = self.named.get_told(name)?;
        if told == 0 || self.status == b'E' || statement.names || statement.residue.processes {
            return None;
        }
        let described = link.prepared.described(statement.id).unwrap_or_default();
        if described == told {
            return None;
        }
        let statement = &statement.clone();
        if described != 0 {
            // Who prepares it again gets another one, as it would from a server.
            link.prepared.outdate(statement.id);
            let error = PgError::error(sqlstate::FEATURE_NOT_SUPPORTED, "cached plan must not change result type");
            return Some(self.refuse_parse(false, error.routine(Routine::RevalidateCachedQuery), out));
        }
        if self.expects.iter().any(|e| matches!(e, Expect::InjectedDescribe(asked) if asked.id == statement.id)) {
            return Some(Verdict::Later);
        }
        self.bring_apart(statement, max, link, out);
        message::describe(out, b'S', &statement.name);
        message::flush(out);
        self.push_extended(Expect::InjectedDescribe(Shared { id: statement.id, name: name.into() }));
        Some(Verdict::Ahead)
    }

    /// What is bound to this portal, if it has not been told yet what it returns, or not here.
    pub(super) fn bound_and_unknown(&self, portal: &[u8], prepared: &mut Prepared) -> Option<Shared> {
        let Some(Expect::Bind(Some(shared))) = self.expects.back().filter(|_| portal.is_empty()) else { return None };
        let (statement, told) = self.named.get_told(&shared.name)?;
        let known = statement.id != shared.id || told != 0 && prepared.described(shared.id) != Some(0);
        (!known).then(|| Shared { id: shared.id, name: shared.name.clone() })
    }

    /// What a server says of parameters and columns.
    pub(super) fn described(&mut self, header: Header, frame: &[u8], prepared: &mut Prepared) -> Verdict {
        let ours = matches!(self.expects.front(), Some(Expect::InjectedDescribe(_)));
        let verdict = if ours { Verdict::Swallow } else { Verdict::Forward };
        if header.tag == b't' || !(ours || matches!(self.expects.front(), Some(Expect::Describe(_)))) {
            return verdict;
        }
        if let Some(Expect::Describe(Some(Shared { id, name })) | Expect::InjectedDescribe(Shared { id, name })) =
            self.take()
        {
            let found = fingerprint(header, frame);
            prepared.describe(id, found);
            if !ours {
                self.named.tell(&name, id, found);
            }
        }
        verdict
    }

    /// Notes why what a group of messages of ours was for could not be prepared.
    pub(super) fn note_unprepared(&mut self, error: PgError) {
        let id = self.expects.iter().find_map(|e| if let Expect::Injected(id) = e { Some(*id) } else { None });
        self.unprepared = id.map(|id| Box::new((id, error)));
    }

    /// Why the statement is not there whose absence, by our name for it, the server has found.
    pub(super) fn reason_for(&self, error: &PgError, ours: &str) -> Option<&PgError> {
        let (id, reason) = &**self.unprepared.as_ref()?;
        let absent = error.code == sqlstate::UNKNOWN_STATEMENT || error.code == sqlstate::IN_FAILED_TRANSACTION;
        (absent && ours == format!("\"pgusher_{id}\"")).then_some(reason)
    }
}

/// Where a setting is kept while it is another one.
fn kept(name: &str) -> String {
    format!("pgusher.{name}")
}

fn began_with(name: &str) -> String {
    let name = Literal(name);
    format!("(SELECT reset_val FROM pg_catalog.pg_settings WHERE name OPERATOR(pg_catalog.=) {name})")
}

fn set(name: &str, value: &str) -> String {
    format!("pg_catalog.set_config({}, {value}, true)", Literal(name))
}

/// A statement that calls these and returns no row: none of them is null.
fn select(calls: impl Iterator<Item = String>) -> String {
    format!("SELECT WHERE {} IS NULL", calls.collect::<Vec<_>>().join(" IS NULL OR "))
}

/// How many parameters a statement has: as many types as were given, and as the highest number in the text says.
fn parameters(statement: &Statement) -> usize {
    let text = statement.text();
    let given = statement.body().get(text.len() + 1..text.len() + 3).map_or(0, |n| u16::from_be_bytes([n[0], n[1]]));
    let number = |token: &Token| if let Token::Parameter(number) = token { *number } else { 0 };
    let highest = lex::tokens(text, Lex::default()).iter().map(number).max().unwrap_or(0);
    usize::from(given.max(highest))
}

/// What a server says of a Bind with too few or too many values.
fn miscounted(statement: &Statement, name: &[u8], values: &[u8]) -> Option<PgError> {
    let number = |at: usize| Some(usize::from(u16::from_be_bytes(values.get(at..at + 2)?.try_into().ok()?)));
    let formats = number(0)?;
    let given = number(2 + 2 * formats)?;
    let wanted = parameters(statement);
    let wrong = given != wanted && (formats <= 1 || formats == given);
    wrong.then(|| {
        let shown = String::from_utf8_lossy(name);
        let text =
            format!("bind message supplies {given} parameters, but prepared statement \"{shown}\" requires {wanted}");
        PgError::error(sqlstate::PROTOCOL_VIOLATION, text)
    })
}
