//! Cancel keys that clients were given, and the server connection that each stands for at this moment.
//!
//! Invariant: a cancel is tied to (client, server connection, lease). The tie is cut under the same lock under which a
//! cancel notes itself, so a cancel either is counted on the connection before the lease ends, and then the connection
//! is held back until the server has closed the cancel's own connection (which it does after the signal), or finds no
//! connection.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use dashmap::DashMap;
use parking_lot::Mutex;
use subtle::ConstantTimeEq as _;
use tokio::sync::Notify;

use super::connect::Dialer;
use crate::client::signals::Signals;
use crate::tenant::TenantId;

/// Cancels under way for one server connection.
#[derive(Debug, Default)]
pub struct UnderWay {
    count: AtomicUsize,
    settled: Notify,
}

impl UnderWay {
    /// Whether there is one.
    #[inline]
    pub fn under_way(&self) -> bool {
        self.count.load(Ordering::Acquire) > 0
    }

    /// Waits until there is none.
    pub async fn settled(&self) {
        loop {
            let notified = self.settled.notified();
            if !self.under_way() {
                return;
            }
            notified.await;
        }
    }
}

/// What a cancel needs to reach a server connection.
pub struct Target {
    /// How to reach the server.
    pub dialer: Arc<Dialer>,
    /// The server process.
    pub pid: u32,
    /// Its secret: 4 bytes in protocol 3.0, up to 256 in 3.2.
    pub secret: Arc<[u8]>,
    /// Counted here while under way.
    pub under_way: Arc<UnderWay>,
}

/// Longest secret that we give out; one of protocol 3.0 has four bytes.
const MAX_SECRET: usize = 32;

/// One client's cancel key.
pub struct Entry {
    /// In place: an allocation of four bytes costs eight times that.
    secret: [u8; MAX_SECRET],
    len: u8,
    tenant: TenantId,
    target: Mutex<Option<Arc<Target>>>,
    /// Told when the client waits for a server connection: there is nothing to cancel but the wait.
    client: Arc<Signals>,
}

impl Entry {
    /// The secret that the client is told.
    pub fn secret(&self) -> &[u8] {
        &self.secret[..usize::from(self.len)]
    }

    /// The client has got this server connection.
    #[inline]
    pub fn bind(&self, target: Arc<Target>) {
        *self.target.lock() = Some(target);
    }

    /// The client gives it back.
    #[inline]
    pub fn unbind(&self) {
        *self.target.lock() = None;
    }

    /// The server connection that the client has now, if it has one; nobody else gets it before this is dropped.
    pub fn hold(&self) -> Option<Held> {
        let guard = self.target.lock();
        let target = guard.clone()?;
        target.under_way.count.fetch_add(1, Ordering::AcqRel);
        Some(Held(target))
    }

    /// How to reach the client's task.
    pub fn signals(&self) -> &Arc<Signals> {
        &self.client
    }
}

/// A server connection that is held back.
pub struct Held(Arc<Target>);

impl Held {
    /// The server process.
    pub fn pid(&self) -> u32 {
        self.0.pid
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.under_way.count.fetch_sub(1, Ordering::AcqRel);
        self.0.under_way.settled.notify_waiters();
    }
}

/// All cancel keys of this proxy.
#[derive(Default)]
pub struct CancelKeys {
    entries: DashMap<u32, Arc<Entry>>,
}

/// A cancel key; it stops working when this is dropped.
pub struct Key {
    keys: Arc<CancelKeys>,
    /// The process id the client is told.
    pub pid: u32,
    /// The secret that the client is told, and where to [bind](Entry::bind) server connections.
    pub entry: Arc<Entry>,
}

impl CancelKeys {
    /// Makes a key with a secret of `len` bytes, at most [`MAX_SECRET`]. `client` is told of a cancel that comes while
    /// no server connection is bound. The process id is the one that is `wanted`, unless another client has it.
    pub fn issue(
        self: &Arc<Self>,
        len: usize,
        mut wanted: Option<u32>,
        tenant: &TenantId,
        client: Arc<Signals>,
    ) -> Key {
        let (mut secret, len) = ([0; MAX_SECRET], len.min(MAX_SECRET));
        rand::fill(&mut secret[..len]);
        let entry =
            Arc::new(Entry { secret, len: len as u8, tenant: tenant.clone(), target: Mutex::new(None), client });
        loop {
            // Positive as int4, so that drivers which read it as such are not surprised.
            let pid = wanted.take().unwrap_or_else(|| rand::random::<u32>() >> 1);
            if let dashmap::Entry::Vacant(vacant) = self.entries.entry(pid) {
                vacant.insert(entry.clone());
                return Key { keys: self.clone(), pid, entry };
            }
        }
    }

    /// Carries out a client's cancel request; a wrong key does nothing, as in PostgreSQL.
    pub async fn cancel(&self, pid: u32, secret: &[u8]) {
        let Some(entry) = self.entries.get(&pid).map(|entry| entry.clone()) else { return };
        if !bool::from(entry.secret().ct_eq(secret)) {
            return;
        }
        match entry.hold() {
            Some(held) => {
                send(held.0.clone()).await;
                drop(held);
            }
            None => entry.client.cancel_wait(),
        }
    }
}

impl Key {
    /// The client of the same tenant that was told this process id.
    pub fn of_same_tenant(&self, pid: u32) -> Option<Arc<Entry>> {
        let entry = self.keys.entries.get(&pid)?;
        (entry.tenant == self.entry.tenant).then(|| entry.clone())
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        self.entry.unbind();
        self.keys.entries.remove(&self.pid);
    }
}

/// How long the server may take to accept a cancel.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Sends a cancel request and waits until the server has acted on it, which it shows by closing the connection.
pub async fn send(target: Arc<Target>) {
    let work = async {
        let mut stream = target.dialer.dial().await.map_err(|error| error.to_string())?;
        let mut request = bytes::BytesMut::with_capacity(16);
        crate::wire::message::cancel_request(&mut request, target.pid.cast_signed(), &target.secret);
        stream.send_all(&request).await.map_err(|error| error.to_string())?;
        let mut sink = bytes::BytesMut::new();
        while stream.read_some(&mut sink, 64).await.is_ok_and(|n| n > 0) && sink.len() < 1024 {}
        Ok::<(), String>(())
    };
    match tokio::time::timeout(TIMEOUT, work).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(error, "cancel request did not reach the server"),
        Err(_) => tracing::warn!("cancel request timed out"),
    }
}
