//! What the server has yet to answer, in order, and answers of ours that keep their place among its own.
//!
//! Here is what has to wait for them; what each answer means is said in `server` and `failure`.

use std::sync::Arc;

use bytes::BytesMut;

use super::Session;
use super::events::{Events, is_renaming};
use super::unnamed::{Turn, uses_unnamed};
use crate::error::PgError;
use crate::pool::statements::Statement;
use crate::wire::frame::Header;

/// Most messages that the server may owe an answer; beyond that the client waits.
const MAX_EXPECTS: usize = 4096;

/// One message that the server has yet to answer, or an answer that we owe.
#[derive(Debug)]
pub(super) enum Expect {
    /// With what its statements do to names of prepared statements.
    Query(Events),
    Sync,
    Function,
    /// A Parse of the client; what its name meant before, should it fail.
    Parse(Option<Box<ParseUndo>>),
    /// A Parse, or a Close, of the unnamed statement.
    ParseUnnamed(Turn),
    CloseUnnamed(Turn),
    /// With the shared statement and the client's name for it.
    Bind(Option<Shared>),
    Describe(Option<Shared>),
    Execute(Events),
    Close,
    /// A Parse of a name under which SQL has prepared something, as far as is known.
    ParseBySql,
    /// Of what SQL has prepared under this name.
    CloseBySql(Box<[u8]>),
    /// A Parse of a name that is taken, which the server rejects, unless the name is free by then.
    Taken(Box<Taken>),
    /// A Parse of what is prepared already, for the server to say whether it may be now.
    Checked(Box<ParseUndo>),
    /// A Parse of ours: its answer is for nobody.
    Injected(u64),
    InjectedUnnamed,
    /// A Close of ours, of the statement with this number.
    InjectedClose(u64),
    /// A Describe of ours, before something is bound of which the client was told what it returns.
    InjectedDescribe(Shared),
    /// A Sync of ours behind a Parse of ours.
    InjectedSync,
    /// A Query of ours, whose outcome does not matter.
    InjectedQuery,
    /// A step of the extended protocol of ours, to be answered by this.
    InjectedStep(u8),
    /// The one of them that runs a `DISCARD SEQUENCES` of ours.
    InjectedDiscard,
    /// A Parse of nothing under the name of the statement with this number, which somebody names who does not run it.
    InjectedEmpty(u64),
    /// CopyDone or CopyFail, sent before we knew that the server was in COPY.
    CopyEnd,
    /// ParseComplete, which we give ourselves when its turn comes; the name it was for.
    OurParse(Box<[u8]>),
    /// CloseComplete, which we give ourselves when its turn comes; what was closed, should it be skipped.
    OurClose(Option<Box<Closed>>),
    /// `START_REPLICATION` beside others: what the client sends up to the end of it are messages to a walsender.
    Stream,
    /// A Query of ours that drops a slot if it is the tenant's, in the place of a command that would drop any.
    DropSlot,
    /// Bound to fail; the client gets this instead of the server's error. A Query, or a Parse.
    RefusedQuery(Box<PgError>),
    RefusedParse(Box<PgError>),
}

/// A closed statement's name and what it meant.
type Closed = (Arc<[u8]>, Arc<Statement>);

/// A shared statement that a message uses.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) id: u64,
    pub(super) name: Arc<[u8]>,
}

#[derive(Debug)]
pub(super) struct Taken {
    /// What has the name.
    pub(super) by: Shared,
    /// What was to have it.
    pub(super) statement: Arc<Statement>,
}

#[derive(Debug)]
pub(super) struct ParseUndo {
    pub(super) name: Box<[u8]>,
    /// The statement that was noted as prepared on the server connection.
    pub(super) statement: Arc<Statement>,
    /// Its scope is what it is prepared in, as far as is known.
    pub(super) in_scope: bool,
}

impl Session {
    pub(super) fn push_extended(&mut self, expect: Expect) {
        let closes =
            matches!(expect, Expect::Close | Expect::CloseUnnamed(_) | Expect::CloseBySql(_) | Expect::OurClose(_));
        self.only_closes = closes && self.may_come_before();
        (self.open_group, self.flushed) = (true, false);
        self.expects.push_back(expect);
    }

    /// Whether something of ours, with a Sync, can be said before the client's group of messages: it has not begun, or with
    /// nothing but Close, which cannot fail and begins no transaction.
    #[inline]
    pub(super) fn may_come_before(&self) -> bool {
        !self.open_group || self.only_closes
    }

    /// Takes what is answered now. The end of a COPY that has come to the front by that was for a COPY that never
    /// began, or has failed: the server ignores it.
    #[inline]
    pub(super) fn take(&mut self) -> Option<Expect> {
        let taken = self.expects.pop_front();
        while matches!(self.expects.front(), Some(Expect::CopyEnd)) {
            self.expects.pop_front();
        }
        taken
    }

