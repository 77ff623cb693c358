//! The guard: refuses statements that plainly reach for another tenant or another identity. No I/O.
//!
//! It is not the wall. A tenant's server connection is logged in as the tenant's role, and what that role may not do, it
//! cannot do in any spelling. The guard says so earlier, in words that help, and has every attempt counted. What cannot
//! be seen in the text (dynamic SQL, values of parameters) passes, and ends at the wall.
//!
//! [`scan::look`](super::scan::look) says which texts are worth reading; [`judge`] reads them token by token, as
//! PostgreSQL does ([`lex`](super::lex)). It prefers to let something through: a refusal that is wrong breaks an
//! application, a refusal that is missing costs nothing but the counting.

use super::lex::{Lex, Token, tokens};
use crate::error::{PgError, sqlstate};
use crate::tenant::Plan;

/// Longest text (bytes) that is read; what is longer is read up to there.
const MAX_TEXT: usize = 256 << 10;

/// How deep literals that contain statements are read.
const MAX_DEPTH: u8 = 3;

/// Who asks, and whom it must not reach.
pub struct Seat<'a> {
    /// The role that the tenant's server connections log in as.
    pub role: &'a str,
    /// What other tenants' names are on this server.
    pub neighbours: Neighbours,
    /// Whether this is the name of another tenant. Not of the tenant itself, nor of what all share.
    pub is_tenant: &'a dyn Fn(&str) -> bool,
}

/// What a tenant shares its server with, which follows from its plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Neighbours {
    /// Other tenants are schemas of its database, and roles.
    Schemas,
    /// Other tenants are databases of its server, and roles.
    Databases,
    /// Other tenants are rows of its tables, and roles.
    Rows,
    /// There are none: the server is its own, with all roles and databases.
    None,
}

impl Neighbours {
    /// What a plan says about it.
    pub fn of(plan: Plan) -> Self {
        match plan.as_str() {
            "schema" => Self::Schemas,
            "database" => Self::Databases,
            "rls" => Self::Rows,
            _ => Self::None,
        }
    }
}

/// Why a text is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// What it tried, as `permission denied: …`.
    what: String,
    why: &'static str,
    hint: &'static str,
}

impl Refusal {
    fn new(what: impl Into<String>, why: &'static str, hint: &'static str) -> Self {
        Self { what: what.into(), why, hint }
    }

    /// What the client is told.
    pub fn error(&self) -> PgError {
        PgError::error(sqlstate::INSUFFICIENT_PRIVILEGE, format!("permission denied: {}", self.what))
            .detail(self.why)
            .hint(self.hint)
    }

    /// What was tried, without anything that only the client may know.
    pub fn what(&self) -> &str {
        &self.what
    }
}

const OTHER_TENANT: &str = "It belongs to another tenant.";
const OTHER_IDENTITY: &str = "A tenant's connection keeps the identity that it logged in with.";
const OWN_SCHEMA: &str = "Use names of your own schema; they need no schema in front.";
const CONNECT: &str = "Connect as that tenant, if you are entitled to it.";
const ADMINISTRATOR: &str = "Ask whoever runs this service.";

/// Reads a text that [`scan::look`](super::scan::look) found suspicious.
pub fn judge(sql: &[u8], lex: Lex, seat: &Seat<'_>) -> Option<Refusal> {
    if seat.neighbours == Neighbours::None {
        return None;
    }
    let reader = Reader { seat, lex };
    reader.script(&tokens(&sql[..sql.len().min(MAX_TEXT)], lex), 0)
}

struct Reader<'a> {
    seat: &'a Seat<'a>,
    lex: Lex,
}

/// The tokens of one statement, from any place in it.
type Tokens<'t> = &'t [Token];

