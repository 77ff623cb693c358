//! A server connection while one client holds it.
//!
//! Invariants: dropping a lease closes the connection; [`Lease::release`] is the only way back to the pool. A
//! connection is held back while a cancel for it is under way, and while it is being reset.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::cancel;
use super::connect::ServerConnection;

/// A server connection, lent.
pub struct Lease {
    conn: Box<ServerConnection>,
}

/// What has to happen before the next client gets the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CheckIn {
    /// Nothing: the client left nothing behind, or all that it left is known ([`ServerConnection::applied`]).
    Clean,
    /// A reset: there may be settings, temporary tables, locks, cursors, …
    Reset,
}

/// What a reset consists of. Messages of their own: `DISCARD ALL` must be alone, `RESET ALL` before it disarms a
/// `statement_timeout` or `default_transaction_…` with which a client could make it fail or hang, and `RESET ROLE` after it
/// brings back a role that the login was given by `ALTER ROLE … SET role`.
const RESET: [&str; 3] = ["RESET ALL", "DISCARD ALL", "RESET ROLE"];

impl Lease {
    pub(super) fn new(conn: Box<ServerConnection>) -> Self {
        Self { conn }
    }

    /// The connection.
    pub fn conn(&mut self) -> &mut ServerConnection {
        &mut self.conn
    }

    /// Gives the connection back. The caller vouches that it is idle: the last ReadyForQuery said `I` and no reply is
    /// outstanding. What takes time (a reset, a cancel under way) happens off the caller's path.
    pub fn release(self, check_in: CheckIn, reset_timeout: Duration, now: Instant) {
        let Self { conn } = self;
        let pool = conn.slot.pool().clone();
        let check_in = if conn.is_itself() { check_in } else { CheckIn::Reset };
        if check_in == CheckIn::Clean && !conn.cancels.under_way() {
            pool.checkin(conn, now);
        } else {
            tokio::spawn(async move {
                if let Some(conn) = make_clean(conn, check_in, reset_timeout).await {
                    pool.checkin(conn, Instant::now());
                }
            });
        }
    }

    /// Closes the connection, and stops what it may still be running.
    pub fn abandon(self) {
        let target = self.conn.cancel_target();
        drop(self);
        tokio::spawn(cancel::send(target));
    }
}

/// The connection, clean; `None` if there is any doubt, and then it is closed.
async fn make_clean(
    mut conn: Box<ServerConnection>,
    check_in: CheckIn,
    reset_timeout: Duration,
) -> Option<Box<ServerConnection>> {
    let work = async {
        conn.cancels.settled().await;
        match check_in {
            CheckIn::Clean => Ok(()),
            CheckIn::Reset => conn.simple_queries(&RESET).await,
        }
    };
    let done = tokio::time::timeout(reset_timeout, work).await;
    conn.heard = Vec::new();
    match done {
        Ok(Ok(())) if conn.is_itself() => {
            if check_in == CheckIn::Reset {
                conn.prepared.clear();
                conn.prepared.forget_sequences();
                conn.applied = conn.slot.pool().intern_carried(Arc::default());
            }
            Some(conn)
        }
        Ok(Ok(())) => None,
        Ok(Err(error)) => {
            tracing::debug!(tenant = %conn.slot.pool().tenant().id, %error, "server connection closed: reset failed");
            None
        }
        Err(_) => {
            tracing::debug!(tenant = %conn.slot.pool().tenant().id, "server connection closed: reset took too long");
            None
        }
    }
}
