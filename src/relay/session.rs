//! What client and server have said and still owe each other. No I/O.
//!
//! Every frame passes through [`Session::on_client`] or [`Session::on_server`], which decide what becomes of it. From
//! the same bookkeeping follows when a server connection may go back ([`Session::is_idle`]): the last ReadyForQuery
//! said `I`, no reply is outstanding, no COPY is in progress, no message since the last Sync.
//!
//! Refusals: a message that the client may not send is replaced by one that the server is bound to reject, and the
//! server's error by ours. So a transaction fails, a pipeline is skipped and an implicit transaction is rolled back
//! just as if the server itself had refused.

mod bring;
mod description;

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::{BufMut as _, BytesMut};

use super::address::{self, Addressed};
use super::lex::Lex;
use super::named::Named;
use super::names::{self, Use, Verb};
use super::replication::{self, Said};
use super::{scan, track};
use crate::config::PoolMode;
use crate::error::{PgError, Severity, sqlstate};
use crate::pool::connect::server_error;
use crate::pool::keepers::Claim;
use crate::pool::recent::Recent;
use crate::pool::residue::Residue;
use crate::pool::scope;
use crate::pool::statements::{Prepared, Registry, Statement, Stay, UnnamedOwner, has_scope};
use crate::tenant::sql::Literal;
use crate::wire::frame::{self, HEADER, Header, cstr, until_nul};
use crate::wire::message;

type HashSet<K> = std::collections::HashSet<K, ahash::RandomState>;

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
    /// Whether a name may be a tenant's; may say yes too often.
    fn may_be_tenant(&self, name: &[u8]) -> bool;
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

/// What becomes of a statement's text, or of its values, in which process ids may stand.
fn addressed(
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

fn see(text: &[u8], ward: &dyn Ward) -> (scan::Seen, Lex) {
    let lex = if Lex::is_irrelevant_to(text) { Lex::default() } else { ward.lex() };
    (scan::look(&lex.narrow(text), lex, |name| ward.may_be_tenant(name)), lex)
}

/// Looks at a text: whether running it may leave something behind in the session, unless it is refused.
fn look(text: &[u8], ward: &dyn Ward) -> Result<Residue, PgError> {
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
        return Ok(residue(if doubtful { see(text, ward).0 } else { seen }));
    }
    let (seen, lex) = see(text, ward);
    match seen.suspicious.then(|| ward.judge(text, lex)).flatten() {
        Some(error) => Err(error),
        None => Ok(residue(seen)),
    }
}

/// One message that the server has yet to answer, or an answer that we owe.
#[derive(Debug)]
enum Expect {
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

/// What happens to names of prepared statements when the statements of a text are carried out, in that order.
type Events = Option<Box<VecDeque<Event>>>;

#[derive(Debug, Clone)]
struct Event {
    verb: Verb,
    name: Box<[u8]>,
    /// What the client has prepared by the protocol under this name.
    shared: Option<Arc<Statement>>,
}

/// A shared statement that a message uses.
#[derive(Debug)]
struct Shared {
    id: u64,
    name: Arc<[u8]>,
}

#[derive(Debug)]
struct Taken {
    /// What has the name.
    by: Shared,
    /// What was to have it.
    statement: Arc<Statement>,
}

/// A change of what the unnamed statement is.
#[derive(Debug)]
struct Turn {
    /// Its number.
    serial: u64,
    /// What it was, should this be skipped; not kept where nothing comes before that could fail.
    before: Option<Box<Unnamed>>,
}

/// The unnamed statement of a client.
#[derive(Debug, Default)]
struct Unnamed {
    /// Its Parse without the name; empty if it is too long.
    body: Vec<u8>,
    residue: Residue,
    events: Events,
    /// The same in the client's words, if it names prepared statements: what they mean is asked when it is used.
    said: Option<Box<[u8]>>,
}

#[derive(Debug)]
struct ParseUndo {
    name: Box<[u8]>,
    /// The statement that was noted as prepared on the server connection.
    statement: Arc<Statement>,
    /// Its scope is what it is prepared in, as far as is known.
    in_scope: bool,
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
    /// Messages of the extended protocol since the last Sync.
    open_group: bool,
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
    /// The number of the [`Stay`] that it has done so in last.
    stay: u64,
    /// Something has been changed that prepared statements may depend on, in this transaction.
    altered: bool,
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

/// The streams of a client that replicates from a server that others use, too.
#[derive(Debug)]
struct Streams {
    /// Their application_name. With a standby's a stream would be a standby: commits of all tenants would wait for it,
    /// and be safe when it says so.
    name: Box<str>,
    /// What came of setting it, for the `START_REPLICATION` that waits for that.
    named: Option<Result<(), PgError>>,
}

/// The name of a statement that lives no longer than it takes to prepare it.
const CHECK: &[u8] = b"pgusher_check";

/// Text that no PostgreSQL parses.
const REJECTED: &str = "refused by pgusher:";

/// FunctionCall is refused but for large objects: OIDs of lo_open, lo_close, loread, lowrite, lo_lseek(64), lo_creat,
/// lo_create, lo_tell(64), lo_unlink, lo_truncate(64), which libpq's lo_* functions call.
const LARGE_OBJECT_FUNCTIONS: [u32; 13] = [715, 952, 953, 954, 955, 956, 957, 958, 964, 1004, 3170, 3171, 3172];

/// Longest setting, and longest error, that is looked at whole (bytes).
const MAX_SAID: usize = 1 << 20;

/// Longer than any notification (bytes).
const MAX_NOTIFICATION: usize = 16 << 10;

/// Longest unnamed statement (bytes) that is remembered from one Sync to the next, for which it has to be seen whole.
const MAX_UNNAMED: usize = 1 << 20;

/// What is remembered of one that was so long is given back when it is over (bytes).
const MAX_SPARE: usize = 4 << 10;

/// Most messages that the server may owe an answer; beyond that the client waits.
const MAX_EXPECTS: usize = 4096;

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

