//! A connection to a shard that nobody has logged in on yet: the next login finds its server process there.
//!
//! PostgreSQL makes the process when it accepts, before it knows who comes, and that is half of what a login takes. So
//! each login leaves one such connection behind for the next, whichever tenant's that is: nothing has been said on it. It
//! is closed if nobody wants it soon; the server keeps none either (`authentication_timeout`), lists it nowhere and does not
//! count it as a connection.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use super::connect::Dialer;
use crate::stream::{Detached, Stream};

/// How long it is kept. Tenants that come less often are hardly waiting for one another.
pub(super) const KEPT: Duration = Duration::from_secs(10);

/// Whoever has just logged in asks something now, on a server that is busy with little else: making a process then would
/// be in the way. Who logs in right after that finds it; with 5 ms, logins one after the other never did.
const PAUSE: Duration = Duration::from_millis(1);

/// The place of one.
#[derive(Debug, Default)]
pub(super) struct Spare(Mutex<State>);

#[derive(Debug, Default)]
enum State {
    #[default]
    None,
    /// Being made.
    Coming,
    Kept(Instant, Detached),
}

impl Spare {
    /// Takes it, if there is one that the server has not closed or spoken on.
    pub(super) fn take(&self) -> Option<Stream> {
        let mut state = self.0.lock();
        let socket = match std::mem::take(&mut *state) {
            State::Kept(_, socket) => socket,
            other => {
                *state = other;
                return None;
            }
        };
        drop(state);
        socket.is_quiet().then(|| socket.attach().ok()).flatten()
    }

    /// Whether the caller is to make one.
    fn is_wanted(&self) -> bool {
        let mut state = self.0.lock();
        let wanted = matches!(*state, State::None);
        if wanted {
            *state = State::Coming;
        }
        wanted
    }

    fn put(&self, made: Option<Detached>, now: Instant) {
        *self.0.lock() = made.map_or(State::None, |socket| State::Kept(now, socket));
    }

    /// Closes what has been here since then.
    fn close(&self, since: Instant) {
        let mut state = self.0.lock();
        if matches!(*state, State::Kept(kept, _) if kept == since) {
            *state = State::None;
        }
    }
}

/// Makes one if there is none, and keeps it for so long. In the background; a shard that cannot be reached is noticed by
/// whoever needs it.
pub(super) fn leave(dialer: &Arc<Dialer>, kept: Duration) {
    if !dialer.spare.is_wanted() {
        return;
    }
    let dialer = dialer.clone();
    tokio::spawn(async move {
        tokio::time::sleep(PAUSE).await;
        let made = tokio::time::timeout(kept, dialer.reach()).await;
        let since = Instant::now();
        dialer.spare.put(made.ok().and_then(Result::ok).and_then(|stream| stream.detach().ok()), since);
        let dialer = Arc::downgrade(&dialer);
        tokio::time::sleep(kept).await;
        if let Some(dialer) = dialer.upgrade() {
            dialer.spare.close(since);
        }
    });
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt as _;
    use tokio::net::TcpListener;

    use super::*;
    use crate::config::Config;
    use crate::directory::Shard;
    use crate::pool::tls::ClientTls;

    async fn listening() -> (TcpListener, Arc<Dialer>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let shard = Shard { port: listener.local_addr().unwrap().port(), ..Shard::for_tests("a") };
        let tls = ClientTls::new(&Config::default().tls).unwrap();
        (listener, Arc::new(Dialer::new(Arc::new(shard), Arc::new(tls))))
    }

    async fn made(dialer: &Arc<Dialer>) {
        leave(dialer, KEPT);
        while !matches!(*dialer.spare.0.lock(), State::Kept(..)) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    #[tokio::test]
    async fn one_is_kept_and_nothing_is_said_on_it() {
        let (listener, dialer) = listening().await;
        assert!(dialer.spare.take().is_none());
        made(&dialer).await;
        let (mut server, _) = listener.accept().await.unwrap();
        leave(&dialer, KEPT);
        assert!(tokio::time::timeout(PAUSE * 50, listener.accept()).await.is_err(), "a second one");
        let mut stream = dialer.spare.take().unwrap();
        assert!(dialer.spare.take().is_none());
        stream.send_all(b"x").await.unwrap();
        drop(stream);
        let mut heard = Vec::new();
        server.read_to_end(&mut heard).await.unwrap();
        assert_eq!(heard, b"x");
    }

    #[tokio::test]
    async fn one_that_the_server_has_closed_or_spoken_on_is_not_given_out() {
        let (listener, dialer) = listening().await;
        for word in [&b""[..], b"E"] {
            made(&dialer).await;
            let (server, _) = listener.accept().await.unwrap();
            server.writable().await.unwrap();
            if word.is_empty() {
                drop(server);
            } else {
                assert_eq!(server.try_write(word).unwrap(), 1);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
            assert!(dialer.spare.take().is_none());
        }
    }

    #[tokio::test]
    async fn one_that_nobody_wants_is_closed() {
        let (listener, dialer) = listening().await;
        // It may be gone before anybody has looked.
        leave(&dialer, PAUSE);
        let (mut server, _) = listener.accept().await.unwrap();
        assert_eq!(server.read(&mut [0; 1]).await.unwrap(), 0);
        assert!(dialer.spare.take().is_none());
        drop(listener);
        leave(&dialer, PAUSE);
        while !dialer.spare.is_wanted() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}
