//! A server in miniature: the session state that clients of a pooler fight about, and nothing else.
//!
//! Written from PostgreSQL's manual, not from the relay: settings with `SET LOCAL` and savepoints, temporary tables,
//! holdable cursors, session locks, prepared statements of both kinds, implicit transactions, what an error skips. Before
//! it carries out a statement of a client it says in a notice what the session holds, so that whoever compares answers
//! compares all of that, too. Simplified: in a failed transaction Describe is always an error.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use bytes::BytesMut;

use crate::error::PgError;
use crate::wire::frame::{self, HEADER, cstr};
use crate::wire::message::{self, Cursor};

/// Role that sessions belong to.
pub(super) const ROLE: &str = "client_001";

/// Settings and what they are in a new session.
const DEFAULTS: [(&str, &str); 6] = [
    ("application_name", ""),
    ("app.user", ""),
    ("lock_timeout", "0"),
    ("search_path", "own"),
    ("timezone", "UTC"),
    ("work_mem", "4MB"),
];

/// Those that are reported, under the name that they are reported by.
const REPORTED: [(&str, &str); 2] = [("application_name", "application_name"), ("timezone", "TimeZone")];

/// What a transaction that is rolled back takes back.
#[derive(Debug, Clone, Default)]
struct State {
    /// Settings as they will be after the transaction.
    kept: BTreeMap<String, String>,
    /// As they are now: `SET LOCAL` included.
    shown: BTreeMap<String, String>,
    temp: BTreeSet<String>,
    cursors: BTreeMap<String, String>,
}

#[derive(Debug)]
struct Tx {
    explicit: bool,
    failed: bool,
    before: State,
    savepoints: Vec<(String, State)>,
}

#[derive(Debug, Clone)]
struct Statement {
    text: String,
    by_sql: bool,
}

/// One session.
#[derive(Debug, Default)]
pub(super) struct Pg {
    state: State,
    tx: Option<Tx>,
    prepared: BTreeMap<String, Statement>,
    unnamed: Option<String>,
    portal: Option<String>,
    locks: BTreeMap<String, u32>,
    /// Settings of an application's own that this process has heard of.
    known: BTreeSet<String>,
    reported: BTreeMap<&'static str, String>,
    /// An error has been answered: everything up to Sync is skipped.
    skips: bool,
    open_group: bool,
    input: Vec<u8>,
    pub(super) said_goodbye: bool,
}

/// What a statement returns, if it returns anything, and its tag.
type Done = Result<(Option<Vec<Option<String>>>, String), PgError>;

fn error(code: &'static str, text: impl Into<String>) -> PgError {
    PgError::error(code, text.into())
}

fn tag(tag: &str) -> Done {
    Ok((None, tag.to_owned()))
}

fn row(value: impl Into<String>) -> Done {
    Ok((Some(vec![Some(value.into())]), "SELECT 1".to_owned()))
}

fn hex(text: &str) -> String {
    text.bytes().map(|byte| format!("{byte:02x}")).collect()
}

fn default(name: &str) -> &'static str {
    DEFAULTS.iter().find(|(have, _)| *have == name).map_or("", |(_, value)| value)
}

/// `('a', 'b', false)` of every call of a function in a text.
fn calls<'a>(sql: &'a str, function: &str) -> Vec<Vec<&'a str>> {
    let arguments = |call: &'a str| call.split(')').next().unwrap_or_default();
    let split = |call: &'a str| arguments(call).split(", ").map(|a| a.trim_matches('\'')).collect();
    sql.split(&format!("{function}(")).skip(1).map(split).collect()
}

impl Pg {
    /// The answer to the startup packet.
    pub(super) fn welcome(&mut self) -> BytesMut {
        let mut out = BytesMut::new();
        message::authentication_ok(&mut out);
        let fixed = [("client_encoding", "UTF8"), ("is_superuser", "off"), ("server_version", "15.1")];
        let fixed = fixed.into_iter().chain([("session_authorization", ROLE), ("standard_conforming_strings", "on")]);
        fixed.for_each(|(name, value)| message::parameter_status(&mut out, name, value.as_bytes()));
        self.report(&mut out);
        message::backend_key_data(&mut out, 7, &[0; 4]);
        message::ready_for_query(&mut out, b'I');
        out
    }

