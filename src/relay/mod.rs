//! The hot path: between an authenticated client and its tenant's server connections.
//!
//! One task per client. It waits without a server connection and without a buffer until a request begins, borrows a
//! connection, passes frames both ways as [`session::Session`] decides, and gives the connection back.

mod address;
mod exchange;
#[cfg(test)]
mod faults;
pub mod flow;
pub mod guard;
pub mod lex;
pub mod looks;
pub mod mention;
#[cfg(test)]
mod model;
mod named;
pub mod names;
mod notify;
pub mod replication;
pub mod scan;
pub mod session;
pub mod settle;
mod stand_in;
pub mod track;
mod watch;

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::BytesMut;
use tokio::time::{Instant, Sleep};

use crate::client::signals::{Signal, Signals};
use crate::config::{GuardMode, PoolMode};
use crate::directory::{Directory, Tenant};
use crate::error::{PgError, sqlstate};
use crate::metrics::{self, Metrics, Present, WorkerStats};
use crate::pool::cancel::Key;
use crate::pool::connect::{ServerError, server_error};
use crate::pool::lease::CheckIn;
use crate::pool::params::Params;
use crate::pool::residue::Carried;
use crate::pool::scope;
use crate::pool::statements::Stay;
use crate::pool::{CheckoutError, Lease, Pool, Pools, Settings, StandBy};
use crate::stream::{Buffers, Stream};
use crate::tenant::Status;
use crate::tenant::plan::{MARK, Replication};
use crate::violation::{self, Action, Kind, Violation};
use crate::wire::frame::{self, HEADER, until_nul};
use crate::wire::message;
use flow::Flow;
use guard::{Neighbours, Seat};
use lex::Lex;
use looks::Looks;
use session::{Link, Session, Verdict, Ward};
use watch::{Guard, Memory};

/// What all clients of one worker thread share.
pub struct Worker {
    /// Where tenants live.
    pub directory: Arc<Directory>,
    /// Server connections.
    pub pools: Arc<Pools>,
    /// Everything that is counted.
    pub metrics: Arc<Metrics>,
    /// This worker's counters.
    pub stats: Arc<WorkerStats>,
    /// This worker's buffers.
    pub buffers: Buffers,
    /// What this worker has seen in texts.
    pub looks: Looks,
}

/// What the relay does, from `[proxy]` and `[pool]`.
#[derive(Debug, Clone)]
pub struct Rules {
    /// When a server connection goes back.
    pub pool_mode: PoolMode,
    /// Longest wait for a server connection.
    pub query_wait_timeout: Duration,
    /// Longest reset.
    pub server_reset_timeout: Duration,
    /// Prepared statements per server connection; 0 passes names through.
    pub max_prepared_statements: usize,
    /// What a client's statements that have names may take (bytes); 0 is no limit.
    pub max_client_prepared_memory: usize,
    /// Longest message that is taken in whole.
    pub max_packet_size: usize,
    /// Longest silence of a client outside a transaction; zero is for ever.
    pub client_idle_timeout: Duration,
    /// Longest silence of a client inside a transaction; zero is for ever.
    pub idle_transaction_timeout: Duration,
    /// Longest silence of a client that keeps its server connection, outside a transaction; zero is for ever.
    pub pin_timeout: Duration,
    /// Longest query; zero is for ever.
    pub query_timeout: Duration,
    /// What becomes of statements that reach for another tenant.
    pub guard: GuardMode,
}

impl Rules {
    /// How long the server may take to set or tell a session's settings. Nobody but the client itself waits for it, which
    /// would wait as long for a server of its own; so it is longer than any load makes that take, and than a cancel may be
    /// under way.
    fn settle_timeout(&self) -> Duration {
        self.server_reset_timeout.max(SETTLE_TIMEOUT)
    }
}

/// See [`Rules::settle_timeout`].
const SETTLE_TIMEOUT: Duration = Duration::from_secs(15);

