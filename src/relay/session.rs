//! What client and server have said and still owe each other. No I/O.
//!
//! Every frame passes through [`Session::on_client`] or [`Session::on_server`], which decide what becomes of it. From
//! the same bookkeeping follows when a server connection may go back ([`Session::is_idle`]): the last ReadyForQuery
//! said `I`, no reply is outstanding, no COPY is in progress, no message since the last Sync.
//!
//! Refusals: a message that the client may not send is replaced by one that the server is bound to reject, and the
//! server's error by ours. So a transaction fails, a pipeline is skipped and an implicit transaction is rolled back
//! just as if the server itself had refused.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::{BufMut as _, BytesMut};

use super::lex::Lex;
use super::{scan, track};
use crate::config::PoolMode;
use crate::error::{PgError, sqlstate};
use crate::pool::connect::server_error;
use crate::pool::recent::Recent;
use crate::pool::residue::Residue;
use crate::pool::statements::{Prepared, Registry, Statement, UnnamedOwner};
use crate::wire::frame::{self, HEADER, Header, cstr};
use crate::wire::message;

type HashMap<K, V> = std::collections::HashMap<K, V, ahash::RandomState>;

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
    /// A FunctionCall was refused.
    fn function_call_refused(&self);
}

fn see(text: &[u8], ward: &dyn Ward) -> (scan::Seen, Lex) {
    let lex = if Lex::is_irrelevant_to(text) { Lex::default() } else { ward.lex() };
    (scan::look(&lex.narrow(text), lex, |name| ward.may_be_tenant(name)), lex)
}

/// Looks at a text: whether running it may leave something behind in the session, unless it is refused.
fn look(text: &[u8], ward: &dyn Ward) -> Result<Residue, PgError> {
    let residue = |leaves_state: bool| {
        let mut residue = if leaves_state { track::look(text) } else { Residue::none() };
        residue.listens = residue.unknown && scan::may_listen(text);
        residue
    };
    if !ward.looks() {
        let seen = scan::look(text, Lex::default(), |_| false);
        if seen.suspicious {
            ward.remember(text, ward.lex());
        }
        return Ok(residue(seen.leaves_state));
    }
    let (seen, lex) = see(text, ward);
    match seen.suspicious.then(|| ward.judge(text, lex)).flatten() {
        Some(error) => Err(error),
        None => Ok(residue(seen.leaves_state)),
    }
}

/// One message that the server has yet to answer, or an answer that we owe.
#[derive(Debug)]
enum Expect {
    Query,
    Sync,
    Function,
    /// A Parse of the client; what its name meant before, should it fail.
    Parse(Option<Box<ParseUndo>>),
    /// With the number of the shared statement, or [`NO_STATEMENT`].
    Bind(u64),
    Describe(u64),
    Execute,
    Close,
    /// A Parse of ours: its answer is for nobody.
    Injected(u64),
    InjectedUnnamed,
    InjectedClose,
    /// CopyDone or CopyFail, sent before we knew that the server was in COPY.
    CopyEnd,
    /// ParseComplete, which we give ourselves when its turn comes; the name it was for.
    OurParse(Box<[u8]>),
    /// CloseComplete, which we give ourselves when its turn comes; what was closed, should it be skipped.
    OurClose(Option<Box<Closed>>),
    /// Bound to fail; the client gets this instead of the server's error. A Query, or a Parse.
    RefusedQuery(Box<PgError>),
    RefusedParse(Box<PgError>),
}

/// Whether it is answered by a ReadyForQuery.
fn ends_by_ready(expect: &Expect) -> bool {
    matches!(expect, Expect::Query | Expect::Sync | Expect::Function | Expect::RefusedQuery(_))
}

/// A closed statement's name and what it meant.
type Closed = (Box<[u8]>, Arc<Statement>);

/// Not a statement's number.
const NO_STATEMENT: u64 = u64::MAX;

#[derive(Debug)]
struct ParseUndo {
    name: Box<[u8]>,
    /// The statement that was noted as prepared on the server connection.
    statement: Arc<Statement>,
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
    residue: Residue,
    queries: u32,
    named: HashMap<Box<[u8]>, Arc<Statement>>,
    unnamed: Option<Vec<u8>>,
    /// What it leaves behind when it runs, which may be in a later group than its Parse; `None` for nothing.
    unnamed_residue: Option<Box<Residue>>,
    unnamed_serial: u64,
}