    /// What it answers to bytes of the protocol.
    pub(super) fn feed(&mut self, bytes: &[u8]) -> BytesMut {
        self.input.extend_from_slice(bytes);
        let mut out = BytesMut::new();
        while let Some(header) = frame::header(&self.input).unwrap() {
            if self.input.len() < header.total {
                break;
            }
            let frame: Vec<u8> = self.input.drain(..header.total).collect();
            self.message(header.tag, &frame[HEADER..], &mut out);
        }
        out
    }

    /// Whether it waits for nothing: no transaction, no group of messages without its Sync.
    pub(super) fn is_idle(&self) -> bool {
        self.tx.is_none() && !self.open_group && !self.skips
    }

    /// What it holds that no other session can have, as an index into the reasons for pins.
    pub(super) fn holds(&self) -> Option<usize> {
        let held = [
            !self.state.temp.is_empty(),
            !self.state.cursors.is_empty(),
            self.prepared.values().any(|statement| statement.by_sql),
            false,
            !self.locks.is_empty(),
        ];
        held.iter().position(|held| *held)
    }

    /// Everything that a client could find out about the session.
    fn view(&self) -> String {
        let changed = |settings: &BTreeMap<String, String>| -> Vec<String> {
            // Where pgusher keeps what it changes for a moment is nothing that anybody looks for.
            let differs =
                |(name, value): &(&String, &String)| !name.starts_with("pgusher.") && default(name) != value.as_str();
            settings.iter().filter(differs).map(|(name, value)| format!("{name}={value}")).collect()
        };
        let by_sql = self.prepared.iter().filter(|(_, s)| s.by_sql).map(|(name, s)| (name, &s.text));
        format!(
            "{} {:?} then {:?} temp {:?} cursors {:?} prepared {:?} locks {:?}",
            char::from(self.status()),
            changed(&self.state.shown),
            changed(&self.state.kept),
            self.state.temp,
            self.state.cursors,
            by_sql.collect::<Vec<_>>(),
            self.locks,
        )
    }

    fn status(&self) -> u8 {
        match &self.tx {
            Some(tx) if tx.failed => b'E',
            Some(tx) if tx.explicit => b'T',
            _ => b'I',
        }
    }

    fn message(&mut self, tag: u8, body: &[u8], out: &mut BytesMut) {
        if self.skips && tag != b'S' && tag != b'X' {
            return;
        }
        self.open_group |= matches!(tag, b'P' | b'B' | b'D' | b'E' | b'C');
        let result = match tag {
            b'Q' => {
                self.query(body, out);
                Ok(())
            }
            b'P' => self.parse(body).map(|()| out.extend_from_slice(&[b'1', 0, 0, 0, 4])),
            b'B' => self.bind(body).map(|()| out.extend_from_slice(&[b'2', 0, 0, 0, 4])),
            b'D' => self.describe(body, out),
            b'E' => self.execute(out),
            b'C' => {
                let name = cstr(&body[1..]).unwrap().0;
                match (body[0], name) {
                    (b'S', b"") => self.unnamed = None,
                    (b'S', name) => drop(self.prepared.remove(std::str::from_utf8(name).unwrap())),
                    _ => self.portal = None,
                }
                out.extend_from_slice(&[b'3', 0, 0, 0, 4]);
                Ok(())
            }
            b'S' => {
                (self.skips, self.open_group) = (false, false);
                self.end_implicit();
                self.ready(out);
                Ok(())
            }
            b'H' => Ok(()),
            b'X' => {
                self.said_goodbye = true;
                Ok(())
            }
            tag => panic!("the server got {:?}", char::from(tag)),
        };
        if let Err(error) = result {
            self.skips = true;
            self.fail(&error, out);
        }
    }

    fn ready(&mut self, out: &mut BytesMut) {
        if self.tx.is_none() {
            self.portal = None;
        }
        self.report(out);
        message::ready_for_query(out, self.status());
    }

    fn report(&mut self, out: &mut BytesMut) {
        for (name, shown) in REPORTED {
            let value = self.setting(name);
            if self.reported.get(name) != Some(&value) {
                message::parameter_status(out, shown, value.as_bytes());
                self.reported.insert(name, value);
            }
        }
    }

    fn query(&mut self, body: &[u8], out: &mut BytesMut) {
        (self.unnamed, self.portal, self.open_group) = (None, None, false);
        let text = String::from_utf8(cstr(body).unwrap().0.to_vec()).unwrap();
        let statements: Vec<&str> = text.split(';').map(str::trim).filter(|s| !s.is_empty()).collect();
        for sql in &statements {
            let done = if statements.len() > 1 && *sql == "DISCARD ALL" {
                Err(error("25001", "DISCARD ALL cannot run inside a transaction block"))
            } else {
                self.statement(sql, out)
            };
            match done {
                Ok((row, tag)) => {
                    if let Some(row) = &row {
                        row_description(out, row.len());
                    }
                    self.answer(row, &tag, out);
                }
                Err(error) => {
                    self.fail(&error, out);
                    break;
                }
            }
        }
        self.end_implicit();
        self.ready(out);
    }

