//! A client and a server say anything at all, in pieces, and the relay's flows and its session pass it on.
//!
//! Input: mode, statements per connection, size of the buffers, seed of the cuts (2 bytes), length of what the client
//! says (2 bytes), what it says, what the server says.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use bytes::BytesMut;
use pgusher::config::PoolMode;
use pgusher::error::{PgError, sqlstate};
use pgusher::pool::statements::{Prepared, Registry};
use pgusher::relay::flow::Flow;
use pgusher::relay::lex::Lex;
use pgusher::relay::scan;
use pgusher::relay::session::{Link, Session, Verdict, Ward};
use pgusher::stream::{Buffers, Socket, Stream};
use pgusher::wire::frame::{self, HEADER};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::Input;

/// Longest message that is taken in whole.
const MAX: usize = 4096;

/// See the module.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let mode = [PoolMode::Auto, PoolMode::Transaction, PoolMode::Session][usize::from(input.byte()) % 3];
    let statements = usize::from(input.byte() % 4);
    let size = [64, 256, 1 << 16][usize::from(input.byte()) % 3];
    let seed = input.word();
    let length = input.word();
    let (client, server) = (input.take(length), input.0);
    let cut = Relay::new(mode, statements, size, client, server, seed | 1).run();
    // The cuts change nothing that anybody gets, as long as everything fits and is said in the same order.
    if size > client.len().max(server.len()) {
        let whole = Relay::new(mode, statements, size, client, server, 0).replay(&cut.order);
        assert!(cut.to_server.starts_with(&whole.to_server) || whole.to_server.starts_with(&cut.to_server));
        assert!(cut.to_client.starts_with(&whole.to_client) || whole.to_client.starts_with(&cut.to_client));
    }
}

/// Refuses one statement, so that refusals are among the verdicts.
struct Guard;

impl Ward for Guard {
    fn looks(&self) -> bool {
        true
    }

    fn lex(&self) -> Lex {
        Lex::default()
    }

    fn look(&self, text: &[u8], lex: Lex, _: bool) -> scan::Seen {
        scan::look(&lex.narrow(text), lex, |_| false)
    }

    fn judge(&self, text: &[u8], _: Lex) -> Option<PgError> {
        text.starts_with(b"SET ROLE").then(|| PgError::error(sqlstate::INSUFFICIENT_PRIVILEGE, "no"))
    }

    fn function_call_refused(&self) {}

    fn replication_refused(&self, _: &str) {}

    fn remember(&self, _: &[u8], _: Lex) {}
}

/// One end of a connection: what is still to arrive, and what was sent.
#[derive(Debug, Default)]
struct Wire {
    arrives: Vec<u8>,
    sent: Vec<u8>,
    /// How much the next write takes.
    room: usize,
}

#[derive(Debug, Clone, Default)]
struct End(Arc<Mutex<Wire>>);

impl End {
    fn with<T>(&self, with: impl FnOnce(&mut Wire) -> T) -> T {
        with(&mut self.0.lock().expect("one thread"))
    }
}

impl AsyncRead for End {
    fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.with(|wire| {
            if wire.arrives.is_empty() {
                return Poll::Pending;
            }
            let n = wire.arrives.len().min(buf.remaining());
            assert!(n > 0, "a read without room");
            buf.put_slice(&wire.arrives[..n]);
            wire.arrives.drain(..n);
            Poll::Ready(Ok(()))
        })
    }
}

impl AsyncWrite for End {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.with(|wire| {
            let n = bytes.len().min(wire.room);
            wire.room -= n;
            wire.sent.extend_from_slice(&bytes[..n]);
            if n == 0 && !bytes.is_empty() { Poll::Pending } else { Poll::Ready(Ok(n)) }
        })
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// One direction, with what has to come out of it.
struct Side<'a> {
    all: &'a [u8],
    /// Bytes that have been let in, and bytes of frames that were decided about.
    given: usize,
    decided: usize,
    flow: Flow,
    from: (Stream, End),
    to: (Stream, End),
    expected: Vec<u8>,
    /// Bytes of a frame that are expected to be forwarded as they arrive.
    forwarded: Option<(usize, usize)>,
}

impl<'a> Side<'a> {
    fn new(all: &'a [u8]) -> Self {
        let (from, to) = (End::default(), End::default());
        let stream = |end: &End| Stream::Plain(Socket::Other(Box::new(end.clone())));
        Self {
            all,
            given: 0,
            decided: 0,
            flow: Flow::default(),
            from: (stream(&from), from),
            to: (stream(&to), to),
            expected: Vec::new(),
            forwarded: None,
        }
    }

    /// Lets some more bytes in.
    fn arrive(&mut self, n: usize, buffers: &Buffers) {
        let end = (self.given + n).min(self.all.len());
        let more = &self.all[self.given..end];
        self.given = end;
        self.from.1.with(|wire| wire.arrives.extend_from_slice(more));
        let mut cx = Context::from_waker(Waker::noop());
        while let Poll::Ready(n) = self.flow.poll_fill(&mut cx, &mut self.from.0, buffers) {
            assert!(n.is_ok_and(|n| n > 0), "something came in");
            // As the relay does: looked at before more is asked for, unless nothing can be decided yet.
            if self.from.1.with(|wire| wire.arrives.is_empty()) {
                break;
            }
        }
    }

