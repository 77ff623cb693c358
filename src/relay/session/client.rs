//! What becomes of a client's frame. A Query is dealt with here; the extended protocol's messages that name statements are
//! in `parse`, `bind` and `unnamed`.

use bytes::BytesMut;

use super::events::{renames, translate};
use super::expect::Expect;
use super::look::{addressed, look};
use super::streams::{STATUS_UPDATE, no_feedback};
use super::unnamed::MAX_UNNAMED;
use super::{Link, Session, Statements, Verdict};
use crate::error::{PgError, sqlstate};
use crate::pool::recent::Recent;
use crate::relay::address::{self, Addressed};
use crate::wire::frame::{HEADER, Header, until_nul};
use crate::wire::message;

/// FunctionCall is refused but for large objects: OIDs of lo_open, lo_close, loread, lowrite, lo_lseek(64), lo_creat,
/// lo_create, lo_tell(64), lo_unlink, lo_truncate(64), which libpq's lo_* functions call.
const LARGE_OBJECT_FUNCTIONS: [u32; 13] = [715, 952, 953, 954, 955, 956, 957, 958, 964, 1004, 3170, 3171, 3172];

impl Session {
    /// Keeps what a client says until it is answered, before [`Session::on_client`].
    #[inline]
    pub fn note(&self, frame: &[u8], recent: &mut Recent) {
        match frame.first() {
            Some(b'S') => recent.end_group(),
            Some(b'Q' | b'P' | b'B' | b'F') if !self.failed => {
                if self.expects.is_empty() {
                    recent.clear();
                }
                let alone = matches!(frame.first(), Some(b'Q' | b'F'));
                if alone {
                    recent.end_group();
                }
                recent.note(frame);
                if alone {
                    recent.end_group();
                }
            }
            _ => {}
        }
    }

    /// How much of a frame has to be at hand for [`Session::on_client`]: `have` is what has arrived, `limit` how much
    /// may be asked for unless the message must be seen whole, at most `max`.
    ///
    /// # Errors
    /// A message that must be seen whole and is longer than `max`.
    pub fn needs(&self, header: Header, have: &[u8], limit: usize, max: usize) -> Result<usize, PgError> {
        match header.tag {
            b'Q' | b'B' | b'D' | b'C' | b'F' | b'E' => Ok(header.total.min(limit)),
            b'd' if self.streams.is_some() => Ok(header.total.min(HEADER + 1)),
            b'P' if self.statements == Statements::PassThrough => Ok(header.total.min(limit)),
            b'P' => match have.get(HEADER) {
                None => Ok(header.total.min(HEADER + 1)),
                Some(0) => Ok(header.total.min(limit.max(MAX_UNNAMED.min(max)))),
                Some(_) if header.total <= max => Ok(header.total),
                Some(_) => Err(PgError::fatal(sqlstate::PROGRAM_LIMIT_EXCEEDED, "prepared statement is too long")
                    .detail(format!("It has {} bytes; max_packet_size is {max}.", header.total))),
            },
            _ => Ok(HEADER),
        }
    }

    /// Decides about a client's frame. Answers of ours that it calls for are for the caller to fetch by
    /// [`Session::flush_ours`]. `frame` is at least as much of it as [`Session::needs`] asked for.
    ///
    /// # Errors
    /// FATAL: a message that breaks the protocol.
    #[inline]
    pub fn on_client(
        &mut self,
        header: Header,
        frame: &[u8],
        link: &mut Link<'_>,
        out: &mut BytesMut,
    ) -> Result<Verdict, PgError> {
        if self.failed && header.tag != b'S' {
            return Ok(Verdict::Swallow);
        }
        match header.tag {
            b'Q' => Ok(self.query(header, frame, link, out)),
            b'P' => self.parse(header, frame, link, out),
            b'B' => self.bind(header, frame, link, out),
            b'D' | b'C' => self.describe_or_close(header, frame, link, out),
            b'E' => {
                self.queries += 1;
                let events = self.bound.take();
                let asks = renames(&events) && frame.len() == header.total;
                self.renames |= asks;
                self.push_extended(Expect::Execute(events));
                if !asks {
                    return Ok(Verdict::Forward);
                }
                // What follows waits for the answer: names mean something else then.
                out.extend_from_slice(frame);
                message::flush(out);
                Ok(Verdict::Replace)
            }
            b'S' => {
                (self.failed, self.open_group, self.only_closes) = (false, false, false);
                self.sync_in_copy |= self.copy_data || self.copy_in;
                if !self.copy_in {
                    self.expects.push_back(Expect::Sync);
                }
                Ok(Verdict::Forward)
            }
            b'H' => Ok(Verdict::Forward),
            b'd' => {
                if self.may_stream() && frame.get(HEADER) != Some(&STATUS_UPDATE) {
                    link.ward.replication_refused("a message to a walsender other than a status update");
                    return Err(no_feedback());
                }
                self.copy_data = true;
                Ok(Verdict::Forward)
            }
            b'c' | b'f' => {
                self.copy_data = false;
                if self.copy_in {
                    self.copy_in = false;
                } else if !self.expects.is_empty() {
                    self.expects.push_back(Expect::CopyEnd);
                }
                Ok(Verdict::Forward)
            }
            b'F' => Ok(self.function_call(frame, link, out)),
            tag => Err(PgError::fatal(sqlstate::PROTOCOL_VIOLATION, format!("invalid frontend message type {tag}"))),
        }
    }

