//! Bytes on their way in one direction: received, looked at, approved, sent.
//!
//! ```text
//! buffer:  0 .. start   sent
//!          start .. approved   to be sent as they are
//!          approved .. end   not looked at yet
//! out:     replacements, which go before `start .. approved`
//! ```
//! A buffer is held only while bytes are in flight.

use std::io;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, BytesMut};
use tokio::task::coop::has_budget_remaining;

use crate::stream::{Buffers, Stream};
use crate::wire::frame;

/// One direction.
#[derive(Debug, Default)]
pub struct Flow {
    buf: Option<Box<[u8]>>,
    start: usize,
    approved: usize,
    end: usize,
    /// Bytes of the current frame, still to come, that are forwarded unseen.
    forward: usize,
    /// Bytes of the current frame, still to come, that are dropped.
    discard: usize,
    out: BytesMut,
    sent: u64,
    /// The task will be woken when the stream has something to read.
    armed: bool,
    /// The last read has filled the buffer: there is more where that came from.
    bulk: bool,
}

impl Flow {
    /// What has arrived and was not looked at.
    #[inline]
    pub fn unseen(&self) -> &[u8] {
        self.buf.as_deref().map_or(&[], |buf| &buf[self.approved..self.end])
    }

    /// Whether there is anything to be sent.
    #[inline]
    pub fn has_output(&self) -> bool {
        self.start < self.approved || !self.out.is_empty()
    }

