//! Clients that others name by process ids ([`address`](super::address)), and what stands for them at the server.
//!
//! A client that has a server connection at the moment is that server process; the connection is held back from others
//! until the answer has come. One that has none gets a connection that stands in for it: if it is ended, so is the client,
//! in the server's words, before whoever did it has the end of its answer.

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::{Guard, Relay};
use crate::config::PoolMode;
use crate::error::{PgError, Severity, sqlstate};
use crate::pool::cancel::{Entry, Held, Key};
use crate::pool::connect::ServerError;
use crate::pool::lease::CheckIn;
use crate::pool::{Lease, Pool};

/// How long a client that names another one waits for a connection to stand in for that.
const WAIT: Duration = Duration::from_secs(1);

/// Clients that were named since the server last owed nothing. Nearly always nobody.
#[derive(Default)]
pub(super) struct Named(RefCell<Option<Box<Clients>>>);

#[derive(Default)]
struct Clients {
    held: Vec<Held>,
    stand_ins: Vec<StandIn>,
    missing: Option<Missing>,
    /// Stand-ins that are being asked whether they were ended.
    asked: Vec<JoinHandle<()>>,
}

struct StandIn {
    client: Arc<Entry>,
    /// `None`: there was none to be had.
    lease: Option<Lease>,
}

/// A stand-in that is being looked for.
struct Missing {
    client: Arc<Entry>,
    lease: Option<Pin<Box<dyn Future<Output = Option<Lease>> + Send>>>,
}

impl Named {
    /// Whether something was said that waits for a stand-in.
    pub(super) fn is_missing(&self) -> bool {
        self.0.borrow().as_ref().is_some_and(|clients| clients.missing.is_some())
    }

    /// What the server's process for the client is. `None`: none, or not yet.
    fn process(&self, key: &Key, client: Arc<Entry>, signalled: bool) -> Option<u32> {
        let mut slot = self.0.borrow_mut();
        if Arc::ptr_eq(&client, &key.entry) {
            return client.hold().map(|held| held.pid());
        }
        let clients = slot.get_or_insert_default();
        if let Some(stand_in) = clients.stand_ins.iter_mut().find(|have| Arc::ptr_eq(&have.client, &client)) {
            return stand_in.lease.as_mut().map(|lease| lease.conn().cancel_target().pid);
        }
        if let Some(held) = client.hold() {
            let pid = held.pid();
            clients.held.push(held);
            return Some(pid);
        }
        if signalled && clients.missing.is_none() {
            clients.missing = Some(Missing { client, lease: None });
        }
        None
    }

    /// Whether anybody was named.
    #[inline]
    pub(super) fn is_any(&self) -> bool {
        self.0.borrow().is_some()
    }

    /// The server has said what its last request did: finds out which stand-ins were ended.
    pub(super) fn ask(&self, timeout: Duration) {
        if let Some(clients) = self.0.borrow_mut().as_mut() {
            let stand_ins = std::mem::take(&mut clients.stand_ins).into_iter();
            clients.asked.extend(stand_ins.filter_map(|stand_in| stand_in.ask(timeout)));
        }
    }

    /// Whether that is being found out.
    #[inline]
    pub(super) fn is_asking(&self) -> bool {
        self.0.borrow().as_ref().is_some_and(|clients| !clients.asked.is_empty())
    }

    /// `Ready`: all that were ended know it.
    pub(super) fn poll_told(&self, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(clients) = self.0.borrow_mut().as_mut() {
            while let Some(asked) = clients.asked.last_mut() {
                // One that has panicked has nothing to say.
                let _ = std::task::ready!(Pin::new(asked).poll(cx));
                clients.asked.pop();
            }
        }
        Poll::Ready(())
    }

    /// The server owes nothing any more: connections that were held go their ways.
    pub(super) fn let_go(&self, timeout: Duration) {
        self.ask(timeout);
        self.0.take();
    }
}

impl StandIn {
    /// Asks the connection whether it was ended; then the client is.
    fn ask(self, timeout: Duration) -> Option<JoinHandle<()>> {
        let (client, mut lease) = (self.client, self.lease?);
        Some(tokio::spawn(async move {
            // Whoever ends a process has done so before its own answer comes.
            match tokio::time::timeout(timeout, lease.conn().simple_queries(&["SELECT 1"])).await {
                Ok(Ok(())) => lease.release(CheckIn::Clean, timeout, Instant::now()),
                Ok(Err(ServerError::Server(error))) if error.severity == Severity::Error => {}
                Ok(Err(ServerError::Server(error))) => client.signals().kill(error),
                Ok(Err(_)) => client.signals().kill(terminated()),
                Err(_) => {}
            }
        }))
    }
}

fn terminated() -> PgError {
    PgError::fatal(sqlstate::ADMIN_SHUTDOWN, "terminating connection due to administrator command")
}

impl Guard<'_> {
    /// See [`Ward::process`](super::session::Ward::process).
    pub(super) fn find_process(&self, pid: u32, signalled: bool) -> Option<u32> {
        let key = &self.client.key;
        if self.client.rules.pool_mode == PoolMode::Session {
            return None;
        }
        let faces = self.worker.pools.get(&self.client.tenant).faces().clone();
        let client = match key.of_same_tenant(pid) {
            Some(client) => client,
            // Not what a client was told at its login, but what it was answered when it asked the server.
            None => {
                let (asker, user) = faces.known_to(&self.client.tenant.id, pid)?;
                let used = |user: Arc<Entry>| user.hold().is_some_and(|held| held.pid() == pid);
                // Who says it does not mean itself by it.
                let other = ![asker, key.pid].contains(&user);
                if other && key.of_same_tenant(user).is_some_and(used) {
                    return None;
                }
                key.of_same_tenant(asker)?
            }
        };
        self.memory.named.process(key, client, signalled)
    }
}

impl Relay {
    /// Looks for a stand-in for the client that was named. `Ready`: what was said can be looked at again.
    pub(super) fn poll_stand_in(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut slot = self.memory.named.0.borrow_mut();
        let Some(clients) = slot.as_mut() else { return Poll::Ready(()) };
        let Some(missing) = &mut clients.missing else { return Poll::Ready(()) };
        let found = missing.lease.get_or_insert_with(|| Box::pin(stand_in(self.pool.clone(), &self.client.settings)));
        let lease = std::task::ready!(found.as_mut().poll(cx));
        if let Some(Missing { client, .. }) = clients.missing.take() {
            clients.stand_ins.push(StandIn { client, lease });
        }
        Poll::Ready(())
    }
}

fn stand_in(
    pool: Arc<Pool>,
    settings: &Arc<crate::pool::Settings>,
) -> impl Future<Output = Option<Lease>> + Send + use<> {
    let settings = settings.clone();
    async move { pool.checkout(&settings, &Arc::default(), WAIT).await.ok() }
}
