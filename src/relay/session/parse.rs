//! Parse of a named statement: shared under a name of ours by all who prepare the same, and what is said where the name is
//! taken already.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::BytesMut;

use super::bind::behind;
use super::expect::{Expect, ParseUndo, Shared, Taken, ends_by_itself};
use super::look::{look, see};
use super::refusal::malformed;
use super::{Link, Session, Statements, Verdict, Ward};
use crate::config::PoolMode;
use crate::error::{PgError, sqlstate};
use crate::pool::residue::Residue;
use crate::pool::scope;
use crate::pool::statements::{Registry, Statement, has_scope};
use crate::wire::frame::{self, HEADER, Header, cstr, until_nul};
use crate::wire::message;

/// The name of a statement that lives no longer than it takes to prepare it.
pub(super) const CHECK: &[u8] = b"pgusher_check";

impl Session {
    pub(super) fn parse(
        &mut self,
        header: Header,
        frame: &[u8],
        link: &mut Link<'_>,
        out: &mut BytesMut,
    ) -> Result<Verdict, PgError> {
        let (name, body) = cstr(&frame[HEADER..]).ok_or_else(|| malformed("Parse"))?;
        let text = until_nul(body);
        let whole = frame.len() == header.total;
        let residue = match self.cannot_pool(text).map_or_else(|| look(text, link.ward, true), Err) {
            Ok(residue) => residue,
            Err(error) => {
                if name.is_empty() {
                    (self.unnamed, link.prepared.unnamed) = (None, None);
                }
                return Ok(self.refuse_parse(name.is_empty(), error, out));
            }
        };
        if self.must_discard_first(&residue, link) {
            return Ok(self.discard_first(link.prepared, out));
        }
        let Statements::Shared(max) = self.statements else {
            // The unnamed one stays, too; where transactions share connections it stays for whoever turned tracking off.
            self.residue.unknown |= !name.is_empty() || self.pool_mode == PoolMode::Session;
            if !name.is_empty() {
                // Its text is not kept, and it may be run later.
                link.ward.remember(text, link.ward.lex());
            }
            self.note_residue(&residue, whole);
            self.note_sequences(&residue, None, link, out);
            self.push_extended(Expect::Parse(None));
            return Ok(behind(frame, out));
        };
        self.addresses |= residue.processes;
        if name.is_empty() {
            return Ok(self.parse_addressed(text, body, whole, residue, link, out));
        }
        if self.by_sql.contains(name) {
            // The server says that the name is taken, or that something else is wrong.
            self.push_extended(Expect::ParseBySql);
            return Ok(Verdict::Forward);
        }
        if let Some((name, taken)) = self.named.get_key_value(name) {
            let (name, taken) = (name.clone(), taken.clone());
            if !link.prepared.touch(taken.id) {
                self.check(body, out);
                let shown = String::from_utf8_lossy(&name);
                let error = format!("prepared statement \"{shown}\" already exists");
                return Ok(self.refuse_parse(false, PgError::error(sqlstate::DUPLICATE_STATEMENT, error), out));
            }
            message::parse_with(out, &taken.name, body);
            let statement = self.shared(body, || residue, link);
            self.push_extended(Expect::Taken(Box::new(Taken { by: Shared { id: taken.id, name }, statement })));
            return Ok(Verdict::Instead);
        }
        if self.named.is_full(name, body, self.max_named) {
            return Ok(self.refuse_parse(false, too_many_names(self.max_named), out));
        }
        let statement = self.shared(body, || residue, link);
        self.named.insert(name.into(), statement.clone());
        let in_scope = !self.scope_in_doubt();
        let parsed = Box::new(ParseUndo { name: name.into(), statement: statement.clone(), in_scope });
        if link.prepared.touch(statement.id) {
            let accepted = statement.accepted.load(Ordering::Relaxed);
            if !accepted || self.status != b'I' || self.expects.iter().any(ends_by_itself) {
                // In an aborted transaction, or in what may be one by then, little can be prepared; and a transaction may
                // have a search_path of its own.
                message::close(out, b'S', CHECK);
                message::parse_with(out, CHECK, statement.body());
                self.push_extended(Expect::InjectedStep(b'3'));
                self.push_extended(Expect::Checked(parsed));
                return Ok(Verdict::Instead);
            }
            // Nothing to wait for, but the answer keeps its place in line behind what the server still owes.
            self.push_extended(Expect::OurParse(name.into()));
            return Ok(Verdict::Swallow);
        }
        self.make_room(&statement, max, link, out);
        message::parse_with(out, &statement.name, statement.body());
        self.push_extended(Expect::Parse(Some(parsed)));
        Ok(Verdict::Replace)
    }

    /// Answers a Parse of a named statement and the Sync behind it without a server, outside a transaction, if a server
    /// has accepted the same statement before. Returns the number of bytes answered.
    ///
    /// It spares a round trip, and a client that prepares while every server connection is in use by others that wait
    /// for the same thread of the application (as in pgbench) does not block it.
    pub fn prepare_alone(
        &mut self,
        unseen: &[u8],
        registry: &Registry,
        ward: &dyn Ward,
        answers: &mut BytesMut,
    ) -> Option<usize> {
        let Statements::Shared(_) = self.statements else { return None };
        let header = frame::header(unseen).ok()??;
        let sync = unseen.get(header.total..header.total + HEADER)?;
        if header.tag != b'P' || sync != [b'S', 0, 0, 0, 4] || !self.is_idle() {
            return None;
        }
        let (name, body) = cstr(&unseen[HEADER..header.total])?;
        if name.is_empty() || self.named.contains_key(name) || self.by_sql.contains(name) {
            return None;
        }
        if self.named.is_full(name, body, self.max_named) {
            return None;
        }
        let statement = registry.accepted(&self.scope, body)?;
        // It may have been accepted when nobody looked.
        let text = until_nul(body);
        if self.cannot_pool(text).is_some() || ward.looks() && see(text, ward, true).0.suspicious {
            return None;
        }
        self.addresses |= statement.residue.processes;
        self.named.insert(name.into(), statement);
        answers.extend_from_slice(&[b'1', 0, 0, 0, 4]);
        message::ready_for_query(answers, b'I');
        Some(header.total + HEADER)
    }

    /// The statement that all share who prepare this; the client's own where nobody knows how literals are read.
    pub(super) fn shared(&self, body: &[u8], residue: impl FnOnce() -> Residue, link: &Link<'_>) -> Arc<Statement> {
        let known = !(self.rereads
            || self.residue.unknown
            || self.residue.resets
            || self.residue.settings.iter().any(|name| scope::has_for_literals(name)));
        if known || !has_scope(body) {
            return link.registry.intern(&self.scope, body, residue);
        }
        link.registry.apart(&self.scope, body, residue())
    }

    /// Lets the server say what is wrong with a Parse, if anything is.
    fn check(&mut self, body: &[u8], out: &mut BytesMut) {
        message::close(out, b'S', CHECK);
        message::parse_with(out, CHECK, body);
        for answer in *b"31" {
            self.push_extended(Expect::InjectedStep(answer));
        }
    }
}

fn too_many_names(max: usize) -> PgError {
    PgError::error(sqlstate::LIMIT_EXCEEDED, "too many prepared statements (max_client_prepared_memory)")
        .detail(format!("What this connection has prepared by name may take {max} bytes of the proxy's memory."))
        .hint("Close statements that are not used any more (DEALLOCATE ALL), or raise max_client_prepared_memory.")
}
