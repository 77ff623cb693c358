//! What client and server have said and still owe each other. No I/O.
//!
//! Every frame passes through [`Session::on_client`] or [`Session::on_server`], which decide what becomes of it. From
//! the same bookkeeping follows when a server connection may go back ([`Session::is_idle`]): the last ReadyForQuery
//! said `I`, no reply is outstanding, no COPY is in progress, no message since the last Sync.
//!
//! Here is what a session knows and what it is asked. What it decides, and where:
//! - `client`: what becomes of a client's frame, and a Query; `parse`, `bind`: the extended protocol's messages that name
//!   statements; `unnamed`: the statement without a name;
//! - `server`: what becomes of a server's frame; `failure`: what an error means for what comes behind it;
//! - `expect`: what the server still owes, and what has to wait for it;
//! - `look`: what a text may leave behind; `events`: what SQL does to names of prepared statements;
//! - `bring`: statements that a server connection lacks; `description`: what they return;
//! - `sequences`, `streams`: the state of sequences, replication;
//! - `refusal`: what is refused, and in what words.

mod bind;
mod bring;
mod client;
mod description;
mod events;
mod expect;
mod failure;
mod look;
mod parse;
mod refusal;
mod sequences;
mod server;
mod streams;
mod unnamed;

use std::collections::{BTreeSet, VecDeque};

use self::events::Events;
use self::expect::Expect;
use self::streams::Streams;
use self::unnamed::Unnamed;
use super::lex::Lex;
use super::named::Named;
use super::scan::Seen;
use crate::config::PoolMode;
use crate::error::PgError;
use crate::pool::residue::Residue;
use crate::pool::scope;
use crate::pool::statements::{Prepared, Registry};
use crate::wire::frame::until_nul;

/// What becomes of a frame.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It goes to the other side as it is.
    Forward,
    /// What was inspected of it is replaced by what was appended to the output; the rest of it follows as it is.
    Replace,
    /// All of it, inspected or not, is replaced by what was appended to the output.
    Instead,
    /// It goes nowhere.
    Swallow,
    /// Nothing has happened: it is to be looked at again when what it needs is there.
    Later,
    /// What was appended to the output goes to the other side; when that has answered, the frame is to be looked at again.
    Ahead,
}

/// The server sent what it does not owe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("unexpected message {:?} from the server", char::from(*.0))]
pub struct Desync(pub u8);

/// How prepared statements are treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Statements {
    /// The client keeps its server connection: names are passed on.
    PassThrough,
    /// Shared under names of ours; at most so many per server connection.
    Shared(usize),
}

/// The server's side of the statements, while a lease lasts.
pub struct Link<'a> {
    /// What the server connection has prepared.
    pub prepared: &'a mut Prepared,
    /// The tenant's statements.
    pub registry: &'a Registry,
    /// Looks after what is said.
    pub ward: &'a dyn Ward,
}

/// Who looks after what a client says, with the knowledge that a [`Session`] does not have.
pub trait Ward {
    /// A text has come: whether anybody looks at it.
    fn looks(&self) -> bool;
    /// How the server reads a text of this client.
    fn lex(&self) -> Lex;
    /// Looks at a text, with an eye on names of tenants. One with parameters `comes_again`, others have values in them.
    fn look(&self, text: &[u8], lex: Lex, comes_again: bool) -> Seen;
    /// Judges a suspicious text: what the client is told if it is refused.
    fn judge(&self, text: &[u8], lex: Lex) -> Option<PgError>;
    /// A text goes through that may change what later ones mean, or is run later.
    fn remember(&self, text: &[u8], lex: Lex);
    /// The server process that stands for a client, given the process id that the client was told; for a client without
    /// one there will be one, if it is to be `signalled`. `None` if the id is to stay what it is.
    fn process(&self, _pid: u32, _signalled: bool) -> Option<u32> {
        None
    }
    /// Whether there is no process yet for a client that is to be signalled.
    fn is_missing(&self) -> bool {
        false
    }
    /// A FunctionCall was refused.
    fn function_call_refused(&self);
    /// Something was refused on a replication connection, beyond what the guard refuses.
    fn replication_refused(&self, what: &str);
}