    /// Gives the answers of ours whose turn it is.
    #[inline]
    pub fn flush_ours(&mut self, answers: &mut BytesMut) {
        loop {
            let tag = match self.expects.front() {
                Some(Expect::OurParse(_)) => b'1',
                Some(Expect::OurClose(_)) => b'3',
                _ => return,
            };
            answers.extend_from_slice(&[tag, 0, 0, 0, 4]);
            self.take();
        }
    }

    /// Whether it is the turn of an answer of ours.
    #[inline]
    pub fn owes_answer(&self) -> bool {
        matches!(self.expects.front(), Some(Expect::OurParse(_) | Expect::OurClose(_)))
    }

    /// Whether the server owes a ReadyForQuery.
    pub fn owes_ready(&self) -> bool {
        self.expects.iter().any(ends_by_itself)
    }

    /// Whether it owes a single one.
    pub fn owes_one_ready(&self) -> bool {
        self.expects.iter().filter(|e| ends_by_itself(e)).count() == 1
    }

    /// Whether it owes one that the client gets: ours are for nobody.
    pub fn owes_ready_to_client(&self) -> bool {
        let ours = |e: &Expect| matches!(e, Expect::InjectedSync | Expect::InjectedQuery);
        self.expects.iter().any(|e| ends_by_itself(e) && !ours(e))
    }

    /// Which of the messages with a statement or its values the server is working on, counted from the last one, which
    /// is 1.
    pub fn statements_owed(&self) -> usize {
        let says = |e: &Expect| {
            use Expect::*;
            let parses = matches!(
                e,
                Parse(_) | ParseBySql | ParseUnnamed(_) | Taken(_) | Checked(_) | OurParse(_) | RefusedParse(_)
            );
            parses || matches!(e, Query(_) | Function | RefusedQuery(_) | Bind(_) | Stream | DropSlot)
        };
        let owed = self.expects.iter().filter(|e| says(e)).count();
        // Execute, Describe and Sync belong to what came before them.
        owed + usize::from(!self.expects.front().is_some_and(says))
    }

    /// Whether the frame has to wait until the server has answered what came before: it may name a statement of which is
    /// not known yet whether an earlier group of messages, still under way, has prepared or closed it.
    #[inline]
    pub fn must_wait(&self, header: Header, frame: &[u8]) -> bool {
        if self.expects.is_empty() {
            return false;
        }
        if self.expects.len() >= MAX_EXPECTS && !self.copy_in {
            return true;
        }
        if self.streams.is_some() && self.expects.iter().any(|e| matches!(e, Expect::InjectedQuery)) {
            return true;
        }
        if !matches!(header.tag, b'Q' | b'P' | b'B' | b'D' | b'C') {
            return false;
        }
        if self.renames && self.expects.iter().any(is_renaming) {
            return true;
        }
        let Some(last) = self.expects.iter().rposition(ends_by_itself) else { return false };
        let in_doubt = |e: &Expect| match e {
            Expect::Parse(undo) => undo.is_some(),
            Expect::Injected(_) | Expect::InjectedClose(_) | Expect::InjectedDescribe(_) => true,
            Expect::OurParse(_) | Expect::OurClose(_) => true,
            Expect::Taken(_) | Expect::Checked(_) | Expect::CloseBySql(_) => true,
            _ => false,
        };
        let mut earlier = self.expects.iter().take(last + 1);
        earlier.clone().any(in_doubt) || (uses_unnamed(header, frame) && earlier.any(|e| self.makes_unnamed(e)))
    }

    /// Whether the server has to be asked for what it owes, since the client waits for that ([`Session::must_wait`]) before it
    /// can end its group of messages; asked once each time.
    pub fn must_flush(&mut self) -> bool {
        let asks = self.expects.len() >= MAX_EXPECTS && self.open_group;
        asks && !std::mem::replace(&mut self.flushed, true)
    }

    /// Whether what is answered now belongs to a group of messages of ours, up to a Sync of ours.
    pub(super) fn is_in_group_of_ours(&self) -> bool {
        matches!(self.expects.iter().find(|e| !is_step_of_ours(e)), Some(Expect::InjectedSync))
    }
}

/// Whether it is a message of ours, for what the client says behind it.
pub(super) fn is_step_of_ours(expect: &Expect) -> bool {
    matches!(
        expect,
        Expect::Injected(_)
            | Expect::InjectedClose(_)
            | Expect::InjectedStep(_)
            | Expect::InjectedDiscard
            | Expect::InjectedEmpty(_)
    )
}

/// Whether ReadyForQuery answers it, and an error in it skips nothing that comes behind.
pub(super) fn ends_by_itself(expect: &Expect) -> bool {
    use Expect::{DropSlot, Function, InjectedQuery, InjectedSync, Query, RefusedQuery, Stream, Sync};
    matches!(expect, Query(_) | Sync | Function | RefusedQuery(_) | InjectedSync | InjectedQuery | Stream | DropSlot)
}