/// An authenticated client, greeted and ready for its first query.
pub struct Client {
    /// Number of the connection, never used twice.
    pub id: u64,
    /// Its socket.
    pub stream: Stream,
    /// Whom it belongs to.
    pub tenant: Arc<Tenant>,
    /// The directory's version that `tenant` was read at.
    pub seen: u64,
    /// Its startup settings.
    pub settings: Arc<Settings>,
    /// Its application_name at startup.
    pub application_name: Arc<str>,
    /// What it believes its settings to be.
    pub params: Arc<Params>,
    /// Its cancel key.
    pub key: Key,
    /// The server connection that it has already, with `pool_mode = "session"`.
    pub lease: Option<Lease>,
    /// How to reach its task.
    pub signals: Arc<Signals>,
    /// Its tenant's counters.
    pub stats: Present,
    /// What to do.
    pub rules: Arc<Rules>,
    /// Whether it is a replication connection.
    pub replicates: bool,
    /// The name it logged in with.
    pub user: Arc<str>,
    /// Where it comes from.
    pub from: Arc<str>,
}

/// What came of a wait for a server connection: one, or a signal that came first.
type Found = Result<Result<Option<Lease>, CheckoutError>, Signal>;

impl Client {
    /// Waits for a server connection of that generation.
    fn stand_in_line(&self, pool: &Arc<Pool>, stats: &WorkerStats, generation: u64) -> impl Future<Output = Found> {
        // Who shares a server connection does not name it.
        let name = (self.rules.pool_mode == PoolMode::Session).then_some(&self.application_name);
        let (mut wait, counted) = (None, Waiting::new(stats));
        poll_fn(move |cx| {
            if let Poll::Ready(signal) = self.signals.poll(cx) {
                return Poll::Ready(Err(signal));
            }
            let patience = self.rules.query_wait_timeout;
            let begin = || pool.wait(&self.settings, name, patience, generation, Some(cx.waker()));
            Pin::new(wait.get_or_insert_with(begin)).poll(cx).map(|(found, waited)| {
                counted.waited(waited);
                Ok(found)
            })
        })
    }
}

/// How a connection ended.
#[derive(Debug)]
pub enum End {
    /// The client said goodbye or went away between transactions.
    Left,
    /// The client went away, or its socket failed, in the middle of something.
    Lost,
    /// The client was told this.
    Told(PgError),
    /// The server ended it in its own words, which the client has got.
    Server,
}

/// Serves the client until it leaves, and says how that came; `early` is what it has sent already, `entries` goes last.
/// Dropping the future closes both connections.
pub fn run<E: Send, F: FnOnce(&Client, End) + Send>(
    client: Client,
    early: &[u8],
    worker: Arc<Worker>,
    entries: E,
    at_end: F,
) -> impl Future<Output = ()> + Send + use<E, F> {
    // An idle client costs little more than this future: what is rare is boxed where it happens.
    let mut relay = Relay::new(client, early, worker);
    async move {
        // In a box, because it would take room in the future all the time that it is not there.
        let end = Box::new(relay.serve().await);
        match &*end {
            End::Told(error) => Box::pin(relay.say_goodbye(error)).await,
            // TLS without a proper end is an error to OpenSSL, in the place of what the server said last.
            End::Server => drop(tokio::time::timeout(FAREWELL, relay.client.stream.shutdown()).await),
            End::Left | End::Lost => {}
        }
        relay.up.put_away(&relay.worker.buffers);
        relay.down.put_away(&relay.worker.buffers);
        at_end(&relay.client, *end);
        drop(relay);
        drop(entries);
    }
}