impl Reader<'_> {
    /// Every statement of a text. `depth` counts the literals around it.
    fn script(&self, script: Tokens<'_>, depth: u8) -> Option<Refusal> {
        let statements = script.split(|token| *token == Token::Sign(b';'));
        statements.filter(|statement| !statement.is_empty()).find_map(|statement| self.statement(statement, depth))
    }

    fn statement(&self, statement: Tokens<'_>, depth: u8) -> Option<Refusal> {
        // In a routine's body a statement follows these words; EXPLAIN and PREPARE … AS have one behind them.
        let begins = |t: &Token| ["begin", "then", "else", "loop", "atomic", "as"].iter().any(|word| t.is(word));
        let starts =
            std::iter::once(0).chain(statement.iter().enumerate().filter(|(_, t)| begins(t)).map(|(i, _)| i + 1));
        for start in starts {
            if let Some(refusal) = self.command(&statement[start..], start == 0, depth) {
                return Some(refusal);
            }
        }
        self.calls(statement).or_else(|| self.names(statement))
    }

    /// What the first word of a statement says. `whole` unless it is a part of one.
    fn command(&self, s: Tokens<'_>, whole: bool, depth: u8) -> Option<Refusal> {
        let Some(Token::Word(first)) = s.first() else { return None };
        let second = s.get(1).and_then(Token::name).unwrap_or_default();
        match first.as_str() {
            "set" => self.set(&s[1..]),
            "execute" if s.len() > 1 => self.execute(s, depth),
            _ if !whole => None,
            "alter" if second == "system" => Some(Refusal::new(
                "ALTER SYSTEM",
                "It changes the settings of a server that others use too.",
                ADMINISTRATOR,
            )),
            "load" => Some(Refusal::new("LOAD", "It runs a program's code inside the server.", ADMINISTRATOR)),
            "prepare" if second == "transaction" => Some(Refusal::new(
                "PREPARE TRANSACTION",
                "Prepared transactions outlive their session, and all tenants share the few there can be.",
                "Use ordinary transactions.",
            )),
            "copy" => copies_program(s).then(|| {
                Refusal::new(
                    "COPY … PROGRAM",
                    "It runs a program on the server's machine.",
                    "Use COPY … FROM STDIN or TO STDOUT.",
                )
            }),
            "base_backup"
            | "create_replication_slot"
            | "drop_replication_slot"
            | "identify_system"
            | "read_replication_slot"
            | "start_replication"
            | "timeline_history" => Some(Refusal::new(
                first.to_ascii_uppercase(),
                "Replication reads the data of all tenants of a server.",
                ADMINISTRATOR,
            )),
            "create" | "alter" | "drop" => self.definition(s, first, second, depth),
            "reassign" => self.foreign(s, |name| format!("REASSIGN OWNED BY {name}")),
            "grant" | "revoke" => self.grant(s),
            "comment" | "security" | "reindex" | "import" => self.schema_named(s),
            "do" => self.bodies(s, depth),
            _ => None,
        }
    }

    /// What follows SET.
    fn set(&self, mut s: Tokens<'_>) -> Option<Refusal> {
        if s.first().is_some_and(|t| t.is("session") || t.is("local")) && s.get(1).is_some_and(|t| t.name().is_some()) {
            // SET SESSION AUTHORIZATION, SET LOCAL SESSION AUTHORIZATION, and SET SESSION role.
            if !s.get(1).is_some_and(|t| t.is("authorization")) {
                s = &s[1..];
            }
        }
        let name = s.first()?.name()?.to_ascii_lowercase();
        match name.as_str() {
            "session" if s.get(1).is_some_and(|t| t.is("authorization")) => {
                self.identity("SET SESSION AUTHORIZATION", &s[2..])
            }
            "role" => self.identity("SET ROLE", assigned(&s[1..])),
            "session_authorization" => self.identity("SET session_authorization", assigned(&s[1..])),
            "search_path" => self.path(assigned(&s[1..])),
            "schema" => self.path(&s[1..]),
            _ => None,
        }
    }

    /// The role that somebody wants to be.
    fn identity(&self, what: &str, value: Tokens<'_>) -> Option<Refusal> {
        let harmless = match value.first()? {
            Token::Word(word) => matches!(word.as_str(), "none" | "default") || word == self.seat.role,
            Token::Quoted(name) | Token::Text(name) => name == "none" || name == self.seat.role,
            _ => true,
        };
        (!harmless).then(|| Refusal::new(what, OTHER_IDENTITY, CONNECT))
    }

    /// The members of a search_path.
    fn path(&self, value: Tokens<'_>) -> Option<Refusal> {
        if self.seat.neighbours != Neighbours::Schemas {
            return None;
        }
        let members = value.iter().take_while(|t| **t != Token::Sign(b')') && **t != Token::Sign(b';'));
        members
            .filter_map(|token| match token {
                Token::Word(name) | Token::Quoted(name) => self.is_tenant(name).then(|| name.clone()),
                Token::Text(list) => self.listed(list),
                _ => None,
            })
            .map(|name| Refusal::new(format!("schema \"{name}\" in search_path"), OTHER_TENANT, OWN_SCHEMA))
            .next()
    }

    /// Another tenant in a list of names as settings have it: `a, "b"`.
    fn listed(&self, list: &str) -> Option<String> {
        let member = |part: &str| {
            let part = part.trim();
            match part.strip_prefix('"').and_then(|part| part.strip_suffix('"')) {
                Some(quoted) => quoted.to_owned(),
                None => part.to_ascii_lowercase(),
            }
        };
        std::iter::once(list.to_owned()).chain(list.split(',').map(member)).find(|name| self.is_tenant(name))
    }

    /// CREATE, ALTER, DROP.
    fn definition(&self, s: Tokens<'_>, verb: &str, kind: &str, depth: u8) -> Option<Refusal> {
        let kind_at = s.iter().position(|t| ROUTINES.iter().any(|word| t.is(word)));
        if kind_at.is_some_and(|at| at < 5) {
            return self.clauses(s).or_else(|| self.bodies(s, depth));
        }
        let mapping = s.get(2).is_some_and(|t| t.is("mapping"));
        match kind {
            "role" | "user" | "group" if !mapping => self.role(s, verb),
            "database" => {
                let verb = verb.to_ascii_uppercase();
                self.foreign(&s[2..], |name| format!("{verb} DATABASE \"{name}\"")).or_else(|| self.clauses(s))
            }
            "owned" => self.foreign(&s[2..], |name| format!("DROP OWNED BY \"{name}\"")),
            _ => self.schema_named(s).or_else(|| self.owner(s)),
        }
    }

    /// CREATE, ALTER and DROP ROLE.
    fn role(&self, s: Tokens<'_>, verb: &str) -> Option<Refusal> {
        let name = s[2..].iter().filter(|t| !["if", "exists"].iter().any(|word| t.is(word))).find_map(Token::name)?;
        let own = name == self.seat.role || ["current_user", "current_role", "session_user"].contains(&name);
        let more = ["superuser", "bypassrls", "createrole", "createdb", "replication"];
        if verb == "alter" && own && !s.iter().any(|t| more.iter().any(|word| t.is(word))) {
            return self.clauses(s);
        }
        let what = format!("{} ROLE", verb.to_ascii_uppercase());
        Some(Refusal::new(what, "Roles are the identities of tenants.", ADMINISTRATOR))
    }

    /// `SET role = …`, `SET search_path = …` as a clause of a definition.
    fn clauses(&self, s: Tokens<'_>) -> Option<Refusal> {
        let clauses = s.iter().enumerate().skip(2).filter(|(_, t)| t.is("set"));
        clauses.map(|(at, _)| &s[at + 1..]).find_map(|clause| self.set(clause))
    }

    /// The statements in the literals of a routine's definition.
    fn bodies(&self, s: Tokens<'_>, depth: u8) -> Option<Refusal> {
        if depth >= MAX_DEPTH {
            return None;
        }
        s.iter().find_map(|token| match token {
            Token::Text(body) => self.script(&tokens(body.as_bytes(), self.lex), depth + 1),
            _ => None,
        })
    }

    /// `EXECUTE name (…)` of a prepared set_config, and `EXECUTE '…'` in a routine.
    fn execute(&self, s: Tokens<'_>, depth: u8) -> Option<Refusal> {
        let texts = || s.iter().filter_map(|t| if let Token::Text(text) = t { Some(text.as_str()) } else { None });
        match s.get(1) {
            Some(Token::Text(_)) if depth > 0 => self.bodies(&s[1..2], depth),
            Some(Token::Word(_) | Token::Quoted(_)) if depth == 0 => {
                let mut texts = texts();
                let setting = texts.find(|text| is_setting(text))?;
                self.setting(setting, Some(&Token::Text(texts.next()?.to_owned())))
            }
            _ => None,
        }
    }

    /// set_config and pg_settings, wherever they are.
    fn calls(&self, s: Tokens<'_>) -> Option<Refusal> {
        let is = |t: &Token, name: &str| t.name() == Some(name);
        for (at, token) in s.iter().enumerate() {
            if is(token, "set_config")
                && s.get(at + 1) == Some(&Token::Sign(b'('))
                && let Some(Token::Text(setting)) = s.get(at + 2)
            {
                // What follows a value other than a comma (a concatenation, a cast) makes it another value.
                let value = s.get(at + 4).filter(|_| s.get(at + 3) == Some(&Token::Sign(b',')));
                if let Some(refusal) = self.setting(setting, value) {
                    return Some(refusal);
                }
            }
        }
        if s.first().is_some_and(|t| t.is("update") || t.is("with")) && s.iter().any(|t| is(t, "pg_settings")) {
            let texts = || s.iter().filter_map(|t| if let Token::Text(text) = t { Some(text) } else { None });
            let setting = texts().find(|text| is_setting(text))?;
            return texts()
                .filter(|text| *text != setting)
                .find_map(|value| self.setting(setting, Some(&Token::Text(value.clone()))));
        }
        None
    }

    /// A setting changed by a function. The value is a literal, or cannot be seen.
    fn setting(&self, setting: &str, value: Option<&Token>) -> Option<Refusal> {
        let Some(Token::Text(value)) = value else { return None };
        match setting.to_ascii_lowercase().as_str() {
            "role" | "session_authorization" if value == "none" || value == self.seat.role => None,
            name @ ("role" | "session_authorization") => {
                Some(Refusal::new(format!("set_config of {name}"), OTHER_IDENTITY, CONNECT))
            }
            "search_path" => self.path(std::slice::from_ref(&Token::Text(value.clone()))),
            _ => None,
        }
    }

    /// GRANT and REVOKE: of roles, and on schemas and databases.
    fn grant(&self, s: Tokens<'_>) -> Option<Refusal> {
        let what = |name: &str| format!("GRANT or REVOKE that names \"{name}\"");
        if !s.iter().any(|t| t.is("on")) {
            let why = "Membership in a role is a second identity.";
            return Some(Refusal::new("GRANT or REVOKE of a role", why, ADMINISTRATOR));
        }
        let on_database = s.windows(2).any(|w| w[0].is("on") && w[1].is("database"));
        if on_database { self.foreign(s, what) } else { self.schema_named(s) }
    }

    /// `SCHEMA name`
    fn schema_named(&self, s: Tokens<'_>) -> Option<Refusal> {
        if self.seat.neighbours != Neighbours::Schemas {
            return None;
        }
        let at = s.iter().position(|t| t.is("schema"))?;
        let words = ["if", "not", "exists", "authorization", "to", "from", "cascade", "restrict", "rename"];
        let names = s[at + 1..].iter().filter(|t| !words.iter().any(|word| t.is(word)));
        let foreign = names.filter_map(Token::name).take(16).find(|name| self.is_tenant(name))?;
        Some(Refusal::new(format!("schema \"{foreign}\""), OTHER_TENANT, OWN_SCHEMA))
    }

    /// `OWNER TO name`
    fn owner(&self, s: Tokens<'_>) -> Option<Refusal> {
        let at = s.windows(2).position(|w| w[0].is("owner") && w[1].is("to"))?;
        let name = s.get(at + 2)?.name().filter(|name| self.is_tenant(name))?;
        Some(Refusal::new(format!("OWNER TO \"{name}\""), "It is another tenant.", ADMINISTRATOR))
    }

    /// Another tenant's name anywhere, for statements in which names are roles or databases.
    fn foreign(&self, s: Tokens<'_>, what: impl Fn(&str) -> String) -> Option<Refusal> {
        let name = s.iter().filter_map(Token::name).find(|name| self.is_tenant(name))?;
        Some(Refusal::new(what(name), "It is another tenant.", ADMINISTRATOR))
    }

    /// Qualified names: `tenant.table`, where `tenant` is not a name that the statement itself gives.
    fn names(&self, s: Tokens<'_>) -> Option<Refusal> {
        if self.seat.neighbours == Neighbours::Rows {
            return None;
        }
        let dot = Some(&Token::Sign(b'.'));
        let mut at = 0;
        while at < s.len() {
            let Some(name) = s[at].name().filter(|_| s.get(at + 1) == dot) else {
                at += 1;
                continue;
            };
            let end = chain_end(s, at);
            let place = Place::of(s, at, end);
            // database.schema.table
            let database = end - at >= 5 && place == Place::Relation;
            let (name, kind) = match self.seat.neighbours {
                Neighbours::Databases if database => (name, "database"),
                Neighbours::Databases => ("", ""),
                _ if database && !self.is_tenant(name) => (s[at + 2].name().unwrap_or_default(), "schema"),
                _ => (name, "schema"),
            };
            if self.is_tenant(name) && (place != Place::Column || !is_given(s, name)) {
                return Some(Refusal::new(format!("{kind} \"{name}\""), OTHER_TENANT, OWN_SCHEMA));
            }
            at = end;
        }
        None
    }

    fn is_tenant(&self, name: &str) -> bool {
        !name.is_empty() && (self.seat.is_tenant)(name)
    }
}