/// Text that no PostgreSQL parses.
const REJECTED: &str = "refused by pgusher:";

/// FunctionCall is refused but for large objects: OIDs of lo_open, lo_close, loread, lowrite, lo_lseek(64), lo_creat,
/// lo_create, lo_tell(64), lo_unlink, lo_truncate(64), which libpq's lo_* functions call.
const LARGE_OBJECT_FUNCTIONS: [u32; 13] = [715, 952, 953, 954, 955, 956, 957, 958, 964, 1004, 3170, 3171, 3172];

/// Longer than any notification (bytes).
const MAX_NOTIFICATION: usize = 16 << 10;

/// Longest unnamed statement (bytes) that is remembered from one Sync to the next.
const MAX_UNNAMED: usize = 64 << 10;

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
            residue: Residue::none(),
            queries: 0,
            named: HashMap::default(),
            unnamed: None,
            unnamed_residue: None,
            unnamed_serial: 0,
        }
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
            matches!(e, Query | Function | RefusedQuery(_) | Parse(_) | OurParse(_) | RefusedParse(_) | Bind(_))
        };
        let owed = self.expects.iter().filter(|e| says(e)).count();
        // Execute, Describe and Sync belong to what came before them.
        owed + usize::from(!self.expects.front().is_some_and(says))
    }

    /// The text of a prepared statement, if it is known.
    pub fn text_of(&self, name: &[u8]) -> Option<&[u8]> {
        let body = match name {
            b"" => self.unnamed.as_deref()?,
            name => &self.named.get(name)?.body,
        };
        body.split(|&b| b == 0).next()
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

    /// Whether the server owes a ReadyForQuery.
    pub fn owes_ready(&self) -> bool {
        self.expects.iter().any(ends_by_ready)
    }

    /// Notes what a text leaves behind when it runs. What was not seen whole cannot be vouched for.
    #[inline]
    fn note_residue(&mut self, residue: &Residue, whole: bool) {
        self.residue.unknown |= !whole;
        if !residue.is_none() {
            self.residue.merge(residue);
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
            b'P' if self.statements == Statements::PassThrough => Ok(header.total.min(limit)),
            b'P' => match have.get(HEADER) {
                None => Ok(header.total.min(HEADER + 1)),
                Some(0) => Ok(header.total.min(limit)),
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
                self.push_extended(Expect::Execute);
                Ok(Verdict::Forward)
            }
            b'S' => {
                (self.failed, self.open_group) = (false, false);
                self.sync_in_copy |= self.copy_data;
                if !self.copy_in {
                    self.expects.push_back(Expect::Sync);
                }
                Ok(Verdict::Forward)
            }
            b'H' => Ok(Verdict::Forward),
            b'd' => {
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
        self.open_group = true;
        self.expects.push_back(expect);
    }

    fn query(&mut self, header: Header, frame: &[u8], link: &mut Link<'_>, out: &mut BytesMut) -> Verdict {
        let text = frame[HEADER..].split(|&b| b == 0).next().unwrap_or_default();
        let residue = match self.cannot_pool(text).map_or_else(|| look(text, link.ward), Err) {
            Ok(residue) => residue,
            Err(error) => {
                (self.unnamed, link.prepared.unnamed, self.open_group) = (None, None, false);
                return self.refuse_query(error, out);
            }
        };
        self.note_residue(&residue, frame.len() == header.total);
        // A simple Query of any kind drops the unnamed statement.
        self.unnamed = None;
        link.prepared.unnamed = None;
        self.queries += 1;
        self.open_group = false;
        self.expects.push_back(Expect::Query);
        Verdict::Forward
    }

    fn parse(
        &mut self,
        header: Header,
        frame: &[u8],
        link: &mut Link<'_>,
        out: &mut BytesMut,
    ) -> Result<Verdict, PgError> {
        let (name, body) = cstr(&frame[HEADER..]).ok_or_else(|| malformed("Parse"))?;
        let text = body.split(|&b| b == 0).next().unwrap_or_default();
        let whole = frame.len() == header.total;
        let residue = match self.cannot_pool(text).map_or_else(|| look(text, link.ward), Err) {
            Ok(residue) => residue,
            Err(error) => {
                link.prepared.unnamed = None;
                return Ok(self.refuse_parse(error, out));
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
        if name.is_empty() {
            self.note_residue(&residue, whole);
            let residue = if whole { residue } else { Residue::anything() };
            self.unnamed_residue = (!residue.is_none()).then(|| Box::new(residue));
            self.remember_unnamed(if whole { Some(body) } else { None });
            link.prepared.unnamed = Some(self.unnamed_owner());
            self.push_extended(Expect::Parse(None));
            return Ok(Verdict::Forward);
        }
        if self.named.contains_key(name) {
            let shown = String::from_utf8_lossy(name);
            let error = format!("prepared statement \"{shown}\" already exists");
            return Ok(self.refuse_parse(PgError::error(sqlstate::DUPLICATE_STATEMENT, error), out));
        }
        let statement = link.registry.intern(body, || residue);
        self.named.insert(name.into(), statement.clone());
        if link.prepared.touch(statement.id) {
            // Nothing to wait for, but the answer keeps its place in line behind what the server still owes.
            self.push_extended(Expect::OurParse(name.into()));
            return Ok(Verdict::Swallow);
        }
        self.make_room(&statement, max, link, out);
        message::parse_with(out, &statement.name, &statement.body);
        let undo = ParseUndo { name: name.into(), statement };
        self.push_extended(Expect::Parse(Some(Box::new(undo))));
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
        if name.is_empty() || self.named.contains_key(name) {
            return None;
        }
        let statement = registry.accepted(body)?;
        // It may have been accepted when nobody looked.
        let text = body.split(|&b| b == 0).next().unwrap_or_default();
        if ward.looks() && see(text, ward).0.suspicious {
            return None;
        }
        self.named.insert(name.into(), statement);
        answers.extend_from_slice(&[b'1', 0, 0, 0, 4]);
        message::ready_for_query(answers, b'I');
        Some(header.total + HEADER)
    }

    fn remember_unnamed(&mut self, body: Option<&[u8]>) {
        self.unnamed_serial += 1;
        let body = body.filter(|body| body.len() <= MAX_UNNAMED);
        match (&mut self.unnamed, body) {
            (Some(kept), Some(body)) => {
                kept.clear();
                kept.extend_from_slice(body);
            }
            (kept, body) => *kept = Some(body.unwrap_or_default().to_vec()),
        }
    }

    fn unnamed_owner(&self) -> UnnamedOwner {
        UnnamedOwner { client: self.client, serial: self.unnamed_serial }
    }

    /// Notes a statement as prepared on the server, and closes the least recently used one if there are too many.
    fn make_room(&mut self, statement: &Arc<Statement>, max: usize, link: &mut Link<'_>, out: &mut BytesMut) {
        if let Some(victim) = link.prepared.add(statement.clone(), max) {
            message::close(out, b'S', &victim.name);
            self.push_extended(Expect::InjectedClose);
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
            self.push_extended(Expect::Bind(NO_STATEMENT));
            return Ok(Verdict::Forward);
        };
        let (portal, rest) = cstr(&frame[HEADER..]).ok_or_else(|| malformed("Bind"))?;
        let (name, values) = cstr(rest).ok_or_else(|| malformed("Bind"))?;
        let Some(statement) = self.resolve(name, max, link, out) else {
            return Ok(self.unknown(name, out));
        };
        let mut shared = NO_STATEMENT;
        let verdict = match statement {
            Resolved::AsNamed => Verdict::Forward,
            Resolved::Shared(statement) => {
                shared = statement.id;
                if !statement.residue.is_none() {
                    self.residue.merge(&statement.residue);
                }
                out.put_u8(b'B');
                let length = header.total - 1 - name.len() + statement.name.len();
                // Fits: the client's own length did, and our names are short.
                out.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
                out.extend_from_slice(portal);
                out.put_u8(0);
                out.extend_from_slice(&statement.name);
                out.put_u8(0);
                out.extend_from_slice(values);
                Verdict::Replace
            }
            Resolved::Injected => {
                out.extend_from_slice(frame);
                Verdict::Replace
            }
        };
        self.push_extended(Expect::Bind(shared));
        Ok(verdict)
    }

    /// Makes sure that the server connection has the statement that the client means.
    fn resolve(&mut self, name: &[u8], max: usize, link: &mut Link<'_>, out: &mut BytesMut) -> Option<Resolved> {
        if name.is_empty() {
            let body = self.unnamed.as_deref()?;
            let owner = UnnamedOwner { client: self.client, serial: self.unnamed_serial };
            if let Some(residue) = self.unnamed_residue.as_deref() {
                self.residue.merge(residue);
            }
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
        let statement = self.named.get(name)?.clone();
        if !link.prepared.touch(statement.id) {
            self.make_room(&statement, max, link, out);
            message::parse_with(out, &statement.name, &statement.body);
            self.push_extended(Expect::Injected(statement.id));
        }
        Some(Resolved::Shared(statement))
    }

    fn unknown(&mut self, name: &[u8], out: &mut BytesMut) -> Verdict {
        let text = if name.is_empty() {
            "unnamed prepared statement does not exist".to_owned()
        } else {
            format!("prepared statement \"{}\" does not exist", String::from_utf8_lossy(name))
        };
        self.refuse_parse(PgError::error(sqlstate::UNKNOWN_STATEMENT, text), out)
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
        let expect = if header.tag == b'D' { Expect::Describe(NO_STATEMENT) } else { Expect::Close };
        let Statements::Shared(max) = self.statements else {
            self.push_extended(expect);
            return Ok(Verdict::Forward);
        };
        if what != b'S' {
            self.push_extended(expect);
            return Ok(Verdict::Forward);
        }
        if header.tag == b'C' && !name.is_empty() {
            // Closing what does not exist is no error.
            let closed = self.named.remove_entry(name).map(Box::new);
            self.push_extended(Expect::OurClose(closed));
            return Ok(Verdict::Swallow);
        }
        if header.tag == b'C' {
            self.unnamed = None;
            link.prepared.unnamed = None;
            self.push_extended(expect);
            return Ok(Verdict::Forward);
        }
        let Some(resolved) = self.resolve(name, max, link, out) else { return Ok(self.unknown(name, out)) };
        let mut shared = NO_STATEMENT;
        let verdict = match resolved {
            Resolved::AsNamed => Verdict::Forward,
            Resolved::Injected => {
                out.extend_from_slice(frame);
                Verdict::Replace
            }
            Resolved::Shared(statement) => {
                shared = statement.id;
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

    /// Lets the server reject a Query in the place of what the client sent.
    fn refuse_query(&mut self, error: PgError, out: &mut BytesMut) -> Verdict {
        message::query(out, REJECTED);
        self.expects.push_back(Expect::RefusedQuery(Box::new(error)));
        Verdict::Instead
    }

    /// Lets the server reject a Parse in the place of what the client sent.
    fn refuse_parse(&mut self, error: PgError, out: &mut BytesMut) -> Verdict {
        message::parse(out, b"", REJECTED.as_bytes(), &[0, 0]);
        self.unnamed = None;
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
    pub fn needs_of_server(header: Header, limit: usize) -> usize {
        match header.tag {
            b'Z' | b'C' | b'E' | b'S' => header.total.min(limit),
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
            b'D' | b'd' | b'T' | b't' | b'n' | b'N' | b'A' | b'S' | b'H' | b'c' | b'V' => {
                if matches!(header.tag, b'T' | b'n') && matches!(self.expects.front(), Some(Expect::Describe(_))) {
                    self.take();
                }
                Ok(Verdict::Forward)
            }
            b'Z' => self.ready(frame),
            b'C' => {
                self.complete(frame, prepared);
                Ok(Verdict::Forward)
            }
            b'I' | b's' => {
                if matches!(self.expects.front(), Some(Expect::Execute)) {
                    self.take();
                }
                Ok(Verdict::Forward)
            }
            b'1' => match self.take() {
                Some(Expect::Parse(parsed)) => {
                    if let Some(parsed) = parsed {
                        parsed.statement.accepted.store(true, Ordering::Relaxed);
                    }
                    Ok(Verdict::Forward)
                }
                Some(Expect::Injected(_) | Expect::InjectedUnnamed) => Ok(Verdict::Swallow),
                _ => Err(Desync(b'1')),
            },
            b'2' => self.pop(|e| matches!(e, Expect::Bind(_)), b'2'),
            b'3' => match self.take() {
                Some(Expect::Close) => Ok(Verdict::Forward),
                Some(Expect::InjectedClose) => Ok(Verdict::Swallow),
                _ => Err(Desync(b'3')),
            },
            b'E' => Ok(self.error(frame, prepared, out)),
            b'G' => {
                self.begin_copy_in();
                Ok(Verdict::Forward)
            }
            tag => Err(Desync(tag)),
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
        (self.copy_in, self.copy_data, self.sync_in_copy) = (false, false, false);
        self.pop(ends_by_ready, b'Z')
    }

    fn complete(&mut self, frame: &[u8], prepared: &mut Prepared) {
        let tag = cstr(&frame[HEADER..]).map_or(&frame[HEADER..], |(tag, _)| tag);
        if matches!(tag, b"DISCARD ALL" | b"DEALLOCATE ALL") {
            self.named.clear();
            prepared.clear();
        }
        if matches!(self.expects.front(), Some(Expect::Execute)) {
            self.take();
        }
    }

    /// An error: the server skips to the next Sync, unless it is in a simple Query, which ends by itself.
    fn error(&mut self, frame: &[u8], prepared: &mut Prepared, out: &mut BytesMut) -> Verdict {
        // The SET may be what failed: then the setting was not made, could perhaps not be made elsewhere either, and only
        // the server can tell which of them were.
        self.residue.unknown |= !self.residue.settings.is_empty();
        self.copy_in = false;
        if let Some(&Expect::Bind(id) | &Expect::Describe(id)) = self.expects.front()
            && id != NO_STATEMENT
            && server_error(&frame[HEADER..]).code == sqlstate::FEATURE_NOT_SUPPORTED
        {
            // "cached plan must not change result type": a table has changed under it. On a server the client would
            // prepare again under another name; that must not bring it back to this one.
            prepared.outdate(id);
        }
        let verdict = match self.expects.front() {
            Some(Expect::RefusedQuery(error) | Expect::RefusedParse(error)) => {
                message::error_response(out, error);
                Verdict::Instead
            }
            _ => Verdict::Forward,
        };
        if self.expects.front().is_none_or(ends_by_ready) {
            // With nothing outstanding it can only be the server's farewell.
            self.failed |= self.expects.is_empty() && self.open_group;
            return verdict;
        }
        loop {
            match self.expects.front() {
                Some(Expect::Sync) => return verdict,
                None => break,
                Some(_) => {}
            }
            if let Some(skipped) = self.take() {
                self.undo(skipped, prepared);
            }
        }
        self.failed = true;
        verdict
    }

    /// Takes back what was noted when a message was sent that the server has not carried out.
    fn undo(&mut self, skipped: Expect, prepared: &mut Prepared) {
        match skipped {
            Expect::Parse(Some(undo)) => {
                prepared.remove(undo.statement.id);
                self.named.remove(&undo.name);
            }
            Expect::Parse(None) | Expect::InjectedUnnamed | Expect::RefusedParse(_) => {
                prepared.unnamed = None;
                self.unnamed = None;
            }
            Expect::Injected(id) => prepared.remove(id),
            Expect::OurParse(name) => {
                self.named.remove(&name);
            }
            Expect::OurClose(Some(closed)) => {
                self.named.insert(closed.0, closed.1);
            }
            // The server still has it under a name that we consider free: a reset makes it so.
            Expect::InjectedClose => self.residue.unknown = true,
            _ => {}
        }
    }

    /// The server reads nothing but COPY messages now: a Sync that is already on its way is ignored there.
    fn begin_copy_in(&mut self) {
        let end = self.expects.iter().position(|e| matches!(e, Expect::CopyEnd));
        self.copy_in = end.is_none();
        let upto = end.unwrap_or(self.expects.len());
        let mut at = 0;
        self.expects.retain(|expect| {
            let ignored = (at < upto && matches!(expect, Expect::Sync)) || Some(at) == end;
            at += 1;
            !ignored
        });
    }
}

enum Resolved {
    /// The name means the same to the server.
    AsNamed,
    /// Under a name of ours.
    Shared(Arc<Statement>),
    /// The unnamed statement was parsed again; the output holds its Parse.
    Injected,
}

/// The server sent what it does not owe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("unexpected message {:?} from the server", char::from(*.0))]
pub struct Desync(pub u8);

fn malformed(kind: &str) -> PgError {
    PgError::fatal(sqlstate::PROTOCOL_VIOLATION, format!("invalid {kind} message"))
}

#[cfg(test)]
mod tests;
