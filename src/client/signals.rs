//! What others have to tell a connection's task: end, drain, cancel the wait.

use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll};

use atomic_waker::AtomicWaker;
use parking_lot::Mutex;

use crate::error::PgError;

const KILL: u8 = 1;
const DRAIN: u8 = 2;
const CANCEL_WAIT: u8 = 4;

/// The letter box of one connection's task.
#[derive(Debug, Default)]
pub struct Signals {
    flags: AtomicU8,
    waker: AtomicWaker,
    /// Boxed: every client has a letter box, hardly any a letter.
    reason: Mutex<Option<Box<PgError>>>,
}

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

    fn post(&self, flag: u8, reason: Option<PgError>) {
        if let Some(reason) = reason {
            self.reason.lock().get_or_insert_with(|| Box::new(reason));
        }
        self.flags.fetch_or(flag, Ordering::AcqRel);
        self.waker.wake();
    }

    /// Looks for a signal; the task is woken when one comes. A cancelled wait is reported once, the others stay.
    #[inline]
    pub fn poll(&self, cx: &mut Context<'_>) -> Poll<Signal> {
        self.waker.register(cx.waker());
        let flags = self.flags.load(Ordering::Acquire);
        if flags == 0 { Poll::Pending } else { self.read(flags) }
    }

    fn read(&self, flags: u8) -> Poll<Signal> {
        if flags & CANCEL_WAIT != 0 {
            self.flags.fetch_and(!CANCEL_WAIT, Ordering::AcqRel);
            return Poll::Ready(Signal::CancelWait);
        }
        let reason = || {
            let shutdown = || {
                PgError::fatal(
                    crate::error::sqlstate::ADMIN_SHUTDOWN,
                    "terminating connection due to administrator command",
                )
            };
            self.reason.lock().as_deref().cloned().unwrap_or_else(shutdown)
        };
        if flags & KILL != 0 {
            return Poll::Ready(Signal::Kill(reason()));
        }
        Poll::Ready(Signal::Drain(reason()))
    }
}