const ROUTINES: &[&str] = &["function", "procedure", "routine", "aggregate", "trigger", "rule"];

fn is_setting(text: &str) -> bool {
    ["role", "session_authorization", "search_path"].iter().any(|name| text.eq_ignore_ascii_case(name))
}

/// What follows `=` or TO.
fn assigned(s: Tokens<'_>) -> Tokens<'_> {
    match s.first() {
        Some(token) if *token == Token::Sign(b'=') || token.is("to") => &s[1..],
        // FROM CURRENT
        Some(token) if token.is("from") => &[],
        _ => s,
    }
}

/// `COPY … FROM PROGRAM '…'`, and TO.
fn copies_program(s: Tokens<'_>) -> bool {
    s.windows(3).any(|w| (w[0].is("from") || w[0].is("to")) && w[1].is("program") && matches!(w[2], Token::Text(_)))
}

/// Where the chain `a.b.c` that begins at `at` ends.
fn chain_end(s: Tokens<'_>, at: usize) -> usize {
    let mut end = at + 1;
    while s.get(end) == Some(&Token::Sign(b'.')) && s.get(end + 1).is_some_and(|t| t.name().is_some()) {
        end += 2;
    }
    if s.get(end) == Some(&Token::Sign(b'.')) { end + 1 } else { end }
}

/// What a qualified name can be, where it stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// A table or the like: its first part is a schema or a database.
    Relation,
    /// A function, type or operator: its first part is a schema.
    Routine,
    /// Perhaps a column, whose first part is a table or an alias.
    Column,
}

