//! Watches what a client attempts and what the server denies it: the guard's knowledge of the world, and violations.
//!
//! What the server refuses is an attempt to reach another tenant if its words say so ([`violation::is_denial`]), or if
//! what was refused named another tenant ([`mention`]): in the statement, in a value, or in what made the session's
//! state a moment ago (`SET search_path` by dynamic SQL, PREPARE). An ordinary refusal on a tenant's own things is not.

use std::cell::{Cell, RefCell};

use super::scan::Seen;
use super::stand_in::Named;
use super::*;
use crate::pool::recent::Recent;
use crate::wire::frame::cstr;

/// What is remembered of a client's statements until the server has answered.
#[derive(Default)]
pub(super) struct Memory {
    /// The guard has counted the last text and let it through: what the server says to it is not counted again.
    observed: Cell<bool>,
    /// A text that named another tenant and may have changed the session's state: its fingerprint, and for how many
    /// more answers it explains a refusal.
    told: RefCell<Option<(Box<str>, u8)>>,
    /// Clients that were named by process ids.
    pub(super) named: Named,
}

/// For how many answers.
const REMEMBERED: u8 = 8;

impl Memory {
    /// An answer is complete.
    #[inline]
    pub(super) fn answered(&self) {
        let mut named = self.told.borrow_mut();
        if let Some((_, left)) = &mut *named {
            *left -= 1;
            if *left == 0 {
                *named = None;
            }
        }
    }
}

/// An attempt of this client's.
pub(super) fn attempt(client: &Client, kind: Kind, action: Action) -> Violation {
    Violation::new(kind, action, client.tenant.id.as_str(), &client.user, &client.from)
}

/// Whether the name is that of a tenant, and not of the client's own.
pub(super) fn is_other_tenant(worker: &Worker, client: &Client, name: &str) -> bool {
    name != client.tenant.id.as_str()
        && worker.directory.may_have(name.as_bytes())
        && worker.directory.find(name).is_some()
}

/// Looks after what a client says, see [`guard`].
pub(super) struct Guard<'a> {
    pub(super) worker: &'a Worker,
    pub(super) client: &'a Client,
    pub(super) memory: &'a Memory,
}

impl Ward for Guard<'_> {
    fn looks(&self) -> bool {
        self.memory.observed.set(false);
        self.client.rules.guard != GuardMode::Off
    }

    fn lex(&self) -> Lex {
        let params = &self.client.params;
        Lex::new(params.get("standard_conforming_strings"), params.get("client_encoding"))
    }

    fn look(&self, text: &[u8], lex: Lex, comes_again: bool) -> Seen {
        let directory = &self.worker.directory;
        let look = || {
            let for_all = Cell::new(true);
            let seen = scan::look(&lex.narrow(text), lex, |name| {
                let may_be = directory.may_have(name);
                for_all.set(for_all.get() && !may_be);
                may_be && name != self.client.tenant.id.as_str().as_bytes()
            });
            (seen, for_all.get())
        };
        if comes_again { self.worker.looks.at(text, lex, directory.version(), look) } else { look().0 }
    }

    fn judge(&self, text: &[u8], lex: Lex) -> Option<PgError> {
        let (tenant, role) = (&self.client.tenant, self.client.tenant.role());
        let is_tenant = |name: &str| name != role && is_other_tenant(self.worker, self.client, name);
        let seat = Seat { role, neighbours: Neighbours::of(tenant.plan), is_tenant: &is_tenant };
        let Some(refusal) = guard::judge(text, lex, &seat) else {
            self.remember(text, lex);
            return None;
        };
        let refused = self.client.rules.guard == GuardMode::Enforce;
        let action = if refused { Action::Refused } else { Action::Observed };
        let attempt = attempt(self.client, Kind::Guard, action).what(refusal.what());
        self.worker.metrics.report(attempt.statement(guard::fingerprint(text, lex)));
        self.memory.observed.set(!refused);
        refused.then(|| refusal.error())
    }

    fn remember(&self, text: &[u8], lex: Lex) {
        if scan::begins_with(text, b"reset") || scan::begins_with(text, b"discard") {
            *self.memory.told.borrow_mut() = None;
            return;
        }
        let is_tenant = |name: &str| is_other_tenant(self.worker, self.client, name);
        // The cheap look first: this is asked of every SET.
        let shares = Neighbours::of(self.client.tenant.plan) != Neighbours::None;
        if shares && mention::in_bytes(text, &is_tenant) && mention::in_sql(text, lex, &is_tenant) {
            *self.memory.told.borrow_mut() = Some((guard::fingerprint(text, lex).into(), REMEMBERED));
        }
    }

    fn process(&self, pid: u32, signalled: bool) -> Option<u32> {
        self.find_process(pid, signalled)
    }

    fn is_missing(&self) -> bool {
        self.memory.named.is_missing()
    }

    fn function_call_refused(&self) {
        let attempt = attempt(self.client, Kind::FunctionCall, Action::Refused);
        self.worker.metrics.report(attempt.what("FunctionCall message"));
    }

    fn replication_refused(&self, what: &str) {
        let attempt = attempt(self.client, Kind::Replication, Action::Refused);
        self.worker.metrics.report(attempt.what(what));
    }
}