    fn answer(&self, row: Option<Vec<Option<String>>>, tag: &str, out: &mut BytesMut) {
        if let Some(row) = row {
            message::put_message(out, b'D', |b| {
                b.extend_from_slice(&u16::try_from(row.len()).unwrap().to_be_bytes());
                for value in row {
                    let length = value.as_ref().map_or(-1, |value| i32::try_from(value.len()).unwrap());
                    b.extend_from_slice(&length.to_be_bytes());
                    b.extend_from_slice(value.unwrap_or_default().as_bytes());
                }
            });
        }
        message::command_complete(out, tag);
    }

    fn parse(&mut self, body: &[u8]) -> Result<(), PgError> {
        let (name, rest) = cstr(body).unwrap();
        let name = String::from_utf8(name.to_vec()).unwrap();
        let text = String::from_utf8(cstr(rest).unwrap().0.to_vec()).unwrap();
        if name.is_empty() {
            self.unnamed = None;
        }
        if text.starts_with("refused") {
            return Err(error("42601", "syntax error"));
        }
        self.check_failed(&text)?;
        if name.is_empty() {
            self.unnamed = Some(text);
            return Ok(());
        }
        let taken = error("42P05", format!("prepared statement \"{name}\" already exists"));
        match self.prepared.entry(name) {
            Entry::Occupied(_) => Err(taken),
            Entry::Vacant(vacant) => {
                vacant.insert(Statement { text, by_sql: false });
                Ok(())
            }
        }
    }

    fn text_of(&self, name: &[u8]) -> Result<String, PgError> {
        let name = std::str::from_utf8(name).unwrap();
        if name.is_empty() {
            return self.unnamed.clone().ok_or_else(|| error("26000", "unnamed prepared statement does not exist"));
        }
        let missing = || error("26000", format!("prepared statement \"{name}\" does not exist"));
        self.prepared.get(name).map(|statement| statement.text.clone()).ok_or_else(missing)
    }

    fn bind(&mut self, body: &[u8]) -> Result<(), PgError> {
        let mut cursor = Cursor::new(body);
        cursor.cstr().unwrap();
        let name = cursor.cstr().unwrap();
        let mut text = self.text_of(name)?;
        for _ in 0..cursor.i16().unwrap() {
            cursor.i16().unwrap();
        }
        let given = cursor.i16().unwrap();
        let wanted = (1..9).rev().find(|at| text.contains(&format!("${at}"))).unwrap_or(0);
        if given != wanted {
            let name = std::str::from_utf8(name).unwrap();
            let text = format!(
                "bind message supplies {given} parameters, but prepared statement \"{name}\" requires {wanted}"
            );
            return Err(error("08P01", text));
        }
        self.check_failed(&text)?;
        for at in 0..given {
            let length = cursor.i32().unwrap();
            let value = std::str::from_utf8(cursor.bytes(length.try_into().unwrap()).unwrap()).unwrap();
            text = text.replace(&format!("${}", at + 1), &format!("'{value}'"));
        }
        self.portal = Some(text);
        Ok(())
    }

    fn describe(&self, body: &[u8], out: &mut BytesMut) -> Result<(), PgError> {
        let name = cstr(&body[1..]).unwrap().0;
        let missing = || error("34000", "portal \"\" does not exist");
        let text = if body[0] == b'S' { self.text_of(name)? } else { self.portal.clone().ok_or_else(missing)? };
        self.check_failed(&text)?;
        if body[0] == b'S' {
            message::put_message(out, b't', |b| b.extend_from_slice(&[0, 0]));
        }
        let returns = ["SELECT", "SHOW", "FETCH", "EXECUTE"].iter().any(|verb| text.starts_with(verb));
        if returns {
            row_description(out, 1)
        } else {
            message::put_message(out, b'n', |_| {})
        }
        Ok(())
    }

    fn execute(&mut self, out: &mut BytesMut) -> Result<(), PgError> {
        let text = self.portal.take().ok_or_else(|| error("34000", "portal \"\" does not exist"))?;
        let (row, tag) = self.statement(&text, out)?;
        self.answer(row, &tag, out);
        Ok(())
    }

