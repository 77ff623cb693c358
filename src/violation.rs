//! Violations: attempts to reach outside a tenant's own seat. What counts as one, under which names, and how it gets
//! from the hot path to the catalog's event log and the [audit log](crate::audit).
//!
//! Every attempt is counted once, by whoever stopped it. Who reports never waits: records go through a bounded channel,
//! and what does not fit is counted as lost.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use parking_lot::Mutex;
use tokio::sync::mpsc;

use crate::error::{PgError, sqlstate};

/// What was tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A server connection was somebody else than its tenant's role.
    Identity,
    /// A server connection was a superuser's.
    Superuser,
    /// The server denied what belongs to another tenant.
    PermissionDenied,
    /// A statement that plainly reaches for another tenant or another identity.
    Guard,
    /// A startup packet that claims another tenant or another identity.
    Startup,
    /// A FunctionCall message, which no grant of a statement checks.
    FunctionCall,
    /// On a replication connection, what concerns more than the tenant's own database.
    Replication,
    /// The canary has reached its victim: the wall has a hole.
    Canary,
}

impl Kind {
    /// The label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Identity => "identity",
            Self::Superuser => "superuser",
            Self::PermissionDenied => "permission_denied",
            Self::Guard => "guard",
            Self::Startup => "startup",
            Self::FunctionCall => "function_call",
            Self::Replication => "replication",
            Self::Canary => "canary",
        }
    }
}

/// What became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// The server refused it.
    Blocked,
    /// pgusher refused it.
    Refused,
    /// The connection was closed.
    Closed,
    /// It was let through, because the guard only observes.
    Observed,
    /// Nobody stopped it.
    Leaked,
}

impl Action {
    /// The label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Blocked => "blocked",
            Self::Refused => "refused",
            Self::Closed => "closed",
            Self::Observed => "observed",
            Self::Leaked => "leaked",
        }
    }
}

/// One attempt.
#[derive(Debug, Clone)]
pub struct Violation {
    /// What was tried.
    pub kind: Kind,
    /// What became of it.
    pub action: Action,
    /// Whose connection it was; empty if no tenant was known yet.
    pub tenant: String,
    /// The login.
    pub who: String,
    /// Where it came from.
    pub from: String,
    /// What was tried, in words; never a literal of a statement.
    pub what: String,
    /// [Fingerprint](crate::relay::guard::fingerprint) of the statement, where it is known.
    pub statement: Option<String>,
    /// When.
    pub at: SystemTime,
}

impl Violation {
    /// One that happens now.
    pub fn new(kind: Kind, action: Action, tenant: &str, who: &str, from: impl ToString) -> Self {
        Self {
            kind,
            action,
            tenant: tenant.to_owned(),
            who: who.to_owned(),
            from: from.to_string(),
            what: String::new(),
            statement: None,
            at: SystemTime::now(),
        }
    }

    /// Says what was tried.
    #[must_use]
    pub fn what(mut self, what: impl Into<String>) -> Self {
        self.what = what.into();
        self
    }

    /// Says by which statement.
    #[must_use]
    pub fn statement(mut self, fingerprint: String) -> Self {
        self.statement = Some(fingerprint);
        self
    }
}

/// Records that may wait to be written.
const QUEUE: usize = 8192;

/// Where a record was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lost {
    /// Too many waited.
    Queue,
    /// The catalog was away.
    Catalog,
    /// The audit log could not be written.
    Audit,
}