/// The state of one client's conversation.
#[derive(Debug)]
pub struct Session {
    client: u64,
    pool_mode: PoolMode,
    statements: Statements,
    expects: VecDeque<Expect>,
    status: u8,
    /// An extended-protocol error: the server skips everything up to the next Sync, and so do we.
    failed: bool,
    /// Messages of the extended protocol since the last Sync; nothing but Close among them.
    open_group: bool,
    only_closes: bool,
    copy_in: bool,
    /// COPY data has been sent since the last ReadyForQuery; and a Sync behind it, which the server ignores while it is
    /// in COPY, and answers if the COPY has failed by then. Which of the two cannot be told from outside.
    copy_data: bool,
    sync_in_copy: bool,
    /// A COPY has begun since the last ReadyForQuery.
    copy_began: bool,
    /// It has failed with such a Sync on its way.
    in_doubt: bool,
    /// The server has been asked to send the answers that it owes, of which there are too many.
    flushed: bool,
    residue: Residue,
    queries: u32,
    named: Named,
    /// What they may take (bytes); 0 is no limit.
    max_named: usize,
    /// Names of statements that SQL has prepared.
    by_sql: BTreeSet<Box<[u8]>>,
    /// Boxed: it moves, and many clients have none.
    unnamed: Option<Box<Unnamed>>,
    unnamed_serial: u64,
    /// What the unnamed statement that was bound last does when it is executed.
    bound: Events,
    /// The client has asked for the state of sequences before, and since it advanced any; or may, as others of its tenant do.
    has_asked: bool,
    asked_last: bool,
    asks: bool,
    /// It has advanced some in this transaction; and in one before on the same server connection.
    advanced: bool,
    advanced_again: bool,
    /// The number of the [`Stay`](crate::pool::statements::Stay) that it has done so in last.
    stay: u64,
    /// Something has been changed that prepared statements may depend on, in this transaction.
    altered: bool,
    /// What logins begin with may have been changed (`ALTER ROLE`), in this transaction or before.
    changes_logins: bool,
    /// Something is on the server connection that only a reset takes away.
    untidy: bool,
    /// What the same text means something else in another of; see [`scope`].
    scope: Box<str>,
    /// The client has prepared something that takes process ids.
    addresses: bool,
    /// It may be another until the transaction ends; and literals may be read otherwise.
    rescopes: bool,
    rereads: bool,
    /// What is made without a schema's name may be temporary: now, and as the session began.
    temporary: bool,
    began_temporary: bool,
    /// A Query has let the server forget the state of sequences.
    forgot_sequences: bool,
    /// Something that is not answered yet may give names to prepared statements, or take them away.
    renames: bool,
    /// Why a statement could not be prepared for the Query or the Bind behind it.
    unprepared: Option<Box<(u64, PgError)>>,
    /// The client replicates from a server that others use, too.
    streams: Option<Box<Streams>>,
}

impl Session {
    /// A conversation that begins. `client` is a number of its own; at most `max_prepared` statements are prepared on a
    /// server connection, 0 passes names through.
    pub fn new(client: u64, pool_mode: PoolMode, max_prepared: usize) -> Self {
        let statements = match pool_mode {
            PoolMode::Transaction | PoolMode::Auto if max_prepared > 0 => Statements::Shared(max_prepared),
            _ => Statements::PassThrough,
        };
        Self {
            client,
            pool_mode,
            statements,
            expects: VecDeque::new(),
            status: b'I',
            failed: false,
            open_group: false,
            only_closes: false,
            copy_in: false,
            copy_data: false,
            sync_in_copy: false,
            copy_began: false,
            in_doubt: false,
            flushed: false,
            residue: Residue::none(),
            queries: 0,
            named: Named::default(),
            max_named: 0,
            by_sql: BTreeSet::new(),
            unnamed: None,
            unnamed_serial: 0,
            bound: None,
            has_asked: false,
            asked_last: false,
            asks: false,
            advanced: false,
            advanced_again: false,
            stay: 0,
            untidy: false,
            altered: false,
            changes_logins: false,
            scope: Box::default(),
            addresses: false,
            rescopes: false,
            rereads: false,
            temporary: false,
            began_temporary: false,
            forgot_sequences: false,
            renames: false,
            unprepared: None,
            streams: None,
        }
    }

    /// The same with a limit for the memory (bytes) that the statements take which the client has prepared by name.
    #[must_use]
    pub fn with_max_named(self, max_named: usize) -> Self {
        Self { max_named, ..self }
    }

    /// The same for a client that began with this `search_path`.
    #[must_use]
    pub fn with_search_path(self, path: Option<&str>) -> Self {
        let temporary = path.is_some_and(scope::is_temporary);
        Self { temporary, began_temporary: temporary, ..self }
    }

    /// The same for a client that replicates from a server that others use, too: it may say what
    /// [`replication::read`](super::replication::read) lets through, and streams under this name, which is ASCII.
    #[must_use]
    pub fn with_replication(self, streams_as: Option<Box<str>>) -> Self {
        let streams = streams_as.map(|name| Box::new(Streams { name, named: None }));
        Self { streams, ..self }
    }

