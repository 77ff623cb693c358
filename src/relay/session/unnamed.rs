//! The unnamed statement: one per client, on a server connection that others use in between.
//!
//! It is remembered with a number, so that it can be said whether a server connection still has it; it is parsed again where
//! it has not, and is what it was if what changed it is skipped.

use bytes::BytesMut;

use super::events::{Events, translate};
use super::expect::Expect;
use super::look::addressed;
use super::{Link, Session, Statements, Verdict};
use crate::pool::residue::Residue;
use crate::pool::statements::{Prepared, UnnamedOwner};
use crate::relay::address::{self, Addressed};
use crate::relay::names;
use crate::wire::frame::{HEADER, Header, cstr, until_nul};
use crate::wire::message;

/// Longest unnamed statement (bytes) that is remembered from one Sync to the next, for which it has to be seen whole.
pub(super) const MAX_UNNAMED: usize = 1 << 20;

/// What is remembered of one that was so long is given back when it is over (bytes).
const MAX_SPARE: usize = 4 << 10;

/// The unnamed statement of a client.
#[derive(Debug, Default)]
pub(super) struct Unnamed {
    /// Its Parse without the name; empty if it is too long.
    pub(super) body: Vec<u8>,
    pub(super) residue: Residue,
    pub(super) events: Events,
    /// The same in the client's words, if it names prepared statements: what they mean is asked when it is used.
    said: Option<Box<[u8]>>,
}

/// A change of what the unnamed statement is.
#[derive(Debug)]
pub(super) struct Turn {
    /// Its number.
    pub(super) serial: u64,
    /// What it was, should this be skipped; not kept where nothing comes before that could fail.
    pub(super) before: Option<Box<Unnamed>>,
}

impl Session {
    /// The unnamed statement, with the server's process ids: it is usually bound at once.
    pub(super) fn parse_addressed(
        &mut self,
        text: &[u8],
        body: &[u8],
        whole: bool,
        residue: Residue,
        link: &mut Link<'_>,
        out: &mut BytesMut,
    ) -> Verdict {
        let addressed = match residue.processes && whole {
            true => addressed(text, link.ward, |process| address::in_text(text, process)),
            false => Addressed::AsItIs,
        };
        let said = match addressed {
            Addressed::AsItIs => return self.parse_unnamed(text, body, whole, residue, link, out),
            Addressed::Later => return Verdict::Later,
            Addressed::Said(said) => said,
        };
        let body = [&said, &body[text.len()..]].concat();
        let verdict = self.parse_unnamed(&said, &body, whole, residue, link, out);
        if verdict != Verdict::Forward {
            return verdict;
        }
        message::parse_with(out, b"", &body);
        Verdict::Instead
    }

    fn parse_unnamed(
        &mut self,
        text: &[u8],
        body: &[u8],
        whole: bool,
        residue: Residue,
        link: &mut Link<'_>,
        out: &mut BytesMut,
    ) -> Verdict {
        self.note_residue(&residue, whole);
        let uses = if whole { self.uses(text, &residue, link.ward) } else { Vec::new() };
        let events = self.events(&uses, link.registry);
        let translated =
            translate(text, &uses, &events).map(|text_of_ours| [&text_of_ours, &body[text.len()..]].concat());
        let said = events.is_some().then(|| body.into());
        let body = translated.as_deref().unwrap_or(body);
        let residue = if whole { residue } else { Residue::anything() };
        let before = self.unnamed_before();
        self.remember_unnamed(if whole { Some(body) } else { None }, residue, events);
        if let Some(unnamed) = &mut self.unnamed {
            unnamed.said = said;
        }
        link.prepared.unnamed = Some(self.unnamed_owner());
        if let Statements::Shared(max) = self.statements {
            // What it returns is looked up here.
            self.bring_used(max, link, out);
        }
        self.push_extended(Expect::ParseUnnamed(Turn { serial: self.unnamed_serial, before }));
        if translated.is_none() {
            return Verdict::Forward;
        }
        message::parse_with(out, b"", body);
        Verdict::Instead
    }