    /// The same for a client that replicates from a server that others use, too: it may say what [`replication::read`]
    /// lets through, and streams under this name, which is ASCII.
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

    /// Which of the messages with a statement or its values the server is working on, counted from the last one, which
    /// is 1.
    pub fn statements_owed(&self) -> usize {
        let says = |e: &Expect| {
            use Expect::*;
            let parses =
                matches!(e, Parse(_) | ParseUnnamed(_) | Taken(_) | Checked(_) | OurParse(_) | RefusedParse(_));
            parses || matches!(e, Query(_) | Function | RefusedQuery(_) | Bind(_) | Stream | DropSlot)
        };
        let owed = self.expects.iter().filter(|e| says(e)).count();
        // Execute, Describe and Sync belong to what came before them.
        owed + usize::from(!self.expects.front().is_some_and(says))
    }

    /// The text of a prepared statement, if it is known.
    pub fn text_of(&self, name: &[u8]) -> Option<&[u8]> {
        let body = match name {
            b"" => self.unnamed.as_ref()?.body.as_slice(),
            name => self.named.get(name)?.body(),
        };
        Some(until_nul(body))
    }

    /// Whether the last ReadyForQuery said that there is no transaction and nothing is outstanding, so that closing the
    /// session loses nothing.
    pub fn status(&self) -> u8 {
        self.status
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

    /// Whether the server connection has to be reset before others get it; asked once, when it goes back.
    pub fn take_untidy(&mut self) -> bool {
        std::mem::take(&mut self.untidy)
    }

    /// Whether a transaction has ended that changed what prepared statements may depend on; asked once.
    pub fn take_altered(&mut self) -> bool {
        self.altered && self.status == b'I' && std::mem::take(&mut self.altered)
    }

    /// Whether a setting may have been reset since the server connection was lent.
    pub fn may_reset(&self, name: &str) -> bool {
        self.residue.resets || self.residue.settings.iter().any(|found| **found == *name)
    }

    /// How much the client would miss the state of its sequences.
    pub fn claim(&self) -> Claim {
        match (self.has_asked, self.asked_last) {
            (false, _) if self.advanced_again => Claim::Unused,
            (false, _) => Claim::New,
            (true, true) => Claim::Asked,
            (true, false) => Claim::Due,
        }
    }

    /// Whether it has to keep this server connection for the state of sequences.
    pub fn keeps_sequences(&self, prepared: &Prepared) -> bool {
        self.asks && prepared.sequences_of == Some(self.stay())
    }

    /// Where it has advanced sequences last.
    #[inline]
    pub fn stay(&self) -> Stay {
        Stay { client: self.client, number: self.stay }
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

    /// Whether anything may be left behind.
    #[inline]
    pub fn has_residue(&self) -> bool {
        !self.residue.is_none()
    }

    /// Whether it may have changed what the session listens to.
    #[inline]
    pub fn may_listen(&self) -> bool {
        self.residue.listens
    }

    /// Whether it cannot be told how many answers the server still gives: a COPY has failed with a Sync on its way.
    pub fn is_in_doubt(&self) -> bool {
        self.in_doubt
    }

    /// Whether the server owes a ReadyForQuery.
    pub fn owes_ready(&self) -> bool {
        self.expects.iter().any(ends_by_itself)
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
                (self.failed, self.open_group) = (false, false);
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
            b'F' => Ok(self.function_call(frame, link.ward, out)),
            tag => Err(PgError::fatal(sqlstate::PROTOCOL_VIOLATION, format!("invalid frontend message type {tag}"))),
        }
    }

    /// Takes what is answered now. The end of a COPY that has come to the front by that was for a COPY that never
    /// began, or has failed: the server ignores it.
    #[inline]
    fn take(&mut self) -> Option<Expect> {
        let taken = self.expects.pop_front();
        while matches!(self.expects.front(), Some(Expect::CopyEnd)) {
            self.expects.pop_front();
        }
        taken
    }

    /// What cannot work when the server connection goes back after the transaction.
    fn cannot_pool(&self, text: &[u8]) -> Option<PgError> {
        if self.pool_mode != PoolMode::Transaction || !scan::begins_with(text, b"listen") {
            return None;
        }
        let error =
            PgError::error(sqlstate::FEATURE_NOT_SUPPORTED, "LISTEN does not work with pool_mode = \"transaction\"");
        let detail = "Notifications would arrive at whoever uses the server connection next.";
        Some(error.detail(detail).hint("Use pool_mode = \"session\"."))
    }

    fn push_extended(&mut self, expect: Expect) {
        (self.open_group, self.flushed) = (true, false);
        self.expects.push_back(expect);
    }

    fn query(&mut self, header: Header, frame: &[u8], link: &mut Link<'_>, out: &mut BytesMut) -> Verdict {
        let text = until_nul(&frame[HEADER..]);
        let whole = frame.len() == header.total;
        if self.streams.is_some()
            && let Some(verdict) = self.replicate(text, whole, link, out)
        {
            return verdict;
        }
        let residue = match self.cannot_pool(text).map_or_else(|| look(text, link.ward), Err) {
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

    /// A Query of who replicates from a server that others use, too, unless it is SQL.
    fn replicate(&mut self, text: &[u8], whole: bool, link: &mut Link<'_>, out: &mut BytesMut) -> Option<Verdict> {
        let said = replication::read(text, whole);
        if said == Ok(Said::Sql) {
            return None;
        }
        let mut named = None;
        if said == Ok(Said::Stream)
            && let Some(streams) = &mut self.streams
        {
            named = streams.named.take();
            if named.is_none() {
                message::query(out, &format!("SET application_name = {}", Literal(&streams.name)));
                self.expects.push_back(Expect::InjectedQuery);
                return Some(Verdict::Ahead);
            }
        }
        (self.unnamed, link.prepared.unnamed, self.open_group) = (None, None, false);
        self.queries += 1;
        Some(match said {
            Ok(Said::Sql | Said::Command) => {
                self.expects.push_back(Expect::Query(None));
                Verdict::Forward
            }
            Ok(Said::Stream) => match named {
                // It may have been cancelled, or in a transaction that has failed.
                Some(Err(error)) => self.refuse_query(error, out),
                _ => {
                    self.expects.push_back(Expect::Stream);
                    Verdict::Forward
                }
            },
            Ok(Said::Drop { slot, wait }) => {
                message::query(out, &format!("CALL tenant_shim.pgusher_drop_slot({}, {wait})", Literal(&slot)));
                self.expects.push_back(Expect::DropSlot);
                Verdict::Instead
            }
            Err(refusal) => {
                link.ward.replication_refused(refusal.what());
                self.refuse_query(refusal.error(), out)
            }
        })
    }

    /// What came of a Query of ours, for the `START_REPLICATION` that waits for it.
    fn note_stream_name(&mut self, outcome: Result<(), PgError>) {
        if let Some(streams) = &mut self.streams {
            streams.named = Some(outcome);
        }
    }

    /// Whether what comes now may be for a walsender that streams, beside others.
    #[inline]
    pub fn may_stream(&self) -> bool {
        self.streams.is_some() && self.expects.iter().any(|e| matches!(e, Expect::Stream))
    }

    /// Names of prepared statements in a text that does anything of interest.
    fn uses(&self, text: &[u8], residue: &Residue, ward: &dyn Ward) -> Vec<Use> {
        let shared = matches!(self.statements, Statements::Shared(_));
        let interesting = shared && (residue.unknown || residue.frees);
        if interesting { names::uses(text, ward.lex()) } else { Vec::new() }
    }

    /// What they mean one after the other: a name that was taken away is the server's business from there on.
    fn events(&self, uses: &[Use], registry: &Registry) -> Events {
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
    fn note_used(&mut self, events: &Events) {
        let used = events.iter().flat_map(|events| events.iter()).filter_map(|event| event.shared.clone());
        for statement in used.collect::<Vec<_>>() {
            self.note_residue(&statement.residue, true);
        }
    }

    /// Closes what other clients have prepared on the server connection, for who lists prepared statements. Returns whether
    /// there was anything to close.
    fn hide_others(&mut self, used: Option<u64>, link: &mut Link<'_>, out: &mut BytesMut) -> bool {
        if self.statements == Statements::PassThrough {
            return false;
        }
        let own: HashSet<u64> = self.named.values().map(|statement| statement.id).chain(used).collect();
        let others = link.prepared.take_unless(|id| own.contains(&id));
        for statement in &others {
            message::close(out, b'S', &statement.name);
            self.push_extended(Expect::InjectedClose(statement.id));
        }
        !others.is_empty()
    }

    /// The state of sequences is a session's: who asks for it keeps its server connection, and never sees another's; as soon
    /// as one has asked, so do all clients of the tenant that advance any. `query` is the text, if it is a Query's.
    fn note_sequences(&mut self, residue: &Residue, query: Option<&[u8]>, link: &mut Link<'_>, out: &mut BytesMut) {
        if self.pool_mode != PoolMode::Auto || !(residue.asks || residue.advances) {
            return;
        }
        if residue.asks {
            self.has_asked = true;
            link.registry.note_asks();
        }
        self.asked_last = residue.asks;
        self.asks |= link.registry.asks();
        self.residue.asks |= self.asks;
        let prepared = &mut *link.prepared;
        let before = prepared.sequences_of;
        let own = before == Some(self.stay());
        // In the transaction that has advanced it, it is about that.
        let others = if own { prepared.sequences_mixed && !self.advanced } else { before.is_some() };
        // An aborted transaction takes nothing but its end. What is not understood may ask.
        let forgets = (self.asks || residue.unknown) && self.status != b'E' && !query.is_some_and(needs_first_snapshot);
        if others && forgets {
            self.discard_sequences(query.is_some(), out);
        }
        self.advanced_again = own && (self.advanced_again || !self.advanced);
        self.advanced |= residue.advances;
        self.stay += u64::from(!own);
        prepared.sequences_of = Some(self.stay());
        prepared.sequences_mixed = !(others && forgets) && (prepared.sequences_mixed || others) && before.is_some();
    }

    /// Lets the session forget what another client has left. A Query would take the unnamed statement away.
    fn discard_sequences(&mut self, simple: bool, out: &mut BytesMut) {
        let text = "DISCARD SEQUENCES";
        if simple && !self.open_group {
            message::query(out, text);
            self.expects.push_back(Expect::InjectedQuery);
            return;
        }
        self.step(text, out);
    }

    fn parse(
        &mut self,
        header: Header,
        frame: &[u8],
        link: &mut Link<'_>,
        out: &mut BytesMut,
    ) -> Result<Verdict, PgError> {
        let (name, body) = cstr(&frame[HEADER..]).ok_or_else(|| malformed("Parse"))?;
        let text = until_nul(body);
        let whole = frame.len() == header.total;
        let residue = match self.cannot_pool(text).map_or_else(|| look(text, link.ward), Err) {
            Ok(residue) => residue,
            Err(error) => {
                if name.is_empty() {
                    (self.unnamed, link.prepared.unnamed) = (None, None);
                }
                return Ok(self.refuse_parse(name.is_empty(), error, out));
            }
        };
        let Statements::Shared(max) = self.statements else {
            // The unnamed one stays, too; where transactions share connections it stays for whoever turned tracking off.
            self.residue.unknown |= !name.is_empty() || self.pool_mode == PoolMode::Session;
            if !name.is_empty() {
                // Its text is not kept, and it may be run later.
                link.ward.remember(text, link.ward.lex());
            }
            self.note_residue(&residue, whole);
            self.push_extended(Expect::Parse(None));
            return Ok(Verdict::Forward);
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

    /// The statement that all share who prepare this; the client's own where nobody knows how literals are read.
    fn shared(&self, body: &[u8], residue: impl FnOnce() -> Residue, link: &Link<'_>) -> Arc<Statement> {
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

    /// The unnamed statement, with the server's process ids: it is usually bound at once.
    fn parse_addressed(
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
        if ward.looks() && see(text, ward).0.suspicious {
            return None;
        }
        self.addresses |= statement.residue.processes;
        self.named.insert(name.into(), statement);
        answers.extend_from_slice(&[b'1', 0, 0, 0, 4]);
        message::ready_for_query(answers, b'I');
        Some(header.total + HEADER)
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
    fn unnamed_before(&mut self) -> Option<Box<Unnamed>> {
        if self.expects.is_empty() { None } else { self.unnamed.take() }
    }

    fn unnamed_owner(&self) -> UnnamedOwner {
        UnnamedOwner { client: self.client, serial: self.unnamed_serial }
    }

    /// Notes a statement as prepared on the server, closes those least recently used if there are too many, and what has
    /// its name there.
    fn make_room(&mut self, statement: &Arc<Statement>, max: usize, link: &mut Link<'_>, out: &mut BytesMut) {
        let victims = link.prepared.add(statement.clone(), max);
        let squatter = link.prepared.put_right(statement.id).then(|| statement.clone());
        for closed in victims.into_iter().chain(squatter) {
            message::close(out, b'S', &closed.name);
            self.push_extended(Expect::InjectedClose(closed.id));
        }
    }

    fn bind(
        &mut self,
        header: Header,
        frame: &[u8],
        link: &mut Link<'_>,
        out: &mut BytesMut,
    ) -> Result<Verdict, PgError> {
        let Statements::Shared(max) = self.statements else {
            self.push_extended(Expect::Bind(None));
            return Ok(Verdict::Forward);
        };
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

    fn note_bound(&mut self, residue: &Residue, values: &[u8], whole: bool) {
        if residue.parameters.is_empty() {
            self.note_residue(residue, true);
        } else {
            self.note_residue(&residue.with_values(values), whole);
        }
    }

    /// What the unnamed statement leaves behind is left where it runs, and it may run others.
    fn bind_unnamed(&mut self, values: &[u8], whole: bool, max: usize, link: &mut Link<'_>, out: &mut BytesMut) {
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

    /// What the unnamed statement names may mean something else since its Parse.
    fn translate_unnamed(&mut self, link: &Link<'_>) {
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

    fn unknown(&mut self, out: &mut BytesMut) -> Verdict {
        let text = "unnamed prepared statement does not exist";
        self.refuse_parse(false, PgError::error(sqlstate::UNKNOWN_STATEMENT, text), out)
    }

    fn describe_or_close(
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

    fn function_call(&mut self, frame: &[u8], ward: &dyn Ward, out: &mut BytesMut) -> Verdict {
        let oid = frame.get(HEADER..HEADER + 4).and_then(|b| b.try_into().ok()).map(u32::from_be_bytes);
        self.open_group = false;
        if oid.is_some_and(|oid| LARGE_OBJECT_FUNCTIONS.contains(&oid)) {
            self.expects.push_back(Expect::Function);
            return Verdict::Forward;
        }
        ward.function_call_refused();
        let error = PgError::error(sqlstate::INSUFFICIENT_PRIVILEGE, "function calls by the fast path are refused")
            .detail("pgusher passes on FunctionCall messages for large objects only.")
            .hint("Call the function in a SELECT.");
        self.refuse_query(error, out)
    }

    /// The server's error with the client's name for a statement in the place of ours.
    fn rename_in_error(&self, frame: &[u8], out: &mut BytesMut) -> bool {
        let (ours, name) = match self.expects.front() {
            Some(Expect::Taken(taken)) => {
                (format!("\"pgusher_{}\"", taken.by.id), String::from_utf8_lossy(&taken.by.name).into_owned())
            }
            Some(Expect::Bind(Some(shared)) | Expect::Describe(Some(shared)) | Expect::InjectedDescribe(shared)) => {
                (format!("\"pgusher_{}\"", shared.id), String::from_utf8_lossy(&shared.name).into_owned())
            }
            Some(Expect::Query(Some(events)) | Expect::Execute(Some(events))) => {
                let mut shared = events.iter().filter_map(|e| Some((e.shared.as_ref()?.id, &e.name)));
                let text = String::from_utf8_lossy(frame);
                let unprepared = self.unprepared.as_ref().map(|unprepared| unprepared.0);
                let found =
                    shared.find(|(id, _)| unprepared == Some(*id) || text.contains(&format!("\"pgusher_{id}\"")));
                let Some((id, name)) = found else { return false };
                (format!("\"pgusher_{id}\""), String::from_utf8_lossy(name).into_owned())
            }
            _ => return false,
        };
        let mut error = server_error(&frame[HEADER..]);
        if let Some(reason) = self.reason_for(&error, &ours) {
            message::error_response(out, reason);
            return true;
        }
        if !error.message.contains(&ours) {
            return false;
        }
        error.message = error.message.replace(&ours, &format!("\"{name}\""));
        message::error_response(out, &error);
        true
    }

    /// Lets the server reject a Query in the place of what the client sent.
    fn refuse_query(&mut self, error: PgError, out: &mut BytesMut) -> Verdict {
        message::query(out, REJECTED);
        self.expects.push_back(Expect::RefusedQuery(Box::new(error)));
        Verdict::Instead
    }

    /// Lets the server reject a Parse in the place of what the client sent. One of the unnamed statement takes away what
    /// that was.
    fn refuse_parse(&mut self, unnamed: bool, error: PgError, out: &mut BytesMut) -> Verdict {
        message::parse(out, if unnamed { b"" } else { CHECK }, REJECTED.as_bytes(), &[0, 0]);
        self.push_extended(Expect::RefusedParse(Box::new(error)));
        Verdict::Instead
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

    /// How much of a server's frame has to be at hand for [`Session::on_server`].
    #[inline]
    pub fn needs_of_server(&self, header: Header, limit: usize) -> usize {
        match header.tag {
            b'T' if matches!(self.expects.front(), Some(Expect::Describe(Some(_)) | Expect::InjectedDescribe(_))) => {
                header.total.min(MAX_SAID)
            }
            b'Z' | b'C' => header.total.min(limit),
            // A value, or what the server says of it, may be as long as a statement.
            b'E' | b'S' => header.total.min(MAX_SAID),
            // Bounded by the server: 8,000 bytes and a name.
            b'A' => header.total.min(MAX_NOTIFICATION),
            _ => HEADER,
        }
    }

    /// Decides about a server's frame. Answers of ours that follow it are for the caller to fetch by
    /// [`Session::flush_ours`].
    ///
    /// # Errors
    /// The server is out of step: the connection must be closed.
    #[inline]
    pub fn on_server(
        &mut self,
        header: Header,
        frame: &[u8],
        prepared: &mut Prepared,
        out: &mut BytesMut,
    ) -> Result<Verdict, Desync> {
        match header.tag {
            b'N' => Ok(self.notice()),
            b'T' | b't' | b'n' => Ok(self.described(header, frame, prepared)),
            b'D' | b'd' | b'A' | b'S' | b'H' | b'c' | b'V' => Ok(Verdict::Forward),
            b'Z' => self.ready(frame),
            b'C' => Ok(self.complete(frame, prepared, out)),
            b'I' | b's' => {
                if matches!(self.expects.front(), Some(Expect::Execute(_))) {
                    self.take();
                }
                Ok(Verdict::Forward)
            }
            b'1' | b'2' | b'3' if matches!(self.expects.front(), Some(Expect::InjectedStep(tag)) if *tag == header.tag) =>
            {
                self.take();
                Ok(Verdict::Swallow)
            }
            b'1' => match self.take() {
                Some(Expect::Parse(None)) => Ok(Verdict::Forward),
                Some(Expect::Parse(Some(parsed)) | Expect::Checked(parsed)) => {
                    parsed.statement.accepted.fetch_or(parsed.in_scope, Ordering::Relaxed);
                    Ok(Verdict::Forward)
                }
                Some(Expect::ParseUnnamed(_)) => Ok(Verdict::Forward),
                Some(Expect::ParseBySql) => {
                    // It was gone. Now there is one under the client's own name, for nobody else to find.
                    self.untidy = true;
                    Ok(Verdict::Forward)
                }
                Some(Expect::Taken(taken)) => {
                    // The name became free in the same group of messages. What follows uses it as it is now on the server.
                    prepared.squat(taken.by.id);
                    self.named.insert(taken.by.name, taken.statement);
                    Ok(Verdict::Forward)
                }
                Some(Expect::Injected(_) | Expect::InjectedUnnamed | Expect::InjectedEmpty(_)) => Ok(Verdict::Swallow),
                _ => Err(Desync(b'1')),
            },
            b'2' => self.pop(|e| matches!(e, Expect::Bind(_)), b'2'),
            b'3' => match self.take() {
                Some(Expect::Close | Expect::CloseUnnamed(_)) => Ok(Verdict::Forward),
                Some(Expect::CloseBySql(_)) => Ok(Verdict::Forward),
                Some(Expect::InjectedClose(_)) => Ok(Verdict::Swallow),
                _ => Err(Desync(b'3')),
            },
            b'E' => Ok(self.error(frame, prepared, out)),
            // CopyBothResponse: a replication stream, which goes both ways.
            b'G' | b'W' => {
                self.begin_copy_in();
                Ok(Verdict::Forward)
            }
            tag => Err(Desync(tag)),
        }
    }

    /// What a server has to say of a text it says each time it is parsed, and not when we do that again.
    fn notice(&mut self) -> Verdict {
        match self.expects.front_mut() {
            Some(Expect::Injected(_) | Expect::InjectedUnnamed) => Verdict::Swallow,
            Some(Expect::Parse(Some(parsed)) | Expect::Checked(parsed)) => {
                parsed.in_scope = false;
                Verdict::Forward
            }
            _ => Verdict::Forward,
        }
    }

    fn pop(&mut self, expected: impl Fn(&Expect) -> bool, tag: u8) -> Result<Verdict, Desync> {
        match self.take() {
            Some(expect) if expected(&expect) => Ok(Verdict::Forward),
            _ => Err(Desync(tag)),
        }
    }

    fn ready(&mut self, frame: &[u8]) -> Result<Verdict, Desync> {
        let Some(&status @ (b'I' | b'T' | b'E')) = frame.get(HEADER) else { return Err(Desync(b'Z')) };
        self.status = status;
        if self.expects.len() <= 1 {
            self.renames = false;
            self.rescopes &= status != b'I';
            self.rereads &= status != b'I';
            self.advanced &= status != b'I';
            self.forgot_sequences = false;
        }
        (self.copy_in, self.copy_data, self.sync_in_copy, self.copy_began) = (false, false, false, false);
        match self.take() {
            Some(Expect::InjectedSync | Expect::InjectedQuery) => Ok(Verdict::Swallow),
            Some(expect) if ends_by_itself(&expect) => {
                self.unprepared = None;
                Ok(Verdict::Forward)
            }
            _ => Err(Desync(b'Z')),
        }
    }

    fn complete(&mut self, frame: &[u8], prepared: &mut Prepared, out: &mut BytesMut) -> Verdict {
        let tag = cstr(&frame[HEADER..]).map_or(&frame[HEADER..], |(tag, _)| tag);
        match self.expects.front_mut() {
            Some(Expect::InjectedQuery) => {
                self.note_stream_name(Ok(()));
                return Verdict::Swallow;
            }
            Some(Expect::InjectedStep(_)) => {
                self.take();
                return Verdict::Swallow;
            }
            Some(Expect::DropSlot) => {
                message::command_complete(out, "DROP_REPLICATION_SLOT");
                return Verdict::Instead;
            }
            Some(Expect::Query(Some(events)) | Expect::Execute(Some(events))) if is_about_names(tag) => {
                // What EXECUTE has run says its own name.
                while let Some(event) = events.pop_front() {
                    if event.verb != Verb::Execute {
                        self.carry_out(event, prepared);
                        break;
                    }
                }
            }
            _ => {}
        }
        self.altered |=
            tag.starts_with(b"ALTER ") || tag.starts_with(b"DROP ") || matches!(tag, b"CREATE VIEW" | b"DO");
        match tag {
            b"DISCARD ALL" | b"DEALLOCATE ALL" => self.forget_all(prepared),
            _ => {}
        }
        // What comes behind it in the same pipeline counts again.
        let last = !self.expects.iter().skip(1).any(|e| matches!(e, Expect::Query(_) | Expect::Execute(_)));
        let discarded = matches!(tag, b"DISCARD ALL" | b"DISCARD SEQUENCES") && last;
        if discarded && prepared.sequences_of == Some(self.stay()) {
            (prepared.sequences_of, prepared.sequences_mixed) = (None, false);
            self.forgot_sequences = matches!(self.expects.front(), Some(Expect::Query(_)));
            self.residue.asks |= self.asks;
        } else {
            self.may_advance(prepared);
        }
        if matches!(self.expects.front(), Some(Expect::Execute(_))) {
            self.take();
        }
        Verdict::Forward
    }

    /// A statement of ours that the server no longer runs, or does not have.
    fn note_unusable(&self, error: &PgError, prepared: &mut Prepared) {
        let Some(
            Expect::Bind(Some(Shared { id, .. }))
            | Expect::Describe(Some(Shared { id, .. }))
            | Expect::InjectedDescribe(Shared { id, .. }),
        ) = self.expects.front()
        else {
            return;
        };
        if error.code == sqlstate::FEATURE_NOT_SUPPORTED {
            // "cached plan must not change result type": a table has changed under it. On a server the client would
            // prepare again under another name; that must not bring it back to this one.
            prepared.outdate(*id);
        }
        if error.code == sqlstate::UNKNOWN_STATEMENT && error.message.contains(&format!("\"pgusher_{id}\"")) {
            // A function has taken it away (`EXECUTE 'DEALLOCATE ALL'`).
            prepared.remove(*id);
        }
    }

    /// What comes behind a DISCARD in the same Query counts again.
    #[inline]
    fn may_advance(&mut self, prepared: &mut Prepared) {
        if std::mem::take(&mut self.forgot_sequences) {
            prepared.sequences_of = Some(self.stay());
        }
    }

    /// Nothing is prepared any more.
    fn forget_all(&mut self, prepared: &mut Prepared) {
        self.named = Named::default();
        self.by_sql.clear();
        prepared.clear();
    }

    /// A statement about a name has been carried out.
    fn carry_out(&mut self, event: Event, prepared: &mut Prepared) {
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

    /// An error: the server skips to the next Sync, unless it is in a simple Query, which ends by itself.
    fn error(&mut self, frame: &[u8], prepared: &mut Prepared, out: &mut BytesMut) -> Verdict {
        // The SET may be what failed: then the setting was not made, could perhaps not be made elsewhere either, and only
        // the server can tell which of them were.
        self.residue.unknown |= !self.residue.settings.is_empty();
        self.copy_in = false;
        self.in_doubt |= self.copy_began && self.sync_in_copy;
        self.may_advance(prepared);
        let error = server_error(&frame[HEADER..]);
        self.note_unusable(&error, prepared);
        let verdict = match self.expects.front() {
            Some(Expect::RefusedQuery(ours) | Expect::RefusedParse(ours)) => {
                message::error_response(out, ours);
                Verdict::Instead
            }
            // Its farewell is for the client.
            _ if error.severity == Severity::Fatal => Verdict::Forward,
            // What the client said comes behind it, and fails by itself.
            Some(Expect::InjectedQuery) => {
                self.note_stream_name(Err(error));
                Verdict::Swallow
            }
            Some(front) if is_step_of_ours(front) && self.is_in_group_of_ours() => {
                self.note_unprepared(error);
                Verdict::Swallow
            }
            _ if self.rename_in_error(frame, out) || explain_denied_lock(frame, out) => Verdict::Instead,
            _ => Verdict::Forward,
        };
        if self.expects.front().is_none_or(ends_by_itself) {
            // With nothing outstanding it can only be the server's farewell.
            self.failed |= self.expects.is_empty() && self.open_group;
            return verdict;
        }
        let mut skipped = Vec::new();
        while !matches!(self.expects.front(), None | Some(Expect::Sync | Expect::InjectedSync)) {
            skipped.extend(self.take());
        }
        if let Some(Expect::ParseUnnamed(failed)) = skipped.first_mut() {
            // Not skipped: a Parse that fails takes away what there was.
            failed.before = None;
        }
        self.failed |= self.expects.is_empty();
        // What was noted last goes first: a name may have been given and taken away.
        for skipped in skipped.into_iter().rev() {
            self.undo(skipped, prepared);
        }
        verdict
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

    /// Whether the unnamed statement is what it is only if this is carried out.
    fn makes_unnamed(&self, expect: &Expect) -> bool {
        match expect {
            Expect::ParseUnnamed(turn) | Expect::CloseUnnamed(turn) => turn.serial == self.unnamed_serial,
            Expect::InjectedUnnamed => true,
            _ => false,
        }
    }

    /// Whether what is answered now belongs to a group of messages of ours, up to a Sync of ours.
    fn is_in_group_of_ours(&self) -> bool {
        matches!(self.expects.iter().find(|e| !is_step_of_ours(e)), Some(Expect::InjectedSync))
    }

    /// Takes back what was noted when a message was sent that the server has not carried out.
    fn undo(&mut self, skipped: Expect, prepared: &mut Prepared) {
        match skipped {
            Expect::Parse(Some(undo)) => {
                prepared.remove(undo.statement.id);
                self.named.remove(&undo.name[..]);
            }
            Expect::ParseUnnamed(turn) | Expect::CloseUnnamed(turn) => self.undo_unnamed(turn, prepared),
            Expect::InjectedUnnamed => prepared.unnamed = prepared.unnamed.filter(|o| *o != self.unnamed_owner()),
            Expect::Injected(id) => prepared.remove(id),
            Expect::InjectedEmpty(id) => drop(prepared.put_right(id)),
            Expect::CloseBySql(name) => drop(self.by_sql.insert(name)),
            Expect::Checked(undo) => drop(self.named.remove(&undo.name[..])),
            Expect::OurParse(name) => {
                self.named.remove(&name[..]);
            }
            Expect::OurClose(Some(closed)) => {
                self.named.insert(closed.0, closed.1);
            }
            // The server still has it, under a name that is to be closed before it is used again.
            Expect::InjectedClose(id) => prepared.squat(id),
            _ => {}
        }
    }

    /// The unnamed statement is what it was, unless something behind it has changed it again.
    fn undo_unnamed(&mut self, turn: Turn, prepared: &mut Prepared) {
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

    /// The server reads nothing but COPY messages now: a Sync that is already on its way is ignored there.
    fn begin_copy_in(&mut self) {
        let end = self.expects.iter().position(|e| matches!(e, Expect::CopyEnd));
        (self.copy_in, self.copy_began) = (end.is_none(), true);
        let upto = end.unwrap_or(self.expects.len());
        let mut at = 0;
        self.expects.retain(|expect| {
            let ignored = (at < upto && matches!(expect, Expect::Sync)) || Some(at) == end;
            at += 1;
            !ignored
        });
    }
}

/// Whether it is a message of ours, for what the client says behind it.
fn is_step_of_ours(expect: &Expect) -> bool {
    matches!(
        expect,
        Expect::Injected(_) | Expect::InjectedClose(_) | Expect::InjectedStep(_) | Expect::InjectedEmpty(_)
    )
}

/// Whether ReadyForQuery answers it, and an error in it skips nothing that comes behind.
fn ends_by_itself(expect: &Expect) -> bool {
    use Expect::{DropSlot, Function, InjectedQuery, InjectedSync, Query, RefusedQuery, Stream, Sync};
    matches!(expect, Query(_) | Sync | Function | RefusedQuery(_) | InjectedSync | InjectedQuery | Stream | DropSlot)
}

/// Whether names of prepared statements mean something else when this is done.
fn renames(events: &Events) -> bool {
    events.iter().flat_map(|events| events.iter()).any(|event| event.verb != Verb::Execute)
}

fn is_renaming(expect: &Expect) -> bool {
    matches!(expect, Expect::Query(events) | Expect::Execute(events) if renames(events))
}

/// Whether a text may say of its transaction what has to be said before anything else is done in it, also by us.
fn needs_first_snapshot(text: &[u8]) -> bool {
    let contains = |word: &&str| text.windows(word.len()).any(|found| found.eq_ignore_ascii_case(word.as_bytes()));
    ["isolation", "snapshot", "deferrable", "read write"].iter().any(contains)
}

/// The text with our names for the client's, if it has any.
fn translate(text: &[u8], uses: &[Use], events: &Events) -> Option<Vec<u8>> {
    let events = events.as_ref()?;
    events.iter().any(|event| event.shared.is_some()).then(|| {
        let ours = events.iter().map(|event| event.shared.as_ref().map(|statement| &*statement.name));
        names::rename(text, uses, ours)
    })
}

/// Whether a message uses the unnamed statement. What cannot be told yet may.
fn uses_unnamed(header: Header, frame: &[u8]) -> bool {
    let unnamed = |name: &[u8]| name.first().is_none_or(|first| *first == 0);
    match header.tag {
        b'B' => cstr(frame.get(HEADER..).unwrap_or_default()).is_none_or(|(_, rest)| unnamed(rest)),
        b'D' => {
            frame.get(HEADER).is_none_or(|what| *what == b'S') && unnamed(frame.get(HEADER + 1..).unwrap_or_default())
        }
        _ => false,
    }
}

/// Whether a statement with this tag has to do with a name of a prepared statement.
fn is_about_names(tag: &[u8]) -> bool {
    matches!(tag, b"PREPARE" | b"DEALLOCATE" | b"DEALLOCATE ALL" | b"DISCARD ALL")
}

enum Resolved {
    /// The name means the same to the server.
    AsNamed,
    /// Under a name of ours, and the client's; what it does to names when it is executed.
    Shared(Arc<Statement>, Arc<[u8]>, Events),
    /// The unnamed statement was parsed again; the output holds its Parse.
    Injected,
}

/// The server sent what it does not owe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("unexpected message {:?} from the server", char::from(*.0))]
pub struct Desync(pub u8);

/// Advisory locks have a key space per tenant, by functions in the place of PostgreSQL's: under a `search_path` of the
/// client's own these are not found, and PostgreSQL's may not be called.
fn explain_denied_lock(frame: &[u8], out: &mut BytesMut) -> bool {
    let error = server_error(frame.get(HEADER..).unwrap_or_default());
    let denied = error.code == sqlstate::INSUFFICIENT_PRIVILEGE && error.hint.is_none();
    if !denied
        || !error.message.starts_with("permission denied for function pg_")
        || !error.message.contains("advisory")
    {
        return false;
    }
    let hint = "End your search_path with \"tenant_shim, pg_catalog\", or call tenant_shim's function of that name.";
    message::error_response(out, &error.hint(hint));
    true
}

fn too_many_names(max: usize) -> PgError {
    PgError::error(sqlstate::LIMIT_EXCEEDED, "too many prepared statements (max_client_prepared_memory)")
        .detail(format!("What this connection has prepared by name may take {max} bytes of the proxy's memory."))
        .hint("Close statements that are not used any more (DEALLOCATE ALL), or raise max_client_prepared_memory.")
}

/// What a logical stream's client tells the walsender: how far it has come.
/// <https://www.postgresql.org/docs/current/protocol-replication.html>
const STATUS_UPDATE: u8 = b'r';

fn no_feedback() -> PgError {
    PgError::fatal(sqlstate::INSUFFICIENT_PRIVILEGE, "permission denied: feedback other than a status update")
        .detail("Hot standby feedback keeps the server from cleaning up in the databases of all tenants.")
        .hint("A client of a logical stream sends standby status updates only.")
}

fn malformed(kind: &str) -> PgError {
    PgError::fatal(sqlstate::PROTOCOL_VIOLATION, format!("invalid {kind} message"))
}

#[cfg(test)]
mod tests;