struct Relay {
    client: Client,
    worker: Arc<Worker>,
    pool: Arc<Pool>,
    session: Session,
    /// Client to server.
    up: Flow,
    /// Server to client.
    down: Flow,
    /// Armed only where a timeout is configured.
    alarm: Option<Pin<Box<Sleep>>>,
    waits: Waits,
    query_since: Option<Instant>,
    transaction_since: Option<Instant>,
    /// Since when the client has not taken what the server has sent.
    stalled_since: Option<Instant>,
    ready_at: Instant,
    /// Settings that the client takes along, other than those that the server reports.
    carried: Arc<Carried>,
    /// The reported settings that it began with.
    base: Arc<Params>,
    /// What the session's scope was made of.
    scoped: (Arc<Params>, Arc<Carried>),
    /// Why the client keeps its server connection between transactions.
    pinned: Option<settle::Reason>,
    /// How often what logins begin with had changed when it logged in, or since what it began with was restored.
    generation: u64,
    /// What it listens to without one.
    ears: Option<Box<notify::Ears>>,
    /// Its ReadyForQuery is held back until what it listens to is settled.
    held: bool,
    /// While it is idle and keeps its server connection for the state of sequences: others may ask for that.
    stand_by: Option<StandBy>,
    /// They have.
    yields: bool,
    /// It has held no server connection before.
    newcomer: bool,
    /// The client has seeded `random()` on the server connection that it keeps.
    seeded: bool,
    /// The client has written down the process id of the server connection that it keeps.
    known_by_process: bool,
    /// It has made settings whose names could not be read.
    doubtful: bool,
    /// The client has said goodbye; what it asked for before is still carried out.
    leaving: bool,
    /// The server connection's settings are no longer the client's, which are known.
    has_params: bool,
    /// What the client says next waits for an answer of the server.
    held_up: bool,
    /// The server takes no more.
    server_deaf: bool,
    /// The server has said why it closes.
    farewell: bool,
    /// What the guard has seen, until the server has answered.
    memory: Memory,
}

/// The name under which a client streams that replicates beside others; see [`replication`].
fn streams_as(client: &Client) -> Option<Box<str>> {
    let shares = client.replicates && client.tenant.plan.replication() != Replication::Everything;
    // As much of it as the server takes.
    shares.then(|| format!("{MARK} {}", client.tenant.id).chars().take(lex::MAX_NAME).collect())
}

/// What a client does next.
enum Next {
    Request,
    Leave(End),
}

/// What came of waiting for a server connection.
enum Waited<'a> {
    Found(Lease),
    Again,
    /// The request is to be answered with an error.
    InVain(Pin<Box<dyn Future<Output = Result<(), End>> + Send + 'a>>),
}

/// What came of a lease.
enum Lent {
    /// The client goes on without.
    Done,
    /// The client's connection has ended.
    Ended(End),
    /// The server connection was dead before anything of the client's was looked at: another one will do.
    Dead,
    /// It could not be made what the client needs, and is closed; another one may do.
    Unfit(PgError),
}

/// Server connections in a row that may be dead, for one request. After a server has been restarted they all are.
const MAX_DEAD: usize = 100;

/// Those that may be unfit.
const MAX_UNFIT: usize = 3;

/// Why an exchange with a server connection ended.
enum Outcome {
    /// The transaction is over (in session mode: the client leaves).
    Done,
    ClientGone,
    ServerGone,
    /// In a box: it is kept where every client would have room for it.
    Told(Box<PgError>),
}

impl Outcome {
    fn told(error: PgError) -> Self {
        Self::Told(Box::new(error))
    }
}

impl Relay {
    fn new(client: Client, early: &[u8], worker: Arc<Worker>) -> Self {
        let began_with = client.settings.iter().find(|(name, _)| name == scope::PATH).map(|(_, value)| value.as_str());
        let session = Session::new(client.id, client.rules.pool_mode, client.rules.max_prepared_statements)
            .with_max_named(client.rules.max_client_prepared_memory)
            .with_search_path(began_with.or(client.params.get(scope::PATH)))
            .with_replication(streams_as(&client));
        let pool = worker.pools.get(&client.tenant);
        let (carried, generation) = (pool.intern_carried(Arc::default()), pool.generation());
        let up = Flow::preload(early);
        let base = client.params.clone();
        Self {
            scoped: (base.clone(), carried.clone()),
            base,
            client,
            worker,
            pool,
            session,
            up,
            down: Flow::default(),
            alarm: None,
            waits: Waits::Nobody,
            query_since: None,
            transaction_since: None,
            stalled_since: None,
            ready_at: Instant::now(),
            carried,
            pinned: None,
            generation,
            ears: None,
            held: false,
            stand_by: None,
            yields: false,
            newcomer: true,
            seeded: false,
            known_by_process: false,
            doubtful: false,
            leaving: false,
            held_up: false,
            has_params: false,
            server_deaf: false,
            farewell: false,
            memory: Memory::default(),
        }
    }