    fn remember_unnamed(&mut self, body: Option<&[u8]>, residue: Residue, events: Events) {
        self.unnamed_serial += 1;
        let kept = self.unnamed.get_or_insert_default();
        (kept.residue, kept.events) = (residue, events);
        let body = body.filter(|body| body.len() <= MAX_UNNAMED).unwrap_or_default();
        kept.body.clear();
        if kept.body.capacity() > MAX_SPARE {
            kept.body.shrink_to(body.len());
        }
        kept.body.extend_from_slice(body);
    }

    /// What the unnamed statement is, for a message that changes it and may be skipped.
    pub(super) fn unnamed_before(&mut self) -> Option<Box<Unnamed>> {
        if self.expects.is_empty() { None } else { self.unnamed.take() }
    }

    pub(super) fn unnamed_owner(&self) -> UnnamedOwner {
        UnnamedOwner { client: self.client, serial: self.unnamed_serial }
    }

    /// What the unnamed statement leaves behind is left where it runs, and it may run others.
    pub(super) fn bind_unnamed(
        &mut self,
        values: &[u8],
        whole: bool,
        max: usize,
        link: &mut Link<'_>,
        out: &mut BytesMut,
    ) {
        let Some(unnamed) = self.unnamed.take() else { return };
        self.note_bound(&unnamed.residue, values, whole);
        self.note_sequences(&unnamed.residue, None, link, out);
        if unnamed.residue.lists {
            self.hide_others(None, link, out);
        }
        self.bound = unnamed.events.clone();
        self.unnamed = Some(unnamed);
        self.bring_used(max, link, out);
    }

    /// What the unnamed statement names may mean something else since its Parse.
    pub(super) fn translate_unnamed(&mut self, link: &Link<'_>) {
        let said = self.unnamed.as_mut().and_then(|unnamed| unnamed.said.take());
        let Some(said) = said else { return };
        let text = until_nul(&said);
        let uses = names::uses(text, link.ward.lex());
        let events = self.events(&uses, link.registry);
        let mut body = translate(text, &uses, &events).unwrap_or_else(|| text.to_vec());
        body.extend_from_slice(&said[text.len()..]);
        let Some(unnamed) = &mut self.unnamed else { return };
        if unnamed.body != body {
            self.unnamed_serial += 1;
            unnamed.body = body;
        }
        (unnamed.events, unnamed.said) = (events, Some(said));
    }

    /// Whether the unnamed statement is what it is only if this is carried out.
    pub(super) fn makes_unnamed(&self, expect: &Expect) -> bool {
        match expect {
            Expect::ParseUnnamed(turn) | Expect::CloseUnnamed(turn) => turn.serial == self.unnamed_serial,
            Expect::InjectedUnnamed => true,
            _ => false,
        }
    }

    /// The unnamed statement is what it was, unless something behind it has changed it again.
    pub(super) fn undo_unnamed(&mut self, turn: Turn, prepared: &mut Prepared) {
        if prepared.unnamed == Some(UnnamedOwner { client: self.client, serial: turn.serial }) {
            prepared.unnamed = None;
        }
        for later in &mut self.expects {
            match later {
                Expect::ParseUnnamed(later) | Expect::CloseUnnamed(later) => {
                    later.before = turn.before;
                    return;
                }
                // It takes the unnamed statement away.
                Expect::Query(_) | Expect::RefusedQuery(_) | Expect::Stream | Expect::DropSlot => return,
                _ => {}
            }
        }
        self.unnamed = turn.before;
    }
}

/// Whether a message uses the unnamed statement. What cannot be told yet may.
pub(super) fn uses_unnamed(header: Header, frame: &[u8]) -> bool {
    let unnamed = |name: &[u8]| name.first().is_none_or(|first| *first == 0);
    match header.tag {
        b'B' => cstr(frame.get(HEADER..).unwrap_or_default()).is_none_or(|(_, rest)| unnamed(rest)),
        b'D' => {
            frame.get(HEADER).is_none_or(|what| *what == b'S') && unnamed(frame.get(HEADER + 1..).unwrap_or_default())
        }
        _ => false,
    }
}