    /// Whether nothing is held and no frame is half way through.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.start == self.end && self.out.is_empty() && self.forward == 0 && self.discard == 0
    }

    /// A direction in which some bytes have arrived already.
    pub fn preload(bytes: &[u8]) -> Self {
        if bytes.is_empty() {
            return Self::default();
        }
        Self { buf: Some(bytes.into()), end: bytes.len(), ..Self::default() }
    }

    /// Whether a frame that was decided about has not arrived in full.
    #[inline]
    pub fn mid_frame(&self) -> bool {
        self.forward > 0 || self.discard > 0
    }

    /// Whether a frame is half way through, or its beginning is waiting to be looked at.
    #[inline]
    pub fn in_frame(&self) -> bool {
        self.approved < self.end || self.forward > 0 || self.discard > 0
    }

    /// Where replacements and answers are appended, behind everything that is to be sent before them.
    #[inline]
    pub fn out(&mut self, buffers: &Buffers) -> &mut BytesMut {
        if self.out.capacity() == 0 {
            self.out = buffers.take_text();
        }
        self.merge();
        &mut self.out
    }

    fn merge(&mut self) {
        if self.start < self.approved {
            if let Some(buf) = &self.buf {
                self.out.extend_from_slice(&buf[self.start..self.approved]);
            }
            self.start = self.approved;
        }
    }

    /// A frame of `total` bytes goes to the other side as it is; as much of it as has arrived is approved now.
    #[inline]
    pub fn approve(&mut self, total: usize) {
        let here = total.min(self.end - self.approved);
        self.approved += here;
        self.forward = total - here;
    }

    /// [Approves](Flow::approve) all rows, of results and of COPY, that come next; nothing needs to be known of them.
    #[inline]
    pub fn approve_rows(&mut self) {
        while let Some(header) = frame::header(self.unseen()).ok().flatten()
            && matches!(header.tag, b'D' | b'd')
        {
            self.approve(header.total);
        }
    }

    /// Drops `seen` bytes, in the place of which something was put into [`Flow::out`], and forwards the `rest`.
    pub fn replace(&mut self, seen: usize, rest: usize) {
        self.skip(seen);
        self.approve(rest);
    }

    /// Drops a frame of `total` bytes.
    pub fn swallow(&mut self, total: usize) {
        let here = total.min(self.end - self.approved);
        self.skip(here);
        self.discard = total - here;
    }

    fn skip(&mut self, n: usize) {
        self.merge();
        self.approved += n;
        self.start = self.approved;
    }

    /// Deals with what belongs to a frame that was decided about before. Call before looking at [`Flow::unseen`].
    #[inline]
    pub fn continue_frame(&mut self) {
        if self.forward > 0 {
            self.approve(self.forward);
        } else if self.discard > 0 {
            self.swallow(self.discard);
        }
    }

    /// Bytes sent since the last call.
    #[inline]
    pub fn take_sent(&mut self) -> u64 {
        std::mem::take(&mut self.sent)
    }

    /// Sends all that is to be sent; `Pending` if the socket takes no more for now.
    #[inline]
    pub fn poll_send(&mut self, cx: &mut Context<'_>, stream: &mut Stream, buffers: &Buffers) -> Poll<io::Result<()>> {
        if !self.out.is_empty() {
            self.merge();
            while !self.out.is_empty() {
                let n = ready!(stream.poll_send(cx, &self.out))?;
                if n == 0 {
                    return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
                }
                self.out.advance(n);
                self.sent += n as u64;
            }
            buffers.give_text(std::mem::take(&mut self.out));
        }
        while self.start < self.approved {
            let Some(buf) = &self.buf else { break };
            let n = ready!(stream.poll_send(cx, &buf[self.start..self.approved]))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.start += n;
            self.sent += n as u64;
        }
        self.give_back(buffers);
        stream.poll_flush(cx)
    }

    #[inline]
    fn give_back(&mut self, buffers: &Buffers) {
        if self.start == self.end {
            (self.start, self.approved, self.end) = (0, 0, 0);
            if let Some(buf) = self.buf.take() {
                buffers.give(buf);
            }
        }
    }

    /// Receives some bytes; 0 is the end of the stream. There is always room for more: a buffer full of one frame that
    /// must be seen whole grows, and who asks for that has checked the frame's length. Another stream than the last time
    /// has to be announced by [`Flow::disarm`].
    #[inline]
    pub fn poll_fill(
        &mut self,
        cx: &mut Context<'_>,
        stream: &mut Stream,
        buffers: &Buffers,
    ) -> Poll<io::Result<usize>> {
        if self.buf.is_none() {
            if !self.armed {
                let readable = stream.poll_readable(cx);
                // A task that has used up its turn is not registered, only told to come again.
                self.armed = readable.is_pending() && has_budget_remaining();
                ready!(readable)?;
            } else if !stream.may_read() {
                return Poll::Pending;
            }
            self.buf = Some(if self.bulk { buffers.take_large() } else { buffers.take() });
        } else {
            self.make_room();
        }
        let Some(buf) = &mut self.buf else { return Poll::Pending };
        let room = &mut buf[self.end..];
        let whole = room.len();
        let result = stream.poll_fill(cx, room);
        self.armed = result.is_pending() && has_budget_remaining();
        if let Poll::Ready(Ok(n)) = result {
            self.end += n;
            self.bulk = n == whole || self.bulk && n > whole / 4;
        }
        self.give_back(buffers);
        result
    }

    /// The end: whatever is held goes, and the buffers back.
    pub fn put_away(&mut self, buffers: &Buffers) {
        if let Some(buf) = self.buf.take() {
            buffers.give(buf);
        }
        buffers.give_text(std::mem::take(&mut self.out));
        *self = Self::default();
    }

    /// What is read next comes from another stream.
    #[inline]
    pub fn disarm(&mut self) {
        self.armed = false;
    }

    fn make_room(&mut self) {
        let Some(buf) = &mut self.buf else { return };
        if self.end < buf.len() {
            return;
        }
        if self.start > 0 {
            buf.copy_within(self.start..self.end, 0);
            self.approved -= self.start;
            self.end -= self.start;
            self.start = 0;
            return;
        }
        let mut larger = vec![0; buf.len() * 2].into_boxed_slice();
        larger[..self.end].copy_from_slice(&buf[..self.end]);
        *buf = larger;
    }
}