    /// Whether the server connection may go back.
    #[inline]
    pub fn is_idle(&self) -> bool {
        self.status == b'I' && self.expects.is_empty() && !self.open_group && !self.failed && !self.copy_in
    }

    /// Whether the client is in a transaction and it is its turn.
    pub fn is_idle_in_transaction(&self) -> bool {
        self.status != b'I' && self.expects.is_empty()
    }

    /// Whether the server waits for the client, and does nothing more without: in a transaction, in a COPY, or in a
    /// group of messages without its Sync.
    pub fn waits_for_client(&self) -> bool {
        let mid_work = self.status != b'I' || self.open_group || self.failed;
        self.copy_in || (mid_work && !self.owes_ready())
    }

    /// The transaction's status as the last ReadyForQuery said it: `I`, `T` or `E`.
    pub fn status(&self) -> u8 {
        self.status
    }

    /// The text of a prepared statement, if it is known.
    pub fn text_of(&self, name: &[u8]) -> Option<&[u8]> {
        let body = match name {
            b"" => self.unnamed.as_ref()?.body.as_slice(),
            name => self.named.get(name)?.body(),
        };
        Some(until_nul(body))
    }

    /// Statements since the last call.
    #[inline]
    pub fn take_queries(&mut self) -> u32 {
        std::mem::take(&mut self.queries)
    }

    /// What may be left behind in the session; asked once, when the server connection goes back.
    pub fn take_residue(&mut self) -> Residue {
        std::mem::take(&mut self.residue)
    }

    /// Whether anything may be left behind.
    #[inline]
    pub fn has_residue(&self) -> bool {
        !self.residue.is_none()
    }

    /// Whether the server connection has to be reset before others get it; asked once, when it goes back.
    pub fn take_untidy(&mut self) -> bool {
        std::mem::take(&mut self.untidy)
    }

    /// Whether a transaction has ended that changed what prepared statements may depend on; asked once.
    pub fn take_altered(&mut self) -> bool {
        self.altered && self.status == b'I' && std::mem::take(&mut self.altered)
    }

    /// Whether what logins begin with may have been changed.
    #[inline]
    pub fn changes_logins(&self) -> bool {
        self.changes_logins
    }

    /// The same, asked once.
    pub fn take_changes_logins(&mut self) -> bool {
        std::mem::take(&mut self.changes_logins)
    }

    /// Whether it cannot be told how many answers the server still gives: a COPY has failed with a Sync on its way.
    pub fn is_in_doubt(&self) -> bool {
        self.in_doubt
    }

    /// Notes what the client's settings have come to; see [`scope::of`].
    pub fn set_scope(&mut self, scope: String, registry: &Registry) {
        if *self.scope == *scope {
            return;
        }
        for statement in self.named.values_mut() {
            if let Some(there) = registry.used_in(statement, &scope) {
                *statement = there;
            }
        }
        self.temporary = scope::value(&scope, scope::PATH).map_or(self.began_temporary, scope::is_temporary);
        self.scope = scope.into();
    }

    /// Whether a setting may have been reset since the server connection was lent.
    pub fn may_reset(&self, name: &str) -> bool {
        self.residue.resets || self.residue.settings.iter().any(|found| **found == *name)
    }

    /// Whether a database may have to be nobody else's for what the client has just said; asked once.
    #[inline]
    pub fn needs_database_alone(&mut self) -> bool {
        std::mem::take(&mut self.residue.databases)
    }

    /// Whether the client has just asked for the process id of its session; asked once.
    #[inline]
    pub fn asks_for_process(&mut self) -> bool {
        std::mem::take(&mut self.residue.own_process)
    }

    /// Whether it may have changed what the session listens to.
    #[inline]
    pub fn may_listen(&self) -> bool {
        self.residue.listens
    }

    /// Notes what a text leaves behind when it runs. What was not seen whole cannot be vouched for.
    #[inline]
    fn note_residue(&mut self, residue: &Residue, whole: bool) {
        self.residue.unknown |= !whole;
        self.residue.own_process |= residue.own_process;
        self.rescopes |= residue.rescopes;
        self.rereads |= residue.rereads;
        if !residue.is_none() {
            self.residue.merge(residue);
            // They are known when values are bound.
            self.residue.parameters.clear();
            if self.pool_mode != PoolMode::Auto {
                (self.residue.asks, self.residue.frees, self.residue.stores_process) = (false, false, false);
            }
        }
        self.residue.unknown |= residue.creates && (self.temporary || self.scope_in_doubt());
    }
}

#[cfg(test)]
mod tests;