    fn check_failed(&self, sql: &str) -> Result<(), PgError> {
        let ends = ["COMMIT", "ROLLBACK"].iter().any(|verb| sql.starts_with(verb));
        if self.status() == b'E' && !ends {
            let text = "current transaction is aborted, commands ignored until end of transaction block";
            return Err(error("25P02", text));
        }
        Ok(())
    }

    fn fail(&mut self, error: &PgError, out: &mut BytesMut) {
        message::error_response(out, error);
        self.portal = None;
        match &mut self.tx {
            Some(tx) if tx.explicit => tx.failed = true,
            Some(_) => self.roll_back(),
            None => {}
        }
    }

    fn end_implicit(&mut self) {
        if self.tx.as_ref().is_some_and(|tx| !tx.explicit) {
            self.commit();
        }
    }

    fn commit(&mut self) {
        (self.tx, self.portal) = (None, None);
        self.state.shown = self.state.kept.clone();
    }

    fn roll_back(&mut self) {
        if let Some(tx) = self.tx.take() {
            self.state = tx.before;
        }
        self.portal = None;
    }

    fn statement(&mut self, sql: &str, out: &mut BytesMut) -> Done {
        if sql.starts_with("refused") {
            return Err(error("42601", "syntax error"));
        }
        // These are never a client's.
        if sql != "DISCARD SEQUENCES" && !sql.starts_with("SELECT WHERE ") {
            message::notice_response(out, "NOTICE", &error("00000", self.view()));
        }
        self.check_failed(sql)?;
        if self.tx.is_none() {
            let before = self.state.clone();
            self.tx = Some(Tx { explicit: false, failed: false, before, savepoints: Vec::new() });
        }
        self.run(sql)
    }

    fn run(&mut self, sql: &str) -> Done {
        let words: Vec<&str> = sql.split_whitespace().collect();
        match words.as_slice() {
            ["BEGIN" | "COMMIT" | "ROLLBACK" | "SAVEPOINT" | "RELEASE", ..] => self.transaction(&words),
            ["SET", "LOCAL", name, "=", value] => {
                self.set(name, Some(value.trim_matches('\'')), true);
                tag("SET")
            }
            ["SET", name, "=", value] => {
                self.set(name, Some(value.trim_matches('\'')), false);
                tag("SET")
            }
            ["RESET", "ALL"] => {
                (self.state.kept, self.state.shown) = Default::default();
                tag("RESET")
            }
            ["RESET", name] => {
                self.set(&name.replace('"', ""), None, false);
                tag("RESET")
            }
            ["SHOW", name] => Ok((Some(vec![Some(self.setting(name))]), "SHOW".into())),
            ["DISCARD", "ALL"] => self.discard(),
            ["DISCARD", "SEQUENCES"] => tag("DISCARD SEQUENCES"),
            ["PREPARE" | "EXECUTE" | "DEALLOCATE", ..] => self.prepared_by_sql(&words, sql),
            ["SELECT", ..] => self.select(sql, &words),
            _ => self.object(&words),
        }
    }

    fn transaction(&mut self, words: &[&str]) -> Done {
        let explicit = self.tx.as_ref().is_some_and(|tx| tx.explicit);
        let Some(tx) = &mut self.tx else { panic!("a statement without a transaction") };
        let missing = |name: &&str| error("3B001", format!("savepoint \"{name}\" does not exist"));
        match words {
            ["BEGIN"] => {
                tx.explicit = true;
                tag("BEGIN")
            }
            ["COMMIT"] if tx.failed => {
                self.roll_back();
                tag("ROLLBACK")
            }
            ["COMMIT"] => {
                self.commit();
                tag("COMMIT")
            }
            ["ROLLBACK"] => {
                self.roll_back();
                tag("ROLLBACK")
            }
            _ if !explicit => Err(error("25P01", format!("{} can only be used in transaction blocks", words[0]))),
            ["SAVEPOINT", name] => {
                tx.savepoints.push(((*name).to_owned(), self.state.clone()));
                tag("SAVEPOINT")
            }
            ["RELEASE", name] => {
                let at = tx.savepoints.iter().rposition(|(have, _)| have == name).ok_or_else(|| missing(name))?;
                tx.savepoints.truncate(at);
                tag("RELEASE")
            }
            ["ROLLBACK", "TO", name] => {
                let at = tx.savepoints.iter().rposition(|(have, _)| have == name).ok_or_else(|| missing(name))?;
                tx.savepoints.truncate(at + 1);
                self.state = tx.savepoints[at].1.clone();
                tx.failed = false;
                tag("ROLLBACK")
            }
            other => panic!("the server got {other:?}"),
        }
    }

