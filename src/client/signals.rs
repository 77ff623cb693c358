//! What others have to tell a connection's task: end, drain, cancel the wait; and notifications for its client.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;

use crate::error::{PgError, sqlstate};
use crate::wire::frame::until_nul;
use crate::wire::message;

const KILL: u8 = 1;
const DRAIN: u8 = 2;
const CANCEL_WAIT: u8 = 4;
const MAIL: u8 = 8;

/// Most bytes of notifications that wait for a client.
const MAX_MAIL: usize = 1 << 20;

/// The letter box of one connection's task.
#[derive(Debug, Default)]
pub struct Signals {
    flags: AtomicU8,
    task: Task,
    /// Boxed: every client has a letter box, hardly any a letter.
    reason: Mutex<Option<Box<PgError>>>,
    /// Notifications; most clients never get any.
    mail: Mutex<Option<Box<Mail>>>,
}

/// Whom to wake. It stays registered, since it is asked for at every turn and hardly ever woken: being registered already
/// costs one load.
#[derive(Debug, Default)]
struct Task {
    waker: Mutex<Option<Waker>>,
    /// Whose waker that is, by the address of its data, which is its own for as long as the waker is kept.
    known: AtomicUsize,
}

impl Task {
    #[inline]
    fn register(&self, waker: &Waker) {
        if self.known.load(Ordering::Relaxed) != waker.data().addr() {
            self.replace(waker);
        }
    }

    fn replace(&self, waker: &Waker) {
        let mut slot = self.waker.lock();
        self.known.store(waker.data().addr(), Ordering::Relaxed);
        *slot = Some(waker.clone());
    }

    fn wake(&self) {
        if let Some(waker) = self.waker.lock().as_ref() {
            waker.wake_by_ref();
        }
    }
}

/// Notifications on their way to the client, in order.
#[derive(Debug, Default)]
struct Mail {
    letters: VecDeque<Letter>,
    bytes: usize,
    /// Number of the first letter.
    first: u64,
}

/// One notification.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Letter {
    /// The server process that it comes from.
    pub from: u32,
    /// What the client is told in its place; `None` while that is being asked.
    pub pid: Option<u32>,
    /// Channel and payload, as in the message; nothing is left of one that must not be delivered.
    pub text: Bytes,
}

impl Letter {
    fn channel(&self) -> &[u8] {
        until_nul(&self.text)
    }

    /// Whether it is the same notification, of those that come at about the same time.
    fn is(&self, other: &Self) -> bool {
        (self.from, &self.text) == (other.from, &other.text)
    }
}

/// Most notifications that are compared with others, each with each.
const MAX_COMPARED: usize = 1000;

/// What was found in it.
#[derive(Debug)]
pub enum Signal {
    /// Close now, telling the client why.
    Kill(PgError),
    /// Close as soon as no transaction is under way.
    Drain(PgError),
    /// The client cancels; it waits for a server connection.
    CancelWait,
}

impl Signals {
    /// Ends the connection.
    pub fn kill(&self, reason: PgError) {
        self.post(KILL, Some(reason));
    }

    /// Ends the connection when its transaction does.
    pub fn drain(&self, reason: PgError) {
        self.post(DRAIN, Some(reason));
    }

    /// Ends the wait for a server connection.
    pub fn cancel_wait(&self) {
        self.post(CANCEL_WAIT, None);
    }

    /// Leaves a notification for the client: channel and payload, each with its NUL. With no process id known the
    /// notification, and all behind it, waits for [`Signals::vouch`] with the number that is returned.
    pub fn deliver(&self, letter: Letter) -> u64 {
        let mut mail = self.mail.lock();
        let mail = mail.get_or_insert_default();
        let number = mail.first.wrapping_add(mail.letters.len() as u64);
        mail.bytes += letter.text.len();
        mail.letters.push_back(letter);
        self.note_mail(mail);
        number
    }

