//! Builds [`Shared`] from the configuration, binds, accepts, drains.
//!
//! Threads: each worker has a runtime of its own on a thread of its own, accepts in its turn, and serves the tenants that
//! fall to it. A tenant's clients and server connections live on one
//! worker, so that nothing on the path of a query crosses threads. The control plane and HTTP run on the runtime that
//! called [`Server::start`].

use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{JoinHandle, ThreadId};
use std::time::Duration;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::accept::{Acceptor, Listening};
use crate::client::auth::MockSecret;
use crate::client::sessions::Sessions;
use crate::client::tls::ServerTls;
use crate::config::{AuthType, Config};
use crate::connection::{self, Admitted};
use crate::control::canary::Front;
use crate::control::{Control, ControlError, Traffic, api};
use crate::directory::Directory;
use crate::error::{PgError, sqlstate};
use crate::exporter::{self, Exporter};
use crate::metrics::Metrics;
use crate::pool::cancel::CancelKeys;
use crate::pool::connect::Connector;
use crate::pool::passwords::Passwords;
use crate::pool::tls::ClientTls;
use crate::pool::{Limits, Pools, Settings};
use crate::relay::looks::Looks;
use crate::relay::{Rules, Worker};
use crate::steer::Steer;
use crate::stream::Buffers;
use crate::tenant::TenantId;
use crate::tenant::identify::{self, InvalidRegex};
use crate::tls::TlsError;

/// Why the proxy did not start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A certificate, key or CA.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// `[identify] username_regex`
    #[error("username_regex: {0}")]
    Regex(#[from] InvalidRegex),
    /// The catalog.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// An address that cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address, or the socket's path.
        address: String,
        /// What the system said.
        source: io::Error,
    },
    /// A thread or runtime.
    #[error("cannot start a worker: {0}")]
    Worker(io::Error),
}

/// What a client needs of the configuration, as it was when it came.
pub struct Settled {
    /// From accept to the end of authentication.
    pub client_login_timeout: Duration,
    /// Most clients.
    pub max_client_conn: usize,
    /// How tenants are named.
    pub identify: identify::Rules,
    /// How clients prove who they are.
    pub auth_type: AuthType,
    /// A line when a client connects and goes.
    pub log_connections: bool,
    /// For the relay.
    pub relay: Arc<Rules>,
}

/// What all connections share.
pub struct Shared {
    settled: ArcSwap<Settled>,
    /// Where tenants live.
    pub directory: Arc<Directory>,
    /// Server connections.
    pub pools: Arc<Pools>,
    /// Cancel keys.
    pub cancels: Arc<CancelKeys>,
    /// Everything that is counted.
    pub metrics: Arc<Metrics>,
    /// Connected clients.
    pub sessions: Arc<Sessions>,
    /// TLS towards clients.
    pub server_tls: ServerTls,
    /// For the challenges of logins that do not exist.
    pub mock: MockSecret,
    /// Startup settings in use.
    pub settings: Interner,
    workers: Vec<Serving>,
    steer: Steer,
    hasher: ahash::RandomState,
    next_client: AtomicU64,
    /// Cancelled when a shutdown begins.
    stopping: CancellationToken,
}

/// Equal startup settings, kept once.
#[derive(Default)]
pub struct Interner(Mutex<HashSet<Arc<Settings>>>);

impl Interner {
    /// The one of its kind.
    pub fn intern(&self, settings: Settings) -> Arc<Settings> {
        let mut known = self.0.lock();
        if let Some(same) = known.get(&settings) {
            return same.clone();
        }
        if known.len() >= 256 && known.len().is_power_of_two() {
            known.retain(|settings| Arc::strong_count(settings) > 1);
        }
        let settings = Arc::new(settings);
        known.insert(settings.clone());
        settings
    }
}

impl Shared {
    /// The configuration for a client that comes now.
    pub fn settled(&self) -> Arc<Settled> {
        self.settled.load_full()
    }

    /// A number for a client.
    pub fn next_client(&self) -> u64 {
        self.next_client.fetch_add(1, Ordering::Relaxed)
    }

