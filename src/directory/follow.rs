//! Keeps the directory up to date: reads the catalog when it notifies, on request, and as a heartbeat.
//!
//! Invariant: whatever happens to the connection, a change is read sooner or later. `LISTEN` comes before the first
//! read, each read covers everything since the one before, and a read that fails or stalls ends the connection.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

use super::Directory;
use super::catalog::{self, CHANNEL, CatalogError, Reader};
use super::connector::{Connector, Endpoint};

/// How often the catalog is read without a reason: finds a connection that died silently.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// How long a read of changes may take before the connection counts as dead.
const READ_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a first read may take.
const LOAD_TIMEOUT: Duration = Duration::from_secs(120);
const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const LAST_BACKOFF: Duration = Duration::from_secs(3);

/// Asks for a read now; answered when it is done, dropped when the catalog is away.
pub type SyncRequest = oneshot::Sender<()>;

/// Follows the catalog for as long as the program runs.
pub struct Follower {
    connector: Connector,
    at: Endpoint,
    reader: Reader,
    directory: Arc<Directory>,
    requests: mpsc::Receiver<SyncRequest>,
    connected: watch::Sender<bool>,
    migrated: bool,
}

/// The other side of a [`Follower`].
#[derive(Clone)]
pub struct Handle {
    requests: mpsc::Sender<SyncRequest>,
    connected: watch::Receiver<bool>,
}

impl Handle {
    /// Waits until everything that is in the catalog now is in the directory; `false` if the catalog is away.
    pub async fn sync(&self) -> bool {
        let (done, answer) = oneshot::channel();
        self.requests.send(done).await.is_ok() && answer.await.is_ok()
    }

    /// Waits until the catalog is followed.
    pub async fn connected(&self) {
        // An error: the follower has ended, and with it the program.
        let _ = self.connected.clone().wait_for(|connected| *connected).await;
    }

    /// Whether the catalog is followed right now.
    pub fn is_connected(&self) -> bool {
        *self.connected.borrow()
    }
}

impl Follower {
    /// A follower and its handle.
    pub fn new(connector: Connector, at: Endpoint, reader: Reader) -> (Self, Handle) {
        let (sender, requests) = mpsc::channel(64);
        let (connected, watcher) = watch::channel(false);
        let directory = reader.directory();
        let follower = Self { connector, at, reader, directory, requests, connected, migrated: false };
        (follower, Handle { requests: sender, connected: watcher })
    }

    /// Connects, migrates the catalog if that was not done before, and reads what is not known yet.
    ///
    /// # Errors
    /// See [`CatalogError`].
    pub async fn load(&mut self) -> Result<Link, CatalogError> {
        if !self.migrated {
            catalog::migrate(&self.connector, &self.at).await?;
            self.migrated = true;
        }
        let news = Arc::new(Notify::new());
        let client =
            self.connector.open(&self.at, news.clone()).await.map_err(|e| CatalogError::Connect(self.at.clone(), e))?;
        client
            .batch_execute(&format!("LISTEN {CHANNEL}"))
            .await
            .map_err(|e| CatalogError::Postgres { doing: "listen to the catalog", source: e })?;
        self.read(&client, LOAD_TIMEOUT).await?;
        self.set_connected(true);
        Ok(Link { client, news })
    }

    /// Follows from a loaded state, or from a snapshot if the catalog is away, until `shutdown`.
    pub async fn run(mut self, mut link: Option<Link>, shutdown: CancellationToken) {
        loop {
            if let Some(link) = link {
                let lost = tokio::select! {
                    error = self.follow(&link) => error,
                    () = shutdown.cancelled() => return,
                };
                self.set_connected(false);
                tracing::warn!(error = %lost, "lost the catalog; known tenants go on");
            }
            link = tokio::select! {
                link = self.reconnect() => Some(link),
                () = shutdown.cancelled() => return,
            };
            tracing::info!("the catalog is back, changes made meanwhile are read");
        }
    }

    fn set_connected(&self, connected: bool) {
        self.connected.send_replace(connected);
        self.directory.set_current(connected);
    }

    /// Reads when there is a reason to; returns what ended it.
    async fn follow(&mut self, link: &Link) -> CatalogError {
        loop {
            let mut waiting = Vec::new();
            tokio::select! {
                () = link.news.notified() => {}
                Some(request) = self.requests.recv() => waiting.push(request),
                () = tokio::time::sleep(HEARTBEAT) => {}
            }
            // Whoever asked before the read begins is served by it.
            while let Ok(request) = self.requests.try_recv() {
                waiting.push(request);
            }
            if let Err(error) = self.read(&link.client, READ_TIMEOUT).await {
                return error;
            }
            for request in waiting {
                let _ = request.send(());
            }
        }
    }

    async fn reconnect(&mut self) -> Link {
        let mut backoff = FIRST_BACKOFF;
        loop {
            match self.load().await {
                Ok(link) => return link,
                Err(error @ CatalogError::Connect(..)) => tracing::debug!(%error, "the catalog is still away"),
                Err(error) => tracing::warn!(%error, "the catalog cannot be followed"),
            }
            let until = tokio::time::Instant::now() + backoff.mul_f64(rand::random_range(0.5..1.0));
            // Who asks meanwhile is told at once, by dropping the request.
            while tokio::time::timeout_at(until, self.requests.recv()).await.is_ok_and(|request| request.is_some()) {}
            tokio::time::sleep_until(until).await;
            backoff = (backoff * 2).min(LAST_BACKOFF);
        }
    }

    async fn read(&mut self, client: &Client, limit: Duration) -> Result<(), CatalogError> {
        tokio::time::timeout(limit, self.reader.read(client)).await.unwrap_or(Err(CatalogError::Silent))
    }
}

/// A connection that listens to the catalog.
pub struct Link {
    client: Client,
    news: Arc<Notify>,
}