    /// Puts what has come another way, on these channels, in front of what has been delivered since; what is the end of
    /// the one and the beginning of the other came both ways, and is delivered once.
    pub fn deliver_before(&self, mut earlier: Vec<Letter>, is_channel: impl Fn(&[u8]) -> bool) {
        if earlier.is_empty() {
            return;
        }
        let mut mail = self.mail.lock();
        let mail = mail.get_or_insert_default();
        let there = mail.letters.iter().filter(|letter| is_channel(letter.channel()));
        let there: Vec<_> = there.take(earlier.len().min(MAX_COMPARED)).collect();
        let is_double = |n: &usize| earlier[earlier.len() - n..].iter().zip(&there).all(|(a, b)| a.is(b));
        let doubles = (0..=there.len()).rev().find(is_double).unwrap_or(0);
        earlier.truncate(earlier.len() - doubles);
        for letter in earlier.into_iter().rev() {
            mail.first = mail.first.wrapping_sub(1);
            mail.bytes += letter.text.len();
            mail.letters.push_front(letter);
        }
        self.note_mail(mail);
    }

    fn note_mail(&self, mail: &mut Mail) {
        if mail.bytes > MAX_MAIL {
            // PostgreSQL would keep them for everybody until its queue is full. What comes now finds no room either.
            mail.letters.clear();
            self.reason.lock().get_or_insert_with(|| Box::new(too_much_mail()));
            self.flags.fetch_or(KILL, Ordering::AcqRel);
        } else {
            self.flags.fetch_or(MAIL, Ordering::AcqRel);
        }
        self.task.wake();
    }

    /// Says from which process the notification comes; `None` if it must not be delivered.
    pub fn vouch(&self, number: u64, pid: Option<u32>) {
        let mut mail = self.mail.lock();
        let Some(mail) = mail.as_mut() else { return };
        let at = usize::try_from(number.wrapping_sub(mail.first)).ok();
        let Some(letter) = at.and_then(|at| mail.letters.get_mut(at)) else { return };
        letter.pid = Some(pid.unwrap_or_default());
        if pid.is_none() {
            mail.bytes -= letter.text.len();
            letter.text = Bytes::new();
        }
        self.flags.fetch_or(MAIL, Ordering::AcqRel);
        self.task.wake();
    }

    /// Whether notifications may be waiting. One load.
    #[inline]
    pub fn has_mail(&self) -> bool {
        self.flags.load(Ordering::Relaxed) & MAIL != 0
    }

    /// Whether all that was left for the client has been taken.
    pub fn is_mailbox_empty(&self) -> bool {
        self.mail.lock().as_ref().is_none_or(|mail| mail.letters.is_empty())
    }

    /// Appends the notifications that wait to `out` as messages; how many.
    pub fn take_mail(&self, out: &mut BytesMut) -> u64 {
        self.flags.fetch_and(!MAIL, Ordering::AcqRel);
        let mut slot = self.mail.lock();
        let Some(mail) = slot.as_mut() else { return 0 };
        let mut taken = 0;
        while mail.letters.front().is_some_and(|letter| letter.pid.is_some()) {
            let Some(letter) = mail.letters.pop_front() else { break };
            mail.first = mail.first.wrapping_add(1);
            mail.bytes -= letter.text.len();
            if let (Some(pid), false) = (letter.pid, letter.text.is_empty()) {
                message::notification_response(out, pid.cast_signed(), &letter.text);
                taken += 1;
            }
        }
        taken
    }

    fn post(&self, flag: u8, reason: Option<PgError>) {
        if let Some(reason) = reason {
            self.reason.lock().get_or_insert_with(|| Box::new(reason));
        }
        self.flags.fetch_or(flag, Ordering::AcqRel);
        self.task.wake();
    }

    /// Whether there is anything to be looked at. One load; the task is not woken.
    #[inline]
    pub fn is_raised(&self) -> bool {
        self.flags.load(Ordering::Relaxed) != 0
    }

    /// Looks for a signal; the task is woken when one comes. A cancelled wait is reported once, the others stay.
    #[inline]
    pub fn poll(&self, cx: &mut Context<'_>) -> Poll<Signal> {
        self.task.register(cx.waker());
        let flags = self.flags.load(Ordering::Acquire) & !MAIL;
        if flags == 0 { Poll::Pending } else { self.read(flags) }
    }