    async fn serve(&mut self) -> End {
        if let Some(lease) = self.client.lease.take() {
            match self.lend(lease).await {
                Lent::Done => {}
                Lent::Ended(end) => return end,
                Lent::Dead => return End::Told(server_closed()),
                Lent::Unfit(why) => return End::Told(why),
            }
        }
        let (mut dead, mut unfit) = (0, 0);
        loop {
            match self.next_request().await {
                Next::Request => {}
                Next::Leave(end) => return end,
            }
            if let Err(error) = self.route() {
                return End::Told(error);
            }
            if self.begins_to_listen() {
                match Box::pin(self.listener_first()).await {
                    Ok(true) => {}
                    Ok(false) => continue,
                    Err(end) => return end,
                }
            }
            let lease = match self.pool.try_checkout(&self.client.settings, self.may_stay()) {
                Some(lease) => lease,
                None => match self.checkout().await {
                    Ok(Some(lease)) => lease,
                    Ok(None) => continue,
                    Err(end) => return end,
                },
            };
            match self.lend(lease).await {
                Lent::Done => (dead, unfit) = (0, 0),
                Lent::Ended(end) => return end,
                // The request is still there.
                Lent::Dead if dead < MAX_DEAD => dead += 1,
                Lent::Dead => return End::Told(server_closed()),
                Lent::Unfit(_) if unfit < MAX_UNFIT => unfit += 1,
                Lent::Unfit(why) => return End::Told(why),
            }
        }
    }

    /// For a client that may advance sequences: where it has done so last. One that only reads takes what comes.
    #[inline]
    fn may_stay(&self) -> Option<Stay> {
        let stay = self.session.stay();
        (self.newcomer || stay.number > 0).then_some(stay)
    }

    /// Waits for the beginning of a request, holding nothing.
    async fn next_request(&mut self) -> Next {
        self.arm(self.client.rules.client_idle_timeout);
        poll_fn(|cx| self.poll_request(cx)).await
    }