    fn setting(&self, name: &str) -> String {
        let name = name.to_ascii_lowercase();
        self.state.shown.get(&name).cloned().unwrap_or_else(|| default(&name).to_owned())
    }

    fn set(&mut self, name: &str, value: Option<&str>, local: bool) {
        let name = name.to_ascii_lowercase();
        self.known.insert(name.clone());
        let change = |settings: &mut BTreeMap<String, String>| match value {
            Some(value) => drop(settings.insert(name.clone(), value.to_owned())),
            None => drop(settings.remove(&name)),
        };
        change(&mut self.state.shown);
        if !local {
            change(&mut self.state.kept);
        }
    }

    fn discard(&mut self) -> Done {
        if self.tx.as_ref().is_some_and(|tx| tx.explicit) {
            return Err(error("25001", "DISCARD ALL cannot run inside a transaction block"));
        }
        self.state = State::default();
        self.prepared.clear();
        self.locks.clear();
        tag("DISCARD ALL")
    }

    fn prepared_by_sql(&mut self, words: &[&str], sql: &str) -> Done {
        let missing = |name: &str| error("26000", format!("prepared statement \"{name}\" does not exist"));
        match words {
            ["PREPARE", name, "AS", ..] if self.prepared.contains_key(*name) => {
                Err(error("42P05", format!("prepared statement \"{name}\" already exists")))
            }
            ["PREPARE", name, "AS", ..] => {
                let text = sql.split_once(" AS ").unwrap().1.to_owned();
                self.prepared.insert((*name).to_owned(), Statement { text, by_sql: true });
                tag("PREPARE")
            }
            ["EXECUTE", name] => {
                let text = self.prepared.get(*name).ok_or_else(|| missing(name))?.text.clone();
                self.run(&text)
            }
            ["DEALLOCATE", "ALL"] => {
                self.prepared.clear();
                tag("DEALLOCATE ALL")
            }
            ["DEALLOCATE", name] => {
                self.prepared.remove(*name).ok_or_else(|| missing(name))?;
                tag("DEALLOCATE")
            }
            other => panic!("the server got {other:?}"),
        }
    }

    fn object(&mut self, words: &[&str]) -> Done {
        let State { temp, cursors, .. } = &mut self.state;
        match words {
            ["CREATE", "TEMP", "TABLE", name, ..] => {
                let new = temp.insert((*name).to_owned());
                new.then_some(()).ok_or_else(|| error("42P07", format!("relation \"{name}\" already exists")))?;
                tag("CREATE TABLE")
            }
            ["DROP", "TABLE", name] => {
                let missing = || error("42P01", format!("table \"{name}\" does not exist"));
                temp.remove(*name).then_some(()).ok_or_else(missing)?;
                tag("DROP TABLE")
            }
            ["DECLARE", name, "CURSOR", "WITH", "HOLD", "FOR", "SELECT", value] => {
                if cursors.contains_key(*name) {
                    return Err(error("42P03", format!("cursor \"{name}\" already exists")));
                }
                cursors.insert((*name).to_owned(), value.trim_matches('\'').to_owned());
                tag("DECLARE CURSOR")
            }
            ["FETCH" | "CLOSE", name] if !cursors.contains_key(*name) => {
                Err(error("34000", format!("cursor \"{name}\" does not exist")))
            }
            ["FETCH", name] => Ok((Some(vec![cursors.get(*name).cloned()]), "FETCH 1".into())),
            ["CLOSE", name] => {
                cursors.remove(*name);
                tag("CLOSE CURSOR")
            }
            other => panic!("the server got {other:?}"),
        }
    }