impl Lost {
    /// All places, with their labels.
    pub const ALL: [(Self, &'static str); 3] =
        [(Self::Queue, "queue"), (Self::Catalog, "catalog"), (Self::Audit, "audit")];
}

/// The way from whoever stops an attempt to whoever writes it down.
#[derive(Debug)]
pub struct Desk {
    sender: mpsc::Sender<Violation>,
    receiver: Mutex<Option<mpsc::Receiver<Violation>>>,
    lost: [AtomicU64; 3],
}

impl Default for Desk {
    fn default() -> Self {
        let (sender, receiver) = mpsc::channel(QUEUE);
        Self { sender, receiver: Mutex::new(Some(receiver)), lost: Default::default() }
    }
}

impl Desk {
    /// Takes a record, unless too many wait: then it is counted as lost.
    pub fn hand_in(&self, violation: Violation) {
        if self.sender.try_send(violation).is_err() {
            self.lose(Lost::Queue, 1);
        }
    }

    /// The records, for the one who writes them down. `None` the second time.
    pub fn open(&self) -> Option<mpsc::Receiver<Violation>> {
        self.receiver.lock().take()
    }

    /// Records that were not written down.
    pub fn lost(&self, at: Lost) -> u64 {
        self.lost[at as usize].load(Ordering::Relaxed)
    }

    /// Notes records that could not be written down.
    pub fn lose(&self, at: Lost, count: usize) {
        self.lost[at as usize].fetch_add(count as u64, Ordering::Relaxed);
    }
}

/// Whether somebody was not let: no such right, or no such thing (for this tenant). What names another tenant and gets
/// this has reached for it.
pub fn is_refusal(error: &PgError) -> bool {
    is_foreign_slot(error)
        || matches!(
            &*error.code,
            sqlstate::INSUFFICIENT_PRIVILEGE
            | sqlstate::UNKNOWN_DATABASE
            | sqlstate::INVALID_AUTHORIZATION
            | sqlstate::FEATURE_NOT_SUPPORTED
            // No such schema, table, function, role; row-level security and WITH CHECK OPTION of views.
            | "3F000"
            | "42P01"
            | "42883"
            | "42704"
            | "44000"
        )
}

/// Whether a server's error denies something that belongs to another tenant. `rows`: tenants are rows of shared tables,
/// so that whatever is denied on a table concerns all of them.
pub fn is_denial(error: &PgError, rows: bool, is_tenant: impl Fn(&str) -> bool) -> bool {
    let message = error.message.as_str();
    match &*error.code {
        sqlstate::INSUFFICIENT_PRIVILEGE => {
            // A table that was found by its number, without its schema's name: a tenant owns all of its own.
            let relation = message
                .strip_prefix("permission denied for ")
                .and_then(|rest| RELATIONS.iter().find_map(|kind| rest.strip_prefix(kind)?.strip_prefix(' ')));
            let denied = relation.is_some_and(|name| !name.starts_with("pg_") || SECRETS.contains(&name));
            let shared = COMMON.iter().any(|text| message.contains(text));
            let policy = rows && (message.contains("row-level security") || message.starts_with("must be owner of"));
            let detail = error.detail.as_deref().unwrap_or_default();
            denied || is_foreign_slot(error) || shared || policy || names(message).chain(quoted(detail)).any(is_tenant)
        }
        // Schema, database or role "…" does not exist (for this tenant); references to another database.
        "3F000" | sqlstate::UNKNOWN_DATABASE | sqlstate::FEATURE_NOT_SUPPORTED => quoted(message).any(is_tenant),
        _ => is_foreign_slot(error),
    }
}

/// Whether it is about a replication slot of another database: in the words of `plan_compat.sql`, and of the server.
fn is_foreign_slot(error: &PgError) -> bool {
    let message = error.message.as_str();
    match &*error.code {
        sqlstate::INSUFFICIENT_PRIVILEGE => message.starts_with("permission denied for replication slot"),
        sqlstate::NOT_IN_PREREQUISITE_STATE => message.ends_with("was not created in this database"),
        _ => false,
    }
}

const RELATIONS: &[&str] = &["table", "view", "sequence", "materialized view", "foreign table"];

/// Catalogs with what only its owner may know. (Others that are denied are asked for by honest tools, too.)
const SECRETS: &[&str] = &["pg_authid", "pg_shadow", "pg_statistic", "pg_user_mapping"];

/// Denials of what all tenants share, or of other tenants' sessions.
const COMMON: &[&str] = &[
    "must be owner of database",
    "whose query is being canceled",
    "whose process is being terminated",
    // Since PostgreSQL 16.
    "permission denied to cancel query",
    "permission denied to terminate process",
];

/// Names in a message, in whatever language it is: what is quoted, and the last word.
fn names(message: &str) -> impl Iterator<Item = &str> {
    quoted(message).chain(message.rsplit(' ').next())
}

fn quoted(message: &str) -> impl Iterator<Item = &str> {
    message.split('"').skip(1).step_by(2).flat_map(|quoted| quoted.split('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_another_tenants_counts() {
        let is_tenant = |name: &str| name == "client_002" || name == "table";
        for (code, message, schema, rows) in [
            ("42501", "permission denied for schema client_002", true, true),
            ("42501", "permission denied for schema public", false, false),
            ("42501", "keine Berechtigung für Schema client_002", true, true),
            ("42501", "permission denied to set role \"client_002\"", true, true),
            ("42501", "must be member of role \"client_002\"", true, true),
            ("42501", "permission denied for database client_002", true, true),
            ("42501", "permission denied for table bookings", true, true),
            ("42501", "permission denied for sequence bookings_id_seq", true, true),
            ("42501", "permission denied for table pg_authid", true, true),
            ("42501", "permission denied for view pg_stat_activity", false, false),
            ("42501", "must be owner of database tenants", true, true),
            ("42501", "must be a member of the role whose query is being canceled", true, true),
            ("42501", "permission denied to terminate process", true, true),
            ("42501", "permission denied to create extension \"hstore\"", false, false),
            ("42501", "must be owner of table bookings", false, true),
            ("42501", "must be owner of extension plpgsql", false, true),
            ("42501", "new row violates row-level security policy for table \"bookings\"", false, true),
            ("3F000", "schema \"client_002\" does not exist", true, true),
            ("3F000", "no schema has been selected to create in", false, false),
            ("3D000", "database \"client_002\" does not exist", true, true),
            ("0A000", "cross-database references are not implemented: \"client_002.public.b\"", true, true),
            ("42501", "permission denied for replication slot \"s\"", true, true),
            ("42501", "permission denied to use replication slots", false, false),
            ("55000", "replication slot \"s\" was not created in this database", true, true),
            ("55000", "currval of sequence \"s\" is not yet defined in this session", false, false),
            ("42P01", "relation \"client_002.bookings\" does not exist", false, false),
            ("42601", "syntax error at or near \"client_002\"", false, false),
        ] {
            let mut error = PgError::error(sqlstate::INTERNAL, message);
            error.code = code.into();
            assert_eq!(is_denial(&error, false, is_tenant), schema, "{message}");
            assert_eq!(is_denial(&error, true, is_tenant), rows, "{message}");
        }
    }

    #[test]
    fn what_does_not_fit_is_lost_and_counted() {
        let desk = Desk::default();
        let one = Violation::new(Kind::Guard, Action::Refused, "t", "t", "unix socket");
        (0..QUEUE + 3).for_each(|_| desk.hand_in(one.clone()));
        assert_eq!(desk.lost(Lost::Queue), 3);
        assert!(desk.open().is_some() && desk.open().is_none());
    }
}