    /// Whether the proxy is shutting down.
    pub fn is_draining(&self) -> bool {
        self.stopping.is_cancelled()
    }

    /// Cancelled when a shutdown begins.
    pub fn stopping(&self) -> CancellationToken {
        self.stopping.clone()
    }

    /// The number of the worker that serves a tenant.
    fn place_of(&self, id: &TenantId) -> usize {
        let at = self.hasher.hash_one(id.as_str()) % self.workers.len().max(1) as u64;
        usize::try_from(at).unwrap_or_default()
    }

    /// A worker's runtime.
    pub fn handle(&self, worker: usize) -> Option<&Handle> {
        self.workers.get(worker).map(|serving| &serving.handle)
    }

    /// The worker that accepts next, when this one has accepted so many in its turn.
    pub fn next_to_accept(&self, worker: usize, accepted: u64) -> usize {
        self.steer.next(worker, accepted, self.workers.len())
    }

    /// Has a logged-in client served by its tenant's worker. On this one, its greeting is over when this returns.
    pub async fn hand_over(self: &Arc<Self>, admitted: Admitted) {
        let at = self.place_of(admitted.tenant_id());
        self.steer.note(at);
        let Some(Serving { handle, worker, thread }) = self.workers.get(at) else { return };
        let greet = |admitted| connection::serve(admitted, self.clone(), worker.clone());
        if *thread == std::thread::current().id() {
            Box::pin(greet(admitted)).await;
        } else if let Some(leaving) = admitted.leaving() {
            handle.spawn(greet(leaving));
        }
    }
}

/// A worker, and the thread that it runs on.
struct Serving {
    handle: Handle,
    worker: Arc<Worker>,
    thread: ThreadId,
}

impl Traffic for Shared {
    fn close_tenant(&self, id: &TenantId, why: PgError) {
        self.pools.close_tenant(id.as_str());
        self.sessions.close_tenant(id.as_str(), &why);
    }

    fn tenant_clients(&self, id: &TenantId) -> usize {
        self.sessions.count(id.as_str())
    }

    fn tenant_servers(&self, id: &TenantId) -> usize {
        self.pools.tenant_connections(id.as_str()).0
    }

    fn shard_servers(&self, shard: &str) -> (usize, usize) {
        let used = self.pools.shard_use(shard);
        (used.open, used.idle)
    }
}

/// Where a server listens.
#[derive(Debug, Clone)]
pub struct Addresses {
    /// For clients, by TCP.
    pub proxy: Vec<SocketAddr>,
    /// For clients, the Unix socket.
    pub unix: Option<PathBuf>,
    /// The admin API.
    pub api: Option<SocketAddr>,
    /// `/metrics`
    pub metrics: Option<SocketAddr>,
}

/// A running proxy.
pub struct Server {
    shared: Arc<Shared>,
    control: Arc<Control>,
    client_tls: Arc<ClientTls>,
    addresses: Addresses,
    /// Stops accepting.
    accepting: CancellationToken,
    /// The tasks that accept, which hold the listening sockets.
    acceptors: TaskTracker,
    /// Stops everything.
    shutdown: CancellationToken,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// Requests for new tenants that may wait at a time.
const PROVISION_QUEUE: usize = 1024;

impl Server {
    /// Connects to the catalog, binds and serves; it is ready when this returns.
    ///
    /// # Errors
    /// [`ServeError`]
    pub async fn start(config: Config) -> Result<Self, ServeError> {
        let workers = if config.proxy.workers == 0 { cores() } else { config.proxy.workers };
        let shutdown = CancellationToken::new();
        let client_tls = Arc::new(ClientTls::new(&config.tls)?);
        let (runtimes, threads) = start_threads(workers, &shutdown).map_err(ServeError::Worker)?;
        let (provision, requests) = mpsc::channel(PROVISION_QUEUE);
        let shared = Arc::new(build(&config, Directory::new(provision), client_tls.clone(), runtimes)?);
        let control = {
            let (config, directory) = (Arc::new(config.clone()), shared.directory.clone());
            Control::start(config, directory, requests, shared.clone(), shutdown.clone()).await?
        };
        control.keep_journal(shared.metrics.clone());
        if let Some(questions) = shared.pools.questions() {
            control.tell_senders(questions);
        }
        let accepting = shutdown.child_token();
        let acceptors = TaskTracker::new();
        let mut addresses = listen(&config, &shared, &accepting, &acceptors)?;
        spawn_sweeper(&shared, shutdown.clone());
        let front = Front::new(&config, addresses.proxy.first(), addresses.unix.as_deref());
        control.open_canary(front, shared.metrics.clone());
        addresses.api = serve_api(&config, &control, &shutdown).await?;
        addresses.metrics = serve_metrics(&config, &shared, &control, &shutdown).await?;
        let threads = Mutex::new(threads);
        Ok(Self { shared, control, client_tls, addresses, accepting, acceptors, shutdown, threads })
    }