impl Place {
    fn of(s: Tokens<'_>, at: usize, end: usize) -> Self {
        let before = |n: usize| at.checked_sub(n).map(|i| &s[i]);
        let is = |n: usize, word: &str| before(n).is_some_and(|t| t.is(word));
        let relation = ["join", "into", "only", "table", "references", "inherits", "update"];
        let from = is(1, "from") && !is(2, "distinct") && !inside_function(s, at);
        if from || relation.iter().any(|word| is(1, word)) {
            // FOR UPDATE OF, ON CONFLICT DO UPDATE SET name no table behind UPDATE.
            return Self::Relation;
        }
        let cast = before(1) == Some(&Token::Sign(b':')) && before(2) == Some(&Token::Sign(b':'));
        let operator = before(1) == Some(&Token::Sign(b'(')) && is(2, "operator");
        // `INSERT INTO a.b (` is a relation, seen above.
        let call = s.get(end) == Some(&Token::Sign(b'(')) && s.get(end - 1).is_some_and(|t| t.name().is_some());
        // `a.b IN (` has a word between.
        if cast || operator || call { Self::Routine } else { Self::Column }
    }
}

/// Whether the FROM in front of `at` is that of EXTRACT, SUBSTRING, TRIM, OVERLAY.
fn inside_function(s: Tokens<'_>, at: usize) -> bool {
    let mut depth = 0;
    for i in (0..at).rev() {
        match s[i] {
            Token::Sign(b')') => depth += 1,
            Token::Sign(b'(') if depth > 0 => depth -= 1,
            Token::Sign(b'(') => {
                let name = i.checked_sub(1).and_then(|i| s[i].name()).unwrap_or_default();
                return ["extract", "substring", "trim", "overlay", "position", "btrim", "ltrim", "rtrim"]
                    .contains(&name);
            }
            _ => {}
        }
    }
    false
}

