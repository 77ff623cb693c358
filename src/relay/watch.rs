//! Watches what a client attempts and what the server denies it: the guard's knowledge of the world, and violations.

use std::cell::Cell;

use super::*;

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
    pub(super) observed: &'a Cell<bool>,
}

impl Ward for Guard<'_> {
    fn looks(&self) -> bool {
        self.observed.set(false);
        self.client.rules.guard != GuardMode::Off
    }

    fn lex(&self) -> Lex {
        let params = &self.client.params;
        Lex::new(params.get("standard_conforming_strings"), params.get("client_encoding"))
    }

    fn may_be_tenant(&self, name: &[u8]) -> bool {
        self.worker.directory.may_have(name) && name != self.client.tenant.id.as_str().as_bytes()
    }

    fn judge(&self, text: &[u8], lex: Lex) -> Option<PgError> {
        let (tenant, role) = (&self.client.tenant, self.client.tenant.role());
        let is_tenant = |name: &str| name != role && is_other_tenant(self.worker, self.client, name);
        let seat = Seat { role, neighbours: Neighbours::of(tenant.plan), is_tenant: &is_tenant };
        let refusal = guard::judge(text, lex, &seat)?;
        let refused = self.client.rules.guard == GuardMode::Enforce;
        let action = if refused { Action::Refused } else { Action::Observed };
        let attempt = attempt(self.client, Kind::Guard, action).what(refusal.what());
        self.worker.metrics.report(attempt.statement(guard::fingerprint(text, lex)));
        self.observed.set(!refused);
        refused.then(|| refusal.error())
    }

    fn function_call_refused(&self) {
        let attempt = attempt(self.client, Kind::FunctionCall, Action::Refused);
        self.worker.metrics.report(attempt.what("FunctionCall message"));
    }
}

/// Counts a server's error; `true` if it is the server's farewell. What is denied because it belongs to another tenant
/// is an attempt to cross, blocked by the wall.
pub(super) fn note_error(worker: &Worker, client: &Client, observed: &Cell<bool>, frame: &[u8]) -> bool {
    let error = server_error(&frame[HEADER..]);
    worker.metrics.count_error(&error.code, "server");
    client.stats.errors.fetch_add(1, Ordering::Relaxed);
    let neighbours = Neighbours::of(client.tenant.plan);
    if neighbours != Neighbours::None
        && !observed.get()
        && violation::is_denial(&error, neighbours == Neighbours::Rows, |name| is_other_tenant(worker, client, name))
    {
        // The message is the server's about names, without values.
        worker.metrics.report(attempt(client, Kind::PermissionDenied, Action::Blocked).what(error.message));
    }
    error.severity == crate::error::Severity::Fatal
}
