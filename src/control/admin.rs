//! Connections with which the control plane works: to the catalog, and as administrator to shards. A few per place,
//! kept for a while, given out clean.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tokio_postgres::Client;

use crate::directory::connector::{ConnectError, Connector, Endpoint};
use crate::error::{PgError, sqlstate};

/// A connection unused for longer is closed.
const IDLE: Duration = Duration::from_secs(60);

type Idle = Arc<Mutex<Vec<(Client, Instant)>>>;

/// A bounded set of connections to one database as one user.
pub(crate) struct AdminPool {
    connector: Connector,
    at: Endpoint,
    /// For messages: `shard "a"`, `the catalog`.
    what: String,
    permits: Arc<Semaphore>,
    idle: Idle,
}

impl AdminPool {
    pub(crate) fn new(connector: Connector, at: Endpoint, what: String, size: usize) -> Self {
        Self { connector, at, what, permits: Arc::new(Semaphore::new(size)), idle: Idle::default() }
    }

    pub(crate) fn endpoint(&self) -> &Endpoint {
        &self.at
    }

    /// A clean connection; waits for its turn. Dropping it closes it, [`Admin::give_back`] keeps it.
    pub(crate) async fn checkout(&self) -> Result<Admin, PgError> {
        let closed = |_| PgError::fatal(sqlstate::CANNOT_CONNECT_NOW, "the proxy is shutting down");
        let permit = self.permits.clone().acquire_owned().await.map_err(closed)?;
        let found = self.take_idle();
        let client = match found {
            Some(client) => client,
            None => self.connector.connect(&self.at).await.map_err(|e| self.unreachable(&e))?,
        };
        Ok(Admin { client, idle: self.idle.clone(), _permit: permit })
    }

    fn take_idle(&self) -> Option<Client> {
        let mut idle = self.idle.lock();
        idle.retain(|(client, since)| !client.is_closed() && since.elapsed() < IDLE);
        idle.pop().map(|(client, _)| client)
    }

    /// Closes connections that nobody has used for a while.
    pub(crate) fn sweep(&self) {
        self.idle.lock().retain(|(client, since)| !client.is_closed() && since.elapsed() < IDLE);
    }

    fn unreachable(&self, error: &ConnectError) -> PgError {
        tracing::warn!(at = %self.at, %error, "cannot connect");
        PgError::fatal(sqlstate::CANNOT_CONNECT_NOW, format!("{} is not reachable", self.what))
            .hint("Try again in a moment; the proxy's log has the cause.")
    }
}

/// A connection lent by an [`AdminPool`].
pub(crate) struct Admin {
    client: Client,
    idle: Idle,
    _permit: OwnedSemaphorePermit,
}

impl Admin {
    /// Gives the connection back, outside a transaction. Everything that was set on it is undone, and if that fails it
    /// is closed.
    pub(crate) async fn give_back(self) {
        if self.client.batch_execute("DISCARD ALL").await.is_ok() {
            self.idle.lock().push((self.client, Instant::now()));
        }
    }
}

impl Deref for Admin {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

impl DerefMut for Admin {
    fn deref_mut(&mut self) -> &mut Client {
        &mut self.client
    }
}

/// What PostgreSQL said while we were `doing` something, as an error for whoever asked for it.
pub(crate) fn refused(doing: &str, error: &tokio_postgres::Error) -> PgError {
    match error.as_db_error() {
        Some(db) => PgError {
            code: db.code().code().to_owned().into(),
            detail: db.detail().map(str::to_owned),
            hint: db.hint().map(str::to_owned),
            ..PgError::fatal(sqlstate::INTERNAL, format!("cannot {doing}: {}", db.message()))
        },
        None => {
            tracing::warn!(doing, error = crate::directory::connector::explain(error), "lost a connection");
            PgError::fatal(sqlstate::CANNOT_CONNECT_NOW, format!("cannot {doing}: the connection was lost"))
                .hint("Try again in a moment.")
        }
    }
}

/// [`refused`] for `map_err`.
pub(crate) fn failed(doing: &str) -> impl Fn(tokio_postgres::Error) -> PgError {
    move |error| refused(doing, &error)
}