    /// Sends what is to be sent, at most `room` bytes.
    fn send(&mut self, room: usize, buffers: &Buffers) {
        self.to.1.with(|wire| wire.room = room);
        let mut cx = Context::from_waker(Waker::noop());
        if self.flow.has_output() {
            let _ = self.flow.poll_send(&mut cx, &mut self.to.0, buffers).map(|sent| sent.expect("nothing fails"));
        }
        self.check();
    }

    /// The frame that is decided about is the next one of those that were sent, and its length is what was declared.
    fn frame(&self, header: frame::Header, seen: &[u8]) -> (usize, usize) {
        let (from, to) = (self.decided, self.decided + header.total);
        let declared = u32::from_be_bytes(self.all[from + 1..from + 5].try_into().expect("four bytes")) as usize;
        assert_eq!((header.tag, header.total), (self.all[from], declared + 1), "a frame that nobody sent");
        assert_eq!(seen, &self.all[from..from + seen.len()], "a frame that says something else");
        (from, to)
    }

    /// What a verdict means for what comes out, computed from what was sent.
    fn decide(&mut self, verdict: &Verdict, span: (usize, usize), seen: usize, scratch: &[u8], buffers: &Buffers) {
        self.settle();
        let total = span.1 - span.0;
        match verdict {
            Verdict::Forward => {
                self.flow.approve(total);
                self.forwarded = Some(span);
            }
            Verdict::Swallow | Verdict::Later | Verdict::Ahead => self.flow.swallow(total),
            Verdict::Replace => {
                self.expected.extend_from_slice(scratch);
                self.flow.out(buffers).extend_from_slice(scratch);
                self.flow.replace(seen, total - seen);
                self.forwarded = Some((span.0 + seen, span.1));
            }
            Verdict::Instead => {
                self.expected.extend_from_slice(scratch);
                self.flow.out(buffers).extend_from_slice(scratch);
                self.flow.swallow(total);
            }
        }
        self.decided = span.1;
    }

    /// The frame that was being forwarded has come whole: the next one was decided about.
    fn settle(&mut self) {
        if let Some((from, to)) = self.forwarded.take() {
            self.expected.extend_from_slice(&self.all[from..to]);
        }
    }

    /// What has gone out is what had to, so far.
    fn check(&self) {
        let mut expected = self.expected.clone();
        if let Some((from, to)) = self.forwarded {
            expected.extend_from_slice(&self.all[from.min(self.given)..to.min(self.given)]);
        }
        self.to.1.with(|wire| {
            assert!(expected.starts_with(&wire.sent), "other bytes than came");
            if !self.flow.has_output() {
                // What came after the last look is not approved yet.
                assert!(self.flow.mid_frame() || wire.sent.len() == expected.len(), "bytes are missing");
            }
        });
    }

    /// What has gone out consists of whole messages.
    fn framed(&self) {
        let sent = self.to.1.with(|wire| wire.sent.clone());
        let mut rest = &sent[..];
        while let Ok(Some(header)) = frame::header(rest) {
            match rest.get(header.total..) {
                Some(behind) => rest = behind,
                None => break,
            }
        }
        let whole = !self.flow.mid_frame() && !self.flow.has_output();
        assert!(!whole || rest.is_empty(), "half a message went out: {}", rest.escape_ascii());
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Turn {
    Client,
    Server,
}

struct Done {
    to_server: Vec<u8>,
    to_client: Vec<u8>,
    order: Vec<Turn>,
}

struct Relay<'a> {
    session: Session,
    prepared: Prepared,
    registry: Registry,
    buffers: Buffers,
    up: Side<'a>,
    down: Side<'a>,
    random: usize,
    order: Vec<Turn>,
    /// Requests for a ReadyForQuery that went up, and those that came.
    asked: usize,
    ready: usize,
    last: u8,
}

/// The conversation is over: somebody broke the protocol.
struct Over;

impl<'a> Relay<'a> {
    fn new(mode: PoolMode, max: usize, size: usize, client: &'a [u8], server: &'a [u8], random: usize) -> Self {
        Self {
            session: Session::new(1, mode, max),
            prepared: Prepared::default(),
            registry: Registry::new(Arc::default()),
            buffers: Buffers::new(size),
            up: Side::new(client),
            down: Side::new(server),
            random,
            order: Vec::new(),
            asked: 0,
            ready: 0,
            last: b'I',
        }
    }

    fn below(&mut self, limit: usize) -> usize {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) % limit.max(1)
    }

    fn done(self) -> Done {
        self.up.framed();
        self.down.framed();
        let sent = |side: &Side<'_>| side.to.1.with(|wire| std::mem::take(&mut wire.sent));
        Done { to_server: sent(&self.up), to_client: sent(&self.down), order: self.order }
    }