    /// Where it listens.
    pub fn addresses(&self) -> Addresses {
        self.addresses.clone()
    }

    /// The control plane.
    pub fn control(&self) -> Arc<Control> {
        self.control.clone()
    }

    /// Takes over what can change while running: everything but addresses, workers, catalog and shards.
    ///
    /// # Errors
    /// What is wrong with the new configuration; the old one stays.
    pub async fn reload(&self, config: Config) -> Result<(), ServeError> {
        let settled = settle(&config)?;
        self.shared.server_tls.reload(&config.tls)?;
        self.client_tls.reload(&config.tls)?;
        self.shared.settled.store(Arc::new(settled));
        self.shared.pools.set_limits(limits(&config));
        self.control.reload(&config).await.map_err(ControlError::from)?;
        Ok(())
    }

    /// Stops accepting, lets transactions end for `timeout` (zero: for ever), and closes everything.
    pub async fn drain(&self, timeout: Duration) {
        self.shared.stopping.cancel();
        self.accepting.cancel();
        // Who is told to go and comes back at once must not get in again.
        self.acceptors.close();
        self.acceptors.wait().await;
        self.shared.sessions.drain(&shutting_down());
        let started = tokio::time::Instant::now();
        while self.shared.metrics.clients.load(Ordering::Relaxed) > 0 {
            if !timeout.is_zero() && started.elapsed() >= timeout {
                tracing::warn!("shutdown_timeout: closing clients in the middle of their transactions");
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.stop().await;
    }

    async fn stop(&self) {
        self.shared.pools.close_all();
        self.shutdown.cancel();
        self.control.finish().await;
        let threads = std::mem::take(&mut *self.threads.lock());
        let joined = tokio::task::spawn_blocking(move || threads.into_iter().for_each(|thread| drop(thread.join())));
        let _ = joined.await;
        if let Some(path) = &self.addresses.unix {
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

/// What clients are told when the proxy shuts down.
pub(crate) fn shutting_down() -> PgError {
    PgError::fatal(sqlstate::ADMIN_SHUTDOWN, "terminating connection due to administrator command")
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn settle(config: &Config) -> Result<Settled, ServeError> {
    let (proxy, pool, identify) = (&config.proxy, &config.pool, &config.identify);
    let databases = config.shards.iter().flat_map(|shard| [shard.database.clone(), shard.rls_database.clone()]);
    let rules = identify::Rules::new(
        identify.order.clone(),
        identify.username_regex.as_deref(),
        identify.sni_suffix.as_deref(),
    )?;
    Ok(Settled {
        client_login_timeout: proxy.client_login_timeout,
        max_client_conn: proxy.max_client_conn,
        identify: rules.databases(databases),
        auth_type: config.auth.auth_type,
        log_connections: config.log.log_connections,
        relay: Arc::new(Rules {
            pool_mode: pool.pool_mode,
            query_wait_timeout: pool.query_wait_timeout,
            pin_timeout: pool.pin_timeout,
            server_reset_timeout: pool.server_reset_timeout,
            max_prepared_statements: pool.max_prepared_statements,
            max_client_prepared_memory: pool.max_client_prepared_memory,
            max_packet_size: proxy.max_packet_size,
            client_idle_timeout: proxy.client_idle_timeout,
            idle_transaction_timeout: proxy.idle_transaction_timeout,
            query_timeout: proxy.query_timeout,
            guard: config.guard.mode,
        }),
    })
}

fn limits(config: &Config) -> Limits {
    Limits { default_pool_size: config.pool.default_pool_size, server_idle_timeout: config.pool.server_idle_timeout }
}

fn build(
    config: &Config,
    directory: Directory,
    client_tls: Arc<ClientTls>,
    runtimes: Vec<(Handle, ThreadId)>,
) -> Result<Shared, ServeError> {
    let settled = settle(config)?;
    let directory = Arc::new(directory);
    let metrics = Arc::new(Metrics::new(runtimes.len()));
    let connector = Connector::new(
        client_tls,
        Passwords::new(config),
        config.pool.server_connect_timeout,
        config.pool.server_lifetime,
        metrics.clone(),
    );
    let pools = Arc::new(Pools::new(Arc::new(connector), limits(config), metrics.clone()));
    let serving = |(at, (handle, thread)): (usize, (Handle, ThreadId))| {
        let worker = Arc::new(Worker {
            directory: directory.clone(),
            pools: pools.clone(),
            metrics: metrics.clone(),
            stats: metrics.worker(at),
            buffers: Buffers::new(config.proxy.pkt_buf),
            looks: Looks::default(),
        });
        Serving { handle, worker, thread }
    };
    let workers = runtimes.into_iter().enumerate().map(serving).collect();
    Ok(Shared {
        settled: ArcSwap::from_pointee(settled),
        directory,
        pools,
        cancels: Arc::default(),
        metrics,
        sessions: Arc::default(),
        server_tls: ServerTls::new(&config.tls)?,
        mock: MockSecret::new(config.provision.master_secret.expose().as_bytes()),
        settings: Interner::default(),
        workers,
        steer: Steer::default(),
        hasher: ahash::RandomState::new(),
        next_client: 1.into(),
        stopping: CancellationToken::new(),
    })
}

type Threads = (Vec<(Handle, ThreadId)>, Vec<JoinHandle<()>>);

fn start_threads(workers: usize, shutdown: &CancellationToken) -> io::Result<Threads> {
    let (mut runtimes, mut threads) = (Vec::new(), Vec::new());
    for number in 0..workers {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (handle, shutdown) = (runtime.handle().clone(), shutdown.clone());
        let thread = std::thread::Builder::new().name(format!("worker-{number}"));
        let thread = thread.spawn(move || runtime.block_on(beat(&shutdown)))?;
        runtimes.push((handle, thread.thread().id()));
        threads.push(thread);
    }
    Ok((runtimes, threads))
}

/// Runs until the shutdown, with a timer that is always due within a second. A timer that is set to end before all others
/// interrupts the wait for sockets by a system call, also on the same thread: with this one, hardly any does.
async fn beat(shutdown: &CancellationToken) {
    let mut tick = tokio::time::interval(Duration::from_secs(1));
    while shutdown.run_until_cancelled(tick.tick()).await.is_some() {}
}

/// Closes what has been idle or alive for too long, once a second.
fn spawn_sweeper(shared: &Arc<Shared>, shutdown: CancellationToken) {
    let (pools, metrics) = (shared.pools.clone(), shared.metrics.clone());
    tokio::spawn(async move {
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while shutdown.run_until_cancelled(tick.tick()).await.is_some() {
            pools.sweep(tokio::time::Instant::now());
            metrics.forget_idle_tenants(metrics.second(std::time::Instant::now()));
        }
    });
}

fn cannot_listen(address: impl ToString) -> impl FnOnce(io::Error) -> ServeError {
    let address = address.to_string();
    move |source| ServeError::Listen { address, source }
}

fn listen(
    config: &Config,
    shared: &Arc<Shared>,
    stop: &CancellationToken,
    tasks: &TaskTracker,
) -> Result<Addresses, ServeError> {
    let mut addresses = Addresses { proxy: Vec::new(), unix: None, api: None, metrics: None };
    let accept = |listening| {
        let (listening, shared, stop, tasks) = (Arc::new(listening), shared.clone(), stop.clone(), tasks.clone());
        Acceptor { listening, shared, stop, tasks }.accept_on(0);
    };
    for address in tcp_addresses(&config.proxy.listen_addr, config.proxy.listen_port)? {
        let listening = Listening::tcp(address, config.proxy.tcp_keepidle).map_err(cannot_listen(address))?;
        addresses.proxy.push(listening.address().unwrap_or(address));
        accept(listening);
    }
    if let Some(dir) = &config.proxy.unix_socket_dir {
        let port = addresses.proxy.first().map_or(config.proxy.listen_port, SocketAddr::port);
        let path = dir.join(format!(".s.PGSQL.{port}"));
        accept(Listening::unix(&path, config.proxy.unix_socket_mode).map_err(cannot_listen(path.display()))?);
        addresses.unix = Some(path);
    }
    Ok(addresses)
}

fn tcp_addresses(listen_addr: &str, port: u16) -> Result<Vec<SocketAddr>, ServeError> {
    let mut addresses = Vec::new();
    for name in listen_addr.split(',').map(str::trim).filter(|name| !name.is_empty()) {
        match name {
            "*" => addresses.push(SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port)),
            name => {
                let found = std::net::ToSocketAddrs::to_socket_addrs(&(name, port)).map_err(cannot_listen(name))?;
                addresses.extend(found);
            }
        }
    }
    Ok(without_repeats(&addresses))
}

/// An address can be listened on once: not again by another name (`localhost`), nor beside one that means all.
fn without_repeats(addresses: &[SocketAddr]) -> Vec<SocketAddr> {
    // `*` means both families.
    let means = |all: &SocketAddr, other: &SocketAddr| {
        all.ip().is_unspecified() && all != other && (all.is_ipv6() || other.is_ipv4())
    };
    let mut kept = Vec::new();
    for address in addresses {
        if !kept.contains(address) && !addresses.iter().any(|all| means(all, address)) {
            kept.push(*address);
        }
    }
    kept
}

async fn http_listener(listen: &str) -> Result<Option<(TcpListener, SocketAddr)>, ServeError> {
    if listen.is_empty() {
        return Ok(None);
    }
    let listener = TcpListener::bind(listen).await.map_err(cannot_listen(listen))?;
    let address = listener.local_addr().map_err(cannot_listen(listen))?;
    Ok(Some((listener, address)))
}

async fn serve_api(
    config: &Config,
    control: &Arc<Control>,
    shutdown: &CancellationToken,
) -> Result<Option<SocketAddr>, ServeError> {
    let Some((listener, address)) = http_listener(&config.api.listen).await? else { return Ok(None) };
    tokio::spawn(log_end("admin API", api::serve(control.clone(), listener, shutdown.clone())));
    Ok(Some(address))
}

async fn serve_metrics(
    config: &Config,
    shared: &Arc<Shared>,
    control: &Arc<Control>,
    shutdown: &CancellationToken,
) -> Result<Option<SocketAddr>, ServeError> {
    let Some((listener, address)) = http_listener(&config.metrics.listen).await? else { return Ok(None) };
    let top_tenants = config.metrics.metrics_top_tenants;
    let exporter = Exporter { shared: shared.clone(), control: control.clone(), top_tenants };
    tokio::spawn(log_end("metrics", exporter::serve(exporter, listener, shutdown.clone())));
    Ok(Some(address))
}

async fn log_end(what: &str, serving: impl Future<Output = io::Result<()>>) {
    if let Err(error) = serving.await {
        tracing::error!(%error, "{what} ended");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_listened_on_once() {
        let of = |listen_addr: &str| {
            let addresses = tcp_addresses(listen_addr, 5432).unwrap();
            addresses.iter().map(|address| address.ip().to_string()).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(of("127.0.0.1, 127.0.0.2,127.0.0.1"), "127.0.0.1 127.0.0.2");
        assert_eq!(of("127.0.0.1,0.0.0.0,::1"), "0.0.0.0 ::1");
        assert_eq!(of("127.0.0.1,*,0.0.0.0,::1,::"), "::");
        assert_eq!(of(""), "");
    }
}