    fn select(&mut self, sql: &str, words: &[&str]) -> Done {
        if sql.contains("pg_catalog.pg_cursors WHERE is_holdable") {
            return self.probe(sql);
        }
        if sql.contains("FROM pg_catalog.pg_depend") {
            return row(if self.state.temp.is_empty() { "f" } else { "t" });
        }
        if let Some(moves) = sql.strip_prefix("SELECT WHERE ") {
            return self.change_scope(moves);
        }
        let one = |row: Vec<Option<String>>| Ok((Some(row), "SELECT 1".to_owned()));
        if sql.contains("current_setting(") {
            let unknown = |name: &str| name.contains('.') && !self.known.contains(name);
            // Whoever asks what it is, to set it to that, names it twice.
            let again = if sql.contains("CASE WHEN") { 2 } else { 1 };
            let names: Vec<_> = calls(sql, "current_setting").into_iter().map(|call| call[0]).step_by(again).collect();
            let values: Vec<_> = names.iter().map(|name| (!unknown(name)).then(|| self.setting(name))).collect();
            for (name, value) in names.iter().zip(&values).filter(|_| again > 1) {
                let Some(value) = value else { continue };
                self.set(name, Some(value), false);
            }
            return one(values.into_iter().map(|value| value.map(|value| hex(&value))).collect());
        }
        if sql.contains("set_config(") {
            let set = |call: Vec<&str>| {
                self.set(call[0], Some(call[1]), call[2] == "true");
                Some(call[1].to_owned())
            };
            return one(calls(sql, "set_config").into_iter().map(set).collect());
        }
        if let [call] = calls(sql, "pg_advisory_lock").as_slice() {
            *self.locks.entry(call[0].to_owned()).or_default() += 1;
            return row("");
        }
        if let [call] = calls(sql, "pg_advisory_unlock").as_slice() {
            let Some(held) = self.locks.get_mut(call[0]) else { return row("f") };
            *held -= 1;
            self.locks.retain(|_, held| *held > 0);
            return row("t");
        }
        match words {
            ["SELECT", "1/0"] => Err(error("22012", "division by zero")),
            // A function of the tenant's own: nobody can tell from outside what it does.
            ["SELECT", "meddle()"] => {
                self.set("work_mem", Some("9MB"), false);
                row("")
            }
            ["SELECT", "count(*)", "FROM", name] if self.state.temp.contains(*name) => row("0"),
            ["SELECT", "count(*)", "FROM", name] => Err(error("42P01", format!("relation \"{name}\" does not exist"))),
            ["SELECT", value] => row(value.trim_matches('\'')),
            other => panic!("the server got {other:?}"),
        }
    }

    /// What pgusher says before and after it prepares what was prepared under other settings.
    fn change_scope(&mut self, moves: &str) -> Done {
        for call in moves.trim_end_matches(" IS NULL").split(" IS NULL OR ") {
            let quoted: Vec<&str> = call.split('\'').collect();
            let (name, from) = (quoted[1].to_ascii_lowercase(), quoted[3]);
            let value = match quoted[2] {
                ", pg_catalog.current_setting(" => self.state.shown.get(&from.to_ascii_lowercase()).cloned(),
                ", (SELECT reset_val FROM pg_catalog.pg_settings WHERE name OPERATOR(pg_catalog.=) " => None,
                ", " => Some(from.to_owned()),
                other => panic!("the server got {other} in {moves}"),
            };
            // The transaction's alone, and unknown to whoever lists settings.
            match value {
                Some(value) => drop(self.state.shown.insert(name, value)),
                None => drop(self.state.shown.remove(&name)),
            }
        }
        Ok((None, "SELECT 0".to_owned()))
    }

    /// What pgusher asks.
    fn probe(&self, sql: &str) -> Done {
        let holds = |held: bool| Some(if held { "t" } else { "f" }.to_owned());
        let listed = self.state.kept.iter().filter(|(name, _)| !name.contains('.'));
        let listed: BTreeMap<_, _> = listed.collect();
        let by_sql = self.prepared.values().any(|statement| statement.by_sql);
        let mut row = vec![
            holds(!self.state.temp.is_empty()),
            holds(!self.state.cursors.is_empty()),
            holds(by_sql),
            None,
            holds(!self.locks.is_empty()),
        ];
        // Who may take other roles is asked.
        row.extend(sql.contains("current_setting('role')").then(|| Some(hex("none"))));
        row.push(Some(hex(&serde_json::to_string(&listed).unwrap())));
        let ours = |name: &&String| {
            name.starts_with("pgusher_") && !["pgusher_check", "pgusher_step"].contains(&name.as_str())
        };
        row.push(Some(self.prepared.keys().filter(ours).count().to_string()));
        Ok((Some(row), "SELECT 1".into()))
    }
}

fn row_description(out: &mut BytesMut, columns: usize) {
    message::put_message(out, b'T', |b| {
        b.extend_from_slice(&u16::try_from(columns).unwrap().to_be_bytes());
        for _ in 0..columns {
            message::put_cstr(b, b"c");
            b.extend_from_slice(&[0; 18]);
        }
    });
}