    fn poll_request(&mut self, cx: &mut Context<'_>) -> Poll<Next> {
        loop {
            match self.client.signals.poll(cx) {
                Poll::Ready(Signal::Kill(reason) | Signal::Drain(reason)) => {
                    return Poll::Ready(Next::Leave(End::Told(reason)));
                }
                Poll::Ready(Signal::CancelWait) => continue,
                Poll::Pending => {}
            }
            match self.look_for_request() {
                Ok(Some(next)) => return Poll::Ready(next),
                Ok(None) => {}
                Err(error) => return Poll::Ready(Next::Leave(End::Told(error))),
            }
            self.take_mail();
            if self.down.has_output() && matches!(self.poll_send_down(cx), Poll::Ready(Err(_))) {
                return Poll::Ready(Next::Leave(End::Lost));
            }
            match self.up.poll_fill(cx, &mut self.client.stream, &self.worker.buffers) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Next::Leave(End::Left)),
                Poll::Ready(Ok(n)) => self.count_client_in(n),
                Poll::Ready(Err(_)) => return Poll::Ready(Next::Leave(End::Lost)),
                Poll::Pending if self.alarm_rings(cx) => {
                    let error = PgError::fatal(sqlstate::IDLE_SESSION_TIMEOUT, "client_idle_timeout");
                    return Poll::Ready(Next::Leave(End::Told(error)));
                }
                Poll::Pending => return Poll::Pending,
            }
        }
    }

    /// Whether what has arrived is worth a server connection: so much of a frame that it can be decided about.
    fn look_for_request(&mut self) -> Result<Option<Next>, PgError> {
        loop {
            self.up.continue_frame();
            let unseen = self.up.unseen();
            let Some(header) = frame::header(unseen).map_err(invalid_length)? else { return Ok(None) };
            match header.tag {
                b'X' => return Ok(Some(Next::Leave(End::Left))),
                // What is left of a COPY that the server has broken off.
                b'd' | b'c' | b'f' => self.up.swallow(header.total),
                _ => {
                    if header.tag == b'P' && self.prepare_alone() {
                        continue;
                    }
                    let unseen = self.up.unseen();
                    let limit = self.worker.buffers.size();
                    let needed = self.session.needs(header, unseen, limit, self.client.rules.max_packet_size)?;
                    return Ok((unseen.len() >= needed).then_some(Next::Request));
                }
            }
        }
    }

    /// See [`Session::prepare_alone`].
    fn prepare_alone(&mut self) -> bool {
        let mut answers = BytesMut::new();
        let ward = Guard { worker: &self.worker, client: &self.client, memory: &self.memory };
        let registry = &self.pool.statements;
        let Some(done) = self.session.prepare_alone(self.up.unseen(), registry, &ward, &mut answers) else {
            return false;
        };
        self.up.swallow(done);
        self.down.out(&self.worker.buffers).extend_from_slice(&answers);
        true
    }

    /// Borrows a server connection, after none was idle. `Ok(None)`: the request was answered with an error and the client goes on.
    async fn checkout(&mut self) -> Result<Option<Lease>, End> {
        loop {
            let found = self.client.stand_in_line(&self.pool, &self.worker.stats, self.generation).await;
            match self.after_wait(found) {
                Waited::Found(lease) => return Ok(Some(lease)),
                Waited::Again => {}
                Waited::InVain(answer) => return answer.await.map(|()| None),
            }
            self.route().map_err(End::Told)?;
            if let Some(lease) = self.pool.try_checkout(&self.client.settings, self.may_stay()) {
                return Ok(Some(lease));
            }
        }
    }

    /// What comes of that. No errors are held while they are told: every client would have room for them.
    fn after_wait(&mut self, found: Found) -> Waited<'_> {
        match found {
            Ok(Ok(Some(lease))) => Waited::Found(lease),
            Ok(Ok(None) | Err(CheckoutError::Retired)) => Waited::Again,
            Ok(Err(CheckoutError::Failed(error))) => Waited::InVain(Box::pin(self.refuse_request(error))),
            Err(signal) => Waited::InVain(Box::pin(self.stop_waiting(signal))),
        }
    }

    /// A signal came while the client waited for a server connection: it goes, or its request is answered with an error.
    async fn stop_waiting(&mut self, signal: Signal) -> Result<(), End> {
        match signal {
            Signal::Kill(reason) | Signal::Drain(reason) => Err(End::Told(reason)),
            Signal::CancelWait => {
                let error = PgError::error(sqlstate::QUERY_CANCELED, "canceling statement due to user request");
                self.refuse_request(error).await
            }
        }
    }

    /// Looks again where the tenant lives, if anything has changed in the directory.
    #[inline]
    fn route(&mut self) -> Result<(), PgError> {
        let version = self.worker.directory.version();
        if version == self.client.seen && !self.pool.is_retired() {
            return Ok(());
        }
        let id = &self.client.tenant.id;
        let tenant = self.worker.directory.find(id.as_str()).ok_or_else(|| gone(id.as_str()))?;
        // Its settings were let through for the plan that it had.
        if tenant.status != Status::Active || tenant.plan != self.client.tenant.plan {
            return Err(gone(id.as_str()));
        }
        let pool = self.worker.pools.get(&tenant);
        if !Arc::ptr_eq(&pool, &self.pool) {
            // What is known of earlier generations is gone with the pool.
            self.generation = pool.generation();
            self.pool = pool;
        }
        self.client.tenant = tenant;
        self.client.seen = version;
        Ok(())
    }

    /// Answers the request at hand with an error, skipping all of it: up to the Query or Sync that ends it. The error
    /// goes out at once: a driver that sends Flush waits for it before it sends Sync.
    async fn refuse_request(&mut self, mut error: PgError) -> Result<(), End> {
        self.worker.metrics.count_error(&error.code, "proxy");
        error.severity = crate::error::Severity::Error;
        // At once: a client that has sent a Flush sends its Sync only when it has seen the error.
        message::error_response(self.down.out(&self.worker.buffers), &error);
        poll_fn(|cx| self.poll_skip_request(cx)).await?;
        message::ready_for_query(self.down.out(&self.worker.buffers), b'I');
        Ok(())
    }

    fn poll_skip_request(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        let mut ended = false;
        loop {
            self.up.continue_frame();
            if ended && !self.up.mid_frame() {
                return Poll::Ready(Ok(()));
            }
            let header = match frame::header(self.up.unseen()) {
                Ok(header) => header,
                Err(error) => return Poll::Ready(Err(End::Told(invalid_length(error)))),
            };
            if let Some(header) = header.filter(|_| !ended) {
                match header.tag {
                    b'X' => return Poll::Ready(Err(End::Left)),
                    tag => ended = matches!(tag, b'Q' | b'S' | b'F'),
                }
                self.up.swallow(header.total);
                continue;
            }
            if let Poll::Ready(Signal::Kill(reason) | Signal::Drain(reason)) = self.client.signals.poll(cx) {
                return Poll::Ready(Err(End::Told(reason)));
            }
            if self.down.has_output() && matches!(self.poll_send_down(cx), Poll::Ready(Err(_))) {
                return Poll::Ready(Err(End::Lost));
            }
            match std::task::ready!(self.up.poll_fill(cx, &mut self.client.stream, &self.worker.buffers)) {
                Ok(0) => return Poll::Ready(Err(End::Left)),
                Ok(n) => self.count_client_in(n),
                Err(_) => return Poll::Ready(Err(End::Lost)),
            }
        }
    }

    /// Tells the client why its connection ends, if it still listens.
    async fn say_goodbye(&mut self, error: &PgError) {
        self.worker.metrics.count_error(&error.code, "proxy");
        let mut farewell = error.clone();
        farewell.severity = crate::error::Severity::Fatal;
        let buffers = &self.worker.buffers;
        if !self.down.mid_frame() {
            message::error_response(self.down.out(buffers), &farewell);
        }
        let goodbye = async {
            poll_fn(|cx| self.down.poll_send(cx, &mut self.client.stream, buffers)).await?;
            self.client.stream.shutdown().await
        };
        // It is going anyway.
        let _ = tokio::time::timeout(FAREWELL, goodbye).await;
    }
}