    /// In pieces, in any order.
    fn run(mut self) -> Done {
        let mut idle = 0;
        while idle < 40 {
            let (n, room) = (1 + self.below(40), self.below(60));
            let before = (self.up.given, self.down.given, self.order.len());
            let turn = if self.below(2) == 0 { Turn::Client } else { Turn::Server };
            let result = match turn {
                Turn::Client => {
                    self.up.send(room, &self.buffers);
                    // The relay reads on when it has sent.
                    if self.up.flow.has_output() { Ok(()) } else { self.client(n) }
                }
                Turn::Server => {
                    self.down.send(room, &self.buffers);
                    if self.down.flow.has_output() { Ok(()) } else { self.server(n) }
                }
            };
            if result.is_err() {
                break;
            }
            idle = if before == (self.up.given, self.down.given, self.order.len()) { idle + 1 } else { 0 };
        }
        self.up.send(usize::MAX, &self.buffers);
        self.down.send(usize::MAX, &self.buffers);
        self.done()
    }

    /// Whole frames, in the order that they were decided about.
    fn replay(mut self, order: &[Turn]) -> Done {
        for turn in order {
            let side = if *turn == Turn::Client { &self.up } else { &self.down };
            let Ok(Some(header)) = frame::header(&side.all[side.given..]) else { break };
            let result = match turn {
                Turn::Client => self.client(header.total),
                Turn::Server => self.server(header.total),
            };
            self.up.send(usize::MAX, &self.buffers);
            self.down.send(usize::MAX, &self.buffers);
            if result.is_err() {
                break;
            }
        }
        self.done()
    }

    /// As the relay's `scan_client`.
    fn client(&mut self, n: usize) -> Result<(), Over> {
        self.up.arrive(n, &self.buffers);
        self.up.flow.continue_frame();
        let mut scratch = BytesMut::new();
        loop {
            let unseen = self.up.flow.unseen();
            let Some(header) = frame::header(unseen).map_err(|_| Over)? else { return Ok(()) };
            if header.tag == b'X' {
                return Err(Over);
            }
            let needed = self.session.needs(header, unseen, self.buffers.size(), MAX).map_err(|_| Over)?;
            assert!(needed <= header.total.min(MAX.max(self.buffers.size())), "more than the frame, or than may be");
            if unseen.len() < needed {
                return Ok(());
            }
            let seen = unseen.len().min(header.total);
            let frame = unseen[..seen].to_vec();
            let span = self.up.frame(header, &frame);
            let mut link = Link { prepared: &mut self.prepared, registry: &self.registry, ward: &Guard };
            let verdict = self.session.on_client(header, &frame, &mut link, &mut scratch).map_err(|_| Over)?;
            self.order.push(Turn::Client);
            self.asked += usize::from(matches!(header.tag, b'Q' | b'S' | b'F'));
            self.up.decide(&verdict, span, seen, &scratch, &self.buffers);
            scratch.clear();
            self.answers();
            self.look();
        }
    }

    /// As the relay's `scan_server`.
    fn server(&mut self, n: usize) -> Result<(), Over> {
        self.down.arrive(n, &self.buffers);
        self.down.flow.continue_frame();
        let mut scratch = BytesMut::new();
        loop {
            self.answers();
            let unseen = self.down.flow.unseen();
            let Some(header) = frame::header(unseen).map_err(|_| Over)? else { return Ok(()) };
            let needed = self.session.needs_of_server(header, self.buffers.size());
            assert!(needed <= header.total, "more than the frame");
            if unseen.len() < needed {
                return Ok(());
            }
            let seen = unseen.len().min(header.total);
            let frame = unseen[..seen].to_vec();
            let span = self.down.frame(header, &frame);
            let verdict = self.session.on_server(header, &frame, &mut self.prepared, &mut scratch).map_err(|_| Over)?;
            self.order.push(Turn::Server);
            if header.tag == b'Z' {
                self.ready += 1;
                self.last = frame[HEADER];
            }
            self.down.decide(&verdict, span, seen, &scratch, &self.buffers);
            scratch.clear();
            self.look();
        }
    }

    /// Answers of ours, whose turn it is: as the relay's `give_our_answers`.
    fn answers(&mut self) {
        if self.session.owes_answer() && !self.down.flow.mid_frame() {
            let mut ours = BytesMut::new();
            self.session.flush_ours(&mut ours);
            self.down.settle_now();
            self.down.expected.extend_from_slice(&ours);
            self.down.flow.out(&self.buffers).extend_from_slice(&ours);
        }
    }

    fn look(&self) {
        assert!(self.ready <= self.asked, "{} answers to {} requests", self.ready, self.asked);
        if self.session.is_idle() {
            assert_eq!(self.last, b'I', "idle in a transaction");
            assert!(!self.session.owes_answer(), "idle, and owes an answer");
        }
    }
}

impl Side<'_> {
    /// Before something of ours goes behind what was forwarded: that has come whole, or ours would break into it.
    fn settle_now(&mut self) {
        if let Some((_, to)) = self.forwarded {
            assert!(to <= self.given, "an answer of ours in the middle of a message");
        }
        self.settle();
    }
}
