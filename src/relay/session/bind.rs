//! Bind, Describe and Close: what the client's name of a statement stands for on this server connection.

use std::sync::Arc;

use bytes::{BufMut as _, BytesMut};

use super::events::{Events, translate};
use super::expect::{Expect, Shared};
use super::look::addressed;
use super::refusal::malformed;
use super::unnamed::Turn;
use super::{Link, Session, Statements, Verdict, Ward};
use crate::error::PgError;
use crate::pool::residue::Residue;
use crate::pool::statements::{Statement, UnnamedOwner};
use crate::relay::address::{self, Addressed};
use crate::relay::names;
use crate::wire::frame::{HEADER, Header, cstr};
use crate::wire::message;

enum Resolved {
    /// The name means the same to the server.
    AsNamed,
    /// Under a name of ours, and the client's; what it does to names when it is executed.
    Shared(Arc<Statement>, Arc<[u8]>, Events),
    /// The unnamed statement was parsed again; the output holds its Parse.
    Injected,
}

impl Session {
    pub(super) fn bind(
        &mut self,
        header: Header,
        frame: &[u8],
        link: &mut Link<'_>,
        out: &mut BytesMut,
    ) -> Result<Verdict, PgError> {
        let Statements::Shared(max) = self.statements else { return Ok(self.bind_as_is(frame, link, out)) };
        let (portal, rest) = cstr(&frame[HEADER..]).ok_or_else(|| malformed("Bind"))?;
        let (name, values) = cstr(rest).ok_or_else(|| malformed("Bind"))?;
        let whole = frame.len() == header.total;
        let addressed = match self.addresses && whole {
            true => self.address_values(name, values, link.ward),
            false => Addressed::AsItIs,
        };
        let addressed = match addressed {
            Addressed::AsItIs => None,
            Addressed::Said(values) => Some(values),
            Addressed::Later => return Ok(Verdict::Later),
        };
        let residue = match name {
            b"" => self.unnamed.as_ref().map(|unnamed| &unnamed.residue),
            name => self.named.get(name).map(|statement| &statement.residue),
        };
        if residue.is_some_and(|residue| self.must_discard_first(residue, link)) {
            return Ok(self.discard_first(link.prepared, out));
        }
        if let Some(verdict) = self.look_before_bind(name, values, max, link, out) {
            return Ok(verdict);
        }
        let Some(statement) = self.resolve(name, max, link, out) else {
            return Ok(self.unknown(out));
        };
        self.bound = None;
        if name.is_empty() {
            self.bind_unnamed(values, whole, max, link, out);
        }
        let mut shared = None;
        let verdict = match statement {
            Resolved::AsNamed if out.is_empty() && addressed.is_none() => Verdict::Forward,
            Resolved::Shared(statement, clients, events) => {
                self.bound = events;
                shared = Some(Shared { id: statement.id, name: clients });
                self.note_bound(&statement.residue, values, whole);
                self.note_sequences(&statement.residue, None, link, out);
                if statement.residue.lists {
                    self.hide_others(Some(statement.id), link, out);
                }
                let said = addressed.as_deref().unwrap_or(values);
                let length = header.total - 1 - name.len() - values.len() + statement.name.len() + said.len();
                put_bind(out, length, portal, &statement.name, said);
                Verdict::Replace
            }
            Resolved::AsNamed | Resolved::Injected => {
                match addressed {
                    Some(said) => {
                        put_bind(out, header.total - 1 - values.len() + said.len(), portal, name, &said);
                    }
                    None => out.extend_from_slice(frame),
                }
                Verdict::Replace
            }
        };
        self.push_extended(Expect::Bind(shared));
        Ok(verdict)
    }

    /// A Bind of what was prepared under the client's own names, of which the texts are not kept: one that has a name may do
    /// anything; the unnamed one was looked at when it came.
    fn bind_as_is(&mut self, frame: &[u8], link: &mut Link<'_>, out: &mut BytesMut) -> Verdict {
        let unnamed = cstr(&frame[HEADER..]).is_some_and(|(_, rest)| rest.first() == Some(&0));
        let residue = if unnamed { Residue::none() } else { Residue::anything() };
        if self.must_discard_first(&residue, link) {
            return self.discard_first(link.prepared, out);
        }
        self.note_sequences(&residue, None, link, out);
        self.push_extended(Expect::Bind(None));
        behind(frame, out)
    }

    pub(super) fn describe_or_close(
        &mut self,
        header: Header,
        frame: &[u8],
        link: &mut Link<'_>,
        out: &mut BytesMut,
    ) -> Result<Verdict, PgError> {
        let kind = if header.tag == b'D' { "Describe" } else { "Close" };
        let (&what, rest) = frame[HEADER..].split_first().ok_or_else(|| malformed(kind))?;
        let (name, _) = cstr(rest).ok_or_else(|| malformed(kind))?;
        let expect = if header.tag == b'D' { Expect::Describe(None) } else { Expect::Close };
        let Statements::Shared(max) = self.statements else {
            self.push_extended(expect);
            return Ok(Verdict::Forward);
        };
        if what != b'S' {
            let expect = match expect {
                Expect::Describe(_) => Expect::Describe(self.bound_and_unknown(name, link.prepared)),
                close => close,
            };
            self.push_extended(expect);
            return Ok(Verdict::Forward);
        }
        if header.tag == b'C' && self.by_sql.remove(name) {
            self.residue.frees = true;
            self.push_extended(Expect::CloseBySql(name.into()));
            return Ok(Verdict::Forward);
        }
        if header.tag == b'C' && !name.is_empty() {
            // Closing what does not exist is no error.
            let closed = self.named.remove_entry(name).map(Box::new);
            self.push_extended(Expect::OurClose(closed));
            return Ok(Verdict::Swallow);
        }
        if header.tag == b'C' {
            let before = self.unnamed_before();
            self.unnamed_serial += 1;
            (self.unnamed, link.prepared.unnamed) = (None, None);
            self.push_extended(Expect::CloseUnnamed(Turn { serial: self.unnamed_serial, before }));
            return Ok(Verdict::Forward);
        }
        let Some(resolved) = self.resolve(name, max, link, out) else { return Ok(self.unknown(out)) };
        let mut shared = None;
        if name.is_empty() {
            self.bring_used(max, link, out);
        }
        let verdict = match resolved {
            Resolved::AsNamed if out.is_empty() => Verdict::Forward,
            Resolved::AsNamed | Resolved::Injected => {
                out.extend_from_slice(frame);
                Verdict::Replace
            }
            Resolved::Shared(statement, name, _) => {
                shared = Some(Shared { id: statement.id, name });
                message::describe(out, b'S', &statement.name);
                Verdict::Replace
            }
        };
        self.push_extended(Expect::Describe(shared));
        Ok(verdict)
    }

