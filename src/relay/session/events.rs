//! What SQL does to names of prepared statements (`PREPARE`, `EXECUTE`, `DEALLOCATE`), told by the text before and carried
//! out when the server says so.

use std::collections::VecDeque;
use std::sync::Arc;

use super::expect::Expect;
use super::{Session, Statements, Ward};
use crate::pool::residue::Residue;
use crate::pool::statements::{Prepared, Registry, Statement};
use crate::relay::named::Named;
use crate::relay::names::{self, Use, Verb};

/// What happens to names of prepared statements when the statements of a text are carried out, in that order.
pub(super) type Events = Option<Box<VecDeque<Event>>>;

#[derive(Debug, Clone)]
pub(super) struct Event {
    pub(super) verb: Verb,
    pub(super) name: Box<[u8]>,
    /// What the client has prepared by the protocol under this name.
    pub(super) shared: Option<Arc<Statement>>,
}

impl Session {
    /// Names of prepared statements in a text that does anything of interest.
    pub(super) fn uses(&self, text: &[u8], residue: &Residue, ward: &dyn Ward) -> Vec<Use> {
        let shared = matches!(self.statements, Statements::Shared(_));
        let interesting = shared && (residue.unknown || residue.frees);
        if interesting { names::uses(text, ward.lex()) } else { Vec::new() }
    }

    /// What they mean one after the other: a name that was taken away is the server's business from there on.
    pub(super) fn events(&self, uses: &[Use], registry: &Registry) -> Events {
        let mut events = VecDeque::with_capacity(uses.len());
        for found in uses {
            let gone = events.iter().any(|before: &Event| match before.verb {
                Verb::ForgetAll => true,
                Verb::Deallocate => before.name == found.name,
                Verb::Prepare | Verb::Execute => false,
            });
            let meant = |found: &Use| self.named.get(&found.name);
            let mut shared = if gone { None } else { meant(found).cloned() };
            // It may have another name in the same text, and is needed under that: something else is taken away.
            let same =
                |other: &Use| other.name != found.name && meant(other).map(|s| s.id) == meant(found).map(|s| s.id);
            if shared.is_some() && found.verb == Verb::Deallocate && uses.iter().any(same) {
                shared = Some(registry.intern(&format!("\0{}", events.len()), b"\0\0\0", Residue::none));
            }
            events.push_back(Event { verb: found.verb, name: found.name.clone(), shared });
        }
        (!events.is_empty()).then(|| Box::new(events))
    }

    /// What they leave behind, a text leaves behind that executes them.
    pub(super) fn note_used(&mut self, events: &Events) {
        let used = events.iter().flat_map(|events| events.iter()).filter_map(|event| event.shared.clone());
        for statement in used.collect::<Vec<_>>() {
            self.note_residue(&statement.residue, true);
        }
    }

    /// A statement about a name has been carried out.
    pub(super) fn carry_out(&mut self, event: Event, prepared: &mut Prepared) {
        match (event.verb, event.shared) {
            (Verb::Prepare, _) => drop(self.by_sql.insert(event.name)),
            (Verb::Deallocate, Some(statement)) => {
                prepared.remove(statement.id);
                prepared.put_right(statement.id);
                self.named.remove(&event.name[..]);
            }
            (Verb::Deallocate, None) => drop(self.by_sql.remove(&event.name)),
            (Verb::Execute | Verb::ForgetAll, _) => {}
        }
    }

    /// Nothing is prepared any more.
    pub(super) fn forget_all(&mut self, prepared: &mut Prepared) {
        self.named = Named::default();
        self.by_sql.clear();
        prepared.clear();
    }
}

/// The text with our names for the client's, if it has any.
pub(super) fn translate(text: &[u8], uses: &[Use], events: &Events) -> Option<Vec<u8>> {
    let events = events.as_ref()?;
    events.iter().any(|event| event.shared.is_some()).then(|| {
        let ours = events.iter().map(|event| event.shared.as_ref().map(|statement| &*statement.name));
        names::rename(text, uses, ours)
    })
}

/// Whether names of prepared statements mean something else when this is done.
pub(super) fn renames(events: &Events) -> bool {
    events.iter().flat_map(|events| events.iter()).any(|event| event.verb != Verb::Execute)
}

pub(super) fn is_renaming(expect: &Expect) -> bool {
    matches!(expect, Expect::Query(events) | Expect::Execute(events) if renames(events))
}

/// Whether a statement with this tag has to do with a name of a prepared statement.
pub(super) fn is_about_names(tag: &[u8]) -> bool {
    matches!(tag, b"PREPARE" | b"DEALLOCATE" | b"DEALLOCATE ALL" | b"DISCARD ALL")
}