/// Whether the statement uses the name for a table of its own or as an alias, so that `name.x` is a column.
fn is_given(s: Tokens<'_>, name: &str) -> bool {
    if ["new", "old", "excluded"].contains(&name) {
        return true;
    }
    s.iter().enumerate().any(|(at, token)| {
        if token.name() != Some(name) || s.get(at + 1) == Some(&Token::Sign(b'.')) {
            return false;
        }
        match at.checked_sub(1).map(|before| &s[before]) {
            None => false,
            // The last part of a qualified name, an alias behind one or behind a subquery, an element of a list.
            Some(Token::Sign(sign)) => matches!(sign, b'.' | b')' | b','),
            Some(Token::Quoted(_)) => true,
            Some(Token::Word(word)) => {
                !["by", "on", "and", "or", "where", "set", "schema", "to"].contains(&word.as_str())
            }
            Some(_) => false,
        }
    })
}

/// The statement without what its sender may want to keep to itself: literals, numbers, comments, spelling. Two texts
/// that differ in nothing else have the same fingerprint.
pub fn fingerprint(sql: &[u8], lex: Lex) -> String {
    use sha2::{Digest as _, Sha256};
    let mut hash = Sha256::new();
    for token in tokens(&sql[..sql.len().min(MAX_TEXT)], lex) {
        match token {
            Token::Word(word) => hash.update(word.as_bytes()),
            Token::Quoted(name) => hash.update(name.as_bytes()),
            Token::Text(_) | Token::Number | Token::Parameter(_) => hash.update(b"?"),
            Token::Sign(sign) => hash.update([sign]),
        }
        hash.update(b" ");
    }
    hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests;