    fn query(&mut self, header: Header, frame: &[u8], link: &mut Link<'_>, out: &mut BytesMut) -> Verdict {
        let text = until_nul(&frame[HEADER..]);
        let whole = frame.len() == header.total;
        if self.streams.is_some()
            && let Some(verdict) = self.replicate(text, whole, link, out)
        {
            return verdict;
        }
        let residue = match self.cannot_pool(text).map_or_else(|| look(text, link.ward, false), Err) {
            Ok(residue) => residue,
            Err(error) => {
                (self.unnamed, link.prepared.unnamed, self.open_group) = (None, None, false);
                return self.refuse_query(error, out);
            }
        };
        let addressed = match residue.processes && whole {
            true => addressed(text, link.ward, |process| address::in_text(text, process)),
            false => Addressed::AsItIs,
        };
        let addressed = match addressed {
            Addressed::AsItIs => None,
            Addressed::Said(text) => Some(text),
            Addressed::Later => return Verdict::Later,
        };
        let text = addressed.as_deref().unwrap_or(text);
        self.note_residue(&residue, whole);
        self.note_sequences(&residue, Some(text), link, out);
        // A simple Query of any kind drops the unnamed statement.
        self.unnamed = None;
        link.prepared.unnamed = None;
        self.queries += 1;
        let uses = if whole { self.uses(text, &residue, link.ward) } else { Vec::new() };
        let events = self.events(&uses, link.registry);
        let translated = translate(text, &uses, &events);
        self.note_used(&events);
        // An aborted transaction may be over by then.
        let takes_more = self.status != b'E' || !self.expects.is_empty();
        if residue.lists && takes_more && !self.open_group && self.hide_others(None, link, out) {
            message::sync(out);
            self.expects.push_back(Expect::InjectedSync);
        }
        self.bring_to_query(&events, link, out);
        self.renames |= renames(&events);
        self.open_group = false;
        // Most clients of the simple protocol never owe more, and keep the room for it.
        if self.expects.capacity() == 0 {
            self.expects.reserve_exact(1);
        }
        self.expects.push_back(Expect::Query(events));
        match translated.as_ref().or(addressed.as_ref()) {
            Some(text) => message::query_bytes(out, text),
            None if out.is_empty() => return Verdict::Forward,
            None => out.extend_from_slice(frame),
        }
        Verdict::Replace
    }

    fn function_call(&mut self, frame: &[u8], link: &mut Link<'_>, out: &mut BytesMut) -> Verdict {
        let oid = frame.get(HEADER..HEADER + 4).and_then(|b| b.try_into().ok()).map(u32::from_be_bytes);
        self.open_group = false;
        if oid.is_some_and(|oid| LARGE_OBJECT_FUNCTIONS.contains(&oid)) {
            self.expects.push_back(Expect::Function);
            return Verdict::Forward;
        }
        link.ward.function_call_refused();
        let error = PgError::error(sqlstate::INSUFFICIENT_PRIVILEGE, "function calls by the fast path are refused")
            .detail("pgusher passes on FunctionCall messages for large objects only.")
            .hint("Call the function in a SELECT.");
        // The server's goes with the Query that stands in for the call; the client's stays, and is brought when it is used.
        link.prepared.unnamed = None;
        self.refuse_query(error, out)
    }
}