    fn read(&self, flags: u8) -> Poll<Signal> {
        if flags & CANCEL_WAIT != 0 {
            self.flags.fetch_and(!CANCEL_WAIT, Ordering::AcqRel);
            return Poll::Ready(Signal::CancelWait);
        }
        let reason = || {
            let shutdown =
                || PgError::fatal(sqlstate::ADMIN_SHUTDOWN, "terminating connection due to administrator command");
            self.reason.lock().as_deref().cloned().unwrap_or_else(shutdown)
        };
        if flags & KILL != 0 {
            return Poll::Ready(Signal::Kill(reason()));
        }
        Poll::Ready(Signal::Drain(reason()))
    }
}

fn too_much_mail() -> PgError {
    PgError::fatal(sqlstate::PROGRAM_LIMIT_EXCEEDED, "terminating connection because its notifications are not read")
        .detail(format!("More than {MAX_MAIL} bytes of notifications were waiting for the client."))
        .hint("End transactions and read from the connection while listening, or UNLISTEN.")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn letter(pid: Option<u32>, text: &'static [u8]) -> Letter {
        Letter { from: pid.unwrap_or(9), pid, text: Bytes::from_static(text) }
    }

    #[test]
    fn what_came_both_ways_is_delivered_once() {
        for (own, box_, expected) in [
            ("", "", ""),
            ("abc", "", "abc"),
            ("", "abc", "abc"),
            ("abc", "cde", "abcde"),
            ("abc", "abcd", "abcd"),
            ("aab", "abaa", "aabaa"),
            ("abc", "xcde", "abxcde"),
            ("aaa", "aa", "aaa"),
            ("ab", "cd", "abcd"),
            ("abx", "ccd", "abccd"),
        ] {
            let signals = Signals::default();
            let letter = |c: char| Letter { from: 1, pid: Some(1), text: format!("{c}\0\0").into_bytes().into() };
            // On `x` nobody listens anew: it is not compared.
            box_.chars().for_each(|c| assert!(signals.deliver(letter(c)) < 9));
            let asked = signals.deliver(Letter { pid: None, ..letter('q') });
            signals.deliver_before(own.chars().filter(|c| *c != 'x').map(letter).collect(), |channel| channel != b"x");
            signals.vouch(asked, Some(7));
            let mut out = BytesMut::new();
            signals.take_mail(&mut out);
            let got: String = out.chunks(12).map(|message| char::from(message[9])).collect();
            assert_eq!(got, format!("{expected}q"), "{own} {box_}");
        }
    }

    #[test]
    fn notifications_keep_their_order_while_one_is_asked_for() {
        let signals = Signals::default();
        let mut out = BytesMut::new();
        assert_eq!(signals.take_mail(&mut out), 0);
        signals.deliver(letter(Some(1), b"a\0\0"));
        let asked = signals.deliver(letter(None, b"b\0\0"));
        let denied = signals.deliver(letter(None, b"c\0\0"));
        signals.deliver(letter(Some(4), b"d\0\0"));
        assert!(signals.has_mail());
        assert_eq!(signals.take_mail(&mut out), 1);
        assert!(!signals.has_mail() && !signals.is_mailbox_empty());
        signals.vouch(denied, None);
        assert_eq!(signals.take_mail(&mut out), 0, "one before it is asked for");
        signals.vouch(asked, Some(2));
        assert_eq!(signals.take_mail(&mut out), 2);
        assert!(signals.is_mailbox_empty());
        let channels: Vec<u8> = out.chunks(12).map(|message| message[9]).collect();
        assert_eq!(channels, b"abd");
    }

    #[test]
    fn who_does_not_read_is_told_to_go() {
        let signals = Signals::default();
        for _ in 0..=MAX_MAIL / 8000 {
            signals.deliver(Letter { from: 1, pid: Some(1), text: Bytes::from(vec![b'x'; 8001]) });
        }
        let Poll::Ready(Signal::Kill(reason)) = signals.poll(&mut Context::from_waker(Waker::noop())) else {
            panic!("it goes on");
        };
        assert_eq!(reason.code, sqlstate::PROGRAM_LIMIT_EXCEEDED);
    }
}