    /// Makes sure that the server connection has the statement that the client means.
    fn resolve(&mut self, name: &[u8], max: usize, link: &mut Link<'_>, out: &mut BytesMut) -> Option<Resolved> {
        if name.is_empty() {
            self.translate_unnamed(link);
            let body = &self.unnamed.as_ref()?.body;
            let owner = UnnamedOwner { client: self.client, serial: self.unnamed_serial };
            if link.prepared.unnamed == Some(owner) {
                return Some(Resolved::AsNamed);
            }
            if body.is_empty() {
                // It was too long to be remembered.
                return None;
            }
            message::parse_with(out, b"", body);
            link.prepared.unnamed = Some(owner);
            self.push_extended(Expect::InjectedUnnamed);
            return Some(Resolved::Injected);
        }
        let Some((name, statement)) = self.named.get_key_value(name) else {
            // SQL may have prepared it; if not, the server says so.
            return Some(Resolved::AsNamed);
        };
        let (name, statement) = (name.clone(), statement.clone());
        let (statement, events) =
            if statement.names { self.as_named_now(statement, max, link, out) } else { (statement, None) };
        let statement = if statement.residue.processes { self.addressed_now(statement, link) } else { statement };
        self.bring_apart(&statement, max, link, out);
        Some(Resolved::Shared(statement, name, events))
    }

    /// A statement that names others (`EXECUTE a`), with our names for what they mean now; these are prepared first.
    fn as_named_now(
        &mut self,
        statement: Arc<Statement>,
        max: usize,
        link: &mut Link<'_>,
        out: &mut BytesMut,
    ) -> (Arc<Statement>, Events) {
        let text = statement.text();
        let uses = names::uses(text, link.ward.lex());
        let events = self.events(&uses, link.registry);
        let Some(mut body) = translate(text, &uses, &events) else { return (statement, events) };
        self.bring_all(&events, max, link, out);
        self.note_used(&events);
        body.extend_from_slice(&statement.body()[text.len()..]);
        let translated = self.shared(&body, || statement.residue.clone(), link);
        (translated, events)
    }

    /// A statement with the server's process ids in its text, as they are now.
    fn addressed_now(&self, statement: Arc<Statement>, link: &Link<'_>) -> Arc<Statement> {
        let text = statement.body().split(|&b| b == 0).next().unwrap_or_default();
        let signalled = address::signals(text);
        let Some(mut body) = address::in_text(text, |pid| link.ward.process(pid, signalled)) else {
            return statement;
        };
        body.extend_from_slice(&statement.body()[text.len()..]);
        self.shared(&body, || statement.residue.clone(), link)
    }

    /// The values that are bound to a statement, with the server's process ids; its text is looked at, too.
    fn address_values(&self, name: &[u8], values: &[u8], ward: &dyn Ward) -> Addressed {
        let (residue, body) = match name {
            b"" => self.unnamed.as_ref().map(|unnamed| (&unnamed.residue, unnamed.body.as_slice())),
            name => self.named.get(name).map(|statement| (&statement.residue, statement.body())),
        }
        .unzip();
        if !residue.is_some_and(|residue| residue.processes) {
            return Addressed::AsItIs;
        }
        let text = body.unwrap_or_default().split(|&b| b == 0).next().unwrap_or_default();
        addressed(text, ward, |process| {
            let _ = address::in_text(text, process);
            address::in_values(values, process)
        })
    }

    pub(super) fn note_bound(&mut self, residue: &Residue, values: &[u8], whole: bool) {
        if residue.parameters.is_empty() {
            self.note_residue(residue, true);
        } else {
            self.note_residue(&residue.with_values(values), whole);
        }
    }
}

/// The frame as it is, behind what was said already.
pub(super) fn behind(frame: &[u8], out: &mut BytesMut) -> Verdict {
    if out.is_empty() {
        return Verdict::Forward;
    }
    out.extend_from_slice(frame);
    Verdict::Replace
}

/// A Bind of which everything behind the tag and before the end has `length` bytes.
fn put_bind(out: &mut BytesMut, length: usize, portal: &[u8], statement: &[u8], values: &[u8]) {
    out.put_u8(b'B');
    // Fits: the client's own length did, and our names are short.
    out.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    out.extend_from_slice(portal);
    out.put_u8(0);
    out.extend_from_slice(statement);
    out.put_u8(0);
    out.extend_from_slice(values);
}
