//! What a text may leave behind in the session, as far as its words say, and process ids in it.

use super::Ward;
use crate::error::PgError;
use crate::pool::residue::Residue;
use crate::pool::scope;
use crate::relay::address::{self, Addressed};
use crate::relay::lex::Lex;
use crate::relay::{scan, track};

pub(super) fn see(text: &[u8], ward: &dyn Ward, comes_again: bool) -> (scan::Seen, Lex) {
    let lex = if Lex::is_irrelevant_to(text) { Lex::default() } else { ward.lex() };
    (ward.look(text, lex, comes_again), lex)
}

/// Looks at a text: whether running it may leave something behind in the session, unless it is refused.
pub(super) fn look(text: &[u8], ward: &dyn Ward, comes_again: bool) -> Result<Residue, PgError> {
    let residue = |seen: scan::Seen| {
        let mut residue = if seen.leaves_state { track::look(text, ward.lex()) } else { Residue::none() };
        (residue.advances, residue.frees) = (residue.advances | seen.advances, residue.frees | seen.frees);
        residue.listens = residue.unknown && scan::may_listen(text);
        residue.lists = seen.lists;
        residue.own_process = seen.own_process;
        residue.processes = seen.processes || (residue.unknown && address::takes_processes(text));
        residue.stores_process = seen.own_process && track::stores(text, ward.lex());
        residue.creates = seen.creates;
        if seen.local {
            let (rescopes, rereads) = scope::may_set(text);
            (residue.rescopes, residue.rereads) = (residue.rescopes | rescopes, residue.rereads | rereads);
        }
        residue.databases = (residue.unknown || residue.frees) && scan::may_need_database_alone(text);
        residue
    };
    if !ward.looks() {
        let seen = scan::look(text, Lex::default(), |_| false);
        if seen.suspicious {
            ward.remember(text, ward.lex());
        }
        // A literal with a backslash may have ended elsewhere.
        let doubtful = seen.leaves_state && !Lex::is_irrelevant_to(text);
        return Ok(residue(if doubtful { see(text, ward, comes_again).0 } else { seen }));
    }
    let (seen, lex) = see(text, ward, comes_again);
    match seen.suspicious.then(|| ward.judge(text, lex)).flatten() {
        Some(error) => Err(error),
        None => Ok(residue(seen)),
    }
}

/// What becomes of a statement's text, or of its values, in which process ids may stand.
pub(super) fn addressed(
    text: &[u8],
    ward: &dyn Ward,
    replace: impl FnOnce(&dyn Fn(u32) -> Option<u32>) -> Option<Vec<u8>>,
) -> Addressed {
    let signalled = address::signals(text);
    let said = replace(&|pid| ward.process(pid, signalled));
    if ward.is_missing() {
        return Addressed::Later;
    }
    said.map_or(Addressed::AsItIs, Addressed::Said)
}