/// How long a client may take to read why its connection ends.
const FAREWELL: Duration = Duration::from_secs(2);

impl Drop for Relay {
    fn drop(&mut self) {
        self.pin(None);
    }
}

/// Whom an exchange waits for, as far as timeouts are concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Waits {
    Nobody,
    /// For a client that keeps the server connection.
    Pinned,
    Client,
    Server,
}

/// Counts a client as waiting while it exists.
struct Waiting<'a>(&'a WorkerStats);

impl<'a> Waiting<'a> {
    fn new(stats: &'a WorkerStats) -> Self {
        metrics::shift(&stats.clients_waiting, 1);
        Self(stats)
    }

    fn waited(&self, long: Duration) {
        self.0.wait_time.observe(long);
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        metrics::shift(&self.0.clients_waiting, -1);
    }
}

fn invalid_length(_: frame::InvalidLength) -> PgError {
    PgError::fatal(sqlstate::PROTOCOL_VIOLATION, "invalid message length")
}

fn server_closed() -> PgError {
    PgError::fatal(sqlstate::CONNECTION_FAILURE, "the server closed the connection unexpectedly")
        .hint("The server process ended, or the server went down; connect again.")
}

fn gone(tenant: &str) -> PgError {
    PgError::fatal(sqlstate::ADMIN_SHUTDOWN, format!("tenant \"{tenant}\" is not available"))
        .detail("It was suspended or deleted while this connection was open.")
}

fn out_of_step(what: &dyn std::fmt::Display) -> Outcome {
    tracing::warn!(%what, "server connection closed: out of step");
    Outcome::told(
        PgError::fatal(sqlstate::PROTOCOL_VIOLATION, "the conversation with the server is out of step")
            .detail(format!("{what}.")),
    )
}