/// An error that the server has sent, and what it was about.
pub(super) struct Refused<'a> {
    pub(super) guard: Guard<'a>,
    pub(super) session: &'a Session,
    pub(super) recent: &'a Recent,
}

impl Refused<'_> {
    /// Counts the error; `true` if it is the server's farewell.
    pub(super) fn note(&self, frame: &[u8]) -> bool {
        let Guard { worker, client, memory } = self.guard;
        let error = server_error(&frame[HEADER..]);
        worker.metrics.count_error(&error.code, "server");
        client.stats.errors.fetch_add(1, Ordering::Relaxed);
        let neighbours = Neighbours::of(client.tenant.plan);
        let is_fatal = error.severity == crate::error::Severity::Fatal;
        if neighbours == Neighbours::None || memory.observed.get() || !violation::is_refusal(&error) {
            return is_fatal;
        }
        let is_tenant = |name: &str| is_other_tenant(worker, client, name);
        let said_so = violation::is_denial(&error, neighbours == Neighbours::Rows, is_tenant);
        let earlier = memory.told.borrow().as_ref().map(|(fingerprint, _)| fingerprint.to_string());
        if said_so || self.names_another(&is_tenant) || earlier.is_some() {
            *memory.told.borrow_mut() = None;
            // The message is the server's about names, without values.
            let attempt = attempt(client, Kind::PermissionDenied, Action::Blocked).what(error.message);
            worker.metrics.report(match self.fingerprint().or(earlier) {
                Some(fingerprint) => attempt.statement(fingerprint),
                None => attempt,
            });
        }
        is_fatal
    }

    /// Whether what the server was working on names another tenant, or what came before it in the same group.
    fn names_another(&self, is_tenant: &dyn Fn(&str) -> bool) -> bool {
        let lex = self.guard.lex();
        self.recent.group_of(self.session.statements_owed()).any(|message| match split(message) {
            Some(Said::Text(text)) => mention::in_sql(text, lex, is_tenant),
            Some(Said::Bind { statement, values }) => {
                let text = self.session.text_of(statement).unwrap_or_default();
                mention::in_sql(text, lex, is_tenant) || mention::in_bytes(values, is_tenant)
            }
            None => false,
        })
    }

    /// The fingerprint of the statement that failed, if its text is known.
    fn fingerprint(&self) -> Option<String> {
        let at = self.session.statements_owed();
        let text = match split(self.recent.from_end(at)?)? {
            Said::Text(text) => text,
            Said::Bind { statement: b"", .. } => {
                let unnamed = |n| match split(self.recent.from_end(n)?)? {
                    Said::Text(text) => Some(text),
                    Said::Bind { .. } => None,
                };
                (at + 1..at + 64).find_map(unnamed).or_else(|| self.session.text_of(b""))?
            }
            Said::Bind { statement, .. } => self.session.text_of(statement)?,
        };
        Some(guard::fingerprint(text, self.guard.lex()))
    }
}

/// A message that was noted.
enum Said<'a> {
    /// Of Query and Parse.
    Text(&'a [u8]),
    /// A Bind: its statement's name, and what follows it.
    Bind { statement: &'a [u8], values: &'a [u8] },
}

/// Takes a message apart, as far as it is there.
fn split(message: &[u8]) -> Option<Said<'_>> {
    let body = message.get(HEADER..)?;
    let text = |body: &'_ [u8]| body.iter().position(|&b| b == 0).unwrap_or(body.len());
    Some(match message[0] {
        b'Q' => Said::Text(&body[..text(body)]),
        b'P' => {
            let (_, body) = cstr(body)?;
            Said::Text(&body[..text(body)])
        }
        b'B' => {
            let (_, rest) = cstr(body)?;
            let (statement, values) = cstr(rest)?;
            Said::Bind { statement, values }
        }
        _ => return None,
    })
}
